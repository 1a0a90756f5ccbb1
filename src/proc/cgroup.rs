//! The cgroups above a thread, as far as they are visible, and what their files say.

use std::ffi::CStr;
use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::os::fd::RawFd;

use crate::errno::Errno;

use super::file;
use super::mounts::{Mount, lists, unescape};
use super::parse::UNLIMITED;
use crate::mem::text::{InlinePath, Text};

/// More levels than this are not walked; what lies above counts as hidden.
const DEEPEST: usize = 18;

/// Long enough for a mount point and what Kubernetes and systemd nest below it; longer ones are not read.
type Path = Text<768>;

/// A thread's cgroup in the hierarchy of one controller, as far as it is visible.
#[derive(Clone, Copy)]
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
    /// The calling thread's cgroup for a controller (`pids`, `memory`, `cpuset`).
    pub(crate) fn of_thread(controller: &[u8]) -> Option<Hierarchy> {
        Hierarchy::locate(c"/proc/thread-self/cgroup", controller)
    }

    pub(crate) fn locate(membership: &CStr, controller: &[u8]) -> Option<Hierarchy> {
        let (cgroup, version) = own_cgroup(membership, controller)?;
        let mut found: Option<Hierarchy> = None;
        file::lines(c"/proc/thread-self/mountinfo", |line| {
            let Some(mount) = Mount::parse(line) else {
                return ControlFlow::Continue(());
            };
            let matches = match version {
                1 => mount.kind == b"cgroup" && lists(mount.options, controller),
                _ => mount.kind == b"cgroup2",
            };
            let Some(below) = below(cgroup.as_bytes(), mount.root).filter(|_| matches) else {
                return ControlFlow::Continue(());
            };
            let mut path = Path::EMPTY;
            unescape(mount.point, &mut path);
            let length = path.as_bytes().len();
            path.push(below);
            // Every cgroup has this file: where there is none, another mount covers this one.
            let mut unread = false;
            let visible = exists(&mut path, b"/cgroup.procs", &mut unread) || unread;
            if path.is_truncated() || !visible {
                return ControlFlow::Continue(());
            }
            found = Some(Hierarchy {
                path,
                mount: length,
                version,
                forking: controller == b"pids" && lists(mount.options, b"pids_localevents"),
            });
            // A mount of the whole hierarchy shows more ancestors than a mount of a part.
            if mount.root == b"/" {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
        .ok()?;
        found
    }

    /// The cgroup whose directory is open as `directory`, in the hierarchy that it is of. `name` is what readlink(2) says of
    /// the descriptor. Where it is not to be had, or out of sight of this process, the path through the descriptor
    /// shows this cgroup alone.
    pub(crate) fn of_directory(directory: RawFd, name: Option<&[u8]>) -> Hierarchy {
        let mut path = Path::EMPTY;
        let _ = write!(path, "/proc/thread-self/fd/{directory}");
        let mut found = Hierarchy {
            path,
            mount: path.as_bytes().len(),
            version: 2,
            forking: false,
        };
        let Some(name) = name else { return found };
        let _ = file::lines(c"/proc/thread-self/mountinfo", |line| {
            let mount = Mount::parse(line).and_then(|mount| {
                let version = match mount.kind {
                    b"cgroup" => 1,
                    b"cgroup2" => 2,
                    _ => return None,
                };
                let mut path = Path::EMPTY;
                unescape(mount.point, &mut path);
                let length = path.as_bytes().len();
                path.push(below(name, path.as_bytes())?);
                let visible = exists(&mut path, b"/cgroup.procs", &mut false);
                (visible && !path.is_truncated()).then_some(Hierarchy {
                    path,
                    mount: length,
                    version,
                    forking: lists(mount.options, b"pids_localevents"),
                })
            });
            found = mount.unwrap_or(found);
            ControlFlow::Continue(())
        });
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
        let mut path = self.path;
        let mut length = path.as_bytes().len();
        let mut above = true;
        let mut below = true;
        for slot in &mut snapshot.levels {
            path.shorten(length);
            // Up to the thread's own, or the one that stands for it.
            let whole = full || below;
            *slot = read_level(&mut path, length, files, whole, &mut snapshot.unread);
            below &= slot.maximum.is_none();
            snapshot.count += 1;
            let Some(parent) = self.above(length) else {
                above = false;
                break;
            };
            length = parent;
        }
        path.shorten(self.mount);
        snapshot.hidden = above || self.has_ancestors(&mut path, files, &mut snapshot.unread);
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
        InlinePath::new(self.path.as_bytes())
    }

    /// What a parser finds in a file of the thread's own cgroup.
    pub(crate) fn first_in<T>(
        &self,
        file: &[u8],
        parse: impl FnMut(&[u8]) -> Option<T>,
    ) -> Option<T> {
        let mut path = self.path;
        with_file(&mut path, file, |path| file::first(path, parse))
    }

    /// The same in the nearest cgroup that has the file, and its directory: in v2 a cgroup need not have a controller,
    /// and is then a part of the one above.
    pub(crate) fn nearest_in<T>(
        &self,
        file: &[u8],
        mut parse: impl FnMut(&[u8]) -> Option<T>,
    ) -> Option<(InlinePath, T)> {
        let mut level = *self;
        loop {
            if let Some(found) = level.first_in(file, &mut parse) {
                return Some((level.own_directory(), found));
            }
            level
                .path
                .shorten(level.above(level.path.as_bytes().len())?);
        }
    }

    /// The length of the path of the cgroup above the one whose path has this length, if it is visible.
    fn above(&self, length: usize) -> Option<usize> {
        if length <= self.mount {
            return None;
        }
        let path = self.path.as_bytes().get(..length)?;
        let parent = path.iter().rposition(|byte| *byte == b'/')?;
        Some(parent.max(self.mount))
    }

    pub(crate) fn directory(&self, level: &Level) -> InlinePath {
        let bytes = self.path.as_bytes();
        InlinePath::new(bytes.get(..level.length).unwrap_or(bytes))
    }
}

/// A line of /proc/PID/cgroup: hierarchy:controllers:path, and the path may hold colons.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Membership<'a> {
    /// 0 is that of v2, which lists no controllers.
    hierarchy: &'a [u8],
    controllers: &'a [u8],
    path: &'a [u8],
}

impl Membership<'_> {
    pub(crate) fn parse(line: &[u8]) -> Option<Membership<'_>> {
        let mut fields = line.splitn(3, |byte| *byte == b':');
        Some(Membership {
            hierarchy: fields.next()?,
            controllers: fields.next()?,
            path: fields.next()?,
        })
    }
}

