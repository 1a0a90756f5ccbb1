//! A crowd of live threads: 100,000 where the machine's limits allow them, a few thousand everywhere.

#[expect(dead_code, reason = "this crowd is awaited with a deadline")]
#[path = "../../benches/measure/gate.rs"]
mod gate;

use std::time::{Duration, Instant};

use gate::Gate;
use nptl::diagnose::Unit;
use nptl::{Builder, headroom};
use support::{Snapshot, case, child, kernel_at_least, or_skip, report};

const STACK: usize = 64 << 10;
/// What a thread may cost: docs/performance.md.
const RESIDENT: u64 = 10 << 10;
const MAPPINGS: usize = 100;
/// Memory that the kernel needs for a thread besides: its stack, its task, page tables.
const KERNEL: u64 = 30 << 10;

/// Why this machine cannot have so many more threads.
fn obstacle(threads: u64) -> Option<String> {
    if !kernel_at_least(6, 13) {
        return Some("guards are mappings of their own before kernel 6.13".to_owned());
    }
    let headroom = headroom();
    for limit in headroom.limits() {
        // The counts are the machine's: others come and go.
        let spare = if limit.unit == Unit::Tasks {
            threads / 50
        } else {
            0
        };
        match headroom.threads_left(limit, STACK) {
            Some(left) if *left.end() < threads + spare => {
                return Some(format!(
                    "{threads} threads do not fit {}: room for {} of {} ({})",
                    limit.cause,
                    left.end(),
                    limit.maximum.unwrap_or_default(),
                    limit.source
                ));
            }
            _ => {}
        }
    }
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let available = meminfo.lines().find_map(|line| {
        let kib = line.strip_prefix("MemAvailable:")?.strip_suffix("kB")?;
        kib.trim().parse::<u64>().ok()
    });
    let (available, needed) = (available? * 1024, threads * (RESIDENT + KERNEL));
    (available < needed).then(|| {
        format!("{threads} threads need {needed} bytes of memory, and {available} are available")
    })
}

fn crowd(threads: usize) {
    if let Some(why) = obstacle(threads as u64) {
        support::skip!("{why}");
    }
    Builder::new()
        .stack_size(STACK)
        .spawn(|| ())
        .unwrap()
        .join()
        .unwrap();
    static GATE: Gate = Gate::new();
    let mut handles = Vec::with_capacity(threads);
    // The first one's buffers are the second one's.
    Snapshot::take();
    let before = Snapshot::take();
    for number in 0..threads {
        match Builder::new().stack_size(STACK).spawn(|| GATE.wait()) {
            Ok(handle) => handles.push(handle),
            // Others may have taken what was there a moment ago.
            Err(error) if obstacle((threads - number) as u64).is_some() => {
                GATE.open();
                support::skip!("{number} of {threads} threads, then {error}");
            }
            Err(error) => panic!("{number} of {threads} threads, then {error}"),
        }
    }
    let deadline = Instant::now() + Duration::from_secs(120);
    while GATE.arrived() < threads {
        assert!(Instant::now() < deadline, "threads that never run");
        std::thread::yield_now();
    }
    let change = before.diff(&Snapshot::take());
    assert_eq!(change.kernel_threads, threads as i64);
    let mappings = before
        .maps
        .len()
        .checked_add_signed(change.mappings as isize)
        .unwrap();
    let each = change.resident_bytes as u64 / threads as u64;
    report(
        "figures",
        format_args!("{mappings} mappings, {each} resident bytes each"),
    );
    assert!(mappings <= MAPPINGS, "{mappings} mappings");
    assert!(each <= RESIDENT, "{each} resident bytes each");
    GATE.open();
    for handle in handles {
        handle.join().expect("its end");
    }
    let stats = nptl::StackCache::global().stats();
    assert_eq!(stats.live_stacks, 0, "{stats:?}");
    report("reached", threads);
}

fn reach(test: &str, threads: usize) {
    if case().is_some() {
        return crowd(threads);
    }
    let child = child(test, "run").time_limit(Duration::from_secs(300));
    let output = or_skip!(child.run()).success();
    if output.skipped().is_none() {
        assert_eq!(
            output.get("reached"),
            Some(threads.to_string().as_str()),
            "{output}"
        );
        println!(
            "{threads} threads: {}",
            output.get("figures").unwrap_or_default()
        );
    }
}

#[test]
fn thousands_live_at_once() {
    reach("crowd::thousands_live_at_once", 3_000);
}

#[test]
fn a_hundred_thousand_live_at_once() {
    reach("crowd::a_hundred_thousand_live_at_once", 100_000);
}
