//! The stack cache where address space, mappings or locked memory are short: it keeps to its share, gives
//! back what it holds before a spawn is refused, and loses nothing that the kernel does not take.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use nptl::{
    Builder, RetryPolicy, StackCache, StackCacheConfig, StackFate, StackOrigin, StackOutcome, Step,
};
use support::{
    MADV_GUARD_INSTALL, Mappings, alone, become_unused_user, burst, deny_guard_marks, is_mapped,
    or_skip, private, resident_pages, set_rlimit, supervised,
};

const MIB: usize = 1 << 20;

/// A field of /proc/self/status, in bytes.
fn status(field: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let kib = status.lines().find_map(|line| {
        let kib = line.strip_prefix(field)?.strip_suffix("kB")?;
        kib.trim().parse::<u64>().ok()
    });
    kib.expect("a size in kB") * 1024
}

/// Maps and unmaps: whether the program can have so much address space now.
fn can_map(bytes: usize) -> bool {
    // SAFETY: a new mapping that is not in use, and its end.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let start = libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0);
        start != libc::MAP_FAILED && libc::munmap(start, bytes) == 0
    }
}

/// 64 stacks of 8 MiB fit the memory of the default budget forty times over, and half of this limit.
#[test]
fn cached_stacks_keep_to_their_share_of_rlimit_as() {
    alone(
        "limits::cached_stacks_keep_to_their_share_of_rlimit_as",
        || {
            const LIMIT: usize = 1 << 30;
            let (cache, builder) = private(StackCacheConfig::default());
            let builder = builder.stack_size(8 * MIB);
            let cached = || cache.stats().cached_virtual_bytes;
            burst(&builder, 64);
            assert_eq!(cache.stats().cached_stacks, 64, "capped without a limit");
            cache.clear();

            set_rlimit(libc::RLIMIT_AS, LIMIT as u64);
            // The global cache is the second one.
            let share = LIMIT / 8 / 2;
            let room = usize::try_from(LIMIT as u64 - status("VmSize:")).unwrap() - 8 * MIB;
            let live = (room / (9 * MIB)).min(64);
            burst(&builder, live);
            assert!(
                (share - 9 * MIB..=share).contains(&cached()),
                "{}",
                cached()
            );
            assert!(can_map(room - share), "the cache hogs the address space");
            let stats = cache.stats();
            assert_eq!(stats.evictions as usize, 64 + live - stats.cached_stacks);

            // Raised: the next burst is kept.
            set_rlimit(libc::RLIMIT_AS, libc::RLIM_INFINITY);
            burst(&builder, 64);
            assert_eq!(cache.stats().cached_stacks, 64);

            // Lowered again, while the cache is full: the next thread that maps makes it fit, in every cache.
            set_rlimit(libc::RLIMIT_AS, LIMIT as u64);
            assert!(cached() > share);
            Builder::new().spawn(|| ()).unwrap().join().unwrap();
            assert!(cached() <= share, "{} after a miss elsewhere", cached());

            // And without any mapping being made: at the latest after sixteen reuses of a stack.
            set_rlimit(libc::RLIMIT_AS, libc::RLIM_INFINITY);
            burst(&builder, 64);
            let misses = cache.stats().misses;
            set_rlimit(libc::RLIMIT_AS, LIMIT as u64);
            for _ in 0..16 {
                builder.clone().spawn(|| ()).unwrap().join().unwrap();
            }
            assert_eq!(cache.stats().misses, misses);
            assert!(cached() <= share, "{} after sixteen hits", cached());

            // A stack above the share is never kept.
            let huge = builder.clone().stack_size(share);
            let base = burst(&huge, 1)[0].base;
            assert!(!is_mapped(base));
            assert_eq!(cache.stats().live_stacks, 0);
        },
    );
}

