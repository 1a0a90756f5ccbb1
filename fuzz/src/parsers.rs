//! Every parser of `src/proc`, by name: takes any bytes, and neither panics nor loops. The including crate has the
//! modules `proc` and `mem`.

use crate::mem::text::Text;
use crate::proc::limits::{Limit, Limited};
use crate::proc::machine::{LoadAverage, MemInfo, parse_version};
use crate::proc::mounts::{Mount, lists, unescape};
use crate::proc::status::Status;
use crate::proc::{maps, parse, place, task};
use std::hint::black_box;

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n')
}

/// A parser and a text that it finds something in.
pub type Parser = (&'static str, fn(&[u8]), &'static [u8]);

pub const PARSERS: [Parser; 10] = [
    (
        "status",
        |text| {
            let mut status = Status::default();
            lines(text).for_each(|line| status.take(line));
            black_box(&status);
        },
        b"Uid:\t0\t0\nTracerPid:\t7\nNSpid:\t4\t7\nVmSize:\t  2 kB\nCapEff:\t0000a\nSeccomp:\t2\nx86_Thread_features:\tshstk\n",
    ),
    (
        "limits",
        |text| {
            use Limited::{AddressSpace, Data, LockedMemory, Processes};
            for limited in [Processes, AddressSpace, Data, LockedMemory] {
                lines(text).for_each(|line| {
                    black_box(Limit::parse(line, limited));
                });
            }
        },
        b"Max processes             63431                63431                processes\nMax data size  unlimited unlimited bytes\n",
    ),
    (
        "meminfo",
        |text| {
            let mut info = MemInfo::default();
            lines(text).for_each(|line| info.take(line));
            black_box(&info);
        },
        b"MemTotal:  8146768 kB\nCommitLimit:  4073384 kB\nCommitted_AS: 2 kB\nSwapTotal: 0 kB\n",
    ),
    (
        "loadavg",
        |text| {
            black_box(LoadAverage::parse(text));
        },
        b"0.20 0.18 0.12 1/80 11206\n",
    ),
    (
        "version",
        |text| {
            black_box(parse_version(text));
        },
        b"6.18.44-fc",
    ),
    (
        "maps",
        |text| {
            black_box(maps::Maps::parse(text, 65_536));
        },
        b"00400000-00452000 r-xp 00000000 08:02 173521 /bin/a\n7ffffffde000-7ffffffff000 rw-p 0 00:00 0 [stack]\n",
    ),
    (
        "mountinfo",
        |text| {
            for line in lines(text) {
                if let Some(mount) = Mount::parse(line) {
                    black_box(lists(mount.options, b"pids"));
                    let mut point = Text::<64>::EMPTY;
                    unescape(mount.point, &mut point);
                    assert!(point.as_bytes().len() <= mount.point.len());
                }
            }
        },
        b"35 32 0:30 /a /sys/cpu\\040acct ro master:9 - cgroup cgroup rw,pids\n",
    ),
    (
        "cgroup",
        |text| {
            lines(text).for_each(|line| {
                black_box(place::Membership::parse(line));
            });
        },
        b"4:pids,cpu:/a:b\n0::/user.slice\n",
    ),
    (
        "stat",
        |text| {
            black_box(task::parse_policy(text));
        },
        b"7 (a) b) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40\n",
    ),
    (
        "words",
        |text| {
            black_box((parse::number(text), parse::limit(text), parse::kib(text)));
            black_box((parse::hexadecimal(text), parse::value(text, b"max")));
            black_box(parse::words(text).count());
        },
        b"max 8192 kB\n",
    ),
];
