//! The two Rust builders: std's and ours, used alike.

use std::io;

use nptl::{StackCache, StackCacheConfig};

use super::{Load, Subject, allocate_and_free};

/// The name of [`Std`].
pub const STD: &str = "std";
/// The name of [`Nptl`].
pub const NPTL: &str = "nptl";

/// `std::thread::Builder`.
pub struct Std {
    stack_bytes: usize,
}

impl Std {
    /// Threads of one stack size.
    pub fn new(stack_bytes: usize) -> Std {
        Std { stack_bytes }
    }
}

impl Subject for Std {
    type Handle = std::thread::JoinHandle<()>;

    fn name(&self) -> &'static str {
        STD
    }

    fn start(&self, body: Load) -> io::Result<Self::Handle> {
        let builder = std::thread::Builder::new().stack_size(self.stack_bytes);
        match body {
            Load::Empty => builder.spawn(|| ()),
            Load::Heap => builder.spawn(allocate_and_free),
            Load::Park(gate) => builder.spawn(|| gate.wait()),
        }
    }

    fn join(&self, handle: Self::Handle) {
        handle.join().expect("the bodies do not panic");
    }
}

/// `nptl::Builder`.
pub struct Nptl {
    stack_bytes: usize,
    cache: StackCache,
}

impl Nptl {
    /// Threads of one stack size from the global cache, as a program gets them that configures
    /// nothing.
    pub fn new(stack_bytes: usize) -> Nptl {
        Nptl {
            stack_bytes,
            cache: StackCache::global().clone(),
        }
    }

    /// Threads whose stacks are mapped for each and unmapped after it.
    pub fn cold(stack_bytes: usize) -> Nptl {
        Nptl {
            stack_bytes,
            cache: StackCache::new(StackCacheConfig::disabled()),
        }
    }

    /// Threads whose stacks keep address space and guard, and nothing that was used below the last page.
    pub fn lean(stack_bytes: usize) -> Nptl {
        Nptl {
            stack_bytes,
            cache: StackCache::new(StackCacheConfig::default().keep_resident(0)),
        }
    }

    /// As [`Subject::start`], with our own error.
    pub fn spawn(&self, body: Load) -> Result<nptl::JoinHandle<()>, nptl::SpawnError> {
        let builder = nptl::Builder::new()
            .stack_size(self.stack_bytes)
            .stack_cache(&self.cache);
        match body {
            Load::Empty => builder.spawn(|| ()),
            Load::Heap => builder.spawn(allocate_and_free),
            Load::Park(gate) => builder.spawn(|| gate.wait()),
        }
    }
}

impl Subject for Nptl {
    type Handle = nptl::JoinHandle<()>;

    fn name(&self) -> &'static str {
        NPTL
    }

    fn start(&self, body: Load) -> io::Result<Self::Handle> {
        Ok(self.spawn(body)?)
    }

    fn join(&self, handle: Self::Handle) {
        handle.join().expect("the bodies do not panic");
    }
}
