//! Not the kernel's own checks.

use std::fmt::{Formatter, Result};

use super::oracle::Answer;
use super::show::{Evidence, Value, line};
use crate::mem::text::InlinePath;
use crate::step::CloneCall;

/// A system-call filter answered, not the kernel (seccomp(2)).
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Seccomp {
    /// The call the filter answers for.
    pub call: CloneCall,
    /// The filter's answer: to clone3 with invalid flags, which no kernel answers so, or to the refused call.
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

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        let what = match self.call {
            CloneCall::Clone3 => "clone3 with invalid flags, which a kernel refuses with EINVAL",
            CloneCall::Clone => "the refused call",
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

/// A tracer answered in the kernel's place (ptrace(2)).
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tracer {
    /// Field `TracerPid` of /proc/thread-self/status.
    pub pid: Option<u64>,
    /// The answer to `clone3(NULL, 0)`, which a kernel refuses with EINVAL.
    pub answer: Answer,
}

impl Evidence for Tracer {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "the tracer, process {}", Value(self.pid))
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        line(f, "/proc/thread-self/status, TracerPid", Value(self.pid))?;
        let what = "clone3(NULL, 0), which a kernel refuses with EINVAL";
        line(f, what, self.answer)
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str("Run without the tracer, or without its injected errors (strace --inject, gdb catch syscall).")
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        let answer = Answer::Refused(crate::errno::Errno::EAGAIN);
        [(Some(4242), answer), (None, Answer::NotAsked)]
            .map(|(pid, answer)| Tracer { pid, answer })
            .into()
    }
}

/// A security module refused the task (the kernel's `security_task_alloc`).
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SecurityModule {
    /// /sys/kernel/security/lsm.
    pub modules: InlinePath,
}

impl SecurityModule {
    /// Whether one of them has a say in the creation of tasks. The others only look at files, at ptrace, at modules.
    pub(crate) fn can_refuse(&self) -> bool {
        const WITH_A_SAY: [&[u8]; 4] = [b"bpf", b"selinux", b"apparmor", b"tomoyo"];
        let text = self.modules.as_bytes().trim_ascii();
        let mut names = text.split(|byte| *byte == b',');
        self.modules.is_truncated() || names.any(|name| WITH_A_SAY.contains(&name))
    }
}

impl Evidence for SecurityModule {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "a security module, one of {}", self.modules)
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        line(f, "/sys/kernel/security/lsm", self.modules)?;
        f.write_str(
            "  The kernel refused before pid allocation, and every limit there is excluded.\n",
        )
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(
            "Look for a policy that refuses tasks: BPF programs (bpftool prog list, type lsm), the modules' own logs\n  \
             (dmesg, ausearch -m AVC).",
        )
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        let modules = InlinePath::new(b"lockdown,yama,apparmor,bpf");
        vec![SecurityModule { modules }]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_with_a_say() {
        for (list, can) in [
            ("lockdown,capability,landlock,yama,apparmor,bpf\n", true),
            ("selinux", true),
            ("lockdown,capability,yama,integrity", false),
            ("bpfilter", false),
        ] {
            let modules = InlinePath::new(list.as_bytes());
            assert_eq!(SecurityModule { modules }.can_refuse(), can, "{list}");
        }
    }
}
