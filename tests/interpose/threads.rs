//! Whose threads std's are.

use nptl::{Certainty, StackCache, diagnose::CauseKind};
use std::thread::Builder;
use support::{become_unused_user, case, child, or_skip, report, set_rlimit};

/// The number of this crate's threads that run, as a thread of std with a name sees it, and that name in both places.
fn seen_by_a_thread() -> (usize, Option<String>, String) {
    let thread = Builder::new().name("worker-7".to_owned()).spawn(|| {
        let live = StackCache::global().stats().live_stacks;
        let name = std::thread::current().name().map(str::to_owned);
        let comm = std::fs::read_to_string("/proc/thread-self/comm").expect("a name");
        (live, name, comm)
    });
    thread.expect("a thread").join().expect("a result")
}

fn in_mode(test: &str, mode: &str) -> support::Output {
    let child = child(test, mode).env("NPTL_MODE", mode);
    child.run().expect("a child").success()
}

#[test]
fn a_thread_of_std_is_one_of_this_crate_unless_the_environment_says_otherwise() {
    let test =
        "threads::a_thread_of_std_is_one_of_this_crate_unless_the_environment_says_otherwise";
    if case().is_some() {
        // The harness's own thread is one as well.
        let before = StackCache::global().stats().live_stacks;
        let (live, name, comm) = seen_by_a_thread();
        report("more", live - before);
        assert_eq!(name.as_deref(), Some("worker-7"));
        assert_eq!(comm, "worker-7\n");
        let sum = std::thread::scope(|scope| {
            let one = scope.spawn(|| 1);
            one.join().expect("a result") + 1
        });
        assert_eq!(sum, 2);
        return;
    }
    assert_eq!(in_mode(test, "threads").get("more"), Some("1"));
    assert_eq!(in_mode(test, "explain").get("more"), Some("0"));
    let default = child(test, "default").run().expect("a child").success();
    assert_eq!(default.get("more"), Some("1"));
}

#[test]
fn last_failure_explains_an_error_of_std() {
    let test = "threads::last_failure_explains_an_error_of_std";
    if let Some(mode) = case() {
        or_skip!(become_unused_user());
        // So that what is refused is no calibration.
        seen_by_a_thread();
        support::await_reaping();
        set_rlimit(libc::RLIMIT_NPROC, 1);
        report("program", super::program());
        let error = Builder::new().spawn(|| ()).expect_err("a refusal");
        assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
        let failure = nptl::last_failure().expect("the same");
        assert_eq!(failure.cause().kind(), CauseKind::UserProcesses);
        let expected = match mode.as_str() {
            // The refused call itself is repeated.
            "threads" => Certainty::Proven,
            _ => Certainty::Inferred,
        };
        assert_eq!(failure.certainty(), expected, "{failure}");
        return;
    }
    for mode in ["threads", "explain"] {
        let output = in_mode(test, mode);
        if output.skipped().is_some() {
            return;
        }
        let mut lines = output
            .stderr
            .lines()
            .filter(|line| line.starts_with("nptl: "));
        let line = lines
            .next()
            .unwrap_or_else(|| panic!("no report: {output}"));
        assert!(line.starts_with("nptl: pthread_create refused: "), "{line}");
        assert!(line.contains(" cause=UserProcesses "), "{line}");
        let program = output.get("program").expect("a name");
        assert!(line.ends_with(program), "{line}");
        assert_eq!(lines.next(), None, "{output}");
    }
}
