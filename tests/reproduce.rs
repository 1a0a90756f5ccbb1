//! Every scenario of the example `reproduce`, fifty times under each limit: the right cause, with its
//! certainty, and never a wrong name. Then two limits close together, and limits that flicker because other
//! processes come and go.

#[path = "../examples/reproduce/scenarios/mod.rs"]
mod scenarios;

use std::ffi::CString;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nptl::diagnose::CauseKind;
use nptl::{Builder, Cause, Certainty, RetryPolicy, SpawnError, diagnose};
use scenarios::Judged;
use scenarios::guardian::GuardedFile;
use support::{
    Cgroup, Child, Sleepers, become_unused_user, case, child, inherited_cgroup, or_skip, report,
    set_rlimit,
};

/// How often nptl is asked under each limit.
const ROUNDS: usize = 50;

fn check(test: &str, name: &str) {
    let start = |case: &str| support::child(test, case);
    if let Some(case) = support::case() {
        scenarios::play(&case, &start);
        return;
    }
    let scenario = scenarios::by_name(name).expect("a scenario");
    let outcome = scenarios::run(scenario, ROUNDS, false, None, &start);
    match outcome.verdict {
        Judged::Right => {
            let asked = outcome.nptl_granted + outcome.answers.len() as u64;
            let least = match name {
                "dying-pid-namespace" => scenarios::clone::DYING_ROUNDS,
                _ => ROUNDS,
            };
            assert!(asked >= least as u64, "asked {asked} times only");
            // Each answer may be that it is not known, but not all of them.
            let named = |answer: &scenarios::Reply| answer.cause == "SiblingExec";
            if name == "sibling-exec-no-retry" {
                let count = outcome
                    .answers
                    .iter()
                    .filter(|&answer| named(answer))
                    .count();
                println!("{count} of {} refusals named", outcome.answers.len());
                assert!(count > 0, "never named: {:?}", outcome.answers);
            }
        }
        Judged::Skipped => support::announce_skip(&outcome.why.join("; ")),
        Judged::Wrong => panic!("{name}:\n{}", outcome.why.join("\n")),
    }
}

macro_rules! scenarios {
    ($($test:ident $name:literal)*) => {
        $(
            #[test]
            fn $test() {
                check(stringify!($test), $name);
            }
        )*

        /// No scenario of the example is left out here.
        #[test]
        fn all_are_tested() {
            let tested = [$($name),*];
            let missing: Vec<_> = scenarios::all()
                .map(|scenario| scenario.name)
                .filter(|name| !tested.contains(name))
                .collect();
            assert!(missing.is_empty(), "not tested: {missing:?}");
        }
    };
}

scenarios! {
    first_spawn "first-spawn"
    rlimit_nproc "rlimit-nproc"
    seccomp_clone3 "seccomp-clone3"
    seccomp_clone "seccomp-clone"
    deadline "deadline"
    sibling_exec "sibling-exec"
    sibling_exec_no_retry "sibling-exec-no-retry"
    pid_numbers "pid-numbers"
    pid_numbers_outer "pid-numbers-outer"
    dying_pid_namespace "dying-pid-namespace"
    unshared_pid_namespace "unshared-pid-namespace"
    pids_cgroup "pids-cgroup"
    pids_cgroup_ancestor "pids-cgroup-ancestor"
    pids_cgroup_borrowed "pids-cgroup-borrowed"
    pids_cgroup_hidden "pids-cgroup-hidden"
    pod_limit "pod-limit"
    join_then_spawn "join-then-spawn"
    join_then_spawn_no_retry "join-then-spawn-no-retry"
    rlimit_as "rlimit-as"
    rlimit_data "rlimit-data"
    max_map_count "max-map-count"
    memlock "memlock"
    overcommit_0 "overcommit-0"
    memory_cgroup "memory-cgroup"
    memory_cgroup_ancestor "memory-cgroup-ancestor"
    virtual_machines "virtual-machines"
    threads_max "threads-max"
    overcommit_2 "overcommit-2"
    filter_exact_clone "filter-exact-clone"
    filter_kills_clone3 "filter-kills-clone3"
    filter_mmap_flags "filter-mmap-flags"
    notify_filter "notify-filter"
    tracer "tracer"
    exec_without_clone3 "exec-without-clone3"
    nproc_raised "nproc-raised"
    prefault "prefault"
    rlimit_data_zero "rlimit-data-zero"
    address_space_noise "address-space-noise"
    covered_pid_max "covered-pid-max"
    covered_meminfo "covered-meminfo"
}

