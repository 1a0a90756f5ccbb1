//! From a refused step to a [`Cause`].
//!
//! Runs while the machine is out of something: no heap, no panic, some KiB of stack (`tests/stack_use.rs`), some
//! dozen system calls.
//! A cause is named only with evidence; naming the wrong limit is worse than naming none. What each claim rests
//! on:
//!
//! - [`probe`] asks the kernel how far a clone gets now. Limits near their maximum flicker while other tasks come
//!   and go, so one answer is not enough: the questions are asked before and after a repetition of the refused
//!   call, and must agree.
//! - RLIMIT_NPROC has no visible count. It is named by elimination, and excluded where the caller is exempt or
//!   the whole machine has fewer tasks than the limit.
//! - A cgroup is proven by its own refusal counter rising over a repeated refusal, and inferred without.
//! - Under a system-call filter only files are read and the refused call's own number is used, because another
//!   call may kill the process.
//!
//! With `again`, the refused call is repeated one to three times, until it is granted or the answers agree.
//! Without (`RetryPolicy::never`), nothing that could create a task is called; then a full cgroup is inferred,
//! not proven.

pub(crate) mod cause;
mod cgroup;
pub(crate) mod headroom;
mod limits;
mod memory;
mod probe;

use std::time::{Duration, Instant};

use nix::errno::Errno;

pub(crate) use cause::Explanation;
pub use cause::{
    Answer, Cause, CauseKind, Causes, Certainty, CgroupPlace, CloneCall, InlinePath, MemoryOracle,
    Oracle, PidLevel,
};
pub use headroom::{Headroom, HeadroomLimit, Unit, headroom, headroom_of};

use crate::clone::probe as calls_of_clone;
use crate::error::Step;
use cgroup::{Hierarchy, Judgement, Snapshot};
use limits::{
    CAP_SYS_ADMIN, CAP_SYS_NICE, CAP_SYS_RESOURCE, Calls, Limit, Limited, PidNumbersSeen, Status,
    UNLIMITED,
};
use probe::Reached;

/// What is known of a refusal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Circumstances<'a> {
    pub(crate) step: Step,
    pub(crate) errno: Errno,
    /// Length in bytes that the step asked for, or 0.
    pub(crate) bytes: usize,
    /// The call that was refused last.
    pub(crate) clone_call: CloneCall,
    /// Its flags.
    pub(crate) flags: u64,
    /// Whether threads of this crate have ended within the last milliseconds: until the kernel has reaped them
    /// they count, so that a full counter is worth a retry.
    pub(crate) reaping: bool,
    /// How many threads glibc counts, if one of this crate's has ended within the last seconds: while the kernel
    /// counts more, it has still to reap one, which on a busy machine takes longer.
    pub(crate) known_threads: Option<u64>,
    /// What an invalid attribute or a failed check was, for those steps.
    pub(crate) what: &'a Detail,
}

/// What only the refusing step knows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Detail {
    pub(crate) what: &'static str,
    pub(crate) value: u64,
}

/// The outcome of a diagnosis.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Verdict {
    pub(crate) cause: Cause,
    pub(crate) certainty: Certainty,
    /// What else it could be, when inferred.
    pub(crate) alternatives: Causes,
    /// Why the kernel could not be asked what refused a clone, where that is so.
    pub(crate) silence: Option<&'static str>,
    /// Whether retrying for some milliseconds is right.
    pub(crate) transient: bool,
    /// How often the refused call was repeated.
    pub(crate) repeated: u32,
    pub(crate) spent: Duration,
}

impl Verdict {
    /// Before anything was looked at.
    pub(crate) const NONE: Verdict = Verdict {
        cause: Cause::Unknown {
            oracle: Oracle {
                clone3_empty: Answer::NotAsked,
                until_pid_number: Answer::NotAsked,
                until_pid_number_with_fs: Answer::NotAsked,
                until_cgroup: Answer::NotAsked,
                until_thread_pointer: Answer::NotAsked,
                until_flags: Answer::NotAsked,
                repeated: Answer::NotAsked,
            },
            memory: MemoryOracle {
                number_of_mappings: Answer::NotAsked,
                free_addresses: Answer::NotAsked,
                inaccessible: Answer::NotAsked,
                unreserved: Answer::NotAsked,
                shared: Answer::NotAsked,
                stack: Answer::NotAsked,
                guard: Answer::NotAsked,
            },
            tasks: None,
            threads_max: None,
            nproc: None,
            pid_max: None,
            seccomp: None,
        },
        certainty: Certainty::Unknown,
        alternatives: Causes::NONE,
        silence: None,
        transient: false,
        repeated: 0,
        spent: Duration::ZERO,
    };
}

