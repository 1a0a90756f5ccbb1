//! What a `pthread_attr_t` contains, by the public getters.

use crate::settings::{Cpus, Scheduler};
use crate::sys::{KernelSigSet, page_size, sched};
use libc::{c_int, c_void, pthread_attr_t};
use std::mem::MaybeUninit;

unsafe extern "C" {
    fn pthread_getattr_default_np(attributes: *mut pthread_attr_t) -> c_int;
    fn pthread_attr_getaffinity_np(
        attributes: *const pthread_attr_t,
        size: usize,
        set: *mut u64,
    ) -> c_int;
    fn pthread_attr_getdetachstate(attributes: *const pthread_attr_t, state: *mut c_int) -> c_int;
    fn pthread_attr_getsigmask_np(
        attributes: *const pthread_attr_t,
        mask: *mut libc::sigset_t,
    ) -> c_int;
}

/// Words for the CPUs of the largest kernel, and one more: where no set was given, all bits of that are 1.
const CPU_WORDS: usize = sched::WORDS + 1;

/// What a thread is to have.
pub(super) struct Attributes {
    /// Bytes of stack.
    pub size: usize,
    /// Bytes of guard, in whole pages.
    pub guard: usize,
    /// The program brings the stack, or names CPUs that no kernel has.
    pub is_unusual: bool,
    pub is_detached: bool,
    /// Policy and priority, unless they are inherited.
    pub scheduling: Option<(c_int, c_int)>,
    pub affinity: Affinity,
    /// The signals that are blocked, if not the creator's.
    pub blocked: Option<KernelSigSet>,
}

impl Attributes {
    /// Null: the default of the process. `Err` is that of pthread_getattr_default_np(3).
    ///
    /// # Safety
    /// Null, or initialised attributes.
    pub(super) unsafe fn read(attributes: *const pthread_attr_t) -> Result<Attributes, c_int> {
        if !attributes.is_null() {
            // SAFETY: by the caller's promise.
            return Ok(unsafe { Attributes::of(attributes) });
        }
        let mut default = MaybeUninit::uninit();
        // SAFETY: initialises what is read, and destroyed, after that.
        unsafe {
            match pthread_getattr_default_np(default.as_mut_ptr()) {
                0 => {}
                errno => return Err(errno),
            }
            let attributes = Attributes::of(default.as_ptr());
            libc::pthread_attr_destroy(default.as_mut_ptr());
            Ok(attributes)
        }
    }

    /// # Safety
    /// Initialised attributes.
    unsafe fn of(attributes: *const pthread_attr_t) -> Attributes {
        let (mut size, mut guard, mut state, mut stack, mut length) =
            (0, 0, 0, std::ptr::null_mut::<c_void>(), 0);
        // SAFETY: by the caller's promise; each has a place for its answer.
        unsafe {
            libc::pthread_attr_getstacksize(attributes, &raw mut size);
            libc::pthread_attr_getguardsize(attributes, &raw mut guard);
            pthread_attr_getdetachstate(attributes, &raw mut state);
            libc::pthread_attr_getstack(attributes, &raw mut stack, &raw mut length);
        }
        let page = page_size();
        // Without a stack of the program's its top is address 0.
        let has_stack = stack.addr().wrapping_add(length) != 0;
        // SAFETY: initialised, by the caller's promise.
        let affinity = unsafe { affinity(attributes) };
        Attributes {
            size,
            guard: guard.checked_next_multiple_of(page).unwrap_or(guard),
            is_unusual: has_stack || matches!(affinity, Affinity::Unknown),
            is_detached: state == libc::PTHREAD_CREATE_DETACHED,
            // SAFETY: initialised, by the caller's promise.
            scheduling: unsafe { scheduling(attributes) },
            affinity,
            // SAFETY: initialised, by the caller's promise.
            blocked: unsafe { blocked(attributes) },
        }
    }

    pub(super) fn scheduler(&self) -> Option<Scheduler> {
        let (policy, priority) = self.scheduling?;
        let priority = priority.cast_unsigned();
        Some(match policy {
            libc::SCHED_FIFO => Scheduler::Fifo { priority },
            libc::SCHED_RR => Scheduler::RoundRobin { priority },
            // sched_setscheduler(2), which glibc calls, leaves the nice value as it is.
            _ => Scheduler::Other {
                // SAFETY: takes plain numbers; 0 is the calling thread.
                nice: unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) },
            },
        })
    }
}

/// # Safety
/// Initialised attributes.
unsafe fn scheduling(attributes: *const pthread_attr_t) -> Option<(c_int, c_int)> {
    let (mut inherit, mut policy) = (0, 0);
    let mut parameter = MaybeUninit::<libc::sched_param>::zeroed();
    // SAFETY: by the caller's promise; each has a place for its answer.
    unsafe {
        libc::pthread_attr_getinheritsched(attributes, &raw mut inherit);
        if inherit != libc::PTHREAD_EXPLICIT_SCHED {
            return None;
        }
        libc::pthread_attr_getschedpolicy(attributes, &raw mut policy);
        libc::pthread_attr_getschedparam(attributes, parameter.as_mut_ptr());
        Some((policy, parameter.assume_init().sched_priority))
    }
}

/// The CPUs that a thread may run on.
pub(super) enum Affinity {
    Inherited,
    Set(Cpus),
    /// There was no memory for the set.
    NoMemory,
    /// It has CPUs that no kernel has.
    Unknown,
}

/// # Safety
/// Initialised attributes.
unsafe fn affinity(attributes: *const pthread_attr_t) -> Affinity {
    let mut words = MaybeUninit::<[u64; CPU_WORDS]>::uninit();
    // SAFETY: by the caller's promise, with room for that many bytes, all of which are written if the answer is 0.
    let words = unsafe {
        let place = words.as_mut_ptr().cast();
        match pthread_attr_getaffinity_np(attributes, size_of_val(&words), place) {
            0 => words.assume_init_ref(),
            _ => return Affinity::Unknown,
        }
    };
    match words {
        [.., u64::MAX] => Affinity::Inherited,
        [set @ .., 0] => {
            let last = set.iter().rposition(|word| *word != 0).unwrap_or(0);
            let set = set.get(..=last).and_then(Cpus::of_words);
            set.map_or(Affinity::NoMemory, Affinity::Set)
        }
        _ => Affinity::Unknown,
    }
}

/// # Safety
/// Initialised attributes.
unsafe fn blocked(attributes: *const pthread_attr_t) -> Option<KernelSigSet> {
    let mut mask = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: by the caller's promise, with a place for the set, whose first word is the kernel's.
    unsafe {
        match pthread_attr_getsigmask_np(attributes, mask.as_mut_ptr()) {
            0 => Some(mask.as_ptr().cast::<KernelSigSet>().read()),
            // PTHREAD_ATTR_NO_SIGMASK_NP
            _ => None,
        }
    }
}
