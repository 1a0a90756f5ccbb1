//! How many more threads fit: every limit that thread creation meets, how full it is, and which comes first.
//!
//! Unlike the rest of this folder this is asked in good times: it may allocate, and takes milliseconds.

use std::ffi::{CStr, CString};
use std::fmt;
use std::ops::RangeInclusive;

use nix::unistd::{SysconfVar, sysconf};

use super::cause::CauseKind;
use crate::proc::cgroup::{Files, Hierarchy, MEMORY_V1, MEMORY_V2, PIDS};
use crate::proc::limits::{Limit, Limited};
use crate::proc::machine::{self, MemInfo, RESERVED_PIDS};
use crate::proc::maps::Maps;
use crate::proc::mounts::proc_shows_all;
use crate::proc::parse::UNLIMITED;
use crate::proc::processes::{UserTasks, numbers_in_turn};
use crate::proc::status::{CAP_IPC_LOCK, CAP_SYS_ADMIN, CAP_SYS_RESOURCE, Calls, Status};
use crate::proc::task;
use crate::stack::{self, cache::StackCache};
use crate::sys::map_probe::future_is_locked;
use crate::sys::page_size;
use crate::tcb::Runtime;

/// What a limit counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Unit {
    /// Tasks: threads, whether of this process or of others.
    Tasks,
    /// Bytes.
    Bytes,
    /// Memory mappings.
    Mappings,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Unit::Tasks => "tasks",
            Unit::Bytes => "bytes",
            Unit::Mappings => "mappings",
        })
    }
}

/// How a limit looks at a new thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Charge {
    /// What all threads take is added up.
    Sum,
    /// Each mapping is compared alone.
    Each,
    /// As things are, a new thread is not counted.
    Nothing,
    /// Whether it is counted, or how much, cannot be told.
    Unknown,
}

/// One limit: how full, and where it was read.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct HeadroomLimit {
    /// The cause that a refusal at this limit would have.
    pub cause: CauseKind,
    /// What is counted.
    pub unit: Unit,
    /// In use, at least, or `None` if that cannot be read.
    pub in_use: Option<u64>,
    /// How much more may be in use, or kept back, without being visible; 0 if `in_use` is exact.
    pub unseen: u64,
    /// The maximum; `None` if it cannot be read, [`u64::MAX`] if there is none.
    pub maximum: Option<u64>,
    /// The file or call, and what the numbers leave out.
    pub source: String,
    /// How a new thread is counted.
    pub charge: Charge,
}

impl HeadroomLimit {
    /// Maximum less in use, at most; 0 at the limit, [`u64::MAX`] without one, `None` if either is unknown.
    pub fn left(&self) -> Option<u64> {
        match self.maximum? {
            UNLIMITED => Some(UNLIMITED),
            maximum => Some(maximum.saturating_sub(self.in_use?)),
        }
    }

    /// A limit that may be there, of which no number can be read.
    fn hidden(cause: CauseKind, unit: Unit, source: impl Into<String>) -> HeadroomLimit {
        HeadroomLimit {
            cause,
            unit,
            in_use: None,
            unseen: 0,
            maximum: None,
            source: source.into(),
            charge: Charge::Sum,
        }
    }
}

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
    pub fn limits(&self) -> &[HeadroomLimit] {
        &self.limits
    }

    /// How many more threads with this many bytes of stack a limit lets pass: at least, and at most. [`u64::MAX`] is
    /// no limit, `None` cannot be told.
    ///
    /// Counted are guard, thread-local storage, signal stack, stacks in caches, and 4 KiB of heap for each thread. The
    /// lower number allows for what glibc's malloc may take besides: 64 MiB of address space for each arena (twice
    /// that for a moment), and 8 arenas for each processor. What the program takes for itself is not counted, nor
    /// what others take or give back meanwhile.
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

    /// The limits of which it cannot be told how many threads they let pass; [`source`](HeadroomLimit::source) says
    /// why.
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

/// The process in question, and how the reader sees it.
struct Subject<'a> {
    directory: &'a str,
    own: bool,
    status: Status,
    /// Which calls the reader may make.
    calls: Calls,
    initial_user: Option<bool>,
    /// Whether mlockall(MCL_FUTURE) is in force, which only the process itself can tell.
    future_locked: Option<bool>,
}

