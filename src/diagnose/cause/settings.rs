//! Settings of the new thread that the kernel did not accept, and a setup that ended the thread.

use std::fmt::{Formatter, Result};

use super::show::{Evidence, Value, line, set};
use crate::mem::text::InlinePath;
use crate::step::Step;

/// A privilege is missing for a scheduling policy, a priority, a cgroup, or another thread's core-scheduling cookie.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NotPermitted {
    /// What was requested.
    pub what: &'static str,
    /// Whether CAP_SYS_NICE is effective, and in the initial user namespace, where alone it counts.
    pub cap_sys_nice: Option<bool>,
    /// Soft RLIMIT_RTPRIO, where a real-time policy was requested; soft RLIMIT_NICE, where a nice value was.
    pub limit: Option<u64>,
    /// The least value of that limit that allows it.
    pub needed: Option<u64>,
    /// Directory of the cgroup, where entering one was requested; else empty.
    pub directory: InlinePath,
}

impl Evidence for NotPermitted {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "not permitted: {}", self.what)
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        line(f, "refused", self.what)?;
        if !self.directory.is_empty() {
            return line(f, "cgroup", self.directory);
        }
        let capability = match self.cap_sys_nice {
            Some(true) => "effective",
            Some(false) => "not effective in the initial user namespace",
            None => "not readable",
        };
        line(f, "CAP_SYS_NICE", capability)?;
        if let Some(needed) = self.needed {
            line(f, "soft limit (getrlimit)", Value(self.limit))?;
            line(f, "needed", needed)?;
        }
        Ok(())
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(match (self.directory.is_empty(), self.needed) {
            (false, _) => "Give this user write access to tasks (v1), or to cgroup.procs of the cgroup and of the common ancestor (v2).",
            (true, Some(_)) => "Grant CAP_SYS_NICE, or raise the limit (LimitRTPRIO= or LimitNICE= in the systemd unit).",
            (true, None) => "Grant CAP_SYS_NICE; for another process's cookie, the right to trace it (PTRACE_MODE_READ).",
        })
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        let of = |what, needed: Option<u64>, directory: &[u8]| NotPermitted {
            what,
            cap_sys_nice: needed.map(|_| false),
            limit: needed.map(|_| 0),
            needed,
            directory: InlinePath::new(directory),
        };
        vec![
            of("a real-time priority", Some(50), b""),
            of("entering the cgroup", None, b"/sys/fs/cgroup/vm"),
            of("sharing a core-scheduling cookie", None, b""),
        ]
    }
}

/// A requested CPU is not in the cpuset, or does not exist.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OutsideCpuset {
    /// Directory of the cpuset; empty if not visible, and then the CPUs that are online were looked at.
    pub directory: InlinePath,
    /// The first requested CPU that is not in it.
    pub missing: usize,
    /// Whether other requested CPUs are in it: the kernel narrows the affinity to these, and says nothing.
    pub partly: bool,
}

impl Evidence for OutsideCpuset {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        let place = match self.directory.is_empty() {
            true => "online",
            false => "in the cpuset",
        };
        match self.partly {
            true => write!(
                f,
                "CPU {} is not {place}, others that were requested are",
                self.missing
            ),
            false => write!(
                f,
                "none of the requested CPUs is {place}, such as {}",
                self.missing
            ),
        }
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        match self.directory.is_empty() {
            true => line(
                f,
                "cpuset",
                "not visible; /sys/devices/system/cpu/online was read",
            )?,
            false => line(f, "cpuset", self.directory)?,
        }
        line(f, "first CPU that is not in it", self.missing)?;
        match self.partly {
            true => line(f, "sched_setaffinity", "narrowed the set to the other CPUs"),
            false => line(f, "sched_setaffinity", "refused the set"),
        }
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str("Choose CPUs of the cpuset, or widen cpuset.cpus (systemd: AllowedCPUs=).")
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        [
            (&b"/sys/fs/cgroup/vm"[..], true),
            (b"/sys/fs/cgroup/vm", false),
            (b"", false),
        ]
        .map(|(directory, partly)| OutsideCpuset {
            directory: InlinePath::new(directory),
            missing: 7,
            partly,
        })
        .into()
    }
}

/// The thread's cgroup (v1, controller cpu) has no time for real-time threads.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RealTimeRuntime {
    /// Directory of the cgroup.
    pub directory: InlinePath,
}

impl Evidence for RealTimeRuntime {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        write!(
            f,
            "the cgroup {} has no time for real-time threads",
            self.directory
        )
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        line(f, "cgroup", self.directory)?;
        line(f, "cpu.rt_runtime_us", 0)
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        set(f, "MICROSECONDS", &self.directory, "cpu.rt_runtime_us")?;
        f.write_str("; the cgroups above must have as much. Or use a cgroup that has.")
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        let directory = InlinePath::new(b"/sys/fs/cgroup/cpu/vm");
        vec![RealTimeRuntime { directory }]
    }
}

