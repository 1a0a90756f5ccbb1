//! The answers of the kernel to the calls that are made to find out.

use std::fmt;

use crate::errno::Errno;

/// The answer of one system call made to find out.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Answer {
    /// The call was not made.
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

/// The kernel's order of checks, probed with clones that always fail.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
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
    pub(super) const NOTHING: Oracle = Oracle {
        clone3_empty: Answer::NotAsked,
        until_pid_number: Answer::NotAsked,
        until_pid_number_with_fs: Answer::NotAsked,
        until_cgroup: Answer::NotAsked,
        until_thread_pointer: Answer::NotAsked,
        until_flags: Answer::NotAsked,
        repeated: Answer::NotAsked,
    };

    /// Why the answers show nothing, if they do not.
    pub(crate) fn silence(&self) -> Option<&'static str> {
        const ANSWERED: &str = "a filter or a tracer answers clone3 for the kernel, which cannot be asked what refused";
        const OLD: &str = "Linux before 5.7: its clone3 does not know the questions";
        let empty = match self.clone3_empty {
            Answer::NotAsked => self.until_flags,
            answer => answer,
        };
        match (empty, self.until_pid_number) {
            (Answer::NotAsked, _) => None,
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

/// How far mmap gets, probed in the kernel's order of checks.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MemoryOracle {
    /// A page that is in use. EEXIST: the number of mappings is not above its maximum.
    pub number_of_mappings: Answer,
    /// An invalid mapping of the same length. EINVAL: there are enough free addresses.
    pub free_addresses: Answer,
    /// The same length, PROT_NONE.
    pub inaccessible: Answer,
    /// The same length, writable, MAP_NORESERVE.
    pub unreserved: Answer,
    /// An invalid mapping of the same length, locked. EAGAIN or EPERM: RLIMIT_MEMLOCK.
    pub locked: Answer,
    /// The same length, as a stack is mapped.
    pub stack: Answer,
    /// Two guards made by mprotect in a fresh mapping of four pages.
    pub guard: Answer,
}

impl MemoryOracle {
    pub(super) const NOTHING: MemoryOracle = MemoryOracle {
        number_of_mappings: Answer::NotAsked,
        free_addresses: Answer::NotAsked,
        inaccessible: Answer::NotAsked,
        unreserved: Answer::NotAsked,
        locked: Answer::NotAsked,
        stack: Answer::NotAsked,
        guard: Answer::NotAsked,
    };
}

#[cfg(test)]
mod tests {
    use super::Answer::{Granted, NotAsked, Refused};
    use super::*;

    #[test]
    fn a_kernel_that_cannot_be_asked_is_known_as_such() {
        const ANSWERED: Option<&str> = Some("a filter or a tracer answers clone3");
        for (clone3_empty, until_pid_number, why) in [
            (Refused(Errno::EPERM), NotAsked, ANSWERED),
            (Granted, NotAsked, ANSWERED),
            (Refused(Errno::EINVAL), Refused(Errno::EPERM), ANSWERED),
            (
                Refused(Errno::EINVAL),
                Refused(Errno::E2BIG),
                Some("Linux before 5.7"),
            ),
            (Refused(Errno::EINVAL), Refused(Errno::EAGAIN), None),
            (Refused(Errno::EINVAL), Refused(Errno::EINVAL), None),
            (Refused(Errno::EINVAL), NotAsked, None),
            (NotAsked, NotAsked, None),
        ] {
            let oracle = Oracle {
                clone3_empty,
                until_pid_number,
                ..Oracle::default()
            };
            let found = oracle.silence();
            let right = match (found, why) {
                (Some(found), Some(why)) => found.starts_with(why),
                (found, why) => found.is_none() && why.is_none(),
            };
            assert!(right, "{oracle:?}: {found:?}");
        }
    }
}
