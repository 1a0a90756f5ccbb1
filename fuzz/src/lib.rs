//! The parsers of `src/proc` for cargo-fuzz: the crate's own files, not its public interface.
#![allow(dead_code, clippy::wrong_self_convention, reason = "the crate's own files, of which the parsers are used")]

#[path = "../../src/errno.rs"]
mod errno;
mod parsers;
#[path = "../../src/proc/mod.rs"]
mod proc;
#[path = "../../src/mem/text.rs"]
mod text;

mod mem {
    pub(crate) use crate::text;
}

/// Runs the parser of that name.
pub fn run(name: &str, text: &[u8]) {
    let parser = parsers::PARSERS.iter().find(|parser| parser.0 == name);
    parser.expect("a parser of this name").1(text);
}
