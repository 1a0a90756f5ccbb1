//! glibc 2.34 and newer: facts/glibc.md, turned into code rule by rule (facts/glibc-rules.md).
//!
//! ```text
//!   block_size bytes, page-aligned at both ends
//!  ┌──────────────────┬─────────────────────────────┬──────────────────────────┐
//!  │ (alignment)      │ static TLS of every module  │ struct pthread           │ high
//!  └──────────────────┴─────────────────────────────┴──────────────────────────┘
//!                                                   ▲ thread pointer
//! ```

mod block;
mod calibrate;
mod image;
mod list;
mod symbols;

pub(crate) use block::{Block, BlockState, Enlisted};

use super::RuntimeError;
use crate::clone::{self, sys};
use crate::stack::Lock;
use crate::stack::fallible::try_box;
use calibrate::Offsets;
use list::ThreadList;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};
use symbols::Symbols;

/// Rounds of destructors of pthread keys: `PTHREAD_DESTRUCTOR_ITERATIONS`.
const DESTRUCTOR_ROUNDS: usize = 4;

/// Keys in one block of `specific`, and number of such blocks: nptl's two-level table.
const KEYS_PER_BLOCK: usize = 32;
const KEY_BLOCKS: usize = 32;

/// One block of values.
type KeyValues = [symbols::KeyValue; KEYS_PER_BLOCK];

fn is_empty(values: &KeyValues) -> bool {
    values.iter().fold(0, |all, value| all | value.data.addr()) == 0
}

/// A calibrated glibc.
pub(crate) struct Runtime {
    symbols: Symbols,
    offsets: Offsets,
    list: ThreadList,
}

/// Null until the calibration succeeded; the value is leaked, so readers need no lock.
static RUNTIME: AtomicPtr<Runtime> = AtomicPtr::new(std::ptr::null_mut());

