//! Seccomp filters for the calling thread and the threads it starts.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, Ordering};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// A filter that makes `syscall` fail with `errno`: always, or only [when](Deny::when) arguments match.
/// Nothing happens before [`install`](Deny::install).
///
/// The arguments of `clone3` lie in memory, out of a filter's reach: deny it as a whole, and `clone` with
/// [`when_set`](Deny::when_set) for `CLONE_THREAD`.
pub fn deny(syscall: libc::c_long, errno: i32) -> Deny {
    Deny {
        syscall,
        errno,
        conditions: Vec::new(),
    }
}

/// The madvise that marks a guard, from Linux 6.13.
pub const MADV_GUARD_INSTALL: u64 = 102;

/// A kernel that does not mark guards, and says so with `errno` (an old one: EINVAL): each is a mapping.
pub fn deny_guard_marks(errno: i32) {
    deny(libc::SYS_madvise, errno)
        .when(2, MADV_GUARD_INSTALL)
        .install();
}

#[must_use]
pub struct Deny {
    syscall: libc::c_long,
    errno: i32,
    conditions: Vec<SeccompCondition>,
}

impl Deny {
    /// Only if argument `number` (from 0) equals `value`. Several conditions must all hold.
    pub fn when(mut self, number: u8, value: u64) -> Deny {
        self.conditions
            .push(condition(number, SeccompCmpOp::Eq, value));
        self
    }

    /// Only if argument `number` has all of `bits` set.
    pub fn when_set(mut self, number: u8, bits: u64) -> Deny {
        self.conditions
            .push(condition(number, SeccompCmpOp::MaskedEq(bits), bits));
        self
    }

    /// Only if argument `number` is at least `value`.
    pub fn when_at_least(mut self, number: u8, value: u64) -> Deny {
        self.conditions
            .push(condition(number, SeccompCmpOp::Ge, value));
        self
    }

    /// Puts the filter before the calling thread, for good. Where several filters match, the newest wins.
    pub fn install(self) {
        let program = self.program();
        seccompiler::apply_filter(&program).expect("a filter that the kernel takes");
    }

    /// The same before every thread of the process.
    pub fn install_for_all(self) {
        let program = self.program();
        seccompiler::apply_filter_all_threads(&program).expect("a filter that the kernel takes");
    }

    /// As [`install`](Deny::install), but with SIGSYS instead of an errno.
    pub fn install_trap(self) {
        let rules = rules([(self.syscall, self.conditions)]);
        let program = compile(rules, SeccompAction::Allow, SeccompAction::Trap);
        seccompiler::apply_filter(&program).expect("a filter that the kernel takes");
    }

    /// As [`install`](Deny::install), but the thread that makes the call dies of it, and no other.
    pub fn install_kill(self) {
        let rules = rules([(self.syscall, self.conditions)]);
        let program = compile(rules, SeccompAction::Allow, SeccompAction::KillThread);
        seccompiler::apply_filter(&program).expect("a filter that the kernel takes");
    }

    fn program(self) -> BpfProgram {
        let rules = rules([(self.syscall, self.conditions)]);
        let errno = SeccompAction::Errno(self.errno.cast_unsigned());
        compile(rules, SeccompAction::Allow, errno)
    }
}

/// From here on clone with other flags than these is answered by SIGSYS.
pub fn trap_all_clones_but(flags: u64) {
    let other = condition(0, SeccompCmpOp::Ne, flags);
    let rules = rules([(libc::SYS_clone, vec![other])]);
    let program = compile(rules, SeccompAction::Allow, SeccompAction::Trap);
    seccompiler::apply_filter(&program).expect("a filter that the kernel takes");
}

/// From here on an anonymous mapping with other flags than those of malloc and of a stack is answered by SIGSYS: without
/// a type, with MAP_NORESERVE, with MAP_FIXED_NOREPLACE.
pub fn trap_strange_mappings() {
    let flag = |bits: libc::c_int| {
        let bits = bits as u64;
        condition(3, SeccompCmpOp::MaskedEq(bits), bits)
    };
    let untyped = condition(3, SeccompCmpOp::MaskedEq(3), 0);
    let rules = rules([
        (libc::SYS_mmap, vec![flag(libc::MAP_FIXED_NOREPLACE)]),
        (libc::SYS_mmap, vec![flag(libc::MAP_NORESERVE)]),
        (libc::SYS_mmap, vec![untyped]),
    ]);
    let program = compile(rules, SeccompAction::Allow, SeccompAction::Trap);
    seccompiler::apply_filter(&program).expect("a filter that the kernel takes");
}

