//! What lies where in the mapping of one thread.
//!
//! ```text
//!  base ──► guard │ stack ◄── top │ guard │ signal stack │ block ◄── end
//! ```

use crate::sys::{find_once, page_size};
use crate::tcb::Runtime;
use std::sync::atomic::AtomicUsize;

/// The smallest stack: `PTHREAD_STACK_MIN`, which std rounds up to as well.
pub(crate) const SMALLEST: usize = 16 * 1024;

/// Sizes in bytes, all multiples of the page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub guard: usize,
    pub stack: usize,
    /// The page of guard below it included.
    pub signal_stack: usize,
    pub block: usize,
}

impl Layout {
    /// Returns `None` if the sizes overflow the address space.
    pub(crate) fn new(runtime: &Runtime, stack: usize, guard: usize) -> Option<Layout> {
        let page = page_size();
        let layout = Layout {
            guard: guard.checked_next_multiple_of(page)?,
            stack: stack.max(SMALLEST).checked_next_multiple_of(page)?,
            signal_stack: page + signal_stack_size(page),
            block: runtime.block_size(page),
        };
        let total = layout
            .guard
            .checked_add(layout.stack)?
            .checked_add(layout.signal_stack)?
            .checked_add(layout.block)?;
        // mmap answers ENOMEM for more than this; an impossible size is the caller's mistake, not
        // a lack of memory.
        (total <= isize::MAX as usize).then_some(layout)
    }

    pub(crate) fn total(&self) -> usize {
        self.guard + self.stack + self.signal_stack + self.block
    }
}

/// Room for the signal frame (which grows with the vector registers; the kernel reports its size)
/// and for the overflow report. Untouched, and so without cost, until an overflow happens.
fn signal_stack_size(page: usize) -> usize {
    const HANDLER: usize = 12 * 1024;
    static SIZE: AtomicUsize = AtomicUsize::new(0);
    find_once(&SIZE, || {
        // SAFETY: getauxval only reads the auxiliary vector.
        let frame = unsafe { libc::getauxval(libc::AT_MINSIGSTKSZ) } as usize;
        (frame.max(2048) + HANDLER).next_multiple_of(page)
    })
}
