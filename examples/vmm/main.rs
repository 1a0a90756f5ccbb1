//! A small virtual machine monitor on /dev/kvm, with the threads that a real one has: vCPUs that are created, pinned and
//! filtered behind a start gate, kicked by a real-time signal, paused, resumed, and joined with a time-out.
//!
//! ```text
//! cargo run --example vmm                     four vCPUs
//! cargo run --example vmm -- --vcpus 2 --json
//! cargo run --example vmm -- --fail-at 2      the third vCPU (they count from 0) meets a full pids cgroup
//! cargo run --example vmm -- --fail-at kvm    the thread meets it that KVM starts at the first KVM_RUN (Linux 6.13)
//! ```
//! Exit codes: 0 all went well (with `--fail-at`: it was refused, and no guest instruction ran), 1 it did not, 2 wrong
//! arguments, 77 no /dev/kvm, or with `--fail-at` no cgroup, or a KVM that starts no such thread.

mod guest;

use guest::{Exit, Machine};
use kvm_ioctls::{Kvm, VcpuFd};
use nptl::diagnose::Explanation;
use nptl::seccomp::{self, Phase};
use nptl::{Builder, Cancelled, Cause, JoinHandle, SetupError, StartGate};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use serde_json::json;
use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::{Display, Formatter};
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};
use support::{Cgroup, CgroupDir, inherited_cgroup};

const SKIPPED: u8 = 77;
const KVM_RUN: u64 = 0xae80;
const LONGEST: Duration = Duration::from_secs(10);

struct Options {
    vcpus: u8,
    fail_at: Option<At>,
    json: bool,
}

/// What meets the limit.
#[derive(Clone, Copy, PartialEq)]
enum At {
    Vcpu(u8),
    Kvm,
}

impl At {
    fn parse(text: &str) -> Option<At> {
        match text {
            "kvm" => Some(At::Kvm),
            number => number.parse().map(At::Vcpu).ok(),
        }
    }
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Option<Options> {
        let mut options = Options {
            vcpus: 4,
            fail_at: None,
            json: false,
        };
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--vcpus" => options.vcpus = arguments.next()?.parse().ok()?,
                "--fail-at" => options.fail_at = Some(At::parse(&arguments.next()?)?),
                "--json" => options.json = true,
                _ => return None,
            }
        }
        let fits = (1..=26).contains(&options.vcpus);
        let fails = match options.fail_at {
            Some(At::Vcpu(number)) => number < options.vcpus,
            Some(At::Kvm) | None => true,
        };
        (fits && fails).then_some(options)
    }
}

fn main() -> ExitCode {
    let Some(options) = Options::parse(std::env::args().skip(1)) else {
        eprintln!("usage: vmm [--vcpus 1..26] [--fail-at NUMBER|kvm] [--json]");
        return ExitCode::from(2);
    };
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            eprintln!("no /dev/kvm here: {error}");
            return ExitCode::from(SKIPPED);
        }
    };
    let outcome = match (options.fail_at, support::case()) {
        (None, _) => boot(&options, &kvm).map(|()| ExitCode::SUCCESS),
        (Some(at), Some(_)) => fail(&options, &kvm, at, &inherited_cgroup(0)),
        (Some(_), None) => return in_a_cgroup(),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// This program again, in a pids cgroup of its own.
fn in_a_cgroup() -> ExitCode {
    let cgroup = match Cgroup::pids() {
        Ok(cgroup) => cgroup,
        Err(why) => {
            eprintln!("no cgroup for --fail-at here: {why}");
            return ExitCode::from(SKIPPED);
        }
    };
    let arguments = std::env::args().skip(1);
    let child = arguments.fold(support::program("refused"), support::Child::arg);
    match child.cgroup(&cgroup).run() {
        Ok(output) => {
            print!("{}", output.stdout);
            eprint!("{}", output.stderr);
            ExitCode::from(
                output
                    .code()
                    .and_then(|code| u8::try_from(code).ok())
                    .unwrap_or(1),
            )
        }
        Err(why) => {
            eprintln!("{why}");
            ExitCode::from(SKIPPED)
        }
    }
}

/// What a vCPU thread reads while it runs.
#[derive(Default)]
struct Control {
    pause: AtomicBool,
    paused: AtomicU32,
}

type Vcpu = JoinHandle<io::Result<u32>>;

/// The thread of one vCPU. Everything that can fail before guest code runs fails here, and leaves no thread.
fn start(
    number: u8,
    machine: &Arc<Machine>,
    control: &Arc<Control>,
    filter: &Arc<BpfProgram>,
    gate: &StartGate,
) -> Result<Vcpu, SetupError<io::Error>> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let (made, filter) = (Arc::clone(machine), Arc::clone(filter));
    let (machine, control) = (Arc::clone(machine), Arc::clone(control));
    Builder::new()
        .name(format!("vcpu {number}"))
        .stack_size(256 << 10)
        .cpu_affinity([usize::from(number) % cpus])
        .publish_std_thread(true)
        .start_gate(gate)
        .spawn_with_setup(
            move || {
                let mut vcpu = made.vcpu(number)?;
                made.warm_up(&mut vcpu).map_err(of_run)?;
                seccompiler::apply_filter(&filter).map_err(io::Error::other)?;
                Ok(vcpu)
            },
            move |vcpu| run(vcpu, &machine, &control),
        )
}

