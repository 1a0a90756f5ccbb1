//! The test support itself: a sandbox that silently does nothing would let every other test pass.

use std::io::{PipeReader, PipeWriter, Read};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use support::{
    Cgroup, Sleepers, Snapshot, become_unused_user, case, child, deny, inherited_cgroup, or_skip,
    report, set_rlimit,
};

#[test]
fn reports_and_status_come_back() {
    if case().is_some() {
        report("text", "two\nlines");
        eprintln!("an error line");
        std::process::exit(7);
    }
    let output = or_skip!(child("sandbox::reports_and_status_come_back", "run").run());
    assert_eq!(output.get("text"), Some("two\\nlines"));
    assert_eq!(output.code(), Some(7));
    assert_eq!(output.stderr, "an error line\n");
}

#[test]
#[should_panic(expected = "no test named misspelt")]
fn a_misspelt_test_name_is_no_success() {
    let _ = child("misspelt", "run").run();
}

#[test]
fn a_hanging_child_is_killed_with_its_descendants() {
    match case().as_deref() {
        Some("hang") => {
            let mut sleepers = Sleepers::default();
            sleepers.add(1).expect("fork");
            report(
                "descendant",
                Command::new("sleep")
                    .arg("1000")
                    .spawn()
                    .expect("sleep")
                    .id(),
            );
            loop {
                std::thread::park();
            }
        }
        Some(_) => unreachable!(),
        None => {}
    }
    let hanging = child(
        "sandbox::a_hanging_child_is_killed_with_its_descendants",
        "hang",
    );
    let output = or_skip!(hanging.time_limit(Duration::from_secs(2)).run());
    assert_eq!(output.timed_out, Some(Duration::from_secs(2)));
    assert_eq!(output.signal(), Some(libc::SIGKILL));
    let descendant: i32 = output
        .get("descendant")
        .expect("a report")
        .parse()
        .expect("a pid");
    wait_until_gone(descendant);
}

/// A killed process whose parent has ended is reaped by its new parent, some time later.
fn wait_until_gone(pid: i32) {
    // SAFETY: pidfd_open takes a process id and flags.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if pidfd < 0 {
        return;
    }
    let mut entry = libc::pollfd {
        fd: i32::try_from(pidfd).expect("a descriptor"),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid entry, and a descriptor that only we own.
    let ended = unsafe {
        let ended = libc::poll(&raw mut entry, 1, 60_000);
        libc::close(entry.fd);
        ended
    };
    assert_eq!(ended, 1, "process {pid} still runs");
}

#[test]
fn a_deadly_signal_comes_back_through_namespaces() {
    if case().is_some() {
        report("pid", std::process::id());
        std::process::abort();
    }
    let name = "sandbox::a_deadly_signal_comes_back_through_namespaces";
    let output = or_skip!(child(name, "abort").run());
    assert_eq!(output.signal(), Some(libc::SIGABRT), "{output}");
    let nested = child(name, "abort").pid_namespace(None).pid_namespace(None);
    let output = or_skip!(nested.run());
    assert_eq!(output.signal(), Some(libc::SIGABRT), "{output}");
    assert_eq!(output.get("pid"), Some("2"));
}

#[test]
fn pid_numbers_run_out_in_the_outer_namespace() {
    if case().is_some() {
        let own = std::fs::read_to_string("/proc/sys/kernel/pid_max").expect("pid_max");
        report("pid_max", own.trim());
        let error = Sleepers::default().add(400).expect_err("a refusal");
        report("errno", error.raw_os_error().unwrap_or(0));
        return;
    }
    let before = std::fs::read_to_string("/proc/sys/kernel/pid_max").expect("pid_max");
    let name = "sandbox::pid_numbers_run_out_in_the_outer_namespace";
    let outer = or_skip!(
        child(name, "fill")
            .pid_namespace(Some(320))
            .pid_namespace(None)
            .run()
    )
    .success();
    assert_eq!(outer.get("errno"), Some("11"), "{outer}");
    assert_ne!(outer.get("pid_max"), Some("320"));
    let own = or_skip!(child(name, "fill").pid_namespace(Some(320)).run()).success();
    assert_eq!(own.get("errno"), Some("11"), "{own}");
    assert_eq!(own.get("pid_max"), Some("320"));
    let after = std::fs::read_to_string("/proc/sys/kernel/pid_max").expect("pid_max");
    assert_eq!(before, after, "the machine's own limit was touched");
}

