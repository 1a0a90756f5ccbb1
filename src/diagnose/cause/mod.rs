//! What was found out about a refusal, and how it is reported.
//!
//! A cause is a struct: its fields are the evidence, and `show::Evidence` is its line, its report and its remedy.
//! A name and a title in the list of `causes!` are all that a new one needs besides. Everything is plain `Copy`
//! data: a cause lies in a box made before the clone, and in a static that a debugger reads from a core file.

mod cgroup;
mod filter;
mod kernel_memory;
mod mapping;
mod oracle;
mod pid;
mod request;
mod settings;
mod show;
mod tasks;
mod thread;
mod unknown;

use std::fmt;

pub use cgroup::{CgroupPlace, PidsCgroup};
pub use filter::{Seccomp, SecurityModule, Tracer};
pub use kernel_memory::KernelMemory;
pub(super) use mapping::Fill;
pub use mapping::{
    AddressSpace, AddressSpaceExhausted, DataSegment, LockedMemory, MapCount, Overcommit,
};
pub use oracle::{Answer, MemoryOracle, Oracle};
pub use pid::{
    DyingPidNamespace, PidLevel, PidNumbers, UnsharedPidNamespace, UnsharedTimeNamespace,
};
pub use request::{InvalidAttribute, UnsupportedRuntime};
pub use settings::{
    DeadlineAdmission, EndedEarly, ForeignCgroup, NoCoreScheduling, NotPermitted, OutsideCpuset,
    RealTimeRuntime,
};
use show::Evidence;
pub use tasks::{ThreadsMax, UserProcesses};
pub use thread::{DeadlineScheduling, SiblingExec};
pub use unknown::Unknown;

macro_rules! causes {
    ($($name:ident: $title:literal,)*) => {
        /// Why a step was refused, with the evidence.
        ///
        /// Values that could not be read are `None`; [`u64::MAX`] means unlimited. Sizes are bytes.
        ///
        /// ```
        /// use nptl::Cause;
        /// fn remedy(cause: &Cause) -> String {
        ///     match cause {
        ///         Cause::PidsCgroup(cgroup) => format!("raise pids.max of {}", cgroup.directory),
        ///         Cause::UserProcesses(_) => "raise LimitNPROC".to_owned(),
        ///         _ => "see the report".to_owned(),
        ///     }
        /// }
        /// let error = nptl::Builder::new().stack_size(usize::MAX).spawn(|| ()).unwrap_err();
        /// assert_eq!(remedy(error.cause()), "see the report");
        /// ```
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Cause {
            $(
                #[doc = concat!("See [`", stringify!($name), "`](crate::diagnose::", stringify!($name), ").")]
                $name($name),
            )*
        }

        /// The name of a cause, without its evidence.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum CauseKind {
            $(
                #[doc = concat!("See [`", stringify!($name), "`](crate::diagnose::", stringify!($name), ").")]
                $name,
            )*
        }

        impl CauseKind {
            /// Every kind, in the order of [`Cause`].
            pub const ALL: [CauseKind; [$(CauseKind::$name),*].len()] = [$(CauseKind::$name),*];

            /// What an administrator calls it.
            ///
            /// ```
            /// assert_eq!(nptl::diagnose::CauseKind::AddressSpace.title(), "RLIMIT_AS");
            /// ```
            pub fn title(self) -> &'static str {
                match self {
                    $(CauseKind::$name => $title,)*
                }
            }
        }

        impl Cause {
            /// The name without the evidence.
            ///
            /// ```
            /// use nptl::diagnose::CauseKind;
            /// let refused = nptl::Builder::new().stack_size(usize::MAX).spawn(|| ()).unwrap_err();
            /// assert_eq!(refused.cause().kind(), CauseKind::InvalidAttribute);
            /// ```
            pub fn kind(&self) -> CauseKind {
                match self {
                    $(Cause::$name(_) => CauseKind::$name,)*
                }
            }

            fn evidence(&self) -> &dyn Evidence {
                match self {
                    $(Cause::$name(evidence) => evidence,)*
                }
            }

            #[cfg(test)]
            pub(super) fn samples() -> Vec<Cause> {
                let mut all = Vec::new();
                $(all.extend($name::samples().into_iter().map(Cause::from));)*
                all
            }
        }

        $(
            impl From<$name> for Cause {
                fn from(evidence: $name) -> Cause {
                    Cause::$name(evidence)
                }
            }
        )*
    };
}

