//! [`JoinHandle`]: what the creator keeps of a thread.

use crate::errno::Errno;
use crate::mem::{Deliver, Shared};
use crate::settings::{Cpus, Scheduler, Stages, set_affinity};
use crate::stack::cache::StackCache;
use crate::stack::{Stack, StackInfo};
use crate::sync::notice_fork;
use crate::sys::{self, sched};
use std::io;
use std::os::fd::OwnedFd;
use std::thread::Result as Outcome;
use std::time::Duration;

/// A running, or ended, thread and its stack: its owner gives the stack back.
pub(crate) struct Running {
    pub stack: &'static Stack,
    pub cache: StackCache,
    pub tid: libc::pid_t,
    pub name: Option<Shared<String>>,
    pub stages: Option<Shared<Stages>>,
}

impl Running {
    /// Waits for the end of a thread whose result is not wanted.
    pub(crate) fn finish(self) {
        self.stack.wait_released(None);
        self.stack.reap();
    }

    /// Of a thread that C code knows by its `pthread_t`, and has the right to join or to detach.
    #[cfg(feature = "interpose")]
    pub(crate) fn of(stack: &'static Stack) -> Running {
        Running {
            stack,
            cache: StackCache::global().clone(),
            tid: 0,
            name: None,
            stages: None,
        }
    }

    /// The right to join the thread is C code's from its creation on; here nothing is left but what the creation used.
    #[cfg(feature = "interpose")]
    pub(crate) fn release(self) {
        let mut released = std::mem::ManuallyDrop::new(self);
        released.stages = None;
    }

    /// Calls `f` with the tid while the thread cannot end, or says ESRCH if it has.
    fn with_tid<R>(&self, f: impl FnOnce(libc::pid_t) -> Result<R, Errno>) -> Result<R, Errno> {
        self.stack.with_tid(|| f(self.tid))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        notice_fork();
        if self.stack.leave_handle() {
            self.cache.give(self.stack);
        }
    }
}

/// Handle and scoped handle are the same but for the lifetime of the result.
struct Handle<'a, T> {
    running: Running,
    packet: Shared<dyn Deliver<T> + 'a>,
}

impl<T> Handle<'_, T> {
    /// The kernel has cleared the tid word: takes the thread's result, and gives its stack back.
    fn finish(self) -> Outcome<T> {
        self.running.stack.reap();
        drop(self.running);
        self.packet.take().unwrap_or_else(|| {
            Err(Box::new(
                "the thread ended without returning from its closure",
            ))
        })
    }

    fn join(self) -> Outcome<T> {
        if self.running.stack.is_current() {
            // What std's join says where pthread_join(3) refuses.
            panic!(
                "failed to join thread: {}",
                io::Error::from_raw_os_error(libc::EDEADLK)
            );
        }
        self.running.stack.wait_released(None);
        self.finish()
    }

    /// The calling thread cannot see its own end, however long it waits.
    fn wait_timeout(&self, timeout: Duration) -> bool {
        let stack = self.running.stack;
        !stack.is_current() && stack.wait_released(Some(timeout))
    }

    fn try_join(self) -> Result<Outcome<T>, Self> {
        if self.running.stack.has_ended() {
            Ok(self.finish())
        } else {
            Err(self)
        }
    }

    fn join_timeout(self, timeout: Duration) -> Result<Outcome<T>, Self> {
        if self.wait_timeout(timeout) {
            Ok(self.finish())
        } else {
            Err(self)
        }
    }
}

