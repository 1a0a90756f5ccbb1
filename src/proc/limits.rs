//! Resource limits, by call or from /proc/PID/limits.

use std::ffi::CStr;

use nix::sys::resource::{Resource, getrlimit};

use super::file;
use super::parse::{self, words};
use super::status::Calls;

/// Soft and hard value of a resource limit, the soft one as the kernel enforces it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limit {
    pub(crate) soft: u64,
    pub(crate) hard: u64,
}

/// The limits that thread creation meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Limited {
    Processes,
    AddressSpace,
    Data,
    LockedMemory,
    RealTimePriority,
    Nice,
}

impl Limited {
    /// Its name in /proc/PID/limits, and for the call.
    fn names(self) -> (&'static [u8], Resource) {
        match self {
            Limited::Processes => (b"Max processes", Resource::RLIMIT_NPROC),
            Limited::AddressSpace => (b"Max address space", Resource::RLIMIT_AS),
            Limited::Data => (b"Max data size", Resource::RLIMIT_DATA),
            Limited::LockedMemory => (b"Max locked memory", Resource::RLIMIT_MEMLOCK),
            Limited::RealTimePriority => (b"Max realtime priority", Resource::RLIMIT_RTPRIO),
            Limited::Nice => (b"Max nice priority", Resource::RLIMIT_NICE),
        }
    }
}

impl Limit {
    /// The calling thread's.
    pub(crate) fn read(limited: Limited, calls: Calls) -> Option<Limit> {
        match calls {
            Calls::Any => {
                let (soft, hard) = getrlimit(limited.names().1).ok()?;
                Some(Limit::enforced(limited, soft, hard))
            }
            Calls::FilesOnly => Limit::read_from(c"/proc/thread-self/limits", limited),
        }
    }

    pub(crate) fn read_from(path: &CStr, limited: Limited) -> Option<Limit> {
        file::first(path, |line| Limit::parse(line, limited))
    }

    pub(crate) fn parse(line: &[u8], limited: Limited) -> Option<Limit> {
        let mut values = words(parse::value(line, limited.names().0)?).map(parse::limit);
        let (soft, hard) = (values.next()??, values.next()??);
        Some(Limit::enforced(limited, soft, hard))
    }

    fn enforced(limited: Limited, soft: u64, hard: u64) -> Limit {
        // The kernel takes a soft limit of 0 on data for the hard one, which valgrind counts on.
        let soft = match limited {
            Limited::Data if soft == 0 => hard,
            _ => soft,
        };
        Limit { soft, hard }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc::parse::UNLIMITED;

    #[test]
    fn lines_of_the_file() {
        let of = |line: &[u8], limited| Limit::parse(line, limited).map(|it| (it.soft, it.hard));
        let line =
            b"Max processes             500                  127235               processes ";
        assert_eq!(of(line, Limited::Processes), Some((500, 127_235)));
        assert_eq!(of(line, Limited::AddressSpace), None);
        let line =
            b"Max address space         8589934592           unlimited            bytes     ";
        assert_eq!(of(line, Limited::AddressSpace), Some((8 << 30, UNLIMITED)));
        let line =
            b"Max locked memory         0                    0                    bytes     ";
        assert_eq!(of(line, Limited::LockedMemory), Some((0, 0)));
        let line =
            b"Max data size             0                    1048576              bytes     ";
        assert_eq!(of(line, Limited::Data), Some((1 << 20, 1 << 20)));
        let line = b"Max realtime priority     0                    0                    ";
        assert_eq!(of(line, Limited::RealTimePriority), Some((0, 0)));
        let line = b"Max data size             ";
        assert_eq!(of(line, Limited::Data), None);
    }

    #[test]
    fn the_file_and_the_call_agree() {
        for limited in [
            Limited::Processes,
            Limited::AddressSpace,
            Limited::Data,
            Limited::LockedMemory,
            Limited::RealTimePriority,
            Limited::Nice,
        ] {
            let called = Limit::read(limited, Calls::Any);
            assert!(called.is_some());
            assert_eq!(Limit::read(limited, Calls::FilesOnly), called);
        }
    }
}
