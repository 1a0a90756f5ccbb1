//! Heap memory that may be refused: a process at RLIMIT_AS or RLIMIT_DATA is told so by an error, where
//! std's `Box` and `Arc` would abort it.

use std::alloc::Layout;
use std::ptr::NonNull;

/// Uninitialised memory for a `T`, or `None`. Nothing is allocated for a `T` without a size.
pub(super) fn allocate<T>() -> Option<NonNull<T>> {
    const { assert!(size_of::<T>() > 0) };
    // SAFETY: the layout's size is not zero.
    NonNull::new(unsafe { std::alloc::alloc(Layout::new::<T>()) }.cast())
}

/// `Box::new` that gives the value back where there is no memory for it.
pub(crate) fn try_box<T>(value: T) -> Result<Box<T>, T> {
    match allocate::<T>() {
        // SAFETY: allocated with the layout of a `T`, as Box frees it; written before it is owned.
        Some(place) => unsafe {
            place.write(value);
            Ok(Box::from_raw(place.as_ptr()))
        },
        None => Err(value),
    }
}
