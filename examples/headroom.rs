//! How many more threads fit: every limit that thread creation meets, how full it is, and which comes first.
//!
//! ```text
//! cargo run --release --example headroom -- [--pid N] [--stack-size BYTES] [--json]
//! ```

use clap::Parser;
use nptl::diagnose::{Headroom, HeadroomLimit};
use serde::Serialize;
use std::ops::RangeInclusive;

/// Show every limit that thread creation meets, how full it is, and which is reached first.
#[derive(Parser)]
struct Arguments {
    /// Another process instead of this one.
    #[arg(long, value_name = "N")]
    pid: Option<u32>,
    /// Usable bytes of each further stack; K, M and G are understood.
    #[arg(long, value_name = "BYTES", default_value = "2M", value_parser = bytes)]
    stack_size: usize,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A number of bytes, such as `65536`, `256K` or `8M`.
fn bytes(text: &str) -> Result<usize, String> {
    let digits = text.trim_end_matches(|unit: char| !unit.is_ascii_digit());
    let shift = match text.get(digits.len()..).unwrap_or_default() {
        "" => 0,
        "K" | "k" => 10,
        "M" | "m" => 20,
        "G" | "g" => 30,
        unit => return Err(format!("{unit:?} is not one of K, M and G")),
    };
    let number: usize = digits.parse().map_err(|error| format!("{error}"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "too large".to_owned())
}

/// One line of the table. `null` in JSON: it is not known; the largest number: there is no limit.
#[derive(Serialize)]
struct LimitRow {
    limit: String,
    unit: String,
    /// At least.
    in_use: Option<u64>,
    /// How much more may be in use.
    unseen: u64,
    maximum: Option<u64>,
    left: Option<u64>,
    /// At least and at most.
    threads_left: Option<(u64, u64)>,
    source: String,
}

#[derive(Serialize)]
struct Table {
    stack_bytes: usize,
    /// Index of the limit that is reached first, and after how many threads at least and at most.
    first: Option<(usize, u64, u64)>,
    limits: Vec<LimitRow>,
}

impl Table {
    fn new(headroom: &Headroom, stack_bytes: usize) -> Table {
        let limits = headroom.limits();
        let first = headroom.first(stack_bytes).and_then(|(first, threads)| {
            let index = limits.iter().position(|limit| std::ptr::eq(limit, first))?;
            Some((index, *threads.start(), *threads.end()))
        });
        let row = |limit: &HeadroomLimit| LimitRow {
            limit: limit.cause.title().to_owned(),
            unit: limit.unit.to_string(),
            in_use: limit.in_use,
            unseen: limit.unseen,
            maximum: limit.maximum,
            left: limit.left(),
            threads_left: headroom
                .threads_left(limit, stack_bytes)
                .map(RangeInclusive::into_inner),
            source: limit.source.clone(),
        };
        Table {
            stack_bytes,
            first,
            limits: limits.iter().map(row).collect(),
        }
    }

    fn print(&self) {
        let heads = ["limit", "in use", "maximum", "left", "threads", "unit"];
        let cells: Vec<[String; 6]> = self.limits.iter().map(LimitRow::cells).collect();
        let width = |column: usize| {
            let widths = cells.iter().map(|row| row[column].chars().count());
            widths.max().unwrap_or(0).max(heads[column].len())
        };
        let line = |row: &[String; 6], source: &str| {
            print!("{:<1$}", row[0], width(0));
            for (column, cell) in row.iter().enumerate().take(5).skip(1) {
                print!("  {cell:>0$}", width(column));
            }
            println!("  {:<1$}  {source}", row[5], width(5));
        };
        line(&heads.map(str::to_owned), "read from");
        for (row, cells) in self.limits.iter().zip(&cells) {
            line(cells, &row.source);
        }
        println!("? not known, - does not count for a new thread as things are");
        match self
            .first
            .and_then(|(index, least, most)| Some((self.limits.get(index)?, least, most)))
        {
            Some((row, least, most)) => println!(
                "first: {} after {} more threads with {} bytes of stack each",
                row.limit,
                between(least, most),
                self.stack_bytes
            ),
            None => println!("first: no limit that can be seen is in the way"),
        }
        for row in self.limits.iter().filter(|row| row.threads_left.is_none()) {
            println!("may come earlier: {} ({})", row.limit, row.source);
        }
    }
}

fn between(least: u64, most: u64) -> String {
    let shown = |number| match number {
        u64::MAX => "-".to_owned(),
        number => number.to_string(),
    };
    match least == most {
        true => shown(most),
        false => format!("{}..{}", shown(least), shown(most)),
    }
}

impl LimitRow {
    fn cells(&self) -> [String; 6] {
        let shown = |value: Option<u64>, none: &str| match value {
            None => "?".to_owned(),
            Some(u64::MAX) => none.to_owned(),
            Some(value) => value.to_string(),
        };
        [
            self.limit.clone(),
            shown(self.in_use, "?"),
            shown(self.maximum, "unlimited"),
            shown(self.left, "unlimited"),
            self.threads_left
                .map_or("?".to_owned(), |(least, most)| between(least, most)),
            self.unit.clone(),
        ]
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments = Arguments::parse();
    let headroom = match arguments.pid {
        None => nptl::headroom(),
        Some(pid) => {
            nptl::diagnose::headroom_of(pid).map_err(|error| format!("process {pid}: {error}"))?
        }
    };
    let table = Table::new(&headroom, arguments.stack_size);
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&table)?);
    } else {
        table.print();
    }
    Ok(())
}
