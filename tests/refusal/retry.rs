//! Which refusals are tried again: forced by a pids cgroup that is full, and is made larger only once it has
//! refused.

use std::time::Duration;

use nptl::diagnose::CauseKind;
use nptl::{Builder, RetryPolicy};
use support::{
    Cgroup, CgroupDir, Warden, await_reaping, case, child, inherited_cgroup, or_skip, report,
    wait_for_end,
};

/// How often the cgroup has refused.
fn refusals(cgroup: &CgroupDir) -> u64 {
    let events = cgroup.get("pids.events");
    let count = events.lines().find_map(|line| line.strip_prefix("max "));
    count.and_then(|count| count.parse().ok()).expect("a count")
}

fn fill(cgroup: &CgroupDir) {
    nptl::spawn(|| ())
        .expect("a thread")
        .join()
        .expect("its end");
    cgroup.set("pids.max", cgroup.get("pids.current").trim());
}

fn run(case: &str) {
    let cgroup = inherited_cgroup(0);
    let spawn = |policy| Builder::new().retry(policy).spawn(|| 7);
    match case {
        "never" => {
            fill(&cgroup);
            let before = refusals(&cgroup);
            let error = spawn(RetryPolicy::never()).expect_err("a full cgroup");
            report("attempts", error.attempts());
            report("cause", error.cause().kind());
            // The probes are refused where the clone was, so the kernel counts more than one.
            assert!(refusals(&cgroup) > before);
        }
        "default" => {
            let (end, wait) = std::sync::mpsc::channel::<()>();
            let living = nptl::spawn(move || wait.recv()).expect("a thread");
            nptl::spawn(|| ())
                .expect("a thread")
                .join()
                .expect("its end");
            // The kernel has reaped it, so nothing is transient, however short ago that was.
            while cgroup.tasks() > 3 {
                std::thread::yield_now();
            }
            await_reaping();
            cgroup.set("pids.max", cgroup.get("pids.current").trim());
            let error = spawn(RetryPolicy::default()).expect_err("a full cgroup");
            report("attempts", error.attempts());
            report("cause", error.cause().kind());
            report("transient", error.is_transient());
            drop(end);
            drop(living.join());
        }
        "held in exit" => {
            if !support::kernel_at_least(6, 9) {
                support::skip!("pidfds of threads need kernel 6.9");
            }
            nptl::spawn(|| ())
                .expect("a thread")
                .join()
                .expect("its end");
            let warden = or_skip!(Warden::new(&[libc::SYS_exit]));
            let (end, wait) = std::sync::mpsc::channel::<()>();
            let ending = nptl::spawn(move || wait.recv()).expect("a thread");
            let (tid, pidfd) = (ending.tid(), ending.pidfd().expect("a pidfd"));
            ending.detach();
            warden.hold(tid);
            drop(end);
            warden.wait_until_held(tid);
            // For longer than any thread takes that nothing holds up.
            std::thread::sleep(Duration::from_millis(50));
            let refuse = || {
                cgroup.set("pids.max", cgroup.get("pids.current").trim());
                spawn(RetryPolicy::never()).expect_err("a full cgroup")
            };
            report("transient", refuse().is_transient());
            let full = cgroup.tasks();
            warden.release(tid);
            wait_for_end(&pidfd);
            // The kernel clears the tid word before it stops counting the thread.
            while cgroup.tasks() == full {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(50));
            report("transient afterwards", refuse().is_transient());
        }
        "within" => {
            std::thread::scope(|scope| {
                let (filled, wait) = std::sync::mpsc::channel();
                let cgroup = &cgroup;
                scope.spawn(move || {
                    let before: u64 = wait.recv().expect("a number");
                    while refusals(cgroup) == before {
                        std::thread::yield_now();
                    }
                    cgroup.set("pids.max", "max");
                });
                fill(cgroup);
                filled.send(refusals(cgroup)).expect("a receiver");
                let handle = spawn(RetryPolicy::within(Duration::from_secs(100)));
                let value = handle.expect("granted in the end").join();
                report("value", value.expect("its end"));
            });
        }
        "within, hopeless" => {
            let error = Builder::new()
                .stack_size(usize::MAX)
                .retry(RetryPolicy::within(Duration::from_secs(100)))
                .spawn(|| ())
                .expect_err("too large");
            report("attempts", error.attempts());
        }
        _ => unreachable!("no case of that name"),
    }
}

fn expect(test: &str, name: &str, expected: &[(&str, &str)]) {
    let cgroup = or_skip!(Cgroup::pids());
    let output = child(test, name)
        .cgroup(&cgroup)
        .time_limit(Duration::from_secs(60));
    let output = or_skip!(output.run()).success();
    if output.skipped().is_some() {
        return;
    }
    for &(key, value) in expected {
        assert_eq!(output.get(key), Some(value), "{key}: {output}");
    }
}

#[test]
fn never_tries_once() {
    match case() {
        Some(name) => run(&name),
        None => expect(
            "retry::never_tries_once",
            "never",
            &[
                ("attempts", "1"),
                ("cause", &CauseKind::PidsCgroup.to_string()),
            ],
        ),
    }
}

/// A thread that has ended counts until the kernel has reaped it, however long that takes.
#[test]
fn an_ended_thread_that_still_counts_makes_it_transient() {
    match case() {
        Some(name) => run(&name),
        None => expect(
            "retry::an_ended_thread_that_still_counts_makes_it_transient",
            "held in exit",
            &[("transient", "true"), ("transient afterwards", "false")],
        ),
    }
}

/// The second attempt is the proof.
#[test]
fn what_is_not_transient_is_not_tried_again() {
    match case() {
        Some(name) => run(&name),
        None => expect(
            "retry::what_is_not_transient_is_not_tried_again",
            "default",
            &[
                ("attempts", "2"),
                ("cause", &CauseKind::PidsCgroup.to_string()),
                ("transient", "false"),
            ],
        ),
    }
}

#[test]
fn within_tries_until_another_thread_makes_room() {
    match case() {
        Some(name) => run(&name),
        None => expect(
            "retry::within_tries_until_another_thread_makes_room",
            "within",
            &[("value", "7")],
        ),
    }
}

#[test]
fn what_no_waiting_can_change_is_tried_once() {
    match case() {
        Some(name) => run(&name),
        None => expect(
            "retry::what_no_waiting_can_change_is_tried_once",
            "within, hopeless",
            &[("attempts", "1")],
        ),
    }
}
