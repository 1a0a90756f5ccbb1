//! A child process that runs one case of one test in a sandbox, under a time limit.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::cgroup::{CGROUPS_VARIABLE, Cgroup};

const CASE_VARIABLE: &str = "NPTL_TEST_CHILD";

/// The dynamic loader and its options, separated by blanks, when the program was not started directly:
/// `/proc/self/exe` is the loader then. `.ci/glibc-matrix` sets it.
const LOADER_VARIABLE: &str = "NPTL_TEST_LOADER";

const REPORT_MARK: &str = "@@";

/// The case that this process was started for, or `None` in the process that starts the cases.
pub fn case() -> Option<String> {
    std::env::var(CASE_VARIABLE).ok()
}

/// Sends the parent `key` = `value`, readable there with [`Output::get`]. Line ends in the value are kept
/// as `\n`.
///
/// Formats on the stack and writes with one system call: the child may be at a limit of memory.
pub fn report(key: &str, value: impl std::fmt::Display) {
    struct Line {
        bytes: [u8; 8192],
        length: usize,
    }
    impl std::fmt::Write for Line {
        fn write_str(&mut self, text: &str) -> std::fmt::Result {
            for byte in text.bytes() {
                let escaped: &[u8] = if byte == b'\n' { b"\\n" } else { &[byte] };
                let end = self.length + escaped.len();
                let Some(space) = self.bytes.get_mut(self.length..end) else {
                    return Ok(());
                };
                space.copy_from_slice(escaped);
                self.length = end;
            }
            Ok(())
        }
    }
    let mut line = Line {
        bytes: [0; 8192],
        length: 1,
    };
    line.bytes[0] = b'\n';
    let _ = std::fmt::write(&mut line, format_args!("{REPORT_MARK}{key}={value}"));
    let end = line.length.min(line.bytes.len() - 1);
    line.bytes[end] = b'\n';
    let mut rest = &line.bytes[..=end];
    while !rest.is_empty() {
        // SAFETY: the buffer is alive and `rest.len()` bytes long.
        let written = unsafe { libc::write(1, rest.as_ptr().cast(), rest.len()) };
        match usize::try_from(written) {
            Ok(written) => rest = &rest[written..],
            Err(_) if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Runs `work`, of the test of that full name, in a process of its own, which has its limits and its memory to
/// itself.
#[track_caller]
pub fn alone(test: &str, work: impl FnOnce()) {
    if case().is_some() {
        work();
        report("done", "yes");
        return;
    }
    let output = match child(test, "run").run() {
        Ok(output) => output.success(),
        Err(why) => return super::announce_skip(&why),
    };
    if output.skipped().is_none() {
        assert_eq!(output.get("done"), Some("yes"), "{output}");
    }
}

/// Whether the running kernel is `major.minor` or later.
pub fn kernel_at_least(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (major, minor)
}

#[derive(Clone, Copy, PartialEq)]
enum Proc {
    Inherited,
    Fresh,
    Hidden,
}

/// A child process to be: what it runs, and the sandbox that it runs in.
#[must_use]
pub struct Child {
    /// Instead of this program.
    executable: Option<PathBuf>,
    test: Option<String>,
    case: String,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    time_limit: Duration,
    rlimits: Vec<(libc::__rlimit_resource_t, u64)>,
    cgroups: Vec<Cgroup>,
    user_namespace: bool,
    pid_namespaces: Vec<Option<u32>>,
    proc: Proc,
    no_signal_stacks: bool,
}

/// This test binary again, for exactly the test `test` (its full path, as `--list` prints it), with
/// [`case`] returning `case` there.
pub fn child(test: &str, case: &str) -> Child {
    Child {
        executable: None,
        test: Some(test.to_owned()),
        case: case.to_owned(),
        arguments: Vec::new(),
        environment: Vec::new(),
        time_limit: Duration::from_secs(120),
        rlimits: Vec::new(),
        cgroups: Vec::new(),
        user_namespace: false,
        pid_namespaces: Vec::new(),
        proc: Proc::Inherited,
        no_signal_stacks: false,
    }
}

/// This program again (an example, say), with the arguments given by [`Child::arg`] and with [`case`]
/// returning `case` there.
pub fn program(case: &str) -> Child {
    Child {
        test: None,
        ..child("", case)
    }
}

/// Another program, with the arguments given by [`Child::arg`].
pub fn executable(path: impl Into<PathBuf>) -> Child {
    Child {
        executable: Some(path.into()),
        ..program("")
    }
}

impl Child {
    /// One more argument; for a test it stands behind the harness's own.
    pub fn arg(mut self, argument: impl Into<OsString>) -> Child {
        self.arguments.push(argument.into());
        self
    }

    /// One environment variable.
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Child {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// After this time the child and all its descendants in its process group or pid namespace are killed.
    pub fn time_limit(mut self, limit: Duration) -> Child {
        self.time_limit = limit;
        self
    }

    /// Soft and hard limit before `exec`. The harness itself needs a second thread: set `RLIMIT_NPROC` with
    /// [`set_rlimit`](super::set_rlimit) inside the child instead.
    pub fn rlimit(mut self, resource: libc::__rlimit_resource_t, value: u64) -> Child {
        self.rlimits.push((resource, value));
        self
    }

    /// Moves the child into `cgroup`, which the child finds again with
    /// [`inherited_cgroup`](super::inherited_cgroup) (the first call is number 0).
    pub fn cgroup(mut self, cgroup: &Cgroup) -> Child {
        self.cgroups.push(cgroup.clone());
        self
    }

    /// A user namespace of its own, in which the child is root: namespaces without root outside.
    pub fn user_namespace(mut self) -> Child {
        self.user_namespace = true;
        self
    }

    /// One more pid namespace around the child, inside those asked for before, with a fresh `/proc` and
    /// `kernel.pid_max` set there if given (at least 301, refused before kernel 6.14 where it is machine-wide).
    ///
    /// Each namespace's first process only reaps: the child is number 2 in the innermost one, because a
    /// number 1 ignores the signals that tests count on.
    pub fn pid_namespace(mut self, pid_max: Option<u32>) -> Child {
        self.pid_namespaces.push(pid_max);
        if self.proc == Proc::Inherited {
            self.proc = Proc::Fresh;
        }
        self
    }

    /// An empty directory in the place of `/proc`.
    pub fn hide_proc(mut self) -> Child {
        self.proc = Proc::Hidden;
        self
    }

    /// Threads of the standard library get no signal stack, for want of which it would abort: it leaves the handling of
    /// bad addresses to a program that was started with these signals ignored. They still kill.
    pub fn no_signal_stacks(mut self) -> Child {
        self.no_signal_stacks = true;
        self
    }

    /// Runs the child to its end. `Err` says why this machine cannot make the sandbox.
    pub fn run(self) -> Result<Output, String> {
        Ok(self.spawn()?.finish())
    }

    /// Starts the child with pipes to its standard streams. It is killed when the calling thread ends.
    pub fn spawn(self) -> Result<StartedChild, String> {
        if self.pid_namespaces.iter().any(Option::is_some) && !kernel_at_least(6, 14) {
            return Err("kernel.pid_max is machine-wide before kernel 6.14".to_owned());
        }
        let mut command = self.command();
        let note = Note::new().map_err(|e| format!("no shared page: {e}"))?;
        let mut sandbox = self.sandbox(&note)?;
        // SAFETY: `Sandbox::enter` makes only system calls on data prepared before the fork.
        unsafe { command.pre_exec(move || sandbox.enter()) };
        let deadline = Instant::now() + self.time_limit;
        let mut child = command.spawn().map_err(|e| {
            let step = STEPS[note.step().min(STEPS.len() - 1)];
            let why = format!("cannot start the child ({step}): {e}");
            // Anything else is a defect of the sandbox, and must not pass for a machine without it.
            match e.raw_os_error() {
                Some(libc::EPERM | libc::EACCES | libc::ENOSYS | libc::ENOSPC | libc::EROFS) => why,
                _ => panic!("{why}"),
            }
        })?;
        let group = child.id().cast_signed();
        // SAFETY: pidfd_open takes a process id and flags; the child is ours and not reaped yet.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, group, 0) };
        let pidfd = i32::try_from(pidfd).ok().filter(|&fd| fd >= 0);
        Ok(StartedChild {
            // SAFETY: a new descriptor that no other code owns.
            pidfd: pidfd.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
            stdout: Stream::new(child.stdout.take().map(OwnedFd::from)),
            stderr: Stream::new(child.stderr.take().map(OwnedFd::from)),
            child,
            note,
            test: self.test,
            deadline,
            time_limit: self.time_limit,
            finished: None,
            _cgroups: self.cgroups,
        })
    }

    fn command(&self) -> Command {
        let mut command = match std::env::var(LOADER_VARIABLE) {
            Ok(loader) => {
                let mut words = loader.split_ascii_whitespace();
                let mut command = Command::new(words.next().unwrap_or_default());
                let own = || std::env::args_os().next().unwrap_or_default();
                let executable = self.executable.as_ref();
                command
                    .args(words)
                    .arg(executable.map_or_else(own, |path| path.as_os_str().to_owned()));
                command
            }
            Err(_) => Command::new(
                self.executable
                    .clone()
                    .unwrap_or_else(|| std::env::current_exe().expect("the path of this program")),
            ),
        };
        if let Some(test) = &self.test {
            command.args(["--exact", test, "--nocapture", "--test-threads=1"]);
        }
        command
            .args(&self.arguments)
            .env(CASE_VARIABLE, &self.case)
            .envs(self.environment.iter().cloned())
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if !self.cgroups.is_empty() {
            let paths: Vec<_> = self.cgroups.iter().map(|c| c.path().as_os_str()).collect();
            command.env(CGROUPS_VARIABLE, paths.join(":".as_ref()));
        }
        command
    }

    fn sandbox(&self, note: &Note) -> Result<Sandbox, String> {
        let cgroups = self
            .cgroups
            .iter()
            .map(|cgroup| {
                let path = cgroup.path().join("cgroup.procs");
                let file = File::options().write(true).open(&path);
                file.map_err(|e| format!("{}: {e}", path.display()))
            })
            .collect::<Result<_, _>>()?;
        // SAFETY: these calls cannot fail and have no preconditions.
        let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
        Ok(Sandbox {
            note: note.0,
            rlimits: self.rlimits.clone(),
            cgroups,
            id_maps: self
                .user_namespace
                .then(|| [format!("0 {uid} 1"), format!("0 {gid} 1")]),
            pid_namespaces: self
                .pid_namespaces
                .iter()
                .map(|pid_max| pid_max.map(|value| value.to_string()))
                .collect(),
            proc: self.proc,
            no_signal_stacks: self.no_signal_stacks,
        })
    }
}

/// What the child's side of the fork and the relays report to the parent, in a page that all of them share.
struct Note(&'static SharedNote);

#[derive(Default)]
struct SharedNote {
    step: AtomicUsize,
    status: AtomicI32,
}

const STEPS: [&str; 8] = [
    "exec",
    "resource limits",
    "user namespace",
    "mount namespace",
    "pid namespace",
    "/proc",
    "kernel.pid_max",
    "cgroup",
];

/// No process can have this wait status.
const NO_STATUS: i32 = -1;

impl Note {
    fn new() -> io::Result<Note> {
        // SAFETY: a new anonymous mapping, readable and writable, of at least the size of the note.
        let page = unsafe {
            libc::mmap(
                ptr::null_mut(),
                size_of::<SharedNote>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: zeroed, aligned to a page, and mapped until `Note` is dropped.
        let note = unsafe { &*page.cast::<SharedNote>() };
        note.status.store(NO_STATUS, Ordering::Relaxed);
        Ok(Note(note))
    }

    fn step(&self) -> usize {
        self.0.step.load(Ordering::Acquire)
    }

    /// The wait status of the innermost process, where relays stand between it and us.
    fn status(&self) -> Option<ExitStatus> {
        let status = self.0.status.load(Ordering::Acquire);
        (status != NO_STATUS).then(|| ExitStatus::from_raw(status))
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and this was the last user in this process: the closure that shares the
        // reference runs only in the forked child, which has its own mapping.
        unsafe {
            libc::munmap(
                ptr::from_ref(self.0).cast_mut().cast(),
                size_of::<SharedNote>(),
            )
        };
    }
}

/// The part of [`Child`] that runs between fork and exec: system calls only, everything prepared before.
struct Sandbox {
    note: &'static SharedNote,
    rlimits: Vec<(libc::__rlimit_resource_t, u64)>,
    cgroups: Vec<File>,
    id_maps: Option<[String; 2]>,
    pid_namespaces: Vec<Option<String>>,
    proc: Proc,
    no_signal_stacks: bool,
}

impl Sandbox {
    fn enter(&mut self) -> io::Result<()> {
        die_with_parent()?;
        self.begin(1);
        // Tests that crash on purpose must not fill the folder with core files; the hard limit stays, so
        // that a test of core files can ask for one.
        let mut core = get_rlimit(libc::RLIMIT_CORE)?;
        core.rlim_cur = 0;
        put_rlimit(libc::RLIMIT_CORE, core)?;
        for &(resource, value) in &self.rlimits {
            put_rlimit(
                resource,
                libc::rlimit {
                    rlim_cur: value,
                    rlim_max: value,
                },
            )?;
        }
        if self.no_signal_stacks {
            for signal in [libc::SIGSEGV, libc::SIGBUS] {
                // SAFETY: ignores a signal in this forked process.
                unsafe { libc::signal(signal, libc::SIG_IGN) };
            }
        }
        if let Some([uid_map, gid_map]) = &self.id_maps {
            self.begin(2);
            unshare(libc::CLONE_NEWUSER)?;
            write_file(c"/proc/self/setgroups", b"deny")?;
            write_file(c"/proc/self/uid_map", uid_map.as_bytes())?;
            write_file(c"/proc/self/gid_map", gid_map.as_bytes())?;
        }
        if self.proc != Proc::Inherited {
            self.begin(3);
            unshare(libc::CLONE_NEWNS)?;
            mount(c"none", c"/", None, libc::MS_REC | libc::MS_PRIVATE)?;
        }
        for pid_max in &self.pid_namespaces {
            self.begin(4);
            unshare(libc::CLONE_NEWPID)?;
            self.fork_and_relay()?;
            self.begin(5);
            mount(c"proc", c"/proc", Some(c"proc"), 0)?;
            if let Some(pid_max) = pid_max {
                self.begin(6);
                // Outside a namespace of our own this write would choke the whole machine. Only its first
                // process has number 1, whatever went wrong above.
                // SAFETY: getpid has no preconditions.
                if unsafe { libc::getpid() } != 1 {
                    return Err(io::Error::from_raw_os_error(libc::EDOM));
                }
                write_file(c"/proc/sys/kernel/pid_max", pid_max.as_bytes())?;
            }
        }
        if !self.pid_namespaces.is_empty() {
            self.fork_and_relay()?;
        }
        if self.proc == Proc::Hidden {
            self.begin(5);
            mount(c"none", c"/proc", Some(c"tmpfs"), 0)?;
        }
        // Last, so that the relays are not counted.
        self.begin(7);
        for mut cgroup in &self.cgroups {
            cgroup.write_all(b"0")?;
        }
        self.begin(0);
        Ok(())
    }

    fn begin(&self, step: usize) {
        self.note.step.store(step, Ordering::Release);
    }

    /// Forks; returns in the new process, while the old one waits for it and hands its status on.
    fn fork_and_relay(&self) -> io::Result<()> {
        // SAFETY: this process has one thread, and both sides make only system calls until exec or exit.
        let pid = unsafe { libc::fork() };
        match pid {
            -1 => Err(io::Error::last_os_error()),
            0 => die_with_parent(),
            _ => self.relay(pid),
        }
    }

    fn relay(&self, pid: libc::pid_t) -> ! {
        // The standard library waits for the end of its close-on-exec pipe, and the parent for ours.
        // SAFETY: this process uses no descriptor from here on. The loop is for valgrind, which does not
        // know close_range.
        unsafe {
            if libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) != 0 {
                for fd in 0..1024 {
                    libc::close(fd);
                }
            }
        }
        loop {
            let mut status = 0;
            // Every child, not only ours: children of ended processes of the namespace end here, and as zombies they would
            // hold pid numbers.
            // SAFETY: `status` is a valid place for the result.
            let ended = unsafe { libc::waitpid(-1, &raw mut status, 0) };
            if ended == pid
                || (ended == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::ECHILD))
            {
                // The innermost relay is the first to get here; the outer ones see its exit.
                let _ = self.note.status.compare_exchange(
                    NO_STATUS,
                    status,
                    Ordering::AcqRel,
                    Ordering::Relaxed,
                );
                // SAFETY: no destructor of this forked copy may run.
                unsafe { libc::_exit(0) };
            }
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn die_with_parent() -> io::Result<()> {
    // SAFETY: PR_SET_PDEATHSIG takes a signal number.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })
}

fn get_rlimit(resource: libc::__rlimit_resource_t) -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid place for the result.
    check(unsafe { libc::getrlimit(resource, &raw mut limit) })?;
    Ok(limit)
}

fn put_rlimit(resource: libc::__rlimit_resource_t, limit: libc::rlimit) -> io::Result<()> {
    // SAFETY: `limit` is a valid structure.
    check(unsafe { libc::setrlimit(resource, &raw const limit) })
}

fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: changes only this forked process, which has one thread.
    check(unsafe { libc::unshare(flags) })
}

fn mount(
    source: &std::ffi::CStr,
    target: &std::ffi::CStr,
    kind: Option<&std::ffi::CStr>,
    flags: libc::c_ulong,
) -> io::Result<()> {
    // SAFETY: all strings are NUL-terminated; a null type is allowed for a change of propagation.
    check(unsafe {
        libc::mount(
            source.as_ptr(),
            target.as_ptr(),
            kind.map_or(ptr::null(), |kind| kind.as_ptr()),
            flags,
            ptr::null(),
        )
    })
}

fn write_file(path: &std::ffi::CStr, bytes: &[u8]) -> io::Result<()> {
    // SAFETY: the path is NUL-terminated.
    let fd = unsafe { libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC) };
    check(fd)?;
    // SAFETY: a new descriptor that no other code owns.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.write_all(bytes)
}

/// One standard stream of the child, read as it comes.
struct Stream {
    pipe: Option<File>,
    text: Vec<u8>,
}

impl Stream {
    fn new(pipe: Option<OwnedFd>) -> Stream {
        if let Some(pipe) = &pipe {
            // SAFETY: the descriptor is open; O_NONBLOCK on our end of the pipe does not change the child's.
            unsafe { libc::fcntl(pipe.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
        }
        Stream {
            pipe: pipe.map(File::from),
            text: Vec::new(),
        }
    }

    /// Takes what is there now.
    fn drain(&mut self) {
        if let Some(pipe) = &mut self.pipe {
            match pipe.read_to_end(&mut self.text) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                _ => self.pipe = None,
            }
        }
    }

    fn poll_entry(&self) -> libc::pollfd {
        libc::pollfd {
            fd: self.pipe.as_ref().map_or(-1, File::as_raw_fd),
            events: libc::POLLIN,
            revents: 0,
        }
    }
}

/// A child that was started. Dropping it kills it.
pub struct StartedChild {
    child: std::process::Child,
    /// None where there is no such call: valgrind 3.19 knows none.
    pidfd: Option<OwnedFd>,
    stdout: Stream,
    stderr: Stream,
    note: Note,
    test: Option<String>,
    deadline: Instant,
    time_limit: Duration,
    finished: Option<ExitStatus>,
    _cgroups: Vec<Cgroup>,
}

impl StartedChild {
    /// The process id as seen from here; with pid namespaces, that of the outermost relay.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Waits until `text` stands in the child's standard output. False if the child ended, or its time is
    /// over, without having said so.
    pub fn wait_for(&mut self, text: &str) -> bool {
        while !self.said(text) {
            if !self.pump() {
                return self.said(text);
            }
        }
        true
    }

    /// Whether `text` stands in what was read of the child's standard output so far.
    pub fn said(&self, text: &str) -> bool {
        String::from_utf8_lossy(&self.stdout.text).contains(text)
    }

    /// Writes one line to the child's standard input.
    pub fn send(&mut self, line: &str) {
        if let Some(stdin) = &mut self.child.stdin {
            let _ = writeln!(stdin, "{line}");
        }
    }

    /// Closes the child's standard input and waits for its end.
    pub fn finish(mut self) -> Output {
        drop(self.child.stdin.take());
        while self.pump() {}
        let timed_out = !self.has_ended();
        let status = self.kill();
        self.stdout.drain();
        self.stderr.drain();
        let output = Output {
            status: if timed_out {
                status
            } else {
                self.note.status().unwrap_or(status)
            },
            timed_out: timed_out.then_some(self.time_limit),
            stdout: String::from_utf8_lossy(&self.stdout.text).into_owned(),
            stderr: String::from_utf8_lossy(&self.stderr.text).into_owned(),
        };
        if let Some(test) = &self.test {
            // A misspelt name would otherwise pass: the harness finds no test and is content.
            assert!(
                !output.stdout.contains("running 0 tests"),
                "this binary has no test named {test}"
            );
        }
        output
    }

    /// Reads until something happens. False when the child has ended or its time is over.
    fn pump(&mut self) -> bool {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let mut entries = [
            self.stdout.poll_entry(),
            self.stderr.poll_entry(),
            libc::pollfd {
                fd: self.pidfd.as_ref().map_or(-1, AsRawFd::as_raw_fd),
                events: libc::POLLIN,
                revents: 0,
            },
        ];
        // Without a pidfd the child's end wakes no thread.
        let longest = if self.pidfd.is_some() { i32::MAX } else { 10 };
        let milliseconds = i32::try_from(left.as_millis())
            .unwrap_or(longest)
            .clamp(1, longest);
        // SAFETY: `entries` is a valid array of that length.
        unsafe {
            libc::poll(
                entries.as_mut_ptr(),
                entries.len() as libc::nfds_t,
                milliseconds,
            )
        };
        self.stdout.drain();
        self.stderr.drain();
        !self.has_ended()
    }

    /// Looks without reaping: until then its number is not free for others.
    fn has_ended(&self) -> bool {
        // SAFETY: all zeroes is a valid siginfo_t.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        // SAFETY: `info` is a valid place for the result, and the child is ours; its pid is filled in only
        // if it has ended.
        unsafe {
            libc::waitid(libc::P_PID, self.child.id(), &raw mut info, flags) == 0
                && info.si_pid() != 0
        }
    }

    /// Kills whatever is left of the process group, and reaps the child. In this order: until it is
    /// reaped, its number cannot name another process's group.
    fn kill(&mut self) -> ExitStatus {
        *self.finished.get_or_insert_with(|| {
            // SAFETY: a signal to the process group that this child leads.
            unsafe { libc::kill(-self.child.id().cast_signed(), libc::SIGKILL) };
            self.child.wait().expect("the status of the child")
        })
    }
}

impl Drop for StartedChild {
    fn drop(&mut self) {
        self.kill();
    }
}

/// How a child ended, and what it said.
#[derive(Debug)]
pub struct Output {
    /// The wait status of the test process itself, also through pid namespaces.
    pub status: ExitStatus,
    /// The time limit, when the child was killed because of it.
    pub timed_out: Option<Duration>,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    pub fn signal(&self) -> Option<i32> {
        self.status.signal()
    }

    /// What the child [reported](report) under `key`, the last one.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.all(key).pop()
    }

    /// Everything that the child reported under `key`, in order.
    pub fn all(&self, key: &str) -> Vec<&str> {
        let prefix = format!("{REPORT_MARK}{key}=");
        self.stdout
            .lines()
            .filter_map(|line| line.strip_prefix(prefix.as_str()))
            .collect()
    }

    /// The reason, if the child skipped its case.
    pub fn skipped(&self) -> Option<&str> {
        self.stdout
            .lines()
            .find_map(|line| line.strip_prefix("skipped: "))
    }

    /// The output of a child that ended well; panics with all it said otherwise.
    #[track_caller]
    pub fn success(self) -> Output {
        assert!(self.status.success() && self.timed_out.is_none(), "{self}");
        if let Some(why) = self.skipped() {
            // Said again with the test's name, which is the same.
            let why = why.rsplit_once(" (in ").map_or(why, |(why, _)| why);
            super::announce_skip(why);
        }
        self
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.timed_out {
            Some(limit) => write!(f, "the child was killed after {limit:?}")?,
            None => write!(f, "the child ended with {}", self.status)?,
        }
        write!(
            f,
            "\n--- its stdout\n{}\n--- its stderr\n{}\n---",
            self.stdout, self.stderr
        )
    }
}
