//! Real refusals, in forked children with limits of their own.

use std::arch::asm;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use super::*;

const ROUNDS: usize = 50;
const THREAD_FLAGS: u64 = 0x3d0f00 & !(libc::CLONE_SETTLS as u64);

static TID_WORD: AtomicI32 = AtomicI32::new(0);
static mut STACK: [u8; 16384] = [0; 16384];

/// A real thread that exits at once, waited for until the kernel has cleared its tid word.
fn real_clone(call: CloneCall, wait: bool) -> Result<(), Errno> {
    let result: isize;
    TID_WORD.store(1, Ordering::SeqCst);
    let word = TID_WORD.as_ptr() as usize;
    let stack = &raw mut STACK as usize;
    // SAFETY: all-zero is a valid clone_args.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = THREAD_FLAGS;
    args.stack = stack as u64;
    args.stack_size = 16384;
    args.parent_tid = word as u64;
    args.child_tid = word as u64;
    let (number, first, second) = match call {
        CloneCall::Clone3 => (libc::SYS_clone3, &raw const args as usize, 88),
        CloneCall::Clone => (libc::SYS_clone, THREAD_FLAGS as usize, stack + 16384),
    };
    // SAFETY: the thread has this static stack to itself (the tests' lock serialises its users) and only exits; the
    // creator goes on behind label 2 with its own stack pointer.
    unsafe {
        asm!(
            "mov {keep}, rsp", "syscall", "cmp rsp, {keep}", "je 2f",
            "mov eax, 60", "xor edi, edi", "syscall", "ud2", "2:",
            keep = out(reg) _,
            inlateout("rax") number as isize => result,
            in("rdi") first, in("rsi") second, in("rdx") word, in("r10") word, in("r8") 0,
            lateout("rcx") _, lateout("r11") _, options(nostack),
        );
    }
    if result < 0 {
        return Err(Errno::from_raw(-result as i32));
    }
    while wait && TID_WORD.load(Ordering::SeqCst) != 0 {
        std::hint::spin_loop();
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Slim {
    kind: Option<CauseKind>,
    certainty: Certainty,
    transient: bool,
    spent: Duration,
}

#[derive(Clone, Copy)]
struct Report {
    skipped: Option<&'static str>,
    failed: Option<&'static str>,
    count: usize,
    slim: [Option<Slim>; ROUNDS],
    last: Option<Verdict>,
}

impl Report {
    fn kinds(&self) -> Vec<(Option<CauseKind>, Certainty, usize)> {
        let mut list: Vec<(Option<CauseKind>, Certainty, usize)> = Vec::new();
        for slim in self.slim.iter().flatten() {
            match list
                .iter_mut()
                .find(|(kind, certainty, _)| *kind == slim.kind && *certainty == slim.certainty)
            {
                Some(entry) => entry.2 += 1,
                None => list.push((slim.kind, slim.certainty, 1)),
            }
        }
        list
    }

    fn median(&self) -> Duration {
        let mut all: Vec<_> = self.slim.iter().flatten().map(|slim| slim.spent).collect();
        all.sort();
        all.get(all.len() / 2).copied().unwrap_or_default()
    }

    fn max(&self) -> Duration {
        self.slim
            .iter()
            .flatten()
            .map(|slim| slim.spent)
            .max()
            .unwrap_or_default()
    }
}

/// Runs `body` in a forked child and hands its report back through shared memory.
/// One scenario at a time: each makes limits real and reads counters that another would move.
static SERIAL: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn in_child(name: &str, body: impl FnOnce(&mut Report)) -> Option<Report> {
    let _serial = SERIAL
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let bytes = size_of::<Report>();
    // SAFETY: a new shared mapping of the report's size, written by the child and read once it has ended; the child
    // never returns from here.
    unsafe {
        let shared = libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
        .cast::<Report>();
        shared.write(Report {
            skipped: None,
            failed: Some("died"),
            count: 0,
            slim: [None; ROUNDS],
            last: None,
        });
        let pid = libc::fork();
        if pid == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            let report = &mut *shared;
            body(report);
            if report.failed == Some("died") {
                report.failed = None;
            }
            libc::_exit(0);
        }
        let mut status = 0;
        libc::waitpid(pid, &mut status, 0);
        let report = shared.read();
        libc::munmap(shared.cast(), bytes);
        if let Some(why) = report.skipped {
            println!("skipped: {name}: {why}");
            return None;
        }
        assert_eq!(report.failed, None, "{name}: wait status {status:#x}");
        println!(
            "{name}: {:?}, median {:?}, max {:?}",
            report.kinds(),
            report.median(),
            report.max()
        );
        if let Some(verdict) = &report.last {
            println!(
                "{}",
                Explanation {
                    cause: &verdict.cause,
                    certainty: verdict.certainty,
                    alternatives: verdict.alternatives,
                    silence: verdict.silence,
                    transient: verdict.transient
                }
            );
        }
        Some(report)
    }
}

fn circumstances(
    step: Step,
    errno: Errno,
    bytes: usize,
    call: CloneCall,
) -> Circumstances<'static> {
    Circumstances {
        step,
        errno,
        bytes,
        clone_call: call,
        flags: THREAD_FLAGS,
        reaping: false,
        known_threads: None,
        what: &Detail { what: "", value: 0 },
    }
}

fn record(report: &mut Report, finding: Finding) {
    let slim = match finding {
        Finding::Verdict(v) => {
            report.last = Some(v);
            Slim {
                kind: Some(v.cause.kind()),
                certainty: v.certainty,
                transient: v.transient,
                spent: v.spent,
            }
        }
        Finding::Succeeded => Slim {
            kind: None,
            certainty: Certainty::Unknown,
            transient: true,
            spent: Duration::ZERO,
        },
    };
    if let Some(slot) = report.slim.get_mut(report.count) {
        *slot = Some(slim);
        report.count += 1;
    }
}

