//! What each side may do with what creator and thread share, without its types.

use std::thread::Result as Outcome;

/// The thread's work, without its types.
pub(crate) trait Body: Send + Sync {
    /// What comes before the closure in the same thread, once: `false` if it failed. Does not unwind.
    fn set_up(&self) -> bool {
        true
    }

    /// Runs the closure and keeps its result, or its panic. Does not unwind.
    fn run(&self);

    /// Says that the closure will not run: it is dropped with the packet. Does not unwind.
    fn cancel(&self);
}

/// The handle's view of a packet.
pub(crate) trait Deliver<T>: Send + Sync {
    /// The result, once, if the thread has stored it.
    fn take(&self) -> Option<Outcome<T>>;
}
