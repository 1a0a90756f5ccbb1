//! What the overflow handler leaves to the handler that was there before: everything but an overflow, as if it were
//! not there itself.
//!
//! Every case changes handlers, or dies, in a process of its own.

use nptl::Builder;
use std::arch::naked_asm;
use std::ffi::c_void;
use std::hint::black_box;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicI32, AtomicPtr, AtomicUsize};
use support::{Output, alone, case, child, or_skip, report};

type Info = *mut libc::siginfo_t;
type Context = *mut libc::ucontext_t;
type Handler = extern "C" fn(i32, Info, Context);

/// The flags of a handler that asks for nothing.
const PLAIN: i32 = 0;

/// Makes `handler` that of a signal.
fn install_for(signal: i32, handler: Handler, flags: i32, mask: &[i32]) -> libc::sigaction {
    // SAFETY: a handler of the type that SA_SIGINFO asks for, and valid structures.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = flags | libc::SA_SIGINFO;
        for &masked in mask {
            libc::sigaddset(&raw mut action.sa_mask, masked);
        }
        let mut old = std::mem::zeroed();
        assert_eq!(libc::sigaction(signal, &raw const action, &raw mut old), 0);
        old
    }
}

fn install(handler: Handler, flags: i32) {
    install_for(libc::SIGSEGV, handler, flags, &[]);
}

/// Runs `body` in a thread of the crate.
fn in_thread(body: impl FnOnce() + Send + 'static) {
    let builder = Builder::new().stack_size(256 << 10).name("a host");
    builder.spawn(body).unwrap().join().unwrap();
}

/// Runs over the end of the calling thread's stack.
#[inline(never)]
fn overflow(depth: usize) -> usize {
    let frame = black_box([depth; 64]);
    if depth == usize::MAX {
        return 0;
    }
    overflow(depth + 1) + frame[depth % 64]
}

/// The last thing in a case: after all that the program did with its signals, an overflow is still called one.
fn overflow_at_last() {
    // SAFETY: no preconditions.
    report("tid", unsafe { libc::gettid() });
    overflow(0);
}

#[track_caller]
fn assert_overflow_at_last(output: &Output) {
    let tid = output.get("tid").expect("it came that far");
    let line = format!("\nthread 'a host' ({tid}) has overflowed its stack\n");
    assert!(output.stderr.starts_with(&line), "{output}");
    assert_eq!(output.signal(), Some(libc::SIGABRT), "{output}");
}

#[track_caller]
fn assert_killed(output: &Output) {
    assert_eq!(output.get("ready"), Some("yes"), "{output}");
    assert_eq!(output.get("after"), None, "{output}");
    assert_eq!(output.stderr, "", "{output}");
    assert_eq!(output.signal(), Some(libc::SIGSEGV), "{output}");
}

/// The calling thread's stack, without its guard.
fn own_stack() -> Range<usize> {
    // SAFETY: places for the results, and attributes that the first call fills in.
    unsafe {
        let mut attributes = std::mem::zeroed();
        let (mut base, mut size) = (std::ptr::null_mut(), 0);
        let this = libc::pthread_self();
        assert_eq!(libc::pthread_getattr_np(this, &raw mut attributes), 0);
        libc::pthread_attr_getstack(&raw const attributes, &raw mut base, &raw mut size);
        libc::pthread_attr_destroy(&raw mut attributes);
        base.addr()..base.addr() + size
    }
}

fn own_signal_stack() -> Range<usize> {
    // SAFETY: a null argument only asks.
    unsafe {
        let mut stack: libc::stack_t = std::mem::zeroed();
        assert_eq!(libc::sigaltstack(std::ptr::null(), &raw mut stack), 0);
        stack.ss_sp.addr()..stack.ss_sp.addr() + stack.ss_size
    }
}

/// A thread of the crate can set a signal stack of its own, here of a length that is no multiple of anything.
fn replace_signal_stack(disarmed: bool) {
    const SS_AUTODISARM: i32 = 1 << 31;
    let memory = Box::leak(vec![0_u8; 100_001].into_boxed_slice());
    let stack = libc::stack_t {
        ss_sp: memory.as_mut_ptr().cast(),
        ss_flags: if disarmed { SS_AUTODISARM } else { 0 },
        ss_size: memory.len(),
    };
    // SAFETY: memory that is never freed.
    let answer = unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) };
    assert_eq!(answer, 0);
}

