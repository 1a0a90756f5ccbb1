//! The memory of threads: mappings, guards, and the cache that hands them out again.
//!
//! A [`Stack`] is the record of one mapping. Records are leaked and recycled, never freed, so a
//! `&'static Stack` is always good to look at, in a signal handler, in a forked child and in a core
//! file; their number is the largest number of stacks that ever existed at once.

pub(crate) mod cache;
mod caps;
mod class;
pub(crate) mod layout;
mod ledger;
mod mapping;
pub(crate) mod overflow;

use crate::errno::Errno;
use crate::mem::{Shared, try_box};
use crate::step::{StackFate, StackOrigin, StackOutcome, Step, StepError};
use crate::sync::{Latch, Lock, forked_bare, notice_fork};
use crate::sys;
use crate::tcb::{Block, BlockState, Enlisted, Runtime};
use cache::StackCache;
use class::Class;
use layout::Layout;
use ledger::{Entry, Links};
use std::cell::{Cell, UnsafeCell};
use std::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU16, AtomicU32, AtomicUsize, Ordering,
};

/// Who discards what the thread used of its stack, and gives the stack back, when the thread has ended.
///
/// ```text
///  handle dropped:    Attached ─► Detached    the thread, as its last act but leaving glibc's list: ─► Given
///  thread at its end: Attached ─► Ending      the handle, when it is joined or dropped: ─► Given
///  the thread died, or is not in this process (fork): Attached or Detached ─► Ending
/// ```
/// Exactly one side sees the other's mark, so a stack is given back once.
///
/// Handles discard for their threads because two tasks inside madvise(2) make the kernel flush the TLB of every CPU
/// that runs the process (`mm_tlb_flush_nested`), 8 µs each: threads that end at once would all pay for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Life {
    /// A handle exists, or a spawn is on its way, and the thread has not yet come to its end.
    Attached = 0,
    /// No handle.
    Detached = 1,
    /// The thread has passed the point where it would have given its stack back.
    Ending = 2,
    /// It is given back, or about to be.
    Given = 3,
}

/// The record of one stack.
pub(crate) struct Stack {
    links: Links<Stack>,
    base: AtomicUsize,
    guard: AtomicUsize,
    size: AtomicUsize,
    /// With the page of guard below it.
    signal_stack: AtomicUsize,
    block_size: AtomicUsize,
    /// A class index, or [`NO_CLASS`].
    class: AtomicU16,
    /// Bytes of stack that may stay resident while it is cached.
    keep: AtomicUsize,
    /// mlock(2) was called on the stack.
    locked: AtomicBool,
    /// How often it was taken from the cache; touched by its owner only.
    uses: AtomicU32,
    life: AtomicU8,
    /// Nothing is resident of the stack but the bytes to keep: the thread has discarded the rest as its last act, or its
    /// handle has. `false` where the handle was dropped in the moment between the thread's last act and its end: the
    /// next call that takes or gives a stack does it then.
    discarded: AtomicBool,
    /// The tid word in the descriptor; null where there is no block in memory.
    tid: AtomicPtr<AtomicU32>,
    pub(crate) block: Block,
    /// Taken by whoever uses the tid from outside, and by the thread before it ends: while it is
    /// held, the tid cannot be given to another thread. Not a parking_lot lock, because an ending
    /// thread has no thread-locals left to park on.
    signal_lock: AtomicU32,
    /// Under `signal_lock`: signals can no longer be sent.
    exiting: AtomicBool,
    /// The thread's name, borrowed from its owner for the time of the thread's life.
    name: AtomicPtr<u8>,
    name_length: AtomicUsize,
    /// What the creator hands to the thread.
    start: UnsafeCell<Option<crate::start::Start>>,
    /// The next record without a mapping.
    next_spare: AtomicPtr<Stack>,
    /// The record made before this one: a debugger's way to all of them.
    next_record: AtomicPtr<Stack>,
}

// SAFETY: `start` is written by the creator before the thread exists and taken by the thread, or
// by the creator after a refused clone: one owner at a time. All else is atomic or synchronised.
unsafe impl Sync for Stack {}

/// All records, which only grow in number: the newest, and from there each before it.
#[repr(transparent)]
pub(crate) struct Records(AtomicPtr<Stack>);

impl Records {
    pub(crate) const fn new() -> Records {
        Records(AtomicPtr::new(std::ptr::null_mut()))
    }

