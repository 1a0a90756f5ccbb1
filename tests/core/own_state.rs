//! Each thread has its own of everything that libc and Rust keep for a thread, and finds it as new, also on
//! the stack and TLS block of a thread that has ended.

use crate::{on_one_block, private_cache, rounds, wait_until};
use libc::{c_char, c_int, c_void};
use nix::errno::Errno;
use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::ffi::CStr;
use std::net::ToSocketAddrs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use support::{case, child, or_skip, skip};

unsafe extern "C" {
    fn __res_init() -> c_int;
    fn __res_state() -> *mut ResolverState;
    fn __h_errno_location() -> *mut c_int;
}

/// The head of glibc's `struct __res_state`.
#[repr(C)]
struct ResolverState {
    retransmission: c_int,
    retry: c_int,
    options: libc::c_ulong,
    nscount: c_int,
}

#[test]
fn errno_belongs_to_one_thread_and_starts_at_0() {
    // Not a barrier: its futex(2) leaves an EAGAIN of its own now and then.
    let both = Arc::new(AtomicUsize::new(0));
    let set_and_read = |errno: i32| {
        let both = Arc::clone(&both);
        nptl::spawn(move || {
            Errno::set_raw(errno);
            both.fetch_add(1, Ordering::Relaxed);
            while both.load(Ordering::Relaxed) < 2 {
                std::thread::yield_now();
            }
            Errno::last_raw()
        })
    };
    let (one, other) = (set_and_read(11).unwrap(), set_and_read(22).unwrap());
    assert_eq!((one.join().unwrap(), other.join().unwrap()), (11, 22));

    let ((), next) = on_one_block(|| Errno::set_raw(33), Errno::last_raw);
    assert_eq!(next, 0);
}

#[test]
fn thread_locals_start_fresh_on_a_reused_block_and_are_destroyed_once() {
    static BORN: AtomicUsize = AtomicUsize::new(0);
    static DROPPED: AtomicUsize = AtomicUsize::new(0);
    struct CountsDrops(Cell<u64>);
    impl Drop for CountsDrops {
        fn drop(&mut self) {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
    }
    thread_local! {
        static LAZY: CountsDrops = {
            BORN.fetch_add(1, Ordering::Relaxed);
            CountsDrops(Cell::new(7))
        };
        static CONSTANT: Cell<[u64; 9]> = const { Cell::new([3; 9]) };
        static HEAP: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
    }
    let use_them = || {
        assert_eq!(LAZY.with(|lazy| lazy.0.replace(0)), 7);
        assert_eq!(CONSTANT.replace([4; 9]), [3; 9]);
        HEAP.with_borrow_mut(|heap| {
            assert!(heap.is_empty());
            heap.extend(0..1000);
        });
        CONSTANT.with(|place| std::ptr::from_ref(place).addr())
    };
    for round in 1..=20 {
        let (first, second) = on_one_block(use_them, use_them);
        assert_eq!(first, second, "not the same memory");
        assert_eq!(BORN.load(Ordering::Relaxed), 2 * round);
        assert_eq!(DROPPED.load(Ordering::Relaxed), 2 * round);
    }
}

#[test]
fn a_locale_is_not_seen_by_the_next_thread() {
    fn codeset() -> String {
        // SAFETY: a NUL-terminated string that stays until the next call in this thread.
        let name = unsafe { CStr::from_ptr(libc::nl_langinfo(libc::CODESET)) };
        name.to_string_lossy().into_owned()
    }
    let use_utf8 = || {
        // SAFETY: a valid name; the locale is freed after it is taken out of use by the thread's end, so
        // never.
        unsafe {
            let locale =
                libc::newlocale(libc::LC_ALL_MASK, c"C.UTF-8".as_ptr(), std::ptr::null_mut());
            if locale.is_null() {
                return None;
            }
            libc::uselocale(locale);
            Some((codeset(), locale.addr()))
        }
    };
    let look = || {
        // SAFETY: a null locale only asks.
        let locale = unsafe { libc::uselocale(std::ptr::null_mut()) };
        (codeset(), locale.addr())
    };
    let (Some((during, locale)), after) = on_one_block(use_utf8, look) else {
        skip!("no locale C.UTF-8");
    };
    // SAFETY: its only user has ended.
    unsafe { libc::freelocale(locale as libc::locale_t) };
    assert_eq!(during, "UTF-8");
    assert_eq!(after, look());
    assert_ne!(after.0, "UTF-8");
}

#[test]
fn ctype_tables_are_there() {
    let handle = nptl::spawn(|| {
        // SAFETY: plain functions on bytes, which read tables through thread-local pointers.
        unsafe {
            (
                libc::isalpha(65) != 0,
                libc::isdigit(65) != 0,
                libc::toupper(97),
            )
        }
    });
    assert_eq!(handle.unwrap().join().unwrap(), (true, false, 65));
}

/// Address of the calling thread's rseq area, and its registered size; None before glibc 2.35.
fn rseq_area() -> Option<(usize, usize)> {
    // SAFETY: both symbols are constants of glibc, of these types.
    unsafe {
        let offset = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr());
        let size = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr());
        if offset.is_null() || size.is_null() {
            return None;
        }
        let area = libc::pthread_self().checked_add_signed(*offset.cast::<i64>())?;
        Some((area as usize, (*size.cast::<u32>()).max(32) as usize))
    }
}

