//! What /proc says about this process and the limits it lives under.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::str::FromStr;
use std::thread;

/// A field of /proc/self/status in its own unit (sizes: kB).
pub fn status(field: &str) -> Option<usize> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

/// What figures depend on most: kernel, C library, processors.
pub fn machine() -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    // SAFETY: glibc's version is a constant string.
    let glibc = unsafe { CStr::from_ptr(libc::gnu_get_libc_version()) };
    format!(
        "Linux {}, glibc {}, {} CPUs",
        kernel.trim(),
        glibc.to_string_lossy(),
        thread::available_parallelism().map_or(0, usize::from)
    )
}

/// Resident bytes of this process.
pub fn resident_bytes() -> usize {
    status("VmRSS").unwrap_or(0) * 1024
}

/// Mappings that count towards vm.max_map_count: the kernel's own `[vsyscall]` does not.
pub fn mappings() -> usize {
    let Ok(maps) = File::open("/proc/self/maps") else {
        return 0;
    };
    let lines = BufReader::new(maps).lines().map_while(Result::ok);
    lines.filter(|line| !line.ends_with("[vsyscall]")).count()
}

/// The number that a file holds.
pub fn number<N: FromStr>(path: impl AsRef<Path>) -> Option<N> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Tasks on the machine, exact and global: the fourth field of /proc/loadavg.
pub fn tasks() -> Option<usize> {
    let loadavg = fs::read_to_string("/proc/loadavg").ok()?;
    loadavg
        .split_whitespace()
        .nth(3)?
        .split_once('/')?
        .1
        .parse()
        .ok()
}

/// `(file, current, maximum)` of each pids cgroup with a limit, from this process's own up to the
/// visible root.
pub fn pids_cgroups() -> Vec<(String, usize, usize)> {
    let mut found = Vec::new();
    for line in fs::read_to_string("/proc/self/cgroup")
        .unwrap_or_default()
        .lines()
    {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else {
            continue;
        };
        let roots: &[&str] = match controllers {
            "" => &["/sys/fs/cgroup", "/sys/fs/cgroup/unified"],
            "pids" => &["/sys/fs/cgroup/pids"],
            _ => &[],
        };
        for root in roots {
            for directory in Path::new(group).ancestors() {
                let directory =
                    Path::new(root).join(directory.strip_prefix("/").unwrap_or(directory));
                let file = directory.join("pids.max");
                if let Some(maximum) = number(&file) {
                    let current = number(directory.join("pids.current")).unwrap_or(0);
                    found.push((file.display().to_string(), current, maximum));
                }
            }
        }
    }
    found
}
