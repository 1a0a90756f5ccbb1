//! Every scenario of the example `reproduce`, whose processes ask pthread_create, with and without libnptl.so in front of
//! it: the same errno, and a report that names what the scenario has put in the way.

#[path = "../../examples/reproduce/scenarios/mod.rs"]
mod scenarios;

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use nptl::diagnose::CauseKind;
use scenarios::{Judged, Outcome, Scenario};

use super::{MODES, library};

const TEST: &str = "refusals::the_report_names_what_refused_pthread_create";

/// The file that a process of any user can append its reports to.
struct Reports(PathBuf);

impl Reports {
    fn new() -> Reports {
        // Not sticky: there, fs.protected_regular keeps others from opening it with O_CREAT.
        let folder = std::env::temp_dir().join(format!("nptl-reports-{}", std::process::id()));
        fs::create_dir(&folder).expect("a folder");
        let reports = Reports(folder);
        fs::set_permissions(&reports.0, Permissions::from_mode(0o777)).expect("its mode");
        fs::write(reports.file(), "").expect("a file");
        fs::set_permissions(reports.file(), Permissions::from_mode(0o666)).expect("its mode");
        reports
    }

    fn file(&self) -> PathBuf {
        self.0.join("reports")
    }

    /// The first line of each.
    fn take(&self) -> Vec<String> {
        let text = fs::read_to_string(self.file()).expect("the reports");
        fs::write(self.file(), "").expect("the file");
        let lines = text.lines().filter(|line| line.starts_with("nptl: "));
        lines.map(str::to_owned).collect()
    }
}

impl Drop for Reports {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn run(scenario: &'static Scenario, preload: Option<(&str, &Reports)>) -> Outcome {
    let start = |case: &str| {
        // Whatever the library has in its cache, a thread of std that is granted can meet the limit there.
        let child = support::child(TEST, case).no_signal_stacks();
        match preload {
            Some((mode, reports)) => child
                .env("LD_PRELOAD", library())
                .env("NPTL_MODE", mode)
                // Nothing is kept that could be used again or given back under a limit, as the scenarios clear their own.
                .env("NPTL_CACHE_RESIDENT", "0")
                .env("NPTL_REPORT", reports.file()),
            None => child,
        }
    };
    scenarios::run(scenario, 1, false, None, &start)
}

/// What the scenario has put in the way, by its own judgement of nptl's answers.
fn truth(scenario: &Scenario, plain: &Outcome) -> BTreeSet<String> {
    let known = match scenario.name {
        // Where nptl waits until it is granted a thread, or may say that it does not know.
        "sibling-exec" | "sibling-exec-no-retry" => Some(CauseKind::SiblingExec),
        "join-then-spawn" | "join-then-spawn-no-retry" => Some(CauseKind::UserProcesses),
        _ => None,
    };
    let known = known.map(|kind| format!("{kind:?}"));
    let answers = plain.answers.iter().map(|answer| answer.cause.clone());
    answers.chain(known).collect()
}

/// What is in the way is not there for every request, and can be gone when the analysis looks.
const COMES_AND_GOES: [&str; 6] = [
    "sibling-exec",
    "sibling-exec-no-retry",
    "dying-pid-namespace",
    "join-then-spawn",
    "join-then-spawn-no-retry",
    // Other tasks of the cgroup leave room.
    "memory-cgroup",
];

/// Nothing is asked again behind two filters.
const TWO_FILTERS: &str = "seccomp-clone";

/// What is wrong in this mode.
fn differences(
    scenario: &'static Scenario,
    plain: &Outcome,
    mode: &str,
    reports: &Reports,
) -> Vec<String> {
    let outcome = run(scenario, Some((mode, reports)));
    let lines = reports.take();
    match outcome.verdict {
        Judged::Right => {}
        Judged::Skipped => {
            let why = outcome.why.join("; ");
            support::announce_skip(&format!("{} in mode {mode}: {why}", scenario.name));
            return Vec::new();
        }
        Judged::Wrong => return outcome.why,
    }
    let mut wrong = Vec::new();
    let (found, expected) = (&outcome.pthread_create, &plain.pthread_create);
    let comes_and_goes = COMES_AND_GOES.contains(&scenario.name);
    let same = match comes_and_goes {
        true => found.refused.keys().all(|errno| errno == "EAGAIN"),
        false => found.refused == expected.refused && found.granted == expected.granted,
    };
    if !same {
        wrong.push(format!("pthread_create: {found}, but without: {expected}"));
    }
    let kinds = truth(scenario, plain);
    let mut named = 0;
    for line in &lines {
        let value = |key: &str| {
            line.split_once(key)
                .and_then(|(_, rest)| rest.split([' ', ':']).next())
        };
        let (Some(cause), Some(certainty)) = (value(" cause="), value(" certainty=")) else {
            wrong.push(format!("not a report: {line}"));
            continue;
        };
        let right = match (mode, certainty) {
            ("explain", "proven") => false,
            (_, "unknown") => {
                comes_and_goes || scenario.name == TWO_FILTERS || kinds.contains(cause)
            }
            _ => {
                named += 1;
                kinds.contains(cause)
            }
        };
        if !right {
            wrong.push(format!("{line}, but it is {kinds:?}"));
        }
    }
    // EINVAL is nothing that mode `explain` looks into.
    let is_limit = |errno| found.refused.contains_key(errno);
    let asked = !comes_and_goes && (is_limit("EAGAIN") || is_limit("ENOMEM"));
    if asked && named == 0 && scenario.name != TWO_FILTERS {
        wrong.push(format!("{found}, and no report names why: {lines:?}"));
    }
    println!(
        "{} in mode {mode}: {found}; {named} of {} reports name a cause",
        scenario.name,
        lines.len()
    );
    wrong
}

#[test]
fn the_report_names_what_refused_pthread_create() {
    if let Some(case) = support::case() {
        scenarios::play(&case, &|case| support::child(TEST, case));
        return;
    }
    let reports = Reports::new();
    let mut wrong = Vec::new();
    for scenario in scenarios::all() {
        let plain = run(scenario, None);
        match plain.verdict {
            Judged::Right => {}
            Judged::Skipped => {
                let why = plain.why.join("; ");
                support::announce_skip(&format!("{}: {why}", scenario.name));
                continue;
            }
            Judged::Wrong => {
                wrong.push(format!("{}: {}", scenario.name, plain.why.join("\n")));
                continue;
            }
        }
        for mode in MODES {
            let found = differences(scenario, &plain, mode, &reports);
            wrong.extend(
                found
                    .into_iter()
                    .map(|why| format!("{} in mode {mode}: {why}", scenario.name)),
            );
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
