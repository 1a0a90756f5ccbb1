//! Threads that end in other ways than by returning: what glibc, the handle and the cache make of them.

use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use nptl::{Builder, JoinHandle, StackCache, StackCacheConfig};
use support::{
    Snapshot, allow_only, await_reaping, case, child, firecracker_vcpu_filter, listed_threads,
    or_skip, report,
};

unsafe extern "C-unwind" {
    fn pthread_exit(result: *mut libc::c_void) -> !;
}

unsafe extern "C" {
    fn pthread_cancel(thread: libc::pthread_t) -> libc::c_int;
    fn pthread_mutexattr_setrobust(
        attributes: *mut libc::pthread_mutexattr_t,
        robust: libc::c_int,
    ) -> libc::c_int;
}

/// A way out of a closure that skips everything after it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Death {
    /// exit(2), and nothing else.
    Exit,
    /// SECCOMP_RET_KILL_THREAD.
    Filter,
}

fn die(how: Death) -> ! {
    match how {
        // SAFETY: ends this thread alone; nothing on its stack is borrowed by another.
        Death::Exit => unsafe {
            libc::syscall(libc::SYS_exit, 0);
        },
        Death::Filter => {
            kill_thread_on(libc::SYS_getppid);
            // SAFETY: the filter ends the thread here.
            unsafe { libc::getppid() };
        }
    }
    unreachable!("the thread lives on")
}

/// From here on `syscall` kills the calling thread, and only it.
fn kill_thread_on(syscall: libc::c_long) {
    let statement = |code: u32, k: u32, jf: u8| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf,
        k,
    };
    let give = libc::BPF_RET | libc::BPF_K;
    let program = [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        statement(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            u32::try_from(syscall).expect("a system call"),
            1,
        ),
        statement(give, libc::SECCOMP_RET_KILL_THREAD, 0),
        statement(give, libc::SECCOMP_RET_ALLOW, 0),
    ];
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the program is valid for the time of the calls.
    let answer = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::prctl(
            libc::PR_SET_SECCOMP,
            libc::SECCOMP_MODE_FILTER,
            &raw const program,
        )
    };
    assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
}

/// Waits until the kernel has cleared the tid word of a thread that cannot be joined.
fn wait_until_gone(tid: i32) {
    // SAFETY: signal 0 only asks.
    while unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, 0) } == 0 {
        std::thread::yield_now();
    }
}

/// All threads take part in glibc's broadcast, so one that it counts on in vain shows here.
fn change_user() {
    // SAFETY: plain numbers; the caller is in a child process of its own.
    unsafe {
        assert_eq!(
            libc::seteuid(65_534),
            0,
            "{}",
            std::io::Error::last_os_error()
        );
        assert_eq!(libc::seteuid(0), 0, "{}", std::io::Error::last_os_error());
    }
}

