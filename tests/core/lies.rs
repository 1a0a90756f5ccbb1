//! A glibc that is not as its symbols say: each lie is found by a check that is named, before anything is built
//! on it. The answers come from a library that is preloaded and stands between the crate and dlsym.

use super::own_state::{allowed_cpus, pin_to};
use super::{under_valgrind, wait_until};
use nptl::{Cause, Certainty, Step, diagnose};
use std::ffi::CString;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use support::{Snapshot, case, child, or_skip, report, skip};

const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

static unsigned words[1 << 14];

static void static_info(size_t *size, size_t *align) {
    *size = words[0];
    *align = words[1];
}

static size_t minstack(const void *attributes) {
    (void)attributes;
    return words[0];
}

void *dlsym(void *handle, const char *name) {
    void *(*real)(void *, const char *) = dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.2.5");
    const char *about = getenv("LIE_ABOUT"), *lie = getenv("LIE");
    if (about == NULL || strcmp(about, name) != 0)
        return real(handle, name);
    if (strcmp(lie, "missing") == 0)
        return NULL;
    if (*lie == '+' || *lie == '-')
        return (char *)real(handle, name) + atoi(lie);
    for (unsigned *word = words; *lie != 0; word++)
        *word = strtoul(lie, (char **)&lie, 10);
    if (strcmp(name, "__pthread_get_minstack") == 0)
        return (void *)minstack;
    return strcmp(name, "_dl_get_tls_static_info") == 0 ? (void *)static_info : words;
}
"#;

/// In a folder that goes with it.
struct Liar(PathBuf);

impl Liar {
    fn new(test: &str) -> Result<Liar, String> {
        let name = format!("nptl-{}-{}", test.replace("::", "-"), std::process::id());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
        let liar = Liar(folder);
        let source = liar.0.join("liar.c");
        std::fs::write(&source, SOURCE).map_err(|e| e.to_string())?;
        let mut command = Command::new("gcc");
        let command = command.args(["-shared", "-fPIC", "-o"]);
        let output = command.args([&liar.library(), &source]).output();
        let output = output.map_err(|e| format!("no gcc: {e}"))?;
        assert!(output.status.success(), "{output:?}");
        Ok(liar)
    }

    fn library(&self) -> PathBuf {
        self.0.join("liar.so")
    }

    /// What the child says of a glibc that lies so.
    fn tell(&self, test: &str, about: &str, lie: &str) -> Result<String, String> {
        let child = child(test, "lie").time_limit(Duration::from_secs(20));
        let child = child.env("LD_PRELOAD", self.library());
        let output = child.env("LIE_ABOUT", about).env("LIE", lie).run()?;
        match output.get("said") {
            Some(said) if output.status.success() => Ok(said.to_owned()),
            _ => Ok(output.to_string()),
        }
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// In the child: spawns, and says what came of it.
fn listen() {
    // Not where a word of zeroes looks like the number of the CPU.
    if let Some(&last) = allowed_cpus().last() {
        pin_to(last);
    }
    let refuse = || {
        let error = nptl::spawn(|| ()).err()?;
        assert_eq!(error.step(), Step::Runtime, "{error}");
        assert_eq!(error.certainty(), Certainty::Proven);
        match *error.cause() {
            Cause::UnsupportedRuntime(diagnose::UnsupportedRuntime { what, .. }) => Some(what),
            ref other => panic!("{other:?}"),
        }
    };
    let Some(what) = refuse() else {
        // Then all of a thread's life must be right, and that of the next one on its block.
        for round in 0..3 {
            let handle = nptl::spawn(move || {
                // SAFETY: no preconditions.
                let tid = unsafe { libc::gettid() };
                (tid, format!("{round}"), std::fs::read("/dev/null").is_ok())
            });
            let handle = handle.expect("a thread");
            let tid = handle.tid();
            assert_eq!(handle.join().unwrap(), (tid, round.to_string(), true));
        }
        assert!(
            nptl::spawn(|| panic!("on purpose"))
                .unwrap()
                .join()
                .is_err()
        );
        return report("said", "granted");
    };
    // Once, glibc's own caches may have grown.
    drop(Snapshot::take());
    let before = Snapshot::take();
    assert_eq!(refuse(), Some(what));
    wait_until("the calibration's threads have gone", || {
        Snapshot::take().kernel_threads == before.kernel_threads
    });
    before.diff(&Snapshot::take()).expect_nothing_left();
    // glibc itself is as well as ever.
    std::thread::spawn(|| vec![1; 1000])
        .join()
        .expect("its end");
    report("said", what);
}

fn words(name: &str, count: usize) -> Vec<u32> {
    let symbol = CString::new(name).expect("a name");
    // SAFETY: the name is NUL-terminated.
    let place = unsafe { libc::dlsym(libc::RTLD_DEFAULT, symbol.as_ptr()) };
    assert!(!place.is_null(), "{name}");
    // SAFETY: one of libthread_db's descriptors, which have as many.
    unsafe { std::slice::from_raw_parts(place.cast::<u32>(), count) }.to_vec()
}

/// Size and alignment.
fn static_tls() -> (u32, u32) {
    // SAFETY: the name is NUL-terminated.
    let place = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"_dl_get_tls_static_info".as_ptr()) };
    assert!(!place.is_null());
    let (mut size, mut align) = (0_usize, 0_usize);
    // SAFETY: its type, with two valid places.
    unsafe {
        let info: unsafe extern "C" fn(*mut usize, *mut usize) = std::mem::transmute(place);
        info(&raw mut size, &raw mut align);
    }
    (size.try_into().unwrap(), align.try_into().unwrap())
}

