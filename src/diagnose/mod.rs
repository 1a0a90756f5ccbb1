//! From a refused step to a [`Cause`].
//!
//! Runs while the machine is out of something: no heap, no panic, some KiB of stack (`tests/refusal/stack_use.rs`), some
//! dozen system calls.
//! `rule` decides how sure a cause is, from how each check stands; the other files find that out:
//!
//! - `probe` finds out how far a clone gets in the kernel, before and after a repetition of the refused call.
//! - `limits`, `numbers` and `judge` compare what the files say before and after it.
//! - `outside` finds filters, tracers and security modules, which can answer in the kernel's place.
//!
//! With `again`, the refused call is repeated one to three times, until it is granted or the answers agree.
//! Without (`RetryPolicy::never`), nothing that could create a task is called, and nothing is proven.

mod again;
mod cause;
mod commit;
mod eagain;
mod enomem;
mod explain;
mod headroom;
mod judge;
mod limits;
mod memory;
mod numbers;
mod outside;
mod probe;
mod rule;
mod settings;
mod user_tasks;
mod verdict;

use std::time::Instant;

use crate::errno::Errno;

use again::{Again, Granted, Repetition};
pub use cause::{
    AddressSpace, AddressSpaceExhausted, Answer, Cause, CauseKind, Causes, CausesIter, Certainty,
    CgroupPlace, DataSegment, DeadlineAdmission, DeadlineScheduling, DyingPidNamespace, EndedEarly,
    ForeignCgroup, InvalidAttribute, KernelMemory, LockedMemory, MapCount, MemoryOracle,
    NoCoreScheduling, NotPermitted, Oracle, OutsideCpuset, Overcommit, PidLevel, PidNumbers,
    PidsCgroup, RealTimeRuntime, Seccomp, SecurityModule, SiblingExec, ThreadsMax, Tracer, Unknown,
    UnsharedPidNamespace, UnsharedTimeNamespace, UnsupportedRuntime, UserProcesses,
};
pub use explain::Explanation;
pub use headroom::{Charge, Headroom, HeadroomLimit, Unit, headroom, headroom_of};
use outside::Outside;
use rule::{Standing, rule};
pub(crate) use verdict::Verdict;

pub use crate::mem::text::InlinePath;
use crate::proc::cgroup::Hierarchy;
#[cfg(feature = "interpose")]
use crate::proc::status::Calls;
use crate::proc::status::Status;
use crate::proc::{machine, task};
use crate::settings::Requested;
pub use crate::step::CloneCall;
#[cfg(feature = "interpose")]
use crate::step::Task;
use crate::step::{Step, StepError};
use crate::sync::notice_fork;
use crate::sys::NoCancellation;
use crate::sys::clone_probe::probe as probe_kernel;
#[cfg(feature = "interpose")]
use crate::sys::clone_probe::{self, Probe};

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

/// Why a call of the C library's was refused a moment ago with `errno`, which is the kernel's own. It maps `mapped` bytes
/// before the clone, guard included, or none. Like that of [`explain`], it cannot be repeated: [`Certainty::Inferred`] at
/// most. But a thread that ends at once can be requested in its place.
///
/// Which of its system calls was refused is shown only by the errno, and by what each of them would meet now. Of two that are
/// refused for different reasons none is named: the mapping comes first, but a cached stack needs none.
#[cfg(feature = "interpose")]
pub(crate) fn explain_call(errno: Errno, task: Task, mapped: usize) -> (StepError, Verdict) {
    let clone = as_libc_clones(errno, task);
    // First, because it is nearest to the refusal.
    let of_clone = diagnose_once(&clone);
    let mut of_mapping = None;
    let mut passed = Verdict::UNKNOWN;
    for step in [Step::MapStack, Step::GuardStack] {
        if mapped == 0 || of_mapping.is_some() {
            continue;
        }
        let error = StepError::new(step, errno, mapped);
        let verdict = diagnose_once(&error);
        match verdict.certainty {
            Certainty::Unknown => passed = passed.or(verdict),
            _ => of_mapping = Some((error, verdict)),
        }
    }
    let same = |verdict: &Verdict| of_clone.cause.kind() == verdict.cause.kind();
    let (error, mut verdict) = match (of_mapping, of_clone.certainty) {
        (None, _) if task == Task::Thread && clone.probes => {
            let again = repeated(&clone);
            match again.certainty {
                Certainty::Unknown => (clone, of_clone.or(passed)),
                _ => (clone, again),
            }
        }
        (None, _) => (clone, of_clone.or(passed)),
        (Some((error, verdict)), Certainty::Unknown) => (error, verdict.or(of_clone)),
        (Some((error, verdict)), _) if same(&verdict) => (error, verdict),
        (Some((_, verdict)), _) => (clone, Verdict::UNKNOWN.or(verdict).or(of_clone)),
    };
    verdict.infer();
    (error, verdict)
}

