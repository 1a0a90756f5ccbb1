//! A machine that is out of something, where the evidence cannot be read either: no /proc, no free descriptor, a
//! cgroup out of sight. The error still comes back, what was not read is absent, and no limit is named that did
//! not refuse: an inferred cause leaves the true one possible, a proven one is true.

use std::ffi::{CStr, CString};

use nix::errno::Errno;
use nptl::diagnose::{CauseKind, CgroupPlace, PidLevel};
use nptl::{Builder, Cause, Certainty, RetryPolicy, SpawnError, Step, diagnose};
use support::{
    Cgroup, Child, Sleepers, become_unused_user, case, child, deny, inherited_cgroup, or_skip,
    report, set_rlimit, supervised,
};

const ROUNDS: usize = 10;
const STACK: usize = 64 << 20;

/// What cannot be read.
const BLIND: [&str; 3] = [
    "no /proc",
    "no descriptor allowed",
    "table of descriptors full",
];

/// From here on nothing can be opened.
fn become_blind(how: &str) {
    match how {
        // An empty directory in its place since before exec.
        "no /proc" => assert!(!std::path::Path::new("/proc/self").exists()),
        "no descriptor allowed" => set_rlimit(libc::RLIMIT_NOFILE, 0),
        _ => {
            set_rlimit(libc::RLIMIT_NOFILE, 64);
            // SAFETY: descriptors that end with the process.
            while unsafe { libc::dup(1) } >= 0 {}
        }
    }
}

/// A limit, and what a spawn says that meets it blind.
struct Truth {
    name: &'static str,
    step: Step,
    errno: Errno,
    /// The true cause.
    truth: CauseKind,
    /// Whether it is named, and then inferred; else it is unknown. Without /proc nothing is known of filters and tracers, so
    /// that nothing is proven, and hardly anything asked.
    named: bool,
    sandbox: fn(Child) -> Result<Child, String>,
    /// Puts the limit in the way.
    obstruct: fn() -> Result<(), String>,
}

const fn truth(name: &'static str, kind: CauseKind, obstruct: fn() -> Result<(), String>) -> Truth {
    Truth {
        name,
        step: Step::Clone,
        errno: Errno::EAGAIN,
        truth: kind,
        named: false,
        sandbox: Ok,
        obstruct,
    }
}

const fn memory(
    name: &'static str,
    kind: CauseKind,
    obstruct: fn() -> Result<(), String>,
) -> Truth {
    Truth {
        step: Step::MapStack,
        errno: Errno::ENOMEM,
        ..truth(name, kind, obstruct)
    }
}

