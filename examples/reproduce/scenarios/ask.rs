//! The process of a scenario: asks pthread_create, std::thread and nptl for a thread each, under the same
//! limit, and reports to the process that started it what they said.
//!
//! Between a limit's coming into force and its end nothing here allocates but what the asked ones allocate:
//! the process is out of something.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nptl::diagnose::CauseKind;
use nptl::{Builder, Cause, Certainty, RetryPolicy, SpawnError, StackCache, Step};
use serde::{Deserialize, Serialize};

use super::StartCase;
use super::storm::{self, Heard, Spawners};
use support::report;

/// How often one was asked, and what it said.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Outcomes {
    pub granted: u64,
    /// By the text of the refusal.
    pub refused: BTreeMap<String, u64>,
}

impl Outcomes {
    pub fn add(&mut self, other: &Outcomes) {
        self.granted += other.granted;
        for (text, count) in &other.refused {
            *self.refused.entry(text.clone()).or_default() += count;
        }
    }

    pub fn refusals(&self) -> u64 {
        self.refused.values().sum()
    }
}

/// How often.
struct Times(u64);

impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => f.write_str("once"),
            count => write!(f, "{count} times"),
        }
    }
}

impl fmt::Display for Outcomes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let alone = self.granted + self.refusals() == 1;
        let mut separator = "";
        if self.granted > 0 || self.refused.is_empty() {
            match (alone, self.granted) {
                (_, 0) => f.write_str("not asked")?,
                (true, _) => f.write_str("granted")?,
                (false, count) => write!(f, "granted {}", Times(count))?,
            }
            separator = ", ";
        }
        for (text, count) in &self.refused {
            match alone {
                true => write!(f, "{separator}{text}")?,
                false => write!(f, "{separator}refused {}: {text}", Times(*count))?,
            }
            separator = ", ";
        }
        Ok(())
    }
}

/// One refusal by nptl, and what is wrong with what it says.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Reply {
    pub step: String,
    pub errno: String,
    pub pthread_errno: String,
    pub cause: String,
    pub certainty: String,
    pub alternatives: Vec<String>,
    pub transient: bool,
    pub attempts: u32,
    /// Spent on finding the cause out.
    pub microseconds: f64,
    /// The cause with its evidence, in one line.
    pub text: String,
    /// The whole error, in one line.
    pub line: String,
    pub report: String,
    pub wrong: Option<String>,
}

impl Reply {
    pub fn new(error: &SpawnError, judgement: Result<(), String>) -> Reply {
        Reply {
            step: error.step().to_string(),
            errno: format!("{:?}", error.errno()),
            pthread_errno: format!("{:?}", error.pthread_errno()),
            cause: format!("{:?}", error.cause().kind()),
            certainty: error.certainty().to_string(),
            alternatives: error
                .alternatives()
                .iter()
                .map(|kind| format!("{kind:?}"))
                .collect(),
            transient: error.is_transient(),
            attempts: error.attempts(),
            microseconds: error.time_spent().as_nanos() as f64 / 1000.0,
            text: error.cause().to_string(),
            line: error.to_string(),
            report: error.report().to_string(),
            wrong: judgement.err(),
        }
    }
}

/// What nptl may say without being wrong, beside the judgement of each refusal.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Right {
    /// Every request meets the limit.
    Refused,
    /// What is in the way is gone in milliseconds, and the default policy waits for that.
    Granted,
    /// The obstacle comes and goes.
    Either,
}

const PTHREAD: &str = "pthread_create";
const STD: &str = "std::thread";

/// Reports a tally of one refusal or grant of another library.
fn tell(key: &str, results: &[i32], text: impl Fn(i32) -> String) {
    let mut tally = Outcomes::default();
    for &errno in results {
        match errno {
            0 => tally.granted += 1,
            errno => *tally.refused.entry(text(errno)).or_default() += 1,
        }
    }
    tell_json(key, &tally);
}

fn tell_json(key: &str, value: &impl Serialize) {
    match serde_json::to_string(value) {
        Ok(text) => report(key, text),
        Err(error) => tell_failure(&error.to_string()),
    }
}

/// The scenario itself is broken, or the limit did not do what it must.
pub fn tell_failure(why: &str) {
    report("failed", why);
}

pub fn tell_skip(why: &str) {
    report("skip", why);
}

pub fn tell_note(note: impl fmt::Display) {
    report("note", note);
}

pub fn tell_answer(error: &SpawnError, judgement: Result<(), String>) {
    tell_json("answer", &Reply::new(error, judgement));
}

pub fn tell_pthread(errno: i32) {
    tell(PTHREAD, &[errno], errno_name);
}

pub fn tell_std(errno: i32) {
    tell(STD, &[errno], io_text);
}

pub fn tell_granted(count: u64) {
    report("granted", count);
}

fn errno_name(errno: i32) -> String {
    format!("{:?}", Errno::from_raw(errno))
}

fn io_text(errno: i32) -> String {
    std::io::Error::from_raw_os_error(errno).to_string()
}

extern "C" fn nothing(_: *mut libc::c_void) -> *mut libc::c_void {
    std::ptr::null_mut()
}