/// joined, detached and scoped; then everything that trips over a dead thread: set-id, dlopen's walk of the
/// list, reuse, unmapping.
#[test]
fn a_thread_that_dies_without_returning_leaves_nothing() {
    if let Some(name) = case() {
        let how = if name == "exit" {
            Death::Exit
        } else {
            Death::Filter
        };
        nptl::spawn(|| ())
            .expect("a thread")
            .join()
            .expect("its end");
        let cache = StackCache::new(StackCacheConfig::default());
        let build = || Builder::new().stack_cache(&cache).stack_size(128 << 10);
        let one = |how| build().spawn(move || die(how)).expect("a thread");
        // A dead thread's arena stays attached to no thread; malloc makes a bounded number of them.
        for _ in 0..16 * std::thread::available_parallelism().map_or(1, usize::from) {
            let handle = build().spawn(move || {
                drop(std::hint::black_box(vec![1_u8; 5000]));
                die(how)
            });
            let result: Result<(), _> = handle.expect("a thread").join();
            assert!(result.is_err());
        }
        cache.clear();
        drop((Snapshot::take(), Snapshot::take()));
        await_reaping();
        let (before, listed) = (Snapshot::take(), listed_threads());
        for round in 0..20 {
            let result = one(how).join();
            let why = result.expect_err("an error");
            assert!(
                why.downcast_ref::<&str>()
                    .expect("a text")
                    .contains("without returning")
            );
            assert_eq!(listed_threads(), listed, "round {round}");
            change_user();
            if round % 2 == 0 {
                let stats = cache.stats();
                assert_eq!((stats.live_stacks, stats.cached_stacks), (0, 1));
                cache.clear();
                assert_eq!(cache.stats().mapped_stacks, 0);
                change_user();
            } else {
                // The next thread on the same stack is as good as any.
                let handle = build().spawn(|| std::hint::black_box(vec![1_u8; 5000]).len());
                assert_eq!(handle.expect("a thread").join().expect("its end"), 5000);
                change_user();
            }
            let timed = one(how).join_timeout(Duration::from_secs(60));
            assert!(timed.expect("the end of the thread").is_err());
            let mut handle = one(how);
            loop {
                match handle.try_join() {
                    Ok(result) => break assert!(result.is_err()),
                    Err(back) => handle = back,
                }
                std::thread::yield_now();
            }
        }
        cache.clear();
        await_reaping();
        before.diff(&Snapshot::take()).expect_nothing_left();

        // Detached: only clear and trim look at them.
        let before = Snapshot::take();
        for sweep in [StackCache::clear, |cache: &StackCache| cache.trim(0)] {
            for _ in 0..10 {
                let handles: Vec<_> = (0..5).map(|_| one(how)).collect();
                let tids: Vec<_> = handles.iter().map(|handle| handle.tid()).collect();
                handles.into_iter().for_each(JoinHandle::detach);
                tids.into_iter().for_each(wait_until_gone);
                change_user();
                sweep(&cache);
                assert_eq!(cache.stats().mapped_stacks, 0, "{:?}", cache.stats());
                assert_eq!(listed_threads(), listed);
                change_user();
            }
        }
        before.diff(&Snapshot::take()).expect_nothing_left();
        // A sweep must leave those alone that live.
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let living = build()
            .spawn(move || wait.recv().is_err())
            .expect("a thread");
        cache.clear();
        assert_eq!(cache.stats().live_stacks, 1);
        drop(end);
        assert!(living.join().expect("its end"));
        report("good", "yes");
        return;
    }
    for name in ["exit", "filter"] {
        let test = "endings::a_thread_that_dies_without_returning_leaves_nothing";
        let output = or_skip!(child(test, name).time_limit(Duration::from_secs(60)).run());
        assert_eq!(output.success().get("good"), Some("yes"), "{name}");
    }
}

/// A filter can also kill the thread later: in its last system calls, when it has already counted itself
/// out, or given its stack back.
#[test]
fn a_filter_that_kills_on_the_way_out() {
    let cases = [
        ("rt_sigprocmask", libc::SYS_rt_sigprocmask),
        ("madvise", libc::SYS_madvise),
    ];
    if let Some(name) = case() {
        let number = cases.iter().find(|case| case.0 == name).expect("a case").1;
        let cache = StackCache::new(StackCacheConfig::default().keep_resident(4096));
        let build = || Builder::new().stack_cache(&cache).stack_size(128 << 10);
        build()
            .spawn(|| ())
            .expect("a thread")
            .join()
            .expect("its end");
        let listed = listed_threads();
        for _ in 0..10 {
            let handle = build().spawn(move || {
                kill_thread_on(number);
                6
            });
            // It returned, so its result is there, whatever came after that.
            assert_eq!(handle.expect("a thread").join().expect("a result"), 6);
            assert_eq!(listed_threads(), listed);
            change_user();
            let handle = build()
                .spawn(move || kill_thread_on(number))
                .expect("a thread");
            let tid = handle.tid();
            handle.detach();
            wait_until_gone(tid);
            change_user();
            cache.clear();
            assert_eq!(cache.stats().mapped_stacks, 0, "{:?}", cache.stats());
            assert_eq!(listed_threads(), listed);
            change_user();
        }
        report("threads", Snapshot::take().glibc_threads.unwrap_or(0));
        report("good", "yes");
        return;
    }
    for (name, _) in cases {
        let test = "endings::a_filter_that_kills_on_the_way_out";
        let output = or_skip!(child(test, name).time_limit(Duration::from_secs(60)).run());
        let output = output.success();
        assert_eq!(output.get("good"), Some("yes"), "{name}");
        // A count that fell below the truth would end the process with the wrong thread.
        assert_eq!(output.get("threads"), Some("2"), "{name}");
    }
}

