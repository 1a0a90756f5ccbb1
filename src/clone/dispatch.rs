//! Makes libc fall back from clone3 to clone, where a filter answers clone3 with EPERM.
//!
//! glibc falls back on ENOSYS only, so that under Docker's old seccomp profile its `pthread_create` never
//! succeeds, and a calibration, which needs it, would be refused as well. Syscall user dispatch (Linux 5.11)
//! hands the system calls of one thread to a handler before any filter sees them:
//!
//! ```text
//!  pthread_create ─► rt_sigprocmask, mmap, … ─► SIGSYS ─► made for it, from inside the handler
//!                 ─► clone3 ──────────────────► SIGSYS ─► ENOSYS
//!                 ─► clone ───────────────────► SIGSYS ─► dispatch is opened, and the call repeated
//! ```
//!
//! Nothing is stepped around: what the handler makes is judged by every filter like any other call.

use super::{arch, errno_of, sys, syscall};
use libc::{c_int, c_void};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

const PR_SET_SYSCALL_USER_DISPATCH: usize = 59;
const OFF: usize = 0;
const ON: usize = 1;

/// `si_code` of a dispatched system call; a filter's trap has another.
const SYS_USER_DISPATCH: c_int = 2;

/// What the kernel reads before each system call of the dispatched thread.
static SELECTOR: AtomicU8 = AtomicU8::new(ALLOW);
const ALLOW: u8 = 0;
const BLOCK: u8 = 1;

const SIGSYS_BIT: sys::KernelSigSet = 1 << (libc::SIGSYS - 1);

/// The kernel's `struct sigaction`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Action {
    handler: usize,
    flags: usize,
    restorer: usize,
    mask: sys::KernelSigSet,
}

impl Action {
    const DEFAULT: Action = Action {
        handler: libc::SIG_DFL,
        flags: 0,
        restorer: 0,
        mask: 0,
    };
}

/// The program's own handler for SIGSYS, while ours is installed.
static PROGRAM: AtomicUsize = AtomicUsize::new(libc::SIG_DFL);

/// rt_sigaction(2) for SIGSYS; the action that was there before.
fn exchange(new: Option<&Action>) -> Action {
    const SA_RESTORER: usize = 0x0400_0000;
    let mut old = Action::DEFAULT;
    let new = new.map(|action| Action {
        flags: match action.restorer {
            0 => action.flags,
            _ => action.flags | SA_RESTORER,
        },
        ..*action
    });
    let new = new.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: both are the kernel's own structure; the handlers are ours or what was there before.
    unsafe {
        syscall(
            libc::SYS_rt_sigaction,
            [
                libc::SIGSYS as usize,
                new as usize,
                (&raw mut old) as usize,
                size_of::<sys::KernelSigSet>(),
                0,
                0,
            ],
        )
    };
    old
}

fn set_dispatch(mode: usize) -> bool {
    let (start, length, selector) = match mode {
        OFF => (0, 0, 0),
        _ => (
            arch::signal_return as *const () as usize,
            arch::SIGNAL_RETURN_LENGTH,
            SELECTOR.as_ptr() as usize,
        ),
    };
    // SAFETY: concerns the calling thread's system calls only; the selector is static.
    let answer = unsafe {
        syscall(
            libc::SYS_prctl,
            [
                PR_SET_SYSCALL_USER_DISPATCH,
                mode,
                start,
                length,
                selector,
                0,
            ],
        )
    };
    errno_of(answer).is_none()
}

