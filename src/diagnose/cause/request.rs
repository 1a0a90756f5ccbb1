//! Refused by this crate, before any system call.

use std::fmt::{Formatter, Result};

use super::show::{Evidence, line};

/// The caller configured something impossible.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct InvalidAttribute {
    /// Which attribute.
    pub what: &'static str,
    /// The configured value.
    pub value: u64,
}

impl Evidence for InvalidAttribute {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "invalid {}: {}", self.what, self.value)
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        line(f, self.what, self.value)
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str("Choose a value that the documentation allows.")
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        vec![InvalidAttribute {
            what: "stack and guard exceed the address space",
            value: 1 << 63,
        }]
    }
}

/// The C library did not pass the checks made before its structures are trusted.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct UnsupportedRuntime {
    /// Which check failed.
    pub what: &'static str,
}

impl Evidence for UnsupportedRuntime {
    fn line(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "unsupported C library: {}", self.what)
    }

    fn report(&self, f: &mut Formatter<'_>) -> Result {
        line(f, "failed check", self.what)
    }

    fn remedy(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str("Run on a glibc from 2.34 on, dynamically linked, or report the failed check.")
    }

    #[cfg(test)]
    fn samples() -> Vec<Self> {
        let what = "symbol _dl_allocate_tls";
        vec![UnsupportedRuntime { what }]
    }
}
