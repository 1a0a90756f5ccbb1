//! The floor: a raw clone with NPTL's flags on a ready, touched stack, whose child only calls exit,
//! and a futex wait on its tid word. This is what the kernel charges; no thread library can be
//! cheaper.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use super::gate::Gate;
use super::{Load, Subject};

/// The subject's name.
pub const NAME: &str = "floor";

/// The child is written in assembly, so far for one architecture.
pub const AVAILABLE: bool = cfg!(target_arch = "x86_64");

/// NPTL's own flags. Valgrind and qemu-user accept no other combination, and the kernel's work
/// depends on them.
pub const FLAGS: libc::c_int = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID;

/// One page: the tid word at its start, the child's stack pointer at its end, and in between the
/// zeroes that the child's thread pointer points at. The child neither pushes nor reads any of it.
const PAGE: usize = 4096;
const THREAD_POINTER: usize = PAGE / 2;

/// A page for one child at a time.
pub struct Slot(NonNull<u8>);

// SAFETY: a slot is plain memory with one owner; the kernel's only write to it is the atomic tid
// word.
unsafe impl Send for Slot {}

impl Slot {
    fn layout() -> Layout {
        Layout::from_size_align(PAGE, PAGE).expect("a page is a valid layout")
    }

    fn new() -> Slot {
        // SAFETY: the layout's size is not zero.
        let page = unsafe { alloc_zeroed(Slot::layout()) };
        let page = NonNull::new(page).unwrap_or_else(|| handle_alloc_error(Slot::layout()));
        // SAFETY: inside the page just allocated. Touched now, so that no round pays for the page
        // fault.
        unsafe { page.byte_add(THREAD_POINTER).write_volatile(0) };
        Slot(page)
    }

    fn tid(&self) -> &AtomicU32 {
        // SAFETY: the page is live, aligned and zeroed, and its first word is only ever used as
        // this atomic.
        unsafe { self.0.cast::<AtomicU32>().as_ref() }
    }

    fn wait_for_exit(&self) {
        loop {
            let tid = self.tid().load(Ordering::Acquire);
            if tid == 0 {
                return;
            }
            // A shared, not a private, operation: that is what the kernel's wake at exit is.
            // SAFETY: the word lives as long as the slot; a wait has no other effect than to block.
            unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    self.tid().as_ptr(),
                    libc::FUTEX_WAIT,
                    tid,
                    std::ptr::null::<libc::timespec>(),
                );
            }
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        // The kernel still has to clear the tid word of a child that lives.
        self.wait_for_exit();
        // SAFETY: allocated with this layout in `new`, and no child uses it any more.
        unsafe { dealloc(self.0.as_ptr(), Slot::layout()) };
    }
}

/// Starts children on slots that are kept for the next round.
pub struct Floor {
    ready: Mutex<Vec<Slot>>,
}

impl Floor {
    /// A floor without slots; the first round makes as many as it needs.
    pub fn new() -> Floor {
        Floor {
            ready: Mutex::new(Vec::new()),
        }
    }

    fn ready(&self) -> std::sync::MutexGuard<'_, Vec<Slot>> {
        self.ready
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Subject for Floor {
    type Handle = Slot;

    fn name(&self) -> &'static str {
        NAME
    }

    fn start(&self, body: Load) -> io::Result<Slot> {
        let gate = match body {
            Load::Empty => std::ptr::null(),
            Load::Park(gate) => std::ptr::from_ref(gate),
            Load::Heap => return Err(io::ErrorKind::Unsupported.into()),
        };
        let slot = self.ready().pop();
        let slot = slot.unwrap_or_else(Slot::new);
        // SAFETY: `slot` outlives the child (`Slot::drop` waits for it), no other child uses it,
        // and `gate`, if any, is 'static.
        let tid = unsafe {
            let page = slot.0.as_ptr();
            clone_child(
                FLAGS,
                page.add(PAGE),
                slot.tid().as_ptr(),
                page.add(THREAD_POINTER),
                gate,
            )
        };
        match i32::try_from(-tid) {
            Ok(errno) if errno > 0 => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(slot),
        }
    }

    fn join(&self, slot: Slot) {
        slot.wait_for_exit();
        self.ready().push(slot);
    }
}

/// Returns the child's tid, or a negated errno. The child waits at `gate`, if there is one, and
/// exits.
///
/// # Safety
/// `stack`, `tid` and `thread_pointer` must stay valid and unused by others until the kernel has
/// cleared `*tid`; `gate`, if not null, must stay valid until then. The child has no usable
/// thread-local storage: no signal handler may run in it.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn clone_child(
    flags: libc::c_int,
    stack: *mut u8,
    tid: *mut u32,
    thread_pointer: *mut u8,
    gate: *const Gate,
) -> libc::c_long {
    std::arch::naked_asm!(
        // edi flags, rsi stack, rdx parent_tid: already where the kernel wants them.
        "mov r9, r8",            // gate: a register that syscall keeps, for the child
        "mov r8, rcx",           // tls
        "mov r10, rdx",          // child_tid: the same word
        "mov eax, {clone}",
        "syscall",
        "test eax, eax",
        "jz 2f",
        "ret",
        "2:",                    // the child, on its own stack, with nothing on it
        "xor ebp, ebp",
        "test r9, r9",
        "jz 4f",
        "lock inc dword ptr [r9 + 4]",
        "3:",
        "cmp dword ptr [r9], 0",
        "jne 4f",
        "mov eax, {futex}",
        "mov rdi, r9",
        "mov esi, {wait}",
        "xor edx, edx",          // while the gate is closed
        "xor r10d, r10d",        // no timeout
        "syscall",
        "jmp 3b",
        "4:",
        "xor edi, edi",
        "mov eax, {exit}",
        "syscall",
        "ud2",
        clone = const libc::SYS_clone,
        futex = const libc::SYS_futex,
        wait = const libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
        exit = const libc::SYS_exit,
    )
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn clone_child(
    _: libc::c_int,
    _: *mut u8,
    _: *mut u32,
    _: *mut u8,
    _: *const Gate,
) -> libc::c_long {
    -libc::c_long::from(libc::ENOSYS)
}
