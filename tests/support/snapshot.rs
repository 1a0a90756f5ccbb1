//! What a leak would change in this process.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// The state of this process at one moment.
///
/// Taking one allocates, so the first of a process differs from the next by itself: take one and throw it
/// away before the one that counts. malloc counts what lies in a thread's cache as in use.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The lines of /proc/self/maps without `[vsyscall]`, which is no mapping of the process.
    pub maps: Vec<String>,
    /// Open descriptors and what they name.
    pub fds: BTreeMap<i32, PathBuf>,
    /// Resident bytes, from the page tables (`statm` lags by a batch per CPU).
    pub resident_bytes: u64,
    /// Bytes that glibc's malloc has given out.
    pub malloc_bytes: u64,
    /// Threads that the kernel knows.
    pub kernel_threads: u64,
    /// Threads that glibc knows: `__nptl_nthreads`.
    pub glibc_threads: Option<i32>,
}

impl Snapshot {
    pub fn take() -> Snapshot {
        // First of all, since the rest allocates.
        let malloc_bytes = malloc_in_use().cast_unsigned();
        let glibc_threads = glibc_threads();
        let maps = std::fs::read_to_string("/proc/self/maps").expect("/proc/self/maps");
        let maps = maps
            .lines()
            .filter(|line| !line.ends_with("[vsyscall]"))
            .map(str::to_owned)
            .collect();
        Snapshot {
            maps,
            fds: open_fds(),
            resident_bytes: 1024 * field("/proc/self/smaps_rollup", "Rss:"),
            malloc_bytes,
            kernel_threads: field("/proc/self/status", "Threads:"),
            glibc_threads,
        }
    }

    /// What changed from this moment to `later`.
    pub fn diff(&self, later: &Snapshot) -> Difference {
        let missing_from = |lines: &[String], in_lines: &[String]| -> Vec<String> {
            let known: std::collections::BTreeSet<_> = lines.iter().collect();
            in_lines
                .iter()
                .filter(|line| !known.contains(line))
                .cloned()
                .collect()
        };
        let describe =
            |fds: &BTreeMap<i32, PathBuf>, other: &BTreeMap<i32, PathBuf>| -> Vec<String> {
                fds.iter()
                    .filter(|(fd, path)| other.get(fd) != Some(path))
                    .map(|(fd, path)| format!("{fd} -> {}", path.display()))
                    .collect()
            };
        Difference {
            mappings: change(self.maps.len() as u64, later.maps.len() as u64),
            maps_gone: missing_from(&later.maps, &self.maps),
            maps_new: missing_from(&self.maps, &later.maps),
            fds: change(self.fds.len() as u64, later.fds.len() as u64),
            fds_gone: describe(&self.fds, &later.fds),
            fds_new: describe(&later.fds, &self.fds),
            resident_bytes: change(self.resident_bytes, later.resident_bytes),
            malloc_bytes: change(self.malloc_bytes, later.malloc_bytes),
            kernel_threads: change(self.kernel_threads, later.kernel_threads),
            glibc_threads: later
                .glibc_threads
                .zip(self.glibc_threads)
                .map_or(0, |(later, earlier)| i64::from(later) - i64::from(earlier)),
        }
    }
}

/// Bytes that glibc's malloc has given out. Asking allocates nothing, unlike a [`Snapshot`].
pub fn malloc_in_use() -> i64 {
    // SAFETY: mallinfo2 only reads malloc's own state, under its locks.
    let malloc = unsafe { libc::mallinfo2() };
    (malloc.uordblks + malloc.hblkhd).cast_signed() as i64
}

/// The change between two snapshots, positive where there is more of it now. Its text lists what is new
/// and what is gone.
#[derive(Clone, Debug)]
pub struct Difference {
    pub mappings: i64,
    pub maps_gone: Vec<String>,
    pub maps_new: Vec<String>,
    pub fds: i64,
    pub fds_gone: Vec<String>,
    pub fds_new: Vec<String>,
    pub resident_bytes: i64,
    pub malloc_bytes: i64,
    pub kernel_threads: i64,
    pub glibc_threads: i64,
}

impl Difference {
    /// Panics with the whole text unless mappings, descriptors and threads are exactly what they were.
    /// Bytes are left to the caller: what is tolerable there depends on the test.
    #[track_caller]
    pub fn expect_nothing_left(&self) {
        let unchanged = self.maps_gone.is_empty()
            && self.maps_new.is_empty()
            && self.fds_gone.is_empty()
            && self.fds_new.is_empty()
            && self.kernel_threads == 0
            && self.glibc_threads == 0;
        assert!(unchanged, "something is left behind:\n{self}");
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "mappings       {:+}", self.mappings)?;
        writeln!(f, "descriptors    {:+}", self.fds)?;
        writeln!(f, "resident bytes {:+}", self.resident_bytes)?;
        writeln!(f, "malloc bytes   {:+}", self.malloc_bytes)?;
        writeln!(f, "kernel threads {:+}", self.kernel_threads)?;
        writeln!(f, "glibc threads  {:+}", self.glibc_threads)?;
        for (sign, lines) in [
            ('-', &self.maps_gone),
            ('+', &self.maps_new),
            ('-', &self.fds_gone),
            ('+', &self.fds_new),
        ] {
            for line in lines {
                writeln!(f, "{sign} {line}")?;
            }
        }
        Ok(())
    }
}

fn change(earlier: u64, later: u64) -> i64 {
    later.wrapping_sub(earlier).cast_signed()
}

fn open_fds() -> BTreeMap<i32, PathBuf> {
    let entries = std::fs::read_dir("/proc/self/fd").expect("/proc/self/fd");
    let mut fds: BTreeMap<i32, PathBuf> = entries
        .flatten()
        .filter_map(|entry| {
            let fd = entry.file_name().to_str()?.parse().ok()?;
            Some((fd, std::fs::read_link(entry.path()).ok()?))
        })
        .collect();
    // The descriptor that reads the directory lists itself.
    fds.retain(|_, target| !(target.starts_with("/proc") && target.ends_with("fd")));
    fds
}

fn field(file: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .find_map(|line| {
            line.strip_prefix(name)?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .unwrap_or(0)
}

fn glibc_threads() -> Option<i32> {
    // SAFETY: the name is NUL-terminated.
    let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__nptl_nthreads".as_ptr()) };
    if symbol.is_null() {
        return None;
    }
    // SAFETY: glibc exports this int for libthread_db; it is changed atomically.
    Some(
        unsafe { std::sync::atomic::AtomicI32::from_ptr(symbol.cast()) }
            .load(std::sync::atomic::Ordering::Relaxed),
    )
}
