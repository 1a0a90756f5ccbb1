//! What the system calls cost that a thread of glibc has to make and the floor's child does not:
//! `cargo bench --bench duties`. Each is added to the floor alone, then all of them, interleaved round
//! by round, beside pthread_create and nptl. It says how near to the floor a thread can come that keeps
//! the rules (docs/glibc.md), whatever its user space costs. Then the same without a cache, where
//! each thread also has its mapping made and undone.

use std::io;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use measure::gate::Gate;
use measure::summary::Figure;
use measure::workload::{self, COLD_TUNABLE, Row, Workload};
use measure::{Load, Runner, Subject, floor, pthread, rust};

const PAGE: usize = 4096;
/// What stays resident of a stack: the cache's default.
const KEEP: usize = 32 << 10;
const MADV_GUARD_INSTALL: libc::c_int = 102;
const RSEQ_SIGNATURE: usize = 0x5305_3053;

/// A system call of the child; a number below 0 ends a list.
#[derive(Clone, Copy)]
#[repr(C)]
struct ChildCall {
    number: libc::c_long,
    arguments: [usize; 6],
}

const END: ChildCall = ChildCall {
    number: -1,
    arguments: [0; 6],
};

/// What a child is to do, in the order of its life. The assembly below knows the layout.
#[repr(C)]
struct Plan {
    gate: *const Gate,
    touch: usize,
    before: [ChildCall; 6],
    after: [ChildCall; 4],
}

/// The calls, by bit.
#[derive(Clone, Copy, PartialEq)]
struct Duties(u32);

impl Duties {
    const ROBUST_LIST: u32 = 1;
    const RSEQ: u32 = 2;
    const SIGNAL_STACK: u32 = 4;
    const MASKS_OF_CHILD: u32 = 8;
    const DISCARD: u32 = 16;
    const MASKS_OF_CREATOR: u32 = 32;
    const DISCARD_AT_JOIN: u32 = 64;
    const ALL: u32 = 63;
    /// The floor with a mapping of its own for each child, which is unmapped after it.
    const MAPPING: u32 = 128;
    const GUARD: u32 = 256;
    /// The first touch of the stack's topmost page, below the one that the tid word is in.
    const TOUCH: u32 = 512;
    const FRESH: u32 = Self::MAPPING | Self::GUARD | Self::TOUCH;
    /// Ending threads that discard at once pay for each other (see `DISCARDS` in src/stack/mod.rs).
    const ALL_BUT_AT_JOIN: u32 = Self::ALL & !Self::DISCARD | Self::DISCARD_AT_JOIN;

    fn has(self, bit: u32) -> bool {
        self.0 & bit != 0
    }
}

const SUBJECTS: [(&str, Duties); 10] = [
    ("floor", Duties(0)),
    ("+ set_robust_list", Duties(Duties::ROBUST_LIST)),
    ("+ rseq", Duties(Duties::RSEQ)),
    ("+ sigaltstack", Duties(Duties::SIGNAL_STACK)),
    ("+ child's 2 rt_sigprocmask", Duties(Duties::MASKS_OF_CHILD)),
    ("+ madvise(DONTNEED)", Duties(Duties::DISCARD)),
    ("+ the same by the joiner", Duties(Duties::DISCARD_AT_JOIN)),
    (
        "+ creator's 2 rt_sigprocmask",
        Duties(Duties::MASKS_OF_CREATOR),
    ),
    ("+ all, madvise at the end", Duties(Duties::ALL)),
    (
        "+ all, madvise by the joiner",
        Duties(Duties::ALL_BUT_AT_JOIN),
    ),
];

const COLD_SUBJECTS: [(&str, Duties); 5] = [
    ("floor", Duties(0)),
    ("+ mmap, munmap", Duties(Duties::MAPPING)),
    ("+ guard", Duties(Duties::MAPPING | Duties::GUARD)),
    ("+ first touch", Duties(Duties::FRESH)),
    ("+ all of the above", Duties(Duties::FRESH | Duties::ALL)),
];

/// A mapping as nptl's, guard and stack, with a last page for what libc keeps in the block.
struct DutyStack {
    base: usize,
    length: usize,
    plan: Box<Plan>,
}

