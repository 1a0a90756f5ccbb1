//! [`StackCache`]: stacks and their TLS blocks, kept warm between threads.
//!
//! The accounts are kept by the ledger, which makes no system call; here is everything around it: the
//! kernel's side of eviction, the instances, and fork.

use super::caps::Caps;
use super::config::{StackCacheConfig, StackCacheStats};
use super::ledger::{Budget, Entry, Ledger, State, Stats, Victims};
use super::record::{self, RECORDS, Stack};
use crate::errno::Errno;
use crate::mem::Shared;
use crate::proc::status::{Calls, Status};
use crate::step::{CloneCall, Step, StepError};
use crate::sync::lock::{Guard, Guarded};
use crate::sync::{Latch, Lock, forked_bare, notice_fork};
use crate::sys::NoCancellation;
use crate::sys::clone_probe::{Probe, probe};
use crate::sys::map_probe::{self, Question};
use crate::tcb::Runtime;
use nix::sys::resource::{Resource, getrlimit};
use std::panic::{RefUnwindSafe, UnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};

/// One instance. Leaked and recycled like the records of stacks, so that an ending thread, a
/// forked child and a debugger can always look at it.
pub(crate) struct Instance {
    ledger: Ledger<Stack>,
    /// Read and changed with the lock of [`CAPS`] held.
    config: Guarded<StackCacheConfig>,
    // What each spawn reads of it.
    keep_resident: AtomicUsize,
    zeroed: AtomicBool,
    enabled: AtomicBool,
    /// Number of [`StackCache`] handles, those in a `JoinHandle` included.
    handles: AtomicUsize,
    /// The last handle is gone and its stacks are handed over.
    unused: AtomicBool,
    /// Set once, before the instance can be found.
    next: AtomicPtr<Instance>,
}

impl Instance {
    /// Not yet configured, but for the default.
    const fn new() -> Instance {
        let config = StackCacheConfig::DEFAULT;
        Instance {
            ledger: Ledger::new(Budget::resident(config.resident_budget)),
            config: Guarded::new(config),
            keep_resident: AtomicUsize::new(config.keep_resident),
            zeroed: AtomicBool::new(config.zeroed),
            enabled: AtomicBool::new(config.enabled),
            handles: AtomicUsize::new(1),
            unused: AtomicBool::new(false),
            next: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// With the lock of [`CAPS`], so that the budget is always that of the newest configuration and caps.
    fn configure(&self, config: StackCacheConfig, caps: &Guard<'_, Caps>) {
        self.keep_resident.store(config.kept(), Ordering::Relaxed);
        self.zeroed.store(config.zeroed, Ordering::Relaxed);
        self.enabled.store(config.enabled, Ordering::Relaxed);
        // SAFETY: `caps` holds the one lock of its kind, `CAPS`, which guards this cell.
        unsafe { self.config.set(config) };
        self.cap(caps);
    }

    /// What is over the new budget stays until the next call that unmaps.
    fn cap(&self, caps: &Guard<'_, Caps>) {
        // SAFETY: `caps` holds the one lock of its kind, `CAPS`, which guards this cell.
        let config = unsafe { self.config.get() };
        let budget = if config.enabled {
            Budget {
                resident: config.resident_budget,
                bytes: caps.bytes,
                stacks: caps.stacks,
            }
        } else {
            Budget::NOTHING
        };
        self.ledger.set_budget(budget);
    }

    /// Always there, so its handles are not counted: no shared counter on every spawn.
    fn is_global(&self) -> bool {
        std::ptr::eq(self, &raw const GLOBAL_INSTANCE)
    }

    /// A handle, unless the last one is gone: while it exists, the stacks are not handed over.
    fn handle(&'static self) -> Option<StackCache> {
        if self.is_global() {
            return Some(StackCache(self));
        }
        let add = |handles| (handles > 0).then_some(handles + 1);
        let added = self
            .handles
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, add);
        added.ok().map(|_| StackCache(self))
    }
}

static GLOBAL: StackCache = StackCache(&GLOBAL_INSTANCE);
static GLOBAL_INSTANCE: Instance = Instance::new();

/// Caches with a handle, among which a limit is shared out; the global one is always there.
static IN_USE: AtomicUsize = AtomicUsize::new(1);

/// See [`StackCache::reclaimed`].
static RECLAIMED: AtomicUsize = AtomicUsize::new(0);

/// The caps that the ledgers keep to. Locked while an instance is added or configured, too.
static CAPS: Lock<Caps> = Lock::new(Caps::NONE);

/// Sees to it that the caches keep to the limits of this moment: see `caps`. By a thread that spawns.
pub(super) fn apply_limits(runtime: &Runtime) {
    let caps = Caps::read(IN_USE.load(Ordering::Relaxed));
    let mut last = CAPS.lock();
    if *last == caps {
        return;
    }
    *last = caps;
    instances().for_each(|instance| instance.cap(&last));
    drop(last);
    for instance in instances() {
        let victims = instance.ledger.keep_budget();
        unmap_victims(victims, Some(runtime), std::ptr::null());
    }
}

/// All instances but the global one, newest first.
static INSTANCES: AtomicPtr<Instance> = AtomicPtr::new(std::ptr::null_mut());

fn instances() -> impl Iterator<Item = &'static Instance> {
    // SAFETY: null, or a leaked instance whose `next` never changes once it can be found.
    let first = unsafe { INSTANCES.load(Ordering::Acquire).as_ref() };
    let rest = std::iter::successors(first, |at| {
        // SAFETY: null, or the instance that was leaked and linked before this one.
        unsafe { at.next.load(Ordering::Acquire).as_ref() }
    });
    std::iter::once(&GLOBAL_INSTANCE).chain(rest)
}

