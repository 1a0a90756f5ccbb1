//! Heap memory that may be refused: a process at RLIMIT_AS or RLIMIT_DATA gets an error, where
//! std's `Box` and `Arc` would abort it.

use std::alloc::Layout;
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, Ordering};

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

/// Memory for one `T`, which is kept between two uses.
pub(crate) struct Spare<T>(AtomicPtr<MaybeUninit<T>>);

impl<T> Spare<T> {
    pub(crate) const fn new() -> Spare<T> {
        Spare(AtomicPtr::new(ptr::null_mut()))
    }

    /// What was put here, or else new memory. `None` if the heap has none.
    pub(crate) fn take(&self) -> Option<Box<MaybeUninit<T>>> {
        let kept = self.0.swap(ptr::null_mut(), Ordering::Acquire);
        if kept.is_null() {
            return try_box(MaybeUninit::uninit()).ok();
        }
        // SAFETY: the pointer is that of a box which `put` has given up, and the swap gives it to this call alone.
        Some(unsafe { Box::from_raw(kept) })
    }

    /// Keeps the memory, or frees it if some is kept already.
    pub(crate) fn put(&self, memory: Box<MaybeUninit<T>>) {
        let memory = Box::into_raw(memory);
        let put = self.0.compare_exchange(
            ptr::null_mut(),
            memory,
            Ordering::Release,
            Ordering::Relaxed,
        );
        if put.is_err() {
            // SAFETY: made from a box above, and not put.
            drop(unsafe { Box::from_raw(memory) });
        }
    }
}
