//! What replaces glibc's malloc and its relatives, in this program and in glibc itself. It passes on to glibc's own, but
//! while a thread is armed its next call ends the process, and `calloc` can be made to fail.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

use libc::{c_int, c_void, size_t};
use support::tid;

/// The thread that may not allocate; 0 for none.
pub static ARMED: AtomicI32 = AtomicI32::new(0);

/// In this thread `calloc` fails, and with it `_dl_allocate_tls`, which no system call can make fail: its
/// few hundred bytes come out of a heap that has them.
pub static CALLOC_FAILS_IN: AtomicI32 = AtomicI32::new(0);

/// A `calloc` that fails arms its thread.
pub static FAILING_ARMS: AtomicBool = AtomicBool::new(false);

pub static CALLS: AtomicUsize = AtomicUsize::new(0);

fn check() {
    CALLS.fetch_add(1, Ordering::Relaxed);
    let armed = ARMED.load(Ordering::Acquire);
    if armed != 0 && armed == tid() {
        let text = b"allocation after a refusal\n";
        // SAFETY: a valid buffer; then the end of the process.
        unsafe {
            libc::write(2, text.as_ptr().cast(), text.len());
            libc::abort();
        }
    }
}

unsafe extern "C" {
    fn __libc_malloc(size: size_t) -> *mut c_void;
    fn __libc_calloc(count: size_t, size: size_t) -> *mut c_void;
    fn __libc_realloc(block: *mut c_void, size: size_t) -> *mut c_void;
    fn __libc_memalign(align: size_t, size: size_t) -> *mut c_void;
}

#[unsafe(no_mangle)]
unsafe extern "C" fn malloc(size: size_t) -> *mut c_void {
    check();
    // SAFETY: passed on, as in all of the following.
    unsafe { __libc_malloc(size) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn calloc(count: size_t, size: size_t) -> *mut c_void {
    check();
    let failing = CALLOC_FAILS_IN.load(Ordering::Acquire);
    if failing != 0 && failing == tid() {
        if FAILING_ARMS.load(Ordering::Acquire) {
            ARMED.store(failing, Ordering::Release);
        }
        // SAFETY: this thread's errno.
        unsafe { *libc::__errno_location() = libc::ENOMEM };
        return std::ptr::null_mut();
    }
    // SAFETY: glibc's own function behind the name that this one replaces; same contract.
    unsafe { __libc_calloc(count, size) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn realloc(block: *mut c_void, size: size_t) -> *mut c_void {
    check();
    // SAFETY: glibc's own function behind the name that this one replaces; same contract.
    unsafe { __libc_realloc(block, size) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memalign(align: size_t, size: size_t) -> *mut c_void {
    check();
    // SAFETY: glibc's own function behind the name that this one replaces; same contract.
    unsafe { __libc_memalign(align, size) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aligned_alloc(align: size_t, size: size_t) -> *mut c_void {
    check();
    // SAFETY: glibc's own function behind the name that this one replaces; same contract.
    unsafe { __libc_memalign(align, size) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn posix_memalign(place: *mut *mut c_void, align: size_t, size: size_t) -> c_int {
    check();
    // SAFETY: `place` is valid by the function's contract.
    unsafe {
        let block = __libc_memalign(align, size);
        if block.is_null() {
            return libc::ENOMEM;
        }
        place.write(block);
    }
    0
}
