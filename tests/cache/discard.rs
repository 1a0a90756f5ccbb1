//! What a thread used of its stack beyond what the cache keeps is given back to the kernel, by its handle or by the
//! thread itself, whichever way the two part.

use std::cell::Cell;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use crate::with_warden;
use nptl::{Builder, JoinHandle, StackCache, StackCacheConfig, StackInfo};
use support::{resident_pages, touch_stack, wait_for_end};

const KIB: usize = 1024;
/// More than a stack keeps, and less than it has.
const DEEP: usize = 512 * KIB;
/// `StackCacheConfig::keep_resident`, by default.
const KEPT: usize = 32 * KIB;

/// A thread that has used its stack, and ends on a signal of the test.
fn deep() -> (JoinHandle<()>, Sender<()>) {
    let (end, wait) = channel::<()>();
    let body = move || {
        touch_stack(DEEP);
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

#[test]
fn the_handle_discards() {
    support::alone("discard::the_handle_discards", || {
        type End = fn(JoinHandle<()>);
        let ends: [End; 2] = [|handle| handle.join().expect("its end"), drop];
        for end in ends {
            let (handle, left) = after_end(deep());
            assert!(left >= DEEP, "{left} bytes are left: the thread did it");
            let stack = handle.stack();
            end(handle);
            assert!(used(stack) <= KEPT, "{} bytes are left", used(stack));
        }
    });
}

/// No handle does.
#[test]
fn a_detached_thread_discards() {
    support::alone("discard::a_detached_thread_discards", || {
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

/// The closure has ended when the handle goes, and the thread has not.
#[test]
fn a_thread_whose_handle_is_dropped_at_its_end_discards() {
    support::alone(
        "discard::a_thread_whose_handle_is_dropped_at_its_end_discards",
        || {
            let ((say, ended), (end, wait)) = (channel(), channel());
            let body = move || {
                touch_stack(DEEP);
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
        },
    );
}

/// A handle that goes while the thread still stands in its last system call leaves it its stack. The next spawn discards.
#[test]
fn a_handle_dropped_before_the_last_instruction_leaves_the_stack_alone() {
    let test = "discard::a_handle_dropped_before_the_last_instruction_leaves_the_stack_alone";
    with_warden(test, |warden| {
        let cache = StackCache::new(StackCacheConfig::default().keep_resident(0));
        let (end, wait) = channel::<()>();
        let body = move || {
            touch_stack(DEEP);
            let _ = wait.recv();
        };
        let builder = Builder::new().stack_size(1024 * KIB).stack_cache(&cache);
        let ending = builder.clone().spawn(body).expect("a thread");
        let (tid, pidfd) = (ending.tid(), ending.pidfd().expect("a pidfd"));
        let stack = ending.stack();
        warden.hold(tid);
        drop(end);
        warden.wait_until_held(tid);
        drop(ending);
        assert!(used(stack) >= DEEP, "{} bytes are left", used(stack));
        cache.clear();
        assert_eq!(cache.stats().mapped_stacks, 1, "a thread is on it");
        warden.release(tid);
        wait_for_end(&pidfd);
        builder.spawn(|| ()).unwrap().join().unwrap();
        assert!(used(stack) <= 4 * KIB, "{} bytes are left", used(stack));
        assert_eq!(cache.stats().cached_stacks, 1, "the next thread ran on it");
    });
}

/// Many at once, joined in any order and by several threads: nothing is left of any.
#[test]
fn nothing_is_left_of_a_burst() {
    support::alone("discard::nothing_is_left_of_a_burst", || {
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
                // One whose handle went between its thread's last act and its end is unmapped by now.
                let left = resident_pages(stack.base, stack.size).unwrap_or(0) * 4096;
                assert!(left <= KEPT, "{left} bytes are left");
            }
        }
    });
}
