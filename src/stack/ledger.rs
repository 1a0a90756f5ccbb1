//! The ledger of all stacks of one cache: which are in use, which wait for the kernel, which can be
//! had.
//!
//! It makes no system call but its lock's (and that only if the lock is contended), allocates
//! nothing and knows nothing of mappings, so that it can be checked alone (`tests/loom_ledger.rs`,
//! `tests/ledger.rs`).
//!
//! ```text
//!            adopt              give, word not yet cleared
//!  (mapped) ───────► live ──────────────────────────────► pending
//!                    ▲  │ give, word cleared                 │ word cleared, seen by a later call
//!              take  │  ▼                                    │
//!                   cached ◄─────────────────────────────────┤
//!                    ▲  │ over budget, trim, clear           │ no class, or too large for the budget
//!     munmap failed  │  ▼                                    ▼
//!                  unmapping ◄──────────────────────────── doomed
//!                       │ munmap done
//!                       ▼
//!                     (gone)
//! ```
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
//! **Fork.** The lock is not held across a fork, so a child can find the lists half changed, and
//! gives them up. What survives at every instruction is in the entries: the ledger that an entry is
//! in, and its state, one atomic word each. From these [`Ledger::rebuild`] makes new lists.
//!
//! **Accounts.** A stack is in exactly one state, and [`Stats::mapped`] is the sum over the states:
//! at any instant every mapping is accounted for, also while it is being unmapped. A call that does
//! not fit its entry's state (a stack given back twice, or to the wrong cache) changes nothing but
//! [`Stats::refused`].

use std::mem;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use super::class::{CLASSES, Class};
use crate::sync::lock::{Guard, Guarded, Lock};

/// Pending stacks that each call looks at. More than one, so that a burst of detached threads
/// drains faster than it fills.
pub(crate) const LOOK: usize = 4;
/// Further pending stacks that `take` looks at before it reports a miss, which costs a mmap and
/// page faults.
pub(crate) const LOOK_ON_MISS: usize = 8;
/// Most stacks that one `give` or `take` makes its caller unmap. A stack is given once and can be over budget
/// once, so the average is at most one, and what is left is made up for by the next few calls.
pub(crate) const EVICT: usize = 4;
/// Entries per turn of the lock for the calls that see many.
const TURN: usize = 32;

/// What the ledger keeps accounts of: the record of one stack, never freed.
///
/// The methods are called with the ledger's lock held: plain reads, no call back into the ledger.
///
/// # Safety
/// `links` returns the same object on every call, and no other entry returns it.
pub(crate) unsafe trait Entry: Sync + Sized + 'static {
    fn links(&self) -> &Links<Self>;

    /// Which requests the stack serves; `None`: it is never cached. Read when the stack is adopted.
    fn class(&self) -> Option<Class>;

    /// Bytes of address space, guard and TLS block included. Read when the stack is adopted.
    fn bytes(&self) -> usize;

    /// Upper bound of the bytes that stay resident while nobody uses the stack. Read when it is
    /// given back, and again when a failed munmap puts it back.
    fn resident(&self) -> usize;

    /// The kernel has cleared the tid word (Acquire), or no thread has run on the stack since it
    /// was taken.
    fn released(&self) -> bool;

    /// Whether no more than [`Entry::resident`] stays resident. Otherwise the stack is not kept before a call that unmaps
    /// has given its memory back.
    fn is_discarded(&self) -> bool;
}

/// Most that a cache keeps; `usize::MAX` for no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Budget {
    /// Bytes of memory.
    pub(crate) resident: usize,
    /// Bytes of address space.
    pub(crate) bytes: usize,
    pub(crate) stacks: usize,
}

impl Budget {
    /// Keeps nothing.
    pub(crate) const NOTHING: Budget = Budget {
        resident: 0,
        bytes: 0,
        stacks: 0,
    };

    /// Limits nothing but memory.
    pub(crate) const fn resident(bytes: usize) -> Self {
        Budget {
            resident: bytes,
            bytes: usize::MAX,
            stacks: usize::MAX,
        }
    }

    fn holds(&self, tally: Tally) -> bool {
        tally.stacks <= self.stacks && tally.bytes <= self.bytes && tally.resident <= self.resident
    }
}

/// A number of stacks and what they take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) stacks: usize,
    /// Bytes of address space.
    pub(crate) bytes: usize,
    /// Bytes of memory, by [`Entry::resident`]; 0 while live, since only the thread itself could
    /// tell.
    pub(crate) resident: usize,
}

