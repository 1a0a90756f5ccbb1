//! The heap and a function of glibc's, which a test can hold as another thread would.

use super::process::{_Fork, fork, in_child, is_good};
use super::{spawn_and_join, wait_until};
use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use support::{alone, case, child, or_skip, report};

/// As if another thread had held malloc's locks in the moment of `_Fork`: who asks for them waits for ever.
static HEAP_IS_HELD: AtomicBool = AtomicBool::new(false);

/// Where the last large allocation is, and its size.
static LAST: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];

/// Allocations that are not small.
pub struct Packets;

impl Packets {
    const LARGE: usize = 1 << 20;

    /// The last one, which is of this size at least: what creator and thread share, right after a spawn.
    pub fn last(size: usize) -> usize {
        let [address, length] = &LAST;
        assert!(length.load(Ordering::SeqCst) >= size, "no large packet");
        address.load(Ordering::SeqCst)
    }
}

struct Heap;

impl Heap {
    fn lock(&self) {
        while HEAP_IS_HELD.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
    }
}

// SAFETY: the system's allocator.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.lock();
        // SAFETY: passed on.
        let address = unsafe { System.alloc(layout) };
        if layout.size() >= Packets::LARGE {
            LAST[0].store(address.addr(), Ordering::SeqCst);
            LAST[1].store(layout.size(), Ordering::SeqCst);
        }
        address
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        self.lock();
        // SAFETY: passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static HEAP: Heap = Heap;

unsafe extern "C" {
    fn __libc_free(pointer: *mut c_void);
}

/// The same for the dynamic linker, which frees what it has allocated for a thread.
#[unsafe(no_mangle)]
unsafe extern "C" fn free(pointer: *mut c_void) {
    HEAP.lock();
    // SAFETY: passed on.
    unsafe { __libc_free(pointer) }
}

type Handler = Option<unsafe extern "C" fn()>;

static HOLD_AT_ITS_END: AtomicBool = AtomicBool::new(false);
static HOLD_REGISTRATION: AtomicBool = AtomicBool::new(false);
static IN_REGISTRATION: AtomicBool = AtomicBool::new(false);

/// What `pthread_atfork` ends in. Held here, a thread waits in it as if another thread's fork held glibc's lock of the
/// handlers.
#[unsafe(no_mangle)]
unsafe extern "C" fn __register_atfork(
    prepare: Handler,
    parent: Handler,
    child: Handler,
    object: *mut c_void,
) -> c_int {
    if !HOLD_AT_ITS_END.load(Ordering::SeqCst) {
        wait_in_registration();
    }
    // SAFETY: glibc's own function of this name and type.
    unsafe {
        let next = libc::dlsym(libc::RTLD_NEXT, c"__register_atfork".as_ptr());
        assert!(!next.is_null());
        let next: unsafe extern "C" fn(Handler, Handler, Handler, *mut c_void) -> c_int =
            std::mem::transmute(next);
        let answer = next(prepare, parent, child, object);
        if HOLD_AT_ITS_END.load(Ordering::SeqCst) {
            wait_in_registration();
        }
        answer
    }
}

fn wait_in_registration() {
    IN_REGISTRATION.store(true, Ordering::SeqCst);
    while HOLD_REGISTRATION.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
}

/// Another thread's first spawn is registering the handlers in the moment of a fork, and has come to the beginning or to
/// the end of it. The child, which does not have that thread, must register its own.
#[test]
fn a_fork_in_the_middle_of_the_first_spawn() {
    let test = "interposed::a_fork_in_the_middle_of_the_first_spawn";
    let Some(moment) = case() else {
        for moment in ["beginning", "end"] {
            let output = or_skip!(child(test, moment).run()).success();
            assert_eq!(output.all("status"), ["0", "0"], "{moment}");
        }
        return;
    };
    HOLD_AT_ITS_END.store(moment == "end", Ordering::SeqCst);
    HOLD_REGISTRATION.store(true, Ordering::SeqCst);
    let spawner = std::thread::spawn(spawn_and_join);
    wait_until("it registers", || IN_REGISTRATION.load(Ordering::SeqCst));
    let status = in_child(fork, || {
        HOLD_REGISTRATION.store(false, Ordering::SeqCst);
        spawn_and_join();
        assert!(is_good(fork, spawn_and_join));
        spawn_and_join();
    });
    report("status", status);
    HOLD_REGISTRATION.store(false, Ordering::SeqCst);
    spawner.join().unwrap();
    report("status", in_child(fork, spawn_and_join));
}

/// Nothing keeps malloc whole in a child of `_Fork`. What a running thread left is not the child's to free, the error of a
/// spawn is ready-made, and the caches are out of use.
#[test]
fn a_bare_child_needs_no_heap() {
    alone("interposed::a_bare_child_needs_no_heap", || {
        let (gate, wait) = std::sync::mpsc::channel::<()>();
        let living = nptl::spawn(move || wait.recv().is_err()).unwrap();
        let left = nptl::spawn(|| ()).unwrap();
        let task = format!("/proc/self/task/{}", left.tid());
        left.detach();
        wait_until("its end", || !std::path::Path::new(&task).exists());
        let cache = nptl::StackCache::new(nptl::StackCacheConfig::default());
        let builder = nptl::Builder::new().stack_cache(&cache);
        support::burst(&builder, 3);
        let mut owned = Some((builder, living));
        let good = is_good(_Fork, || {
            let (builder, living) = owned.take().unwrap();
            HEAP_IS_HELD.store(true, Ordering::Relaxed);
            let error = builder.spawn(|| ()).expect_err("none");
            let answers = [
                error.step() == nptl::Step::Runtime,
                living.is_finished(),
                support::errno(living.kill(0)) == Some(libc::ESRCH),
            ];
            drop((living, error));
            cache.trim(0);
            cache.set_config(nptl::StackCacheConfig::disabled());
            cache.clear();
            let stacks = cache.stats().mapped_stacks;
            HEAP_IS_HELD.store(false, Ordering::Relaxed);
            assert_eq!((answers, stacks), ([true; 3], 0));
        });
        assert!(good);
        drop(gate);
        assert!(owned.take().unwrap().1.join().unwrap());
    });
}

/// The same for the handle of a thread that had ended, whose result is in the child's memory.
#[test]
fn a_bare_child_drops_the_handle_of_an_ended_thread_without_the_heap() {
    let test = "interposed::a_bare_child_drops_the_handle_of_an_ended_thread_without_the_heap";
    alone(test, || {
        let ended = nptl::spawn(|| ()).unwrap();
        wait_until("its end", || ended.is_finished());
        let mut ended = Some(ended);
        assert!(is_good(_Fork, || {
            HEAP_IS_HELD.store(true, Ordering::Relaxed);
            drop(ended.take());
        }));
        ended.take().unwrap().join().unwrap();
    });
}
