//! Which pid numbers are free, and at which level of namespaces none is.

use std::os::fd::AsFd;

use crate::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use super::cause::{CauseKind, Causes, PidLevel, PidNumbers, Unknown};
use super::limits::ProcessLimits;
use super::verdict::Verdict;
use crate::proc::machine::{self, RESERVED_PIDS};
use crate::proc::status::Calls;
use crate::proc::{file, task};
use crate::sys::clone_probe::number_is_held;

/// What probing some numbers of the own pid namespace showed.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    looked: u32,
    free: u32,
    /// Whether `free` is the kernel's own answer. Otherwise numbers that only a session holds are among them.
    exact: bool,
}

impl Sample {
    /// Probes some numbers of this pid namespace.
    ///
    /// No file counts the numbers in use: zombies hold theirs, and so do process groups and sessions whose leader
    /// is gone. F_SETOWN answers ESRCH for a number that nothing holds; before Linux 5.15 or so it takes any number,
    /// and then a signal 0 tells of one whether a task or a process group has it, but not whether a session has.
    /// Numbers below [`RESERVED_PIDS`] are left out: after its first wrap the kernel does not give them to anybody.
    fn take(pid_max: u64) -> Sample {
        const MOST: u64 = 256;
        // Larger than any pid_max.
        const NOBODYS: i32 = i32::MAX;
        let step = pid_max.saturating_sub(RESERVED_PIDS).div_ceil(MOST).max(1);
        let owned = file::open(machine::PID_MAX).ok();
        let answer = |number| Some(number_is_held(owned.as_ref()?.as_fd(), number));
        let exact = answer(NOBODYS) == Some(Err(Errno::ESRCH));
        let mut sample = Sample {
            exact,
            ..Sample::default()
        };
        for stride in 0..MOST {
            // Somewhere in its stride: programs that fork twice leave every other number free.
            let within = (stride.wrapping_mul(0x9E37_79B9) >> 16) % step;
            let candidate = RESERVED_PIDS + stride * step + within;
            let Some(number) = i32::try_from(candidate)
                .ok()
                .filter(|_| candidate < pid_max)
            else {
                continue;
            };
            let unused = match answer(number).filter(|_| exact) {
                Some(Ok(())) => false,
                Some(Err(Errno::ESRCH)) => true,
                Some(Err(_)) => continue,
                None => {
                    let unknown = Err(nix::errno::Errno::ESRCH);
                    kill(Pid::from_raw(number), None) == unknown
                        && kill(Pid::from_raw(-number), None) == unknown
                }
            };
            sample.looked += 1;
            sample.free += u32::from(unused);
        }
        sample
    }

    fn none_free(&self) -> bool {
        self.looked > 0 && self.free == 0
    }

    /// So many that not all of them can have come free since a refusal.
    fn plenty_free(&self) -> bool {
        self.exact && self.free > self.looked / 4 && self.free >= 8
    }
}

/// What was read of the numbers, and what probing showed.
fn read(calls: Calls, seen: &mut Unknown) -> (Sample, PidNumbers) {
    let pid_max = machine::pid_max();
    seen.pid_max = pid_max;
    let sample = match (calls, pid_max) {
        (Calls::Any, Some(pid_max)) => Sample::take(pid_max),
        _ => Sample::default(),
    };
    let initial_namespace = task::in_initial_pid_namespace(calls);
    let level = match initial_namespace {
        Some(true) => PidLevel::Own,
        _ if sample.none_free() => PidLevel::Own,
        _ if sample.plenty_free() => PidLevel::Ancestor,
        _ => PidLevel::OwnOrAncestor,
    };
    let numbers = PidNumbers {
        level,
        pid_max,
        sampled: sample.looked,
        free: sample.free,
        initial_namespace,
    };
    (sample, numbers)
}

/// The kernel refused at the pid numbers, `agreeing` times.
pub(super) fn name(
    limits: &ProcessLimits,
    calls: Calls,
    seen: &mut Unknown,
    agreeing: u32,
) -> Verdict {
    let (sample, cause) = read(calls, seen);
    let proven = limits.excluded() || sample.none_free() && agreeing >= 2;
    Verdict::believed(cause, proven, limits.possible())
}

/// clone3 is not available, so that pid numbers and cgroup cannot be told apart by probing.
pub(super) fn name_without_oracle(calls: Calls, seen: &mut Unknown) -> Verdict {
    let (sample, cause) = read(calls, seen);
    if !sample.none_free() {
        return Verdict::UNKNOWN;
    }
    Verdict::inferred(cause, Causes::NONE.with(CauseKind::PidsCgroup))
}

/// Whether numbers cannot have run out at any level.
pub(super) fn are_excluded(calls: Calls, seen: &mut Unknown) -> bool {
    let (sample, numbers) = read(calls, seen);
    numbers.initial_namespace == Some(true) && sample.plenty_free()
}
