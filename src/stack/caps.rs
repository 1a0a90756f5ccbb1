//! What the kernel's limits leave to cached stacks, as `StackCacheConfig` documents: address space that they hold
//! is of no use to malloc or to other code that maps. Each cache gets an equal part, so that no common counter is
//! needed on the way of every thread.
//!
//! RLIMIT_AS changes at any time (`prlimit(1)` does it from outside), so it is read again wherever a stack is
//! mapped, which costs far more, and at every [`EVERY`]th reuse of a stack. A thread that ends or joins
//! never reads it: its system-call filter need not know the call.

use nix::sys::resource::{Resource, getrlimit};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Parts of RLIMIT_AS, one of which is the caches'.
const ADDRESS_SPACE_PARTS: usize = 8;

/// Parts of `vm.max_map_count`, one of which is the caches'.
const MAPPINGS_PARTS: usize = 4;

/// A stack, the signal stack with the block, and a guard below each.
const MAPPINGS_OF_A_STACK: usize = 4;

/// Reuses of a stack between two looks: getrlimit(2) takes 0.1 µs, a thread some 40.
pub(super) const EVERY: u32 = 16;

/// The most that one cache keeps; `usize::MAX` for no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Caps {
    /// Bytes of address space.
    pub(super) bytes: usize,
    pub(super) stacks: usize,
}

impl Caps {
    pub(super) const NONE: Caps = Caps {
        bytes: usize::MAX,
        stacks: usize::MAX,
    };

    /// What holds now for each of so many caches. One system call.
    pub(super) fn read(caches: usize) -> Caps {
        let unlimited = u64::MAX;
        // Refused by a filter: then there is nothing known to keep to.
        let limit = getrlimit(Resource::RLIMIT_AS).map_or(unlimited, |(soft, _)| soft);
        Caps::of(limit, MAP_COUNT.load(Ordering::Relaxed), caches)
    }

    /// `max_map_count`: 0 where guards are no mappings.
    fn of(address_space: u64, max_map_count: usize, caches: usize) -> Caps {
        let caches = caches.max(1);
        let bytes = match usize::try_from(address_space) {
            Ok(usize::MAX) | Err(_) => usize::MAX,
            Ok(limit) => limit / ADDRESS_SPACE_PARTS / caches,
        };
        let stacks = match max_map_count {
            0 => usize::MAX,
            maximum => maximum / MAPPINGS_PARTS / MAPPINGS_OF_A_STACK / caches,
        };
        Caps { bytes, stacks }
    }
}

/// `vm.max_map_count`, once a guard has become a mapping of its own; 0 before.
static MAP_COUNT: AtomicUsize = AtomicUsize::new(0);

/// A guard is a mapping of its own: from here on the number of mappings matters. The file is read once.
pub(super) fn note_protected_guard() {
    if MAP_COUNT.load(Ordering::Relaxed) == 0 {
        /// The kernel's default (`DEFAULT_MAX_MAP_COUNT`).
        const DEFAULT: u64 = 65_530;
        let maximum =
            crate::proc::file::number_in(crate::proc::machine::MAX_MAP_COUNT).unwrap_or(DEFAULT);
        let maximum = usize::try_from(maximum).unwrap_or(usize::MAX).max(1);
        MAP_COUNT.store(maximum, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_capped_without_a_limit() {
        assert_eq!(Caps::of(u64::MAX, 0, 1), Caps::NONE);
        assert_eq!(Caps::of(u64::MAX, 0, 1000), Caps::NONE);
    }

    #[test]
    fn caches_share() {
        assert_eq!(Caps::of(8 << 30, 0, 1).bytes, 1 << 30);
        assert_eq!(Caps::of(8 << 30, 0, 4).bytes, 256 << 20);
        assert_eq!(Caps::of(0, 0, 1).bytes, 0);
        assert_eq!(Caps::of(u64::MAX, 65_530, 1).stacks, 4_095);
        assert_eq!(Caps::of(u64::MAX, 65_530, 2).stacks, 2_047);
        // No cache counted, as when the last is just going, divides by nothing.
        assert_eq!(Caps::of(8, 8, 0).bytes, 1);
    }
}
