//! From samples to a figure.

use serde::{Deserialize, Serialize};

use super::workload::Row;

/// What one subject needed for one row, in nanoseconds a thread. The fields are the JSON's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Figure {
    /// The workload's name, without its parameters.
    pub workload: String,
    /// The subject's name.
    pub subject: String,
    /// Threads alive at once (burst, live), or threads that spawn (contended).
    pub threads: usize,
    /// Usable bytes of each stack.
    pub stack_bytes: usize,
    /// Half of the rounds were faster.
    pub median_ns: f64,
    /// A tenth of the rounds were faster.
    pub p10_ns: f64,
    /// A tenth of the rounds were slower.
    pub p90_ns: f64,
    /// Number of rounds.
    pub samples: usize,
}

impl Figure {
    /// `samples` holds a value a round: the mean over the threads of that round. `None` without
    /// samples.
    pub fn new(row: &Row, subject: &str, mut samples: Vec<f64>) -> Option<Figure> {
        samples.sort_by(f64::total_cmp);
        Some(Figure {
            workload: row.workload.name().to_owned(),
            subject: subject.to_owned(),
            threads: row.threads,
            stack_bytes: row.stack_bytes,
            median_ns: quantile(&samples, 0.5)?,
            p10_ns: quantile(&samples, 0.1)?,
            p90_ns: quantile(&samples, 0.9)?,
            samples: samples.len(),
        })
    }

    /// Whether this figure belongs to the row.
    pub fn is_of(&self, row: &Row) -> bool {
        self.workload == row.workload.name()
            && self.threads == row.threads
            && self.stack_bytes == row.stack_bytes
    }
}

/// Linear interpolation between the two nearest ranks of a sorted slice.
fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let rank = q * sorted.len().checked_sub(1)? as f64;
    let below = *sorted.get(rank.floor() as usize)?;
    let above = *sorted.get(rank.ceil() as usize)?;
    Some(below + (above - below) * rank.fract())
}
