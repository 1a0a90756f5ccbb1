//! What /proc and cgroupfs say.
//!
//! Read while the machine is out of something: without the heap, into small buffers ([`file`]), and a value that
//! cannot be read is absent. Under a system-call filter only files are read, because open, read and close are what
//! nearly every filter allows, while an unexpected call may kill the process ([`status::Calls`]). Parsing is apart
//! from reading: each parser takes the bytes of a file or of a line and has samples of real ones as tests.
//!
//! Two exceptions have the heap: [`processes`] and [`maps`], which only `headroom` reads.

pub(crate) mod cgroup;
pub(crate) mod file;
pub(crate) mod limits;
pub(crate) mod machine;
pub(crate) mod maps;
pub(crate) mod mounts;
pub(crate) mod parse;
pub(crate) mod place;
pub(crate) mod processes;
pub(crate) mod status;
pub(crate) mod task;
