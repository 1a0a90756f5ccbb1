//! Every row of the performance table in one run: floor, pthread, std, nptl, and what a program gains that only
//! preloads libnptl.so (where `cargo build --release -p nptl-preload` has made it), interleaved round by round, medians and the ratios they must reach. A missed target is a line in the table, never
//! a failure: machines are noisy.
//!
//! ```text
//! cargo build --release -p nptl-preload
//! cargo run --release --example compare -- [--quick] [--only ROW]... [--live N]... [--json FILE] [--svg DIR]
//! ```
//!
//! The JSON is a list of objects, one for each row and subject:
//!
//! | field | |
//! | --- | --- |
//! | `workload`, `subject` | their names |
//! | `threads` | number alive at once (burst, live), or of threads that spawn (contended); else 1 |
//! | `stack_bytes` | usable bytes of each stack |
//! | `median_ns`, `p10_ns`, `p90_ns` | nanoseconds a thread, over the rounds; a round's value is the mean of its threads |
//! | `samples` | number of rounds |
//!
//! The crowd row is an example of its own, `crowd`.

mod plot;

use std::error::Error;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use measure::preload::Alone;
use measure::summary::Figure;
use measure::workload::{self, COLD_TUNABLE, Row, Workload};
use measure::{Runner, SUBJECTS};

/// Compare the price of a thread: raw clone (floor), pthread_create, std::thread and nptl; and in processes of
/// their own the second and third without and with libnptl.so (preload (threads), interpose).
#[derive(Parser)]
struct Arguments {
    /// Only this row, or all rows of this workload (burst, contended, live); may be repeated.
    #[arg(long, value_name = "ROW")]
    only: Vec<String>,
    /// About 20 seconds instead of some minutes: fewer rounds, no large crowds.
    #[arg(long)]
    quick: bool,
    /// Also beside N live threads, as a row live-N; may be repeated. For many, see what the example
    /// crowd says about the limits.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1 << 22))]
    live: Vec<u32>,
    /// Print the names of the rows and stop.
    #[arg(long)]
    list: bool,
    /// Write all figures to FILE.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write plots (rows.svg, live.svg) into DIR.
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// Measure the chosen rows in this process and print their JSON: how a row with an environment
    /// of its own runs.
    #[arg(long, hide = true)]
    child: bool,
    /// Run the rounds of one row that standard input asks for: the process of a subject that is alone.
    #[arg(long, value_name = "SUBJECT", hide = true)]
    serve: Option<String>,
}

