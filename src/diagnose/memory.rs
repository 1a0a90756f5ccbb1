//! From a refused mapping to the limit that refused it.
//!
//! The kernel looks at a mapping in a fixed order: number of mappings, free addresses, locked memory, RLIMIT_AS,
//! RLIMIT_DATA, commit limit. `sys::map_probe` probes each in turn. One mmap makes the first two checks, and another thread
//! can map at any time, so the number of mappings is probed again after each refusal, and two rounds must agree. Of
//! limits in bytes the arithmetic must agree as well, before and after.

use crate::errno::Errno;

use super::cause::{
    AddressSpace, AddressSpaceExhausted, Answer, Cause, CauseKind, DataSegment, Fill, KernelMemory,
    LockedMemory, MapCount, MemoryOracle, Overcommit, Unknown,
};
use super::commit::{commit, commit_stands, stands};
use super::enomem;
use super::rule::{Standing, rule};
use super::verdict::Verdict;
use crate::proc::limits::{Limit, Limited};
use crate::proc::machine;
use crate::proc::status::{CAP_IPC_LOCK, Calls, Status};
use crate::proc::task;
use crate::step::{Step, StepError};
use crate::sys::map_probe::{self as probe, Question};

pub(super) fn diagnose(error: &StepError, status: &Status, seen: &mut Unknown) -> Verdict {
    match (error.step, error.errno) {
        (Step::PrepareStack, _) if !error.locks => prefault(status),
        (Step::PrepareStack, Errno::ENOMEM | Errno::EPERM) => lock(error, status, seen),
        // The limit let it pass; the pages themselves were not to be had.
        (Step::PrepareStack, Errno::EAGAIN) => prefault(status),
        (Step::GuardStack, Errno::ENOMEM) => guard(status, seen),
        (Step::MapStack, Errno::ENOMEM | Errno::EAGAIN) => {
            mapping(error, error.bytes, true, status, seen)
        }
        // malloc was refused; how much it requested of the kernel is not known, but a heap grows by at
        // least this much, and it never folds one cause into another.
        (Step::Allocate | Step::AllocateTls, Errno::ENOMEM) => {
            const HEAP_STEP: usize = 1 << 20;
            mapping(error, error.bytes.max(HEAP_STEP), false, status, seen)
        }
        _ => Verdict::UNKNOWN,
    }
}

/// The first check that refuses a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Count,
    Addresses,
    Locked,
    /// RLIMIT_AS, or no memory for the structure that describes a mapping.
    Size,
    /// RLIMIT_DATA, or the commit limit of mode 2.
    DataOrCommit,
    /// The commit limit of mode 0, or of mode 2.
    Commit,
    /// None does now.
    Nowhere,
    /// One of the others, which may not be probed under a filter.
    Somewhere,
    /// The answers are of different moments.
    Unclear,
}

/// The kernel, or in tests a model of it.
type ProbeMapping<'a> = &'a mut dyn FnMut(Question) -> Result<(), Errno>;

/// Probes for the mapping in the kernel's order of checks. `literally`: the refused call was an mmap with the arguments
/// of [`Question::Stack`]; under a filter no other is made.
fn ask(
    literally: bool,
    calls: Calls,
    memory: &mut MemoryOracle,
    kernel: ProbeMapping<'_>,
) -> Place {
    if calls == Calls::FilesOnly {
        if !literally {
            return Place::Somewhere;
        }
        memory.stack = kernel(Question::Stack).into();
        return match memory.stack {
            Answer::Granted => Place::Nowhere,
            _ => Place::Somewhere,
        };
    }
    memory.number_of_mappings = kernel(Question::Count).into();
    if memory.number_of_mappings.is(Errno::ENOMEM) {
        return Place::Count;
    }
    memory.free_addresses = kernel(Question::Addresses).into();
    if memory.free_addresses.is(Errno::EAGAIN) {
        return Place::Locked;
    }
    let mut refuses = |question, answer: &mut Answer| {
        *answer = kernel(question).into();
        answer.is(Errno::ENOMEM)
    };
    let place = if memory.free_addresses.is(Errno::ENOMEM) {
        Place::Addresses
    } else if refuses(Question::Inaccessible, &mut memory.inaccessible) {
        Place::Size
    } else if refuses(Question::Unreserved, &mut memory.unreserved) {
        Place::DataOrCommit
    } else if refuses(Question::Stack, &mut memory.stack) {
        Place::Commit
    } else {
        return Place::Nowhere;
    };
    // Each of these begins with the number of mappings.
    memory.number_of_mappings = kernel(Question::Count).into();
    match memory.number_of_mappings.is(Errno::EEXIST) {
        true => place,
        false => Place::Unclear,
    }
}

