//! What refuses clone itself.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use nptl::diagnose::{CauseKind, CgroupPlace, CloneCall, PidLevel};
use nptl::{Builder, Cause, Certainty, RetryPolicy, SpawnError, Step, diagnose};

use super::ask::{
    Asker, Expected, Right, ask_nptl, ask_pthread, ask_std, await_reaping, other_cause, reports,
    same, tell_answer, tell_failure, tell_granted, tell_note, tell_pthread, tell_std, threads,
};
use super::{Need, Scenario, number_in, plain, privileged, storm};
use support::{
    Cgroup, CgroupDir, Sleepers, become_unused_user, deny, inherited_cgroup, is_root,
    kernel_at_least, set_rlimit,
};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "first-spawn",
        what: "RLIMIT_NPROC is reached before the process's very first spawn",
        needs: &[],
        sandbox: plain,
        provoke: first_spawn,
    },
    Scenario {
        name: "rlimit-nproc",
        what: "the user has as many tasks as RLIMIT_NPROC allows",
        needs: &[],
        sandbox: plain,
        provoke: rlimit_nproc,
    },
    Scenario {
        name: "seccomp-clone3",
        what: "a seccomp filter answers clone3 with EAGAIN",
        needs: &[],
        sandbox: plain,
        provoke: seccomp_clone3,
    },
    Scenario {
        name: "seccomp-clone",
        what: "a seccomp filter answers clone3 with ENOSYS and threads by clone with EAGAIN",
        needs: &[],
        sandbox: plain,
        provoke: seccomp_clone,
    },
    Scenario {
        name: "deadline",
        what: "the calling thread runs under SCHED_DEADLINE without reset-on-fork",
        needs: &[Need::Root],
        sandbox: plain,
        provoke: deadline,
    },
    Scenario {
        name: "sibling-exec",
        what: "another thread of the process is inside execve: retried until it is over",
        needs: &[],
        sandbox: plain,
        provoke: sibling_exec,
    },
    Scenario {
        name: "sibling-exec-no-retry",
        what: "the same with RetryPolicy::never",
        needs: &[],
        sandbox: plain,
        provoke: sibling_exec_no_retry,
    },
    Scenario {
        name: "pid-numbers",
        what: "kernel.pid_max of the process's own pid namespace is exhausted",
        needs: &[Need::UserNamespace, Need::Kernel6_14],
        sandbox: |child| Ok(privileged(child)?.pid_namespace(Some(PID_MAX))),
        provoke: |ask| pid_numbers(ask, PidLevel::Own),
    },
    Scenario {
        name: "pid-numbers-outer",
        what: "kernel.pid_max of the pid namespace around the process's own is exhausted",
        needs: &[Need::UserNamespace, Need::Kernel6_14],
        sandbox: |child| {
            let outer = privileged(child)?.pid_namespace(Some(PID_MAX));
            Ok(outer.pid_namespace(None))
        },
        provoke: |ask| pid_numbers(ask, PidLevel::Ancestor),
    },
    Scenario {
        name: "dying-pid-namespace",
        what: "the init of the process's pid namespace has just ended",
        needs: &[Need::UserNamespace],
        sandbox: privileged,
        provoke: dying_pid_namespace,
    },
    Scenario {
        name: "unshared-pid-namespace",
        what: "the process has unshared its pid namespace",
        needs: &[Need::UserNamespace],
        sandbox: privileged,
        provoke: unshared_pid_namespace,
    },
    Scenario {
        name: "pids-cgroup",
        what: "pids.max of the process's own cgroup is reached",
        needs: &[Need::Root, Need::PidsCgroup],
        sandbox: |child| Ok(child.cgroup(&Cgroup::pids()?.nested()?)),
        provoke: |ask| pids_cgroup(ask, CgroupPlace::Own),
    },
    Scenario {
        name: "pids-cgroup-ancestor",
        what: "pids.max of a cgroup around the process's own is reached",
        needs: &[Need::Root, Need::PidsCgroup],
        sandbox: |child| Ok(child.cgroup(&Cgroup::pids()?.nested()?)),
        provoke: |ask| pids_cgroup(ask, CgroupPlace::Ancestor),
    },
    Scenario {
        name: "pids-cgroup-borrowed",
        what: "the process's own cgroup has no pids controller, and pids.max of the one around it is reached",
        needs: &[Need::Root, Need::PidsCgroupV2],
        sandbox: |child| Ok(child.cgroup(&Cgroup::pids()?.nested_without_controller()?)),
        provoke: |ask| pids_cgroup(ask, CgroupPlace::Ancestor),
    },
    Scenario {
        name: "pids-cgroup-hidden",
        what: "pids.max of a cgroup outside the process's cgroup namespace is reached",
        needs: &[Need::Root, Need::PidsCgroup],
        sandbox: |child| Ok(child.cgroup(&Cgroup::pids()?.nested()?)),
        provoke: |ask| pids_cgroup_hidden(ask, false),
    },
    Scenario {
        name: "pod-limit",
        what: "the same where a container's filter answers clone3 with ENOSYS",
        needs: &[Need::Root, Need::PidsCgroup],
        sandbox: |child| Ok(child.cgroup(&Cgroup::pids()?.nested()?)),
        provoke: |ask| pids_cgroup_hidden(ask, true),
    },
    Scenario {
        name: "join-then-spawn",
        what: "a thread was joined but the kernel still counts it: retried until it does not",
        needs: &[Need::RootToBeSure],
        sandbox: plain,
        provoke: join_then_spawn,
    },
    Scenario {
        name: "join-then-spawn-no-retry",
        what: "the same with RetryPolicy::never",
        needs: &[Need::RootToBeSure],
        sandbox: plain,
        provoke: join_then_spawn_no_retry,
    },
];

