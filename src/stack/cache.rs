//! [`StackCache`]: stacks and their TLS blocks, kept warm between threads.
//!
//! The books are kept by the ledger, which makes no system call; here is everything around it: the
//! kernel's side of eviction, the instances, and fork.

use super::ledger::{Budget, Ledger, State, Stats, Victims};
use super::{Life, Lock, Stack};
use crate::tcb::Runtime;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering,
};

/// 64 MiB: some 1,400 default stacks at their upper bound of 44 KiB each.
const DEFAULT_BUDGET: usize = 64 << 20;

/// What an empty closure, a formatted message or a small vector needs, with room to spare.
const DEFAULT_KEEP: usize = 32 << 10;

/// What a [`StackCache`] may keep.
///
/// ```
/// use nptl::{StackCache, StackCacheConfig};
/// let cache = StackCache::new(StackCacheConfig::default().resident_budget(8 << 20));
/// assert_eq!(cache.stats().cached_stacks, 0);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackCacheConfig {
    resident_budget: usize,
    keep_resident: usize,
    enabled: bool,
}

impl Default for StackCacheConfig {
    /// 64 MiB of resident memory, of which each stack keeps at most 32 KiB.
    fn default() -> Self {
        StackCacheConfig {
            resident_budget: DEFAULT_BUDGET,
            keep_resident: DEFAULT_KEEP,
            enabled: true,
        }
    }
}

impl StackCacheConfig {
    /// A cache that keeps nothing: every stack is mapped for its thread and unmapped after it.
    pub fn disabled() -> Self {
        StackCacheConfig {
            enabled: false,
            ..StackCacheConfig::default()
        }
    }

    /// Bytes of memory that cached stacks may occupy; the coldest are unmapped beyond it. Address
    /// space that was never touched does not count.
    pub fn resident_budget(self, bytes: usize) -> Self {
        StackCacheConfig {
            resident_budget: bytes,
            ..self
        }
    }

    /// Bytes at the top of each stack that stay resident when its thread has ended, rounded up to
    /// pages; what it used below is given back with `MADV_DONTNEED`. The next thread on the stack
    /// finds whatever the last one left in them. At least one page stays: the thread's last frames
    /// are in it.
    pub fn keep_resident(self, bytes: usize) -> Self {
        StackCacheConfig {
            keep_resident: bytes,
            ..self
        }
    }

    fn budget(self) -> Budget {
        if self.enabled {
            Budget::resident(self.resident_budget)
        } else {
            Budget::NOTHING
        }
    }
}

/// The accounts of a [`StackCache`] at one instant: `live_stacks + cached_stacks = mapped_stacks`.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackCacheStats {
    /// Spawns that found a stack here.
    pub hits: u64,
    /// Spawns that had to map one.
    pub misses: u64,
    /// Cached stacks that were unmapped to keep the budget, by `trim` or by `clear`.
    pub evictions: u64,
    /// Stacks that are ready for the next thread.
    pub cached_stacks: usize,
    /// Address space of those, in bytes.
    pub cached_virtual_bytes: usize,
    /// Memory of those, in bytes, at most: what may be resident is counted as resident.
    pub cached_resident_bytes: usize,
    /// Stacks of threads that run, that end, or that nobody has joined, and the few that are on
    /// their way back to the kernel.
    pub live_stacks: usize,
    /// All of them.
    pub mapped_stacks: usize,
    /// Their address space, in bytes.
    pub mapped_virtual_bytes: usize,
}

impl StackCacheStats {
    fn of(stats: &Stats) -> StackCacheStats {
        let mapped = stats.mapped();
        StackCacheStats {
            hits: stats.hits,
            misses: stats.misses,
            evictions: stats.evictions,
            cached_stacks: stats.cached.stacks,
            cached_virtual_bytes: stats.cached.bytes,
            cached_resident_bytes: stats.cached.resident,
            live_stacks: mapped.stacks - stats.cached.stacks,
            mapped_stacks: mapped.stacks,
            mapped_virtual_bytes: mapped.bytes,
        }
    }
}

