//! What refuses a mapping: limits of the process's memory, its mappings, the machine's overcommit policy.

use std::fmt::{Formatter, Result};

use super::show::{Evidence, KEEP, Size, Value, line};

/// A limit of bytes against a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fill {
    pub(crate) requested: u64,
    pub(crate) in_use: Option<u64>,
    pub(crate) limit: Option<u64>,
}

impl Fill {
    fn line(&self, f: &mut Formatter<'_>, limit_name: &str, used_how: &str) -> Result {
        write!(f, "{limit_name}: ")?;
        let requested = self.requested;
        match self.in_use {
            Some(in_use) => write!(f, "{in_use} bytes {used_how} and {requested}")?,
            None => write!(f, "{requested} bytes")?,
        }
        f.write_str(" requested, of ")?;
        match self.limit {
            None => f.write_str("a limit that is not readable"),
            limit => write!(f, "{}", Value(limit)),
        }
    }
}

/// A resource limit of the process on bytes that it maps.
macro_rules! limit_of_bytes {
    ($(#[$doc:meta])* $name:ident: $limit:literal, $field:literal, $used:literal, $remedy:expr) => {
        $(#[$doc])*
        #[non_exhaustive]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub struct $name {
            /// Requested bytes.
            pub requested: u64,
            #[doc = concat!($field, ".")]
            pub in_use: Option<u64>,
            /// Soft limit.
            pub limit: Option<u64>,
        }

        impl From<Fill> for $name {
            fn from(Fill { requested, in_use, limit }: Fill) -> $name {
                $name { requested, in_use, limit }
            }
        }

        impl Evidence for $name {
            fn line(&self, f: &mut Formatter<'_>) -> Result {
                let $name { requested, in_use, limit } = *self;
                Fill { requested, in_use, limit }.line(f, $limit, $used)
            }

            fn report(&self, f: &mut Formatter<'_>) -> Result {
                line(f, "requested", Size(Some(self.requested)))?;
                line(f, concat!("/proc/thread-self/status, ", $field), Size(self.in_use))?;
                line(f, $limit, Size(self.limit))
            }

            fn remedy(&self, f: &mut Formatter<'_>) -> Result {
                f.write_str($remedy)
            }

            #[cfg(test)]
            fn samples() -> Vec<Self> {
                let of = |in_use, limit| $name { requested: 8 << 20, in_use, limit };
                vec![
                    of(Some(100 << 20), Some(104 << 20)),
                    of(None, Some(u64::MAX)),
                    of(None, None),
                ]
            }
        }
    };
}

limit_of_bytes!(
    /// RLIMIT_AS.
    AddressSpace: "RLIMIT_AS", "VmSize", "in use",
    "Raise the limit (ulimit -v KIB, prlimit --pid PID --as=BYTES:BYTES, LimitAS=BYTES in the systemd unit, the\n  \
     item as in /etc/security/limits.conf), or use smaller stacks."
);

limit_of_bytes!(
    /// RLIMIT_DATA.
    DataSegment: "RLIMIT_DATA", "VmData", "in use",
    "Raise the limit (ulimit -d KIB, prlimit --pid PID --data=BYTES:BYTES, LimitDATA=BYTES in the systemd unit,\n  \
     data in /etc/security/limits.conf), or use smaller stacks."
);

limit_of_bytes!(
    /// RLIMIT_MEMLOCK: mlockall(MCL_FUTURE) is in force, or the stack was to be locked.
    LockedMemory: "RLIMIT_MEMLOCK", "VmLck", "locked",
    "Raise the limit (ulimit -l KIB, prlimit --pid PID --memlock=BYTES:BYTES, LimitMEMLOCK=BYTES in the systemd\n  \
     unit, memlock in /etc/security/limits.conf, docker run --ulimit memlock=BYTES), grant CAP_IPC_LOCK, or lock\n  \
     less: neither lock_stack nor mlockall(MCL_FUTURE), under which every stack is locked with its full size."
);

/// vm.max_map_count: the process has as many mappings as it may.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MapCount {
    /// /proc/sys/vm/max_map_count.
    pub maximum: Option<u64>,
    /// Whether it was the split for a guard that failed (at the maximum) and not the mapping (above it).
    pub split: bool,
}

