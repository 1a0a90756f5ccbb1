//! How many stacks there are, what they take, and how much of it is kept.

use super::entry::Details;

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

    pub(super) fn holds(&self, tally: Tally) -> bool {
        tally.stacks <= self.stacks && tally.bytes <= self.bytes && tally.resident <= self.resident
    }
}

/// A number of stacks and what they take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) stacks: usize,
    /// Bytes of address space.
    pub(crate) bytes: usize,
    /// Bytes of memory, by [`Entry::resident`] or [`Entry::measure`]; 0 while live, since only the thread itself could
    /// know.
    pub(crate) resident: usize,
}

impl Tally {
    pub(super) const ZERO: Tally = Tally {
        stacks: 0,
        bytes: 0,
        resident: 0,
    };

    pub(super) const fn of(facts: Details) -> Self {
        Tally {
            stacks: 1,
            bytes: facts.bytes,
            resident: facts.resident,
        }
    }

    // Neither wraps: the sums are below the size of the address space, and what is subtracted was added.

    pub(super) const fn plus(self, other: Tally) -> Self {
        Tally {
            stacks: self.stacks.wrapping_add(other.stacks),
            bytes: self.bytes.wrapping_add(other.bytes),
            resident: self.resident.wrapping_add(other.resident),
        }
    }

    pub(super) const fn minus(self, other: Tally) -> Self {
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
    /// Given back; the kernel had not cleared the tid word when it was last read.
    pub(crate) pending: Tally,
    /// Ready to be taken. Only this counts against the budget.
    pub(crate) cached: Tally,
    /// Not worth keeping; the next call that unmaps takes them.
    pub(crate) doomed: Tally,
    /// Being unmapped by some thread just now.
    pub(crate) unmapping: Tally,
    /// Spawns whose first `take` found a stack.
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
