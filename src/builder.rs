//! [`Builder`]: what the caller wants of a thread.

use crate::error::{Refused, SetupError, SpawnError};
use crate::gate::StartGate;
use crate::handle::{JoinHandle, Running, ScopedJoinHandle};
use crate::mem::text::character_boundary;
use crate::mem::{Failure, Packet, SetupPacket, Shared, With, try_box};
use crate::retry::RetryPolicy;
use crate::scope::Scope;
use crate::settings::{Cgroup, CoreScheduling, Cpus, Scheduler, Special};
use crate::spawn::{self, Request};
use crate::stack::cache::StackCache;
use crate::stack::{Wanted, Work};
use crate::sync::{Entrance, Latch, forked_bare};
use crate::sys::find_once;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

/// std's default.
const DEFAULT_STACK_SIZE: usize = 2 << 20;

/// Attributes of a thread to be created: those of `std::thread::Builder`, and more.
///
/// ```
/// let handle = nptl::Builder::new()
///     .name("virtio-blk0")
///     .stack_size(256 * 1024)
///     .spawn(|| "done")?;
/// assert_eq!(handle.join().unwrap(), "done");
/// # Ok::<(), nptl::SpawnError>(())
/// ```
#[derive(Clone, Debug, Default)]
#[must_use = "nothing is created before spawn"]
pub struct Builder {
    name: Option<String>,
    stack_size: Option<usize>,
    guard_size: Option<usize>,
    cache: Option<StackCache>,
    lock: bool,
    prefault: usize,
    retry: RetryPolicy,
    special: Option<Box<Special>>,
}

/// A thread, and what it shares with its creator.
type Launched<F, T> = (Running, Shared<Packet<F, T>>);

impl Builder {
    /// Default attributes: no name, 2 MiB of stack or RUST_MIN_STACK, one guard page, the global
    /// cache.
    ///
    /// ```
    /// let handle = nptl::Builder::new().spawn(|| ())?;
    /// assert_eq!(handle.name(), None);
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    #[inline]
    pub fn new() -> Builder {
        Builder::default()
    }

    /// Names the thread. The handle has all of it; the kernel's `comm` gets as many whole
    /// characters as fit 15 bytes, and a filter that denies prctl(2) only costs that. A name with a
    /// NUL byte is refused at [`Step::Attributes`](crate::Step::Attributes).
    ///
    /// ```
    /// let vcpu = nptl::Builder::new().name("vcpu0").spawn(|| ())?;
    /// assert_eq!(vcpu.name(), Some("vcpu0"));
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    #[inline]
    pub fn name(self, name: impl Into<String>) -> Builder {
        Builder {
            name: Some(name.into()),
            ..self
        }
    }

    /// Usable bytes of stack: guard and thread-local storage are not taken out of them. Rounded up
    /// to `PTHREAD_STACK_MIN` (16 KiB), to whole pages and to the cache's size class (less than a
    /// quarter more, of address space only); a size that cannot exist is refused at
    /// [`Step::Attributes`](crate::Step::Attributes) with EINVAL.
    ///
    /// ```
    /// let vcpu = nptl::Builder::new().stack_size(256 << 10).spawn(|| ())?;
    /// assert!(vcpu.stack().size >= 256 << 10);
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    #[inline]
    pub fn stack_size(self, bytes: usize) -> Builder {
        Builder {
            stack_size: Some(bytes),
            ..self
        }
    }

    /// Bytes below the stack that fault when touched, rounded up to whole pages (more than one
    /// page: at least 16); 0 means none, and then an overflow hits whatever lies there.
    ///
    /// ```
    /// let vcpu = nptl::Builder::new().guard_size(64 << 10).spawn(|| ())?;
    /// assert_eq!(vcpu.stack().guard_size, 64 << 10);
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    #[inline]
    pub fn guard_size(self, bytes: usize) -> Builder {
        Builder {
            guard_size: Some(bytes),
            ..self
        }
    }

    /// Where the stack comes from and goes to; [`StackCache::global`] otherwise.
    ///
    /// ```
    /// use nptl::{Builder, StackCache, StackCacheConfig};
    /// let cache = StackCache::new(StackCacheConfig::default());
    /// Builder::new().stack_cache(&cache).spawn(|| ())?.join().unwrap();
    /// assert_eq!(cache.stats().cached_stacks, 1);
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    #[inline]
    pub fn stack_cache(self, cache: &StackCache) -> Builder {
        Builder {
            cache: Some(cache.clone()),
            ..self
        }
    }

