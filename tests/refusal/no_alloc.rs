//! A4: between a refused step and the returned error nothing is allocated, because the machine is out of
//! something.
//!
//! The allocator that aborts while armed is not Rust's alone: this program brings its own `malloc` and all
//! its relatives, which glibc uses, too. It is armed for one thread, in the very moment of the refusal: the
//! refused system call is held in the kernel (seccomp's user notification) while the supervisor arms and
//! then answers. A signal would not do, because spawn blocks signals around clone.

use std::fmt::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use super::heap::{ARMED, CALLOC_FAILS_IN, CALLS, FAILING_ARMS};
use nptl::{Builder, Refused, RetryPolicy, SpawnError, StackCache, StackCacheConfig, Step};
use support::{
    Call, MADV_GUARD_INSTALL, case, child, or_skip, report, set_rlimit, supervised, tid,
};

fn disarm() {
    ARMED.store(0, Ordering::Release);
    CALLOC_FAILS_IN.store(0, Ordering::Release);
    FAILING_ARMS.store(false, Ordering::Release);
}

const CALLS_OF_A_SPAWN: [libc::c_long; 6] = [
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_mlock,
    libc::SYS_clone3,
    libc::SYS_clone,
];

/// Runs `attempt` in a thread whose calls are refused with what `refuse` says, from the moment that the
/// second argument of `attempt` is set; the first such refusal arms the allocator.
fn refused<T: Send>(
    refuse: impl Fn(&Call) -> Option<i32>,
    attempt: impl FnOnce(&AtomicBool) -> T + Send,
) -> Result<T, String> {
    let active = AtomicBool::new(false);
    let active = &active;
    supervised(
        &CALLS_OF_A_SPAWN,
        |call| {
            let errno = refuse(call).filter(|_| active.load(Ordering::Acquire))?;
            ARMED.store(call.tid, Ordering::Release);
            Some(errno)
        },
        || attempt(active),
    )
}

/// What one case spawns, and what has to come of it.
struct Case {
    name: &'static str,
    step: Step,
    errno: i32,
    refuse: fn(&Call) -> Option<i32>,
    configure: fn(Builder) -> Builder,
}

const CASES: &[Case] = &[
    Case {
        name: "mmap",
        step: Step::MapStack,
        errno: libc::ENOMEM,
        refuse: |call| call.maps_a_stack().then_some(libc::ENOMEM),
        configure: |builder| builder,
    },
    Case {
        name: "mmap-eagain",
        step: Step::MapStack,
        errno: libc::EAGAIN,
        refuse: |call| call.maps_a_stack().then_some(libc::EAGAIN),
        configure: |builder| builder,
    },
    Case {
        name: "guard",
        step: Step::GuardStack,
        errno: libc::ENOMEM,
        refuse: |call| call.advises(MADV_GUARD_INSTALL).then_some(libc::ENOMEM),
        configure: |builder| builder,
    },
    Case {
        name: "guard-mprotect",
        step: Step::GuardStack,
        errno: libc::ENOMEM,
        refuse: |call| match call.number {
            libc::SYS_mprotect => Some(libc::ENOMEM),
            _ => call.advises(MADV_GUARD_INSTALL).then_some(libc::EINVAL),
        },
        configure: |builder| builder,
    },
    Case {
        name: "lock",
        step: Step::PrepareStack,
        errno: libc::EPERM,
        refuse: |call| (call.number == libc::SYS_mlock).then_some(libc::EPERM),
        configure: |builder| builder.lock_stack(true),
    },
    Case {
        name: "prefault",
        step: Step::PrepareStack,
        errno: libc::ENOMEM,
        refuse: |call| {
            let prefaults = call.advises(libc::MADV_POPULATE_WRITE as u64);
            prefaults.then_some(libc::ENOMEM)
        },
        configure: |builder| builder.prefault_stack(8192),
    },
    Case {
        name: "tls",
        step: Step::AllocateTls,
        errno: libc::ENOMEM,
        refuse: |_| None,
        configure: |builder| builder,
    },
    Case {
        name: "clone3",
        step: Step::Clone,
        errno: libc::EAGAIN,
        refuse: |call| (call.number == libc::SYS_clone3).then_some(libc::EAGAIN),
        configure: |builder| builder,
    },
    Case {
        name: "clone",
        step: Step::Clone,
        errno: libc::EAGAIN,
        refuse: |call| match call.number {
            libc::SYS_clone3 => Some(libc::EPERM),
            libc::SYS_clone => Some(libc::EAGAIN),
            _ => None,
        },
        // A repetition allocates thread-local storage again, before it can be refused.
        configure: |builder| {
            let builder = builder.retry(RetryPolicy::never());
            builder.name("a name longer than the kernel's fifteen bytes")
        },
    },
];