impl Tally {
    const ZERO: Tally = Tally {
        stacks: 0,
        bytes: 0,
        resident: 0,
    };

    const fn of(facts: Facts) -> Self {
        Tally {
            stacks: 1,
            bytes: facts.bytes,
            resident: facts.resident,
        }
    }

    // Neither wraps: the sums are below the size of the address space, and what is subtracted was added.

    const fn plus(self, other: Tally) -> Self {
        Tally {
            stacks: self.stacks.wrapping_add(other.stacks),
            bytes: self.bytes.wrapping_add(other.bytes),
            resident: self.resident.wrapping_add(other.resident),
        }
    }

    const fn minus(self, other: Tally) -> Self {
        Tally {
            stacks: self.stacks.wrapping_sub(other.stacks),
            bytes: self.bytes.wrapping_sub(other.bytes),
            resident: self.resident.wrapping_sub(other.resident),
        }
    }
}

/// The accounts at one instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stats {
    /// In use by a thread, by one about to start or by one not yet joined.
    pub(crate) live: Tally,
    /// Given back; the kernel had not let go when last looked.
    pub(crate) pending: Tally,
    /// Ready to be taken. Only this counts against the budget.
    pub(crate) cached: Tally,
    /// Not worth keeping; the next call that unmaps takes them.
    pub(crate) doomed: Tally,
    /// Being unmapped by some thread just now.
    pub(crate) unmapping: Tally,
    /// Calls of `take` that found a stack.
    pub(crate) hits: u64,
    pub(crate) misses: u64,
    /// Cached stacks unmapped to keep a budget, by `trim` or by `clear`.
    pub(crate) evictions: u64,
    /// Calls that did not fit the state of their entry: 0 unless the caller has a bug.
    pub(crate) refused: u64,
}

impl Stats {
    pub(crate) const ZERO: Stats = Stats {
        live: Tally::ZERO,
        pending: Tally::ZERO,
        cached: Tally::ZERO,
        doomed: Tally::ZERO,
        unmapping: Tally::ZERO,
        hits: 0,
        misses: 0,
        evictions: 0,
        refused: 0,
    };

    /// All that is mapped.
    pub(crate) fn mapped(&self) -> Tally {
        self.live
            .plus(self.pending)
            .plus(self.cached)
            .plus(self.doomed)
            .plus(self.unmapping)
    }
}

/// Where a stack is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum State {
    /// Not in the ledger.
    Gone,
    Live,
    Pending,
    Cached,
    Doomed,
    Unmapping,
}

impl State {
    const fn from_byte(byte: u8) -> State {
        match byte {
            1 => State::Live,
            2 => State::Pending,
            3 => State::Cached,
            4 => State::Doomed,
            5 => State::Unmapping,
            _ => State::Gone,
        }
    }
}

/// Owner of an entry in no ledger.
const NOBODY: usize = 0;

/// The ledger's part of an entry.
pub(crate) struct Links<E: 'static> {
    /// Address of the ledger that the entry is in: says whose lock guards the cells below.
    owner: AtomicUsize,
    /// A [`State`], written under that lock, after everything that it says is true of the entry: a forked child
    /// believes it.
    state: AtomicU8,
    facts: Guarded<Facts>,
    /// Neighbours in the list of the entry's state; for a cached entry, in the list of its class.
    home: Pair<E>,
    /// Neighbours by age, for cached entries only.
    age: Pair<E>,
}

impl<E> Links<E> {
    /// Where a debugger reads the entry's [`State`], one byte.
    pub(crate) const STATE_OFFSET: usize = mem::offset_of!(Self, state);

    /// Where it reads the address of the ledger that the entry is in, one word.
    pub(crate) const OWNER_OFFSET: usize = mem::offset_of!(Self, owner);

    pub(crate) const fn new() -> Self {
        Links {
            owner: AtomicUsize::new(NOBODY),
            state: AtomicU8::new(State::Gone as u8),
            facts: Guarded::new(Facts {
                evicted: false,
                class: None,
                bytes: 0,
                resident: 0,
            }),
            home: Pair::new(),
            age: Pair::new(),
        }
    }
}

/// What the ledger knows of an entry. Sizes are kept, not asked for again, so that what is
/// subtracted is what was added.
#[derive(Clone, Copy)]
struct Facts {
    /// Was cached before it became `Unmapping`.
    evicted: bool,
    class: Option<Class>,
    bytes: usize,
    resident: usize,
}

/// Neighbours in a list; stale while the entry is in none. Two cells, because each is mostly set alone.
struct Pair<E: 'static> {
    prev: Guarded<Option<&'static E>>,
    next: Guarded<Option<&'static E>>,
}

