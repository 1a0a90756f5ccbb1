//! What static TLS looks like in a thread that has just begun, so that a block can be used again
//! without `_dl_deallocate_tls` and `_dl_allocate_tls`: a thread that ends puts its own static TLS
//! back into that state, and the next spawn only asks whether the loaded modules are still those that
//! the state was taken of.
//!
//! ```text
//!  spawn on a fresh block    _dl_allocate_tls ──► learn: modules, their bytes, their generation
//!  a thread's end            restore: the bytes, while it is still on glibc's list
//!  spawn on that block       list it, then ask: same generation? ──► nothing to do
//!                                                     no ──► _dl_deallocate_tls, _dl_allocate_tls
//! ```
//!
//! **Why a change cannot be missed.** dlopen enters a module into the table of TLS modules
//! (`dl_tls_dtv_slotinfo_list`, with a new generation number), and after that initialises its static
//! TLS in every thread on the list, under the list's lock. A block that was not yet listed then sees
//! the new number, because it takes that lock before it asks (rule 6). dlclose gives the slot a new
//! number as well. The one change without a new number, a module whose dynamic TLS becomes static when
//! a later one asks for it, is excluded: with any module of dynamic TLS loaded, nothing is learnt. So
//! a thread that has allocated dynamic TLS is always of an older generation, too. (From 2.42 on a module
//! that is given the slot of an unloaded one sets its generation to 0 until it is entered: the number
//! then falls back to one from before the unloaded module, when every other that is loaded was there.)
//!
//! A DTV that stays with its block is what every living thread has across a dlopen: `__tls_get_addr`
//! compares its generation, and brings it up to date.

use super::symbols::{DTV_ENTRY, ModuleTable};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};

/// Bytes of static TLS, libc's own segment not counted, beyond which nothing is learnt.
const BYTES_MAX: usize = 16 * 1024;

/// Modules with TLS beyond which nothing is learnt.
const MODULES_MAX: usize = 24;

const WORD: usize = size_of::<u64>();

/// A generation that no block has: what is not known to be a fresh thread's.
pub(super) const NONE: usize = 0;

/// The image that was learnt last. Readers are ending threads, which must not wait: a sequence lock,
/// whose words are atomic because a reader may meet a writer (and then throws away what it read).
struct Image {
    /// Odd while the image is written.
    sequence: AtomicUsize,
    generation: AtomicUsize,
    ranges: [Span; MODULES_MAX],
    words: [AtomicU64; BYTES_MAX / WORD],
}

/// Words of static TLS, from `offset` bytes relative to the thread pointer; the image holds those of
/// all spans one after the other. No words: the end of the spans.
struct Span {
    offset: AtomicUsize,
    words: AtomicUsize,
}

static IMAGE: Image = Image {
    sequence: AtomicUsize::new(0),
    generation: AtomicUsize::new(NONE),
    ranges: [const {
        Span {
            offset: AtomicUsize::new(0),
            words: AtomicUsize::new(0),
        }
    }; MODULES_MAX],
    words: [const { AtomicU64::new(0) }; BYTES_MAX / WORD],
};

/// The static TLS segments of all modules, as `dl_iterate_phdr` and a new DTV tell.
pub(super) struct Segments {
    found: [(isize, usize); MODULES_MAX],
    count: usize,
}

/// Learns the image from the block at `tp`, fresh from `_dl_allocate_tls`. `generation` is the table's
/// number from before that call. What is left out: `kept` (libc's own segment, which goes from thread
/// to thread) and `rseq` (the kernel's). Returns the generation that the block is of, or [`NONE`].
///
/// # Safety
/// The caller owns the listed block, whose TLS was just allocated, with a DTV.
pub(super) unsafe fn learn(
    table: &ModuleTable,
    generation: usize,
    tp: usize,
    dtv: usize,
    lowest: usize,
    kept: [Range<isize>; 2],
) -> usize {
    if generation == IMAGE.generation.load(Ordering::Relaxed) {
        return generation;
    }
    // SAFETY: passed on.
    let segments = unsafe { segments(tp, dtv, lowest) };
    // `dl_iterate_phdr` shows one link namespace, the table has the modules of all (dlmopen, auditors):
    // what was not seen can be neither restored nor known to be static.
    let Some(segments) = segments.filter(|segments| segments.count == table.modules()) else {
        return NONE;
    };
    // The modules have not changed meanwhile.
    if table.generation() != Some(generation) {
        return NONE;
    }
    // SAFETY: the segments lie in the block.
    if unsafe { IMAGE.write(&segments, generation, tp, &kept) } {
        generation
    } else {
        NONE
    }
}

/// Puts the static TLS of the calling thread, whose block is of `generation`, into the state of a
/// thread that has just begun. False: the image is of other modules by now.
///
/// # Safety
/// Called by an ending thread at `tp` that uses no thread-local from here on.
pub(super) unsafe fn restore(generation: usize, tp: usize) -> bool {
    let sequence = IMAGE.sequence.load(Ordering::Acquire);
    if generation == NONE || !sequence.is_multiple_of(2) || !IMAGE.is_of(generation) {
        return false;
    }
    let mut rest = IMAGE.words.as_slice();
    for range in &IMAGE.ranges {
        let count = range.words.load(Ordering::Relaxed);
        if count == 0 {
            break;
        }
        let to = tp.wrapping_add(range.offset.load(Ordering::Relaxed));
        // A torn pair of offset and count must not send a write anywhere else.
        fence(Ordering::Acquire);
        if IMAGE.sequence.load(Ordering::Relaxed) != sequence {
            return false;
        }
        let Some((words, others)) = rest.split_at_checked(count) else {
            return false;
        };
        rest = others;
        for (index, word) in words.iter().enumerate() {
            // SAFETY: a segment of static TLS of the calling thread. Offsets of modules that are loaded
            // never change, and if this one no longer is, its place is nobody's.
            unsafe {
                (to as *mut u64)
                    .add(index)
                    .write(word.load(Ordering::Relaxed))
            };
        }
    }
    fence(Ordering::Acquire);
    IMAGE.sequence.load(Ordering::Relaxed) == sequence
}

