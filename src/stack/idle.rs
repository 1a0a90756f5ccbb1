//! [`Idle`]: a stack without a thread, in the hands of a spawn.

use super::cache::{self, StackCache};
use super::layout::{self, Layout};
use super::ledger::class::{self, Class};
use super::message::Start;
use super::record::{Life, Stack};
use super::{caps, mapping};
use crate::errno::Errno;
use crate::step::{StackFate, StackOrigin, StackOutcome, Step, StepError};
use crate::sync::forked_bare;
use crate::sys::{self, EntryPoint, Signals};
use crate::tcb::{Enlisted, Runtime};
use std::cell::Cell;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering;

/// Bytes between the initial stack pointer and the top of the stack.
const ABOVE_FIRST_FRAME: usize = 64;

impl Stack {
    /// Maps and guards a stack, which is live in the cache's ledger then.
    fn map(
        cache: &StackCache,
        runtime: &'static Runtime,
        layout: &Layout,
        class: Option<Class>,
    ) -> Result<&'static Stack, RefusedStack> {
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

    /// Taken from the cache, for a thread that is to be started.
    ///
    /// # Safety
    /// The caller is the idle stack's only owner.
    unsafe fn renew(&self, cache: &StackCache, runtime: &Runtime) {
        // What a detached thread has left, ended or dead.
        // SAFETY: the caller is the idle stack's only owner.
        unsafe { self.drop_message() };
        let uses = self.uses.load(Ordering::Relaxed).wrapping_add(1);
        self.uses.store(uses, Ordering::Relaxed);
        if uses.is_multiple_of(caps::EVERY) {
            cache::apply_limits(runtime);
        }
        // The cache's configuration can have changed, and with it the bytes that are accounted for.
        let (before, keep) = (self.keep.load(Ordering::Relaxed), cache.keep_resident());
        self.keep.store(keep, Ordering::Relaxed);
        if before > keep {
            // SAFETY: nothing runs on an idle stack.
            unsafe { self.discard() };
        }
        if cache.is_zeroed() {
            // SAFETY: nothing runs on the stack, and only the caller owns it.
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
}

/// Bytes that are mapped for a stack of so many, without what lies around it.
pub(crate) fn rounded(stack: usize) -> usize {
    let stack = stack.max(layout::SMALLEST);
    class::fit(stack, 0, sys::page_size()).map_or(stack, |fit| fit.usable)
}

/// Bytes around the stack of a thread with the default guard.
pub(crate) fn bytes_around(runtime: &Runtime) -> usize {
    let layout = Layout::new(runtime, layout::SMALLEST, sys::page_size());
    layout.map_or(0, |layout| layout.total() - layout.stack)
}

/// A stack without a thread, owned by a spawn on its way: dropped, it goes back where it came from.
pub(crate) struct Idle {
    stack: &'static Stack,
    cache: StackCache,
    runtime: &'static Runtime,
    from_cache: bool,
    /// It came locked, from an earlier thread that wanted that.
    was_locked: bool,
    /// Memory was locked or prefaulted that must go again if no thread comes of it.
    prepared: Cell<bool>,
}

/// What a spawn requests of its stack.
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
pub(crate) type RefusedStack = (StepError, StackOutcome);

impl Idle {
    /// A cached stack of the size's class, or a fresh one. The cache counts a hit or a miss for the `first` attempt of
    /// a spawn.
    pub(crate) fn obtain(
        cache: &StackCache,
        runtime: &'static Runtime,
        wanted: &Wanted,
        first: bool,
    ) -> Result<Idle, RefusedStack> {
        let fit = class::fit(
            wanted.size.max(layout::SMALLEST),
            wanted.guard,
            sys::page_size(),
        );
        let (size, guard) = fit.map_or((wanted.size, wanted.guard), |fit| (fit.usable, fit.guard));
        let class = fit.map(|fit| fit.class);
        let hit = class.and_then(|class| {
            let (hit, victims) = cache.ledger().take(class, first);
            if !victims.is_empty() {
                cache::unmap_victims(victims, Some(runtime), std::ptr::null());
            }
            hit
        });
        let (stack, from_cache) = match hit {
            Some(stack) => {
                // SAFETY: the ledger hands a stack out once, so this spawn is its only owner.
                unsafe { stack.renew(cache, runtime) };
                (stack, true)
            }
            None => {
                let layout = Layout::new(runtime, size, guard).ok_or((
                    StepError::new(Step::Attributes, Errno::EINVAL, 0),
                    StackOutcome::NONE,
                ))?;
                if class.is_none() && first {
                    cache.ledger().miss();
                }
                if cache.is_enabled() {
                    cache::apply_limits(runtime);
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

    #[cfg(feature = "interpose")]
    pub(super) fn stack(&self) -> &'static Stack {
        self.stack
    }

    #[cfg(feature = "interpose")]
    pub(super) fn runtime(&self) -> &'static Runtime {
        self.runtime
    }

    /// mlock and prefault, as configured.
    #[inline]
    pub(crate) fn prepare(&self, wanted: &Wanted) -> Result<(), StepError> {
        let refused = |bytes| move |errno| StepError::new(Step::PrepareStack, errno, bytes);
        let stack = self.stack;
        let (bottom, size) = (stack.bottom(), stack.size());
        self.prepared.set(wanted.lock || wanted.prefault > 0);
        if wanted.lock {
            // The flag first: even a refused mlock can have locked a part.
            stack.locked.store(true, Ordering::Relaxed);
            // SAFETY: the usable range of an idle stack, above its guard.
            unsafe { mapping::lock(bottom, size) }.map_err(|errno| StepError {
                locks: true,
                ..refused(size)(errno)
            })?;
        } else if stack.locked.swap(false, Ordering::Relaxed) {
            // A stack that an earlier thread had locked: its memory is wanted back.
            // SAFETY: all that `lock` was called for, of a stack that nothing runs on.
            let _ = unsafe { mapping::unlock(bottom, size) };
        }
        let prefault = wanted.prefault.min(size).next_multiple_of(sys::page_size());
        if prefault > 0 {
            // SAFETY: the uppermost bytes of an idle stack, no more than it has, so that no guard is among them.
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
    /// set-id broadcast meets one of three moments, and it repeats until no thread is left to signal
    /// (G1): the creator handles it before the kernel copies the credentials, and the new thread
    /// has the new ones; or it is pending when clone begins, and the kernel then handles it first and
    /// starts clone again; or it comes later, and finds the new thread's tid in its descriptor before
    /// the creator can answer, because clone sets the word before it returns. The handler itself
    /// needs no more of the new thread than the descriptor, which is complete before clone.
    ///
    /// On refusal the message comes back, and the error with it.
    #[inline(always)]
    pub(crate) fn clone_thread<E: EntryPoint>(
        &self,
        start: Start,
        cgroup: Option<BorrowedFd<'_>>,
        _blocked: &Signals,
    ) -> Result<libc::pid_t, StepError> {
        let stack = self.stack;
        // Here, because in a child that a handler has forked since `obtain` no earlier mark of a thread is left standing.
        stack.life.store(Life::Attached as u8, Ordering::Relaxed);
        stack.discarded.store(false, Ordering::Relaxed);
        // There is no handle of the last thread here; but a thread can have died with the lock.
        stack.signal_lock.store(0, Ordering::Relaxed);
        // SAFETY: no thread runs on this stack, so the slot is the creator's; and it is empty (`renew`), so that nothing is
        // to be dropped.
        unsafe { stack.start.get().write(Some(start)) };
        let bottom = stack.bottom();
        let request = sys::clone::CloneRequest {
            stack: bottom,
            // A debugger or valgrind that unwinds the first instruction reads the word at the initial stack pointer,
            // which must not be the guard page above.
            stack_size: stack.size() - ABOVE_FIRST_FRAME,
            thread_pointer: stack.block.thread_pointer(),
            tid: stack.tid.load(Ordering::Relaxed).cast(),
            start: std::ptr::from_ref(stack).cast_mut().cast(),
            cgroup: cgroup.map(|directory| directory.as_raw_fd()),
        };
        // SAFETY: stack and block are idle, owned, enlisted and complete; E::main takes a
        // `&'static Stack` with a message in it.
        let answer = unsafe { sys::clone::thread::<E>(&request) };
        if answer.is_err() {
            stack.discarded.store(true, Ordering::Relaxed);
            // SAFETY: no thread was made; dropping the message here gives the closure back.
            drop(unsafe { (*stack.start.get()).take() });
        }
        answer.map_err(|(errno, call)| {
            let step = match errno {
                // With valid flags only the cgroup has these to give.
                Errno::EACCES
                | Errno::EBADF
                | Errno::EBUSY
                | Errno::ENODEV
                | Errno::ENOENT
                | Errno::EOPNOTSUPP
                    if cgroup.is_some() =>
                {
                    Step::Cgroup
                }
                _ => Step::Clone,
            };
            StepError {
                call,
                cgroup: request.cgroup.unwrap_or(-1),
                ..StepError::new(step, errno, 0)
            }
        })
    }

    /// The thread that was made here has ended, and the kernel has cleared its tid word.
    pub(crate) fn has_ended(&self) -> bool {
        self.stack.has_ended()
    }

    /// Waits for the end of the thread that was made here, and does what a join does: the stack is idle again.
    pub(crate) fn join_thread(&self) {
        self.stack.wait_released(None);
        self.stack.reap();
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
        let victims = match self.from_cache {
            true => ledger.give(self.stack),
            false => ledger.retire(self.stack),
        };
        let round = cache::unmap_victims(victims, Some(self.runtime), self.stack);
        StackFate::of(round.found)
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        self.undo();
    }
}
