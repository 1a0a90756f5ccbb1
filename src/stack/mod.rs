//! The memory of threads: mappings, guards, and the cache that hands them out again.

pub(crate) mod cache;
mod caps;
mod config;
mod idle;
mod info;
mod layout;
mod ledger;
mod life;
mod mapping;
mod message;
pub(crate) mod overflow;
#[cfg(feature = "interpose")]
mod posix;
mod record;
#[cfg(feature = "interpose")]
mod roll;

pub use config::{StackCacheConfig, StackCacheStats};
pub(crate) use idle::{Idle, RefusedStack, Wanted, bytes_around, rounded};
pub use info::StackInfo;
pub(crate) use ledger::Ledger;
pub(crate) use message::{Settings, Start, Work};
#[cfg(feature = "interpose")]
pub(crate) use posix::is_joined_by;
pub(crate) use record::{RECORDS, Records, Stack};