/// One entry of an [allow list](allow_only): `syscall` with any arguments, or only those named.
pub fn allow(syscall: libc::c_long) -> Allow {
    Allow {
        syscall,
        conditions: Vec::new(),
    }
}

pub struct Allow {
    syscall: libc::c_long,
    conditions: Vec<SeccompCondition>,
}

impl Allow {
    /// Only if the lower half of argument `number` equals `value`. Several conditions must all hold.
    pub fn when(mut self, number: u8, value: u32) -> Allow {
        let condition = SeccompCondition::new(
            number,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::Eq,
            value.into(),
        );
        self.conditions
            .push(condition.expect("an argument number below 6"));
        self
    }
}

/// Lets the calling thread make only the system calls listed (several entries for one call are
/// alternatives); any other ends the process with SIGSYS.
pub fn allow_only(list: impl IntoIterator<Item = Allow>) {
    let rules = rules(
        list.into_iter()
            .map(|entry| (entry.syscall, entry.conditions)),
    );
    let program = compile(rules, SeccompAction::KillProcess, SeccompAction::Allow);
    seccompiler::apply_filter(&program).expect("a filter that the kernel takes");
}

/// The system calls that the crate documents for a thread whose closure has started, and those of a thread that
/// looks on: as [`allow_only`], but a call that is not listed is noted, for [`undocumented_call`], and not made.
pub struct Documented(BpfProgram);

static UNDOCUMENTED: AtomicI64 = AtomicI64::new(-1);

extern "C" fn note_call(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // The first one. The union of SIGSYS: the address of the call, its number, the architecture.
    // SAFETY: the kernel's, for SIGSYS; 24 bytes into it lies an i32.
    let number = unsafe { info.byte_add(24).cast::<i32>().read() };
    let _ = UNDOCUMENTED.compare_exchange(-1, number.into(), Ordering::Release, Ordering::Relaxed);
}

impl Documented {
    /// Compiled beforehand, so that a thread that is about to end has nothing to free behind the filter.
    pub fn new() -> Documented {
        // SAFETY: a handler that only stores a number.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = note_call as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(
                libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()),
                0
            );
        }
        let futex =
            |operation: libc::c_int| allow(libc::SYS_futex).when(1, operation.cast_unsigned());
        let list = [
            allow(libc::SYS_rt_sigprocmask),
            allow(libc::SYS_madvise).when(2, libc::MADV_DONTNEED.cast_unsigned()),
            allow(libc::SYS_exit),
            futex(libc::FUTEX_WAIT),
            futex(libc::FUTEX_WAKE),
            futex(libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG),
            futex(libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG),
            // The handler's.
            allow(libc::SYS_rt_sigreturn),
        ];
        let rules = rules(list.map(|entry| (entry.syscall, entry.conditions)));
        Documented(compile(rules, SeccompAction::Trap, SeccompAction::Allow))
    }

    /// Puts the filter before the calling thread.
    pub fn install(&self) {
        seccompiler::apply_filter(&self.0).expect("a filter that the kernel takes");
    }
}

/// The number of a call that was not documented.
pub fn undocumented_call() -> Option<i64> {
    let number = UNDOCUMENTED.load(Ordering::Acquire);
    (number >= 0).then_some(number)
}

/// What Firecracker lets a vCPU thread do, without what only serves the virtual machine.
pub fn firecracker_vcpu_filter() -> Vec<Allow> {
    let futex = |operation| allow(libc::SYS_futex).when(1, operation);
    vec![
        allow(libc::SYS_exit),
        allow(libc::SYS_exit_group),
        allow(libc::SYS_munmap),
        allow(libc::SYS_mremap),
        allow(libc::SYS_brk),
        allow(libc::SYS_rt_sigprocmask),
        allow(libc::SYS_rt_sigreturn),
        allow(libc::SYS_sigaltstack),
        allow(libc::SYS_gettid),
        allow(libc::SYS_sched_yield),
        allow(libc::SYS_write),
        allow(libc::SYS_close),
        allow(libc::SYS_clock_gettime),
        allow(libc::SYS_madvise).when(2, libc::MADV_DONTNEED.cast_unsigned()),
        futex(0),
        futex(1),
        futex(128),
        futex(129),
        futex(137),
        allow(libc::SYS_mmap).when(2, 3).when(3, 34),
    ]
}