/// Serialises calibrations. Taken around fork (see `crate::stack::cache`), so that a child never
/// finds it held by a thread that no longer exists.
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
        // The loader's locks come before ours: this may be a constructor, or a callback of dl_iterate_phdr.
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

    /// Calibrates, again where a check failed: what others do to the thread is guarded against, but called proven
    /// is only what stays so.
    fn verify(symbols: &Symbols) -> Result<&'static Runtime, RuntimeError> {
        const MORE: usize = 2;
        let mut result = calibrate::calibrate(symbols);
        for _ in 0..MORE {
            if !matches!(result, Err(RuntimeError::Unsupported(_))) {
                break;
            }
            result = calibrate::calibrate(symbols);
        }
        let runtime =
            try_box(result?).map_err(|_| RuntimeError::no_memory(size_of::<Runtime>()))?;
        let runtime: &'static Runtime = Box::leak(runtime);
        RUNTIME.store(std::ptr::from_ref(runtime).cast_mut(), Ordering::Release);
        Ok(runtime)
    }

    /// For fork's "prepare" handler: no calibration is under way until [`Runtime::release_calibration`].
    pub(crate) fn hold_calibration() {
        CALIBRATION.hold();
    }

    /// Ends [`Runtime::hold_calibration`], in the parent and in the child.
    pub(crate) fn release_calibration() {
        // SAFETY: called only by fork's later handlers, in the thread (or its copy) that held it.
        drop(unsafe { CALIBRATION.held() });
    }

    /// In a child that no handler prepared: whoever calibrated does not exist here.
    ///
    /// # Safety
    /// The process is a forked child with one thread.
    pub(crate) unsafe fn seize_calibration() {
        // SAFETY: passed on.
        drop(unsafe { CALIBRATION.seize() });
    }

    /// In a forked child. What calibration has found out, and what it has set in motion, holds there as
    /// well: glibc's fork resets neither its single-thread flags nor the set-id handler (2.34 to 2.43).
    pub(crate) fn after_fork() {
        image::forget_after_fork();
    }

    /// In a child that glibc's own fork did not prepare: gives its lists of threads the state that
    /// fork would have, with no thread of the parent's on them, and frees their lock. `threads` is the
    /// number of those that exist, which becomes glibc's count, so that the last one ends the process
    /// by exit(3) (rule 17).
    ///
    /// # Safety
    /// The process is a forked child with one thread, which is not inside a list operation.
    pub(crate) unsafe fn repair_lists(&self, threads: i32) {
        self.symbols.nthreads().store(threads, Ordering::Release);
        // SAFETY: passed on.
        unsafe {
            self.list
                .repair(clone::thread_pointer() + self.symbols.list)
        };
    }

    /// Bytes of a TLS block, a multiple of the page size.
    pub(crate) fn block_size(&self, page: usize) -> usize {
        let slack = self.symbols.tls_align.max(64);
        (self.symbols.tls_size + slack).next_multiple_of(page)
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

    /// A thread's first moments: robust list, rseq (if its creator has it: rule 15), locale, ctype,
    /// resolver, errno: everything in the block that only its own thread looks at.
    ///
    /// # Safety
    /// Called once by a new thread on its own block, before any other code of libc.
    pub(crate) unsafe fn enter(&self, with_rseq: bool) {
        let tp = clone::thread_pointer();
        let robust = tp + self.offsets.robust_head;
        // SAFETY: all addresses lie in this thread's own descriptor, which was prepared with
        // exactly these offsets; the libc functions are called on a complete TLS block. Rule 10
        // gives the order: locale before ctype, then the resolver's pointer, then errno.
        unsafe {
            // An empty list points at itself, `robust_prev` before it as well. The last thread here can
            // have died with a mutex in it.
            (robust as *mut [usize; 3]).write([robust, self.offsets.robust_futex_offset, 0]);
            ((robust - size_of::<usize>()) as *mut usize).write(robust);
            clone::syscall(
                libc::SYS_set_robust_list,
                [robust, calibrate::ROBUST_HEAD_SIZE, 0, 0, 0, 0],
            );
            self.register_rseq(tp, with_rseq);
            libc::uselocale(symbols::LC_GLOBAL_LOCALE);
            (self.symbols.ctype_init)();
            ((tp as isize + self.offsets.resp) as *mut usize).write(tp + self.offsets.resolver);
            *symbols::__h_errno_location() = 0;
            // Cancellation unwinds through Rust frames and aborts the process; a request stays
            // pending instead, unless code in the thread asks for it.
            symbols::pthread_setcancelstate(symbols::PTHREAD_CANCEL_DISABLE, std::ptr::null_mut());
            // Until 2.35 the type is a field of its own, which no offset is known of.
            symbols::pthread_setcanceltype(symbols::PTHREAD_CANCEL_DEFERRED, std::ptr::null_mut());
            *libc::__errno_location() = 0;
        }
    }

    /// Runs `work`, which catches what unwinds, with a place for glibc's forced unwind to look at: without
    /// one `pthread_exit` would follow a null pointer. With it the unwind reaches the `catch_unwind` in
    /// `work`, which has to abort the process and says why.
    ///
    /// # Safety
    /// `top` is the initial stack pointer of the calling thread, one of this crate.
    pub(crate) unsafe fn with_unwind_buffer(&self, top: usize, work: impl FnOnce()) {
        let mut buffer = clone::unwind_buffer(top);
        // SAFETY: glibc keeps a pointer to the buffer between the two calls, and it lives that long.
        unsafe {
            symbols::__pthread_register_cancel(&raw mut buffer);
            work();
            symbols::__pthread_unregister_cancel(&raw mut buffer);
        }
    }

    /// Whether the calling thread has registered rseq: then the threads that it creates do so, too.
    pub(crate) fn has_rseq(&self) -> bool {
        let Some(rseq) = self.symbols.rseq else {
            return false;
        };
        let cpu_id =
            (clone::thread_pointer() as isize + rseq.offset) as usize + symbols::RSEQ_CPU_ID;
        // SAFETY: the calling thread's own rseq area; the kernel writes it, hence volatile.
        unsafe { (cpu_id as *const i32).read_volatile() >= 0 }
    }

    /// Registers this thread's rseq area; where that is not wanted or refused, `sched_getcpu` and
    /// friends learn from -2 that they must ask the kernel.
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
                || clone::syscall(
                    libc::SYS_rseq,
                    [area, rseq.registered_size(), 0, RSEQ_SIGNATURE, 0, 0],
                ) != 0;
            if refused {
                cpu_id.write_volatile(REGISTRATION_FAILED);
            }
        }
    }

    /// Runs thread-local destructors and those of pthread keys, then releases what a dead thread
    /// may leave in libc's own TLS: nothing of it may reach the next thread on this block.
    ///
    /// # Safety
    /// Called by an ending thread of this crate, with application signals still open.
    pub(crate) unsafe fn run_destructors(&self) {
        // SAFETY: exported for exactly this moment of a thread's life; rule 8 asks for the second
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
            self.release_libc_state();
        }
    }

    /// What hangs off libc's own state, and must not reach the next thread on this block.
    ///
    /// # Safety
    /// As [`Runtime::run_destructors`].
    unsafe fn release_libc_state(&self) {
        // SAFETY: the calling thread's own state.
        unsafe {
            // Formats a pending message, then frees it: dlerror's state is in the segment that the
            // next thread inherits.
            if !libc::dlerror().is_null() {
                libc::dlerror();
            }
            // Rule 19: a state that was never opened would close file descriptor 0.
            let resolver = clone::thread_pointer() + self.offsets.resolver;
            let nscount = (resolver + symbols::RES_STATE_NSCOUNT) as *const i32;
            if nscount.read() != 0 {
                (self.symbols.res_nclose)(resolver as *mut libc::c_void);
                // The next thread on this block must not find an "initialised" resolver.
                std::ptr::write_bytes(resolver as *mut u8, 0, self.symbols.resolver_size);
            }
        }
    }

    /// Leaves the block as a new thread is to find it, and what came after
    /// [`Runtime::run_destructors`]: a signal handler of the application, or the
    /// allocator's last free, can still have registered a thread-local or set a key, and the next
    /// thread on this block would find either (rules 8 and 18).
    ///
    /// # Safety
    /// Called by an ending thread of this crate with all application signals blocked.
    pub(crate) unsafe fn clear_leftovers(&self, block: &Block) {
        // SAFETY: as in `run_destructors`; after `reset` nobody uses a thread-local.
        unsafe {
            (self.symbols.call_tls_dtors)();
            self.clear_keys(false);
            self.release_libc_state();
            self.reset(block);
        }
    }

    /// One round over all values of pthread keys: each is cleared (rule 18), and its destructor runs
    /// if `run` says so. True: one ran, so that there may be new values.
    ///
    /// # Safety
    /// Called by a thread of this crate, whose keys are looked at.
    unsafe fn clear_keys(&self, run: bool) -> bool {
        let tp = clone::thread_pointer();
        let used = (tp + self.offsets.specific_used) as *mut bool;
        // SAFETY: a byte of this thread's descriptor, which `pthread_setspecific` sets to 1. Most
        // threads have no value at all, and this is on the path of every thread's end.
        if unsafe { !used.replace(false) } {
            return false;
        }
        let table = (tp + self.symbols.specific) as *const [*mut KeyValues; KEY_BLOCKS];
        let mut ran = false;
        // SAFETY: `specific` is an array of 32 pointers, null or to 32 values each. Destructors can
        // add second-level blocks, so it is read afresh in every round, and no reference into it or
        // them is held across a destructor.
        let blocks = unsafe { table.read() };
        for (block, &values) in blocks.iter().enumerate() {
            // SAFETY: as above.
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
                    // SAFETY: as pthread_key_create promised the destructor's author.
                    unsafe { destructor(data) };
                }
            }
        }
        ran
    }

    /// Takes the thread out of glibc's count of live threads. True: it was the last one, and the
    /// process is due to end with `exit(0)` (rule 17: signals open, still on the list).
    pub(crate) fn count_down(&self, block: &Block) -> bool {
        block.uncount() && self.symbols.nthreads().fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// How many threads glibc counts, this crate's and the main thread among them.
    pub(crate) fn count(&self) -> u64 {
        let threads = self.symbols.nthreads().load(Ordering::Relaxed);
        u64::try_from(threads).unwrap_or(0)
    }

    fn count_up(&self) {
        self.symbols.nthreads().fetch_add(1, Ordering::AcqRel);
    }

    /// Tells glibc's own `pthread_kill` (2.35+) that this thread can no longer be signalled, under
    /// the lock that a sender holds while it uses the tid (rule 13).
    ///
    /// # Safety
    /// Called by an ending thread of this crate with all application signals blocked.
    pub(crate) unsafe fn mark_exiting(&self) {
        let Some(exiting) = self.offsets.exiting else {
            return;
        };
        let tp = clone::thread_pointer();
        // SAFETY: both words lie in this thread's descriptor; glibc reads `exiting` only under
        // `exit_lock`, as it is written here.
        unsafe {
            let lock = &*((tp + exiting.lock) as *const AtomicU32);
            sys::lll_lock(lock);
            ((tp + exiting.flag) as *mut u8).write(1);
            sys::lll_unlock(lock);
        }
    }

    /// Takes the descriptor at `tp` off the list of live threads. After this, glibc neither counts
    /// on the thread nor protects it: only inline assembly may follow (rule 11). `unlisted` is set
    /// while the lock is held, so that the flag and the list never disagree to another holder.
    ///
    /// # Safety
    /// `tp` is on the list. The caller has 33 unblocked (rule 3) and application signals blocked.
    #[inline(always)]
    pub(crate) unsafe fn unlist(&self, tp: usize, listed: &std::sync::atomic::AtomicBool) {
        // SAFETY: passed on.
        unsafe { self.list.remove(tp + self.symbols.list, listed) };
    }
}
