//! Of several threads that end at once only one is inside madvise(2), and what the others used of their stacks is
//! given back all the same. The order is forced: one thread is held at the entry of that call.

mod support;

use std::cell::Cell;
use std::hint::black_box;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use nptl::{Builder, JoinHandle, StackCache, StackCacheConfig, StackInfo};
use support::{Warden, case, child, or_skip, report, resident_pages, wait_for_end};

const KIB: usize = 1024;
/// More than a stack keeps, and less than it has.
const DEEP: usize = 512 * KIB;
/// `StackCacheConfig::keep_resident`, by default.
const KEPT: usize = 32 * KIB;

/// Uses about so many bytes of the stack.
fn touch(bytes: usize) {
    let page = [1_u8; 4096];
    black_box(&page);
    if bytes > page.len() {
        touch(bytes - page.len());
    }
    black_box(&page);
}

/// A thread that has used its stack, and ends when told.
fn deep() -> (JoinHandle<()>, Sender<()>) {
    let (end, wait) = channel::<()>();
    let body = move || {
        touch(DEEP);
        let _ = wait.recv();
    };
    let handle = Builder::new().stack_size(1024 * KIB).spawn(body);
    (handle.expect("a thread"), end)
}

fn used(stack: StackInfo) -> usize {
    resident_pages(stack.base, stack.size).expect("a mapping") * 4096
}

/// Ends a thread without joining it; the bytes that are left of its stack.
fn after_end((handle, end): (JoinHandle<()>, Sender<()>)) -> (JoinHandle<()>, usize) {
    let pidfd = handle.pidfd().expect("a pidfd");
    drop(end);
    wait_for_end(&pidfd);
    let used = used(handle.stack());
    (handle, used)
}

/// Runs `work` while a thread is held inside its madvise, and again afterwards, in a process of its own. Asks each
/// time that what the thread of `work` used is gone in the end.
fn while_one_discards(test: &str, work: impl Fn(bool)) {
    if case().is_some() {
        if !support::kernel_at_least(6, 9) {
            support::skip!("pidfds of threads need kernel 6.9");
        }
        // The calibration's threads are glibc's own.
        nptl::spawn(|| ()).unwrap().join().unwrap();
        let warden = or_skip!(Warden::new(&[libc::SYS_madvise]));
        let (held, end) = deep();
        let tid = held.tid().as_raw();
        warden.hold(tid);
        drop(end);
        warden.wait_until_held(tid);
        for _ in 0..3 {
            work(true);
        }
        warden.release(tid);
        held.join().expect("its end");
        for _ in 0..3 {
            work(false);
        }
        report("done", "yes");
        return;
    }
    let child = child(test, "run").time_limit(Duration::from_secs(60));
    let output = or_skip!(child.run()).success();
    if output.skipped().is_none() {
        assert_eq!(output.get("done"), Some("yes"), "{output}");
    }
}

/// The thread has discarded what it used, or, if another was at it, has left it to its handle.
fn assert_left(used: usize, busy: bool) {
    match busy {
        true => assert!(used >= DEEP, "discarded at its end, {used} bytes are left"),
        false => assert!(used <= KEPT, "{used} bytes are left"),
    }
}

#[test]
fn a_join_discards() {
    while_one_discards("a_join_discards", |busy| {
        let (handle, left) = after_end(deep());
        assert_left(left, busy);
        let stack = handle.stack();
        handle.join().expect("its end");
        assert!(used(stack) <= KEPT, "{} bytes are left", used(stack));
    });
}

#[test]
fn a_late_drop_of_the_handle_discards() {
    while_one_discards("a_late_drop_of_the_handle_discards", |busy| {
        let (handle, left) = after_end(deep());
        assert_left(left, busy);
        let stack = handle.stack();
        drop(handle);
        assert!(used(stack) <= KEPT, "{} bytes are left", used(stack));
    });
}

/// Nobody else would.
#[test]
fn a_detached_thread_discards() {
    while_one_discards("a_detached_thread_discards", |_| {
        let (handle, end) = deep();
        let (stack, pidfd) = (handle.stack(), handle.pidfd().expect("a pidfd"));
        handle.detach();
        drop(end);
        wait_for_end(&pidfd);
        assert!(used(stack) <= KEPT, "{} bytes are left", used(stack));
    });
}

thread_local! {
    static AT_END: Cell<Option<AtEnd>> = const { Cell::new(None) };
}

/// Says that the destructors have begun, and waits there.
struct AtEnd(Sender<()>, Receiver<()>);

impl Drop for AtEnd {
    fn drop(&mut self) {
        let _ = self.0.send(());
        let _ = self.1.recv();
    }
}

