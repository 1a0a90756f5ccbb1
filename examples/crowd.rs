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

mod measure;

use std::error::Error;
use std::fmt::Display;
use std::io;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use clap::builder::RangedU64ValueParser;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use serde::{Deserialize, Serialize};

use measure::floor::Floor;
use measure::gate::Gate;
use measure::proc;
use measure::pthread::{self, Pthread};
use measure::rust::{self, Nptl};
use measure::{Body, Subject};

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

/// Bytes that thread-local storage and a signal stack add to a stack, or more: a stack that is asked for
/// again, to learn why it was refused, must not be smaller than it was.
const BESIDES: usize = 64 * 1024;

#[derive(Serialize, Deserialize)]
struct Report {
    subject: String,
    wanted: usize,
    started: usize,
    stack_bytes: usize,
    start_ns_per_thread: f64,
    join_ns_per_thread: f64,
    maps_lines: usize,
    resident_bytes_per_thread: f64,
    refusal: Option<Refusal>,
}

#[derive(Serialize, Deserialize)]
struct Refusal {
    error: String,
    errno: Option<i32>,
    verdict: String,
    evidence: Vec<String>,
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
    let left = |limit| headroom.threads_left(limit, stack_bytes);
    let mut short: Vec<_> = headroom
        .limits()
        .iter()
        .filter_map(|limit| Some((left(limit)?, limit)))
        .filter(|(left, _)| *left < threads as u64)
        .collect();
    short.sort_by_key(|(left, _)| *left);
    let line = |(left, limit): (u64, &nptl::HeadroomLimit)| {
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
fn run_child(subject: &str, arguments: &Arguments) -> Result<Report, Box<dyn Error>> {
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

fn crowd<S: Subject>(subject: &S, wanted: usize, stack_bytes: usize) -> io::Result<Report> {
    static GATE: Gate = Gate::new();
    // What the first thread costs once (calibration, heap arenas) is not a price of each.
    let first = subject.start(Body::Empty);
    let mut refused = first.map(|handle| subject.join(handle)).err();
    let floor = Floor::new();
    if let Ok(child) = floor.start(Body::Empty) {
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
        match subject.start(Body::Park(&GATE)) {
            Ok(handle) => handles.push(handle),
            Err(error) => refused = Some(error),
        }
    }
    if refused.is_none() {
        spent = begin.elapsed();
    }
    // Now, while the crowd stands: the evidence goes away with it.
    drop(ballast);
    let refusal = refused.map(|error| explain(&error, &floor, stack_bytes));
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
    Ok(Report {
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

/// Asks the kernel the two halves of a thread's creation again, apart from each other: memory for a
/// stack, and a task.
fn explain(error: &io::Error, floor: &Floor, stack_bytes: usize) -> Refusal {
    let stack_bytes = stack_bytes + BESIDES;
    let stack = map_stack(stack_bytes);
    let task = match measure::floor::AVAILABLE {
        true => floor.start(Body::Empty).map(|child| floor.join(child)),
        false => Err(io::ErrorKind::Unsupported.into()),
    };
    let (in_allocation, after_allocation) = (probe_set_tid(), probe_cgroup());
    let mappings = proc::mappings();
    let max_map_count = proc::number::<usize>("/proc/sys/vm/max_map_count");
    let address_space = proc::status("VmSize").map(|kib| kib * 1024);
    let address_limit = rlimit(Resource::RLIMIT_AS);
    let cgroups = proc::pids_cgroups();
    let pid_max = proc::number::<usize>("/proc/sys/kernel/pid_max");
    let threads_max = proc::number::<usize>("/proc/sys/kernel/threads-max");
    let tasks = proc::tasks();
    let nproc = limit(rlimit(Resource::RLIMIT_NPROC));

    // A mapping and its guard need at most two lines more.
    let map_full = max_map_count.filter(|max| mappings + 2 >= *max);
    let address_full = address_space
        .zip(address_limit)
        .filter(|(used, max)| (used + stack_bytes) as u64 > *max);
    let verdict = match (&stack, &task) {
        (Err(_), _) if let Some(max) = map_full => {
            format!("vm.max_map_count = {max}: {mappings} mappings are in use")
        }
        (Err(_), _) if let Some((used, max)) = address_full => {
            format!("RLIMIT_AS = {max}: {used} bytes are in use")
        }
        (Err(error), _) => {
            format!("memory for a stack, neither vm.max_map_count nor RLIMIT_AS: {error}")
        }
        (Ok(()), Err(error)) if error.raw_os_error() == Some(libc::EAGAIN) => {
            // How far a clone gets now tells which of the kernel's checks refused it.
            match (in_allocation, after_allocation) {
                (libc::EAGAIN, _) if tasks.zip(threads_max).is_some_and(|(is, max)| is >= max) => {
                    format!(
                        "kernel.threads-max = {}: {} tasks",
                        shown(threads_max),
                        shown(tasks)
                    )
                }
                // What else is checked before is an execve in a sibling, and there is none here.
                (libc::EAGAIN, _) => format!(
                    "RLIMIT_NPROC = {nproc}, or what a user namespace remembers of it; \
                     kernel.threads-max has room"
                ),
                (libc::EINVAL, libc::EAGAIN) => format!(
                    "pid numbers: kernel.pid_max = {} here (300 of them reserved once the \
                     numbers have wrapped), unless an outer pid namespace has fewer",
                    shown(pid_max)
                ),
                (libc::EINVAL, libc::EBADF) => {
                    let full = cgroups.iter().filter(|(_, current, max)| current >= max);
                    let full: Vec<_> = full
                        .map(|(file, current, max)| format!(": {file} = {max}, {current} tasks"))
                        .collect();
                    format!("pids.max of a cgroup{}", full.concat())
                }
                _ => "unknown: the probes do not tell".to_owned(),
            }
        }
        (Ok(()), Err(error)) => format!("the task itself: {error}"),
        (Ok(()), Ok(())) => "unknown: both halves work again, so it was transient".to_owned(),
    };

    let say = |result: &io::Result<()>| {
        result
            .as_ref()
            .err()
            .map_or("works".to_owned(), io::Error::to_string)
    };
    let mut evidence = vec![
        format!(
            "a stack alone (mmap, mprotect of its guard): {}",
            say(&stack)
        ),
        format!("a task alone (raw clone on a ready stack): {}", say(&task)),
        format!(
            "clone3 that ends inside pid allocation: {}; behind it: {}",
            io::Error::from_raw_os_error(in_allocation),
            io::Error::from_raw_os_error(after_allocation)
        ),
        format!(
            "mappings: {mappings} of vm.max_map_count {}",
            shown(max_map_count)
        ),
        format!(
            "threads of this process: {}",
            shown(proc::status("Threads"))
        ),
        format!("kernel.pid_max of this pid namespace: {}", shown(pid_max)),
        format!(
            "tasks on the machine: {} of kernel.threads-max {}",
            shown(tasks),
            shown(threads_max)
        ),
        format!("RLIMIT_NPROC: {nproc} (CAP_SYS_RESOURCE and root are exempt)"),
        format!(
            "address space: {} of RLIMIT_AS {} bytes",
            shown(address_space),
            limit(address_limit)
        ),
    ];
    evidence.extend(
        cgroups
            .iter()
            .map(|(file, current, max)| format!("{file}: {current} of {max}")),
    );
    if cgroups.is_empty() {
        evidence.push("no pids cgroup with a limit in sight".to_owned());
    }
    Refusal {
        error: error.to_string(),
        errno: error.raw_os_error(),
        verdict,
        evidence,
    }
}

/// As pthread_create maps a stack: no access, then all but the guard made accessible, which splits
/// the mapping.
fn map_stack(bytes: usize) -> io::Result<()> {
    const GUARD: usize = 4096;
    let length = bytes.next_multiple_of(GUARD) + GUARD;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK;
    // SAFETY: a new mapping at a place that the kernel chooses.
    let mapping =
        unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
    if mapping == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: inside the mapping just made, which nobody else knows.
    let result = match unsafe {
        libc::mprotect(
            mapping.byte_add(GUARD),
            length - GUARD,
            libc::PROT_READ | libc::PROT_WRITE,
        )
    } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: as above.
    unsafe { libc::munmap(mapping, length) };
    result
}

/// The errno of a clone3 that asks for thread id 0: EINVAL once all checks before pid allocation
/// have passed.
fn probe_set_tid() -> i32 {
    let zero: libc::pid_t = 0;
    let mut arguments = thread_arguments();
    arguments.set_tid = std::ptr::from_ref(&zero) as u64;
    arguments.set_tid_size = 1;
    probe(&arguments)
}

/// The errno of a clone3 into a cgroup that is no descriptor: EBADF once pid allocation has passed.
fn probe_cgroup() -> i32 {
    /// libc's constant does not fit its type.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut arguments = thread_arguments();
    arguments.flags |= CLONE_INTO_CGROUP;
    arguments.cgroup = i32::MAX as u64;
    probe(&arguments)
}

fn thread_arguments() -> libc::clone_args {
    // SAFETY: plain integers, for which zero is a value.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SYSVSEM
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD;
    arguments.flags = flags as u64;
    arguments
}

fn probe(arguments: &libc::clone_args) -> i32 {
    // SAFETY: the callers ask for what the kernel always refuses, so no task is ever created.
    unsafe { libc::syscall(libc::SYS_clone3, arguments, size_of::<libc::clone_args>()) };
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// The soft limit; `None`: unlimited.
fn rlimit(resource: Resource) -> Option<u64> {
    let (soft, _) = getrlimit(resource).ok()?;
    (soft != RLIM_INFINITY).then_some(soft)
}

fn limit(soft: Option<u64>) -> String {
    soft.map_or("unlimited".to_owned(), |soft| soft.to_string())
}

/// A number that was read, or not.
fn shown<N: Display>(number: Option<N>) -> String {
    number.map_or("?".to_owned(), |number| number.to_string())
}

fn print(reports: &[Report]) {
    type Line = (&'static str, fn(&Report) -> String);
    // A crowd of none has no price.
    fn each(report: &Report, value: String) -> String {
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
