//! [`nptl::StartGate`]: all threads run or none, whatever happens between the spawns.

use super::{Moved, wait_until};
use nptl::{Builder, Cancelled, JoinHandle, RetryPolicy, SpawnError, StartGate, Step};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use support::{Cgroup, Snapshot, alone, await_reaping, case, child, inherited_cgroup, or_skip};

/// Threads at one gate, and what became of them.
struct GatedThreads {
    gate: StartGate,
    ran: Arc<AtomicUsize>,
    dropped: Arc<AtomicUsize>,
    threads: Vec<JoinHandle<usize>>,
}

impl GatedThreads {
    fn new(count: usize) -> GatedThreads {
        let mut group = GatedThreads {
            gate: StartGate::new(),
            ran: Arc::default(),
            dropped: Moved::counter(),
            threads: Vec::new(),
        };
        for number in 0..count {
            group.add(Builder::new(), number).unwrap();
        }
        group
    }

    fn add(&mut self, builder: Builder, number: usize) -> Result<(), SpawnError> {
        let (ran, moved) = (Arc::clone(&self.ran), Moved(Arc::clone(&self.dropped)));
        let body = move || {
            ran.fetch_add(1, Ordering::SeqCst);
            drop(moved);
            number
        };
        self.threads
            .push(builder.start_gate(&self.gate).spawn(body)?);
        Ok(())
    }
}

fn is_cancelled<T>(outcome: std::thread::Result<T>) -> bool {
    outcome.is_err_and(|payload| payload.is::<Cancelled>())
}

#[test]
fn threads_run_when_the_gate_is_opened_and_not_before() {
    let GatedThreads {
        gate,
        ran,
        dropped,
        threads,
    } = GatedThreads::new(16);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(ran.load(Ordering::SeqCst), 0);
    assert!(threads.iter().all(|thread| !thread.is_finished()));
    gate.open();
    let results: Vec<_> = threads
        .into_iter()
        .map(|thread| thread.join().unwrap())
        .collect();
    assert!(results.into_iter().eq(0..16));
    assert_eq!(ran.load(Ordering::SeqCst), 16);
    assert_eq!(dropped.load(Ordering::SeqCst), 16);
}

/// What the creator wrote before it opened, without an atomic: a thread sees it.
#[test]
fn a_builder_outlives_its_gate_and_the_decision_stays() {
    for open in [true, false] {
        let gate = StartGate::new();
        let builder = Builder::new().start_gate(&gate);
        match open {
            true => gate.open(),
            false => drop(gate),
        }
        let outcome = builder.spawn(|| 7).unwrap().join();
        match open {
            true => assert_eq!(outcome.unwrap(), 7),
            false => assert!(is_cancelled(outcome)),
        }
    }
}

/// How a gate and the handles of its threads go, in every order.
#[derive(Clone, Copy, PartialEq, Debug)]
enum HandleEnd {
    DroppedBefore,
    DroppedAfter,
    Joined,
    JoinedElsewhere,
    /// Dropped when the thread has ended.
    DroppedLate,
}

#[test]
fn what_was_moved_in_is_dropped_once_in_any_order_of_gate_and_handles() {
    use HandleEnd::{DroppedAfter, DroppedBefore, DroppedLate, Joined, JoinedElsewhere};
    let orders = [
        DroppedBefore,
        DroppedAfter,
        Joined,
        JoinedElsewhere,
        DroppedLate,
    ];
    for first in orders {
        for second in orders {
            for cancel in [true, false] {
                let mut group = GatedThreads::new(2);
                let threads = std::mem::take(&mut group.threads);
                let GatedThreads {
                    gate, ran, dropped, ..
                } = group;
                let mut kept = Vec::new();
                for (order, thread) in [first, second].into_iter().zip(threads) {
                    match order {
                        DroppedBefore => drop(thread),
                        order => kept.push((order, thread)),
                    }
                }
                match cancel {
                    true => gate.cancel(),
                    false => drop(gate),
                }
                for (order, thread) in kept {
                    match order {
                        Joined => assert!(is_cancelled(thread.join())),
                        JoinedElsewhere => {
                            let joined = std::thread::spawn(|| is_cancelled(thread.join()));
                            assert!(joined.join().unwrap());
                        }
                        DroppedLate => {
                            wait_until("the thread has ended", || thread.is_finished());
                            drop(thread);
                        }
                        _ => thread.detach(),
                    }
                }
                // Of a detached thread its own last act, or what the next owner of its stack does.
                wait_until("all is dropped", || dropped.load(Ordering::SeqCst) == 2);
                assert_eq!(ran.load(Ordering::SeqCst), 0, "{first:?} {second:?}");
            }
        }
    }
}

