//! What is the same in both modes: why a call of libc's was refused.
//!
//! The call is over, and the program gets what libc answered: value and errno. Nothing is done unless that is EAGAIN or
//! ENOMEM.

use super::output;
use super::real::Function;
use super::stack::on_own_stack;
use super::threads;
use crate::debug;
use crate::diagnose;
use crate::errno::Errno;
use crate::error::{Refusal, RefusedCall};
use crate::failures;
use crate::fork;
use crate::step::Task;
use crate::sync::notice_fork;
use crate::sys::NoCancellation;
use libc::{c_int, pthread_attr_t};
use std::mem::MaybeUninit;

/// A process with this one's memory until it executes a program: vfork(2), posix_spawn(3).
pub(super) const SHARES_MEMORY: Task = Task::Process { copies: false };
/// One with a copy of it: fork(2).
pub(super) const COPIES_MEMORY: Task = Task::Process { copies: true };

/// What a call maps before the clone.
#[derive(Clone, Copy)]
pub(super) struct ChildStack {
    pub(super) size: usize,
    pub(super) guard: usize,
}

impl ChildStack {
    pub(super) const NONE: ChildStack = ChildStack { size: 0, guard: 0 };
    /// What posix_spawn maps for the child, without the room for its arguments.
    pub(super) const OF_CHILD: ChildStack = ChildStack {
        size: 32 << 10,
        guard: 0,
    };
}

/// libc's function, or ENOSYS in `errno` and `without` where it has none.
pub(super) fn call<F: Copy, T>(function: &Function<F>, without: T, call: impl FnOnce(F) -> T) -> T {
    match function.get() {
        Some(function) => call(function),
        None => {
            Errno::new(libc::ENOSYS).leave();
            without
        }
    }
}

/// A call that makes a thread and returns an error number, or something that is made of one. The kernel's own, which
/// these calls fold, is left in `errno`: which is as the program had it if the call has not set it.
pub(super) fn thread(
    name: &'static str,
    attributes: *const pthread_attr_t,
    is_refusal: impl FnOnce(c_int) -> bool,
    call: impl FnOnce() -> c_int,
) -> c_int {
    let before = Errno::last();
    Errno::clear();
    let answer = call();
    let left = Errno::last();
    if is_refusal(answer) {
        let errno = match left.raw() {
            0 => Errno::new(answer),
            _ => left,
        };
        explain(name, errno, Task::Thread, stack_of(attributes));
    }
    match left.raw() {
        0 => before.leave(),
        _ => left.leave(),
    }
    answer
}

/// A thread of this crate's: an error number, and in `errno` what libc would leave there. Its refusal is kept already.
/// `None`: libc is to make it.
pub(super) fn own(
    name: &'static str,
    create: impl FnOnce() -> Option<Result<(), threads::NotCreated>>,
) -> Option<c_int> {
    let before = Errno::last();
    let created = create();
    before.leave();
    let Err(refusal) = created? else {
        return Some(0);
    };
    if let threads::NotCreated::Thread(error) = &refusal {
        let report = || {
            let refusal = Refusal {
                call: RefusedCall::Own(name),
                ..*error.refusal()
            };
            output::refusal(&refusal);
        };
        if is_reported(error.errno()) {
            on_own_stack(report);
        }
        error.errno().leave();
    }
    Some(refusal.errno())
}

/// A call that makes a task was refused with this error number. `errno` stays as it is.
pub(super) fn refused(name: &'static str, errno: Errno, task: Task, stack: ChildStack) {
    let left = Errno::last();
    explain(name, errno, task, stack);
    left.leave();
}

/// Of something that was short. What is wrong with the call itself its own error says.
fn is_reported(errno: Errno) -> bool {
    matches!(errno, Errno::EAGAIN | Errno::ENOMEM)
}

fn explain(name: &'static str, errno: Errno, task: Task, stack: ChildStack) {
    if !is_reported(errno) {
        return;
    }
    // So that a forked child does not find a lock taken for ever. Without the memory for that it is tried again.
    let _ = fork::watch();
    notice_fork();
    // Reading files is a cancellation point.
    let _cancellation = NoCancellation::new();
    on_own_stack(|| report(name, errno, task, stack));
}

/// Not inlined, so that it does not lie on the caller's stack.
#[inline(never)]
fn report(name: &'static str, errno: Errno, task: Task, stack: ChildStack) {
    let (error, verdict) =
        diagnose::explain_call(errno, task, stack.size.saturating_add(stack.guard));
    let refusal = Refusal {
        call: RefusedCall::Libc(name),
        stack_size: match task {
            Task::Thread => stack.size,
            Task::Process { .. } => 0,
        },
        ..Refusal::new(error, verdict)
    };
    debug::keep();
    failures::record(&refusal, None);
    output::refusal(&refusal);
}

/// What glibc maps for a thread with these attributes; nothing for a stack of the program's own.
pub(super) fn stack_of(attributes: *const pthread_attr_t) -> ChildStack {
    unsafe extern "C" {
        fn pthread_attr_getstackaddr(
            attributes: *const pthread_attr_t,
            address: *mut *mut libc::c_void,
        ) -> c_int;
    }
    let (mut own, mut size, mut guard) = (std::ptr::null_mut(), 0, 0);
    let mut default = MaybeUninit::uninit();
    // SAFETY: null, or what libc has just made a thread by. Attributes that were only initialised have the process's
    // default size; initialising and reading them allocates nothing.
    unsafe {
        libc::pthread_attr_init(default.as_mut_ptr());
        let attributes = match attributes.is_null() {
            true => default.as_ptr(),
            false => attributes,
        };
        pthread_attr_getstackaddr(attributes, &raw mut own);
        libc::pthread_attr_getstacksize(attributes, &raw mut size);
        libc::pthread_attr_getguardsize(attributes, &raw mut guard);
    }
    match own.is_null() {
        true => ChildStack { size, guard },
        false => ChildStack::NONE,
    }
}

/// What clone(2) makes with these flags.
pub(super) fn task_of(flags: c_int) -> Task {
    match (flags & libc::CLONE_THREAD, flags & libc::CLONE_VM) {
        (0, 0) => COPIES_MEMORY,
        (0, _) => SHARES_MEMORY,
        _ => Task::Thread,
    }
}