impl Subject<'_> {
    fn read(directory: &str, own: bool) -> Subject<'_> {
        let mut subject = Subject {
            directory,
            own,
            status: Status::default(),
            calls: Status::read().calls(),
            initial_user: None,
            future_locked: if own { future_is_locked() } else { None },
        };
        subject.status = Status::read_from(&subject.file("status"));
        subject.initial_user =
            task::is_initial_user_namespace(&subject.file("ns/user"), subject.calls);
        subject
    }

    fn file(&self, name: &str) -> CString {
        CString::new(format!("{}/{name}", self.directory)).unwrap_or_default()
    }

    fn soft(&self, limited: Limited) -> Option<u64> {
        Limit::read_from(&self.file("limits"), limited).map(|limit| limit.soft)
    }

    /// Whether it has a capability that counts for the whole machine. None: that cannot be told.
    fn has(&self, capability: u32) -> Option<bool> {
        match self
            .status
            .capabilities
            .map(|_| self.status.has(capability))
        {
            Some(true) => self.initial_user,
            other => other,
        }
    }

    /// A kernel that marks guards inside a mapping lets adjacent stacks share one. Before 6.13 a guard splits, and so
    /// it does in locked memory, which takes no marks, and under a filter that refuses the mark.
    fn mappings_per_thread(&self) -> RangeInclusive<u64> {
        let splits = machine::kernel_version() < Some((6, 13));
        match (splits, self.future_locked, self.calls) {
            (true, ..) | (_, Some(true), _) => 4..=4,
            (false, Some(false), Calls::Any) => 0..=1,
            _ => 0..=4,
        }
    }

    fn tasks(&self, list: &mut Vec<HeadroomLimit>) {
        let machine = machine::tasks(self.calls);
        // pid_max is that of the reader's namespace.
        let initial = task::in_initial_pid_namespace(self.calls) == Some(true);
        let all_visible = Status::read().pid_levels == Some(1) && proc_shows_all();
        list.push(self.user_processes(machine, initial && all_visible));
        list.push(HeadroomLimit {
            cause: CauseKind::ThreadsMax,
            unit: Unit::Tasks,
            in_use: machine,
            unseen: 0,
            maximum: machine::threads_max(self.calls),
            source: "/proc/loadavg, /proc/sys/kernel/threads-max".to_owned(),
            charge: Charge::Sum,
        });
        let hidden = |why| HeadroomLimit::hidden(CauseKind::PidNumbers, Unit::Tasks, why);
        match self.in_readers_pid_namespace() {
            Some(true) => list.push(self.pid_numbers(all_visible)),
            Some(false) => list.push(hidden(
                "the process is in another pid namespace, whose limit is read from inside",
            )),
            None => list.push(hidden("the pid namespace of the process cannot be read")),
        }
        if !initial {
            list.push(hidden(
                "the pid namespaces around this one, which no file here shows",
            ));
        }
    }

    /// RLIMIT_NPROC. Its count is in no file.
    fn user_processes(&self, machine: Option<u64>, all_visible: bool) -> HeadroomLimit {
        let maximum = self.soft(Limited::Processes);
        let exempt = [CAP_SYS_RESOURCE, CAP_SYS_ADMIN]
            .map(|capability| self.has(capability))
            .contains(&Some(true))
            || self.status.uid == Some(0) && self.initial_user == Some(true);
        if self.initial_user != Some(true) {
            let soft = maximum.map_or("?".to_owned(), |maximum| maximum.to_string());
            return HeadroomLimit::hidden(
                CauseKind::UserProcesses,
                Unit::Tasks,
                format!(
                    "a user namespace also enforces the limit of the moment it was made, which no file shows; \
                     {}/limits has {soft}",
                    self.directory
                ),
            );
        }
        let user = self.status.uid.and_then(UserTasks::count);
        let mut source = format!(
            "{}/limits, and the tasks of this user in /proc",
            self.directory
        );
        let unseen = user.map_or(0, |user| {
            if all_visible {
                user.in_namespaces
            } else {
                // Nobody can have more tasks than the machine.
                machine.map_or(UNLIMITED, |machine| machine.saturating_sub(user.own))
            }
        });
        if exempt {
            source.push_str("; this process is exempt");
        } else if unseen > 0 {
            source.push_str("; more of them can be in other namespaces or hidden");
        }
        HeadroomLimit {
            cause: CauseKind::UserProcesses,
            unit: Unit::Tasks,
            in_use: user.map(|user| user.own),
            unseen,
            maximum,
            source,
            charge: if exempt { Charge::Nothing } else { Charge::Sum },
        }
    }

    /// Whether it is in the reader's pid namespace.
    fn in_readers_pid_namespace(&self) -> Option<bool> {
        if self.own {
            return Some(true);
        }
        let inode = |path: &CStr| task::namespace(path, self.calls).ok();
        if let Some((process, reader)) =
            inode(&self.file("ns/pid")).zip(inode(task::OWN_PID_NAMESPACE))
        {
            return Some(process == reader);
        }
        // The link may only be read by who may trace the process, its status by everybody: with one level the mounted
        // /proc is of the reader's own namespace, and whoever has more is in one inside.
        let reader = Status::read().pid_levels?;
        let process = self.status.pid_levels?;
        (reader == 1).then_some(process == 1)
    }

    /// How many numbers of the reader's pid namespace can still be given out.
    fn pid_numbers(&self, all_visible: bool) -> HeadroomLimit {
        let pid_max = machine::pid_max(self.calls);
        // The kernel gives numbers out in turn, and begins again at 300 when it has come to the end. Until it has
        // passed that number it has not; afterwards the ones below are never used again.
        let (in_use, lost, source) = match machine::last_pid_number(self.calls) {
            Some(last) if last < RESERVED_PIDS => (
                Some(last),
                1,
                "/proc/loadavg (last number), /proc/sys/kernel/pid_max; before the first wrap",
            ),
            Some(_) if all_visible => (
                numbers_in_turn(),
                RESERVED_PIDS,
                "tasks, process groups and sessions in /proc with numbers from 300 on, /proc/sys/kernel/pid_max less 300",
            ),
            Some(_) => (
                None,
                RESERVED_PIDS,
                "/proc hides processes, or is of another pid namespace",
            ),
            None => (
                None,
                RESERVED_PIDS,
                "/proc/loadavg is absent, or not the kernel's",
            ),
        };
        HeadroomLimit {
            cause: CauseKind::PidNumbers,
            unit: Unit::Tasks,
            in_use,
            unseen: 0,
            maximum: pid_max.map(|pid_max| pid_max.saturating_sub(lost)),
            source: source.to_owned(),
            charge: Charge::Sum,
        }
    }

    fn cgroups(&self, list: &mut Vec<HeadroomLimit>, controller: &str, cause: CauseKind) {
        let pids = cause == CauseKind::PidsCgroup;
        let unit = if pids { Unit::Tasks } else { Unit::Bytes };
        let hidden = |why| HeadroomLimit::hidden(cause, unit, why);
        let Some(hierarchy) = Hierarchy::locate(&self.file("cgroup"), controller.as_bytes()) else {
            list.push(hidden(
                "the cgroup of the process is not visible".to_owned(),
            ));
            return;
        };
        let files: &Files = match (pids, hierarchy.version) {
            (true, _) => &PIDS,
            (false, 1) => &MEMORY_V1,
            (false, _) => &MEMORY_V2,
        };
        let snapshot = hierarchy.full_snapshot(files);
        let limited = snapshot
            .levels()
            .iter()
            .filter(|level| level.maximum.is_some());
        list.extend(limited.map(|level| HeadroomLimit {
            cause,
            unit,
            in_use: level.current,
            unseen: 0,
            maximum: level.maximum,
            source: hierarchy.directory(level).to_string(),
            // What a stack touches is charged, and what the kernel needs; files in memory make room.
            charge: if pids { Charge::Sum } else { Charge::Unknown },
        }));
        if snapshot.hidden || snapshot.unread {
            list.push(hidden(
                "cgroups above these, or some of their files, cannot be read".to_owned(),
            ));
        }
    }

    fn memory(&self, list: &mut Vec<HeadroomLimit>) {
        let directory = self.directory;
        let mapped = self.status.mapped;
        let maps = Maps::read(directory);
        list.push(HeadroomLimit {
            cause: CauseKind::MapCount,
            unit: Unit::Mappings,
            in_use: maps.as_ref().map(|maps| maps.count),
            unseen: 0,
            maximum: machine::max_map_count(self.calls),
            source: format!("{directory}/maps, /proc/sys/vm/max_map_count"),
            charge: Charge::Sum,
        });
        let free = maps.as_ref().map(|maps| maps.free);
        list.push(HeadroomLimit {
            cause: CauseKind::AddressSpaceExhausted,
            unit: Unit::Bytes,
            in_use: mapped,
            // A stack needs room in one piece.
            unseen: maps.map_or(0, |maps| maps.free - maps.largest_gap),
            maximum: mapped
                .zip(free)
                .map(|(mapped, free)| mapped.saturating_add(free)),
            source: format!("{directory}/status VmSize, and the gaps of {directory}/maps"),
            charge: Charge::Sum,
        });
        let (locks, why) = match (self.future_locked, self.has(CAP_IPC_LOCK)) {
            (_, Some(true)) => (Charge::Nothing, "this process is exempt"),
            (Some(false), _) => (
                Charge::Nothing,
                "counts for locked stacks, mlockall(MCL_FUTURE) is not in force",
            ),
            (Some(true), Some(false)) => (Charge::Sum, "mlockall(MCL_FUTURE) is in force"),
            (Some(true), None) => (
                Charge::Unknown,
                "whether this process is exempt cannot be told",
            ),
            (None, _) => (
                Charge::Unknown,
                "counts for locked stacks and under mlockall(MCL_FUTURE), of which only the process itself can tell",
            ),
        };
        let data = self.status.data;
        let locked = self.status.locked;
        for (cause, limited, in_use, field, charge) in [
            (
                CauseKind::AddressSpace,
                Limited::AddressSpace,
                mapped,
                "VmSize",
                Charge::Sum,
            ),
            (
                CauseKind::DataSegment,
                Limited::Data,
                data,
                "VmData",
                Charge::Sum,
            ),
            (
                CauseKind::LockedMemory,
                Limited::LockedMemory,
                locked,
                "VmLck",
                locks,
            ),
        ] {
            let mut source = format!("{directory}/status {field}, {directory}/limits");
            if limited == Limited::LockedMemory {
                source = format!("{source}; {why}");
            }
            list.push(HeadroomLimit {
                cause,
                unit: Unit::Bytes,
                in_use,
                unseen: 0,
                maximum: self.soft(limited),
                source,
                charge,
            });
        }
        let mode = machine::overcommit_memory(self.calls);
        let admin = self.has(CAP_SYS_ADMIN) == Some(true);
        list.push(overcommit(
            mode,
            &MemInfo::read(self.calls),
            machine::reserves(self.calls),
            mapped,
            admin,
        ));
    }
}

