//! What the benches and the examples `compare` and `crowd` stand on: the rows, what a round runs, the figures,
//! and which limit a crowd is said to have met.

use std::collections::HashSet;

use measure::floor::Floor;
use measure::gate::Gate;
use measure::pthread::Pthread;
use measure::summary::Figure;
use measure::workload::{COLD_TUNABLE, Row, Workload, rows};
use measure::{Load, SUBJECTS, Subject, proc, pthread, subjects};
use serde_json::Value;
use support::{
    Cgroup, Mappings, become_unused_user, case, child, deny_guard_marks, inherited_cgroup, or_skip,
    report, set_rlimit,
};

/// A row of the comparison: workload, threads, stack in KiB, and what ours must reach.
type Promised = (Workload, usize, usize, &'static str, f64);

fn row_of(workload: Workload) -> Row {
    let mut rows = rows().into_iter();
    rows.find(|row| row.workload == workload).expect("a row")
}

#[test]
fn the_rows_are_those_of_the_performance_table() {
    use Workload::{Burst, Cold, Contended, Gate, HeapWarm, Hot, Lean, Settings, SpawnCall};
    let promised: [Promised; 13] = [
        (Hot, 1, 256, "floor", 1.05),
        (Burst, 64, 8192, "pthread", 0.50),
        (Burst, 1000, 8192, "pthread", 0.45),
        (Burst, 64, 256, "pthread", 0.95),
        (Cold, 1, 256, "pthread", 0.90),
        (Lean, 1, 256, "pthread", 0.85),
        (HeapWarm, 1, 256, "pthread", 0.90),
        (SpawnCall, 1, 256, "floor", 1.15),
        (Contended, 2, 256, "pthread", 1.00),
        (Contended, 4, 256, "pthread", 1.00),
        (Contended, 16, 256, "pthread", 1.00),
        (Settings, 1, 256, "std", 1.00),
        (Gate, 64, 256, "std", 1.00),
    ];
    let with_target: Vec<Promised> = rows()
        .iter()
        .filter_map(|row| {
            let target = row.target?;
            let kib = row.stack_bytes / 1024;
            Some((row.workload, row.threads, kib, target.against, target.ratio))
        })
        .collect();
    assert_eq!(with_target, promised);
    let labels: HashSet<_> = rows().iter().map(Row::label).collect();
    assert_eq!(labels.len(), rows().len(), "{labels:?}");
}

#[test]
fn a_figure_has_the_promised_fields() {
    let row = row_of(Workload::Hot);
    let figure = Figure::new(&row, "nptl", vec![1.0, 2.0]).expect("samples");
    let json = serde_json::to_value(figure).expect("plain fields");
    let fields = json.as_object().expect("an object");
    let names: HashSet<_> = fields.keys().map(String::as_str).collect();
    let (texts, numbers) = (
        ["workload", "subject"],
        ["threads", "stack_bytes", "samples"],
    );
    let times = ["median_ns", "p10_ns", "p90_ns"];
    let promised = [&texts[..], &numbers, &times].concat();
    assert_eq!(names, HashSet::from_iter(promised));
    assert!(texts.iter().all(|name| fields[*name].is_string()), "{json}");
    assert!(numbers.iter().all(|name| fields[*name].is_u64()), "{json}");
    assert!(times.iter().all(|name| fields[*name].is_f64()), "{json}");
    assert_eq!(fields["samples"], Value::from(2));
}

#[test]
fn quantiles_lie_between_the_nearest_samples() {
    let row = row_of(Workload::Hot);
    let figure = |samples: &[f64]| {
        let figure = Figure::new(&row, "nptl", samples.to_vec())?;
        Some([figure.p10_ns, figure.median_ns, figure.p90_ns])
    };
    assert_eq!(figure(&[]), None);
    assert_eq!(figure(&[7.0]), Some([7.0; 3]));
    // Whatever the order of the rounds.
    assert_eq!(figure(&[4.0, 1.0, 3.0, 2.0]).map(|q| q[1]), Some(2.5));
    let eleven: Vec<f64> = (0..=10).rev().map(f64::from).collect();
    assert_eq!(figure(&eleven), Some([1.0, 5.0, 9.0]));
}

/// Every subject runs every row, of a crowd's the smaller ones; the figure is that of one thread.
#[test]
fn every_subject_runs_every_row() {
    for row in rows() {
        let crowd = matches!(row.workload, Workload::Live | Workload::CrowdAgain);
        if crowd && row.threads > 100 {
            continue;
        }
        let subjects = subjects(&row).expect("the subjects");
        let names: Vec<_> = subjects.iter().map(|subject| subject.name()).collect();
        // The floor's child has no thread-locals to allocate with.
        let expected = match row.workload {
            Workload::HeapWarm => &SUBJECTS[1..4],
            // By hand or by the builder.
            Workload::Settings | Workload::Gate => &SUBJECTS[2..4],
            _ => &SUBJECTS[..4],
        };
        assert_eq!(names, expected, "{}", row.label());
        for subject in subjects {
            let time = subject.round(&row, 2);
            let time = time.unwrap_or_else(|e| panic!("{} {}: {e}", row.label(), subject.name()));
            assert!(!time.is_zero(), "{} {}", row.label(), subject.name());
        }
    }
}

/// The cold row means something only where glibc keeps no stack either.
#[test]
fn the_cold_rows_tunable_turns_glibcs_cache_off() {
    const NAME: &str = "the_cold_rows_tunable_turns_glibcs_cache_off";
    let row = row_of(Workload::Cold);
    if case().is_some() {
        let mut subjects = subjects(&row).expect("the subjects").into_iter();
        let glibc = subjects.find(|subject| subject.name() == pthread::NAME);
        let kib = || proc::status("VmSize").expect("a number");
        let before = kib();
        glibc.expect("glibc").round(&row, 1).expect("a thread");
        let kept = kib().saturating_sub(before) >= row.stack_bytes / 1024;
        return report("kept", kept);
    }
    let kept = |child: support::Child| {
        let output = child.run()?.success();
        Ok::<_, String>(output.get("kept").map(str::to_owned))
    };
    let plain = or_skip!(kept(child(NAME, "plain")));
    assert_eq!(plain.as_deref(), Some("true"));
    let (name, value) = COLD_TUNABLE;
    let cold = or_skip!(kept(child(NAME, "cold").env(name, value)));
    assert_eq!(cold.as_deref(), Some("false"));
}

/// A crowd of pthread_create, which says EAGAIN whatever it met.
#[test]
fn the_limit_that_stops_a_crowd_is_named() {
    const NAME: &str = "the_limit_that_stops_a_crowd_is_named";
    const STACK: usize = 64 << 10;
    if let Some(name) = case() {
        static GATE: Gate = Gate::new();
        let (floor, pthread) = (Floor::new(), Pthread::new(STACK).expect("attributes"));
        floor.join(floor.start(Load::Empty).expect("a task"));
        pthread.join(pthread.start(Load::Empty).expect("a thread"));
        let mut threads = Vec::with_capacity(1000);
        let mut ballast = None;
        match name.as_str() {
            "pids cgroup" => inherited_cgroup(0).set("pids.max", 60),
            "processes" => {
                or_skip!(become_unused_user());
                set_rlimit(libc::RLIMIT_NPROC, 50);
            }
            "address space" => {
                let used = proc::status("VmSize").expect("a number") * 1024;
                set_rlimit(libc::RLIMIT_AS, used as u64 + (1 << 20));
            }
            "mappings" => {
                // From glibc 2.42 on a guard is a mapping only where it cannot be marked.
                deny_guard_marks(libc::EINVAL);
                ballast = Some(Mappings::fill_but(20));
            }
            _ => {}
        }
        let error = (0..1000).find_map(|_| match pthread.start(Load::Park(&GATE)) {
            Ok(thread) => {
                threads.push(thread);
                None
            }
            Err(error) => Some(error),
        });
        let error = error.expect("a limit below a thousand threads");
        let refusal = measure::refusal::explain(&error, &floor, STACK);
        drop(ballast);
        GATE.open();
        threads.into_iter().for_each(|thread| pthread.join(thread));
        report("errno", error.raw_os_error().unwrap_or(0));
        report("verdict", refusal.verdict);
        return;
    }
    let cgroup = Cgroup::pids();
    for (name, verdict) in [
        ("pid numbers", "pid numbers: kernel.pid_max = 400 here"),
        ("pids cgroup", "pids.max of a cgroup: /"),
        ("processes", "RLIMIT_NPROC = 50, "),
        ("address space", "RLIMIT_AS = "),
        ("mappings", "vm.max_map_count = "),
    ] {
        let child = child(NAME, name);
        let child = match (name, &cgroup) {
            ("pid numbers", _) => child.pid_namespace(Some(400)),
            ("pids cgroup", Ok(cgroup)) => child.cgroup(cgroup),
            ("pids cgroup", Err(why)) => {
                support::announce_skip(why);
                continue;
            }
            _ => child,
        };
        let output = match child.run() {
            Ok(output) => output.success(),
            Err(why) => {
                support::announce_skip(&why);
                continue;
            }
        };
        if output.skipped().is_none() {
            let said = output.get("verdict").unwrap_or_default();
            assert!(said.starts_with(verdict), "{name}: {output}");
            assert_eq!(output.get("errno"), Some("11"), "{name}: {output}");
        }
    }
}
