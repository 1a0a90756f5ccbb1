//! `spawn_with` and `spawn_with_setup`: what comes back, from where, and what is left.

use super::{Moved, wait_until};
use nptl::{
    Builder, Cancelled, JoinHandle, SetupError, StackCache, StackCacheConfig, StartGate, Step,
};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use support::{self, Snapshot, alone, await_reaping, deny};

fn tid() -> i32 {
    support::tid()
}

#[test]
fn a_value_arrives_or_comes_back_untouched() {
    let vm = vec![String::from("memory"), String::from("vcpu")];
    let place = vm.as_ptr() as usize;
    let refused = Builder::new()
        .stack_size(usize::MAX)
        .spawn_with(vm, |_| unreachable!());
    let (error, vm): (_, Vec<String>) = match refused {
        Err(refused) => refused.into_parts(),
        Ok::<JoinHandle<()>, _>(_) => unreachable!(),
    };
    assert_eq!(error.step(), Step::Attributes);
    assert_eq!(vm.as_ptr() as usize, place);
    let thread = Builder::new().spawn_with(vm, |vm| vm.as_ptr() as usize);
    assert_eq!(thread.unwrap().join().unwrap(), place);
}

/// Also what must not leave the thread: an `Rc` from the setup to the closure.
#[test]
fn the_setup_runs_in_the_thread_before_spawn_returns() {
    let ran = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&ran);
    let thread = Builder::new()
        .name("vcpu0")
        .spawn_with_setup(
            move || {
                seen.store(true, Ordering::Relaxed);
                Ok::<_, ()>(Rc::new((tid(), nptl::current_name())))
            },
            |made: Rc<(i32, Option<String>)>| (made.0, made.1.clone(), tid()),
        )
        .unwrap();
    assert!(ran.load(Ordering::Relaxed));
    let number = thread.tid();
    assert_eq!(
        thread.join().unwrap(),
        (number, Some("vcpu0".to_owned()), number)
    );
}

/// What a setup can end with.
#[derive(Clone, Copy, Debug)]
enum Ends {
    Error,
    Panic,
    Exit,
}

fn end(how: Ends) -> Result<Moved, std::io::Error> {
    match how {
        Ends::Error => Err(std::io::ErrorKind::NotFound.into()),
        Ends::Panic => std::panic::panic_any("set up badly"),
        Ends::Exit => {
            // SAFETY: ends this thread; its frames have nothing that must be dropped.
            unsafe { libc::syscall(libc::SYS_exit, 0) };
            unreachable!()
        }
    }
}

#[test]
fn a_setup_that_fails_panics_or_ends_its_thread_leaves_no_thread() {
    alone(
        "setup::a_setup_that_fails_panics_or_ends_its_thread_leaves_no_thread",
        || {
            std::panic::set_hook(Box::new(|_| ()));
            for ends in [Ends::Error, Ends::Panic, Ends::Exit] {
                let once = || {
                    let dropped = Moved::counter();
                    let moved = Moved(Arc::clone(&dropped));
                    let body = move |_| {
                        let _moved = moved;
                        std::process::abort()
                    };
                    let gate = StartGate::new();
                    let builder = Builder::new().start_gate(&gate);
                    let refused = builder.spawn_with_setup(move || end(ends), body);
                    let error = match refused {
                        Err(error) => error,
                        Ok::<JoinHandle<()>, _>(_) => panic!("{ends:?}"),
                    };
                    match (ends, error) {
                        (Ends::Error, SetupError::Failed(error)) => {
                            assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
                        }
                        (Ends::Panic, SetupError::Panicked(payload)) => {
                            assert_eq!(payload.downcast_ref(), Some(&"set up badly"));
                        }
                        (Ends::Exit, SetupError::Refused(error)) => {
                            assert_eq!(error.step(), Step::Setup, "{error}");
                            assert_eq!(error.errno(), libc::ESRCH);
                            assert_eq!(error.attempts(), 1);
                        }
                        (ends, error) => panic!("{ends:?}: {error:?}"),
                    }
                    wait_until("dropped", || dropped.load(Ordering::SeqCst) == 1);
                };
                // The first finds its way, and fills what malloc keeps for a thread.
                once();
                once();
                await_reaping();
                Snapshot::take();
                let before = Snapshot::take();
                for _ in 0..10 {
                    once();
                }
                await_reaping();
                let after = Snapshot::take();
                assert_eq!(before.kernel_threads, after.kernel_threads);
                assert_eq!(before.glibc_threads, after.glibc_threads);
                assert_eq!(before.maps, after.maps, "{ends:?}");
                assert_eq!(before.fds, after.fds);
            }
        },
    );
}