/// What vm.overcommit_memory makes of a process with so many bytes `mapped`.
fn overcommit(
    mode: Option<u64>,
    memory: &MemInfo,
    reserves: Option<(u64, u64)>,
    mapped: Option<u64>,
    admin: bool,
) -> HeadroomLimit {
    let mut row = HeadroomLimit::hidden(CauseKind::Overcommit, Unit::Bytes, "");
    row.source = match mode {
        Some(0) => {
            row.charge = Charge::Each;
            row.in_use = Some(0);
            row.maximum = memory.total.zip(memory.swap).map(|(total, swap)| total.saturating_add(swap));
            "/proc/meminfo MemTotal and SwapTotal, for each mapping; vm.overcommit_memory is 0"
        }
        Some(1) => {
            row.charge = Charge::Nothing;
            "vm.overcommit_memory is 1"
        }
        Some(2) => {
            let reserves = reserves.zip(mapped).zip(memory.total.zip(memory.commit_limit));
            row.in_use = memory.committed;
            row.maximum = reserves.map(|(((for_admin, for_user), mapped), (total, limit))| {
                // A part of the process's size is kept back, up to a maximum. What is committed is compared by an
                // estimate, which can be off by that.
                let (now, off) = (for_user.min(mapped / 32), total / 256);
                row.unseen = for_user - now + 2 * off;
                let kept = now + if admin { 0 } else { for_admin };
                limit.saturating_sub(kept).saturating_add(off)
            });
            "/proc/meminfo Committed_AS, CommitLimit less vm.admin_reserve_kbytes and vm.user_reserve_kbytes"
        }
        _ => "vm.overcommit_memory cannot be read",
    }
    .to_owned();
    row
}

#[cfg(test)]
mod tests {
    use super::*;

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