/// `vm.max_map_count`: the mappings that a process can have.
pub(crate) fn max_map_count() -> Option<u64> {
    limits::number_in(c"/proc/sys/vm/max_map_count")
}

/// As [`diagnose`], for a step that is not repeated.
pub(crate) fn explain(circumstances: &Circumstances<'_>) -> Verdict {
    match diagnose(circumstances, None) {
        Finding::Verdict(verdict) => verdict,
        // Nothing was repeated, so nothing can have been granted.
        Finding::Succeeded => Verdict::NONE,
    }
}

/// What came out of it: a verdict, or the thread after all.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::large_enum_variant, reason = "boxing would allocate")]
pub(crate) enum Finding {
    Verdict(Verdict),
    /// A repetition was granted: the refusal was transient and the thread exists now.
    Succeeded,
}

/// Repeats the refused call.
pub(crate) type Again<'a> = &'a mut dyn FnMut() -> Result<(), Errno>;

/// Bit of clone3's flags; libc's constant of that name is too narrow for it.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// How often the oracle is asked at most; each question briefly charges the counters it asks about.
const MOST_QUESTIONS: u32 = 6;

/// Answers that agree this often are believed even where flicker of another limit cannot be excluded.
const AGREEING: u32 = 4;

/// Tasks that can come or go between two readings.
const MARGIN: u64 = 64;

/// Names the cause of a refusal.
///
/// `again` repeats the refused call and is used for [`Step::Clone`] only. Once it has returned `Ok` it is not
/// called again.
pub(crate) fn diagnose(circumstances: &Circumstances<'_>, again: Option<Again<'_>>) -> Finding {
    let start = Instant::now();
    let mut readings = Readings::default();
    let mut repetition = Repetition {
        again,
        count: 0,
        errno: circumstances.errno,
    };
    let naming = match name(circumstances, &mut readings, &mut repetition) {
        Ok(naming) => naming,
        Err(Granted) => {
            return Finding::Succeeded;
        }
    };
    let cause = naming.cause.unwrap_or_else(|| readings.unknown());
    Finding::Verdict(Verdict {
        cause,
        certainty: naming.certainty,
        alternatives: naming.alternatives,
        silence: readings.oracle.silence(),
        transient: naming.transient,
        repeated: repetition.count,
        spent: start.elapsed(),
    })
}

/// A repetition of the refused call was granted.
struct Granted;

struct Repetition<'a> {
    again: Option<Again<'a>>,
    count: u32,
    errno: Errno,
}

impl Repetition<'_> {
    /// Whether the call was repeated and refused with the same errno. Without a way to repeat: false.
    fn refused(&mut self, readings: &mut Readings) -> Result<bool, Granted> {
        let Some(again) = self.again.as_mut() else {
            return Ok(false);
        };
        self.count += 1;
        match again() {
            Ok(()) => Err(Granted),
            Err(errno) => {
                readings.oracle.repeated = Answer::Refused(errno);
                Ok(errno == self.errno)
            }
        }
    }

    fn is_possible(&self) -> bool {
        self.again.is_some()
    }
}

/// All that was read, for a cause that stays unknown.
#[derive(Clone, Copy, Debug, Default)]
struct Readings {
    oracle: Oracle,
    memory: MemoryOracle,
    tasks: Option<u64>,
    threads_max: Option<u64>,
    nproc: Option<u64>,
    pid_max: Option<u64>,
    seccomp: Option<u64>,
}

impl Readings {
    fn unknown(&self) -> Cause {
        Cause::Unknown {
            oracle: self.oracle,
            memory: self.memory,
            tasks: self.tasks,
            threads_max: self.threads_max,
            nproc: self.nproc,
            pid_max: self.pid_max,
            seccomp: self.seccomp,
        }
    }
}

/// A cause and how sure it is.
#[derive(Clone, Copy, Debug)]
struct Naming {
    cause: Option<Cause>,
    certainty: Certainty,
    alternatives: Causes,
    transient: bool,
}

impl Naming {
    fn unknown() -> Naming {
        Naming {
            cause: None,
            certainty: Certainty::Unknown,
            alternatives: Causes::NONE,
            transient: false,
        }
    }

    fn proven(cause: Cause) -> Naming {
        Naming {
            cause: Some(cause),
            certainty: Certainty::Proven,
            ..Naming::unknown()
        }
    }

