//! x86-64: the system call instruction, the two clones, and the new thread's first frame.
//!
//! ```text
//!  creator's stack                    new stack
//!  ───────────────                    ──────────────────────────────── high
//!  return address  ◄─ ret             ┌─────────────────────────────┐ ◄ rsp after the system call
//!        ▲                            │ return address into         │ ◄ pushed by `call start`;
//!        │ rax = tid or -errno        │   nptl_thread_entry         │   its CFI says: no caller
//!   [ syscall ] ── rax = 0 ─────────► │ frames of EntryPoint::main       │
//!                  r9  = argument     │             ↓               │
//! ```
//!
//! The kernel gives the child a copy of every register but `rax`, `rcx` and `r11`, so the argument
//! travels in `r9`; nothing has to be written to the new stack before the thread exists.

#[cfg(feature = "interpose")]
use crate::sys::cancel::{
    __pthread_register_cancel, __pthread_unregister_cancel, __pthread_unwind_next, __sigsetjmp,
    pthread_setcancelstate, pthread_setcanceltype,
};
#[cfg(feature = "interpose")]
use crate::sys::entry::Routine;
use crate::sys::entry::{EntryPoint, Faults};
use core::arch::{asm, naked_asm};
#[cfg(feature = "interpose")]
use core::mem::offset_of;
#[cfg(feature = "interpose")]
use core::sync::atomic::{AtomicU32, AtomicUsize};
use libc::{c_void, clone_args};

/// A system call, without `errno`: the kernel's own answer, `-errno` on failure.
///
/// # Safety
/// As the system call itself; memory named by the arguments must be valid for it.
#[inline(always)]
pub(crate) unsafe fn syscall(number: libc::c_long, args: [usize; 6]) -> isize {
    let result: isize;
    // SAFETY: the instruction clobbers rcx, r11 and rax only; what the call does is the caller's
    // responsibility. Memory is not marked untouched, so nothing is reordered across it.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") number as isize => result,
            in("rdi") args[0],
            in("rsi") args[1],
            in("rdx") args[2],
            in("r10") args[3],
            in("r8") args[4],
            in("r9") args[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

/// clone3(2). Returns in the creator only: the thread id, or `-errno`.
///
/// # Safety
/// `args` must describe a stack and a TLS block that nothing else uses, with a thread's flags;
/// `start` is handed to [`EntryPoint::main`] and must satisfy its contract.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn clone3<E: EntryPoint>(
    args: *const clone_args,
    size: usize,
    start: *mut c_void,
) -> isize {
    naked_asm!(
        ".cfi_startproc",
        "mov r9, rdx",    // start: the only register the child needs, untouched by the kernel
        "mov eax, 435",   // __NR_clone3; rdi and rsi already hold its arguments
        "syscall",
        "test rax, rax",
        "jz {entry}",     // child: rsp is the new stack; a jump, so that no frame is above it
        "ret",            // creator: rax is the tid or -errno
        ".cfi_endproc",
        entry = sym nptl_thread_entry::<E>,
    )
}

/// clone(2), for kernels and filters without clone3. Returns in the creator only.
///
/// # Safety
/// The stack below `stack_top`, which is 16-byte aligned, the block at `thread_pointer` and `start` are what
/// [`EntryPoint::main`] requires, and belong to the new thread alone.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn clone<E: EntryPoint>(
    flags: usize,
    stack_top: usize,
    parent_tid: *mut libc::pid_t,
    child_tid: *mut libc::pid_t,
    thread_pointer: usize,
    start: *mut c_void,
) -> isize {
    naked_asm!(
        ".cfi_startproc",
        "mov r10, rcx",   // the kernel takes its fourth argument in r10, C passes it in rcx
        "mov eax, 56",    // __NR_clone; rdi, rsi, rdx, r8 are in place, start is in r9 already
        "syscall",
        "test rax, rax",
        "jz {entry}",
        "ret",
        ".cfi_endproc",
        entry = sym nptl_thread_entry::<E>,
    )
}

