//! A3: every step can be refused, says so, and leaves nothing behind.
//!
//! Each step is refused twice over: by an injected answer of any errno, which can be switched on and off
//! within one thread (`support::supervised`), and by the real limit wherever a test can reach it.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use super::heap::CALLOC_FAILS_IN;
use nix::errno::Errno;
use nptl::{
    Builder, SpawnError, StackCache, StackCacheConfig, StackCacheStats, StackFate, StackOrigin,
    StackOutcome, Step,
};
use support::{
    Call, MADV_GUARD_INSTALL, Mappings, Snapshot, await_reaping, become_unused_user, case, child,
    deny, deny_guard_marks, listed_threads, or_skip, report, set_rlimit, supervised, tid,
};

const MADV_POPULATE_WRITE: u64 = libc::MADV_POPULATE_WRITE as u64;
pub(super) const CALLS_OF_A_SPAWN: [libc::c_long; 7] = [
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_mlock,
    libc::SYS_clone3,
    libc::SYS_clone,
];

/// Everything that a refused spawn must not change.
#[derive(Debug)]
struct Unchanged {
    snapshot: Snapshot,
    listed: Vec<usize>,
    stats: StackCacheStats,
    signal_mask: u64,
    locked: String,
}

impl Unchanged {
    fn take(cache: &StackCache) -> Unchanged {
        let mut mask = 0_u64;
        // SAFETY: a null set only asks; the place has the kernel's size.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigprocmask,
                libc::SIG_BLOCK,
                std::ptr::null::<u64>(),
                &raw mut mask,
                8,
            )
        };
        let status = std::fs::read_to_string("/proc/self/status").expect("status");
        let locked = status.lines().find(|line| line.starts_with("VmLck"));
        Unchanged {
            listed: listed_threads(),
            stats: cache.stats(),
            signal_mask: mask,
            locked: locked.expect("VmLck").to_owned(),
            snapshot: Snapshot::take(),
        }
    }

    /// The same when the kernel has taken back the threads that were joined before: what it takes back later would
    /// look like a change.
    fn settled(cache: &StackCache) -> Unchanged {
        await_reaping();
        Unchanged::take(cache)
    }

    /// The heap has grown to what two of these need.
    fn warm_up(cache: &StackCache) {
        drop(std::hint::black_box(vec![1_u8; 100 << 10]));
        await_reaping();
        let two = [Unchanged::take(cache), Unchanged::take(cache)];
        two[0].snapshot.diff(&two[1].snapshot);
    }

    #[track_caller]
    fn expect_unchanged(&self, later: &Unchanged, what: &str) {
        println!("{what}");
        self.snapshot.diff(&later.snapshot).expect_nothing_left();
        assert_eq!(self.listed, later.listed, "{what}: glibc's thread list");
        assert_eq!(self.signal_mask, later.signal_mask, "{what}: signal mask");
        assert_eq!(self.locked, later.locked, "{what}: locked memory");
        let accounts = |stats: &StackCacheStats| {
            (
                (stats.cached_stacks, stats.cached_virtual_bytes),
                stats.cached_resident_bytes,
                (stats.live_stacks, stats.mapped_stacks),
                (stats.mapped_virtual_bytes, stats.evictions),
            )
        };
        let (before, after) = (accounts(&self.stats), accounts(&later.stats));
        assert_eq!(before, after, "{what}: cache");
    }
}

pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) step: Step,
    pub(super) errno: Errno,
    pub(super) refuse: fn(&Call) -> Option<i32>,
    pub(super) configure: fn(Builder) -> Builder,
}

impl Case {
    /// A cached stack is mapped and guarded already, and has its TLS: `tests/host/dlopen.rs` refuses that of
    /// a cached stack after a dlopen.
    fn reaches_cached_stacks(&self) -> bool {
        !matches!(
            self.step,
            Step::MapStack | Step::GuardStack | Step::AllocateTls
        )
    }
}

pub(super) fn as_is(builder: Builder) -> Builder {
    builder
}