/// However many caches there are, together they keep no more than one alone.
#[test]
fn caches_share_the_share() {
    alone("limits::caches_share_the_share", || {
        const LIMIT: usize = 2 << 30;
        set_rlimit(libc::RLIMIT_AS, LIMIT as u64);
        let mut caches = Vec::new();
        let mut sum_of_all = 0;
        // Each new one finds the others full.
        for number in 2..=8 {
            let (cache, builder) = private(StackCacheConfig::default());
            caches.push((cache, builder.stack_size(4 * MIB)));
            for (cache, builder) in &caches {
                burst(builder, 80);
                let cached = cache.stats().cached_virtual_bytes;
                assert!(cached <= LIMIT / 8 / number, "{cached} of {number} caches");
            }
            let cached = |(cache, _): &(StackCache, _)| cache.stats().cached_virtual_bytes;
            sum_of_all = caches.iter().map(cached).sum::<usize>();
            assert!(sum_of_all <= LIMIT / 8, "{sum_of_all}");
        }
        assert!(sum_of_all >= LIMIT / 16, "{sum_of_all}: nothing is kept");
        // The parts of caches that have gone are free again.
        let (cache, builder) = caches.swap_remove(0);
        drop(caches);
        burst(&builder, 80);
        let cached = cache.stats().cached_virtual_bytes;
        assert!(
            (LIMIT / 8 / 3..=LIMIT / 8 / 2).contains(&cached),
            "{cached}"
        );
    });
}

/// Whether this kernel has `MADV_GUARD_INSTALL` (6.13).
fn has_guard_marks() -> bool {
    const MADV_GUARD_INSTALL: libc::c_int = 102;
    // SAFETY: a page of our own, unmapped again.
    unsafe {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let page = libc::mmap(std::ptr::null_mut(), 4096, access, flags, -1, 0);
        assert_ne!(page, libc::MAP_FAILED);
        let marked = libc::madvise(page, 4096, MADV_GUARD_INSTALL) == 0;
        libc::munmap(page, 4096);
        marked
    }
}

/// With guards that are mappings, stacks are counted as well: four mappings each of the process's number.
#[test]
fn stacks_with_protected_guards_keep_to_their_share_of_max_map_count() {
    const NAME: &str = "limits::stacks_with_protected_guards_keep_to_their_share_of_max_map_count";
    alone(NAME, || {
        let maximum = std::fs::read_to_string("/proc/sys/vm/max_map_count").expect("a number");
        let maximum: usize = maximum.trim().parse().expect("a number");
        // So many caches that a share is small.
        const CACHES: usize = 80;
        let share = maximum / 16 / CACHES;
        if share > 500 {
            support::skip!("vm.max_map_count is {maximum}: that takes too many threads");
        }
        let all: Vec<_> = (1..CACHES)
            .map(|_| private(StackCacheConfig::default().keep_resident(0)))
            .collect();
        let (cache, builder) = &all[0];
        let builder = builder.clone().stack_size(16 << 10);
        if has_guard_marks() {
            burst(&builder, share + 50);
            assert_eq!(cache.stats().cached_stacks, share + 50, "markers are free");
            cache.clear();
        }
        deny_guard_marks(libc::EINVAL);
        // The first one shows what guards cost.
        burst(&builder, 1);
        cache.clear();
        burst(&builder, share + 50);
        assert_eq!(cache.stats().cached_stacks, share);
        assert_eq!(cache.stats().live_stacks, 0);
    });
}

/// The guard's mprotect splits a mapping, so it can be refused where the mmap was not.
#[test]
fn stacks_are_given_back_before_a_guard_is_refused() {
    alone(
        "limits::stacks_are_given_back_before_a_guard_is_refused",
        || {
            deny_guard_marks(libc::EINVAL);
            let (other, builder) = private(StackCacheConfig::default());
            let builder = builder.stack_size(64 << 10);
            let (cache, wanted) = private(StackCacheConfig::default());
            let wanted = wanted.stack_size(256 << 10);
            burst(&wanted, 1);
            cache.clear();
            burst(&builder, 5);
            let _ballast = Mappings::fill_but(1);
            // Five stacks are up to twenty mappings.
            let handle = wanted.clone().spawn(|| 7);
            assert_eq!(handle.expect("made room").join().expect("its end"), 7);
            assert_eq!(other.stats().mapped_stacks, 0);
            assert_eq!(cache.stats().mapped_stacks, 1);

            // With nothing to give back there is no second attempt.
            cache.clear();
            let _more = Mappings::fill_but(1);
            let error = wanted.spawn(|| ()).expect_err("the table is full");
            let got = (error.step(), error.errno().raw(), error.attempts());
            assert_eq!(got, (Step::GuardStack, libc::ENOMEM, 1), "{error}");
            assert_eq!(error.stack().fate, StackFate::Unmapped, "{error}");
            assert_eq!(cache.stats().mapped_stacks, 0);
        },
    );
}

