//! [`SpawnError`]: which step refused, with what errno, and what became of the stack.

use crate::diagnose::{Cause, Causes, Certainty, Explanation, Verdict};
use crate::mem::fallible::{Kept, Reservation, Slot};
use crate::sync::forked_bare;
use nix::errno::Errno;
use std::fmt;
use std::time::Duration;

/// The step of thread creation that was refused, in the order in which they are taken.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Step {
    /// What the caller asked for was checked: sizes, names.
    Attributes,
    /// glibc was looked at: symbols, calibration, self-checks.
    Runtime,
    /// Heap memory for what creator and thread share: the closure and its result, the name, the record
    /// of the stack. Some hundred bytes, so that malloc(3) seldom needs the kernel for it.
    Allocate,
    /// mmap(2) of the stack.
    MapStack,
    /// The guard: `MADV_GUARD_INSTALL`, or mprotect(2) where that is not to be had.
    GuardStack,
    /// mlock(2) or `MADV_POPULATE_WRITE` of the stack.
    PrepareStack,
    /// `_dl_allocate_tls`: thread-local storage of every loaded module.
    AllocateTls,
    /// clone3(2), or clone(2).
    Clone,
    /// sigaltstack(2) in the new thread.
    SignalStack,
    /// sched_setaffinity(2).
    Affinity,
    /// sched_setattr(2).
    Scheduler,
    /// The cgroup of the new thread.
    Cgroup,
}

impl Step {
    /// The words used in messages, such as `clone` or `map the stack`.
    fn words(self) -> &'static str {
        match self {
            Step::Attributes => "attributes",
            Step::Runtime => "runtime",
            Step::Allocate => "allocate",
            Step::MapStack => "map stack",
            Step::GuardStack => "guard stack",
            Step::PrepareStack => "prepare stack",
            Step::AllocateTls => "allocate TLS",
            Step::Clone => "clone",
            Step::SignalStack => "signal stack",
            Step::Affinity => "affinity",
            Step::Scheduler => "scheduler",
            Step::Cgroup => "cgroup",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.words())
    }
}

/// Where the stack of a refused thread came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum StackOrigin {
    /// There was none yet.
    None,
    /// A stack of an earlier thread, from the cache.
    Cache,
    /// Mapped for this thread.
    Fresh,
}

/// What became of the stack of a refused thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
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

/// Everything about one refusal.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refusal {
    pub step: Step,
    pub errno: Errno,
    /// Usable bytes of stack that were asked for.
    pub stack_size: usize,
    /// Bytes of the mapping or range that the refused call was about; 0 for other calls.
    pub bytes: usize,
    pub stack: StackOutcome,
    pub attempts: u32,
    /// Cached stacks that were given back to the kernel before the last attempt.
    pub reclaimed: usize,
    /// It was the calibration thread that was refused.
    pub calibration: bool,
    pub verdict: Verdict,
}

impl Refusal {
    pub(crate) fn report(&self) -> impl fmt::Display + '_ {
        Report(self)
    }
}

/// The line that is grepped for.
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Verdict {
            cause, certainty, ..
        } = &self.verdict;
        write!(
            f,
            "nptl: spawn refused: step={} errno={:?} cause={:?} certainty={certainty}: {cause}; stack_size={}",
            self.step,
            self.errno,
            cause.kind(),
            self.stack_size
        )?;
        if self.bytes != 0 {
            write!(f, " bytes={}", self.bytes)?;
        }
        write!(f, " attempts={}; {}", self.attempts, self.stack)?;
        if self.calibration {
            f.write_str("; it was the calibration thread of the first spawn")?;
        }
        if self.reclaimed > 0 {
            write!(f, "; after {} cached stacks were unmapped", self.reclaimed)?;
        }
        Ok(())
    }
}

/// The lines that are read.
struct Report<'a>(&'a Refusal);

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Refusal {
            step,
            errno,
            attempts,
            stack,
            verdict,
            ..
        } = self.0;
        writeln!(f, "step: {step}, refused with {errno:?} ({})", errno.desc())?;
        writeln!(f, "attempts: {attempts}; {stack}")?;
        let explanation = Explanation {
            cause: &verdict.cause,
            certainty: verdict.certainty,
            alternatives: verdict.alternatives,
            silence: verdict.silence,
            transient: verdict.transient,
        };
        write!(f, "{explanation}")?;
        write!(f, "\n(found out in {:.1?})", verdict.spent)
    }
}

/// A thread could not be created.
///
/// One line by [`Display`](fmt::Display), made to be grepped: step, errno, size, and what became
/// of the stack. Two words wide, so that results stay small; its memory is allocated before the
/// first step is taken, because at the moment of a refusal the machine is out of something.
///
/// A spawn, refused or not, takes at most 16 KiB of the caller's stack with the whole analysis, 64 KiB
/// in a build without optimisation (`tests/stack_use.rs` measures both), and a refusal allocates
/// nothing.
///
/// ```
/// let error = nptl::Builder::new().stack_size(usize::MAX).spawn(|| ()).unwrap_err();
/// assert_eq!(error.step(), nptl::Step::Attributes);
/// assert_eq!(error.errno(), nix::errno::Errno::EINVAL);
/// println!("{error}");
/// ```
pub struct SpawnError(Kept<Refusal>);