/// A cache of stacks with their TLS blocks.
///
/// nptl's counts address space and holds five default stacks; this one counts memory. Stacks are
/// found by size class, last in first out, in a time that does not depend on how many there are.
/// Cloning makes another handle to the same cache; a [`JoinHandle`](crate::JoinHandle) holds one, too. When the last
/// handle of a private cache goes, so do its stacks; those of detached threads that still run go to the
/// [global](Self::global) cache when the threads end.
///
/// # Size classes
/// A cached stack serves every request of its class, so each is mapped as large as its class:
/// [`StackInfo`](crate::StackInfo) has the size.
///
/// - A stack of up to 8 pages (16 KiB is the least), or of a power of two, has just the requested size. Between two
///   powers of two there are three sizes more, at equal distances, and a stack gets the next of them: less than a
///   quarter more than requested.
/// - A guard of no page or one (the default) is exact; one of 2 to 16 pages gets 16.
/// - A stack over 2<sup>18</sup> pages (1 GiB with pages of 4 KiB) or a guard over 16 is mapped as
///   requested, and unmapped when its thread has ended.
///
/// What is mapped beyond the request is address space that is never touched, not memory.
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

// No code of the caller runs while a ledger is changed, so that no panic leaves one half changed; and a builder with a
// cache is what std's builder is.
impl UnwindSafe for StackCache {}
impl RefUnwindSafe for StackCache {}

