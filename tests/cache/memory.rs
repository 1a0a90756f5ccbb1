//! What trim, clear and a disabled cache give back, and that no heap is lost on the way.

use std::ffi::{CStr, CString, c_char};
use std::hint::black_box;

use nptl::{Builder, StackCache, StackCacheConfig, StackInfo};
use support::{
    alone, burst, burst_of, case, child, is_mapped, malloc_in_use, or_skip, private, report,
    resident_pages, short_or_long, touch_stack,
};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// Resident bytes of the process, from its page tables: statm lags behind by a batch for each processor.
fn resident() -> usize {
    let smaps = std::fs::read_to_string("/proc/self/smaps_rollup").expect("smaps_rollup");
    let kib = smaps.lines().find_map(|line| line.strip_prefix("Rss:"));
    let kib = kib
        .and_then(|line| line.trim().strip_suffix(" kB"))
        .expect("Rss");
    kib.trim().parse::<usize>().expect("a number") * KIB
}

/// As `burst`, with threads that use so much of their stacks.
fn deep_burst(builder: &Builder, count: usize, bytes: usize) -> Vec<StackInfo> {
    burst_of(builder, count, move |all| {
        touch_stack(bytes);
        all.wait();
    })
}

/// What a VMM does under memory pressure: the bytes come back to the kernel, not only out of the accounts.
#[test]
fn trim_gives_memory_back() {
    alone("memory::trim_gives_memory_back", || {
        const KEEP: usize = 512 * KIB;
        let config = StackCacheConfig::default().keep_resident(KEEP);
        let (cache, builder) = private(config.resident_budget(1 << 30));
        let builder = builder.stack_size(2 * MIB);
        // The heap of the test's own threads and buffers.
        deep_burst(&builder, 64, KEEP);
        cache.clear();
        let before = resident();

        deep_burst(&builder, 64, KEEP);
        let full = resident();
        let used = full - before;
        assert!(
            used > 64 * (KEEP - 16 * KIB),
            "{used} bytes: nothing was kept"
        );
        assert!(
            used <= cache.stats().cached_resident_bytes + 64 * KIB,
            "{used}"
        );
        assert_eq!(cache.stats().cached_stacks, 64);

        // Half of it.
        let half = cache.stats().cached_resident_bytes / 2;
        cache.trim(half);
        let stats = cache.stats();
        assert!(stats.cached_resident_bytes <= half);
        assert_eq!(stats.cached_stacks, 32);
        let freed = full - resident();
        assert!(freed > 31 * (KEEP - 16 * KIB), "{freed} bytes are back");

        // All of it.
        cache.trim(0);
        assert_eq!(cache.stats().mapped_stacks, 0);
        assert_eq!(cache.stats().evictions, 128);
        let left = resident().saturating_sub(before);
        assert!(left < MIB, "{left} bytes are left of {used}");
        report(
            "figures",
            format_args!("{used} bytes, {left} after trim(0)"),
        );
    });
}

/// What a thread used beyond the remainder goes at its end.
#[test]
fn a_cached_stack_keeps_the_remainder_only() {
    alone("memory::a_cached_stack_keeps_the_remainder_only", || {
        for keep in [0, 32 * KIB, 256 * KIB] {
            let (cache, builder) = private(StackCacheConfig::default().keep_resident(keep));
            let builder = builder.stack_size(2 * MIB);
            for stack in deep_burst(&builder, 8, MIB) {
                let pages = resident_pages(stack.base, stack.size).expect("cached");
                assert!(pages * 4096 <= keep.max(4096), "{pages} pages of {keep}");
            }
            assert_eq!(cache.stats().cached_stacks, 8);
        }
    });
}