/// The life of a vCPU: how often it was kicked out of the guest.
fn run(mut vcpu: VcpuFd, machine: &Machine, control: &Control) -> io::Result<u32> {
    let mut kicks = 0;
    loop {
        match machine.run(&mut vcpu)? {
            Exit::Halted => return Ok(kicks),
            Exit::Served => {}
            Exit::Kicked => {
                kicks += 1;
                if control.pause.load(Ordering::Acquire) {
                    control.paused.fetch_add(1, Ordering::AcqRel);
                    while control.pause.load(Ordering::Acquire) {
                        std::thread::park();
                    }
                    control.paused.fetch_sub(1, Ordering::AcqRel);
                }
            }
        }
    }
}

/// What a vCPU thread calls behind its filter: the crate's own list, KVM_RUN, park, and the end of the vCPU.
fn filter() -> Result<BpfProgram, Box<dyn Error>> {
    let mut rules = BTreeMap::<i64, Vec<SeccompRule>>::new();
    let mut allow = |number: i64, arguments: &[(u8, u64)]| -> Result<(), Box<dyn Error>> {
        let conditions = arguments.iter().map(|(index, value)| {
            SeccompCondition::new(*index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)
        });
        let conditions = conditions.collect::<Result<Vec<_>, _>>()?;
        match conditions.is_empty() {
            // An empty list of rules allows any arguments.
            true => rules.insert(number, Vec::new()).map_or((), drop),
            false => rules
                .entry(number)
                .or_default()
                .push(SeccompRule::new(conditions)?),
        }
        Ok(())
    };
    for call in seccomp::calls([Phase::Report, Phase::Gate, Phase::End]) {
        let arguments: Vec<_> = call
            .arguments
            .iter()
            .map(|(i, v)| (*i, u64::from(*v)))
            .collect();
        allow(call.number, &arguments)?;
    }
    let park = libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG;
    allow(libc::SYS_futex, &[(1, park as u64)])?;
    allow(libc::SYS_ioctl, &[(1, KVM_RUN)])?;
    // fcntl: std checks what it closes, in a debug build.
    for of_the_end in [libc::SYS_munmap, libc::SYS_close, libc::SYS_fcntl] {
        allow(of_the_end, &[])?;
    }
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let (otherwise, listed) = (SeccompAction::KillProcess, SeccompAction::Allow);
    Ok(SeccompFilter::new(rules, otherwise, listed, arch)?.try_into()?)
}

/// A signal that interrupts KVM_RUN.
fn kick_signal() -> libc::c_int {
    extern "C" fn nothing(_: libc::c_int) {}
    let signal = libc::SIGRTMIN() + 1;
    // SAFETY: a handler that does nothing, without SA_RESTART.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigaction(signal, &raw const action, std::ptr::null_mut());
    }
    signal
}

