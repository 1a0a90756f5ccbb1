//! What a debugger finds without debug information or symbols: one static with addresses and offsets, as
//! glibc's own `_thread_db_*` symbols are for libthread_db. `gdb/nptl.py`, embedded in the binary,
//! reads it and adds `nptl-failures` and `nptl-stacks`.

use crate::failures::{FAILURES, Ring};
use crate::stack::cache::StackCache;
use crate::stack::{Ledger, RECORDS, Records, Stack};
use crate::sync::Lock;

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
struct Directory {
    version: usize,
    failures: &'static Lock<Ring>,
    /// Where in it the first entry is, how many there are, and how long each is.
    failure_layout: [usize; 3],
    records: &'static Records,
    /// The ledger of the global cache; every other is a private one's.
    global: &'static Ledger<Stack>,
    offsets: [usize; 9],
}

const VERSION: usize = 3;

/// Found by the name of its section, which a program has even when its symbols are stripped.
#[used]
#[expect(unsafe_code, reason = "a section of no program's but this crate's")]
#[unsafe(link_section = ".nptl.directory")]
static DIRECTORY: Directory = Directory {
    version: VERSION,
    failures: &FAILURES,
    failure_layout: Ring::LAYOUT,
    records: &RECORDS,
    global: StackCache::global_ledger(),
    offsets: Stack::OFFSETS,
};

/// Called on the way of each refusal, so that a linker with `--gc-sections` keeps both statics: in Rust 1.88
/// `#[used]` binds the compiler only.
pub(crate) fn keep() {
    std::hint::black_box((&raw const SCRIPT, &raw const DIRECTORY));
}
