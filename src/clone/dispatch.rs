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
//!
//! glibc's own signals, 32 and 33, may interrupt the thread only while the handler makes a call for it. Their
//! handlers return through glibc's rt_sigreturn, which works on the frame that it is made from, so it can be
//! neither dispatched nor made by ours. While a call waits they must be open: for the lock of the list of
//! threads, for one, whose holder can wait for this thread's answer (rule 3 of facts/glibc-rules.md). So all
//! signals are blocked here, and the mask that libc believes to have is kept beside.

use super::{arch, errno_of, sys, syscall};
use libc::{c_int, c_void};
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};

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

/// The dispatched thread, by its thread pointer; 0 while there is none.
static THREAD: AtomicUsize = AtomicUsize::new(0);

/// Its signal mask, as it set it itself.
static MASK: AtomicU64 = AtomicU64::new(0);

/// That mask with SIGSYS open: a forced signal that is blocked would end the process.
fn wanted_mask() -> sys::KernelSigSet {
    MASK.load(Ordering::SeqCst) & !SIGSYS_BIT
}

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

/// The program's own action for SIGSYS, while ours is installed.
static PROGRAM: Stored = Stored {
    handler: AtomicUsize::new(libc::SIG_DFL),
    flags: AtomicUsize::new(0),
    restorer: AtomicUsize::new(0),
    mask: AtomicU64::new(0),
};

struct Stored {
    handler: AtomicUsize,
    flags: AtomicUsize,
    restorer: AtomicUsize,
    mask: AtomicU64,
}

impl Stored {
    fn store(&self, action: &Action) {
        self.handler.store(action.handler, Ordering::SeqCst);
        self.flags.store(action.flags, Ordering::SeqCst);
        self.restorer.store(action.restorer, Ordering::SeqCst);
        self.mask.store(action.mask, Ordering::SeqCst);
    }

    fn load(&self) -> Action {
        Action {
            handler: self.handler.load(Ordering::SeqCst),
            flags: self.flags.load(Ordering::SeqCst),
            restorer: self.restorer.load(Ordering::SeqCst),
            mask: self.mask.load(Ordering::SeqCst),
        }
    }
}

