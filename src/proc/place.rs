//! Where the cgroup of a thread is: its directory, open, and the names of those above it.
//!
//! The path of a cgroup can be longer than any buffer here. It is walked down from the top of a mount while it is read, a
//! name at a time, and files are opened from the directory at its end, those of the cgroup above it as `./../pids.max`.

use std::ffi::CStr;
use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Mutex;

use super::file::{self, Calls, Piece};
use super::mounts::{Mount, lists, unescape};
use crate::errno::Errno;
use crate::mem::text::{InlinePath, Text};

/// More levels than this are not walked; what lies above counts as hidden.
pub(super) const DEEPEST: usize = 18;

const MEMBERSHIP: &CStr = c"/proc/thread-self/cgroup";

/// A thread's cgroup in the hierarchy of one controller, as far as it is visible.
pub(crate) struct Hierarchy {
    /// Of the thread's own cgroup.
    directory: OwnedFd,
    names: Names,
    /// That of the directory. A file of another is mounted over the cgroup's own.
    mount: Option<u64>,
    calls: Calls,
    pub(crate) version: u8,
    /// v2 mounted with pids_localevents: its counters of refused tasks are those of v1, by whichever name.
    pub(super) forking: bool,
}

impl Hierarchy {
    /// Finds the mounts of the controllers that a refusal is about.
    pub(crate) fn prepare(calls: Calls) {
        for controller in CONTROLLERS {
            if Known::of(controller).is_none() {
                Hierarchy::locate(MEMBERSHIP, controller, calls);
            }
        }
    }

    /// The calling thread's cgroup for a controller (`pids`, `memory`, `cpuset`).
    #[inline(never)]
    pub(crate) fn of_thread(controller: &[u8], calls: Calls) -> Option<Hierarchy> {
        let known = Known::of(controller).and_then(|known| {
            let mount = known.mount();
            Hierarchy::below(&mount, MEMBERSHIP, controller, calls)
        });
        known.or_else(|| Hierarchy::locate(MEMBERSHIP, controller, calls))
    }

