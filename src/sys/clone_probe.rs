//! Calls of clone and clone3 that the kernel always refuses.
//!
//! Each one stops at a known place inside the kernel's `copy_process`, so that its errno shows how far a
//! clone gets at this moment. None of them requests a new address space or a new parent, and each is refused
//! before the new task could be seen or run.
//!
//! Why the flags differ from the usual probes in two places: leaving out `CLONE_FS` skips `copy_fs`, the
//! only check that a sibling inside execve fails, so a probe with it and one without it single that cause out. And
//! the legacy probe keeps the caller's own flags, because system-call filters compare flags: a thread pointer
//! outside user space is refused by the kernel (EPERM, `copy_thread`) and looked at by no filter.

use std::arch::asm;
use std::cell::UnsafeCell;
use std::os::fd::{AsRawFd, BorrowedFd};
#[cfg(feature = "interpose")]
use std::sync::atomic::{AtomicU32, Ordering};

#[cfg(feature = "interpose")]
use super::calls::futex_wait;
#[cfg(feature = "interpose")]
use super::signals::set_signal_mask;
use crate::errno::Errno;
#[cfg(feature = "interpose")]
use crate::step::CloneCall;
use libc::{CLONE_FILES, CLONE_FS, CLONE_SIGHAND, CLONE_SYSVSEM, CLONE_THREAD, CLONE_VM};

/// What a thread shares, except the `fs_struct`.
const SHARED: u64 = (CLONE_VM | CLONE_FILES | CLONE_SYSVSEM | CLONE_SIGHAND | CLONE_THREAD) as u64;

/// A descriptor number that clone3 accepts as a number and that no process can have open: the kernel's
/// highest possible descriptor is below `INT_MAX`.
const NO_DESCRIPTOR: u64 = i32::MAX as u64;

const SPARE_BYTES: usize = 8192;

/// Where a child would stand if a kernel did grant a probe. It leaves at once, but a signal could reach it
/// before, and must not run its handler on the parent's stack.
#[repr(align(64))]
struct SpareStack(UnsafeCell<[u8; SPARE_BYTES]>);

// SAFETY: the bytes are never read or written through this value; only the kernel could push a signal frame.
unsafe impl Sync for SpareStack {}

static SPARE_STACK: SpareStack = SpareStack(UnsafeCell::new([0; SPARE_BYTES]));

fn spare_stack() -> usize {
    SPARE_STACK.0.get().addr()
}

