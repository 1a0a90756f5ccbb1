//! One thread's TLS block: what its record keeps of it.

use super::symbols::SEGMENT_MAX;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};

/// What the memory of a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum BlockState {
    /// Zeroes from the kernel.
    Fresh = 0,
    /// In use, or its thread did not end normally: nothing in it may be handed on (G9).
    InUse = 1,
    /// A thread ended normally here: libc's segment (the heap cache) goes on to the next.
    Ended = 2,
}

/// What outlives a block whose memory is unmapped, until the next fresh block takes it: malloc's
/// thread cache and arena, the getrandom state, and the buffers of strsignal and strerror. Dropping these
/// would leak them: `Runtime::release` gives them back.
pub(crate) struct Parked {
    pub(super) segment: [u8; SEGMENT_MAX],
    /// Of the descriptor, where calibration has found them.
    pub(super) words: [usize; 3],
    pub(super) present: bool,
}

/// What the stack record keeps of its block.
pub(crate) struct Block {
    /// The thread pointer; 0 while nothing is mapped.
    pub(super) tp: AtomicUsize,
    pub(super) state: AtomicU8,
    /// On glibc's list. The thread leaves the list as its last act if the list's lock is free. The owner that finds
    /// the flag set after the kernel has cleared the tid word unlinks it before the memory is used for anything
    /// else (G7).
    pub(super) listed: AtomicBool,
    /// In glibc's count of live threads; cleared by the thread itself once it has counted down.
    pub(super) counted: AtomicBool,
    /// Only touched by the owner of the stack, like the block itself.
    pub(super) parked: UnsafeCell<Parked>,
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

    pub(super) fn state(&self) -> BlockState {
        match self.state.load(Ordering::Acquire) {
            0 => BlockState::Fresh,
            2 => BlockState::Ended,
            _ => BlockState::InUse,
        }
    }

    /// Whether no thread runs here whose tid may be used, and the last one ended normally.
    pub(crate) fn has_ended(&self) -> bool {
        self.state() != BlockState::InUse
    }

    /// Whether glibc still lists or counts the thread that was here, after the kernel has cleared its tid word.
    pub(crate) fn is_known_to_glibc(&self) -> bool {
        self.listed.load(Ordering::Acquire) || self.counted.load(Ordering::Acquire)
    }

    /// Whether there is something to take.
    ///
    /// # Safety
    /// The caller is the only owner of a block whose memory is unmapped.
    pub(crate) unsafe fn has_parked(&self) -> bool {
        // SAFETY: the caller is the block's only owner.
        unsafe { (*self.parked.get()).present }
    }

    /// What waits for the next fresh block here: the next thread begins with an empty heap cache.
    ///
    /// # Safety
    /// The caller is the only owner of a block whose memory is unmapped.
    pub(crate) unsafe fn take_parked(&self) -> Option<Parked> {
        // SAFETY: the caller is the block's only owner.
        let parked = unsafe { &mut *self.parked.get() };
        std::mem::replace(&mut parked.present, false).then_some(Parked {
            present: true,
            ..*parked
        })
    }

    /// In a forked child: glibc has emptied its list, and a heap cache saved by the parent's threads refers to
    /// arenas whose counts fork has reset (G16). What hangs off a block whose thread was running stays
    /// allocated, because the thread can have stopped in the middle of changing it.
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
