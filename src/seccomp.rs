//! The system calls of this crate, by phase, for the author of a filter ([seccomp(2)]).
//!
//! The same lists as in `docs/seccomp.md` in the repository, which says what each call is for and what happens if it is
//! denied. A filter is made of the phases that its thread goes through behind it:
//!
//! ```
//! use nptl::seccomp::{self, Phase};
//! // What a vCPU thread needs behind the filter that its setup installs: it waits at a gate, runs, and ends.
//! let vcpu: Vec<_> = seccomp::calls([Phase::Report, Phase::Gate, Phase::End]).collect();
//! assert!(vcpu.iter().any(|call| call.name == "exit"));
//! // One rule each: a call, and what its arguments must be.
//! for call in vcpu {
//!     println!("{} {:?}", call.name, call.arguments);
//! }
//! ```
//!
//! [`prepare`](crate::prepare) makes the calls of [`Phase::Prepare`], best before any filter is installed.
//!
//! The lists hold the calls of the crate. Closures, setups, destructors and panic hooks make their own. Phases in which the
//! crate uses the heap ([`Phase::uses_heap`]) need [`Phase::Heap`] as well.
//!
//! [seccomp(2)]: https://man7.org/linux/man-pages/man2/seccomp.2.html

/// A part of the life of a thread, or a call of this crate.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// [`prepare`](crate::prepare), or the first spawn of a process, beside those of every spawn.
    Prepare,
    /// A spawn whose stack comes from the cache, in the creator.
    Spawn,
    /// In addition, where the stack must be mapped.
    Map,
    /// In addition, with `lock_stack` or `prefault_stack`.
    Resident,
    /// The new thread before its closure.
    Start,
    /// In addition, with `cgroup`: [`Spawn`](Phase::Spawn) for the first three calls, [`Start`](Phase::Start) for the last.
    Cgroup,
    /// In addition, with `cpu_affinity`; also the handle's methods of that name.
    Affinity,
    /// In addition, with `scheduler`; also the handle's methods of that name.
    Scheduler,
    /// In addition, with `core_scheduling`.
    CoreScheduling,
    /// In addition, with any of these four, a setup, or `publish_std_thread`: the creator waits, the thread reports.
    Report,
    /// In addition, with a [`StartGate`](crate::StartGate): the thread waits, its owner decides.
    Gate,
    /// From the closure to the end of the thread.
    End,
    /// In addition, in every thread that lives, if another thread changes a user or group id through glibc: its handler
    /// repeats the call.
    SetId,
    /// `join`, `try_join`, `join_timeout`, and the drop of the handle of a thread that has ended.
    Join,
    /// `kill`, `pidfd` and `cpu_time`, and what all methods that use the thread's id have in common.
    Control,
    /// [`stack_high_water_mark`](crate::JoinHandle::stack_high_water_mark).
    HighWaterMark,
    /// `trim`, `clear` and `set_config` of a cache, and the drop of a private one.
    Trim,
    /// The analysis of a refusal. All of it may be denied with an errno.
    Refusal,
    /// The heap of glibc.
    Heap,
    /// In addition to [`End`](Phase::End), if the thread overflows its stack: the report, and abort(3).
    Overflow,
}

impl Phase {
    /// Whether the crate allocates or frees in this phase.
    ///
    /// ```
    /// use nptl::seccomp::Phase;
    /// assert!(Phase::Spawn.uses_heap() && !Phase::End.uses_heap());
    /// ```
    pub const fn uses_heap(self) -> bool {
        matches!(
            self,
            Phase::Prepare | Phase::Spawn | Phase::Join | Phase::Trim
        )
    }
}

/// A call that a filter must allow, or answer with an errno where that is documented to do.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SystemCall {
    /// Where it is made.
    pub phase: Phase,
    /// Its name.
    pub name: &'static str,
    /// Its number, on the architecture that this is compiled for.
    pub number: libc::c_long,
    /// The index of an argument, from 0, and what the lower 32 bits of the argument are.
    pub arguments: &'static [(u8, u32)],
}

/// The calls of some phases. A call that two of them make comes twice.
///
/// ```
/// use nptl::seccomp::{Phase, calls};
/// assert!(calls([Phase::HighWaterMark]).map(|call| call.name).eq(["mincore"]));
/// ```
pub fn calls<const N: usize>(phases: [Phase; N]) -> impl Iterator<Item = &'static SystemCall> {
    CALLS
        .iter()
        .filter(move |call| phases.contains(&call.phase))
}

macro_rules! calls {
    ($($phase:ident { $($name:ident $([$($index:literal: $value:expr),*])?),* $(,)? })*) => {
        /// Every call of every phase.
        pub const CALLS: &[SystemCall] = &[$($(
            SystemCall {
                phase: Phase::$phase,
                name: name_of(stringify!($name)),
                number: libc::$name,
                arguments: &[$($(($index, $value as u32)),*)?],
            },
        )*)*];
    };
}

