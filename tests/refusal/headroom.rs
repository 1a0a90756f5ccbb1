//! What `headroom` says against what happens: threads are started until one is refused.

use nptl::diagnose::CauseKind;
use nptl::{Builder, JoinHandle, RetryPolicy};
use support::{Cgroup, Child, become_unused_user, case, child, inherited_cgroup, or_skip, report};

const STACK: usize = 1 << 20;

/// The limit that is said to come first and the number of threads until then; the cause of the refusal and
/// the number of threads before it.
fn compare(stack: usize) {
    let (gate, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Arc::new(std::sync::Mutex::new(wait));
    let spawn = || {
        let wait = std::sync::Arc::clone(&wait);
        let builder = Builder::new().stack_size(stack).retry(RetryPolicy::never());
        builder.spawn(move || drop(wait.lock().map(|wait| wait.recv())))
    };
    // The calibration, and what the first of everything maps.
    let mut living: Vec<JoinHandle<()>> = Vec::with_capacity(10_000);
    living.push(spawn().expect("a thread"));
    let headroom = nptl::headroom();
    let (first, threads) = headroom.first(stack).expect("a limit");
    let (first, started) = (first.cause, living.len() as u64);
    let error = loop {
        match spawn() {
            Ok(handle) => living.push(handle),
            Err(error) => break error,
        }
    };
    report("said", first);
    report("met", error.cause().kind());
    report("threads said", threads);
    report("threads met", living.len() as u64 - started);
    drop(gate);
    for handle in living {
        handle.join().expect("its end");
    }
}

fn check(test: &str, case: &str, sandbox: impl FnOnce(Child) -> Child, kind: CauseKind, off: u64) {
    let output = or_skip!(sandbox(child(test, case)).run()).success();
    if output.skipped().is_some() {
        return;
    }
    let number = |key| {
        output
            .get(key)
            .and_then(|n| n.parse::<u64>().ok())
            .expect("a number")
    };
    let kind = kind.to_string();
    assert_eq!(output.get("said"), Some(&*kind), "{output}");
    assert_eq!(output.get("met"), Some(&*kind), "{output}");
    let (said, met) = (number("threads said"), number("threads met"));
    assert!(
        said > 5 && said.abs_diff(met) <= off,
        "{said} said, {met} met: {output}"
    );
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
    check(
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
    check(test, "compare", limit, CauseKind::AddressSpace, 30);
}

/// Before the first wrap of the numbers and after it, when the kernel no longer gives out those below 300.
#[test]
fn a_pid_space_has_the_room_that_is_said() {
    if let Some(name) = case() {
        if name == "wrapped" {
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
        compare(STACK);
        return;
    }
    let test = "headroom::a_pid_space_has_the_room_that_is_said";
    for name in ["compare", "wrapped"] {
        let numbers = |child: Child| child.pid_namespace(Some(400));
        check(test, name, numbers, CauseKind::PidNumbers, 0);
    }
}

/// What lies around a stack is estimated, and what else is locked meanwhile, the heap among it, is not counted.
#[test]
fn locked_memory_has_the_room_that_is_said() {
    if case().is_some() {
        or_skip!(become_unused_user());
        let said = || {
            let headroom = nptl::headroom();
            let limits = headroom.limits().iter();
            let locked = limits.filter(|limit| limit.cause == CauseKind::LockedMemory);
            locked.map(|limit| limit.counts).collect::<Vec<_>>()
        };
        assert_eq!(said(), [false]);
        // SAFETY: changes how later mappings are locked.
        let answer = unsafe { libc::mlockall(libc::MCL_FUTURE | libc::MCL_ONFAULT) };
        assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
        assert_eq!(said(), [true]);
        compare(256 << 10);
        return;
    }
    let test = "headroom::locked_memory_has_the_room_that_is_said";
    let limit = |child: Child| child.rlimit(libc::RLIMIT_MEMLOCK, 8 << 20);
    check(test, "compare", limit, CauseKind::LockedMemory, 5);
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
        report("left", left.expect("a number"));
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
        let left: Vec<_> = row.filter_map(|limit| limit.left()).collect();
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

/// The pid namespace of somebody else's process cannot be read from its link, but from its status.
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