const TRUTHS: [Truth; 15] = [
    // The calibration reads nothing either.
    truth("first-spawn", CauseKind::UserProcesses, || {
        become_unused_user()?;
        set_rlimit(libc::RLIMIT_NPROC, 1);
        Ok(())
    }),
    truth("rlimit-nproc", CauseKind::UserProcesses, || {
        become_unused_user()?;
        set_rlimit(libc::RLIMIT_NPROC, 1);
        Ok(())
    }),
    // Scheduling is a file or a call that a filter may kill for.
    truth("deadline", CauseKind::DeadlineScheduling, || {
        schedule(libc::SCHED_DEADLINE as u32)
    }),
    Truth {
        named: true,
        sandbox: |child| Ok(child.pid_namespace(Some(400))),
        ..truth("pid-numbers", CauseKind::PidNumbers, || {
            let mut sleepers = Sleepers::default();
            sleepers.add(500).expect_err("no number left");
            std::mem::forget(sleepers);
            Ok(())
        })
    },
    // Only its files distinguish a cgroup from what comes and goes.
    Truth {
        sandbox: |child| Ok(child.cgroup(&Cgroup::pids()?)),
        ..truth("pids-cgroup", CauseKind::PidsCgroup, || {
            let cgroup = inherited_cgroup(0);
            cgroup.set("pids.max", cgroup.tasks());
            Ok(())
        })
    },
    Truth {
        named: true,
        ..truth("seccomp-clone3", CauseKind::Seccomp, || {
            deny(libc::SYS_clone3, libc::EAGAIN).install();
            Ok(())
        })
    },
    truth("seccomp-clone", CauseKind::Seccomp, || {
        deny(libc::SYS_clone3, libc::ENOSYS).install();
        deny(libc::SYS_clone, libc::EAGAIN)
            .when_set(0, libc::CLONE_THREAD as u64)
            .install();
        Ok(())
    }),
    Truth {
        errno: Errno::EINVAL,
        ..truth(
            "unshared-pid-namespace",
            CauseKind::UnsharedPidNamespace,
            || {
                // SAFETY: changes only where later children of this process live.
                match unsafe { libc::unshare(libc::CLONE_NEWPID) } {
                    0 => Ok(()),
                    _ => Err(format!("unshare: {}", std::io::Error::last_os_error())),
                }
            },
        )
    },
    memory("rlimit-as", CauseKind::AddressSpace, || {
        set_rlimit(libc::RLIMIT_AS, STACK as u64);
        Ok(())
    }),
    memory("rlimit-data", CauseKind::DataSegment, || {
        set_rlimit(libc::RLIMIT_DATA, STACK as u64);
        Ok(())
    }),
    memory("max-map-count", CauseKind::MapCount, || {
        fill_mappings();
        Ok(())
    }),
    Truth {
        errno: Errno::EAGAIN,
        named: true,
        ..memory("memlock", CauseKind::LockedMemory, || {
            become_unused_user()?;
            set_rlimit(libc::RLIMIT_MEMLOCK, 1 << 20);
            // SAFETY: changes how later mappings are locked.
            match unsafe { libc::mlockall(libc::MCL_FUTURE) } {
                0 => Ok(()),
                _ => Err(format!("mlockall: {}", std::io::Error::last_os_error())),
            }
        })
    },
    memory("overcommit-0", CauseKind::Overcommit, || Ok(())),
    // A mapping that mode 2 refuses is refused by the supervisor in its place.
    memory("overcommit-2", CauseKind::Overcommit, || Ok(())),
    memory("addresses", CauseKind::AddressSpaceExhausted, || Ok(())),
];

fn stack_size(name: &str) -> usize {
    match name {
        // Beyond memory and swap of any machine, within the addresses of a process.
        "overcommit-0" => 32 << 40,
        "addresses" => 0x6000_0000_0000,
        _ => STACK,
    }
}

fn schedule(policy: u32) -> Result<(), String> {
    // SAFETY: all zeroes is a valid structure.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    attributes.size = size_of::<libc::sched_attr>() as u32;
    attributes.sched_policy = policy;
    attributes.sched_runtime = 10_000_000;
    attributes.sched_deadline = 100_000_000;
    attributes.sched_period = 100_000_000;
    // SAFETY: a valid structure of the size that it contains; 0 is the calling thread.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } {
        0 => Ok(()),
        _ => Err(format!(
            "policy {policy}: {}",
            std::io::Error::last_os_error()
        )),
    }
}

/// Until no mapping is left; they end with the process.
fn fill_mappings() {
    let mut protection = libc::PROT_READ;
    loop {
        // Neighbours of different protection do not merge.
        protection ^= libc::PROT_READ;
        // SAFETY: a new private mapping.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                protection,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return;
        }
    }
}

