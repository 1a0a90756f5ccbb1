//! glibc's own view of its threads, read as libthread_db reads it.

use std::ffi::CStr;
use std::hint::black_box;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

pub fn tid() -> i32 {
    // SAFETY: gettid has no preconditions.
    unsafe { libc::gettid() }
}

/// A symbol that glibc has for libthread_db.
fn symbol(name: &CStr) -> *mut libc::c_void {
    // SAFETY: the name is NUL-terminated.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    assert!(!found.is_null(), "{name:?}");
    found
}

/// Where a field lies in its structure.
fn offset(name: &CStr) -> usize {
    // SAFETY: these symbols are of type uint32_t[3]: bits, elements, offset.
    let [_, _, offset] = unsafe { symbol(name).cast::<[u32; 3]>().read() };
    offset as usize
}

/// The descriptors (`pthread_t`) on glibc's lists of live threads. Without the list's lock: nothing else may be
/// starting or ending threads.
pub fn listed_threads() -> Vec<usize> {
    // SAFETY: a pointer variable of libc.
    let global = unsafe { symbol(c"__nptl_rtld_global").cast::<usize>().read() };
    let link = offset(c"_thread_db_pthread_list");
    let mut found = Vec::new();
    for name in [
        c"_thread_db_rtld_global__dl_stack_user",
        c"_thread_db_rtld_global__dl_stack_used",
    ] {
        let head = global + offset(name);
        // SAFETY: head and elements of a circular list; the caller keeps other threads from changing it.
        let next = |at: usize| unsafe { (at as *const usize).read() };
        let mut at = next(head);
        while at != head {
            found.push(at - link);
            at = next(at);
        }
    }
    found.sort_unstable();
    found
}

/// Waits until the kernel has no thread that glibc does not list: a joined one is off glibc's lists, and counts until
/// the kernel has taken it back. As for [`listed_threads`], nothing else may be starting or ending threads.
#[track_caller]
pub fn await_reaping() {
    let tid = offset(c"_thread_db_pthread_tid");
    let start = Instant::now();
    loop {
        // SAFETY: an int in the descriptor of a thread that is listed, and so has not been given back.
        let number = |descriptor: usize| unsafe { ((descriptor + tid) as *const i32).read() };
        let listed: Vec<i32> = listed_threads().into_iter().map(number).collect();
        let tasks = std::fs::read_dir("/proc/self/task").expect("/proc/self/task");
        let mut left: Vec<i32> = tasks
            .flatten()
            .filter_map(|task| task.file_name().to_str()?.parse().ok())
            .collect();
        left.retain(|task| !listed.contains(task));
        if left.is_empty() {
            return;
        }
        let patience = Duration::from_secs(30);
        assert!(start.elapsed() < patience, "{left:?} are not in {listed:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// `count` threads of this crate that are all alive at once and then joined in the order of their start: the
/// last one's stack is the warmest then. Their stacks, in the same order.
#[track_caller]
pub fn burst(builder: &nptl::Builder, count: usize) -> Vec<nptl::StackInfo> {
    burst_of(builder, count, |all| {
        all.wait();
    })
}

/// The same of threads that do `work`, which waits for all of them.
#[track_caller]
pub fn burst_of(
    builder: &nptl::Builder,
    count: usize,
    work: impl Fn(&Barrier) + Clone + Send + 'static,
) -> Vec<nptl::StackInfo> {
    let all = Arc::new(Barrier::new(count));
    let handles: Vec<_> = (0..count)
        .map(|_| {
            let (all, work) = (Arc::clone(&all), work.clone());
            let started = builder.clone().spawn(move || work(&all));
            started.expect("a thread")
        })
        .collect();
    let stacks = handles.into_iter().map(|handle| {
        let stack = handle.stack();
        handle.join().expect("its end");
        stack
    });
    stacks.collect()
}

/// Polls for what another thread or the kernel brings about.
#[track_caller]
pub fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        std::thread::yield_now();
    }
}

/// Whether the page at `address` belongs to a mapping.
pub fn is_mapped(address: usize) -> bool {
    resident_pages(address & !4095, 4096).is_some()
}

/// The number of resident pages of a range; `None` if not all of it is mapped.
pub fn resident_pages(start: usize, length: usize) -> Option<usize> {
    let mut pages = vec![0_u8; length.div_ceil(4096)];
    // SAFETY: a byte for each page of the range, which the kernel only looks at.
    let answer = unsafe { libc::mincore(start as *mut libc::c_void, length, pages.as_mut_ptr()) };
    (answer == 0).then(|| pages.iter().filter(|&page| page & 1 != 0).count())
}

/// A cache that no other test takes stacks from, and a builder that uses it.
pub fn private(config: nptl::StackCacheConfig) -> (nptl::StackCache, nptl::Builder) {
    let cache = nptl::StackCache::new(config);
    let builder = nptl::Builder::new().stack_cache(&cache);
    (cache, builder)
}

/// Uses about so many bytes of the calling thread's stack.
pub fn touch_stack(bytes: usize) {
    let page = [1_u8; 4096];
    black_box(&page);
    if bytes > page.len() {
        touch_stack(bytes - page.len());
    }
    // Keeps the frame, and so the page, in use below the call.
    black_box(&page);
}
