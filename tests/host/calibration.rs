//! The first spawn of a process, which looks at glibc by means of a thread of glibc's, wherever a host
//! program makes it and whatever the program's other threads do meanwhile.

use super::shared_object::plugin;
use super::{Library, wait_until};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;
use support::{Call, alone, case, child, deny, or_skip, skip, supervised, tid};

/// Spawns and joins, and does so again: the second thread gets what the first one left.
#[track_caller]
fn spawn_and_join() {
    for number in 0..2 {
        let handle = nptl::spawn(move || number).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(handle.join().expect("its end"), number);
    }
}

/// The number of the system call that a thread of this process is in, if it is in one.
fn system_call(tid: i32) -> Option<libc::c_long> {
    let call = std::fs::read_to_string(format!("/proc/self/task/{tid}/syscall")).ok()?;
    call.split(' ').next()?.parse().ok()
}

/// Whether `signal` has been sent to the thread and waits for it.
fn is_pending(tid: i32, signal: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/self/task/{tid}/status")).unwrap();
    let set = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
    u64::from_str_radix(set.unwrap().trim(), 16).unwrap() & 1 << (signal - 1) != 0
}

/// Runs `during` while the first call of `number` that a thread makes which `work` has started is held in the
/// kernel.
fn held_at(number: libc::c_long, mut during: impl FnMut(&Call), work: impl FnOnce() + Send) {
    let (mut held, worker) = (false, &AtomicI32::new(0));
    let decide = |call: &Call| {
        let worker = worker.load(Ordering::Acquire);
        if worker != 0 && call.tid != worker && !std::mem::replace(&mut held, true) {
            during(call);
        }
        None
    };
    or_skip!(supervised(&[number], decide, || {
        worker.store(tid(), Ordering::Release);
        work();
    }));
    assert!(held);
}

fn first_spawn_held_at(number: libc::c_long, during: impl FnMut(&Call)) {
    held_at(number, during, spawn_and_join);
}

/// A thread of glibc's on a stack that is not glibc's, which lasts as long as the process.
fn start_on_own_stack() {
    extern "C" fn sleep(_: *mut c_void) -> *mut c_void {
        loop {
            std::thread::park();
        }
    }
    const SIZE: usize = 1 << 20;
    let stack = Vec::<u8>::leak(vec![0; SIZE]);
    // SAFETY: the stack is never freed, and the attributes are initialised before they are used.
    unsafe {
        let mut attributes: libc::pthread_attr_t = std::mem::zeroed();
        libc::pthread_attr_init(&raw mut attributes);
        let stack = stack.as_mut_ptr().cast();
        assert_eq!(
            libc::pthread_attr_setstack(&raw mut attributes, stack, SIZE),
            0
        );
        let mut thread = 0;
        let null = std::ptr::null_mut();
        let answer = libc::pthread_create(&raw mut thread, &raw const attributes, sleep, null);
        assert_eq!(answer, 0);
        libc::pthread_attr_destroy(&raw mut attributes);
    }
}

/// glibc's broadcast writes into the descriptor of each thread that it reaches.
#[test]
fn a_set_id_broadcast_may_reach_the_calibration() {
    const SIGSETXID: u32 = 33;
    alone(
        "calibration::a_set_id_broadcast_may_reach_the_calibration",
        || {
            let go = Barrier::new(2);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    go.wait();
                    // SAFETY: changes nothing, in every thread.
                    assert_eq!(unsafe { libc::setresuid(u32::MAX, u32::MAX, u32::MAX) }, 0);
                });
                // As a new thread is about to open its signals.
                first_spawn_held_at(libc::SYS_rt_sigprocmask, |call| {
                    go.wait();
                    wait_until("a broadcast", || is_pending(call.tid, SIGSETXID));
                });
            });
        },
    );
}

/// For seconds on end, as a program does that changes its ids for each request.
#[test]
fn set_id_broadcasts_without_end_may_go_on() {
    let name = "calibration::set_id_broadcasts_without_end_may_go_on";
    if case().is_none() {
        for _ in 0..20 {
            or_skip!(child(name, "run").run()).success();
        }
        return;
    }
    std::thread::spawn(|| {
        loop {
            // SAFETY: changes nothing, in every thread.
            unsafe { libc::setresuid(u32::MAX, u32::MAX, u32::MAX) };
        }
    });
    spawn_and_join();
}