    fn inferred(cause: Cause, alternatives: Causes) -> Naming {
        Naming {
            cause: Some(cause),
            certainty: Certainty::Inferred,
            alternatives: alternatives.without(cause.kind()),
            transient: false,
        }
    }

    fn believed(cause: Cause, proven: bool, alternatives: Causes) -> Naming {
        if proven {
            Naming::proven(cause)
        } else {
            Naming::inferred(cause, alternatives)
        }
    }

    fn transient(mut self) -> Naming {
        self.transient = true;
        self
    }

    fn transient_if(mut self, yes: bool) -> Naming {
        self.transient |= yes;
        self
    }

    fn at_most_inferred(self, others: impl IntoIterator<Item = CauseKind>) -> Naming {
        match self.cause {
            Some(cause) => Naming {
                transient: self.transient,
                ..Naming::inferred(cause, others.into_iter().collect())
            },
            None => self,
        }
    }
}

fn name(
    c: &Circumstances<'_>,
    readings: &mut Readings,
    repetition: &mut Repetition<'_>,
) -> Result<Naming, Granted> {
    let Detail { what, value } = *c.what;
    match c.step {
        Step::Attributes => return Ok(Naming::proven(Cause::InvalidAttribute { what, value })),
        Step::Runtime => return Ok(Naming::proven(Cause::UnsupportedRuntime { what })),
        _ => {}
    }
    let status = Status::read();
    readings.seccomp = status.seccomp;
    match c.step {
        Step::Allocate
        | Step::MapStack
        | Step::GuardStack
        | Step::PrepareStack
        | Step::AllocateTls => Ok(memory::diagnose(c, &status, readings)),
        Step::Clone => clone(c, &status, readings, repetition),
        Step::Affinity if c.errno == Errno::EINVAL => {
            let cpuset = Hierarchy::of_thread(b"cpuset");
            let directory = cpuset.map_or(InlinePath::EMPTY, |cpuset| cpuset.own_directory());
            Ok(Naming::proven(Cause::OutsideCpuset { directory }))
        }
        Step::Affinity | Step::Scheduler | Step::Cgroup
            if matches!(c.errno, Errno::EPERM | Errno::EACCES) =>
        {
            let what = match c.step {
                Step::Affinity => "setting the affinity",
                Step::Scheduler => "the scheduling policy or priority",
                _ => "entering the cgroup",
            };
            Ok(Naming::proven(Cause::NotPermitted {
                what,
                cap_sys_nice: status.capabilities.map(|_| status.has(CAP_SYS_NICE)),
                rtprio: limits::limit(Limited::RealTimePriority, status.calls())
                    .map(|limit| limit.soft),
            }))
        }
        _ => Ok(Naming::unknown()),
    }
}

fn clone(
    c: &Circumstances<'_>,
    status: &Status,
    readings: &mut Readings,
    repetition: &mut Repetition<'_>,
) -> Result<Naming, Granted> {
    readings.oracle.clone3_empty = calls_of_clone::clone3_empty().into();
    if let Some(naming) = filter(c, status, readings) {
        return Ok(naming);
    }
    match c.errno {
        Errno::EAGAIN => refused_for_now(c, status, readings, repetition),
        Errno::ENOMEM => out_of_memory(c, status, readings, repetition),
        Errno::EINVAL => Ok(unshared(readings, status.calls())),
        _ => Ok(Naming::unknown()),
    }
}

/// Whether a filter answered: it gives an errno that the kernel never gives to that question.
fn filter(c: &Circumstances<'_>, status: &Status, readings: &mut Readings) -> Option<Naming> {
    let oracle = &mut readings.oracle;
    let answer = match c.clone_call {
        // The kernel's answer to no arguments may be a supervisor's that has no opinion of them.
        CloneCall::Clone3 if status.seccomp != Some(0) && oracle.clone3_empty.is(Errno::EINVAL) => {
            oracle.until_flags = calls_of_clone::until_clone3_flags().into();
            oracle.until_flags
        }
        CloneCall::Clone3 => oracle.clone3_empty,
        // Unless there is no filter: the question has flags that the program never used. And only after the
        // clone that reaches furthest has got the refusal's own errno.
        CloneCall::Clone if status.seccomp != Some(0) => {
            oracle.until_thread_pointer =
                calls_of_clone::until_thread_pointer(c.flags, true).into();
            if !oracle.until_thread_pointer.is(c.errno) {
                return None;
            }
            oracle.until_flags = calls_of_clone::until_flags(c.flags).into();
            oracle.until_flags
        }
        CloneCall::Clone => return None,
    };
    if !answer.is(c.errno) || answer.is(Errno::EINVAL) {
        return None;
    }
    let cause = Cause::Seccomp {
        call: c.clone_call,
        answer,
        mode: status.seccomp,
        filters: status.filters,
    };
    match status.seccomp {
        // No filter is installed, so a tracer or a kernel that is not Linux answered.
        Some(0) => Some(Naming::unknown()),
        // A kernel without clone3 answers ENOSYS itself, but then clone was refused, not clone3.
        Some(_) if status.tracer.unwrap_or(0) == 0 => Some(Naming::proven(cause)),
        _ => Some(Naming::inferred(cause, Causes::NONE)),
    }
}

