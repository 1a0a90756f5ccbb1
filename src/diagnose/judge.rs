//! Which cgroup refused, from what its files said before and after.

use super::cause::CgroupPlace;
use crate::proc::cgroup::{Level, Snapshot};

/// Tasks that can come or go between two readings.
pub(super) const MARGIN: u64 = 64;

/// What two snapshots around a refusal show of a cgroup.
#[derive(Clone, Copy, Debug)]
pub(super) enum Judgement {
    /// A counter rose: of this cgroup, or of one that is not known.
    Counted {
        level: Option<Level>,
        place: CgroupPlace,
        rise: u64,
    },
    /// Full before and after, and no counter could be compared.
    Full { level: Level, place: CgroupPlace },
    /// Full, but read only once, or without having counted the refusal.
    Suspected { level: Level, place: CgroupPlace },
    /// An invisible or unreadable cgroup may have refused.
    Open,
    /// No cgroup can have refused.
    Excluded,
}

/// Which cgroup refused between two snapshots.
///
/// The kernel charges from the thread's own cgroup upwards and stops at the first full one, so of several
/// full ones the lowest refused. A limit can change between the refusal and a reading: only one that is full in both
/// snapshots, under the same maximum, is named, or full in one and the only one that has a limit.
pub(super) fn judge(before: Option<&Snapshot>, after: &Snapshot) -> Judgement {
    let Some(before) = before else {
        return by_one_reading(after);
    };
    let full = full_in_both(before, after);
    match is_local(after) {
        true => by_own_counters(before, after, full),
        false => by_common_counter(before, after, full),
    }
}

fn is_local(snapshot: &Snapshot) -> bool {
    snapshot.levels().iter().any(|level| level.local)
}

fn place(position: usize) -> CgroupPlace {
    match position {
        0 => CgroupPlace::Own,
        _ => CgroupPlace::Ancestor,
    }
}

fn lowest_full(snapshot: &Snapshot) -> Option<(usize, Level)> {
    let mut levels = snapshot.levels().iter().enumerate();
    let (position, level) = levels.find(|(_, level)| level.is_full())?;
    Some((position, *level))
}

fn full_in_both(before: &Snapshot, after: &Snapshot) -> Option<(usize, Level)> {
    let (position, level) = lowest_full(after)?;
    let (earlier, _) = lowest_full(before)?;
    (earlier == position && is_unchanged(before, after)).then_some((position, level))
}

fn is_unchanged(before: &Snapshot, after: &Snapshot) -> bool {
    let mut both = before.levels().iter().zip(after.levels());
    both.all(|(before, after)| before.maximum == after.maximum)
}

/// The only one with a limit, which was full at one of the readings.
fn only_limited(before: &Snapshot, after: &Snapshot) -> Option<(usize, Level)> {
    let full = lowest_full(after).or(lowest_full(before))?;
    let limited = after.levels().iter().filter(|level| level.is_limited());
    let alone = limited.count() == 1 && !after.hidden && is_unchanged(before, after);
    alone.then_some(full)
}

/// How far the counter at a level rose.
fn rise(before: &Snapshot, after: &Snapshot, position: usize) -> Option<u64> {
    let old = before.levels().get(position)?.failures?;
    after.levels().get(position)?.failures?.checked_sub(old)
}

fn by_one_reading(after: &Snapshot) -> Judgement {
    let levels = after.levels();
    let own = after.charged_first();
    // A counter that never rose excludes its cgroup, or in the older way of counting every cgroup.
    let never = |position: usize| {
        let counter = match levels.get(own) {
            Some(own) if !own.local => Some(own),
            _ => levels.get(position),
        };
        counter.is_some_and(|level| level.failures == Some(0))
    };
    match lowest_full(after) {
        Some((position, level)) if !never(position) => Judgement::Suspected {
            level,
            place: place(position),
        },
        _ if after.unread => Judgement::Open,
        _ if after.hidden && (is_local(after) || !never(own)) => Judgement::Open,
        _ => Judgement::Excluded,
    }
}

/// No counter that could have counted the refusal has risen.
fn uncounted(before: &Snapshot, after: &Snapshot, full: Option<(usize, Level)>) -> Judgement {
    match full {
        Some((position, level)) => Judgement::Suspected {
            level,
            place: place(position),
        },
        None if after.hidden || after.unread || before.unread => Judgement::Open,
        None => Judgement::Excluded,
    }
}

