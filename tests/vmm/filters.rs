//! Threads and their creators behind the filters of virtual machine monitors, and behind the crate's own list. A call that
//! is not allowed ends the process with SIGSYS.

use nptl::seccomp::Phase;
use nptl::{
    Builder, Cancelled, RetryPolicy, Scheduler, StackCache, StackCacheConfig, StartGate, Step,
};
use std::convert::Infallible;
use std::time::Duration;
use support::{
    Allow, Cgroup, allow, allow_only, case, child, cloud_hypervisor_vcpu_filter,
    cloud_hypervisor_vmm_filter, contract, deny, deny_guard_marks, firecracker_vcpu_filter,
    inherited_cgroup, or_skip, report,
};

/// Runs one case of a test in a child, and what it has to report.
fn in_child(test: &str, case: &str) {
    let output = or_skip!(child(test, case).time_limit(Duration::from_secs(60)).run());
    let output = output.success();
    if output.skipped().is_none() {
        assert_eq!(output.get("good"), Some("yes"), "{case}: {output}");
    }
}

/// What a process that ends, and a test that reports, call beside the crate.
fn of_the_test() -> Vec<Allow> {
    vec![allow(libc::SYS_write), allow(libc::SYS_exit_group)]
}

fn filter_of(name: &str) -> fn() -> Vec<Allow> {
    match name {
        "firecracker" => firecracker_vcpu_filter,
        "cloud-hypervisor" => cloud_hypervisor_vcpu_filter,
        "overflow" => || contract([Phase::Report, Phase::End, Phase::Overflow]),
        _ => || contract([Phase::Report, Phase::Gate, Phase::End]),
    }
}

/// A vCPU: its setup installs the filter, it waits at the gate, runs or not, and ends; joined, detached, panicking,
/// cancelled.
#[test]
fn a_vcpu_thread_lives_and_ends_behind_each_filter() {
    const TEST: &str = "filters::a_vcpu_thread_lives_and_ends_behind_each_filter";
    let Some(name) = case() else {
        return ["firecracker", "cloud-hypervisor", "contract"]
            .into_iter()
            .for_each(|case| in_child(TEST, case));
    };
    nptl::prepare().unwrap();
    let filter = filter_of(&name);
    // A small cache, so that stacks are unmapped as well.
    let small = StackCacheConfig::default().resident_budget(100 << 10);
    for cache in [StackCache::global(), &StackCache::new(small)] {
        for open in [true, false] {
            for detached in [false, true] {
                let gate = StartGate::new();
                let builder = Builder::new()
                    .name("vcpu")
                    .stack_cache(cache)
                    .stack_size(128 << 10)
                    .start_gate(&gate);
                let threads: Vec<_> = (0..8_u8)
                    .map(|number| {
                        let setup = move || {
                            allow_only(filter());
                            Ok::<_, Infallible>(number)
                        };
                        let body = |number| {
                            std::hint::black_box([1_u8; 32 << 10]);
                            if number % 4 == 3 {
                                std::panic::resume_unwind(Box::new(number));
                            }
                            number
                        };
                        builder.clone().spawn_with_setup(setup, body).unwrap()
                    })
                    .collect();
                match open {
                    true => gate.open(),
                    false => gate.cancel(),
                }
                for (number, thread) in (0_u8..).zip(threads) {
                    if detached {
                        thread.detach();
                        continue;
                    }
                    match thread.join() {
                        Ok(result) => assert_eq!((open, result), (true, number)),
                        Err(payload) if open => {
                            assert_eq!(payload.downcast_ref(), Some(&number));
                            assert_eq!(number % 4, 3);
                        }
                        Err(payload) => assert!(payload.is::<Cancelled>()),
                    }
                }
            }
        }
        super::wait_until("all threads have ended", || {
            cache.trim(0);
            cache.stats().live_stacks == 0
        });
    }
    report("good", "yes");
}

/// An overflow is reported behind them: write and sigaltstack are in both, the handler runs on the thread's own stack.
#[test]
fn an_overflow_is_reported_behind_each_filter() {
    const TEST: &str = "filters::an_overflow_is_reported_behind_each_filter";
    let Some(name) = case() else {
        for case in ["firecracker", "cloud-hypervisor", "contract"] {
            let output = or_skip!(child(TEST, case).time_limit(Duration::from_secs(60)).run());
            assert!(
                output.stderr.contains("has overflowed its stack"),
                "{output}"
            );
            let signal = match case {
                // It has no tgkill for abort(3).
                "firecracker" => libc::SIGSYS,
                _ => libc::SIGABRT,
            };
            assert_eq!(output.signal(), Some(signal), "{output}");
        }
        return;
    };
    #[expect(unconditional_recursion, reason = "it overflows")]
    fn deeper(depth: u64) -> u64 {
        std::hint::black_box([depth; 100])[50] + deeper(depth + 1)
    }
    nptl::prepare().unwrap();
    let setup = move || {
        let name = match name.as_str() {
            "contract" => "overflow",
            name => name,
        };
        allow_only(filter_of(name)());
        Ok::<_, Infallible>(())
    };
    let thread = Builder::new()
        .name("vcpu0")
        .spawn_with_setup(setup, |()| deeper(0));
    let _ = thread.unwrap().join();
}

