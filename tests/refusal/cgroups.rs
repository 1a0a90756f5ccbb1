//! Where the cgroup of a refusal lies, in places that are hard to read: far below the root, under a path longer than any
//! buffer, beside thousands of mounts, under files that are mounted over the cgroup's own.

use std::ffi::{CStr, CString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nptl::diagnose::{CauseKind, CgroupPlace};
use nptl::{Builder, Cause, Certainty, RetryPolicy, SpawnError, diagnose};
use support::{Cgroup, case, child, inherited_cgroup, or_skip, report};

const ROUNDS: usize = 20;

/// The refusals of one thread more, so often.
fn refusals() -> Vec<SpawnError> {
    let builder = || {
        Builder::new()
            .stack_size(64 << 10)
            .retry(RetryPolicy::default())
    };
    let asked = (0..ROUNDS).map(|_| builder().spawn(|| ()).err());
    asked.map(|error| error.expect("a refusal")).collect()
}

fn pids(error: &SpawnError) -> diagnose::PidsCgroup {
    match *error.cause() {
        Cause::PidsCgroup(cgroup) => cgroup,
        _ => panic!("{error}\n{}", error.report()),
    }
}

fn is_proven_at(error: &SpawnError, directory: &Path) {
    let found = pids(error).directory;
    assert_eq!(found.to_str(), directory.to_str(), "{error}");
    assert_eq!(error.certainty(), Certainty::Proven, "{}", error.report());
}

/// A child cgroup for each name, from the top down.
fn nest(top: &Path, names: impl Iterator<Item = String>) -> Vec<PathBuf> {
    let mut made = vec![top.to_owned()];
    for name in names {
        let below = made[made.len() - 1].join(name);
        std::fs::create_dir(&below).expect("a cgroup");
        made.push(below);
    }
    made.split_off(1)
}

/// `names` of cgroups below one that is full. It is the one that is named.
fn full_above(test: &str, names: fn() -> Vec<String>) {
    if case().is_some() {
        nptl::prepare().expect("good times");
        let top = inherited_cgroup(0);
        let lowest = nest(top.path(), names().into_iter()).pop().expect("one");
        std::fs::write(lowest.join("cgroup.procs"), "0").expect("a move");
        top.set("pids.max", top.tasks());
        for error in refusals() {
            is_proven_at(&error, top.path());
            assert_eq!(pids(&error).place, CgroupPlace::Ancestor);
        }
        return report("path", lowest.as_os_str().len());
    }
    let outer = or_skip!(Cgroup::pids());
    let top = outer.nested().expect("a cgroup below");
    let output = or_skip!(child(test, "").cgroup(&top).run());
    let mut made: Vec<_> = names()
        .into_iter()
        .scan(top.path().to_owned(), |path, name| {
            path.push(name);
            Some(path.clone())
        })
        .collect();
    while let Some(cgroup) = made.pop() {
        std::fs::remove_dir(&cgroup).expect("an empty cgroup");
    }
    let output = output.success();
    if output.skipped().is_none() {
        println!("{} bytes", output.get("path").expect("a length"));
    }
}

/// As deep as a container in a container in a pod.
#[test]
fn a_cgroup_seventeen_levels_up_is_named() {
    let test = "cgroups::a_cgroup_seventeen_levels_up_is_named";
    full_above(test, || (0..16).map(|level| format!("{level}")).collect());
}

#[test]
fn a_path_of_more_than_a_thousand_bytes_is_followed() {
    let test = "cgroups::a_path_of_more_than_a_thousand_bytes_is_followed";
    full_above(test, || {
        (0..8).map(|level| format!("{level}").repeat(250)).collect()
    });
}

fn c_string(path: &Path) -> CString {
    CString::new(path.as_os_str().as_encoded_bytes()).expect("no NUL")
}

/// Mounts of this thread alone, from here on.
fn own_mounts() -> Result<(), String> {
    // SAFETY: the namespace is this thread's own; NUL-terminated strings.
    let done = unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && mount(None, c"/", None, libc::MS_REC | libc::MS_PRIVATE)
    };
    done.then_some(())
        .ok_or_else(|| std::io::Error::last_os_error().to_string())
}

/// # Safety
/// The mounts must be the caller's own.
unsafe fn mount(from: Option<&CStr>, to: &CStr, kind: Option<&CStr>, flags: u64) -> bool {
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    let data = match kind {
        Some(kind) if kind == c"cgroup" => c"pids".as_ptr().cast(),
        _ => std::ptr::null(),
    };
    // SAFETY: NUL-terminated strings, or none.
    unsafe { libc::mount(pointer(from), to.as_ptr(), pointer(kind), flags, data) == 0 }
}

