//! The steps of thread creation, and what a refused one says. Every layer but `errno` may import this one.

use crate::errno::Errno;
use std::fmt;
use std::os::fd::RawFd;

/// The step of thread creation that was refused, in the order in which they are taken.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Step {
    /// What the caller configured was checked: sizes, names.
    Attributes,
    /// glibc was examined: symbols, calibration, self-checks.
    Runtime,
    /// Heap memory for what creator and thread share: the closure and its result, the name, the record
    /// of the stack. Some hundred bytes, so that malloc(3) seldom needs the kernel for it.
    Allocate,
    /// mmap(2) of the stack.
    MapStack,
    /// The guard: `MADV_GUARD_INSTALL`, or mprotect(2) where that is not available.
    GuardStack,
    /// mlock(2) or `MADV_POPULATE_WRITE` of the stack.
    PrepareStack,
    /// `_dl_allocate_tls`: thread-local storage of every loaded module.
    AllocateTls,
    /// clone3(2), or clone(2).
    Clone,
    /// sched_setaffinity(2).
    Affinity,
    /// sched_setattr(2).
    Scheduler,
    /// The cgroup of the new thread: `CLONE_INTO_CGROUP` (v2), or a write to its `tasks` (v1).
    Cgroup,
    /// prctl(2), `PR_SCHED_CORE`.
    CoreScheduling,
    /// The caller's own setup ended the thread. Its error or panic is no refusal:
    /// [`SetupError`](crate::SetupError) has it.
    Setup,
}

impl fmt::Display for Step {
    /// The words used in messages, such as `clone` or `map stack`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Step::Attributes => "attributes",
            Step::Runtime => "runtime",
            Step::Allocate => "allocate",
            Step::MapStack => "map stack",
            Step::GuardStack => "guard stack",
            Step::PrepareStack => "prepare stack",
            Step::AllocateTls => "allocate TLS",
            Step::Clone => "clone",
            Step::Affinity => "affinity",
            Step::Scheduler => "scheduler",
            Step::Cgroup => "cgroup",
            Step::CoreScheduling => "core scheduling",
            Step::Setup => "setup",
        })
    }
}

/// Which of the two system calls was refused.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CloneCall {
    /// clone3(2).
    Clone3,
    /// clone(2), because clone3 answered ENOSYS or EPERM.
    Clone,
}

impl fmt::Display for CloneCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CloneCall::Clone3 => "clone3",
            CloneCall::Clone => "clone",
        })
    }
}

/// What a refused clone was to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    /// A thread of this process.
    Thread,
    /// A process. `copies`: with a copy of this one's memory.
    #[cfg_attr(
        all(not(feature = "interpose"), not(test)),
        expect(dead_code, reason = "only the program's own calls make one")
    )]
    Process { copies: bool },
}

/// A refusal as the refused step states it; `diagnose` finds out why.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StepError {
    pub(crate) step: Step,
    /// As the kernel or glibc gave it (A5).
    pub(crate) errno: Errno,
    /// Bytes of the mapping or range that the refused call was about; 0 for other calls.
    pub(crate) bytes: usize,
    /// For [`Step::Clone`]: the call that gave the errno.
    pub(crate) call: CloneCall,
    /// For [`Step::Clone`]: the directory of the cgroup (v2) that the thread was to be made in, open while the spawn lasts;
    /// -1 if none was requested. Not an `Option`, which would lengthen every result on the way.
    pub(crate) cgroup: RawFd,
    /// For [`Step::Clone`].
    pub(crate) task: Task,
    /// For [`Step::Clone`]: calls that resemble the refused one may be made. Not where a filter could kill for them.
    pub(crate) probes: bool,
    /// For [`Step::PrepareStack`]: mlock was refused, and not the prefault.
    pub(crate) locks: bool,
    /// For the steps of the new thread: it ended without a report.
    pub(crate) ended: bool,
}

impl StepError {
    pub(crate) const fn new(step: Step, errno: Errno, bytes: usize) -> StepError {
        StepError {
            step,
            errno,
            bytes,
            call: CloneCall::Clone3,
            cgroup: -1,
            task: Task::Thread,
            probes: true,
            locks: false,
            ended: false,
        }
    }
}

/// Where the stack of a refused thread came from.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StackOrigin {
    /// There was none yet.
    None,
    /// A stack of an earlier thread, from the cache.
    Cache,
    /// Mapped for this thread.
    Fresh,
}

/// What became of the stack of a refused thread.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StackFate {
    /// There was none.
    None,
    /// It is in the cache, for the next thread; or, if munmap was refused, for the next attempt at that.
    Cached,
    /// Its memory was given back to the kernel.
    Unmapped,
}

impl StackFate {
    pub(crate) fn of(unmapped: bool) -> StackFate {
        if unmapped {
            StackFate::Unmapped
        } else {
            StackFate::Cached
        }
    }
}

/// The stack's part in a refusal: a refused spawn leaves no mapping behind that was not there
/// before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StackOutcome {
    /// Where it came from.
    pub origin: StackOrigin,
    /// Where it went.
    pub fate: StackFate,
}

impl StackOutcome {
    pub(crate) const NONE: StackOutcome = StackOutcome {
        origin: StackOrigin::None,
        fate: StackFate::None,
    };
}

impl fmt::Display for StackOutcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.origin, self.fate) {
            (StackOrigin::None, _) | (_, StackFate::None) => "no stack yet",
            (StackOrigin::Cache, StackFate::Cached) => "stack from cache, back in cache",
            (StackOrigin::Cache, StackFate::Unmapped) => "stack from cache, unmapped",
            (StackOrigin::Fresh, StackFate::Cached) => "stack freshly mapped, now in cache",
            (StackOrigin::Fresh, StackFate::Unmapped) => "stack freshly mapped, unmapped",
        })
    }
}
