//! What a report says of each cause: the evidence with the place it was read from, and what an administrator does.

use super::*;

fn explain(cause: &Cause, transient: bool) -> String {
    Explanation {
        cause,
        certainty: Certainty::Proven,
        alternatives: Causes::NONE,
        silence: None,
        transient,
    }
    .to_string()
}

fn pids(directory: &str, place: CgroupPlace) -> Cause {
    Cause::PidsCgroup {
        directory: InlinePath::new(directory.as_bytes()),
        place,
        version: 2,
        current: Some(101),
        maximum: Some(100),
        refusals: Some(1),
    }
}

fn numbers(level: PidLevel) -> Cause {
    Cause::PidNumbers {
        level,
        pid_max: Some(32768),
        sampled: 256,
        free: 3,
        initial_namespace: Some(true),
    }
}

fn memory(version: u8, directory: &str, unread: Option<Errno>) -> Cause {
    Cause::KernelMemory {
        directory: InlinePath::new(directory.as_bytes()),
        version,
        usage: Some(66_000_000),
        limit: Some(67_108_864),
        failures: Some(2),
        unread,
    }
}

fn user(uid: Option<u32>, initial_user_namespace: Option<bool>) -> Cause {
    Cause::UserProcesses {
        uid,
        soft: Some(500),
        hard: Some(1000),
        initial_user_namespace,
        tasks: Some(4321),
    }
}

