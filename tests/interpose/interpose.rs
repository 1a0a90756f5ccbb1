//! A Rust program with the feature `interpose`: std's threads are this crate's, and what is refused to libc's own calls is
//! explained, in both modes.

mod calls;
mod settings;
mod threads;

nptl::interpose!();

/// How a line says which program was refused.
fn program() -> String {
    let comm = std::fs::read_to_string("/proc/self/comm").expect("a name");
    format!(" program={:?} pid={}", comm.trim_end(), std::process::id())
}