impl StackCache {
    /// The cache of every thread whose [`Builder`](crate::Builder) names no other.
    ///
    /// ```
    /// let stats = nptl::StackCache::global().stats();
    /// assert_eq!(stats.cached_stacks + stats.live_stacks, stats.mapped_stacks);
    /// ```
    pub fn global() -> &'static StackCache {
        &GLOBAL
    }

    pub(crate) const fn global_ledger() -> &'static Ledger<Stack> {
        &GLOBAL_INSTANCE.ledger
    }

    /// A private cache.
    ///
    /// ```
    /// use nptl::{StackCache, StackCacheConfig};
    /// let cache = StackCache::new(StackCacheConfig::default().keep_resident(4096));
    /// nptl::Builder::new().stack_cache(&cache).spawn(|| ())?.join().unwrap();
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn new(config: StackCacheConfig) -> StackCache {
        notice_fork();
        // In a child of _Fork(3) another thread can have held an unused ledger's lock.
        for instance in instances().filter(|_| !forked_bare()) {
            let free =
                instance
                    .unused
                    .compare_exchange(true, false, Ordering::AcqRel, Ordering::Relaxed);
            if free.is_ok() {
                instance.handles.store(1, Ordering::Relaxed);
                instance.ledger.reset_counters();
                IN_USE.fetch_add(1, Ordering::Relaxed);
                let cache = StackCache(instance);
                cache.set_config(config);
                return cache;
            }
        }
        let instance: &'static Instance = Box::leak(Box::new(Instance::new()));
        let caps = CAPS.lock();
        IN_USE.fetch_add(1, Ordering::Relaxed);
        instance.configure(config, &caps);
        instance
            .next
            .store(INSTANCES.load(Ordering::Relaxed), Ordering::Relaxed);
        INSTANCES.store(std::ptr::from_ref(instance).cast_mut(), Ordering::Release);
        StackCache(instance)
    }

    /// What the cache may keep, as it was last set.
    ///
    /// ```
    /// use nptl::{StackCache, StackCacheConfig};
    /// let lean = StackCacheConfig::default().keep_resident(0);
    /// assert_eq!(StackCache::new(lean).config(), lean);
    /// ```
    pub fn config(&self) -> StackCacheConfig {
        notice_fork();
        let _caps = CAPS.lock();
        // SAFETY: the lock of `CAPS` is held, which guards this cell.
        unsafe { self.0.config.get() }
    }

    /// Changes what the cache may keep from now on: what is over the new budget is unmapped, the coldest
    /// first. The new `keep_resident` and `zeroed` hold for each stack as soon as a thread takes it.
    ///
    /// ```
    /// use nptl::{StackCache, StackCacheConfig};
    /// // A program that knows its bursts keeps more than the default for all of its threads.
    /// StackCache::global().set_config(StackCacheConfig::default().resident_budget(512 << 20));
    /// ```
    pub fn set_config(&self, config: StackCacheConfig) {
        if !self.is_usable() {
            return;
        }
        self.0.configure(config, &CAPS.lock());
        self.unmap(self.0.ledger.keep_budget());
    }

    /// The accounts. All zero in a child of `_Fork(3)`, where caches are out of use.
    ///
    /// ```
    /// use nptl::{StackCache, StackCacheConfig};
    /// let cache = StackCache::new(StackCacheConfig::default());
    /// nptl::Builder::new().stack_cache(&cache).spawn(|| ())?.join().unwrap();
    /// assert_eq!((cache.stats().misses, cache.stats().cached_stacks), (1, 1));
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn stats(&self) -> StackCacheStats {
        if !self.is_usable() {
            return StackCacheStats::of(&Stats::ZERO);
        }
        StackCacheStats::of(&self.0.ledger.stats())
    }

    /// Returns `false` in a child of `_Fork(3)`: another thread can have held the ledger's lock, or malloc's.
    fn is_usable(&self) -> bool {
        notice_fork();
        !forked_bare()
    }

    /// Unmaps the coldest cached stacks until the rest keep at most `resident_bytes` of memory.
    /// `trim(0)` gives every stack back that no thread uses.
    ///
    /// For each thread malloc keeps some of the blocks that the thread has freed (with glibc's defaults seven of each size
    /// up to 1 KiB, 240 KiB in all for one that has freed so many). They go with the stack, of this or another cache,
    /// that was unmapped: glibc frees them at the end of a thread of its own, so that a short one is started for each
    /// (pthread_create(3)). Then malloc_trim(3) gives free pages of the whole heap back. Where a thread is refused, the
    /// blocks stay, serve the next threads that start, and go with the next call.
    ///
    /// A process at `vm.max_map_count` may not unmap what lies between two stacks in use, because that
    /// makes two mappings of one: such a stack stays cached, without its memory.
    ///
    /// ```
    /// let cache = nptl::StackCache::new(nptl::StackCacheConfig::default());
    /// nptl::Builder::new().stack_cache(&cache).spawn(|| ())?.join().unwrap();
    /// cache.trim(0);
    /// assert_eq!(cache.stats().cached_resident_bytes, 0);
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn trim(&self, resident_bytes: usize) {
        if !self.is_usable() {
            return;
        }
        self.sweep(None);
        while self
            .unmap(self.0.ledger.trim(resident_bytes))
            .is_worth_another()
        {}
        release_heaps();
    }

    /// Unmaps every cached stack, with the exception that [`trim`](Self::trim) names, and gives back what malloc keeps
    /// for their threads, as that does.
    ///
    /// ```
    /// let cache = nptl::StackCache::new(nptl::StackCacheConfig::default());
    /// nptl::Builder::new().stack_cache(&cache).spawn(|| ())?.join().unwrap();
    /// cache.clear();
    /// assert_eq!(cache.stats().cached_stacks, 0);
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn clear(&self) {
        if self.is_usable() {
            self.unmap_all();
            release_heaps();
        }
    }

    fn unmap_all(&self) {
        self.sweep(None);
        while self.unmap(self.0.ledger.clear()).is_worth_another() {}
    }

    /// Takes back the stacks of detached threads, of one scope or of any, that died without their last frame: by a bare
    /// exit(2), or killed by a seccomp filter. Nothing else ever looks at them.
    fn sweep(&self, scope: Option<&Shared<Latch>>) {
        let claim = |stack: &Stack| stack.claim_unowned(scope);
        self.unmap(self.0.ledger.sweep(claim, Stack::reap_unowned));
    }

    /// The same in every cache, for the threads of one scope: what others left is not for its thread to
    /// drop, which can hold any lock.
    pub(crate) fn reap_dead_of(scope: &Shared<Latch>) {
        notice_fork();
        if forked_bare() {
            return;
        }
        for cache in instances().filter_map(Instance::handle) {
            cache.sweep(Some(scope));
        }
    }

    #[inline]
    fn unmap(&self, victims: Victims<'_, Stack>) -> Eviction {
        // Most often, and on the way of every thread.
        if victims.is_empty() {
            return Eviction::default();
        }
        unmap_victims(victims, Runtime::existing(), std::ptr::null())
    }

    pub(crate) fn ledger(&self) -> &'static Ledger<Stack> {
        &self.0.ledger
    }

    pub(crate) fn keep_resident(&self) -> usize {
        self.0.keep_resident.load(Ordering::Relaxed)
    }

    /// Whether it keeps anything at all.
    pub(crate) fn is_enabled(&self) -> bool {
        self.0.enabled.load(Ordering::Relaxed)
    }

    pub(crate) fn is_zeroed(&self) -> bool {
        self.0.zeroed.load(Ordering::Relaxed)
    }

    /// The thread of a stack has ended, or is about to: the ledger keeps the stack, or lets it wait until the kernel
    /// has cleared the tid word.
    pub(crate) fn give(&self, stack: &'static Stack) {
        LAST_END.store(now(), Ordering::Relaxed);
        if !forked_bare() {
            self.unmap(self.0.ledger.give(stack));
        }
    }

    /// Like [`StackCache::give`], by the detached thread that still runs on the stack: to the cache that has the stack
    /// now, which is the global one if the last handle of its own is gone.
    pub(crate) fn give_running(stack: &'static Stack) {
        LAST_END.store(now(), Ordering::Relaxed);
        if forked_bare() {
            return;
        }
        // The global cache takes what another has handed over, and hands nothing over itself.
        let owner = Ledger::owner_of(stack);
        let given = instances()
            .any(|instance| instance.ledger.id() == owner && instance.ledger.give_running(stack));
        if !given {
            GLOBAL_INSTANCE.ledger.give_running(stack);
        }
    }

    /// Gives back everything that can be unmapped, of every cache: before a refusal that this
    /// [could mend](Self::could_mend) is reported. The number of stacks.
    pub(crate) fn reclaim_all(runtime: &Runtime) -> usize {
        let unmap = |victims| {
            let round = unmap_victims(victims, Some(runtime), std::ptr::null());
            RECLAIMED.fetch_add(round.unmapped, Ordering::Relaxed);
            round
        };
        let mut count = 0;
        // Not swept: what dead threads left has destructors of the program's, and those may allocate (A4).
        for instance in instances() {
            loop {
                let round = unmap(instance.ledger.clear());
                count += round.unmapped;
                if !round.is_worth_another() {
                    break;
                }
            }
        }
        count
    }

    /// The bytes that all caches hold.
    pub(crate) fn cached_bytes() -> u64 {
        let bytes = instances().map(|instance| instance.ledger.stats().cached.bytes as u64);
        bytes.sum()
    }

    /// Stacks that [`StackCache::reclaim_all`] has given back so far, in any thread.
    pub(crate) fn reclaimed() -> usize {
        RECLAIMED.load(Ordering::Relaxed)
    }

    /// Whether a step that was refused for want of memory or mappings could pass once [`StackCache::reclaim_all`] has
    /// given back what the caches hold. O(n): for a refusal.
    pub(crate) fn could_mend(error: &StepError) -> bool {
        let (mut idle, mut locked) = (0, 0);
        for instance in instances() {
            let stats = instance.ledger.stats();
            idle += stats.mapped().bytes - stats.live.bytes;
            instance.ledger.for_each(|stack, state| {
                if state == State::Cached && stack.is_locked() {
                    locked += stack.size();
                }
            });
        }
        // What is missing even then. Every limit but that on the number of mappings is a sum of sizes.
        let missing = error.bytes.saturating_sub(idle);
        let passes = |how| missing == 0 || map_probe::ask(how, missing).is_ok();
        // A filter can kill for a call with other arguments than the refused one's; then it has to be tried.
        let is_filtered = || {
            // Reading files is a cancellation point.
            let _cancellation = NoCancellation::new();
            Status::read().calls() == Calls::FilesOnly
        };
        let full = || map_probe::ask(Question::Count, 0) == Err(Errno::ENOMEM);
        match (error.step, error.errno) {
            _ if idle == 0 => false,
            // A cgroup counts the memory of cached stacks together with the kernel's for a task. EINVAL: there is
            // enough of it, and what refuses comes later.
            (Step::Clone, Errno::ENOMEM) => {
                error.call == CloneCall::Clone
                    || probe(Probe::PidNumber { fs: true }) != Err(Errno::EINVAL)
            }
            (Step::Clone, _) => false,
            (Step::PrepareStack, Errno::ENOMEM | Errno::EAGAIN) => {
                locked > 0 && fits_locked(error.bytes, locked)
            }
            // Locked with its creation (mlockall's MCL_FUTURE): without access, so that nothing is made resident.
            (_, Errno::EAGAIN) => is_filtered() || passes(Question::Inaccessible),
            (_, Errno::ENOMEM) => passes(Question::Stack) || is_filtered() || full(),
            _ => false,
        }
    }
}

