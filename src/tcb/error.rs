//! [`RuntimeError`]: why no thread of this libc can be made.

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
        /// The bytes that were requested, where memory was refused.
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
