//! What of a thread's data the next one on its stack can read: the documented remainder, or with
//! `StackCacheConfig::zeroed` nothing.

use std::cell::Cell;
use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;

use nptl::{Builder, StackCache, StackCacheConfig, StackInfo};
use support::{case, child, malloc_in_use, or_skip, report};

/// One more than the word that the first thread leaves everywhere. The word itself stands in no other code:
/// the frames of those who look for it must not hold it.
const AFTER_SECRET: u64 = 0x5ec2_e7b1_d0a7_93c5;
const STACK: usize = 1 << 20;
const KEEP: usize = 32 << 10;

fn secret() -> u64 {
    black_box(AFTER_SECRET) - 1
}

thread_local! {
    static LOCAL: [Cell<u64>; 64] = const { [const { Cell::new(0) }; 64] };
}

/// Fills about `pages` pages of the stack, from the top down.
fn fill(pages: usize) {
    let page = [secret(); 512];
    black_box(&page);
    if pages > 1 {
        fill(pages - 1);
    }
    black_box(&page);
}

extern "C" fn fill_signal_stack(_: libc::c_int) {
    black_box([secret(); 512]);
}

fn key() -> libc::pthread_key_t {
    static KEY: AtomicU64 = AtomicU64::new(u64::MAX);
    if KEY.load(Ordering::Relaxed) == u64::MAX {
        let mut key = 0;
        // SAFETY: `key` is a place for the result; there is no destructor.
        assert_eq!(unsafe { libc::pthread_key_create(&raw mut key, None) }, 0);
        KEY.store(key.into(), Ordering::Relaxed);
    }
    KEY.load(Ordering::Relaxed) as libc::pthread_key_t
}

/// Leaves the secret on the stack, the signal stack, in thread-locals and in a pthread key.
fn leave_secrets() {
    fill(200);
    // SAFETY: a handler that only writes to its own frame; the signal is this thread's.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = fill_signal_stack as *const () as usize;
        action.sa_flags = libc::SA_ONSTACK;
        assert_eq!(
            libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()),
            0
        );
        assert_eq!(libc::pthread_kill(libc::pthread_self(), libc::SIGUSR1), 0);
        libc::pthread_setspecific(key(), secret() as *const libc::c_void);
    }
    LOCAL.with(|local| local.iter().for_each(|cell| cell.set(secret())));
}

/// Where the secret was found, by addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Found {
    /// On the stack, and the lowest place there.
    stack: usize,
    lowest: usize,
    signal_stack: usize,
    block: usize,
}

/// Looks at every word of the calling thread's memory.
fn look(stack: StackInfo) -> Found {
    // SAFETY: all zeroes is a valid stack_t, and the call fills it in.
    let signal_stack = unsafe {
        let mut signal_stack: libc::stack_t = std::mem::zeroed();
        assert_eq!(
            libc::sigaltstack(std::ptr::null(), &raw mut signal_stack),
            0
        );
        signal_stack
    };
    let top = stack.base + stack.size;
    let guard = top..signal_stack.ss_sp as usize;
    assert_eq!(guard.len(), 4096);
    let block = guard.end + signal_stack.ss_size;
    // SAFETY: this thread's own descriptor; its size is a u32 that glibc exports for debuggers.
    let end = unsafe {
        let size = libc::dlsym(libc::RTLD_DEFAULT, c"_thread_db_sizeof_pthread".as_ptr());
        libc::pthread_self() as usize + *size.cast::<u32>() as usize
    };
    let mut found = Found::default();
    for address in (stack.base..guard.start).chain(guard.end..end).step_by(8) {
        // SAFETY: mapped memory of this thread, without the guards.
        let word = unsafe { (address as *const u64).read_volatile() };
        if word.wrapping_add(1) == AFTER_SECRET {
            if address < top {
                if found.stack == 0 {
                    found.lowest = address;
                }
                found.stack += 1;
            } else if address < block {
                found.signal_stack += 1;
            } else {
                found.block += 1;
            }
        }
    }
    found
}

/// How the first thread ends.
#[derive(Clone, Copy, PartialEq)]
enum ThreadEnd {
    Joined,
    Detached,
    /// By a bare exit(2), which skips its last frames.
    Exit,
    /// The same without a handle.
    DetachedExit,
}

const ENDS: [ThreadEnd; 4] = [
    ThreadEnd::Joined,
    ThreadEnd::Detached,
    ThreadEnd::Exit,
    ThreadEnd::DetachedExit,
];

/// One thread leaves secrets, the next one looks for them.
fn next_thread_finds(cache: &StackCache, builder: &Builder, end: ThreadEnd) -> (StackInfo, Found) {
    let first = builder.clone().spawn(move || {
        leave_secrets();
        if matches!(end, ThreadEnd::Exit | ThreadEnd::DetachedExit) {
            // SAFETY: ends this thread.
            unsafe { libc::syscall(libc::SYS_exit, 0) };
        }
    });
    let first = first.expect("a thread");
    let base = first.stack().base;
    match end {
        ThreadEnd::Detached | ThreadEnd::DetachedExit => {
            first.detach();
            // It counts as live until the kernel has cleared its tid word and a later call has seen that.
            while cache.stats().live_stacks > 0 {
                cache.trim(usize::MAX);
                std::thread::yield_now();
            }
        }
        ThreadEnd::Joined => first.join().expect("its end"),
        ThreadEnd::Exit => drop(first.join()),
    }
    look_again(builder, base)
}

