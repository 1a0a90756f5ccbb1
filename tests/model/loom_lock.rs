//! `src/sync/lock.rs` as it is, over a model of the kernel's futex, in every interleaving that
//! loom finds.

use std::sync::OnceLock;

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

#[expect(
    dead_code,
    reason = "the crate's own file, of which a part is used here"
)]
#[path = "../../src/sync/lock.rs"]
mod lock;

mod sys {
    pub(crate) use crate::futex;
}

/// Stands in for `src/sys/futex.rs`.
mod futex {
    use std::sync::atomic::Ordering;

    use loom::sync::atomic::AtomicU32;
    use loom::sync::{Condvar, Mutex};

    use super::OnceLock;

    struct Kernel {
        word: AtomicU32,
        /// What the kernel's hash bucket lock does: a waiter that saw the expected value is asleep
        /// before anyone can wake.
        bucket: Mutex<()>,
        asleep: Condvar,
    }

    pub(crate) struct Word {
        start: u32,
        kernel: OnceLock<Kernel>,
    }

    impl Word {
        // loom's types cannot be made in a const fn, so the first use makes them.
        pub(crate) const fn new(value: u32) -> Self {
            Word {
                start: value,
                kernel: OnceLock::new(),
            }
        }

        fn kernel(&self) -> &Kernel {
            self.kernel.get_or_init(|| Kernel {
                word: AtomicU32::new(self.start),
                bucket: Mutex::new(()),
                asleep: Condvar::new(),
            })
        }

        pub(crate) fn change(&self, from: u32, to: u32) -> bool {
            let word = &self.kernel().word;
            word.compare_exchange(from, to, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
        }

        pub(crate) fn load(&self) -> u32 {
            // The lock spins on this. loom explores the spinning for ever unless it knows that nothing
            // is gained by it, so here the lock is always seen taken.
            1
        }

        pub(crate) fn swap(&self, value: u32) -> u32 {
            self.kernel().word.swap(value, Ordering::AcqRel)
        }

        pub(crate) fn wait(&self, expected: u32) {
            let kernel = self.kernel();
            let bucket = kernel.bucket.lock().expect("loom does not poison");
            if kernel.word.load(Ordering::Relaxed) == expected {
                drop(kernel.asleep.wait(bucket).expect("loom does not poison"));
            }
        }

        pub(crate) fn wake_one(&self) {
            let kernel = self.kernel();
            let _bucket = kernel.bucket.lock().expect("loom does not poison");
            kernel.asleep.notify_one();
        }
    }
}

struct Counter(UnsafeCell<u32>);

// SAFETY: reached through the lock only, which is what loom checks.
unsafe impl Send for Counter {}

fn add_one(lock: &lock::Lock<Counter>) {
    // loom reports two threads in here at once, or one that does not see the other's write.
    lock.lock().0.with_mut(|n| {
        // SAFETY: the lock is held.
        unsafe { *n += 1 }
    });
}

fn total(lock: &lock::Lock<Counter>) -> u32 {
    // SAFETY: the lock is held.
    lock.lock().0.with(|n| unsafe { *n })
}

fn many(threads: usize, rounds: usize, preemptions: Option<usize>) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(move || {
        let lock = Arc::new(lock::Lock::new(Counter(UnsafeCell::new(0))));
        // Makes loom's types before the lock is shared.
        assert_eq!(total(&lock), 0);
        let work = move |lock: &lock::Lock<Counter>| (0..rounds).for_each(|_| add_one(lock));
        let others: Vec<_> = (1..threads)
            .map(|_| {
                let lock = lock.clone();
                thread::spawn(move || work(&lock))
            })
            .collect();
        work(&lock);
        for other in others {
            other.join().expect("did not panic");
        }
        assert_eq!(total(&lock), (threads * rounds) as u32);
    });
}

/// A lost wake-up would be a deadlock, which loom reports.
#[test]
fn two_threads() {
    many(2, 2, None);
}

#[test]
fn three_threads() {
    many(3, 1, Some(3));
}
