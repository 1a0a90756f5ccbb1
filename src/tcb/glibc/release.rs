//! Giving malloc back what it keeps for ended threads.
//!
//! glibc frees a thread's heap cache in a function that it does not export, as the last act of each of its own threads.
//! So a short thread of glibc's takes the segment of an ended thread of this crate over, and ends.

use super::block::Parked;
use super::pthread;
use super::runtime::Runtime;
use crate::sys;
use libc::c_void;

/// What the creator passes to the thread.
struct Heir<'a> {
    runtime: &'static Runtime,
    take: &'a (dyn Fn() -> Option<Parked> + Sync),
}

impl Runtime {
    /// Releases what `take` returns, which a new thread calls. Returns `false` if no thread could be created.
    pub(crate) fn release(&'static self, take: &(dyn Fn() -> Option<Parked> + Sync)) -> bool {
        let size = self.symbols.smallest_stack();
        let mut heir = Heir {
            runtime: self,
            take,
        };
        let place = (&raw mut heir).cast();
        // pthread_join is a cancellation point (G28), and the thread uses what lies in this frame. It inherits the mask:
        // no handler of the application's runs there, and none finds a heap cache that is not its thread's.
        let _cancellation = sys::NoCancellation::new();
        let old = sys::set_signal_mask(sys::APPLICATION);
        // SAFETY: the heir outlives the thread, which is joined.
        let released = unsafe {
            let set = |attributes| libc::pthread_attr_setstacksize(attributes, size);
            pthread::create(&self.symbols, run, place, set)
                .map(|thread| (self.symbols.join)(thread, std::ptr::null_mut()))
                .is_ok()
        };
        sys::set_signal_mask(old);
        released
    }
}

/// # Safety
/// Called as the routine of a thread of glibc's whose `argument` is an [`Heir`] that outlives it. Nothing has used the
/// heap in this thread before.
unsafe extern "C" fn run(argument: *mut c_void) -> *mut c_void {
    // SAFETY: by the creator's promise, which waits for this thread's end.
    let heir = unsafe { &*argument.cast::<Heir<'_>>() };
    let Some(parked) = (heir.take)() else {
        return std::ptr::null_mut();
    };
    let runtime = heir.runtime;
    let tp = sys::thread_pointer();
    // SAFETY: this thread's own block, with the offsets of every thread of this glibc. Until its end it does nothing
    // but put right what is another thread's in the segment.
    unsafe {
        runtime.put_parked(tp, &parked);
        runtime.point_at_own(tp);
    }
    std::ptr::null_mut()
}
