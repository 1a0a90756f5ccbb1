//! [`Errno`]: an error number. The lowest layer.

use std::{fmt, io};

/// An error number of the kernel or of the C library, as errno(3) lists them. A system-call filter can answer with a
/// number that has no name; it is kept as well.
///
/// Compares with the constants of the `libc` crate, and becomes an [`io::Error`]. Displayed with its meaning.
///
/// ```
/// let refused = nptl::Builder::new().stack_size(usize::MAX).spawn(|| ()).unwrap_err();
/// assert_eq!(refused.errno(), libc::EINVAL);
/// assert_eq!(refused.errno().to_string(), "EINVAL: Invalid argument");
/// let error = std::io::Error::from(refused.errno());
/// assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, thiserror::Error)]
#[error("{self:?}: {}", self.meaning())]
pub struct Errno(i32);

/// Those that this crate compares with.
impl Errno {
    pub(crate) const E2BIG: Errno = Errno(libc::E2BIG);
    pub(crate) const EACCES: Errno = Errno(libc::EACCES);
    pub(crate) const EAGAIN: Errno = Errno(libc::EAGAIN);
    pub(crate) const EBADF: Errno = Errno(libc::EBADF);
    pub(crate) const EBUSY: Errno = Errno(libc::EBUSY);
    #[cfg(feature = "interpose")]
    pub(crate) const EDEADLK: Errno = Errno(libc::EDEADLK);
    pub(crate) const EEXIST: Errno = Errno(libc::EEXIST);
    #[cfg(feature = "interpose")]
    pub(crate) const EFBIG: Errno = Errno(libc::EFBIG);
    pub(crate) const EINTR: Errno = Errno(libc::EINTR);
    pub(crate) const EINVAL: Errno = Errno(libc::EINVAL);
    pub(crate) const ENODATA: Errno = Errno(libc::ENODATA);
    pub(crate) const ENODEV: Errno = Errno(libc::ENODEV);
    pub(crate) const ENOENT: Errno = Errno(libc::ENOENT);
    pub(crate) const ENOMEM: Errno = Errno(libc::ENOMEM);
    pub(crate) const ENOSYS: Errno = Errno(libc::ENOSYS);
    pub(crate) const ENOTDIR: Errno = Errno(libc::ENOTDIR);
    pub(crate) const EOPNOTSUPP: Errno = Errno(libc::EOPNOTSUPP);
    #[cfg(feature = "interpose")]
    pub(crate) const EPIPE: Errno = Errno(libc::EPIPE);
    pub(crate) const EPERM: Errno = Errno(libc::EPERM);
    pub(crate) const ESRCH: Errno = Errno(libc::ESRCH);
    #[cfg(feature = "interpose")]
    pub(crate) const ETIMEDOUT: Errno = Errno(libc::ETIMEDOUT);
}

impl Errno {
    pub(crate) const fn new(raw: i32) -> Errno {
        Errno(raw)
    }

    /// What the last call of the C library that failed has left in `errno`.
    pub(crate) fn last() -> Errno {
        Errno(nix::errno::Errno::last_raw())
    }

    pub(crate) fn clear() {
        nix::errno::Errno::clear();
    }

    /// Makes it the one that [`last`](Self::last) returns.
    #[cfg(feature = "interpose")]
    pub(crate) fn leave(self) {
        nix::errno::Errno::set_raw(self.0);
    }

    /// The outcome of a call of the C library that answers -1 and sets `errno`.
    pub(crate) fn result(answer: impl Into<i64>) -> Result<(), Errno> {
        match answer.into() {
            -1 => Err(Errno::last()),
            _ => Ok(()),
        }
    }

    /// The outcome of a raw system call.
    #[inline(always)]
    pub(crate) fn checked(answer: isize) -> Result<usize, Errno> {
        match answer {
            -4095..0 => Err(Errno(-answer as i32)),
            _ => Ok(answer.cast_unsigned()),
        }
    }

    /// Of a refused mapping.
    pub(crate) fn of_mapping(error: &io::Error) -> Errno {
        error.raw_os_error().map_or(Errno::ENOMEM, Errno)
    }

    /// A method and no `From`, so that nix is no part of the public API.
    pub(crate) fn of(errno: nix::errno::Errno) -> Errno {
        Errno(errno as i32)
    }

    /// The number, such as `libc::EAGAIN`.
    ///
    /// ```
    /// let refused = nptl::Builder::new().stack_size(usize::MAX).spawn(|| ()).unwrap_err();
    /// assert_eq!(refused.errno().raw(), libc::EINVAL);
    /// ```
    pub fn raw(self) -> i32 {
        self.0
    }

    /// Name and meaning, where the number has some.
    fn known(self) -> Option<nix::errno::Errno> {
        let known = nix::errno::Errno::from_raw(self.0);
        (known != nix::errno::Errno::UnknownErrno).then_some(known)
    }

    pub(crate) fn meaning(self) -> &'static str {
        self.known()
            .map_or("an errno without a name", |known| known.desc())
    }
}

/// The name, such as `EAGAIN`, or the number.
impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.known() {
            Some(known) => write!(f, "{known:?}"),
            None => write!(f, "{}", self.0),
        }
    }
}

impl PartialEq<i32> for Errno {
    fn eq(&self, raw: &i32) -> bool {
        self.0 == *raw
    }
}

impl PartialEq<Errno> for i32 {
    fn eq(&self, errno: &Errno) -> bool {
        *self == errno.0
    }
}

impl From<Errno> for i32 {
    fn from(errno: Errno) -> i32 {
        errno.0
    }
}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> io::Error {
        io::Error::from_raw_os_error(errno.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_without_a_name_is_kept() {
        let nameless = Errno::new(4000);
        assert_eq!(nameless.raw(), 4000);
        assert_eq!(format!("{nameless:?}"), "4000");
        assert_eq!(nameless.to_string(), "4000: an errno without a name");
        assert_eq!(io::Error::from(nameless).raw_os_error(), Some(4000));
        assert_eq!(Errno::EAGAIN.to_string(), "EAGAIN: Try again");
    }
}
