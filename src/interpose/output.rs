//! What is written: nothing without a refusal, a wrong setting or `NPTL_STATS`.

use super::page::{ReportText, write_to};
use super::settings::{Environment, ReportTo};
use crate::error::Refusal;
use crate::failures;
use crate::mem::text::Text;
use crate::proc::file;
use crate::stack::cache::StackCache;
use crate::sys;
use std::fmt::{self, Write};

/// Writes the line and the report of a refusal to where `NPTL_REPORT` says.
pub(super) fn refusal(refusal: &Refusal) {
    let file = match &Environment::get().report {
        ReportTo::Nowhere => return,
        ReportTo::Stderr => None,
        ReportTo::File(path) => Some(path),
    };
    let mut page = ReportText::EMPTY;
    let _ = writeln!(page, "{refusal} {Program}\n{}", refusal.report());
    write_to(file.map(|path| ("NPTL_REPORT", path.as_c_str())), page);
}

/// At exit.
pub(super) fn statistics() {
    let Some(path) = &Environment::get().statistics else {
        return;
    };
    let mut page = ReportText::EMPTY;
    let _ = writeln!(page, "nptl: {Program} {Statistics}");
    write_to(Some(("NPTL_STATS", path)), page);
}

/// Name and number of the program.
struct Program;

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let comm = file::first(c"/proc/self/comm", |line| Some(Text::<16>::new(line)));
        let name = comm.as_ref().and_then(Text::to_str).unwrap_or("?");
        write!(f, "program={name:?} pid={}", sys::process_id())
    }
}

/// One line.
pub(super) struct Statistics;

impl fmt::Display for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stats = StackCache::global().stats();
        write!(
            f,
            "mode={} refusals={} cache_hits={} cache_misses={} cache_evictions={} cached_stacks={} cached_resident_bytes={} live_stacks={} mapped_stacks={}",
            Environment::get().mode,
            failures::count(),
            stats.hits,
            stats.misses,
            stats.evictions,
            stats.cached_stacks,
            stats.cached_resident_bytes,
            stats.live_stacks,
            stats.mapped_stacks,
        )
    }
}
