//! A cgroup's limit of tasks.

use std::fmt::{Formatter, Result};

use super::show::{Evidence, UnitOf, Value, line, set};
use crate::mem::text::InlinePath;

/// Where the cgroup stands whose limit was hit.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum CgroupPlace {
    /// The cgroup of the calling thread, or the one requested by [`Builder::cgroup`](crate::Builder::cgroup).
    Own,
    /// A cgroup around it; the directory is named.
    Ancestor,
    /// A cgroup around it that is not visible in this cgroup namespace or mount.
    Hidden,
    /// The thread's own or one around it; which of them is not known.
    Unclear,
}

/// pids.max of a cgroup.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PidsCgroup {
    /// Directory of the cgroup whose limit was hit; empty if it is not visible.
    pub directory: InlinePath,
    /// Where it stands.
    pub place: CgroupPlace,
    /// 1 or 2, or 0 where no cgroup is visible.
    pub version: u8,
    /// pids.current, read after the refusal. It may exceed the maximum.
    pub current: Option<u64>,
    /// pids.max.
    pub maximum: Option<u64>,
    /// How far the refusal counter (pids.events or pids.events.local) rose over the repeated refusal.
    pub refusals: Option<u64>,
}

impl Evidence for PidsCgroup {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        match self.place {
            CgroupPlace::Hidden => {
                f.write_str("pids.max of an ancestor outside this cgroup namespace")
            }
            CgroupPlace::Unclear => f.write_str("pids.max of this thread's cgroup or an ancestor"),
            CgroupPlace::Own | CgroupPlace::Ancestor => {
                let (current, maximum) = (Value(self.current), Value(self.maximum));
                let directory = self.directory;
                write!(f, "{directory}/pids.max: {current} of {maximum} tasks")
            }
        }
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        let which = match self.place {
            CgroupPlace::Own => "the cgroup of this thread",
            CgroupPlace::Ancestor => "an ancestor of this thread's cgroup",
            CgroupPlace::Hidden => "an ancestor outside this cgroup namespace",
            CgroupPlace::Unclear => "this thread's cgroup or an ancestor",
        };
        line(f, "cgroup", which)?;
        let visible = !self.directory.is_empty();
        if visible {
            line(f, "directory", self.directory)?;
        }
        if self.version != 0 {
            line(f, "cgroup version", self.version)?;
        }
        if visible {
            line(f, "pids.current", Value(self.current))?;
            line(f, "pids.max", Value(self.maximum))?;
        }
        match self.refusals {
            Some(rise) => line(f, "pids.events rose over a repeated refusal by", rise),
            None => f.write_str("  No counter of refusals was compared over a repetition.\n"),
        }
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        match self.place {
            CgroupPlace::Hidden => f.write_str(
                "Raise pids.max where the cgroup is visible: on the host (docker run --pids-limit, podman --pids-limit,\n  \
                 kubelet podPidsLimit, systemctl set-property UNIT TasksMax=N).",
            ),
            CgroupPlace::Unclear => f.write_str(
                "Raise pids.max of the full one among that cgroup and its ancestors, or its unit's TasksMax=\n  \
                 (systemctl set-property UNIT TasksMax=N, containers: --pids-limit).",
            ),
            CgroupPlace::Own | CgroupPlace::Ancestor => {
                set(f, "N", &self.directory, "pids.max")?;
                write!(
                    f,
                    "\n  or, if systemd manages it, systemctl set-property {} TasksMax=N\n  \
                     (for every user: TasksMax= of user-.slice; containers: --pids-limit, kubelet podPidsLimit).",
                    UnitOf(&self.directory)
                )
            }
        }
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        let path = |path: &str| InlinePath::new(path.as_bytes());
        [
            (
                path("/sys/fs/cgroup/system.slice/qemu.service"),
                CgroupPlace::Own,
            ),
            (path("/sys/fs/cgroup/my group"), CgroupPlace::Ancestor),
            (super::show::cut_path(), CgroupPlace::Own),
            (InlinePath::EMPTY, CgroupPlace::Hidden),
            (InlinePath::EMPTY, CgroupPlace::Unclear),
        ]
        .into_iter()
        .map(|(directory, place)| PidsCgroup {
            directory,
            place,
            version: 2,
            current: Some(101),
            maximum: Some(100),
            refusals: (place != CgroupPlace::Hidden).then_some(1),
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Display;

    struct Advice(PidsCgroup);

    impl Display for Advice {
        fn fmt(&self, f: &mut Formatter<'_>) -> Result {
            self.0.remedy(f)
        }
    }

    /// A command with a name that was cut would change another cgroup's limit.
    #[test]
    fn no_command_has_a_name_that_was_cut() {
        for cause in PidsCgroup::samples() {
            let advice = Advice(cause).to_string();
            let whole = cause.directory.to_str().is_some();
            assert_eq!(advice.contains("echo"), whole, "{advice}");
        }
    }
}
