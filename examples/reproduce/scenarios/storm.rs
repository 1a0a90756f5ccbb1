//! The storm: under each limit nptl is asked for as long as there is time, by several threads at once, and the answers
//! are counted. Of answers that say the same one is kept, and judged.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nptl::diagnose::CauseKind;
use nptl::{Builder, Cause, Certainty, SpawnError};
use serde::{Deserialize, Serialize};

use super::ask::ask_nptl;

/// Milliseconds under each limit, for the process of a scenario.
pub const VARIABLE: &str = "NPTL_REPRODUCE_STORM";

/// Threads that ask besides the scenario's own: with more than there are processors, the times would be those of
/// the scheduler.
fn spawners() -> usize {
    let processors = std::thread::available_parallelism().map_or(2, usize::from);
    processors.clamp(2, 4) - 1
}

/// For how long, if there is a storm.
pub fn duration() -> Option<Duration> {
    let milliseconds = std::env::var(VARIABLE).ok()?.parse().ok()?;
    Some(Duration::from_millis(milliseconds))
}

/// What came out of a scenario.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Counts {
    pub granted: u64,
    pub proven: u64,
    pub inferred: u64,
    pub unknown: u64,
    pub wrong: u64,
    /// How many refusals were found out in a time: see [`bucket`].
    pub times: Vec<u64>,
}

const TIMES: usize = 240;

/// Each is 5% longer than the one before, from a microsecond to 0.16 s.
fn bucket(time: Duration) -> usize {
    let microseconds = (time.as_nanos() as f64 / 1000.0).max(1.0);
    ((microseconds.ln() * 20.0) as usize).min(TIMES - 1)
}

impl Counts {
    pub fn add(&mut self, other: &Counts) {
        self.granted += other.granted;
        self.proven += other.proven;
        self.inferred += other.inferred;
        self.unknown += other.unknown;
        self.wrong += other.wrong;
        self.times
            .resize(self.times.len().max(other.times.len()), 0);
        for (sum, count) in self.times.iter_mut().zip(&other.times) {
            *sum += count;
        }
    }

    pub fn refusals(&self) -> u64 {
        self.proven + self.inferred + self.unknown
    }

    /// The microseconds that so many of a thousand refusals did not exceed.
    fn per_mille(&self, part: u64) -> u64 {
        let all: u64 = self.times.iter().sum();
        let mut rest = (all * part).div_ceil(1000);
        let reached = |count: &u64| {
            rest = rest.saturating_sub(*count);
            rest == 0
        };
        let place = self.times.iter().position(reached);
        place.map_or(0, |place| ((place + 1) as f64 / 20.0).exp() as u64)
    }
}

/// The columns of a table's row: granted, refused, proven, inferred, unknown, wrong, median and 99th percentile in µs.
impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} | {} | {} | {} | {} | {} | {} | {} |",
            self.granted,
            self.refusals(),
            self.proven,
            self.inferred,
            self.unknown,
            self.wrong,
            self.per_mille(500),
            self.per_mille(990),
        )
    }
}

/// Answers that say the same.
struct Alike {
    first: SpawnError,
    count: u64,
}

/// The answers that one thread got. Its memory is there before the limit is.
pub struct Heard {
    granted: u64,
    classes: Vec<Alike>,
    /// Those for which there was no room.
    lost: u64,
    times: Vec<u64>,
}

impl Heard {
    fn new() -> Heard {
        Heard {
            granted: 0,
            classes: Vec::with_capacity(500),
            lost: 0,
            times: vec![0; TIMES],
        }
    }

    fn take(&mut self, answer: Result<(), SpawnError>) {
        let Err(error) = answer else {
            self.granted += 1;
            return;
        };
        self.times[bucket(error.time_spent())] += 1;
        let same = |class: &&mut Alike| is_same(&class.first, &error);
        let is_full = self.classes.len() == self.classes.capacity();
        match self.classes.iter_mut().find(same) {
            Some(class) => class.count += 1,
            None if is_full => self.lost += 1,
            None => self.classes.push(Alike {
                first: error,
                count: 1,
            }),
        }
    }

