//! THE PATH: from a request to a running thread, and the way back on failure.
//!
//! Every value that a step acquires undoes that step when it is dropped, so an early return is the
//! way back; nothing on it allocates, because the machine is out of something (rules 3 and 4).

#![expect(
    clippy::result_large_err,
    reason = "nothing may be boxed between refusal and error (rule 4); the public error is two words"
)]

use crate::builder::Request;
use crate::clone::Call;
use crate::clone::sys::NoCancellation;
use crate::diagnose::{self, Circumstances, CloneCall, Detail, Finding, Verdict};
use crate::error::{Refusal, Reserve, SpawnError, StackOrigin, StackOutcome, Step};
use crate::failures;
use crate::fork;
use crate::handle::Running;
use crate::mem::{Body, Shared};
use crate::stack::cache::{self, StackCache};
use crate::stack::{Idle, Signals, overflow};
use crate::start::{Settings, Start};
use crate::sync::{Latch, forked_bare, notice_fork};
use crate::tcb::{Runtime, RuntimeError};
use nix::errno::Errno;
use std::time::Instant;

/// Creates the thread that runs `body`.
pub(crate) fn spawn(
    request: &Request,
    body: &Shared<dyn Body>,
    latch: Option<&Shared<Latch>>,
) -> Result<Running, SpawnError> {
    notice_fork();
    // The error's memory, while there is some.
    let reserve = Reserve::new();

    let mut attempts = 0;
    let mut started = None;
    let mut cancellation = None;
    loop {
        let refused = match attempt(request, body, latch, &mut attempts) {
            Ok(running) => return Ok(running),
            Err(refused) => refused,
        };
        cancellation.get_or_insert_with(NoCancellation::new);
        // Only what a clone meets goes away by itself within milliseconds. A calibration is left to
        // the next spawn: it allocates, which nothing does after a refusal (rule 4).
        let transient =
            refused.step == Step::Clone && refused.verdict.transient && !refused.calibration;
        let hopeless =
            matches!(refused.step, Step::Attributes | Step::Runtime) || request.name.is_err();
        let started = *started.get_or_insert_with(Instant::now);
        if request.retry.again(started, transient, hopeless) {
            continue;
        }
        return Err(refused.report(reserve, request, attempts));
    }
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
        if let Some(runtime) = Runtime::existing() {
            StackCache::reclaim_all(runtime);
        }
        Shared::try_new(value)
    })
}

/// There were not even `bytes` of heap memory to begin with.
pub(crate) fn refused_memory(request: &Request, bytes: usize) -> SpawnError {
    let reserve = Reserve::new();
    // A refusal is recorded all the same.
    let _ = fork::guard();
    let refused = match check(request) {
        Ok(_) if forked_bare() => no_runtime(RuntimeError::Unsupported(fork::BARE)),
        Ok(_) => no_memory(bytes),
        Err(refused) => refused,
    };
    refused.report(reserve, request, 1)
}

fn no_memory(bytes: usize) -> Refused {
    Refused::explained(Step::Allocate, Errno::ENOMEM, bytes, Detail::default())
}

/// One refused attempt.
struct Refused {
    step: Step,
    errno: Errno,
    /// Bytes of the mapping or range that the refused call was about.
    bytes: usize,
    stack: StackOutcome,
    /// Cached stacks given back before the step was refused for good.
    reclaimed: usize,
    calibration: bool,
    verdict: Verdict,
}

impl Refused {
    /// Finds out why, with nothing but what is known now.
    fn explained(step: Step, errno: Errno, bytes: usize, detail: Detail) -> Refused {
        let _cancellation = NoCancellation::new();
        let circumstances = circumstances(step, errno, bytes, CloneCall::Clone3, &detail);
        Refused {
            step,
            errno,
            bytes,
            stack: StackOutcome::NONE,
            reclaimed: 0,
            calibration: false,
            verdict: diagnose::explain(&circumstances),
        }
    }

    fn report(&self, reserve: Reserve, request: &Request, attempts: u32) -> SpawnError {
        let refusal = Refusal {
            step: self.step,
            errno: self.errno,
            stack_size: request.wanted.size,
            bytes: self.bytes,
            stack: self.stack,
            attempts: attempts.max(1),
            reclaimed: self.reclaimed,
            calibration: self.calibration,
            verdict: self.verdict,
        };
        let name = request.name.as_ref().ok().and_then(Option::as_ref);
        failures::record(&refusal, name.map(|name| name.as_str()));
        reserve.refuse(refusal)
    }
}

fn circumstances(
    step: Step,
    errno: Errno,
    bytes: usize,
    clone_call: CloneCall,
    detail: &Detail,
) -> Circumstances<'_> {
    Circumstances {
        step,
        errno,
        bytes,
        clone_call,
        flags: crate::clone::FLAGS,
        reaping: cache::thread_ended_within(20),
        known_threads: Runtime::existing()
            .filter(|_| cache::thread_ended_within(2000))
            .map(Runtime::count),
        what: detail,
    }
}

