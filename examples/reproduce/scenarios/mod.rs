//! One scenario for each cause: a process in a sandbox that makes the limit real, asks for threads, and judges
//! the answers by what it knows of the limit.
//!
//! Shared by the example `reproduce` and the test of that name: both start themselves again for each process
//! of a scenario, each in its own way ([`StartCase`]).

mod adversary;
pub mod ask;
pub mod clone;
pub mod guardian;
mod machine;
mod memory;
mod memory_v2;
pub mod storm;
mod virtual_machines;

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

pub use ask::{Outcomes, Reply};

use ask::{Asker, tell_failure, tell_skip};
use support::{Child, Output, is_root};

/// Starts this program again for the case of that name.
pub type StartCase<'a> = dyn Fn(&str) -> Child + Sync + 'a;

/// How often nptl is asked under one limit, for the processes of a scenario.
const ROUNDS_VARIABLE: &str = "NPTL_REPRODUCE_ROUNDS";

/// What a scenario cannot run without.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Need {
    Root,
    /// Threads that no other process keeps from running. Without, a busy machine can be in the way.
    RootToBeSure,
    /// Root, or a kernel that lets users have user namespaces.
    UserNamespace,
    /// `kernel.pid_max` of a pid namespace of its own.
    Kernel6_14,
    /// A hierarchy with the memory controller, v1 or v2.
    MemoryCgroup,
    /// A v2 hierarchy with the memory controller.
    MemoryCgroupV2,
    /// A hierarchy with the pids controller, v1 or v2.
    PidsCgroup,
    /// A v2 hierarchy with the pids controller.
    PidsCgroupV2,
    /// The flag: it changes what the whole machine shares.
    MachineWide,
    /// Without it, the same with plain threads.
    KvmIfThere,
}

impl Need {
    pub fn text(self) -> &'static str {
        match self {
            Need::Root => "root",
            Need::RootToBeSure => "root, to be sure to meet it",
            Need::UserNamespace => "root or user namespaces",
            Need::Kernel6_14 => "Linux 6.14",
            Need::MemoryCgroup => "a memory cgroup",
            Need::MemoryCgroupV2 => "a v2 memory cgroup",
            Need::PidsCgroup => "a pids cgroup",
            Need::PidsCgroupV2 => "a v2 pids cgroup",
            Need::MachineWide => "--machine-wide",
            Need::KvmIfThere => "/dev/kvm if it is there",
        }
    }
}

type SetUp = fn(Child) -> Result<Child, String>;
type Provoke = fn(&mut Asker<'_>) -> Result<(), String>;

pub struct Scenario {
    pub name: &'static str,
    /// What stands in the way.
    pub what: &'static str,
    pub needs: &'static [Need],
    /// Describes the process's surroundings. `Err`: why they cannot be had.
    sandbox: SetUp,
    /// Runs inside. `Err`: why the limit cannot be met here.
    provoke: Provoke,
}

impl Scenario {
    pub fn needs(&self) -> String {
        match self.needs {
            [] => "nothing".to_owned(),
            needs => {
                let texts: Vec<_> = needs.iter().map(|need| need.text()).collect();
                texts.join(", ")
            }
        }
    }
}

/// Every scenario, in the order of the path: clone's checks as the kernel makes them, then memory, then stories.
pub fn all() -> impl Iterator<Item = &'static Scenario> {
    [
        clone::SCENARIOS,
        memory::SCENARIOS,
        virtual_machines::SCENARIOS,
        machine::SCENARIOS,
        adversary::SCENARIOS,
    ]
    .into_iter()
    .flatten()
}

pub fn by_name(name: &str) -> Option<&'static Scenario> {
    all().find(|scenario| scenario.name == name)
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Judged {
    Right,
    Wrong,
    Skipped,
}

/// What came out of a scenario.
#[derive(Debug, Serialize)]
pub struct Outcome {
    pub name: &'static str,
    pub what: &'static str,
    pub needs: &'static [Need],
    pub verdict: Judged,
    /// What is wrong, or why it was skipped.
    pub why: Vec<String>,
    pub pthread_create: Outcomes,
    pub std_thread: Outcomes,
    /// Threads that nptl created under the limit.
    pub nptl_granted: u64,
    /// Its refusals.
    pub answers: Vec<Reply>,
    pub notes: Vec<String>,
    pub seconds: f64,
    /// Where there was a storm under the limit.
    pub storm: Option<storm::Counts>,
}

impl Outcome {
    fn of(scenario: &Scenario, verdict: Judged, why: Vec<String>) -> Outcome {
        Outcome {
            name: scenario.name,
            what: scenario.what,
            needs: scenario.needs,
            verdict,
            why,
            pthread_create: Outcomes::default(),
            std_thread: Outcomes::default(),
            nptl_granted: 0,
            answers: Vec::new(),
            notes: Vec::new(),
            seconds: 0.0,
            storm: None,
        }
    }
}

