//! `pthread_create` and `thrd_create`.

use super::attributes::{Affinity, Attributes};
use super::executable;
use crate::builder::Builder;
use crate::error::SpawnError;
use crate::handle::Running;
use crate::interpose::real::ThreadRoutine;
use crate::mem::{Body, try_box};
use crate::settings::{Owner, Special};
use crate::spawn;
use crate::stack::{Work, overflow};
use crate::step::Step;
use crate::sys::page_size;
use crate::tcb::Runtime;
use libc::{c_int, c_void, pthread_attr_t, pthread_t};
use std::sync::atomic::{AtomicBool, Ordering};

/// The largest guard, in pages, of a stack that the cache keeps. A larger one is glibc's to make: mapped writable with the
/// stack, as this crate does it, it would count as memory that the program can use.
const LARGEST_GUARD: usize = 16;

/// The crate does not know this glibc, or this is a child of `_Fork(3)`: every thread is glibc's.
static UNSUPPORTED: AtomicBool = AtomicBool::new(false);

/// A program's function, and what it is called with.
struct RoutineCall {
    start: ThreadRoutine,
    argument: *mut c_void,
}

// SAFETY: the argument is passed on, from the one that creates a thread to the thread: what may be done with it is
// between those two.
unsafe impl Send for RoutineCall {}
// SAFETY: only the thread looks at it.
unsafe impl Sync for RoutineCall {}

impl Body for RoutineCall {
    fn run(&self) {
        if let Some(runtime) = Runtime::existing() {
            // SAFETY: called once, by the new thread; the program vouches for its function.
            unsafe { runtime.run_routine(self.start, self.argument) };
        }
    }

    fn cancel(&self) {}
}

/// Creates a thread. `None`: it is glibc's to create.
///
/// # Errors
/// What pthread_create(3) says.
///
/// # Safety
/// As for pthread_create(3).
pub(crate) unsafe fn create(
    id: *mut pthread_t,
    attributes: *const pthread_attr_t,
    start: ThreadRoutine,
    argument: *mut c_void,
) -> Option<Result<(), NotCreated>> {
    if UNSUPPORTED.load(Ordering::Relaxed) || executable::stacks_wanted() {
        return None;
    }
    // SAFETY: by the caller's promise.
    let attributes = match unsafe { Attributes::read(attributes) } {
        Ok(attributes) => attributes,
        Err(errno) => return Some(Err(NotCreated::Attributes(errno))),
    };
    if attributes.size.checked_add(attributes.guard).is_none() {
        return Some(Err(NotCreated::Attributes(libc::EINVAL)));
    }
    // Of these two the thread would set the policy alone.
    if let Some((libc::SCHED_OTHER, priority)) = attributes.scheduling
        && priority != 0
    {
        return Some(Err(NotCreated::Attributes(libc::EINVAL)));
    }
    if attributes.is_unusual || attributes.guard > LARGEST_GUARD * page_size() {
        return None;
    }
    // A program of its own handlers and signal stacks, which glibc's threads do not touch either.
    overflow::disable_overflow_reports();
    let is_detached = attributes.is_detached;
    match start_thread(id, attributes, RoutineCall { start, argument }) {
        Ok(running) if is_detached => drop(running),
        Ok(running) => running.release(),
        Err(error) if error.step() == Step::Runtime => {
            UNSUPPORTED.store(true, Ordering::Relaxed);
            return None;
        }
        Err(error) => return Some(Err(NotCreated::Thread(error))),
    }
    Some(Ok(()))
}

/// Why there is no thread.
pub(crate) enum NotCreated {
    /// The attributes could not be read, or sizes in them cannot be added.
    Attributes(c_int),
    Thread(SpawnError),
}

impl NotCreated {
    /// What pthread_create(3) returns.
    pub(crate) fn errno(&self) -> c_int {
        match self {
            NotCreated::Attributes(errno) => *errno,
            // A size that cannot exist is one that glibc's mmap is refused.
            NotCreated::Thread(error) if error.step() == Step::Attributes => libc::EAGAIN,
            NotCreated::Thread(error) => error.pthread_errno().raw(),
        }
    }
}

fn start_thread(
    id: *mut pthread_t,
    attributes: Attributes,
    routine: RoutineCall,
) -> Result<Running, SpawnError> {
    let builder = Builder::new()
        .stack_size(attributes.size)
        .guard_size(attributes.guard);
    let Ok(mut special) = try_box(Special::default()) else {
        return Err(spawn::refused_memory(
            &builder.request(),
            size_of::<Special>(),
        ));
    };
    special.owner = Some(Owner {
        id: id.expose_provenance(),
        joinable: !attributes.is_detached,
        size: attributes.size,
        guard: attributes.guard,
        scheduling: attributes.scheduling,
    });
    special.blocked = attributes.blocked;
    special.scheduler = attributes.scheduler();
    match attributes.affinity {
        Affinity::Set(set) => special.affinity = Some(set),
        Affinity::NoMemory => special.unshared = true,
        Affinity::Inherited | Affinity::Unknown => {}
    }
    let request = builder.with_special(special).request();
    match spawn::share(routine) {
        Ok(routine) => spawn::spawn(&request, Work::Free(&routine.body())),
        Err(_) => Err(spawn::refused_memory(&request, size_of::<RoutineCall>())),
    }
}