#[test]
fn pids_cgroup_refuses_and_is_removed() {
    if case().is_some() {
        let cgroup = inherited_cgroup(0);
        let limit = cgroup.path().parent().expect("a parent").join("pids.max");
        let tasks = cgroup.tasks();
        std::fs::write(limit, (tasks + 2).to_string()).expect("pids.max");
        let mut sleepers = Sleepers::default();
        let error = sleepers.add(10).expect_err("a refusal");
        report("errno", error.raw_os_error().unwrap_or(0));
        report("added", sleepers.len());
        // Left for the parent's clean-up.
        std::mem::forget(sleepers);
        return;
    }
    let outer = or_skip!(Cgroup::pids());
    let inner = or_skip!(outer.nested());
    let path = outer.path().to_owned();
    let output = or_skip!(
        child("sandbox::pids_cgroup_refuses_and_is_removed", "fill")
            .cgroup(&inner)
            .run()
    )
    .success();
    assert_eq!(
        (output.get("errno"), output.get("added")),
        (Some("11"), Some("2")),
        "{output}"
    );
    drop((outer, inner));
    assert!(!path.exists());
}

#[test]
fn pids_cgroup_is_removed_after_a_panic_and_a_kill() {
    if case().is_some() {
        let mut sleepers = Sleepers::default();
        sleepers.add(3).expect("fork");
        loop {
            std::thread::park();
        }
    }
    let outer = or_skip!(Cgroup::pids());
    let path = outer.path().to_owned();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let outer = outer;
        let hanging = child(
            "sandbox::pids_cgroup_is_removed_after_a_panic_and_a_kill",
            "hang",
        )
        .cgroup(&outer);
        let _running = hanging.spawn().expect("the child");
        panic!("on purpose");
    }));
    assert!(panicked.is_err());
    assert!(!path.exists());
}

#[test]
fn memory_cgroup_counts_the_child() {
    if case().is_some() {
        let cgroup = inherited_cgroup(0);
        cgroup.set_memory_limit(64 << 20);
        let file = if cgroup.is_unified() {
            "memory.current"
        } else {
            "memory.usage_in_bytes"
        };
        let usage = || cgroup.get(file).parse::<u64>().expect("a number");
        let before = usage();
        let block = vec![1_u8; 8 << 20];
        report(
            "grown",
            usage().saturating_sub(before) >= block.len() as u64 / 2,
        );
        return;
    }
    let cgroup = or_skip!(Cgroup::memory());
    let output = or_skip!(
        child("sandbox::memory_cgroup_counts_the_child", "use")
            .cgroup(&cgroup)
            .run()
    )
    .success();
    assert_eq!(output.get("grown"), Some("true"));
}

#[test]
fn unified_cgroup_holds_the_child() {
    if case().is_some() {
        report(
            "where",
            std::fs::read_to_string("/proc/self/cgroup").expect("cgroup"),
        );
        return;
    }
    let cgroup = or_skip!(Cgroup::unified());
    let output = or_skip!(
        child("sandbox::unified_cgroup_holds_the_child", "look")
            .cgroup(&cgroup)
            .run()
    )
    .success();
    let name = cgroup
        .path()
        .file_name()
        .expect("a name")
        .to_str()
        .expect("text");
    assert!(
        output.get("where").expect("a report").contains(name),
        "{output}"
    );
}

#[test]
fn rlimit_nproc_refuses_an_unused_user() {
    if case().is_some() {
        or_skip!(become_unused_user());
        let tasks = Snapshot::take().kernel_threads;
        set_rlimit(libc::RLIMIT_NPROC, tasks + 1);
        let mut sleepers = Sleepers::default();
        let error = sleepers.add(10).expect_err("a refusal");
        report("errno", error.raw_os_error().unwrap_or(0));
        report("added", sleepers.len());
        return;
    }
    let output =
        or_skip!(child("sandbox::rlimit_nproc_refuses_an_unused_user", "fill").run()).success();
    if output.skipped().is_none() {
        assert_eq!(
            (output.get("errno"), output.get("added")),
            (Some("11"), Some("1")),
            "{output}"
        );
    }
}