/// The kernel counts at the cgroup whose limit was hit. Refusals of other tasks may have been counted elsewhere.
fn by_own_counters(before: &Snapshot, after: &Snapshot, full: Option<(usize, Level)>) -> Judgement {
    let levels = after.levels().iter().enumerate();
    let mut risen = levels.filter_map(|(position, level)| {
        let rise = rise(before, after, position).filter(|rise| *rise > 0)?;
        Some((position, *level, rise))
    });
    match risen.next() {
        Some((position, level, first)) => match risen.map(|(_, _, rise)| rise).sum() {
            0 => Judgement::Counted {
                level: Some(level),
                place: place(position),
                rise: first,
            },
            // Another task was refused at one of them.
            others => Judgement::Counted {
                level: None,
                place: CgroupPlace::Unclear,
                rise: first.saturating_add(others),
            },
        },
        None => uncounted(before, after, full),
    }
}

/// The kernel counts in the thread's own cgroup, whichever level was full.
fn by_common_counter(
    before: &Snapshot,
    after: &Snapshot,
    full: Option<(usize, Level)>,
) -> Judgement {
    let counted = rise(before, after, after.charged_first());
    let known = match counted {
        Some(1..) => full.or_else(|| only_limited(before, after)),
        _ => full,
    };
    match (counted, known) {
        // What was not read may be the counter that rose.
        (Some(0), None) if !before.unread && !after.unread => Judgement::Excluded,
        (Some(0), _) => uncounted(before, after, full),
        (Some(rise), Some((position, level))) => Judgement::Counted {
            level: Some(level),
            place: place(position),
            rise,
        },
        (Some(rise), None) => Judgement::Counted {
            level: None,
            place: out_of_sight(after),
            rise,
        },
        // No counter of our own: there is no controller in sight, or it is unreadable.
        (None, Some((position, level))) => Judgement::Full {
            level,
            place: place(position),
        },
        (None, None) => uncounted(before, after, full),
    }
}

/// Where the cgroup is that no reading shows full.
fn out_of_sight(after: &Snapshot) -> CgroupPlace {
    let has_plenty = |level: &Level| {
        let maximum = level.maximum.unwrap_or(u64::MAX);
        level.current.unwrap_or(0).saturating_add(MARGIN) < maximum
    };
    // Plenty of room in every visible cgroup leaves the invisible ones; little may have come since.
    match after.hidden && after.levels().iter().all(has_plenty) {
        true => CgroupPlace::Hidden,
        false => CgroupPlace::Unclear,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of v2 from Linux 6.11 on, own cgroup first: tasks and refusals, of at most 10 tasks each.
    fn snapshot(of: [(u64, u64); 2]) -> Snapshot {
        let level = |(current, failures)| Level {
            maximum: Some(10),
            current: Some(current),
            failures: Some(failures),
            local: true,
            ..Level::NONE
        };
        Snapshot::of(&of.map(level), false)
    }

    fn judged(before: [(u64, u64); 2], after: [(u64, u64); 2]) -> (Option<CgroupPlace>, u64) {
        match judge(Some(&snapshot(before)), &snapshot(after)) {
            Judgement::Counted { level, place, rise } => {
                assert_eq!(level.is_none(), place == CgroupPlace::Unclear);
                (Some(place), rise)
            }
            _ => (None, 0),
        }
    }

    /// Where each cgroup counts its own refusals, the one whose counter rose did it. Where two rose, another task
    /// was refused at one of them, and which is not known.
    #[test]
    fn of_two_levels_that_refused_none_is_named() {
        let full = [(10, 5), (10, 7)];
        assert_eq!(
            judged(full, [(10, 6), (10, 7)]),
            (Some(CgroupPlace::Own), 1)
        );
        assert_eq!(
            judged(full, [(10, 5), (10, 8)]),
            (Some(CgroupPlace::Ancestor), 1)
        );
        assert_eq!(
            judged(full, [(10, 6), (10, 9)]),
            (Some(CgroupPlace::Unclear), 3)
        );
        assert_eq!(judged(full, full), (None, 0));
    }
}
