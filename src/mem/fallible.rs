//! Heap memory that may be refused: a process at RLIMIT_AS or RLIMIT_DATA is told so by an error, where
//! std's `Box` and `Arc` would abort it.

use parking_lot::Mutex;
use std::alloc::Layout;
use std::mem::MaybeUninit;
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

/// Memory for one `T`, which is kept between two uses.
///
/// Nobody waits for the lock: where it is taken, by another thread, by the code that a signal handler has interrupted,
/// or by a thread that a forked child does not have, the heap serves instead.
pub(crate) struct Spare<T>(Mutex<Option<Box<MaybeUninit<T>>>>);

impl<T> Spare<T> {
    pub(crate) const fn new() -> Spare<T> {
        Spare(Mutex::new(None))
    }

    /// What was put here, or else new memory. `None` if the heap has none.
    pub(crate) fn take(&self) -> Option<Box<MaybeUninit<T>>> {
        let kept = self.0.try_lock().and_then(|mut kept| kept.take());
        kept.or_else(|| try_box(MaybeUninit::uninit()).ok())
    }

    /// Keeps the memory, or frees it if some is kept already.
    pub(crate) fn put(&self, memory: Box<MaybeUninit<T>>) {
        if let Some(mut kept) = self.0.try_lock() {
            kept.get_or_insert(memory);
        }
    }
}
