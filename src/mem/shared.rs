//! [`Shared`]: what creator and thread own together.

use super::body::{Body, Deliver};
use super::fallible::allocate;
use crate::sync::forked_bare;
use std::alloc::Layout;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering, fence};

/// `Arc` that gives the value back where there is no memory for it. Without weak references, and an ending thread can
/// drop the value alone ([`Shared::leave`]).
pub(crate) struct Shared<T: ?Sized>(NonNull<Counted<T>>);

struct Counted<T: ?Sized> {
    count: AtomicUsize,
    value: T,
}

/// Memory whose value is gone. Dropping it frees it.
pub(crate) struct Memory {
    at: NonNull<u8>,
    layout: Layout,
}

// SAFETY: plain memory, of which this is the only owner.
unsafe impl Send for Memory {}
// SAFETY: a shared reference gives no access to the memory.
unsafe impl Sync for Memory {}

impl Drop for Memory {
    fn drop(&mut self) {
        // In a child of _Fork(3) malloc's locks can be held for ever.
        if forked_bare() {
            return;
        }
        // SAFETY: allocated by `try_new` with this layout.
        unsafe { std::alloc::dealloc(self.at.as_ptr(), self.layout) };
    }
}

// SAFETY: a thread with a reference can reach the value, beside others (Sync), and can be the one that drops it
// (Send).
unsafe impl<T: Send + Sync + ?Sized> Send for Shared<T> {}
// SAFETY: cloning through a shared reference and dropping the clone elsewhere is what `Send` above allows.
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

    /// The thread's view of the value, without a count of its own.
    pub(crate) fn body<'a>(&self) -> Borrowed<'_, dyn Body + 'a>
    where
        T: Body + 'a,
    {
        let place: NonNull<Counted<dyn Body + 'a>> = self.0;
        Borrowed(ManuallyDrop::new(Shared(place)), PhantomData)
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

/// Another view of a reference, which stays the only one of the two that counts.
pub(crate) struct Borrowed<'r, T: ?Sized>(ManuallyDrop<Shared<T>>, PhantomData<&'r ()>);

impl<T: ?Sized> Deref for Borrowed<'_, T> {
    type Target = Shared<T>;

    fn deref(&self) -> &Shared<T> {
        &self.0
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

impl<'a, R> Shared<dyn Deliver<R> + 'a> {
    /// Makes the view look `'static`.
    ///
    /// # Safety
    /// Neither the value nor its drop is reached after `'a`.
    pub(crate) unsafe fn outlive(self) -> Shared<dyn Deliver<R>> {
        let place = ManuallyDrop::new(self).0;
        // SAFETY: the types differ in a lifetime, and the caller vouches for what it stands for.
        Shared(unsafe {
            std::mem::transmute::<
                NonNull<Counted<dyn Deliver<R> + 'a>>,
                NonNull<Counted<dyn Deliver<R>>>,
            >(place)
        })
    }
}

impl<T: ?Sized> Shared<T> {
    fn counted(&self) -> &Counted<T> {
        // SAFETY: alive while there is a reference to it.
        unsafe { self.0.as_ref() }
    }

    pub(crate) fn is(&self, other: &Shared<T>) -> bool {
        ptr::addr_eq(self.0.as_ptr(), other.0.as_ptr())
    }

    /// Drops the reference, and the value if it was the last one. The memory is the caller's then: a thread that
    /// frees for the first time in its life makes malloc map memory to keep what is freed there,
    /// which a filter in the thread may deny (A8).
    pub(crate) fn leave(self) -> Option<Memory> {
        let shared = ManuallyDrop::new(self);
        if shared.counted().count.fetch_sub(1, Ordering::Release) != 1 {
            return None;
        }
        // What the holders of the other references did happened before the destructor.
        fence(Ordering::Acquire);
        // Made before the destructor runs, so that the memory is freed where that panics.
        let memory = Memory {
            at: shared.0.cast(),
            layout: Layout::for_value(shared.counted()),
        };
        // SAFETY: this was the last reference.
        unsafe { ptr::drop_in_place(&raw mut (*shared.0.as_ptr()).value) };
        Some(memory)
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

impl<T: ?Sized + std::fmt::Debug> std::fmt::Debug for Shared<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: ?Sized> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: a second handle to the same reference, and this one is not used again.
        drop(Shared::leave(Shared(self.0)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    struct CountsDrops(Arc<AtomicUsize>);

    impl Drop for CountsDrops {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn the_last_reference_drops_the_value_once_and_keeps_the_memory() {
        const THREADS: usize = 4;
        const EACH: usize = 2000;
        let dropped = Arc::new(AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                let dropped = &dropped;
                scope.spawn(move || {
                    for index in 0..EACH {
                        let value = CountsDrops(Arc::clone(dropped));
                        let one = Shared::try_new(value).unwrap_or_else(|_| panic!("memory"));
                        let other = one.clone();
                        assert!(other.leave().is_none());
                        if index % 2 == 0 {
                            assert!(one.leave().is_some());
                        }
                    }
                });
            }
        });
        assert_eq!(dropped.load(Ordering::Relaxed), THREADS * EACH);
    }
}