/// A thread by glibc that does nothing, and is joined. 0, or the errno.
pub fn ask_pthread(stack: usize) -> i32 {
    // SAFETY: all zeroes is what pthread_attr_init overwrites.
    let mut attributes: libc::pthread_attr_t = unsafe { std::mem::zeroed() };
    let mut thread = 0;
    // SAFETY: the attributes are initialised before use and outlive the call; the thread is joined once.
    unsafe {
        libc::pthread_attr_init(&raw mut attributes);
        libc::pthread_attr_setstacksize(&raw mut attributes, stack);
        let errno = libc::pthread_create(
            &raw mut thread,
            &raw const attributes,
            nothing,
            std::ptr::null_mut(),
        );
        libc::pthread_attr_destroy(&raw mut attributes);
        if errno == 0 {
            libc::pthread_join(thread, std::ptr::null_mut());
        }
        errno
    }
}

/// The same by the standard library.
pub fn ask_std(stack: usize) -> i32 {
    match std::thread::Builder::new().stack_size(stack).spawn(|| ()) {
        Ok(thread) => {
            let _ = thread.join();
            0
        }
        Err(error) => error.raw_os_error().unwrap_or(-1),
    }
}

/// The same by nptl.
pub fn ask_nptl(builder: Builder) -> Result<(), SpawnError> {
    let _ = builder.spawn(|| ())?.join();
    Ok(())
}

/// How many threads of this process the kernel counts, those it has still to take back among them. `None` where
/// no /proc shows.
pub fn threads() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let mut lines = status.lines();
    lines.find_map(|line| line.strip_prefix("Threads:")?.trim().parse().ok())
}

/// Waits until no more than `most` are left: a joined thread counts until the kernel has taken it back, on a busy
/// machine for a long time.
pub fn await_reaping(most: Option<u64>) {
    if most.is_none() {
        return std::thread::sleep(Duration::from_millis(30));
    }
    let start = Instant::now();
    while threads() > most && start.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Asks, and keeps the answers until there is memory to report them.
pub struct Asker<'a> {
    /// How often nptl is asked; the others are asked once.
    pub rounds: usize,
    /// Starts this program again, for a scenario of several processes.
    pub start: &'a StartCase<'a>,
    stack: usize,
    prefault: usize,
    retry: RetryPolicy,
    pthread: Vec<i32>,
    std: Vec<i32>,
    nptl: Vec<Result<(), SpawnError>>,
    /// What the storm has brought, where there is one.
    heard: Option<Heard>,
    spawners: Option<Spawners>,
    /// Which of nptl's refusals came while the obstacle stood for longer than the policy waits.
    outlasted: Vec<usize>,
}

/// The most requests of one kind in one scenario.
const MOST: usize = 10_000;