/// Calls `run(argument)` on the stack that ends at `top`, and returns to this one.
///
/// # Safety
/// The stack is long enough for `run`, aligned to 16 bytes, and used by this call alone until it returns; `run` does not unwind, and
/// gets the argument that it is written for.
#[cfg(feature = "interpose")]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn call_on(
    top: usize,
    run: extern "C" fn(*mut c_void),
    argument: *mut c_void,
) {
    naked_asm!(
        ".cfi_startproc",
        "push rbp",
        ".cfi_def_cfa_offset 16",
        ".cfi_offset rbp, -16",
        "mov rbp, rsp", // preserved by run
        ".cfi_def_cfa_register rbp",
        "mov rsp, rdi",
        "mov rdi, rdx",
        "call rsi",
        "mov rsp, rbp",
        "pop rbp",
        ".cfi_def_cfa rsp, 8",
        "ret",
        ".cfi_endproc",
    )
}

/// The body of a naked `vfork()`. `$refused` is an `extern "C" fn(errno: c_int) -> pid_t` that a refusal goes on in.
///
/// vfork(2) returns twice on one stack, and whatever the child pushes lies where the parent's return address did. So that
/// is kept in a register, of which the kernel gives each of the two its own. On a shadow stack the child has written over
/// it as well: its entry is taken off without a comparison.
#[cfg(feature = "interpose")]
macro_rules! vfork {
    ($refused:path) => {
        core::arch::naked_asm!(
            ".cfi_startproc",
            "pop rdi",          // the return address
            ".cfi_adjust_cfa_offset -8",
            ".cfi_register rip, rdi",
            "mov eax, 58",      // __NR_vfork
            "syscall",
            "test eax, eax",
            "js 3f",
            "xor ecx, ecx",
            "rdsspq rcx",       // without a shadow stack it does nothing
            "test rcx, rcx",
            "jz 2f",
            "mov ecx, 1",
            "incsspq rcx",
            "2:",
            "jmp rdi",          // parent and child
            "3:",
            "push rdi",         // there is no child: as at the entry
            ".cfi_adjust_cfa_offset 8",
            ".cfi_offset rip, -8",
            "mov edi, eax",
            "neg edi",
            "jmp {refused}",
            ".cfi_endproc",
            refused = sym $refused,
        )
    };
}
#[cfg(feature = "interpose")]
pub(crate) use vfork;

/// The first frame of every thread: where backtraces and gdb's `bt` end.
///
/// # Safety
/// Jumped to by the child side of [`clone3`] and [`clone`], with the argument in `r9`.
#[unsafe(naked)]
unsafe extern "C" fn nptl_thread_entry<E: EntryPoint>() -> ! {
    naked_asm!(
        ".cfi_startproc",
        ".cfi_undefined rip", // no return address: the unwinder's walk is over
        "xor ebp, ebp",       // for walkers of frame pointers, too
        "mov rdi, r9",
        "call {main}",        // rsp is 16-byte aligned here, as the ABI wants it before a call
        "ud2",                // main never returns
        ".cfi_endproc",
        main = sym E::main,
    )
}

/// The calling thread's thread pointer, which on x86-64 is its `struct pthread`.
#[inline(always)]
pub(crate) fn thread_pointer() -> usize {
    let pointer: usize;
    // SAFETY: the x86-64 TLS ABI keeps the thread pointer at %fs:0.
    unsafe { asm!("mov {}, fs:0", out(reg) pointer, options(nostack, readonly, preserves_flags)) };
    pointer
}

/// The handler of SIGSEGV and SIGBUS. It calls [`Faults::decide`] and then jumps to the handler
/// that was there before, which finds the registers, the stack pointer and the return address that the kernel would
/// have given to it. No frame of ours stays on the stack, and a shadow stack is as the kernel left it.
///
/// # Safety
/// Called by the kernel as a handler with SA_SIGINFO, or by a handler that passes its own arguments on.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn fault_handler<F: Faults>(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut c_void,
) {
    naked_asm!(
        ".cfi_startproc",
        "push rdi",
        ".cfi_adjust_cfa_offset 8",
        "push rsi",
        ".cfi_adjust_cfa_offset 8",
        "push rdx",
        ".cfi_adjust_cfa_offset 8",
        "lea rcx, [rsp + 24]", // rsp at the entry: where the kernel's frame begins
        "call {decide}",       // rsp is 16-byte aligned here
        "mov rcx, rdx",        // rcx = distance, rax = handler or 0
        "pop rdx",
        ".cfi_adjust_cfa_offset -8",
        "pop rsi",
        ".cfi_adjust_cfa_offset -8",
        "pop rdi",
        ".cfi_adjust_cfa_offset -8",
        "test rax, rax",
        "jz 2f",
        "add rdx, rcx",        // context, siginfo and return address were moved together
        "add rsi, rcx",
        "add rsp, rcx",
        "mov rcx, rax",
        "xor eax, eax",        // as the kernel does, for a handler without a prototype
        "jmp rcx",
        "2:",
        "ret",
        ".cfi_endproc",
        decide = sym F::decide,
    )
}