impl<E> Pair<E> {
    const fn new() -> Self {
        Pair {
            prev: Guarded::new(None),
            next: Guarded::new(None),
        }
    }
}

/// Proof that the ledger's lock is held: the only one lies inside.
struct Key(());

impl<E: Entry> Links<E> {
    fn facts(&self, _key: &Key) -> Facts {
        // SAFETY: the key's lock is held, and it guards this cell: entries are reached through the
        // lists behind that lock, or by `Ledger::enter`, which has compared `owner`.
        unsafe { self.facts.get() }
    }

    fn set_facts(&self, _key: &mut Key, facts: Facts) {
        // SAFETY: as in `facts`.
        unsafe { self.facts.set(facts) }
    }

    fn state(&self) -> State {
        State::from_byte(self.state.load(Ordering::Relaxed))
    }

    fn pair<const BY_AGE: bool>(&self) -> &Pair<E> {
        if BY_AGE { &self.age } else { &self.home }
    }

    fn prev<const BY_AGE: bool>(&self, _key: &Key) -> Option<&'static E> {
        // SAFETY: as in `facts`.
        unsafe { self.pair::<BY_AGE>().prev.get() }
    }

    fn next<const BY_AGE: bool>(&self, _key: &Key) -> Option<&'static E> {
        // SAFETY: as in `facts`.
        unsafe { self.pair::<BY_AGE>().next.get() }
    }

    fn set_prev<const BY_AGE: bool>(&self, _key: &mut Key, prev: Option<&'static E>) {
        // SAFETY: as in `facts`.
        unsafe { self.pair::<BY_AGE>().prev.set(prev) }
    }

    fn set_next<const BY_AGE: bool>(&self, _key: &mut Key, next: Option<&'static E>) {
        // SAFETY: as in `facts`.
        unsafe { self.pair::<BY_AGE>().next.set(next) }
    }
}

#[derive(Clone, Copy)]
enum End {
    Front,
    Back,
}

/// A doubly linked list through `age` or `home` of its entries.
struct List<E: 'static, const BY_AGE: bool> {
    head: Option<&'static E>,
    tail: Option<&'static E>,
}

impl<E: Entry, const BY_AGE: bool> List<E, BY_AGE> {
    const EMPTY: Self = List {
        head: None,
        tail: None,
    };

    fn push(&mut self, key: &mut Key, e: &'static E, end: End) {
        let (prev, next) = match end {
            End::Front => (None, self.head),
            End::Back => (self.tail, None),
        };
        e.links().set_prev::<BY_AGE>(key, prev);
        e.links().set_next::<BY_AGE>(key, next);
        self.join(key, prev, Some(e));
        self.join(key, Some(e), next);
    }

    fn remove(&mut self, key: &mut Key, e: &'static E) {
        let prev = e.links().prev::<BY_AGE>(key);
        let next = e.links().next::<BY_AGE>(key);
        self.join(key, prev, next);
    }

    /// Makes `next` follow `prev`; `None` stands for the list's ends.
    fn join(&mut self, key: &mut Key, prev: Option<&'static E>, next: Option<&'static E>) {
        match prev {
            Some(e) => e.links().set_next::<BY_AGE>(key, next),
            None => self.head = next,
        }
        match next {
            Some(e) => e.links().set_prev::<BY_AGE>(key, prev),
            None => self.tail = prev,
        }
    }

    fn for_each(&self, key: &Key, mut f: impl FnMut(&'static E)) {
        let mut at = self.head;
        while let Some(e) = at {
            at = e.links().next::<BY_AGE>(key);
            f(e);
        }
    }
}

/// What the lock guards.
struct Lists<E: 'static> {
    key: Key,
    budget: Budget,
    live: List<E, false>,
    pending: List<E, false>,
    doomed: List<E, false>,
    unmapping: List<E, false>,
    /// Cached stacks by class, warmest first.
    classes: [List<E, false>; CLASSES],
    /// All cached stacks, warmest first.
    age: List<E, true>,
    /// `refused` and the rest of the accounts, kept as they are reported.
    stats: Stats,
}

impl<E: Entry> Lists<E> {
    const fn new(budget: Budget) -> Self {
        Lists {
            key: Key(()),
            budget,
            live: List::EMPTY,
            pending: List::EMPTY,
            doomed: List::EMPTY,
            unmapping: List::EMPTY,
            classes: [const { List::EMPTY }; CLASSES],
            age: List::EMPTY,
            stats: Stats::ZERO,
        }
    }

