//! The cold row: no subject caches stacks. glibc's cache can only be turned off from outside, so
//! this bench re-executes itself with the tunable set: `cargo bench --bench cold`.

#[path = "../examples/measure/mod.rs"]
mod measure;

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion};

use measure::workload::{self, COLD_TUNABLE, Workload};

fn main() {
    let (name, value) = COLD_TUNABLE;
    if std::env::var_os(name).is_none_or(|set| set != value) {
        let error = Command::new("/proc/self/exe")
            .args(std::env::args_os().skip(1))
            .env(name, value)
            .exec();
        panic!("re-executing /proc/self/exe: {error}");
    }
    let mut criterion = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    for row in workload::rows()
        .iter()
        .filter(|row| row.workload == Workload::Cold)
    {
        let mut group = criterion.benchmark_group(row.label());
        for subject in measure::subjects(row).expect("the subjects can be set up") {
            group.bench_function(BenchmarkId::from_parameter(subject.name()), |bencher| {
                bencher.iter_custom(|iterations| {
                    subject.round(row, iterations).expect("no spawn is refused")
                });
            });
        }
        group.finish();
    }
    criterion.final_summary();
}
