//! THE PATH: from a request to a running thread, and the way back on failure.
//!
//! Every value that a step acquires undoes that step when it is dropped, so an early return is the
//! way back; nothing on it allocates, because the machine is out of something (rules 3 and 4).

use crate::builder::Request;
use crate::error::{Refusal, Reserve, SpawnError, StackFate, StackOrigin, StackOutcome, Step};
use crate::handle::Running;
use crate::stack::cache::{self, StackCache};
use crate::stack::{Idle, Signals, overflow};
use crate::start::{Body, Settings, Start};
use crate::tcb::{Runtime, RuntimeError};
use nix::errno::Errno;
use std::sync::Arc;

/// Creates the thread that runs `body`.
pub(crate) fn spawn(request: &Request, body: Arc<dyn Body>) -> Result<Running, SpawnError> {
    // The error's memory, while there is some.
    let reserve = Reserve::new(request.wanted.size);
    cache::guard_forks();
    cache::notice_fork();

    // 1. Attributes.
    if let Some(detail) = request.invalid {
        return Err(reserve.refuse(|refusal| {
            refused(refusal, Step::Attributes, Errno::EINVAL, 0);
            refusal.detail = detail;
        }));
    }

    // 2. Runtime: a calibrated glibc.
    let runtime = match Runtime::get() {
        Ok(runtime) => runtime,
        Err(error) => return Err(reserve.refuse(|refusal| no_runtime(refusal, error))),
    };

    // 3. and 4. Stack and guard: from the cache, or mapped.
    let idle = match obtain(request, runtime) {
        Ok(idle) => idle,
        Err((step, errno, bytes, reclaimed)) => {
            return Err(reserve.refuse(|refusal| {
                refused(refusal, step, errno, bytes);
                refusal.reclaimed = reclaimed;
                if step == Step::GuardStack {
                    refusal.stack = StackOutcome {
                        origin: StackOrigin::Fresh,
                        fate: StackFate::Unmapped,
                    };
                }
            }));
        }
    };

    // 5. Prepare: lock, prefault.
    if let Err((errno, bytes)) = idle.prepare(&request.wanted) {
        return Err(give_up(reserve, idle, Step::PrepareStack, errno, bytes));
    }

    // 6. TLS: on glibc's list first, so that a dlopen from here on initialises this thread, too.
    let signals = Signals::block_application();
    let enlisted = idle.enlist(&signals);
    if !enlisted.allocate_tls() {
        drop(enlisted);
        drop(signals);
        // _dl_allocate_tls says null and no more; memory is the one thing it asks for.
        return Err(give_up(reserve, idle, Step::AllocateTls, Errno::ENOMEM, 0));
    }

    // 7. Clone.
    let start = Start {
        body,
        runtime,
        cache: request.cache.clone(),
        name: request.name.clone(),
        mask: signals.inherited(),
        settings: Settings {
            comm: request.comm,
            signal_stack: overflow::enabled(),
        },
    };
    match idle.clone_thread(start, &signals) {
        Ok(tid) => {
            enlisted.commit();
            drop(signals);
            let (stack, cache) = idle.into_running();
            Ok(Running::new(stack, cache, tid, request.name.clone()))
        }
        Err((errno, _call)) => {
            // Off the list again while 33 is open (rule 3).
            drop(enlisted);
            drop(signals);
            Err(give_up(reserve, idle, Step::Clone, errno, 0))
        }
    }
}

/// A stack, if need be after giving back what the caches hold: cached stacks are mappings and
/// address space, the very things that are short. The error ends with the number of those.
fn obtain(
    request: &Request,
    runtime: &'static Runtime,
) -> Result<Idle, (Step, Errno, usize, usize)> {
    let first = match Idle::obtain(&request.cache, runtime, &request.wanted) {
        Err(error @ (_, Errno::ENOMEM, _)) => error,
        other => return other.map_err(|(step, errno, bytes)| (step, errno, bytes, 0)),
    };
    let reclaimed = StackCache::reclaim_all(runtime);
    if reclaimed == 0 {
        return Err((first.0, first.1, first.2, 0));
    }
    Idle::obtain(&request.cache, runtime, &request.wanted)
        .map_err(|(step, errno, bytes)| (step, errno, bytes, reclaimed))
}

fn refused(refusal: &mut Refusal, step: Step, errno: Errno, bytes: usize) {
    (refusal.step, refusal.errno, refusal.bytes) = (step, errno, bytes);
}

fn no_runtime(refusal: &mut Refusal, error: RuntimeError) {
    match error {
        RuntimeError::Unsupported(check) => {
            refused(refusal, Step::Runtime, Errno::ENOSYS, 0);
            refusal.detail = check;
        }
        RuntimeError::Refused { step, errno, bytes } => {
            refused(refusal, step, errno, bytes);
            refusal.detail = "calibration thread";
        }
    }
}

/// The stack goes back where it came from, and the error says so.
fn give_up(reserve: Reserve, idle: Idle, step: Step, errno: Errno, bytes: usize) -> SpawnError {
    let origin = if idle.is_from_cache() {
        StackOrigin::Cache
    } else {
        StackOrigin::Fresh
    };
    let fate = idle.put_back();
    reserve.refuse(|refusal| {
        refused(refusal, step, errno, bytes);
        refusal.stack = StackOutcome { origin, fate };
    })
}
