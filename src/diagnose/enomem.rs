//! A clone refused with ENOMEM: the kernel's own memory, or a namespace that takes no tasks.

use crate::errno::Errno;

use super::again::{Granted, Repetition};
use super::cause::{CauseKind, DyingPidNamespace, KernelMemory, Unknown};
use super::commit;
use super::outside::{self, Outside};
use super::probe::{self, Reached};
use super::rule::{Standing, rule};
use super::verdict::Verdict;
use crate::proc::cgroup::{
    Files, Hierarchy, Level, MEMORY_V1, MEMORY_V1_SWAP, MEMORY_V2, Snapshot,
};
use crate::proc::status::{Calls, Status};
use crate::proc::task::{self, OWN_PID_NAMESPACE, PID_NAMESPACE_FOR_CHILDREN};
use crate::step::{StepError, Task};
use crate::sys::clone_probe::probe as probe_kernel;

/// Not inlined: its snapshots of cgroups would lie on the stack of every other analysis as well.
#[inline(never)]
pub(super) fn diagnose(
    error: &StepError,
    status: &Status,
    outside: Outside,
    seen: &mut Unknown,
    repetition: &mut Repetition<'_>,
) -> Result<Verdict, Granted> {
    let calls = status.calls();
    // Every call for which a starved kernel needs memory costs it a fruitless search for pages, some 200 µs: where
    // the first file could not be opened, the others are left alone.
    let starved_of_files = status.error == Some(Errno::ENOMEM);
    let hierarchy = status
        .error
        .is_none()
        .then(|| Hierarchy::of_thread(b"memory", calls))
        .flatten();
    let files = match hierarchy.as_ref().map(|hierarchy| hierarchy.version) {
        Some(1) => MEMORY_V1,
        _ => MEMORY_V2,
    };
    let snapshot = |hierarchy: &Hierarchy| hierarchy.snapshot(&files);
    let before = hierarchy.as_ref().map(snapshot);
    let first = probe::ask(&mut seen.oracle, error, &outside, calls, &mut probe_kernel);
    // The repetition charges the cgroup once more, so that its counter rises even if the probe passed.
    let repeated = repetition.refused(seen)?;
    // Between two refusals one answer is enough; the search for pages is not repeated.
    let second = if first == Reached::KernelMemory && repeated {
        first
    } else {
        probe::ask(&mut seen.oracle, error, &outside, calls, &mut probe_kernel)
    };
    let after = hierarchy.as_ref().map(snapshot);
    let risen = match (&hierarchy, &before, &after) {
        (Some(hierarchy), Some(before), Some(after)) => risen(hierarchy, before, after),
        _ => None,
    };
    let facts = Facts {
        outside,
        reached: [first, second],
        counted: risen.is_some(),
        all_read: after.as_ref().is_some_and(|after| !after.unread),
        short: starved_of_files || after.as_ref().is_some_and(is_short),
        starved_of_files,
        shadow_stack: status.shadow_stack || status.error.is_some(),
        elsewhere: match error.task {
            Task::Thread => false,
            Task::Process { .. } => {
                let own = task::namespace(OWN_PID_NAMESPACE, calls);
                let children = task::namespace(PID_NAMESPACE_FOR_CHILDREN, calls);
                own.ok()
                    .zip(children.ok())
                    .is_some_and(|(own, children)| own != children)
            }
        },
        copy: match error.task {
            Task::Process { copies: true } => commit::copy_stands(status),
            _ => Standing::Excluded,
        },
    };
    let ruling = rule(&facts.checks(), repeated);
    let cause = ruling.named.map(|kind| match kind {
        CauseKind::KernelMemory => risen
            .or_else(|| full_by(hierarchy.as_ref()?, &MEMORY_V1_SWAP))
            .unwrap_or(KernelMemory {
                unread: status.error,
                ..KernelMemory::NO_CGROUP
            })
            .into(),
        CauseKind::DyingPidNamespace => DyingPidNamespace {
            namespace: task::namespace(PID_NAMESPACE_FOR_CHILDREN, calls).ok(),
        }
        .into(),
        CauseKind::Overcommit => commit::copy_commit(status).into(),
        kind => outside::cause(kind, error, status, seen),
    });
    Ok(Verdict::ruled(&ruling, cause).transient_if(first != second))
}

