//! Settings of the new thread that the kernel did not accept.

use std::fmt::{Formatter, Result};

use super::show::{Evidence, Value, line};
use crate::mem::text::InlinePath;

/// A privilege is missing for a scheduling policy, an affinity or a cgroup.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotPermitted {
    /// What was asked for and what it needs.
    pub what: &'static str,
    /// Whether CAP_SYS_NICE is effective.
    pub cap_sys_nice: Option<bool>,
    /// Soft RLIMIT_RTPRIO.
    pub rtprio: Option<u64>,
}

impl Evidence for NotPermitted {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "not permitted: {}", self.what)
    }

    fn report(&self, f: &mut Formatter<'_>, _: bool) -> Result {
        line(f, "refused", self.what)?;
        let capability = match self.cap_sys_nice {
            Some(true) => "effective",
            Some(false) => "not effective",
            None => "not readable",
        };
        line(f, "CAP_SYS_NICE", capability)?;
        line(f, "RLIMIT_RTPRIO", Value(self.rtprio))
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(
            "Grant CAP_SYS_NICE, or raise RLIMIT_RTPRIO (LimitRTPRIO= in the systemd unit); in a v1 cpu cgroup also\n  \
             cpu.rt_runtime_us; for a cgroup, write access to its cgroup.procs.",
        )
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        let of = |what, cap_sys_nice, rtprio| NotPermitted {
            what,
            cap_sys_nice,
            rtprio,
        };
        vec![
            of("the scheduling policy or priority", Some(false), Some(0)),
            of("entering the cgroup", None, None),
        ]
    }
}

/// None of the CPUs asked for is in the cpuset.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutsideCpuset {
    /// Directory of the cpuset; empty if not visible.
    pub directory: InlinePath,
}

impl Evidence for OutsideCpuset {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str("none of the CPUs asked for is in the cpuset")
    }

    fn report(&self, f: &mut Formatter<'_>, _: bool) -> Result {
        match self.directory.is_empty() {
            true => line(f, "cpuset", "not visible"),
            false => line(f, "cpuset", self.directory),
        }
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str("Choose CPUs of the cpuset, or widen cpuset.cpus (systemd: AllowedCPUs=).")
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        [InlinePath::new(b"/sys/fs/cgroup/vm"), InlinePath::EMPTY]
            .map(|directory| OutsideCpuset { directory })
            .into()
    }
}
