//! Memory that creator and thread share, and memory that may be refused.

mod body;
mod entered;
mod fallible;
pub(crate) mod packet;
mod setup;
mod shared;
pub(crate) mod text;

pub(crate) use body::{Body, Deliver};
pub(crate) use entered::Entered;
pub(crate) use fallible::{Spare, try_box};
pub(crate) use packet::{Packet, With};
pub(crate) use setup::{Failure, SetupPacket};
pub(crate) use shared::{Memory, Shared};
