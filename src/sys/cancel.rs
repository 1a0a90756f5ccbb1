//! Cancellation and pthread_exit(3), as far as glibc exports them. A buffer is a `__pthread_unwind_buf_t` (pthread.h).

use libc::{c_int, c_void};

unsafe extern "C" {
    pub(crate) fn pthread_setcancelstate(state: c_int, old: *mut c_int) -> c_int;
    pub(crate) fn pthread_setcanceltype(kind: c_int, old: *mut c_int) -> c_int;
    pub(crate) fn __pthread_register_cancel(buffer: *mut c_void);
    pub(crate) fn __pthread_unregister_cancel(buffer: *mut c_void);
}

#[cfg(feature = "interpose")]
unsafe extern "C" {
    /// Called by assembly only, because it unwinds.
    pub(super) fn __pthread_unwind_next(buffer: *mut c_void) -> !;
    /// Called by assembly only, because it returns twice.
    pub(super) fn __sigsetjmp(buffer: *mut c_void, savemask: c_int) -> c_int;
}

/// `PTHREAD_CANCEL_DEFERRED`
pub(crate) const PTHREAD_CANCEL_DEFERRED: c_int = 0;

/// `PTHREAD_CANCEL_DISABLE`
pub(crate) const PTHREAD_CANCEL_DISABLE: c_int = 1;

/// While this lives, a request to cancel the calling thread (pthread_cancel(3)) stays pending. Cancellation would unwind
/// through frames that own a stack or wait for a thread.
pub(crate) struct NoCancellation(c_int);

impl NoCancellation {
    pub(crate) fn new() -> NoCancellation {
        let mut old = 0;
        // SAFETY: a valid place for the state that was there.
        unsafe { pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &raw mut old) };
        NoCancellation(old)
    }
}

impl Drop for NoCancellation {
    fn drop(&mut self) {
        // SAFETY: a state that pthread_setcancelstate has returned.
        unsafe { pthread_setcancelstate(self.0, std::ptr::null_mut()) };
    }
}
