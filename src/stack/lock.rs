//! The lock of the stack ledger: one futex word, three states, nothing else.
//!
//! Not parking_lot's mutex, for three reasons, each a rule of this crate:
//! - A thread that parks there for the first time allocates (thread data, hash table) and registers
//!   a thread-local destructor. A thread that gives its stack back has already run its destructors,
//!   and on the way from a refused step to the error nothing may be allocated (rule 4).
//! - Its queues are process-wide. A child forked while any thread parked on any parking_lot mutex
//!   can find a bucket locked for ever, even if this lock was held across the fork on purpose.
//! - A word can be taken over in a forked child, and read by gdb in a core file.
//!
//! std's mutex has no way to be taken over either.

use std::cell::UnsafeCell;
use std::mem;
use std::ops::{Deref, DerefMut};

use super::futex::Word;

const FREE: u32 = 0;
const TAKEN: u32 = 1;
/// Taken, and somebody may sleep: whoever unlocks must wake.
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

    pub(crate) fn try_lock(&self) -> Option<Guard<'_, T>> {
        self.word
            .change(FREE, TAKEN)
            .then_some(Guard { lock: self })
    }

    #[cold]
    fn lock_contended(&self) {
        for _ in 0..SPINS {
            if self.word.load() == FREE && self.word.change(FREE, TAKEN) {
                return;
            }
            std::hint::spin_loop();
        }
        // Whoever has slept cannot know whether others still sleep, so it always takes the lock as
        // contended: one needless wake-up at worst, never a lost one.
        while self.word.swap(CONTENDED) != FREE {
            self.word.wait(CONTENDED);
        }
    }

    /// Takes the lock and keeps it without a guard, for the time of a fork.
    pub(crate) fn hold(&self) {
        mem::forget(self.lock());
    }

    /// Ends [`Lock::hold`].
    ///
    /// # Safety
    /// This thread, or the thread that it is a forked copy of, holds the lock and has no guard of
    /// it.
    pub(crate) unsafe fn held(&self) -> Guard<'_, T> {
        Guard { lock: self }
    }

    /// Takes the lock whoever holds it. The value may be as a critical section left it half-way.
    ///
    /// # Safety
    /// The process has a single thread and the lock's owner is not part of it: a child of fork(2).
    pub(crate) unsafe fn seize(&self) -> Guard<'_, T> {
        self.word.swap(TAKEN);
        Guard { lock: self }
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
        // SAFETY: as above, and the guard is borrowed mutably.
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
    /// Offset of the value, for a debugger.
    pub(crate) const VALUE: usize = mem::offset_of!(Self, 0);

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
