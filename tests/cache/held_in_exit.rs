//! A2: a stack is neither handed out nor unmapped before the kernel has cleared its
//! thread. The order is forced: exit(2) is held at its entry (seccomp's user notification), so that the
//! thread has given its stack back, is off every list, and still stands on it.

use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::with_warden;
use nptl::{Builder, JoinHandle, StackCache, StackCacheConfig};
use support::{Warden, burst, is_mapped, wait_for_end};

/// A thread that is held in its exit, with what the tests need of it.
struct Held {
    tid: i32,
    base: usize,
    pidfd: OwnedFd,
    handle: Option<JoinHandle<()>>,
}

fn hold_one(warden: &Warden, builder: &Builder, detached: bool) -> Held {
    let (open, wait) = std::sync::mpsc::channel::<()>();
    let handle = builder.clone().spawn(move || {
        let _ = wait.recv();
    });
    let handle = handle.expect("a thread");
    let tid = handle.tid();
    let (base, pidfd) = (handle.stack().base, handle.pidfd().expect("a pidfd"));
    warden.hold(tid);
    let handle = if detached {
        handle.detach();
        None
    } else {
        Some(handle)
    };
    drop(open);
    warden.wait_until_held(tid);
    Held {
        tid,
        base,
        pidfd,
        handle,
    }
}

fn spawn_and_join(builder: &Builder) -> usize {
    let handle = builder.clone().spawn(|| ()).expect("a thread");
    let base = handle.stack().base;
    handle.join().expect("its end");
    base
}

#[test]
fn a_detached_stack_waits_for_the_kernel() {
    with_warden(
        "held_in_exit::a_detached_stack_waits_for_the_kernel",
        |warden| {
            let cache = StackCache::new(StackCacheConfig::default());
            let builder = Builder::new().stack_cache(&cache);
            let held = hold_one(warden, &builder, true);

            // Whatever is asked of the cache: given back it is, but not free.
            let all: [&dyn Fn(); 6] = [
                &|| cache.trim(usize::MAX),
                &|| cache.trim(0),
                &|| cache.clear(),
                &|| cache.set_config(StackCacheConfig::disabled()),
                &|| cache.set_config(StackCacheConfig::default()),
                &|| assert_ne!(spawn_and_join(&builder), held.base, "handed out"),
            ];
            for ask in all.iter().chain(&all) {
                ask();
                assert!(is_mapped(held.base), "unmapped under its thread");
                let stats = cache.stats();
                assert_eq!(stats.live_stacks, 1, "{stats:?}");
                assert_eq!(stats.mapped_stacks, 1 + stats.cached_stacks, "{stats:?}");
            }
            cache.clear();
            warden.release(held.tid);
            wait_for_end(&held.pidfd);
            // The next one who looks finds it free, and the next thread gets it.
            assert_eq!(spawn_and_join(&builder), held.base);
            let stats = cache.stats();
            assert_eq!((stats.live_stacks, stats.cached_stacks), (0, 1));
            cache.trim(0);
            assert!(!is_mapped(held.base));
            assert_eq!(cache.stats().mapped_stacks, 0);
        },
    );
}

/// A cache that keeps nothing unmaps it, once the kernel has cleared the tid word and a later call sees it.
#[test]
fn a_disabled_cache_waits_as_well() {
    with_warden("held_in_exit::a_disabled_cache_waits_as_well", |warden| {
        let cache = StackCache::new(StackCacheConfig::disabled());
        let builder = Builder::new().stack_cache(&cache);
        let held = hold_one(warden, &builder, true);
        assert_ne!(spawn_and_join(&builder), held.base);
        cache.clear();
        assert!(is_mapped(held.base), "unmapped under its thread");
        assert_eq!(cache.stats().mapped_stacks, 1);
        warden.release(held.tid);
        wait_for_end(&held.pidfd);
        spawn_and_join(&builder);
        assert!(!is_mapped(held.base));
        assert_eq!(cache.stats().mapped_stacks, 0);
    });
}

