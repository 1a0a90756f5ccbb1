//! A stack for what follows a refusal. The program's own can be too small: a thread's of 16 KiB, or a signal stack, on which
//! fork(2) may be called.

use crate::failures::ANALYSIS;
use crate::sys::{Signals, call_on};
use libc::c_void;
use std::cell::UnsafeCell;

/// `tests/refusal/stack_use.rs` bounds what an analysis takes: a quarter of this.
const BYTES: usize = match cfg!(debug_assertions) {
    true => 256 << 10,
    false => 64 << 10,
};

/// Memory that is the kernel's until something is refused.
#[repr(align(4096))]
struct ExplainStack(UnsafeCell<[u8; BYTES]>);

// SAFETY: nothing refers to the bytes but the thread that runs on them.
unsafe impl Sync for ExplainStack {}

static MEMORY: ExplainStack = ExplainStack(UnsafeCell::new([0; BYTES]));

/// Calls `run` on it. Signals wait meanwhile, and so do other threads that call this.
pub(super) fn on_own_stack<F: FnOnce()>(run: F) {
    extern "C" fn call<F: FnOnce()>(run: *mut c_void) {
        // SAFETY: the option below, which only this frame has.
        let run = unsafe { &mut *run.cast::<Option<F>>() };
        if let Some(run) = run.take() {
            run();
        }
    }
    // Before the lock: a handler that interrupts its holder would wait for ever.
    let _signals = Signals::block_all_but_filters();
    let _lock = ANALYSIS.lock();
    let mut run = Some(run);
    let top = MEMORY.0.get().addr() + BYTES;
    // SAFETY: the lock is held, so that the stack is this thread's; the option outlives the call.
    unsafe { call_on(top, call::<F>, (&raw mut run).cast()) };
}
