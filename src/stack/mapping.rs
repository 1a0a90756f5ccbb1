//! The memory itself: map, guard, prepare, give back.

use super::layout::Layout;
use crate::errno::Errno;
use crate::proc::machine::kernel_version;
use crate::sys::{self, find_once, page_size};
use std::sync::atomic::AtomicUsize;

/// Linux 6.13: a guard that neither splits the mapping nor counts as one.
const MADV_GUARD_INSTALL: libc::c_int = 102;

/// Maps `length` bytes, readable and writable at once: a mapping that is PROT_NONE first, as
/// nptl's, could not merge with its neighbours.
pub(crate) fn map(length: usize) -> Result<usize, Errno> {
    let mapping = memmap2::MmapOptions::new()
        .len(length)
        .stack()
        .map_anon()
        .map_err(|error| Errno::of_mapping(&error))?;
    // Unmapping can fail (a split at vm.max_map_count), which memmap2's drop ignores and we
    // account for: from here on the address is ours, and `unmap` gives it back.
    let base = mapping.as_ptr() as usize;
    std::mem::forget(mapping);
    if !stack_mappings_avoid_huge_pages() {
        // Before 6.7 MAP_STACK does not keep huge pages away: a stack that touches 8 KiB would
        // cost 2 MiB. A kernel without huge pages answers EINVAL, which is fine.
        // SAFETY: the range was mapped above.
        let _ = unsafe { sys::madvise(base, length, libc::MADV_NOHUGEPAGE) };
    }
    Ok(base)
}

/// From Linux 6.7 on `MAP_STACK` means `VM_NOHUGEPAGE`.
fn stack_mappings_avoid_huge_pages() -> bool {
    static AVOID: AtomicUsize = AtomicUsize::new(0);
    const YES: usize = 1;
    const NO: usize = 2;
    let find = || match kernel_version() >= Some((6, 7)) {
        true => YES,
        false => NO,
    };
    find_once(&AVOID, find) == YES
}

/// Makes the guards below the stack and below the signal stack fault. Returns whether one of them has become a
/// mapping of its own (`mprotect`); a marker is none, and adjacent stacks can still merge into one mapping. The
/// error has the bytes of the guard that was refused.
///
/// # Safety
/// `base` is a fresh mapping of this layout.
pub(crate) unsafe fn guard(base: usize, layout: &Layout) -> Result<bool, (Errno, usize)> {
    let below_signal_stack = base + layout.guard + layout.stack;
    let mut protected = false;
    for (start, length) in [(base, layout.guard), (below_signal_stack, page_size())] {
        if length == 0 {
            continue;
        }
        if !protected {
            // SAFETY: the caller owns the mapping, which nothing uses yet.
            match unsafe { sys::madvise(start, length, MADV_GUARD_INSTALL) } {
                Ok(()) => continue,
                // EINVAL: a kernel before 6.13, or locked memory (mlockall's MCL_FUTURE included).
                // EPERM, ENOSYS: a filter that knows madvise's older advice only.
                Err(Errno::EINVAL | Errno::EPERM | Errno::ENOSYS) => protected = true,
                Err(other) => return Err((other, length)),
            }
        }
        // SAFETY: a part of the caller's fresh mapping that is to become a guard: nothing uses it.
        let answer = unsafe { libc::mprotect(start as *mut libc::c_void, length, libc::PROT_NONE) };
        Errno::result(answer).map_err(|errno| (errno, length))?;
    }
    Ok(protected)
}

/// Gives memory back to the kernel.
///
/// # Safety
/// Nothing uses the range any more.
pub(crate) unsafe fn unmap(base: usize, length: usize) -> Result<(), Errno> {
    // SAFETY: the caller promises that nothing uses the range.
    Errno::result(unsafe { libc::munmap(base as *mut libc::c_void, length) })
}

/// Makes `length` bytes at `start` resident and keeps them so: mlock(2).
///
/// # Safety
/// The range belongs to one idle stack and holds no guard (mlock over a guard fails with ENOMEM).
pub(crate) unsafe fn lock(start: usize, length: usize) -> Result<(), Errno> {
    // SAFETY: touches no content; the range is the caller's.
    Errno::result(unsafe { libc::mlock(start as *const libc::c_void, length) })
}

/// Undoes [`lock`].
///
/// # Safety
/// The range belongs to one idle stack.
pub(crate) unsafe fn unlock(start: usize, length: usize) -> Result<(), Errno> {
    // SAFETY: touches no content; the range is the caller's.
    Errno::result(unsafe { libc::munlock(start as *const libc::c_void, length) })
}

/// Makes `length` bytes at `start` resident: `MADV_POPULATE_WRITE`, Linux 5.14. An older kernel
/// (EINVAL) is served by touching the pages, which cannot report a failure.
///
/// # Safety
/// The range belongs to one idle stack and holds no guard.
pub(crate) unsafe fn populate(start: usize, length: usize) -> Result<(), Errno> {
    // SAFETY: the caller's idle range, whose content this advice keeps.
    match unsafe { sys::madvise(start, length, libc::MADV_POPULATE_WRITE) } {
        Err(Errno::EINVAL) => {
            for page in (start..start + length).step_by(page_size()) {
                // SAFETY: the page is writable and nothing else uses it; writing back what is
                // there leaves its content alone.
                unsafe {
                    let byte = page as *mut u8;
                    byte.write_volatile(byte.read_volatile());
                }
            }
            Ok(())
        }
        other => other,
    }
}
