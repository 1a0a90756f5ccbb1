//! Whether a system-call filter answered, and not the kernel.

use crate::errno::Errno;

use super::cause::{Causes, Seccomp, Unknown};
use super::verdict::Verdict;
use crate::proc::status::Status;
use crate::step::{CloneCall, StepError};
use crate::sys::{clone::FLAGS, clone_probe as probe};

/// A filter gives an errno that the kernel never gives to that probe.
pub(super) fn diagnose(error: &StepError, status: &Status, seen: &mut Unknown) -> Option<Verdict> {
    let oracle = &mut seen.oracle;
    let answer = match error.call {
        // The kernel's answer to no arguments may be a supervisor's that has no opinion of them.
        CloneCall::Clone3 if status.seccomp != Some(0) && oracle.clone3_empty.is(Errno::EINVAL) => {
            oracle.until_flags = probe::until_clone3_flags().into();
            oracle.until_flags
        }
        CloneCall::Clone3 => oracle.clone3_empty,
        // Unless there is no filter: the probe has flags that the program never used. And only after the
        // clone that reaches furthest has got the refusal's own errno.
        CloneCall::Clone if status.seccomp != Some(0) => {
            oracle.until_thread_pointer = probe::until_thread_pointer(FLAGS, true).into();
            if !oracle.until_thread_pointer.is(error.errno) {
                return None;
            }
            oracle.until_flags = probe::until_flags(FLAGS).into();
            oracle.until_flags
        }
        CloneCall::Clone => return None,
    };
    if !answer.is(error.errno) || answer.is(Errno::EINVAL) {
        return None;
    }
    let cause = Seccomp {
        call: error.call,
        answer,
        mode: status.seccomp,
        filters: status.filters,
    };
    Some(match status.seccomp {
        // No filter is installed, so a tracer or a kernel that is not Linux answered.
        Some(0) => Verdict::UNKNOWN,
        // A kernel without clone3 answers ENOSYS itself, but then clone was refused, not clone3.
        Some(_) if status.tracer.unwrap_or(0) == 0 => Verdict::proven(cause),
        _ => Verdict::inferred(cause, Causes::NONE),
    })
}
