//! What `headroom` says against what happens: threads are started until one is refused.

use nptl::diagnose::{CauseKind, Charge};
use nptl::{Builder, JoinHandle};
use support::{
    Cgroup, Child, Output, Sleepers, become_unused_user, become_user, case, child,
    inherited_cgroup, or_skip, report, unused_uid,
};

const STACK: usize = 1 << 20;

/// Reports what is said, the limit that comes first, the numbers of threads until then, and the limits that are said
/// to be hidden; and what happens, the cause of the refusal and the number of threads before it.
fn compare(stack: usize) {
    compare_with(stack, || ());
}

/// [`compare`] with threads that do this first.
fn compare_with(stack: usize, first: fn()) {
    let (gate, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Arc::new(std::sync::Mutex::new(wait));
    let spawn = || {
        let wait = std::sync::Arc::clone(&wait);
        let builder = Builder::new().stack_size(stack);
        builder.spawn(move || {
            first();
            drop(wait.lock().map(|wait| wait.recv()));
        })
    };
    let mut living: Vec<JoinHandle<()>> = Vec::with_capacity(10_000);
    let headroom = nptl::headroom();
    let (said, threads) = match headroom.first(stack) {
        Some((limit, threads)) => (limit.cause.to_string(), threads),
        None => ("nothing".to_owned(), 0..=u64::MAX),
    };
    let hidden: Vec<_> = headroom
        .hidden(stack)
        .map(|limit| limit.cause.to_string())
        .collect();
    let error = loop {
        if living.len() == living.capacity() {
            break None;
        }
        match spawn() {
            Ok(handle) => living.push(handle),
            Err(error) => break Some(error),
        }
    };
    report("said", said);
    report("hidden", hidden.join("|"));
    report("least", threads.start());
    report("most", threads.end());
    report("met", living.len());
    report(
        "cause",
        error.map_or("nothing".to_owned(), |error| {
            error.cause().kind().to_string()
        }),
    );
    drop(gate);
    for handle in living {
        handle.join().expect("its end");
    }
}

fn number(output: &Output, key: &str) -> u64 {
    let text = output
        .get(key)
        .unwrap_or_else(|| panic!("no {key}: {output}"));
    text.parse().expect("a number")
}

/// What [`compare`] reports in a sandbox, after what always holds: as many threads as was said, and what refused, if
/// there is evidence, is what was said to come first, or said to be hidden. None where the sandbox cannot be had.
fn check(test: &str, case: &str, sandbox: impl FnOnce(Child) -> Child) -> Option<Output> {
    let output = match sandbox(child(test, case)).run() {
        Ok(output) => output.success(),
        Err(why) => {
            support::announce_skip(&why);
            return None;
        }
    };
    if output.skipped().is_some() {
        return None;
    }
    let [least, met, most] = ["least", "met", "most"].map(|key| number(&output, key));
    assert!((least..=most).contains(&met), "{output}");
    let cause = output.get("cause").expect("a cause");
    let said = output.get("said") == Some(cause);
    let known = cause != CauseKind::Unknown.to_string();
    assert!(said || is_hidden(&output, cause) || !known, "{output}");
    Some(output)
}

fn met_and_said(output: &Output, kind: CauseKind) -> bool {
    let kind = kind.to_string();
    ["cause", "said"]
        .iter()
        .all(|key| output.get(key) == Some(&*kind))
}

fn met_and_hidden(output: &Output, kind: CauseKind) -> bool {
    let kind = kind.to_string();
    output.get("cause") == Some(&*kind) && is_hidden(output, &kind)
}

fn is_hidden(output: &Output, cause: &str) -> bool {
    let hidden = output.get("hidden").expect("a list");
    hidden.split('|').any(|hidden| hidden == cause)
}

/// As [`check`]; besides, this limit was said to come first, and it was met after the most threads that were said, or
/// `off` less, and before that many at the earliest unless a limit is hidden.
fn check_first(
    test: &str,
    case: &str,
    sandbox: impl FnOnce(Child) -> Child,
    kind: CauseKind,
    off: u64,
) {
    let Some(output) = check(test, case, sandbox) else {
        return;
    };
    assert!(met_and_said(&output, kind), "{output}");
    let [least, met, most] = ["least", "met", "most"].map(|key| number(&output, key));
    assert!(met > 5 && most - met <= off, "{output}");
    assert!(
        most - least <= off || output.get("hidden") != Some(""),
        "{output}"
    );
}

/// Runs `work` in a forked process, which has one thread and may change its namespaces.
fn in_fork(work: impl FnOnce()) {
    // SAFETY: what other threads of the test have locked, the work below does not use.
    match unsafe { libc::fork() } {
        0 => {
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            // SAFETY: ends this process.
            unsafe { libc::_exit(i32::from(ended.is_err())) };
        }
        pid => {
            let mut status = -1;
            // SAFETY: a child of ours, and a place for its status.
            unsafe { libc::waitpid(pid, &raw mut status, 0) };
            assert_eq!(status, 0);
        }
    }
}

/// The namespace remembers the limit of the moment it was made, which no file shows.
#[test]
fn the_limit_that_a_user_namespace_remembers_is_said_to_be_hidden() {
    if case().is_some() {
        or_skip!(become_unused_user());
        support::set_rlimit(libc::RLIMIT_NPROC, 30);
        in_fork(|| {
            // SAFETY: changes this process, which has one thread.
            if unsafe { libc::unshare(libc::CLONE_NEWUSER) } != 0 {
                support::skip!("no user namespaces: {}", std::io::Error::last_os_error());
            }
            support::set_rlimit(libc::RLIMIT_NPROC, 900);
            compare(STACK);
        });
        return;
    }
    let test = "headroom::the_limit_that_a_user_namespace_remembers_is_said_to_be_hidden";
    let Some(output) = check(test, "compare", |child| child) else {
        return;
    };
    assert!(
        met_and_hidden(&output, CauseKind::UserProcesses),
        "{output}"
    );
}

/// The kernel counts a user's tasks wherever they are.
#[test]
fn a_users_tasks_in_other_pid_namespaces_may_count() {
    let case = case();
    match case.as_deref() {
        Some(user) => {
            let (place, uid) = user.split_once(' ').expect("two words");
            or_skip!(become_user(uid.parse().expect("a number")));
            if place == "inside" {
                support::set_rlimit(libc::RLIMIT_NPROC, 50);
                return compare(STACK);
            }
            let mut others = Sleepers::default();
            others.add(20).expect("processes");
            println!("READY");
            let _ = std::io::stdin().read_line(&mut String::new());
        }
        None => {
            let test = "headroom::a_users_tasks_in_other_pid_namespaces_may_count";
            let uid = unused_uid();
            let mut outside = or_skip!(child(test, &format!("outside {uid}")).spawn());
            if !outside.wait_for("READY") {
                outside.finish().success();
                return;
            }
            for namespace in [true, false] {
                let sandbox = |child: Child| match namespace {
                    true => child.pid_namespace(None),
                    false => child,
                };
                let Some(output) = check(test, &format!("inside {uid}"), sandbox) else {
                    return;
                };
                assert!(met_and_said(&output, CauseKind::UserProcesses), "{output}");
                let [met, most] = ["met", "most"].map(|key| number(&output, key));
                // The processes, and two threads of the test that made them.
                assert_eq!(most - met, if namespace { 22 } else { 0 }, "{output}");
            }
            outside.finish().success();
        }
    }
}

/// A session and a process group hold their number when their leader is gone.
#[test]
fn sessions_without_a_leader_hold_pid_numbers() {
    if case().is_some() {
        wrap_pid_numbers();
        let mut members = Vec::new();
        for _ in 0..20 {
            members.push(member_of_a_leaderless_session());
        }
        compare(STACK);
        for pid in members {
            // SAFETY: a process that this test made, whose parent has ended.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        return;
    }
    let test = "headroom::sessions_without_a_leader_hold_pid_numbers";
    let numbers = |child: Child| child.pid_namespace(Some(400));
    check_first(test, "compare", numbers, CauseKind::PidNumbers, 0);
}

/// A process that sleeps in a session whose leader has ended.
fn member_of_a_leaderless_session() -> libc::pid_t {
    let mut pipe = [0; 2];
    // SAFETY: a place for two descriptors.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    // SAFETY: both processes make only system calls and never return.
    let leader = unsafe { libc::fork() };
    if leader == 0 {
        // SAFETY: system calls on plain numbers.
        unsafe {
            libc::setsid();
            let member = libc::fork();
            if member == 0 {
                loop {
                    libc::pause();
                }
            }
            libc::write(pipe[1], (&raw const member).cast(), 4);
            libc::_exit(0);
        }
    }
    let mut member = 0;
    // SAFETY: a place for the number, a child of ours, and two descriptors of this test.
    unsafe {
        assert_eq!(libc::read(pipe[0], (&raw mut member).cast(), 4), 4);
        libc::waitpid(leader, std::ptr::null_mut(), 0);
        libc::close(pipe[0]);
        libc::close(pipe[1]);
    }
    member
}

/// Uses numbers until the kernel has begun again at 300.
fn wrap_pid_numbers() {
    for _ in 0..500 {
        // SAFETY: the child makes one system call and never returns.
        match unsafe { libc::fork() } {
            // SAFETY: ends the child, of which nothing is wanted.
            0 => unsafe { libc::_exit(0) },
            // SAFETY: a child of ours.
            pid => unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) },
        };
    }
}

