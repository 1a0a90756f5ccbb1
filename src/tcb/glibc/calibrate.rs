//! Offsets that no symbol gives, read off real threads.
//!
//! Two threads are started with `pthread_create`, once in a process: one on a stack of ours, whose
//! descriptor stays readable after its end, and one on a stack of glibc's that detaches itself.
//! What differs between them, between moments of one of them, and what equals values that were
//! chosen by us, gives every offset; each must be found exactly once, or the glibc is unsupported.
//!
//! The threads are needed in any case: only a real `pthread_create` ends glibc's single-thread fast
//! paths (malloc without locks, unlocked stdio) and installs the set-id handler.

use super::super::RuntimeError;
use super::symbols::{self, Segment, Symbols};
use super::{Runtime, block, list::ThreadList};
use crate::clone::{self, sys};
use crate::error::Step;
use libc::c_void;
use nix::errno::Errno;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

/// `sizeof (struct robust_list_head)`: the list, the futex offset, the pending operation.
pub(super) const ROBUST_HEAD_SIZE: usize = 24;

/// What the calibration thread returns: `result` is the word that holds it after the join.
const MAGIC: usize = 0x6e70_746c_c0de_2357_u64 as usize;

/// A guard size that no other word of a descriptor is likely to hold.
const GUARD: usize = 11 * 4096;

/// How glibc marks a thread that its own join and detach must refuse (rule 12).
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
    pub user_stack: usize,
    pub user_stack_value: u8,
    pub flags: usize,
    pub flags_changed: u32,
    pub result: usize,
    pub join: usize,
    pub join_mark: JoinMark,
    pub resolver: usize,
    pub resp: isize,
    pub segment: Range<isize>,
    pub exiting: Option<Exiting>,
    /// 2.41+: the state of vDSO getrandom, which must not be in two threads (rule 5).
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

    fn words(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.0.len().saturating_sub(7)).step_by(8)
    }

    fn halves(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.0.len().saturating_sub(3)).step_by(4)
    }
}

