//! `pthread_create(3)` and its relatives for the whole program: as a global allocator is every `malloc`'s.
//!
//! The exported functions are here; what they do is one of two things ([`Mode`]): `explain` passes every call on to libc,
//! and finds out why one was refused; `threads` makes the threads itself.

mod explain;
mod settings;
mod threads;

use explain::{Libc, Routine};
use libc::{c_int, c_void, pthread_attr_t, pthread_t};
use settings::{Mode, Settings};

/// pthread_create(3)
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pthread_create(
    thread: *mut pthread_t,
    attributes: *const pthread_attr_t,
    routine: Routine,
    argument: *mut c_void,
) -> c_int {
    let Some(libc) = Libc::get() else {
        return libc::ENOSYS;
    };
    if Settings::get().mode == Mode::Threads {
        // SAFETY: the caller's own arguments.
        match unsafe { threads::create(thread, attributes, routine, argument) } {
            Some(Ok(())) => return 0,
            Some(Err(refusal)) => return refusal.errno(),
            None => {}
        }
    }
    // SAFETY: the caller's own arguments.
    unsafe { (libc.pthread_create)(thread, attributes, routine, argument) }
}

/// thrd_create(3)
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn thrd_create(
    thread: *mut pthread_t,
    routine: unsafe extern "C-unwind" fn(*mut c_void) -> c_int,
    argument: *mut c_void,
) -> c_int {
    // SAFETY: what the function returns in one register is read from there as wide as it is written: by thrd_join.
    let routine = unsafe {
        std::mem::transmute::<unsafe extern "C-unwind" fn(*mut c_void) -> c_int, Routine>(routine)
    };
    // SAFETY: the caller's own arguments.
    threads::thrd(unsafe { pthread_create(thread, std::ptr::null(), routine, argument) })
}
