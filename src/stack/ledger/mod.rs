//! The ledger of all stacks of one cache: which are in use, which wait for the kernel, which can be
//! taken.
//!
//! It makes no system call but its lock's (and that only if the lock is contended) and [`Entry::measure`], allocates
//! nothing and knows nothing of mappings, so that it can be checked alone (`tests/model/loom_ledger.rs`,
//! `tests/model/ledger.rs`).
//!
//! ARCHITECTURE.md draws the states of a stack and what changes them.
//!
//! **A2** (no reuse before the kernel has cleared the tid word) is kept here and nowhere else:
//! every way into `cached`, `doomed` and `unmapping` passes [`Entry::released`], except in a forked
//! child, where the threads do not exist. A detached thread gives its stack back while it still runs
//! on it; the stack then waits as `pending`.
//!
//! **Cost.** The lists are doubly linked through the entries. Each call holds the lock for a
//! constant number of steps, whatever the number of stacks or classes; those that must see many
//! stacks (trim, clear, sweep, hand-over) take the lock anew for every few of them. The two
//! exceptions hold it for O(n) and say so: [`Ledger::for_each`] and [`Ledger::rebuild`].
//!
//! **Memory.** A cached stack counts with an upper bound, which costs nothing to know, until the budget for memory is
//! reached. Then stacks are measured, the coldest first, before any is unmapped to keep it. A stack is measured where
//! it lies: any thread may take it meanwhile, and the answer is dropped.
//!
//! **Fork.** The lock is not held across a fork, so a child can find the lists half changed, and
//! gives them up. What survives at every instruction is in the entries: the ledger that an entry is
//! in, and its state, one atomic word each. From these [`Ledger::rebuild`] makes new lists.
//!
//! **Accounts.** A stack is in exactly one state, and [`Stats::mapped`] is the sum over the states:
//! at any instant every mapping is accounted for, also while it is being unmapped. A call that does
//! not fit its entry's state (a stack given back twice, or to the wrong cache) changes nothing but
//! [`Stats::refused`].

pub(super) mod accounts;
pub(super) mod class;
mod entry;
mod lists;
mod victims;

pub(crate) use accounts::{Budget, Stats};
pub(crate) use entry::{Entry, Links, State};
pub(crate) use lists::Ledger;
pub(crate) use victims::Victims;

use crate::sync::lock::Guard;
use class::Class;
use entry::{End, NO_OWNER};
use lists::{Bound, Lists};
use std::sync::atomic::Ordering;
use victims::TURN;

/// Pending stacks that each call looks at. More than one, so that a burst of detached threads
/// drains faster than it fills.
pub(crate) const LOOK: usize = 4;
/// Further pending stacks that `take` looks at before it reports a miss, which costs a mmap and
/// page faults.
pub(crate) const LOOK_ON_MISS: usize = 8;
/// Most stacks that one `give` or `take` makes its caller unmap. A stack is given once and can be over budget
/// once, so the average is at most one, and what is left is made up for by the next few calls.
pub(crate) const EVICT: usize = 4;

impl<E: Entry> Ledger<E> {
    /// Enters a freshly mapped stack as live. O(1).
    pub(crate) fn adopt(&self, e: &'static E) {
        let mut lists = self.lists.lock();
        let free = e
            .links()
            .owner
            .compare_exchange(NO_OWNER, self.id(), Ordering::Acquire, Ordering::Relaxed)
            .is_ok();
        if free {
            lists.admit(e, e.class(), e.bytes());
        } else {
            lists.stats.refused += 1;
        }
    }

    /// The warmest cached stack of the class, now live; counts a hit or a miss if this is the `first` attempt of a
    /// spawn. O(1): one list head and at most [`LOOK`] + [`LOOK_ON_MISS`] pending stacks. The caller unmaps at most
    /// [`EVICT`] stacks: those of detached threads become cached here, and the threads have unmapped nothing.
    #[inline(always)]
    pub(crate) fn take(&self, class: Class, first: bool) -> (Option<&'static E>, Victims<'_, E>) {
        let mut lists = self.lists.lock();
        let unseen = lists.stats.pending.stacks.saturating_sub(LOOK);
        lists.settle(LOOK);
        let mut found = lists.warmest(class);
        if found.is_none() {
            lists.settle(LOOK_ON_MISS.min(unseen));
            found = lists.warmest(class);
        }
        match found {
            Some(e) => {
                lists.put(e, State::Live, 0, End::Front);
                lists.stats.hits += u64::from(first);
            }
            None => lists.stats.misses += u64::from(first),
        }
        (found, self.evict_some(lists))
    }