/// Whether RLIMIT_MEMLOCK has room for `bytes` more if `less` were unlocked; `true` if that cannot be read.
fn fits_locked(bytes: usize, less: usize) -> bool {
    // Reading files is a cancellation point.
    let _cancellation = NoCancellation::new();
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK).ok();
    let in_use = Status::read().locked;
    limit.zip(in_use).is_none_or(|((soft, _), in_use)| {
        in_use
            .saturating_sub(less as u64)
            .saturating_add(bytes as u64)
            <= soft
    })
}

impl Clone for StackCache {
    fn clone(&self) -> StackCache {
        if !self.0.is_global() {
            self.0.handles.fetch_add(1, Ordering::Relaxed);
        }
        StackCache(self.0)
    }
}

impl Drop for StackCache {
    fn drop(&mut self) {
        if self.0.is_global() || self.0.handles.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        if self.is_usable() {
            self.unmap_all();
            // Threads that run or are on their way out give their stacks to the global cache.
            self.unmap(self.0.ledger.hand_over(&GLOBAL_INSTANCE.ledger));
        }
        IN_USE.fetch_sub(1, Ordering::Relaxed);
        self.0.unused.store(true, Ordering::Release);
    }
}

impl std::fmt::Debug for StackCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("StackCache").field(&self.stats()).finish()
    }
}