/// A number is taken in every namespace around a task, too.
#[test]
fn the_pid_numbers_of_namespaces_around_are_said_to_be_hidden() {
    if case().is_some() {
        compare(64 << 10);
        return;
    }
    let test = "headroom::the_pid_numbers_of_namespaces_around_are_said_to_be_hidden";
    let nested = |child: Child| child.pid_namespace(Some(400)).pid_namespace(None);
    let Some(output) = check(test, "compare", nested) else {
        return;
    };
    assert!(met_and_hidden(&output, CauseKind::PidNumbers), "{output}");
}

/// Processes that /proc hides hold numbers.
#[test]
fn a_proc_that_hides_processes_counts_nothing() {
    if case().is_some() {
        or_skip!(mount(c"proc", c"/proc", Some(c"proc"), c"hidepid=2"));
        wrap_pid_numbers();
        compare(STACK);
        return;
    }
    let test = "headroom::a_proc_that_hides_processes_counts_nothing";
    let numbers = |child: Child| child.pid_namespace(Some(400));
    let Some(output) = check(test, "compare", numbers) else {
        return;
    };
    assert!(met_and_hidden(&output, CauseKind::PidNumbers), "{output}");
}

/// What is mounted over a file is not the kernel's number.
#[test]
fn covered_files_give_no_numbers() {
    const FILES: [(&std::ffi::CStr, CauseKind); 4] = [
        (c"/proc/loadavg", CauseKind::ThreadsMax),
        (c"/proc/meminfo", CauseKind::Overcommit),
        (c"/proc/sys/kernel/pid_max", CauseKind::PidNumbers),
        (c"/proc/sys/vm/max_map_count", CauseKind::MapCount),
    ];
    if case().is_some() {
        let fake = std::env::temp_dir().join(format!("nptl-covered-{}", std::process::id()));
        let text = "0.0 0.0 0.0 1/2 3\nMemTotal: 1 kB\nSwapTotal: 0 kB\n";
        std::fs::write(&fake, text).expect("a file");
        let name = std::ffi::CString::new(fake.to_str().expect("UTF-8")).expect("no NUL");
        for (file, _) in FILES {
            or_skip!(mount(&name, file, None, c""));
        }
        std::fs::remove_file(fake).expect("removed");
        compare(STACK);
        return;
    }
    let test = "headroom::covered_files_give_no_numbers";
    // The limit is for the comparison to end.
    let sandbox = |child: Child| child.pid_namespace(None).rlimit(libc::RLIMIT_AS, 1 << 30);
    let Some(output) = check(test, "compare", sandbox) else {
        return;
    };
    for (_, kind) in FILES {
        assert!(is_hidden(&output, &kind.to_string()), "{kind}: {output}");
    }
}