/// Refused clones, `ROUNDS` times.
fn clones(report: &mut Report, call: CloneCall, repeat: bool) {
    let mut granted = 0_u64;
    while report.count < ROUNDS {
        match real_clone(call, true) {
            Ok(()) => {
                granted += 1;
                if granted > 300_000 {
                    report.failed = Some("the clone is not refused");
                    return;
                }
            }
            Err(errno) => {
                let mut again = || real_clone(call, true);
                let finding = diagnose(
                    &circumstances(Step::Clone, errno, 0, call),
                    if repeat { Some(&mut again) } else { None },
                );
                record(report, finding);
            }
        }
    }
}

fn expect(report: Option<Report>, kind: CauseKind, certainty: Certainty) {
    if let Some(report) = report {
        assert_eq!(report.kinds(), [(Some(kind), certainty, ROUNDS)]);
    }
}

/// No name but `kind`; Unknown and a granted repetition are honest.
fn never_wrong(report: Option<Report>, kinds: &[CauseKind]) {
    for (kind, ..) in report.iter().flat_map(Report::kinds) {
        let honest = kind.is_none_or(|kind| kind == CauseKind::Unknown || kinds.contains(&kind));
        assert!(honest, "{kind:?} is wrong");
    }
}

fn become_nobody() {
    // SAFETY: plain numbers; the caller is in a child process of its own.
    unsafe {
        libc::syscall(libc::SYS_setgroups, 0, 0);
        libc::syscall(libc::SYS_setresgid, 65534, 65534, 65534);
        libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534);
    }
}

fn become_user(uid: u32) {
    // SAFETY: as in `become_nobody`.
    unsafe {
        libc::syscall(libc::SYS_setgroups, 0, 0);
        libc::syscall(libc::SYS_setresuid, uid, uid, uid);
    }
}

fn set_limit(resource: libc::__rlimit_resource_t, soft: u64) {
    let limit = libc::rlimit {
        rlim_cur: soft,
        rlim_max: soft,
    };
    // SAFETY: a valid rlimit.
    unsafe { libc::setrlimit(resource, &limit) };
}

fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions.
    unsafe { libc::geteuid() == 0 }
}

/// A descriptor that says when this process has ended, for a child that asked too late to be killed with it. The
/// parent's number would not do: in a namespace of its own the child cannot see it.
fn own_pidfd() -> i32 {
    // SAFETY: plain numbers.
    unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) as i32 }
}

fn die_with_parent(parent: i32) {
    let mut ended = libc::pollfd {
        fd: parent,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd; _exit ends this child alone.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if libc::poll(&mut ended, 1, 0) == 1 {
            libc::_exit(0);
        }
    }
}

/// A child that sleeps until its parent is gone.
fn sleeper() -> Result<libc::pid_t, Errno> {
    let parent = own_pidfd();
    // SAFETY: the child makes only system calls and never returns.
    let child = unsafe { libc::fork() };
    if child == 0 {
        die_with_parent(parent);
        loop {
            // SAFETY: pause has no preconditions.
            unsafe { libc::pause() };
        }
    }
    let result = Errno::result(child);
    // SAFETY: the descriptor was opened above and is closed once.
    unsafe { libc::close(parent) };
    result
}

#[test]
fn a_cause_is_small() {
    println!(
        "Cause {} Verdict {}",
        size_of::<Cause>(),
        size_of::<Verdict>()
    );
    assert!(size_of::<Cause>() <= 600);
}

#[test]
fn nproc() {
    for (name, repeat) in [("nproc", true), ("nproc, never", false)] {
        let report = in_child(name, |report| {
            if !is_root() {
                report.skipped = Some("needs root");
                return;
            }
            set_limit(libc::RLIMIT_NPROC, 1);
            become_nobody();
            clones(report, CloneCall::Clone3, repeat);
        });
        expect(report, CauseKind::UserProcesses, Certainty::Proven);
    }
}

#[test]
fn nproc_by_legacy_clone() {
    let report = in_child("nproc, clone3 filtered with ENOSYS", |report| {
        set_limit(libc::RLIMIT_NPROC, 1);
        become_nobody();
        filter(&[(libc::SYS_clone3, libc::ENOSYS)]);
        clones(report, CloneCall::Clone, true);
    });
    // A filter's answer and execve cannot be excluded without clone3, and the report says so.
    if let Some(verdict) = report.as_ref().and_then(|report| report.last) {
        let why = verdict.silence.expect("a reason");
        assert!(why.starts_with("no clone3"), "{why}");
    }
    expect(report, CauseKind::UserProcesses, Certainty::Inferred);
}

#[test]
fn nproc_in_a_user_namespace() {
    // SAFETY: a valid rlimit, plain numbers, in a child process of its own.
    let report = in_child("nproc remembered by the user namespace", |report| unsafe {
        // The namespace remembers the limit of its creation; the process raises its own afterwards.
        become_user(54321);
        let limit = libc::rlimit {
            rlim_cur: 1,
            rlim_max: 1000,
        };
        libc::setrlimit(libc::RLIMIT_NPROC, &limit);
        if libc::unshare(libc::CLONE_NEWUSER) != 0 {
            report.skipped = Some("user namespaces are not allowed");
            return;
        }
        let limit = libc::rlimit {
            rlim_cur: 1000,
            rlim_max: 1000,
        };
        libc::setrlimit(libc::RLIMIT_NPROC, &limit);
        clones(report, CloneCall::Clone3, true);
    });
    expect(report, CauseKind::UserProcesses, Certainty::Proven);
}