/// Where not even munmap is granted, because another thread took the last mapping: the stack without a guard
/// is accounted for, is never handed out, and goes with the next call that unmaps.
#[test]
fn a_stack_without_a_guard_that_cannot_go_is_not_lost() {
    const NAME: &str = "limits::a_stack_without_a_guard_that_cannot_go_is_not_lost";
    alone(NAME, || {
        let (guards, unmaps) = (&AtomicBool::new(false), &AtomicUsize::new(0));
        let result = supervised(
            &[libc::SYS_madvise, libc::SYS_mprotect, libc::SYS_munmap],
            |call| {
                let refused = match call.number {
                    _ if call.advises(MADV_GUARD_INSTALL) => {
                        guards.load(Ordering::Acquire).then_some(libc::EINVAL)
                    }
                    libc::SYS_mprotect => guards.load(Ordering::Acquire).then_some(libc::ENOMEM),
                    _ => None,
                };
                if call.number == libc::SYS_munmap && guards.load(Ordering::Acquire) {
                    unmaps.fetch_add(1, Ordering::AcqRel);
                    return Some(libc::ENOMEM);
                }
                refused
            },
            || {
                let (cache, builder) = private(StackCacheConfig::default());
                builder.clone().spawn(|| ()).unwrap().join().unwrap();
                cache.clear();
                guards.store(true, Ordering::Release);
                let error = builder.clone().spawn(|| ()).expect_err("no guard");
                guards.store(false, Ordering::Release);
                assert!(unmaps.load(Ordering::Acquire) > 0);
                let kept = StackOutcome {
                    origin: StackOrigin::Fresh,
                    fate: StackFate::Cached,
                };
                assert_eq!((error.step(), error.stack()), (Step::GuardStack, kept));
                let stats = cache.stats();
                let counts = (stats.mapped_stacks, stats.live_stacks, stats.cached_stacks);
                assert_eq!(counts, (1, 1, 0));
                // It is never handed out: the next thread gets another one, with a guard.
                let misses = stats.misses;
                let handle = builder.spawn(|| ()).expect("a thread");
                assert_eq!(cache.stats().misses, misses + 1);
                handle.join().expect("its end");
                assert_eq!(cache.stats().mapped_stacks, 1, "gone with the next give");
            },
        );
        or_skip!(result);
    });
}

