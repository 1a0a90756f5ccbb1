//! One thread's TLS block: preparing it, listing it, handing its heap cache on, retiring it.

use super::{KEY_BLOCKS, KeyValues, Runtime, calibrate::JoinMark, image, symbols};
use crate::clone::{self, sys};
use crate::stack::fallible::Left;
use std::cell::{Cell, UnsafeCell};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};

/// The largest TLS segment of libc itself that is handed on; 128 to 144 bytes were seen.
pub(crate) const SEGMENT_MAX: usize = 256;

/// What the memory of a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum BlockState {
    /// Zeroes from the kernel.
    Fresh = 0,
    /// In use, or its thread did not end normally: nothing in it may be handed on (rule 9).
    InUse = 1,
    /// A thread ended normally here: libc's segment (the heap cache) goes on to the next.
    Ended = 2,
}

/// What outlives a block whose memory is unmapped, until the next fresh block takes it: malloc's
/// thread cache and arena, and the getrandom state. Dropping these would leak them, because glibc
/// exports no way to release them (facts/glibc.md). The buffers of strsignal and strerror go with
/// them, since they can be too short to be a [`Left`], and the allocator is not for an ending thread.
pub(crate) struct Parked {
    segment: [u8; SEGMENT_MAX],
    /// Of [`Runtime::parked_words`].
    words: [usize; 3],
    present: bool,
}

/// What the stack record keeps of its block.
pub(crate) struct Block {
    /// The thread pointer; 0 while nothing is mapped.
    tp: AtomicUsize,
    state: AtomicU8,
    /// On glibc's list. Cleared by the thread itself as its last act; whoever finds it set after
    /// the kernel cleared the tid word must unlist in its stead (rule 7).
    listed: AtomicBool,
    /// In glibc's count of live threads; cleared by the thread itself once it has counted down.
    counted: AtomicBool,
    /// The generation of modules that DTV and static TLS are of, or [`image::NONE`]. With the state
    /// `Ended`: they are those of a thread that has just begun.
    generation: AtomicUsize,
    /// Only touched by the owner of the stack, like the block itself.
    parked: UnsafeCell<Parked>,
}

// SAFETY: `parked` is accessed by the stack's single owner only; ownership is handed over through
// the cache's lock and the tid word.
unsafe impl Sync for Block {}
// SAFETY: nothing in it is bound to a thread.
unsafe impl Send for Block {}

impl Block {
    pub(crate) const fn new() -> Block {
        Block {
            tp: AtomicUsize::new(0),
            state: AtomicU8::new(BlockState::Fresh as u8),
            listed: AtomicBool::new(false),
            counted: AtomicBool::new(false),
            generation: AtomicUsize::new(image::NONE),
            parked: UnsafeCell::new(Parked {
                segment: [0; SEGMENT_MAX],
                words: [0; 3],
                present: false,
            }),
        }
    }

    /// The thread pointer, which is the `pthread_t`; 0 while nothing is mapped.
    pub(crate) fn thread_pointer(&self) -> usize {
        self.tp.load(Ordering::Relaxed)
    }

    /// The memory at `tp` was just mapped.
    pub(crate) fn set_fresh(&self, tp: usize) {
        self.tp.store(tp, Ordering::Relaxed);
        self.set_state(BlockState::Fresh);
    }

    pub(crate) fn set_state(&self, state: BlockState) {
        self.state.store(state as u8, Ordering::Release);
    }

    fn state(&self) -> BlockState {
        match self.state.load(Ordering::Acquire) {
            0 => BlockState::Fresh,
            2 => BlockState::Ended,
            _ => BlockState::InUse,
        }
    }

    /// Asked of a block whose thread the kernel has let go: it died without its last frames.
    pub(crate) fn died(&self) -> bool {
        self.listed.load(Ordering::Acquire) || self.counted.load(Ordering::Acquire)
    }

    /// Clears the mark of a counted thread; what it was.
    pub(super) fn uncount(&self) -> bool {
        self.counted.swap(false, Ordering::AcqRel)
    }

    pub(crate) fn listed(&self) -> &AtomicBool {
        &self.listed
    }

