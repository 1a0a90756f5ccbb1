//! Opening and reading: no heap, buffers on the stack.

use std::ffi::CStr;
use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag};
use nix::sys::stat::{Mode, fstat};
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};

use super::parse;
use crate::mem::text::Text;

/// Which system calls the analysis may make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Calls {
    /// No filter is installed: any.
    Any,
    /// A filter is installed, or it could not be found out: reading files, and the call that was refused.
    FilesOnly,
}

/// Signals that may interrupt a call before it is given up.
const MOST_INTERRUPTIONS: u32 = 8;

pub(crate) fn open(path: &CStr) -> Result<OwnedFd, Errno> {
    open_at(None, path)
}

/// A file by its path from a directory.
pub(crate) fn open_at(directory: Option<&OwnedFd>, path: &CStr) -> Result<OwnedFd, Errno> {
    open_as(directory, path, OFlag::O_RDONLY)
}

/// A directory, for nothing but to open files from it.
pub(crate) fn directory(above: Option<&OwnedFd>, path: &CStr) -> Result<OwnedFd, Errno> {
    open_as(above, path, OFlag::O_PATH | OFlag::O_DIRECTORY)
}

fn open_as(directory: Option<&OwnedFd>, path: &CStr, flags: OFlag) -> Result<OwnedFd, Errno> {
    let directory = directory.map_or(AT_FDCWD, AsFd::as_fd);
    let flags = flags | OFlag::O_CLOEXEC;
    uninterrupted(|| nix::fcntl::openat(directory, path, flags, Mode::empty()))
}

fn read(file: &OwnedFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    uninterrupted(|| nix::unistd::read(file.as_fd(), buffer))
}

fn uninterrupted<T>(mut call: impl FnMut() -> nix::Result<T>) -> Result<T, Errno> {
    for _ in 0..MOST_INTERRUPTIONS {
        match call() {
            Err(nix::errno::Errno::EINTR) => {}
            result => return result.map_err(Errno::of),
        }
    }
    Err(Errno::EINTR)
}

/// Opens a file of /proc and makes sure that it is the kernel's own: lxcfs and container engines mount others over
/// single files. ENODATA if it is not, or if that is not known.
pub(crate) fn open_genuine(path: &CStr, calls: Calls) -> Result<OwnedFd, Errno> {
    let file = open(path)?;
    let genuine = match calls {
        Calls::Any => {
            let filesystem = fstatfs(&file).map_err(Errno::of)?;
            filesystem.filesystem_type() == PROC_SUPER_MAGIC
        }
        // By reading alone: what is mounted over a file is another mount than its directory's. Since Linux 3.15.
        Calls::FilesOnly => {
            let directory = match path.to_bytes().starts_with(b"/proc/sys/") {
                true => c"/proc/sys",
                false => c"/proc",
            };
            let id = mount_id(&file);
            id.is_some() && id == mount_id(&open(directory)?)
        }
    };
    genuine.then_some(file).ok_or(Errno::ENODATA)
}

/// What files of one mount have in common: the device, or by reading alone the number of the mount.
pub(crate) fn mount_of(file: &OwnedFd, calls: Calls) -> Option<u64> {
    match calls {
        Calls::Any => fstat(file).ok().map(|status| status.st_dev),
        Calls::FilesOnly => mount_id(file),
    }
}

fn mount_id(file: &OwnedFd) -> Option<u64> {
    described(file, b"mnt_id:")
}

/// What /proc/thread-self/fdinfo says of an open file.
pub(crate) fn described(file: &OwnedFd, key: &[u8]) -> Option<u64> {
    let mut info = Text::<64>::EMPTY;
    let _ = write!(info, "/proc/thread-self/fdinfo/{}", file.as_raw_fd());
    value_of(&open(info.as_c_str()?).ok()?, key)
}

/// A sysctl: a file of the kernel's own whose whole content is a number.
pub(crate) fn sysctl(path: &CStr, calls: Calls) -> Option<u64> {
    parse_start(&open_genuine(path, calls).ok()?, parse::limit).ok()
}

/// The start of an open file, parsed; ENODATA if the parser finds nothing.
pub(crate) fn parse_start<T>(
    file: &OwnedFd,
    parse: impl FnOnce(&[u8]) -> Option<T>,
) -> Result<T, Errno> {
    // 64 bytes on purpose: sysctl files cost by the size of the buffer offered.
    let mut buffer = [0; 64];
    let length = read(file, &mut buffer)?;
    parse(buffer.get(..length).unwrap_or_default()).ok_or(Errno::ENODATA)
}