/// In a forked child: whoever wrote the image does not exist here.
pub(super) fn forget_after_fork() {
    IMAGE.generation.store(NONE, Ordering::Relaxed);
    IMAGE.sequence.store(0, Ordering::Release);
}

impl Image {
    fn is_of(&self, generation: usize) -> bool {
        self.generation.load(Ordering::Relaxed) == generation
    }

    /// False: another thread is at it, or it does not fit.
    ///
    /// # Safety
    /// The segments are readable at `tp`.
    unsafe fn write(
        &self,
        segments: &Segments,
        generation: usize,
        tp: usize,
        kept: &[Range<isize>; 2],
    ) -> bool {
        let sequence = self.sequence.load(Ordering::Relaxed);
        let claimed = sequence.is_multiple_of(2)
            && self
                .sequence
                .compare_exchange(sequence, sequence + 1, Ordering::Acquire, Ordering::Relaxed)
                .is_ok();
        if !claimed {
            return false;
        }
        fence(Ordering::Release);
        // SAFETY: passed on.
        let fits = unsafe { self.fill(segments, tp, kept) };
        let generation = if fits { generation } else { NONE };
        self.generation.store(generation, Ordering::Relaxed);
        self.sequence.store(sequence + 2, Ordering::Release);
        fits
    }

    /// # Safety
    /// As [`Image::write`].
    unsafe fn fill(&self, segments: &Segments, tp: usize, kept: &[Range<isize>; 2]) -> bool {
        let mut words = self.words.iter();
        let mut spans = self.ranges.iter();
        let found = segments.found.iter().take(segments.count);
        for &(start, size) in found {
            // Whole words: what a neighbour's share of the first or the last one holds is as fresh.
            let span = start & -(WORD as isize)..(start + size as isize + 7) & -(WORD as isize);
            if kept.contains(&span) {
                continue;
            }
            if kept
                .iter()
                .any(|kept| span.start < kept.end && kept.start < span.end)
            {
                return false;
            }
            let Some(to) = spans.next() else { return false };
            let count = (span.end - span.start) as usize / WORD;
            to.offset.store(span.start as usize, Ordering::Relaxed);
            to.words.store(count, Ordering::Relaxed);
            for index in 0..count {
                let Some(word) = words.next() else {
                    return false;
                };
                let from = tp.wrapping_add_signed(span.start) as *const u64;
                // SAFETY: by the caller's promise; a dlopen may be writing there just now, and then
                // the generation tells.
                word.store(
                    unsafe { from.add(index).read_volatile() },
                    Ordering::Relaxed,
                );
            }
        }
        for rest in spans {
            rest.words.store(0, Ordering::Relaxed);
        }
        true
    }
}

/// The segments of static TLS of all modules, or `None`: a module's TLS is not static in this DTV, or
/// there are too many.
///
/// # Safety
/// As [`learn`].
unsafe fn segments(tp: usize, dtv: usize, lowest: usize) -> Option<Segments> {
    struct Search {
        tp: usize,
        dtv: usize,
        lowest: usize,
        segments: Option<Segments>,
    }
    /// # Safety
    /// Called by dl_iterate_phdr(3) with a `Search` as its data.
    unsafe extern "C" fn visit(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        data: *mut libc::c_void,
    ) -> libc::c_int {
        // SAFETY: dl_iterate_phdr passes a valid description, and `data` is our Search.
        let (info, search) = unsafe { (&*info, &mut *data.cast::<Search>()) };
        if info.dlpi_tls_modid == 0 {
            return 0;
        }
        for index in 0..usize::from(info.dlpi_phnum) {
            // SAFETY: one of `dlpi_phnum` headers.
            let header = unsafe { &*info.dlpi_phdr.add(index) };
            if header.p_type != libc::PT_TLS {
                continue;
            }
            // SAFETY: the word before the DTV's first entry is its length, and an entry is two words:
            // where the segment is, and what is to be freed (checked by `ModuleTable::find`).
            let (length, place, dynamic) = unsafe {
                let entry = (search.dtv + info.dlpi_tls_modid * DTV_ENTRY) as *const usize;
                let length = ((search.dtv - DTV_ENTRY) as *const usize).read();
                if info.dlpi_tls_modid > length {
                    (length, 0, 0)
                } else {
                    (length, entry.read(), entry.add(1).read())
                }
            };
            let size = header.p_memsz as usize;
            let is_static = info.dlpi_tls_modid <= length
                && dynamic == 0
                && place >= search.lowest
                && place.checked_add(size).is_some_and(|end| end <= search.tp);
            let segments = search.segments.as_mut().filter(|_| is_static);
            let slot = segments.and_then(|segments| {
                segments.count += 1;
                segments.found.get_mut(segments.count - 1)
            });
            let Some(slot) = slot else {
                search.segments = None;
                return 1;
            };
            *slot = (place.wrapping_sub(search.tp) as isize, size);
        }
        0
    }
    let mut search = Search {
        tp,
        dtv,
        lowest,
        segments: Some(Segments {
            found: [(0, 0); MODULES_MAX],
            count: 0,
        }),
    };
    // SAFETY: the callback matches, and `search` outlives the call. Nothing in it can wait for a lock
    // that a thread inside dlopen holds.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut search).cast()) };
    search.segments
}
