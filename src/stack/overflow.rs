//! Reports of stack overflows, as std makes them, for threads of this crate.
//!
//! The handler runs on a signal stack in the thread's own mapping and reports a hit on the thread's guard. Any
//! other fault goes to the handler that was there before, which runs with the mask and the flags
//! that it was installed with, and on the stack on which it would have run without this one.

use super::record::{RECORDS, Stack};
use crate::mem::text::Text;
use crate::sys::{self, Faults, Next};
use std::fmt::Write;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

const UNDECIDED: u8 = 0;
const OFF: u8 = 1;
const INSTALLING: u8 = 2;
const ON: u8 = 3;

static REPORTS: AtomicU8 = AtomicU8::new(UNDECIDED);

/// The actions that were there, for [`SIGNALS`]: handler (or SIG_DFL, SIG_IGN) and flags.
static PREVIOUS: [(AtomicUsize, AtomicUsize); 2] = [
    (AtomicUsize::new(libc::SIG_DFL), AtomicUsize::new(0)),
    (AtomicUsize::new(libc::SIG_DFL), AtomicUsize::new(0)),
];

/// The kernel can report a guard hit as either of these, and so does std's handler take both.
const SIGNALS: [libc::c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// Turns reports of stack overflows off, for a program that wants SIGSEGV for itself.
///
/// Reports are on by default: the first spawn installs a handler for SIGSEGV and SIGBUS. Faults that are no overflow go
/// to the handler that was there before, with its mask and its flags, and on the signal stack only if it has
/// SA_ONSTACK. A handler of the program that is installed later replaces this one, and should call it.
///
/// Must be called before the first spawn: later it has no effect and returns `false`. With reports off an overflow
/// still ends the process with SIGSEGV, at the guard, without a message.
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
                // be needed: it is read first, and replaced second.
                unsafe {
                    let mut action: libc::sigaction = std::mem::zeroed();
                    libc::sigaction(*signal, std::ptr::null(), &raw mut action);
                    previous.0.store(action.sa_sigaction, Ordering::Relaxed);
                    previous
                        .1
                        .store(action.sa_flags as usize, Ordering::Release);
                    // The flags and the mask of a handler stay in force. Without a handler they have no
                    // meaning, and SA_RESETHAND would end SIG_IGN at the first signal.
                    if matches!(action.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN) {
                        action = std::mem::zeroed();
                    }
                    action.sa_sigaction = sys::fault_handler::<Overflows> as *const () as usize;
                    action.sa_flags |= libc::SA_SIGINFO | libc::SA_ONSTACK;
                    libc::sigaction(*signal, &raw const action, std::ptr::null_mut());
                }
            }
            REPORTS.store(ON, Ordering::Release);
            true
        }
    }
}

/// Makes the calling thread handle signals with SA_ONSTACK in its mapping, unless a filter denies that.
pub(crate) fn use_signal_stack(stack: &Stack) {
    let (base, size) = stack.signal_stack();
    let signal_stack = libc::stack_t {
        ss_sp: base as *mut libc::c_void,
        ss_flags: 0,
        ss_size: size,
    };
    // SAFETY: the range lies in this thread's mapping, which outlives it (G23).
    unsafe { libc::sigaltstack(&raw const signal_stack, std::ptr::null_mut()) };
}

const RETURN: Next = Next {
    handler: 0,
    distance: 0,
};

/// Reports an overflow; every other SIGSEGV or SIGBUS goes to the action that was there before.
///
/// Neither the heap nor this crate's thread-locals are used: in a shared object the first access to a thread-local
/// calls malloc, and the fault may have interrupted malloc.
struct Overflows;

impl Faults for Overflows {
    unsafe extern "C" fn decide(
        signal: libc::c_int,
        info: *const libc::siginfo_t,
        context: *const libc::ucontext_t,
        frame: usize,
    ) -> Next {
        // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
        let (address, sent) = unsafe { ((*info).si_addr() as usize, (*info).si_code <= 0) };
        if !sent && let Some(stack) = running_here() {
            if (stack.base()..stack.bottom()).contains(&address) {
                report(stack);
            }
            // A handler has overflowed the signal stack. Its stack pointer is below that stack, so the kernel has started
            // there from the top again, over the handler's frames: no handler can continue from here.
            if (stack.top()..stack.signal_stack().0).contains(&address) {
                use_default_action(signal, false);
                return RETURN;
            }
        }
        let previous = &PREVIOUS[usize::from(signal == SIGNALS[1])];
        let flags = previous.1.load(Ordering::Acquire) as libc::c_int;
        match previous.0.load(Ordering::Relaxed) {
            // The kernel does not let a program ignore a fault.
            libc::SIG_IGN if sent => RETURN,
            libc::SIG_DFL | libc::SIG_IGN => {
                use_default_action(signal, sent);
                RETURN
            }
            handler => Next {
                handler,
                distance: match flags & libc::SA_ONSTACK {
                    0 => leave_signal_stack(info, context, frame),
                    _ => 0,
                },
            },
        }
    }
}

/// Takes the handler off the signal stack, on which it would not have run without this crate. If the interrupted stack
/// has no room for the frame, the write faults while every signal is blocked, and the kernel kills the process.
fn leave_signal_stack(
    info: *const libc::siginfo_t,
    context: *const libc::ucontext_t,
    frame: usize,
) -> isize {
    let mask = sys::set_signal_mask(!0);
    // SAFETY: the arguments of the fault handler, which continues on the copy at once.
    let distance = unsafe { sys::leave_signal_stack(info, context, frame) };
    sys::set_signal_mask(mask);
    distance
}

/// The record of the stack that the calling thread runs on, found by the thread pointer.
fn running_here() -> Option<&'static Stack> {
    let thread = sys::thread_pointer();
    // A record without a tid word has lost its mapping, and another record may describe the same addresses.
    RECORDS
        .iter()
        .find(|stack| stack.block.thread_pointer() == thread && stack.tid_word().is_some())
}

/// Restores the default action. When the handler has returned, the instruction faults again and kills the process,
/// with the right address in the core.
fn use_default_action(signal: libc::c_int, sent: bool) {
    // SAFETY: all zeroes is SIG_DFL without flags; tgkill takes plain numbers.
    unsafe {
        let default: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, &raw const default, std::ptr::null_mut());
        if sent {
            // No instruction faults again. This signal is delivered as soon as the handler returns.
            let _ = sys::tgkill(sys::process_id(), libc::gettid(), signal);
        }
    }
}

/// Says what std says, and aborts.
fn report(stack: &Stack) -> ! {
    let mut line = Text::EMPTY;
    // SAFETY: the faulting thread itself.
    let name = unsafe { stack.name() }.unwrap_or("<unnamed>");
    // SAFETY: gettid has no preconditions.
    let tid = unsafe { libc::gettid() };
    // A name too long for the buffer is cut; the rest of the message then goes in the next line.
    let _ = write!(line, "\nthread '{name}' ({tid}) has overflowed its stack");
    print(&mut line);
    let _ = writeln!(
        line,
        "\nnptl: stack_size={} guard_size={}\nfatal runtime error: stack overflow, aborting",
        stack.size(),
        stack.guard_size()
    );
    print(&mut line);
    // SAFETY: abort never returns.
    unsafe { libc::abort() }
}

/// Writes to stderr and empties the line. A failed write cannot be reported.
fn print(line: &mut Text<512>) {
    let text = line.as_bytes();
    // SAFETY: a valid buffer of that length.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
    line.clear();
}
