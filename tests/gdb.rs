//! A debugger takes the threads of this crate for what they are.

mod support;

use std::process::{Command, Stdio};
use std::sync::{Arc, Barrier};

use support::{case, child, or_skip, skip};

const NAMES: [&str; 3] = ["alpha", "beta", "gamma"];

/// Three threads that wait in a Rust frame which the backtrace must show, until the parent closes our
/// standard input.
fn three_named_threads() {
    let started = Arc::new(Barrier::new(NAMES.len() + 1));
    let ended = Arc::new(Barrier::new(NAMES.len() + 1));
    let threads = NAMES.map(|name| {
        let (started, ended) = (Arc::clone(&started), Arc::clone(&ended));
        let body = move || wait_in_a_frame(&started, &ended);
        nptl::Builder::new()
            .name(name)
            .spawn(body)
            .expect("a thread")
    });
    started.wait();
    println!("READY");
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .expect("the end of the input");
    ended.wait();
    for thread in threads {
        thread.join().expect("no panic");
    }
}

#[inline(never)]
fn wait_in_a_frame(started: &Barrier, ended: &Barrier) {
    started.wait();
    ended.wait();
}

/// What gdb prints about one thread: the header line, and the frames from innermost to outermost.
struct Trace<'a> {
    header: &'a str,
    frames: Vec<&'a str>,
}

/// The sections of `thread apply all bt`, which start with `Thread N (...):`.
fn traces(text: &str) -> Vec<Trace<'_>> {
    let mut traces = Vec::<Trace>::new();
    for line in text.lines() {
        if line.starts_with("Thread ") && line.ends_with(':') {
            traces.push(Trace {
                header: line,
                frames: Vec::new(),
            });
        } else if let Some(trace) = traces.last_mut()
            && (line.starts_with('#') || line.starts_with("Backtrace stopped"))
        {
            trace.frames.push(line);
        }
    }
    traces
}

#[test]
fn gdb_lists_named_threads_and_ends_at_the_entry() {
    if case().is_some() {
        return three_named_threads();
    }
    if Command::new("gdb")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        skip!("gdb is not installed");
    }
    let name = "gdb_lists_named_threads_and_ends_at_the_entry";
    let mut threads = or_skip!(child(name, "three threads").spawn());
    let ready = threads.wait_for("READY");
    if !ready {
        threads.finish().success();
        panic!("the child ended well without starting its threads");
    }

    let gdb = Command::new("gdb")
        .args(["-nx", "-batch", "-p", &threads.pid().to_string()])
        .args(["-ex", "set width 0"])
        .args(["-ex", "info threads"])
        .args(["-ex", "thread apply all bt"])
        .env_remove("LD_PRELOAD")
        .stdin(Stdio::null())
        .output()
        .expect("gdb");
    let text = String::from_utf8_lossy(&gdb.stdout);
    let errors = String::from_utf8_lossy(&gdb.stderr);
    threads.finish().success();
    if errors.contains("ptrace: Operation not permitted") {
        skip!("gdb may not attach here");
    }
    let said = format!("--- gdb's stdout\n{text}\n--- gdb's stderr\n{errors}");

    for name in NAMES {
        // Without libthread_db's help gdb would list bare LWPs: "Thread 0x..." is its word for a thread
        // that it found in glibc's list.
        let listed = text.lines().find(|line| {
            line.trim_start_matches(['*', ' '])
                .starts_with(|c: char| c.is_ascii_digit())
                && line.contains("Thread 0x")
                && line.contains(&format!("\"{name}\""))
        });
        assert!(listed.is_some(), "no thread named {name}\n{said}");

        let traces = traces(&text);
        let trace = traces
            .iter()
            .find(|trace| trace.header.contains(&format!("\"{name}\"")))
            .unwrap_or_else(|| panic!("no backtrace of {name}\n{said}"));
        let outermost = trace.frames.last().copied().unwrap_or_default();
        assert!(
            outermost.starts_with('#') && outermost.contains("nptl_thread_entry"),
            "the backtrace of {name} does not end at the entry routine\n{said}"
        );
        let body = trace
            .frames
            .iter()
            .any(|frame| frame.contains("wait_in_a_frame"));
        assert!(
            body,
            "the closure of {name} is not in its backtrace\n{said}"
        );
    }
}

