//! [`Entrance`]: where threads wait until they are let in, or sent away.

use crate::sys::futex::Word;

const CLOSED: u32 = 0;
const OPEN: u32 = 1;
const CANCELLED: u32 = 2;

/// One word, decided once:
///
/// ```text
///  CLOSED ──► OPEN | CANCELLED     by the first that decides
/// ```
/// A thread that waits can neither be missed nor overtaken: the kernel compares the word with CLOSED before it lets the
/// thread sleep, and each thread finds the same answer, however late it comes.
#[derive(Debug)]
pub(crate) struct Entrance(Word);

impl Entrance {
    pub(crate) fn new() -> Entrance {
        Entrance(Word::new(CLOSED))
    }

    /// Lets all in, or sends all away. The first decision stays.
    pub(crate) fn decide(&self, open: bool) {
        // What the caller did before happened before the closures that are let in.
        if self.0.publish(CLOSED, if open { OPEN } else { CANCELLED }) {
            self.0.wake_all();
        }
    }

    /// Waits for the decision. Returns `true` if the thread may go in.
    pub(crate) fn wait(&self) -> bool {
        loop {
            match self.0.read() {
                CLOSED => self.0.wait(CLOSED),
                decided => return decided == OPEN,
            }
        }
    }
}
