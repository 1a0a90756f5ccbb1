//! Offsets that no symbol gives: predicted, then verified on a real thread.
//!
//! A thread of glibc's is started on a stack of ours, once in a process. Where the fields of its descriptor lie
//! follows from those that symbols give, and from an order that has been the same from 2.34 to 2.43:
//!
//! ```text
//!  list, tid, robust_prev, robust_head … cancelhandling, (two bytes until 2.35,) flags, 32 key values,
//!  specific, specific_used, report_events, user_stack (from 2.42: an int) … join, result, priority, policy …
//!  eventbuf, nextevent … stackblock, its size, guardsize, reported_guardsize, tpp, resolver … exiting and
//!  exit_lock (from 2.35), strsignal, strerror, getrandom (from 2.41)
//! ```
//!
//! The thread verifies each on its own descriptor, by what it is known to hold or by what a public function does
//! to it; a check that fails means an unsupported glibc. Nothing is concluded from words that other threads write
//! (the links of the list, `setxid_futex`, the other bits of `cancelhandling`), or the kernel (rseq), or that
//! are inherited from the creator (SCHED_SET and POLICY_SET in `flags`, policy, priority).
//!
//! The thread is needed in any case: only a real `pthread_create` ends glibc's single-thread fast paths (malloc
//! without locks, unlocked stdio) and installs the set-id handler.

use super::dtv::Refill;
use super::list::ThreadList;
use super::lookup::check;
use super::pthread;
use super::symbols::{self, KEY_BLOCKS, KeyValues, Rseq, Symbols};
use crate::errno::Errno;
use crate::step::Step;
use crate::sys;
use crate::tcb::error::RuntimeError;
use libc::c_void;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

/// In `flags` (ATTR_FLAG_SCHED_SET, _POLICY_SET): policy and priority are known, and no system call is made for them.
pub(super) const SCHEDULING_KNOWN: u32 = 0x20 | 0x40;

/// `sizeof (struct robust_list_head)`: the list, the futex offset, the pending operation.
pub(super) const ROBUST_HEAD_SIZE: usize = 24;

/// What the calibration thread returns: `result` is the word that holds it after the join.
const MAGIC: usize = 0x6e70_746c_c0de_2357_u64 as usize;

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

/// Offsets in the descriptor, beside those that symbols give.
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
    /// A block of malloc's, for mutexes with priority protection; 0 until the thread locks one.
    pub tpp: usize,
    /// And what it holds in a thread on a stack that glibc has not made.
    pub user_stack: (usize, u8),
    pub flags: usize,
    pub result: usize,
    pub join: usize,
    pub join_mark: JoinMark,
    pub resolver: usize,
    pub exiting: Option<Exiting>,
    /// 2.41+: the state of vDSO getrandom, which must not be in two threads (G5).
    pub getrandom: Option<usize>,
    pub strsignal: Option<usize>,
    pub strerror: Option<usize>,
    /// The byte that `pthread_setspecific` sets: keys are looked at only where there are any.
    pub specific_used: usize,
    /// Also where another thread has loaded a module between the two looks, each thread gets a new DTV.
    pub refill: Option<Refill>,
}

// Checks that both sides make.
const TID: &str = "_thread_db_pthread_tid";
const CANCELHANDLING: &str = "_thread_db_pthread_cancelhandling";
const JOIN: &str = "joinid or joinstate before result";

// THREAD_STATE_JOINABLE and _DETACHED (nptl/descr.h from 2.43 on)
const JOINABLE: u32 = 2;
const DETACHED: u32 = 3;

/// A descriptor that is mapped, in a thread that is the calling one or has ended.
#[derive(Clone, Copy)]
struct Descriptor {
    start: usize,
    size: usize,
}

impl Descriptor {
    /// Outside there are only zeroes.
    fn read<T: Copy + Default>(self, at: usize) -> T {
        match at.checked_add(size_of::<T>()) {
            // SAFETY: inside. What others write meanwhile is not relied on.
            Some(end) if end <= self.size => unsafe {
                ((self.start + at) as *const T).read_unaligned()
            },
            _ => T::default(),
        }
    }

