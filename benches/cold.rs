//! The cold row: no subject caches stacks. glibc's cache can only be turned off from outside, so
//! this bench re-executes itself with the tunable set: `cargo bench --bench cold`.

mod measured;

use std::os::unix::process::CommandExt;
use std::process::Command;

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
    let mut criterion = measured::criterion();
    for row in workload::rows() {
        if row.workload == Workload::Cold {
            measured::bench(&mut criterion, &row);
        }
    }
    criterion.final_summary();
}