/// A bind mount, or with a `kind` a new mount.
fn mount(
    source: &std::ffi::CStr,
    target: &std::ffi::CStr,
    kind: Option<&std::ffi::CStr>,
    options: &std::ffi::CStr,
) -> Result<(), String> {
    let flags = if kind.is_some() { 0 } else { libc::MS_BIND };
    let kind = kind.map_or(std::ptr::null(), std::ffi::CStr::as_ptr);
    // SAFETY: strings that end with NUL; no type is allowed for a bind mount.
    let answer = unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind,
            flags,
            options.as_ptr().cast(),
        )
    };
    match answer {
        0 => Ok(()),
        _ => Err(format!("mount: {}", std::io::Error::last_os_error())),
    }
}

/// Without /proc nothing is known, and said to be.
#[test]
fn without_proc_every_limit_is_hidden() {
    if case().is_some() {
        compare(STACK);
        return;
    }
    let test = "headroom::without_proc_every_limit_is_hidden";
    let sandbox = |child: Child| child.hide_proc().rlimit(libc::RLIMIT_AS, 200 << 20);
    let Some(output) = check(test, "compare", sandbox) else {
        return;
    };
    assert_eq!(output.get("said"), Some("nothing"), "{output}");
}

/// Each of malloc's arenas takes 64 MiB, which is many small stacks.
#[test]
fn arenas_are_counted_with_small_stacks() {
    if let Some(name) = case() {
        // The first block of a thread makes an arena, if there is room; at the limit there may be none for a block.
        // SAFETY: no block, or one that only this code has.
        let heap = || unsafe { libc::free(std::hint::black_box(libc::malloc(100))) };
        compare_with(128 << 10, if name == "heap" { heap } else { || () });
        return;
    }
    let test = "headroom::arenas_are_counted_with_small_stacks";
    for name in ["no heap", "heap"] {
        for megabytes in [150, 180, 300, 700] {
            let limit = |child: Child| child.rlimit(libc::RLIMIT_AS, megabytes << 20);
            if let Some(output) = check(test, name, limit) {
                assert!(met_and_said(&output, CauseKind::AddressSpace), "{output}");
            }
        }
    }
}