/// Runs `body` as init of a new pid namespace with /proc of its own.
fn in_pid_namespace(report: &mut Report, pid_max: Option<u32>, body: impl FnOnce(&mut Report)) {
    // SAFETY: namespaces of a child process of its own; what forks in it either never returns or runs `body` and
    // exits; paths are NUL-terminated.
    unsafe {
        if libc::unshare(libc::CLONE_NEWPID | libc::CLONE_NEWNS) != 0 {
            report.skipped = Some("no pid namespace");
            return;
        }
        let pid = libc::fork();
        if pid == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::mount(
                c"none".as_ptr(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null(),
            );
            libc::mount(
                c"proc".as_ptr(),
                c"/proc".as_ptr(),
                c"proc".as_ptr(),
                0,
                std::ptr::null(),
            );
            if let Some(pid_max) = pid_max
                && fs::write("/proc/sys/kernel/pid_max", pid_max.to_string()).is_err()
            {
                report.skipped = Some("pid_max cannot be written");
                libc::_exit(0);
            }
            body(report);
            libc::_exit(0);
        }
        libc::waitpid(pid, std::ptr::null_mut(), 0);
    }
}

fn fill_with_sleepers() {
    while sleeper().is_ok() {}
}

#[test]
fn pid_numbers() {
    for repeat in [true, false] {
        let report = in_child("pid_max, own namespace", |report| {
            in_pid_namespace(report, Some(400), |report| {
                fill_with_sleepers();
                clones(report, CloneCall::Clone3, repeat);
            });
        });
        expect(report, CauseKind::PidNumbers, Certainty::Proven);
        if let Some(Verdict {
            cause: Cause::PidNumbers { level, .. },
            ..
        }) = report.and_then(|r| r.last)
        {
            assert_eq!(level, PidLevel::Own);
        }
    }
}

/// Half of the numbers are held by sessions alone, whose leader has ended and whose member is in a group of its own:
/// `set -m; nohup daemon &` in a shell that has gone.
#[test]
fn pid_numbers_held_by_sessions() {
    let report = in_child("pid_max, sessions", |report| {
        in_pid_namespace(report, Some(700), |report| {
            // Stands in the way of pairs that begin at odd or at even numbers only.
            let _ = sleeper();
            while leaderless_session() {}
            fill_with_sleepers();
            clones(report, CloneCall::Clone3, true);
        });
    });
    expect(report, CauseKind::PidNumbers, Certainty::Proven);
    if let Some(Verdict {
        cause: Cause::PidNumbers { level, free, .. },
        ..
    }) = report.and_then(|r| r.last)
    {
        assert_eq!((level, free), (PidLevel::Own, 0));
    }
}

fn leaderless_session() -> bool {
    // They end with the namespace, whose init the caller is.
    // SAFETY: the children make system calls only and never return.
    unsafe {
        let leader = libc::fork();
        if leader == 0 {
            libc::setsid();
            let grandchild = libc::fork();
            if grandchild == 0 {
                loop {
                    libc::pause();
                }
            }
            // Done by the leader, so that it is done before the leader has ended.
            libc::setpgid(grandchild, grandchild);
            libc::_exit(i32::from(grandchild < 0));
        }
        let mut status = -1;
        leader > 0 && libc::waitpid(leader, &raw mut status, 0) == leader && status == 0
    }
}

#[test]
fn pid_numbers_of_the_outer_namespace() {
    for repeat in [true, false] {
        let report = in_child("pid_max, outer namespace", |report| {
            in_pid_namespace(report, Some(400), |report| {
                in_pid_namespace(report, None, |report| {
                    fill_with_sleepers();
                    clones(report, CloneCall::Clone3, repeat);
                });
            });
        });
        expect(report, CauseKind::PidNumbers, Certainty::Proven);
        if let Some(Verdict {
            cause: Cause::PidNumbers { level, .. },
            ..
        }) = report.and_then(|r| r.last)
        {
            assert_eq!(level, PidLevel::Ancestor);
        }
    }
}

/// A cgroup directory, removed at the end.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(parent: &str) -> Option<Cgroup> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = PathBuf::from(parent).join(format!("nptl-diag-{}-{number}", std::process::id()));
        fs::create_dir(&path).ok()?;
        Some(Cgroup(path))
    }

    fn under(parent: &Cgroup) -> Option<Cgroup> {
        Cgroup::new(parent.0.to_str()?)
    }

    fn set(&self, file: &str, value: &str) {
        fs::write(self.0.join(file), value).unwrap_or_else(|error| panic!("{file}: {error}"));
    }

    fn enter(&self) {
        fs::write(self.0.join("cgroup.procs"), "0").expect("enter");
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // The last task may still be leaving.
        for _ in 0..100_000 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::yield_now();
        }
        println!("left behind: {}", self.0.display());
    }
}

const PIDS_ROOT: &str = "/sys/fs/cgroup/pids";

#[test]
fn pids_cgroup() {
    let Some(outer) = Cgroup::new(PIDS_ROOT) else {
        println!("skipped: no pids cgroup");
        return;
    };
    let inner = Cgroup::under(&outer).expect("inner");
    for (limited, place) in [(&inner, CgroupPlace::Own), (&outer, CgroupPlace::Ancestor)] {
        inner.set("pids.max", "max");
        outer.set("pids.max", "max");
        limited.set("pids.max", "1");
        for repeat in [true, false] {
            let report = in_child("pids cgroup", |report| {
                inner.enter();
                clones(report, CloneCall::Clone3, repeat);
            });
            let certainty = if repeat {
                Certainty::Proven
            } else {
                Certainty::Inferred
            };
            expect(report, CauseKind::PidsCgroup, certainty);
            let Some(Cause::PidsCgroup {
                place: found,
                directory,
                ..
            }) = report.and_then(|r| r.last).map(|v| v.cause)
            else {
                panic!()
            };
            assert_eq!(found, place);
            assert_eq!(directory.to_str(), limited.0.to_str());
        }
    }
}

