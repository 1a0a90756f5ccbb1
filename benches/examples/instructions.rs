//! A fixed number of hot spawn+joins of one subject, for a tool that counts instructions: see
//! benches/callgrind.sh.
//!
//! ```text
//! cargo run --release --example instructions -- SUBJECT N
//! ```

use std::error::Error;
use std::process::ExitCode;

use measure::workload::{self, Workload};

fn main() -> ExitCode {
    measure::exit_code(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let usage = || format!("usage: instructions {} N", measure::SUBJECTS.join("|"));
    let mut arguments = std::env::args().skip(1);
    let (subject, iterations) = arguments.next().zip(arguments.next()).ok_or_else(usage)?;
    let iterations: u64 = iterations.parse().map_err(|_| usage())?;

    let row = workload::rows()
        .into_iter()
        .find(|row| row.workload == Workload::Hot)
        .ok_or("no hot row")?;
    let subjects = measure::subjects(&row)?;
    let subject = subjects
        .iter()
        .find(|candidate| candidate.name() == subject)
        .ok_or_else(usage)?;
    subject.round(&row, iterations)?;
    Ok(())
}
