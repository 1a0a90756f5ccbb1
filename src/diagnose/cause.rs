//! What was found out about a refusal, and how it is told.
//!
//! Everything is plain `Copy` data: a cause lies in a box made before the clone, and in a static that a
//! debugger reads from a core file.

use std::fmt;

use nix::errno::Errno;

use super::limits::{Text, UNLIMITED};

/// A file name without heap: at most [`InlinePath::CAPACITY`] bytes, and whether it was longer.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct InlinePath {
    length: u16,
    truncated: bool,
    bytes: [u8; InlinePath::CAPACITY],
}

impl InlinePath {
    /// The longest path kept, in bytes.
    pub const CAPACITY: usize = 253;

    /// No path: it is not known, or not visible from here.
    pub const EMPTY: InlinePath = InlinePath {
        length: 0,
        truncated: false,
        bytes: [0; InlinePath::CAPACITY],
    };

    pub(crate) fn new(path: &[u8]) -> InlinePath {
        let mut inline = InlinePath::EMPTY;
        let mut length = path.len().min(InlinePath::CAPACITY);
        // Cut between two characters: a byte that continues one does not begin the rest.
        while length > 0 && path.get(length).is_some_and(|byte| byte & 0xC0 == 0x80) {
            length -= 1;
        }
        if let (Some(to), Some(from)) = (inline.bytes.get_mut(..length), path.get(..length)) {
            to.copy_from_slice(from);
        }
        inline.length = length as u16;
        inline.truncated = length < path.len();
        inline
    }

    /// The bytes of the path, cut at [`InlinePath::CAPACITY`].
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes
            .get(..usize::from(self.length))
            .unwrap_or_default()
    }

    /// The path, or nothing if it is unknown, was cut, or is not UTF-8.
    pub fn to_str(&self) -> Option<&str> {
        if self.truncated || self.length == 0 {
            return None;
        }
        std::str::from_utf8(self.as_bytes()).ok()
    }

    /// Whether the path is unknown.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Whether the real path is longer.
    pub fn is_truncated(&self) -> bool {
        self.truncated
    }
}

impl fmt::Display for InlinePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.as_bytes().utf8_chunks() {
            f.write_str(chunk.valid())?;
            if !chunk.invalid().is_empty() {
                f.write_str("\u{fffd}")?;
            }
        }
        f.write_str(if self.truncated { "..." } else { "" })
    }
}

impl fmt::Debug for InlinePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

impl<const N: usize> From<&Text<N>> for InlinePath {
    fn from(text: &Text<N>) -> Self {
        let mut path = InlinePath::new(text.bytes());
        path.truncated |= text.is_truncated();
        path
    }
}

/// How sure a cause is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Certainty {
    /// The kernel's own answers and what was read leave no other cause.
    Proven,
    /// The best candidate; what else it could be stands beside it.
    Inferred,
    /// Nothing could be named; all that was read is kept.
    Unknown,
}

impl fmt::Display for Certainty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Certainty::Proven => "proven",
            Certainty::Inferred => "inferred",
            Certainty::Unknown => "unknown",
        })
    }
}

/// Which of the two system calls was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CloneCall {
    /// clone3(2).
    Clone3,
    /// clone(2), because clone3 answered ENOSYS or EPERM.
    Clone,
}

impl fmt::Display for CloneCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CloneCall::Clone3 => "clone3",
            CloneCall::Clone => "clone",
        })
    }
}

/// The answer of one system call made to find out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Answer {
    /// The question was not asked.
    #[default]
    NotAsked,
    /// The call was granted.
    Granted,
    /// The call was refused with this errno.
    Refused(Errno),
}

impl From<Result<(), Errno>> for Answer {
    fn from(result: Result<(), Errno>) -> Self {
        match result {
            Ok(()) => Answer::Granted,
            Err(errno) => Answer::Refused(errno),
        }
    }
}

impl Answer {
    pub(crate) fn is(self, errno: Errno) -> bool {
        self == Answer::Refused(errno)
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Answer::NotAsked => f.write_str("not asked"),
            Answer::Granted => f.write_str("granted"),
            Answer::Refused(errno) => write!(f, "{errno:?}"),
        }
    }
}

/// The kernel's order of checks, asked with clones that always fail (see the module `clone::probe`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Oracle {
    /// `clone3(NULL, 0)`. EINVAL: the kernel itself answers. ENOSYS: no clone3, or a filter.
    pub clone3_empty: Answer,
    /// clone3 up to the pid number, without CLONE_FS. EINVAL: every process limit passed.
    pub until_pid_number: Answer,
    /// The same with CLONE_FS. EAGAIN where the one before passed: a sibling is inside execve.
    pub until_pid_number_with_fs: Answer,
    /// clone3 up to the cgroup. EBADF: a pid number was found at every level.
    pub until_cgroup: Answer,
    /// clone with the caller's flags up to the thread pointer. EPERM: every process limit passed.
    pub until_thread_pointer: Answer,
    /// The refused call's own number with an invalid combination of flags. Anything but EINVAL: a filter.
    pub until_flags: Answer,
    /// The refused call itself, repeated.
    pub repeated: Answer,
}

impl Oracle {
    /// Why the questions tell nothing, if they do not.
    pub(crate) fn silence(&self) -> Option<&'static str> {
        const ANSWERED: &str = "a filter or a tracer answers clone3 for the kernel, which cannot be asked what refused";
        const MISSING: &str =
            "no clone3 (Linux before 5.3, or a filter): the kernel cannot be asked what refused";
        const OLD: &str = "Linux before 5.7: its clone3 does not know the questions";
        match (self.clone3_empty, self.until_pid_number) {
            (Answer::NotAsked, _) => None,
            (Answer::Refused(Errno::ENOSYS), _) => Some(MISSING),
            // Larger than the structure that the kernel knows.
            (Answer::Refused(Errno::EINVAL), Answer::Refused(Errno::E2BIG)) => Some(OLD),
            (
                Answer::Refused(Errno::EINVAL),
                Answer::NotAsked | Answer::Refused(Errno::EINVAL | Errno::EAGAIN | Errno::ENOMEM),
            ) => None,
            _ => Some(ANSWERED),
        }
    }
}

