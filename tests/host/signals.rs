//! Signals in great number into threads that start and end: handlers run whole, on their own thread, and no
//! join is lost.
//!
//! Each case runs in a process of its own, because handlers and timers belong to the process.

use nix::sys::signal::Signal;
use nptl::{Builder, JoinHandle};
use std::cell::Cell;
use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::time::Duration;
use support::{case, child, or_skip, report, short_or_long};

static HANDLED: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static TID: Cell<i32> = const { Cell::new(0) };
}

/// Looks at what belongs to the thread: TLS and errno. A handler that ran on another thread's block, or while
/// one is being made or unmade, would see it.
extern "C" fn count(_: i32) {
    // SAFETY: errno of this thread, kept as it was for the interrupted code.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: no preconditions.
    let tid = unsafe { libc::gettid() };
    let known = TID.replace(tid);
    if known != 0 && known != tid {
        // SAFETY: ends the process.
        unsafe { libc::abort() };
    }
    HANDLED.fetch_add(1, Ordering::Relaxed);
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

fn handle(signal: i32) {
    // SAFETY: the handler makes only calls that are safe there. Without SA_RESTART: waits are interrupted.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count as *const () as usize;
        assert_eq!(
            libc::sigaction(signal, &raw const action, std::ptr::null_mut()),
            0
        );
    }
}

fn run(test: &str) -> Option<support::Output> {
    match child(test, "run").run() {
        Ok(output) => Some(output.success()),
        Err(why) => {
            support::announce_skip(&why);
            None
        }
    }
}

/// Threads that start and end, while `disturb` is called over and over from other threads with the handles of the
/// latest: until many threads are joined, and `disturb` has said often enough that it met a living one.
fn churn(disturb: impl Fn(&JoinHandle<usize>) -> bool + Sync) -> u64 {
    const LATEST: usize = 4;
    let enough = short_or_long(400, 4_000);
    let shown: [Mutex<Option<Arc<JoinHandle<usize>>>>; LATEST] = Default::default();
    let over = AtomicBool::new(false);
    let delivered = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    for place in &shown {
                        let handle = place.lock().unwrap().clone();
                        if handle.is_some_and(|handle| disturb(&handle)) {
                            delivered.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
        let is_enough =
            |number| number >= enough && delivered.load(Ordering::Relaxed) >= enough as u64;
        for number in (0..).take_while(|&number| !is_enough(number)) {
            let handle = Arc::new(nptl::spawn(move || number).unwrap());
            let earlier = shown[number % LATEST].lock().unwrap().replace(handle);
            let Some(mut earlier) = earlier else { continue };
            let handle = loop {
                match Arc::try_unwrap(earlier) {
                    Ok(handle) => break handle,
                    Err(shared) => earlier = shared,
                }
                std::thread::yield_now();
            };
            assert_eq!(handle.join().unwrap(), number - LATEST);
        }
        over.store(true, Ordering::Relaxed);
    });
    for place in shown {
        let handle = place.into_inner().unwrap().unwrap();
        Arc::try_unwrap(handle).unwrap().join().unwrap();
    }
    delivered.into_inner()
}

#[test]
fn signals_to_threads_that_start_and_end_lose_no_join() {
    if case().is_some() {
        handle(libc::SIGUSR1);
        handle(libc::SIGRTMIN() + 3);
        let sent = churn(|handle| {
            let real_time = handle.kill(libc::SIGRTMIN() + 3).is_ok();
            handle.kill(libc::SIGUSR1).is_ok() || real_time
        });
        report("sent", sent);
        report("handled", HANDLED.load(Ordering::Relaxed));
        assert!(HANDLED.load(Ordering::Relaxed) > 0);
        assert!(HANDLED.load(Ordering::Relaxed) <= 2 * sent);
        return;
    }
    run("signals::signals_to_threads_that_start_and_end_lose_no_join");
}

#[test]
fn a_probe_never_hits_another_thread_of_the_same_number() {
    if case().is_some() {
        // Every thread that is not the target would die of it.
        churn(|handle| match handle.kill(0) {
            Ok(()) => true,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => false,
            Err(error) => panic!("{error}"),
        });
        return;
    }
    run("signals::a_probe_never_hits_another_thread_of_the_same_number");
}

/// pthread_kill of glibc, which trusts what our descriptors say.
#[test]
fn glibcs_pthread_kill_is_as_safe_while_there_is_a_handle() {
    if case().is_some() {
        handle(libc::SIGUSR2);
        churn(|handle| {
            // SAFETY: the handle exists, so the pthread_t is valid.
            let answer = unsafe { libc::pthread_kill(handle.as_pthread_t(), libc::SIGUSR2) };
            assert!([0, libc::ESRCH].contains(&answer), "{answer}");
            answer == 0
        });
        assert!(HANDLED.load(Ordering::Relaxed) > 0);
        return;
    }
    run("signals::glibcs_pthread_kill_is_as_safe_while_there_is_a_handle");
}

