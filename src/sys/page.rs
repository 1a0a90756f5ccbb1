//! Sizes that are looked up once.

use std::sync::atomic::{AtomicUsize, Ordering};

/// What `find` has returned at the first call, kept in `place`: 0 there means that it was not called. No OnceLock, whose
/// lock a forked child can find taken by a thread that it does not have.
#[inline]
pub(crate) fn find_once(place: &AtomicUsize, find: impl FnOnce() -> usize) -> usize {
    match place.load(Ordering::Relaxed) {
        0 => {
            let size = find();
            place.store(size, Ordering::Relaxed);
            size
        }
        size => size,
    }
}

/// The page size, in bytes.
pub(crate) fn page_size() -> usize {
    static SIZE: AtomicUsize = AtomicUsize::new(0);
    find_once(&SIZE, || {
        let size = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
        size.ok().flatten().map_or(4096, |size| size as usize)
    })
}
