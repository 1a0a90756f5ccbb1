//! The tasks of one user that /proc shows: as many at least are what the kernel compares with RLIMIT_NPROC.

use std::fmt::Write as _;
use std::os::fd::AsFd;

use nix::sys::stat::{FileStat, stat};

use crate::mem::text::Text;
use crate::proc::status::{Calls, Status};
use crate::proc::{file, machine, task};
use crate::sys;

/// Processes that are looked at, at most: each takes some microseconds.
const MOST: u32 = 512;

/// Counts tasks until there are `enough`: those of processes with the real user id `uid`, in the initial user namespace.
/// Fewer than there are, if some cannot be seen; never more, because all of them were there when the counting began.
/// Makes calls that no filter may look at.
#[inline(never)]
pub(super) fn at_least(uid: u32, enough: u64) -> Option<u64> {
    let newest = || machine::last_pid_number(Calls::Any);
    let began = newest()?;
    let directory = file::open(c"/proc").ok()?;
    let (mut tasks, mut seen) = (0, 0);
    let mut buffer = [0; 1024];
    loop {
        let filled = sys::directory_entries(directory.as_fd(), &mut buffer).ok()?;
        let mut rest = buffer.get(..filled)?;
        while let Some((name, after)) = entry(rest) {
            rest = after;
            if name.first().is_none_or(|first| !first.is_ascii_digit()) {
                continue;
            }
            seen += 1;
            tasks += tasks_of(name, uid).unwrap_or(0);
        }
        if filled == 0 || tasks >= enough || seen >= MOST {
            break;
        }
    }
    // A task that is new could stand for one that was counted and has ended.
    (newest() == Some(began)).then_some(tasks)
}

/// The name of the first entry that getdents64(2) has written, and the rest: number, offset, length, kind, name.
fn entry(entries: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = entries
        .get(16..18)?
        .try_into()
        .ok()
        .map(u16::from_ne_bytes)?;
    let (entry, rest) = entries.split_at_checked(length.into())?;
    let name = entry.get(19..)?.split(|byte| *byte == 0).next()?;
    Some((name, rest))
}

/// The tasks of a process, if they count for that user.
fn tasks_of(process: &[u8], uid: u32) -> Option<u64> {
    let mut path = Text::<64>::new(b"/proc/");
    path.push(process);
    let length = path.as_bytes().len();
    let status_of = |path: &Text<64>| -> Option<FileStat> { stat(path.as_c_str()?).ok() };
    // The effective user. Who has another real one is left out.
    status_of(&path).filter(|status| status.st_uid == uid)?;
    path.push(b"/ns/user");
    // Those of a namespace inside count for the user that has made it. Of a process that may not be traced it is not known.
    if !task::is_initial_user_namespace(path.as_c_str()?, Calls::Any)? {
        return None;
    }
    path.shorten(length);
    let _ = path.write_str("/status");
    let status = Status::read_from(path.as_c_str()?);
    status.threads.filter(|_| status.uid == Some(uid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_a_directory() {
        let mut entries = Vec::new();
        for (name, length) in [(&b"1"[..], 24_u16), (b"4242", 24), (b"sys", 24)] {
            let start = entries.len();
            entries.extend([0; 16]);
            entries.extend(length.to_ne_bytes());
            entries.push(4);
            entries.extend(name);
            entries.resize(start + usize::from(length), 0);
        }
        let (mut names, mut rest) = (Vec::new(), &entries[..]);
        while let Some((name, after)) = entry(rest) {
            names.push(name);
            rest = after;
        }
        assert_eq!(names, [&b"1"[..], b"4242", b"sys"]);
        assert_eq!(entry(&entries[..23]), None);
        assert_eq!(entry(b""), None);
    }
}