/// Copies the frame of a signal from the signal stack to where the kernel would have built it without SA_ONSTACK,
/// and returns the distance in bytes. 0: nothing was copied, because the kernel did not switch stacks, or because
/// this is not the kernel's frame (another handler called ours, or valgrind delivers the signal).
///
/// ```text
///  frame ► │ return address │ ucontext │ siginfo │ vector registers │ ◄ end of the signal stack
/// ```
///
/// On a signal stack that was not in use the frame reaches up to the end. Nothing in it depends on its address but
/// the pointer to the vector registers, which are aligned to 64 bytes: so all of it is copied as one block, by a
/// multiple of 64. If the interrupted stack has no room, the write faults while all signals are blocked, and the
/// kernel kills the process with SIGSEGV, as it does when it has no room for its own frame.
///
/// # Safety
/// The arguments are those of a handler with SA_SIGINFO and the stack pointer at its entry. If the result is not
/// 0, the caller continues on the copy at once. Every signal is blocked.
pub(crate) unsafe fn leave_signal_stack(
    info: *const libc::siginfo_t,
    context: *const libc::ucontext_t,
    frame: usize,
) -> isize {
    const CONTEXT: usize = size_of::<usize>();
    /// The kernel's `struct ucontext` has 304 bytes; glibc's is longer.
    const INFO: usize = CONTEXT + 304;
    const RED_ZONE: usize = 128;
    if context.addr() != frame + CONTEXT || info.addr() != frame + INFO {
        return 0;
    }
    // SAFETY: the kernel's frame, alive while its handler runs; these fields lie in the kernel's part.
    let (stack, interrupted, vectors) = unsafe {
        (
            (*context).uc_stack,
            (*context).uc_mcontext.gregs[libc::REG_RSP as usize] as usize,
            (*context).uc_mcontext.fpregs.addr(),
        )
    };
    let base = stack.ss_sp.addr();
    // The kernel's own test.
    let is_on_signal_stack = |sp: usize| sp > base && sp - base <= stack.ss_size;
    if !is_on_signal_stack(frame) || is_on_signal_stack(interrupted) {
        return 0;
    }
    let end = base + stack.ss_size;
    let distance = interrupted.wrapping_sub(RED_ZONE).wrapping_sub(end) as isize & !63;
    let copy = frame.wrapping_add_signed(distance);
    // SAFETY: the interrupted code uses nothing below its red zone. Whether that is memory at all is the program's
    // responsibility, as it is when the kernel writes there.
    unsafe {
        core::ptr::copy(frame as *const u8, copy as *mut u8, end - frame);
        let context = (copy + CONTEXT) as *mut libc::ucontext_t;
        if vectors != 0 {
            let vectors = vectors.wrapping_add_signed(distance);
            (&raw mut (*context).uc_mcontext.fpregs).write(vectors as *mut _);
        }
    }
    distance
}

