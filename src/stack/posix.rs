//! Threads that C code creates and knows by their `pthread_t` alone.
//!
//! ```text
//!   descriptor: base and length of the stack ──► its last word: the record's number ──► ROLL ──► the record
//! ```
//! The descriptor is the `pthread_t`, and every descriptor of glibc's has these fields. What the last word of another
//! thread's stack holds is anything: it is a number of ours only if the record of that number has this very
//! `pthread_t`. No lock, nothing that grows with the number of threads, and nothing that a fork could find half changed.

use super::idle::Idle;
use super::record::{ROLL, Stack};
use crate::errno::Errno;
use crate::settings::Owner;
use crate::sys;
use crate::tcb::Runtime;
use libc::pthread_t;
use std::sync::atomic::Ordering;

/// What a record's `joiner` holds beside the thread pointer of the thread that is joining this one:
///
/// ```text
///  NOT_JOINABLE   a thread of Rust code, one that was created detached or is detached now, or one that was joined
///  JOINABLE       a thread of C code that may be joined
/// ```
/// A joiner puts its thread pointer in the place of JOINABLE. It puts JOINABLE back if its time is up or it is cancelled,
/// and NOT_JOINABLE when it has joined.
const NOT_JOINABLE: usize = 0;
const JOINABLE: usize = 1;

impl Stack {
    /// Where the record's number is in memory: above the first frame, where nothing else is.
    fn number_in(top: usize) -> *mut usize {
        (top - size_of::<usize>()) as *mut usize
    }

    /// The record of a thread, if it is one of this crate, whether C or Rust code has created it.
    ///
    /// # Safety
    /// The thread's descriptor is mapped, as for every other function that takes a `pthread_t`.
    pub(crate) unsafe fn of_thread(thread: pthread_t) -> Option<&'static Stack> {
        // SAFETY: by the caller's promise.
        let top = unsafe { Runtime::existing()?.stack_top(thread as usize) }?;
        // SAFETY: the last word of that thread's stack, which lasts as long as its descriptor. A stack of the user's need
        // not be aligned.
        let number = unsafe { Stack::number_in(top).read_unaligned() };
        // A record that has lost its mapping keeps the address, which can be another thread's by now.
        ROLL.get(number)
            .filter(|stack| stack.pthread() == thread && stack.tid_word().is_some())
    }

    /// Whether C code can join the thread, or is about to.
    pub(crate) fn is_joinable(&self) -> bool {
        self.joiner.load(Ordering::Acquire) != NOT_JOINABLE
    }

    /// Makes the calling thread the one that joins this.
    ///
    /// # Errors
    /// Those of pthread_join(3). Of two threads that join each other at least one is refused.
    pub(crate) fn claim_join(&self) -> Result<(), Errno> {
        let own = sys::thread_pointer();
        if !self.is_joinable() {
            return Err(self.lost());
        }
        if self.is_current() {
            return Err(Errno::EDEADLK);
        }
        let claimed =
            self.joiner
                .compare_exchange(JOINABLE, own, Ordering::SeqCst, Ordering::Acquire);
        match claimed {
            // Joined or detached in this moment.
            Err(NOT_JOINABLE) => Err(self.lost()),
            Err(_) => Err(Errno::EINVAL),
            Ok(_) if is_joined_by(self.block.thread_pointer()) => {
                self.release_join();
                Err(Errno::EDEADLK)
            }
            Ok(_) => Ok(()),
        }
    }

    /// What is wrong with the id of a thread that cannot be joined: it is detached, or no thread any more.
    fn lost(&self) -> Errno {
        match self.has_ended() {
            true => Errno::ESRCH,
            false => Errno::EINVAL,
        }
    }

    /// Gives up what [`Stack::claim_join`] has claimed.
    pub(crate) fn release_join(&self) {
        self.joiner.store(JOINABLE, Ordering::Release);
    }

    /// Waits until the kernel has cleared the tid word; a cancellation point, which gives up the claim. `clock` is that of
    /// `deadline`.
    ///
    /// # Errors
    /// ETIMEDOUT, and EINVAL for a time that is none.
    ///
    /// # Safety
    /// The caller has claimed the thread, and no frame with destructors lies between its caller and this.
    pub(crate) unsafe fn wait_to_join(
        &self,
        clock: libc::clockid_t,
        deadline: *const libc::timespec,
    ) -> Result<(), Errno> {
        if self.has_ended() {
            return Ok(());
        }
        let Some(word) = self.tid_word() else {
            return Ok(());
        };
        // The plain operation where it suffices: the filters of VMMs allow it (docs/seccomp.md). The kernel's wake of a
        // tid word is a shared one.
        let operation = match (deadline.is_null(), clock) {
            (true, _) => libc::FUTEX_WAIT,
            (false, libc::CLOCK_REALTIME) => libc::FUTEX_WAIT_BITSET | libc::FUTEX_CLOCK_REALTIME,
            (false, _) => libc::FUTEX_WAIT_BITSET,
        };
        loop {
            let tid = word.load(Ordering::Acquire);
            if tid == 0 {
                return Ok(());
            }
            // SAFETY: word and claim are those of a stack that stays until the claim is used up; the deadline is the
            // caller's.
            let answer = unsafe {
                let claim = &raw const self.joiner;
                sys::futex_cancellable(word, operation, tid, deadline, claim, JOINABLE)
            };
            match Errno::checked(answer) {
                // The kernel knows no time before 1970.
                Err(Errno::EINVAL) if is_before_1970(deadline) => return Err(Errno::ETIMEDOUT),
                Err(errno @ (Errno::ETIMEDOUT | Errno::EINVAL)) => return Err(errno),
                _ => {}
            }
        }
    }

    /// The thread has ended, and the calling thread has claimed it: its result, and it cannot be joined any more.
    pub(crate) fn take_result(&self) -> *mut libc::c_void {
        let result = Runtime::existing().map_or(std::ptr::null_mut(), |runtime| {
            // SAFETY: the block of a thread that is not joined yet is mapped, and nothing runs on it.
            unsafe { runtime.result(&self.block) }
        });
        self.joiner.store(NOT_JOINABLE, Ordering::Release);
        result
    }

    /// Makes the thread one that cannot be joined. Returns `true` if the stack is now the caller's to
    /// [leave](Stack::leave_handle), `false` if another thread is joining it, which glibc takes for done.
    ///
    /// # Errors
    /// EINVAL if it is detached, ESRCH if it is no thread any more.
    pub(crate) fn claim_detach(&self) -> Result<bool, Errno> {
        let claimed = self.joiner.compare_exchange(
            JOINABLE,
            NOT_JOINABLE,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        match claimed {
            Ok(_) => Ok(true),
            Err(NOT_JOINABLE) => Err(self.lost()),
            Err(_) => Ok(false),
        }
    }

    /// In a forked child, of a thread that does not exist there: takes its id out of use. Returns `true` if it was that of
    /// a thread that could be joined: then there is no other handle.
    pub(super) fn forget_id(&self) -> bool {
        self.joiner.swap(NOT_JOINABLE, Ordering::Relaxed) != NOT_JOINABLE
    }

    /// In a forked child, of the thread that forked: the thread that was joining it does not exist.
    pub(super) fn forget_joiner(&self) {
        if self.is_joinable() {
            self.release_join();
        }
    }
}