macro_rules! shared_methods {
    () => {
        /// Returns `true` if the thread has ended, so that `join` does not wait. The kernel has cleared its tid word
        /// then (`mm_release`), and runs no instruction of it any more.
        ///
        /// ```
        /// let (end, wait) = std::sync::mpsc::channel::<()>();
        /// let handle = nptl::spawn(move || wait.recv())?;
        /// assert!(!handle.is_finished());
        /// drop(end);
        /// while !handle.is_finished() {
        ///     std::thread::yield_now();
        /// }
        /// # Ok::<(), nptl::SpawnError>(())
        /// ```
        pub fn is_finished(&self) -> bool {
            self.0.running.stack.has_ended()
        }

        /// Waits for the thread's end, for at most `d`, and keeps the handle. Returns `true` if the thread has ended,
        /// so that `join` does not wait. In the thread itself it returns `false` at once, because that wait would be in
        /// vain.
        ///
        /// Waits as `join` does, with FUTEX_WAIT and a relative time, in which the time of a system suspend does not
        /// count.
        ///
        /// ```
        /// use std::{sync::mpsc::channel, time::Duration};
        /// let (end, wait) = channel::<()>();
        /// let handle = nptl::spawn(move || wait.recv())?;
        /// assert!(!handle.wait_timeout(Duration::from_millis(10)));
        /// drop(end);
        /// assert!(handle.wait_timeout(Duration::from_secs(10)));
        /// # Ok::<(), nptl::SpawnError>(())
        /// ```
        pub fn wait_timeout(&self, d: Duration) -> bool {
            self.0.wait_timeout(d)
        }

        /// The kernel's thread id (gettid(2)), as clone(2) returned it: valid as soon as spawn returns. After the
        /// thread's end the kernel may give it to another thread; `kill`, `pidfd` and `cpu_time` return ESRCH then.
        ///
        /// ```
        /// // SAFETY: gettid only returns a number.
        /// let handle = nptl::spawn(|| unsafe { libc::gettid() })?;
        /// let tid = handle.tid();
        /// assert_eq!(handle.join().unwrap(), tid);
        /// # Ok::<(), nptl::SpawnError>(())
        /// ```
        pub fn tid(&self) -> libc::pid_t {
            self.0.running.tid
        }

        /// The whole name, however long; the kernel's `comm` has at most 15 bytes of it. Returns `None` if the builder
        /// was given none.
        ///
        /// ```
        /// let handle = nptl::Builder::new().name("network interface 0").spawn(|| ())?;
        /// assert_eq!(handle.name(), Some("network interface 0"));
        /// # Ok::<(), nptl::SpawnError>(())
        /// ```
        pub fn name(&self) -> Option<&str> {
            self.0.running.name.as_ref().map(|name| name.as_str())
        }

        /// For glibc's `pthread_*` calls: `pthread_kill`, `pthread_getattr_np`,
        /// `pthread_setaffinity_np`, `pthread_setname_np`, `pthread_getcpuclockid` and the like.
        /// Valid while this handle exists; but once the thread has ended its tid reads 0, which
        /// `pthread_setaffinity_np`, and from glibc 2.43 on `pthread_setschedparam` and
        /// `pthread_getcpuclockid` too, take for the caller. `pthread_join` and `pthread_detach` refuse it with
        /// EINVAL; a cancellation request stays pending (cancellation is disabled in threads of
        /// this crate, because it cannot unwind through Rust closures).
        ///
        /// ```
        /// let handle = nptl::spawn(std::thread::park)?;
        /// let mut name = [0_u8; 16];
        /// // SAFETY: the handle exists, and the buffer has 16 bytes.
        /// unsafe {
        ///     libc::pthread_setname_np(handle.as_pthread_t(), c"vcpu1".as_ptr());
        ///     libc::pthread_getname_np(handle.as_pthread_t(), name.as_mut_ptr().cast(), 16);
        /// }
        /// assert!(name.starts_with(b"vcpu1\0"));
        /// # Ok::<(), nptl::SpawnError>(())
        /// ```
        pub fn as_pthread_t(&self) -> libc::pthread_t {
            self.0.running.stack.pthread()
        }

        /// Sends a signal to this thread and to no other, however often its id was given away since: tgkill(2)
        /// under a lock that the thread takes before it ends. Real-time signals (`libc::SIGRTMIN() + n`) can be sent,
        /// too; 0 sends nothing and checks whether a signal could be sent. (A thread that dies without its last frames,
        /// by a bare exit(2) or a filter, takes no lock: its end in the very moment of the call is not excluded.)
        ///
        /// # Errors
        /// ESRCH if the thread has ended; EINVAL for a number that is no signal, and for 32 and 33, which belong to
        /// glibc; else those of tgkill(2).
        ///
        /// ```
        /// let (end, wait) = std::sync::mpsc::channel::<()>();
        /// let handle = nptl::spawn(move || wait.recv())?;
        /// handle.kill(0)?;
        /// drop(end);
        /// handle.wait_timeout(std::time::Duration::MAX);
        /// assert_eq!(handle.kill(libc::SIGUSR1).unwrap_err().raw_os_error(), Some(libc::ESRCH));
        /// # Ok::<(), std::io::Error>(())
        /// ```
        pub fn kill(&self, signal: libc::c_int) -> io::Result<()> {
            let running = &self.0.running;
            if (32..libc::SIGRTMIN()).contains(&signal) {
                return Err(Errno::EINVAL.into());
            }
            Ok(running.with_tid(|tid| sys::tgkill(sys::process_id(), tid, signal))?)
        }

        /// A pidfd of the thread: readable (poll(2)) when it has ended.
        ///
        /// # Errors
        /// ESRCH if the thread has ended, `Unsupported` before Linux 6.9 (`PIDFD_THREAD`); else those of pidfd_open(2).
        ///
        /// ```
        /// let (end, wait) = std::sync::mpsc::channel::<()>();
        /// let handle = nptl::spawn(move || wait.recv())?;
        /// match handle.pidfd() {
        ///     Ok(pidfd) => println!("poll {pidfd:?}"),
        ///     Err(error) => println!("no pidfd: {error}"),
        /// }
        /// drop(end);
        /// # Ok::<(), nptl::SpawnError>(())
        /// ```
        pub fn pidfd(&self) -> io::Result<OwnedFd> {
            match self.0.running.with_tid(sys::pidfd_open_thread) {
                // The flag; the tid is that of a living thread.
                Err(Errno::EINVAL) => Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "a pidfd of a thread needs Linux 6.9 (PIDFD_THREAD)",
                )),
                answer => Ok(answer?),
            }
        }

        /// The handle that std gives the thread, for [`unpark`](std::thread::Thread::unpark), if the thread was created with
        /// [`publish_std_thread`](crate::Builder::publish_std_thread).
        ///
        /// ```
        /// let vcpu = nptl::Builder::new().publish_std_thread(true).spawn(std::thread::park)?;
        /// vcpu.thread().unwrap().unpark();
        /// vcpu.join().unwrap();
        /// # Ok::<(), std::io::Error>(())
        /// ```
        pub fn thread(&self) -> Option<&std::thread::Thread> {
            self.0.running.stages.as_ref()?.thread()
        }

        /// The CPUs that the thread may run on, ascending: sched_getaffinity(2).
        ///
        /// # Errors
        /// ESRCH if the thread has ended.
        ///
        /// ```
        /// let (end, wait) = std::sync::mpsc::channel::<()>();
        /// let vcpu = nptl::spawn(move || wait.recv())?;
        /// assert!(!vcpu.cpu_affinity()?.is_empty());
        /// drop(end);
        /// # Ok::<(), std::io::Error>(())
        /// ```
        pub fn cpu_affinity(&self) -> std::io::Result<Vec<usize>> {
            let cpus = self.0.running.with_tid(sched::affinity)?;
            Ok(sched::list(&cpus).collect())
        }

        /// Changes the CPUs that the thread may run on: sched_setaffinity(2).
        ///
        /// # Errors
        /// ESRCH if the thread has ended. EINVAL if a CPU lies outside of the cpuset; of a set that lies partly outside, the
        /// kernel has then taken the other part. Else those of the call.
        ///
        /// ```
        /// let (end, wait) = std::sync::mpsc::channel::<()>();
        /// let vcpu = nptl::spawn(move || wait.recv())?;
        /// let last = *vcpu.cpu_affinity()?.last().unwrap();
        /// vcpu.set_cpu_affinity([last])?;
        /// assert_eq!(vcpu.cpu_affinity()?, [last]);
        /// drop(end);
        /// # Ok::<(), std::io::Error>(())
        /// ```
        pub fn set_cpu_affinity(
            &self,
            cpus: impl IntoIterator<Item = usize>,
        ) -> std::io::Result<()> {
            let cpus =
                Cpus::new(cpus).map_err(|_| std::io::Error::from_raw_os_error(libc::EINVAL))?;
            Ok(self.0.running.with_tid(|tid| set_affinity(tid, &cpus))?)
        }

        /// Its scheduling policy: sched_getattr(2).
        ///
        /// # Errors
        /// ESRCH if the thread has ended, `Unsupported` for a policy that [`Scheduler`](crate::Scheduler) does not name.
        ///
        /// ```
        /// let (end, wait) = std::sync::mpsc::channel::<()>();
        /// let vcpu = nptl::spawn(move || wait.recv())?;
        /// println!("{:?}", vcpu.scheduler()?);
        /// drop(end);
        /// # Ok::<(), std::io::Error>(())
        /// ```
        pub fn scheduler(&self) -> std::io::Result<Scheduler> {
            let attributes = self.0.running.with_tid(sched::scheduler)?;
            Scheduler::of(&attributes).ok_or(std::io::ErrorKind::Unsupported.into())
        }

        /// Changes its scheduling policy: sched_setattr(2).
        ///
        /// # Errors
        /// ESRCH if the thread has ended, EPERM without the privilege, EBUSY where a deadline is not admitted, EINVAL for
        /// values that are invalid.
        ///
        /// ```
        /// let (end, wait) = std::sync::mpsc::channel::<()>();
        /// let vcpu = nptl::spawn(move || wait.recv())?;
        /// vcpu.set_scheduler(nptl::Scheduler::Idle)?;
        /// assert_eq!(vcpu.scheduler()?, nptl::Scheduler::Idle);
        /// drop(end);
        /// # Ok::<(), std::io::Error>(())
        /// ```
        pub fn set_scheduler(&self, scheduler: Scheduler) -> std::io::Result<()> {
            let attributes = scheduler.attributes();
            Ok(self
                .0
                .running
                .with_tid(|tid| sched::set_scheduler(tid, &attributes))?)
        }

        /// Where its stack lies, and how large it is. Makes no system call.
        ///
        /// ```
        /// let handle = nptl::Builder::new().guard_size(4096).spawn(|| ())?;
        /// assert_eq!(handle.stack().guard_size, 4096);
        /// # Ok::<(), nptl::SpawnError>(())
        /// ```
        pub fn stack(&self) -> StackInfo {
            self.0.running.stack.info()
        }

        /// The most bytes of stack that can have been in use so far, counted from the top: down to the lowest
        /// resident page (mincore(2), one call for each 4 MiB). Pages that an earlier thread on this stack left
        /// resident count as used (at most [`keep_resident`](crate::StackCacheConfig::keep_resident)), prefaulted and
        /// locked ones too. What the kernel has swapped out does not.
        ///
        /// # Errors
        /// Those of mincore(2), which a filter may deny.
        ///
        /// ```
        /// let (end, wait) = std::sync::mpsc::channel::<()>();
        /// let handle = nptl::spawn(move || wait.recv())?;
        /// let used = handle.stack_high_water_mark()?;
        /// assert!(used <= handle.stack().size);
        /// drop(end);
        /// # Ok::<(), std::io::Error>(())
        /// ```
        pub fn stack_high_water_mark(&self) -> io::Result<usize> {
            Ok(self.0.running.stack.high_water_mark()?)
        }

        /// The processor time that the thread has used so far, in user space and in the kernel: clock_gettime(2) of
        /// the clock that `pthread_getcpuclockid(3)` names.
        ///
        /// # Errors
        /// ESRCH if the thread has ended; else those of clock_gettime(2).
        ///
        /// ```
        /// let (end, wait) = std::sync::mpsc::channel::<()>();
        /// let handle = nptl::spawn(move || wait.recv())?;
        /// println!("{:?}", handle.cpu_time()?);
        /// drop(end);
        /// # Ok::<(), std::io::Error>(())
        /// ```
        pub fn cpu_time(&self) -> io::Result<Duration> {
            Ok(self.0.running.with_tid(sys::cpu_time)?)
        }
    };
}