/// A file whose whole content is a number, or `max`.
pub(crate) fn read_number(path: &CStr) -> Result<u64, Errno> {
    parse_start(&open(path)?, parse::limit)
}

/// [`read_number`], where the reason why there is none does not matter.
pub(crate) fn number_in(path: &CStr) -> Option<u64> {
    read_number(path).ok()
}

/// The number after `key` in a file of `key value` lines.
pub(crate) fn value_of(file: &OwnedFd, key: &[u8]) -> Option<u64> {
    first_of(file, |line| parse::value(line, key).and_then(parse::number))
}

/// What a parser finds in the first line in which it finds anything.
pub(crate) fn first<T>(path: &CStr, parse: impl FnMut(&[u8]) -> Option<T>) -> Option<T> {
    first_of(&open(path).ok()?, parse)
}

/// The same for an open file.
#[inline(never)]
pub(crate) fn first_of<T>(file: &OwnedFd, mut parse: impl FnMut(&[u8]) -> Option<T>) -> Option<T> {
    let mut found = None;
    lines_of(file, |line| {
        found = parse(line);
        match found {
            Some(_) => ControlFlow::Break(()),
            None => ControlFlow::Continue(()),
        }
    })
    .ok()?;
    found
}

/// Calls `each` for every line that fits the buffer; longer ones are skipped, never cut.
pub(crate) fn lines(path: &CStr, each: impl FnMut(&[u8]) -> ControlFlow<()>) -> Result<(), Errno> {
    lines_of(&open(path)?, each)
}

/// The same for an open file.
pub(crate) fn lines_of(
    file: &OwnedFd,
    mut each: impl FnMut(&[u8]) -> ControlFlow<()>,
) -> Result<(), Errno> {
    pieces(file, |piece| match piece.first && piece.last {
        true => each(piece.text),
        false => ControlFlow::Continue(()),
    })
}

/// A line, or a part of one that does not fit the buffer.
pub(crate) struct Piece<'a> {
    pub(crate) text: &'a [u8],
    /// The line begins, or ends, with it.
    pub(crate) first: bool,
    pub(crate) last: bool,
}

/// Calls `each` for every line, and for each part of a longer one.
pub(crate) fn pieces(
    file: &OwnedFd,
    mut each: impl FnMut(&Piece<'_>) -> ControlFlow<()>,
) -> Result<(), Errno> {
    let mut buffer = [0; 1024];
    let mut filled = 0;
    let mut first = true;
    loop {
        let space = buffer.get_mut(filled..).unwrap_or_default();
        let count = read(file, space)?;
        let end = filled + count;
        let mut rest = buffer.get(..end).unwrap_or_default();
        while let Some(at) = rest.iter().position(|byte| *byte == b'\n') {
            let (text, tail) = rest.split_at(at);
            rest = tail.get(1..).unwrap_or_default();
            let last = true;
            if each(&Piece { text, first, last }).is_break() {
                return Ok(());
            }
            first = true;
        }
        let last = count == 0;
        let kept = rest.len();
        if last && kept > 0 || kept == buffer.len() {
            let piece = Piece {
                text: rest,
                first,
                last,
            };
            if each(&piece).is_break() {
                return Ok(());
            }
            first = false;
            filled = 0;
        } else {
            buffer.copy_within(end - kept..end, 0);
            filled = kept;
        }
        if last {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;

    #[test]
    fn long_lines_are_skipped_and_never_cut() {
        let path = std::env::temp_dir().join(format!("nptl-lines-{}", std::process::id()));
        let long = "x".repeat(1024);
        let whole = "y".repeat(1023);
        let text = format!("first\n{long}\n{whole}\n\n{long}{long}\nlast");
        std::fs::write(&path, text).expect("a file");
        let name = CString::new(path.to_str().expect("UTF-8")).expect("no NUL");
        let mut found = Vec::new();
        let read = lines(&name, |line| {
            found.push(String::from_utf8(line.to_vec()).expect("UTF-8"));
            ControlFlow::Continue(())
        });
        let last = first(&name, |line| {
            line.starts_with(b"last").then_some(line.len())
        });
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(read, Ok(()));
        assert_eq!(found, ["first", &whole, "", "last"]);
        assert_eq!(last, Some(4));
        assert_eq!(
            lines(&name, |_| ControlFlow::Continue(())),
            Err(Errno::ENOENT)
        );
        assert_eq!(read_number(&name), Err(Errno::ENOENT));
        assert_eq!(read_number(c"/proc/self/comm"), Err(Errno::ENODATA));
    }
}
