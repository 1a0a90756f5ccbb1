//! glibc's thread creation path, reimplemented: page-aligned stacks with a guard, a cache that keeps
//! them warm, TLS set-up, a raw clone, and typed errors that say which step was refused.
//!
//! A thread of this crate is a glibc thread: `setuid` reaches it, `dlopen` initialises its static
//! TLS, malloc, stdio, gdb, valgrind, `pthread_kill` and `pthread_getattr_np` treat it like any
//! other, and so do Rust's `thread_local!`, panics and `std::thread::park`. Names and semantics are
//! those of `std::thread`; what differs is said where it differs.
//!
//! ```
//! let handle = nptl::Builder::new().name("vcpu0").spawn(|| 6 * 7)?;
//! println!("thread {} runs on {:?}", handle.tid(), handle.stack());
//! assert_eq!(handle.join().unwrap(), 42);
//! # Ok::<(), nptl::SpawnError>(())
//! ```
//!
//! # What a thread of this crate does not do
//! - `std::thread::current().name()` is `None` in it: std offers no way to set it. The kernel's name
//!   and [`current_name`] are right.
//! - `pthread_exit` from a closure aborts the process ("exception not rethrown"), as it does in a
//!   thread of std: a forced unwind cannot pass Rust's `catch_unwind`. A request of
//!   `pthread_cancel` stays pending, because cancellation is disabled in it.
//! - glibc's `pthread_join` and `pthread_detach` refuse it with EINVAL: [`JoinHandle`] does both.
//!
//! # System calls of a thread after its closure has started
//! rt_sigprocmask and exit; madvise with `MADV_DONTNEED` in a detached thread; futex with FUTEX_WAIT and
//! FUTEX_WAKE (private or not) only under contention. A seccomp filter that the closure installs must allow these.
//! The crate uses no allocator at the end of a thread; destructors make calls of their own. `docs/seccomp.md` in the
//! repository lists the calls of every phase.
//!
//! # In a program that forks, catches signals, is cancelled or loads plugins
//! `docs/host.md` in the repository says what holds in each case. In short:
//! - After fork(3) the child can spawn, from the first child handler on. In a child of `_Fork(3)` or of a bare
//!   clone(2), handles answer, and a spawn is refused with [`Step::Runtime`].
//! - The first spawn installs a handler for SIGSEGV and SIGBUS, which passes on every fault that is no overflow of a
//!   stack of this crate: see [`disable_overflow_reports`]. Install your own handler before.
//! - Cancellation is off in the creator during the first spawn and during the analysis of a refusal; a request stays
//!   pending meanwhile.
//! - The first spawn needs glibc's `pthread_create`. Where a filter answers clone3 with EPERM, that fails, and the
//!   spawn is refused with the cause `Seccomp`. Later spawns use clone(2) there.

// These modules have unsafe code; the rest is safe Rust (A9).
#![deny(unsafe_code)]
#![debugger_visualizer(gdb_script_file = "../gdb/nptl.py")]

#[cfg(not(target_os = "linux"))]
compile_error!("nptl reimplements glibc's thread creation and supports Linux only");

mod builder;
mod debug;
pub mod diagnose;
mod errno;
mod error;
mod failures;
#[expect(unsafe_code, reason = "A9")]
mod fork;
mod gate;
mod handle;
#[cfg(feature = "interpose")]
#[expect(unsafe_code, reason = "A9")]
mod interpose;
#[expect(unsafe_code, reason = "A9")]
mod mem;
mod proc;
mod retry;
mod scope;
pub mod seccomp;
mod settings;
mod spawn;
#[expect(unsafe_code, reason = "A9")]
mod stack;
#[expect(unsafe_code, reason = "A9")]
mod start;
mod step;
#[expect(unsafe_code, reason = "A9")]
mod sync;
#[expect(unsafe_code, reason = "A9")]
mod sys;
#[expect(unsafe_code, reason = "A9")]
mod tcb;

pub use builder::{Builder, prepare, spawn};
pub use diagnose::{Cause, Certainty, explain, headroom};
pub use errno::Errno;
pub use error::{Refused, SetupError, SpawnError, StackFate, StackOrigin, StackOutcome, Step};
pub use failures::last_failure;
pub use gate::StartGate;
pub use handle::{JoinHandle, ScopedJoinHandle};
pub use mem::packet::Cancelled;
pub use retry::RetryPolicy;
pub use scope::{Scope, scope};
pub use settings::{CoreScheduling, Scheduler};
pub use stack::cache::StackCache;
pub use stack::overflow::disable_overflow_reports;
pub use stack::{StackCacheConfig, StackCacheStats, StackInfo};
pub use start::{current_name, with_current_name};

/// What the README shows is compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// And what the chapter on VMMs shows.
#[cfg(doctest)]
#[doc = include_str!("../docs/porting.md")]
struct Porting;
