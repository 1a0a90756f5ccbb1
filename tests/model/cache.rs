//! The stack cache as its users see it, against a simple model: real threads on real mappings that start,
//! end in every way, and meet trim, clear and new budgets in random order.
//!
//! After every step the accounts are the model's, the process's address space is what the accounts say, every
//! stack is mapped or gone as the model says, and no cached stack keeps more memory than is counted for it.

use std::collections::VecDeque;
use std::hint::black_box;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use nptl::{Builder, JoinHandle, StackCache, StackCacheConfig};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use support::{case, child, or_skip, report, resident_pages, short_or_long};

const PAGE: usize = 4096;
const KIB: usize = 1024;

/// Stack and guard sizes, each a class of its own but the last, which has none: its guard is too large.
const KINDS: [(usize, usize); 6] = [
    (16 * KIB, PAGE),
    (64 * KIB, PAGE),
    (64 * KIB, 0),
    (256 * KIB, 16 * PAGE),
    (1024 * KIB, PAGE),
    (64 * KIB, 17 * PAGE),
];
const CLASSLESS: usize = KINDS.len() - 1;

/// Stacks that one give unmaps at most: `ledger::EVICT`.
const EVICT: usize = 4;
/// Pending stacks that each call looks at, and those that a take looks at before it reports a miss.
const LOOK: usize = 4;
const LOOK_ON_MISS: usize = 8;

#[derive(Clone, Copy, Debug)]
enum ThreadEnd {
    Joined,
    /// Its handle is dropped first.
    Detached,
    /// The handle is dropped after its end.
    Dropped,
    /// By a bare exit(2), and joined.
    Died,
    /// By a bare exit(2), and detached: no thread gives its stack back.
    Unowned,
}

#[derive(Clone, Debug)]
enum Action {
    /// A thread that uses so many pages of its stack.
    Spawn {
        kind: usize,
        pages: usize,
    },
    Exit {
        which: usize,
        end: ThreadEnd,
    },
    Trim(usize),
    Clear,
    /// None: disabled.
    Config(Option<(usize, usize, bool)>),
}

fn step() -> impl Strategy<Value = Action> {
    let end = prop_oneof![
        8 => Just(ThreadEnd::Joined),
        5 => Just(ThreadEnd::Detached),
        3 => Just(ThreadEnd::Dropped),
        1 => Just(ThreadEnd::Died),
        1 => Just(ThreadEnd::Unowned),
    ];
    let config = (0usize..3000, 0usize..100, any::<bool>())
        .prop_map(|(budget, keep, zeroed)| (budget * KIB, keep * KIB, zeroed));
    prop_oneof![
        20 => (0..KINDS.len(), 1usize..200).prop_map(|(kind, pages)| Action::Spawn { kind, pages }),
        18 => (any::<usize>(), end).prop_map(|(which, end)| Action::Exit { which, end }),
        2 => (0usize..2000).prop_map(|kib| Action::Trim(kib * KIB)),
        1 => Just(Action::Clear),
        2 => prop_oneof![6 => config.prop_map(Some), 1 => Just(None)].prop_map(Action::Config),
    ]
}

/// A stack, as the model knows it.
#[derive(Clone, Copy, Debug)]
struct Stack {
    base: usize,
    kind: usize,
    keep: usize,
    /// When its last thread was started, in steps.
    started: usize,
    /// Of a cached stack: its resident bytes, once the budget was reached and it was asked.
    measured: Option<usize>,
    /// Those that it would find, as of the end of its last thread.
    truth: usize,
}

/// Bytes of signal stack, its guard, and TLS block; the same for all.
#[derive(Clone, Copy)]
struct Overhead(usize);

impl Overhead {
    fn bytes(self, stack: &Stack) -> usize {
        let (size, guard) = KINDS[stack.kind];
        size + guard + self.0
    }

    /// What the cache counts.
    fn resident(self, stack: &Stack) -> usize {
        stack.measured.unwrap_or_else(|| self.bound(stack))
    }

    /// As mincore(2) reports it.
    fn truth(self, stack: &Stack) -> Option<usize> {
        let size = KINDS[stack.kind].0;
        let keep = stack.keep.min(size);
        let pages = resident_pages(stack.base + size - keep, keep + self.0)?;
        Some(pages * PAGE)
    }

