//! Making a thread: clone3(2), or clone(2) where that is not available.

use super::arch;
use super::entry::EntryPoint;
use crate::errno::Errno;
use crate::step::CloneCall;
use libc::{c_void, pid_t};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};

/// Exactly nptl's flags: valgrind and qemu-user accept no other combination, and kernel-side
/// accounting (`CLONE_SYSVSEM`, `CLONE_FS`) must match what glibc promises its threads.
pub(crate) const FLAGS: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

/// `CLONE_INTO_CGROUP`, for clone3 only; libc's constant of that name is too narrow for the bit.
pub(super) const INTO_CGROUP: u64 = 1 << 33;

/// What the kernel needs to make a thread.
pub(crate) struct CloneRequest {
    /// Lowest address of the stack.
    pub stack: usize,
    /// Its length; the initial stack pointer is `stack + stack_size`.
    pub stack_size: usize,
    /// The thread pointer of a complete TLS block.
    pub thread_pointer: usize,
    /// Set to the thread id before the thread runs, cleared, and its waiter woken, when the kernel no longer uses the stack.
    pub tid: *mut pid_t,
    /// The argument of [`EntryPoint::main`].
    pub start: *mut c_void,
    /// The directory of the cgroup (v2) that the thread is made in.
    pub cgroup: Option<RawFd>,
}

/// clone3 answered ENOSYS: an old kernel, valgrind, or a filter made after Docker's fix. It will
/// answer so again, so later threads go straight to clone.
static NO_CLONE3: AtomicBool = AtomicBool::new(false);

/// Makes the thread. Prefers clone3 (under shadow stacks the kernel needs the stack's size), and
/// falls back to clone on ENOSYS and on EPERM: Docker's old seccomp profile answers EPERM to every
/// clone3, and with exactly [`FLAGS`] the kernel itself has no EPERM to give: it comes from
/// a filter or an LSM, and clone's own answer is then the one to report. clone knows no cgroup, so there is no fallback
/// for a thread that is made in one.
///
/// # Safety
/// The stack, the TLS block and `start` belong to the new thread alone from here on, unless this
/// returns an error (A1, A2).
pub(crate) unsafe fn thread<E: EntryPoint>(
    request: &CloneRequest,
) -> Result<pid_t, (Errno, CloneCall)> {
    if !NO_CLONE3.load(Ordering::Relaxed) || request.cgroup.is_some() {
        // SAFETY: all-zero is a valid clone_args: no pidfd, no exit signal, no set_tid.
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.flags = FLAGS;
        args.parent_tid = request.tid as u64;
        args.child_tid = request.tid as u64;
        args.stack = request.stack as u64;
        args.stack_size = request.stack_size as u64;
        args.tls = request.thread_pointer as u64;
        if let Some(cgroup) = request.cgroup {
            args.flags |= INTO_CGROUP;
            args.cgroup = cgroup as u64;
        }
        // SAFETY: the caller vouches for stack, block and start.
        let answer = unsafe {
            arch::clone3::<E>(
                &raw const args,
                size_of::<libc::clone_args>(),
                request.start,
            )
        };
        match Errno::checked(answer) {
            Ok(tid) => return Ok(tid as pid_t),
            Err(errno) if request.cgroup.is_some() => return Err((errno, CloneCall::Clone3)),
            Err(Errno::ENOSYS) => NO_CLONE3.store(true, Ordering::Relaxed),
            Err(Errno::EPERM) => {}
            Err(errno) => return Err((errno, CloneCall::Clone3)),
        }
    }
    // SAFETY: no thread was made above, so that stack, block and start still are what the caller vouches for.
    let answer = unsafe {
        arch::clone::<E>(
            FLAGS as usize,
            request.stack + request.stack_size,
            request.tid,
            request.tid,
            request.thread_pointer,
            request.start,
        )
    };
    Errno::checked(answer)
        .map(|tid| tid as pid_t)
        .map_err(|errno| (errno, CloneCall::Clone))
}
