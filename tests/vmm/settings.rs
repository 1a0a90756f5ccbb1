//! Settings: in force when the closure begins, or refused with the reason, and nothing left.

use super::wait_until;
use nptl::diagnose::Cause;
use nptl::{Builder, Certainty, CoreScheduling, Scheduler, SpawnError, Step};
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;
use support::{
    Cgroup, Snapshot, alone, await_reaping, become_unused_user, deny, is_root, or_skip,
    resident_pages, skip, tid,
};

/// What the kernel says of the calling thread.
pub(super) fn affinity() -> Vec<usize> {
    // SAFETY: all zeroes is an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: a place for the set, of its size.
    unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) };
    // SAFETY: numbers below that of the bits.
    (0..1024)
        .filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) })
        .collect()
}

/// Policy, priority, and nice value of the calling thread.
fn policy() -> (i32, i32, i32) {
    let mut parameters = libc::sched_param { sched_priority: 0 };
    // SAFETY: a place for the parameters; 0 is the calling thread.
    unsafe {
        libc::sched_getparam(0, &raw mut parameters);
        let nice = libc::getpriority(libc::PRIO_PROCESS, tid().cast_unsigned());
        (libc::sched_getscheduler(0), parameters.sched_priority, nice)
    }
}

fn blocked() -> u64 {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("SigBlk:"));
    u64::from_str_radix(line.unwrap().trim(), 16).unwrap()
}

/// The refusal of a thread, of which nothing is left: no thread, no descriptor, no mapping; and the closure is back.
#[track_caller]
pub(super) fn refused(builder: &Builder, step: Step, errno: i32) -> SpawnError {
    let attempt = || {
        let (error, back) = builder
            .clone()
            .spawn_or_return(|| 5)
            .unwrap_err()
            .into_parts();
        assert_eq!(back(), 5);
        error
    };
    // What is read for the first time stays open or mapped.
    attempt();
    await_reaping();
    Snapshot::take();
    let before = Snapshot::take();
    let error = attempt();
    await_reaping();
    let after = Snapshot::take();
    assert_eq!(
        (error.step(), error.errno().raw()),
        (step, errno),
        "{error}"
    );
    assert_eq!(before.kernel_threads, after.kernel_threads);
    assert_eq!(before.glibc_threads, after.glibc_threads);
    assert_eq!(before.fds, after.fds);
    assert_eq!(before.maps, after.maps);
    error
}

pub(super) fn open(directory: &Path) -> File {
    File::open(directory).unwrap()
}

#[test]
fn affinity_mask_name_and_setup_are_in_force_at_the_first_instruction() {
    let cpus = affinity();
    let last = *cpus.last().unwrap();
    let builder = Builder::new()
        .name("vcpu0")
        .cpu_affinity([last])
        .blocked_signals([libc::SIGUSR1, libc::SIGRTMIN() + 3, 33]);
    let expected = 1 << (libc::SIGUSR1 - 1) | 1 << (libc::SIGRTMIN() + 2);
    let look = || (affinity(), blocked());
    let thread = builder
        .clone()
        .spawn_with_setup(move || Ok::<_, ()>(look()), move |setup| (setup, look()));
    let seen = (vec![last], expected);
    assert_eq!(
        thread.unwrap().join().unwrap(),
        (seen.clone(), seen.clone())
    );
    let thread = builder.spawn(move || {
        let comm = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
        (look(), comm)
    });
    assert_eq!(
        thread.unwrap().join().unwrap(),
        (seen, "vcpu0\n".to_owned())
    );
    // None at all is a mask, too.
    assert_eq!(
        Builder::new()
            .blocked_signals([])
            .spawn(blocked)
            .unwrap()
            .join()
            .unwrap(),
        0
    );
    // And the creator has what it had.
    assert_eq!(affinity(), cpus);
}