/// EINVAL: the program's own doing, or flags this kernel does not know.
fn unshared(readings: &mut Readings, calls: Calls) -> Naming {
    let own = limits::namespace(c"/proc/thread-self/ns/pid", calls);
    let children = limits::namespace(c"/proc/thread-self/ns/pid_for_children", calls);
    let cause = |for_children| Cause::UnsharedPidNamespace {
        own: own.ok(),
        for_children,
    };
    // A kernel with clone3 has this file, so a missing one means a namespace that no process has entered.
    let has_clone3 = readings.oracle.clone3_empty.is(Errno::EINVAL);
    match (own, children) {
        (Ok(own), Ok(children)) if own != children => Naming::proven(cause(Some(children))),
        (Ok(_), Err(Errno::ENOENT)) if has_clone3 => Naming::proven(cause(None)),
        (Ok(_), Ok(_)) => Naming::unknown(),
        _ => {
            readings.oracle.until_cgroup = calls_of_clone::until_cgroup().into();
            Naming::unknown()
        }
    }
}

/// Limits of the process and the machine, read once per diagnosis.
struct ProcessLimits {
    tasks: Option<u64>,
    threads_max: Option<u64>,
    nproc: Option<Limit>,
    initial_user_namespace: Option<bool>,
    /// RLIMIT_NPROC cannot have refused.
    nproc_excluded: bool,
    /// kernel.threads-max cannot have refused.
    threads_excluded: bool,
    /// kernel.threads-max is reached.
    threads_full: bool,
}

impl ProcessLimits {
    fn read(status: &Status, readings: &mut Readings) -> ProcessLimits {
        let calls = status.calls();
        let tasks = limits::tasks(calls);
        let threads_max = limits::threads_max();
        let nproc = limits::limit(Limited::Processes, calls);
        let initial_user_namespace = limits::in_initial_user_namespace(calls);
        let exempt =
            status.uid == Some(0) || status.has(CAP_SYS_RESOURCE) || status.has(CAP_SYS_ADMIN);
        // Nobody can have more tasks than the machine.
        let unreachable = match (nproc, tasks) {
            (Some(nproc), _) if nproc.soft == UNLIMITED => true,
            (Some(nproc), Some(tasks)) => nproc.soft > tasks.saturating_add(MARGIN),
            _ => false,
        };
        readings.tasks = tasks;
        readings.threads_max = threads_max;
        readings.nproc = nproc.map(|nproc| nproc.soft);
        let both = tasks.zip(threads_max);
        ProcessLimits {
            tasks,
            threads_max,
            nproc,
            initial_user_namespace,
            // Neither holds in another user namespace: its root is nobody here, and it remembers a limit.
            nproc_excluded: initial_user_namespace == Some(true) && (exempt || unreachable),
            threads_excluded: both.is_some_and(|(tasks, most)| tasks.saturating_add(MARGIN) < most),
            threads_full: both.is_some_and(|(tasks, most)| tasks >= most),
        }
    }

    /// Neither of the two counters can have refused, now or in between.
    fn excluded(&self) -> bool {
        self.nproc_excluded && self.threads_excluded
    }

    fn possible(&self) -> Causes {
        let mut set = Causes::NONE;
        if !self.nproc_excluded {
            set = set.with(CauseKind::UserProcesses);
        }
        if !self.threads_excluded {
            set = set.with(CauseKind::ThreadsMax);
        }
        set
    }

    fn user_processes(&self, status: &Status) -> Cause {
        Cause::UserProcesses {
            uid: status.uid,
            soft: self.nproc.map(|nproc| nproc.soft),
            hard: self.nproc.map(|nproc| nproc.hard),
            initial_user_namespace: self.initial_user_namespace,
            tasks: self.tasks,
        }
    }
}