/// The handle goes after the thread has left its stack to it, and before the thread comes to its discard.
#[test]
fn a_thread_whose_handle_is_dropped_at_its_end_discards() {
    let test = "a_thread_whose_handle_is_dropped_at_its_end_discards";
    while_one_discards(test, |_| {
        let ((say, ended), (end, wait)) = (channel(), channel());
        let body = move || {
            touch(DEEP);
            AT_END.set(Some(AtEnd(say, wait)));
        };
        let handle = Builder::new().stack_size(1024 * KIB).spawn(body);
        let handle = handle.expect("a thread");
        ended.recv().expect("its destructors");
        let (stack, pidfd) = (handle.stack(), handle.pidfd().expect("a pidfd"));
        drop(handle);
        drop(end);
        wait_for_end(&pidfd);
        assert!(used(stack) <= KEPT, "{} bytes are left", used(stack));
    });
}

/// The thread that is inside does not exist in a forked process, and nobody there waits for it.
#[test]
fn a_forked_process_discards_as_ever() {
    while_one_discards("a_forked_process_discards_as_ever", |_| {
        // SAFETY: the child uses what is usable in a forked child, and ends without returning.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let (handle, left) = after_end(deep());
            let joined = handle.join().is_ok();
            // SAFETY: no destructor of this copy may run.
            unsafe { libc::_exit(i32::from(!joined || left > KEPT)) };
        }
        let mut status = 0;
        // SAFETY: a child of ours, and a valid place for its status.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(status, 0);
    });
}

/// One that has left its discard to a handle which nobody drops is in nobody's way, nor in a forked process without
/// that handle.
#[test]
fn a_handle_that_is_kept_holds_up_no_other() {
    let kept = Cell::new(None);
    while_one_discards("a_handle_that_is_kept_holds_up_no_other", |busy| {
        let (handle, left) = after_end(deep());
        assert_left(left, busy);
        if busy {
            kept.set(Some(handle));
            return;
        }
        // SAFETY: the child uses what is usable in a forked child, and ends without returning.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let (_handle, left) = after_end(deep());
            // SAFETY: no destructor of this copy may run.
            unsafe { libc::_exit(i32::from(left > KEPT)) };
        }
        let mut status = 0;
        // SAFETY: a child of ours, and a valid place for its status.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(status, 0);
    });
}

/// Many at once, joined in any order and by several threads: nothing is left of any.
#[test]
fn nothing_is_left_of_a_burst() {
    support::alone("nothing_is_left_of_a_burst", || {
        for round in 0..20_usize {
            let (mut threads, ends): (Vec<_>, Vec<_>) = (0..64).map(|_| deep()).unzip();
            let stacks: Vec<_> = threads.iter().map(JoinHandle::stack).collect();
            drop(ends);
            let rest = threads.split_off(32);
            std::thread::scope(|scope| {
                for list in [threads, rest] {
                    scope.spawn(move || {
                        for (index, handle) in list.into_iter().enumerate() {
                            match (index + round) % 4 {
                                0 => handle.detach(),
                                _ => handle.join().expect("its end"),
                            }
                        }
                    });
                }
            });
            let start = std::time::Instant::now();
            // The detached ones among them are on their way.
            while nptl::StackCache::global().stats().live_stacks > 0 {
                assert!(
                    start.elapsed() < Duration::from_secs(30),
                    "a thread never ends"
                );
                nptl::spawn(|| ()).unwrap().join().unwrap();
            }
            for stack in stacks {
                assert!(used(stack) <= KEPT, "{} bytes are left", used(stack));
            }
        }
    });
}

