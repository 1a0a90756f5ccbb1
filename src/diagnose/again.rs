//! The refused call, made again: what the kernel says between two refusals is what refuses.

use crate::errno::Errno;

use super::cause::{Answer, Unknown};

/// A repetition of the refused call was granted.
pub(super) struct Granted;

/// Makes the refused call once more.
pub(super) type Again<'a> = &'a mut dyn FnMut() -> Result<(), Errno>;

pub(super) struct Repetition<'a> {
    again: Option<Again<'a>>,
    pub(super) count: u32,
    errno: Errno,
}

impl<'a> Repetition<'a> {
    pub(super) fn new(errno: Errno, again: Option<Again<'a>>) -> Repetition<'a> {
        Repetition {
            again,
            count: 0,
            errno,
        }
    }

    /// Whether the call was repeated and refused with the same errno. Without a way to repeat: false.
    pub(super) fn refused(&mut self, seen: &mut Unknown) -> Result<bool, Granted> {
        let Some(again) = self.again.as_mut() else {
            return Ok(false);
        };
        self.count += 1;
        match again() {
            Ok(()) => Err(Granted),
            Err(errno) => {
                seen.oracle.repeated = Answer::Refused(errno);
                Ok(errno == self.errno)
            }
        }
    }

    pub(super) fn is_possible(&self) -> bool {
        self.again.is_some()
    }
}
