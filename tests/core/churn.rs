//! Many threads one after another and beside each other: in this process for valgrind to look at, and in a
//! child process of its own for counting what they leave behind. (tests/cache/soak.rs has the large numbers.)

use crate::{private_cache, rounds, wait_until, wait_until_unused};
use nptl::{Builder, StackCache, StackCacheConfig};
use std::hint::black_box;
use support::{Snapshot, await_reaping, case, child, malloc_in_use, or_skip};

/// Leaves what it allocated in the thread's heap cache, in bins of every size.
fn allocate() {
    for size in 1..=20 {
        black_box(vec![0_u8; size * 40]);
    }
}

#[test]
fn caches_and_stacks_come_and_go() {
    for _ in 0..rounds(100) {
        let cache = private_cache();
        let start = |cache: &StackCache| {
            let handles: Vec<_> = (0..4)
                .map(|_| Builder::new().stack_cache(cache).spawn(allocate).unwrap())
                .collect();
            for (number, handle) in handles.into_iter().enumerate() {
                match number {
                    0 => drop(handle),
                    _ => handle.join().unwrap(),
                }
            }
        };
        start(&cache);
        start(&cache);
        wait_until_unused(&cache);
        cache.trim(0);
        assert_eq!(cache.stats().mapped_stacks, 0);
        start(&cache);
    }
}

#[test]
fn threads_leave_nothing_behind() {
    let name = "churn::threads_leave_nothing_behind";
    let Some(case) = case() else {
        for cached in ["cached", "uncached"] {
            or_skip!(child(name, cached).run()).success();
        }
        return;
    };
    let cache = StackCache::new(match case.as_str() {
        "cached" => StackCacheConfig::default(),
        _ => StackCacheConfig::disabled(),
    });
    let spawn_and_join = |count: usize| {
        for _ in 0..count {
            let handle = Builder::new().stack_cache(&cache).spawn(allocate).unwrap();
            handle.join().unwrap();
        }
    };
    const COUNT: i64 = 5_000;
    spawn_and_join(500);
    await_reaping();
    let before = Snapshot::take();
    let in_use = malloc_in_use();
    spawn_and_join(COUNT as usize);
    let growth = malloc_in_use() - in_use;
    assert!(growth <= COUNT, "{growth} bytes of malloc in use");
    // The kernel counts the last thread for a moment after it has cleared the tid word.
    wait_until("the last thread is gone", || {
        Snapshot::take().kernel_threads <= before.kernel_threads
    });
    let change = before.diff(&Snapshot::take());
    change.expect_nothing_left();
    // Some 10 KB a thread were lost before heap caches were handed on.
    assert!(change.resident_bytes <= 100 * COUNT, "{change}");
}
