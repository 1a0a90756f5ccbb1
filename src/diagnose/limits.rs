//! Reading evidence: resource limits, sysctls, the thread's own status.
//!
//! Everything here runs while the machine is out of something: no heap, small fixed buffers, and a value that
//! cannot be read is absent. Under a system-call filter only files are read, because open, read and close are
//! what nearly every filter allows, while an unexpected call may kill the process (see [`Calls`]).

use std::ffi::CStr;
use std::fmt::{self, Write as _};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::kill;
use nix::sys::stat::{Mode, stat};
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use nix::unistd::{Pid, read};

use crate::clone::probe::number_is_held;

/// A limit that does not limit.
pub(crate) const UNLIMITED: u64 = u64::MAX;

/// Inode of the initial user namespace, fixed by the kernel (`PROC_USER_INIT_INO`).
const INITIAL_USER_NAMESPACE: u64 = 0xEFFF_FFFD;
/// Inode of the initial pid namespace, fixed by the kernel (`PROC_PID_INIT_INO`).
const INITIAL_PID_NAMESPACE: u64 = 0xEFFF_FFFC;

/// Which system calls the analysis may make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Calls {
    /// No filter is installed: any.
    Any,
    /// A filter is installed, or it could not be found out: reading files, and the call that was refused.
    FilesOnly,
}

/// A text of at most `N` bytes without heap.
#[derive(Clone, Copy)]
pub(crate) struct Text<const N: usize> {
    bytes: [u8; N],
    length: usize,
    truncated: bool,
}

impl<const N: usize> Text<N> {
    pub(crate) const fn new() -> Self {
        Text {
            bytes: [0; N],
            length: 0,
            truncated: false,
        }
    }

    pub(crate) fn push(&mut self, more: &[u8]) {
        // One byte always stays 0, so that the text can be handed to the kernel.
        let room = (N - 1).saturating_sub(self.length);
        let count = more.len().min(room);
        self.truncated |= count < more.len();
        let end = self.length + count;
        if let (Some(to), Some(from)) = (self.bytes.get_mut(self.length..end), more.get(..count)) {
            to.copy_from_slice(from);
            self.length = end;
        }
    }

