//! `pthread_join` and its relatives, `pthread_detach`, `pthread_getattr_np`.
//!
//! A cancelled join unwinds through these functions: what a function holds with a destructor, it must not hold while it
//! waits.

use crate::handle::Running;
use crate::stack::{Stack, is_joined_by};
use crate::sync::notice_fork;
use crate::sys::NoCancellation;
use libc::{c_int, c_void, clockid_t, pthread_attr_t, pthread_t, timespec};

/// The record, if the thread is one of this crate.
///
/// # Safety
/// As for the functions that take a `pthread_t`.
unsafe fn find(thread: pthread_t) -> Option<&'static Stack> {
    notice_fork();
    // SAFETY: by the caller's promise.
    unsafe { Stack::of_thread(thread) }
}

/// Joins a thread. `deadline` is a time of `clock`; null means that it waits for ever. `None`: the thread is glibc's.
///
/// # Safety
/// As for pthread_clockjoin_np(3), and no frame with destructors lies between the program's and this.
pub(super) unsafe fn join(
    thread: pthread_t,
    result: *mut *mut c_void,
    clock: clockid_t,
    deadline: *const timespec,
) -> Option<c_int> {
    // SAFETY: by the caller's promise.
    let Some(stack) = (unsafe { find(thread) }) else {
        // The main thread, say, that waits for this one.
        return is_joined_by(thread as usize).then_some(libc::EDEADLK);
    };
    if let Err(errno) = stack.claim_join() {
        return Some(errno.raw());
    }
    // SAFETY: claimed; the rest is the caller's promise.
    if let Err(errno) = unsafe { stack.wait_to_join(clock, deadline) } {
        stack.release_join();
        return Some(errno.raw());
    }
    // SAFETY: claimed, and ended; null, or a place for the result.
    unsafe { finish(stack, result) };
    Some(0)
}

/// # Safety
/// The thread has ended, and the calling one has claimed it. `result` is null, or a place.
#[inline(never)]
unsafe fn finish(stack: &'static Stack, result: *mut *mut c_void) {
    let _cancellation = NoCancellation::new();
    let value = stack.take_result();
    Running::of(stack).finish();
    // SAFETY: by the caller's promise.
    if let Some(result) = unsafe { result.as_mut() } {
        *result = value;
    }
}

/// Joins a thread that has ended. `None`: the thread is glibc's.
///
/// # Safety
/// As for pthread_tryjoin_np(3).
pub(super) unsafe fn try_join(thread: pthread_t, result: *mut *mut c_void) -> Option<c_int> {
    // SAFETY: by the caller's promise.
    let stack = unsafe { find(thread) }?;
    if !stack.has_ended() {
        return Some(libc::EBUSY);
    }
    if let Err(errno) = stack.claim_join() {
        return Some(errno.raw());
    }
    // SAFETY: claimed, and ended; null, or a place for the result.
    unsafe { finish(stack, result) };
    Some(0)
}

/// Detaches a thread. `None`: the thread is glibc's.
///
/// # Safety
/// As for pthread_detach(3).
pub(super) unsafe fn detach(thread: pthread_t) -> Option<c_int> {
    // SAFETY: by the caller's promise.
    let stack = unsafe { find(thread) }?;
    Some(match stack.claim_detach() {
        Ok(true) => {
            let _cancellation = NoCancellation::new();
            drop(Running::of(stack));
            0
        }
        Ok(false) => 0,
        Err(errno) => errno.raw(),
    })
}

/// Puts right what glibc says of a thread of this crate: that it cannot be joined.
///
/// # Safety
/// As for pthread_getattr_np(3), which has filled the attributes.
pub(super) unsafe fn put_right(thread: pthread_t, attributes: *mut pthread_attr_t) {
    // SAFETY: by the caller's promise.
    if let Some(stack) = unsafe { find(thread) }
        && stack.is_joinable()
    {
        // SAFETY: initialised by the call before.
        unsafe { libc::pthread_attr_setdetachstate(attributes, libc::PTHREAD_CREATE_JOINABLE) };
    }
}