#[test]
fn the_coldest_goes_first() {
    alone("memory::the_coldest_goes_first", || {
        let (cache, builder) = private(StackCacheConfig::default());
        // Two classes: age goes across them.
        let large = burst(&builder.clone().stack_size(256 * KIB), 3);
        let small = burst(&builder.clone().stack_size(64 * KIB), 3);
        let warm = burst(&builder.clone().stack_size(256 * KIB), 1);
        assert_eq!(
            warm[0].base, large[2].base,
            "the warmest of its class is reused"
        );
        let by_age = [large[0], large[1], small[0], small[1], small[2], warm[0]];
        let each = cache.stats().cached_resident_bytes / 6;
        for gone in 0..=6 {
            cache.trim((6 - gone) * each);
            let mapped = by_age.map(|stack| is_mapped(stack.base));
            let expected: [bool; 6] = std::array::from_fn(|at| at >= gone);
            assert_eq!(mapped, expected, "after {gone}");
        }
        // The same by the budget, while stacks come back.
        const BUDGET: usize = 100 * KIB;
        cache.set_config(StackCacheConfig::default().resident_budget(BUDGET));
        let stacks = burst(&builder.stack_size(64 * KIB), 20);
        let gone = 20 - cache.stats().cached_stacks;
        let mapped: Vec<_> = stacks.iter().map(|stack| is_mapped(stack.base)).collect();
        let expected = [vec![false; gone], vec![true; 20 - gone]].concat();
        assert_eq!(mapped, expected);
        assert!(gone > 0 && cache.stats().cached_resident_bytes <= BUDGET);
    });
}

/// Resident bytes of the process's mappings that hold these stacks.
fn resident_of(cache: &StackCache, stacks: &[StackInfo]) -> usize {
    let each = cache.stats().cached_virtual_bytes / cache.stats().cached_stacks;
    let cached = stacks.iter().filter(|stack| is_mapped(stack.base));
    let pages = cached.map(|stack| {
        let start = stack.base - stack.guard_size;
        resident_pages(start, each).expect("all of it is mapped")
    });
    pages.sum::<usize>() * 4096
}

/// A stack whose thread did nothing has some 10 KiB, where 57 can be resident. What the budget really holds stays.
#[test]
fn the_budget_is_filled_with_what_is_resident() {
    alone("memory::the_budget_is_filled_with_what_is_resident", || {
        for (budget, count, most_spare) in [(MIB, 300, 64 * KIB), (64 * MIB, 12_000, 2 * MIB)] {
            let config = StackCacheConfig::default().resident_budget(budget);
            let (cache, builder) = private(config);
            let builder = builder.stack_size(64 * KIB);
            let stacks = burst(&builder, count);
            let stats = cache.stats();
            let resident = resident_of(&cache, &stacks);
            let figures = format!("{stats:?}, {resident} bytes are resident");
            report("figures", &figures);
            assert!(stats.cached_resident_bytes <= budget, "{figures}");
            assert!(resident <= stats.cached_resident_bytes, "{figures}");
            assert!(resident + most_spare >= budget, "{figures}");
            // Most are there for the next burst.
            let before = stats.hits;
            burst(&builder, count);
            let hits = (cache.stats().hits - before) as usize;
            assert!(hits >= stats.cached_stacks, "{hits} hits, {figures}");
            cache.clear();
            assert_eq!(cache.stats().mapped_stacks, 0);
        }
    });
}

/// Of memory that is used, nothing is uncounted: a stack that was measured small and then used counts with its bound.
#[test]
fn a_measured_stack_that_is_used_again_counts_in_full() {
    alone(
        "memory::a_measured_stack_that_is_used_again_counts_in_full",
        || {
            const KEEP: usize = 256 * KIB;
            const BUDGET: usize = 2 * MIB;
            let config = StackCacheConfig::default().keep_resident(KEEP);
            let (cache, builder) = private(config.resident_budget(BUDGET));
            let builder = builder.stack_size(MIB);
            burst(&builder, 40);
            let small = cache.stats().cached_stacks;
            assert_eq!(small, 40, "each has a few pages");
            let stacks = deep_burst(&builder, 40, KEEP);
            let stats = cache.stats();
            let resident = resident_of(&cache, &stacks);
            assert!(resident <= BUDGET, "{resident} of {BUDGET}");
            assert!(resident <= stats.cached_resident_bytes);
            assert!(stats.cached_stacks < 9, "{stats:?}");
        },
    );
}

