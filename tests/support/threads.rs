//! glibc's own view of its threads, read as libthread_db reads it.

use std::ffi::CStr;

/// The descriptors (`pthread_t`) on glibc's lists of live threads. Without the list's lock: nothing else may be
/// starting or ending threads.
pub fn listed_threads() -> Vec<usize> {
    let symbol = |name: &CStr| {
        // SAFETY: the name is NUL-terminated.
        let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
        assert!(!found.is_null(), "{name:?}");
        found
    };
    let offset = |name: &CStr| {
        // SAFETY: these symbols are of type uint32_t[3]: bits, elements, offset.
        let [_, _, offset] = unsafe { symbol(name).cast::<[u32; 3]>().read() };
        offset as usize
    };
    // SAFETY: a pointer variable of libc.
    let global = unsafe { symbol(c"__nptl_rtld_global").cast::<usize>().read() };
    let link = offset(c"_thread_db_pthread_list");
    let mut found = Vec::new();
    for name in [
        c"_thread_db_rtld_global__dl_stack_user",
        c"_thread_db_rtld_global__dl_stack_used",
    ] {
        let head = global + offset(name);
        // SAFETY: head and elements of a circular list; the caller sees to it that nobody changes it.
        let next = |at: usize| unsafe { (at as *const usize).read() };
        let mut at = next(head);
        while at != head {
            found.push(at - link);
            at = next(at);
        }
    }
    found.sort_unstable();
    found
}