/// Nothing that stands in a file has a value.
fn is_blind(cause: &Cause) -> Result<(), &'static str> {
    let blind = match *cause {
        Cause::UserProcesses(diagnose::UserProcesses {
            uid,
            soft,
            hard,
            initial_user_namespace,
            tasks,
            ..
        }) => {
            (uid, initial_user_namespace, tasks) == (None, None, None)
                && (soft, hard) == (None, None)
        }
        Cause::PidNumbers(diagnose::PidNumbers {
            level,
            pid_max,
            sampled,
            free,
            initial_namespace,
            ..
        }) => {
            level == PidLevel::OwnOrAncestor
                && (pid_max, initial_namespace) == (None, None)
                && (sampled, free) == (0, 0)
        }
        Cause::Seccomp(diagnose::Seccomp { mode, filters, .. }) => (mode, filters) == (None, None),
        Cause::AddressSpace(diagnose::AddressSpace { in_use, limit, .. })
        | Cause::DataSegment(diagnose::DataSegment { in_use, limit, .. })
        | Cause::LockedMemory(diagnose::LockedMemory { in_use, limit, .. }) => {
            (in_use, limit) == (None, None)
        }
        Cause::MapCount(diagnose::MapCount { maximum, .. }) => maximum.is_none(),
        Cause::Overcommit(diagnose::Overcommit {
            mode,
            in_use,
            limit,
            ..
        }) => (mode, in_use, limit) == (None, None, None),
        Cause::AddressSpaceExhausted(diagnose::AddressSpaceExhausted { in_use, .. }) => {
            in_use.is_none()
        }
        Cause::Unknown(diagnose::Unknown {
            tasks,
            threads_max,
            nproc,
            pid_max,
            seccomp,
            ..
        }) => {
            (tasks, threads_max, nproc) == (None, None, None) && (pid_max, seccomp) == (None, None)
        }
        _ => return Err("an unexpected cause"),
    };
    match blind {
        true => Ok(()),
        false => Err("a value that cannot have been read"),
    }
}

fn judge(truth: &Truth, error: &SpawnError) -> Result<(), &'static str> {
    let cause = error.cause();
    if (error.step(), error.errno().raw()) != (truth.step, truth.errno as i32) {
        return Err("another step or errno");
    }
    let expected = match truth.named {
        true => (truth.truth, Certainty::Inferred),
        false => (CauseKind::Unknown, Certainty::Unknown),
    };
    if (cause.kind(), error.certainty()) != expected {
        return Err("another cause or certainty");
    }
    if !truth.named && !error.alternatives().contains(truth.truth) {
        return Err("the true cause is ruled out");
    }
    is_blind(cause)?;
    // Formatted where nothing can be opened, too.
    let text = error.report().to_string();
    if cause.kind() != CauseKind::Unknown && !text.contains("not readable") {
        // These have no value from a file beside the one that is absent.
        return Err("the report does not say what it could not read");
    }
    Ok(())
}

/// The thread that is asked for is the first that meets the limit.
fn prepare() {
    let thread = nptl::spawn(|| ()).expect("a thread without limits");
    thread.join().expect("its end");
    nptl::StackCache::global().clear();
    std::thread::sleep(std::time::Duration::from_millis(30));
}

fn meet(truth: &Truth, how: &str) {
    if truth.name != "first-spawn" {
        prepare();
    }
    // Room for the answers, which are reported afterwards.
    let mut answers = Vec::with_capacity(2 * ROUNDS);
    or_skip!((truth.obstruct)());
    let mut ask = || {
        become_blind(how);
        for policy in [RetryPolicy::default(), RetryPolicy::never()] {
            for _ in 0..ROUNDS {
                let builder = Builder::new().stack_size(stack_size(truth.name));
                answers.push(builder.retry(policy).spawn(|| ()).err());
            }
        }
    };
    match truth.name {
        "overcommit-2" => {
            let result = supervised(
                &[libc::SYS_mmap],
                |call| {
                    let [_, length, protection, ..] = call.arguments;
                    // Charged in mode 2: what can be written, MAP_NORESERVE or not, shared or not.
                    let charged = protection & libc::PROT_WRITE as u64 != 0;
                    (charged && length >= STACK as u64).then_some(libc::ENOMEM)
                },
                &mut ask,
            );
            or_skip!(result);
        }
        _ => ask(),
    }
    // To report the answers takes memory and threads.
    for (resource, value) in [
        (libc::RLIMIT_AS, libc::RLIM_INFINITY),
        (libc::RLIMIT_DATA, libc::RLIM_INFINITY),
    ] {
        set_rlimit(resource, value);
    }
    report("asked", answers.len());
    for answer in &answers {
        match answer {
            None => report("wrong", "granted"),
            Some(error) => {
                if let Err(why) = judge(truth, error) {
                    let report_text = error.report();
                    report("wrong", format_args!("{why}: {error}\n{report_text}"));
                }
            }
        }
    }
    if let Some(Some(error)) = answers.first() {
        report("said", error);
    }
}

