//! dlopen of libraries with static (initial-exec) TLS: glibc writes their images into every thread on its
//! list, and only there.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Barrier, RwLock};
use std::time::Duration;

use nptl::{Builder, StackCache, StackCacheConfig, StackFate, Step};
use support::{case, child, or_skip, report, tid};

/// The thread whose calloc is refused, and how often calloc was called by that of [`COUNTED`].
static REFUSED: AtomicI32 = AtomicI32::new(0);
static COUNTED: AtomicI32 = AtomicI32::new(0);
static CALLS: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" {
    fn __libc_calloc(count: libc::size_t, size: libc::size_t) -> *mut libc::c_void;
}

/// Replaces glibc's own, for the dynamic linker's DTVs as well.
#[unsafe(no_mangle)]
unsafe extern "C" fn calloc(count: libc::size_t, size: libc::size_t) -> *mut libc::c_void {
    let (refused, counted) = (
        REFUSED.load(Ordering::Relaxed),
        COUNTED.load(Ordering::Relaxed),
    );
    if counted != 0 && counted == tid() {
        CALLS.fetch_add(1, Ordering::Relaxed);
    }
    if refused != 0 && refused == tid() {
        return std::ptr::null_mut();
    }
    // SAFETY: passed on.
    unsafe { __libc_calloc(count, size) }
}

const SOURCE: &str = "
static __thread int value = INITIAL;
static __thread int nothing;
int get(void) { return value; }
int zero(void) { return nothing; }
void set(int mark) { value = mark; nothing = mark; }
";

/// What one library exports.
#[derive(Clone, Copy)]
struct Functions {
    get: extern "C" fn() -> i32,
    set: extern "C" fn(i32),
    zero: extern "C" fn() -> i32,
    initial: i32,
}

struct Loaded {
    handle: *mut libc::c_void,
    functions: Functions,
}

impl Loaded {
    fn open(path: &Path, initial: i32) -> Loaded {
        Loaded::open_in(path, initial, libc::LM_ID_BASE)
    }

    /// In a link namespace of its own, or in the program's.
    fn open_in(path: &Path, initial: i32, namespace: libc::Lmid_t) -> Loaded {
        let name = CString::new(path.as_os_str().as_bytes()).expect("a path");
        let flags = libc::RTLD_NOW | libc::RTLD_LOCAL;
        // SAFETY: a library of this test, without constructors.
        let handle = unsafe { libc::dlmopen(namespace, name.as_ptr(), flags) };
        // SAFETY: dlerror's text is valid until its next call in this thread.
        assert!(!handle.is_null(), "{:?}", unsafe {
            std::ffi::CStr::from_ptr(libc::dlerror())
        });
        // SAFETY: the types are those of the source below.
        let functions = unsafe {
            Functions {
                get: std::mem::transmute::<*mut libc::c_void, extern "C" fn() -> i32>(libc::dlsym(
                    handle,
                    c"get".as_ptr(),
                )),
                set: std::mem::transmute::<*mut libc::c_void, extern "C" fn(i32)>(libc::dlsym(
                    handle,
                    c"set".as_ptr(),
                )),
                zero: std::mem::transmute::<*mut libc::c_void, extern "C" fn() -> i32>(
                    libc::dlsym(handle, c"zero".as_ptr()),
                ),
                initial,
            }
        };
        Loaded { handle, functions }
    }

    fn close(self) {
        // SAFETY: opened by `open`; the caller keeps threads from being inside.
        assert_eq!(unsafe { libc::dlclose(self.handle) }, 0);
    }
}

impl Functions {
    /// The calling thread has this library's images as the file holds them; afterwards it does not.
    fn check_fresh(self, mark: i32) {
        assert_eq!((self.get)(), self.initial, "not initialised");
        assert_eq!((self.zero)(), 0, "not zeroed");
        (self.set)(mark);
        assert_eq!(((self.get)(), (self.zero)()), (mark, mark));
    }
}

/// Builds `count` libraries with initial values of their own, into a directory that goes with the value.
struct Built {
    directory: PathBuf,
    libraries: Vec<(PathBuf, i32)>,
}

impl Built {
    fn new(count: i32) -> Result<Built, String> {
        Built::with_model(count, "initial-exec")
    }

