//! What refuses the stack's mapping, or the kernel's own memory for a task.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};
use nptl::diagnose::CauseKind;
use nptl::{Cause, Certainty, SpawnError, Step, diagnose};

use super::ask::{Asker, Expected, Right, other_cause, reports, same, tell_note};
use super::clone::become_limited_user;
use super::{Need, Scenario, memory_v2, number_in, plain, write};
use support::{Cgroup, Mappings, inherited_cgroup, set_rlimit};

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "rlimit-as",
        what: "the stack does not fit into what RLIMIT_AS leaves",
        needs: &[],
        sandbox: plain,
        provoke: rlimit_as,
    },
    Scenario {
        name: "rlimit-data",
        what: "the stack does not fit into what RLIMIT_DATA leaves",
        needs: &[],
        sandbox: plain,
        provoke: rlimit_data,
    },
    Scenario {
        name: "max-map-count",
        what: "the process has as many mappings as vm.max_map_count allows",
        needs: &[],
        sandbox: plain,
        provoke: max_map_count,
    },
    Scenario {
        name: "memlock",
        what: "mlockall(MCL_FUTURE) is in force, and the stack exceeds RLIMIT_MEMLOCK",
        needs: &[],
        sandbox: plain,
        provoke: memlock,
    },
    Scenario {
        name: "overcommit-0",
        what: "the stack is larger than memory and swap together, in overcommit mode 0",
        needs: &[],
        sandbox: plain,
        provoke: overcommit_0,
    },
    Scenario {
        name: "memory-cgroup",
        what: "the memory cgroup has no room for a task's kernel memory",
        needs: &[Need::Root, Need::MemoryCgroup],
        sandbox: |child| {
            let cgroup = Cgroup::memory()?;
            match cgroup.is_unified() {
                true => memory_v2::sandbox(child, &cgroup),
                false => Ok(child.cgroup(&cgroup.nested()?)),
            }
        },
        provoke: |ask| match inherited_cgroup(0).is_unified() {
            true => memory_v2::own(ask),
            false => memory_cgroup(ask),
        },
    },
    Scenario {
        name: "memory-cgroup-ancestor",
        what: "a memory cgroup above the process's own has no room for a task's kernel memory",
        needs: &[Need::Root, Need::MemoryCgroupV2],
        sandbox: memory_v2::sandbox_below,
        provoke: memory_v2::ancestor,
    },
];

/// Larger than anything a cache has, and than what else moves in a process.
const STACK: usize = 64 << 20;

const PROVEN: &[Certainty] = &[Certainty::Proven];

const fn refused(kind: CauseKind) -> Expected {
    Expected {
        step: Step::MapStack,
        errno: Errno::ENOMEM,
        kind,
        certainty: PROVEN,
    }
}

/// A field of /proc/self/status that is given in kB, in bytes.
fn status(field: &str) -> Result<u64, String> {
    kilobytes("/proc/self/status", field)
}

pub(super) fn kilobytes(file: &str, field: &str) -> Result<u64, String> {
    let text = std::fs::read_to_string(file).map_err(|e| format!("{file}: {e}"))?;
    let value = text.lines().find_map(|line| {
        let rest = line.strip_prefix(field)?.strip_prefix(':')?;
        rest.split_whitespace().next()?.parse::<u64>().ok()
    });
    value
        .map(|kib| kib * 1024)
        .ok_or_else(|| format!("{file} has no {field}"))
}

/// What a cause says was requested, in use, and allowed.
type Figures = (u64, Option<u64>, Option<u64>);

/// The numbers must explain the refusal, and be those of now.
fn explains(
    (requested, in_use, limit): Figures,
    true_use: u64,
    true_limit: u64,
) -> Result<(), String> {
    const MOVES: u64 = 1 << 20;
    same("the limit", limit, Some(true_limit))?;
    let in_use = in_use.ok_or("how much is in use was not read")?;
    if in_use.abs_diff(true_use) > MOVES {
        return Err(format!("{true_use} bytes were in use, not {in_use}"));
    }
    // Guard, thread-local storage and signal stack come on top, less than this.
    if !(STACK as u64..STACK as u64 + MOVES).contains(&requested) {
        return Err(format!("{requested} bytes is not what was asked for"));
    }
    match in_use + requested > true_limit {
        true => Ok(()),
        false => Err(format!(
            "{in_use} + {requested} bytes do not exceed {true_limit}"
        )),
    }
}