    fn bound(self, stack: &Stack) -> usize {
        let size = KINDS[stack.kind].0;
        // Of a thread that died as well: the thread that reaps it discards what it used.
        // The guard of the signal stack has no memory.
        stack.keep.min(size) + self.0 - PAGE
    }
}

struct Thread {
    stack: Stack,
    handle: Option<JoinHandle<()>>,
    pidfd: OwnedFd,
    /// Whether to die of a bare exit.
    end: Sender<bool>,
}

/// The cache's policy on plain lists.
struct Model {
    overhead: Overhead,
    budget: usize,
    keep: usize,
    enabled: bool,
    /// Youngest first.
    cached: VecDeque<Stack>,
    /// Given back, and not yet seen to be free.
    pending: VecDeque<Stack>,
    doomed: VecDeque<Stack>,
    unowned: Vec<Stack>,
    hits: u64,
    misses: u64,
    evictions: u64,
    gone: VecDeque<usize>,
}

impl Model {
    fn configure(&mut self, config: Option<(usize, usize, bool)>) -> StackCacheConfig {
        let default = StackCacheConfig::default();
        let Some((budget, keep, zeroed)) = config else {
            // The default's 32 KiB hold for what is mapped meanwhile.
            (self.enabled, self.keep) = (false, 32 * KIB);
            return StackCacheConfig::disabled();
        };
        (self.enabled, self.budget) = (true, budget);
        let keep_of = if zeroed { 0 } else { keep };
        self.keep = keep_of.max(1).next_multiple_of(PAGE);
        default
            .resident_budget(budget)
            .keep_resident(keep)
            .zeroed(zeroed)
    }

    fn resident(&self) -> usize {
        self.cached.iter().map(|s| self.overhead.resident(s)).sum()
    }

    fn shelve(&mut self, stack: Stack) {
        let stack = Stack {
            measured: None,
            ..stack
        };
        let fits = self.enabled && self.overhead.resident(&stack) <= self.budget;
        if fits && stack.kind != CLASSLESS {
            self.cached.push_front(stack);
        } else {
            self.doomed.push_back(stack);
        }
    }

    /// Looks at some stacks that detached threads have given back. The threads have ended by now.
    fn settle(&mut self, most: usize) {
        for _ in 0..most {
            let Some(stack) = self.pending.pop_front() else {
                return;
            };
            self.shelve(stack);
        }
    }

    /// What a spawn or a join measures and unmaps.
    fn evict_some(&mut self) {
        let _ = (0..EVICT).take_while(|_| self.evict(None)).count();
    }

    /// One stack measured or less, if there is one too many.
    fn evict(&mut self, trim: Option<usize>) -> bool {
        let limit = if self.enabled {
            self.budget.min(trim.unwrap_or(usize::MAX))
        } else {
            0
        };
        let bounds = self.cached.iter().filter(|s| s.measured.is_none());
        let unmeasured = bounds.count();
        if self.enabled && self.resident() > limit && trim.is_none() && unmeasured > 0 {
            // The measured ones are the colder ones.
            let coldest = &mut self.cached[unmeasured - 1];
            if unmeasured > 1 || self.overhead.resident(coldest) > limit / 64 {
                coldest.measured = Some(coldest.truth);
                return true;
            }
        }
        let over = self.resident() > limit || (!self.enabled && !self.cached.is_empty());
        let victim = if over {
            self.evictions += 1;
            self.cached.pop_back()
        } else {
            self.doomed.pop_front()
        };
        let Some(stack) = victim else { return false };
        self.gone.push_front(stack.base);
        self.gone.truncate(50);
        true
    }

    fn shrink(&mut self, trim: Option<usize>) {
        let mut unowned = std::mem::take(&mut self.unowned);
        unowned.sort_by_key(|stack| stack.started);
        let found = unowned.len();
        // The thread that was started first is found first.
        unowned.into_iter().for_each(|stack| self.shelve(stack));
        let _ = (0..found).take_while(|_| self.evict(None)).count();
        self.settle(usize::MAX);
        while self.evict(trim) {}
    }

    fn clear(&mut self) {
        let enabled = self.enabled;
        self.shrink(None);
        self.enabled = false;
        while self.evict(Some(0)) {}
        self.enabled = enabled;
    }

