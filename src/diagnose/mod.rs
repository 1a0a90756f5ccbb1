//! From a refused step to a [`Cause`].
//!
//! Runs while the machine is out of something: no heap, no panic, some KiB of stack (`tests/stack_use.rs`), some
//! dozen system calls.
//! A cause is named only with evidence; naming the wrong limit is worse than naming none. What each claim rests
//! on:
//!
//! - `probe` asks the kernel how far a clone gets now. Limits near their maximum flicker while other tasks come
//!   and go, so one answer is not enough: the probes are made before and after a repetition of the refused
//!   call, and must agree.
//! - RLIMIT_NPROC has no visible count. It is named by elimination, and excluded where the caller is exempt or
//!   the whole machine has fewer tasks than the limit.
//! - A cgroup is proven by its own refusal counter rising over a repeated refusal, and inferred without.
//! - Under a system-call filter only files are read and the refused call's own number is used, because another
//!   call may kill the process.
//!
//! With `again`, the refused call is repeated one to three times, until it is granted or the answers agree.
//! Without (`RetryPolicy::never`), nothing that could create a task is called; then a full cgroup is inferred,
//! not proven.

mod again;
mod cause;
mod eagain;
mod enomem;
mod filter;
mod headroom;
mod judge;
mod limits;
mod memory;
mod numbers;
mod probe;
mod verdict;

use std::time::Instant;

use crate::errno::Errno;

use again::{Again, Granted, Repetition};
pub use cause::{
    AddressSpace, AddressSpaceExhausted, Answer, Cause, CauseKind, Causes, Certainty, CgroupPlace,
    DataSegment, DeadlineScheduling, DyingPidNamespace, InvalidAttribute, KernelMemory,
    LockedMemory, MapCount, MemoryOracle, Oracle, Overcommit, PidLevel, PidNumbers, PidsCgroup,
    Seccomp, SiblingExec, ThreadsMax, Unknown, UnsharedPidNamespace, UnsupportedRuntime,
    UserProcesses,
};
pub use headroom::{Headroom, HeadroomLimit, Unit, headroom, headroom_of};
pub(crate) use verdict::Verdict;

pub use crate::mem::text::InlinePath;
use crate::proc::status::{Calls, Status};
use crate::proc::task::{self, OWN_PID_NAMESPACE, PID_NAMESPACE_FOR_CHILDREN};
pub use crate::step::CloneCall;
use crate::step::{Step, StepError};
use crate::sys::clone_probe as calls_of_clone;

/// Names the cause of a refusal.
///
/// `again` repeats the refused call and is used for [`Step::Clone`] only. Once it is granted, it is not called
/// again, and its value is the result.
#[expect(
    clippy::result_large_err,
    reason = "nothing may be boxed between refusal and error (A4)"
)]
pub(crate) fn diagnose<T>(
    error: &StepError,
    mut again: impl FnMut() -> Result<T, StepError>,
) -> Result<T, Verdict> {
    let mut value = None;
    let mut again = || match again() {
        Ok(granted) => {
            value = Some(granted);
            Ok(())
        }
        Err(error) => Err(error.errno),
    };
    let verdict = analyse(error, Some(&mut again));
    value.ok_or(verdict)
}

/// [`diagnose`] without a repetition.
pub(crate) fn explain(error: &StepError) -> Verdict {
    analyse(error, None)
}

fn analyse(error: &StepError, again: Option<Again<'_>>) -> Verdict {
    let start = Instant::now();
    let mut seen = Unknown::NOTHING;
    let mut repetition = Repetition::new(error.errno, again);
    // A granted repetition ends it, and nobody reads the verdict.
    let mut verdict = name(error, &mut seen, &mut repetition).unwrap_or(Verdict::UNKNOWN);
    if verdict.certainty == Certainty::Unknown {
        verdict.cause = Cause::Unknown(seen);
    }
    verdict.silence = seen.oracle.silence();
    verdict.repeated = repetition.count;
    verdict.spent = start.elapsed();
    verdict
}

fn name(
    error: &StepError,
    seen: &mut Unknown,
    repetition: &mut Repetition<'_>,
) -> Result<Verdict, Granted> {
    let status = Status::read();
    seen.seccomp = status.seccomp;
    match error.step {
        Step::Allocate
        | Step::MapStack
        | Step::GuardStack
        | Step::PrepareStack
        | Step::AllocateTls => Ok(memory::diagnose(error, &status, seen)),
        Step::Clone => clone(error, &status, seen, repetition),
        Step::Attributes | Step::Runtime => Ok(Verdict::UNKNOWN),
    }
}

fn clone(
    error: &StepError,
    status: &Status,
    seen: &mut Unknown,
    repetition: &mut Repetition<'_>,
) -> Result<Verdict, Granted> {
    seen.oracle.clone3_empty = calls_of_clone::clone3_empty().into();
    if let Some(verdict) = filter::diagnose(error, status, seen) {
        return Ok(verdict);
    }
    match error.errno {
        Errno::EAGAIN => eagain::diagnose(status, seen, repetition),
        Errno::ENOMEM => enomem::diagnose(status, seen, repetition),
        Errno::EINVAL => Ok(unshared(seen, status.calls())),
        _ => Ok(Verdict::UNKNOWN),
    }
}

/// EINVAL: the program has unshared its pid namespace, or this kernel does not know the flags.
fn unshared(seen: &mut Unknown, calls: Calls) -> Verdict {
    let own = task::namespace(OWN_PID_NAMESPACE, calls);
    let children = task::namespace(PID_NAMESPACE_FOR_CHILDREN, calls);
    let cause = |for_children| UnsharedPidNamespace {
        own: own.ok(),
        for_children,
    };
    // A kernel with clone3 has this file, so a missing one means a namespace that no process has entered.
    let has_clone3 = seen.oracle.clone3_empty.is(Errno::EINVAL);
    match (own, children) {
        (Ok(own), Ok(children)) if own != children => Verdict::proven(cause(Some(children))),
        (Ok(_), Err(Errno::ENOENT)) if has_clone3 => Verdict::proven(cause(None)),
        (Ok(_), Ok(_)) => Verdict::UNKNOWN,
        _ => {
            seen.oracle.until_cgroup = calls_of_clone::until_cgroup().into();
            Verdict::UNKNOWN
        }
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "they make processes and limits of their own")]
mod tests;
