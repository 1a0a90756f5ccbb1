//! What a thread does before its closure beyond what every thread does, and what its creator waits for.
//!
//! ```text
//!  creator                             new thread
//!  clone ────────────────────────────► cgroup, affinity, scheduler, core scheduling: set, and read back
//!  waits, if there is something        the caller's own setup
//!  that can be refused       ◄──────── the report
//!  JoinHandle, or the error            the gate, if there is one
//!                                      the closure
//! ```
//! In this order, because a cpuset decides which CPUs the affinity may name, and a deadline is refused to a thread whose
//! affinity is narrower than its domain. A thread without any of this has no [`Stages`].

use crate::errno::Errno;
use crate::mem::{Body, Shared};
use crate::step::{Step, StepError};
use crate::sync::{Entrance, forks, notice_fork};
use crate::sys::KernelSigSet;
use crate::sys::sched;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::sys::statfs::{CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, fstatfs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::Thread;
use std::time::Duration;

use crate::sys;

/// A scheduling policy and what belongs to it ([sched(7)]).
///
/// [sched(7)]: https://man7.org/linux/man-pages/man7/sched.7.html
///
/// ```
/// use nptl::{Builder, Scheduler};
/// let polite = Builder::new().scheduler(Scheduler::Other { nice: 10 });
/// let handle = polite.spawn(|| std::thread::park_timeout(std::time::Duration::from_secs(1)))?;
/// assert_eq!(handle.scheduler().unwrap(), Scheduler::Other { nice: 10 });
/// # Ok::<(), nptl::SpawnError>(())
/// ```
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scheduler {
    /// SCHED_OTHER, the default policy.
    Other {
        /// From −20, the most favoured, to 19.
        nice: i32,
    },
    /// SCHED_BATCH: like `Other`, except that the scheduler takes the thread for one that computes all the time.
    Batch {
        /// From −20 to 19.
        nice: i32,
    },
    /// SCHED_IDLE: runs only where nothing else does.
    Idle,
    /// SCHED_FIFO: real time. Runs until it waits, or until a higher priority runs.
    Fifo {
        /// From 1 to 99, the highest.
        priority: u32,
    },
    /// SCHED_RR: real time. Takes turns with the threads of its priority.
    RoundRobin {
        /// From 1 to 99, the highest.
        priority: u32,
    },
    /// SCHED_DEADLINE: `runtime` in every `period`, within `deadline` from its beginning. A thread under it can create no
    /// thread ([`Cause::DeadlineScheduling`](crate::Cause::DeadlineScheduling)).
    Deadline {
        /// At least 1024 ns.
        runtime: Duration,
        /// At least `runtime`.
        deadline: Duration,
        /// At least `deadline`.
        period: Duration,
    },
}

impl Scheduler {
    fn policy(self) -> u32 {
        match self {
            Scheduler::Other { .. } => libc::SCHED_OTHER as u32,
            Scheduler::Batch { .. } => libc::SCHED_BATCH as u32,
            Scheduler::Idle => libc::SCHED_IDLE as u32,
            Scheduler::Fifo { .. } => libc::SCHED_FIFO as u32,
            Scheduler::RoundRobin { .. } => libc::SCHED_RR as u32,
            Scheduler::Deadline { .. } => sched::SCHED_DEADLINE,
        }
    }

    pub(crate) fn attributes(self) -> libc::sched_attr {
        let mut attributes = sched::attributes();
        attributes.sched_policy = self.policy();
        let nanoseconds = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        match self {
            Scheduler::Other { nice } | Scheduler::Batch { nice } => attributes.sched_nice = nice,
            Scheduler::Idle => {}
            Scheduler::Fifo { priority } | Scheduler::RoundRobin { priority } => {
                attributes.sched_priority = priority;
            }
            Scheduler::Deadline {
                runtime,
                deadline,
                period,
            } => {
                attributes.sched_runtime = nanoseconds(runtime);
                attributes.sched_deadline = nanoseconds(deadline);
                attributes.sched_period = nanoseconds(period);
            }
        }
        attributes
    }

    /// Returns `None` for a policy that this crate does not name.
    pub(crate) fn of(attributes: &libc::sched_attr) -> Option<Scheduler> {
        let (nice, priority) = (attributes.sched_nice, attributes.sched_priority);
        let all = [
            Scheduler::Other { nice },
            Scheduler::Batch { nice },
            Scheduler::Idle,
            Scheduler::Fifo { priority },
            Scheduler::RoundRobin { priority },
            Scheduler::Deadline {
                runtime: Duration::from_nanos(attributes.sched_runtime),
                deadline: Duration::from_nanos(attributes.sched_deadline),
                period: Duration::from_nanos(attributes.sched_period),
            },
        ];
        all.into_iter()
            .find(|scheduler| scheduler.policy() == attributes.sched_policy)
    }

    /// Returns what no kernel accepts, and the value.
    pub(crate) fn invalid(self) -> Option<(&'static str, u64)> {
        match self {
            Scheduler::Other { nice } | Scheduler::Batch { nice } => {
                let what = match nice {
                    ..0 => "nice value (from -20 to 19), below 0 by",
                    _ => "nice value (from -20 to 19)",
                };
                let valid = (-20..=19).contains(&nice);
                (!valid).then_some((what, nice.unsigned_abs().into()))
            }
            Scheduler::Idle => None,
            Scheduler::Fifo { priority } | Scheduler::RoundRobin { priority } => (!(1..=99)
                .contains(&priority))
            .then_some(("real-time priority (from 1 to 99)", priority.into())),
            Scheduler::Deadline {
                runtime,
                deadline,
                period,
            } => {
                let ordered = runtime <= deadline && deadline <= period;
                let fits = runtime.as_nanos() >= 1024 && period.as_nanos() < 1 << 63;
                (!ordered || !fits).then_some((
                    "deadline parameters (1024 ns <= runtime <= deadline <= period), runtime in ns",
                    u64::try_from(runtime.as_nanos()).unwrap_or(u64::MAX),
                ))
            }
        }
    }
}

/// Which threads may run beside this one on the hardware threads of a core ([prctl(2)], `PR_SCHED_CORE`).
///
/// [prctl(2)]: https://man7.org/linux/man-pages/man2/prctl.2.html
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CoreScheduling {
    /// Those that take this thread's cookie from it.
    New,
    /// Those with the cookie of the thread of this id.
    SameAs(libc::pid_t),
}

/// A set of CPUs, as the kernel takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cpus {
    words: Vec<u64>,
    /// Refused if the kernel takes a part of it only.
    whole: bool,
}

