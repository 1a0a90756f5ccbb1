//! A clone refused with EAGAIN: counters, numbers, execve, deadline, cgroup.
//!
//! The kernel is probed before and after a repetition of the refused call, and the files are read before and after
//! as well. What both sides agree in is given to the rule.

use super::again::{Granted, Repetition};
use super::cause::{Cause, CauseKind, CgroupPlace, PidNumbers, PidsCgroup, SiblingExec, Unknown};
use super::judge::{Judgement, judge};
use super::limits::ProcessLimits;
use super::numbers::{self, Look, Numbers};
use super::outside::{self, Outside};
use super::probe::{self, Reached};
use super::rule::{Ruling, Standing, rule};
use super::settings::hierarchy_of;
use super::user_tasks;
use super::verdict::{Verdict, since};
use crate::mem::text::InlinePath;
use crate::proc::cgroup::{Hierarchy, PIDS, Snapshot};
use crate::proc::status::{Calls, Status};
use crate::stack::cache;
use crate::step::{StepError, Task};
use crate::sys::clone_probe::probe as probe_kernel;
use crate::tcb::Runtime;

/// How often the call is repeated at most: where the answers before and after it differ, something else came and went.
const MOST_ROUNDS: u32 = 3;

/// Answers that agree this often are believed even where another counter near its maximum may come and go between
/// them.
const AGREEING: u32 = 4;

/// Whether tasks that have ended still count: until the kernel has reaped a thread, it counts more threads than glibc.
/// (Others that glibc does not know are there to stay, so an end must lie near.)
fn is_reaping(status: &Status) -> bool {
    let known = || Runtime::existing().filter(|_| cache::thread_ended_within(2000));
    known().is_some_and(|runtime| status.threads > Some(runtime.count()))
}

pub(super) fn diagnose(
    error: &StepError,
    status: &Status,
    outside: Outside,
    seen: &mut Unknown,
    repetition: &mut Repetition<'_>,
) -> Result<Verdict, Granted> {
    let reaping = is_reaping(status);
    let early = ProcessLimits::read(status, seen);
    let mut cgroup = None;
    let mut counted = None;
    let mut agreeing = 0;
    let mut facts = Facts {
        outside,
        reached: Reached::Unusable,
        task: error.task,
        repeated: false,
        limits: early,
        threads: status.threads,
        numbers: Numbers::Unclear,
        pid_max: None,
        cgroup: Judgement::Open,
    };
    let mut numbers = PidNumbers::UNREAD;
    for _ in 0..MOST_ROUNDS {
        let calls = status.calls();
        let first = probe::ask(&mut seen.oracle, error, &outside, calls, &mut probe_kernel);
        let hierarchy = match first.may_be_cgroup() {
            true => cgroup
                .get_or_insert_with(|| hierarchy(error, calls))
                .as_ref(),
            false => None,
        };
        let Some(round) = Round::take(first, hierarchy, error, status, &outside, seen, repetition)?
        else {
            // Refused with another errno than before: something else is going on.
            return Ok(Verdict::UNKNOWN.transient());
        };
        agreeing = match round.reached {
            [first, second] if first != second => 0,
            [first, _] if agreeing > 0 && first == facts.reached => agreeing + 2,
            _ => 2,
        };
        facts.reached = round.reached[0];
        facts.repeated = repetition.is_possible();
        facts.cgroup = round.cgroup;
        counted = since(counted, round.counted);
        (facts.numbers, numbers) = round.numbers;
        facts.pid_max = numbers.pid_max;
        if facts.are_enough(agreeing) {
            break;
        }
    }
    let of_memory = matches!(facts.reached, Reached::KernelMemory | Reached::PidMemory);
    if !facts.are_enough(agreeing) || of_memory {
        return Ok(Verdict {
            counted,
            ..Verdict::UNKNOWN.transient()
        });
    }
    let visible = match facts.reached {
        Reached::ProcessLimits => visible_tasks(&early, status, seen, repetition)?,
        _ => None,
    };
    facts.limits = early.and(ProcessLimits::read(&Status::read(), seen));
    if let Some(visible) = visible {
        facts.limits = facts.limits.counted(visible);
    }
    let ruling = rule(&facts.checks(), facts.repeated);
    let cause = ruling.named.map(|kind| {
        let hierarchy = cgroup.as_ref().and_then(Option::as_ref);
        let own = facts.cause(kind, numbers, hierarchy);
        own.unwrap_or_else(|| outside::cause(kind, error, status, seen))
    });
    let verdict = Verdict {
        counted,
        ..Verdict::ruled(&ruling, cause)
    };
    Ok(verdict.transient_if(facts.are_transient(&ruling, reaping)))
}