/// The calling thread's signal mask, as the kernel keeps it.
fn mask() -> usize {
    let mut mask = 0;
    // SAFETY: a null argument only asks, and the kernel's set is eight bytes.
    let answer = unsafe {
        let none = std::ptr::null::<usize>();
        libc::syscall(libc::SYS_rt_sigprocmask, 0, none, &raw mut mask, 8)
    };
    assert_eq!(answer, 0);
    mask
}

const fn bit(signal: i32) -> usize {
    1 << (signal - 1)
}

/// A page without access until [`allow`].
fn forbidden_page() -> usize {
    // SAFETY: a new mapping.
    let page = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_NONE, flags, -1, 0)
    };
    assert_ne!(page, libc::MAP_FAILED);
    page.addr()
}

fn allow(address: usize) {
    let page = (address & !4095) as *mut c_void;
    // SAFETY: a page of `forbidden_page`.
    let answer = unsafe { libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_WRITE) };
    assert_eq!(answer, 0);
}

/// Writes to an address.
#[unsafe(naked)]
extern "C" fn store(_address: usize) {
    naked_asm!(
        ".cfi_startproc",
        "mov byte ptr [rdi], 1",
        "ret",
        ".cfi_endproc"
    )
}

/// Bytes of the instruction in [`store`].
const STORE_LENGTH: i64 = 3;

/// What [`look`] does about a fault.
static REMEDY: AtomicI32 = AtomicI32::new(ALLOW);
const ALLOW: i32 = 0;
const STEP_OVER: i32 = 1;
const JUMP: i32 = 2;

/// Where it jumps to.
static BUFFER: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

/// What it saw.
static CALLS: AtomicUsize = AtomicUsize::new(0);
static ADDRESS: AtomicUsize = AtomicUsize::new(0);
static INTERRUPTED: AtomicUsize = AtomicUsize::new(0);
static OLD_MASK: AtomicUsize = AtomicUsize::new(0);
static MASK: AtomicUsize = AtomicUsize::new(0);
/// An address in its frame.
static FRAME: AtomicUsize = AtomicUsize::new(0);

extern "C" fn look(signal: i32, info: Info, context: Context) {
    CALLS.fetch_add(1, Relaxed);
    // SAFETY: what the kernel says about a fault.
    let (sent, address) = unsafe {
        assert_eq!((*info).si_signo, signal);
        let stack_pointer = (*context).uc_mcontext.gregs[libc::REG_RSP as usize];
        INTERRUPTED.store(stack_pointer as usize, Relaxed);
        // The kernel's set is the first word of glibc's.
        let mask = (&raw const (*context).uc_sigmask).cast::<usize>().read();
        OLD_MASK.store(mask, Relaxed);
        ((*info).si_code <= 0, (*info).si_addr().addr())
    };
    FRAME.store((&raw const address).addr(), Relaxed);
    MASK.store(mask(), Relaxed);
    if sent {
        return;
    }
    ADDRESS.store(address, Relaxed);
    match REMEDY.load(Relaxed) {
        ALLOW => allow(address),
        // SAFETY: the fault is in `store`.
        STEP_OVER => unsafe {
            (*context).uc_mcontext.gregs[libc::REG_RIP as usize] += STORE_LENGTH;
        },
        // SAFETY: `attempt` is on the stack, and nothing between here and there needs dropping.
        _ => unsafe { siglongjmp(BUFFER.load(Relaxed), 1) },
    }
}

