//! The exported functions that only mode `threads` needs: each is for threads of this crate, and passes on to libc what is
//! about another thread. In mode `explain` there is no thread of this crate.
//!
//! Those that wait are cancellation points, and so nothing with a destructor may live in them.

use super::super::real;
use super::join;
use libc::{c_int, c_void, clockid_t, pthread_attr_t, pthread_t, timespec};

/// `thrd_t` (threads.h)
type Thrd = pthread_t;

/// Calls libc's own function.
macro_rules! pass_on {
    ($name:ident($($argument:expr),*)) => {
        match real::$name.get() {
            // SAFETY: the caller's own arguments.
            Some(function) => unsafe { function($($argument),*) },
            None => libc::ENOSYS,
        }
    };
}

/// What this crate answers of a thread of its own, or else libc's function of any other.
macro_rules! answer {
    ($own:expr, $name:ident($($argument:expr),*)) => {
        match $own {
            Some(errno) => errno,
            None => pass_on!($name($($argument),*)),
        }
    };
}

/// pthread_join(3)
///
/// # Safety
/// As for libc's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C-unwind" fn pthread_join(thread: pthread_t, result: *mut *mut c_void) -> c_int {
    // SAFETY: the caller's own arguments, and a null pointer is no deadline.
    let own = unsafe { join::join(thread, result, libc::CLOCK_REALTIME, std::ptr::null()) };
    answer!(own, PTHREAD_JOIN(thread, result))
}

/// pthread_tryjoin_np(3)
///
/// # Safety
/// As for libc's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C-unwind" fn pthread_tryjoin_np(
    thread: pthread_t,
    result: *mut *mut c_void,
) -> c_int {
    // SAFETY: the caller's own arguments.
    let own = unsafe { join::try_join(thread, result) };
    answer!(own, PTHREAD_TRYJOIN(thread, result))
}

/// pthread_timedjoin_np(3)
///
/// # Safety
/// As for libc's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C-unwind" fn pthread_timedjoin_np(
    thread: pthread_t,
    result: *mut *mut c_void,
    deadline: *const timespec,
) -> c_int {
    // SAFETY: the caller's own arguments.
    let own = unsafe { join::join(thread, result, libc::CLOCK_REALTIME, deadline) };
    answer!(own, PTHREAD_TIMEDJOIN(thread, result, deadline))
}

/// pthread_clockjoin_np, which glibc documents beside pthread_timedjoin_np
///
/// # Safety
/// As for libc's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C-unwind" fn pthread_clockjoin_np(
    thread: pthread_t,
    result: *mut *mut c_void,
    clock: clockid_t,
    deadline: *const timespec,
) -> c_int {
    if !matches!(clock, libc::CLOCK_REALTIME | libc::CLOCK_MONOTONIC) {
        return libc::EINVAL;
    }
    // SAFETY: the caller's own arguments.
    let own = unsafe { join::join(thread, result, clock, deadline) };
    answer!(own, PTHREAD_CLOCKJOIN(thread, result, clock, deadline))
}

/// pthread_detach(3)
///
/// # Safety
/// As for libc's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C-unwind" fn pthread_detach(thread: pthread_t) -> c_int {
    // SAFETY: the caller's own argument.
    let own = unsafe { join::detach(thread) };
    answer!(own, PTHREAD_DETACH(thread))
}

/// pthread_getattr_np(3)
///
/// # Safety
/// As for libc's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C-unwind" fn pthread_getattr_np(
    thread: pthread_t,
    attributes: *mut pthread_attr_t,
) -> c_int {
    let answer = pass_on!(PTHREAD_GETATTR(thread, attributes));
    if answer == 0 {
        // SAFETY: the caller's own arguments, which are filled.
        unsafe { join::put_right(thread, attributes) };
    }
    answer
}

/// thrd_join(3)
///
/// # Safety
/// As for libc's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C-unwind" fn thrd_join(thread: Thrd, result: *mut c_int) -> c_int {
    let mut value = std::ptr::null_mut();
    // SAFETY: the caller's own argument, and a place for the result.
    let joined = unsafe {
        join::join(
            thread,
            &raw mut value,
            libc::CLOCK_REALTIME,
            std::ptr::null(),
        )
    };
    match joined {
        Some(errno) => {
            // SAFETY: the caller's place, or null.
            let result = unsafe { result.as_mut() }.filter(|_| errno == 0);
            if let Some(result) = result {
                // The function has returned an int.
                *result = value.addr() as c_int;
            }
            thrd(errno)
        }
        None => pass_on!(THRD_JOIN(thread, result)),
    }
}

/// thrd_detach(3)
///
/// # Safety
/// As for libc's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C-unwind" fn thrd_detach(thread: Thrd) -> c_int {
    // SAFETY: the caller's own argument.
    match unsafe { join::detach(thread) } {
        Some(errno) => thrd(errno),
        None => pass_on!(THRD_DETACH(thread)),
    }
}

/// What threads.h says where pthread.h says `errno`.
pub(crate) fn thrd(errno: c_int) -> c_int {
    const SUCCESS: c_int = 0;
    const BUSY: c_int = 1;
    const ERROR: c_int = 2;
    const NO_MEMORY: c_int = 3;
    const TIMED_OUT: c_int = 4;
    match errno {
        0 => SUCCESS,
        libc::EBUSY => BUSY,
        libc::ENOMEM => NO_MEMORY,
        libc::ETIMEDOUT => TIMED_OUT,
        _ => ERROR,
    }
}