#[test]
fn user_namespace_gives_namespaces_without_root() {
    if case().is_some() {
        report(
            "uid_map",
            std::fs::read_to_string("/proc/self/uid_map")
                .expect("uid_map")
                .trim(),
        );
        report("pid", std::process::id());
        report("root", support::is_root());
        return;
    }
    let name = "sandbox::user_namespace_gives_namespaces_without_root";
    let output = or_skip!(
        child(name, "look")
            .user_namespace()
            .pid_namespace(Some(400))
            .run()
    )
    .success();
    let map: Vec<_> = output
        .get("uid_map")
        .expect("a report")
        .split_whitespace()
        .collect();
    assert_eq!((map[0], map[2]), ("0", "1"));
    assert_eq!(
        (output.get("pid"), output.get("root")),
        (Some("2"), Some("true"))
    );
}

#[test]
fn proc_can_be_hidden() {
    if case().is_some() {
        report(
            "entries",
            std::fs::read_dir("/proc").expect("/proc").count(),
        );
        return;
    }
    let output = or_skip!(
        child("sandbox::proc_can_be_hidden", "look")
            .hide_proc()
            .run()
    )
    .success();
    assert_eq!(output.get("entries"), Some("0"));
}

#[test]
fn rlimit_holds_from_exec_on() {
    if case().is_some() {
        // SAFETY: a new private mapping that nothing else uses; it is refused anyway.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                1 << 33,
                0,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        report("refused", page == libc::MAP_FAILED);
        return;
    }
    let output = or_skip!(
        child("sandbox::rlimit_holds_from_exec_on", "map")
            .rlimit(libc::RLIMIT_AS, 1 << 32)
            .run()
    )
    .success();
    assert_eq!(output.get("refused"), Some("true"));
}

#[test]
fn seccomp_denies_by_argument() {
    if case().is_some() {
        deny(libc::SYS_clone3, libc::ENOSYS).install();
        deny(libc::SYS_clone, libc::EAGAIN)
            .when_set(0, libc::CLONE_THREAD as u64)
            .install();
        deny(libc::SYS_madvise, libc::EINVAL).when(2, 102).install();
        let refused = std::thread::Builder::new()
            .spawn(|| {})
            .expect_err("a refusal");
        report("thread", refused.raw_os_error().unwrap_or(0));
        report("process", Command::new("true").status().expect("a process"));
        return;
    }
    let output = or_skip!(child("sandbox::seccomp_denies_by_argument", "deny").run()).success();
    assert_eq!(output.get("thread"), Some("11"));
    assert_eq!(output.get("process"), Some("exit status: 0"));
}

#[test]
fn seccomp_allow_list_kills() {
    match case().as_deref() {
        Some(case) => {
            support::allow_only(support::firecracker_vcpu_filter());
            if case == "bad" {
                // SAFETY: getpid has no preconditions.
                unsafe { libc::syscall(libc::SYS_getpid) };
            }
            report("alive", "yes");
            // SAFETY: ends the process at once; the filter allows nothing of an ordinary end.
            unsafe { libc::_exit(0) }
        }
        None => {
            let name = "sandbox::seccomp_allow_list_kills";
            let good = or_skip!(child(name, "good").run()).success();
            assert_eq!(good.get("alive"), Some("yes"));
            let bad = or_skip!(child(name, "bad").run());
            assert_eq!(
                (bad.signal(), bad.get("alive")),
                (Some(libc::SIGSYS), None),
                "{bad}"
            );
        }
    }
}

#[test]
fn std_threads_go_without_signal_stacks() {
    if let Some(case) = case() {
        let disabled = std::thread::spawn(|| {
            // SAFETY: all zeroes is a valid structure, and a place for the result.
            unsafe {
                let mut stack: libc::stack_t = std::mem::zeroed();
                libc::sigaltstack(std::ptr::null(), &raw mut stack);
                stack.ss_flags & libc::SS_DISABLE != 0
            }
        });
        report("disabled", disabled.join().expect("its end"));
        if case == "without" {
            // SAFETY: none: no object has this address.
            unsafe { std::ptr::without_provenance_mut::<u8>(4096).write_volatile(1) };
        }
        return;
    }
    let name = "sandbox::std_threads_go_without_signal_stacks";
    let with = or_skip!(child(name, "with").run()).success();
    assert_eq!(with.get("disabled"), Some("false"), "{with}");
    let without = or_skip!(child(name, "without").no_signal_stacks().run());
    assert_eq!(without.get("disabled"), Some("true"), "{without}");
    assert_eq!(without.signal(), Some(libc::SIGSEGV), "{without}");
}

