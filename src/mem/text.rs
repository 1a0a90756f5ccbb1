//! Text without the heap, and what is lost where it does not fit.

use std::ffi::{CStr, OsStr};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Written where something was cut.
pub(crate) const CUT: &str = "...";

/// At most `N` bytes of text, mostly a path, and whether there were more.
///
/// The layout is read by `gdb/nptl.py`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Text<const N: usize> {
    length: u32,
    /// 0 from `length` on.
    bytes: [u8; N],
    truncated: bool,
}

impl<const N: usize> Text<N> {
    pub(crate) const EMPTY: Text<N> = Text {
        length: 0,
        bytes: [0; N],
        truncated: false,
    };

    pub(crate) fn new(bytes: &[u8]) -> Text<N> {
        let mut text = Text::EMPTY;
        text.push(bytes);
        text
    }

    /// Adds what fits. What comes after a cut is left out, too.
    pub(crate) fn push(&mut self, more: &[u8]) {
        let start = self.length as usize;
        let room = if self.truncated { 0 } else { N - start };
        let count = character_boundary(more, room);
        if let Some((to, from)) = self
            .bytes
            .get_mut(start..start + count)
            .zip(more.get(..count))
        {
            to.copy_from_slice(from);
            self.length += count as u32;
        }
        self.truncated |= count < more.len();
    }

    /// Takes everything from `length` on away. What was cut once stays marked as cut.
    pub(crate) fn shorten(&mut self, length: usize) {
        if let Some(tail) = self.bytes.get_mut(length..) {
            tail.fill(0);
            self.length = self.length.min(length as u32);
        }
    }

    /// Puts [`CUT`] at the end of what was cut, for a reader of the bytes alone.
    pub(crate) fn mark_cut(&mut self) {
        if std::mem::take(&mut self.truncated) {
            self.shorten(character_boundary(self.as_bytes(), N - CUT.len()));
            self.push(CUT.as_bytes());
            self.truncated = true;
        }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length as usize).unwrap_or_default()
    }

    pub(crate) fn clear(&mut self) {
        self.shorten(0);
        self.truncated = false;
    }

    /// The text, or `None` if it is empty, was cut, or is not UTF-8.
    #[expect(clippy::wrong_self_convention, reason = "std's name, and no copy")]
    pub(crate) fn to_str(&self) -> Option<&str> {
        if self.truncated || self.is_empty() {
            return None;
        }
        std::str::from_utf8(self.as_bytes()).ok()
    }

    /// For the kernel; `None` if it was cut.
    pub(crate) fn as_c_str(&self) -> Option<&CStr> {
        if self.truncated {
            return None;
        }
        CStr::from_bytes_until_nul(&self.bytes).ok()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Whether there was more.
    pub(crate) fn is_truncated(&self) -> bool {
        self.truncated
    }
}

impl<const N: usize> fmt::Write for Text<N> {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        self.push(more.as_bytes());
        Ok(())
    }
}

/// The path of a file or directory, without the heap: at most 253 bytes. Of a longer path the beginning is kept, and
/// `...` after it, so that it names nothing. Empty if the path is not known.
///
/// ```
/// use nptl::diagnose::{Cause, InlinePath};
/// fn directory(cause: &Cause) -> Option<&InlinePath> {
///     match cause {
///         Cause::PidsCgroup(cgroup) => Some(&cgroup.directory).filter(|path| !path.is_empty()),
///         _ => None,
///     }
/// }
/// let error = nptl::Builder::new().stack_size(usize::MAX).spawn(|| ()).unwrap_err();
/// assert_eq!(directory(error.cause()), None);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct InlinePath(Text<253>);

impl InlinePath {
    pub(crate) const EMPTY: InlinePath = InlinePath(Text::EMPTY);

    pub(crate) fn new(bytes: &[u8]) -> InlinePath {
        let mut text = Text::new(bytes);
        text.mark_cut();
        InlinePath(text)
    }