fn main() -> ExitCode {
    measure::exit_code(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let rows = chosen_rows(&arguments)?;
    if arguments.list {
        rows.iter().for_each(|row| println!("{}", row.label()));
        return Ok(());
    }
    if let (Some(subject), Some(row)) = (&arguments.serve, rows.first()) {
        return measure::preload::serve(subject, row);
    }
    if arguments.child {
        let mut figures = Vec::new();
        for row in &rows {
            figures.extend(measure_row(row, &ProgressBar::hidden())?);
        }
        serde_json::to_writer(io::stdout(), &figures)?;
        return Ok(());
    }
    // Before the minutes of measuring, not after them.
    if let Some(file) = &arguments.json {
        let writable = OpenOptions::new().create(true).append(true).open(file);
        writable.map_err(naming(file))?;
    }
    if let Some(directory) = &arguments.svg {
        fs::create_dir_all(directory).map_err(naming(directory))?;
    }

    // Counted in threads, because the rounds differ by their thousands.
    let progress = ProgressBar::new(rows.iter().map(steps).sum());
    progress.set_style(ProgressStyle::with_template(
        "{bar:40} {percent:>3}%, {eta} left: {msg}",
    )?);
    let mut figures = Vec::new();
    let mut before = 0;
    for (index, row) in rows.iter().enumerate() {
        if progress.is_hidden() {
            // No terminal: a line for the reader of the log.
            eprintln!("{}/{}: {}", index + 1, rows.len(), row.label());
        }
        progress.set_message(row.label());
        let measured = match row.workload {
            Workload::Cold | Workload::Lean => measure_in_child(row, arguments.quick),
            _ => measure_row(row, &progress),
        };
        match measured {
            Ok(measured) => figures.extend(measured),
            Err(error) => progress.suspend(|| eprintln!("{}: {error}", row.label())),
        }
        before += steps(row);
        progress.set_position(before);
    }
    progress.finish_and_clear();

    print_table(&rows, &figures);
    if let Some(file) = &arguments.json {
        fs::write(file, serde_json::to_string_pretty(&figures)?).map_err(naming(file))?;
    }
    if let Some(directory) = &arguments.svg {
        plot::rows(&directory.join("rows.svg"), &rows, &figures)?;
        plot::live(&directory.join("live.svg"), &figures)?;
    }
    Ok(())
}

fn naming(path: &Path) -> impl FnOnce(io::Error) -> String {
    move |error| format!("{}: {error}", path.display())
}

fn chosen_rows(arguments: &Arguments) -> Result<Vec<Row>, String> {
    let mut rows = workload::rows();
    let asked_for = |row: &Row| {
        let crowd = |threads: &u32| *threads as usize == row.threads;
        row.workload == Workload::Live && arguments.live.iter().any(crowd)
    };
    for &threads in &arguments.live {
        let row = workload::live_row(threads as usize);
        if !rows.iter().any(|other| other.label() == row.label()) {
            rows.push(row);
        }
    }
    let named = |row: &Row, only: &str| row.label() == only || row.workload.name() == only;
    if let Some(only) = arguments
        .only
        .iter()
        .find(|only| !rows.iter().any(|row| named(row, only)))
    {
        return Err(format!("no row or workload is named {only:?}; see --list"));
    }
    if !arguments.only.is_empty() {
        let chosen = |row: &Row| arguments.only.iter().any(|only| named(row, only));
        rows.retain(|row| chosen(row) || asked_for(row));
    }
    if arguments.quick {
        let crowd = |row: &Row| matches!(row.workload, Workload::Live | Workload::CrowdAgain);
        rows.retain(|row| !crowd(row) || row.threads <= 1_000 || asked_for(row));
        rows.iter_mut()
            .for_each(|row| row.rounds = (row.rounds / 6).max(5));
    }
    Ok(rows)
}

/// What the row is of the progress bar.
fn steps(row: &Row) -> u64 {
    row.rounds as u64 * row.threads_per_round()
}

/// A subject on its way through a row.
struct Entrant {
    subject: Box<dyn Runner>,
    samples: Vec<f64>,
    refusal: Option<io::Error>,
}

impl Entrant {
    /// Nanoseconds a thread, unless the subject has been refused one.
    fn round(&mut self, row: &Row) -> Option<f64> {
        if self.refusal.is_some() {
            return None;
        }
        let threads = row.iterations as f64 * row.threads_per_iteration() as f64;
        match self.subject.round(row, row.iterations) {
            Ok(time) => Some(time.as_nanos() as f64 / threads),
            Err(error) => {
                self.refusal = Some(error);
                None
            }
        }
    }
}

/// A figure for each subject that can run the row.
fn measure_row(row: &Row, progress: &ProgressBar) -> Result<Vec<Figure>, Box<dyn Error>> {
    let mut subjects = measure::subjects(row)?;
    match measure::preload::library() {
        Ok(library) => {
            let alone = Alone::subjects(row, &library)?.into_iter();
            subjects.extend(alone.map(|subject| Box::new(subject) as Box<dyn Runner>));
        }
        Err(why) => progress.suspend(|| eprintln!("{}: {why}", row.label())),
    }
    let mut entrants: Vec<_> = subjects
        .into_iter()
        .map(|subject| Entrant {
            subject,
            samples: Vec::with_capacity(row.rounds),
            refusal: None,
        })
        .collect();
    // Fills the caches and touches the code: every subject at its best.
    if row.workload != Workload::CrowdAgain {
        for entrant in &mut entrants {
            entrant.round(row);
        }
    }
    let before = nptl::StackCache::global().stats();
    for round in 0..row.rounds {
        // Another one goes first each time, so that what a subject leaves behind does not always
        // hit the same neighbour.
        for turn in 0..entrants.len() {
            let index = (round + turn) % entrants.len();
            let sample = entrants[index].round(row);
            entrants[index].samples.extend(sample);
        }
        progress.inc(row.threads_per_round());
    }
    match row.workload {
        Workload::CrowdAgain => {
            let after = nptl::StackCache::global().stats();
            let hits = after.hits - before.hits;
            let spawns = hits + after.misses - before.misses;
            progress.suspend(|| eprintln!("{}: nptl: {hits} hits of {spawns}", row.label()));
        }
        Workload::Lean => {
            for entrant in &entrants {
                let kept = resident_after(row, entrant)? / 1024;
                let (label, name) = (row.label(), entrant.subject.name());
                progress.suspend(|| {
                    eprintln!("{label}: {name}: 64 threads leave {kept} KiB resident");
                });
            }
        }
        _ => {}
    }
    // Two thousand of our 8 MiB stacks, kept for a burst, are nothing that a later row should meet.
    nptl::StackCache::global().clear();
    let mut figures = Vec::new();
    for Entrant {
        subject,
        samples,
        refusal,
    } in entrants
    {
        match refusal {
            None => figures.extend(Figure::new(row, subject.name(), samples)),
            // The others still stand beside each other.
            Some(error) => progress
                .suspend(|| eprintln!("{}: {} is left out: {error}", row.label(), subject.name())),
        }
    }
    Ok(figures)
}

/// Bytes that are resident when 64 threads have come and gone, and were not before.
fn resident_after(row: &Row, entrant: &Entrant) -> io::Result<usize> {
    let before = measure::proc::resident_bytes();
    entrant.subject.round(&workload::lean_burst(row), 1)?;
    Ok(measure::proc::resident_bytes().saturating_sub(before))
}

/// glibc reads its tunables once, at start.
fn measure_in_child(row: &Row, quick: bool) -> Result<Vec<Figure>, Box<dyn Error>> {
    let mut command = Command::new("/proc/self/exe");
    command
        .args(["--child", "--only", &row.label()])
        .env(COLD_TUNABLE.0, COLD_TUNABLE.1)
        .stderr(Stdio::inherit());
    if quick {
        command.arg("--quick");
    }
    let output = command.output()?;
    if !output.status.success() {
        return Err(format!("the child process ended with {}", output.status).into());
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

fn print_table(rows: &[Row], figures: &[Figure]) {
    println!(
        "{}; µs a thread: median [p10 p90]",
        measure::proc::machine()
    );
    print!("{:18}", "");
    SUBJECTS
        .iter()
        .for_each(|subject| print!("  {subject:<20}"));
    println!("  {:<14}  {:<8}  reached", "nptl is", "target");
    for row in rows {
        let figure = |subject: &str| {
            figures
                .iter()
                .find(|figure| figure.is_of(row) && figure.subject == subject)
        };
        print!("{:18}", row.label());
        for subject in SUBJECTS {
            let cell = figure(subject).map(|figure| {
                let [median, p10, p90] =
                    [figure.median_ns, figure.p10_ns, figure.p90_ns].map(|ns| ns / 1e3);
                format!("{median:.1} [{p10:.1} {p90:.1}]")
            });
            print!("  {:<20}", cell.as_deref().unwrap_or("–"));
        }
        // Rows without a target still say how they compare.
        let against = row
            .target
            .map_or(measure::pthread::NAME, |target| target.against);
        if let Some((ours, theirs)) = figure(measure::rust::NPTL).zip(figure(against)) {
            let ratio = ours.median_ns / theirs.median_ns;
            print!("  {:<14}", format!("{ratio:.2} × {against}"));
            if let Some(target) = row.target {
                let reached = if ratio <= target.ratio { "yes" } else { "NO" };
                print!("  {:<8}  {reached}", format!("≤ {:.2}", target.ratio));
            }
        }
        println!();
    }
    println!(
        "the crowd row is an example of its own: cargo run --release --example crowd -- 100000"
    );
}
