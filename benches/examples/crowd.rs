//! How many threads can live at once, ours and pthread_create's, each in a process of its own: time
//! and resident bytes a thread, lines of /proc/self/maps, and where a crowd stops, which limit
//! stopped it.
//!
//! ```text
//! cargo run --release --example crowd -- 100000 [--stack-size BYTES] [--json]
//! ```
//!
//! No limit is changed. A crowd that runs into the machine's pid numbers leaves none for other
//! programs while it lives: on a shared machine run it in a pid namespace with a lower
//! `kernel.pid_max` (its own from Linux 6.14), or in a pids cgroup.

use std::error::Error;
use std::io;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use clap::builder::RangedU64ValueParser;
use serde::{Deserialize, Serialize};

use measure::floor::Floor;
use measure::gate::Gate;
use measure::proc;
use measure::pthread::{self, Pthread};
use measure::refusal::{RefusedThread, shown};
use measure::rust::{self, Nptl};
use measure::{Load, Subject};

/// Start N live threads and say what they cost, or what stopped them.
#[derive(Parser)]
struct Arguments {
    /// Number of threads; no Linux has more than 4194304 pid numbers.
    #[arg(value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..=1 << 22))]
    threads: usize,
    /// Usable bytes of each stack; pthread_create takes no fewer than 16384.
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = 64 * 1024,
        value_parser = RangedU64ValueParser::<usize>::new().range(16 * 1024..1 << 46)
    )]
    stack_size: usize,
    /// Print the reports as JSON.
    #[arg(long)]
    json: bool,
    /// Run one subject's crowd in this process and print its report.
    #[arg(long, hide = true)]
    child: Option<String>,
}

/// Bytes; less than glibc's malloc would map on their own.
const BALLAST: usize = 100 * 1024;

#[derive(Serialize, Deserialize)]
struct Started {
    subject: String,
    wanted: usize,
    started: usize,
    stack_bytes: usize,
    start_ns_per_thread: f64,
    join_ns_per_thread: f64,
    maps_lines: usize,
    resident_bytes_per_thread: f64,
    refusal: Option<RefusedThread>,
}