    /// Which refusals are tried again, and for how long: [`RetryPolicy`].
    ///
    /// ```
    /// use nptl::{Builder, RetryPolicy};
    /// let builder = Builder::new().retry(RetryPolicy::never());
    /// let refused = builder.stack_size(1 << 60).spawn(|| ()).unwrap_err();
    /// assert_eq!(refused.attempts(), 1);
    /// ```
    #[inline]
    pub fn retry(self, policy: RetryPolicy) -> Builder {
        Builder {
            retry: policy,
            ..self
        }
    }

    /// The stack is resident and locked (mlock(2)) before the closure runs. Refused at
    /// [`Step::PrepareStack`](crate::Step::PrepareStack), with ENOMEM or EPERM where
    /// RLIMIT_MEMLOCK does not allow it.
    ///
    /// ```
    /// use nptl::{Builder, Step};
    /// match Builder::new().lock_stack(true).spawn(|| ()) {
    ///     Ok(vcpu) => vcpu.join().unwrap(),
    ///     Err(refused) => assert_eq!(refused.step(), Step::PrepareStack),
    /// }
    /// ```
    #[inline]
    pub fn lock_stack(self, yes: bool) -> Builder {
        Builder { lock: yes, ..self }
    }

    /// The uppermost `bytes` of the stack (at most all of it) are resident before the closure runs:
    /// `MADV_POPULATE_WRITE`, or a touch of each page before Linux 5.14.
    ///
    /// ```
    /// let vcpu = nptl::Builder::new().prefault_stack(64 << 10).spawn(std::thread::park)?;
    /// assert!(vcpu.stack_high_water_mark().unwrap() >= 64 << 10);
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    #[inline]
    pub fn prefault_stack(self, bytes: usize) -> Builder {
        Builder {
            prefault: bytes,
            ..self
        }
    }

    /// The CPUs that the thread may run on, by their numbers: sched_setaffinity(2).
    ///
    /// Refused at [`Step::Affinity`](crate::Step::Affinity) if one of them lies outside of the cpuset or does not exist. (Of
    /// a set that lies partly outside, the kernel takes the other part and says nothing. Here this is refused, with EINVAL.)
    ///
    /// ```
    /// let thread = nptl::Builder::new().cpu_affinity([0]).spawn(|| std::thread::available_parallelism())?;
    /// assert_eq!(thread.join().unwrap().unwrap().get(), 1);
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn cpu_affinity(self, cpus: impl IntoIterator<Item = usize>) -> Builder {
        self.specially(|special| match Cpus::new(cpus) {
            Ok(cpus) => special.affinity = Some(cpus),
            Err(wrong) => special.invalid = special.invalid.or(Some(wrong)),
        })
    }

    /// The scheduling policy: sched_setattr(2). Refused at [`Step::Scheduler`](crate::Step::Scheduler).
    ///
    /// ```
    /// use nptl::{Builder, Scheduler, Step};
    /// let vcpu = Builder::new().scheduler(Scheduler::Fifo { priority: 10 });
    /// match vcpu.spawn(|| ()) {
    ///     Ok(thread) => thread.join().unwrap(),
    ///     Err(error) => assert_eq!(error.step(), Step::Scheduler), // no privilege here
    /// }
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn scheduler(self, scheduler: Scheduler) -> Builder {
        self.specially(|special| {
            special.scheduler = Some(scheduler);
            special.invalid = special.invalid.or(scheduler.invalid());
        })
    }

    /// The signals that are blocked in the thread, by their numbers, and no others; by default those that are blocked in
    /// its creator. 32 and 33 belong to glibc and are never blocked.
    ///
    /// ```
    /// let vcpu = nptl::Builder::new().blocked_signals([libc::SIGTERM, libc::SIGRTMIN() + 1]);
    /// vcpu.spawn(|| ())?.join().unwrap();
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn blocked_signals(self, signals: impl IntoIterator<Item = libc::c_int>) -> Builder {
        self.specially(|special| {
            let mut blocked = 0;
            for signal in signals {
                match signal {
                    1..=64 => blocked |= 1 << (signal - 1),
                    _ => {
                        let what = match signal {
                            ..0 => "number of a signal, below 0 by",
                            _ => "number of a signal",
                        };
                        let wrong = (what, signal.unsigned_abs().into());
                        special.invalid = special.invalid.or(Some(wrong));
                    }
                }
            }
            special.blocked = Some(blocked);
        })
    }

