//! Giving malloc back what it keeps for ended threads.
//!
//! glibc frees a thread's heap cache in a function that it does not export, as the last act of each of its own threads.
//! So a short thread of glibc's takes the segment of an ended thread of this crate over, and ends.

use super::block::Parked;
use super::runtime::Runtime;
use super::symbols;
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
        const ROOM: usize = 128 * 1024;
        let size = (self.symbols.tls_size + self.symbols.tls_align + ROOM).next_multiple_of(4096);
        let mut heir = Heir {
            runtime: self,
            take,
        };
        let place = (&raw mut heir).cast();
        let mut thread = 0;
        // pthread_join is a cancellation point (G28), and the thread uses what lies in this frame. It inherits the mask:
        // no handler of the application's runs there, and none finds a heap cache that is not its thread's.
        let _cancellation = sys::NoCancellation::new();
        let old = sys::set_signal_mask(sys::APPLICATION);
        // SAFETY: the argument outlives the thread, which is joined. The libc crate wants a safe function type; ours is
        // called once, by the new thread, with the argument that it is written for.
        let released = unsafe {
            let routine: extern "C" fn(*mut c_void) -> *mut c_void =
                std::mem::transmute(run as unsafe extern "C" fn(_) -> _);
            let mut attributes: libc::pthread_attr_t = std::mem::zeroed();
            libc::pthread_attr_init(&raw mut attributes);
            libc::pthread_attr_setstacksize(&raw mut attributes, size);
            let attributes = &raw mut attributes;
            let created = libc::pthread_create(&raw mut thread, attributes, routine, place) == 0;
            libc::pthread_attr_destroy(attributes);
            if created {
                libc::pthread_join(thread, std::ptr::null_mut());
            }
            created
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
    // but put right what is another thread's in the segment, in the order of G10.
    unsafe {
        runtime.put_parked(tp, &parked);
        libc::uselocale(symbols::LC_GLOBAL_LOCALE);
        (runtime.symbols.ctype_init)();
        ((tp as isize + runtime.offsets.resp) as *mut usize).write(tp + runtime.offsets.resolver);
    }
    std::ptr::null_mut()
}