    fn take(&mut self, kind: usize) -> Option<Stack> {
        if kind == CLASSLESS {
            self.misses += 1;
            return None;
        }
        self.settle(LOOK);
        let find = |model: &Model| model.cached.iter().position(|stack| stack.kind == kind);
        let mut found = find(self);
        if found.is_none() {
            self.settle(LOOK_ON_MISS);
            found = find(self);
        }
        match found {
            Some(_) => self.hits += 1,
            None => self.misses += 1,
        }
        let stack = found.and_then(|at| self.cached.remove(at));
        self.evict_some();
        stack.map(|stack| Stack {
            keep: self.keep,
            ..stack
        })
    }
}

fn touch(pages: usize) {
    let page = [1_u8; PAGE];
    black_box(&page);
    if pages > 1 {
        touch(pages - 1);
    }
    black_box(&page);
}

struct Both {
    cache: StackCache,
    model: Model,
    threads: Vec<Thread>,
    /// Pages of the process that are neither stacks of the cache nor heap.
    other_pages: usize,
    step: usize,
}

/// Pages of address space without the heap, which is one piece (see [`one_heap`]), less a constant.
fn pages_without_heap() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("statm");
    let size: usize = statm
        .split(' ')
        .next()
        .and_then(|n| n.parse().ok())
        .expect("a number");
    // SAFETY: asks where the heap ends.
    let heap = unsafe { libc::sbrk(0) } as usize;
    size.wrapping_sub(heap / PAGE)
}

/// malloc takes memory from the end of the heap only: no other mappings come and go.
fn one_heap() {
    // SAFETY: plain settings, before there is a second thread that allocates.
    unsafe {
        assert_eq!(libc::mallopt(libc::M_ARENA_MAX, 1), 1);
        assert_eq!(libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20), 1);
        assert_eq!(libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX), 1);
    }
}

