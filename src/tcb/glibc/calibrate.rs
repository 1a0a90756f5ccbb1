//! Offsets that no symbol gives: predicted from those that a symbol gives and from the order of the fields, which is
//! the same from 2.34 to 2.43, then verified on a real thread.
//!
//! One thread is started with `pthread_create`, once in a process, on a stack of ours, so that its descriptor stays
//! readable after its end. A prediction that does not hold there is an unsupported glibc. What is compared between two
//! moments lies in a part of the descriptor that no other thread writes: links of the list, `setxid_futex` and
//! `cancelhandling` change at any time, and scheduling flags are inherited (G27).
//!
//! The thread is needed in any case: only a real `pthread_create` ends glibc's single-thread fast
//! paths (malloc without locks, unlocked stdio) and installs the set-id handler.
//!
//! Its creator can be inside a constructor or a callback of dl_iterate_phdr, with the loader's locks: the thread makes no
//! call that takes one of them (G26).

use super::super::RuntimeError;
use super::symbols::{self, Symbols};
use super::{KEY_BLOCKS, KEYS_PER_BLOCK, list::ThreadList};
use crate::clone;
use crate::step::Step;
use libc::c_void;
use nix::errno::Errno;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// `sizeof (struct robust_list_head)`: the list, the futex offset, the pending operation.
pub(super) const ROBUST_HEAD_SIZE: usize = 24;

/// What the calibration thread returns: `result` is the word that holds it after the join.
const MAGIC: usize = 0x6e70_746c_c0de_2357_u64 as usize;

/// A guard size that `pthread_getattr_np` must find where it was put.
const GUARD: usize = 11 * 4096;

/// A check that fails is tried again before it is called proven.
const TRIES: usize = 3;

/// In `flags`: the stack is the user's; policy and priority are known; the thread registers rseq, if its creator has
/// (`ATTR_FLAG_STACKADDR`, `_SCHED_SET` and `_POLICY_SET`, `_DO_RSEQ` in glibc's internal headers).
const FLAG_STACK: u32 = 0x08;
pub(super) const FLAGS_SCHEDULING: u32 = 0x60;
const FLAG_RSEQ: u32 = 0x80;

/// How glibc marks a thread that its own join and detach must refuse (G12).
#[derive(Clone, Copy, Debug)]
pub(super) enum JoinMark {
    /// Up to 2.42: `joinid` points at the descriptor itself.
    Itself,
    /// From 2.43: `joinstate` holds the value of a detached thread.
    State(u32),
}

/// `exiting` and `exit_lock`, which `pthread_kill` trusts from 2.35 on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Exiting {
    pub flag: usize,
    pub lock: usize,
}

/// Offsets in the descriptor, except `resp` and `segment`, which are relative to the thread pointer.
#[derive(Debug)]
pub(super) struct Offsets {
    pub robust_head: usize,
    /// `futex_offset` as glibc's own threads have it.
    pub robust_futex_offset: usize,
    pub first_key_block: usize,
    pub stackblock: usize,
    pub stackblock_size: usize,
    pub guardsize: usize,
    pub reported_guardsize: usize,
    /// The heap block of priority-protect mutexes.
    pub tpp: usize,
    /// `user_stack`, a bool, or from 2.42 on the low byte of `stack_mode`; and its value where the stack is the user's.
    pub user_stack: (usize, u8),
    pub flags: usize,
    pub result: usize,
    pub join: usize,
    pub join_mark: JoinMark,
    pub resolver: usize,
    pub resp: isize,
    pub segment: Range<isize>,
    pub exiting: Option<Exiting>,
    /// 2.41+: the state of vDSO getrandom, which must not be in two threads (G5).
    pub getrandom: Option<usize>,
    pub strsignal: Option<usize>,
    pub strerror: Option<usize>,
    /// The byte that `pthread_setspecific` sets, if it was found: then keys are looked at only where
    /// there are any.
    pub specific_used: Option<usize>,
}

fn unsupported<T>(what: &'static str) -> Result<T, RuntimeError> {
    Err(RuntimeError::Unsupported(what))
}

