//! A full memory cgroup of v2, in which the pages of a process are charged to the same cgroup as its kernel memory.
//!
//! There the kernel kills a process before it refuses it anything, unless every process of the cgroup is exempt from
//! being killed (`oom_score_adj` -1000, as services have it that must never be killed): then a task that does not fit
//! is refused, with ENOMEM. A page that does not fit is not refused but asked for again and again, so the process
//! moves in with its pages in place and charged elsewhere, and a process outside lifts the limit should it get stuck.
//! The kernel's log describes at length each charge for which no process could be killed.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nptl::diagnose::CauseKind;
use nptl::{Cause, Certainty, SpawnError, Step, diagnose};

use super::ask::{Asker, Expected, Right, other_cause, reports, same, tell_note};
use super::{number_in, write};
use support::{Cgroup, Child, inherited_cgroup};

/// What the limit leaves nptl: room for the files of the evidence, but not for a task. Its stack alone takes as much, and
/// its structure another 10 KiB.
const SLACK: u64 = 16 << 10;

/// How often more than it should nptl is asked at most.
const MORE: usize = 20;

/// The cgroup that the process enters when it is ready, and the one in which it prepares itself.
pub(super) fn sandbox(child: Child, parent: &Cgroup) -> Result<Child, String> {
    inside(child, parent, &parent.nested()?)
}

/// The same with a cgroup inside the limited one.
pub(super) fn sandbox_below(child: Child) -> Result<Child, String> {
    let parent = Cgroup::memory()?;
    if !parent.is_unified() {
        return Err("the memory controller is in a v1 hierarchy".to_owned());
    }
    let limited = parent.nested()?;
    inside(child, &parent, &limited.nested()?)
}

/// The last one is where the child starts.
fn inside(child: Child, parent: &Cgroup, member: &Cgroup) -> Result<Child, String> {
    // One of std's threads can be granted at the limit and then refused a signal stack.
    let child = child.no_signal_stacks();
    Ok(child.cgroup(member).cgroup(&parent.nested()?))
}

/// The process's own cgroup has the limit.
pub(super) fn own(ask: &mut Asker<'_>) -> Result<(), String> {
    let member = inherited_cgroup(0);
    provoke(ask, member.path(), member.path())
}

/// The one above has it.
pub(super) fn ancestor(ask: &mut Asker<'_>) -> Result<(), String> {
    let member = inherited_cgroup(0);
    let limited = member.path().parent().ok_or("a cgroup without a parent")?;
    provoke(ask, member.path(), limited)
}

fn provoke(ask: &mut Asker<'_>, member: &Path, limited: &Path) -> Result<(), String> {
    // With this value the kernel stops the whole machine when it finds no process to kill.
    if number_in("/proc/sys/vm/panic_on_oom")? == 2 {
        return Err("vm.panic_on_oom is 2 here".to_owned());
    }
    write("/proc/self/oom_score_adj", -1000)?;
    ask.calibrate()?;
    let limit = MemoryMax::prepare(limited)?;
    let _known = files_of_the_evidence(member);
    ask_all(ask);
    touch_everything()?;
    write(member.join("cgroup.procs"), 0)?;
    // What is opened in a cgroup for the first time, and the whole way of a refusal.
    ask_all(ask);
    limit.tighten(SLACK)?;
    ask.ask_nptl();
    limit.lift()?;
    ask.forget();

    let named = Cell::new(0_u64);
    let mut refusals = 0;
    let mut round = 0;
    // A few more where the cgroup could not be named yet: with hardly any memory not every question is answered.
    while round < ask.rounds || named.get() == 0 && round < ask.rounds + MORE {
        if round == 0 {
            // These need no files.
            limit.tighten(0)?;
            ask.ask_others();
        }
        let allowed = limit.tighten(SLACK)?;
        ask.ask_nptl();
        // Whatever follows allocates: the answer is reported before the next is asked for.
        limit.lift()?;
        refusals += ask.nptl_refusals();
        ask.tell(Right::Either, |error| {
            named.set(named.get() + u64::from(judge(error, limited, allowed)?));
            Ok(())
        });
        ask.forget();
        if limit.rescues() > 2 {
            return Err("the process waited for its own pages again and again".to_owned());
        }
        round += 1;
    }
    let (named, path) = (named.get(), limited.display());
    tell_note(format_args!("{named} of {refusals} refusals name {path}"));
    match limit.rescues() {
        0 => {}
        count => tell_note(format_args!(
            "the limit was lifted {count} times to free the process"
        )),
    }
    match (refusals, named) {
        (0, _) => Err("inconclusive: every thread found room".to_owned()),
        (_, 0) => Err("inconclusive: no refusal names a cgroup".to_owned()),
        _ => Ok(()),
    }
}

