//! What settings, a setup and a start gate cost, against std's threads with the same made by hand.
//!
//! By hand no creator waits for a thread to be set up, so it cannot know that it is: the cheapest that std's threads can
//! be. Ours report before spawn returns.

use nptl::StartGate;
use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use super::Runner;
use super::rust::{NPTL, STD};
use super::workload::{Row, Workload};

const NAME: &str = "vcpu0";
const BLOCKED: libc::c_int = libc::SIGUSR1;

/// A round of one row.
type VcpuRound = fn(threads: usize, stack_bytes: usize) -> io::Result<()>;

/// One of the two.
pub struct Vcpus {
    name: &'static str,
    settings: VcpuRound,
    gate: VcpuRound,
}

/// std's threads, with everything in their closures.
pub const BY_HAND: Vcpus = Vcpus {
    name: STD,
    settings: settings_by_hand,
    gate: barrier,
};

/// Ours.
pub const BUILT: Vcpus = Vcpus {
    name: NPTL,
    settings,
    gate,
};

impl Runner for Vcpus {
    fn name(&self) -> &'static str {
        self.name
    }

    fn round(&self, row: &Row, iterations: u64) -> io::Result<Duration> {
        let round = match row.workload {
            Workload::Gate => self.gate,
            _ => self.settings,
        };
        let begin = Instant::now();
        for _ in 0..iterations {
            round(row.threads, row.stack_bytes)?;
        }
        Ok(begin.elapsed())
    }
}

fn panicked<T>(_: T) -> io::Error {
    io::Error::other("a panic")
}

fn refused(error: nptl::SetupError<Infallible>) -> io::Error {
    io::Error::other(error.to_string())
}

fn by_hand<T: Send + 'static>(
    stack_bytes: usize,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<std::thread::JoinHandle<T>> {
    std::thread::Builder::new()
        .name(NAME.to_owned())
        .stack_size(stack_bytes)
        .spawn(body)
}

fn builder(stack_bytes: usize) -> nptl::Builder {
    nptl::Builder::new().name(NAME).stack_size(stack_bytes)
}

fn settings_by_hand(_: usize, stack_bytes: usize) -> io::Result<()> {
    let body = || {
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
        match set {
            true => Ok(()),
            false => Err(io::Error::last_os_error()),
        }
    };
    by_hand(stack_bytes, body)?.join().map_err(panicked)?
}

fn settings(_: usize, stack_bytes: usize) -> io::Result<()> {
    let builder = builder(stack_bytes)
        .cpu_affinity([0])
        .blocked_signals([BLOCKED]);
    let thread = builder.spawn_with_setup(|| Ok::<_, Infallible>(()), |()| ());
    thread.map_err(refused)?.join().map_err(panicked)
}

fn barrier(threads: usize, stack_bytes: usize) -> io::Result<()> {
    let barrier = Arc::new(Barrier::new(threads + 1));
    let start = |_| {
        let barrier = Arc::clone(&barrier);
        by_hand(stack_bytes, move || {
            barrier.wait();
        })
    };
    let threads = (0..threads).map(start).collect::<io::Result<Vec<_>>>()?;
    barrier.wait();
    threads
        .into_iter()
        .try_for_each(|thread| thread.join().map_err(panicked))
}

fn gate(threads: usize, stack_bytes: usize) -> io::Result<()> {
    let gate = StartGate::new();
    let start = |_| {
        let builder = builder(stack_bytes).start_gate(&gate);
        let thread = builder.spawn_with_setup(|| Ok::<_, Infallible>(()), |()| ());
        thread.map_err(refused)
    };
    let threads = (0..threads).map(start).collect::<io::Result<Vec<_>>>()?;
    gate.open();
    threads
        .into_iter()
        .try_for_each(|thread| thread.join().map_err(panicked))
}
