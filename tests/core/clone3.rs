//! clone3 is preferred, and done without where it is not to be had. (Under valgrind, which knows no clone3,
//! all other tests prove the same.)

use crate::under_valgrind;
use nix::errno::Errno;
use nptl::{Cause, Certainty, Step};
use support::{case, child, deny, or_skip, report};

/// What clone3 answers here without making a thread.
fn clone3_says() -> Errno {
    // SAFETY: refused by every kernel because of its size.
    unsafe { libc::syscall(libc::SYS_clone3, std::ptr::null::<u8>(), 0) };
    Errno::last()
}

fn spawns_and_joins() {
    for number in 0..20 {
        assert_eq!(nptl::spawn(move || number).unwrap().join().unwrap(), number);
    }
}

#[test]
fn a_refused_clone3_falls_back_to_clone() {
    let name = "clone3::a_refused_clone3_falls_back_to_clone";
    let Some(case) = case() else {
        for errno in [Errno::ENOSYS, Errno::EPERM] {
            or_skip!(child(name, &(errno as i32).to_string()).run()).success();
        }
        return;
    };
    let errno = Errno::from_raw(case.parse().unwrap());
    spawns_and_joins();
    deny(libc::SYS_clone3, errno as i32).install();
    assert_eq!(clone3_says(), errno);
    spawns_and_joins();
    nptl::spawn(spawns_and_joins).unwrap().join().unwrap();

    // Then it is clone's answer that is reported.
    deny(libc::SYS_clone, libc::EAGAIN)
        .when_set(0, libc::CLONE_THREAD as u64)
        .install();
    let error = nptl::spawn(|| ()).unwrap_err();
    assert_eq!(
        (error.step(), error.errno().raw()),
        (Step::Clone, libc::EAGAIN)
    );
}

#[test]
fn the_first_spawn_can_do_without_clone3() {
    let name = "clone3::the_first_spawn_can_do_without_clone3";
    if case().is_some() {
        deny(libc::SYS_clone3, libc::ENOSYS).install();
        spawns_and_joins();
        nptl::spawn(spawns_and_joins).unwrap().join().unwrap();
        return;
    }
    or_skip!(child(name, "run").run()).success();
}

/// glibc falls back on ENOSYS only, so that it can make no thread, and the calibration needs one of its.
#[test]
fn a_first_spawn_where_clone3_is_eperm_names_the_filter() {
    let name = "clone3::a_first_spawn_where_clone3_is_eperm_names_the_filter";
    if case().is_some() {
        deny(libc::SYS_clone3, libc::EPERM).install();
        for _ in 0..2 {
            let error = nptl::spawn(|| ()).unwrap_err();
            assert_eq!(
                (error.step(), error.errno().raw()),
                (Step::Clone, libc::EPERM)
            );
            assert!(error.to_string().contains("calibration"), "{error}");
            assert!(matches!(error.cause(), Cause::Seccomp { .. }), "{error}");
            assert_eq!(error.certainty(), Certainty::Proven, "{error}");
        }
        return;
    }
    or_skip!(child(name, "run").run()).success();
}

#[test]
fn clone3_is_used_where_it_is_to_be_had() {
    let name = "clone3::clone3_is_used_where_it_is_to_be_had";
    if case().is_some() {
        spawns_and_joins();
        deny(libc::SYS_clone, libc::EAGAIN).install();
        spawns_and_joins();
        report("clone", "unused");
        return;
    }
    let output = or_skip!(child(name, "run").run()).success();
    assert_eq!(output.get("clone"), Some("unused"));
}

#[test]
fn valgrind_forces_the_fallback() {
    let errno = clone3_says();
    if under_valgrind() {
        assert_eq!(errno, Errno::ENOSYS);
    } else {
        assert_eq!(errno, Errno::EINVAL);
    }
    spawns_and_joins();
}