// Each with what an administrator calls it.
causes! {
    InvalidAttribute: "invalid attribute",
    UnsupportedRuntime: "unsupported C library",
    Seccomp: "a system-call filter (seccomp)",
    Tracer: "a tracer (ptrace)",
    SecurityModule: "a security module",
    UserProcesses: "RLIMIT_NPROC, the user's number of processes",
    ThreadsMax: "kernel.threads-max",
    DeadlineScheduling: "SCHED_DEADLINE without reset-on-fork",
    SiblingExec: "another thread of this process inside execve",
    PidNumbers: "pid numbers (kernel.pid_max)",
    DyingPidNamespace: "a pid namespace whose init is gone",
    UnsharedPidNamespace: "an unshared pid namespace",
    UnsharedTimeNamespace: "an unshared time namespace",
    PidsCgroup: "pids.max of a cgroup",
    KernelMemory: "kernel memory",
    AddressSpace: "RLIMIT_AS",
    DataSegment: "RLIMIT_DATA",
    MapCount: "vm.max_map_count",
    Overcommit: "the overcommit policy (vm.overcommit_memory)",
    LockedMemory: "RLIMIT_MEMLOCK",
    AddressSpaceExhausted: "no free range of addresses",
    NotPermitted: "a missing privilege",
    OutsideCpuset: "CPUs outside the cpuset",
    RealTimeRuntime: "cpu.rt_runtime_us of a cgroup",
    DeadlineAdmission: "the admission of SCHED_DEADLINE",
    ForeignCgroup: "a cgroup of another domain, or without threaded mode",
    NoCoreScheduling: "no core scheduling",
    EndedEarly: "the new thread ended early",
    Unknown: "unknown",
}

impl Cause {
    pub(super) fn report(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.evidence().report(f)
    }

    pub(super) fn remedy(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.evidence().remedy(f)
    }
}

/// One line: the limit, how full it is, and where it is set.
impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.evidence().line(f)
    }
}

impl fmt::Display for CauseKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.title())
    }
}

/// How sure a cause is.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Certainty {
    /// There is evidence about the refused call that only this check leaves, and nothing can have refused before.
    Proven,
    /// The one that a sign points to, or that is left; what else it could be stands beside it.
    Inferred,
    /// Nothing could be named; all that was read is kept, and what it could be stands beside it.
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

/// A set of causes: what else an inferred refusal could be.
///
/// ```
/// use nptl::diagnose::{CauseKind, Causes};
/// let set: Causes = [CauseKind::SiblingExec, CauseKind::PidNumbers].into_iter().collect();
/// assert!(set.contains(CauseKind::PidNumbers));
/// assert!(!set.contains(CauseKind::Seccomp));
/// assert_eq!(set.iter().count(), 2);
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Causes(u32);

impl Causes {
    pub(crate) const NONE: Causes = Causes(0);

    /// Whether a cause is in the set.
    ///
    /// ```
    /// use nptl::diagnose::{CauseKind, Causes};
    /// let set: Causes = [CauseKind::PidNumbers].into_iter().collect();
    /// assert!(set.contains(CauseKind::PidNumbers));
    /// ```
    pub fn contains(self, kind: CauseKind) -> bool {
        self.0 & (1 << kind as u32) != 0
    }

    /// Whether the set has no element.
    ///
    /// ```
    /// assert!(nptl::diagnose::Causes::default().is_empty());
    /// ```
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The elements, in the order of [`Cause`].
    ///
    /// ```
    /// use nptl::diagnose::{CauseKind, Causes};
    /// let set: Causes = [CauseKind::PidNumbers, CauseKind::Seccomp].into_iter().collect();
    /// assert!(set.iter().eq([CauseKind::Seccomp, CauseKind::PidNumbers]));
    /// ```
    pub fn iter(self) -> CausesIter {
        CausesIter(self)
    }

    /// Whether one of them counts tasks, so that it passes when others have ended.
    pub(crate) fn has_count(self) -> bool {
        use CauseKind::{PidNumbers, PidsCgroup, ThreadsMax, UserProcesses};
        [UserProcesses, ThreadsMax, PidNumbers, PidsCgroup]
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

/// The elements of a set of causes. Made by [`Causes::iter`].
#[derive(Clone, Debug)]
pub struct CausesIter(Causes);

impl Iterator for CausesIter {
    type Item = CauseKind;

    fn next(&mut self) -> Option<CauseKind> {
        let first = CauseKind::ALL
            .into_iter()
            .find(|kind| self.0.contains(*kind))?;
        self.0 = self.0.without(first);
        Some(first)
    }
}

impl IntoIterator for Causes {
    type Item = CauseKind;
    type IntoIter = CausesIter;

    fn into_iter(self) -> CausesIter {
        self.iter()
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
