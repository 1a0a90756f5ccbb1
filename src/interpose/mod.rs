//! `pthread_create(3)` and its relatives for the whole program: as a global allocator is every `malloc`'s.
//!
//! The exported functions are here; what they do is one of two things ([`Mode`]): `explain` passes every call on to libc,
//! and finds out why one was refused; `threads` makes the threads itself.
//!
//! ```text
//!  program ──► pthread_create, fork, … ──► libc ──► kernel
//!                        │ EAGAIN, ENOMEM
//!                        ▼
//!              diagnose ──► failures (core file) ──► NPTL_REPORT
//! ```

mod c;
mod explain;
mod output;
mod page;
mod real;
mod settings;
mod stack;
mod threads;

use crate::errno::Errno;
use crate::fork;
use explain::{COPIES_MEMORY, ChildStack, SHARES_MEMORY, call};
use libc::{c_char, c_int, c_void, pid_t, pthread_attr_t, pthread_t};
use real::{ThreadMain, ThreadRoutine};
use settings::{Environment, Mode};

/// Makes this crate part of the program (feature `interpose`), so that `pthread_create(3)` and its relatives are this crate's
/// everywhere in it: in std, in other crates, in C code. Write it once, in the program's root.
///
/// A crate that `Cargo.toml` names and no code mentions is not linked, without a word, and then nothing is replaced. That
/// is all that the macro is for: it mentions this crate.
///
/// ```
/// nptl::interpose!();
///
/// let thread = std::thread::spawn(|| nptl::StackCache::global().stats().live_stacks);
/// assert!(thread.join().unwrap() > 0, "a thread of std, on a stack of this crate's");
/// ```
#[macro_export]
macro_rules! interpose {
    () => {
        use $crate::StackCache as _;
    };
}

/// Called by the loader.
#[used]
#[unsafe(link_section = ".init_array")]
static AT_LOAD: extern "C" fn() = {
    extern "C" fn at_load() {
        real::look_up_all();
        // Threads are made with locks that a forked child must not find taken.
        if Environment::get().mode == Mode::Threads {
            let _ = fork::guard();
        }
    }
    at_load
};

/// Called by exit(3), and not by _exit(2).
#[used]
#[unsafe(link_section = ".fini_array")]
static AT_EXIT: extern "C" fn() = {
    extern "C" fn at_exit() {
        output::statistics();
    }
    at_exit
};

/// pthread_create(3)
///
/// # Safety
/// As libc's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn pthread_create(
    thread: *mut pthread_t,
    attributes: *const pthread_attr_t,
    routine: ThreadRoutine,
    argument: *mut c_void,
) -> c_int {
    const NAME: &str = "pthread_create";
    if Environment::get().mode == Mode::Threads {
        // SAFETY: the caller's own arguments.
        let create = || unsafe { threads::create(thread, attributes, routine, argument) };
        if let Some(answer) = explain::own(NAME, create) {
            return answer;
        }
    }
    explain::thread(
        NAME,
        attributes,
        |answer| answer != 0,
        || {
            call(&real::PTHREAD_CREATE, libc::ENOSYS, |create| {
                // SAFETY: the caller's own arguments.
                unsafe { create(thread, attributes, routine, argument) }
            })
        },
    )
}

/// thrd_create(3)
///
/// # Safety
/// As libc's.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn thrd_create(
    thread: *mut pthread_t,
    routine: ThreadMain,
    argument: *mut c_void,
) -> c_int {
    const NAME: &str = "thrd_create";
    /// `thrd_error` and `thrd_nomem` (threads.h).
    const REFUSALS: std::ops::RangeInclusive<c_int> = 2..=3;
    if Environment::get().mode == Mode::Threads {
        // SAFETY: what the function returns in one register is read from there as wide as it is written: by thrd_join.
        let start = unsafe { std::mem::transmute::<ThreadMain, ThreadRoutine>(routine) };
        // SAFETY: the caller's own arguments; null attributes are the process's default.
        let create = || unsafe { threads::create(thread, std::ptr::null(), start, argument) };
        if let Some(answer) = explain::own(NAME, create) {
            return threads::thrd(answer);
        }
    }
    explain::thread(
        NAME,
        std::ptr::null(),
        |answer| REFUSALS.contains(&answer),
        || {
            call(&real::THRD_CREATE, *REFUSALS.start(), |create| {
                // SAFETY: the caller's own arguments.
                unsafe { create(thread, routine, argument) }
            })
        },
    )
}

/// fork(2)
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fork() -> pid_t {
    let answer = call(&real::FORK, -1, |fork| {
        // SAFETY: as for the caller's own call.
        fork::inside(|| unsafe { fork() })
    });
    if answer == -1 {
        explain::refused("fork", Errno::last(), COPIES_MEMORY, ChildStack::NONE);
    }
    answer
}

/// vfork(2)
///
/// # Safety
/// As libc's.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vfork() -> pid_t {
    crate::sys::vfork!(vfork_refused)
}

/// Where a refused vfork(2) goes on, with the error number; it returns to the caller of vfork.
extern "C" fn vfork_refused(errno: c_int) -> c_int {
    let errno = Errno::new(errno);
    errno.leave();
    explain::refused("vfork", errno, SHARES_MEMORY, ChildStack::NONE);
    -1
}

macro_rules! posix_spawn {
    ($name:ident, $real:expr) => {
        /// posix_spawn(3)
        ///
        /// # Safety
        /// As libc's.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name(
            pid: *mut pid_t,
            path: *const c_char,
            actions: *const libc::posix_spawn_file_actions_t,
            attributes: *const libc::posix_spawnattr_t,
            arguments: *const *mut c_char,
            environment: *const *mut c_char,
        ) -> c_int {
            let answer = call(&$real, libc::ENOSYS, |spawn| {
                // SAFETY: the caller's own arguments.
                unsafe { spawn(pid, path, actions, attributes, arguments, environment) }
            });
            if answer != 0 {
                explain::refused(
                    stringify!($name),
                    Errno::new(answer),
                    SHARES_MEMORY,
                    ChildStack::OF_CHILD,
                );
            }
            answer
        }
    };
}

posix_spawn!(posix_spawn, real::POSIX_SPAWN);
posix_spawn!(posix_spawnp, real::POSIX_SPAWNP);

/// clone(2), by libc's wrapper, which is variadic: of what the caller has not given it reads no more than this.
///
/// # Safety
/// As libc's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clone(
    routine: ThreadMain,
    stack: *mut c_void,
    flags: c_int,
    argument: *mut c_void,
    parent_tid: *mut c_void,
    tls: *mut c_void,
    child_tid: *mut c_void,
) -> c_int {
    let answer = call(&real::CLONE, -1, |clone| {
        // SAFETY: the caller's own arguments.
        unsafe { clone(routine, stack, flags, argument, parent_tid, tls, child_tid) }
    });
    if answer == -1 {
        explain::refused(
            "clone",
            Errno::last(),
            explain::task_of(flags),
            ChildStack::NONE,
        );
    }
    answer
}
