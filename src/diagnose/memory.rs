//! From a refused mapping to the limit that refused it.
//!
//! The kernel looks at a mapping in a fixed order: number of mappings, free addresses, locked memory,
//! RLIMIT_AS, RLIMIT_DATA, commit limit. `stack::probe` asks each in turn; the first that refuses is named
//! when the numbers read agree.

use std::ops::ControlFlow;

use nix::errno::Errno;

use super::cause::{Answer, Cause, CauseKind, Causes, Certainty, InlinePath, MemoryOracle};
use super::limits::{self, CAP_IPC_LOCK, Calls, Limited, Status};
use super::{Circumstances, Naming, Readings};
use crate::error::Step;
use crate::stack::probe::{self, Kind};

/// Everything a mapping can be refused for.
const CAUSES: [CauseKind; 7] = [
    CauseKind::AddressSpace,
    CauseKind::DataSegment,
    CauseKind::MapCount,
    CauseKind::Overcommit,
    CauseKind::LockedMemory,
    CauseKind::AddressSpaceExhausted,
    CauseKind::KernelMemory,
];

fn others(kind: CauseKind) -> Causes {
    CAUSES.into_iter().collect::<Causes>().without(kind)
}

/// How full a limit is against a request.
#[derive(Clone, Copy, Debug)]
struct Fill {
    requested: u64,
    in_use: Option<u64>,
    limit: Option<u64>,
}

impl Fill {
    /// The kernel compares whole pages.
    fn exceeds(&self) -> Option<bool> {
        const PAGE: u64 = 4096;
        let wanted = self.in_use?.checked_add(self.requested)?.div_ceil(PAGE);
        Some(wanted > self.limit? / PAGE)
    }

    /// Proven when the arithmetic agrees with the refusal, inferred when a number is missing. Numbers that
    /// contradict the refusal do not name this limit.
    fn certainty(&self) -> Option<Certainty> {
        match self.exceeds() {
            Some(true) => Some(Certainty::Proven),
            Some(false) => None,
            None => Some(Certainty::Inferred),
        }
    }
}

pub(super) fn diagnose(c: &Circumstances<'_>, status: &Status, readings: &mut Readings) -> Naming {
    let calls = status.calls();
    let requested = c.bytes as u64;
    match (c.step, c.errno) {
        (Step::PrepareStack, Errno::ENOMEM | Errno::EPERM | Errno::EAGAIN) => {
            locked(requested, status, calls)
        }
        (Step::MapStack, Errno::EAGAIN) => future_locked(c, status, calls, readings),
        (Step::GuardStack, Errno::ENOMEM) => guard(readings),
        (Step::MapStack, Errno::ENOMEM) => mapping(c.bytes, status, calls, readings),
        // malloc was refused; how much it asked of the kernel is its own business, but a heap grows by at
        // least this much, and it never folds one cause into another.
        (Step::Allocate | Step::AllocateTls, Errno::ENOMEM) => {
            const HEAP_STEP: usize = 1 << 20;
            mapping(c.bytes.max(HEAP_STEP), status, calls, readings).at_most_inferred(CAUSES)
        }
        _ => Naming::unknown(),
    }
}

fn fill(requested: u64, in_use: Option<u64>, limited: Limited, calls: Calls) -> Fill {
    Fill {
        requested,
        in_use,
        limit: limits::limit(limited, calls).map(|limit| limit.soft),
    }
}

fn locked(requested: u64, status: &Status, calls: Calls) -> Naming {
    let fill = fill(requested, status.locked, Limited::LockedMemory, calls);
    let initial = limits::in_initial_user_namespace(calls);
    if status.has(CAP_IPC_LOCK) && initial == Some(true) {
        return Naming::unknown();
    }
    let exempt_unknown = status.has(CAP_IPC_LOCK) && initial.is_none();
    let cause = Cause::LockedMemory {
        requested,
        in_use: fill.in_use,
        limit: fill.limit,
    };
    match fill.certainty() {
        // mlock gives ENOMEM for unmapped pages and for kernel memory as well, but only when this limit,
        // which comes first, has let it pass.
        Some(Certainty::Proven) if status.capabilities.is_some() && !exempt_unknown => {
            Naming::proven(cause)
        }
        Some(_) => Naming::inferred(cause, others(CauseKind::LockedMemory)),
        None => Naming::unknown(),
    }
}

fn future_locked(
    c: &Circumstances<'_>,
    status: &Status,
    calls: Calls,
    readings: &mut Readings,
) -> Naming {
    let memory = &mut readings.memory;
    memory.number_of_mappings = probe::number_of_mappings().into();
    memory.free_addresses = probe::free_addresses(c.bytes).into();
    if !memory.free_addresses.is(Errno::EAGAIN) {
        return Naming::unknown().transient();
    }
    let requested = c.bytes as u64;
    let fill = fill(requested, status.locked, Limited::LockedMemory, calls);
    let cause = Cause::LockedMemory {
        requested,
        in_use: fill.in_use,
        limit: fill.limit,
    };
    // No other check of mmap answers EAGAIN to an anonymous mapping.
    match fill.certainty() {
        Some(Certainty::Proven) => Naming::proven(cause),
        Some(_) => Naming::inferred(cause, Causes::NONE),
        None => Naming::unknown(),
    }
}