pub(super) const CASES: &[Case] = &[
    Case {
        name: "mmap ENOMEM",
        step: Step::MapStack,
        errno: Errno::ENOMEM,
        refuse: |call| call.maps_a_stack().then_some(libc::ENOMEM),
        configure: as_is,
    },
    Case {
        name: "mmap EAGAIN",
        step: Step::MapStack,
        errno: Errno::EAGAIN,
        refuse: |call| call.maps_a_stack().then_some(libc::EAGAIN),
        configure: as_is,
    },
    Case {
        name: "mmap EPERM",
        step: Step::MapStack,
        errno: Errno::EPERM,
        refuse: |call| call.maps_a_stack().then_some(libc::EPERM),
        configure: as_is,
    },
    Case {
        name: "guard madvise ENOMEM",
        step: Step::GuardStack,
        errno: Errno::ENOMEM,
        refuse: |call| call.advises(MADV_GUARD_INSTALL).then_some(libc::ENOMEM),
        configure: as_is,
    },
    Case {
        name: "guard mprotect ENOMEM",
        step: Step::GuardStack,
        errno: Errno::ENOMEM,
        refuse: |call| match call.number {
            libc::SYS_mprotect => Some(libc::ENOMEM),
            _ => call.advises(MADV_GUARD_INSTALL).then_some(libc::EINVAL),
        },
        configure: as_is,
    },
    Case {
        name: "guard mprotect EACCES",
        step: Step::GuardStack,
        errno: Errno::EACCES,
        refuse: |call| match call.number {
            libc::SYS_mprotect => Some(libc::EACCES),
            _ => call.advises(MADV_GUARD_INSTALL).then_some(libc::EPERM),
        },
        configure: |builder| builder.guard_size(64 << 10),
    },
    Case {
        name: "signal stack's guard madvise ENOMEM",
        step: Step::GuardStack,
        errno: Errno::ENOMEM,
        refuse: |call| {
            let second = call.advises(MADV_GUARD_INSTALL) && call.arguments[1] == 4096;
            second.then_some(libc::ENOMEM)
        },
        configure: |builder| builder.guard_size(64 << 10),
    },
    Case {
        name: "signal stack's guard mprotect ENOMEM",
        step: Step::GuardStack,
        errno: Errno::ENOMEM,
        refuse: |call| match call.number {
            libc::SYS_mprotect => (call.arguments[1] == 4096).then_some(libc::ENOMEM),
            _ => call.advises(MADV_GUARD_INSTALL).then_some(libc::EINVAL),
        },
        configure: |builder| builder.guard_size(64 << 10),
    },
    Case {
        name: "mlock EPERM",
        step: Step::PrepareStack,
        errno: Errno::EPERM,
        refuse: |call| (call.number == libc::SYS_mlock).then_some(libc::EPERM),
        configure: |builder| builder.lock_stack(true),
    },
    Case {
        name: "prefault ENOMEM",
        step: Step::PrepareStack,
        errno: Errno::ENOMEM,
        refuse: |call| call.advises(MADV_POPULATE_WRITE).then_some(libc::ENOMEM),
        configure: |builder| builder.prefault_stack(16 << 10),
    },
    Case {
        name: "prefault of a locked stack EFAULT",
        step: Step::PrepareStack,
        errno: Errno::EFAULT,
        refuse: |call| call.advises(MADV_POPULATE_WRITE).then_some(libc::EFAULT),
        configure: |builder| builder.lock_stack(true).prefault_stack(16 << 10),
    },
    Case {
        name: "calloc",
        step: Step::AllocateTls,
        errno: Errno::ENOMEM,
        refuse: |_| None,
        configure: as_is,
    },
    Case {
        name: "clone3 EAGAIN",
        step: Step::Clone,
        errno: Errno::EAGAIN,
        refuse: |call| (call.number == libc::SYS_clone3).then_some(libc::EAGAIN),
        configure: as_is,
    },
    Case {
        name: "clone3 ENOMEM",
        step: Step::Clone,
        errno: Errno::ENOMEM,
        refuse: |call| (call.number == libc::SYS_clone3).then_some(libc::ENOMEM),
        configure: |builder| builder.lock_stack(true),
    },
    Case {
        name: "clone3 EPERM, clone EAGAIN",
        step: Step::Clone,
        errno: Errno::EAGAIN,
        refuse: |call| match call.number {
            libc::SYS_clone3 => Some(libc::EPERM),
            libc::SYS_clone => Some(libc::EAGAIN),
            _ => None,
        },
        configure: as_is,
    },
    Case {
        name: "clone3 EPERM, clone EPERM",
        step: Step::Clone,
        errno: Errno::EPERM,
        refuse: |call| {
            matches!(call.number, libc::SYS_clone3 | libc::SYS_clone).then_some(libc::EPERM)
        },
        configure: as_is,
    },
    // Last: from the first ENOSYS on, the process asks clone alone.
    Case {
        name: "clone3 ENOSYS, clone EINVAL",
        step: Step::Clone,
        errno: Errno::EINVAL,
        refuse: |call| match call.number {
            libc::SYS_clone3 => Some(libc::ENOSYS),
            libc::SYS_clone => Some(libc::EINVAL),
            _ => None,
        },
        configure: as_is,
    },
];

