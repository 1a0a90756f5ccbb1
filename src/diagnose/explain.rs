//! [`Explanation`]: why the kernel refuses a task to code that is not this crate's.

use std::fmt;

use super::cause::{Cause, Causes, Certainty};
use super::verdict::Verdict;
use crate::errno::Errno;

/// What [`explain`](super::explain()) found out. One line by [`Display`](fmt::Display), several by [`report`](Self::report).
///
/// ```
/// let explanation = nptl::explain(libc::EAGAIN);
/// assert_eq!(explanation.errno(), libc::EAGAIN);
/// println!("{explanation}: {:?}, or {}", explanation.cause(), explanation.alternatives());
/// ```
#[derive(Clone, Copy)]
pub struct Explanation {
    pub(super) errno: Errno,
    pub(super) verdict: Verdict,
}

impl Explanation {
    /// The errno that was to be explained.
    ///
    /// ```
    /// assert_eq!(nptl::explain(libc::EAGAIN).errno(), libc::EAGAIN);
    /// ```
    pub fn errno(&self) -> Errno {
        self.errno
    }

    /// What refuses a task now, with the values that show it.
    ///
    /// ```
    /// println!("{}", nptl::explain(libc::EAGAIN).cause());
    /// ```
    pub fn cause(&self) -> &Cause {
        &self.verdict.cause
    }

    /// How sure the cause is: [`Certainty::Inferred`] or [`Certainty::Unknown`].
    ///
    /// ```
    /// assert_ne!(nptl::explain(libc::EAGAIN).certainty(), nptl::Certainty::Proven);
    /// ```
    pub fn certainty(&self) -> Certainty {
        self.verdict.certainty
    }

    /// What else it could be.
    ///
    /// ```
    /// for cause in nptl::explain(libc::EAGAIN).alternatives() {
    ///     println!("or {cause}");
    /// }
    /// ```
    pub fn alternatives(&self) -> Causes {
        self.verdict.alternatives
    }

    /// Whether the obstacle can be gone by itself within milliseconds.
    ///
    /// ```
    /// if nptl::explain(libc::EAGAIN).is_transient() {
    ///     println!("try again in some milliseconds");
    /// }
    /// ```
    pub fn is_transient(&self) -> bool {
        self.verdict.transient
    }

    /// Several lines: errno, cause, the evidence and the files it was read from, and what to change.
    ///
    /// ```
    /// println!("{}", nptl::explain(libc::EAGAIN).report());
    /// ```
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