/// Each cause, lines of its evidence, and words of its remedy.
fn table() -> Vec<(Cause, &'static [&'static str], &'static [&'static str])> {
    let (requested, in_use, limit) = (8 << 20, Some(100 << 20), Some(104 << 20));
    vec![
        (
            Cause::InvalidAttribute {
                what: "stack and guard exceed the address space",
                value: 1 << 63,
            },
            &["stack and guard exceed the address space: 9223372036854775808"],
            &["Ask for a value the documentation allows."],
        ),
        (
            Cause::UnsupportedRuntime {
                what: "symbol _dl_allocate_tls",
            },
            &["failed check: symbol _dl_allocate_tls"],
            &["glibc from 2.34 on", "report the failed check"],
        ),
        (
            Cause::Seccomp {
                call: CloneCall::Clone3,
                answer: Answer::Refused(Errno::EPERM),
                mode: Some(2),
                filters: Some(1),
            },
            &[
                "clone3 with no or invalid arguments, which a kernel refuses with EINVAL: EPERM",
                "/proc/thread-self/status, Seccomp: 2",
                "/proc/thread-self/status, Seccomp_filters: 1",
            ],
            &[
                "Allow clone3 for threads in the filter",
                "--security-opt seccomp=PROFILE",
                "SystemCallFilter=",
                "should answer ENOSYS",
            ],
        ),
        (
            Cause::Seccomp {
                call: CloneCall::Clone,
                answer: Answer::Refused(Errno::EPERM),
                mode: Some(2),
                filters: Some(1),
            },
            &["clone with invalid flags, which a kernel refuses with EINVAL: EPERM"],
            &["Allow clone for threads in the filter"],
        ),
        (
            user(Some(1234), Some(true)),
            &[
                "/proc/thread-self/status, real Uid: 1234",
                "RLIMIT_NPROC, soft: 500",
                "RLIMIT_NPROC, hard: 1000",
                "/proc/loadavg, tasks of all users: 4321",
            ],
            &[
                "prlimit --pid PID --nproc=N:N",
                "ulimit -u N",
                "LimitNPROC=N",
                "nproc in /etc/security/limits.conf",
                "docker run --ulimit nproc=N",
                // -U: the limit counts by the real user.
                "ps -L -U 1234 ",
                "CAP_SYS_RESOURCE exempts",
            ],
        ),
        (
            user(None, Some(false)),
            &[
                "/proc/thread-self/status, real Uid: not readable",
                "A user namespace also enforces the RLIMIT_NPROC it was created under",
            ],
            &["ps -L -U UID ", "before it does"],
        ),
        (
            Cause::ThreadsMax {
                tasks: Some(5000),
                maximum: Some(5000),
            },
            &[
                "/proc/loadavg, tasks of all users: 5000",
                "/proc/sys/kernel/threads-max: 5000",
            ],
            &["sysctl kernel.threads-max=N", "/etc/sysctl.d", "ps -eL"],
        ),
        (
            Cause::DeadlineScheduling {
                policy: 6,
                flags: Some(0),
            },
            &[
                "scheduling policy (6 is SCHED_DEADLINE): 6",
                "sched_getattr, flags (bit 0 is reset-on-fork): 0",
            ],
            &[
                "SCHED_FLAG_RESET_ON_FORK",
                "chrt --deadline --reset-on-fork",
                "under another policy",
            ],
        ),
        (
            Cause::SiblingExec { threads: Some(2) },
            &["/proc/thread-self/status, Threads: 2"],
            &["inside execve", "within milliseconds", "Retrying is right."],
        ),
        (
            numbers(PidLevel::Own),
            &[
                "no number left in: the pid namespace of this process",
                "/proc/sys/kernel/pid_max: 32768",
                "numbers of the own namespace looked at: 256",
                "of these free: 3",
                "This is the initial pid namespace.",
            ],
            &[
                "sysctl kernel.pid_max=N inside this pid namespace",
                "N up to 4194304",
                "/etc/sysctl.d",
                "Zombies hold numbers",
            ],
        ),
        (
            numbers(PidLevel::Ancestor),
            &["no number left in: a pid namespace around that of this process"],
            &["in the pid namespace around this one: on the host or in the outer container"],
        ),
        (
            numbers(PidLevel::OwnOrAncestor),
            &["no number left in: the pid namespace of this process or one around it"],
            &["in this pid namespace and in those around it"],
        ),
        (
            Cause::DyingPidNamespace {
                namespace: Some(4026532000),
            },
            &["/proc/thread-self/ns/pid: 4026532000"],
            &["Nothing from inside", "Keep the first process"],
        ),
        (
            Cause::UnsharedPidNamespace {
                own: Some(4026531836),
                for_children: Some(4026532000),
            },
            &[
                "/proc/thread-self/ns/pid: 4026531836",
                "/proc/thread-self/ns/pid_for_children: 4026532000",
            ],
            &["before unshare(CLONE_NEWPID) or setns", "fork after it"],
        ),
        (
            pids("/sys/fs/cgroup/system.slice/qemu.service", CgroupPlace::Own),
            &[
                "cgroup: the cgroup of this thread",
                "directory: /sys/fs/cgroup/system.slice/qemu.service",
                "cgroup version: 2",
                "pids.current: 101",
                "pids.max: 100",
                "pids.events rose over a repeated refusal by: 1",
            ],
            &[
                "echo N > /sys/fs/cgroup/system.slice/qemu.service/pids.max\n",
                "systemctl set-property qemu.service TasksMax=N",
                "user-.slice",
                "--pids-limit",
                "podPidsLimit",
            ],
        ),
        (
            pids("/sys/fs/cgroup/my group", CgroupPlace::Ancestor),
            &["cgroup: an ancestor of this thread's cgroup"],
            &[
                "echo N > '/sys/fs/cgroup/my group/pids.max'\n",
                "systemctl set-property UNIT TasksMax=N",
            ],
        ),
        (
            pids("", CgroupPlace::Hidden),
            &["cgroup: an ancestor outside this cgroup namespace"],
            &[
                "on the host",
                "docker run --pids-limit",
                "podPidsLimit",
                "TasksMax=N",
            ],
        ),
        (
            pids("", CgroupPlace::Target),
            &["cgroup: the one the thread was to enter, or an ancestor of it"],
            &["Raise pids.max of the full one", "TasksMax=N"],
        ),
        (
            pids("", CgroupPlace::Unclear),
            &["cgroup: this thread's cgroup or an ancestor"],
            &["Raise pids.max of the full one", "TasksMax=N"],
        ),
        (
            memory(1, "/sys/fs/cgroup/memory/vm", None),
            &[
                "directory: /sys/fs/cgroup/memory/vm",
                "cgroup version: 1",
                "memory in use: 66000000 bytes (62.94 MiB)",
                "memory limit: 67108864 bytes (64.00 MiB)",
                "failed charges during a refused probe: 2",
            ],
            &[
                "echo BYTES > /sys/fs/cgroup/memory/vm/memory.limit_in_bytes ",
                "--memory",
                "free memory in that cgroup",
            ],
        ),
        (
            memory(2, "/sys/fs/cgroup/vm.scope", None),
            &["directory: /sys/fs/cgroup/vm.scope", "cgroup version: 2"],
            &[
                "echo BYTES > /sys/fs/cgroup/vm.scope/memory.max\n",
                "systemctl set-property vm.scope MemoryMax=BYTES",
                "--memory",
            ],
        ),
        (
            memory(0, "", None),
            &["No memory cgroup could be read that counted a failed charge."],
            &["Free memory", "dmesg", "memory.max", "MemoryMax="],
        ),
        (
            memory(0, "", Some(Errno::EMFILE)),
            &[
                "The files that could name a memory cgroup cannot be read: EMFILE (Too many open files).",
            ],
            &["Free memory"],
        ),
        (
            Cause::AddressSpace {
                requested,
                in_use,
                limit,
            },
            &[
                "requested: 8388608 bytes (8.00 MiB)",
                "/proc/thread-self/status, VmSize: 104857600 bytes (100.00 MiB)",
                "RLIMIT_AS: 109051904 bytes (104.00 MiB)",
            ],
            &[
                "ulimit -v KIB",
                "prlimit --pid PID --as=BYTES:BYTES",
                "LimitAS=BYTES",
                "limits.conf",
                "smaller stacks",
            ],
        ),
        (
            Cause::DataSegment {
                requested,
                in_use,
                limit,
            },
            &[
                "/proc/thread-self/status, VmData: 104857600 bytes (100.00 MiB)",
                "RLIMIT_DATA: 109051904 bytes (104.00 MiB)",
            ],
            &[
                "ulimit -d KIB",
                "prlimit --pid PID --data=BYTES:BYTES",
                "LimitDATA=BYTES",
                "limits.conf",
                "smaller stacks",
            ],
        ),
        (
            Cause::MapCount {
                maximum: Some(65530),
                split: true,
            },
            &[
                "/proc/sys/vm/max_map_count: 65530",
                "mappings of this process: exactly that many; a guard splits one",
            ],
            &["sysctl vm.max_map_count=N", "/etc/sysctl.d", "Linux 6.13"],
        ),
        (
            Cause::MapCount {
                maximum: Some(65530),
                split: false,
            },
            &["mappings of this process: more than that"],
            &["sysctl vm.max_map_count=N"],
        ),
        (
            Cause::Overcommit {
                mode: Some(2),
                requested,
                in_use,
                limit,
            },
            &[
                "/proc/sys/vm/overcommit_memory: 2",
                "/proc/meminfo, Committed_AS: 104857600 bytes (100.00 MiB)",
                "/proc/meminfo, CommitLimit: 109051904 bytes (104.00 MiB)",
            ],
            &[
                "sysctl vm.overcommit_ratio=PERCENT",
                "vm.overcommit_kbytes=KIB",
                "add swap",
                "sysctl vm.overcommit_memory=0",
                "smaller stacks",
            ],
        ),
        (
            Cause::Overcommit {
                mode: Some(0),
                requested,
                in_use: Some(0),
                limit,
            },
            &[
                "/proc/sys/vm/overcommit_memory: 0",
                "/proc/meminfo, MemTotal and SwapTotal: 109051904 bytes (104.00 MiB)",
            ],
            &["Use a smaller stack", "sysctl vm.overcommit_memory=1"],
        ),
        (
            Cause::LockedMemory {
                requested,
                in_use,
                limit,
            },
            &[
                "/proc/thread-self/status, VmLck: 104857600 bytes (100.00 MiB)",
                "RLIMIT_MEMLOCK: 109051904 bytes (104.00 MiB)",
            ],
            &[
                "ulimit -l KIB",
                "prlimit --pid PID --memlock=BYTES:BYTES",
                "LimitMEMLOCK=BYTES",
                "memlock in /etc/security/limits.conf",
                "docker run --ulimit memlock=BYTES",
                "CAP_IPC_LOCK",
                "lock_stack",
                "mlockall(MCL_FUTURE)",
            ],
        ),
        (
            Cause::AddressSpaceExhausted { requested, in_use },
            &[
                "requested: 8388608 bytes (8.00 MiB)",
                "/proc/thread-self/status, VmSize: 104857600 bytes (100.00 MiB)",
            ],
            &["Unmap something", "/proc/PID/maps", "smaller stacks"],
        ),
        (
            Cause::NotPermitted {
                what: "the scheduling policy or priority",
                cap_sys_nice: Some(false),
                rtprio: Some(0),
            },
            &[
                "refused: the scheduling policy or priority",
                "CAP_SYS_NICE: not effective",
                "RLIMIT_RTPRIO: 0",
            ],
            &[
                "CAP_SYS_NICE",
                "LimitRTPRIO=",
                "cpu.rt_runtime_us",
                "cgroup.procs",
            ],
        ),
        (
            Cause::OutsideCpuset {
                directory: InlinePath::new(b"/sys/fs/cgroup/vm"),
            },
            &["cpuset: /sys/fs/cgroup/vm"],
            &["cpuset.cpus", "AllowedCPUs="],
        ),
        (
            Cause::Unknown {
                oracle: Oracle {
                    until_cgroup: Answer::Refused(Errno::EBADF),
                    ..Oracle::default()
                },
                memory: MemoryOracle {
                    stack: Answer::Granted,
                    ..MemoryOracle::default()
                },
                tasks: Some(300),
                threads_max: Some(30000),
                nproc: Some(UNLIMITED),
                pid_max: None,
                seccomp: Some(0),
            },
            &[
                "clone3 up to the cgroup: EBADF",
                "mmap, as a stack, same length: granted",
                "/proc/loadavg, tasks of all users: 300",
                "/proc/sys/kernel/threads-max: 30000",
                "RLIMIT_NPROC, soft: unlimited",
                "/proc/thread-self/status, Seccomp: 0",
            ],
            &["Nothing can be advised with certainty."],
        ),
    ]
}