/// Calls `attempt` with the obstacle in the way.
pub(super) fn obstructed<T>(case: &Case, active: &AtomicBool, attempt: impl FnOnce() -> T) -> T {
    if case.step == Step::AllocateTls {
        CALLOC_FAILS_IN.store(tid(), Ordering::Release);
    }
    active.store(true, Ordering::Release);
    let result = attempt();
    active.store(false, Ordering::Release);
    CALLOC_FAILS_IN.store(0, Ordering::Release);
    result
}

fn refuse_each_way(case: &Case, cached: bool, active: &AtomicBool) {
    const SIZE: usize = 300 << 10;
    let cache = StackCache::new(StackCacheConfig::default());
    let build = || {
        (case.configure)(
            Builder::new()
                .retry(nptl::RetryPolicy::never())
                .stack_cache(&cache)
                .stack_size(SIZE),
        )
    };
    let what = format!(
        "{} on a {} stack",
        case.name,
        if cached { "cached" } else { "fresh" }
    );
    // What the first of everything allocates for good: the record, the error's formatting.
    for _ in 0..2 {
        drop(obstructed(case, active, || build().spawn(|| ())).expect_err(&what));
    }
    if cached {
        // Neither locked nor prefaulted.
        let builder = Builder::new().stack_cache(&cache).stack_size(SIZE);
        builder.spawn(|| ()).expect(&what).join().expect(&what);
        assert_eq!(cache.stats().cached_stacks, 1, "{what}");
    }
    Unchanged::warm_up(&cache);
    for round in 0..3 {
        let before = Unchanged::settled(&cache);
        let moved = Box::new(round);
        let refused = obstructed(case, active, || build().spawn_or_return(move || *moved));
        let (error, work) = refused.expect_err(&what).into_parts();
        assert_eq!(work(), round, "{what}: the closure");
        // A word or two: the error and the closure are alive here, as they are in a caller.
        let after = Unchanged::take(&cache);
        before.expect_unchanged(&after, &what);
        check_error(case, cached, &error);
        drop(error);
    }
    // Scoped, too; and the obstacle gone.
    let error = nptl::scope(|scope| {
        obstructed(case, active, || build().spawn_scoped(scope, || ())).expect_err(&what)
    });
    check_error(case, cached, &error);
    let before = cache.stats();
    assert_eq!(build().spawn(|| 1).expect(&what).join().expect(&what), 1);
    let after = cache.stats();
    assert_eq!(after.hits - before.hits, u64::from(cached), "{what}");
    assert_eq!((after.cached_stacks, after.live_stacks), (1, 0), "{what}");
}

fn check_error(case: &Case, cached: bool, error: &SpawnError) {
    let outcome = match (case.step, cached) {
        (Step::MapStack, _) => StackOutcome {
            origin: StackOrigin::None,
            fate: StackFate::None,
        },
        (_, true) => StackOutcome {
            origin: StackOrigin::Cache,
            fate: StackFate::Cached,
        },
        (_, false) => StackOutcome {
            origin: StackOrigin::Fresh,
            fate: StackFate::Unmapped,
        },
    };
    let got = (
        error.step(),
        error.errno().raw(),
        error.stack(),
        error.attempts(),
    );
    assert_eq!(
        got,
        (case.step, case.errno as i32, outcome, 1),
        "{}: {error}",
        case.name
    );
    let folded = match case.errno {
        Errno::ENOMEM => Errno::EAGAIN,
        other => other,
    };
    assert_eq!(error.pthread_errno(), folded as i32, "{error}");
    let text = error.to_string();
    let fate = match outcome.origin {
        StackOrigin::None => "no stack yet",
        StackOrigin::Cache => "stack from cache, back in cache",
        _ => "stack freshly mapped, unmapped",
    };
    for part in [
        format!("step={}", case.step),
        format!("errno={:?}", case.errno),
        format!("stack_size={}", 300 << 10),
        fate.to_owned(),
    ] {
        assert!(text.contains(&part), "{part:?} is not in {text:?}");
    }
}

