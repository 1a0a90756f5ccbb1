//! Life in a host program: one that forks and registers fork handlers, starts its first thread in an unusual place, is
//! cancelled, changes its user, or protects mutexes by priority.
//!
//! Runs on the system's glibc and on newer ones. Everything happens in child processes.

mod bare;
mod calibration;
mod chain;
mod child;
mod dlopen;
mod ending;
mod endings;
mod fork;
mod gdb;
mod interposed;
mod overflow;
mod process;
mod recycled_tid;
mod setid;
mod shared_object;
mod signals;
mod storm;

use std::ffi::{CString, c_void};
use std::path::PathBuf;
use std::process::Command;

use support::wait_until;

/// A shared object, in a folder that goes with it.
struct Library(PathBuf);

impl Library {
    /// Compiles `source`. `Err`: why that cannot be done here.
    fn compile(name: &str, source: &str) -> Result<Library, String> {
        let folder = std::env::temp_dir().join(format!("nptl-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let library = Library(folder);
        let file = library.0.join("library.c");
        std::fs::write(&file, source).map_err(|e| e.to_string())?;
        let mut command = Command::new("gcc");
        let command = command.args(["-shared", "-fPIC", "-O1", "-o"]);
        let output = command.args([&library.path(), &file]).output();
        let output = output.map_err(|e| format!("no gcc: {e}"))?;
        assert!(output.status.success(), "{output:?}");
        Ok(library)
    }

    fn path(&self) -> PathBuf {
        self.0.join("library.so")
    }

    fn open(&self) -> *mut c_void {
        let path = CString::new(self.path().into_os_string().into_encoded_bytes()).unwrap();
        // SAFETY: a library of the test's; its constructor calls a function of the test's.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        assert!(!handle.is_null(), "dlopen");
        handle
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn spawn_and_join() {
    let handle = nptl::spawn(|| 7).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(handle.join().expect("its end"), 7);
}

/// In a child: what the handle of a thread of the parent answers.
#[track_caller]
fn assert_gone<T>(handle: &nptl::JoinHandle<T>) {
    assert!(handle.is_finished());
    for signal in [0, libc::SIGTERM] {
        assert_eq!(support::errno(handle.kill(signal)), Some(libc::ESRCH));
    }
    assert_eq!(support::errno(handle.pidfd()), Some(libc::ESRCH));
}
