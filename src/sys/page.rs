//! The page size.

use std::sync::atomic::{AtomicUsize, Ordering};

/// The page size, in bytes. Read once: every spawn needs it several times.
pub(crate) fn page_size() -> usize {
    static SIZE: AtomicUsize = AtomicUsize::new(0);
    match SIZE.load(Ordering::Relaxed) {
        0 => {
            let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
            let size = size.ok().flatten().map_or(4096, |size| size as usize);
            SIZE.store(size, Ordering::Relaxed);
            size
        }
        size => size,
    }
}
