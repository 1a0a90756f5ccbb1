//! A clone refused with ENOMEM: the kernel's own memory, or a namespace that takes no tasks.

use crate::errno::Errno;

use super::again::{Granted, Repetition};
use super::cause::{CauseKind, Causes, DyingPidNamespace, KernelMemory, Unknown};
use super::probe::{self, Reached};
use super::verdict::Verdict;
use crate::proc::cgroup::{Hierarchy, Level, MEMORY_V1, MEMORY_V2, Snapshot};
use crate::proc::status::Status;
use crate::proc::task::{self, OWN_PID_NAMESPACE};

pub(super) fn diagnose(
    status: &Status,
    seen: &mut Unknown,
    repetition: &mut Repetition<'_>,
) -> Result<Verdict, Granted> {
    let calls = status.calls();
    // Every call that asks a starved kernel for memory costs it a fruitless search for pages, some 200 µs: where
    // the first file could not be opened, the others are left alone.
    let starved_of_files = status.error == Some(Errno::ENOMEM);
    let hierarchy = (!starved_of_files)
        .then(|| Hierarchy::of_thread(b"memory"))
        .flatten();
    let files = match hierarchy.as_ref().map(|hierarchy| hierarchy.version) {
        Some(1) => MEMORY_V1,
        _ => MEMORY_V2,
    };
    let snapshot = |hierarchy: &Hierarchy| hierarchy.snapshot(&files);
    let before = hierarchy.as_ref().map(snapshot);
    let first = probe::ask(&mut seen.oracle, calls);
    // The repetition charges the cgroup once more, so that its counter rises even if the probe passed.
    let repeated = repetition.refused(seen)?;
    // Between two refusals one answer is enough; the search for pages is not asked for twice.
    let second = if first == Reached::KernelMemory && repeated {
        first
    } else {
        probe::ask(&mut seen.oracle, calls)
    };
    let after = hierarchy.as_ref().map(snapshot);
    let risen = match (&hierarchy, &before, &after) {
        (Some(hierarchy), Some(before), Some(after)) => risen(hierarchy, before, after),
        _ => None,
    };
    let both = |reached| first == reached && second == reached;
    let starved = both(Reached::KernelMemory);
    // Refused before the pid number: the namespace was not looked at.
    let others = match starved {
        true => Causes::NONE,
        false => Causes::NONE
            .with(CauseKind::DyingPidNamespace)
            .with(CauseKind::KernelMemory),
    };
    Ok(match risen {
        Some(cause) => Verdict::believed(cause, starved, others),
        None if both(Reached::PidMemory) => {
            let namespace = task::namespace(OWN_PID_NAMESPACE, calls).ok();
            // A failed charge of the structure would have been counted.
            let counted = after.is_some_and(|after| !after.unread);
            Verdict::believed(DyingPidNamespace { namespace }, counted, others)
        }
        None if starved || repeated => {
            // A shadow stack is a mapping, and refused as one.
            let others = match status.shadow_stack {
                true => others
                    .with(CauseKind::AddressSpace)
                    .with(CauseKind::MapCount)
                    .with(CauseKind::Overcommit),
                false => others,
            };
            let cause = KernelMemory {
                unread: status.error,
                ..KernelMemory::NO_CGROUP
            };
            // Before the pid number nothing but a shadow stack and memory answers ENOMEM; and a kernel that
            // cannot even open a file has no memory, whatever the shadow stack.
            let no_shadow_stack = status.error.is_none() && !status.shadow_stack;
            let proven = starved && (no_shadow_stack || starved_of_files);
            Verdict::believed(cause, proven, others)
        }
        None => Verdict::UNKNOWN.transient(),
    })
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
                failures: Some(rise),
                unread: None,
            });
        }
    }
    None
}

/// A new task asks for some 30 KiB, and the kernel tries 256 KiB at a time first.
fn is_nearly_full(level: &Level) -> bool {
    const ASKED_FOR: u64 = 1 << 20;
    let used = level.current.map(|bytes| bytes.saturating_add(ASKED_FOR));
    matches!((used, level.maximum), (Some(used), Some(maximum)) if used >= maximum)
}
