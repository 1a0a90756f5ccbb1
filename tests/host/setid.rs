//! setuid in one thread changes all others: glibc broadcasts it to the threads on its list.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use nptl::{Builder, StackCache, StackCacheConfig};
use support::{case, child, deny, or_skip, report, short_or_long, skip};

/// The kernel's answer for the calling thread, past glibc.
fn kernel_ids() -> ([u32; 3], [u32; 3]) {
    let (mut uids, mut gids) = ([0_u32; 3], [0_u32; 3]);
    for (number, ids) in [
        (libc::SYS_getresuid, &mut uids),
        (libc::SYS_getresgid, &mut gids),
    ] {
        let [real, effective, saved] = ids;
        // SAFETY: three valid places.
        unsafe { libc::syscall(number, &raw mut *real, &raw mut *effective, &raw mut *saved) };
    }
    (uids, gids)
}

fn kernel_euid() -> u32 {
    // SAFETY: no preconditions.
    unsafe { libc::syscall(libc::SYS_geteuid) as u32 }
}

fn set_euid(id: u32) {
    // SAFETY: plain numbers; real and saved ids stay 0, so that the way back is open.
    let answer = unsafe { libc::setresuid(u32::MAX, id, u32::MAX) };
    assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
}

/// What glibc says, and since when. Odd while a broadcast is under way; the number of finished changes
/// times two otherwise. A check between two equal even readings began after the last broadcast was over
/// and ended before the next began, so exactly one id is right, and no thread has to be kept waiting.
static CHANGES: AtomicU64 = AtomicU64::new(0);
/// Checks that were well-defined.
static CHECKED: AtomicU64 = AtomicU64::new(0);
static WRONG: AtomicU64 = AtomicU64::new(0);

fn id_after(changes: u64) -> u32 {
    if changes % 2 == 1 { 65_534 } else { 0 }
}

fn check() {
    for _ in 0..20 {
        let before = CHANGES.load(Ordering::SeqCst);
        if before.is_multiple_of(2) {
            let id = kernel_euid();
            if CHANGES.load(Ordering::SeqCst) == before {
                if id != id_after(before / 2) {
                    WRONG.fetch_add(1, Ordering::Relaxed);
                }
                CHECKED.fetch_add(1, Ordering::Release);
                return;
            }
        }
        std::hint::spin_loop();
    }
}

/// Changes ids until both numbers are reached.
fn change_ids(changes: u64, spawned: &AtomicU64, threads: u64) {
    let mut done = 0;
    while done < changes || spawned.load(Ordering::Relaxed) < threads {
        CHANGES.fetch_add(1, Ordering::SeqCst);
        done += 1;
        set_euid(id_after(done));
        CHANGES.fetch_add(1, Ordering::SeqCst);
        // Half of the changes follow at once; the others let another thread look first.
        if done % 2 == 0 {
            let checked = CHECKED.load(Ordering::Acquire);
            while CHECKED.load(Ordering::Acquire) == checked {
                std::thread::yield_now();
            }
        }
    }
    if done % 2 == 1 {
        set_euid(0);
    }
    report("changes", done);
}