/// Asks with the soft limit set to `limit`, and puts back what it was.
fn ask_under(ask: &mut Asker<'_>, resource: Resource, limit: u64) -> Result<(), String> {
    let (soft, _) = getrlimit(resource).map_err(|e| e.to_string())?;
    set_rlimit(resource as libc::__rlimit_resource_t, limit);
    ask.ask();
    set_rlimit(resource as libc::__rlimit_resource_t, soft);
    Ok(())
}

fn rlimit_as(ask: &mut Asker<'_>) -> Result<(), String> {
    process_limit(
        ask,
        Resource::RLIMIT_AS,
        "VmSize",
        CauseKind::AddressSpace,
        |cause| match *cause {
            Cause::AddressSpace(diagnose::AddressSpace {
                requested,
                in_use,
                limit,
                ..
            }) => Some((requested, in_use, limit)),
            _ => None,
        },
        ["ulimit -v KIB", "LimitAS=BYTES"],
    )
}

fn rlimit_data(ask: &mut Asker<'_>) -> Result<(), String> {
    process_limit(
        ask,
        Resource::RLIMIT_DATA,
        "VmData",
        CauseKind::DataSegment,
        |cause| match *cause {
            Cause::DataSegment(diagnose::DataSegment {
                requested,
                in_use,
                limit,
                ..
            }) => Some((requested, in_use, limit)),
            _ => None,
        },
        ["ulimit -d KIB", "LimitDATA=BYTES"],
    )
}

/// A limit on what this process maps, with room for half a stack. `numbers` takes them out of the cause;
/// the report has the `remedies`.
fn process_limit(
    ask: &mut Asker<'_>,
    resource: Resource,
    field: &str,
    kind: CauseKind,
    numbers: fn(&Cause) -> Option<Figures>,
    remedies: [&str; 2],
) -> Result<(), String> {
    ask.calibrate()?;
    ask.stack_size(STACK);
    let used = status(field)?;
    let allowed = used + STACK as u64 / 2;
    ask_under(ask, resource, allowed)?;
    ask.tell(Right::Refused, |error| {
        refused(kind).judge(error, |cause| match numbers(cause) {
            Some(numbers) => explains(numbers, used, allowed),
            None => other_cause(cause),
        })?;
        let [by_shell, by_systemd] = remedies;
        reports(
            error,
            &[
                &format_args!("/proc/thread-self/status, {field}: "),
                &format_args!("{resource:?}: {allowed} bytes ("),
                &by_shell,
                &by_systemd,
            ],
        )
    });
    Ok(())
}

fn max_map_count(ask: &mut Asker<'_>) -> Result<(), String> {
    ask.calibrate()?;
    let most = number_in("/proc/sys/vm/max_map_count")?;
    let mappings = Mappings::fill()?;
    ask.ask();
    let count = mappings.len();
    drop(mappings);
    tell_note(format_args!("{count} mappings of one page were added"));
    ask.tell(Right::Refused, |error| {
        refused(CauseKind::MapCount).judge(error, |cause| match *cause {
            Cause::MapCount(diagnose::MapCount { maximum, split, .. }) => {
                same("vm.max_map_count", maximum, Some(most))?;
                same("a split", split, false)
            }
            ref other => other_cause(other),
        })?;
        reports(
            error,
            &[
                &format_args!("/proc/sys/vm/max_map_count: {most}\n"),
                &"sysctl vm.max_map_count=N",
            ],
        )
    });
    Ok(())
}

fn memlock(ask: &mut Asker<'_>) -> Result<(), String> {
    become_limited_user()?;
    ask.calibrate()?;
    ask.stack_size(STACK);
    let (_, hard) = getrlimit(Resource::RLIMIT_MEMLOCK).map_err(|e| e.to_string())?;
    let allowed = hard.min(STACK as u64 / 2);
    set_rlimit(libc::RLIMIT_MEMLOCK, allowed);
    // SAFETY: changes how later mappings are locked.
    if unsafe { libc::mlockall(libc::MCL_FUTURE) } != 0 {
        return Err(format!("mlockall: {}", std::io::Error::last_os_error()));
    }
    let used = status("VmLck")?;
    ask.ask();
    // SAFETY: takes nothing but the locks.
    unsafe { libc::munlockall() };
    ask.tell(Right::Refused, |error: &SpawnError| {
        let expected = Expected {
            errno: Errno::EAGAIN,
            ..refused(CauseKind::LockedMemory)
        };
        expected.judge(error, |cause| match *cause {
            Cause::LockedMemory(diagnose::LockedMemory {
                requested,
                in_use,
                limit,
                ..
            }) => explains((requested, in_use, limit), used, allowed),
            ref other => other_cause(other),
        })?;
        reports(
            error,
            &[
                &"/proc/thread-self/status, VmLck: ",
                &format_args!("RLIMIT_MEMLOCK: {allowed} bytes"),
                &"ulimit -l KIB",
                &"LimitMEMLOCK=BYTES",
            ],
        )
    });
    Ok(())
}