#[test]
fn every_step_is_refused_and_leaves_nothing() {
    if case().is_some() {
        let active = &AtomicBool::new(false);
        let count = supervised(
            &CALLS_OF_A_SPAWN,
            |call| {
                let index = CURRENT.load(Ordering::Acquire);
                let refuse = CASES.get(index as usize)?.refuse;
                refuse(call).filter(|_| active.load(Ordering::Acquire))
            },
            || {
                nptl::spawn(|| ())
                    .expect("a thread")
                    .join()
                    .expect("its end");
                let mut count = 0;
                for (index, case) in CASES.iter().enumerate() {
                    CURRENT.store(index as i32, Ordering::Release);
                    for cached in [false, true] {
                        if !cached || case.reaches_cached_stacks() {
                            refuse_each_way(case, cached, active);
                            count += 1;
                        }
                    }
                }
                count
            },
        );
        report("count", or_skip!(count));
        return;
    }
    let output = child(
        "failure::every_step_is_refused_and_leaves_nothing",
        "refuse",
    )
    .run();
    let output = or_skip!(output).success();
    if output.skipped().is_none() {
        assert_eq!(output.get("count"), Some("25"), "{output}");
    }
}

/// Which of [`CASES`] the supervisor plays.
static CURRENT: AtomicI32 = AtomicI32::new(0);

/// A memory cgroup counts the pages of cached stacks together with what the kernel needs for a task: they are
/// given back before the lack of memory is reported.
#[test]
fn cached_stacks_make_room_for_a_task() {
    const CACHED: usize = 3;
    let test = "failure::cached_stacks_make_room_for_a_task";
    if case().is_some() {
        let active = &AtomicBool::new(false);
        let result = supervised(
            &CALLS_OF_A_SPAWN,
            |call| match call.number {
                // A stack goes: there is memory again.
                libc::SYS_munmap if active.load(Ordering::Acquire) => {
                    active.store(false, Ordering::Release);
                    None
                }
                libc::SYS_clone3 if active.load(Ordering::Acquire) => Some(libc::ENOMEM),
                _ => None,
            },
            || {
                let cache = StackCache::new(StackCacheConfig::default());
                let build = |size| Builder::new().stack_cache(&cache).stack_size(size);
                let start = || build(64 << 10).spawn(|| ()).expect("a thread");
                let handles: Vec<_> = (0..CACHED).map(|_| start()).collect();
                for handle in handles {
                    handle.join().expect("its end");
                }
                assert_eq!(cache.stats().cached_stacks, CACHED);
                // Another size, so that the stack is a new one.
                active.store(true, Ordering::Release);
                let never = build(256 << 10).retry(nptl::RetryPolicy::never());
                let error = never.spawn(|| ()).expect_err("tried once");
                assert_eq!(
                    (error.errno().raw(), error.attempts()),
                    (libc::ENOMEM, 1),
                    "{error}"
                );
                active.store(true, Ordering::Release);
                let handle = build(256 << 10).spawn(|| 7).expect("room");
                assert_eq!(handle.join().expect("its end"), 7);
                let stats = cache.stats();
                assert!(stats.cached_stacks <= 1, "{stats:?}");
                // A spawn is counted once, however often it was tried.
                assert_eq!(stats.hits + stats.misses, CACHED as u64 + 2, "{stats:?}");
            },
        );
        or_skip!(result);
        report("granted", "yes");
        return;
    }
    let output = or_skip!(child(test, "full").run()).success();
    if output.skipped().is_none() {
        assert_eq!(output.get("granted"), Some("yes"), "{output}");
    }
}