/// A thread that starts on a stack of its own writes into the descriptor of the one that started before it.
#[test]
fn neighbours_on_the_list_may_come() {
    alone("calibration::neighbours_on_the_list_may_come", || {
        for _ in 0..3 {
            start_on_own_stack();
        }
        first_spawn_held_at(libc::SYS_sched_getparam, |_| start_on_own_stack());
    });
}

fn open(path: &CStr) -> *mut c_void {
    // SAFETY: a library of these tests, whose constructors may be run.
    let object = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    // SAFETY: dlerror's text is valid until its next call in this thread.
    assert!(!object.is_null(), "{:?}", unsafe {
        CStr::from_ptr(libc::dlerror())
    });
    object
}

/// Another copy of the crate calibrates, from beginning to end, in the middle of this one's calibration, and has a
/// thread from then on.
#[test]
fn two_copies_may_calibrate_at_once() {
    let name = "calibration::two_copies_may_calibrate_at_once";
    let Some(path) = case() else {
        or_skip!(child(name, &plugin()).run()).success();
        return;
    };
    let object = open(&CString::new(path).expect("a path"));
    let function = |name: &CStr| {
        // SAFETY: the plugin's own function, with its type.
        unsafe {
            let address = libc::dlsym(object, name.as_ptr());
            assert!(!address.is_null());
            std::mem::transmute::<*mut c_void, extern "C" fn() -> c_int>(address)
        }
    };
    let (start, answer) = (function(c"plugin_start"), function(c"plugin_answer"));
    first_spawn_held_at(libc::SYS_sched_getparam, |_| assert!(start() > 0));
    assert_eq!(answer(), 42);
}

/// What glibc notes in the creator's descriptor, the new thread's inherits.
#[test]
fn a_creator_with_a_scheduling_policy_calibrates() {
    let name = "calibration::a_creator_with_a_scheduling_policy_calibrates";
    let Some(case) = case() else {
        for case in ["asked", "set", "batch", "round robin"] {
            or_skip!(child(name, case).run()).success();
        }
        return;
    };
    // SAFETY: each with valid places, for the calling thread.
    unsafe {
        let (mut policy, mut param) = (0, std::mem::zeroed::<libc::sched_param>());
        let this = libc::pthread_self();
        if case == "asked" {
            libc::pthread_getschedparam(this, &raw mut policy, &raw mut param);
        } else {
            policy = match &*case {
                "batch" => libc::SCHED_BATCH,
                "round robin" => libc::SCHED_RR,
                _ => libc::SCHED_OTHER,
            };
            param.sched_priority = i32::from(policy == libc::SCHED_RR);
            let answer = libc::pthread_setschedparam(this, policy, &raw const param);
            if answer == libc::EPERM {
                skip!("no real-time policy for this user");
            }
            assert_eq!(answer, 0);
        }
    }
    spawn_and_join();
}

