//! How many more threads fit: every limit that thread creation meets, how full it is, and which comes first.
//!
//! Unlike the rest of this folder this is asked in good times: it may allocate, and takes milliseconds.

use std::ffi::{CStr, CString};
use std::fmt;

use super::cause::CauseKind;
use crate::proc::cgroup::{Files, Hierarchy, MEMORY_V1, MEMORY_V2, PIDS};
use crate::proc::limits::{Limit, Limited};
use crate::proc::machine::{self, MemInfo, RESERVED_PIDS};
use crate::proc::maps::Maps;
use crate::proc::parse::UNLIMITED;
use crate::proc::processes::{numbers_in_turn, tasks_of_user};
use crate::proc::status::{CAP_IPC_LOCK, CAP_SYS_ADMIN, CAP_SYS_RESOURCE, Calls, Status};
use crate::proc::task;
use crate::sys::map_probe::future_is_locked;

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

/// One limit: how full, and where it was read.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct HeadroomLimit {
    /// The cause that a refusal at this limit would have.
    pub cause: CauseKind,
    /// What is counted.
    pub unit: Unit,
    /// In use, or `None` if that cannot be read.
    pub in_use: Option<u64>,
    /// The maximum; `None` if it cannot be read, [`u64::MAX`] if there is none.
    pub maximum: Option<u64>,
    /// The file or call, and what the numbers leave out.
    pub source: String,
    /// Whether every new thread counts against it. Others matter under certain settings only.
    pub counts: bool,
}

impl HeadroomLimit {
    /// Maximum less in use; 0 at the limit, [`u64::MAX`] without one, `None` if either is unknown.
    pub fn left(&self) -> Option<u64> {
        match self.maximum? {
            UNLIMITED => Some(UNLIMITED),
            maximum => Some(maximum.saturating_sub(self.in_use?)),
        }
    }
}

/// Every limit that thread creation can meet, in the order in which a new thread meets them.
#[derive(Clone, Debug)]
pub struct Headroom {
    limits: Vec<HeadroomLimit>,
    mappings_per_thread: u64,
}

impl Headroom {
    /// The limits.
    pub fn limits(&self) -> &[HeadroomLimit] {
        &self.limits
    }

    /// How many more threads with this many bytes of stack a limit lets pass, or `None` if it cannot be told.
    ///
    /// Guard, thread-local storage and signal stack are taken as 64 KiB more of address space.
    pub fn threads_left(&self, limit: &HeadroomLimit, stack_bytes: usize) -> Option<u64> {
        const BESIDES: u64 = 64 << 10;
        let left = limit.left()?;
        if left == UNLIMITED || !limit.counts {
            return Some(UNLIMITED);
        }
        let each = match limit.unit {
            Unit::Tasks => 1,
            Unit::Bytes => (stack_bytes as u64).saturating_add(BESIDES),
            Unit::Mappings => self.mappings_per_thread,
        };
        Some(left.checked_div(each).unwrap_or(UNLIMITED))
    }

