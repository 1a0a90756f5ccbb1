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
                name: stringify!($name),
                number: libc_number!($name),
                arguments: &[$($(($index, $value as u32)),*)?],
            },
        )*)*];
    };
}

macro_rules! libc_number {
    ($($name:ident)*) => { numbers::$($name)* };
}

/// The calls by their names.
#[expect(non_upper_case_globals, reason = "the kernel's names")]
mod numbers {
    macro_rules! numbers {
        ($($name:ident = $number:ident;)*) => {
            $(pub(super) const $name: libc::c_long = libc::$number;)*
        };
    }

    numbers! {
        brk = SYS_brk;
        clock_gettime = SYS_clock_gettime;
        clock_nanosleep = SYS_clock_nanosleep;
        clone = SYS_clone;
        clone3 = SYS_clone3;
        close = SYS_close;
        exit = SYS_exit;
        fcntl = SYS_fcntl;
        fstatfs = SYS_fstatfs;
        futex = SYS_futex;
        getpid = SYS_getpid;
        getrandom = SYS_getrandom;
        gettid = SYS_gettid;
        kill = SYS_kill;
        madvise = SYS_madvise;
        mincore = SYS_mincore;
        mlock = SYS_mlock;
        mmap = SYS_mmap;
        mprotect = SYS_mprotect;
        mremap = SYS_mremap;
        munlock = SYS_munlock;
        munmap = SYS_munmap;
        newfstatat = SYS_newfstatat;
        openat = SYS_openat;
        pidfd_open = SYS_pidfd_open;
        prctl = SYS_prctl;
        prlimit64 = SYS_prlimit64;
        read = SYS_read;
        rseq = SYS_rseq;
        rt_sigaction = SYS_rt_sigaction;
        rt_sigprocmask = SYS_rt_sigprocmask;
        rt_sigreturn = SYS_rt_sigreturn;
        sched_getaffinity = SYS_sched_getaffinity;
        sched_getattr = SYS_sched_getattr;
        sched_getparam = SYS_sched_getparam;
        sched_getscheduler = SYS_sched_getscheduler;
        sched_setaffinity = SYS_sched_setaffinity;
        sched_setattr = SYS_sched_setattr;
        sched_yield = SYS_sched_yield;
        setgid = SYS_setgid;
        setgroups = SYS_setgroups;
        setregid = SYS_setregid;
        setresgid = SYS_setresgid;
        setresuid = SYS_setresuid;
        setreuid = SYS_setreuid;
        setuid = SYS_setuid;
        set_robust_list = SYS_set_robust_list;
        sigaltstack = SYS_sigaltstack;
        tgkill = SYS_tgkill;
        uname = SYS_uname;
        write = SYS_write;
    }
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
        mmap[2: READ_WRITE, 3: ANONYMOUS],
        mmap[2: READ_WRITE, 3: STACK],
        munmap,
        madvise[2: libc::MADV_WIPEONFORK],
        madvise[2: libc::MADV_DONTNEED],
        rt_sigprocmask[0: libc::SIG_SETMASK],
        rt_sigprocmask[0: libc::SIG_BLOCK],
        rt_sigprocmask[0: libc::SIG_UNBLOCK],
        rt_sigaction,
        clone3,
        clone[0: FLAGS],
        futex[1: libc::FUTEX_WAIT],
        futex[1: libc::FUTEX_WAKE],
        futex[1: PRIVATE_WAIT],
        futex[1: PRIVATE_WAKE],
        // glibc's pthread_join.
        futex[1: libc::FUTEX_WAIT_BITSET | libc::FUTEX_CLOCK_REALTIME],
        set_robust_list[1: 24],
        rseq[2: 0],
        exit,
        sched_getparam,
        sched_getscheduler,
        sched_getaffinity,
        getrandom,
        gettid,
        mincore,
        getpid,
        tgkill[2: 0],
        sched_yield,
        openat,
        read,
        newfstatat,
        close,
        fcntl[1: libc::F_GETFD],
        uname,
    }
    Spawn {
        rt_sigprocmask[0: libc::SIG_SETMASK],
        clone3,
        clone[0: FLAGS],
        futex[1: PRIVATE_WAIT],
        futex[1: PRIVATE_WAKE],
        prlimit64[0: 0, 1: libc::RLIMIT_AS],
        madvise[2: libc::MADV_DONTNEED],
        munmap,
        mincore,
    }
    Map {
        prlimit64[0: 0, 1: libc::RLIMIT_AS],
        mmap[2: READ_WRITE, 3: STACK],
        madvise[2: libc::MADV_NOHUGEPAGE],
        madvise[2: MADV_GUARD_INSTALL],
        mprotect[2: libc::PROT_NONE],
    }
    Resident {
        mlock,
        munlock,
        madvise[2: libc::MADV_POPULATE_WRITE],
    }
    Start {
        set_robust_list[1: 24],
        rseq[2: 0],
        prctl[0: libc::PR_SET_NAME],
        sigaltstack,
        rt_sigprocmask[0: libc::SIG_SETMASK],
    }
    Cgroup {
        fstatfs,
        openat,
        close,
        fcntl[1: libc::F_GETFD],
        write,
    }
    Affinity {
        sched_setaffinity,
        sched_getaffinity,
    }
    Scheduler {
        sched_setattr,
        sched_getattr,
    }
    CoreScheduling {
        prctl[0: libc::PR_SCHED_CORE],
    }
    Report {
        futex[1: libc::FUTEX_WAIT],
        futex[1: libc::FUTEX_WAKE],
    }
    Gate {
        futex[1: PRIVATE_WAIT],
        futex[1: PRIVATE_WAKE],
    }
    End {
        rt_sigprocmask[0: libc::SIG_SETMASK],
        exit,
        madvise[2: libc::MADV_DONTNEED],
        futex[1: libc::FUTEX_WAIT],
        futex[1: libc::FUTEX_WAKE],
        futex[1: PRIVATE_WAIT],
        futex[1: PRIVATE_WAKE],
        rt_sigreturn,
    }
    SetId {
        setresuid,
        setresgid,
        setuid,
        setgid,
        setreuid,
        setregid,
        setgroups,
        rt_sigreturn,
    }
    Join {
        futex[1: libc::FUTEX_WAIT],
        clock_gettime,
        madvise[2: libc::MADV_DONTNEED],
        rt_sigprocmask[0: libc::SIG_SETMASK],
        futex[1: PRIVATE_WAIT],
        futex[1: PRIVATE_WAKE],
        munmap,
        mincore,
    }
    Control {
        rt_sigprocmask[0: libc::SIG_SETMASK],
        getpid,
        tgkill,
        pidfd_open,
        clock_gettime,
        futex[1: PRIVATE_WAIT],
        futex[1: PRIVATE_WAKE],
    }
    HighWaterMark {
        mincore,
    }
    Trim {
        munmap,
        mincore,
        madvise[2: libc::MADV_DONTNEED],
        rt_sigprocmask[0: libc::SIG_SETMASK],
        futex[1: PRIVATE_WAIT],
        futex[1: PRIVATE_WAKE],
        // One thread of glibc, which frees what malloc keeps for threads that have ended; its join.
        mmap[2: libc::PROT_NONE, 3: STACK],
        mmap[2: READ_WRITE, 3: STACK],
        mprotect[2: READ_WRITE],
        rt_sigprocmask[0: libc::SIG_BLOCK],
        clone3,
        clone[0: FLAGS],
        set_robust_list[1: 24],
        rseq[2: 0],
        exit,
        futex[1: libc::FUTEX_WAIT_BITSET | libc::FUTEX_CLOCK_REALTIME],
        brk,
    }
    // Behind a filter: without one there are others.
    Refusal {
        openat,
        read,
        close,
        fcntl[1: libc::F_GETFD],
        fcntl[1: libc::F_SETOWN],
        gettid,
        clock_gettime,
        clock_nanosleep,
        clone3,
        clone[0: FLAGS],
        kill[1: 0],
        mmap[2: READ_WRITE, 3: STACK],
        munmap,
        mprotect[2: libc::PROT_NONE],
        rt_sigprocmask[0: libc::SIG_SETMASK],
    }
    Heap {
        brk,
        mmap[2: READ_WRITE, 3: ANONYMOUS],
        mmap[2: libc::PROT_NONE, 3: ANONYMOUS | libc::MAP_NORESERVE],
        mmap[2: libc::PROT_NONE, 3: ANONYMOUS],
        munmap,
        mremap,
        mprotect[2: READ_WRITE],
        madvise[2: libc::MADV_DONTNEED],
        futex[1: PRIVATE_WAIT],
        futex[1: PRIVATE_WAKE],
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