/// Three stacks side by side are one mapping. At the limit the one in the middle cannot be unmapped.
#[test]
fn a_stack_that_munmap_would_split_gives_up_its_memory_only() {
    const NAME: &str = "limits::a_stack_that_munmap_would_split_gives_up_its_memory_only";
    alone(NAME, || {
        let (cache, builder) = private(StackCacheConfig::default());
        let builder = builder.stack_size(64 << 10).guard_size(0);
        let gates: Vec<_> = (0..12).map(|_| std::sync::mpsc::channel::<()>()).collect();
        let mut threads: Vec<_> = gates
            .into_iter()
            .map(|(open, wait)| {
                let body = move || {
                    std::hint::black_box([1_u8; 20 << 10]);
                    wait.recv().is_err()
                };
                let handle = builder.clone().spawn(body).expect("a thread");
                (handle.stack().base, open, handle)
            })
            .collect();
        threads.sort_by_key(|thread| thread.0);
        let distance = threads[1].0 - threads[0].0;
        let adjacent = |at: usize| {
            threads[at].0 - threads[at - 1].0 == distance
                && threads[at + 1].0 - threads[at].0 == distance
        };
        let middle = (1..threads.len() - 1).find(|&at| adjacent(at));
        let Some(middle) = middle else {
            support::skip!("the kernel places no three stacks side by side");
        };
        let (base, open, handle) = threads.remove(middle);
        drop(open);
        assert!(handle.join().expect("its end"));
        assert_eq!(cache.stats().cached_stacks, 1);
        assert!(resident_pages(base, 64 << 10).expect("mapped") > 0);

        let ballast = Mappings::fill_but(0);
        for _ in 0..3 {
            cache.trim(0);
            assert!(is_mapped(base), "munmap needs a mapping that is not there");
            let stats = cache.stats();
            let counts = (stats.mapped_stacks, stats.cached_stacks, stats.evictions);
            assert_eq!(counts, (12, 1, 0));
            assert_eq!(resident_pages(base, distance), Some(0), "its memory");
        }
        // It can still be had, as good as new.
        let handle = builder.clone().spawn(|| {
            let block = std::hint::black_box(vec![1_u8; 50_000]);
            block.iter().map(|&byte| usize::from(byte)).sum::<usize>()
        });
        let handle = handle.expect("a cached stack needs no mapping");
        assert_eq!(handle.stack().base, base);
        assert_eq!(handle.join().expect("its end"), 50_000);
        drop(ballast);
        cache.trim(0);
        assert!(!is_mapped(base));
        for (_, open, handle) in threads {
            drop(open);
            assert!(handle.join().expect("its end"));
        }
        cache.clear();
        assert_eq!(cache.stats().mapped_stacks, 0);
    });
}

/// As the last, with only cached stacks: what one attempt leaves, the next one gets.
#[test]
fn everything_goes_at_the_mapping_limit_where_no_thread_is_in_between() {
    const NAME: &str = "limits::everything_goes_at_the_mapping_limit_where_no_thread_is_in_between";
    alone(NAME, || {
        let (cache, builder) = private(StackCacheConfig::default());
        let builder = builder.stack_size(64 << 10);
        let gates: Vec<_> = (0..12).map(|_| std::sync::mpsc::channel::<()>()).collect();
        let mut threads: Vec<_> = gates
            .into_iter()
            .map(|(open, wait)| {
                let handle = builder.clone().spawn(move || wait.recv().is_err());
                (open, handle.expect("a thread"))
            })
            .collect();
        let bases: Vec<_> = threads.iter().map(|(_, handle)| handle.stack()).collect();
        // The coldest, which is the first to be tried, lies in the middle.
        for at in [6, 5, 6] {
            let (open, handle) = threads.remove(at);
            drop(open);
            handle.join().expect("its end");
        }
        for (open, handle) in threads {
            drop(open);
            handle.join().expect("its end");
        }
        assert_eq!(cache.stats().cached_stacks, 12);
        let _ballast = Mappings::fill_but(0);
        cache.clear();
        assert_eq!(cache.stats().mapped_stacks, 0);
        let mapped = bases.iter().filter(|stack| is_mapped(stack.base)).count();
        assert_eq!(mapped, 0);
    });
}

/// mlockall(MCL_FUTURE): every mapping counts towards RLIMIT_MEMLOCK, cached stacks as well, and mmap says
/// EAGAIN.
#[test]
fn stacks_are_given_back_before_locked_memory_is_refused() {
    alone(
        "limits::stacks_are_given_back_before_locked_memory_is_refused",
        || {
            // The calibration, while it may still map.
            nptl::spawn(|| ()).unwrap().join().unwrap();
            StackCache::global().clear();
            or_skip!(become_unused_user());
            let (cache, builder) = private(StackCacheConfig::default());
            set_rlimit(libc::RLIMIT_MEMLOCK, 6 << 20);
            // SAFETY: changes how later mappings are locked.
            let answer = unsafe { libc::mlockall(libc::MCL_FUTURE | libc::MCL_ONFAULT) };
            assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
            burst(&builder.clone().stack_size(MIB), 4);
            assert_eq!(cache.stats().cached_stacks, 4);
            let other = Builder::new().stack_size(4 * MIB);
            let handle = other.clone().spawn(|| 7).expect("made room");
            assert_eq!(handle.join().expect("its end"), 7);
            assert_eq!(cache.stats().mapped_stacks, 0);

            StackCache::global().clear();
            burst(&builder.stack_size(MIB), 4);
            let error = other
                .stack_size(8 * MIB)
                .spawn(|| ())
                .expect_err("too large");
            let got = (error.step(), error.errno().raw(), error.attempts());
            // 4 MiB do not make room for 8.
            assert_eq!(got, (Step::MapStack, libc::EAGAIN, 1), "{error}");
            assert_eq!(cache.stats().cached_stacks, 4);
        },
    );
}

