//! Membership in glibc's list of live threads.
//!
//! A set-id broadcast, dlopen's initialisation of static TLS, dlclose, fork and debuggers walk this
//! list; a thread that is not on it keeps its old uid after another thread's `setuid`.

use crate::sys;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering, fence};

/// `list_t`, the intrusive links of glibc's lists.
#[repr(C)]
struct Node {
    next: AtomicUsize,
    prev: AtomicUsize,
}

/// In `_rtld_global` the user list is followed by the cache list (16 bytes), the cache's size (8),
/// the in-flight word (8) and the lock, in this order since 2.34.
const IN_FLIGHT: usize = 40;
const LOCK: usize = 48;

/// More threads than any kernel allows (PID_MAX_LIMIT is 4 Mi): a longer walk is not a list.
const LONGEST: usize = 1 << 22;

pub(super) struct ThreadList {
    /// Address of the head of `_dl_stack_user`, the list of threads with stacks of their own.
    head: usize,
}

impl ThreadList {
    /// # Safety
    /// `head` is the head that libthread_db's descriptors give.
    pub(super) unsafe fn new(head: usize) -> ThreadList {
        ThreadList { head }
    }

    fn lock_word(&self) -> &AtomicU32 {
        // SAFETY: an int in `_rtld_global`, which lives as long as the process.
        unsafe { &*((self.head + LOCK) as *const AtomicU32) }
    }

    fn in_flight(&self) -> &AtomicUsize {
        // SAFETY: a word in `_rtld_global`.
        unsafe { &*((self.head + IN_FLIGHT) as *const AtomicUsize) }
    }

    /// # Safety
    /// `address` is a list head or a linked element.
    unsafe fn links<'a>(address: usize) -> &'a Node {
        // SAFETY: the caller vouches for the address.
        unsafe { &*(address as *const Node) }
    }

    /// The self-check before the lock is trusted: an ordinary futex lock holds 0, 1 or 2.
    pub(super) fn lock_is_plausible(&self) -> bool {
        self.lock_word().load(Ordering::Relaxed) <= 2
            && self.in_flight().load(Ordering::Relaxed) & 7 <= 1
    }

    /// Whether `element` is on the list.
    pub(super) fn contains(&self, element: usize) -> bool {
        let head = self.head;
        sys::lll_lock(self.lock_word());
        let mut found = false;
        // SAFETY: head and elements are linked while the lock is held.
        let mut at = unsafe { Self::links(head) }.next.load(Ordering::Relaxed);
        for _ in 0..LONGEST {
            if at == head || at == 0 {
                break;
            }
            if at == element {
                found = true;
                break;
            }
            // SAFETY: neither null nor the head, so that `at` is an element, linked while the lock is held.
            at = unsafe { Self::links(at) }.next.load(Ordering::Relaxed);
        }
        sys::lll_unlock(self.lock_word());
        found
    }

    /// Puts `element` on the user list, in the order that a fork in between survives: the new
    /// element's links, the neighbour's back link, then the head. (fork repairs an addition only
    /// on the other lists; with this order the user list needs no repair.)
    ///
    /// # Safety
    /// `element` is the list field of a prepared descriptor that stays mapped while listed. SIGSETXID
    /// is unblocked, application signals are blocked (G3).
    pub(super) unsafe fn add(&self, element: usize) {
        sys::lll_lock(self.lock_word());
        // SAFETY: the lock is held, so the head and its neighbour are linked and stay so.
        unsafe {
            let (head, new) = (Self::links(self.head), Self::links(element));
            let first = head.next.load(Ordering::Relaxed);
            new.next.store(first, Ordering::Relaxed);
            new.prev.store(self.head, Ordering::Relaxed);
            Self::links(first).prev.store(element, Ordering::Relaxed);
            fence(Ordering::Release);
            head.next.store(element, Ordering::Release);
        }
        sys::lll_unlock(self.lock_word());
    }

    /// Takes `element` off its list, unless `listed` says under the lock that it is off already.
    ///
    /// # Safety
    /// `listed` belongs to `element`, which is mapped. SIGSETXID is unblocked, application signals are
    /// blocked (G3).
    pub(super) unsafe fn remove(&self, element: usize, listed: &AtomicBool) {
        sys::lll_lock(self.lock_word());
        // The flag that brought the caller here was read without the lock.
        if listed.load(Ordering::Relaxed) {
            // SAFETY: the lock is held and the element is linked.
            unsafe { self.unlink(element, listed) };
        }
        sys::lll_unlock(self.lock_word());
    }

    /// Like [`ThreadList::remove`], unless the lock is taken: then nothing happens.
    ///
    /// # Safety
    /// `element` is listed, with this flag.
    #[inline(always)]
    pub(super) unsafe fn try_remove(&self, element: usize, listed: &AtomicBool) {
        if sys::lll_try_lock(self.lock_word()) {
            // SAFETY: the lock is held and the element is linked.
            unsafe { self.unlink(element, listed) };
            sys::lll_unlock(self.lock_word());
        }
    }

    /// The in-flight word holds the element meanwhile, so that a fork in between replays the removal in
    /// the child.
    ///
    /// # Safety
    /// The lock is held, and `element` is linked.
    #[inline(always)]
    unsafe fn unlink(&self, element: usize, listed: &AtomicBool) {
        self.in_flight().store(element, Ordering::Relaxed);
        fence(Ordering::Release);
        // SAFETY: by the caller's promise the element and its neighbours are linked and stay so.
        unsafe {
            let links = Self::links(element);
            let next = links.next.load(Ordering::Relaxed);
            let prev = links.prev.load(Ordering::Relaxed);
            Self::links(next).prev.store(prev, Ordering::Relaxed);
            Self::links(prev).next.store(next, Ordering::Relaxed);
        }
        fence(Ordering::Release);
        self.in_flight().store(0, Ordering::Relaxed);
        listed.store(false, Ordering::Release);
    }
}