/// Gives malloc back what it keeps for ended threads whose stacks are unmapped.
fn release_heaps() {
    let Some(runtime) = Runtime::existing() else {
        return;
    };
    let mut parked = RECORDS.iter().filter(|stack| stack.has_parked());
    let first = parked.next();
    let released = |stack: &'static Stack| runtime.release(&|| stack.take_parked());
    if first.is_some_and(released) {
        // The rest, until one is refused.
        let _ = parked.all(released);
        // SAFETY: takes no pointers.
        unsafe { libc::malloc_trim(0) };
    }
}

/// What became of some victims.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Eviction {
    /// Given back to the kernel.
    unmapped: usize,
    /// munmap was refused.
    refused: usize,
    /// The stack in question was unmapped.
    pub(super) found: bool,
}

impl Eviction {
    /// munmap is refused where it would split a mapping at vm.max_map_count. What went meanwhile can have
    /// made room, or have been the neighbour.
    fn is_worth_another(self) -> bool {
        self.unmapped > 0 && self.refused > 0
    }
}

/// Unmaps victims, and says whether `which` was one of them. A stack whose munmap is refused goes
/// back to its ledger (dropping or popping on does that), so nothing is lost.
pub(super) fn unmap_victims(
    mut victims: Victims<'_, Stack>,
    runtime: Option<&Runtime>,
    which: *const Stack,
) -> Eviction {
    let mut round = Eviction::default();
    // Without a runtime there has been no thread, and so there is no stack to unmap.
    let Some(runtime) = runtime else { return round };
    while let Some(stack) = victims.pop() {
        if victims.are_excess() && !stack.is_discarded() {
            // Its handle was dropped a moment before the thread was gone. It goes back, and is kept if it fits.
            stack.reap();
            continue;
        }
        // SAFETY: a victim is idle (the ledger saw its tid word cleared) and the popper's alone.
        if unsafe { stack.unmap(runtime) } {
            victims.unmapped();
            round.found |= std::ptr::eq(stack, which);
            stack.retire_record();
            round.unmapped += 1;
        } else {
            round.refused += 1;
        }
    }
    round
}

