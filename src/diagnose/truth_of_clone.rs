//! The truth table of EAGAIN: worlds are generated, a model of copy_process's order of checks refuses a clone in them and
//! answers the probes, and what is found out must be true.

use crate::errno::Errno;

use super::*;
use crate::diagnose::Certainty;
use crate::diagnose::cause::{Causes, ThreadsMax, UserProcesses};
use crate::diagnose::rule::Ruling;
use crate::proc::cgroup::{Level, Snapshot};
use crate::proc::parse::UNLIMITED;
use crate::step::{CloneCall, Step};
use crate::sys::clone_probe::Probe;

/// Who can answer in the kernel's place, and does.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Who {
    Absent,
    Quiet,
    /// Every call of its kind.
    AnswersAll,
    /// The refused call alone, and not the probes.
    AnswersOne,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum User {
    Exempt,
    Unlimited,
    Roomy,
    /// The threads of this process alone reach the limit.
    Full,
    /// With tasks that are not this process's.
    FullOfOthers,
    NamespaceRoomy,
    /// By a limit that the user namespace remembers.
    NamespaceFull,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Pids {
    FreeInitial,
    Free,
    OwnFull,
    OuterFull,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum CgroupView {
    Invisible,
    /// Counters of every cgroup's own; or one in the thread's own cgroup.
    Visible {
        local: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fullness {
    Roomy,
    Own,
    Parent,
    Hidden,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct World {
    call: CloneCall,
    tracer: Who,
    filter: Who,
    /// Whether the list of modules can be read, and one of them refuses.
    modules_known: bool,
    module: bool,
    user: User,
    tasks_full: bool,
    tasks_known: bool,
    deadline: bool,
    threads: u64,
    exec: bool,
    pids: Pids,
    group: CgroupView,
    fill: Fullness,
    /// A process was refused: the probes are those of a thread all the same.
    process: bool,
}

const SOFT: u64 = 100;

impl World {
    fn user_is_full(&self) -> bool {
        matches!(
            self.user,
            User::Full | User::FullOfOthers | User::NamespaceFull
        )
    }

    /// Every check that refuses the clone, in the kernel's order. A process shares nothing with a sibling inside execve.
    fn refusing(&self) -> impl Iterator<Item = CauseKind> {
        let met = |kind: &CauseKind| *kind != CauseKind::SiblingExec || !self.process;
        self.refusing_threads().filter(met)
    }

    fn refusing_threads(&self) -> impl Iterator<Item = CauseKind> {
        let answers = |who| matches!(who, Who::AnswersAll | Who::AnswersOne);
        let full = matches!(self.pids, Pids::OwnFull | Pids::OuterFull);
        [
            (CauseKind::Tracer, answers(self.tracer)),
            (CauseKind::Seccomp, answers(self.filter)),
            (CauseKind::UserProcesses, self.user_is_full()),
            (CauseKind::ThreadsMax, self.tasks_full),
            (CauseKind::DeadlineScheduling, self.deadline),
            (CauseKind::SecurityModule, self.module),
            (CauseKind::SiblingExec, self.exec),
            (CauseKind::PidNumbers, full),
            (CauseKind::PidsCgroup, self.fill != Fullness::Roomy),
        ]
        .into_iter()
        .filter_map(|(kind, refuses)| refuses.then_some(kind))
    }

    /// The answer to a probe.
    fn answer(&self, probe: Probe) -> Result<(), Errno> {
        if [self.tracer, self.filter].contains(&Who::AnswersAll) {
            return Err(Errno::EAGAIN);
        }
        let (fs, numbers, passed) = match probe {
            Probe::Clone3Empty | Probe::Clone3Flags => return Err(Errno::EINVAL),
            Probe::PidNumber { fs } => (fs, false, Errno::EINVAL),
            Probe::Cgroup => (false, true, Errno::EBADF),
            Probe::ThreadPointer { fs } => (fs, false, Errno::EPERM),
        };
        let met = |kind: CauseKind| match kind {
            CauseKind::Tracer | CauseKind::Seccomp | CauseKind::PidsCgroup => false,
            CauseKind::SiblingExec => fs,
            CauseKind::PidNumbers => numbers,
            _ => true,
        };
        Err(match self.refusing_threads().any(met) {
            true => Errno::EAGAIN,
            false => passed,
        })
    }

    fn status(&self) -> Status {
        let of = |who, value| match who {
            Who::Absent => Some(0),
            _ => Some(value),
        };
        Status {
            uid: Some(if self.user == User::Exempt { 0 } else { 1000 }),
            capabilities: Some(0),
            threads: Some(match self.user {
                User::Full => SOFT,
                _ => self.threads,
            }),
            seccomp: of(self.filter, 2),
            tracer: of(self.tracer, 4242),
            ..Status::default()
        }
    }

    fn limits(&self) -> ProcessLimits {
        let status = self.status();
        let in_namespace = matches!(self.user, User::NamespaceRoomy | User::NamespaceFull);
        let soft = match self.user {
            User::Unlimited => UNLIMITED,
            _ => SOFT,
        };
        let tasks = self
            .tasks_known
            .then_some(if self.tasks_full { 5000 } else { 4000 });
        let user = UserProcesses {
            uid: status.uid,
            soft: Some(soft),
            hard: Some(soft),
            initial_user_namespace: Some(!in_namespace),
            tasks,
            own_threads: status.threads,
            visible: None,
        };
        let threads_max = ThreadsMax {
            tasks,
            maximum: Some(5000),
        };
        let policy = if self.deadline { 6 } else { 0 };
        let flags = (self.filter == Who::Absent).then_some(0);
        ProcessLimits::of(&status, user, threads_max, Some((policy, flags)))
    }

    fn outside(&self, error: &StepError, seen: &mut Unknown) -> Outside {
        let list = self.modules_known.then_some(match self.module {
            true => InlinePath::new(b"yama,bpf"),
            false => InlinePath::new(b"yama"),
        });
        let status = self.status();
        Outside::read(error, &status, list, seen, &mut |probe| self.answer(probe))
    }

    fn error(&self) -> StepError {
        StepError {
            call: self.call,
            task: match self.process {
                true => Task::Process { copies: true },
                false => Task::Thread,
            },
            probes: !self.process || self.filter == Who::Absent,
            ..StepError::new(Step::Clone, Errno::EAGAIN, 0)
        }
    }

    fn reached(&self, outside: &Outside, seen: &mut Unknown) -> Reached {
        let calls = self.status().calls();
        let mut kernel = |probe| self.answer(probe);
        probe::ask(&mut seen.oracle, &self.error(), outside, calls, &mut kernel)
    }

    /// `refusals`: so many were counted before.
    fn snapshot(&self, refusals: u64) -> Option<Snapshot> {
        let CgroupView::Visible { local } = self.group else {
            return None;
        };
        let level = |full, counts: bool| Level {
            maximum: Some(10),
            current: Some(if full { 10 } else { 3 }),
            failures: Some(if counts { refusals } else { 0 }),
            local,
            ..Level::NONE
        };
        let own = level(
            self.fill == Fullness::Own,
            !local || self.fill == Fullness::Own,
        );
        let parent = level(
            self.fill == Fullness::Parent,
            local && self.fill == Fullness::Parent,
        );
        Some(Snapshot::of(&[own, parent], true))
    }

    /// That of its own namespace, as large as by default.
    fn pid_max(&self) -> u64 {
        match self.pids {
            Pids::OwnFull => 700,
            _ => 4_194_304,
        }
    }

    fn numbers(&self) -> Numbers {
        match self.pids {
            // Under a filter none is probed.
            _ if self.filter != Who::Absent => Numbers::Unclear,
            Pids::OwnFull => Numbers::NoneFree,
            Pids::FreeInitial => Numbers::Plenty,
            _ => Numbers::Unclear,
        }
    }
}

/// What is found out of a clone that was refused in one world, where the probes and readings before and after it are
/// those of others.
fn found(before: &World, at: &World, after: &World, repeated: bool) -> Option<Ruling> {
    let seen = &mut Unknown::default();
    let error = at.error();
    let outside = before.outside(&error, seen);
    if outside.answers() {
        return Some(rule(&outside.checks(), repeated));
    }
    let reached = before.reached(&outside, seen);
    if repeated && reached != after.reached(&outside, seen) {
        return None;
    }
    let rise = u64::from(at.refusing().next() == Some(CauseKind::PidsCgroup));
    let snapshots = (before.snapshot(7), after.snapshot(7 + rise));
    let numbers = match repeated && before.numbers() != after.numbers() {
        true => Numbers::Unclear,
        false => before.numbers(),
    };
    let facts = Facts {
        outside,
        reached,
        task: error.task,
        repeated,
        limits: before.limits().and(after.limits()),
        threads: before.status().threads,
        numbers: match reached.may_be_numbers() {
            true => numbers,
            false => Numbers::Unclear,
        },
        pid_max: reached.may_be_numbers().then_some(after.pid_max()),
        cgroup: match (reached.may_be_cgroup(), snapshots) {
            (true, (Some(before), Some(after))) if repeated => judge(Some(&before), &after),
            (true, (Some(before), _)) if !repeated => judge(None, &before),
            _ => Judgement::Open,
        },
    };
    Some(rule(&facts.checks(), repeated))
}

fn check(before: &World, at: &World, after: &World, repeated: bool) -> Option<Ruling> {
    let truth = at.refusing().next()?;
    let ruling = found(before, at, after, repeated)?;
    let stable = before == at && at == after;
    let listed = ruling.alternatives.contains(truth);
    let right = match (ruling.named, ruling.certainty) {
        (Some(named), Certainty::Proven) if stable => named == truth,
        // Another that stands in the way may have been met first at that moment.
        (Some(named), Certainty::Proven) => at.refusing().any(|kind| kind == named),
        (Some(named), _) => named == truth || listed,
        (None, _) => listed || ruling.alternatives == Causes::NONE,
    };
    assert!(
        right,
        "{truth:?} refused, but {ruling:?}, repeated: {repeated}\nbefore: {before:?}\nat: {at:?}\nafter: {after:?}"
    );
    Some(ruling)
}

fn worlds() -> impl Iterator<Item = World> {
    use CloneCall::{Clone, Clone3};
    const WHO: [Who; 4] = [Who::Absent, Who::Quiet, Who::AnswersAll, Who::AnswersOne];
    const USERS: [User; 7] = [
        User::Exempt,
        User::Unlimited,
        User::Roomy,
        User::Full,
        User::FullOfOthers,
        User::NamespaceRoomy,
        User::NamespaceFull,
    ];
    const PIDS: [Pids; 4] = [
        Pids::FreeInitial,
        Pids::Free,
        Pids::OwnFull,
        Pids::OuterFull,
    ];
    const GROUPS: [CgroupView; 3] = [
        CgroupView::Invisible,
        CgroupView::Visible { local: false },
        CgroupView::Visible { local: true },
    ];
    const FILLS: [Fullness; 4] = [
        Fullness::Roomy,
        Fullness::Own,
        Fullness::Parent,
        Fullness::Hidden,
    ];
    let sizes = [2, 4, 4, 2, 2, 7, 2, 2, 2, 3, 4, 3, 4];
    let count = sizes.iter().product::<usize>();
    (0..count).map(move |number| {
        let mut rest = number;
        let mut next = |size: usize| {
            let digit = rest % size;
            rest /= size;
            digit
        };
        let call = [Clone3, Clone][next(2)];
        let (tracer, filter) = (WHO[next(4)], WHO[next(4)]);
        let (modules_known, module) = (next(2) == 0, next(2) == 1);
        let user = USERS[next(7)];
        let (tasks_full, tasks_known, deadline) = (next(2) == 1, next(2) == 0, next(2) == 1);
        let (threads, exec) = [(1, false), (3, false), (3, true)][next(3)];
        let (pids, group, fill) = (PIDS[next(4)], GROUPS[next(3)], FILLS[next(4)]);
        World {
            call,
            tracer,
            filter,
            modules_known,
            module,
            user,
            tasks_full,
            tasks_known,
            deadline,
            threads,
            exec,
            pids,
            group,
            fill,
            process: false,
        }
    })
}

#[test]
fn what_stands_is_named_rightly() {
    let mut seen = 0_u64;
    for world in worlds() {
        for repeated in [true, false] {
            seen += u64::from(check(&world, &world, &world, repeated).is_some());
        }
    }
    println!("{seen} refusals");
    assert!(seen > 1_000_000);
}

/// Which cannot be repeated.
#[test]
fn what_refuses_a_process_is_never_named_wrongly() {
    for world in worlds() {
        let at = World {
            process: true,
            ..world
        };
        if let Some(ruling) = check(&at, &at, &at, false) {
            assert_ne!(ruling.named, Some(CauseKind::SiblingExec), "{at:?}");
            assert!(
                !ruling.alternatives.contains(CauseKind::SiblingExec),
                "{at:?}"
            );
        }
    }
}

/// A limit that is full at the refusal and has room before or after it, and one that is full only then.
#[test]
fn what_comes_and_goes_is_never_named_wrongly() {
    let quiet = |world: &World| {
        let who = [world.tracer, world.filter];
        who == [Who::Absent; 2] && world.modules_known
    };
    for at in worlds().filter(quiet) {
        let turned = |change: fn(&mut World)| {
            let mut other = at;
            change(&mut other);
            other
        };
        for other in [
            turned(|world| world.user = User::Roomy),
            turned(|world| world.user = User::Unlimited),
            turned(|world| world.tasks_full = !world.tasks_full),
            turned(|world| world.exec = !world.exec && world.threads > 1),
            turned(|world| world.pids = Pids::Free),
            turned(|world| world.fill = Fullness::Roomy),
        ] {
            check(&other, &at, &at, true);
            check(&at, &at, &other, true);
            check(&other, &at, &other, false);
        }
    }
}

/// Where one thing refuses, and no filter or tracer is there, it is proven.
#[test]
fn one_cause_alone_is_proven() {
    let plain = World {
        call: CloneCall::Clone3,
        tracer: Who::Absent,
        filter: Who::Absent,
        modules_known: true,
        module: false,
        user: User::Exempt,
        tasks_full: false,
        tasks_known: true,
        deadline: false,
        threads: 3,
        exec: false,
        pids: Pids::Free,
        group: CgroupView::Visible { local: true },
        fill: Fullness::Roomy,
        process: false,
    };
    for (change, certainty) in [
        (
            (|world| world.user = User::Full) as fn(&mut World),
            Certainty::Proven,
        ),
        (|world| world.tasks_full = true, Certainty::Proven),
        (|world| world.deadline = true, Certainty::Proven),
        (|world| world.exec = true, Certainty::Proven),
        (|world| world.pids = Pids::OwnFull, Certainty::Proven),
        (|world| world.pids = Pids::OuterFull, Certainty::Proven),
        (|world| world.fill = Fullness::Own, Certainty::Proven),
        (|world| world.fill = Fullness::Parent, Certainty::Proven),
        (|world| world.tracer = Who::AnswersAll, Certainty::Proven),
        (|world| world.filter = Who::AnswersAll, Certainty::Proven),
        // Docker's and Kubernetes' limit: a filter without clone3, and a cgroup namespace.
        (
            |world| {
                (world.call, world.filter, world.fill) =
                    (CloneCall::Clone, Who::Quiet, Fullness::Hidden);
            },
            Certainty::Inferred,
        ),
        // Nothing in sight shows them.
        (|world| world.fill = Fullness::Hidden, Certainty::Inferred),
        (
            |world| world.user = User::NamespaceFull,
            Certainty::Inferred,
        ),
        (|world| world.module = true, Certainty::Inferred),
        (|world| world.tracer = Who::AnswersOne, Certainty::Unknown),
    ] {
        let mut world = plain;
        change(&mut world);
        let ruling = check(&world, &world, &world, true).expect("a refusal");
        assert_eq!(ruling.certainty, certainty, "{ruling:?} of {world:?}");
        let once = check(&world, &world, &world, false).expect("a refusal");
        assert_ne!(once.certainty, Certainty::Proven, "{once:?} of {world:?}");
    }
}
