//! A thread's DTV, the table of where each module's TLS is, serves the next thread on its block.
//!
//! That saves two calls of malloc and two of free in every spawn. glibc does so for the stacks in its own cache.

use super::lookup::{address, field_of, is_mapped, rtld_global};
use libc::c_void;
use std::ffi::CStr;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

/// Bytes of an entry: where a module's TLS is, and what is to be freed.
pub(super) const ENTRY: usize = 16;

/// DTV_SURPLUS (elf/dl-tls.c): entries that a new DTV has beyond the highest number of a module.
const SURPLUS: usize = 14;

/// `_dl_allocate_tls_init`: fills the DTV in and copies the images of static TLS. From 2.35 on the flag says what
/// happens to modules of other namespaces than the program's, and 2.41 has turned its meaning round.
type AllocateTlsInit = unsafe extern "C" fn(*mut c_void, bool) -> *mut c_void;

/// What it takes to use a DTV again. Where a part is not found, each thread gets a new one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Refill {
    init: AllocateTlsInit,
    /// The highest number of a module with TLS (`_dl_tls_max_dtv_idx`).
    highest: *const AtomicUsize,
    /// `_r_debug.r_version`: from 2.35 on 2 or more, once a module has been loaded into another namespace.
    debug_version: *const AtomicI32,
}

impl Refill {
    pub(super) fn look_up() -> Option<Refill> {
        const LIST: &CStr = c"_thread_db_rtld_global__dl_tls_dtv_slotinfo_list";
        let list = rtld_global()
            .ok()?
            .checked_add(field_of(LIST, usize::BITS).ok()?)?;
        Some(Refill {
            // SAFETY: the thread pointer of a block with a DTV in, null or the same out, from 2.34 to 2.43. In 2.34
            // there is no flag, and nothing reads the register.
            init: unsafe {
                std::mem::transmute::<usize, AllocateTlsInit>(
                    address(c"_dl_allocate_tls_init").ok()?,
                )
            },
            // The word before the list.
            highest: list.checked_sub(size_of::<usize>())? as *const AtomicUsize,
            debug_version: debug_version()?,
        })
    }

    /// Whether a DTV that was made a moment ago is as long as the highest number of a module wants it to be: then what is
    /// taken for that number is it.
    ///
    /// # Safety
    /// `dtv` is the calling thread's.
    pub(super) unsafe fn knows_length_of(&self, dtv: usize) -> bool {
        is_mapped(self.highest as usize, size_of::<usize>())
            // SAFETY: mapped and aligned, and a word of ld.so's that changes while others read it.
            && unsafe { length(dtv) == (*self.highest).load(Ordering::Relaxed).wrapping_add(SURPLUS) }
    }

    /// Makes the DTV of a thread that has ended like a new one, if nothing hangs off it and it is long enough: to make it
    /// longer the loader allocates memory, and ends the process if there is none.
    ///
    /// # Safety
    /// `dtv` is the DTV of an idle block, whose only owner the caller is.
    #[inline]
    pub(super) unsafe fn empty(&self, dtv: usize) -> bool {
        // SAFETY: a DTV has as many entries as it says, behind the one that has its generation; the other words are the
        // loader's.
        unsafe {
            let length = length(dtv);
            let entries = std::slice::from_raw_parts((dtv + ENTRY) as *const [usize; 2], length);
            // Four at a time: every spawn comes here, and there are 15 at least.
            let (fours, rest) = entries.as_chunks::<4>();
            let four = |all, [a, b, c, d]: &[[usize; 2]; 4]| all | a[1] | b[1] | c[1] | d[1];
            let hanging = fours.iter().fold(0, four);
            let hanging = rest.iter().fold(hanging, |all, entry| all | entry[1]);
            let refillable = hanging == 0 && (*self.highest).load(Ordering::Relaxed) <= length;
            if refillable {
                std::ptr::write_bytes(dtv as *mut u8, 0, (length + 1) * ENTRY);
            }
            refillable
        }
    }

    /// Whether the loader has one namespace. Read when the thread is on glibc's list: what is loaded into another one
    /// after that initialises its TLS in this thread, too (G6).
    pub(super) fn has_one_namespace(&self) -> bool {
        // SAFETY: a variable of ld.so's, which stays.
        unsafe { (*self.debug_version).load(Ordering::Acquire) <= 1 }
    }

    /// Like `_dl_allocate_tls`, for a block with a DTV that is [empty](Refill::empty). `false`: no memory.
    ///
    /// # Safety
    /// `tp` is the thread pointer of such a block, whose only owner the caller is. The loader
    /// [has one namespace](Refill::has_one_namespace).
    pub(super) unsafe fn refill(&self, tp: usize) -> bool {
        // Never true: from 2.41 on that is for the main thread at the start of the process, and clears a flag in the
        // module's description that a dlopen in another thread can be changing. In a single namespace `false` is right
        // for both meanings.
        // SAFETY: by the caller's promise.
        !unsafe { (self.init)(tp as *mut c_void, false) }.is_null()
    }
}

/// How many entries there are for modules: the entry before the first says so.
///
/// # Safety
/// `dtv` is the DTV of a thread.
unsafe fn length(dtv: usize) -> usize {
    // SAFETY: by the caller's promise.
    unsafe { ((dtv - ENTRY) as *const usize).read() }
}

/// The loader's own `_r_debug`: a program can have a copy of the variable, which stays as it was.
fn debug_version() -> Option<*const AtomicI32> {
    // SAFETY: a name of libc, which is loaded, so that nothing else is. The loader is what it depends on.
    let found = unsafe {
        let flags = libc::RTLD_LAZY | libc::RTLD_NOLOAD;
        let libc = libc::dlopen(c"libc.so.6".as_ptr(), flags);
        if libc.is_null() {
            return None;
        }
        libc::dlsym(libc, c"_r_debug".as_ptr())
    };
    (!found.is_null()).then_some(found.cast_const().cast())
}
