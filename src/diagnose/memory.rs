//! From a refused mapping to the limit that refused it.
//!
//! The kernel looks at a mapping in a fixed order: number of mappings, free addresses, locked memory,
//! RLIMIT_AS, RLIMIT_DATA, commit limit. `sys::map_probe` asks each in turn; the first that refuses is named
//! when the numbers read agree.

use crate::errno::Errno;

use super::cause::{
    AddressSpace, AddressSpaceExhausted, Answer, CauseKind, Causes, Certainty, DataSegment, Fill,
    KernelMemory, LockedMemory, MapCount, MemoryOracle, Overcommit, Unknown,
};
use super::verdict::Verdict;
use crate::proc::limits::{Limit, Limited};
use crate::proc::machine::{self, MemInfo};
use crate::proc::status::{CAP_IPC_LOCK, Calls, Status};
use crate::proc::task;
use crate::step::{Step, StepError};
use crate::sys::map_probe::{self, Kind};

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

/// Proven when the arithmetic agrees with the refusal, inferred when a number is missing. Numbers that
/// contradict the refusal do not name the limit.
fn certainty(fill: &Fill) -> Option<Certainty> {
    // The kernel compares whole pages.
    const PAGE: u64 = 4096;
    let wanted = fill
        .in_use
        .and_then(|in_use| in_use.checked_add(fill.requested));
    match wanted.zip(fill.limit) {
        Some((wanted, limit)) if wanted.div_ceil(PAGE) > limit / PAGE => Some(Certainty::Proven),
        Some(_) => None,
        None => Some(Certainty::Inferred),
    }
}

pub(super) fn diagnose(error: &StepError, status: &Status, seen: &mut Unknown) -> Verdict {
    let calls = status.calls();
    let requested = error.bytes as u64;
    match (error.step, error.errno) {
        (Step::PrepareStack, Errno::ENOMEM | Errno::EPERM | Errno::EAGAIN) => {
            locked(requested, status, calls)
        }
        (Step::MapStack, Errno::EAGAIN) => future_locked(error, status, calls, seen),
        (Step::GuardStack, Errno::ENOMEM) => guard(seen),
        (Step::MapStack, Errno::ENOMEM) => mapping(error.bytes, status, calls, seen),
        // malloc was refused; how much it asked of the kernel is its own business, but a heap grows by at
        // least this much, and it never folds one cause into another.
        (Step::Allocate | Step::AllocateTls, Errno::ENOMEM) => {
            const HEAP_STEP: usize = 1 << 20;
            mapping(error.bytes.max(HEAP_STEP), status, calls, seen)
                .at_most_inferred(CAUSES.into_iter().collect())
        }
        _ => Verdict::UNKNOWN,
    }
}

fn fill(requested: u64, in_use: Option<u64>, limited: Limited, calls: Calls) -> Fill {
    Fill {
        requested,
        in_use,
        limit: Limit::read(limited, calls).map(|limit| limit.soft),
    }
}

fn locked(requested: u64, status: &Status, calls: Calls) -> Verdict {
    let fill = fill(requested, status.locked, Limited::LockedMemory, calls);
    let initial = task::in_initial_user_namespace(calls);
    if status.has(CAP_IPC_LOCK) && initial == Some(true) {
        return Verdict::UNKNOWN;
    }
    let exempt_unknown = status.has(CAP_IPC_LOCK) && initial.is_none();
    let cause = LockedMemory::from(fill);
    match certainty(&fill) {
        // mlock gives ENOMEM for unmapped pages and for kernel memory as well, but only when this limit,
        // which comes first, has let it pass.
        Some(Certainty::Proven) if status.capabilities.is_some() && !exempt_unknown => {
            Verdict::proven(cause)
        }
        Some(_) => Verdict::inferred(cause, others(CauseKind::LockedMemory)),
        None => Verdict::UNKNOWN,
    }
}

fn future_locked(error: &StepError, status: &Status, calls: Calls, seen: &mut Unknown) -> Verdict {
    let memory = &mut seen.memory;
    memory.number_of_mappings = map_probe::number_of_mappings().into();
    memory.free_addresses = map_probe::free_addresses(error.bytes).into();
    if !memory.free_addresses.is(Errno::EAGAIN) {
        return Verdict::UNKNOWN.transient();
    }
    let requested = error.bytes as u64;
    let fill = fill(requested, status.locked, Limited::LockedMemory, calls);
    let cause = LockedMemory::from(fill);
    // No other check of mmap answers EAGAIN to an anonymous mapping.
    match certainty(&fill) {
        Some(Certainty::Proven) => Verdict::proven(cause),
        Some(_) => Verdict::inferred(cause, Causes::NONE),
        None => Verdict::UNKNOWN,
    }
}

