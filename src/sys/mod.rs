//! System calls, and what of them is peculiar to a processor.
//!
//! `arch/` has one file for each architecture; the rest is the same for all.

mod arch;
mod calls;
mod cancel;
pub(crate) mod clone;
pub(crate) mod clone_probe;
mod entry;
pub(crate) mod futex;
pub(crate) mod map_probe;
mod page;
pub(crate) mod sched;
mod signals;

#[cfg(feature = "interpose")]
pub(crate) use arch::{call_on, call_routine, futex_cancellable, vfork};
pub(crate) use arch::{
    fault_handler, fill_header, leave_signal_stack, syscall, thread_pointer, unwind_buffer,
};
pub(crate) use calls::{
    at_fork, cpu_time, directory_entries, exit_thread, futex_wait, futex_wake, lll_lock,
    lll_try_lock, lll_unlock, madvise, pidfd_open_thread, process_id, read_link, tgkill,
};
pub(crate) use cancel::{
    __pthread_register_cancel, __pthread_unregister_cancel, NoCancellation,
    PTHREAD_CANCEL_DEFERRED, PTHREAD_CANCEL_DISABLE, pthread_setcancelstate, pthread_setcanceltype,
};
#[cfg(feature = "interpose")]
pub(crate) use entry::Routine;
pub(crate) use entry::{EntryPoint, Faults, Next};
pub(crate) use page::{find_once, page_size};
#[cfg(feature = "interpose")]
pub(crate) use signals::Quiet;
pub(crate) use signals::{APPLICATION, KernelSigSet, Signals, set_signal_mask};