    fn with_model(count: i32, model: &str) -> Result<Built, String> {
        let directory = std::env::temp_dir().join(format!("nptl-dlopen-{}", std::process::id()));
        std::fs::create_dir_all(&directory).map_err(|e| format!("{}: {e}", directory.display()))?;
        let mut built = Built {
            directory,
            libraries: Vec::new(),
        };
        let source = built.directory.join("tls.c");
        std::fs::write(&source, SOURCE).map_err(|e| e.to_string())?;
        for index in 0..count {
            let initial = 1000 + index;
            let path = built.directory.join(format!("libtls{index}.so"));
            let output = Command::new("gcc")
                .args(["-shared", "-fPIC", "-O1"])
                .arg(format!("-ftls-model={model}"))
                .arg(format!("-DINITIAL={initial}"))
                .arg("-o")
                .args([&path, &source])
                .output()
                .map_err(|e| format!("no gcc: {e}"))?;
            assert!(output.status.success(), "{output:?}");
            built.libraries.push((path, initial));
        }
        Ok(built)
    }
}

impl Drop for Built {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Libraries are opened one by one while threads live, start and end: a thread that has seen a library
/// published finds its own images of it. In every thread, at every moment.
#[test]
fn every_living_thread_gets_its_images() {
    const LIBRARIES: usize = 12;
    if case().is_some() {
        let built = or_skip!(Built::new(LIBRARIES as i32));
        let open = |index: usize| {
            let (path, initial) = &built.libraries[index];
            Loaded::open(path, *initial).functions
        };
        static PUBLISHED: [AtomicPtr<Functions>; LIBRARIES] =
            [const { AtomicPtr::new(std::ptr::null_mut()) }; LIBRARIES];
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let publish = |functions: Functions| {
            let index = COUNT.load(Ordering::Relaxed);
            PUBLISHED[index].store(Box::leak(Box::new(functions)), Ordering::Relaxed);
            COUNT.store(index + 1, Ordering::Release);
        };
        /// Checks those from `seen` on; the number seen.
        fn check_from(seen: usize, mark: i32) -> usize {
            let count = COUNT.load(Ordering::Acquire);
            for place in &PUBLISHED[seen..count] {
                // SAFETY: leaked before it was counted.
                unsafe { *place.load(Ordering::Relaxed) }.check_fresh(mark);
            }
            // What was marked stays this thread's own.
            for place in &PUBLISHED[..count] {
                // SAFETY: as above.
                let functions = unsafe { *place.load(Ordering::Relaxed) };
                assert_eq!((functions.get)(), mark);
            }
            count
        }
        // Before the first spawn: part of every later thread's start.
        publish(open(0));
        let stop = AtomicBool::new(false);
        let (spawned, ready) = (AtomicUsize::new(0), Barrier::new(9));
        let disabled = StackCache::new(StackCacheConfig::disabled());
        nptl::scope(|scope| {
            let (stop, spawned, ready, disabled) = (&stop, &spawned, &ready, &disabled);
            let mut living = Vec::new();
            for index in 0..8 {
                let body = move || {
                    let mut seen = check_from(0, index);
                    ready.wait();
                    while !stop.load(Ordering::Acquire) {
                        seen = check_from(seen, index);
                        std::thread::yield_now();
                    }
                    check_from(seen, index)
                };
                living.push(scope.spawn(body).expect("a thread"));
            }
            for kind in 0..2 {
                let body = move || {
                    let mut round = 100;
                    while !stop.load(Ordering::Acquire) {
                        round += 1;
                        let builder = Builder::new();
                        let builder = if kind == 0 {
                            builder
                        } else {
                            builder.stack_cache(disabled)
                        };
                        let handle = builder
                            .spawn(move || check_from(0, round))
                            .expect("a thread");
                        handle.join().expect("its end");
                        spawned.fetch_add(1, Ordering::Release);
                    }
                };
                scope.spawn(body).expect("a thread");
            }
            ready.wait();
            for index in 1..LIBRARIES {
                publish(open(index));
                // Some threads that start with this number of libraries.
                let enough = spawned.load(Ordering::Acquire) + 100;
                while spawned.load(Ordering::Acquire) < enough {
                    std::thread::yield_now();
                }
            }
            stop.store(true, Ordering::Release);
            for handle in living {
                assert_eq!(handle.join().expect("its end"), LIBRARIES);
            }
        });
        report("good", "yes");
        return;
    }
    let output = child("dlopen::every_living_thread_gets_its_images", "open");
    let output = or_skip!(output.time_limit(Duration::from_secs(90)).run()).success();
    if output.skipped().is_none() {
        assert_eq!(output.get("good"), Some("yes"), "{output}");
    }
}

/// Opened and closed again and again: each time the living threads begin with the file's images, also where
/// their memory holds what they wrote to the last ones.
#[test]
fn images_are_fresh_after_each_dlopen() {
    const CYCLES: usize = 1500;
    if case().is_some() {
        let built = or_skip!(Built::new(3));
        // The library that is open, and the number of the cycle. Readers are inside the library; opening
        // needs no lock, so threads start and end meanwhile.
        let current = RwLock::new(None::<(Functions, usize)>);
        let stop = AtomicBool::new(false);
        let (spawned, checked) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let disabled = StackCache::new(StackCacheConfig::disabled());
        nptl::scope(|scope| {
            let (current, stop, spawned, checked) = (&current, &stop, &spawned, &checked);
            let disabled = &disabled;
            for index in 0..3 {
                let body = move || {
                    let mut last = usize::MAX;
                    while !stop.load(Ordering::Acquire) {
                        let open = current.read().expect("no panic");
                        if let Some((functions, cycle)) = *open
                            && cycle != last
                        {
                            functions.check_fresh(index + 7);
                            last = cycle;
                            checked.fetch_add(1, Ordering::Release);
                        }
                        drop(open);
                        std::thread::yield_now();
                    }
                };
                scope.spawn(body).expect("a thread");
            }
            for kind in 0..2 {
                let body = move || {
                    while !stop.load(Ordering::Acquire) {
                        let builder = Builder::new();
                        let builder = if kind == 0 {
                            builder
                        } else {
                            builder.stack_cache(disabled)
                        };
                        let body = move || {
                            if let Some((functions, _)) = *current.read().expect("no panic") {
                                functions.check_fresh(99);
                            }
                        };
                        nptl::scope(|scope| {
                            let handle = builder.spawn_scoped(scope, body).expect("a thread");
                            handle.join().expect("its end");
                        });
                        spawned.fetch_add(1, Ordering::Release);
                    }
                };
                scope.spawn(body).expect("a thread");
            }
            // On until enough threads have started meanwhile, however few processors there are.
            for cycle in 0.. {
                if cycle >= CYCLES && spawned.load(Ordering::Acquire) > 100 {
                    break;
                }
                let (path, initial) = &built.libraries[cycle % built.libraries.len()];
                let library = Loaded::open(path, *initial);
                let before = checked.load(Ordering::Acquire);
                *current.write().expect("no panic") = Some((library.functions, cycle));
                if cycle % 4 == 0 {
                    // A thread has used this one; the others come and go with no thread inside.
                    while checked.load(Ordering::Acquire) == before {
                        std::thread::yield_now();
                    }
                }
                *current.write().expect("no panic") = None;
                library.close();
            }
            stop.store(true, Ordering::Release);
        });
        report("spawned", spawned.load(Ordering::Relaxed));
        report("checked", checked.load(Ordering::Relaxed));
        return;
    }
    let output = child("dlopen::images_are_fresh_after_each_dlopen", "cycle");
    let output = or_skip!(output.time_limit(Duration::from_secs(90)).run()).success();
    if output.skipped().is_none() {
        let number = |key| {
            output
                .get(key)
                .expect("a report")
                .parse::<usize>()
                .expect("a number")
        };
        assert!(
            number("spawned") > 100 && number("checked") > CYCLES / 4,
            "{output}"
        );
    }
}

/// The TLS of a stack from the cache has the images of what is loaded by then. Its DTV serves again, so that nothing is
/// allocated; unless dynamic TLS hangs off it: then the DTV is allocated anew, and that can be refused.
#[test]
fn tls_of_a_cached_stack_is_initialised_anew() {
    if case().is_some() {
        let built = or_skip!(Built::new(1));
        let cache = StackCache::new(StackCacheConfig::default());
        let spawn = |body: Box<dyn FnOnce() + Send>| Builder::new().stack_cache(&cache).spawn(body);
        let run = |body| spawn(body).expect("a thread").join().expect("its end");
        run(Box::new(|| ()));
        let (path, initial) = &built.libraries[0];
        let library = Loaded::open(path, *initial);
        let functions = library.functions;
        COUNTED.store(tid(), Ordering::Relaxed);
        for mark in 0..3 {
            run(Box::new(move || functions.check_fresh(mark)));
        }
        assert_eq!(CALLS.load(Ordering::Relaxed), 0, "the DTV is used again");
        library.close();

        drop(built);
        let built = or_skip!(Built::with_model(1, "global-dynamic"));
        let (path, initial) = &built.libraries[0];
        let library = Loaded::open(path, *initial);
        let functions = library.functions;
        run(Box::new(move || functions.check_fresh(0)));
        REFUSED.store(tid(), Ordering::Relaxed);
        let error = spawn(Box::new(|| ())).expect_err("no memory for its TLS");
        REFUSED.store(0, Ordering::Relaxed);
        assert_eq!(error.step(), Step::AllocateTls, "{error}");
        assert_eq!(error.stack().fate, StackFate::Cached, "{error}");
        run(Box::new(|| ()));
        let stats = cache.stats();
        assert_eq!((stats.misses, stats.mapped_stacks), (1, 1));
        report("good", "yes");
        return;
    }
    let output =
        or_skip!(child("dlopen::tls_of_a_cached_stack_is_initialised_anew", "reuse").run());
    let output = output.success();
    if output.skipped().is_none() {
        assert_eq!(output.get("good"), Some("yes"), "{output}");
    }
}

/// A spawn initialises the TLS of a library while another thread loads and unloads that: nothing of the loader's own
/// description of the library may change by it. (It did, in a bit beside others, on 2.41 and later: within this many rounds an
/// assertion of ld.so's ended the process.)
#[test]
fn threads_start_while_a_library_comes_and_goes() {
    const ROUNDS: usize = 30_000;
    if case().is_some() {
        let built = or_skip!(Built::new(2));
        let (done, started) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        let thread = nptl::spawn(|| ()).expect("a thread");
                        thread.join().expect("its end");
                        started.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            for round in 0..ROUNDS {
                let (path, initial) = &built.libraries[round % 2];
                Loaded::open(path, *initial).close();
            }
            done.store(true, Ordering::Relaxed);
        });
        report("started", started.into_inner() > 0);
        return;
    }
    let output = or_skip!(
        child(
            "dlopen::threads_start_while_a_library_comes_and_goes",
            "run"
        )
        .run()
    );
    let output = output.success();
    if output.skipped().is_none() {
        assert_eq!(output.get("started"), Some("true"), "{output}");
    }
}

