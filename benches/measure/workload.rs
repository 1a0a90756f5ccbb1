//! The rows of the performance table and the loops behind them.

use std::io;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use super::gate::Gate;
use super::{Load, Subject, floor, pthread, rust};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// What a round does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Spawn and join, one at a time, empty body.
    Hot,
    /// Start all, all alive at once, then join all.
    Burst,
    /// Hot without any stack cache; glibc's is turned off from outside, by [`COLD_TUNABLE`].
    Cold,
    /// Hot with a cache that keeps address space and guards, but no memory below the last page; glibc's is turned off.
    Lean,
    /// Hot with a body that allocates.
    HeapWarm,
    /// Only the time until spawn returns.
    SpawnCall,
    /// Several threads spawn and join at once.
    Contended,
    /// One thread with a name, an affinity, a mask and a setup, and its join.
    Settings,
    /// Virtual CPUs that are created, set up, started together, and joined.
    Gate,
    /// Hot beside parked threads of the same subject.
    Live,
    /// A large burst that comes and goes: what of it does the default cache hold?
    CrowdAgain,
}

/// The environment of a process in which glibc caches no stacks, read by its dynamic linker at
/// start.
pub const COLD_TUNABLE: (&str, &str) = ("GLIBC_TUNABLES", "glibc.pthread.stack_cache_size=0");

impl Workload {
    /// The name in tables, plots and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Workload::Hot => "hot",
            Workload::Burst => "burst",
            Workload::Cold => "cold",
            Workload::Lean => "lean",
            Workload::HeapWarm => "heap-warm",
            Workload::SpawnCall => "spawn-call",
            Workload::Contended => "contended",
            Workload::Settings => "settings",
            Workload::Gate => "gate",
            Workload::Live => "live",
            Workload::CrowdAgain => "crowd-again",
        }
    }
}

/// What ours must reach: at most `ratio` times the median of `against`.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The neighbour's name.
    pub against: &'static str,
    /// The highest ratio that reaches the target.
    pub ratio: f64,
}

/// A row of the table.
#[derive(Clone, Debug)]
pub struct Row {
    /// What runs.
    pub workload: Workload,
    /// How many threads: see [`super::summary::Figure::threads`].
    pub threads: usize,
    /// Usable bytes of each stack.
    pub stack_bytes: usize,
    /// What ours must reach.
    pub target: Option<Target>,
    /// Iterations that make a round long enough to hide the clock and short enough to interleave
    /// well.
    pub iterations: u64,
    /// Rounds of a full run.
    pub rounds: usize,
}

impl Row {
    /// Unique among [`rows`]; what `--only` takes.
    pub fn label(&self) -> String {
        let name = self.workload.name();
        match self.workload {
            Workload::Burst if self.stack_bytes >= MIB => {
                format!("{name}-{}x{}MiB", self.threads, self.stack_bytes / MIB)
            }
            Workload::Burst => format!("{name}-{}x{}KiB", self.threads, self.stack_bytes / KIB),
            Workload::Contended | Workload::Live => format!("{name}-{}", self.threads),
            _ => name.to_owned(),
        }
    }

    /// Threads started in one iteration; a figure is the time for one of them.
    pub fn threads_per_iteration(&self) -> usize {
        match self.workload {
            Workload::Burst | Workload::Contended | Workload::Gate | Workload::CrowdAgain => {
                self.threads
            }
            _ => 1,
        }
    }

    /// Threads that a subject starts in one round, those included that the time does not count.
    pub fn threads_per_round(&self) -> u64 {
        let counted = self.iterations * self.threads_per_iteration() as u64;
        match self.workload {
            Workload::Live => self.threads as u64 + warm_up(self.iterations) + counted,
            _ => counted,
        }
    }
}

fn row(
    workload: Workload,
    threads: usize,
    stack_bytes: usize,
    iterations: u64,
    rounds: usize,
) -> Row {
    Row {
        workload,
        threads,
        stack_bytes,
        target: None,
        iterations,
        rounds,
    }
}

/// The row beside so many live threads.
pub fn live_row(threads: usize) -> Row {
    let rounds = match threads {
        0..=100 => 40,
        101..=1_000 => 15,
        1_001..=3_000 => 7,
        _ => 5,
    };
    row(Workload::Live, threads, 64 * KIB, 200, rounds)
}

/// All rows, in the order of the performance table, then those of the plot.
pub fn rows() -> Vec<Row> {
    use Workload::{
        Burst, Cold, Contended, CrowdAgain, Gate, HeapWarm, Hot, Lean, Settings, SpawnCall,
    };
    let (floor, pthread, std) = (floor::NAME, pthread::NAME, rust::STD);
    let table = [
        (row(Hot, 1, 256 * KIB, 50, 400), floor, 1.05),
        (row(Burst, 64, 8 * MIB, 1, 200), pthread, 0.50),
        (row(Burst, 1000, 8 * MIB, 1, 30), pthread, 0.45),
        (row(Burst, 64, 256 * KIB, 1, 300), pthread, 0.95),
        (row(Cold, 1, 256 * KIB, 50, 400), pthread, 0.90),
        (row(Lean, 1, 256 * KIB, 50, 400), pthread, 0.85),
        (row(HeapWarm, 1, 256 * KIB, 50, 400), pthread, 0.90),
        (row(SpawnCall, 1, 256 * KIB, 50, 400), floor, 1.15),
        (row(Contended, 2, 256 * KIB, 60, 200), pthread, 1.00),
        (row(Contended, 4, 256 * KIB, 30, 200), pthread, 1.00),
        (row(Contended, 16, 256 * KIB, 10, 200), pthread, 1.00),
        (row(Settings, 1, 256 * KIB, 50, 200), std, 1.00),
        (row(Gate, 64, 256 * KIB, 1, 200), std, 1.00),
    ];
    let with_target = table.map(|(row, against, ratio)| Row {
        target: Some(Target { against, ratio }),
        ..row
    });
    let plotted = [10, 100, 1_000, 3_000, 10_000].map(live_row);
    // Three times, from an empty cache.
    let crowd = row(CrowdAgain, 20_000, 64 * KIB, 3, 1);
    with_target
        .into_iter()
        .chain(plotted)
        .chain([crowd])
        .collect()
}

