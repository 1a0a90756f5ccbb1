//! glibc 2.34 and newer: docs/glibc.md, turned into code rule by rule (G1 to G34).
//!
//! ```text
//!   block_size bytes, page-aligned at both ends
//!  ┌──────────────────┬─────────────────────────────┬──────────────────────────┐
//!  │ (alignment)      │ static TLS of every module  │ struct pthread           │ high
//!  └──────────────────┴─────────────────────────────┴──────────────────────────┘
//!                                                   ▲ thread pointer
//! ```

mod block;
mod calibrate;
mod dtv;
mod list;
mod lookup;
mod prepare;
mod pthread;
mod release;
mod runtime;
mod symbols;

pub(crate) use block::{Block, BlockState, Parked};
pub(crate) use prepare::Enlisted;
pub(crate) use runtime::Runtime;