/// What the kernel last wrote to the rseq area: -1 never registered, -2 registration refused.
fn rseq_cpu_id() -> i32 {
    let (area, _) = rseq_area().expect("a glibc with rseq");
    // SAFETY: the thread's own area; the kernel writes to it.
    unsafe { ((area + 4) as *const i32).read_volatile() }
}

pub(super) fn pin_to(cpu: usize) {
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(cpu).unwrap();
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus).unwrap();
}

pub(super) fn allowed_cpus() -> Vec<usize> {
    let cpus = nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).unwrap();
    (0..nix::sched::CpuSet::count())
        .filter(|&cpu| cpus.is_set(cpu).unwrap())
        .collect()
}

#[test]
fn rseq_is_registered_and_tells_the_cpu() {
    if rseq_area().is_none() {
        skip!("a glibc without rseq");
    }
    // valgrind has no rseq, and a tunable can turn it off; then no thread's is registered.
    let wanted = rseq_cpu_id() >= 0;
    let look = move || {
        for cpu in allowed_cpus() {
            pin_to(cpu);
            // SAFETY: no preconditions.
            assert_eq!(unsafe { libc::sched_getcpu() }, cpu as i32);
            assert_eq!(rseq_cpu_id(), if wanted { cpu as i32 } else { -2 });
        }
        let (area, size) = rseq_area().unwrap();
        const SIGNATURE: u32 = 0x5305_3053;
        if wanted {
            // SAFETY: at worst this registers the thread's own area.
            let answer = unsafe { libc::syscall(libc::SYS_rseq, area, size, 0, SIGNATURE) };
            let errno = Errno::last();
            assert_eq!(
                (answer, errno),
                (-1, Errno::EBUSY),
                "the kernel knows no area"
            );
        }
        area
    };
    let (first, second) = on_one_block(look, look);
    assert_eq!(first, second);
    assert_ne!(first, rseq_area().unwrap().0);
}

#[test]
fn without_rseq_in_the_program_there_is_none_in_its_threads() {
    let name = "own_state::without_rseq_in_the_program_there_is_none_in_its_threads";
    if case().is_some() {
        if rseq_area().is_none() {
            skip!("a glibc without rseq");
        }
        assert!(rseq_cpu_id() < 0, "the tunable had no effect");
        assert_eq!(nptl::spawn(rseq_cpu_id).unwrap().join().unwrap(), -2);
        return;
    }
    let tunable = child(name, "run").env("GLIBC_TUNABLES", "glibc.pthread.rseq=0");
    or_skip!(tunable.run()).success();
}

#[test]
fn resolver_state_is_its_own_and_closed_at_the_end() {
    // SAFETY: F_GETFD on a number is harmless.
    let stdin_is_open = || unsafe { libc::fcntl(0, libc::F_GETFD) } >= 0;
    let before = stdin_is_open();
    let initialise = || {
        // SAFETY: the state of this very thread.
        unsafe {
            assert_eq!(__res_init(), 0);
            let state = &mut *__res_state();
            assert_ne!(state.options & 1, 0, "not initialised by res_init");
            state.retransmission = 7777;
            std::ptr::from_ref(state).addr()
        }
    };
    let look = || {
        // SAFETY: the state of this very thread.
        let state = unsafe { &*__res_state() };
        assert_eq!((state.options, state.nscount), (0, 0), "of the last thread");
        assert_ne!(state.retransmission, 7777);
        std::ptr::from_ref(state).addr()
    };
    let (first, second) = on_one_block(initialise, look);
    assert_eq!(first, second);
    // SAFETY: only the address is looked at.
    assert_ne!(first, unsafe { __res_state() }.addr());
    assert_eq!(
        stdin_is_open(),
        before,
        "the resolver's end closed descriptor 0"
    );
}

