//! Mode `threads`: threads that C code creates, on this crate: creation, join and detach, and what pthread_getattr_np(3)
//! says.
//!
//! All else that takes a `pthread_t` is glibc's own code, which finds one of its threads.

mod attributes;
mod create;
mod executable;
mod exports;
mod join;

pub(super) use create::{NotCreated, create};
pub(super) use exports::thrd;
