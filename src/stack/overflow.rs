//! Reports of stack overflows, as std makes them, for threads of this crate.
//!
//! The handler runs on a signal stack in the thread's own mapping, tells a hit on the thread's guard
//! from any other fault, and hands every other fault on to the handler that was there before.

use super::Stack;
use crate::clone::sys;
use nix::errno::Errno;
use std::fmt::Write;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

const UNDECIDED: u8 = 0;
const OFF: u8 = 1;
const INSTALLING: u8 = 2;
const ON: u8 = 3;

static REPORTS: AtomicU8 = AtomicU8::new(UNDECIDED);

/// The handlers that were there: for SIGSEGV and SIGBUS, address (or SIG_DFL, SIG_IGN) and flags.
static PREVIOUS: [(AtomicUsize, AtomicUsize); 2] = [
    (AtomicUsize::new(libc::SIG_DFL), AtomicUsize::new(0)),
    (AtomicUsize::new(libc::SIG_DFL), AtomicUsize::new(0)),
];

/// The kernel can report a guard hit as either of these, and so does std's handler take both.
const SIGNALS: [libc::c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// Turns reports of stack overflows off, for a program that wants SIGSEGV for itself.
///
/// Reports are on by default: the first spawn installs a handler for SIGSEGV and SIGBUS that chains
/// to whatever was there before. To be called before the first spawn; false, and without effect,
/// if it comes too late. An overflow then still dies by SIGSEGV at the guard, without a word.
///
/// ```
/// assert!(nptl::disable_overflow_reports());
/// nptl::spawn(|| ()).unwrap().join().unwrap();
/// ```
pub fn disable_overflow_reports() -> bool {
    REPORTS
        .compare_exchange(UNDECIDED, OFF, Ordering::AcqRel, Ordering::Acquire)
        .map_or_else(|was| was == OFF, |_| true)
}

/// Whether threads get a signal stack; installs the handlers at the first call.
pub(crate) fn enabled() -> bool {
    match REPORTS.load(Ordering::Acquire) {
        ON => true,
        OFF => false,
        _ => install(),
    }
}

#[cold]
fn install() -> bool {
    let decided =
        REPORTS.compare_exchange(UNDECIDED, INSTALLING, Ordering::AcqRel, Ordering::Acquire);
    match decided {
        // Another thread is at it; a signal stack does no harm if it should fail there.
        Err(state) => state != OFF,
        Ok(_) => {
            for (signal, previous) in SIGNALS.iter().zip(&PREVIOUS) {
                // SAFETY: sigaction with valid structures. What was there is stored before it can
                // be needed: asked for first, replaced second.
                unsafe {
                    let mut old: libc::sigaction = std::mem::zeroed();
                    libc::sigaction(*signal, std::ptr::null(), &raw mut old);
                    previous.0.store(old.sa_sigaction, Ordering::Relaxed);
                    previous.1.store(old.sa_flags as usize, Ordering::Release);
                    let mut new: libc::sigaction = std::mem::zeroed();
                    new.sa_sigaction = handler as *const () as usize;
                    new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                    libc::sigaction(*signal, &raw const new, std::ptr::null_mut());
                }
            }
            REPORTS.store(ON, Ordering::Release);
            true
        }
    }
}

/// Makes the calling thread handle signals with SA_ONSTACK in its mapping.
pub(crate) fn use_signal_stack(stack: &Stack) -> Result<(), Errno> {
    let (base, size) = stack.signal_stack();
    let signal_stack = libc::stack_t {
        ss_sp: base as *mut libc::c_void,
        ss_flags: 0,
        ss_size: size,
    };
    // SAFETY: the range lies in this thread's mapping, which outlives it (rule 23).
    let answer = unsafe { libc::sigaltstack(&raw const signal_stack, std::ptr::null_mut()) };
    Errno::result(answer).map(drop)
}

/// # Safety
/// Called by the kernel as a handler with SA_SIGINFO, or so by a handler that chains to it.
unsafe extern "C" fn handler(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let (address, sent) = unsafe { ((*info).si_addr() as usize, (*info).si_code <= 0) };
    if let Some(stack) = crate::start::current()
        && !sent
        && (stack.base()..stack.bottom()).contains(&address)
    {
        report(stack);
    }
    // SAFETY: the arguments are the kernel's own.
    unsafe { chain(signal, info, context) }
}

/// Says what std says, and aborts.
fn report(stack: &Stack) -> ! {
    let mut line = Line::default();
    // SAFETY: the faulting thread itself.
    let name = unsafe { stack.name() }.unwrap_or("<unnamed>");
    // SAFETY: gettid has no preconditions.
    let tid = unsafe { libc::gettid() };
    // A name too long for the buffer is cut; the rest of the message then goes in the next line.
    let _ = write!(line, "\nthread '{name}' ({tid}) has overflowed its stack");
    line.print();
    let _ = writeln!(
        line,
        "\nnptl: stack_size={} guard_size={}\nfatal runtime error: stack overflow, aborting",
        stack.size(),
        stack.guard_size()
    );
    line.print();
    // SAFETY: abort never returns.
    unsafe { libc::abort() }
}

/// # Safety
/// The arguments of a handler with SA_SIGINFO, passed on.
unsafe fn chain(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = SIGNALS
        .iter()
        .zip(&PREVIOUS)
        .find(|(known, _)| **known == signal)
        .map(|(_, previous)| previous);
    let (address, flags) = previous.map_or((libc::SIG_DFL, 0), |previous| {
        let flags = previous.1.load(Ordering::Acquire) as libc::c_int;
        (previous.0.load(Ordering::Relaxed), flags)
    });
    // SAFETY: a handler address is of the type that its flags say; sigaction gets valid arguments.
    unsafe {
        match address {
            // Sent to a process that ignores it. The kernel lets nobody ignore a fault.
            libc::SIG_IGN if (*info).si_code <= 0 => {}
            // Back to the default, and return: the instruction faults again and the process dies
            // of it, with the right address in the core.
            libc::SIG_DFL | libc::SIG_IGN => {
                let mut default: libc::sigaction = std::mem::zeroed();
                default.sa_sigaction = libc::SIG_DFL;
                libc::sigaction(signal, &raw const default, std::ptr::null_mut());
                if (*info).si_code <= 0 {
                    // Sent by a process, not by a fault: nothing would happen again by itself. It
                    // is delivered as soon as this handler returns.
                    let _ = sys::tgkill(sys::process_id(), libc::gettid(), signal);
                }
            }
            _ if flags & libc::SA_SIGINFO != 0 => {
                type Action =
                    unsafe extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
                std::mem::transmute::<usize, Action>(address)(signal, info, context);
            }
            _ => {
                type Handler = unsafe extern "C" fn(libc::c_int);
                std::mem::transmute::<usize, Handler>(address)(signal);
            }
        }
    }
}

/// Formats without memory, for a signal handler.
struct Line {
    bytes: [u8; 512],
    length: usize,
}

impl Default for Line {
    fn default() -> Line {
        Line {
            bytes: [0; 512],
            length: 0,
        }
    }
}

impl Line {
    fn print(&mut self) {
        let text = self.bytes.get(..self.length).unwrap_or_default();
        // SAFETY: a valid buffer; a failed write to stderr has nobody to be told.
        unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
        self.length = 0;
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let Some(free) = self.bytes.get_mut(self.length..) else {
            return Ok(());
        };
        let length = text.len().min(free.len());
        if let (Some(to), Some(from)) = (free.get_mut(..length), text.as_bytes().get(..length)) {
            to.copy_from_slice(from);
            self.length += length;
        }
        Ok(())
    }
}
