//! Who can answer a clone in the place of the kernel's own checks: a tracer, a system-call filter, a security module.
//!
//! A filter can kill the process for a call that it does not know, and it compares what is in the registers. So under
//! a filter no call is made whose registers differ from those of the refused call in more than an address: clone3's
//! flags lie in memory, clone's in a register. After a fallback to clone, clone3 is not called any more: a filter
//! that answers it with ENOSYS can stand before one that kills for it.

use crate::errno::Errno;

use super::cause::{Answer, Cause, CauseKind, Seccomp, SecurityModule, Tracer, Unknown};
use super::rule::Standing;
use crate::mem::text::InlinePath;
use crate::proc::machine;
use crate::proc::status::{Calls, Status};
use crate::step::{CloneCall, StepError};
use crate::sys::clone_probe::Probe;

/// The kernel, or in tests a model of it.
pub(super) type ProbeClone<'a> = &'a mut dyn FnMut(Probe) -> Result<(), Errno>;

#[derive(Clone, Copy, Debug)]
pub(super) struct Outside {
    pub(super) tracer: Standing,
    pub(super) filter: Standing,
    /// Remote where it is not known whether there is one.
    pub(super) module: Standing,
    /// Whether the kernel answers clone3, and its probes can be made.
    pub(super) clone3: bool,
}

impl Outside {
    pub(super) fn read(
        error: &StepError,
        status: &Status,
        modules: Option<InlinePath>,
        seen: &mut Unknown,
        kernel: ProbeClone<'_>,
    ) -> Outside {
        let answer = ask(error, status.calls(), seen, kernel);
        // The kernel answers this probe with EINVAL and nothing else. What answers it with the refusal's errno has
        // answered the refused call, too.
        let answered = error.errno != Errno::EINVAL && answer.is(error.errno);
        let traced = status.tracer != Some(0);
        let filtered = status.calls() == Calls::FilesOnly;
        Outside {
            tracer: match traced {
                true if answered && !filtered => Standing::Shown,
                traced => Standing::open_if(traced),
            },
            filter: match (filtered && answered, traced) {
                (true, true) => Standing::Signed,
                (true, false) => Standing::Shown,
                (false, _) => Standing::open_if(filtered),
            },
            module: match modules {
                None => Standing::Remote,
                Some(modules) => Standing::open_if(SecurityModule { modules }.can_refuse()),
            },
            clone3: answer.is(Errno::EINVAL),
        }
    }

    /// Whether one of them gave the refusal's errno to a probe.
    pub(super) fn answers(&self) -> bool {
        self.tracer.max(self.filter) >= Standing::Signed
    }

    pub(super) fn standings(&self) -> [Standing; 3] {
        [self.tracer, self.filter, self.module]
    }

    /// Where no check of the kernel's gives the errno.
    pub(super) fn checks(&self) -> [(CauseKind, Standing); 3] {
        [
            (CauseKind::Tracer, self.tracer),
            (CauseKind::Seccomp, self.filter),
            (CauseKind::SecurityModule, self.module),
        ]
    }
}

/// A probe that the kernel always refuses with EINVAL, if there is one that is safe to make.
fn ask(error: &StepError, calls: Calls, seen: &mut Unknown, kernel: ProbeClone<'_>) -> Answer {
    let oracle = &mut seen.oracle;
    match (error.call, calls) {
        (CloneCall::Clone, _) => Answer::NotAsked,
        _ if !error.probes => Answer::NotAsked,
        (CloneCall::Clone3, Calls::Any) => {
            oracle.clone3_empty = kernel(Probe::Clone3Empty).into();
            oracle.clone3_empty
        }
        (CloneCall::Clone3, Calls::FilesOnly) => {
            oracle.until_flags = kernel(Probe::Clone3Flags).into();
            oracle.until_flags
        }
    }
}

/// The evidence of one of them.
pub(super) fn cause(kind: CauseKind, error: &StepError, status: &Status, seen: &Unknown) -> Cause {
    match kind {
        CauseKind::Tracer => Tracer {
            pid: status.tracer,
            answer: seen.oracle.clone3_empty,
        }
        .into(),
        CauseKind::SecurityModule => SecurityModule {
            modules: machine::security_modules().unwrap_or(InlinePath::EMPTY),
        }
        .into(),
        _ => Seccomp {
            call: error.call,
            answer: match seen.oracle.until_flags {
                Answer::NotAsked => Answer::Refused(error.errno),
                answer => answer,
            },
            mode: status.seccomp,
            filters: status.filters,
        }
        .into(),
    }
}
