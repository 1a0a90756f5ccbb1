//! [`Victims`]: what is to be unmapped.

use super::entry::{End, Entry, NO_OWNER, State};
use super::lists::{Bound, Ledger, Lists, Victim};
use std::sync::atomic::Ordering;

/// Entries per turn of the lock for the calls that see many.
pub(super) const TURN: usize = 32;

/// Stacks to unmap, handed out one by one and without the lock:
///
/// ```text
/// while let Some(stack) = victims.pop() {
///     if stack.unmap() {
///         victims.unmapped();
///         // Only now may the record be used for another mapping.
///     }
/// }
/// ```
///
/// A stack for which `unmapped` is not called (munmap fails with ENOMEM where it would split a
/// mapping at vm.max_map_count) goes back to the cache, with the resident bytes that it then
/// reports, as the youngest by age and the last of its class to be taken: so the next attempt
/// begins with another one. The number of attempts is bounded. Dropped early, this leaves the other
/// stacks where they are.
#[must_use = "the stacks stay mapped"]
pub(crate) struct Victims<'a, E: Entry> {
    pub(super) ledger: &'a Ledger<E>,
    pub(super) limit: Bound,
    /// Found in advance, so that a `give` within the budget takes the lock once.
    pub(super) ready: Option<&'static E>,
    /// Handed out by the last `pop`.
    pub(super) current: Option<&'static E>,
    /// Stacks that may still be measured or handed out.
    pub(super) left: usize,
    /// Pending stacks still to look at.
    pub(super) look: usize,
}

impl<'a, E: Entry> Victims<'a, E> {
    pub(super) const fn none(ledger: &'a Ledger<E>) -> Self {
        Victims {
            ledger,
            limit: Bound::Budget,
            ready: None,
            current: None,
            left: 0,
            look: 0,
        }
    }

    /// The next stack to unmap; puts the last one back, unless [`Victims::unmapped`] was called.
    /// O(1), and O(1) for each pending stack that `trim`, `clear` and `keep_budget` have yet to look
    /// at.
    #[inline]
    pub(crate) fn pop(&mut self) -> Option<&'static E> {
        if let Some(e) = self.current.take() {
            self.put_back(e);
        }
        if self.left > 0 {
            self.refill();
        }
        self.current = self.ready.take();
        self.current
    }

    /// There is nothing to unmap.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.ready.is_none() && self.left == 0
    }

    /// Whether the stacks are unmapped to keep the budget only, so that one whose memory is given back may stay.
    pub(crate) fn are_excess(&self) -> bool {
        matches!(self.limit, Bound::Budget)
    }

    /// The stack handed out last is unmapped. O(1).
    pub(crate) fn unmapped(&mut self) {
        let Some(e) = self.current.take() else { return };
        if let Some(mut lists) = self.ledger.enter(e, State::Unmapping) {
            lists.stats.evictions += u64::from(lists.facts(e).evicted);
            lists.forget(e);
            e.links().owner.store(NO_OWNER, Ordering::Release);
        }
    }

    #[cold]
    pub(super) fn put_back(&self, e: &'static E) {
        if let Some(mut lists) = self.ledger.enter(e, State::Unmapping) {
            lists.shelve(e, End::Back);
        }
    }

    #[cold]
    pub(super) fn refill(&mut self) {
        while self.ready.is_none() && self.left > 0 {
            let mut lists = self.ledger.lists.lock();
            let Some(e) = self.advance(&mut lists) else {
                continue;
            };
            let number = lists.ask(e);
            drop(lists);
            self.left -= 1;
            let resident = e.measure();
            let mut lists = self.ledger.lists.lock();
            if self.ledger.owns(e) {
                lists.answer(e, number, resident);
            }
        }
    }

    /// Finds the next stack to unmap. What it returns is to be measured first.
    #[cold]
    pub(super) fn advance(&mut self, lists: &mut Lists<E>) -> Option<&'static E> {
        let look = self.look.min(TURN);
        self.look -= look;
        lists.settle(look);
        match lists.next(self.limit) {
            Some(Victim::Unmap(e)) => {
                self.ready = Some(e);
                self.left -= 1;
            }
            Some(Victim::Measure(e)) => return Some(e),
            None if self.look == 0 => self.left = 0,
            None => {}
        }
        None
    }
}

impl<E: Entry> Drop for Victims<'_, E> {
    #[inline]
    fn drop(&mut self) {
        if let Some(e) = self.current {
            self.put_back(e);
        }
        if let Some(e) = self.ready {
            self.put_back(e);
        }
    }
}