/// How far mmap gets, asked in the kernel's order of checks.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryOracle {
    /// A page that is in use. EEXIST: the number of mappings is not above its maximum.
    pub number_of_mappings: Answer,
    /// An invalid mapping of the same length. EINVAL: there are enough free addresses.
    pub free_addresses: Answer,
    /// The same length, PROT_NONE.
    pub inaccessible: Answer,
    /// The same length, writable, MAP_NORESERVE.
    pub unreserved: Answer,
    /// The same length, writable, MAP_NORESERVE, shared: asked where RLIMIT_DATA cannot be read.
    pub shared: Answer,
    /// The same length, as a stack is mapped.
    pub stack: Answer,
    /// Two guards made by mprotect in a fresh mapping of four pages.
    pub guard: Answer,
}

/// Which level of nested pid namespaces has no number left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PidLevel {
    /// The namespace of this process.
    Own,
    /// A namespace around it, whose limit cannot be read from inside.
    Ancestor,
    /// One of them; which cannot be told.
    OwnOrAncestor,
}

/// Where the cgroup stands whose limit was hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum CgroupPlace {
    /// The cgroup of the calling thread.
    Own,
    /// A cgroup around it; the directory is named.
    Ancestor,
    /// A cgroup around it that is not visible in this cgroup namespace or mount.
    Hidden,
    /// The cgroup that the thread was to enter (CLONE_INTO_CGROUP), or one around it.
    Target,
    /// The thread's own or one around it; which cannot be told.
    Unclear,
}

/// Why a step was refused, with the evidence.
///
/// Values that could not be read are `None`; [`u64::MAX`] means unlimited. Sizes are bytes.
///
/// ```
/// # use nptl::Cause;
/// fn remedy(cause: &Cause) -> &'static str {
///     match cause {
///         Cause::PidsCgroup { .. } => "raise pids.max or TasksMax",
///         Cause::UserProcesses { .. } => "raise LimitNPROC",
///         _ => "see the report",
///     }
/// }
/// assert_eq!(remedy(&Cause::ThreadsMax { tasks: None, maximum: None }), "see the report");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[non_exhaustive]
pub enum Cause {
    /// The caller asked for something impossible.
    InvalidAttribute {
        /// Which attribute.
        what: &'static str,
        /// The value asked for.
        value: u64,
    },
    /// The C library did not pass the checks made before its structures are trusted.
    UnsupportedRuntime {
        /// Which check failed.
        what: &'static str,
    },
    /// A system-call filter answered, not the kernel (seccomp(2)).
    Seccomp {
        /// The call the filter answers for.
        call: CloneCall,
        /// The filter's answer to a call that no kernel answers so.
        answer: Answer,
        /// Field `Seccomp` of /proc/thread-self/status; 2 is filter mode.
        mode: Option<u64>,
        /// Field `Seccomp_filters`: number of filters installed.
        filters: Option<u64>,
    },
    /// RLIMIT_NPROC: the real user has too many tasks (getrlimit(2)). The kernel exports no count of them.
    UserProcesses {
        /// Real user id of the calling thread.
        uid: Option<u32>,
        /// Soft limit of the process.
        soft: Option<u64>,
        /// Hard limit of the process.
        hard: Option<u64>,
        /// Outside the initial user namespace a limit remembered at the namespace's creation also counts, and
        /// may be lower than the process's own.
        initial_user_namespace: Option<bool>,
        /// All tasks of the machine: an upper bound of the user's.
        tasks: Option<u64>,
    },
    /// kernel.threads-max: too many tasks in the whole machine.
    ThreadsMax {
        /// Tasks in the machine, from /proc/loadavg.
        tasks: Option<u64>,
        /// /proc/sys/kernel/threads-max.
        maximum: Option<u64>,
    },
    /// The caller runs under SCHED_DEADLINE and may not hand that on (sched(7), SCHED_FLAG_RESET_ON_FORK).
    DeadlineScheduling {
        /// The policy, from sched_getattr(2) or /proc/thread-self/stat.
        policy: u32,
        /// sched_flags from sched_getattr(2), if it could be called.
        flags: Option<u64>,
    },
    /// Another thread of the process is inside execve(2): gone within milliseconds, one way or the other.
    SiblingExec {
        /// Threads of the process.
        threads: Option<u64>,
    },
    /// No pid number is left at some level of pid namespaces.
    PidNumbers {
        /// Which level.
        level: PidLevel,
        /// /proc/sys/kernel/pid_max as this process reads it: of its own namespace since Linux 6.14.
        pid_max: Option<u64>,
        /// Numbers of the own namespace that were looked at.
        sampled: u32,
        /// How many of them were free.
        free: u32,
        /// Whether this is the initial pid namespace, which has no level around it.
        initial_namespace: Option<bool>,
    },
    /// The pid namespace has lost its init process and takes no new task.
    DyingPidNamespace {
        /// Inode of the namespace.
        namespace: Option<u64>,
    },
    /// The process has unshared its pid namespace: only a new process can enter that, no thread.
    UnsharedPidNamespace {
        /// Inode of /proc/thread-self/ns/pid.
        own: Option<u64>,
        /// Inode of /proc/thread-self/ns/pid_for_children; up to Linux 6.18 none while the new namespace is empty.
        for_children: Option<u64>,
    },
    /// pids.max of a cgroup.
    PidsCgroup {
        /// Directory of the cgroup whose limit was hit; empty if it is not visible.
        directory: InlinePath,
        /// Where it stands.
        place: CgroupPlace,
        /// 1 or 2.
        version: u8,
        /// pids.current, read after the refusal. It may exceed the maximum.
        current: Option<u64>,
        /// pids.max.
        maximum: Option<u64>,
        /// How far the refusal counter (pids.events or pids.events.local) rose over the repeated refusal.
        refusals: Option<u64>,
    },
    /// The kernel had no memory for the new task: mostly the memory cgroup.
    KernelMemory {
        /// Directory of the memory cgroup whose failure counter rose; empty if none did.
        directory: InlinePath,
        /// 1, 2, or 0 when no cgroup is named.
        version: u8,
        /// memory.current or memory.usage_in_bytes.
        usage: Option<u64>,
        /// memory.max or memory.limit_in_bytes.
        limit: Option<u64>,
        /// How far the counter of failed charges rose over a refused probe.
        failures: Option<u64>,
        /// Why the files that could name a cgroup were not read: a kernel without memory opens none.
        unread: Option<Errno>,
    },
    /// RLIMIT_AS.
    AddressSpace {
        /// Bytes asked for.
        requested: u64,
        /// VmSize.
        in_use: Option<u64>,
        /// Soft limit.
        limit: Option<u64>,
    },
    /// RLIMIT_DATA.
    DataSegment {
        /// Bytes asked for.
        requested: u64,
        /// VmData.
        in_use: Option<u64>,
        /// Soft limit.
        limit: Option<u64>,
    },
    /// vm.max_map_count: the process has as many mappings as it may.
    MapCount {
        /// /proc/sys/vm/max_map_count.
        maximum: Option<u64>,
        /// Whether it was the split for a guard that failed (at the maximum) and not the mapping (above it).
        split: bool,
    },
    /// The machine's overcommit policy (vm.overcommit_memory).
    Overcommit {
        /// 0: one mapping may not exceed memory and swap. 2: a strict limit for all processes together.
        mode: Option<u64>,
        /// Bytes asked for.
        requested: u64,
        /// Mode 2: Committed_AS. Mode 0: 0.
        in_use: Option<u64>,
        /// Mode 2: CommitLimit. Mode 0: memory and swap of the machine.
        limit: Option<u64>,
    },
    /// RLIMIT_MEMLOCK: mlockall(MCL_FUTURE) is in force, or the stack was to be locked.
    LockedMemory {
        /// Bytes asked for.
        requested: u64,
        /// VmLck.
        in_use: Option<u64>,
        /// Soft limit.
        limit: Option<u64>,
    },
    /// No range of free addresses is long enough.
    AddressSpaceExhausted {
        /// Bytes asked for.
        requested: u64,
        /// VmSize.
        in_use: Option<u64>,
    },
    /// A privilege is missing for a scheduling policy, an affinity or a cgroup.
    NotPermitted {
        /// What was asked for and what it needs.
        what: &'static str,
        /// Whether CAP_SYS_NICE is effective.
        cap_sys_nice: Option<bool>,
        /// Soft RLIMIT_RTPRIO.
        rtprio: Option<u64>,
    },
    /// None of the CPUs asked for is in the cpuset.
    OutsideCpuset {
        /// Directory of the cpuset; empty if not visible.
        directory: InlinePath,
    },
    /// Not found out. All that was read.
    Unknown {
        /// The kernel's answers about clone.
        oracle: Oracle,
        /// The kernel's answers about mmap.
        memory: MemoryOracle,
        /// Tasks of the machine.
        tasks: Option<u64>,
        /// kernel.threads-max.
        threads_max: Option<u64>,
        /// Soft RLIMIT_NPROC.
        nproc: Option<u64>,
        /// kernel.pid_max.
        pid_max: Option<u64>,
        /// Field `Seccomp` of /proc/thread-self/status.
        seccomp: Option<u64>,
    },
}

