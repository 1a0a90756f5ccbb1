//! Memory of the kernel's own.

use std::fmt::{Formatter, Result};

use crate::errno::Errno;

use super::show::{Evidence, Size, UnitOf, Value, line, set};
use crate::mem::text::InlinePath;

/// The kernel had no memory for the new task: mostly the memory cgroup.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KernelMemory {
    /// Directory of the memory cgroup whose failure counter rose, or else that has no room; empty if there is none.
    pub directory: InlinePath,
    /// 1, 2, or 0 when no cgroup is named.
    pub version: u8,
    /// memory.current or memory.usage_in_bytes.
    pub usage: Option<u64>,
    /// memory.max or memory.limit_in_bytes.
    pub limit: Option<u64>,
    /// Whether both are of memory and swap together: those of memory.memsw.*.
    pub swap: bool,
    /// How far the counter of failed charges rose over a refused probe.
    pub failures: Option<u64>,
    /// Why the files that could name a cgroup were not read: a kernel without memory opens none.
    pub unread: Option<Errno>,
}

impl KernelMemory {
    pub(crate) const NO_CGROUP: KernelMemory = KernelMemory {
        directory: InlinePath::EMPTY,
        version: 0,
        usage: None,
        limit: None,
        swap: false,
        failures: None,
        unread: None,
    };
}

impl Evidence for KernelMemory {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        if self.version == 0 {
            return f.write_str("the kernel had no memory for the new task");
        }
        let (directory, usage, limit) = (self.directory, Value(self.usage), Value(self.limit));
        write!(f, "memory cgroup {directory}: {usage} of {limit} bytes")
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        if let Some(errno) = self.unread {
            let why = errno.meaning();
            return writeln!(
                f,
                "  The files that could name a memory cgroup cannot be read: {errno:?} ({why}).",
            );
        }
        if self.directory.is_empty() {
            return f.write_str("  No memory cgroup could be read that counted a failed charge.\n");
        }
        line(f, "directory", self.directory)?;
        line(f, "cgroup version", self.version)?;
        let (in_use, limit) = match self.swap {
            true => ("memory and swap in use", "limit of memory and swap"),
            false => ("memory in use", "memory limit"),
        };
        line(f, in_use, Size(self.usage))?;
        line(f, limit, Size(self.limit))?;
        match self.failures {
            Some(failures) => line(f, "failed charges during a refused probe", failures),
            None => Ok(()),
        }
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        match self.version {
            1 if self.swap => {
                set(f, "BYTES", &self.directory, "memory.memsw.limit_in_bytes")?;
                f.write_str(" (containers: --memory-swap),\n  or free memory in that cgroup.")
            }
            1 => {
                set(f, "BYTES", &self.directory, "memory.limit_in_bytes")?;
                f.write_str(" (containers: --memory),\n  or free memory in that cgroup.")
            }
            2 => {
                set(f, "BYTES", &self.directory, "memory.max")?;
                write!(
                    f,
                    "\n  or, if systemd manages it, systemctl set-property {} MemoryMax=BYTES (containers: --memory);\n  \
                     or free memory in that cgroup.",
                    UnitOf(&self.directory)
                )
            }
            _ => f.write_str(
                "Free memory; dmesg shows failed allocations. Where a memory cgroup is full, raise its limit:\n  \
                 memory.max or memory.limit_in_bytes (systemd: MemoryMax=, containers: --memory).",
            ),
        }
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        let of = |version, directory| KernelMemory {
            directory,
            version,
            usage: Some(66_000_000),
            limit: Some(67_108_864),
            swap: false,
            failures: Some(2),
            unread: None,
        };
        vec![
            of(1, InlinePath::new(b"/sys/fs/cgroup/memory/vm")),
            KernelMemory {
                swap: true,
                failures: None,
                ..of(1, InlinePath::new(b"/sys/fs/cgroup/memory/vm"))
            },
            of(1, super::show::cut_path()),
            of(2, InlinePath::new(b"/sys/fs/cgroup/vm.scope")),
            of(2, super::show::cut_path()),
            KernelMemory::NO_CGROUP,
            KernelMemory {
                unread: Some(Errno::new(libc::EMFILE)),
                ..KernelMemory::NO_CGROUP
            },
        ]
    }
}