// SAFETY: a slot is memory with one owner; the kernel's only write to it is the atomic tid word.
unsafe impl Send for DutyStack {}

impl DutyStack {
    fn new(stack_bytes: usize, duties: Duties) -> io::Result<DutyStack> {
        let warm = !duties.has(Duties::MAPPING);
        let length = PAGE + stack_bytes + PAGE;
        // SAFETY: a new mapping, of which the guard is never touched.
        let base = unsafe {
            let base = libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK,
                -1,
                0,
            );
            if base == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            // Where the kernel has no such guards, there is none.
            if warm || duties.has(Duties::GUARD) {
                libc::madvise(base, PAGE, MADV_GUARD_INSTALL);
            }
            base as usize
        };
        let plan = Box::new(Plan {
            gate: std::ptr::null(),
            touch: 0,
            before: [END; 6],
            after: [END; 4],
        });
        let slot = DutyStack { base, length, plan };
        if !warm {
            return Ok(slot);
        }
        for page in (slot.page() - KEEP..=slot.page()).step_by(PAGE) {
            // SAFETY: inside the mapping, above the guard.
            unsafe { (page as *mut u8).write_volatile(0) };
        }
        Ok(slot)
    }

    /// The last page: tid word, robust list head, rseq area, `stack_t`, signal set, thread pointer.
    fn page(&self) -> usize {
        self.base + self.length - PAGE
    }

    fn tid(&self) -> *mut u32 {
        self.page() as *mut u32
    }

    /// What a thread may have used and does not keep: address and length.
    fn discarded(&self) -> (usize, usize) {
        let bottom = self.base + PAGE;
        (bottom, self.page() - KEEP - bottom)
    }

    /// Fills in the plan of the next child.
    fn prepare(&mut self, duties: Duties, gate: *const Gate) {
        let page = self.page();
        let (robust, rseq, signal_stack, set) = (page + 64, page + 128, page + 256, page + 320);
        let bottom = self.base + PAGE;
        // SAFETY: places in the slot's own page, which no child uses now.
        unsafe {
            (robust as *mut [usize; 3]).write([robust, 0_usize.wrapping_sub(32), 0]);
            (rseq as *mut [u32; 8]).write([0, u32::MAX, 0, 0, 0, 0, 0, 0]);
            (signal_stack as *mut libc::stack_t).write(libc::stack_t {
                ss_sp: bottom as *mut libc::c_void,
                ss_flags: 0,
                ss_size: 16 << 10,
            });
            (set as *mut u64).write(0);
        }
        let call =
            |bit, number, arguments| duties.has(bit).then_some(ChildCall { number, arguments });
        let mask = [libc::SIG_SETMASK as usize, set, 0, 8, 0, 0];
        let before = [
            call(
                Duties::ROBUST_LIST,
                libc::SYS_set_robust_list,
                [robust, 24, 0, 0, 0, 0],
            ),
            call(
                Duties::RSEQ,
                libc::SYS_rseq,
                [rseq, 32, 0, RSEQ_SIGNATURE, 0, 0],
            ),
            call(
                Duties::SIGNAL_STACK,
                libc::SYS_sigaltstack,
                [signal_stack, 0, 0, 0, 0, 0],
            ),
            call(Duties::MASKS_OF_CHILD, libc::SYS_rt_sigprocmask, mask),
        ];
        let (start, length) = self.discarded();
        let discard = [start, length, libc::MADV_DONTNEED as usize, 0, 0, 0];
        let after = [
            call(Duties::MASKS_OF_CHILD, libc::SYS_rt_sigprocmask, mask),
            call(Duties::DISCARD, libc::SYS_madvise, discard),
        ];
        fn fill(list: &mut [ChildCall], calls: &[Option<ChildCall>]) {
            list.fill(END);
            for (to, from) in list.iter_mut().zip(calls.iter().flatten()) {
                *to = *from;
            }
        }
        self.plan.gate = gate;
        self.plan.touch = duties.has(Duties::TOUCH).into();
        fill(&mut self.plan.before, &before);
        fill(&mut self.plan.after, &after);
    }

    fn wait_for_exit(&self) {
        loop {
            // SAFETY: the word lives in the slot; the kernel clears it atomically.
            let tid = unsafe { std::sync::atomic::AtomicU32::from_ptr(self.tid()) }
                .load(std::sync::atomic::Ordering::Acquire);
            if tid == 0 {
                return;
            }
            // SAFETY: a wait has no other effect than to block.
            unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    self.tid(),
                    libc::FUTEX_WAIT,
                    tid,
                    std::ptr::null::<libc::timespec>(),
                );
            }
        }
    }
}