/// Whether `thread` is waiting for the calling thread.
pub(crate) fn is_joined_by(thread: usize) -> bool {
    // SAFETY: the calling thread's own id.
    let own = unsafe { Stack::of_thread(libc::pthread_self()) };
    own.is_some_and(|own| own.joiner.load(Ordering::SeqCst) == thread)
}

fn is_before_1970(time: *const libc::timespec) -> bool {
    // SAFETY: null, or the deadline that the caller of pthread_timedjoin_np(3) vouches for.
    unsafe { time.as_ref() }.is_some_and(|time| time.tv_sec < 0)
}

impl Idle {
    /// Makes the stack, which is enlisted, known by its `pthread_t`, and describes it to glibc as it was requested. Before
    /// clone, because the thread can use its id at once, and pass it to others.
    pub(crate) fn hand_to(&self, owner: &Owner) {
        let (stack, runtime) = (self.stack(), self.runtime());
        let joiner = if owner.joinable {
            JOINABLE
        } else {
            NOT_JOINABLE
        };
        stack.joiner.store(joiner, Ordering::Release);
        // As glibc rounds a size: down, and no more than static TLS needs.
        let length = (owner.size & !(runtime.alignment() - 1)) + owner.guard;
        // SAFETY: an Idle is the only owner of its stack and block. The place for the id is the program's, which waits for
        // it in pthread_create.
        unsafe {
            runtime.describe(
                &stack.block,
                (stack.top() - length, length, owner.guard),
                owner.scheduling,
            );
            Stack::number_in(stack.top()).write(stack.number.load(Ordering::Relaxed));
            (owner.id as *mut pthread_t).write(stack.pthread());
        }
    }
}
