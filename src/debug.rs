//! What a debugger finds without debug information or symbols: one static with addresses and offsets, as
//! glibc's own `_thread_db_*` symbols are for libthread_db. `gdb/nptl.py`, embedded in the binary,
//! reads it and adds `nptl-failures` and `nptl-stacks`.

use crate::failures;
use crate::stack::cache::StackCache;
use crate::stack::{Records, Stack};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The script, as gdb looks for it in a program: kind 4 (Python text), a name, the text, 0.
///
/// rustc embeds what the attribute `debugger_visualizer` names, but only into programs with debug information of
/// their own; a release build has none. So the crate brings its script itself. Where rustc has embedded it as well,
/// gdb runs it twice, and the commands are defined again. Part of the program's image, it stays where all else that
/// is for debuggers is stripped.
#[used]
#[expect(unsafe_code, reason = "gdb reads this section")]
#[unsafe(link_section = ".debug_gdb_scripts")]
static SCRIPT: [u8; HEAD.len() + TEXT.len() + 1] = {
    let mut script = [0; HEAD.len() + TEXT.len() + 1];
    let (head, rest) = script.split_at_mut(HEAD.len());
    head.copy_from_slice(HEAD);
    rest.split_at_mut(TEXT.len()).0.copy_from_slice(TEXT);
    script
};

const HEAD: &[u8] = b"\x04nptl-commands\n";
const TEXT: &[u8] = include_bytes!("../gdb/nptl.py");

/// Words in the order that `gdb/nptl.py` knows; a change of the order changes `VERSION`.
#[repr(C)]
pub(crate) struct Directory {
    version: usize,
    failures: AtomicUsize,
    failure_count: AtomicUsize,
    failure_size: AtomicUsize,
    /// The address of the record of a stack that was made last.
    records: Records,
    /// The ledger of the global cache; every other is a private one's.
    global: AtomicUsize,
    offsets: [usize; 9],
}

const VERSION: usize = 2;

/// Kept by the linker because the functions below use it; found by the name of its section, which a program has
/// even when its symbols are stripped.
#[expect(unsafe_code, reason = "a section of no program's but this crate's")]
#[unsafe(link_section = ".nptl.directory")]
static DIRECTORY: Directory = Directory {
    version: VERSION,
    failures: AtomicUsize::new(0),
    failure_count: AtomicUsize::new(0),
    failure_size: AtomicUsize::new(0),
    records: Records::new(),
    global: AtomicUsize::new(0),
    offsets: Stack::OFFSETS,
};

/// The ring of failures has an entry.
pub(crate) fn publish_failures(ring: &failures::Directory) {
    DIRECTORY.failure_size.store(ring.size, Ordering::Relaxed);
    DIRECTORY.failure_count.store(ring.count, Ordering::Relaxed);
    DIRECTORY.failures.store(ring.entries, Ordering::Release);
}

/// All records, the newest first.
pub(crate) fn records() -> impl Iterator<Item = &'static Stack> {
    DIRECTORY.records.iter()
}

/// A record was made.
pub(crate) fn publish_record(stack: &'static Stack) {
    let global = StackCache::global().ledger();
    DIRECTORY
        .global
        .store(std::ptr::from_ref(global).addr(), Ordering::Relaxed);
    DIRECTORY.records.push(stack);
}
