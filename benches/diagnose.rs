//! What a refusal costs its caller, analysis included, by cause. Each is a real one, met again and again by
//! `RetryPolicy::never`, so that no waiting is measured.

use criterion::{Criterion, criterion_group, criterion_main};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nptl::diagnose::CauseKind;
use nptl::{Builder, RetryPolicy};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use std::hint::black_box;

const STACK: usize = 64 << 20;

/// Measures a refusal, if it is refused here, and for the cause that is meant.
fn refusal(c: &mut Criterion, kind: CauseKind) {
    let spawn = || {
        Builder::new()
            .stack_size(STACK)
            .retry(RetryPolicy::never())
            .spawn(|| ())
    };
    match spawn() {
        Err(error) if error.cause().kind() == kind => {}
        other => return println!("skipped: {kind}: {other:?}"),
    }
    c.bench_function(&format!("refusal/{kind:?}"), |b| {
        b.iter(|| black_box(spawn().map(drop)).is_err())
    });
}

fn with_limit(c: &mut Criterion, resource: Resource, kind: CauseKind) {
    let Ok((soft, hard)) = getrlimit(resource) else {
        return println!("skipped: {kind}: no such limit");
    };
    // Room for what the bench itself needs, but not for the stack.
    let headroom = nptl::headroom();
    let limit = headroom.limits().iter().find(|limit| limit.cause == kind);
    let in_use = limit.and_then(|limit| limit.in_use).unwrap_or(0);
    if setrlimit(resource, in_use + STACK as u64 / 2, hard).is_ok() {
        refusal(c, kind);
    }
    setrlimit(resource, soft, hard).expect("the limit that was there");
}

fn diagnose(c: &mut Criterion) {
    // The calibration.
    nptl::spawn(|| ())
        .expect("a thread")
        .join()
        .expect("its end");
    with_limit(c, Resource::RLIMIT_AS, CauseKind::AddressSpace);
    with_limit(c, Resource::RLIMIT_DATA, CauseKind::DataSegment);
    // Last: a filter cannot be taken away again.
    let eagain = SeccompAction::Errno(libc::EAGAIN as u32);
    let rules = [(libc::SYS_clone3, Vec::new())].into_iter().collect();
    let arch = std::env::consts::ARCH.try_into().expect("a known machine");
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, eagain, arch);
    let program: BpfProgram = filter
        .and_then(TryInto::try_into)
        .expect("a filter of one rule");
    match seccompiler::apply_filter(&program) {
        Ok(()) => refusal(c, CauseKind::Seccomp),
        Err(error) => println!("skipped: no filter: {error}"),
    }
}

criterion_group!(benches, diagnose);
criterion_main!(benches);
