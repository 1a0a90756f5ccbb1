//! What is refused to libc's own calls. In each test they are made by the test program itself, and the linker has given
//! it this crate's.

use nptl::diagnose::CauseKind;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};
use support::{Output, become_unused_user, case, child, deny, or_skip, report, set_rlimit};

unsafe extern "C" {
    fn vfork() -> libc::pid_t;
    fn thrd_create(
        thread: *mut libc::pthread_t,
        start: extern "C" fn(*mut c_void) -> c_int,
        argument: *mut c_void,
    ) -> c_int;
    static environ: *const *mut c_char;
}

/// A user who may have no other task than this, and learns of it in a moment when nothing else runs.
fn alone_under_a_limit() -> Result<(), String> {
    become_unused_user()?;
    support::await_reaping();
    set_rlimit(libc::RLIMIT_NPROC, 1);
    Ok(())
}

fn errno() -> c_int {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

fn set_errno(errno: c_int) {
    // SAFETY: the calling thread's own.
    unsafe { *libc::__errno_location() = errno };
}

extern "C" fn nothing(_: *mut c_void) -> c_int {
    0
}

extern "C" fn null(_: *mut c_void) -> *mut c_void {
    ptr::null_mut()
}

extern "C-unwind" fn end(_: *mut c_void) -> c_int {
    // SAFETY: ends the child.
    unsafe { libc::_exit(7) }
}

/// Makes a call, with 77 in `errno`: what it answers, and what it leaves there.
fn answers(call: &str) -> (c_int, c_int) {
    let mut thread = 0;
    let mut pid = 0;
    let mut stack = vec![0_u128; 4096];
    let arguments = [c"true".as_ptr().cast_mut(), ptr::null_mut()];
    let child = |pid: libc::pid_t| {
        if pid == 0 {
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) };
        }
        pid
    };
    set_errno(77);
    // SAFETY: each with the arguments that its manual page demands; a child of vfork does nothing but end.
    let answer = unsafe {
        match call {
            "pthread_create" => {
                libc::pthread_create(&raw mut thread, ptr::null(), null, ptr::null_mut())
            }
            "thrd_create" => thrd_create(&raw mut thread, nothing, ptr::null_mut()),
            "fork" => child(libc::fork()),
            "vfork" => child(vfork()),
            "posix_spawn" => libc::posix_spawn(
                &raw mut pid,
                c"/bin/true".as_ptr(),
                ptr::null(),
                ptr::null(),
                arguments.as_ptr(),
                environ,
            ),
            "posix_spawnp" => libc::posix_spawnp(
                &raw mut pid,
                c"true".as_ptr(),
                ptr::null(),
                ptr::null(),
                arguments.as_ptr(),
                environ,
            ),
            "clone" => {
                let end = std::mem::transmute::<
                    extern "C-unwind" fn(*mut c_void) -> c_int,
                    extern "C" fn(*mut c_void) -> c_int,
                >(end);
                let top = stack.as_mut_ptr_range().end;
                libc::clone(end, top.cast(), libc::SIGCHLD, ptr::null_mut())
            }
            other => panic!("{other}"),
        }
    };
    let left = errno();
    match (call, answer) {
        ("pthread_create", 0) => {
            // SAFETY: joined once.
            unsafe { libc::pthread_join(thread, ptr::null_mut()) };
        }
        ("fork" | "vfork" | "clone", 1..) => pid = answer,
        _ => {}
    }
    let mut status = 0;
    if pid > 0 {
        // SAFETY: a child of this process, and a place for its status.
        assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
        let expected = if call == "clone" { 7 } else { 0 };
        assert_eq!(libc::WEXITSTATUS(status), expected, "{call}");
    }
    (answer, left)
}

const CALLS: [(&str, c_int); 7] = [
    ("pthread_create", libc::EAGAIN),
    // thrd_error
    ("thrd_create", 2),
    ("fork", -1),
    ("vfork", -1),
    ("posix_spawn", libc::EAGAIN),
    ("posix_spawnp", libc::EAGAIN),
    ("clone", -1),
];

fn reports(output: &Output) -> Vec<&str> {
    let lines = output.stderr.lines();
    lines.filter(|line| line.starts_with("nptl: ")).collect()
}

fn explained(test: &str) -> Result<Output, String> {
    let child = child(test, "run").env("NPTL_MODE", "explain");
    Ok(child.run()?.success())
}