    pub(crate) fn truncate(&mut self, length: usize) {
        if let Some(tail) = self.bytes.get_mut(length..) {
            tail.fill(0);
            self.length = self.length.min(length);
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    pub(crate) fn is_truncated(&self) -> bool {
        self.truncated
    }

    pub(crate) fn as_c_str(&self) -> Option<&CStr> {
        if self.truncated {
            return None;
        }
        CStr::from_bytes_until_nul(&self.bytes).ok()
    }
}

impl<const N: usize> fmt::Write for Text<N> {
    fn write_str(&mut self, more: &str) -> fmt::Result {
        self.push(more.as_bytes());
        Ok(())
    }
}

pub(crate) fn open_file(path: &CStr) -> Result<OwnedFd, Errno> {
    for _ in 0..8 {
        match open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
    Err(Errno::EINTR)
}

fn read_some(file: &OwnedFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    for _ in 0..8 {
        match read(file.as_fd(), buffer) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
    Err(Errno::EINTR)
}

/// A file whose whole content is a number, or `max`.
pub(crate) fn number_in(path: &CStr) -> Option<u64> {
    read_number(path).ok()
}

/// [`number_in`], with the reason where there is none: ENODATA if the file holds something else.
pub(crate) fn read_number(path: &CStr) -> Result<u64, Errno> {
    // 64 bytes on purpose: sysctl files cost by the size of the buffer offered.
    let mut buffer = [0; 64];
    let file = open_file(path)?;
    let length = read_some(&file, &mut buffer)?;
    let text = buffer.get(..length).unwrap_or_default().trim_ascii();
    if text == b"max" {
        Ok(UNLIMITED)
    } else {
        number(text).ok_or(Errno::ENODATA)
    }
}

/// The number after `key` in a short file of `key value` lines.
pub(crate) fn value_in(path: &CStr, key: &[u8]) -> Option<u64> {
    let mut value = None;
    lines(path, |line| match line.strip_prefix(key) {
        Some(rest) if rest.first().is_some_and(u8::is_ascii_whitespace) => {
            value = number(rest);
            ControlFlow::Break(())
        }
        _ => ControlFlow::Continue(()),
    })
    .ok()?;
    value
}

/// Calls `each` for every line that fits the buffer; longer ones are skipped, never cut.
pub(crate) fn lines(
    path: &CStr,
    mut each: impl FnMut(&[u8]) -> ControlFlow<()>,
) -> Result<(), Errno> {
    let file = open_file(path)?;
    let mut buffer = [0; 1024];
    let mut filled = 0;
    let mut skipping = false;
    loop {
        let space = buffer.get_mut(filled..).unwrap_or_default();
        let count = read_some(&file, space)?;
        let end = filled + count;
        let mut rest = buffer.get(..end).unwrap_or_default();
        while let Some(at) = rest.iter().position(|byte| *byte == b'\n') {
            let (line, tail) = rest.split_at(at);
            rest = tail.get(1..).unwrap_or_default();
            if !std::mem::take(&mut skipping) && each(line).is_break() {
                return Ok(());
            }
        }
        if count == 0 {
            if !rest.is_empty() && !skipping {
                let _ = each(rest);
            }
            return Ok(());
        }
        let kept = rest.len();
        if kept == buffer.len() {
            skipping = true;
            filled = 0;
        } else {
            buffer.copy_within(end - kept..end, 0);
            filled = kept;
        }
    }
}

/// The first decimal number of a text.
pub(crate) fn number(text: &[u8]) -> Option<u64> {
    let text = text.trim_ascii_start();
    let length = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let digits = std::str::from_utf8(text.get(..length)?).ok()?;
    digits.parse().ok()
}

/// What /proc/thread-self/status says of the calling thread.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Status {
    pub(crate) uid: Option<u32>,
    pub(crate) capabilities: Option<u64>,
    pub(crate) threads: Option<u64>,
    pub(crate) seccomp: Option<u64>,
    pub(crate) filters: Option<u64>,
    pub(crate) tracer: Option<u64>,
    pub(crate) mapped: Option<u64>,
    pub(crate) data: Option<u64>,
    pub(crate) locked: Option<u64>,
    pub(crate) shadow_stack: bool,
    /// Why the file could not be read.
    pub(crate) error: Option<Errno>,
}

impl Status {
    pub(crate) fn read() -> Status {
        // thread-self, not self: credentials and filters belong to a thread.
        Status::read_from(c"/proc/thread-self/status")
    }

    pub(crate) fn read_from(path: &CStr) -> Status {
        let mut status = Status::default();
        let read = lines(path, |line| {
            let Some(colon) = line.iter().position(|byte| *byte == b':') else {
                return ControlFlow::Continue(());
            };
            let (key, value) = line.split_at(colon);
            let value = value.get(1..).unwrap_or_default();
            let bytes = || number(value).and_then(|kib| kib.checked_mul(1024));
            match key {
                b"Uid" => status.uid = number(value).and_then(|uid| u32::try_from(uid).ok()),
                b"TracerPid" => status.tracer = number(value),
                b"VmSize" => status.mapped = bytes(),
                b"VmLck" => status.locked = bytes(),
                b"VmData" => status.data = bytes(),
                b"Threads" => status.threads = number(value),
                b"CapEff" => {
                    status.capabilities = std::str::from_utf8(value.trim_ascii())
                        .ok()
                        .and_then(|hex| u64::from_str_radix(hex, 16).ok());
                }
                b"Seccomp" => status.seccomp = number(value),
                b"Seccomp_filters" => status.filters = number(value),
                b"x86_Thread_features" => {
                    status.shadow_stack = value.windows(5).any(|word| word == b"shstk");
                }
                _ => {}
            }
            ControlFlow::Continue(())
        });
        status.error = read.err();
        status
    }

    /// Which calls are safe to make; without a readable status a filter has to be expected.
    pub(crate) fn calls(&self) -> Calls {
        match self.seccomp {
            Some(0) => Calls::Any,
            _ => Calls::FilesOnly,
        }
    }

    pub(crate) fn has(&self, capability: u32) -> bool {
        self.capabilities
            .is_some_and(|set| set & (1 << capability) != 0)
    }
}

pub(crate) const CAP_IPC_LOCK: u32 = 14;
pub(crate) const CAP_SYS_ADMIN: u32 = 21;
pub(crate) const CAP_SYS_NICE: u32 = 23;
pub(crate) const CAP_SYS_RESOURCE: u32 = 24;

/// Soft and hard value of a resource limit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    pub(crate) soft: u64,
    pub(crate) hard: u64,
}

/// The limits that thread creation meets: the call's name for it, and the line in /proc/self/limits.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Limited {
    Processes,
    AddressSpace,
    Data,
    LockedMemory,
    RealTimePriority,
}

impl Limited {
    pub(crate) fn line(self) -> &'static [u8] {
        match self {
            Limited::Processes => b"Max processes",
            Limited::AddressSpace => b"Max address space",
            Limited::Data => b"Max data size",
            Limited::LockedMemory => b"Max locked memory",
            Limited::RealTimePriority => b"Max realtime priority",
        }
    }