impl Drop for DutyStack {
    fn drop(&mut self) {
        self.wait_for_exit();
        // SAFETY: mapped in `new`, and no child uses it any more.
        unsafe { libc::munmap(self.base as *mut libc::c_void, self.length) };
    }
}

/// The floor with duties.
struct Dutiful {
    name: &'static str,
    duties: Duties,
    stack_bytes: usize,
    ready: Mutex<Vec<DutyStack>>,
}

/// rt_sigprocmask(2), without libc's filtering of its own signals.
fn set_mask(mask: u64) -> u64 {
    let mut old = 0_u64;
    // SAFETY: both sets are eight bytes; the mask is put back by the caller.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const mask,
            &raw mut old,
            8,
        );
    }
    old
}

impl Subject for Dutiful {
    type Handle = DutyStack;

    fn name(&self) -> &'static str {
        self.name
    }

    fn start(&self, body: Load) -> io::Result<DutyStack> {
        let gate = match body {
            Load::Empty => std::ptr::null(),
            Load::Park(gate) => std::ptr::from_ref(gate),
            Load::Heap => return Err(io::ErrorKind::Unsupported.into()),
        };
        let slot = self.ready.lock().expect("no panic before").pop();
        let mut slot = match slot {
            Some(slot) => slot,
            None => DutyStack::new(self.stack_bytes, self.duties)?,
        };
        slot.prepare(self.duties, gate);
        let masks = self.duties.has(Duties::MASKS_OF_CREATOR);
        // All but glibc's own two.
        let old = masks.then(|| set_mask(!(3 << 31)));
        // SAFETY: the slot outlives the child (`DutyStack::drop` waits for it), and no other child uses it.
        let tid = unsafe {
            let page = slot.page();
            clone_child(
                floor::FLAGS,
                page as *mut u8,
                slot.tid(),
                (page + PAGE / 2) as *mut u8,
                &raw const *slot.plan,
            )
        };
        if let Some(old) = old {
            set_mask(old);
        }
        match i32::try_from(-tid) {
            Ok(errno) if errno > 0 => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(slot),
        }
    }

    fn join(&self, slot: DutyStack) {
        slot.wait_for_exit();
        if self.duties.has(Duties::DISCARD_AT_JOIN) {
            let (start, length) = slot.discarded();
            // SAFETY: the stack of a child that is gone.
            unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) };
        }
        if !self.duties.has(Duties::MAPPING) {
            self.ready.lock().expect("no panic before").push(slot);
        }
    }
}

