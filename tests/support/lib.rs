//! What the tests and the examples that provoke refusals share: a child process in a sandbox made for
//! one test, the sandbox's pieces, and snapshots of what a leak would change.
//!
//! A test describes the sandbox, and the kernel puts the child into it before the child's `exec`, because
//! a running test binary already has several threads and may no longer change its namespaces:
//!
//! ```ignore
//! use support::{Cgroup, case, child, deny, or_skip, report};
//!
//! #[test]
//! fn pids_cgroup_is_named() {
//!     if case().is_some() {
//!         let cgroup = support::inherited_cgroup(0);
//!         cgroup.set("pids.max", cgroup.get("pids.current"));
//!         report("error", nptl::spawn(|| {}).unwrap_err());
//!         return;
//!     }
//!     let cgroup = or_skip!(Cgroup::pids());
//!     let output = or_skip!(child("pids_cgroup_is_named", "full").cgroup(&cgroup).run());
//!     assert_eq!(output.success().get("error"), Some("..."));
//! }
//! ```

mod cgroup;
mod child;
mod limits;
mod notify;
mod seccomp;
mod snapshot;
mod threads;
mod warden;

pub use cgroup::{Cgroup, CgroupDir, inherited_cgroup};
pub use child::{
    Child, Output, StartedChild, alone, case, child, executable, kernel_at_least, program, report,
};
pub use limits::{
    Mappings, Sleepers, become_unused_user, become_user, is_root, set_rlimit, unused_uid,
};
pub use notify::{Call, Listener, listen, supervised};
pub use seccomp::{
    Allow, Deny, Documented, MADV_GUARD_INSTALL, allow, allow_only, cloud_hypervisor_vcpu_filter,
    cloud_hypervisor_vmm_filter, contract, deny, deny_guard_marks, firecracker_vcpu_filter,
    trap_all_clones_but, trap_strange_mappings, undocumented_call,
};
pub use snapshot::{Difference, Snapshot, malloc_in_use};
pub use threads::{
    await_reaping, burst, burst_of, is_mapped, listed_threads, private, resident_pages, tid,
    touch_stack, wait_until,
};
pub use warden::{Warden, wait_for_end};

/// How often a test repeats what no order can be forced for: `long` where `NPTL_TEST_LONG` is set, as `.ci/run --long`
/// does, because a longer run finds what is rarer.
pub fn short_or_long(short: usize, long: usize) -> usize {
    match std::env::var_os("NPTL_TEST_LONG") {
        Some(_) => long,
        None => short,
    }
}

/// The errno of a refused call.
pub fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err()?.raw_os_error()
}

/// Prints `skipped: why` and returns from the test.
///
/// Written to the descriptor itself: the test harness swallows what a passing test prints, and a skipped
/// test must not look like a passed one.
#[macro_export]
macro_rules! skip {
    ($($why:tt)+) => {{
        $crate::announce_skip(&format!($($why)+));
        return;
    }};
}

/// The value of a `Result`, or the end of the test with the error as the reason.
#[macro_export]
macro_rules! or_skip {
    ($result:expr) => {
        match $result {
            Ok(value) => value,
            Err(why) => $crate::skip!("{why}"),
        }
    };
}

/// The line behind [`skip!`].
pub fn announce_skip(why: &str) {
    use std::io::Write;
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("?");
    // The harness leaves "test NAME ... " without a line end when it runs one test at a time.
    let _ = std::io::stdout()
        .lock()
        .write_all(format!("\nskipped: {why} (in {test})\n").as_bytes());
}
