//! [`SetupPacket`]: a packet whose thread has something to do first, which can fail.

use super::body::{Body, Deliver};
use super::packet::{Packet, drop_quietly};
use std::any::Any;
use std::cell::UnsafeCell;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Result as Outcome;

/// What became of a setup that did not succeed.
pub(crate) enum Failure<E> {
    /// It returned an error.
    Failed(E),
    /// It panicked.
    Panicked(Box<dyn Any + Send>),
}

/// A [`Packet`] with a setup, which makes the value that the closure is called with.
///
/// Setup and value are the thread's alone from its start on. The failure is the thread's until it sets `failed`.
pub(crate) struct SetupPacket<S, A, E, F, T> {
    packet: Packet<F, T>,
    setup: UnsafeCell<Option<S>>,
    /// The thread's own, which makes it and uses it up: it need not be [`Send`]. If the thread dies in between, the
    /// value is lost, like all that lies in the frames of a thread that dies.
    value: UnsafeCell<Option<ManuallyDrop<A>>>,
    failure: UnsafeCell<Option<Failure<E>>>,
    /// There is a failure to be taken.
    failed: AtomicBool,
}

// SAFETY: setup, closure, error and result move from thread to thread and are `Send`. The value is made, used and dropped
// by one thread, and nothing but that thread's code reaches it.
unsafe impl<S: Send, A, E: Send, F: Send, T: Send> Send for SetupPacket<S, A, E, F, T> {}
// SAFETY: the cells are touched by one thread at a time (see above); the packet keeps its own rules.
unsafe impl<S: Send, A, E: Send, F: Send, T: Send> Sync for SetupPacket<S, A, E, F, T> {}

impl<S, A, E, F, T> SetupPacket<S, A, E, F, T> {
    pub(crate) fn new(setup: S, body: F) -> Self {
        SetupPacket {
            packet: Packet::new(body, None),
            setup: UnsafeCell::new(Some(setup)),
            value: UnsafeCell::new(None),
            failure: UnsafeCell::new(None),
            failed: AtomicBool::new(false),
        }
    }

    /// Why the setup did not succeed, once.
    pub(crate) fn take_failure(&self) -> Option<Failure<E>> {
        if !self.failed.swap(false, Ordering::Acquire) {
            return None;
        }
        // SAFETY: the thread has stored it before it set the mark, and this caller alone has seen the mark.
        unsafe { (*self.failure.get()).take() }
    }

    /// The value, in the thread that has made it.
    fn take_value(&self) -> Option<A> {
        // SAFETY: called by the thread alone, which does one thing at a time.
        unsafe { (*self.value.get()).take() }.map(ManuallyDrop::into_inner)
    }
}

impl<S, A, E, F, T> Body for SetupPacket<S, A, E, F, T>
where
    S: FnOnce() -> Result<A, E> + Send,
    E: Send,
    F: FnOnce(A) -> T + Send,
    T: Send,
{
    fn set_up(&self) -> bool {
        // SAFETY: the creator does not touch it after the thread's start.
        let Some(setup) = (unsafe { (*self.setup.get()).take() }) else {
            return false;
        };
        let failure = match catch_unwind(AssertUnwindSafe(setup)) {
            Ok(Ok(value)) => {
                // SAFETY: only this thread touches the cell.
                unsafe { *self.value.get() = Some(ManuallyDrop::new(value)) };
                return true;
            }
            Ok(Err(error)) => Failure::Failed(error),
            Err(payload) => Failure::Panicked(payload),
        };
        // SAFETY: no other thread touches the cell before the mark.
        unsafe { *self.failure.get() = Some(failure) };
        self.failed.store(true, Ordering::Release);
        false
    }

    fn run(&self) {
        if let Some(value) = self.take_value() {
            self.packet.run_with(|work| work(value));
        }
    }

    fn cancel(&self) {
        drop_quietly(self.take_value());
        self.packet.mark_cancelled();
    }
}

impl<S, A, E, F, T> Deliver<T> for SetupPacket<S, A, E, F, T>
where
    S: Send,
    E: Send,
    F: Send,
    T: Send,
{
    fn take(&self) -> Option<Outcome<T>> {
        self.packet.take()
    }
}

impl<S, A, E, F, T> Drop for SetupPacket<S, A, E, F, T> {
    fn drop(&mut self) {
        // Left by a thread that was not created, or died before its setup. A panic of a destructor stays here.
        drop_quietly(self.setup.get_mut().take());
        drop_quietly(self.failure.get_mut().take());
    }
}