/// The clone that libc was refused, as far as it is known.
#[cfg(feature = "interpose")]
fn as_libc_clones(errno: Errno, task: Task) -> StepError {
    // A filter can kill for a call that it does not know. glibc makes a thread by clone3, and by clone only after an
    // ENOSYS. If that came before a filter that kills for clone3, there is an older one, or an older kernel: which does
    // not count filters. A process can be made by either.
    let status = Status::read();
    let (probes, probe) = match status.calls() {
        Calls::Any => (true, Probe::Clone3Empty),
        Calls::FilesOnly => (
            task == Task::Thread && status.filters == Some(1),
            Probe::Clone3Flags,
        ),
    };
    let call = match probes && probe_kernel(probe) == Err(Errno::ENOSYS) {
        true => CloneCall::Clone,
        false => CloneCall::Clone3,
    };
    StepError {
        call,
        task,
        probes,
        ..StepError::new(Step::Clone, errno, 0)
    }
}

/// [`diagnose`], with a thread that ends at once for a repetition.
#[cfg(feature = "interpose")]
fn repeated(error: &StepError) -> Verdict {
    analyse(error, Some(&mut || clone_probe::repeat(error.call)))
}

/// The stack of a thread of std, and the bytes that are probed here where a mapping may have been refused.
const STACK: usize = 2 << 20;

/// Finds out why a task was refused to other code of this process a moment ago: a thread to `std::thread` or
/// `pthread_create(3)`, a process to fork(2), a helper thread of the kernel to KVM. `errno` is what that code was given.
///
/// The kernel is probed for what refuses a clone(2) now, and if nothing does, a mapping of 2 MiB: pthread_create says EAGAIN
/// for both. The refused call cannot be repeated here, so the cause is [`Certainty::Inferred`] at most: it is what
/// refuses now, which need not be what refused then. Allocates nothing, and makes the system calls of an analysis
/// (`docs/seccomp.md` in the repository). Call it at once, and in the thread that was refused: limits and filters can
/// differ between threads.
///
/// ```
/// if let Err(error) = std::thread::Builder::new().spawn(|| ()) {
///     let errno = error.raw_os_error().unwrap_or(0);
///     eprintln!("{error}\n{}", nptl::explain(errno).report());
/// }
/// let explanation = nptl::explain(libc::EAGAIN);
/// assert_ne!(explanation.certainty(), nptl::Certainty::Proven);
/// ```
pub fn explain(errno: i32) -> Explanation {
    notice_fork();
    // Reading files is a cancellation point.
    let _cancellation = NoCancellation::new();
    let errno = Errno::new(errno);
    let clone = |call| StepError {
        call,
        ..StepError::new(Step::Clone, errno, 0)
    };
    let mapping = StepError::new(Step::MapStack, Errno::ENOMEM, STACK);
    // Whether it was clone3 or clone is not known either.
    let mut verdict = diagnose_once(&clone(CloneCall::Clone3));
    if verdict.certainty == Certainty::Unknown && errno == Errno::EPERM {
        verdict = diagnose_once(&clone(CloneCall::Clone));
    }
    if verdict.certainty == Certainty::Unknown && matches!(errno, Errno::EAGAIN | Errno::ENOMEM) {
        let second = diagnose_once(&mapping);
        if second.certainty != Certainty::Unknown {
            verdict = second;
        }
    }
    verdict.infer();
    Explanation { errno, verdict }
}

/// Looks up in good times where the cgroups are: the table of mounts can have thousands of lines.
pub(crate) fn prepare() {
    // Reading files is a cancellation point.
    let _cancellation = NoCancellation::new();
    Hierarchy::prepare(Status::read().calls());
}

/// [`diagnose`] without a repetition.
pub(crate) fn diagnose_once(error: &StepError) -> Verdict {
    analyse(error, None)
}

/// Like [`explain`], for a setting of the new thread.
pub(crate) fn explain_setting(error: &StepError, requested: &Requested<'_>) -> Verdict {
    let start = Instant::now();
    let status = Status::read();
    let mut verdict = settings::diagnose(error, requested, &status);
    if verdict.certainty == Certainty::Unknown {
        verdict.cause = Cause::Unknown(Unknown {
            seccomp: status.seccomp,
            ..Unknown::NOTHING
        });
    }
    verdict.spent = start.elapsed();
    verdict
}

const NO_CLONE3: &str =
    "no clone3 (Linux before 5.3, or a filter): the kernel cannot be asked what refused";

