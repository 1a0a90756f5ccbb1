//! A thread's end, like that of nptl's threads.

use super::{spawn_and_join, wait_until};
use nptl::{Builder, StackCache, StackCacheConfig};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::time::{Duration, Instant};
use support::{alone, malloc_in_use};

/// Blocks or unblocks SIGSETXID, the signal of a set-id broadcast. glibc's functions refuse to block it.
fn change_setxid(how: i32) {
    const SIGSETXID: u64 = 33;
    let set = 1_u64 << (SIGSETXID - 1);
    // SAFETY: the kernel reads 8 bytes and writes none.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            how,
            &raw const set,
            std::ptr::null_mut::<u64>(),
            size_of_val(&set),
        )
    };
    assert_eq!(result, 0);
}

/// A set-id broadcast holds the lock of glibc's thread list until every thread has answered. A thread that waits for
/// that lock at its end is signalled anew by each broadcast, and starves where one follows another.
///
/// Here a thread that does not answer holds a broadcast in the middle, for as long as another thread needs to end.
#[test]
fn a_thread_does_not_wait_for_set_id_broadcasts() {
    let test = "ending::a_thread_does_not_wait_for_set_id_broadcasts";
    alone(test, || {
        let [silent, answer, end, done] = [const { AtomicBool::new(false) }; 4];
        let broadcaster = AtomicI32::new(0);
        let is_set = |flag: &AtomicBool| flag.load(Ordering::SeqCst);
        let ended = std::thread::scope(|scope| {
            scope.spawn(|| {
                change_setxid(libc::SIG_BLOCK);
                silent.store(true, Ordering::SeqCst);
                wait_until("the test is over", || is_set(&answer));
                change_setxid(libc::SIG_UNBLOCK);
            });
            nptl::scope(|threads| {
                let thread = threads.spawn(|| wait_until("its end", || is_set(&end)));
                let thread = thread.unwrap();
                wait_until("a thread does not answer", || is_set(&silent));
                scope.spawn(|| {
                    broadcaster.store(support::tid(), Ordering::SeqCst);
                    // SAFETY: the user that it is already.
                    assert_eq!(unsafe { libc::seteuid(libc::geteuid()) }, 0);
                    done.store(true, Ordering::SeqCst);
                });
                wait_until("the broadcast waits", || {
                    sleeps(broadcaster.load(Ordering::SeqCst))
                });
                end.store(true, Ordering::SeqCst);
                let limit = Instant::now() + Duration::from_secs(10);
                while !thread.is_finished() && Instant::now() < limit {
                    std::thread::yield_now();
                }
                let ended = (thread.is_finished(), is_set(&done));
                answer.store(true, Ordering::SeqCst);
                ended
            })
        });
        assert_eq!(ended, (true, false), "(it has ended, so has the broadcast)");
    });
}

/// Locks a mutex with a priority ceiling, for which glibc allocates the thread's own data, whether or not the thread may
/// have that priority.
fn lock_with_ceiling() {
    unsafe extern "C" {
        fn pthread_mutexattr_setprioceiling(
            attributes: *mut libc::pthread_mutexattr_t,
            ceiling: libc::c_int,
        ) -> libc::c_int;
    }
    const PTHREAD_PRIO_PROTECT: libc::c_int = 2;
    // SAFETY: a mutex of this frame's.
    unsafe {
        let mut attributes = std::mem::zeroed();
        let mut mutex = std::mem::zeroed();
        libc::pthread_mutexattr_init(&raw mut attributes);
        libc::pthread_mutexattr_setprotocol(&raw mut attributes, PTHREAD_PRIO_PROTECT);
        pthread_mutexattr_setprioceiling(&raw mut attributes, 1);
        assert_eq!(
            libc::pthread_mutex_init(&raw mut mutex, &raw const attributes),
            0
        );
        if libc::pthread_mutex_lock(&raw mut mutex) == 0 {
            libc::pthread_mutex_unlock(&raw mut mutex);
        }
    }
}

