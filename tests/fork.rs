//! fork(2) from wherever a process can call it: the child has one thread, and can spawn.

mod support;

use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use nptl::{Builder, JoinHandle, StackCache};
use support::{case, child, or_skip, report};

/// Seconds after which a forked child that hangs dies of SIGALRM.
const PATIENCE: u32 = 30;

/// Forks with atfork handlers, or without (`_Fork`, glibc 2.34).
#[derive(Clone, Copy, PartialEq)]
enum Fork {
    Handlers,
    Bare,
}

impl Fork {
    fn fork(self) -> libc::pid_t {
        // SAFETY: the callers see to it that the child keeps to what it may do.
        let pid = unsafe {
            match self {
                Fork::Handlers => libc::fork(),
                Fork::Bare => {
                    let symbol = libc::dlsym(libc::RTLD_DEFAULT, c"_Fork".as_ptr());
                    assert!(!symbol.is_null());
                    let fork: extern "C" fn() -> libc::pid_t = std::mem::transmute(symbol);
                    fork()
                }
            }
        };
        assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
        if pid == 0 {
            // SAFETY: takes a number.
            unsafe { libc::alarm(PATIENCE) };
        }
        pid
    }
}

/// Runs `work` in a forked child, which then exits with 0, or 1 if it panics; its wait status.
fn in_child(fork: Fork, work: impl FnOnce()) -> i32 {
    let pid = fork.fork();
    if pid == 0 {
        let result = std::panic::catch_unwind(AssertUnwindSafe(work));
        // SAFETY: no destructor of this copy may run.
        unsafe { libc::_exit(i32::from(result.is_err())) };
    }
    wait(pid)
}

fn wait(pid: libc::pid_t) -> i32 {
    let mut status = -1;
    // SAFETY: a valid place; interrupted by nothing but handlers that restart.
    let ended = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert_eq!(ended, pid, "{}", std::io::Error::last_os_error());
    status
}

/// glibc can start no thread in a child of `_Fork`.
fn assert_refused(error: &nptl::SpawnError) {
    assert_eq!(error.step(), nptl::Step::Runtime, "{error}");
    assert!(error.to_string().contains("_Fork"), "{error}");
}

/// What every child of fork must be able to do.
fn spawn_and_join() {
    for round in 0..3 {
        let handle = nptl::spawn(move || {
            let block = std::hint::black_box(vec![round as u8; 2000]);
            let inner = nptl::spawn(|| 5).expect("a nested thread");
            inner.join().expect("its end") + block.len()
        });
        assert_eq!(handle.expect("a thread").join().expect("its end"), 2005);
    }
    let sum: usize = nptl::scope(|scope| {
        let handles: Vec<_> = (0..4)
            .map(|index| scope.spawn(move || index).expect("a thread"))
            .collect();
        handles
            .into_iter()
            .map(|handle| handle.join().expect("its end"))
            .sum()
    });
    assert_eq!(sum, 6);
    nptl::spawn(|| ()).expect("a thread").detach();
}

/// Threads that run while the process forks, in every state of their handles.
struct Bystanders {
    end: std::sync::mpsc::Sender<()>,
    living: JoinHandle<bool>,
    ended: JoinHandle<u8>,
}

impl Bystanders {
    fn new() -> Bystanders {
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let living = nptl::spawn(move || wait.recv().is_err()).expect("a thread");
        let ended = nptl::spawn(|| 8).expect("a thread");
        while !ended.is_finished() {
            std::thread::yield_now();
        }
        Bystanders { end, living, ended }
    }

    /// In the child: the one did not survive; the other's result is in memory.
    fn check_copies(self) {
        let Bystanders { end, living, ended } = self;
        assert_eq!(living.kill(None), Err(nix::errno::Errno::ESRCH));
        assert_eq!(
            living.kill(nix::sys::signal::Signal::SIGTERM),
            Err(nix::errno::Errno::ESRCH)
        );
        assert!(living.pidfd().is_err());
        assert!(living.is_finished());
        let cached = StackCache::global().stats();
        let living = living
            .join_timeout(Duration::from_secs(20))
            .expect("no wait");
        assert!(living.is_err());
        assert_eq!(ended.join().expect("its result"), 8);
        let now = StackCache::global().stats();
        assert_eq!(
            now.cached_stacks,
            cached.cached_stacks + 2,
            "{cached:?} {now:?}"
        );
        std::mem::forget(end);
    }

