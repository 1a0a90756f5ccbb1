//! The rows of the performance table as criterion's groups: what the benches share.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput};

use measure::workload::Row;

/// Long enough for figures that hold, short enough for all rows.
pub fn criterion() -> Criterion {
    Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args()
}

/// One group: the row, by every subject that can run it.
pub fn bench(criterion: &mut Criterion, row: &Row) {
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