    pub(crate) fn push(&self, stack: &'static Stack) {
        let new = std::ptr::from_ref(stack).cast_mut();
        let mut last = self.0.load(Ordering::Relaxed);
        loop {
            stack.next_record.store(last, Ordering::Relaxed);
            match self
                .0
                .compare_exchange_weak(last, new, Ordering::Release, Ordering::Relaxed)
            {
                Ok(_) => return,
                Err(now) => last = now,
            }
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &'static Stack> {
        let at = |place: &AtomicPtr<Stack>| {
            // SAFETY: null, or what `push` was given; records are never freed.
            unsafe { place.load(Ordering::Acquire).as_ref() }
        };
        std::iter::successors(at(&self.0), move |stack| at(&stack.next_record))
    }
}

const NO_CLASS: u16 = u16::MAX;

/// Bytes between the initial stack pointer and the top of the stack.
const ABOVE_FIRST_FRAME: usize = 64;

/// Records whose mappings are gone. They carry parked heap caches, so the last is used first. The list is whole at
/// every instruction, for a forked child.
static SPARE: Lock<AtomicPtr<Stack>> = Lock::new(AtomicPtr::new(std::ptr::null_mut()));

impl Stack {
    fn new() -> Stack {
        Stack {
            links: Links::new(),
            base: AtomicUsize::new(0),
            guard: AtomicUsize::new(0),
            size: AtomicUsize::new(0),
            signal_stack: AtomicUsize::new(0),
            block_size: AtomicUsize::new(0),
            class: AtomicU16::new(NO_CLASS),
            keep: AtomicUsize::new(0),
            locked: AtomicBool::new(false),
            uses: AtomicU32::new(0),
            life: AtomicU8::new(Life::Given as u8),
            discarded: AtomicBool::new(true),
            tid: AtomicPtr::new(std::ptr::null_mut()),
            block: Block::new(),
            signal_lock: AtomicU32::new(0),
            exiting: AtomicBool::new(false),
            name: AtomicPtr::new(std::ptr::null_mut()),
            name_length: AtomicUsize::new(0),
            start: UnsafeCell::new(None),
            next_spare: AtomicPtr::new(std::ptr::null_mut()),
            next_record: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// Offsets for a debugger, in the order that `gdb/nptl.py` knows.
    pub(crate) const OFFSETS: [usize; 9] = [
        std::mem::offset_of!(Stack, next_record),
        std::mem::offset_of!(Stack, base),
        std::mem::offset_of!(Stack, guard),
        std::mem::offset_of!(Stack, size),
        std::mem::offset_of!(Stack, tid),
        std::mem::offset_of!(Stack, name),
        std::mem::offset_of!(Stack, name_length),
        std::mem::offset_of!(Stack, links) + Links::<Stack>::STATE_OFFSET,
        std::mem::offset_of!(Stack, links) + Links::<Stack>::OWNER_OFFSET,
    ];

    /// A record without a mapping: the one that lost its mapping last, or a new one. `None`: no memory.
    fn spare() -> Option<&'static Stack> {
        let spare = SPARE.lock();
        // SAFETY: null, or a record that was pushed by `retire_record`; records are never freed.
        if let Some(stack) = unsafe { spare.load(Ordering::Relaxed).as_ref() } {
            spare.store(stack.next_spare.load(Ordering::Relaxed), Ordering::Relaxed);
            return Some(stack);
        }
        drop(spare);
        let stack: &'static Stack = Box::leak(try_box(Stack::new()).ok()?);
        crate::debug::publish_record(stack);
        Some(stack)
    }

    fn retire_record(&'static self) {
        self.base.store(0, Ordering::Relaxed);
        let spare = SPARE.lock();
        self.next_spare
            .store(spare.load(Ordering::Relaxed), Ordering::Relaxed);
        spare.store(std::ptr::from_ref(self).cast_mut(), Ordering::Release);
    }

    /// Maps and guards a stack, which is live in the cache's ledger then.
    fn map(
        cache: &StackCache,
        runtime: &'static Runtime,
        layout: &Layout,
        class: Option<Class>,
    ) -> Result<&'static Stack, Refused> {
        let length = layout.total();
        // Before anything can be refused, because it may allocate (A4).
        let none = |step, errno, bytes| (StepError::new(step, errno, bytes), StackOutcome::NONE);
        let stack =
            Stack::spare().ok_or(none(Step::Allocate, Errno::ENOMEM, size_of::<Stack>()))?;
        let base = match mapping::map(length) {
            Ok(base) => base,
            Err(errno) => {
                stack.retire_record();
                return Err(none(Step::MapStack, errno, length));
            }
        };
        // SAFETY: just mapped with this layout.
        let guarded = unsafe { mapping::guard(base, layout) };
        if guarded == Ok(true) {
            caps::note_protected_guard();
        }
        // A stack whose guard failed must never be cached, so it gets no size class.
        let class = class.filter(|_| guarded.is_ok());
        stack.describe(runtime, base, layout, class);
        stack.keep.store(cache.keep_resident(), Ordering::Relaxed);
        cache.ledger().adopt(stack);
        match guarded {
            Ok(_) => Ok(stack),
            Err((errno, bytes)) => {
                // This undoes the mmap and needs no mapping for itself, unless another thread has taken
                // the one that was left: then the stack waits in the ledger for the next call that unmaps.
                let victims = cache.ledger().retire(stack);
                let round = cache::unmap_victims(victims, Some(runtime), stack);
                let error = StepError::new(Step::GuardStack, errno, bytes);
                let fate = StackFate::of(round.found);
                let origin = StackOrigin::Fresh;
                Err((error, StackOutcome { origin, fate }))
            }
        }
    }

