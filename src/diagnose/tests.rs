//! Real refusals, in forked children with limits of their own.

use std::arch::asm;
use std::fs;
use std::sync::atomic::{AtomicI32, Ordering};

use support::{Cgroup, deny, is_root, or_skip, set_rlimit};

use super::judge::{Judgement, judge};
use super::*;
use crate::proc::cgroup::PIDS;
use crate::proc::status::Calls;
use crate::sys::clone_probe::{Probe, probe};

const ROUNDS: usize = 50;
const THREAD_FLAGS: u64 = 0x3d0f00 & !(libc::CLONE_SETTLS as u64);

static TID_WORD: AtomicI32 = AtomicI32::new(0);
static mut STACK: [u8; 16384] = [0; 16384];

#[derive(Clone, Copy)]
struct Finding {
    skipped: Option<&'static str>,
    failed: Option<&'static str>,
    count: usize,
    /// None: the repetition was granted.
    kinds: [Option<(CauseKind, Certainty)>; ROUNDS],
    last: Option<Verdict>,
}

impl Finding {
    fn record(&mut self, verdict: Result<(), Verdict>) {
        if let Some(kind) = self.kinds.get_mut(self.count) {
            *kind = verdict
                .err()
                .map(|verdict| (verdict.cause.kind(), verdict.certainty));
            self.last = verdict.err().or(self.last);
            self.count += 1;
        }
    }

    fn last(&self) -> Cause {
        self.last.expect("a refusal").cause
    }
}