/// One instance. Leaked and recycled like the records of stacks, so that an ending thread, a
/// forked child and a debugger can always look at it.
pub(crate) struct Instance {
    ledger: Ledger<Stack>,
    keep_resident: AtomicUsize,
    /// Number of [`StackCache`] handles, those of running threads included.
    handles: AtomicUsize,
    /// The last handle is gone and its stacks are handed over.
    unused: AtomicBool,
    /// Set once, before the instance can be found.
    next: AtomicPtr<Instance>,
}

impl Instance {
    const fn new(budget: Budget, keep_resident: usize) -> Instance {
        Instance {
            ledger: Ledger::new(budget),
            keep_resident: AtomicUsize::new(keep_resident),
            handles: AtomicUsize::new(1),
            unused: AtomicBool::new(false),
            next: AtomicPtr::new(std::ptr::null_mut()),
        }
    }
}

static GLOBAL: StackCache = StackCache(&GLOBAL_INSTANCE);
static GLOBAL_INSTANCE: Instance = Instance::new(Budget::resident(DEFAULT_BUDGET), DEFAULT_KEEP);

/// All instances but the global one, newest first.
static INSTANCES: AtomicPtr<Instance> = AtomicPtr::new(std::ptr::null_mut());

/// Held while an instance is added, and across fork: both handlers must see the same instances.
static ADDING: Lock<()> = Lock::new(());

fn instances() -> impl Iterator<Item = &'static Instance> {
    // SAFETY: null, or a leaked instance whose `next` never changes once it can be found.
    let first = unsafe { INSTANCES.load(Ordering::Acquire).as_ref() };
    let rest = std::iter::successors(first, |at| {
        // SAFETY: as above.
        unsafe { at.next.load(Ordering::Acquire).as_ref() }
    });
    std::iter::once(&GLOBAL_INSTANCE).chain(rest)
}

