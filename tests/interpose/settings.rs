//! The environment.

use std::fs;
use std::path::PathBuf;
use support::{Child, Output, case, child, or_skip, report};

/// A refusal that needs no limit.
fn refuse_one() {
    let errno = std::thread::Builder::new().stack_size(1 << 60).spawn(|| ());
    assert_eq!(support::errno(errno), Some(libc::EAGAIN));
}

fn refusing(test: &str) -> Child {
    child(test, "run").env("NPTL_MODE", "explain")
}

fn lines(text: &str) -> Vec<&str> {
    text.lines()
        .filter(|line| line.starts_with("nptl: "))
        .collect()
}

struct TempFile(PathBuf);

impl TempFile {
    fn new(name: &str) -> TempFile {
        let name = format!("nptl-{name}-{}", std::process::id());
        let file = TempFile(std::env::temp_dir().join(name));
        let _ = fs::remove_file(&file.0);
        file
    }

    fn text(&self) -> String {
        fs::read_to_string(&self.0).unwrap_or_default()
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn run(child: Child) -> Result<Output, String> {
    Ok(child.run()?.success())
}

#[test]
fn reports_go_where_the_environment_says() {
    let test = "settings::reports_go_where_the_environment_says";
    if case().is_some() {
        refuse_one();
        // In a directory that the program has changed since.
        std::env::set_current_dir("/").expect("the root");
        refuse_one();
        return;
    }
    let output = or_skip!(run(refusing(test)));
    assert_eq!(lines(&output.stderr).len(), 2, "{output}");
    let output = or_skip!(run(refusing(test).env("NPTL_REPORT", "stderr")));
    assert_eq!(lines(&output.stderr).len(), 2, "{output}");
    let output = or_skip!(run(refusing(test).env("NPTL_REPORT", "none")));
    assert_eq!(lines(&output.stderr), [""; 0], "{output}");

    let file = TempFile::new("report");
    for appended in [2, 4] {
        let output = or_skip!(run(refusing(test).env("NPTL_REPORT", &file.0)));
        assert_eq!(lines(&output.stderr), [""; 0], "{output}");
        assert_eq!(lines(&file.text()).len(), appended, "{}", file.text());
    }
    let whole = file.text();
    assert!(
        whole.contains("\ncall: pthread_create of the C library, refused with ENOMEM "),
        "{whole}"
    );
    assert!(whole.contains("\nwhat to change:\n"), "{whole}");

    let missing = "/nonexistent/directory/report";
    let output = or_skip!(run(refusing(test).env("NPTL_REPORT", missing)));
    let lines = lines(&output.stderr);
    assert_eq!(lines.len(), 4, "{output}");
    let complaint =
        format!("nptl: NPTL_REPORT={missing} cannot be opened: ENOENT: No such file or directory");
    assert_eq!(lines[0], complaint);
    assert!(lines[1].contains(" refused: "), "{output}");
}

#[test]
fn a_wrong_value_is_one_line_and_the_default() {
    let test = "settings::a_wrong_value_is_one_line_and_the_default";
    if case().is_some() {
        let thread = std::thread::spawn(|| nptl::StackCache::global().stats().live_stacks);
        report("own", thread.join().expect("a result") > 0);
        report("cached", nptl::StackCache::global().stats().cached_stacks);
        return;
    }
    for (name, value, line) in [
        (
            "NPTL_MODE",
            "thread",
            "nptl: NPTL_MODE=thread is ignored: it takes explain or threads",
        ),
        (
            "NPTL_REPORT",
            "",
            "nptl: NPTL_REPORT= is ignored: it takes stderr, none or a file",
        ),
        (
            "NPTL_STATS",
            "",
            "nptl: NPTL_STATS= is ignored: it takes a file",
        ),
        (
            "NPTL_CACHE_RESIDENT",
            "1M",
            "nptl: NPTL_CACHE_RESIDENT=1M is ignored: it takes a number of bytes",
        ),
    ] {
        let output = or_skip!(run(child(test, "run").env(name, value)));
        assert_eq!(lines(&output.stderr), [line], "{output}");
        assert_eq!(output.get("own"), Some("true"));
        assert_eq!(output.get("cached"), Some("1"), "{output}");
    }
    let output = or_skip!(run(child(test, "run").env("NPTL_CACHE_RESIDENT", "0")));
    assert_eq!(lines(&output.stderr), [""; 0], "{output}");
    assert_eq!(output.get("cached"), Some("0"), "{output}");
}

#[test]
fn statistics_are_written_at_exit() {
    let test = "settings::statistics_are_written_at_exit";
    if let Some(how) = case() {
        refuse_one();
        report("program", super::program());
        if how == "_exit" {
            // SAFETY: ends the process.
            unsafe { libc::_exit(0) };
        }
        return;
    }
    let file = TempFile::new("stats");
    let child = |case| {
        child(test, case)
            .env("NPTL_STATS", &file.0)
            .env("NPTL_REPORT", "none")
    };
    or_skip!(run(child("_exit")));
    assert_eq!(file.text(), "");
    let output = or_skip!(run(child("run")));
    let program = output.get("program").expect("a name");
    let text = file.text();
    let begin = format!("nptl:{program} mode=threads refusals=1 cache_hits=");
    assert!(text.starts_with(&begin), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

/// Stderr has no reader any more, and the program does not ignore SIGPIPE.
#[test]
fn a_report_that_nobody_reads_does_not_end_the_program() {
    let test = "settings::a_report_that_nobody_reads_does_not_end_the_program";
    if case().is_some() {
        let mut ends = [0; 2];
        // SAFETY: places for two descriptors, one of which takes the place of stderr.
        unsafe {
            libc::signal(libc::SIGPIPE, libc::SIG_DFL);
            assert_eq!(libc::pipe(ends.as_mut_ptr()), 0);
            libc::dup2(ends[1], 2);
            libc::close(ends[0]);
        }
        refuse_one();
        report("alive", "yes");
        return;
    }
    let output = or_skip!(run(refusing(test)));
    assert_eq!(output.get("alive"), Some("yes"));
}
