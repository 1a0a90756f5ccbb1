//! Pid numbers and the namespaces that give them out.

use std::fmt::{Formatter, Result};

use super::show::{Evidence, KEEP, Value, line};

/// Which level of nested pid namespaces has no number left.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PidLevel {
    /// The namespace of this process.
    Own,
    /// A namespace around it, whose limit cannot be read from inside.
    Ancestor,
    /// One of them; which is not known.
    OwnOrAncestor,
}

/// No pid number is left at some level of pid namespaces.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PidNumbers {
    /// Which level.
    pub level: PidLevel,
    /// /proc/sys/kernel/pid_max as this process reads it: of its own namespace since Linux 6.14.
    pub pid_max: Option<u64>,
    /// Numbers of the own namespace that were probed.
    pub sampled: u32,
    /// How many of them were free.
    pub free: u32,
    /// Whether this is the initial pid namespace, which has no level around it.
    pub initial_namespace: Option<bool>,
}

impl PidNumbers {
    pub(crate) const UNREAD: PidNumbers = PidNumbers {
        level: PidLevel::OwnOrAncestor,
        pid_max: None,
        sampled: 0,
        free: 0,
        initial_namespace: None,
    };
}

impl Evidence for PidNumbers {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        let pid_max = Value(self.pid_max);
        f.write_str("no pid number left in ")?;
        match self.level {
            PidLevel::Own => write!(f, "this pid namespace (kernel.pid_max {pid_max})"),
            PidLevel::Ancestor => write!(
                f,
                "a pid namespace around this one (this one's kernel.pid_max {pid_max} is not exhausted)",
            ),
            PidLevel::OwnOrAncestor => write!(
                f,
                "this pid namespace or one around it (kernel.pid_max {pid_max} here)",
            ),
        }
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        let level = match self.level {
            PidLevel::Own => "the pid namespace of this process",
            PidLevel::Ancestor => "a pid namespace around that of this process",
            PidLevel::OwnOrAncestor => "the pid namespace of this process or one around it",
        };
        line(f, "no number left in", level)?;
        line(f, "/proc/sys/kernel/pid_max", Value(self.pid_max))?;
        if self.sampled > 0 {
            line(f, "numbers of the own namespace looked at", self.sampled)?;
            line(f, "of these free", self.free)?;
        }
        if self.initial_namespace == Some(true) {
            f.write_str("  This is the initial pid namespace.\n")?;
        }
        Ok(())
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(match self.level {
            PidLevel::Own => "sysctl kernel.pid_max=N inside this pid namespace",
            PidLevel::Ancestor => {
                "sysctl kernel.pid_max=N in the pid namespace around this one: on the host or in the outer container"
            }
            PidLevel::OwnOrAncestor => {
                "sysctl kernel.pid_max=N, in this pid namespace and in those around it"
            }
        })?;
        write!(
            f,
            "\n  (N up to 4194304){KEEP}; or end tasks there. Zombies hold numbers, too: their parents must\n  \
             wait for them.",
        )
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        [
            (PidLevel::Own, 256, Some(true)),
            (PidLevel::Ancestor, 256, Some(false)),
            (PidLevel::OwnOrAncestor, 0, None),
        ]
        .into_iter()
        .map(|(level, sampled, initial_namespace)| PidNumbers {
            level,
            pid_max: Some(32768),
            sampled,
            free: 3,
            initial_namespace,
        })
        .collect()
    }
}

/// The pid namespace has lost its init process and takes no new task.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DyingPidNamespace {
    /// Inode of the namespace: /proc/thread-self/ns/pid_for_children.
    pub namespace: Option<u64>,
}

impl Evidence for DyingPidNamespace {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str("the pid namespace has lost its init process")
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        line(
            f,
            "/proc/thread-self/ns/pid_for_children",
            Value(self.namespace),
        )
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(
            "Nothing from inside: the namespace's init has ended and every process in it is being killed.\n  \
             Keep the first process of the namespace (the container's main process) alive while threads are needed. After\n  \
             unshare(CLONE_NEWPID) that is the first child: unshare --pid --fork.",
        )
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        let namespace = Some(4026532000);
        vec![DyingPidNamespace { namespace }]
    }
}

/// The process has unshared its pid namespace: only a new process can enter that, no thread.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UnsharedPidNamespace {
    /// Inode of /proc/thread-self/ns/pid.
    pub own: Option<u64>,
    /// Inode of /proc/thread-self/ns/pid_for_children; up to Linux 6.18 none while the new namespace is empty.
    pub for_children: Option<u64>,
}

impl Evidence for UnsharedPidNamespace {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str("the process has unshared its pid namespace; threads cannot enter the new one")
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        const CHILDREN: &str = "/proc/thread-self/ns/pid_for_children";
        line(f, "/proc/thread-self/ns/pid", Value(self.own))?;
        match self.for_children {
            Some(_) => line(f, CHILDREN, Value(self.for_children)),
            None => line(f, CHILDREN, "a new namespace without any process"),
        }
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(
            "Start threads before unshare(CLONE_NEWPID) or setns, or fork after it and start them in the child.",
        )
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        let own = Some(4026531836);
        [Some(4026532000), None]
            .map(|for_children| UnsharedPidNamespace { own, for_children })
            .into()
    }
}

/// The process has unshared its time namespace, which threads cannot enter: Linux 5.6 to 5.19 refuse them.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UnsharedTimeNamespace {
    /// Inode of /proc/thread-self/ns/time.
    pub own: Option<u64>,
    /// Inode of /proc/thread-self/ns/time_for_children.
    pub for_children: Option<u64>,
}

impl Evidence for UnsharedTimeNamespace {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str("the process has unshared its time namespace; threads cannot enter the new one")
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        const CHILDREN: &str = "/proc/thread-self/ns/time_for_children";
        line(f, "/proc/thread-self/ns/time", Value(self.own))?;
        line(f, CHILDREN, Value(self.for_children))
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(
            "Start threads before unshare(CLONE_NEWTIME), or fork after it and start them in the child.",
        )
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        vec![UnsharedTimeNamespace {
            own: Some(4026531834),
            for_children: Some(4026532000),
        }]
    }
}
