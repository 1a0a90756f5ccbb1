//! The first spawn of a process, which looks glibc over, wherever it happens.

use super::{Library, sleeps, spawn_and_join, wait_until};
use crate::support::{self, Child, case, child, deny, or_skip};
use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

/// Whether the first spawn works in this many processes.
fn run_each(test: &str, case: &str, rounds: usize, prepare: impl Fn(Child) -> Child) {
    for _ in 0..rounds {
        let output = prepare(child(test, case).time_limit(std::time::Duration::from_secs(20)));
        or_skip!(output.run()).success();
    }
}

/// setresuid in another thread writes into every descriptor, the new one included, while it is looked over.
#[test]
fn amid_set_id_broadcasts() {
    let test = "calibration::amid_set_id_broadcasts";
    if case().is_none() {
        return run_each(test, "run", 30, |child| child);
    }
    static STOP: AtomicBool = AtomicBool::new(false);
    static COUNT: AtomicI32 = AtomicI32::new(0);
    let broadcaster = std::thread::spawn(|| {
        while !STOP.load(Ordering::Relaxed) {
            // SAFETY: changes nothing, in every thread.
            unsafe { libc::setresuid(u32::MAX, u32::MAX, u32::MAX) };
            COUNT.fetch_add(1, Ordering::Relaxed);
        }
    });
    wait_until("broadcasts", || COUNT.load(Ordering::Relaxed) > 10);
    spawn_and_join();
    STOP.store(true, Ordering::Relaxed);
    broadcaster.join().unwrap();
}

/// A creator that knows its policy, or has changed it, hands the flags for that on.
#[test]
fn after_scheduling_calls_of_the_creator() {
    let test = "calibration::after_scheduling_calls_of_the_creator";
    let Some(case) = case() else {
        run_each(test, "asked", 1, |child| child);
        run_each(test, "set", 1, |child| child);
        return;
    };
    // SAFETY: plain structures of the calling thread.
    unsafe {
        let this = libc::pthread_self();
        let (mut policy, mut param) = (0, std::mem::zeroed::<libc::sched_param>());
        libc::pthread_getschedparam(this, &raw mut policy, &raw mut param);
        if case == "set" {
            let answer = libc::pthread_setschedparam(this, libc::SCHED_BATCH, &raw const param);
            assert_eq!(answer, 0);
        }
    }
    spawn_and_join();
    let policy = nptl::spawn(|| {
        // SAFETY: no preconditions.
        unsafe { libc::sched_getscheduler(0) }
    });
    let inherited = policy.unwrap().join().unwrap();
    // SAFETY: as above.
    assert_eq!(inherited, unsafe { libc::sched_getscheduler(0) });
}