    /// In a forked child glibc has emptied its list, and a heap cache saved by the parent's threads
    /// refers to arenas whose counts fork has reset (rule 16).
    pub(crate) fn forget_after_fork(&self) {
        self.listed.store(false, Ordering::Relaxed);
        self.counted.store(false, Ordering::Relaxed);
        if self.state() == BlockState::Ended {
            self.set_state(BlockState::InUse);
        }
        // SAFETY: the child has one thread, and it owns every idle stack.
        unsafe { (*self.parked.get()).present = false };
    }
}

/// A descriptor on glibc's list whose thread does not exist yet. Dropping it takes it off again,
/// and out of the count of threads; the new thread's clone makes it permanent.
///
/// Made and dropped with application signals blocked and 33 open (rule 3).
pub(crate) struct Enlisted<'a> {
    runtime: &'static Runtime,
    block: &'a Block,
    /// What the block is if no thread comes of this.
    otherwise: Cell<BlockState>,
}

impl Runtime {
    /// Completes the descriptor and puts it on the list with tid 0 (rule 1: before clone, so that
    /// no set-id broadcast can miss the thread). TLS images follow by [`Enlisted::allocate_tls`],
    /// in this order because a dlopen in between initialises only what it finds listed (rule 6).
    ///
    /// `stack` is lowest address, length including the guard, and length of the guard.
    ///
    /// # Safety
    /// The block is idle: its last thread's tid word was cleared by the kernel, or it is fresh
    /// (rule 2 of architecture.md), the caller is its only owner, and `stack` describes its stack.
    pub(crate) unsafe fn enlist<'a>(
        &'static self,
        block: &'a Block,
        stack: (usize, usize, usize),
    ) -> Enlisted<'a> {
        // SAFETY: the caller owns the idle block.
        unsafe {
            self.bury(block);
            let otherwise = self.prepare(block, stack);
            self.count_up();
            block.counted.store(true, Ordering::Relaxed);
            self.list.add(block.thread_pointer() + self.symbols.list);
            block.listed.store(true, Ordering::Release);
            Enlisted {
                runtime: self,
                block,
                otherwise: Cell::new(otherwise),
            }
        }
    }

    /// Does what a thread that died abnormally (a bare exit, a filter) did not do for itself: off the list,
    /// out of the count (rules 7 and 17).
    ///
    /// # Safety
    /// As for [`Runtime::enlist`]. Application signals are blocked, 33 is open (rule 3).
    pub(crate) unsafe fn bury(&self, block: &Block) {
        if block.listed.load(Ordering::Acquire) {
            // SAFETY: passed on.
            unsafe { self.unlist(block.thread_pointer(), &block.listed) };
        }
        // Cannot be the last: the calling thread is in the count, too.
        self.count_down(block);
    }

    /// Bytes from the lowest address of static TLS to the end of the descriptor.
    fn extent(&self, tp: usize) -> (usize, usize) {
        let below = self.symbols.tls_size - self.symbols.descriptor_size;
        (tp - below, tp + self.symbols.descriptor_size)
    }

    /// The state the block has once it is prepared, should nothing come of it.
    ///
    /// # Safety
    /// As for [`Runtime::enlist`]: the block is idle, and the caller its only owner.
    unsafe fn prepare(&self, block: &Block, stack: (usize, usize, usize)) -> BlockState {
        let tp = block.thread_pointer();
        let (lowest, end) = self.extent(tp);
        // SAFETY: the caller owns the idle block; every address lies between lowest and end.
        unsafe {
            let state = block.state();
            match state {
                BlockState::Fresh => {
                    let parked = &mut *block.parked.get();
                    if parked.present {
                        for (at, word) in self.parked_words().into_iter().zip(parked.words) {
                            if let Some(at) = at {
                                ((tp + at) as *mut usize).write(word);
                            }
                        }
                    }
                }
                BlockState::Ended => {
                    // What others can have changed since the thread's end; the rest is as
                    // `Runtime::reset` left it, and what never changes is there already.
                    self.reset_shared(tp);
                    block.set_state(BlockState::InUse);
                    return BlockState::Ended;
                }
                BlockState::InUse => {
                    // An abnormal end: anything in here may dangle, so all of it goes.
                    self.release_dtv(tp);
                    std::ptr::write_bytes(lowest as *mut u8, 0, end - lowest);
                }
            }
            block.generation.store(image::NONE, Ordering::Relaxed);
            block.set_state(BlockState::InUse);
            clone::fill_header(tp);
            self.fill_descriptor(tp, stack);
            BlockState::Fresh
        }
    }

    /// Frees the DTV and dynamic TLS of the thread that was here, once: a refused
    /// `_dl_allocate_tls` leaves none.
    ///
    /// # Safety
    /// `tp` is the thread pointer of an idle block, whose only owner the caller is.
    unsafe fn release_dtv(&self, tp: usize) {
        let dtv = (tp + self.symbols.dtv) as *mut usize;
        // SAFETY: the caller owns the idle block; the word is null or what _dl_allocate_tls wrote.
        unsafe {
            if dtv.read() != 0 {
                (self.symbols.deallocate_tls)(tp as *mut libc::c_void, false);
                dtv.write(0);
            }
        }
    }

    /// As [`Runtime::release_dtv`], but it is freed by [`free_left`](crate::stack::fallible::free_left): the caller can
    /// be an ending thread.
    ///
    /// # Safety
    /// As for [`Runtime::release_dtv`]; the block has no use for its DTV any more.
    unsafe fn leave_dtv(&self, tp: usize) {
        let dtv = (tp + self.symbols.dtv) as *mut usize;
        // SAFETY: as there. The pointer leads to the first of the DTV's entries of two words, which holds its
        // generation: `_dl_deallocate_tls` looks at the length before it and at the modules' behind.
        unsafe {
            if let Some(first) = NonNull::new(dtv.read() as *mut Left) {
                dtv.write(0);
                Left::place(first, free_dtv);
            }
        }
    }

    /// Gives the DTV and dynamic TLS of the thread that was here up, without the allocator.
    ///
    /// # Safety
    /// The block is mapped, no thread runs on it, and the caller is its only owner.
    pub(crate) unsafe fn abandon_dtv(&self, block: &Block) {
        let dtv = (block.thread_pointer() + self.symbols.dtv) as *mut usize;
        // SAFETY: as for `release_dtv`. Without one nothing is written, so that no page is copied for it.
        unsafe {
            if dtv.read() != 0 {
                dtv.write(0);
            }
        }
    }

    /// Back to a fresh descriptor, by the thread that ends: known fields are reset, buffers and tables
    /// that hang off it stay and are used again (rule 5 among them). The static TLS likewise, if the
    /// modules are still those that it was allocated for.
    ///
    /// At a thread's end rather than at the next one's start, because the memory is in this
    /// processor's cache now.
    ///
    /// # Safety
    /// Called by an ending thread on its own listed block, after its last use of a thread-local.
    pub(super) unsafe fn reset(&self, block: &Block) {
        let (tp, symbols) = (block.thread_pointer(), &self.symbols);
        // SAFETY: offsets lie in the descriptor, which is the calling thread's.
        unsafe {
            ((tp + symbols.report_events) as *mut u8).write(0);
            ((tp + symbols.nextevent) as *mut usize).write(0);
            std::ptr::write_bytes((tp + symbols.eventbuf.0) as *mut u8, 0, symbols.eventbuf.1);
            ((tp + self.offsets.result) as *mut usize).write(0);
            let generation = block.generation.load(Ordering::Relaxed);
            if !image::restore(generation, tp) {
                block.generation.store(image::NONE, Ordering::Relaxed);
            }
        }
    }

    /// The rest of [`Runtime::reset`]: what glibc writes into the descriptor of a thread that has
    /// ended already (`pthread_setschedparam`), or what the thread needs until its end.
    ///
    /// # Safety
    /// As for [`Runtime::release_dtv`].
    unsafe fn reset_shared(&self, tp: usize) {
        let (symbols, offsets) = (&self.symbols, &self.offsets);
        // SAFETY: offsets lie in the descriptor, which the caller owns.
        unsafe {
            // Without the flag for them, policy and priority are asked of the kernel.
            let flags = (tp + offsets.flags) as *mut u32;
            flags.write(flags.read() & !offsets.flags_changed);
            ((tp + symbols.cancelhandling) as *mut u32).write(0);
            if let Some(exiting) = offsets.exiting {
                ((tp + exiting.flag) as *mut u8).write(0);
                ((tp + exiting.lock) as *mut u32).write(0);
            }
        }
    }

    /// The non-zero fields of a descriptor at the moment of clone (facts/glibc.md). Those that only the
    /// thread itself looks at are left to [`Runtime::enter`].
    ///
    /// # Safety
    /// As for [`Runtime::release_dtv`]; the range is that of the stack below the block.
    unsafe fn fill_descriptor(&self, tp: usize, (base, length, guard): (usize, usize, usize)) {
        let (symbols, offsets) = (&self.symbols, &self.offsets);
        let write = |at: usize, value: usize| {
            // SAFETY: every `at` is a word of the descriptor, which the caller owns.
            unsafe { ((tp + at) as *mut usize).write(value) }
        };
        write(symbols.specific, tp + offsets.first_key_block);
        write(offsets.stackblock, base);
        write(offsets.stackblock_size, length);
        write(offsets.guardsize, guard);
        write(offsets.reported_guardsize, guard);
        match offsets.join_mark {
            JoinMark::Itself => write(offsets.join, tp),
            // SAFETY: as in `write`.
            JoinMark::State(detached) => unsafe {
                ((tp + offsets.join) as *mut u32).write(detached);
            },
        }
        // SAFETY: as in `write`.
        unsafe {
            ((tp + offsets.user_stack) as *mut u8).write(offsets.user_stack_value);
            ((tp + symbols.tid) as *mut u32).write(0);
        }
    }

    /// Makes room for another `_dl_allocate_tls`: saves libc's segment, frees the DTV, and zeroes the
    /// gaps between modules, which nobody else writes.
    ///
    /// # Safety
    /// The block is idle, the caller its only owner, and its last thread has ended normally.
    unsafe fn release_tls(&self, block: &Block) {
        let tp = block.thread_pointer();
        let (lowest, _) = self.extent(tp);
        // SAFETY: the caller owns the block, whose thread ended normally.
        unsafe {
            let parked = &mut *block.parked.get();
            if !parked.present {
                self.save_segment(tp, parked);
            }
            block.generation.store(image::NONE, Ordering::Relaxed);
            self.release_dtv(tp);
            std::ptr::write_bytes(lowest as *mut u8, 0, tp - lowest);
        }
    }

    /// [`image::learn`] from a block whose TLS was just allocated.
    ///
    /// # Safety
    /// `tp` is the thread pointer of a block of the caller's, whose TLS was allocated in this `generation`.
    unsafe fn learn(&self, table: &symbols::ModuleTable, generation: usize, tp: usize) -> usize {
        let (lowest, _) = self.extent(tp);
        let rseq = self.symbols.rseq.map_or(0..0, |rseq| {
            rseq.offset..rseq.offset + rseq.registered_size() as isize
        });
        let kept = [self.offsets.segment.clone(), rseq];
        // SAFETY: passed on; `_dl_allocate_tls` has written the DTV's address.
        unsafe {
            let dtv = ((tp + self.symbols.dtv) as *const usize).read();
            image::learn(table, generation, tp, dtv, lowest, kept)
        }
    }

    /// Where a descriptor has the words that go on with libc's segment.
    fn parked_words(&self) -> [Option<usize>; 3] {
        let offsets = &self.offsets;
        [offsets.getrandom, offsets.strsignal, offsets.strerror]
    }

    /// # Safety
    /// `tp` is the thread pointer of an idle block of the caller's, whose last thread has ended normally.
    unsafe fn save_segment(&self, tp: usize, parked: &mut Parked) {
        let segment = &self.offsets.segment;
        let size = (segment.end - segment.start) as usize;
        // SAFETY: the segment lies in the block, and calibration checked its size.
        unsafe {
            std::ptr::copy_nonoverlapping(
                (tp as isize + segment.start) as *const u8,
                parked.segment.as_mut_ptr(),
                size,
            );
            parked.words = self
                .parked_words()
                .map(|at| at.map_or(0, |at| ((tp + at) as *const usize).read()));
        }
        parked.present = true;
    }

    /// Saves, or leaves to be freed, what hangs off a block before its memory goes away: the heap cache stays
    /// with the record for the next block that it describes.
    ///
    /// # Safety
    /// The block is idle and the caller its only owner, as for [`Runtime::enlist`]; afterwards its
    /// memory must not be used any more.
    pub(crate) unsafe fn retire(&self, block: &Block) {
        let tp = block.thread_pointer();
        // SAFETY: the caller owns the idle block. Application signals are blocked around the
        // list's lock, 33 is not (rule 3).
        unsafe {
            if block.died() {
                let old = sys::set_signal_mask(sys::APPLICATION);
                self.bury(block);
                sys::set_signal_mask(old);
            }
            if block.state() == BlockState::Fresh {
                return;
            }
            self.leave_dtv(tp);
            if block.state() == BlockState::Ended {
                let parked = &mut *block.parked.get();
                if !parked.present {
                    self.save_segment(tp, parked);
                }
                for index in 1..KEY_BLOCKS {
                    let table = (tp + self.symbols.specific + index * 8) as *const *mut KeyValues;
                    leave_key_table(table.read());
                }
            }
        }
        block.set_state(BlockState::Fresh);
    }
}

