//! A signal goes to the handle's thread or to none: after its end, when the kernel has given its number to another
//! thread of the process, and in each moment of its end. The orders are forced: numbers are few in a pid namespace
//! of its own, and a thread is held at the entry of a system call.

use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nptl::JoinHandle;
use support::{Warden, alone, case, child, or_skip, report, tid, wait_for_end};

static HANDLED: AtomicUsize = AtomicUsize::new(0);
static HANDLED_BY: AtomicI32 = AtomicI32::new(0);

extern "C" fn note(_: libc::c_int) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
    HANDLED_BY.store(tid(), Ordering::Relaxed);
}

fn handle_signals() {
    for signal in [libc::SIGUSR1, libc::SIGRTMIN()] {
        // SAFETY: a handler that makes only calls that are safe there.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            assert_eq!(
                libc::sigaction(signal, &raw const action, std::ptr::null_mut()),
                0
            );
        }
    }
}

/// Past the handle, to whatever thread of this process has the number.
fn send(tid: i32, signal: libc::c_int) -> nix::Result<()> {
    // SAFETY: only numbers.
    let answer = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, signal) };
    Errno::result(answer).map(drop)
}

/// Every way to a thread that has ended says so, SIGKILL among them.
#[track_caller]
fn expect_unreachable<T>(old: &JoinHandle<T>) {
    for signal in [0, libc::SIGUSR1, libc::SIGKILL, libc::SIGRTMIN()] {
        assert_eq!(
            support::errno(old.kill(signal)),
            Some(libc::ESRCH),
            "{signal}"
        );
    }
    assert_eq!(support::errno(old.pidfd()), Some(libc::ESRCH));
    // SAFETY: the handle exists, so the pthread_t is valid.
    let answer = unsafe { libc::pthread_kill(old.as_pthread_t(), libc::SIGUSR1) };
    // EINVAL: of a thread that died without a word glibc knows no more than that its tid is 0.
    let harmless = [0, libc::ESRCH, libc::EINVAL];
    assert!(harmless.contains(&answer), "{answer}");
}

/// A thread that answers: what was sent to it is handled by then, because the kernel sees to signals first.
struct Answering {
    handle: JoinHandle<()>,
    ask: Sender<()>,
    answers: Receiver<i32>,
}

impl Answering {
    fn new() -> Answering {
        let ((ask, asked), (answer, answers)) = (channel(), channel());
        let handle = nptl::spawn(move || {
            while asked.recv().is_ok() {
                let _ = answer.send(tid());
            }
        });
        Answering {
            handle: handle.expect("a thread"),
            ask,
            answers,
        }
    }

    fn ask(&self) -> i32 {
        self.ask.send(()).expect("a receiver");
        self.answers.recv().expect("an answer")
    }

    fn end(self) {
        drop(self.ask);
        self.handle.join().expect("its end");
    }
}

/// Ended threads until one has been given a number that satisfies.
fn numbered(satisfies: impl Fn(i32) -> bool) -> Answering {
    for _ in 0..2000 {
        let thread = Answering::new();
        if satisfies(thread.handle.tid()) {
            return thread;
        }
        thread.end();
    }
    panic!("no thread was given such a number");
}

#[test]
fn the_new_owner_of_a_number_gets_no_signal() {
    let test = "recycled_tid::the_new_owner_of_a_number_gets_no_signal";
    let Some(way) = case() else {
        for way in ["returns", "dies"] {
            let child = child(test, way).pid_namespace(Some(400));
            let output = or_skip!(child.time_limit(Duration::from_secs(60)).run()).success();
            assert_eq!(output.get("done"), Some("yes"), "{output}");
        }
        return;
    };
    handle_signals();
    // Numbers below 300 are given once only.
    numbered(|tid| tid > 310).end();
    let old = nptl::spawn(move || {
        if way == "dies" {
            // Past everything that an ending thread does.
            // SAFETY: ends the thread, which has nothing to drop.
            unsafe { libc::syscall(libc::SYS_exit, 0) };
        }
    });
    let old = old.expect("a thread");
    let number = old.tid();
    while !old.is_finished() {
        std::thread::yield_now();
    }
    let new = numbered(|tid| tid == number);

    expect_unreachable(&old);
    assert_eq!(new.ask(), number);
    assert_eq!(HANDLED.load(Ordering::Relaxed), 0);
    // That would have been seen.
    send(number, libc::SIGUSR1).expect("the new owner");
    new.ask();
    assert_eq!(HANDLED.load(Ordering::Relaxed), 1);
    new.handle.kill(libc::SIGUSR1).expect("the new owner");
    new.ask();
    assert_eq!(HANDLED.load(Ordering::Relaxed), 2);
    assert_eq!(HANDLED_BY.load(Ordering::Relaxed), number);
    new.end();
    expect_unreachable(&old);
    drop(old.join());
    report("done", "yes");
}