fn ask_all(ask: &mut Asker<'_>) {
    ask.ask_others();
    ask.ask_nptl();
    ask.forget();
}

/// Whether the directory is named; it is not where the files could not be read, or where a task that ended late left
/// room meanwhile.
fn judge(error: &SpawnError, limited: &Path, allowed: u64) -> Result<bool, String> {
    let expected = Expected {
        step: Step::Clone,
        errno: Errno::ENOMEM,
        kind: CauseKind::KernelMemory,
        // What a refused task gives back can let a question pass while the call itself is refused again.
        certainty: &[Certainty::Proven, Certainty::Inferred],
    };
    let mut named = false;
    expected.judge(error, |cause| match *cause {
        // Without memory for a task there is none to open the cgroup's files either.
        Cause::KernelMemory(diagnose::KernelMemory {
            unread: Some(errno),
            ..
        }) => same("why the files were not read", errno.raw(), libc::ENOMEM),
        Cause::KernelMemory(diagnose::KernelMemory { directory, .. })
            if directory.to_str().is_none() =>
        {
            reports(error, &[&"memory.max"])
        }
        Cause::KernelMemory(diagnose::KernelMemory {
            directory,
            version,
            usage,
            limit,
            failures,
            ..
        }) => {
            named = true;
            same("the directory", directory.to_str(), limited.to_str())?;
            same("the version", version, 2)?;
            same("the limit", limit, Some(allowed))?;
            same("a counted failure", failures > Some(0), true)?;
            let possible = usage <= Some(allowed) && usage > Some(0);
            same("a usage up to the limit", possible, true)?;
            let path = limited.display();
            reports(
                error,
                &[
                    &format_args!("directory: {path}\n"),
                    &format_args!("memory limit: {allowed} bytes"),
                    &format_args!("echo BYTES > {path}/memory.max\n"),
                ],
            )
        }
        ref other => other_cause(other),
    })?;
    Ok(named)
}

/// Open files stay known to the kernel: at the limit it need not find room to get to know them, and only their
/// content has to fit.
fn files_of_the_evidence(member: &Path) -> Vec<File> {
    let proc =
        ["status", "cgroup", "mountinfo"].map(|file| Path::new("/proc/thread-self").join(file));
    let names = [
        "memory.max",
        "memory.current",
        "memory.events.local",
        "cgroup.events",
    ];
    let cgroups = member
        .ancestors()
        .flat_map(|cgroup| names.map(|file| cgroup.join(file)));
    // Above the hierarchy there are none.
    proc.into_iter()
        .chain(cgroups)
        .flat_map(File::open)
        .collect()
}

/// Every page of this process, and what its stack and its heap will grow to, is in place afterwards, copied where it
/// was shared with another one.
fn touch_everything() -> Result<(), String> {
    let mut deep = [1_u8; 512 << 10];
    std::hint::black_box(&mut deep);
    // Else the heap shrinks after the telling of an answer, and grows again at the limit.
    // SAFETY: sets a number.
    unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX) };
    // Each too small for a mapping of its own.
    let blocks: Vec<Vec<u8>> = (0..32).map(|_| vec![1; 64 << 10]).collect();
    drop(std::hint::black_box(blocks));
    // SAFETY: populates what is mapped; no memory changes.
    let locked = unsafe { libc::mlockall(libc::MCL_CURRENT) };
    if locked != 0 {
        return Err(format!("mlockall: {}", io::Error::last_os_error()));
    }
    // Unlocked again, since a lock changes how stacks are cached. Without swap the pages stay.
    // SAFETY: takes nothing but the locks.
    unsafe { libc::munlockall() };
    Ok(())
}

/// `memory.max` of a cgroup, with everything opened that reading and writing it at the limit takes.
struct MemoryMax {
    maximum: File,
    current: File,
    rescuer: Rescuer,
}

impl MemoryMax {
    /// Called in another cgroup, which the rescuer stays in.
    fn prepare(cgroup: &Path) -> Result<MemoryMax, String> {
        let maximum = File::options()
            .write(true)
            .open(cgroup.join("memory.max"))
            .map_err(|error| format!("memory.max: {error}"))?;
        let current = File::open(cgroup.join("memory.current"))
            .map_err(|error| format!("memory.current: {error}"))?;
        Ok(MemoryMax {
            rescuer: Rescuer::start(&maximum)?,
            maximum,
            current,
        })
    }

    fn set(&self, value: &str) -> Result<(), String> {
        self.rescuer.beat();
        // At the start: further on the kernel takes it for a part of what was written before, and ignores it.
        let written = self.maximum.write_all_at(value.as_bytes(), 0);
        written.map_err(|error| format!("memory.max: {error}"))
    }

