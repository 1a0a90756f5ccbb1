//! From spawn to join: results, panics, every way to wait and every way not to.

use crate::{private_cache, rounds, under_valgrind, wait_until, wait_until_unused};
use nptl::{Builder, JoinHandle};
use std::any::Any;
use std::backtrace::Backtrace;
use std::cell::RefCell;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, mpsc};
use std::time::Duration;
use support::{kernel_at_least, skip};

fn payload<T>(body: impl FnOnce() -> T + Send + 'static) -> Box<dyn Any + Send>
where
    T: Send + std::fmt::Debug + 'static,
{
    nptl::spawn(body).unwrap().join().unwrap_err()
}

#[test]
fn a_panic_is_delivered_to_join_whatever_its_type() {
    #[derive(Debug, PartialEq)]
    struct Custom(Vec<u8>);
    let text = payload(|| -> () { panic!("text") });
    assert_eq!(text.downcast_ref(), Some(&"text"));
    let formatted = payload(|| -> () { panic!("number {}", 6 * 7) });
    assert_eq!(formatted.downcast_ref(), Some(&"number 42".to_owned()));
    let custom = payload(|| -> () { panic_any(Custom(vec![1, 2])) });
    assert_eq!(custom.downcast_ref(), Some(&Custom(vec![1, 2])));
    let resumed = payload(|| -> () { resume_unwind(Box::new(Custom(vec![3]))) });
    assert_eq!(resumed.downcast_ref(), Some(&Custom(vec![3])));
    // Not a panic at all: an Err that the closure returns is a result like any other.
    assert_eq!(
        nptl::spawn(|| Err::<(), _>(7)).unwrap().join().unwrap(),
        Err(7)
    );
}

#[test]
fn a_panic_unwinds_what_the_closure_holds() {
    let held = Arc::new(());
    let moved = Arc::clone(&held);
    let _ = payload(move || {
        let _on_the_stack = Arc::clone(&moved);
        // Without the hook's message.
        resume_unwind(Box::new(()));
        #[expect(unreachable_code, reason = "keeps it alive until the panic")]
        drop(moved)
    });
    assert_eq!(Arc::strong_count(&held), 1);
}

#[test]
fn a_panic_in_the_destructor_of_an_unwanted_result_harms_nothing() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            // Of no size: the payload is leaked, because its destructor could panic as well.
            resume_unwind(Box::new(()));
        }
    }
    let cache = private_cache();
    let detached = Builder::new().stack_cache(&cache).spawn(|| Bomb).unwrap();
    drop(detached);
    wait_until_unused(&cache);
    let bomb = nptl::spawn(|| Bomb).unwrap().join().unwrap();
    assert!(catch_unwind(AssertUnwindSafe(|| drop(bomb))).is_err());
}

#[test]
fn results_arrive_whole_whatever_their_size() {
    #[repr(align(4096))]
    #[derive(Debug, PartialEq)]
    struct Aligned(u8);
    nptl::spawn(|| ()).unwrap().join().unwrap();
    let large = nptl::spawn(|| [7_u8; 100_000]).unwrap().join().unwrap();
    assert!(large.iter().all(|&byte| byte == 7));
    let input = Aligned(9);
    let aligned = nptl::spawn(move || input).unwrap().join().unwrap();
    assert_eq!(aligned, Aligned(9));
}

/// Code is compiled with aligned vector instructions on the stack.
#[test]
fn the_stack_is_aligned_as_the_abi_demands() {
    #[repr(align(64))]
    struct CacheLine([u8; 64]);
    let handle = nptl::spawn(|| {
        let line = CacheLine([1; 64]);
        (
            std::ptr::from_ref(&line).addr() % 64,
            format!("{:.3}", 1.5 * f64::from(line.0[0])),
        )
    });
    assert_eq!(handle.unwrap().join().unwrap(), (0, "1.500".to_owned()));
}

#[test]
fn fifty_threads_each_started_by_the_last_are_joined_by_it() {
    fn nest(depth: usize) -> usize {
        if depth == 0 {
            return 0;
        }
        1 + nptl::spawn(move || nest(depth - 1))
            .unwrap()
            .join()
            .unwrap()
    }
    assert_eq!(nest(50), 50);
}

