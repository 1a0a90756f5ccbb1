//! Sixteen threads on one cache: no stack is in two hands, and nothing is left.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nptl::{Builder, StackCache, StackCacheConfig};
use support::{Snapshot, case, child, or_skip, report, short_or_long};

const SPAWNERS: usize = 16;
const SIZES: [usize; 3] = [16 << 10, 32 << 10, 64 << 10];

/// A small random number generator (xorshift): its state must not be shared between spawners.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

static CHECKED: AtomicUsize = AtomicUsize::new(0);
static WRONG: AtomicUsize = AtomicUsize::new(0);

/// The lowest usable address of the calling thread's stack, as glibc reports it.
fn lowest_address() -> usize {
    // SAFETY: the attributes are initialised by the first call, read, and destroyed.
    unsafe {
        let mut attributes: libc::pthread_attr_t = std::mem::zeroed();
        let (mut start, mut size, mut guard) = (std::ptr::null_mut(), 0, 0);
        assert_eq!(
            libc::pthread_getattr_np(libc::pthread_self(), &raw mut attributes),
            0
        );
        libc::pthread_attr_getstack(&raw const attributes, &raw mut start, &raw mut size);
        libc::pthread_attr_getguardsize(&raw const attributes, &raw mut guard);
        libc::pthread_attr_destroy(&raw mut attributes);
        start as usize + guard
    }
}

/// Stamps the stack at both ends, lets others run, and looks whether the stamps are still there.
fn stamp_and_check(id: u64, yields: u64) {
    let low = lowest_address() as *mut u64;
    let mut high = [id; 16];
    let high = (&raw mut high).cast::<u64>();
    // SAFETY: the lowest words of this thread's stack, which its frames do not reach, and a local array.
    let intact = unsafe {
        for at in 0..16 {
            low.add(at).write_volatile(id);
            high.add(at).write_volatile(id);
        }
        for _ in 0..yields {
            std::thread::yield_now();
        }
        (0..16).all(|at| low.add(at).read_volatile() == id && high.add(at).read_volatile() == id)
    };
    CHECKED.fetch_add(1, Ordering::Relaxed);
    if !intact {
        WRONG.fetch_add(1, Ordering::Relaxed);
    }
}

fn spawner(seed: u64, builder: &Builder, stop: &AtomicBool) {
    static ID: AtomicU64 = AtomicU64::new(1);
    let mut random = Random(seed);
    let mut handles = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let (id, yields) = (ID.fetch_add(1, Ordering::Relaxed), random.below(4));
        let size = SIZES[random.below(3) as usize];
        let handle = builder.clone().stack_size(size);
        let handle = handle
            .spawn(move || stamp_and_check(id, yields))
            .expect("a thread");
        match random.below(4) {
            0 => handle.detach(),
            // Some live on, and are joined in any order.
            1 if handles.len() < 8 => handles.push(handle),
            2 if !handles.is_empty() => {
                let other = handles.swap_remove(random.below(handles.len() as u64) as usize);
                other.join().expect("its end");
                handle.join().expect("its end");
            }
            _ => handle.join().expect("its end"),
        }
    }
    for handle in handles {
        handle.join().expect("its end");
    }
}

/// What a program does to its cache now and then.
fn disturber(cache: &StackCache, stop: &AtomicBool) {
    let mut random = Random(0x5eed);
    let small = StackCacheConfig::default().resident_budget(300 << 10);
    while !stop.load(Ordering::Relaxed) {
        match random.below(6) {
            0 => cache.clear(),
            1 => cache.trim(random.below(1 << 20) as usize),
            2 => cache.set_config(small),
            3 => cache.set_config(StackCacheConfig::default()),
            4 => cache.set_config(small.zeroed(true)),
            _ => cache.trim(usize::MAX),
        }
        let stats = cache.stats();
        assert_eq!(stats.mapped_stacks, stats.live_stacks + stats.cached_stacks);
        std::thread::sleep(Duration::from_micros(random.below(2000)));
    }
}

/// Until so many threads more have looked at their stamps.
fn run(cache: &StackCache, threads: usize) {
    let stop = &AtomicBool::new(false);
    let builder = &Builder::new().stack_cache(cache);
    std::thread::scope(|scope| {
        scope.spawn(|| disturber(cache, stop));
        for seed in 1..=SPAWNERS as u64 {
            scope.spawn(move || spawner(seed << 32 | seed, builder, stop));
        }
        let enough = CHECKED.load(Ordering::Relaxed) + threads;
        while CHECKED.load(Ordering::Relaxed) < enough {
            std::thread::sleep(Duration::from_millis(10));
        }
        stop.store(true, Ordering::Relaxed);
    });
    // Detached threads, and the spawners themselves, need a moment to be gone.
    let deadline = Instant::now() + Duration::from_secs(60);
    while cache.stats().live_stacks > 0 {
        assert!(Instant::now() < deadline, "{:?}", cache.stats());
        cache.trim(usize::MAX);
        std::thread::yield_now();
    }
    cache.clear();
}

#[test]
fn no_stack_is_in_two_hands_and_nothing_is_left() {
    if case().is_some() {
        let cache = StackCache::new(StackCacheConfig::default());
        let count = || {
            let now = Snapshot::take();
            (now.kernel_threads, now.glibc_threads)
        };
        // Those of the scopes end a little after their scope: from the kernel, and from glibc's list.
        let threads = count();
        let settle = || {
            let deadline = Instant::now() + Duration::from_secs(60);
            while count() != threads {
                assert!(Instant::now() < deadline, "threads that never end");
                std::thread::yield_now();
            }
        };
        // malloc's arenas, and the records of as many stacks as there will be.
        run(&cache, 2_000);
        settle();
        let before = Snapshot::take();
        run(&cache, short_or_long(20_000, 300_000));
        settle();
        let stats = cache.stats();
        assert_eq!(
            (stats.mapped_stacks, stats.mapped_virtual_bytes),
            (0, 0),
            "{stats:?}"
        );
        let change = before.diff(&Snapshot::take());
        report("change", &change);
        let left = (change.fds, change.kernel_threads, change.glibc_threads);
        assert_eq!(left, (0, 0, 0), "{change}");
        // The heap may have grown by a mapping.
        assert!(change.mappings <= 2, "{change}");
        report("checked", CHECKED.load(Ordering::Relaxed));
        report("hits", stats.hits);
        assert_eq!(WRONG.load(Ordering::Relaxed), 0, "stamps of another thread");
        return;
    }
    let child = child(
        "concurrent::no_stack_is_in_two_hands_and_nothing_is_left",
        "run",
    );
    let output = or_skip!(child.time_limit(Duration::from_secs(180)).run()).success();
    let number = |key| {
        output
            .get(key)
            .expect(key)
            .parse::<usize>()
            .expect("a number")
    };
    // Else nothing was tried.
    assert!(number("hits") > number("checked") / 4, "{output}");
    println!("{} threads, {} hits", number("checked"), number("hits"));
}
