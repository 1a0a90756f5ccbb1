//! Not the kernel's own answer.

use std::fmt::{Formatter, Result};

use super::oracle::Answer;
use super::show::{Evidence, Value, line};
use crate::step::CloneCall;

/// A system-call filter answered, not the kernel (seccomp(2)).
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Seccomp {
    /// The call the filter answers for.
    pub call: CloneCall,
    /// The filter's answer to a call that no kernel answers so.
    pub answer: Answer,
    /// Field `Seccomp` of /proc/thread-self/status; 2 is filter mode.
    pub mode: Option<u64>,
    /// Field `Seccomp_filters`: number of filters installed.
    pub filters: Option<u64>,
}

impl Evidence for Seccomp {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "a system-call filter (seccomp) answers {}", self.call)
    }

    fn report(&self, f: &mut Formatter<'_>, _: bool) -> Result {
        let what = match self.call {
            CloneCall::Clone3 => {
                "clone3 with no or invalid arguments, which a kernel refuses with EINVAL"
            }
            CloneCall::Clone => "clone with invalid flags, which a kernel refuses with EINVAL",
        };
        line(f, what, self.answer)?;
        line(f, "/proc/thread-self/status, Seccomp", Value(self.mode))?;
        line(
            f,
            "/proc/thread-self/status, Seccomp_filters",
            Value(self.filters),
        )
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        write!(
            f,
            "Allow {} for threads in the filter (Docker: --security-opt seccomp=PROFILE; systemd: SystemCallFilter=).\n  \
             A filter that does not know clone3 should answer ENOSYS to it, not another errno.",
            self.call
        )
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        [CloneCall::Clone3, CloneCall::Clone]
            .into_iter()
            .map(|call| Seccomp {
                call,
                answer: Answer::Refused(crate::errno::Errno::EPERM),
                mode: Some(2),
                filters: Some(1),
            })
            .collect()
    }
}
