//! [`SpawnError`]: which step refused, with what errno, and what became of the stack.

use crate::diagnose::{Cause, Causes, Certainty, UnsupportedRuntime, Verdict};
use crate::errno::Errno;
use crate::mem::Spare;
use crate::step::StepError;
pub use crate::step::{StackFate, StackOrigin, StackOutcome, Step};
use std::any::Any;
use std::fmt;
use std::mem::MaybeUninit;
use std::time::Duration;

/// The call that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RefusedCall {
    /// One that made the steps of this crate.
    Own(&'static str),
    /// One of the C library's, which says an errno and no more.
    #[cfg(feature = "interpose")]
    Libc(&'static str),
}

/// Everything about one refusal: what the error holds, and the core file shows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Refusal {
    pub(crate) call: RefusedCall,
    pub(crate) error: StepError,
    pub(crate) verdict: Verdict,
    /// Usable bytes of stack that were requested.
    pub(crate) stack_size: usize,
    pub(crate) stack: StackOutcome,
    pub(crate) attempts: u32,
    /// Cached stacks that were given back to the kernel before the last attempt.
    pub(crate) reclaimed: usize,
    /// It was the calibration thread that was refused.
    pub(crate) calibration: bool,
}

impl Refusal {
    pub(crate) const fn new(error: StepError, verdict: Verdict) -> Refusal {
        Refusal {
            call: RefusedCall::Own("spawn"),
            error,
            verdict,
            stack_size: 0,
            stack: StackOutcome::NONE,
            attempts: 1,
            reclaimed: 0,
            calibration: false,
        }
    }

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
        let (errno, kind, size) = (self.error.errno, cause.kind(), self.stack_size);
        let step = self.error.step;
        match self.call {
            RefusedCall::Own(call) => write!(
                f,
                "nptl: {call} refused: step={step} errno={errno:?} cause={kind:?} certainty={certainty}: {cause}; stack_size={size}",
            )?,
            #[cfg(feature = "interpose")]
            RefusedCall::Libc(call) => {
                write!(
                    f,
                    "nptl: {call} refused: errno={errno:?} cause={kind:?} certainty={certainty}: {cause};"
                )?;
                return match size {
                    0 => Ok(()),
                    size => write!(f, " stack_size={size}"),
                };
            }
        }
        if self.error.bytes != 0 {
            write!(f, " bytes={}", self.error.bytes)?;
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
            call,
            error,
            verdict,
            attempts,
            stack,
            ..
        } = self.0;
        let (step, errno) = (error.step, error.errno);
        let meaning = errno.meaning();
        match call {
            RefusedCall::Own(_) => {
                writeln!(f, "step: {step}, refused with {errno:?} ({meaning})")?;
                writeln!(f, "attempts: {attempts}; {stack}")?;
            }
            #[cfg(feature = "interpose")]
            RefusedCall::Libc(call) => writeln!(
                f,
                "call: {call} of the C library, refused with {errno:?} ({meaning})"
            )?,
        }
        write!(f, "{verdict}")?;
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
/// in a build without optimisation (`tests/refusal/stack_use.rs` measures both), and a refusal allocates
/// nothing.
///
/// ```
/// let error = nptl::Builder::new().stack_size(usize::MAX).spawn(|| ()).unwrap_err();
/// assert_eq!(error.step(), nptl::Step::Attributes);
/// assert_eq!(error.errno(), libc::EINVAL);
/// println!("{error}");
/// ```
pub struct SpawnError(Result<Box<Refusal>, &'static Refusal>);

/// What an error says where the heap had no memory for more. What was found out is in the ring of the last
/// failures alone.
static NO_MEMORY: Refusal = Refusal::new(
    StepError::new(Step::Allocate, Errno::ENOMEM, size_of::<Refusal>()),
    Verdict::UNKNOWN,
);

/// Why no thread is made in a child of `_Fork(3)`.
pub(crate) const FORKED_BARE: &str =
    "this process was forked by _Fork(3) or a bare clone, where glibc can start no thread";

static NO_THREADS: Refusal = Refusal::new(
    StepError::new(Step::Runtime, Errno::ENOSYS, 0),
    Verdict {
        cause: Cause::UnsupportedRuntime(UnsupportedRuntime { what: FORKED_BARE }),
        certainty: Certainty::Proven,
        ..Verdict::UNKNOWN
    },
);

/// The memory of an error that has not happened yet, if the heap had any.
pub(crate) struct Reserve(Option<Box<MaybeUninit<Refusal>>>);

/// A spawn that was not refused leaves its reserve to the next: it is larger than what malloc's thread cache keeps.
static UNUSED: Spare<Refusal> = Spare::new();

impl Reserve {
    pub(crate) fn new() -> Reserve {
        Reserve(UNUSED.take())
    }

    pub(crate) fn is_missing(&self) -> bool {
        self.0.is_none()
    }

    /// Turns the reserve into the error, without allocating.
    pub(crate) fn refuse(mut self, refusal: Refusal) -> SpawnError {
        let place = self.0.take().ok_or(&NO_MEMORY);
        SpawnError(place.map(|place| Box::write(place, refusal)))
    }
}

impl Drop for Reserve {
    fn drop(&mut self) {
        if let Some(place) = self.0.take() {
            UNUSED.put(place);
        }
    }
}

impl Clone for SpawnError {
    fn clone(&self) -> SpawnError {
        match &self.0 {
            Ok(refusal) => Reserve::new().refuse(**refusal),
            Err(refusal) => SpawnError(Err(refusal)),
        }
    }
}

impl SpawnError {
    /// In a child of `_Fork(3)`, where malloc's locks can be held for ever: no heap is used for it.
    pub(crate) const FORKED_BARE: SpawnError = SpawnError(Err(&NO_THREADS));

    pub(crate) fn refusal(&self) -> &Refusal {
        match &self.0 {
            Ok(refusal) => refusal,
            Err(refusal) => refusal,
        }
    }

    /// The step that was refused.
    ///
    /// ```
    /// let refused = nptl::Builder::new().stack_size(1 << 60).spawn(|| ()).unwrap_err();
    /// assert_eq!(refused.step(), nptl::Step::MapStack);
    /// ```
    pub fn step(&self) -> Step {
        self.refusal().error.step
    }

    /// The errno as the kernel or glibc gave it at that step.
    ///
    /// ```
    /// let refused = nptl::Builder::new().stack_size(1 << 60).spawn(|| ()).unwrap_err();
    /// assert_eq!(refused.errno(), libc::ENOMEM);
    /// ```
    pub fn errno(&self) -> Errno {
        self.refusal().error.errno
    }

    /// What `pthread_create` would have returned: it folds ENOMEM into EAGAIN
    /// (pthread_create(3); `__pthread_create_2_1` and `allocate_stack` in nptl).
    ///
    /// ```
    /// let refused = nptl::Builder::new().stack_size(1 << 60).spawn(|| ()).unwrap_err();
    /// assert_eq!(refused.pthread_errno(), libc::EAGAIN);
    /// ```
    pub fn pthread_errno(&self) -> Errno {
        match self.refusal().error.errno {
            Errno::ENOMEM => Errno::EAGAIN,
            other => other,
        }
    }

    /// Where the stack came from and where it went.
    ///
    /// ```
    /// let refused = nptl::Builder::new().stack_size(1 << 60).spawn(|| ()).unwrap_err();
    /// assert_eq!(refused.stack().origin, nptl::StackOrigin::None);
    /// ```
    pub fn stack(&self) -> StackOutcome {
        self.refusal().stack
    }

    /// How often the refused step was tried, repetitions by the analysis included.
    ///
    /// ```
    /// let refused = nptl::Builder::new().stack_size(1 << 60).spawn(|| ()).unwrap_err();
    /// assert!(refused.attempts() >= 1);
    /// ```
    pub fn attempts(&self) -> u32 {
        self.refusal().attempts
    }

    /// Which check of the kernel, or of this crate, refused, with the values that show it.
    ///
    /// ```
    /// let refused = nptl::Builder::new().stack_size(1 << 60).spawn(|| ()).unwrap_err();
    /// println!("{:?}: {}", refused.cause().kind(), refused.cause());
    /// ```
    pub fn cause(&self) -> &Cause {
        &self.refusal().verdict.cause
    }

    /// How sure the cause is.
    ///
    /// ```
    /// let refused = nptl::Builder::new().stack_size(1 << 60).spawn(|| ()).unwrap_err();
    /// println!("{}", refused.certainty());
    /// ```
    pub fn certainty(&self) -> Certainty {
        self.refusal().verdict.certainty
    }

    /// What else it could be, where the cause is inferred.
    ///
    /// ```
    /// let refused = nptl::Builder::new().stack_size(1 << 60).spawn(|| ()).unwrap_err();
    /// for cause in refused.alternatives() {
    ///     println!("or {cause:?}");
    /// }
    /// ```
    pub fn alternatives(&self) -> Causes {
        self.refusal().verdict.alternatives
    }

    /// Whether the obstacle can be gone by itself within milliseconds.
    ///
    /// ```
    /// let refused = nptl::Builder::new().stack_size(1 << 60).spawn(|| ()).unwrap_err();
    /// assert!(!refused.is_transient());
    /// ```
    pub fn is_transient(&self) -> bool {
        self.refusal().verdict.transient
    }

    /// Time spent on finding the cause out.
    ///
    /// ```
    /// let refused = nptl::Builder::new().stack_size(1 << 60).spawn(|| ()).unwrap_err();
    /// println!("{:?}", refused.time_spent());
    /// ```
    pub fn time_spent(&self) -> Duration {
        self.refusal().verdict.spent
    }

    /// Several lines for the engineer who must act: step, errno, cause, the evidence and the files it was
    /// read from, and what to change.
    ///
    /// ```
    /// let error = nptl::Builder::new().stack_size(1 << 50).spawn(|| ()).unwrap_err();
    /// println!("{}", error.report());
    /// ```
    pub fn report(&self) -> impl fmt::Display + '_ {
        self.refusal().report()
    }
}

impl fmt::Display for SpawnError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self.refusal(), f)
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
        Some(&self.refusal().error.errno)
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
            std::io::Error::from_raw_os_error(error.pthread_errno().raw()).kind(),
            error,
        )
    }
}

