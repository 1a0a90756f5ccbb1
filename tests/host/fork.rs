//! fork(3) in a program whose own handlers spawn, join and take locks, with other threads anywhere at that moment.

use super::bare::assert_refused;
use super::child::{hold_many, use_threads};
use super::interposed::Packets;
use super::process::{_Fork, BARE, Fork, fork, forked, in_child, is_good, wait};
use super::{spawn_and_join, wait_until};
use nptl::{Builder, JoinHandle, StackCache, StackCacheConfig};
use std::ffi::c_void;
use std::hint::black_box;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use support::{MADV_GUARD_INSTALL, Warden, alone, case, child, deny, or_skip, supervised, tid};

type Handler = extern "C" fn();

/// Registers atfork handlers that do something only while [`ARMED`] is set.
fn register(prepare: Handler, parent: Handler, child: Handler) {
    // SAFETY: functions of this program.
    let answer = unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) };
    assert_eq!(answer, 0);
}

static ARMED: AtomicBool = AtomicBool::new(false);

fn is_armed() -> bool {
    ARMED.load(Ordering::SeqCst)
}

extern "C" fn nothing() {}

/// A thread that fills a part of its stack, and says in the end whether another thread wrote there.
fn watch(end: &'static AtomicBool) -> JoinHandle<bool> {
    let body = move || {
        let mut pattern = black_box([0xa5_u8; 2048]);
        while !end.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        black_box(&mut pattern).iter().all(|&byte| byte == 0xa5)
    };
    nptl::spawn(body).unwrap_or_else(|error| panic!("{error}"))
}

fn scribble() {
    let body = || {
        black_box([0x11_u8; 16 << 10]);
    };
    let handle = nptl::spawn(body).unwrap_or_else(|error| panic!("{error}"));
    handle.join().expect("its end");
}

static WORKER: Mutex<Option<JoinHandle<bool>>> = Mutex::new(None);
static END: AtomicBool = AtomicBool::new(false);

extern "C" fn start_worker() {
    if is_armed() {
        *WORKER.lock().unwrap() = Some(watch(&END));
    }
}

/// The program's child handler runs before the crate's, which must not take the worker for a thread of the parent's.
#[test]
fn a_worker_of_an_earlier_child_handler_keeps_its_stack() {
    alone(
        "fork::a_worker_of_an_earlier_child_handler_keeps_its_stack",
        || {
            register(nothing, nothing, start_worker);
            for handle in [(); 4].map(|()| nptl::spawn(|| ()).unwrap()) {
                handle.join().unwrap();
            }
            static LIVE: AtomicBool = AtomicBool::new(false);
            let living = watch(&LIVE);
            ARMED.store(true, Ordering::SeqCst);
            for _ in 0..5 {
                assert!(is_good(fork, || {
                    (0..10).for_each(|_| scribble());
                    let others: Vec<_> = (0..4).map(|_| watch(&END)).collect();
                    END.store(true, Ordering::SeqCst);
                    let worker = WORKER.lock().unwrap().take().expect("the handler's");
                    assert!(worker.join().unwrap(), "written to");
                    for other in others {
                        assert!(other.join().unwrap(), "written to");
                    }
                }));
            }
            LIVE.store(true, Ordering::SeqCst);
            assert!(living.join().unwrap());
        },
    );
}

extern "C" fn use_the_crate_in_another_thread() {
    if is_armed() {
        std::thread::spawn(|| hold_many(20)).join().unwrap();
    }
}

/// The child handler of the program leaves the work to a thread of std's, which is the first to notice the fork. The thread
/// that forked is one of ours and still runs, on its stack.
#[test]
fn another_thread_notices_the_fork_first() {
    alone("fork::another_thread_notices_the_fork_first", || {
        register(nothing, nothing, use_the_crate_in_another_thread);
        support::burst(&Builder::new(), 3);
        ARMED.store(true, Ordering::SeqCst);
        let forks = || {
            let mut pattern = black_box([0xa5_u8; 2048]);
            let good = is_good(fork, || {
                hold_many(20);
                assert!(black_box(&mut pattern).iter().all(|&byte| byte == 0xa5));
            });
            assert!(good);
        };
        forks();
        nptl::spawn(forks).unwrap().join().unwrap();
        // No handle of it exists.
        let (sender, receiver) = std::sync::mpsc::channel();
        let detached = move || {
            forks();
            sender.send(()).unwrap();
        };
        nptl::spawn(detached).unwrap().detach();
        receiver.recv().unwrap();
    });
}

