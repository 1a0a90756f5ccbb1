//! libc's own functions.
//!
//! They are looked up in libc.so.6 and not behind this object (RTLD_NEXT): another library that replaces them may pass
//! its calls on to this one. All are when the object is loaded, because the loader's lock can be held later on: by a
//! dlopen in another thread that waits for this one. A call that comes before, from the constructor of another library,
//! looks its function up itself.

use crate::errno::Errno;
use libc::{c_char, c_int, c_void, clockid_t, pid_t, pthread_attr_t, pthread_t, timespec};
use std::ffi::CStr;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicPtr, Ordering};

pub(super) type ThreadRoutine = unsafe extern "C-unwind" fn(*mut c_void) -> *mut c_void;
pub(super) type ThreadMain = unsafe extern "C-unwind" fn(*mut c_void) -> c_int;
/// A cancellation point. For `thrd_t` (threads.h), too, which is the same type.
type JoinWith<R> = unsafe extern "C-unwind" fn(pthread_t, R) -> c_int;
pub(super) type Posixly = unsafe extern "C" fn(
    *mut pid_t,
    *const c_char,
    *const libc::posix_spawn_file_actions_t,
    *const libc::posix_spawnattr_t,
    *const *mut c_char,
    *const *mut c_char,
) -> c_int;

/// A function of libc's, of the type `F`.
pub(super) struct Function<F> {
    name: &'static CStr,
    address: AtomicPtr<c_void>,
    kind: PhantomData<F>,
}

impl<F: Copy> Function<F> {
    /// # Safety
    /// `F` is the function pointer type of libc's function of that name.
    const unsafe fn new(name: &'static CStr) -> Function<F> {
        assert!(size_of::<F>() == size_of::<*mut c_void>());
        Function {
            name,
            address: AtomicPtr::new(std::ptr::null_mut()),
            kind: PhantomData,
        }
    }

    /// `None` in a program whose C library does not have it.
    #[inline]
    pub(super) fn get(&self) -> Option<F> {
        let mut address = self.address.load(Ordering::Relaxed);
        if address.is_null() {
            address = self.look_up();
        }
        if address.is_null() {
            return None;
        }
        // SAFETY: the address of a function of this type, by the promise to `new`, which libc has as long as the process.
        Some(unsafe { std::mem::transmute_copy::<*mut c_void, F>(&address) })
    }

    #[cold]
    fn look_up(&self) -> *mut c_void {
        let errno = Errno::last();
        // SAFETY: NUL-terminated names; nothing is loaded that is not, and libc is never unloaded.
        let found = unsafe {
            let libc = libc::dlopen(c"libc.so.6".as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD);
            match libc.is_null() {
                true => libc,
                false => libc::dlsym(libc, self.name.as_ptr()),
            }
        };
        self.address.store(found, Ordering::Relaxed);
        errno.leave();
        found
    }
}

macro_rules! functions {
    ($($name:ident = $symbol:literal: $kind:ty,)*) => {
        $(
            // SAFETY: the type is that of the header.
            pub(super) static $name: Function<$kind> = unsafe { Function::new($symbol) };
        )*

        pub(super) fn look_up_all() {
            $($name.get();)*
        }
    };
}

functions! {
    PTHREAD_CREATE = c"pthread_create":
        unsafe extern "C" fn(*mut pthread_t, *const pthread_attr_t, ThreadRoutine, *mut c_void) -> c_int,
    THRD_CREATE = c"thrd_create": unsafe extern "C" fn(*mut pthread_t, ThreadMain, *mut c_void) -> c_int,
    PTHREAD_JOIN = c"pthread_join": JoinWith<*mut *mut c_void>,
    PTHREAD_TRYJOIN = c"pthread_tryjoin_np": JoinWith<*mut *mut c_void>,
    PTHREAD_TIMEDJOIN = c"pthread_timedjoin_np":
        unsafe extern "C-unwind" fn(pthread_t, *mut *mut c_void, *const timespec) -> c_int,
    PTHREAD_CLOCKJOIN = c"pthread_clockjoin_np":
        unsafe extern "C-unwind" fn(pthread_t, *mut *mut c_void, clockid_t, *const timespec) -> c_int,
    PTHREAD_DETACH = c"pthread_detach": unsafe extern "C" fn(pthread_t) -> c_int,
    PTHREAD_GETATTR = c"pthread_getattr_np":
        unsafe extern "C" fn(pthread_t, *mut pthread_attr_t) -> c_int,
    THRD_JOIN = c"thrd_join": JoinWith<*mut c_int>,
    THRD_DETACH = c"thrd_detach": unsafe extern "C" fn(pthread_t) -> c_int,
    FORK = c"fork": unsafe extern "C" fn() -> pid_t,
    POSIX_SPAWN = c"posix_spawn": Posixly,
    POSIX_SPAWNP = c"posix_spawnp": Posixly,
    // Variadic in C; on this ABI the arguments lie where they lie for a function that takes all seven.
    CLONE = c"clone":
        unsafe extern "C" fn(
            ThreadMain,
            *mut c_void,
            c_int,
            *mut c_void,
            *mut c_void,
            *mut c_void,
            *mut c_void,
        ) -> c_int,
}
