//! RLIMIT_NPROC, kernel.threads-max and SCHED_DEADLINE: how each stands.

use super::cause::{DeadlineScheduling, ThreadsMax, Unknown, UserProcesses};
use super::judge::MARGIN;
use super::rule::Standing;
use crate::proc::limits::{Limit, Limited};
use crate::proc::parse::UNLIMITED;
use crate::proc::status::{CAP_SYS_ADMIN, CAP_SYS_RESOURCE, Calls, Status};
use crate::proc::{machine, task};
use crate::sys::sched::{self, SCHED_DEADLINE};

/// Limits of the process and the machine at one moment, or what two moments have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProcessLimits {
    pub(super) user: UserProcesses,
    pub(super) threads_max: ThreadsMax,
    pub(super) deadline: DeadlineScheduling,
    /// RLIMIT_NPROC does not apply to the caller, whatever its value.
    pub(super) exempt: bool,
    pub(super) nproc_stands: Standing,
    pub(super) threads_stand: Standing,
    pub(super) deadline_stands: Standing,
}

impl ProcessLimits {
    pub(super) fn read(status: &Status, seen: &mut Unknown) -> ProcessLimits {
        let calls = status.calls();
        let (tasks, maximum) = (machine::tasks(calls), machine::threads_max(calls));
        let nproc = Limit::read(Limited::Processes, calls);
        seen.tasks = tasks;
        seen.threads_max = maximum;
        seen.nproc = nproc.map(|nproc| nproc.soft);
        let user = UserProcesses {
            uid: status.uid,
            soft: nproc.map(|nproc| nproc.soft),
            hard: nproc.map(|nproc| nproc.hard),
            initial_user_namespace: task::in_initial_user_namespace(calls),
            tasks,
            own_threads: status.threads,
            visible: None,
        };
        ProcessLimits::of(
            status,
            user,
            ThreadsMax { tasks, maximum },
            scheduling(calls),
        )
    }

    pub(super) fn of(
        status: &Status,
        user: UserProcesses,
        threads_max: ThreadsMax,
        scheduling: Option<(u32, Option<u64>)>,
    ) -> ProcessLimits {
        let has_power = status.has(CAP_SYS_RESOURCE) || status.has(CAP_SYS_ADMIN);
        // Root of another user namespace has no privilege here.
        let exempt =
            user.initial_user_namespace == Some(true) && (status.uid == Some(0) || has_power);
        let (policy, flags) = scheduling.unwrap_or_default();
        ProcessLimits {
            user,
            threads_max,
            deadline: DeadlineScheduling { policy, flags },
            exempt,
            nproc_stands: match exempt {
                true => Standing::Excluded,
                false => nproc_stands(&user, status.capabilities.is_some()),
            },
            threads_stand: match threads_max.tasks.zip(threads_max.maximum) {
                Some((tasks, maximum)) if tasks >= maximum => Standing::Shown,
                Some((tasks, maximum)) => {
                    Standing::open_if(tasks.saturating_add(MARGIN) >= maximum)
                }
                None => Standing::Open,
            },
            deadline_stands: deadline_stands(scheduling),
        }
    }

    /// What these and those of a later moment agree in. A limit that was changed meanwhile shows nothing.
    pub(super) fn and(self, later: ProcessLimits) -> ProcessLimits {
        let common = |same, one: Standing, other: Standing| match same {
            true if one == other => one,
            true if one.min(other) >= Standing::Signed => Standing::Signed,
            _ => Standing::Open,
        };
        let same_user = (self.user.soft, self.user.uid) == (later.user.soft, later.user.uid);
        let same_maximum = self.threads_max.maximum == later.threads_max.maximum;
        ProcessLimits {
            exempt: self.exempt && later.exempt,
            nproc_stands: common(same_user, self.nproc_stands, later.nproc_stands),
            threads_stand: common(same_maximum, self.threads_stand, later.threads_stand),
            deadline_stands: common(true, self.deadline_stands, later.deadline_stands),
            ..later
        }
    }

    /// Real user and limit, where the count of the user's tasks would show whether it is reached.
    pub(super) fn uncounted(&self) -> Option<(u32, u64)> {
        let known = self.user.initial_user_namespace == Some(true);
        let open = self.nproc_stands == Standing::Open;
        self.user.uid.zip(self.user.soft).filter(|_| known && open)
    }

    /// So many tasks of the user could be seen, before and after a repetition that was refused.
    pub(super) fn counted(mut self, visible: u64) -> ProcessLimits {
        if self.uncounted().is_some_and(|(_, soft)| visible >= soft) {
            self.nproc_stands = Standing::Shown;
            self.user.visible = Some(visible);
        }
        self
    }

    /// None of the counters can have refused, now or in between.
    pub(super) fn excluded(&self) -> bool {
        self.nproc_stands.max(self.threads_stand) == Standing::Excluded
    }
}

/// The kernel exports no count of a user's tasks. It refuses where there are as many as the limit. The threads of this
/// process alone can be that many.
fn nproc_stands(user: &UserProcesses, capabilities_known: bool) -> Standing {
    let Some(soft) = user.soft else {
        return Standing::Open;
    };
    let reached = user.own_threads.is_some_and(|threads| threads >= soft);
    // No user can have more tasks than the machine.
    let unreachable = soft == UNLIMITED
        || user
            .tasks
            .is_some_and(|tasks| soft > tasks.saturating_add(MARGIN));
    // Another user namespace also enforces the limit that it was created under, and exempts a user who is root outside.
    match user.initial_user_namespace {
        Some(true) if reached && capabilities_known && user.uid.is_some() => Standing::Shown,
        _ if reached => Standing::Signed,
        Some(true) if unreachable => Standing::Excluded,
        _ => Standing::Open,
    }
}

/// The caller's policy and flags.
fn scheduling(calls: Calls) -> Option<(u32, Option<u64>)> {
    match calls {
        Calls::Any => {
            let attributes = sched::scheduler(0).ok()?;
            Some((attributes.sched_policy, Some(attributes.sched_flags)))
        }
        Calls::FilesOnly => Some((task::scheduling_policy()?, None)),
    }
}

/// Without reset-on-fork the policy may not be handed on.
fn deadline_stands(scheduling: Option<(u32, Option<u64>)>) -> Standing {
    const RESET_ON_FORK: u64 = 1;
    match scheduling {
        None => Standing::Open,
        Some((policy, _)) if policy != SCHED_DEADLINE => Standing::Excluded,
        Some((_, None)) => Standing::Signed,
        Some((_, Some(flags))) if flags & RESET_ON_FORK != 0 => Standing::Excluded,
        Some(_) => Standing::Shown,
    }
}
