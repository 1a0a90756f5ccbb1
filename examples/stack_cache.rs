//! The stack cache at work: hits, misses, virtual and resident bytes while bursts of threads come
//! and go, and what `trim(0)` gives back.
//!
//! ```text
//! cargo run --release --example stack_cache -- [--threads N] [--stack-size BYTES] [--touch BYTES]
//! [--bursts N]
//! ```

mod measure;

use std::error::Error;
use std::hint::black_box;

use clap::Parser;
use nptl::{Builder, StackCache, StackCacheConfig};

use measure::gate::Gate;
use measure::proc;

/// Watch the stack cache over some bursts of threads.
#[derive(Parser)]
struct Arguments {
    /// Threads alive at once in a burst.
    #[arg(long, default_value_t = 64)]
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

fn main() -> Result<(), Box<dyn Error>> {
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

    println!(
        "{:24}{:>8}{:>8}{:>8}{:>8}{:>10}{:>14}{:>15}{:>13}",
        "",
        "live",
        "cached",
        "hits",
        "misses",
        "evictions",
        "virtual MiB",
        "resident MiB",
        "process MiB"
    );
    show("before", &cache);
    for burst in 1..=arguments.bursts {
        let mut handles = Vec::with_capacity(arguments.threads);
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
                    println!("refused: {error}");
                    break;
                }
            }
            if handles.len() % quarter == 0 {
                show(&format!("burst {burst}: started {}", handles.len()), &cache);
            }
        }
        GATE.await_arrivals(handles.len());
        show(&format!("burst {burst}: all running"), &cache);
        GATE.open();
        for (index, handle) in handles.into_iter().enumerate() {
            handle.join().expect("the bodies do not panic");
            if (index + 1) % quarter == 0 {
                show(&format!("burst {burst}: joined {}", index + 1), &cache);
            }
        }
        GATE.close();
    }
    cache.trim(0);
    show("after trim(0)", &cache);
    Ok(())
}

fn show(when: &str, cache: &StackCache) {
    let stats = cache.stats();
    let mib = |bytes: f64| bytes / f64::from(1 << 20);
    println!(
        "{when:24}{:>8}{:>8}{:>8}{:>8}{:>10}{:>14.1}{:>15.2}{:>13.1}",
        stats.live_stacks,
        stats.cached_stacks,
        stats.hits,
        stats.misses,
        stats.evictions,
        mib(stats.cached_virtual_bytes as f64),
        mib(stats.cached_resident_bytes as f64),
        mib(proc::resident_bytes() as f64),
    );
}

/// Uses about `bytes` of the stack, from the top down.
fn touch_stack(bytes: usize) {
    let page = [1u8; 4096];
    black_box(&page);
    if bytes > page.len() {
        touch_stack(bytes - page.len());
    }
    // Keeps the frame, and so the page, in use below the call.
    black_box(&page);
}