    #[inline(never)]
    pub(crate) fn locate(membership: &CStr, controller: &[u8], calls: Calls) -> Option<Hierarchy> {
        let mut found: Option<Hierarchy> = None;
        let _ = file::lines(c"/proc/thread-self/mountinfo", |line| {
            let Some((mount, hierarchy)) = Mount::parse(line).and_then(|mount| {
                let hierarchy = Hierarchy::below(&mount, membership, controller, calls)?;
                Some((mount, hierarchy))
            }) else {
                return ControlFlow::Continue(());
            };
            Known::keep(controller, &mount);
            found = Some(hierarchy);
            // A mount of the whole hierarchy shows more ancestors than a mount of a part.
            match mount.root {
                b"/" => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        });
        found
    }

    /// The cgroup of a thread, if it is below this mount.
    #[inline(never)]
    fn below(
        mount: &Mount<'_>,
        membership: &CStr,
        controller: &[u8],
        calls: Calls,
    ) -> Option<Hierarchy> {
        let version = mount.version().filter(|version| {
            // v2 names no controllers.
            *version == 2 || lists(mount.options, controller)
        })?;
        let mut walk = Walk::begin(mount, calls)?;
        let mut inside = false;
        let mut arrived = None;
        file::pieces(&file::open(membership).ok()?, |piece| {
            let mut path = piece.text;
            if piece.first {
                let own = Membership::parse(piece.text);
                // A controller is in one hierarchy only; the v2 line counts unless a v1 line has it.
                let listed = own
                    .as_ref()
                    .is_some_and(|own| lists(own.controllers, controller));
                if listed && version == 2 {
                    return ControlFlow::Break(());
                }
                let own = own.filter(|own| match version {
                    1 => listed,
                    _ => own.hierarchy == b"0",
                });
                inside = own.is_some();
                path = own.map_or(path, |own| own.path);
            }
            match inside.then(|| walk.follow(path, piece)) {
                None | Some(Some(false)) => ControlFlow::Continue(()),
                Some(end) => {
                    arrived = end;
                    ControlFlow::Break(())
                }
            }
        })
        .ok()?;
        arrived.filter(|arrived| *arrived)?;
        Some(Hierarchy {
            directory: walk.directory,
            names: walk.names,
            mount: Some(mount.identity(calls)?),
            calls,
            version,
            forking: controller == b"pids" && lists(mount.options, b"pids_localevents"),
        })
    }

    /// The cgroup whose directory is open as `directory`, in the hierarchy that it is of. `name` is what readlink(2) says of
    /// the descriptor. Where it is not to be had, or out of sight of this process, this cgroup is shown alone.
    #[inline(never)]
    pub(crate) fn of_directory(
        directory: RawFd,
        name: Option<&[u8]>,
        calls: Calls,
    ) -> Option<Hierarchy> {
        let mut link = Text::<64>::EMPTY;
        let _ = write!(link, "/proc/thread-self/fd/{directory}");
        let directory = file::directory(None, link.as_c_str()?).ok()?;
        let mut found = Hierarchy {
            mount: file::mount_of(&directory, calls),
            directory,
            names: Names::begin(link.as_bytes()),
            calls,
            version: 2,
            forking: false,
        };
        let Some(name) = name else { return Some(found) };
        let _ = file::lines(c"/proc/thread-self/mountinfo", |line| {
            let mount = Mount::parse(line);
            let Some((version, mount)) = mount.and_then(|mount| Some((mount.version()?, mount)))
            else {
                return ControlFlow::Continue(());
            };
            let mut point = Text::<512>::EMPTY;
            unescape(mount.point, &mut point);
            let rest = name.strip_prefix(point.as_bytes());
            let below = rest.filter(|rest| matches!(rest, [] | [b'/', ..]));
            // Another mount may cover this one.
            if let Some(rest) = below
                && mount.identity(calls) == found.mount
            {
                found.names = Names::begin(point.as_bytes());
                let names = rest.split(|byte| *byte == b'/').skip(1);
                names.for_each(|name| found.names.push(name));
                found.version = version;
                found.forking = lists(mount.options, b"pids_localevents");
            }
            ControlFlow::Continue(())
        });
        Some(found)
    }

    /// How many levels are in sight, and whether there are more.
    pub(super) fn levels(&self) -> (usize, bool) {
        let count = self.names.count;
        (count.min(DEEPEST), count > DEEPEST)
    }

    /// The length of the path of a level, the thread's own being level 0.
    pub(super) fn length(&self, level: usize) -> usize {
        self.names.lengths.get(level).copied().unwrap_or(0).into()
    }

    /// The path with this length.
    pub(super) fn path(&self, length: usize) -> InlinePath {
        let path = self.names.path.as_bytes();
        // Longer than what is kept of it: marked as cut.
        InlinePath::new(path.get(..length).unwrap_or(path))
    }

    /// A file of a level. ENODATA: another is mounted over the cgroup's own.
    pub(super) fn open(&self, level: usize, file: &[u8]) -> Result<OwnedFd, Errno> {
        let mut path = Text::<128>::new(b".");
        (0..level).for_each(|_| path.push(b"/.."));
        path.push(file);
        let path = path.as_c_str().ok_or(Errno::ENODATA)?;
        let file = file::open_at(Some(&self.directory), path)?;
        let mount = file::mount_of(&file, self.calls);
        match mount.is_some() && mount == self.mount {
            true => Ok(file),
            false => Err(Errno::ENODATA),
        }
    }
}

/// The path of a cgroup, and where in it those of the cgroups above end.
#[derive(Clone, Copy)]
struct Names {
    /// The beginning: more than is handed out.
    path: Text<260>,
    length: u16,
    /// Of the path of each level, the lowest first.
    lengths: [u16; DEEPEST],
    count: usize,
}

impl Names {
    /// At the top of a mount.
    fn begin(point: &[u8]) -> Names {
        let mut names = Names {
            path: Text::new(point),
            length: 0,
            lengths: [0; DEEPEST],
            count: 0,
        };
        names.add(point.len());
        names
    }

    fn push(&mut self, name: &[u8]) {
        self.path.push(b"/");
        self.path.push(name);
        self.add(1 + name.len());
    }

    fn add(&mut self, bytes: usize) {
        self.length = self.length.saturating_add(bytes as u16);
        self.lengths.rotate_right(1);
        if let Some(lowest) = self.lengths.first_mut() {
            *lowest = self.length;
        }
        self.count += 1;
    }
}

/// On the way from the top of a mount to a cgroup.
struct Walk<'a> {
    /// What the path must begin with, as far as it has not come.
    root: &'a [u8],
    /// The name that is being read.
    name: Text<256>,
    /// Whether the first name has begun.
    begun: bool,
    directory: OwnedFd,
    names: Names,
}