const PID_MAX: u32 = 400;

const PROVEN: &[Certainty] = &[Certainty::Proven];
const INFERRED: &[Certainty] = &[Certainty::Inferred];

const fn refused(kind: CauseKind, certainty: &'static [Certainty]) -> Expected {
    Expected {
        step: Step::Clone,
        errno: Errno::EAGAIN,
        kind,
        certainty,
    }
}

pub(super) fn is_initial_user_namespace() -> bool {
    // Fixed by the kernel (PROC_USER_INIT_INO).
    inode("/proc/self/ns/user") == Some(0xEFFF_FFFD)
}

fn inode(path: &str) -> Option<u64> {
    std::fs::metadata(path).ok().map(|file| file.ino())
}

/// Root is exempt from RLIMIT_NPROC; of another user the other processes count, too.
pub(super) fn become_limited_user() -> Result<u32, String> {
    match is_root() {
        true => become_unused_user(),
        // SAFETY: getuid has no preconditions.
        false => Ok(unsafe { libc::getuid() }),
    }
}

/// The lowest RLIMIT_NPROC that still allows one more task, set. The count it is compared with is shown
/// nowhere, so that it has to be tried.
pub(super) fn leave_room_for_one() -> Result<u64, String> {
    let Some(mut limit) = (1..100_000).find(|&limit| leaves_room(limit)) else {
        return Err("this user has too many tasks".to_owned());
    };
    // Others of this user's may have ended meanwhile.
    while limit > 1 && leaves_room(limit - 1) {
        limit -= 1;
    }
    set_rlimit(libc::RLIMIT_NPROC, limit);
    Ok(limit)
}

fn leaves_room(limit: u64) -> bool {
    set_rlimit(libc::RLIMIT_NPROC, limit);
    let threads = threads();
    let granted = ask_pthread(64 << 10) == 0;
    await_reaping(threads);
    granted
}

fn user_processes(
    error: &SpawnError,
    certainty: &'static [Certainty],
    user: u32,
    limit: u64,
) -> Result<(), String> {
    refused(CauseKind::UserProcesses, certainty).judge(error, |cause| match *cause {
        Cause::UserProcesses(diagnose::UserProcesses { uid, soft, .. }) => {
            same("the user", uid, Some(user))?;
            same("the limit", soft, Some(limit))
        }
        ref other => other_cause(other),
    })?;
    reports(
        error,
        &[
            &format_args!("/proc/thread-self/status, real Uid: {user}\n"),
            &format_args!("RLIMIT_NPROC, soft: {limit}\n"),
            &"LimitNPROC=N",
            &format_args!("ps -L -U {user} "),
        ],
    )
}

fn first_spawn(ask: &mut Asker<'_>) -> Result<(), String> {
    let user = become_limited_user()?;
    set_rlimit(libc::RLIMIT_NPROC, 1);
    for _ in 0..ask.rounds {
        ask.ask_nptl();
    }
    ask.ask_others();
    // A calibration is not repeated.
    ask.tell(Right::Refused, |error| {
        user_processes(error, INFERRED, user, 1)?;
        match error.to_string().contains("calibration thread") {
            true => Ok(()),
            false => Err(format!("it does not say that it was the first: {error}")),
        }
    });
    Ok(())
}

fn rlimit_nproc(ask: &mut Asker<'_>) -> Result<(), String> {
    let user = become_limited_user()?;
    ask.calibrate()?;
    let limit = leave_room_for_one()? - 1;
    if limit == 0 {
        return Err("RLIMIT_NPROC does not hold for this user".to_owned());
    }
    set_rlimit(libc::RLIMIT_NPROC, limit);
    ask.ask();
    ask.tell(Right::Refused, |error| {
        user_processes(error, PROVEN, user, limit)
    });
    Ok(())
}

