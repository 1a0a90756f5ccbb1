//! The last refusals of the process, in memory that outlives it: a core file holds them.
//!
//! Each entry carries its report as text, formatted when it was recorded, so that a debugger needs
//! neither this crate's source nor its debug information. `nptl-failures` in gdb prints them.

use crate::error::{Refusal, Reserve, SpawnError};
use crate::mem::text::{CUT, Text, character_boundary};
use crate::sync::{Lock, notice_fork};
use crate::sys::Signals;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Entries that are kept.
const KEPT: usize = 16;

/// Bytes of text an entry holds: the longest report, with a name and the path of a cgroup as long as they are
/// kept. A longer one would be cut, and say so.
const TEXT: usize = 2944;

/// Bytes of a thread's name that an entry holds: a name of any length must not push the report out.
const NAME: usize = 64;

/// One refusal. The layout is read by `gdb/nptl.py`.
#[repr(C)]
struct RingEntry {
    /// Number of the refusal, from 1; 0: the entry is empty, or being written.
    number: AtomicU64,
    /// Seconds since 1970 (CLOCK_REALTIME).
    seconds: i64,
    nanoseconds: i64,
    /// The thread whose spawn was refused.
    tid: i32,
    /// One line, then the report.
    text: Text<TEXT>,
    refusal: Option<Refusal>,
}

impl RingEntry {
    const fn empty() -> RingEntry {
        RingEntry {
            number: AtomicU64::new(0),
            seconds: 0,
            nanoseconds: 0,
            tid: 0,
            text: Text::EMPTY,
            refusal: None,
        }
    }
}

pub(crate) struct Ring {
    /// Refusals so far.
    count: u64,
    entries: [RingEntry; KEPT],
}

impl Ring {
    /// For a debugger: the first entry's offset in the lock, the number of entries, and the size of each.
    pub(crate) const LAYOUT: [usize; 3] = [
        Lock::<Ring>::VALUE_OFFSET + std::mem::offset_of!(Ring, entries),
        KEPT,
        size_of::<RingEntry>(),
    ];
}

impl Ring {
    fn newest(&self) -> Option<&RingEntry> {
        let number = |entry: &&RingEntry| entry.number.load(Ordering::Acquire);
        let newest = self.entries.iter().max_by_key(number)?;
        (number(&newest) > 0).then_some(newest)
    }
}

/// A forked child resets the lock: an entry that another thread was writing has the number 0.
pub(crate) static FAILURES: Lock<Ring> = Lock::new(Ring {
    count: 0,
    entries: [const { RingEntry::empty() }; KEPT],
});

/// The stack on which a refusal of the program's own calls is explained is in use. Here, because a forked child resets it
/// as well.
#[cfg(feature = "interpose")]
pub(crate) static ANALYSIS: Lock<()> = Lock::new(());

/// Makes the locks those of a forked child.
///
/// # Safety
/// As for [`Lock::reset`].
#[expect(unsafe_code, reason = "a lock that a thread of the parent's can hold")]
pub(crate) unsafe fn reset() {
    // SAFETY: by the caller's promise.
    unsafe { FAILURES.reset() };
    #[cfg(feature = "interpose")]
    // SAFETY: by the same promise; what it guards holds nothing between two uses.
    unsafe {
        ANALYSIS.reset()
    };
}

/// Records a refusal, without allocating.
pub(crate) fn record(refusal: &Refusal, name: Option<&str>) {
    // Before the lock: a thread that a filter kills for a call must not hold it.
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME);
    let tid = nix::unistd::gettid().as_raw();
    // fork(2) is refused in signal handlers, too, and one that interrupts the holder of the lock would wait for ever.
    let _signals = Signals::block_all_but_setxid();
    let mut ring = FAILURES.lock();
    ring.count += 1;
    let number = ring.count;
    let Some(entry) = ring.entries.get_mut((number as usize - 1) % KEPT) else {
        return;
    };
    entry.number.store(0, Ordering::Relaxed);
    // In this order also for a child that is forked in between.
    fence(Ordering::Release);
    (entry.seconds, entry.nanoseconds) = now.map_or((0, 0), |now| (now.tv_sec(), now.tv_nsec()));
    entry.tid = tid;
    let text = &mut entry.text;
    text.clear();
    let _ = write!(text, "{refusal}");
    if let Some(name) = name {
        let end = character_boundary(name.as_bytes(), NAME);
        let (kept, rest) = name.split_at_checked(end).unwrap_or((name, ""));
        let cut = if rest.is_empty() { "" } else { CUT };
        let _ = write!(text, " name={kept:?}{cut}");
    }
    let _ = write!(text, "\n{}", refusal.report());
    text.mark_cut();
    entry.refusal = Some(*refusal);
    entry.number.store(number, Ordering::Release);
}

