//! Children of `_Fork(3)` and of a bare clone(2): glibc does not repair itself there, and can start no thread.

use super::process::{BARE, Fork, fork, forked, in_child, is_good, wait};
use super::{assert_gone, spawn_and_join, wait_until};
use nptl::diagnose::CauseKind;
use nptl::{Builder, JoinHandle, SpawnError, StackCache, StackCacheConfig, Step};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;
use support::{alone, burst, deny, report};

#[track_caller]
pub fn assert_refused(error: &SpawnError) {
    assert_eq!(error.step(), Step::Runtime, "{error}");
    assert_eq!(error.cause().kind(), CauseKind::UnsupportedRuntime);
    assert!(error.to_string().contains("_Fork"), "{error}");
}

/// What handles of threads that ran, or had ended, answer in a bare child.
fn answers_at_once(living: [JoinHandle<()>; 4], ended: [JoinHandle<u8>; 2]) {
    for handle in &living {
        assert_gone(handle);
    }
    let [joined, tried, timed, dropped] = living;
    assert!(joined.join().is_err());
    assert!(tried.try_join().unwrap().is_err());
    assert!(
        timed
            .join_timeout(Duration::from_secs(60))
            .unwrap()
            .is_err()
    );
    drop(dropped);
    let [joined, detached] = ended;
    assert_eq!(joined.join().unwrap(), 8);
    detached.detach();
}

/// Whichever thread has forked. Its handles answer, and its caches are out of use.
#[test]
fn a_spawn_is_refused_and_all_else_answers() {
    alone("bare::a_spawn_is_refused_and_all_else_answers", || {
        let cache = StackCache::new(StackCacheConfig::default());
        let builder = Builder::new().stack_cache(&cache);
        burst(&builder, 3);
        let forks = {
            let (cache, builder) = (cache.clone(), builder.clone());
            move || {
                for how in BARE {
                    let living = [(); 4].map(|()| nptl::spawn(std::thread::park).unwrap());
                    let ended = [(); 2].map(|()| nptl::spawn(|| 8_u8).unwrap());
                    wait_until("their ends", || ended.iter().all(JoinHandle::is_finished));
                    let is_refused = || {
                        assert_refused(&builder.clone().spawn(|| ()).expect_err("none"));
                        assert_refused(&nptl::spawn(|| ()).expect_err("none"));
                        nptl::scope(|scope| assert_refused(&scope.spawn(|| ()).expect_err("none")));
                    };
                    let mut handles = Some((living, ended));
                    let good = is_good(how, || {
                        is_refused();
                        let (living, ended) = handles.take().unwrap();
                        answers_at_once(living, ended);
                        cache.trim(0);
                        cache.set_config(StackCacheConfig::disabled());
                        cache.clear();
                        assert_eq!(cache.stats().mapped_stacks, 0);
                        assert_eq!(StackCache::global().stats().cached_stacks, 0);
                        // Nor has a child of that child threads, which has handlers.
                        assert!(is_good(fork, is_refused));
                        assert!(is_good(how, is_refused));
                        is_refused();
                    });
                    assert!(good);
                    let (living, ended) = handles.take().unwrap();
                    for handle in living {
                        // It goes with the process.
                        assert!(!handle.is_finished());
                    }
                    for handle in ended {
                        assert_eq!(handle.join().unwrap(), 8);
                    }
                }
            }
        };
        forks();
        builder.clone().spawn(forks).unwrap().join().unwrap();
        // The parent has lost nothing.
        assert_eq!(cache.stats().mapped_stacks, 3);
        builder.spawn(|| ()).unwrap().join().unwrap();
    });
}

/// Runs `work` while another thread is inside the ledger, again and again.
fn beside_a_busy_ledger(work: impl FnOnce()) {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                StackCache::global().stats();
            }
        });
        work();
        done.store(true, Ordering::Relaxed);
    });
}

/// Whatever is asked first: nothing waits for the thread that was inside the ledger, and that is not there.
#[test]
fn the_first_question_does_not_wait() {
    alone("bare::the_first_question_does_not_wait", || {
        type Ask = fn(JoinHandle<()>);
        let questions: [(&str, Ask); 9] = [
            ("stats", |_| {
                StackCache::global().stats();
            }),
            ("trim", |_| StackCache::global().trim(0)),
            ("clear", |_| StackCache::global().clear()),
            ("set_config", |_| {
                StackCache::global().set_config(StackCacheConfig::default());
            }),
            ("new", |_| {
                drop(StackCache::new(StackCacheConfig::default()))
            }),
            ("drop of a handle", drop),
            ("is_finished", |handle| assert!(handle.is_finished())),
            ("join", |handle| assert!(handle.join().is_err())),
            ("spawn", |_| drop(nptl::spawn(|| ()).expect_err("none"))),
        ];
        let (end, wait) = channel::<()>();
        let wait = std::sync::Arc::new(std::sync::Mutex::new(wait));
        beside_a_busy_ledger(|| {
            for (name, ask) in questions {
                for round in 0..20 {
                    let wait = std::sync::Arc::clone(&wait);
                    let body = move || wait.lock().unwrap().recv().unwrap();
                    let mut handle = Some(nptl::spawn(body).unwrap());
                    let status = in_child(BARE[round % 2], || ask(handle.take().unwrap()));
                    assert_eq!(status, 0, "{name}, round {round}");
                    end.send(()).unwrap();
                    handle.take().unwrap().join().unwrap();
                }
            }
        });
    });
}

/// The forking thread is one of ours and returns from its closure in the child. glibc still counts the parent's threads
/// there, so that the kernel ends the process, with 0.
#[test]
fn the_forking_thread_ends() {
    alone("bare::the_forking_thread_ends", || {
        spawn_and_join();
        beside_a_busy_ledger(|| {
            for round in 0..80 {
                let (how, is_detached) = (BARE[round % 2], round / 2 % 2 == 0);
                let (send, status) = channel();
                let (begin, detached) = channel::<()>();
                let body = move || {
                    // Its handle is gone by then, or waits in join.
                    assert!(detached.recv().is_err());
                    let pid = forked(how);
                    if pid == 0 {
                        // Either channel can have been in use.
                        std::mem::forget((send, detached));
                        return;
                    }
                    send.send(wait(pid)).unwrap();
                };
                let mut handle = Some(nptl::spawn(body).unwrap());
                if is_detached {
                    handle.take().unwrap().detach();
                }
                drop(begin);
                assert_eq!(status.recv().unwrap(), 0, "round {round}");
                if let Some(handle) = handle {
                    handle.join().unwrap();
                }
            }
        });
    });
}

/// A thread whose fork(3) was refused is no longer inside fork(3).
#[test]
fn a_bare_child_after_a_refused_fork() {
    alone("bare::a_bare_child_after_a_refused_fork", || {
        unsafe extern "C" fn bare_clone3() -> libc::pid_t {
            let mut arguments = [0_u64; 8];
            arguments[4] = libc::SIGCHLD as u64;
            // SAFETY: clone_args of the first version, for a copy of this process.
            let pid = unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), 64) };
            libc::pid_t::try_from(pid).unwrap()
        }
        spawn_and_join();
        deny(libc::SYS_clone, libc::EAGAIN).install();
        // SAFETY: there is no child.
        assert_eq!(unsafe { fork() }, -1);
        assert!(is_good(bare_clone3 as Fork, || {
            assert_refused(&nptl::spawn(|| ()).expect_err("none"));
        }));
        spawn_and_join();
        report("forked", "yes");
    });
}