fn guard(readings: &mut Readings) -> Naming {
    let memory = &mut readings.memory;
    memory.number_of_mappings = probe::number_of_mappings().into();
    if memory.number_of_mappings.is(Errno::EEXIST) {
        memory.guard = probe::guards().map_or(Answer::NotAsked, Answer::from);
    }
    let split = memory.guard.is(Errno::ENOMEM);
    // Making pages inaccessible charges nothing, so that ENOMEM means the split: the number of mappings, or
    // no memory for the structure that describes one. The latter also fails a fresh mapping.
    if split || memory.number_of_mappings.is(Errno::ENOMEM) {
        let cause = Cause::MapCount {
            maximum: limits::number_in(c"/proc/sys/vm/max_map_count"),
            split,
        };
        return Naming::proven(cause);
    }
    Naming::inferred(
        Cause::KernelMemory {
            directory: InlinePath::EMPTY,
            version: 0,
            usage: None,
            limit: None,
            failures: None,
            unread: None,
        },
        Causes::NONE.with(CauseKind::MapCount),
    )
    .transient()
}

/// The first check in the kernel's order that refuses a mapping of this length now.
fn mapping(bytes: usize, status: &Status, calls: Calls, readings: &mut Readings) -> Naming {
    let requested = bytes as u64;
    let memory = &mut readings.memory;
    memory.number_of_mappings = probe::number_of_mappings().into();
    if memory.number_of_mappings.is(Errno::ENOMEM) {
        return Naming::proven(Cause::MapCount {
            maximum: limits::number_in(c"/proc/sys/vm/max_map_count"),
            split: false,
        });
    }
    memory.free_addresses = probe::free_addresses(bytes).into();
    if memory.free_addresses.is(Errno::ENOMEM) {
        return Naming::proven(Cause::AddressSpaceExhausted {
            requested,
            in_use: status.mapped,
        });
    }
    memory.inaccessible = probe::map(bytes, Kind::Inaccessible).into();
    if memory.inaccessible.is(Errno::ENOMEM) {
        let fill = fill(requested, status.mapped, Limited::AddressSpace, calls);
        let cause = Cause::AddressSpace {
            requested,
            in_use: fill.in_use,
            limit: fill.limit,
        };
        return match fill.certainty() {
            Some(Certainty::Proven) => Naming::proven(cause),
            Some(_) => Naming::inferred(cause, others(CauseKind::AddressSpace)),
            // No limit forbids it: no memory for the structure that describes a mapping, or numbers that
            // another thread has changed since.
            None => Naming::unknown().transient(),
        };
    }
    memory.unreserved = probe::map(bytes, Kind::Unreserved).into();
    if memory.unreserved.is(Errno::ENOMEM) {
        return data_or_commit(bytes, status, calls, memory);
    }
    memory.stack = probe::map(bytes, Kind::Stack).into();
    if memory.stack.is(Errno::ENOMEM) {
        return commit(requested, false);
    }
    // Every check lets it pass now: another thread of the process had the memory.
    Naming::unknown().transient()
}

fn data_or_commit(
    bytes: usize,
    status: &Status,
    calls: Calls,
    memory: &mut MemoryOracle,
) -> Naming {
    let requested = bytes as u64;
    let fill = fill(requested, status.data, Limited::Data, calls);
    let cause = Cause::DataSegment {
        requested,
        in_use: fill.in_use,
        limit: fill.limit,
    };
    match fill.certainty() {
        // RLIMIT_DATA comes before the commit limit.
        Some(Certainty::Proven) => Naming::proven(cause),
        Some(_) => {
            // Without the numbers: of the two only the commit limit counts a shared mapping.
            memory.shared = probe::map(bytes, Kind::Shared).into();
            match memory.shared.is(Errno::ENOMEM) {
                true => commit(requested, true),
                false => Naming::inferred(cause, Causes::NONE.with(CauseKind::Overcommit)),
            }
        }
        None => commit(requested, true),
    }
}

/// RLIMIT_DATA lets it pass, and so does everything before, because a mapping without access of the same length
/// was granted: the commit limit is left. `unreserved` tells whether MAP_NORESERVE was refused, too.
fn commit(requested: u64, unreserved: bool) -> Naming {
    let mode = limits::number_in(c"/proc/sys/vm/overcommit_memory");
    let mut values = [None; 4];
    let _ = limits::lines(c"/proc/meminfo", |line| {
        let keys: [&[u8]; 4] = [
            b"MemTotal:",
            b"SwapTotal:",
            b"CommitLimit:",
            b"Committed_AS:",
        ];
        for (key, value) in keys.into_iter().zip(&mut values) {
            if let Some(rest) = line.strip_prefix(key) {
                *value = limits::number(rest).and_then(|kib| kib.checked_mul(1024));
            }
        }
        ControlFlow::Continue(())
    });
    let [total, swap, commit_limit, committed] = values;
    let (in_use, limit) = match mode {
        Some(2) => (committed, commit_limit),
        Some(_) => (
            Some(0),
            total.and_then(|total| total.checked_add(swap.unwrap_or(0))),
        ),
        // Which of the two are compared is not known.
        None => (None, None),
    };
    let cause = Cause::Overcommit {
        mode,
        requested,
        in_use,
        limit,
    };
    match mode {
        // Only mode 2 accounts for mappings with MAP_NORESERVE; mode 1 never refuses.
        Some(2) => Naming::proven(cause),
        Some(0) if !unreserved => Naming::proven(cause),
        None => Naming::inferred(cause, others(CauseKind::Overcommit)),
        Some(_) => Naming::unknown().transient(),
    }
}
