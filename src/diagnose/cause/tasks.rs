//! Too many tasks: of a user, or of the machine.

use std::fmt::{Formatter, Result};

use super::show::{Evidence, KEEP, Value, line};

/// RLIMIT_NPROC: the real user has too many tasks (getrlimit(2)). The kernel exports no count of them.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UserProcesses {
    /// Real user id of the calling thread.
    pub uid: Option<u32>,
    /// Soft limit of the process.
    pub soft: Option<u64>,
    /// Hard limit of the process.
    pub hard: Option<u64>,
    /// Outside the initial user namespace a limit remembered at the namespace's creation also counts, and
    /// may be lower than the process's own.
    pub initial_user_namespace: Option<bool>,
    /// All tasks of the machine: an upper bound of the user's.
    pub tasks: Option<u64>,
    /// Threads of this process: a lower bound of the user's.
    pub own_threads: Option<u64>,
    /// Tasks of the user that /proc shows, counted until they were as many as the limit. `None` if they were not counted.
    pub visible: Option<u64>,
}

impl Evidence for UserProcesses {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str("RLIMIT_NPROC")?;
        if let Some(uid) = self.uid {
            write!(f, " of user {uid}")?;
        }
        write!(f, " (soft limit {})", Value(self.soft))
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        let uid = Value(self.uid.map(u64::from));
        line(f, "/proc/thread-self/status, real Uid", uid)?;
        line(f, "RLIMIT_NPROC, soft", Value(self.soft))?;
        line(f, "RLIMIT_NPROC, hard", Value(self.hard))?;
        let own = Value(self.own_threads);
        line(f, "/proc/thread-self/status, Threads", own)?;
        if let Some(visible) = self.visible {
            line(f, "/proc/PID/status, tasks of this user, at least", visible)?;
        }
        line(f, "/proc/loadavg, tasks of all users", Value(self.tasks))?;
        if self.initial_user_namespace != Some(true) {
            f.write_str("  A user namespace also enforces the RLIMIT_NPROC it was created under, which may be\n  lower than the one above; no file shows it.\n")?;
        }
        f.write_str("  The kernel exports no count of a user's tasks.\n")
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(
            "Raise the limit of the user's processes: prlimit --pid PID --nproc=N:N, ulimit -u N, LimitNPROC=N in the\n  \
             systemd unit, nproc in /etc/security/limits.conf, docker run --ulimit nproc=N; or end other tasks of this\n  \
             user (ps -L -U ",
        )?;
        // -U: the limit counts by the real user.
        match self.uid {
            Some(uid) => write!(f, "{uid}")?,
            None => f.write_str("UID")?,
        }
        f.write_str(" lists them).")?;
        match self.initial_user_namespace {
            Some(true) => f.write_str(" CAP_SYS_RESOURCE exempts."),
            _ => f.write_str(
                "\n  If this is a user namespace, raise the limit of the process that creates it, before it does.",
            ),
        }
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        let user = |uid, initial_user_namespace| UserProcesses {
            uid,
            soft: Some(500),
            hard: Some(1000),
            initial_user_namespace,
            tasks: Some(4321),
            own_threads: Some(480),
            visible: None,
        };
        let counted = UserProcesses {
            visible: Some(500),
            ..user(Some(1234), Some(true))
        };
        vec![
            user(Some(1234), Some(true)),
            user(None, Some(false)),
            counted,
        ]
    }
}

/// kernel.threads-max: too many tasks in the whole machine.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ThreadsMax {
    /// Tasks in the machine, from /proc/loadavg.
    pub tasks: Option<u64>,
    /// /proc/sys/kernel/threads-max.
    pub maximum: Option<u64>,
}

impl Evidence for ThreadsMax {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        let (tasks, maximum) = (Value(self.tasks), Value(self.maximum));
        write!(f, "kernel.threads-max: {tasks} of {maximum} tasks")
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        line(f, "/proc/loadavg, tasks of all users", Value(self.tasks))?;
        line(f, "/proc/sys/kernel/threads-max", Value(self.maximum))
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        write!(
            f,
            "sysctl kernel.threads-max=N{KEEP}, or end other tasks of the machine\n  (ps -eL lists them).",
        )
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        let of = |tasks, maximum| ThreadsMax { tasks, maximum };
        vec![of(Some(5000), Some(5000)), of(None, None)]
    }
}