fn seccomp(ask: &mut Asker<'_>, by: CloneCall, certainty: &'static [Certainty]) {
    ask.ask_others();
    ask.ask_many(false);
    let alone = threads() == Some(1);
    ask.tell(Right::Refused, |error| {
        // From clone alone it cannot be distinguished from another thread inside execve.
        let unknown = error.certainty() == Certainty::Unknown && error.is_transient();
        if by == CloneCall::Clone && !alone && unknown {
            return match error.alternatives().contains(CauseKind::Seccomp) {
                true => Ok(()),
                false => Err(format!("the filter is not listed: {error}")),
            };
        }
        refused(CauseKind::Seccomp, certainty).judge(error, |cause| match *cause {
            Cause::Seccomp(diagnose::Seccomp {
                call,
                mode,
                filters,
                ..
            }) => {
                same("the call", call, by)?;
                same("the mode", mode, Some(2))?;
                same("the presence of filters", filters > Some(0), true)
            }
            ref other => other_cause(other),
        })?;
        reports(
            error,
            &[
                &"/proc/thread-self/status, Seccomp: 2\n",
                &": EAGAIN\n",
                &format_args!("Allow {by} for threads in the filter"),
            ],
        )
    });
}

fn seccomp_clone3(ask: &mut Asker<'_>) -> Result<(), String> {
    ask.calibrate()?;
    deny(libc::SYS_clone3, libc::EAGAIN).install();
    seccomp(ask, CloneCall::Clone3, PROVEN);
    Ok(())
}

fn seccomp_clone(ask: &mut Asker<'_>) -> Result<(), String> {
    ask.calibrate()?;
    deny(libc::SYS_clone3, libc::ENOSYS).install();
    deny(libc::SYS_clone, libc::EAGAIN)
        .when_set(0, libc::CLONE_THREAD as u64)
        .install();
    // The flags of clone are in the filter's sight, and no others are tried.
    seccomp(ask, CloneCall::Clone, INFERRED);
    Ok(())
}

fn set_scheduling(policy: u32, nanoseconds: u64) -> io::Result<()> {
    // SAFETY: all zeroes is a valid structure.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    attributes.size = size_of::<libc::sched_attr>() as u32;
    attributes.sched_policy = policy;
    attributes.sched_runtime = nanoseconds;
    attributes.sched_deadline = nanoseconds * 10;
    attributes.sched_period = nanoseconds * 10;
    // SAFETY: a valid structure of the size that it contains; 0 is the calling thread.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn deadline(ask: &mut Asker<'_>) -> Result<(), String> {
    const SCHED_DEADLINE: u32 = 6;
    ask.calibrate()?;
    set_scheduling(SCHED_DEADLINE, 10_000_000)
        .map_err(|error| format!("SCHED_DEADLINE is not to be had: {error}"))?;
    ask.ask();
    set_scheduling(0, 0).map_err(|error| error.to_string())?;
    ask.tell(Right::Refused, |error| {
        refused(CauseKind::DeadlineScheduling, PROVEN).judge(error, |cause| match *cause {
            Cause::DeadlineScheduling(diagnose::DeadlineScheduling { policy, flags, .. }) => {
                same("the policy", policy, SCHED_DEADLINE)?;
                same("the flags", flags, Some(0))
            }
            ref other => other_cause(other),
        })?;
        reports(
            error,
            &[
                &"scheduling policy (6 is SCHED_DEADLINE): 6\n",
                &"sched_getattr, flags (bit 0 is reset-on-fork): 0\n",
                &"chrt --deadline --reset-on-fork",
            ],
        )
    });
    Ok(())
}

