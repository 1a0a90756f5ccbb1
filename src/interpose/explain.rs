//! Mode `explain`: every call goes to libc.

use libc::{c_int, c_void, pthread_attr_t, pthread_t};
use std::ffi::CStr;
use std::sync::OnceLock;

pub(super) type Routine = unsafe extern "C-unwind" fn(*mut c_void) -> *mut c_void;
type Create =
    unsafe extern "C" fn(*mut pthread_t, *const pthread_attr_t, Routine, *mut c_void) -> c_int;

/// libc's own functions.
pub(super) struct Libc {
    pub(super) pthread_create: Create,
}

static LIBC: OnceLock<Option<Libc>> = OnceLock::new();

impl Libc {
    pub(super) fn get() -> Option<&'static Libc> {
        LIBC.get_or_init(|| {
            // SAFETY: NUL-terminated names; nothing is loaded that is not. The signature is that of pthread.h.
            unsafe {
                let handle =
                    libc::dlopen(c"libc.so.6".as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD);
                let find = |name: &CStr| {
                    let found = libc::dlsym(handle, name.as_ptr());
                    (!found.is_null()).then_some(found)
                };
                Some(Libc {
                    pthread_create: std::mem::transmute::<*mut c_void, Create>(find(
                        c"pthread_create",
                    )?),
                })
            }
        })
        .as_ref()
    }
}