/// The caller's scheduling, as far as it matters to clone.
enum Deadline {
    No,
    /// SCHED_DEADLINE without reset-on-fork.
    Yes {
        policy: u32,
        flags: u64,
    },
    /// SCHED_DEADLINE, flags unknown.
    Maybe {
        policy: u32,
    },
    Unread,
}

fn deadline(calls: Calls) -> Deadline {
    const SCHED_DEADLINE: u32 = 6;
    const RESET_ON_FORK: u64 = 1;
    let (policy, flags) = match calls {
        Calls::Any => match calls_of_clone::scheduling() {
            Ok((policy, flags)) => (policy, Some(flags)),
            Err(_) => return Deadline::Unread,
        },
        Calls::FilesOnly => match limits::policy_by_file() {
            Some(policy) => (policy, None),
            None => return Deadline::Unread,
        },
    };
    match flags {
        _ if policy != SCHED_DEADLINE => Deadline::No,
        Some(flags) if flags & RESET_ON_FORK != 0 => Deadline::No,
        Some(flags) => Deadline::Yes { policy, flags },
        None => Deadline::Maybe { policy },
    }
}

/// How often the oracle stopped where.
#[derive(Default)]
struct Tally {
    asked: u32,
    process_limits: u32,
    exec: u32,
    pid_numbers: u32,
    beyond: u32,
}

impl Tally {
    fn add(&mut self, reached: Reached) {
        self.asked += 1;
        let count = match reached {
            Reached::ProcessLimits | Reached::ProcessLimitsOrExec => &mut self.process_limits,
            Reached::SiblingExec => &mut self.exec,
            Reached::PidNumbers => &mut self.pid_numbers,
            Reached::BeyondPidNumbers | Reached::BeyondThreadPointer => &mut self.beyond,
            _ => return,
        };
        *count += 1;
    }

    fn all(&self, count: u32) -> bool {
        count == self.asked
    }
}

/// EAGAIN: counters, numbers, execve, deadline, cgroup.
fn refused_for_now(
    c: &Circumstances<'_>,
    status: &Status,
    readings: &mut Readings,
    repetition: &mut Repetition<'_>,
) -> Result<Naming, Granted> {
    let calls = status.calls();
    let more = |known: u64| status.threads.is_some_and(|threads| threads > known);
    let reaping = c.reaping || c.known_threads.is_some_and(more);
    let ask = |readings: &mut Readings| probe::ask(&mut readings.oracle, c.flags, calls);
    let mut tally = Tally::default();
    let mut limits: Option<ProcessLimits> = None;
    let mut pids: Option<Hierarchy> = None;
    let mut located = false;
    let mut elsewhere = false;
    let mut cgroups_open = 0;
    loop {
        let first = ask(readings);
        tally.add(first);
        let limits = limits.get_or_insert_with(|| ProcessLimits::read(status, readings));
        match first {
            Reached::Unusable | Reached::KernelMemory | Reached::PidMemory => {
                return Ok(Naming::unknown().transient_if(first != Reached::Unusable));
            }
            Reached::BeyondPidNumbers | Reached::BeyondThreadPointer => {
                if !std::mem::replace(&mut located, true) {
                    pids = Hierarchy::of_thread(b"pids");
                    // With CLONE_INTO_CGROUP another v2 cgroup than the caller's is charged.
                    elsewhere = c.flags & CLONE_INTO_CGROUP != 0
                        && pids.as_ref().is_some_and(|pids| pids.version == 2);
                    pids = pids.filter(|_| !elsewhere);
                }
                let snapshot = |pids: &Hierarchy| pids.snapshot(&cgroup::PIDS);
                let before = pids.as_ref().map(snapshot);
                let repeated = repetition.refused(readings)?;
                if !repeated && repetition.is_possible() {
                    // Refused with another errno than before: something else is going on.
                    return Ok(Naming::unknown().transient());
                }
                let after = pids.as_ref().filter(|_| repeated).map(snapshot);
                let second = ask(readings);
                tally.add(second);
                let agree = first == second;
                let judgement = match (&before, &after) {
                    (Some(before), Some(after)) => cgroup::judge(Some(before), after),
                    (Some(only), None) => cgroup::judge(None, only),
                    _ => Judgement::Open,
                };
                if let Some(naming) = pids_cgroup(&judgement, pids.as_ref(), agree, first, limits) {
                    return Ok(naming.transient_if(reaping || !agree));
                }
                if matches!(judgement, Judgement::Open) {
                    cgroups_open += 2;
                }
            }
            _ => {
                if !repetition.refused(readings)? && repetition.is_possible() {
                    return Ok(Naming::unknown().transient());
                }
                tally.add(ask(readings));
            }
        }
        let done = match first {
            Reached::ProcessLimits | Reached::ProcessLimitsOrExec => {
                tally.all(tally.process_limits)
            }
            Reached::SiblingExec => {
                tally.all(tally.exec) && (limits.excluded() || tally.exec >= AGREEING)
            }
            Reached::PidNumbers => {
                tally.all(tally.pid_numbers) && (limits.excluded() || tally.pid_numbers >= AGREEING)
            }
            _ => !repetition.is_possible(),
        };
        if !done && tally.asked < MOST_QUESTIONS {
            continue;
        }
        // Another limit in between would have shown in one of the earlier questions, too.
        let unanimous = Some(first).filter(|_| {
            tally.all(tally.process_limits)
                || tally.all(tally.exec)
                || tally.all(tally.pid_numbers)
                || tally.all(tally.beyond)
        });
        let naming = match unanimous {
            Some(Reached::ProcessLimits) => process_limits(limits, status, false),
            Some(Reached::ProcessLimitsOrExec) => process_limits(limits, status, true),
            Some(Reached::PidNumbers) => pid_numbers(limits, calls, readings, tally.pid_numbers),
            Some(Reached::SiblingExec) => sibling_exec(limits, status, calls, readings, &tally),
            Some(Reached::BeyondPidNumbers)
                if cgroups_open >= tally.asked && tally.asked >= AGREEING && limits.excluded() =>
            {
                hidden_cgroup(match elsewhere {
                    true => CgroupPlace::Target,
                    false if pids.is_some() => CgroupPlace::Hidden,
                    false => CgroupPlace::Unclear,
                })
            }
            Some(Reached::BeyondThreadPointer) => numbers_without_oracle(calls, readings),
            _ if tally.exec > 0 => sibling_exec(limits, status, calls, readings, &tally),
            _ => Naming::unknown().transient(),
        };
        // Ended threads stand in nobody's way where something else than a count refused.
        let counted = naming
            .cause
            .is_some_and(|cause| naming.alternatives.with(cause.kind()).has_count());
        return Ok(naming.transient_if(reaping && counted));
    }
}

