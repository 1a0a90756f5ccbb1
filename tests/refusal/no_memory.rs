//! A heap that refuses: every allocation of a spawn can be the one, and each refusal is an error, where std's
//! `Box` and `Arc` would abort the process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use nptl::{
    Builder, RetryPolicy, SetupError, SpawnError, StackCache, StackCacheConfig, StackFate,
    StartGate, Step,
};
use support::{case, child, or_skip, report};

thread_local! {
    /// How many more allocations of this thread are granted; None: all.
    static GRANTED: Cell<Option<usize>> = const { Cell::new(None) };
}

/// A closure with this needs whole pages, and the heap has them [once](PAGE_TAKEN).
#[repr(align(4096))]
struct Page;

static PAGE_TAKEN: AtomicBool = AtomicBool::new(false);

struct Refusing;

impl Refusing {
    /// Whether the calling thread may have one more block of this alignment.
    fn grants(layout: Layout) -> bool {
        match GRANTED.try_with(Cell::get).ok().flatten() {
            Some(0) => return false,
            Some(left) => GRANTED.set(Some(left - 1)),
            None => {}
        }
        layout.align() < align_of::<Page>() || !PAGE_TAKEN.swap(true, Ordering::Relaxed)
    }
}

// SAFETY: the system's allocator, or null, which every caller must expect.
unsafe impl GlobalAlloc for Refusing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match Refusing::grants(layout) {
            // SAFETY: passed on.
            true => unsafe { System.alloc(layout) },
            false => std::ptr::null_mut(),
        }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        if layout.align() >= align_of::<Page>() {
            PAGE_TAKEN.store(false, Ordering::Relaxed);
        }
        // SAFETY: passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    // Not left to the trait, whose way is a new block and a copy: other tests here count what the heap has mapped.
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        match layout.align() >= align_of::<Page>() || Refusing::grants(layout) {
            // SAFETY: passed on.
            true => unsafe { System.realloc(pointer, layout, size) },
            false => std::ptr::null_mut(),
        }
    }
}

#[global_allocator]
static ALLOCATOR: Refusing = Refusing;

/// What `attempt` gives with `granted` allocations, and whether it used them up.
pub(super) fn with_memory_for<T>(granted: usize, attempt: impl FnOnce() -> T) -> (T, bool) {
    GRANTED.set(Some(granted));
    let result = attempt();
    let left = GRANTED.replace(None);
    (result, left == Some(0))
}

fn check(error: &SpawnError, granted: usize) {
    assert_eq!(error.step(), Step::Allocate, "{granted} granted: {error}");
    assert_eq!(error.errno(), libc::ENOMEM, "{error}");
    assert_eq!(error.stack().fate, StackFate::None, "{error}");
    assert!(error.to_string().contains("step=allocate errno=ENOMEM"));
}

/// Refuses the first allocation, then the second, and so on, until one attempt is granted. The number of
/// allocations of a spawn.
fn refuse_each(mut attempt: impl FnMut(usize) -> Result<(), SpawnError>) -> usize {
    for granted in 0..100 {
        match with_memory_for(granted, || attempt(granted)) {
            (Ok(()), _) => return granted,
            (Err(error), used_up) => {
                assert!(used_up, "refused for nothing: {error}");
                check(&error, granted);
            }
        }
    }
    panic!("no end of allocations");
}