impl Cpus {
    /// Returns `Err` for a number that no kernel has, and for an empty set.
    pub(crate) fn new(cpus: impl IntoIterator<Item = usize>) -> Result<Cpus, (&'static str, u64)> {
        let mut words = Vec::new();
        for cpu in cpus {
            let (word, bit) = (cpu / 64, cpu % 64);
            if word >= sched::WORDS {
                return Err(("number of a CPU", cpu as u64));
            }
            if words.len() <= word {
                words.resize(word + 1, 0);
            }
            if let Some(word) = words.get_mut(word) {
                *word |= 1 << bit;
            }
        }
        match words.is_empty() {
            true => Err(("number of CPUs in the affinity", 0)),
            false => Ok(Cpus { words, whole: true }),
        }
    }

    /// A set of which the kernel may leave out what lies outside of the cpuset, as it does for glibc's threads. `None`: no
    /// memory.
    #[cfg(feature = "interpose")]
    pub(crate) fn of_words(set: &[u64]) -> Option<Cpus> {
        let mut words = Vec::new();
        words.try_reserve_exact(set.len()).ok()?;
        words.extend_from_slice(set);
        let whole = false;
        Some(Cpus { words, whole })
    }

    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }
}

/// What few threads need. In a box of its own, so that the others carry a null pointer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Special {
    /// What no kernel accepts, and the value.
    pub invalid: Option<(&'static str, u64)>,
    /// The signals that are blocked in the closure, if not the creator's.
    pub blocked: Option<KernelSigSet>,
    pub affinity: Option<Cpus>,
    pub scheduler: Option<Scheduler>,
    pub core: Option<CoreScheduling>,
    pub cgroup: Option<Arc<Cgroup>>,
    /// `Some(None)`: a gate for which there was no memory.
    pub gate: Option<Option<Shared<Entrance>>>,
    pub publish: bool,
    pub setup: bool,
    /// Shared with the thread that is being created.
    pub stages: Option<Shared<Stages>>,
    /// There was no memory for these.
    pub unshared: bool,
    /// The thread is C code's.
    #[cfg(feature = "interpose")]
    pub owner: Option<Owner>,
}

