//! Cgroups made for one test, v1 or v2, below the cgroup this process is in.

use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

pub(super) const CGROUPS_VARIABLE: &str = "NPTL_TEST_CGROUPS";

/// A cgroup's directory, however it came to be.
#[derive(Debug)]
pub struct CgroupDir {
    path: PathBuf,
    unified: bool,
}

/// The cgroup with this number (in the order of the calls of `Child::cgroup`) that the parent moved this
/// process into.
pub fn inherited_cgroup(number: usize) -> CgroupDir {
    let paths = std::env::var_os(CGROUPS_VARIABLE).unwrap_or_default();
    let path = std::env::split_paths(&paths)
        .nth(number)
        .expect("a cgroup given by the parent");
    CgroupDir {
        unified: path.join("cgroup.controllers").exists(),
        path,
    }
}

impl CgroupDir {
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it lies in the v2 hierarchy.
    pub fn is_unified(&self) -> bool {
        self.unified
    }

    /// The text of one of its files, without the line end.
    #[track_caller]
    pub fn get(&self, file: &str) -> String {
        let path = self.path.join(file);
        let text = std::fs::read_to_string(&path);
        let text = text.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        text.trim_end().to_owned()
    }

    #[track_caller]
    pub fn set(&self, file: &str, value: impl ToString) {
        let path = self.path.join(file);
        let result = std::fs::write(&path, value.to_string());
        result.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }

    /// `pids.current` as a number.
    #[track_caller]
    pub fn tasks(&self) -> u64 {
        self.get("pids.current").parse().expect("a number")
    }

    /// The limit of a memory cgroup in bytes.
    #[track_caller]
    pub fn set_memory_limit(&self, bytes: u64) {
        let file = if self.unified {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        };
        self.set(file, bytes);
    }
}

/// A cgroup that is removed, with every process in it killed, when its last handle and the last handle of
/// a cgroup nested in it are gone.
#[derive(Clone, Debug)]
pub struct Cgroup(Arc<Owned>);

#[derive(Debug)]
struct Owned {
    dir: CgroupDir,
    controller: &'static str,
    /// Keeps the ancestor until this one is removed.
    _parent: Option<Cgroup>,
}

impl Cgroup {
    /// A cgroup with the pids controller. `Err` says why there is none here.
    pub fn pids() -> Result<Cgroup, String> {
        Cgroup::new("pids")
    }

    /// A cgroup with the memory controller.
    pub fn memory() -> Result<Cgroup, String> {
        Cgroup::new("memory")
    }

    /// A cgroup with the cpu controller.
    pub fn cpu() -> Result<Cgroup, String> {
        Cgroup::new("cpu")
    }

    /// A cgroup with the cpuset controller.
    pub fn cpuset() -> Result<Cgroup, String> {
        Cgroup::new("cpuset")
    }

    /// A cgroup of the v2 hierarchy without any controller, as for `CLONE_INTO_CGROUP`.
    pub fn unified() -> Result<Cgroup, String> {
        Cgroup::new("")
    }

    fn new(controller: &'static str) -> Result<Cgroup, String> {
        let mounts = mounts();
        let place = mounts
            .iter()
            .find(|mount| mount.has(controller))
            .or_else(|| mounts.iter().find(|mount| mount.unified))
            .and_then(|mount| mount.place_for(controller))
            .ok_or_else(|| format!("no cgroup hierarchy offers the {controller:?} controller"))?;
        sweep(&place.path);
        Cgroup::create(&place, controller, None)
    }

    fn create(
        place: &CgroupDir,
        controller: &'static str,
        parent: Option<Cgroup>,
    ) -> Result<Cgroup, String> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}{}-{number}", name_prefix(), std::process::id());
        let path = place.path.join(name);
        if let Err(e) = std::fs::create_dir(&path) {
            let why = format!("{}: {e}", path.display());
            // Anything else is a defect of this module, and must not pass for a machine without cgroups.
            match e.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    return Err(why);
                }
                _ => panic!("{why}"),
            }
        }
        Ok(Cgroup(Arc::new(Owned {
            dir: CgroupDir {
                path,
                unified: place.unified,
            },
            controller,
            _parent: parent,
        })))
    }

    /// A cgroup inside this one, with the same controller. In v2 this one can then hold no processes.
    pub fn nested(&self) -> Result<Cgroup, String> {
        if self.unified && !self.0.controller.is_empty() {
            self.set("cgroup.subtree_control", format!("+{}", self.0.controller));
        }
        Cgroup::create(&self.0.dir, self.0.controller, Some(self.clone()))
    }

    /// A cgroup of v2 inside this one that does not have the controller: its processes count as this one's.
    pub fn nested_without_controller(&self) -> Result<Cgroup, String> {
        match self.unified {
            true => Cgroup::create(&self.0.dir, "", Some(self.clone())),
            false => Err("in v1 every cgroup has the controller".to_owned()),
        }
    }
}