/// The tasks of the user that could be seen before and after a repetition, where they may be what the limit is for.
fn visible_tasks(
    limits: &ProcessLimits,
    status: &Status,
    seen: &mut Unknown,
    repetition: &mut Repetition<'_>,
) -> Result<Option<u64>, Granted> {
    // /proc can be of a namespace outside, whose last number cannot be read here.
    let can_count = status.calls() == Calls::Any && status.pid_levels == Some(1);
    let Some((uid, soft)) = limits.uncounted().filter(|_| can_count) else {
        return Ok(None);
    };
    let count = || user_tasks::at_least(uid, soft).filter(|tasks| *tasks >= soft);
    let Some(before) = count() else {
        return Ok(None);
    };
    let refused = repetition.refused(seen)?;
    Ok(count().filter(|_| refused).map(|after| after.min(before)))
}

/// The cgroup that a task of the refused call counts in. Found before the readings are taken: both need much of the
/// stack.
#[inline(never)]
fn hierarchy(error: &StepError, calls: Calls) -> Option<Hierarchy> {
    match error.cgroup {
        -1 => Hierarchy::of_thread(b"pids", calls),
        // Which is charged in place of the creator's.
        requested => hierarchy_of(requested, calls),
    }
}

/// A repetition of the refused call, with what was probed and read before and after it.
struct Round {
    reached: [Reached; 2],
    numbers: (Numbers, PidNumbers),
    cgroup: Judgement,
    counted: Option<[u64; 2]>,
}

impl Round {
    /// `first`: the answer before it. `None`: the call was refused with another errno.
    #[inline(never)]
    fn take(
        first: Reached,
        hierarchy: Option<&Hierarchy>,
        error: &StepError,
        status: &Status,
        outside: &Outside,
        seen: &mut Unknown,
        repetition: &mut Repetition<'_>,
    ) -> Result<Option<Round>, Granted> {
        let calls = status.calls();
        let look = || first.may_be_numbers().then(|| Look::take(calls));
        let [mut before, mut after] = [const { Snapshot::EMPTY }; 2];
        let read = |snapshot: &mut Snapshot| {
            if let Some(hierarchy) = hierarchy {
                hierarchy.snapshot_into(&PIDS, snapshot);
            }
        };
        let numbers = look();
        read(&mut before);
        let repeats = repetition.is_possible();
        if repeats && !repetition.refused(seen)? {
            return Ok(None);
        }
        let numbers_after = look();
        read(&mut after);
        let second = probe::ask(&mut seen.oracle, error, outside, calls, &mut probe_kernel);
        Ok(Some(Round {
            reached: [first, second],
            numbers: numbers::compare(numbers, numbers_after, seen),
            counted: before
                .refusals()
                .zip(after.refusals())
                .map(<[u64; 2]>::from),
            cgroup: match hierarchy {
                Some(_) if repeats => judge(Some(&before), &after),
                Some(_) => judge(None, &after),
                None => Judgement::Open,
            },
        }))
    }
}

/// Everything that the rule needs, without the kernel.
#[derive(Clone, Copy, Debug)]
struct Facts {
    outside: Outside,
    /// Where the probes before and after stopped.
    reached: Reached,
    task: Task,
    repeated: bool,
    limits: ProcessLimits,
    threads: Option<u64>,
    numbers: Numbers,
    pid_max: Option<u64>,
    cgroup: Judgement,
}

impl Facts {
    /// Where counters near their maximum come and go, two answers that agree are not enough.
    fn are_enough(&self, agreeing: u32) -> bool {
        let certain = match self.reached {
            Reached::ProcessLimits | Reached::ProcessLimitsOrExec | Reached::Unusable => true,
            Reached::SiblingExec | Reached::PidNumbers => self.limits.excluded(),
            _ => self.cgroup() >= Standing::Signed,
        };
        certain && agreeing > 0 || agreeing >= AGREEING
    }

