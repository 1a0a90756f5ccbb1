//! glibc's own pthread_create and pthread_join, at their best: attributes prepared once, nothing
//! boxed, and after the warm-up round a filled stack cache.

use std::ffi::c_void;
use std::io;
use std::mem::MaybeUninit;

use super::gate::Gate;
use super::{Load, Subject};

/// The subject's name.
pub const NAME: &str = "pthread";

/// glibc's threads of one stack size.
pub struct Pthread {
    attributes: libc::pthread_attr_t,
}

impl Pthread {
    /// Threads with `stack_bytes` usable bytes: glibc takes static TLS and descriptor out of the
    /// size it is given, so those are added.
    pub fn new(stack_bytes: usize) -> io::Result<Pthread> {
        let mut attributes = MaybeUninit::uninit();
        // SAFETY: initialises the attributes, or says that it has not.
        check(unsafe { libc::pthread_attr_init(attributes.as_mut_ptr()) })?;
        // SAFETY: initialised just above.
        let attributes = unsafe { attributes.assume_init() };
        let mut pthread = Pthread { attributes };
        let size = stack_bytes + pthread.static_tls();
        // SAFETY: the attributes are initialised.
        check(unsafe { libc::pthread_attr_setstacksize(&mut pthread.attributes, size) })?;
        Ok(pthread)
    }

    /// In whole pages; 0 where glibc does not say.
    fn static_tls(&self) -> usize {
        type MinStack = unsafe extern "C" fn(*const libc::pthread_attr_t) -> usize;
        // SAFETY: a look-up by a NUL-terminated name.
        let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"__pthread_get_minstack".as_ptr()) };
        if symbol.is_null() {
            return 0;
        }
        // SAFETY: the signature of this glibc symbol since 2.15; std calls it, too.
        let min_stack = unsafe { std::mem::transmute::<*mut c_void, MinStack>(symbol) };
        // SAFETY: the attributes are initialised.
        let bytes = unsafe { min_stack(&self.attributes) };
        bytes
            .saturating_sub(libc::PTHREAD_STACK_MIN)
            .next_multiple_of(4096)
    }
}

impl Drop for Pthread {
    fn drop(&mut self) {
        // SAFETY: initialised in `new`, destroyed once.
        unsafe { libc::pthread_attr_destroy(&mut self.attributes) };
    }
}

impl Subject for Pthread {
    type Handle = libc::pthread_t;

    fn name(&self) -> &'static str {
        NAME
    }

    fn start(&self, body: Load) -> io::Result<libc::pthread_t> {
        let (routine, argument): (extern "C" fn(*mut c_void) -> *mut c_void, _) = match body {
            Load::Empty => (empty, std::ptr::null_mut()),
            Load::Heap => (heap, std::ptr::null_mut()),
            Load::Park(gate) => (park, std::ptr::from_ref(gate).cast_mut().cast()),
        };
        let mut thread = MaybeUninit::uninit();
        // SAFETY: initialised attributes, and an argument as the routine expects it.
        check(unsafe {
            libc::pthread_create(thread.as_mut_ptr(), &self.attributes, routine, argument)
        })?;
        // SAFETY: written by the successful call.
        Ok(unsafe { thread.assume_init() })
    }

    fn join(&self, thread: libc::pthread_t) {
        // SAFETY: a handle from `start`, joined once: `join` takes it by value and callers do not
        // copy it.
        let result = unsafe { libc::pthread_join(thread, std::ptr::null_mut()) };
        assert_eq!(result, 0, "pthread_join");
    }
}

extern "C" fn empty(_: *mut c_void) -> *mut c_void {
    std::ptr::null_mut()
}

extern "C" fn heap(_: *mut c_void) -> *mut c_void {
    super::allocate_and_free();
    std::ptr::null_mut()
}

extern "C" fn park(gate: *mut c_void) -> *mut c_void {
    // SAFETY: `start` passes a 'static gate to this routine.
    unsafe { &*gate.cast::<Gate>() }.wait();
    std::ptr::null_mut()
}

/// The pthread functions return their errno.
fn check(errno: libc::c_int) -> io::Result<()> {
    match errno {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}
