//! A debugger takes the threads of this crate for what they are.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
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

/// gdb takes the loader for the program where `.ci/glibc-matrix` names it on the command line.
fn started_directly() -> Result<(), &'static str> {
    match std::env::var_os("NPTL_TEST_LOADER") {
        Some(_) => Err("started by a loader on the command line, of which gdb knows no symbols"),
        None => Ok(()),
    }
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
    or_skip!(started_directly());
    if Command::new("gdb")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_err()
    {
        skip!("gdb is not installed");
    }
    let name = "gdb::gdb_lists_named_threads_and_ends_at_the_entry";
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

/// A directory for one core file, if this kernel writes it where the process stands.
fn scratch(name: &str) -> Result<Scratch, String> {
    let pattern = std::fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap_or_default();
    let pattern = pattern.trim();
    if pattern.is_empty() || pattern.starts_with('|') || pattern.contains('/') {
        return Err(format!(
            "kernel.core_pattern is {pattern:?}: no core file in the working directory"
        ));
    }
    let directory = std::env::temp_dir().join(format!("nptl-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a scratch directory");
    Ok(Scratch(directory))
}

impl Scratch {
    fn core(&self) -> Result<PathBuf, String> {
        let entries = std::fs::read_dir(&self.0).expect("the scratch directory");
        let core = entries.flatten().map(|entry| entry.path()).next();
        core.ok_or_else(|| "the kernel wrote no core file".to_owned())
    }
}

/// What gdb prints of a core file, to both streams.
fn gdb(program: &Path, core: &Path, arguments: &[&str]) -> Result<[String; 2], String> {
    let gdb = Command::new("gdb")
        .args(["-nx", "-batch"])
        .args(arguments)
        .args(["-ex", "nptl-failures", "-ex", "nptl-stacks"])
        .arg(program)
        .arg(core)
        .env_remove("LD_PRELOAD")
        .stdin(Stdio::null())
        .output()
        .map_err(|_| "gdb is not installed".to_owned())?;
    Ok([&gdb.stdout, &gdb.stderr].map(|text| String::from_utf8_lossy(text).into_owned()))
}

#[track_caller]
fn expect_all(parts: &[&str], [text, errors]: &[String; 2]) {
    for part in parts {
        assert!(
            text.contains(part),
            "{part:?} is not in\n--- gdb's stdout\n{text}\n--- gdb's stderr\n{errors}"
        );
    }
}

/// What the engineer with a core dump does: two commands, without our source or debug information.
#[test]
fn a_core_file_tells_the_cause_and_the_stacks() {
    if let Some(directory) = case() {
        abort_after_a_refusal(&directory);
    }
    let name = "gdb::a_core_file_tells_the_cause_and_the_stacks";
    or_skip!(started_directly());
    let directory = or_skip!(scratch("core"));
    let output = or_skip!(child(name, &directory.0.display().to_string()).run());
    assert_eq!(output.signal(), Some(libc::SIGABRT), "{output}");
    let core = or_skip!(directory.core());
    let source = concat!("source ", env!("CARGO_MANIFEST_DIR"), "/gdb/nptl.py");
    let program = std::env::current_exe().expect("this program");
    let said = or_skip!(gdb(&program, &core, &["-ex", source]));
    expect_all(
        &[
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
        ],
        &said,
    );
}

/// A program as it is shipped: of another package, optimised, without debug information.
fn shipped_program() -> PathBuf {
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("shipped");
    let manifest = format!(
        "[package]\nname = \"shipped\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\n\
         [dependencies]\nnptl = {{ path = {:?} }}\n\n[workspace]\n",
        env!("CARGO_MANIFEST_DIR")
    );
    let main = r#"
        fn main() {
            let alive = nptl::Builder::new().name("alive").stack_size(512 << 10);
            let (started, running) = std::sync::mpsc::channel();
            let body = move || {
                started.send(()).unwrap();
                std::thread::sleep(std::time::Duration::MAX)
            };
            alive.spawn(body).unwrap().detach();
            running.recv().unwrap();
            let refused = nptl::Builder::new().name("vcpu7").stack_size(1 << 50);
            assert!(refused.spawn(|| ()).is_err());
            std::process::abort();
        }
    "#;
    std::fs::create_dir_all(directory.join("src")).expect("a folder");
    let lock = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock");
    std::fs::copy(lock, directory.join("Cargo.lock")).expect("Cargo.lock");
    std::fs::write(directory.join("Cargo.toml"), manifest).expect("Cargo.toml");
    std::fs::write(directory.join("src/main.rs"), main).expect("main.rs");
    let built = Command::new(env!("CARGO"))
        .args(["build", "--release", "--offline", "--target-dir", "target"])
        .current_dir(&directory)
        .stdin(Stdio::null())
        .output()
        .expect("cargo");
    let said = String::from_utf8_lossy(&built.stderr);
    assert!(built.status.success(), "{said}");
    directory.join("target/release/shipped")
}

/// rustc embeds the script into programs with debug information alone.
#[test]
fn a_shipped_program_brings_the_commands_itself() {
    let built = shipped_program();
    for (strip, option) in [("debug", "--strip-debug"), ("symbols", "--strip-all")] {
        let program = built.with_file_name(format!("shipped-{strip}"));
        let mut command = Command::new("strip");
        let stripped = command
            .args([option, "-o"])
            .args([&program, &built])
            .status();
        assert!(or_skip!(stripped.map_err(|e| format!("no strip: {e}"))).success());
        let directory = or_skip!(scratch(strip));
        let status = Command::new("sh")
            .args(["-c", "ulimit -c unlimited && exec \"$0\""])
            .arg(&program)
            .current_dir(&directory.0)
            .stdin(Stdio::null())
            .status()
            .expect("sh");
        assert_eq!(status.signal(), Some(libc::SIGABRT), "{status}");
        let core = or_skip!(directory.core());
        let allowed = format!("set auto-load safe-path {}", env!("CARGO_TARGET_TMPDIR"));
        let said = or_skip!(gdb(&program, &core, &["-iex", &allowed]));
        expect_all(
            &[
                "step=map stack errno=ENOMEM cause=AddressSpaceExhausted certainty=proven",
                "name=\"vcpu7\"",
                "512 KiB global cache    live",
                "\"alive\"",
                "1 live",
            ],
            &said,
        );
    }
}