/// A joined thread counts until the kernel has taken it back. A tracer that does not look at its end makes that last.
#[test]
fn joined_threads_are_awaited() {
    if case().is_some() {
        nptl::spawn(|| ()).unwrap().join().unwrap();
        support::await_reaping();
        let before = Snapshot::take().kernel_threads;
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let thread = nptl::spawn(move || wait.recv().is_err()).expect("a thread");
        let (mut ready, ready_end) = std::io::pipe().expect("a pipe");
        let (go_end, go) = std::io::pipe().expect("a pipe");
        // SAFETY: a number, which lets any process of this user trace this one where Yama would not.
        unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY) };
        // SAFETY: the child makes only system calls, on what was prepared before, and never returns.
        let tracer = unsafe { libc::fork() };
        assert_ne!(tracer, -1, "{}", std::io::Error::last_os_error());
        if tracer == 0 {
            trace(thread.tid(), &ready_end, (&go_end, &go));
        }
        let mut answer = [0];
        ready.read_exact(&mut answer).expect("an answer");
        if answer != *b"y" {
            support::skip!("a process may not trace its parent");
        }
        drop(end);
        assert!(thread.join().expect("its end"));
        assert_eq!(Snapshot::take().kernel_threads, before + 1);
        drop((go_end, go));
        support::await_reaping();
        assert_eq!(Snapshot::take().kernel_threads, before);
        report("awaited", "yes");
        return;
    }
    let output = or_skip!(child("sandbox::joined_threads_are_awaited", "traced").run()).success();
    if output.skipped().is_none() {
        assert_eq!(output.get("awaited"), Some("yes"), "{output}");
    }
}

/// The tracer's whole life: holds the thread, and lets it go a little after its parent has closed `go`.
fn trace(tid: i32, ready: &PipeWriter, (go_end, go): (&PipeReader, &PipeWriter)) -> ! {
    // SAFETY: system calls on plain numbers and valid places.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::close(go.as_raw_fd());
        let nothing = std::ptr::null_mut::<libc::c_void>();
        let answer = match libc::ptrace(libc::PTRACE_SEIZE, tid, nothing, nothing) {
            0 => c"y",
            _ => c"n",
        };
        libc::write(ready.as_raw_fd(), answer.as_ptr().cast(), 1);
        let mut byte = 0_u8;
        libc::read(go_end.as_raw_fd(), (&raw mut byte).cast(), 1);
        libc::usleep(100_000);
        libc::_exit(0)
    }
}

#[test]
fn snapshots_show_what_is_left() {
    if case().is_some() {
        drop(Snapshot::take());
        let before = Snapshot::take();
        before.diff(&Snapshot::take()).expect_nothing_left();
        let file = std::fs::File::open("/dev/null").expect("/dev/null");
        let block = vec![1_u8; 4 << 20];
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || wait.recv());
        let difference = before.diff(&Snapshot::take());
        println!("{difference}");
        assert_eq!(
            (
                difference.fds,
                difference.kernel_threads,
                difference.glibc_threads
            ),
            (1, 1, 1)
        );
        assert!(difference.mappings >= 2 && difference.malloc_bytes >= block.len() as i64);
        assert!(difference.resident_bytes >= block.len() as i64);
        assert!(difference.fds_new[0].ends_with("/dev/null"), "{difference}");
        drop((file, end));
        let _ = thread.join();
        return;
    }
    print!(
        "{}",
        or_skip!(child("sandbox::snapshots_show_what_is_left", "leak").run())
            .success()
            .stdout
    );
}

#[test]
fn running_child_talks() {
    if case().is_some() {
        println!("READY");
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).expect("a line");
        report("heard", line.trim());
        return;
    }
    let mut running = or_skip!(child("sandbox::running_child_talks", "talk").spawn());
    assert!(running.wait_for("READY"));
    running.send("hello");
    assert_eq!(running.finish().success().get("heard"), Some("hello"));
}
