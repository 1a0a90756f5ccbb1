//! [`Roll`]: what is never freed, by its number.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// Grows, and never moves what it holds: a reader needs no lock, and a fork finds nothing half changed.
pub(super) struct Roll<T: 'static> {
    count: AtomicUsize,
    /// Of 64, 128, 256 … places.
    tables: [AtomicPtr<AtomicPtr<T>>; TABLES],
}

const FIRST: usize = 64;
const TABLES: usize = 32;

/// The table with the place of a number, how many places that table has, and which of them it is.
fn place(number: usize) -> Option<(usize, usize, usize)> {
    let position = number.checked_sub(1)?.checked_add(FIRST)?;
    let table = (position.ilog2() - FIRST.ilog2()) as usize;
    let places = FIRST << table;
    (table < TABLES).then_some((table, places, position - places))
}

impl<T> Roll<T> {
    pub(super) const fn new() -> Roll<T> {
        Roll {
            count: AtomicUsize::new(0),
            tables: [const { AtomicPtr::new(std::ptr::null_mut()) }; TABLES],
        }
    }

    /// A number, from 1, and a place for it. `None`: no memory.
    pub(super) fn reserve(&self) -> Option<usize> {
        let number = self.count.fetch_add(1, Ordering::Relaxed) + 1;
        let (table, places, _) = place(number)?;
        make(self.tables.get(table)?, places).then_some(number)
    }

    /// Gives `value` a number that was reserved.
    pub(super) fn set(&self, number: usize, value: &'static T) {
        if let Some(place) = self.place(number) {
            place.store(std::ptr::from_ref(value).cast_mut(), Ordering::Release);
        }
    }

    /// What has that number. Any number may be looked up.
    pub(super) fn get(&self, number: usize) -> Option<&'static T> {
        // SAFETY: null, or what `set` was given.
        unsafe { self.place(number)?.load(Ordering::Acquire).as_ref() }
    }

    fn place(&self, number: usize) -> Option<&AtomicPtr<T>> {
        let (table, _, index) = place(number)?;
        let table = self.tables.get(table)?.load(Ordering::Acquire);
        // SAFETY: null, or a table, which is never freed and has this place.
        (!table.is_null()).then(|| unsafe { &*table.add(index) })
    }
}

/// Makes the table that belongs in `slot`, unless there is one. Returns `false` if there is no memory.
fn make<T>(slot: &AtomicPtr<AtomicPtr<T>>, places: usize) -> bool {
    if !slot.load(Ordering::Acquire).is_null() {
        return true;
    }
    let Ok(layout) = Layout::array::<AtomicPtr<T>>(places) else {
        return false;
    };
    // SAFETY: the layout has a size, and zeroes are null pointers.
    let table = unsafe { alloc_zeroed(layout) }.cast::<AtomicPtr<T>>();
    if table.is_null() {
        return false;
    }
    let null = std::ptr::null_mut();
    let made = slot.compare_exchange(null, table, Ordering::AcqRel, Ordering::Acquire);
    if made.is_err() {
        // SAFETY: allocated above with this layout, and no other thread has seen it.
        unsafe { dealloc(table.cast(), layout) };
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_has_a_place_of_its_own() {
        let mut expected = (0, 0);
        for number in 1..100_000 {
            let (table, places, index) = place(number).expect("a place");
            assert_eq!((table, index), expected);
            assert_eq!(places, FIRST << table);
            expected.1 += 1;
            if expected.1 == places {
                expected = (expected.0 + 1, 0);
            }
        }
    }

    #[test]
    fn a_number_that_nothing_has_is_no_error() {
        static VALUE: u8 = 7;
        let roll = Roll::new();
        assert_eq!(roll.reserve(), Some(1));
        assert_eq!(roll.get(1), None);
        roll.set(1, &VALUE);
        assert_eq!(roll.get(1), Some(&VALUE));
        for number in [0, 2, 64, 65, 1 << 40, usize::MAX - 64, usize::MAX] {
            assert_eq!(roll.get(number), None);
        }
    }
}