#[test]
fn a_disabled_cache_keeps_nothing() {
    alone("memory::a_disabled_cache_keeps_nothing", || {
        let (cache, builder) = private(StackCacheConfig::disabled());
        for round in 1..=3 {
            let stacks = burst(&builder, 20);
            assert!(!stacks.iter().any(|stack| is_mapped(stack.base)));
            let stats = cache.stats();
            let counts = (stats.hits, stats.misses, stats.evictions);
            assert_eq!(counts, (0, 20 * round, 0));
            assert_eq!((stats.mapped_stacks, stats.mapped_virtual_bytes), (0, 0));
        }
    });
}

/// Leaves a full heap cache with the block that it lies in.
fn allocate() {
    for size in (8..=1032).step_by(64) {
        black_box([(); 7].map(|()| Vec::<u8>::with_capacity(size)));
    }
}

fn allocating_burst(builder: &Builder, count: usize) {
    burst_of(builder, count, |all| {
        allocate();
        all.wait();
    });
}

/// Stacks come and go in every way; the heap caches of their threads are handed on, not lost. One is more
/// than 10 kB here, and 2,000 threads would lose 20 MB.
#[test]
fn no_heap_is_lost_however_stacks_come_and_go() {
    type Cycle = fn(usize);
    const BURST: usize = 20;
    const SIZES: [usize; 4] = [64 * KIB, 128 * KIB, 256 * KIB, MIB];
    let cycles: [(&str, Cycle); 6] = [
        ("cleared", |round| {
            let builder = Builder::new().stack_size(SIZES[round % 4]);
            allocating_burst(&builder, BURST);
            StackCache::global().clear();
        }),
        ("trimmed by half", |round| {
            let builder = Builder::new().stack_size(SIZES[round % 4]);
            allocating_burst(&builder, BURST);
            let cached = StackCache::global().stats().cached_resident_bytes;
            StackCache::global().trim(cached / 2);
        }),
        ("over budget", |round| {
            let config = StackCacheConfig::default().resident_budget(400 * KIB);
            StackCache::global().set_config(config);
            allocating_burst(&Builder::new().stack_size(SIZES[round % 4]), BURST);
        }),
        ("of private caches", |round| {
            let config = StackCacheConfig::default().zeroed(round % 3 == 0);
            let (cache, builder) = private(config);
            allocating_burst(&builder.stack_size(SIZES[round % 4]), BURST);
            drop(cache);
        }),
        ("not cached", |round| {
            let (_cache, builder) = private(StackCacheConfig::disabled());
            allocating_burst(&builder.stack_size(SIZES[round % 4]), BURST);
        }),
        ("detached", |round| {
            let (cache, builder) = private(StackCacheConfig::default());
            for _ in 0..BURST {
                let builder = builder.clone().stack_size(SIZES[round % 4]);
                builder.spawn(allocate).expect("a thread").detach();
            }
            if round % 2 == 0 {
                cache.clear();
            }
            drop((cache, builder));
            // Each thread that still runs has a handle of the private cache; the last one hands it over. Rounds
            // that overlap would have more heap caches than one.
            while std::fs::read_dir("/proc/self/task").expect("tasks").count() > 2 {
                std::thread::yield_now();
            }
            // A directory that changes while it is read can leave out a thread that lives. A stack that is
            // lost keeps this from ending.
            while StackCache::global().stats().mapped_stacks > 0 {
                StackCache::global().clear();
                std::thread::yield_now();
            }
        }),
    ];
    if let Some(name) = case() {
        let (_, cycle) = cycles.iter().find(|cycle| cycle.0 == name).expect("a case");
        // More threads at once than later: each record carries one heap cache from then on.
        allocating_burst(&Builder::new().stack_size(2 * MIB), 3 * BURST);
        (0..100).for_each(cycle);
        // Caches that are kept for the next threads are more or fewer by chance; what is lost stays.
        let settled = || {
            StackCache::global().clear();
            malloc_in_use()
        };
        let before = settled();
        (0..short_or_long(100, 400)).for_each(cycle);
        report("growth", settled() - before);
        return;
    }
    for (name, _) in cycles {
        let output = child("memory::no_heap_is_lost_however_stacks_come_and_go", name).run();
        let output = or_skip!(output).success();
        let growth: i64 = output
            .get("growth")
            .expect("a number")
            .parse()
            .expect("one");
        println!("{name}: {growth:+} bytes");
        // 2,000 threads: one lost heap cache in 300 would be 64 kB.
        assert!(
            growth < 64 << 10,
            "{name}: malloc has given out {growth} bytes more"
        );
    }
}