/// The last refusal of the process, by any thread.
///
/// The last 16 lie in static memory with their reports, and survive into a core file:
/// `nptl-failures` prints them in gdb.
///
/// ```
/// assert!(nptl::last_failure().is_none());
/// let _ = nptl::Builder::new().stack_size(usize::MAX).spawn(|| ());
/// assert_eq!(nptl::last_failure().unwrap().step(), nptl::Step::Attributes);
/// ```
pub fn last_failure() -> Option<SpawnError> {
    notice_fork();
    let signals = Signals::block_all_but_setxid();
    let ring = FAILURES.lock();
    let refusal = ring.newest()?.refusal?;
    drop(ring);
    drop(signals);
    Some(Reserve::new().refuse(refusal))
}

/// How many refusals there were.
#[cfg(feature = "interpose")]
pub(crate) fn count() -> u64 {
    notice_fork();
    let _signals = Signals::block_all_but_setxid();
    FAILURES.lock().count
}

/// The text of [`last_failure`]: a line, and the report.
#[cfg(feature = "interpose")]
pub(crate) fn write_last(into: &mut impl Write) -> std::fmt::Result {
    notice_fork();
    let _signals = Signals::block_all_but_setxid();
    let ring = FAILURES.lock();
    let text = ring.newest().map(|newest| newest.text.as_bytes());
    text.unwrap_or_default()
        .utf8_chunks()
        .try_for_each(|chunk| into.write_str(chunk.valid()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::{CauseKind, CgroupPlace, InlinePath, KernelMemory, PidsCgroup, Verdict};
    use crate::errno::Errno;
    use crate::step::{StackFate, StackOrigin, StackOutcome, Step, StepError};

    fn longest(verdict: Verdict) -> Refusal {
        let error = StepError::new(Step::PrepareStack, Errno::EAGAIN, usize::MAX);
        let verdict = Verdict {
            silence: Some(
                "a filter or a tracer answers clone3 for the kernel, which cannot be asked what refused",
            ),
            transient: true,
            spent: std::time::Duration::from_micros(123_456),
            ..verdict
        };
        Refusal {
            stack_size: usize::MAX,
            stack: StackOutcome {
                origin: StackOrigin::Cache,
                fate: StackFate::Cached,
            },
            attempts: u32::MAX,
            reclaimed: usize::MAX,
            calibration: true,
            ..Refusal::new(error, verdict)
        }
    }

    /// The longest of each kind of thing that is kept: no report of a cause is cut.
    #[test]
    fn the_longest_report_fits() {
        // Quoted, so that the command with it is the longest; cut where a path is.
        for path in [
            format!("/sys/fs/cgroup/{}", " ".repeat(253 - 15)),
            format!("/sys/fs/cgroup/{}", "x".repeat(4096)),
        ] {
            let directory = InlinePath::new(path.as_bytes());
            let mut lengths = Vec::new();
            let pids = PidsCgroup {
                directory,
                place: CgroupPlace::Ancestor,
                version: 2,
                current: Some(u64::MAX - 1),
                maximum: Some(u64::MAX - 1),
                refusals: Some(u64::MAX - 1),
            };
            let memory = KernelMemory {
                directory,
                version: 1,
                usage: Some(u64::MAX - 1),
                limit: Some(u64::MAX - 1),
                swap: true,
                failures: Some(u64::MAX - 1),
                unread: None,
            };
            let others_of_pids = [
                CauseKind::UserProcesses,
                CauseKind::ThreadsMax,
                CauseKind::SiblingExec,
                CauseKind::PidNumbers,
            ];
            let others_of_memory = [
                CauseKind::DyingPidNamespace,
                CauseKind::AddressSpace,
                CauseKind::MapCount,
                CauseKind::Overcommit,
            ];
            for verdict in [
                Verdict::inferred(pids, others_of_pids.into_iter().collect()),
                Verdict::inferred(memory, others_of_memory.into_iter().collect()),
            ] {
                let refusal = longest(verdict);
                let line = format!("{refusal} name={:?}{CUT}", "\u{7f}".repeat(NAME));
                lengths.push(format!("{line}\n{}", refusal.report()).len());
            }
            println!("{lengths:?}");
            assert!(lengths.iter().all(|length| *length <= TEXT - CUT.len()));
        }
    }

    /// A thread's name can be as long as it likes.
    #[test]
    fn a_long_name_does_not_push_the_report_out() {
        let name = format!("{}€{}", "n".repeat(NAME - 1), "n".repeat(100_000));
        let everything = CauseKind::ALL.into_iter().collect();
        let verdict = Verdict::inferred(KernelMemory::NO_CGROUP, everything);
        record(&longest(verdict), Some(&name));
        let ring = FAILURES.lock();
        let newest = ring
            .entries
            .iter()
            .max_by_key(|entry| entry.number.load(Ordering::Relaxed));
        let entry = newest.expect("the one recorded");
        let text = entry.text.to_str().expect("characters, none cut");
        assert!(
            text.contains(&format!(" name={:?}...\n", "n".repeat(NAME - 1))),
            "{text}"
        );
        assert!(text.ends_with("(found out in 123.5ms)"), "{text}");
    }
}