/// What the thread is told, for each attempt anew.
struct Message<'a> {
    body: &'a Shared<dyn Body>,
    latch: Option<&'a Shared<Latch>>,
    name: Option<&'a Shared<String>>,
}

/// Step 1: the wishes themselves, and the name if there is one.
fn check(request: &Request) -> Result<Option<&Shared<String>>, Refused> {
    if let Some((what, value)) = request.invalid {
        let detail = Detail { what, value };
        return Err(Refused::explained(
            Step::Attributes,
            Errno::EINVAL,
            0,
            detail,
        ));
    }
    match &request.name {
        Ok(name) => Ok(name.as_ref()),
        Err(bytes) => Err(no_memory(*bytes)),
    }
}

/// The steps, once. `attempts` counts how often the step that decides was tried.
fn attempt(
    request: &Request,
    body: &Shared<dyn Body>,
    latch: Option<&Shared<Latch>>,
    attempts: &mut u32,
) -> Result<Running, Refused> {
    *attempts += 1;

    // Before any lock is taken that a forked child would find held.
    let refused = |(step, errno, bytes)| Refused::explained(step, errno, bytes, Detail::default());
    fork::guard().map_err(refused)?;

    // 1. Attributes.
    let name = check(request)?;
    let message = Message { body, latch, name };

    // 2. Runtime: a calibrated glibc.
    if forked_bare() {
        return Err(no_runtime(RuntimeError::Unsupported(fork::BARE)));
    }
    let runtime = Runtime::get().map_err(no_runtime)?;

    // 3. and 4. Stack and guard: from the cache, or mapped.
    let idle = obtain(request, runtime, attempts)?;

    // 5. Prepare: lock, prefault.
    if let Err((errno, bytes, reclaimed)) = prepare(request, runtime, &idle, attempts) {
        let mut refused = Refused::explained(Step::PrepareStack, errno, bytes, Detail::default());
        refused.reclaimed = reclaimed;
        return Err(give_up(idle, refused));
    }

    // 6. and 7. TLS and clone. The analysis of a refused clone repeats it: what the kernel says
    // between two refusals is what refuses.
    let mut reclaimed = 0;
    let before = StackCache::reclaimed();
    let mut entered = enter(request, runtime, &idle, &message);
    // Cached stacks have resident pages, which a memory cgroup counts together with the kernel's memory for a
    // task. Not for TLS: to ask for it again is to allocate after a refusal (rule 4).
    if let Err((Step::Clone, Errno::ENOMEM, _)) = entered
        && request.retry.repeats()
        && give_back(runtime, before, &mut reclaimed)
    {
        *attempts += 1;
        entered = enter(request, runtime, &idle, &message);
    }
    let (step, errno, call) = match entered {
        Ok(tid) => return Ok(running(name, idle, tid)),
        Err(refused) => refused,
    };
    if step == Step::Runtime {
        return Err(give_up(
            idle,
            no_runtime(RuntimeError::Unsupported(fork::BARE)),
        ));
    }
    if step != Step::Clone {
        let mut refused = Refused::explained(step, errno, 0, Detail::default());
        refused.reclaimed = reclaimed;
        return Err(give_up(idle, refused));
    }
    let mut tid = None;
    let mut again = || match enter(request, runtime, &idle, &message) {
        Ok(started) => {
            tid = Some(started);
            Ok(())
        }
        Err((_, errno, _)) => Err(errno),
    };
    let detail = Detail::default();
    let circumstances = circumstances(step, errno, 0, call, &detail);
    // Reading files is a cancellation point, and so is sleeping between attempts.
    let _cancellation = NoCancellation::new();
    let finding = if request.retry.repeats() {
        diagnose::diagnose(&circumstances, Some(&mut again))
    } else {
        diagnose::diagnose(&circumstances, None)
    };
    match (finding, tid) {
        (_, Some(tid)) => Ok(running(name, idle, tid)),
        (Finding::Verdict(verdict), None) => {
            *attempts += verdict.repeated;
            let refused = Refused {
                step,
                errno,
                bytes: 0,
                stack: StackOutcome::NONE,
                reclaimed,
                calibration: false,
                verdict,
            };
            Err(give_up(idle, refused))
        }
        // A granted repetition always leaves its tid.
        (Finding::Succeeded, None) => {
            let refused = Refused::explained(step, errno, 0, detail);
            Err(give_up(idle, refused))
        }
    }
}