/// Issues a clone-like call whose refusal is expected, or whose child is to end at once.
///
/// A return value of 0 does not distinguish a child from a parent whose call a filter "succeeded"; the stack
/// pointer does. A child, should a foreign kernel ever create one, stands on the spare stack and ends itself without
/// touching memory.
///
/// # Safety
/// `number` is clone or clone3 with a child stack inside [`SPARE_STACK`], `CLONE_VM` and `CLONE_THREAD` set,
/// and pointers the kernel may use while the call lasts.
#[cfg(target_arch = "x86_64")]
unsafe fn refused(number: libc::c_long, arguments: [usize; 5]) -> Result<(), Errno> {
    let [first, second, third, fourth, fifth] = arguments;
    let result: isize;
    // SAFETY: per the contract the parent's memory and stack stay untouched; a child never gets past `ud2`.
    unsafe {
        asm!(
            "mov {parent}, rsp",
            "syscall",
            "cmp rsp, {parent}",   // the same stack pointer: this is the parent
            "je 2f",
            "mov eax, 60",         // a child: exit(0), this thread only
            "xor edi, edi",
            "syscall",
            "ud2",
            "2:",
            parent = out(reg) _,
            inlateout("rax") number as isize => result,
            in("rdi") first,
            in("rsi") second,
            in("rdx") third,
            in("r10") fourth,
            in("r8") fifth,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    Errno::checked(result).map(drop)
}

fn clone3(flags: u64, bad_number: bool) -> Result<(), Errno> {
    let zero: [libc::pid_t; 1] = [0];
    // SAFETY: `clone_args` is plain numbers; zero means "not requested" in each.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags;
    args.stack = spare_stack() as u64;
    args.stack_size = SPARE_BYTES as u64;
    if bad_number {
        args.set_tid = zero.as_ptr().addr() as u64;
        args.set_tid_size = 1;
    } else {
        args.flags |= super::clone::INTO_CGROUP;
        args.cgroup = NO_DESCRIPTOR;
    }
    let pointer = (&raw const args).expose_provenance();
    let _ = zero.as_ptr().expose_provenance();
    // SAFETY: thread flags, spare stack, and both structures outlive the call.
    unsafe {
        refused(
            libc::SYS_clone3,
            [pointer, size_of::<libc::clone_args>(), 0, 0, 0],
        )
    }
}

/// A clone that the kernel always refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Probe {
    /// `clone3(NULL, 0)`: EINVAL from a kernel that has clone3 and lets the call through.
    Clone3Empty,
    /// clone3 without `CLONE_SIGHAND`: EINVAL before any limit is looked at. Its registers are those of a real one.
    Clone3Flags,
    /// clone3 with thread number 0: EINVAL inside `alloc_pid`, when everything before it passed. Without `fs`,
    /// `copy_fs` is skipped, and with it the check for a sibling inside execve.
    PidNumber { fs: bool },
    /// clone3 into a cgroup that is not open: EBADF right after `alloc_pid`, when everything before it passed.
    /// `copy_fs` is skipped.
    Cgroup,
    /// clone with the flags of every thread and a thread pointer outside user space: EPERM in `copy_thread`, when
    /// everything before it passed. Without `fs`, `copy_fs` is skipped.
    ThreadPointer { fs: bool },
}

/// Makes a probe.
pub(crate) fn probe(probe: Probe) -> Result<(), Errno> {
    const FS: u64 = CLONE_FS as u64;
    let with_fs = |fs| if fs { FS } else { 0 };
    match probe {
        // SAFETY: without arguments there is nothing to create; a size of 0 is refused before anything is read.
        Probe::Clone3Empty => unsafe { refused(libc::SYS_clone3, [0; 5]) },
        Probe::Clone3Flags => clone3(SHARED & !(CLONE_SIGHAND as u64), true),
        Probe::PidNumber { fs } => clone3(SHARED | with_fs(fs), true),
        Probe::Cgroup => clone3(SHARED, false),
        Probe::ThreadPointer { fs } => legacy(super::clone::FLAGS & !FS | with_fs(fs), usize::MAX),
    }
}

fn legacy(flags: u64, thread_pointer: usize) -> Result<(), Errno> {
    // Only a granted clone would write the two tid words; they may then outlive this frame, so they lie in
    // the spare stack's lowest bytes.
    let words = spare_stack();
    let top = spare_stack() + SPARE_BYTES;
    // SAFETY: thread flags, spare stack, tid words inside the spare stack.
    unsafe {
        refused(
            libc::SYS_clone,
            [flags as usize, top, words, words, thread_pointer],
        )
    }
}

/// Makes a thread, as glibc does, that ends at once if it is granted: nothing but its exit is run on the caller's
/// thread pointer (A1). By one thread at a time.
#[cfg(feature = "interpose")]
pub(crate) fn repeat(call: CloneCall) -> Result<(), Errno> {
    /// The thread's number, until it has ended.
    static TID: AtomicU32 = AtomicU32::new(0);
    /// The kernel sets the word before the call returns; a filter that answers in its place does not.
    const UNSET: u32 = u32::MAX;
    TID.store(UNSET, Ordering::Relaxed);
    let word = TID.as_ptr().expose_provenance();
    let tls = super::arch::thread_pointer();
    // SAFETY: `clone_args` is plain numbers; zero means "not requested" in each.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = super::clone::FLAGS;
    args.stack = spare_stack() as u64;
    args.stack_size = SPARE_BYTES as u64;
    args.parent_tid = word as u64;
    args.child_tid = word as u64;
    args.tls = tls as u64;
    let (number, arguments) = match call {
        CloneCall::Clone3 => {
            let pointer = (&raw const args).expose_provenance();
            let size = size_of::<libc::clone_args>();
            (libc::SYS_clone3, [pointer, size, 0, 0, 0])
        }
        CloneCall::Clone => {
            let top = spare_stack() + SPARE_BYTES;
            let flags = super::clone::FLAGS as usize;
            (libc::SYS_clone, [flags, top, word, word, tls])
        }
    };
    // The thread inherits the mask: no handler runs in it.
    let mask = set_signal_mask(!0);
    // SAFETY: thread flags, spare stack, and a word that is never gone.
    let answer = unsafe { refused(number, arguments) };
    while answer.is_ok() {
        match TID.load(Ordering::Acquire) {
            0 | UNSET => break,
            tid => futex_wait(&TID, tid, None),
        }
    }
    set_signal_mask(mask);
    answer
}

/// Whether anything in this pid namespace holds a number: a task, a process group or a session; ESRCH if not. Makes
/// it the owner of a file that sends no signals.
pub(crate) fn number_is_held(file: BorrowedFd<'_>, number: i32) -> Result<(), Errno> {
    // SAFETY: the call takes two plain numbers and no memory.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETOWN, number) };
    Errno::result(result)
}