/// Threads that freed as much as malloc keeps for one: seven blocks of each size up to 1 KiB.
fn heap_burst(builder: &Builder, count: usize) {
    burst_of(builder, count, |all| {
        all.wait();
        for size in (24..=1032).step_by(16) {
            let mut blocks = [(); 7].map(|()| vec![1_u8; size]);
            black_box(&mut blocks);
        }
        // All have allocated before the first ends.
        all.wait();
    });
}

/// What malloc keeps for ended threads goes with their stacks, to malloc and from there to the kernel.
#[test]
fn trim_and_clear_give_back_what_malloc_keeps() {
    alone("memory::trim_and_clear_give_back_what_malloc_keeps", || {
        const THREADS: usize = 200;
        let (cache, builder) = private(StackCacheConfig::default());
        // Arenas, and the test's own lists.
        heap_burst(&builder, THREADS);
        cache.clear();
        let give_back: [(&str, &dyn Fn()); 3] = [
            ("trim(0)", &|| cache.trim(0)),
            ("clear", &|| cache.clear()),
            ("trim after the cache has gone", &|| {
                let (other, builder) = private(StackCacheConfig::default());
                heap_burst(&builder, THREADS);
                drop((other, builder));
                StackCache::global().trim(0);
                cache.trim(0);
            }),
        ];
        let (heap, memory) = (malloc_in_use(), resident());
        for (name, give_back) in give_back {
            heap_burst(&builder, THREADS);
            let kept = malloc_in_use() - heap;
            assert!(kept > 200 * 100_000, "{name}: {kept} bytes are kept");
            give_back();
            let left = malloc_in_use() - heap;
            let resident = resident().saturating_sub(memory);
            report(
                "figures",
                format_args!("{name}: {kept} kept, {left} left, {resident} resident"),
            );
            assert!(left < 200_000, "{name}: {left} bytes of {kept} are left");
            assert!(resident < 4 * MIB, "{name}: {resident} bytes are resident");
        }
        // And it works on, with full caches as before.
        heap_burst(&builder, THREADS);
        assert_eq!(cache.stats().cached_stacks, THREADS);
    });
}

/// Where no thread can be created the heap caches stay, and serve later threads or go with a later call.
#[test]
fn trim_returns_where_no_thread_can_be_created() {
    alone(
        "memory::trim_returns_where_no_thread_can_be_created",
        || {
            const THREADS: usize = 20;
            let (cache, builder) = private(StackCacheConfig::default());
            heap_burst(&builder, THREADS);
            cache.clear();
            let heap = malloc_in_use();
            heap_burst(&builder, THREADS);
            or_skip!(support::become_unused_user());
            let limit_tasks = |soft: fn(libc::rlim_t) -> libc::rlim_t| {
                let mut limit = libc::rlimit {
                    rlim_cur: 0,
                    rlim_max: 0,
                };
                // SAFETY: a place for one limit, read and written.
                unsafe {
                    assert_eq!(libc::getrlimit(libc::RLIMIT_NPROC, &raw mut limit), 0);
                    limit.rlim_cur = soft(limit.rlim_max);
                    assert_eq!(libc::setrlimit(libc::RLIMIT_NPROC, &raw const limit), 0);
                }
            };
            limit_tasks(|_| 0);
            let kept = malloc_in_use() - heap;
            cache.trim(0);
            cache.clear();
            assert_eq!(cache.stats().mapped_stacks, 0);
            let left = malloc_in_use() - heap;
            assert!(left > kept / 2, "{left} bytes of {kept}: freed by whom?");
            limit_tasks(|most| most);
            builder.spawn(|| ()).unwrap().join().unwrap();
            cache.clear();
            let left = malloc_in_use() - heap;
            assert!(left < 200_000, "{left} bytes of {kept}");
        },
    );
}

