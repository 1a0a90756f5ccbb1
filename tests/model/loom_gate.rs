//! `src/sync/entrance.rs`, the core of `StartGate`, as it is, over a model of the kernel's futex, in every interleaving
//! that loom finds. A thread that sleeps for ever is a deadlock, which loom reports.

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

#[path = "../../src/sync/entrance.rs"]
mod entrance;

mod sys {
    pub(crate) use crate::futex;
}

/// Stands in for `src/sys/futex.rs`.
mod futex {
    use std::sync::atomic::Ordering;

    use loom::sync::atomic::AtomicU32;
    use loom::sync::{Condvar, Mutex};

    #[derive(Debug)]
    pub(crate) struct Word {
        word: AtomicU32,
        /// What the kernel's hash bucket lock does: a waiter that saw the expected value is asleep
        /// before anyone can wake.
        bucket: Mutex<()>,
        asleep: Condvar,
    }

    impl Word {
        pub(crate) fn new(value: u32) -> Self {
            Word {
                word: AtomicU32::new(value),
                bucket: Mutex::new(()),
                asleep: Condvar::new(),
            }
        }

        pub(crate) fn read(&self) -> u32 {
            self.word.load(Ordering::Acquire)
        }

        pub(crate) fn publish(&self, from: u32, to: u32) -> bool {
            self.word
                .compare_exchange(from, to, Ordering::Release, Ordering::Relaxed)
                .is_ok()
        }

        pub(crate) fn wait(&self, expected: u32) {
            let bucket = self.bucket.lock().expect("loom does not poison");
            if self.word.load(Ordering::Relaxed) == expected {
                drop(self.asleep.wait(bucket).expect("loom does not poison"));
            }
        }

        pub(crate) fn wake_all(&self) {
            let _bucket = self.bucket.lock().expect("loom does not poison");
            self.asleep.notify_all();
        }
    }
}

/// What the creator writes before it opens, and what was moved into each thread.
struct Prepared {
    entrance: entrance::Entrance,
    prepared: UnsafeCell<u32>,
}

// SAFETY: `prepared` is written before the decision and read behind it, which is what loom checks.
unsafe impl Sync for Prepared {}
// SAFETY: plain data.
unsafe impl Send for Prepared {}

fn shared() -> Arc<Prepared> {
    Arc::new(Prepared {
        entrance: entrance::Entrance::new(),
        prepared: UnsafeCell::new(0),
    })
}

/// A thread's way through the gate. Returns whether it was let in, and drops its reference.
fn pass(shared: Arc<Prepared>) -> bool {
    let open = shared.entrance.wait();
    if open {
        // SAFETY: written before the gate was opened.
        assert_eq!(shared.prepared.with(|value| unsafe { *value }), 7);
    }
    open
}

fn decided_once(waiting: usize, open: bool, preemptions: Option<usize>) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(move || {
        let gate = shared();
        let threads: Vec<_> = (0..waiting)
            .map(|_| {
                let gate = gate.clone();
                thread::spawn(move || pass(gate))
            })
            .collect();
        // SAFETY: no thread reads it before the gate is open.
        gate.prepared.with_mut(|value| unsafe { *value = 7 });
        gate.entrance.decide(open);
        // The gate may be gone before a thread has woken.
        drop(gate);
        for thread in threads {
            assert_eq!(thread.join().expect("did not panic"), open);
        }
    });
}

#[test]
fn all_that_wait_run() {
    decided_once(2, true, Some(3));
}

#[test]
fn none_that_waits_runs() {
    decided_once(2, false, Some(3));
    decided_once(3, false, Some(2));
}

/// A scope that panics cancels while another thread opens: one of the two decides for all.
#[test]
fn two_that_decide_at_once_give_one_answer() {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(|| {
        let gate = shared();
        // SAFETY: before any other thread exists.
        gate.prepared.with_mut(|value| unsafe { *value = 7 });
        let waiting: Vec<_> = (0..2)
            .map(|_| {
                let gate = gate.clone();
                thread::spawn(move || pass(gate))
            })
            .collect();
        let other = gate.clone();
        let opener = thread::spawn(move || other.entrance.decide(true));
        gate.entrance.decide(false);
        let answers: Vec<_> = waiting
            .into_iter()
            .map(|thread| thread.join().expect("did not panic"))
            .collect();
        opener.join().expect("did not panic");
        assert_eq!(answers[0], answers[1]);
    });
}