/// Where munmap is refused at the same time, the stack cannot go, and the error says where it is.
#[test]
fn a_stack_that_cannot_be_unmapped_is_kept() {
    if case().is_some() {
        let active = &AtomicBool::new(false);
        let result = supervised(
            &CALLS_OF_A_SPAWN,
            |call| match call.number {
                libc::SYS_clone3 if active.load(Ordering::Acquire) => Some(libc::EAGAIN),
                libc::SYS_munmap if active.load(Ordering::Acquire) => Some(libc::ENOMEM),
                _ => None,
            },
            || {
                nptl::spawn(|| ())
                    .expect("a thread")
                    .join()
                    .expect("its end");
                let cache = StackCache::new(StackCacheConfig::default());
                active.store(true, Ordering::Release);
                let error = Builder::new().stack_cache(&cache).spawn(|| ()).err();
                active.store(false, Ordering::Release);
                let error = error.expect("a refusal");
                let kept = StackOutcome {
                    origin: StackOrigin::Fresh,
                    fate: StackFate::Cached,
                };
                assert_eq!(error.stack(), kept, "{error}");
                assert!(error.to_string().contains("freshly mapped, now in cache"));
                assert_eq!(cache.stats().cached_stacks, 1);
                let handle = Builder::new().stack_cache(&cache).spawn(|| {
                    // Its memory is as good as new.
                    let block = std::hint::black_box(vec![1_u8; 100_000]);
                    block.iter().map(|&byte| usize::from(byte)).sum::<usize>()
                });
                assert_eq!(handle.expect("a thread").join().expect("its end"), 100_000);
                assert_eq!(cache.stats().hits, 1);
                cache.clear();
                assert_eq!(cache.stats().mapped_stacks, 0);
            },
        );
        or_skip!(result);
        return;
    }
    let output = child("failure::a_stack_that_cannot_be_unmapped_is_kept", "refuse").run();
    or_skip!(output).success();
}

/// mmap's ENOMEM makes the caches give back what they hold, if that can help.
#[test]
fn cached_stacks_are_given_back_before_a_mapping_is_refused() {
    if case().is_some() {
        let other = StackCache::new(StackCacheConfig::default());
        let fill = |cache: &StackCache, size: usize| {
            let handles: Vec<_> = (0..5)
                .map(|_| {
                    let builder = Builder::new().stack_cache(cache).stack_size(size);
                    builder.spawn(|| ()).expect("a thread")
                })
                .collect();
            for handle in handles {
                handle.join().expect("its end");
            }
        };
        fill(StackCache::global(), 8 << 20);
        fill(&other, 4 << 20);
        let cached = StackCache::global().stats().cached_stacks + other.stats().cached_stacks;
        assert!((6..=10).contains(&cached), "{cached}");
        // Not RLIMIT_AS, to which the caches keep of their own accord.
        set_rlimit(libc::RLIMIT_DATA, data_segment());
        // 60 MiB are in the caches: this fits only without them.
        let handle = Builder::new()
            .stack_size(20 << 20)
            .spawn(|| 5)
            .expect("a thread");
        assert_eq!(handle.join().expect("its end"), 5);
        assert_eq!(other.stats().cached_stacks, 0);
        StackCache::global().clear();
        set_rlimit(libc::RLIMIT_DATA, libc::RLIM_INFINITY);

        // 20 MiB do not make room for 200: nothing is given back for that.
        fill(&other, 4 << 20);
        let before = other.stats();
        set_rlimit(libc::RLIMIT_DATA, data_segment());
        let error = Builder::new()
            .stack_size(200 << 20)
            .spawn(|| ())
            .expect_err("a refusal");
        set_rlimit(libc::RLIMIT_DATA, libc::RLIM_INFINITY);
        assert_eq!(
            (error.step(), error.errno().raw(), error.attempts()),
            (Step::MapStack, libc::ENOMEM, 1)
        );
        assert!(!error.to_string().contains("unmapped"), "{error}");
        assert_eq!(other.stats(), before);
        return;
    }
    let name = "failure::cached_stacks_are_given_back_before_a_mapping_is_refused";
    or_skip!(child(name, "full").run()).success();
}

/// Bytes that count towards RLIMIT_DATA.
fn data_segment() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let kib = status.lines().find_map(|line| {
        let kib = line.strip_prefix("VmData:")?.strip_suffix("kB")?;
        kib.trim().parse::<u64>().ok()
    });
    kib.expect("VmData") * 1024
}