static POOL: Mutex<()> = Mutex::new(());
static IN_PREPARE: AtomicBool = AtomicBool::new(false);

extern "C" fn take_pool() {
    if is_armed() {
        IN_PREPARE.store(true, Ordering::SeqCst);
        drop(POOL.lock().unwrap());
    }
}

/// As thread pools do: the lock of the pool is held by a thread that spawns and joins.
#[test]
fn a_prepare_handler_takes_a_lock_that_a_spawning_thread_holds() {
    let test = "fork::a_prepare_handler_takes_a_lock_that_a_spawning_thread_holds";
    alone(test, || {
        register(take_pool, nothing, nothing);
        spawn_and_join();
        // SAFETY: takes a number. A parent that hangs dies.
        unsafe { libc::alarm(20) };
        ARMED.store(true, Ordering::SeqCst);
        let has_pool = Arc::new(std::sync::Barrier::new(2));
        let pool = {
            let has_pool = Arc::clone(&has_pool);
            std::thread::spawn(move || {
                let guard = POOL.lock().unwrap();
                has_pool.wait();
                while !IN_PREPARE.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                spawn_and_join();
                drop(guard);
            })
        };
        has_pool.wait();
        assert!(is_good(fork, spawn_and_join));
        pool.join().unwrap();
    });
}

static JOINED: Mutex<Option<JoinHandle<u8>>> = Mutex::new(None);
static SPAWNED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn join_one() {
    if is_armed()
        && let Some(handle) = JOINED.lock().unwrap().take()
    {
        assert_eq!(handle.join().unwrap(), 9);
    }
}

extern "C" fn spawn_one() {
    if is_armed() {
        spawn_and_join();
        SPAWNED.fetch_add(1, Ordering::SeqCst);
    }
}

/// OpenBLAS joins its threads in a prepare handler; others start them again in the parent and in the child. Registered
/// before the crate's handlers and after.
#[test]
fn every_handler_may_spawn_and_join() {
    alone("fork::every_handler_may_spawn_and_join", || {
        register(join_one, spawn_one, spawn_one);
        spawn_and_join();
        register(join_one, spawn_one, spawn_one);
        // SAFETY: as above.
        unsafe { libc::alarm(20) };
        ARMED.store(true, Ordering::SeqCst);
        *JOINED.lock().unwrap() = Some(nptl::spawn(|| 9).unwrap());
        assert!(is_good(fork, || {
            assert_eq!(SPAWNED.load(Ordering::SeqCst), 2);
            spawn_and_join();
        }));
        assert!(JOINED.lock().unwrap().is_none());
        assert_eq!(SPAWNED.load(Ordering::SeqCst), 2);
        spawn_and_join();
    });
}

/// fork(3) does not reset the lock that dl_iterate_phdr takes.
#[test]
fn another_thread_is_inside_dl_iterate_phdr() {
    alone("fork::another_thread_is_inside_dl_iterate_phdr", || {
        static INSIDE: AtomicBool = AtomicBool::new(false);
        static LEAVE: AtomicBool = AtomicBool::new(false);
        unsafe extern "C" fn visit(
            _: *mut libc::dl_phdr_info,
            _: libc::size_t,
            _: *mut c_void,
        ) -> libc::c_int {
            INSIDE.store(true, Ordering::SeqCst);
            while !LEAVE.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            1
        }
        for handle in [(); 3].map(|()| nptl::spawn(|| ()).unwrap()) {
            handle.join().unwrap();
        }
        let inside = std::thread::spawn(|| {
            // SAFETY: the callback looks at nothing.
            unsafe { libc::dl_iterate_phdr(Some(visit), std::ptr::null_mut()) }
        });
        wait_until("inside", || INSIDE.load(Ordering::SeqCst));
        let good = is_good(fork, || (0..5).for_each(|_| spawn_and_join()));
        LEAVE.store(true, Ordering::SeqCst);
        assert_eq!(inside.join().unwrap(), 1);
        assert!(good);
    });
}