#[test]
fn fifty_scopes_in_one_another_borrow_from_the_outermost() {
    fn nest(depth: usize, count: &AtomicUsize) {
        count.fetch_add(1, Ordering::Relaxed);
        if depth > 0 {
            nptl::scope(|scope| {
                scope.spawn(move || nest(depth - 1, count)).unwrap();
            });
        }
    }
    let count = AtomicUsize::new(0);
    nest(50, &count);
    assert_eq!(count.into_inner(), 51);
}

#[test]
fn a_thread_local_destructor_can_spawn_and_join() {
    struct SpawnAtEnd(RefCell<Option<mpsc::Sender<i32>>>);
    impl Drop for SpawnAtEnd {
        fn drop(&mut self) {
            let answer = nptl::spawn(|| 42).unwrap().join().unwrap();
            let sender = self.0.take().unwrap();
            // Once more, into a thread that outlives this one.
            nptl::spawn(move || sender.send(answer).unwrap())
                .unwrap()
                .detach();
        }
    }
    thread_local!(static LOCAL: SpawnAtEnd = const { SpawnAtEnd(RefCell::new(None)) });
    let (sender, answers) = mpsc::channel();
    for _ in 0..rounds(500) {
        let for_ours = sender.clone();
        let ours =
            nptl::spawn(move || LOCAL.with(|local| local.0.replace(Some(for_ours)))).unwrap();
        ours.join().unwrap();
        let for_std = sender.clone();
        let std = std::thread::spawn(move || LOCAL.with(|local| local.0.replace(Some(for_std))));
        std.join().unwrap();
    }
    drop(sender);
    assert_eq!(answers.iter().sum::<i32>(), 2 * 42 * rounds(500) as i32);
}

#[test]
fn a_thread_can_be_joined_by_another_than_its_creator() {
    let ours = |number: i32| nptl::spawn(move || number).unwrap();
    let by_std = |handle: JoinHandle<i32>| std::thread::spawn(move || handle.join().unwrap());
    assert_eq!(by_std(ours(1)).join().unwrap(), 1);
    let by_ours = |handle: JoinHandle<i32>| nptl::spawn(move || handle.join().unwrap()).unwrap();
    assert_eq!(by_ours(by_ours(by_ours(ours(2)))).join().unwrap(), 2);
}

/// A thread that ends when the sender is dropped.
fn gated<T: Send + 'static>(result: T) -> (mpsc::Sender<()>, JoinHandle<T>) {
    let (open, gate) = mpsc::channel::<()>();
    let body = move || {
        let _ = gate.recv();
        result
    };
    (open, nptl::spawn(body).unwrap())
}

#[test]
fn a_timed_join_gives_the_handle_back_or_the_result() {
    let (open, handle) = gated(1);
    let handle = handle.join_timeout(Duration::ZERO).unwrap_err();
    let handle = handle.join_timeout(Duration::from_millis(20)).unwrap_err();
    assert!(!handle.is_finished());
    drop(open);
    assert_eq!(
        handle
            .join_timeout(Duration::from_secs(60))
            .unwrap()
            .unwrap(),
        1
    );

    let (open, handle) = gated(2);
    drop(open);
    assert_eq!(handle.join_timeout(Duration::MAX).unwrap().unwrap(), 2);

    let (open, handle) = gated(3);
    drop(open);
    wait_until("the end", || handle.is_finished());
    assert_eq!(handle.join_timeout(Duration::ZERO).unwrap().unwrap(), 3);
}

#[test]
fn try_join_and_is_finished_do_not_wait() {
    let (open, handle) = gated("result");
    assert!(!handle.is_finished());
    let mut handle = handle.try_join().unwrap_err();
    drop(open);
    let result = loop {
        match handle.try_join() {
            Ok(result) => break result.unwrap(),
            Err(again) => handle = again,
        }
        std::thread::yield_now();
    };
    assert_eq!(result, "result");
}

#[test]
fn is_finished_becomes_true_and_stays_so() {
    let (open, handle) = gated(());
    drop(open);
    wait_until("the thread is finished", || handle.is_finished());
    assert!((0..1000).all(|_| handle.is_finished()));
    handle.join().unwrap();
}

