//! RLIMIT_NPROC, kernel.threads-max and SCHED_DEADLINE: one errno, told apart by elimination.

use super::cause::{
    Cause, CauseKind, Causes, DeadlineScheduling, ThreadsMax, Unknown, UserProcesses,
};
use super::judge::MARGIN;
use super::verdict::Verdict;
use crate::proc::limits::{Limit, Limited};
use crate::proc::parse::UNLIMITED;
use crate::proc::status::{CAP_SYS_ADMIN, CAP_SYS_RESOURCE, Calls, Status};
use crate::proc::{machine, task};
use crate::sys::clone_probe as probe;

/// Limits of the process and the machine, read once per diagnosis.
pub(super) struct ProcessLimits {
    threads_max: ThreadsMax,
    user: UserProcesses,
    /// RLIMIT_NPROC cannot have refused.
    nproc_excluded: bool,
    /// kernel.threads-max cannot have refused.
    threads_excluded: bool,
    /// kernel.threads-max is reached.
    threads_full: bool,
}

impl ProcessLimits {
    pub(super) fn read(status: &Status, seen: &mut Unknown) -> ProcessLimits {
        let calls = status.calls();
        let tasks = machine::tasks(calls);
        let maximum = machine::threads_max();
        let nproc = Limit::read(Limited::Processes, calls);
        let initial_user_namespace = task::in_initial_user_namespace(calls);
        let exempt =
            status.uid == Some(0) || status.has(CAP_SYS_RESOURCE) || status.has(CAP_SYS_ADMIN);
        // Nobody can have more tasks than the machine.
        let unreachable = match (nproc, tasks) {
            (Some(nproc), _) if nproc.soft == UNLIMITED => true,
            (Some(nproc), Some(tasks)) => nproc.soft > tasks.saturating_add(MARGIN),
            _ => false,
        };
        seen.tasks = tasks;
        seen.threads_max = maximum;
        seen.nproc = nproc.map(|nproc| nproc.soft);
        let both = tasks.zip(maximum);
        ProcessLimits {
            threads_max: ThreadsMax { tasks, maximum },
            user: UserProcesses {
                uid: status.uid,
                soft: nproc.map(|nproc| nproc.soft),
                hard: nproc.map(|nproc| nproc.hard),
                initial_user_namespace,
                tasks,
            },
            // Neither holds in another user namespace: its root is nobody here, and it remembers a limit.
            nproc_excluded: initial_user_namespace == Some(true) && (exempt || unreachable),
            threads_excluded: both.is_some_and(|(tasks, most)| tasks.saturating_add(MARGIN) < most),
            threads_full: both.is_some_and(|(tasks, most)| tasks >= most),
        }
    }

    /// Neither of the two counters can have refused, now or in between.
    pub(super) fn excluded(&self) -> bool {
        self.nproc_excluded && self.threads_excluded
    }

    pub(super) fn possible(&self) -> Causes {
        let mut set = Causes::NONE;
        if !self.nproc_excluded {
            set = set.with(CauseKind::UserProcesses);
        }
        if !self.threads_excluded {
            set = set.with(CauseKind::ThreadsMax);
        }
        set
    }

    /// One of them refused, or with `or_exec` a sibling inside execve did.
    pub(super) fn name(&self, status: &Status, or_exec: bool) -> Verdict {
        let deadline = deadline(status.calls());
        let mut candidates = self.possible();
        if !matches!(deadline, Deadline::No) {
            candidates = candidates.with(CauseKind::DeadlineScheduling);
        }
        if or_exec {
            candidates = candidates.with(CauseKind::SiblingExec);
        }
        let alone = candidates.iter().count() == 1;
        match deadline {
            Deadline::Under(cause) if cause.flags.is_some() || alone => {
                Verdict::believed(cause, alone && cause.flags.is_some(), candidates)
            }
            _ if self.threads_full => Verdict::believed(self.threads_max, alone, candidates),
            _ if candidates.contains(CauseKind::UserProcesses) => {
                Verdict::believed(self.user, alone, candidates)
            }
            _ if candidates.contains(CauseKind::ThreadsMax) && alone => {
                Verdict::inferred(Cause::from(self.threads_max), Causes::NONE)
            }
            _ if or_exec => Verdict::UNKNOWN.transient(),
            // Every known limit is excluded, so a check that this crate does not model refused.
            _ => Verdict::UNKNOWN,
        }
    }
}

/// The caller's scheduling, as far as it matters to clone.
enum Deadline {
    No,
    /// SCHED_DEADLINE without reset-on-fork, or with flags that are not known.
    Under(DeadlineScheduling),
    Unread,
}

fn deadline(calls: Calls) -> Deadline {
    const SCHED_DEADLINE: u32 = 6;
    const RESET_ON_FORK: u64 = 1;
    let scheduling = match calls {
        Calls::Any => probe::scheduling()
            .ok()
            .map(|(policy, flags)| (policy, Some(flags))),
        Calls::FilesOnly => task::scheduling_policy().map(|policy| (policy, None)),
    };
    match scheduling {
        None => Deadline::Unread,
        Some((policy, _)) if policy != SCHED_DEADLINE => Deadline::No,
        Some((_, Some(flags))) if flags & RESET_ON_FORK != 0 => Deadline::No,
        Some((policy, flags)) => Deadline::Under(DeadlineScheduling { policy, flags }),
    }
}