/// Everything but the cgroup is passed.
fn pids_cgroup(
    judgement: &Judgement,
    hierarchy: Option<&Hierarchy>,
    agree: bool,
    reached: Reached,
    limits: &ProcessLimits,
) -> Option<Naming> {
    let hierarchy = hierarchy?;
    let cause = |level: Option<cgroup::Level>, place, refusals| Cause::PidsCgroup {
        directory: level.map_or(InlinePath::EMPTY, |level| hierarchy.directory(&level)),
        place,
        version: hierarchy.version,
        current: level.and_then(|level| level.current),
        maximum: level.and_then(|level| level.maximum),
        refusals,
    };
    let mut others = limits
        .possible()
        .with(CauseKind::SiblingExec)
        .with(CauseKind::PidNumbers);
    match *judgement {
        Judgement::Counted { level, place, rise } => {
            // One more in the counter is our own refusal. More are somebody's, and whether ours is among them
            // depends on what else could have refused it.
            let ours = rise == 1 || limits.excluded();
            let proven = agree && ours;
            if limits.excluded() {
                others = others.without(CauseKind::UserProcesses);
            }
            Some(Naming::believed(
                cause(level, place, Some(rise)),
                proven,
                others,
            ))
        }
        // The later questions could not be asked, and a full cgroup alone says little.
        Judgement::Circumstantial { .. } if reached == Reached::BeyondThreadPointer => None,
        Judgement::Circumstantial { level, place } if agree => {
            Some(Naming::inferred(cause(Some(level), place, None), others))
        }
        _ => None,
    }
}

/// Every check passes each time, yet the real call is refused each time: what cannot be seen is left.
fn hidden_cgroup(place: CgroupPlace) -> Naming {
    let cause = Cause::PidsCgroup {
        directory: InlinePath::EMPTY,
        place,
        version: 0,
        current: None,
        maximum: None,
        refusals: None,
    };
    let others = [CauseKind::SiblingExec, CauseKind::PidNumbers];
    Naming::inferred(cause, others.into_iter().collect())
}