/// Frees a DTV that has lost its block.
///
/// # Safety
/// `first` is the first entry of a DTV of the dynamic linker's that no block has any more.
unsafe fn free_dtv(first: NonNull<Left>) {
    let Some(runtime) = Runtime::existing() else {
        return;
    };
    // Nothing else of a block is looked at.
    let mut header = [0_usize; 8];
    if let Some(dtv) = header.get_mut(runtime.symbols.dtv / size_of::<usize>()) {
        *dtv = first.as_ptr() as usize;
        // SAFETY: the DTV of a block that is gone; false: the block itself is not to be freed.
        unsafe { (runtime.symbols.deallocate_tls)(header.as_mut_ptr().cast(), false) };
    }
}

/// As free(3), but it is [`free_left`](crate::stack::fallible::free_left) that calls it.
///
/// # Safety
/// Null, or a second-level key table that is the caller's: memory of malloc's, aligned and larger than a [`Left`].
unsafe fn leave_key_table(table: *mut KeyValues) {
    /// # Safety
    /// Memory of malloc's that is the caller's.
    unsafe fn free(left: NonNull<Left>) {
        // SAFETY: malloc's.
        unsafe { libc::free(left.as_ptr().cast()) };
    }
    const { assert!(size_of::<Left>() <= size_of::<KeyValues>()) };
    if let Some(left) = NonNull::new(table.cast()) {
        // SAFETY: by the caller's promise.
        unsafe { Left::place(left, free) };
    }
}