fn spawns() {
    // The very first spawn of the process: calibration, records.
    let first = refuse_each(|_| {
        let handle = nptl::spawn(|| ())?;
        GRANTED.set(None);
        handle.join().expect("its end");
        GRANTED.set(Some(1));
        Ok(())
    });
    report("first", first);

    // A named thread on a fresh record, with a closure that comes back.
    let cache = StackCache::new(StackCacheConfig::disabled());
    let (gate, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Arc::new(std::sync::Mutex::new(wait));
    // So that no record is left over for it.
    let living: Vec<_> = (0..4)
        .map(|_| {
            let wait = std::sync::Arc::clone(&wait);
            let body = move || wait.lock().is_ok_and(|wait| wait.recv().is_err());
            nptl::spawn(body).expect("a thread")
        })
        .collect();
    let count = refuse_each(|granted| {
        // Made with memory, as the caller's own are.
        GRANTED.set(None);
        let (moved, name) = (Box::new(granted), "a".repeat(40));
        GRANTED.set(Some(granted));
        let builder = Builder::new().stack_cache(&cache).name(name);
        match builder.spawn_or_return(move || *moved) {
            Ok(handle) => {
                GRANTED.set(None);
                assert_eq!(handle.name().map(str::len), Some(40));
                assert_eq!(handle.join().expect("its end"), granted);
                GRANTED.set(Some(1));
                Ok(())
            }
            Err(refused) => {
                let (error, work) = refused.into_parts();
                assert_eq!(work(), granted, "the closure came back");
                Err(error)
            }
        }
    });
    report("named", count);
    assert_eq!(cache.stats().mapped_stacks, 0);
    drop(gate);
    for thread in living {
        assert!(thread.join().expect("its end"));
    }

    // Scoped.
    let number = 7;
    let count = refuse_each(|_| {
        nptl::scope(|scope| {
            let handle = scope.spawn(|| number)?;
            GRANTED.set(None);
            assert_eq!(handle.join().expect("its end"), 7);
            GRANTED.set(Some(1));
            Ok(())
        })
    });
    report("scoped", count);

    // With a setting, a setup and a gate, which are made with memory.
    let count = refuse_each(|granted| {
        GRANTED.set(None);
        let gate = StartGate::new();
        let builder = Builder::new().stack_cache(&cache).cpu_affinity([0]);
        let builder = builder.start_gate(&gate);
        GRANTED.set(Some(granted));
        match builder.spawn_with_setup(move || Ok::<_, ()>(granted), |made| made) {
            Ok(handle) => {
                GRANTED.set(None);
                gate.open();
                assert_eq!(handle.join().expect("its end"), granted);
                GRANTED.set(Some(1));
                Ok(())
            }
            Err(SetupError::Refused(error)) => Err(error),
            Err(_) => panic!("a setup that failed"),
        }
    });
    report("special", count);

    // A gate without memory refuses its threads.
    let (gate, _) = with_memory_for(0, StartGate::new);
    let thread = Builder::new().start_gate(&gate).spawn(|| ());
    check(&thread.expect_err("no memory for the gate"), 0);
    gate.open();

    let mut kept = Vec::new();
    // Errors without memory of their own all say the same, and none aborts.
    for index in 0..20 {
        let (error, _) = with_memory_for(0, || {
            Builder::new()
                .retry(RetryPolicy::never())
                .spawn(|| ())
                .expect_err("no memory")
        });
        check(&error, index);
        kept.push(error.clone());
        kept.push(error);
    }
    drop(kept);
    nptl::spawn(|| ())
        .expect("a thread")
        .join()
        .expect("its end");
    assert_eq!(
        nptl::last_failure().map(|error| error.step()),
        Some(Step::Allocate)
    );
}

#[test]
fn every_allocation_of_a_spawn_can_be_refused() {
    if case().is_some() {
        spawns();
        return;
    }
    let output = child(
        "no_memory::every_allocation_of_a_spawn_can_be_refused",
        "spawns",
    )
    .run();
    let output = or_skip!(output).success();
    let number = |key| output.get(key).and_then(|n| n.parse::<usize>().ok());
    // The packet, the error's reserve, the runtime, the record.
    assert_eq!(number("first"), Some(4), "{output}");
    // The packet, what creator and thread share, the record.
    assert_eq!(number("special"), Some(3), "{output}");
    // The packet, the name, the error's reserve, the record.
    assert_eq!(number("named"), Some(4), "{output}");
    // The scope's latch, the packet and the error's reserve, with a stack from the cache.
    assert_eq!(number("scoped"), Some(3), "{output}");
}

/// What a detached thread was made with serves the next one, also where there is no more than that.
#[test]
fn memory_that_a_thread_left_is_there_for_the_next() {
    if case().is_some() {
        for round in 0..5 {
            let page = Page;
            let thread = nptl::spawn(move || {
                std::hint::black_box(&page);
            });
            let thread = thread.unwrap_or_else(|error| panic!("{round}: {error}"));
            let task = format!("/proc/self/task/{}", thread.tid());
            thread.detach();
            while std::path::Path::new(&task).exists() {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
        return;
    }
    let output = child(
        "no_memory::memory_that_a_thread_left_is_there_for_the_next",
        "run",
    )
    .run();
    or_skip!(output).success();
}
