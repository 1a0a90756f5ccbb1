//! [`Stack`]: the record of one mapping, and of the thread on it.
//!
//! Records are leaked and recycled, never freed, so a `&'static Stack` is always good to look at, in a signal handler,
//! in a forked child and in a core file; their number is the largest number of stacks that ever existed at once.

use super::layout::Layout;
use super::ledger::class::Class;
use super::ledger::{Entry, Links};
use super::mapping;
use super::message::Start;
#[cfg(feature = "interpose")]
use super::roll::Roll;
use crate::mem::{Shared, try_box};
use crate::sync::Lock;
use crate::sys;
use crate::tcb::{Block, Parked, Runtime};
use std::cell::UnsafeCell;
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
    pub(super) links: Links<Stack>,
    pub(super) base: AtomicUsize,
    pub(super) guard: AtomicUsize,
    pub(super) size: AtomicUsize,
    /// With the page of guard below it.
    pub(super) signal_stack: AtomicUsize,
    pub(super) block_size: AtomicUsize,
    /// A class index, or [`NO_CLASS`].
    pub(super) class: AtomicU16,
    /// Bytes of stack that may stay resident while it is cached.
    pub(super) keep: AtomicUsize,
    /// mlock(2) was called on the stack.
    pub(super) locked: AtomicBool,
    /// How often it was taken from the cache; touched by its owner only.
    pub(super) uses: AtomicU32,
    pub(super) life: AtomicU8,
    /// Nothing is resident of the stack but the bytes to keep: the thread has discarded the rest as its last act, or its
    /// handle has. `false` where the handle was dropped in the moment between the thread's last act and its end: the
    /// next call that takes or gives a stack does it then.
    pub(super) discarded: AtomicBool,
    /// The tid word in the descriptor; null where there is no block in memory.
    pub(super) tid: AtomicPtr<AtomicU32>,
    pub(crate) block: Block,
    /// Taken by a thread that uses the tid from outside, and by the thread before it ends: while it is
    /// held, the tid cannot be given to another thread.
    pub(super) signal_lock: AtomicU32,
    /// The thread's name, borrowed from its owner for the time of the thread's life.
    pub(super) name: AtomicPtr<u8>,
    pub(super) name_length: AtomicUsize,
    /// What the creator hands to the thread.
    pub(super) start: UnsafeCell<Option<Start>>,
    /// The next record without a mapping, or [`NOT_SPARE`]. Changed with the lock of [`SPARE`] held.
    pub(super) next_spare: AtomicPtr<Stack>,
    /// The record made before this one: a debugger's way to all of them.
    pub(super) next_record: AtomicPtr<Stack>,
    /// In [`ROLL`]; set once.
    #[cfg(feature = "interpose")]
    pub(super) number: AtomicUsize,
    /// Which C code may join the thread: see `posix`.
    #[cfg(feature = "interpose")]
    pub(super) joiner: AtomicUsize,
}

// SAFETY: `start` is written by the creator before the thread exists and taken by the thread, or
// by the creator after a refused clone: one owner at a time. All else is atomic or synchronised.
unsafe impl Sync for Stack {}

/// All records, which only grow in number: the newest, and from there each before it.
#[repr(transparent)]
pub(crate) struct Records(AtomicPtr<Stack>);

