//! clone3 is preferred, and done without where it is not to be had. (Under valgrind, which knows no clone3,
//! all other tests prove the same.)

use crate::support::{Call, case, child, deny, or_skip, report, supervised};
use crate::under_valgrind;
use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nptl::Step;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

/// What clone3 answers here without making a thread.
fn clone3_says() -> Errno {
    // SAFETY: refused by every kernel because of its size.
    unsafe { libc::syscall(libc::SYS_clone3, std::ptr::null::<u8>(), 0) };
    Errno::last()
}

fn spawns_and_joins() {
    for number in 0..20 {
        assert_eq!(nptl::spawn(move || number).unwrap().join().unwrap(), number);
    }
}

#[test]
fn a_refused_clone3_falls_back_to_clone() {
    let name = "clone3::a_refused_clone3_falls_back_to_clone";
    let Some(case) = case() else {
        for errno in [Errno::ENOSYS, Errno::EPERM] {
            or_skip!(child(name, &(errno as i32).to_string()).run()).success();
        }
        return;
    };
    let errno = Errno::from_raw(case.parse().unwrap());
    spawns_and_joins();
    deny(libc::SYS_clone3, errno as i32).install();
    assert_eq!(clone3_says(), errno);
    spawns_and_joins();
    nptl::spawn(spawns_and_joins).unwrap().join().unwrap();

    // Then it is clone's answer that is reported.
    deny(libc::SYS_clone, libc::EAGAIN)
        .when_set(0, libc::CLONE_THREAD as u64)
        .install();
    let error = nptl::spawn(|| ()).unwrap_err();
    assert_eq!((error.step(), error.errno()), (Step::Clone, Errno::EAGAIN));
}

#[test]
fn the_first_spawn_can_do_without_clone3() {
    let name = "clone3::the_first_spawn_can_do_without_clone3";
    let Some(case) = case() else {
        for errno in [Errno::ENOSYS, Errno::EPERM] {
            or_skip!(child(name, &(errno as i32).to_string()).run()).success();
        }
        return;
    };
    deny(libc::SYS_clone3, case.parse().unwrap()).install();
    spawns_and_joins();
    nptl::spawn(spawns_and_joins).unwrap().join().unwrap();
}

/// Without syscall user dispatch glibc cannot make the thread that calibration needs.
#[test]
fn a_first_spawn_without_clone3_and_dispatch_says_so() {
    let name = "clone3::a_first_spawn_without_clone3_and_dispatch_says_so";
    if case().is_some() {
        const PR_SET_SYSCALL_USER_DISPATCH: u64 = 59;
        deny(libc::SYS_prctl, libc::EINVAL)
            .when(0, PR_SET_SYSCALL_USER_DISPATCH)
            .install();
        deny(libc::SYS_clone3, libc::EPERM).install();
        for _ in 0..2 {
            let error = nptl::spawn(|| ()).unwrap_err();
            assert_eq!((error.step(), error.errno()), (Step::Clone, Errno::EPERM));
            assert!(error.to_string().contains("calibration"), "{error}");
        }
        return;
    }
    or_skip!(child(name, "run").run()).success();
}

static TRAPS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count_trap(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    const SYS_SECCOMP: i32 = 1;
    // SAFETY: the kernel passes it to a handler with SA_SIGINFO.
    assert_eq!(unsafe { (*info).si_code }, SYS_SECCOMP);
    TRAPS.fetch_add(1, Ordering::SeqCst);
}

/// The calibration borrows SIGSYS for a moment where clone3 is EPERM. A filter's traps in other threads
/// reach the program's handler meanwhile, and everybody's afterwards.
#[test]
fn the_programs_sigsys_handler_misses_no_trap() {
    let name = "clone3::the_programs_sigsys_handler_misses_no_trap";
    if case().is_none() {
        or_skip!(child(name, "run").run()).success();
        return;
    }
    let action = SigAction::new(
        SigHandler::SigAction(count_trap),
        SaFlags::SA_ONSTACK,
        SigSet::empty(),
    );
    // SAFETY: the handler is async-signal-safe.
    unsafe { sigaction(Signal::SIGSYS, &action) }.unwrap();
    let mask = SigSet::thread_get_mask().unwrap();
    let (begun, done) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let trapping = scope.spawn(|| {
            deny(libc::SYS_getppid, 0).install_trap();
            let mut calls = 0;
            while !done.load(Ordering::SeqCst) {
                nix::unistd::getppid();
                calls += 1;
                begun.store(true, Ordering::SeqCst);
            }
            calls
        });
        while !begun.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
        deny(libc::SYS_clone3, libc::EPERM).install();
        spawns_and_joins();
        done.store(true, Ordering::SeqCst);
        assert_eq!(trapping.join().unwrap(), TRAPS.load(Ordering::SeqCst));
    });
    assert_eq!(SigSet::thread_get_mask().unwrap(), mask);
    deny(libc::SYS_getppid, 0).install_trap();
    let before = TRAPS.load(Ordering::SeqCst);
    nptl::spawn(nix::unistd::getppid).unwrap().join().unwrap();
    assert_eq!(TRAPS.load(Ordering::SeqCst), before + 1);
}

