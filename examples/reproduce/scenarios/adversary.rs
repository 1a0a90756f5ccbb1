//! Surroundings that mislead an analysis: filters that kill for a call they do not know, supervisors and tracers that
//! answer in the kernel's place, files that something else is mounted over, threads that make a limit come and go.

use std::ffi::CString;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nptl::diagnose::{CauseKind, PidLevel};
use nptl::{Cause, Certainty, RetryPolicy, SpawnError, Step, diagnose};

use super::ask::{Asker, Right, tell_note};
use super::clone::{become_limited_user, exec_in_a_loop, leave_room_for_one};
use super::memory::kilobytes;
use super::{Need, Scenario, plain, privileged};
use support::{
    Call, Sleepers, deny, set_rlimit, supervised, trap_all_clones_but, trap_strange_mappings,
};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "filter-exact-clone",
        what: "RLIMIT_NPROC, under a filter that kills for clones other than glibc's",
        needs: &[],
        sandbox: plain,
        provoke: filter_exact_clone,
    },
    Scenario {
        name: "filter-kills-clone3",
        what: "RLIMIT_NPROC, under a filter that kills for the clone3 that an earlier one answers",
        needs: &[],
        sandbox: plain,
        provoke: filter_kills_clone3,
    },
    Scenario {
        name: "filter-mmap-flags",
        what: "RLIMIT_AS, under a filter that kills for mappings other than a stack's",
        needs: &[],
        sandbox: plain,
        provoke: filter_mmap_flags,
    },
    Scenario {
        name: "notify-filter",
        what: "a supervisor refuses threads alone, by the flags in memory",
        needs: &[],
        sandbox: plain,
        provoke: notify_filter,
    },
    Scenario {
        name: "tracer",
        what: "a tracer injects EAGAIN into the clone3 of threads",
        needs: &[],
        sandbox: plain,
        provoke: tracer,
    },
    Scenario {
        name: "exec-without-clone3",
        what: "another thread is inside execve, and a filter answers clone3 with ENOSYS",
        needs: &[],
        sandbox: plain,
        provoke: exec_without_clone3,
    },
    Scenario {
        name: "nproc-raised",
        what: "a clone is refused as by RLIMIT_NPROC, which has room when it is looked at, with RetryPolicy::never",
        needs: &[],
        sandbox: plain,
        provoke: nproc_raised,
    },
    Scenario {
        name: "prefault",
        what: "the pages of a stack cannot be made resident",
        needs: &[],
        sandbox: plain,
        provoke: prefault,
    },
    Scenario {
        name: "rlimit-data-zero",
        what: "RLIMIT_DATA is 0: the kernel enforces the hard limit",
        needs: &[],
        sandbox: plain,
        provoke: rlimit_data_zero,
    },
    Scenario {
        name: "address-space-noise",
        what: "another thread maps and unmaps what RLIMIT_AS leaves",
        needs: &[],
        sandbox: plain,
        provoke: address_space_noise,
    },
    Scenario {
        name: "covered-pid-max",
        what: "pid numbers are exhausted, and another file is mounted over kernel.pid_max",
        needs: &[Need::UserNamespace, Need::Kernel6_14],
        sandbox: |child| Ok(privileged(child)?.pid_namespace(Some(400))),
        provoke: covered_pid_max,
    },
    Scenario {
        name: "covered-meminfo",
        what: "the stack is larger than memory, and a container's file is mounted over /proc/meminfo",
        needs: &[Need::UserNamespace],
        sandbox: |child| Ok(privileged(child)?.pid_namespace(None)),
        provoke: covered_meminfo,
    },
];

/// What may be named, and how surely. What is not named must be listed.
fn named(
    error: &SpawnError,
    truth: CauseKind,
    most: Certainty,
    transient: bool,
) -> Result<(), String> {
    let listed = error.alternatives().contains(truth);
    let right = match error.certainty() {
        Certainty::Proven => most == Certainty::Proven && error.cause().kind() == truth,
        Certainty::Inferred => most != Certainty::Unknown && error.cause().kind() == truth,
        // Nothing is listed where the answers differ.
        _ => listed || transient && error.is_transient(),
    };
    match right {
        true => Ok(()),
        false => Err(format!(
            "expected {truth:?}, at most {most}: {error}\n{}",
            error.report()
        )),
    }
}