    /// Fills the record in for a fresh mapping of this layout.
    fn describe(
        &self,
        runtime: &'static Runtime,
        base: usize,
        layout: &Layout,
        class: Option<Class>,
    ) {
        let stack = self;
        let length = layout.total();
        stack.base.store(base, Ordering::Relaxed);
        stack.guard.store(layout.guard, Ordering::Relaxed);
        stack.size.store(layout.stack, Ordering::Relaxed);
        stack
            .signal_stack
            .store(layout.signal_stack, Ordering::Relaxed);
        stack.block_size.store(layout.block, Ordering::Relaxed);
        let class = class.map_or(NO_CLASS, |class| class.index() as u16);
        stack.class.store(class, Ordering::Relaxed);
        stack.locked.store(false, Ordering::Relaxed);
        stack.discarded.store(true, Ordering::Relaxed);
        let tp = runtime.thread_pointer_in(base + length);
        stack.block.set_fresh(tp);
        // SAFETY: the block is mapped; the pointer is replaced before the record describes another.
        let tid = unsafe { runtime.tid_word(tp) };
        stack
            .tid
            .store(std::ptr::from_ref(tid).cast_mut(), Ordering::Relaxed);
    }

    /// Taken from the cache, for a thread that is to be started.
    ///
    /// # Safety
    /// The caller is the idle stack's only owner.
    unsafe fn renew(&self, cache: &StackCache, runtime: &Runtime) {
        // SAFETY: passed on. What a detached thread has left, ended or dead.
        unsafe { self.drop_message() };
        let uses = self.uses.load(Ordering::Relaxed).wrapping_add(1);
        self.uses.store(uses, Ordering::Relaxed);
        if uses.is_multiple_of(caps::EVERY) {
            cache::heed_limits(runtime);
        }
        // The cache's configuration can have changed, and with it the bytes that are accounted for.
        let (before, keep) = (self.keep.load(Ordering::Relaxed), cache.keep_resident());
        self.keep.store(keep, Ordering::Relaxed);
        if before > keep {
            // SAFETY: nothing runs on an idle stack.
            unsafe { self.discard() };
        }
        if cache.is_zeroed() {
            // SAFETY: passed on.
            unsafe { self.wipe(runtime) };
        }
    }

    /// Makes all of it zero, but for the guards, as a fresh mapping is; what outlives a block stays with the
    /// record.
    ///
    /// # Safety
    /// The caller is the idle stack's only owner.
    unsafe fn wipe(&self, runtime: &Runtime) {
        // SAFETY: the caller's idle stack, whose block is fresh then.
        unsafe {
            runtime.retire(&self.block);
            let end = self.base() + self.length();
            for (start, end) in [(self.bottom(), self.top()), (self.signal_stack().0, end)] {
                // Locked memory cannot be discarded.
                if sys::madvise(start, end - start, libc::MADV_DONTNEED).is_err() {
                    std::ptr::write_bytes(start as *mut u8, 0, end - start);
                }
            }
        }
    }

    /// Gives the memory back to the kernel. False: munmap was refused, the stack is whole, but empty.
    ///
    /// # Safety
    /// The stack is idle and the caller its only owner.
    unsafe fn unmap(&'static self, runtime: &Runtime) -> bool {
        let (base, length) = (self.base(), self.length());
        // SAFETY: idle and owned by the caller, who passes it on or, on failure, keeps it.
        unsafe {
            self.drop_message();
            runtime.retire(&self.block);
            // Before its memory goes, because a fork in between leaves the child with this record.
            let tid = self.tid.swap(std::ptr::null_mut(), Ordering::AcqRel);
            if mapping::unmap(base, length).is_ok() {
                return true;
            }
            self.tid.store(tid, Ordering::Release);
            // Whoever wanted it unmapped wanted its memory. And the block goes back to what a fresh mapping
            // holds, since that is what its state now says.
            let bottom = self.bottom();
            if sys::madvise(bottom, base + length - bottom, libc::MADV_DONTNEED).is_ok() {
                self.keep.store(0, Ordering::Relaxed);
            } else {
                let block = self.block_size.load(Ordering::Relaxed);
                std::ptr::write_bytes((base + length - block) as *mut u8, 0, block);
            }
        }
        false
    }

    fn is_locked(&self) -> bool {
        self.locked.load(Ordering::Relaxed)
    }

    fn base(&self) -> usize {
        self.base.load(Ordering::Relaxed)
    }

    fn guard_size(&self) -> usize {
        self.guard.load(Ordering::Relaxed)
    }

    fn size(&self) -> usize {
        self.size.load(Ordering::Relaxed)
    }

    /// Bytes of the whole mapping.
    fn length(&self) -> usize {
        self.guard_size()
            + self.size()
            + self.signal_stack.load(Ordering::Relaxed)
            + self.block_size.load(Ordering::Relaxed)
    }

    /// Lowest usable address.
    fn bottom(&self) -> usize {
        self.base() + self.guard_size()
    }

    /// The initial stack pointer; the guard of the signal stack begins here.
    pub(crate) fn top(&self) -> usize {
        self.bottom() + self.size()
    }

    fn tid_word(&self) -> Option<&AtomicU32> {
        // SAFETY: null, or the word in this record's own block. It is mapped as long as the record
        // is in the hands of a handle, a thread or a ledger's entry.
        unsafe { self.tid.load(Ordering::Relaxed).as_ref() }
    }