    fn finish(self) {
        drop(self.end);
        assert!(self.living.join().expect("its end"));
        assert_eq!(self.ended.join().expect("its result"), 8);
    }
}

#[test]
fn the_child_spawns_whoever_forked() {
    let cases = ["main", "ours", "nested"];
    if let Some(name) = case() {
        let fork = Fork::Handlers;
        let nested = name == "nested";
        let run = move || {
            let handles: Vec<_> = (0..6)
                .map(|_| nptl::spawn(|| ()).expect("a thread"))
                .collect();
            handles
                .into_iter()
                .for_each(|handle| handle.join().expect("its end"));
            let mut bystanders = Some(Bystanders::new());
            let before = StackCache::global().stats();
            assert!(before.cached_stacks > 0);
            let status = in_child(fork, || {
                let mut handle = Some(nptl::spawn(|| 3).expect("a thread"));
                assert_eq!(
                    handle.take().map(|handle| handle.join().expect("its end")),
                    Some(3)
                );
                let hits = StackCache::global().stats().hits;
                assert_eq!(hits, before.hits + 1, "a cached stack");
                bystanders.take().expect("two threads").check_copies();
                spawn_and_join();
                if nested {
                    // A child's child, and what its parent leaves is in order as well.
                    assert_eq!(in_child(fork, spawn_and_join), 0);
                    spawn_and_join();
                }
                StackCache::global().clear();
                spawn_and_join();
            });
            assert_eq!(status, 0, "the child's wait status");
            // The parent has lost nothing.
            bystanders.take().expect("two threads").finish();
            spawn_and_join();
        };
        if name.starts_with("ours") {
            nptl::spawn(run).expect("a thread").join().expect("its end");
        } else {
            run();
        }
        report("good", "yes");
        return;
    }
    for name in cases {
        let output = child("the_child_spawns_whoever_forked", name);
        let output = or_skip!(output.time_limit(Duration::from_secs(60)).run()).success();
        assert_eq!(output.get("good"), Some("yes"), "{name}: {output}");
    }
}

/// The status of a child whose end was exit(3), which runs what atexit(3) was told; the kernel's end of a
/// process without threads does not.
const EXITED: i32 = 7;

extern "C" fn exited() {
    // SAFETY: ends the process.
    unsafe { libc::_exit(EXITED) }
}

/// The forking thread is one of ours and returns from its closure in the child, too: the last thread of a
/// process exits with 0.
#[test]
fn the_last_thread_of_a_child_exits_with_0() {
    // In a child of `_Fork` glibc still counts the parent's threads, so the kernel ends the process, with 0.
    let cases = [
        "returns",
        "bare returns",
        "destructor",
        "destructor of a detached thread",
        "outlived",
    ];
    if let Some(name) = case() {
        let fork = if name.starts_with("bare") {
            Fork::Bare
        } else {
            Fork::Handlers
        };
        for _ in 0..20 {
            let (tell, told) = std::sync::mpsc::channel();
            let closure = {
                let name = name.clone();
                move || {
                    if name.starts_with("destructor") {
                        // The first to register is the last to run: the channel's own
                        // thread-locals are gone by then or never were.
                        FORKS.with(|forks| *forks.tell.borrow_mut() = Some(tell));
                        return;
                    }
                    let pid = fork.fork();
                    if pid == 0 {
                        // SAFETY: a function of this program; only exit(3) calls it.
                        unsafe { libc::atexit(exited) };
                        if name == "outlived" {
                            // Ours ends first; a thread that nobody joins is the last.
                            let parent_tid = nix::unistd::gettid().as_raw();
                            let work = move || {
                                while task_exists(parent_tid) {
                                    std::thread::yield_now();
                                }
                            };
                            nptl::spawn(work).expect("a thread").detach();
                        }
                        // The receiver's thread can have held the channel's lock, or malloc's, in the
                        // moment of the fork: nobody here would ever release it.
                        std::mem::forget((tell, name));
                        return;
                    }
                    tell.send(wait(pid)).expect("a receiver");
                }
            };
            let handle = nptl::spawn(closure).expect("a thread");
            let mut handle = Some(handle);
            if name.ends_with("detached thread") {
                drop(handle.take());
            }
            let expected = match fork {
                _ if name.starts_with("destructor") => 0,
                Fork::Bare => 0,
                Fork::Handlers => EXITED << 8,
            };
            assert_eq!(told.recv().expect("a status"), expected, "{name}");
            if let Some(handle) = handle {
                handle.join().expect("its end");
            }
        }
        spawn_and_join();
        report("good", "yes");
        return;
    }
    for name in cases {
        let output = child("the_last_thread_of_a_child_exits_with_0", name);
        let output = or_skip!(output.time_limit(Duration::from_secs(60)).run()).success();
        assert_eq!(output.get("good"), Some("yes"), "{name}: {output}");
    }
}

