//! Programs in C and C++, compiled here, with libnptl.so in front of their C library: in both modes they say and do what
//! they do without it.
//!
//! What a program prints is always the same where the C library is right, and is compared with what glibc makes it print.

mod refusals;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use support::{Child, Output, executable, or_skip, short_or_long};

const MODES: [&str; 2] = ["explain", "threads"];

fn sources() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/preload"))
}

/// Builds libnptl.so as it is shipped, and says where it is.
fn library() -> &'static Path {
    // A build that fails is not tried again for each test.
    static LIBRARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = LIBRARY.get_or_init(|| {
        let build = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--release", "--package", "nptl-preload"])
            .args(["--message-format", "json-render-diagnostics"])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .output()
            .map_err(|error| format!("cargo: {error}"))?;
        let stdout = String::from_utf8_lossy(&build.stdout);
        let mut words = stdout.split('"');
        let file = words.find(|word| word.ends_with("/libnptl.so"));
        let said = || String::from_utf8_lossy(&build.stderr).into_owned();
        file.map(PathBuf::from).ok_or_else(said)
    });
    built.as_deref().unwrap_or_else(|error| panic!("{error}"))
}

/// Compiles a program, or where its name says so the object that one loads, with the system's compiler.
fn compile(source: &str) -> PathBuf {
    let output = Path::new(env!("CARGO_TARGET_TMPDIR")).join(source.replace('.', "-"));
    let (compiler, options) = match source {
        "plugin.c" => ("cc", ["-shared", "-fPIC"]),
        // Symbols, for what looks itself up.
        _ if source.ends_with(".cc") => ("c++", ["-pthread", "-rdynamic"]),
        _ => ("cc", ["-pthread", "-rdynamic"]),
    };
    let run = Command::new(compiler)
        .args(["-O1", "-g", "-Wall", "-Wextra"])
        .args(options)
        .arg("-o")
        .arg(&output)
        .arg(sources().join(source))
        .args(["-lrt", "-lanl"])
        .output()
        .unwrap_or_else(|error| panic!("{compiler}: {error}"));
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{compiler} {source}: {said}");
    // GNU ld says of nested functions that they need an executable stack: that is what they are here for.
    let warned = said.contains(": warning: ") && source != "execstack.c";
    assert!(!warned, "{compiler} {source}: {said}");
    output
}

fn run(child: Child) -> Result<Output, String> {
    let limit = Duration::from_secs(short_or_long(120, 600) as u64);
    let output = child.time_limit(limit).run()?;
    assert!(output.timed_out.is_none(), "{output}");
    // What `must` of check.h says.
    assert!(!matches!(output.code(), Some(97 | 98)), "{output}");
    Ok(output)
}

fn preloaded(program: &Path, mode: &str) -> Child {
    executable(program)
        .env("LD_PRELOAD", library())
        .env("NPTL_MODE", mode)
}

fn compare(
    program: &Path,
    argument: Option<&OsStr>,
    settings: &[(&str, &str)],
) -> Result<(), String> {
    let with = |child: Child| {
        let child = argument.into_iter().fold(child, Child::arg);
        settings
            .iter()
            .fold(child, |child, &(name, value)| child.env(name, value))
    };
    let plain = run(with(executable(program)))?;
    for mode in MODES {
        let output = run(with(preloaded(program, mode)))?;
        let same = (output.status, &output.stdout, &output.stderr)
            == (plain.status, &plain.stdout, &plain.stderr);
        assert!(
            same,
            "{} {argument:?} in mode {mode}: {output}\nwithout the library: {plain}",
            program.display()
        );
    }
    Ok(())
}

fn check(source: &str, arguments: &[&str]) {
    let program = compile(source);
    if arguments.is_empty() {
        or_skip!(compare(&program, None, &[]));
    }
    for argument in arguments {
        or_skip!(compare(&program, Some(OsStr::new(argument)), &[]));
    }
}

/// The sources of the tests that are more than [`check`].
const OTHER_SOURCES: [&str; 7] = [
    "attributes.c",
    "dlopen.c",
    "plugin.c",
    "fork_storm.c",
    "random_ends.c",
    "refused_joins.c",
    "refused_sizes.c",
];

