//! All lists and accounts of a ledger, behind its lock.

use super::accounts::{Budget, Stats, Tally};
use super::class::{CLASSES, Class};
use super::entry::{Details, End, Entry, Key, List, Measured, State};
use crate::sync::lock::{Guard, Lock};
use std::sync::atomic::Ordering;

#[derive(Clone, Copy)]
pub(super) enum Bound {
    Budget,
    Resident(usize),
    Nothing,
}

/// What the lock guards.
pub(super) struct Lists<E: 'static> {
    pub(super) key: Key,
    pub(super) budget: Budget,
    pub(super) live: List<E, false>,
    pub(super) pending: List<E, false>,
    pub(super) doomed: List<E, false>,
    pub(super) unmapping: List<E, false>,
    /// Cached stacks by class, warmest first.
    pub(super) classes: [List<E, false>; CLASSES],
    /// Cached stacks that count with their upper bounds, warmest first: younger than all that are measured.
    pub(super) unmeasured: List<E, true>,
    /// The others, warmest first.
    pub(super) measured: List<E, true>,
    /// Of the last measurement. That it comes round during one does no harm but to the accounts.
    pub(super) asked: u16,
    /// `refused` and the rest of the accounts, kept as they are reported.
    pub(super) stats: Stats,
}

impl<E: Entry> Lists<E> {
    pub(super) const fn new(budget: Budget) -> Self {
        Lists {
            // SAFETY: behind the lock from here on.
            key: unsafe { Key::new() },
            budget,
            live: List::EMPTY,
            pending: List::EMPTY,
            doomed: List::EMPTY,
            unmapping: List::EMPTY,
            classes: [const { List::EMPTY }; CLASSES],
            unmeasured: List::EMPTY,
            measured: List::EMPTY,
            asked: 0,
            stats: Stats::ZERO,
        }
    }

    pub(super) fn facts(&self, e: &E) -> Details {
        e.links().facts.get(&self.key)
    }

    /// Moves `e` to the list of `state`. A cached entry goes to the given end of its class; by age
    /// it is the youngest.
    #[inline(always)]
    pub(super) fn put(&mut self, e: &'static E, state: State, resident: usize, end: End) {
        let old = self.facts(e);
        let old_state = e.links().state();
        let new = Details {
            evicted: old_state == State::Cached,
            measured: Measured::No,
            resident,
            ..old
        };
        self.count(e, old_state, old, false, end);
        self.count(e, state, new, true, end);
        e.links().facts.set(&mut self.key, new);
        e.links().state.store(state as u8, Ordering::Release);
    }

    /// `e` joins or leaves the list and the account of its state.
    #[inline(always)]
    pub(super) fn count(
        &mut self,
        e: &'static E,
        state: State,
        facts: Details,
        entering: bool,
        end: End,
    ) {
        let (list, tally) = match state {
            State::Gone => (None, None),
            State::Live => (Some(&mut self.live), Some(&mut self.stats.live)),
            State::Pending => (Some(&mut self.pending), Some(&mut self.stats.pending)),
            State::Doomed => (Some(&mut self.doomed), Some(&mut self.stats.doomed)),
            State::Unmapping => (Some(&mut self.unmapping), Some(&mut self.stats.unmapping)),
            State::Cached => {
                if entering {
                    self.unmeasured.push(&mut self.key, e, End::Front);
                } else if facts.measured == Measured::No {
                    self.unmeasured.remove(&mut self.key, e);
                } else {
                    self.measured.remove(&mut self.key, e);
                }
                let class = facts
                    .class
                    .and_then(|class| self.classes.get_mut(class.index()));
                (class, Some(&mut self.stats.cached))
            }
        };
        if let Some(list) = list {
            if entering {
                list.push(&mut self.key, e, end);
            } else {
                list.remove(&mut self.key, e);
            }
        }
        if let Some(tally) = tally {
            let one = Tally::of(facts);
            *tally = if entering {
                tally.plus(one)
            } else {
                tally.minus(one)
            };
        }
    }

    /// Enters a stack that the ledger does not know, or no longer.
    pub(super) fn admit(&mut self, e: &'static E, class: Option<Class>, bytes: usize) {
        let facts = Details {
            evicted: false,
            measured: Measured::No,
            class,
            bytes,
            resident: 0,
        };
        e.links().facts.set(&mut self.key, facts);
        e.links().state.store(State::Gone as u8, Ordering::Relaxed);
        self.put(e, State::Live, 0, End::Front);
    }

    pub(super) fn forget(&mut self, e: &'static E) {
        self.put(e, State::Gone, 0, End::Front);
    }

    /// Keeps a released stack, or dooms it if the budget could never hold it.
    ///
    /// Dooming it at once, rather than caching it as the youngest, spares the older ones: they
    /// would all have to go before it does.
    pub(super) fn shelve(&mut self, e: &'static E, end: End) {
        let facts = Details {
            resident: e.resident(),
            ..self.facts(e)
        };
        if facts.class.is_some() && e.is_discarded() && self.budget.holds(Tally::of(facts)) {
            self.put(e, State::Cached, facts.resident, end);
        } else {
            self.put(e, State::Doomed, facts.resident, End::Back);
        }
    }