fn analyse(error: &StepError, again: Option<Again<'_>>) -> Verdict {
    let start = Instant::now();
    let mut seen = Unknown::NOTHING;
    let mut repetition = Repetition::new(error.errno, again);
    // A granted repetition ends it, and the verdict is not read.
    let mut verdict = name(error, &mut seen, &mut repetition).unwrap_or(Verdict::UNKNOWN);
    if verdict.certainty == Certainty::Unknown {
        verdict.cause = Cause::Unknown(seen);
    }
    verdict.silence = match (error.step, error.call) {
        (Step::Clone, CloneCall::Clone) => Some(NO_CLONE3),
        _ => seen.oracle.silence(),
    };
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
        Step::Attributes
        | Step::Runtime
        | Step::Affinity
        | Step::Scheduler
        | Step::Cgroup
        | Step::CoreScheduling
        | Step::Setup => Ok(Verdict::UNKNOWN),
    }
}

fn clone(
    error: &StepError,
    status: &Status,
    seen: &mut Unknown,
    repetition: &mut Repetition<'_>,
) -> Result<Verdict, Granted> {
    // A kernel that could not open one file takes its time to refuse the next.
    let modules = match status.error {
        None => machine::security_modules(),
        Some(_) => None,
    };
    let outside = Outside::read(error, status, modules, seen, &mut probe_kernel);
    let by_outside = |repeated, seen: &Unknown| {
        let ruling = rule(&outside.checks(), repeated);
        let cause = |kind| outside::cause(kind, error, status, seen);
        Verdict::ruled(&ruling, ruling.named.map(cause))
    };
    if outside.answers() {
        // The probe was answered as the refused call was: it is a repetition. An errno that no check of the kernel's
        // gives needs none.
        let only_outside = !matches!(error.errno, Errno::EAGAIN | Errno::ENOMEM | Errno::EINVAL);
        return Ok(by_outside(only_outside || repetition.is_possible(), seen));
    }
    match error.errno {
        Errno::EAGAIN => eagain::diagnose(error, status, outside, seen, repetition),
        Errno::ENOMEM => enomem::diagnose(error, status, outside, seen, repetition),
        Errno::EINVAL => einval(error, status, outside, seen, repetition),
        // No check of the kernel's gives another errno to these flags.
        _ => {
            let repeated = repetition.refused(seen)?;
            Ok(by_outside(repeated, seen))
        }
    }
}

/// EINVAL: the program has unshared a namespace that threads cannot enter, or this kernel does not know the flags.
fn einval(
    error: &StepError,
    status: &Status,
    outside: Outside,
    seen: &mut Unknown,
    repetition: &mut Repetition<'_>,
) -> Result<Verdict, Granted> {
    let calls = status.calls();
    let repeated = repetition.refused(seen)?;
    let own = task::namespace(task::OWN_PID_NAMESPACE, calls);
    let children = task::namespace(task::PID_NAMESPACE_FOR_CHILDREN, calls);
    let pid = match (own, children) {
        (Ok(own), Ok(children)) => Standing::shown_if(own != children),
        // A kernel with clone3 has this file, so a missing one means a namespace that no process has entered.
        (Ok(_), Err(Errno::ENOENT)) => Standing::shown_if(error.call == CloneCall::Clone3),
        _ => Standing::Open,
    };
    let time = task::namespace(task::OWN_TIME_NAMESPACE, calls);
    let time_of_children = task::namespace(task::TIME_NAMESPACE_FOR_CHILDREN, calls);
    let time_differs = time.ok().zip(time_of_children.ok());
    let time_differs = time_differs.is_some_and(|(own, children)| own != children);
    // Only the kernels before 5.20 refuse for it.
    let time_stands = match time_differs {
        true => Standing::Signed,
        false => Standing::Excluded,
    };
    let [tracer, filter, module] = outside.standings();
    // What two namespaces refuse is not in doubt where a filter or a tracer is there: they stay as they are.
    let outside_stands = match pid {
        Standing::Shown => [Standing::Excluded; 2],
        _ => [tracer, filter],
    };
    let checks = [
        (CauseKind::Tracer, outside_stands[0]),
        (CauseKind::Seccomp, outside_stands[1]),
        (CauseKind::UnsharedPidNamespace, pid),
        (CauseKind::SecurityModule, module.min(Standing::Remote)),
        (CauseKind::UnsharedTimeNamespace, time_stands),
    ];
    let ruling = rule(&checks, repeated);
    let cause = ruling.named.map(|kind| match kind {
        CauseKind::UnsharedPidNamespace => UnsharedPidNamespace {
            own: own.ok(),
            for_children: children.ok(),
        }
        .into(),
        CauseKind::UnsharedTimeNamespace => UnsharedTimeNamespace {
            own: time.ok(),
            for_children: time_of_children.ok(),
        }
        .into(),
        kind => outside::cause(kind, error, status, seen),
    });
    Ok(Verdict::ruled(&ruling, cause))
}

#[cfg(test)]
#[expect(unsafe_code, reason = "they make processes and limits of their own")]
mod tests;