/// The name of a cause, without its evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each is documented at `Cause`")]
pub enum CauseKind {
    InvalidAttribute,
    UnsupportedRuntime,
    Seccomp,
    UserProcesses,
    ThreadsMax,
    DeadlineScheduling,
    SiblingExec,
    PidNumbers,
    DyingPidNamespace,
    UnsharedPidNamespace,
    PidsCgroup,
    KernelMemory,
    AddressSpace,
    DataSegment,
    MapCount,
    Overcommit,
    LockedMemory,
    AddressSpaceExhausted,
    NotPermitted,
    OutsideCpuset,
    Unknown,
}

impl CauseKind {
    /// Every kind, in the order of [`Cause`].
    pub const ALL: [CauseKind; 21] = [
        CauseKind::InvalidAttribute,
        CauseKind::UnsupportedRuntime,
        CauseKind::Seccomp,
        CauseKind::UserProcesses,
        CauseKind::ThreadsMax,
        CauseKind::DeadlineScheduling,
        CauseKind::SiblingExec,
        CauseKind::PidNumbers,
        CauseKind::DyingPidNamespace,
        CauseKind::UnsharedPidNamespace,
        CauseKind::PidsCgroup,
        CauseKind::KernelMemory,
        CauseKind::AddressSpace,
        CauseKind::DataSegment,
        CauseKind::MapCount,
        CauseKind::Overcommit,
        CauseKind::LockedMemory,
        CauseKind::AddressSpaceExhausted,
        CauseKind::NotPermitted,
        CauseKind::OutsideCpuset,
        CauseKind::Unknown,
    ];

    /// What an administrator calls it.
    pub fn title(self) -> &'static str {
        match self {
            CauseKind::InvalidAttribute => "invalid attribute",
            CauseKind::UnsupportedRuntime => "unsupported C library",
            CauseKind::Seccomp => "a system-call filter (seccomp)",
            CauseKind::UserProcesses => "RLIMIT_NPROC, the user's number of processes",
            CauseKind::ThreadsMax => "kernel.threads-max",
            CauseKind::DeadlineScheduling => "SCHED_DEADLINE without reset-on-fork",
            CauseKind::SiblingExec => "another thread of this process inside execve",
            CauseKind::PidNumbers => "pid numbers (kernel.pid_max)",
            CauseKind::DyingPidNamespace => "a pid namespace whose init is gone",
            CauseKind::UnsharedPidNamespace => "an unshared pid namespace",
            CauseKind::PidsCgroup => "pids.max of a cgroup",
            CauseKind::KernelMemory => "kernel memory",
            CauseKind::AddressSpace => "RLIMIT_AS",
            CauseKind::DataSegment => "RLIMIT_DATA",
            CauseKind::MapCount => "vm.max_map_count",
            CauseKind::Overcommit => "the overcommit policy (vm.overcommit_memory)",
            CauseKind::LockedMemory => "RLIMIT_MEMLOCK",
            CauseKind::AddressSpaceExhausted => "no free range of addresses",
            CauseKind::NotPermitted => "a missing privilege",
            CauseKind::OutsideCpuset => "CPUs outside the cpuset",
            CauseKind::Unknown => "unknown",
        }
    }
}

impl fmt::Display for CauseKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.title())
    }
}

