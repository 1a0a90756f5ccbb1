//! Threads of glibc's own, which do what only they can.

use super::symbols::Symbols;
use crate::errno::Errno;
use libc::{c_int, c_void, pthread_attr_t, pthread_t};

/// Creates a thread with the attributes that `set` sets, which returns 0 or an errno.
///
/// # Safety
/// `argument` satisfies the contract of `routine`, and outlives the thread. The attributes describe memory of the caller's.
pub(super) unsafe fn create(
    symbols: &Symbols,
    routine: unsafe extern "C" fn(*mut c_void) -> *mut c_void,
    argument: *mut c_void,
    set: impl FnOnce(*mut pthread_attr_t) -> c_int,
) -> Result<pthread_t, Errno> {
    let mut thread = 0;
    // SAFETY: the attributes are initialised, and destroyed after their last use. The routine is called once, by the new
    // thread, with the argument that it is written for.
    unsafe {
        let mut attributes: pthread_attr_t = std::mem::zeroed();
        libc::pthread_attr_init(&raw mut attributes);
        let mut answer = set(&raw mut attributes);
        if answer == 0 {
            Errno::clear();
            answer = (symbols.create)(&raw mut thread, &raw const attributes, routine, argument);
        }
        // glibc folds the errno of a refusal, and leaves it in `errno`.
        let errno = match Errno::last() {
            errno if answer == libc::EAGAIN && errno != 0 => errno,
            _ => Errno::new(answer),
        };
        libc::pthread_attr_destroy(&raw mut attributes);
        if answer == 0 { Ok(thread) } else { Err(errno) }
    }
}