/// The child's assertions hold, and it has written one report.
fn expect_one_report(test: &str) {
    let output = or_skip!(explained(test));
    let skipped = output.skipped().is_some();
    assert!(skipped || reports(&output).len() == 1, "{output}");
}

#[test]
fn a_refused_call_answers_as_libc_does_and_is_explained() {
    let test = "calls::a_refused_call_answers_as_libc_does_and_is_explained";
    if case().is_some() {
        or_skip!(alone_under_a_limit());
        for (call, refused) in CALLS {
            assert_eq!(answers(call), (refused, libc::EAGAIN), "{call}");
            let failure = nptl::last_failure().expect("the refusal");
            report(call, format!("{failure}"));
        }
        return;
    }
    let output = or_skip!(explained(test));
    if output.skipped().is_some() {
        return;
    }
    let lines = reports(&output);
    assert_eq!(lines.len(), CALLS.len(), "{output}");
    for (line, (call, _)) in lines.into_iter().zip(CALLS) {
        let begin =
            format!("nptl: {call} refused: errno=EAGAIN cause=UserProcesses certainty=inferred: ");
        assert!(line.starts_with(&begin), "{line}");
        let kept = output.get(call).expect("what is kept");
        assert!(line.starts_with(kept), "{line}\n{kept}");
        // A process does not share what a sibling inside execve holds.
        assert!(!output.stderr.contains("execve"), "{output}");
    }
}

#[test]
fn nothing_is_written_or_changed_where_nothing_is_refused() {
    let test = "calls::nothing_is_written_or_changed_where_nothing_is_refused";
    if case().is_some() {
        for (call, _) in CALLS {
            let (answer, left) = answers(call);
            assert!(answer >= 0, "{call}: {answer}");
            // The search of a path sets it, with and without this crate.
            assert!(left == 77 || call == "posix_spawnp", "{call}: {left}");
        }
        return;
    }
    let output = or_skip!(explained(test));
    assert_eq!(reports(&output), [""; 0], "{output}");
}

/// "fork: Cannot allocate memory", as after `unshare --pid` without `--fork`: the first child was the namespace's init.
#[test]
fn a_process_of_a_namespace_without_init_is_told_so() {
    let test = "calls::a_process_of_a_namespace_without_init_is_told_so";
    if case().is_some() {
        // Not in a user namespace: the harness's thread stands in the way of one.
        if !support::is_root() {
            support::skip!("needs root");
        }
        // SAFETY: changes what the children of this process are made in.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWPID) }, 0);
        assert!(answers("fork").0 > 0);
        for call in ["fork", "vfork"] {
            assert_eq!(answers(call), (-1, libc::ENOMEM));
            let failure = nptl::last_failure().expect("the refusal");
            let kind = failure.cause().kind();
            // Where no memory cgroup can be read, memory can be short.
            let listed = failure
                .alternatives()
                .contains(CauseKind::DyingPidNamespace);
            let unknown = kind == CauseKind::Unknown && listed;
            assert!(kind == CauseKind::DyingPidNamespace || unknown, "{failure}");
        }
        return;
    }
    let output = or_skip!(explained(test));
    assert!(
        output.skipped().is_some() || reports(&output).len() == 2,
        "{output}"
    );
}

fn glibc_version() -> (u32, u32) {
    // SAFETY: a constant of the C library.
    let version = unsafe { CStr::from_ptr(libc::gnu_get_libc_version()) };
    let version = version.to_str().expect("ASCII");
    let (major, minor) = version.split_once('.').expect("two numbers");
    let number = |text: &str| text.parse().expect("a number");
    (number(major), number(minor))
}