/// A program that ignores SIGSEGV is sent one, twice: the first must not undo that.
#[test]
fn a_sent_signal_stays_ignored() {
    let test = "chain::a_sent_signal_stays_ignored";
    let Some(case) = case() else {
        for case in ["plain", "with flags"] {
            or_skip!(child(test, case).run()).success();
        }
        return;
    };
    // SAFETY: SIG_IGN is no code; the signals go to this thread, which ignores them.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = libc::SIG_IGN;
        if case == "with flags" {
            action.sa_flags = libc::SA_RESETHAND | libc::SA_NODEFER;
        }
        libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut());
        nptl::spawn(|| ()).unwrap().join().unwrap();
        for _ in 0..2 {
            libc::raise(libc::SIGSEGV);
        }
    }
}

/// On the stack of the thread, or with SA_ONSTACK on its signal stack, and with the kernel's arguments.
#[test]
fn a_handler_runs_where_it_asked_to() {
    let test = "chain::a_handler_runs_where_it_asked_to";
    let Some(case) = case() else {
        for case in ["its own stack", "the signal stack"] {
            for signal_stack in ["", " by the program", " by the program, disarmed"] {
                let case = format!("{case}{signal_stack}");
                assert_overflow_at_last(&or_skip!(child(test, &case).run()));
            }
        }
        return;
    };
    let on_stack = case.starts_with("the signal stack");
    install(look, if on_stack { libc::SA_ONSTACK } else { PLAIN });
    in_thread(move || {
        if case.contains("by the program") {
            replace_signal_stack(case.ends_with("disarmed"));
        }
        let (stack, signal_stack) = (own_stack(), own_signal_stack());
        for remedy in [ALLOW, STEP_OVER, ALLOW, ALLOW] {
            REMEDY.store(remedy, Relaxed);
            let address = forbidden_page() + 7;
            store(address);
            assert_eq!(ADDRESS.swap(0, Relaxed), address);
            let (frame, interrupted) = (FRAME.load(Relaxed), INTERRUPTED.load(Relaxed));
            assert!(stack.contains(&interrupted));
            let place = if on_stack { &signal_stack } else { &stack };
            assert!(place.contains(&frame), "{frame:x} in {place:x?}");
            assert!(on_stack || frame < interrupted - 128);
            assert_eq!(own_signal_stack(), signal_stack);
        }
        assert_eq!(CALLS.load(Relaxed), 4);
        overflow_at_last();
    });
}

/// A thread of std has a signal stack, too, and as little to do with ours.
#[test]
fn a_handler_runs_on_the_stack_of_a_thread_of_std() {
    alone(
        "chain::a_handler_runs_on_the_stack_of_a_thread_of_std",
        || {
            install(look, PLAIN);
            in_thread(|| ());
            let body = || {
                assert!(!own_signal_stack().is_empty());
                store(forbidden_page());
                assert!(own_stack().contains(&FRAME.load(Relaxed)));
            };
            std::thread::spawn(body).join().unwrap();
            assert_eq!(CALLS.load(Relaxed), 1);
        },
    );
}

/// A signal that was sent, to a thread that waits in the kernel: SA_RESTART is the program's, too.
#[test]
fn a_sent_signal_restarts_a_call_as_the_handler_asks() {
    let test = "chain::a_sent_signal_restarts_a_call_as_the_handler_asks";
    let Some(case) = case() else {
        for case in ["SA_RESTART", "EINTR"] {
            or_skip!(child(test, case).run()).success();
        }
        return;
    };
    let restart = case == "SA_RESTART";
    install(look, if restart { libc::SA_RESTART } else { PLAIN });
    let mut ends = [0; 2];
    // SAFETY: a place for two descriptors.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    let body = move || {
        let mut byte = 0_u8;
        // SAFETY: a place for one byte.
        let read = unsafe { libc::read(ends[0], (&raw mut byte).cast(), 1) };
        assert_eq!(read, if restart { 1 } else { -1 });
        assert!(own_stack().contains(&FRAME.load(Relaxed)));
    };
    let handle = nptl::spawn(body).unwrap();
    let waits = || {
        let status = format!("/proc/self/task/{}/syscall", handle.tid());
        let call = std::fs::read_to_string(status).unwrap_or_default();
        call.starts_with("0 ")
    };
    while !waits() {
        std::thread::yield_now();
    }
    handle.kill(libc::SIGSEGV).unwrap();
    while CALLS.load(Relaxed) == 0 {
        std::thread::yield_now();
    }
    if restart {
        // SAFETY: one byte.
        unsafe { libc::write(ends[1], [1_u8].as_ptr().cast(), 1) };
    }
    handle.join().unwrap();
}