/// A descriptor at one moment.
struct Snapshot(Vec<u8>);

impl Snapshot {
    fn empty(size: usize) -> Result<Snapshot, RuntimeError> {
        let mut bytes = Vec::new();
        match bytes.try_reserve_exact(size) {
            Ok(()) => bytes.resize(size, 0),
            Err(_) => return Err(RuntimeError::no_memory(size)),
        }
        Ok(Snapshot(bytes))
    }

    /// # Safety
    /// `tp` is a readable descriptor of this snapshot's size.
    unsafe fn take(&mut self, tp: usize) {
        // SAFETY: sizes agree. Bytes that change meanwhile (rseq) are excluded from every use.
        unsafe {
            std::ptr::copy_nonoverlapping(tp as *const u8, self.0.as_mut_ptr(), self.0.len());
        }
    }

    fn bytes<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.0.get(at..at.checked_add(N)?)?.try_into().ok()
    }

    fn word(&self, at: usize) -> usize {
        self.bytes(at).map_or(0, usize::from_ne_bytes)
    }

    fn half(&self, at: usize) -> u32 {
        self.bytes(at).map_or(0, u32::from_ne_bytes)
    }

    fn byte(&self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }
}

/// What the calibration thread and its creator share.
struct Seen<'a> {
    symbols: &'a Symbols,
    list: &'a ThreadList,
    /// Lowest address of the stack, and its length.
    stack: (usize, usize),
    tp: usize,
    start: Snapshot,
    /// Unless a filter denies it.
    after_getschedparam: Option<Snapshot>,
    after_getrandom: Snapshot,
    after_strsignal: Snapshot,
    after_strerror: Snapshot,
    after_setspecific: Snapshot,
    resolver: usize,
    listed: bool,
    tid: u32,
    counted: bool,
    /// The word before `result` while the thread was detached.
    detached: usize,
    guard: usize,
    dtv_is_known: bool,
    rseq_is_known: bool,
    resp_is_known: bool,
    keys_are_known: bool,
}

/// Another malloc (jemalloc, for one) sets a pthread key at a thread's first allocation, which
/// changes the descriptor: before the snapshots, so that they differ in what is looked for only.
fn first_allocation() {
    // SAFETY: a block that nobody else knows is freed again.
    unsafe { libc::free(std::hint::black_box(libc::malloc(64))) };
}

/// The destructor of a key that is deleted in time.
///
/// # Safety
/// None is needed: it is the type that pthread_key_create(3) asks for.
unsafe extern "C" fn never_called(_: *mut c_void) {}