    /// The cgroup of the thread: an open directory of a cgroup file system.
    ///
    /// v2: the thread is made in it (`CLONE_INTO_CGROUP`, Linux 5.7, and not by clone(2) where a filter denies clone3).
    /// The process stays where it is, so both must be in one threaded domain. v1: the thread writes itself into `tasks`.
    /// Refused at [`Step::Cgroup`](crate::Step::Cgroup).
    ///
    /// ```
    /// use nptl::{Builder, Step};
    /// let directory = std::fs::File::open("/proc")?;
    /// let refused = Builder::new().cgroup(directory).spawn(|| ()).unwrap_err();
    /// assert_eq!((refused.step(), refused.errno().raw()), (Step::Cgroup, libc::ENOTDIR));
    /// # Ok::<(), std::io::Error>(())
    /// ```
    pub fn cgroup(self, directory: impl Into<OwnedFd>) -> Builder {
        let cgroup = Arc::new(Cgroup::new(directory.into()));
        self.specially(|special| special.cgroup = Some(cgroup))
    }

    /// Which threads may run beside it on a core: prctl(2), `PR_SCHED_CORE`, Linux 5.14. Refused at
    /// [`Step::CoreScheduling`](crate::Step::CoreScheduling).
    ///
    /// ```
    /// use nptl::{Builder, CoreScheduling, Step};
    /// // The first vCPU has a cookie of its own, the others share it.
    /// match Builder::new().core_scheduling(CoreScheduling::New).spawn(std::thread::park) {
    ///     Ok(first) => {
    ///         let shared = CoreScheduling::SameAs(first.tid());
    ///         Builder::new().core_scheduling(shared).spawn(|| ())?.join().unwrap();
    ///     }
    ///     Err(error) => assert_eq!(error.step(), Step::CoreScheduling), // not on this machine
    /// }
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn core_scheduling(self, cookie: CoreScheduling) -> Builder {
        self.specially(|special| match cookie {
            // The kernel takes 0 for the caller, and answers the others as it answers what it does not know.
            CoreScheduling::SameAs(tid @ ..=0) => {
                let wrong = (
                    "thread id (above 0), below that by",
                    tid.unsigned_abs().into(),
                );
                special.invalid = special.invalid.or(Some(wrong));
            }
            _ => special.core = Some(cookie),
        })
    }

    /// The thread waits at `gate` before its closure, when its settings are in force and its setup has succeeded.
    ///
    /// ```
    /// let gate = nptl::StartGate::new();
    /// let vcpu = nptl::Builder::new().start_gate(&gate).spawn(|| "runs")?;
    /// assert!(!vcpu.is_finished());
    /// gate.open();
    /// assert_eq!(vcpu.join().unwrap(), "runs");
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn start_gate(self, gate: &StartGate) -> Builder {
        self.specially(|special| special.gate = Some(gate.entrance().cloned()))
    }

    /// Makes the handle that std gives the thread available as [`JoinHandle::thread`], so that it can be unparked. It is made
    /// in the new thread, with memory and a thread-local destructor, so spawn waits for it: do not use it in the
    /// constructor of a shared object, which holds the lock of the loader.
    ///
    /// ```
    /// let vcpu = nptl::Builder::new().publish_std_thread(true).spawn(std::thread::park)?;
    /// vcpu.thread().unwrap().unpark();
    /// vcpu.join().unwrap();
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn publish_std_thread(self, yes: bool) -> Builder {
        self.specially(|special| special.publish = yes)
    }

    fn specially(mut self, change: impl FnOnce(&mut Special)) -> Builder {
        change(self.special.get_or_insert_default());
        self
    }

    #[cfg(feature = "interpose")]
    pub(crate) fn with_special(self, special: Box<Special>) -> Builder {
        Builder {
            special: Some(special),
            ..self
        }
    }