/// Several threads ask at once.
#[test]
fn a_storm_makes_no_answer_wrong() {
    let test = "a_storm_makes_no_answer_wrong";
    let start = |case: &str| child(test, case);
    if let Some(name) = case() {
        return scenarios::play(&name, &start);
    }
    for name in [
        "rlimit-nproc",
        "pids-cgroup",
        "pid-numbers",
        "rlimit-as",
        "notify-filter",
    ] {
        let scenario = scenarios::by_name(name).expect("a scenario");
        let time = Some(Duration::from_millis(200));
        let outcome = scenarios::run(scenario, 1, false, time, &start);
        if outcome.verdict == scenarios::Judged::Skipped {
            support::announce_skip(&outcome.why.join("; "));
            continue;
        }
        let counts = outcome.storm.expect("counts");
        println!("| {name} | {counts}");
        assert!(counts.refusals() > 0, "{name}: never refused");
        assert_eq!(counts.wrong, 0, "{name}: {:?}", outcome.notes);
    }
}

/// Spawns until nptl has been refused `ROUNDS` times, or for long enough, and reports what it said.
fn collect(policy: RetryPolicy, judge: impl Fn(&SpawnError) -> Result<(), String>) {
    let began = Instant::now();
    let mut refusals = Vec::with_capacity(ROUNDS);
    let mut granted = 0;
    while refusals.len() < ROUNDS && began.elapsed() < Duration::from_secs(6) {
        match Builder::new()
            .stack_size(64 << 10)
            .retry(policy)
            .spawn(|| ())
        {
            Ok(thread) => {
                granted += 1;
                thread.join().expect("its end");
            }
            Err(error) => refusals.push(error),
        }
    }
    report("granted", granted);
    report("refusals", refusals.len());
    for error in &refusals {
        let proven = error.certainty() == Certainty::Proven;
        let what = format!("{:?} {}", error.cause().kind(), error.certainty());
        report(if proven { "proven" } else { "not proven" }, what);
        if let Err(why) = judge(error) {
            report("wrong", format_args!("{why}: {error}"));
        }
    }
}

/// The thread that is asked for is the first that meets the limit: nptl has prepared itself before.
fn prepare() {
    let threads = scenarios::ask::threads();
    let thread = nptl::spawn(|| ()).expect("a thread without limits");
    thread.join().expect("its end");
    scenarios::ask::await_reaping(threads);
}

fn named(error: &SpawnError, kinds: &[CauseKind]) -> Result<(), String> {
    match kinds.contains(&error.cause().kind()) {
        true => Ok(()),
        false => Err(format!("only {kinds:?} can be right")),
    }
}

/// The directory of a cgroup, where one is named, and the limit. None is named where it was full at no reading.
fn cgroup_named(error: &SpawnError, path: &std::path::Path, most: u64) -> Result<(), String> {
    match *error.cause() {
        Cause::PidsCgroup(diagnose::PidsCgroup {
            directory, maximum, ..
        }) if !directory.is_empty()
            && (directory.to_str() != path.to_str() || maximum != Some(most)) =>
        {
            Err("another cgroup, or another limit".to_owned())
        }
        _ => Ok(()),
    }
}

