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

mod glibc;

pub(crate) use glibc::{Block, BlockState, Enlisted, Parked, Runtime};

use crate::errno::Errno;
use crate::step::Step;

/// Why there is no runtime to stand on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RuntimeError {
    /// The libc is not one this crate can be sure about; the check that said so.
    Unsupported(&'static str),
    /// The calibration thread was refused, as any thread can be. The next spawn tries again.
    Refused {
        /// What refused it.
        step: Step,
        /// The raw errno, before glibc folds it.
        errno: Errno,
        /// The bytes asked for, where memory was refused.
        bytes: usize,
    },
}

impl RuntimeError {
    /// The heap has no memory for what calibration looks at.
    pub(crate) fn no_memory(bytes: usize) -> RuntimeError {
        RuntimeError::Refused {
            step: Step::Allocate,
            errno: Errno::ENOMEM,
            bytes,
        }
    }
}
