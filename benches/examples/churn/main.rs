//! A thread pool as QEMU's: workers start when a request finds none idle, and leave after an idle time. What a request
//! waits for is then, again and again, the start of a thread. The same load for std's threads and for nptl's.
//!
//! ```text
//! cargo run --release --example churn -- [--rounds N] [--burst N] [--every MS] [--idle MS] [--work US] [--workers N]
//!                                        [--json] [--svg FILE]
//! ```
//!
//! Every `--every` ms a burst of requests comes, each with `--work` µs to compute. The idle time is shorter than the pause, so
//! that every burst meets an empty pool. Rounds of the two take turns. A latency counts from the moment at which the
//! request was due, so that a pool that falls behind cannot hide it.

mod plot;

use clap::Parser;
use hdrhistogram::Histogram;
use serde_json::json;
use std::collections::VecDeque;
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Latencies of a thread pool whose workers come and go.
#[derive(Parser)]
struct Arguments {
    /// Rounds of each of the two.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Bursts in a round.
    #[arg(long, default_value_t = 40)]
    bursts: usize,
    /// Requests in a burst.
    #[arg(long, default_value_t = 16)]
    burst: usize,
    /// From one burst to the next.
    #[arg(long, value_name = "MS", default_value_t = 20)]
    every: u64,
    /// A worker without a request leaves after this time.
    #[arg(long, value_name = "MS", default_value_t = 5)]
    idle: u64,
    /// What a request computes.
    #[arg(long, value_name = "US", default_value_t = 20)]
    work: u64,
    /// At most so many at once.
    #[arg(long, default_value_t = 64)]
    workers: usize,
    /// Usable bytes of each stack.
    #[arg(long, value_name = "BYTES", default_value_t = 256 << 10)]
    stack_size: usize,
    /// Prints the figures as JSON.
    #[arg(long)]
    json: bool,
    /// Draws the percentiles.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Who makes the workers.
#[derive(Clone, Copy, PartialEq)]
enum Maker {
    Std,
    Nptl,
}

impl Maker {
    const ALL: [Maker; 2] = [Maker::Std, Maker::Nptl];

    fn name(self) -> &'static str {
        match self {
            Maker::Std => "std",
            Maker::Nptl => "nptl",
        }
    }

    /// Starts a thread that nothing joins, as QEMU's workers.
    fn start(
        self,
        stack_size: usize,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<(), Box<dyn Error>> {
        match self {
            Maker::Std => drop(
                std::thread::Builder::new()
                    .stack_size(stack_size)
                    .spawn(body)?,
            ),
            Maker::Nptl => nptl::Builder::new()
                .stack_size(stack_size)
                .spawn(body)?
                .detach(),
        }
        Ok(())
    }
}

struct PoolState {
    /// When each request was due.
    waiting: VecDeque<Instant>,
    idle: usize,
    workers: usize,
    started: u64,
    done: usize,
    /// Nanoseconds.
    latencies: Histogram<u64>,
}

struct Pool {
    state: Mutex<PoolState>,
    request: Condvar,
    idle_time: Duration,
    work: Duration,
}

impl Pool {
    fn new(arguments: &Arguments) -> Result<Pool, Box<dyn Error>> {
        Ok(Pool {
            state: Mutex::new(PoolState {
                waiting: VecDeque::new(),
                idle: 0,
                workers: 0,
                started: 0,
                done: 0,
                latencies: histogram()?,
            }),
            request: Condvar::new(),
            idle_time: Duration::from_millis(arguments.idle),
            work: Duration::from_micros(arguments.work),
        })
    }

    fn lock(&self) -> MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut state = self.lock();
        loop {
            state.idle += 1;
            let (guard, _) = self
                .request
                .wait_timeout_while(state, self.idle_time, |state| state.waiting.is_empty())
                .unwrap_or_else(PoisonError::into_inner);
            state = guard;
            state.idle -= 1;
            let Some(due) = state.waiting.pop_front() else {
                state.workers -= 1;
                return;
            };
            drop(state);
            let begin = Instant::now();
            while begin.elapsed() < self.work {
                std::hint::spin_loop();
            }
            let latency = due.elapsed().as_nanos() as u64;
            state = self.lock();
            state.latencies.saturating_record(latency);
            state.done += 1;
        }
    }
}

