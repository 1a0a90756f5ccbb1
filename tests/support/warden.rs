//! Threads held at the entry of a system call, for as long as a test wants.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex};

use super::{Call, Listener, listen};

/// Holds the next call of chosen threads, and lets all others pass.
pub struct Warden {
    listener: Listener,
    state: Mutex<WardenState>,
    changed: Condvar,
}

#[derive(Default)]
struct WardenState {
    /// Threads whose next call is to be held.
    wanted: Vec<i32>,
    held: Vec<Call>,
}

impl Warden {
    /// For these system calls. Only the calling thread, and those it starts from now on, are behind its filter.
    pub fn new(calls: &[libc::c_long]) -> Result<Arc<Warden>, String> {
        // The thread that answers must be outside, so it has to be there first.
        let (send, receive) = std::sync::mpsc::channel::<Arc<Warden>>();
        std::thread::spawn(move || {
            let Ok(warden) = receive.recv() else { return };
            while let Some(call) = warden.listener.next() {
                let mut state = warden.state.lock().unwrap();
                if state.wanted.contains(&call.tid) {
                    state.held.push(call);
                    warden.changed.notify_all();
                } else {
                    warden.listener.proceed(&call);
                }
            }
        });
        let warden = Arc::new(Warden {
            listener: listen(calls)?,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        send.send(Arc::clone(&warden)).map_err(|e| e.to_string())?;
        Ok(warden)
    }

    /// From now on, until it is released.
    pub fn hold(&self, tid: i32) {
        self.state.lock().unwrap().wanted.push(tid);
    }

    /// Returns when the thread stands in its call.
    pub fn wait_until_held(&self, tid: i32) {
        let held = |state: &WardenState| state.held.iter().any(|call| call.tid == tid);
        let state = self.state.lock().unwrap();
        drop(
            self.changed
                .wait_while(state, |state| !held(state))
                .unwrap(),
        );
    }

    /// Lets it go on, and does not hold it again.
    pub fn release(&self, tid: i32) {
        let mut state = self.state.lock().unwrap();
        state.wanted.retain(|&wanted| wanted != tid);
        state.held.retain(|call| {
            if call.tid == tid {
                self.listener.proceed(call);
            }
            call.tid != tid
        });
    }

    /// Lets all go on, and holds no more.
    pub fn release_all(&self) {
        let mut state = self.state.lock().unwrap();
        state.wanted.clear();
        state
            .held
            .drain(..)
            .for_each(|call| self.listener.proceed(&call));
    }
}

/// Waits until the kernel has cleared a thread's tid word: a pidfd shows the end of what comes after that.
pub fn wait_for_end(pidfd: &OwnedFd) {
    let mut entry = libc::pollfd {
        fd: pidfd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid entry.
    let answer = unsafe { libc::poll(&raw mut entry, 1, 60_000) };
    assert_eq!(answer, 1, "the thread never ends");
}