    /// The kernel has cleared the tid word (A2), or there was no thread.
    pub(crate) fn is_released(&self) -> bool {
        self.tid_word()
            .is_none_or(|word| word.load(Ordering::Acquire) == 0)
    }

    /// Like [`Stack::is_released`], for a handle. In a forked child the kernel never clears the word of a thread that
    /// does not exist there; the repair does.
    pub(crate) fn has_ended(&self) -> bool {
        notice_fork();
        self.is_released()
    }

    /// Waits until the kernel has let go, at most `timeout`. True: it has.
    ///
    /// Plain FUTEX_WAIT: the kernel's wake of a cleared tid word is a shared one and wakes one
    /// waiter, which is all there can be, because joining consumes the only handle (G14).
    pub(crate) fn wait_released(&self, timeout: Option<std::time::Duration>) -> bool {
        if self.has_ended() {
            return true;
        }
        let Some(word) = self.tid_word() else {
            return true;
        };
        let deadline = timeout.and_then(|timeout| std::time::Instant::now().checked_add(timeout));
        loop {
            let tid = word.load(Ordering::Acquire);
            if tid == 0 {
                return true;
            }
            let left = match deadline {
                None => None,
                Some(deadline) => {
                    match deadline.checked_duration_since(std::time::Instant::now()) {
                        Some(left) if !left.is_zero() => Some(left),
                        _ => return false,
                    }
                }
            };
            sys::futex_wait(word, tid, left);
        }
    }

    /// Does what an ended thread has left to the owner of its stack: glibc's list and count, what it used of the stack,
    /// its message. All of it before any other thread can see that it was joined.
    pub(crate) fn reap(&self) {
        // A thread that died of a bare exit or a filter has not said so.
        self.change_life(Life::Attached, Life::Ending);
        // In a child of _Fork(3) the locks of glibc's list and of malloc can be held for ever.
        if forked_bare() {
            return;
        }
        if let Some(runtime) = Runtime::existing()
            && self.block.is_known_to_glibc()
        {
            let old = sys::set_signal_mask(sys::APPLICATION);
            // SAFETY: the caller is the only owner of a stack whose tid word the kernel has cleared; application
            // signals are blocked and SIGSETXID is not (G3).
            unsafe { runtime.reap(&self.block) };
            sys::set_signal_mask(old);
        }
        // SAFETY: the kernel has cleared the tid word, so nothing runs on the stack, and the caller is its only owner.
        unsafe {
            self.discard();
            self.drop_message();
        }
    }

    /// The `pthread_t`.
    pub(crate) fn pthread(&self) -> libc::pthread_t {
        self.block.thread_pointer() as libc::pthread_t
    }

    /// Sends `signal` (0 probes) to the thread `tid` that runs here, and to no other.
    pub(crate) fn signal(&self, tid: libc::pid_t, signal: libc::c_int) -> Result<(), Errno> {
        self.with_tid(|| sys::tgkill(sys::process_id(), tid, signal))
    }

    /// A pidfd of the thread `tid` that runs here, and of no other.
    pub(crate) fn pidfd(&self, tid: libc::pid_t) -> Result<std::os::fd::OwnedFd, Errno> {
        self.with_tid(|| sys::pidfd_open_thread(tid))
    }

    /// Calls `f` while the thread cannot end in the normal way, or says ESRCH if it has. Signals are
    /// blocked meanwhile: a handler that came here would wait for the thread that it interrupted.
    fn with_tid<T>(&self, f: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        let old = sys::set_signal_mask(sys::APPLICATION);
        // Behind the mask: no handler can fork between this and the lock.
        notice_fork();
        sys::lll_lock(&self.signal_lock);
        let result = if self.exiting.load(Ordering::Relaxed) || self.is_released() {
            Err(Errno::ESRCH)
        } else {
            f()
        };
        sys::lll_unlock(&self.signal_lock);
        sys::set_signal_mask(old);
        result
    }

    /// The thread's side of [`Stack::signal`]: from here on no sender uses the tid.
    pub(crate) fn close_to_signals(&self) {
        sys::lll_lock(&self.signal_lock);
        self.exiting.store(true, Ordering::Relaxed);
        sys::lll_unlock(&self.signal_lock);
    }

