//! THE PATH: from a request to a running thread, and the way back on failure.
//!
//! Every value that a step acquires undoes that step when it is dropped, so an early return is the
//! way back; nothing on it allocates, because the machine is out of something (A3, A4).

#![expect(
    clippy::result_large_err,
    reason = "nothing may be boxed between refusal and error (A4); the public error is two words"
)]

use crate::debug;
use crate::diagnose::{self, InvalidAttribute, UnsupportedRuntime, Verdict};
use crate::errno::Errno;
use crate::error::{FORKED_BARE, Refusal, Reserve, SpawnError};
use crate::failures;
use crate::fork;
use crate::handle::Running;
use crate::mem::Shared;
use crate::retry::RetryPolicy;
use crate::settings::Special;
use crate::stack::cache::StackCache;
use crate::stack::{self, Idle, Settings, Start, Wanted, Work, overflow};
use crate::start::Begin;
use crate::step::{Step, StepError};
use crate::sync::{forked_bare, notice_fork};
use crate::sys::{NoCancellation, Signals};
use crate::tcb::{Runtime, RuntimeError};
use std::cell::Cell;
use std::time::Instant;

/// What a caller wants of a thread, with defaults filled in and checked.
pub(crate) struct Request {
    /// The name, or what it needs if there was no memory to share it.
    pub name: Result<Option<Shared<String>>, usize>,
    pub comm: Option<[u8; 16]>,
    pub wanted: Wanted,
    pub cache: StackCache,
    pub retry: RetryPolicy,
    /// What is wrong with it, and the value.
    pub invalid: Option<(&'static str, u64)>,
    pub special: Option<Box<Special>>,
}

impl Request {
    fn name(&self) -> Option<&Shared<String>> {
        self.name.as_ref().ok().and_then(Option::as_ref)
    }
}

/// Creates the thread that does `work`.
pub(crate) fn spawn(request: &Request, work: Work<'_>) -> Result<Running, SpawnError> {
    let reserve = reserve(request)?;
    let mut attempts = 0;
    match attempt(request, work, &mut attempts) {
        Ok(running) => Ok(running),
        Err(refusal) => repeat(refusal, attempts, reserve, request, work),
    }
}

/// What follows a first refusal: more attempts, as far as the policy and the evidence say so.
#[cold]
#[inline(never)]
fn repeat(
    mut refusal: Refusal,
    mut attempts: u32,
    reserve: Reserve,
    request: &Request,
    work: Work<'_>,
) -> Result<Running, SpawnError> {
    let _cancellation = NoCancellation::new();
    let started = Instant::now();
    loop {
        // What malloc was refused is left to the next spawn, and so is a calibration: they allocate, which nothing does
        // after a refusal (A4).
        let step = refusal.error.step;
        let allocates = matches!(step, Step::Allocate | Step::AllocateTls) || refusal.calibration;
        let transient = refusal.verdict.transient && !allocates;
        let hopeless = matches!(step, Step::Attributes | Step::Runtime | Step::Setup)
            || request.name.is_err()
            || request
                .special
                .as_ref()
                .is_some_and(|special| special.refusal().is_some());
        if !request.retry.again(started, transient, hopeless) {
            return Err(report(refusal, reserve, request, attempts));
        }
        refusal = match attempt(request, work, &mut attempts) {
            Ok(running) => return Ok(running),
            Err(next) => Refusal {
                verdict: next.verdict.after(&refusal.verdict),
                ..next
            },
        };
    }
}

/// What the first spawn does once in a process, besides what each does.
pub(crate) fn prepare(request: &Request) -> Result<(), SpawnError> {
    notice_fork();
    if forked_bare() {
        return Err(SpawnError::FORKED_BARE);
    }
    let reserve = reserve(request)?;
    let mut attempts = 1;
    let prepared = (|| {
        fork::guard().map_err(explained)?;
        let runtime = Runtime::get().map_err(no_runtime)?;
        overflow::enabled();
        // What the kernel does with a stack and its guards is found out with the first one, which is unmapped again.
        obtain(request, runtime, &mut attempts).map(drop)
    })();
    diagnose::prepare();
    prepared.map_err(|refusal| report(refusal, reserve, request, attempts))
}

/// Memory for what creator and thread share, if need be after giving back what the caches hold: with a cached stack
/// lies what its last thread was made with. In a child of `_Fork(3)`, where no thread is made and malloc can wait for
/// ever, there is none.
pub(crate) fn share<T>(value: T) -> Result<Shared<T>, T> {
    notice_fork();
    if forked_bare() {
        return Err(value);
    }
    Shared::try_new(value).or_else(|value| {
        let error = StepError::new(Step::Allocate, Errno::ENOMEM, size_of::<T>());
        if let Some(runtime) = Runtime::existing()
            && StackCache::could_mend(&error)
        {
            StackCache::reclaim_all(runtime);
        }
        Shared::try_new(value)
    })
}

/// There were not even `bytes` of heap memory to begin with.
pub(crate) fn refused_memory(request: &Request, bytes: usize) -> SpawnError {
    if forked_bare() {
        return SpawnError::FORKED_BARE;
    }
    // A refusal is recorded all the same.
    let _ = fork::guard();
    let reserve = Reserve::new();
    let refusal = check(request).err().unwrap_or_else(|| no_memory(bytes));
    report(refusal, reserve, request, 1)
}

/// Memory for the error, while there is some.
fn reserve(request: &Request) -> Result<Reserve, SpawnError> {
    let reserve = Reserve::new();
    match reserve.is_missing() {
        true => Err(refused_memory(request, size_of::<Refusal>())),
        false => Ok(reserve),
    }
}

#[cold]
#[inline(never)]
fn report(mut refusal: Refusal, reserve: Reserve, request: &Request, attempts: u32) -> SpawnError {
    refusal.stack_size = request.wanted.size;
    refusal.attempts = attempts;
    debug::keep();
    failures::record(&refusal, request.name().map(|name| name.as_str()));
    reserve.refuse(refusal)
}

/// Finds out why, with nothing but what is known now.
#[cold]
#[inline(never)]
fn explained(error: StepError) -> Refusal {
    // Reading files is a cancellation point.
    let _cancellation = NoCancellation::new();
    Refusal::new(error, diagnose::diagnose_once(&error))
}

/// [`explained`], for what only a thread with settings meets.
#[cold]
#[inline(never)]
fn unsettled(error: StepError, special: &Special) -> Refusal {
    if error.step == Step::Allocate {
        return explained(error);
    }
    let _cancellation = NoCancellation::new();
    Refusal::new(
        error,
        diagnose::explain_setting(&error, &special.requested()),
    )
}

#[cold]
#[inline(never)]
fn no_memory(bytes: usize) -> Refusal {
    explained(StepError::new(Step::Allocate, Errno::ENOMEM, bytes))
}

#[cold]
#[inline(never)]
fn invalid((what, value): (&'static str, u64)) -> Refusal {
    let error = StepError::new(Step::Attributes, Errno::EINVAL, 0);
    Refusal::new(error, Verdict::proven(InvalidAttribute { what, value }))
}

/// Step 1: the wishes themselves.
fn check(request: &Request) -> Result<(), Refusal> {
    if let Some(wrong) = request.invalid {
        return Err(invalid(wrong));
    }
    if let Some(special) = &request.special
        && let Some(error) = special.refusal()
    {
        return Err(unsettled(error, special));
    }
    match &request.name {
        Ok(_) => Ok(()),
        Err(bytes) => Err(no_memory(*bytes)),
    }
}

/// The steps, once. `attempts` counts how often the step that decides was tried.
fn attempt(request: &Request, work: Work<'_>, attempts: &mut u32) -> Result<Running, Refusal> {
    *attempts += 1;

    // Before any lock is taken that a forked child would find held.
    fork::guard().map_err(explained)?;

    // 1. Attributes.
    check(request)?;

    // 2. Runtime: a calibrated glibc.
    if forked_bare() {
        return Err(no_runtime(RuntimeError::Unsupported(FORKED_BARE)));
    }
    let runtime = Runtime::get().map_err(no_runtime)?;

    // 3. and 4. Stack and guard: from the cache, or mapped.
    let idle = obtain(request, runtime, attempts)?;

    // 5. Prepare: lock, prefault. A stack stays locked in the cache.
    let prepare = || idle.prepare(&request.wanted);
    if let Err((error, reclaimed)) = with_room(runtime, attempts, StackCache::could_mend, prepare) {
        return Err(give_up(idle, reclaimed, explained(error)));
    }

    // 6. and 7. TLS and clone. Cached stacks have resident pages, which a memory cgroup counts together with the
    // kernel's memory for a task. Not for TLS: a second attempt would allocate after a refusal (A4).
    let lacks = |error: &StepError| {
        error.step == Step::Clone && request.retry.repeats() && StackCache::could_mend(error)
    };
    let enter = || enter(request, runtime, &idle, work);
    match with_room(runtime, attempts, lacks, enter) {
        Ok(tid) => settle(request, idle, tid),
        Err(refused) => examine(refused, request, runtime, idle, work, attempts),
    }
}

/// Finds out why TLS or clone was refused; the error has the number of stacks given back.
#[cold]
#[inline(never)]
fn examine(
    (error, reclaimed): (StepError, usize),
    request: &Request,
    runtime: &'static Runtime,
    idle: Idle,
    work: Work<'_>,
    attempts: &mut u32,
) -> Result<Running, Refusal> {
    if error.step == Step::Runtime {
        let refusal = no_runtime(RuntimeError::Unsupported(FORKED_BARE));
        return Err(give_up(idle, reclaimed, refusal));
    }
    if let Some(special) = &request.special
        && error.step == Step::Cgroup
    {
        return Err(give_up(idle, reclaimed, unsettled(error, special)));
    }
    // Reading files is a cancellation point, and so is sleeping between attempts.
    let _cancellation = NoCancellation::new();
    // The analysis of a refused clone repeats it, and may be granted it.
    let entered = match request.retry.repeats() {
        true => diagnose::diagnose(&error, || enter(request, runtime, &idle, work)),
        false => Err(diagnose::diagnose_once(&error)),
    };
    match entered {
        Ok(tid) => settle(request, idle, tid),
        Err(verdict) => {
            *attempts += verdict.repeated;
            Err(give_up(idle, reclaimed, Refusal::new(error, verdict)))
        }
    }
}

/// Steps 6 and 7 on a prepared stack; a refusal leaves it as it was.
fn enter(
    request: &Request,
    runtime: &'static Runtime,
    idle: &Idle,
    work: Work<'_>,
) -> Result<libc::pid_t, StepError> {
    // 6. TLS: on glibc's list first, so that a dlopen from here on initialises this thread, too.
    let signals = Signals::block_all_but_setxid();
    // A handler of the application that ran before this line can have called _Fork and returned in the child, where
    // the lock of glibc's list can be held for ever.
    notice_fork();
    if forked_bare() {
        return Err(StepError::new(Step::Runtime, Errno::ENOSYS, 0));
    }
    let enlisted = idle.enlist(&signals);
    if !enlisted.allocate_tls() {
        // _dl_allocate_tls says null and no more; it does nothing that can fail but allocate.
        return Err(StepError::new(Step::AllocateTls, Errno::ENOMEM, 0));
    }

    // 7. Clone.
    let special = request.special.as_deref();
    #[cfg(feature = "interpose")]
    if let Some(owner) = special.and_then(|special| special.owner.as_ref()) {
        idle.hand_to(owner);
    }
    let (body, latch) = work.share();
    let start = Start {
        body: Some(body),
        latch,
        memory: None,
        runtime,
        name: request.name().cloned(),
        mask: signals.of_thread(special.and_then(|special| special.blocked)),
        rseq: runtime.has_rseq(),
        settings: Settings {
            comm: request.comm,
            signal_stack: overflow::enabled(),
            stages: special.and_then(|special| special.stages.clone()),
        },
    };
    let cgroup = special.and_then(Special::cloned);
    // On refusal dropped in this order: off the list while SIGSETXID is unblocked (G3), then the creator's mask.
    let tid = idle.clone_thread::<Begin>(start, cgroup, &signals)?;
    enlisted.commit();
    Ok(tid)
}

/// 8. and 9. Settings and setup, if there are any: the thread reports what was refused, and ends.
#[inline(always)]
fn settle(request: &Request, idle: Idle, tid: libc::pid_t) -> Result<Running, Refusal> {
    let mut stages = None;
    if let Some(special) = &request.special {
        stages = special.stages.clone();
        if let Err(error) = special.wait(|| idle.has_ended()) {
            idle.join_thread();
            return Err(give_up(idle, 0, unsettled(error, special)));
        }
    }
    let (stack, cache) = idle.into_running();
    let name = request.name().cloned();
    Ok(Running {
        stack,
        cache,
        tid,
        name,
        stages,
    })
}

/// A stack, if need be after giving back what the caches hold: cached stacks are mappings and
/// address space, the very things that are short.
#[inline(always)]
fn obtain(
    request: &Request,
    runtime: &'static Runtime,
    attempts: &mut u32,
) -> Result<Idle, Refusal> {
    let lacks = |refused: &stack::RefusedStack| StackCache::could_mend(&refused.0);
    let first = Cell::new(*attempts == 1);
    let obtain = || Idle::obtain(&request.cache, runtime, &request.wanted, first.take());
    with_room(runtime, attempts, lacks, obtain).map_err(|((error, stack), reclaimed)| {
        let refusal = match error.step {
            Step::Attributes => invalid(request.wanted.too_large()),
            _ => explained(error),
        };
        Refusal {
            stack,
            reclaimed,
            ..refusal
        }
    })
}

/// Takes a step, and once more after giving back what the caches hold, if it `lacks` that. The error has the
/// number of stacks given back.
#[inline(always)]
fn with_room<T, E>(
    runtime: &'static Runtime,
    attempts: &mut u32,
    lacks: impl FnOnce(&E) -> bool,
    step: impl Fn() -> Result<T, E>,
) -> Result<T, (E, usize)> {
    let before = StackCache::reclaimed();
    match step() {
        Ok(value) => Ok(value),
        Err(error) => retake(error, before, runtime, attempts, lacks, step),
    }
}

#[cold]
#[inline(never)]
fn retake<T, E>(
    error: E,
    before: usize,
    runtime: &'static Runtime,
    attempts: &mut u32,
    lacks: impl FnOnce(&E) -> bool,
    step: impl Fn() -> Result<T, E>,
) -> Result<T, (E, usize)> {
    if !lacks(&error) {
        return Err((error, 0));
    }
    let reclaimed = StackCache::reclaim_all(runtime);
    // Or another thread, refused at the same time, has given them back instead.
    if StackCache::reclaimed() == before {
        return Err((error, reclaimed));
    }
    *attempts += 1;
    step().map_err(|error| (error, reclaimed))
}

#[cold]
#[inline(never)]
fn no_runtime(error: RuntimeError) -> Refusal {
    match error {
        RuntimeError::Unsupported(what) => {
            let error = StepError::new(Step::Runtime, Errno::ENOSYS, 0);
            Refusal::new(error, Verdict::proven(UnsupportedRuntime { what }))
        }
        RuntimeError::Refused { step, errno, bytes } => Refusal {
            calibration: true,
            ..explained(StepError::new(step, errno, bytes))
        },
    }
}

/// The stack goes back where it came from, and the error says so.
#[cold]
#[inline(never)]
fn give_up(idle: Idle, reclaimed: usize, refusal: Refusal) -> Refusal {
    Refusal {
        stack: idle.put_back(),
        reclaimed,
        ..refusal
    }
}