#[test]
fn hidden_pids_cgroup() {
    let Some(outer) = Cgroup::new(PIDS_ROOT) else {
        println!("skipped: no pids cgroup");
        return;
    };
    let inner = Cgroup::under(&outer).expect("inner");
    outer.set("pids.max", "1");
    // SAFETY: NUL-terminated paths, in mount and cgroup namespaces of a child process of its own.
    let report = in_child("pids cgroup, hidden ancestor", |report| unsafe {
        inner.enter();
        assert_eq!(libc::unshare(libc::CLONE_NEWCGROUP | libc::CLONE_NEWNS), 0);
        libc::mount(
            c"none".as_ptr(),
            c"/".as_ptr(),
            std::ptr::null(),
            libc::MS_REC | libc::MS_PRIVATE,
            std::ptr::null(),
        );
        libc::umount2(c"/sys/fs/cgroup/pids".as_ptr(), libc::MNT_DETACH);
        let mounted = libc::mount(
            c"cgroup".as_ptr(),
            c"/sys/fs/cgroup/pids".as_ptr(),
            c"cgroup".as_ptr(),
            0,
            c"pids".as_ptr().cast(),
        );
        assert_eq!(mounted, 0);
        clones(report, CloneCall::Clone3, true);
    });
    expect(report, CauseKind::PidsCgroup, Certainty::Proven);
    let Some(Cause::PidsCgroup { place, .. }) = report.and_then(|r| r.last).map(|v| v.cause) else {
        panic!()
    };
    assert_eq!(place, CgroupPlace::Hidden);
}

/// pids.max is full, and RLIMIT_NPROC leaves room for exactly one more task; and the reverse.
#[test]
fn two_limits_close_together() {
    let Some(cgroup) = Cgroup::new(PIDS_ROOT) else {
        println!("skipped: no pids cgroup");
        return;
    };
    for (pids, nproc, kind) in [
        ("1", 2, CauseKind::PidsCgroup),
        ("2", 1, CauseKind::UserProcesses),
    ] {
        cgroup.set("pids.max", pids);
        let report = in_child("two limits", |report| {
            cgroup.enter();
            set_limit(libc::RLIMIT_NPROC, nproc);
            become_user(54322);
            clones(report, CloneCall::Clone3, true);
        });
        expect(report, kind, Certainty::Proven);
    }
}

/// A cgroup that fills up only after the one around it has refused is not named, and no more is one that was full
/// before and then had room.
#[test]
fn a_cgroup_that_was_not_full_throughout() {
    let Some(outer) = Cgroup::new(PIDS_ROOT) else {
        println!("skipped: no pids cgroup");
        return;
    };
    let inner = Cgroup::under(&outer).expect("a cgroup below");
    // pids.max of the inner one at the two readings. It has one task, and room for another in between.
    for (before, after, expected) in [
        ("2", "2", CgroupPlace::Ancestor),
        ("2", "1", CgroupPlace::Unclear),
        ("1", "2", CgroupPlace::Unclear),
    ] {
        outer.set("pids.max", "1");
        let report = in_child("cgroups that fill up", |report| {
            inner.enter();
            let pids = Hierarchy::of_thread(b"pids").expect("a hierarchy");
            inner.set("pids.max", before);
            let first = pids.snapshot(&cgroup::PIDS);
            inner.set("pids.max", "2");
            let granted = real_clone(CloneCall::Clone3, true).is_ok();
            inner.set("pids.max", after);
            let second = pids.snapshot(&cgroup::PIDS);
            report.failed = match cgroup::judge(Some(&first), &second) {
                _ if granted => Some("granted"),
                Judgement::Counted { place, .. } if place == expected => None,
                Judgement::Counted { .. } => Some("the wrong place"),
                _ => Some("not counted"),
            };
        });
        assert!(report.is_some());
    }
}

fn filter(rules: &[(libc::c_long, i32)]) {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
    for (call, errno) in rules {
        let filter = SeccompFilter::new(
            [(*call, vec![])].into_iter().collect(),
            SeccompAction::Allow,
            SeccompAction::Errno(*errno as u32),
            std::env::consts::ARCH.try_into().expect("architecture"),
        );
        let program: BpfProgram = filter.expect("filter").try_into().expect("program");
        apply_filter(&program).expect("apply");
    }
}

#[test]
fn seccomp() {
    for (rules, call) in [
        (&[(libc::SYS_clone3, libc::EAGAIN)][..], CloneCall::Clone3),
        (
            &[
                (libc::SYS_clone3, libc::ENOSYS),
                (libc::SYS_clone, libc::EAGAIN),
            ],
            CloneCall::Clone,
        ),
        (
            &[
                (libc::SYS_clone3, libc::ENOSYS),
                (libc::SYS_clone, libc::EPERM),
            ],
            CloneCall::Clone,
        ),
        (
            &[
                (libc::SYS_clone3, libc::EPERM),
                (libc::SYS_clone, libc::ENOMEM),
            ],
            CloneCall::Clone,
        ),
    ] {
        let report = in_child("seccomp", |report| {
            filter(rules);
            clones(report, call, true);
        });
        expect(report, CauseKind::Seccomp, Certainty::Proven);
    }
}