/// As the last of the cases, but as an old kernel says it: glibc's own pthread_create, which calibrates,
/// falls back on ENOSYS only.
const OLD_KERNEL: Case = Case {
    name: "clone-enosys",
    step: Step::Clone,
    errno: libc::EAGAIN,
    refuse: |call| match call.number {
        libc::SYS_clone3 => Some(libc::ENOSYS),
        libc::SYS_clone => Some(libc::EAGAIN),
        _ => None,
    },
    configure: |builder| builder.retry(RetryPolicy::never()),
};

/// A line that formats without memory.
struct Line([u8; 512], usize);

impl Write for Line {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let end = self.1 + text.len();
        self.0
            .get_mut(self.1..end)
            .ok_or(std::fmt::Error)?
            .copy_from_slice(text.as_bytes());
        self.1 = end;
        Ok(())
    }
}

/// Still armed: reading and printing the error needs no memory either.
fn examine(case: &Case, error: &SpawnError) -> bool {
    let mut line = Line([0; 512], 0);
    let written = write!(line, "{error}").is_ok();
    let armed = ARMED.swap(0, Ordering::AcqRel) == tid();
    disarm();
    if !armed {
        report("not armed", case.name);
    }
    let right = error.step() == case.step && error.errno() == case.errno;
    if !right {
        report("wrong", format_args!("{}: {error}", case.name));
    }
    armed && written && right
}

/// One refusal on a fresh stack, with stacks of another size in the cache that are reclaimed for it, and one
/// on a cached stack where the step can be refused for that.
fn run(case: &Case) -> Result<usize, String> {
    let cache = StackCache::new(StackCacheConfig::default());
    refused(case.refuse, |active| {
        let build = || (case.configure)(Builder::new().stack_cache(&cache));
        // Calibration, and what the first of everything allocates for good.
        for size in [64 << 10, 256 << 10, 1 << 20] {
            let handle = Builder::new().stack_cache(&cache).stack_size(size);
            handle
                .spawn(|| ())
                .expect("a thread")
                .join()
                .expect("its end");
        }
        let start = |active: &AtomicBool| {
            if case.step == Step::AllocateTls {
                FAILING_ARMS.store(true, Ordering::Release);
                CALLOC_FAILS_IN.store(tid(), Ordering::Release);
            }
            active.store(true, Ordering::Release);
        };
        let mut good = 0;
        // The way of every method that creates a thread.
        for round in 0..3 {
            for cached in [false, true] {
                // A cached stack has all three.
                let has = matches!(
                    case.step,
                    Step::MapStack | Step::GuardStack | Step::AllocateTls
                );
                if has && cached {
                    continue;
                }
                // No more than is cached, so that this is given back.
                let size = if cached { 64 << 10 } else { 512 << 10 };
                let builder = build().stack_size(size);
                start(active);
                let error = match round {
                    0 => builder.spawn(|| ()).err(),
                    1 => {
                        let moved = [7_u64; 8];
                        let result = builder.spawn_or_return(move || moved);
                        result
                            .err()
                            .map(Refused::into_parts)
                            .and_then(|(error, work)| (work() == moved).then_some(error))
                    }
                    _ => nptl::scope(|scope| builder.spawn_scoped(scope, || ()).err()),
                };
                good += usize::from(error.as_ref().is_some_and(|error| examine(case, error)));
                disarm();
                active.store(false, Ordering::Release);
                drop(error);
                // The obstacle is gone.
                let handle = build().stack_size(size).spawn(|| 1).expect("a thread");
                assert_eq!(handle.join().expect("its end"), 1);
                cache.clear();
                let handle = Builder::new().stack_cache(&cache).stack_size(64 << 10);
                handle
                    .spawn(|| ())
                    .expect("a thread")
                    .join()
                    .expect("its end");
            }
        }
        good
    })
}

