//! Every scenario of the example `reproduce`, fifty times under each limit: the right cause, with its
//! certainty, and never a wrong name.

mod support;

#[path = "../examples/reproduce/scenarios/mod.rs"]
mod scenarios;

use scenarios::Verdict;

/// How often nptl is asked under each limit.
const ROUNDS: usize = 50;

fn check(test: &str, name: &str) {
    let start = |case: &str| support::child(test, case);
    if let Some(case) = support::case() {
        scenarios::play(&case, &start);
        return;
    }
    let scenario = scenarios::by_name(name).expect("a scenario");
    let outcome = scenarios::run(scenario, ROUNDS, false, &start);
    match outcome.verdict {
        Verdict::Right => {
            let asked = outcome.nptl_granted + outcome.answers.len() as u64;
            assert!(asked >= ROUNDS as u64, "asked {asked} times only");
        }
        Verdict::Skipped => support::announce_skip(&outcome.why.join("; ")),
        Verdict::Wrong => panic!("{name}:\n{}", outcome.why.join("\n")),
    }
}

macro_rules! scenarios {
    ($($test:ident $name:literal)*) => {
        $(
            #[test]
            fn $test() {
                check(stringify!($test), $name);
            }
        )*

        /// No scenario of the example is left out here.
        #[test]
        fn all_are_tested() {
            let tested = [$($name),*];
            let missing: Vec<_> = scenarios::all()
                .map(|scenario| scenario.name)
                .filter(|name| !tested.contains(name))
                .collect();
            assert!(missing.is_empty(), "not tested: {missing:?}");
        }
    };
}

scenarios! {
    first_spawn "first-spawn"
    rlimit_nproc "rlimit-nproc"
    seccomp_clone3 "seccomp-clone3"
    seccomp_clone "seccomp-clone"
    deadline "deadline"
    sibling_exec "sibling-exec"
    sibling_exec_no_retry "sibling-exec-no-retry"
    pid_numbers "pid-numbers"
    pid_numbers_outer "pid-numbers-outer"
    dying_pid_namespace "dying-pid-namespace"
    unshared_pid_namespace "unshared-pid-namespace"
    pids_cgroup "pids-cgroup"
    pids_cgroup_ancestor "pids-cgroup-ancestor"
    join_then_spawn "join-then-spawn"
    join_then_spawn_no_retry "join-then-spawn-no-retry"
    rlimit_as "rlimit-as"
    rlimit_data "rlimit-data"
    max_map_count "max-map-count"
    memlock "memlock"
    overcommit_0 "overcommit-0"
    memory_cgroup "memory-cgroup"
    virtual_machines "virtual-machines"
    threads_max "threads-max"
    overcommit_2 "overcommit-2"
}