/// Calls `routine.start` so that pthread_exit(3) and cancellation end in this frame, as they end in the first frame of a
/// thread of glibc's (G33); then `routine.finish`, which runs the thread's destructors. Returns when that is done.
///
/// ```text
///  r12 = 0        start(argument); its result into the descriptor        finish ──► return
///  r12 = 1        after a forced unwind, which comes here by longjmp  ──► finish ──┘ (a destructor can call
///                                                                            pthread_exit: then once more)
/// ```
/// Unwinders end here, so that an exception that is not caught finds no handler, and std::terminate runs with the whole
/// stack below it.
///
/// # Safety
/// Called by a thread of this crate with cancellation disabled. `finish` makes it impossible as its last act. What is called may unwind
/// into this frame, so no frame with destructors of Rust may lie above it.
#[cfg(feature = "interpose")]
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn call_routine(routine: *const Routine) {
    naked_asm!(
        ".cfi_startproc",
        ".cfi_undefined rip",    // no caller
        "push rbx",
        ".cfi_adjust_cfa_offset 8",
        "push r12",
        ".cfi_adjust_cfa_offset 8",
        "sub rsp, {buffer}",     // rsp = the buffer, 16-byte aligned
        ".cfi_adjust_cfa_offset {buffer}",
        "mov rbx, rdi",
        "mov rdi, rsp",
        "xor esi, esi",
        "call {setjmp}",
        "mov r12d, eax",
        "test eax, eax",
        "jz 2f",
        "mov rdi, rsp",          // a cleanup handler has left its own buffer registered
        "call {unregister}",
        ".weak __asan_handle_no_return", // AddressSanitizer, if it is there: frames are gone that it still guards
        "mov rax, [rip + __asan_handle_no_return@GOTPCREL]",
        "test rax, rax",
        "jz 2f",
        "call rax",
        "2:",
        "mov rdi, rsp",
        "call {register}",
        "test r12d, r12d",
        "jnz 3f",
        "xor edi, edi",          // PTHREAD_CANCEL_ENABLE
        "xor esi, esi",
        "call {set_state}",
        "mov rdi, [rbx + {argument}]",
        "call [rbx + {start}]",
        "mov rcx, [rbx + {result}]",
        "mov [rcx], rax",
        "3:",
        "call [rbx + {finish}]",
        "mov rdi, rsp",
        "call {unregister}",
        "add rsp, {buffer}",
        ".cfi_adjust_cfa_offset -{buffer}",
        "pop r12",
        ".cfi_adjust_cfa_offset -8",
        "pop rbx",
        ".cfi_adjust_cfa_offset -8",
        "ret",
        ".cfi_endproc",
        buffer = const size_of::<UnwindBuffer>(),
        start = const offset_of!(Routine, start),
        argument = const offset_of!(Routine, argument),
        result = const offset_of!(Routine, result),
        finish = const offset_of!(Routine, finish),
        setjmp = sym __sigsetjmp,
        register = sym __pthread_register_cancel,
        unregister = sym __pthread_unregister_cancel,
        set_state = sym pthread_setcancelstate,
    )
}

/// futex(2) as a cancellation point: returns what the kernel answers. If the calling thread is cancelled before or
/// meanwhile, stores `released` to `claim`, and the unwinding goes on (G34).
///
/// # Safety
/// Word, time-out and claim are valid until this returns or unwinds. No frame with destructors of Rust may lie below it.
#[cfg(feature = "interpose")]
#[unsafe(naked)]
pub(crate) unsafe extern "C-unwind" fn futex_cancellable(
    word: *const AtomicU32,
    operation: libc::c_int,
    value: u32,
    timeout: *const libc::timespec,
    claim: *const AtomicUsize,
    released: usize,
) -> isize {
    naked_asm!(
        ".cfi_startproc",
        "push rbx",
        ".cfi_adjust_cfa_offset 8",
        ".cfi_rel_offset rbx, 0",
        "push rbp",
        ".cfi_adjust_cfa_offset 8",
        ".cfi_rel_offset rbp, 0",
        "push r12",
        ".cfi_adjust_cfa_offset 8",
        ".cfi_rel_offset r12, 0",
        "push r13",
        ".cfi_adjust_cfa_offset 8",
        ".cfi_rel_offset r13, 0",
        "push r14",
        ".cfi_adjust_cfa_offset 8",
        ".cfi_rel_offset r14, 0",
        "push r15",
        ".cfi_adjust_cfa_offset 8",
        ".cfi_rel_offset r15, 0",
        "sub rsp, {frame}",      // rsp = the buffer, 16-byte aligned; behind it the type that was set
        ".cfi_adjust_cfa_offset {frame}",
        "mov rbx, rdi",
        "mov ebp, esi",
        "mov r12d, edx",
        "mov r13, rcx",
        "mov r14, r8",
        "mov r15, r9",
        "mov rdi, rsp",
        "xor esi, esi",
        "call {setjmp}",
        "test eax, eax",
        "jnz 2f",
        "mov rdi, rsp",
        "call {register}",
        "mov edi, 1",            // PTHREAD_CANCEL_ASYNCHRONOUS
        "lea rsi, [rsp + {buffer}]",
        "call {set_type}",
        "mov rdi, rbx",
        "mov esi, ebp",
        "mov edx, r12d",
        "mov r10, r13",
        "xor r8d, r8d",
        "mov r9d, -1",           // FUTEX_BITSET_MATCH_ANY, for operations with a set
        "mov eax, 202",          // __NR_futex
        "syscall",
        "mov rbx, rax",
        "mov edi, [rsp + {buffer}]",
        "xor esi, esi",
        "call {set_type}",
        "mov rdi, rsp",
        "call {unregister}",
        "mov rax, rbx",
        "add rsp, {frame}",
        ".cfi_remember_state",
        ".cfi_adjust_cfa_offset -{frame}",
        "pop r15",
        ".cfi_adjust_cfa_offset -8",
        ".cfi_restore r15",
        "pop r14",
        ".cfi_adjust_cfa_offset -8",
        ".cfi_restore r14",
        "pop r13",
        ".cfi_adjust_cfa_offset -8",
        ".cfi_restore r13",
        "pop r12",
        ".cfi_adjust_cfa_offset -8",
        ".cfi_restore r12",
        "pop rbp",
        ".cfi_adjust_cfa_offset -8",
        ".cfi_restore rbp",
        "pop rbx",
        ".cfi_adjust_cfa_offset -8",
        ".cfi_restore rbx",
        "ret",
        "2:",                    // cancelled: by longjmp, with rsp and r14, r15 as they were
        ".cfi_restore_state",
        "mov [r14], r15",
        "mov rdi, rsp",
        "call {unwind_next}",
        "ud2",
        ".cfi_endproc",
        buffer = const size_of::<UnwindBuffer>(),
        frame = const size_of::<UnwindBuffer>() + 16,
        setjmp = sym __sigsetjmp,
        register = sym __pthread_register_cancel,
        unregister = sym __pthread_unregister_cancel,
        unwind_next = sym __pthread_unwind_next,
        set_type = sym pthread_setcanceltype,
    )
}