/// A cache of stacks with their TLS blocks.
///
/// nptl's counts address space and holds five default stacks; this one counts memory. Stacks are
/// found by size class, last in first out, in a time that does not depend on how many there are.
/// Cloning makes another handle to the same cache; a thread holds one while it runs. When the last
/// handle of a private cache goes, so do its stacks.
///
/// ```
/// use nptl::{Builder, StackCache, StackCacheConfig};
/// let cache = StackCache::new(StackCacheConfig::default());
/// Builder::new().stack_cache(&cache).spawn(|| ()).unwrap().join().unwrap();
/// assert_eq!(cache.stats().cached_stacks, 1);
/// Builder::new().stack_cache(&cache).spawn(|| ()).unwrap().join().unwrap();
/// assert_eq!(cache.stats().hits, 1);
/// ```
pub struct StackCache(&'static Instance);

impl StackCache {
    /// The cache of every thread whose [`Builder`](crate::Builder) names no other.
    pub fn global() -> &'static StackCache {
        &GLOBAL
    }

    /// A private cache.
    pub fn new(config: StackCacheConfig) -> StackCache {
        let keep = remainder(config.keep_resident);
        for instance in instances() {
            let free =
                instance
                    .unused
                    .compare_exchange(true, false, Ordering::AcqRel, Ordering::Relaxed);
            if free.is_ok() {
                instance.handles.store(1, Ordering::Relaxed);
                instance.keep_resident.store(keep, Ordering::Relaxed);
                instance.ledger.reset_counters();
                let cache = StackCache(instance);
                cache.unmap(instance.ledger.set_budget(config.budget()));
                return cache;
            }
        }
        let instance: &'static Instance = Box::leak(Box::new(Instance::new(config.budget(), keep)));
        let _adding = ADDING.lock();
        instance
            .next
            .store(INSTANCES.load(Ordering::Relaxed), Ordering::Relaxed);
        INSTANCES.store(std::ptr::from_ref(instance).cast_mut(), Ordering::Release);
        StackCache(instance)
    }

    /// The accounts.
    pub fn stats(&self) -> StackCacheStats {
        StackCacheStats::of(&self.0.ledger.stats())
    }

    /// Unmaps the coldest cached stacks until the rest keep at most `resident_bytes` of memory.
    /// `trim(0)` gives everything back that no thread uses.
    pub fn trim(&self, resident_bytes: usize) {
        self.sweep();
        self.unmap(self.0.ledger.trim(resident_bytes));
    }

    /// Unmaps every cached stack.
    pub fn clear(&self) {
        self.sweep();
        self.unmap(self.0.ledger.clear());
    }

    /// Takes back the stacks of detached threads that died without their last frame: by a bare
    /// exit(2), or killed by a seccomp filter. Nobody else would ever look at them.
    fn sweep(&self) {
        let orphans = self.0.ledger.sweep(Stack::claim_orphan);
        self.unmap(orphans);
    }

    fn unmap(&self, victims: Victims<'_, Stack>) {
        unmap_victims(victims, Runtime::existing(), std::ptr::null());
    }

    pub(crate) fn ledger(&self) -> &'static Ledger<Stack> {
        &self.0.ledger
    }

    pub(crate) fn keep_resident(&self) -> usize {
        self.0.keep_resident.load(Ordering::Relaxed)
    }

    /// A thread has ended, or is on its way out on this very stack: the ledger keeps the stack, or
    /// lets it wait until the kernel has let go of it.
    pub(crate) fn give(&self, stack: &'static Stack) {
        LAST_END.store(now(), Ordering::Relaxed);
        self.unmap(self.0.ledger.give(stack));
    }

    /// Gives back everything that can be unmapped, of every cache: before a refusal for want of
    /// memory or mappings is reported. The number of stacks.
    pub(crate) fn reclaim_all(runtime: &Runtime) -> usize {
        let mut count = 0;
        for instance in instances() {
            let mut victims = instance.ledger.clear();
            while let Some(stack) = victims.pop() {
                // SAFETY: a victim is idle and the popper's alone.
                if unsafe { stack.unmap(runtime) } {
                    victims.unmapped();
                    stack.retire_record();
                    count += 1;
                }
            }
        }
        count
    }
}

impl Clone for StackCache {
    fn clone(&self) -> StackCache {
        if !std::ptr::eq(self.0, &raw const GLOBAL_INSTANCE) {
            self.0.handles.fetch_add(1, Ordering::Relaxed);
        }
        StackCache(self.0)
    }
}

impl Drop for StackCache {
    fn drop(&mut self) {
        // The global cache is never dropped, so its handles need not be counted: no shared counter
        // on every spawn.
        if std::ptr::eq(self.0, &raw const GLOBAL_INSTANCE)
            || self.0.handles.fetch_sub(1, Ordering::AcqRel) != 1
        {
            return;
        }
        self.clear();
        // Whoever is still on its way out, the dropping thread's own stack included, is waited for
        // by the global cache.
        let late = self.0.ledger.hand_over(&GLOBAL_INSTANCE.ledger);
        self.unmap(late);
        self.0.unused.store(true, Ordering::Release);
    }
}

impl std::fmt::Debug for StackCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("StackCache").field(&self.stats()).finish()
    }
}

/// Whole pages, and never none: an ending thread discards what is below them while it still runs
/// in the topmost.
fn remainder(bytes: usize) -> usize {
    let page = super::layout::page_size();
    bytes
        .max(1)
        .checked_next_multiple_of(page)
        .unwrap_or(usize::MAX - page + 1)
}

/// Unmaps victims, and says whether `which` was one of them. A stack whose munmap is refused goes
/// back to its ledger (dropping or popping on does that), so nothing is lost.
pub(super) fn unmap_victims(
    mut victims: Victims<'_, Stack>,
    runtime: Option<&Runtime>,
    which: *const Stack,
) -> bool {
    let mut found = false;
    // Without a runtime there has been no thread, and so there is no stack to unmap.
    let Some(runtime) = runtime else { return false };
    while let Some(stack) = victims.pop() {
        // SAFETY: a victim is idle (the ledger saw its tid word cleared) and the popper's alone.
        if unsafe { stack.unmap(runtime) } {
            victims.unmapped();
            found |= std::ptr::eq(stack, which);
            stack.retire_record();
        }
    }
    found
}

