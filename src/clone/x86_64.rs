//! x86-64: the system call instruction, the two clones, and the new thread's first frame.
//!
//! ```text
//!  creator's stack                    new stack
//!  ───────────────                    ──────────────────────────────── high
//!  return address  ◄─ ret             ┌─────────────────────────────┐ ◄ rsp after the system call
//!        ▲                            │ return address into         │ ◄ pushed by `call start`;
//!        │ rax = tid or -errno        │   nptl_thread_entry         │   its CFI says: no caller
//!   [ syscall ] ── rax = 0 ─────────► │ frames of start::main       │
//!                  r9  = argument     │             ↓               │
//! ```
//!
//! The kernel gives the child a copy of every register but `rax`, `rcx` and `r11`, so the argument
//! travels in `r9`; nothing has to be written to the new stack before the thread exists.

use core::arch::{asm, naked_asm};
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
/// `start` is handed to [`crate::start::main`] and must satisfy its contract.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn clone3(
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
        entry = sym nptl_thread_entry,
    )
}

/// clone(2), for kernels and filters without clone3. Returns in the creator only.
///
/// # Safety
/// As [`clone3`]; `stack_top` is the initial stack pointer, 16-byte aligned.
#[unsafe(naked)]
pub(crate) unsafe extern "C" fn clone(
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
        entry = sym nptl_thread_entry,
    )
}

/// The first frame of every thread: where backtraces and gdb's `bt` end.
///
/// # Safety
/// Jumped to by the child side of [`clone3`] and [`clone`], with the argument in `r9`.
#[unsafe(naked)]
unsafe extern "C" fn nptl_thread_entry() -> ! {
    naked_asm!(
        ".cfi_startproc",
        ".cfi_undefined rip", // no return address: the unwinder's walk is over
        "xor ebp, ebp",       // for walkers of frame pointers, too
        "mov rdi, r9",
        "call {main}",        // rsp is 16-byte aligned here, as the ABI wants it before a call
        "ud2",                // main never returns
        ".cfi_endproc",
        main = sym crate::start::main,
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
