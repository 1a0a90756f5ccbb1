//! Heap memory that may be refused: a process at RLIMIT_AS or RLIMIT_DATA is told so by an error, where
//! std's `Box` and `Arc` would abort it.

use std::alloc::Layout;
use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::Acquire;
use std::sync::atomic::{AtomicBool, Ordering};

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

/// Memory for a value that is not there yet and then must have a place: on the heap, or one of a few
/// slots in static memory where the heap has none.
pub(crate) enum Reservation<T: Copy + 'static> {
    Heap(Box<MaybeUninit<T>>),
    Slot(Taken<T>),
    /// Neither: all slots are taken.
    None,
}

impl<T: Copy + 'static> Reservation<T> {
    /// `heap`: whether malloc may be called at all.
    pub(crate) fn new(slots: &'static [Slot<T>], heap: bool) -> Reservation<T> {
        if heap && let Some(place) = allocate::<MaybeUninit<T>>() {
            // SAFETY: allocated with the layout that Box frees it with; nothing is no value to be read.
            return Reservation::Heap(unsafe { Box::from_raw(place.as_ptr()) });
        }
        let free = slots.iter().find(|slot| !slot.taken.swap(true, Acquire));
        free.map_or(Reservation::None, |slot| Reservation::Slot(Taken(slot)))
    }

    /// Without allocating. `otherwise` is what is left where there was no place.
    pub(crate) fn fill(self, value: T, otherwise: &'static T) -> Kept<T> {
        Kept(match self {
            Reservation::Heap(place) => Place::Heap(Box::write(place, value)),
            Reservation::Slot(taken) => {
                // SAFETY: the one who has taken the slot is the only one to reach it.
                unsafe { *taken.0.value.get() = value };
                Place::Slot(taken)
            }
            Reservation::None => Place::Static(otherwise),
        })
    }
}

/// A value in the place that a [`Reservation`] had for it.
pub(crate) struct Kept<T: Copy + 'static>(Place<T>);

enum Place<T: Copy + 'static> {
    Heap(Box<T>),
    Slot(Taken<T>),
    Static(&'static T),
}

/// A place in static memory.
pub(crate) struct Slot<T> {
    taken: AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: whoever has set `taken` is the only one to reach the value.
unsafe impl<T: Send> Sync for Slot<T> {}

impl<T> Slot<T> {
    pub(crate) const fn new(value: T) -> Slot<T> {
        Slot {
            taken: AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }
}

/// The right to a slot; dropped, it is free again.
pub(crate) struct Taken<T: 'static>(&'static Slot<T>);

impl<T: 'static> Drop for Taken<T> {
    fn drop(&mut self) {
        self.0.taken.store(false, Ordering::Release);
    }
}

impl<T: Copy + 'static> Deref for Kept<T> {
    type Target = T;

    fn deref(&self) -> &T {
        match &self.0 {
            Place::Heap(value) => value,
            // SAFETY: taken by this owner, filled, and no longer written to.
            Place::Slot(taken) => unsafe { &*taken.0.value.get() },
            Place::Static(value) => value,
        }
    }
}