    /// Creates the thread.
    ///
    /// # Errors
    /// A [`SpawnError`] that names the refused step. The closure is dropped then:
    /// [`spawn_or_return`](Self::spawn_or_return) gives it back.
    ///
    /// ```
    /// let handle = nptl::Builder::new().name("worker").spawn(|| 6 * 7)?;
    /// assert_eq!(handle.join().unwrap(), 42);
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn spawn<F, T>(self, f: F) -> Result<JoinHandle<T>, SpawnError>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        Ok(self.spawn_or_return(f)?)
    }

    /// Like [`spawn`](Self::spawn), except that a refusal gives the closure back, with everything that was moved into
    /// it.
    ///
    /// # Errors
    /// A [`Refused`] with the [`SpawnError`] and the closure.
    ///
    /// ```
    /// let vcpu = vec![1, 2, 3];
    /// let impossible = nptl::Builder::new().stack_size(usize::MAX);
    /// let refused = impossible.spawn_or_return(move || vcpu).unwrap_err();
    /// assert_eq!(refused.error().step(), nptl::Step::Attributes);
    /// let vcpu = refused.into_inner();
    /// assert_eq!(vcpu(), [1, 2, 3]);
    /// ```
    pub fn spawn_or_return<F, T>(self, f: F) -> Result<JoinHandle<T>, Refused<F>>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let start = |request: &Request, packet: &Shared<Packet<F, T>>| {
            spawn::spawn(request, Work::Free(&packet.body()))
        };
        let (running, packet) = self.launch(f, None, start)?;
        Ok(JoinHandle::new(running, packet.into_delivery()))
    }

    /// Creates a thread that calls `f` with `value`. Like [`spawn_or_return`](Self::spawn_or_return), except that a refusal
    /// gives the value back: a closure could only be called.
    ///
    /// # Errors
    /// A [`Refused`] with the [`SpawnError`] and the value.
    ///
    /// ```
    /// let vm = vec![1, 2, 3];
    /// let impossible = nptl::Builder::new().stack_size(usize::MAX);
    /// let refused = impossible.spawn_with(vm, |vm| vm.len()).unwrap_err();
    /// assert_eq!(refused.error().step(), nptl::Step::Attributes);
    /// assert_eq!(refused.into_inner(), [1, 2, 3]);
    /// ```
    pub fn spawn_with<A, F, T>(self, value: A, f: F) -> Result<JoinHandle<T>, Refused<A>>
    where
        A: Send + 'static,
        F: FnOnce(A) -> T + Send + 'static,
        T: Send + 'static,
    {
        let start = |request: &Request, packet: &Shared<Packet<With<A, F>, T>>| {
            spawn::spawn(request, Work::Free(&packet.body()))
        };
        let launched = self.launch(With(value, f), None, start);
        let (running, packet) = launched.map_err(|refused| {
            let (error, With(value, _)) = refused.into_parts();
            Refused::new(error, value)
        })?;
        Ok(JoinHandle::new(running, packet.into_delivery()))
    }

    /// Creates a thread that runs `setup` and then calls `body` with what it returned. `setup` has run, in the new thread
    /// with all settings in force, when this returns: what can fail there (a filter, a file, a device) fails here.
    ///
    /// The thread does not hold anything that this waits for, but `setup` can: it must not wait for the calling thread.
    ///
    /// # Errors
    /// [`SetupError`]: the refusal of a thread, or what `setup` returned or panicked with. No thread is left.
    ///
    /// ```
    /// use std::fs::File;
    /// let vcpu = nptl::Builder::new().name("vcpu0");
    /// let refused = vcpu.spawn_with_setup(|| File::open("/dev/none"), |_device| ());
    /// match refused {
    ///     Err(nptl::SetupError::Failed(error)) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound),
    ///     _ => unreachable!(),
    /// }
    /// ```
    pub fn spawn_with_setup<S, A, E, F, T>(
        self,
        setup: S,
        body: F,
    ) -> Result<JoinHandle<T>, SetupError<E>>
    where
        S: FnOnce() -> Result<A, E> + Send + 'static,
        A: 'static,
        E: Send + 'static,
        F: FnOnce(A) -> T + Send + 'static,
        T: Send + 'static,
    {
        let mut builder = self;
        if builder.special.is_none() && !forked_bare() {
            builder.special = try_box(Special::default()).ok();
        }
        let Some(special) = &mut builder.special else {
            let bytes = size_of::<Special>();
            return Err(spawn::refused_memory(&builder.request(), bytes).into());
        };
        special.setup = true;
        let request = builder.request();
        let packet = spawn::share(SetupPacket::new(setup, body)).map_err(|_| {
            spawn::refused_memory(&request, size_of::<SetupPacket<S, A, E, F, T>>())
        })?;
        let running = spawn::spawn(&request, Work::Free(&packet.body()))?;
        match packet.take_failure() {
            None => Ok(JoinHandle::new(running, packet.into_delivery())),
            Some(failure) => {
                running.finish();
                Err(match failure {
                    Failure::Failed(error) => SetupError::Failed(error),
                    Failure::Panicked(payload) => SetupError::Panicked(payload),
                })
            }
        }
    }

    /// Like [`spawn`](Self::spawn), except that closure and result may borrow, as std's `spawn_unchecked`.
    ///
    /// # Safety
    /// What the closure and its result borrow must live until both are gone: until the thread is joined, and for ever
    /// if it may be detached (dropping the handle detaches it).
    ///
    /// # Errors
    /// Like [`spawn`](Self::spawn).
    ///
    /// ```
    /// let words = ["one", "two"];
    /// // SAFETY: the thread is joined before `words` goes.
    /// let handle = unsafe { nptl::Builder::new().spawn_unchecked(|| words.len()) }?;
    /// assert_eq!(handle.join().unwrap(), 2);
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    #[expect(unsafe_code, reason = "the function is unsafe to call, as std's")]
    pub unsafe fn spawn_unchecked<F, T>(self, f: F) -> Result<JoinHandle<T>, SpawnError>
    where
        F: FnOnce() -> T + Send,
        T: Send,
    {
        let start = |request: &Request, packet: &Shared<Packet<F, T>>| {
            // SAFETY: the caller vouches for what the closure borrows, for as long as the thread can use it.
            let body = unsafe { Shared::clone(&packet.body()).outlive() };
            spawn::spawn(request, Work::Free(&body))
        };
        let (running, packet) = self.launch(f, None, start)?;
        // SAFETY: the caller vouches for what the result borrows, for as long as the handle can deliver it.
        let delivery = unsafe { packet.into_delivery().outlive() };
        Ok(JoinHandle::new(running, delivery))
    }

    /// Creates a thread in a [`scope`](crate::scope), which may borrow what outlives the scope.
    ///
    /// # Errors
    /// Like [`spawn`](Self::spawn).
    ///
    /// ```
    /// let numbers = [1, 2, 3];
    /// let sum = nptl::scope(|s| {
    ///     let adder = nptl::Builder::new().name("adder").spawn_scoped(s, || numbers.iter().sum::<i32>())?;
    ///     Ok::<_, nptl::SpawnError>(adder.join().unwrap())
    /// })?;
    /// assert_eq!(sum, 6);
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn spawn_scoped<'scope, F, T>(
        self,
        scope: &'scope Scope<'scope, '_>,
        f: F,
    ) -> Result<ScopedJoinHandle<'scope, T>, SpawnError>
    where
        F: FnOnce() -> T + Send + 'scope,
        T: Send + 'scope,
    {
        let Some(latch) = scope.latch() else {
            let bytes = size_of::<Latch>();
            return Err(spawn::refused_memory(&self.request(), bytes));
        };
        if let Some(special) = &self.special
            && let Some(Some(gate)) = &special.gate
            && !scope.note_gate(gate)
        {
            let bytes = size_of::<Shared<Entrance>>();
            return Err(spawn::refused_memory(&self.request(), bytes));
        }
        let start = |request: &Request, packet: &Shared<Packet<F, T>>| {
            spawn::spawn(request, Work::Scoped(&packet.body(), latch))
        };
        let (running, packet) = self.launch(f, Some(latch), start)?;
        Ok(ScopedJoinHandle::new(running, packet.into_delivery()))
    }

    /// Packs the closure and lets `start` make a thread of it.
    #[expect(unsafe_code, reason = "no type says that a refused thread has not run")]
    fn launch<F, T>(
        self,
        f: F,
        scope: Option<&Shared<Latch>>,
        start: impl FnOnce(&Request, &Shared<Packet<F, T>>) -> Result<Running, SpawnError>,
    ) -> Result<Launched<F, T>, Refused<F>> {
        let request = self.request();
        let packet = match spawn::share(Packet::new(f, scope.cloned())) {
            Ok(packet) => packet,
            Err(packet) => {
                let error = spawn::refused_memory(&request, size_of::<Packet<F, T>>());
                // SAFETY: no thread has seen this packet.
                return Err(Refused::new(error, unsafe { packet.reclaim() }));
            }
        };
        match start(&request, &packet) {
            Ok(running) => Ok((running, packet)),
            // SAFETY: no thread was made, or its report was a refused setting, or it has ended without a report: the body
            // is called behind a report that is no refusal.
            Err(error) => Err(Refused::new(error, unsafe { packet.reclaim() })),
        }
    }

    #[inline]
    pub(crate) fn request(self) -> Request {
        let name = self.name;
        let wanted = Wanted {
            size: self.stack_size.unwrap_or_else(default_stack_size),
            guard: self.guard_size.unwrap_or_else(crate::sys::page_size),
            lock: self.lock,
            prefault: self.prefault,
        };
        // Checked here as far as it needs no runtime, so that a wrong wish is called so everywhere.
        let invalid = if name
            .as_ref()
            .is_some_and(|name| name.as_bytes().contains(&0))
        {
            Some(("name contains a NUL byte", 0))
        } else if wanted.size.saturating_add(wanted.guard) > isize::MAX as usize {
            Some(wanted.too_large())
        } else {
            self.special.as_ref().and_then(|special| special.invalid)
        };
        let mut special = self.special;
        if let Some(special) = &mut special
            && let Some(stages) = special.stages_to_share()
        {
            special.stages = spawn::share(stages).ok();
            special.unshared = special.stages.is_none();
        }
        Request {
            comm: name.as_deref().map(comm),
            name: name
                .map(spawn::share)
                .transpose()
                .map_err(|_| size_of::<String>()),
            invalid,
            wanted,
            special,
            retry: self.retry,
            cache: self.cache.unwrap_or_else(|| StackCache::global().clone()),
        }
    }
}