/// Steps 6 and 7 on a prepared stack; a refusal leaves it as it was.
fn enter(
    request: &Request,
    runtime: &'static Runtime,
    idle: &Idle,
    message: &Message<'_>,
) -> Result<libc::pid_t, (Step, Errno, CloneCall)> {
    // 6. TLS: on glibc's list first, so that a dlopen from here on initialises this thread, too.
    let signals = Signals::block_all_but_setxid();
    // A handler of the application that ran before this line can have called _Fork and returned in the child, where
    // the lock of glibc's list can be held for ever.
    notice_fork();
    if forked_bare() {
        return Err((Step::Runtime, Errno::ENOSYS, CloneCall::Clone3));
    }
    let enlisted = idle.enlist(&signals);
    if !enlisted.allocate_tls() {
        // _dl_allocate_tls says null and no more; memory is the one thing it asks for.
        return Err((Step::AllocateTls, Errno::ENOMEM, CloneCall::Clone3));
    }

    // 7. Clone.
    let start = Start {
        body: Some(message.body.clone()),
        latch: message.latch.map(Latch::enter),
        memory: None,
        runtime,
        name: message.name.cloned(),
        mask: signals.inherited(),
        rseq: runtime.has_rseq(),
        settings: Settings {
            comm: request.comm,
            signal_stack: overflow::enabled(),
        },
    };
    match idle.clone_thread(start, &signals) {
        Ok(tid) => {
            enlisted.commit();
            Ok(tid)
        }
        // Dropped in this order: off the list while 33 is open (rule 3), then the creator's mask.
        Err((errno, call)) => Err((
            Step::Clone,
            errno,
            match call {
                Call::Clone3 => CloneCall::Clone3,
                Call::Clone => CloneCall::Clone,
            },
        )),
    }
}

fn running(name: Option<&Shared<String>>, idle: Idle, tid: libc::pid_t) -> Running {
    let (stack, cache) = idle.into_running();
    Running::new(stack, cache, tid, name.cloned())
}

/// A stack, if need be after giving back what the caches hold: cached stacks are mappings and
/// address space, the very things that are short.
fn obtain(
    request: &Request,
    runtime: &'static Runtime,
    attempts: &mut u32,
) -> Result<Idle, Refused> {
    let attempt = || Idle::obtain(&request.cache, runtime, &request.wanted);
    let mut reclaimed = 0;
    let before = StackCache::reclaimed();
    let shortage = match attempt() {
        Ok(idle) => return Ok(idle),
        // EAGAIN: RLIMIT_MEMLOCK after mlockall(MCL_FUTURE), towards which cached stacks count as well.
        Err(shortage) if matches!(shortage.errno, Errno::ENOMEM | Errno::EAGAIN) => {
            if give_back(runtime, before, &mut reclaimed) {
                *attempts += 1;
                match attempt() {
                    Ok(idle) => return Ok(idle),
                    Err(shortage) => shortage,
                }
            } else {
                shortage
            }
        }
        Err(shortage) => shortage,
    };
    let (what, value) = request.wanted.too_large();
    let detail = Detail { what, value };
    let mut refused = Refused::explained(shortage.step, shortage.errno, shortage.bytes, detail);
    refused.reclaimed = reclaimed;
    if shortage.step == Step::GuardStack {
        refused.stack = StackOutcome {
            origin: StackOrigin::Fresh,
            fate: shortage.fate,
        };
    }
    Err(refused)
}

/// Unmaps what the caches hold, and counts it. Whether anything was since `before`: another thread, refused at the same
/// time, may have done so instead.
fn give_back(runtime: &'static Runtime, before: usize, count: &mut usize) -> bool {
    *count = StackCache::reclaim_all(runtime);
    StackCache::reclaimed() != before
}

/// Step 5, if need be after giving back what the caches hold: a stack stays locked in the cache. The error
/// has the errno, the bytes and the number of stacks given back.
fn prepare(
    request: &Request,
    runtime: &'static Runtime,
    idle: &Idle,
    attempts: &mut u32,
) -> Result<(), (Errno, usize, usize)> {
    let mut reclaimed = 0;
    let mut prepared = idle.prepare(&request.wanted);
    if let Err((Errno::ENOMEM | Errno::EAGAIN, _)) = prepared
        && StackCache::any_locked()
    {
        reclaimed = StackCache::reclaim_all(runtime);
        *attempts += 1;
        prepared = idle.prepare(&request.wanted);
    }
    prepared.map_err(|(errno, bytes)| (errno, bytes, reclaimed))
}

fn no_runtime(error: RuntimeError) -> Refused {
    match error {
        RuntimeError::Unsupported(what) => {
            let detail = Detail { what, value: 0 };
            Refused::explained(Step::Runtime, Errno::ENOSYS, 0, detail)
        }
        RuntimeError::Refused { step, errno, bytes } => {
            let mut refused = Refused::explained(step, errno, bytes, Detail::default());
            refused.calibration = true;
            refused
        }
    }
}

/// The stack goes back where it came from, and the error says so.
fn give_up(idle: Idle, mut refused: Refused) -> Refused {
    let origin = if idle.is_from_cache() {
        StackOrigin::Cache
    } else {
        StackOrigin::Fresh
    };
    let fate = idle.put_back();
    refused.stack = StackOutcome { origin, fate };
    refused
}