impl Deref for Cgroup {
    type Target = CgroupDir;

    fn deref(&self) -> &CgroupDir {
        &self.0.dir
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // A killed process leaves its cgroup only when it is gone; there is nothing to wait on.
        let deadline = Instant::now() + Duration::from_secs(10);
        while let Err(e) = std::fs::remove_dir(&self.dir.path) {
            if e.kind() == io::ErrorKind::NotFound {
                return;
            }
            if Instant::now() > deadline {
                eprintln!("{}: left behind: {e}", self.dir.path.display());
                return;
            }
            kill_members(&self.dir.path);
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn kill_members(path: &Path) {
    let members = std::fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    for pid in members.lines().filter_map(|line| line.parse::<i32>().ok()) {
        // Members in an outer pid namespace read as 0, which would mean our own group.
        if pid > 1 && pid != std::process::id().cast_signed() {
            // SAFETY: only processes started by this test are in the cgroup it made.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
}

/// The pid namespace belongs to the name: in another one, the same number is another process.
fn name_prefix() -> String {
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let namespace: String = namespace
        .to_string_lossy()
        .chars()
        .filter(char::is_ascii_digit)
        .collect();
    format!("nptl-test-{namespace}-")
}

/// Removes what test processes that were killed have left.
fn sweep(place: &Path) {
    let prefix = name_prefix();
    for entry in std::fs::read_dir(place).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(&prefix));
        let Some((owner, _)) = owner.and_then(|name| name.split_once('-')) else {
            continue;
        };
        if !Path::new("/proc").join(owner).exists() {
            for nested in std::fs::read_dir(entry.path())
                .into_iter()
                .flatten()
                .flatten()
            {
                let _ = std::fs::remove_dir(nested.path());
            }
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}

struct Mount {
    root: PathBuf,
    point: PathBuf,
    options: String,
    unified: bool,
}

fn mounts() -> Vec<Mount> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let (place, kind) = line.split_once(" - ")?;
            let mut place = place.split(' ').skip(3);
            let mut kind = kind.split(' ');
            let unified = match kind.next()? {
                "cgroup" => false,
                "cgroup2" => true,
                _ => return None,
            };
            Some(Mount {
                root: place.next()?.into(),
                point: place.next()?.into(),
                options: kind.nth(1)?.to_owned(),
                unified,
            })
        })
        .collect()
}

impl Mount {
    fn has(&self, controller: &str) -> bool {
        !self.unified && self.options.split(',').any(|option| option == controller)
    }

    /// The directory in which a cgroup with this controller can be made: this process's own in v1; in v2
    /// the nearest one that already hands the controller on, since enabling it there would change other
    /// people's cgroups.
    fn place_for(&self, controller: &str) -> Option<CgroupDir> {
        let own = self.own_directory(controller);
        if !self.unified || controller.is_empty() {
            return Some(CgroupDir {
                path: own,
                unified: self.unified,
            });
        }
        own.ancestors()
            .take_while(|path| path.starts_with(&self.point))
            .find(|path| {
                let control = std::fs::read_to_string(path.join("cgroup.subtree_control"));
                control.is_ok_and(|text| text.split_whitespace().any(|name| name == controller))
            })
            .map(|path| CgroupDir {
                path: path.to_owned(),
                unified: true,
            })
    }

    fn own_directory(&self, controller: &str) -> PathBuf {
        let text = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let own = text.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let mut names = fields.next()?.split(',');
            let path = fields.next()?;
            let wanted = if self.unified { "" } else { controller };
            names
                .any(|name| name == wanted)
                .then(|| PathBuf::from(path))
        });
        // A path outside the mounted part of the hierarchy cannot be named; the mount's top can.
        match own.as_deref().map(|own| own.strip_prefix(&self.root)) {
            Some(Ok(below)) => self.point.join(below),
            _ => self.point.clone(),
        }
    }
}