/// A set of causes: what else an inferred refusal could be.
///
/// ```
/// use nptl::{CauseKind, Causes};
/// let set: Causes = [CauseKind::SiblingExec, CauseKind::PidNumbers].into_iter().collect();
/// assert!(set.contains(CauseKind::PidNumbers));
/// assert!(!set.contains(CauseKind::Seccomp));
/// assert_eq!(set.iter().count(), 2);
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Causes(u32);

impl Causes {
    /// Whether a cause is in the set.
    pub fn contains(self, kind: CauseKind) -> bool {
        self.0 & (1 << kind as u32) != 0
    }

    /// Whether the set has no element.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The elements, in the order of [`Cause`].
    pub fn iter(self) -> impl Iterator<Item = CauseKind> {
        CauseKind::ALL
            .into_iter()
            .filter(move |kind| self.contains(*kind))
    }

    pub(crate) const NONE: Causes = Causes(0);

    /// Whether one of them counts tasks, so that it passes when others have ended.
    pub(crate) fn has_count(self) -> bool {
        [
            CauseKind::UserProcesses,
            CauseKind::ThreadsMax,
            CauseKind::PidNumbers,
            CauseKind::PidsCgroup,
        ]
        .into_iter()
        .any(|kind| self.contains(kind))
    }

    pub(crate) fn with(self, kind: CauseKind) -> Causes {
        Causes(self.0 | 1 << kind as u32)
    }

    pub(crate) fn without(self, kind: CauseKind) -> Causes {
        Causes(self.0 & !(1 << kind as u32))
    }
}

impl FromIterator<CauseKind> for Causes {
    fn from_iter<I: IntoIterator<Item = CauseKind>>(kinds: I) -> Self {
        kinds.into_iter().fold(Causes::NONE, Causes::with)
    }
}

impl fmt::Debug for Causes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

impl fmt::Display for Causes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, kind) in self.iter().enumerate() {
            f.write_str(if position == 0 { "" } else { "; " })?;
            write!(f, "{kind}")?;
        }
        Ok(())
    }
}

/// A value that may be absent or unlimited.
struct Value(Option<u64>);

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("not readable"),
            Some(UNLIMITED) => f.write_str("unlimited"),
            Some(value) => write!(f, "{value}"),
        }
    }
}

/// A size that may be absent or unlimited.
struct Size(Option<u64>);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(bytes) if bytes >= 1 << 20 && bytes != UNLIMITED => {
                // In whole numbers: a hundredth of a MiB is enough to compare with.
                let hundredths = u128::from(bytes) * 100 / (1 << 20);
                write!(
                    f,
                    "{bytes} bytes ({}.{:02} MiB)",
                    hundredths / 100,
                    hundredths % 100
                )
            }
            Some(bytes) if bytes != UNLIMITED => write!(f, "{bytes} bytes"),
            other => Value(other).fmt(f),
        }
    }
}

impl Cause {
    /// The name without the evidence.
    pub fn kind(&self) -> CauseKind {
        match self {
            Cause::InvalidAttribute { .. } => CauseKind::InvalidAttribute,
            Cause::UnsupportedRuntime { .. } => CauseKind::UnsupportedRuntime,
            Cause::Seccomp { .. } => CauseKind::Seccomp,
            Cause::UserProcesses { .. } => CauseKind::UserProcesses,
            Cause::ThreadsMax { .. } => CauseKind::ThreadsMax,
            Cause::DeadlineScheduling { .. } => CauseKind::DeadlineScheduling,
            Cause::SiblingExec { .. } => CauseKind::SiblingExec,
            Cause::PidNumbers { .. } => CauseKind::PidNumbers,
            Cause::DyingPidNamespace { .. } => CauseKind::DyingPidNamespace,
            Cause::UnsharedPidNamespace { .. } => CauseKind::UnsharedPidNamespace,
            Cause::PidsCgroup { .. } => CauseKind::PidsCgroup,
            Cause::KernelMemory { .. } => CauseKind::KernelMemory,
            Cause::AddressSpace { .. } => CauseKind::AddressSpace,
            Cause::DataSegment { .. } => CauseKind::DataSegment,
            Cause::MapCount { .. } => CauseKind::MapCount,
            Cause::Overcommit { .. } => CauseKind::Overcommit,
            Cause::LockedMemory { .. } => CauseKind::LockedMemory,
            Cause::AddressSpaceExhausted { .. } => CauseKind::AddressSpaceExhausted,
            Cause::NotPermitted { .. } => CauseKind::NotPermitted,
            Cause::OutsideCpuset { .. } => CauseKind::OutsideCpuset,
            Cause::Unknown { .. } => CauseKind::Unknown,
        }
    }