    fn resource(self) -> Resource {
        match self {
            Limited::Processes => Resource::RLIMIT_NPROC,
            Limited::AddressSpace => Resource::RLIMIT_AS,
            Limited::Data => Resource::RLIMIT_DATA,
            Limited::LockedMemory => Resource::RLIMIT_MEMLOCK,
            Limited::RealTimePriority => Resource::RLIMIT_RTPRIO,
        }
    }
}

pub(crate) fn limit(limited: Limited, calls: Calls) -> Option<Limit> {
    match calls {
        Calls::Any => {
            let (soft, hard) = getrlimit(limited.resource()).ok()?;
            Some(Limit { soft, hard })
        }
        Calls::FilesOnly => limit_from(c"/proc/thread-self/limits", limited),
    }
}

pub(crate) fn limit_from(path: &CStr, limited: Limited) -> Option<Limit> {
    let mut found = None;
    lines(path, |line| match line.strip_prefix(limited.line()) {
        Some(rest) => {
            let mut words = rest
                .split(u8::is_ascii_whitespace)
                .filter(|word| !word.is_empty())
                .map(|word| match word {
                    b"unlimited" => Some(UNLIMITED),
                    digits => number(digits),
                });
            if let (Some(Some(soft)), Some(Some(hard))) = (words.next(), words.next()) {
                found = Some(Limit { soft, hard });
            }
            ControlFlow::Break(())
        }
        None => ControlFlow::Continue(()),
    })
    .ok()?;
    found
}

/// All tasks of the machine, as the kernel compares them with `kernel.threads-max`.
///
/// lxcfs mounts a file of its own over /proc/loadavg that counts one container: that is not the kernel's
/// number, and the answer is absent.
pub(crate) fn tasks(calls: Calls) -> Option<u64> {
    let mut buffer = [0; 64];
    let file = open_file(c"/proc/loadavg").ok()?;
    let genuine = match calls {
        Calls::Any => fstatfs(&file).ok()?.filesystem_type() == PROC_SUPER_MAGIC,
        Calls::FilesOnly => {
            let mut covered = false;
            lines(c"/proc/thread-self/mountinfo", |line| {
                covered |= line.split(|byte| *byte == b' ').nth(4) == Some(b"/proc/loadavg");
                ControlFlow::Continue(())
            })
            .ok()?;
            !covered
        }
    };
    if !genuine {
        return None;
    }
    let length = read_some(&file, &mut buffer).ok()?;
    let text = buffer.get(..length)?;
    let slash = text.iter().position(|byte| *byte == b'/')?;
    number(text.get(slash + 1..)?).filter(|tasks| *tasks > 0)
}

/// The number given out last in the reader's pid namespace: the last field of /proc/loadavg.
pub(crate) fn last_pid_number() -> Option<u64> {
    let mut last = None;
    lines(c"/proc/loadavg", |line| {
        let field = line.rsplit(u8::is_ascii_whitespace).next();
        last = field.and_then(number);
        ControlFlow::Break(())
    })
    .ok()?;
    last
}

pub(crate) fn threads_max() -> Option<u64> {
    number_in(c"/proc/sys/kernel/threads-max")
}

pub(crate) fn pid_max() -> Option<u64> {
    number_in(c"/proc/sys/kernel/pid_max")
}

