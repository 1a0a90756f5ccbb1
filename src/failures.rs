//! The last refusals of the process, in memory that outlives it: a core file holds them.
//!
//! Each entry carries its report as text, formatted when it was recorded, so that a debugger needs
//! neither this crate's source nor its debug information. `nptl-failures` in gdb prints them.

use crate::error::{Refusal, Reserve, SpawnError};
use crate::stack::Lock;
use crate::sync::notice_fork;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering, fence};

/// Entries that are kept.
const KEPT: usize = 16;

/// Bytes of text an entry holds: the longest report, with a name and the path of a cgroup as long as they are
/// kept. A longer one would be cut, and say so.
const TEXT: usize = 2944;

/// Bytes of a thread's name that an entry holds: a name of any length must not push the report out.
const NAME: usize = 64;

/// Where something was cut.
const CUT: &str = "...";

/// One refusal. The layout is read by `gdb/nptl.py`.
#[repr(C)]
struct Failure {
    /// Number of the refusal, from 1; 0: the entry is empty, or being written.
    number: AtomicU64,
    /// Seconds since 1970 (CLOCK_REALTIME).
    seconds: i64,
    nanoseconds: i64,
    /// The thread that was refused another.
    tid: i32,
    length: u32,
    /// One line, then the report.
    text: [u8; TEXT],
    refusal: Option<Refusal>,
}

impl Failure {
    const fn empty() -> Failure {
        Failure {
            number: AtomicU64::new(0),
            seconds: 0,
            nanoseconds: 0,
            tid: 0,
            length: 0,
            text: [0; TEXT],
            refusal: None,
        }
    }
}

pub(crate) struct Ring {
    /// Refusals so far.
    count: u64,
    entries: [Failure; KEPT],
}

/// A forked child resets the lock: an entry that another thread was writing has the number 0.
pub(crate) static FAILURES: Lock<Ring> = Lock::new(Ring {
    count: 0,
    entries: [const { Failure::empty() }; KEPT],
});

/// Where gdb finds the entries: their address, number and size.
#[repr(C)]
pub(crate) struct Directory {
    pub entries: usize,
    pub count: usize,
    pub size: usize,
}

/// Records a refusal, without allocating.
pub(crate) fn record(refusal: &Refusal, name: Option<&str>) {
    // Before the lock: a thread that a filter kills for a call must not hold it.
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME);
    let tid = nix::unistd::gettid().as_raw();
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
    entry.length = 0;
    let mut text = Text::new(&mut entry.text);
    let _ = write!(text, "{refusal}");
    if let Some(name) = name {
        let (kept, cut) = match name.split_at_checked(name.floor_char_boundary(NAME)) {
            Some((kept, "")) => (kept, ""),
            Some((kept, _)) => (kept, CUT),
            None => (name, ""),
        };
        let _ = write!(text, " name={kept:?}{cut}");
    }
    let _ = write!(text, "\n{}", refusal.report());
    entry.length = text.length as u32;
    entry.refusal = Some(*refusal);
    entry.number.store(number, Ordering::Release);
    crate::debug::publish_failures(&Directory {
        entries: ring.entries.as_ptr().addr(),
        count: KEPT,
        size: size_of::<Failure>(),
    });
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
    let ring = FAILURES.lock();
    let number = |entry: &&Failure| entry.number.load(Ordering::Acquire);
    let last = ring.entries.iter().max_by_key(number)?;
    let refusal = last.refusal.filter(|_| number(&last) > 0)?;
    drop(ring);
    Some(Reserve::new().refuse(refusal))
}

/// Writes into an entry, and cuts what does not fit between two characters.
struct Text<'a> {
    bytes: &'a mut [u8],
    length: usize,
    cut: bool,
}

impl Text<'_> {
    fn new(bytes: &mut [u8]) -> Text<'_> {
        Text {
            bytes,
            length: 0,
            cut: false,
        }
    }

    fn push(&mut self, text: &str) {
        let end = self.length + text.len();
        if let Some(to) = self.bytes.get_mut(self.length..end) {
            to.copy_from_slice(text.as_bytes());
            self.length = end;
        }
    }
}