/// One mapping larger than all memory is refused, however much address space is free.
#[test]
fn a_stack_larger_than_memory_does_not_fit_once() {
    if case().is_some() {
        let mode = std::fs::read_to_string("/proc/sys/vm/overcommit_memory");
        if mode.is_ok_and(|mode| mode.trim() != "0") {
            support::skip!("vm.overcommit_memory is not 0");
        }
        compare(1 << 45);
        return;
    }
    let test = "headroom::a_stack_larger_than_memory_does_not_fit_once";
    let Some(output) = check(test, "compare", |child| child) else {
        return;
    };
    assert!(met_and_said(&output, CauseKind::Overcommit), "{output}");
    assert_eq!(number(&output, "most"), 0, "{output}");
}

/// What limits a cgroup from outside cannot be seen where its files are not mounted.
#[test]
fn a_cgroup_without_its_files_is_said_to_be_hidden() {
    if case().is_some() {
        or_skip!(mount(c"none", c"/sys/fs/cgroup", Some(c"tmpfs"), c""));
        return compare(STACK);
    }
    let cgroup = or_skip!(Cgroup::pids());
    cgroup.set("pids.max", 40);
    let test = "headroom::a_cgroup_without_its_files_is_said_to_be_hidden";
    let sandbox = |child: Child| child.pid_namespace(None).cgroup(&cgroup);
    let Some(output) = check(test, "compare", sandbox) else {
        return;
    };
    assert!(number(&output, "met") < 40, "{output}");
    assert!(
        is_hidden(&output, &CauseKind::PidsCgroup.to_string()),
        "{output}"
    );
}