/// RLIMIT_NPROC, kernel.threads-max or SCHED_DEADLINE: by elimination.
fn process_limits(limits: &ProcessLimits, status: &Status, or_exec: bool) -> Naming {
    let deadline = deadline(status.calls());
    let mut candidates = limits.possible();
    if !matches!(deadline, Deadline::No) {
        candidates = candidates.with(CauseKind::DeadlineScheduling);
    }
    if or_exec {
        candidates = candidates.with(CauseKind::SiblingExec);
    }
    let alone = candidates.iter().count() == 1;
    let threads_max = Cause::ThreadsMax {
        tasks: limits.tasks,
        maximum: limits.threads_max,
    };
    let deadline_cause = match deadline {
        Deadline::Yes { policy, flags } => Some((policy, Some(flags))),
        Deadline::Maybe { policy } => Some((policy, None)),
        Deadline::No | Deadline::Unread => None,
    };
    match deadline_cause {
        Some((policy, flags)) if flags.is_some() || alone => {
            let cause = Cause::DeadlineScheduling { policy, flags };
            Naming::believed(cause, alone && flags.is_some(), candidates)
        }
        _ if limits.threads_full => Naming::believed(threads_max, alone, candidates),
        _ if candidates.contains(CauseKind::UserProcesses) => {
            Naming::believed(limits.user_processes(status), alone, candidates)
        }
        _ if candidates.contains(CauseKind::ThreadsMax) && alone => {
            Naming::inferred(threads_max, Causes::NONE)
        }
        _ if or_exec => Naming::unknown().transient(),
        // None is possible, yet one refused: a check that this crate does not know.
        _ => Naming::unknown(),
    }
}

fn sampled(calls: Calls, readings: &mut Readings) -> (Option<u64>, PidNumbersSeen, Option<bool>) {
    let pid_max = limits::pid_max();
    readings.pid_max = pid_max;
    let seen = match (calls, pid_max) {
        (Calls::Any, Some(pid_max)) => limits::sample_pid_numbers(pid_max),
        _ => PidNumbersSeen::default(),
    };
    let initial = limits::in_initial_pid_namespace(calls);
    (pid_max, seen, initial)
}

impl PidNumbersSeen {
    fn none_free(&self) -> bool {
        self.looked > 0 && self.free == 0
    }

    /// So many that not all of them can have come free since a refusal.
    fn plenty_free(&self) -> bool {
        self.exact && self.free > self.looked / 4 && self.free >= 8
    }
}

fn pid_numbers(
    limits: &ProcessLimits,
    calls: Calls,
    readings: &mut Readings,
    agreeing: u32,
) -> Naming {
    let (pid_max, seen, initial_namespace) = sampled(calls, readings);
    let level = match initial_namespace {
        Some(true) => PidLevel::Own,
        _ if seen.none_free() => PidLevel::Own,
        _ if seen.plenty_free() => PidLevel::Ancestor,
        _ => PidLevel::OwnOrAncestor,
    };
    let cause = Cause::PidNumbers {
        level,
        pid_max,
        sampled: seen.looked,
        free: seen.free,
        initial_namespace,
    };
    let proven = limits.excluded() || seen.none_free() && agreeing >= 2;
    Naming::believed(cause, proven, limits.possible())
}

/// clone3 is not available, so that pid numbers and cgroup cannot be told apart by asking.
fn numbers_without_oracle(calls: Calls, readings: &mut Readings) -> Naming {
    let (pid_max, seen, initial_namespace) = sampled(calls, readings);
    if !seen.none_free() {
        return Naming::unknown();
    }
    let cause = Cause::PidNumbers {
        level: PidLevel::Own,
        pid_max,
        sampled: seen.looked,
        free: seen.free,
        initial_namespace,
    };
    Naming::inferred(cause, Causes::NONE.with(CauseKind::PidsCgroup))
}

/// A clone that shares the file-system state was refused and one that does not was granted. Any other limit that
/// flickers would show in the other questions as often.
fn sibling_exec(
    limits: &ProcessLimits,
    status: &Status,
    calls: Calls,
    readings: &mut Readings,
    tally: &Tally,
) -> Naming {
    let cause = Cause::SiblingExec {
        threads: status.threads,
    };
    // With one thread there is no sibling. The state may also be shared with another process (CLONE_FS).
    let (_, seen, initial) = sampled(calls, readings);
    let numbers_excluded = initial == Some(true) && seen.plenty_free();
    let others = tally.process_limits + tally.pid_numbers;
    if limits.excluded() && numbers_excluded {
        return Naming::proven(cause).transient();
    }
    if others == 0 && tally.exec >= AGREEING {
        let proven = limits.excluded();
        let alternatives = limits.possible().with(CauseKind::PidNumbers);
        return Naming::believed(cause, proven, alternatives).transient();
    }
    Naming::unknown().transient()
}