#[test]
fn every_report_has_the_evidence_and_what_to_change() {
    let mut seen = Causes::NONE;
    for (cause, evidence, remedy) in table() {
        let text = explain(&cause, false);
        seen = seen.with(cause.kind());
        let (found, advice) = text.split_once("what to change:\n").expect("an advice");
        let (_, found) = found.split_once("evidence:\n").expect("evidence");
        for line in evidence {
            let there = found.lines().any(|one| one.trim_start().starts_with(line));
            assert!(there, "no line {line:?} in\n{text}");
        }
        for words in remedy {
            assert!(
                advice.contains(words),
                "{words:?} is not advised in\n{text}"
            );
        }
        for line in text.lines() {
            assert!(line.len() <= 126, "a line of {} bytes: {line}", line.len());
            assert_eq!(line, line.trim_end(), "blanks at the end");
        }
    }
    for kind in CauseKind::ALL {
        assert!(seen.contains(kind), "{kind:?} has no line in the table");
    }
}

fn unknown(oracle: Oracle) -> Cause {
    Cause::Unknown {
        oracle,
        memory: MemoryOracle::default(),
        tasks: None,
        threads_max: None,
        nproc: None,
        pid_max: None,
        seccomp: None,
    }
}

/// Where the questions are useless, both the line and the report say why.
#[test]
fn a_kernel_that_cannot_be_asked_is_named() {
    use Answer::{Granted, NotAsked, Refused};
    for (clone3_empty, until_pid_number, why) in [
        (
            Refused(Errno::EPERM),
            NotAsked,
            Some("a filter or a tracer answers clone3"),
        ),
        (
            Granted,
            NotAsked,
            Some("a filter or a tracer answers clone3"),
        ),
        (
            Refused(Errno::EINVAL),
            Refused(Errno::EPERM),
            Some("a filter or a tracer answers clone3"),
        ),
        (
            Refused(Errno::ENOSYS),
            NotAsked,
            Some("no clone3 (Linux before 5.3, or a filter)"),
        ),
        (
            Refused(Errno::EINVAL),
            Refused(Errno::E2BIG),
            Some("Linux before 5.7"),
        ),
        (Refused(Errno::EINVAL), Refused(Errno::EAGAIN), None),
        (Refused(Errno::EINVAL), Refused(Errno::EINVAL), None),
        (Refused(Errno::EINVAL), NotAsked, None),
        (NotAsked, NotAsked, None),
    ] {
        let oracle = Oracle {
            clone3_empty,
            until_pid_number,
            ..Oracle::default()
        };
        let silence = oracle.silence();
        let inferred = Explanation {
            cause: &numbers(PidLevel::Own),
            certainty: Certainty::Inferred,
            alternatives: Causes::NONE,
            silence,
            transient: false,
        };
        let (line, report) = (unknown(oracle).to_string(), inferred.to_string());
        match why {
            Some(why) => {
                assert!(line.starts_with(&format!("unknown: {why}")), "{line}");
                let start = format!("not proven: {why}");
                let there = |line: &str| line.starts_with(&start) && line.len() <= 126;
                assert!(report.lines().any(there), "{report}");
            }
            None => {
                assert_eq!(line, "unknown");
                assert!(!report.contains("not proven"), "{report}");
            }
        }
    }
}