/// One at a time: each makes limits real and reads counters that another would move.
static SERIAL: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// Runs `body` in a forked child and hands its report back through shared memory.
fn in_child(name: &str, body: impl FnOnce(&mut Finding)) -> Option<Finding> {
    let _serial = SERIAL
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let bytes = size_of::<Finding>();
    // SAFETY: a new shared mapping of the report's size, written by the child and read once it has ended; the child
    // never returns from here.
    let (report, status) = unsafe {
        let shared = libc::mmap(
            std::ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
        .cast::<Finding>();
        shared.write(Finding {
            skipped: None,
            failed: Some("died"),
            count: 0,
            kinds: [None; ROUNDS],
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
        (report, status)
    };
    if let Some(why) = report.skipped {
        println!("skipped: {name}: {why}");
        return None;
    }
    assert_eq!(report.failed, None, "{name}: wait status {status:#x}");
    if let Some(verdict) = &report.last {
        println!("{name}: {verdict}");
    }
    Some(report)
}

/// Refused clones, `ROUNDS` times.
fn clones(report: &mut Finding, call: CloneCall, repeat: bool) {
    let mut granted = 0_u64;
    while report.count < ROUNDS {
        match real_clone(call) {
            Ok(()) => {
                granted += 1;
                if granted > 300_000 {
                    report.failed = Some("the clone is not refused");
                    return;
                }
            }
            Err(error) if repeat => report.record(diagnose(&error, || real_clone(call))),
            Err(error) => report.record(Err(diagnose_once(&error))),
        }
    }
}

/// Calls of mmap or mprotect, all refused.
fn mappings(
    report: &mut Finding,
    step: Step,
    bytes: usize,
    mut refused: impl FnMut() -> Result<(), Errno>,
) {
    while report.count < ROUNDS {
        let Err(errno) = refused() else {
            report.failed = Some("the mapping is not refused");
            return;
        };
        report.record(Err(diagnose_once(&StepError {
            locks: step == Step::PrepareStack,
            ..StepError::new(step, errno, bytes)
        })));
    }
}

/// A real thread that exits at once, waited for until the kernel has cleared its tid word.
fn real_clone(call: CloneCall) -> Result<(), StepError> {
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
        let errno = Errno::new(-result as i32);
        return Err(StepError {
            call,
            ..StepError::new(Step::Clone, errno, 0)
        });
    }
    while TID_WORD.load(Ordering::SeqCst) != 0 {
        std::hint::spin_loop();
    }
    Ok(())
}

#[track_caller]
fn expect(report: Option<Finding>, kind: CauseKind, certainty: Certainty) {
    if let Some(report) = report {
        assert_eq!(report.kinds, [Some((kind, certainty)); ROUNDS]);
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

/// Says when this process has ended, to a child in another namespace that was too late to be killed with it.
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
    let result = Errno::result(child).map(|()| child);
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
fn nproc_by_legacy_clone() {
    let report = in_child("nproc, clone3 filtered with ENOSYS", |report| {
        set_rlimit(libc::RLIMIT_NPROC, 1);
        become_nobody();
        deny(libc::SYS_clone3, libc::ENOSYS).install();
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
    // No file shows the limit that the namespace remembers.
    expect(report, CauseKind::UserProcesses, Certainty::Inferred);
}

/// Runs `body` as init of a new pid namespace with /proc of its own.
fn in_pid_namespace(report: &mut Finding, pid_max: Option<u32>, body: impl FnOnce(&mut Finding)) {
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

/// Half of the numbers are held by sessions alone, whose leader has ended and whose member is in a group of its own:
/// `set -m; nohup daemon &` in a shell that has gone.
#[test]
fn pid_numbers_held_by_sessions() {
    let report = in_child("pid_max, sessions", |report| {
        in_pid_namespace(report, Some(700), |report| {
            // Stands in the way of pairs that begin at odd or at even numbers only.
            let _ = sleeper();
            while leaderless_session() {}
            while sleeper().is_ok() {}
            clones(report, CloneCall::Clone3, true);
        });
    });
    expect(report, CauseKind::PidNumbers, Certainty::Proven);
    if let Some(Cause::PidNumbers(numbers)) = report.map(|report| report.last()) {
        assert_eq!((numbers.level, numbers.free), (PidLevel::Own, 0));
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

/// A cgroup that fills up only after the one around it has refused is not named, and no more is one that was full
/// before and then had room.
#[test]
fn a_cgroup_that_was_not_full_throughout() {
    let outer = or_skip!(Cgroup::pids());
    let inner = outer.nested().expect("a cgroup below");
    // pids.max of the inner one at the two readings. It has one task, and room for another in between.
    for (before, after, expected) in [
        ("2", "2", CgroupPlace::Ancestor),
        ("2", "1", CgroupPlace::Unclear),
        ("1", "2", CgroupPlace::Unclear),
    ] {
        outer.set("pids.max", "1");
        let report = in_child("cgroups that fill up", |report| {
            inner.set("cgroup.procs", 0);
            let pids = Hierarchy::of_thread(b"pids", Calls::Any).expect("a hierarchy");
            inner.set("pids.max", before);
            let first = pids.snapshot(&PIDS);
            inner.set("pids.max", "2");
            let granted = real_clone(CloneCall::Clone3).is_ok();
            inner.set("pids.max", after);
            let second = pids.snapshot(&PIDS);
            report.failed = match judge(Some(&first), &second) {
                _ if granted => Some("granted"),
                Judgement::Counted { place, .. } if place == expected => None,
                Judgement::Counted { .. } => Some("the wrong place"),
                _ => Some("not counted"),
            };
        });
        assert!(report.is_some());
    }
}

/// `RetryPolicy::never` makes no call that could create a task, and what holds now need not have held then.
#[test]
fn without_a_repetition_nothing_is_proven() {
    let report = in_child("nproc", |report| {
        if !is_root() {
            report.skipped = Some("needs root");
            return;
        }
        set_rlimit(libc::RLIMIT_NPROC, 1);
        become_nobody();
        clones(report, CloneCall::Clone3, false);
    });
    expect(report, CauseKind::UserProcesses, Certainty::Inferred);
    for (outer, level) in [(false, PidLevel::Own), (true, PidLevel::Ancestor)] {
        let report = in_child("pid_max", |report| {
            in_pid_namespace(report, Some(400), |report| {
                let fill = |report: &mut Finding| {
                    while sleeper().is_ok() {}
                    clones(report, CloneCall::Clone3, false);
                };
                match outer {
                    true => in_pid_namespace(report, None, fill),
                    false => fill(report),
                }
            });
        });
        expect(report, CauseKind::PidNumbers, Certainty::Inferred);
        if let Some(Cause::PidNumbers(numbers)) = report.map(|report| report.last()) {
            assert_eq!(numbers.level, level);
        }
    }
    let cgroup = or_skip!(Cgroup::pids());
    cgroup.set("pids.max", "1");
    let report = in_child("pids cgroup", |report| {
        cgroup.set("cgroup.procs", 0);
        clones(report, CloneCall::Clone3, false);
    });
    expect(report, CauseKind::PidsCgroup, Certainty::Inferred);
    if let Some(Cause::PidsCgroup(found)) = report.map(|report| report.last()) {
        assert_eq!(found.directory.to_str(), cgroup.path().to_str());
    }
}

/// Without a repetition it is not known whether a sibling was inside execve, where there is one.
#[test]
fn a_sibling_that_may_have_been_inside_execve_is_transient() {
    for with_sibling in [true, false] {
        let report = in_child("nothing refuses now", |report| {
            if with_sibling {
                std::thread::spawn(std::thread::park);
            }
            let error = StepError {
                call: CloneCall::Clone3,
                ..StepError::new(Step::Clone, Errno::EAGAIN, 0)
            };
            report.record(Err(diagnose_once(&error)));
        });
        let verdict = report.and_then(|report| report.last).expect("a verdict");
        let listed = verdict.alternatives.contains(CauseKind::SiblingExec);
        assert_eq!((listed, verdict.transient), (with_sibling, with_sibling));
        assert_eq!(verdict.certainty, Certainty::Unknown);
    }
}

/// Under a filter no clone is made but with the refused one's flags. The kernel gives no EPERM to them; for ENOMEM it may
/// have had no memory.
#[test]
fn a_filter_that_answers_clone() {
    for (clone3, clone, kind, certainty) in [
        (
            libc::ENOSYS,
            libc::EPERM,
            CauseKind::Seccomp,
            Certainty::Inferred,
        ),
        (
            libc::EPERM,
            libc::ENOMEM,
            CauseKind::Unknown,
            Certainty::Unknown,
        ),
    ] {
        let report = in_child("seccomp", |report| {
            deny(libc::SYS_clone3, clone3).install();
            deny(libc::SYS_clone, clone).install();
            clones(report, CloneCall::Clone, true);
        });
        if let Some(verdict) = report.as_ref().and_then(|report| report.last) {
            let listed = verdict.alternatives.with(verdict.cause.kind());
            assert!(listed.contains(CauseKind::Seccomp));
        }
        expect(report, kind, certainty);
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
        set_rlimit(libc::RLIMIT_NPROC, 50);
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

/// A supervisor may look at the flags in memory, so that the filter is never excluded.
#[test]
fn a_filter_does_not_hide_other_causes() {
    let report = in_child("nproc under a harmless filter", |report| {
        set_rlimit(libc::RLIMIT_NPROC, 1);
        become_nobody();
        deny(libc::SYS_reboot, libc::EPERM).install();
        clones(report, CloneCall::Clone3, true);
    });
    expect(report, CauseKind::UserProcesses, Certainty::Inferred);
    let report = in_child("pid_max under a harmless filter", |report| {
        in_pid_namespace(report, Some(400), |report| {
            while sleeper().is_ok() {}
            deny(libc::SYS_reboot, libc::EPERM).install();
            clones(report, CloneCall::Clone3, true);
        });
    });
    expect(report, CauseKind::PidNumbers, Certainty::Inferred);
}

#[test]
fn an_unshared_pid_namespace_is_seen_by_files_alone() {
    for populated in [false, true] {
        let report = in_child("unshared pid namespace", |report| {
            // SAFETY: plain numbers, in a child process of its own.
            if unsafe { libc::unshare(libc::CLONE_NEWPID) } != 0 {
                report.skipped = Some("no pid namespace");
                return;
            }
            if populated {
                sleeper().expect("fork");
            }
            deny(libc::SYS_reboot, libc::EPERM).install();
            clones(report, CloneCall::Clone3, true);
        });
        expect(report, CauseKind::UnsharedPidNamespace, Certainty::Proven);
    }
}

fn map_stack(bytes: usize) -> Result<usize, Errno> {
    // SAFETY: a new mapping, which only this code has.
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
fn limits_of_memory_are_read_from_files_under_a_filter() {
    for (resource, kind) in [
        (libc::RLIMIT_AS, CauseKind::AddressSpace),
        (libc::RLIMIT_DATA, CauseKind::DataSegment),
    ] {
        let report = in_child("memory limit", |report| {
            deny(libc::SYS_reboot, libc::EPERM).install();
            let status = Status::read();
            let used = match kind {
                CauseKind::AddressSpace => status.mapped,
                _ => status.data,
            };
            // One page less than needed.
            set_rlimit(resource, used.unwrap() + STACK_BYTES as u64 - 4096);
            mappings(report, Step::MapStack, STACK_BYTES, || {
                map_stack(STACK_BYTES).map(drop)
            });
        });
        expect(report, kind, Certainty::Inferred);
    }
}

#[test]
fn a_stack_that_may_not_be_locked() {
    let report = in_child("mlock", |report| {
        set_rlimit(libc::RLIMIT_MEMLOCK, 1 << 20);
        become_nobody();
        let start = map_stack(STACK_BYTES).unwrap();
        mappings(report, Step::PrepareStack, STACK_BYTES, || {
            // SAFETY: a range of this process's own.
            Errno::result(unsafe { libc::mlock(start as *const _, STACK_BYTES) })
        });
    });
    expect(report, CauseKind::LockedMemory, Certainty::Proven);
}

#[test]
fn a_guard_that_needs_one_mapping_too_many() {
    let report = in_child("max_map_count, guard", |report| {
        // Stacks with protected guards until the guard is refused.
        let bytes = 64 << 10;
        loop {
            let Ok(start) = map_stack(bytes) else {
                report.failed = Some("mapping refused first");
                return;
            };
            let guard = || {
                // SAFETY: a page that was mapped here and is not in use.
                Errno::result(unsafe { libc::mprotect(start as *mut _, 4096, libc::PROT_NONE) })
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
fn probes_create_nothing() {
    let cgroup = or_skip!(Cgroup::pids());
    cgroup.set("pids.max", "100");
    let report = in_child("probes", |report| {
        cgroup.set("cgroup.procs", 0);
        let read = |file: &str| fs::read_to_string(cgroup.path().join(file)).unwrap_or_default();
        let threads = || fs::read_dir("/proc/self/task").map(Iterator::count).ok();
        let before = (
            read("pids.current"),
            read("pids.events"),
            threads(),
            fs::read_to_string("/proc/self/limits").ok(),
        );
        for _ in 0..1000 {
            let results = [
                probe(Probe::Clone3Empty),
                probe(Probe::PidNumber { fs: false }),
                probe(Probe::PidNumber { fs: true }),
                probe(Probe::Cgroup),
                probe(Probe::ThreadPointer { fs: true }),
                probe(Probe::ThreadPointer { fs: false }),
                probe(Probe::Clone3Flags),
            ];
            if results
                != [
                    Err(Errno::EINVAL),
                    Err(Errno::EINVAL),
                    Err(Errno::EINVAL),
                    Err(Errno::EBADF),
                    Err(Errno::EPERM),
                    Err(Errno::EPERM),
                    Err(Errno::EINVAL),
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