    fn word(self, at: usize) -> usize {
        self.read(at)
    }

    fn half(self, at: usize) -> u32 {
        self.read(at)
    }

    /// # Safety
    /// A field of the calling thread's, which gets its former value back before other code reads it.
    unsafe fn write<T>(self, at: usize, value: T) {
        if at.saturating_add(size_of::<T>()) <= self.size {
            // SAFETY: inside; the rest is the caller's promise.
            unsafe { ((self.start + at) as *mut T).write_unaligned(value) };
        }
    }
}

/// What the creator passes to the thread, and what the thread finds.
struct CalibrationThread<'a> {
    symbols: &'a Symbols,
    list: &'a ThreadList,
    /// Where its descriptor has to be: that ends where the stack does.
    descriptor: Descriptor,
    /// Lowest address and length.
    stack: (usize, usize),
    tid: u32,
    found: Result<Offsets, RuntimeError>,
    /// 1: from now on the thread can be joined.
    done: AtomicU32,
}

/// The destructor of a key that is deleted in time.
///
/// # Safety
/// None is needed: it is the type that pthread_key_create(3) takes.
unsafe extern "C" fn never_called(_: *mut c_void) {}

/// # Safety
/// `argument` is a `CalibrationThread` whose owner waits for this thread's end.
unsafe extern "C" fn run(argument: *mut c_void) -> *mut c_void {
    let subject = argument.cast::<CalibrationThread<'_>>();
    // SAFETY: the creator looks at nothing but `done` before the end of this thread.
    unsafe {
        (*subject).tid = libc::gettid() as u32;
        (*subject).found = examine(&*subject);
        (*subject).done.store(1, Ordering::Release);
        sys::futex_wake(&(*subject).done);
    }
    MAGIC as *mut c_void
}

/// Verifies what can be seen while the thread lives.
///
/// # Safety
/// Called by a thread of glibc's that no other thread joins or detaches meanwhile, and that holds no resources. Its creator may
/// hold any of the loader's locks, so that nothing in here may take one.
unsafe fn examine(subject: &CalibrationThread<'_>) -> Result<Offsets, RuntimeError> {
    let this = subject.descriptor;
    // Past the end of a descriptor of another size there need not be anything.
    let known = sys::thread_pointer() == this.start;
    check(known, "_thread_db_sizeof_pthread")?;
    settle()?;
    subject.is_known_to_glibc()?;
    let robust_head = subject.robust_list()?;
    let (first_key_block, specific_used) = subject.keys()?;
    let flags = subject.flags(first_key_block)?;
    let user_stack = subject.user_stack()?;
    let (result, join, join_mark) = subject.join()?;
    let stackblock = subject.stackblock()?;
    // SAFETY: the calling thread is the subject, by the caller's promise.
    unsafe { subject.attributes(stackblock, join, join_mark)? };
    let (tpp, resolver) = subject.resolver(stackblock)?;
    let [getrandom, strsignal, strerror] = subject.buffers(resolver)?;
    // `exiting` is the second byte there, and the creator looks whether it was set at the end.
    let exiting = strsignal.map(|buffer| Exiting {
        flag: buffer - 7,
        lock: buffer - 4,
    });
    let dtv = this.word(subject.symbols.dtv);
    // SAFETY: the calling thread's own, which has been found to be one.
    let knows = |refill: &Refill| unsafe { refill.knows_length_of(dtv) };
    let refill = subject.symbols.refill.filter(knows);
    Ok(Offsets {
        robust_head,
        robust_futex_offset: this.word(robust_head + 8),
        first_key_block,
        stackblock,
        stackblock_size: stackblock + 8,
        guardsize: stackblock + GUARDSIZE,
        reported_guardsize: stackblock + REPORTED_GUARDSIZE,
        tpp,
        user_stack,
        flags,
        result,
        join,
        join_mark,
        resolver,
        exiting: exiting.filter(|exiting| this.half(exiting.flag - 1) == 0),
        getrandom,
        strsignal,
        strerror,
        specific_used,
        refill,
    })
}