/// # Safety
/// `argument` is a `Seen` whose owner waits for this thread's end.
unsafe extern "C" fn look(argument: *mut c_void) -> *mut c_void {
    // SAFETY: the creator waits in pthread_join while this thread writes to what it passed.
    let seen = unsafe { &mut *argument.cast::<Seen>() };
    let symbols = seen.symbols;
    let tp = clone::thread_pointer();
    seen.tp = tp;
    if tp != seen.expected_tp() {
        // Past the end of a descriptor of another size there need not be anything.
        return std::ptr::null_mut();
    }
    // SAFETY: the thread's own descriptor, of the size that its place shows; libc's functions are called as documented.
    unsafe {
        if !symbols.shape.locale.is_null() {
            libc::uselocale(symbols.shape.locale);
        }
        first_allocation();
        seen.start.take(tp);

        // pthread_getschedparam asks the kernel and caches the answer: `flags` is where it notes so.
        let (mut policy, mut param) = (0, std::mem::zeroed::<libc::sched_param>());
        let this = libc::pthread_self();
        if libc::pthread_getschedparam(this, &raw mut policy, &raw mut param) != 0 {
            seen.after_getschedparam = None;
        }
        if let Some(snapshot) = &mut seen.after_getschedparam {
            snapshot.take(tp);
        }
        let mut byte = 0_u8;
        libc::getrandom((&raw mut byte).cast(), 1, 0);
        seen.after_getrandom.take(tp);
        libc::strsignal(libc::SIGRTMIN() + 1);
        seen.after_strsignal.take(tp);
        libc::strerror(99_999);
        seen.after_strerror.take(tp);

        seen.resolver = symbols::__res_state() as usize;
        let segment = tp.wrapping_add_signed(symbols.shape.segment_start);
        let resp = tp.wrapping_add_signed(symbols.shape.resp);
        seen.dtv_is_known = symbols
            .shape
            .segment
            .is_in(seen.start.word(symbols.dtv), segment);
        seen.resp_is_known = (segment..segment + symbols.shape.segment.size).contains(&resp)
            && (resp as *const usize).read_unaligned() == seen.resolver;
        seen.rseq_is_known = symbols.knows_rseq(tp);
        seen.tid = libc::gettid() as u32;
        // Its creator and itself.
        seen.counted = symbols.nthreads().load(Ordering::Relaxed) >= 2;
        seen.listed = seen.list.contains(tp + symbols.list);

        let mut key = 0;
        if libc::pthread_key_create(&raw mut key, Some(never_called)) == 0 {
            seen.keys_are_known = symbols.knows_key(key, never_called);
            libc::pthread_setspecific(key, argument);
            seen.after_setspecific.take(tp);
            libc::pthread_setspecific(key, std::ptr::null());
            libc::pthread_key_delete(key);
        }

        // A detached thread, as glibc marks it; and joinable again.
        let mark = (tp + symbols.result() - size_of::<usize>()) as *mut usize;
        let before = mark.read();
        libc::pthread_detach(this);
        seen.detached = mark.read();
        mark.write(before);

        if let Some(stackblock) = seen.stackblock() {
            let reported = (tp + stackblock + REPORTED_GUARDSIZE) as *mut usize;
            let before = reported.replace(GUARD);
            let mut attributes = Attributes::new();
            libc::pthread_attr_destroy(&raw mut attributes.0);
            if libc::pthread_getattr_np(this, &raw mut attributes.0) == 0 {
                libc::pthread_attr_getguardsize(&raw const attributes.0, &raw mut seen.guard);
            }
            reported.write(before);
        }
        MAGIC as *mut c_void
    }
}

// Behind `stackblock`, in this order: its size, the size of its guard, the guard that `pthread_getattr_np` reports, the
// data of priority-protect mutexes, and the resolver's state.
const STACKBLOCK_SIZE: usize = 8;
const GUARDSIZE: usize = 16;
const REPORTED_GUARDSIZE: usize = 24;
const TPP: usize = 32;
const RESOLVER: usize = 40;

impl<'a> Seen<'a> {
    fn new(
        symbols: &'a Symbols,
        list: &'a ThreadList,
        stack: (usize, usize),
    ) -> Result<Seen<'a>, RuntimeError> {
        let snapshot = || Snapshot::empty(symbols.descriptor_size);
        Ok(Seen {
            symbols,
            list,
            stack,
            tp: 0,
            start: snapshot()?,
            after_getschedparam: Some(snapshot()?),
            after_getrandom: snapshot()?,
            after_strsignal: snapshot()?,
            after_strerror: snapshot()?,
            after_setspecific: snapshot()?,
            resolver: 0,
            listed: false,
            tid: 0,
            counted: false,
            detached: 0,
            guard: 0,
            dtv_is_known: false,
            rseq_is_known: false,
            resp_is_known: false,
            // Where there is no key left, it cannot be asked.
            keys_are_known: true,
        })
    }

    fn expected_tp(&self) -> usize {
        self.symbols.thread_pointer_in(self.stack.0 + self.stack.1)
    }

    /// The only place that holds the stack's address and, behind it, its length.
    fn stackblock(&self) -> Option<usize> {
        let (base, length) = self.stack;
        let start = &self.start;
        let is_here = |at: &usize| start.word(*at) == base && start.word(at + 8) == length;
        let mut found = (0..start.0.len()).step_by(8).filter(is_here);
        found.next().filter(|_| found.next().is_none())
    }
}