/// A handler of the program that came later, replaced ours and calls it: then all run where that one runs.
#[test]
fn a_later_handler_can_call_ours() {
    static OURS: AtomicUsize = AtomicUsize::new(0);
    extern "C" fn later(signal: i32, info: Info, context: Context) {
        let ours = OURS.load(Relaxed);
        assert_ne!(ours, look as *const () as usize);
        // SAFETY: what sigaction gave with SA_SIGINFO.
        let ours: Handler = unsafe { std::mem::transmute(ours) };
        ours(signal, info, context);
        let here = 0_u8;
        assert!(FRAME.load(Relaxed) < (&raw const here).addr());
        LATER.fetch_add(1, Relaxed);
    }
    static LATER: AtomicUsize = AtomicUsize::new(0);
    let test = "chain::a_later_handler_can_call_ours";
    if case().is_none() {
        for case in ["its own stack", "the signal stack"] {
            let output = or_skip!(child(test, case).run());
            if case == "the signal stack" {
                assert_overflow_at_last(&output);
            } else {
                output.success();
            }
        }
        return;
    }
    let on_stack = case().as_deref() == Some("the signal stack");
    install(look, PLAIN);
    in_thread(|| ());
    let flags = if on_stack { libc::SA_ONSTACK } else { PLAIN };
    let ours = install_for(libc::SIGSEGV, later, flags, &[]);
    OURS.store(ours.sa_sigaction, Relaxed);
    in_thread(move || {
        let place = if on_stack {
            own_signal_stack()
        } else {
            own_stack()
        };
        for faults in 1..=3 {
            store(forbidden_page());
            assert_eq!(CALLS.load(Relaxed), faults);
            assert_eq!(LATER.load(Relaxed), faults);
            assert!(place.contains(&FRAME.load(Relaxed)));
        }
        if on_stack {
            overflow_at_last();
        }
    });
}

/// The unwinder finds the way from the handler through the frame to the fault, and nothing else in between.
#[test]
fn a_backtrace_in_a_handler_reaches_the_fault() {
    static FRAMES: [AtomicUsize; 8] = [const { AtomicUsize::new(0) }; 8];
    #[inline(never)]
    fn unwind() {
        let mut frames = [std::ptr::null_mut(); FRAMES.len()];
        // SAFETY: a place for so many addresses.
        unsafe { libc::backtrace(frames.as_mut_ptr(), frames.len() as i32) };
        for (frame, found) in FRAMES.iter().zip(frames) {
            frame.store(found.addr(), Relaxed);
        }
    }
    extern "C" fn tell(_: i32, info: Info, _: Context) {
        unwind();
        // SAFETY: what the kernel says about a fault.
        allow(unsafe { (*info).si_addr() }.addr());
    }
    let test = "chain::a_backtrace_in_a_handler_reaches_the_fault";
    let Some(case) = case() else {
        for case in ["its own stack", "the signal stack"] {
            or_skip!(child(test, case).run()).success();
        }
        return;
    };
    let on_stack = case == "the signal stack";
    install(tell, if on_stack { libc::SA_ONSTACK } else { PLAIN });
    // The first time, it loads the unwinder.
    unwind();
    in_thread(|| store(forbidden_page()));
    let frames: Vec<_> = FRAMES.iter().map(|frame| frame.load(Relaxed)).collect();
    // `unwind`, `tell`, glibc's restorer, and then what was interrupted.
    let fault = store as *const () as usize;
    assert!((fault..fault + 4).contains(&frames[3]), "{frames:x?}");
    assert_ne!(frames[5], 0, "{frames:x?}");
}

/// All that a function can have in registers of the FPU, and below its stack pointer.
#[repr(C, align(64))]
#[derive(Clone, Copy, Debug, PartialEq)]
struct FpuState {
    vectors: [[u32; 16]; 32],
    red_zone: [u64; 16],
    x87: [u8; 16],
    mxcsr: u32,
}

