//! The new thread's first and last instructions.
//!
//! The order matters at both ends:
//!
//! ```text
//!  all but SIGSETXID blocked       set_robust_list, rseq, locale, ctype, resolver
//!                                  name, signal stack, errno
//!  the closure's mask              settings and setup, reported to the creator, and the gate: where there are any
//!                                  the closure; its result and itself are dropped or handed over
//!                                  thread-local destructors, pthread keys, thread-locals again
//!                                  glibc's count of threads; the last one exits the process
//!  application signals blocked     what was registered or set meanwhile is cleared
//!                                  no sender uses the tid any more, a set-id broadcast does not count on the thread
//!                                  without a handle: MADV_DONTNEED below the warm remainder, the stack is given back
//!                                  off glibc's list, if its lock is free: from here on inline assembly only
//!                                  exit
//! ```
//!
//! System calls after the closure has started: rt_sigprocmask, exit, madvise(MADV_DONTNEED) in a detached thread, and
//! only under contention futex (WAIT, WAKE, private or not). All of them pass the vCPU filters of Firecracker and Cloud
//! Hypervisor. The allocator is not used, be it to free: what is to be freed stays with the stack for its next owner.

use crate::errno::Errno;
use crate::stack::cache::StackCache;
use crate::stack::{Settings, Stack, overflow};
use crate::sync::notice_fork;
use crate::sys::{self, EntryPoint};
use crate::tcb::Runtime;
use std::cell::Cell;
use std::sync::atomic::{Ordering, fence};

/// Sets what `settings` say, for the calling thread, which runs on `stack`. No other thread waits for it. Where its name or
/// its signal stack is refused the thread runs all the same, and an overflow of it ends the process without a report.
fn apply(settings: &Settings, stack: &Stack) {
    if let Some(comm) = &settings.comm {
        // SAFETY: a NUL-terminated buffer of 16 bytes.
        unsafe { libc::prctl(libc::PR_SET_NAME, comm.as_ptr()) };
    }
    if settings.signal_stack {
        overflow::use_signal_stack(stack);
    }
}

thread_local! {
    /// The record of the calling thread, if it is one of this crate. Without a destructor, so that
    /// it can be read until the end, and in signal handlers.
    static CURRENT: Cell<Option<&'static Stack>> = const { Cell::new(None) };
}

/// The calling thread's stack, if this crate started it.
pub(crate) fn current() -> Option<&'static Stack> {
    CURRENT.get()
}

/// The name of the calling thread, as given to [`Builder::name`](crate::Builder::name).
///
/// `std::thread::current().name()` is `None` in a thread of this crate: std offers no way to set
/// it. The operating system's name (`comm`, at most 15 bytes) is set as well.
///
/// ```
/// let handle = nptl::Builder::new().name("vcpu0").spawn(nptl::current_name).unwrap();
/// assert_eq!(handle.join().unwrap().as_deref(), Some("vcpu0"));
/// ```
pub fn current_name() -> Option<String> {
    with_current_name(|name| name.map(str::to_owned))
}

/// Calls `f` with the [name of the calling thread](current_name), or with `None` in a thread that has none or is not of
/// this crate. Allocates nothing and makes no system call, so it can be used where the heap cannot, as in a signal
/// handler.
///
/// ```
/// let named = nptl::Builder::new().name("vcpu0");
/// let handle = named.spawn(|| nptl::with_current_name(|name| name == Some("vcpu0")))?;
/// assert!(handle.join().unwrap());
/// # Ok::<(), nptl::SpawnError>(())
/// ```
pub fn with_current_name<R>(f: impl FnOnce(Option<&str>) -> R) -> R {
    // SAFETY: the record of this very thread, whose name stays until its destructors have run.
    f(current().and_then(|stack| unsafe { stack.name() }))
}

/// Where every thread of this crate begins.
pub(crate) struct Begin;

impl EntryPoint for Begin {
    /// # Safety
    /// `record` is the `&'static Stack` this thread runs on, with its message in place.
    unsafe extern "C" fn main(record: *mut libc::c_void) -> ! {
        // SAFETY: by contract; records are never freed.
        let stack = unsafe { &*record.cast_const().cast::<Stack>() };
        // SAFETY: the new thread takes its message once. Everything that needs dropping is dropped in
        // `live`: this frame is never left (docs/glibc.md).
        let runtime = unsafe { live(stack) };
        // SAFETY: the thread has ended but for this.
        unsafe { leave(stack, runtime) }
    }
}

/// The thread's life: from its first TLS access to its last destructor.
///
/// What it holds stays in its message until its end: if it dies on the way (a bare exit, a filter), the
/// one that reaps it finds that there, and nothing is lost but what lies in the thread's frames.
///
/// # Safety
/// Called once, by the thread whose message lies in `stack`, as the first thing that it does.
unsafe fn live(stack: &'static Stack) -> &'static Runtime {
    // SAFETY: this thread's own message, which it does not take before it ends. The creator always leaves one.
    let Some(start) = (unsafe { stack.start() }) else {
        sys::exit_thread()
    };
    let runtime = start.runtime;
    // SAFETY: first thing on a complete block; the name lives until the end of this function.
    unsafe {
        runtime.enter(start.rseq);
        stack.set_name(start.name.as_ref().map(|name| name.as_str()));
    }
    CURRENT.set(Some(stack));
    apply(&start.settings, stack);
    // The last thread here, or a refused setting, has left its errno; the closure starts with 0 (G10).
    Errno::clear();
    sys::set_signal_mask(start.mask);

    // SAFETY: this very thread's stack; a body does not unwind.
    unsafe {
        runtime.with_unwind_buffer(stack.top(), || {
            match (&start.body, &start.settings.stages) {
                (Some(body), None) => body.run(),
                (Some(body), Some(stages)) => stages.run(&**body),
                (None, _) => {}
            }
        });
    }

    // The last reference, if there is no handle: the closure's result is dropped here, while thread-locals still
    // work.
    // SAFETY: the borrow from above has ended, and nothing else looks at the message of a thread that lives.
    unsafe { stack.leave_body() };

    // What comes next is of this process: the closure can have forked without handlers, while another thread
    // held one of the locks.
    notice_fork();

    // SAFETY: the ending thread itself, with application signals open (G17).
    unsafe {
        runtime.run_destructors();
        if runtime.count_down(&stack.block) {
            // main has called pthread_exit, and this was the last thread.
            libc::exit(0);
        }
        stack.set_name(None);
    }
    runtime
}

/// The last frame. Nothing in it may need dropping.
///
/// # Safety
/// Called by the thread on `stack` after [`live`].
unsafe fn leave(stack: &'static Stack, runtime: &'static Runtime) -> ! {
    // SIGSETXID stays unblocked: a set-id broadcast waits for every thread that it has marked (G3).
    sys::set_signal_mask(sys::APPLICATION);
    // SAFETY: the ending thread itself, after its destructors.
    unsafe { runtime.clear_leftovers() };
    stack.mark_ended();
    // SAFETY: the ending thread on its own stack and block, in the order that the top of this file
    // gives. From `leave_list` on nothing but inline assembly runs (G11).
    unsafe {
        runtime.mark_exiting();
        if stack.end() {
            StackCache::give_running(stack);
        }
        runtime.leave_list(&stack.block);
    }
    // The owner of the stack reads these stores after it has seen the tid word cleared. That the kernel's store is
    // ordered behind them is not promised for every processor.
    fence(Ordering::SeqCst);
    sys::exit_thread()
}