/// `pthread_create`, with the raw errno that it folds: glibc leaves it in `errno`.
fn create(attributes: &Attributes, seen: &mut Seen<'_>) -> Result<libc::pthread_t, RuntimeError> {
    let mut thread = 0;
    Errno::set_raw(0);
    // SAFETY: the libc crate wants a safe function type; `look` is called once, by the new thread, with the argument that
    // it is written for, which outlives the thread: the caller joins it.
    let answer = unsafe {
        type Routine = extern "C" fn(*mut c_void) -> *mut c_void;
        let routine =
            std::mem::transmute::<unsafe extern "C" fn(*mut c_void) -> *mut c_void, Routine>(look);
        let argument = std::ptr::from_mut(seen).cast();
        libc::pthread_create(&raw mut thread, &raw const attributes.0, routine, argument)
    };
    let raw = Errno::last_raw();
    match answer {
        0 => Ok(thread),
        errno => Err(RuntimeError::Refused {
            step: Step::Clone,
            errno: Errno::from_raw(if errno == libc::EAGAIN && raw != 0 {
                raw
            } else {
                errno
            }),
            bytes: 0,
        }),
    }
}

/// Thread attributes that are destroyed on every way out.
struct Attributes(libc::pthread_attr_t);

impl Attributes {
    fn new() -> Attributes {
        // SAFETY: pthread_attr_init fills it and cannot fail on Linux.
        unsafe {
            let mut attributes = std::mem::zeroed();
            libc::pthread_attr_init(&raw mut attributes);
            Attributes(attributes)
        }
    }
}

impl Drop for Attributes {
    fn drop(&mut self) {
        // SAFETY: initialised in new.
        unsafe { libc::pthread_attr_destroy(&raw mut self.0) };
    }
}

/// Runs the thread and concludes. The caller has blocked application signals and disabled cancellation, because
/// pthread_join is a cancellation point (G28).
pub(super) fn calibrate(symbols: &Symbols, list: &ThreadList) -> Result<Offsets, RuntimeError> {
    let mut tries = 0;
    loop {
        tries += 1;
        match attempt(symbols, list) {
            Err(RuntimeError::Unsupported(_)) if tries < TRIES => {}
            answer => return answer,
        }
    }
}

fn attempt(symbols: &Symbols, list: &ThreadList) -> Result<Offsets, RuntimeError> {
    // Room for what glibc puts into it, and for the calls above.
    let length = (symbols.tls_size + symbols.tls_align + 128 * 1024)
        .next_multiple_of(crate::stack::layout::page_size());
    let stack = memmap2::MmapOptions::new()
        .len(length)
        .stack()
        .map_anon()
        .map_err(|error| RuntimeError::Refused {
            step: Step::MapStack,
            errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::ENOMEM)),
            bytes: length,
        })?;
    let base = stack.as_ptr() as usize;
    let mut seen = Seen::new(symbols, list, (base, length))?;
    let mut ended = Snapshot::empty(symbols.descriptor_size)?;
    let mut attributes = Attributes::new();
    // SAFETY: the mapping outlives the thread, which is joined below.
    unsafe {
        let place = base as *mut c_void;
        if libc::pthread_attr_setstack(&raw mut attributes.0, place, length) != 0 {
            return unsupported("pthread_attr_setstack");
        }
        let thread = create(&attributes, &mut seen)?;
        libc::pthread_join(thread, std::ptr::null_mut());
        if thread as usize != seen.tp {
            return unsupported("pthread_t is not the thread pointer");
        }
        if seen.tp != seen.expected_tp() {
            return unsupported("_thread_db_sizeof_pthread");
        }
        ended.take(seen.tp);
    }
    conclude(&seen, &ended)
}

/// At most one element; two are an error.
fn at_most_one(
    mut found: impl Iterator<Item = usize>,
    what: &'static str,
) -> Result<Option<usize>, RuntimeError> {
    match (found.next(), found.next()) {
        (one, None) => Ok(one),
        _ => unsupported(what),
    }
}

