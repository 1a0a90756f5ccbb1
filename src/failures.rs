//! The last refusals of the process, in memory that outlives it: a core file holds them.
//!
//! Each entry carries its report as text, formatted when it was recorded, so that a debugger needs
//! neither this crate's source nor its debug information. `nptl-failures` in gdb prints them.

use crate::error::{Refusal, Reserve, SpawnError};
use crate::stack::Lock;
use std::fmt::Write;

/// Entries that are kept.
const KEPT: usize = 16;

/// Bytes of text an entry holds; a longer report is cut.
const TEXT: usize = 1536;

/// One refusal. The layout is read by `gdb/nptl.py`.
#[repr(C)]
struct Failure {
    /// Number of the refusal, from 1; 0: the entry is empty.
    number: u64,
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
    const EMPTY: Failure = Failure {
        number: 0,
        seconds: 0,
        nanoseconds: 0,
        tid: 0,
        length: 0,
        text: [0; TEXT],
        refusal: None,
    };
}

pub(crate) struct Ring {
    /// Refusals so far.
    count: u64,
    entries: [Failure; KEPT],
}

impl Ring {
    /// In a forked child: another thread may have been in the middle of an entry, so none is trusted.
    pub(crate) fn forget(&mut self) {
        self.count = 0;
        for entry in &mut self.entries {
            entry.number = 0;
            entry.refusal = None;
        }
    }
}

/// Held across fork, with the crate's other locks (`stack::cache`).
pub(crate) static FAILURES: Lock<Ring> = Lock::new(Ring {
    count: 0,
    entries: [Failure::EMPTY; KEPT],
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
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME);
    let mut ring = FAILURES.lock();
    ring.count += 1;
    let number = ring.count;
    let Some(entry) = ring.entries.get_mut((number as usize - 1) % KEPT) else {
        return;
    };
    entry.number = number;
    (entry.seconds, entry.nanoseconds) = now.map_or((0, 0), |now| (now.tv_sec(), now.tv_nsec()));
    entry.tid = nix::unistd::gettid().as_raw();
    entry.length = 0;
    let mut text = Text(entry);
    let _ = write!(text, "{refusal}");
    if let Some(name) = name {
        let _ = write!(text, " name={name:?}");
    }
    let _ = write!(text, "\n{}", refusal.report());
    entry.refusal = Some(*refusal);
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
    let ring = FAILURES.lock();
    let last = ring.count.checked_sub(1)?;
    let refusal = ring.entries.get(last as usize % KEPT)?.refusal?;
    drop(ring);
    Some(Reserve::new().refuse(refusal))
}

/// Writes into an entry, and cuts what does not fit.
struct Text<'a>(&'a mut Failure);

impl Write for Text<'_> {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let start = self.0.length as usize;
        let Some(free) = self.0.text.get_mut(start..) else {
            return Ok(());
        };
        let length = text.floor_char_boundary(free.len());
        if let (Some(to), Some(from)) = (free.get_mut(..length), text.as_bytes().get(..length)) {
            to.copy_from_slice(from);
            self.0.length += length as u32;
        }
        Ok(())
    }
}
