//! What a child of fork(3) can do, whichever thread has forked, and what its copies of handles answer.

use super::process::{fork, forked, is_good, wait};
use super::{assert_gone, spawn_and_join, wait_until};
use nptl::{Builder, JoinHandle, StackCache, StackCacheConfig};
use std::cell::RefCell;
use std::hint::black_box;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Barrier, Condvar, Mutex};
use std::time::Duration;
use support::{Warden, alone, listed_threads, or_skip};

/// Nested threads, scoped ones, and a detached one.
pub fn use_threads() {
    for round in 0..3_u8 {
        let handle = nptl::spawn(move || {
            let block = black_box(vec![round; 2000]);
            let inner = nptl::spawn(|| 5).unwrap();
            inner.join().unwrap() + block.len()
        });
        assert_eq!(handle.unwrap().join().unwrap(), 2005);
    }
    let sum: usize = nptl::scope(|scope| {
        let handles = [0, 1, 2, 3].map(|index| scope.spawn(move || index).unwrap());
        handles
            .into_iter()
            .map(|handle| handle.join().unwrap())
            .sum()
    });
    assert_eq!(sum, 6);
    nptl::spawn(|| ()).unwrap().detach();
}

/// So many threads at once, each of which fills a part of its stack and finds it unchanged in the end.
pub fn hold_many(count: usize) {
    let all = Barrier::new(count);
    nptl::scope(|scope| {
        let body = |index: usize| {
            let all = &all;
            move || {
                let mut pattern = [index as u8; 4096];
                black_box(&mut pattern);
                all.wait();
                let is_whole = pattern.iter().all(|&byte| byte == index as u8);
                all.wait();
                is_whole
            }
        };
        let handles: Vec<_> = (0..count)
            .map(|index| scope.spawn(body(index)).unwrap())
            .collect();
        for handle in handles {
            assert!(handle.join().unwrap(), "two threads on one stack");
        }
    });
}

/// Whether the running threads of the crowd may end.
static MAY_END: Mutex<bool> = Mutex::new(false);
static ENDS: Condvar = Condvar::new();

/// Threads of ours in every state, so many of each.
struct Crowd {
    private: StackCache,
    running: Vec<JoinHandle<u8>>,
    ended: Vec<JoinHandle<u8>>,
    panicked: Vec<JoinHandle<u8>>,
    /// Held at exit(2): the result is stored, the tid word is not cleared yet.
    ending: Vec<JoinHandle<u8>>,
}

impl Crowd {
    fn new(count: usize, warden: &Warden) -> Crowd {
        static GO: AtomicBool = AtomicBool::new(false);
        *MAY_END.lock().unwrap() = false;
        let private = StackCache::new(StackCacheConfig::default());
        let builder = |index: usize| match index % 2 {
            0 => Builder::new(),
            _ => Builder::new().stack_cache(&private),
        };
        let start = |body: fn() -> u8| -> Vec<_> {
            let start = |index| builder(index).spawn(body).unwrap();
            (0..count).map(start).collect()
        };
        let live = || {
            let may_end = MAY_END.lock().unwrap();
            drop(ENDS.wait_while(may_end, |may_end| !*may_end).unwrap());
            7
        };
        let go = || {
            while !GO.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            8
        };
        GO.store(false, Ordering::SeqCst);
        let ending = start(go);
        let ending_alone = start(go);
        let tids: Vec<_> = ending
            .iter()
            .chain(&ending_alone)
            .map(JoinHandle::tid)
            .collect();
        tids.iter().for_each(|tid| warden.hold(*tid));
        ending_alone.into_iter().for_each(JoinHandle::detach);
        GO.store(true, Ordering::SeqCst);
        tids.iter().for_each(|tid| warden.wait_until_held(*tid));
        let ended = start(|| 9);
        let panicked = start(|| resume_unwind(Box::new(10_u8)));
        wait_until("their ends", || {
            ended.iter().chain(&panicked).all(JoinHandle::is_finished)
        });
        start(live).into_iter().for_each(JoinHandle::detach);
        start(|| 0).into_iter().for_each(JoinHandle::detach);
        // A cache without an owner, one of whose threads lives.
        let gone = StackCache::new(StackCacheConfig::default());
        let mut running = start(live);
        if count > 0 {
            let builder = Builder::new().stack_cache(&gone);
            running.push(builder.clone().spawn(live).unwrap());
            builder.spawn(|| 0).unwrap().join().unwrap();
        }
        Crowd {
            private,
            running,
            ended,
            panicked,
            ending,
        }
    }