    /// Counts a miss of a request that has no class, and for which nothing is cached. O(1).
    pub(crate) fn miss(&self) {
        self.lists.lock().stats.misses += 1;
    }

    /// Takes a stack back, from the joiner or from a spawn that failed. O(1); the caller unmaps at most [`EVICT`]
    /// stacks.
    pub(crate) fn give(&self, e: &'static E) -> Victims<'_, E> {
        let Some(mut lists) = self.enter(e, State::Live) else {
            return Victims::none(self);
        };
        lists.settle(LOOK);
        if e.released() {
            lists.shelve(e, End::Front);
        } else {
            lists.put(e, State::Pending, e.resident(), End::Back);
        }
        self.evict_some(lists)
    }

    #[inline(always)]
    fn evict_some<'a>(&'a self, mut lists: Guard<'a, Lists<E>>) -> Victims<'a, E> {
        let mut victims = Victims::none(self);
        if lists.has_victims() {
            victims.left = EVICT;
            let _ = victims.advance(&mut lists);
        }
        victims
    }

    /// Takes a stack back from the detached thread that still runs on it. Returns `false` if it is not this ledger's.
    /// O(1). The thread unmaps nothing: what is over the budget waits for the next call that does.
    pub(crate) fn give_running(&self, e: &'static E) -> bool {
        let mut lists = self.lists.lock();
        if !self.owns(e) {
            return false;
        }
        if e.links().state() == State::Live {
            lists.put(e, State::Pending, e.resident(), End::Back);
        } else {
            lists.stats.refused += 1;
        }
        true
    }

    /// The address of the ledger that `e` is in, or was a moment ago.
    pub(crate) fn owner_of(e: &E) -> usize {
        e.links().owner.load(Ordering::Acquire)
    }

    /// Takes a stack back that shall be unmapped, not kept. If a thread still holds it, this is
    /// [`Ledger::give`]. O(1).
    pub(crate) fn retire(&self, e: &'static E) -> Victims<'_, E> {
        if !e.released() {
            return self.give(e);
        }
        let Some(mut lists) = self.enter(e, State::Live) else {
            return Victims::none(self);
        };
        lists.put(e, State::Unmapping, e.resident(), End::Front);
        let mut victims = Victims::none(self);
        victims.ready = Some(e);
        drop(lists);
        victims
    }

    /// Unmaps the coldest stacks until those that remain keep at most `resident` bytes in memory.
    /// O(1) for each of them and for each pending stack; the lock is taken anew for every few.
    pub(crate) fn trim(&self, resident: usize) -> Victims<'_, E> {
        self.shrink(Bound::Resident(resident))
    }

    /// Unmaps everything that no thread uses. Cost as for [`Ledger::trim`].
    pub(crate) fn clear(&self) -> Victims<'_, E> {
        self.shrink(Bound::Nothing)
    }

    /// Changes what the cache may keep; what is too much waits for the next call that unmaps.
    pub(crate) fn set_budget(&self, budget: Budget) {
        self.lists.lock().budget = budget;
    }