/// The kernel takes a soft limit of 0 for the hard one.
#[test]
fn a_soft_limit_of_0_on_data_means_the_hard_one() {
    if case().is_some() {
        support::set_rlimit(libc::RLIMIT_DATA, 0);
        compare(STACK);
        return;
    }
    let test = "headroom::a_soft_limit_of_0_on_data_means_the_hard_one";
    let limit = |child: Child| child.rlimit(libc::RLIMIT_DATA, 100 << 20);
    check_first(test, "compare", limit, CauseKind::DataSegment, 5);
}

#[test]
fn a_pids_cgroup_has_the_room_that_is_said() {
    if case().is_some() {
        let cgroup = inherited_cgroup(0);
        let current: u64 = cgroup.get("pids.current").trim().parse().expect("a number");
        cgroup.set("pids.max", current + 20);
        compare(STACK);
        return;
    }
    let cgroup = or_skip!(Cgroup::pids());
    let test = "headroom::a_pids_cgroup_has_the_room_that_is_said";
    check_first(
        test,
        "compare",
        |child| child.cgroup(&cgroup),
        CauseKind::PidsCgroup,
        0,
    );
}

/// The heap and what is around a stack are estimated: within a tenth.
#[test]
fn an_address_space_has_the_room_that_is_said() {
    if case().is_some() {
        compare(STACK);
        return;
    }
    let test = "headroom::an_address_space_has_the_room_that_is_said";
    let limit = |child: Child| child.rlimit(libc::RLIMIT_AS, 400 << 20);
    let Some(output) = check(test, "compare", limit) else {
        return;
    };
    let [met, most] = ["met", "most"].map(|key| number(&output, key));
    assert!(met > 5 && most - met <= 30, "{output}");
    assert!(met_and_said(&output, CauseKind::AddressSpace), "{output}");
}

/// Before the first wrap of the numbers and after it, when the kernel no longer gives out those below 300.
#[test]
fn a_pid_space_has_the_room_that_is_said() {
    if let Some(name) = case() {
        if name == "wrapped" {
            wrap_pid_numbers();
        }
        compare(STACK);
        return;
    }
    let test = "headroom::a_pid_space_has_the_room_that_is_said";
    for name in ["compare", "wrapped"] {
        let numbers = |child: Child| child.pid_namespace(Some(400));
        check_first(test, name, numbers, CauseKind::PidNumbers, 0);
    }
}

/// What lies around a stack is estimated, and what else is locked meanwhile, the heap among it, is not counted.
#[test]
fn locked_memory_has_the_room_that_is_said() {
    if let Some(stack) = case() {
        or_skip!(become_unused_user());
        let said = || {
            let headroom = nptl::headroom();
            let limits = headroom.limits().iter();
            let locked = limits.filter(|limit| limit.cause == CauseKind::LockedMemory);
            locked.map(|limit| limit.charge).collect::<Vec<_>>()
        };
        assert_eq!(said(), [Charge::Nothing]);
        // SAFETY: changes how later mappings are locked.
        let answer = unsafe { libc::mlockall(libc::MCL_FUTURE | libc::MCL_ONFAULT) };
        assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
        assert_eq!(said(), [Charge::Sum]);
        compare(stack.parse().expect("a number"));
        return;
    }
    let test = "headroom::locked_memory_has_the_room_that_is_said";
    let limited = |bytes| move |child: Child| child.rlimit(libc::RLIMIT_MEMLOCK, bytes);
    let stack = (256 << 10).to_string();
    check_first(test, &stack, limited(8 << 20), CauseKind::LockedMemory, 5);
    for stack in [16 << 10, 64 << 10, 600 << 10] {
        if let Some(output) = check(test, &stack.to_string(), limited(8 << 20)) {
            assert!(met_and_said(&output, CauseKind::LockedMemory), "{output}");
        }
    }
}

