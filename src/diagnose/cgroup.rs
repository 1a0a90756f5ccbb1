//! The cgroups above the calling thread: which one refused a task, or had no memory for it.

use std::ffi::CStr;
use std::ops::ControlFlow;

use nix::errno::Errno;

use super::cause::{CgroupPlace, InlinePath};
use super::limits::{self, Text, UNLIMITED};

/// More levels than this are not walked; what lies above counts as hidden.
const DEEPEST: usize = 16;

/// Long enough for a mount point and what Kubernetes and systemd nest below it; longer ones are not read.
type Path = Text<768>;

/// A thread's cgroup in the hierarchy of one controller, as far as it is visible.
pub(crate) struct Hierarchy {
    /// Mount point and cgroup, in one path.
    path: Path,
    /// Where the cgroups begin: the length of the mount point.
    mount: usize,
    pub(crate) version: u8,
    /// v2 mounted with pids_localevents: its counters of refused tasks are those of v1, by whichever name.
    forking: bool,
}

/// The files of one controller in one version of cgroups.
#[derive(Clone, Copy)]
pub(crate) struct Files {
    maximum: &'static [u8],
    current: &'static [u8],
    /// Counts failures at the cgroup whose limit was hit, unless the mount says otherwise.
    local: Option<&'static [u8]>,
    /// Counts failures; where, depends on version and kernel.
    events: &'static [u8],
    /// The key in front of the count, none for a bare number.
    key: &'static [u8],
}

pub(crate) const PIDS: Files = Files {
    maximum: b"/pids.max",
    current: b"/pids.current",
    local: Some(b"/pids.events.local"),
    events: b"/pids.events",
    key: b"max",
};

pub(crate) const MEMORY_V1: Files = Files {
    maximum: b"/memory.limit_in_bytes",
    current: b"/memory.usage_in_bytes",
    local: None,
    events: b"/memory.failcnt",
    key: b"",
};

pub(crate) const MEMORY_V2: Files = Files {
    maximum: b"/memory.max",
    current: b"/memory.current",
    local: Some(b"/memory.events.local"),
    events: b"/memory.events",
    key: b"max",
};

/// One cgroup at one moment.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Level {
    /// Length of its path.
    length: usize,
    pub(crate) maximum: Option<u64>,
    pub(crate) current: Option<u64>,
    pub(crate) failures: Option<u64>,
    /// Whether `failures` counts this cgroup's own limit only.
    pub(crate) local: bool,
}

impl Level {
    pub(crate) fn is_full(&self) -> bool {
        matches!((self.current, self.maximum), (Some(current), Some(maximum)) if current >= maximum)
    }

    /// For memory: a new task asks for some 30 KiB, and the kernel tries 256 KiB at a time first.
    pub(crate) fn is_nearly_full(&self) -> bool {
        const ASKED_FOR: u64 = 1 << 20;
        let used = self.current.map(|bytes| bytes.saturating_add(ASKED_FOR));
        matches!((used, self.maximum), (Some(used), Some(maximum)) if used >= maximum)
    }

    /// Room for more tasks than could have ended between a refusal and the reading.
    fn has_plenty(&self) -> bool {
        let maximum = self.maximum.unwrap_or(UNLIMITED);
        self.current.unwrap_or(0).saturating_add(64) < maximum
    }

    fn is_limited(&self) -> bool {
        self.maximum.is_some_and(|maximum| maximum != UNLIMITED)
    }
}

/// The visible levels, the thread's own first.
pub(crate) struct Snapshot {
    levels: [Level; DEEPEST],
    count: usize,
    /// Whether there are levels above the last one.
    pub(crate) hidden: bool,
    /// Whether a file could not be read that may exist: nothing can be excluded then.
    pub(crate) unread: bool,
}

impl Snapshot {
    /// The cgroup that the kernel charges first. In v2 a cgroup need not have the controller, and is then a part
    /// of the nearest one above that has; a part of a domain (threaded mode) hardly ever has it.
    fn charged_first(&self) -> usize {
        let with_controller = |level: &Level| level.maximum.is_some();
        self.levels().iter().position(with_controller).unwrap_or(0)
    }

    pub(crate) fn levels(&self) -> &[Level] {
        self.levels.get(..self.count).unwrap_or_default()
    }
}