/// Returns the child's tid, or a negated errno. The child makes the calls of its plan and exits.
///
/// # Safety
/// All pointers stay valid and unused by others until the kernel has cleared `*tid`. The child has no
/// usable thread-local storage: no signal handler may run in it.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn clone_child(
    flags: libc::c_int,
    stack: *mut u8,
    tid: *mut u32,
    thread_pointer: *mut u8,
    plan: *const Plan,
) -> libc::c_long {
    std::arch::naked_asm!(
        "mov r9, r8",            // plan: a register that syscall keeps, for the child
        "mov r8, rcx",           // tls
        "mov r10, rdx",          // child_tid: the same word
        "mov eax, {clone}",
        "syscall",
        "test eax, eax",
        "jz 2f",
        "ret",
        "2:",                    // the child, on its own stack, with nothing on it
        "xor ebp, ebp",
        "mov rbx, r9",           // rbx: the plan; r12: the next call
        "cmp qword ptr [rbx + {touch}], 0",
        "je 1f",
        "mov qword ptr [rsp - 64], 0",
        "1:",
        "lea r12, [rbx + {before}]",
        "call 7f",
        "mov r13, [rbx]",
        "test r13, r13",
        "jz 4f",
        "lock inc dword ptr [r13 + 4]",
        "3:",
        "cmp dword ptr [r13], 0",
        "jne 4f",
        "mov eax, {futex}",
        "mov rdi, r13",
        "mov esi, {wait}",
        "xor edx, edx",          // while the gate is closed
        "xor r10d, r10d",        // no timeout
        "syscall",
        "jmp 3b",
        "4:",
        "lea r12, [rbx + {after}]",
        "call 7f",
        "xor edi, edi",
        "mov eax, {exit}",
        "syscall",
        "ud2",
        "7:",                    // the calls of a list
        "mov rax, [r12]",
        "test rax, rax",
        "js 8f",
        "mov rdi, [r12 + 8]",
        "mov rsi, [r12 + 16]",
        "mov rdx, [r12 + 24]",
        "mov r10, [r12 + 32]",
        "mov r8, [r12 + 40]",
        "mov r9, [r12 + 48]",
        "syscall",
        "add r12, {size}",
        "jmp 7b",
        "8:",
        "ret",
        clone = const libc::SYS_clone,
        futex = const libc::SYS_futex,
        wait = const libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
        exit = const libc::SYS_exit,
        touch = const std::mem::offset_of!(Plan, touch),
        before = const std::mem::offset_of!(Plan, before),
        after = const std::mem::offset_of!(Plan, after),
        size = const size_of::<ChildCall>(),
    )
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn clone_child(
    _: libc::c_int,
    _: *mut u8,
    _: *mut u32,
    _: *mut u8,
    _: *const Plan,
) -> libc::c_long {
    -libc::c_long::from(libc::ENOSYS)
}

fn measure_row(row: &Row) -> io::Result<()> {
    let mut subjects: Vec<Box<dyn Runner>> = Vec::new();
    let cold = row.workload == Workload::Cold;
    let list: &[_] = if cold { &COLD_SUBJECTS } else { &SUBJECTS };
    for &(name, duties) in list {
        subjects.push(Box::new(Dutiful {
            name,
            duties,
            stack_bytes: row.stack_bytes,
            ready: Mutex::new(Vec::new()),
        }));
    }
    subjects.push(Box::new(pthread::Pthread::new(row.stack_bytes)?));
    subjects.push(Box::new(match cold {
        true => rust::Nptl::cold(row.stack_bytes),
        false => rust::Nptl::new(row.stack_bytes),
    }));

    let mut samples = vec![Vec::with_capacity(row.rounds); subjects.len()];
    for subject in &subjects {
        subject.round(row, row.iterations)?;
    }
    for round in 0..row.rounds {
        for turn in 0..subjects.len() {
            let index = (round + turn) % subjects.len();
            let time: Duration = subjects[index].round(row, row.iterations)?;
            let threads = row.iterations as f64 * row.threads_per_iteration() as f64;
            samples[index].push(time.as_nanos() as f64 / threads);
        }
    }
    println!(
        "{}: µs a thread, median [p10 p90], times the floor",
        row.label()
    );
    let figures: Vec<Figure> = subjects
        .iter()
        .zip(samples)
        .filter_map(|(subject, samples)| Figure::new(row, subject.name(), samples))
        .collect();
    let floor = figures.first().map_or(1.0, |figure| figure.median_ns);
    for figure in &figures {
        let [median, p10, p90] = [figure.median_ns, figure.p10_ns, figure.p90_ns];
        println!(
            "  {:<30} {:6.2} [{:.2} {:.2}]  {:.3}",
            figure.subject,
            median / 1e3,
            p10 / 1e3,
            p90 / 1e3,
            median / floor
        );
    }
    Ok(())
}

fn main() -> io::Result<()> {
    if !floor::AVAILABLE {
        println!("skipped: the child is written in assembly, and not for this architecture");
        return Ok(());
    }
    let (name, value) = COLD_TUNABLE;
    let cold = std::env::var_os(name).is_some_and(|set| set == value);
    for row in workload::rows() {
        if match cold {
            true => row.workload == Workload::Cold,
            false => matches!(row.workload, Workload::Hot | Workload::Burst),
        } {
            measure_row(&row)?;
        }
    }
    if cold {
        return Ok(());
    }
    // glibc reads its tunables once, at start.
    let status = Command::new("/proc/self/exe").env(name, value).status()?;
    if !status.success() {
        return Err(io::Error::other(format!("the cold row: {status}")));
    }
    Ok(())
}
