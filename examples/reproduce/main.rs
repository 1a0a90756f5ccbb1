//! Provokes every cause of a refused thread for real, and shows what pthread_create, std::thread and nptl say.
//!
//! ```text
//! cargo run --release --example reproduce -- [--list] [--only NAME]... [--json] [--report] [--rounds N] [--machine-wide]
//!     [--storm SECONDS]
//! ```
//!
//! Exit code 1: an answer was wrong. 2: a name or an option is unknown.

mod scenarios;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use scenarios::storm::Counts;
use scenarios::{Judged, Outcome, Scenario};

const HELP: &str = "\
Provoke every cause of a refused thread for real, each in a process of its own, and ask pthread_create, std::thread and
nptl what is wrong.

  --list          print the scenarios and what each needs, and stop
  --only NAME     only this scenario; may be repeated
  --json          print everything as JSON
  --report        print nptl's whole report of each refusal
  --rounds N      how often nptl is asked under each limit (default: 1)
  --machine-wide  run also what changes the whole machine for some milliseconds
                  (kernel.threads-max, vm.overcommit_memory)
  --storm SECONDS ask under each limit for a part of this time, by several threads at once where it stands before all of
                  them, and count the answers
";

#[derive(Default)]
struct Arguments {
    list: bool,
    only: Vec<String>,
    json: bool,
    storm: Option<u64>,
    report: bool,
    rounds: Option<usize>,
    machine_wide: bool,
}

impl Arguments {
    /// `Ok(None)` if only the help is wanted.
    fn parse(words: impl Iterator<Item = String>) -> Result<Option<Arguments>, String> {
        let mut arguments = Arguments::default();
        // `--option=value` is two words.
        let mut words = words.flat_map(|word| match word.split_once('=') {
            Some((option, value)) if word.starts_with("--") => {
                vec![option.to_owned(), value.to_owned()]
            }
            _ => vec![word],
        });
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| format!("{word} needs a value"));
            match &*word {
                "--list" => arguments.list = true,
                "--only" => arguments.only.push(value()?),
                "--json" => arguments.json = true,
                "--report" => arguments.report = true,
                "--rounds" => {
                    let text = value()?;
                    let rounds = text.parse();
                    arguments.rounds = Some(rounds.map_err(|_| format!("{text:?} is no number"))?);
                }
                "--storm" => {
                    let text = value()?;
                    let seconds = text.parse();
                    arguments.storm = Some(seconds.map_err(|_| format!("{text:?} is no number"))?);
                }
                "--machine-wide" => arguments.machine_wide = true,
                "--help" | "-h" => return Ok(None),
                _ => return Err(format!("there is no option {word:?}; --help prints all")),
            }
        }
        Ok(Some(arguments))
    }
}

#[derive(Serialize)]
struct Summary<'a> {
    right: usize,
    wrong: usize,
    skipped: usize,
    scenarios: &'a [Outcome],
}

fn main() -> ExitCode {
    if let Some(case) = support::case() {
        scenarios::play(&case, &support::program);
        return ExitCode::SUCCESS;
    }
    let usage = |why: String| {
        eprintln!("{why}");
        ExitCode::from(2)
    };
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(Some(arguments)) => arguments,
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(why) => return usage(why),
    };
    let chosen = match chosen(&arguments.only) {
        Ok(chosen) => chosen,
        Err(why) => return usage(why),
    };
    if arguments.list {
        return match list(&chosen) {
            // The reader has seen enough.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                eprintln!("{error}");
                ExitCode::FAILURE
            }
            _ => ExitCode::SUCCESS,
        };
    }
    let storm = arguments.storm.map(|seconds| {
        let each = seconds.saturating_mul(1000) / chosen.len().max(1) as u64;
        Duration::from_millis(each.max(50))
    });
    if storm.is_some() {
        println!(
            "| limit | granted | refused | proven | inferred | unknown | wrong | p50 µs | p99 µs |"
        );
        println!("| --- | --: | --: | --: | --: | --: | --: | --: | --: |");
    }
    let mut sum = Counts::default();
    let mut outcomes = Vec::new();
    for scenario in chosen {
        let prints = !arguments.json && storm.is_none();
        if prints {
            println!("{}: {}", scenario.name, scenario.what);
        }
        let rounds = arguments.rounds.unwrap_or(1).clamp(1, 5000);
        let machine_wide = arguments.machine_wide;
        let outcome = scenarios::run(scenario, rounds, machine_wide, storm, &support::program);
        if prints {
            print(&outcome, arguments.report);
        }
        if storm.is_some() {
            let counts = storm_of(&outcome);
            println!("| {} | {counts}", outcome.name);
            for note in outcome.notes.iter().chain(&outcome.why) {
                eprintln!("{}: {note}", outcome.name);
            }
            sum.add(&counts);
        }
        outcomes.push(outcome);
    }
    if storm.is_some() {
        println!("| all | {sum}");
        return match sum.wrong {
            0 => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        };
    }
    let count = |verdict| outcomes.iter().filter(|o| o.verdict == verdict).count();
    let summary = Summary {
        right: count(Judged::Right),
        wrong: count(Judged::Wrong),
        skipped: count(Judged::Skipped),
        scenarios: &outcomes,
    };
    if arguments.json {
        match serde_json::to_string_pretty(&summary) {
            Ok(text) => println!("{text}"),
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::FAILURE;
            }
        }
    } else {
        summarise(&summary);
    }
    match summary.wrong {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// What the storm brought, and where there was none, the answers of a plain run.
fn storm_of(outcome: &Outcome) -> Counts {
    let mut counts = outcome.storm.clone().unwrap_or_default();
    counts.granted += outcome.nptl_granted;
    for answer in &outcome.answers {
        match &*answer.certainty {
            "proven" => counts.proven += 1,
            "inferred" => counts.inferred += 1,
            _ => counts.unknown += 1,
        }
        counts.wrong += u64::from(answer.wrong.is_some());
    }
    counts
}

fn chosen(only: &[String]) -> Result<Vec<&'static Scenario>, String> {
    if only.is_empty() {
        return Ok(scenarios::all().collect());
    }
    let named = only.iter().map(|name| {
        scenarios::by_name(name)
            .ok_or_else(|| format!("no scenario is named {name:?}; --list prints all names"))
    });
    named.collect()
}