/// Whether the thread still runs: not gone, not a zombie (a leader that has ended stays one until the
/// process ends).
fn task_exists(tid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z ") && !stat.contains(") X "))
}

struct Forks {
    tell: std::cell::RefCell<Option<std::sync::mpsc::Sender<i32>>>,
}

thread_local! {
    static FORKS: Forks = const {
        Forks { tell: std::cell::RefCell::new(None) }
    };
}

impl Drop for Forks {
    fn drop(&mut self) {
        let tell = self.tell.borrow_mut().take().expect("a channel");
        let pid = Fork::Handlers.fork();
        if pid == 0 {
            // Spawning works here, too; then this thread goes on to its end, the last one.
            spawn_and_join();
            std::mem::forget(tell);
            return;
        }
        tell.send(wait(pid)).expect("a receiver");
    }
}

/// Thousands of forks in the middle of whatever spawning threads do.
#[test]
fn a_fork_in_the_middle_of_spawns_leaves_no_lock_held() {
    const FORKS: usize = 2000;
    if case().is_some() {
        let stop = AtomicBool::new(false);
        let spawned = AtomicUsize::new(0);
        let own = StackCache::new(nptl::StackCacheConfig::default().resident_budget(100 << 10));
        std::thread::scope(|scope| {
            for kind in 0..3 {
                let (stop, spawned, own) = (&stop, &spawned, &own);
                scope.spawn(move || {
                    let mut round = 0_usize;
                    while !stop.load(Ordering::Relaxed) {
                        round += 1;
                        match kind {
                            0 => {
                                let body = || std::hint::black_box(vec![1_u8; 300]).len();
                                let handle = nptl::spawn(body).expect("a thread");
                                assert_eq!(handle.join().expect("its end"), 300);
                            }
                            1 => {
                                // Mapped and unmapped all the time, some detached.
                                let size = (64 << 10) << (round % 4);
                                let builder = Builder::new().stack_cache(own).stack_size(size);
                                let handle = builder.spawn(|| ()).expect("a thread");
                                if round.is_multiple_of(8) {
                                    handle.detach();
                                } else {
                                    handle.join().expect("its end");
                                }
                                if round.is_multiple_of(16) {
                                    own.clear();
                                }
                            }
                            _ => nptl::scope(|scope| {
                                for _ in 0..2 {
                                    scope.spawn(|| ()).expect("a thread");
                                }
                            }),
                        }
                        spawned.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            for round in 0..FORKS {
                let status = in_child(Fork::Handlers, || {
                    let handle = nptl::spawn(|| 7).expect("a thread");
                    assert_eq!(handle.join().expect("its end"), 7);
                    if round.is_multiple_of(8) {
                        spawn_and_join();
                        own.clear();
                        StackCache::global().trim(0);
                        let builder = Builder::new().stack_cache(&own);
                        builder
                            .spawn(|| ())
                            .expect("a thread")
                            .join()
                            .expect("its end");
                    }
                });
                if status != 0 {
                    stop.store(true, Ordering::Relaxed);
                }
                assert_eq!(status, 0, "fork {round}");
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(
            own.stats()
                .live_stacks
                .saturating_sub(own.stats().mapped_stacks),
            0
        );
        report("spawned", spawned.load(Ordering::Relaxed));
        return;
    }
    let output = child(
        "a_fork_in_the_middle_of_spawns_leaves_no_lock_held",
        "storm",
    );
    let output = or_skip!(output.time_limit(Duration::from_secs(110)).run()).success();
    let spawned: usize = output
        .get("spawned")
        .expect("a count")
        .parse()
        .expect("a number");
    assert!(spawned > 1000, "{output}");
}

/// The same, but forced: a spawn is held at each of its system calls while the process forks.
#[test]
fn a_fork_at_each_call_of_a_held_spawn() {
    if let Some(name) = case() {
        let fork = if name == "bare" {
            Fork::Bare
        } else {
            Fork::Handlers
        };
        let calls = [
            libc::SYS_mmap,
            libc::SYS_madvise,
            libc::SYS_rt_sigprocmask,
            libc::SYS_clone3,
            libc::SYS_clone,
            libc::SYS_munmap,
            libc::SYS_exit,
        ];
        nptl::spawn(|| ())
            .expect("a thread")
            .join()
            .expect("its end");
        let held = AtomicUsize::new(0);
        let cache = StackCache::new(nptl::StackCacheConfig::disabled());
        let result = support::supervised(
            &calls,
            |call| {
                // The worker's own end belongs to std.
                if STARTED.load(Ordering::Acquire) {
                    let status = in_child(fork, || {
                        for cache in [&cache, StackCache::global()] {
                            let builder = Builder::new().stack_cache(cache);
                            match (builder.spawn(|| 9), fork) {
                                (Ok(handle), Fork::Handlers) => {
                                    assert_eq!(handle.join().expect("its end"), 9);
                                }
                                (Err(error), Fork::Bare) => assert_refused(&error),
                                (answer, _) => panic!("{answer:?}"),
                            }
                        }
                    });
                    assert_eq!(status, 0, "held at {call:?}");
                    held.fetch_add(1, Ordering::Relaxed);
                }
                None
            },
            || {
                STARTED.store(true, Ordering::Release);
                for cache in [&cache, &cache, StackCache::global()] {
                    let builder = Builder::new().stack_cache(cache).stack_size(64 << 10);
                    let handle = builder.spawn(|| 1).expect("a thread");
                    assert_eq!(handle.join().expect("its end"), 1);
                }
                STARTED.store(false, Ordering::Release);
            },
        );
        or_skip!(result);
        report("held", held.load(Ordering::Relaxed));
        return;
    }
    // Without handlers nothing keeps malloc whole, but a spawn held in the kernel does not hold malloc's
    // locks either.
    for name in ["handlers", "bare"] {
        let output = child("a_fork_at_each_call_of_a_held_spawn", name);
        let output = or_skip!(output.time_limit(Duration::from_secs(90)).run()).success();
        if output.skipped().is_none() {
            let held: usize = output
                .get("held")
                .expect("a count")
                .parse()
                .expect("a number");
            assert!(held >= 20, "{output}");
        }
    }
}

static STARTED: AtomicBool = AtomicBool::new(false);

/// Refusals are recorded all the time while the process forks: no child finds the ring of failures locked.
#[test]
fn a_fork_in_the_middle_of_refusals_leaves_no_lock_held() {
    if let Some(name) = case() {
        let fork = if name == "bare" {
            Fork::Bare
        } else {
            Fork::Handlers
        };
        let refuse = || {
            let builder = Builder::new().stack_size(usize::MAX);
            builder.spawn(|| ()).expect_err("too large").step()
        };
        // Only a process that has used the crate can tell its children apart.
        refuse();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        while !stop.load(Ordering::Acquire) {
                            refuse();
                        }
                    })
                })
                .collect();
            for _ in 0..300 {
                let status = in_child(fork, || {
                    if fork == Fork::Bare {
                        // No heap is needed for that: another thread can have had its lock.
                        assert_eq!(refuse(), nptl::Step::Runtime);
                        return;
                    }
                    assert_eq!(refuse(), nptl::Step::Attributes);
                    let last = nptl::last_failure().expect("a failure");
                    assert_eq!(last.step(), nptl::Step::Attributes);
                });
                assert_eq!(status, 0, "the child hung, or failed");
            }
            stop.store(true, Ordering::Release);
            for thread in threads {
                thread.join().expect("its end");
            }
        });
        report("good", "yes");
        return;
    }
    for name in ["handlers", "bare"] {
        let output = child("a_fork_in_the_middle_of_refusals_leaves_no_lock_held", name);
        let output = or_skip!(output.time_limit(Duration::from_secs(60)).run()).success();
        assert_eq!(output.get("good"), Some("yes"), "{name}: {output}");
    }
}

static FORK_IN_HANDLER: std::sync::Mutex<Option<Fork>> = std::sync::Mutex::new(None);
static FORKED: std::sync::atomic::AtomicI32 = std::sync::atomic::AtomicI32::new(-1);

extern "C" fn fork_in_handler(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // Only once: the filter is the child's, too.
    if let Some(fork) = FORK_IN_HANDLER.lock().expect("a lock").take() {
        FORKED.store(fork.fork(), Ordering::SeqCst);
    }
    // The trapped call fails with EINVAL.
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes the frame that it will restore.
    unsafe { (*context).uc_mcontext.gregs[libc::REG_RAX as usize] = -i64::from(libc::EINVAL) };
}

/// A signal handler forks in the middle of a spawn, and the spawn goes on in the child.
#[test]
fn a_handler_forks_in_mid_spawn() {
    if let Some(name) = case() {
        const MADV_GUARD_INSTALL: u64 = 102;
        let builder = || {
            let cache = StackCache::new(nptl::StackCacheConfig::disabled());
            Builder::new().stack_cache(&cache).stack_size(64 << 10)
        };
        builder()
            .spawn(|| ())
            .expect("a thread")
            .join()
            .expect("its end");
        let action = nix::sys::signal::SigAction::new(
            nix::sys::signal::SigHandler::SigAction(fork_in_handler),
            nix::sys::signal::SaFlags::empty(),
            nix::sys::signal::SigSet::empty(),
        );
        // SAFETY: the handler is only entered from a spawn's own madvise.
        unsafe { nix::sys::signal::sigaction(nix::sys::signal::Signal::SIGSYS, &action) }
            .expect("sigaction");
        let fork = if name == "bare" {
            Fork::Bare
        } else {
            Fork::Handlers
        };
        *FORK_IN_HANDLER.lock().expect("a lock") = Some(fork);
        support::deny(libc::SYS_madvise, libc::EINVAL)
            .when(2, MADV_GUARD_INSTALL)
            .install_trap();

        let answer = builder().spawn(|| 6);
        let forked = FORKED.load(Ordering::SeqCst);
        if forked == 0 {
            let good = std::panic::catch_unwind(AssertUnwindSafe(|| match fork {
                Fork::Handlers => {
                    assert_eq!(answer.expect("a thread").join().expect("its end"), 6);
                    spawn_and_join();
                }
                Fork::Bare => assert_refused(&answer.expect_err("no threads")),
            }));
            // SAFETY: no destructor of this copy may run.
            unsafe { libc::_exit(i32::from(good.is_err())) };
        }
        assert_eq!(answer.expect("a thread").join().expect("its end"), 6);
        assert!(forked > 0, "no guard was asked for");
        assert_eq!(wait(forked), 0);
        return;
    }
    for name in ["handlers", "bare"] {
        let output = child("a_handler_forks_in_mid_spawn", name);
        or_skip!(output.time_limit(Duration::from_secs(60)).run()).success();
    }
}

/// The same while a cached stack is prefaulted. In the child, the handle tells that thread's end from the end of the
/// next one on its stack.
#[test]
fn a_handler_forks_while_a_stack_is_prepared() {
    if case().is_some() {
        const MADV_POPULATE_WRITE: u64 = 23;
        spawn_and_join();
        let action = nix::sys::signal::SigAction::new(
            nix::sys::signal::SigHandler::SigAction(fork_in_handler),
            nix::sys::signal::SaFlags::empty(),
            nix::sys::signal::SigSet::empty(),
        );
        // SAFETY: the handler is only entered from a spawn's own madvise.
        unsafe { nix::sys::signal::sigaction(nix::sys::signal::Signal::SIGSYS, &action) }
            .expect("sigaction");
        *FORK_IN_HANDLER.lock().expect("a lock") = Some(Fork::Handlers);
        support::deny(libc::SYS_madvise, libc::EINVAL)
            .when(2, MADV_POPULATE_WRITE)
            .install_trap();
        let answer = Builder::new().prefault_stack(4096).spawn(support::tid);
        let forked = FORKED.load(Ordering::SeqCst);
        if forked == 0 {
            let good = std::panic::catch_unwind(AssertUnwindSafe(|| {
                let handle = answer.expect("a thread");
                let task = format!("/proc/self/task/{}", handle.tid());
                while std::path::Path::new(&task).exists() {
                    std::thread::yield_now();
                }
                let (end, wait) = std::sync::mpsc::channel::<()>();
                let next = nptl::spawn(move || wait.recv().is_err()).expect("a thread");
                assert!(handle.is_finished(), "it takes the next thread for its own");
                let tid = handle.tid().as_raw();
                assert_eq!(handle.join().expect("its end"), tid);
                drop(end);
                assert!(next.join().expect("its end"));
                assert_eq!(StackCache::global().stats().live_stacks, 0);
            }));
            // SAFETY: no destructor of this copy may run.
            unsafe { libc::_exit(i32::from(good.is_err())) };
        }
        answer.expect("a thread").join().expect("its end");
        assert!(forked > 0, "nothing was prefaulted");
        assert_eq!(wait(forked), 0);
        return;
    }
    let child = child("a_handler_forks_while_a_stack_is_prepared", "run");
    or_skip!(child.time_limit(Duration::from_secs(60)).run()).success();
}