/// A signal that is sent to the process while threads start is handled in none that blocks it.
#[test]
fn no_signal_gets_into_a_thread_that_blocks_it() {
    alone(
        "settings::no_signal_gets_into_a_thread_that_blocks_it",
        || {
            static MAIN: AtomicI32 = AtomicI32::new(0);
            static ELSEWHERE: AtomicI32 = AtomicI32::new(0);
            static HANDLED: AtomicI32 = AtomicI32::new(0);
            extern "C" fn note(_: libc::c_int) {
                HANDLED.fetch_add(1, Ordering::Relaxed);
                // The harness's first thread does not block it.
                if ![
                    MAIN.load(Ordering::Relaxed),
                    std::process::id().cast_signed(),
                ]
                .contains(&tid())
                {
                    ELSEWHERE.store(tid(), Ordering::Relaxed);
                }
            }
            let receiver = Builder::new().blocked_signals([]).spawn(|| {
                MAIN.store(tid(), Ordering::Relaxed);
                // SAFETY: a handler that only stores numbers.
                unsafe { libc::signal(libc::SIGALRM, note as *const () as usize) };
                while HANDLED.load(Ordering::Relaxed) < 1000 {
                    std::thread::sleep(Duration::from_micros(100));
                }
            });
            let receiver = receiver.unwrap();
            wait_until("the handler is there", || MAIN.load(Ordering::Relaxed) != 0);
            // SAFETY: blocks the signal in this thread, and starts a timer for the process.
            unsafe {
                let mut set: libc::sigset_t = std::mem::zeroed();
                libc::sigaddset(&raw mut set, libc::SIGALRM);
                libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
                let interval = libc::timeval {
                    tv_sec: 0,
                    tv_usec: 500,
                };
                let timer = libc::itimerval {
                    it_interval: interval,
                    it_value: interval,
                };
                libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut());
            }
            while !receiver.is_finished() {
                let thread = Builder::new().blocked_signals([libc::SIGALRM]).spawn(|| ());
                thread.unwrap().join().unwrap();
            }
            receiver.join().unwrap();
            assert_eq!(ELSEWHERE.load(Ordering::Relaxed), 0);
        },
    );
}

#[test]
fn each_policy_is_in_force_and_is_read_and_changed_by_the_handle() {
    if !is_root() {
        skip!("real-time policies need root");
    }
    let ms = Duration::from_millis;
    let deadline = Scheduler::Deadline {
        runtime: ms(1),
        deadline: ms(10),
        period: ms(20),
    };
    for (scheduler, expected) in [
        (
            Scheduler::Other { nice: 7 },
            Some((libc::SCHED_OTHER, 0, 7)),
        ),
        (
            Scheduler::Other { nice: -7 },
            Some((libc::SCHED_OTHER, 0, -7)),
        ),
        (
            Scheduler::Batch { nice: 3 },
            Some((libc::SCHED_BATCH, 0, 3)),
        ),
        (Scheduler::Idle, Some((libc::SCHED_IDLE, 0, 0))),
        (
            Scheduler::Fifo { priority: 11 },
            Some((libc::SCHED_FIFO, 11, 0)),
        ),
        (
            Scheduler::RoundRobin { priority: 1 },
            Some((libc::SCHED_RR, 1, 0)),
        ),
        (deadline, None),
    ] {
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let (first, seen) = std::sync::mpsc::channel();
        let body = move || {
            first.send(policy()).unwrap();
            let _ = wait.recv();
            policy().0
        };
        let thread = Builder::new().scheduler(scheduler).spawn(body).unwrap();
        let seen = seen.recv().unwrap();
        assert_eq!(thread.scheduler().unwrap(), scheduler);
        thread.set_scheduler(Scheduler::Other { nice: 0 }).unwrap();
        assert_eq!(thread.scheduler().unwrap(), Scheduler::Other { nice: 0 });
        drop(end);
        let after = thread.join().unwrap();
        match expected {
            Some(expected) => assert_eq!(seen, expected),
            None => assert_eq!(seen.0, 6),
        }
        assert_eq!(after, libc::SCHED_OTHER);
    }
}