impl<'scope> Scope<'scope, '_> {
    /// Spawns a thread with the default attributes: see [`Builder::spawn_scoped`].
    ///
    /// # Errors
    /// Like [`crate::spawn`], and unlike std, which panics here.
    ///
    /// ```
    /// let words = ["one", "two"];
    /// let length = nptl::scope(|s| s.spawn(|| words.len()).map(|handle| handle.join().unwrap()))?;
    /// assert_eq!(length, 2);
    /// # Ok::<(), nptl::SpawnError>(())
    /// ```
    pub fn spawn<F, T>(&'scope self, f: F) -> Result<ScopedJoinHandle<'scope, T>, SpawnError>
    where
        F: FnOnce() -> T + Send + 'scope,
        T: Send + 'scope,
    {
        Builder::new().spawn_scoped(self, f)
    }
}

/// As much of a name as `TASK_COMM_LEN` allows, cut between characters.
fn comm(name: &str) -> [u8; 16] {
    let mut comm = [0; 16];
    let end = character_boundary(name.as_bytes(), 15);
    for (to, from) in comm.iter_mut().zip(name.as_bytes().iter().take(end)) {
        *to = *from;
    }
    comm
}

/// RUST_MIN_STACK, read once as std does, or 2 MiB.
fn default_stack_size() -> usize {
    static SIZE: AtomicUsize = AtomicUsize::new(0);
    find_once(&SIZE, || {
        let value = std::env::var("RUST_MIN_STACK").ok();
        let size = value.and_then(|value| value.parse().ok());
        size.unwrap_or(DEFAULT_STACK_SIZE).max(1)
    })
}