/// Everything that the rule needs, without the kernel.
#[derive(Clone, Copy, Debug)]
struct Facts {
    outside: Outside,
    reached: [Reached; 2],
    /// A memory cgroup that is nearly full counted a failed charge.
    counted: bool,
    /// Whether every cgroup in sight could be read.
    all_read: bool,
    /// A cgroup in sight is nearly full, or could not be read: its charges can have failed anywhere.
    short: bool,
    /// Not even a file could be opened for want of memory.
    starved_of_files: bool,
    /// The thread may have a shadow stack: that of a new task is a mapping, and refused as one.
    shadow_stack: bool,
    /// A process was to be made in another pid namespace than its parent's, where the probes are not made.
    elsewhere: bool,
    /// The commit limit, for a copy of this process's memory.
    copy: Standing,
}

impl Facts {
    /// Each check, in the order in which a clone meets them, and before the kernel's who can answer in its place.
    fn checks(&self) -> [(CauseKind, Standing); 8] {
        let [mut tracer, mut filter, module] = self.outside.standings();
        let both = |reached| self.reached == [reached; 2];
        let starved = both(Reached::KernelMemory);
        let at_numbers = both(Reached::PidMemory);
        let memory = match (starved, self.counted) {
            (true, true) => Standing::Shown,
            (_, true) => Standing::Signed,
            (true, _) if self.starved_of_files => Standing::Signed,
            _ if self.starved_of_files && both(Reached::Unusable) => Standing::Signed,
            _ if at_numbers && self.short => Standing::Signed,
            // The probe was given memory for everything that a namespace needs; a charge that failed was counted.
            _ if at_numbers && self.all_read => Standing::Excluded,
            _ if at_numbers => Standing::Remote,
            _ => Standing::Open,
        };
        if memory == Standing::Shown {
            // Who answers in the kernel's place raises no counter.
            (tracer, filter) = (Standing::Excluded, Standing::Excluded);
        }
        let dying = match (starved, at_numbers) {
            (true, _) => Standing::Excluded,
            // The number itself is a charge as well.
            (_, true) if self.short => Standing::Open,
            (_, true) => Standing::Shown,
            // One that takes tasks is not short of memory for them where everything in sight has room.
            _ if self.elsewhere && self.all_read && !self.short => Standing::Signed,
            _ => Standing::Open,
        };
        let shadow = match self.shadow_stack && !at_numbers {
            true => Standing::Remote,
            false => Standing::Excluded,
        };
        let module = match at_numbers {
            true => Standing::Excluded,
            false => module.min(Standing::Remote),
        };
        [
            (CauseKind::Tracer, tracer),
            (CauseKind::Seccomp, filter),
            (CauseKind::KernelMemory, memory),
            (CauseKind::SecurityModule, module),
            (CauseKind::AddressSpace, shadow),
            (CauseKind::MapCount, shadow),
            (CauseKind::Overcommit, shadow.max(self.copy)),
            (CauseKind::DyingPidNamespace, dying),
        ]
    }
}

/// The memory cgroup that counted a failed charge.
fn risen(hierarchy: &Hierarchy, before: &Snapshot, after: &Snapshot) -> Option<KernelMemory> {
    let pairs = before.levels().iter().zip(after.levels());
    for (old, new) in pairs {
        let Some((new_count, old_count)) = new.failures.zip(old.failures) else {
            continue;
        };
        let rise = new_count.saturating_sub(old_count);
        // A counter that also counts what was granted after all, a smaller piece or after a search for pages,
        // says nothing of a cgroup with room to spare.
        if rise > 0 && is_nearly_full(new) {
            return Some(KernelMemory {
                directory: hierarchy.directory(new),
                version: hierarchy.version,
                usage: new.current,
                limit: new.maximum,
                swap: false,
                failures: Some(rise),
                unread: None,
            });
        }
    }
    None
}