/// The cgroup in the hierarchy that has the controller, and the version of that.
fn own_cgroup(membership: &CStr, controller: &[u8]) -> Option<(Path, u8)> {
    let mut cgroup = Path::EMPTY;
    let mut version = 0;
    file::lines(membership, |line| {
        let Some(own) = Membership::parse(line) else {
            return ControlFlow::Continue(());
        };
        // A controller is in one hierarchy only; the v2 line counts unless a v1 line has it.
        let v1 = lists(own.controllers, controller);
        if v1 || own.hierarchy == b"0" && version == 0 {
            version = if v1 { 1 } else { 2 };
            cgroup.shorten(0);
            cgroup.push(own.path);
        }
        if v1 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })
    .ok()?;
    // "/.." starts the path of a cgroup outside the cgroup namespace.
    let visible = !cgroup.is_truncated() && !cgroup.as_bytes().starts_with(b"/..");
    (version != 0 && visible).then_some((cgroup, version))
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

fn with_file<T>(path: &mut Path, file: &[u8], read: impl FnOnce(&CStr) -> Option<T>) -> Option<T> {
    let length = path.as_bytes().len();
    path.push(file);
    let result = path.as_c_str().and_then(read);
    path.shorten(length);
    result
}

fn exists(path: &mut Path, file: &[u8], unread: &mut bool) -> bool {
    let found = with_file(path, file, |path| {
        Some(match file::open(path) {
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
        ..Level::NONE
    };
    let maximum = with_file(path, files.maximum, |path| Some(file::read_number(path)));
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
    level.current = with_file(path, files.current, file::number_in);
    let count = |path: &CStr| match files.key {
        b"" => file::number_in(path),
        key => file::value_in(path, key),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memberships() {
        let line = b"7:cpu,cpuacct:/user.slice/a:b";
        let own = Membership::parse(line).expect("three fields");
        assert!(lists(own.controllers, b"cpu") && !lists(own.controllers, b"pids"));
        assert_eq!(
            (own.hierarchy, own.path),
            (&b"7"[..], &b"/user.slice/a:b"[..])
        );
        let own = Membership::parse(b"0::/init.scope").expect("three fields");
        assert_eq!((own.hierarchy, own.controllers), (&b"0"[..], &b""[..]));
        assert_eq!(Membership::parse(b"0:pids"), None);
    }

    #[test]
    fn paths_below_a_mount() {
        for (cgroup, root, expected) in [
            (&b"/a/b"[..], &b"/"[..], Some(&b"/a/b"[..])),
            (b"/", b"/", Some(b"")),
            (b"/docker/1/a", b"/docker/1", Some(b"/a")),
            (b"/docker/1", b"/docker/1", Some(b"")),
            (b"/docker/12", b"/docker/1", None),
            (b"/a", b"/docker/1", None),
        ] {
            assert_eq!(below(cgroup, root), expected);
        }
    }
}
