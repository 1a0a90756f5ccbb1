//! The stack cache at work: hits, misses, virtual and resident bytes while bursts of threads come
//! and go, and what `trim(0)` gives back.
//!
//! ```text
//! cargo run --release --example stack_cache -- [--threads N] [--stack-size BYTES] [--touch BYTES]
//! [--bursts N] [--resident-budget BYTES] [--keep-resident BYTES]
//! ```
//!
//! A line is printed whenever a quarter of a burst has started or ended, while the rest of it is on
//! its way. Resident bytes of cached stacks are the cache's own account, an upper bound; `process`
//! is what the kernel says of the whole process (VmRSS).

use std::error::Error;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use nptl::{Builder, StackCache, StackCacheConfig};

use measure::gate::Gate;
use measure::proc;
use support::touch_stack;

/// Watch the stack cache over some bursts of threads.
#[derive(Parser)]
struct Arguments {
    /// Threads alive at once in a burst.
    #[arg(long, default_value_t = 256)]
    threads: usize,
    /// Usable bytes of each stack.
    #[arg(long, value_name = "BYTES", default_value_t = 8 * 1024 * 1024)]
    stack_size: usize,
    /// Bytes of its stack that each thread uses.
    #[arg(long, value_name = "BYTES", default_value_t = 128 * 1024)]
    touch: usize,
    /// Number of bursts.
    #[arg(long, default_value_t = 3)]
    bursts: usize,
    /// The cache's budget of resident bytes; its default, if absent.
    #[arg(long, value_name = "BYTES")]
    resident_budget: Option<usize>,
    /// Resident bytes that each cached stack keeps; the cache's default, if absent.
    #[arg(long, value_name = "BYTES")]
    keep_resident: Option<usize>,
}

fn main() -> ExitCode {
    measure::exit_code(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    static GATE: Gate = Gate::new();
    let arguments = Arguments::parse();
    let mut config = StackCacheConfig::default();
    if let Some(bytes) = arguments.resident_budget {
        config = config.resident_budget(bytes);
    }
    if let Some(bytes) = arguments.keep_resident {
        config = config.keep_resident(bytes);
    }
    let cache = StackCache::new(config);
    let touch = arguments.touch.min(arguments.stack_size / 2);
    let quarter = arguments.threads.div_ceil(4).max(1);

    let watch = Watch::new(&cache);
    watch.line("before");
    let mut refusal = None;
    for burst in 1..=arguments.bursts {
        let mut handles = Vec::new();
        while handles.len() < arguments.threads {
            let body = move || {
                touch_stack(touch);
                GATE.wait();
            };
            let spawned = Builder::new()
                .stack_size(arguments.stack_size)
                .stack_cache(&cache)
                .spawn(body);
            match spawned {
                Ok(handle) => handles.push(handle),
                Err(error) => {
                    // The next burst meets the same limit.
                    refusal = Some(error);
                    break;
                }
            }
            if handles.len() % quarter == 0 {
                watch.line(&format!("burst {burst}: started {}", handles.len()));
            }
        }
        GATE.await_arrivals(handles.len());
        watch.line(&format!("burst {burst}: {} running", handles.len()));
        GATE.open();
        for (index, handle) in handles.into_iter().enumerate() {
            handle.join().expect("the bodies do not panic");
            if (index + 1) % quarter == 0 {
                watch.line(&format!("burst {burst}: joined {}", index + 1));
            }
        }
        GATE.close();
        if refusal.is_some() {
            break;
        }
    }
    let before = proc::resident_bytes();
    cache.trim(0);
    watch.line("after trim(0)");
    let after = proc::resident_bytes();
    println!(
        "trim(0) gave {:.1} MiB back to the kernel; {:.1} MiB are left in the process",
        mib(before.saturating_sub(after)),
        mib(after)
    );
    refusal.map_or(Ok(()), |error| Err(error.into()))
}

/// The table, a line a look.
struct Watch<'a> {
    cache: &'a StackCache,
    began: Instant,
}

impl Watch<'_> {
    /// Prints the head of the table.
    fn new(cache: &StackCache) -> Watch<'_> {
        println!(
            "{:32} |{:>15} |{:>25} |{:>17} |{:>17}",
            "", "stacks", "spawns", "virtual MiB", "resident MiB"
        );
        println!(
            "{:24}{:>8} |{:>7}{:>8} |{:>8}{:>8}{:>9} |{:>9}{:>8} |{:>8}{:>9}",
            "",
            "ms",
            "live",
            "cached",
            "hits",
            "misses",
            "evicted",
            "mapped",
            "cached",
            "cached",
            "process"
        );
        Watch {
            cache,
            began: Instant::now(),
        }
    }

    fn line(&self, when: &str) {
        let time = self.began.elapsed().as_secs_f64() * 1e3;
        let stats = self.cache.stats();
        println!(
            "{when:24}{time:>8.1} |{:>7}{:>8} |{:>8}{:>8}{:>9} |{:>9.1}{:>8.1} |{:>8.1}{:>9.1}",
            stats.live_stacks,
            stats.cached_stacks,
            stats.hits,
            stats.misses,
            stats.evictions,
            mib(stats.mapped_virtual_bytes),
            mib(stats.cached_virtual_bytes),
            mib(stats.cached_resident_bytes),
            mib(proc::resident_bytes()),
        );
    }
}

fn mib(bytes: usize) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