fn lie(words: &[u32]) -> String {
    let words: Vec<_> = words.iter().map(u32::to_string).collect();
    words.join(" ")
}

/// About what, the lie, and the sentences of which one is to be the answer.
type Lie<'a> = (String, String, &'a [&'a str]);

/// Tries each wrong answer.
fn expect<'a>(test: &str, lies: impl FnOnce() -> Vec<Lie<'a>>) {
    if case().is_some() {
        return listen();
    }
    if under_valgrind() {
        skip!("dlsym is valgrind's to replace");
    }
    let liar = or_skip!(Liar::new(test));
    // The library itself changes nothing.
    assert_eq!(or_skip!(liar.tell(test, "nothing", "missing")), "granted");
    let mut wrong = Vec::new();
    for (about, lie, sentences) in lies() {
        let said = or_skip!(liar.tell(test, &about, &lie));
        if !sentences.contains(&&*said) {
            wrong.push(format!("{about} = {lie}: {said}, not {sentences:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// What a glibc without it cannot be understood by.
#[test]
fn a_missing_symbol_is_named() {
    const NAMES: &[&str] = &[
        "gnu_get_libc_version",
        "_dl_get_tls_static_info",
        "__pthread_get_minstack",
        "__nptl_rtld_global",
        "_dl_allocate_tls",
        "_dl_deallocate_tls",
        "__call_tls_dtors",
        "__ctype_init",
        "__res_nclose",
        "__pthread_keys",
        "__nptl_nthreads",
        "__resp",
        "_thread_db_sizeof_pthread",
        "_thread_db_pthread_tid",
        "_thread_db_pthread_dtvp",
        "_thread_db_pthread_list",
        "_thread_db_pthread_specific",
        "_thread_db_pthread_cancelhandling",
        "_thread_db_pthread_schedpolicy",
        "_thread_db_pthread_schedparam_sched_priority",
        "_thread_db_pthread_report_events",
        "_thread_db_pthread_nextevent",
        "_thread_db_pthread_eventbuf",
        "_thread_db_rtld_global__dl_stack_user",
        "_thread_db_rtld_global__dl_stack_used",
    ];
    expect("lies::a_missing_symbol_is_named", || {
        let lie = |name: &'static &str| {
            let sentence = std::slice::from_ref(name);
            (name.to_string(), "missing".to_owned(), sentence)
        };
        NAMES.iter().map(lie).collect()
    });
}

/// Fields of `struct pthread` that have another size, lie elsewhere, or outside.
#[test]
fn a_field_that_is_not_where_it_is_said_to_be_is_named() {
    expect(
        "lies::a_field_that_is_not_where_it_is_said_to_be_is_named",
        || {
            let fields: [(&str, &[&str]); 10] = [
                ("_thread_db_pthread_tid", &["_thread_db_pthread_tid"]),
                ("_thread_db_pthread_dtvp", &["_thread_db_pthread_dtvp"]),
                (
                    "_thread_db_pthread_list",
                    &[
                        "_thread_db_pthread_list",
                        "a new pthread is not on glibc's thread list",
                    ],
                ),
                (
                    "_thread_db_pthread_specific",
                    &[
                        "_thread_db_pthread_specific",
                        "the first block of pthread keys",
                        "report_events behind the table of pthread keys",
                    ],
                ),
                (
                    "_thread_db_pthread_cancelhandling",
                    &["_thread_db_pthread_cancelhandling"],
                ),
                (
                    "_thread_db_pthread_schedpolicy",
                    &[
                        "_thread_db_pthread_schedpolicy",
                        "schedpolicy behind the priority",
                    ],
                ),
                (
                    "_thread_db_pthread_schedparam_sched_priority",
                    &[
                        "_thread_db_pthread_schedparam_sched_priority",
                        "schedpolicy behind the priority",
                    ],
                ),
                (
                    "_thread_db_pthread_report_events",
                    &[
                        "_thread_db_pthread_report_events",
                        "report_events behind the table of pthread keys",
                    ],
                ),
                (
                    "_thread_db_pthread_nextevent",
                    &["_thread_db_pthread_nextevent", "nextevent behind eventbuf"],
                ),
                (
                    "_thread_db_pthread_eventbuf",
                    &["_thread_db_pthread_eventbuf", "nextevent behind eventbuf"],
                ),
            ];
            let mut lies = Vec::new();
            for (name, sentences) in fields {
                let truth = words(name, 3);
                let size = truth[0] / 8;
                for offset in [
                    0,
                    16,
                    truth[2] + size,
                    truth[2] - size.min(truth[2]),
                    truth[2] + 64,
                    1 << 12,
                    1 << 30,
                    u32::MAX - 7,
                ] {
                    if offset != truth[2] {
                        lies.push((
                            name.to_owned(),
                            lie(&[truth[0], truth[1], offset]),
                            sentences,
                        ));
                    }
                }
                for bits in [0, truth[0] / 2, truth[0] * 2, u32::MAX] {
                    // The first sentence is the name.
                    lies.push((
                        name.to_owned(),
                        lie(&[bits, truth[1], truth[2]]),
                        &sentences[..1],
                    ));
                }
            }
            lies
        },
    );
}

/// Sizes, lists, counts, and addresses of variables.
#[test]
fn a_wrong_size_list_or_variable_is_named() {
    expect("lies::a_wrong_size_list_or_variable_is_named", || {
        const SIZE: &[&str] = &[
            "_thread_db_sizeof_pthread",
            "static TLS size is implausible",
            // Outside.
            "_thread_db_pthread_tid",
        ];
        const LISTS: &[&str] = &["glibc's thread lists do not lie side by side"];
        const GLOBAL: &[&str] = &[
            "__nptl_rtld_global is null",
            "__nptl_rtld_global is not ld.so's",
        ];
        const STATIC: &[&str] = &["static TLS size is implausible"];
        let mut lies: Vec<(String, String, &[&str])> = Vec::new();
        let mut add =
            |name: &str, lie: String, sentences| lies.push((name.to_owned(), lie, sentences));
        let size = words("_thread_db_sizeof_pthread", 1)[0];
        for wrong in [0, 64, size - 64, size + 8, size + 64, 2 * size, u32::MAX] {
            add("_thread_db_sizeof_pthread", lie(&[wrong]), SIZE);
        }
        let (user, used) = (
            "_thread_db_rtld_global__dl_stack_user",
            "_thread_db_rtld_global__dl_stack_used",
        );
        for (name, other) in [(user, used), (used, user)] {
            let (truth, other) = (words(name, 3), words(other, 3));
            for offset in [
                other[2],
                truth[2] + 8,
                truth[2] + 16,
                truth[2] - 16,
                0,
                1 << 30,
            ] {
                add(
                    name,
                    lie(&[truth[0], truth[1], offset]),
                    if offset == truth[2] {
                        &["granted"]
                    } else {
                        LISTS
                    },
                );
            }
            add(
                name,
                lie(&[truth[0] / 2, truth[1], truth[2]]),
                if name == user {
                    &["_thread_db_rtld_global__dl_stack_user"]
                } else {
                    &["_thread_db_rtld_global__dl_stack_used"]
                },
            );
        }
        for address in [[0, 0], [1, 0], [1 << 20, 0], [u32::MAX, u32::MAX]] {
            add("__nptl_rtld_global", lie(&address), GLOBAL);
        }
        let (bytes, align) = static_tls();
        for (bytes, align) in [
            (0, align),
            (size - 1, align),
            (size, align),
            (bytes - align, align),
            (bytes + align, align),
            (bytes + (1 << 25), align),
            (u32::MAX, align),
            (bytes, 0),
            (bytes, 3),
            (bytes, 1 << 20),
        ] {
            add("_dl_get_tls_static_info", lie(&[bytes, align]), STATIC);
        }
        for minimum in [0, bytes, bytes + 16384, bytes + 65536, u32::MAX] {
            add("__pthread_get_minstack", lie(&[minimum]), STATIC);
        }
        for count in [0, 1] {
            add(
                "__nptl_nthreads",
                lie(&[count]),
                &["__nptl_nthreads does not count a new pthread"],
            );
        }
        for wrong in ["0", "+8", "+16", "+16384"] {
            add("__pthread_keys", wrong.to_owned(), &["__pthread_keys"]);
        }
        let rseq = words("__rseq_offset", 2);
        let rseq = i64::from(rseq[0]) | i64::from(rseq[1].cast_signed()) << 32;
        for wrong in [
            0,
            rseq - 32,
            rseq + 32,
            rseq + 8,
            rseq + 4096,
            i64::MIN,
            i64::MAX - 31,
        ] {
            if wrong != rseq && allowed_cpus().last() != Some(&0) {
                let halves = [wrong as u32, (wrong >> 32) as u32];
                add("__rseq_offset", lie(&halves), &["__rseq_offset"]);
            }
        }
        const RESP: &[&str] = &[
            "__resp",
            "__resp outside libc's TLS segment",
            "__resp is not the resolver's state",
        ];
        for wrong in ["0", "+8", "-8", "+4096"] {
            add("__resp", wrong.to_owned(), RESP);
        }
        lies
    });
}

/// What the crate can do without, or does not go by, refuses nothing, and is not followed blindly.
#[test]
fn what_can_be_done_without_refuses_nothing() {
    expect("lies::what_can_be_done_without_refuses_nothing", || {
        let mut lies: Vec<(String, String, &[&str])> = Vec::new();
        let mut add = |name: &str, lie: String| lies.push((name.to_owned(), lie, &["granted"]));
        for name in [
            "_thread_db_rtld_global__dl_tls_dtv_slotinfo_list",
            "_thread_db_dtv_slotinfo_list_len",
            "_thread_db_dtv_slotinfo_list_next",
            "_thread_db_dtv_slotinfo_list_slotinfo",
            "_thread_db_dtv_slotinfo_gen",
            "_thread_db_dtv_slotinfo_map",
            "_thread_db_dtv_dtv",
            "_thread_db_dtv_t_counter",
            "_thread_db_dtv_t_pointer_val",
        ] {
            let truth = words(name, 3);
            for offset in [0, truth[2] + 8, truth[2] + 16, 1 << 12, 1 << 30] {
                add(name, lie(&[truth[0], truth[1], offset]));
            }
            for bits in [0, truth[0] * 2] {
                add(name, lie(&[bits, truth[1], truth[2]]));
            }
            add(name, "missing".to_owned());
        }
        for name in [
            "__rseq_offset",
            "__rseq_size",
            "_rtld_global",
            "_dl_allocate_tls_init",
            "_r_debug",
        ] {
            add(name, "missing".to_owned());
        }
        lies
    });
}
