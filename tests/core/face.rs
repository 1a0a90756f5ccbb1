//! The public face: names and bounds as callers use them, and what they say in cases that std knows, too.

use crate::{rounds, under_valgrind, wait_until};
use nptl::diagnose::CauseKind;
use nptl::{Builder, Certainty, JoinHandle, ScopedJoinHandle, SpawnError, Step};
use std::any::Any;
use std::hint::black_box;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{TryRecvError, channel};
use std::time::Duration;
use support::{
    allow, allow_only, become_unused_user, case, child, deny, or_skip, report, set_rlimit, skip,
};

fn text(payload: Box<dyn Any + Send>) -> String {
    let text = payload.downcast_ref::<String>();
    text.expect("a formatted message").clone()
}

/// Starts a thread that gets its own handle, and returns what it makes of it.
fn with_own_handle<T: Send + 'static>(
    body: impl FnOnce(JoinHandle<()>) -> T + Send + 'static,
) -> T {
    let ((give, take), (sender, receiver)) = (channel(), channel());
    let handle = nptl::spawn(move || sender.send(body(take.recv().unwrap())).unwrap()).unwrap();
    give.send(handle).unwrap();
    let answer = receiver.recv_timeout(Duration::from_secs(60));
    answer.expect("a thread that waits for its own end")
}

#[test]
fn a_thread_that_joins_itself_panics_with_stds_words() {
    let ((give, take), (sender, receiver)) = (channel::<std::thread::JoinHandle<()>>(), channel());
    let handle = std::thread::spawn(move || {
        let own = take.recv().unwrap();
        let joined = catch_unwind(AssertUnwindSafe(|| own.join()));
        sender.send(text(joined.unwrap_err())).unwrap();
    });
    give.send(handle).unwrap();
    let stds = receiver.recv().unwrap();

    let join = |own: JoinHandle<()>| catch_unwind(AssertUnwindSafe(|| own.join()));
    let ours = with_own_handle(move |own| text(join(own).unwrap_err()));
    assert_eq!(ours, stds);
    assert_eq!(
        ours,
        "failed to join thread: Resource deadlock avoided (os error 35)"
    );
}

#[test]
fn a_thread_that_waits_for_itself_in_another_way_gets_its_handle_back_at_once() {
    let ended = with_own_handle(|own| {
        let own = own.try_join().unwrap_err();
        let own = own.join_timeout(Duration::MAX).unwrap_err();
        own.wait_timeout(Duration::MAX) || own.is_finished()
    });
    assert!(!ended);
}

