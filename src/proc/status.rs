//! /proc/PID/status: what a thread is and may do.

use std::ffi::CStr;
use std::ops::ControlFlow;

use crate::errno::Errno;

use super::file;
pub(crate) use super::file::Calls;
use super::parse::{hexadecimal, kib, number, words};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Status {
    pub(crate) uid: Option<u32>,
    pub(crate) capabilities: Option<u64>,
    pub(crate) threads: Option<u64>,
    /// In how many pid namespaces, from that of the mounted /proc inwards, the process has a number.
    pub(crate) pid_levels: Option<usize>,
    pub(crate) seccomp: Option<u64>,
    pub(crate) filters: Option<u64>,
    pub(crate) tracer: Option<u64>,
    /// Bytes that are mapped.
    pub(crate) mapped: Option<u64>,
    /// Bytes that are private and writable.
    pub(crate) data: Option<u64>,
    /// Bytes that are locked.
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
        let read = file::lines(path, |line| {
            status.take(line);
            ControlFlow::Continue(())
        });
        status.error = read.err();
        status
    }

    /// One line of the file.
    pub(crate) fn take(&mut self, line: &[u8]) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else {
            return;
        };
        let (key, value) = line.split_at(colon);
        let value = value.get(1..).unwrap_or_default();
        match key {
            b"Uid" => self.uid = number(value).and_then(|uid| u32::try_from(uid).ok()),
            b"TracerPid" => self.tracer = number(value),
            b"NSpid" => self.pid_levels = Some(words(value).count()),
            b"VmSize" => self.mapped = kib(value),
            b"VmLck" => self.locked = kib(value),
            b"VmData" => self.data = kib(value),
            b"Threads" => self.threads = number(value),
            b"CapEff" => self.capabilities = hexadecimal(value),
            b"Seccomp" => self.seccomp = number(value),
            b"Seccomp_filters" => self.filters = number(value),
            b"x86_Thread_features" => {
                self.shadow_stack = value.windows(5).any(|word| word == b"shstk");
            }
            _ => {}
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &[u8]) -> Status {
        let mut status = Status::default();
        for line in text.split(|byte| *byte == b'\n') {
            status.take(line);
        }
        status
    }

    #[test]
    fn a_process_in_a_container() {
        let status = parsed(
            b"Name:\tqemu: Seccomp:\t0\nUmask:\t0022\nState:\tR (running)\nTgid:\t4242\nNgid:\t0\nPid:\t4242\n\
              PPid:\t1\nTracerPid:\t17\nUid:\t1000\t0\t0\t0\nGid:\t1000\t1000\t1000\t1000\nFDSize:\t64\n\
              Groups:\t4 24 27 \nNStgid:\t4242\t7\nNSpid:\t4242\t7\nVmPeak:\t  236000 kB\nVmSize:\t  235520 kB\n\
              VmLck:\t      64 kB\nVmPin:\t       0 kB\nVmData:\t   18432 kB\nThreads:\t12\n\
              CapInh:\t0000000000000000\nCapEff:\t00000000a80425fb\nNoNewPrivs:\t1\nSeccomp:\t2\n\
              Seccomp_filters:\t3\nx86_Thread_features:\tshstk wrss\nx86_Thread_features_locked:\t\n",
        );
        let expected = Status {
            uid: Some(1000),
            capabilities: Some(0xa804_25fb),
            threads: Some(12),
            pid_levels: Some(2),
            seccomp: Some(2),
            filters: Some(3),
            tracer: Some(17),
            mapped: Some(235_520 << 10),
            data: Some(18_432 << 10),
            locked: Some(64 << 10),
            shadow_stack: true,
            error: None,
        };
        assert_eq!(status, expected);
        assert_eq!(status.calls(), Calls::FilesOnly);
        assert!(!status.has(CAP_SYS_ADMIN) && !status.has(CAP_SYS_RESOURCE));
        assert!(status.has(27));
    }

    #[test]
    fn no_filter_is_known_only_where_the_file_says_so() {
        assert_eq!(parsed(b"Seccomp:\t0").calls(), Calls::Any);
        assert_eq!(parsed(b"Seccomp_filters:\t0").calls(), Calls::FilesOnly);
        // A kernel thread has no memory; a kernel without seccomp no such line.
        let kthread = parsed(b"Name:\tkthreadd\nThreads:\t1\nx86_Thread_features:\t\n");
        assert_eq!((kthread.mapped, kthread.threads), (None, Some(1)));
        assert!(!kthread.shadow_stack);
        assert_eq!(Status::read_from(c"/nowhere").error, Some(Errno::ENOENT));
        assert!(Status::read_from(c"/proc/self/status").threads >= Some(1));
    }
}