    /// The lines of the evidence: value, and the file or call it was read from; `others` could not be excluded.
    fn evidence(&self, f: &mut fmt::Formatter<'_>, others: Causes) -> fmt::Result {
        let line = |f: &mut fmt::Formatter<'_>, what: &str, value: &dyn fmt::Display| {
            writeln!(f, "  {what}: {value}")
        };
        match self {
            Cause::InvalidAttribute { what, value } => line(f, what, value),
            Cause::UnsupportedRuntime { what } => line(f, "failed check", what),
            Cause::Seccomp {
                call,
                answer,
                mode,
                filters,
            } => {
                let what = match call {
                    CloneCall::Clone3 => {
                        "clone3 with no or invalid arguments, which a kernel refuses with EINVAL"
                    }
                    CloneCall::Clone => {
                        "clone with invalid flags, which a kernel refuses with EINVAL"
                    }
                };
                line(f, what, answer)?;
                line(f, "/proc/thread-self/status, Seccomp", &Value(*mode))?;
                line(
                    f,
                    "/proc/thread-self/status, Seccomp_filters",
                    &Value(*filters),
                )
            }
            Cause::UserProcesses {
                uid,
                soft,
                hard,
                initial_user_namespace,
                tasks,
            } => {
                line(
                    f,
                    "/proc/thread-self/status, real Uid",
                    &Value(uid.map(u64::from)),
                )?;
                line(f, "RLIMIT_NPROC, soft", &Value(*soft))?;
                line(f, "RLIMIT_NPROC, hard", &Value(*hard))?;
                line(f, "/proc/loadavg, tasks of all users", &Value(*tasks))?;
                if *initial_user_namespace != Some(true) {
                    writeln!(
                        f,
                        "  A user namespace also enforces the RLIMIT_NPROC it was created under, which may be\n  lower than the one above; no file shows it."
                    )?;
                }
                f.write_str("  The kernel refused before pid allocation")?;
                if others.is_empty() {
                    f.write_str(
                        ", and neither kernel.threads-max nor\n  SCHED_DEADLINE nor execve did it",
                    )?;
                }
                writeln!(f, ". It exports no count of a user's tasks.")
            }
            Cause::ThreadsMax { tasks, maximum } => {
                line(f, "/proc/loadavg, tasks of all users", &Value(*tasks))?;
                line(f, "/proc/sys/kernel/threads-max", &Value(*maximum))
            }
            Cause::DeadlineScheduling { policy, flags } => {
                line(f, "scheduling policy (6 is SCHED_DEADLINE)", policy)?;
                line(
                    f,
                    "sched_getattr, flags (bit 0 is reset-on-fork)",
                    &Value(*flags),
                )
            }
            Cause::SiblingExec { threads } => {
                line(f, "/proc/thread-self/status, Threads", &Value(*threads))?;
                writeln!(
                    f,
                    "  The kernel refused a clone that shares the file-system state and let one pass that does not."
                )
            }
            Cause::PidNumbers {
                level,
                pid_max,
                sampled,
                free,
                initial_namespace,
            } => {
                line(
                    f,
                    "no number left in",
                    &match level {
                        PidLevel::Own => "the pid namespace of this process",
                        PidLevel::Ancestor => "a pid namespace around that of this process",
                        PidLevel::OwnOrAncestor => {
                            "the pid namespace of this process or one around it"
                        }
                    },
                )?;
                line(f, "/proc/sys/kernel/pid_max", &Value(*pid_max))?;
                if *sampled > 0 {
                    line(f, "numbers of the own namespace looked at", sampled)?;
                    line(f, "of these free", free)?;
                }
                if *initial_namespace == Some(true) {
                    writeln!(f, "  This is the initial pid namespace.")?;
                }
                Ok(())
            }
            Cause::DyingPidNamespace { namespace } => {
                line(f, "/proc/thread-self/ns/pid", &Value(*namespace))
            }
            Cause::UnsharedPidNamespace { own, for_children } => {
                line(f, "/proc/thread-self/ns/pid", &Value(*own))?;
                match for_children {
                    Some(_) => line(
                        f,
                        "/proc/thread-self/ns/pid_for_children",
                        &Value(*for_children),
                    ),
                    None => line(
                        f,
                        "/proc/thread-self/ns/pid_for_children",
                        &"a new namespace without any process",
                    ),
                }
            }
            Cause::PidsCgroup {
                directory,
                place,
                version,
                current,
                maximum,
                refusals,
            } => {
                let which = match place {
                    CgroupPlace::Own => "the cgroup of this thread",
                    CgroupPlace::Ancestor => "an ancestor of this thread's cgroup",
                    CgroupPlace::Hidden => "an ancestor outside this cgroup namespace",
                    CgroupPlace::Target => "the one the thread was to enter, or an ancestor of it",
                    CgroupPlace::Unclear => "this thread's cgroup or an ancestor",
                };
                line(f, "cgroup", &which)?;
                if !directory.is_empty() {
                    line(f, "directory", directory)?;
                }
                if *version != 0 {
                    line(f, "cgroup version", version)?;
                }
                if !directory.is_empty() {
                    line(f, "pids.current", &Value(*current))?;
                    line(f, "pids.max", &Value(*maximum))?;
                }
                line(
                    f,
                    "pids.events rose over a repeated refusal by",
                    &Value(*refusals),
                )
            }
            Cause::KernelMemory {
                directory,
                version,
                usage,
                limit,
                failures,
                unread,
            } => {
                if let Some(errno) = unread {
                    return writeln!(
                        f,
                        "  The files that could name a memory cgroup cannot be read: {errno:?} ({}).",
                        errno.desc()
                    );
                }
                if directory.is_empty() {
                    return writeln!(
                        f,
                        "  No memory cgroup could be read that counted a failed charge."
                    );
                }
                line(f, "directory", directory)?;
                line(f, "cgroup version", version)?;
                line(f, "memory in use", &Size(*usage))?;
                line(f, "memory limit", &Size(*limit))?;
                line(
                    f,
                    "failed charges during a refused probe",
                    &Value(*failures),
                )
            }
            Cause::AddressSpace {
                requested,
                in_use,
                limit,
            } => {
                line(f, "requested", &Size(Some(*requested)))?;
                line(f, "/proc/thread-self/status, VmSize", &Size(*in_use))?;
                line(f, "RLIMIT_AS", &Size(*limit))
            }
            Cause::DataSegment {
                requested,
                in_use,
                limit,
            } => {
                line(f, "requested", &Size(Some(*requested)))?;
                line(f, "/proc/thread-self/status, VmData", &Size(*in_use))?;
                line(f, "RLIMIT_DATA", &Size(*limit))
            }
            Cause::MapCount { maximum, split } => {
                line(f, "/proc/sys/vm/max_map_count", &Value(*maximum))?;
                line(
                    f,
                    "mappings of this process",
                    &if *split {
                        "exactly that many; a guard splits one"
                    } else {
                        "more than that"
                    },
                )
            }
            Cause::Overcommit {
                mode,
                requested,
                in_use,
                limit,
            } => {
                line(f, "requested", &Size(Some(*requested)))?;
                line(f, "/proc/sys/vm/overcommit_memory", &Value(*mode))?;
                if *mode == Some(2) {
                    line(f, "/proc/meminfo, Committed_AS", &Size(*in_use))?;
                    line(f, "/proc/meminfo, CommitLimit", &Size(*limit))
                } else {
                    line(f, "/proc/meminfo, MemTotal and SwapTotal", &Size(*limit))
                }
            }
            Cause::LockedMemory {
                requested,
                in_use,
                limit,
            } => {
                line(f, "requested", &Size(Some(*requested)))?;
                line(f, "/proc/thread-self/status, VmLck", &Size(*in_use))?;
                line(f, "RLIMIT_MEMLOCK", &Size(*limit))
            }
            Cause::AddressSpaceExhausted { requested, in_use } => {
                line(f, "requested", &Size(Some(*requested)))?;
                line(f, "/proc/thread-self/status, VmSize", &Size(*in_use))
            }
            Cause::NotPermitted {
                what,
                cap_sys_nice,
                rtprio,
            } => {
                line(f, "refused", what)?;
                line(
                    f,
                    "CAP_SYS_NICE",
                    &match cap_sys_nice {
                        Some(true) => "effective",
                        Some(false) => "not effective",
                        None => "not readable",
                    },
                )?;
                line(f, "RLIMIT_RTPRIO", &Value(*rtprio))
            }
            Cause::OutsideCpuset { directory } => {
                if directory.is_empty() {
                    line(f, "cpuset", &"not visible")
                } else {
                    line(f, "cpuset", directory)
                }
            }
            Cause::Unknown {
                oracle,
                memory,
                tasks,
                threads_max,
                nproc,
                pid_max,
                seccomp,
            } => {
                for (what, answer) in [
                    ("clone3(NULL, 0)", oracle.clone3_empty),
                    ("clone3 up to the pid number", oracle.until_pid_number),
                    (
                        "the same sharing file-system state",
                        oracle.until_pid_number_with_fs,
                    ),
                    ("clone3 up to the cgroup", oracle.until_cgroup),
                    (
                        "clone up to the thread pointer",
                        oracle.until_thread_pointer,
                    ),
                    ("clone or clone3 with invalid flags", oracle.until_flags),
                    ("the refused call repeated", oracle.repeated),
                    ("mmap of a page in use", memory.number_of_mappings),
                    ("mmap, invalid, same length", memory.free_addresses),
                    ("mmap, PROT_NONE, same length", memory.inaccessible),
                    ("mmap, MAP_NORESERVE, same length", memory.unreserved),
                    ("mmap, shared, same length", memory.shared),
                    ("mmap, as a stack, same length", memory.stack),
                    ("guards in a mapping of four pages", memory.guard),
                ] {
                    if answer != Answer::NotAsked {
                        line(f, what, &answer)?;
                    }
                }
                for (what, value) in [
                    ("/proc/loadavg, tasks of all users", tasks),
                    ("/proc/sys/kernel/threads-max", threads_max),
                    ("RLIMIT_NPROC, soft", nproc),
                    ("/proc/sys/kernel/pid_max", pid_max),
                    ("/proc/thread-self/status, Seccomp", seccomp),
                ] {
                    if value.is_some() {
                        line(f, what, &Value(*value))?;
                    }
                }
                Ok(())
            }
        }
    }

    /// What to change, as an administrator would.
    fn remedy(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::InvalidAttribute { .. } => f.write_str("Ask for a value the documentation allows."),
            Cause::UnsupportedRuntime { .. } => f.write_str(
                "Run on a glibc from 2.34 on, dynamically linked, or report the failed check.",
            ),
            Cause::Seccomp { call, .. } => write!(
                f,
                "Allow {call} for threads in the filter (Docker: --security-opt seccomp=PROFILE; systemd: SystemCallFilter=).\n  \
                 A filter that does not know clone3 should answer ENOSYS to it, not another errno."
            ),
            Cause::UserProcesses {
                uid,
                initial_user_namespace,
                ..
            } => {
                f.write_str(
                    "Raise the limit of the user's processes: prlimit --pid PID --nproc=N:N, ulimit -u N, LimitNPROC=N in the\n  \
                     systemd unit, nproc in /etc/security/limits.conf, docker run --ulimit nproc=N; or end other tasks of this\n  \
                     user (ps -L -U ",
                )?;
                match uid {
                    Some(uid) => write!(f, "{uid}")?,
                    None => f.write_str("UID")?,
                }
                f.write_str(" lists them).")?;
                match initial_user_namespace {
                    Some(true) => f.write_str(" CAP_SYS_RESOURCE exempts."),
                    _ => f.write_str(
                        "\n  If this is a user namespace, raise the limit of the process that creates it, before it does.",
                    ),
                }
            }
            Cause::ThreadsMax { .. } => write!(
                f,
                "sysctl kernel.threads-max=N{KEEP}, or end other tasks of the machine\n  (ps -eL lists them).",
            ),
            Cause::DeadlineScheduling { .. } => f.write_str(
                "Set SCHED_FLAG_RESET_ON_FORK with sched_setattr (chrt --deadline --reset-on-fork), or spawn from a thread\n  \
                 under another policy.",
            ),
            Cause::SiblingExec { .. } => f.write_str(
                "Nothing: the kernel refuses new threads while another thread of the process is inside execve. Either that\n  \
                 replaces the process, or it fails and clone works again within milliseconds. Retrying is right.",
            ),
            Cause::PidNumbers { level, .. } => {
                match level {
                    PidLevel::Own => f.write_str("sysctl kernel.pid_max=N inside this pid namespace")?,
                    PidLevel::Ancestor => f.write_str(
                        "sysctl kernel.pid_max=N in the pid namespace around this one: on the host or in the outer container",
                    )?,
                    PidLevel::OwnOrAncestor => f.write_str(
                        "sysctl kernel.pid_max=N, in this pid namespace and in those around it",
                    )?,
                }
                write!(
                    f,
                    "\n  (N up to 4194304){KEEP}; or end tasks there. Zombies hold numbers, too: their parents must\n  \
                     wait for them.",
                )
            }
            Cause::DyingPidNamespace { .. } => f.write_str(
                "Nothing from inside: the namespace's init has ended and every process in it is being killed.\n  \
                 Keep the first process of the namespace (the container's main process) alive while threads are needed.",
            ),
            Cause::UnsharedPidNamespace { .. } => f.write_str(
                "Start threads before unshare(CLONE_NEWPID) or setns, or fork after it and start them in the child.",
            ),
            Cause::PidsCgroup {
                directory, place, ..
            } => match place {
                CgroupPlace::Hidden => f.write_str(
                    "Raise pids.max where the cgroup is visible: on the host (docker run --pids-limit, podman --pids-limit,\n  \
                     kubelet podPidsLimit, systemctl set-property UNIT TasksMax=N).",
                ),
                CgroupPlace::Unclear | CgroupPlace::Target => f.write_str(
                    "Raise pids.max of the full one among that cgroup and its ancestors, or its unit's TasksMax=\n  \
                     (systemctl set-property UNIT TasksMax=N, containers: --pids-limit).",
                ),
                CgroupPlace::Own | CgroupPlace::Ancestor => {
                    set(f, "N", directory, "pids.max")?;
                    write!(
                        f,
                        "\n  or, if systemd manages it, systemctl set-property {} TasksMax=N\n  \
                         (for every user: TasksMax= of user-.slice; containers: --pids-limit, kubelet podPidsLimit).",
                        Unit(directory)
                    )
                }
            },
            Cause::KernelMemory {
                directory, version, ..
            } => match version {
                1 => {
                    set(f, "BYTES", directory, "memory.limit_in_bytes")?;
                    f.write_str(" (containers: --memory),\n  or free memory in that cgroup.")
                }
                2 => {
                    set(f, "BYTES", directory, "memory.max")?;
                    write!(
                        f,
                        "\n  or, if systemd manages it, systemctl set-property {} MemoryMax=BYTES (containers: --memory);\n  \
                         or free memory in that cgroup.",
                        Unit(directory)
                    )
                }
                _ => f.write_str(
                    "Free memory; dmesg tells of failed allocations. Where a memory cgroup is full, raise its limit:\n  \
                     memory.max or memory.limit_in_bytes (systemd: MemoryMax=, containers: --memory).",
                ),
            },
            Cause::AddressSpace { .. } => f.write_str(
                "Raise the limit (ulimit -v KIB, prlimit --pid PID --as=BYTES:BYTES, LimitAS=BYTES in the systemd unit, the\n  \
                 item as in /etc/security/limits.conf), or use smaller stacks.",
            ),
            Cause::DataSegment { .. } => f.write_str(
                "Raise the limit (ulimit -d KIB, prlimit --pid PID --data=BYTES:BYTES, LimitDATA=BYTES in the systemd unit,\n  \
                 data in /etc/security/limits.conf), or use smaller stacks.",
            ),
            Cause::MapCount { .. } => write!(
                f,
                "sysctl vm.max_map_count=N{KEEP}, or have fewer mappings:\n  from Linux 6.13 on guards need none.",
            ),
            Cause::Overcommit { mode, .. } => match mode {
                Some(2) => write!(
                    f,
                    "sysctl vm.overcommit_ratio=PERCENT or vm.overcommit_kbytes=KIB{KEEP}, add swap,\n  \
                     sysctl vm.overcommit_memory=0, or use smaller stacks: in mode 2 every stack counts with its full size.",
                ),
                Some(_) => f.write_str(
                    "Use a smaller stack: one mapping may not exceed memory and swap together; or sysctl vm.overcommit_memory=1.",
                ),
                None => f.write_str(
                    "Use smaller stacks, or sysctl vm.overcommit_memory=1; where /proc/sys/vm/overcommit_memory is 2, also raise\n  \
                     vm.overcommit_ratio or vm.overcommit_kbytes, or add swap.",
                ),
            },
            Cause::LockedMemory { .. } => f.write_str(
                "Raise the limit (ulimit -l KIB, prlimit --pid PID --memlock=BYTES:BYTES, LimitMEMLOCK=BYTES in the systemd\n  \
                 unit, memlock in /etc/security/limits.conf, docker run --ulimit memlock=BYTES), grant CAP_IPC_LOCK, or lock\n  \
                 less: neither lock_stack nor mlockall(MCL_FUTURE), under which every stack is locked with its full size.",
            ),
            Cause::AddressSpaceExhausted { .. } => f.write_str(
                "Unmap something (/proc/PID/maps lists what is mapped), or use smaller stacks: addresses are limited by the\n  \
                 processor (128 TiB with four levels of page tables), and no setting gives more.",
            ),
            Cause::NotPermitted { .. } => f.write_str(
                "Grant CAP_SYS_NICE, or raise RLIMIT_RTPRIO (LimitRTPRIO= in the systemd unit); in a v1 cpu cgroup also\n  \
                 cpu.rt_runtime_us; for a cgroup, write access to its cgroup.procs.",
            ),
            Cause::OutsideCpuset { .. } => {
                f.write_str("Choose CPUs of the cpuset, or widen cpuset.cpus (systemd: AllowedCPUs=).")
            }
            Cause::Unknown { .. } => f.write_str("Nothing can be advised with certainty."),
        }
    }
}