struct RobustMutex(std::cell::UnsafeCell<libc::pthread_mutex_t>);
// SAFETY: it is a mutex.
unsafe impl Sync for RobustMutex {}

impl RobustMutex {
    fn new() -> &'static RobustMutex {
        // SAFETY: initialised here, in its final place.
        unsafe {
            let mutex = Box::leak(Box::new(RobustMutex(std::mem::zeroed())));
            let mut attributes = std::mem::zeroed();
            libc::pthread_mutexattr_init(&raw mut attributes);
            pthread_mutexattr_setrobust(&raw mut attributes, 1);
            libc::pthread_mutex_init(mutex.0.get(), &raw const attributes);
            mutex
        }
    }

    fn lock(&self) -> libc::c_int {
        // SAFETY: an initialised mutex.
        unsafe { libc::pthread_mutex_lock(self.0.get()) }
    }

    fn consistent_and_unlock(&self) -> (libc::c_int, libc::c_int) {
        // SAFETY: the caller got it from its dead owner.
        unsafe {
            (
                libc::pthread_mutex_consistent(self.0.get()),
                libc::pthread_mutex_unlock(self.0.get()),
            )
        }
    }
}

#[test]
fn a_robust_mutex_of_a_dying_thread_says_so() {
    if case().is_some() {
        let mutexes = [RobustMutex::new(), RobustMutex::new(), RobustMutex::new()];
        let ends: [fn(); 4] = [
            || (),
            || die(Death::Exit),
            || die(Death::Filter),
            || std::panic::resume_unwind(Box::new(1)),
        ];
        // Reused blocks included: the list must be empty again for every thread.
        for round in 0..40 {
            let end = ends[round % ends.len()];
            let handle = nptl::spawn(move || {
                for mutex in mutexes {
                    assert_eq!(mutex.lock(), 0);
                }
                end();
            });
            let _ = handle.expect("a thread").join();
            for mutex in mutexes {
                assert_eq!(mutex.lock(), libc::EOWNERDEAD, "round {round}");
                assert_eq!(mutex.consistent_and_unlock(), (0, 0));
            }
            // One that is waited for while its owner dies.
            let (locked, wait) = std::sync::mpsc::channel();
            let owner = nptl::spawn(move || {
                assert_eq!(mutexes[0].lock(), 0);
                locked.send(()).expect("a receiver");
                end();
            });
            wait.recv().expect("the lock");
            let waiter = nptl::spawn(move || {
                let answer = mutexes[0].lock();
                (answer, mutexes[0].consistent_and_unlock())
            });
            let _ = owner.expect("a thread").join();
            let answers = waiter.expect("a thread").join().expect("its end");
            assert_eq!(answers, (libc::EOWNERDEAD, (0, 0)), "round {round}");
            // And a thread that unlocks leaves it in order.
            let tidy = nptl::spawn(move || {
                assert_eq!(mutexes[1].lock(), 0);
                mutexes[1].consistent_and_unlock().1
            });
            assert_eq!(tidy.expect("a thread").join().expect("its end"), 0);
            assert_eq!(mutexes[1].lock(), 0);
            assert_eq!(mutexes[1].consistent_and_unlock().1, 0);
        }
        report("good", "yes");
        return;
    }
    let output = child("endings::a_robust_mutex_of_a_dying_thread_says_so", "die").run();
    assert_eq!(or_skip!(output).success().get("good"), Some("yes"));
}

/// Documented: a forced unwind cannot pass `catch_unwind`.
#[test]
fn pthread_exit_in_a_closure_aborts_the_process() {
    if case().is_some() {
        // SAFETY: the process ends here.
        let handle = nptl::spawn(|| unsafe { pthread_exit(std::ptr::null_mut()) });
        let _: Result<(), _> = handle.expect("a thread").join();
        report("alive", "yes");
        return;
    }
    let output = or_skip!(
        child(
            "endings::pthread_exit_in_a_closure_aborts_the_process",
            "exit"
        )
        .run()
    );
    assert_eq!(output.signal(), Some(libc::SIGABRT), "{output}");
    assert_eq!(output.get("alive"), None);
    assert!(output.stderr.contains("exception not rethrown"), "{output}");
}