/// For errors of a process whose heap has no memory even for them.
static EMERGENCY: [Slot<Refusal>; 8] = [const { Slot::new(Refusal::NO_MEMORY) }; 8];

/// What an error says if there are so many of these that even the static memory is used up; what was
/// found out then is in the ring of the last failures alone.
static LAST_RESORT: Refusal = Refusal::NO_MEMORY;

/// The memory of an error that has not happened yet.
pub(crate) struct Reserve(Reservation<Refusal>);

impl Reserve {
    pub(crate) fn new() -> Reserve {
        // In a child of _Fork(3) malloc's locks can be held for ever.
        Reserve(Reservation::new(&EMERGENCY, !forked_bare()))
    }

    /// Turns the reserve into the error, without allocating.
    pub(crate) fn refuse(self, refusal: Refusal) -> SpawnError {
        SpawnError(self.0.fill(refusal, &LAST_RESORT))
    }
}

impl Clone for SpawnError {
    fn clone(&self) -> SpawnError {
        Reserve::new().refuse(*self.0)
    }
}

impl Refusal {
    const NO_MEMORY: Refusal = Refusal {
        step: Step::Allocate,
        errno: Errno::ENOMEM,
        stack_size: 0,
        bytes: 0,
        stack: StackOutcome::NONE,
        attempts: 1,
        reclaimed: 0,
        calibration: false,
        verdict: Verdict::NONE,
    };
}

impl SpawnError {
    /// The step that was refused.
    pub fn step(&self) -> Step {
        self.0.step
    }

    /// The errno as the kernel or glibc gave it at that step.
    pub fn errno(&self) -> Errno {
        self.0.errno
    }

    /// What `pthread_create` would have returned: it folds ENOMEM into EAGAIN
    /// (pthread_create(3); `__pthread_create_2_1` and `allocate_stack` in nptl).
    pub fn pthread_errno(&self) -> Errno {
        match self.0.errno {
            Errno::ENOMEM => Errno::EAGAIN,
            other => other,
        }
    }

    /// Where the stack came from and where it went.
    pub fn stack(&self) -> StackOutcome {
        self.0.stack
    }

    /// How often the refused step was tried, repetitions by the analysis included.
    pub fn attempts(&self) -> u32 {
        self.0.attempts
    }

    /// Which check of the kernel, or of this crate, refused, with the values that show it.
    pub fn cause(&self) -> &Cause {
        &self.0.verdict.cause
    }

    /// How sure the cause is.
    pub fn certainty(&self) -> Certainty {
        self.0.verdict.certainty
    }

    /// What else it could be, where the cause is inferred.
    pub fn alternatives(&self) -> Causes {
        self.0.verdict.alternatives
    }

    /// Whether the obstacle can be gone by itself within milliseconds.
    pub fn is_transient(&self) -> bool {
        self.0.verdict.transient
    }

    /// Time spent on finding the cause out.
    pub fn time_spent(&self) -> Duration {
        self.0.verdict.spent
    }

    /// Several lines for whoever must act: step, errno, cause, the evidence and the files it was
    /// read from, and what to change.
    ///
    /// ```
    /// let error = nptl::Builder::new().stack_size(1 << 50).spawn(|| ()).unwrap_err();
    /// println!("{}", error.report());
    /// ```
    pub fn report(&self) -> impl fmt::Display + '_ {
        self.0.report()
    }
}

impl fmt::Display for SpawnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&*self.0, f)
    }
}

/// The same line: it is what `unwrap` and a failing `main` print.
impl fmt::Debug for SpawnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for SpawnError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.0.errno)
    }
}

/// The whole error, as the inner value: `get_ref` gives the [`SpawnError`], `source` its errno, and
/// the kind is that of `pthread_errno`. std's `io::Error` holds either an errno or an error value,
/// never both, so `raw_os_error` is `None` here: the alternative would lose the cause.
///
/// ```
/// let refused = nptl::Builder::new().stack_size(usize::MAX).spawn(|| ()).unwrap_err();
/// let error = std::io::Error::from(refused);
/// assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
/// let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<nptl::SpawnError>());
/// assert_eq!(inner.unwrap().step(), nptl::Step::Attributes);
/// ```
impl From<SpawnError> for std::io::Error {
    fn from(error: SpawnError) -> std::io::Error {
        std::io::Error::new(
            std::io::Error::from_raw_os_error(error.pthread_errno() as i32).kind(),
            error,
        )
    }
}