impl Evidence for MapCount {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        match self.maximum {
            Some(maximum) if self.split => {
                write!(f, "vm.max_map_count: already {maximum} mappings")
            }
            Some(maximum) => write!(f, "vm.max_map_count: more than {maximum} mappings"),
            None => f.write_str("vm.max_map_count (not readable) is reached"),
        }
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        line(f, "/proc/sys/vm/max_map_count", Value(self.maximum))?;
        let many = match self.split {
            true => "exactly that many; a guard splits one",
            false => "more than that",
        };
        line(f, "mappings of this process", many)
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        write!(
            f,
            "sysctl vm.max_map_count=N{KEEP}, or have fewer mappings:\n  from Linux 6.13 on guards need none.",
        )
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        let of = |maximum, split| MapCount { maximum, split };
        vec![
            of(Some(65530), true),
            of(Some(65530), false),
            of(None, false),
        ]
    }
}

/// The machine's overcommit policy (vm.overcommit_memory).
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Overcommit {
    /// 0: one mapping may not exceed memory and swap. 2: a strict limit for all processes together.
    pub mode: Option<u64>,
    /// Requested bytes.
    pub requested: u64,
    /// Mode 2: Committed_AS. Mode 0: 0.
    pub in_use: Option<u64>,
    /// Mode 2: CommitLimit. Mode 0: memory and swap of the machine.
    pub limit: Option<u64>,
    /// Mode 2: what of it is kept back from this process, by vm.admin_reserve_kbytes and vm.user_reserve_kbytes.
    pub reserved: Option<u64>,
}

impl Evidence for Overcommit {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        let Overcommit {
            requested,
            in_use,
            limit,
            ..
        } = *self;
        let fill = Fill {
            requested,
            in_use,
            limit,
        };
        match self.mode {
            Some(2) => fill.line(f, "vm.overcommit_memory=2", "committed"),
            Some(mode) => write!(
                f,
                "vm.overcommit_memory={mode}: {requested} bytes requested, limit {}",
                Value(limit)
            ),
            None => write!(
                f,
                "vm.overcommit_memory (not readable): {requested} bytes requested"
            ),
        }
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        line(f, "requested", Size(Some(self.requested)))?;
        line(f, "/proc/sys/vm/overcommit_memory", Value(self.mode))?;
        if self.mode == Some(2) {
            line(f, "/proc/meminfo, Committed_AS", Size(self.in_use))?;
            line(f, "/proc/meminfo, CommitLimit", Size(self.limit))?;
            line(f, "of these kept back in reserve", Size(self.reserved))
        } else {
            line(f, "/proc/meminfo, MemTotal and SwapTotal", Size(self.limit))
        }
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        match self.mode {
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
        }
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        let of = |mode, in_use, limit| Overcommit {
            mode,
            requested: 8 << 20,
            in_use,
            limit,
            reserved: mode.map(|mode| mode << 20),
        };
        vec![
            of(Some(2), Some(100 << 20), Some(104 << 20)),
            of(Some(0), Some(0), Some(104 << 20)),
            of(None, None, None),
        ]
    }
}

/// No range of free addresses is long enough.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressSpaceExhausted {
    /// Requested bytes.
    pub requested: u64,
    /// VmSize.
    pub in_use: Option<u64>,
}

impl Evidence for AddressSpaceExhausted {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        let requested = self.requested;
        write!(f, "no {requested} bytes of free addresses in one piece")
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        line(f, "requested", Size(Some(self.requested)))?;
        line(f, "/proc/thread-self/status, VmSize", Size(self.in_use))
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(
            "Unmap something (/proc/PID/maps lists what is mapped), or use smaller stacks: addresses are limited by the\n  \
             processor (128 TiB with four levels of page tables), and no setting gives more.",
        )
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        vec![AddressSpaceExhausted {
            requested: 8 << 20,
            in_use: Some(100 << 20),
        }]
    }
}
