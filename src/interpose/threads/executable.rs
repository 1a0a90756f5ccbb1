//! Whether the program wants stacks that it can execute.
//!
//! glibc maps such stacks as soon as one loaded object requests them (gcc's nested functions, GNAT). This crate's never
//! are, so the threads of such a program are left to glibc.

use crate::sync::forks;
use libc::{c_int, c_void, dl_phdr_info};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// How many objects had been loaded at the last look, and one more; 0: there was none.
static SEEN: AtomicU64 = AtomicU64::new(0);

/// What the last look found.
static WANTED: AtomicU8 = AtomicU8::new(0);

struct LoadedObjects {
    first: bool,
    /// The objects that were loaded so far.
    loaded: u64,
    wanted: bool,
}

/// Whether one of the objects that are loaded requests executable stacks. Looks at all of them again only if there are new
/// ones. In a forked child what the parent knew stands: another thread of the parent can have held the loader's lock (G25).
pub(super) fn stacks_wanted() -> bool {
    if forks() == 0 {
        let mut look = LoadedObjects {
            first: true,
            loaded: 0,
            wanted: false,
        };
        // SAFETY: the callback matches, and `look` outlives the call.
        unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut look).cast()) };
        if SEEN.swap(look.loaded + 1, Ordering::AcqRel) != look.loaded + 1 {
            WANTED.fetch_or(u8::from(look.wanted), Ordering::AcqRel);
        }
    }
    WANTED.load(Ordering::Acquire) != 0
}

/// # Safety
/// Called by dl_iterate_phdr(3) with a [`LoadedObjects`] as its data.
unsafe extern "C" fn visit(info: *mut dl_phdr_info, _size: usize, data: *mut c_void) -> c_int {
    // SAFETY: dl_iterate_phdr passes a valid description, and `data` is our Look.
    let (info, look) = unsafe { (&*info, &mut *data.cast::<LoadedObjects>()) };
    if std::mem::take(&mut look.first) {
        look.loaded = info.dlpi_adds;
        if SEEN.load(Ordering::Acquire) == look.loaded + 1 {
            return 1;
        }
    }
    for index in 0..usize::from(info.dlpi_phnum) {
        // SAFETY: `dlpi_phnum` headers lie there, and `index` is less.
        let header = unsafe { &*info.dlpi_phdr.add(index) };
        if header.p_type == libc::PT_GNU_STACK && header.p_flags & libc::PF_X != 0 {
            look.wanted = true;
        }
    }
    0
}
