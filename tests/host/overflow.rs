//! A stack overflow is reported, and every other fault goes to the handler that was there before.
//!
//! Every case dies, or changes handlers, in a process of its own.

use nptl::{Builder, StackCache, StackCacheConfig};
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use support::{Output, case, child, deny_guard_marks, or_skip};

const STACK: usize = 64 << 10;

/// Uses up any stack, page after page.
#[inline(never)]
fn recurse(depth: usize) -> usize {
    let frame = black_box([depth; 64]);
    if depth == usize::MAX {
        return 0;
    }
    recurse(depth + 1) + frame[depth % 64]
}

/// Overflows a stack of 64 KiB in a thread that reports its tid first.
fn overflow(builder: Builder) {
    let body = || {
        // SAFETY: no preconditions.
        support::report("tid", unsafe { libc::gettid() });
        recurse(0)
    };
    let _ = builder.stack_size(STACK).spawn(body).unwrap().join();
}

/// Writes to an address that nothing is mapped at.
fn fault() {
    // SAFETY: none: this is the fault under test.
    unsafe { std::ptr::with_exposed_provenance_mut::<u8>(black_box(64)).write_volatile(1) };
}

#[track_caller]
fn assert_reported(output: &Output, name: &str) {
    let tid = output.get("tid").expect("a tid");
    let expected = format!(
        "\nthread '{name}' ({tid}) has overflowed its stack\nnptl: stack_size={STACK} guard_size=4096\n\
         fatal runtime error: stack overflow, aborting\n"
    );
    assert_eq!(output.stderr, expected, "{output}");
    assert_eq!(output.signal(), Some(libc::SIGABRT), "{output}");
}

#[track_caller]
fn assert_silent_segv(output: &Output) {
    assert_eq!(output.stderr, "", "{output}");
    assert_eq!(output.signal(), Some(libc::SIGSEGV), "{output}");
}

#[test]
fn an_overflow_is_reported_with_name_tid_and_size() {
    let test = "overflow::an_overflow_is_reported_with_name_tid_and_size";
    match case().as_deref() {
        Some("named") => overflow(Builder::new().name("a name of more than 15 bytes")),
        Some(_) => overflow(Builder::new()),
        None => {
            let output = or_skip!(child(test, "named").run());
            assert_reported(&output, "a name of more than 15 bytes");
            let output = or_skip!(child(test, "unnamed").run());
            assert_reported(&output, "<unnamed>");
        }
    }
}

#[test]
fn an_overflow_is_reported_on_a_reused_stack_and_in_a_nested_thread() {
    let test = "overflow::an_overflow_is_reported_on_a_reused_stack_and_in_a_nested_thread";
    if case().is_some() {
        let small = || Builder::new().stack_size(STACK).name("another");
        for _ in 0..5 {
            small()
                .spawn(|| black_box([1_u8; 1000]))
                .unwrap()
                .join()
                .unwrap();
        }
        let _ = nptl::spawn(|| overflow(Builder::new().name("nested")))
            .unwrap()
            .join();
        return;
    }
    assert_reported(&or_skip!(child(test, "run").run()), "nested");
}

#[test]
fn an_overflow_is_reported_where_the_guard_is_a_mapping() {
    let test = "overflow::an_overflow_is_reported_where_the_guard_is_a_mapping";
    if case().is_some() {
        deny_guard_marks(libc::EINVAL);
        overflow(Builder::new().name("old kernel"));
        return;
    }
    assert_reported(&or_skip!(child(test, "run").run()), "old kernel");
}

#[test]
fn an_overflow_in_a_thread_local_destructor_is_reported() {
    let test = "overflow::an_overflow_in_a_thread_local_destructor_is_reported";
    if case().is_some() {
        struct Overflow;
        impl Drop for Overflow {
            fn drop(&mut self) {
                // SAFETY: no preconditions.
                support::report("tid", unsafe { libc::gettid() });
                black_box(recurse(0));
            }
        }
        thread_local!(static LOCAL: Overflow = const { Overflow });
        let body = || LOCAL.with(|_| ());
        let _ = Builder::new()
            .name("late")
            .stack_size(STACK)
            .spawn(body)
            .unwrap()
            .join();
        return;
    }
    assert_reported(&or_skip!(child(test, "run").run()), "late");
}