/// Owns the right to join a thread. Dropping it detaches the thread.
///
/// ```
/// let handle = nptl::spawn(|| 6 * 7)?;
/// assert_eq!(handle.join().unwrap(), 42);
/// # Ok::<(), nptl::SpawnError>(())
/// ```
///
/// rust-vmm's `Killable` (vmm-sys-util) is three lines on a type of your own. Its `kill` tests for an error with `< 0`, which
/// pthread_kill(3) never returns; [`kill`](Self::kill) returns the error, and knows of threads that have ended.
///
/// ```
/// use vmm_sys_util::signal::Killable;
/// struct Vcpu(nptl::JoinHandle<()>);
/// // SAFETY: the pthread_t is valid while there is a handle.
/// unsafe impl Killable for Vcpu {
///     fn pthread_handle(&self) -> libc::pthread_t { self.0.as_pthread_t() }
/// }
/// let vcpu = Vcpu(nptl::spawn(std::thread::park)?);
/// # extern "C" fn kicked(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
/// # vmm_sys_util::signal::register_signal_handler(libc::SIGRTMIN(), kicked).unwrap();
/// vcpu.kill(libc::SIGRTMIN()).unwrap();
/// # Ok::<(), nptl::SpawnError>(())
/// ```
pub struct JoinHandle<T>(Handle<'static, T>);

impl<T> JoinHandle<T> {
    pub(crate) fn new(running: Running, packet: Shared<dyn Deliver<T>>) -> JoinHandle<T> {
        JoinHandle(Handle { running, packet })
    }

    /// Waits for the thread's end and returns what its closure returned.
    ///
    /// # Errors
    /// The payload of the closure's panic. A thread that died without returning (a bare exit(2), a seccomp filter, or it
    /// stayed behind in the parent of a fork) gives an `Err` with a `&str`.
    ///
    /// Waits with FUTEX_WAIT until the kernel has cleared the thread's tid word. Its stack then goes back to the
    /// cache: madvise with `MADV_DONTNEED` (see [`keep_resident`](crate::StackCacheConfig::keep_resident)), and munmap
    /// for what the budget does not hold.
    ///
    /// # Panics
    /// Like std's, if the thread joins itself ("failed to join thread: Resource deadlock avoided"). It is detached then.
    ///
    /// ```
    /// assert_eq!(nptl::spawn(|| "done")?.join().unwrap(), "done");
    /// assert!(nptl::spawn(|| panic!("on purpose"))?.join().is_err());
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn join(self) -> Outcome<T> {
        self.0.join()
    }

    /// Like [`join`](Self::join) if that need not wait.
    ///
    /// # Errors
    /// The handle, if the thread has not ended; so in the thread itself.
    ///
    /// ```
    /// let mut handle = nptl::spawn(|| 7)?;
    /// let seven = loop {
    ///     match handle.try_join() {
    ///         Ok(outcome) => break outcome.unwrap(),
    ///         Err(running) => handle = running,
    ///     }
    /// };
    /// assert_eq!(seven, 7);
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn try_join(self) -> Result<Outcome<T>, Self> {
        self.0.try_join().map_err(JoinHandle)
    }

    /// Like [`join`](Self::join), except that it waits for at most `d`.
    ///
    /// # Errors
    /// The handle, if the thread has not ended by then. In the thread itself at once, because that wait would be in
    /// vain.
    ///
    /// ```
    /// use std::{sync::mpsc::channel, time::Duration};
    /// let (go, wait) = channel::<()>();
    /// let handle = nptl::spawn(move || wait.recv().is_err())?;
    /// let handle = handle.join_timeout(Duration::from_millis(10)).unwrap_err();
    /// drop(go);
    /// assert!(handle.join().unwrap());
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn join_timeout(self, d: Duration) -> Result<Outcome<T>, Self> {
        self.0.join_timeout(d).map_err(JoinHandle)
    }

    /// Lets the thread run on without a handle, as dropping this does. What its closure returns is dropped in the
    /// thread; the memory that held both is freed when the thread's stack is used again or unmapped.
    ///
    /// ```
    /// let (send, receive) = std::sync::mpsc::channel();
    /// nptl::spawn(move || send.send("alive"))?.detach();
    /// assert_eq!(receive.recv(), Ok("alive"));
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn detach(self) {}

    shared_methods!();
}

impl<T> std::fmt::Debug for JoinHandle<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinHandle")
            .field("tid", &self.0.running.tid)
            .field("name", &self.name())
            .finish_non_exhaustive()
    }
}