macro_rules! programs {
    ($($test:ident $source:literal $([$($argument:literal)+])?)*) => {
        $(
            #[test]
            fn $test() {
                check($source, &[$($($argument),+)?]);
            }
        )*

        #[test]
        fn all_are_run() {
            let run = [$($source),*];
            for entry in sources().read_dir().expect("the folder of the programs") {
                let name = entry.expect("an entry").file_name().into_string().expect("UTF-8");
                let is_program = name.ends_with(".c") || name.ends_with(".cc");
                let is_run = run.contains(&&*name) || OTHER_SOURCES.contains(&&*name);
                assert!(!is_program || is_run, "not run: {name}");
            }
        }
    };
}

programs! {
    threads_of_c11 "c11.c"
    cancellation "cancel.c"
    exceptions "exceptions.cc"
    executable_stacks "execstack.c"
    exit_of_a_thread "exit.c"
    fork_in_threads "fork.c"
    threads_of_libc_itself "helpers.c"
    join_and_detach "join.c"
    late_cancellation "late_cancel.c"
    exit_of_main "main_exit.c" ["alone" "last" "join" "exit" "another" "cancel" "after"]
    mutexes "mutexes.c"
    own_state "own_state.c"
    setid "setid.c"
    signals_and_scheduling "signals.c"
    stacks_and_guards "stacks.c"
    terminate "terminate.cc" ["plain" "look" "int" "noexcept" "std"]
}

#[test]
fn attributes() {
    // Mode `threads` says why CPUs that do not exist are refused.
    or_skip!(compare(
        &compile("attributes.c"),
        None,
        &[("NPTL_REPORT", "none")]
    ));
}

#[test]
fn an_object_that_is_loaded() {
    let plugin = compile("plugin.c");
    or_skip!(compare(&compile("dlopen.c"), Some(plugin.as_os_str()), &[]));
}

/// Compares a program that takes a number.
fn compare_with(source: &str, count: usize) {
    let count = count.to_string();
    or_skip!(compare(&compile(source), Some(OsStr::new(&count)), &[]));
}

#[test]
fn fork_storm() {
    compare_with("fork_storm.c", short_or_long(20, 1000));
}

#[test]
fn threads_end_in_every_way() {
    compare_with("random_ends.c", short_or_long(4000, 100_000));
}

/// Where glibc waits for ever, or says 0.
#[test]
fn joins_that_glibc_does_not_refuse() {
    let output = or_skip!(run(preloaded(&compile("refused_joins.c"), "threads")));
    let expected = "joined by another: join EINVAL, timedjoin EINVAL, tryjoin EBUSY\n\
        the first joiner: 0, 46\n\
        joined before: join ESRCH, detach ESRCH\n\
        one was refused: EDEADLK\n";
    assert_eq!(
        (&*output.stdout, &*output.stderr),
        (expected, ""),
        "{output}"
    );
}

/// The last word of the program is EINVAL: in mode `explain` that is the program's own mistake, and not a limit.
#[test]
fn a_size_that_is_refused() {
    let program = compile("refused_sizes.c");
    or_skip!(compare(&program, None, &[("NPTL_REPORT", "none")]));
    for (mode, certainties) in [
        ("explain", &["inferred", "inferred"][..]),
        ("threads", &["proven", "proven"]),
    ] {
        let output = or_skip!(run(preloaded(&program, mode)));
        let mut lines = output
            .stderr
            .lines()
            .filter(|line| line.starts_with("nptl: "));
        for certainty in certainties {
            let line = lines.next().unwrap_or_default();
            assert!(
                line.starts_with("nptl: pthread_create refused: "),
                "{output}"
            );
            let found = format!(" errno=ENOMEM cause=Overcommit certainty={certainty}: ");
            assert!(line.contains(&found), "{output}");
        }
    }
}

/// Whose threads they are: without this, everything above could be true of glibc's.
#[test]
fn the_mode_decides_who_makes_the_threads() {
    let program = compile("join.c");
    for (mode, cached) in [("explain", false), ("threads", true)] {
        let stats = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("stats-{mode}-{}", std::process::id()));
        let _ = std::fs::remove_file(&stats);
        or_skip!(run(preloaded(&program, mode).env("NPTL_STATS", &stats)));
        let text = std::fs::read_to_string(&stats).expect("the statistics");
        let _ = std::fs::remove_file(&stats);
        assert!(text.contains(&format!(" mode={mode} ")), "{text}");
        assert_eq!(!text.contains(" cache_hits=0 "), cached, "{text}");
    }
}
