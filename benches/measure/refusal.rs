//! Which limit stopped a crowd, whichever library started it: the kernel is probed for the two halves of a thread's creation
//! again, apart from each other, memory for a stack and a task.

use std::fmt::Display;
use std::io;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use serde::{Deserialize, Serialize};

use crate::floor::{self, Floor};
use crate::{Load, Subject, proc};

/// Bytes that thread-local storage and a signal stack add to a stack, or more: a stack that is asked for
/// again, to learn why it was refused, must not be smaller than it was.
const BESIDES: usize = 64 * 1024;

/// A refused thread, and why it was refused.
#[derive(Serialize, Deserialize)]
pub struct RefusedThread {
    /// What the subject said.
    pub error: String,
    /// Its errno.
    pub errno: Option<i32>,
    /// The limit, with its value.
    pub verdict: String,
    /// What the verdict rests on, a line each.
    pub evidence: Vec<String>,
}

/// To be called while the crowd stands.
pub fn explain(error: &io::Error, floor: &Floor, stack_bytes: usize) -> RefusedThread {
    let seen = Surroundings::look(floor, stack_bytes + BESIDES);
    RefusedThread {
        error: error.to_string(),
        errno: error.raw_os_error(),
        verdict: seen.verdict(),
        evidence: seen.evidence(),
    }
}

/// A number that was read, or not.
pub fn shown<N: Display>(number: Option<N>) -> String {
    number.map_or("?".to_owned(), |number| number.to_string())
}

/// What a look around found.
struct Surroundings {
    stack_bytes: usize,
    /// A stack alone.
    stack: io::Result<()>,
    /// A task alone.
    task: io::Result<()>,
    /// See [`probe_set_tid`] and [`probe_cgroup`].
    in_allocation: i32,
    after_allocation: i32,
    mappings: usize,
    max_map_count: Option<usize>,
    address_space: Option<usize>,
    rlimit_as: Option<u64>,
    rlimit_nproc: Option<u64>,
    threads: Option<usize>,
    pid_max: Option<usize>,
    tasks: Option<usize>,
    threads_max: Option<usize>,
    cgroups: Vec<(String, usize, usize)>,
}

impl Surroundings {
    fn look(floor: &Floor, stack_bytes: usize) -> Surroundings {
        Surroundings {
            stack_bytes,
            stack: map_stack(stack_bytes),
            task: match floor::AVAILABLE {
                true => floor.start(Load::Empty).map(|child| floor.join(child)),
                false => Err(io::ErrorKind::Unsupported.into()),
            },
            in_allocation: probe_set_tid(),
            after_allocation: probe_cgroup(),
            mappings: proc::mappings(),
            max_map_count: proc::number("/proc/sys/vm/max_map_count"),
            address_space: proc::status("VmSize").map(|kib| kib * 1024),
            rlimit_as: soft_limit(Resource::RLIMIT_AS),
            rlimit_nproc: soft_limit(Resource::RLIMIT_NPROC),
            threads: proc::status("Threads"),
            pid_max: proc::number("/proc/sys/kernel/pid_max"),
            tasks: proc::tasks(),
            threads_max: proc::number("/proc/sys/kernel/threads-max"),
            cgroups: proc::pids_cgroups(),
        }
    }

    fn verdict(&self) -> String {
        match (&self.stack, &self.task) {
            (Err(error), _) => self.refused_stack(error),
            (Ok(()), Err(error)) if error.raw_os_error() == Some(libc::EAGAIN) => {
                self.refused_task()
            }
            (Ok(()), Err(error)) => format!("the task itself: {error}"),
            (Ok(()), Ok(())) => "unknown: both halves work again, so it was transient".to_owned(),
        }
    }

    fn refused_stack(&self, error: &io::Error) -> String {
        // A mapping and its guard need at most two lines more.
        if let Some(max) = self.max_map_count
            && self.mappings + 2 >= max
        {
            return format!(
                "vm.max_map_count = {max}: {} mappings are in use",
                self.mappings
            );
        }
        if let Some((used, max)) = self.address_space.zip(self.rlimit_as)
            && (used + self.stack_bytes) as u64 > max
        {
            return format!("RLIMIT_AS = {max}: {used} bytes are in use");
        }
        format!("memory for a stack, neither vm.max_map_count nor RLIMIT_AS: {error}")
    }

