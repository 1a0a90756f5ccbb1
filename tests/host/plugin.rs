//! A shared object with the crate in it, as a C program would load one: see main.rs.

use std::sync::atomic::{AtomicU32, Ordering};

static RELEASED: AtomicU32 = AtomicU32::new(0);

/// Starts a thread that ends once [`plugin_release`] was called; its tid, or 0.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_start() -> i32 {
    let thread = nptl::spawn(|| {
        while RELEASED.load(Ordering::Acquire) == 0 {
            std::thread::yield_now();
        }
    });
    // Dropping the handle detaches the thread: the code that closes this object cannot wait for it.
    thread.map_or(0, |thread| thread.tid())
}

/// Lets the threads of [`plugin_start`] end.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_release() {
    RELEASED.store(1, Ordering::Release);
}

/// Starts and joins a thread: what its closure returned, or -1.
#[unsafe(no_mangle)]
pub extern "C" fn plugin_answer() -> i32 {
    let thread = nptl::spawn(|| 42).ok();
    thread.and_then(|thread| thread.join().ok()).unwrap_or(-1)
}