/// A SCHED_DEADLINE thread that the kernel does not admit.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeadlineAdmission {
    /// Nanoseconds.
    pub runtime: u64,
    /// Nanoseconds.
    pub period: u64,
    /// The thread may not run on every CPU of its scheduling domain (EPERM); else too little time is left (EBUSY).
    pub narrowed: bool,
}

impl Evidence for DeadlineAdmission {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(match self.narrowed {
            true => "SCHED_DEADLINE needs an affinity with every CPU of the scheduling domain",
            false => "the CPUs have too little time left for this SCHED_DEADLINE thread",
        })
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        line(f, "runtime requested (ns)", self.runtime)?;
        line(f, "period requested (ns)", self.period)?;
        line(
            f,
            "sched_setattr",
            match self.narrowed {
                true => "EPERM, with the privilege",
                false => "EBUSY",
            },
        )
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(match self.narrowed {
            true => "Do not narrow the affinity of a deadline thread; to keep it on some CPUs, give these a cpuset of their own\n  \
                     (exclusive, cpuset.cpus.partition = root).",
            false => "Request less runtime in a longer period, end other deadline threads, or raise\n  \
                      kernel.sched_rt_runtime_us.",
        })
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        [true, false]
            .map(|narrowed| DeadlineAdmission {
                runtime: 9_000_000,
                period: 10_000_000,
                narrowed,
            })
            .into()
    }
}

/// A v2 cgroup that a single thread of this process cannot be in.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ForeignCgroup {
    /// Its directory.
    pub directory: InlinePath,
    /// Its `cgroup.type`, if it could be read.
    pub kind: Option<&'static str>,
}

impl Evidence for ForeignCgroup {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        match self.kind {
            Some("threaded") => write!(
                f,
                "the cgroup {} is of another threaded domain",
                self.directory
            ),
            Some(kind) => write!(f, "the cgroup {} is not threaded ({kind})", self.directory),
            None => write!(
                f,
                "the cgroup {} is not of the domain of this process",
                self.directory
            ),
        }
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        line(f, "cgroup", self.directory)?;
        line(f, "its cgroup.type", self.kind.unwrap_or("not readable"))
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(
            "A thread can leave the cgroup of its process only for a threaded one in the same domain: make the cgroup below\n  \
             that of the process, and write threaded to its cgroup.type; no cgroup in between may enable a controller\n  \
             that is not threaded (memory, io).",
        )
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        [Some("threaded"), Some("domain"), None]
            .map(|kind| ForeignCgroup {
                directory: InlinePath::new(b"/sys/fs/cgroup/vm/vcpu0"),
                kind,
            })
            .into()
    }
}

/// This machine, or its kernel, has no core scheduling.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NoCoreScheduling {
    /// Whether a core runs more than one hardware thread; /sys/devices/system/cpu/smt/active.
    pub smt: Option<bool>,
    /// The kernel does not know the call (EINVAL): CONFIG_SCHED_CORE, Linux 5.14.
    pub kernel: bool,
}

impl Evidence for NoCoreScheduling {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(match self.kernel {
            true => "this kernel has no core scheduling",
            false => "no core of this machine runs more than one hardware thread",
        })
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        let answer = if self.kernel { "EINVAL" } else { "ENODEV" };
        line(f, "prctl(PR_SCHED_CORE)", answer)?;
        let smt = match self.smt {
            Some(true) => "1",
            Some(false) => "0",
            None => "not readable",
        };
        line(f, "/sys/devices/system/cpu/smt/active", smt)
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(match self.kernel {
            true => "Use a kernel from 5.14 on with CONFIG_SCHED_CORE, or no core scheduling.",
            false => "None is needed: without a second hardware thread nothing runs beside the thread on its core.",
        })
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        [(Some(true), true), (Some(false), false), (None, true)]
            .map(|(smt, kernel)| NoCoreScheduling { smt, kernel })
            .into()
    }
}

/// The new thread ended before it reported that its settings are in force: by exit(2) in its setup, or a filter
/// (`SECCOMP_RET_KILL_THREAD`).
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EndedEarly {
    /// The step that it was in.
    pub during: Step,
}

impl Evidence for EndedEarly {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "the new thread ended in the step \"{}\"", self.during)
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        line(f, "step that was not finished", self.during)?;
        line(f, "tid word", "cleared by the kernel")
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(
            "Look for a bare exit(2) in the setup, and for a system-call filter that kills the thread (audit log, SIGSYS).",
        )
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        let during = Step::Setup;
        vec![EndedEarly { during }]
    }
}
