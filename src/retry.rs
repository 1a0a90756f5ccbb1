//! [`RetryPolicy`]: which refusals are tried again, and for how long.

use std::time::{Duration, Instant};

/// Long enough for the kernel to reap threads that have just ended and for an execve of a sibling to
/// succeed or fail (9 ms at most in measurements), short enough for a caller not to notice.
const TRANSIENT: Duration = Duration::from_millis(20);

/// Between two attempts: the kernel's own work behind a transient refusal takes some 10 to 100 µs.
const PAUSE: Duration = Duration::from_micros(200);

/// Which refusals a spawn tries again before it reports them.
///
/// The default retries what can be transient, for at most 20 ms: threads that have ended but that
/// the kernel has not yet reaped, a sibling thread inside execve(2), the moment between a thread's
/// end and the release of its pid number. [`SpawnError::attempts`](crate::SpawnError::attempts)
/// counts the refused calls.
///
/// ```
/// use nptl::{Builder, RetryPolicy};
/// use std::time::Duration;
/// let patient = Builder::new().retry(RetryPolicy::within(Duration::from_millis(500)));
/// patient.spawn(|| ())?.join().unwrap();
/// # Ok::<(), nptl::SpawnError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RetryPolicy {
    within: Duration,
    everything: bool,
}

impl Default for RetryPolicy {
    fn default() -> RetryPolicy {
        RetryPolicy {
            within: TRANSIENT,
            everything: false,
        }
    }
}

impl RetryPolicy {
    /// Every step is tried once. The analysis then makes no call that could create a task, and a
    /// cause that needs a second refusal for its proof is inferred only.
    ///
    /// ```
    /// use nptl::{Builder, RetryPolicy};
    /// let impossible = Builder::new().retry(RetryPolicy::never()).stack_size(1 << 60);
    /// assert_eq!(impossible.spawn(|| ()).unwrap_err().attempts(), 1);
    /// ```
    pub fn never() -> RetryPolicy {
        RetryPolicy {
            within: Duration::ZERO,
            everything: false,
        }
    }

    /// Every refusal is tried again until `limit` has passed, except what no waiting can change: an
    /// invalid attribute, an unsupported C library.
    ///
    /// ```
    /// use nptl::{Builder, RetryPolicy};
    /// let second = std::time::Duration::from_secs(1);
    /// Builder::new().retry(RetryPolicy::within(second)).spawn(|| ())?.join().unwrap();
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn within(limit: Duration) -> RetryPolicy {
        RetryPolicy {
            within: limit,
            everything: true,
        }
    }

    /// Whether the refused call itself may be repeated at all.
    pub(crate) fn repeats(self) -> bool {
        self.within > Duration::ZERO
    }

    /// Whether a refusal is to be tried again; then this has waited a little.
    pub(crate) fn again(self, started: Instant, transient: bool, hopeless: bool) -> bool {
        let wanted = (transient || self.everything) && !hopeless;
        if !wanted || started.elapsed() >= self.within {
            return false;
        }
        std::thread::sleep(PAUSE);
        true
    }
}
