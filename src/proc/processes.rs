//! All processes that /proc shows. Has the heap.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::machine::RESERVED_PIDS;
use super::status::Status;
use super::task::group_and_session;

/// The numbers, of those that are given out in turn, that something visible in /proc holds: tasks, zombies included, and
/// process groups and sessions, which outlive their leader.
pub(crate) fn numbers_in_turn() -> Option<u64> {
    let mut held = HashSet::new();
    each_process(|directory| {
        let tasks = fs::read_dir(directory.join("task")).into_iter().flatten();
        held.extend(tasks.flatten().filter_map(|task| {
            let name = task.file_name();
            name.to_str()?.parse::<u64>().ok()
        }));
        let stat = fs::read(directory.join("stat")).unwrap_or_default();
        held.extend(group_and_session(&stat).into_iter().flatten());
    })?;
    held.retain(|number| *number >= RESERVED_PIDS);
    Some(held.len() as u64)
}

/// The tasks of one real user that /proc shows.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UserTasks {
    /// The user's own.
    pub(crate) own: u64,
    /// Those of other users in user namespaces: all count for the user who made the namespace, who is not known.
    pub(crate) in_namespaces: u64,
}

impl UserTasks {
    pub(crate) fn count(uid: u32) -> Option<UserTasks> {
        let map = |directory: &Path| fs::read(directory.join("uid_map")).ok();
        let reader = map(Path::new("/proc/self"));
        let mut tasks = UserTasks::default();
        each_process(|directory| {
            let path = directory.join("status");
            let path = CString::new(path.as_os_str().as_bytes()).unwrap_or_default();
            let status = Status::read_from(&path);
            let threads = status.threads.unwrap_or(1);
            match status.uid {
                Some(owner) if owner == uid => tasks.own += threads,
                Some(_) if map(directory) != reader => tasks.in_namespaces += threads,
                _ => {}
            }
        })?;
        Some(tasks)
    }
}

fn each_process(mut each: impl FnMut(&Path)) -> Option<()> {
    let entries = fs::read_dir("/proc").ok()?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.as_encoded_bytes().iter().all(u8::is_ascii_digit) {
            each(&entry.path());
        }
    }
    Some(())
}
