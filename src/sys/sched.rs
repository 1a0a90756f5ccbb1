//! Where and how a thread runs: affinity, scheduling policy, core scheduling, v1 cgroups. 0 is the calling thread.

use super::arch::syscall;
use crate::errno::Errno;
use std::os::fd::RawFd;

/// Words of a set of CPUs: as many as the largest kernel has (NR_CPUS is at most 8192).
pub(crate) const WORDS: usize = 8192 / 64;

/// What libc does not name.
pub(crate) const SCHED_DEADLINE: u32 = 6;

/// The numbers in a set.
pub(crate) fn list(cpus: &[u64]) -> impl Iterator<Item = usize> {
    let has = |cpu: &usize| {
        cpus.get(cpu / 64)
            .is_some_and(|word| word >> (cpu % 64) & 1 == 1)
    };
    (0..cpus.len() * 64).filter(has)
}

/// sched_setaffinity(2).
pub(crate) fn set_affinity(tid: libc::pid_t, cpus: &[u64]) -> Result<(), Errno> {
    let (start, length) = (cpus.as_ptr() as usize, size_of_val(cpus));
    let arguments = [tid as usize, length, start, 0, 0, 0];
    // SAFETY: the kernel reads the set, which outlives the call.
    Errno::checked(unsafe { syscall(libc::SYS_sched_setaffinity, arguments) }).map(drop)
}

/// sched_getaffinity(2). The set is zero where the kernel writes nothing.
pub(crate) fn affinity(tid: libc::pid_t) -> Result<[u64; WORDS], Errno> {
    let mut cpus = [0; WORDS];
    let (start, length) = (cpus.as_mut_ptr() as usize, size_of_val(&cpus));
    let arguments = [tid as usize, length, start, 0, 0, 0];
    // SAFETY: the kernel writes at most `length` bytes into the set.
    Errno::checked(unsafe { syscall(libc::SYS_sched_getaffinity, arguments) }).map(|_| cpus)
}

/// sched_setattr(2).
pub(crate) fn set_scheduler(tid: libc::pid_t, attributes: &libc::sched_attr) -> Result<(), Errno> {
    let start = std::ptr::from_ref(attributes) as usize;
    let arguments = [tid as usize, start, 0, 0, 0, 0];
    // SAFETY: the kernel reads as many bytes as the structure says, which is its size.
    Errno::checked(unsafe { syscall(libc::SYS_sched_setattr, arguments) }).map(drop)
}

/// sched_getattr(2).
pub(crate) fn scheduler(tid: libc::pid_t) -> Result<libc::sched_attr, Errno> {
    let mut attributes = attributes();
    let (start, size) = (&raw mut attributes as usize, size_of::<libc::sched_attr>());
    let arguments = [tid as usize, start, size, 0, 0, 0];
    // SAFETY: the kernel writes at most `size` bytes into the structure.
    Errno::checked(unsafe { syscall(libc::SYS_sched_getattr, arguments) }).map(|_| attributes)
}

/// An empty structure of this size.
pub(crate) fn attributes() -> libc::sched_attr {
    // SAFETY: `sched_attr` is plain numbers.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    attributes.size = size_of::<libc::sched_attr>() as u32;
    attributes
}

/// For the calling thread, with `PR_SCHED_CORE_CREATE` a cookie of its own, and with `PR_SCHED_CORE_SHARE_FROM` that of the
/// thread `tid`: prctl(2), `PR_SCHED_CORE`.
pub(crate) fn core_scheduling(operation: libc::c_int, tid: libc::pid_t) -> Result<(), Errno> {
    /// `PR_SCHED_CORE_SCOPE_THREAD`
    const THREAD: usize = 0;
    let (option, operation) = (libc::PR_SCHED_CORE as usize, operation as usize);
    let arguments = [option, operation, tid as usize, THREAD, 0, 0];
    // SAFETY: of these operations none takes a pointer.
    Errno::checked(unsafe { syscall(libc::SYS_prctl, arguments) }).map(drop)
}

/// Moves the calling thread into the cgroup whose open `tasks` file this is: a write of "0".
pub(crate) fn enter_cgroup(tasks: RawFd) -> Result<(), Errno> {
    let text = b"0";
    let start = text.as_ptr() as usize;
    let arguments = [tasks as usize, start, text.len(), 0, 0, 0];
    // SAFETY: the kernel reads the byte.
    Errno::checked(unsafe { syscall(libc::SYS_write, arguments) }).map(drop)
}