impl<'a> Walk<'a> {
    #[inline(never)]
    fn begin(mount: &Mount<'a>, calls: Calls) -> Option<Walk<'a>> {
        let mut point = Text::<512>::EMPTY;
        unescape(mount.point, &mut point);
        let directory = file::directory(None, point.as_c_str()?).ok()?;
        // Another mount may cover this one.
        (file::mount_of(&directory, calls) == mount.identity(calls)).then_some(Walk {
            root: match mount.root {
                b"/" => b"",
                root => root,
            },
            name: Text::EMPTY,
            begun: false,
            directory,
            names: Names::begin(point.as_bytes()),
        })
    }

    /// Goes on by a part of the path. `Some(true)`: that was the end of it.
    fn follow(&mut self, path: &[u8], piece: &Piece<'_>) -> Option<bool> {
        for byte in path {
            match self.root.split_first() {
                Some((expected, rest)) if byte == expected => self.root = rest,
                Some(_) => return None,
                None if *byte == b'/' => self.enter()?,
                // The root is the beginning of another name.
                None if !self.begun => return None,
                None => self.name.push(&[*byte]),
            }
            self.begun |= self.root.is_empty() && *byte == b'/';
        }
        if piece.last {
            self.enter()?;
            return self.root.is_empty().then_some(true);
        }
        Some(false)
    }

    /// Enters the directory whose name was read.
    fn enter(&mut self) -> Option<()> {
        if self.name.is_empty() {
            return Some(());
        }
        // ".." begins the path of a cgroup outside the cgroup namespace.
        let name = self.name.as_c_str().filter(|name| *name != c"..")?;
        self.directory = file::directory(Some(&self.directory), name).ok()?;
        self.names.push(name.to_bytes());
        self.name.clear();
        Some(())
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

/// A mount in which a cgroup was found, so that a table of thousands is not read for each refusal.
#[derive(Clone, Copy)]
struct Known {
    id: u64,
    device: u64,
    version: u8,
    root: Text<128>,
    point: Text<128>,
    options: Text<64>,
}

/// Those that a refusal is about.
const CONTROLLERS: [&[u8]; 2] = [b"pids", b"memory"];

/// One for each of them.
static KNOWN: Mutex<[Option<Known>; 2]> = Mutex::new([None; 2]);

impl Known {
    fn place(controller: &[u8]) -> Option<usize> {
        CONTROLLERS.iter().position(|known| *known == controller)
    }

    /// Never waits: a forked child may have copied the lock while another thread held it.
    fn of(controller: &[u8]) -> Option<Known> {
        *KNOWN.try_lock().ok()?.get(Known::place(controller)?)?
    }

    #[inline(never)]
    fn keep(controller: &[u8], mount: &Mount<'_>) {
        let known = Known {
            id: mount.id,
            device: mount.device,
            version: mount.version().unwrap_or(0),
            root: Text::new(mount.root),
            point: Text::new(mount.point),
            options: Text::new(mount.options),
        };
        let texts = [
            known.root.is_truncated(),
            known.point.is_truncated(),
            known.options.is_truncated(),
        ];
        let place = Known::place(controller).filter(|_| texts == [false; 3]);
        if let (Some(place), Ok(mut all)) = (place, KNOWN.try_lock())
            && let Some(slot) = all.get_mut(place)
        {
            *slot = Some(known);
        }
    }

    fn mount(&self) -> Mount<'_> {
        Mount {
            id: self.id,
            device: self.device,
            root: self.root.as_bytes(),
            point: self.point.as_bytes(),
            kind: match self.version {
                1 => b"cgroup",
                _ => b"cgroup2",
            },
            options: self.options.as_bytes(),
        }
    }
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

    /// The path that a walk takes from a directory, read in pieces of two bytes.
    fn walked(root: &[u8], cgroup: &[u8]) -> Option<String> {
        let mut walk = Walk {
            root: if root == b"/" { b"" } else { root },
            name: Text::EMPTY,
            begun: false,
            directory: file::directory(None, c"/proc").expect("/proc"),
            names: Names::begin(b"/proc"),
        };
        let count = cgroup.chunks(2).len();
        let pieces = cgroup.chunks(2).enumerate().map(|(index, text)| Piece {
            text,
            first: index == 0,
            last: index + 1 == count,
        });
        let ends = pieces
            .map(|piece| walk.follow(piece.text, &piece))
            .collect::<Option<Vec<_>>>()?;
        assert_eq!(ends.iter().filter(|end| **end).count(), 1);
        Some(String::from_utf8_lossy(walk.names.path.as_bytes()).into_owned())
    }

    #[test]
    fn paths_below_a_mount() {
        for (cgroup, root, expected) in [
            (&b"/sys/vm"[..], &b"/"[..], Some("/proc/sys/vm")),
            (b"/", b"/", Some("/proc")),
            (b"/docker/1/sys", b"/docker/1", Some("/proc/sys")),
            (b"/docker/1", b"/docker/1", Some("/proc")),
            (b"/docker/1sys", b"/docker/1", None),
            (b"/docker/12", b"/docker/1", None),
            (b"/docker", b"/docker/1", None),
            (b"/a", b"/docker/1", None),
            (b"/none", b"/", None),
            (b"/../sys", b"/", None),
        ] {
            assert_eq!(walked(root, cgroup).as_deref(), expected, "{cgroup:?}");
        }
    }
}
