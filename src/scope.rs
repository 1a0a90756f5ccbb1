//! Scoped threads, as in std, except that [`Scope::spawn`] returns a refusal.

use crate::mem::Shared;
use crate::stack::cache::StackCache;
use crate::sync::{Entrance, Latch};
use parking_lot::Mutex;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Spawns threads that may borrow what outlives the scope. Made by [`scope`].
pub struct Scope<'scope, 'env: 'scope> {
    /// `None` where there was no memory for it: then no thread is made here.
    latch: Option<Shared<Latch>>,
    /// Those that its threads wait at.
    gates: Mutex<Vec<Shared<Entrance>>>,
    // Invariant in both, as std's: a scope must not shrink to a shorter 'scope or another 'env.
    scope: PhantomData<&'scope mut &'scope ()>,
    env: PhantomData<&'env mut &'env ()>,
}

impl Scope<'_, '_> {
    pub(crate) fn latch(&self) -> Option<&Shared<Latch>> {
        self.latch.as_ref()
    }

    /// A thread is to wait at this gate. Returns `false` if there was no memory to remember it.
    pub(crate) fn note_gate(&self, gate: &Shared<Entrance>) -> bool {
        let mut gates = self.gates.lock();
        let known = gates.iter().any(|known| known.is(gate));
        let room = known || gates.try_reserve(1).is_ok();
        if room && !known {
            gates.push(gate.clone());
        }
        room
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
/// Like `std::thread::scope`: with `f`'s own panic, or if a thread panicked and was not joined.
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
        gates: Mutex::new(Vec::new()),
        scope: PhantomData,
        env: PhantomData,
    };
    let result = catch_unwind(AssertUnwindSafe(|| f(&scope)));
    if result.is_err() {
        // A gate outside of the scope would be dropped only behind the wait for the threads that wait at it.
        for gate in &*scope.gates.lock() {
            gate.decide(false);
        }
    }
    // In every case, before anything else: the threads borrow from our caller.
    let panicked = scope.latch.as_ref().is_some_and(|latch| {
        latch.wait(|| StackCache::reap_dead_of(latch));
        latch.has_panicked()
    });
    match result {
        Err(payload) => resume_unwind(payload),
        Ok(_) if panicked => {
            panic!("a scoped thread panicked")
        }
        Ok(value) => value,
    }
}
