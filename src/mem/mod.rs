//! Memory that creator and thread share, and memory that may be refused.

pub(crate) mod fallible;
pub(crate) mod packet;
pub(crate) mod shared;
pub(crate) mod text;

pub(crate) use fallible::{Spare, try_box};
pub(crate) use packet::{Body, Deliver, Packet};
pub(crate) use shared::{Memory, Shared};