/// Owns the right to join a scoped thread.
///
/// ```
/// let mut numbers = vec![1, 2, 3];
/// nptl::scope(|s| {
///     let sum = s.spawn(|| numbers.iter().sum::<i32>()).unwrap();
///     assert_eq!(sum.join().unwrap(), 6);
/// });
/// numbers.push(4);
/// ```
pub struct ScopedJoinHandle<'scope, T>(Handle<'scope, T>);

impl<'scope, T> ScopedJoinHandle<'scope, T> {
    pub(crate) fn new(running: Running, packet: Shared<dyn Deliver<T> + 'scope>) -> Self {
        ScopedJoinHandle(Handle { running, packet })
    }

    /// See [`JoinHandle::join`].
    ///
    /// # Errors
    /// The payload of the closure's panic, which the scope does not report then.
    ///
    /// # Panics
    /// Like std's, if the thread joins itself.
    ///
    /// ```
    /// let word = String::from("borrowed");
    /// let length = nptl::scope(|s| s.spawn(|| word.len()).map(|handle| handle.join().unwrap()))?;
    /// assert_eq!(length, 8);
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn join(self) -> Outcome<T> {
        self.0.join()
    }

    /// See [`JoinHandle::try_join`].
    ///
    /// # Errors
    /// The handle, if the thread has not ended.
    ///
    /// ```
    /// let word = String::from("borrowed");
    /// let length = nptl::scope(|s| match s.spawn(|| word.len()).unwrap().try_join() {
    ///     Ok(outcome) => outcome.unwrap(),
    ///     Err(running) => running.join().unwrap(),
    /// });
    /// assert_eq!(length, 8);
    /// ```
    pub fn try_join(self) -> Result<Outcome<T>, Self> {
        self.0.try_join().map_err(ScopedJoinHandle)
    }

    /// See [`JoinHandle::join_timeout`].
    ///
    /// # Errors
    /// The handle, if the thread has not ended after `d`.
    ///
    /// ```
    /// let word = String::from("borrowed");
    /// let minute = std::time::Duration::from_secs(60);
    /// let joined = nptl::scope(|s| s.spawn(|| word.len()).unwrap().join_timeout(minute).ok());
    /// assert_eq!(joined.unwrap().unwrap(), 8);
    /// ```
    pub fn join_timeout(self, d: Duration) -> Result<Outcome<T>, Self> {
        self.0.join_timeout(d).map_err(ScopedJoinHandle)
    }

    shared_methods!();
}

impl<T> std::fmt::Debug for ScopedJoinHandle<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ScopedJoinHandle")
            .field("tid", &self.0.running.tid)
            .field("name", &self.name())
            .finish_non_exhaustive()
    }
}