fn address_space() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").expect("statm");
    let pages: u64 = pages
        .split(' ')
        .next()
        .and_then(|n| n.parse().ok())
        .expect("a number");
    pages * 4096
}

/// The limits themselves. Each case: what refuses it, and with which step and errno.
#[test]
fn real_limits_refuse_and_leave_nothing() {
    let cases = [
        ("RLIMIT_AS", Step::MapStack, Errno::ENOMEM),
        ("RLIMIT_DATA", Step::MapStack, Errno::ENOMEM),
        ("MCL_FUTURE", Step::MapStack, Errno::EAGAIN),
        ("map count", Step::GuardStack, Errno::ENOMEM),
        ("RLIMIT_MEMLOCK", Step::PrepareStack, Errno::ENOMEM),
        ("RLIMIT_MEMLOCK 0", Step::PrepareStack, Errno::EPERM),
        ("RLIMIT_NPROC", Step::Clone, Errno::EAGAIN),
    ];
    if let Some(name) = case() {
        let case = cases.iter().find(|case| case.0 == name).expect("a case");
        return meet_real_limit(case.0, case.1, case.2);
    }
    for (name, ..) in cases {
        let output = or_skip!(child("failure::real_limits_refuse_and_leave_nothing", name).run());
        let output = output.success();
        if output.skipped().is_none() {
            assert_eq!(output.get("refused"), Some("yes"), "{name}: {output}");
        }
    }
}

fn meet_real_limit(name: &str, step: Step, errno: Errno) {
    nptl::spawn(|| ())
        .expect("a thread")
        .join()
        .expect("its end");
    // Else that stack would be given back in the middle, and make room.
    StackCache::global().clear();
    let unprivileged = [
        "MCL_FUTURE",
        "RLIMIT_MEMLOCK",
        "RLIMIT_MEMLOCK 0",
        "RLIMIT_NPROC",
    ];
    if unprivileged.contains(&name) {
        or_skip!(become_unused_user());
    }
    let fresh_only = matches!(step, Step::MapStack | Step::GuardStack);
    for cached in [false, true] {
        if cached && fresh_only {
            continue;
        }
        let cache = StackCache::new(StackCacheConfig::default());
        let build = || {
            let lock = name.starts_with("RLIMIT_MEMLOCK");
            let builder = Builder::new().stack_cache(&cache).stack_size(1 << 20);
            builder.lock_stack(lock)
        };
        if cached {
            let handle = Builder::new().stack_cache(&cache).stack_size(1 << 20);
            handle
                .spawn(|| ())
                .expect("a thread")
                .join()
                .expect("its end");
        }
        let ballast = obstacle(name, true);
        Unchanged::warm_up(&cache);
        for _ in 0..3 {
            let before = Unchanged::settled(&cache);
            let error = build().spawn(|| ()).expect_err("a refusal");
            let after = Unchanged::take(&cache);
            before.expect_unchanged(&after, name);
            assert_eq!(
                (error.step(), error.errno().raw()),
                (step, errno as i32),
                "{error}"
            );
            let from = error.stack().origin == StackOrigin::Cache;
            assert_eq!(from, cached, "{error}");
        }
        drop(ballast);
        obstacle(name, false);
        let free = Builder::new().stack_cache(&cache).stack_size(1 << 20);
        assert_eq!(
            free.spawn(|| 3).expect("a thread").join().expect("its end"),
            3
        );
    }
    report("refused", "yes");
}

/// Puts the named limit in the way, or takes it away.
fn obstacle(name: &str, on: bool) -> Option<Mappings> {
    let endless = libc::RLIM_INFINITY;
    match name {
        "RLIMIT_AS" => {
            // Room for the snapshots' buffers, not for a stack.
            let limit = address_space() + (512 << 10);
            set_rlimit(libc::RLIMIT_AS, if on { limit } else { endless });
        }
        "RLIMIT_DATA" => set_rlimit(libc::RLIMIT_DATA, if on { 1 << 20 } else { endless }),
        "MCL_FUTURE" => {
            let flags = libc::MCL_FUTURE | libc::MCL_ONFAULT;
            // SAFETY: changes how later mappings are locked.
            let answer = unsafe {
                if on {
                    set_rlimit(libc::RLIMIT_MEMLOCK, 768 << 10);
                    libc::mlockall(flags)
                } else {
                    libc::munlockall()
                }
            };
            assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
        }
        "RLIMIT_MEMLOCK" => set_rlimit(libc::RLIMIT_MEMLOCK, if on { 64 << 10 } else { 8 << 20 }),
        "RLIMIT_MEMLOCK 0" => set_rlimit(libc::RLIMIT_MEMLOCK, if on { 0 } else { 8 << 20 }),
        "RLIMIT_NPROC" => set_rlimit(libc::RLIMIT_NPROC, if on { 1 } else { 1000 }),
        "map count" if on => return Some(fill_map_count()),
        _ => {}
    }
    None
}