/// What C code learns of its thread, and what pthread_getattr_np(3) reports.
#[cfg(feature = "interpose")]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owner {
    /// The address of the place for its `pthread_t`.
    pub id: usize,
    /// It is not created detached.
    pub joinable: bool,
    /// Bytes of stack, as requested, and of guard.
    pub size: usize,
    pub guard: usize,
    /// Policy and priority, where they are not inherited.
    pub scheduling: Option<(libc::c_int, libc::c_int)>,
}

impl Special {
    /// Returns what creator and thread share, or `None` if the thread needs none of it.
    pub(crate) fn stages_to_share(&mut self) -> Option<Stages> {
        self.has_stages().then(|| Stages {
            affinity: self.affinity.take(),
            scheduler: self.scheduler,
            core: self.core,
            tasks: self.cgroup.as_ref().and_then(|cgroup| cgroup.tasks()),
            setup: self.setup,
            publish: self.publish,
            gate: self.gate.clone().flatten(),
            thread: OnceLock::new(),
            report: AtomicU32::new(UNDER_WAY),
            forks: forks(),
        })
    }

    /// Returns `true` if there is more than a mask, which the thread starts with.
    fn has_stages(&self) -> bool {
        self.affinity.is_some()
            || self.scheduler.is_some()
            || self.core.is_some()
            || self.cgroup.is_some()
            || self.gate.is_some()
            || self.publish
            || self.setup
    }

    /// What refuses the thread before it is made.
    pub(crate) fn refusal(&self) -> Option<StepError> {
        if let Some(Err(errno)) = self.cgroup.as_ref().map(|cgroup| cgroup.entry.as_ref()) {
            return Some(StepError::new(Step::Cgroup, *errno, 0));
        }
        let bytes = match self.gate {
            Some(None) => size_of::<Entrance>(),
            _ if self.unshared => size_of::<Stages>(),
            _ => return None,
        };
        Some(StepError::new(Step::Allocate, Errno::ENOMEM, bytes))
    }

    /// Waits for the thread's report, if there is something to report.
    /// `has_ended`: the kernel has cleared the thread's tid word. After an error it has, or is about to.
    #[cold]
    pub(crate) fn wait(&self, has_ended: impl Fn() -> bool) -> Result<(), StepError> {
        self.stages
            .as_ref()
            .map_or(Ok(()), |stages| stages.wait(has_ended))
    }

    /// The directory, for clone3.
    pub(crate) fn cloned(&self) -> Option<BorrowedFd<'_>> {
        let cgroup = self.cgroup.as_ref()?;
        matches!(cgroup.entry, Ok(None)).then(|| cgroup.directory.as_fd())
    }

    /// For the analysis of a refused setting.
    pub(crate) fn requested(&self) -> Requested<'_> {
        let affinity = self
            .stages
            .as_ref()
            .and_then(|stages| stages.affinity.as_ref());
        Requested {
            cpus: affinity.map_or(&[], Cpus::words),
            scheduler: self.scheduler.map(Scheduler::attributes),
            cookie_of: match self.core {
                Some(CoreScheduling::SameAs(tid)) => tid,
                Some(CoreScheduling::New) | None => 0,
            },
            cgroup: self.cgroup.as_ref().map(|cgroup| cgroup.directory.as_fd()),
        }
    }
}