impl fmt::Display for Cause {
    /// One line: the limit, how full it is, and where it is set.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Cause::InvalidAttribute { what, value } => write!(f, "invalid {what}: {value}"),
            Cause::UnsupportedRuntime { what } => write!(f, "unsupported C library: {what}"),
            Cause::Seccomp { call, .. } => {
                write!(f, "a system-call filter (seccomp) answers {call}")
            }
            Cause::UserProcesses { uid, soft, .. } => {
                f.write_str("RLIMIT_NPROC")?;
                if let Some(uid) = uid {
                    write!(f, " of user {uid}")?;
                }
                write!(f, " (soft limit {})", Value(*soft))
            }
            Cause::ThreadsMax { tasks, maximum } => write!(
                f,
                "kernel.threads-max: {} of {} tasks",
                Value(*tasks),
                Value(*maximum)
            ),
            Cause::DeadlineScheduling { .. } => {
                f.write_str("the calling thread is under SCHED_DEADLINE without reset-on-fork")
            }
            Cause::SiblingExec { .. } => {
                f.write_str("another thread of this process is inside execve")
            }
            Cause::PidNumbers { level, pid_max, .. } => match level {
                PidLevel::Own => write!(
                    f,
                    "no pid number left in this pid namespace (kernel.pid_max {})",
                    Value(*pid_max)
                ),
                PidLevel::Ancestor => write!(
                    f,
                    "no pid number left in a pid namespace around this one (this one's kernel.pid_max {} is not exhausted)",
                    Value(*pid_max)
                ),
                PidLevel::OwnOrAncestor => write!(
                    f,
                    "no pid number left in this pid namespace or one around it (kernel.pid_max {} here)",
                    Value(*pid_max)
                ),
            },
            Cause::DyingPidNamespace { .. } => {
                f.write_str("the pid namespace has lost its init process")
            }
            Cause::UnsharedPidNamespace { .. } => f.write_str(
                "the process has unshared its pid namespace; threads cannot enter the new one",
            ),
            Cause::PidsCgroup {
                directory,
                place,
                current,
                maximum,
                ..
            } => match place {
                CgroupPlace::Hidden => {
                    f.write_str("pids.max of an ancestor outside this cgroup namespace")
                }
                CgroupPlace::Target => {
                    f.write_str("pids.max of the cgroup to enter or an ancestor of it")
                }
                CgroupPlace::Unclear => {
                    f.write_str("pids.max of this thread's cgroup or an ancestor")
                }
                CgroupPlace::Own | CgroupPlace::Ancestor => write!(
                    f,
                    "{directory}/pids.max: {} of {} tasks",
                    Value(*current),
                    Value(*maximum)
                ),
            },
            Cause::KernelMemory {
                directory,
                version,
                usage,
                limit,
                ..
            } => match version {
                0 => f.write_str("the kernel had no memory for the new task"),
                _ => write!(
                    f,
                    "memory cgroup {directory}: {} of {} bytes",
                    Value(*usage),
                    Value(*limit)
                ),
            },
            Cause::AddressSpace {
                requested,
                in_use,
                limit,
            } => full(f, "RLIMIT_AS", "in use", *requested, *in_use, *limit),
            Cause::DataSegment {
                requested,
                in_use,
                limit,
            } => full(f, "RLIMIT_DATA", "in use", *requested, *in_use, *limit),
            Cause::MapCount { maximum, split } => match maximum {
                Some(maximum) if *split => {
                    write!(f, "vm.max_map_count: already {maximum} mappings")
                }
                Some(maximum) => write!(f, "vm.max_map_count: more than {maximum} mappings"),
                None => f.write_str("vm.max_map_count (not readable) is reached"),
            },
            Cause::Overcommit {
                mode,
                requested,
                in_use,
                limit,
            } => match mode {
                Some(2) => full(
                    f,
                    "vm.overcommit_memory=2",
                    "committed",
                    *requested,
                    *in_use,
                    *limit,
                ),
                Some(mode) => write!(
                    f,
                    "vm.overcommit_memory={mode}: {requested} bytes requested, limit {}",
                    Value(*limit)
                ),
                None => write!(
                    f,
                    "vm.overcommit_memory (not readable): {requested} bytes requested"
                ),
            },
            Cause::LockedMemory {
                requested,
                in_use,
                limit,
            } => full(f, "RLIMIT_MEMLOCK", "locked", *requested, *in_use, *limit),
            Cause::AddressSpaceExhausted { requested, .. } => {
                write!(f, "no {requested} bytes of free addresses in one piece")
            }
            Cause::NotPermitted { what, .. } => write!(f, "not permitted: {what}"),
            Cause::OutsideCpuset { .. } => {
                f.write_str("none of the CPUs asked for is in the cpuset")
            }
            Cause::Unknown { oracle, .. } => match oracle.silence() {
                Some(why) => write!(f, "unknown: {why}"),
                None => f.write_str("unknown"),
            },
        }
    }
}