impl<'a> Asker<'a> {
    pub fn new(rounds: usize, start: &'a StartCase<'a>) -> Asker<'a> {
        Asker {
            rounds,
            start,
            stack: 256 << 10,
            prefault: 0,
            retry: RetryPolicy::default(),
            pthread: Vec::with_capacity(MOST),
            std: Vec::with_capacity(MOST),
            nptl: Vec::with_capacity(MOST),
            outlasted: Vec::with_capacity(MOST),
            heard: None,
            spawners: None,
        }
    }

    pub fn stack_size(&mut self, bytes: usize) {
        self.stack = bytes;
    }

    /// Bytes of each stack that are to be resident.
    pub fn prefault(&mut self, bytes: usize) {
        self.prefault = bytes;
    }

    pub fn retry(&mut self, policy: RetryPolicy) {
        self.retry = policy;
    }

    fn builder(&self) -> Builder {
        let builder = Builder::new().stack_size(self.stack);
        builder.prefault_stack(self.prefault).retry(self.retry)
    }

    /// One thread of each kind without any limit in the way, so that what is refused later is the thread
    /// itself and not a library's preparations for its first one. Leaves no stack in a cache of nptl's, and no
    /// thread that the kernel may still be reaping.
    pub fn calibrate(&mut self) -> Result<(), String> {
        if storm::duration().is_some() {
            self.spawners = Some(Spawners::new()?);
        }
        self.calibrate_alone()
    }

    /// The same for a scenario that counts the threads of its process.
    pub fn calibrate_alone(&self) -> Result<(), String> {
        let small = 64 << 10;
        let threads = threads();
        if ask_pthread(small) != 0 || ask_std(small) != 0 {
            return Err("no thread can be created here even without the limit".to_owned());
        }
        ask_nptl(Builder::new().stack_size(small)).map_err(|error| error.to_string())?;
        StackCache::global().clear();
        await_reaping(threads);
        Ok(())
    }

    /// Everybody, under the limit in force now.
    pub fn ask(&mut self) {
        self.ask_others();
        self.ask_many(true);
    }

    /// nptl alone, as often as is wanted. `all`: the limit stands before every thread of the process.
    pub fn ask_many(&mut self, all: bool) {
        match storm::duration() {
            Some(duration) => {
                let spawners = self.spawners.as_ref().filter(|_| all);
                let own = || self.builder();
                self.heard = Some(storm::rage(duration, spawners, self.stack, own));
            }
            None => {
                for _ in 0..self.rounds {
                    self.ask_nptl();
                }
            }
        }
    }

    pub fn ask_others(&mut self) {
        self.ask_pthread();
        self.ask_std();
    }

    pub fn ask_pthread(&mut self) -> i32 {
        let errno = ask_pthread(self.stack);
        self.pthread.push(errno);
        errno
    }

    pub fn ask_std(&mut self) -> i32 {
        let errno = ask_std(self.stack);
        self.std.push(errno);
        errno
    }

    /// Whether a thread was granted.
    pub fn ask_nptl(&mut self) -> bool {
        let result = ask_nptl(self.builder());
        let granted = result.is_ok();
        self.nptl.push(result);
        granted
    }

    /// The last refusal came while what passes by itself was still there: the policy's time was too short for this
    /// machine, and waiting for that long would not have helped.
    pub fn outlasted(&mut self) {
        self.outlasted.extend(self.nptl.len().checked_sub(1));
    }

    /// Drops the answers so far.
    pub fn forget(&mut self) {
        self.pthread.clear();
        self.std.clear();
        self.nptl.clear();
        self.outlasted.clear();
    }

    pub fn nptl_refusals(&self) -> usize {
        self.nptl.iter().filter(|result| result.is_err()).count()
    }

    pub fn refusals(&self) -> usize {
        let refused = |list: &[i32]| list.iter().filter(|errno| **errno != 0).count();
        refused(&self.pthread) + refused(&self.std) + self.nptl_refusals()
    }

    /// Reports the answers, each with its judgement.
    pub fn tell(&self, right: Right, judge: impl Fn(&SpawnError) -> Result<(), String>) {
        if let Some(heard) = &self.heard {
            let mut told = 0;
            let counts = heard.judge(judge, |why| {
                told += 1;
                if told <= 5 {
                    tell_note(format_args!("wrong: {why}"));
                }
            });
            tell_json("storm", &counts);
            return;
        }
        if right == Right::Refused && (self.pthread.contains(&0) || self.std.contains(&0)) {
            tell_failure(
                "the limit refuses nothing: pthread_create or std::thread was granted one",
            );
        }
        tell(PTHREAD, &self.pthread, errno_name);
        tell(STD, &self.std, io_text);
        let mut granted = 0;
        for (index, result) in self.nptl.iter().enumerate() {
            match result {
                Ok(()) => granted += 1,
                Err(error) if right == Right::Granted && !self.outlasted.contains(&index) => {
                    let judgement = judge(error).and_then(|()| {
                        Err(format!(
                            "refused, although waiting for some milliseconds would have helped: {error}"
                        ))
                    });
                    tell_answer(error, judgement);
                }
                Err(error) => tell_answer(error, judge(error)),
            }
        }
        tell_granted(granted);
        if right == Right::Granted && granted == 0 {
            tell_failure("nptl was granted no thread, although waiting helps");
        }
        if right == Right::Refused && granted > 0 {
            tell_failure("nptl was granted a thread although the limit stands");
        }
    }
}

/// The step and cause that a refusal must name.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    pub step: Step,
    pub errno: Errno,
    pub kind: CauseKind,
    /// Any of these.
    pub certainty: &'static [Certainty],
}

impl Expected {
    /// Checks names; the evidence is left to `evidence`.
    pub fn judge(
        &self,
        error: &SpawnError,
        evidence: impl FnOnce(&Cause) -> Result<(), String>,
    ) -> Result<(), String> {
        let expect = |what: &str, right: bool, expected: &dyn fmt::Debug| match right {
            true => Ok(()),
            false => Err(format!("expected {what} {expected:?}: {error}")),
        };
        expect("step", error.step() == self.step, &self.step)?;
        expect("errno", error.errno() == self.errno as i32, &self.errno)?;
        let kind = error.cause().kind();
        expect("cause", kind == self.kind, &self.kind)?;
        // In a storm other limits flicker, and cannot always be excluded.
        let storms = storm::duration().is_some();
        let certain = storms || self.certainty.contains(&error.certainty());
        expect("certainty", certain, &self.certainty)?;
        evidence(error.cause())
    }
}

/// `Ok` if the report has each of these lines: a value with the file or call it was read from, or a command that
/// changes the limit.
pub fn reports(error: &SpawnError, lines: &[&dyn fmt::Display]) -> Result<(), String> {
    let report = error.report().to_string();
    for line in lines {
        let line = line.to_string();
        if !report.contains(&line) {
            return Err(format!("no {line:?} in the report:\n{report}"));
        }
    }
    Ok(())
}

/// `Ok` if two values are the same, else which differ.
pub fn same<T: PartialEq + fmt::Debug>(what: &str, found: T, truth: T) -> Result<(), String> {
    match found == truth {
        true => Ok(()),
        false => Err(format!(
            "{what} is {truth:?}, but the evidence says {found:?}"
        )),
    }
}

/// The evidence does not belong to the cause that was expected.
pub fn other_cause(cause: &Cause) -> Result<(), String> {
    Err(format!("unexpected evidence: {cause:?}"))
}
