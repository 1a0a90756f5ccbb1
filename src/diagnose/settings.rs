//! A setting that was refused: what was asked for, against what the machine has.

use std::fmt::Write as _;
use std::os::fd::AsRawFd;

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
use crate::settings::Asked;
use crate::step::{Step, StepError};
use crate::sys;
use crate::sys::sched::SCHED_DEADLINE;

impl Asked<'_> {
    /// A path through the descriptor, so that nothing is opened that the caller does not have.
    fn file(&self, name: &str) -> Option<Text<64>> {
        let mut path = Text::EMPTY;
        let directory = self.cgroup?.as_raw_fd();
        write!(path, "/proc/thread-self/fd/{directory}{name}").ok()?;
        Some(path)
    }

    fn first_in<T>(&self, name: &str, parse: impl FnMut(&[u8]) -> Option<T>) -> Option<T> {
        file::first(self.file(name)?.as_c_str()?, parse)
    }

    fn directory(&self, calls: Calls) -> InlinePath {
        if calls == Calls::FilesOnly {
            let path = self.file("");
            return path.map_or(InlinePath::EMPTY, |path| InlinePath::new(path.as_bytes()));
        }
        let mut name = [0; 256];
        let length = self
            .file("")
            .and_then(|path| sys::read_link(path.as_c_str()?, &mut name).ok());
        let name = length.and_then(|length| name.get(..length));
        name.map_or(InlinePath::EMPTY, InlinePath::new)
    }

    /// The first CPU that a list does not have, and whether it has others.
    fn missing_from(&self, list: &[u8]) -> (Option<usize>, bool) {
        let asked = sys::sched::list(self.cpus);
        let (mut missing, mut partly) = (None, false);
        for cpu in asked {
            match list_has(list, cpu as u64) {
                true => partly = true,
                false => missing = missing.or(Some(cpu)),
            }
        }
        (missing, partly)
    }
}

pub(super) fn diagnose(error: &StepError, asked: &Asked<'_>, status: &Status) -> Verdict {
    if error.errno == Errno::ESRCH && error.step != Step::CoreScheduling {
        let during = error.step;
        return Verdict::proven(EndedEarly { during });
    }
    let calls = status.calls();
    let verdict = match error.step {
        Step::Affinity => affinity(error.errno, asked, calls),
        Step::Scheduler => scheduler(error.errno, asked, status),
        Step::Cgroup => cgroup(error.errno, asked, calls),
        Step::CoreScheduling => core(error.errno, status),
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

fn affinity(errno: Errno, asked: &Asked<'_>, calls: Calls) -> Verdict {
    if errno != Errno::EINVAL {
        return Verdict::UNKNOWN;
    }
    const FILES: [&str; 2] = ["/cpuset.effective_cpus", "/cpuset.cpus.effective"];
    // That of the cgroup asked for, if it has the controller; else the thread has kept its creator's.
    let missing = |list: &[u8]| Some(asked.missing_from(list));
    let target = FILES.iter().find_map(|file| asked.first_in(file, missing));
    let (directory, (missing, partly)) = match target {
        Some(found) => (asked.directory(calls), found),
        None => {
            let own = Hierarchy::of_thread(b"cpuset");
            let found = own.as_ref().and_then(|own| {
                let mut files = FILES.iter();
                files.find_map(|file| own.first_in(file.as_bytes(), missing))
            });
            match (own, found) {
                (Some(own), Some(found)) => (own.own_directory(), found),
                _ => {
                    let online = file::first(c"/sys/devices/system/cpu/online", missing);
                    (InlinePath::EMPTY, online.unwrap_or_default())
                }
            }
        }
    };
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

fn scheduler(errno: Errno, asked: &Asked<'_>, status: &Status) -> Verdict {
    let Some(attributes) = asked.scheduler else {
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
    const RUNTIME: &str = "/cpu.rt_runtime_us";
    let zero = |line: &[u8]| (line.trim_ascii() == b"0").then_some(());
    let unlimited = |line: &[u8]| (!line.is_empty()).then_some(());
    if asked.first_in(RUNTIME, zero).is_some() {
        let directory = asked.directory(calls);
        return Verdict::proven(RealTimeRuntime { directory });
    }
    let own = Hierarchy::of_thread(b"cpu").filter(|own| own.version == 1);
    if asked.first_in(RUNTIME, unlimited).is_none()
        && let Some(own) = own
        && own.first_in(RUNTIME.as_bytes(), zero).is_some()
    {
        let directory = own.own_directory();
        return Verdict::proven(RealTimeRuntime { directory });
    }
    match privileged {
        Some(true) => Verdict::UNKNOWN,
        _ => inferred(unprivileged),
    }
}

fn cgroup(errno: Errno, asked: &Asked<'_>, calls: Calls) -> Verdict {
    let directory = asked.directory(calls);
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
            value: asked
                .cgroup
                .map_or(0, |fd| fd.as_raw_fd().unsigned_abs().into()),
        }),
        Errno::EOPNOTSUPP | Errno::EBUSY => {
            const KINDS: [&str; 4] = ["domain", "domain threaded", "domain invalid", "threaded"];
            let kind = asked.first_in("/cgroup.type", |line| {
                KINDS.into_iter().find(|kind| kind.as_bytes() == line)
            });
            Verdict::proven(ForeignCgroup { directory, kind })
        }
        _ => Verdict::UNKNOWN,
    }
}

fn core(errno: Errno, status: &Status) -> Verdict {
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
            value: 0,
        }),
        _ => Verdict::UNKNOWN,
    }
}
