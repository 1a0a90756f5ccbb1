//! Children of `_Fork`, and of a fork amid the first spawn.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};

use support::{case, child, listed_threads, report};

type Handler = Option<unsafe extern "C" fn()>;

unsafe extern "C" {
    fn _Fork() -> libc::pid_t;
}

/// As if another thread had held malloc's locks in the moment of `_Fork`: who asks for them waits for ever.
static HEAP_IS_HELD: AtomicBool = AtomicBool::new(false);

struct Heap;

impl Heap {
    fn lock(&self) {
        while HEAP_IS_HELD.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
    }
}

// SAFETY: the system's allocator.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.lock();
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        self.lock();
        // SAFETY: passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static HEAP: Heap = Heap;

unsafe extern "C" {
    fn __libc_free(pointer: *mut c_void);
}

/// The same for the dynamic linker, which frees what it has allocated for a thread.
#[unsafe(no_mangle)]
unsafe extern "C" fn free(pointer: *mut c_void) {
    HEAP.lock();
    // SAFETY: passed on.
    unsafe { __libc_free(pointer) }
}

static HOLD_AT_ITS_END: AtomicBool = AtomicBool::new(false);
static HOLD_REGISTRATION: AtomicBool = AtomicBool::new(false);
static IN_REGISTRATION: AtomicBool = AtomicBool::new(false);

/// What `pthread_atfork` ends in. Held here, a thread waits in it as if another thread's fork held glibc's
/// lock of the handlers.
#[unsafe(no_mangle)]
unsafe extern "C" fn __register_atfork(
    prepare: Handler,
    parent: Handler,
    child: Handler,
    object: *mut c_void,
) -> c_int {
    if !HOLD_AT_ITS_END.load(Ordering::SeqCst) {
        wait_in_registration();
    }
    // SAFETY: glibc's own function of this name and type.
    unsafe {
        let next = libc::dlsym(libc::RTLD_NEXT, c"__register_atfork".as_ptr());
        assert!(!next.is_null());
        let next: unsafe extern "C" fn(Handler, Handler, Handler, *mut c_void) -> c_int =
            std::mem::transmute(next);
        let answer = next(prepare, parent, child, object);
        if HOLD_AT_ITS_END.load(Ordering::SeqCst) {
            wait_in_registration();
        }
        answer
    }
}

fn wait_in_registration() {
    IN_REGISTRATION.store(true, Ordering::SeqCst);
    while HOLD_REGISTRATION.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
}

/// Runs `work` in a child made by `fork`, with ten seconds to do it. The child's wait status.
fn in_child(fork: impl FnOnce() -> libc::pid_t, work: impl FnOnce()) -> i32 {
    match fork() {
        -1 => panic!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            // SAFETY: SIGALRM ends the child if it hangs; _exit runs nothing of the parent's.
            unsafe {
                libc::alarm(10);
                work();
                libc::_exit(0)
            }
        }
        pid => {
            let mut status = 0;
            // SAFETY: waits for the child made above.
            assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
            status
        }
    }
}

fn spawn_and_join() {
    nptl::spawn(|| ()).unwrap().join().unwrap();
}

/// Another thread's first spawn is registering the handlers in the moment of a fork, and has come to the
/// beginning or to the end of it. The child, which does not have that thread, must register its own.
#[test]
fn a_fork_in_the_middle_of_the_first_spawn() {
    let Some(moment) = case() else {
        for moment in ["beginning", "end"] {
            let output = child("a_fork_in_the_middle_of_the_first_spawn", moment)
                .run()
                .unwrap()
                .success();
            assert_eq!(output.all("status"), ["0", "0"], "{moment}");
        }
        return;
    };
    HOLD_AT_ITS_END.store(moment == "end", Ordering::SeqCst);
    HOLD_REGISTRATION.store(true, Ordering::SeqCst);
    let spawner = std::thread::spawn(spawn_and_join);
    while !IN_REGISTRATION.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    // SAFETY: fork, with a child that uses this crate only.
    let fork = || unsafe { libc::fork() };
    let status = in_child(fork, || {
        HOLD_REGISTRATION.store(false, Ordering::SeqCst);
        spawn_and_join();
        assert_eq!(in_child(fork, spawn_and_join), 0);
        spawn_and_join();
    });
    report("status", status);
    HOLD_REGISTRATION.store(false, Ordering::SeqCst);
    spawner.join().unwrap();
    report("status", in_child(fork, spawn_and_join));
}

