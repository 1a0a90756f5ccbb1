//! What the owner of an idle block does with it: preparing it, listing it, handing its heap cache on, retiring it.

use super::block::{Block, BlockState, Parked};
use super::calibrate::{JoinMark, SCHEDULING_KNOWN};
use super::runtime::Runtime;
use super::symbols::{KEY_BLOCKS, KeyValues};
use crate::sys;
use std::cell::Cell;
use std::sync::atomic::Ordering;

/// In `flags` (ATTR_FLAG_NOTINHERITSCHED): policy and priority were requested.
const NOT_INHERITED: u32 = 2;

/// A descriptor on glibc's list whose thread does not exist yet. Dropping it takes it off again,
/// and out of the count of threads; the new thread's clone makes it permanent.
///
/// Made and dropped with application signals blocked and SIGSETXID unblocked (G3).
pub(crate) struct Enlisted<'a> {
    runtime: &'static Runtime,
    block: &'a Block,
    /// What the block is if no thread comes of this.
    otherwise: Cell<BlockState>,
}

impl Runtime {
    /// Completes the descriptor and puts it on the list with tid 0 (G1: before clone, so that
    /// no set-id broadcast can miss the thread). TLS images follow by [`Enlisted::allocate_tls`],
    /// in this order because a dlopen in between initialises only what it finds listed (G6).
    ///
    /// `stack` is lowest address, length including the guard, and length of the guard.
    ///
    /// # Safety
    /// The block is idle: its last thread's tid word was cleared by the kernel, or it is fresh
    /// (A2), the caller is its only owner, and `stack` describes its stack.
    pub(crate) unsafe fn enlist<'a>(
        &'static self,
        block: &'a Block,
        stack: (usize, usize, usize),
    ) -> Enlisted<'a> {
        // SAFETY: the caller owns the idle block.
        unsafe {
            self.reap(block);
            let otherwise = self.prepare(block, stack);
            self.symbols.nthreads().fetch_add(1, Ordering::AcqRel);
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

    /// Does what the thread that was here left to the owner of its stack: off the list, if the list's lock was taken
    /// at its end, and out of the count, if it died by a bare exit or a filter (G7 and G17).
    ///
    /// # Safety
    /// The caller is the only owner of an idle block. Application signals are blocked, SIGSETXID is not (G3).
    pub(crate) unsafe fn reap(&self, block: &Block) {
        if block.listed.load(Ordering::Acquire) {
            // SAFETY: the block is the caller's, and mapped.
            unsafe {
                self.list
                    .remove(block.thread_pointer() + self.symbols.list, &block.listed);
            }
        }
        // Cannot be the last: the calling thread is in the count, too.
        self.count_down(block);
    }

    /// The state the block has once it is prepared, should nothing come of it.
    ///
    /// # Safety
    /// The block is idle, the caller its only owner, and `stack` describes its stack.
    unsafe fn prepare(&self, block: &Block, stack: (usize, usize, usize)) -> BlockState {
        let tp = block.thread_pointer();
        let state = block.state();
        block.set_state(BlockState::InUse);
        // SAFETY: the caller owns the idle block; every address lies in its static TLS and descriptor.
        unsafe {
            match state {
                BlockState::Fresh => {
                    let parked = &mut *block.parked.get();
                    if parked.present {
                        self.put_words(tp, parked);
                    }
                }
                BlockState::Ended => {
                    self.save_segment(block);
                    self.empty_dtv(tp);
                    self.release_priorities(tp);
                    self.reset(tp);
                    return BlockState::Ended;
                }
                BlockState::InUse => {
                    // An abnormal end: anything in here may dangle, so all of it goes.
                    self.release_dtv(tp);
                    self.release_priorities(tp);
                    self.release_key_tables(tp);
                    let lowest = tp - (self.symbols.tls_size - self.symbols.descriptor_size);
                    std::ptr::write_bytes(lowest as *mut u8, 0, self.symbols.tls_size);
                }
            }
            sys::fill_header(tp);
            self.fill_descriptor(tp, stack);
            BlockState::Fresh
        }
    }

    /// Leaves the DTV of the thread that was here as a new one is, or none.
    ///
    /// # Safety
    /// `tp` is the thread pointer of an idle block whose thread has ended normally, and the caller its only owner.
    unsafe fn empty_dtv(&self, tp: usize) {
        // SAFETY: the caller owns the idle block; the word is null or what _dl_allocate_tls wrote.
        unsafe {
            let dtv = ((tp + self.symbols.dtv) as *const usize).read();
            let refill = self.offsets.refill.as_ref();
            if dtv == 0 || !refill.is_some_and(|refill| refill.empty(dtv)) {
                self.release_dtv(tp);
            }
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

    /// Frees what priority-protect mutexes have allocated for the thread that was here (G32). Left in place it
    /// would raise the priority of the next thread.
    ///
    /// # Safety
    /// `tp` is the thread pointer of an idle block, whose only owner the caller is.
    unsafe fn release_priorities(&self, tp: usize) {
        let tpp = (tp + self.offsets.tpp) as *mut *mut libc::c_void;
        // SAFETY: a word of the caller's idle descriptor: null, or a block of malloc's that only it points to.
        unsafe {
            if !tpp.read().is_null() {
                libc::free(tpp.replace(std::ptr::null_mut()));
            }
        }
    }

    /// Frees the second-level tables of pthread keys (G18); the first table is part of the descriptor.
    ///
    /// # Safety
    /// `tp` is the thread pointer of an idle block, whose only owner the caller is.
    unsafe fn release_key_tables(&self, tp: usize) {
        let tables = (tp + self.symbols.specific) as *mut *mut KeyValues;
        for index in 1..KEY_BLOCKS {
            // SAFETY: words of the caller's idle descriptor: null, or blocks of malloc's that only they point to.
            unsafe { libc::free(tables.add(index).replace(std::ptr::null_mut()).cast()) };
        }
    }

    /// Leaves the DTV of the thread that was here allocated, in a forked child: the thread can have stopped between
    /// two steps of changing it.
    ///
    /// # Safety
    /// `tp` is the thread pointer of an idle block, whose only owner the caller is.
    pub(crate) unsafe fn abandon_dtv(&self, block: &Block) {
        let dtv = (block.thread_pointer() + self.symbols.dtv) as *mut usize;
        // SAFETY: the caller owns the idle block. Without a DTV nothing is written, so that the kernel copies no page
        // for it.
        unsafe {
            if dtv.read() != 0 {
                dtv.write(0);
            }
        }
    }

    /// Back to a fresh descriptor after a normal end: known fields are reset, buffers and tables that hang off it
    /// stay and are used again (G5 among them).
    ///
    /// # Safety
    /// `tp` is the thread pointer of an idle block, whose only owner the caller is.
    unsafe fn reset(&self, tp: usize) {
        let (symbols, offsets) = (&self.symbols, &self.offsets);
        // SAFETY: offsets lie in the descriptor, which the caller owns.
        unsafe {
            ((tp + symbols.report_events) as *mut u8).write(0);
            ((tp + symbols.nextevent) as *mut usize).write(0);
            std::ptr::write_bytes((tp + symbols.eventbuf.0) as *mut u8, 0, symbols.eventbuf.1);
            ((tp + offsets.result) as *mut usize).write(0);
            // Without the flag for them, policy and priority are read from the kernel.
            let flags = (tp + offsets.flags) as *mut u32;
            flags.write(flags.read() & !(SCHEDULING_KNOWN | NOT_INHERITED));
            ((tp + symbols.cancelhandling) as *mut u32).write(0);
            if let Some(exiting) = offsets.exiting {
                ((tp + exiting.flag) as *mut u8).write(0);
                ((tp + exiting.lock) as *mut u32).write(0);
            }
        }
    }

    /// The non-zero fields of a descriptor at the moment of clone. Those that only the
    /// thread itself looks at are left to [`Runtime::enter`].
    ///
    /// # Safety
    /// `tp` is the thread pointer of an idle block, whose only owner the caller is, and the range is that of the stack
    /// below it.
    unsafe fn fill_descriptor(&self, tp: usize, (base, length, guard): (usize, usize, usize)) {
        let (symbols, offsets) = (&self.symbols, &self.offsets);
        let write = |at: usize, value: usize| {
            // SAFETY: every `at` is a word of the descriptor, which the caller owns.
            unsafe { ((tp + at) as *mut usize).write(value) }
        };
        write(symbols.specific, tp + offsets.first_key_block);
        // SAFETY: by the caller's promise the descriptor is its own.
        unsafe { self.describe_stack(tp, (base, length, guard)) };
        match offsets.join_mark {
            JoinMark::Itself => write(offsets.join, tp),
            // SAFETY: a field of the descriptor of four bytes at least, and the caller owns it.
            JoinMark::State(detached) => unsafe {
                ((tp + offsets.join) as *mut u32).write(detached);
            },
        }
        // SAFETY: a byte and the tid word of the descriptor, which the caller owns and no thread uses yet.
        unsafe {
            let (at, value) = offsets.user_stack;
            ((tp + at) as *mut u8).write(value);
            ((tp + symbols.tid) as *mut u32).write(0);
        }
    }

    /// What pthread_getattr_np(3) says of a stack.
    ///
    /// # Safety
    /// `tp` is the thread pointer of an idle block, whose only owner the caller is.
    unsafe fn describe_stack(&self, tp: usize, (base, length, guard): (usize, usize, usize)) {
        let offsets = &self.offsets;
        for (at, value) in [
            (offsets.stackblock, base),
            (offsets.stackblock_size, length),
            (offsets.guardsize, guard),
            (offsets.reported_guardsize, guard),
        ] {
            // SAFETY: words of the descriptor, which the caller owns.
            unsafe { ((tp + at) as *mut usize).write(value) };
        }
    }

    /// Describes the thread's stack, and policy and priority if it does not inherit them, as C code has requested them.
    ///
    /// # Safety
    /// The block is enlisted, and the caller its only owner.
    #[cfg(feature = "interpose")]
    pub(crate) unsafe fn describe(
        &self,
        block: &Block,
        stack: (usize, usize, usize),
        scheduling: Option<(libc::c_int, libc::c_int)>,
    ) {
        let (tp, symbols) = (block.thread_pointer(), &self.symbols);
        // SAFETY: fields of the descriptor, which the caller owns and no thread uses yet.
        unsafe {
            self.describe_stack(tp, stack);
            if let Some((policy, priority)) = scheduling {
                ((tp + symbols.schedpolicy) as *mut libc::c_int).write(policy);
                ((tp + symbols.sched_priority) as *mut libc::c_int).write(priority);
                let flags = (tp + self.offsets.flags) as *mut u32;
                flags.write(flags.read() | SCHEDULING_KNOWN | NOT_INHERITED);
            }
        }
    }

    /// What the thread returned, or gave to pthread_exit(3).
    ///
    /// # Safety
    /// The block is mapped, and its thread has ended.
    #[cfg(feature = "interpose")]
    pub(crate) unsafe fn result(&self, block: &Block) -> *mut libc::c_void {
        // SAFETY: a word of a descriptor that is mapped.
        unsafe {
            ((block.thread_pointer() + self.offsets.result) as *const *mut libc::c_void).read()
        }
    }

    /// Where the stack of a thread ends, of glibc's or ours; `None` for the main thread, which glibc has made no stack for.
    ///
    /// # Safety
    /// `tp` is the thread pointer of a mapped block.
    #[cfg(feature = "interpose")]
    pub(crate) unsafe fn stack_top(&self, tp: usize) -> Option<usize> {
        let offsets = &self.offsets;
        // SAFETY: words of a mapped descriptor, which do not change while its thread lives.
        let (base, length) = unsafe {
            let read = |at: usize| ((tp + at) as *const usize).read();
            (read(offsets.stackblock), read(offsets.stackblock_size))
        };
        (base != 0).then(|| base.wrapping_add(length))
    }

    /// Where a descriptor has the words that go on with libc's segment.
    fn parked_words(&self) -> [Option<usize>; 3] {
        let offsets = &self.offsets;
        [offsets.getrandom, offsets.strsignal, offsets.strerror]
    }

    /// Writes libc's segment as an ended thread has left it.
    ///
    /// # Safety
    /// `tp` is the thread pointer of a block that the caller owns, and nothing is lost with what is in it.
    unsafe fn put_segment(&self, tp: usize, parked: &Parked) {
        let segment = &self.symbols.segment;
        // SAFETY: the segment's place and size were found by calibration, and static TLS offsets never change.
        unsafe {
            std::ptr::copy_nonoverlapping(
                parked.segment.as_ptr(),
                (tp as isize + segment.start) as *mut u8,
                (segment.end - segment.start) as usize,
            );
        }
    }

    /// Writes the words of the descriptor that go with the segment.
    ///
    /// # Safety
    /// `tp` is the thread pointer of a block that the caller owns.
    unsafe fn put_words(&self, tp: usize, parked: &Parked) {
        for (at, word) in self.parked_words().into_iter().zip(parked.words) {
            if let Some(at) = at {
                // SAFETY: a word of the caller's descriptor.
                unsafe { ((tp + at) as *mut usize).write(word) };
            }
        }
    }

    /// Both.
    ///
    /// # Safety
    /// `tp` is the thread pointer of a block that the caller owns, and nothing is lost with what is in it.
    pub(super) unsafe fn put_parked(&self, tp: usize, parked: &Parked) {
        // SAFETY: by the caller's promise the block is its own, and what is in it may be overwritten.
        unsafe {
            self.put_words(tp, parked);
            self.put_segment(tp, parked);
        }
    }

    /// Saves what goes on to the next thread, unless it is saved already: a spawn that was refused between
    /// [`Runtime::prepare`] and [`Enlisted::allocate_tls`] has left it so.
    ///
    /// # Safety
    /// The block is idle and the caller's, and its last thread has ended normally.
    unsafe fn save_segment(&self, block: &Block) {
        let tp = block.thread_pointer();
        let segment = &self.symbols.segment;
        let size = (segment.end - segment.start) as usize;
        // SAFETY: the segment lies in the block, and calibration checked its size; the owner of the block is the only
        // one to reach what is parked.
        unsafe {
            let parked = &mut *block.parked.get();
            if parked.present {
                return;
            }
            std::ptr::copy_nonoverlapping(
                (tp as isize + segment.start) as *const u8,
                parked.segment.as_mut_ptr(),
                size,
            );
            parked.words = self
                .parked_words()
                .map(|at| at.map_or(0, |at| ((tp + at) as *const usize).read()));
            parked.present = true;
        }
    }

    /// Saves or frees what hangs off a block before its memory goes away: the heap cache stays with the record for
    /// the next block that it describes.
    ///
    /// # Safety
    /// The block is idle and the caller its only owner; afterwards its memory must not be used any more.
    pub(crate) unsafe fn retire(&self, block: &Block) {
        let tp = block.thread_pointer();
        // SAFETY: the caller owns the idle block. Application signals are blocked around the
        // list's lock, SIGSETXID is not (G3).
        unsafe {
            if block.is_known_to_glibc() {
                let old = sys::set_signal_mask(sys::APPLICATION);
                self.reap(block);
                sys::set_signal_mask(old);
            }
            match block.state() {
                BlockState::Fresh => return,
                BlockState::Ended => self.save_segment(block),
                BlockState::InUse => {}
            }
            // A child that is forked from here on must not believe what is being freed.
            block.set_state(BlockState::InUse);
            self.release_dtv(tp);
            self.release_priorities(tp);
            self.release_key_tables(tp);
        }
        block.set_state(BlockState::Fresh);
    }
}

impl Enlisted<'_> {
    /// DTV and static TLS images of every module, then libc's own segment as the last thread on
    /// this block left it. Returns `false` if there is no memory (`_dl_allocate_tls` gave null).
    pub(crate) fn allocate_tls(&self) -> bool {
        let (runtime, block) = (self.runtime, self.block);
        let tp = block.thread_pointer();
        // SAFETY: the block is enlisted, so this holder is its only owner; the segment's place and size were found by
        // calibration, and static TLS offsets never change.
        unsafe {
            let has_dtv = ((tp + runtime.symbols.dtv) as *const usize).read() != 0;
            let granted = match &runtime.offsets.refill {
                Some(refill) if has_dtv && refill.has_one_namespace() => refill.refill(tp),
                _ => {
                    runtime.release_dtv(tp);
                    !(runtime.symbols.allocate_tls)(tp as *mut libc::c_void).is_null()
                }
            };
            if !granted {
                return false;
            }
            let parked = &mut *block.parked.get();
            if parked.present {
                runtime.put_segment(tp, parked);
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
        self.block.set_state(self.otherwise.get());
        // SAFETY: enlisted, and no thread was made of it; signals are as the type's contract says.
        unsafe { self.runtime.reap(self.block) };
    }
}