/// A memory cgroup in sight that has hardly any room.
pub(super) fn nearly_full(calls: Calls) -> Option<KernelMemory> {
    let hierarchy = Hierarchy::of_thread(b"memory", calls)?;
    let limits = match hierarchy.version {
        1 => &[MEMORY_V1, MEMORY_V1_SWAP][..],
        _ => &[MEMORY_V2],
    };
    limits.iter().find_map(|files| full_by(&hierarchy, files))
}

/// The first one that has hardly any by its limit of this kind. In v1 memory and swap together have one of their own: it
/// is met first, and raises no counter.
#[inline(never)]
fn full_by(hierarchy: &Hierarchy, files: &Files) -> Option<KernelMemory> {
    let snapshot = hierarchy.snapshot(files);
    let level = snapshot
        .levels()
        .iter()
        .find(|level| is_nearly_full(level))?;
    Some(KernelMemory {
        directory: hierarchy.directory(level),
        version: hierarchy.version,
        usage: level.current,
        limit: level.maximum,
        swap: files.is_of_swap(),
        failures: None,
        unread: None,
    })
}

/// A cgroup in sight has hardly any room, or no memory for reading its files.
fn is_short(snapshot: &Snapshot) -> bool {
    snapshot.unread || snapshot.levels().iter().any(is_nearly_full)
}

/// A new task needs some 30 KiB, and the kernel tries 256 KiB at a time first.
fn is_nearly_full(level: &Level) -> bool {
    const ASKED_FOR: u64 = 1 << 20;
    let used = level.current.map(|bytes| bytes.saturating_add(ASKED_FOR));
    matches!((used, level.maximum), (Some(used), Some(maximum)) if used >= maximum)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use support::{Cgroup, or_skip};

    use super::*;
    use crate::diagnose::cause::Certainty;
    use crate::diagnose::settings::hierarchy_of;

    #[test]
    fn memory_and_swap_together_have_a_limit_of_their_own() {
        let cgroup = or_skip!(Cgroup::memory());
        if cgroup.is_unified() || !cgroup.path().join("memory.memsw.failcnt").exists() {
            println!("skipped: v2 has none, and v1 only if the kernel counts swap");
            return;
        }
        let directory = std::fs::File::open(cgroup.path()).expect("a directory");
        let full = || {
            let hierarchy = hierarchy_of(directory.as_raw_fd(), Calls::Any).expect("a cgroup");
            full_by(&hierarchy, &MEMORY_V1_SWAP)
        };
        assert_eq!(full(), None);
        for file in ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"] {
            cgroup.set(file, 64 << 10);
        }
        let found = full().expect("no room for a task");
        assert_eq!(found.directory.to_str(), cgroup.path().to_str());
        assert_eq!((found.limit, found.swap), (Some(64 << 10), true));
    }

    /// A clone that gets as far as its pid number and is refused one with ENOMEM, before and after a repetition.
    fn at_numbers(short: bool, all_read: bool) -> (Option<CauseKind>, Certainty) {
        let facts = Facts {
            outside: Outside {
                tracer: Standing::Excluded,
                filter: Standing::Excluded,
                module: Standing::Excluded,
                clone3: true,
            },
            reached: [Reached::PidMemory; 2],
            counted: false,
            all_read,
            short,
            starved_of_files: false,
            shadow_stack: false,
            elsewhere: false,
            copy: Standing::Excluded,
        };
        let ruling = rule(&facts.checks(), true);
        (ruling.named, ruling.certainty)
    }

    /// The structure of a pid number is charged, and a cgroup can be so full that nothing but that does not fit.
    #[test]
    fn a_full_memory_cgroup_is_not_called_a_dying_namespace() {
        let memory = (Some(CauseKind::KernelMemory), Certainty::Inferred);
        assert_eq!(at_numbers(true, true), memory);
        assert_eq!(at_numbers(true, false), memory);
        let dying = Some(CauseKind::DyingPidNamespace);
        assert_eq!(at_numbers(false, true), (dying, Certainty::Proven));
    }
}
