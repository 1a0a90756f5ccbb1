//! The core of the crate: what a thread of it is, and its life from spawn to join.
//!
//! Runs on the system's glibc and on newer ones, with another malloc, and under valgrind; so every test is
//! quick, and what must be undisturbed, or may die, runs in a child process.

mod churn;
mod clone3;
mod face;
mod lies;
mod lifecycle;
mod own_state;

use nptl::{Builder, StackCache, StackCacheConfig};
use support::wait_until;

/// valgrind replaces malloc by a library of its own, which every process under it has mapped.
fn under_valgrind() -> bool {
    std::fs::read_to_string("/proc/self/maps").is_ok_and(|maps| maps.contains("vgpreload"))
}

/// A number of rounds, or a part of it where one instruction costs as much as fifty.
fn rounds(count: usize) -> usize {
    if under_valgrind() {
        (count / 50).max(2)
    } else {
        count
    }
}

/// A cache that no other test takes stacks from.
fn private_cache() -> StackCache {
    StackCache::new(StackCacheConfig::default())
}

/// Waits for the end of all threads on stacks of `cache`.
#[track_caller]
fn wait_until_unused(cache: &StackCache) {
    wait_until("no stack is in use", || {
        // A detached thread gives back the stack that it still runs on, so the accounts learn of its end only
        // from a later look.
        cache.trim(usize::MAX);
        cache.stats().live_stacks == 0
    });
}

/// Runs `first`, and when that thread is gone `second`, on the same stack and TLS block.
#[track_caller]
fn on_one_block<A: Send + 'static, B: Send + 'static>(
    first: impl FnOnce() -> A + Send + 'static,
    second: impl FnOnce() -> B + Send + 'static,
) -> (A, B) {
    let cache = private_cache();
    let handle = Builder::new().stack_cache(&cache).spawn(first).unwrap();
    let block = handle.as_pthread_t();
    let first = handle.join().unwrap();
    let handle = Builder::new().stack_cache(&cache).spawn(second).unwrap();
    assert_eq!(handle.as_pthread_t(), block, "the block was not reused");
    (first, handle.join().unwrap())
}
