//! The crate inside a shared object that a program opens and closes: G21.

use std::ffi::{CStr, CString, c_void};
use std::hint::black_box;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use support::{case, child, or_skip};

/// Builds the plugin beside this test and says where it is: `cargo test --test NAME` builds no examples.
pub fn plugin() -> String {
    let build = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--example", "shared_object_plugin"])
        .args(["--message-format", "json"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo");
    let stdout = String::from_utf8_lossy(&build.stdout);
    let stderr = String::from_utf8_lossy(&build.stderr);
    assert!(build.status.success(), "{stderr}");
    let mut words = stdout.split('"');
    let file = words.find(|word| word.ends_with("libshared_object_plugin.so"));
    file.expect("the plugin's file").to_owned()
}

/// A function without arguments of the object.
///
/// # Safety
/// It is of the type `F`, and called only while the object is loaded.
unsafe fn function<F: Copy>(object: *mut c_void, name: &CStr) -> F {
    // SAFETY: by the caller's promise.
    unsafe {
        let address = libc::dlsym(object, name.as_ptr());
        assert!(!address.is_null(), "{name:?}");
        assert_eq!(size_of::<F>(), size_of_val(&address));
        std::mem::transmute_copy(&address)
    }
}

fn is_loaded(path: &CStr) -> bool {
    // SAFETY: asks for what is loaded; a handle more does not matter here.
    let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    !handle.is_null()
}

/// Both copies of the crate start their first thread at the same time, and look glibc over.
#[test]
fn two_copies_calibrate_at_once() {
    let name = "shared_object::two_copies_calibrate_at_once";
    let Some(path) = case() else {
        let plugin = plugin();
        for _ in 0..20 {
            or_skip!(child(name, &plugin).run()).success();
        }
        return;
    };
    let path = CString::new(path).expect("a path");
    // SAFETY: the plugin's own function, with its type; its constructors are Rust's.
    let answer: extern "C" fn() -> i32 = unsafe {
        let object = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!object.is_null());
        function(object, c"plugin_answer")
    };
    let start = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        let theirs = scope.spawn(|| {
            start.wait();
            answer()
        });
        start.wait();
        let ours = nptl::spawn(|| 7).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(ours.join().expect("its end"), 7);
        assert_eq!(theirs.join().expect("its end"), 42);
    });
}

#[test]
fn a_closed_object_stays_under_its_threads() {
    let name = "shared_object::a_closed_object_stays_under_its_threads";
    let Some(path) = case() else {
        or_skip!(child(name, &plugin()).run()).success();
        return;
    };
    let path = CString::new(path).expect("a path");
    // SAFETY: the plugin's own functions, with their types; its constructors are Rust's.
    unsafe {
        let object = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!object.is_null());
        let start: extern "C" fn() -> i32 = function(object, c"plugin_start");
        let release: extern "C" fn() = function(object, c"plugin_release");
        let answer: extern "C" fn() -> i32 = function(object, c"plugin_answer");
        assert_eq!(answer(), 42);
        let tid = start();
        assert!(tid > 0);

        assert_eq!(libc::dlclose(object), 0);
        // Its thread runs, its fork handlers are registered, and its overflow handler has SIGSEGV.
        assert!(is_loaded(&path));
        release();
        while libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, 0) == 0 {
            std::thread::yield_now();
        }
        assert_eq!(answer(), 42);
        match libc::fork() {
            0 => libc::_exit(i32::from(answer() != 42)),
            forked => {
                let mut status = 0;
                assert_eq!(libc::waitpid(forked, &raw mut status, 0), forked);
                assert_eq!(status, 0);
            }
        }
        // Two copies of the crate in one process: the test's own, and the plugin's.
        assert_eq!(
            nptl::spawn(|| 7)
                .expect("a thread")
                .join()
                .expect("its end"),
            7
        );
    }
}

/// Where the handler of [`two_copies_leave_a_handler_its_stack`] ran.
static FRAME: AtomicUsize = AtomicUsize::new(0);

/// Each copy's handler is a guest of the other's, and both of the program's.
#[test]
fn two_copies_leave_a_handler_its_stack() {
    extern "C" fn allow(_: i32, info: *mut libc::siginfo_t, _: *mut c_void) {
        FRAME.store((&raw const info).addr(), Ordering::Relaxed);
        // SAFETY: the page that the test has mapped.
        unsafe { libc::mprotect((*info).si_addr(), 4096, libc::PROT_READ | libc::PROT_WRITE) };
    }
    let name = "shared_object::two_copies_leave_a_handler_its_stack";
    let Some(path) = case() else {
        or_skip!(child(name, &plugin()).run()).success();
        return;
    };
    let path = CString::new(path).expect("a path");
    // SAFETY: the plugin's own functions, with their types; its constructors are Rust's. The handler is of the type
    // that SA_SIGINFO asks for.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = allow as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSEGV, &raw const action, std::ptr::null_mut());
        let object = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!object.is_null());
        let answer: extern "C" fn() -> i32 = function(object, c"plugin_answer");
        assert_eq!(answer(), 42);
    }
    let body = || {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, which the handler makes writable.
        unsafe {
            let page = libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_NONE, flags, -1, 0);
            page.cast::<u8>().write_volatile(1);
        }
        FRAME.load(Ordering::Relaxed)
    };
    for _ in 0..3 {
        let thread = nptl::spawn(body).expect("a thread");
        let stack = thread.stack();
        let frame = thread.join().expect("its end");
        assert!((stack.base..stack.base + stack.size).contains(&frame));
    }
}

/// Crashes inside malloc, which holds the lock of its arena then, on a block that was freed and written to.
fn crash_in_malloc() {
    /// Too large for the caches of blocks that need no lock.
    const SIZE: usize = 5000;
    // SAFETY: none: the write to a freed block is the fault under test.
    unsafe {
        let block: *mut usize = libc::malloc(SIZE).cast();
        // Behind it another, or it would become a part of the free rest.
        black_box(libc::malloc(SIZE));
        libc::free(block.cast());
        // The second word of a free block links it with the others.
        black_box(block).add(1).write_volatile(64);
        black_box(libc::malloc(2 * SIZE));
    }
}

/// The object's handler is the first of the object in that thread, and what is local to a thread there does not exist
/// yet: it would be allocated.
#[test]
fn a_crash_inside_malloc_dies() {
    let name = "shared_object::a_crash_inside_malloc_dies";
    let Some(path) = case() else {
        let child = child(name, &plugin()).time_limit(Duration::from_secs(20));
        let output = or_skip!(child.run());
        assert_eq!(output.get("ready"), Some("yes"), "{output}");
        assert_eq!(output.signal(), Some(libc::SIGSEGV), "{output}");
        return;
    };
    let path = CString::new(path).expect("a path");
    // SAFETY: the plugin's own functions, with their types; its constructors are Rust's.
    unsafe {
        let object = libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        assert!(!object.is_null());
        let answer: extern "C" fn() -> i32 = function(object, c"plugin_answer");
        assert_eq!(answer(), 42);
    }
    support::report("ready", "yes");
    std::thread::spawn(crash_in_malloc).join().expect("no end");
}