/// A thread that another is sending a signal to: the sender, held inside tgkill, has the lock that keeps the tid.
fn while_a_sender_is_held(work: impl FnOnce(&Arc<JoinHandle<()>>, &'static AtomicI32)) {
    /// 0: wait; 1: fork; 2: end.
    static ORDER: AtomicI32 = AtomicI32::new(0);
    static STATUS: AtomicI32 = AtomicI32::new(-1);
    spawn_and_join();
    let warden = or_skip!(Warden::new(&[libc::SYS_tgkill]));
    let target = nptl::spawn(|| {
        while ORDER.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        if ORDER.load(Ordering::SeqCst) == 1 {
            // The child returns from the closure. Another thread of it waits for the end of this one.
            let pid = forked(fork);
            if pid == 0 {
                let first = format!("/proc/self/task/{}/stat", tid());
                let wait = move || {
                    while !std::fs::read_to_string(&first).unwrap().contains(") Z ") {
                        std::thread::yield_now();
                    }
                    // SAFETY: runs nothing of the parent's.
                    unsafe { libc::_exit(0) }
                };
                nptl::spawn(wait).unwrap().detach();
                return;
            }
            STATUS.store(wait(pid), Ordering::SeqCst);
        }
    });
    let target = Arc::new(target.unwrap());
    static SENDER: AtomicI32 = AtomicI32::new(0);
    static GO: AtomicBool = AtomicBool::new(false);
    let sender = {
        let target = Arc::clone(&target);
        std::thread::spawn(move || {
            SENDER.store(tid(), Ordering::SeqCst);
            while !GO.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            target.kill(0).unwrap();
        })
    };
    wait_until("a sender", || SENDER.load(Ordering::SeqCst) != 0);
    warden.hold(SENDER.load(Ordering::SeqCst));
    GO.store(true, Ordering::SeqCst);
    warden.wait_until_held(SENDER.load(Ordering::SeqCst));
    work(&target, &ORDER);
    if ORDER.load(Ordering::SeqCst) == 1 {
        wait_until("the child's end", || STATUS.load(Ordering::SeqCst) != -1);
        assert_eq!(STATUS.load(Ordering::SeqCst), 0, "the child's wait status");
    }
    ORDER.store(2, Ordering::SeqCst);
    warden.release(SENDER.load(Ordering::SeqCst));
    sender.join().unwrap();
}

#[test]
fn a_thread_ends_in_the_child_that_was_being_signalled() {
    let test = "fork::a_thread_ends_in_the_child_that_was_being_signalled";
    alone(test, || {
        while_a_sender_is_held(|_, order| order.store(1, Ordering::SeqCst));
    });
}

#[test]
fn kill_and_pidfd_of_a_copied_handle_do_not_wait() {
    alone(
        "fork::kill_and_pidfd_of_a_copied_handle_do_not_wait",
        || {
            while_a_sender_is_held(|target, _| {
                for how in [fork as Fork].into_iter().chain(BARE) {
                    assert!(is_good(how, || {
                        assert_eq!(support::errno(target.kill(0)), Some(libc::ESRCH));
                        assert_eq!(support::errno(target.pidfd()), Some(libc::ESRCH));
                        assert!(target.is_finished());
                    }));
                }
            });
        },
    );
}

/// The thread is held half-way through its result: a page in the middle of the packet faults, and the handler waits. In the
/// child no thread will ever finish that copy, and the handle does not wait for it.
#[test]
fn a_copied_handle_is_joined_while_its_thread_stores_a_large_result() {
    const LARGE: usize = 4 << 20;
    const PAGE: usize = 4096;
    static MIDDLE: AtomicUsize = AtomicUsize::new(0);
    static HELD: AtomicBool = AtomicBool::new(false);
    static GO: AtomicBool = AtomicBool::new(false);
    static RELEASED: AtomicBool = AtomicBool::new(false);

    fn protect(protection: i32) {
        let middle = MIDDLE.load(Ordering::SeqCst) as *mut c_void;
        // SAFETY: a page of the packet, in which only the result lies.
        assert_eq!(unsafe { libc::mprotect(middle, PAGE, protection) }, 0);
    }
    extern "C" fn wait_in_the_middle(_: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
        // SAFETY: the kernel's own structure.
        let address = unsafe { (*info).si_addr() } as usize;
        if address & !(PAGE - 1) != MIDDLE.load(Ordering::SeqCst) {
            // SAFETY: ends the process.
            unsafe { libc::_exit(3) };
        }
        HELD.store(true, Ordering::SeqCst);
        while !RELEASED.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        protect(libc::PROT_READ | libc::PROT_WRITE);
    }
    /// Forks while the thread is held, with its handle or without.
    fn rounds() {
        type Ask = fn(JoinHandle<[u8; LARGE]>);
        let ways: [(Fork, Ask); 5] = [
            (fork, |handle| assert!(handle.join().is_err())),
            (fork, |handle| assert!(handle.try_join().unwrap().is_err())),
            (fork, drop),
            (_Fork, |handle| assert!(handle.is_finished())),
            (_Fork, drop),
        ];
        for (how, ask) in ways {
            for flag in [&HELD, &GO, &RELEASED] {
                flag.store(false, Ordering::SeqCst);
            }
            let body = || {
                while !GO.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                black_box([1_u8; LARGE])
            };
            let handle = Builder::new().stack_size(LARGE * 32).spawn(body).unwrap();
            let mut handle = Some(handle);
            let packet = Packets::last(LARGE);
            MIDDLE.store((packet + LARGE / 2) & !(PAGE - 1), Ordering::SeqCst);
            protect(libc::PROT_NONE);
            GO.store(true, Ordering::SeqCst);
            wait_until("it stores", || HELD.load(Ordering::SeqCst));
            let good = is_good(how, || ask(handle.take().unwrap()));
            RELEASED.store(true, Ordering::SeqCst);
            let result = handle.take().unwrap().join().unwrap();
            assert!(result.iter().all(|&byte| byte == 1));
            assert!(good);
        }
    }

    let test = "fork::a_copied_handle_is_joined_while_its_thread_stores_a_large_result";
    alone(test, || {
        assert!(nptl::disable_overflow_reports());
        // SAFETY: a handler of this type.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_flags = libc::SA_SIGINFO;
            action.sa_sigaction = wait_in_the_middle as *const () as usize;
            assert_eq!(
                libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut()),
                0
            );
        }
        // The values are moved on the stack.
        let builder = std::thread::Builder::new().stack_size(LARGE * 64);
        builder.spawn(rounds).unwrap().join().unwrap();
    });
}

