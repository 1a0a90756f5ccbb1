//! How many more threads fit: every limit that thread creation meets, how full it is, and which comes first.
//!
//! Unlike the rest of this folder this runs in good times: it may allocate, and takes milliseconds.

mod limit;
mod subject;

use std::fmt;
use std::ops::RangeInclusive;

use nix::unistd::{SysconfVar, sysconf};

use super::cause::CauseKind;
use crate::proc::parse::UNLIMITED;
use crate::stack::{self, cache::StackCache};
use crate::sys::page_size;
use crate::tcb::Runtime;

pub use limit::{Charge, HeadroomLimit, Unit};
use subject::Subject;

/// Every limit that thread creation can meet, in the order in which a new thread meets them.
#[derive(Clone, Debug)]
pub struct Headroom {
    limits: Vec<HeadroomLimit>,
    mappings_per_thread: RangeInclusive<u64>,
    /// Bytes around a stack in the mapping of a thread, where they are known.
    around: Option<u64>,
    /// Bytes of stacks that wait in caches for a thread.
    cached: u64,
    /// The most arenas that malloc makes.
    arenas: u64,
}

impl Headroom {
    /// The limits.
    ///
    /// ```
    /// assert!(!nptl::headroom().limits().is_empty());
    /// ```
    pub fn limits(&self) -> &[HeadroomLimit] {
        &self.limits
    }

    /// How many more threads with this many bytes of stack a limit lets pass: at least, and at most. [`u64::MAX`] is
    /// no limit, `None` is not known.
    ///
    /// Counted are guard, thread-local storage, signal stack, stacks in caches, and 4 KiB of heap for each thread. The
    /// lower number allows for what glibc's malloc may take besides: 64 MiB of address space for each arena (twice
    /// that for a moment), and 8 arenas for each processor. What the program takes for itself is not counted, nor
    /// what others take or give back meanwhile.
    ///
    /// ```
    /// let headroom = nptl::headroom();
    /// for limit in headroom.limits() {
    ///     println!("{}: {:?} more threads", limit.cause, headroom.threads_left(limit, 2 << 20));
    /// }
    /// ```
    pub fn threads_left(
        &self,
        limit: &HeadroomLimit,
        stack_bytes: usize,
    ) -> Option<RangeInclusive<u64>> {
        let left = limit.left();
        if left == Some(UNLIMITED) || limit.charge == Charge::Nothing {
            return Some(UNLIMITED..=UNLIMITED);
        }
        let left = left?;
        let (each, once, cached) = self.takes(limit, left, stack_bytes);
        match limit.charge {
            Charge::Unknown => None,
            Charge::Each if *each.start() > left => Some(0..=0),
            Charge::Each => Some(UNLIMITED..=UNLIMITED),
            _ => {
                let sure = left.saturating_sub(limit.unseen).saturating_sub(once);
                let threads = |room: u64, each: &u64| room.checked_div(*each).unwrap_or(UNLIMITED);
                Some(threads(sure, each.end())..=threads(left.saturating_add(cached), each.start()))
            }
        }
    }

    /// What one thread takes of a limit, what all together may take once, and what caches have of it.
    fn takes(
        &self,
        limit: &HeadroomLimit,
        left: u64,
        stack_bytes: usize,
    ) -> (RangeInclusive<u64>, u64, u64) {
        // An arena reserves as much, and can write this part of it at first. The heap grows by the last.
        const ARENA: u64 = 64 << 20;
        const ARENA_START: u64 = 160 << 10;
        const HEAP_STEP: u64 = 1 << 20;
        // While an arena is made it takes twice the room, in order to be aligned.
        let reserved = self.arenas * 2;
        let bytes = self.bytes_per_thread(stack_bytes);
        let once = match limit.cause {
            _ if limit.unit == Unit::Tasks => return (1..=1, 0, 0),
            _ if limit.unit == Unit::Mappings => {
                return (self.mappings_per_thread.clone(), reserved, 0);
            }
            // What arenas leave between them can be too short for a stack.
            CauseKind::AddressSpaceExhausted => {
                reserved.saturating_mul(ARENA.saturating_add(*bytes.end()))
            }
            CauseKind::AddressSpace | CauseKind::LockedMemory => reserved.min(left / ARENA) * ARENA,
            _ => self.arenas * ARENA_START,
        };
        (bytes, once.saturating_add(HEAP_STEP), self.cached)
    }

    /// The mapping of a thread, and its part of the heap.
    fn bytes_per_thread(&self, stack_bytes: usize) -> RangeInclusive<u64> {
        const HEAP: u64 = 4 << 10;
        match self.around {
            Some(around) => {
                let mapping = (stack::rounded(stack_bytes) as u64).saturating_add(around);
                // The guards do not count for every limit.
                mapping - 2 * page_size() as u64..=mapping.saturating_add(HEAP)
            }
            // How much thread-local storage there is, and whether sizes are rounded, is not known.
            None => {
                let stack = stack_bytes as u64;
                stack.max(1)..=stack.saturating_add(stack / 4).saturating_add(128 << 10)
            }
        }
    }

