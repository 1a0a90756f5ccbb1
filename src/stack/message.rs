//! [`Start`]: the message of a creator to its thread, which stays in the thread's record.

use crate::mem::{Body, Entered, Memory, Shared};
use crate::settings::Stages;
use crate::sync::Latch;
use crate::sys::KernelSigSet;
use crate::tcb::Runtime;

/// What the creator hands to the new thread.
pub(crate) struct Start {
    /// The closure and the place for its result, kept alive by both sides. `None` from the end of its life on.
    pub body: Option<Shared<dyn Body>>,
    /// Left when the body is gone: in this order, also where the message is dropped.
    pub latch: Option<Entered>,
    /// Of the body, if the thread had the last reference.
    pub memory: Option<Memory>,
    pub runtime: &'static Runtime,
    pub name: Option<Shared<String>>,
    /// The signal mask of the closure.
    pub mask: KernelSigSet,
    /// Its creator has registered rseq.
    pub rseq: bool,
    pub settings: Settings,
}

/// What a thread sets for itself before the closure runs.
pub(crate) struct Settings {
    /// As many bytes of the name as `comm` holds, NUL-terminated.
    pub comm: Option<[u8; 16]>,
    /// Handle overflows on the signal stack.
    pub signal_stack: bool,
    /// What can be refused, and what the closure waits for. Stays in the message, like the latch: an ending thread must
    /// not be the one that frees it.
    pub stages: Option<Shared<Stages>>,
}

/// What a thread is to run.
#[derive(Clone, Copy)]
pub(crate) enum Work<'a> {
    Free(&'a Shared<dyn Body>),
    /// In a scope, which waits until its latch is empty before anything ends that the closure borrows from.
    Scoped(&'a Shared<dyn Body + 'a>, &'a Shared<Latch>),
}

impl Work<'_> {
    /// For the message to the thread, which leaves the latch only after its reference to the body is gone.
    pub(crate) fn share(self) -> (Shared<dyn Body>, Option<Entered>) {
        match self {
            Work::Free(body) => (body.clone(), None),
            Work::Scoped(body, latch) => {
                let entered = Entered::new(latch);
                // SAFETY: each message enters the latch, and leaves it only after its reference to the body is gone; a
                // scope does not return before its latch is empty (`scope::scope` waits in every case, panics
                // included). The references that stay with the creator and with the scoped handle are dropped in the
                // borrow's lifetime, which both have in their types.
                (unsafe { body.clone().outlive() }, Some(entered))
            }
        }
    }
}
