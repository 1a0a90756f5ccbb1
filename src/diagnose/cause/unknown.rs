//! Not found out.

use std::fmt::{Formatter, Result};

use super::oracle::{Answer, MemoryOracle, Oracle};
use super::show::{Evidence, Value, line};

/// Not found out. All that was read.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Unknown {
    /// The kernel's answers about clone.
    pub oracle: Oracle,
    /// The kernel's answers about mmap.
    pub memory: MemoryOracle,
    /// Tasks of the machine.
    pub tasks: Option<u64>,
    /// kernel.threads-max.
    pub threads_max: Option<u64>,
    /// Soft RLIMIT_NPROC.
    pub nproc: Option<u64>,
    /// kernel.pid_max.
    pub pid_max: Option<u64>,
    /// Field `Seccomp` of /proc/thread-self/status.
    pub seccomp: Option<u64>,
    /// It was short at the refusal, and is not now: the same call would be granted.
    pub passed: bool,
}

impl Unknown {
    pub(crate) const NOTHING: Unknown = Unknown {
        oracle: Oracle::NOTHING,
        memory: MemoryOracle::NOTHING,
        tasks: None,
        threads_max: None,
        nproc: None,
        pid_max: None,
        seccomp: None,
        passed: false,
    };
}

impl Evidence for Unknown {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        match self.oracle.silence() {
            Some(why) => write!(f, "unknown: {why}"),
            None if self.passed => f.write_str("unknown: something was short, and is not now"),
            None => f.write_str("unknown"),
        }
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        let Unknown { oracle, memory, .. } = self;
        for (what, answer) in [
            ("clone3(NULL, 0)", oracle.clone3_empty),
            ("clone3 up to the pid number", oracle.until_pid_number),
            (
                "the same sharing file-system state",
                oracle.until_pid_number_with_fs,
            ),
            ("clone3 up to the cgroup", oracle.until_cgroup),
            (
                "clone up to the thread pointer",
                oracle.until_thread_pointer,
            ),
            ("clone or clone3 with invalid flags", oracle.until_flags),
            ("the refused call repeated", oracle.repeated),
            ("mmap of a page in use", memory.number_of_mappings),
            ("mmap, invalid, same length", memory.free_addresses),
            ("mmap, PROT_NONE, same length", memory.inaccessible),
            ("mmap, MAP_NORESERVE, same length", memory.unreserved),
            ("mmap, invalid, locked, same length", memory.locked),
            ("mmap, as a stack, same length", memory.stack),
            ("guards in a mapping of four pages", memory.guard),
        ] {
            if answer != Answer::NotAsked {
                line(f, what, answer)?;
            }
        }
        for (what, value) in [
            ("/proc/loadavg, tasks of all users", self.tasks),
            ("/proc/sys/kernel/threads-max", self.threads_max),
            ("RLIMIT_NPROC, soft", self.nproc),
            ("/proc/sys/kernel/pid_max", self.pid_max),
            ("/proc/thread-self/status, Seccomp", self.seccomp),
        ] {
            if value.is_some() {
                line(f, what, Value(value))?;
            }
        }
        Ok(())
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str("Nothing can be advised with certainty.")
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        use crate::errno::Errno;
        let mut everything = Unknown {
            tasks: Some(300),
            threads_max: Some(30000),
            nproc: Some(u64::MAX),
            pid_max: None,
            seccomp: Some(0),
            ..Unknown::NOTHING
        };
        everything.oracle.until_cgroup = Answer::Refused(Errno::EBADF);
        everything.memory.stack = Answer::Granted;
        let mut unavailable = Unknown::NOTHING;
        unavailable.oracle.clone3_empty = Answer::Refused(Errno::ENOSYS);
        let over = Unknown {
            passed: true,
            ..Unknown::NOTHING
        };
        vec![everything, unavailable, over]
    }
}
