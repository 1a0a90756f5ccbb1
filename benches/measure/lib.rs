//! What the benches and the examples measure, and how: the one home of the subjects and workloads
//! of the performance table. A figure means something only beside its neighbours, so every subject
//! runs the same generic code, and callers interleave the subjects round by round.
pub mod floor;
pub mod gate;
pub mod preload;
pub mod proc;
pub mod pthread;
pub mod refusal;
pub mod rust;
pub mod summary;
pub mod vcpus;
pub mod workload;

use std::error::Error;
use std::io;
use std::process::ExitCode;
use std::time::Duration;

use gate::Gate;
use workload::{Row, Workload};

/// What a started thread does before it ends.
#[derive(Clone, Copy)]
pub enum Load {
    /// Nothing: what is left is the price of a thread.
    Empty,
    /// Allocates and frees 20 small vectors; [`floor::Floor`] cannot, having no thread-local
    /// storage.
    Heap,
    /// Parks until the gate opens, which keeps all threads of a burst alive at once.
    Park(&'static Gate),
}

/// A way to start and join a thread.
pub trait Subject: Sync {
    /// What [`Subject::join`] needs.
    type Handle: Send;

    /// The name in tables, plots and JSON.
    fn name(&self) -> &'static str;

    /// Starts one thread.
    fn start(&self, body: Load) -> io::Result<Self::Handle>;

    /// Returns once the thread has ended.
    fn join(&self, handle: Self::Handle);
}

/// A [`Subject`] behind a pointer: the dispatch happens once a round, so that the loops inside stay
/// monomorphic and no subject pays for being measured.
pub trait Runner {
    /// See [`Subject::name`].
    fn name(&self) -> &'static str;

    /// Runs `iterations` of the row's workload and returns the time that counts.
    fn round(&self, row: &Row, iterations: u64) -> io::Result<Duration>;
}

impl<S: Subject> Runner for S {
    fn name(&self) -> &'static str {
        Subject::name(self)
    }

    fn round(&self, row: &Row, iterations: u64) -> io::Result<Duration> {
        workload::run(self, row, iterations)
    }
}

/// The names of all subjects, in the order of the tables.
pub const SUBJECTS: [&str; 8] = [
    floor::NAME,
    pthread::NAME,
    rust::STD,
    rust::NPTL,
    preload::PTHREAD,
    preload::PRELOAD,
    preload::STD,
    preload::INTERPOSE,
];

/// Those subjects that can run a row in this process, in the order of [`SUBJECTS`].
pub fn subjects(row: &Row) -> io::Result<Vec<Box<dyn Runner>>> {
    if matches!(row.workload, Workload::Settings | Workload::Gate) {
        return Ok(vec![Box::new(vcpus::BY_HAND), Box::new(vcpus::BUILT)]);
    }
    let mut subjects: Vec<Box<dyn Runner>> = Vec::new();
    if floor::AVAILABLE && row.workload != Workload::HeapWarm {
        subjects.push(Box::new(floor::Floor::new()));
    }
    subjects.push(Box::new(pthread::Pthread::new(row.stack_bytes)?));
    // A thread of std's is four mappings, and its start aborts the process where there is none left.
    if row.workload != Workload::CrowdAgain {
        subjects.push(Box::new(rust::Std::new(row.stack_bytes)));
    }
    subjects.push(Box::new(match row.workload {
        Workload::Cold => rust::Nptl::cold(row.stack_bytes),
        Workload::Lean => rust::Nptl::lean(row.stack_bytes),
        _ => rust::Nptl::new(row.stack_bytes),
    }));
    Ok(subjects)
}

/// The frame of an example's `main`: an error is a sentence for the user who typed the command, not its `Debug`,
/// and a reader that has seen enough (`| head`) ends the program, not a panic.
pub fn exit_code(run: fn() -> Result<(), Box<dyn Error>>) -> ExitCode {
    // SAFETY: the default action is no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The heap-warm body. A fresh heap cache pays for the first allocation of each size class, a
/// handed-over one does not.
pub fn allocate_and_free() {
    let vectors: [Vec<u8>; 20] = std::array::from_fn(|i| Vec::with_capacity(16 * (i + 1)));
    std::hint::black_box(&vectors);
}