    /// What the rule has named, with its evidence; `None` for what answers in the kernel's place.
    fn cause(
        &self,
        kind: CauseKind,
        numbers: PidNumbers,
        hierarchy: Option<&Hierarchy>,
    ) -> Option<Cause> {
        let threads = self.threads;
        Some(match kind {
            CauseKind::UserProcesses => self.limits.user.into(),
            CauseKind::ThreadsMax => self.limits.threads_max.into(),
            CauseKind::DeadlineScheduling => self.limits.deadline.into(),
            CauseKind::SiblingExec => SiblingExec { threads }.into(),
            CauseKind::PidNumbers => numbers.into(),
            CauseKind::PidsCgroup => pids_cgroup(&self.cgroup, hierarchy).into(),
            _ => return None,
        })
    }

    /// A sibling inside execve is gone in milliseconds, and can be before a call that is not repeated is looked at; and
    /// so are ended threads, which do not matter where something else than a count refused.
    fn are_transient(&self, ruling: &Ruling, reaping: bool) -> bool {
        let exec = match ruling.named {
            Some(kind) => kind == CauseKind::SiblingExec,
            None if self.repeated => self.exec() >= Standing::Open,
            None => self.exec() > Standing::Excluded,
        };
        // Where that is not known, or nothing is named that refuses still, an end that lies near is enough.
        let unclear = ruling.named.is_none() || self.threads.is_none();
        let ended = reaping || unclear && cache::thread_ended_within(20);
        exec || ended && ruling.possible().has_count()
    }

    fn exec(&self) -> Standing {
        match (self.reached, self.threads) {
            // A process gets a copy of the state that threads share.
            _ if self.task != Task::Thread => Standing::Excluded,
            // The kernel marks the state that threads share only while all who share it are threads of one process.
            (_, Some(1)) | (Reached::ProcessLimits | Reached::PidNumbers, _) => Standing::Excluded,
            (Reached::SiblingExec, Some(_)) => Standing::Shown,
            (Reached::SiblingExec, None) => Standing::Signed,
            (Reached::ProcessLimitsOrExec | Reached::Unusable, _) => Standing::Open,
            _ => Standing::Remote,
        }
    }

    fn numbers(&self) -> Standing {
        match (self.reached, self.numbers) {
            (Reached::PidNumbers, _) => Standing::Shown,
            (Reached::BeyondThreadPointer | Reached::Unusable, Numbers::NoneFree) => {
                Standing::Signed
            }
            // An outer namespace may allow fewer than this one does.
            (Reached::BeyondThreadPointer | Reached::Unusable, _) if self.has_many_numbers() => {
                Standing::Remote
            }
            (Reached::BeyondThreadPointer | Reached::Unusable, Numbers::Unclear) => Standing::Open,
            (Reached::SiblingExec | Reached::BeyondPidNumbers, _) => Standing::Remote,
            _ => Standing::Excluded,
        }
    }

    /// A task holds at most four numbers: its own, and as group, session and process.
    fn has_many_numbers(&self) -> bool {
        let tasks = self.limits.threads_max.tasks;
        let most = tasks.zip(self.pid_max);
        most.is_some_and(|(tasks, most)| tasks.saturating_mul(4) < most)
    }

    fn cgroup(&self) -> Standing {
        match (self.reached, self.cgroup) {
            (Reached::ProcessLimits | Reached::ProcessLimitsOrExec | Reached::PidNumbers, _)
            | (_, Judgement::Excluded) => Standing::Excluded,
            (_, Judgement::Counted { .. } | Judgement::Full { .. }) => Standing::Shown,
            (_, Judgement::Suspected { .. }) => Standing::Signed,
            (Reached::SiblingExec, Judgement::Open) => Standing::Remote,
            (_, Judgement::Open) => Standing::Open,
        }
    }