/// ENOMEM: the kernel's own memory, or a namespace that takes no tasks.
fn out_of_memory(
    c: &Circumstances<'_>,
    status: &Status,
    readings: &mut Readings,
    repetition: &mut Repetition<'_>,
) -> Result<Naming, Granted> {
    let calls = status.calls();
    // Every call that asks a starved kernel for memory costs it a fruitless search for pages, some 200 µs: where
    // the first file could not be opened, the others are left alone.
    let starved_of_files = status.error == Some(Errno::ENOMEM);
    let hierarchy = (!starved_of_files)
        .then(|| Hierarchy::of_thread(b"memory"))
        .flatten();
    let files = match hierarchy.as_ref().map(|hierarchy| hierarchy.version) {
        Some(1) => cgroup::MEMORY_V1,
        _ => cgroup::MEMORY_V2,
    };
    let snapshot = |hierarchy: &Hierarchy| hierarchy.snapshot(&files);
    let before = hierarchy.as_ref().map(snapshot);
    let first = probe::ask(&mut readings.oracle, c.flags, calls);
    // The repetition charges the cgroup once more, so that its counter rises even if the question passed.
    let repeated = repetition.refused(readings)?;
    // Between two refusals one answer is enough; the search for pages is not asked for twice.
    let second = if first == Reached::KernelMemory && repeated {
        first
    } else {
        probe::ask(&mut readings.oracle, c.flags, calls)
    };
    let after = hierarchy.as_ref().map(snapshot);
    let risen = match (&hierarchy, &before, &after) {
        (Some(hierarchy), Some(before), Some(after)) => risen(hierarchy, before, after),
        _ => None,
    };
    let dying = first == Reached::PidMemory && second == Reached::PidMemory;
    let starved = first == Reached::KernelMemory && second == Reached::KernelMemory;
    // Refused before the pid number: the namespace was not looked at.
    let others = match starved {
        true => Causes::NONE,
        false => Causes::NONE
            .with(CauseKind::DyingPidNamespace)
            .with(CauseKind::KernelMemory),
    };
    Ok(match risen {
        Some(cause) => Naming::believed(cause, starved, others),
        None if dying => {
            let cause = Cause::DyingPidNamespace {
                namespace: limits::namespace(c"/proc/thread-self/ns/pid", calls).ok(),
            };
            // A failed charge of the structure would have been counted.
            Naming::believed(cause, after.is_some_and(|after| !after.unread), others)
        }
        None if starved || repeated => {
            let mut others = others;
            if status.shadow_stack {
                // A shadow stack is a mapping, and refused as one.
                others = others
                    .with(CauseKind::AddressSpace)
                    .with(CauseKind::MapCount)
                    .with(CauseKind::Overcommit);
            }
            let cause = Cause::KernelMemory {
                directory: InlinePath::EMPTY,
                version: 0,
                usage: None,
                limit: None,
                failures: None,
                unread: status.error,
            };
            // Before the pid number nothing but a shadow stack and memory answers ENOMEM; and a kernel that
            // cannot even open a file has no memory, whatever the shadow stack.
            let no_shadow_stack = status.error.is_none() && !status.shadow_stack;
            Naming::believed(
                cause,
                starved && (no_shadow_stack || starved_of_files),
                others,
            )
        }
        None => Naming::unknown().transient(),
    })
}

/// The memory cgroup that counted a failed charge.
fn risen(hierarchy: &Hierarchy, before: &Snapshot, after: &Snapshot) -> Option<Cause> {
    let pairs = before.levels().iter().zip(after.levels());
    for (old, new) in pairs {
        let Some((new_count, old_count)) = new.failures.zip(old.failures) else {
            continue;
        };
        let rise = new_count.saturating_sub(old_count);
        // A counter that also counts what was granted after all, a smaller piece or after a search for pages,
        // says nothing of a cgroup with room to spare.
        if rise > 0 && new.is_nearly_full() {
            return Some(Cause::KernelMemory {
                directory: hierarchy.directory(new),
                version: hierarchy.version,
                usage: new.current,
                limit: new.maximum,
                failures: Some(rise),
                unread: None,
            });
        }
    }
    None
}

#[cfg(test)]
#[expect(unsafe_code, reason = "they make processes and limits of their own")]
mod tests;
