//! Which pid numbers are free, and at which level of namespaces none is.

use std::os::fd::AsFd;

use crate::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use super::cause::{PidLevel, PidNumbers, Unknown};
use super::judge::MARGIN;
use crate::proc::machine::{self, RESERVED_PIDS};
use crate::proc::status::Calls;
use crate::proc::{file, task};
use crate::sys::clone_probe::number_is_held;

/// What probing some numbers of the own pid namespace showed.
#[derive(Clone, Copy, Debug, Default)]
struct Sample {
    looked: u32,
    free: u32,
    /// How many numbers each of them stands for.
    step: u64,
    /// Whether `free` is the kernel's own answer. Otherwise numbers that only a session holds are among them.
    exact: bool,
}

impl Sample {
    /// Probes some numbers of this pid namespace.
    ///
    /// No file counts the numbers in use: zombies hold theirs, and so do process groups and sessions whose leader
    /// is gone. F_SETOWN answers ESRCH for a number that nothing holds; before Linux 5.15 or so it takes any number,
    /// and then a signal 0 shows whether a task or a process group has a number, but not whether a session has it.
    /// Numbers below [`RESERVED_PIDS`] are left out: after its first wrap the kernel does not give them out.
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
            step,
            ..Sample::default()
        };
        for stride in 0..MOST {
            // At another place of each stride: programs that fork twice leave every other number free.
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
        let free = u64::from(self.free) * self.step;
        self.exact && self.free > self.looked / 4 && free > 4 * MARGIN
    }
}

/// What two looks, before and after, have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Numbers {
    /// None of those that were probed is free in this pid namespace.
    NoneFree,
    /// There is no other namespace around, and plenty are free.
    Plenty,
    Unclear,
}

/// The numbers of this pid namespace at one moment.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    sample: Sample,
    pid_max: Option<u64>,
    initial_namespace: Option<bool>,
}

impl Look {
    pub(super) fn take(calls: Calls) -> Look {
        let pid_max = machine::pid_max(calls);
        Look {
            sample: match (calls, pid_max) {
                (Calls::Any, Some(pid_max)) => Sample::take(pid_max),
                _ => Sample::default(),
            },
            pid_max,
            initial_namespace: task::in_initial_pid_namespace(calls),
        }
    }
}

/// What looks before and after show, if there were any.
pub(super) fn compare(
    before: Option<Look>,
    after: Option<Look>,
    seen: &mut Unknown,
) -> (Numbers, PidNumbers) {
    let Some((before, after)) = before.zip(after) else {
        return (Numbers::Unclear, PidNumbers::UNREAD);
    };
    seen.pid_max = after.pid_max;
    let both = |test: fn(&Sample) -> bool| {
        before.pid_max == after.pid_max && test(&before.sample) && test(&after.sample)
    };
    let (none_free, plenty_free) = (both(Sample::none_free), both(Sample::plenty_free));
    let initial = after.initial_namespace == Some(true);
    let cause = PidNumbers {
        level: match (initial || none_free, plenty_free) {
            (true, _) => PidLevel::Own,
            (_, true) => PidLevel::Ancestor,
            _ => PidLevel::OwnOrAncestor,
        },
        pid_max: after.pid_max,
        sampled: after.sample.looked,
        free: after.sample.free,
        initial_namespace: after.initial_namespace,
    };
    let numbers = match (none_free, initial && plenty_free) {
        (true, _) => Numbers::NoneFree,
        (_, true) => Numbers::Plenty,
        _ => Numbers::Unclear,
    };
    (numbers, cause)
}
