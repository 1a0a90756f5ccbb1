//! A value that many share, changed for a moment.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::unistd::{Pid, pipe2};

/// A file's content (a sysctl), changed until this value is dropped.
///
/// A second process, the guardian, writes the old value back as well: when the first one is gone, however it
/// ended, or when the longest time is over. It stands outside the process group, and no signal but SIGKILL ends it.
pub struct GuardedFile {
    file: File,
    old: String,
    guardian: Pid,
    /// Its end shows the guardian that this process is gone.
    alive: Option<OwnedFd>,
}

impl GuardedFile {
    pub fn change(path: &Path, value: &str, longest: Duration) -> Result<GuardedFile, String> {
        GuardedFile::prepare(path, value, longest).map_err(|e| format!("{}: {e}", path.display()))
    }

    fn prepare(path: &Path, value: &str, longest: Duration) -> io::Result<GuardedFile> {
        let old = std::fs::read_to_string(path)?.trim_end().to_owned();
        // Not created or cut: it is a file of the kernel's.
        let file = File::options().write(true).open(path)?;
        let (alive_end, alive) = pipe2(OFlag::O_CLOEXEC)?;
        let (ready, ready_end) = pipe2(OFlag::O_CLOEXEC)?;
        let milliseconds = i32::try_from(longest.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: the child makes only system calls, on what was prepared before, and never returns.
        let guardian = match unsafe { libc::fork() } {
            -1 => return Err(io::Error::last_os_error()),
            0 => stand_guard(&file, &old, &alive_end, &ready_end, milliseconds),
            pid => Pid::from_raw(pid),
        };
        drop((alive_end, ready_end));
        let guarded = GuardedFile {
            file,
            old,
            guardian,
            alive: Some(alive),
        };
        // Before the guardian stands, nothing may be changed.
        let mut byte = [0];
        File::from(ready).read_exact(&mut byte)?;
        (&guarded.file).write_all(value.as_bytes())?;
        Ok(guarded)
    }
}

impl Drop for GuardedFile {
    fn drop(&mut self) {
        // At the start: further on the kernel takes it for a part of what was written before, and ignores it.
        let written = self.file.write_all_at(self.old.as_bytes(), 0);
        // And the guardian once more: it may have been the one to be right, if the write has failed.
        drop(self.alive.take());
        let ended = nix::sys::wait::waitpid(self.guardian, None);
        if let (Err(error), Err(_)) = (written, ended) {
            eprintln!("{:?} could not be written back: {error}", self.old);
        }
    }
}

/// The guardian's whole life.
fn stand_guard(file: &File, old: &str, alive: &OwnedFd, ready: &OwnedFd, milliseconds: i32) -> ! {
    let keep = [file.as_raw_fd(), alive.as_raw_fd(), ready.as_raw_fd()];
    // SAFETY: system calls on plain numbers and valid places, in a forked child that uses no other descriptor.
    unsafe {
        // Signals to the group of the first process, a terminal's included, do not come here.
        libc::setsid();
        libc::prctl(libc::PR_SET_PDEATHSIG, 0);
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
        // Above all our copy of the pipe's other end, which would keep it open; and the parent's pipes, whose
        // readers wait for the end of them.
        for fd in 0..1024 {
            if !keep.contains(&fd) {
                libc::close(fd);
            }
        }
        libc::write(ready.as_raw_fd(), c"r".as_ptr().cast(), 1);
        libc::close(ready.as_raw_fd());
        let mut entry = libc::pollfd {
            fd: alive.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        while libc::poll(&raw mut entry, 1, milliseconds) == -1 {}
        libc::pwrite(file.as_raw_fd(), old.as_ptr().cast(), old.len(), 0);
        libc::_exit(0)
    }
}