    /// `from` becomes `to`; what it was otherwise.
    #[inline(always)]
    pub(crate) fn change_life(&self, from: Life, to: Life) -> bool {
        self.life
            .compare_exchange(from as u8, to as u8, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Like [`Stack::reap`], for a stack that was claimed.
    pub(crate) fn reap_unowned(&self) {
        self.reap();
        self.change_life(Life::Ending, Life::Given);
    }

    /// Claims the stack of a detached thread that died without giving it back. Returns `true` once. Only a mark seen
    /// *before* the tid word says so: a word that was clear before a clone, beside the mark that a handle dropped after
    /// it has left, is a running thread.
    pub(crate) fn claim_unowned(&self) -> bool {
        self.life.load(Ordering::Acquire) == Life::Detached as u8
            && self.is_released()
            && self.change_life(Life::Detached, Life::Ending)
    }

    /// Whether it can be claimed, and its thread was of this scope. Called with the ledger's lock held, as
    /// [`Stack::claim_unowned`].
    pub(crate) fn is_unowned_of(&self, latch: &Shared<Latch>) -> bool {
        if self.life.load(Ordering::Acquire) != Life::Detached as u8 || !self.is_released() {
            return false;
        }
        // SAFETY: the thread is gone, and has no handle; the one that claims the stack does so under the lock.
        let message = unsafe { (*self.start.get()).as_ref() };
        let entered = message.and_then(|start| start.latch.as_ref());
        entered.is_some_and(|entered| entered.is_of(latch))
    }

    /// In a forked child: whether a handle exists that gives the stack back. Ends the life of a thread that is not in
    /// this process.
    fn has_handle(&self) -> bool {
        if self.change_life(Life::Attached, Life::Ending) || self.is_in(Life::Ending) {
            return true;
        }
        self.change_life(Life::Detached, Life::Given);
        false
    }

    fn is_in(&self, life: Life) -> bool {
        self.life.load(Ordering::Acquire) == life as u8
    }

    /// Lends the name to the record for as long as the thread runs: what an overflow report, a
    /// debugger and [`Stack::name`] read. Null pointer: no name.
    ///
    /// # Safety
    /// The string outlives the thread, or `None` is set before it goes.
    pub(crate) unsafe fn set_name(&self, name: Option<&str>) {
        let (pointer, length) = name.map_or((std::ptr::null_mut(), 0), |name| {
            (name.as_ptr().cast_mut(), name.len())
        });
        self.name_length.store(length, Ordering::Relaxed);
        self.name.store(pointer, Ordering::Release);
    }

    /// The name of the thread that runs here.
    ///
    /// # Safety
    /// Called by that thread, signal handlers included.
    pub(crate) unsafe fn name(&self) -> Option<&str> {
        let pointer = self.name.load(Ordering::Acquire);
        if pointer.is_null() {
            return None;
        }
        // SAFETY: a live str of this length, by set_name's contract.
        Some(unsafe {
            std::str::from_utf8_unchecked(std::slice::from_raw_parts(
                pointer,
                self.name_length.load(Ordering::Relaxed),
            ))
        })
    }

    /// The message for the new thread.
    ///
    /// # Safety
    /// Called by that thread, which does not take the message while it uses this.
    pub(crate) unsafe fn start(&self) -> Option<&crate::start::Start> {
        // SAFETY: the creator's write happened before clone.
        unsafe { (*self.start.get()).as_ref() }
    }

    /// The thread's own part of its end: drops its reference to the body, leaves its scope. Memory stays in the message
    /// for the next owner of the stack to free ([`Stack::drop_message`]).
    ///
    /// # Safety
    /// Called by that thread, which does not use [`Stack::start`] any more.
    pub(crate) unsafe fn leave_body(&self) {
        // Alone, because the destructor of the closure's result can end the thread by a bare exit, and then the rest
        // of the message must be found.
        // SAFETY: only the thread looks at its message while it lives; the borrow ends here.
        let body = unsafe { (*self.start.get()).as_mut() }.and_then(|start| start.body.take());
        let memory = body.and_then(Shared::leave);
        // SAFETY: a borrow of its own, after the destructor.
        if let Some(start) = unsafe { (*self.start.get()).as_mut() } {
            start.memory = memory;
            // The latch of its scope comes after the body, because that may borrow from there.
            if let Some(latch) = &mut start.latch {
                latch.leave();
            }
        }
    }

    /// Drops what the last thread has left: memory, or the whole message if it died on its way.
    ///
    /// # Safety
    /// The caller is the idle stack's only owner.
    unsafe fn drop_message(&self) {
        // SAFETY: by the caller's promise nothing else reaches it. The name goes with the message that it is borrowed
        // from. A closure that never ran may be among it: its packet keeps a panic of it to itself.
        unsafe {
            if (*self.start.get()).is_some() {
                self.set_name(None);
                drop((*self.start.get()).take());
            }
        }
    }

    /// Where signals are handled that say SA_ONSTACK: lowest address and length.
    pub(crate) fn signal_stack(&self) -> (usize, usize) {
        let guard = sys::page_size();
        let length = self.signal_stack.load(Ordering::Relaxed) - guard;
        (self.top() + guard, length)
    }

    /// Gives back to the kernel what the thread used of its stack beyond the remainder that
    /// stays warm. madvise(MADV_DONTNEED) is in every VMM's filter.
    ///
    /// # Safety
    /// Called by the ending thread on its own stack, or by the owner of an idle one; nothing deeper than the
    /// remainder is in use, and nothing can come to be.
    pub(crate) unsafe fn discard(&self) {
        let keep = self.keep.load(Ordering::Relaxed);
        let size = self.size();
        if keep < size {
            // SAFETY: below the remainder there is nothing but the dead frames of this thread.
            let _ = unsafe { sys::madvise(self.bottom(), size - keep, libc::MADV_DONTNEED) };
        }
        self.discarded.store(true, Ordering::Relaxed);
    }

    /// The thread comes to its end. Without a handle it gives its stack back itself: from then on the stack waits in
    /// the ledger until the kernel has cleared the tid word.
    ///
    /// # Safety
    /// Called by the ending thread on its own stack, with application signals blocked: what is in use now, the frames
    /// of `start::main` and of what it calls, is in the page that is always kept, and no handler comes that would need
    /// more. (SIGSETXID can come until the thread is marked as exiting.)
    pub(crate) unsafe fn end(&'static self) {
        if self.change_life(Life::Attached, Life::Ending) {
            return;
        }
        // SAFETY: passed on.
        unsafe { self.discard() };
        // `Detached` says that this thread will give its stack back. It has: left standing, the word would call the
        // stack unowned in its next life (`StackCache::sweep`).
        self.change_life(Life::Detached, Life::Given);
        StackCache::give_running(self);
    }

    /// The handle is dropped. Returns `true` if the stack is now its to give back: the thread has passed its end.
    pub(crate) fn leave_handle(&self) -> bool {
        if self.change_life(Life::Attached, Life::Detached) {
            return false;
        }
        if self.is_released() && !self.is_discarded() {
            self.reap();
        }
        self.change_life(Life::Ending, Life::Given);
        true
    }

    /// The thread ended normally: its heap cache goes on to the next one here (G9).
    pub(crate) fn mark_ended(&self) {
        self.block.set_state(BlockState::Ended);
    }

    /// In a forked child: a thread of the parent can have held the lock, and none here does.
    fn forget_senders(&self) {
        self.signal_lock.store(0, Ordering::Relaxed);
    }

    /// In a forked child: the thread that ran here does not exist.
    fn forget_thread(&self) {
        let was_running = !self.block.has_ended();
        if let Some(word) = self.tid_word() {
            word.store(0, Ordering::Release);
            if was_running && let Some(runtime) = Runtime::existing() {
                // SAFETY: with a tid word the block is mapped, and no thread of this child runs on it.
                unsafe { runtime.abandon_dtv(&self.block) };
            }
        }
        self.block.forget_after_fork();
        // SAFETY: the child has one thread, and none runs here. The parent's values are not this
        // process's to drop.
        std::mem::forget(unsafe { (*self.start.get()).take() });
    }
}

// SAFETY: `links` is one object per record.
unsafe impl Entry for Stack {
    fn links(&self) -> &Links<Stack> {
        &self.links
    }

    fn class(&self) -> Option<Class> {
        Class::from_index(self.class.load(Ordering::Relaxed))
    }

    fn bytes(&self) -> usize {
        self.length()
    }

    fn resident(&self) -> usize {
        let size = self.size();
        let keep = if self.locked.load(Ordering::Relaxed) || !self.discarded.load(Ordering::Relaxed)
        {
            size
        } else {
            self.keep.load(Ordering::Relaxed).min(size)
        };
        // A handler of the application can have run on the signal stack.
        keep + self.signal_stack().1 + self.block_size.load(Ordering::Relaxed)
    }

    fn released(&self) -> bool {
        self.is_released()
    }

    fn is_discarded(&self) -> bool {
        self.discarded.load(Ordering::Relaxed)
    }
}

/// A stack without a thread, owned by a spawn on its way: dropped, it goes back where it came from.
pub(crate) struct Idle {
    stack: &'static Stack,
    cache: StackCache,
    runtime: &'static Runtime,
    from_cache: bool,
    /// It came locked, from an earlier thread that wanted that.
    was_locked: bool,
    /// Memory was asked for that must go again if no thread comes of it.
    prepared: Cell<bool>,
}

/// What a spawn asks of its stack.
pub(crate) struct Wanted {
    /// Usable bytes.
    pub size: usize,
    /// Guard bytes.
    pub guard: usize,
    /// Resident and locked before the closure runs.
    pub lock: bool,
    /// Bytes at the top that are resident before the closure runs.
    pub prefault: usize,
}

impl Wanted {
    /// What is wrong with sizes that cannot exist, and their sum: either of the two can be the cause.
    pub(crate) fn too_large(&self) -> (&'static str, u64) {
        let sum = self.size.saturating_add(self.guard);
        ("stack and guard exceed the address space", sum as u64)
    }
}

/// The refused step, and what became of a stack that was mapped already.
pub(crate) type Refused = (StepError, StackOutcome);

impl Idle {
    /// A cached stack of the size's class, or a fresh one.
    pub(crate) fn obtain(
        cache: &StackCache,
        runtime: &'static Runtime,
        wanted: &Wanted,
    ) -> Result<Idle, Refused> {
        let fit = class::fit(
            wanted.size.max(layout::SMALLEST),
            wanted.guard,
            sys::page_size(),
        );
        let (size, guard) = fit.map_or((wanted.size, wanted.guard), |fit| (fit.usable, fit.guard));
        let class = fit.map(|fit| fit.class);
        let hit = class.and_then(|class| {
            let (hit, victims) = cache.ledger().take(class);
            if !victims.is_empty() {
                cache::unmap_victims(victims, Some(runtime), std::ptr::null());
            }
            hit
        });
        let (stack, from_cache) = match hit {
            Some(stack) => {
                // SAFETY: whoever takes a stack from the ledger is its only owner.
                unsafe { stack.renew(cache, runtime) };
                (stack, true)
            }
            None => {
                let layout = Layout::new(runtime, size, guard).ok_or((
                    StepError::new(Step::Attributes, Errno::EINVAL, 0),
                    StackOutcome::NONE,
                ))?;
                if class.is_none() {
                    cache.ledger().miss();
                }
                if cache.is_enabled() {
                    cache::heed_limits(runtime);
                }
                (Stack::map(cache, runtime, &layout, class)?, false)
            }
        };
        // A child that a handler of the application forks from here on must not take the stack for a free one.
        stack.life.store(Life::Ending as u8, Ordering::Relaxed);
        Ok(Idle {
            stack,
            cache: cache.clone(),
            runtime,
            from_cache,
            was_locked: stack.locked.load(Ordering::Relaxed),
            prepared: Cell::new(false),
        })
    }

    /// mlock and prefault, as asked for.
    pub(crate) fn prepare(&self, wanted: &Wanted) -> Result<(), StepError> {
        let refused = |bytes| move |errno| StepError::new(Step::PrepareStack, errno, bytes);
        let stack = self.stack;
        let (bottom, size) = (stack.bottom(), stack.size());
        self.prepared.set(wanted.lock || wanted.prefault > 0);
        if wanted.lock {
            // The flag first: even a refused mlock can have locked a part.
            stack.locked.store(true, Ordering::Relaxed);
            // SAFETY: the usable range of an idle stack, above its guard.
            unsafe { mapping::lock(bottom, size) }.map_err(refused(size))?;
        } else if stack.locked.swap(false, Ordering::Relaxed) {
            // A stack that an earlier thread had locked: its memory is wanted back.
            // SAFETY: as above.
            let _ = unsafe { mapping::unlock(bottom, size) };
        }
        let prefault = wanted.prefault.min(size).next_multiple_of(sys::page_size());
        if prefault > 0 {
            // SAFETY: as above.
            unsafe { mapping::populate(stack.top() - prefault, prefault) }
                .map_err(refused(prefault))?;
        }
        Ok(())
    }

    /// Puts the descriptor on glibc's list. Application signals are blocked, SIGSETXID is not (G3),
    /// as [`Signals`] does.
    pub(crate) fn enlist(&self, _blocked: &Signals) -> Enlisted<'static> {
        let stack = self.stack;
        let guard = stack.guard_size();
        // SAFETY: an Idle is the only owner of a stack whose last thread was released, or which is
        // fresh: the ledger hands out no other.
        unsafe {
            self.runtime
                .enlist(&stack.block, (stack.base(), guard + stack.size(), guard))
        }
    }

    /// Clones. The new thread begins with the mask that [`Signals`] has set: no handler of the
    /// application's runs in it before it is ready.
    ///
    /// SIGSETXID stays unblocked across the clone, where nptl blocks it, which saves a system call. A
    /// set-id broadcast meets one of three moments, and it repeats until nobody is left to signal
    /// (G1): the creator handles it before the kernel copies the credentials, and the new thread
    /// has the new ones; or it is pending when clone begins, and the kernel then handles it first and
    /// starts clone again; or it comes later, and finds the new thread's tid in its descriptor before
    /// the creator can answer, because clone sets the word before it returns. The handler itself
    /// needs no more of the new thread than the descriptor, which is complete before clone.
    ///
    /// On refusal the message comes back, and the error with it.
    pub(crate) fn clone_thread(
        &self,
        start: crate::start::Start,
        _blocked: &Signals,
    ) -> Result<libc::pid_t, StepError> {
        let stack = self.stack;
        // Here, because in a child that a handler has forked since `obtain` no earlier mark of a thread is left standing.
        stack.life.store(Life::Attached as u8, Ordering::Relaxed);
        stack.discarded.store(false, Ordering::Relaxed);
        stack.exiting.store(false, Ordering::Relaxed);
        // There is no handle of the last thread here; but a thread can have died with the lock.
        stack.signal_lock.store(0, Ordering::Relaxed);
        // SAFETY: no thread runs on this stack, so the slot is the creator's.
        unsafe { *stack.start.get() = Some(start) };
        let bottom = stack.bottom();
        let request = sys::clone::Request {
            stack: bottom,
            // A debugger or valgrind that unwinds the first instruction reads the word at the initial stack pointer,
            // which must not be the guard page above.
            stack_size: stack.size() - ABOVE_FIRST_FRAME,
            thread_pointer: stack.block.thread_pointer(),
            tid: stack.tid.load(Ordering::Relaxed).cast(),
            start: std::ptr::from_ref(stack).cast_mut().cast(),
        };
        // SAFETY: stack and block are idle, owned, enlisted and complete; start::main takes a
        // `&'static Stack` with a message in it.
        let answer = unsafe { sys::clone::thread(&request) };
        if answer.is_err() {
            stack.discarded.store(true, Ordering::Relaxed);
            // SAFETY: no thread was made; dropping the message here gives the closure back.
            drop(unsafe { (*stack.start.get()).take() });
        }
        answer.map_err(|(errno, call)| StepError {
            call,
            ..StepError::new(Step::Clone, errno, 0)
        })
    }

    /// A thread runs on it now; the handle and the thread own it together.
    pub(crate) fn into_running(self) -> (&'static Stack, StackCache) {
        let this = std::mem::ManuallyDrop::new(self);
        // SAFETY: `this` is never used again, so the handle is moved, not duplicated.
        (this.stack, unsafe { std::ptr::read(&raw const this.cache) })
    }

    /// Back into the cache if it came from there, else unmapped: a refused spawn leaves no mapping
    /// and no cached stack more than before (A3).
    pub(crate) fn put_back(self) -> StackOutcome {
        let origin = match self.from_cache {
            true => StackOrigin::Cache,
            false => StackOrigin::Fresh,
        };
        let fate = self.undo();
        // The stack is given back; the handle to its cache still has to be.
        drop(self.into_running());
        StackOutcome { origin, fate }
    }

    /// A stack that stays mapped goes back as it came: the cache must neither hold nor count memory that
    /// was locked or prefaulted for a thread that did not come to be.
    fn unprepare(&self) {
        if !self.prepared.get() {
            return;
        }
        let stack = self.stack;
        if !self.was_locked && stack.locked.swap(false, Ordering::Relaxed) {
            // SAFETY: the usable range of an idle stack, above its guard.
            let _ = unsafe { mapping::unlock(stack.bottom(), stack.size()) };
        }
        // SAFETY: nothing runs on an idle stack, so all of it is below the remainder that is in use.
        unsafe { stack.discard() };
    }

    fn undo(&self) -> StackFate {
        self.unprepare();
        self.stack.life.store(Life::Given as u8, Ordering::Relaxed);
        // In a child of _Fork(3), which a handler of the application can have returned in, ledgers are out of use.
        if forked_bare() {
            return StackFate::Cached;
        }
        let ledger = self.cache.ledger();
        let unmapped = if self.from_cache {
            let before = std::ptr::from_ref(self.stack);
            let round = cache::unmap_victims(ledger.give(self.stack), Some(self.runtime), before);
            round.found
        } else {
            let this = std::ptr::from_ref(self.stack);
            let round = cache::unmap_victims(ledger.retire(self.stack), Some(self.runtime), this);
            round.found
        };
        StackFate::of(unmapped)
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        self.undo();
    }
}

/// The creator's signals while it spawns. Dropped, it restores the mask that was there.
pub(crate) struct Signals {
    old: sys::KernelSigSet,
}

impl Signals {
    /// Blocks all but SIGSETXID, which stays unblocked because the next step waits for the list's lock (G3),
    /// before clone and after a refused one.
    pub(crate) fn block_all_but_setxid() -> Signals {
        Signals {
            old: sys::set_signal_mask(sys::ALL_BUT_SETXID),
        }
    }