/// rt_sigaction(2) for SIGSYS; the action that was there before, or `None` where a filter refuses.
fn exchange(new: Option<&Action>) -> Option<Action> {
    let mut old = Action::DEFAULT;
    let new = new.map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: both are the kernel's own structure; the handlers are ours or what was there before.
    let answer = unsafe {
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
    errno_of(answer).is_none().then_some(old)
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
    let handler = on_system_call as *const () as usize;
    let there = exchange(None)?;
    // In the child of a `_Fork` in the middle of this it is ours, and what was there before is known.
    if there.handler != handler {
        PROGRAM.store(&there);
    }
    let program = PROGRAM.load();
    const SA_RESTORER: usize = 0x0400_0000;
    let inherited = program.flags & (libc::SA_ONSTACK | libc::SA_RESTART) as usize;
    let ours = Action {
        handler,
        flags: libc::SA_SIGINFO as usize | SA_RESTORER | inherited,
        restorer: arch::signal_return as *const () as usize,
        mask: !0,
    };
    exchange(Some(&ours))?;
    let mask = sys::set_signal_mask(!SIGSYS_BIT);
    MASK.store(mask, Ordering::SeqCst);
    THREAD.store(super::thread_pointer(), Ordering::SeqCst);
    let result = set_dispatch(ON).then(|| {
        SELECTOR.store(BLOCK, Ordering::SeqCst);
        let result = work();
        SELECTOR.store(ALLOW, Ordering::SeqCst);
        set_dispatch(OFF);
        result
    });
    THREAD.store(0, Ordering::SeqCst);
    // Unless the program has changed it meanwhile, from another thread.
    if exchange(None).is_some_and(|there| there.handler == handler) {
        exchange(Some(&program));
    }
    sys::set_signal_mask(mask);
    result
}

/// Uses neither libc nor thread-locals: it runs in the middle of either.
///
/// # Safety
/// Called by the kernel as a handler of SIGSYS with SA_SIGINFO.
unsafe extern "C" fn on_system_call(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes both to a handler with SA_SIGINFO.
    let (code, mut call) = unsafe { ((*info).si_code, arch::Trapped::new(context)) };
    let own = super::thread_pointer() == THREAD.load(Ordering::SeqCst);
    if !own {
        // SAFETY: passed on.
        return unsafe { pass_on(info, context) };
    }
    if code != SYS_USER_DISPATCH {
        // A filter's, in a call that is made below, or sent by somebody in between.
        let selector = SELECTOR.swap(ALLOW, Ordering::SeqCst);
        // SAFETY: passed on.
        unsafe { pass_on(info, context) };
        sys::set_signal_mask(!0);
        SELECTOR.store(selector, Ordering::SeqCst);
        return;
    }
    match call.number() {
        libc::SYS_clone3 => call.answer(-(libc::ENOSYS as isize)),
        libc::SYS_clone => {
            // The child's stack is of this frame's caller, so the call is not to be made from here. No
            // later one is of interest, and the child is not dispatched (copy_process).
            SELECTOR.store(ALLOW, Ordering::SeqCst);
            *call.mask() = wanted_mask();
            call.repeat();
        }
        libc::SYS_rt_sigprocmask => {
            let [how, new, old, size, ..] = call.args();
            // SAFETY: the interrupted caller's own pointers, null or to sets of eight bytes.
            let answer = unsafe { change_mask(how as c_int, new, old, size) };
            call.answer(answer);
        }
        number => {
            SELECTOR.store(ALLOW, Ordering::SeqCst);
            sys::set_signal_mask(wanted_mask());
            // SAFETY: what the interrupted code was about to do, from one frame deeper.
            let answer = unsafe { syscall(number, call.args()) };
            sys::set_signal_mask(!0);
            SELECTOR.store(BLOCK, Ordering::SeqCst);
            call.answer(answer);
        }
    }
}

/// What rt_sigprocmask(2) does, to [`MASK`].
///
/// # Safety
/// `new` and `old` are null or point to a set.
unsafe fn change_mask(how: c_int, new: usize, old: usize, size: usize) -> isize {
    if size != size_of::<sys::KernelSigSet>() {
        return -(libc::EINVAL as isize);
    }
    let before = MASK.load(Ordering::SeqCst);
    // SAFETY: passed on.
    if let Some(&new) = unsafe { (new as *const sys::KernelSigSet).as_ref() } {
        let after = match how {
            libc::SIG_BLOCK => before | new,
            libc::SIG_UNBLOCK => before & !new,
            libc::SIG_SETMASK => new,
            _ => return -(libc::EINVAL as isize),
        };
        MASK.store(after, Ordering::SeqCst);
    }
    // SAFETY: passed on.
    if let Some(old) = unsafe { (old as *mut sys::KernelSigSet).as_mut() } {
        *old = before;
    }
    0
}

/// A SIGSYS that is not ours, most likely a filter's in another thread: the program's action has it, with
/// the mask that it asked for.
///
/// # Safety
/// As a signal handler.
unsafe fn pass_on(info: *mut libc::siginfo_t, context: *mut c_void) {
    let program = PROGRAM.load();
    // SAFETY: as a signal handler's.
    let sent = unsafe { (*info).si_code } <= 0;
    match program.handler {
        // The kernel lets nobody ignore a filter's.
        libc::SIG_IGN if sent => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            exchange(Some(&Action::DEFAULT));
            // Blocked until this returns; then it ends the process.
            let tid = nix::unistd::gettid().as_raw();
            let _ = sys::tgkill(sys::process_id(), tid, libc::SIGSYS);
        }
        handler => {
            let own = match program.flags & libc::SA_NODEFER as usize {
                0 => SIGSYS_BIT,
                _ => 0,
            };
            // SAFETY: a handler of the program's, in a signal handler, with the context of one. One that
            // was registered without SA_SIGINFO takes the first argument only.
            unsafe {
                let interrupted = *arch::Trapped::new(context).mask();
                sys::set_signal_mask(interrupted | program.mask | own);
                let handler: unsafe extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                    std::mem::transmute(handler);
                handler(libc::SIGSYS, info, context);
            }
        }
    }
}
