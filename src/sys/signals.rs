//! The mask of blocked signals.

use super::arch::syscall;
#[cfg(feature = "interpose")]
use crate::errno::Errno;

/// The kernel's `sigset_t`: bit `n - 1` is signal `n`.
pub(crate) type KernelSigSet = u64;

/// Every signal but glibc's 33 (set-id): for the time from taking the list's lock to a clone's end. 32
/// is blocked, because a new thread is not yet ready to be cancelled.
const ALL_BUT_SETXID: KernelSigSet = !(1 << 32);

/// Every signal but the two that belong to glibc: 32 (cancel) and 33 (set-id). They must stay
/// deliverable wherever a thread waits for the list lock, or a set-id broadcast, which holds that
/// lock, waits for this thread for ever (G3).
pub(crate) const APPLICATION: KernelSigSet = !((1 << 31) | (1 << 32));

/// rt_sigprocmask(2) with `SIG_SETMASK`; the mask that was there before.
#[inline(always)]
pub(crate) fn set_signal_mask(mask: KernelSigSet) -> KernelSigSet {
    let mut old: KernelSigSet = 0;
    // SAFETY: both sets are eight bytes on this stack; changing one's own mask is memory-safe.
    unsafe {
        syscall(
            libc::SYS_rt_sigprocmask,
            [
                libc::SIG_SETMASK as usize,
                (&raw const mask) as usize,
                (&raw mut old) as usize,
                size_of::<KernelSigSet>(),
                0,
                0,
            ],
        )
    };
    old
}

/// The creator's signals while it spawns. Dropped, it restores the mask that was there.
pub(crate) struct Signals {
    old: KernelSigSet,
}

impl Signals {
    /// Blocks all but SIGSETXID, which stays unblocked because the next step waits for the list's lock (G3),
    /// before clone and after a refused one.
    pub(crate) fn block_all_but_setxid() -> Signals {
        Signals {
            old: set_signal_mask(ALL_BUT_SETXID),
        }
    }

    /// Blocks all but SIGSETXID and SIGSYS: a filter can have a call made by its handler, and kills if that is blocked.
    #[cfg(feature = "interpose")]
    pub(crate) fn block_all_but_filters() -> Signals {
        const SIGSYS: KernelSigSet = 1 << (libc::SIGSYS - 1);
        Signals {
            old: set_signal_mask(ALL_BUT_SETXID & !SIGSYS),
        }
    }

    /// The mask of a new thread's closure: the creator's, or the one that was configured; never with SIGCANCEL and
    /// SIGSETXID (G4).
    pub(crate) fn of_thread(&self, blocked: Option<KernelSigSet>) -> KernelSigSet {
        blocked.unwrap_or(self.old) & APPLICATION
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        set_signal_mask(self.old);
    }
}

/// While this lives, signals wait, and a write that fails ([`took`](Self::took)) sends none.
#[cfg(feature = "interpose")]
pub(crate) struct Quiet {
    _signals: Signals,
    /// Signals that waited before.
    pending: KernelSigSet,
}

#[cfg(feature = "interpose")]
impl Quiet {
    pub(crate) fn new() -> Quiet {
        let mut pending: KernelSigSet = 0;
        let signals = Signals::block_all_but_filters();
        let place = (&raw mut pending) as usize;
        // SAFETY: the kernel writes eight bytes there.
        unsafe {
            let size = size_of::<KernelSigSet>();
            syscall(libc::SYS_rt_sigpending, [place, size, 0, 0, 0, 0]);
        }
        Quiet {
            _signals: signals,
            pending,
        }
    }

    /// Takes back the signal that a failed write has sent to this thread.
    pub(crate) fn took(&self, written: Result<(), Errno>) {
        let signal = match written {
            Err(Errno::EPIPE) => libc::SIGPIPE,
            Err(Errno::EFBIG) => libc::SIGXFSZ,
            _ => return,
        };
        let set: KernelSigSet = 1 << (signal - 1);
        if self.pending & set != 0 {
            return;
        }
        let now = [0_usize; 2];
        let [set, now] = [(&raw const set) as usize, (&raw const now) as usize];
        // SAFETY: a set and a time-out of zero, which outlive the call; it writes nothing.
        unsafe {
            let size = size_of::<KernelSigSet>();
            syscall(libc::SYS_rt_sigtimedwait, [set, 0, now, size, 0, 0]);
        }
    }
}