/// The word of this thread's descriptor that points to that data: the fourth behind the address of the stack's mapping.
fn ceiling_data(mapping: usize) -> usize {
    const WORDS: usize = 2304 / 8;
    // SAFETY: the thread's own descriptor, whose last fields are not looked at.
    let descriptor: &[usize] = unsafe {
        let at = libc::pthread_self() as *const usize;
        std::slice::from_raw_parts(at, WORDS)
    };
    let stackblock = descriptor.iter().rposition(|&word| word == mapping);
    descriptor[stackblock.expect("stackblock") + 4]
}

#[test]
fn priority_ceilings_do_not_outlive_their_thread() {
    alone(
        "ending::priority_ceilings_do_not_outlive_their_thread",
        || {
            let cache = StackCache::new(StackCacheConfig::default());
            let builder = Builder::new().stack_cache(&cache).guard_size(4096);
            let run = |lock: bool| {
                let (sender, receiver) = std::sync::mpsc::channel();
                let body = move || {
                    let mapping = receiver.recv().unwrap();
                    let before = ceiling_data(mapping);
                    if lock {
                        lock_with_ceiling();
                    }
                    (before, ceiling_data(mapping))
                };
                let handle = builder.clone().spawn(body).unwrap();
                sender.send(handle.stack().base - 4096).unwrap();
                handle.join().unwrap()
            };
            let (before, after) = run(true);
            assert_eq!(before, 0);
            assert_ne!(after, 0, "glibc allocated nothing");
            assert_eq!(run(false), (0, 0), "the last thread's");
            assert_eq!(cache.stats().hits, 1);

            // Freed with a block that is reused, and with one that is unmapped.
            let caches = [cache.clone(), StackCache::new(StackCacheConfig::disabled())];
            for cache in caches {
                let run = |count: usize| {
                    for _ in 0..count {
                        let builder = Builder::new().stack_cache(&cache);
                        builder.spawn(lock_with_ceiling).unwrap().join().unwrap();
                    }
                    malloc_in_use()
                };
                let before = run(100);
                let growth = run(500).saturating_sub(before);
                assert!(growth < 5000, "{growth} bytes after 500 threads");
            }
        },
    );
}

/// Whether the thread sleeps in a futex.
fn sleeps(tid: i32) -> bool {
    let call = std::fs::read_to_string(format!("/proc/self/task/{tid}/syscall"));
    call.is_ok_and(|call| call.starts_with(&format!("{} ", libc::SYS_futex)))
}

/// A set-id broadcast marks every thread on the list, also one that is still to be cloned and cannot be signalled. It
/// ends without that one, takes the mark away, and wakes a word of the descriptor that no symbol gives. If the thread
/// has come to its end meanwhile, it does not notice.
#[test]
fn a_set_id_mark_is_taken_from_an_ending_thread() {
    let test = "ending::a_set_id_mark_is_taken_from_an_ending_thread";
    alone(test, || {
        const SETXID: u32 = 0x40;
        // SAFETY: glibc exports it for libthread_db: bits, elements, offset.
        let offset = unsafe {
            let name = c"_thread_db_pthread_cancelhandling";
            let symbol = libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr());
            assert!(!symbol.is_null());
            symbol.cast::<[u32; 3]>().read()[2] as usize
        };
        spawn_and_join();
        let (sender, receiver) = std::sync::mpsc::channel();
        let handle = nptl::spawn(move || {
            // SAFETY: never fails.
            let word = unsafe { libc::pthread_self() } as usize + offset;
            // SAFETY: a word of this thread's, which glibc changes atomically.
            unsafe { &*(word as *const AtomicU32) }.fetch_or(SETXID, Ordering::SeqCst);
            sender.send(word).unwrap();
        });
        let handle = handle.unwrap();
        let word = receiver.recv().unwrap();
        let tid = handle.tid();
        wait_until("it waits", || sleeps(tid));
        assert!(!handle.is_finished(), "it may not go before the broadcast");
        // SAFETY: the thread is not joined.
        unsafe { &*(word as *const AtomicU32) }.fetch_and(!SETXID, Ordering::SeqCst);
        let ended = handle.join_timeout(Duration::from_secs(10));
        assert!(ended.is_ok(), "it waits for ever");
    });
}