fn wait_for_end(pidfd: &OwnedFd) {
    let mut entry = libc::pollfd {
        fd: pidfd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid entry.
    assert_eq!(unsafe { libc::poll(&raw mut entry, 1, 60_000) }, 1);
}

/// A failed case must not disturb the shrunk one that follows it.
impl Drop for Both {
    fn drop(&mut self) {
        for thread in self.threads.drain(..) {
            let _ = thread.end.send(false);
            wait_for_end(&thread.pidfd);
        }
        self.cache.clear();
        StackCache::global().clear();
    }
}

impl Both {
    fn new(overhead: Overhead) -> Both {
        let config = (1500 * KIB, 16 * KIB, false);
        let mut model = Model {
            overhead,
            budget: 0,
            keep: 0,
            enabled: true,
            cached: VecDeque::new(),
            pending: VecDeque::new(),
            doomed: VecDeque::new(),
            unowned: Vec::new(),
            hits: 0,
            misses: 0,
            evictions: 0,
            gone: VecDeque::new(),
        };
        let cache = StackCache::new(model.configure(Some(config)));
        Both {
            cache,
            model,
            threads: Vec::new(),
            other_pages: pages_without_heap(),
            step: 0,
        }
    }

    fn run(&mut self, step: &Action) {
        match *step {
            Action::Spawn { kind, pages } => self.spawn(kind, pages),
            Action::Exit { which, end } => {
                if !self.threads.is_empty() {
                    let which = which % self.threads.len();
                    self.exit(which, end);
                }
            }
            Action::Trim(bytes) => {
                self.cache.trim(bytes);
                self.model.shrink(Some(bytes));
            }
            Action::Clear => {
                self.cache.clear();
                self.model.clear();
            }
            Action::Config(config) => {
                let config = self.model.configure(config);
                self.cache.set_config(config);
                // Unowned stacks are looked for by trim and clear only.
                let unowned = std::mem::take(&mut self.model.unowned);
                self.model.shrink(None);
                self.model.unowned = unowned;
            }
        }
        self.check();
    }

    fn spawn(&mut self, kind: usize, pages: usize) {
        let (size, guard) = KINDS[kind];
        let (end, wait) = channel();
        let (ready, is_ready) = channel();
        let pages = pages.min(size / 2 / PAGE).max(1);
        let body = move || {
            touch(pages);
            ready.send(()).expect("the model waits");
            if wait.recv() == Ok(true) {
                // SAFETY: ends this thread; nothing of it is used any more.
                unsafe { libc::syscall(libc::SYS_exit, 0) };
            }
        };
        let expected = self.model.take(kind);
        let builder = Builder::new().stack_size(size).guard_size(guard);
        let handle = builder
            .stack_cache(&self.cache)
            .spawn(body)
            .expect("a thread");
        is_ready.recv().expect("it runs");
        let info = handle.stack();
        assert_eq!((info.size, info.guard_size), KINDS[kind]);
        if let Some(stack) = expected {
            assert_eq!(info.base, stack.base, "not the warmest of its class");
        }
        let fresh = Stack {
            base: info.base,
            kind,
            keep: self.model.keep,
            started: self.step,
            measured: None,
            truth: 0,
        };
        self.threads.push(Thread {
            stack: Stack {
                started: self.step,
                ..expected.unwrap_or(fresh)
            },
            pidfd: handle.pidfd().expect("a pidfd"),
            handle: Some(handle),
            end,
        });
    }

    fn exit(&mut self, which: usize, end: ThreadEnd) {
        let mut thread = self.threads.swap_remove(which);
        let stack = thread.stack;
        let handle = thread.handle.take().expect("not taken yet");
        let dies = matches!(end, ThreadEnd::Died | ThreadEnd::Unowned);
        let keeps_handle = matches!(
            end,
            ThreadEnd::Joined | ThreadEnd::Dropped | ThreadEnd::Died
        );
        // Detached before it ends, unless the handle is still to be used.
        let handle = Some(handle).filter(|_| keeps_handle);
        thread.end.send(dies).expect("it waits");
        wait_for_end(&thread.pidfd);
        match (end, handle) {
            (ThreadEnd::Joined, Some(handle)) => handle.join().expect("it does not panic"),
            (ThreadEnd::Died, Some(handle)) => assert!(handle.join().is_err()),
            (_, handle) => drop(handle),
        }
        let stack = Stack {
            truth: self.model.overhead.truth(&stack).unwrap_or(0),
            ..stack
        };
        match end {
            ThreadEnd::Unowned => self.model.unowned.push(stack),
            // The thread unmaps nothing.
            ThreadEnd::Detached => self.model.pending.push_back(stack),
            ThreadEnd::Joined | ThreadEnd::Dropped | ThreadEnd::Died => {
                self.model.settle(LOOK);
                self.model.shelve(stack);
                self.model.evict_some();
            }
        }
    }

    fn check(&mut self) {
        self.step += 1;
        let (stats, model) = (self.cache.stats(), &self.model);
        let live: Vec<Stack> = self.threads.iter().map(|thread| thread.stack).collect();
        let on_the_way = model
            .pending
            .iter()
            .chain(&model.doomed)
            .chain(&model.unowned);
        let idle: Vec<Stack> = model.cached.iter().chain(on_the_way).copied().collect();
        let bytes = |stacks: &mut dyn Iterator<Item = &Stack>| {
            stacks
                .map(|stack| model.overhead.bytes(stack))
                .sum::<usize>()
        };
        let mapped = live.len() + idle.len();

        // The accounts.
        assert_eq!(stats.mapped_stacks, stats.live_stacks + stats.cached_stacks);
        let got = (stats.mapped_stacks, stats.cached_stacks);
        assert_eq!(got, (mapped, model.cached.len()), "{stats:?}");
        assert_eq!(stats.cached_virtual_bytes, bytes(&mut model.cached.iter()));
        assert_eq!(
            stats.mapped_virtual_bytes,
            bytes(&mut live.iter().chain(&idle))
        );
        assert_eq!(stats.cached_resident_bytes, model.resident());
        let got = (stats.hits, stats.misses, stats.evictions);
        assert_eq!(got, (model.hits, model.misses, model.evictions));

        // The address space, to the page.
        let others = pages_without_heap().wrapping_sub(stats.mapped_virtual_bytes / PAGE);
        assert_eq!(
            others, self.other_pages,
            "mapped or unmapped beside the accounts"
        );
        let mut memory = 0;
        let mut ranges = Vec::new();
        for stack in live.iter().chain(&idle) {
            let (size, guard) = KINDS[stack.kind];
            let (start, length) = (stack.base - guard, model.overhead.bytes(stack));
            assert!(
                resident_pages(start, length).is_some(),
                "{stack:?} is not mapped"
            );
            let above_guard = size + model.overhead.0;
            let resident = PAGE * resident_pages(stack.base, above_guard).expect("mapped");
            memory += resident;
            ranges.push((start, start + length, resident));
        }
        for &base in &model.gone {
            let reused = ranges
                .iter()
                .any(|&(start, end, _)| (start..end).contains(&base));
            assert!(
                reused || !support::is_mapped(base),
                "{base:#x} is still mapped"
            );
        }

        // Memory: each cached stack, and all together as the kernel counts it.
        for stack in &model.cached {
            let length = KINDS[stack.kind].0 + model.overhead.0;
            let resident = PAGE * resident_pages(stack.base, length).expect("mapped");
            let counted = model.overhead.resident(stack);
            assert!(
                resident <= counted,
                "{resident} bytes of {counted}: {stack:?}"
            );
        }
        if self.step.is_multiple_of(16) && compare_with_smaps(&ranges) {
            report("smaps", memory);
        }
    }
}

/// Neighbours are one mapping to the kernel. Wherever a mapping consists of our stacks only, its `Rss` is
/// what mincore says of them. False: there was no such mapping.
fn compare_with_smaps(stacks: &[(usize, usize, usize)]) -> bool {
    let smaps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
    let mut mapping = 0..0;
    let mut compared = false;
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-') {
            let parse = |text| usize::from_str_radix(text, 16).expect("an address");
            mapping = parse(start)..parse(end);
        } else if let Some(rss) = line.strip_prefix("Rss:") {
            let rss: usize = rss
                .trim()
                .trim_end_matches(" kB")
                .parse()
                .expect("a number");
            let inside = |&&(start, end, _): &&(usize, usize, usize)| {
                mapping.start <= start && end <= mapping.end
            };
            let ours = stacks.iter().filter(inside);
            let length: usize = ours.clone().map(|(start, end, _)| end - start).sum();
            if length > 0 && length == mapping.len() {
                let counted: usize = ours.map(|(_, _, resident)| resident).sum();
                assert_eq!(rss * KIB, counted, "{mapping:x?}");
                compared = true;
            }
        }
    }
    compared
}