/// A thread that waits until the test lets it end, behind the warden's filter.
fn waiting() -> (Sender<()>, JoinHandle<i32>) {
    let (open, wait) = channel::<()>();
    let handle = nptl::spawn(move || {
        let _ = wait.recv();
        7
    });
    (open, handle.expect("a thread"))
}

/// Signals that were sent to the thread and wait for it.
fn pending(tid: i32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/self/task/{tid}/status")).expect("status");
    let set = status.lines().find_map(|line| line.strip_prefix("SigPnd:"));
    u64::from_str_radix(set.expect("a set").trim(), 16).expect("a number")
}

/// Closed to signals, and the kernel still has it.
#[test]
fn a_thread_before_its_exit_gets_no_signal() {
    alone(
        "recycled_tid::a_thread_before_its_exit_gets_no_signal",
        || {
            if !support::kernel_at_least(6, 9) {
                support::skip!("pidfds of threads need kernel 6.9");
            }
            handle_signals();
            let warden = or_skip!(Warden::new(&[libc::SYS_exit]));
            let (open, handle) = waiting();
            let (tid, pidfd) = (handle.tid(), handle.pidfd().expect("a pidfd"));
            handle.kill(0).expect("a living thread");
            warden.hold(tid);
            drop(open);
            warden.wait_until_held(tid);
            assert_eq!(send(tid, 0), Ok(()), "the kernel has it");
            assert!(!handle.is_finished());
            expect_unreachable(&handle);
            assert_eq!(pending(tid), 0);
            warden.release(tid);
            wait_for_end(&pidfd);
            expect_unreachable(&handle);
            assert_eq!(handle.join().expect("its end"), 7);
            assert_eq!(HANDLED.load(Ordering::Relaxed), 0);
        },
    );
}

/// Whether the thread sleeps for a lock that others wait for: a private futex that holds 2.
fn waits_for_a_lock(tid: i32) -> bool {
    let call = std::fs::read_to_string(format!("/proc/self/task/{tid}/syscall"));
    let call = call.unwrap_or_default();
    let words: Vec<_> = call.split(' ').collect();
    words.first() == Some(&"202") && words.get(2..4) == Some(&["0x80", "0x2"])
}

/// The sender has found the thread alive and stands at the entry of tgkill(2): the thread may not end now, or
/// its number could belong to another by the time the kernel looks.
#[test]
fn a_thread_does_not_end_while_a_signal_is_on_its_way() {
    alone(
        "recycled_tid::a_thread_does_not_end_while_a_signal_is_on_its_way",
        || {
            handle_signals();
            let warden = or_skip!(Warden::new(&[libc::SYS_tgkill, libc::SYS_exit]));
            let (open, handle) = waiting();
            let target = handle.tid();
            std::thread::scope(|scope| {
                let ((started, first), (go, wait)) = (channel(), channel::<()>());
                let handle = &handle;
                let sender = scope.spawn(move || {
                    started.send(tid()).expect("a receiver");
                    wait.recv().expect("a word");
                    handle.kill(libc::SIGUSR1)
                });
                let sending = first.recv().expect("a tid");
                warden.hold(sending);
                go.send(()).expect("a receiver");
                warden.wait_until_held(sending);

                warden.hold(target);
                drop(open);
                let deadline = Instant::now() + Duration::from_secs(10);
                while !waits_for_a_lock(target) && Instant::now() < deadline {
                    std::thread::yield_now();
                }
                let state = (
                    waits_for_a_lock(target),
                    handle.is_finished(),
                    pending(target),
                );
                warden.release(sending);
                let sent = sender.join().expect("its end");
                assert_eq!((state, sent.is_ok()), ((true, false, 0), true));
                // It came too late to be handled, but to the right thread.
                warden.wait_until_held(target);
                assert_eq!(pending(target), 1 << (libc::SIGUSR1 - 1));
                assert_eq!(support::errno(handle.kill(0)), Some(libc::ESRCH));
                warden.release(target);
            });
            assert_eq!(handle.join().expect("its end"), 7);
            assert_eq!(HANDLED.load(Ordering::Relaxed), 0);
        },
    );
}