    /// In the child, at once.
    fn check_copies(self) {
        for handle in self.running {
            assert_gone(&handle);
            assert!(handle.join().is_err());
        }
        for handle in self.ending {
            assert!(handle.is_finished());
            assert_eq!(handle.try_join().unwrap().unwrap(), 8);
        }
        for handle in self.ended {
            let outcome = handle.join_timeout(Duration::from_secs(60));
            assert_eq!(outcome.unwrap().unwrap(), 9);
        }
        for handle in self.panicked {
            let payload = handle.join().expect_err("a panic");
            assert_eq!(payload.downcast_ref(), Some(&10_u8));
        }
        let builder = Builder::new().stack_cache(&self.private);
        builder.spawn(|| ()).unwrap().join().unwrap();
    }

    fn finish(self) {
        *MAY_END.lock().unwrap() = true;
        ENDS.notify_all();
        let join = |handle: JoinHandle<u8>| handle.join().unwrap();
        assert!(self.running.into_iter().all(|handle| join(handle) == 7));
        assert!(self.ending.into_iter().all(|handle| join(handle) == 8));
        assert!(self.ended.into_iter().all(|handle| join(handle) == 9));
        assert!(
            self.panicked
                .into_iter()
                .all(|handle| handle.join().is_err())
        );
    }
}

/// The status of a child whose end was exit(3), which runs what atexit(3) registered; the kernel's end of a process
/// without threads does not.
const EXITED: i32 = 7;

extern "C" fn exited() {
    // SAFETY: ends the process.
    unsafe { libc::_exit(EXITED) }
}

/// A thread of ours forks beside others in every state. Its child has a hundred threads at once, then calls exit(3), or
/// returns from the closure: the last thread of a process calls exit(3).
#[test]
fn a_thread_forks_beside_others_in_every_state() {
    let test = "child::a_thread_forks_beside_others_in_every_state";
    alone(test, || {
        let warden = or_skip!(Warden::new(&[libc::SYS_exit]));
        for (count, returns) in [0, 1, 6].into_iter().flat_map(|n| [(n, false), (n, true)]) {
            let crowd = Crowd::new(count, &warden);
            let (sender, receiver) = channel();
            let body = move || {
                let pid = forked(fork);
                if pid > 0 {
                    sender.send(wait(pid)).unwrap();
                    return Some(crowd);
                }
                // Only this thread's own channel: its receiver's thread is not here.
                std::mem::forget(sender);
                let work = std::panic::AssertUnwindSafe(|| {
                    crowd.check_copies();
                    use_threads();
                    hold_many(100);
                    StackCache::global().trim(0);
                    StackCache::global().clear();
                    use_threads();
                });
                if std::panic::catch_unwind(work).is_err() {
                    // SAFETY: none of the parent's destructors may run.
                    unsafe { libc::_exit(1) };
                }
                // SAFETY: a function of this program; only exit(3) calls it.
                unsafe { libc::atexit(exited) };
                if !returns {
                    // SAFETY: what was registered first ends the process.
                    unsafe { libc::exit(0) };
                }
                None
            };
            let handle = nptl::spawn(body).unwrap();
            let status = receiver.recv().unwrap();
            warden.release_all();
            let crowd = handle.join().unwrap().expect("the parent's");
            assert_eq!(status, EXITED << 8, "{count} of each, returns: {returns}");
            crowd.finish();
        }
    });
}