/// As a supervisor does that has no opinion of a clone3 without arguments. RLIMIT_NPROC could have refused, but did not.
#[test]
fn a_filter_that_lets_no_arguments_pass() {
    use seccompiler::{
        BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
        SeccompRule, apply_filter,
    };
    let report = in_child("seccomp, arguments", |report| {
        set_limit(libc::RLIMIT_NPROC, 50);
        become_user(54324);
        let (length, operator) = (SeccompCmpArgLen::Qword, SeccompCmpOp::Ne);
        let condition = SeccompCondition::new(0, length, operator, 0).expect("condition");
        let rule = SeccompRule::new(vec![condition]).expect("rule");
        let filter = SeccompFilter::new(
            [(libc::SYS_clone3, vec![rule])].into_iter().collect(),
            SeccompAction::Allow,
            SeccompAction::Errno(libc::EAGAIN as u32),
            std::env::consts::ARCH.try_into().expect("architecture"),
        );
        let program: BpfProgram = filter.expect("filter").try_into().expect("program");
        apply_filter(&program).expect("apply");
        clones(report, CloneCall::Clone3, true);
    });
    expect(report, CauseKind::Seccomp, Certainty::Proven);
}

#[test]
fn a_filter_does_not_hide_other_causes() {
    let report = in_child("nproc under a harmless filter", |report| {
        set_limit(libc::RLIMIT_NPROC, 1);
        become_nobody();
        filter(&[(libc::SYS_reboot, libc::EPERM)]);
        clones(report, CloneCall::Clone3, true);
    });
    expect(report, CauseKind::UserProcesses, Certainty::Proven);
    let report = in_child("pid_max under a harmless filter", |report| {
        in_pid_namespace(report, Some(400), |report| {
            fill_with_sleepers();
            filter(&[(libc::SYS_reboot, libc::EPERM)]);
            clones(report, CloneCall::Clone3, true);
        });
    });
    expect(report, CauseKind::PidNumbers, Certainty::Proven);
}

#[test]
fn deadline_scheduling() {
    // SAFETY: all-zero is a valid sched_attr, and it is as large as it says.
    let report = in_child("deadline", |report| unsafe {
        let mut attributes: libc::sched_attr = std::mem::zeroed();
        attributes.size = size_of::<libc::sched_attr>() as u32;
        attributes.sched_policy = 6;
        attributes.sched_runtime = 10_000_000;
        attributes.sched_deadline = 100_000_000;
        attributes.sched_period = 100_000_000;
        if libc::syscall(libc::SYS_sched_setattr, 0, &attributes, 0) != 0 {
            report.skipped = Some("SCHED_DEADLINE is not allowed");
            return;
        }
        let circumstances = Circumstances {
            reaping: true,
            ..circumstances(Step::Clone, Errno::EAGAIN, 0, CloneCall::Clone3)
        };
        let mut again = || real_clone(CloneCall::Clone3, true);
        record(report, diagnose(&circumstances, Some(&mut again)));
        report.failed = report.slim[0]
            .filter(|slim| slim.transient)
            .map(|_| "a policy does not change because threads end");
        report.count = 0;
        clones(report, CloneCall::Clone3, true);
    });
    expect(report, CauseKind::DeadlineScheduling, Certainty::Proven);
}

fn exec_in_a_loop() {
    // Opened and found executable, so that execve gets past the point where it marks the shared
    // fs_struct, and refused (ENOEXEC) after it.
    // SAFETY: NUL-terminated names and seven bytes to write.
    let path = unsafe {
        let file = libc::memfd_create(c"garbage".as_ptr(), 0);
        assert_eq!(libc::write(file, c"garbage".as_ptr().cast(), 7), 7);
        std::ffi::CString::new(format!("/proc/self/fd/{file}")).expect("no NUL")
    };
    std::thread::spawn(move || {
        loop {
            let none = [std::ptr::null()];
            // SAFETY: NUL-terminated path, lists that end with a null pointer.
            unsafe { libc::execve(path.as_ptr(), none.as_ptr(), none.as_ptr()) };
        }
    });
}

#[test]
fn sibling_exec() {
    for (name, repeat) in [("sibling exec", true), ("sibling exec, never", false)] {
        let report = in_child(name, |report| {
            exec_in_a_loop();
            clones(report, CloneCall::Clone3, repeat);
        });
        never_wrong(report, &[CauseKind::SiblingExec]);
        if let Some(report) = report {
            assert!(report.slim.iter().flatten().all(|slim| slim.transient));
        }
    }
    let report = in_child("sibling exec, as a user", |report| {
        become_user(54323);
        exec_in_a_loop();
        clones(report, CloneCall::Clone3, true);
    });
    never_wrong(report, &[CauseKind::SiblingExec]);
}

#[test]
fn unshared_pid_namespace() {
    for populated in [false, true] {
        for filtered in [false, true] {
            // SAFETY: plain numbers, in a child process of its own.
            let report = in_child("unshared pid namespace", |report| unsafe {
                if libc::unshare(libc::CLONE_NEWPID) != 0 {
                    report.skipped = Some("no pid namespace");
                    return;
                }
                if populated {
                    sleeper().expect("fork");
                }
                if filtered {
                    filter(&[(libc::SYS_reboot, libc::EPERM)]);
                }
                clones(report, CloneCall::Clone3, true);
            });
            expect(report, CauseKind::UnsharedPidNamespace, Certainty::Proven);
        }
    }
}

fn mappings(
    report: &mut Report,
    step: Step,
    bytes: usize,
    mut refused: impl FnMut() -> Result<(), Errno>,
) {
    while report.count < ROUNDS {
        let Err(errno) = refused() else {
            report.failed = Some("the mapping is not refused");
            return;
        };
        record(
            report,
            diagnose(&circumstances(step, errno, bytes, CloneCall::Clone3), None),
        );
    }
}

fn map_stack(bytes: usize) -> Result<usize, Errno> {
    // SAFETY: a new mapping, which nobody else knows.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        Err(Errno::last())
    } else {
        Ok(start as usize)
    }
}

const STACK_BYTES: usize = 64 << 20;