fn wait_until(
    what: &str,
    mut holds: impl FnMut() -> io::Result<bool>,
) -> Result<(), Box<dyn Error>> {
    let start = Instant::now();
    while !holds()? {
        if start.elapsed() > LONGEST {
            return Err(format!("never came true: {what}").into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn boot(options: &Options, kvm: &Kvm) -> Result<(), Box<dyn Error>> {
    nptl::prepare()?;
    let signal = kick_signal();
    let (machine, control) = (Arc::new(Machine::new(kvm)?), Arc::new(Control::default()));
    let filter = Arc::new(filter()?);
    let begin = Instant::now();
    let gate = StartGate::new();
    let vcpus = (0..options.vcpus)
        .map(|number| start(number, &machine, &control, &filter, &gate))
        .collect::<Result<Vec<_>, _>>()?;
    let created = begin.elapsed();
    let before = machine.serial();
    gate.open();
    let all = usize::from(options.vcpus);
    wait_until("every vCPU runs", || Ok(machine.serial().len() == all))?;

    // Pause: a kick can come just before KVM_RUN and be lost, so it is repeated.
    control.pause.store(true, Ordering::Release);
    wait_until("every vCPU is paused", || {
        for vcpu in &vcpus {
            vcpu.kill(signal)?;
        }
        Ok(control.paused.load(Ordering::Acquire) as usize == all)
    })?;
    let times: Vec<_> = vcpus
        .iter()
        .map(JoinHandle::cpu_time)
        .collect::<Result<_, _>>()?;
    control.pause.store(false, Ordering::Release);
    for vcpu in &vcpus {
        vcpu.thread().ok_or("a published thread")?.unpark();
    }
    machine.let_go();

    let mut threads = Vec::new();
    for (vcpu, time) in vcpus.into_iter().zip(times) {
        let (tid, name) = (vcpu.tid(), vcpu.name().map(str::to_owned));
        let ended = vcpu
            .join_timeout(LONGEST)
            .map_err(|_| "a vCPU did not halt")?;
        let kicks = match ended {
            Ok(kicks) => kicks?,
            Err(_) => return Err("a vCPU panicked".into()),
        };
        threads.push(
            json!({"tid": tid, "name": name, "cpu_us": time.as_micros() as u64, "kicks": kicks}),
        );
    }
    let report = json!({
        "vcpus": threads,
        "created_us": created.as_micros() as u64,
        "serial_before_the_gate": before,
        "serial": machine.serial(),
    });
    if options.json {
        println!("{report:#}");
    } else {
        println!("{all} vCPUs created in {created:.0?}, started together, paused, resumed, halted");
        println!("serial port: {}", machine.serial());
    }
    let good = before.is_empty() && machine.serial().len() == 2 * all;
    good.then_some(())
        .ok_or_else(|| "the serial port has other output than expected".into())
}

/// KVM starts a thread of its own at the first KVM_RUN of a machine, and hands its refusal on. Explained at once and in the
/// thread that was refused: a moment later, or in another thread, there can be room.
fn of_run(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(errno) if errno == libc::EAGAIN || errno == libc::ENOMEM => {
            io::Error::new(error.kind(), Explained(error, nptl::explain(errno)))
        }
        _ => error,
    }
}

#[derive(Debug)]
struct Explained(io::Error, Explanation);

impl Display for Explained {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "KVM_RUN: {}", self.0)
    }
}

impl Error for Explained {}

/// What was refused, and why.
struct RefusedVcpu {
    what: String,
    step: String,
    cause: Cause,
    report: String,
}

impl RefusedVcpu {
    fn new(error: SetupError<io::Error>) -> Result<RefusedVcpu, Box<dyn Error>> {
        let what = error.to_string();
        let failed = match error {
            SetupError::Refused(error) => {
                return Ok(RefusedVcpu {
                    what,
                    step: error.step().to_string(),
                    cause: *error.cause(),
                    report: error.report().to_string(),
                });
            }
            SetupError::Failed(failed) => failed,
            SetupError::Panicked(_) => return Err(what.into()),
        };
        let explained = failed.get_ref().and_then(|inner| inner.downcast_ref());
        let Some(Explained(_, explanation)) = explained else {
            return Err(what.into());
        };
        Ok(RefusedVcpu {
            what,
            step: "KVM_RUN".to_owned(),
            cause: *explanation.cause(),
            report: explanation.report().to_string(),
        })
    }
}

/// A vCPU, or what KVM starts for the first, meets the limit of the cgroup. The ones before it must go without having run.
fn fail(
    options: &Options,
    kvm: &Kvm,
    at: At,
    cgroup: &CgroupDir,
) -> Result<ExitCode, Box<dyn Error>> {
    nptl::prepare()?;
    let (machine, control) = (Arc::new(Machine::new(kvm)?), Arc::new(Control::default()));
    let filter = Arc::new(filter()?);
    let gate = StartGate::new();
    let mut vcpus = Vec::new();
    let mut refused = None;
    for next in 0..options.vcpus {
        match at {
            At::Vcpu(number) if next == number => cgroup.set("pids.max", cgroup.tasks()),
            At::Kvm if next == 0 => cgroup.set("pids.max", cgroup.tasks() + 1),
            _ => {}
        }
        match start(next, &machine, &control, &filter, &gate) {
            Ok(_) if at == At::Kvm => {
                eprintln!("this KVM starts no thread at the first KVM_RUN");
                return Ok(ExitCode::from(SKIPPED));
            }
            Ok(vcpu) => vcpus.push(vcpu),
            Err(error) => {
                refused = Some(RefusedVcpu::new(error)?);
                break;
            }
        }
    }
    let refusal = refused.ok_or("no vCPU was refused")?;
    gate.cancel();
    let created = vcpus.len();
    let cancelled = vcpus
        .into_iter()
        .filter_map(|vcpu| vcpu.join_timeout(LONGEST).ok()?.err())
        .filter(|payload| payload.is::<Cancelled>())
        .count();
    // With the machine goes the thread that KVM has started for it. The kernel shows a thread for a moment after its join.
    let serial = machine.serial();
    drop(machine);
    let tasks = || io::Result::Ok(std::fs::read_dir("/proc/self/task")?.count());
    wait_until("only this thread is left", || Ok(tasks()? == 1))?;
    if options.json {
        let report = json!({
            "refused": refusal.what,
            "step": refusal.step,
            "cause": format!("{:?}", refusal.cause.kind()),
            "created_before": created,
            "cancelled": cancelled,
            "serial": serial,
            "tasks_left": tasks()?,
        });
        println!("{report:#}");
    } else {
        println!("vcpu {created}: {}\n\n{}\n", refusal.what, refusal.report);
        println!("the {created} before it: {cancelled} cancelled at the gate, no thread is left");
        println!("serial port: {serial:?}");
    }
    let before = match at {
        At::Vcpu(number) => number.into(),
        At::Kvm => 0,
    };
    let good = cancelled == created && created == before && serial.is_empty();
    good.then_some(ExitCode::SUCCESS)
        .ok_or_else(|| "guest code ran, or a thread was left".into())
}