/// Documented: cancellation is disabled, so a request stays pending, and dies with the thread.
#[test]
fn pthread_cancel_stays_pending() {
    if case().is_some() {
        let drops = std::sync::Arc::new(AtomicUsize::new(0));
        for round in 0..50 {
            let (go, wait) = std::sync::mpsc::channel::<()>();
            let (ready, started) = std::sync::mpsc::channel::<()>();
            let guard = std::sync::Arc::clone(&drops);
            let handle = nptl::spawn(move || {
                struct Count(std::sync::Arc<AtomicUsize>);
                impl Drop for Count {
                    fn drop(&mut self) {
                        self.0.fetch_add(1, Ordering::Relaxed);
                    }
                }
                let _count = Count(guard);
                ready.send(()).expect("a receiver");
                let _ = wait.recv();
                // Cancellation points, one of which blocks.
                let mut time = libc::timespec {
                    tv_sec: 0,
                    tv_nsec: 1,
                };
                // SAFETY: plain calls with valid places.
                unsafe {
                    libc::nanosleep(&raw const time, &raw mut time);
                    libc::write(1, [].as_ptr(), 0);
                }
                println!("still here");
                round
            });
            let handle = handle.expect("a thread");
            started.recv().expect("a start");
            // SAFETY: the handle keeps the pthread_t valid.
            assert_eq!(unsafe { pthread_cancel(handle.as_pthread_t()) }, 0);
            drop(go);
            assert_eq!(handle.join().expect("its end"), round);
            assert_eq!(drops.load(Ordering::Relaxed), round + 1);
            // The next one on this block has no request pending.
            let next = nptl::spawn(|| {
                // SAFETY: takes two plain places; restored at once.
                unsafe {
                    unsafe extern "C-unwind" {
                        fn pthread_setcancelstate(state: i32, old: *mut i32) -> i32;
                        fn pthread_testcancel();
                    }
                    let mut old = -1;
                    pthread_setcancelstate(0, &raw mut old);
                    pthread_testcancel();
                    pthread_setcancelstate(old, std::ptr::null_mut());
                    old
                }
            });
            assert_eq!(next.expect("a thread").join().expect("its end"), 1);
        }
        report("good", "yes");
        return;
    }
    let output = or_skip!(child("endings::pthread_cancel_stays_pending", "cancel").run());
    assert_eq!(output.success().get("good"), Some("yes"));
}

/// A vCPU's life: the filter is the closure's first act, and its end must pass it.
#[test]
fn a_thread_behind_firecrackers_filter_ends_normally() {
    if case().is_some() {
        static ENDED: AtomicU32 = AtomicU32::new(0);
        fn vcpu() -> u32 {
            allow_only(firecracker_vcpu_filter());
            // Stack that must be given back, heap, and thread-locals of both kinds.
            let deep = std::hint::black_box([1_u8; 60_000]);
            let block = std::hint::black_box(vec![1_u8; 3000]);
            thread_local!(static LAST: Last = const { Last });
            struct Last;
            impl Drop for Last {
                fn drop(&mut self) {
                    ENDED.fetch_add(1, Ordering::Release);
                }
            }
            LAST.with(|_| ());
            deep.iter().chain(&block).map(|&byte| u32::from(byte)).sum()
        }
        // A cache that keeps little, so that ending threads discard, and push others out.
        let small = StackCache::new(
            StackCacheConfig::default()
                .keep_resident(4096)
                .resident_budget(200 << 10),
        );
        for cache in [StackCache::global(), &small] {
            let build = |name: &str| Builder::new().name(name).stack_cache(cache);
            let eight = || {
                let named = |index| build(&format!("fc_vcpu {index}"));
                let started = (0..8).map(|index| named(index).spawn(vcpu).expect("a thread"));
                started.collect::<Vec<_>>()
            };
            let mut ended = ENDED.load(Ordering::Acquire);
            for _ in 0..20 {
                for handle in eight() {
                    assert_eq!(handle.join().expect("its end"), 63_000);
                }
                let handles = eight();
                let tids: Vec<_> = handles.iter().map(|handle| handle.tid()).collect();
                handles.into_iter().for_each(JoinHandle::detach);
                tids.into_iter().for_each(wait_until_gone);
                let sum: u32 = nptl::scope(|scope| {
                    let handles: Vec<_> = (0..7)
                        .map(|_| build("scoped").spawn_scoped(scope, vcpu).expect("a thread"))
                        .collect();
                    // One is not joined: the scope's end waits for it.
                    let _ = build("late").spawn_scoped(scope, vcpu).expect("a thread");
                    handles
                        .into_iter()
                        .map(|handle| handle.join().expect("its end"))
                        .sum()
                });
                assert_eq!(sum, 7 * 63_000);
                ended += 24;
            }
            // The unjoined scoped ones run their destructors after the scope has gone on.
            while ENDED.load(Ordering::Acquire) < ended {
                std::thread::yield_now();
            }
        }
        report("good", "yes");
        return;
    }
    let test = "endings::a_thread_behind_firecrackers_filter_ends_normally";
    let output = or_skip!(child(test, "run").time_limit(Duration::from_secs(60)).run());
    assert_eq!(output.success().get("good"), Some("yes"));
}

