//! The oracle: how far a clone gets at this moment.
//!
//! The kernel's `copy_process` checks in a fixed order, and `sys::clone_probe` probes it with clones that always fail
//! at known places. This file only interprets the answers.
//!
//! | question | refused with EAGAIN means | passes with |
//! | --- | --- | --- |
//! | up to the pid number, without CLONE_FS | RLIMIT_NPROC, threads-max or SCHED_DEADLINE | EINVAL |
//! | up to the cgroup, without CLONE_FS | also: no pid number | EBADF |
//! | up to the pid number, with CLONE_FS | also: a sibling is inside execve | EINVAL |
//!
//! Each probe briefly charges the process count, so they are made in this order only as far as needed.

use crate::errno::Errno;

use super::cause::Oracle;
use super::outside::{Outside, ProbeClone};
use crate::proc::status::Calls;
use crate::step::{CloneCall, StepError};
use crate::sys::clone_probe::Probe;

/// The first check that refuses, or the last one that is known to pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reached {
    /// RLIMIT_NPROC, kernel.threads-max or SCHED_DEADLINE refuses.
    ProcessLimits,
    /// One of these, or a sibling inside execve.
    ProcessLimitsOrExec,
    /// A sibling is inside execve.
    SiblingExec,
    /// No pid number.
    PidNumbers,
    /// ENOMEM before the pid number.
    KernelMemory,
    /// ENOMEM at the pid number: the namespace is dying, or no memory for the structure.
    PidMemory,
    /// Everything up to the pid numbers passes: the cgroup, or nothing any more.
    BeyondPidNumbers,
    /// Everything up to the thread pointer passes; later checks could not be probed.
    BeyondThreadPointer,
    /// The answers are not those of the kernel's order.
    Unusable,
}

impl Reached {
    /// Whether it can be that no number is left, and that only the numbers themselves show it.
    pub(super) fn may_be_numbers(self) -> bool {
        use Reached::{BeyondThreadPointer, PidNumbers, Unusable};
        matches!(self, PidNumbers | BeyondThreadPointer | Unusable)
    }

    /// Whether a cgroup can have refused before or after the probe.
    pub(super) fn may_be_cgroup(self) -> bool {
        use Reached::{BeyondPidNumbers, BeyondThreadPointer, SiblingExec, Unusable};
        matches!(
            self,
            SiblingExec | BeyondPidNumbers | BeyondThreadPointer | Unusable
        )
    }
}

/// Probes once, and keeps the answers.
pub(super) fn ask(
    oracle: &mut Oracle,
    error: &StepError,
    outside: &Outside,
    calls: Calls,
    kernel: ProbeClone<'_>,
) -> Reached {
    if !error.probes {
        return Reached::Unusable;
    }
    match error.call {
        CloneCall::Clone3 if outside.clone3 => ask_clone3(oracle, kernel),
        CloneCall::Clone3 => Reached::Unusable,
        CloneCall::Clone => ask_clone(oracle, calls, kernel),
    }
}

fn ask_clone3(oracle: &mut Oracle, kernel: ProbeClone<'_>) -> Reached {
    let answer = kernel(Probe::PidNumber { fs: false });
    oracle.until_pid_number = answer.into();
    match answer {
        Err(Errno::EINVAL) => {}
        Err(Errno::EAGAIN) => return Reached::ProcessLimits,
        Err(Errno::ENOMEM) => return Reached::KernelMemory,
        // E2BIG before Linux 5.7: the question is longer than the kernel's structure.
        _ => return Reached::Unusable,
    }
    let answer = kernel(Probe::Cgroup);
    oracle.until_cgroup = answer.into();
    let passed = match answer {
        Err(Errno::EBADF) => Reached::BeyondPidNumbers,
        Err(Errno::EAGAIN) => Reached::PidNumbers,
        Err(Errno::ENOMEM) => return Reached::PidMemory,
        _ => return Reached::Unusable,
    };
    // After it, so that another counter that is full for a moment shows here.
    let answer = kernel(Probe::PidNumber { fs: true });
    oracle.until_pid_number_with_fs = answer.into();
    match answer {
        Err(Errno::EINVAL) => passed,
        Err(Errno::EAGAIN) => Reached::SiblingExec,
        Err(Errno::ENOMEM) => Reached::KernelMemory,
        _ => Reached::Unusable,
    }
}

fn ask_clone(oracle: &mut Oracle, calls: Calls, kernel: ProbeClone<'_>) -> Reached {
    let answer = kernel(Probe::ThreadPointer { fs: true });
    oracle.until_thread_pointer = answer.into();
    match answer {
        Err(Errno::EPERM) => return Reached::BeyondThreadPointer,
        Err(Errno::ENOMEM) => return Reached::KernelMemory,
        Err(Errno::EAGAIN) => {}
        _ => return Reached::Unusable,
    }
    // Other flags than the caller's own could meet another rule of a filter.
    if calls == Calls::FilesOnly {
        return Reached::ProcessLimitsOrExec;
    }
    match kernel(Probe::ThreadPointer { fs: false }) {
        Err(Errno::EPERM) => Reached::SiblingExec,
        Err(Errno::EAGAIN) => Reached::ProcessLimits,
        _ => Reached::Unusable,
    }
}