/// A thousand signals a second to the process, of which the kernel hands each to whatever thread it likes.
#[test]
fn a_timers_signals_to_the_process_harm_no_thread() {
    if case().is_some() {
        handle(libc::SIGALRM);
        let interval = libc::timeval {
            tv_sec: 0,
            tv_usec: 1000,
        };
        let timer = libc::itimerval {
            it_interval: interval,
            it_value: interval,
        };
        // SAFETY: a valid structure.
        let answer =
            unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
        assert_eq!(answer, 0);
        // Only threads of ours are there to be interrupted.
        let mut set = nix::sys::signal::SigSet::empty();
        set.add(Signal::SIGALRM);
        let unblock = set;
        set.thread_block().unwrap();
        let mut number = 0;
        while HANDLED.load(Ordering::Relaxed) < short_or_long(300, 2_000) as u64 {
            let handles: Vec<_> = (0..8)
                .map(|_| {
                    let body = move || {
                        unblock.thread_unblock().unwrap();
                        (0..200).map(|n| vec![n; 10].len()).sum::<usize>()
                    };
                    nptl::spawn(body).unwrap()
                })
                .collect();
            for handle in handles {
                assert_eq!(handle.join().unwrap(), 2000);
                number += 1;
            }
        }
        report("threads", number);
        return;
    }
    run("signals::a_timers_signals_to_the_process_harm_no_thread");
}

/// While it waits a thread gets every real-time signal that was sent: they queue.
#[test]
fn every_queued_signal_is_handled_in_the_thread_it_was_sent_to() {
    if case().is_some() {
        let signal = libc::SIGRTMIN() + 5;
        handle(signal);
        for round in 1..=100 {
            let (open, gate) = mpsc::channel::<()>();
            let handle = nptl::spawn(move || {
                let _ = gate.recv();
                TID.get()
            })
            .unwrap();
            for _ in 0..50 {
                handle.kill(signal).unwrap();
            }
            drop(open);
            let seen = handle.tid();
            assert_eq!(handle.join().unwrap(), seen);
            assert_eq!(HANDLED.load(Ordering::Relaxed), round * 50);
        }
        return;
    }
    run("signals::every_queued_signal_is_handled_in_the_thread_it_was_sent_to");
}

#[test]
fn a_join_survives_signals_to_the_joiner() {
    if case().is_some() {
        handle(libc::SIGUSR1);
        let (open, gate) = mpsc::channel::<()>();
        let body = move || {
            let _ = gate.recv();
            7
        };
        let waited_for = nptl::spawn(body).unwrap();
        let (timed_out, joined) = mpsc::channel();
        let joiner = nptl::spawn(move || {
            let again = waited_for
                .join_timeout(Duration::from_millis(200))
                .unwrap_err();
            timed_out.send(()).unwrap();
            let again = again
                .join_timeout(Duration::from_secs(3600))
                .map(Result::unwrap);
            again.unwrap()
        })
        .unwrap();
        while joined.try_recv().is_err() {
            joiner.kill(libc::SIGUSR1).unwrap();
        }
        let before = HANDLED.load(Ordering::Relaxed);
        while HANDLED.load(Ordering::Relaxed) < before + 1000 {
            joiner.kill(libc::SIGUSR1).unwrap();
        }
        drop(open);
        assert_eq!(joiner.join().unwrap(), 7);
        return;
    }
    run("signals::a_join_survives_signals_to_the_joiner");
}

/// A signal that arrives between a thread's first instruction and its closure waits until the closure's mask
/// is set; one that is blocked by the creator stays blocked.
#[test]
fn a_thread_inherits_the_mask_of_its_creator() {
    if case().is_some() {
        let mut blocked = nix::sys::signal::SigSet::empty();
        blocked.add(Signal::SIGUSR1);
        blocked.add(Signal::SIGTERM);
        blocked.thread_block().unwrap();
        let masks: HashSet<_> = (0..20)
            .map(|_| {
                let mask = || nix::sys::signal::SigSet::thread_get_mask().unwrap();
                let mask = Builder::new().spawn(mask).unwrap().join().unwrap();
                assert_eq!(mask, nix::sys::signal::SigSet::thread_get_mask().unwrap());
                mask.iter().map(|signal| signal as i32).collect::<Vec<_>>()
            })
            .collect();
        assert_eq!(masks, HashSet::from([vec![libc::SIGUSR1, libc::SIGTERM]]));
        // Blocked and pending: handled when the thread opens it, and by no other thread.
        handle(libc::SIGUSR1);
        let gate = Arc::new(Barrier::new(2));
        let opened = Arc::clone(&gate);
        let thread = nptl::spawn(move || {
            opened.wait();
            let before = HANDLED.load(Ordering::Relaxed);
            blocked.thread_unblock().unwrap();
            (before, HANDLED.load(Ordering::Relaxed))
        })
        .unwrap();
        thread.kill(libc::SIGUSR1).unwrap();
        gate.wait();
        assert_eq!(thread.join().unwrap(), (0, 1));
        return;
    }
    or_skip!(child("signals::a_thread_inherits_the_mask_of_its_creator", "run").run()).success();
}
