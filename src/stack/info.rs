//! [`StackInfo`]: what a handle says of its thread's stack.

use super::record::Stack;
use crate::errno::Errno;
use crate::sys;

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
    /// Usable bytes, from `base` to the initial stack pointer: what was asked for, rounded up to
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

    /// In pieces, so that a large stack needs no large buffer; from below, because what was touched
    /// deepest is looked for.
    pub(crate) fn high_water_mark(&self) -> Result<usize, Errno> {
        const PIECE: usize = 1024;
        let page = sys::page_size();
        let mut resident = [0_u8; PIECE];
        let (mut at, top) = (self.bottom(), self.top());
        while at < top {
            let length = (top - at).min(PIECE * page);
            // SAFETY: the vector holds a byte for each page of the range, which is mapped.
            Errno::result(unsafe {
                libc::mincore(at as *mut libc::c_void, length, resident.as_mut_ptr())
            })?;
            let pages = resident.iter().take(length / page);
            if let Some(first) = pages.into_iter().position(|byte| byte & 1 != 0) {
                return Ok(top - (at + first * page));
            }
            at += length;
        }
        Ok(0)
    }
}
