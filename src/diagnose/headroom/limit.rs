//! One limit: what it counts, how full it is, and how a thread is counted.

use std::fmt;

use crate::diagnose::cause::CauseKind;
use crate::proc::parse::UNLIMITED;

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
    /// Whether it is counted, or how much, is not known.
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
    ///
    /// ```
    /// for limit in &nptl::headroom() {
    ///     println!("{}: {:?} left", limit.cause, limit.left());
    /// }
    /// ```
    pub fn left(&self) -> Option<u64> {
        match self.maximum? {
            UNLIMITED => Some(UNLIMITED),
            maximum => Some(maximum.saturating_sub(self.in_use?)),
        }
    }

    /// A limit that may be there, of which no number can be read.
    pub(super) fn hidden(cause: CauseKind, unit: Unit, source: impl Into<String>) -> HeadroomLimit {
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