/// Leaves no mapping to spare: the guard's mprotect, which splits one, is refused; a mapping that merges with
/// a neighbour is not. An old kernel's answer to MADV_GUARD_INSTALL has to be injected for that.
fn fill_map_count() -> Mappings {
    deny_guard_marks(libc::EINVAL);
    // One for the stack itself, should it merge with no neighbour; its guard needs another.
    Mappings::fill_but(1)
}

/// The calibration thread belongs to glibc: the first spawn of a process can be refused through it.
#[test]
fn a_refused_calibration_is_a_refusal_and_the_next_spawn_calibrates() {
    type Refuse = fn(&Call) -> Option<i32>;
    let cases: [(&str, Step, Errno, Refuse); 4] = [
        ("our mmap", Step::MapStack, Errno::ENOMEM, |call| {
            call.maps_a_stack().then_some(libc::ENOMEM)
        }),
        ("our mmap EAGAIN", Step::MapStack, Errno::EAGAIN, |call| {
            call.maps_a_stack().then_some(libc::EAGAIN)
        }),
        ("clone3 EAGAIN", Step::Clone, Errno::EAGAIN, |call| {
            (call.number == libc::SYS_clone3).then_some(libc::EAGAIN)
        }),
        ("clone3 ENOMEM", Step::Clone, Errno::ENOMEM, |call| {
            (call.number == libc::SYS_clone3).then_some(libc::ENOMEM)
        }),
    ];
    if let Some(name) = case() {
        let &(_, step, errno, refuse) = cases.iter().find(|case| case.0 == name).expect("a case");
        let active = &AtomicBool::new(false);
        let result = supervised(
            &CALLS_OF_A_SPAWN,
            |call| refuse(call).filter(|_| active.load(Ordering::Acquire)),
            || {
                let cache = StackCache::global();
                Unchanged::warm_up(cache);
                for round in 0..2 {
                    let before = Unchanged::settled(cache);
                    active.store(true, Ordering::Release);
                    let (error, work) = Builder::new()
                        .retry(nptl::RetryPolicy::never())
                        .spawn_or_return(move || round)
                        .expect_err("a refusal")
                        .into_parts();
                    active.store(false, Ordering::Release);
                    let after = Unchanged::settled(cache);
                    assert_eq!(
                        (error.step(), error.errno().raw()),
                        (step, errno as i32),
                        "{error}"
                    );
                    assert!(error.to_string().contains("calibration"), "{error}");
                    assert_eq!(work(), round);
                    if round > 0 {
                        // The first leaves the fork mark's page.
                        before.expect_unchanged(&after, name.as_str());
                    }
                }
                let handle = nptl::spawn(|| 4).expect("a thread");
                assert_eq!(handle.join().expect("its end"), 4);
            },
        );
        or_skip!(result);
        report("refused", "yes");
        return;
    }
    for (name, ..) in cases {
        let test = "failure::a_refused_calibration_is_a_refusal_and_the_next_spawn_calibrates";
        let output = or_skip!(child(test, name).run()).success();
        if output.skipped().is_none() {
            assert_eq!(output.get("refused"), Some("yes"), "{name}: {output}");
        }
    }
}

