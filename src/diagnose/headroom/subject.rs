//! The process in question: what its files say of each limit.

use std::ffi::{CStr, CString};
use std::ops::RangeInclusive;

use super::limit::{Charge, HeadroomLimit, Unit};
use crate::diagnose::cause::CauseKind;
use crate::proc::cgroup::{Files, Hierarchy, MEMORY_V1, MEMORY_V2, PIDS};
use crate::proc::limits::{Limit, Limited};
use crate::proc::machine::{self, MemInfo, RESERVED_PIDS};
use crate::proc::maps::Maps;
use crate::proc::mounts::proc_shows_all;
use crate::proc::parse::UNLIMITED;
use crate::proc::processes::{UserTasks, numbers_in_turn};
use crate::proc::status::{CAP_IPC_LOCK, CAP_SYS_ADMIN, CAP_SYS_RESOURCE, Calls, Status};
use crate::proc::task;
use crate::sys::map_probe::future_is_locked;

/// The process in question, and how the reader sees it.
pub(super) struct Subject<'a> {
    directory: &'a str,
    own: bool,
    status: Status,
    /// Which calls the reader may make.
    calls: Calls,
    initial_user: Option<bool>,
    /// Whether mlockall(MCL_FUTURE) is in force, which only the process itself can find out.
    future_locked: Option<bool>,
}

impl Subject<'_> {
    pub(super) fn read(directory: &str, own: bool) -> Subject<'_> {
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

    /// Whether it has a capability that counts for the whole machine, if that is known.
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
    pub(super) fn mappings_per_thread(&self) -> RangeInclusive<u64> {
        let splits = machine::kernel_version() < Some((6, 13));
        match (splits, self.future_locked, self.calls) {
            (true, ..) | (_, Some(true), _) => 4..=4,
            (false, Some(false), Calls::Any) => 0..=1,
            _ => 0..=4,
        }
    }

    pub(super) fn tasks(&self, list: &mut Vec<HeadroomLimit>) {
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
                // No user can have more tasks than the machine.
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
        // /proc is of the reader's own namespace, and a process with more levels is in one inside.
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

    pub(super) fn cgroups(
        &self,
        list: &mut Vec<HeadroomLimit>,
        controller: &str,
        cause: CauseKind,
    ) {
        let pids = cause == CauseKind::PidsCgroup;
        let unit = if pids { Unit::Tasks } else { Unit::Bytes };
        let hidden = |why| HeadroomLimit::hidden(cause, unit, why);
        let Some(hierarchy) =
            Hierarchy::locate(&self.file("cgroup"), controller.as_bytes(), self.calls)
        else {
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

    pub(super) fn memory(&self, list: &mut Vec<HeadroomLimit>) {
        list.extend(self.mappings());
        list.extend(self.bytes());
        let mode = machine::overcommit_memory(self.calls);
        let admin = self.has(CAP_SYS_ADMIN) == Some(true);
        list.push(overcommit(
            mode,
            &MemInfo::read(self.calls),
            machine::reserves(self.calls),
            self.status.mapped,
            admin,
        ));
    }

    /// The number of mappings, and the addresses between them.
    fn mappings(&self) -> [HeadroomLimit; 2] {
        let directory = self.directory;
        let mapped = self.status.mapped;
        let maps = Maps::read(directory);
        let free = maps.as_ref().map(|maps| maps.free);
        [
            HeadroomLimit {
                cause: CauseKind::MapCount,
                unit: Unit::Mappings,
                in_use: maps.as_ref().map(|maps| maps.count),
                unseen: 0,
                maximum: machine::max_map_count(self.calls),
                source: format!("{directory}/maps, /proc/sys/vm/max_map_count"),
                charge: Charge::Sum,
            },
            HeadroomLimit {
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
            },
        ]
    }

    /// The resource limits in bytes.
    fn bytes(&self) -> [HeadroomLimit; 3] {
        let directory = self.directory;
        let (locks, why) = match (self.future_locked, self.has(CAP_IPC_LOCK)) {
            (_, Some(true)) => (Charge::Nothing, "this process is exempt"),
            (Some(false), _) => (
                Charge::Nothing,
                "counts for locked stacks, mlockall(MCL_FUTURE) is not in force",
            ),
            (Some(true), Some(false)) => (Charge::Sum, "mlockall(MCL_FUTURE) is in force"),
            (Some(true), None) => (
                Charge::Unknown,
                "whether this process is exempt is not known",
            ),
            (None, _) => (
                Charge::Unknown,
                "counts for locked stacks and under mlockall(MCL_FUTURE), which only the process itself can find out",
            ),
        };
        let row = |cause, limited, in_use, field, charge| HeadroomLimit {
            cause,
            unit: Unit::Bytes,
            in_use,
            unseen: 0,
            maximum: self.soft(limited),
            source: format!("{directory}/status {field}, {directory}/limits"),
            charge,
        };
        let Status {
            mapped,
            data,
            locked,
            ..
        } = self.status;
        let (size, sum) = (Limited::AddressSpace, Charge::Sum);
        let mut locking = row(
            CauseKind::LockedMemory,
            Limited::LockedMemory,
            locked,
            "VmLck",
            locks,
        );
        locking.source = format!("{}; {why}", locking.source);
        [
            row(CauseKind::AddressSpace, size, mapped, "VmSize", sum),
            row(CauseKind::DataSegment, Limited::Data, data, "VmData", sum),
            locking,
        ]
    }
}

/// What vm.overcommit_memory makes of a process with so many bytes `mapped`.
pub(super) fn overcommit(
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