    /// Looks at up to `n` pending stacks, oldest first. One that is still held goes to the back of
    /// the queue, so that a thread that was preempted in its exit does not block the others.
    pub(super) fn settle(&mut self, n: usize) {
        for _ in 0..n.min(self.stats.pending.stacks) {
            let Some(e) = self.pending.head else { return };
            if e.released() {
                self.shelve(e, End::Front);
            } else {
                self.pending.remove(&mut self.key, e);
                self.pending.push(&mut self.key, e, End::Back);
            }
        }
    }

    /// The stack that a request of this class gets. One of which nothing was given back yet serves as well; of those
    /// only the first is looked at.
    pub(super) fn warmest(&self, class: Class) -> Option<&'static E> {
        let doomed = || {
            let e = self.doomed.head?;
            (self.facts(e).class == Some(class) && !e.is_discarded()).then_some(e)
        };
        self.classes.get(class.index())?.head.or_else(doomed)
    }

    /// Whether a stack must go, for the budget or because it is doomed. Most often none must.
    pub(super) fn has_victims(&self) -> bool {
        self.doomed.head.is_some() || !self.budget.holds(self.stats.cached)
    }

    /// The next stack to unmap, which is on its way then, or to measure. The budget comes first: a doomed stack that
    /// cannot be unmapped must not keep the cache over it.
    pub(super) fn next(&mut self, limit: Bound) -> Option<Victim<E>> {
        let most = match limit {
            Bound::Budget => self.budget,
            Bound::Resident(bytes) => Budget {
                resident: self.budget.resident.min(bytes),
                ..self.budget
            },
            Bound::Nothing => Budget::NOTHING,
        };
        let e = if most.holds(self.stats.cached) {
            self.doomed.head
        } else if matches!(limit, Bound::Budget)
            && let Some(e) = self.worth_measuring()
        {
            return Some(Victim::Measure(e));
        } else {
            self.coldest()
        }?;
        self.put(e, State::Unmapping, self.facts(e).resident, End::Front);
        Some(Victim::Unmap(e))
    }

    pub(super) fn coldest(&self) -> Option<&'static E> {
        self.measured.tail.or(self.unmeasured.tail)
    }

    /// The coldest stack that is not measured, if memory alone is over the budget. A single one is not worth it if its
    /// bound is a small part of the budget: a full cache whose warmest stack comes and goes would measure it each time.
    fn worth_measuring(&self) -> Option<&'static E> {
        let e = self.unmeasured.tail?;
        let but_memory = Budget {
            resident: usize::MAX,
            ..self.budget
        };
        let single = self
            .unmeasured
            .head
            .is_some_and(|head| std::ptr::eq(head, e));
        let small = self.facts(e).resident <= self.budget.resident / SMALL_PART;
        (but_memory.holds(self.stats.cached) && !(single && small)).then_some(e)
    }

    /// Some thread measures the cached stack `e`, which keeps its age. The number of the measurement.
    pub(super) fn ask(&mut self, e: &'static E) -> u16 {
        self.unmeasured.remove(&mut self.key, e);
        self.measured.push(&mut self.key, e, End::Front);
        self.asked = self.asked.wrapping_add(1);
        let facts = Details {
            measured: Measured::Asked(self.asked),
            ..self.facts(e)
        };
        e.links().facts.set(&mut self.key, facts);
        self.asked
    }

    /// The answer about a stack that is in this ledger, unless it is out of date. Without one the bound stays.
    pub(super) fn answer(&mut self, e: &'static E, number: u16, resident: Option<usize>) {
        let old = self.facts(e);
        if e.links().state() != State::Cached || old.measured != Measured::Asked(number) {
            return;
        }
        let new = Details {
            measured: Measured::Yes,
            resident: resident.unwrap_or(old.resident).min(old.resident),
            ..old
        };
        self.stats.cached.resident = self.stats.cached.resident - old.resident + new.resident;
        e.links().facts.set(&mut self.key, new);
    }
}

pub(super) enum Victim<E: 'static> {
    Unmap(&'static E),
    Measure(&'static E),
}

/// A stack whose bound is this part of the budget or less may be counted with it while others are unmapped.
const SMALL_PART: usize = 64;

/// The stacks of one cache: see `ledger`.
pub(crate) struct Ledger<E: 'static> {
    pub(super) lists: Lock<Lists<E>>,
}

impl<E: Entry> Ledger<E> {
    pub(crate) const fn new(budget: Budget) -> Self {
        Ledger {
            lists: Lock::new(Lists::new(budget)),
        }
    }

    pub(crate) fn id(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Locks, if `e` is this ledger's and in `state`.
    pub(super) fn enter(&self, e: &'static E, state: State) -> Option<Guard<'_, Lists<E>>> {
        let mut lists = self.lists.lock();
        if self.owns(e) && e.links().state() == state {
            return Some(lists);
        }
        lists.stats.refused += 1;
        None
    }

    /// Relaxed: only a holder of this lock makes the ledger an entry's owner, or ends that.
    pub(super) fn owns(&self, e: &E) -> bool {
        e.links().owner.load(Ordering::Relaxed) == self.id()
    }
}
