//! Whether this process is a forked child in which the crate has not been repaired yet.
//!
//! One word lies in a page that the kernel zeroes in the child of a fork (`MADV_WIPEONFORK`, Linux 4.14). Every public
//! call looks at it before it touches anything that another thread of the parent can have left half-way. The first one
//! to find it wiped repairs the child. That can be an application's atfork handler that runs before the crate's own,
//! the crate's own, or any later call.
//!
//! ```text
//!  WIPED ──► UNDER_WAY ──► WHOLE ──(fork, in the child)──► WIPED
//! ```

use crate::errno::Errno;
use crate::sys;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};

const WIPED: u32 = 0;
const UNDER_WAY: u32 = 1;
const WHOLE: u32 = 2;

/// The page. Null until [`set_up_notice`], or where the kernel does not wipe pages.
static PAGE: AtomicPtr<AtomicU32> = AtomicPtr::new(std::ptr::null_mut());

/// The repair, a `fn()`, set before the page.
static REPAIR: AtomicPtr<()> = AtomicPtr::new(std::ptr::null_mut());

/// This process is a child of `_Fork(3)` or of a bare clone, or descends from one.
static BARE: AtomicBool = AtomicBool::new(false);

/// How many forks lie between this process and the one in which the crate was first used, as far as they were noticed.
static FORKS: AtomicU32 = AtomicU32::new(0);

pub(crate) fn forks() -> u32 {
    FORKS.load(Ordering::Relaxed)
}

/// In the child, by its repair.
pub(crate) fn note_fork() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

fn word() -> Option<&'static AtomicU32> {
    // SAFETY: null, or a page that is never unmapped.
    unsafe { PAGE.load(Ordering::Acquire).as_ref() }
}

/// Repairs the crate's state if this is a forked child in which that has not been done. One load otherwise.
#[inline(always)]
pub(crate) fn notice_fork() {
    if let Some(word) = word()
        && word.load(Ordering::Acquire) != WHOLE
    {
        repair(word);
    }
}

#[cold]
fn repair(word: &AtomicU32) {
    // A handler of the application that interrupts the repair would wait for it.
    let old = sys::set_signal_mask(sys::APPLICATION);
    loop {
        match word.compare_exchange(WIPED, UNDER_WAY, Ordering::Acquire, Ordering::Acquire) {
            Ok(_) => {
                let repair = REPAIR.load(Ordering::Acquire);
                // SAFETY: set by `set_up_notice` to a function of this type, before the page.
                let repair = unsafe { std::mem::transmute::<*mut (), fn()>(repair) };
                repair();
                word.store(WHOLE, Ordering::Release);
                break;
            }
            Err(UNDER_WAY) => std::thread::yield_now(),
            Err(_) => break,
        }
    }
    sys::set_signal_mask(old);
}

/// Whether children are marked.
pub(crate) fn is_watched() -> bool {
    word().is_some()
}

/// Has the kernel mark children of this process, in which `repair` then runs once. Where it cannot (before Linux 4.14,
/// or a filter), only an atfork handler notices.
///
/// # Errors
/// The errno of mmap(2), for a page.
pub(crate) fn set_up_notice(repair: fn()) -> Result<(), Errno> {
    REPAIR.store(repair as *mut (), Ordering::Release);
    let length = crate::sys::page_size();
    let page = memmap2::MmapOptions::new()
        .len(length)
        .map_anon()
        .map_err(|error| Errno::of_mapping(&error))?;
    let address = page.as_ptr().cast::<AtomicU32>().cast_mut();
    // SAFETY: a page of our own, which holds nothing yet.
    if unsafe { sys::madvise(address.addr(), length, libc::MADV_WIPEONFORK) }.is_err() {
        return Ok(());
    }
    std::mem::forget(page);
    // SAFETY: mapped, aligned, and from here on never unmapped.
    unsafe { &*address }.store(WHOLE, Ordering::Relaxed);
    PAGE.store(address, Ordering::Release);
    Ok(())
}

/// Whether this process is a child of `_Fork(3)` or of a bare clone: glibc has not repaired itself in it, so that its
/// lists of threads name threads that do not exist, and malloc's locks can be held for ever.
pub(crate) fn forked_bare() -> bool {
    BARE.load(Ordering::Relaxed)
}

pub(crate) fn note_bare_fork() {
    BARE.store(true, Ordering::Relaxed);
}