/// What lies above the stack of a thread, in bytes.
fn overhead() -> Overhead {
    let cache = StackCache::new(StackCacheConfig::default());
    let builder = Builder::new().stack_cache(&cache).stack_size(64 * KIB);
    builder.spawn(|| ()).unwrap().join().unwrap();
    let stats = cache.stats();
    Overhead(stats.mapped_virtual_bytes - 64 * KIB - PAGE)
}

#[test]
fn the_cache_agrees_with_its_model() {
    if case().is_some() {
        one_heap();
        if !support::kernel_at_least(6, 9) {
            support::skip!("pidfds of threads need kernel 6.9");
        }
        let overhead = overhead();
        // Whatever is allocated once by the first of each kind of step.
        let mut first = Both::new(overhead);
        first.spawn(0, 1);
        first.exit(0, ThreadEnd::Detached);
        drop(first);
        StackCache::global().clear();

        let mut steps_run = 0;
        let mut runner = TestRunner::new(ProptestConfig {
            cases: short_or_long(20, 40) as u32,
            failure_persistence: None,
            max_shrink_time: 10_000,
            ..ProptestConfig::default()
        });
        let count = std::cell::Cell::new(0);
        let result = runner.run(&prop::collection::vec(step(), 1..400), |steps| {
            let mut both = Both::new(overhead);
            count.set(count.get() + steps.len());
            for step in &steps {
                both.run(step);
            }
            while !both.threads.is_empty() {
                both.exit(0, ThreadEnd::Joined);
                both.check();
            }
            both.cache.clear();
            both.model.clear();
            both.check();
            assert_eq!(both.cache.stats().mapped_stacks, 0);
            Ok(())
        });
        steps_run += count.get();
        report("steps", steps_run);
        if let Err(error) = result {
            panic!("{error}");
        }
        return;
    }
    let child =
        child("cache::the_cache_agrees_with_its_model", "run").time_limit(Duration::from_secs(300));
    let output = or_skip!(child.run()).success();
    if output.skipped().is_none() {
        let steps: usize = output
            .get("steps")
            .expect("a count")
            .parse()
            .expect("a number");
        assert!(steps >= short_or_long(1500, 3000), "{steps} steps only");
        assert!(
            output.all("smaps").len() >= short_or_long(20, 50),
            "smaps were hardly ever comparable"
        );
    }
}