/// setresuid in another thread signals the one that calibrates while its system calls are dispatched: in the
/// moment in which the handler of one of them returns, and before that while it waits for the lock that the
/// broadcast holds.
#[test]
fn a_set_id_broadcast_reaches_a_dispatched_thread() {
    let name = "clone3::a_set_id_broadcast_reaches_a_dispatched_thread";
    if case().is_none() {
        or_skip!(child(name, "run").run()).success();
        return;
    }
    const PR_SET_SYSCALL_USER_DISPATCH: u64 = 59;
    let broadcast = || {
        // SAFETY: changes nothing, in every thread.
        assert_eq!(unsafe { libc::setresuid(u32::MAX, u32::MAX, u32::MAX) }, 0);
    };
    let (go, deaf_tid, dispatched) = (Barrier::new(2), AtomicI32::new(0), AtomicI32::new(0));
    let waited = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let broadcaster = scope.spawn(|| {
            for _ in 0..2 {
                go.wait();
                broadcast();
            }
        });
        // Keeps the first broadcast, and glibc's lock with it, until the dispatched thread waits for that.
        scope.spawn(|| {
            block_setxid(libc::SIG_BLOCK);
            deaf_tid.store(nix::unistd::gettid().as_raw(), Ordering::SeqCst);
            while !waits_for_a_lock(dispatched.load(Ordering::SeqCst)) {
                std::thread::yield_now();
            }
            waited.store(true, Ordering::SeqCst);
            block_setxid(libc::SIG_UNBLOCK);
        });
        while deaf_tid.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        let mut broadcasts = 0;
        let decide = |call: &Call| {
            let (signalled, now) = match broadcasts {
                0 => (
                    deaf_tid.load(Ordering::SeqCst),
                    call.arguments[0] == PR_SET_SYSCALL_USER_DISPATCH,
                ),
                1 => (call.tid, waited.load(Ordering::SeqCst)),
                _ => return None,
            };
            if now {
                broadcasts += 1;
                go.wait();
                while !is_pending(signalled, 33) {
                    std::thread::yield_now();
                }
                dispatched.store(call.tid, Ordering::SeqCst);
            }
            None
        };
        let calls = [libc::SYS_prctl, libc::SYS_rt_sigreturn];
        or_skip!(supervised(&calls, decide, || {
            deny(libc::SYS_clone3, libc::EPERM).install();
            spawns_and_joins();
        }));
        assert_eq!(broadcasts, 2);
        broadcaster.join().unwrap();
    });
}

/// Whether the thread sleeps for a lock of glibc's: a private futex that holds 2.
fn waits_for_a_lock(tid: i32) -> bool {
    let call = std::fs::read_to_string(format!("/proc/self/task/{tid}/syscall"));
    let call = call.unwrap_or_default();
    let words: Vec<_> = call.split(' ').collect();
    words.first() == Some(&"202") && words.get(2..4) == Some(&["0x80", "0x2"])
}

/// Past glibc, which keeps its callers from it.
fn block_setxid(how: libc::c_int) {
    let set: u64 = 1 << 32;
    // SAFETY: a set of eight bytes.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            how,
            &raw const set,
            0,
            size_of::<u64>(),
        )
    };
}

/// Whether `signal` has been sent to the thread and waits for it.
fn is_pending(tid: i32, signal: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/self/task/{tid}/status")).unwrap();
    let set = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
    u64::from_str_radix(set.unwrap().trim(), 16).unwrap() & 1 << (signal - 1) != 0
}

#[test]
fn clone3_is_used_where_it_is_to_be_had() {
    let name = "clone3::clone3_is_used_where_it_is_to_be_had";
    if case().is_some() {
        spawns_and_joins();
        deny(libc::SYS_clone, libc::EAGAIN).install();
        spawns_and_joins();
        report("clone", "unused");
        return;
    }
    let output = or_skip!(child(name, "run").run()).success();
    assert_eq!(output.get("clone"), Some("unused"));
}

#[test]
fn valgrind_forces_the_fallback() {
    let errno = clone3_says();
    if under_valgrind() {
        assert_eq!(errno, Errno::ENOSYS);
    } else {
        assert_eq!(errno, Errno::EINVAL);
    }
    spawns_and_joins();
}