/// The name of a call, from that of libc's constant: `read` from `SYS_read`.
const fn name_of(constant: &'static str) -> &'static str {
    constant.split_at("SYS_".len()).1
}

const READ_WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
const STACK: i32 = ANONYMOUS | libc::MAP_STACK;
const PRIVATE_WAIT: i32 = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
const PRIVATE_WAKE: i32 = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
const MADV_GUARD_INSTALL: i32 = 102;
const FLAGS: u64 = crate::sys::clone::FLAGS;

calls! {
    Prepare {
        SYS_mmap[2: READ_WRITE, 3: ANONYMOUS],
        SYS_mmap[2: READ_WRITE, 3: STACK],
        SYS_munmap,
        SYS_madvise[2: libc::MADV_WIPEONFORK],
        SYS_madvise[2: libc::MADV_DONTNEED],
        SYS_rt_sigprocmask[0: libc::SIG_SETMASK],
        SYS_rt_sigprocmask[0: libc::SIG_BLOCK],
        SYS_rt_sigprocmask[0: libc::SIG_UNBLOCK],
        SYS_rt_sigaction,
        SYS_clone3,
        SYS_clone[0: FLAGS],
        SYS_futex[1: libc::FUTEX_WAIT],
        SYS_futex[1: libc::FUTEX_WAKE],
        SYS_futex[1: PRIVATE_WAIT],
        SYS_futex[1: PRIVATE_WAKE],
        // glibc's pthread_join.
        SYS_futex[1: libc::FUTEX_WAIT_BITSET | libc::FUTEX_CLOCK_REALTIME],
        SYS_set_robust_list[1: 24],
        SYS_rseq[2: 0],
        SYS_exit,
        SYS_sched_getparam,
        SYS_sched_getscheduler,
        SYS_sched_getaffinity,
        SYS_getrandom,
        SYS_gettid,
        SYS_mincore,
        SYS_getpid,
        SYS_tgkill[2: 0],
        SYS_sched_yield,
        SYS_openat,
        SYS_read,
        SYS_newfstatat,
        SYS_close,
        SYS_fcntl[1: libc::F_GETFD],
        SYS_uname,
    }
    Spawn {
        SYS_rt_sigprocmask[0: libc::SIG_SETMASK],
        SYS_clone3,
        SYS_clone[0: FLAGS],
        SYS_futex[1: PRIVATE_WAIT],
        SYS_futex[1: PRIVATE_WAKE],
        SYS_prlimit64[0: 0, 1: libc::RLIMIT_AS],
        SYS_madvise[2: libc::MADV_DONTNEED],
        SYS_munmap,
        SYS_mincore,
    }
    Map {
        SYS_prlimit64[0: 0, 1: libc::RLIMIT_AS],
        SYS_mmap[2: READ_WRITE, 3: STACK],
        SYS_madvise[2: libc::MADV_NOHUGEPAGE],
        SYS_madvise[2: MADV_GUARD_INSTALL],
        SYS_mprotect[2: libc::PROT_NONE],
    }
    Resident {
        SYS_mlock,
        SYS_munlock,
        SYS_madvise[2: libc::MADV_POPULATE_WRITE],
    }
    Start {
        SYS_set_robust_list[1: 24],
        SYS_rseq[2: 0],
        SYS_prctl[0: libc::PR_SET_NAME],
        SYS_sigaltstack,
        SYS_rt_sigprocmask[0: libc::SIG_SETMASK],
    }
    Cgroup {
        SYS_fstatfs,
        SYS_openat,
        SYS_close,
        SYS_fcntl[1: libc::F_GETFD],
        SYS_write,
    }
    Affinity {
        SYS_sched_setaffinity,
        SYS_sched_getaffinity,
    }
    Scheduler {
        SYS_sched_setattr,
        SYS_sched_getattr,
    }
    CoreScheduling {
        SYS_prctl[0: libc::PR_SCHED_CORE],
    }
    Report {
        SYS_futex[1: libc::FUTEX_WAIT],
        SYS_futex[1: libc::FUTEX_WAKE],
    }
    Gate {
        SYS_futex[1: PRIVATE_WAIT],
        SYS_futex[1: PRIVATE_WAKE],
    }
    End {
        SYS_rt_sigprocmask[0: libc::SIG_SETMASK],
        SYS_exit,
        SYS_madvise[2: libc::MADV_DONTNEED],
        SYS_futex[1: libc::FUTEX_WAIT],
        SYS_futex[1: libc::FUTEX_WAKE],
        SYS_futex[1: PRIVATE_WAIT],
        SYS_futex[1: PRIVATE_WAKE],
        SYS_rt_sigreturn,
    }
    Overflow {
        SYS_write[0: 2],
        SYS_rt_sigprocmask[0: libc::SIG_UNBLOCK],
        SYS_gettid,
        SYS_getpid,
        SYS_tgkill[2: libc::SIGABRT],
    }
    SetId {
        SYS_setresuid,
        SYS_setresgid,
        SYS_setuid,
        SYS_setgid,
        SYS_setreuid,
        SYS_setregid,
        SYS_setgroups,
        SYS_rt_sigreturn,
    }
    Join {
        SYS_futex[1: libc::FUTEX_WAIT],
        SYS_clock_gettime,
        SYS_madvise[2: libc::MADV_DONTNEED],
        SYS_rt_sigprocmask[0: libc::SIG_SETMASK],
        SYS_futex[1: PRIVATE_WAIT],
        SYS_futex[1: PRIVATE_WAKE],
        SYS_munmap,
        SYS_mincore,
    }
    Control {
        SYS_rt_sigprocmask[0: libc::SIG_SETMASK],
        SYS_getpid,
        SYS_tgkill,
        SYS_pidfd_open,
        SYS_clock_gettime,
        SYS_futex[1: PRIVATE_WAIT],
        SYS_futex[1: PRIVATE_WAKE],
    }
    HighWaterMark {
        SYS_mincore,
    }
    Trim {
        SYS_munmap,
        SYS_mincore,
        SYS_madvise[2: libc::MADV_DONTNEED],
        SYS_rt_sigprocmask[0: libc::SIG_SETMASK],
        SYS_futex[1: PRIVATE_WAIT],
        SYS_futex[1: PRIVATE_WAKE],
        // One thread of glibc, which frees what malloc keeps for threads that have ended; its join.
        SYS_mmap[2: libc::PROT_NONE, 3: STACK],
        SYS_mmap[2: READ_WRITE, 3: STACK],
        SYS_mprotect[2: READ_WRITE],
        SYS_rt_sigprocmask[0: libc::SIG_BLOCK],
        SYS_clone3,
        SYS_clone[0: FLAGS],
        SYS_set_robust_list[1: 24],
        SYS_rseq[2: 0],
        SYS_exit,
        SYS_futex[1: libc::FUTEX_WAIT_BITSET | libc::FUTEX_CLOCK_REALTIME],
        SYS_brk,
    }
    // Behind a filter: without one there are others.
    Refusal {
        SYS_openat,
        SYS_read,
        SYS_close,
        SYS_fcntl[1: libc::F_GETFD],
        SYS_fcntl[1: libc::F_SETOWN],
        SYS_gettid,
        SYS_clock_gettime,
        SYS_clock_nanosleep,
        SYS_clone3,
        SYS_clone[0: FLAGS],
        SYS_kill[1: 0],
        SYS_mmap[2: READ_WRITE, 3: STACK],
        SYS_munmap,
        SYS_mprotect[2: libc::PROT_NONE],
        SYS_rt_sigprocmask[0: libc::SIG_SETMASK],
    }
    Heap {
        SYS_brk,
        SYS_mmap[2: READ_WRITE, 3: ANONYMOUS],
        SYS_mmap[2: libc::PROT_NONE, 3: ANONYMOUS | libc::MAP_NORESERVE],
        SYS_mmap[2: libc::PROT_NONE, 3: ANONYMOUS],
        SYS_munmap,
        SYS_mremap,
        SYS_mprotect[2: READ_WRITE],
        SYS_madvise[2: libc::MADV_DONTNEED],
        SYS_futex[1: PRIVATE_WAIT],
        SYS_futex[1: PRIVATE_WAKE],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The document and the list are one contract.
    #[test]
    fn every_call_of_the_list_is_in_the_document_and_the_other_way_round() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/", "docs/seccomp.md");
        let document = std::fs::read_to_string(path).expect("the document");
        let known = |word: &str| CALLS.iter().any(|call| call.name == word);
        for call in CALLS {
            assert!(
                document.contains(call.name),
                "{} is not in {path}",
                call.name
            );
        }
        // The first column of the tables of calls.
        let mut inside = false;
        for line in document.lines() {
            inside = line.starts_with("| call |") || inside && line.starts_with('|');
            let first = line
                .split('|')
                .nth(1)
                .filter(|_| inside && !line.starts_with("| call |"));
            for word in first.unwrap_or_default().split([',', ' ']) {
                let is_name = word
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte == b'_' || byte.is_ascii_digit());
                let is_call = is_name && word.bytes().any(|byte| byte.is_ascii_lowercase());
                assert!(!is_call || known(word), "{word} of: {line}");
            }
        }
    }
}