/// Waits until a thread of this process sleeps in a private FUTEX_WAIT, which is how glibc's locks wait (std's
/// waits are FUTEX_WAIT_BITSET).
fn wait_for_glibc_lock(tid: i32) {
    let start = std::time::Instant::now();
    loop {
        let call = std::fs::read_to_string(format!("/proc/self/task/{tid}/syscall"));
        let call = call.expect("the system call of a thread");
        let mut words = call.split_whitespace();
        let number = words.next().and_then(|word| word.parse().ok());
        if number == Some(libc::SYS_futex) && words.nth(1) == Some("0x80") {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(30), "it is in {call}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// glibc's set-id signal reaches an ending thread until it is off glibc's list. Where the thread has no signal stack,
/// the handler's frame lies on the stack, deeper than a cache need keep: no handle may discard it under the handler.
#[test]
fn a_handle_leaves_the_frame_of_the_set_id_handler_alone() {
    let test = "a_handle_leaves_the_frame_of_the_set_id_handler_alone";
    if case().is_some() {
        if !support::kernel_at_least(6, 9) {
            support::skip!("pidfds of threads need kernel 6.9");
        }
        if std::fs::read_to_string("/proc/thread-self/syscall").is_err() {
            support::skip!("no /proc/thread-self/syscall");
        }
        assert!(nptl::disable_overflow_reports());
        nptl::spawn(|| ()).unwrap().join().unwrap();
        let calls = [libc::SYS_madvise, libc::SYS_tgkill, libc::SYS_setresuid];
        let warden = or_skip!(Warden::new(&calls));

        // One is inside its madvise, so that the next leaves its own to its handle.
        let (inside, end) = deep();
        warden.hold(inside.tid().as_raw());
        drop(end);
        warden.wait_until_held(inside.tid().as_raw());

        let cache = StackCache::new(StackCacheConfig::default().keep_resident(0));
        let (end, wait) = channel::<()>();
        let body = move || {
            let _ = wait.recv();
        };
        let ending = Builder::new().stack_cache(&cache).spawn(body);
        let ending = ending.expect("a thread");
        let (tid, pidfd) = (ending.tid().as_raw(), ending.pidfd().expect("a pidfd"));

        // A broadcast that holds the list's lock and has not yet sent its signals.
        let ((say, says), (go, wait)) = (channel(), channel::<()>());
        let broadcast = std::thread::spawn(move || {
            say.send(support::tid()).unwrap();
            let _ = wait.recv();
            // SAFETY: changes nothing, which glibc tells all threads.
            unsafe { libc::setresuid(u32::MAX, u32::MAX, u32::MAX) }
        });
        let broadcaster = says.recv().unwrap();
        warden.hold(broadcaster);
        drop(go);
        warden.wait_until_held(broadcaster);

        // The thread comes as far as that lock, and handles the signal there.
        warden.hold(tid);
        drop(end);
        wait_for_glibc_lock(tid);
        warden.release(broadcaster);
        warden.wait_until_held(tid);
        drop(ending);
        warden.release(tid);
        warden.release(inside.tid().as_raw());
        assert_eq!(broadcast.join().unwrap(), 0);
        wait_for_end(&pidfd);
        inside.join().expect("its end");
        report("done", "yes");
        return;
    }
    let child = child(test, "run").time_limit(Duration::from_secs(60));
    let output = or_skip!(child.run()).success();
    if output.skipped().is_none() {
        assert_eq!(output.get("done"), Some("yes"), "{output}");
    }
}

/// A handle that goes while the thread still stands in its last system call discards, and leaves that thread what it
/// needs to come to its end.
#[test]
fn a_handle_dropped_before_the_last_instruction_discards() {
    let test = "a_handle_dropped_before_the_last_instruction_discards";
    if case().is_some() {
        if !support::kernel_at_least(6, 9) {
            support::skip!("pidfds of threads need kernel 6.9");
        }
        nptl::spawn(|| ()).unwrap().join().unwrap();
        let warden = or_skip!(Warden::new(&[libc::SYS_madvise, libc::SYS_exit]));
        let (inside, end) = deep();
        warden.hold(inside.tid().as_raw());
        drop(end);
        warden.wait_until_held(inside.tid().as_raw());

        let cache = StackCache::new(StackCacheConfig::default().keep_resident(0));
        let (end, wait) = channel::<()>();
        let body = move || {
            touch(DEEP);
            let _ = wait.recv();
        };
        let builder = Builder::new().stack_size(1024 * KIB).stack_cache(&cache);
        let ending = builder.clone().spawn(body).expect("a thread");
        let (tid, pidfd) = (ending.tid().as_raw(), ending.pidfd().expect("a pidfd"));
        let stack = ending.stack();
        warden.hold(tid);
        drop(end);
        warden.wait_until_held(tid);
        assert_left(used(stack), true);
        drop(ending);
        assert!(used(stack) <= 4 * KIB, "{} bytes are left", used(stack));
        warden.release(tid);
        wait_for_end(&pidfd);
        let next = builder.spawn(|| ()).expect("a thread");
        assert_eq!(next.stack().base, stack.base, "never given back");
        next.join().expect("its end");

        warden.release(inside.tid().as_raw());
        inside.join().expect("its end");
        report("done", "yes");
        return;
    }
    let child = child(test, "run").time_limit(Duration::from_secs(60));
    let output = or_skip!(child.run()).success();
    if output.skipped().is_none() {
        assert_eq!(output.get("done"), Some("yes"), "{output}");
    }
}