/// The list in the crate's documentation, as a filter, in its worst hour: many threads end at once, joined, detached
/// and scoped, in a cache that holds few of them, with more of them than processors.
#[test]
fn an_ending_thread_makes_only_the_documented_calls() {
    let test = "endings::an_ending_thread_makes_only_the_documented_calls";
    support::alone(test, || {
        let documented = support::Documented::new();
        let small = StackCache::new(
            StackCacheConfig::default()
                .keep_resident(4096)
                .resident_budget(100 << 10),
        );
        for cache in [StackCache::global(), &small] {
            for round in 0..200 {
                let open = std::sync::RwLock::new(());
                let shut = open.write().expect("not poisoned");
                nptl::scope(|scope| {
                    let build = || Builder::new().stack_cache(cache).stack_size(128 << 10);
                    let body = || {
                        drop(open.read().expect("not poisoned"));
                        documented.install();
                        // Something to discard.
                        std::hint::black_box([1_u8; 32 << 10]);
                    };
                    let handles: Vec<_> = (0..16)
                        .map(|_| build().spawn_scoped(scope, body).expect("a thread"))
                        .collect();
                    drop(shut);
                    let mut handles = handles.into_iter();
                    // Half of them are not joined: the scope's end waits for those.
                    handles
                        .by_ref()
                        .take(8)
                        .for_each(|handle| handle.join().expect("its end"));
                });
                assert_eq!(support::undocumented_call(), None, "round {round}");
            }
        }
    });
}

/// A panic behind the filter: the payload arrives. The hook is quiet, because printing a backtrace needs
/// more than the filter allows.
#[test]
fn a_panic_behind_firecrackers_filter_is_delivered() {
    if case().is_some() {
        let handle = nptl::spawn(|| {
            allow_only(firecracker_vcpu_filter());
            std::panic::resume_unwind(Box::new(17_u8));
        });
        let result: Result<(), _> = handle.expect("a thread").join();
        let payload = result.expect_err("a panic");
        report("payload", payload.downcast_ref::<u8>().expect("a number"));
        return;
    }
    let test = "endings::a_panic_behind_firecrackers_filter_is_delivered";
    let output = or_skip!(child(test, "run").time_limit(Duration::from_secs(60)).run());
    assert_eq!(output.success().get("payload"), Some("17"));
}

/// Dropped, it counts and panics.
struct Bomb;

static BOMBS: AtomicUsize = AtomicUsize::new(0);

impl Drop for Bomb {
    fn drop(&mut self) {
        BOMBS.fetch_add(1, Ordering::Relaxed);
        panic!("a destructor's own");
    }
}

