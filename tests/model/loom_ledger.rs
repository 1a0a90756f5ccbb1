//! `src/stack/ledger/` as it is, in every interleaving that loom finds: the threads that give and
//! take, and the kernel as one more thread that clears tid words whenever it likes.
//!
//! What each run must show: no stack is in two hands at once, none is handed out or unmapped before
//! the kernel has cleared the tid word, none is lost, and the accounts add up at the end and in between.

#[expect(
    dead_code,
    reason = "the crate's own file, of which a part is used here"
)]
#[path = "../../src/stack/ledger/mod.rs"]
mod ledger;

mod sync {
    pub(crate) use crate::lock;
}

/// Stands in for `src/sync/lock.rs` (which `loom_lock.rs` checks).
mod lock {
    use std::cell::UnsafeCell;
    use std::ops::{Deref, DerefMut};
    use std::sync::OnceLock;

    pub(crate) struct Lock<T> {
        // loom's types cannot be made in a const fn, so the first use makes them.
        mutex: OnceLock<loom::sync::Mutex<()>>,
        value: UnsafeCell<T>,
    }

    // SAFETY: as for the real lock.
    unsafe impl<T: Send> Sync for Lock<T> {}

    impl<T> Lock<T> {
        pub(crate) const fn new(value: T) -> Self {
            Lock {
                mutex: OnceLock::new(),
                value: UnsafeCell::new(value),
            }
        }

        pub(crate) fn lock(&self) -> Guard<'_, T> {
            let mutex = self.mutex.get_or_init(|| loom::sync::Mutex::new(()));
            Guard {
                _held: mutex.lock().expect("loom does not poison"),
                value: &self.value,
            }
        }

        pub(crate) unsafe fn reset(&self) {
            unreachable!("no model forks")
        }
    }

    pub(crate) struct Guard<'a, T> {
        _held: loom::sync::MutexGuard<'a, ()>,
        value: &'a UnsafeCell<T>,
    }

    impl<T> Deref for Guard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            // SAFETY: the mutex is held.
            unsafe { &*self.value.get() }
        }
    }

    impl<T> DerefMut for Guard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            // SAFETY: the mutex is held.
            unsafe { &mut *self.value.get() }
        }
    }

    /// As the real one, with loom's cell beside it, which reports an access without the lock.
    pub(crate) struct Guarded<T> {
        watch: OnceLock<loom::cell::UnsafeCell<()>>,
        value: UnsafeCell<T>,
    }

    // SAFETY: as for the real cell.
    unsafe impl<T: Send> Sync for Guarded<T> {}

    impl<T: Copy> Guarded<T> {
        pub(crate) const fn new(value: T) -> Self {
            Guarded {
                watch: OnceLock::new(),
                value: UnsafeCell::new(value),
            }
        }

        fn watch(&self) -> &loom::cell::UnsafeCell<()> {
            self.watch.get_or_init(|| loom::cell::UnsafeCell::new(()))
        }

        pub(crate) unsafe fn get(&self) -> T {
            // SAFETY: the lock is held, by the caller's promise.
            self.watch().with(|_| unsafe { *self.value.get() })
        }

        pub(crate) unsafe fn set(&self, value: T) {
            // SAFETY: the lock is held, by the caller's promise.
            self.watch()
                .with_mut(|_| unsafe { *self.value.get() = value })
        }
    }
}

use std::sync::atomic::{AtomicBool as StdBool, AtomicUsize as StdUsize, Ordering::SeqCst};

use ledger::accounts::Tally;
use ledger::class::{Class, fit};
use ledger::{Budget, Entry, Ledger, Links, State, Victims};
use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

struct Stack {
    id: usize,
    links: Links<Stack>,
    /// The tid word is not zero.
    held: AtomicBool,
    /// The thread is to give the stack back itself.
    detached: AtomicBool,
    /// What the thread writes on its stack. loom reports the next user if it does not see the last
    /// one gone.
    memory: UnsafeCell<usize>,
    // Not loom's: these only count, and shall order nothing.
    users: StdUsize,
    mapped: StdBool,
    /// Bytes that mincore(2) would find, at most [`Entry::resident`].
    touched: StdUsize,
}