fn meet_nproc(ask: &mut Asker<'_>, obstruct: impl FnOnce()) -> Result<(), String> {
    become_limited_user()?;
    ask.calibrate()?;
    let limit = leave_room_for_one()? - 1;
    if limit == 0 {
        return Err("RLIMIT_NPROC does not hold for this user".to_owned());
    }
    obstruct();
    set_rlimit(libc::RLIMIT_NPROC, limit);
    ask.ask_many(false);
    ask.tell(Right::Refused, |error| {
        named(error, CauseKind::UserProcesses, Certainty::Inferred, false)
    });
    Ok(())
}

/// The flags of every thread of glibc's, and of nptl's.
const THREAD: u64 = 0x3d_0f00;

fn filter_exact_clone(ask: &mut Asker<'_>) -> Result<(), String> {
    meet_nproc(ask, || {
        deny(libc::SYS_clone3, libc::ENOSYS).install();
        trap_all_clones_but(THREAD);
    })
}

fn filter_kills_clone3(ask: &mut Asker<'_>) -> Result<(), String> {
    // The first one that meets it remembers that there is no clone3.
    deny(libc::SYS_clone3, libc::ENOSYS).install();
    meet_nproc(ask, || deny(libc::SYS_clone3, 0).install_trap())
}

const STACK: usize = 64 << 20;

fn filter_mmap_flags(ask: &mut Asker<'_>) -> Result<(), String> {
    ask.calibrate()?;
    ask.stack_size(STACK);
    let used = kilobytes("/proc/self/status", "VmSize")?;
    trap_strange_mappings();
    set_rlimit(libc::RLIMIT_AS, used + STACK as u64 / 2);
    ask.ask_many(false);
    set_rlimit(libc::RLIMIT_AS, libc::RLIM_INFINITY);
    ask.tell(Right::Refused, |error| {
        named(error, CauseKind::AddressSpace, Certainty::Inferred, false)
    });
    Ok(())
}

/// A real thread has a thread pointer; no probe has one.
fn is_thread(call: &Call) -> bool {
    // SAFETY: clone_args of a thread of this process, which waits for the answer.
    let flags = unsafe { (call.arguments[0] as *const u64).read() };
    call.arguments[0] != 0 && flags & libc::CLONE_SETTLS as u64 != 0
}

fn notify_filter(ask: &mut Asker<'_>) -> Result<(), String> {
    ask.calibrate()?;
    supervised(
        &[libc::SYS_clone3],
        |call| is_thread(call).then_some(libc::EAGAIN),
        || {
            ask.ask_many(false);
        },
    )?;
    ask.tell(Right::Refused, |error| {
        named(error, CauseKind::Seccomp, Certainty::Inferred, false)
    });
    Ok(())
}

/// What the traced process and its tracer share.
struct TracerState {
    inject: AtomicBool,
    tracer: AtomicI32,
}

fn tracer(ask: &mut Asker<'_>) -> Result<(), String> {
    ask.calibrate()?;
    // SAFETY: a new mapping that is never unmapped; zeroes are valid values.
    let shared = unsafe {
        let page = libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if page == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().to_string());
        }
        &*page.cast::<TracerState>()
    };
    // SAFETY: plain numbers; the child makes system calls only and never returns.
    unsafe {
        let traced = libc::gettid();
        libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY);
        match libc::fork() {
            -1 => return Err(io::Error::last_os_error().to_string()),
            0 => {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                trace(traced, shared);
                libc::_exit(0);
            }
            _ => {}
        }
    }
    while shared.tracer.load(Ordering::Acquire) == 0 {
        std::thread::sleep(Duration::from_micros(100));
    }
    if shared.tracer.load(Ordering::Acquire) < 0 {
        return Err("this process cannot be traced".to_owned());
    }
    shared.inject.store(true, Ordering::Release);
    ask.ask_many(false);
    shared.inject.store(false, Ordering::Release);
    ask.tell(Right::Refused, |error| {
        named(error, CauseKind::Tracer, Certainty::Inferred, false)
    });
    Ok(())
}

