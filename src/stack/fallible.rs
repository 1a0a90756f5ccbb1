//! Heap memory that may be refused: a process at RLIMIT_AS or RLIMIT_DATA is told so by an error, where
//! std's `Box` and `Arc` would abort it.

use crate::handle::Deliver;
use crate::start::Body;
use std::alloc::Layout;
use std::cell::UnsafeCell;
use std::mem::{ManuallyDrop, MaybeUninit};
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::Acquire;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

/// Uninitialised memory for a `T`, or `None`. Nothing is allocated for a `T` without a size.
fn allocate<T>() -> Option<NonNull<T>> {
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

/// `Arc` that gives the value back where there is no memory for it. Without weak references.
pub(crate) struct Shared<T: ?Sized>(NonNull<Counted<T>>);

struct Counted<T: ?Sized> {
    count: AtomicUsize,
    value: T,
}

// SAFETY: as for Arc: the value is reached by shared references from many threads, and dropped in any.
unsafe impl<T: Send + Sync + ?Sized> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync + ?Sized> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn try_new(value: T) -> Result<Shared<T>, T> {
        match allocate::<Counted<T>>() {
            Some(place) => {
                let count = AtomicUsize::new(1);
                // SAFETY: allocated for this type just now.
                unsafe { place.write(Counted { count, value }) };
                Ok(Shared(place))
            }
            None => Err(value),
        }
    }

    /// The thread's view of the value.
    pub(crate) fn into_body<'a>(self) -> Shared<dyn Body + 'a>
    where
        T: Body + 'a,
    {
        let place: NonNull<Counted<dyn Body + 'a>> = ManuallyDrop::new(self).0;
        Shared(place)
    }

    /// The handle's view of the value.
    pub(crate) fn into_delivery<'a, R>(self) -> Shared<dyn Deliver<R> + 'a>
    where
        T: Deliver<R> + 'a,
        R: 'a,
    {
        let place: NonNull<Counted<dyn Deliver<R> + 'a>> = ManuallyDrop::new(self).0;
        Shared(place)
    }
}

impl<'a> Shared<dyn Body + 'a> {
    /// Makes the body look `'static`.
    ///
    /// # Safety
    /// Neither the value nor its drop is reached after `'a`.
    pub(crate) unsafe fn outlive(self) -> Shared<dyn Body> {
        let place = ManuallyDrop::new(self).0;
        // SAFETY: the types differ in a lifetime, and the caller vouches for that.
        Shared(unsafe {
            std::mem::transmute::<NonNull<Counted<dyn Body + 'a>>, NonNull<Counted<dyn Body>>>(
                place,
            )
        })
    }
}

impl<T: ?Sized> Shared<T> {
    fn counted(&self) -> &Counted<T> {
        // SAFETY: alive while there is a reference to it.
        unsafe { self.0.as_ref() }
    }
}

impl<T: ?Sized> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.counted().value
    }
}

impl<T: ?Sized> Clone for Shared<T> {
    fn clone(&self) -> Shared<T> {
        // Made from a reference, so that the value is alive; and there are few references to each.
        self.counted().count.fetch_add(1, Ordering::Relaxed);
        Shared(self.0)
    }
}

impl<T: ?Sized> Drop for Shared<T> {
    fn drop(&mut self) {
        /// Frees the memory also when the value's destructor panics.
        struct Free(NonNull<u8>, Layout);
        impl Drop for Free {
            fn drop(&mut self) {
                // SAFETY: allocated by `try_new` with this layout.
                unsafe { std::alloc::dealloc(self.0.as_ptr(), self.1) };
            }
        }
        if self.counted().count.fetch_sub(1, Ordering::Release) != 1 {
            return;
        }
        // What the other references' holders did happened before the destructor.
        fence(Ordering::Acquire);
        let _free = Free(self.0.cast(), Layout::for_value(self.counted()));
        // SAFETY: this was the last reference.
        unsafe { std::ptr::drop_in_place(&raw mut (*self.0.as_ptr()).value) };
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
    pub(crate) fn new(slots: &'static [Slot<T>]) -> Reservation<T> {
        if let Some(place) = allocate::<MaybeUninit<T>>() {
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