/// Everything about a mapping that was read at one moment.
#[derive(Clone, Copy, Debug)]
struct MemoryNumbers {
    size: Fill,
    data: Fill,
    locked: Fill,
    commit: Overcommit,
}

impl MemoryNumbers {
    fn read(requested: u64, status: &Status) -> MemoryNumbers {
        let calls = status.calls();
        let fill = |in_use, limited| Fill {
            requested,
            in_use,
            limit: Limit::read(limited, calls).map(|limit| match (limited, limit.soft) {
                // A rule of the kernel's for valgrind.
                (Limited::Data, 0) => limit.hard,
                (_, soft) => soft,
            }),
        };
        MemoryNumbers {
            size: fill(status.mapped, Limited::AddressSpace),
            data: fill(status.data, Limited::Data),
            locked: fill(status.locked, Limited::LockedMemory),
            commit: commit(requested, status),
        }
    }
}

/// Everything that the rule needs, without the kernel.
#[derive(Clone, Copy, Debug)]
struct Facts {
    errno: Errno,
    outside: [(CauseKind, Standing); 2],
    places: [Place; 2],
    numbers: [MemoryNumbers; 2],
    /// CAP_IPC_LOCK lets the caller lock what it likes.
    exempt: bool,
}

impl Facts {
    fn both(&self, of: impl Fn(&MemoryNumbers) -> Standing) -> Standing {
        let [before, after] = self.numbers.each_ref().map(of);
        match before == after {
            true => before,
            // It was short at one of them.
            false => before.max(after).min(Standing::Signed),
        }
    }

    /// Each check, in the kernel's order, and before them who can answer in its place.
    fn checks(&self) -> [(CauseKind, Standing); 9] {
        let [first, second] = self.places;
        let place = match first == second {
            true => first,
            false => Place::Unclear,
        };
        let commit = |numbers: &MemoryNumbers| match (place, numbers.commit.mode) {
            // MAP_NORESERVE was refused as well, which only mode 2 does.
            (Place::DataOrCommit, Some(0)) => Standing::Excluded,
            _ => commit_stands(&numbers.commit),
        };
        let data = self.both(|numbers| stands(&numbers.data));
        let commit = self.both(commit);
        // Two answers that no limit explains: another thread has mapped or unmapped between them.
        let moved = match place {
            Place::DataOrCommit => data.max(commit) <= Standing::Remote,
            Place::Commit => commit <= Standing::Remote,
            _ => false,
        };
        let is_open = moved || matches!(place, Place::Somewhere | Place::Unclear);
        // A limit that is probed somewhere else has not been met, or has let it pass.
        let at = |places: &[Place], standing| match is_open || places.contains(&place) {
            true => standing,
            false => Standing::Excluded,
        };
        let shown_at = |wanted| match is_open {
            true => Standing::Open,
            false => Standing::shown_if(place == wanted),
        };
        // The only one that answers EAGAIN to an anonymous mapping.
        let locked = match self.errno == Errno::EAGAIN && !self.exempt {
            true => at(
                &[Place::Locked],
                self.both(|numbers| stands(&numbers.locked)),
            ),
            false => Standing::Excluded,
        };
        let size = self.both(|numbers| stands(&numbers.size));
        // Without the arithmetic it was memory for the structure, and the limits on writable mappings were not reached.
        let unasked = place == Place::Size && size < Standing::Signed;
        let writable = |places: &[Place], standing| match unasked {
            true => standing,
            false => at(places, standing),
        };
        let [tracer, filter] = self.outside;
        let of_size = |standing| match self.errno {
            Errno::EAGAIN => Standing::Excluded,
            _ => standing,
        };
        [
            tracer,
            filter,
            (CauseKind::MapCount, of_size(shown_at(Place::Count))),
            (
                CauseKind::AddressSpaceExhausted,
                of_size(shown_at(Place::Addresses)),
            ),
            (CauseKind::LockedMemory, locked),
            (CauseKind::AddressSpace, of_size(at(&[Place::Size], size))),
            (
                CauseKind::DataSegment,
                of_size(writable(&[Place::DataOrCommit], data)),
            ),
            (
                CauseKind::Overcommit,
                of_size(writable(&[Place::DataOrCommit, Place::Commit], commit)),
            ),
            (CauseKind::KernelMemory, of_size(Standing::Remote)),
        ]
    }
}

