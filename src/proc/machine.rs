//! What the whole machine, or a namespace of it, allows and uses.

use std::ffi::CStr;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;

use nix::sys::utsname::uname;

use super::file::{self, sysctl};
use super::parse::{kib, number, value, words};
use super::status::Calls;
use crate::mem::text::InlinePath;

const LOADAVG: &CStr = c"/proc/loadavg";

/// /proc/loadavg, as far as it counts tasks.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct LoadAverage {
    tasks: u64,
    last_pid: u64,
}

impl LoadAverage {
    fn read(calls: Calls) -> Option<LoadAverage> {
        let file = file::open_genuine(LOADAVG, calls).ok()?;
        file::parse_start(&file, LoadAverage::parse).ok()
    }

    pub(crate) fn parse(text: &[u8]) -> Option<LoadAverage> {
        // Three averages, runnable/all tasks, the pid number given out last.
        let mut fields = words(text).skip(3);
        let (_, tasks) = split_once(fields.next()?, b'/')?;
        Some(LoadAverage {
            tasks: number(tasks)?,
            last_pid: number(fields.next()?)?,
        })
    }
}

fn split_once(text: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let position = text.iter().position(|byte| *byte == at)?;
    Some((text.get(..position)?, text.get(position + 1..)?))
}

/// All tasks of the machine, as the kernel compares them with `kernel.threads-max`. lxcfs mounts a file of its own over
/// /proc/loadavg that counts one container; then the number is absent.
pub(crate) fn tasks(calls: Calls) -> Option<u64> {
    Some(LoadAverage::read(calls)?.tasks).filter(|tasks| *tasks > 0)
}

/// The number given out last in the reader's pid namespace.
pub(crate) fn last_pid_number(calls: Calls) -> Option<u64> {
    Some(LoadAverage::read(calls)?.last_pid)
}

pub(crate) fn threads_max(calls: Calls) -> Option<u64> {
    sysctl(c"/proc/sys/kernel/threads-max", calls)
}

/// That of the reader's pid namespace since Linux 6.14.
pub(crate) const PID_MAX: &CStr = c"/proc/sys/kernel/pid_max";

pub(crate) fn pid_max(calls: Calls) -> Option<u64> {
    sysctl(PID_MAX, calls)
}

/// Below this no pid number is given out again after the first wrap (the kernel's `RESERVED_PIDS`).
pub(crate) const RESERVED_PIDS: u64 = 300;

/// The mappings that a process can have.
pub(crate) const MAX_MAP_COUNT: &CStr = c"/proc/sys/vm/max_map_count";

pub(crate) fn max_map_count(calls: Calls) -> Option<u64> {
    sysctl(MAX_MAP_COUNT, calls)
}

pub(crate) fn overcommit_memory(calls: Calls) -> Option<u64> {
    sysctl(c"/proc/sys/vm/overcommit_memory", calls)
}

/// Kept back in overcommit mode 2 for root, and for each process, in bytes.
pub(crate) fn reserves(calls: Calls) -> Option<(u64, u64)> {
    let admin = sysctl(c"/proc/sys/vm/admin_reserve_kbytes", calls)?;
    let user = sysctl(c"/proc/sys/vm/user_reserve_kbytes", calls)?;
    Some((admin.checked_mul(1024)?, user.checked_mul(1024)?))
}

pub(crate) fn mmap_min_addr() -> Option<u64> {
    sysctl(c"/proc/sys/vm/mmap_min_addr", Calls::Any)
}

/// The security modules in force; `None` where securityfs is not mounted, as in most containers.
pub(crate) fn security_modules() -> Option<InlinePath> {
    file::first(c"/sys/kernel/security/lsm", |line| {
        Some(InlinePath::new(line))
    })
}

/// /proc/meminfo, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct MemInfo {
    pub(crate) total: Option<u64>,
    pub(crate) swap: Option<u64>,
    pub(crate) commit_limit: Option<u64>,
    pub(crate) committed: Option<u64>,
}

impl MemInfo {
    /// lxcfs mounts a file of its own over it that counts one container; then the numbers are absent.
    pub(crate) fn read(calls: Calls) -> MemInfo {
        let mut info = MemInfo::default();
        if let Ok(file) = file::open_genuine(c"/proc/meminfo", calls) {
            let _ = file::lines_of(&file, |line| {
                info.take(line);
                ControlFlow::Continue(())
            });
        }
        info
    }

    /// One line of the file.
    pub(crate) fn take(&mut self, line: &[u8]) {
        for (key, field) in [
            (&b"MemTotal:"[..], &mut self.total),
            (b"SwapTotal:", &mut self.swap),
            (b"CommitLimit:", &mut self.commit_limit),
            (b"Committed_AS:", &mut self.committed),
        ] {
            if let Some(text) = value(line, key) {
                *field = kib(text);
            }
        }
    }
}

/// Major and minor version of the kernel.
pub(crate) fn kernel_version() -> Option<(u64, u64)> {
    parse_version(uname().ok()?.release().as_bytes())
}

pub(crate) fn parse_version(release: &[u8]) -> Option<(u64, u64)> {
    let (major, rest) = split_once(release, b'.')?;
    Some((number(major)?, number(rest)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_averages() {
        let load = LoadAverage::parse(b"0.20 0.18 0.12 1/80 11206\n");
        let expected = LoadAverage {
            tasks: 80,
            last_pid: 11206,
        };
        assert_eq!(load, Some(expected));
        for wrong in [&b"0.20 0.18 0.12 1 11206"[..], b"0.20 0.18 0.12 1/80", b""] {
            assert_eq!(LoadAverage::parse(wrong), None);
        }
        assert!(last_pid_number(Calls::Any).is_some());
        assert_eq!(
            tasks(Calls::Any).is_some(),
            tasks(Calls::FilesOnly).is_some()
        );
    }

    #[test]
    fn memory_of_the_machine() {
        let mut info = MemInfo::default();
        for line in [
            &b"MemTotal:       24684084 kB"[..],
            b"MemFree:        20145204 kB",
            b"SwapCached:            0 kB",
            b"SwapTotal:             0 kB",
            b"CommitLimit:    12342040 kB",
            b"Committed_AS:    1834500 kB",
        ] {
            info.take(line);
        }
        let expected = MemInfo {
            total: Some(24_684_084 << 10),
            swap: Some(0),
            commit_limit: Some(12_342_040 << 10),
            committed: Some(1_834_500 << 10),
        };
        assert_eq!(info, expected);
    }

    #[test]
    fn versions() {
        assert_eq!(parse_version(b"6.12.63+deb13-amd64\n"), Some((6, 12)));
        assert_eq!(parse_version(b"7.0-rc1\n"), Some((7, 0)));
        assert_eq!(parse_version(b"5\n"), None);
        assert!(kernel_version() >= Some((4, 0)));
    }
}