    /// What a new thread inherits: never SIGCANCEL and SIGSETXID (G4).
    pub(crate) fn inherited(&self) -> sys::KernelSigSet {
        self.old & sys::APPLICATION
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        sys::set_signal_mask(self.old);
    }
}

/// Where a thread's stack lies.
///
/// ```
/// let handle = nptl::Builder::new().stack_size(256 * 1024).spawn(|| ()).unwrap();
/// let stack = handle.stack();
/// assert!(stack.size >= 256 * 1024);
/// handle.join().unwrap();
/// ```
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackInfo {
    /// Lowest usable address.
    pub base: usize,
    /// Usable bytes, from `base` to the initial stack pointer: what was asked for, rounded up to
    /// the cache's size class.
    pub size: usize,
    /// Bytes of guard below `base`.
    pub guard_size: usize,
    /// The most bytes of stack that can have been in use so far, counted from the top, as
    /// mincore(2) tells from resident pages. Pages that an earlier thread on this stack left
    /// resident count as used, prefaulted and locked ones too; 0 if it could not be asked.
    pub high_water_mark: usize,
}

impl Stack {
    pub(crate) fn info(&self) -> StackInfo {
        StackInfo {
            base: self.bottom(),
            size: self.size(),
            guard_size: self.guard_size(),
            high_water_mark: self.high_water_mark(),
        }
    }

    /// In pieces, so that a large stack needs no large buffer; from below, because what was touched
    /// deepest is looked for.
    fn high_water_mark(&self) -> usize {
        const PIECE: usize = 1024;
        let page = sys::page_size();
        let mut resident = [0_u8; PIECE];
        let (mut at, top) = (self.bottom(), self.top());
        while at < top {
            let length = (top - at).min(PIECE * page);
            // SAFETY: the vector holds a byte for each page of the range, which is mapped.
            let answer =
                unsafe { libc::mincore(at as *mut libc::c_void, length, resident.as_mut_ptr()) };
            if answer != 0 {
                return 0;
            }
            let pages = resident.iter().take(length / page);
            if let Some(first) = pages.into_iter().position(|byte| byte & 1 != 0) {
                return top - (at + first * page);
            }
            at += length;
        }
        0
    }
}
