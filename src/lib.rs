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
//!   thread of std: a forced unwind cannot pass Rust's `catch_unwind`. `pthread_cancel` stays
//!   pending, because cancellation is disabled.
//! - glibc's `pthread_join` and `pthread_detach` refuse it with EINVAL: [`JoinHandle`] does both.
//!
//! # System calls of a thread after its closure has started
//! rt_sigprocmask, madvise with `MADV_DONTNEED`, and exit; futex with FUTEX_WAIT and FUTEX_WAKE
//! (private or not) only under contention; munmap only where a detached thread's stack pushes others
//! out of the cache. A seccomp filter installed by the closure must allow these.
//! The crate uses no allocator at the end of a thread; destructors make calls of their own.

// Four rooms have unsafe code; the rest is safe Rust (rule 9 of the architecture).
#![deny(unsafe_code)]
#![debugger_visualizer(gdb_script_file = "../gdb/nptl.py")]

#[cfg(not(target_os = "linux"))]
compile_error!("nptl reimplements glibc's thread creation and supports Linux only");

mod builder;
#[expect(unsafe_code, reason = "rule 9")]
mod clone;
mod debug;
pub mod diagnose;
mod error;
mod failures;
#[expect(unsafe_code, reason = "rule 9")]
mod fork;
mod handle;
#[expect(unsafe_code, reason = "rule 9")]
mod mem;
mod proc;
mod retry;
mod scope;
mod spawn;
#[expect(unsafe_code, reason = "rule 9")]
mod stack;
#[expect(unsafe_code, reason = "rule 9")]
mod start;
mod step;
#[expect(unsafe_code, reason = "rule 9")]
mod sync;
#[expect(unsafe_code, reason = "rule 9")]
mod tcb;

pub use builder::{Builder, spawn};
pub use diagnose::{
    Answer, Cause, CauseKind, Causes, Certainty, CgroupPlace, CloneCall, Headroom, HeadroomLimit,
    InlinePath, MemoryOracle, Oracle, PidLevel, Unit, headroom, headroom_of,
};
pub use error::{SpawnError, StackFate, StackOrigin, StackOutcome, Step};
pub use failures::last_failure;
pub use handle::{JoinHandle, ScopedJoinHandle};
pub use retry::RetryPolicy;
pub use scope::{Scope, scope};
pub use stack::StackInfo;
pub use stack::cache::{StackCache, StackCacheConfig, StackCacheStats};
pub use stack::overflow::disable_overflow_reports;
pub use start::current_name;

/// What the README shows is compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