#[test]
fn a_transient_report_says_why_retrying_is_right() {
    for (cause, ..) in table() {
        let (lasting, transient) = (explain(&cause, false), explain(&cause, true));
        if cause.kind() == CauseKind::SiblingExec {
            // It says so itself.
            assert_eq!(lasting, transient);
            continue;
        }
        assert!(!lasting.contains("Retrying"), "{lasting}");
        let more = transient
            .strip_prefix(&lasting)
            .expect("the same, and more");
        assert!(more.contains("Retrying for some milliseconds is right"));
        assert!(more.contains("until the kernel has reaped them"));
    }
}

/// A command with a name that was cut would change another cgroup's limit.
#[test]
fn no_command_has_a_name_that_was_cut() {
    let long = format!("/sys/fs/cgroup/{}", "x".repeat(4096));
    for cause in [
        pids(&long, CgroupPlace::Own),
        memory(1, &long, None),
        memory(2, &long, None),
    ] {
        let text = explain(&cause, false);
        assert!(text.contains("xxx..."), "{text}");
        assert!(!text.contains("echo"), "{text}");
        assert!(text.contains("of that cgroup"), "{text}");
    }
}

#[test]
fn a_path_is_cut_between_characters_and_marked() {
    let whole = "/".to_owned() + &"€".repeat(84);
    assert_eq!(whole.len(), InlinePath::CAPACITY);
    for (path, shown) in [
        (whole.clone(), whole.clone()),
        (format!("{whole}/"), format!("{whole}...")),
        (format!("/{whole}"), format!("/{}...", &whole[..250])),
        (format!("//{whole}"), format!("//{}...", &whole[..250])),
    ] {
        let inline = InlinePath::new(path.as_bytes());
        assert_eq!(inline.to_string(), shown);
        assert_eq!(inline.to_str().is_none(), shown.ends_with("..."));
    }
}

/// What the line above says could also be the cause is not ruled out below.
#[test]
fn evidence_rules_out_only_what_is_excluded() {
    let cause = user(Some(1000), Some(true));
    assert!(explain(&cause, false).contains("neither kernel.threads-max nor"));
    let explanation = Explanation {
        cause: &cause,
        certainty: Certainty::Inferred,
        alternatives: Causes::NONE.with(CauseKind::ThreadsMax),
        silence: None,
        transient: false,
    };
    let text = explanation.to_string();
    assert!(!text.contains("neither kernel.threads-max"), "{text}");
    assert!(
        text.contains("The kernel refused before pid allocation."),
        "{text}"
    );
}