/// A function that loads a [`FpuState`], writes to an address, and stores what it then has.
macro_rules! with_state {
    ($name:ident, $registers:literal, $move:literal, $register:literal) => {
        #[unsafe(naked)]
        extern "C" fn $name(_address: usize, _state: *mut FpuState) {
            naked_asm!(
                "push rax",
                "stmxcsr [rsp]",
                ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                "mov rax, [rsi + 2048 + 8*\\i]",
                "mov [rsp - 128 + 8*\\i], rax",
                ".endr",
                concat!(".irp i, ", $registers),
                concat!($move, " ", $register, "\\i, [rsi + 64*\\i]"),
                ".endr",
                "fld tbyte ptr [rsi + 2176]",
                "ldmxcsr [rsi + 2192]",
                "mov byte ptr [rdi], 1",
                "stmxcsr [rsi + 2192]",
                "fstp tbyte ptr [rsi + 2176]",
                concat!(".irp i, ", $registers),
                concat!($move, " [rsi + 64*\\i], ", $register, "\\i"),
                ".endr",
                ".irp i, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
                "mov rax, [rsp - 128 + 8*\\i]",
                "mov [rsi + 2048 + 8*\\i], rax",
                ".endr",
                "ldmxcsr [rsp]",
                "pop rax",
                "ret",
            )
        }
    };
}

with_state!(
    with_sse,
    "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "movdqu",
    "xmm"
);
with_state!(
    with_avx,
    "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
    "vmovdqu",
    "ymm"
);
with_state!(
    with_avx512,
    "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31",
    "vmovdqu64",
    "zmm"
);

/// Loads something else everywhere.
fn spoil_registers() {
    let mut state = state(0x5555_0000);
    state.mxcsr = 0x1f80;
    for spoil in functions_with_state() {
        spoil((&raw mut state.red_zone).addr(), &raw mut state);
    }
    // SAFETY: empties the x87 registers, which no function may leave in use.
    unsafe { std::arch::asm!("fninit") };
}

fn state(seed: u32) -> FpuState {
    let mut state = FpuState {
        vectors: [[0; 16]; 32],
        red_zone: std::array::from_fn(|at| u64::from(seed) << 32 | at as u64),
        // Pi, in 80 bits.
        x87: [
            0x35, 0xc2, 0x68, 0x21, 0xa2, 0xda, 0x0f, 0xc9, 0x00, 0x40, 0, 0, 0, 0, 0, 0,
        ],
        // All exceptions masked, rounding towards zero.
        mxcsr: 0x7f80,
    };
    for (number, vector) in state.vectors.iter_mut().enumerate() {
        *vector = std::array::from_fn(|at| seed | (number * 16 + at) as u32);
    }
    state
}

fn functions_with_state() -> Vec<extern "C" fn(usize, *mut FpuState)> {
    let mut functions: Vec<extern "C" fn(usize, *mut FpuState)> = vec![with_sse];
    if std::arch::is_x86_feature_detected!("avx") {
        functions.push(with_avx);
    }
    if std::arch::is_x86_feature_detected!("avx512f") {
        functions.push(with_avx512);
    }
    functions
}

/// The handler's frame has moved, and the registers in it: they come back, and so do the handler's changes to them.
#[test]
fn registers_survive_a_handler_on_the_threads_stack() {
    const CHANGED: u32 = 0x1234_5678;
    extern "C" fn spoil(_: i32, info: Info, context: Context) {
        spoil_registers();
        // SAFETY: what the kernel says about a fault, and where it will load xmm3 from.
        unsafe {
            (*(*context).uc_mcontext.fpregs)._xmm[3].element[1] = CHANGED;
            allow((*info).si_addr().addr());
        }
        FRAME.store((&raw const info).addr(), Relaxed);
        CALLS.fetch_add(1, Relaxed);
    }
    let test = "chain::registers_survive_a_handler_on_the_threads_stack";
    let Some(case) = case() else {
        for case in ["its own stack", "the signal stack"] {
            assert_overflow_at_last(&or_skip!(child(test, case).run()));
        }
        return;
    };
    let on_stack = case == "the signal stack";
    install(spoil, if on_stack { libc::SA_ONSTACK } else { PLAIN });
    in_thread(move || {
        let functions = functions_with_state();
        for (number, function) in functions.iter().enumerate() {
            let mut expected = state(0xabc0_0000);
            let mut found = expected;
            function(forbidden_page(), &raw mut found);
            assert_eq!(CALLS.load(Relaxed), number + 1);
            expected.vectors[3][1] = CHANGED;
            assert!(found == expected, "{found:x?}");
            let stack = if on_stack {
                own_signal_stack()
            } else {
                own_stack()
            };
            assert!(stack.contains(&FRAME.load(Relaxed)));
        }
        overflow_at_last();
    });
}

