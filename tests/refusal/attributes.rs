//! What a builder can be asked for: sizes at and beyond the edges, names that no kernel takes, RUST_MIN_STACK.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use nptl::{Builder, Cause, Certainty, StackCache, Step, diagnose};
use support::{Snapshot, alone, case, child, or_skip, report};

const SMALLEST: usize = 16 << 10;
const TOO_LARGE: &str = "stack and guard exceed the address space";

fn page() -> usize {
    // SAFETY: no preconditions.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// Usable and guard bytes of a thread, by its handle.
fn granted(builder: Builder) -> (usize, usize) {
    let handle = builder.spawn(|| ()).expect("a thread");
    let stack = handle.stack();
    handle.join().expect("its end");
    (stack.size, stack.guard_size)
}

/// The closure comes back with what was moved into it, and the error says what was wrong with the wish.
#[track_caller]
fn refused(builder: Builder, what: &str, value: u64) {
    let treasure = Box::new(7);
    let address = &raw const *treasure;
    let (error, closure) = builder
        .spawn_or_return(move || treasure)
        .unwrap_err()
        .into_parts();
    assert_eq!(&raw const *closure(), address, "another closure");
    assert_eq!(error.step(), Step::Attributes, "{error}");
    assert_eq!(
        (error.errno().raw(), error.pthread_errno().raw()),
        (libc::EINVAL, libc::EINVAL)
    );
    assert_eq!(
        (error.certainty(), error.is_transient()),
        (Certainty::Proven, false)
    );
    assert_eq!(error.attempts(), 1);
    match *error.cause() {
        Cause::InvalidAttribute(diagnose::InvalidAttribute {
            what: said,
            value: found,
            ..
        }) => {
            assert_eq!((said, found), (what, value), "{error}");
        }
        ref other => panic!("{other:?}"),
    }
}

#[test]
fn a_name_with_a_nul_byte_is_refused_wherever_it_stands() {
    for name in [
        "\0",
        "vcpu\0",
        "\0vcpu",
        "long enough that no comm has it\0",
    ] {
        refused(Builder::new().name(name), "name contains a NUL byte", 0);
    }
    // A name is wrong whatever else is.
    let both = Builder::new().name("\0").stack_size(usize::MAX);
    refused(both, "name contains a NUL byte", 0);
}

/// Refused before anything is asked of glibc or the kernel, in a process whose first spawn it is, and after that.
#[test]
fn sizes_that_cannot_exist_are_refused_and_leave_nothing() {
    alone(
        "attributes::sizes_that_cannot_exist_are_refused_and_leave_nothing",
        || {
            const MAX: usize = usize::MAX;
            let most = isize::MAX as usize;
            let page = page();
            let all = || {
                for (size, guard) in [
                    (MAX, 0),
                    (MAX, page),
                    (MAX - page + 1, page),
                    (0, MAX),
                    (1, MAX),
                    (MAX, MAX),
                    (most, 1),
                    (most + 1, 0),
                    (most - page + 2, page),
                    // What is put beside it makes it too large.
                    (most, 0),
                    (most - page + 1, page),
                    (0, most),
                ] {
                    let builder = Builder::new().stack_size(size).guard_size(guard);
                    refused(builder, TOO_LARGE, size.saturating_add(guard) as u64);
                }
            };
            all();
            granted(Builder::new());
            StackCache::global().clear();
            support::await_reaping();
            Snapshot::take().diff(&Snapshot::take());
            let before = Snapshot::take();
            all();
            before.diff(&Snapshot::take()).expect_nothing_left();
            // Possible, as far as the attributes go, but not to be had.
            let (error, closure) = Builder::new()
                .stack_size(1 << 60)
                .spawn_or_return(|| ())
                .unwrap_err()
                .into_parts();
            closure();
            assert_eq!(
                (error.step(), error.errno().raw()),
                (Step::MapStack, libc::ENOMEM)
            );
        },
    );
}

/// At least what was asked for, whole pages, and never more than the documentation allows.
#[test]
fn odd_sizes_are_rounded_up() {
    let page = page();
    let builder = || Builder::new().guard_size(0);
    for size in [0, 1, page - 1, page, page + 1, SMALLEST - 1, SMALLEST] {
        assert_eq!(granted(builder().stack_size(size)), (SMALLEST, 0), "{size}");
    }
    for size in [
        SMALLEST + 1,
        (64 << 10) - 1,
        100_001,
        (2 << 20) + 1,
        (1 << 30) + 1,
    ] {
        let (found, _) = granted(builder().stack_size(size));
        let pages = size.div_ceil(page);
        assert!(
            found >= size && found.is_multiple_of(page),
            "{size}: {found}"
        );
        assert!((found / page - pages) * 4 < pages, "{size}: {found}");
    }
    let builder = || Builder::new().stack_size(SMALLEST);
    for (guard, expected) in [
        (0, 0),
        (1, page),
        (page - 1, page),
        (page, page),
        (page + 1, 16 * page),
        (16 * page - 1, 16 * page),
        (16 * page + 1, 17 * page),
        ((1 << 30) + 1, (1 << 30) + page),
    ] {
        assert_eq!(
            granted(builder().guard_size(guard)),
            (SMALLEST, expected),
            "{guard}"
        );
    }
}

/// As std reads it: what is no number counts for nothing, and 0 is the least there is. A value that no stack can
/// have is refused as one that the caller asked for: std panics there.
///
/// The child sets the variable itself, when std has made the thread of the test: on 16 KiB the harness could not run.
#[test]
fn rust_min_stack_is_the_default_and_nonsense_is_none() {
    let test = "attributes::rust_min_stack_is_the_default_and_nonsense_is_none";
    if let Some(value) = case() {
        let value = match &*value {
            "not UTF-8" => OsStr::from_bytes(b"\xff"),
            value => OsStr::new(value),
        };
        // SAFETY: no other thread of this process looks at the environment now.
        unsafe { std::env::set_var("RUST_MIN_STACK", value) };
        if value == "18446744073709551615" {
            refused(Builder::new(), TOO_LARGE, u64::MAX);
            report("size", "refused");
        } else {
            report("size", granted(Builder::new()).0);
            // A later change counts for nothing, as in std.
            // SAFETY: as above.
            unsafe { std::env::set_var("RUST_MIN_STACK", "131072") };
            report("later", granted(Builder::new()).0);
        }
        // What a caller asks for counts for more.
        report("explicit", granted(Builder::new().stack_size(32 << 10)).0);
        return;
    }
    for (value, expected) in [
        ("262144", "262144"),
        ("0", "16384"),
        ("1", "16384"),
        ("", "2097152"),
        ("2M", "2097152"),
        ("-1", "2097152"),
        (" 262144", "2097152"),
        ("0x40000", "2097152"),
        ("99999999999999999999", "2097152"),
        ("not UTF-8", "2097152"),
        ("18446744073709551615", "refused"),
    ] {
        let output = or_skip!(child(test, value).run()).success();
        assert_eq!(output.get("size"), Some(expected), "{value:?}: {output}");
        let later = Some(expected).filter(|&size| size != "refused");
        assert_eq!(output.get("later"), later, "{value:?}: {output}");
        assert_eq!(output.get("explicit"), Some("32768"), "{value:?}: {output}");
    }
}