/// A guard splits a locked mapping whatever the kernel: every thread then takes four mappings, two of them guards.
#[test]
fn mappings_of_locked_stacks_are_counted() {
    if case().is_some() {
        let threads = || {
            let headroom = nptl::headroom();
            let mut limits = headroom.limits().iter();
            let row = limits.find(|limit| limit.cause == CauseKind::MapCount);
            let row = row.expect("a row");
            (row.in_use, headroom.threads_left(row, STACK))
        };
        let _ = threads();
        // SAFETY: sets a number of the allocator's: without it threads map heaps of their own.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
        // SAFETY: changes how later mappings are locked.
        let answer = unsafe { libc::mlockall(libc::MCL_FUTURE | libc::MCL_ONFAULT) };
        if answer != 0 {
            support::skip!("mlockall is not allowed");
        }
        let spawn = || {
            Builder::new()
                .stack_size(256 << 10)
                .spawn(std::thread::park)
        };
        drop(spawn().expect("a thread"));
        let (before, left) = threads();
        for _ in 0..16 {
            drop(spawn().expect("a thread"));
        }
        let (after, _) = threads();
        let taken = after.zip(before).map(|(after, before)| after - before);
        report("taken", taken.expect("its maps"));
        report("left", left.expect("a number").end());
        return;
    }
    let test = "headroom::mappings_of_locked_stacks_are_counted";
    let limit = |child: Child| child.rlimit(libc::RLIMIT_MEMLOCK, 8 << 20);
    let output = or_skip!(limit(child(test, "locked")).run()).success();
    if output.skipped().is_some() {
        return;
    }
    let number = |key| {
        let text = output.get(key).expect("a number");
        text.parse::<u64>().expect("a number")
    };
    assert!((64..72).contains(&number("taken")), "{output}");
    assert!(number("left") < u64::MAX, "{output}");
}

/// Takes every free range of at least `bytes`.
fn fill_addresses(bytes: usize) {
    let mut size = 1 << 46;
    while size >= bytes {
        // SAFETY: a new mapping without access, which is kept.
        let start = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(std::ptr::null_mut(), size, libc::PROT_NONE, flags, -1, 0)
        };
        if start == libc::MAP_FAILED {
            size /= 2;
        }
    }
}

fn is_granted(bytes: u64) -> bool {
    // SAFETY: a new mapping without access, which goes again.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let none = std::ptr::null_mut();
        let start = libc::mmap(none, bytes as usize, libc::PROT_NONE, flags, -1, 0);
        start != libc::MAP_FAILED && libc::munmap(start, bytes as usize) == 0
    }
}

/// The longest range that is said to be free is granted, and one page more is not.
#[test]
fn free_addresses_are_as_many_as_is_said() {
    if case().is_some() {
        fill_addresses(64 << 20);
        // Once before, so that the heap has room for it, and does not grow into the gap that is found.
        drop(nptl::headroom());
        let headroom = nptl::headroom();
        let limits = headroom.limits().iter();
        let row = limits.filter(|limit| limit.cause == CauseKind::AddressSpaceExhausted);
        let left = row.filter_map(|limit| Some(limit.left()? - limit.unseen));
        let left: Vec<_> = left.collect();
        let [left] = left[..] else {
            panic!("not one row: {left:?}");
        };
        // Before anything is printed, because that may map.
        let granted = [left, left + 4096].map(is_granted);
        report("left", left);
        report("granted", granted[0]);
        report("a page more", granted[1]);
        return;
    }
    let test = "headroom::free_addresses_are_as_many_as_is_said";
    let output = or_skip!(child(test, "fill").run()).success();
    let left: u64 = output
        .get("left")
        .expect("bytes")
        .parse()
        .expect("a number");
    assert!(left < 64 << 20, "{output}");
    assert_eq!(output.get("granted"), Some("true"), "{output}");
    assert_eq!(output.get("a page more"), Some("false"), "{output}");
}