/// The blocks of threads that stayed behind are off glibc's list at once: taking them off again, when their
/// handles are joined, must not take a living thread along, which setuid would then miss.
#[test]
fn joining_copies_in_a_child_keeps_the_living_listed() {
    if case().is_some() {
        let start = || {
            let (end, wait) = std::sync::mpsc::channel::<()>();
            (
                end,
                nptl::spawn(move || wait.recv().is_err()).expect("a thread"),
            )
        };
        let (first_end, first) = start();
        let (second_end, second) = start();
        // SAFETY: the child ends by _exit.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: a child that hangs dies.
            unsafe { libc::alarm(30) };
            let (_end, living) = start();
            let listed = || listed_threads().contains(&(living.as_pthread_t() as usize));
            let mut good = listed();
            for copy in [second, first] {
                good &= copy.join().is_err() && listed();
            }
            // SAFETY: no destructor of this copy may run.
            unsafe { libc::_exit(i32::from(!good)) };
        }
        let mut status = -1;
        // SAFETY: a valid place.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        report("status", status);
        drop((first_end, second_end));
        assert!(first.join().expect("its end") && second.join().expect("its end"));
        return;
    }
    let output = child("joining_copies_in_a_child_keeps_the_living_listed", "fork").run();
    let output = support::or_skip!(output).success();
    assert_eq!(output.get("status"), Some("0"), "{output}");
}

/// Another thread is inside the ledger in the moment of the fork. Threads that stayed behind have ended in the child
/// all the same.
#[test]
fn a_thread_that_stayed_behind_has_ended_in_a_bare_child() {
    let name = "a_thread_that_stayed_behind_has_ended_in_a_bare_child";
    if case().is_none() {
        let output = support::or_skip!(child(name, "run").run()).success();
        assert_eq!(output.all("status"), ["0"; 50], "{output}");
        return;
    }
    let joined = nptl::spawn(std::thread::park).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                nptl::StackCache::global().stats();
            }
        });
        for _ in 0..50 {
            // SAFETY: the child uses this crate only.
            let status = in_child(
                || unsafe { _Fork() },
                || {
                    let ended = joined.is_finished();
                    // SAFETY: ends the child.
                    unsafe { libc::_exit(i32::from(!ended)) }
                },
            );
            report("status", status);
        }
        done.store(true, Ordering::Relaxed);
    });
    // The parked thread goes with the process.
}

/// The same, where the child is a copy of a thread that nobody has a handle of: it gives its stack back to a
/// ledger whose lock is held by a thread that it does not have.
#[test]
fn a_detached_thread_ends_in_a_bare_child() {
    let name = "a_detached_thread_ends_in_a_bare_child";
    if case().is_none() {
        let output = support::or_skip!(child(name, "run").run()).success();
        assert_eq!(output.all("status"), ["0"; 30], "{output}");
        return;
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                nptl::StackCache::global().stats();
            }
        });
        for _ in 0..30 {
            let (send, status) = std::sync::mpsc::channel();
            let detached = Arc::new(Barrier::new(2));
            let begin = Arc::clone(&detached);
            let fork = move || {
                begin.wait();
                // SAFETY: the child returns from this closure, and is its last thread.
                let pid = unsafe { _Fork() };
                if pid == 0 {
                    // SAFETY: a child that hangs dies.
                    unsafe { libc::alarm(2) };
                    std::mem::forget((begin, send));
                    return;
                }
                let mut status = -1;
                // SAFETY: a valid place.
                unsafe { libc::waitpid(pid, &raw mut status, 0) };
                send.send(status).unwrap();
            };
            nptl::spawn(fork).unwrap().detach();
            detached.wait();
            report("status", status.recv().unwrap());
        }
        done.store(true, Ordering::Relaxed);
    });
}