/// Each fault of the handler is handled by itself, one frame below the other.
#[test]
fn a_handler_can_fault_itself() {
    const DEPTH: usize = 20;
    extern "C" fn nest(_: i32, info: Info, _: Context) {
        // SAFETY: what the kernel says about a fault.
        let address = unsafe { (*info).si_addr() }.addr();
        let outer = FRAME.swap((&raw const address).addr(), Relaxed);
        assert!((&raw const address).addr() < outer);
        if CALLS.fetch_add(1, Relaxed) + 1 < DEPTH {
            let mut found = state(CALLS.load(Relaxed) as u32 * 0x1000);
            let expected = found;
            functions_with_state().last().unwrap()(forbidden_page(), &raw mut found);
            assert!(found == expected);
        }
        assert!(own_stack().contains(&FRAME.load(Relaxed)));
        allow(address);
    }
    let test = "chain::a_handler_can_fault_itself";
    if case().is_none() {
        assert_overflow_at_last(&or_skip!(child(test, "run").run()));
        return;
    }
    install(nest, libc::SA_NODEFER);
    in_thread(|| {
        FRAME.store(usize::MAX, Relaxed);
        store(forbidden_page());
        assert_eq!(CALLS.load(Relaxed), DEPTH);
        overflow_at_last();
    });
}

unsafe extern "C" {
    fn __sigsetjmp(buffer: *mut c_void, save_mask: i32) -> i32;
    fn siglongjmp(buffer: *mut c_void, value: i32) -> !;
}

/// Writes to an address: 0, or 1 if a handler jumped back.
#[unsafe(naked)]
extern "C" fn attempt(_buffer: *mut c_void, _save_mask: i32, _address: usize) -> i32 {
    naked_asm!(
        "push rbx",
        "mov rbx, rdx",
        "call {sigsetjmp}",
        "test eax, eax",
        "jnz 2f",
        "mov byte ptr [rbx], 1",
        "xor eax, eax",
        "2:",
        "pop rbx",
        "ret",
        sigsetjmp = sym __sigsetjmp,
    )
}

/// As programs do that probe memory: not even the first leaves the kernel or us in the belief that a handler still runs.
#[test]
fn handlers_can_jump_out_for_ever() {
    let test = "chain::handlers_can_jump_out_for_ever";
    let cases = [
        ("nodefer", libc::SA_NODEFER, 0),
        ("saved mask", PLAIN, 1),
        (
            "signal stack, nodefer",
            libc::SA_NODEFER | libc::SA_ONSTACK,
            0,
        ),
        ("signal stack, saved mask", libc::SA_ONSTACK, 1),
    ];
    let Some(case) = case() else {
        for (case, ..) in cases {
            let output = or_skip!(child(test, case).run());
            assert_eq!(output.get("jumps"), Some("1000"), "{case}: {output}");
            assert_overflow_at_last(&output);
        }
        return;
    };
    let (_, flags, save_mask) = cases.into_iter().find(|(name, ..)| *name == case).unwrap();
    install(look, flags);
    REMEDY.store(JUMP, Relaxed);
    in_thread(move || {
        let mut buffer = [0_u64; 64];
        BUFFER.store(buffer.as_mut_ptr().cast(), Relaxed);
        let (page, before) = (forbidden_page(), mask());
        for jumps in 1..=1000 {
            assert_eq!(attempt(buffer.as_mut_ptr().cast(), save_mask, page), 1);
            assert_eq!(CALLS.load(Relaxed), jumps);
            assert_eq!(mask(), before);
            let on_stack = own_signal_stack().contains(&FRAME.load(Relaxed));
            assert_eq!(on_stack, flags & libc::SA_ONSTACK != 0);
        }
        report("jumps", CALLS.load(Relaxed));
        overflow_at_last();
    });
}