    /// The limit that is reached first as far as can be seen, and after how many more threads with this many bytes of
    /// stack: at least, and at most.
    ///
    /// While [`hidden`](Self::hidden) has a limit, that one may come earlier, and the lower number is 0.
    ///
    /// ```
    /// let headroom = nptl::headroom();
    /// if let Some((limit, threads)) = headroom.first(2 << 20) {
    ///     println!("{threads:?} more threads, then {}", limit.cause);
    /// }
    /// ```
    pub fn first(&self, stack_bytes: usize) -> Option<(&HeadroomLimit, RangeInclusive<u64>)> {
        let known = || {
            let limits = self.limits.iter();
            limits.filter_map(|limit| Some((limit, self.threads_left(limit, stack_bytes)?)))
        };
        let hidden = self.hidden(stack_bytes).next().map(|_| 0);
        let least = hidden.or_else(|| known().map(|(_, threads)| *threads.start()).min())?;
        let (first, threads) = known()
            .filter(|(_, threads)| *threads.end() != UNLIMITED)
            .min_by_key(|(_, threads)| *threads.end())?;
        Some((first, least..=*threads.end()))
    }

    /// The limits of which it is not known how many threads they let pass; [`source`](HeadroomLimit::source) says
    /// why.
    ///
    /// ```
    /// for limit in nptl::headroom().hidden(2 << 20) {
    ///     println!("{} may refuse earlier: {}", limit.cause, limit.source);
    /// }
    /// ```
    pub fn hidden(&self, stack_bytes: usize) -> impl Iterator<Item = &HeadroomLimit> {
        let limits = self.limits.iter();
        limits.filter(move |limit| self.threads_left(limit, stack_bytes).is_none())
    }
}

impl<'a> IntoIterator for &'a Headroom {
    type Item = &'a HeadroomLimit;
    type IntoIter = std::slice::Iter<'a, HeadroomLimit>;

    fn into_iter(self) -> Self::IntoIter {
        self.limits.iter()
    }
}

impl fmt::Display for Headroom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |value: Option<u64>| match value {
            None => "?".to_owned(),
            Some(UNLIMITED) => "unlimited".to_owned(),
            Some(value) => value.to_string(),
        };
        for limit in &self.limits {
            writeln!(
                f,
                "{:<46} {:>16} of {:>16} {:<8}  {:>16} left  {}",
                limit.cause.title(),
                shown(limit.in_use),
                shown(limit.maximum),
                limit.unit.to_string(),
                shown(limit.left()),
                limit.source,
            )?;
        }
        Ok(())
    }
}

/// How full every limit is that this process can meet when it creates a thread.
///
/// What cannot be read is `None`. Takes milliseconds; grows with the number of tasks in the machine and of mappings
/// in the process. Before the first thread it starts one, as the first spawn does, to learn what one takes.
///
/// ```
/// for limit in nptl::headroom().limits() {
///     println!("{}: {:?} left, from {}", limit.cause, limit.left(), limit.source);
/// }
/// ```
pub fn headroom() -> Headroom {
    // First, because it has a stack of glibc's mapped.
    let around = Runtime::get().ok().map(stack::bytes_around);
    of("/proc/thread-self", true, around)
}

/// [`headroom`] of another process, as far as its files in /proc may be read. Its stacks are taken for this crate's, and
/// what lies around them for at most 128 KiB.
///
/// # Errors
/// The error of reading /proc/PID/status: `ENOENT` if there is no such process.
///
/// ```
/// assert!(!nptl::diagnose::headroom_of(std::process::id())?.limits().is_empty());
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn headroom_of(pid: u32) -> std::io::Result<Headroom> {
    let directory = format!("/proc/{pid}");
    std::fs::metadata(format!("{directory}/status"))?;
    Ok(of(&directory, false, None))
}

fn of(directory: &str, own: bool, around: Option<usize>) -> Headroom {
    let subject = Subject::read(directory, own);
    let mut limits = Vec::new();
    subject.tasks(&mut limits);
    subject.cgroups(&mut limits, "pids", CauseKind::PidsCgroup);
    subject.cgroups(&mut limits, "memory", CauseKind::KernelMemory);
    subject.memory(&mut limits);
    Headroom {
        limits,
        mappings_per_thread: subject.mappings_per_thread(),
        around: around.map(|bytes| bytes as u64),
        cached: if own { StackCache::cached_bytes() } else { 0 },
        arenas: 8 * processors(),
    }
}