/// In the first case a filter has made glibc give up clone3, and a later filter kills for clone3. In the second one filter
/// kills for it, and fork does not use it. The analysis must not make that call.
#[test]
fn the_analysis_makes_no_call_that_a_filter_kills_for() {
    let test = "calls::the_analysis_makes_no_call_that_a_filter_kills_for";
    let Some(case) = case() else {
        // Before 2.37 glibc calls clone3 for every thread, so the filter kills the program without the analysis.
        let remembers = glibc_version() >= (2, 37);
        for case in ["thread", "process"]
            .into_iter()
            .skip(usize::from(!remembers))
        {
            let output = or_skip!(child(test, case).env("NPTL_MODE", "explain").run()).success();
            if output.skipped().is_some() {
                return;
            }
            let lines = reports(&output);
            assert_eq!(lines.len(), 1, "{output}");
            assert!(
                lines[0].contains("=UserProcesses certainty=inferred"),
                "{output}"
            );
        }
        return;
    };
    or_skip!(become_unused_user());
    match case.as_str() {
        "thread" => {
            deny(libc::SYS_clone3, libc::ENOSYS).install();
            assert_eq!(answers("pthread_create").0, 0);
            deny(libc::SYS_clone3, 0).install_trap();
        }
        // fork makes its process by clone.
        _ => deny(libc::SYS_clone3, 0).install_trap(),
    }
    support::await_reaping();
    set_rlimit(libc::RLIMIT_NPROC, 1);
    match case.as_str() {
        "thread" => assert_eq!(answers("pthread_create").0, libc::EAGAIN),
        _ => assert_eq!(answers("fork").0, -1),
    }
}

static IN_HANDLER: AtomicI32 = AtomicI32::new(0);

extern "C" fn fork_in_handler(_: c_int) {
    let answer = answers_of_fork();
    IN_HANDLER.store(answer, Ordering::SeqCst);
}

/// Without the stack that [`answers`] takes.
fn answers_of_fork() -> c_int {
    // SAFETY: the child ends at once.
    match unsafe { libc::fork() } {
        // SAFETY: ends the child.
        0 => unsafe { libc::_exit(0) },
        answer => answer,
    }
}

/// The smallest signal stack that a handler fits on.
#[test]
fn a_fork_refused_on_a_small_signal_stack_is_explained() {
    let test = "calls::a_fork_refused_on_a_small_signal_stack_is_explained";
    if case().is_some() {
        or_skip!(alone_under_a_limit());
        // SAFETY: getauxval takes a number.
        let least = unsafe { libc::getauxval(libc::AT_MINSIGSTKSZ) };
        let mut memory = vec![0_u8; usize::try_from(least).expect("a size") + 8192];
        let stack = libc::stack_t {
            ss_sp: memory.as_mut_ptr().cast(),
            ss_flags: 0,
            ss_size: memory.len(),
        };
        // SAFETY: the stack outlives its use; a handler of the right type.
        unsafe {
            assert_eq!(libc::sigaltstack(&raw const stack, ptr::null_mut()), 0);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = fork_in_handler as extern "C" fn(c_int) as usize;
            action.sa_flags = libc::SA_ONSTACK;
            libc::sigaction(libc::SIGUSR1, &raw const action, ptr::null_mut());
            libc::raise(libc::SIGUSR1);
        }
        assert_eq!(IN_HANDLER.load(Ordering::SeqCst), -1);
        return;
    }
    expect_one_report(test);
}

/// What is refused to a thread with the smallest stack that glibc allows.
#[test]
fn a_thread_with_a_small_stack_is_told_why_it_gets_none() {
    extern "C" fn inner(_: *mut c_void) -> *mut c_void {
        let mut thread = 0;
        // SAFETY: a place for the number; the thread is refused.
        let answer =
            unsafe { libc::pthread_create(&raw mut thread, ptr::null(), null, ptr::null_mut()) };
        ptr::without_provenance_mut(answer as usize)
    }
    let test = "calls::a_thread_with_a_small_stack_is_told_why_it_gets_none";
    if case().is_some() {
        or_skip!(become_unused_user());
        support::await_reaping();
        // The harness's two, and the one with the small stack.
        set_rlimit(libc::RLIMIT_NPROC, 3);
        let mut thread = 0;
        let mut answer = ptr::null_mut();
        // SAFETY: the attributes are initialised before use; the thread is joined once.
        unsafe {
            let mut attributes = std::mem::zeroed();
            libc::pthread_attr_init(&raw mut attributes);
            libc::pthread_attr_setstacksize(&raw mut attributes, libc::PTHREAD_STACK_MIN);
            let created = libc::pthread_create(
                &raw mut thread,
                &raw const attributes,
                inner,
                ptr::null_mut(),
            );
            assert_eq!(created, 0);
            libc::pthread_join(thread, &raw mut answer);
        }
        assert_eq!(answer.addr(), libc::EAGAIN as usize);
        return;
    }
    expect_one_report(test);
}