/// Lets allocator and messages do what they do once in a thread.
fn settle() -> Result<(), RuntimeError> {
    // Another malloc (jemalloc, for one) sets a pthread key at a thread's first allocation. And what needs memory
    // below is to have some.
    const ENOUGH: usize = 256;
    // SAFETY: a block that only this function has a pointer to is freed again. The locale is a constant, so that it takes no lock, and
    // keeps messages from being translated: that could load catalogues and converters.
    unsafe {
        let block = std::hint::black_box(libc::malloc(ENOUGH));
        if block.is_null() {
            return Err(RuntimeError::no_memory(ENOUGH));
        }
        libc::free(block);
        let untranslated = libc::newlocale(libc::LC_ALL_MASK, c"C".as_ptr(), std::ptr::null_mut());
        libc::uselocale(untranslated);
    }
    Ok(())
}

// From `stackblock` on.
const GUARDSIZE: usize = 16;
const REPORTED_GUARDSIZE: usize = 24;
const TPP: usize = 32;
const RESOLVER: usize = 40;

/// The checks, in the order of the fields. The calling thread is the subject, whose descriptor is as large as said.
impl CalibrationThread<'_> {
    fn is_known_to_glibc(&self) -> Result<(), RuntimeError> {
        let (symbols, this) = (self.symbols, self.descriptor);
        let listed = self.list.contains(this.start + symbols.list);
        check(listed, "a new pthread is not on glibc's thread list")?;
        // Its creator and itself.
        let counted = symbols.nthreads().load(Ordering::Relaxed) >= 2;
        check(counted, "__nptl_nthreads does not count a new pthread")?;
        let found = symbols.finds_segment_in(this.word(symbols.dtv), this.start);
        check(found, "_thread_db_pthread_dtvp")?;
        // SAFETY: the thread pointer is the calling thread's, and the sizes have been compared with where it lies.
        let known = unsafe { symbols.knows_rseq(sys::thread_pointer()) };
        check(known, "__rseq_offset")?;
        // With the unused half behind it: the upper half of a pointer can be a thread's number by chance.
        check(this.word(symbols.tid) == self.tid as usize, TID)
    }

    fn robust_list(&self) -> Result<usize, RuntimeError> {
        let this = self.descriptor;
        let head = self.symbols.tid + 16;
        let empty = this.start + head;
        let known = this.word(head) == empty && this.word(head - 8) == empty;
        check(known, "the robust list behind tid")?;
        Ok(head)
    }

    /// The first block of values, and the byte that says whether there are any.
    fn keys(&self) -> Result<(usize, usize), RuntimeError> {
        let (symbols, this) = (self.symbols, self.descriptor);
        let first_block = this.word(symbols.specific).wrapping_sub(this.start);
        let known = first_block.wrapping_add(size_of::<KeyValues>()) == symbols.specific;
        check(known, "the first block of pthread keys")?;
        let used = symbols.specific + KEY_BLOCKS * size_of::<usize>();
        let known = symbols.report_events == used + 1;
        check(known, "report_events behind the table of pthread keys")?;
        let mut key = 0;
        // Where no key is left, both stay predicted.
        // SAFETY: a key of this function's own, deleted before its destructor could be called.
        unsafe {
            if libc::pthread_key_create(&raw mut key, Some(never_called)) == 0 {
                let known = symbols.knows_key(key, never_called);
                let set = libc::pthread_setspecific(key, std::ptr::from_ref(self).cast()) == 0;
                let noted = this.read::<u8>(used) == 1;
                libc::pthread_setspecific(key, std::ptr::null());
                libc::pthread_key_delete(key);
                check(known, "__pthread_keys")?;
                check(noted || !set, "specific_used before report_events")?;
            }
        }
        Ok((first_block, used))
    }

    fn flags(&self, first_key_block: usize) -> Result<usize, RuntimeError> {
        let (symbols, this) = (self.symbols, self.descriptor);
        let flags = match first_key_block.wrapping_sub(symbols.cancelhandling) {
            8 => symbols.cancelhandling + 4,
            // Two fields of a byte each come before it.
            16 => symbols.cancelhandling + 8,
            _ => return Err(RuntimeError::Unsupported(CANCELHANDLING)),
        };
        // ATTR_FLAG_STACKADDR and _DO_RSEQ (nptl/internaltypes.h).
        const ON_OWN_STACK: u32 = 8;
        const REGISTERS_RSEQ: u32 = 0x80;
        let set = this.half(flags) & !(SCHEDULING_KNOWN | REGISTERS_RSEQ);
        let known = set == ON_OWN_STACK;
        check(known, "flags before the first block of pthread keys")?;
        // pthread_getschedparam calls the kernel and notes in `flags` that it has the answer: a stale note would answer
        // for the next thread on this block.
        // SAFETY: two valid places.
        let asked = unsafe {
            let (mut policy, mut param) = (0, std::mem::zeroed::<libc::sched_param>());
            libc::pthread_getschedparam(libc::pthread_self(), &raw mut policy, &raw mut param) == 0
        };
        let noted = this.half(flags) & SCHEDULING_KNOWN == SCHEDULING_KNOWN;
        check(noted || !asked, "flags that pthread_getschedparam sets")?;
        Ok(flags)
    }

    fn user_stack(&self) -> Result<(usize, u8), RuntimeError> {
        // ALLOCATE_GUARD_USER (nptl/descr.h from 2.42 on)
        const USER: u8 = 2;
        let this = self.descriptor;
        let next = self.symbols.report_events + 1;
        match (this.read::<u8>(next), next.next_multiple_of(4)) {
            (1, _) => Ok((next, 1)),
            (0, mode) if this.half(mode) == u32::from(USER) => Ok((mode, USER)),
            _ => Err(RuntimeError::Unsupported("user_stack behind report_events")),
        }
    }

    /// `result`, and `joinid` or `joinstate` before it.
    fn join(&self) -> Result<(usize, usize, JoinMark), RuntimeError> {
        let symbols = self.symbols;
        let known = symbols.schedpolicy == symbols.sched_priority + 4;
        check(known, "schedpolicy behind the priority")?;
        let known = symbols.nextevent == symbols.eventbuf.0 + symbols.eventbuf.1;
        check(known, "nextevent behind eventbuf")?;
        let result = symbols.sched_priority.wrapping_sub(8);
        let join = result.wrapping_sub(8);
        let mark = match self.descriptor.word(join) {
            0 => JoinMark::Itself,
            word if word as u32 == JOINABLE => JoinMark::State(DETACHED),
            _ => return Err(RuntimeError::Unsupported(JOIN)),
        };
        Ok((result, join, mark))
    }

    fn stackblock(&self) -> Result<usize, RuntimeError> {
        let (this, (base, length)) = (self.descriptor, self.stack);
        let mut pairs = (0..this.size)
            .step_by(8)
            .filter(|&at| this.word(at) == base && this.word(at + 8) == length);
        match (pairs.next(), pairs.next()) {
            (Some(only), None) => Ok(only),
            _ => Err(RuntimeError::Unsupported("stackblock")),
        }
    }

    /// pthread_getattr_np reads both guard sizes and the mark, if it does not fail for want of memory or because
    /// of a filter.
    ///
    /// # Safety
    /// The calling thread is the subject, and no other thread reads its descriptor meanwhile.
    unsafe fn attributes(
        &self,
        stackblock: usize,
        join: usize,
        mark: JoinMark,
    ) -> Result<(), RuntimeError> {
        const GUARD: usize = 4096;
        const REPORTED: usize = 11 * 4096;
        let this = self.descriptor;
        let (mut size, mut guard, mut state) = (0, 0, 0);
        // SAFETY: fields of this thread's own, which are as before when its creator joins it; no other thread has its id.
        // The attributes are looked at only where they were filled.
        let filled = unsafe {
            let set = |guard: usize, reported: usize, is_detached: bool| {
                this.write(stackblock + GUARDSIZE, guard);
                this.write(stackblock + REPORTED_GUARDSIZE, reported);
                match (mark, is_detached) {
                    (JoinMark::Itself, true) => this.write(join, this.start),
                    (JoinMark::Itself, false) => this.write(join, 0_usize),
                    (JoinMark::State(detached), true) => this.write(join, detached),
                    (JoinMark::State(_), false) => this.write(join, JOINABLE),
                }
            };
            let mut attributes: libc::pthread_attr_t = std::mem::zeroed();
            set(GUARD, REPORTED, true);
            let filled =
                (self.symbols.get_attributes)(libc::pthread_self(), &raw mut attributes) == 0;
            set(0, 0, false);
            if filled {
                libc::pthread_attr_getstacksize(&raw const attributes, &raw mut size);
                libc::pthread_attr_getguardsize(&raw const attributes, &raw mut guard);
                symbols::pthread_attr_getdetachstate(&raw const attributes, &raw mut state);
                libc::pthread_attr_destroy(&raw mut attributes);
            }
            filled
        };
        let known = (size, guard) == (self.stack.1 - GUARD, REPORTED);
        check(known || !filled, "guardsize beside stackblock_size")?;
        check(state == libc::PTHREAD_CREATE_DETACHED || !filled, JOIN)
    }

    /// `tpp`, and the resolver's state behind it.
    fn resolver(&self, stackblock: usize) -> Result<(usize, usize), RuntimeError> {
        let this = self.descriptor;
        let (tpp, resolver) = (stackblock + TPP, stackblock + RESOLVER);
        let end = resolver + symbols::RESOLVER_SIZE;
        // SAFETY: the calling thread's.
        let state = unsafe { symbols::__res_state() } as usize;
        let known = this.word(tpp) == 0 && state == this.start + resolver && end <= this.size;
        check(known, "the resolver's state behind stackblock")?;
        let resp = (sys::thread_pointer() as isize + self.symbols.resp) as *const usize;
        // SAFETY: inside libc's segment of the calling thread, as looking it up has made sure.
        let resp = unsafe { resp.read_unaligned() };
        check(resp == state, "__resp is not the resolver's state")?;
        Ok((tpp, resolver))
    }

    /// A function's word behind the resolver's state is found by what it writes there: those of getrandom, strsignal and strerror.
    fn buffers(&self, resolver: usize) -> Result<[Option<usize>; 3], RuntimeError> {
        let (this, start) = (self.descriptor, resolver + symbols::RESOLVER_SIZE);
        let mut tail = Tail {
            this,
            start,
            rseq: self.symbols.rseq.map_or(0..0, Rseq::range),
            words: std::array::from_fn(|index| this.word(start + 8 * index)),
        };
        let mut random = 0_u8;
        // SAFETY: a valid place for a byte.
        unsafe { libc::getrandom((&raw mut random).cast(), 1, 0) };
        let getrandom = tail.changed("the state of getrandom")?;
        // SAFETY: no preconditions.
        unsafe { libc::strsignal(libc::SIGRTMIN() + 1) };
        let strsignal = tail.changed("the buffer of strsignal")?;
        // SAFETY: no preconditions.
        unsafe { libc::strerror(99_999) };
        let strerror = tail.changed("the buffer of strerror")?;
        Ok([getrandom, strsignal, strerror])
    }
}

