//! Words and numbers of the kernel's text files.

/// A limit that does not limit.
pub(crate) const UNLIMITED: u64 = u64::MAX;

/// The first decimal number of a text.
pub(crate) fn number(text: &[u8]) -> Option<u64> {
    let text = text.trim_ascii_start();
    let length = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    std::str::from_utf8(text.get(..length)?).ok()?.parse().ok()
}

/// A number, or the kernel's word for none.
pub(crate) fn limit(text: &[u8]) -> Option<u64> {
    match text.trim_ascii() {
        b"max" | b"unlimited" => Some(UNLIMITED),
        digits => number(digits),
    }
}

/// A size in KiB, as bytes.
pub(crate) fn kib(text: &[u8]) -> Option<u64> {
    number(text)?.checked_mul(1024)
}

/// A whole text of hexadecimal digits.
pub(crate) fn hexadecimal(text: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(text.trim_ascii()).ok()?, 16).ok()
}

/// What follows `key` and a blank in a line.
pub(crate) fn value<'a>(line: &'a [u8], key: &[u8]) -> Option<&'a [u8]> {
    let rest = line.strip_prefix(key)?;
    rest.first()?.is_ascii_whitespace().then_some(rest)
}

pub(crate) fn words(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(u8::is_ascii_whitespace)
        .filter(|word| !word.is_empty())
}

/// Whether a list of ranges (`0-3,8`) has a number.
pub(crate) fn list_has(list: &[u8], wanted: u64) -> bool {
    list.trim_ascii().split(|byte| *byte == b',').any(|range| {
        let mut ends = range.splitn(2, |byte| *byte == b'-').map(number);
        let first = ends.next().flatten();
        let last = ends.next().map_or(first, |last| last);
        first <= Some(wanted) && first.is_some() && Some(wanted) <= last
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(number(b"127\n"), Some(127));
        assert_eq!(number(b"\t  8192 kB"), Some(8192));
        assert_eq!(number(b"18446744073709551615"), Some(UNLIMITED));
        assert_eq!(number(b"18446744073709551616"), None);
        for none in [&b""[..], b"kB", b"-1", b"max"] {
            assert_eq!(number(none), None);
        }
        assert_eq!(limit(b"max\n"), Some(UNLIMITED));
        assert_eq!(limit(b"unlimited"), Some(UNLIMITED));
        assert_eq!(limit(b"4096\n"), Some(4096));
        assert_eq!(limit(b"maximum"), None);
        assert_eq!(kib(b"    1024 kB"), Some(1 << 20));
        assert_eq!(kib(b"18446744073709551615 kB"), None);
        assert_eq!(hexadecimal(b"\t000001ffffffffff"), Some(0x1ff_ffff_ffff));
        assert_eq!(hexadecimal(b"0x1"), None);
    }

    #[test]
    fn a_value_follows_its_whole_key() {
        assert_eq!(value(b"max 12", b"max"), Some(&b" 12"[..]));
        assert_eq!(value(b"max_usage 12", b"max"), None);
        assert_eq!(value(b"max", b"max"), None);
        let fields: Vec<_> = words(b"  1024 \t 4096   files ").collect();
        assert_eq!(fields, [&b"1024"[..], b"4096", b"files"]);
    }

    #[test]
    fn lists_of_ranges() {
        let has = |list: &[u8]| -> Vec<u64> { (0..12).filter(|n| list_has(list, *n)).collect() };
        assert_eq!(has(b"0-2,5,9-10\n"), [0, 1, 2, 5, 9, 10]);
        assert_eq!(has(b"3"), [3]);
        assert_eq!(has(b"\n"), []);
        assert_eq!(has(b""), []);
    }
}
