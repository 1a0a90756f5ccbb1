//! A setting that was refused: what was requested, against what the machine has.

use std::fmt::Write as _;
use std::os::fd::{AsRawFd, RawFd};

use super::cause::{
    Cause, Certainty, DeadlineAdmission, EndedEarly, ForeignCgroup, InvalidAttribute,
    NoCoreScheduling, NotPermitted, OutsideCpuset, RealTimeRuntime,
};
use super::verdict::Verdict;
use crate::errno::Errno;
use crate::mem::text::{InlinePath, Text};
use crate::proc::cgroup::Hierarchy;
use crate::proc::limits::{Limit, Limited};
use crate::proc::parse::list_has;
use crate::proc::status::{CAP_SYS_NICE, Calls, Status};
use crate::proc::{file, task};
use crate::settings::Requested;
use crate::step::{Step, StepError};
use crate::sys;
use crate::sys::sched::{self, SCHED_DEADLINE};

/// The cgroup that a thread was to be in, by its open directory.
#[inline(never)]
pub(super) fn hierarchy_of(directory: RawFd, calls: Calls) -> Option<Hierarchy> {
    let mut name = [0; 512];
    let mut link = Text::<64>::EMPTY;
    let _ = write!(link, "/proc/thread-self/fd/{directory}");
    let length = match (calls, link.as_c_str()) {
        (Calls::Any, Some(link)) => sys::read_link(link, &mut name).ok(),
        // A filter need not allow readlink(2).
        _ => None,
    };
    let name = length.and_then(|length| name.get(..length));
    Hierarchy::of_directory(directory, name, calls)
}

impl Requested<'_> {
    fn hierarchy(&self, calls: Calls) -> Option<Hierarchy> {
        hierarchy_of(self.cgroup?.as_raw_fd(), calls)
    }

    /// The first CPU that a list does not have, and whether it has others.
    fn missing_from(&self, list: &[u8]) -> (Option<usize>, bool) {
        let cpus = sched::list(self.cpus);
        let (mut missing, mut partly) = (None, false);
        for cpu in cpus {
            match list_has(list, cpu as u64) {
                true => partly = true,
                false => missing = missing.or(Some(cpu)),
            }
        }
        (missing, partly)
    }
}

pub(super) fn diagnose(error: &StepError, requested: &Requested<'_>, status: &Status) -> Verdict {
    if error.ended {
        let during = error.step;
        return Verdict::proven(EndedEarly { during });
    }
    let calls = status.calls();
    let verdict = match error.step {
        Step::Affinity => affinity(error.errno, requested, calls),
        Step::Scheduler => scheduler(error.errno, requested, status),
        Step::Cgroup => cgroup(error.errno, requested, calls),
        Step::CoreScheduling => core(error.errno, requested, status),
        _ => Verdict::UNKNOWN,
    };
    // A filter, or a tracer, can have answered.
    match (status.seccomp, status.tracer, verdict.certainty) {
        (Some(0), Some(0), _) | (_, _, Certainty::Unknown) => verdict,
        _ => inferred(verdict.cause),
    }
}

fn inferred(cause: impl Into<Cause>) -> Verdict {
    believed(cause, false)
}

fn believed(cause: impl Into<Cause>, proven: bool) -> Verdict {
    let mut verdict = Verdict::proven(cause);
    if !proven {
        verdict.certainty = Certainty::Inferred;
    }
    verdict
}

fn affinity(errno: Errno, requested: &Requested<'_>, calls: Calls) -> Verdict {
    if errno != Errno::EINVAL {
        return Verdict::UNKNOWN;
    }
    let missing = |list: &[u8]| Some(requested.missing_from(list));
    let cpuset = |hierarchy: Hierarchy| {
        const FILES: [&[u8]; 2] = [b"/cpuset.effective_cpus", b"/cpuset.cpus.effective"];
        let mut files = FILES.into_iter();
        files.find_map(|file| hierarchy.nearest_in(file, missing))
    };
    // That of the cgroup requested, if it has the controller; else the thread has kept its creator's.
    let found = requested
        .hierarchy(calls)
        .and_then(cpuset)
        .or_else(|| Hierarchy::of_thread(b"cpuset", calls).and_then(cpuset));
    let (directory, (missing, partly)) = found.unwrap_or_else(|| {
        let online = file::first(c"/sys/devices/system/cpu/online", missing);
        (InlinePath::EMPTY, online.unwrap_or_default())
    });
    let Some(missing) = missing else {
        return Verdict::UNKNOWN;
    };
    let cause = OutsideCpuset {
        directory,
        missing,
        partly,
    };
    believed(cause, !directory.is_empty())
}