/// A refused thread drops setup and closure in the caller; a cancelled one its value in the thread and its closure where
/// it is joined.
#[test]
fn all_that_a_thread_with_a_setup_holds_is_dropped_once() {
    let [setups, values, bodies] = [(); 3].map(|()| Moved::counter());
    let parts = || {
        let [setup, value, body] = [&setups, &values, &bodies].map(|it| Moved(Arc::clone(it)));
        let setup = move || {
            let _setup = setup;
            Ok::<_, ()>((value, Rc::new(tid())))
        };
        let body = move |(value, thread): (Moved, Rc<i32>)| {
            let _moved = (value, &body);
            assert_eq!(*thread, tid());
        };
        (setup, body)
    };
    let counts = || [&setups, &values, &bodies].map(|it| it.load(Ordering::SeqCst));

    let (setup, body) = parts();
    let refused = Builder::new()
        .stack_size(usize::MAX)
        .spawn_with_setup(setup, body);
    assert!(matches!(refused, Err(SetupError::Refused(_))));
    assert_eq!(counts(), [1, 1, 1]);

    let (setup, body) = parts();
    let thread = Builder::new().spawn_with_setup(setup, body).unwrap();
    thread.join().unwrap();
    assert_eq!(counts(), [2, 2, 2]);

    let (setup, body) = parts();
    let gate = StartGate::new();
    let builder = Builder::new().start_gate(&gate);
    let thread = builder.spawn_with_setup(setup, body).unwrap();
    assert_eq!(counts(), [3, 2, 2]);
    gate.cancel();
    assert!(thread.join().unwrap_err().is::<Cancelled>());
    assert_eq!(counts(), [3, 3, 3]);
}

/// In the child there is nothing that opens the gate, so the thread that came with the fork ends without its closure.
#[test]
fn a_setup_that_forks_does_not_hang_the_child_at_the_gate() {
    alone(
        "setup::a_setup_that_forks_does_not_hang_the_child_at_the_gate",
        || {
            let gate = StartGate::new();
            let builder = Builder::new().start_gate(&gate);
            let setup = || {
                // SAFETY: the child makes only system calls and returns into the crate.
                match unsafe { libc::fork() } {
                    -1 => Err(std::io::Error::last_os_error()),
                    child => Ok(child),
                }
            };
            let body = |child: libc::pid_t| {
                assert_ne!(child, 0, "the closure ran in the child");
                child
            };
            let thread = builder.spawn_with_setup(setup, body).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
            gate.open();
            let child = thread.join().unwrap();
            let mut status = 0;
            // SAFETY: waits for a child of this process.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert_eq!(status, 0);
        },
    );
}

/// As everywhere behind a fork, what comes next runs in both processes; the thread is the last one of the child.
#[test]
fn a_setup_that_forks_goes_on_in_both_processes() {
    alone(
        "setup::a_setup_that_forks_goes_on_in_both_processes",
        || {
            // SAFETY: the child makes only system calls and returns into the crate.
            let setup = || match unsafe { libc::fork() } {
                -1 => Err(std::io::Error::last_os_error()),
                child => Ok(child),
            };
            let body = |child: libc::pid_t| {
                if child == 0 {
                    // SAFETY: ends the child, whose closure this is.
                    unsafe { libc::_exit(7) };
                }
                child
            };
            let thread = Builder::new().spawn_with_setup(setup, body).unwrap();
            let child = thread.join().unwrap();
            let mut status = 0;
            // SAFETY: waits for a child of this process.
            assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
            assert_eq!(libc::WEXITSTATUS(status), 7);
        },
    );
}

