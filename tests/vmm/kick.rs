//! Kicks: real-time signals to threads that end meanwhile, where the kernel gives their numbers to others at once.

use nptl::{Builder, JoinHandle};
use std::cell::Cell;
use std::collections::{HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::time::Duration;
use support::{case, child, or_skip, report, skip};

/// Senders, each with signals of its own.
const SENDERS: i32 = 2;
/// Signals of a sender. A thread is kicked by one of them only, and the threads after it by others.
const SIGNALS: i32 = 15;
const KICKS: usize = 100_000;

thread_local! {
    /// The one signal that is for this thread; 0: none is.
    static MINE: Cell<i32> = const { Cell::new(0) };
}

static MINE_HANDLED: AtomicUsize = AtomicUsize::new(0);
static OTHERS_HANDLED: AtomicUsize = AtomicUsize::new(0);

extern "C" fn note(signal: libc::c_int) {
    let handled = match MINE.get() == signal {
        true => &MINE_HANDLED,
        false => &OTHERS_HANDLED,
    };
    handled.fetch_add(1, Ordering::Relaxed);
}

/// A way to send.
type Kick = fn(&JoinHandle<()>, libc::c_int) -> io::Result<()>;

fn by_the_handle(thread: &JoinHandle<()>, signal: libc::c_int) -> io::Result<()> {
    thread.kill(signal)
}

/// To whichever thread has the number by now.
fn by_the_number(thread: &JoinHandle<()>, signal: libc::c_int) -> io::Result<()> {
    let (process, thread) = (std::process::id(), thread.tid());
    // SAFETY: only numbers; every thread has a handler for it that only counts.
    match unsafe { libc::syscall(libc::SYS_tgkill, process, thread, signal) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[derive(Default)]
struct Sent {
    arrived: usize,
    too_late: usize,
    numbers_used_again: usize,
}

/// Threads one after the other, kicked while they end and, by handles that are kept, long after that.
fn send(sender: i32, kick: Kick, enough: impl Fn(usize) -> bool) -> Sent {
    let mut sent = Sent::default();
    let mut numbers = HashSet::new();
    let mut kept = VecDeque::new();
    let first = libc::SIGRTMIN() + sender * SIGNALS;
    for generation in 0.. {
        let signal = first + generation % SIGNALS;
        let ready = Arc::new(AtomicI32::new(0));
        let (started, kicks) = (Arc::clone(&ready), generation % 20);
        let thread = Builder::new().stack_size(64 << 10).spawn(move || {
            MINE.set(signal);
            started.store(signal, Ordering::Release);
            // For some kicks, or none.
            (0..kicks * 100).for_each(|_| std::hint::spin_loop());
        });
        let thread = thread.unwrap();
        while ready.load(Ordering::Acquire) != signal {
            std::thread::yield_now();
        }
        sent.numbers_used_again += usize::from(!numbers.insert(thread.tid()));
        kept.push_back((signal, thread));
        if kept.len() == SIGNALS as usize {
            let (_, thread) = kept.pop_front().unwrap();
            thread.join().unwrap();
        }
        // The newest first, until it has ended.
        for (signal, thread) in kept.iter().rev() {
            for _ in 0..50 {
                match kick(thread, *signal) {
                    Ok(()) => sent.arrived += 1,
                    Err(error) => {
                        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
                        sent.too_late += 1;
                        break;
                    }
                }
            }
        }
        if enough(sent.arrived + sent.too_late) {
            break;
        }
    }
    for (_, thread) in kept {
        thread.join().unwrap();
    }
    sent
}

fn storm(kick: Kick, enough: impl Fn(usize) -> bool + Copy + Send + Sync) -> Vec<Sent> {
    for signal in libc::SIGRTMIN()..libc::SIGRTMIN() + SENDERS * SIGNALS {
        // SAFETY: a handler that only counts; thread-locals without a destructor can be read in it.
        unsafe { libc::signal(signal, note as *const () as usize) };
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Threads that are not kicked, of this crate and of std.
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                nptl::spawn(|| ()).unwrap().join().unwrap();
                std::thread::spawn(|| ()).join().unwrap();
            }
        });
        let senders: Vec<_> = (0..SENDERS)
            .map(|sender| scope.spawn(move || send(sender, kick, enough)))
            .collect();
        let sent = senders.into_iter().map(|sender| sender.join().unwrap());
        let sent = sent.collect();
        done.store(true, Ordering::Relaxed);
        sent
    })
}

/// In a pid namespace with about a hundred numbers. The second case shows that the first one would see it.
#[test]
fn no_kick_of_100_000_gets_into_another_thread() {
    const TEST: &str = "kick::no_kick_of_100_000_gets_into_another_thread";
    let Some(name) = case() else {
        for (name, expected) in [("by the handle", "0"), ("by the number", "some")] {
            let child = child(TEST, name).pid_namespace(Some(400));
            let output = or_skip!(child.time_limit(Duration::from_secs(100)).run()).success();
            assert_eq!(output.get("into others"), Some(expected), "{output}");
            for (sender, sent) in (0..SENDERS).filter_map(|sender| {
                let sent = output.get(&format!("sender {sender}"))?;
                Some((sender, sent))
            }) {
                println!("{name}: sender {sender}: {sent}");
            }
        }
        return;
    };
    if libc::SIGRTMIN() + SENDERS * SIGNALS > libc::SIGRTMAX() + 1 {
        skip!("too few real-time signals");
    }
    let into_others = || OTHERS_HANDLED.load(Ordering::Relaxed);
    if name == "by the number" {
        storm(by_the_number, |_| into_others() > 0);
        report("into others", "some");
        return;
    }
    let sent = storm(by_the_handle, |kicks| kicks >= KICKS / SENDERS as usize);
    for (sender, sent) in sent.iter().enumerate() {
        let Sent {
            arrived,
            too_late,
            numbers_used_again,
        } = sent;
        report(
            &format!("sender {sender}"),
            format_args!(
                "{arrived} arrived, {too_late} too late, {numbers_used_again} numbers used again"
            ),
        );
        assert!(*arrived > 100 && *too_late > 100 && *numbers_used_again > 100);
    }
    assert!(MINE_HANDLED.load(Ordering::Relaxed) > 0);
    report("into others", into_others());
}