/// What was requested for a thread.
#[derive(Clone, Copy, Default)]
pub(crate) struct Requested<'a> {
    /// Bits: which CPUs.
    pub cpus: &'a [u64],
    pub scheduler: Option<libc::sched_attr>,
    /// The thread whose core-scheduling cookie it was to share.
    pub cookie_of: libc::pid_t,
    /// The directory.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// A directory, and how a thread gets into its cgroup.
#[derive(Debug)]
pub(crate) struct Cgroup {
    directory: OwnedFd,
    /// v1: it writes itself into `tasks`, which is open here. v2: clone3 makes it there.
    entry: Result<Option<OwnedFd>, Errno>,
}

impl Cgroup {
    pub(crate) fn new(directory: OwnedFd) -> Cgroup {
        let entry = Cgroup::open(&directory);
        Cgroup { directory, entry }
    }

    /// # Errors
    /// ENOTDIR for what is no directory of a cgroup file system, else what the kernel has refused `tasks` with.
    fn open(directory: &OwnedFd) -> Result<Option<OwnedFd>, Errno> {
        let kind = fstatfs(directory).map_err(Errno::of)?.filesystem_type();
        match kind {
            CGROUP2_SUPER_MAGIC => Ok(None),
            CGROUP_SUPER_MAGIC => {
                let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
                let tasks = openat(directory, "tasks", flags, Mode::empty());
                Ok(Some(tasks.map_err(Errno::of)?))
            }
            _ => Err(Errno::ENOTDIR),
        }
    }

    fn tasks(&self) -> Option<RawFd> {
        let tasks = self.entry.as_ref().ok()?.as_ref()?;
        Some(tasks.as_raw_fd())
    }
}

/// In the word of the report: the thread is on its way, in the step of this number.
const UNDER_WAY: u32 = 0;
/// All is in force, and the setup has succeeded.
const READY: u32 = 1 << 16;
/// The setup has failed; the packet knows how.
const FAILED: u32 = 2 << 16;
/// A step was refused; in the lower half its number, and above it the errno.
const REFUSED: u32 = 1 << 31;

/// The steps of this file, by their number in the word.
const STEPS: [Step; 5] = [
    Step::Cgroup,
    Step::Affinity,
    Step::Scheduler,
    Step::CoreScheduling,
    Step::Setup,
];

fn number(step: Step) -> u32 {
    STEPS.iter().position(|one| *one == step).unwrap_or(0) as u32
}

/// How long the creator sleeps before it looks whether the thread has died without a report: a bare exit(2) in the setup,
/// or a filter. Doubled each time, up to a second.
const PATIENCE: Duration = Duration::from_millis(10);

/// What creator and thread share of the thread's way to its closure.
#[derive(Debug)]
pub(crate) struct Stages {
    affinity: Option<Cpus>,
    scheduler: Option<Scheduler>,
    core: Option<CoreScheduling>,
    /// The file to write to; the creator has it open while it waits.
    tasks: Option<RawFd>,
    setup: bool,
    publish: bool,
    gate: Option<Shared<Entrance>>,
    thread: OnceLock<Thread>,
    report: AtomicU32,
    /// How often this process had been forked: a child does not open the gate of its parent.
    forks: u32,
}

impl Stages {
    /// The handle that std gives the thread.
    pub(crate) fn thread(&self) -> Option<&Thread> {
        self.thread.get()
    }

    /// Whether the creator waits for the report.
    fn is_awaited(&self) -> bool {
        self.setup
            || self.publish
            || self.tasks.is_some()
            || self.affinity.is_some()
            || self.scheduler.is_some()
            || self.core.is_some()
    }

