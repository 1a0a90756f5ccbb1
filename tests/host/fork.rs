//! fork(3) in a program whose own handlers spawn, join and take locks, with other threads anywhere at that moment.

use super::{spawn_and_join, wait_until};
use crate::support::{self, Warden, alone, or_skip, tid};
use nptl::{Builder, JoinHandle};
use std::ffi::c_void;
use std::hint::black_box;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

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

/// What forks: fork(3), or `_Fork(3)`, which runs no handlers.
type Fork = unsafe extern "C" fn() -> libc::pid_t;

unsafe extern "C" {
    fn fork() -> libc::pid_t;
    fn _Fork() -> libc::pid_t;
}

/// Runs `work` in a forked child with ten seconds to do it, and says whether all was well there.
#[must_use]
fn is_good(how: Fork, work: impl FnOnce()) -> bool {
    // SAFETY: a child that hangs dies of SIGALRM, and it runs none of the parent's destructors.
    unsafe {
        let pid = how();
        assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
        if pid == 0 {
            libc::alarm(10);
            let failed = catch_unwind(AssertUnwindSafe(work)).is_err();
            libc::_exit(i32::from(failed));
        }
        wait(pid) == 0
    }
}

fn wait(pid: libc::pid_t) -> i32 {
    let mut status = -1;
    // SAFETY: a valid place.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    status
}

/// A thread that fills a part of its stack, and says in the end whether anybody else wrote there.
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
            // SAFETY: the child returns from the closure. Another thread of it waits for the end of this one.
            let pid = unsafe { fork() };
            if pid == 0 {
                // SAFETY: takes a number.
                unsafe { libc::alarm(10) };
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
            target.kill(None).unwrap();
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
                for how in [fork as Fork, _Fork] {
                    assert!(is_good(how, || {
                        assert_eq!(target.kill(None), Err(nix::errno::Errno::ESRCH));
                        assert_eq!(target.pidfd().err(), Some(nix::errno::Errno::ESRCH));
                        assert!(target.is_finished());
                    }));
                }
            });
        },
    );
}

/// The thread is storing its result in the moment of the fork. The copy of the handle does not wait for it.
#[test]
fn a_copied_handle_is_joined_while_its_thread_stores_a_large_result() {
    let test = "fork::a_copied_handle_is_joined_while_its_thread_stores_a_large_result";
    alone(test, || {
        const LARGE: usize = 4 << 20;
        spawn_and_join();
        let rounds = || {
            for _ in 0..20 {
                let about_to = Arc::new(AtomicBool::new(false));
                let body = {
                    let about_to = Arc::clone(&about_to);
                    move || {
                        let large = black_box([1_u8; LARGE]);
                        about_to.store(true, Ordering::SeqCst);
                        large
                    }
                };
                let builder = Builder::new().stack_size(LARGE * 32);
                let mut handle = Some(builder.spawn(body).unwrap());
                while !about_to.load(Ordering::SeqCst) {
                    std::hint::spin_loop();
                }
                // Whether the result is there is a matter of luck.
                assert!(is_good(fork, || drop(handle.take().unwrap().join())));
                assert_eq!(handle.take().unwrap().join().unwrap()[LARGE - 1], 1);
            }
        };
        // The values are moved on the stack.
        let builder = std::thread::Builder::new().stack_size(LARGE * 64);
        builder.spawn(rounds).unwrap().join().unwrap();
    });
}

/// Which children may spawn depends on how they were forked, and on nothing else that is going on.
#[test]
fn forks_of_both_kinds_at_once() {
    alone("fork::forks_of_both_kinds_at_once", || {
        static STOP: AtomicBool = AtomicBool::new(false);
        register(nothing, nothing, spawn_one);
        spawn_and_join();
        ARMED.store(true, Ordering::SeqCst);
        let busy: Vec<_> = (0..2)
            .map(|index| {
                std::thread::spawn(move || {
                    while !STOP.load(Ordering::SeqCst) {
                        let handle = nptl::spawn(|| black_box(vec![1_u8; 100])).unwrap();
                        match index {
                            0 => drop(handle),
                            _ => drop(handle.join().unwrap()),
                        }
                        nptl::StackCache::global().trim(1 << 20);
                    }
                })
            })
            .collect();
        let forking: Vec<_> = (0..4)
            .map(|index| {
                std::thread::spawn(move || {
                    for _ in 0..100 {
                        if index % 2 == 0 {
                            assert!(is_good(fork, || (0..5).for_each(|_| spawn_and_join())));
                        } else {
                            assert!(is_good(_Fork, || {
                                let error = nptl::spawn(|| ()).expect_err("no threads");
                                assert_eq!(error.step(), nptl::Step::Runtime);
                            }));
                        }
                    }
                })
            })
            .collect();
        for thread in forking {
            thread.join().unwrap();
        }
        STOP.store(true, Ordering::SeqCst);
        busy.into_iter().for_each(|thread| thread.join().unwrap());
        support::report("done", "storm");
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

extern "C" fn let_a_foreign_thread_spawn() {
    if is_armed() {
        std::thread::spawn(spawn_and_join).join().unwrap();
    }
}

/// A thread of the crate forks, and the first one to use the crate in the child is another: it is started by a handler of
/// the program that runs before the crate's. The thread that has forked is alive, and keeps its stack.
#[test]
fn a_foreign_thread_of_an_earlier_child_handler_spawns_first() {
    let test = "fork::a_foreign_thread_of_an_earlier_child_handler_spawns_first";
    alone(test, || {
        register(nothing, nothing, let_a_foreign_thread_spawn);
        spawn_and_join();
        let forks = || {
            let mut pattern = black_box([0xa5_u8; 2048]);
            let good = is_good(fork, || {
                (0..10).for_each(|_| scribble());
                let whole = black_box(&mut pattern).iter().all(|&byte| byte == 0xa5);
                assert!(whole, "written to");
            });
            black_box(&mut pattern);
            good
        };
        ARMED.store(true, Ordering::SeqCst);
        let (tell, told) = std::sync::mpsc::channel();
        let body = move || tell.send(forks()).unwrap();
        nptl::spawn(body).unwrap().detach();
        assert!(told.recv().unwrap(), "without a handle");
        assert!(nptl::spawn(forks).unwrap().join().unwrap(), "with one");
    });
}
