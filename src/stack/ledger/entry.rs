//! An entry of the ledger, and the lists that run through it.

use super::class::Class;
use crate::sync::lock::Guarded;
use std::mem;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

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

    /// Upper bound of the bytes that stay resident while no thread uses the stack. Read when it is
    /// given back, and again when a failed munmap puts it back.
    fn resident(&self) -> usize;

    /// The bytes that are resident; `None` if the kernel does not say. Called without the lock, of a stack that was
    /// cached a moment ago: it can be in use or gone by now.
    fn measure(&self) -> Option<usize>;

    /// The kernel has cleared the tid word (Acquire), or no thread has run on the stack since it
    /// was taken.
    fn released(&self) -> bool;

    /// Whether no more than [`Entry::resident`] stays resident. Otherwise the stack is not kept before a call that unmaps
    /// has given its memory back.
    fn is_discarded(&self) -> bool;
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
    pub(super) const fn from_byte(byte: u8) -> State {
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
pub(super) const NO_OWNER: usize = 0;

/// The ledger's part of an entry.
pub(crate) struct Links<E: 'static> {
    /// Address of the ledger that the entry is in: says whose lock guards the cells below.
    pub(super) owner: AtomicUsize,
    /// A [`State`], written under that lock, after everything that it says is true of the entry: a forked child
    /// believes it.
    pub(super) state: AtomicU8,
    pub(super) facts: Keyed<Details>,
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
            owner: AtomicUsize::new(NO_OWNER),
            state: AtomicU8::new(State::Gone as u8),
            facts: Keyed::new(Details {
                evicted: false,
                measured: Measured::No,
                class: None,
                bytes: 0,
                resident: 0,
            }),
            home: Pair::new(),
            age: Pair::new(),
        }
    }
}

/// What the ledger knows of an entry. Sizes are kept, not read again, so that what is
/// subtracted is what was added.
#[derive(Clone, Copy)]
pub(super) struct Details {
    /// Was cached before it became `Unmapping`.
    pub(super) evicted: bool,
    /// What `resident` is of a cached stack.
    pub(super) measured: Measured,
    pub(super) class: Option<Class>,
    pub(super) bytes: usize,
    pub(super) resident: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Measured {
    /// An upper bound.
    No,
    /// An upper bound; some thread measures the stack, with this number. A change of the state ends this, and a
    /// thread that measures it after that has another number: an answer that is out of date is dropped.
    Asked(u16),
    Yes,
}

/// Neighbours in a list; stale while the entry is in none. Two cells, because each is mostly set alone.
pub(super) struct Pair<E: 'static> {
    prev: Keyed<Option<&'static E>>,
    next: Keyed<Option<&'static E>>,
}

impl<E> Pair<E> {
    const fn new() -> Self {
        Pair {
            prev: Keyed::new(None),
            next: Keyed::new(None),
        }
    }
}

/// A part of an entry that the ledger's lock guards: entries are reached through the lists behind that lock, or by
/// `Ledger::enter`, which has compared `owner`.
pub(super) struct Keyed<T>(Guarded<T>);

impl<T: Copy> Keyed<T> {
    const fn new(value: T) -> Self {
        Keyed(Guarded::new(value))
    }

    pub(super) fn get(&self, _key: &Key) -> T {
        // SAFETY: the key's lock is held, and it guards this cell.
        unsafe { self.0.get() }
    }

    pub(super) fn set(&self, _key: &mut Key, value: T) {
        // SAFETY: the key's lock is held, and no reference to the cell exists: `get` copies.
        unsafe { self.0.set(value) }
    }
}

/// Proof that the ledger's lock is held: the only one lies inside.
pub(super) struct Key(());

impl Key {
    /// # Safety
    /// The key is reached with the ledger's lock held only.
    pub(super) const unsafe fn new() -> Key {
        Key(())
    }
}

impl<E: Entry> Links<E> {
    pub(super) fn state(&self) -> State {
        State::from_byte(self.state.load(Ordering::Relaxed))
    }

    fn pair<const BY_AGE: bool>(&self) -> &Pair<E> {
        if BY_AGE { &self.age } else { &self.home }
    }
}

#[derive(Clone, Copy)]
pub(super) enum End {
    Front,
    Back,
}

/// A doubly linked list through `age` or `home` of its entries.
pub(super) struct List<E: 'static, const BY_AGE: bool> {
    pub(super) head: Option<&'static E>,
    pub(super) tail: Option<&'static E>,
}

impl<E: Entry, const BY_AGE: bool> List<E, BY_AGE> {
    pub(super) const EMPTY: Self = List {
        head: None,
        tail: None,
    };

    pub(super) fn push(&mut self, key: &mut Key, e: &'static E, end: End) {
        let (prev, next) = match end {
            End::Front => (None, self.head),
            End::Back => (self.tail, None),
        };
        e.links().pair::<BY_AGE>().prev.set(key, prev);
        e.links().pair::<BY_AGE>().next.set(key, next);
        self.join(key, prev, Some(e));
        self.join(key, Some(e), next);
    }

    pub(super) fn remove(&mut self, key: &mut Key, e: &'static E) {
        let prev = e.links().pair::<BY_AGE>().prev.get(key);
        let next = e.links().pair::<BY_AGE>().next.get(key);
        self.join(key, prev, next);
    }

    /// Makes `next` follow `prev`; `None` stands for the list's ends.
    fn join(&mut self, key: &mut Key, prev: Option<&'static E>, next: Option<&'static E>) {
        match prev {
            Some(e) => e.links().pair::<BY_AGE>().next.set(key, next),
            None => self.head = next,
        }
        match next {
            Some(e) => e.links().pair::<BY_AGE>().prev.set(key, prev),
            None => self.tail = prev,
        }
    }

    pub(super) fn for_each(&self, key: &Key, mut f: impl FnMut(&'static E)) {
        let mut at = self.head;
        while let Some(e) = at {
            at = e.links().pair::<BY_AGE>().next.get(key);
            f(e);
        }
    }
}