    fn merge(&mut self, other: Heard) {
        self.granted += other.granted;
        self.lost += other.lost;
        self.classes.extend(other.classes);
        for (sum, count) in self.times.iter_mut().zip(&other.times) {
            *sum += count;
        }
    }

    /// Counts; what is unknown is not wrong.
    pub fn judge(
        &self,
        judge: impl Fn(&SpawnError) -> Result<(), String>,
        mut wrong: impl FnMut(&str),
    ) -> Counts {
        let mut counts = Counts {
            granted: self.granted,
            unknown: self.lost,
            times: self.times.clone(),
            ..Counts::default()
        };
        for Alike { first, count } in &self.classes {
            match first.certainty() {
                Certainty::Proven => counts.proven += count,
                Certainty::Inferred => counts.inferred += count,
                _ => {
                    counts.unknown += count;
                    continue;
                }
            }
            if let Err(why) = judge(first) {
                counts.wrong += count;
                wrong(&why);
            }
        }
        counts
    }
}

/// Bytes in use move while others ask; what else is evidence does not.
fn is_same(one: &SpawnError, other: &SpawnError) -> bool {
    let key = |error: &SpawnError| {
        (
            error.step(),
            error.errno(),
            error.certainty(),
            error.alternatives(),
            error.cause().kind(),
        )
    };
    let moves = |cause: &Cause| {
        use CauseKind::{
            AddressSpace, DataSegment, KernelMemory, LockedMemory, Overcommit, Unknown,
        };
        [
            AddressSpace,
            DataSegment,
            KernelMemory,
            LockedMemory,
            Overcommit,
            Unknown,
        ]
        .contains(&cause.kind())
    };
    key(one) == key(other) && (moves(one.cause()) || one.cause() == other.cause())
}

/// Threads that wait for the storm.
pub struct Spawners(Arc<StormState>);

struct StormState {
    rages: AtomicBool,
    still: AtomicUsize,
    stack: AtomicUsize,
    heard: Mutex<Vec<Heard>>,
}

impl Spawners {
    /// Started before the limit is there.
    pub fn new() -> Result<Spawners, String> {
        let spawners = spawners();
        let shared = Arc::new(StormState {
            rages: AtomicBool::new(false),
            still: AtomicUsize::new(0),
            stack: AtomicUsize::new(0),
            heard: Mutex::new(Vec::with_capacity(spawners)),
        });
        for _ in 0..spawners {
            let shared = Arc::clone(&shared);
            let work = move || {
                let mut heard = Heard::new();
                while !shared.rages.load(Ordering::Acquire) {
                    std::thread::sleep(Duration::from_millis(1));
                }
                let stack = shared.stack.load(Ordering::Relaxed);
                while shared.rages.load(Ordering::Acquire) {
                    heard.take(ask_nptl(Builder::new().stack_size(stack)));
                }
                if let Ok(mut all) = shared.heard.lock() {
                    all.push(heard);
                }
                shared.still.fetch_sub(1, Ordering::AcqRel);
                // Its end would leave room at a limit of tasks.
                loop {
                    std::thread::park();
                }
            };
            let started = std::thread::Builder::new().spawn(work);
            started.map_err(|error| error.to_string())?;
        }
        shared.still.store(spawners, Ordering::Release);
        Ok(Spawners(shared))
    }
}

/// Asks for as long, together with the spawners if there are any.
pub fn rage(
    duration: Duration,
    spawners: Option<&Spawners>,
    stack: usize,
    own: impl Fn() -> Builder,
) -> Heard {
    let mut heard = Heard::new();
    if let Some(Spawners(shared)) = spawners {
        shared.stack.store(stack, Ordering::Relaxed);
        shared.rages.store(true, Ordering::Release);
    }
    let began = Instant::now();
    while began.elapsed() < duration {
        heard.take(ask_nptl(own()));
    }
    if let Some(Spawners(shared)) = spawners {
        shared.rages.store(false, Ordering::Release);
        while shared.still.load(Ordering::Acquire) > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        if let Ok(mut all) = shared.heard.lock() {
            all.drain(..).for_each(|other| heard.merge(other));
        }
    }
    heard
}
