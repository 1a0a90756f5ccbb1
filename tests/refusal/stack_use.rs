//! How much of the caller's stack a spawn and the analysis of its refusal take: the bound that
//! `SpawnError`'s documentation states. Threads that spawn may have small stacks themselves.
//!
//! Measured on a stack that was painted before: the lowest byte that has changed is the deepest that anything,
//! glibc included, has reached.

use std::ffi::c_void;
use std::hint::black_box;

use nptl::diagnose::CauseKind;
use nptl::{Builder, SpawnError};
use support::{
    Cgroup, Child, Sleepers, become_unused_user, case, child, deny, inherited_cgroup, or_skip,
    report, set_rlimit,
};

/// What the documentation says. Without optimisation every temporary has a place of its own.
const BOUND: usize = match cfg!(debug_assertions) {
    true => 64 << 10,
    false => 16 << 10,
};

const PAINT: u8 = 0xA5;
const SIZE: usize = 512 << 10;
/// More than `BOUND`, and less than `SIZE`.
const REFUSED_STACK: usize = 64 << 20;

struct Measurement {
    /// Address of a local of the function that spawns.
    frame: usize,
    error: Option<SpawnError>,
}

extern "C" fn spawn_once(measured: *mut c_void) -> *mut c_void {
    let here = 0_u8;
    // SAFETY: the creator's value, which it does not touch until this thread is joined.
    let measured = unsafe { &mut *measured.cast::<Measurement>() };
    measured.frame = black_box(&raw const here).addr();
    let builder = Builder::new().name("vcpu0").stack_size(REFUSED_STACK);
    measured.error = builder.spawn(|| ()).err();
    std::ptr::null_mut()
}

/// The deepest that a spawn reached below its caller's frame, on a thread of glibc's, and its error. `begun` runs
/// before the spawn, with the thread waiting for it.
fn measure(obstruct: impl FnOnce() -> Result<(), String>) -> Result<(usize, SpawnError), String> {
    static GATE: std::sync::Barrier = std::sync::Barrier::new(2);
    extern "C" fn wait_and_spawn(measured: *mut c_void) -> *mut c_void {
        GATE.wait();
        GATE.wait();
        spawn_once(measured)
    }
    let mut measured = Measurement {
        frame: 0,
        error: None,
    };
    // SAFETY: a new private mapping, which becomes the stack of one thread that is joined below; attributes and
    // the value outlive that thread.
    let stack = unsafe {
        let stack = libc::mmap(
            std::ptr::null_mut(),
            SIZE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        );
        assert_ne!(stack, libc::MAP_FAILED);
        stack.cast::<u8>().write_bytes(PAINT, SIZE);
        let mut attributes: libc::pthread_attr_t = std::mem::zeroed();
        libc::pthread_attr_init(&raw mut attributes);
        libc::pthread_attr_setstack(&raw mut attributes, stack, SIZE);
        let mut thread = 0;
        let started = libc::pthread_create(
            &raw mut thread,
            &raw const attributes,
            wait_and_spawn,
            (&raw mut measured).cast(),
        );
        assert_eq!(started, 0);
        GATE.wait();
        let obstructed = obstruct();
        GATE.wait();
        libc::pthread_join(thread, std::ptr::null_mut());
        obstructed?;
        std::slice::from_raw_parts(stack.cast::<u8>(), SIZE)
    };
    let untouched = stack.iter().take_while(|byte| **byte == PAINT).count();
    let deepest = stack.as_ptr().addr() + untouched;
    let error = measured.error.ok_or("the limit refuses nothing")?;
    Ok((measured.frame - deepest, error))
}

/// A limit, and what must be named, so that the whole analysis has run.
struct LimitCase {
    name: &'static str,
    kind: CauseKind,
    sandbox: fn(Child) -> Result<Child, String>,
    obstruct: fn() -> Result<(), String>,
}

const LIMITS: [LimitCase; 8] = [
    LimitCase {
        name: "first spawn",
        kind: CauseKind::UserProcesses,
        sandbox: Ok,
        obstruct: user,
    },
    LimitCase {
        name: "RLIMIT_NPROC",
        kind: CauseKind::UserProcesses,
        sandbox: Ok,
        obstruct: user,
    },
    LimitCase {
        name: "pid numbers",
        kind: CauseKind::PidNumbers,
        sandbox: |child| Ok(child.pid_namespace(Some(400))),
        obstruct: || {
            let mut sleepers = Sleepers::default();
            sleepers.add(500).expect_err("no number left");
            std::mem::forget(sleepers);
            Ok(())
        },
    },
    LimitCase {
        name: "pids cgroup",
        kind: CauseKind::PidsCgroup,
        // As many levels as a container has: each is read.
        sandbox: |child| Ok(child.cgroup(&Cgroup::pids()?.nested()?.nested()?.nested()?)),
        obstruct: || {
            let cgroup = inherited_cgroup(0);
            cgroup.set("pids.max", cgroup.tasks());
            Ok(())
        },
    },
    LimitCase {
        name: "seccomp",
        kind: CauseKind::Seccomp,
        sandbox: Ok,
        // The waiting thread is not behind a filter of this one's: the filter goes to all.
        obstruct: || {
            deny(libc::SYS_clone3, libc::EAGAIN).install_for_all();
            Ok(())
        },
    },
    LimitCase {
        name: "RLIMIT_AS",
        kind: CauseKind::AddressSpace,
        sandbox: Ok,
        obstruct: || {
            set_rlimit(libc::RLIMIT_AS, 1 << 20);
            Ok(())
        },
    },
    LimitCase {
        name: "RLIMIT_DATA",
        kind: CauseKind::DataSegment,
        sandbox: Ok,
        obstruct: || {
            set_rlimit(libc::RLIMIT_DATA, 1 << 20);
            Ok(())
        },
    },
    LimitCase {
        name: "nothing readable",
        kind: CauseKind::Unknown,
        sandbox: |child| Ok(child.hide_proc()),
        obstruct: user,
    },
];

fn user() -> Result<(), String> {
    become_unused_user()?;
    set_rlimit(libc::RLIMIT_NPROC, 1);
    Ok(())
}

#[test]
fn a_refused_spawn_needs_as_little_stack_as_is_said() {
    let test = "stack_use::a_refused_spawn_needs_as_little_stack_as_is_said";
    if let Some(name) = case() {
        let limit = LIMITS.iter().find(|limit| limit.name == name);
        let limit = limit.expect("a limit");
        if name != "first spawn" {
            let thread = nptl::spawn(|| ()).expect("a thread without limits");
            thread.join().expect("its end");
            nptl::StackCache::global().clear();
            std::thread::sleep(std::time::Duration::from_millis(30));
        }
        let (used, error) = or_skip!(measure(limit.obstruct));
        set_rlimit(libc::RLIMIT_AS, libc::RLIM_INFINITY);
        report("used", used);
        report("kind", format_args!("{:?}", error.cause().kind()));
        report("error", error);
        return;
    }
    for limit in &LIMITS {
        let sandbox = (limit.sandbox)(child(test, limit.name));
        let output = or_skip!(sandbox.and_then(Child::run)).success();
        if output.skipped().is_some() {
            continue;
        }
        let used: usize = output.get("used").expect("bytes").parse().expect("number");
        println!("{}: {used} bytes of stack", limit.name);
        let kind = format!("{:?}", limit.kind);
        assert_eq!(output.get("kind"), Some(&*kind), "{output}");
        assert!(used > 1000 && used <= BOUND, "{}: {output}", limit.name);
    }
}