/// Fills the ABI part of a descriptor (`tcbhead_t`) whose memory is otherwise prepared: the self
/// pointers, and what a thread inherits from its creator: stack guard, pointer guard, and the
/// shadow-stack features, without which longjmp breaks under CET.
///
/// # Safety
/// `tp` is the thread pointer of a block that no running thread uses.
pub(crate) unsafe fn fill_header(tp: usize) {
    const SELF: usize = 0x10;
    const MULTIPLE_THREADS: usize = 0x18;
    const STACK_GUARD: usize = 0x28;
    const POINTER_GUARD: usize = 0x30;
    const FEATURE_1: usize = 0x48;
    let (stack_guard, pointer_guard, feature): (usize, usize, u32);
    // SAFETY: these offsets of the TCB header are ABI (compilers emit %fs:0x28 and %fs:0x30), and
    // the block at `tp` belongs to the caller alone.
    unsafe {
        asm!(
            "mov {0}, fs:0x28",
            "mov {1}, fs:0x30",
            "mov {2:e}, fs:0x48",
            out(reg) stack_guard,
            out(reg) pointer_guard,
            out(reg) feature,
            options(nostack, readonly, preserves_flags),
        );
        (tp as *mut usize).write(tp);
        ((tp + SELF) as *mut usize).write(tp);
        ((tp + MULTIPLE_THREADS) as *mut u32).write(1);
        ((tp + STACK_GUARD) as *mut usize).write(stack_guard);
        ((tp + POINTER_GUARD) as *mut usize).write(pointer_guard);
        ((tp + FEATURE_1) as *mut u32).write(feature);
    }
}

/// `__pthread_unwind_buf_t` (pthread.h): eight registers, a flag, and four words of glibc's own.
pub(crate) type UnwindBuffer = [usize; 13];

/// The buffer that glibc's forced unwind (`pthread_exit`, cancellation) compares each frame with, to know
/// where to stop: at none of the frames below `top`. Nothing ever jumps to it.
pub(crate) fn unwind_buffer(top: usize) -> UnwindBuffer {
    const RSP: usize = 6; // JB_RSP in glibc's jmpbuf-offsets.h
    let guard: usize;
    // SAFETY: reads the pointer guard that the header of every block holds.
    unsafe {
        asm!("mov {}, fs:0x30", out(reg) guard, options(nostack, readonly, preserves_flags));
    }
    let mut buffer = [0; 13];
    // Mangled as setjmp does it. Below `top` itself, because glibc measures from the top of the stack and
    // would take a distance of nothing for the deepest place there is.
    buffer[RSP] = ((top - size_of::<usize>()) ^ guard).rotate_left(17);
    buffer
}
