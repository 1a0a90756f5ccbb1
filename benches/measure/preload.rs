//! What an unmodified program gains by libnptl.so: glibc's and std's ways to create a thread, in a process of their own
//! with and without it. Such a pair is to be compared, and nothing else: how the scheduler places the threads differs from
//! one process to another.
//!
//! A round is a line with the number of iterations, answered with nanoseconds, so that it is interleaved with those of
//! the others.

use std::cell::RefCell;
use std::error::Error;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use super::workload::{Row, Workload};
use super::{Runner, pthread, rust};

/// The name of glibc's pthread_create in a process of its own.
pub const PTHREAD: &str = "pthread alone";
/// The name of std::thread in a process of its own.
pub const STD: &str = "std alone";
/// The name of pthread_create in an unmodified program under `LD_PRELOAD=libnptl.so`.
pub const PRELOAD: &str = "preload (threads)";
/// The name of std::thread on the same functions, as in a program that has the feature `interpose`.
pub const INTERPOSE: &str = "interpose";

/// The library beside this program, which `cargo build --release -p nptl-preload` makes.
///
/// # Errors
/// It is not there.
pub fn library() -> Result<PathBuf, String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let folder = program.ancestors().nth(2).unwrap_or(Path::new("."));
    let library = folder.join("libnptl.so");
    match library.exists() {
        true => Ok(library),
        false => Err(format!(
            "{} is not there: cargo build --release -p nptl-preload",
            library.display()
        )),
    }
}

/// A process that [serves](serve) rounds.
pub struct Alone {
    name: &'static str,
    process: RefCell<(Child, ChildStdin, BufReader<ChildStdout>)>,
}

impl Alone {
    /// Each with and without the library, for the rows that they can run: a cache is configured by code alone, and so not
    /// there.
    ///
    /// # Errors
    /// A process cannot be started.
    pub fn subjects(row: &Row, library: &Path) -> io::Result<Vec<Alone>> {
        let names: &[_] = match row.workload {
            Workload::Cold | Workload::Lean | Workload::Settings | Workload::Gate => &[],
            // As std among the others.
            Workload::CrowdAgain => &[PTHREAD, PRELOAD],
            _ => &[PTHREAD, PRELOAD, STD, INTERPOSE],
        };
        let start = |name: &&'static str| Alone::start(name, row, library);
        names.iter().map(start).collect()
    }

    fn start(name: &'static str, row: &Row, library: &Path) -> io::Result<Alone> {
        let mut command = Command::new("/proc/self/exe");
        if [PRELOAD, INTERPOSE].contains(&name) {
            command
                .env("LD_PRELOAD", library)
                .env("NPTL_MODE", "threads");
        }
        let mut child = command
            .args(["--serve", name, "--live", &row.threads.to_string()])
            .args(["--only", &row.label()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (input, output) = pipes.ok_or(io::ErrorKind::BrokenPipe)?;
        let process = RefCell::new((child, input, BufReader::new(output)));
        Ok(Alone { name, process })
    }
}

impl Runner for Alone {
    fn name(&self) -> &'static str {
        self.name
    }

    fn round(&self, _: &Row, iterations: u64) -> io::Result<Duration> {
        let (_, input, output) = &mut *self.process.borrow_mut();
        writeln!(input, "{iterations}")?;
        let mut line = String::new();
        output.read_line(&mut line)?;
        let time = line.trim().parse();
        let time = time.map_err(|_| io::Error::other(format!("its process says {line:?}")))?;
        Ok(Duration::from_nanos(time))
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        let (child, ..) = self.process.get_mut();
        // It may have ended; either way it is reaped.
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// The other end of an [`Alone`]: runs the rounds that standard input asks for, until it is closed.
///
/// # Errors
/// A round is refused a thread, or there is no subject of that name.
pub fn serve(name: &str, row: &Row) -> Result<(), Box<dyn Error>> {
    let subject: Box<dyn Runner> = match name {
        PTHREAD | PRELOAD => Box::new(pthread::Pthread::new(row.stack_bytes)?),
        STD | INTERPOSE => Box::new(rust::Std::new(row.stack_bytes)),
        _ => return Err(format!("no process is started for {name:?}").into()),
    };
    for line in io::stdin().lines() {
        let time = subject.round(row, line?.parse()?)?;
        println!("{}", time.as_nanos());
    }
    Ok(())
}
