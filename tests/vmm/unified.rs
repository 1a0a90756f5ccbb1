//! Cgroups of v2 that a thread is made in, with controllers: only where the machine has handed them on (`.ci/guest`).

use super::settings::{affinity, open, refused};
use nptl::diagnose::{Cause, CgroupPlace};
use nptl::{Builder, Certainty, RetryPolicy, SpawnError, Step};
use std::path::{Path, PathBuf};
use support::{Cgroup, case, child, or_skip, skip};

const PLACE: &str = "NPTL_TEST_PLACE";

/// Runs `work` in a process that is in a cgroup of its own, with the directory of a threaded one inside that.
fn in_a_threaded_domain(
    test: &str,
    domain: fn() -> Result<Cgroup, String>,
    work: impl FnOnce(&Path),
) {
    if case().is_some() {
        return work(&PathBuf::from(std::env::var_os(PLACE).unwrap()));
    }
    let domain = or_skip!(domain());
    if !domain.is_unified() {
        skip!("the controller is one of v1 here");
    }
    let threaded = or_skip!(domain.nested());
    threaded.set("cgroup.type", "threaded");
    let child = child(test, "run").cgroup(&domain);
    or_skip!(child.env(PLACE, threaded.path()).run()).success();
}

#[track_caller]
fn expect_full(error: &SpawnError, directory: &Path, place: CgroupPlace) {
    match error.cause() {
        Cause::PidsCgroup(full) => {
            assert_eq!(full.directory.as_ref(), directory, "{}", error.report());
            assert_eq!((full.version, full.place), (2, place));
        }
        cause => panic!("{cause}\n{}", error.report()),
    }
}

/// The limit that counts is that of the requested cgroup; the one of the creator has room.
#[test]
fn a_full_cgroup_that_was_requested_is_named_with_its_directory() {
    const TEST: &str = "unified::a_full_cgroup_that_was_requested_is_named_with_its_directory";
    in_a_threaded_domain(TEST, Cgroup::pids, |cgroup| {
        let set = |value: &str| std::fs::write(cgroup.join("pids.max"), value).unwrap();
        let builder = Builder::new().cgroup(open(cgroup));
        set("1");
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let first = builder.clone().spawn(move || wait.recv()).unwrap();
        let error = refused(&builder, Step::Clone, libc::EAGAIN);
        expect_full(&error, cgroup, CgroupPlace::Own);
        assert_eq!(error.certainty(), Certainty::Proven, "{}", error.report());
        assert!(!error.is_transient(), "{}", error.report());
        let never = builder.clone().retry(RetryPolicy::never());
        let error = refused(&never, Step::Clone, libc::EAGAIN);
        expect_full(&error, cgroup, CgroupPlace::Own);
        assert_eq!(error.attempts(), 1);
        // One inside it, without a limit of its own: the one above is named.
        let inner = cgroup.join("inner");
        std::fs::create_dir(&inner).unwrap();
        std::fs::write(inner.join("cgroup.type"), "threaded").unwrap();
        let error = refused(
            &Builder::new().cgroup(open(&inner)),
            Step::Clone,
            libc::EAGAIN,
        );
        expect_full(&error, cgroup, CgroupPlace::Ancestor);
        std::fs::remove_dir(&inner).unwrap();
        // The creator's cgroup has room for others.
        nptl::spawn(|| ()).unwrap().join().unwrap();
        drop(end);
        let _ = first.join().unwrap();
        set("max");
        builder.spawn(|| ()).unwrap().join().unwrap();
    });
}

#[test]
fn the_cpuset_of_the_requested_cgroup_counts() {
    const TEST: &str = "unified::the_cpuset_of_the_requested_cgroup_counts";
    in_a_threaded_domain(TEST, Cgroup::cpuset, |cgroup| {
        let cpus = affinity();
        std::fs::write(cgroup.join("cpuset.cpus"), cpus[0].to_string()).unwrap();
        let builder = Builder::new().cgroup(open(cgroup));
        assert_eq!(
            builder.clone().spawn(affinity).unwrap().join().unwrap(),
            [cpus[0]]
        );
        let Some(other) = cpus.get(1) else { return };
        for (requested, partly) in [(vec![*other], false), (vec![cpus[0], *other], true)] {
            let builder = builder.clone().cpu_affinity(requested);
            let error = refused(&builder, Step::Affinity, libc::EINVAL);
            match error.cause() {
                Cause::OutsideCpuset(cpuset) => {
                    assert_eq!((cpuset.missing, cpuset.partly), (*other, partly));
                    assert_eq!(cpuset.directory.as_ref(), cgroup);
                }
                cause => panic!("{cause}"),
            }
            assert_eq!(error.certainty(), Certainty::Proven, "{}", error.report());
        }
        // And one inside it that has no controller of its own is a part of it.
        let inner = cgroup.join("inner");
        std::fs::create_dir(&inner).unwrap();
        std::fs::write(inner.join("cgroup.type"), "threaded").unwrap();
        let builder = Builder::new().cgroup(open(&inner)).cpu_affinity([*other]);
        let error = refused(&builder, Step::Affinity, libc::EINVAL);
        match error.cause() {
            Cause::OutsideCpuset(cpuset) => assert_eq!(cpuset.directory.as_ref(), cgroup),
            cause => panic!("{cause}"),
        }
        std::fs::remove_dir(&inner).unwrap();
    });
}
