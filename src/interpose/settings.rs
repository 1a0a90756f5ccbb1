//! What the environment configures, read once: when the object is loaded, or at a call that comes before that. A set-id
//! program gets the defaults.

use super::page::complain;
use crate::stack::StackCacheConfig;
use crate::stack::cache::StackCache;
use std::ffi::{CStr, CString, OsStr, c_char};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
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
    /// The author of a program who turns the feature on wants its threads. A user who preloads a library into another's
    /// program gets the threads that there were.
    const DEFAULT: Mode = match cfg!(feature = "preload") {
        true => Mode::Explain,
        false => Mode::Threads,
    };
}

/// As the variable has it.
impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::Explain => "explain",
            Mode::Threads => "threads",
        })
    }
}

/// `NPTL_REPORT`
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ReportTo {
    Stderr,
    File(CString),
    Nowhere,
}

#[derive(Debug)]
pub(super) struct Environment {
    pub(super) mode: Mode,
    pub(super) report: ReportTo,
    /// `NPTL_STATS`: where the statistics go when the process exits.
    pub(super) statistics: Option<CString>,
}

static SETTINGS: OnceLock<Environment> = OnceLock::new();

impl Environment {
    pub(super) fn get() -> &'static Environment {
        SETTINGS.get_or_init(Environment::read)
    }

    fn read() -> Environment {
        let settings = Environment {
            mode: read(
                c"NPTL_MODE",
                "explain or threads",
                Mode::DEFAULT,
                |value| match value {
                    b"explain" => Some(Mode::Explain),
                    b"threads" => Some(Mode::Threads),
                    _ => None,
                },
            ),
            report: read(
                c"NPTL_REPORT",
                "stderr, none or a file",
                ReportTo::Stderr,
                |value| match value {
                    b"stderr" => Some(ReportTo::Stderr),
                    b"none" => Some(ReportTo::Nowhere),
                    value => path(value).map(ReportTo::File),
                },
            ),
            statistics: read(c"NPTL_STATS", "a file", None, |value| path(value).map(Some)),
        };
        let resident = read(c"NPTL_CACHE_RESIDENT", "a number of bytes", None, |value| {
            let number = std::str::from_utf8(value).ok()?;
            number.parse().ok().map(Some)
        });
        if let Some(bytes) = resident {
            let config = StackCacheConfig::default().resident_budget(bytes);
            StackCache::global().set_config(config);
        }
        settings
    }
}

/// What a variable of the environment says; `default` if it is not set, or, with a line about it, if it is wrong.
fn read<T>(name: &CStr, allowed: &str, default: T, parse: impl FnOnce(&[u8]) -> Option<T>) -> T {
    let Some(value) = variable(name) else {
        return default;
    };
    parse(value).unwrap_or_else(|| {
        complain(format_args!(
            "{}={} is ignored: it takes {allowed}",
            name.to_string_lossy(),
            OsStr::from_bytes(value).display(),
        ));
        default
    })
}

/// As it is now, for a program that changes its directory later.
fn path(value: &[u8]) -> Option<CString> {
    let absolute = std::path::absolute(OsStr::from_bytes(value)).ok()?;
    CString::new(absolute.into_os_string().as_bytes()).ok()
}

/// A variable of the environment; none has a value in a set-id program.
fn variable(name: &CStr) -> Option<&'static [u8]> {
    unsafe extern "C" {
        fn secure_getenv(name: *const c_char) -> *const c_char;
    }
    // SAFETY: the name is NUL-terminated. What is found is, too, and stays as it is until the program changes its
    // environment: which is not before this returns.
    unsafe {
        let value = secure_getenv(name.as_ptr());
        (!value.is_null()).then(|| CStr::from_ptr(value).to_bytes())
    }
}