/// The first spawn takes a stack that was cached in the parent, and copies of handles give theirs back.
#[test]
fn the_caches_serve() {
    alone("child::the_caches_serve", || {
        support::burst(&Builder::new(), 6);
        let (end, wait) = channel::<()>();
        let living = nptl::spawn(move || wait.recv().is_err()).unwrap();
        let ended = nptl::spawn(|| 8).unwrap();
        wait_until("its end", || ended.is_finished());
        let before = StackCache::global().stats();
        assert!(before.cached_stacks > 2);
        let mut handles = Some((living, ended));
        assert!(is_good(fork, || {
            spawn_and_join();
            let first = StackCache::global().stats();
            assert_eq!(first.hits, before.hits + 1, "{first:?}");
            assert_eq!(first.mapped_stacks, before.mapped_stacks, "{first:?}");
            let (living, ended) = handles.take().unwrap();
            assert!(living.join().is_err());
            drop(ended);
            let now = StackCache::global().stats();
            assert_eq!(now.cached_stacks, first.cached_stacks + 2, "{now:?}");
            assert_eq!(now.live_stacks, 0, "{now:?}");
            use_threads();
            // A child's child, and what its parent leaves is in order as well.
            assert!(is_good(fork, use_threads));
            use_threads();
        }));
        drop(end);
        let (living, ended) = handles.take().unwrap();
        assert!(living.join().unwrap());
        assert_eq!(ended.join().unwrap(), 8);
        use_threads();
    });
}

thread_local! {
    static FORKS: ForksAtItsEnd = const { ForksAtItsEnd(RefCell::new(None)) };
}

struct ForksAtItsEnd(RefCell<Option<Sender<i32>>>);

impl Drop for ForksAtItsEnd {
    fn drop(&mut self) {
        let sender = self.0.borrow_mut().take().expect("a channel");
        let pid = forked(fork);
        if pid == 0 {
            // Spawning works here, too; then this thread goes on to its end, the last one.
            use_threads();
            std::mem::forget(sender);
            return;
        }
        sender.send(wait(pid)).expect("a receiver");
    }
}

/// It goes on to its end in the child, the last thread there.
#[test]
fn a_thread_forks_in_a_destructor_of_its_own() {
    let test = "child::a_thread_forks_in_a_destructor_of_its_own";
    alone(test, || {
        for round in 0..40 {
            let (sender, receiver) = channel();
            // The first to register is the last to run: the channel's own thread-locals are gone by then or never were.
            let body = move || FORKS.with(|forks| *forks.0.borrow_mut() = Some(sender));
            let mut handle = Some(nptl::spawn(body).unwrap());
            if round % 2 == 0 {
                handle.take().unwrap().detach();
            }
            assert_eq!(receiver.recv().unwrap(), 0, "round {round}");
            if let Some(handle) = handle {
                handle.join().unwrap();
            }
        }
        spawn_and_join();
    });
}

/// Whether the thread still runs: not gone, not a zombie (a leader that has ended stays one until the process ends).
fn task_exists(tid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z ") && !stat.contains(") X "))
}

/// The forking thread ends first; a thread that is never joined is the last of the child, and calls exit(3).
#[test]
fn a_detached_thread_outlives_the_forking_one() {
    let test = "child::a_detached_thread_outlives_the_forking_one";
    alone(test, || {
        for round in 0..20 {
            let body = || {
                let pid = forked(fork);
                if pid > 0 {
                    return wait(pid);
                }
                // SAFETY: a function of this program; only exit(3) calls it.
                unsafe { libc::atexit(exited) };
                let first = support::tid();
                let outlive = move || {
                    while task_exists(first) {
                        std::thread::yield_now();
                    }
                };
                nptl::spawn(outlive).unwrap().detach();
                0
            };
            let status = nptl::spawn(body).unwrap().join().unwrap();
            assert_eq!(status, EXITED << 8, "round {round}");
        }
        spawn_and_join();
    });
}

/// The blocks of threads that stayed behind are off glibc's list at once: taking them off again, when their handles are
/// joined, must not take a living thread along, which setuid would then miss.
#[test]
fn joining_copies_keeps_the_living_listed() {
    alone("child::joining_copies_keeps_the_living_listed", || {
        let start = || {
            let (end, wait) = channel::<()>();
            (end, nptl::spawn(move || wait.recv().is_err()).unwrap())
        };
        let (first_end, first) = start();
        let (second_end, second) = start();
        let mut copies = Some([second, first]);
        assert!(is_good(fork, || {
            let (_end, living) = start();
            let listed = || listed_threads().contains(&(living.as_pthread_t() as usize));
            assert!(listed());
            for copy in copies.take().unwrap() {
                assert!(copy.join().is_err() && listed());
            }
            std::mem::forget(living);
        }));
        drop((first_end, second_end));
        for handle in copies.take().unwrap() {
            assert!(handle.join().unwrap());
        }
    });
}