#[test]
fn with_reports_disabled_an_overflow_dies_silently_of_sigsegv() {
    let test = "overflow::with_reports_disabled_an_overflow_dies_silently_of_sigsegv";
    if case().is_some() {
        assert!(nptl::disable_overflow_reports());
        overflow(Builder::new());
        return;
    }
    assert_silent_segv(&or_skip!(child(test, "run").run()));
}

#[test]
fn reports_can_be_disabled_only_before_the_first_spawn() {
    let test = "overflow::reports_can_be_disabled_only_before_the_first_spawn";
    if case().is_some() {
        nptl::spawn(|| ()).unwrap().join().unwrap();
        assert!(!nptl::disable_overflow_reports());
        overflow(Builder::new().name("still reported"));
        return;
    }
    assert_reported(&or_skip!(child(test, "run").run()), "still reported");
}

#[test]
fn with_reports_disabled_the_programs_handler_is_left_alone() {
    let test = "overflow::with_reports_disabled_the_programs_handler_is_left_alone";
    if case().is_some() {
        let handler = || {
            // SAFETY: a null action only asks.
            unsafe {
                let mut old: libc::sigaction = std::mem::zeroed();
                libc::sigaction(libc::SIGSEGV, std::ptr::null(), &raw mut old);
                old.sa_sigaction
            }
        };
        let before = handler();
        assert!(nptl::disable_overflow_reports());
        nptl::spawn(|| ()).unwrap().join().unwrap();
        assert_eq!(handler(), before);
        return;
    }
    or_skip!(child(test, "run").run()).success();
}

/// Only std and the crate handle it: no report of an overflow, and the default action.
#[test]
fn a_wild_access_is_not_called_an_overflow() {
    let test = "overflow::a_wild_access_is_not_called_an_overflow";
    match case().as_deref() {
        Some("ours") => nptl::spawn(fault).unwrap().join().unwrap(),
        Some("beside unmapped stacks") => {
            // Their records remain, and one was of the memory that the next thread gets.
            let cache = StackCache::new(StackCacheConfig::default());
            let builder = Builder::new().stack_cache(&cache);
            for round in 0..4 {
                let barrier = Arc::new(Barrier::new(8 - round));
                let threads: Vec<_> = (round..8)
                    .map(|_| {
                        let barrier = barrier.clone();
                        builder.clone().spawn(move || _ = barrier.wait()).unwrap()
                    })
                    .collect();
                threads
                    .into_iter()
                    .for_each(|thread| thread.join().unwrap());
                cache.clear();
            }
            builder.spawn(fault).unwrap().join().unwrap();
        }
        Some("std's") => {
            nptl::spawn(|| ()).unwrap().join().unwrap();
            std::thread::spawn(fault).join().unwrap();
        }
        Some(_) => {
            let handle = nptl::spawn(std::thread::park).unwrap();
            // std's handler takes the first for a fault that will come again, and only restores the default.
            while handle.kill(libc::SIGSEGV).is_ok() {}
            handle.join().unwrap();
        }
        None => {
            for thread in ["ours", "beside unmapped stacks", "std's", "sent"] {
                assert_silent_segv(&or_skip!(child(test, thread).run()));
            }
        }
    }
}

/// What the program's own handlers saw.
static FAULTS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn with_info(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    assert_eq!(signal, libc::SIGSEGV);
    assert!(!context.is_null());
    // SAFETY: the kernel's information about a fault.
    let address = unsafe { (*info).si_addr() }.addr();
    // The default would be chosen by std's handler; this one just ends the process, telling what it saw.
    // SAFETY: ends the process.
    unsafe { libc::_exit(if address == 64 { 42 } else { 43 }) };
}