fn look_again(builder: &Builder, base: usize) -> (StackInfo, Found) {
    let (sender, receiver) = channel();
    let second = builder
        .clone()
        .spawn(move || look(receiver.recv().expect("sent")));
    let second = second.expect("a thread");
    let stack = second.stack();
    assert_eq!(stack.base, base, "not the same stack");
    sender.send(stack).expect("it waits");
    (stack, second.join().expect("its end"))
}

fn private(config: StackCacheConfig) -> (StackCache, Builder) {
    let cache = StackCache::new(config);
    let builder = Builder::new().stack_cache(&cache).stack_size(STACK);
    (cache, builder)
}

#[test]
fn a_reused_stack_holds_no_more_than_the_remainder() {
    for keep in [0, KEEP, 128 << 10] {
        let (cache, builder) = private(StackCacheConfig::default().keep_resident(keep));
        for end in ENDS {
            let (stack, found) = next_thread_finds(&cache, &builder, end);
            // What this test can see at all, it must see.
            assert!(found.signal_stack > 0, "{found:?}");
            assert!(found.stack > 0 || keep == 0, "{keep}: {found:?}");
            let lowest_kept = stack.base + stack.size - keep.max(4096);
            assert!(found.stack == 0 || found.lowest >= lowest_kept, "{found:?}");
            // Thread-locals and keys are another matter: they begin anew in every thread.
            assert_eq!(found.block, 0, "{found:?}");
        }
    }
}

#[test]
fn a_zeroed_stack_holds_nothing() {
    let nothing = Found::default();
    let config = StackCacheConfig::default().zeroed(true);
    for config in [config, config.keep_resident(128 << 10)] {
        let (cache, builder) = private(config);
        for end in ENDS {
            let (_, found) = next_thread_finds(&cache, &builder, end);
            assert_eq!(found, nothing);
        }
        assert_eq!(cache.stats().misses, 1);
    }
}

/// Locked memory cannot be given back with madvise.
#[test]
fn a_zeroed_stack_that_is_locked_holds_nothing() {
    let (cache, builder) = private(StackCacheConfig::default().zeroed(true));
    let locked = builder.clone().lock_stack(true);
    if let Err(error) = locked.clone().spawn(|| ()).map(|handle| handle.join()) {
        support::skip!("{error}");
    }
    for (first, second) in [(&locked, &builder), (&locked, &locked)] {
        let handle = first.clone().spawn(leave_secrets).expect("a thread");
        let base = handle.stack().base;
        handle.join().expect("its end");
        let (_, found) = look_again(second, base);
        assert_eq!(found, Found::default());
    }
    assert_eq!(cache.stats().misses, 1);
}

/// Locked as a whole, guards and all, before or after its guards were made.
#[test]
fn a_zeroed_stack_in_locked_memory_holds_nothing() {
    let name = "zeroed::a_zeroed_stack_in_locked_memory_holds_nothing";
    let Some(case) = case() else {
        for case in ["before", "after"] {
            or_skip!(child(name, case).run()).success();
        }
        return;
    };
    let (cache, builder) = private(StackCacheConfig::default().zeroed(true));
    let run = || {
        let handle = builder.clone().spawn(leave_secrets).expect("a thread");
        let base = handle.stack().base;
        handle.join().expect("its end");
        base
    };
    if case == "after" {
        run();
    }
    // SAFETY: locks memory, and changes nothing of it.
    let answer =
        unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) };
    if answer != 0 {
        support::skip!("mlockall: {}", std::io::Error::last_os_error());
    }
    let base = run();
    let (_, found) = look_again(&builder, base);
    assert_eq!(found, Found::default());
    assert_eq!(cache.stats().misses, 1);
}

/// From the moment of the change on, also for stacks that are in the cache already.
#[test]
fn zeroing_can_be_turned_on() {
    let (cache, builder) = private(StackCacheConfig::default());
    let (_, found) = next_thread_finds(&cache, &builder, ThreadEnd::Joined);
    assert!(found.stack > 0);
    let handle = builder.clone().spawn(leave_secrets).expect("a thread");
    let base = handle.stack().base;
    handle.join().expect("its end");
    cache.set_config(StackCacheConfig::default().zeroed(true));
    let (_, found) = look_again(&builder, base);
    assert_eq!(found, Found::default());
    assert_eq!(cache.stats().misses, 1);
}

/// The heap cache of a thread outlives the block that it lies in.
#[test]
fn zeroing_leaks_no_heap() {
    if case().is_some() {
        let (_cache, builder) = private(StackCacheConfig::default().zeroed(true));
        let run = |threads: usize| {
            for _ in 0..threads {
                let body = || {
                    for size in 1..=20 {
                        black_box(vec![0_u8; size * 40]);
                    }
                };
                builder.clone().spawn(body).unwrap().join().unwrap();
            }
        };
        run(200);
        let before = malloc_in_use();
        run(3000);
        report("growth", malloc_in_use() - before);
        return;
    }
    let output = or_skip!(child("zeroed::zeroing_leaks_no_heap", "run").run()).success();
    let growth: i64 = output
        .get("growth")
        .expect("a number")
        .parse()
        .expect("one");
    // One heap cache is some 10 kB.
    assert!(growth < 3000, "malloc has given out {growth} bytes more");
}
