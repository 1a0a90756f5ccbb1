//! What a caller configures of a [`StackCache`](crate::StackCache), and its statistics.

use super::ledger::Stats;
use crate::sys::page_size;

/// 64 MiB: a thousand default stacks at their upper bound of 56 to 64 KiB each (the signal stack grows with
/// the processor's vector registers), and seven thousand whose threads used two or three pages.
const DEFAULT_BUDGET: usize = 64 << 20;

/// What an empty closure, a formatted message or a small vector needs, with room to spare.
const DEFAULT_KEEP: usize = 32 << 10;

/// What a [`StackCache`](crate::StackCache) may keep.
///
/// # Where address space or mappings are short
/// Only memory counts, with two exceptions. Where RLIMIT_AS is finite (getrlimit(2)), all caches together
/// keep at most an eighth of it. Where guards are mappings of their own (before Linux 6.13, or in memory
/// locked by mlockall(2)), all caches together keep at most so many stacks that these and their guards are
/// a quarter of `vm.max_map_count`, which is read once, with the first such guard. Each cache gets an equal part
/// of it. RLIMIT_AS is read again where a cache that keeps anything maps a stack, and at every 16th reuse of
/// one.
///
/// ```
/// use nptl::{StackCache, StackCacheConfig};
/// let cache = StackCache::new(StackCacheConfig::default().resident_budget(8 << 20));
/// assert_eq!(cache.stats().cached_stacks, 0);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StackCacheConfig {
    pub(super) resident_budget: usize,
    pub(super) keep_resident: usize,
    pub(super) zeroed: bool,
    pub(super) enabled: bool,
}

impl Default for StackCacheConfig {
    /// 64 MiB of resident memory, of which each stack keeps at most 32 KiB.
    fn default() -> Self {
        StackCacheConfig::DEFAULT
    }
}

impl StackCacheConfig {
    pub(super) const DEFAULT: StackCacheConfig = StackCacheConfig {
        resident_budget: DEFAULT_BUDGET,
        keep_resident: DEFAULT_KEEP,
        zeroed: false,
        enabled: true,
    };

    /// A cache that keeps nothing: every stack is mapped for its thread and unmapped after it.
    ///
    /// ```
    /// let cache = nptl::StackCache::new(nptl::StackCacheConfig::disabled());
    /// nptl::Builder::new().stack_cache(&cache).spawn(|| ())?.join().unwrap();
    /// assert_eq!(cache.stats().mapped_stacks, 0);
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn disabled() -> Self {
        StackCacheConfig {
            enabled: false,
            ..StackCacheConfig::default()
        }
    }

    /// Bytes of memory that cached stacks may occupy; the coldest are unmapped beyond it. Until that is reached, each
    /// counts with the bytes of [`keep_resident`](Self::keep_resident), its signal stack and the block above them, used
    /// or not: 24 to 32 KiB more. Then the coldest are measured with mincore(2) and count with what is resident, often
    /// a fifth of that, before any is unmapped. The rest of its address space does not count. A stack that could
    /// exceed the budget alone is not kept.
    ///
    /// ```
    /// let small = nptl::StackCacheConfig::default().resident_budget(1 << 20);
    /// nptl::StackCache::global().set_config(small);
    /// ```
    pub fn resident_budget(self, bytes: usize) -> Self {
        StackCacheConfig {
            resident_budget: bytes,
            ..self
        }
    }

    /// Bytes at the top of each stack that stay resident when its thread has ended, rounded up to
    /// pages; what it used below is given back with `MADV_DONTNEED`. The next thread on the stack
    /// finds whatever the last one left in them, unless the cache is [`zeroed`](Self::zeroed). At
    /// least one page stays: the thread's last frames are in it.
    ///
    /// The join does that, or the thread as it ends if it has no handle.
    ///
    /// ```
    /// let lean = nptl::StackCacheConfig::default().keep_resident(0);
    /// nptl::StackCache::global().set_config(lean);
    /// ```
    pub fn keep_resident(self, bytes: usize) -> Self {
        StackCacheConfig {
            keep_resident: bytes,
            ..self
        }
    }

    /// Whether a reused stack is as good as a new one: nothing of the thread before it can be read there.
    ///
    /// `false`, the default: the next thread finds what the last one left in the bytes of
    /// [`keep_resident`](Self::keep_resident), and on the signal stack if a handler ran there.
    ///
    /// `true`: the stack, the signal stack and the block above them (struct pthread and thread-locals) are
    /// given back with `MADV_DONTNEED`, or overwritten where they are locked, when the stack is taken again.
    /// One thing goes on from thread to thread, for good reason: libc's own thread-local variables, with
    /// the addresses of the freed heap blocks that malloc keeps for a thread, of the buffers of strsignal(3) and
    /// strerror(3), and from glibc 2.41 on of a random generator's state. The heap is not the stack's: what
    /// a thread has freed there, any other can be given by malloc.
    ///
    /// Between the thread's end and the next one's start, or `munmap`, the last page or two of the stack and
    /// the block still hold what was in them: a core file has it. `keep_resident` has no effect, because
    /// pages that are not reused need not be kept.
    ///
    /// The price is one madvise(2) for each thread, and a page fault for each page that it touches, which a
    /// warm stack does not have: where spawn and join of an empty thread took 35 µs, they take 43.
    ///
    /// ```
    /// let zeroed = nptl::StackCacheConfig::default().zeroed(true);
    /// let cache = nptl::StackCache::new(zeroed);
    /// assert_eq!(cache.config(), zeroed);
    /// ```
    pub fn zeroed(self, yes: bool) -> Self {
        StackCacheConfig {
            zeroed: yes,
            ..self
        }
    }

    /// What each stack keeps, in bytes.
    pub(super) fn kept(self) -> usize {
        remainder(if self.zeroed { 0 } else { self.keep_resident })
    }
}

/// The accounts of a [`StackCache`](crate::StackCache) at one instant: `live_stacks + cached_stacks = mapped_stacks`.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StackCacheStats {
    /// Spawns that found a stack here, each counted once: its first attempt decides.
    pub hits: u64,
    /// Spawns that found none, also those that were refused.
    pub misses: u64,
    /// Cached stacks that were unmapped to keep the budget, by `trim` or by `clear`.
    pub evictions: u64,
    /// Stacks that are ready for the next thread.
    pub cached_stacks: usize,
    /// Address space of those, in bytes.
    pub cached_virtual_bytes: usize,
    /// Memory of those, in bytes, at most: what may be resident is counted as resident, except for stacks that were
    /// measured because the budget was reached.
    pub cached_resident_bytes: usize,
    /// Stacks of threads that run, that end, or that are not joined yet, and the few that are on
    /// their way back to the kernel.
    pub live_stacks: usize,
    /// All of them.
    pub mapped_stacks: usize,
    /// Their address space, in bytes.
    pub mapped_virtual_bytes: usize,
}

impl StackCacheStats {
    pub(super) fn of(stats: &Stats) -> StackCacheStats {
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

/// Whole pages, and never none: an ending thread discards what is below them while it still runs
/// in the topmost.
fn remainder(bytes: usize) -> usize {
    let page = page_size();
    bytes
        .max(1)
        .checked_next_multiple_of(page)
        .unwrap_or(usize::MAX - page + 1)
}