/// A limit of bytes against a request, in one line.
fn full(
    f: &mut fmt::Formatter<'_>,
    limit_name: &str,
    used_how: &str,
    requested: u64,
    in_use: Option<u64>,
    limit: Option<u64>,
) -> fmt::Result {
    write!(f, "{limit_name}: ")?;
    match in_use {
        Some(in_use) => write!(
            f,
            "{in_use} bytes {used_how} and {requested} requested, of "
        )?,
        None => write!(f, "{requested} bytes requested, of ")?,
    }
    match limit {
        Some(limit) => write!(f, "{}", Value(Some(limit))),
        None => f.write_str("a limit that is not readable"),
    }
}

/// How a sysctl is kept: the same words everywhere.
const KEEP: &str = " (and /etc/sysctl.d/*.conf to keep it)";

/// The command that sets a file of a cgroup, with its name quoted for a shell where that is needed; a name that
/// was cut would lead elsewhere.
fn set(f: &mut fmt::Formatter<'_>, value: &str, directory: &InlinePath, file: &str) -> fmt::Result {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-:@+=,".contains(byte);
    match directory.to_str() {
        Some(path) if path.bytes().all(|byte| plain(&byte)) => {
            write!(f, "echo {value} > {path}/{file}")
        }
        Some(path) if !path.contains('\'') => write!(f, "echo {value} > '{path}/{file}'"),
        _ => write!(f, "Raise {file} of that cgroup"),
    }
}