/// The k-th of n is refused, or the creator panics before it: the gate goes, and none has run.
#[test]
fn a_refusal_or_a_panic_at_every_k_of_n_ends_all_the_others() {
    const N: usize = 5;
    for k in 0..N {
        for panics in [false, true] {
            let (ran, dropped) = (Arc::new(AtomicUsize::new(0)), Moved::counter());
            let kept = Arc::new(parking_lot::Mutex::new(Vec::new()));
            let start = || -> Result<(), SpawnError> {
                let mut group = GatedThreads {
                    gate: StartGate::new(),
                    ran: Arc::clone(&ran),
                    dropped: Arc::clone(&dropped),
                    threads: Vec::new(),
                };
                for number in 0..N {
                    if panics && number == k {
                        kept.lock().append(&mut group.threads);
                        std::panic::panic_any(k);
                    }
                    let size = if number == k { usize::MAX } else { 64 << 10 };
                    let refused = group.add(Builder::new().stack_size(size), number);
                    if refused.is_err() {
                        kept.lock().append(&mut group.threads);
                    }
                    refused?;
                }
                group.gate.open();
                Ok(())
            };
            match catch_unwind(AssertUnwindSafe(start)) {
                Ok(result) => assert_eq!(result.unwrap_err().step(), Step::Attributes),
                Err(payload) => assert_eq!(*payload.downcast::<usize>().unwrap(), k),
            }
            let threads = std::mem::take(&mut *kept.lock());
            assert_eq!(threads.len(), k);
            for thread in threads {
                assert!(is_cancelled(thread.join()));
            }
            assert_eq!(ran.load(Ordering::SeqCst), 0);
            // The refused closure, too.
            assert_eq!(dropped.load(Ordering::SeqCst), k + usize::from(!panics));
        }
    }
}

/// A real pids cgroup refuses the third of five. Nothing of the first two is left, without anything joined by hand.
#[test]
fn a_full_cgroup_in_the_middle_leaves_nothing() {
    const TEST: &str = "gate::a_full_cgroup_in_the_middle_leaves_nothing";
    if case().is_some() {
        let cgroup = inherited_cgroup(0);
        let cache = nptl::StackCache::new(nptl::StackCacheConfig::disabled());
        let start = |limit: u64| -> Result<(), SpawnError> {
            let gate = StartGate::new();
            cgroup.set("pids.max", cgroup.tasks() + limit);
            let builder = Builder::new()
                .stack_cache(&cache)
                .start_gate(&gate)
                .retry(RetryPolicy::never());
            let threads = (0..5)
                .map(|_| builder.clone().spawn(|| std::process::abort()))
                .collect::<Result<Vec<_>, _>>();
            cgroup.set("pids.max", "max");
            drop(threads?);
            Ok(())
        };
        let _ = start(2).unwrap_err();
        wait_until("the threads have ended", || {
            cache.trim(0);
            cache.stats().live_stacks == 0
        });
        await_reaping();
        Snapshot::take();
        let before = Snapshot::take();
        let error = start(2).unwrap_err();
        assert_eq!(error.step(), Step::Clone, "{error}");
        wait_until("the threads have ended", || {
            cache.trim(0);
            cache.stats().live_stacks == 0
        });
        await_reaping();
        let after = Snapshot::take();
        assert_eq!(before.kernel_threads, after.kernel_threads);
        assert_eq!(before.glibc_threads, after.glibc_threads);
        assert_eq!(before.fds, after.fds);
        return;
    }
    let cgroup = or_skip!(Cgroup::pids());
    or_skip!(child(TEST, "full").cgroup(&cgroup).run()).success();
}

