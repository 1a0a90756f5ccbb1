//! What `headroom` says against what happens: threads are started until one is refused.

mod support;

use nptl::{Builder, CauseKind, JoinHandle, RetryPolicy};
use support::{Cgroup, case, child, inherited_cgroup, or_skip, report};

const STACK: usize = 1 << 20;

/// The limit that is said to come first and the number of threads until then; the cause of the refusal and
/// the number of threads before it.
fn compare() {
    let (gate, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Arc::new(std::sync::Mutex::new(wait));
    let spawn = || {
        let wait = std::sync::Arc::clone(&wait);
        let builder = Builder::new().stack_size(STACK).retry(RetryPolicy::never());
        builder.spawn(move || drop(wait.lock().map(|wait| wait.recv())))
    };
    // The calibration, and what the first of everything maps.
    let mut living: Vec<JoinHandle<()>> = Vec::with_capacity(10_000);
    living.push(spawn().expect("a thread"));
    let headroom = nptl::headroom();
    let (first, threads) = headroom.first(STACK).expect("a limit");
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

fn check(
    test: &str,
    sandbox: impl FnOnce(support::Child) -> support::Child,
    kind: CauseKind,
    off: u64,
) {
    let output = or_skip!(sandbox(child(test, "compare")).run()).success();
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
        compare();
        return;
    }
    let cgroup = or_skip!(Cgroup::pids());
    let test = "a_pids_cgroup_has_the_room_that_is_said";
    check(
        test,
        |child| child.cgroup(&cgroup),
        CauseKind::PidsCgroup,
        0,
    );
}

/// The heap and what is around a stack are estimated: within a tenth.
#[test]
fn an_address_space_has_the_room_that_is_said() {
    if case().is_some() {
        compare();
        return;
    }
    let test = "an_address_space_has_the_room_that_is_said";
    let limit = |child: support::Child| child.rlimit(libc::RLIMIT_AS, 400 << 20);
    check(test, limit, CauseKind::AddressSpace, 30);
}
