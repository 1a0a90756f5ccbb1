//! A Rust program with the feature `interpose`: std's threads are this crate's, and what is refused to libc's own calls is
//! explained, in both modes.

mod calls;
mod settings;
mod threads;

nptl::interpose!();