fn main() -> ExitCode {
    measure::exit_code(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let (threads, stack_bytes) = (arguments.threads, arguments.stack_size);
    if let Some(subject) = &arguments.child {
        let report = match subject.as_str() {
            rust::NPTL => crowd(&Nptl::new(stack_bytes), threads, stack_bytes)?,
            pthread::NAME => crowd(&Pthread::new(stack_bytes)?, threads, stack_bytes)?,
            _ => return Err(format!("no subject {subject:?}").into()),
        };
        serde_json::to_writer(io::stdout(), &report)?;
        return Ok(());
    }

    let mut reports = Vec::new();
    let obstacles = obstacles(threads, stack_bytes);
    if !obstacles.is_empty() {
        eprintln!("the limits do not allow {threads} threads:");
        obstacles.iter().for_each(|line| eprintln!("  {line}"));
    }
    for subject in [rust::NPTL, pthread::NAME] {
        eprintln!("{threads} threads with {subject} ...");
        reports.push(run_child(subject, &arguments)?);
    }
    if arguments.json {
        serde_json::to_writer_pretty(io::stdout(), &reports)?;
        println!();
    } else {
        print(&reports);
    }
    Ok(())
}

/// The limits that have no room for so many threads, ours, which need no mapping each; the least room
/// first.
fn obstacles(threads: usize, stack_bytes: usize) -> Vec<String> {
    let headroom = nptl::headroom();
    let left = |limit| Some(*headroom.threads_left(limit, stack_bytes)?.end());
    let mut short: Vec<_> = headroom
        .limits()
        .iter()
        .filter_map(|limit| Some((left(limit)?, limit)))
        .filter(|(left, _)| *left < threads as u64)
        .collect();
    short.sort_by_key(|(left, _)| *left);
    let line = |(left, limit): (u64, &nptl::diagnose::HeadroomLimit)| {
        format!(
            "{}: room for {left} more, {} of {} in use ({})",
            limit.cause,
            shown(limit.in_use),
            shown(limit.maximum),
            limit.source
        )
    };
    short.into_iter().map(line).collect()
}

/// One process a crowd: neither the mappings nor the heap of one may change what the other costs.
fn run_child(subject: &str, arguments: &Arguments) -> Result<Started, Box<dyn Error>> {
    let output = Command::new("/proc/self/exe")
        .arg(arguments.threads.to_string())
        .args([
            "--stack-size",
            &arguments.stack_size.to_string(),
            "--child",
            subject,
        ])
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        return Err(format!(
            "the process with the {subject} crowd ended with {}",
            output.status
        )
        .into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn crowd<S: Subject>(subject: &S, wanted: usize, stack_bytes: usize) -> io::Result<Started> {
    static GATE: Gate = Gate::new();
    // What the first thread costs once (calibration, heap arenas) is not a price of each.
    let first = subject.start(Load::Empty);
    let mut refused = first.map(|handle| subject.join(handle)).err();
    let floor = Floor::new();
    if let Ok(child) = floor.start(Load::Empty) {
        floor.join(child);
    }
    let mut handles = Vec::new();
    handles
        .try_reserve_exact(wanted)
        .map_err(|_| io::ErrorKind::OutOfMemory)?;
    // Under RLIMIT_AS the heap is used up as well when a stack is refused; the report needs some.
    let ballast: Vec<u8> = Vec::with_capacity(BALLAST);
    let resident_before = proc::resident_bytes();

    let begin = Instant::now();
    let mut spent = Duration::ZERO;
    while handles.len() < wanted && refused.is_none() {
        // Without the one that is refused, which may have been tried again for a while.
        spent = begin.elapsed();
        match subject.start(Load::Park(&GATE)) {
            Ok(handle) => handles.push(handle),
            Err(error) => refused = Some(error),
        }
    }
    if refused.is_none() {
        spent = begin.elapsed();
    }
    // Now, while the crowd stands: the evidence goes away with it.
    drop(ballast);
    let refusal = refused.map(|error| measure::refusal::explain(&error, &floor, stack_bytes));
    let begin = Instant::now();
    GATE.await_arrivals(handles.len());
    let start = spent + begin.elapsed();

    let started = handles.len();
    let maps_lines = proc::mappings();
    let resident = proc::resident_bytes().saturating_sub(resident_before);
    let begin = Instant::now();
    GATE.open();
    handles.into_iter().for_each(|handle| subject.join(handle));
    let join = begin.elapsed();

    let per_thread = |total: f64| total / started.max(1) as f64;
    Ok(Started {
        subject: subject.name().to_owned(),
        wanted,
        started,
        stack_bytes,
        start_ns_per_thread: per_thread(start.as_nanos() as f64),
        join_ns_per_thread: per_thread(join.as_nanos() as f64),
        maps_lines,
        resident_bytes_per_thread: per_thread(resident as f64),
        refusal,
    })
}

fn print(reports: &[Started]) {
    type Line = (&'static str, fn(&Started) -> String);
    // A crowd of none has no price.
    fn each(report: &Started, value: String) -> String {
        match report.started {
            0 => "–".to_owned(),
            _ => value,
        }
    }
    let lines: [Line; 6] = [
        ("", |report| report.subject.clone()),
        ("live threads", |report| report.started.to_string()),
        ("start, µs a thread", |report| {
            each(report, format!("{:.1}", report.start_ns_per_thread / 1e3))
        }),
        ("join, µs a thread", |report| {
            each(report, format!("{:.1}", report.join_ns_per_thread / 1e3))
        }),
        ("lines of /proc/self/maps", |report| {
            report.maps_lines.to_string()
        }),
        ("resident bytes a thread", |report| {
            each(report, format!("{:.0}", report.resident_bytes_per_thread))
        }),
    ];
    for (label, value) in lines {
        print!("{label:26}");
        reports
            .iter()
            .for_each(|report| print!("{:>12}", value(report)));
        println!();
    }
    for report in reports {
        let Some(refusal) = &report.refusal else {
            continue;
        };
        println!(
            "\n{} stopped at {} of {} threads: {}",
            report.subject, report.started, report.wanted, refusal.error
        );
        println!("  which limit: {}", refusal.verdict);
        refusal
            .evidence
            .iter()
            .for_each(|line| println!("  {line}"));
    }
}