/// What Cloud Hypervisor lets a vCPU thread do, without what only serves the virtual machine.
pub fn cloud_hypervisor_vcpu_filter() -> Vec<Allow> {
    [
        libc::SYS_brk,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_close,
        libc::SYS_dup,
        libc::SYS_exit,
        libc::SYS_fcntl,
        libc::SYS_fstat,
        libc::SYS_futex,
        libc::SYS_getcwd,
        libc::SYS_getpid,
        libc::SYS_getrandom,
        libc::SYS_gettid,
        libc::SYS_lseek,
        libc::SYS_madvise,
        libc::SYS_mmap,
        libc::SYS_mprotect,
        libc::SYS_mremap,
        libc::SYS_munmap,
        libc::SYS_nanosleep,
        libc::SYS_newfstatat,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_read,
        libc::SYS_recvmsg,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sched_yield,
        libc::SYS_sendmsg,
        libc::SYS_sigaltstack,
        libc::SYS_tgkill,
        libc::SYS_tkill,
        libc::SYS_write,
    ]
    .map(allow)
    .into()
}

/// What Cloud Hypervisor lets its vmm thread do, which starts and joins the others, without what only serves the
/// virtual machine.
pub fn cloud_hypervisor_vmm_filter() -> Vec<Allow> {
    [
        libc::SYS_brk,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_clone,
        libc::SYS_clone3,
        libc::SYS_close,
        libc::SYS_dup,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_fcntl,
        libc::SYS_fstat,
        libc::SYS_futex,
        libc::SYS_getdents64,
        libc::SYS_getpid,
        libc::SYS_getrandom,
        libc::SYS_gettid,
        libc::SYS_getuid,
        libc::SYS_kill,
        libc::SYS_lseek,
        libc::SYS_madvise,
        libc::SYS_mmap,
        libc::SYS_mprotect,
        libc::SYS_mremap,
        libc::SYS_munmap,
        libc::SYS_nanosleep,
        libc::SYS_newfstatat,
        libc::SYS_openat,
        libc::SYS_prctl,
        libc::SYS_prlimit64,
        libc::SYS_read,
        libc::SYS_readlink,
        libc::SYS_rseq,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sched_getaffinity,
        libc::SYS_sched_setaffinity,
        libc::SYS_sched_yield,
        libc::SYS_seccomp,
        libc::SYS_set_robust_list,
        libc::SYS_sigaltstack,
        libc::SYS_statx,
        libc::SYS_tgkill,
        libc::SYS_write,
    ]
    .map(allow)
    .into()
}

/// What the crate says it calls in these phases.
pub fn contract<const N: usize>(phases: [nptl::seccomp::Phase; N]) -> Vec<Allow> {
    let calls = nptl::seccomp::calls(phases);
    calls
        .map(|call| {
            let arguments = call.arguments.iter();
            arguments.fold(allow(call.number), |allow, (index, value)| {
                allow.when(*index, *value)
            })
        })
        .collect()
}

fn condition(number: u8, operation: SeccompCmpOp, value: u64) -> SeccompCondition {
    SeccompCondition::new(number, SeccompCmpArgLen::Qword, operation, value)
        .expect("an argument number below 6")
}

fn rules(
    entries: impl IntoIterator<Item = (libc::c_long, Vec<SeccompCondition>)>,
) -> BTreeMap<i64, Vec<SeccompRule>> {
    let mut rules = BTreeMap::<i64, Vec<SeccompRule>>::new();
    for (syscall, conditions) in entries {
        let known = rules.get(&syscall).map(Vec::len);
        let alternatives = rules.entry(syscall).or_default();
        match SeccompRule::new(conditions) {
            // No rule at all means any arguments.
            Err(_) => alternatives.clear(),
            Ok(_) if known == Some(0) => {}
            Ok(rule) => alternatives.push(rule),
        }
    }
    rules
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> BpfProgram {
    let arch = TargetArch::try_from(std::env::consts::ARCH).expect("a known architecture");
    let filter = SeccompFilter::new(rules, otherwise, matched, arch).expect("a valid filter");
    BpfProgram::try_from(filter).expect("a filter that compiles")
}