/// Of a library whose constructor calls the function that `HOST` names.
const CONSTRUCTOR: &str = "
#include <stdlib.h>
__attribute__((constructor)) static void construct(void) {
    const char *host = getenv(\"HOST\");
    if (host) ((void (*)(void))strtoul(host, NULL, 10))();
}
";

/// Opens the library at `path` and with it calls `work`, in its constructor.
fn construct(path: &str, work: extern "C" fn()) {
    // SAFETY: no other thread of this process looks at the environment.
    unsafe { std::env::set_var("HOST", (work as *const () as usize).to_string()) };
    open(&CString::new(path).expect("a path"));
}

/// For as long as its child runs.
fn run_with_library(test: &str, source: &str) {
    let library = or_skip!(Library::compile(test, source));
    let path = library.path();
    let child = child(&format!("calibration::{test}"), path.to_str().unwrap());
    or_skip!(child.time_limit(Duration::from_secs(30)).run()).success();
}

static DONE: AtomicBool = AtomicBool::new(false);
static SPAWNER: AtomicI32 = AtomicI32::new(0);

/// The constructor's thread holds the loader's lock.
#[test]
fn a_constructor_may_spawn_first() {
    let Some(path) = case() else {
        return run_with_library("a_constructor_may_spawn_first", CONSTRUCTOR);
    };
    extern "C" fn work() {
        spawn_and_join();
        DONE.store(true, Ordering::Release);
    }
    construct(&path, work);
    assert!(DONE.load(Ordering::Acquire));
}

/// Two first spawns at once, one of them in a constructor: each has something that the other may wait for.
#[test]
fn a_constructor_and_another_thread_may_spawn_first() {
    let Some(path) = case() else {
        return run_with_library(
            "a_constructor_and_another_thread_may_spawn_first",
            CONSTRUCTOR,
        );
    };
    static CONSTRUCTING: AtomicBool = AtomicBool::new(false);
    extern "C" fn work() {
        CONSTRUCTING.store(true, Ordering::Release);
        wait_until("the other has spawned, or waits for this", || {
            system_call(SPAWNER.load(Ordering::Acquire)) == Some(libc::SYS_futex)
                || DONE.load(Ordering::Acquire)
        });
        spawn_and_join();
    }
    std::thread::scope(|scope| {
        scope.spawn(|| {
            SPAWNER.store(tid(), Ordering::Release);
            while !CONSTRUCTING.load(Ordering::Acquire) {
                std::hint::spin_loop();
            }
            spawn_and_join();
            DONE.store(true, Ordering::Release);
        });
        // A thread's own beginning can need the loader.
        wait_until("the other runs", || SPAWNER.load(Ordering::Acquire) != 0);
        construct(&path, work);
    });
}

/// Calls `work` in a callback of dl_iterate_phdr(3), whose lock the calling thread holds.
fn in_a_callback(mut work: impl FnMut()) {
    unsafe extern "C" fn visit(_: *mut libc::dl_phdr_info, _: usize, work: *mut c_void) -> c_int {
        // SAFETY: what is passed below, which lives as long.
        unsafe { (*work.cast::<&mut dyn FnMut()>())() };
        1
    }
    let mut work: &mut dyn FnMut() = &mut work;
    // SAFETY: the callback matches its data.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut work).cast()) };
}

#[test]
fn a_callback_of_the_loader_may_spawn_first() {
    let name = "calibration::a_callback_of_the_loader_may_spawn_first";
    if case().is_none() {
        let child = child(name, "run").time_limit(Duration::from_secs(30));
        or_skip!(child.run()).success();
        return;
    }
    in_a_callback(spawn_and_join);
}

/// With libraries that come and go, each with thread-local variables, and with walks over them.
#[test]
fn the_loader_may_be_busy() {
    let Some(path) = case() else {
        let library = "static __thread int value = 7; int get(void) { return value; }";
        return run_with_library("the_loader_may_be_busy", library);
    };
    let path = CString::new(path).expect("a path");
    let (rounds, walks) = (&AtomicI32::new(0), &AtomicI32::new(0));
    let (path, done) = (&path, &AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while !done.load(Ordering::Acquire) {
                let object = open(path);
                // SAFETY: just opened, and not used.
                assert_eq!(unsafe { libc::dlclose(object) }, 0);
                rounds.fetch_add(1, Ordering::Release);
            }
        });
        scope.spawn(move || {
            while !done.load(Ordering::Acquire) {
                in_a_callback(|| {
                    walks.fetch_add(1, Ordering::Release);
                });
            }
        });
        for counter in [rounds, walks] {
            wait_until("the loader is busy", || counter.load(Ordering::Acquire) > 0);
        }
        spawn_and_join();
        done.store(true, Ordering::Release);
    });
}

unsafe extern "C-unwind" {
    fn pthread_testcancel();
}

