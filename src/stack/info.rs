//! [`StackInfo`]: what a handle says of its thread's stack.

use super::record::Stack;
use crate::errno::Errno;
use crate::sys;
use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

/// Where a thread's stack lies.
///
/// ```
/// let handle = nptl::Builder::new().stack_size(256 * 1024).spawn(|| ()).unwrap();
/// let stack = handle.stack();
/// assert!(stack.size >= 256 * 1024);
/// handle.join().unwrap();
/// ```
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StackInfo {
    /// Lowest usable address.
    pub base: usize,
    /// Usable bytes, from `base` to the initial stack pointer: what was requested, rounded up to
    /// the cache's size class.
    pub size: usize,
    /// Bytes of guard below `base`.
    pub guard_size: usize,
}

impl Stack {
    pub(crate) fn info(&self) -> StackInfo {
        StackInfo {
            base: self.bottom(),
            size: self.size(),
            guard_size: self.guard_size(),
        }
    }

    /// From below, because what was touched deepest is looked for.
    pub(crate) fn high_water_mark(&self) -> Result<usize, Errno> {
        let (bottom, top) = (self.bottom(), self.top());
        let mut used = 0;
        resident_pages(bottom, top, |page| {
            used = top - page;
            ControlFlow::Break(())
        })?;
        Ok(used)
    }

    /// Bytes that are resident of what can be when no thread runs here. For [`Entry::measure`](super::ledger::Entry):
    /// the numbers can be those of another mapping by now, which does no harm.
    pub(super) fn idle_resident(&self) -> Option<usize> {
        if self.is_locked() {
            return None;
        }
        let keep = self.keep.load(Ordering::Relaxed).min(self.size());
        let mut pages = 0;
        resident_pages(self.top() - keep, self.base() + self.length(), |_| {
            pages += 1;
            ControlFlow::Continue(())
        })
        .ok()?;
        Some(pages * sys::page_size())
    }
}

/// Calls `f` with the address of each resident page of a range, as mincore(2) reports it, until `f` breaks off. In pieces, so
/// that a large range needs no large buffer.
fn resident_pages(
    mut at: usize,
    end: usize,
    mut f: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<(), Errno> {
    const PIECE: usize = 1024;
    let page = sys::page_size();
    let mut resident = [0_u8; PIECE];
    while at < end {
        let length = (end - at).min(PIECE * page);
        // SAFETY: the array holds a byte for each page of the range. The kernel reads nothing of the range itself, and
        // says ENOMEM if it is not mapped.
        Errno::result(unsafe {
            libc::mincore(at as *mut libc::c_void, length, resident.as_mut_ptr())
        })?;
        let pages = resident
            .iter()
            .take(length / page)
            .zip((at..end).step_by(page));
        for (_, page) in pages.filter(|(byte, _)| **byte & 1 != 0) {
            if f(page).is_break() {
                return Ok(());
            }
        }
        at += length;
    }
    Ok(())
}