#[test]
fn the_handle_reads_and_changes_affinity_until_the_thread_has_ended() {
    let cpus = affinity();
    let (end, wait) = std::sync::mpsc::channel::<()>();
    let body = move || {
        let _ = wait.recv();
        affinity()
    };
    let thread = nptl::spawn(body).unwrap();
    assert_eq!(thread.cpu_affinity().unwrap(), cpus);
    thread.set_cpu_affinity([cpus[0]]).unwrap();
    assert_eq!(thread.cpu_affinity().unwrap(), [cpus[0]]);
    for wrong in [vec![], vec![8191], vec![1 << 40]] {
        let error = thread.set_cpu_affinity(wrong).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
    drop(end);
    wait_until("the thread has ended", || thread.is_finished());
    for error in [
        thread.cpu_affinity().map(|_| ()),
        thread.set_cpu_affinity(cpus.iter().copied()),
        thread.scheduler().map(|_| ()),
        thread.set_scheduler(Scheduler::Idle),
    ] {
        assert_eq!(error.unwrap_err().raw_os_error(), Some(libc::ESRCH));
    }
    assert_eq!(thread.join().unwrap(), [cpus[0]]);
}

#[test]
fn a_published_thread_can_be_unparked() {
    let body = || {
        std::thread::park();
        std::thread::current().id()
    };
    let thread = Builder::new().publish_std_thread(true).spawn(body).unwrap();
    let known = thread.thread().unwrap().clone();
    known.unpark();
    assert_eq!(thread.join().unwrap(), known.id());
    assert!(nptl::spawn(|| ()).unwrap().thread().is_none());
}

#[test]
fn locked_and_prefaulted_memory_is_there_before_the_closure() {
    let size = 256 << 10;
    let builder = Builder::new()
        .stack_size(size)
        .prefault_stack(size / 2)
        .lock_stack(true);
    let thread = builder.spawn(|| {
        let here = 0_u8;
        let page = (&raw const here as usize) & !4095;
        let below = 128 << 10;
        let smaps = std::fs::read_to_string("/proc/thread-self/smaps").unwrap();
        let mut locked = 0;
        let mut inside = false;
        for line in smaps.lines() {
            if let Some((range, _)) = line.split_once(' ')
                && let Some((start, end)) = range.split_once('-')
                && let (Ok(start), Ok(end)) = (
                    usize::from_str_radix(start, 16),
                    usize::from_str_radix(end, 16),
                )
            {
                inside = (start..end).contains(&page);
            } else if inside && let Some(value) = line.strip_prefix("Locked:") {
                locked = value.trim().trim_end_matches(" kB").parse().unwrap();
            }
        }
        (resident_pages(page - below, below), locked)
    });
    let (resident, locked): (_, usize) = or_skip!(thread.map_err(|error| error.to_string()))
        .join()
        .unwrap();
    assert_eq!(resident, Some(32));
    assert!(locked >= 256, "{locked} kB");
}

#[test]
fn what_no_kernel_accepts_is_an_attribute() {
    let ms = Duration::from_millis;
    let builders = [
        Builder::new().cpu_affinity([]),
        Builder::new().cpu_affinity([usize::MAX]),
        Builder::new().blocked_signals([65]),
        Builder::new().blocked_signals([0]),
        Builder::new().scheduler(Scheduler::Fifo { priority: 0 }),
        Builder::new().scheduler(Scheduler::RoundRobin { priority: 100 }),
        Builder::new().scheduler(Scheduler::Other { nice: 20 }),
        Builder::new().scheduler(Scheduler::Batch { nice: i32::MIN }),
        Builder::new().core_scheduling(CoreScheduling::SameAs(0)),
        Builder::new().core_scheduling(CoreScheduling::SameAs(-1)),
        Builder::new().blocked_signals([-1]),
        Builder::new().scheduler(Scheduler::Deadline {
            runtime: ms(2),
            deadline: ms(1),
            period: ms(3),
        }),
    ];
    for builder in builders {
        let error = builder.clone().spawn(|| ()).unwrap_err();
        assert_eq!(error.step(), Step::Attributes, "{builder:?}");
        assert_eq!(error.errno(), libc::EINVAL);
        assert_eq!(error.certainty(), Certainty::Proven);
    }
}

#[test]
fn cpus_outside_of_the_cpuset_are_refused_wholly_and_partly() {
    alone(
        "settings::cpus_outside_of_the_cpuset_are_refused_wholly_and_partly",
        || {
            let inside = affinity()[0];
            for (cpus, wholly) in [(vec![4095], true), (vec![inside, 4095], false)] {
                let error = refused(
                    &Builder::new().cpu_affinity(cpus),
                    Step::Affinity,
                    libc::EINVAL,
                );
                match error.cause() {
                    Cause::OutsideCpuset(cpuset) => {
                        assert_eq!((cpuset.missing, cpuset.partly), (4095, !wholly));
                    }
                    cause => panic!("{cause}"),
                }
                assert_eq!(error.certainty(), Certainty::Proven, "{}", error.report());
            }
        },
    );
}

/// First the cgroup, then the affinity: the cpuset is that of the requested cgroup.
#[test]
fn the_cpuset_of_the_requested_cgroup_counts() {
    let cgroup = or_skip!(Cgroup::cpuset());
    if cgroup.is_unified() {
        skip!("that of v2 is tried in unified.rs");
    }
    // A cpuset without memory nodes takes no thread.
    alone_in(
        &cgroup,
        "settings::the_cpuset_of_the_requested_cgroup_counts",
        |path| {
            let builder = Builder::new().cgroup(open(path));
            let error = refused(&builder, Step::Cgroup, libc::ENOSPC);
            assert_eq!(error.certainty(), Certainty::Unknown);
            std::fs::write(path.join("cpuset.mems"), "0").unwrap();
            let cpus = affinity();
            std::fs::write(path.join("cpuset.cpus"), cpus[0].to_string()).unwrap();
            let look = || {
                (
                    affinity(),
                    std::fs::read_to_string("/proc/thread-self/cgroup").unwrap(),
                )
            };
            let (seen, own) = builder.clone().spawn(look).unwrap().join().unwrap();
            assert_eq!(seen, [cpus[0]]);
            let name = path.file_name().unwrap().to_str().unwrap();
            let line = own.lines().find(|line| line.contains(":cpuset:")).unwrap();
            assert!(line.ends_with(name), "{line}");
            let Some(other) = cpus.get(1) else { return };
            let error = refused(
                &builder.cpu_affinity([*other]),
                Step::Affinity,
                libc::EINVAL,
            );
            match error.cause() {
                Cause::OutsideCpuset(cpuset) => {
                    assert_eq!((cpuset.missing, cpuset.partly), (*other, false));
                    assert_eq!(Path::new(cpuset.directory.to_str().unwrap()), path);
                }
                cause => panic!("{cause}"),
            }
        },
    );
}

/// As [`alone`], with the directory of a cgroup that the process does not enter.
fn alone_in(cgroup: &Cgroup, test: &str, work: impl FnOnce(&Path)) {
    const PLACE: &str = "NPTL_TEST_PLACE";
    if support::case().is_some() {
        return work(Path::new(&std::env::var_os(PLACE).unwrap()));
    }
    let child = support::child(test, "run").env(PLACE, cgroup.path());
    or_skip!(child.run()).success();
}

#[test]
fn a_v1_cgroup_without_real_time_is_named() {
    if !is_root() {
        skip!("real-time policies need root");
    }
    let cgroup = or_skip!(Cgroup::cpu());
    if !cgroup.path().join("cpu.rt_runtime_us").exists() {
        skip!("no cpu.rt_runtime_us");
    }
    alone_in(
        &cgroup,
        "settings::a_v1_cgroup_without_real_time_is_named",
        |path| {
            let builder = Builder::new()
                .scheduler(Scheduler::Fifo { priority: 1 })
                .cgroup(open(path));
            let error = refused(&builder, Step::Scheduler, libc::EPERM);
            match error.cause() {
                Cause::RealTimeRuntime(cgroup) => {
                    assert_eq!(Path::new(cgroup.directory.to_str().unwrap()), path);
                }
                cause => panic!("{cause}"),
            }
            assert_eq!(error.certainty(), Certainty::Proven, "{}", error.report());
            std::fs::write(path.join("cpu.rt_runtime_us"), "10000").unwrap();
            assert_eq!(
                builder.spawn(policy).unwrap().join().unwrap().0,
                libc::SCHED_FIFO
            );
        },
    );
}

#[test]
fn an_unprivileged_process_is_told_which_limit_it_lacks() {
    if !is_root() {
        skip!("becomes another user");
    }
    alone(
        "settings::an_unprivileged_process_is_told_which_limit_it_lacks",
        || {
            // Lowering needs no privilege; where more cannot be had, there is nothing that fits.
            let limit = |resource, value| {
                let limit = libc::rlimit {
                    rlim_cur: value,
                    rlim_max: value,
                };
                // SAFETY: a valid structure.
                unsafe { libc::setrlimit(resource, &raw const limit) == 0 }
            };
            let priority = u32::from(limit(libc::RLIMIT_RTPRIO, 10)) * 10;
            let nice = i32::from(limit(libc::RLIMIT_NICE, 22)) * 22;
            or_skip!(become_unused_user());
            if priority > 0 && nice > 0 {
                for scheduler in [
                    Scheduler::Fifo { priority },
                    Scheduler::Other { nice: 20 - nice },
                ] {
                    let thread = Builder::new().scheduler(scheduler).spawn(|| ());
                    thread.unwrap().join().unwrap();
                }
            }
            let lower = if nice > 0 { 20 - nice - 1 } else { -1 };
            for (scheduler, limit, needed) in [
                (
                    Scheduler::RoundRobin {
                        priority: priority + 1,
                    },
                    Some(priority.into()),
                    Some(u64::from(priority) + 1),
                ),
                (
                    Scheduler::Other { nice: lower },
                    Some(nice.unsigned_abs().into()),
                    Some((20 - lower).unsigned_abs().into()),
                ),
            ] {
                let builder = Builder::new().scheduler(scheduler);
                let error = refused(&builder, Step::Scheduler, libc::EPERM);
                match error.cause() {
                    Cause::NotPermitted(missing) => {
                        assert_eq!((missing.limit, missing.needed), (limit, needed));
                        assert_eq!(missing.cap_sys_nice, Some(false));
                    }
                    cause => panic!("{cause}"),
                }
                assert_eq!(error.certainty(), Certainty::Proven, "{}", error.report());
            }
        },
    );
}

#[test]
fn a_deadline_is_not_admitted_beyond_the_time_or_beside_an_affinity() {
    if !is_root() {
        skip!("SCHED_DEADLINE needs root");
    }
    alone(
        "settings::a_deadline_is_not_admitted_beyond_the_time_or_beside_an_affinity",
        || {
            let ms = Duration::from_millis;
            let all = Scheduler::Deadline {
                runtime: ms(100),
                deadline: ms(100),
                period: ms(100),
            };
            let little = Scheduler::Deadline {
                runtime: ms(1),
                deadline: ms(100),
                period: ms(100),
            };
            let mut narrow = vec![];
            if affinity().len() > 1 {
                let builder = Builder::new()
                    .scheduler(little)
                    .cpu_affinity([affinity()[0]]);
                narrow.push((builder, libc::EPERM, true));
            }
            // One after the other, until all time is given away.
            let (end, wait) = std::sync::mpsc::channel::<()>();
            let wait = std::sync::Arc::new(parking_lot::Mutex::new(wait));
            let admitted: Vec<_> = (0..1024)
                .map_while(|_| {
                    let wait = std::sync::Arc::clone(&wait);
                    let body = move || {
                        let _ = wait.lock().recv();
                    };
                    Builder::new().scheduler(all).spawn(body).ok()
                })
                .collect();
            narrow.push((Builder::new().scheduler(all), libc::EBUSY, false));
            assert!(!admitted.is_empty());
            for (builder, errno, narrowed) in narrow {
                let error = refused(&builder, Step::Scheduler, errno);
                match error.cause() {
                    Cause::DeadlineAdmission(admission) => assert_eq!(admission.narrowed, narrowed),
                    cause => panic!("{cause}"),
                }
            }
            drop(end);
        },
    );
}

/// Where the machine has it (a guest of `.ci/guest` does): a cookie of its own, that of another thread, none of a thread that
/// does not exist or that this user may not look into.
#[test]
fn core_scheduling_is_in_force_or_refused_for_what_the_machine_lacks() {
    alone(
        "settings::core_scheduling_is_in_force_or_refused_for_what_the_machine_lacks",
        || {
            let cookie = || {
                let mut cookie = 0_u64;
                // SAFETY: PR_SCHED_CORE_GET writes the cookie of a thread to the place given.
                let answer = unsafe { libc::prctl(libc::PR_SCHED_CORE, 0, 0, 0, &raw mut cookie) };
                (answer, cookie)
            };
            let start = |core| {
                let ((send, receive), (end, wait)) = (channel(), channel::<()>());
                let body = move || {
                    send.send(cookie()).unwrap();
                    let _ = wait.recv();
                };
                let thread = Builder::new().core_scheduling(core).spawn(body)?;
                Ok::<_, SpawnError>((thread, receive.recv().unwrap(), end))
            };
            let (first, seen, end) = match start(CoreScheduling::New) {
                Ok(first) => first,
                Err(error) => {
                    assert_eq!(error.step(), Step::CoreScheduling);
                    match error.cause() {
                        Cause::NoCoreScheduling(lack) => {
                            assert_eq!(lack.kernel, error.errno() == libc::EINVAL);
                        }
                        cause => panic!("{cause}"),
                    }
                    let builder = Builder::new().core_scheduling(CoreScheduling::SameAs(tid()));
                    refused(&builder, Step::CoreScheduling, error.errno().raw());
                    return;
                }
            };
            assert!(seen.0 == 0 && seen.1 != 0);
            let (_, same, _) = start(CoreScheduling::SameAs(first.tid())).unwrap();
            assert_eq!(same, seen);
            let (_, other, _) = start(CoreScheduling::New).unwrap();
            assert!(other.1 != 0 && other != seen);
            drop(end);
            first.join().unwrap();
            let share = |tid| Builder::new().core_scheduling(CoreScheduling::SameAs(tid));
            let error = refused(&share(1 << 29), Step::CoreScheduling, libc::ESRCH);
            match error.cause() {
                Cause::InvalidAttribute(wrong) => assert_eq!(wrong.value, 1 << 29),
                cause => panic!("{cause}"),
            }
            or_skip!(become_unused_user());
            let error = refused(&share(1), Step::CoreScheduling, libc::EPERM);
            assert!(matches!(error.cause(), Cause::NotPermitted(_)), "{error}");
        },
    );
}

/// Behind a filter that kills at the call of a setting, the thread is gone and no value is to blame.
#[test]
fn a_thread_that_is_killed_in_a_setting_is_called_ended() {
    alone(
        "settings::a_thread_that_is_killed_in_a_setting_is_called_ended",
        || {
            for (call, builder, step) in [
                (
                    libc::SYS_sched_setaffinity,
                    Builder::new().cpu_affinity([affinity()[0]]),
                    Step::Affinity,
                ),
                (
                    libc::SYS_sched_setattr,
                    Builder::new().scheduler(Scheduler::Idle),
                    Step::Scheduler,
                ),
                (
                    libc::SYS_prctl,
                    Builder::new().core_scheduling(CoreScheduling::SameAs(1)),
                    Step::CoreScheduling,
                ),
            ] {
                let killed = std::thread::spawn(move || {
                    deny(call, 0).install_kill();
                    let refused = builder.spawn_or_return(|| 5).map(|_| ());
                    let (error, back) = refused.unwrap_err().into_parts();
                    assert_eq!(back(), 5);
                    error
                });
                let error = killed.join().unwrap();
                assert_eq!((error.step(), error.errno().raw()), (step, libc::ESRCH));
                match error.cause() {
                    Cause::EndedEarly(early) => assert_eq!(early.during, step),
                    cause => panic!("{cause}"),
                }
            }
            await_reaping();
            nptl::spawn(|| ()).unwrap().join().unwrap();
        },
    );
}

#[test]
fn what_is_no_cgroup_and_what_may_not_be_entered_is_refused_before_a_thread_is_made() {
    const TEST: &str = "settings::what_is_no_cgroup_and_what_may_not_be_entered_is_refused_before_a_thread_is_made";
    alone(TEST, || {
        let error = refused(
            &Builder::new().cgroup(open(Path::new("/"))),
            Step::Cgroup,
            libc::ENOTDIR,
        );
        assert!(
            matches!(error.cause(), Cause::InvalidAttribute(_)),
            "{error}"
        );
    });
}

#[test]
fn a_cgroup_that_the_user_may_not_write_is_refused() {
    const TEST: &str = "settings::a_cgroup_that_the_user_may_not_write_is_refused";
    if support::case().is_some() {
        let cgroup = support::inherited_cgroup(0);
        let directory = open(cgroup.path());
        or_skip!(become_unused_user());
        let error = refused(
            &Builder::new().cgroup(directory),
            Step::Cgroup,
            libc::EACCES,
        );
        match error.cause() {
            Cause::NotPermitted(missing) => {
                let named = missing.directory.to_str().unwrap();
                assert_eq!(Path::new(named), cgroup.path());
            }
            cause => panic!("{cause}"),
        }
        return;
    }
    if !is_root() {
        skip!("becomes another user");
    }
    let cgroup = or_skip!(Cgroup::pids());
    or_skip!(support::child(TEST, "user").cgroup(&cgroup).run()).success();
}

/// A v2 hierarchy of our own mount; controllers are not needed for threaded mode.
#[test]
fn a_thread_is_made_in_a_threaded_cgroup_of_v2() {
    const TEST: &str = "settings::a_thread_is_made_in_a_threaded_cgroup_of_v2";
    if !is_root() {
        skip!("mounts a cgroup file system");
    }
    alone(TEST, || {
        let top = std::env::temp_dir().join(format!("nptl-v2-{}", std::process::id()));
        std::fs::create_dir(&top).unwrap();
        let name = std::ffi::CString::new(top.to_str().unwrap()).unwrap();
        // SAFETY: mounts only in a namespace of this thread's own; all strings end with NUL.
        let mounted = unsafe {
            libc::unshare(libc::CLONE_NEWNS) == 0
                && libc::mount(
                    c"none".as_ptr(),
                    c"/".as_ptr(),
                    std::ptr::null(),
                    libc::MS_REC | libc::MS_PRIVATE,
                    std::ptr::null(),
                ) == 0
                && libc::mount(
                    c"none".as_ptr(),
                    name.as_ptr(),
                    c"cgroup2".as_ptr(),
                    0,
                    std::ptr::null(),
                ) == 0
        };
        if !mounted {
            let _ = std::fs::remove_dir(&top);
            skip!(
                "no cgroup2 file system: {}",
                std::io::Error::last_os_error()
            );
        }
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .unwrap();
        let cgroup = top
            .join(own)
            .join(format!("nptl-test-{}", std::process::id()));
        std::fs::create_dir(&cgroup).unwrap();
        let foreign = cgroup.with_extension("foreign");
        let other = foreign.join("threaded");
        std::fs::create_dir_all(&other).unwrap();
        std::fs::write(other.join("cgroup.type"), "threaded").unwrap();
        let look = || std::fs::read_to_string("/proc/thread-self/cgroup").unwrap();
        let builder = Builder::new().cgroup(open(&cgroup));
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // Not yet threaded.
            let error = refused(&builder, Step::Cgroup, libc::EOPNOTSUPP);
            match error.cause() {
                Cause::ForeignCgroup(foreign) => {
                    assert_eq!(foreign.kind, Some("domain"));
                    assert_eq!(Path::new(foreign.directory.to_str().unwrap()), cgroup);
                }
                cause => panic!("{cause}"),
            }
            assert_eq!(error.certainty(), Certainty::Proven, "{}", error.report());
            let elsewhere = Builder::new().cgroup(open(&other));
            let error = refused(&elsewhere, Step::Cgroup, libc::EOPNOTSUPP);
            match error.cause() {
                Cause::ForeignCgroup(foreign) => {
                    assert_eq!(foreign.kind, Some("threaded"));
                    assert_eq!(foreign.directory.as_ref(), other);
                }
                cause => panic!("{cause}"),
            }
            std::fs::write(cgroup.join("cgroup.type"), "threaded").unwrap();
            let seen = builder.clone().spawn(look).unwrap().join().unwrap();
            let line = seen.lines().find(|line| line.starts_with("0::")).unwrap();
            assert!(
                line.ends_with(cgroup.file_name().unwrap().to_str().unwrap()),
                "{line}"
            );
            // clone cannot do that, so there is no fallback.
            let denied = builder.clone();
            let error = std::thread::spawn(move || {
                deny(libc::SYS_clone3, libc::ENOSYS).install();
                denied.spawn(|| ()).unwrap_err()
            });
            let error = error.join().unwrap();
            assert_eq!(
                (error.step(), error.errno().raw()),
                (Step::Clone, libc::ENOSYS)
            );
        }));
        std::fs::remove_dir(&other).unwrap();
        std::fs::remove_dir(&foreign).unwrap();
        // Members of a removed cgroup are gone, not counted any more.
        await_reaping();
        wait_until("the cgroup is removed", || {
            std::fs::remove_dir(&cgroup).is_ok()
        });
        let error = builder.spawn(|| ()).unwrap_err();
        assert_eq!(error.step(), Step::Cgroup, "{error}");
        assert!([libc::ENOENT, libc::ENODEV].contains(&error.errno().raw()));
        // SAFETY: of this thread's own namespace.
        unsafe { libc::umount2(name.as_ptr(), libc::MNT_DETACH) };
        let _ = std::fs::remove_dir(&top);
        if let Err(payload) = outcome {
            std::panic::resume_unwind(payload);
        }
    });
}

/// Each call of a setting is denied in turn: an error with its step, at most inferred, and no thread left.
#[test]
fn a_filter_that_denies_a_setting_is_not_taken_for_the_kernel() {
    alone(
        "settings::a_filter_that_denies_a_setting_is_not_taken_for_the_kernel",
        || {
            let inside = affinity()[0];
            for (call, builder, step) in [
                (
                    libc::SYS_sched_setaffinity,
                    Builder::new().cpu_affinity([inside]),
                    Step::Affinity,
                ),
                (
                    libc::SYS_sched_setattr,
                    Builder::new().scheduler(Scheduler::Idle),
                    Step::Scheduler,
                ),
            ] {
                let denied = std::thread::spawn(move || {
                    deny(call, libc::EPERM).install();
                    builder.spawn(|| ()).map(|_| ()).unwrap_err()
                });
                let error = denied.join().unwrap();
                assert_eq!((error.step(), error.errno().raw()), (step, libc::EPERM));
                assert_ne!(error.certainty(), Certainty::Proven, "{}", error.report());
            }
        },
    );
}