fn overcommit_0(ask: &mut Asker<'_>) -> Result<(), String> {
    let mode = number_in("/proc/sys/vm/overcommit_memory")?;
    if mode != 0 {
        return Err(format!("vm.overcommit_memory is {mode} here"));
    }
    let total = kilobytes("/proc/meminfo", "MemTotal")? + kilobytes("/proc/meminfo", "SwapTotal")?;
    ask.calibrate()?;
    ask.stack_size(total as usize + (1 << 30));
    ask.ask();
    ask.tell(Right::Refused, |error| {
        refused(CauseKind::Overcommit).judge(error, |cause| match *cause {
            Cause::Overcommit(diagnose::Overcommit {
                mode,
                requested,
                limit,
                ..
            }) => {
                same("the mode", mode, Some(0))?;
                same("memory and swap", limit, Some(total))?;
                same("a request beyond them", requested > total, true)
            }
            ref other => other_cause(other),
        })?;
        reports(
            error,
            &[
                &"/proc/sys/vm/overcommit_memory: 0\n",
                &format_args!("/proc/meminfo, MemTotal and SwapTotal: {total} bytes ("),
                &"sysctl vm.overcommit_memory=1",
            ],
        )
    });
    Ok(())
}

/// Under v1. A process's pages are charged to the cgroup of its first thread, a new task's kernel memory to that of the
/// thread that creates it. So the asking thread alone enters the limited cgroup: there it can be refused, but
/// never be made to wait for a page.
fn memory_cgroup(ask: &mut Asker<'_>) -> Result<(), String> {
    const PATIENCE: Duration = Duration::from_secs(10);
    ask.calibrate()?;
    let cgroup = inherited_cgroup(0);
    let inner = cgroup.path();
    let outer = inner.parent().ok_or("a cgroup without a parent")?;
    write(outer.join("cgroup.procs"), 0)?;
    // Refuse instead of killing the thread that asks.
    write(inner.join("memory.oom_control"), 1)?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| ask_in_memory_cgroup(ask, inner, outer));
        // A thread that is granted at the limit can fault where a page table is to be had, and then waits
        // for memory, because no process may be killed for it; and with it the thread that joins it.
        let began = Instant::now();
        while !thread.is_finished() {
            if began.elapsed() > PATIENCE {
                write(inner.join("memory.limit_in_bytes"), -1)?;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let ended = thread.join();
        ended.unwrap_or_else(|_| Err("the asking thread panicked".to_owned()))
    })
}

/// Threads of pthread_create that wait for the end of a pipe; dropped, they are joined.
struct Waiters {
    threads: Vec<libc::pthread_t>,
    wait: OwnedFd,
    /// Held open until they are to end.
    end: Option<OwnedFd>,
}

impl Waiters {
    fn new() -> Result<Waiters, String> {
        let (wait, end) = nix::unistd::pipe().map_err(|e| e.to_string())?;
        Ok(Waiters {
            threads: Vec::with_capacity(1000),
            wait,
            end: Some(end),
        })
    }

    fn len(&self) -> usize {
        self.threads.len()
    }

    /// False: refused.
    fn grow(&mut self) -> bool {
        extern "C" fn wait_for_end(fd: *mut libc::c_void) -> *mut libc::c_void {
            let mut byte = 0_u8;
            // SAFETY: one byte of room; the descriptor is open until this thread is joined.
            unsafe { libc::read(fd as i32, (&raw mut byte).cast(), 1) };
            std::ptr::null_mut()
        }
        let mut thread = 0;
        let fd = self.wait.as_raw_fd() as usize as *mut libc::c_void;
        // SAFETY: the routine takes a number; the attributes are initialised before they are used.
        let answer = unsafe {
            let mut attributes = std::mem::zeroed();
            libc::pthread_attr_init(&raw mut attributes);
            libc::pthread_attr_setstacksize(&raw mut attributes, 32 << 10);
            let answer =
                libc::pthread_create(&raw mut thread, &raw const attributes, wait_for_end, fd);
            libc::pthread_attr_destroy(&raw mut attributes);
            answer
        };
        if answer == 0 {
            self.threads.push(thread);
        }
        answer == 0
    }
}

