//! Limits that a child gives itself, once the harness around it is up.

use std::io;

/// Sets the soft limit of this process. The hard limit stays.
#[track_caller]
pub fn set_rlimit(resource: libc::__rlimit_resource_t, soft: u64) {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a valid place for the result.
    let read = unsafe { libc::getrlimit(resource, &raw mut limit) };
    limit.rlim_cur = soft;
    // SAFETY: `limit` is a valid structure.
    let written = unsafe { libc::setrlimit(resource, &raw const limit) };
    assert!(
        read == 0 && written == 0,
        "setrlimit({resource}, {soft}): {}",
        io::Error::last_os_error()
    );
}

pub fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions.
    unsafe { libc::geteuid() == 0 }
}

/// A user id that no other process on this machine has, so that `RLIMIT_NPROC` counts our tasks only.
///
/// Drawn at random from a range far above the ids that systems and their containers hand out: tests run
/// side by side, also in pid namespaces where a process number would not distinguish them.
pub fn unused_uid() -> u32 {
    let mut random = [0; 4];
    // SAFETY: the buffer is valid for its length.
    let got = unsafe { libc::getrandom(random.as_mut_ptr().cast(), random.len(), 0) };
    assert_eq!(got, 4, "getrandom: {}", io::Error::last_os_error());
    2_000_000_000 + u32::from_ne_bytes(random) % 100_000_000
}

/// Turns this process, all its threads, into one of an [unused user](unused_uid) without any capability.
/// `Err` where this process may not.
pub fn become_unused_user() -> Result<u32, String> {
    let uid = unused_uid();
    become_user(uid).map(|()| uid)
}

/// The same for a user that is given.
pub fn become_user(uid: u32) -> Result<(), String> {
    // SAFETY: glibc changes every thread; the new ids are plain numbers. prctl takes a flag and a
    // signal number.
    unsafe {
        if libc::setresgid(uid, uid, uid) != 0 || libc::setresuid(uid, uid, uid) != 0 {
            let error = io::Error::last_os_error();
            return Err(format!("becoming another user needs root: {error}"));
        }
        // A change of user makes /proc/self belong to root; a program started by that user would own it.
        libc::prctl(libc::PR_SET_DUMPABLE, 1);
        // It also forgets that this process is to end with its parent.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
    }
    Ok(())
}

/// Forked processes that do nothing but exist, and end with this value or with this process.
#[derive(Default)]
pub struct Sleepers(Vec<libc::pid_t>);

impl Sleepers {
    /// Up to `count` more. Returns the error that stopped it before.
    pub fn add(&mut self, count: usize) -> io::Result<()> {
        // SAFETY: getpid has no preconditions.
        let parent = unsafe { libc::getpid() };
        for _ in 0..count {
            // SAFETY: the child makes only system calls and never returns.
            match unsafe { libc::fork() } {
                -1 => return Err(io::Error::last_os_error()),
                0 => sleep_until_parent_ends(parent),
                pid => self.0.push(pid),
            }
        }
        Ok(())
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Ends `count` of them; their process numbers are free again on return.
    pub fn remove(&mut self, count: usize) {
        let rest = self.0.len().saturating_sub(count);
        for pid in self.0.drain(rest..) {
            // SAFETY: a child of ours that is not reaped yet.
            unsafe {
                libc::kill(pid, libc::SIGKILL);
                libc::waitpid(pid, std::ptr::null_mut(), 0);
            }
        }
    }
}

impl Drop for Sleepers {
    fn drop(&mut self) {
        self.remove(self.0.len());
    }
}

/// Mappings of a page each that fill the process's table, and end with this value.
pub struct Mappings(Vec<usize>);

impl Mappings {
    /// Up to `vm.max_map_count`: no mapping can be split then.
    pub fn fill() -> Result<Mappings, String> {
        const MOST: usize = 4 << 20;
        let file = "/proc/sys/vm/max_map_count";
        let limit = std::fs::read_to_string(file).map_err(|error| format!("{file}: {error}"))?;
        if limit.trim().parse().is_ok_and(|limit: usize| limit > MOST) {
            let limit = limit.trim();
            return Err(format!(
                "vm.max_map_count is {limit}: that many mappings would take too long"
            ));
        }
        // Room for all of them now: later the heap may get none.
        let mut mappings = Mappings(Vec::with_capacity(MOST));
        let mut protection = libc::PROT_READ;
        while mappings.0.len() < mappings.0.capacity() {
            // Neighbours of different protection do not merge.
            protection ^= libc::PROT_READ;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a new private mapping.
            let page = unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
            if page == libc::MAP_FAILED {
                return Ok(mappings);
            }
            mappings.0.push(page as usize);
        }
        Err(format!("{MOST} mappings did not reach vm.max_map_count"))
    }

    /// As [`Mappings::fill`], but for `count` that are left to others.
    #[track_caller]
    pub fn fill_but(count: usize) -> Mappings {
        let mut mappings = Mappings::fill().expect("a full table");
        mappings.remove(count);
        mappings
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn remove(&mut self, count: usize) {
        let rest = self.0.len().saturating_sub(count);
        for page in self.0.drain(rest..) {
            // SAFETY: a page that only this value knows.
            unsafe { libc::munmap(page as *mut libc::c_void, 4096) };
        }
    }
}

impl Drop for Mappings {
    fn drop(&mut self) {
        self.remove(self.0.len());
    }
}

fn sleep_until_parent_ends(parent: libc::pid_t) -> ! {
    // SAFETY: system calls on plain numbers, in a forked child that never returns. The parent may have
    // ended before the request to die with it, hence the second look.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        while libc::getppid() == parent {
            libc::pause();
        }
        libc::_exit(0)
    }
}
