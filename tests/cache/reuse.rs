//! What a thread leaves behind must reach neither the next thread on its stack nor a second owner.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use nptl::{Builder, StackCache, StackCacheConfig, Step};
use support::{case, child, deny, is_mapped, report};

/// A spawn owns a stack from the moment it leaves the cache. `trim` looks for stacks whose detached threads
/// died without giving them back; one that an earlier detached thread gave back properly is none of those.
#[test]
fn trim_takes_no_stack_from_a_spawn() {
    if case().is_none() {
        let output = child("reuse::trim_takes_no_stack_from_a_spawn", "run")
            .run()
            .unwrap()
            .success();
        assert_eq!(output.get("ran"), Some("60000"));
        return;
    }
    static STOP: AtomicBool = AtomicBool::new(false);
    static RAN: AtomicUsize = AtomicUsize::new(0);
    std::thread::scope(|s| {
        let spawners: Vec<_> = (0..3)
            .map(|_| {
                s.spawn(|| {
                    for _ in 0..20_000 {
                        nptl::spawn(|| RAN.fetch_add(1, Ordering::Relaxed))
                            .unwrap()
                            .detach();
                    }
                })
            })
            .collect();
        s.spawn(|| {
            while !STOP.load(Ordering::Relaxed) {
                StackCache::global().trim(usize::MAX);
            }
        });
        for spawner in spawners {
            spawner.join().unwrap();
        }
        STOP.store(true, Ordering::Relaxed);
    });
    while StackCache::global().stats().live_stacks > 0 {
        std::thread::yield_now();
        StackCache::global().trim(usize::MAX);
    }
    report("ran", RAN.load(Ordering::Relaxed));
}

/// The last frames of a thread lie in the remainder that its exit keeps.
#[test]
fn a_cache_that_keeps_nothing_resident_keeps_the_last_frames() {
    if case().is_none() {
        child(
            "reuse::a_cache_that_keeps_nothing_resident_keeps_the_last_frames",
            "run",
        )
        .run()
        .unwrap()
        .success();
        return;
    }
    let cache = StackCache::new(StackCacheConfig::default().keep_resident(0));
    for round in 0..100 {
        let thread = Builder::new().stack_cache(&cache).spawn(move || round);
        assert_eq!(thread.unwrap().join().unwrap(), round);
    }
}

/// A private cache ends with its last handle, and a refused spawn holds none.
#[test]
fn a_refused_spawn_does_not_keep_its_cache_alive() {
    if case().is_none() {
        let output = child(
            "reuse::a_refused_spawn_does_not_keep_its_cache_alive",
            "run",
        )
        .run()
        .unwrap()
        .success();
        assert_eq!(output.get("mapped"), Some("true false"));
        return;
    }
    let cache = StackCache::new(StackCacheConfig::default());
    let builder = Builder::new().stack_cache(&cache);
    let thread = builder.clone().spawn(|| ()).unwrap();
    let base = thread.stack().base;
    thread.join().unwrap();
    deny(libc::SYS_mlock, libc::EPERM).install();
    let error = builder
        .clone()
        .lock_stack(true)
        .spawn(|| ())
        .map(drop)
        .unwrap_err();
    assert_eq!(error.step(), Step::PrepareStack);
    let before = is_mapped(base);
    drop((builder, cache));
    report("mapped", format_args!("{before} {}", is_mapped(base)));
}

static FIRST: AtomicU32 = AtomicU32::new(0);
static SECOND: AtomicU32 = AtomicU32::new(0);
static RUNS: AtomicUsize = AtomicUsize::new(0);

fn key(destructor: Option<unsafe extern "C" fn(*mut libc::c_void)>) -> u32 {
    let mut key = 0;
    // SAFETY: the destructors are functions of this program.
    let answer = unsafe { libc::pthread_key_create(&raw mut key, destructor) };
    assert_eq!(answer, 0);
    key
}

struct SetsAKey;

impl Drop for SetsAKey {
    fn drop(&mut self) {
        RUNS.fetch_add(1, Ordering::Relaxed);
        let key = SECOND.load(Ordering::Relaxed);
        // SAFETY: a key of this program.
        unsafe { libc::pthread_setspecific(key, 0x77 as *const libc::c_void) };
    }
}

thread_local! {
    static LATE: SetsAKey = const { SetsAKey };
    static COUNT: Cell<usize> = const { Cell::new(0) };
}

/// Touches a thread-local for the first time, and so registers its destructor, among the last things.
unsafe extern "C" fn touches_a_thread_local(_: *mut libc::c_void) {
    LATE.with(|_| ());
}

/// The destructor of a key registers a thread-local, whose destructor sets another key: the next thread on
/// the block sees neither.
#[test]
fn late_values_of_keys_do_not_reach_the_next_thread() {
    FIRST.store(key(Some(touches_a_thread_local)), Ordering::Relaxed);
    SECOND.store(key(None), Ordering::Relaxed);
    let cache = StackCache::new(StackCacheConfig::default());
    let builder = Builder::new().stack_cache(&cache);
    for round in 1..=3 {
        let thread = builder.clone().spawn(|| {
            let (first, second) = (
                FIRST.load(Ordering::Relaxed),
                SECOND.load(Ordering::Relaxed),
            );
            // SAFETY: keys of this program.
            let found = unsafe { libc::pthread_getspecific(second) };
            COUNT.set(COUNT.get() + 1);
            // SAFETY: as above.
            unsafe { libc::pthread_setspecific(first, std::ptr::dangling()) };
            (found as usize, COUNT.get())
        });
        assert_eq!(thread.unwrap().join().unwrap(), (0, 1));
        assert_eq!(RUNS.load(Ordering::Relaxed), round);
    }
    assert_eq!(cache.stats().misses, 1);
}