/// The words at the end of the descriptor that only its own thread writes.
struct Tail {
    this: Descriptor,
    start: usize,
    rseq: Range<isize>,
    words: [usize; 32],
}

impl Tail {
    /// The word that has changed since the last look, if any has; two are an error.
    fn changed(&mut self, what: &'static str) -> Result<Option<usize>, RuntimeError> {
        let mut changed = None;
        for (index, before) in self.words.iter_mut().enumerate() {
            let at = self.start + 8 * index;
            let now = self.this.word(at);
            if std::mem::replace(before, now) != now && !self.rseq.contains(&(at as isize)) {
                check(changed.is_none(), what)?;
                changed = Some(at);
            }
        }
        Ok(changed)
    }
}

/// Starts the thread, waits for its end, and verifies what that leaves. The caller has blocked application signals,
/// which the thread inherits.
pub(super) fn calibrate(symbols: &Symbols) -> Result<(Offsets, ThreadList), RuntimeError> {
    // SAFETY: the heads come from libthread_db's descriptors.
    let list = unsafe { ThreadList::new(symbols.user_list) };
    let known = list.lock_is_plausible();
    check(known, "the lock beside glibc's thread lists")?;

    let length = symbols.smallest_stack();
    let mapped = memmap2::MmapOptions::new().len(length).stack().map_anon();
    let stack = mapped.map_err(|error| RuntimeError::Refused {
        step: Step::MapStack,
        errno: Errno::of_mapping(&error),
        bytes: length,
    })?;
    let base = stack.as_ptr() as usize;
    let mut subject = CalibrationThread {
        symbols,
        list: &list,
        descriptor: Descriptor {
            start: symbols.thread_pointer_in(base + length),
            size: symbols.descriptor_size,
        },
        stack: (base, length),
        tid: 0,
        found: Err(RuntimeError::Unsupported("a thread that runs")),
        done: AtomicU32::new(0),
    };
    // SAFETY: stack and subject outlive the thread, which is joined, or its stack is never unmapped.
    let ended = unsafe { run_to_the_end(&raw mut subject) }?;
    let Some((thread, result)) = ended else {
        // It is not known when it ends, and until then it runs there.
        std::mem::forget(stack);
        return Err(RuntimeError::Unsupported(JOIN));
    };
    // A joined thread counts until the kernel has taken it back, and the first clone can meet a limit.
    for _ in 0..10_000 {
        if sys::tgkill(sys::process_id(), subject.tid as i32, 0).is_err() {
            break;
        }
        std::thread::yield_now();
    }
    let mut offsets = subject.found?;
    let this = subject.descriptor;
    let known = thread as usize == this.start;
    check(known, "pthread_t is not the thread pointer")?;
    check(this.half(symbols.tid) != subject.tid, TID)?;
    // EXITING_BITMASK (nptl/descr.h), set at a thread's end.
    const EXITING: u32 = 0x10;
    let ended = this.half(symbols.cancelhandling) & EXITING != 0;
    check(ended, CANCELHANDLING)?;
    let known = (this.word(offsets.result), result as usize) == (MAGIC, MAGIC);
    check(known, "result before the priority")?;
    // Absent before 2.35: then pthread_kill reads the tid word, which we keep right.
    offsets.exiting = offsets
        .exiting
        .filter(|exiting| this.read::<u8>(exiting.flag) == 1 && this.half(exiting.lock) == 0);
    Ok((offsets, list))
}