fn run_case(test: &str, name: &str, sandbox: impl FnOnce(Child) -> Result<Child, String>) {
    let output = or_skip!(sandbox(child(test, name)).and_then(Child::run)).success();
    if output.skipped().is_some() {
        return;
    }
    // Otherwise something else than the case has ended the process.
    let ended = output.stdout.contains("test result: ok.");
    assert!(ended, "{name}: {output}");
    assert_eq!(output.all("wrong"), Vec::<&str>::new(), "{name}");
    let refusals: usize = output
        .get("refusals")
        .expect("a count")
        .parse()
        .expect("a number");
    let mut others = output.all("not proven");
    others.sort_unstable();
    others.dedup();
    println!(
        "{name}: {} granted, {refusals} refusals, {} of them proven, else {others:?}",
        output.get("granted").unwrap_or_default(),
        output.all("proven").len(),
    );
    // The default policy can wait until noise leaves room, every time; then it was asked in vain.
    let patient = name.ends_with(", default");
    let granted = output.get("granted").is_some_and(|count| count != "0");
    assert!(refusals > 0 || patient && granted, "{name}: never refused");
}

/// One limit is full and another leaves room for exactly one more task, both ways.
#[test]
fn of_two_limits_close_together_the_one_that_refused_is_named() {
    let test = "of_two_limits_close_together_the_one_that_refused_is_named";
    if let Some(name) = case() {
        return meet_two_limits(&name);
    }
    for name in ["cgroup full, user nearly", "user full, cgroup nearly"] {
        run_case(test, name, |child| Ok(child.cgroup(&Cgroup::pids()?)));
    }
    for name in ["cgroup full, numbers nearly", "numbers full, cgroup nearly"] {
        run_case(test, name, |child| {
            Ok(child.pid_namespace(Some(400)).cgroup(&Cgroup::pids()?))
        });
    }
}

fn meet_two_limits(name: &str) {
    prepare();
    let cgroup = inherited_cgroup(0);
    let (full, nearly) = name.split_once(", ").expect("two words");
    let full = full.strip_suffix(" full").expect("full");
    let nearly = nearly.strip_suffix(" nearly").expect("nearly");
    let room = |limit: &str| u64::from(limit != full);
    let mut sleepers = Sleepers::default();
    if [full, nearly].contains(&"numbers") {
        sleepers.add(500).expect_err("no number left");
        sleepers.remove(room("numbers") as usize);
    }
    let most = cgroup.tasks() + room("cgroup");
    if [full, nearly].contains(&"user") {
        // Opened by root; the limit of an unused user counts this process's tasks only, as the cgroup does.
        let tasks = cgroup.tasks();
        cgroup.set("pids.max", most);
        or_skip!(become_unused_user());
        set_rlimit(libc::RLIMIT_NPROC, tasks + room("user"));
    } else {
        cgroup.set("pids.max", most);
    }
    let kind = match full {
        "cgroup" => CauseKind::PidsCgroup,
        "user" => CauseKind::UserProcesses,
        _ => CauseKind::PidNumbers,
    };
    collect(RetryPolicy::default(), |error| {
        named(error, &[kind])?;
        match error.certainty() {
            Certainty::Proven => cgroup_named(error, cgroup.path(), most),
            _ => Err("not proven".to_owned()),
        }
    });
}

/// Processes that fork and let the child end, all the time; each of the first `count` counts itself.
fn make_noise(count: usize) {
    // SAFETY: getpid has no preconditions.
    let parent = unsafe { libc::getpid() };
    for _ in 0..count {
        // SAFETY: the child runs alone, makes only system calls, and never returns.
        let pid = unsafe { libc::fork() };
        assert_ne!(pid, -1, "{}", std::io::Error::last_os_error());
        if pid == 0 {
            // SAFETY: as above.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                while libc::getppid() == parent {
                    // Long enough for a thread to get through now and then.
                    libc::usleep(100);
                    match libc::fork() {
                        0 => libc::_exit(0),
                        -1 => {}
                        pid => {
                            libc::waitpid(pid, std::ptr::null_mut(), 0);
                        }
                    }
                }
                libc::_exit(0)
            }
        }
    }
}

/// The answer may be inferred or unknown then, but never wrong.
#[test]
fn noise_makes_no_answer_wrong() {
    let test = "noise_makes_no_answer_wrong";
    if let Some(name) = case() {
        return meet_noise(&name);
    }
    for policy in ["default", "never"] {
        run_case(test, &format!("cgroup, {policy}"), |child| {
            Ok(child.cgroup(&Cgroup::pids()?))
        });
        run_case(test, &format!("user, {policy}"), Ok);
        run_case(test, &format!("numbers, {policy}"), |child| {
            Ok(child.pid_namespace(Some(400)))
        });
    }
}

