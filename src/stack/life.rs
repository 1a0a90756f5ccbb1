//! How a thread and its handle part with the stack: who waits for whom, who reaps, who gives it back.

use super::ledger::Entry;
use super::record::{Life, Stack};
use crate::errno::Errno;
use crate::mem::Shared;
use crate::sync::{Latch, forked_bare, notice_fork};
use crate::sys;
use crate::tcb::{BlockState, Runtime};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

impl Stack {
    /// Like [`Stack::is_released`], but for a handle. In a forked child the kernel never clears the word of a thread that
    /// does not exist there; the repair does.
    pub(crate) fn has_ended(&self) -> bool {
        notice_fork();
        self.is_released()
    }

    /// Waits until the kernel has cleared the tid word, for at most `timeout`. Returns `true` if it has.
    ///
    /// Plain FUTEX_WAIT: the kernel's wake of a cleared tid word is a shared one and wakes one
    /// waiter, which is all there can be, because joining consumes the only handle (G14).
    pub(crate) fn wait_released(&self, timeout: Option<Duration>) -> bool {
        notice_fork();
        let Some(word) = self.tid_word() else {
            return true;
        };
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        loop {
            let tid = word.load(Ordering::Acquire);
            if tid == 0 {
                return true;
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return false;
            }
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

    /// Whether the calling thread runs on this stack. Shown by the thread pointer: while there is a handle no other thread has
    /// it, and a forked child's thread keeps it.
    pub(crate) fn is_current(&self) -> bool {
        self.block.thread_pointer() == sys::thread_pointer()
    }

    /// Calls `f` while the thread cannot end in the normal way, or says ESRCH if it has. Signals are
    /// blocked meanwhile: a handler that came here would wait for the thread that it interrupted.
    pub(crate) fn with_tid<T>(&self, f: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
        let old = sys::set_signal_mask(sys::APPLICATION);
        // Behind the mask: no handler can fork between this and the lock.
        notice_fork();
        sys::lll_lock(&self.signal_lock);
        let result = if self.block.has_ended() || self.is_released() {
            Err(Errno::ESRCH)
        } else {
            f()
        };
        sys::lll_unlock(&self.signal_lock);
        sys::set_signal_mask(old);
        result
    }

    /// The thread ends normally: from here on no sender uses the tid ([`Stack::with_tid`]), and its heap cache, which it
    /// does not use any more, goes on to the next thread here (G9).
    pub(crate) fn mark_ended(&self) {
        sys::lll_lock(&self.signal_lock);
        self.block.set_state(BlockState::Ended);
        sys::lll_unlock(&self.signal_lock);
    }

    /// Changes `from` to `to`. Returns `true` if it was `from`.
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

    /// Claims the stack of a detached thread (of this scope, if one is named) that died without giving it back. Returns
    /// `true` once. Only a mark seen *before* the tid word says so: a word that was clear before a clone, beside the
    /// mark that a handle dropped after it has left, is a running thread.
    pub(crate) fn claim_unowned(&self, scope: Option<&Shared<Latch>>) -> bool {
        let was_in = |scope: &Shared<Latch>| {
            // SAFETY: the thread is gone, and has no handle; the one that claims the stack does so under the ledger's
            // lock, as this is called.
            let message = unsafe { (*self.start.get()).as_ref() };
            let entered = message.and_then(|start| start.latch.as_ref());
            entered.is_some_and(|entered| entered.is_of(scope))
        };
        self.is_in(Life::Detached)
            && self.is_released()
            && scope.is_none_or(was_in)
            && self.change_life(Life::Detached, Life::Ending)
    }

    /// In a forked child: whether a handle exists that gives the stack back. Ends the life of a thread that is not in
    /// this process.
    pub(super) fn has_handle(&self) -> bool {
        #[cfg(feature = "interpose")]
        if self.forget_id() {
            self.life.store(Life::Given as u8, Ordering::Relaxed);
            return false;
        }
        if self.change_life(Life::Attached, Life::Ending) || self.is_in(Life::Ending) {
            return true;
        }
        self.change_life(Life::Detached, Life::Given);
        false
    }

    pub(super) fn is_in(&self, life: Life) -> bool {
        self.life.load(Ordering::Acquire) == life as u8
    }

    /// The thread comes to its end. Returns `true` if it has no handle: then it gives its stack back itself, and from
    /// then on the stack waits in the ledger until the kernel has cleared the tid word.
    ///
    /// # Safety
    /// Called by the ending thread on its own stack, with application signals blocked: what is in use now, the frames
    /// of `start` and of what it calls, is in the page that is always kept, and no handler comes that would need
    /// more. (SIGSETXID can come until the thread is marked as exiting.)
    pub(crate) unsafe fn end(&self) -> bool {
        if self.change_life(Life::Attached, Life::Ending) {
            return false;
        }
        // SAFETY: by the caller's promise nothing deeper than the page that is always kept is in use, or comes to be.
        unsafe { self.discard() };
        // `Detached` says that this thread will give its stack back. It does: left standing, the word would call the
        // stack unowned in its next life (`StackCache::sweep`).
        self.change_life(Life::Detached, Life::Given);
        true
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

    /// In a forked child: a thread of the parent can have held the lock, and none here does.
    pub(super) fn forget_senders(&self) {
        self.signal_lock.store(0, Ordering::Relaxed);
    }

    /// In a forked child: the thread that ran here does not exist.
    pub(super) fn forget_thread(&self) {
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
