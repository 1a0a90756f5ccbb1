//! The cgroups above a thread, as far as they are visible, and what their files say.

use super::file;
use super::parse;
use super::place::DEEPEST;
pub(crate) use super::place::Hierarchy;
use crate::errno::Errno;
use crate::mem::text::InlinePath;
use parse::UNLIMITED;

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

/// Of memory and swap together. The counter stands still on kernels of today.
pub(crate) const MEMORY_V1_SWAP: Files = Files {
    maximum: b"/memory.memsw.limit_in_bytes",
    current: b"/memory.memsw.usage_in_bytes",
    local: None,
    events: b"/memory.memsw.failcnt",
    key: b"",
};

pub(crate) const MEMORY_V2: Files = Files {
    maximum: b"/memory.max",
    current: b"/memory.current",
    local: Some(b"/memory.events.local"),
    events: b"/memory.events",
    key: b"max",
};

impl Files {
    pub(crate) fn is_of_swap(&self) -> bool {
        self.maximum == MEMORY_V1_SWAP.maximum
    }
}

/// One cgroup at one moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Level {
    /// Length of its path.
    pub(crate) length: usize,
    pub(crate) maximum: Option<u64>,
    pub(crate) current: Option<u64>,
    pub(crate) failures: Option<u64>,
    /// Whether `failures` counts this cgroup's own limit only.
    pub(crate) local: bool,
}

impl Level {
    pub(crate) const NONE: Level = Level {
        length: 0,
        maximum: None,
        current: None,
        failures: None,
        local: false,
    };

    pub(crate) fn is_full(&self) -> bool {
        matches!((self.current, self.maximum), (Some(current), Some(maximum)) if current >= maximum)
    }

    pub(crate) fn is_limited(&self) -> bool {
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
    pub(crate) const EMPTY: Snapshot = Snapshot {
        levels: [Level::NONE; DEEPEST],
        count: 0,
        hidden: false,
        unread: false,
    };

    /// The cgroup that the kernel charges first. In v2 a cgroup need not have the controller, and is then a part
    /// of the nearest one above that has; a part of a domain (threaded mode) hardly ever has it.
    pub(crate) fn charged_first(&self) -> usize {
        let with_controller = |level: &Level| level.maximum.is_some();
        self.levels().iter().position(with_controller).unwrap_or(0)
    }

    /// How many tasks it has counted as refused.
    pub(crate) fn refusals(&self) -> Option<u64> {
        self.levels().get(self.charged_first())?.failures
    }

    /// A made-up one.
    #[cfg(test)]
    pub(crate) fn of(levels: &[Level], hidden: bool) -> Snapshot {
        let mut snapshot = Snapshot {
            count: levels.len(),
            hidden,
            ..Snapshot::EMPTY
        };
        for (to, from) in snapshot.levels.iter_mut().zip(levels) {
            *to = *from;
        }
        snapshot
    }

    pub(crate) fn levels(&self) -> &[Level] {
        self.levels.get(..self.count).unwrap_or_default()
    }
}

impl Hierarchy {
    /// What can have refused: levels without a limit are shown without their use, except the one charged first.
    pub(crate) fn snapshot(&self, files: &Files) -> Snapshot {
        self.read(files, false)
    }

    /// Every level with its use.
    pub(crate) fn full_snapshot(&self, files: &Files) -> Snapshot {
        self.read(files, true)
    }

    fn read(&self, files: &Files, full: bool) -> Snapshot {
        let mut snapshot = Snapshot::EMPTY;
        self.fill(files, full, &mut snapshot);
        snapshot
    }

    /// Like [`Hierarchy::snapshot`], into `snapshot`: a returned one lies on the stack twice.
    pub(crate) fn snapshot_into(&self, files: &Files, snapshot: &mut Snapshot) {
        self.fill(files, false, snapshot);
    }

    #[inline(never)]
    fn fill(&self, files: &Files, full: bool, snapshot: &mut Snapshot) {
        let files = &Files {
            local: files.local.filter(|_| !self.forking),
            ..*files
        };
        let (count, more) = self.levels();
        let mut below = true;
        for (level, slot) in snapshot.levels.iter_mut().enumerate().take(count) {
            // Up to the thread's own, or the one that stands for it.
            let whole = full || below;
            *slot = self.read_level(level, files, whole, &mut snapshot.unread);
            below &= slot.maximum.is_none();
        }
        snapshot.count = count;
        snapshot.hidden = more || self.has_ancestors(count - 1, files, &mut snapshot.unread);
    }

    /// Whether the top of the mount is not the root of the hierarchy. Only a root lacks certain files: in v1
    /// the limits themselves, in v2 also `cgroup.events`.
    fn has_ancestors(&self, top: usize, files: &Files, unread: &mut bool) -> bool {
        match self.version {
            1 if files.maximum == PIDS.maximum => self.exists(top, files.maximum, unread),
            1 => !self.exists(top, b"/release_agent", unread),
            _ => self.exists(top, b"/cgroup.events", unread),
        }
    }

    fn exists(&self, level: usize, file: &[u8], unread: &mut bool) -> bool {
        match self.open(level, file) {
            Ok(_) => true,
            Err(Errno::ENOENT) => false,
            Err(_) => {
                *unread = true;
                false
            }
        }
    }

    /// `whole`: read everything. Otherwise a level above without a limit refuses nothing, and its other files are left
    /// alone.
    fn read_level(&self, at: usize, files: &Files, whole: bool, unread: &mut bool) -> Level {
        let mut level = Level {
            length: self.length(at),
            ..Level::NONE
        };
        let number = |file| file::parse_start(&self.open(at, file)?, parse::limit);
        match number(files.maximum) {
            // Without a limit file there is no controller here: a root, or v2 without the controller enabled.
            Err(Errno::ENOENT) => return level,
            // v1 writes "unlimited" as the largest number of whole pages.
            Ok(bytes) if bytes >= i64::MAX as u64 - 65535 => level.maximum = Some(UNLIMITED),
            Ok(maximum) => level.maximum = Some(maximum),
            Err(_) => *unread = true,
        }
        if level.maximum == Some(UNLIMITED) && !whole {
            return level;
        }
        level.current = number(files.current).ok();
        let count = |file| match files.key {
            b"" => number(file).ok(),
            key => file::value_of(&self.open(at, file).ok()?, key),
        };
        if let Some(local) = files.local {
            level.failures = count(local);
            level.local = level.failures.is_some();
        }
        if !level.local {
            level.failures = count(files.events);
        }
        *unread |= level.current.is_none();
        level
    }

    /// The directory of the thread's own cgroup.
    pub(crate) fn own_directory(&self) -> InlinePath {
        self.path(self.length(0))
    }

    /// What a parser finds in a file of the thread's own cgroup.
    pub(crate) fn first_in<T>(
        &self,
        file: &[u8],
        parse: impl FnMut(&[u8]) -> Option<T>,
    ) -> Option<T> {
        file::first_of(&self.open(0, file).ok()?, parse)
    }

    /// The same in the nearest cgroup that has the file, and its directory: in v2 a cgroup need not have a controller,
    /// and is then a part of the one above.
    pub(crate) fn nearest_in<T>(
        &self,
        file: &[u8],
        mut parse: impl FnMut(&[u8]) -> Option<T>,
    ) -> Option<(InlinePath, T)> {
        (0..self.levels().0).find_map(|level| {
            let found = file::first_of(&self.open(level, file).ok()?, &mut parse)?;
            Some((self.path(self.length(level)), found))
        })
    }

    pub(crate) fn directory(&self, level: &Level) -> InlinePath {
        self.path(level.length)
    }
}