/// One request: an idle worker takes it, or a new one.
fn submit(
    pool: &Arc<Pool>,
    maker: Maker,
    due: Instant,
    arguments: &Arguments,
) -> Result<(), Box<dyn Error>> {
    let mut state = pool.lock();
    state.waiting.push_back(due);
    if state.waiting.len() <= state.idle {
        pool.request.notify_one();
        return Ok(());
    }
    if state.workers >= arguments.workers {
        return Ok(());
    }
    state.workers += 1;
    state.started += 1;
    drop(state);
    let own = Arc::clone(pool);
    maker.start(arguments.stack_size, move || own.work())
}

/// One round on an empty pool, into `latencies`. The number of threads that were started.
fn round(
    maker: Maker,
    arguments: &Arguments,
    latencies: &mut Histogram<u64>,
) -> Result<u64, Box<dyn Error>> {
    let pool = Arc::new(Pool::new(arguments)?);
    let every = Duration::from_millis(arguments.every);
    let begin = Instant::now();
    for number in 0..arguments.bursts {
        let due = begin + every * number as u32;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        for _ in 0..arguments.burst {
            submit(&pool, maker, due, arguments)?;
        }
    }
    let all = arguments.bursts * arguments.burst;
    loop {
        let state = pool.lock();
        if state.done == all && state.workers == 0 {
            latencies.add(&state.latencies)?;
            return Ok(state.started);
        }
        drop(state);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Nanoseconds, to a thousandth, up to a minute.
fn histogram() -> Result<Histogram<u64>, Box<dyn Error>> {
    Ok(Histogram::new_with_bounds(1, 60_000_000_000, 3)?)
}

const PERCENTILES: [f64; 6] = [50.0, 75.0, 90.0, 99.0, 99.9, 100.0];

fn main() -> ExitCode {
    measure::exit_code(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let mut latencies = [histogram()?, histogram()?];
    let mut started = [0; 2];
    // The first of each finds its way, and is not counted.
    for number in 0..=arguments.rounds {
        for (maker, (all, started)) in Maker::ALL
            .into_iter()
            .zip(latencies.iter_mut().zip(&mut started))
        {
            let mut one = histogram()?;
            let threads = round(maker, &arguments, &mut one)?;
            if number > 0 {
                all.add(&one)?;
                *started += threads;
            }
        }
    }
    if let Some(file) = &arguments.svg {
        let names = Maker::ALL.map(Maker::name);
        plot::percentiles(file, &names, &latencies)?;
    }
    if arguments.json {
        let of = |(maker, (all, started)): (Maker, (&Histogram<u64>, &u64))| {
            let at = PERCENTILES.map(|p| json!({"percentile": p, "us": us(all, p)}));
            json!({"maker": maker.name(), "requests": all.len(), "threads": started, "latency": at})
        };
        let both = Maker::ALL
            .into_iter()
            .zip(latencies.iter().zip(&started))
            .map(of);
        println!("{:#}", json!(both.collect::<Vec<_>>()));
        return Ok(());
    }
    println!("latency in µs of {} requests each", latencies[0].len());
    print!("{:<6}{:>9}", "", "threads");
    PERCENTILES
        .iter()
        .for_each(|p| print!("{:>10}", format!("p{p}")));
    println!();
    for (maker, (all, started)) in Maker::ALL.into_iter().zip(latencies.iter().zip(started)) {
        print!("{:<6}{started:>9}", maker.name());
        PERCENTILES
            .iter()
            .for_each(|p| print!("{:>10.0}", us(all, *p)));
        println!();
    }
    Ok(())
}

fn us(latencies: &Histogram<u64>, percentile: f64) -> f64 {
    latencies.value_at_percentile(percentile) as f64 / 1000.0
}
