//! fork(3): what its handlers do, and the one repair of a forked child.
//!
//! Nothing is locked across a fork, because the program's own handlers run between the crate's: prepare handlers in
//! reverse order of registration, child handlers in order. They spawn, join and take locks of their own (G24).
//!
//! ```text
//!  parent   prepare: this thread is inside fork(3) ──► fork ──► parent: it no longer is
//!  child                                               └──► the first call that notices, of any handler: repair
//!                                                           child: notices, if nothing else has
//! ```
//!
//! A child of `_Fork(3)`, or of a bare clone, has no handlers, and glibc does not repair itself there: no thread can be
//! made in it. It differs from a child of fork(3) in that its thread was not between "prepare" and "parent".

use crate::errno::Errno;
use crate::failures;
use crate::stack::cache;
use crate::step::{Step, StepError};
use crate::sync::{forked_bare, is_watched, note_bare_fork, note_fork, notice_fork, set_up_notice};
use crate::sys;
use crate::tcb::Runtime;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The thread pointers of threads inside fork(3). A thread that finds no place is taken for one that calls `_Fork`: its
/// child gets no threads.
static FORKING: [AtomicUsize; 64] = [const { AtomicUsize::new(0) }; 64];

/// The handlers are registered. The page can still be refused; the next spawn maps it then.
static REGISTERED: AtomicBool = AtomicBool::new(false);

/// The handlers are registered, and the page is there.
static GUARDED: AtomicBool = AtomicBool::new(false);

/// Registers the handlers, at the first call.
///
/// # Errors
/// The step that there was no memory for.
pub(crate) fn guard() -> Result<(), StepError> {
    if GUARDED.load(Ordering::Acquire) {
        return Ok(());
    }
    register()
}

/// Two threads may do this at once, and a forked child may do it again: handlers that are registered twice do no harm,
/// but a thread that waited for another one here could wait in a child that does not have that thread.
#[cold]
fn register() -> Result<(), StepError> {
    if !REGISTERED.load(Ordering::Acquire) {
        sys::at_fork(prepare, in_parent, in_child)
            .map_err(|errno| StepError::new(Step::Allocate, errno, 0))?;
        REGISTERED.store(true, Ordering::Release);
    }
    watch().map_err(|errno| StepError::new(Step::MapStack, errno, sys::page_size()))?;
    GUARDED.store(true, Ordering::Release);
    Ok(())
}

/// Lets the kernel mark forked children. Without the handlers, which are not registered in a signal handler.
pub(crate) fn watch() -> Result<(), Errno> {
    match is_watched() {
        true => Ok(()),
        false => set_up_notice(repair),
    }
}

/// Where no handlers are registered: calls fork(3) so that its child is not taken for one of `_Fork(3)`.
#[cfg(feature = "interpose")]
pub(crate) fn inside(fork: impl FnOnce() -> libc::pid_t) -> libc::pid_t {
    if !is_watched() {
        return fork();
    }
    prepare();
    let child = fork();
    if child != 0 {
        in_parent();
    }
    child
}

/// Changes the first place that holds `from`.
fn change(from: usize, to: usize) {
    let change = |place: &AtomicUsize| {
        place
            .compare_exchange(from, to, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
    };
    let _ = FORKING.iter().any(change);
}

extern "C" fn prepare() {
    change(0, sys::thread_pointer());
}

extern "C" fn in_parent() {
    change(sys::thread_pointer(), 0);
}

extern "C" fn in_child() {
    notice_fork();
    // Where the kernel does not wipe pages, this is the only notice.
    if is_forking(sys::thread_pointer()) {
        repair();
    }
}

fn is_forking(thread: usize) -> bool {
    FORKING
        .iter()
        .any(|place| place.load(Ordering::Relaxed) == thread)
}

/// Whether this child's first thread was inside fork(3).
fn has_handlers() -> bool {
    if is_forking(sys::thread_pointer()) {
        return true;
    }
    // A thread that an earlier child handler of the program has started: the one that forked cannot be looked up by
    // it, but is most likely the only one that was forking.
    let first = nix::unistd::gettid() == nix::unistd::getpid();
    !first
        && !FORKING
            .iter()
            .all(|place| place.load(Ordering::Relaxed) == 0)
}

/// Makes the crate's state one of this process: run once by the first call that notices the fork, with application
/// signals blocked. It may be repeated, by a child that is forked in the middle of it.
fn repair() {
    note_fork();
    if !has_handlers() {
        note_bare_fork();
    }
    for place in &FORKING {
        place.store(0, Ordering::Relaxed);
    }
    // SAFETY: a forked child, whose other threads, if there are any, wait for this or have not used the crate.
    unsafe {
        Runtime::forget_calibration();
        failures::reset();
        cache::repair_after_fork(forked_bare());
    }
}