    /// The bytes that are kept.
    ///
    /// ```
    /// fn is_below(path: &nptl::diagnose::InlinePath, root: &[u8]) -> bool {
    ///     path.as_bytes().starts_with(root)
    /// }
    /// ```
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }

    /// The path, or `None` if it is not known, was cut, or is not UTF-8.
    ///
    /// ```
    /// fn show(path: &nptl::diagnose::InlinePath) -> &str {
    ///     path.to_str().unwrap_or("(not known)")
    /// }
    /// ```
    pub fn to_str(&self) -> Option<&str> {
        self.0.to_str()
    }

    /// Whether the path is not known, or not visible to this process.
    ///
    /// ```
    /// fn is_known(path: &nptl::diagnose::InlinePath) -> bool {
    ///     !path.is_empty()
    /// }
    /// ```
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the real path is longer.
    ///
    /// ```
    /// fn can_be_opened(path: &nptl::diagnose::InlinePath) -> bool {
    ///     !path.is_empty() && !path.is_truncated()
    /// }
    /// ```
    pub fn is_truncated(&self) -> bool {
        self.0.is_truncated()
    }
}

impl AsRef<Path> for InlinePath {
    fn as_ref(&self) -> &Path {
        Path::new(OsStr::from_bytes(self.as_bytes()))
    }
}

impl fmt::Display for InlinePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.as_bytes().utf8_chunks() {
            f.write_str(chunk.valid())?;
            if !chunk.invalid().is_empty() {
                f.write_str("\u{fffd}")?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for InlinePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// The largest number of bytes, at most `most`, that ends between two characters.
pub(crate) fn character_boundary(text: &[u8], most: usize) -> usize {
    let mut length = text.len().min(most);
    // A byte that continues a character does not begin the rest.
    while length > 0 && text.get(length).is_some_and(|byte| byte & 0xC0 == 0x80) {
        length -= 1;
    }
    length
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;

    fn written<const N: usize>(parts: &[&str]) -> String {
        let mut text = Text::<N>::EMPTY;
        for part in parts {
            text.write_str(part).expect("never fails");
        }
        text.mark_cut();
        String::from_utf8_lossy(text.as_bytes()).into_owned()
    }

    #[test]
    fn what_does_not_fit_is_cut_between_characters_and_marked() {
        assert_eq!(written::<7>(&["four", "ly"]), "fourly");
        assert_eq!(written::<7>(&["seven b", ""]), "seven b");
        assert_eq!(written::<7>(&["eight by"]), "eigh...");
        assert_eq!(written::<7>(&["eight b", "y", "more"]), "eigh...");
        // Three bytes each.
        assert_eq!(written::<8>(&["€€€"]), "€...");
        assert_eq!(written::<9>(&["€€€", "!"]), "€€...");
        assert_eq!(written::<9>(&["€€€"]), "€€€");
    }

    #[test]
    fn a_path_that_was_cut_is_not_handed_out() {
        let whole = "/".to_owned() + &"€".repeat(84);
        assert_eq!(whole.len(), InlinePath::EMPTY.0.bytes.len());
        for (path, shown) in [
            (whole.clone(), whole.clone()),
            (format!("{whole}/"), format!("{}...", &whole[..250])),
            (format!("/{whole}"), format!("/{}...", &whole[..247])),
            (format!("//{whole}"), format!("//{}...", &whole[..247])),
        ] {
            let inline = InlinePath::new(path.as_bytes());
            assert_eq!(inline.to_string(), shown);
            assert_eq!(inline.as_ref(), Path::new(&shown));
            assert_eq!(inline.to_str().is_none(), shown.ends_with("..."));
            assert_eq!(inline.is_truncated(), shown.ends_with("..."));
        }
        assert_eq!(InlinePath::EMPTY.to_str(), None);
        assert_eq!(InlinePath::new(b"/\xff").to_string(), "/\u{fffd}");
    }

    #[test]
    fn the_kernel_gets_whole_paths_only() {
        let mut path = Text::<8>::new(b"/a");
        path.push(b"/b");
        assert_eq!(path.as_c_str(), Some(c"/a/b"));
        path.shorten(2);
        assert_eq!(path.as_c_str(), Some(c"/a"));
        // No room for the NUL, and no room at all.
        assert_eq!(Text::<8>::new(b"/2345678").as_c_str(), None);
        assert_eq!(Text::<8>::new(b"/23456789").as_c_str(), None);
        path.push(b"/a long name");
        path.shorten(2);
        assert_eq!((path.as_bytes(), path.as_c_str()), (&b"/a"[..], None));
    }

    #[test]
    fn the_mark_replaces_whole_characters() {
        for (text, marked) in [
            ("12345678", "12345678"),
            ("123456789", "12345..."),
            ("12€€€", "12€..."),
        ] {
            let mut kept = Text::<8>::new(text.as_bytes());
            kept.mark_cut();
            assert_eq!(kept.as_bytes(), marked.as_bytes());
        }
    }
}
