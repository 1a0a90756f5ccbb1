//! What settings, a setup and a start gate cost, against std's threads with the same made by hand.
//!
//! ```text
//! cargo run --release --example vcpus -- [ROUNDS]
//! ```
//!
//! Rounds of the two take turns; medians of all rounds are printed.

use nptl::{Builder, StartGate};
use std::convert::Infallible;
use std::error::Error;
use std::process::ExitCode;
use std::sync::{Arc, Barrier, mpsc};
use std::time::Instant;

const VCPUS: usize = 64;
const STACK: usize = 256 << 10;
const BLOCKED: libc::c_int = libc::SIGUSR1;

fn main() -> ExitCode {
    measure::exit_code(run)
}

fn run() -> Result<(), Box<dyn Error>> {
    let rounds = std::env::args()
        .nth(1)
        .map_or(Ok(60), |rounds| rounds.parse())?;
    nptl::prepare()?;
    compare(
        "64 vCPUs created, opened, joined: a thread",
        rounds,
        VCPUS,
        barrier,
        gate,
    )?;
    compare(
        "the same, each set up before it waits",
        rounds,
        VCPUS,
        barrier_and_setup,
        gate_and_setup,
    )?;
    compare(
        "one thread: name, affinity, mask, setup",
        rounds * 20,
        1,
        by_hand,
        settings,
    )
}

type Round = fn() -> Result<(), Box<dyn Error>>;

fn compare(
    what: &str,
    rounds: usize,
    threads: usize,
    std: Round,
    nptl: Round,
) -> Result<(), Box<dyn Error>> {
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        for (round, times) in [std, nptl].into_iter().zip(&mut times) {
            let begin = Instant::now();
            round()?;
            times.push(begin.elapsed().as_secs_f64() * 1e6 / threads as f64);
        }
    }
    let [std, nptl] = times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times.get(times.len() / 2).copied().unwrap_or_default()
    });
    println!(
        "{what:<44} std {std:>6.1} µs, nptl {nptl:>6.1} µs: {:.2}",
        nptl / std
    );
    Ok(())
}

fn of_std(body: impl FnOnce() + Send + 'static) -> std::io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new()
        .name("vcpu0".to_owned())
        .stack_size(STACK)
        .spawn(body)
}

fn of_nptl() -> Builder {
    Builder::new().name("vcpu0").stack_size(STACK)
}

fn barrier() -> Result<(), Box<dyn Error>> {
    let barrier = Arc::new(Barrier::new(VCPUS + 1));
    let start = |_| {
        let barrier = Arc::clone(&barrier);
        of_std(move || {
            barrier.wait();
        })
    };
    let threads = (0..VCPUS).map(start).collect::<Result<Vec<_>, _>>()?;
    barrier.wait();
    for thread in threads {
        thread.join().map_err(|_| "a panic")?;
    }
    Ok(())
}

fn gate() -> Result<(), Box<dyn Error>> {
    let gate = StartGate::new();
    let start = |_| of_nptl().start_gate(&gate).spawn(|| ());
    let threads = (0..VCPUS).map(start).collect::<Result<Vec<_>, _>>()?;
    gate.open();
    for thread in threads {
        thread.join().map_err(|_| "a panic")?;
    }
    Ok(())
}

/// Each tells by a channel that it is set up, and the creator waits for it before it makes the next.
fn barrier_and_setup() -> Result<(), Box<dyn Error>> {
    let barrier = Arc::new(Barrier::new(VCPUS + 1));
    let (done, set_up) = mpsc::channel();
    let mut threads = Vec::new();
    for _ in 0..VCPUS {
        let (barrier, done) = (Arc::clone(&barrier), done.clone());
        threads.push(of_std(move || {
            if done.send(()).is_ok() {
                barrier.wait();
            }
        })?);
        set_up.recv()?;
    }
    barrier.wait();
    for thread in threads {
        thread.join().map_err(|_| "a panic")?;
    }
    Ok(())
}

fn gate_and_setup() -> Result<(), Box<dyn Error>> {
    let gate = StartGate::new();
    let start = |_| {
        let builder = of_nptl().start_gate(&gate);
        builder.spawn_with_setup(|| Ok::<_, Infallible>(()), |()| ())
    };
    let threads = (0..VCPUS).map(start).collect::<Result<Vec<_>, _>>()?;
    gate.open();
    for thread in threads {
        thread.join().map_err(|_| "a panic")?;
    }
    Ok(())
}

fn by_hand() -> Result<(), Box<dyn Error>> {
    let (done, set_up) = mpsc::channel();
    let thread = of_std(move || {
        // SAFETY: sets of this thread's own, for this thread.
        let set = unsafe {
            let mut cpus: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(0, &mut cpus);
            let mut mask: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&raw mut mask, BLOCKED);
            libc::sched_setaffinity(0, size_of_val(&cpus), &raw const cpus) == 0
                && libc::pthread_sigmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut())
                    == 0
        };
        let _ = done.send(set);
    })?;
    let set = set_up.recv()?;
    thread.join().map_err(|_| "a panic")?;
    set.then_some(())
        .ok_or_else(|| "a setting was refused".into())
}

fn settings() -> Result<(), Box<dyn Error>> {
    let thread = of_nptl()
        .cpu_affinity([0])
        .blocked_signals([BLOCKED])
        .spawn_with_setup(|| Ok::<_, Infallible>(()), |()| ())?;
    thread.join().map_err(|_| "a panic".into())
}