#[test]
fn h_errno_starts_at_0() {
    let set = || {
        // SAFETY: the calling thread's variable.
        unsafe { *__h_errno_location() = 3 };
    };
    // SAFETY: as above.
    let ((), next) = on_one_block(set, || unsafe { *__h_errno_location() });
    assert_eq!(next, 0);
}

#[test]
fn a_pending_dlerror_does_not_reach_the_next_thread() {
    let fail = || {
        // SAFETY: a path that names nothing.
        assert!(unsafe { libc::dlopen(c"/nowhere/lib.so".as_ptr(), libc::RTLD_NOW) }.is_null());
    };
    // SAFETY: only asks.
    let ((), next) = on_one_block(fail, || unsafe { libc::dlerror() }.is_null());
    assert!(next);
}

#[test]
fn pthread_self_is_the_handles_pthread_t_and_unique() {
    let handles: Vec<_> = (0..20)
        // SAFETY: no preconditions.
        .map(|_| nptl::spawn(|| unsafe { libc::pthread_self() }).unwrap())
        .collect();
    let mut seen = HashSet::new();
    for handle in handles {
        let ours = handle.as_pthread_t();
        assert_eq!(handle.join().unwrap(), ours);
        assert!(seen.insert(ours), "two living handles with one pthread_t");
    }
}

/// Lowest address, size, and guard size as pthread_getattr_np reports them.
fn stack_of(thread: libc::pthread_t) -> (usize, usize, usize) {
    // SAFETY: the thread is alive, and the attributes are initialised by pthread_getattr_np.
    unsafe {
        let mut attributes = std::mem::zeroed();
        assert_eq!(libc::pthread_getattr_np(thread, &raw mut attributes), 0);
        let (mut base, mut size, mut guard) = (std::ptr::null_mut(), 0, 0);
        libc::pthread_attr_getstack(&raw const attributes, &raw mut base, &raw mut size);
        libc::pthread_attr_getguardsize(&raw const attributes, &raw mut guard);
        libc::pthread_attr_destroy(&raw mut attributes);
        (base.addr(), size, guard)
    }
}

#[test]
fn pthread_getattr_np_tells_what_the_handle_tells() {
    for size in [1, 64 << 10, 100_000, 2 << 20, 5 << 20] {
        for guard in [0, 1, 4096, 65_536, 1 << 20] {
            let gate = Arc::new(Barrier::new(2));
            let opened = Arc::clone(&gate);
            let handle = nptl::Builder::new()
                .stack_size(size)
                .guard_size(guard)
                .spawn(move || {
                    let local = std::ptr::from_ref(&opened).addr();
                    opened.wait();
                    // SAFETY: no preconditions.
                    (stack_of(unsafe { libc::pthread_self() }), local)
                });
            let handle = handle.unwrap();
            let said = handle.stack();
            let expected = (said.base, said.size, said.guard_size);
            assert_eq!(stack_of(handle.as_pthread_t()), expected);
            assert!(said.size >= size && said.guard_size >= guard);
            gate.wait();
            let (inside, local) = handle.join().unwrap();
            assert_eq!(inside, expected);
            assert!((said.base..said.base + said.size).contains(&local));
        }
    }
}

/// Deleted when the test is over, as the process has only 1,024 of them.
struct OwnKey(libc::pthread_key_t);

impl OwnKey {
    fn new(destructor: Option<unsafe extern "C" fn(*mut c_void)>) -> OwnKey {
        let mut key = 0;
        // SAFETY: a valid place for the key; the destructors below take what the tests set.
        let answer = unsafe { libc::pthread_key_create(&raw mut key, destructor) };
        assert_eq!(answer, 0);
        OwnKey(key)
    }
}

impl Drop for OwnKey {
    fn drop(&mut self) {
        // SAFETY: a key of ours.
        unsafe { libc::pthread_key_delete(self.0) };
    }
}

fn key_value(key: libc::pthread_key_t) -> usize {
    // SAFETY: any key may be asked for.
    unsafe { libc::pthread_getspecific(key) }.addr()
}

fn set_key(key: libc::pthread_key_t, value: usize) {
    // SAFETY: the value is a number to all destructors.
    let answer = unsafe { libc::pthread_setspecific(key, value as *const c_void) };
    assert_eq!(answer, 0);
}

