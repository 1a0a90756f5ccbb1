//! 20,000 threads, or 200,000 in the long form, leave nothing behind: no memory, no mapping, no descriptor, no thread.
//!
//! Each way to use threads runs in a process of its own, so that nothing else moves the counts.

use nptl::{Builder, JoinHandle};
use std::hint::black_box;
use std::sync::{Arc, Barrier, Condvar, Mutex};
use std::time::{Duration, Instant};
use support::{Snapshot, case, child, malloc_in_use, or_skip, report, short_or_long};

const SPAWNERS: usize = 16;
const TOGETHER_IN_SCOPE: usize = 10;
/// Most detached threads at once.
const DETACHED: usize = 32;

/// Leaves what it allocated in the thread's heap cache, and has thread-locals with destructors.
fn body(number: usize) -> Vec<usize> {
    thread_local!(static LOCAL: Box<[usize]> = vec![1; 50].into());
    for size in 1..=20 {
        black_box(vec![0_u8; size * 40]);
    }
    vec![LOCAL.with(|local| local.len()), number]
}

fn small() -> Builder {
    Builder::new().stack_size(64 << 10)
}

fn joined(count: usize) {
    for number in 0..count {
        let handle = small().spawn(move || body(number)).unwrap();
        assert_eq!(handle.join().unwrap(), [50, number]);
    }
}

fn scoped(count: usize) {
    for number in 0..count / TOGETHER_IN_SCOPE {
        let borrowed = [number; 4];
        nptl::scope(|scope| {
            for _ in 0..TOGETHER_IN_SCOPE {
                small()
                    .spawn_scoped(scope, || body(borrowed.iter().sum()))
                    .unwrap();
            }
        });
    }
}

/// A place among a limited number, given back when dropped.
struct Permit(&'static (Mutex<usize>, Condvar));

impl Permit {
    fn take() -> Permit {
        static FREE: (Mutex<usize>, Condvar) = (Mutex::new(DETACHED), Condvar::new());
        let free = FREE.0.lock().unwrap();
        *FREE.1.wait_while(free, |free| *free == 0).unwrap() -= 1;
        Permit(&FREE)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        *self.0.0.lock().unwrap() += 1;
        self.0.1.notify_one();
    }
}

fn detached(count: usize) {
    for number in 0..count {
        let place = Permit::take();
        let body = move || {
            black_box(body(number));
            drop(place);
        };
        small().spawn(body).unwrap().detach();
    }
}

/// More threads at once than the run that follows can have, so that all stacks and malloc's arenas exist before
/// they are counted. Each fills every bin of its heap cache, which stays with its block: otherwise what one thread
/// allocates and another frees fills them over some 200,000 threads, which looks like a leak.
fn fill_caches() {
    const TOGETHER: usize = SPAWNERS * (TOGETHER_IN_SCOPE + 2);
    let gate = Arc::new(Barrier::new(TOGETHER));
    let handles: Vec<JoinHandle<_>> = (0..TOGETHER)
        .map(|number| {
            let gate = Arc::clone(&gate);
            let body = move || {
                black_box(body(number));
                gate.wait();
                for size in (8..=1032).step_by(16) {
                    black_box([(); 16].map(|()| Vec::<u8>::with_capacity(size)));
                }
                gate.wait();
            };
            small().spawn(body).unwrap()
        })
        .collect();
    handles
        .into_iter()
        .for_each(|handle| handle.join().unwrap());
}

/// Spawns and joins in 16 threads at once, which are ours themselves.
fn at_once(each: fn(usize), count: usize) {
    nptl::scope(|scope| {
        for _ in 0..SPAWNERS {
            scope.spawn(move || each(count / SPAWNERS)).unwrap();
        }
    });
}

/// Detached threads, and the last ones joined, need a moment to be gone.
#[track_caller]
fn wait_for_threads(left: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while Snapshot::take().kernel_threads > left {
        assert!(Instant::now() < deadline, "threads that never end");
        std::thread::yield_now();
    }
}

fn count_what_is_left(run: impl Fn(usize)) {
    let threads = Snapshot::take().kernel_threads;
    let count = short_or_long(20_000, 200_000);
    fill_caches();
    run(count / 20);
    wait_for_threads(threads);
    let before = Snapshot::take();
    let in_use = malloc_in_use();
    run(count);
    wait_for_threads(threads);
    let growth = malloc_in_use() - in_use;
    let change = before.diff(&Snapshot::take());
    report("malloc", growth);
    report("change", &change);
    assert_eq!(
        (change.fds, change.kernel_threads, change.glibc_threads),
        (0, 0, 0),
        "{change}"
    );
    // The smallest block of malloc is 24 bytes.
    assert!(
        growth <= 3 * count as i64,
        "malloc has given out {growth} bytes more"
    );
    // A page for every 80 threads, in the long form for every 800.
    assert!(change.resident_bytes <= 1 << 20, "{change}");
    assert!(change.mappings <= 2, "{change}");
}

fn soak(name: &str, run: impl Fn(usize)) {
    if case().is_some() {
        count_what_is_left(run);
        return;
    }
    let output = or_skip!(
        child(name, "run")
            .time_limit(Duration::from_secs(600))
            .run()
    );
    output.success();
}

#[test]
fn joined_threads_leave_nothing_behind() {
    soak("soak::joined_threads_leave_nothing_behind", joined);
}

#[test]
fn detached_threads_leave_nothing_behind() {
    soak("soak::detached_threads_leave_nothing_behind", detached);
}

#[test]
fn scoped_threads_leave_nothing_behind() {
    soak("soak::scoped_threads_leave_nothing_behind", scoped);
}

#[test]
fn joined_threads_of_16_spawners_leave_nothing_behind() {
    let name = "soak::joined_threads_of_16_spawners_leave_nothing_behind";
    soak(name, |count| at_once(joined, count));
}

#[test]
fn detached_threads_of_16_spawners_leave_nothing_behind() {
    let name = "soak::detached_threads_of_16_spawners_leave_nothing_behind";
    soak(name, |count| at_once(detached, count));
}

#[test]
fn scoped_threads_of_16_spawners_leave_nothing_behind() {
    let name = "soak::scoped_threads_of_16_spawners_leave_nothing_behind";
    soak(name, |count| at_once(scoped, count));
}
