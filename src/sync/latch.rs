//! [`Latch`]: how a scope waits for its threads.

use crate::sys;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

const SHORTEST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(5);

/// The scope sleeps until its last thread wakes it.
const WAITED: u32 = 1 << 31;

/// Counts the closures that may still use what the scope borrows.
///
/// One futex word, not a mutex with a condition variable: an ending thread that finds parking_lot's taken yields
/// its processor and allocates, and neither call is in the list that a filter is written from.
#[derive(Default)]
pub(crate) struct Latch {
    /// Their number, and [`WAITED`].
    running: AtomicU32,
    panicked: AtomicBool,
}

impl Latch {
    /// One more closure is inside, until it leaves.
    pub(crate) fn enter(&self) {
        self.running.fetch_add(1, Ordering::Relaxed);
    }

    /// What the closure did to its scope's data happened before the scope's end.
    pub(crate) fn leave(&self) {
        if self.running.fetch_sub(1, Ordering::Release) == WAITED | 1 {
            sys::futex_wake(&self.running);
        }
    }

    pub(crate) fn count(&self) -> u32 {
        self.running.load(Ordering::Acquire) & !WAITED
    }

    /// A thread panicked, and its handle did not return the panic.
    pub(crate) fn note_panic(&self) {
        self.panicked.store(true, Ordering::Relaxed);
    }

    pub(crate) fn has_panicked(&self) -> bool {
        self.panicked.load(Ordering::Relaxed)
    }

    /// Waits until no closure is inside.
    ///
    /// A thread whose handle is gone, and that dies of a bare exit(2) or a filter, does not leave the latch: `reap`
    /// looks for those. Seldom, because that looks at every stack.
    pub(crate) fn wait(&self, mut reap: impl FnMut()) {
        if self.count() == 0 {
            return;
        }
        self.running.fetch_or(WAITED, Ordering::Relaxed);
        let mut patience = SHORTEST;
        let mut look = Instant::now() + patience;
        loop {
            let count = self.count();
            if count == 0 {
                return;
            }
            // By the clock: signals that come more often than our patience ends must not put it off for ever.
            let left = look.saturating_duration_since(Instant::now());
            if left.is_zero() {
                reap();
                patience = (patience * 2).min(LONGEST);
                look = Instant::now() + patience;
                continue;
            }
            // Only the last one wakes: the others leave us asleep on a word that has changed meanwhile.
            sys::futex_wait(&self.running, WAITED | count, Some(left));
        }
    }
}