#[test]
fn key_values_are_destroyed_once_and_do_not_reach_the_next_thread() {
    static SUM: AtomicUsize = AtomicUsize::new(0);
    unsafe extern "C" fn add(value: *mut c_void) {
        SUM.fetch_add(value.addr(), Ordering::Relaxed);
    }
    // More than the 32 that lie in the descriptor itself: the rest are in a table of the second level.
    // Every other one has no destructor.
    let keys: Vec<OwnKey> = (0..100)
        .map(|n| OwnKey::new((n % 2 == 0).then_some(add as _)))
        .collect();
    let numbers: Vec<_> = keys.iter().map(|key| key.0).collect();
    assert!(
        numbers.iter().any(|&key| key >= 64),
        "no key of the second level"
    );
    let set_all = {
        let numbers = numbers.clone();
        move || {
            numbers
                .iter()
                .enumerate()
                .for_each(|(n, &key)| set_key(key, n + 1))
        }
    };
    let look = move || {
        assert_eq!(
            SUM.load(Ordering::Relaxed),
            (0..100).step_by(2).map(|n| n + 1).sum()
        );
        numbers.iter().all(|&key| key_value(key) == 0)
    };
    let ((), fresh) = on_one_block(set_all, look);
    assert!(fresh, "a value of the last thread");
}

#[test]
fn a_key_that_is_set_again_by_its_destructor_is_destroyed_in_four_rounds() {
    static KEY: AtomicUsize = AtomicUsize::new(0);
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    unsafe extern "C" fn again(value: *mut c_void) {
        CALLS.fetch_add(1, Ordering::Relaxed);
        set_key(KEY.load(Ordering::Relaxed) as _, value.addr());
    }
    let key = OwnKey::new(Some(again));
    KEY.store(key.0 as usize, Ordering::Relaxed);
    let number = key.0;
    let ((), next) = on_one_block(move || set_key(number, 5), move || key_value(number));
    assert_eq!((CALLS.load(Ordering::Relaxed), next), (4, 0));
}

#[test]
fn a_deleted_key_is_not_destroyed_and_its_successor_starts_empty() {
    unsafe extern "C" fn never(_: *mut c_void) {
        panic!("the destructor of a deleted key");
    }
    let (old_value, new_value) = nptl::spawn(|| {
        let key = OwnKey::new(Some(never));
        let old = key.0;
        set_key(old, 1);
        let value = key_value(old);
        drop(key);
        // The same slot, if no other test was quicker; then its value is that of another key.
        let successor = OwnKey::new(None);
        (value, key_value(successor.0))
    })
    .unwrap()
    .join()
    .unwrap();
    assert_eq!((old_value, new_value), (1, 0));
}

#[test]
fn a_thread_local_first_used_by_a_key_destructor_is_destroyed_in_its_thread() {
    static DROPPED_BY: Mutex<Vec<i32>> = Mutex::new(Vec::new());
    struct Tell;
    impl Drop for Tell {
        fn drop(&mut self) {
            // SAFETY: no preconditions.
            DROPPED_BY.lock().unwrap().push(unsafe { libc::gettid() });
        }
    }
    thread_local!(static LATE: Tell = const { Tell });
    unsafe extern "C" fn touch(_: *mut c_void) {
        LATE.with(|_| ());
    }
    let key = OwnKey::new(Some(touch));
    let number = key.0;
    let set = move || {
        set_key(number, 1);
        // SAFETY: no preconditions.
        unsafe { libc::gettid() }
    };
    let (first, by) = on_one_block(set, || DROPPED_BY.lock().unwrap().clone());
    assert_eq!(by, [first]);
}

fn comm(tid: libc::pid_t) -> String {
    let comm = std::fs::read_to_string(format!("/proc/self/task/{tid}/comm")).unwrap();
    comm.trim_end_matches('\n').to_owned()
}