#[test]
fn nothing_is_allocated_after_a_refusal() {
    if let Some(name) = case() {
        let mut cases = CASES.iter().chain([&OLD_KERNEL]);
        let case = cases.find(|case| case.name == name).expect("a case");
        report("good", or_skip!(run(case)));
        report("allocator calls", CALLS.load(Ordering::Relaxed));
        return;
    }
    for case in CASES.iter().chain([&OLD_KERNEL]) {
        let output =
            or_skip!(child("no_alloc::nothing_is_allocated_after_a_refusal", case.name).run());
        let output = output.success();
        if output.skipped().is_some() {
            return;
        }
        let fresh_only = matches!(
            case.step,
            Step::MapStack | Step::GuardStack | Step::AllocateTls
        );
        let expected = if fresh_only { "3" } else { "6" };
        assert_eq!(
            output.get("good"),
            Some(expected),
            "{}: {output}",
            case.name
        );
    }
}

/// The first spawn of a process: the refused step belongs to a calibration thread.
#[test]
fn nothing_is_allocated_after_a_refused_calibration() {
    let names = ["mmap", "tls", "clone3", "clone-enosys"];
    if let Some(name) = case() {
        let mut cases = CASES.iter().chain([&OLD_KERNEL]);
        let case = cases.find(|case| case.name == name).expect("a case");
        let good = refused(case.refuse, |active| {
            if case.step == Step::AllocateTls {
                FAILING_ARMS.store(true, Ordering::Release);
                CALLOC_FAILS_IN.store(tid(), Ordering::Release);
            }
            active.store(true, Ordering::Release);
            let error = nptl::spawn(|| ()).err();
            let good = error.as_ref().is_some_and(|error| examine(case, error));
            disarm();
            active.store(false, Ordering::Release);
            nptl::spawn(|| ())
                .expect("a thread")
                .join()
                .expect("its end");
            good
        });
        report("good", or_skip!(good));
        return;
    }
    for name in names {
        let output = or_skip!(
            child(
                "no_alloc::nothing_is_allocated_after_a_refused_calibration",
                name
            )
            .run()
        );
        let output = output.success();
        if output.skipped().is_some() {
            return;
        }
        assert_eq!(output.get("good"), Some("true"), "{name}: {output}");
    }
}

/// The trap itself: Rust's allocations, those that glibc makes for itself, and aligned ones.
#[test]
fn an_armed_allocator_aborts() {
    if let Some(name) = case() {
        ARMED.store(tid(), Ordering::Release);
        match name.as_str() {
            "box" => drop(std::hint::black_box(Box::new(1))),
            "strdup" => {
                // SAFETY: a NUL-terminated string.
                std::hint::black_box(unsafe { libc::strdup(c"text".as_ptr()) });
            }
            _ => {
                #[derive(Clone)]
                #[repr(align(128))]
                struct Aligned(#[expect(dead_code, reason = "only its size matters")] u8);
                let block = vec![Aligned(0); 2];
                drop(std::hint::black_box(block));
            }
        }
        disarm();
        return;
    }
    for name in ["box", "strdup", "aligned"] {
        let output = or_skip!(child("no_alloc::an_armed_allocator_aborts", name).run());
        assert_eq!(output.signal(), Some(libc::SIGABRT), "{name}: {output}");
        assert!(
            output.stderr.contains("allocation after a refusal"),
            "{output}"
        );
    }
}

/// A real limit and no supervisor: where the address space ends, nothing can have been allocated.
#[test]
fn an_error_at_the_end_of_the_address_space_needs_no_memory() {
    if case().is_some() {
        nptl::spawn(|| ())
            .expect("a thread")
            .join()
            .expect("its end");
        StackCache::global().clear();
        set_rlimit(libc::RLIMIT_AS, 1);
        let error = nptl::spawn(|| ()).expect_err("a refusal");
        report("error", format_args!("{error}"));
        set_rlimit(libc::RLIMIT_AS, libc::RLIM_INFINITY);
        nptl::spawn(|| ())
            .expect("a thread")
            .join()
            .expect("its end");
        return;
    }
    let name = "no_alloc::an_error_at_the_end_of_the_address_space_needs_no_memory";
    let output = or_skip!(child(name, "full").run()).success();
    let error = output.get("error").expect("a report");
    assert!(error.contains("step=map stack errno=ENOMEM"), "{output}");
}