/// Who can answer an mmap in the kernel's place: listed where there are any.
fn outside(status: &Status) -> [(CauseKind, Standing); 2] {
    let remote_if = |present| match present {
        true => Standing::Remote,
        false => Standing::Excluded,
    };
    [
        (CauseKind::Tracer, remote_if(status.tracer != Some(0))),
        (
            CauseKind::Seccomp,
            remote_if(status.calls() == Calls::FilesOnly),
        ),
    ]
}

fn is_exempt(status: &Status) -> bool {
    let initial = task::in_initial_user_namespace(status.calls());
    status.has(CAP_IPC_LOCK) && initial == Some(true)
}

/// What would be granted now.
fn passed(seen: &mut Unknown) -> Verdict {
    seen.passed = true;
    Verdict::UNKNOWN.transient()
}

fn mapping(
    error: &StepError,
    bytes: usize,
    literally: bool,
    status: &Status,
    seen: &mut Unknown,
) -> Verdict {
    let calls = status.calls();
    let requested = bytes as u64;
    let memory = &mut seen.memory;
    let mut kernel = |question| probe::ask(question, bytes);
    let first = ask(literally, calls, memory, &mut kernel);
    let before = MemoryNumbers::read(requested, status);
    if literally {
        memory.stack = kernel(Question::Stack).into();
        if !memory.stack.is(error.errno) {
            return passed(seen);
        }
    }
    let after = MemoryNumbers::read(requested, &Status::read());
    let second = ask(literally, calls, memory, &mut kernel);
    if [first, second] == [Place::Nowhere; 2] {
        return passed(seen);
    }
    let facts = Facts {
        errno: match (literally, first) {
            // malloc makes ENOMEM of everything.
            (false, Place::Locked) => Errno::EAGAIN,
            _ => error.errno,
        },
        outside: outside(status),
        places: [first, second],
        numbers: [before, after],
        exempt: is_exempt(status),
    };
    let ruling = rule(&facts.checks(), literally);
    let cause = ruling.named.map(|kind| -> Cause {
        match kind {
            CauseKind::MapCount => map_count(false, calls).into(),
            CauseKind::AddressSpaceExhausted => AddressSpaceExhausted {
                requested,
                in_use: status.mapped,
            }
            .into(),
            CauseKind::LockedMemory => LockedMemory::from(after.locked).into(),
            CauseKind::AddressSpace => AddressSpace::from(after.size).into(),
            CauseKind::DataSegment => DataSegment::from(after.data).into(),
            CauseKind::Overcommit => after.commit.into(),
            _ => Cause::Unknown(*seen),
        }
    });
    Verdict::ruled(&ruling, cause).transient_if(first != second)
}