#[test]
fn no_answer_is_wrong_where_nothing_can_be_read() {
    let test = "unreadable::no_answer_is_wrong_where_nothing_can_be_read";
    if let Some(name) = case() {
        let (name, how) = name.split_once(": ").expect("two words");
        let truth = TRUTHS.iter().find(|truth| truth.name == name);
        return meet(truth.expect("a truth"), how);
    }
    for truth in &TRUTHS {
        for how in BLIND {
            if truth.name == "overcommit-2" && how == "no descriptor allowed" {
                // The supervisor's poll would be refused as well.
                continue;
            }
            let name = format!("{}: {how}", truth.name);
            let sandbox = (truth.sandbox)(child(test, &name)).map(|child| match how {
                "no /proc" => child.hide_proc(),
                _ => child,
            });
            let output = or_skip!(sandbox.and_then(Child::run)).success();
            if output.skipped().is_some() {
                continue;
            }
            println!("{name}: {}", output.get("said").unwrap_or_default());
            assert_eq!(output.all("wrong"), Vec::<&str>::new(), "{name}");
            assert_eq!(output.get("asked"), Some("20"), "{name}: {output}");
        }
    }
}

/// A cgroup namespace whose root is the cgroup of this thread. Mounted anew, the hierarchy begins there; else its
/// mount leads outside, and this thread's cgroup is not found in it.
fn hide_ancestors(remount: bool) -> Result<(), String> {
    let failed = |what: &str| format!("{what}: {}", std::io::Error::last_os_error());
    let path = |path: &std::path::Path| CString::new(path.as_os_str().as_encoded_bytes());
    let cgroup = inherited_cgroup(0);
    let mount_point = mount_point(&cgroup)?;
    let point = path(&mount_point).map_err(|e| e.to_string())?;
    let (kind, controller): (&CStr, &CStr) = match cgroup.is_unified() {
        true => (c"cgroup2", c""),
        false => (c"cgroup", c"pids"),
    };
    // SAFETY: NUL-terminated strings; the namespaces are this thread's and its children's alone.
    unsafe {
        if libc::unshare(libc::CLONE_NEWCGROUP | libc::CLONE_NEWNS) != 0 {
            return Err(failed("unshare"));
        }
        let private = libc::MS_REC | libc::MS_PRIVATE;
        let none = std::ptr::null();
        libc::mount(c"none".as_ptr(), c"/".as_ptr(), none, private, none.cast());
        if remount {
            libc::umount2(point.as_ptr(), libc::MNT_DETACH);
            let data = controller.as_ptr().cast();
            if libc::mount(kind.as_ptr(), point.as_ptr(), kind.as_ptr(), 0, data) != 0 {
                return Err(failed("mount"));
            }
        }
    }
    Ok(())
}

/// The longest mount point above a cgroup.
fn mount_point(cgroup: &support::CgroupDir) -> Result<std::path::PathBuf, String> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").map_err(|e| e.to_string())?;
    let points = text.lines().filter_map(|line| line.split(' ').nth(4));
    let above = points.map(std::path::PathBuf::from);
    above
        .filter(|point| cgroup.path().starts_with(point))
        .max_by_key(|point| point.as_os_str().len())
        .ok_or_else(|| "no mount".to_owned())
}

