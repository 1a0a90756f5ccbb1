//! [`Runtime`]: a calibrated glibc, and what a thread does first and last.

use super::block::Block;
use super::calibrate::{self, Offsets};
use super::list::ThreadList;
use super::symbols::{self, KEY_BLOCKS, KEYS_PER_BLOCK, KeyValues, Symbols};
use crate::mem::try_box;
use crate::sync::Lock;
use crate::sys;
use crate::tcb::error::RuntimeError;
#[cfg(feature = "interpose")]
use libc::c_void;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use std::time::Duration;

/// Rounds of destructors of pthread keys: `PTHREAD_DESTRUCTOR_ITERATIONS`.
const DESTRUCTOR_ROUNDS: usize = 4;

/// In `cancelhandling`: the thread comes to its end, and cannot be cancelled any more (EXITING_BITMASK).
const EXITING: u32 = 0x10;

/// In `cancelhandling`: a set-id broadcast counts on the thread (SETXID_BITMASK).
const SETXID: u32 = 0x40;

fn is_empty(values: &KeyValues) -> bool {
    values.iter().fold(0, |all, value| all | value.data.addr()) == 0
}

/// A calibrated glibc.
pub(crate) struct Runtime {
    pub(super) symbols: Symbols,
    pub(super) offsets: Offsets,
    pub(super) list: ThreadList,
}

// SAFETY: after calibration everything in here is constant; what the pointers point at is glibc's,
// lives as long as the process, and is touched under glibc's own lock or atomically.
unsafe impl Send for Runtime {}
// SAFETY: a shared reference gives no more than reading constants, and glibc's own locks and atomics.
unsafe impl Sync for Runtime {}

/// Null until the calibration succeeded; the value is leaked, so readers need no lock.
static RUNTIME: AtomicPtr<Runtime> = AtomicPtr::new(std::ptr::null_mut());

/// Serialises calibrations. Reset in a forked child, whose parent can have had a thread that held it.
static CALIBRATION: Lock<()> = Lock::new(());

