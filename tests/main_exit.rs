//! The main thread calls pthread_exit while threads of ours run: the process ends, with exit code 0 and its
//! atexit handlers, when the last of them returns.
//!
//! Without the test harness, whose main thread never gets that far, and without Rust's own `main`, whose
//! `catch_unwind` no forced unwind can pass.
#![no_main]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use support::{case, program, report};

const CASES: [&str; 5] = ["joined", "detached", "panicked", "died and reaped", "std"];

unsafe extern "C-unwind" {
    fn pthread_exit(result: *mut libc::c_void) -> !;
}

extern "C" fn at_exit() {
    report("atexit", RETURNED.load(Ordering::Acquire));
}

static RETURNED: AtomicUsize = AtomicUsize::new(0);

/// Has the main thread, which is the first task, ended?
fn main_has_ended() -> bool {
    let pid = std::process::id();
    let stat = std::fs::read_to_string(format!("/proc/self/task/{pid}/stat"));
    stat.is_ok_and(|stat| stat.contains(") Z "))
}

fn outlive_main() {
    while !main_has_ended() {
        std::thread::yield_now();
    }
    RETURNED.fetch_add(1, Ordering::AcqRel);
}

fn start(name: &str) {
    // SAFETY: a function that stays.
    assert_eq!(unsafe { libc::atexit(at_exit) }, 0);
    match name {
        "panicked" => {
            let work = || {
                outlive_main();
                std::panic::resume_unwind(Box::new(1));
            };
            nptl::spawn(work).expect("a thread").detach();
        }
        "died and reaped" => {
            // A joined thread that never counted itself out.
            // SAFETY: ends that thread alone.
            let work = || unsafe { libc::syscall(libc::SYS_exit, 0) };
            // On a stack that no thread takes after it: reuse would count it out, too.
            let cache = nptl::StackCache::new(nptl::StackCacheConfig::default());
            let builder = nptl::Builder::new().stack_cache(&cache);
            assert!(builder.spawn(work).expect("a thread").join().is_err());
            std::mem::forget(cache);
        }
        // glibc's own among ours: whichever is the last.
        "std" => drop(std::thread::spawn(outlive_main)),
        _ => {}
    }
    let threads: Vec<_> = (0..4)
        .map(|_| nptl::spawn(outlive_main).expect("a thread"))
        .collect();
    if name == "joined" {
        let join = || {
            threads
                .into_iter()
                .for_each(|thread| thread.join().expect("its end"))
        };
        nptl::spawn(join).expect("a thread").detach();
    }
}

#[unsafe(no_mangle)]
extern "C-unwind" fn main(_: libc::c_int, _: *const *const libc::c_char) -> libc::c_int {
    if let Some(name) = case() {
        start(&name);
        drop(name);
        // SAFETY: nothing on this stack needs dropping, and nothing on it is used by other threads.
        unsafe { pthread_exit(std::ptr::null_mut()) };
    }
    run();
    0
}

fn run() {
    for name in CASES {
        let running = program(name).time_limit(Duration::from_secs(30)).run();
        let output = match running {
            Ok(output) => output.success(),
            Err(why) => return support::announce_skip(&why),
        };
        let expected = match name {
            "panicked" | "std" => "5",
            _ => "4",
        };
        assert_eq!(output.get("atexit"), Some(expected), "{name}: {output}");
        println!("main_exit: {name} ... ok");
    }
}
