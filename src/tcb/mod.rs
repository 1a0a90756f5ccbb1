//! The block the thread pointer points at: what a libc must provide to make a cloned task one of
//! its own threads.
//!
//! A libc is one folder in here. It exports [`Runtime`] with
//! - `get`: calibrated and self-checked once, or a typed [`RuntimeError`], never a guess;
//! - `block_size`, `thread_pointer_in`: where the block lies above a stack;
//! - `enlist`, which prepares a block, makes it known to the libc and gives it its TLS images;
//! - `enter`, `run_destructors`, `mark_exiting`, `leave_list`: what the new thread itself does first and last;
//! - `reap`: what an ended thread has left to the owner of its block;
//! - `retire`: what must be saved or freed before a block's memory goes away;
//! - `release`: frees what was saved.

mod error;
mod glibc;

pub(crate) use error::RuntimeError;
pub(crate) use glibc::{Block, BlockState, Enlisted, Parked, Runtime};