/// When a thread of this crate last gave its stack back, in milliseconds of [`now`].
static LAST_END: AtomicU64 = AtomicU64::new(0);

/// The coarse monotonic clock (no system call), in milliseconds; never 0.
fn now() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC_COARSE).map_or(1, |now| {
        now.tv_sec() as u64 * 1000 + now.tv_nsec() as u64 / 1_000_000 + 1
    })
}

/// Whether a thread of this crate has ended so lately that the kernel may still count it.
pub(crate) fn thread_ended_lately() -> bool {
    const LATELY: u64 = 20;
    let last = LAST_END.load(Ordering::Relaxed);
    last != 0 && now().saturating_sub(last) <= LATELY
}

/// [`GUARD`]: the handlers are registered.
const GUARDED: i32 = -1;

/// 0, the pid of the process in which a thread registers the handlers just now, or [`GUARDED`].
///
/// Not a `Once`: registering waits for the end of another thread's fork, and the child of that fork
/// would wait for a thread that it does not have.
static GUARD: AtomicI32 = AtomicI32::new(0);

/// Registers the handlers that keep every lock of this crate whole across fork(2).
pub(crate) fn guard_forks() {
    while GUARD.load(Ordering::Acquire) != GUARDED {
        register_handlers();
    }
}

#[cold]
fn register_handlers() {
    let process = crate::clone::sys::process_id();
    let state = GUARD.load(Ordering::Acquire);
    if state == GUARDED {
        return;
    }
    if state == process {
        // Another thread is at it.
        std::thread::yield_now();
        return;
    }
    // Nobody, or a thread of the parent's, which may or may not have come to the end of it: the
    // handlers do no harm when they are registered twice.
    let mine = GUARD.compare_exchange(state, process, Ordering::AcqRel, Ordering::Acquire);
    if mine.is_ok() {
        // SAFETY: the handlers are functions of this crate, which stays loaded.
        unsafe {
            libc::pthread_atfork(
                Some(before_fork),
                Some(after_fork_in_parent),
                Some(after_fork),
            )
        };
        fork_mark::set();
        GUARD.store(GUARDED, Ordering::Release);
    }
}

/// Whether this process is a child of fork whose `after_fork` did not run: `_Fork` and bare clones
/// skip the handlers. Asked at every spawn and join, so it costs one load.
pub(crate) fn notice_fork() {
    if fork_mark::is_missing() {
        forget_parent(false);
    }
}

/// The thread whose fork holds the locks, and how often [`before_fork`] found that it is itself.
static FORKING: AtomicI32 = AtomicI32::new(0);
static REPEATED: AtomicU32 = AtomicU32::new(0);

extern "C" fn before_fork() {
    let own = nix::unistd::gettid().as_raw();
    if FORKING.load(Ordering::Relaxed) == own {
        REPEATED.fetch_add(1, Ordering::Relaxed);
        return;
    }
    // Calibration first, then the spare records, then the ledgers: the order in which a spawn that
    // calibrates takes them.
    Runtime::hold_calibration();
    ADDING.hold();
    super::SPARE.hold();
    for instance in instances() {
        instance.ledger.before_fork();
    }
    FORKING.store(own, Ordering::Relaxed);
}

/// Whether this is one of [`before_fork`]'s repetitions. Called with its locks held.
fn is_repeated() -> bool {
    let repeated = REPEATED.load(Ordering::Relaxed);
    if repeated > 0 {
        REPEATED.store(repeated - 1, Ordering::Relaxed);
        return true;
    }
    FORKING.store(0, Ordering::Relaxed);
    false
}