/// Filters that deny, and that kill the thread at, what comes next: the report, the wait at the gate, the end. The creator
/// does not hang, and finds what the thread has come to.
#[test]
fn a_filter_that_denies_what_comes_next_does_not_hang_the_creator() {
    alone(
        "setup::a_filter_that_denies_what_comes_next_does_not_hang_the_creator",
        || {
            for call in [libc::SYS_futex, libc::SYS_rt_sigprocmask, libc::SYS_exit] {
                for (kills, gated) in [(false, false), (false, true), (true, false), (true, true)] {
                    // A thread that is denied its end has no other.
                    if !kills && call == libc::SYS_exit {
                        continue;
                    }
                    let gate = StartGate::new();
                    let builder = match gated {
                        true => Builder::new().start_gate(&gate),
                        false => Builder::new(),
                    };
                    let setup = move || {
                        match kills {
                            true => deny(call, libc::EPERM).install_kill(),
                            false => deny(call, libc::EPERM).install(),
                        }
                        Ok::<_, ()>(3)
                    };
                    let thread = builder.spawn_with_setup(setup, |value| value).unwrap();
                    gate.open();
                    let outcome = thread.join();
                    // At the report it dies before its closure, at its end behind it.
                    match kills && call == libc::SYS_futex {
                        true => assert!(outcome.unwrap_err().is::<&str>()),
                        false => assert_eq!(outcome.unwrap(), 3, "{call} {kills} {gated}"),
                    }
                }
            }
            // In the setup itself.
            let setup = || {
                deny(libc::SYS_getppid, libc::EPERM).install_kill();
                // SAFETY: takes no argument. The thread dies of it.
                Ok::<_, ()>(unsafe { libc::getppid() })
            };
            match Builder::new().spawn_with_setup(setup, |_| ()) {
                Err(SetupError::Refused(error)) => {
                    assert_eq!(
                        (error.step(), error.errno().raw()),
                        (Step::Setup, libc::ESRCH)
                    );
                }
                other => panic!("{other:?}"),
            }
            await_reaping();
            nptl::spawn(|| ()).unwrap().join().unwrap();
        },
    );
}

/// A signal handler forks while the creator waits for the setup. In the child the thread does not exist, like every thread
/// that stayed behind in the parent of a fork: its handle says so, and no cause is made up.
#[test]
fn a_fork_while_the_creator_waits_leaves_the_thread_to_the_parent() {
    static FORKED: AtomicI32 = AtomicI32::new(-1);
    extern "C" fn fork(_: libc::c_int) {
        // SAFETY: the crate allows a fork in a handler; the child goes on in the interrupted spawn.
        FORKED.store(unsafe { libc::fork() }, Ordering::SeqCst);
    }
    alone(
        "setup::a_fork_while_the_creator_waits_leaves_the_thread_to_the_parent",
        || {
            let creator = tid();
            // SAFETY: see the handler.
            unsafe { libc::signal(libc::SIGUSR1, fork as *const () as usize) };
            let setup = move || {
                // SAFETY: only numbers.
                unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), creator, libc::SIGUSR1) };
                wait_until("forked", || FORKED.load(Ordering::SeqCst) > 0);
                std::thread::sleep(std::time::Duration::from_millis(30));
                Ok::<_, ()>(3)
            };
            let started = Builder::new().spawn_with_setup(setup, |value| value);
            match FORKED.load(Ordering::SeqCst) {
                0 => {
                    let right = started.is_ok_and(|thread| thread.join().is_err());
                    // SAFETY: the child ends without anything else.
                    unsafe { libc::_exit(i32::from(!right)) }
                }
                child => {
                    assert_eq!(started.unwrap().join().unwrap(), 3);
                    let mut status = 0;
                    // SAFETY: waits for a child of this process.
                    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
                    assert_eq!(status, 0);
                }
            }
        },
    );
}

/// A stack that was mapped for a thread whose setting was refused is unmapped, one from the cache is there again.
#[test]
fn a_refused_setting_gives_closure_and_stack_back() {
    alone(
        "setup::a_refused_setting_gives_closure_and_stack_back",
        || {
            let cache = StackCache::new(StackCacheConfig::default());
            let impossible = || Builder::new().stack_cache(&cache).cpu_affinity([8191]);
            let (error, back) = impossible().spawn_or_return(|| 5).unwrap_err().into_parts();
            assert_eq!(error.step(), Step::Affinity, "{error}");
            assert_eq!(error.stack().fate, nptl::StackFate::Unmapped);
            assert_eq!(back(), 5);
            assert_eq!(cache.stats().cached_stacks, 0);
            let thread = Builder::new().stack_cache(&cache).spawn(|| ()).unwrap();
            thread.join().unwrap();
            let (error, value) = impossible()
                .spawn_with(vec![1], |_| ())
                .unwrap_err()
                .into_parts();
            assert_eq!(error.step(), Step::Affinity);
            assert_eq!(error.stack().origin, nptl::StackOrigin::Cache);
            assert_eq!(error.stack().fate, nptl::StackFate::Cached);
            assert_eq!(value, [1]);
            assert_eq!(cache.stats().cached_stacks, 1);
        },
    );
}
