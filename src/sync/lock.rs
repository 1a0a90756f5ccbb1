//! The lock of the stack ledger: one futex word, three states, nothing else.
//!
//! Why neither parking_lot's nor std's: A10.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};

use crate::sys::futex::Word;

const FREE: u32 = 0;
const TAKEN: u32 = 1;
/// Taken, and a thread may sleep: the one that unlocks must wake it.
const CONTENDED: u32 = 2;

/// Looks at a taken lock this often before sleeping. The critical sections are some 50 ns long; the
/// number is bounded so that a SCHED_FIFO thread cannot starve the owner it waits for.
const SPINS: u32 = 100;

/// A mutual exclusion lock without poisoning, thread-local state or memory of its own.
pub(crate) struct Lock<T> {
    word: Word,
    value: UnsafeCell<T>,
}

// SAFETY: only the holder of the lock reaches the value, one thread at a time.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    /// Where a debugger reads the value.
    pub(crate) const VALUE_OFFSET: usize = std::mem::offset_of!(Self, value);

    pub(crate) const fn new(value: T) -> Self {
        Lock {
            word: Word::new(FREE),
            value: UnsafeCell::new(value),
        }
    }

    pub(crate) fn lock(&self) -> Guard<'_, T> {
        if !self.word.change(FREE, TAKEN) {
            self.lock_contended();
        }
        Guard { lock: self }
    }

    #[cold]
    fn lock_contended(&self) {
        for _ in 0..SPINS {
            if self.word.load() == FREE && self.word.change(FREE, TAKEN) {
                return;
            }
            std::hint::spin_loop();
        }
        // A thread that has slept cannot know whether others still sleep, so it always takes the lock as
        // contended: one needless wake-up at worst, never a lost one.
        while self.word.swap(CONTENDED) != FREE {
            self.word.wait(CONTENDED);
        }
    }

    /// Frees the lock, whichever thread holds it. The value may be as a critical section left it half-way.
    ///
    /// # Safety
    /// The process is a forked child, the lock was taken before the fork, and no thread of the child holds it.
    pub(crate) unsafe fn reset(&self) {
        self.word.swap(FREE);
    }
}

/// The lock is held while this lives.
pub(crate) struct Guard<'a, T> {
    lock: &'a Lock<T>,
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: a guard exists only while its thread holds the lock.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: only this thread holds the lock, and the guard is borrowed mutably, so that no other reference exists.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    fn drop(&mut self) {
        if self.lock.word.swap(FREE) == CONTENDED {
            self.lock.word.wake_one();
        }
    }
}

/// A value that lies outside a [`Lock`] but is touched only by its holder: the links inside a
/// list's entries.
///
/// Values go in and out by copy, so no reference into the cell ever exists.
pub(crate) struct Guarded<T>(UnsafeCell<T>);

// SAFETY: `get` and `set` are unsafe and demand the lock, so the cell is never touched by two
// threads at once.
unsafe impl<T: Send> Sync for Guarded<T> {}

impl<T: Copy> Guarded<T> {
    pub(crate) const fn new(value: T) -> Self {
        Guarded(UnsafeCell::new(value))
    }

    /// # Safety
    /// The caller holds the lock that guards this cell.
    pub(crate) unsafe fn get(&self) -> T {
        // SAFETY: no other thread writes, by the caller's promise.
        unsafe { *self.0.get() }
    }

    /// # Safety
    /// The caller holds the lock that guards this cell.
    pub(crate) unsafe fn set(&self, value: T) {
        // SAFETY: no other thread reads or writes, by the caller's promise.
        unsafe { *self.0.get() = value }
    }
}
