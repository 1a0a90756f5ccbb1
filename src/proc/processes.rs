//! All processes that /proc shows. Has the heap.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::machine::RESERVED_PIDS;
use super::status::Status;

/// Tasks visible in /proc, zombies included, with numbers that are given out in turn.
pub(crate) fn numbers_in_turn() -> Option<u64> {
    each_process(|directory| {
        let tasks = fs::read_dir(directory.join("task")).into_iter().flatten();
        let numbers = tasks.flatten().filter_map(|task| {
            let name = task.file_name();
            name.to_str()?.parse::<u64>().ok()
        });
        numbers.filter(|number| *number >= RESERVED_PIDS).count() as u64
    })
}

/// Tasks of a real user, as far as /proc shows them.
pub(crate) fn tasks_of_user(uid: u32) -> Option<u64> {
    each_process(|directory| {
        let path = directory.join("status");
        let path = CString::new(path.as_os_str().as_bytes()).unwrap_or_default();
        let status = Status::read_from(&path);
        match status.uid {
            Some(owner) if owner == uid => status.threads.unwrap_or(1),
            _ => 0,
        }
    })
}

fn each_process(count: impl Fn(&Path) -> u64) -> Option<u64> {
    let entries = fs::read_dir("/proc").ok()?;
    let total = entries
        .flatten()
        .filter(|entry| {
            let name = entry.file_name();
            name.as_encoded_bytes().iter().all(u8::is_ascii_digit)
        })
        .map(|entry| count(&entry.path()))
        .sum();
    Some(total)
}