    fn usage(&self) -> Result<u64, String> {
        let mut text = [0; 32];
        let count = self
            .current
            .read_at(&mut text, 0)
            .map_err(|error| format!("memory.current: {error}"))?;
        let text = text.get(..count).and_then(|text| str::from_utf8(text).ok());
        let number = text.and_then(|text| text.trim_end().parse().ok());
        number.ok_or_else(|| "memory.current: no number".to_owned())
    }

    /// Leaves room for so many bytes, and returns the limit.
    fn tighten(&self, slack: u64) -> Result<u64, String> {
        // What the CPUs have charged in advance could pay for a task. They give it back under a limit that is
        // exceeded, and ended tasks what they were charged for: both late.
        let mut usage = self.usage()?;
        for _ in 0..50 {
            self.set("0")?;
            std::thread::sleep(Duration::from_millis(4));
            let before = std::mem::replace(&mut usage, self.usage()?);
            if before == usage {
                break;
            }
        }
        let allowed = usage + slack;
        // Formatted on the stack.
        let mut text = [0_u8; 20];
        let mut rest = &mut text[..];
        let formatted = io::Write::write_fmt(&mut rest, format_args!("{allowed}"));
        let left = rest.len();
        formatted.map_err(|error| error.to_string())?;
        let text = text.get(..text.len() - left);
        self.set(
            text.and_then(|text| str::from_utf8(text).ok())
                .unwrap_or("max"),
        )?;
        Ok(allowed)
    }

    fn lift(&self) -> Result<(), String> {
        self.set("max")
    }

    fn rescues(&self) -> u32 {
        self.rescuer.rescues()
    }
}

impl Drop for MemoryMax {
    /// Before the rescuer goes, whatever failed meanwhile.
    fn drop(&mut self) {
        let _ = self.lift();
    }
}

/// A process outside the limited cgroup that lifts the limit when it was not written for too long: a fault at the
/// limit is repeated until there is room.
struct Rescuer {
    pid: libc::pid_t,
    shared: NonNull<SharedPage>,
}

/// In a page that both processes have.
struct SharedPage {
    beats: AtomicU32,
    rescues: AtomicU32,
}

impl Rescuer {
    fn start(limit: &File) -> Result<Rescuer, String> {
        let failed = |what: &str| format!("{what}: {}", io::Error::last_os_error());
        // SAFETY: a new mapping, which nothing else is at.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<SharedPage>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let shared = NonNull::new(page.cast::<SharedPage>())
            .filter(|_| page != libc::MAP_FAILED)
            .ok_or_else(|| failed("a shared page"))?;
        // SAFETY: zeroes are valid atomics, and the page stays in both processes as long as they use it. The child
        // makes only system calls, on what was prepared before, and never returns.
        match unsafe { libc::fork() } {
            -1 => Err(failed("fork")),
            // SAFETY: see above.
            0 => watch(unsafe { shared.as_ref() }, limit),
            pid => Ok(Rescuer { pid, shared }),
        }
    }

    fn shared(&self) -> &SharedPage {
        // SAFETY: mapped until this is dropped.
        unsafe { self.shared.as_ref() }
    }

    fn beat(&self) {
        self.shared().beats.fetch_add(1, Ordering::Relaxed);
    }

    fn rescues(&self) -> u32 {
        self.shared().rescues.load(Ordering::Relaxed)
    }
}

impl Drop for Rescuer {
    fn drop(&mut self) {
        // SAFETY: our own child, which is reaped here alone; the page was mapped in `start`, and no one else has it.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), 0);
            libc::munmap(self.shared.as_ptr().cast(), size_of::<SharedPage>());
        }
    }
}

/// The rescuer's whole life.
fn watch(shared: &SharedPage, limit: &File) -> ! {
    const TICK: u32 = 50_000;
    /// 10 seconds. The round of an emulated machine takes one at most.
    const PATIENCE: u32 = 200;
    // SAFETY: asks to be killed with the process that waits for it.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let mut seen = 0;
    let mut ticks = 0;
    loop {
        // SAFETY: sleeps.
        unsafe { libc::usleep(TICK) };
        let beats = shared.beats.load(Ordering::Relaxed);
        ticks = if beats == seen { ticks + 1 } else { 0 };
        seen = beats;
        // Between rounds the limit is lifted anyway.
        if ticks == PATIENCE {
            // SAFETY: three bytes that are there.
            unsafe { libc::pwrite(limit.as_raw_fd(), c"max".as_ptr().cast(), 3, 0) };
            shared.rescues.fetch_add(1, Ordering::Relaxed);
        }
    }
}