#[test]
fn names_are_set_and_read_by_the_kernel_by_glibc_and_by_us() {
    let gate = Arc::new(Barrier::new(2));
    let (entered, left) = (Arc::clone(&gate), Arc::clone(&gate));
    let name = "häuser-der-länge-nach";
    let handle = nptl::Builder::new()
        .name(name)
        .spawn(move || {
            entered.wait();
            left.wait();
            nptl::current_name()
        })
        .unwrap();
    gate.wait();
    assert_eq!(handle.name(), Some(name));
    assert_eq!(comm(handle.tid()), "häuser-der-lä");
    let mut buffer = [0 as c_char; 16];
    // SAFETY: the thread is alive, and the buffer as long as said.
    let read = unsafe {
        assert_eq!(
            libc::pthread_setname_np(handle.as_pthread_t(), c"other".as_ptr()),
            0
        );
        assert_eq!(
            libc::pthread_getname_np(handle.as_pthread_t(), buffer.as_mut_ptr(), 16),
            0
        );
        CStr::from_ptr(buffer.as_ptr())
    };
    assert_eq!(read, c"other");
    assert_eq!(comm(handle.tid()), "other");
    gate.wait();
    assert_eq!(handle.join().unwrap().as_deref(), Some(name));
    assert_eq!(nptl::current_name(), None);

    let named = nptl::Builder::new().name("\0").spawn(|| ()).unwrap_err();
    assert_eq!(named.step(), nptl::Step::Attributes);
}

fn own_policy() -> (i32, i32) {
    let (mut policy, mut param) = (-1, libc::sched_param { sched_priority: -1 });
    // SAFETY: the calling thread, and valid places for the results.
    unsafe {
        assert_eq!(
            libc::pthread_getschedparam(libc::pthread_self(), &raw mut policy, &raw mut param),
            0
        );
        assert_eq!(
            policy,
            libc::sched_getscheduler(0),
            "glibc and the kernel disagree"
        );
    }
    (policy, param.sched_priority)
}

/// glibc keeps what it last heard of a thread's policy in the descriptor.
#[test]
fn the_scheduling_policy_of_the_last_thread_is_forgotten() {
    for (policy, sched_priority) in [(libc::SCHED_BATCH, 0), (libc::SCHED_RR, 3)] {
        let change = move || {
            let param = libc::sched_param { sched_priority };
            // SAFETY: the calling thread, and a valid structure.
            let answer = unsafe {
                libc::pthread_setschedparam(libc::pthread_self(), policy, &raw const param)
            };
            (answer == 0).then(own_policy)
        };
        let (changed, next) = on_one_block(change, own_policy);
        assert_eq!(next, own_policy());
        match changed {
            Some(changed) => assert_eq!(changed, (policy, sched_priority)),
            None => skip!("this machine refuses policy {policy}"),
        }
    }
}

#[test]
fn glibcs_join_and_detach_refuse_our_threads_and_harm_nothing() {
    let refuses = |thread: libc::pthread_t| {
        // SAFETY: the handle exists, so the pthread_t is valid; a result is not asked for.
        unsafe {
            assert_eq!(
                libc::pthread_join(thread, std::ptr::null_mut()),
                libc::EINVAL
            );
            assert_eq!(libc::pthread_detach(thread), libc::EINVAL);
        }
    };
    let gate = Arc::new(Barrier::new(2));
    let opened = Arc::clone(&gate);
    let handle = nptl::spawn(move || {
        opened.wait();
        5
    })
    .unwrap();
    refuses(handle.as_pthread_t());
    gate.wait();
    wait_until("the thread's end", || handle.is_finished());
    refuses(handle.as_pthread_t());
    assert_eq!(handle.join().unwrap(), 5);
}

#[test]
fn glibcs_other_calls_work_on_our_threads() {
    let (open, gate) = mpsc::channel::<()>();
    let handle = nptl::spawn(move || gate.recv().is_err()).unwrap();
    let thread = handle.as_pthread_t();
    // SAFETY: the thread lives until the gate opens; all places for results are valid.
    unsafe {
        let mut clock = 0;
        assert_eq!(libc::pthread_getcpuclockid(thread, &raw mut clock), 0);
        let mut time = std::mem::zeroed();
        assert_eq!(libc::clock_gettime(clock, &raw mut time), 0);

        let (mut cpus, mut got): (libc::cpu_set_t, libc::cpu_set_t) = std::mem::zeroed();
        libc::CPU_SET(allowed_cpus()[0], &mut cpus);
        let size = size_of::<libc::cpu_set_t>();
        assert_eq!(
            libc::pthread_setaffinity_np(thread, size, &raw const cpus),
            0
        );
        assert_eq!(libc::pthread_getaffinity_np(thread, size, &raw mut got), 0);
        assert!(libc::CPU_EQUAL(&cpus, &got));

        assert_eq!(libc::pthread_kill(thread, 0), 0);
    }
    drop(open);
    assert!(handle.join().unwrap());
}

