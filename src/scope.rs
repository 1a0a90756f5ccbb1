//! Scoped threads, as in std, except that [`Scope::spawn`] returns a refusal.

use crate::builder::Builder;
use crate::clone::sys;
use crate::error::SpawnError;
use crate::handle::ScopedJoinHandle;
use crate::stack::cache::StackCache;
use crate::stack::fallible::{self, Shared};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
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
    /// Holds the scope open while the value lives.
    pub(crate) fn enter(latch: &Shared<Latch>) -> Entered {
        latch.running.fetch_add(1, Ordering::Relaxed);
        Entered(Some(latch.clone()))
    }

    fn leave_scope(&self) {
        // Release: what the closure did to its scope's data happened before the scope's end.
        if self.running.fetch_sub(1, Ordering::Release) == WAITED | 1 {
            sys::futex_wake(&self.running);
        }
    }

    fn count(&self) -> u32 {
        self.running.load(Ordering::Acquire) & !WAITED
    }

    /// A thread panicked and nobody took the panic from its handle.
    pub(crate) fn note_panic(&self) {
        self.panicked.store(true, Ordering::Relaxed);
    }

    /// A thread whose handle is gone, and that dies of a bare exit(2) or a filter, says nothing to the
    /// latch: its remains do, once somebody looks. Seldom, because that looks at every stack.
    fn wait(latch: &Shared<Latch>) {
        if latch.count() == 0 {
            return;
        }
        latch.running.fetch_or(WAITED, Ordering::Relaxed);
        let mut patience = SHORTEST;
        let mut look = Instant::now() + patience;
        loop {
            let count = latch.count();
            if count == 0 {
                return;
            }
            // By the clock: signals that come more often than our patience ends must not put it off for ever.
            let left = look.saturating_duration_since(Instant::now());
            if left.is_zero() {
                StackCache::bury_dead_of(latch);
                patience = (patience * 2).min(LONGEST);
                look = Instant::now() + patience;
                continue;
            }
            // Only the last one wakes: the others leave us asleep on a word that has changed meanwhile.
            sys::futex_wait(&latch.running, WAITED | count, Some(left));
        }
    }
}

/// A closure that may still use what the scope borrows.
pub(crate) struct Entered(Option<Shared<Latch>>);

impl Entered {
    pub(crate) fn is_of(&self, latch: &Shared<Latch>) -> bool {
        self.0.as_ref().is_some_and(|entered| entered.is(latch))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        if let Some(latch) = self.0.take() {
            latch.leave_scope();
            // The scope may go on, and be gone, from here on.
            latch.leave_whole();
        }
    }
}

/// Spawns threads that may borrow what outlives the scope. Made by [`scope`].
pub struct Scope<'scope, 'env: 'scope> {
    /// `None` where there was no memory for it: then no thread is made here.
    latch: Option<Shared<Latch>>,
    // Invariant in both, as std's: a scope must not shrink to a shorter 'scope or another 'env.
    scope: PhantomData<&'scope mut &'scope ()>,
    env: PhantomData<&'env mut &'env ()>,
}

impl<'scope> Scope<'scope, '_> {
    /// Spawns a thread with the default attributes: see [`Builder::spawn_scoped`].
    ///
    /// # Errors
    /// As [`crate::spawn`]; std panics here.
    pub fn spawn<F, T>(&'scope self, f: F) -> Result<ScopedJoinHandle<'scope, T>, SpawnError>
    where
        F: FnOnce() -> T + Send + 'scope,
        T: Send + 'scope,
    {
        Builder::new().spawn_scoped(self, f)
    }

    pub(crate) fn latch(&self) -> Option<&Shared<Latch>> {
        self.latch.as_ref()
    }
}

impl std::fmt::Debug for Scope<'_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scope")
            .field(
                "running",
                &self.latch.as_ref().map_or(0, |latch| latch.count()),
            )
            .finish_non_exhaustive()
    }
}

/// Runs `f` with a [`Scope`] whose threads are all joined before this returns, also when `f` panics. A thread
/// that dies without returning (a bare exit(2), a seccomp filter) does not hold it up for ever, as it does in
/// std, but for up to 5 seconds if its handle is gone.
///
/// # Panics
/// As `std::thread::scope`: with `f`'s own panic, or if a thread panicked and was not joined.
///
/// ```
/// let words = ["one", "two"];
/// let lengths = nptl::scope(|s| {
///     let handles = words.map(|word| s.spawn(|| word.len()).unwrap());
///     handles.map(|handle| handle.join().unwrap())
/// });
/// assert_eq!(lengths, [3, 3]);
/// ```
pub fn scope<'env, F, T>(f: F) -> T
where
    F: for<'scope> FnOnce(&'scope Scope<'scope, 'env>) -> T,
{
    let scope = Scope {
        latch: Shared::try_new(Latch::default()).ok(),
        scope: PhantomData,
        env: PhantomData,
    };
    let result = catch_unwind(AssertUnwindSafe(|| f(&scope)));
    // In every case, before anything else: the threads borrow from our caller.
    let panicked = scope.latch.as_ref().is_some_and(|latch| {
        Latch::wait(latch);
        latch.panicked.load(Ordering::Relaxed)
    });
    fallible::free_left();
    match result {
        Err(payload) => resume_unwind(payload),
        Ok(_) if panicked => {
            panic!("a scoped thread panicked")
        }
        Ok(value) => value,
    }
}
