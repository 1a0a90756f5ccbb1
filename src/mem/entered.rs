//! [`Entered`]: a thread's part in the scope that it was started in.

use super::shared::Shared;
use crate::sync::Latch;

/// A closure that may still use what the scope borrows. Dropping it leaves the scope.
pub(crate) struct Entered {
    latch: Shared<Latch>,
    inside: bool,
}

impl Entered {
    /// Holds the scope open while the value lives.
    pub(crate) fn new(latch: &Shared<Latch>) -> Entered {
        latch.enter();
        Entered {
            latch: latch.clone(),
            inside: true,
        }
    }

    pub(crate) fn is_of(&self, latch: &Shared<Latch>) -> bool {
        self.latch.is(latch)
    }

    /// Leaves the scope, once. The latch itself stays until this is dropped: an ending thread must not be the one that
    /// frees it.
    pub(crate) fn leave(&mut self) {
        if std::mem::take(&mut self.inside) {
            Latch::leave(&self.latch);
        }
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.leave();
    }
}