/// Those that glibc counts, or more.
fn processors() -> u64 {
    let processors = sysconf(SysconfVar::_NPROCESSORS_CONF).ok().flatten();
    processors
        .and_then(|count| u64::try_from(count).ok())
        .unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::subject::overcommit;
    use super::*;
    use crate::proc::machine::MemInfo;

    const GIB: u64 = 1 << 30;

    fn headroom(row: HeadroomLimit, arenas: u64) -> Headroom {
        Headroom {
            limits: vec![row],
            mappings_per_thread: 0..=1,
            around: Some(32 << 10),
            cached: 0,
            arenas,
        }
    }

    /// A machine of 16 GiB without swap.
    fn row(mode: Option<u64>, mapped: u64, admin: bool) -> HeadroomLimit {
        let memory = MemInfo {
            total: Some(16 * GIB),
            swap: Some(0),
            commit_limit: Some(8 * GIB),
            committed: Some(GIB),
        };
        let reserves = Some((8 << 20, 128 << 20));
        overcommit(mode, &memory, reserves, Some(mapped), admin)
    }

    #[test]
    fn overcommit_modes() {
        let threads = |mode, stack| {
            let headroom = headroom(row(mode, 64 << 20, false), 0);
            headroom.threads_left(&headroom.limits[0], stack)
        };
        assert_eq!(threads(Some(0), 40 << 30), Some(0..=0));
        assert_eq!(threads(Some(0), 8 << 30), Some(UNLIMITED..=UNLIMITED));
        assert_eq!(threads(Some(1), 40 << 30), Some(UNLIMITED..=UNLIMITED));
        assert_eq!(threads(None, 1 << 20), None);
        assert_eq!(threads(Some(2), 8 << 30), Some(0..=0));
    }

    /// vm_enough_memory: less 8 MiB for root, less 1/32 of the process up to 128 MiB, by an estimate that is off by up
    /// to 1/256 of the memory.
    #[test]
    fn the_commit_limit_of_mode_2_is_not_reached() {
        const OFF: u64 = 16 * GIB / 256;
        for (mapped, admin, kept) in [
            (64 << 20, false, (2 << 20) + (8 << 20)),
            (64 << 20, true, 2 << 20),
            (64 << 30, false, (128 << 20) + (8 << 20)),
        ] {
            let row = row(Some(2), mapped, admin);
            assert_eq!(row.left(), Some(7 * GIB - kept + OFF), "{mapped}");
            let later = (128 << 20) - (mapped / 32).min(128 << 20);
            assert_eq!(row.unseen, later + 2 * OFF, "{mapped}");
        }
        let memory = MemInfo {
            committed: Some(GIB),
            ..MemInfo::default()
        };
        assert_eq!(overcommit(Some(2), &memory, None, None, false).left(), None);
    }

    #[test]
    fn arenas_take_what_is_left_of_address_space() {
        let threads = |left, arenas| {
            let mut row = HeadroomLimit::hidden(CauseKind::AddressSpace, Unit::Bytes, "");
            row.in_use = Some(0);
            row.maximum = Some(left);
            let headroom = headroom(row, arenas);
            let threads = headroom.threads_left(&headroom.limits[0], 128 << 10);
            threads.expect("a number").into_inner()
        };
        let each = (128 << 10) + (32 << 10) + (4 << 10);
        let most = |left: u64| left / (each - (4 << 10) - (8 << 10));
        // Not enough for one arena: all but a step of the heap.
        assert_eq!(threads(60 << 20, 16), ((59 << 20) / each, most(60 << 20)));
        // One arena fits, and the rest is for stacks.
        assert_eq!(threads(100 << 20, 16), ((35 << 20) / each, most(100 << 20)));
        // Never more than there are, each twice for a moment.
        assert_eq!(threads(GIB, 1), (((1024 - 129) << 20) / each, most(GIB)));
    }

    #[test]
    fn a_hidden_limit_may_come_first() {
        let mut row = HeadroomLimit::hidden(CauseKind::ThreadsMax, Unit::Tasks, "");
        row.in_use = Some(40);
        row.maximum = Some(100);
        row.unseen = 5;
        let mut headroom = headroom(row, 0);
        let first = |headroom: &Headroom| headroom.first(1 << 20).map(|(_, threads)| threads);
        assert_eq!(first(&headroom), Some(55..=60));
        let hidden = HeadroomLimit::hidden(CauseKind::PidNumbers, Unit::Tasks, "");
        headroom.limits.push(hidden);
        assert_eq!(first(&headroom), Some(0..=60));
        assert_eq!(headroom.hidden(1 << 20).count(), 1);
        headroom.limits.remove(0);
        assert_eq!(first(&headroom), None);
    }
}