/// Follows one thread from system call to system call.
///
/// # Safety
/// Runs alone in a forked child.
unsafe fn trace(pid: libc::pid_t, shared: &TracerState) {
    const CLONE3: u64 = libc::SYS_clone3 as u64;
    // SAFETY: requests on a process that this one traces, with places of the right type.
    unsafe {
        let options = libc::PTRACE_O_TRACESYSGOOD;
        let none = std::ptr::null_mut::<libc::c_void>();
        if libc::ptrace(libc::PTRACE_SEIZE, pid, none, options) != 0 {
            shared.tracer.store(-1, Ordering::Release);
            return;
        }
        libc::ptrace(libc::PTRACE_INTERRUPT, pid, none, none);
        let mut refuses = false;
        let mut entering = true;
        let mut first = true;
        loop {
            let mut status = 0;
            if libc::waitpid(pid, &raw mut status, libc::__WALL) != pid || !libc::WIFSTOPPED(status)
            {
                return;
            }
            let mut signal = 0;
            if libc::WSTOPSIG(status) == libc::SIGTRAP | 0x80 {
                let mut registers: libc::user_regs_struct = std::mem::zeroed();
                let place = &raw mut registers;
                libc::ptrace(libc::PTRACE_GETREGS, pid, none, place);
                if entering && registers.orig_rax == CLONE3 && registers.rdi != 0 {
                    let flags = libc::ptrace(libc::PTRACE_PEEKDATA, pid, registers.rdi, none);
                    let real = flags & libc::c_long::from(libc::CLONE_SETTLS) != 0;
                    refuses = real && shared.inject.load(Ordering::Acquire);
                    if refuses {
                        registers.orig_rax = u64::MAX;
                        libc::ptrace(libc::PTRACE_SETREGS, pid, none, place);
                    }
                } else if !entering && std::mem::take(&mut refuses) {
                    registers.rax = -i64::from(libc::EAGAIN) as u64;
                    libc::ptrace(libc::PTRACE_SETREGS, pid, none, place);
                }
                entering = !entering;
            } else if status >> 16 == 0 {
                signal = libc::WSTOPSIG(status);
            } else if std::mem::take(&mut first) {
                shared.tracer.store(1, Ordering::Release);
            }
            libc::ptrace(libc::PTRACE_SYSCALL, pid, none, signal as usize);
        }
    }
}

fn exec_without_clone3(ask: &mut Asker<'_>) -> Result<(), String> {
    ask.calibrate()?;
    ask.retry(RetryPolicy::never());
    exec_in_a_loop(usize::MAX)?;
    deny(libc::SYS_clone3, libc::ENOSYS).install();
    for asked in 0..3000 {
        if asked >= ask.rounds && ask.nptl_refusals() >= ask.rounds.min(20) {
            break;
        }
        ask.ask_nptl();
    }
    if ask.nptl_refusals() == 0 {
        return Err("the sibling was never in the way".to_owned());
    }
    ask.tell(Right::Either, |error| {
        match error.certainty() == Certainty::Unknown && error.is_transient() {
            true => Ok(()),
            false => Err(format!("expected unknown and transient: {error}")),
        }
    });
    Ok(())
}

fn nproc_raised(ask: &mut Asker<'_>) -> Result<(), String> {
    become_limited_user()?;
    ask.calibrate()?;
    ask.retry(RetryPolicy::never());
    let refuses = AtomicBool::new(false);
    supervised(
        &[libc::SYS_clone3],
        |call| {
            let refuses = refuses.load(Ordering::Acquire) && is_thread(call);
            refuses.then_some(libc::EAGAIN)
        },
        || {
            refuses.store(true, Ordering::Release);
            ask.ask_many(false);
        },
    )?;
    ask.tell(Right::Refused, |error| match error.certainty() {
        Certainty::Proven => Err(format!("proven without a repetition: {error}")),
        _ => match error.alternatives().contains(CauseKind::UserProcesses) {
            true => Ok(()),
            false => Err(format!(
                "RLIMIT_NPROC is not listed: {error}\n{}",
                error.report()
            )),
        },
    });
    Ok(())
}

fn prefault(ask: &mut Asker<'_>) -> Result<(), String> {
    ask.calibrate()?;
    set_rlimit(libc::RLIMIT_MEMLOCK, 64 << 10);
    ask.prefault(1 << 20);
    ask.stack_size(2 << 20);
    supervised(
        &[libc::SYS_madvise],
        |call| {
            call.advises(libc::MADV_POPULATE_WRITE as u64)
                .then_some(libc::ENOMEM)
        },
        || {
            ask.ask_many(false);
        },
    )?;
    ask.tell(Right::Refused, |error| {
        if error.step() != Step::PrepareStack {
            return Err(format!("another step: {error}"));
        }
        named(error, CauseKind::KernelMemory, Certainty::Inferred, false)
    });
    Ok(())
}

fn rlimit_data_zero(ask: &mut Asker<'_>) -> Result<(), String> {
    ask.calibrate()?;
    ask.stack_size(STACK);
    let used = kilobytes("/proc/self/status", "VmData")?;
    let allowed = used + STACK as u64 / 2;
    let limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: allowed,
    };
    // SAFETY: a valid structure.
    if unsafe { libc::setrlimit(libc::RLIMIT_DATA, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error().to_string());
    }
    ask.ask_many(false);
    ask.tell(Right::Refused, |error| {
        named(error, CauseKind::DataSegment, Certainty::Proven, false)?;
        match *error.cause() {
            Cause::DataSegment(diagnose::DataSegment { limit, .. }) if limit == Some(allowed) => {
                Ok(())
            }
            _ => Err(format!("the limit that is enforced is {allowed}: {error}")),
        }
    });
    Ok(())
}