impl Enlisted<'_> {
    /// DTV and static TLS images of every module, then libc's own segment as the last thread on
    /// this block left it. False: out of memory (`_dl_allocate_tls` gave null).
    pub(crate) fn allocate_tls(&self) -> bool {
        let (runtime, block) = (self.runtime, self.block);
        let table = runtime.symbols.modules.as_ref();
        // Asked for after the list's lock was held: see `image`.
        let now = table.and_then(symbols::ModuleTable::generation);
        let now = now.unwrap_or(image::NONE);
        if self.otherwise.get() == BlockState::Ended {
            if now != image::NONE && block.generation.load(Ordering::Relaxed) == now {
                return true;
            }
            // SAFETY: the block is enlisted, so this holder is its only owner. Libraries that a dlopen
            // initialises in it meanwhile are in the table by then, and `_dl_allocate_tls` does it again.
            unsafe { runtime.release_tls(block) };
        }
        let tp = block.thread_pointer();
        // SAFETY: as above; the segment's place and size were found by calibration, and static TLS
        // offsets never change.
        unsafe {
            if (runtime.symbols.allocate_tls)(tp as *mut libc::c_void).is_null() {
                return false;
            }
            if let Some(table) = table.filter(|_| now != image::NONE) {
                let generation = runtime.learn(table, now, tp);
                block.generation.store(generation, Ordering::Relaxed);
            }
            let parked = &mut *block.parked.get();
            if parked.present {
                let segment = &runtime.offsets.segment;
                std::ptr::copy_nonoverlapping(
                    parked.segment.as_ptr(),
                    (tp as isize + segment.start) as *mut u8,
                    (segment.end - segment.start) as usize,
                );
                parked.present = false;
            }
        }
        self.otherwise.set(BlockState::Ended);
        true
    }

    /// The thread exists: it will take itself off the list.
    pub(crate) fn commit(self) {
        std::mem::forget(self);
    }
}

impl Drop for Enlisted<'_> {
    fn drop(&mut self) {
        self.runtime.count_down(self.block);
        self.block.set_state(self.otherwise.get());
        // SAFETY: enlisted, and no thread was made of it; signals are as the type's contract says.
        unsafe {
            self.runtime
                .unlist(self.block.thread_pointer(), &self.block.listed);
        }
    }
}
