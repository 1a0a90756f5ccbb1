//! Raw system calls for the places where libc's wrappers may not be used: they set `errno`, which
//! lies in TLS, and a thread has none that is its own before its first and after its last moment.

use super::arch::syscall;
use crate::errno::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Ends the calling thread, and only it: exit(2).
#[inline(always)]
pub(crate) fn exit_thread() -> ! {
    loop {
        // SAFETY: exit takes no pointer and does not return; the loop satisfies the type.
        unsafe { syscall(libc::SYS_exit, [0; 6]) };
    }
}

/// Waits with plain FUTEX_WAIT (operation 0: shared, relative time-out) while `word` holds
/// `expected`. The kernel wakes a cleared tid word with a shared wake. Returns early for any reason; the caller looks at
/// the word again.
pub(crate) fn futex_wait(word: &AtomicU32, expected: u32, timeout: Option<Duration>) {
    let spec = timeout.map(|t| libc::timespec {
        tv_sec: t.as_secs().min(i64::MAX as u64) as i64,
        tv_nsec: i64::from(t.subsec_nanos()),
    });
    let spec = spec.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word and the timespec outlive the call.
    unsafe { futex(word, libc::FUTEX_WAIT, expected, spec) };
}

/// Wakes one thread that sleeps in [`futex_wait`].
pub(crate) fn futex_wake(word: &AtomicU32) {
    // SAFETY: a wake touches no memory.
    unsafe { futex(word, libc::FUTEX_WAKE, 1, std::ptr::null()) };
}

const WAIT_PRIVATE: libc::c_int = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
const WAKE_PRIVATE: libc::c_int = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;

/// futex(2): FUTEX_WAIT or FUTEX_WAKE, private or not, because the system-call filters of VMMs allow
/// these operations (docs/seccomp.md). What it answers is ignored: a waiter reads the word again.
///
/// # Safety
/// To wait, word and time-out are valid until this returns. A word that is gone can be woken.
#[inline(always)]
unsafe fn futex(
    word: *const AtomicU32,
    operation: libc::c_int,
    value: u32,
    timeout: *const libc::timespec,
) {
    let arguments = [
        word as usize,
        operation as usize,
        value as usize,
        timeout as usize,
        0,
        0,
    ];
    // SAFETY: the kernel reads the word and the time-out while the call lasts, and writes nothing.
    unsafe { syscall(libc::SYS_futex, arguments) };
}

/// glibc's low-level lock: 0 free, 1 taken, 2 taken with waiters; private futex. It serves both
/// glibc's own list lock and the places where a thread has no TLS left for another lock.
#[inline(always)]
pub(crate) fn lll_lock(word: &AtomicU32) {
    if lll_try_lock(word) {
        return;
    }
    while word.swap(2, Ordering::Acquire) != 0 {
        // SAFETY: the word outlives the call; a spurious return only loops.
        unsafe { futex(word, WAIT_PRIVATE, 2, std::ptr::null()) };
    }
}

/// Like [`lll_lock`], but returns `false` instead of waiting.
#[inline(always)]
pub(crate) fn lll_try_lock(word: &AtomicU32) -> bool {
    word.compare_exchange(0, 1, Ordering::Acquire, Ordering::Relaxed)
        .is_ok()
}

/// Releases what [`lll_lock`] took.
#[inline(always)]
pub(crate) fn lll_unlock(word: &AtomicU32) {
    if word.swap(0, Ordering::Release) == 2 {
        // SAFETY: a wake touches no memory, so the word may be gone by now.
        unsafe { futex(word, WAKE_PRIVATE, 1, std::ptr::null()) };
    }
}

/// readlink(2). The length of what was written.
pub(crate) fn read_link(path: &std::ffi::CStr, into: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: a NUL-terminated path, and a buffer of this length.
    let answer = unsafe { libc::readlink(path.as_ptr(), into.as_mut_ptr().cast(), into.len()) };
    usize::try_from(answer).map_err(|_| Errno::last())
}

/// getdents64(2): entries of an open directory, as many as fit. The length of what was written, 0 at the end.
pub(crate) fn directory_entries(
    directory: BorrowedFd<'_>,
    into: &mut [u8],
) -> Result<usize, Errno> {
    let fd = directory.as_raw_fd() as usize;
    let buffer = into.as_mut_ptr() as usize;
    // SAFETY: the kernel writes no more than this length into the buffer.
    let answer = unsafe { syscall(libc::SYS_getdents64, [fd, buffer, into.len(), 0, 0, 0]) };
    Errno::checked(answer)
}

/// tgkill(2).
pub(crate) fn tgkill(pid: libc::pid_t, tid: libc::pid_t, signal: libc::c_int) -> Result<(), Errno> {
    // SAFETY: sending a signal touches no memory of ours.
    let answer = unsafe {
        syscall(
            libc::SYS_tgkill,
            [pid as usize, tid as usize, signal as usize, 0, 0, 0],
        )
    };
    Errno::checked(answer).map(drop)
}

/// The processor time that a thread of this process has used: clock_gettime(2).
pub(crate) fn cpu_time(tid: libc::pid_t) -> Result<Duration, Errno> {
    // The kernel's number for a thread's clock of user and system time (`CPUCLOCK_PERTHREAD_MASK`, `CPUCLOCK_SCHED`).
    let clock = nix::time::ClockId::from_raw((!tid << 3) | 4 | 2);
    let time = nix::time::clock_gettime(clock).map_err(Errno::of)?;
    Ok(Duration::from(time))
}

/// pidfd_open(2) with `PIDFD_THREAD` (Linux 6.9); close-on-exec, as every pidfd.
pub(crate) fn pidfd_open_thread(tid: libc::pid_t) -> Result<std::os::fd::OwnedFd, Errno> {
    use std::os::fd::FromRawFd;
    const PIDFD_THREAD: usize = libc::O_EXCL as usize;
    // SAFETY: takes no pointer.
    let answer = unsafe {
        syscall(
            libc::SYS_pidfd_open,
            [tid as usize, PIDFD_THREAD, 0, 0, 0, 0],
        )
    };
    // SAFETY: the kernel just made this descriptor for us, and nothing else has its number.
    let own = |descriptor| unsafe { std::os::fd::OwnedFd::from_raw_fd(descriptor as i32) };
    Errno::checked(answer).map(own)
}

/// pthread_atfork(3).
pub(crate) fn at_fork(
    prepare: extern "C" fn(),
    parent: extern "C" fn(),
    child: extern "C" fn(),
) -> Result<(), Errno> {
    // SAFETY: functions that anyone may call; the object that they are part of stays loaded (`keep_loaded`).
    match unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) } {
        0 => Ok(()),
        errno => Err(Errno::new(errno)),
    }
}

/// getpid(2), never cached.
pub(crate) fn process_id() -> libc::pid_t {
    nix::unistd::getpid().as_raw()
}

/// madvise(2), raw, so that a dying thread can use it.
///
/// # Safety
/// The range is the caller's to discard or protect.
#[inline(always)]
pub(crate) unsafe fn madvise(
    start: usize,
    length: usize,
    advice: libc::c_int,
) -> Result<(), Errno> {
    // SAFETY: the caller owns the range.
    let answer = unsafe { syscall(libc::SYS_madvise, [start, length, advice as usize, 0, 0, 0]) };
    Errno::checked(answer).map(drop)
}
