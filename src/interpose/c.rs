//! The functions of `nptl.h`. Each has snprintf(3)'s convention: what fits is written, with a NUL at the end if there is
//! any room, and the length that all of it has is returned.

use super::explain::stack_of;
use super::output::Statistics;
use crate::diagnose::headroom;
use crate::failures;
use libc::{c_char, c_int};
use std::fmt::{self, Write};

/// A caller's buffer, and how much was to go into it.
struct Buffer<'a> {
    /// Without the place of the NUL.
    room: &'a mut [u8],
    needed: usize,
}

impl Write for Buffer<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let from = text.as_bytes();
        let to = self.room.get_mut(self.needed..).unwrap_or_default();
        to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        self.needed += from.len();
        Ok(())
    }
}

/// # Safety
/// `buffer` has `size` bytes, or `size` is 0.
unsafe fn fill(
    buffer: *mut c_char,
    size: usize,
    text: impl FnOnce(&mut Buffer<'_>) -> fmt::Result,
) -> c_int {
    let all: &mut [u8] = match size {
        0 => &mut [],
        // SAFETY: the caller's promise; zeroed, so that what is not written to is a NUL.
        _ => unsafe {
            buffer.write_bytes(0, size);
            std::slice::from_raw_parts_mut(buffer.cast(), size)
        },
    };
    let room = all.split_last_mut().map_or(&mut [][..], |(_, room)| room);
    let mut buffer = Buffer { room, needed: 0 };
    let _ = text(&mut buffer);
    c_int::try_from(buffer.needed).unwrap_or(c_int::MAX)
}

/// The last refusal of this process: a line, and the report. Empty if there was none.
///
/// # Safety
/// `buffer` has `size` bytes, or `size` is 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nptl_last_failure(buffer: *mut c_char, size: usize) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { fill(buffer, size, |buffer| failures::write_last(buffer)) }
}

/// How full every limit is that this process can meet when it makes a thread: a line for each, and which is reached first
/// by threads with the process's default stack. Takes milliseconds and
/// allocates; the first call starts a thread, to learn what one takes.
///
/// # Safety
/// `buffer` has `size` bytes, or `size` is 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nptl_headroom(buffer: *mut c_char, size: usize) -> c_int {
    // SAFETY: the caller's promise.
    unsafe {
        fill(buffer, size, |buffer| {
            let headroom = headroom();
            write!(buffer, "{headroom}")?;
            let stack = stack_of(std::ptr::null()).size;
            match headroom.first(stack) {
                Some((first, threads)) => {
                    let title = first.cause.title();
                    let most = threads.end();
                    writeln!(
                        buffer,
                        "first reached: {title}, after {most} more threads of {stack} bytes at most"
                    )
                }
                None => Ok(()),
            }
        })
    }
}

/// What `NPTL_STATS` writes at exit.
///
/// # Safety
/// `buffer` has `size` bytes, or `size` is 0.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn nptl_stats(buffer: *mut c_char, size: usize) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { fill(buffer, size, |buffer| write!(buffer, "{Statistics}")) }
}
