//! A refusal at every step, of every thread of a group behind a gate: what was moved in comes back as it was, and the
//! others end without having run.

use super::failure::{CALLS_OF_A_SPAWN, CASES, Case, as_is, obstructed};
use super::no_memory::with_memory_for;
use nix::errno::Errno;
use nptl::{
    Builder, Cancelled, CoreScheduling, JoinHandle, RetryPolicy, Scheduler, SetupError, SpawnError,
    StackCache, StackCacheConfig, StartGate, Step,
};
use std::convert::Infallible;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use support::{alone, or_skip, supervised};

/// What only a thread with settings meets, and the steps that no system call decides.
const MORE: &[Case] = &[
    Case {
        name: "a size that cannot be",
        step: Step::Attributes,
        errno: Errno::EINVAL,
        refuse: |_| None,
        configure: |builder| builder.stack_size(usize::MAX),
    },
    Case {
        name: "no heap",
        step: Step::Allocate,
        errno: Errno::ENOMEM,
        refuse: |_| None,
        configure: as_is,
    },
    Case {
        name: "no such CPU",
        step: Step::Affinity,
        errno: Errno::EINVAL,
        refuse: |_| None,
        configure: |builder| builder.cpu_affinity([8191]),
    },
    Case {
        name: "sched_setattr EPERM",
        step: Step::Scheduler,
        errno: Errno::EPERM,
        refuse: |call| (call.number == libc::SYS_sched_setattr).then_some(libc::EPERM),
        configure: |builder| builder.scheduler(Scheduler::Idle),
    },
    Case {
        name: "no cgroup",
        step: Step::Cgroup,
        errno: Errno::ENOTDIR,
        refuse: |_| None,
        configure: |builder| builder.cgroup(File::open("/").unwrap()),
    },
    Case {
        name: "PR_SCHED_CORE ENODEV",
        step: Step::CoreScheduling,
        errno: Errno::ENODEV,
        refuse: |call| {
            let asks = call.number == libc::SYS_prctl && call.arguments[0] == 62;
            asks.then_some(libc::ENODEV)
        },
        configure: |builder| builder.core_scheduling(CoreScheduling::New),
    },
];

/// Moved into closures: which thread's it is, and how many have been dropped.
struct Moved(Box<usize>, Arc<AtomicUsize>);

impl Drop for Moved {
    fn drop(&mut self) {
        self.1.fetch_add(1, Ordering::SeqCst);
    }
}

#[derive(Clone, Copy, Debug)]
enum Way {
    Closure,
    Value,
    Setup,
}

/// The refusal; and the box that came back, if this way gives something back.
fn refused(builder: Builder, way: Way, moved: Moved, ran: fn()) -> (SpawnError, Option<Moved>) {
    match way {
        Way::Closure => {
            let thread = std::thread::current().id();
            let body = move || {
                if std::thread::current().id() != thread {
                    ran();
                }
                moved
            };
            let (error, back) = builder.spawn_or_return(body).unwrap_err().into_parts();
            (error, Some(back()))
        }
        Way::Value => {
            let refused = builder.spawn_with(moved, move |_| ran());
            let (error, back) = refused.unwrap_err().into_parts();
            (error, Some(back))
        }
        Way::Setup => {
            let setup = move || Ok::<_, Infallible>(moved);
            match builder.spawn_with_setup(setup, move |_| ran()) {
                Err(SetupError::Refused(error)) => (error, None),
                Err(other) => panic!("{other}"),
                Ok::<JoinHandle<()>, _>(_) => panic!("not refused"),
            }
        }
    }
}

static RAN: AtomicUsize = AtomicUsize::new(0);

fn run() {
    RAN.fetch_add(1, Ordering::SeqCst);
}

/// `k` threads at a gate, and the next one is refused.
fn refuse_after(k: usize, case: &Case, way: Way, cache: &StackCache, active: &AtomicBool) {
    let dropped = Arc::new(AtomicUsize::new(0));
    let moved = |number| Moved(Box::new(number), Arc::clone(&dropped));
    let gate = StartGate::new();
    let builder = || {
        Builder::new()
            .retry(RetryPolicy::never())
            .stack_cache(cache)
            .stack_size(300 << 10)
            .start_gate(&gate)
    };
    let others: Vec<_> = (0..k)
        .map(|number| builder().spawn_with(moved(number), |_| run()).unwrap())
        .collect();
    let value = moved(k);
    let place = &raw const *value.0;
    let attempt = || match case.step {
        Step::Allocate => {
            let builder = builder();
            with_memory_for(0, || refused(builder, way, value, run)).0
        }
        _ => refused((case.configure)(builder()), way, value, run),
    };
    let (error, back) = obstructed(case, active, attempt);
    let what = format!("{}, {way:?}, thread {k}: {error}", case.name);
    assert_eq!(
        (error.step(), error.errno().raw()),
        (case.step, case.errno as i32),
        "{what}"
    );
    assert_eq!(error.attempts(), 1, "{what}");
    match &back {
        Some(back) => assert_eq!((*back.0, &raw const *back.0), (k, place), "{what}"),
        None => assert_eq!(dropped.load(Ordering::SeqCst), 1, "{what}"),
    }
    drop(back);
    assert_eq!(dropped.load(Ordering::SeqCst), 1, "{what}");
    drop(gate);
    for thread in others {
        assert!(thread.join().unwrap_err().is::<Cancelled>(), "{what}");
    }
    assert_eq!(dropped.load(Ordering::SeqCst), k + 1, "{what}");
    assert_eq!(RAN.load(Ordering::SeqCst), 0, "{what}");
    assert_eq!(cache.stats().live_stacks, 0, "{what}");
}

#[test]
fn a_refusal_at_every_step_gives_back_and_cancels_the_others() {
    static CURRENT: AtomicUsize = AtomicUsize::new(0);
    alone(
        "gated::a_refusal_at_every_step_gives_back_and_cancels_the_others",
        || {
            // In this order: after the last of these the process makes no clone3 any more.
            let cases: Vec<_> = MORE.iter().chain(CASES).collect();
            let active = &AtomicBool::new(false);
            let mut calls = CALLS_OF_A_SPAWN.to_vec();
            calls.extend([libc::SYS_sched_setattr, libc::SYS_prctl]);
            let done = supervised(
                &calls,
                |call| {
                    let case = cases.get(CURRENT.load(Ordering::Acquire))?;
                    (case.refuse)(call).filter(|_| active.load(Ordering::Acquire))
                },
                || {
                    nptl::prepare().unwrap();
                    let cache = StackCache::new(StackCacheConfig::disabled());
                    for (index, case) in cases.iter().enumerate() {
                        CURRENT.store(index, Ordering::Release);
                        for way in [Way::Closure, Way::Value, Way::Setup] {
                            (0..4).for_each(|k| refuse_after(k, case, way, &cache, active));
                        }
                    }
                },
            );
            or_skip!(done);
        },
    );
}