/// A thread could not be created, and what was to be given to it comes back. Made by
/// [`Builder::spawn_or_return`](crate::Builder::spawn_or_return).
///
/// Prints as its [`SpawnError`], and becomes one where the value is not wanted (`?` does that).
///
/// ```
/// fn boot(vcpu: Vec<u8>) -> Result<(), nptl::SpawnError> {
///     let small = nptl::Builder::new().stack_size(64 * 1024);
///     let thread = match small.clone().spawn_or_return(move || vcpu.len()) {
///         Ok(thread) => thread,
///         Err(refused) if refused.error().is_transient() => small.spawn_or_return(refused.into_inner())?,
///         Err(refused) => return Err(refused.into()),
///     };
///     thread.join().unwrap();
///     Ok(())
/// }
/// # boot(vec![1, 2, 3]).unwrap();
/// ```
pub struct Refused<W> {
    error: SpawnError,
    work: W,
}

impl<W> Refused<W> {
    pub(crate) fn new(error: SpawnError, work: W) -> Refused<W> {
        Refused { error, work }
    }

    /// Why no thread was created.
    ///
    /// ```
    /// let spawned = nptl::Builder::new().stack_size(1 << 60).spawn_with(vec![7], |vcpu| vcpu.len());
    /// let refused = spawned.err().expect("a stack of 2^60 bytes");
    /// println!("{}", refused.error());
    /// ```
    pub fn error(&self) -> &SpawnError {
        &self.error
    }