/// A stack that was locked for its thread stays locked in the cache.
#[test]
fn locked_stacks_are_given_back_before_mlock_is_refused() {
    alone(
        "limits::locked_stacks_are_given_back_before_mlock_is_refused",
        || {
            nptl::spawn(|| ()).unwrap().join().unwrap();
            or_skip!(become_unused_user());
            set_rlimit(libc::RLIMIT_MEMLOCK, 3 << 20);
            let (cache, builder) = private(StackCacheConfig::default());
            let builder = builder.lock_stack(true);
            burst(&builder.clone().stack_size(MIB), 2);
            assert_eq!(cache.stats().cached_stacks, 2);
            let handle = builder.clone().stack_size(2 * MIB).spawn(|| 7);
            assert_eq!(handle.expect("made room").join().expect("its end"), 7);

            // Warm stacks are no obstacle, and stay.
            cache.clear();
            burst(&builder.clone().lock_stack(false).stack_size(MIB), 2);
            let error = builder
                .stack_size(4 * MIB)
                .spawn(|| ())
                .expect_err("too large");
            let got = (error.step(), error.errno().raw(), error.attempts());
            assert_eq!(got, (Step::PrepareStack, libc::ENOMEM, 1), "{error}");
            assert_eq!(cache.stats().cached_stacks, 2);
        },
    );
}

/// A request that no number of cached stacks makes room for leaves them where they are, whatever refuses it.
#[test]
fn an_impossible_request_leaves_the_cache_alone() {
    alone(
        "limits::an_impossible_request_leaves_the_cache_alone",
        || {
            let (cache, builder) = private(StackCacheConfig::default());
            let builder = builder.stack_size(MIB);
            burst(&builder, 4);
            let refused = |limit: libc::__rlimit_resource_t, value: u64, builder: Builder| {
                set_rlimit(limit, value);
                let error = builder.spawn(|| ()).expect_err("impossible");
                set_rlimit(limit, libc::RLIM_INFINITY);
                assert_eq!(cache.stats().cached_stacks, 4, "{error}");
                assert_eq!(error.attempts(), 1, "{error}");
                assert!(!error.to_string().contains("unmapped"), "{error}");
                (error.step(), error.errno().raw())
            };
            let wanted = |size: usize| Builder::new().stack_size(size);
            let map = (Step::MapStack, libc::ENOMEM);
            let space = status("VmSize:") + (16 << 20);
            // Addresses; the caches' own share of the limit is more than they hold.
            assert_eq!(
                refused(libc::RLIMIT_AS, space.max(1 << 30), wanted(1 << 40)),
                map
            );
            assert_eq!(
                refused(libc::RLIMIT_DATA, status("VmData:"), wanted(64 * MIB)),
                map
            );
            // More than there are: no limit of the process.
            assert_eq!(refused(libc::RLIMIT_CORE, 0, wanted(1 << 46)), map);
            // By a little: 4 MiB are cached, and 8 are missing.
            let little = status("VmData:") + (4 << 20);
            assert_eq!(refused(libc::RLIMIT_DATA, little, wanted(12 * MIB)), map);
            // And what they do make room for is granted.
            set_rlimit(libc::RLIMIT_DATA, status("VmData:") + (1 << 20));
            let handle = wanted(3 * MIB).spawn(|| 7).expect("made room");
            assert_eq!(handle.join().expect("its end"), 7);
            assert_eq!(cache.stats().cached_stacks, 0);
        },
    );
}