#[test]
fn resource_limits_of_memory() {
    for (resource, kind) in [
        (libc::RLIMIT_AS, CauseKind::AddressSpace),
        (libc::RLIMIT_DATA, CauseKind::DataSegment),
    ] {
        for filtered in [false, true] {
            let report = in_child("memory limit", |report| {
                if filtered {
                    filter(&[(libc::SYS_reboot, libc::EPERM)]);
                }
                let status = Status::read();
                let used = if resource == libc::RLIMIT_AS {
                    status.mapped
                } else {
                    status.data
                };
                // One page less than needed.
                set_limit(resource, used.unwrap() + STACK_BYTES as u64 - 4096);
                mappings(report, Step::MapStack, STACK_BYTES, || {
                    map_stack(STACK_BYTES).map(drop)
                });
            });
            expect(report, kind, Certainty::Proven);
        }
    }
}

#[test]
fn locked_memory() {
    let report = in_child("MCL_FUTURE", |report| {
        set_limit(libc::RLIMIT_MEMLOCK, 32 << 20);
        become_nobody();
        // SAFETY: concerns mappings of this child process that are still to come.
        assert_eq!(unsafe { libc::mlockall(libc::MCL_FUTURE) }, 0);
        mappings(report, Step::MapStack, STACK_BYTES, || {
            map_stack(STACK_BYTES).map(drop)
        });
    });
    expect(report, CauseKind::LockedMemory, Certainty::Proven);
    let report = in_child("mlock", |report| {
        set_limit(libc::RLIMIT_MEMLOCK, 1 << 20);
        become_nobody();
        let start = map_stack(STACK_BYTES).unwrap();
        mappings(report, Step::PrepareStack, STACK_BYTES, || {
            // SAFETY: a range of this process's own.
            Errno::result(unsafe { libc::mlock(start as *const _, STACK_BYTES) }).map(drop)
        });
    });
    expect(report, CauseKind::LockedMemory, Certainty::Proven);
}

#[test]
fn address_space_exhausted() {
    let report = in_child("no free addresses", |report| {
        let bytes = 0x6000_0000_0000;
        mappings(report, Step::MapStack, bytes, || map_stack(bytes).map(drop));
    });
    expect(report, CauseKind::AddressSpaceExhausted, Certainty::Proven);
}

#[test]
fn overcommit() {
    let report = in_child("overcommit 0", |report| {
        if limits::number_in(c"/proc/sys/vm/overcommit_memory") != Some(0) {
            report.skipped = Some("vm.overcommit_memory is not 0");
            return;
        }
        let bytes = 8 << 40;
        mappings(report, Step::MapStack, bytes, || map_stack(bytes).map(drop));
    });
    expect(report, CauseKind::Overcommit, Certainty::Proven);
}

/// Adds mappings until one is refused, or until a split is.
fn fill_mappings(until_split: bool) {
    let mut access = libc::PROT_NONE;
    loop {
        access ^= libc::PROT_READ;
        // SAFETY: a new mapping of one page, which is kept.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                access,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            break;
        }
    }
    if until_split {
        // Every page of the alternating row is a mapping; giving two back leaves room for one more mapping and
        // none for its guard.
        let maps = fs::read_to_string("/proc/self/maps");
        drop(maps);
    }
}

#[test]
fn map_count() {
    let report = in_child("max_map_count, mapping", |report| {
        fill_mappings(false);
        mappings(report, Step::MapStack, STACK_BYTES, || {
            map_stack(STACK_BYTES).map(drop)
        });
    });
    expect(report, CauseKind::MapCount, Certainty::Proven);
    let report = in_child("max_map_count, guard", |report| {
        // Stacks with protected guards until the guard is refused.
        let bytes = 64 << 10;
        loop {
            let Ok(start) = map_stack(bytes) else {
                // This one would have been refused as a mapping: give one pair back.
                report.failed = Some("mapping refused first");
                return;
            };
            let guard = || {
                // SAFETY: a page that was mapped here and that nobody uses.
                Errno::result(unsafe { libc::mprotect(start as *mut _, 4096, libc::PROT_NONE) })
                    .map(drop)
            };
            if guard().is_err() {
                mappings(report, Step::GuardStack, 4096, guard);
                return;
            }
        }
    });
    expect(report, CauseKind::MapCount, Certainty::Proven);
}

#[test]
fn memory_cgroup() {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let parent = own
        .lines()
        .find_map(|line| line.split_once(":memory:"))
        .map(|(_, path)| format!("/sys/fs/cgroup/memory{path}"));
    let Some(cgroup) = parent.and_then(|parent| Cgroup::new(&parent)) else {
        println!("skipped: no memory cgroup");
        return;
    };
    cgroup.set("memory.limit_in_bytes", "67108864");
    cgroup.set("memory.oom_control", "1");
    let report = in_child("memory cgroup", |report| {
        at_the_limit_of_memory(report, &cgroup);
    });
    expect(report, CauseKind::KernelMemory, Certainty::Proven);
}

/// Threads that stay, until the kernel has no memory for one more stack, nor for most of the files to read.
fn at_the_limit_of_memory(report: &mut Report, cgroup: &Cgroup) {
    // Every page written later is copied now: at the limit a fault would wait forever.
    for _ in 0..ROUNDS {
        let mut again = || Err(Errno::ENOMEM);
        let circumstances = circumstances(Step::Clone, Errno::ENOMEM, 0, CloneCall::Clone3);
        record(report, diagnose(&circumstances, Some(&mut again)));
    }
    *report = Report {
        skipped: None,
        failed: Some("died"),
        count: 0,
        slim: [None; ROUNDS],
        last: None,
    };
    cgroup.enter();
    let mut count = 0;
    let errno = loop {
        count += 1;
        match sleeping_thread() {
            Ok(()) if count < 30_000 => {}
            Ok(()) => {
                report.skipped = Some("never refused");
                return;
            }
            Err(errno) => break errno,
        }
    };
    if errno != Errno::ENOMEM {
        report.skipped = Some("another errno");
        return;
    }
    while report.count < ROUNDS {
        if let Err(errno) = sleeping_thread() {
            let mut again = sleeping_thread;
            let circumstances = circumstances(Step::Clone, errno, 0, CloneCall::Clone3);
            let finding = diagnose(&circumstances, Some(&mut again));
            if let Finding::Verdict(Verdict {
                cause: Cause::KernelMemory { directory, .. },
                ..
            }) = finding
                // Compared as bytes: nothing may be allocated here.
                && !directory.is_empty()
                && directory.as_bytes() != cgroup.0.as_os_str().as_encoded_bytes()
            {
                report.failed = Some("another cgroup is named");
            }
            record(report, finding);
        }
    }
}