/// A thread that is inside execve most of the time: the file is opened, found executable, and refused only
/// after the kernel has marked the state that it shares with the other threads.
///
/// `burst` times without a pause: endlessly, other threads would hardly run in between.
pub(super) fn exec_in_a_loop(burst: usize) -> Result<(), String> {
    let failed = |_| io::Error::last_os_error().to_string();
    // SAFETY: the name is NUL-terminated, the buffer as long as said.
    let file = unsafe {
        let file = libc::memfd_create(c"no program".as_ptr(), 0);
        libc::write(file, c"no program".as_ptr().cast(), 10);
        file
    };
    let path = CString::new(format!("/proc/self/fd/{file}")).map_err(|e| e.to_string())?;
    u32::try_from(file).map_err(failed)?;
    let work = move || {
        let nothing = [std::ptr::null()];
        if burst != usize::MAX {
            // On a busy machine a thread that is preempted inside execve stays there for longer than any test
            // waits. This one sleeps between its bursts.
            be_urgent();
        }
        loop {
            for _ in 0..burst {
                // SAFETY: NUL-terminated path, lists that end with a null pointer. The file is no program, so
                // that the call returns.
                unsafe { libc::execve(path.as_ptr(), nothing.as_ptr(), nothing.as_ptr()) };
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    };
    std::thread::Builder::new()
        .spawn(work)
        .map_err(|error| error.to_string())?;
    Ok(())
}

/// Transient, and never another name. An unknown cause is honest: it may be over by then.
fn transient_or_unknown(error: &SpawnError, kind: CauseKind) -> Result<(), String> {
    let found = error.cause().kind();
    if found != kind && found != CauseKind::Unknown {
        return Err(format!("expected {kind:?}, or unknown: {error}"));
    }
    match error.is_transient() {
        true => reports(error, &[&"Retrying "]),
        false => Err(format!("not called transient: {error}")),
    }
}

const NEVER_MET: &str = "what comes and goes was never in the way";

/// Asks until every library has met the obstacle, or for long enough.
fn ask_repeatedly(ask: &mut Asker<'_>, least: usize, most: usize) {
    for round in 0..most {
        if round >= least && ask.nptl_refusals() >= ask.rounds {
            break;
        }
        ask.ask_others();
        ask.ask_nptl();
    }
}

fn sibling_exec(ask: &mut Asker<'_>) -> Result<(), String> {
    ask.calibrate()?;
    exec_in_a_loop(20)?;
    ask_repeatedly(ask, 300, 300);
    if ask.refusals() == 0 {
        return Err(NEVER_MET.to_owned());
    }
    ask.tell(Right::Granted, |error| {
        transient_or_unknown(error, CauseKind::SiblingExec)
    });
    Ok(())
}

fn sibling_exec_no_retry(ask: &mut Asker<'_>) -> Result<(), String> {
    ask.calibrate()?;
    ask.retry(RetryPolicy::never());
    exec_in_a_loop(usize::MAX)?;
    ask_repeatedly(ask, 20, 3000);
    if ask.nptl_refusals() == 0 {
        return Err(NEVER_MET.to_owned());
    }
    ask.tell(Right::Either, |error| {
        transient_or_unknown(error, CauseKind::SiblingExec)
    });
    Ok(())
}

fn pid_numbers(ask: &mut Asker<'_>, truth: PidLevel) -> Result<(), String> {
    ask.calibrate()?;
    let own = number_in("/proc/sys/kernel/pid_max")?;
    let mut sleepers = Sleepers::default();
    if sleepers.add(2 * PID_MAX as usize).is_ok() {
        return Err("more processes fit than there are pid numbers".to_owned());
    }
    ask.ask();
    let sleeping = sleepers.len();
    sleepers.remove(8);
    tell_note(format_args!(
        "{sleeping} processes hold the numbers; kernel.pid_max reads {own} here"
    ));
    // Inside a user namespace its remembered RLIMIT_NPROC cannot be excluded, except where the process sees
    // its own namespace's numbers exhausted.
    let certainty: &[Certainty] = match truth == PidLevel::Own || is_initial_user_namespace() {
        true => PROVEN,
        false => &[Certainty::Inferred],
    };
    ask.tell(Right::Refused, |error| {
        refused(CauseKind::PidNumbers, certainty).judge(error, |cause| match *cause {
            Cause::PidNumbers(diagnose::PidNumbers {
                level,
                pid_max,
                sampled,
                free,
                initial_namespace,
                ..
            }) => {
                same("the level", level, truth)?;
                same("kernel.pid_max", pid_max, Some(own))?;
                same("the initial namespace", initial_namespace, Some(false))?;
                same("having looked at numbers", sampled > 0, true)?;
                same("no number free", free == 0, truth == PidLevel::Own)
            }
            ref other => other_cause(other),
        })?;
        let place = match truth {
            PidLevel::Own => "inside this pid namespace",
            _ => "in the pid namespace around this one",
        };
        reports(
            error,
            &[
                &format_args!("/proc/sys/kernel/pid_max: {own}\n"),
                &format_args!("sysctl kernel.pid_max=N {place}"),
            ],
        )
    });
    Ok(())
}

fn unshared_pid_namespace(ask: &mut Asker<'_>) -> Result<(), String> {
    ask.calibrate()?;
    let namespace = inode("/proc/self/ns/pid");
    // SAFETY: changes only where later children of this process live.
    if unsafe { libc::unshare(libc::CLONE_NEWPID) } != 0 {
        return Err(format!("unshare: {}", io::Error::last_os_error()));
    }
    // Some kernels (7.2) show the new namespace before its first process, others (up to 6.18) do not.
    let empty = inode("/proc/thread-self/ns/pid_for_children");
    ask.ask_others();
    ask.ask_many(false);
    ask.tell(Right::Refused, |error| {
        let expected = Expected {
            errno: Errno::EINVAL,
            ..refused(CauseKind::UnsharedPidNamespace, PROVEN)
        };
        expected.judge(error, |cause| match *cause {
            Cause::UnsharedPidNamespace(diagnose::UnsharedPidNamespace {
                own,
                for_children,
                ..
            }) => {
                same("the own namespace", own, namespace)?;
                same("the empty namespace of children", for_children, empty)
            }
            ref other => other_cause(other),
        })?;
        let own = namespace.unwrap_or_default();
        let children = match empty {
            Some(inode) => inode.to_string(),
            None => "a new namespace without any process".to_owned(),
        };
        reports(
            error,
            &[
                &format_args!("/proc/thread-self/ns/pid: {own}\n"),
                &format_args!("/proc/thread-self/ns/pid_for_children: {children}\n"),
                &"before unshare(CLONE_NEWPID)",
            ],
        )
    });
    Ok(())
}

fn pids_cgroup(ask: &mut Asker<'_>, truth: CgroupPlace) -> Result<(), String> {
    ask.calibrate()?;
    let inner = inherited_cgroup(0);
    let own = inner.path();
    let full = match truth {
        CgroupPlace::Own => own,
        _ => own.parent().ok_or("a cgroup without a parent")?,
    };
    let tasks = number_in(full.join("pids.current"))?;
    std::fs::write(full.join("pids.max"), tasks.to_string()).map_err(|e| e.to_string())?;
    ask.ask();
    std::fs::write(full.join("pids.max"), "max").map_err(|e| e.to_string())?;
    ask.tell(Right::Refused, |error| {
        let mut in_use = 0;
        refused(CauseKind::PidsCgroup, PROVEN).judge(error, |cause| match *cause {
            Cause::PidsCgroup(diagnose::PidsCgroup {
                directory,
                place,
                version,
                current,
                maximum,
                refusals,
                ..
            }) => {
                same("the place", place, truth)?;
                same("the directory", directory.to_str(), full.to_str())?;
                same(
                    "the version",
                    version,
                    if inner.is_unified() { 2 } else { 1 },
                )?;
                // The kernel charges a clone before it looks at the limit (pids_try_charge), so that refused ones of a
                // storm's other spawners are counted for a moment.
                let charged = current.unwrap_or(0);
                match storm::duration() {
                    Some(_) => same("pids.current below the limit", charged < tasks, false)?,
                    None => same("pids.current", charged, tasks)?,
                }
                in_use = charged;
                same("pids.max", maximum, Some(tasks))?;
                same("a counted refusal", refusals > Some(0), true)
            }
            ref other => other_cause(other),
        })?;
        reports(
            error,
            &[
                &format_args!("directory: {}\n", full.display()),
                &format_args!("pids.current: {in_use}\n"),
                &format_args!("pids.max: {tasks}\n"),
                &format_args!("echo N > {}/pids.max\n", full.display()),
                &"TasksMax=N",
            ],
        )
    });
    Ok(())
}

/// The calling thread sees its cgroup as the root of the hierarchy, as in a container.
fn hide_ancestors(own: &CgroupDir) -> Result<(), String> {
    // Only a cgroup has this file: what is mounted is the uppermost.
    let inside = |path: &&Path| path.join("cgroup.procs").exists();
    let point = own.path().ancestors().take_while(inside).last();
    let path = |path: &Path| CString::new(path.as_os_str().as_bytes());
    let point = path(point.ok_or("no mount point")?).map_err(|e| e.to_string())?;
    let (kind, options) = match own.is_unified() {
        true => (c"cgroup2", None),
        false => (c"cgroup", Some(c"pids")),
    };
    let options = options.map_or(std::ptr::null(), |options| options.as_ptr().cast());
    let none = std::ptr::null();
    // SAFETY: NUL-terminated strings; only the calling thread's namespaces are changed.
    let done = unsafe {
        libc::unshare(libc::CLONE_NEWCGROUP | libc::CLONE_NEWNS) == 0
            && libc::mount(
                none,
                c"/".as_ptr(),
                none,
                libc::MS_REC | libc::MS_PRIVATE,
                none.cast(),
            ) == 0
            // Nothing can be mounted over itself.
            && libc::umount2(point.as_ptr(), libc::MNT_DETACH) == 0
            && libc::mount(kind.as_ptr(), point.as_ptr(), kind.as_ptr(), 0, options) == 0
    };
    match done {
        true => Ok(()),
        false => Err(format!(
            "a cgroup namespace: {}",
            io::Error::last_os_error()
        )),
    }
}

fn pids_cgroup_hidden(ask: &mut Asker<'_>, filtered: bool) -> Result<(), String> {
    ask.calibrate()?;
    let inner = inherited_cgroup(0);
    let full = inner.path().parent().ok_or("a cgroup without a parent")?;
    let tasks = inner.tasks();
    // Opened before it is out of sight.
    let mut limit = File::options()
        .write(true)
        .open(full.join("pids.max"))
        .map_err(|e| e.to_string())?;
    hide_ancestors(&inner)?;
    limit
        .write_all(tasks.to_string().as_bytes())
        .map_err(|e| e.to_string())?;
    if filtered {
        deny(libc::SYS_clone3, libc::ENOSYS).install();
    }
    ask.ask_others();
    ask.ask_many(false);
    limit.write_all(b"max").map_err(|e| e.to_string())?;
    // A v2 hierarchy counts a refusal at the cgroup whose limit was hit from 6.11 on, unless its mount says
    // otherwise: nothing in sight shows it, and only elimination is left.
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let at_the_limit = kernel_at_least(6, 11) && !mounts.contains("pids_localevents");
    let counted = !(inner.is_unified() && at_the_limit);
    let certainty: &[Certainty] = match counted {
        true => PROVEN,
        false => &[Certainty::Inferred],
    };
    ask.tell(Right::Refused, |error| {
        refused(CauseKind::PidsCgroup, certainty).judge(error, |cause| match *cause {
            Cause::PidsCgroup(diagnose::PidsCgroup {
                directory,
                place,
                current,
                maximum,
                refusals,
                ..
            }) => {
                same("the place", place, CgroupPlace::Hidden)?;
                same("the directory", directory.to_str(), None)?;
                same("pids.current", current, None)?;
                same("pids.max", maximum, None)?;
                same("a counted refusal", refusals > Some(0), counted)
            }
            ref other => other_cause(other),
        })
    });
    Ok(())
}

/// Keeps ended threads from being taken back, for about a millisecond each.
///
/// An ended thread first lets those who join it go on, then leaves the process's memory, and only then does the
/// kernel take its counts back. To leave it needs the lock that every change of the mappings holds, and a thread
/// of this value changes a large one on demand, whose pages are all the kernel's one page of zeroes.
struct SlowReaping {
    /// Of this process, this value's among them, when none is about to be taken back.
    threads: Option<u64>,
    demand: Sender<()>,
    answer: Receiver<()>,
}

impl SlowReaping {
    /// Enough to change them for about a millisecond.
    const BYTES: usize = 64 << 20;
    /// A thread of std's changes mappings itself as it begins and ends, and is held up as often.
    const CHANGES: usize = 4;

    fn new() -> Result<SlowReaping, String> {
        // SAFETY: a new mapping, which is kept.
        let start = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            libc::mmap(
                std::ptr::null_mut(),
                Self::BYTES,
                libc::PROT_READ,
                flags,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().to_string());
        }
        // SAFETY: advice about the mapping just made, which is only read; pages of 4 KiB each, or it would be
        // changed in no time. Refused before Linux 5.14: then each page is read.
        unsafe {
            libc::madvise(start, Self::BYTES, libc::MADV_NOHUGEPAGE);
            if libc::madvise(start, Self::BYTES, libc::MADV_POPULATE_READ) != 0 {
                for page in (0..Self::BYTES).step_by(4096) {
                    start.cast::<u8>().add(page).read_volatile();
                }
            }
        }
        let start = start as usize;
        let (demand, demands) = std::sync::mpsc::channel();
        let (answers, answer) = std::sync::mpsc::channel();
        let work = move || {
            be_preferred();
            let say = || answers.send(()).is_ok();
            while demands.recv().is_ok() && say() {
                for _ in 0..Self::CHANGES {
                    // SAFETY: the mapping made above, which is not in use.
                    unsafe {
                        libc::mprotect(start as *mut libc::c_void, Self::BYTES, libc::PROT_NONE);
                        libc::mprotect(start as *mut libc::c_void, Self::BYTES, libc::PROT_READ);
                    }
                }
                say();
            }
        };
        let thread = std::thread::Builder::new().spawn(work);
        thread.map_err(|error| error.to_string())?;
        Ok(SlowReaping {
            threads: threads(),
            demand,
            answer,
        })
    }

    /// Runs `work` while threads are taken back slowly.
    fn during(&self, work: impl FnOnce()) -> Result<(), String> {
        let gone = "the thread that changes mappings is gone";
        self.demand.send(()).map_err(|_| gone)?;
        // About to begin.
        self.answer.recv().map_err(|_| gone)?;
        work();
        self.answer.recv().map_err(|_| gone)?;
        // So that the next one does not meet a thread of this one's.
        await_reaping(self.threads);
        Ok(())
    }

    /// Whether an ended thread still counts.
    fn lasts(&self) -> bool {
        threads() > self.threads
    }
}

/// The calling thread waits for no thread of an ordinary policy. Where this is not permitted, it may have to.
fn be_urgent() {
    let urgent = libc::sched_param { sched_priority: 1 };
    // SAFETY: a valid sched_param; concerns the calling thread.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const urgent) };
}

/// A busy machine lets the calling thread, and what it starts from now on, not wait for other processes. Where this is not
/// permitted, others may keep it from its part. Not a real-time policy: at its limit those are made to wait, too.
fn be_preferred() {
    // SAFETY: plain numbers; 0 is the calling thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
}

/// Asks by `one` twice at a time, until it was asked and refused often enough, or has had as many chances.
fn join_often(
    ask: &mut Asker<'_>,
    slow: &SlowReaping,
    one: impl Fn(&mut Asker<'_>),
) -> Result<(), String> {
    let wanted = ask.rounds.clamp(5, 20);
    let before = ask.refusals();
    for round in 1..=2 * wanted {
        slow.during(|| {
            one(ask);
            one(ask);
        })?;
        if 2 * round >= ask.rounds && ask.refusals() - before >= wanted {
            break;
        }
    }
    Ok(())
}

/// For how long the default policy repeats what can be transient.
const DEFAULT_PATIENCE: Duration = Duration::from_millis(20);

fn join_and_spawn(ask: &mut Asker<'_>, right: Right) -> Result<(), String> {
    let slow = SlowReaping::new()?;
    be_preferred();
    let user = become_limited_user()?;
    ask.calibrate_alone()?;
    let limit = leave_room_for_one()?;
    join_often(ask, &slow, |ask| {
        ask.ask_pthread();
    })?;
    join_often(ask, &slow, |ask| {
        ask.ask_std();
    })?;
    join_often(ask, &slow, |ask| {
        let start = Instant::now();
        // A busy machine may keep the ended thread from its end for longer than the default policy waits.
        if !ask.ask_nptl() && slow.lasts() && start.elapsed() >= DEFAULT_PATIENCE {
            ask.outlasted();
        }
    })?;
    if !leaves_room(limit) || leaves_room(limit - 1) {
        return Err("other tasks of this user came or went meanwhile".to_owned());
    }
    if ask.refusals() == 0 || right == Right::Either && ask.nptl_refusals() == 0 {
        return Err(NEVER_MET.to_owned());
    }
    const ANY: &[Certainty] = &[Certainty::Proven, Certainty::Inferred];
    ask.tell(right, |error| {
        transient_or_unknown(error, CauseKind::UserProcesses)?;
        match error.cause().kind() {
            CauseKind::Unknown => Ok(()),
            _ => user_processes(error, ANY, user, limit),
        }
    });
    Ok(())
}

fn join_then_spawn(ask: &mut Asker<'_>) -> Result<(), String> {
    join_and_spawn(ask, Right::Granted)
}

fn join_then_spawn_no_retry(ask: &mut Asker<'_>) -> Result<(), String> {
    ask.retry(RetryPolicy::never());
    join_and_spawn(ask, Right::Either)
}

/// What the processes of a dying namespace report to the one outside.
#[derive(Default)]
struct NamespaceReport {
    ready: AtomicU64,
    nptl: AtomicU64,
}

/// A page shared with every process forked from here on.
fn shared_page() -> Result<&'static NamespaceReport, String> {
    // SAFETY: a new anonymous mapping that is never unmapped; zeroes are a valid value.
    unsafe {
        let page = libc::mmap(
            std::ptr::null_mut(),
            size_of::<NamespaceReport>(),
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        match page == libc::MAP_FAILED {
            true => Err(io::Error::last_os_error().to_string()),
            false => Ok(&*page.cast::<NamespaceReport>()),
        }
    }
}

/// Runs `body` in a forked process and waits for it, if `wait`.
fn fork(wait: bool, body: impl FnOnce()) -> Result<(), String> {
    // SAFETY: the child runs `body` alone and ends without returning. What `body` uses (malloc, glibc's and
    // nptl's threads) is usable in a forked child.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error().to_string()),
        0 => {
            body();
            // SAFETY: no destructor of this copy may run.
            unsafe { libc::_exit(0) }
        }
        pid if wait => {
            let mut status = 0;
            // SAFETY: a child of ours, and a valid place for its status.
            unsafe { libc::waitpid(pid, &raw mut status, 0) };
            match status {
                0 => Ok(()),
                status => Err(format!(
                    "a forked process ended with wait status {status:#x}"
                )),
            }
        }
        _ => Ok(()),
    }
}

/// How often nptl is asked in dying namespaces, at the most: each takes 800 processes, and the answer rests on nothing
/// that could change.
pub const DYING_ROUNDS: usize = 5;

/// When the init of a namespace ends, the kernel first closes the namespace for new tasks, then kills its
/// members one by one, the lowest number first. The member with the highest number therefore has the time
/// that it takes to kill all others. It must run all that time: init and this member each have a processor on which
/// they wait for no other process, where that is permitted.
fn dying_pid_namespace(ask: &mut Asker<'_>) -> Result<(), String> {
    const MEMBERS: usize = 800;
    ask.calibrate_alone()?;
    let seen = shared_page()?;
    let wanted = ask.rounds.min(DYING_ROUNDS) as u64;
    let count = || seen.nptl.load(Ordering::SeqCst);
    let most = 40;
    let mut namespaces = 0;
    while count() < wanted && namespaces < most {
        namespaces += 1;
        seen.ready.store(0, Ordering::SeqCst);
        fork(true, || {
            // SAFETY: changes only where later children of this process live.
            if unsafe { libc::unshare(libc::CLONE_NEWPID) } != 0 {
                tell_note(format_args!("unshare: {}", io::Error::last_os_error()));
                return;
            }
            let _ = fork(true, || init_of_dying_namespace(seen, MEMBERS));
        })?;
    }
    if count() == 0 {
        return Err(format!(
            "the moment between the end of a namespace and that of its processes was never met in {namespaces} tries"
        ));
    }
    tell_note(match namespaces {
        1 => format!("a namespace with {MEMBERS} members had to end for it"),
        _ => format!("{namespaces} namespaces with {MEMBERS} members each had to end for it"),
    });
    tell_granted(0);
    Ok(())
}

/// The CPUs that the calling thread may use.
fn allowed_cpus() -> Vec<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap_or_default();
    let all = 0..CpuSet::count();
    all.filter(|&cpu| allowed.is_set(cpu) == Ok(true)).collect()
}