// SAFETY: `memory` is what loom watches, the rest is Sync.
unsafe impl Sync for Stack {}

// SAFETY: `links` returns the entry's own field.
unsafe impl Entry for Stack {
    fn links(&self) -> &Links<Self> {
        &self.links
    }
    fn class(&self) -> Option<Class> {
        Some(class())
    }
    fn bytes(&self) -> usize {
        100
    }
    fn resident(&self) -> usize {
        10
    }
    fn measure(&self) -> Option<usize> {
        Some(self.touched.load(SeqCst))
    }
    fn released(&self) -> bool {
        !self.held.load(Ordering::Acquire)
    }
    fn is_discarded(&self) -> bool {
        true
    }
}

fn class() -> Class {
    fit(4096, 4096, 4096).expect("small").class
}

impl Stack {
    /// A thread starts and runs on the stack.
    fn run(&self) {
        assert!(self.mapped.load(SeqCst), "{} is unmapped", self.id);
        assert_eq!(
            self.users.fetch_add(1, SeqCst),
            0,
            "{} is in two hands",
            self.id
        );
        self.held.store(true, Ordering::Relaxed);
        // SAFETY: loom checks that no other thread is here.
        self.memory.with_mut(|n| unsafe { *n += 1 });
    }

    /// The kernel's part of a thread's end.
    fn clear_tid(&self) {
        // The thread uses its stack to its last instruction.
        // SAFETY: loom checks that no other thread is here.
        self.memory.with_mut(|n| unsafe { *n += 1 });
        self.users.fetch_sub(1, SeqCst);
        self.held.store(false, Ordering::Release);
    }

    fn unmap(&self) {
        assert_eq!(
            self.users.load(SeqCst),
            0,
            "{} is unmapped under its thread",
            self.id
        );
        // SAFETY: loom checks that no other thread is here.
        self.memory.with_mut(|n| unsafe { *n = 0 });
        assert!(
            self.mapped.swap(false, SeqCst),
            "{} is unmapped twice",
            self.id
        );
    }
}

type SharedLedger = &'static Ledger<Stack>;

fn leaked(budget: Budget) -> SharedLedger {
    Box::leak(Box::new(Ledger::new(budget)))
}

/// A live stack that a thread runs on.
fn running(ledger: SharedLedger, id: usize) -> &'static Stack {
    let stack = free(ledger, id);
    stack.run();
    stack
}

/// A live stack without a thread.
fn free(ledger: SharedLedger, id: usize) -> &'static Stack {
    let stack: &'static Stack = Box::leak(Box::new(Stack {
        id,
        links: Links::new(),
        held: AtomicBool::new(false),
        detached: AtomicBool::new(false),
        memory: UnsafeCell::new(0),
        users: StdUsize::new(0),
        mapped: StdBool::new(true),
        touched: StdUsize::new(10),
    }));
    ledger.adopt(stack);
    stack
}

fn unmap(mut victims: Victims<'_, Stack>) {
    while let Some(stack) = victims.pop() {
        stack.unmap();
        victims.unmapped();
    }
}

/// As munmap at the mapping limit.
fn fail_to_unmap(mut victims: Victims<'_, Stack>) {
    while let Some(stack) = victims.pop() {
        assert_eq!(
            stack.users.load(SeqCst),
            0,
            "{} is unmapped under its thread",
            stack.id
        );
    }
}

/// A thread starts on a cached stack, if there is one, ends, and is joined.
fn spawn_and_join(ledger: SharedLedger) {
    let (found, victims) = ledger.take(class(), true);
    unmap(victims);
    if let Some(stack) = found {
        stack.run();
        stack.clear_tid();
        unmap(ledger.give(stack));
    }
}