extern "C" fn without_info(_: i32) {
    FAULTS.fetch_add(1, Ordering::Relaxed);
    // SAFETY: ends the process.
    unsafe { libc::_exit(44) };
}

fn install(handler: usize, flags: i32) {
    // SAFETY: the handlers above only look, and end the process.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = flags | libc::SA_ONSTACK;
        assert_eq!(
            libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut()),
            0
        );
    }
}

#[test]
fn a_handler_of_the_program_gets_every_fault_but_our_overflows() {
    let test = "overflow::a_handler_of_the_program_gets_every_fault_but_our_overflows";
    let Some(case) = case() else {
        for (case, code) in [
            ("info ours", 42),
            ("info std's", 42),
            ("info main's", 42),
            ("plain ours", 44),
            ("plain std's", 44),
        ] {
            let output = or_skip!(child(test, case).run());
            assert_eq!(
                (output.code(), &*output.stderr),
                (Some(code), ""),
                "{case}: {output}"
            );
        }
        for case in ["info overflow", "plain overflow"] {
            assert_reported(&or_skip!(child(test, case).run()), "with a handler");
        }
        return;
    };
    let (kind, place) = case.split_once(' ').unwrap();
    match kind {
        "info" => install(with_info as *const () as usize, libc::SA_SIGINFO),
        _ => install(without_info as *const () as usize, 0),
    }
    match place {
        "ours" => nptl::spawn(fault).unwrap().join().unwrap(),
        "overflow" => overflow(Builder::new().name("with a handler")),
        "std's" => {
            nptl::spawn(|| ()).unwrap().join().unwrap();
            std::thread::spawn(fault).join().unwrap();
        }
        _ => {
            nptl::spawn(|| ()).unwrap().join().unwrap();
            fault();
        }
    }
}

#[test]
fn an_overflow_of_a_thread_of_std_is_still_reported_by_std() {
    let test = "overflow::an_overflow_of_a_thread_of_std_is_still_reported_by_std";
    if case().is_some() {
        nptl::spawn(|| ()).unwrap().join().unwrap();
        let std = std::thread::Builder::new()
            .name("of std".into())
            .stack_size(STACK);
        let _ = std.spawn(|| recurse(0)).unwrap().join();
        return;
    }
    let output = or_skip!(child(test, "run").run());
    assert!(output.stderr.contains("thread 'of std'"), "{output}");
    assert!(
        output.stderr.contains("has overflowed its stack"),
        "{output}"
    );
    assert!(!output.stderr.contains("nptl:"), "{output}");
    assert_eq!(output.signal(), Some(libc::SIGABRT), "{output}");
}

#[test]
fn ignored_faults_and_a_blocked_sigsegv_still_die() {
    let test = "overflow::ignored_faults_and_a_blocked_sigsegv_still_die";
    match case().as_deref() {
        Some("ignored") => {
            // SAFETY: a disposition without a handler.
            unsafe { libc::signal(libc::SIGSEGV, libc::SIG_IGN) };
            nptl::spawn(fault).unwrap().join().unwrap();
        }
        Some(_) => {
            let body = || {
                let mut set = nix::sys::signal::SigSet::empty();
                set.add(nix::sys::signal::Signal::SIGSEGV);
                set.thread_block().unwrap();
                recurse(0)
            };
            let _ = Builder::new().stack_size(STACK).spawn(body).unwrap().join();
        }
        None => {
            for case in ["ignored", "blocked"] {
                assert_silent_segv(&or_skip!(child(test, case).run()));
            }
        }
    }
}

/// A thread's stack from its closure's data up, and the words there before a fault.
static UPPER: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];
static BEFORE: [AtomicUsize; 2048] = [const { AtomicUsize::new(0) }; 2048];

fn upper_part() -> impl Iterator<Item = (*const usize, &'static AtomicUsize)> {
    let [from, to] = UPPER.each_ref().map(|end| end.load(Ordering::Relaxed));
    let places = (from..to).step_by(size_of::<usize>());
    places.map(|place| place as *const usize).zip(&BEFORE)
}