/// The table of mounts is read once, in good times if the program says so, and not for each refusal.
#[test]
fn thousands_of_mounts_cost_a_refusal_nothing() {
    let test = "cgroups::thousands_of_mounts_cost_a_refusal_nothing";
    if let Some(name) = case() {
        or_skip!(own_mounts());
        let cgroup = inherited_cgroup(0);
        let point = cgroup
            .path()
            .ancestors()
            .find(|path| is_mount_point(path))
            .expect("a mount");
        let directory = std::env::temp_dir();
        let (from, to) = (c_string(&directory), c_string(point));
        // SAFETY: the mounts are this process's own.
        let mounted = unsafe {
            (0..5000).all(|_| mount(Some(&from), &from, None, libc::MS_BIND)) && {
                // The kernel lists mounts by age: so it comes last.
                let kind = if cgroup.is_unified() {
                    c"cgroup2"
                } else {
                    c"cgroup"
                };
                libc::umount2(to.as_ptr(), libc::MNT_DETACH);
                mount(Some(kind), &to, Some(kind), 0)
            }
        };
        assert!(mounted, "{}", std::io::Error::last_os_error());
        match &*name {
            "prepared" => nptl::prepare().expect("good times"),
            _ => drop(nptl::spawn(|| ()).expect("good times").join()),
        }
        nptl::StackCache::global().clear();
        std::thread::sleep(Duration::from_millis(30));
        cgroup.set("pids.max", cgroup.tasks());
        let answers = refusals();
        answers
            .iter()
            .for_each(|error| is_proven_at(error, cgroup.path()));
        let mut times: Vec<_> = answers.iter().map(SpawnError::time_spent).collect();
        report("first", format_args!("{:?}", times[0]));
        times.sort_unstable();
        report("median", times[ROUNDS / 2].as_micros());
        return;
    }
    for name in ["prepared", "not prepared"] {
        let cgroup = or_skip!(Cgroup::pids());
        let output = or_skip!(child(test, name).cgroup(&cgroup).run()).success();
        if output.skipped().is_some() {
            continue;
        }
        let said = |key| output.get(key).unwrap_or_default();
        println!(
            "{name}: first {}, median {} µs",
            said("first"),
            said("median")
        );
        let median: u64 = said("median").parse().expect("a number");
        assert!(median < 1000, "{output}");
    }
}

fn is_mount_point(path: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("a table");
    table
        .lines()
        .any(|line| line.split(' ').nth(4) == path.to_str())
}

/// The cgroup around it is full, and files that say the same of the thread's own are mounted over its own.
#[test]
fn files_mounted_over_those_of_a_cgroup_are_not_believed() {
    let test = "cgroups::files_mounted_over_those_of_a_cgroup_are_not_believed";
    if case().is_some() {
        nptl::prepare().expect("good times");
        nptl::StackCache::global().clear();
        let inner = inherited_cgroup(0);
        let outer = inner.path().parent().expect("a parent");
        or_skip!(own_mounts());
        std::fs::write(outer.join("pids.max"), inner.tasks().to_string()).expect("pids.max");
        let source = std::env::temp_dir().join(format!("nptl-covered-{}", std::process::id()));
        std::fs::write(&source, format!("{}\n", inner.tasks())).expect("a file");
        for file in ["pids.max", "pids.current"] {
            let (from, to) = (c_string(&source), c_string(&inner.path().join(file)));
            // SAFETY: the mounts are this process's own.
            let covered = unsafe { mount(Some(&from), &to, None, libc::MS_BIND) };
            assert!(covered, "{}", std::io::Error::last_os_error());
        }
        let _ = std::fs::remove_file(&source);
        for error in refusals() {
            let named = match *error.cause() {
                Cause::PidsCgroup(cgroup) => Some(cgroup.directory),
                _ => None,
            };
            let own = inner.path().to_str();
            assert!(
                named.is_none_or(|named| named.to_str() != own),
                "{}",
                error.report()
            );
            let kind = error.cause().kind();
            let possible = error.alternatives().contains(CauseKind::PidsCgroup);
            assert!(
                possible || kind == CauseKind::PidsCgroup,
                "{}",
                error.report()
            );
        }
        return report("done", "yes");
    }
    let inner = or_skip!(Cgroup::pids().and_then(|outer| outer.nested()));
    or_skip!(child(test, "").cgroup(&inner).run()).success();
}