    /// Each check, in the order in which a clone meets them, and before the kernel's who can answer in its place.
    fn checks(&self) -> [(CauseKind, Standing); 9] {
        let limits = &self.limits;
        let [mut tracer, mut filter, mut module] = self.outside.standings();
        let (mut user, mut tasks) = (limits.nproc_stands, limits.threads_stand);
        let mut deadline = limits.deadline_stands;
        let (mut exec, mut numbers, mut cgroup) = (self.exec(), self.numbers(), self.cgroup());
        let asked = !matches!(self.reached, Reached::Unusable);
        let passed = asked && numbers.max(exec).max(cgroup) > Standing::Excluded;
        // A module is not suspected where something else can be.
        let others = [tracer, filter, user, tasks, deadline, exec, numbers, cgroup];
        if others.into_iter().max() > Some(Standing::Remote) {
            module = module.min(Standing::Remote);
        }
        if passed && self.reached != Reached::ProcessLimitsOrExec {
            (user, tasks) = (user.passed(), tasks.passed());
            deadline = Standing::Excluded;
            if matches!(self.reached, Reached::SiblingExec | Reached::PidNumbers) {
                module = Standing::Excluded;
            }
        }
        // A filter sees the registers, and let the same pass; only a supervisor that looks into memory is left.
        if passed && numbers.max(cgroup) >= Standing::Open {
            filter = filter.min(Standing::Remote);
        }
        // One that is full by its own numbers before and after refuses whatever else comes and goes.
        let all_numbers = self.reached == Reached::PidNumbers && self.numbers == Numbers::NoneFree;
        // Of a counter without a level, the rise may be of others' refusals alone.
        let counted = match self.cgroup {
            Judgement::Counted { level, .. } => level.is_some() || limits.excluded(),
            _ => false,
        };
        let full = counted || matches!(self.cgroup, Judgement::Full { .. });
        if counted {
            // Who answers in the kernel's place raises no counter.
            (tracer, filter, deadline) =
                (Standing::Excluded, Standing::Excluded, Standing::Excluded);
        }
        if counted || asked && (full || all_numbers) {
            (user, tasks, module) = (Standing::Excluded, Standing::Excluded, Standing::Excluded);
            exec = Standing::Excluded;
        }
        if counted || asked && full {
            numbers = Standing::Excluded;
        }
        if cgroup >= Standing::Signed {
            // It will refuse when the sibling is gone.
            exec = exec.min(Standing::Signed);
        }
        if !self.repeated {
            // What passes now may have refused then.
            let may_have = |standing: &mut Standing| *standing = (*standing).max(Standing::Open);
            [&mut tasks, &mut numbers, &mut cgroup]
                .into_iter()
                .for_each(may_have);
            if !limits.exempt {
                may_have(&mut user);
            }
            if self.threads != Some(1) && self.task == Task::Thread {
                may_have(&mut exec);
            }
        }
        [
            (CauseKind::Tracer, tracer),
            (CauseKind::Seccomp, filter),
            (CauseKind::UserProcesses, user),
            (CauseKind::ThreadsMax, tasks),
            (CauseKind::DeadlineScheduling, deadline),
            (CauseKind::SecurityModule, module),
            (CauseKind::SiblingExec, exec),
            (CauseKind::PidNumbers, numbers),
            (CauseKind::PidsCgroup, cgroup),
        ]
    }
}

fn pids_cgroup(judgement: &Judgement, hierarchy: Option<&Hierarchy>) -> PidsCgroup {
    let (level, place, refusals) = match *judgement {
        Judgement::Counted { level, place, rise } => (level, place, Some(rise)),
        Judgement::Full { level, place } | Judgement::Suspected { level, place } => {
            (Some(level), place, None)
        }
        // Every visible one has room.
        Judgement::Open | Judgement::Excluded => match hierarchy {
            Some(_) => (None, CgroupPlace::Hidden, None),
            None => (None, CgroupPlace::Unclear, None),
        },
    };
    PidsCgroup {
        directory: match (level, hierarchy) {
            (Some(level), Some(hierarchy)) => hierarchy.directory(&level),
            _ => InlinePath::EMPTY,
        },
        place,
        version: hierarchy.map_or(0, |hierarchy| hierarchy.version),
        current: level.and_then(|level| level.current),
        maximum: level.and_then(|level| level.maximum),
        refusals,
    }
}

#[cfg(test)]
#[path = "truth_of_clone.rs"]
mod truth;