/// Locked stacks are given back for a locked one only where the limit has room for it then.
#[test]
fn locked_stacks_stay_where_they_make_no_room() {
    alone("limits::locked_stacks_stay_where_they_make_no_room", || {
        nptl::spawn(|| ()).unwrap().join().unwrap();
        or_skip!(become_unused_user());
        set_rlimit(libc::RLIMIT_MEMLOCK, 3 << 20);
        let (cache, builder) = private(StackCacheConfig::default());
        let builder = builder.lock_stack(true);
        burst(&builder.clone().stack_size(MIB), 2);
        let error = builder.stack_size(4 * MIB).spawn(|| ());
        let error = error.expect_err("too large");
        let got = (error.step(), error.errno().raw(), error.attempts());
        assert_eq!(got, (Step::PrepareStack, libc::ENOMEM, 1), "{error}");
        assert_eq!(cache.stats().cached_stacks, 2);
    });
}

/// As by a pid namespace that ends: ENOMEM for a task, while the kernel's own probes find that there is memory.
#[test]
fn a_task_that_is_not_refused_for_memory_leaves_the_cache_alone() {
    const NAME: &str = "limits::a_task_that_is_not_refused_for_memory_leaves_the_cache_alone";
    alone(NAME, || {
        let refuse = &AtomicBool::new(false);
        let result = supervised(
            &[libc::SYS_clone3],
            |_| refuse.swap(false, Ordering::AcqRel).then_some(libc::ENOMEM),
            || {
                let (cache, builder) = private(StackCacheConfig::default());
                burst(&builder, 4);
                refuse.store(true, Ordering::Release);
                let handle = builder.stack_size(MIB).spawn(|| 7).expect("tried again");
                assert_eq!(handle.join().expect("its end"), 7);
                assert!(!refuse.load(Ordering::Acquire), "nothing was refused");
                let stats = cache.stats();
                assert_eq!((stats.cached_stacks, stats.evictions), (5, 0));
            },
        );
        or_skip!(result);
    });
}

/// Hits and misses are spawns, also where one is tried again and again before it is refused.
#[test]
fn a_spawn_is_counted_once() {
    alone("limits::a_spawn_is_counted_once", || {
        let (cache, builder) = private(StackCacheConfig::default());
        burst(&builder, 1);
        or_skip!(become_unused_user());
        set_rlimit(libc::RLIMIT_NPROC, 0);
        let before = cache.stats();
        // The default's time is over after two attempts where the processors are busy.
        let builder = builder.retry(RetryPolicy::within(Duration::from_millis(500)));
        let error = builder.clone().spawn(|| ()).expect_err("no task");
        assert!(error.attempts() > 2, "{error}");
        let after = cache.stats();
        assert_eq!((after.hits, after.misses), (before.hits + 1, before.misses));
        // And one that finds no stack.
        let error = builder.stack_size(MIB + 1).spawn(|| ());
        assert!(error.expect_err("no task").attempts() > 2);
        let after = cache.stats();
        let counts = (after.hits, after.misses);
        assert_eq!(counts, (before.hits + 1, before.misses + 1));
    });
}

/// The child of a fork has its own copy of every stack, and no thread has been started there yet.
#[test]
fn a_forked_child_can_give_its_stacks_back() {
    alone("limits::a_forked_child_can_give_its_stacks_back", || {
        let (cache, builder) = private(StackCacheConfig::default());
        let stacks = burst(&builder, 5);
        // SAFETY: the child leaves by _exit.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            cache.trim(0);
            let kept = stacks.iter().any(|stack| is_mapped(stack.base));
            let empty = cache.stats().mapped_stacks == 0;
            let works = builder
                .spawn(|| 7)
                .is_ok_and(|handle| handle.join().is_ok());
            let good = !kept && empty && works;
            // SAFETY: ends this process.
            unsafe { libc::_exit(i32::from(!good)) };
        }
        let mut status = 0;
        // SAFETY: `status` is writable, and the child is ours.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        assert_eq!(status, 0);
        assert!(stacks.iter().all(|stack| is_mapped(stack.base)));
    });
}