/// A thread that is to end at its next cancellation point: the spawn must not be one.
#[test]
fn a_pending_cancellation_stays_pending() {
    extern "C-unwind" fn cancelled(_: *mut c_void) -> *mut c_void {
        SPAWNER.store(tid(), Ordering::Release);
        // SAFETY: the calling thread is its own.
        assert_eq!(unsafe { libc::pthread_cancel(libc::pthread_self()) }, 0);
        spawn_and_join();
        DONE.store(true, Ordering::Release);
        // SAFETY: nothing in this frame or above it has a destructor.
        unsafe { pthread_testcancel() };
        std::ptr::null_mut()
    }
    const CANCELED: usize = -1_isize as usize;
    let name = "calibration::a_pending_cancellation_stays_pending";
    alone(name, || {
        let end = AtomicI32::new(0);
        // The creator waits for a thread that does not end.
        held_at(
            libc::SYS_sched_getparam,
            |_| {
                wait_until("the creator waits, or has ended", || {
                    let call = system_call(SPAWNER.load(Ordering::Acquire));
                    call.is_none_or(|number| number == libc::SYS_futex)
                });
            },
            || {
                let mut thread: libc::pthread_t = 0;
                let mut result = std::ptr::null_mut();
                // SAFETY: the routine takes no argument; of the two function types, which differ in what may
                // unwind, the C library expects the latter.
                unsafe {
                    let routine: extern "C" fn(*mut c_void) -> *mut c_void =
                        std::mem::transmute(cancelled as extern "C-unwind" fn(_) -> _);
                    let null = std::ptr::null_mut();
                    let answer =
                        libc::pthread_create(&raw mut thread, std::ptr::null(), routine, null);
                    assert_eq!(answer, 0);
                    assert_eq!(libc::pthread_join(thread, &raw mut result), 0);
                }
                assert_eq!(result as usize, CANCELED);
                end.store(1, Ordering::Release);
            },
        );
        assert!(DONE.load(Ordering::Acquire), "cancelled in the spawn");
        assert_eq!(end.load(Ordering::Acquire), 1);
    });
}

/// A sandbox that does not know robust lists.
#[test]
fn robust_lists_may_be_denied() {
    let name = "calibration::robust_lists_may_be_denied";
    let Some(case) = case() else {
        for case in ["get", "set", "both"] {
            or_skip!(child(name, case).run()).success();
        }
        return;
    };
    if case != "set" {
        deny(libc::SYS_get_robust_list, libc::EPERM).install();
    }
    if case != "get" {
        deny(libc::SYS_set_robust_list, libc::EPERM).install();
    }
    spawn_and_join();
}

/// A program or library may have that much of thread-local variables.
#[test]
fn static_tls_may_be_large() {
    const SOURCE: &str = "
__attribute__((tls_model(\"initial-exec\"))) static __thread char large[20 << 20];
__thread int last = 7;
char *get(unsigned at) { return &large[at]; }
";
    let test = "static_tls_may_be_large";
    if case().is_none() {
        let library = or_skip!(Library::compile(test, SOURCE));
        let child = child(&format!("calibration::{test}"), "run");
        // The standard library's threads, and so the harness's, have them on the stack that they were given.
        let child = child.env("RUST_MIN_STACK", (64 << 20).to_string());
        or_skip!(child.env("LD_PRELOAD", library.path()).run()).success();
        return;
    }
    // SAFETY: the preloaded library's own function, with its type.
    let get: extern "C" fn(u32) -> *mut c_char = unsafe {
        let address = libc::dlsym(libc::RTLD_DEFAULT, c"get".as_ptr());
        assert!(!address.is_null());
        std::mem::transmute(address)
    };
    for round in 0..4 {
        let body = move || {
            for at in [0, 10 << 20, (20 << 20) - 1] {
                // SAFETY: inside the calling thread's own array.
                let was = unsafe { std::ptr::replace(get(at), 1) };
                assert_eq!(was, 0, "{at} in round {round}");
            }
        };
        let handle = nptl::spawn(body).unwrap_or_else(|error| panic!("{error}"));
        handle.join().expect("its end");
    }
}

/// fork(2) does not reset the lock of a thread that walks over the loaded objects, and that thread is not in the child.
#[test]
fn a_child_forked_in_the_middle_of_a_walk_may_spawn_first() {
    let name = "calibration::a_child_forked_in_the_middle_of_a_walk_may_spawn_first";
    if case().is_none() {
        let child = child(name, "run").time_limit(Duration::from_secs(30));
        or_skip!(child.run()).success();
        return;
    }
    let walking = Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            in_a_callback(|| {
                walking.wait();
                walking.wait();
            });
        });
        walking.wait();
        // SAFETY: the child makes a thread, joins it, and ends.
        let forked = unsafe { libc::fork() };
        if forked == 0 {
            spawn_and_join();
            // SAFETY: no preconditions.
            unsafe { libc::_exit(0) };
        }
        let mut status = -1;
        // SAFETY: a valid place.
        assert_eq!(unsafe { libc::waitpid(forked, &raw mut status, 0) }, forked);
        assert_eq!(status, 0);
        walking.wait();
    });
}
