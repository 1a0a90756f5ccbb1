//! What becomes of a stack: who gets it when, what it keeps and gives back, and that nothing is left of many threads.
//!
//! What counts, or is held in a system call, runs in a child process, so that nothing else moves the counts.

mod concurrent;
mod crowd;
mod discard;
mod held_in_exit;
mod limits;
mod memory;
mod reuse;
mod soak;
mod zeroed;