/// The inode that identifies a namespace.
pub(crate) fn namespace(path: &CStr, calls: Calls) -> Result<u64, Errno> {
    match calls {
        Calls::Any => stat(path).map(|status| status.st_ino),
        Calls::FilesOnly => {
            // The same number by reading alone; since Linux 5.14.
            let file = open_file(path)?;
            let mut info = Text::<64>::new();
            let _ = write!(info, "/proc/thread-self/fdinfo/{}", file.as_raw_fd());
            let inode = info.as_c_str().and_then(|info| value_in(info, b"ino:"));
            inode.ok_or(Errno::ENODATA)
        }
    }
}

pub(crate) fn in_initial_user_namespace(calls: Calls) -> Option<bool> {
    let inode = namespace(c"/proc/thread-self/ns/user", calls).ok()?;
    Some(is_initial_user_namespace(inode))
}

pub(crate) fn is_initial_user_namespace(inode: u64) -> bool {
    inode == INITIAL_USER_NAMESPACE
}

pub(crate) fn in_initial_pid_namespace(calls: Calls) -> Option<bool> {
    let inode = namespace(c"/proc/thread-self/ns/pid", calls).ok()?;
    Some(inode == INITIAL_PID_NAMESPACE)
}

/// The scheduling policy by reading alone; its reset-on-fork flag is not shown there.
pub(crate) fn policy_by_file() -> Option<u32> {
    let mut policy = None;
    lines(c"/proc/thread-self/stat", |line| {
        // The command's name stands in parentheses and may hold anything; field 3 follows the last one.
        if let Some(end) = line.iter().rposition(|byte| *byte == b')') {
            let rest = line.get(end + 2..).unwrap_or_default();
            let field = rest.split(|byte| *byte == b' ').nth(41 - 3);
            policy = field
                .and_then(number)
                .and_then(|policy| u32::try_from(policy).ok());
        }
        ControlFlow::Break(())
    })
    .ok()?;
    policy
}

/// What a look at some numbers of the own pid namespace showed.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PidNumbersSeen {
    pub(crate) looked: u32,
    pub(crate) free: u32,
    /// Whether `free` is the kernel's own word. Otherwise numbers that only a session holds are among them.
    pub(crate) exact: bool,
}

/// Looks at some numbers of this pid namespace.
///
/// No file counts the numbers in use: zombies hold theirs, and so do process groups and sessions whose leader
/// is gone. F_SETOWN answers ESRCH for a number that nothing holds; before Linux 5.15 or so it takes any number,
/// and then a signal 0 tells of one whether a task or a process group has it, but not whether a session has.
/// Numbers below 300 are left out: after its first wrap the kernel does not give them to anybody.
pub(crate) fn sample_pid_numbers(pid_max: u64) -> PidNumbersSeen {
    const RESERVED: u64 = 300;
    const MOST: u64 = 256;
    // Larger than any pid_max.
    const NOBODYS: i32 = i32::MAX;
    let step = pid_max.saturating_sub(RESERVED).div_ceil(MOST).max(1);
    let owned = open_file(c"/proc/sys/kernel/pid_max").ok();
    let answer = |number| Some(number_is_held(owned.as_ref()?.as_fd(), number));
    let exact = answer(NOBODYS) == Some(Err(Errno::ESRCH));
    let mut seen = PidNumbersSeen {
        exact,
        ..PidNumbersSeen::default()
    };
    for stride in 0..MOST {
        // Somewhere in its stride: programs that fork twice leave every other number free.
        let within = (stride.wrapping_mul(0x9E37_79B9) >> 16) % step;
        let candidate = RESERVED + stride * step + within;
        let Some(number) = i32::try_from(candidate)
            .ok()
            .filter(|_| candidate < pid_max)
        else {
            continue;
        };
        let unused = match answer(number).filter(|_| exact) {
            Some(Ok(())) => false,
            Some(Err(Errno::ESRCH)) => true,
            Some(Err(_)) => continue,
            None => {
                kill(Pid::from_raw(number), None) == Err(Errno::ESRCH)
                    && kill(Pid::from_raw(-number), None) == Err(Errno::ESRCH)
            }
        };
        seen.looked += 1;
        seen.free += u32::from(unused);
    }
    seen
}