/// The systemd unit that a cgroup's directory is named after.
struct Unit<'a>(&'a InlinePath);

impl fmt::Display for Unit<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.0.to_str().and_then(|path| path.rsplit('/').next());
        let unit = name.filter(|name| {
            [".service", ".scope", ".slice"]
                .iter()
                .any(|kind| name.ends_with(kind))
        });
        f.write_str(unit.unwrap_or("UNIT"))
    }
}

/// Several lines on a cause: what it is, how sure, the evidence, what to change.
pub(crate) struct Explanation<'a> {
    pub(crate) cause: &'a Cause,
    pub(crate) certainty: Certainty,
    pub(crate) alternatives: Causes,
    /// Why the kernel could not be asked what refused, where that is so.
    pub(crate) silence: Option<&'static str>,
    pub(crate) transient: bool,
}

impl fmt::Display for Explanation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "cause: {} ({})", self.cause, self.certainty)?;
        if !self.alternatives.is_empty() {
            writeln!(f, "could also be: {}", self.alternatives)?;
        }
        // An unknown cause has it in its line.
        if let (Certainty::Inferred, Some(why)) = (self.certainty, self.silence) {
            writeln!(f, "not proven: {why}")?;
        }
        writeln!(f, "evidence:")?;
        self.cause.evidence(f, self.alternatives)?;
        f.write_str("what to change:\n  ")?;
        self.cause.remedy(f)?;
        if self.transient && self.cause.kind() != CauseKind::SiblingExec {
            f.write_str(
                "\n  Retrying for some milliseconds is right: what stood in the way may be gone already (threads that have\n  \
                 ended count until the kernel has reaped them).",
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
