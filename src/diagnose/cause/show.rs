//! What each cause has to say, and the words that several share.

use std::fmt::{Display, Formatter, Result};

use crate::mem::text::InlinePath;
use crate::proc::parse::UNLIMITED;

/// A cause with its evidence.
pub(super) trait Evidence {
    /// One line: the limit, how full it is, and where it is set.
    fn line(&self, f: &mut Formatter<'_>) -> Result;

    /// The lines of the evidence: each value, and the file or call it was read from.
    fn report(&self, f: &mut Formatter<'_>) -> Result;

    /// What to change, as an administrator would.
    fn remedy(&self, f: &mut Formatter<'_>) -> Result;

    /// One for each text that it can have, for `golden.txt`.
    #[cfg(test)]
    fn samples() -> Vec<Self>
    where
        Self: Sized;
}

/// A line of the evidence.
pub(super) fn line(f: &mut Formatter<'_>, what: &str, value: impl Display) -> Result {
    writeln!(f, "  {what}: {value}")
}

/// A value that may be absent or unlimited.
pub(super) struct Value(pub(super) Option<u64>);

impl Display for Value {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self.0 {
            None => f.write_str("not readable"),
            Some(UNLIMITED) => f.write_str("unlimited"),
            Some(value) => write!(f, "{value}"),
        }
    }
}

/// A size that may be absent or unlimited.
pub(super) struct Size(pub(super) Option<u64>);

impl Display for Size {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match self.0 {
            Some(bytes) if bytes >= 1 << 20 && bytes != UNLIMITED => {
                // In whole numbers: a hundredth of a MiB is enough to compare with.
                let hundredths = u128::from(bytes) * 100 / (1 << 20);
                let (whole, part) = (hundredths / 100, hundredths % 100);
                write!(f, "{bytes} bytes ({whole}.{part:02} MiB)")
            }
            Some(bytes) if bytes != UNLIMITED => write!(f, "{bytes} bytes"),
            other => Value(other).fmt(f),
        }
    }
}

/// How a sysctl is kept: the same words everywhere.
pub(super) const KEEP: &str = " (and /etc/sysctl.d/*.conf to keep it)";

/// The command that sets a file of a cgroup, with its name quoted for a shell where that is needed; a name that
/// was cut would lead elsewhere.
pub(super) fn set(
    f: &mut Formatter<'_>,
    value: &str,
    directory: &InlinePath,
    file: &str,
) -> Result {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-:@+=,".contains(byte);
    match directory.to_str() {
        Some(path) if path.bytes().all(|byte| plain(&byte)) => {
            write!(f, "echo {value} > {path}/{file}")
        }
        Some(path) if !path.contains('\'') => write!(f, "echo {value} > '{path}/{file}'"),
        _ => write!(f, "Raise {file} of that cgroup"),
    }
}

/// The systemd unit that a cgroup's directory is named after.
pub(super) struct UnitOf<'a>(pub(super) &'a InlinePath);

impl Display for UnitOf<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let name = self.0.to_str().and_then(|path| path.rsplit('/').next());
        let kinds = [".service", ".scope", ".slice"];
        let unit = name.filter(|name| kinds.iter().any(|kind| name.ends_with(kind)));
        f.write_str(unit.unwrap_or("UNIT"))
    }
}

/// A path that is longer than what is kept of one.
#[cfg(test)]
pub(super) fn cut_path() -> InlinePath {
    InlinePath::new(format!("/sys/fs/cgroup/{}", "x".repeat(4096)).as_bytes())
}
