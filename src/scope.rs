//! Scoped threads, as in std, except that [`Scope::spawn`] returns a refusal.

use crate::builder::Builder;
use crate::error::SpawnError;
use crate::handle::ScopedJoinHandle;
use crate::stack::cache::StackCache;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const SHORTEST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(5);

/// Counts the closures that may still use what the scope borrows.
#[derive(Default)]
pub(crate) struct Latch {
    running: Mutex<usize>,
    empty: Condvar,
    panicked: AtomicBool,
}

impl Latch {
    /// Holds the scope open while the value lives.
    pub(crate) fn enter(latch: &Arc<Latch>) -> Entered {
        *latch.running.lock() += 1;
        Entered(Arc::clone(latch))
    }

    fn leave(&self) {
        let mut running = self.running.lock();
        *running -= 1;
        if *running == 0 {
            self.empty.notify_all();
        }
    }

    /// A thread panicked and nobody took the panic from its handle.
    pub(crate) fn note_panic(&self) {
        self.panicked.store(true, Ordering::Relaxed);
    }

    /// A thread whose handle is gone, and that dies of a bare exit(2) or a filter, says nothing to the
    /// latch: its remains do, once somebody looks. Seldom, because that looks at every stack.
    fn wait(self: &Arc<Latch>) {
        let mut patience = SHORTEST;
        let mut running = self.running.lock();
        while *running > 0 {
            if self.empty.wait_for(&mut running, patience).timed_out() {
                MutexGuard::unlocked(&mut running, || StackCache::bury_dead_of(self));
                patience = (patience * 2).min(LONGEST);
            }
        }
    }
}

/// A closure that may still use what the scope borrows.
pub(crate) struct Entered(Arc<Latch>);

impl Entered {
    pub(crate) fn is_of(&self, latch: &Arc<Latch>) -> bool {
        Arc::ptr_eq(&self.0, latch)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// Spawns threads that may borrow what outlives the scope. Made by [`scope`].
pub struct Scope<'scope, 'env: 'scope> {
    latch: Arc<Latch>,
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

    pub(crate) fn latch(&self) -> &Arc<Latch> {
        &self.latch
    }
}

impl std::fmt::Debug for Scope<'_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scope")
            .field("running", &*self.latch.running.lock())
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
        latch: Arc::default(),
        scope: PhantomData,
        env: PhantomData,
    };
    let result = catch_unwind(AssertUnwindSafe(|| f(&scope)));
    // In every case, before anything else: the threads borrow from our caller.
    scope.latch.wait();
    match result {
        Err(payload) => resume_unwind(payload),
        Ok(_) if scope.latch.panicked.load(Ordering::Relaxed) => {
            panic!("a scoped thread panicked")
        }
        Ok(value) => value,
    }
}
