//! Virtual machines that share a small pid space: each process creates its vCPU threads and a crowd of workers,
//! and nothing about the last one explains why it gets no more.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memmap2::MmapMut;
use nix::errno::Errno;
use nptl::diagnose::{CauseKind, PidLevel};
use nptl::{Builder, Cause, Certainty, JoinHandle, SpawnError, Step, diagnose};

use super::ask::{
    Asker, Expected, Right, other_cause, reports, same, tell_answer, tell_failure, tell_granted,
    tell_note,
};
use super::{Need, Scenario, privileged, write};
use support::{StartedChild, report};

pub(super) const SCENARIOS: &[Scenario] = &[Scenario {
    name: NAME,
    what: "seven virtual machines share a small pid space; then kernel.pid_max is raised",
    needs: &[Need::UserNamespace, Need::Kernel6_14, Need::KvmIfThere],
    sandbox: |child| Ok(privileged(child)?.pid_namespace(Some(PID_MAX))),
    provoke: virtual_machines,
}];

const NAME: &str = "virtual-machines";
const PATH: &str = "/proc/sys/kernel/pid_max";
const MACHINES: usize = 7;
const VCPUS: usize = 2;
const WORKERS: usize = 44;
const STACK: usize = 128 << 10;

/// Enough for six machines. After its first wrap the kernel gives out no number below 300, so that the seventh
/// finds fewer than it has workers.
const PID_MAX: u32 = 330;
const PLENTY: u32 = 4096;

/// What a machine's process says when it has all its threads, and when it was refused one.
const RUNNING: &str = "@@settled=running";
const REFUSED: &str = "@@settled=refused";

fn virtual_machines(ask: &mut Asker<'_>) -> Result<(), String> {
    let mut machines: Vec<StartedChild> = Vec::new();
    let mut refused = None;
    for number in 1..=MACHINES {
        let child = (ask.start)(&format!("{NAME}/{number}"));
        let mut machine = child.time_limit(Duration::from_secs(60)).spawn()?;
        machine.wait_for("@@settled=");
        let stopped = machine.said(REFUSED);
        machines.push(machine);
        if stopped {
            refused = Some(number);
            break;
        }
    }
    match refused {
        Some(MACHINES) => {}
        Some(number) => tell_failure(&format!("machine {number} was refused a thread already")),
        None => tell_failure("no machine was refused a thread"),
    }
    write(PATH, PLENTY)?;
    let last = machines.last_mut().ok_or("no machine")?;
    last.send("go on");
    if !last.wait_for(RUNNING) {
        tell_failure("with more numbers the last machine does not run either");
    }
    let all = machines.iter().all(|machine| machine.said(RUNNING));
    tell_note(format_args!(
        "kernel.pid_max of the namespace raised from {PID_MAX} to {PLENTY}: {} machines run",
        if all { "all" } else { "not all" }
    ));
    for machine in &mut machines {
        machine.send("end");
    }
    for machine in machines {
        let output = machine.finish();
        if !output.status.success() || output.get("ended") != Some("well") {
            tell_failure(&format!("a machine did not end well: {output}"));
        }
        // They stand below this process; what they say is for the one above.
        for key in ["answer", "pthread_create", "std::thread", "note", "failed"] {
            for text in output.all(key) {
                report(key, text);
            }
        }
    }
    tell_granted(0);
    Ok(())
}

/// Where all threads of a machine wait for its end.
#[derive(Default)]
struct MachineEnd {
    over: Mutex<bool>,
    changed: Condvar,
}

impl MachineEnd {
    fn wait(&self) {
        let mut over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        while !*over {
            over = self
                .changed
                .wait(over)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn come(&self) {
        *self.over.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
}

/// A virtual machine with some memory and a program in it.
struct GuestProgram {
    _vm: VmFd,
    /// The guest's memory outlives its vCPUs.
    _memory: MmapMut,
}

/// 16-bit code: writes a byte to a port, and halts.
const PROGRAM: &[u8] = &[
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, 0x21, // mov al, '!'
    0xee, // out dx, al
    0xf4, // hlt
];
const PROGRAM_ADDRESS: u64 = 0x1000;

fn virtual_machine() -> Result<(GuestProgram, Vec<VcpuFd>), String> {
    let io = |error: kvm_ioctls::Error| error.to_string();
    let kvm = Kvm::new().map_err(|error| format!("/dev/kvm: {error}"))?;
    let vm = kvm.create_vm().map_err(io)?;
    let mut memory = MmapMut::map_anon(0x4000).map_err(|error| error.to_string())?;
    memory[..PROGRAM.len()].copy_from_slice(PROGRAM);
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: PROGRAM_ADDRESS,
        memory_size: memory.len() as u64,
        userspace_addr: memory.as_ptr() as u64,
    };
    // SAFETY: the range is mapped for as long as the machine: `GuestProgram` holds both.
    unsafe { vm.set_user_memory_region(region) }.map_err(io)?;
    let vcpus = (0..VCPUS as u64).map(|number| {
        let vcpu = vm.create_vcpu(number)?;
        let mut special = vcpu.get_sregs()?;
        (special.cs.base, special.cs.selector) = (0, 0);
        vcpu.set_sregs(&special)?;
        let mut registers = vcpu.get_regs()?;
        (registers.rip, registers.rflags) = (PROGRAM_ADDRESS, 2);
        vcpu.set_regs(&registers)?;
        Ok(vcpu)
    });
    let vcpus = vcpus.collect::<Result<Vec<_>, _>>().map_err(io)?;
    let kernel = GuestProgram {
        _vm: vm,
        _memory: memory,
    };
    Ok((kernel, vcpus))
}

/// What a vCPU thread does: runs the guest until it halts.
fn run_guest(mut vcpu: VcpuFd, bytes: &AtomicU32) -> Result<(), String> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(_, data)) => {
                bytes.fetch_add(data.len() as u32, Ordering::SeqCst);
            }
            Ok(VcpuExit::Hlt) => return Ok(()),
            Ok(other) => return Err(format!("the guest stopped with {other:?}")),
            Err(error) => return Err(format!("KVM_RUN: {error}")),
        }
    }
}