#[inline(never)]
fn remember(from: usize, to: usize) {
    assert!(to - from < size_of_val(&BEFORE));
    UPPER[0].store(from, Ordering::Relaxed);
    UPPER[1].store(to, Ordering::Relaxed);
    for (place, before) in upper_part() {
        // SAFETY: on this thread's own stack.
        before.store(unsafe { place.read_volatile() }, Ordering::Relaxed);
    }
}

#[inline(never)]
fn use_up<const BYTES: usize>() {
    black_box(&mut [0xee_u8; BYTES]);
}

extern "C" fn hungry<const BYTES: usize>(_: i32) {
    use_up::<BYTES>();
    let overwritten = upper_part().filter(|(place, before)| {
        // SAFETY: on the stack of this thread, which is here and writes to none of it.
        unsafe { place.read_volatile() != before.load(Ordering::Relaxed) }
    });
    let overwritten = overwritten.count().min(100) as i32;
    // Not by `report`, whose buffer has no room here.
    // SAFETY: ends the process.
    unsafe { libc::_exit(overwritten) };
}

#[test]
fn a_handler_that_needs_more_than_the_signal_stack_leaves_the_stack_alone() {
    let test = "overflow::a_handler_that_needs_more_than_the_signal_stack_leaves_the_stack_alone";
    let Some(case) = case() else {
        for case in ["8", "14", "64", "14 protected", "64 protected"] {
            let output = or_skip!(child(test, case).run());
            match output.code() {
                // Rounding may leave room for 14 KiB where the vector registers are of another size.
                Some(overwritten) => {
                    assert_eq!(overwritten, 0, "{case}: {output}");
                    assert!(!case.starts_with("64"));
                }
                None => {
                    assert_silent_segv(&output);
                    assert_ne!(case, "8");
                }
            }
        }
        return;
    };
    let (size, guards) = case.split_once(' ').unwrap_or((&case, ""));
    let handler = match size {
        "8" => hungry::<{ 8 << 10 }>,
        "14" => hungry::<{ 14 << 10 }>,
        _ => hungry::<{ 64 << 10 }>,
    };
    install(handler as *const () as usize, 0);
    if guards == "protected" {
        deny_guard_marks(libc::EINVAL);
    }
    let (sender, receiver) = std::sync::mpsc::channel();
    let body = move || {
        let top = receiver.recv().unwrap();
        let data = black_box([7_usize; 128]);
        remember((&raw const data).addr(), top);
        fault();
    };
    let handle = Builder::new().stack_size(STACK).spawn(body).unwrap();
    let stack = handle.stack();
    sender.send(stack.base + stack.size).unwrap();
    handle.join().unwrap();
}

/// Nothing is left to handle that with. A handler with SA_NODEFER gets its own faults as well, and the first that
/// is one of the signal stack ends it.
#[test]
fn an_overflow_of_the_signal_stack_dies() {
    extern "C" fn endless(_: i32) {
        recurse(0);
    }
    extern "C" fn returns(_: i32) {}
    let test = "overflow::an_overflow_of_the_signal_stack_dies";
    let Some(case) = case() else {
        for case in ["SIGSEGV", "SIGSEGV nodefer", "SIGUSR1", "SIGUSR1 handled"] {
            assert_silent_segv(&or_skip!(child(test, case).run()));
        }
        return;
    };
    match &*case {
        "SIGSEGV" => install(endless as *const () as usize, 0),
        "SIGSEGV nodefer" => install(endless as *const () as usize, libc::SA_NODEFER),
        "SIGUSR1 handled" => install(returns as *const () as usize, libc::SA_NODEFER),
        _ => {}
    }
    let body = move || {
        if case.starts_with("SIGSEGV") {
            fault();
        }
        // SAFETY: a handler without arguments but the signal's number; the signal is this thread's.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = endless as *const () as usize;
            action.sa_flags = libc::SA_ONSTACK;
            libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
            libc::raise(libc::SIGUSR1);
        }
    };
    nptl::spawn(body).unwrap().join().unwrap();
}