fn list(chosen: &[&Scenario]) -> io::Result<()> {
    let width = chosen.iter().map(|s| s.name.len()).max().unwrap_or(0);
    let mut output = io::stdout().lock();
    for scenario in chosen {
        writeln!(
            output,
            "{:width$}  {}\n{:width$}  needs {}",
            scenario.name,
            scenario.what,
            "",
            scenario.needs()
        )?;
    }
    output.flush()
}

fn print(outcome: &Outcome, report: bool) {
    match outcome.verdict {
        Judged::Skipped => println!("  skipped: {}\n", outcome.why.join("; ")),
        verdict => {
            println!("  pthread_create  {}", outcome.pthread_create);
            println!("  std::thread     {}", outcome.std_thread);
            print_nptl(outcome, report);
            for note in &outcome.notes {
                println!("  note            {note}");
            }
            match verdict {
                Judged::Right => println!("  right\n"),
                _ => println!("  WRONG: {}\n", outcome.why.join("\n    ")),
            }
        }
    }
}

/// Refusals that say the same are one line, however often they came.
fn print_nptl(outcome: &Outcome, report: bool) {
    match outcome.nptl_granted {
        0 => {}
        1 => println!("  nptl            granted once"),
        count => println!("  nptl            granted {count} times"),
    }
    let mut rest: Vec<_> = outcome.answers.iter().collect();
    while let Some(&first) = rest.first() {
        let key = |a: &scenarios::Reply| (a.step.clone(), a.cause.clone(), a.certainty.clone());
        let (alike, others): (Vec<_>, Vec<_>) =
            rest.into_iter().partition(|a| key(a) == key(first));
        rest = others;
        let mut spent: Vec<_> = alike.iter().map(|a| a.microseconds).collect();
        spent.sort_by(f64::total_cmp);
        let median = spent.get(spent.len() / 2).copied().unwrap_or_default();
        let times = match alike.len() {
            1 => String::new(),
            count => format!(" ({count} times)"),
        };
        println!(
            "  nptl            step={} errno={} cause={} certainty={}{}{}, found out in {median:.0} µs{times}",
            first.step,
            first.errno,
            first.cause,
            first.certainty,
            if first.transient { " transient" } else { "" },
            match first.attempts {
                1 => String::new(),
                attempts => format!(" attempts={attempts}"),
            },
        );
        println!("                  {}", first.text);
        if !first.alternatives.is_empty() {
            let others = first.alternatives.join(", ");
            println!("                  could also be: {others}");
        }
        if report {
            for line in first.report.lines() {
                println!("                  | {line}");
            }
        }
    }
}

fn summarise(summary: &Summary<'_>) {
    println!(
        "{} right, {} wrong, {} skipped",
        summary.right, summary.wrong, summary.skipped
    );
    for outcome in summary.scenarios {
        match outcome.verdict {
            Judged::Right => {}
            Judged::Skipped => println!("skipped: {}: {}", outcome.name, outcome.why.join("; ")),
            Judged::Wrong => println!("wrong: {}: {}", outcome.name, outcome.why.join("; ")),
        }
    }
}
