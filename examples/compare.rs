//! Every row of the performance table in one run: floor, pthread, std and nptl, interleaved round
//! by round, medians and the ratios they must reach. A missed target is a line in the table, never
//! a failure: machines are noisy.
//!
//! ```text
//! cargo run --release --example compare -- [--quick] [--only ROW]... [--json FILE] [--svg DIR]
//! ```

mod measure;
#[path = "measure/plot.rs"]
mod plot;

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use measure::SUBJECTS;
use measure::summary::Figure;
use measure::workload::{self, COLD_TUNABLE, Row, Workload};

/// Compare the price of a thread: raw clone (floor), pthread_create, std::thread and nptl.
#[derive(Parser)]
struct Arguments {
    /// Only this row, or all rows of this workload (burst, contended, live); may be repeated.
    #[arg(long, value_name = "ROW")]
    only: Vec<String>,
    /// About 20 seconds instead of some minutes: fewer rounds, no large crowds.
    #[arg(long)]
    quick: bool,
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
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments = Arguments::parse();
    let rows = chosen_rows(&arguments)?;
    if arguments.list {
        rows.iter().for_each(|row| println!("{}", row.label()));
        return Ok(());
    }
    if arguments.child {
        let mut figures = Vec::new();
        for row in &rows {
            figures.extend(measure_row(row, &ProgressBar::hidden())?);
        }
        serde_json::to_writer(io::stdout(), &figures)?;
        return Ok(());
    }

    let progress = ProgressBar::new(rows.iter().map(|row| row.rounds as u64).sum());
    progress.set_style(ProgressStyle::with_template(
        "{bar:40} {pos}/{len} rounds, {eta} left: {msg}",
    )?);
    let mut figures = Vec::new();
    for row in &rows {
        progress.set_message(row.label());
        let measured = match row.workload {
            Workload::Cold => measure_in_child(row, arguments.quick),
            _ => measure_row(row, &progress).map_err(Into::into),
        };
        match measured {
            Ok(measured) => figures.extend(measured),
            Err(error) => progress.suspend(|| eprintln!("{}: {error}", row.label())),
        }
        if row.workload == Workload::Cold {
            progress.inc(row.rounds as u64);
        }
    }
    progress.finish_and_clear();

    print_table(&rows, &figures);
    if let Some(file) = &arguments.json {
        std::fs::write(file, serde_json::to_string_pretty(&figures)?)?;
    }
    if let Some(directory) = &arguments.svg {
        std::fs::create_dir_all(directory)?;
        plot::rows(&directory.join("rows.svg"), &rows, &figures)?;
        plot::live(&directory.join("live.svg"), &figures)?;
    }
    Ok(())
}

fn chosen_rows(arguments: &Arguments) -> Result<Vec<Row>, String> {
    let mut rows = workload::rows();
    let named = |row: &Row, only: &str| row.label() == only || row.workload.name() == only;
    if let Some(only) = arguments
        .only
        .iter()
        .find(|only| !rows.iter().any(|row| named(row, only)))
    {
        return Err(format!("no row or workload is named {only:?}; see --list"));
    }
    if !arguments.only.is_empty() {
        rows.retain(|row| arguments.only.iter().any(|only| named(row, only)));
    }
    if arguments.quick {
        rows.retain(|row| row.workload != Workload::Live || row.threads <= 1_000);
        rows.iter_mut()
            .for_each(|row| row.rounds = (row.rounds / 6).max(5));
    }
    Ok(rows)
}

/// A figure for each subject that can run the row.
fn measure_row(row: &Row, progress: &ProgressBar) -> io::Result<Vec<Figure>> {
    let subjects = measure::subjects(row)?;
    let mut samples = vec![Vec::with_capacity(row.rounds); subjects.len()];
    // Fills the caches and touches the code: every subject at its best.
    for subject in &subjects {
        subject.round(row, row.iterations)?;
    }
    for round in 0..row.rounds {
        // Another one goes first each time, so that what a subject leaves behind does not always
        // hit the same neighbour.
        for turn in 0..subjects.len() {
            let index = (round + turn) % subjects.len();
            let time = subjects[index].round(row, row.iterations)?;
            samples[index].push(
                time.as_nanos() as f64
                    / (row.iterations as f64 * row.threads_per_iteration() as f64),
            );
        }
        progress.inc(1);
    }
    // Two thousand of our 8 MiB stacks, kept for a burst, are nothing that a later row should meet.
    nptl::StackCache::global().clear();
    let figures = subjects
        .iter()
        .zip(samples)
        .filter_map(|(subject, samples)| Figure::new(row, subject.name(), samples));
    Ok(figures.collect())
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
    println!("µs a thread: median [p10 p90]");
    print!("{:18}", "");
    SUBJECTS
        .iter()
        .for_each(|subject| print!("  {subject:<20}"));
    println!("  {:<9} {:<16} reached", "ratio", "target");
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
            let verdict = row.target.map_or(String::new(), |target| {
                let reached = if ratio <= target.ratio { "yes" } else { "NO" };
                format!("≤ {:.2} × {against:<8} {reached}", target.ratio)
            });
            print!("  {ratio:<9.2} {verdict}");
        }
        println!();
    }
    println!("the crowd row is an example of its own: crowd");
}
