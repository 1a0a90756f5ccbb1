//! What the overflow handler hands on to the handler that was there before.

mod support;

use support::{case, child};

/// A program that ignores SIGSEGV is sent one, twice: the first must not undo that.
#[test]
fn a_sent_signal_stays_ignored() {
    if case().is_none() {
        child("a_sent_signal_stays_ignored", "run")
            .run()
            .unwrap()
            .success();
        return;
    }
    // SAFETY: SIG_IGN is no code; the signals go to this thread, which ignores them.
    unsafe {
        libc::signal(libc::SIGSEGV, libc::SIG_IGN);
        nptl::spawn(|| ()).unwrap().join().unwrap();
        for _ in 0..2 {
            libc::raise(libc::SIGSEGV);
        }
    }
}