/// A filter kills a thread before its closure ran. Nothing that it held outlives its burial: neither the closure
/// (whose panicking destructor must not harm other threads), nor its scope, nor its private cache.
#[test]
fn what_a_dead_thread_held_goes_with_it() {
    if let Some(name) = case() {
        nptl::spawn(|| ())
            .expect("a thread")
            .join()
            .expect("its end");
        let cache = StackCache::new(StackCacheConfig::default());
        let builder = Builder::new().stack_cache(&cache).name("short-lived");
        // Every new thread's first call; this one never makes it.
        kill_thread_on(libc::SYS_set_robust_list);
        let bomb = Bomb;
        let body = move || {
            std::hint::black_box(&bomb);
        };
        let base = match &*name {
            "joined" => {
                let thread = builder.clone().spawn(body).expect("a thread");
                let base = thread.stack().base;
                assert!(thread.join().is_err());
                base
            }
            "scoped" => nptl::scope(|scope| {
                let thread = builder.clone().spawn_scoped(scope, body).expect("a thread");
                let base = thread.stack().base;
                assert!(thread.join().is_err());
                base
            }),
            _ => {
                let thread = builder.clone().spawn(body).expect("a thread");
                let (base, tid) = (thread.stack().base, thread.tid());
                thread.detach();
                wait_until_gone(tid);
                cache.trim(0);
                base
            }
        };
        report("bombs", BOMBS.load(Ordering::Relaxed));
        drop((builder, cache));
        report("mapped", support::is_mapped(base));
        return;
    }
    for name in ["joined", "scoped", "detached"] {
        let output = child("endings::what_a_dead_thread_held_goes_with_it", name);
        let output = or_skip!(output.time_limit(Duration::from_secs(60)).run()).success();
        assert_eq!(output.get("bombs"), Some("1"), "{name}: {output}");
        assert_eq!(output.get("mapped"), Some("false"), "{name}: {output}");
    }
}

/// Ends the thread that drops it.
struct DiesWhenDropped(Death);

impl Drop for DiesWhenDropped {
    fn drop(&mut self) {
        die(self.0);
    }
}

/// A scope waits for what its threads borrow. One that died, and that is not joined, borrows nothing.
#[test]
fn a_scope_outlives_threads_that_died() {
    let name = "endings::a_scope_outlives_threads_that_died";
    if case().is_some() {
        let number = 7;
        for how in [Death::Exit, Death::Filter] {
            let living = nptl::scope(|scope| {
                let die = scope.spawn(move || die(how)).expect("a thread");
                drop::<nptl::ScopedJoinHandle<'_, ()>>(die);
                let living = scope.spawn(|| number).expect("a thread");
                living.join().expect("its end")
            });
            assert_eq!(living, number);
            // No other thread drops the result.
            nptl::scope(|scope| {
                let (go, wait) = std::sync::mpsc::channel::<()>();
                let body = move || {
                    let _ = wait.recv();
                    DiesWhenDropped(how)
                };
                drop(scope.spawn(body).expect("a thread"));
                drop(go);
            });
        }
        change_user();
        return;
    }
    let output = child(name, "run").time_limit(Duration::from_secs(60));
    or_skip!(output.run()).success();
}

/// The scope looks for threads that died although signals keep waking its own thread: a profiler's, a timer's.
#[test]
fn signals_do_not_keep_a_scope_from_a_thread_that_died() {
    extern "C" fn nothing(_: libc::c_int) {}
    let name = "endings::signals_do_not_keep_a_scope_from_a_thread_that_died";
    if case().is_some() {
        // SAFETY: a handler that does nothing.
        unsafe { libc::signal(libc::SIGPROF, nothing as *const () as usize) };
        // SAFETY: asks for the calling thread's own name.
        let owner = unsafe { libc::pthread_self() };
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_millis(10));
                // SAFETY: that thread waits in its scope for as long as the process lives.
                unsafe { libc::pthread_kill(owner, libc::SIGPROF) };
            }
        });
        nptl::scope(|scope| drop(scope.spawn(|| die(Death::Exit)).expect("a thread")));
        report("scope", "over");
        std::process::exit(0);
    }
    let output = child(name, "run").time_limit(Duration::from_secs(30));
    let output = or_skip!(output.run()).success();
    assert_eq!(output.get("scope"), Some("over"));
}
