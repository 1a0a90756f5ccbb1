//! The rows of the performance table, with floor, pthread, std and nptl in one group each: `cargo
//! bench --bench spawn [-- FILTER]`. For figures to quote, prefer `--example compare`: it
//! interleaves the subjects round by round, which criterion does not.

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
        // Cold needs a process of its own (benches/cold.rs), and a crowd per sample would take
        // minutes.
        if !matches!(row.workload, Workload::Cold | Workload::Live) {
            bench(&mut criterion, &row);
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