/// Runs `work` in a world where clone3 is ENOSYS, up to its first clone; other threads are not concerned.
/// `None`: this kernel, or a filter, does not allow it, and `work` did not run.
///
/// # Safety
/// One thread at a time; application signals are blocked. `work` makes no thread but by clone(2), and no
/// system call before it that depends on the frame it is made from (vfork, rt_sigreturn).
pub(crate) unsafe fn without_clone3<T>(work: impl FnOnce() -> T) -> Option<T> {
    // A forced signal that is blocked would end the process.
    let mask = sys::set_signal_mask(sys::APPLICATION & !SIGSYS_BIT);
    let program = exchange(None);
    PROGRAM.store(program.handler, Ordering::SeqCst);
    let handler = on_system_call as *const () as usize;
    let ours = Action {
        handler,
        flags: libc::SA_SIGINFO as usize,
        restorer: arch::signal_return as *const () as usize,
        mask: sys::APPLICATION,
    };
    exchange(Some(&ours));
    let result = set_dispatch(ON).then(|| {
        SELECTOR.store(BLOCK, Ordering::SeqCst);
        let result = work();
        SELECTOR.store(ALLOW, Ordering::SeqCst);
        set_dispatch(OFF);
        result
    });
    // Unless the program has changed it meanwhile, from another thread.
    if exchange(None).handler == handler {
        exchange(Some(&program));
    }
    sys::set_signal_mask(mask);
    result
}

/// Uses neither libc nor thread-locals: it runs in the middle of either.
unsafe extern "C" fn on_system_call(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes both to a handler with SA_SIGINFO.
    let (code, mut call) = unsafe { ((*info).si_code, arch::Trapped::new(context)) };
    if code != SYS_USER_DISPATCH {
        // SAFETY: passed on.
        return unsafe { pass_on(info, context) };
    }
    match call.number() {
        libc::SYS_clone3 => call.answer(-(libc::ENOSYS as isize)),
        libc::SYS_clone => {
            // The child's stack is of this frame's caller, so the call is not to be made from here. No
            // later one is of interest, and the child is not dispatched (copy_process).
            SELECTOR.store(ALLOW, Ordering::SeqCst);
            call.repeat();
        }
        libc::SYS_rt_sigprocmask => {
            let [how, new, old, size, ..] = call.args();
            // SAFETY: the interrupted caller's own pointers, null or to sets of eight bytes.
            let answer = unsafe { change_mask(&mut call, how as c_int, new, old, size) };
            call.answer(answer);
        }
        number => {
            SELECTOR.store(ALLOW, Ordering::SeqCst);
            // SAFETY: what the interrupted code was about to do, from one frame deeper.
            let answer = unsafe { syscall(number, call.args()) };
            SELECTOR.store(BLOCK, Ordering::SeqCst);
            call.answer(answer);
        }
    }
}

/// What rt_sigprocmask(2) does, to the mask that the handler's return restores. SIGSYS stays open.
///
/// # Safety
/// `new` and `old` are null or point to a set.
unsafe fn change_mask(
    call: &mut arch::Trapped,
    how: c_int,
    new: usize,
    old: usize,
    size: usize,
) -> isize {
    if size != size_of::<sys::KernelSigSet>() {
        return -(libc::EINVAL as isize);
    }
    let mask = call.mask();
    let before = *mask;
    // SAFETY: passed on.
    if let Some(&new) = unsafe { (new as *const sys::KernelSigSet).as_ref() } {
        let after = match how {
            libc::SIG_BLOCK => before | new,
            libc::SIG_UNBLOCK => before & !new,
            libc::SIG_SETMASK => new,
            _ => return -(libc::EINVAL as isize),
        };
        *mask = after & !SIGSYS_BIT;
    }
    // SAFETY: passed on.
    if let Some(old) = unsafe { (old as *mut sys::KernelSigSet).as_mut() } {
        *old = before;
    }
    0
}

/// A SIGSYS that is not ours, most likely a filter's in another thread: the program's action has it.
///
/// # Safety
/// As a signal handler.
unsafe fn pass_on(info: *mut libc::siginfo_t, context: *mut c_void) {
    match PROGRAM.load(Ordering::SeqCst) {
        libc::SIG_IGN => {}
        libc::SIG_DFL => {
            exchange(Some(&Action::DEFAULT));
            // Blocked until this returns; then it ends the process.
            let tid = nix::unistd::gettid().as_raw();
            let _ = sys::tgkill(sys::process_id(), tid, libc::SIGSYS);
        }
        handler => {
            // SAFETY: a handler of the program's, in a signal handler. One that was registered without
            // SA_SIGINFO takes the first argument only.
            unsafe {
                let handler: unsafe extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                    std::mem::transmute(handler);
                handler(libc::SIGSYS, info, context);
            }
        }
    }
}
