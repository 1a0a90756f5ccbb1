//! /proc/PID/mountinfo.

use std::ops::ControlFlow;

use nix::sys::stat::makedev;

use super::file::{self, Calls};
use super::parse::number;
use crate::mem::text::Text;

/// A line of it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mount<'a> {
    pub(crate) id: u64,
    pub(crate) device: u64,
    /// The directory of the file system that is mounted.
    pub(crate) root: &'a [u8],
    /// Where it is mounted, escaped.
    pub(crate) point: &'a [u8],
    pub(crate) kind: &'a [u8],
    /// Those of the file system, not of the mount.
    pub(crate) options: &'a [u8],
}

impl Mount<'_> {
    pub(crate) fn parse(line: &[u8]) -> Option<Mount<'_>> {
        let mut words = line.split(|byte| *byte == b' ');
        let (id, device) = (number(words.next()?)?, words.nth(1)?);
        let (root, point) = (words.next()?, words.next()?);
        let mut device = device.splitn(2, |byte| *byte == b':').map(number);
        let (major, minor) = (device.next()??, device.next()??);
        // Any number of optional fields, then the kind, the source and the options.
        let mut rest = words.skip_while(|word| *word != b"-").skip(1);
        Some(Mount {
            id,
            device: makedev(major, minor),
            root,
            point,
            kind: rest.next()?,
            options: rest.nth(1)?,
        })
    }

    /// Of cgroups.
    pub(crate) fn version(&self) -> Option<u8> {
        match self.kind {
            b"cgroup" => Some(1),
            b"cgroup2" => Some(2),
            _ => None,
        }
    }

    /// What [`file::mount_of`] says of its files.
    pub(crate) fn identity(&self, calls: Calls) -> Option<u64> {
        Some(match calls {
            Calls::Any => self.device,
            Calls::FilesOnly => self.id,
        })
    }

    /// Not so with the options `hidepid` and `subset`, which the kernel shows only where they are in force.
    fn shows_all_processes(&self) -> bool {
        let mut options = self.options.split(|byte| *byte == b',');
        let hides =
            |option: &[u8]| option.starts_with(b"hidepid=") || option.starts_with(b"subset=");
        self.kind == b"proc" && self.root == b"/" && !options.any(hides)
    }
}

/// Whether a list separated by commas has an element.
pub(crate) fn lists(list: &[u8], element: &[u8]) -> bool {
    list.split(|byte| *byte == b',').any(|one| one == element)
}

/// Whether /proc is the kernel's, and shows every process of its pid namespace.
pub(crate) fn proc_shows_all() -> bool {
    let mut all = false;
    // The last mount at a point is the one on top.
    let read = file::lines(c"/proc/thread-self/mountinfo", |line| {
        if let Some(mount) = Mount::parse(line).filter(|mount| mount.point == b"/proc") {
            all = mount.shows_all_processes();
        }
        ControlFlow::Continue(())
    });
    all && read.is_ok()
}

/// Undoes the octal escapes of a mount point.
pub(crate) fn unescape<const N: usize>(text: &[u8], into: &mut Text<N>) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_with_and_without_optional_fields() {
        let line = b"35 32 0:30 /docker/4f2a /sys/fs/cgroup/cpu\\040acct ro,nosuid master:9 shared:3 - cgroup cgroup rw,pids";
        let mount = Mount {
            id: 35,
            device: 30,
            root: b"/docker/4f2a",
            point: b"/sys/fs/cgroup/cpu\\040acct",
            kind: b"cgroup",
            options: b"rw,pids",
        };
        assert_eq!(Mount::parse(line), Some(mount));
        let line = b"29 22 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,pids_localevents";
        let mount = Mount::parse(line).expect("a mount");
        assert_eq!((mount.root, mount.kind), (&b"/"[..], &b"cgroup2"[..]));
        assert!(lists(mount.options, b"pids_localevents"));
        assert!(!lists(mount.options, b"pids"));
        assert_eq!(Mount::parse(b"29 22 0:26 / /sys rw"), None);
        assert_eq!(Mount::parse(b"29 22 0:26 / /sys rw - sysfs"), None);
        assert_eq!(Mount::parse(b""), None);
    }

    #[test]
    fn a_proc_that_hides_processes() {
        let shows = |line: &[u8]| Mount::parse(line).map(|mount| mount.shows_all_processes());
        for (line, all) in [
            (
                &b"22 28 0:20 / /proc rw,nosuid shared:12 - proc proc rw"[..],
                true,
            ),
            (
                b"22 28 0:20 / /proc rw - proc proc rw,gid=27,hidepid=invisible",
                false,
            ),
            (b"22 28 0:20 / /proc rw - proc proc rw,subset=pid", false),
            (b"22 28 0:20 /42 /proc rw - proc proc rw", false),
            (b"22 28 0:20 / /proc rw - tmpfs none rw", false),
        ] {
            assert_eq!(shows(line), Some(all));
        }
    }

    #[test]
    fn escapes() {
        for (escaped, plain) in [
            (&b"/mnt/a\\040b\\134c"[..], &b"/mnt/a b\\c"[..]),
            (b"/plain", b"/plain"),
            (b"/cut\\04", b"/cut\\04"),
        ] {
            let mut text = Text::<32>::EMPTY;
            unescape(escaped, &mut text);
            assert_eq!(text.as_bytes(), plain);
        }
    }
}
