//! Heap memory that may be refused: a process at RLIMIT_AS or RLIMIT_DATA is told so by an error, where
//! std's `Box` and `Arc` would abort it.

use crate::handle::Deliver;
use crate::start::Body;
use std::alloc::Layout;
use std::cell::UnsafeCell;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::ptr::{self, NonNull};
use std::sync::atomic::Ordering::Acquire;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering, fence};

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

/// `Arc` that gives the value back where there is no memory for it. Without weak references, and an ending thread can
/// give up the last one without the allocator ([`leave`](Shared::leave)).
pub(crate) struct Shared<T: ?Sized>(NonNull<Counted<T>>);

/// A [`Left`] comes first, whatever the value is.
#[repr(C)]
struct Counted<T: ?Sized> {
    /// Touched only by the last owner.
    left: UnsafeCell<Left>,
    count: AtomicUsize,
    value: T,
}

/// What ending threads have left for others to free: a thread that frees for the first time in its life makes the
/// allocator ask the kernel for memory to keep what is freed there, and a filter in the thread may deny that (rule 8
/// of the architecture).
static LEFT: AtomicPtr<Left> = AtomicPtr::new(ptr::null_mut());

/// Lies in the memory that is to be freed.
pub(crate) struct Left {
    next: *mut Left,
    free: unsafe fn(NonNull<Left>),
}

impl Left {
    /// Leaves memory that comes from elsewhere, to be freed with `free`.
    ///
    /// # Safety
    /// `at` is aligned and has room for this, and all of it is the caller's to give to `free`.
    pub(crate) unsafe fn place(at: NonNull<Left>, free: unsafe fn(NonNull<Left>)) {
        let next = ptr::null_mut();
        // SAFETY: by the caller's promise.
        unsafe { at.as_ptr().write(Left { next, free }) };
        Left::push(at);
    }

    fn push(left: NonNull<Left>) {
        let mut first = LEFT.load(Ordering::Relaxed);
        loop {
            // SAFETY: memory that nobody else reaches before it is in the list.
            unsafe { (*left.as_ptr()).next = first };
            // Whoever frees must see what was written here.
            match LEFT.compare_exchange_weak(
                first,
                left.as_ptr(),
                Ordering::Release,
                Ordering::Relaxed,
            ) {
                Ok(_) => return,
                Err(other) => first = other,
            }
        }
    }
}

/// Frees what ended threads have left.
pub(crate) fn free_left() {
    if LEFT.load(Ordering::Relaxed).is_null() {
        return;
    }
    super::cache::notice_fork();
    // Always all of them, so that an entry cannot come back in the middle of this.
    let mut next = LEFT.swap(ptr::null_mut(), Acquire);
    while let Some(left) = NonNull::new(next) {
        // SAFETY: who has taken the list owns its entries; each names what it is freed with.
        unsafe {
            let Left { next: rest, free } = left.as_ptr().read();
            free(left);
            next = rest;
        }
    }
}

/// In a forked child that no handler prepared: another thread can have been at the allocator, which then is for
/// nobody here who has no need of it.
pub(crate) fn forget_left() {
    LEFT.store(ptr::null_mut(), Ordering::Relaxed);
}

/// The value is gone.
///
/// # Safety
/// The caller owns the memory of a `Counted<T>`.
unsafe fn free_memory<T>(left: NonNull<Left>) {
    // SAFETY: allocated by `try_new` with this layout.
    unsafe { std::alloc::dealloc(left.as_ptr().cast(), Layout::new::<Counted<T>>()) };
}

/// # Safety
/// The caller owns a `Counted<T>`.
unsafe fn free_whole<T>(left: NonNull<Left>) {
    // SAFETY: allocated by `try_new` with this layout, as Box frees it.
    drop(unsafe { Box::from_raw(left.as_ptr().cast::<Counted<T>>()) });
}

// SAFETY: as for Arc: the value is reached by shared references from many threads, and dropped in any.
unsafe impl<T: Send + Sync + ?Sized> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync + ?Sized> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn try_new(value: T) -> Result<Shared<T>, T> {
        match allocate::<Counted<T>>() {
            Some(place) => {
                let left = UnsafeCell::new(Left {
                    next: ptr::null_mut(),
                    free: free_memory::<T>,
                });
                let count = AtomicUsize::new(1);
                // SAFETY: allocated for this type just now.
                unsafe { place.write(Counted { left, count, value }) };
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

impl<T: Send + 'static> Shared<T> {
    /// As [`leave`](Shared::leave), the value included: for one whose destructor frees.
    pub(crate) fn leave_whole(self) {
        let shared = ManuallyDrop::new(self);
        if shared.give_up() {
            let left = shared.0.cast::<Left>();
            // SAFETY: this was the last reference.
            unsafe { (*left.as_ptr()).free = free_whole::<T> };
            Left::push(left);
        }
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

    /// Takes this reference from the count, and says whether it was the last.
    fn give_up(&self) -> bool {
        if self.counted().count.fetch_sub(1, Ordering::Release) != 1 {
            return false;
        }
        // What the other references' holders did happened before the destructor.
        fence(Ordering::Acquire);
        true
    }

    /// Drops the reference. If it was the last the value goes, too, but its memory is left to [`free_left`].
    pub(crate) fn leave(self) {
        /// Also when the value's destructor panics.
        struct Leave(NonNull<Left>);
        impl Drop for Leave {
            fn drop(&mut self) {
                Left::push(self.0);
            }
        }
        let shared = ManuallyDrop::new(self);
        if shared.give_up() {
            let _leave = Leave(shared.0.cast());
            // SAFETY: this was the last reference.
            unsafe { ptr::drop_in_place(&raw mut (*shared.0.as_ptr()).value) };
        }
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
        /// Also when the value's destructor panics.
        struct Free(NonNull<Left>);
        impl Drop for Free {
            fn drop(&mut self) {
                // SAFETY: the last owner's, without its value; it names what it is freed with.
                unsafe { ((*self.0.as_ptr()).free)(self.0) };
            }
        }
        if self.give_up() {
            let _free = Free(self.0.cast());
            // SAFETY: this was the last reference.
            unsafe { ptr::drop_in_place(&raw mut (*self.0.as_ptr()).value) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    struct Counts(Arc<AtomicUsize>);

    impl Drop for Counts {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn what_is_left_goes_once() {
        const THREADS: usize = 4;
        const EACH: usize = 2000;
        let dropped = Arc::new(AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                let dropped = &dropped;
                scope.spawn(move || {
                    for index in 0..EACH {
                        let value = Counts(Arc::clone(dropped));
                        let one = Shared::try_new(value).unwrap_or_else(|_| panic!("memory"));
                        let other = one.clone();
                        other.leave();
                        if index % 2 == 0 {
                            one.leave_whole();
                        } else {
                            one.leave();
                        }
                        if index % 50 == 0 {
                            free_left();
                        }
                    }
                });
            }
        });
        free_left();
        assert_eq!(dropped.load(Ordering::Relaxed), THREADS * EACH);
    }

    #[test]
    fn a_value_does_not_wait_for_its_memory_to_be_freed() {
        let dropped = Arc::new(AtomicUsize::new(0));
        let value = Counts(Arc::clone(&dropped));
        let one = Shared::try_new(value).unwrap_or_else(|_| panic!("memory"));
        let other = one.clone();
        one.leave();
        assert_eq!(dropped.load(Ordering::Relaxed), 0);
        other.leave();
        assert_eq!(dropped.load(Ordering::Relaxed), 1);
    }
}