impl Runtime {
    /// The runtime, calibrating it at the first call.
    pub(crate) fn get() -> Result<&'static Runtime, RuntimeError> {
        match Runtime::existing() {
            Some(runtime) => Ok(runtime),
            None => Runtime::calibrate(),
        }
    }

    /// The runtime, if a calibration has succeeded before.
    pub(crate) fn existing() -> Option<&'static Runtime> {
        // SAFETY: the pointer is null or a leaked, immutable Runtime.
        unsafe { RUNTIME.load(Ordering::Acquire).as_ref() }
    }

    #[cold]
    fn calibrate() -> Result<&'static Runtime, RuntimeError> {
        // What takes a lock of the loader comes before any lock of ours: this thread can have the loader's already, and
        // another that waits for ours can have it, too (G26).
        let symbols = Symbols::get()?;
        symbols.keep_loaded();
        // The calibration thread inherits this mask: no handler of the application ever runs on
        // it, and none can call spawn while this thread holds the calibration's lock.
        let old = sys::set_signal_mask(sys::APPLICATION);
        let result = {
            let _serial = CALIBRATION.lock();
            Runtime::existing().map_or_else(|| Runtime::verify(&symbols), Ok)
        };
        sys::set_signal_mask(old & sys::APPLICATION);
        result
    }

    /// Calibrates. A check that fails is tried again before the libc is called unsupported: another thread may have
    /// written where none is known to.
    fn verify(symbols: &Symbols) -> Result<&'static Runtime, RuntimeError> {
        const MORE: usize = 2;
        let mut result = calibrate::calibrate(symbols);
        for _ in 0..MORE {
            if !matches!(result, Err(RuntimeError::Unsupported(_))) {
                break;
            }
            result = calibrate::calibrate(symbols);
        }
        let (offsets, list) = result?;
        let runtime = Runtime {
            symbols: symbols.clone(),
            offsets,
            list,
        };
        let runtime =
            try_box(runtime).map_err(|_| RuntimeError::no_memory(size_of::<Runtime>()))?;
        let runtime: &'static Runtime = Box::leak(runtime);
        RUNTIME.store(std::ptr::from_ref(runtime).cast_mut(), Ordering::Release);
        Ok(runtime)
    }

    /// In a forked child: the thread that calibrated in the parent does not exist here. What a calibration has found
    /// out holds in the child as well: glibc's fork resets neither its single-thread flags nor the set-id handler
    /// (2.34 to 2.43).
    ///
    /// # Safety
    /// The process is a forked child, and no thread of it is calibrating.
    pub(crate) unsafe fn forget_calibration() {
        // SAFETY: by the caller's promise the lock is held by a thread of the parent, if by any.
        unsafe { CALIBRATION.reset() };
    }

    /// In a forked child, for the thread that forked: what other threads of the parent were about to do with it. One
    /// can have held the lock that `pthread_kill` takes to use this thread's tid; one can have marked it for a set-id
    /// broadcast, whose signal never comes here.
    ///
    /// # Safety
    /// `tp` is that thread's descriptor, and no other thread of the process uses it.
    pub(crate) unsafe fn forget_senders(&self, tp: usize) {
        let word = |offset| {
            // SAFETY: a word of that descriptor that glibc uses atomically.
            unsafe { &*((tp + offset) as *const AtomicU32) }
        };
        if let Some(exiting) = self.offsets.exiting {
            word(exiting.lock).store(0, Ordering::Release);
        }
        word(self.symbols.cancelhandling).fetch_and(!SETXID, Ordering::AcqRel);
    }

    /// Bytes of a TLS block, a multiple of the page size.
    pub(crate) fn block_size(&self, page: usize) -> usize {
        let slack = self.symbols.tls_align.max(64);
        (self.symbols.tls_size + slack).next_multiple_of(page)
    }

    /// What a stack of glibc's own ends at a multiple of, in bytes; a power of two.
    #[cfg(feature = "interpose")]
    pub(crate) fn alignment(&self) -> usize {
        self.symbols.tls_align
    }

    /// The thread pointer of a block that ends at `end`.
    pub(crate) fn thread_pointer_in(&self, end: usize) -> usize {
        self.symbols.thread_pointer_in(end)
    }

    /// The tid word of the descriptor at `tp`: set by clone, cleared by the kernel.
    ///
    /// # Safety
    /// `tp` is the thread pointer of a mapped block; the reference must not outlive the mapping.
    pub(crate) unsafe fn tid_word<'a>(&self, tp: usize) -> &'a AtomicU32 {
        // SAFETY: the caller keeps the block mapped; the kernel and glibc access it atomically.
        unsafe { &*((tp + self.symbols.tid) as *const AtomicU32) }
    }

    /// A thread's first moments: robust list, rseq (if its creator has it: G15), locale, ctype,
    /// resolver: everything in the block that only its own thread looks at, but errno.
    ///
    /// # Safety
    /// Called once by a new thread on its own block, before any other code of libc.
    pub(crate) unsafe fn enter(&self, with_rseq: bool) {
        let tp = sys::thread_pointer();
        let robust = tp + self.offsets.robust_head;
        // SAFETY: all addresses lie in this thread's own descriptor, which was prepared with
        // exactly these offsets; the libc functions are called on a complete TLS block.
        unsafe {
            // An empty list points at itself, `robust_prev` before it as well. The last thread here can
            // have died with a mutex in it.
            (robust as *mut [usize; 3]).write([robust, self.offsets.robust_futex_offset, 0]);
            ((robust - size_of::<usize>()) as *mut usize).write(robust);
            sys::syscall(
                libc::SYS_set_robust_list,
                [robust, calibrate::ROBUST_HEAD_SIZE, 0, 0, 0, 0],
            );
            self.register_rseq(tp, with_rseq);
            self.point_at_own(tp);
            *symbols::__h_errno_location() = 0;
            // Cancellation unwinds through Rust frames and aborts the process; a request stays
            // pending instead, unless code in the thread requests it.
            sys::pthread_setcancelstate(sys::PTHREAD_CANCEL_DISABLE, std::ptr::null_mut());
            // Until 2.35 the type is a field of its own, which no offset is known of.
            sys::pthread_setcanceltype(sys::PTHREAD_CANCEL_DEFERRED, std::ptr::null_mut());
        }
    }

    /// Points locale, ctype tables and resolver of libc's segment at what is this thread's, in the order of G10.
    ///
    /// # Safety
    /// `tp` is the calling thread's own thread pointer, and its block is complete.
    pub(super) unsafe fn point_at_own(&self, tp: usize) {
        // SAFETY: a word of this thread's own segment, and functions that write there.
        unsafe {
            libc::uselocale(symbols::LC_GLOBAL_LOCALE);
            (self.symbols.ctype_init)();
            ((tp as isize + self.symbols.resp) as *mut usize).write(tp + self.offsets.resolver);
        }
    }

    /// Runs `work`, which catches what unwinds, with a place for glibc's forced unwind to look at: without
    /// one `pthread_exit` would follow a null pointer. With it the unwind reaches the `catch_unwind` in
    /// `work`, which has to abort the process and says why.
    ///
    /// # Safety
    /// `top` is the initial stack pointer of the calling thread, one of this crate.
    pub(crate) unsafe fn with_unwind_buffer(&self, top: usize, work: impl FnOnce()) {
        let mut buffer = sys::unwind_buffer(top);
        // SAFETY: glibc keeps a pointer to the buffer between the two calls, and it lives that long.
        unsafe {
            sys::__pthread_register_cancel((&raw mut buffer).cast());
            work();
            sys::__pthread_unregister_cancel((&raw mut buffer).cast());
        }
    }

    /// Runs `start` as glibc's threads run it: what it returns, or pthread_exit(3) is given, becomes the thread's result,
    /// cancellation is enabled, and thread-local and key destructors have run when this returns.
    ///
    /// # Safety
    /// Called by a thread of this crate, once, after [`Runtime::enter`]. `start` takes `argument`. No frame with
    /// destructors lies above the caller's.
    #[cfg(feature = "interpose")]
    pub(crate) unsafe fn run_routine(
        &self,
        start: unsafe extern "C-unwind" fn(*mut c_void) -> *mut c_void,
        argument: *mut c_void,
    ) {
        /// # Safety
        /// Called by an ending thread of this crate.
        unsafe extern "C-unwind" fn finish() {
            if let Some(runtime) = Runtime::existing() {
                // SAFETY: the calling thread comes to its end, with signals open. What is left after the last round is
                // dropped here, or it would have more rounds when this returns.
                unsafe {
                    runtime.run_destructors();
                    runtime.clear_keys(false);
                    runtime.cancelhandling().fetch_or(EXITING, Ordering::AcqRel);
                }
            }
        }
        let routine = sys::Routine {
            start,
            argument,
            result: (sys::thread_pointer() + self.offsets.result) as *mut *mut c_void,
            finish,
        };
        // SAFETY: the routine outlives the call, and its result is a word of this thread's descriptor.
        unsafe { sys::call_routine(&raw const routine) };
    }

    /// The word of the calling thread that glibc changes atomically.
    ///
    /// # Safety
    /// Called by a thread of this crate, which uses the reference itself.
    unsafe fn cancelhandling(&self) -> &AtomicU32 {
        // SAFETY: a word of this thread's descriptor.
        unsafe { &*((sys::thread_pointer() + self.symbols.cancelhandling) as *const AtomicU32) }
    }

    /// Whether the calling thread has registered rseq: then the threads that it creates do so, too.
    pub(crate) fn has_rseq(&self) -> bool {
        let Some(rseq) = self.symbols.rseq else {
            return false;
        };
        let cpu_id = (sys::thread_pointer() as isize + rseq.offset) as usize + symbols::RSEQ_CPU_ID;
        // SAFETY: the calling thread's own rseq area; the kernel writes it, hence volatile.
        unsafe { (cpu_id as *const i32).read_volatile() >= 0 }
    }

    /// Registers this thread's rseq area; where that is not wanted or refused, `sched_getcpu` and
    /// similar functions see from -2 that they must call the kernel.
    ///
    /// # Safety
    /// `tp` is the calling thread's own thread pointer.
    unsafe fn register_rseq(&self, tp: usize, wanted: bool) {
        const RSEQ_SIGNATURE: usize = 0x5305_3053;
        const REGISTRATION_FAILED: i32 = -2;
        let Some(rseq) = self.symbols.rseq else {
            return;
        };
        let area = (tp as isize + rseq.offset) as usize;
        let cpu_id = (area + symbols::RSEQ_CPU_ID) as *mut i32;
        // SAFETY: the area lies in this thread's block, aligned and sized as glibc itself uses it.
        unsafe {
            std::ptr::write_bytes(area as *mut u8, 0, rseq.registered_size());
            cpu_id.write_volatile(symbols::RSEQ_UNINITIALIZED);
            let refused = !wanted
                || sys::syscall(
                    libc::SYS_rseq,
                    [area, rseq.registered_size(), 0, RSEQ_SIGNATURE, 0, 0],
                ) != 0;
            if refused {
                cpu_id.write_volatile(REGISTRATION_FAILED);
            }
        }
    }

    /// Runs thread-local destructors and those of pthread keys.
    ///
    /// # Safety
    /// Called by an ending thread of this crate, with application signals still open.
    pub(crate) unsafe fn run_destructors(&self) {
        // SAFETY: exported for exactly this moment of a thread's life; G8 demands the second
        // call, because key destructors can register new thread-local ones. Those can set keys
        // again, so that the two take turns until there is nothing to run.
        unsafe {
            (self.symbols.call_tls_dtors)();
            for _ in 0..DESTRUCTOR_ROUNDS {
                if !self.clear_keys(true) {
                    break;
                }
                (self.symbols.call_tls_dtors)();
            }
        }
    }

    /// What hangs off libc's own state, and must not reach the next thread on this block.
    ///
    /// # Safety
    /// Called by an ending thread of this crate.
    unsafe fn release_libc_state(&self) {
        // SAFETY: the calling thread's own state.
        unsafe {
            // Formats a pending message, then frees it: dlerror's state is in the segment that the
            // next thread inherits.
            if !libc::dlerror().is_null() {
                libc::dlerror();
            }
            // G19: a state that was never opened would close file descriptor 0.
            let resolver = sys::thread_pointer() + self.offsets.resolver;
            let nscount = (resolver + symbols::RES_STATE_NSCOUNT) as *const i32;
            if nscount.read() != 0 {
                (self.symbols.res_nclose)(resolver as *mut libc::c_void);
                // The next thread on this block must not find an "initialised" resolver.
                std::ptr::write_bytes(resolver as *mut u8, 0, symbols::RESOLVER_SIZE);
            }
        }
    }

    /// Leaves the block as a new thread is to find it: without what hangs off libc's own state, and without what came
    /// after [`Runtime::run_destructors`]. A signal handler of the application, or the allocator's last free (in here,
    /// too), can still have registered a thread-local or set a key (G8 and G18).
    ///
    /// # Safety
    /// Called by an ending thread of this crate with all application signals blocked.
    #[inline(always)]
    pub(crate) unsafe fn clear_leftovers(&self) {
        // SAFETY: exported for a thread's end, which this is; what was registered since is of this thread's own.
        unsafe {
            (self.symbols.call_tls_dtors)();
            self.release_libc_state();
            (self.symbols.call_tls_dtors)();
            self.clear_keys(false);
        }
    }

    /// One round over all values of pthread keys: each is cleared (G18), and its destructor runs
    /// if `run` says so. True: one ran, so that there may be new values.
    ///
    /// # Safety
    /// Called by a thread of this crate, whose keys are looked at.
    unsafe fn clear_keys(&self, run: bool) -> bool {
        let tp = sys::thread_pointer();
        let used = (tp + self.offsets.specific_used) as *mut bool;
        // SAFETY: a byte of this thread's descriptor, which `pthread_setspecific` sets to 1. Most
        // threads have no value at all, and this is on the path of every thread's end.
        if unsafe { !used.replace(false) } {
            return false;
        }
        let table = (tp + self.symbols.specific) as *const *mut KeyValues;
        let mut ran = false;
        for block in 0..KEY_BLOCKS {
            // SAFETY: `specific` is an array of 32 pointers, null or to 32 values each. Destructors can add second-level
            // blocks, so no reference into it or them is held across a destructor. Not copied as a whole: that is a call
            // of memcpy, and AddressSanitizer takes what a forced unwind has left on this stack for its frames.
            let values = unsafe { table.add(block).read() };
            // SAFETY: not null, and so a table of this thread's, which only a destructor changes: none runs here.
            if values.is_null() || unsafe { is_empty(&*values) } {
                continue;
            }
            for index in 0..KEYS_PER_BLOCK {
                // SAFETY: this thread is the only one to touch its values.
                let value = unsafe { &mut (&mut *values)[index] };
                if value.data.is_null() {
                    continue;
                }
                let data = std::mem::replace(&mut value.data, std::ptr::null_mut());
                let sequence = value.sequence;
                // SAFETY: the table has 1024 entries, this one among them. A key deleted and made
                // anew has another sequence number, and its destructor is not meant.
                let key = unsafe { &*self.symbols.keys.add(block * KEYS_PER_BLOCK + index) };
                if run
                    && key.sequence.load(Ordering::Acquire) == sequence
                    && let Some(destructor) = key.destructor()
                {
                    ran = true;
                    // SAFETY: the key is the one that the value was set for, and the destructor takes its values.
                    unsafe { destructor(data) };
                }
            }
        }
        ran
    }

    /// Takes the thread out of glibc's count of live threads. True: it was the last one, and the
    /// process is due to end with `exit(0)` (G17: signals open, still on the list).
    pub(crate) fn count_down(&self, block: &Block) -> bool {
        block.counted.swap(false, Ordering::AcqRel)
            && self.symbols.nthreads().fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// How many threads glibc counts, this crate's and the main thread among them.
    pub(crate) fn count(&self) -> u64 {
        let threads = self.symbols.nthreads().load(Ordering::Relaxed);
        u64::try_from(threads).unwrap_or(0)
    }

    /// Marks this thread for glibc as about to end, as nptl's own threads do.
    ///
    /// - `pthread_kill` (2.35+) no longer uses the tid: it looks at `exiting` under `exit_lock` (G13).
    /// - A set-id broadcast no longer counts on the thread: it leaves out what is EXITING. One that had marked the
    ///   thread before has sent it SIGSETXID, or is about to; the handler clears the mark, and until then this waits.
    ///   Without the bit, a thread that waits for the list's lock is signalled anew in every round (G30).
    ///
    /// # Safety
    /// Called by an ending thread of this crate with application signals blocked and SIGSETXID unblocked (G3).
    pub(crate) unsafe fn mark_exiting(&self) {
        let tp = sys::thread_pointer();
        if let Some(exiting) = self.offsets.exiting {
            // SAFETY: both words lie in this thread's descriptor; glibc reads `exiting` only under
            // `exit_lock`, as it is written here.
            unsafe {
                let lock = &*((tp + exiting.lock) as *const AtomicU32);
                sys::lll_lock(lock);
                ((tp + exiting.flag) as *mut u8).write(1);
                sys::lll_unlock(lock);
            }
        }
        // SAFETY: this very thread.
        let word = unsafe { self.cancelhandling() };
        let mut value = word.fetch_or(EXITING, Ordering::AcqRel) | EXITING;
        while value & SETXID != 0 {
            // The signal interrupts this, or has come before and changed the word. A broadcast that could not signal
            // the thread, because it was not cloned yet, takes the mark away at its end, and wakes a word that no
            // symbol gives the place of: hence the look every millisecond.
            sys::futex_wait(word, value, Some(Duration::from_millis(1)));
            value = word.load(Ordering::Acquire);
        }
    }

    /// Takes the calling thread off the list of live threads, if the list's lock is free; else the owner of its
    /// stack does ([`Runtime::reap`]). glibc may no longer protect the thread after this: only inline assembly may
    /// follow (G11).
    ///
    /// # Safety
    /// Called by an ending thread of this crate on its own listed block, after [`Runtime::mark_exiting`].
    #[inline(always)]
    pub(crate) unsafe fn leave_list(&self, block: &Block) {
        let element = block.thread_pointer() + self.symbols.list;
        // SAFETY: by the caller's promise the descriptor is listed.
        unsafe { self.list.try_remove(element, &block.listed) };
    }
}