static DEPTH: AtomicUsize = AtomicUsize::new(0);
static GOOD: AtomicUsize = AtomicUsize::new(0);

/// Forks again, before anything else, then spawns.
extern "C" fn fork_and_spawn() {
    if !is_armed() || DEPTH.fetch_add(1, Ordering::SeqCst) > 1 {
        return;
    }
    GOOD.fetch_add(
        usize::from(is_good(fork, || {
            (0..5).for_each(|_| spawn_and_join());
            assert!(is_good(fork, || (0..5).for_each(|_| spawn_and_join())));
        })),
        Ordering::SeqCst,
    );
    spawn_and_join();
}

/// A child handler forks a child of its own, before the crate's handler has run and after.
#[test]
fn a_child_handler_forks_a_child_that_spawns() {
    alone("fork::a_child_handler_forks_a_child_that_spawns", || {
        register(nothing, nothing, fork_and_spawn);
        spawn_and_join();
        register(nothing, nothing, fork_and_spawn);
        let living = nptl::spawn(std::thread::park).unwrap();
        ARMED.store(true, Ordering::SeqCst);
        assert!(is_good(fork, || {
            assert_eq!(GOOD.load(Ordering::SeqCst), 2);
            assert!(living.is_finished());
            (0..5).for_each(|_| spawn_and_join());
            assert!(is_good(fork, spawn_and_join));
        }));
        assert!(!living.is_finished());
    });
}

