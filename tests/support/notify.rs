//! System calls of one thread, held in the kernel until another thread has decided about them: refusals
//! that can be switched off again, something done in the very moment of a refusal, and orders of events
//! that no sleep could force.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

/// A system call that waits for its answer.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    id: u64,
    /// The thread that makes it.
    pub tid: i32,
    pub number: libc::c_long,
    pub arguments: [u64; 6],
}

impl Call {
    /// Whether it is an mmap for a stack.
    pub fn maps_a_stack(&self) -> bool {
        self.number == libc::SYS_mmap && self.arguments[3] & libc::MAP_STACK as u64 != 0
    }

    /// Whether it is a madvise with this advice.
    pub fn advises(&self, advice: u64) -> bool {
        self.number == libc::SYS_madvise && self.arguments[2] == advice
    }
}

/// Receives the calls of the threads behind its filter.
#[derive(Debug)]
pub struct Listener(OwnedFd);

/// Puts a filter before the calling thread, and the threads it starts from now on, that holds every call
/// of `syscalls` until the listener's owner, a thread without this filter, has answered it.
pub fn listen(syscalls: &[libc::c_long]) -> Result<Listener, String> {
    const NUMBER_OF_CALL: u32 = 0;
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let mut program = vec![statement(
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        NUMBER_OF_CALL,
    )];
    for (index, &number) in syscalls.iter().enumerate() {
        program.push(libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: u8::try_from(syscalls.len() - index).expect("few calls"),
            jf: 0,
            k: u32::try_from(number).expect("a system call"),
        });
    }
    let give = libc::BPF_RET | libc::BPF_K;
    program.push(statement(give, libc::SECCOMP_RET_ALLOW));
    program.push(statement(give, libc::SECCOMP_RET_USER_NOTIF));
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).expect("a short program"),
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the program is valid for the time of the call.
    let fd = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    match i32::try_from(fd) {
        // SAFETY: a new descriptor that no other code owns.
        Ok(fd) if fd >= 0 => Ok(Listener(unsafe { OwnedFd::from_raw_fd(fd) })),
        _ => Err(format!(
            "no seccomp notifications: {}",
            io::Error::last_os_error()
        )),
    }
}

impl Listener {
    /// The next call. `None` once no thread is behind the filter any more.
    pub fn next(&self) -> Option<Call> {
        loop {
            let mut entry = libc::pollfd {
                fd: self.0.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one valid entry.
            unsafe { libc::poll(&raw mut entry, 1, -1) };
            if entry.revents & libc::POLLIN == 0 && entry.revents != 0 {
                return None;
            }
            // SAFETY: all zeroes, as the kernel demands of the structure.
            let mut seen: libc::seccomp_notif = unsafe { std::mem::zeroed() };
            // SAFETY: `seen` is a valid place for the result. Fails if the caller was killed meanwhile.
            let received = unsafe {
                libc::ioctl(
                    self.0.as_raw_fd(),
                    libc::SECCOMP_IOCTL_NOTIF_RECV,
                    &raw mut seen,
                )
            } == 0;
            if received {
                return Some(Call {
                    id: seen.id,
                    tid: seen.pid.cast_signed(),
                    number: seen.data.nr.into(),
                    arguments: seen.data.args,
                });
            }
        }
    }

    /// The kernel carries the call out.
    pub fn proceed(&self, call: &Call) {
        self.answer(call, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32);
    }

    /// The call fails.
    pub fn refuse(&self, call: &Call, errno: i32) {
        self.answer(call, -errno, 0);
    }

    /// An error only says that the thread has been killed meanwhile.
    fn answer(&self, call: &Call, error: i32, flags: u32) {
        let answer = libc::seccomp_notif_resp {
            id: call.id,
            val: 0,
            error,
            flags,
        };
        // SAFETY: a valid structure.
        unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_SEND,
                &raw const answer,
            )
        };
    }
}

/// Runs `work` in a new thread of the standard library behind such a filter, while `decide` answers in the
/// calling thread: `None` lets a call proceed, `Some` is the errno of its refusal.
pub fn supervised<T: Send>(
    syscalls: &[libc::c_long],
    mut decide: impl FnMut(&Call) -> Option<i32>,
    work: impl FnOnce() -> T + Send,
) -> Result<T, String> {
    const PENDING: i32 = -1;
    const FAILED: i32 = -2;
    // An atomic and unpark, since a channel would allocate behind the filter: malloc's mmap would be held
    // before the supervisor listens.
    let slot = &AtomicI32::new(PENDING);
    let supervisor = std::thread::current();
    std::thread::scope(|scope| {
        let worker = scope.spawn(move || {
            let listener = listen(syscalls);
            let fd = match &listener {
                Ok(listener) => listener.0.as_raw_fd(),
                Err(_) => FAILED,
            };
            std::mem::forget(listener);
            slot.store(fd, Ordering::Release);
            supervisor.unpark();
            (fd != FAILED).then(work)
        });
        while slot.load(Ordering::Acquire) == PENDING {
            std::thread::park();
        }
        let fd = slot.load(Ordering::Acquire);
        if fd != FAILED {
            // SAFETY: the worker gave it away.
            let listener = Listener(unsafe { OwnedFd::from_raw_fd(fd) });
            while let Some(call) = listener.next() {
                match decide(&call) {
                    None => listener.proceed(&call),
                    Some(errno) => listener.refuse(&call, errno),
                }
            }
        }
        let result = worker.join();
        result
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            .ok_or_else(|| "no seccomp notifications".to_owned())
    })
}