fn guard(seen: &mut Unknown) -> Verdict {
    let memory = &mut seen.memory;
    memory.number_of_mappings = map_probe::number_of_mappings().into();
    if memory.number_of_mappings.is(Errno::EEXIST) {
        memory.guard = map_probe::guards().map_or(Answer::NotAsked, Answer::from);
    }
    let split = memory.guard.is(Errno::ENOMEM);
    // Making pages inaccessible charges nothing, so that ENOMEM means the split: the number of mappings, or
    // no memory for the structure that describes one. The latter also fails a fresh mapping.
    if split || memory.number_of_mappings.is(Errno::ENOMEM) {
        let cause = MapCount {
            maximum: machine::max_map_count(),
            split,
        };
        return Verdict::proven(cause);
    }
    Verdict::inferred(
        KernelMemory::NO_CGROUP,
        Causes::NONE.with(CauseKind::MapCount),
    )
    .transient()
}

/// The first check in the kernel's order that refuses a mapping of this length now.
fn mapping(bytes: usize, status: &Status, calls: Calls, seen: &mut Unknown) -> Verdict {
    let requested = bytes as u64;
    let memory = &mut seen.memory;
    memory.number_of_mappings = map_probe::number_of_mappings().into();
    if memory.number_of_mappings.is(Errno::ENOMEM) {
        return Verdict::proven(MapCount {
            maximum: machine::max_map_count(),
            split: false,
        });
    }
    memory.free_addresses = map_probe::free_addresses(bytes).into();
    if memory.free_addresses.is(Errno::ENOMEM) {
        return Verdict::proven(AddressSpaceExhausted {
            requested,
            in_use: status.mapped,
        });
    }
    memory.inaccessible = map_probe::map(bytes, Kind::Inaccessible).into();
    if memory.inaccessible.is(Errno::ENOMEM) {
        let fill = fill(requested, status.mapped, Limited::AddressSpace, calls);
        let cause = AddressSpace::from(fill);
        return match certainty(&fill) {
            Some(Certainty::Proven) => Verdict::proven(cause),
            Some(_) => Verdict::inferred(cause, others(CauseKind::AddressSpace)),
            // No limit forbids it: no memory for the structure that describes a mapping, or numbers that
            // another thread has changed since.
            None => Verdict::UNKNOWN.transient(),
        };
    }
    memory.unreserved = map_probe::map(bytes, Kind::Unreserved).into();
    if memory.unreserved.is(Errno::ENOMEM) {
        return data_or_commit(bytes, status, calls, memory);
    }
    memory.stack = map_probe::map(bytes, Kind::Stack).into();
    if memory.stack.is(Errno::ENOMEM) {
        return commit(requested, false);
    }
    // Every check lets it pass now: another thread of the process had the memory.
    Verdict::UNKNOWN.transient()
}

fn data_or_commit(
    bytes: usize,
    status: &Status,
    calls: Calls,
    memory: &mut MemoryOracle,
) -> Verdict {
    let requested = bytes as u64;
    let fill = fill(requested, status.data, Limited::Data, calls);
    let cause = DataSegment::from(fill);
    match certainty(&fill) {
        // RLIMIT_DATA comes before the commit limit.
        Some(Certainty::Proven) => Verdict::proven(cause),
        Some(_) => {
            // Without the numbers: of the two only the commit limit counts a shared mapping.
            memory.shared = map_probe::map(bytes, Kind::Shared).into();
            match memory.shared.is(Errno::ENOMEM) {
                true => commit(requested, true),
                false => Verdict::inferred(cause, Causes::NONE.with(CauseKind::Overcommit)),
            }
        }
        None => commit(requested, true),
    }
}

/// RLIMIT_DATA lets it pass, and so does everything before, because a mapping without access of the same length
/// was granted: the commit limit is left. `unreserved` tells whether MAP_NORESERVE was refused, too.
fn commit(requested: u64, unreserved: bool) -> Verdict {
    let mode = machine::overcommit_memory();
    let info = MemInfo::read();
    let (in_use, limit) = match mode {
        Some(2) => (info.committed, info.commit_limit),
        Some(_) => (
            Some(0),
            info.total
                .and_then(|total| total.checked_add(info.swap.unwrap_or(0))),
        ),
        // Which of the two are compared is not known.
        None => (None, None),
    };
    let cause = Overcommit {
        mode,
        requested,
        in_use,
        limit,
    };
    match mode {
        // Only mode 2 accounts for mappings with MAP_NORESERVE; mode 1 never refuses.
        Some(2) => Verdict::proven(cause),
        Some(0) if !unreserved => Verdict::proven(cause),
        None => Verdict::inferred(cause, others(CauseKind::Overcommit)),
        Some(_) => Verdict::UNKNOWN.transient(),
    }
}