/// Keeps the calling thread, and what it starts from now on, on one CPU.
fn pin(cpu: Option<&usize>) {
    let mut one = CpuSet::new();
    if cpu.is_some_and(|&cpu| one.set(cpu).is_ok()) {
        // Refused or not: the moment is only met less often without.
        let _ = sched_setaffinity(Pid::from_raw(0), &one);
    }
}

fn init_of_dying_namespace(seen: &'static NamespaceReport, members: usize) {
    // The members that are woken to be killed must not push the last one, which asks, off its CPU.
    let cpus = allowed_cpus();
    let several = cpus.len() > 1;
    pin(cpus.first());
    let mut sleepers = Sleepers::default();
    if sleepers.add(members).is_err() {
        return;
    }
    std::mem::forget(sleepers);
    let last = || {
        pin(cpus.last());
        if several {
            be_urgent();
        }
        ask_while_dying(seen);
    };
    if fork(false, last).is_err() {
        return;
    }
    while seen.ready.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    // Not earlier: the last member begins on this processor, and has to leave it first.
    if several {
        be_urgent();
    }
}

/// A clone into no cgroup: it always fails, EBADF where a pid number was to be had before.
fn until_cgroup() -> Errno {
    const CLONE_INTO_CGROUP: u64 = 1 << 33;
    // SAFETY: all zeroes is a valid structure.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = (libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD) as u64
        | (libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SYSVSEM) as u64
        | CLONE_INTO_CGROUP;
    args.cgroup = i32::MAX as u64;
    // SAFETY: a valid structure of that size; without a cgroup of that number no task comes to be.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
    debug_assert_eq!(result, -1);
    Errno::last()
}