    /// The limit that is reached first, and after how many more threads with this many bytes of stack.
    ///
    /// Limits that cannot be read are left out, so that a limit not listed here may come earlier.
    ///
    /// ```
    /// let headroom = nptl::headroom();
    /// if let Some((limit, threads)) = headroom.first(2 << 20) {
    ///     println!("{threads} more threads, then {}", limit.cause);
    /// }
    /// ```
    pub fn first(&self, stack_bytes: usize) -> Option<(&HeadroomLimit, u64)> {
        self.limits
            .iter()
            .filter_map(|limit| Some((limit, self.threads_left(limit, stack_bytes)?)))
            .filter(|(_, threads)| *threads != UNLIMITED)
            .min_by_key(|(_, threads)| *threads)
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
/// in the process.
///
/// ```
/// for limit in nptl::headroom().limits() {
///     println!("{}: {:?} left, from {}", limit.cause, limit.left(), limit.source);
/// }
/// ```
pub fn headroom() -> Headroom {
    of("/proc/thread-self", None)
}

/// [`headroom`] of another process, as far as its files in /proc may be read.
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
    Ok(of(&directory, Some(pid)))
}

fn c_string(path: &str) -> CString {
    CString::new(path).unwrap_or_default()
}

fn of(directory: &str, pid: Option<u32>) -> Headroom {
    let file = |name: &str| c_string(&format!("{directory}/{name}"));
    let status = Status::read_from(&file("status"));
    let calls = Status::read().calls();
    let future_locked = match pid {
        None => future_is_locked(),
        Some(_) => None,
    };
    // A kernel that marks guards inside a mapping lets adjacent stacks share one. Before 6.13 a guard splits, and so
    // it does in locked memory, which takes no marks.
    let mappings_per_thread = match future_locked {
        Some(true) => 4,
        _ if guards_split() => 4,
        _ => 0,
    };
    let initial_user = task::is_initial_user_namespace(&file("ns/user"), calls);
    let mut list = Vec::new();
    tasks(
        &mut list,
        &status,
        &file,
        calls,
        pid.is_none(),
        initial_user,
        directory,
    );
    for (controller, kind) in [
        ("pids", CauseKind::PidsCgroup),
        ("memory", CauseKind::KernelMemory),
    ] {
        cgroups(&mut list, &file("cgroup"), controller, kind);
    }
    memory(
        &mut list,
        &status,
        &file("limits"),
        directory,
        mappings_per_thread,
        future_locked,
        initial_user == Some(true),
    );
    Headroom {
        limits: list,
        mappings_per_thread,
    }
}

/// Whether a guard is a mapping of its own on this kernel.
fn guards_split() -> bool {
    machine::kernel_version() < Some((6, 13))
}

fn soft(path: &CStr, limited: Limited) -> Option<u64> {
    Limit::read_from(path, limited).map(|limit| limit.soft)
}

fn tasks(
    list: &mut Vec<HeadroomLimit>,
    status: &Status,
    file: &dyn Fn(&str) -> CString,
    calls: Calls,
    own: bool,
    initial_user: Option<bool>,
    directory: &str,
) {
    let machine = machine::tasks(calls);
    let inode = |name| task::namespace(&file(name), calls).ok();
    let exempt = initial_user == Some(true)
        && (status.uid == Some(0) || status.has(CAP_SYS_RESOURCE) || status.has(CAP_SYS_ADMIN));
    let mut source = format!("{directory}/limits, and the tasks of this user visible in /proc");
    if exempt {
        source.push_str("; this process is exempt");
    } else if initial_user != Some(true) {
        source.push_str("; the user namespace may enforce a lower one");
    }
    list.push(HeadroomLimit {
        cause: CauseKind::UserProcesses,
        unit: Unit::Tasks,
        in_use: status.uid.and_then(tasks_of_user),
        maximum: soft(&file("limits"), Limited::Processes),
        source,
        counts: !exempt,
    });
    list.push(HeadroomLimit {
        cause: CauseKind::ThreadsMax,
        unit: Unit::Tasks,
        in_use: machine,
        maximum: machine::threads_max(Calls::Any),
        source: "/proc/loadavg, /proc/sys/kernel/threads-max".to_owned(),
        counts: true,
    });
    // pid_max is that of the reader's namespace.
    let readers = task::namespace(task::OWN_PID_NAMESPACE, calls).ok();
    let same = match inode("ns/pid").zip(readers) {
        _ if own => Some(true),
        Some((process, reader)) => Some(process == reader),
        // The link may only be read by who may trace the process, its status by everybody.
        None => same_by_levels(directory),
    };
    let initial = task::in_initial_pid_namespace(calls) == Some(true);
    list.push(pid_numbers(same, initial));
}

/// Whether a process is in the reader's pid namespace, by the number of levels at which the mounted /proc gives both
/// a number.
fn same_by_levels(directory: &str) -> Option<bool> {
    let levels =
        |directory: &str| Status::read_from(&c_string(&format!("{directory}/status"))).pid_levels;
    // With one level the mount is of the reader's own namespace, and whoever has more is in one inside.
    let reader = levels("/proc/thread-self")?;
    let process = levels(directory)?;
    (reader == 1).then_some(process == 1)
}

/// How many numbers of the reader's pid namespace can still be given out, at most.
fn pid_numbers(namespace: Option<bool>, initial: bool) -> HeadroomLimit {
    let same = namespace == Some(true);
    let pid_max = machine::pid_max(Calls::Any).filter(|_| same);
    // The kernel gives numbers out in turn, and begins again at 300 when it has come to the end. Until it has
    // passed that number it has not; afterwards the ones below are never used again.
    let (in_use, maximum, mut source) = match machine::last_pid_number() {
        Some(last) if last < RESERVED_PIDS => (
            Some(last),
            pid_max.map(|pid_max| pid_max.saturating_sub(1)),
            "/proc/loadavg (last number), /proc/sys/kernel/pid_max; before the first wrap".to_owned(),
        ),
        _ => (
            numbers_in_turn(),
            pid_max.map(|pid_max| pid_max.saturating_sub(RESERVED_PIDS)),
            "tasks in /proc with numbers from 300 on, /proc/sys/kernel/pid_max less 300; at most, process groups and \
             sessions without a leader hold numbers, too"
                .to_owned(),
        ),
    };
    if !same {
        source = match namespace {
            Some(_) => "the process is in another pid namespace, whose limit is read from inside",
            None => "the pid namespace of the process cannot be read",
        }
        .to_owned();
    } else if !initial {
        source.push_str("; a pid namespace around this one may have fewer");
    }
    HeadroomLimit {
        cause: CauseKind::PidNumbers,
        unit: Unit::Tasks,
        in_use: in_use.filter(|_| same),
        maximum,
        source,
        counts: true,
    }
}

fn cgroups(list: &mut Vec<HeadroomLimit>, membership: &CStr, controller: &str, cause: CauseKind) {
    let Some(hierarchy) = Hierarchy::locate(membership, controller.as_bytes()) else {
        return;
    };
    let pids = cause == CauseKind::PidsCgroup;
    let files: &Files = match (pids, hierarchy.version) {
        (true, _) => &PIDS,
        (false, 1) => &MEMORY_V1,
        (false, _) => &MEMORY_V2,
    };
    let snapshot = hierarchy.full_snapshot(files);
    for level in snapshot.levels() {
        if level.maximum.is_none() {
            continue;
        }
        let mut source = hierarchy.directory(level).to_string();
        if snapshot.hidden {
            source.push_str("; cgroups above are hidden");
        }
        list.push(HeadroomLimit {
            cause,
            unit: if pids { Unit::Tasks } else { Unit::Bytes },
            in_use: level.current,
            maximum: level.maximum,
            source,
            // Only what a stack really touches is charged.
            counts: pids,
        });
    }
}

fn memory(
    list: &mut Vec<HeadroomLimit>,
    status: &Status,
    limits_file: &CStr,
    directory: &str,
    mappings_per_thread: u64,
    future: Option<bool>,
    initial_user: bool,
) {
    let maps = Maps::read(directory);
    list.push(HeadroomLimit {
        cause: CauseKind::MapCount,
        unit: Unit::Mappings,
        in_use: maps.as_ref().map(|maps| maps.count),
        maximum: machine::max_map_count(Calls::Any),
        source: format!(
            "{directory}/maps, /proc/sys/vm/max_map_count{}",
            match future {
                None if mappings_per_thread == 0 =>
                    "; under mlockall(MCL_FUTURE), of which only the process itself can tell, a thread takes four",
                _ => "",
            }
        ),
        counts: mappings_per_thread > 0,
    });
    list.push(HeadroomLimit {
        cause: CauseKind::AddressSpaceExhausted,
        unit: Unit::Bytes,
        in_use: status.mapped,
        // Stacks need room in one piece each; what is left is the largest.
        maximum: status
            .mapped
            .zip(maps)
            .map(|(mapped, maps)| mapped.saturating_add(maps.largest_gap)),
        source: format!("{directory}/status VmSize, and the largest gap of {directory}/maps"),
        counts: true,
    });
    for (cause, limited, in_use, field) in [
        (
            CauseKind::AddressSpace,
            Limited::AddressSpace,
            status.mapped,
            "VmSize",
        ),
        (CauseKind::DataSegment, Limited::Data, status.data, "VmData"),
        (
            CauseKind::LockedMemory,
            Limited::LockedMemory,
            status.locked,
            "VmLck",
        ),
    ] {
        let mut source = format!("{directory}/status {field}, {directory}/limits");
        let mut counts = true;
        if cause == CauseKind::LockedMemory {
            let exempt = status.has(CAP_IPC_LOCK) && initial_user;
            counts = future == Some(true) && !exempt;
            source.push_str(match future {
                _ if exempt => "; this process is exempt",
                Some(true) => "; mlockall(MCL_FUTURE) is in force",
                Some(false) => "; counts for locked stacks, mlockall(MCL_FUTURE) is not in force",
                None => {
                    "; counts for locked stacks and under mlockall(MCL_FUTURE), of which only the process itself can tell"
                }
            });
        }
        list.push(HeadroomLimit {
            cause,
            unit: Unit::Bytes,
            in_use,
            maximum: soft(limits_file, limited),
            source,
            counts,
        });
    }
    let strict = machine::overcommit_memory(Calls::Any) == Some(2);
    let memory = MemInfo::read(Calls::Any);
    list.push(HeadroomLimit {
        cause: CauseKind::Overcommit,
        unit: Unit::Bytes,
        in_use: memory.committed,
        maximum: memory.commit_limit,
        source:
            "/proc/meminfo Committed_AS, CommitLimit; enforced with vm.overcommit_memory=2 only"
                .to_owned(),
        counts: strict,
    });
}