    /// How far a clone gets now shows which of the kernel's checks refused it.
    fn refused_task(&self) -> String {
        match (self.in_allocation, self.after_allocation) {
            (libc::EAGAIN, _) => match self.tasks.zip(self.threads_max) {
                Some((tasks, max)) if tasks >= max => {
                    format!("kernel.threads-max = {max}: {tasks} tasks")
                }
                // What else is checked before is an execve in a sibling, and there is none here.
                _ => format!(
                    "RLIMIT_NPROC = {}, or what a user namespace remembers of it; \
                     kernel.threads-max has room",
                    limit(self.rlimit_nproc)
                ),
            },
            (libc::EINVAL, libc::EAGAIN) => format!(
                "pid numbers: kernel.pid_max = {} here (300 of them reserved once the numbers \
                 have wrapped), unless an outer pid namespace has fewer",
                shown(self.pid_max)
            ),
            (libc::EINVAL, libc::EBADF) => {
                let full = self.cgroups.iter().filter(|(_, tasks, max)| tasks >= max);
                let full: Vec<_> = full
                    .map(|(file, tasks, max)| format!(": {file} = {max}, {tasks} tasks"))
                    .collect();
                format!("pids.max of a cgroup{}", full.concat())
            }
            _ => "unknown: the probes do not show it".to_owned(),
        }
    }

    fn evidence(&self) -> Vec<String> {
        let said = |result: &io::Result<()>| match result {
            Ok(()) => "works".to_owned(),
            Err(error) => error.to_string(),
        };
        let mut lines = vec![
            format!(
                "a stack alone (mmap, mprotect of its guard): {}",
                said(&self.stack)
            ),
            format!(
                "a task alone (raw clone on a ready stack): {}",
                said(&self.task)
            ),
            format!(
                "clone3 that ends inside pid allocation: {}; behind it: {}",
                io::Error::from_raw_os_error(self.in_allocation),
                io::Error::from_raw_os_error(self.after_allocation)
            ),
            format!(
                "mappings: {} of vm.max_map_count {}",
                self.mappings,
                shown(self.max_map_count)
            ),
            format!("threads of this process: {}", shown(self.threads)),
            format!(
                "kernel.pid_max of this pid namespace: {}",
                shown(self.pid_max)
            ),
            format!(
                "tasks on the machine: {} of kernel.threads-max {}",
                shown(self.tasks),
                shown(self.threads_max)
            ),
            format!(
                "RLIMIT_NPROC: {} (CAP_SYS_RESOURCE and root are exempt)",
                limit(self.rlimit_nproc)
            ),
            format!(
                "address space: {} of RLIMIT_AS {} bytes",
                shown(self.address_space),
                limit(self.rlimit_as)
            ),
        ];
        lines.extend(
            self.cgroups
                .iter()
                .map(|(file, tasks, max)| format!("{file}: {tasks} of {max}")),
        );
        if self.cgroups.is_empty() {
            lines.push("no pids cgroup with a limit in sight".to_owned());
        }
        lines
    }
}

/// `None`: unlimited.
fn soft_limit(resource: Resource) -> Option<u64> {
    let (soft, _) = getrlimit(resource).ok()?;
    (soft != RLIM_INFINITY).then_some(soft)
}

fn limit(soft: Option<u64>) -> String {
    soft.map_or("unlimited".to_owned(), |soft| soft.to_string())
}

/// As pthread_create maps a stack: no access, then all but the guard made accessible, which splits
/// the mapping.
fn map_stack(bytes: usize) -> io::Result<()> {
    const GUARD: usize = 4096;
    let length = bytes.next_multiple_of(GUARD) + GUARD;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK;
    // SAFETY: a new mapping at a place that the kernel chooses.
    let mapping =
        unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
    if mapping == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: inside the mapping just made, which only this code has.
    let result = match unsafe {
        libc::mprotect(
            mapping.byte_add(GUARD),
            length - GUARD,
            libc::PROT_READ | libc::PROT_WRITE,
        )
    } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    // SAFETY: as above.
    unsafe { libc::munmap(mapping, length) };
    result
}

/// The errno of a clone3 that asks for thread id 0: EINVAL once all checks before pid allocation
/// have passed.
fn probe_set_tid() -> i32 {
    let zero: libc::pid_t = 0;
    let mut arguments = thread_arguments();
    arguments.set_tid = std::ptr::from_ref(&zero) as u64;
    arguments.set_tid_size = 1;
    probe(&arguments)
}

/// The errno of a clone3 into a cgroup that is no descriptor: EBADF once pid allocation has passed.
fn probe_cgroup() -> i32 {
    /// libc's constant does not fit its type.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut arguments = thread_arguments();
    arguments.flags |= CLONE_INTO_CGROUP;
    arguments.cgroup = i32::MAX as u64;
    probe(&arguments)
}

fn thread_arguments() -> libc::clone_args {
    // SAFETY: plain integers, for which zero is a value.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SYSVSEM
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD;
    arguments.flags = flags as u64;
    arguments
}

fn probe(arguments: &libc::clone_args) -> i32 {
    // SAFETY: the callers ask for what the kernel always refuses, so no task is ever created.
    unsafe { libc::syscall(libc::SYS_clone3, arguments, size_of::<libc::clone_args>()) };
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}