/// Threads of the program's that run on stacks of its own come and go meanwhile.
#[test]
fn beside_threads_on_stacks_of_their_own() {
    let test = "calibration::beside_threads_on_stacks_of_their_own";
    if case().is_none() {
        return run_each(test, "run", 30, |child| child);
    }
    extern "C" fn nothing(_: *mut c_void) -> *mut c_void {
        std::ptr::null_mut()
    }
    static STOP: AtomicBool = AtomicBool::new(false);
    static COUNT: AtomicI32 = AtomicI32::new(0);
    let others: Vec<_> = (0..3)
        .map(|_| {
            std::thread::spawn(|| {
                let mut stack = vec![0_u8; 1 << 17];
                while !STOP.load(Ordering::Relaxed) {
                    // SAFETY: a stack that outlives the thread, which is joined.
                    unsafe {
                        let mut attributes = std::mem::zeroed();
                        libc::pthread_attr_init(&raw mut attributes);
                        libc::pthread_attr_setstack(
                            &raw mut attributes,
                            stack.as_mut_ptr().cast(),
                            stack.len(),
                        );
                        let mut thread = 0;
                        let answer = libc::pthread_create(
                            &raw mut thread,
                            &raw const attributes,
                            nothing,
                            std::ptr::null_mut(),
                        );
                        assert_eq!(answer, 0);
                        libc::pthread_join(thread, std::ptr::null_mut());
                    }
                    COUNT.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    wait_until("threads", || COUNT.load(Ordering::Relaxed) > 10);
    spawn_and_join();
    STOP.store(true, Ordering::Relaxed);
    others.into_iter().for_each(|other| other.join().unwrap());
}

const CONSTRUCTOR: &str = r#"
#include <stdlib.h>
__attribute__((constructor)) static void start(void) {
    const char *hook = getenv("NPTL_TEST_HOOK");
    if (hook)
        ((void (*)(void))strtoul(hook, NULL, 10))();
}
"#;

/// Calls `hook` from a constructor that dlopen runs, with the loader's lock held.
fn in_a_constructor(hook: extern "C" fn()) {
    let library = or_skip!(Library::compile("constructor", CONSTRUCTOR));
    // SAFETY: no other thread looks at the environment.
    unsafe { std::env::set_var("NPTL_TEST_HOOK", (hook as usize).to_string()) };
    library.open();
}

extern "C" fn hook_spawns() {
    spawn_and_join();
}

static OTHER: AtomicI32 = AtomicI32::new(0);
static GO: AtomicBool = AtomicBool::new(false);

/// Another thread comes to its own first spawn while this one has the loader's lock.
extern "C" fn hook_spawns_while_another_waits() {
    GO.store(true, Ordering::SeqCst);
    wait_until("it waits for the loader", || {
        sleeps(OTHER.load(Ordering::SeqCst))
    });
    spawn_and_join();
}

#[test]
fn in_a_constructor_of_a_library() {
    let test = "calibration::in_a_constructor_of_a_library";
    match case().as_deref() {
        Some("alone") => in_a_constructor(hook_spawns),
        Some(_) => {
            // It is there before, because a new thread of std's waits for the loader itself.
            let other = std::thread::spawn(|| {
                OTHER.store(support::tid(), Ordering::SeqCst);
                while !GO.load(Ordering::SeqCst) {
                    std::hint::spin_loop();
                }
                spawn_and_join();
            });
            wait_until("it runs", || OTHER.load(Ordering::SeqCst) != 0);
            in_a_constructor(hook_spawns_while_another_waits);
            other.join().unwrap();
        }
        None => {
            run_each(test, "alone", 1, |child| child);
            run_each(test, "beside another", 1, |child| child);
        }
    }
}

#[test]
fn in_a_callback_of_dl_iterate_phdr() {
    let test = "calibration::in_a_callback_of_dl_iterate_phdr";
    if case().is_none() {
        return run_each(test, "run", 1, |child| child);
    }
    unsafe extern "C" fn visit(
        _: *mut libc::dl_phdr_info,
        _: libc::size_t,
        _: *mut c_void,
    ) -> libc::c_int {
        spawn_and_join();
        1
    }
    // SAFETY: the callback looks at nothing.
    let answer = unsafe { libc::dl_iterate_phdr(Some(visit), std::ptr::null_mut()) };
    assert_eq!(answer, 1);
}

unsafe extern "C" {
    fn pthread_cancel(thread: libc::pthread_t) -> libc::c_int;
    fn pthread_setcancelstate(state: libc::c_int, old: *mut libc::c_int) -> libc::c_int;
}

/// A request to cancel the creator stays pending: nothing unwinds out of the first spawn, nor out of the analysis of a
/// refusal, which reads files and sleeps.
#[test]
fn with_a_cancellation_pending() {
    let test = "calibration::with_a_cancellation_pending";
    let Some(case) = case() else {
        run_each(test, "first", 1, |child| child);
        run_each(test, "refusal", 1, |child| child);
        return;
    };
    let cancelled = move || {
        if case == "refusal" {
            spawn_and_join();
            deny(libc::SYS_clone3, libc::EAGAIN).install();
            deny(libc::SYS_clone, libc::EAGAIN).install();
        }
        // SAFETY: the calling thread, which is cancelled at its next cancellation point.
        unsafe { pthread_cancel(libc::pthread_self()) };
        if case == "refusal" {
            nptl::spawn(|| ()).expect_err("no clone");
        } else {
            spawn_and_join();
        }
        let mut enabled = -1;
        // SAFETY: a valid place. The thread ends without being cancelled.
        unsafe { pthread_setcancelstate(1, &raw mut enabled) };
        enabled
    };
    // PTHREAD_CANCEL_ENABLE, as before.
    assert_eq!(std::thread::spawn(cancelled).join().unwrap(), 0);
}

/// A sandbox can deny either call that deals with robust lists.
#[test]
fn without_robust_lists() {
    let test = "calibration::without_robust_lists";
    let calls = [
        ("get", libc::SYS_get_robust_list),
        ("set", libc::SYS_set_robust_list),
    ];
    let Some(case) = case() else {
        for (name, _) in calls {
            run_each(test, name, 1, |child| child);
        }
        return;
    };
    for (name, call) in calls {
        if name == case {
            deny(call, libc::EPERM).install();
        }
    }
    spawn_and_join();
}

const LARGE: &str = r#"
__attribute__((tls_model("initial-exec"))) __thread char large[20 << 20];
char *touch(void) { return large; }
"#;

#[test]
fn with_twenty_megabytes_of_static_tls() {
    let test = "calibration::with_twenty_megabytes_of_static_tls";
    if case().is_some() {
        spawn_and_join();
        // SAFETY: the preloaded library has this function.
        let touched = nptl::spawn(|| unsafe {
            let touch = libc::dlsym(libc::RTLD_DEFAULT, c"touch".as_ptr());
            assert!(!touch.is_null(), "not preloaded");
            let touch: extern "C" fn() -> *mut u8 = std::mem::transmute(touch);
            let large = std::slice::from_raw_parts_mut(touch(), 20 << 20);
            assert!(large.iter().all(|byte| *byte == 0));
            large.fill(1);
            large.len()
        });
        assert_eq!(touched.unwrap().join().unwrap(), 20 << 20);
        return;
    }
    let library = or_skip!(Library::compile("large", LARGE));
    // std takes the TLS out of a stack's size, and would leave the harness 16 KiB.
    run_each(test, "run", 1, |child| {
        let child = child.env("RUST_MIN_STACK", (64 << 20).to_string());
        child.env("LD_PRELOAD", library.path())
    });
}