/// TLS that a thread allocated for a library of dynamic TLS is not there in the next thread, and is freed.
#[test]
fn dynamic_tls_does_not_reach_the_next_thread() {
    if case().is_some() {
        let built = or_skip!(Built::with_model(1, "global-dynamic"));
        let cache = StackCache::new(StackCacheConfig::default());
        let run = |body: Box<dyn FnOnce() + Send>| {
            let handle = Builder::new().stack_cache(&cache).spawn(body);
            handle.expect("a thread").join().expect("fresh images");
        };
        // Learnt before the library, as in a program that loads its plugins later.
        run(Box::new(|| ()));
        run(Box::new(|| ()));
        let (path, initial) = &built.libraries[0];
        let library = Loaded::open(path, *initial);
        let functions = library.functions;
        let mut in_use = 0;
        for mark in 0..200 {
            run(Box::new(move || functions.check_fresh(mark)));
            if mark == 20 {
                in_use = support::malloc_in_use();
            }
        }
        let grown = support::malloc_in_use().saturating_sub(in_use);
        assert!(grown < 180, "{grown} bytes more after 179 threads");
        library.close();
        run(Box::new(|| ()));
        report("good", "yes");
        return;
    }
    let output = or_skip!(child("dlopen::dynamic_tls_does_not_reach_the_next_thread", "run").run());
    let output = output.success();
    if output.skipped().is_none() {
        assert_eq!(output.get("good"), Some("yes"), "{output}");
    }
}

/// A library in a link namespace of its own (dlmopen, as auditors and some plugins are loaded), which
/// dl_iterate_phdr does not show.
#[test]
fn images_of_another_namespace_are_fresh_in_every_thread() {
    if case().is_some() {
        let built = or_skip!(Built::new(1));
        let cache = StackCache::new(StackCacheConfig::default());
        let run = |body: Box<dyn FnOnce() + Send>| {
            let handle = Builder::new().stack_cache(&cache).spawn(body);
            handle.expect("a thread").join().expect("fresh images");
        };
        run(Box::new(|| ()));
        let (path, initial) = &built.libraries[0];
        let functions = Loaded::open_in(path, *initial, libc::LM_ID_NEWLM).functions;
        for mark in 0..10 {
            run(Box::new(move || functions.check_fresh(mark)));
        }
        assert_eq!(cache.stats().misses, 1, "not the same block");
        report("good", "yes");
        return;
    }
    let test = "dlopen::images_of_another_namespace_are_fresh_in_every_thread";
    let output = or_skip!(child(test, "run").run()).success();
    if output.skipped().is_none() {
        assert_eq!(output.get("good"), Some("yes"), "{output}");
    }
}