/// Says when its thread is at this point, and holds it there.
struct Stop {
    reached: mpsc::Sender<()>,
    go_on: mpsc::Receiver<()>,
}

impl Drop for Stop {
    fn drop(&mut self) {
        let _ = self.reached.send(());
        let _ = self.go_on.recv();
    }
}

fn stop() -> (Stop, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let (reached, at) = mpsc::channel();
    let (open, go_on) = mpsc::channel();
    (Stop { reached, go_on }, at, open)
}

#[test]
fn a_handle_can_be_dropped_in_every_phase_of_the_thread() {
    thread_local!(static AT_END: RefCell<Option<Stop>> = const { RefCell::new(None) });
    let cache = private_cache();
    let held = Arc::new(());
    for _ in 0..rounds(200) {
        let on_cache = || Builder::new().stack_cache(&cache);
        let result = || {
            let held = Arc::clone(&held);
            move || held
        };
        // Wherever it is by now, most often not yet started.
        drop(on_cache().spawn(result()).unwrap());
        on_cache().spawn(result()).unwrap().detach();

        // In the closure.
        let (in_closure, at, open) = stop();
        let handle = on_cache().spawn(move || drop(in_closure)).unwrap();
        at.recv().unwrap();
        drop(handle);
        drop(open);

        // In its destructors, the result already there.
        let (in_destructor, at, open) = stop();
        let result_at_end = result();
        let handle = on_cache().spawn(move || {
            AT_END.set(Some(in_destructor));
            result_at_end()
        });
        at.recv().unwrap();
        drop(handle);
        drop(open);

        // After its end.
        let handle = on_cache().spawn(result()).unwrap();
        wait_until("the end", || handle.is_finished());
        drop(handle);
    }
    wait_until_unused(&cache);
    // Detached threads drop their results before they give their stacks back.
    assert_eq!(Arc::strong_count(&held), 1);
}

#[test]
fn a_detached_thread_runs_to_its_end() {
    let (sender, results) = mpsc::channel();
    let (open, gate) = mpsc::channel::<()>();
    let body = move || {
        let _ = gate.recv();
        sender.send("from the detached thread").unwrap();
    };
    nptl::spawn(body).unwrap().detach();
    drop(open);
    assert_eq!(results.recv().unwrap(), "from the detached thread");
}

#[test]
fn a_probe_finds_a_living_thread_and_no_ended_one() {
    for _ in 0..rounds(200) {
        let (open, handle) = gated(());
        handle.kill(0).unwrap();
        drop(open);
        wait_until("the end", || handle.is_finished());
        assert_eq!(support::errno(handle.kill(0)), Some(libc::ESRCH));
        assert_eq!(
            support::errno(handle.kill(libc::SIGKILL)),
            Some(libc::ESRCH)
        );
        assert_eq!(
            support::errno(handle.kill(libc::SIGRTMIN())),
            Some(libc::ESRCH)
        );
        handle.join().unwrap();
    }
}

#[test]
fn signals_that_belong_to_glibc_or_do_not_exist_are_refused() {
    let (open, handle) = gated(());
    for signal in [32, 33, -1, 65, libc::SIGRTMAX() + 1] {
        assert_eq!(
            support::errno(handle.kill(signal)),
            Some(libc::EINVAL),
            "{signal}"
        );
    }
    drop(open);
    handle.join().unwrap();
}