/// The last handle of a private cache goes while its last thread stands in exit: the global one waits for it.
#[test]
fn a_cache_that_has_gone_waits_as_well() {
    with_warden(
        "held_in_exit::a_cache_that_has_gone_waits_as_well",
        |warden| {
            let global = StackCache::global();
            let builder = Builder::new().stack_cache(&StackCache::new(StackCacheConfig::default()));
            let held = hold_one(warden, &builder, true);
            drop(builder);
            assert!(is_mapped(held.base), "unmapped under its thread");
            for _ in 0..3 {
                global.clear();
                assert_ne!(spawn_and_join(&Builder::new()), held.base, "handed out");
                assert!(is_mapped(held.base), "unmapped under its thread");
                assert_eq!(global.stats().live_stacks, 1);
            }
            global.clear();
            warden.release(held.tid);
            wait_for_end(&held.pidfd);
            assert_eq!(spawn_and_join(&Builder::new()), held.base);
            global.clear();
            assert_eq!(global.stats().mapped_stacks, 0);
        },
    );
}

/// With a handle it is join that waits.
#[test]
fn a_join_waits_for_the_kernel() {
    with_warden("held_in_exit::a_join_waits_for_the_kernel", |warden| {
        let cache = StackCache::new(StackCacheConfig::default());
        let builder = Builder::new().stack_cache(&cache);
        let mut held = hold_one(warden, &builder, false);
        let handle = held.handle.take().expect("not detached");
        assert!(!handle.is_finished());
        let handle = handle.try_join().expect_err("it has not ended");
        let handle = handle.join_timeout(Duration::from_millis(20));
        let handle = handle.expect_err("it has not ended");
        assert_ne!(spawn_and_join(&builder), held.base, "handed out");
        cache.clear();
        assert!(is_mapped(held.base), "unmapped under its thread");
        assert_eq!(cache.stats().mapped_stacks, 1);

        // Dropped now, the handle gives the stack back in the thread's stead.
        drop(handle);
        assert_ne!(spawn_and_join(&builder), held.base, "handed out");
        cache.clear();
        assert!(is_mapped(held.base), "unmapped under its thread");

        warden.release(held.tid);
        wait_for_end(&held.pidfd);
        assert_eq!(spawn_and_join(&builder), held.base);
    });
}

/// More threads stand in exit than the cache looks at in one call: none is handed out, and none of them keeps
/// the one that is free from being found.
#[test]
fn many_held_threads_hide_no_free_stack() {
    with_warden(
        "held_in_exit::many_held_threads_hide_no_free_stack",
        |warden| {
            let cache = StackCache::new(StackCacheConfig::default());
            let builder = Builder::new().stack_cache(&cache);
            let mut held: Vec<_> = (0..40).map(|_| hold_one(warden, &builder, true)).collect();
            let bases: Vec<_> = held.iter().map(|held| held.base).collect();
            let misses = cache.stats().misses;
            assert_eq!(misses, 40);
            let free = held.remove(17);
            warden.release(free.tid);
            wait_for_end(&free.pidfd);
            // Each call looks at a few, in turn.
            for _ in 0..20 {
                let base = spawn_and_join(&builder);
                assert!(base == free.base || !bases.contains(&base), "handed out");
            }
            assert_eq!(cache.stats().cached_stacks, 2, "never found");
            let found = burst(&builder, 3).into_iter().map(|stack| stack.base);
            let found: Vec<_> = found.filter(|base| bases.contains(base)).collect();
            assert_eq!(found, [free.base], "never handed out, or others were");
            cache.clear();
            assert_eq!(cache.stats().mapped_stacks, 39);
            for held in &held {
                assert!(is_mapped(held.base), "unmapped under its thread");
                warden.release(held.tid);
                wait_for_end(&held.pidfd);
            }
            cache.clear();
            assert_eq!(cache.stats().mapped_stacks, 0);
        },
    );
}