impl Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        if self.cut {
            return Ok(());
        }
        // The mark always fits.
        let free = (self.bytes.len() - CUT.len()).saturating_sub(self.length);
        let kept = text.floor_char_boundary(free);
        self.push(text.get(..kept).unwrap_or_default());
        if kept < text.len() {
            self.push(CUT);
            self.cut = true;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnose::{CauseKind, CgroupPlace};
    use crate::{Cause, InlinePath, Step};

    fn written(size: usize, parts: &[&str]) -> String {
        let mut bytes = vec![0; size];
        let mut text = Text::new(&mut bytes);
        for part in parts {
            text.write_str(part).expect("never fails");
        }
        let length = text.length;
        String::from_utf8(bytes[..length].to_vec()).expect("whole characters")
    }

    #[test]
    fn what_does_not_fit_is_cut_between_characters_and_marked() {
        assert_eq!(written(10, &["four", "ly"]), "fourly");
        assert_eq!(written(10, &["seven b", ""]), "seven b");
        // The mark's place is kept free.
        assert_eq!(written(10, &["eight by"]), "eight b...");
        assert_eq!(written(10, &["eight b", "y", "more"]), "eight b...");
        // Three bytes each.
        assert_eq!(written(10, &["€€€"]), "€€...");
        assert_eq!(written(11, &["€€€"]), "€€...");
        assert_eq!(written(12, &["€€€"]), "€€€");
        assert_eq!(written(3, &["a"]), "...");
    }

    fn longest() -> Refusal {
        let mut refusal = Refusal {
            step: Step::PrepareStack,
            errno: nix::errno::Errno::EAGAIN,
            stack_size: usize::MAX,
            bytes: usize::MAX,
            stack: crate::StackOutcome {
                origin: crate::StackOrigin::Cache,
                fate: crate::StackFate::Cached,
            },
            attempts: u32::MAX,
            reclaimed: usize::MAX,
            calibration: true,
            verdict: crate::diagnose::Verdict::NONE,
        };
        refusal.verdict.alternatives = CauseKind::ALL.into_iter().collect();
        refusal.verdict.certainty = crate::Certainty::Inferred;
        refusal.verdict.silence = Some(
            "a filter or a tracer answers clone3 for the kernel, which cannot be asked what refused",
        );
        refusal.verdict.transient = true;
        refusal.verdict.spent = std::time::Duration::from_micros(123_456);
        refusal
    }

    /// The longest of each kind of thing that is kept: no report of a cause is cut.
    #[test]
    fn the_longest_report_fits() {
        // Quoted, so that the command with it is the longest; cut where a path is.
        for path in [
            format!("/sys/fs/cgroup/{}", " ".repeat(InlinePath::CAPACITY - 15)),
            format!("/sys/fs/cgroup/{}", "x".repeat(4096)),
        ] {
            let directory = InlinePath::new(path.as_bytes());
            let mut lengths = Vec::new();
            for (cause, alternatives) in [
                (
                    Cause::PidsCgroup {
                        directory,
                        place: CgroupPlace::Ancestor,
                        version: 2,
                        current: Some(u64::MAX - 1),
                        maximum: Some(u64::MAX - 1),
                        refusals: Some(u64::MAX - 1),
                    },
                    vec![
                        CauseKind::UserProcesses,
                        CauseKind::ThreadsMax,
                        CauseKind::SiblingExec,
                        CauseKind::PidNumbers,
                    ],
                ),
                (
                    Cause::KernelMemory {
                        directory,
                        version: 1,
                        usage: Some(u64::MAX - 1),
                        limit: Some(u64::MAX - 1),
                        failures: Some(u64::MAX - 1),
                        unread: None,
                    },
                    vec![
                        CauseKind::DyingPidNamespace,
                        CauseKind::AddressSpace,
                        CauseKind::MapCount,
                        CauseKind::Overcommit,
                    ],
                ),
            ] {
                let mut refusal = longest();
                refusal.verdict.cause = cause;
                refusal.verdict.alternatives = alternatives.into_iter().collect();
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
        record(&longest(), Some(&name));
        let ring = FAILURES.lock();
        let newest = ring
            .entries
            .iter()
            .max_by_key(|entry| entry.number.load(Ordering::Relaxed));
        let entry = newest.expect("the one recorded");
        let text = std::str::from_utf8(&entry.text[..entry.length as usize]).expect("characters");
        assert!(
            text.contains(&format!(" name={:?}...\n", "n".repeat(NAME - 1))),
            "{text}"
        );
        assert!(text.ends_with("(found out in 123.5ms)"), "{text}");
    }
}