fn meet_noise(name: &str) {
    const NOISE: usize = 2;
    prepare();
    let (limit, policy) = name.split_once(", ").expect("two words");
    let policy = match policy {
        "never" => RetryPolicy::never(),
        _ => RetryPolicy::default(),
    };
    // Each of the noisy ones has a child at times: with both, nothing is left for a thread.
    let room = NOISE as u64;
    match limit {
        "cgroup" => {
            let cgroup = inherited_cgroup(0);
            make_noise(NOISE);
            let most = cgroup.tasks().min(2 + NOISE as u64) + room - 1;
            cgroup.set("pids.max", most);
            collect(policy, |error| {
                named(error, &[CauseKind::PidsCgroup, CauseKind::Unknown])?;
                cgroup_named(error, cgroup.path(), most)
            });
        }
        "user" => {
            or_skip!(become_unused_user());
            let tasks = support::Snapshot::take().kernel_threads;
            make_noise(NOISE);
            set_rlimit(libc::RLIMIT_NPROC, tasks + NOISE as u64 + room - 1);
            collect(policy, |error| {
                named(error, &[CauseKind::UserProcesses, CauseKind::Unknown])
            });
        }
        _ => {
            let mut sleepers = Sleepers::default();
            sleepers.add(500).expect_err("no number left");
            sleepers.remove(2 * NOISE - 1);
            make_noise(NOISE);
            collect(policy, |error| {
                named(error, &[CauseKind::PidNumbers, CauseKind::Unknown])
            });
        }
    }
}

/// What `--machine-wide` relies on, tried with a value that is shared by no one: `kernel.pid_max` of a pid
/// namespace.
#[test]
fn a_guarded_value_comes_back_however_its_process_ends() {
    const PATH: &str = "/proc/sys/kernel/pid_max";
    let test = "a_guarded_value_comes_back_however_its_process_ends";
    let value = || {
        std::fs::read_to_string(PATH)
            .expect("pid_max")
            .trim()
            .to_owned()
    };
    let longest = |name: &str| match name {
        "too long" => Duration::from_millis(100),
        _ => Duration::from_secs(60),
    };
    match case().as_deref() {
        None => {
            let outside = value();
            let inside = child(test, "inside").pid_namespace(Some(400));
            or_skip!(inside.run()).success();
            assert_eq!(value(), outside);
        }
        Some("inside") => {
            for name in [
                "drop", "panic", "exit", "SIGKILL", "SIGTERM", "SIGINT", "too long",
            ] {
                let mut worker = child(test, name).spawn().expect("a worker");
                assert!(worker.wait_for("CHANGED 500"), "{name}");
                let signal = match name {
                    "SIGKILL" => libc::SIGKILL,
                    "SIGTERM" => libc::SIGTERM,
                    "SIGINT" => libc::SIGINT,
                    _ => 0,
                };
                // SAFETY: the group that our own child leads; a terminal would signal all of it, too.
                unsafe { libc::kill(-worker.pid(), signal) };
                if name != "too long" {
                    worker.send("end");
                }
                let deadline = Instant::now() + Duration::from_secs(10);
                while value() != "400" {
                    assert!(Instant::now() < deadline, "{name}: not put back");
                    std::thread::sleep(Duration::from_millis(1));
                }
                worker.send("end");
                let output = worker.finish();
                println!("{name}: {}", output.status);
            }
        }
        Some(name) => {
            let guarded =
                GuardedFile::change(PATH.as_ref(), "500", longest(name)).expect("a change");
            println!("CHANGED {}", value());
            let _ = std::io::stdin().read_line(&mut String::new());
            match name {
                "exit" => std::process::exit(3),
                "panic" => panic!("on purpose"),
                _ => drop(guarded),
            }
        }
    }
}