/// Right at the limit: a user who may have no further task.
#[test]
fn the_first_spawn_at_rlimit_nproc_is_refused_as_clone() {
    if case().is_some() {
        or_skip!(become_unused_user());
        set_rlimit(libc::RLIMIT_NPROC, 1);
        let error = nptl::spawn(|| ()).expect_err("a refusal");
        assert_eq!(
            (error.step(), error.errno().raw()),
            (Step::Clone, libc::EAGAIN),
            "{error}"
        );
        set_rlimit(libc::RLIMIT_NPROC, 1000);
        assert_eq!(
            nptl::spawn(|| 4)
                .expect("a thread")
                .join()
                .expect("its end"),
            4
        );
        // And with exactly one task to spare, calibration needs no more than the thread itself.
        return;
    }
    let name = "failure::the_first_spawn_at_rlimit_nproc_is_refused_as_clone";
    or_skip!(child(name, "full").run()).success();
}

/// clone3 that is not there, or that a filter forbids.
#[test]
fn clone_serves_where_clone3_does_not() {
    if let Some(name) = case() {
        nptl::spawn(|| ())
            .expect("a thread")
            .join()
            .expect("its end");
        let errno = if name == "EPERM" {
            libc::EPERM
        } else {
            libc::ENOSYS
        };
        deny(libc::SYS_clone3, errno).install();
        for round in 0..100 {
            let handle = nptl::spawn(move || (round, tid())).expect("a thread");
            let id = handle.tid();
            assert_eq!(handle.join().expect("its end"), (round, id));
        }
        nptl::scope(|scope| {
            let handles: Vec<_> = (0..10)
                .map(|_| scope.spawn(tid).expect("a thread"))
                .collect();
            for handle in handles {
                let id = handle.tid();
                assert_eq!(handle.join().expect("its end"), id);
            }
        });
        return;
    }
    for name in ["ENOSYS", "EPERM"] {
        or_skip!(child("failure::clone_serves_where_clone3_does_not", name).run()).success();
    }
}

/// The guard of a kernel without MADV_GUARD_INSTALL, and of one that refuses it for locked memory.
#[test]
fn the_guard_is_protected_where_it_cannot_be_marked() {
    let cases = ["marker", "EINVAL", "EPERM", "ENOSYS", "MCL_FUTURE"];
    if let Some(name) = case() {
        let (name, write) = name.split_once(' ').expect("two words");
        match name {
            "EINVAL" => deny_guard_marks(libc::EINVAL),
            "EPERM" => deny_guard_marks(libc::EPERM),
            "ENOSYS" => deny_guard_marks(libc::ENOSYS),
            "MCL_FUTURE" => {
                // SAFETY: changes how later mappings are locked.
                let answer = unsafe { libc::mlockall(libc::MCL_FUTURE | libc::MCL_ONFAULT) };
                if answer != 0 {
                    support::skip!("mlockall: {}", std::io::Error::last_os_error());
                }
            }
            _ => {}
        }
        let builder = Builder::new().stack_size(64 << 10).guard_size(4096);
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let handle = builder
            .spawn(move || wait.recv().is_err())
            .expect("a thread");
        let stack = handle.stack();
        assert_eq!(stack.guard_size, 4096);
        let guard = stack.base - 4096;
        let line = format!("{guard:x}-{:x} ---p", stack.base);
        let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
        report(
            "protected",
            maps.lines().any(|found| found.starts_with(&line)),
        );
        // SAFETY: the lowest word of the stack, which its thread does not reach.
        unsafe { (stack.base as *mut u8).write_volatile(1) };
        report("above", "fine");
        let address = match write {
            "low" => guard,
            "high" => stack.base - 1,
            _ => {
                drop(end);
                assert!(handle.join().expect("its end"));
                return;
            }
        };
        // SAFETY: none: this is what the guard is there for.
        unsafe { (address as *mut u8).write_volatile(1) };
        report("below", "fine");
        return;
    }
    for name in cases {
        for write in ["low", "high", "not"] {
            let test = "failure::the_guard_is_protected_where_it_cannot_be_marked";
            let output = or_skip!(child(test, &format!("{name} {write}")).run());
            if output.skipped().is_some() {
                continue;
            }
            // A kernel before 6.13 protects in every case.
            if name != "marker" {
                assert_eq!(output.get("protected"), Some("true"), "{name}: {output}");
            }
            assert_eq!(output.get("above"), Some("fine"), "{name}: {output}");
            assert_eq!(output.get("below"), None, "{name} {write}: {output}");
            let expected = (write != "not").then_some(libc::SIGSEGV);
            assert_eq!(output.signal(), expected, "{name} {write}: {output}");
        }
    }
}
