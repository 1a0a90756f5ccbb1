//! The machine: some memory with a program in it, and vCPUs that run it.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memmap2::MmapMut;
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

/// 16-bit code for 0x1000: writes its letter to the serial port, computes until the host continues it, writes it again, halts.
const PROGRAM: [u8; 13] = [
    0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xee, //             out dx, al
    0x80, 0x3e, 0x00, 0x50, 0x00, // again: cmp byte [0x5000], 0
    0x74, 0xf9, //       je again
    0xee, //             out dx, al
    0xf4, //             hlt
];
const ENTRY: u64 = 0x1000;
const LET_GO: usize = 0x5000;
const MEMORY: usize = 64 << 10;
const SERIAL_PORT: u16 = 0x3f8;

/// Shared by the vCPU threads. Its fields are in the order in which they must go.
pub struct Machine {
    vm: VmFd,
    memory: MmapMut,
    serial: [AtomicU8; 256],
    written: AtomicU32,
}

/// Why a vCPU is back from the guest.
pub enum Exit {
    /// A signal came.
    Kicked,
    /// It goes on at once.
    Served,
    Halted,
}

impl Machine {
    pub fn new(kvm: &Kvm) -> io::Result<Machine> {
        let vm = kvm.create_vm().map_err(of_kvm)?;
        let mut memory = MmapMut::map_anon(MEMORY)?;
        let entry = ENTRY as usize;
        memory[entry..entry + PROGRAM.len()].copy_from_slice(&PROGRAM);
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: memory.as_ptr() as u64,
        };
        // SAFETY: the memory is mapped for as long as the VM: it comes after it in the structure.
        unsafe { vm.set_user_memory_region(region) }.map_err(of_kvm)?;
        Ok(Machine {
            vm,
            memory,
            serial: [const { AtomicU8::new(0) }; 256],
            written: AtomicU32::new(0),
        })
    }

    pub fn vcpu(&self, number: u8) -> io::Result<VcpuFd> {
        let vcpu = self.vm.create_vcpu(number.into()).map_err(of_kvm)?;
        let mut special = vcpu.get_sregs().map_err(of_kvm)?;
        special.cs.base = 0;
        special.cs.selector = 0;
        vcpu.set_sregs(&special).map_err(of_kvm)?;
        let mut registers = vcpu.get_regs().map_err(of_kvm)?;
        registers.rip = ENTRY;
        registers.rax = u64::from(b'A' + number);
        registers.rflags = 2;
        vcpu.set_regs(&registers).map_err(of_kvm)?;
        Ok(vcpu)
    }

    /// A first KVM_RUN that enters no guest: what the kernel makes for a machine at that time, a thread among it, is there
    /// afterwards, or refused.
    pub fn warm_up(&self, vcpu: &mut VcpuFd) -> io::Result<()> {
        vcpu.set_kvm_immediate_exit(1);
        let ran = self.run(vcpu).map(drop);
        vcpu.set_kvm_immediate_exit(0);
        ran
    }

    /// Runs guest instructions until the vCPU exits.
    pub fn run(&self, vcpu: &mut VcpuFd) -> io::Result<Exit> {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(SERIAL_PORT, bytes)) => {
                for byte in bytes {
                    let at = self.written.fetch_add(1, Ordering::Relaxed) as usize;
                    if let Some(place) = self.serial.get(at) {
                        place.store(*byte, Ordering::Release);
                    }
                }
                Ok(Exit::Served)
            }
            Ok(VcpuExit::Hlt) => Ok(Exit::Halted),
            Ok(VcpuExit::Intr) => Ok(Exit::Kicked),
            Ok(other) => Err(io::Error::other(format!(
                "an exit that no program here makes: {other:?}"
            ))),
            Err(error) if error.errno() == libc::EINTR => Ok(Exit::Kicked),
            Err(error) => Err(of_kvm(error)),
        }
    }

    /// What the guest has written to its serial port.
    pub fn serial(&self) -> String {
        let bytes = self.serial.iter().map(|byte| byte.load(Ordering::Acquire));
        bytes
            .take_while(|byte| *byte != 0)
            .map(char::from)
            .collect()
    }

    /// The guest's programs come to their end.
    pub fn let_go(&self) {
        // SAFETY: inside the memory; the guest and this thread see it as one atomic byte.
        let flag = unsafe { AtomicU8::from_ptr(self.memory.as_ptr().cast_mut().add(LET_GO)) };
        flag.store(1, Ordering::Release);
    }
}

fn of_kvm(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}
