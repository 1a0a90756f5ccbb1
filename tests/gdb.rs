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