const WITH_TLS: &str = r#"
__thread int number = 7;
__attribute__((tls_model("initial-exec"))) __thread int other = 8;
int sum(void) { return number + other; }
"#;

/// Libraries with TLS come and go in another thread, which takes each of the loader's locks. fork(3) does not reset all of
/// them.
#[test]
fn another_thread_loads_libraries() {
    alone("fork::another_thread_loads_libraries", || {
        static STOP: AtomicBool = AtomicBool::new(false);
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let library = Arc::new(or_skip!(super::Library::compile("with-tls", WITH_TLS)));
        for handle in [(); 3].map(|()| nptl::spawn(|| ()).unwrap()) {
            handle.join().unwrap();
        }
        let loader = {
            let library = Arc::clone(&library);
            std::thread::spawn(move || {
                while !STOP.load(Ordering::SeqCst) {
                    let handle = library.open();
                    // SAFETY: nothing of it is in use.
                    assert_eq!(unsafe { libc::dlclose(handle) }, 0);
                    COUNT.fetch_add(1, Ordering::SeqCst);
                }
            })
        };
        wait_until("libraries", || COUNT.load(Ordering::SeqCst) > 3);
        for _ in 0..300 {
            assert!(is_good(fork, || (0..3).for_each(|_| spawn_and_join())));
        }
        STOP.store(true, Ordering::SeqCst);
        loader.join().unwrap();
    });
}

/// A spawn is held at each of its system calls while the process forks.
#[test]
fn a_fork_at_each_call_of_a_held_spawn() {
    alone("fork::a_fork_at_each_call_of_a_held_spawn", || {
        static STARTED: AtomicBool = AtomicBool::new(false);
        let calls = [
            libc::SYS_mmap,
            libc::SYS_madvise,
            libc::SYS_rt_sigprocmask,
            libc::SYS_clone3,
            libc::SYS_clone,
            libc::SYS_munmap,
            libc::SYS_exit,
        ];
        spawn_and_join();
        let held = AtomicUsize::new(0);
        let cache = StackCache::new(StackCacheConfig::disabled());
        let try_each = |check: &dyn Fn(Result<JoinHandle<i32>, nptl::SpawnError>)| {
            for cache in [&cache, StackCache::global()] {
                check(Builder::new().stack_cache(cache).spawn(|| 9));
            }
        };
        let result = supervised(
            &calls,
            |call| {
                // The worker's own end belongs to std.
                if STARTED.load(Ordering::Acquire) {
                    let status = in_child(fork, || {
                        try_each(&|answer| assert_eq!(answer.unwrap().join().unwrap(), 9));
                    });
                    assert_eq!(status, 0, "fork(3), held at {call:?}");
                    // Nothing keeps malloc whole, but a spawn held in the kernel does not hold its locks either.
                    for how in BARE {
                        let status = in_child(how, || {
                            try_each(&|answer| assert_refused(&answer.expect_err("none")));
                        });
                        assert_eq!(status, 0, "a bare fork, held at {call:?}");
                    }
                    held.fetch_add(1, Ordering::Relaxed);
                }
                None
            },
            || {
                STARTED.store(true, Ordering::Release);
                for cache in [&cache, &cache, StackCache::global()] {
                    let builder = Builder::new().stack_cache(cache).stack_size(64 << 10);
                    assert_eq!(builder.spawn(|| 1).unwrap().join().unwrap(), 1);
                }
                STARTED.store(false, Ordering::Release);
            },
        );
        or_skip!(result);
        let held = held.load(Ordering::Relaxed);
        assert!(held >= 20, "{held}");
    });
}

static FORK_IN_HANDLER: Mutex<Option<Fork>> = Mutex::new(None);
static FORKED: AtomicI32 = AtomicI32::new(-1);

