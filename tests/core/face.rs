//! The public face: names and bounds as callers use them, and what they say in cases that std knows, too.

use crate::{rounds, wait_until};
use nptl::{Builder, JoinHandle, ScopedJoinHandle, SpawnError, Step};
use std::any::Any;
use std::hint::black_box;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{TryRecvError, channel};
use std::time::Duration;
use support::deny;

fn text(payload: Box<dyn Any + Send>) -> String {
    let text = payload.downcast_ref::<String>();
    text.expect("a formatted message").clone()
}

/// Starts a thread that gets its own handle, and returns what it makes of it.
fn with_own_handle<T: Send + 'static>(
    body: impl FnOnce(JoinHandle<()>) -> T + Send + 'static,
) -> T {
    let ((give, take), (tell, told)) = (channel(), channel());
    let handle = nptl::spawn(move || tell.send(body(take.recv().unwrap())).unwrap()).unwrap();
    give.send(handle).unwrap();
    let answer = told.recv_timeout(Duration::from_secs(60));
    answer.expect("a thread that waits for its own end")
}

#[test]
fn a_thread_that_joins_itself_panics_with_stds_words() {
    let ((give, take), (tell, told)) = (channel::<std::thread::JoinHandle<()>>(), channel());
    let handle = std::thread::spawn(move || {
        let own = take.recv().unwrap();
        let joined = catch_unwind(AssertUnwindSafe(|| own.join()));
        tell.send(text(joined.unwrap_err())).unwrap();
    });
    give.send(handle).unwrap();
    let stds = told.recv().unwrap();

    let join = |own: JoinHandle<()>| catch_unwind(AssertUnwindSafe(|| own.join()));
    let ours = with_own_handle(move |own| text(join(own).unwrap_err()));
    assert_eq!(ours, stds);
    assert_eq!(
        ours,
        "failed to join thread: Resource deadlock avoided (os error 35)"
    );
}

#[test]
fn a_thread_that_waits_for_itself_in_another_way_gets_its_handle_back_at_once() {
    let ended = with_own_handle(|own| {
        let own = own.try_join().unwrap_err();
        let own = own.join_timeout(Duration::MAX).unwrap_err();
        own.wait_timeout(Duration::MAX) || own.is_finished()
    });
    assert!(!ended);
}

#[test]
fn a_scoped_thread_cannot_join_itself_either() {
    let ours = nptl::scope(|s| {
        let ((give, take), (tell, told)) = (channel::<ScopedJoinHandle<'_, ()>>(), channel());
        let handle = s.spawn(move || {
            let own = take.recv().unwrap().try_join().unwrap_err();
            let joined = catch_unwind(AssertUnwindSafe(|| own.join()));
            tell.send(text(joined.unwrap_err())).unwrap();
        });
        assert!(give.send(handle.unwrap()).is_ok());
        told.recv_timeout(Duration::from_secs(60)).unwrap()
    });
    assert!(ours.contains("Resource deadlock avoided"), "{ours}");
}

#[test]
fn a_wait_that_keeps_the_handle_tells_whether_the_thread_has_ended() {
    for _ in 0..rounds(100) {
        let (end, wait) = channel::<()>();
        let handle = nptl::spawn(move || wait.recv().is_err()).unwrap();
        assert!(!handle.wait_timeout(Duration::ZERO));
        assert!(!handle.wait_timeout(Duration::from_millis(1)));
        drop(end);
        assert!(handle.wait_timeout(Duration::MAX));
        assert!(handle.is_finished() && handle.wait_timeout(Duration::ZERO));
        assert!(handle.join().unwrap());
    }
}

#[test]
fn the_processor_time_of_a_thread_is_its_own_and_ends_with_it() {
    let (end, wait) = channel::<()>();
    let idle = nptl::spawn(move || wait.recv()).unwrap();
    let (stop, stopped) = channel::<()>();
    let busy =
        nptl::spawn(move || while stopped.try_recv() == Err(TryRecvError::Empty) {}).unwrap();
    wait_until("30 ms of processor time", || {
        busy.cpu_time().unwrap() > Duration::from_millis(30)
    });
    assert!(idle.cpu_time().unwrap() < Duration::from_millis(30));
    drop((end, stop));
    assert!(busy.wait_timeout(Duration::MAX) && idle.wait_timeout(Duration::MAX));
    assert_eq!(support::errno(busy.cpu_time()), Some(libc::ESRCH));
    assert_eq!(support::errno(idle.cpu_time()), Some(libc::ESRCH));
}

#[test]
fn only_the_high_water_mark_asks_the_kernel_where_a_stack_is_used() {
    const USED: usize = 200 << 10;
    let (end, wait) = channel::<()>();
    let (tell, told) = channel();
    let handle = Builder::new()
        .stack_size(1 << 20)
        .spawn(move || {
            black_box([1_u8; USED]);
            tell.send(()).unwrap();
            wait.recv()
        })
        .unwrap();
    told.recv().unwrap();
    let (size, used) = (handle.stack().size, handle.stack_high_water_mark().unwrap());
    assert!((USED..size).contains(&used), "{used} of {size}");
    // A filter is its thread's.
    std::thread::scope(|s| {
        s.spawn(|| {
            deny(libc::SYS_mincore, libc::EPERM).install();
            assert_eq!(handle.stack().size, size);
            let refused = support::errno(handle.stack_high_water_mark());
            assert_eq!(refused, Some(libc::EPERM));
        });
    });
    drop(end);
}

#[test]
fn an_errno_that_has_no_name_is_reported_as_the_filter_gave_it() {
    const NAMELESS: i32 = 1234;
    nptl::spawn(|| ()).unwrap().join().unwrap();
    let error: SpawnError = std::thread::spawn(|| {
        deny(libc::SYS_clone3, NAMELESS).install();
        nptl::spawn(|| ()).unwrap_err()
    })
    .join()
    .unwrap();
    assert_eq!(error.step(), Step::Clone);
    assert_eq!(error.errno(), NAMELESS);
    assert_eq!(error.pthread_errno(), NAMELESS);
    assert!(error.to_string().contains("errno=1234"), "{error}");
}