    /// What was to be given to the thread.
    ///
    /// ```
    /// let spawned = nptl::Builder::new().stack_size(1 << 60).spawn_with(vec![7], |vcpu| vcpu.len());
    /// let refused = spawned.err().expect("a stack of 2^60 bytes");
    /// let vcpu = refused.into_inner();
    /// assert_eq!(vcpu, [7]);
    /// ```
    pub fn into_inner(self) -> W {
        self.work
    }

    /// Both.
    ///
    /// ```
    /// let spawned = nptl::Builder::new().stack_size(1 << 60).spawn_with(vec![7], |vcpu| vcpu.len());
    /// let refused = spawned.err().expect("a stack of 2^60 bytes");
    /// let (error, vcpu) = refused.into_parts();
    /// assert_eq!(vcpu, [7]);
    /// ```
    pub fn into_parts(self) -> (SpawnError, W) {
        (self.error, self.work)
    }
}

impl<W> fmt::Display for Refused<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

/// The same line, whatever the value is: closures have no `Debug`.
impl<W> fmt::Debug for Refused<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

/// Its source is that of the [`SpawnError`], whose line it prints.
impl<W> std::error::Error for Refused<W> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl<W> From<Refused<W>> for SpawnError {
    fn from(refused: Refused<W>) -> SpawnError {
        refused.error
    }
}

impl<W> From<Refused<W>> for std::io::Error {
    fn from(refused: Refused<W>) -> std::io::Error {
        refused.error.into()
    }
}

/// What came of a thread with a setup ([`Builder::spawn_with_setup`](crate::Builder::spawn_with_setup)), if it does not
/// run.
#[derive(thiserror::Error)]
pub enum SetupError<E> {
    /// No thread was made, or a setting was refused, or the setup ended its thread ([`Step::Setup`]).
    #[error(transparent)]
    Refused(#[from] SpawnError),
    /// The setup returned this.
    #[error("the setup of the thread failed: {0}")]
    Failed(#[source] E),
    /// The setup panicked; as from `join`.
    #[error("the setup of the thread panicked{}", message(&**.0))]
    Panicked(Box<dyn Any + Send>),
}

/// The message of a panic, behind a colon, if it is text.
fn message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.map_or_else(String::new, |text| format!(": {text}"))
}

impl<E: fmt::Debug> fmt::Debug for SetupError<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SetupError::Refused(error) => error.fmt(f),
            SetupError::Failed(error) => f.debug_tuple("Failed").field(error).finish(),
            SetupError::Panicked(_) => f.debug_tuple("Panicked").finish_non_exhaustive(),
        }
    }
}