fn add_up(ledger: SharedLedger, all: &[&'static Stack]) {
    let mapped = all.iter().filter(|stack| stack.mapped.load(SeqCst)).count();
    let stats = ledger.stats();
    assert_eq!(
        stats.mapped(),
        Tally {
            stacks: mapped,
            bytes: mapped * 100,
            ..stats.mapped()
        }
    );
    assert_eq!((stats.refused, stats.unmapping), (0, Tally::default()));
    let mut listed = 0;
    ledger.for_each(|stack, state| {
        listed += 1;
        assert!(stack.mapped.load(SeqCst));
        assert_ne!(state, State::Gone);
    });
    assert_eq!(listed, mapped);
    // Whatever happened, everything can be had back.
    unmap(ledger.clear());
    assert_eq!(
        ledger.stats().mapped(),
        ledger.stats().live,
        "something is stuck"
    );
}

fn check(preemptions: usize, f: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.max_branches = 10_000;
    let runs = std::sync::Arc::new(StdUsize::new(0));
    let count = runs.clone();
    builder.check(move || {
        count.fetch_add(1, SeqCst);
        f();
    });
    println!("{} interleavings", runs.load(SeqCst));
}

const ROOMY: Budget = Budget::resident(1000);

fn spawn(f: impl FnOnce() + 'static) -> thread::JoinHandle<()> {
    thread::spawn(f)
}

/// A detached thread gives its stack back while it runs on it; the kernel clears the word at any
/// time; another thread wants a stack all the while.
#[test]
fn detached() {
    check(5, || {
        let ledger = leaked(ROOMY);
        let stack = running(ledger, 0);
        let given = Arc::new(loom::sync::Notify::new());
        let leaving = {
            let given = given.clone();
            spawn(move || {
                assert!(ledger.give_running(stack));
                given.notify();
            })
        };
        let kernel = spawn(move || {
            given.wait();
            stack.clear_tid();
        });
        spawn_and_join(ledger);
        spawn_and_join(ledger);
        leaving.join().expect("did not panic");
        kernel.join().expect("did not panic");
        assert_eq!(ledger.stats().mapped().stacks, 1);
        add_up(ledger, &[stack]);
    });
}

/// Two threads end, two are wanted: four pairs of hands.
#[test]
fn two_give_and_two_take() {
    check(3, || {
        let ledger = leaked(ROOMY);
        let stacks = [running(ledger, 0), running(ledger, 1)];
        let leaving = stacks.map(|stack| {
            spawn(move || {
                unmap(ledger.give(stack));
                stack.clear_tid();
            })
        });
        let taking = spawn(move || spawn_and_join(ledger));
        spawn_and_join(ledger);
        for thread in leaving.into_iter().chain([taking]) {
            thread.join().expect("did not panic");
        }
        add_up(ledger, &stacks);
        assert!(ledger.stats().mapped().stacks == 0);
    });
}

/// Both joiners' stacks are free at once, the budget holds one: the other goes, whichever thread gave it.
#[test]
fn over_the_budget() {
    check(5, || {
        let ledger = leaked(Budget { stacks: 1, ..ROOMY });
        let stacks = [free(ledger, 0), free(ledger, 1)];
        let other = spawn(move || unmap(ledger.give(stacks[0])));
        unmap(ledger.give(stacks[1]));
        spawn_and_join(ledger);
        other.join().expect("did not panic");
        let stats = ledger.stats();
        assert_eq!(
            (stats.cached.stacks, stats.mapped().stacks, stats.evictions),
            (1, 1, 1)
        );
        add_up(ledger, &stacks);
    });
}

/// Trimming (with munmap that fails, then works) against a thread that ends and one that starts.
#[test]
fn trim_against_give_and_take() {
    check(4, || {
        let ledger = leaked(ROOMY);
        let stacks = [free(ledger, 0), running(ledger, 1)];
        unmap(ledger.give(stacks[0]));
        let leaving = spawn(move || {
            unmap(ledger.give(stacks[1]));
            stacks[1].clear_tid();
        });
        let trimming = spawn(move || {
            fail_to_unmap(ledger.trim(0));
            unmap(ledger.trim(0));
        });
        spawn_and_join(ledger);
        leaving.join().expect("did not panic");
        trimming.join().expect("did not panic");
        add_up(ledger, &stacks);
    });
}

/// Two clear at once while the budget changes; each stack goes once, and the record is used again.
#[test]
fn clear_twice_and_adopt_again() {
    check(4, || {
        let ledger = leaked(ROOMY);
        let stacks = [free(ledger, 0), free(ledger, 1)];
        unmap(ledger.give(stacks[0]));
        unmap(ledger.give(stacks[1]));
        let other = spawn(move || {
            ledger.set_budget(Budget::NOTHING);
            unmap(ledger.keep_budget())
        });
        let mut victims = ledger.clear();
        while let Some(stack) = victims.pop() {
            stack.unmap();
            victims.unmapped();
            stack.mapped.store(true, SeqCst);
            ledger.adopt(stack);
        }
        drop(victims);
        other.join().expect("did not panic");
        add_up(ledger, &stacks);
    });
}

/// A stack is measured while another thread takes it, uses more of it, gives it back, and has it measured as well. The
/// first number is of another time: the accounts never say less than what is in memory.
#[test]
fn measured_while_it_is_taken() {
    check(3, || {
        let ledger = leaked(ROOMY);
        let stacks = [free(ledger, 0), free(ledger, 1)];
        for stack in stacks {
            stack.touched.store(1, SeqCst);
            unmap(ledger.give(stack));
        }
        ledger.set_budget(Budget::resident(15));
        let measuring = spawn(move || unmap(ledger.keep_budget()));
        let taken = [(); 2].map(|()| {
            let (found, victims) = ledger.take(class(), true);
            unmap(victims);
            found.expect("two are cached, and fit the budget once one is measured")
        });
        for (stack, touched) in taken.into_iter().rev().zip([4, 10]) {
            stack.run();
            stack.touched.store(touched, SeqCst);
            stack.clear_tid();
            unmap(ledger.give(stack));
        }
        measuring.join().expect("did not panic");
        let mut in_memory = 0;
        ledger.for_each(|stack, _| in_memory += stack.touched.load(SeqCst));
        let cached = ledger.stats().cached;
        assert!(
            cached.resident >= in_memory,
            "{cached:?}, {in_memory} in memory"
        );
        assert!(cached.resident <= 15, "{cached:?} is over the budget");
        add_up(ledger, &stacks);
    });
}

/// Two threads sweep while one detached thread is killed and another ends in good order.
#[test]
fn sweep() {
    check(4, || {
        let ledger = leaked(ROOMY);
        let stacks = [running(ledger, 0), running(ledger, 1)];
        for stack in stacks {
            stack.detached.store(true, Ordering::Relaxed);
        }
        let unowned = |stack: &Stack| stack.detached.swap(false, Ordering::AcqRel);
        let killed = spawn(move || stacks[0].clear_tid());
        let leaving = spawn(move || {
            stacks[1].detached.store(false, Ordering::Relaxed);
            assert!(ledger.give_running(stacks[1]));
            stacks[1].clear_tid();
        });
        unmap(ledger.sweep(unowned, |_| ()));
        spawn_and_join(ledger);
        unmap(ledger.sweep(unowned, |_| ()));
        killed.join().expect("did not panic");
        leaving.join().expect("did not panic");
        unmap(ledger.sweep(unowned, |_| ()));
        assert_eq!(ledger.stats().live.stacks, 0, "an unowned stack is left");
        add_up(ledger, &stacks);
    });
}

/// A private cache ends while its last thread is on the way out and the global one is in use. The thread gives its
/// stack to the ledger that has it by then.
#[test]
fn hand_over() {
    check(4, || {
        let (private, global) = (leaked(ROOMY), leaked(ROOMY));
        let stacks = [running(private, 0), free(private, 1)];
        let leaving = spawn(move || {
            if Ledger::owner_of(stacks[0]) != private.id() || !private.give_running(stacks[0]) {
                assert!(global.give_running(stacks[0]));
            }
            stacks[0].clear_tid();
        });
        let last_handle = spawn(move || {
            unmap(private.give(stacks[1]));
            unmap(private.hand_over(global));
        });
        spawn_and_join(global);
        unmap(global.trim(0));
        leaving.join().expect("did not panic");
        last_handle.join().expect("did not panic");
        assert_eq!(private.stats().mapped(), Tally::default());
        add_up(global, &stacks);
    });
}