struct VirtualMachine<'a> {
    number: &'a str,
    rounds: usize,
    threads: Vec<JoinHandle<()>>,
}

impl VirtualMachine<'_> {
    /// A thread, if need be after another thread has made room. The closure of a refused one comes back.
    fn thread(&mut self, name: String, mut work: impl FnOnce() + Send + 'static) {
        loop {
            let builder = Builder::new().name(&*name).stack_size(STACK);
            let error = match builder.spawn_or_return(work) {
                Ok(thread) => return self.threads.push(thread),
                Err(refused) => {
                    let (error, back) = refused.into_parts();
                    work = back;
                    error
                }
            };
            self.refused(&name, &error);
            report("settled", "refused");
            if next_line() != "go on" {
                return;
            }
        }
    }

    fn refused(&self, name: &str, error: &SpawnError) {
        tell_note(format_args!(
            "machine {} has {} threads and gets no {name}",
            self.number,
            self.threads.len()
        ));
        tell_answer(error, pid_numbers(error));
        let start = |_: &str| unreachable!("nothing is started here");
        let mut ask = Asker::new(self.rounds.saturating_sub(1), &start);
        ask.ask();
        ask.tell(Right::Refused, pid_numbers);
    }
}

fn pid_numbers(error: &SpawnError) -> Result<(), String> {
    let expected = Expected {
        step: Step::Clone,
        errno: Errno::EAGAIN,
        kind: CauseKind::PidNumbers,
        certainty: &[Certainty::Proven],
    };
    expected.judge(error, |cause| match *cause {
        Cause::PidNumbers(diagnose::PidNumbers {
            level,
            pid_max,
            sampled,
            free,
            ..
        }) => {
            same("the level", level, PidLevel::Own)?;
            same("kernel.pid_max", pid_max, Some(PID_MAX.into()))?;
            same("having looked at numbers", sampled > 0, true)?;
            same("the free numbers", free, 0)
        }
        ref other => other_cause(other),
    })?;
    reports(
        error,
        &[
            &format_args!("/proc/sys/kernel/pid_max: {PID_MAX}\n"),
            &"sysctl kernel.pid_max=N inside this pid namespace",
        ],
    )
}

fn next_line() -> String {
    let mut line = String::new();
    let _ = std::io::stdin().read_line(&mut line);
    line.trim().to_owned()
}

/// The process of one machine: like QEMU, a process with a thread for each vCPU and many more.
pub(super) fn play(number: &str, rounds: usize) {
    let end = Arc::new(MachineEnd::default());
    let bytes = Arc::new(AtomicU32::new(0));
    let mut machine = VirtualMachine {
        number,
        rounds,
        threads: Vec::new(),
    };
    let (kernel, vcpus) = match virtual_machine() {
        Ok((kernel, vcpus)) => (Some(kernel), vcpus.into_iter().map(Some).collect()),
        Err(why) => {
            if number == "1" {
                tell_note(format_args!("plain threads in place of vCPUs: {why}"));
            }
            (None, (0..VCPUS).map(|_| None).collect::<Vec<_>>())
        }
    };
    for (index, vcpu) in vcpus.into_iter().enumerate() {
        let (end, bytes) = (Arc::clone(&end), Arc::clone(&bytes));
        machine.thread(format!("vcpu{index}"), move || {
            if let Some(vcpu) = vcpu
                && let Err(why) = run_guest(vcpu, &bytes)
            {
                tell_failure(&why);
            }
            end.wait();
        });
    }
    // Before the numbers are used up: the first KVM_RUN of a machine makes a thread in the kernel, and is
    // refused with EAGAIN without one.
    if kernel.is_some() {
        let deadline = Instant::now() + Duration::from_secs(10);
        while bytes.load(Ordering::SeqCst) < VCPUS as u32 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        let written = bytes.load(Ordering::SeqCst);
        if written < VCPUS as u32 {
            tell_failure(&format!("only {written} of {VCPUS} vCPUs ran their guest"));
        } else if number == "1" {
            tell_note(format_args!(
                "{MACHINES} KVM machines of {VCPUS} vCPUs, which have run their guest, and {WORKERS} workers"
            ));
        }
    }
    for index in 0..WORKERS {
        let end = Arc::clone(&end);
        machine.thread(format!("worker{index}"), move || end.wait());
    }
    report("settled", "running");
    let _ = next_line();
    end.come();
    let count = machine.threads.len();
    let ended = machine.threads.into_iter().map(JoinHandle::join);
    let ended = ended.filter(Result::is_ok).count();
    if (count, ended) != (VCPUS + WORKERS, VCPUS + WORKERS) {
        tell_failure(&format!("{ended} of {count} threads ended well"));
    }
    report("ended", "well");
}