/// The thread that creates and joins: with and without a cached stack, with settings and a gate.
#[test]
fn a_creator_behind_each_filter_spawns_and_joins() {
    const TEST: &str = "filters::a_creator_behind_each_filter_spawns_and_joins";
    let Some(name) = case() else {
        return ["cloud-hypervisor", "contract"]
            .into_iter()
            .for_each(|case| in_child(TEST, case));
    };
    nptl::prepare().unwrap();
    let own = name == "contract";
    let creator = Builder::new().stack_size(1 << 20).spawn_with_setup(
        move || {
            let mut filter = match own {
                true => contract([
                    Phase::Spawn,
                    Phase::Map,
                    Phase::Start,
                    Phase::Affinity,
                    Phase::Scheduler,
                    Phase::Report,
                    Phase::Gate,
                    Phase::End,
                    Phase::Join,
                    Phase::Control,
                    Phase::Trim,
                    Phase::Heap,
                ]),
                false => cloud_hypervisor_vmm_filter(),
            };
            filter.extend(of_the_test());
            allow_only(filter);
            Ok::<_, Infallible>(())
        },
        move |()| {
            let cache = StackCache::new(StackCacheConfig::default());
            let builder = || Builder::new().stack_cache(&cache).stack_size(128 << 10);
            for round in 0..40 {
                let threads: Vec<_> = (0..4)
                    .map(|_| builder().name("worker").spawn(|| 7).unwrap())
                    .collect();
                for thread in threads {
                    let _ = thread.kill(0);
                    assert_eq!(thread.join().unwrap(), 7, "{round}");
                }
            }
            let thread = builder().cpu_affinity([0]).spawn(|| ()).unwrap();
            thread.join().unwrap();
            let gate = StartGate::new();
            let thread = builder().start_gate(&gate).spawn(|| ()).unwrap();
            gate.open();
            thread.join().unwrap();
            if own {
                let thread = builder().scheduler(Scheduler::Idle).spawn(|| ()).unwrap();
                thread.join().unwrap();
            }
            builder().spawn(|| ()).unwrap().detach();
            cache.trim(0);
            report("good", "yes");
        },
    );
    creator.unwrap().join().unwrap();
}

/// Refusals of a mapping, of a setting, and, where there is a pids cgroup, of a clone: their analysis makes no call beyond the list, and none beyond what Cloud
/// Hypervisor's vmm thread may do.
#[test]
fn an_analysis_behind_each_filter_lives() {
    const TEST: &str = "filters::an_analysis_behind_each_filter_lives";
    let Some(name) = case() else {
        return ["cloud-hypervisor", "contract"]
            .into_iter()
            .for_each(|case| {
                in_child(TEST, case);
                let cgroup = or_skip!(Cgroup::pids());
                let output = child(TEST, &format!("{case}, pids")).cgroup(&cgroup);
                let output = or_skip!(output.run()).success();
                assert_eq!(output.get("clone"), Some("PidsCgroup"), "{output}");
            });
    };
    nptl::prepare().unwrap();
    let own = name.starts_with("contract");
    let full = name.ends_with("pids").then(|| inherited_cgroup(0));
    let body = move || {
        if let Some(cgroup) = &full {
            cgroup.set("pids.max", cgroup.tasks());
        }
        let mut filter = match own {
            true => contract([
                Phase::Spawn,
                Phase::Map,
                Phase::Start,
                Phase::Affinity,
                Phase::Report,
                Phase::End,
                Phase::Join,
                Phase::Refusal,
                Phase::Heap,
            ]),
            false => cloud_hypervisor_vmm_filter(),
        };
        filter.extend(of_the_test());
        allow_only(filter);
        if full.is_some() {
            let error = nptl::spawn(|| ()).unwrap_err();
            assert_eq!(error.step(), Step::Clone, "{error}");
            return report("clone", format_args!("{:?}", error.cause().kind()));
        }
        let error = Builder::new().stack_size(1 << 46).spawn(|| ()).unwrap_err();
        assert_eq!(error.step(), Step::MapStack, "{error}");
        let outside = Builder::new().cpu_affinity([4095]);
        let error = outside.spawn(|| ()).unwrap_err();
        assert_eq!(error.step(), Step::Affinity, "{error}");
        let error = Builder::new()
            .retry(RetryPolicy::never())
            .stack_size(1 << 46)
            .spawn(|| ())
            .unwrap_err();
        report("error", error);
        report("good", "yes");
    };
    nptl::spawn(body).unwrap().join().unwrap();
}

/// The list of the first spawn. (Cloud Hypervisor's filter of the vmm thread does not allow all of it.)
#[test]
fn the_first_spawn_makes_only_the_listed_calls() {
    const TEST: &str = "filters::the_first_spawn_makes_only_the_listed_calls";
    let Some(kernel) = case() else {
        return ["this", "before Linux 6.13", "slow to reap"]
            .into_iter()
            .for_each(|case| in_child(TEST, case));
    };
    match kernel.as_str() {
        "before Linux 6.13" => deny_guard_marks(libc::EINVAL),
        // A thread that has ended seems to be there for ever.
        "slow to reap" => deny(libc::SYS_tgkill, 0).install(),
        _ => {}
    }
    let mut filter = contract([
        Phase::Prepare,
        Phase::Spawn,
        Phase::Map,
        Phase::Start,
        Phase::End,
        Phase::Join,
        Phase::Heap,
    ]);
    filter.extend(of_the_test());
    allow_only(filter);
    assert_eq!(nptl::spawn(|| 7).unwrap().join().unwrap(), 7);
    report("good", "yes");
    // The end of this thread of std is not listed.
    // SAFETY: ends the process without anything else.
    unsafe { libc::_exit(0) };
}
