//! What the assembly of an architecture calls: it names no room above this one.

use libc::c_void;

/// Where new threads begin.
pub(crate) trait EntryPoint {
    /// Called by the entry routine with every signal but SIGSETXID blocked, as a thread's first frame.
    ///
    /// # Safety
    /// `start` is what [`CloneRequest::start`](super::clone::CloneRequest::start) says of this entry.
    unsafe extern "C" fn main(start: *mut c_void) -> !;
}

/// What decides about a fault.
pub(crate) trait Faults {
    /// Called by [`fault_handler`](super::fault_handler) with its own arguments, and its stack pointer at the entry.
    ///
    /// # Safety
    /// The arguments are those of a handler with SA_SIGINFO.
    unsafe extern "C" fn decide(
        signal: libc::c_int,
        info: *const libc::siginfo_t,
        context: *const libc::ucontext_t,
        frame: usize,
    ) -> Next;
}

/// What [`fault_handler`](super::fault_handler) does next, in two registers.
#[repr(C)]
pub(crate) struct Next {
    /// The handler that it jumps to; 0: it returns to the interrupted code.
    pub handler: usize,
    /// How far the signal's frame was moved, and the handler's arguments with it.
    pub distance: isize,
}

/// What [`call_routine`](super::call_routine) calls in a thread that C code has created.
#[cfg(feature = "interpose")]
#[repr(C)]
pub(crate) struct Routine {
    /// The program's function, which may unwind.
    pub start: unsafe extern "C-unwind" fn(*mut c_void) -> *mut c_void,
    pub argument: *mut c_void,
    /// Where the C library keeps what the function returns.
    pub result: *mut *mut c_void,
    /// Runs the destructors of the thread, and ends its being cancellable. May unwind, and is called again then.
    pub finish: unsafe extern "C-unwind" fn(),
}
