//! A task's namespaces and its scheduling.

use std::ffi::CStr;

use crate::errno::Errno;
use nix::sys::stat::stat;

use super::file;
use super::parse::number;
use super::status::Calls;

/// Inode of the initial user namespace, fixed by the kernel (`PROC_USER_INIT_INO`).
const INITIAL_USER_NAMESPACE: u64 = 0xEFFF_FFFD;
/// Inode of the initial pid namespace, fixed by the kernel (`PROC_PID_INIT_INO`).
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// The pid namespace of the calling thread.
pub(crate) const OWN_PID_NAMESPACE: &CStr = c"/proc/thread-self/ns/pid";
/// The one that the process has unshared or entered for its children.
pub(crate) const PID_NAMESPACE_FOR_CHILDREN: &CStr = c"/proc/thread-self/ns/pid_for_children";

/// The time namespace of the calling thread; since Linux 5.6.
pub(crate) const OWN_TIME_NAMESPACE: &CStr = c"/proc/thread-self/ns/time";
/// The one that the process has unshared for its children.
pub(crate) const TIME_NAMESPACE_FOR_CHILDREN: &CStr = c"/proc/thread-self/ns/time_for_children";

/// The inode that identifies a namespace.
pub(crate) fn namespace(path: &CStr, calls: Calls) -> Result<u64, Errno> {
    match calls {
        Calls::Any => stat(path).map(|status| status.st_ino).map_err(Errno::of),
        Calls::FilesOnly => {
            // The same number by reading alone; since Linux 5.14.
            file::described(&file::open(path)?, b"ino:").ok_or(Errno::ENODATA)
        }
    }
}

pub(crate) fn in_initial_user_namespace(calls: Calls) -> Option<bool> {
    is_initial_user_namespace(c"/proc/thread-self/ns/user", calls)
}

pub(crate) fn is_initial_user_namespace(path: &CStr, calls: Calls) -> Option<bool> {
    let inode = namespace(path, calls).ok()?;
    Some(inode == INITIAL_USER_NAMESPACE)
}

pub(crate) fn in_initial_pid_namespace(calls: Calls) -> Option<bool> {
    let inode = namespace(OWN_PID_NAMESPACE, calls).ok()?;
    Some(inode == INITIAL_PID_NAMESPACE)
}

/// The calling thread's scheduling policy by reading alone; its reset-on-fork flag is not shown there.
pub(crate) fn scheduling_policy() -> Option<u32> {
    file::first(c"/proc/thread-self/stat", parse_policy)
}

/// A field of /proc/PID/stat behind the second.
fn field(stat: &[u8], number: usize) -> Option<&[u8]> {
    // The command's name stands in parentheses and may hold anything; field 3 follows the last one.
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = stat.get(end + 2..)?;
    rest.split(|byte| *byte == b' ').nth(number.checked_sub(3)?)
}

/// The numbers of the process group and of the session, of /proc/PID/stat.
pub(crate) fn group_and_session(stat: &[u8]) -> [Option<u64>; 2] {
    [5, 6].map(|at| number(field(stat, at)?))
}

/// Field 41 of /proc/PID/stat.
pub(crate) fn parse_policy(stat: &[u8]) -> Option<u32> {
    u32::try_from(number(field(stat, 41)?)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_behind_any_name() {
        let stat = b"4242 (a) R 1 (x) R 1 4242 4242 34816 4242 4194304 97 0 0 0 0 0 0 0 -7 0 1 0 291042 2789376 \
                     384 18446744073709551615 1 1 0 0 0 0 0 0 65536 0 0 0 17 1 6 6 0 0 0 0 0 0 0 0 0 0 0";
        // Field 40 is the real-time priority.
        let with_name = |name: &str| {
            let tail = &stat[b"4242 (a) R 1 (x)".len()..];
            [b"4242 (", name.as_bytes(), b")", tail].concat()
        };
        for name in ["cat", "a) R 1 (x", "", ") ) )"] {
            assert_eq!(parse_policy(&with_name(name)), Some(6), "{name}");
            let numbers = group_and_session(&with_name(name));
            assert_eq!(numbers, [Some(4242), Some(4242)], "{name}");
        }
        assert_eq!(parse_policy(b"4242 (cat) R 1 4242"), None);
        assert_eq!(parse_policy(b"4242 (cat)"), None);
        assert_eq!(scheduling_policy(), Some(0));
    }

    #[test]
    fn a_namespace_is_the_same_by_both_ways() {
        let by_call = namespace(OWN_PID_NAMESPACE, Calls::Any);
        let by_file = namespace(OWN_PID_NAMESPACE, Calls::FilesOnly);
        assert!(by_call.is_ok());
        assert!(by_file == by_call || by_file == Err(Errno::ENODATA));
        assert_eq!(
            namespace(c"/proc/thread-self/ns/none", Calls::Any),
            Err(Errno::ENOENT)
        );
    }
}