#[test]
fn pthread_kill_to_an_ended_thread_is_harmless() {
    for _ in 0..rounds(500) {
        let handle = nptl::spawn(|| ()).unwrap();
        let kill = || {
            // SAFETY: the handle exists, so the pthread_t is valid.
            let answer = unsafe { libc::pthread_kill(handle.as_pthread_t(), 0) };
            assert!([0, libc::ESRCH].contains(&answer), "{answer}");
        };
        while !handle.is_finished() {
            kill();
        }
        kill();
        handle.join().unwrap();
    }
}

#[test]
fn random_numbers_of_two_threads_are_never_the_same() {
    fn draw(count: usize) -> Vec<u64> {
        let one = || {
            let mut bytes = [0; 8];
            // SAFETY: a valid buffer of that length.
            let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), 8, 0) };
            assert_eq!(got, 8);
            u64::from_ne_bytes(bytes)
        };
        (0..count).map(|_| one()).collect()
    }
    let (cache, other) = (private_cache(), private_cache());
    let mut seen = HashSet::new();
    for round in 0..4 {
        let handles: Vec<_> = (0..8)
            .map(|_| {
                nptl::Builder::new()
                    .stack_cache(&cache)
                    .spawn(|| draw(100))
                    .unwrap()
            })
            .collect();
        for number in handles
            .into_iter()
            .flat_map(|handle| handle.join().unwrap())
        {
            assert!(seen.insert(number), "drawn twice");
        }
        // The blocks lose their memory; what hangs off them goes on to fresh ones, beside other threads'.
        if round == 1 {
            cache.clear();
            let handle = nptl::Builder::new()
                .stack_cache(&other)
                .spawn(|| draw(100))
                .unwrap();
            let numbers = handle.join().unwrap();
            assert!(
                numbers.into_iter().all(|number| seen.insert(number)),
                "drawn twice"
            );
        }
    }
}

#[test]
fn localhost_is_resolved_in_many_threads() {
    let resolve = || {
        let addresses = ("localhost", 80).to_socket_addrs();
        addresses.map(|mut all| all.all(|address| address.ip().is_loopback()))
    };
    let handles: Vec<_> = (0..8).map(|_| nptl::spawn(resolve).unwrap()).collect();
    for handle in handles {
        assert!(handle.join().unwrap().expect("the name localhost"));
    }
}

#[test]
fn std_thread_current_park_and_channels_work() {
    let (to_us, from_thread) = mpsc::channel();
    let unparked = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&unparked);
    let body = move || {
        let me = std::thread::current();
        to_us.send(me.clone()).unwrap();
        while !seen.load(Ordering::Acquire) {
            std::thread::park();
        }
        me.id()
    };
    let threads = [
        nptl::spawn(body.clone()).unwrap(),
        nptl::spawn(body).unwrap(),
    ];
    let parked = [from_thread.recv().unwrap(), from_thread.recv().unwrap()];
    assert_ne!(parked[0].id(), parked[1].id());
    unparked.store(true, Ordering::Release);
    parked.iter().for_each(|thread| thread.unpark());
    let ids: HashSet<_> = threads.map(|handle| handle.join().unwrap()).into();
    assert_eq!(ids, parked.iter().map(|thread| thread.id()).collect());
    assert!(!ids.contains(&std::thread::current().id()));
    // Both senders are gone with their threads.
    assert!(from_thread.recv().is_err());
}

#[test]
fn lines_printed_by_many_threads_arrive_whole() {
    let name = "own_state::lines_printed_by_many_threads_arrive_whole";
    if case().is_some() {
        // Behind the harness's "test ... ", which is no whole line.
        println!();
        nptl::scope(|scope| {
            for thread in 0..8 {
                scope
                    .spawn(move || (0..100).for_each(|line| println!("line {thread}.{line} end")))
                    .unwrap();
            }
        });
        return;
    }
    let output = or_skip!(child(name, "run").run()).success();
    let lines: HashSet<_> = output
        .stdout
        .lines()
        .filter(|line| line.starts_with("line ") && line.ends_with(" end"))
        .collect();
    assert_eq!(lines.len(), 800, "{output}");
}

#[test]
fn each_thread_has_its_own_robust_list() {
    fn robust_list() -> (usize, usize) {
        let (mut head, mut length) = (0_usize, 0_usize);
        // SAFETY: valid places for both results.
        let answer =
            unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut length) };
        assert_eq!(answer, 0);
        // SAFETY: no preconditions. From the start of the descriptor, the same in every thread.
        (head - unsafe { libc::pthread_self() } as usize, length)
    }
    assert_eq!(
        nptl::spawn(robust_list).unwrap().join().unwrap(),
        robust_list()
    );
}