/// When a thread of this crate last gave its stack back, in milliseconds of [`now`].
static LAST_END: AtomicU64 = AtomicU64::new(0);

/// The coarse monotonic clock (no system call), in milliseconds; never 0.
fn now() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC_COARSE).map_or(1, |now| {
        now.tv_sec() as u64 * 1000 + now.tv_nsec() as u64 / 1_000_000 + 1
    })
}

/// Whether a thread of this crate has ended within so many milliseconds.
pub(crate) fn thread_ended_within(milliseconds: u64) -> bool {
    let last = LAST_END.load(Ordering::Relaxed);
    last != 0 && now().saturating_sub(last) <= milliseconds
}

/// In a forked child only the calling thread exists: no tid word of another will ever be cleared, glibc has emptied its
/// list of threads, and saved heap caches refer to arenas whose counts were reset (G16). Makes the records say so,
/// and the ledgers anew. Locks that other threads held are free afterwards. May be repeated.
///
/// In a `bare` child (`_Fork`, a bare clone) only the records are repaired, so that handles answer: no thread is made
/// there, and no stack is given back or unmapped, because malloc's locks can be held for ever.
///
/// # Safety
/// The process is a forked child, and no other thread of it uses the crate.
pub(crate) unsafe fn repair_after_fork(bare: bool) {
    let own = crate::sys::thread_pointer();
    let process = crate::sys::process_id();
    // A caller that a child handler of the program has started is not the thread that forked. That one's tid is the
    // process's: glibc's fork has written it into the descriptor.
    let forked = nix::unistd::gettid().as_raw() == process;
    let is_own = |stack: &Stack| match stack.tid_word() {
        Some(_) if forked => stack.block.thread_pointer() == own,
        Some(tid) => tid.load(Ordering::Relaxed) == process.cast_unsigned(),
        // The record of a stack that was unmapped keeps an address that can be the caller's by now.
        None => false,
    };
    for stack in RECORDS.iter() {
        stack.forget_senders();
        if !is_own(stack) {
            stack.forget_thread();
        } else if let Some(runtime) = Runtime::existing() {
            // SAFETY: the descriptor of the thread that forked, which no other thread of this process uses.
            unsafe { runtime.forget_senders(stack.block.thread_pointer()) };
            #[cfg(feature = "interpose")]
            stack.forget_joiner();
        }
    }
    // SAFETY: a forked child, where no other thread uses the crate: a thread that holds one of them is the parent's.
    unsafe {
        record::SPARE.reset();
        CAPS.reset();
    }
    if bare {
        return;
    }
    // SAFETY: a forked child, where no other thread uses the crate, and so none is inside a ledger's call.
    unsafe {
        for instance in instances() {
            let in_use = |stack: &Stack| is_own(stack) || stack.has_handle();
            instance.ledger.rebuild(RECORDS.iter(), in_use);
        }
    }
}
