//! Many forks beside many threads, where no order can be forced: in addition to the tests that force one.

use super::child::use_threads;
use super::process::{_Fork, fork, in_child};
use super::spawn_and_join;
use nptl::{Builder, StackCache, StackCacheConfig, Step};
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use support::{alone, case, child, or_skip, report};

static STOP: AtomicBool = AtomicBool::new(false);
static IN_HANDLER: AtomicUsize = AtomicUsize::new(0);

extern "C" fn spawn_in_child() {
    spawn_and_join();
    IN_HANDLER.fetch_add(1, Ordering::SeqCst);
}

/// What the threads do that the forks are amid.
fn be_busy(kind: usize, own: &StackCache) -> usize {
    for round in 0_usize.. {
        if STOP.load(Ordering::Relaxed) {
            return round;
        }
        match kind {
            0 => {
                let body = || black_box(vec![1_u8; 300]).len();
                assert_eq!(nptl::spawn(body).unwrap().join().unwrap(), 300);
            }
            // Mapped and unmapped all the time, some detached.
            1 => {
                let size = (64 << 10) << (round % 4);
                let builder = Builder::new().stack_cache(own).stack_size(size);
                let handle = builder.spawn(|| ()).unwrap();
                if round % 8 == 0 {
                    handle.detach();
                } else {
                    handle.join().unwrap();
                }
                if round % 16 == 0 {
                    own.clear();
                }
            }
            2 => nptl::scope(|scope| {
                for _ in 0..2 {
                    scope.spawn(|| ()).unwrap();
                }
            }),
            _ => {
                nptl::spawn(|| ()).unwrap().detach();
                StackCache::global().trim(1 << (round % 24));
                // Detached threads must not pile up while their creators are ahead.
                if round % 32 == 0 {
                    spawn_and_join();
                }
            }
        }
    }
    0
}

fn five_at_once() {
    let handles = [0, 1, 2, 3, 4].map(|index| nptl::spawn(move || index).unwrap());
    let sum: i32 = handles
        .into_iter()
        .map(|handle| handle.join().unwrap())
        .sum();
    assert_eq!(sum, 10);
}

/// Four threads fork, four others spawn, join, detach, trim and clear. Which children get threads depends on how they
/// were forked, and on nothing else that is going on: 1,000 children of fork(3), whose atfork handler spawns before the
/// crate's own handler has run, and 200 of `_Fork`.
#[test]
fn forks_of_both_kinds_amid_spawns() {
    let test = "storm::forks_of_both_kinds_amid_spawns";
    const EACH: usize = 300;
    if case().is_none() {
        let limit = Duration::from_secs(170);
        let output = or_skip!(child(test, "run").time_limit(limit).run()).success();
        assert_eq!(output.get("forks"), Some("1000"), "{output}");
        return;
    }
    // SAFETY: a function of this program.
    unsafe { libc::pthread_atfork(None, None, Some(spawn_in_child)) };
    spawn_and_join();
    let own = &StackCache::new(StackCacheConfig::default().resident_budget(100 << 10));
    let forks = &AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let busy = [0, 1, 2, 3].map(|kind| scope.spawn(move || be_busy(kind, own)));
        let fork_each = move || {
            for round in 0..EACH {
                let status = if round % 6 == 5 {
                    // No heap: another thread can have had its lock.
                    in_child(_Fork, || {
                        let error = nptl::spawn(|| ()).expect_err("none");
                        assert_eq!(error.step(), Step::Runtime);
                    })
                } else {
                    forks.fetch_add(1, Ordering::Relaxed);
                    in_child(fork, || {
                        assert_eq!(IN_HANDLER.load(Ordering::SeqCst), 1);
                        five_at_once();
                        if round % 8 == 0 {
                            use_threads();
                            own.clear();
                            StackCache::global().trim(0);
                            let builder = Builder::new().stack_cache(own);
                            builder.spawn(|| ()).unwrap().join().unwrap();
                        }
                    })
                };
                if status != 0 {
                    STOP.store(true, Ordering::Relaxed);
                }
                assert_eq!(status, 0, "fork {round}");
            }
        };
        let forking = [(); 4].map(|()| scope.spawn(fork_each));
        let outcomes = forking.map(|thread| thread.join());
        STOP.store(true, Ordering::Relaxed);
        for outcome in outcomes {
            outcome.unwrap();
        }
        let rounds = busy.map(|thread| thread.join().unwrap());
        report("rounds", rounds.iter().sum::<usize>());
        assert!(rounds.iter().all(|&rounds| rounds > 100), "{rounds:?}");
    });
    let stats = own.stats();
    assert!(stats.live_stacks <= stats.mapped_stacks, "{stats:?}");
    report("forks", forks.load(Ordering::Relaxed));
}

/// Refusals are recorded all the time while the process forks: no child finds the ring of failures locked.
#[test]
fn forks_amid_refusals() {
    alone("storm::forks_amid_refusals", || {
        let refuse = || {
            let builder = Builder::new().stack_size(usize::MAX);
            builder.spawn(|| ()).expect_err("too large").step()
        };
        // Only a process that has used the crate can distinguish its children.
        refuse();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !STOP.load(Ordering::Relaxed) {
                        refuse();
                    }
                });
            }
            let statuses = (0..600).map(|round| match round % 2 {
                // No heap is needed for that: another thread can have had its lock.
                0 => in_child(_Fork, || assert_eq!(refuse(), Step::Runtime)),
                _ => in_child(fork, || {
                    assert_eq!(refuse(), Step::Attributes);
                    let last = nptl::last_failure().expect("a failure");
                    assert_eq!(last.step(), Step::Attributes);
                }),
            });
            let failed = statuses.filter(|&status| status != 0).count();
            STOP.store(true, Ordering::Relaxed);
            assert_eq!(failed, 0, "children that hung, or failed");
        });
    });
}
