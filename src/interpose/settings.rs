//! What the environment asks for: read once, when the object is loaded or at the first call, whichever is earlier.

use std::ffi::{CStr, c_char};
use std::sync::OnceLock;

/// `NPTL_MODE`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// glibc makes every thread; a refusal is explained.
    Explain,
    /// Threads are made by this crate.
    Threads,
}

impl Mode {
    /// Who turns the feature on in a program of theirs asks for its threads. Who preloads a library into a program of
    /// others asks what it costs first.
    const DEFAULT: Mode = match cfg!(feature = "preload") {
        true => Mode::Explain,
        false => Mode::Threads,
    };
}

#[derive(Debug)]
pub(super) struct Settings {
    pub(super) mode: Mode,
}

static SETTINGS: OnceLock<Settings> = OnceLock::new();

impl Settings {
    pub(super) fn get() -> &'static Settings {
        SETTINGS.get_or_init(|| Settings {
            mode: match variable(c"NPTL_MODE") {
                Some(b"explain") => Mode::Explain,
                Some(b"threads") => Mode::Threads,
                _ => Mode::DEFAULT,
            },
        })
    }
}

/// A variable of the environment; none has a value in a set-id program.
fn variable(name: &CStr) -> Option<&'static [u8]> {
    unsafe extern "C" {
        fn secure_getenv(name: *const c_char) -> *const c_char;
    }
    // SAFETY: the name is NUL-terminated. What is found is NUL-terminated too, and stays while the program does not
    // change its environment.
    unsafe {
        let value = secure_getenv(name.as_ptr());
        (!value.is_null()).then(|| CStr::from_ptr(value).to_bytes())
    }
}
