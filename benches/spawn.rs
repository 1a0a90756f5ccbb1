//! The rows of the performance table, with floor, pthread, std and nptl in one group each: `cargo
//! bench --bench spawn [-- FILTER]`. The time is that of an iteration (a whole burst; a thread of
//! every contender), the elements of the throughput are threads. For figures to quote, prefer
//! `--example compare`: it interleaves the subjects round by round, which criterion does not. The
//! crowd row takes limits, not rounds: `--example crowd`.

mod measured;

use measure::workload::{self, Workload};

fn main() {
    let mut criterion = measured::criterion();
    for row in workload::rows() {
        match row.workload {
            // Need a process of their own: benches/cold.rs, and the example compare.
            Workload::Cold | Workload::Lean => {}
            // Each sample starts its crowd anew: minutes for the large ones.
            Workload::Live | Workload::CrowdAgain if row.threads > 1_000 => {}
            _ => measured::bench(&mut criterion, &row),
        }
    }
    criterion.final_summary();
}