impl CalibrationThread<'_> {
    /// What pthread_create was refused, which gives one errno for thread-local storage and for clone.
    fn refused(&self, errno: Errno) -> RuntimeError {
        let this = self.descriptor;
        // Written when the thread's storage is complete, just before clone.
        let routine = run as *const () as usize;
        let cloned = (0..this.size).step_by(8).any(|at| this.word(at) == routine);
        let step = match cloned {
            true => Step::Clone,
            false => Step::AllocateTls,
        };
        RuntimeError::Refused {
            step,
            errno,
            bytes: 0,
        }
    }
}

/// Starts the thread and joins it: its `pthread_t` and its result, or `None` if it cannot be joined.
///
/// # Safety
/// The subject and its stack are valid until the thread has ended, and nothing else uses the stack.
unsafe fn run_to_the_end(
    subject: *mut CalibrationThread<'_>,
) -> Result<Option<(libc::pthread_t, *mut c_void)>, RuntimeError> {
    // pthread_join is a cancellation point, and what it would unwind through holds the stack.
    let _cancellation = sys::NoCancellation::new();
    let mut result = std::ptr::null_mut();
    // SAFETY: the caller keeps subject and stack; the thread is made for its argument, and until `done` is set only it
    // uses the rest of the subject.
    unsafe {
        let (base, length) = (*subject).stack;
        let mut set = 0;
        let symbols = (*subject).symbols;
        let created = pthread::create(symbols, run, subject.cast(), |attributes| {
            set = libc::pthread_attr_setstack(attributes, base as *mut c_void, length);
            set
        });
        check(set == 0, "pthread_attr_setstack")?;
        let thread = created.map_err(|errno| (*subject).refused(errno))?;
        while (*subject).done.load(Ordering::Acquire) == 0 {
            sys::futex_wait(&(*subject).done, 0, None);
        }
        let joined = (symbols.join)(thread, &raw mut result) == 0;
        Ok(joined.then_some((thread, result)))
    }
}