/// So many threads at once, with the stacks of the lean row: what they leave is its resident memory.
pub fn lean_burst(row: &Row) -> Row {
    Row {
        workload: Workload::Burst,
        threads: 64,
        iterations: 1,
        ..row.clone()
    }
}

/// Uncounted iterations beside a crowd: the first may still meet its last threads on their way to the gate.
fn warm_up(iterations: u64) -> u64 {
    iterations / 4
}

/// Runs `iterations` of the row's workload and returns the time that counts.
pub fn run<S: Subject>(subject: &S, row: &Row, iterations: u64) -> io::Result<Duration> {
    match row.workload {
        Workload::Hot | Workload::Cold | Workload::Lean => {
            one_at_a_time(subject, Load::Empty, iterations)
        }
        Workload::HeapWarm => one_at_a_time(subject, Load::Heap, iterations),
        Workload::Burst | Workload::CrowdAgain => burst(subject, row.threads, iterations),
        Workload::SpawnCall => spawn_call(subject, iterations),
        Workload::Contended => contended(subject, row.threads, iterations),
        Workload::Live => live(subject, row.threads, iterations),
        Workload::Settings | Workload::Gate => Err(io::ErrorKind::Unsupported.into()),
    }
}

fn one_at_a_time<S: Subject>(subject: &S, body: Load, iterations: u64) -> io::Result<Duration> {
    let begin = Instant::now();
    for _ in 0..iterations {
        subject.join(subject.start(body)?);
    }
    Ok(begin.elapsed())
}

fn spawn_call<S: Subject>(subject: &S, iterations: u64) -> io::Result<Duration> {
    let mut total = Duration::ZERO;
    for _ in 0..iterations {
        let begin = Instant::now();
        let handle = subject.start(Load::Empty)?;
        total += begin.elapsed();
        subject.join(handle);
    }
    Ok(total)
}

fn burst<S: Subject>(subject: &S, threads: usize, iterations: u64) -> io::Result<Duration> {
    // No thread passes before the last one is started: that alone makes them all live at once.
    // Waiting for their arrival as well would only add the scheduler's noise.
    static GATE: Gate = Gate::new();
    let mut total = Duration::ZERO;
    let mut handles = Vec::with_capacity(threads);
    for _ in 0..iterations {
        let begin = Instant::now();
        let started = start_all(subject, threads, &GATE, &mut handles);
        GATE.open();
        for handle in handles.drain(..) {
            subject.join(handle);
        }
        total += begin.elapsed();
        GATE.close();
        started?;
    }
    Ok(total)
}

/// On a refusal, `handles` holds the threads started before it: the gate has to be opened for them.
fn start_all<S: Subject>(
    subject: &S,
    threads: usize,
    gate: &'static Gate,
    handles: &mut Vec<S::Handle>,
) -> io::Result<()> {
    for _ in 0..threads {
        handles.push(subject.start(Load::Park(gate))?);
    }
    Ok(())
}

fn contended<S: Subject>(subject: &S, spawners: usize, iterations: u64) -> io::Result<Duration> {
    let together = Barrier::new(spawners);
    let spawner = || {
        together.wait();
        let begin = Instant::now();
        let result = one_at_a_time(subject, Load::Empty, iterations);
        result.map(|_| (begin, Instant::now()))
    };
    let spans = thread::scope(|scope| {
        let handles: Vec<_> = (0..spawners).map(|_| scope.spawn(spawner)).collect();
        let join = |handle: thread::ScopedJoinHandle<'_, _>| {
            handle.join().expect("a spawner does not panic")
        };
        handles
            .into_iter()
            .map(join)
            .collect::<io::Result<Vec<(Instant, Instant)>>>()
    })?;
    // From the first spawner's begin to the last one's end, as each saw it: the barrier wakes them
    // one by one, and the creation of the spawners themselves is not what is measured.
    let begin = spans.iter().map(|span| span.0).min();
    let end = spans.iter().map(|span| span.1).max();
    Ok(end
        .zip(begin)
        .map_or(Duration::ZERO, |(end, begin)| end - begin))
}

fn live<S: Subject>(subject: &S, threads: usize, iterations: u64) -> io::Result<Duration> {
    static GATE: Gate = Gate::new();
    let mut handles = Vec::with_capacity(threads);
    let started = start_all(subject, threads, &GATE, &mut handles);
    let result = started.and_then(|()| {
        GATE.await_arrivals(threads);
        one_at_a_time(subject, Load::Empty, warm_up(iterations))?;
        one_at_a_time(subject, Load::Empty, iterations)
    });
    GATE.open();
    for handle in handles {
        subject.join(handle);
    }
    GATE.close();
    result
}
