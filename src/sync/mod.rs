//! What threads wait for, and what a forked child must notice.

mod latch;
mod notice;

pub(crate) use latch::{Entered, Latch};
pub(crate) use notice::{forked_bare, note_bare_fork, notice_fork, set_up_notice};