impl Drop for Waiters {
    fn drop(&mut self) {
        self.end = None;
        for &thread in &self.threads {
            // SAFETY: started by `grow` and joined once.
            unsafe { libc::pthread_join(thread, std::ptr::null_mut()) };
        }
    }
}

fn ask_in_memory_cgroup(ask: &mut Asker<'_>, inner: &Path, outer: &Path) -> Result<(), String> {
    // For the evidence, which needs files opened; a task needs more.
    const SLACK: u64 = 12 << 10;
    const MOST: usize = 1000;
    // Opened before: at the limit even that can be refused.
    let open = |path| File::options().write(true).open(path);
    let mut free = open(outer.join("tasks")).map_err(|e| e.to_string())?;
    let mut set_limit = open(inner.join("memory.limit_in_bytes")).map_err(|e| e.to_string())?;
    write(inner.join("tasks"), 0)?;
    let usage = inner.join("memory.usage_in_bytes");
    let limit = inner.join("memory.limit_in_bytes");
    // Once with everything allowed: what these open and touch for the first time is charged now.
    ask.ask_others();
    ask.ask_nptl();
    ask.forget();
    // The kernel frees ended tasks late.
    std::thread::sleep(Duration::from_millis(50));
    // Refused or not, this takes back what the CPUs have charged in advance.
    let _ = write(&limit, 4096);
    let mut allowed = number_in(&usage)? + SLACK;
    write(&limit, allowed)?;
    // Threads that stay until there is no room for one more; bare ones, because one of std's aborts the
    // process where it is granted but its signal stack is not.
    let mut crowd = Waiters::new()?;
    while crowd.len() < MOST && crowd.grow() {}
    // Less than a task is left, and more than some files need.
    let mut full = false;
    while crowd.len() < MOST && !full {
        allowed += SLACK;
        // Written by a descriptor that is there: opening one may be refused by now.
        set_limit
            .write_all(allowed.to_string().as_bytes())
            .map_err(|error| error.to_string())?;
        full = !crowd.grow();
    }
    if full {
        ask.ask_others();
        ask.ask_many(false);
    }
    free.write_all(b"0").map_err(|e| e.to_string())?;
    write(&limit, -1)?;
    drop(crowd);
    if !full {
        return Err(format!(
            "{MOST} threads fit into {allowed} bytes of kernel memory"
        ));
    }
    if ask.nptl_refusals() == 0 {
        return Err("other tasks ended meanwhile, and left room".to_owned());
    }
    // Either: the usage falls when the kernel has freed what earlier tasks were charged for, which it does
    // late. A cgroup that is not nearly full when it is looked at is not named; another never is.
    ask.tell(Right::Either, |error| {
        let expected = Expected {
            step: Step::Clone,
            errno: Errno::ENOMEM,
            kind: CauseKind::KernelMemory,
            // What a refused task gives back can let a question pass while the call itself is refused again.
            certainty: &[Certainty::Proven, Certainty::Inferred],
        };
        expected.judge(error, |cause| match *cause {
            // Without memory for a task there is none to open the cgroup's files either; and where it lacks that for
            // an inode, /proc says that the file does not exist (proc_pident_instantiate).
            Cause::KernelMemory(diagnose::KernelMemory {
                unread: Some(errno),
                ..
            }) => match errno.raw() {
                libc::ENOENT => Ok(()),
                errno => same("why the files were not read", errno, libc::ENOMEM),
            },
            Cause::KernelMemory(diagnose::KernelMemory { directory, .. })
                if directory.to_str().is_none() =>
            {
                reports(error, &[&"memory.limit_in_bytes"])
            }
            Cause::KernelMemory(diagnose::KernelMemory {
                directory,
                version,
                usage,
                limit,
                failures,
                ..
            }) => {
                same("the directory", directory.to_str(), inner.to_str())?;
                same("the version", version, 1)?;
                same("the limit", limit, Some(allowed))?;
                same("a counted failure", failures > Some(0), true)?;
                same(
                    "a usage up to the limit",
                    usage <= Some(allowed) && usage > Some(0),
                    true,
                )?;
                let path = inner.display();
                reports(
                    error,
                    &[
                        &format_args!("directory: {path}\n"),
                        &format_args!("memory limit: {allowed} bytes"),
                        &format_args!("echo BYTES > {path}/memory.limit_in_bytes "),
                    ],
                )
            }
            ref other => other_cause(other),
        })
    });
    Ok(())
}
