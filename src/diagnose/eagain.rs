//! A clone refused with EAGAIN: counters, numbers, execve, deadline, cgroup.

use super::again::{Granted, Repetition};
use super::cause::{CauseKind, Causes, CgroupPlace, PidsCgroup, SiblingExec, Unknown};
use super::judge::{Judgement, judge};
use super::limits::ProcessLimits;
use super::numbers;
use super::probe::{self, Reached};
use super::verdict::Verdict;
use crate::mem::text::InlinePath;
use crate::proc::cgroup::{Hierarchy, Level, PIDS};
use crate::proc::status::{Calls, Status};
use crate::stack::cache;
use crate::tcb::Runtime;

/// How often the kernel is probed at most; each probe briefly charges the counters it asks about.
const MOST_PROBES: u32 = 6;

/// Answers that agree this often are believed even where flicker of another limit cannot be excluded.
const AGREEING: u32 = 4;

/// How often the probes stopped where.
#[derive(Default)]
struct Tally {
    asked: u32,
    process_limits: u32,
    exec: u32,
    pid_numbers: u32,
    beyond: u32,
    /// Those between which a cgroup out of sight can have refused.
    cgroups_open: u32,
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

    /// Whether all stopped at the same place: another limit in between would have shown in one of the earlier
    /// probes, too.
    fn is_unanimous(&self) -> bool {
        [
            self.process_limits,
            self.exec,
            self.pid_numbers,
            self.beyond,
        ]
        .into_iter()
        .any(|count| self.all(count))
    }

    /// Whether it is enough to name a cause, after two that begin with `first`.
    fn is_enough(&self, first: Reached, limits: &ProcessLimits, repeats: bool) -> bool {
        let certain = |count| self.all(count) && (limits.excluded() || count >= AGREEING);
        match first {
            Reached::ProcessLimits | Reached::ProcessLimitsOrExec => self.all(self.process_limits),
            Reached::SiblingExec => certain(self.exec),
            Reached::PidNumbers => certain(self.pid_numbers),
            _ => !repeats,
        }
    }
}

/// Whether tasks that have ended can still count. Until the kernel has reaped a thread it does, so that a full
/// counter is worth a retry: for some milliseconds, and for as long as the kernel counts more threads than glibc,
/// which on a busy machine is longer.
fn is_reaping(status: &Status) -> bool {
    let known = || Runtime::existing().filter(|_| cache::thread_ended_within(2000));
    cache::thread_ended_within(20)
        || known().is_some_and(|runtime| status.threads > Some(runtime.count()))
}

pub(super) fn diagnose(
    status: &Status,
    seen: &mut Unknown,
    repetition: &mut Repetition<'_>,
) -> Result<Verdict, Granted> {
    let calls = status.calls();
    let reaping = is_reaping(status);
    let mut tally = Tally::default();
    let mut limits: Option<ProcessLimits> = None;
    let mut cgroup: Option<Option<Hierarchy>> = None;
    loop {
        let first = probe::ask(&mut seen.oracle, calls);
        tally.add(first);
        let limits = limits.get_or_insert_with(|| ProcessLimits::read(status, seen));
        match first {
            Reached::Unusable | Reached::KernelMemory | Reached::PidMemory => {
                return Ok(Verdict::UNKNOWN.transient_if(first != Reached::Unusable));
            }
            Reached::BeyondPidNumbers | Reached::BeyondThreadPointer => {
                let cgroup = cgroup.get_or_insert_with(|| Hierarchy::of_thread(b"pids"));
                let cgroup = cgroup.as_ref();
                let verdict = beyond(first, cgroup, limits, calls, seen, repetition, &mut tally)?;
                if let Some(verdict) = verdict {
                    return Ok(verdict.transient_if(reaping));
                }
            }
            _ => {
                if !repetition.refused(seen)? && repetition.is_possible() {
                    return Ok(Verdict::UNKNOWN.transient());
                }
                tally.add(probe::ask(&mut seen.oracle, calls));
            }
        }
        if tally.is_enough(first, limits, repetition.is_possible()) || tally.asked >= MOST_PROBES {
            let visible = cgroup.is_some_and(|cgroup| cgroup.is_some());
            let verdict = conclude(first, &tally, limits, status, seen, visible);
            // Ended threads stand in nobody's way where something else than a count refused.
            let kinds = verdict.alternatives.with(verdict.cause.kind());
            return Ok(verdict.transient_if(reaping && kinds.has_count()));
        }
    }
}