/// A catalogue of gettext's with one translation.
fn catalogue(original: &str, translation: &str) -> Vec<u8> {
    const TABLES: usize = 28;
    const TEXTS: usize = TABLES + 2 * 16;
    let header = "Content-Type: text/plain; charset=UTF-8\n";
    let mut texts = Vec::new();
    let mut tables = Vec::new();
    for text in ["", original, header, translation] {
        tables.extend([text.len(), TEXTS + texts.len()]);
        texts.extend(text.bytes().chain([0]));
    }
    let head = [0x9504_12de, 0, 2, TABLES, TABLES + 16, 0, TEXTS];
    let words = head.into_iter().chain(tables);
    let words = words.flat_map(|word| u32::to_ne_bytes(word.try_into().expect("a word")));
    words.chain(texts).collect()
}

/// glibc keeps a thread's last text of strsignal(3) for it. In Chinese it is shorter than two words of memory, and
/// an allocator can give it just that, as glibc's own does that checks for what is written beyond.
#[test]
fn a_short_text_of_strsignal_is_not_overwritten() {
    unsafe extern "C" {
        fn bindtextdomain(domain: *const c_char, folder: *const c_char) -> *mut c_char;
        fn strsignal(signal: libc::c_int) -> *const c_char;
    }
    let test = "memory::a_short_text_of_strsignal_is_not_overwritten";
    if let Some(folder) = case() {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("our maps");
        report("checked", maps.contains("libc_malloc_debug"));
        let folder = CString::new(folder).expect("no NUL");
        // SAFETY: valid strings; no other thread asks for locales.
        unsafe {
            libc::setlocale(libc::LC_ALL, c"".as_ptr());
            bindtextdomain(c"libc".as_ptr(), folder.as_ptr());
        }
        let cache = StackCache::new(StackCacheConfig::disabled());
        for _ in 0..3 {
            let thread = Builder::new().stack_cache(&cache).spawn(|| {
                // SAFETY: the calling thread's own buffer, or a constant.
                unsafe { CStr::from_ptr(strsignal(libc::SIGRTMIN() + 1)) }.to_owned()
            });
            let text = thread.expect("a thread").join().expect("its end");
            report("text", text.to_string_lossy());
        }
        cache.clear();
        return;
    }
    let folder = std::env::temp_dir().join(format!("nptl-catalogue-{}", std::process::id()));
    let messages = folder.join("zh_CN/LC_MESSAGES");
    std::fs::create_dir_all(&messages).expect("a folder");
    let text = catalogue("Real-time signal %d", "实时信号 %d");
    std::fs::write(messages.join("libc.mo"), text).expect("a file");
    let output = child(test, folder.to_str().expect("a name"))
        .env("LD_PRELOAD", "libc_malloc_debug.so.0")
        .env("MALLOC_CHECK_", "3")
        .env("LC_ALL", "C.UTF-8")
        .env("LANGUAGE", "zh_CN")
        .run();
    std::fs::remove_dir_all(&folder).expect("our folder");
    let output = or_skip!(output).success();
    assert_eq!(output.all("text"), ["实时信号 1"; 3], "{output}");
    assert_eq!(output.get("checked"), Some("true"), "{output}");
}

/// Threads that outlive their private cache give their stacks to the global one, which no other thread uses here. They must
/// not wait there for a call that never comes.
#[test]
fn stacks_of_dropped_caches_do_not_pile_up() {
    let test = "memory::stacks_of_dropped_caches_do_not_pile_up";
    support::alone(test, || {
        for _ in 0..100 {
            let cache = StackCache::new(StackCacheConfig::default());
            let (end, wait) = std::sync::mpsc::channel::<()>();
            let body = move || wait.recv().is_err();
            let handle = nptl::Builder::new().stack_cache(&cache).spawn(body);
            let handle = handle.expect("a thread");
            let task = format!("/proc/self/task/{}", handle.tid());
            drop(handle);
            drop(cache);
            drop(end);
            while std::path::Path::new(&task).exists() {
                std::thread::yield_now();
            }
        }
        let stats = StackCache::global().stats();
        assert!(stats.live_stacks <= 1, "{stats:?}");
    });
}