impl Hierarchy {
    /// The calling thread's cgroup for a controller (`pids`, `memory`, `cpuset`).
    pub(crate) fn of_thread(controller: &[u8]) -> Option<Hierarchy> {
        Hierarchy::locate(c"/proc/thread-self/cgroup", controller)
    }

    pub(crate) fn locate(membership: &CStr, controller: &[u8]) -> Option<Hierarchy> {
        let mut cgroup = Path::new();
        let mut version = 0;
        let listed =
            |list: &[u8], what: &[u8]| list.split(|byte| *byte == b',').any(|one| one == what);
        let named = |list: &[u8]| listed(list, controller);
        limits::lines(membership, |line| {
            // hierarchy:controllers:path, and the path may hold colons.
            let mut fields = line.splitn(3, |byte| *byte == b':');
            let (number, list, path) = (fields.next(), fields.next(), fields.next());
            let (Some(number), Some(list), Some(path)) = (number, list, path) else {
                return ControlFlow::Continue(());
            };
            let v1 = named(list);
            // A controller is in one hierarchy only; the v2 line counts unless a v1 line has it.
            if v1 || number == b"0" && version == 0 {
                version = if v1 { 1 } else { 2 };
                cgroup.truncate(0);
                cgroup.push(path);
            }
            if v1 {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
        .ok()?;
        // "/.." starts the path of a cgroup outside the cgroup namespace.
        if version == 0 || cgroup.is_truncated() || cgroup.bytes().starts_with(b"/..") {
            return None;
        }
        let mut found: Option<Hierarchy> = None;
        limits::lines(c"/proc/thread-self/mountinfo", |line| {
            let mut words = line.split(|byte| *byte == b' ');
            let (Some(root), Some(point)) = (words.nth(3), words.next()) else {
                return ControlFlow::Continue(());
            };
            let mut rest = words.skip_while(|word| *word != b"-").skip(1);
            let (Some(kind), Some(options)) = (rest.next(), rest.nth(1)) else {
                return ControlFlow::Continue(());
            };
            let matches = match version {
                1 => kind == b"cgroup" && named(options),
                _ => kind == b"cgroup2",
            };
            let Some(below) = below(cgroup.bytes(), root).filter(|_| matches) else {
                return ControlFlow::Continue(());
            };
            let mut path = Path::new();
            unescape(point, &mut path);
            let mount = path.bytes().len();
            path.push(below);
            if !path.is_truncated() {
                found = Some(Hierarchy {
                    path,
                    mount,
                    version,
                    forking: controller == b"pids" && listed(options, b"pids_localevents"),
                });
            }
            // A mount of the whole hierarchy shows more ancestors than a mount of a part.
            if root == b"/" {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
        .ok()?;
        found
    }

    /// What can have refused: levels without a limit are shown without their use, except the one charged first.
    pub(crate) fn snapshot(&self, files: &Files) -> Snapshot {
        self.read(files, false)
    }

    /// Every level with its use.
    pub(crate) fn full_snapshot(&self, files: &Files) -> Snapshot {
        self.read(files, true)
    }

    fn read(&self, files: &Files, full: bool) -> Snapshot {
        let mut snapshot = Snapshot {
            levels: [Level::default(); DEEPEST],
            count: 0,
            hidden: false,
            unread: false,
        };
        let files = &Files {
            local: files.local.filter(|_| !self.forking),
            ..*files
        };
        let mut path = self.path;
        let mut length = path.bytes().len();
        let mut above = true;
        let mut below = true;
        for slot in &mut snapshot.levels {
            path.truncate(length);
            // Up to the thread's own, or the one that stands for it.
            let whole = full || below;
            *slot = read_level(&mut path, length, files, whole, &mut snapshot.unread);
            below &= slot.maximum.is_none();
            snapshot.count += 1;
            if length <= self.mount {
                above = false;
                break;
            }
            let parent = path
                .bytes()
                .get(..length)
                .and_then(|bytes| bytes.iter().rposition(|byte| *byte == b'/'));
            length = parent.unwrap_or(self.mount).max(self.mount);
        }
        path.truncate(self.mount);
        snapshot.hidden = above || self.has_ancestors(&mut path, files, &mut snapshot.unread);
        snapshot
    }

    /// Whether the top of the mount is not the root of the hierarchy. Only a root lacks certain files: in v1
    /// the limits themselves, in v2 also `cgroup.events`.
    fn has_ancestors(&self, top: &mut Path, files: &Files, unread: &mut bool) -> bool {
        match self.version {
            1 if files.maximum == PIDS.maximum => exists(top, files.maximum, unread),
            1 => !exists(top, b"/release_agent", unread),
            _ => exists(top, b"/cgroup.events", unread),
        }
    }

    /// The directory of the thread's own cgroup.
    pub(crate) fn own_directory(&self) -> InlinePath {
        InlinePath::from(&self.path)
    }

    pub(crate) fn directory(&self, level: &Level) -> InlinePath {
        let bytes = self.path.bytes();
        InlinePath::new(bytes.get(..level.length).unwrap_or(bytes))
    }
}

/// The part of `cgroup` below the root of a mount, if it lies below.
fn below<'a>(cgroup: &'a [u8], root: &[u8]) -> Option<&'a [u8]> {
    let rest = if root == b"/" {
        cgroup
    } else {
        cgroup.strip_prefix(root)?
    };
    match rest {
        b"/" => Some(b""),
        [] | [b'/', ..] => Some(rest),
        _ => None,
    }
}

/// Undoes the octal escapes of mountinfo.
fn unescape(text: &[u8], into: &mut Path) {
    let mut rest = text;
    while let Some((first, tail)) = rest.split_first() {
        let digit = |byte: &u8| byte.wrapping_sub(b'0');
        match tail {
            [a, b, c, after @ ..] if *first == b'\\' => {
                let byte = digit(a).wrapping_mul(64) | digit(b).wrapping_mul(8) | digit(c);
                into.push(&[byte]);
                rest = after;
            }
            _ => {
                into.push(&[*first]);
                rest = tail;
            }
        }
    }
}

fn with_file<T>(path: &mut Path, file: &[u8], read: impl FnOnce(&CStr) -> Option<T>) -> Option<T> {
    let length = path.bytes().len();
    path.push(file);
    let result = path.as_c_str().and_then(read);
    path.truncate(length);
    result
}

fn exists(path: &mut Path, file: &[u8], unread: &mut bool) -> bool {
    let found = with_file(path, file, |path| {
        Some(match limits::open_file(path) {
            Ok(_) => true,
            Err(Errno::ENOENT) => false,
            Err(_) => {
                *unread = true;
                false
            }
        })
    });
    found.unwrap_or(false)
}

/// `whole`: read everything. Otherwise a level above without a limit refuses nothing, and its other files are left alone.
fn read_level(
    path: &mut Path,
    length: usize,
    files: &Files,
    whole: bool,
    unread: &mut bool,
) -> Level {
    let mut level = Level {
        length,
        ..Level::default()
    };
    let maximum = with_file(path, files.maximum, |path| Some(limits::read_number(path)));
    match maximum {
        // Without a limit file there is no controller here: a root, or v2 without the controller enabled.
        Some(Err(Errno::ENOENT)) => return level,
        // v1 writes "unlimited" as the largest number of whole pages.
        Some(Ok(bytes)) if bytes >= i64::MAX as u64 - 65535 => level.maximum = Some(UNLIMITED),
        Some(Ok(maximum)) => level.maximum = Some(maximum),
        _ => *unread = true,
    }
    if level.maximum == Some(UNLIMITED) && !whole {
        return level;
    }
    level.current = with_file(path, files.current, limits::number_in);
    let count = |path: &CStr| match files.key {
        b"" => limits::number_in(path),
        key => limits::value_in(path, key),
    };
    if let Some(local) = files.local {
        level.failures = with_file(path, local, count);
        level.local = level.failures.is_some();
    }
    if !level.local {
        level.failures = with_file(path, files.events, count);
    }
    *unread |= level.current.is_none();
    level
}

/// What two snapshots around a refusal tell of a cgroup.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Judgement {
    /// A counter rose, and this is the cgroup.
    Counted {
        level: Option<Level>,
        place: CgroupPlace,
        rise: u64,
    },
    /// No counter could be compared, but this cgroup is full.
    Circumstantial { level: Level, place: CgroupPlace },
    /// An invisible or unreadable cgroup may have refused.
    Open,
    /// No cgroup can have refused.
    Excluded,
}

/// Which cgroup refused between two snapshots.
///
/// The kernel charges from the thread's own cgroup upwards and stops at the first full one, so of several
/// full ones the lowest refused.
pub(crate) fn judge(before: Option<&Snapshot>, after: &Snapshot) -> Judgement {
    let levels = after.levels();
    let own = after.charged_first();
    let place = |position: usize| {
        if position == 0 {
            CgroupPlace::Own
        } else {
            CgroupPlace::Ancestor
        }
    };
    let local = levels.iter().any(|level| level.local);
    let lowest_full_of = |levels: &[Level]| {
        levels
            .iter()
            .position(Level::is_full)
            .and_then(|position| Some((position, *levels.get(position)?)))
    };
    let lowest_full = lowest_full_of(levels);
    let Some(before) = before else {
        // A counter that never rose excludes its cgroup, or in the older way of counting every cgroup.
        let never = |position: usize| {
            let counter = match levels.get(own) {
                Some(own) if !own.local => Some(own),
                _ => levels.get(position),
            };
            counter.is_some_and(|level| level.failures == Some(0))
        };
        return match lowest_full {
            Some((position, level)) if !never(position) => Judgement::Circumstantial {
                level,
                place: place(position),
            },
            _ if after.unread => Judgement::Open,
            _ if after.hidden && (local || !never(own)) => Judgement::Open,
            _ => Judgement::Excluded,
        };
    };
    let rise = |position: usize| {
        let old = before.levels().get(position)?.failures?;
        levels.get(position)?.failures?.checked_sub(old)
    };
    if local {
        // The kernel counts at the cgroup whose limit was hit. Others' refusals may have counted elsewhere.
        let mut risen = levels.iter().enumerate().filter_map(|(position, level)| {
            let rise = rise(position).filter(|rise| *rise > 0)?;
            Some((position, *level, rise))
        });
        return match risen.next() {
            Some((position, level, first)) => match risen.map(|(_, _, rise)| rise).sum() {
                0 => Judgement::Counted {
                    level: Some(level),
                    place: place(position),
                    rise: first,
                },
                // Somebody else was refused at one of them.
                others => Judgement::Counted {
                    level: None,
                    place: CgroupPlace::Unclear,
                    rise: first.saturating_add(others),
                },
            },
            None if after.hidden || after.unread || before.unread => Judgement::Open,
            None => Judgement::Excluded,
        };
    }
    // The kernel counts in the thread's own cgroup, whichever level was full.
    match (rise(own), lowest_full) {
        (Some(0), _) => Judgement::Excluded,
        (Some(rise), Some((position, level)))
            if lowest_full_of(before.levels()).is_some_and(|(before, _)| before == position) =>
        {
            Judgement::Counted {
                level: Some(level),
                place: place(position),
                rise,
            }
        }
        (Some(rise), _) => {
            // Full at the refusal, but not at a reading; or another one was, and has filled or emptied since.
            let mut limited = levels
                .iter()
                .enumerate()
                .filter(|(_, level)| level.is_limited());
            match (limited.next(), limited.next(), after.hidden) {
                (Some((position, level)), None, false) => Judgement::Counted {
                    level: Some(*level),
                    place: place(position),
                    rise,
                },
                (None, _, true) => Judgement::Counted {
                    level: None,
                    place: CgroupPlace::Hidden,
                    rise,
                },
                (_, _, hidden) => Judgement::Counted {
                    level: None,
                    // Plenty of room in every visible cgroup leaves the invisible ones; little may have come since.
                    place: if hidden && levels.iter().all(Level::has_plenty) {
                        CgroupPlace::Hidden
                    } else {
                        CgroupPlace::Unclear
                    },
                    rise,
                },
            }
        }
        // No counter of our own: there is no controller in sight, or it is unreadable.
        (None, Some((position, level))) => Judgement::Circumstantial {
            level,
            place: place(position),
        },
        (None, None) if after.hidden || after.unread || before.unread => Judgement::Open,
        (None, None) => Judgement::Excluded,
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
            ..Level::default()
        };
        let mut snapshot = Snapshot {
            levels: [Level::default(); DEEPEST],
            count: of.len(),
            hidden: false,
            unread: false,
        };
        for (place, values) in snapshot.levels.iter_mut().zip(of) {
            *place = level(values);
        }
        snapshot
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

    /// Where each cgroup counts its own refusals, the one whose counter rose did it. Where two rose, somebody else
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