    /// The creator's side.
    fn wait(&self, has_ended: impl Fn() -> bool) -> Result<(), StepError> {
        if !self.is_awaited() {
            return Ok(());
        }
        let mut patience = PATIENCE;
        let refused = |step: u32, errno| {
            let step = STEPS.get(step as usize).copied().unwrap_or(Step::Setup);
            StepError::new(step, errno, 0)
        };
        loop {
            // Before the word: what the thread has reported before its end is seen behind it.
            let ended = has_ended();
            let word = self.report.load(Ordering::Acquire);
            match word {
                READY | FAILED => return Ok(()),
                // A handler has forked, and this is the child: the thread runs in the parent alone, as its handle says.
                _ if ended && self.forks != forks() => return Ok(()),
                _ if word & REFUSED != 0 => {
                    let errno = Errno::new((word >> 16 & 0x7fff) as i32);
                    // For the next attempt.
                    self.report.store(UNDER_WAY, Ordering::Relaxed);
                    return Err(refused(word & 0xffff, errno));
                }
                _ if ended => {
                    return Err(StepError {
                        ended,
                        ..refused(word, Errno::ESRCH)
                    });
                }
                _ => {}
            }
            sys::futex_wait(&self.report, word, Some(patience));
            patience = (patience * 2).min(Duration::from_secs(1));
        }
    }

    fn report(&self, word: u32) {
        self.report.store(word, Ordering::Release);
        sys::futex_wake(&self.report);
    }

    /// The thread's side, with the mask of its closure.
    pub(crate) fn run(&self, body: &dyn Body) {
        if let Err((step, errno)) = self.apply() {
            return self.report(REFUSED | (errno.raw() as u32) << 16 | number(step));
        }
        if self.publish {
            let _ = self.thread.set(std::thread::current());
        }
        if self.setup {
            self.begin(Step::Setup);
            if !body.set_up() {
                return self.report(FAILED);
            }
        }
        self.report(READY);
        if self.gate.as_ref().is_some_and(|gate| !self.pass(gate)) {
            return body.cancel();
        }
        body.run();
    }

    /// Returns `false` also in a child that was forked on the way here: nothing in it opens the gate.
    fn pass(&self, gate: &Entrance) -> bool {
        notice_fork();
        self.forks == forks() && gate.wait()
    }

    /// What a creator that finds the thread dead is to name.
    fn begin(&self, step: Step) {
        self.report
            .store(UNDER_WAY + number(step), Ordering::Relaxed);
    }

    fn apply(&self) -> Result<(), (Step, Errno)> {
        if let Some(tasks) = self.tasks {
            self.begin(Step::Cgroup);
            sched::enter_cgroup(tasks).map_err(|errno| (Step::Cgroup, errno))?;
        }
        if let Some(cpus) = &self.affinity {
            self.begin(Step::Affinity);
            set_affinity(0, cpus).map_err(|errno| (Step::Affinity, errno))?;
        }
        if let Some(scheduler) = self.scheduler {
            self.begin(Step::Scheduler);
            sched::set_scheduler(0, &scheduler.attributes())
                .map_err(|errno| (Step::Scheduler, errno))?;
        }
        if let Some(core) = self.core {
            self.begin(Step::CoreScheduling);
            let (operation, tid) = match core {
                CoreScheduling::New => (libc::PR_SCHED_CORE_CREATE, 0),
                CoreScheduling::SameAs(tid) => (libc::PR_SCHED_CORE_SHARE_FROM, tid),
            };
            let set = sched::core_scheduling(operation, tid);
            set.map_err(|errno| (Step::CoreScheduling, errno))?;
        }
        Ok(())
    }
}

/// Sets the affinity, and reads it back if the set is wanted as a whole: of one that lies partly outside of the cpuset the
/// kernel takes the other part, and says nothing. The errno is then that of a set that lies outside as a whole.
pub(crate) fn set_affinity(tid: libc::pid_t, cpus: &Cpus) -> Result<(), Errno> {
    sched::set_affinity(tid, cpus.words())?;
    if !cpus.whole {
        return Ok(());
    }
    let set = sched::affinity(tid)?;
    let same = sched::list(cpus.words()).eq(sched::list(&set));
    if same { Ok(()) } else { Err(Errno::EINVAL) }
}
