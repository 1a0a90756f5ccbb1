//! What becomes of a stack: who gets it when, what it keeps and gives back, and that nothing is left of many threads.
//!
//! What counts, or is held in a system call, runs in a child process, so that nothing else moves the counts.

mod concurrent;
mod crowd;
mod discard;
mod held_in_exit;
mod limits;
mod memory;
mod reuse;
mod soak;
mod zeroed;

use nptl::StackCache;
use std::time::Duration;
use support::{Warden, case, child, or_skip, report};

/// Runs `work` in a child process, with a warden that can hold its threads in exit(2).
fn with_warden(test: &str, work: impl FnOnce(&Warden)) {
    if case().is_some() {
        // The calibration's threads are glibc's own.
        nptl::spawn(|| ()).unwrap().join().unwrap();
        StackCache::global().clear();
        if !support::kernel_at_least(6, 9) {
            support::skip!("pidfds of threads need kernel 6.9");
        }
        let warden = or_skip!(Warden::new(&[libc::SYS_exit]));
        work(&warden);
        report("done", "yes");
        return;
    }
    let child = child(test, "run").time_limit(Duration::from_secs(60));
    let output = or_skip!(child.run()).success();
    if output.skipped().is_none() {
        assert_eq!(output.get("done"), Some("yes"), "{output}");
    }
}