    /// Unmaps the coldest stacks until the rest fits the budget. Cost as for [`Ledger::trim`].
    pub(crate) fn keep_budget(&self) -> Victims<'_, E> {
        self.shrink(Bound::Budget)
    }

    /// Each stack is measured once and tried once, so that this ends also when none can be unmapped, or when others
    /// keep giving.
    fn shrink(&self, limit: Bound) -> Victims<'_, E> {
        let stats = self.stats();
        let mut victims = Victims::none(self);
        victims.limit = limit;
        victims.look = stats.pending.stacks;
        // To measure, and to unmap.
        victims.left = 2 * (stats.pending.stacks + stats.cached.stacks) + stats.doomed.stacks;
        victims
    }

    /// Finds the stacks of detached threads that ended without giving them back (killed by a
    /// seccomp filter, or by a bare exit system call). O(live), a few per turn of the lock.
    ///
    /// `unowned` is called only for live stacks whose tid word the kernel has cleared. It returns `true`
    /// **once**, by an atomic change from "the thread itself will give its stack back" to anything
    /// else: no thread gives it later, because that one is gone, and it must not be found again
    /// in its next life, before the next thread has started. `reap` gets each such stack before it
    /// can be taken, as its only owner and without the lock.
    pub(crate) fn sweep(
        &self,
        mut unowned: impl FnMut(&E) -> bool,
        mut reap: impl FnMut(&'static E),
    ) -> Victims<'_, E> {
        let mut victims = Victims::none(self);
        let mut unseen = self.stats().live.stacks;
        while unseen > 0 {
            let mut found = [None; TURN];
            let mut lists = self.lists.lock();
            for slot in found.iter_mut().take(unseen) {
                let Some(e) = lists.live.tail else { break };
                let Lists { live, key, .. } = &mut *lists;
                live.remove(key, e);
                live.push(key, e, End::Front);
                if e.released() && unowned(e) {
                    *slot = Some(e);
                }
            }
            drop(lists);
            for e in found.into_iter().flatten() {
                reap(e);
                self.lists.lock().shelve(e, End::Front);
                victims.left += 1;
            }
            unseen -= unseen.min(TURN);
        }
        victims
    }

    /// Moves every stack to `to`: for the end of a private cache's last handle, when detached
    /// threads may still be on their way out. No other thread may be using `self` (it stays correct,
    /// but could be left with a stack), and no stack is ever moved the other way, so that two locks
    /// are always taken in the same order. O(n), the locks are held for one stack at a time.
    pub(crate) fn hand_over<'to>(&self, to: &'to Self) -> Victims<'to, E> {
        let mut victims = Victims::none(to);
        if self.id() == to.id() {
            return victims;
        }
        // Those of an earlier hand-over: where nothing else uses `to`, nothing else looks at them.
        victims.look = to.stats().pending.stacks;
        loop {
            let mut lists = self.lists.lock();
            // Coldest first: each becomes the youngest over there.
            let next = [
                lists.live.tail,
                lists.pending.head,
                lists.coldest(),
                lists.doomed.head,
            ];
            let Some(e) = next.into_iter().flatten().next() else {
                break;
            };
            let (state, facts) = (e.links().state(), lists.facts(e));
            lists.forget(e);
            let mut lists = to.lists.lock();
            e.links().owner.store(to.id(), Ordering::Release);
            lists.admit(e, facts.class, facts.bytes);
            match state {
                State::Cached | State::Doomed => lists.shelve(e, End::Front),
                State::Pending => lists.put(e, State::Pending, facts.resident, End::Back),
                State::Live | State::Unmapping | State::Gone => {}
            }
            victims.left += 1;
        }
        victims
    }

    /// The accounts. O(1).
    pub(crate) fn stats(&self) -> Stats {
        self.lists.lock().stats
    }

    /// Hits, misses and the like begin at 0 again: the ledger serves another cache.
    pub(crate) fn reset_counters(&self) {
        let stats = &mut self.lists.lock().stats;
        (stats.hits, stats.misses, stats.evictions, stats.refused) = (0, 0, 0, 0);
    }

    /// Shows every stack. O(n) with the lock held: for tests and diagnosis. `f` must not use the
    /// ledger.
    pub(crate) fn for_each(&self, mut f: impl FnMut(&'static E, State)) {
        let lists = self.lists.lock();
        let states = [
            (&lists.live, State::Live),
            (&lists.pending, State::Pending),
            (&lists.doomed, State::Doomed),
            (&lists.unmapping, State::Unmapping),
        ];
        for (list, state) in states {
            list.for_each(&lists.key, |e| f(e, state));
        }
        for list in [&lists.unmeasured, &lists.measured] {
            list.for_each(&lists.key, |e| f(e, State::Cached));
        }
    }

    /// In a forked child: makes new lists from the entries. The stacks of all threads that do not exist here become
    /// free; the kernel will never clear their tid words, so the caller has. `in_use` says which must stay: the
    /// caller's own, and those that a handle exists of. Budget and counters stay. O(n).
    ///
    /// # Safety
    /// The process is a forked child, and no thread of it is inside a call of this ledger.
    pub(crate) unsafe fn rebuild(
        &self,
        entries: impl Iterator<Item = &'static E>,
        mut in_use: impl FnMut(&E) -> bool,
    ) {
        // SAFETY: by the caller's promise a thread that holds the lock is one of the parent's.
        unsafe { self.lists.reset() };
        let mut lists = self.lists.lock();
        let counters = lists.stats;
        *lists = Lists::new(lists.budget);
        lists.stats.hits = counters.hits;
        lists.stats.misses = counters.misses;
        lists.stats.evictions = counters.evictions;
        lists.stats.refused = counters.refused;
        for e in entries.filter(|e| self.owns(e)) {
            match e.links().state() {
                // Another thread was mapping or unmapping it: whether it is mapped is not known.
                State::Gone | State::Unmapping => {
                    e.links().state.store(State::Gone as u8, Ordering::Relaxed);
                    e.links().owner.store(NO_OWNER, Ordering::Relaxed);
                }
                State::Live | State::Pending | State::Cached | State::Doomed => {
                    lists.admit(e, e.class(), e.bytes());
                    if !in_use(e) {
                        lists.shelve(e, End::Front);
                    }
                }
            }
        }
    }
}
