//! Refusals: every step can be refused, says so, and leaves nothing behind; nothing is allocated on the way, and the
//! evidence may be out of sight. Then what a builder can be asked for, what `headroom` predicts, and the sandbox itself.

mod attributes;
mod cgroups;
mod failure;
mod gated;
mod headroom;
mod heap;
mod no_alloc;
mod no_memory;
mod retry;
mod sandbox;
mod stack_use;
mod unreadable;
mod user;
