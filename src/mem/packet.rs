//! [`Packet`]: the closure on its way in, the result on its way out.

use super::body::{Body, Deliver};
use super::shared::Shared;
use crate::sync::Latch;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::Result as Outcome;

/// What creator and thread share. One allocation a thread. A refused spawn finds the closure still inside.
///
/// `state` says what is inside, so that neither side waits for the other: a forked child can have a copy of a packet
/// whose thread was just storing a result.
///
/// ```text
///  WORK ──► EMPTY    by the thread; of a refused thread the creator takes the closure and leaves the word
///  EMPTY ──► RESULT  by the thread
///  RESULT ──► EMPTY  by the handle
///  WORK ──► CANCELLED  by the thread, whose gate was cancelled; the closure stays inside
/// ```
pub(crate) struct Packet<F, T> {
    state: AtomicU8,
    work: UnsafeCell<Option<F>>,
    result: UnsafeCell<Option<Outcome<T>>>,
    scope: Option<Shared<Latch>>,
}

const EMPTY: u8 = 0;
const WORK: u8 = 1;
const RESULT: u8 = 2;
const CANCELLED: u8 = 3;

/// The payload of [`join`](crate::JoinHandle::join) of a thread that did not run its closure, because its
/// [`StartGate`](crate::StartGate) was cancelled.
///
/// ```
/// let gate = nptl::StartGate::new();
/// let handle = nptl::Builder::new().start_gate(&gate).spawn(|| unreachable!())?;
/// gate.cancel();
/// let payload: Box<dyn std::any::Any + Send> = handle.join().map(|()| ()).unwrap_err();
/// assert!(payload.is::<nptl::Cancelled>());
/// # Ok::<(), nptl::SpawnError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("the start gate of the thread was cancelled")]
pub struct Cancelled;

// SAFETY: a cell is touched only by the one that has changed `state` away from it (`work` from WORK, `result` from
// RESULT), or by the one that is about to announce it (`result` before RESULT). So a value moves from thread to thread
// and is never shared.
unsafe impl<F: Send, T: Send> Sync for Packet<F, T> {}

impl<F, T> Packet<F, T> {
    pub(crate) fn new(work: F, scope: Option<Shared<Latch>>) -> Packet<F, T> {
        Packet {
            state: AtomicU8::new(WORK),
            work: UnsafeCell::new(Some(work)),
            result: UnsafeCell::new(None),
            scope,
        }
    }

    /// Whether this caller is the one that takes what `state` announces.
    fn claim(&self, state: u8) -> bool {
        self.state
            .compare_exchange(state, EMPTY, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    fn take_work(&self) -> Option<F> {
        if !self.claim(WORK) {
            return None;
        }
        // SAFETY: claimed.
        unsafe { (*self.work.get()).take() }
    }

    /// The closure of a refused thread.
    ///
    /// # Safety
    /// Called once, where no thread was made with the packet, or the one that was has ended without calling its body.
    pub(crate) unsafe fn reclaim(&self) -> F {
        // SAFETY: nothing has taken the closure, and no other thread can reach it, by the caller's promise.
        unsafe { (*self.work.get()).take().unwrap_unchecked() }
    }

    /// The closure will not run, and stays inside.
    pub(super) fn mark_cancelled(&self) {
        let _ = self
            .state
            .compare_exchange(WORK, CANCELLED, Ordering::Release, Ordering::Relaxed);
    }

    /// Runs the closure, if it is still there, and keeps its result or its panic.
    #[inline]
    pub(super) fn run_with(&self, run: impl FnOnce(F) -> T) {
        if let Some(work) = self.take_work() {
            // As in std: the caller of join learns that it panicked before it looks at the data.
            let outcome = catch_unwind(AssertUnwindSafe(|| run(work)));
            // SAFETY: the work was inside until now, so no result was announced before.
            unsafe { *self.result.get() = Some(outcome) };
            self.state.store(RESULT, Ordering::Release);
        }
    }
}

impl<F, T> Body for Packet<F, T>
where
    F: FnOnce() -> T + Send,
    T: Send,
{
    fn run(&self) {
        self.run_with(|work| work());
    }

    fn cancel(&self) {
        self.mark_cancelled();
    }
}

/// A closure, and the value that it is called with.
pub(crate) struct With<A, F>(pub A, pub F);

impl<A, F, T> Body for Packet<With<A, F>, T>
where
    A: Send,
    F: FnOnce(A) -> T + Send,
    T: Send,
{
    fn run(&self) {
        self.run_with(|With(value, work)| work(value));
    }

    fn cancel(&self) {
        self.mark_cancelled();
    }
}

impl<F: Send, T: Send> Deliver<T> for Packet<F, T> {
    fn take(&self) -> Option<Outcome<T>> {
        if self.claim(CANCELLED) {
            return Some(Err(Box::new(Cancelled)));
        }
        if !self.claim(RESULT) {
            return None;
        }
        // SAFETY: claimed.
        unsafe { (*self.result.get()).take() }
    }
}

impl<F, T> Drop for Packet<F, T> {
    fn drop(&mut self) {
        let result = self.result.get_mut().take();
        if let (Some(Err(_)), Some(scope)) = (&result, &self.scope) {
            scope.note_panic();
        }
        // The closure of a thread that was cancelled, or died before it ran.
        let work = self.work.get_mut().take();
        // A destructor that panics must take down neither a thread that ends nor the one that reaps another; the
        // panic hook has reported it.
        drop_quietly(work);
        drop_quietly(result);
    }
}

pub(super) fn drop_quietly<T>(value: T) {
    if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drop(value)))
        && let Err(worse) = catch_unwind(AssertUnwindSafe(|| drop(payload)))
    {
        // A payload whose own destructor panics could go on like this for ever.
        std::mem::forget(worse);
    }
}