/// A storm of changes against a storm of threads: joined, detached, scoped, refused.
#[test]
fn no_thread_keeps_an_old_id() {
    let changes_wanted = short_or_long(2_000, 20_000) as u64;
    let threads_wanted = 2 * changes_wanted;
    if case().is_some() {
        if !support::is_root() {
            skip!("changing ids needs root");
        }
        nptl::spawn(|| ())
            .expect("a thread")
            .join()
            .expect("its end");
        let stop = AtomicBool::new(false);
        let (spawned, refused) = (AtomicU64::new(0), AtomicU64::new(0));
        let disabled = StackCache::new(StackCacheConfig::disabled());
        std::thread::scope(|scope| {
            let (stop, spawned, refused) = (&stop, &spawned, &refused);
            let disabled = &disabled;
            let until_stop = move |mut work: Box<dyn FnMut(u64) -> u64>| {
                let mut round = 0;
                while !stop.load(Ordering::Relaxed) {
                    spawned.fetch_add(work(round), Ordering::Relaxed);
                    round += 1;
                }
            };
            let joined = || {
                nptl::spawn(check)
                    .expect("a thread")
                    .join()
                    .expect("its end");
                1
            };
            scope.spawn(move || until_stop(Box::new(move |_| joined())));
            scope.spawn(move || {
                until_stop(Box::new(move |_| {
                    nptl::scope(|scope| {
                        for _ in 0..3 {
                            scope.spawn(check).expect("a thread");
                        }
                    });
                    3
                }));
            });
            // Detached and from fresh stacks; never more than a few at once, since those that were
            // started last are joined.
            scope.spawn(move || {
                until_stop(Box::new(move |round| {
                    let handle = Builder::new().spawn(check).expect("a thread");
                    if round % 2 == 0 {
                        handle.join().expect("its end");
                    } else {
                        handle.detach();
                    }
                    if round % 16 == 0 {
                        let builder = Builder::new().stack_size(64 << 10).name("fresh");
                        let cache = builder.stack_cache(disabled);
                        cache
                            .spawn(check)
                            .expect("a thread")
                            .join()
                            .expect("its end");
                    }
                    1
                }));
            });
            // After a refused clone the creator waits for the list's lock, which the broadcaster holds.
            scope.spawn(move || {
                deny(libc::SYS_clone3, libc::EAGAIN).install();
                while !stop.load(Ordering::Relaxed) {
                    assert!(nptl::spawn(|| ()).is_err());
                    refused.fetch_add(1, Ordering::Relaxed);
                }
            });
            change_ids(changes_wanted, spawned, threads_wanted);
            stop.store(true, Ordering::Relaxed);
        });
        report("spawned", spawned.load(Ordering::Relaxed));
        report("refused", refused.load(Ordering::Relaxed));
        report("checked", CHECKED.load(Ordering::Relaxed));
        report("wrong", WRONG.load(Ordering::Relaxed));
        return;
    }
    let storm =
        child("setid::no_thread_keeps_an_old_id", "storm").time_limit(Duration::from_secs(110));
    let output = or_skip!(storm.run()).success();
    if output.skipped().is_some() {
        return;
    }
    let number = |key| {
        output
            .get(key)
            .expect("a report")
            .parse::<u64>()
            .expect("a number")
    };
    assert_eq!(number("wrong"), 0, "{output}");
    assert!(number("changes") >= changes_wanted, "{output}");
    assert!(number("spawned") >= threads_wanted, "{output}");
    assert!(number("refused") > 0, "{output}");
    assert!(number("checked") >= changes_wanted / 2, "{output}");
}

/// Every living thread, whichever thread changes which id: all ids, for good.
#[test]
fn every_living_thread_changes() {
    const THREADS: usize = 40;
    if case().is_some() {
        if !support::is_root() {
            skip!("changing ids needs root");
        }
        let (uid, gid) = (support::unused_uid(), support::unused_uid());
        let (change, look) = (Barrier::new(THREADS + 1), Barrier::new(THREADS + 1));
        nptl::scope(|scope| {
            let handles: Vec<_> = (0..THREADS)
                .map(|index| {
                    let (change, look) = (&change, &look);
                    let body = move || {
                        assert_eq!(kernel_ids(), ([0; 3], [0; 3]));
                        change.wait();
                        if index == THREADS / 2 {
                            // SAFETY: plain numbers; one thread of ours changes all.
                            unsafe {
                                assert_eq!(libc::setgroups(0, std::ptr::null()), 0);
                                assert_eq!(libc::setresgid(gid, gid, gid), 0);
                                assert_eq!(libc::setuid(uid), 0);
                            }
                        }
                        look.wait();
                        // SAFETY: an empty list only asks for the number.
                        let groups = unsafe { libc::getgroups(0, std::ptr::null_mut()) };
                        assert_eq!(groups, 0);
                        kernel_ids()
                    };
                    scope.spawn(body).expect("a thread")
                })
                .collect();
            change.wait();
            look.wait();
            for handle in handles {
                assert_eq!(handle.join().expect("its end"), ([uid; 3], [gid; 3]));
            }
        });
        assert_eq!(kernel_ids(), ([uid; 3], [gid; 3]));
        // And those that come later.
        let later = nptl::spawn(kernel_ids).expect("a thread");
        assert_eq!(later.join().expect("its end"), ([uid; 3], [gid; 3]));
        report("good", "yes");
        return;
    }
    let output = child("setid::every_living_thread_changes", "change");
    let output = or_skip!(output.time_limit(Duration::from_secs(60)).run()).success();
    if output.skipped().is_none() {
        assert_eq!(output.get("good"), Some("yes"), "{output}");
    }
}