/// What the thread on our stack leaves behind.
struct OnOurStack {
    symbols: *const Symbols,
    list: *const ThreadList,
    /// Where its descriptor has to be: that ends where the stack does.
    expected_tp: usize,
    tp: usize,
    start: Snapshot,
    after_getschedparam: Snapshot,
    after_getrandom: Snapshot,
    after_strsignal: Snapshot,
    after_strerror: Snapshot,
    after_setspecific: Snapshot,
    robust_head: usize,
    resolver: usize,
    resp: usize,
    segment: Option<Segment>,
    listed: bool,
    tid: u32,
    counted: bool,
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
/// `argument` is an `OnOurStack` whose owner waits for this thread's end.
unsafe extern "C" fn on_our_stack(argument: *mut c_void) -> *mut c_void {
    // SAFETY: the creator waits in pthread_join while this thread writes to what it passed.
    unsafe {
        let seen = &mut *argument.cast::<OnOurStack>();
        let symbols = &*seen.symbols;
        let tp = clone::thread_pointer();
        seen.tp = tp;
        if tp != seen.expected_tp {
            // Past the end of a descriptor of another size there need not be anything.
            return std::ptr::null_mut();
        }
        first_allocation();
        seen.start.take(tp);

        // pthread_getschedparam asks the kernel and caches the answer: `flags` is where it notes
        // so, and a stale note would answer for the next thread on this block.
        let (mut policy, mut param) = (0, std::mem::zeroed::<libc::sched_param>());
        libc::pthread_getschedparam(libc::pthread_self(), &raw mut policy, &raw mut param);
        seen.after_getschedparam.take(tp);

        let mut byte = 0_u8;
        libc::getrandom((&raw mut byte).cast(), 1, 0);
        seen.after_getrandom.take(tp);
        libc::strsignal(libc::SIGRTMIN() + 1);
        seen.after_strsignal.take(tp);
        libc::strerror(99_999);
        seen.after_strerror.take(tp);

        let (mut head, mut length) = (0_usize, 0_usize);
        clone::syscall(
            libc::SYS_get_robust_list,
            [
                0,
                (&raw mut head) as usize,
                (&raw mut length) as usize,
                0,
                0,
                0,
            ],
        );
        seen.robust_head = head;
        seen.resolver = symbols::__res_state() as usize;
        seen.resp = symbols::resp_address().unwrap_or(0);
        seen.segment = symbols::libc_segment().ok();
        if let Some(segment) = seen.segment {
            seen.dtv_is_known = segment.is_in(seen.start.word(symbols.dtv));
            seen.resp_is_known = segment.contains(seen.resp)
                && (seen.resp as *const usize).read_unaligned() == seen.resolver;
        }
        seen.rseq_is_known = symbols.knows_rseq(tp);
        seen.tid = libc::gettid() as u32;
        // Its creator and itself.
        seen.counted = symbols.nthreads().load(Ordering::Relaxed) >= 2;
        seen.listed = (*seen.list).contains(tp + symbols.list, true);

        let mut key = 0;
        if libc::pthread_key_create(&raw mut key, Some(never_called)) == 0 {
            seen.keys_are_known = symbols.knows_key(key, never_called);
            libc::pthread_setspecific(key, std::ptr::from_mut(seen).cast());
            seen.after_setspecific.take(tp);
            libc::pthread_setspecific(key, std::ptr::null());
            libc::pthread_key_delete(key);
        }
        MAGIC as *mut c_void
    }
}

/// What the thread on glibc's stack leaves behind. It is detached, so it says when it is done with
/// this, and the creator waits for the kernel to let go of its tid.
struct OnGlibcStack {
    symbols: *const Symbols,
    list: *const ThreadList,
    tp: usize,
    start: Snapshot,
    detached: Snapshot,
    listed: bool,
    /// 0: not yet; else the tid, and nothing here is touched any more.
    done: AtomicU32,
}

/// # Safety
/// `argument` is an `OnGlibcStack` whose owner waits for its `done`.
unsafe extern "C" fn on_glibc_stack(argument: *mut c_void) -> *mut c_void {
    // SAFETY: the creator waits for `done`, the last access to what it passed.
    unsafe {
        let seen = argument.cast::<OnGlibcStack>();
        let tp = clone::thread_pointer();
        let symbols = &*(*seen).symbols;
        (*seen).tp = tp;
        first_allocation();
        (*seen).start.take(tp);
        libc::pthread_detach(libc::pthread_self());
        (*seen).detached.take(tp);
        (*seen).listed = (*(*seen).list).contains(tp + symbols.list, false);
        let done = &raw const (*seen).done;
        (*done).store(libc::gettid() as u32, Ordering::Release);
        // The word may be gone when this arrives; a wake touches no memory.
        clone::syscall(
            libc::SYS_futex,
            [done as usize, libc::FUTEX_WAKE as usize, 1, 0, 0, 0],
        );
        std::ptr::null_mut()
    }
}

/// `pthread_create`, with the raw errno that it folds: glibc leaves it in `errno`.
///
/// # Safety
/// As for pthread_create(3): `argument` is what `routine` expects, for as long as it runs.
unsafe fn create(
    attributes: *const libc::pthread_attr_t,
    routine: unsafe extern "C" fn(*mut c_void) -> *mut c_void,
    argument: *mut c_void,
) -> Result<libc::pthread_t, RuntimeError> {
    let mut thread = 0;
    Errno::set_raw(0);
    // SAFETY: the libc crate wants a safe function type; ours is called once, by the new thread, with exactly the
    // argument it is written for.
    let answer = unsafe {
        let routine: extern "C" fn(*mut c_void) -> *mut c_void = std::mem::transmute(routine);
        libc::pthread_create(&raw mut thread, attributes, routine, argument)
    };
    if answer == 0 {
        return Ok(thread);
    }
    let raw = Errno::last_raw();
    let errno = if answer == libc::EAGAIN && raw != 0 {
        raw
    } else {
        answer
    };
    Err(RuntimeError::Refused {
        step: Step::Clone,
        errno: Errno::from_raw(errno),
        bytes: 0,
    })
}

/// The refusal of a mapping such as glibc makes for a stack, if it is refused: `pthread_create` does not
/// say which of its steps failed, so the one before clone is asked again.
fn refused_mapping(length: usize) -> Option<RuntimeError> {
    // SAFETY: a new private mapping without access, which nobody else knows and which goes at once.
    unsafe {
        let base = libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK,
            -1,
            0,
        );
        if base == libc::MAP_FAILED {
            return Some(RuntimeError::Refused {
                step: Step::MapStack,
                errno: Errno::last(),
                bytes: length,
            });
        }
        libc::munmap(base, length);
    }
    None
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

/// Runs the two threads and concludes. The caller has blocked application signals.
pub(super) fn calibrate() -> Result<Runtime, RuntimeError> {
    let symbols = Symbols::look_up()?;
    // SAFETY: the heads come from libthread_db's descriptors.
    let list = unsafe { ThreadList::new(symbols.user_list, symbols.used_list) };
    if !list.lock_is_plausible() {
        return unsupported("the lock beside glibc's thread lists");
    }
    let size = symbols.descriptor_size;

    let length = (symbols.tls_size + symbols.tls_align + 128 * 1024).next_multiple_of(4096);
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
    let mut ours = OnOurStack {
        symbols: &raw const symbols,
        list: &raw const list,
        expected_tp: symbols.thread_pointer_in(base + length),
        tp: 0,
        start: Snapshot::empty(size)?,
        after_getschedparam: Snapshot::empty(size)?,
        after_getrandom: Snapshot::empty(size)?,
        after_strsignal: Snapshot::empty(size)?,
        after_strerror: Snapshot::empty(size)?,
        after_setspecific: Snapshot::empty(size)?,
        robust_head: 0,
        resolver: 0,
        resp: 0,
        segment: None,
        listed: false,
        tid: 0,
        counted: false,
        dtv_is_known: false,
        rseq_is_known: false,
        resp_is_known: false,
        // Where there is no key left, it cannot be asked.
        keys_are_known: true,
    };
    let mut ended = Snapshot::empty(size)?;
    let mut attributes = Attributes::new();
    // SAFETY: the mapping outlives the thread, which is joined below; the argument likewise.
    unsafe {
        let answer =
            libc::pthread_attr_setstack(&raw mut attributes.0, base as *mut c_void, length);
        if answer != 0 {
            return unsupported("pthread_attr_setstack");
        }
        let thread = create(
            &raw const attributes.0,
            on_our_stack,
            (&raw mut ours).cast(),
        )?;
        let mut result = std::ptr::null_mut();
        libc::pthread_join(thread, &raw mut result);
        if thread as usize != ours.tp {
            return unsupported("pthread_t is not the thread pointer");
        }
        if ours.tp != ours.expected_tp {
            return unsupported("_thread_db_sizeof_pthread");
        }
        ended.take(ours.tp);
    }

    let mut glibcs = OnGlibcStack {
        symbols: &raw const symbols,
        list: &raw const list,
        tp: 0,
        start: Snapshot::empty(size)?,
        detached: Snapshot::empty(size)?,
        listed: false,
        done: AtomicU32::new(0),
    };
    let mut attributes = Attributes::new();
    // glibc takes the guard out of the size. The default size, RLIMIT_STACK, could be refused where
    // the caller's own stack is not.
    let glibcs_length = length + GUARD;
    // SAFETY: `glibcs` outlives the thread's use of it: this waits for `done`. Past that, the loop
    // waits for the thread itself, so that it does not count when the first clone meets a limit.
    unsafe {
        libc::pthread_attr_setguardsize(&raw mut attributes.0, GUARD);
        libc::pthread_attr_setstacksize(&raw mut attributes.0, glibcs_length);
        create(
            &raw const attributes.0,
            on_glibc_stack,
            (&raw mut glibcs).cast(),
        )
        .map_err(|error| refused_mapping(glibcs_length).unwrap_or(error))?;
    }
    let mut tid;
    loop {
        tid = glibcs.done.load(Ordering::Acquire);
        if tid != 0 {
            break;
        }
        sys::futex_wait(&glibcs.done, 0, None);
    }
    for _ in 0..10_000 {
        if sys::tgkill(sys::process_id(), tid as i32, 0).is_err() {
            break;
        }
        std::thread::yield_now();
    }

    let offsets = conclude(&symbols, (base, length), &ours, &ended, &glibcs)?;
    symbols::keep_loaded();
    Ok(Runtime {
        symbols,
        offsets,
        list,
    })
}

/// The only element, or the error.
fn exactly_one(
    mut found: impl Iterator<Item = usize>,
    what: &'static str,
) -> Result<usize, RuntimeError> {
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        _ => unsupported(what),
    }
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

fn conclude(
    symbols: &Symbols,
    (base, length): (usize, usize),
    ours: &OnOurStack,
    ended: &Snapshot,
    glibcs: &OnGlibcStack,
) -> Result<Offsets, RuntimeError> {
    let tp = ours.tp;
    let first = &ours.start;
    if !ours.listed || !glibcs.listed {
        return unsupported("a new pthread is not on glibc's thread list");
    }
    if first.word(symbols.list) == 0 || ours.robust_head.wrapping_sub(tp) >= first.0.len() {
        return unsupported("robust list head outside the descriptor");
    }
    if !ours.counted {
        return unsupported("__nptl_nthreads does not count a new pthread");
    }
    if first.half(symbols.tid) != ours.tid || ended.half(symbols.tid) == ours.tid {
        return unsupported("_thread_db_pthread_tid");
    }
    if !ours.dtv_is_known {
        return unsupported("_thread_db_pthread_dtvp");
    }
    // EXITING_BITMASK (nptl/descr.h), set at a thread's end.
    const EXITING: u32 = 0x10;
    let cancelhandling = symbols.cancelhandling;
    if first.half(cancelhandling) & EXITING != 0 || ended.half(cancelhandling) & EXITING == 0 {
        return unsupported("_thread_db_pthread_cancelhandling");
    }
    let Some(segment) = ours.segment else {
        return unsupported("libc's own TLS segment was not found");
    };
    let below = tp.wrapping_sub(segment.start);
    if below > symbols.tls_size - symbols.descriptor_size {
        return unsupported("libc's TLS segment outside static TLS");
    }
    if !ours.rseq_is_known {
        return unsupported("__rseq_offset");
    }
    if !ours.keys_are_known {
        return unsupported("__pthread_keys");
    }
    // These hold nothing that could be looked for, but each has a neighbour in every glibc from 2.34 to 2.43.
    if symbols.schedpolicy != symbols.sched_priority + 4 {
        return unsupported("schedpolicy behind the priority");
    }
    if symbols.nextevent != symbols.eventbuf.0 + symbols.eventbuf.1 {
        return unsupported("nextevent behind eventbuf");
    }
    // The words that change by themselves: the kernel writes the rseq area at every preemption.
    let (rseq_start, rseq_end) = symbols.rseq.map_or((0, 0), |rseq| {
        let start = rseq.offset.max(0) as usize;
        (start, start + rseq.registered_size())
    });
    let quiet = move |at: &usize| !(rseq_start..rseq_end).contains(at);
    fn changed<'a>(
        quiet: impl Fn(&usize) -> bool + 'a,
        before: &'a Snapshot,
        after: &'a Snapshot,
    ) -> impl Iterator<Item = usize> + 'a {
        let words = before.words().filter(quiet);
        words.filter(|&at| before.word(at) != after.word(at))
    }

    let robust_head = ours.robust_head - tp;
    if first.word(robust_head) != ours.robust_head {
        return unsupported("robust list is not empty at start");
    }
    let specific_first = first.word(symbols.specific);
    let first_key_block = specific_first.wrapping_sub(tp);
    if first_key_block + super::KEYS_PER_BLOCK * size_of::<symbols::KeyValue>() != symbols.specific
    {
        return unsupported("the first block of pthread keys");
    }
    let specific_end = symbols.specific + super::KEY_BLOCKS * size_of::<usize>();
    if symbols.report_events != specific_end + 1 {
        return unsupported("report_events behind the table of pthread keys");
    }
    let stackblock = exactly_one(
        first
            .words()
            .filter(|&at| first.word(at) == base && first.word(at + 8) == length),
        "stackblock",
    )?;
    let (guardsize, reported_guardsize) = (stackblock + 16, stackblock + 24);
    if glibcs.start.word(guardsize) != GUARD || glibcs.start.word(reported_guardsize) != GUARD {
        return unsupported("guardsize beside stackblock_size");
    }
    let result = exactly_one(
        ended.words().filter(|&at| ended.word(at) == MAGIC),
        "result",
    )?;
    let join = result.wrapping_sub(8);
    let join_mark = match glibcs.detached.word(join) {
        itself if itself == glibcs.tp && first.word(join) == 0 => JoinMark::Itself,
        state if (1..16).contains(&(state as u32)) && glibcs.start.half(join) != state as u32 => {
            JoinMark::State(state as u32)
        }
        _ => return unsupported("joinid or joinstate before result"),
    };
    // Only bytes that are constant in a thread's life can differ here, so the two moments agree.
    let user_stack = exactly_one(
        (symbols.report_events..join).filter(|&at| first.0[at] != glibcs.start.0[at]),
        "user_stack",
    )?;
    let flags = exactly_one(
        first.halves().filter(quiet).filter(|&at| {
            at != symbols.schedpolicy
                && at != symbols.sched_priority
                && first.half(at) != ours.after_getschedparam.half(at)
        }),
        "flags",
    )?;
    let flags_changed = first.half(flags) ^ ours.after_getschedparam.half(flags);
    let getrandom = at_most_one(
        changed(quiet, &ours.after_getschedparam, &ours.after_getrandom),
        "the state of getrandom",
    )?;
    let strsignal = at_most_one(
        changed(quiet, &ours.after_getrandom, &ours.after_strsignal),
        "the buffer of strsignal",
    )?;
    let strerror = at_most_one(
        changed(quiet, &ours.after_strsignal, &ours.after_strerror),
        "the buffer of strerror",
    )?;
    let resolver = ours.resolver.wrapping_sub(tp);
    if resolver + symbols.resolver_size > first.0.len() || ours.resp == 0 {
        return unsupported("the resolver's state outside the descriptor");
    }
    let segment = -(below as isize)..segment.size as isize - below as isize;
    let resp = ours.resp as isize - tp as isize;
    if !segment.contains(&resp) || segment.end - segment.start > block::SEGMENT_MAX as isize {
        return unsupported("__resp outside libc's TLS segment");
    }
    if !ours.resp_is_known {
        return unsupported("__resp is not the resolver's state");
    }
    // A byte that became 1 at the thread's end, in an otherwise empty word, with a free lock in
    // the next one. Absent before 2.35: then pthread_kill asks the tid word, which we keep right.
    let exiting = at_most_one(
        (reported_guardsize + 8..first.0.len().saturating_sub(8))
            .filter(quiet)
            .filter(|&at| {
                let word = at & !3;
                ours.after_strerror.half(word) == 0
                    && ended.half(word) == 1 << (8 * (at % 4))
                    && ended.0[at] == 1
                    && ended.half(word + 4) == 0
            }),
        "exiting",
    )?
    .map(|flag| Exiting {
        flag,
        lock: (flag & !3) + 4,
    });
    // Right behind the table of values: 1 in a thread with a value, 0 again once it has ended.
    let specific_used = Some(specific_end).filter(|&at| {
        ours.after_setspecific.bytes(at) == Some([1]) && ended.bytes(at) == Some([0])
    });
    Ok(Offsets {
        robust_head,
        robust_futex_offset: first.word(robust_head + 8),
        first_key_block,
        stackblock,
        stackblock_size: stackblock + 8,
        guardsize,
        reported_guardsize,
        user_stack,
        user_stack_value: first.0[user_stack],
        flags,
        flags_changed,
        result,
        join,
        join_mark,
        resolver,
        resp,
        segment,
        exiting,
        getrandom,
        strsignal,
        strerror,
        specific_used,
    })
}
