//! What a virtual machine monitor needs of its threads: settings in force before the closure, setups that can fail,
//! gates, control of a living thread, and system-call filters.
//!
//! Runs on the system's glibc and on newer ones, and (modules `gate` and `setup`) under valgrind.

mod example;
mod filters;
mod gate;
mod kick;
mod settings;
mod setup;
mod unified;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use support::wait_until;

/// What is moved into closures: counts how often one of its kind was dropped.
struct Moved(Arc<AtomicUsize>);

impl Moved {
    fn counter() -> Arc<AtomicUsize> {
        Arc::default()
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}
