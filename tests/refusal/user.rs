//! RLIMIT_NPROC that is reached by several processes together: no file has the count that the kernel compares.

use nptl::diagnose::CauseKind;
use nptl::{Builder, Cause, Certainty, RetryPolicy};
use support::{Sleepers, become_unused_user, case, child, or_skip, report, set_rlimit};

const SLEEPERS: u64 = 5;

fn own_threads() -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").expect("/proc");
    tasks.count() as u64
}

/// Proven where so many tasks of the user can be seen, and not where one of them cannot.
#[test]
fn the_tasks_of_a_user_are_counted_where_they_can_be_seen() {
    let test = "user::the_tasks_of_a_user_are_counted_where_they_can_be_seen";
    if let Some(name) = case() {
        nptl::prepare().expect("good times");
        nptl::StackCache::global().clear();
        or_skip!(become_unused_user());
        let mut sleepers = Sleepers::default();
        // Whether they may be traced: else their user namespace cannot be read.
        // SAFETY: sets a flag of this process, which its children inherit.
        let dumpable = |yes: i32| unsafe { libc::prctl(libc::PR_SET_DUMPABLE, yes) };
        dumpable(i32::from(name == "visible"));
        sleepers.add(SLEEPERS as usize).expect("no limit yet");
        dumpable(1);
        let soft = SLEEPERS + own_threads();
        set_rlimit(libc::RLIMIT_NPROC, soft);
        for _ in 0..20 {
            let builder = Builder::new().stack_size(64 << 10);
            let error = builder.retry(RetryPolicy::default()).spawn(|| ()).err();
            let error = error.expect("a refusal");
            let Cause::UserProcesses(user) = *error.cause() else {
                panic!("{error}");
            };
            let (certainty, visible) = match &*name {
                "visible" => (Certainty::Proven, Some(soft)),
                _ => (Certainty::Inferred, None),
            };
            assert_eq!(
                (error.certainty(), user.visible),
                (certainty, visible),
                "{}",
                error.report()
            );
            assert_eq!(error.cause().kind(), CauseKind::UserProcesses);
        }
        return report("said", "so");
    }
    for name in ["visible", "hidden"] {
        // A task that starts anywhere in the namespace while the counting lasts makes it worthless.
        or_skip!(child(test, name).pid_namespace(None).run()).success();
    }
}
