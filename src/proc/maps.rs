//! /proc/PID/maps: the room between mappings. Has the heap: a line is as long as the path of a file.

use super::machine;
use super::parse::hexadecimal;

/// Where a process's addresses end, with four levels of page tables (more are given on request only).
const END: u64 = 0x7fff_ffff_f000;

/// Kept free below a stack that grows (`stack_guard_gap`, 256 pages).
const BELOW_STACK: u64 = 256 << 12;

/// What an LSM adds to the sysctl, which shows its own part only (`CONFIG_LSM_MMAP_MIN_ADDR`).
const LSM_MIN_ADDR: u64 = 64 << 10;

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Maps {
    pub(crate) count: u64,
    /// Bytes in all ranges that mmap can still give out.
    pub(crate) free: u64,
    /// The longest range that mmap can still give out, in bytes.
    pub(crate) largest_gap: u64,
}

impl Maps {
    pub(crate) fn read(directory: &str) -> Option<Maps> {
        let text = std::fs::read(format!("{directory}/maps")).ok()?;
        let lowest = machine::mmap_min_addr().unwrap_or(0).max(LSM_MIN_ADDR);
        Maps::parse(&text, lowest)
    }

    pub(crate) fn parse(text: &[u8], lowest: u64) -> Option<Maps> {
        let mut maps = Maps {
            count: 0,
            free: 0,
            largest_gap: 0,
        };
        let mut free_from = lowest;
        for line in text.split(|byte| *byte == b'\n') {
            // Not a mapping of the process but a page of the kernel's.
            if line.is_empty() || line.ends_with(b"[vsyscall]") {
                continue;
            }
            maps.count += 1;
            let range = line.split(|byte| *byte == b' ').next()?;
            let mut ends = range.split(|byte| *byte == b'-').map(hexadecimal);
            let (start, end) = (ends.next()??, ends.next()??);
            let kept = match line.ends_with(b"[stack]") {
                true => BELOW_STACK,
                false => 0,
            };
            let gap = start.saturating_sub(kept).saturating_sub(free_from);
            maps.add(gap);
            free_from = free_from.max(end);
        }
        maps.add(END.saturating_sub(free_from));
        Some(maps)
    }

    fn add(&mut self, gap: u64) {
        self.free = self.free.saturating_add(gap);
        self.largest_gap = self.largest_gap.max(gap);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_between_mappings() {
        let text = b"00400000-00452000 r-xp 00000000 08:02 173521      /usr/bin/a program\n\
            7ffff7dd7000-7ffff7dfd000 r-xp 00000000 08:02 135522    /usr/lib/ld.so\n\
            7ffffffde000-7ffffffff000 rw-p 00000000 00:00 0         [stack]\n\
            ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]\n";
        let maps = Maps::parse(text, LSM_MIN_ADDR).expect("maps");
        assert_eq!(maps.count, 3);
        assert_eq!(maps.largest_gap, 0x7fff_f7dd_7000 - 0x0045_2000);
        // Nothing else: below the stack that grows, less what is kept.
        let stack = b"7ffffffde000-7ffffffff000 rw-p 00000000 00:00 0 [stack]\n";
        let maps = Maps::parse(stack, 0).expect("maps");
        assert_eq!(maps.largest_gap, 0x7fff_fffd_e000 - BELOW_STACK);
        assert_eq!(Maps::parse(b"", 0).map(|maps| maps.largest_gap), Some(END));
        assert_eq!(Maps::parse(b"no range", 0), None);
        assert!(Maps::read("/proc/self").is_some_and(|maps| maps.count > 3));
    }
}