/// The same for whatever else asks a cache something first: nothing waits for the thread that held the lock.
#[test]
fn a_cache_answers_in_a_bare_child() {
    let name = "a_cache_answers_in_a_bare_child";
    const ROUNDS: usize = 30;
    let ask: [(&str, &dyn Fn()); 6] = [
        ("stats", &|| {
            nptl::StackCache::global().stats();
        }),
        ("trim", &|| nptl::StackCache::global().trim(0)),
        ("clear", &|| nptl::StackCache::global().clear()),
        ("set_config", &|| {
            nptl::StackCache::global().set_config(nptl::StackCacheConfig::default());
        }),
        ("new", &|| {
            drop(nptl::StackCache::new(nptl::StackCacheConfig::default()));
        }),
        ("drop of a handle", &|| {}),
    ];
    if case().is_none() {
        let output = support::or_skip!(child(name, "run").run()).success();
        for (what, _) in ask {
            assert_eq!(output.all(what), ["0"; ROUNDS], "{output}");
        }
        return;
    }
    spawn_and_join();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                nptl::StackCache::global().stats();
            }
        });
        for (what, ask) in ask {
            for _ in 0..ROUNDS {
                let mut handle = Some(nptl::spawn(|| ()).unwrap());
                // SAFETY: the child uses this crate only.
                let status = in_child(
                    || unsafe { _Fork() },
                    || {
                        if what == "drop of a handle" {
                            handle.take();
                        }
                        ask();
                    },
                );
                report(what, status);
                handle.take().unwrap().join().unwrap();
            }
        }
        done.store(true, Ordering::Relaxed);
    });
}

/// What the parent's threads left is not the child's to free, where nothing keeps malloc whole: the handle of a thread
/// that did not come along is dropped without the allocator.
#[test]
fn a_handle_is_dropped_in_the_child_without_the_heap() {
    if case().is_some() {
        let (gate, wait) = std::sync::mpsc::channel::<()>();
        let living = nptl::spawn(move || wait.recv().is_err()).expect("a thread");
        let left = nptl::spawn(|| ()).expect("a thread");
        let task = format!("/proc/self/task/{}", left.tid());
        left.detach();
        while std::path::Path::new(&task).exists() {
            std::thread::yield_now();
        }
        let mut living = Some(living);
        // SAFETY: the child does nothing but what is tested.
        let status = in_child(
            || unsafe { _Fork() },
            || {
                HEAP_IS_HELD.store(true, Ordering::Relaxed);
                drop(living.take());
            },
        );
        report("status", status);
        drop(gate);
        return;
    }
    let output = child("a_handle_is_dropped_in_the_child_without_the_heap", "run").run();
    let output = support::or_skip!(output).success();
    assert_eq!(output.get("status"), Some("0"), "{output}");
}

/// No thread can be made in such a child, whichever thread has forked, and its caches are out of use. The error says so.
#[test]
fn a_spawn_in_a_bare_child_is_refused() {
    let test = "a_spawn_in_a_bare_child_is_refused";
    if case().is_some() {
        let cache = nptl::StackCache::new(nptl::StackCacheConfig::default());
        let builder = nptl::Builder::new().stack_cache(&cache);
        let fork = {
            let (cache, builder) = (cache.clone(), builder.clone());
            move || {
                let is_refused = || {
                    let error = builder.clone().spawn(|| ()).expect_err("no threads");
                    error.step() == nptl::Step::Runtime
                        && error.cause().kind() == nptl::CauseKind::UnsupportedRuntime
                        && error.to_string().contains("_Fork")
                };
                // SAFETY: the child uses this crate only.
                in_child(
                    || unsafe { _Fork() },
                    || {
                        assert!(is_refused());
                        cache.trim(0);
                        cache.set_config(nptl::StackCacheConfig::disabled());
                        cache.clear();
                        assert_eq!(cache.stats().mapped_stacks, 0);
                        // Nor in a child of that child, which has glibc's handlers.
                        // SAFETY: as above.
                        let status = in_child(|| unsafe { libc::fork() }, || assert!(is_refused()));
                        assert_eq!(status, 0);
                    },
                )
            }
        };
        support::burst(&builder, 3);
        report("main", fork());
        let ours = builder.clone().spawn(fork).unwrap().join().unwrap();
        report("ours", ours);
        // The parent has lost nothing.
        assert_eq!(cache.stats().mapped_stacks, 3);
        builder.spawn(|| ()).unwrap().join().unwrap();
        return;
    }
    let output = support::or_skip!(child(test, "run").run()).success();
    for who in ["main", "ours"] {
        assert_eq!(output.get(who), Some("0"), "{output}");
    }
}