#[test]
fn a_scoped_thread_cannot_join_itself_either() {
    let ours = nptl::scope(|s| {
        let ((give, take), (sender, receiver)) = (channel::<ScopedJoinHandle<'_, ()>>(), channel());
        let handle = s.spawn(move || {
            let own = take.recv().unwrap().try_join().unwrap_err();
            let joined = catch_unwind(AssertUnwindSafe(|| own.join()));
            sender.send(text(joined.unwrap_err())).unwrap();
        });
        assert!(give.send(handle.unwrap()).is_ok());
        receiver.recv_timeout(Duration::from_secs(60)).unwrap()
    });
    assert!(ours.contains("Resource deadlock avoided"), "{ours}");
}

#[test]
fn a_wait_that_keeps_the_handle_tells_whether_the_thread_has_ended() {
    for _ in 0..rounds(100) {
        let (end, wait) = channel::<()>();
        let handle = nptl::spawn(move || wait.recv().is_err()).unwrap();
        assert!(!handle.wait_timeout(Duration::ZERO));
        assert!(!handle.wait_timeout(Duration::from_millis(1)));
        drop(end);
        assert!(handle.wait_timeout(Duration::MAX));
        assert!(handle.is_finished() && handle.wait_timeout(Duration::ZERO));
        assert!(handle.join().unwrap());
    }
}

#[test]
fn the_processor_time_of_a_thread_is_its_own_and_ends_with_it() {
    let (end, wait) = channel::<()>();
    let idle = nptl::spawn(move || wait.recv()).unwrap();
    let (stop, stopped) = channel::<()>();
    let busy =
        nptl::spawn(move || while stopped.try_recv() == Err(TryRecvError::Empty) {}).unwrap();
    wait_until("30 ms of processor time", || {
        busy.cpu_time().unwrap() > Duration::from_millis(30)
    });
    assert!(idle.cpu_time().unwrap() < Duration::from_millis(30));
    drop((end, stop));
    assert!(busy.wait_timeout(Duration::MAX) && idle.wait_timeout(Duration::MAX));
    assert_eq!(support::errno(busy.cpu_time()), Some(libc::ESRCH));
    assert_eq!(support::errno(idle.cpu_time()), Some(libc::ESRCH));
}

#[test]
fn only_the_high_water_mark_asks_the_kernel_where_a_stack_is_used() {
    if under_valgrind() {
        skip!("valgrind refuses filters");
    }
    const USED: usize = 200 << 10;
    let (end, wait) = channel::<()>();
    let (sender, receiver) = channel();
    let handle = Builder::new()
        .stack_size(1 << 20)
        .spawn(move || {
            black_box([1_u8; USED]);
            sender.send(()).unwrap();
            wait.recv()
        })
        .unwrap();
    receiver.recv().unwrap();
    let (size, used) = (handle.stack().size, handle.stack_high_water_mark().unwrap());
    assert!((USED..size).contains(&used), "{used} of {size}");
    // A filter is its thread's.
    std::thread::scope(|s| {
        s.spawn(|| {
            deny(libc::SYS_mincore, libc::EPERM).install();
            assert_eq!(handle.stack().size, size);
            let refused = support::errno(handle.stack_high_water_mark());
            assert_eq!(refused, Some(libc::EPERM));
        });
    });
    drop(end);
}

#[test]
fn an_errno_that_has_no_name_is_reported_as_the_filter_gave_it() {
    if under_valgrind() {
        skip!("valgrind refuses filters");
    }
    const NAMELESS: i32 = 1234;
    nptl::spawn(|| ()).unwrap().join().unwrap();
    let error: SpawnError = std::thread::spawn(|| {
        deny(libc::SYS_clone3, NAMELESS).install();
        nptl::spawn(|| ()).unwrap_err()
    })
    .join()
    .unwrap();
    assert_eq!(error.step(), Step::Clone);
    assert_eq!(error.errno(), NAMELESS);
    assert_eq!(error.pthread_errno(), NAMELESS);
    assert!(error.to_string().contains("errno=1234"), "{error}");
}

/// What a first spawn does once is done: no call of it may follow behind a filter that knows only spawn's own.
#[test]
fn after_prepare_a_spawn_makes_the_documented_calls_only() {
    let name = "face::after_prepare_a_spawn_makes_the_documented_calls_only";
    if case().is_none() {
        if under_valgrind() {
            skip!("valgrind makes system calls of its own");
        }
        or_skip!(child(name, "run").run()).success();
        return;
    }
    nptl::prepare().unwrap();
    nptl::prepare().unwrap();
    assert_eq!(nptl::StackCache::global().stats().mapped_stacks, 0);
    // The tables for each spawn, cache miss included; and what the new thread and malloc do.
    allow_only(
        [
            libc::SYS_rt_sigprocmask,
            libc::SYS_clone3,
            libc::SYS_clone,
            libc::SYS_futex,
            libc::SYS_prlimit64,
            libc::SYS_mmap,
            libc::SYS_munmap,
            libc::SYS_mprotect,
            libc::SYS_madvise,
            libc::SYS_brk,
            libc::SYS_set_robust_list,
            libc::SYS_rseq,
            libc::SYS_sigaltstack,
            libc::SYS_exit,
            libc::SYS_write,
            libc::SYS_exit_group,
        ]
        .map(allow),
    );
    for _ in 0..2 {
        assert_eq!(nptl::spawn(|| 7).unwrap().join().unwrap(), 7);
    }
    // Without std's own way out, which asks for more.
    report("spawned", 2);
    // SAFETY: ends the process.
    unsafe { libc::_exit(0) };
}

#[test]
fn a_refusal_of_a_thread_of_std_is_explained_and_never_proven() {
    let name = "face::a_refusal_of_a_thread_of_std_is_explained_and_never_proven";
    if case().is_none() {
        let output = or_skip!(child(name, "run").run()).success();
        if let Some(why) = output.skipped() {
            skip!("{why}");
        }
        return;
    }
    or_skip!(become_unused_user());
    set_rlimit(libc::RLIMIT_NPROC, 1);
    let error = std::thread::Builder::new().spawn(|| ()).unwrap_err();
    let explanation = nptl::explain(error.raw_os_error().unwrap());
    assert_eq!(explanation.errno(), libc::EAGAIN);
    assert_eq!(
        explanation.cause().kind(),
        CauseKind::UserProcesses,
        "{explanation}"
    );
    assert_eq!(explanation.certainty(), Certainty::Inferred);
    assert!(explanation.report().to_string().contains("RLIMIT_NPROC"));
    assert!(
        nptl::last_failure().is_none(),
        "nothing of this crate was refused"
    );

    // pthread_create says EAGAIN where its stack could not be mapped, too.
    set_rlimit(libc::RLIMIT_NPROC, 1000);
    set_rlimit(libc::RLIMIT_AS, 0);
    let explanation = nptl::explain(libc::EAGAIN);
    assert_eq!(
        explanation.cause().kind(),
        CauseKind::AddressSpace,
        "{explanation}"
    );
    assert_eq!(explanation.certainty(), Certainty::Inferred);
    set_rlimit(libc::RLIMIT_AS, libc::RLIM_INFINITY);
    let explanation = nptl::explain(libc::EAGAIN);
    assert_eq!(explanation.certainty(), Certainty::Unknown, "{explanation}");
}

#[test]
fn what_borrows_can_be_given_to_a_thread_that_is_joined_in_time() {
    let words = ["one".to_owned(), "two".to_owned()];
    // SAFETY: joined before `words` goes.
    let handle = unsafe { Builder::new().spawn_unchecked(|| &words[1]) }.unwrap();
    assert_eq!(handle.join().unwrap(), "two");
}

#[test]
fn a_refused_closure_comes_back_in_an_error_that_becomes_the_spawn_error() {
    let refused = Builder::new().stack_size(usize::MAX).spawn_or_return(|| 7);
    let refused = refused.unwrap_err();
    let line = refused.error().to_string();
    assert_eq!(
        (refused.to_string(), format!("{refused:?}")),
        (line.clone(), line.clone())
    );
    assert!(std::error::Error::source(&refused).is_some());
    assert_eq!(refused.into_parts().1(), 7);
    let question = || -> Result<(), SpawnError> {
        Builder::new()
            .stack_size(usize::MAX)
            .spawn_or_return(|| ())?;
        Ok(())
    };
    assert_eq!(question().unwrap_err().to_string(), line);
}

/// What std's types are, ours are, too. Compiled, not run.
mod bounds {
    use nptl::diagnose::{
        self, CauseKind, Causes, Explanation, Headroom, HeadroomLimit, InlinePath,
    };
    use nptl::seccomp::{Phase, SystemCall};
    use nptl::{
        Builder, Cancelled, Cause, Certainty, CoreScheduling, Errno, JoinHandle, Refused,
        RetryPolicy, Scheduler, Scope, ScopedJoinHandle, SetupError, SpawnError, StackCache,
        StackCacheConfig, StackCacheStats, StackFate, StackInfo, StackOrigin, StackOutcome,
        StartGate, Step,
    };
    use std::cell::Cell;
    use std::error::Error;
    use std::fmt::{Debug, Display};
    use std::hash::Hash;
    use std::panic::{RefUnwindSafe, UnwindSafe};
    use std::path::Path;

    const fn threads<T: Send + Sync + Unpin>() {}
    const fn unwinds<T: UnwindSafe + RefUnwindSafe>() {}
    const fn plain<
        T: Copy + Debug + Eq + Hash + Send + Sync + UnwindSafe + RefUnwindSafe + 'static,
    >() {
    }
    const fn error<
        T: Error + Display + Debug + Send + Sync + UnwindSafe + RefUnwindSafe + 'static,
    >() {
    }

    const _: () = {
        // std::thread's own, as far as they go: its JoinHandle and ScopedJoinHandle are not UnwindSafe.
        threads::<JoinHandle<Cell<i32>>>();
        threads::<ScopedJoinHandle<'static, Cell<i32>>>();
        threads::<Scope<'static, 'static>>();
        threads::<Builder>();
        unwinds::<Builder>();

        error::<SpawnError>();
        error::<Errno>();
        error::<Refused<fn()>>();
        threads::<StackCache>();
        unwinds::<StackCache>();
        threads::<Explanation>();
        unwinds::<Explanation>();
        threads::<Headroom>();
        unwinds::<Headroom>();

        threads::<StartGate>();
        unwinds::<StartGate>();
        error::<Cancelled>();
        plain::<Cancelled>();
        plain::<Scheduler>();
        plain::<CoreScheduling>();
        plain::<Phase>();
        plain::<SystemCall>();

        plain::<Errno>();
        plain::<Step>();
        plain::<StackOrigin>();
        plain::<StackFate>();
        plain::<StackOutcome>();
        plain::<StackInfo>();
        plain::<RetryPolicy>();
        plain::<StackCacheConfig>();
        plain::<StackCacheStats>();
        plain::<Cause>();
        plain::<Certainty>();
        plain::<CauseKind>();
        plain::<Causes>();
        plain::<InlinePath>();
        plain::<diagnose::Unit>();
        plain::<diagnose::Answer>();
    };

    #[expect(dead_code, reason = "its bounds are checked")]
    fn conversions(error: SpawnError, headroom: &Headroom, path: &InlinePath, causes: Causes) {
        fn clones<T: Clone>(_: &T) {}
        clones(&error);
        let _: std::io::Error = error.errno().into();
        let _: i32 = error.errno().into();
        let _: &Path = path.as_ref();
        let _: Option<&HeadroomLimit> = headroom.into_iter().next();
        let _: Option<CauseKind> = causes.into_iter().next();
        let _: std::io::Error = error.into();
        let _: fn(u32) -> std::io::Result<Headroom> = diagnose::headroom_of;
        let _: fn(i32) -> Explanation = nptl::explain;
        let _: fn() -> Headroom = nptl::headroom;
        let _: fn() -> Option<SpawnError> = nptl::last_failure;
        let _: fn() -> Option<String> = nptl::current_name;
        let _: fn() -> Result<(), SpawnError> = nptl::prepare;
    }

    #[expect(dead_code, reason = "its types are checked")]
    fn handle(handle: &JoinHandle<()>) {
        let _: libc::pid_t = handle.tid();
        let _: libc::pthread_t = handle.as_pthread_t();
        let _: std::io::Result<()> = handle.kill(0);
        let _: std::io::Result<std::os::fd::OwnedFd> = handle.pidfd();
        let _: StackInfo = handle.stack();
        let _: std::io::Result<usize> = handle.stack_high_water_mark();
        let _: std::io::Result<std::time::Duration> = handle.cpu_time();
        let _: bool = handle.wait_timeout(std::time::Duration::ZERO) || handle.is_finished();
        let _: Option<&str> = handle.name();
        let _: Option<&std::thread::Thread> = handle.thread();
        let _: std::io::Result<Vec<usize>> = handle.cpu_affinity();
        let _: std::io::Result<()> = handle.set_cpu_affinity(0..2);
        let _: std::io::Result<Scheduler> = handle.scheduler();
        let _: std::io::Result<()> = handle.set_scheduler(Scheduler::Idle);
    }

    #[expect(dead_code, reason = "its types are checked")]
    fn builder(gate: StartGate, directory: std::fs::File) {
        let builder = Builder::new()
            .cpu_affinity([0])
            .scheduler(Scheduler::Other { nice: 0 })
            .blocked_signals([libc::SIGTERM])
            .cgroup(directory)
            .core_scheduling(CoreScheduling::New)
            .lock_stack(true)
            .prefault_stack(0)
            .start_gate(&gate)
            .publish_std_thread(true);
        let _: Result<JoinHandle<i32>, Refused<u8>> = builder.clone().spawn_with(1, i32::from);
        // What a setup makes need not leave its thread.
        let setup = || Ok::<_, String>(std::rc::Rc::new(1));
        let spawned: Result<JoinHandle<i32>, SetupError<String>> =
            builder.spawn_with_setup(setup, |made| *made);
        match spawned {
            Ok(_) => gate.open(),
            Err(SetupError::Refused(_) | SetupError::Failed(_) | SetupError::Panicked(_)) => {
                gate.cancel();
            }
        }
    }
}