extern "C" fn fork_in_handler(_: i32, _: *mut libc::siginfo_t, context: *mut c_void) {
    // Only once: the filter is the child's, too.
    if let Some(how) = FORK_IN_HANDLER.lock().unwrap().take() {
        FORKED.store(forked(how), Ordering::SeqCst);
    }
    // The trapped call fails with EINVAL.
    let context = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel passes the frame that it will restore.
    unsafe { (*context).uc_mcontext.gregs[libc::REG_RAX as usize] = -i64::from(libc::EINVAL) };
}

/// The next madvise of that kind is interrupted by a handler that forks.
fn fork_in_madvise(how: Fork, advice: u64) {
    // SAFETY: the handler is only entered from a spawn's own madvise.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_flags = libc::SA_SIGINFO;
        action.sa_sigaction = fork_in_handler as *const () as usize;
        let answer = libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut());
        assert_eq!(answer, 0);
    }
    *FORK_IN_HANDLER.lock().unwrap() = Some(how);
    deny(libc::SYS_madvise, libc::EINVAL)
        .when(2, advice)
        .install_trap();
}

/// A signal handler forks in the middle of a spawn, and the spawn goes on in the child.
#[test]
fn a_handler_forks_in_mid_spawn() {
    let test = "fork::a_handler_forks_in_mid_spawn";
    let kinds: [(&str, Fork); 2] = [("handlers", fork), ("bare", _Fork)];
    let Some(name) = case() else {
        for (name, _) in kinds {
            or_skip!(child(test, name).run()).success();
        }
        return;
    };
    let builder = || {
        let cache = StackCache::new(StackCacheConfig::disabled());
        Builder::new().stack_cache(&cache).stack_size(64 << 10)
    };
    builder().spawn(|| ()).unwrap().join().unwrap();
    fork_in_madvise(kinds[usize::from(name == "bare")].1, MADV_GUARD_INSTALL);

    let answer = builder().spawn(|| 6);
    let forked = FORKED.load(Ordering::SeqCst);
    if forked == 0 {
        let work = AssertUnwindSafe(|| {
            if name == "bare" {
                assert_refused(&answer.expect_err("none"));
            } else {
                assert_eq!(answer.unwrap().join().unwrap(), 6);
                use_threads();
            }
        });
        let failed = catch_unwind(work).is_err();
        // SAFETY: no destructor of this copy may run.
        unsafe { libc::_exit(i32::from(failed)) };
    }
    assert_eq!(answer.unwrap().join().unwrap(), 6);
    assert!(forked > 0, "no guard was asked for");
    assert_eq!(wait(forked), 0);
}

/// The same while a cached stack is prefaulted. In the child, the handle distinguishes that thread's end from the end of the
/// next one on its stack.
#[test]
fn a_handler_forks_while_a_stack_is_prepared() {
    alone("fork::a_handler_forks_while_a_stack_is_prepared", || {
        const MADV_POPULATE_WRITE: u64 = 23;
        spawn_and_join();
        fork_in_madvise(fork, MADV_POPULATE_WRITE);
        let answer = Builder::new().prefault_stack(4096).spawn(tid);
        let forked = FORKED.load(Ordering::SeqCst);
        if forked == 0 {
            let work = AssertUnwindSafe(|| {
                let handle = answer.unwrap();
                let task = format!("/proc/self/task/{}", handle.tid());
                wait_until("its end", || !std::path::Path::new(&task).exists());
                let (end, wait) = std::sync::mpsc::channel::<()>();
                let next = nptl::spawn(move || wait.recv().is_err()).unwrap();
                assert!(handle.is_finished(), "it takes the next thread for its own");
                let tid = handle.tid();
                assert_eq!(handle.join().unwrap(), tid);
                drop(end);
                assert!(next.join().unwrap());
                assert_eq!(StackCache::global().stats().live_stacks, 0);
            });
            let failed = catch_unwind(work).is_err();
            // SAFETY: no destructor of this copy may run.
            unsafe { libc::_exit(i32::from(failed)) };
        }
        answer.unwrap().join().unwrap();
        assert!(forked > 0, "nothing was prefaulted");
        assert_eq!(wait(forked), 0);
    });
}