/// A process and who looks at it from outside see the same room.
#[test]
fn another_process_has_the_rows_that_it_sees_itself() {
    const ROWS: [CauseKind; 5] = [
        CauseKind::MapCount,
        CauseKind::AddressSpaceExhausted,
        CauseKind::AddressSpace,
        CauseKind::DataSegment,
        CauseKind::LockedMemory,
    ];
    let rows = |headroom: &nptl::diagnose::Headroom| {
        let limits = headroom.limits().iter();
        let rows = limits.filter(|limit| ROWS.contains(&limit.cause));
        let texts = rows.map(|limit| {
            let gap = limit.cause == CauseKind::AddressSpaceExhausted;
            let in_use = limit.in_use.filter(|_| !gap);
            format!("{:?} {in_use:?} {:?}", limit.cause, limit.left())
        });
        texts.collect::<Vec<_>>().join(", ")
    };
    if case().is_some() {
        // Once before, so that the heap has room for it.
        rows(&nptl::headroom());
        report("rows", rows(&nptl::headroom()));
        println!("READY");
        let _ = std::io::stdin().read_line(&mut String::new());
        return;
    }
    let test = "headroom::another_process_has_the_rows_that_it_sees_itself";
    let limited = child(test, "wait").rlimit(libc::RLIMIT_AS, 1 << 30);
    let mut running = or_skip!(limited.spawn());
    assert!(running.wait_for("READY"));
    let seen = nptl::diagnose::headroom_of(running.pid() as u32).expect("its files");
    let output = running.finish().success();
    assert_eq!(output.get("rows"), Some(&*rows(&seen)), "{output}");
    assert!(rows(&seen).matches("Some").count() >= 9, "{}", rows(&seen));
}

/// The pid namespace of another user's process cannot be read from its link, but from its status.
#[test]
fn the_pid_namespace_of_another_users_process_is_known() {
    let row = |headroom: &nptl::diagnose::Headroom| {
        let mut limits = headroom.limits().iter();
        let row = limits.find(|limit| limit.cause == CauseKind::PidNumbers);
        row.expect("a row").clone()
    };
    let case = case();
    match case.as_deref() {
        Some("wait") => {
            println!("READY");
            let _ = std::io::stdin().read_line(&mut String::new());
        }
        Some(pid) => {
            or_skip!(become_unused_user());
            let pid: u32 = pid.parse().expect("a number");
            let link = std::fs::read_link(format!("/proc/{pid}/ns/pid"));
            report("link", link.is_ok());
            let (own, other) = (
                row(&nptl::headroom()),
                row(&nptl::diagnose::headroom_of(pid).expect("its files")),
            );
            report("own maximum", format!("{:?}", own.maximum));
            report("maximum", format!("{:?}", other.maximum));
            report("source", other.source);
        }
        None => {
            let test = "headroom::the_pid_namespace_of_another_users_process_is_known";
            for inside in [false, true] {
                let waiting = child(test, "wait");
                let waiting = if inside {
                    waiting.pid_namespace(None)
                } else {
                    waiting
                };
                let mut running = or_skip!(waiting.spawn());
                assert!(running.wait_for("READY"));
                let relay = running.pid().to_string();
                let pid = if inside { first_child(&relay) } else { relay };
                let output = or_skip!(child(test, &pid).run()).success();
                running.finish().success();
                if output.skipped().is_some() {
                    return;
                }
                assert_eq!(output.get("link"), Some("false"), "{output}");
                let source = output.get("source").expect("a source");
                let maximum = output.get("maximum");
                if inside {
                    assert!(source.contains("in another pid namespace"), "{output}");
                } else {
                    assert_eq!(maximum, output.get("own maximum"), "{output}");
                    assert_ne!(maximum, Some("None"), "{output}");
                }
            }
        }
    }
}

fn first_child(pid: &str) -> String {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.expect("the children");
    children.split_whitespace().next().expect("one").to_owned()
}
