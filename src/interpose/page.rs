//! Text on its way to a file or to stderr.

use crate::errno::Errno;
use crate::mem::text::Text;
use crate::sys::Quiet;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use std::ffi::CStr;
use std::fmt::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};

/// Holds the longest report, with the program's name.
pub(super) type ReportText = Text<4096>;

/// A line about a setting.
pub(super) fn complain(line: fmt::Arguments<'_>) {
    let mut page = ReportText::EMPTY;
    let _ = writeln!(page, "nptl: {line}");
    write_to(None, page);
}

/// The file of a variable, or stderr: which is also where it goes if the file cannot be opened.
pub(super) fn write_to(file: Option<(&str, &CStr)>, mut page: ReportText) {
    page.mark_cut();
    // A reader of stderr that has gone, or a file that may not grow, is no reason for the program to end.
    let quiet = Quiet::new();
    let write = |to: BorrowedFd<'_>, page: &ReportText| {
        let written = nix::unistd::write(to, page.as_bytes());
        quiet.took(written.map(drop).map_err(Errno::of));
    };
    let flags = OFlag::O_WRONLY | OFlag::O_APPEND | OFlag::O_CREAT | OFlag::O_CLOEXEC;
    // Of a FIFO without a reader it makes a refusal.
    let flags = flags | OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    if let Some((variable, path)) = file {
        match nix::fcntl::open(path, flags, Mode::from_bits_truncate(0o644)) {
            Ok(file) => return write(file.as_fd(), &page),
            Err(errno) => {
                let mut line = ReportText::EMPTY;
                let path = path.to_string_lossy();
                let _ = writeln!(
                    line,
                    "nptl: {variable}={path} cannot be opened: {}",
                    Errno::of(errno)
                );
                write(std::io::stderr().as_fd(), &line);
            }
        }
    }
    write(std::io::stderr().as_fd(), &page);
}