/// A thread in pause(2) that needs no stack of its own.
fn sleeping_thread() -> Result<(), Errno> {
    let result: isize;
    // SAFETY: all-zero is a valid clone_args.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = THREAD_FLAGS & !(libc::CLONE_PARENT_SETTID | libc::CLONE_CHILD_CLEARTID) as u64;
    args.stack = &raw mut STACK as u64;
    args.stack_size = 16384;
    // SAFETY: the thread has this static stack to itself and only pauses; the creator goes on behind label 2.
    unsafe {
        asm!(
            "mov {keep}, rsp", "syscall", "cmp rsp, {keep}", "je 2f",
            "3: mov eax, 34", "syscall", "jmp 3b", "2:",
            keep = out(reg) _,
            inlateout("rax") libc::SYS_clone3 as isize => result,
            in("rdi") &raw const args as usize, in("rsi") 88,
            lateout("rcx") _, lateout("r11") _, options(nostack),
        );
    }
    if result < 0 {
        Err(Errno::from_raw(-result as i32))
    } else {
        Ok(())
    }
}

#[test]
fn dying_pid_namespace() {
    let report = in_child("dying pid namespace", |report| {
        // Each shows the moment for long enough to be refused several times.
        for _ in 0..100 {
            if report.count >= 20 {
                return;
            }
            if !in_dying_namespace(report) {
                report.skipped = Some("no pid namespace");
                return;
            }
        }
        report.failed = Some("never refused while its init's end killed the others");
    });
    never_wrong(report, &[CauseKind::DyingPidNamespace]);
    if let Some(report) = report {
        let named = |(kind, ..): &(Option<CauseKind>, Certainty, usize)| {
            *kind == Some(CauseKind::DyingPidNamespace)
        };
        assert!(report.kinds().iter().any(named), "{:?}", report.kinds());
    }
}

/// The calling process on the first or the last of its CPUs alone.
fn pin(last: bool) {
    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    let allowed = sched_getaffinity(Pid::from_raw(0)).expect("the affinity");
    let mut cpus = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu) == Ok(true));
    let cpu = if last { cpus.next_back() } else { cpus.next() };
    let mut one = CpuSet::new();
    one.set(cpu.expect("a CPU")).expect("its number");
    sched_setaffinity(Pid::from_raw(0), &one).expect("one of the CPUs");
}