/// What glibc exports is what it is said to be.
fn check_symbols(seen: &Seen<'_>, ended: &Snapshot) -> Result<(), RuntimeError> {
    // EXITING_BITMASK (nptl/descr.h), set at a thread's end.
    const EXITING: u32 = 0x10;
    let (symbols, start) = (seen.symbols, &seen.start);
    let exits = |at: &Snapshot| at.half(symbols.cancelhandling) & EXITING != 0;
    let specific_end = symbols.specific + KEY_BLOCKS * size_of::<usize>();
    let checks = [
        (seen.listed, "a new pthread is not on glibc's thread list"),
        (start.word(symbols.list) != 0, "_thread_db_pthread_list"),
        (seen.counted, "__nptl_nthreads does not count a new pthread"),
        (
            start.half(symbols.tid) == seen.tid && ended.half(symbols.tid) != seen.tid,
            "_thread_db_pthread_tid",
        ),
        (seen.dtv_is_known, "_thread_db_pthread_dtvp"),
        (
            !exits(start) && exits(ended),
            "_thread_db_pthread_cancelhandling",
        ),
        (seen.rseq_is_known, "__rseq_offset"),
        (seen.keys_are_known, "__pthread_keys"),
        (seen.resp_is_known, "__resp is not the resolver's state"),
        // These hold nothing that could be looked for, but each has a neighbour in every glibc from 2.34 to 2.43.
        (
            symbols.schedpolicy == symbols.sched_priority + 4,
            "schedpolicy behind the priority",
        ),
        (
            symbols.nextevent == symbols.eventbuf.0 + symbols.eventbuf.1,
            "nextevent behind eventbuf",
        ),
        (
            symbols.report_events == specific_end + 1,
            "report_events behind the table of pthread keys",
        ),
    ];
    match checks.iter().find(|(holds, _)| !holds) {
        Some((_, what)) => unsupported(what),
        None => Ok(()),
    }
}