extern "C" fn after_fork_in_parent() {
    if is_repeated() {
        return;
    }
    for instance in instances() {
        // SAFETY: held by before_fork in this thread; ADDING kept the set of instances as it was.
        unsafe { instance.ledger.after_fork_in_parent() };
    }
    // SAFETY: as above.
    unsafe {
        drop(super::SPARE.held());
        drop(ADDING.held());
    }
    Runtime::release_calibration();
}

extern "C" fn after_fork() {
    if is_repeated() {
        return;
    }
    forget_parent(true);
    // SAFETY: held by before_fork in the thread that this one is a copy of.
    unsafe {
        drop(super::SPARE.held());
        drop(ADDING.held());
    }
    Runtime::release_calibration();
}

/// In a forked child only the calling thread exists: no tid word of another will ever be cleared,
/// glibc has emptied its list of threads, and saved heap caches refer to arenas whose counts were
/// reset (rule 16).
fn forget_parent(prepared: bool) {
    let own = crate::clone::thread_pointer();
    if !prepared && let Some(runtime) = Runtime::existing() {
        // SAFETY: this is a forked child with one thread, by the caller's evidence.
        unsafe { runtime.repair_lists() };
    }
    // glibc's fork resets its single-thread flags, too: the child must be primed anew.
    Runtime::forget_after_fork();
    for instance in instances() {
        let in_use = |stack: &Stack, state: State| {
            if stack.block.thread_pointer() == own {
                return true;
            }
            stack.forget_after_fork();
            // A copy of the handle exists in this process, too; it finds the thread ended and gives
            // the stack back.
            stack.change_life(Life::Attached, Life::Ending);
            state == State::Live && !stack.change_life(Life::Detached, Life::Ending)
        };
        // SAFETY: this is a forked child with one thread, by the caller's evidence.
        unsafe {
            if prepared {
                instance.ledger.after_fork_in_child(in_use);
            } else {
                instance.ledger.after_bare_fork(in_use);
            }
        }
        instance.ledger.for_each(|stack, _| {
            if stack.block.thread_pointer() != own {
                stack.forget_after_fork();
            }
        });
    }
    if !prepared {
        // SAFETY: whoever held these does not exist in this process.
        unsafe {
            drop(super::SPARE.seize());
            drop(ADDING.seize());
            Runtime::seize_calibration();
        }
        FORKING.store(0, Ordering::Relaxed);
        REPEATED.store(0, Ordering::Relaxed);
    }
    fork_mark::set();
}

/// A page that the kernel zeroes in the child of a fork (`MADV_WIPEONFORK`, Linux 4.14).
mod fork_mark {
    use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

    static PAGE: AtomicPtr<AtomicU32> = AtomicPtr::new(std::ptr::null_mut());

    /// Sets the mark, for this process. Without such a page, `_Fork` goes unnoticed and fork(2)'s
    /// handlers still work.
    pub(super) fn set() {
        if PAGE.load(Ordering::Acquire).is_null() {
            let length = super::super::layout::page_size();
            let Ok(page) = super::super::mapping::map(length) else {
                return;
            };
            // SAFETY: a page of our own.
            let wiped = unsafe { crate::clone::sys::madvise(page, length, libc::MADV_WIPEONFORK) };
            if wiped.is_err() {
                // SAFETY: as above; nobody knows it yet.
                let _ = unsafe { super::super::mapping::unmap(page, length) };
                return;
            }
            PAGE.store(page as *mut AtomicU32, Ordering::Release);
        }
        // SAFETY: non-null, and never unmapped.
        if let Some(word) = unsafe { PAGE.load(Ordering::Acquire).as_ref() } {
            word.store(1, Ordering::Release);
        }
    }

    pub(super) fn is_missing() -> bool {
        // SAFETY: as in `set`.
        unsafe { PAGE.load(Ordering::Acquire).as_ref() }
            .is_some_and(|word| word.load(Ordering::Acquire) == 0)
    }
}