#[test]
fn scoped_threads_wait_at_a_gate_as_well() {
    let mut words = vec!["one".to_owned(), "two".to_owned()];
    let lengths: usize = nptl::scope(|scope| {
        let gate = StartGate::new();
        let builder = Builder::new().start_gate(&gate);
        let threads: Vec<_> = words
            .iter()
            .map(|word| builder.clone().spawn_scoped(scope, || word.len()).unwrap())
            .collect();
        gate.open();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    assert_eq!(lengths, 6);
    // Dropped at the end of the closure, before the scope waits.
    let dropped = Moved::counter();
    nptl::scope(|scope| {
        let gate = StartGate::new();
        let borrowed = &mut words;
        let moved = Moved(Arc::clone(&dropped));
        let thread = Builder::new()
            .start_gate(&gate)
            .spawn_scoped(scope, move || {
                let _moved = moved;
                borrowed.clear();
            });
        drop(thread.unwrap());
    });
    assert_eq!(words.len(), 2);
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
}

/// The gate is not the scope's, and so is dropped only behind it: the scope cancels it, because it would wait for ever.
#[test]
fn a_scope_that_panics_cancels_the_gate_of_its_threads() {
    let dropped = Moved::counter();
    let ran = AtomicBool::new(false);
    let gate = StartGate::new();
    let outside = Builder::new().start_gate(&gate).spawn(|| ()).unwrap();
    let payload = catch_unwind(AssertUnwindSafe(|| {
        nptl::scope(|scope| {
            for _ in 0..3 {
                let moved = Moved(Arc::clone(&dropped));
                let ran = &ran;
                let body = move || {
                    let _moved = moved;
                    ran.store(true, Ordering::SeqCst);
                };
                let thread = Builder::new().start_gate(&gate).spawn_scoped(scope, body);
                drop(thread.unwrap());
            }
            std::panic::panic_any("between spawns");
        })
    }))
    .unwrap_err();
    assert_eq!(payload.downcast_ref(), Some(&"between spawns"));
    assert!(!ran.load(Ordering::SeqCst));
    assert_eq!(dropped.load(Ordering::SeqCst), 3);
    // One of the gate's threads outside of the scope: all or none.
    assert!(is_cancelled(outside.join()));
    gate.open();
}

/// A signal that is handled at the gate does not open it.
#[test]
fn a_thread_at_a_gate_handles_signals_and_goes_on_waiting() {
    alone(
        "gate::a_thread_at_a_gate_handles_signals_and_goes_on_waiting",
        || {
            static HANDLED: AtomicUsize = AtomicUsize::new(0);
            extern "C" fn count(_: i32) {
                HANDLED.fetch_add(1, Ordering::SeqCst);
            }
            let signal = libc::SIGRTMIN() + 1;
            // SAFETY: a handler that only counts.
            unsafe { libc::signal(signal, count as *const () as usize) };
            let group = GatedThreads::new(1);
            for sent in 1..=50 {
                group.threads[0].kill(signal).unwrap();
                wait_until("handled", || HANDLED.load(Ordering::SeqCst) == sent);
            }
            assert_eq!(group.ran.load(Ordering::SeqCst), 0);
            let GatedThreads { gate, threads, .. } = group;
            gate.open();
            for thread in threads {
                assert_eq!(thread.join().unwrap(), 0);
            }
        },
    );
}

/// Opened and cancelled over and over, with threads on either side of the decision. Under memcheck as well (.ci/run), which
/// takes half a minute.
#[test]
fn many_gates() {
    let dropped = Moved::counter();
    let ran = Arc::new(AtomicUsize::new(0));
    let mut expected = 0;
    for round in 0..10_000 {
        let gate = StartGate::new();
        let builder = Builder::new().stack_size(64 << 10).start_gate(&gate);
        let thread = |_| {
            let (ran, moved) = (Arc::clone(&ran), Moved(Arc::clone(&dropped)));
            let body = move || {
                ran.fetch_add(1, Ordering::SeqCst);
                drop(moved);
            };
            builder.clone().spawn(body).unwrap()
        };
        let mut threads: Vec<_> = (0..2).map(thread).collect();
        if round % 2 == 0 {
            gate.open();
            expected += 3;
        } else {
            gate.cancel();
        }
        threads.push(thread(2));
        for thread in threads {
            assert_eq!(is_cancelled(thread.join()), round % 2 == 1);
        }
        assert_eq!(ran.load(Ordering::SeqCst), expected);
        assert_eq!(dropped.load(Ordering::SeqCst), 3 * (round + 1));
    }
}