fn scheduler(errno: Errno, requested: &Requested<'_>, status: &Status) -> Verdict {
    let Some(attributes) = requested.scheduler else {
        return Verdict::UNKNOWN;
    };
    let calls = status.calls();
    // In another user namespace the capability counts for nothing here.
    let initial = task::in_initial_user_namespace(calls);
    let privileged = initial.map(|initial| initial && status.has(CAP_SYS_NICE));
    let admission = |narrowed| DeadlineAdmission {
        runtime: attributes.sched_runtime,
        period: attributes.sched_period,
        narrowed,
    };
    let policy = attributes.sched_policy;
    let (what, limit, needed) = match policy {
        SCHED_DEADLINE => ("SCHED_DEADLINE", None, None),
        _ if attributes.sched_priority > 0 => {
            let limit = Limit::read(Limited::RealTimePriority, calls);
            let needed = Some(attributes.sched_priority.into());
            ("a real-time priority", limit, needed)
        }
        _ => {
            let limit = Limit::read(Limited::Nice, calls);
            // The limit counts from 1 (nice 19) to 40 (nice -20).
            let needed = u64::try_from(20 - attributes.sched_nice).ok();
            ("a nice value below that of the creator", limit, needed)
        }
    };
    let limit = limit.map(|limit| limit.soft);
    let unprivileged = NotPermitted {
        what,
        cap_sys_nice: privileged,
        limit,
        needed,
        directory: InlinePath::EMPTY,
    };
    match errno {
        Errno::EPERM => {}
        Errno::EBUSY if policy == SCHED_DEADLINE => return Verdict::proven(admission(false)),
        // Of valid attributes only those of a deadline can lie outside of what the machine is configured for.
        Errno::EINVAL if policy == SCHED_DEADLINE => {
            let what = "deadline period (kernel.sched_deadline_period_min_us, _max_us)";
            let value = attributes.sched_period;
            return inferred(InvalidAttribute { what, value });
        }
        _ => return Verdict::UNKNOWN,
    }
    if privileged == Some(false) && (needed.is_none() || limit < needed) {
        return believed(unprivileged, limit.is_some() || needed.is_none());
    }
    if policy == SCHED_DEADLINE {
        return inferred(admission(true));
    }
    // Of v1, where every cgroup has the file if the controller is there.
    let runtime = |hierarchy: Hierarchy| {
        let runtime = |line: &[u8]| Some(line.trim_ascii() == b"0");
        let is_zero = hierarchy.first_in(b"/cpu.rt_runtime_us", runtime)?;
        Some((is_zero, hierarchy.own_directory()))
    };
    let found = requested
        .hierarchy(calls)
        .and_then(runtime)
        .or_else(|| Hierarchy::of_thread(b"cpu", calls).and_then(runtime));
    if let Some((true, directory)) = found {
        return Verdict::proven(RealTimeRuntime { directory });
    }
    match privileged {
        Some(true) => Verdict::UNKNOWN,
        _ => inferred(unprivileged),
    }
}

fn cgroup(errno: Errno, requested: &Requested<'_>, calls: Calls) -> Verdict {
    let hierarchy = requested.hierarchy(calls);
    let hierarchy = hierarchy.as_ref();
    let directory = hierarchy.map_or(InlinePath::EMPTY, |found| found.own_directory());
    match errno {
        Errno::EACCES | Errno::EPERM => Verdict::proven(NotPermitted {
            what: "entering the cgroup",
            cap_sys_nice: None,
            limit: None,
            needed: None,
            directory,
        }),
        Errno::ENOTDIR => Verdict::proven(InvalidAttribute {
            what: "cgroup: the descriptor is not a directory of a cgroup file system",
            value: requested
                .cgroup
                .map_or(0, |fd| fd.as_raw_fd().unsigned_abs().into()),
        }),
        Errno::EOPNOTSUPP | Errno::EBUSY if hierarchy.is_some_and(|found| found.version == 2) => {
            const KINDS: [&str; 4] = ["domain", "domain threaded", "domain invalid", "threaded"];
            let kind = |line: &[u8]| KINDS.into_iter().find(|kind| kind.as_bytes() == line);
            let kind = hierarchy.and_then(|found| found.first_in(b"/cgroup.type", kind));
            Verdict::proven(ForeignCgroup { directory, kind })
        }
        _ => Verdict::UNKNOWN,
    }
}

fn core(errno: Errno, requested: &Requested<'_>, status: &Status) -> Verdict {
    let smt = || {
        let active = file::number_in(c"/sys/devices/system/cpu/smt/active");
        active.map(|active| active != 0)
    };
    match errno {
        Errno::ENODEV | Errno::EINVAL => Verdict::proven(NoCoreScheduling {
            smt: smt(),
            kernel: errno == Errno::EINVAL,
        }),
        Errno::EPERM => inferred(NotPermitted {
            what: "sharing a core-scheduling cookie",
            cap_sys_nice: status.capabilities.map(|_| status.has(CAP_SYS_NICE)),
            limit: None,
            needed: None,
            directory: InlinePath::EMPTY,
        }),
        Errno::ESRCH => Verdict::proven(InvalidAttribute {
            what: "core_scheduling: no thread has this id",
            value: requested.cookie_of.unsigned_abs().into(),
        }),
        _ => Verdict::UNKNOWN,
    }
}