fn map_count(split: bool, calls: Calls) -> MapCount {
    MapCount {
        maximum: machine::max_map_count(calls),
        split,
    }
}

/// mlock(2) of a stack. It gives ENOMEM for unmapped pages as well, which a stack does not have.
fn lock(error: &StepError, status: &Status, seen: &mut Unknown) -> Verdict {
    if is_exempt(status) {
        return Verdict::UNKNOWN;
    }
    let requested = error.bytes as u64;
    let mut refuses = || {
        seen.memory.locked = match status.calls() {
            Calls::Any => probe::locked(error.bytes).into(),
            Calls::FilesOnly => Answer::NotAsked,
        };
        !seen.memory.locked.is(Errno::EINVAL)
    };
    let first = refuses();
    let before = MemoryNumbers::read(requested, status).locked;
    let after = MemoryNumbers::read(requested, &Status::read()).locked;
    let second = refuses();
    if !first && !second {
        return passed(seen);
    }
    let standing = stands(&before).min(stands(&after));
    let [tracer, filter] = outside(status);
    let ruling = rule(
        &[tracer, filter, (CauseKind::LockedMemory, standing)],
        first && second,
    );
    let cause = ruling.named.map(|_| LockedMemory::from(after).into());
    Verdict::ruled(&ruling, cause)
}

/// Pages of a stack that were to be resident: no memory, which is mostly the memory cgroup's.
fn prefault(status: &Status) -> Verdict {
    let cgroup = enomem::nearly_full(status.calls());
    let standing = match cgroup {
        Some(_) => Standing::Signed,
        None => Standing::Open,
    };
    let [tracer, filter] = outside(status);
    let ruling = rule(
        &[tracer, filter, (CauseKind::KernelMemory, standing)],
        false,
    );
    let cause = cgroup.unwrap_or(KernelMemory {
        unread: status.error,
        ..KernelMemory::NO_CGROUP
    });
    Verdict::ruled(&ruling, Some(cause.into()))
}

fn guard(status: &Status, seen: &mut Unknown) -> Verdict {
    let mut ask = || {
        let memory = &mut seen.memory;
        if status.calls() == Calls::Any {
            memory.number_of_mappings = probe::ask(Question::Count, 0).into();
        }
        memory.guard = match memory.number_of_mappings.is(Errno::ENOMEM) {
            true => Answer::NotAsked,
            false => probe::guards().map_or(Answer::NotAsked, Answer::from),
        };
        (memory.number_of_mappings.is(Errno::ENOMEM), memory.guard)
    };
    let (first, second) = (ask(), ask());
    if [first.1, second.1] == [Answer::Granted; 2] {
        return passed(seen);
    }
    let is_short = |(many, guard): (bool, Answer)| many || guard.is(Errno::ENOMEM);
    // Making pages inaccessible charges nothing, so that ENOMEM means the split: the number of mappings, or no memory
    // for the structure that describes one.
    let memory = enomem::nearly_full(status.calls());
    let count = match (is_short(first) && is_short(second), memory) {
        (true, None) => Standing::Shown,
        (true, Some(_)) => Standing::Signed,
        _ => Standing::Open,
    };
    let other = match memory {
        Some(_) => Standing::Open,
        None => Standing::Remote,
    };
    let [tracer, filter] = outside(status);
    let checks = [
        tracer,
        filter,
        (CauseKind::MapCount, count),
        (CauseKind::KernelMemory, other),
    ];
    let ruling = rule(&checks, is_short(first) && is_short(second));
    let cause = map_count(!second.0, status.calls());
    let cause = ruling.named.map(|_| cause.into());
    Verdict::ruled(&ruling, cause).transient_if(first != second)
}

#[cfg(test)]
#[path = "truth_of_mmap.rs"]
mod truth;
