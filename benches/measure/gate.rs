//! A futex word that threads park on: the cheapest way to keep many threads alive.

use std::sync::atomic::{AtomicU32, Ordering};

/// Closed until opened; counts who has arrived.
///
/// The floor's child waits here in assembly, hence the fixed layout.
#[repr(C)]
pub struct Gate {
    open: AtomicU32,
    arrived: AtomicU32,
}

impl Gate {
    /// A closed gate.
    pub const fn new() -> Gate {
        Gate {
            open: AtomicU32::new(0),
            arrived: AtomicU32::new(0),
        }
    }

    /// Parks until the gate is open.
    pub fn wait(&self) {
        self.arrived.fetch_add(1, Ordering::Relaxed);
        while self.open.load(Ordering::Acquire) == 0 {
            // SAFETY: the futex word lives in `self`; a wait has no other effect than to block.
            unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    self.open.as_ptr(),
                    libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                    0,
                    std::ptr::null::<libc::timespec>(),
                );
            }
        }
    }

    /// Returns once `threads` have arrived since the gate was last closed.
    pub fn await_arrivals(&self, threads: usize) {
        while self.arrived() < threads {
            std::thread::yield_now();
        }
    }

    /// Threads that have arrived since the gate was last closed.
    pub fn arrived(&self) -> usize {
        self.arrived.load(Ordering::Relaxed) as usize
    }

    /// Lets everyone through, those who have not arrived yet included.
    pub fn open(&self) {
        self.open.store(1, Ordering::Release);
        // SAFETY: as in `wait`; a wake only ends waits.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.open.as_ptr(),
                libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
                i32::MAX,
            );
        }
    }

    /// Closes the gate for the next crowd; everyone of the last one must have been joined.
    pub fn close(&self) {
        self.arrived.store(0, Ordering::Relaxed);
        self.open.store(0, Ordering::Release);
    }
}