/// Ends by SIGKILL.
fn ask_while_dying(seen: &'static NamespaceReport) {
    const STACK: usize = 256 << 10;
    let namespace = inode("/proc/self/ns/pid");
    let expected = Expected {
        errno: Errno::ENOMEM,
        ..refused(CauseKind::DyingPidNamespace, PROVEN)
    };
    // A thread created or ended while the others are being killed would wait for the lock that this takes, so
    // that the moment is waited for with a call that never gets so far.
    seen.ready.store(1, Ordering::SeqCst);
    while until_cgroup() != Errno::ENOMEM {}
    loop {
        let Err(error) = ask_nptl(Builder::new().stack_size(STACK)) else {
            tell_failure("a thread was created in a dying namespace");
            return;
        };
        let judgement = expected.judge(&error, |cause| match *cause {
            Cause::DyingPidNamespace(diagnose::DyingPidNamespace {
                namespace: found, ..
            }) => same("the namespace", found, namespace),
            ref other => other_cause(other),
        });
        let number = namespace.unwrap_or_default();
        let line = format!("/proc/thread-self/ns/pid_for_children: {number}\n");
        let judgement = judgement.and_then(|()| reports(&error, &[&line, &"Nothing from inside"]));
        tell_answer(&error, judgement);
        seen.nptl.fetch_add(1, Ordering::SeqCst);
        for (ask, tell) in [
            (ask_pthread as fn(usize) -> i32, tell_pthread as fn(i32)),
            (ask_std, tell_std),
        ] {
            tell(ask(STACK));
        }
    }
}
