//! What the calling thread, or another of the process, is doing.

use std::fmt::{Formatter, Result};

use super::show::{Evidence, Value, line};

/// The caller runs under SCHED_DEADLINE and may not hand that on (sched(7), SCHED_FLAG_RESET_ON_FORK).
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeadlineScheduling {
    /// The policy, from sched_getattr(2) or /proc/thread-self/stat.
    pub policy: u32,
    /// sched_flags from sched_getattr(2), if it could be called.
    pub flags: Option<u64>,
}

impl Evidence for DeadlineScheduling {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str("the calling thread is under SCHED_DEADLINE without reset-on-fork")
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        line(f, "scheduling policy (6 is SCHED_DEADLINE)", self.policy)?;
        let what = "sched_getattr, flags (bit 0 is reset-on-fork)";
        line(f, what, Value(self.flags))
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(
            "Set SCHED_FLAG_RESET_ON_FORK with sched_setattr (chrt --deadline --reset-on-fork), or spawn from a thread\n  \
             under another policy.",
        )
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        let flags = Some(0);
        vec![DeadlineScheduling { policy: 6, flags }]
    }
}

/// Another thread of the process is inside execve(2): gone within milliseconds, one way or the other.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SiblingExec {
    /// Threads of the process.
    pub threads: Option<u64>,
}

impl Evidence for SiblingExec {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str("another thread of this process is inside execve")
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        line(f, "/proc/thread-self/status, Threads", Value(self.threads))?;
        f.write_str(
            "  The kernel refused a clone that shares the file-system state and let one pass that does not.\n",
        )
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(
            "Nothing: the kernel refuses new threads while another thread of the process is inside execve. Either that\n  \
             replaces the process, or it fails and clone works again within milliseconds. Retrying is right.",
        )
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        vec![SiblingExec { threads: Some(2) }]
    }
}