#[test]
fn a_handler_has_its_mask() {
    let test = "chain::a_handler_has_its_mask";
    let cases = [
        ("plain", PLAIN, bit(libc::SIGSEGV)),
        ("nodefer", libc::SA_NODEFER, 0),
        ("signal stack", libc::SA_ONSTACK, bit(libc::SIGSEGV)),
    ];
    let Some(case) = case() else {
        for (case, ..) in cases {
            assert_overflow_at_last(&or_skip!(child(test, case).run()));
        }
        return;
    };
    let (_, flags, own) = cases.into_iter().find(|(name, ..)| *name == case).unwrap();
    let also = [libc::SIGUSR1, libc::SIGWINCH];
    install_for(libc::SIGSEGV, look, flags, &also);
    // Not that of the other signal.
    install_for(libc::SIGBUS, look, flags, &[]);
    in_thread(move || {
        let before = mask();
        store(forbidden_page());
        assert_eq!(OLD_MASK.load(Relaxed), before);
        let expected = before | own | bit(libc::SIGUSR1) | bit(libc::SIGWINCH);
        assert_eq!(MASK.load(Relaxed), expected);
        assert_eq!(mask(), before);
        // SAFETY: to this thread, whose handler only looks.
        unsafe { libc::raise(libc::SIGBUS) };
        let own = if own == 0 { 0 } else { bit(libc::SIGBUS) };
        assert_eq!(MASK.load(Relaxed), before | own);
        assert_eq!(CALLS.load(Relaxed), 2);
        overflow_at_last();
    });
}

#[test]
fn a_handler_for_one_fault_handles_one() {
    let test = "chain::a_handler_for_one_fault_handles_one";
    let Some(case) = case() else {
        for case in ["its own stack", "the signal stack"] {
            let output = or_skip!(child(test, case).run());
            assert_eq!(output.get("handled"), Some("1"), "{output}");
            assert_killed(&output);
        }
        return;
    };
    let on_stack = case == "the signal stack";
    let flags = if on_stack { libc::SA_ONSTACK } else { PLAIN };
    install(look, flags | libc::SA_RESETHAND);
    in_thread(|| {
        store(forbidden_page());
        report("handled", CALLS.load(Relaxed));
        report("ready", "yes");
        store(forbidden_page());
        report("after", "alive");
    });
}

/// Where the kernel finds no room for a handler's frame it kills, whatever the handler's flags.
#[test]
fn a_handler_for_which_the_stack_has_no_room_does_not_run() {
    #[unsafe(naked)]
    extern "C" fn store_at(_address: usize, _stack_pointer: usize) {
        naked_asm!(
            "mov rax, rsp",
            "mov rsp, rsi",
            "mov byte ptr [rdi], 1",
            "mov rsp, rax",
            "ret",
        )
    }
    extern "C" fn tell(_: i32, _: Info, _: Context) {
        report("after", "handler");
        // SAFETY: ends the process.
        unsafe { libc::_exit(1) };
    }
    let test = "chain::a_handler_for_which_the_stack_has_no_room_does_not_run";
    let Some(case) = case() else {
        for case in ["plain", "nodefer", "nowhere nodefer"] {
            assert_killed(&or_skip!(child(test, case).run()));
        }
        return;
    };
    let flags = if case.ends_with("nodefer") {
        libc::SA_NODEFER
    } else {
        PLAIN
    };
    install(tell, flags);
    in_thread(move || {
        let page = forbidden_page();
        report("ready", "yes");
        let stack_pointer = match &*case {
            // Not canonical: not even a page fault.
            "nowhere nodefer" => 1 << 60,
            _ => own_stack().start + 512,
        };
        store_at(page, stack_pointer);
        report("after", "return");
    });
}
