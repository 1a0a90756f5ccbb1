//! [`explain`]: why the kernel refuses a task to code that is not this crate's.

use std::fmt;

use super::cause::{Cause, Causes, Certainty};
use super::diagnose_once;
use super::verdict::Verdict;
use crate::errno::Errno;
use crate::step::{CloneCall, Step, StepError};
use crate::sync::notice_fork;
use crate::sys::NoCancellation;

/// The stack of a thread of std, and the bytes that are asked for here where a mapping may have been refused.
const STACK: usize = 2 << 20;

/// Finds out why a task was refused to other code of this process a moment ago: a thread to `std::thread` or
/// `pthread_create(3)`, a process to fork(2), a helper thread of the kernel to KVM. `errno` is what that code was given.
///
/// The kernel is asked what refuses a clone(2) now, and if nothing does, a mapping of 2 MiB: pthread_create says EAGAIN
/// for both. The refused call cannot be repeated here, so the cause is [`Certainty::Inferred`] at most: it is what
/// refuses now, which need not be what refused then. Allocates nothing, and makes the system calls of an analysis
/// (`docs/seccomp.md` in the repository). Call it at once, and in the thread that was refused: limits and filters can
/// differ between threads.
///
/// ```
/// if let Err(error) = std::thread::Builder::new().spawn(|| ()) {
///     let errno = error.raw_os_error().unwrap_or(0);
///     eprintln!("{error}\n{}", nptl::explain(errno).report());
/// }
/// let explanation = nptl::explain(libc::EAGAIN);
/// assert_ne!(explanation.certainty(), nptl::Certainty::Proven);
/// ```
pub fn explain(errno: i32) -> Explanation {
    notice_fork();
    // Reading files is a cancellation point.
    let _cancellation = NoCancellation::new();
    let errno = Errno::new(errno);
    let clone = |call| StepError {
        call,
        ..StepError::new(Step::Clone, errno, 0)
    };
    let mapping = StepError::new(Step::MapStack, Errno::ENOMEM, STACK);
    // Whether it was clone3 or clone is not known either.
    let mut verdict = diagnose_once(&clone(CloneCall::Clone3));
    if verdict.certainty == Certainty::Unknown && errno == Errno::EPERM {
        verdict = diagnose_once(&clone(CloneCall::Clone));
    }
    if verdict.certainty == Certainty::Unknown && matches!(errno, Errno::EAGAIN | Errno::ENOMEM) {
        let second = diagnose_once(&mapping);
        if second.certainty != Certainty::Unknown {
            verdict = second;
        }
    }
    if verdict.certainty == Certainty::Proven {
        verdict.certainty = Certainty::Inferred;
    }
    Explanation { errno, verdict }
}

/// What [`explain`] found out. One line by [`Display`](fmt::Display), several by [`report`](Self::report).
///
/// ```
/// let explanation = nptl::explain(libc::EAGAIN);
/// assert_eq!(explanation.errno(), libc::EAGAIN);
/// println!("{explanation}: {:?}, or {}", explanation.cause(), explanation.alternatives());
/// ```
#[derive(Clone, Copy)]
pub struct Explanation {
    errno: Errno,
    verdict: Verdict,
}

impl Explanation {
    /// The errno that was to be explained.
    pub fn errno(&self) -> Errno {
        self.errno
    }

    /// What refuses a task now, with the values that show it.
    pub fn cause(&self) -> &Cause {
        &self.verdict.cause
    }

    /// How sure the cause is: [`Certainty::Inferred`] or [`Certainty::Unknown`].
    pub fn certainty(&self) -> Certainty {
        self.verdict.certainty
    }

    /// What else it could be.
    pub fn alternatives(&self) -> Causes {
        self.verdict.alternatives
    }

    /// Whether the obstacle can be gone by itself within milliseconds.
    pub fn is_transient(&self) -> bool {
        self.verdict.transient
    }

    /// Several lines: errno, cause, the evidence and the files it was read from, and what to change.
    pub fn report(&self) -> impl fmt::Display + '_ {
        ExplanationReport(self)
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Verdict {
            cause, certainty, ..
        } = &self.verdict;
        let (errno, kind) = (self.errno, cause.kind());
        write!(
            f,
            "nptl: task refused: errno={errno:?} cause={kind:?} certainty={certainty}: {cause}"
        )
    }
}

/// The same line.
impl fmt::Debug for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

struct ExplanationReport<'a>(&'a Explanation);

impl fmt::Display for ExplanationReport<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Explanation { errno, verdict } = self.0;
        writeln!(f, "a task was refused with {errno:?} ({})", errno.meaning())?;
        write!(f, "{verdict}\n(found out in {:.1?})", verdict.spent)
    }
}
