//! The rows of the performance table, with floor, pthread, std and nptl in one group each: `cargo
//! bench --bench spawn [-- FILTER]`. The time is that of an iteration (a whole burst; a thread of
//! every contender), the elements of the throughput are threads. For figures to quote, prefer
//! `--example compare`: it interleaves the subjects round by round, which criterion does not. The
//! crowd row takes limits, not rounds: `--example crowd`.

#[path = "../examples/measure/mod.rs"]
mod measure;

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};

use measure::workload::{self, Row, Workload};

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    for row in workload::rows() {
        match row.workload {
            // Needs a process of its own: benches/cold.rs.
            Workload::Cold => {}
            // Each sample starts its crowd anew: minutes for the large ones.
            Workload::Live if row.threads > 1_000 => {}
            _ => bench(&mut criterion, &row),
        }
    }
    criterion.final_summary();
}

fn bench(criterion: &mut Criterion, row: &Row) {
    let mut group = criterion.benchmark_group(row.label());
    group.throughput(Throughput::Elements(row.threads_per_iteration() as u64));
    for subject in measure::subjects(row).expect("the subjects can be set up") {
        group.bench_function(BenchmarkId::from_parameter(subject.name()), |bencher| {
            bencher.iter_custom(|iterations| {
                subject.round(row, iterations).expect("no spawn is refused")
            });
        });
    }
    group.finish();
}
