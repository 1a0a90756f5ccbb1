//! What threads wait for, and what a forked child must notice.

mod entrance;
mod latch;
pub(crate) mod lock;
mod notice;

pub(crate) use entrance::Entrance;
pub(crate) use latch::Latch;
pub(crate) use lock::Lock;
pub(crate) use notice::{
    forked_bare, forks, is_watched, note_bare_fork, note_fork, notice_fork, set_up_notice,
};