    fn facts(&self, e: &E) -> Facts {
        e.links().facts(&self.key)
    }

    /// Moves `e` to the list of `state`. A cached entry goes to the given end of its class; by age
    /// it is the youngest.
    #[inline(always)]
    fn put(&mut self, e: &'static E, state: State, resident: usize, end: End) {
        let old = self.facts(e);
        let old_state = e.links().state();
        let new = Facts {
            evicted: old_state == State::Cached,
            resident,
            ..old
        };
        self.count(e, old_state, old, false, end);
        self.count(e, state, new, true, end);
        e.links().set_facts(&mut self.key, new);
        e.links().state.store(state as u8, Ordering::Release);
    }

    /// `e` joins or leaves the list and the account of its state.
    #[inline(always)]
    fn count(&mut self, e: &'static E, state: State, facts: Facts, entering: bool, end: End) {
        let (list, tally) = match state {
            State::Gone => (None, None),
            State::Live => (Some(&mut self.live), Some(&mut self.stats.live)),
            State::Pending => (Some(&mut self.pending), Some(&mut self.stats.pending)),
            State::Doomed => (Some(&mut self.doomed), Some(&mut self.stats.doomed)),
            State::Unmapping => (Some(&mut self.unmapping), Some(&mut self.stats.unmapping)),
            State::Cached => {
                if entering {
                    self.age.push(&mut self.key, e, End::Front);
                } else {
                    self.age.remove(&mut self.key, e);
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
    fn admit(&mut self, e: &'static E, class: Option<Class>, bytes: usize) {
        let facts = Facts {
            evicted: false,
            class,
            bytes,
            resident: 0,
        };
        e.links().set_facts(&mut self.key, facts);
        e.links().state.store(State::Gone as u8, Ordering::Relaxed);
        self.put(e, State::Live, 0, End::Front);
    }

    fn forget(&mut self, e: &'static E) {
        self.put(e, State::Gone, 0, End::Front);
    }

    /// Keeps a released stack, or dooms it if the budget could never hold it.
    ///
    /// Dooming it at once, rather than caching it as the youngest, spares the older ones: they
    /// would all have to go before it does.
    fn shelve(&mut self, e: &'static E, end: End) {
        let facts = Facts {
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
    fn settle(&mut self, n: usize) {
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
    fn warmest(&self, class: Class) -> Option<&'static E> {
        let doomed = || {
            let e = self.doomed.head?;
            (self.facts(e).class == Some(class) && !e.is_discarded()).then_some(e)
        };
        self.classes.get(class.index())?.head.or_else(doomed)
    }

    /// The next stack to unmap, now on its way. The budget comes first: a doomed stack that cannot
    /// be unmapped must not keep the cache over it.
    fn evict(&mut self, limit: Limit) -> Option<&'static E> {
        let limit = match limit {
            Limit::Budget => self.budget,
            Limit::Resident(bytes) => Budget {
                resident: self.budget.resident.min(bytes),
                ..self.budget
            },
            Limit::Nothing => Budget::NOTHING,
        };
        let e = if limit.holds(self.stats.cached) {
            self.doomed.head
        } else {
            self.age.tail
        }?;
        self.put(e, State::Unmapping, self.facts(e).resident, End::Front);
        Some(e)
    }
}

/// The stacks of one cache. See the top of this file.
pub(crate) struct Ledger<E: 'static> {
    lists: Lock<Lists<E>>,
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
    fn enter(&self, e: &'static E, state: State) -> Option<Guard<'_, Lists<E>>> {
        let mut lists = self.lists.lock();
        if self.owns(e) && e.links().state() == state {
            return Some(lists);
        }
        lists.stats.refused += 1;
        None
    }

    /// Relaxed: only a holder of this lock makes the ledger an entry's owner, or ends that.
    fn owns(&self, e: &E) -> bool {
        e.links().owner.load(Ordering::Relaxed) == self.id()
    }

    /// Enters a freshly mapped stack as live. O(1).
    pub(crate) fn adopt(&self, e: &'static E) {
        let mut lists = self.lists.lock();
        let free = e
            .links()
            .owner
            .compare_exchange(NOBODY, self.id(), Ordering::Acquire, Ordering::Relaxed)
            .is_ok();
        if free {
            lists.admit(e, e.class(), e.bytes());
        } else {
            lists.stats.refused += 1;
        }
    }

    /// The warmest cached stack of the class, now live; counts a hit or a miss. O(1): one list head
    /// and at most [`LOOK`] + [`LOOK_ON_MISS`] pending stacks. The caller unmaps at most [`EVICT`] stacks: those of
    /// detached threads become cached here, and the threads have unmapped nothing.
    pub(crate) fn take(&self, class: Class) -> (Option<&'static E>, Victims<'_, E>) {
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
                lists.stats.hits += 1;
            }
            None => lists.stats.misses += 1,
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

    fn evict_some<'a>(&'a self, mut lists: Guard<'a, Lists<E>>) -> Victims<'a, E> {
        let mut victims = Victims::none(self);
        victims.left = EVICT;
        victims.advance(&mut lists);
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
        self.shrink(Limit::Resident(resident))
    }

    /// Unmaps everything that no thread uses. Cost as for [`Ledger::trim`].
    pub(crate) fn clear(&self) -> Victims<'_, E> {
        self.shrink(Limit::Nothing)
    }

    /// Changes what the cache may keep, and unmaps what is too much. Cost as for [`Ledger::trim`].
    pub(crate) fn set_budget(&self, budget: Budget) -> Victims<'_, E> {
        self.lists.lock().budget = budget;
        self.shrink(Limit::Budget)
    }

    /// Each stack is tried once, so that this ends also when none can be unmapped, or when others
    /// keep giving.
    fn shrink(&self, limit: Limit) -> Victims<'_, E> {
        let stats = self.stats();
        let mut victims = Victims::none(self);
        victims.limit = limit;
        victims.look = stats.pending.stacks;
        victims.left = stats.pending.stacks + stats.cached.stacks + stats.doomed.stacks;
        victims
    }

    /// Finds the stacks of detached threads that ended without giving them back (killed by a
    /// seccomp filter, or by a bare exit system call). O(live), a few per turn of the lock.
    ///
    /// `unowned` is asked only about live stacks whose tid word the kernel has cleared. It answers true
    /// **once**, by an atomic change from "the thread itself will give its stack back" to anything
    /// else: nobody can give it later, because that thread is gone, and it must not be found again
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
    /// threads may still be on their way out. Nobody else may be using `self` (it stays correct,
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
                lists.age.tail,
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
        lists.age.for_each(&lists.key, |e| f(e, State::Cached));
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
        // SAFETY: passed on.
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
                // Another thread was mapping or unmapping it: mapped or not, nothing tells.
                State::Gone | State::Unmapping => {
                    e.links().state.store(State::Gone as u8, Ordering::Relaxed);
                    e.links().owner.store(NOBODY, Ordering::Relaxed);
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

#[derive(Clone, Copy)]
enum Limit {
    Budget,
    Resident(usize),
    Nothing,
}

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
    ledger: &'a Ledger<E>,
    limit: Limit,
    /// Found in advance, so that a `give` within the budget takes the lock once.
    ready: Option<&'static E>,
    /// Handed out by the last `pop`.
    current: Option<&'static E>,
    /// Stacks that may still be handed out.
    left: usize,
    /// Pending stacks still to look at.
    look: usize,
}

impl<'a, E: Entry> Victims<'a, E> {
    const fn none(ledger: &'a Ledger<E>) -> Self {
        Victims {
            ledger,
            limit: Limit::Budget,
            ready: None,
            current: None,
            left: 0,
            look: 0,
        }
    }

    /// The next stack to unmap; puts the last one back, unless [`Victims::unmapped`] was called.
    /// O(1), and O(1) for each pending stack that `trim`, `clear` and `set_budget` have yet to look
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
        matches!(self.limit, Limit::Budget)
    }

    /// The stack handed out last is unmapped. O(1).
    pub(crate) fn unmapped(&mut self) {
        let Some(e) = self.current.take() else { return };
        if let Some(mut lists) = self.ledger.enter(e, State::Unmapping) {
            lists.stats.evictions += u64::from(lists.facts(e).evicted);
            lists.forget(e);
            e.links().owner.store(NOBODY, Ordering::Release);
        }
    }

    #[cold]
    fn put_back(&self, e: &'static E) {
        if let Some(mut lists) = self.ledger.enter(e, State::Unmapping) {
            lists.shelve(e, End::Back);
        }
    }

    #[cold]
    fn refill(&mut self) {
        while self.ready.is_none() && self.left > 0 {
            let mut lists = self.ledger.lists.lock();
            self.advance(&mut lists);
        }
    }

    #[inline]
    fn advance(&mut self, lists: &mut Lists<E>) {
        let look = self.look.min(TURN);
        self.look -= look;
        lists.settle(look);
        self.ready = lists.evict(self.limit);
        if self.ready.is_some() {
            self.left -= 1;
        } else if self.look == 0 {
            self.left = 0;
        }
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