#[test]
fn every_real_time_signal_reaches_the_thread_it_was_sent_to() {
    use std::sync::atomic::AtomicI32;
    static SEEN: [AtomicI32; 65] = [const { AtomicI32::new(0) }; 65];
    extern "C" fn note(signal: i32) {
        // SAFETY: no preconditions.
        SEEN[signal as usize].store(unsafe { libc::gettid() }, Ordering::Relaxed);
    }
    let (open, handle) = gated(());
    // valgrind keeps the last one for itself.
    let last = libc::SIGRTMAX() - i32::from(under_valgrind());
    for signal in libc::SIGRTMIN()..=last {
        // SAFETY: a handler that only stores.
        unsafe { libc::signal(signal, note as *const () as usize) };
        handle.kill(signal).unwrap();
        let seen = &SEEN[signal as usize];
        wait_until("the handler ran", || seen.load(Ordering::Relaxed) != 0);
        assert_eq!(seen.load(Ordering::Relaxed), handle.tid());
        // SAFETY: as it was.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    drop(open);
    handle.join().unwrap();
}

fn is_readable(fd: &impl AsRawFd, milliseconds: i32) -> bool {
    let mut entry = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid entry.
    unsafe { libc::poll(&raw mut entry, 1, milliseconds) == 1 }
}

#[test]
fn a_pidfd_is_readable_when_the_thread_has_ended() {
    let (open, handle) = gated(5);
    let pidfd = handle.pidfd();
    if !kernel_at_least(6, 9) || under_valgrind() {
        drop(open);
        handle.join().unwrap();
        let error = pidfd.unwrap_err();
        if !under_valgrind() {
            assert_eq!(error.kind(), std::io::ErrorKind::Unsupported);
        }
        skip!("{error}");
    }
    let pidfd = pidfd.unwrap();
    assert!(!is_readable(&pidfd, 0));
    drop(open);
    assert!(is_readable(&pidfd, 60_000));
    wait_until("the end", || handle.is_finished());
    assert_eq!(support::errno(handle.pidfd()), Some(libc::ESRCH));
    assert_eq!(handle.join().unwrap(), 5);
    assert!(is_readable(&pidfd, 0), "and stays so after the join");
}

#[test]
fn a_tid_is_that_of_the_thread_from_the_start() {
    // SAFETY: no preconditions.
    let handle = nptl::spawn(|| unsafe { libc::gettid() }).unwrap();
    let tid = handle.tid();
    assert_eq!(handle.join().unwrap(), tid);
}

#[test]
fn a_scope_waits_for_its_threads_even_when_it_panics() {
    let finished = AtomicUsize::new(0);
    let all_started = Barrier::new(5);
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        nptl::scope(|scope| {
            for _ in 0..4 {
                let body = || {
                    all_started.wait();
                    finished.fetch_add(1, Ordering::Relaxed)
                };
                scope.spawn(body).unwrap();
            }
            all_started.wait();
            resume_unwind(Box::new("the scope's own"));
        })
    }));
    assert_eq!(
        panicked.unwrap_err().downcast_ref(),
        Some(&"the scope's own")
    );
    assert_eq!(finished.into_inner(), 4);
}

#[test]
fn a_panic_in_a_scoped_thread_ends_the_scope_in_a_panic_unless_it_was_joined() {
    let end = |joined: bool| {
        catch_unwind(|| {
            nptl::scope(|scope| {
                let handle = scope.spawn(|| resume_unwind(Box::new(7))).unwrap();
                if joined {
                    let payload = handle.join().unwrap_err();
                    assert_eq!(payload.downcast_ref(), Some(&7));
                }
            })
        })
    };
    assert!(end(false).is_err());
    assert!(end(true).is_ok());
}

#[test]
fn scoped_threads_borrow_and_change_what_outlives_the_scope() {
    let mut numbers = vec![1; 100];
    nptl::scope(|scope| {
        for part in numbers.chunks_mut(10) {
            scope
                .spawn(|| part.iter_mut().for_each(|n| *n += 1))
                .unwrap();
        }
    });
    assert_eq!(numbers, [2; 100]);
}

#[test]
fn a_backtrace_ends_where_the_thread_began() {
    let trace = nptl::spawn(Backtrace::force_capture)
        .unwrap()
        .join()
        .unwrap();
    let trace = trace.to_string();
    let frames: Vec<_> = trace
        .lines()
        .filter(|line| !line.trim().starts_with("at "))
        .collect();
    let main = frames
        .iter()
        .position(|frame| frame.contains("nptl::start::") && frame.ends_with("::main"));
    let main = main.unwrap_or_else(|| panic!("no frame of the thread's main:\n{trace}"));
    assert!(
        frames.len() - main <= 2,
        "it runs on into other code:\n{trace}"
    );
    assert!(!trace.contains("nptl::spawn::spawn"), "{trace}");
}

#[test]
fn handles_can_be_shared_and_sent() {
    fn send_and_sync<T: Send + Sync>() {}
    send_and_sync::<JoinHandle<i32>>();
    send_and_sync::<nptl::ScopedJoinHandle<'static, i32>>();
    send_and_sync::<Builder>();
}