/// A directory that goes with the value.
struct Scratch(std::path::PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Is refused a thread while others live and stacks are cached, in two caches, and aborts.
fn abort_after_a_refusal(directory: &str) -> ! {
    std::env::set_current_dir(directory).expect("the scratch directory");
    support::set_rlimit(libc::RLIMIT_CORE, u64::MAX);
    let private = nptl::StackCache::new(nptl::StackCacheConfig::default());
    let started = Arc::new(Barrier::new(3));
    for (name, cache) in [("alive-global", None), ("alive-private", Some(&private))] {
        let started = Arc::clone(&started);
        let builder = nptl::Builder::new().name(name).stack_size(512 << 10);
        let builder = match cache {
            Some(cache) => builder.stack_cache(cache),
            None => builder,
        };
        let body = move || {
            started.wait();
            loop {
                // Not std's park, whose first call in a thread allocates: there is no memory soon.
                // SAFETY: pause has no preconditions.
                unsafe { libc::pause() };
            }
        };
        builder.spawn(body).expect("a thread").detach();
    }
    started.wait();
    support::set_rlimit(libc::RLIMIT_AS, 1 << 20);
    let refused = nptl::Builder::new().name("vcpu7").stack_size(8 << 20);
    assert!(refused.spawn(|| ()).is_err());
    // After the refusal, which gives cached stacks back.
    support::set_rlimit(libc::RLIMIT_AS, u64::MAX);
    let cached = nptl::Builder::new()
        .stack_cache(&private)
        .stack_size(64 << 10);
    let ended = cached.spawn(|| ()).expect("a thread");
    ended.join().expect("its end");
    // SAFETY: never returns.
    unsafe { libc::abort() }
}

/// What the engineer with a core dump does: two commands, without our source or debug information.
#[test]
fn a_core_file_tells_the_cause_and_the_stacks() {
    if let Some(directory) = case() {
        abort_after_a_refusal(&directory);
    }
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
    let pattern = pattern.trim();
    if pattern.is_empty() || pattern.starts_with('|') || pattern.contains('/') {
        skip!("kernel.core_pattern is {pattern:?}: no core file in the working directory");
    }
    let name = "a_core_file_tells_the_cause_and_the_stacks";
    let directory = std::env::temp_dir().join(format!("nptl-core-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a scratch directory");
    let directory = Scratch(directory);
    let output = or_skip!(child(name, &directory.0.display().to_string()).run());
    assert_eq!(output.signal(), Some(libc::SIGABRT), "{output}");
    let core = std::fs::read_dir(&directory.0)
        .expect("the scratch directory")
        .flatten()
        .map(|entry| entry.path())
        .next();
    let Some(core) = core else {
        skip!("the kernel wrote no core file, although kernel.core_pattern is {pattern:?}");
    };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/gdb/nptl.py");
    let gdb = Command::new("gdb")
        .args(["-nx", "-batch", "-ex", &format!("source {script}")])
        .args(["-ex", "nptl-failures", "-ex", "nptl-stacks"])
        .arg(std::env::current_exe().expect("this program"))
        .arg(&core)
        .env_remove("LD_PRELOAD")
        .stdin(Stdio::null())
        .output();
    let Ok(gdb) = gdb else {
        skip!("gdb is not installed");
    };
    let text = String::from_utf8_lossy(&gdb.stdout);
    let errors = String::from_utf8_lossy(&gdb.stderr);
    for part in [
        "step=map stack errno=ENOMEM cause=AddressSpace certainty=proven",
        "name=\"vcpu7\"",
        "RLIMIT_AS",
        "ulimit -v",
        "\"alive-global\"",
        "\"alive-private\"",
        "64 KiB private cache 1 cached",
        "512 KiB private cache 1 live",
        "512 KiB global cache    live",
        "2 live",
        "1 cached",
    ] {
        assert!(
            text.contains(part),
            "{part:?} is not in\n--- gdb's stdout\n{text}\n--- gdb's stderr\n{errors}"
        );
    }
}