/// A thread of the parent is writing its report, which is not read.
#[test]
fn a_forked_child_does_not_wait_for_a_thread_of_its_parent() {
    let test = "calls::a_forked_child_does_not_wait_for_a_thread_of_its_parent";
    if case().is_none() {
        return drop(or_skip!(explained(test)));
    }
    let refused = || {
        let thread = std::thread::Builder::new().stack_size(1 << 60);
        assert!(thread.spawn(|| ()).is_err());
    };
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    // SAFETY: descriptors of this process: a pipe that is filled to the brim takes the place of stderr.
    unsafe {
        let fd = writer.as_raw_fd();
        libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK);
        while libc::write(fd, [0_u8; 4096].as_ptr().cast(), 4096) > 0 {}
        libc::fcntl(fd, libc::F_SETFL, 0);
        libc::dup2(fd, 2);
    }
    let (says, tid) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        says.send(support::tid()).expect("a receiver");
        refused();
    });
    let call = format!("/proc/self/task/{}/syscall", tid.recv().expect("a number"));
    let write = format!("{} 0x2 ", libc::SYS_write);
    while !std::fs::read_to_string(&call).is_ok_and(|call| call.starts_with(&write)) {
        std::thread::yield_now();
    }
    // SAFETY: the child makes calls that are allowed after fork, and ends.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above.
        unsafe {
            libc::dup2(libc::open(c"/dev/null".as_ptr(), libc::O_WRONLY), 2);
            let mut thread = 0;
            let mut attributes = std::mem::zeroed();
            libc::pthread_attr_init(&raw mut attributes);
            libc::pthread_attr_setstacksize(&raw mut attributes, 1 << 60);
            let attributes = &raw const attributes;
            libc::_exit(libc::pthread_create(
                &raw mut thread,
                attributes,
                null,
                ptr::null_mut(),
            ));
        }
    }
    let mut status = 0;
    // SAFETY: a child of this process, and a place for its status.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(libc::WEXITSTATUS(status), libc::EAGAIN);
    drop(writer);
    // SAFETY: back to where the harness looks.
    unsafe { libc::dup2(1, 2) };
    let mut buffer = vec![0; 1 << 20];
    let _ = reader.read(&mut buffer);
    thread.join().expect("an end");
}

/// The functions of nptl.h, as a program in C has them.
#[test]
fn the_functions_of_the_header_fill_a_buffer_as_snprintf_does() {
    unsafe extern "C" {
        fn nptl_last_failure(buffer: *mut c_char, size: usize) -> c_int;
        fn nptl_headroom(buffer: *mut c_char, size: usize) -> c_int;
        fn nptl_stats(buffer: *mut c_char, size: usize) -> c_int;
    }
    type Function = unsafe extern "C" fn(*mut c_char, usize) -> c_int;
    let whole = |function: Function| {
        // SAFETY: nothing is written without a size, and no more than that with one.
        unsafe {
            let length = usize::try_from(function(ptr::null_mut(), 0)).expect("a length");
            let mut buffer = vec![b'x'; length + 256];
            let again = function(buffer.as_mut_ptr().cast(), buffer.len());
            let text = CStr::from_bytes_until_nul(&buffer).expect("a NUL");
            assert_eq!(
                text.to_bytes().len(),
                usize::try_from(again).expect("a length")
            );
            text.to_str().expect("UTF-8").to_owned()
        }
    };
    support::alone(
        "calls::the_functions_of_the_header_fill_a_buffer_as_snprintf_does",
        || {
            assert_eq!(whole(nptl_last_failure), "");
            let refused = nptl::Builder::new().stack_size(usize::MAX).spawn(|| ());
            let line = refused.expect_err("an impossible size").to_string();
            let failure = whole(nptl_last_failure);
            assert!(
                failure.starts_with(&format!("{line}\nstep: attributes, ")),
                "{failure}"
            );
            let headroom = whole(nptl_headroom);
            assert!(headroom.contains("RLIMIT_NPROC"), "{headroom}");
            let last = headroom.lines().last().expect("a line");
            assert!(last.starts_with("first reached: "), "{headroom}");
            let stats = whole(nptl_stats);
            assert!(
                stats.starts_with("mode=threads refusals=1 cache_hits="),
                "{stats}"
            );

            let mut little = [b'x'; 8];
            // SAFETY: seven bytes and a NUL.
            let needed = unsafe { nptl_stats(little.as_mut_ptr().cast(), 8) };
            assert!(usize::try_from(needed).is_ok_and(|needed| needed >= stats.len() - 8));
            assert_eq!(&little, b"mode=th\0");
        },
    );
}