/// Every check up to the cgroup passes now: whether it is the cgroup.
fn beyond(
    first: Reached,
    cgroup: Option<&Hierarchy>,
    limits: &ProcessLimits,
    calls: Calls,
    seen: &mut Unknown,
    repetition: &mut Repetition<'_>,
    tally: &mut Tally,
) -> Result<Option<Verdict>, Granted> {
    let snapshot = |cgroup: &Hierarchy| cgroup.snapshot(&PIDS);
    let before = cgroup.map(snapshot);
    let repeated = repetition.refused(seen)?;
    if !repeated && repetition.is_possible() {
        // Refused with another errno than before: something else is going on.
        return Ok(Some(Verdict::UNKNOWN.transient()));
    }
    let after = cgroup.filter(|_| repeated).map(snapshot);
    let second = probe::ask(&mut seen.oracle, calls);
    tally.add(second);
    let agree = first == second;
    let judgement = match (&before, &after) {
        (Some(before), Some(after)) => judge(Some(before), after),
        (Some(only), None) => judge(None, only),
        _ => Judgement::Open,
    };
    if matches!(judgement, Judgement::Open) {
        tally.cgroups_open += 2;
    }
    let verdict = cgroup.and_then(|cgroup| name_cgroup(&judgement, cgroup, agree, first, limits));
    Ok(verdict.map(|verdict| verdict.transient_if(!agree)))
}

fn name_cgroup(
    judgement: &Judgement,
    hierarchy: &Hierarchy,
    agree: bool,
    reached: Reached,
    limits: &ProcessLimits,
) -> Option<Verdict> {
    let cause = |level: Option<Level>, place, refusals| PidsCgroup {
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
            // One more in the counter is our own refusal. Of more, others' are a part, and whether ours is one
            // of them depends on what else could have refused it.
            let ours = rise == 1 || limits.excluded();
            if limits.excluded() {
                others = others.without(CauseKind::UserProcesses);
            }
            let cause = cause(level, place, Some(rise));
            Some(Verdict::believed(cause, agree && ours, others))
        }
        // The later checks could not be probed, and a full cgroup alone says little.
        Judgement::Circumstantial { .. } if reached == Reached::BeyondThreadPointer => None,
        Judgement::Circumstantial { level, place } if agree => {
            Some(Verdict::inferred(cause(Some(level), place, None), others))
        }
        _ => None,
    }
}

/// From all that the probes showed.
fn conclude(
    first: Reached,
    tally: &Tally,
    limits: &ProcessLimits,
    status: &Status,
    seen: &mut Unknown,
    cgroup_is_visible: bool,
) -> Verdict {
    let calls = status.calls();
    match first {
        Reached::ProcessLimits if tally.is_unanimous() => limits.name(status, false),
        Reached::ProcessLimitsOrExec if tally.is_unanimous() => limits.name(status, true),
        Reached::PidNumbers if tally.is_unanimous() => {
            numbers::name(limits, calls, seen, tally.pid_numbers)
        }
        Reached::SiblingExec if tally.is_unanimous() => sibling_exec(limits, status, seen, tally),
        Reached::BeyondPidNumbers
            if tally.is_unanimous()
                && tally.cgroups_open >= tally.asked
                && tally.asked >= AGREEING
                && limits.excluded() =>
        {
            hidden_cgroup(match cgroup_is_visible {
                true => CgroupPlace::Hidden,
                false => CgroupPlace::Unclear,
            })
        }
        Reached::BeyondThreadPointer if tally.is_unanimous() => {
            numbers::name_without_oracle(calls, seen)
        }
        _ if tally.exec > 0 => sibling_exec(limits, status, seen, tally),
        _ => Verdict::UNKNOWN.transient(),
    }
}

/// Every check passes each time, yet the real call is refused each time: what cannot be seen is left.
fn hidden_cgroup(place: CgroupPlace) -> Verdict {
    let cause = PidsCgroup {
        directory: InlinePath::EMPTY,
        place,
        version: 0,
        current: None,
        maximum: None,
        refusals: None,
    };
    let others = [CauseKind::SiblingExec, CauseKind::PidNumbers];
    Verdict::inferred(cause, others.into_iter().collect::<Causes>())
}

/// A clone that shares the file-system state was refused and one that does not was granted. Any other limit that
/// flickers would show in the other probes as often.
fn sibling_exec(
    limits: &ProcessLimits,
    status: &Status,
    seen: &mut Unknown,
    tally: &Tally,
) -> Verdict {
    // With one thread there is no sibling. The state may also be shared with another process (CLONE_FS).
    let cause = SiblingExec {
        threads: status.threads,
    };
    let numbers_excluded = numbers::are_excluded(status.calls(), seen);
    if limits.excluded() && numbers_excluded {
        return Verdict::proven(cause).transient();
    }
    let others = tally.process_limits + tally.pid_numbers;
    if others == 0 && tally.exec >= AGREEING {
        let alternatives = limits.possible().with(CauseKind::PidNumbers);
        return Verdict::believed(cause, limits.excluded(), alternatives).transient();
    }
    Verdict::UNKNOWN.transient()
}