/// A limit that no visible directory shows, and one beside it that is hit instead.
#[test]
fn a_cgroup_out_of_sight_is_called_so() {
    let test = "unreadable::a_cgroup_out_of_sight_is_called_so";
    let cases = [
        // Its counter rises in the thread's own cgroup (v1), or nothing else is left (v2).
        ("remounted, ancestor full", CauseKind::PidsCgroup),
        ("remounted, user full", CauseKind::UserProcesses),
        ("not found, ancestor full", CauseKind::PidsCgroup),
        ("not found, own full", CauseKind::PidsCgroup),
        ("not found, user full", CauseKind::UserProcesses),
    ];
    if let Some(name) = case() {
        let kind = cases.iter().find(|case| case.0 == name).expect("a case").1;
        return meet_hidden_cgroup(&name, kind);
    }
    for (name, _) in cases {
        let cgroup = or_skip!(Cgroup::pids().and_then(|outer| outer.nested()));
        let output = or_skip!(child(test, name).cgroup(&cgroup).run()).success();
        if output.skipped().is_some() {
            continue;
        }
        println!("{name}: {}", output.get("said").unwrap_or_default());
        assert_eq!(output.all("wrong"), Vec::<&str>::new(), "{name}");
        assert_eq!(output.get("asked"), Some("20"), "{name}: {output}");
    }
}

fn meet_hidden_cgroup(name: &str, kind: CauseKind) {
    prepare();
    let remount = name.starts_with("remounted");
    let inner = inherited_cgroup(0);
    let outer = inner.path().parent().expect("a parent").join("pids.max");
    let unified = inner.is_unified();
    let tasks = inner.tasks();
    if name.ends_with("ancestor full") {
        std::fs::write(outer, tasks.to_string()).expect("pids.max");
    } else if name.ends_with("own full") {
        inner.set("pids.max", tasks);
    }
    or_skip!(hide_ancestors(remount));
    if name.ends_with("user full") {
        or_skip!(become_unused_user());
        set_rlimit(libc::RLIMIT_NPROC, 1);
    }
    let judge = |error: &SpawnError| match *error.cause() {
        Cause::UserProcesses { .. } if kind == CauseKind::UserProcesses => {
            // Proven by a second refusal only.
            match (error.certainty(), error.attempts() > 1) {
                (Certainty::Proven, true) | (Certainty::Inferred, false) => Ok(()),
                _ => Err("another certainty"),
            }
        }
        Cause::PidsCgroup(diagnose::PidsCgroup {
            directory,
            place,
            current,
            maximum,
            ..
        }) if kind == CauseKind::PidsCgroup => {
            let expected = match remount {
                true => CgroupPlace::Hidden,
                false => CgroupPlace::Unclear,
            };
            let counted = remount && !unified && error.attempts() > 1;
            let certainty = match counted {
                true => Certainty::Proven,
                false => Certainty::Inferred,
            };
            match (directory.is_empty(), current, maximum) {
                _ if place != expected => Err("another place"),
                _ if error.certainty() != certainty => Err("another certainty"),
                (true, None, None) => Ok(()),
                _ => Err("a value that cannot have been read"),
            }
        }
        // What is not seen is named after a second refusal only.
        Cause::Unknown { .. } if kind == CauseKind::PidsCgroup && error.attempts() == 1 => Ok(()),
        Cause::Unknown { .. } => Err("unknown"),
        _ => Err("another cause"),
    };
    let mut count = 0;
    for policy in [RetryPolicy::default(), RetryPolicy::never()] {
        for _ in 0..ROUNDS {
            let builder = Builder::new().stack_size(64 << 10).retry(policy);
            let error = match builder.spawn(|| ()) {
                Ok(_) => {
                    report("wrong", "granted");
                    continue;
                }
                Err(error) => error,
            };
            count += 1;
            if let Err(why) = judge(&error) {
                report("wrong", format_args!("{why}: {error}\n{}", error.report()));
            }
            if count == 1 {
                report("said", &error);
            }
        }
    }
    report("asked", count);
}
