//! One word of memory that threads of this process can wait on ([futex(2)]).
//!
//! [futex(2)]: https://man7.org/linux/man-pages/man2/futex.2.html

use std::sync::atomic::{AtomicU32, Ordering};

/// A futex word, private to the process.
#[derive(Debug)]
pub(crate) struct Word(AtomicU32);

impl Word {
    pub(crate) const fn new(value: u32) -> Self {
        Word(AtomicU32::new(value))
    }

    /// Changes `from` to `to` (Acquire) and says whether the word was `from`.
    pub(crate) fn change(&self, from: u32, to: u32) -> bool {
        self.0
            .compare_exchange(from, to, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    pub(crate) fn load(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    /// Stores `value` and returns what was there (Acquire and Release).
    pub(crate) fn swap(&self, value: u32) -> u32 {
        self.0.swap(value, Ordering::AcqRel)
    }

    /// What the word is (Acquire).
    pub(crate) fn read(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    /// Changes `from` to `to` (Release) and says whether the word was `from`.
    pub(crate) fn publish(&self, from: u32, to: u32) -> bool {
        self.0
            .compare_exchange(from, to, Ordering::Release, Ordering::Relaxed)
            .is_ok()
    }

    /// Sleeps while the word is `expected`; may return early, so the caller looks again.
    ///
    /// FUTEX_WAIT and FUTEX_WAKE with the private flag, because the system-call filters of VMMs allow
    /// these operations (docs/seccomp.md). The result is ignored: EAGAIN and EINTR both mean "look
    /// again".
    pub(crate) fn wait(&self, expected: u32) {
        // SAFETY: the word is a live, aligned u32, and a null timeout means none. The kernel only
        // reads the word.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.0.as_ptr(),
                libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                expected,
                std::ptr::null::<libc::timespec>(),
            );
        }
    }

    /// Wakes one thread that sleeps in [`Word::wait`].
    pub(crate) fn wake_one(&self) {
        self.wake(1);
    }

    /// Wakes all of them.
    pub(crate) fn wake_all(&self) {
        self.wake(libc::c_int::MAX);
    }

    fn wake(&self, most: libc::c_int) {
        // SAFETY: the word is a live, aligned u32; waking writes nothing.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.0.as_ptr(),
                libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
                most,
            );
        }
    }
}
