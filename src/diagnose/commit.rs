//! Limits in bytes against what is in use, and of these the commit limit.

use super::cause::{Fill, Overcommit};
use super::rule::Standing;
use crate::proc::machine::{self, MemInfo};
use crate::proc::parse::UNLIMITED;
use crate::proc::status::{CAP_SYS_ADMIN, Status};
use crate::proc::task;

/// A limit in bytes against what is in use and requested.
pub(super) fn stands(fill: &Fill) -> Standing {
    // The kernel compares whole pages.
    const PAGE: u64 = 4096;
    let wanted = fill
        .in_use
        .and_then(|in_use| in_use.checked_add(fill.requested));
    match (wanted, fill.limit) {
        (_, Some(UNLIMITED)) => Standing::Excluded,
        (Some(wanted), Some(limit)) if wanted.div_ceil(PAGE) > limit / PAGE => Standing::Shown,
        // Another thread may have had the difference at that moment.
        (Some(_), Some(_)) => Standing::Remote,
        _ => Standing::Open,
    }
}

pub(super) fn commit(requested: u64, status: &Status) -> Overcommit {
    let calls = status.calls();
    let mode = machine::overcommit_memory(calls);
    let info = MemInfo::read(calls);
    let (in_use, limit) = match mode {
        Some(2) => (info.committed, info.commit_limit),
        Some(_) => {
            let swap = info.swap.unwrap_or(0);
            let total = info.total.and_then(|total| total.checked_add(swap));
            (Some(0), total)
        }
        // Which of the two are compared is not known.
        None => (None, None),
    };
    Overcommit {
        mode,
        requested,
        in_use,
        limit,
        reserved: match mode {
            Some(2) => reserved(status),
            _ => Some(0),
        },
    }
}

/// What mode 2 keeps back from this process: for root, and for a user who must end a process.
fn reserved(status: &Status) -> Option<u64> {
    let (for_root, for_each) = machine::reserves(status.calls())?;
    let has_power =
        status.has(CAP_SYS_ADMIN) && task::in_initial_user_namespace(status.calls()) == Some(true);
    let for_root = match has_power {
        true => 0,
        false => for_root,
    };
    Some(for_root + for_each.min(status.mapped? / 32))
}

pub(super) fn commit_stands(commit: &Overcommit) -> Standing {
    match commit.mode {
        Some(1) => Standing::Excluded,
        mode => {
            let kept = commit.limit.zip(commit.reserved);
            let fill = Fill {
                requested: commit.requested,
                in_use: commit.in_use,
                limit: kept.map(|(limit, kept)| limit.saturating_sub(kept)),
            };
            match (mode, stands(&fill)) {
                // The machine's memory and swap do not change.
                (Some(0), Standing::Remote) => Standing::Excluded,
                (_, standing) => standing,
            }
        }
    }
}

/// The commit limit against a copy of this process's memory. Of what is private and writable, what was mapped with
/// MAP_NORESERVE may not count, and in mode 0 each mapping is compared alone.
pub(super) fn copy_stands(status: &Status) -> Standing {
    let commit = copy_commit(status);
    match commit.mode {
        Some(2) => commit_stands(&commit).min(Standing::Signed),
        _ => commit_stands(&commit).min(Standing::Open),
    }
}

pub(super) fn copy_commit(status: &Status) -> Overcommit {
    commit(status.data.unwrap_or(0), status)
}