fn conclude(seen: &Seen<'_>, ended: &Snapshot) -> Result<Offsets, RuntimeError> {
    check_symbols(seen, ended)?;
    let (symbols, start, tp) = (seen.symbols, &seen.start, seen.tp);

    // An empty list points to itself, and so does the word before it. get_robust_list(2) can be denied (G31).
    let robust_head = symbols.tid + 16;
    let itself = tp + robust_head;
    if start.word(robust_head) != itself || start.word(robust_head - 8) != itself {
        return unsupported("the robust list behind the tid");
    }
    let first_key_block = start.word(symbols.specific).wrapping_sub(tp);
    if first_key_block + KEYS_PER_BLOCK * size_of::<symbols::KeyValue>() != symbols.specific {
        return unsupported("the first block of pthread keys");
    }
    let flags = flags(seen, first_key_block)?;
    let user_stack = user_stack(symbols.report_events, start)?;

    let Some(stackblock) = seen.stackblock() else {
        return unsupported("stackblock");
    };
    if seen.guard != GUARD {
        return unsupported("guardsize beside stackblock_size");
    }
    let resolver = seen.resolver.wrapping_sub(tp);
    let resolver_end = resolver + symbols.resolver_size;
    if resolver != stackblock + RESOLVER
        || start.word(stackblock + TPP) != 0
        || resolver_end > start.0.len()
    {
        return unsupported("the resolver's state behind stackblock");
    }

    let result = symbols.result();
    if ended.word(result) != MAGIC || start.word(result) == MAGIC {
        return unsupported("result before the priority");
    }
    let join = result - size_of::<usize>();
    let before = start.word(join);
    let join_mark = match seen.detached {
        itself if itself == tp && before == 0 => JoinMark::Itself,
        state if (1..16).contains(&(state as u32)) && before as u32 != state as u32 => {
            JoinMark::State(state as u32)
        }
        _ => return unsupported("joinid or joinstate before result"),
    };

    // No other thread writes behind the resolver's state, but for the kernel, into the rseq area.
    let (rseq_start, rseq_end) = symbols.rseq.map_or((0, 0), |rseq| {
        let start = rseq.offset.max(0) as usize;
        (start, start + rseq.registered_size())
    });
    let own = || (resolver_end..start.0.len()).filter(|at| !(rseq_start..rseq_end).contains(at));
    let changed = |before: &Snapshot, after: &Snapshot, what| {
        let word = own().filter(|at| at.is_multiple_of(8));
        at_most_one(word.filter(|&at| before.word(at) != after.word(at)), what)
    };
    let before = seen.after_getschedparam.as_ref().unwrap_or(start);
    let getrandom = changed(before, &seen.after_getrandom, "the state of getrandom")?;
    let strsignal = changed(
        &seen.after_getrandom,
        &seen.after_strsignal,
        "the buffer of strsignal",
    )?;
    let strerror = changed(
        &seen.after_strsignal,
        &seen.after_strerror,
        "the buffer of strerror",
    )?;
    // A byte that became 1 at the thread's end, in an otherwise empty word, with a free lock in
    // the next one. Absent before 2.35: then pthread_kill asks the tid word, which we keep right.
    let is_exiting = |&at: &usize| {
        let word = at & !3;
        seen.after_strerror.half(word) == 0
            && ended.half(word) == 1 << (8 * (at % 4))
            && ended.half(word + 4) == 0
    };
    let exiting = at_most_one(own().filter(is_exiting), "exiting")?.map(|flag| Exiting {
        flag,
        lock: (flag & !3) + 4,
    });
    // Right behind the table of values: 1 in a thread with a value, 0 again once it has ended.
    let specific_used = Some(symbols.report_events - 1)
        .filter(|&at| seen.after_setspecific.byte(at) == 1 && ended.byte(at) == 0);
    let segment = symbols.shape.segment_start
        ..symbols.shape.segment_start + symbols.shape.segment.size as isize;
    Ok(Offsets {
        robust_head,
        robust_futex_offset: start.word(robust_head + 8),
        first_key_block,
        stackblock,
        stackblock_size: stackblock + STACKBLOCK_SIZE,
        guardsize: stackblock + GUARDSIZE,
        reported_guardsize: stackblock + REPORTED_GUARDSIZE,
        tpp: stackblock + TPP,
        user_stack,
        flags,
        result,
        join,
        join_mark,
        resolver,
        resp: symbols.shape.resp,
        segment,
        exiting,
        getrandom,
        strsignal,
        strerror,
        specific_used,
    })
}

/// The word of flags before the first block of keys: behind `cancelhandling`, up to 2.35 with two bytes in between. Policy
/// and priority can be known already, because the creator knew its own.
fn flags(seen: &Seen<'_>, first_key_block: usize) -> Result<usize, RuntimeError> {
    let behind = seen.symbols.cancelhandling;
    let is_flags = |at: &usize| {
        let asked = seen.after_getschedparam.as_ref();
        at + 4 <= first_key_block
            && seen.start.half(*at) & !(FLAGS_SCHEDULING | FLAG_RSEQ) == FLAG_STACK
            && asked
                .is_none_or(|asked| asked.half(*at) & !FLAG_RSEQ == FLAG_STACK | FLAGS_SCHEDULING)
    };
    let found = [behind + 4, behind + 8].into_iter().filter(is_flags);
    match at_most_one(found, "flags")? {
        Some(flags) => Ok(flags),
        None => unsupported("flags"),
    }
}

/// What says that a stack is the user's, behind `report_events`: a bool up to 2.41, then an int.
fn user_stack(report_events: usize, start: &Snapshot) -> Result<(usize, u8), RuntimeError> {
    const IS_USERS: u8 = 1;
    const MODE_IS_USERS: u8 = 2;
    let (flag, mode) = (report_events + 1, (report_events + 1).next_multiple_of(4));
    if start.byte(flag) == IS_USERS {
        Ok((flag, IS_USERS))
    } else if start.half(mode) == u32::from(MODE_IS_USERS) {
        Ok((mode, MODE_IS_USERS))
    } else {
        unsupported("user_stack behind report_events")
    }
}
