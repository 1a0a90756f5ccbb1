//! Mappings that probe how far mmap gets, each refused by the kernel or undone at once.
//!
//! The kernel's order is: number of mappings, free addresses, locked memory, then RLIMIT_AS, RLIMIT_DATA and
//! the commit limit. The first two probes below are always refused; the errno says which of the
//! early checks would have let a mapping pass.

use std::ptr;

use crate::errno::Errno;
use libc::{
    MAP_ANONYMOUS, MAP_FIXED_NOREPLACE, MAP_LOCKED, MAP_NORESERVE, MAP_PRIVATE, MAP_STACK,
    PROT_NONE, PROT_READ, PROT_WRITE, c_int,
};

/// Which checks of mmap are probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Question {
    /// A page that is in use already: EEXIST, or ENOMEM when the process has more mappings than `vm.max_map_count`.
    /// No other limit is looked at before.
    Count,
    /// A mapping that is neither private nor shared: EINVAL, or before that ENOMEM when no range of free addresses
    /// is long enough, or EAGAIN when it would exceed RLIMIT_MEMLOCK.
    Addresses,
    /// PROT_NONE: counts for RLIMIT_AS only.
    Inaccessible,
    /// Writable with MAP_NORESERVE: counts for RLIMIT_DATA as well, not for the commit limit of modes 0 and 1.
    Unreserved,
    /// Writable, exactly as a stack is mapped: counts for everything.
    Stack,
}

/// Maps `bytes` in one of these ways, and unmaps them if that is granted.
pub(crate) fn ask(question: Question, bytes: usize) -> Result<(), Errno> {
    let anywhere = ptr::null_mut();
    const WRITABLE: c_int = PROT_READ | PROT_WRITE;
    let (address, bytes, protection, flags) = match question {
        Question::Count => {
            let marker = 0_u8;
            let page = (&raw const marker).cast_mut();
            let page = page.map_addr(|address| address & !(PAGE - 1)).cast();
            (page, PAGE, PROT_NONE, MAP_PRIVATE | MAP_FIXED_NOREPLACE)
        }
        Question::Addresses => (anywhere, bytes, PROT_NONE, 0),
        Question::Inaccessible => (anywhere, bytes, PROT_NONE, MAP_PRIVATE),
        Question::Unreserved => (anywhere, bytes, WRITABLE, MAP_PRIVATE | MAP_NORESERVE),
        Question::Stack => (anywhere, bytes, WRITABLE, MAP_PRIVATE | MAP_STACK),
    };
    Mapped::new(address, bytes, protection, MAP_ANONYMOUS | flags).map(drop)
}

/// [`Question::Addresses`] of locked pages: EAGAIN, or EPERM where nothing may be locked, before the EINVAL.
pub(crate) fn locked(bytes: usize) -> Result<(), Errno> {
    let flags = MAP_ANONYMOUS | MAP_LOCKED;
    Mapped::new(ptr::null_mut(), bytes, PROT_NONE, flags).map(drop)
}

/// Maps four pages and takes access to two of them away, as the guards of a stack are made: ENOMEM at
/// `vm.max_map_count` mappings or just below, where a plain mmap still passes. `None` if not even the pages were
/// granted.
pub(crate) fn guards() -> Option<Result<(), Errno>> {
    // As for a stack: a filter compares the flags.
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK;
    let pages = Mapped::new(ptr::null_mut(), 4 * PAGE, PROT_READ | PROT_WRITE, flags).ok()?;
    let protect = |offset| {
        // SAFETY: a page of the mapping just made, which holds nothing.
        Errno::result(unsafe { libc::mprotect(pages.start.byte_add(offset), PAGE, PROT_NONE) })
    };
    Some(protect(0).and_then(|()| protect(2 * PAGE)))
}

/// Whether mappings made from now on are locked (mlockall(MCL_FUTURE)). `None` if not even a page was granted.
///
/// No file says so; but `MADV_DONTNEED` is refused for what is locked.
pub(crate) fn future_is_locked() -> Option<bool> {
    let flags = MAP_PRIVATE | MAP_ANONYMOUS;
    let page = Mapped::new(ptr::null_mut(), PAGE, PROT_READ, flags).ok()?;
    // SAFETY: the mapping just made, which holds nothing.
    let dropped = Errno::result(unsafe { libc::madvise(page.start, PAGE, libc::MADV_DONTNEED) });
    match dropped {
        Ok(()) => Some(false),
        Err(Errno::EINVAL) => Some(true),
        Err(_) => None,
    }
}

/// The page size of x86-64, which the kernel fixes.
const PAGE: usize = 4096;

/// A mapping, for as long as a probe takes.
struct Mapped {
    start: *mut libc::c_void,
    bytes: usize,
}

impl Mapped {
    fn new(
        address: *mut libc::c_void,
        bytes: usize,
        protection: c_int,
        flags: c_int,
    ) -> Result<Mapped, Errno> {
        // SAFETY: without MAP_FIXED no existing mapping is replaced; MAP_FIXED_NOREPLACE is refused on a used page.
        let start = unsafe { libc::mmap(address, bytes, protection, flags, -1, 0) };
        match start {
            libc::MAP_FAILED => Err(Errno::last()),
            start => Ok(Mapped { start, bytes }),
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that was made, whose address only this value has. It cannot fail for want of a
        // mapping: what merging with both neighbours saved is what the split needs.
        unsafe { libc::munmap(self.start, self.bytes) };
    }
}