impl Records {
    fn push(&self, stack: &'static Stack) {
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

/// All records of the process.
pub(crate) static RECORDS: Records = Records(AtomicPtr::new(std::ptr::null_mut()));

/// All records by their numbers.
#[cfg(feature = "interpose")]
pub(super) static ROLL: Roll<Stack> = Roll::new();

pub(super) const NO_CLASS: u16 = u16::MAX;

/// Of a record that is not in the list of spare ones.
const NOT_SPARE: *mut Stack = std::ptr::dangling_mut();

/// Records whose mappings are gone. They carry parked heap caches, so the last is used first. The list is whole at
/// every instruction, for a forked child.
pub(super) static SPARE: Lock<AtomicPtr<Stack>> = Lock::new(AtomicPtr::new(std::ptr::null_mut()));

impl Stack {
    pub(super) fn new() -> Stack {
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
            name: AtomicPtr::new(std::ptr::null_mut()),
            name_length: AtomicUsize::new(0),
            start: UnsafeCell::new(None),
            next_spare: AtomicPtr::new(NOT_SPARE),
            next_record: AtomicPtr::new(std::ptr::null_mut()),
            #[cfg(feature = "interpose")]
            number: AtomicUsize::new(0),
            #[cfg(feature = "interpose")]
            joiner: AtomicUsize::new(0),
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
    pub(super) fn spare() -> Option<&'static Stack> {
        let spare = SPARE.lock();
        // SAFETY: null, or a record that was pushed by `retire_record`; records are never freed.
        if let Some(stack) = unsafe { spare.load(Ordering::Relaxed).as_ref() } {
            spare.store(stack.next_spare.load(Ordering::Relaxed), Ordering::Relaxed);
            stack.next_spare.store(NOT_SPARE, Ordering::Relaxed);
            return Some(stack);
        }
        drop(spare);
        #[cfg(feature = "interpose")]
        let number = ROLL.reserve()?;
        let stack: &'static Stack = Box::leak(try_box(Stack::new()).ok()?);
        RECORDS.push(stack);
        #[cfg(feature = "interpose")]
        {
            stack.number.store(number, Ordering::Relaxed);
            ROLL.set(number, stack);
        }
        Some(stack)
    }

    pub(super) fn retire_record(&'static self) {
        self.base.store(0, Ordering::Relaxed);
        let spare = SPARE.lock();
        self.next_spare
            .store(spare.load(Ordering::Relaxed), Ordering::Relaxed);
        spare.store(std::ptr::from_ref(self).cast_mut(), Ordering::Release);
    }

    /// Whether a heap cache waits here, in a record without a mapping, for the next thread.
    pub(super) fn has_parked(&self) -> bool {
        let _spare = SPARE.lock();
        // SAFETY: a spare record is its list's, whose lock is held until the answer is there.
        self.is_spare() && unsafe { self.block.has_parked() }
    }

    /// Takes that heap cache.
    pub(super) fn take_parked(&self) -> Option<Parked> {
        let _spare = SPARE.lock();
        if !self.is_spare() {
            return None;
        }
        // SAFETY: a spare record is its list's, whose lock is held.
        unsafe { self.block.take_parked() }
    }

    /// Called with the lock of [`SPARE`] held.
    fn is_spare(&self) -> bool {
        self.next_spare.load(Ordering::Relaxed) != NOT_SPARE
    }

    /// Fills the record in for a fresh mapping of this layout.
    pub(super) fn describe(
        &self,
        runtime: &'static Runtime,
        base: usize,
        layout: &Layout,
        class: Option<Class>,
    ) {
        let length = layout.total();
        self.base.store(base, Ordering::Relaxed);
        self.guard.store(layout.guard, Ordering::Relaxed);
        self.size.store(layout.stack, Ordering::Relaxed);
        self.signal_stack
            .store(layout.signal_stack, Ordering::Relaxed);
        self.block_size.store(layout.block, Ordering::Relaxed);
        let class = class.map_or(NO_CLASS, |class| class.index() as u16);
        self.class.store(class, Ordering::Relaxed);
        self.locked.store(false, Ordering::Relaxed);
        self.discarded.store(true, Ordering::Relaxed);
        let tp = runtime.thread_pointer_in(base + length);
        self.block.set_fresh(tp);
        // SAFETY: the block is mapped; the pointer is replaced before the record describes another.
        let tid = unsafe { runtime.tid_word(tp) };
        self.tid
            .store(std::ptr::from_ref(tid).cast_mut(), Ordering::Relaxed);
    }

    /// Gives the memory back to the kernel. Returns `false` if munmap was refused; then the stack is whole, but empty.
    ///
    /// # Safety
    /// The stack is idle and the caller its only owner.
    pub(super) unsafe fn unmap(&'static self, runtime: &Runtime) -> bool {
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
            // It was to be unmapped for its memory. And the block goes back to what a fresh mapping
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

    pub(super) fn is_locked(&self) -> bool {
        self.locked.load(Ordering::Relaxed)
    }

    pub(super) fn base(&self) -> usize {
        self.base.load(Ordering::Relaxed)
    }

    pub(super) fn guard_size(&self) -> usize {
        self.guard.load(Ordering::Relaxed)
    }

    pub(super) fn size(&self) -> usize {
        self.size.load(Ordering::Relaxed)
    }

    /// Bytes of the whole mapping.
    pub(super) fn length(&self) -> usize {
        self.guard_size()
            + self.size()
            + self.signal_stack.load(Ordering::Relaxed)
            + self.block_size.load(Ordering::Relaxed)
    }

    /// Lowest usable address.
    pub(super) fn bottom(&self) -> usize {
        self.base() + self.guard_size()
    }

    /// The initial stack pointer; the guard of the signal stack begins here.
    pub(crate) fn top(&self) -> usize {
        self.bottom() + self.size()
    }

    pub(super) fn tid_word(&self) -> Option<&AtomicU32> {
        // SAFETY: null, or the word in this record's own block. It is mapped as long as the record
        // is in the hands of a handle, a thread or a ledger's entry.
        unsafe { self.tid.load(Ordering::Relaxed).as_ref() }
    }

    /// Whether the kernel has cleared the tid word (A2), or there was no thread.
    pub(crate) fn is_released(&self) -> bool {
        self.tid_word()
            .is_none_or(|word| word.load(Ordering::Acquire) == 0)
    }

    /// The `pthread_t`.
    pub(crate) fn pthread(&self) -> libc::pthread_t {
        self.block.thread_pointer() as libc::pthread_t
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
    pub(crate) unsafe fn start(&self) -> Option<&Start> {
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
    pub(super) unsafe fn drop_message(&self) {
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

    fn measure(&self) -> Option<usize> {
        self.idle_resident()
    }

    fn released(&self) -> bool {
        self.is_released()
    }

    fn is_discarded(&self) -> bool {
        self.discarded.load(Ordering::Relaxed)
    }
}