fn address_space_noise(ask: &mut Asker<'_>) -> Result<(), String> {
    const NOISE: usize = 48 << 20;
    ask.calibrate()?;
    ask.stack_size(STACK);
    let noise = || loop {
        // SAFETY: a mapping of its own, unmapped at once.
        unsafe {
            let start = libc::mmap(
                std::ptr::null_mut(),
                NOISE,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if start != libc::MAP_FAILED {
                libc::munmap(start, NOISE);
            }
        }
    };
    std::thread::Builder::new()
        .spawn(noise)
        .map_err(|error| error.to_string())?;
    let used = kilobytes("/proc/self/status", "VmSize")?;
    // Room for a stack, or for the noise.
    set_rlimit(libc::RLIMIT_AS, used + STACK as u64 + (8 << 20));
    // Waiting helps, every time.
    ask.retry(RetryPolicy::never());
    ask.rounds += 300;
    ask.ask_many(false);
    set_rlimit(libc::RLIMIT_AS, libc::RLIM_INFINITY);
    ask.tell(Right::Either, |error| {
        if error.step() != Step::MapStack {
            return Err(format!("another step: {error}"));
        }
        named(error, CauseKind::AddressSpace, Certainty::Proven, true)
    });
    Ok(())
}

/// Mounts a file with this content over another.
fn cover(path: &str, content: &str) -> Result<(), String> {
    let failed = |what: &str| format!("{what}: {}", io::Error::last_os_error());
    let source = std::env::temp_dir().join(format!("nptl-cover-{}", std::process::id()));
    std::fs::write(&source, content).map_err(|error| error.to_string())?;
    let from = CString::new(source.as_os_str().as_encoded_bytes()).map_err(|e| e.to_string())?;
    let to = CString::new(path).map_err(|e| e.to_string())?;
    let none = std::ptr::null();
    // SAFETY: NUL-terminated strings; the mount namespace is this thread's own from here on.
    let covered = unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(
                none,
                c"/".as_ptr(),
                none,
                libc::MS_REC | libc::MS_PRIVATE,
                none.cast(),
            ) == 0
            && libc::mount(from.as_ptr(), to.as_ptr(), none, libc::MS_BIND, none.cast()) == 0
    };
    let covered = covered.then_some(()).ok_or_else(|| failed("a mount"));
    let _ = std::fs::remove_file(&source);
    covered
}

fn covered_pid_max(ask: &mut Asker<'_>) -> Result<(), String> {
    ask.calibrate()?;
    cover("/proc/sys/kernel/pid_max", "4194304\n")?;
    let mut sleepers = Sleepers::default();
    if sleepers.add(800).is_ok() {
        return Err("more processes fit than there are pid numbers".to_owned());
    }
    ask.ask_many(false);
    sleepers.remove(8);
    ask.tell(Right::Refused, |error| {
        named(error, CauseKind::PidNumbers, Certainty::Proven, false)?;
        match *error.cause() {
            Cause::PidNumbers(diagnose::PidNumbers { level, pid_max, .. })
                if level == PidLevel::Ancestor || pid_max.is_some() =>
            {
                Err(format!("the covered file was believed: {error}"))
            }
            _ => Ok(()),
        }
    });
    Ok(())
}

fn covered_meminfo(ask: &mut Asker<'_>) -> Result<(), String> {
    ask.calibrate()?;
    let total = kilobytes("/proc/meminfo", "MemTotal")? + kilobytes("/proc/meminfo", "SwapTotal")?;
    cover("/proc/meminfo", "MemTotal: 65536 kB\nSwapTotal: 0 kB\n")?;
    ask.stack_size(total as usize + (1 << 30));
    ask.ask_many(false);
    tell_note(format_args!("memory and swap are {total} bytes"));
    ask.tell(Right::Refused, |error| {
        named(error, CauseKind::Overcommit, Certainty::Inferred, false)?;
        match (error.errno() == Errno::ENOMEM as i32, error.cause()) {
            (true, Cause::Overcommit(diagnose::Overcommit { limit: None, .. })) => Ok(()),
            _ => Err(format!("the covered file was believed: {error}")),
        }
    });
    Ok(())
}