/// Creates a thread with the default attributes: see [`Builder`].
///
/// # Errors
/// A [`SpawnError`] that names the refused step; std panics here.
///
/// ```
/// let handle = nptl::spawn(|| "hello from a thread")?;
/// assert_eq!(handle.join().unwrap(), "hello from a thread");
/// # Ok::<(), nptl::SpawnError>(())
/// ```
pub fn spawn<F, T>(f: F) -> Result<JoinHandle<T>, SpawnError>
where
    F: FnOnce() -> T + Send + 'static,
    T: Send + 'static,
{
    Builder::new().spawn(f)
}

/// Does now what the first spawn of a process does besides creating its thread: it examines glibc, with a thread of
/// glibc's that ends at once, installs the handlers for overflow reports (unless
/// [`disable_overflow_reports`](crate::disable_overflow_reports) was called) and for fork(3), and finds out what this
/// kernel does with a stack and its guards. Besides, it looks up where the cgroups are, so that no refusal has to read a
/// long table of mounts. Afterwards a spawn makes only the system calls that `docs/seccomp.md` in the
/// repository lists for each spawn: call it before a filter is installed. Later calls return at once.
///
/// # Errors
/// A [`SpawnError`] that names the refused step, as the first spawn would have met it. A later call, or spawn, tries
/// again.
///
/// ```
/// nptl::prepare()?;
/// // Install a filter here.
/// nptl::spawn(|| ())?.join().unwrap();
/// # Ok::<(), nptl::SpawnError>(())
/// ```
pub fn prepare() -> Result<(), SpawnError> {
    crate::spawn::prepare(&Builder::new().request())
}