/// Runs a scenario to its end. nptl is asked `rounds` times under its limit.
pub fn run(
    scenario: &'static Scenario,
    rounds: usize,
    machine_wide: bool,
    storm: Option<Duration>,
    start: &StartCase<'_>,
) -> Outcome {
    let began = Instant::now();
    if scenario.needs.contains(&Need::MachineWide) && !machine_wide {
        let why = "it changes what the whole machine shares: needs --machine-wide".to_owned();
        return Outcome::of(scenario, Judged::Skipped, vec![why]);
    }
    let mut child = start(scenario.name)
        .env(ROUNDS_VARIABLE, rounds.to_string())
        .time_limit(Duration::from_secs(120) + storm.unwrap_or_default());
    if let Some(storm) = storm {
        child = child.env(storm::VARIABLE, storm.as_millis().to_string());
    }
    let output = (scenario.sandbox)(child).and_then(Child::run);
    let mut outcome = match output {
        Ok(output) => judge(scenario, &output),
        Err(why) => Outcome::of(scenario, Judged::Skipped, vec![with_needs(scenario, &why)]),
    };
    outcome.seconds = began.elapsed().as_secs_f64();
    outcome
}

fn with_needs(scenario: &Scenario, why: &str) -> String {
    match scenario.needs {
        [] => why.to_owned(),
        _ => format!("{why} (needs {})", scenario.needs()),
    }
}

fn judge(scenario: &'static Scenario, output: &Output) -> Outcome {
    let mut wrong: Vec<String> = Vec::new();
    let mut outcome = Outcome::of(scenario, Judged::Right, Vec::new());
    // Each line was made by `report` in one write, so that processes of one scenario do not mix theirs.
    let tally = |key: &str, wrong: &mut Vec<String>| {
        let mut sum = Outcomes::default();
        for text in output.all(key) {
            match serde_json::from_str(text) {
                Ok(tally) => sum.add(&tally),
                Err(error) => wrong.push(format!("{key}: {error}: {text}")),
            }
        }
        sum
    };
    outcome.pthread_create = tally("pthread_create", &mut wrong);
    outcome.std_thread = tally("std::thread", &mut wrong);
    for text in output.all("answer") {
        match serde_json::from_str::<Reply>(text) {
            Ok(answer) => {
                wrong.extend(answer.wrong.clone());
                outcome.answers.push(answer);
            }
            Err(error) => wrong.push(format!("an answer: {error}: {text}")),
        }
    }
    for text in output.all("storm") {
        match serde_json::from_str(text) {
            Ok(counts) => outcome.storm.get_or_insert_default().add(&counts),
            Err(error) => wrong.push(format!("the storm: {error}")),
        }
    }
    let granted = output.all("granted").into_iter().map(str::parse::<u64>);
    outcome.nptl_granted = granted.flatten().sum();
    outcome.notes = output.all("note").into_iter().map(str::to_owned).collect();
    wrong.extend(output.all("failed").into_iter().map(str::to_owned));
    let skipped = output.get("skip");
    // A process that died on the way has proven nothing, whatever it said before.
    if !output.status.success() || output.timed_out.is_some() || output.get("done").is_none() {
        wrong.push(format!(
            "the process of the scenario did not end well: {output}"
        ));
    } else if skipped.is_none()
        && wrong.is_empty()
        && outcome.nptl_granted == 0
        && outcome.answers.is_empty()
        && outcome.storm.is_none()
    {
        wrong.push(format!("the scenario asked nothing: {output}"));
    }
    if !wrong.is_empty() {
        outcome.verdict = Judged::Wrong;
        outcome.why = wrong;
    } else if let Some(why) = skipped {
        outcome.verdict = Judged::Skipped;
        outcome.why = vec![with_needs(scenario, why)];
    }
    outcome
}

/// In a process that was started for `case`: does its part.
pub fn play(case: &str, start: &StartCase<'_>) {
    let (name, role) = case.split_once('/').unwrap_or((case, ""));
    let rounds = std::env::var(ROUNDS_VARIABLE).ok();
    let rounds = rounds.and_then(|text| text.parse().ok()).unwrap_or(1);
    match (by_name(name), role) {
        (Some(scenario), "") => {
            if let Err(why) = (scenario.provoke)(&mut Asker::new(rounds, start)) {
                tell_skip(&why);
            }
            support::report("done", "yes");
        }
        (Some(_), role) => virtual_machines::play(role, rounds),
        (None, _) => tell_failure(&format!("no scenario is named {name}")),
    }
}

/// No sandbox but the process.
fn plain(child: Child) -> Result<Child, String> {
    Ok(child)
}

/// Namespaces as root, or inside a user namespace as another user.
fn privileged(child: Child) -> Result<Child, String> {
    Ok(match is_root() {
        true => child,
        false => child.user_namespace(),
    })
}

/// A file whose whole content is a number.
fn number_in(path: impl AsRef<Path>) -> Result<u64, String> {
    let path = path.as_ref();
    let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let number = text.trim().parse();
    number.map_err(|_| format!("{}: {text:?} is no number", path.display()))
}

fn write(path: impl AsRef<Path>, value: impl ToString) -> Result<(), String> {
    let path = path.as_ref();
    std::fs::write(path, value.to_string()).map_err(|e| format!("{}: {e}", path.display()))
}
