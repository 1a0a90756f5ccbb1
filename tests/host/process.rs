//! Child processes, made in each of the ways that there are.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// What forks.
pub type Fork = unsafe extern "C" fn() -> libc::pid_t;

unsafe extern "C" {
    /// With atfork handlers, after which glibc and the crate are whole in the child.
    pub fn fork() -> libc::pid_t;
    /// Without.
    pub fn _Fork() -> libc::pid_t;
}

/// The system call by itself, of which glibc knows nothing.
pub unsafe extern "C" fn bare_clone() -> libc::pid_t {
    // SAFETY: a copy of this process, on a copy of this stack.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    libc::pid_t::try_from(pid).expect("a process id")
}

/// Children of these get no threads.
pub const BARE: [Fork; 2] = [_Fork, bare_clone];

/// Seconds that a child has. Who waits for it kills it then, because a spawn that hangs has signals blocked; SIGALRM is
/// for those that no thread waits for.
const PATIENCE: u32 = 20;

/// Forks, and gives the child a limited time.
pub fn forked(how: Fork) -> libc::pid_t {
    // SAFETY: the callers see to it that the child keeps to what it may do.
    let pid = unsafe { how() };
    assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid == 0 {
        // SAFETY: takes a number.
        unsafe { libc::alarm(PATIENCE) };
    }
    pid
}

/// Runs `work` in a forked child, which then exits with 0, or 1 if it panics. Its wait status.
#[must_use]
pub fn in_child(how: Fork, work: impl FnOnce()) -> i32 {
    let pid = forked(how);
    if pid == 0 {
        let failed = catch_unwind(AssertUnwindSafe(work)).is_err();
        // SAFETY: none of the parent's destructors may run.
        unsafe { libc::_exit(i32::from(failed)) };
    }
    wait(pid)
}

/// Whether all was well in the child.
#[must_use]
pub fn is_good(how: Fork, work: impl FnOnce()) -> bool {
    in_child(how, work) == 0
}

pub fn wait(pid: libc::pid_t) -> i32 {
    let mut status = -1;
    // SAFETY: a child of this process that no other thread waits for, and valid places.
    let ended = unsafe {
        let child = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        let child = i32::try_from(child).expect("a descriptor");
        assert!(child >= 0, "{}", std::io::Error::last_os_error());
        let mut entry = libc::pollfd {
            fd: child,
            events: libc::POLLIN,
            revents: 0,
        };
        let patience = i32::try_from(PATIENCE).expect("seconds") * 1000;
        if libc::poll(&raw mut entry, 1, patience) == 0 {
            libc::kill(pid, libc::SIGKILL);
        }
        libc::close(child);
        libc::waitpid(pid, &raw mut status, 0)
    };
    assert_eq!(ended, pid, "{}", std::io::Error::last_os_error());
    status
}