/// When its init ends, the kernel closes a namespace, and then kills the members in the order of their numbers. The
/// last one, which clones all the time, has as long as it takes to kill the others.
fn in_dying_namespace(report: &mut Report) -> bool {
    const OTHERS: usize = 600;
    // SAFETY: forks that make only system calls on memory mapped here, and never return.
    unsafe {
        let keeper = libc::fork();
        if keeper == 0 {
            if libc::unshare(libc::CLONE_NEWPID) != 0 {
                libc::_exit(1);
            }
            let ready = libc::mmap(
                std::ptr::null_mut(),
                4096,
                3,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
            .cast::<AtomicU32>();
            let init = libc::fork();
            if init == 0 {
                // Those that are woken to be killed must not push the last one off its CPU.
                let cpus = nix::sched::sched_getaffinity(Pid::from_raw(0)).expect("the affinity");
                pin(false);
                for _ in 0..OTHERS {
                    let _ = sleeper();
                }
                if libc::fork() == 0 {
                    nix::sched::sched_setaffinity(Pid::from_raw(0), &cpus).expect("as before");
                    pin(true);
                    clone_until_killed(report, &*ready);
                }
                while (*ready).load(Ordering::SeqCst) == 0 {
                    libc::sched_yield();
                }
                libc::_exit(0);
            }
            libc::waitpid(init, std::ptr::null_mut(), 0);
            libc::_exit(0);
        }
        let mut status = 0;
        libc::waitpid(keeper, &raw mut status, 0);
        status == 0
    }
}

/// What it sees before SIGKILL is in shared memory.
fn clone_until_killed(report: &mut Report, ready: &AtomicU32) -> ! {
    ready.store(1, Ordering::SeqCst);
    // A thread that is created or ended would wait for the lock that killing the others takes; this never is.
    while calls_of_clone::until_cgroup() != Err(Errno::ENOMEM) {}
    loop {
        if let Err(errno) = real_clone(CloneCall::Clone3, false) {
            let mut again = || real_clone(CloneCall::Clone3, false);
            let circumstances = circumstances(Step::Clone, errno, 0, CloneCall::Clone3);
            record(report, diagnose(&circumstances, Some(&mut again)));
        }
    }
}

/// Children that fork and exit all the time, until this process ends.
fn noise(count: usize) {
    let parent = own_pidfd();
    for _ in 0..count {
        // SAFETY: the child makes only system calls, forks that exit at once, and never returns.
        unsafe {
            // Earlier noise takes part in the limit, too.
            let forked = loop {
                match libc::fork() {
                    -1 => {}
                    pid => break pid,
                }
            };
            if forked == 0 {
                die_with_parent(parent);
                loop {
                    match libc::fork() {
                        0 => libc::_exit(0),
                        -1 => {}
                        pid => {
                            libc::waitpid(pid, std::ptr::null_mut(), 0);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn noise_at_a_pids_cgroup() {
    let Some(cgroup) = Cgroup::new(PIDS_ROOT) else {
        println!("skipped: no pids cgroup");
        return;
    };
    cgroup.set("pids.max", "4");
    let report = in_child("noise, pids cgroup", |report| {
        cgroup.enter();
        noise(2);
        clones(report, CloneCall::Clone3, true);
    });
    never_wrong(report, &[CauseKind::PidsCgroup]);
    cgroup.set("pids.max", "4");
    let report = in_child("noise, pids cgroup, never", |report| {
        cgroup.enter();
        noise(2);
        clones(report, CloneCall::Clone3, false);
    });
    never_wrong(report, &[CauseKind::PidsCgroup]);
    cgroup.set("pids.max", "4");
    let report = in_child("noise, pids cgroup, nproc near", |report| {
        cgroup.enter();
        // Forks that the cgroup refuses count towards RLIMIT_NPROC until then, so that 5 would be a
        // second cause by right.
        set_limit(libc::RLIMIT_NPROC, 8);
        become_user(54324);
        noise(2);
        clones(report, CloneCall::Clone3, true);
    });
    never_wrong(report, &[CauseKind::PidsCgroup]);
}

#[test]
fn noise_at_nproc() {
    // A user of its own for each: the noise of the one before may still be ending.
    for (repeat, uid) in [(true, 54325), (false, 54327)] {
        let report = in_child("noise, nproc", |report| {
            set_limit(libc::RLIMIT_NPROC, 4);
            become_user(uid);
            noise(2);
            clones(report, CloneCall::Clone3, repeat);
        });
        never_wrong(report, &[CauseKind::UserProcesses]);
    }
}

#[test]
fn noise_at_pid_numbers() {
    for (repeat, uid) in [(true, 0), (false, 0), (true, 54326)] {
        let report = in_child("noise, pid numbers", |report| {
            in_pid_namespace(report, Some(400), |report| {
                noise(2);
                for _ in 0..398 - 4 {
                    let _ = sleeper();
                }
                become_user(uid);
                clones(report, CloneCall::Clone3, repeat);
            });
        });
        never_wrong(report, &[CauseKind::PidNumbers]);
    }
}

#[test]
fn unreadable() {
    let empty = std::env::temp_dir().join(format!("nptl-empty-{}", std::process::id()));
    let _ = fs::create_dir(&empty);
    let path = std::ffi::CString::new(empty.to_str().unwrap()).unwrap();
    // SAFETY: NUL-terminated path; the child process's own root.
    let report = in_child("nproc, no /proc", |report| unsafe {
        set_limit(libc::RLIMIT_NPROC, 1);
        libc::chroot(path.as_ptr());
        libc::chdir(c"/".as_ptr());
        become_nobody();
        clones(report, CloneCall::Clone3, true);
    });
    let _ = fs::remove_dir(&empty);
    expect(report, CauseKind::UserProcesses, Certainty::Inferred);
    let report = in_child("nproc, EMFILE", |report| {
        set_limit(libc::RLIMIT_NPROC, 1);
        become_nobody();
        set_limit(libc::RLIMIT_NOFILE, 0);
        clones(report, CloneCall::Clone3, true);
    });
    expect(report, CauseKind::UserProcesses, Certainty::Inferred);
    let Some(cgroup) = Cgroup::new(PIDS_ROOT) else {
        return;
    };
    cgroup.set("pids.max", "1");
    let report = in_child("pids cgroup, EMFILE", |report| {
        cgroup.enter();
        set_limit(libc::RLIMIT_NOFILE, 0);
        clones(report, CloneCall::Clone3, true);
    });
    never_wrong(report, &[CauseKind::PidsCgroup]);
}

#[test]
fn probes_create_nothing() {
    let Some(cgroup) = Cgroup::new(PIDS_ROOT) else {
        return;
    };
    cgroup.set("pids.max", "100");
    let report = in_child("probes", |report| {
        cgroup.enter();
        let read = |file: &str| fs::read_to_string(cgroup.0.join(file)).unwrap_or_default();
        let threads = || fs::read_dir("/proc/self/task").map(Iterator::count).ok();
        let before = (
            read("pids.current"),
            read("pids.events"),
            threads(),
            fs::read_to_string("/proc/self/limits").ok(),
        );
        for _ in 0..1000 {
            let results = [
                calls_of_clone::clone3_empty(),
                calls_of_clone::until_pid_number(false),
                calls_of_clone::until_pid_number(true),
                calls_of_clone::until_cgroup(),
                calls_of_clone::until_thread_pointer(THREAD_FLAGS, true),
                calls_of_clone::until_thread_pointer(THREAD_FLAGS, false),
                calls_of_clone::until_flags(THREAD_FLAGS),
            ];
            use Errno::*;
            if results
                != [
                    Err(EINVAL),
                    Err(EINVAL),
                    Err(EINVAL),
                    Err(EBADF),
                    Err(EPERM),
                    Err(EPERM),
                    Err(EINVAL),
                ]
            {
                report.failed = Some("unexpected answers");
                return;
            }
        }
        let after = (
            read("pids.current"),
            read("pids.events"),
            threads(),
            fs::read_to_string("/proc/self/limits").ok(),
        );
        if before != after {
            report.failed = Some("something has changed");
        }
    });
    assert!(report.is_some());
}

#[test]
fn headroom_is_readable() {
    let head = headroom();
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{head}");
    let _ = writeln!(out, "{:?}", head.first(2 << 20));
    let _ = writeln!(out, "{}", headroom_of(Pid::from_raw(1)).unwrap());
    assert!(headroom_of(Pid::from_raw(i32::MAX)).is_err());
}

use nix::unistd::Pid;