/// Set by SIGIO: another process opens the file that is on lease, and waits for its holder.
static IS_WAITED_FOR: AtomicBool = AtomicBool::new(false);

extern "C" fn note_opening(_: libc::c_int) {
    IS_WAITED_FOR.store(true, Ordering::Release);
}

/// A thread of this process that stands inside execve: the kernel has marked the state that it shares with the
/// others, and opens the script's interpreter. That is on lease, so that it waits.
struct HeldExec {
    folder: PathBuf,
    lease: File,
    thread: std::thread::JoinHandle<io::Error>,
}

impl HeldExec {
    fn new() -> Result<HeldExec, String> {
        let folder = std::env::temp_dir().join(format!("nptl-exec-{}", std::process::id()));
        let (script, interpreter) = (folder.join("script"), folder.join("interpreter"));
        let text = format!("#!{}\n", interpreter.display());
        let files = std::fs::create_dir_all(&folder)
            .and_then(|()| std::fs::write(&script, text))
            .and_then(|()| std::fs::write(&interpreter, "no program"))
            .and_then(|()| std::fs::set_permissions(&script, Permissions::from_mode(0o755)))
            .and_then(|()| std::fs::set_permissions(&interpreter, Permissions::from_mode(0o755)))
            .and_then(|()| File::open(&interpreter));
        let lease = files.map_err(|e| format!("{}: {e}", folder.display()))?;
        // SAFETY: a handler that only stores, and a lease on our own descriptor.
        let leased = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note_opening as *const () as usize;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(libc::SIGIO, &raw const action, std::ptr::null_mut());
            libc::fcntl(lease.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK)
        };
        if leased != 0 {
            return Err(format!("no lease: {}", io::Error::last_os_error()));
        }
        let path = CString::new(script.as_os_str().as_bytes()).map_err(|e| e.to_string())?;
        // Returns, because in the end the interpreter is no program. Not std's exec: that is execvp, which goes on
        // with a shell then.
        let thread = std::thread::spawn(move || {
            let arguments = [path.as_ptr(), std::ptr::null()];
            // SAFETY: C strings, and an array of them that ends with a null pointer; the environment is empty.
            unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), &raw const arguments[1]) };
            io::Error::last_os_error()
        });
        let deadline = Instant::now() + Duration::from_secs(10);
        while !IS_WAITED_FOR.load(Ordering::Acquire) {
            assert!(Instant::now() < deadline, "the interpreter is not opened");
            std::thread::yield_now();
        }
        Ok(HeldExec {
            folder,
            lease,
            thread,
        })
    }

    fn release(self) {
        // SAFETY: ends the lease on our own descriptor.
        unsafe { libc::fcntl(self.lease.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
        let error = self.thread.join().expect("its end");
        assert_eq!(error.raw_os_error(), Some(libc::ENOEXEC));
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// The scenarios meet a sibling that comes and goes, where not to know is right as well. This one stays: each
/// refusal has to name it.
#[test]
fn a_sibling_held_inside_execve_is_named_every_time() {
    let test = "a_sibling_held_inside_execve_is_named_every_time";
    let Some(name) = case() else {
        for name in ["never", "default"] {
            run_case(test, name, Ok);
        }
        return;
    };
    prepare();
    let held = or_skip!(HeldExec::new());
    let policy = match &*name {
        "never" => RetryPolicy::never(),
        _ => RetryPolicy::default(),
    };
    collect(policy, |error| {
        named(error, &[CauseKind::SiblingExec])?;
        // RLIMIT_NPROC binds others than root, and can then not always be excluded.
        let proven = error.certainty() == Certainty::Proven || !support::is_root();
        let inferred = error.certainty() == Certainty::Inferred;
        match (&*name, error.is_transient(), error.attempts()) {
            // What holds now need not have held then.
            ("never", true, 1) if inferred => Ok(()),
            ("default", true, 2..) if proven => Ok(()),
            _ => {
                Err("another certainty, not transient, or tried another number of times".to_owned())
            }
        }
    });
    held.release();
    let thread = nptl::spawn(|| ()).expect("no limit is in the way");
    thread.join().expect("its end");
}
