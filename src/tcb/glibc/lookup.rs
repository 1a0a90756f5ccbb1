//! Looking up what glibc exports, one name at a time.

use crate::sys::page_size;
use crate::tcb::error::RuntimeError;
use libc::c_void;
use nix::errno::Errno;
use std::ffi::CStr;

pub(super) fn check(holds: bool, what: &'static str) -> Result<(), RuntimeError> {
    match holds {
        true => Ok(()),
        false => Err(RuntimeError::Unsupported(what)),
    }
}

pub(super) fn unsupported(name: &'static CStr) -> RuntimeError {
    RuntimeError::Unsupported(name.to_str().unwrap_or("a symbol of glibc's"))
}

pub(super) fn address(name: &'static CStr) -> Result<usize, RuntimeError> {
    find(libc::RTLD_DEFAULT, name)
}

pub(super) fn find(handle: *mut c_void, name: &'static CStr) -> Result<usize, RuntimeError> {
    // SAFETY: the name is NUL-terminated; what is searched is loaded, and stays so.
    let found = unsafe { libc::dlsym(handle, name.as_ptr()) };
    found_or_unsupported(found, name).map(|found| found as usize)
}

/// What the loader has found, unless it is null.
fn found_or_unsupported(
    found: *mut c_void,
    name: &'static CStr,
) -> Result<*mut c_void, RuntimeError> {
    if found.is_null() {
        // Not an error that the program is to find.
        // SAFETY: no preconditions.
        unsafe { libc::dlerror() };
        return Err(unsupported(name));
    }
    Ok(found)
}

/// libc itself, for functions that another object of the program can have replaced: a preloaded library, or the
/// program.
pub(super) fn libc_itself() -> Result<*mut c_void, RuntimeError> {
    const NAME: &CStr = c"libc.so.6";
    // SAFETY: the name is NUL-terminated; nothing is loaded that is not.
    let handle = unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    found_or_unsupported(handle, NAME)
}

/// Offset of a field that must have `bits` bits, from libthread_db's descriptor of it: bits, number of elements, offset.
pub(super) fn field_of(name: &'static CStr, bits: u32) -> Result<usize, RuntimeError> {
    // SAFETY: these symbols are constants of type uint32_t[3] (nptl_db's contract).
    let [has, _, offset] = unsafe { (address(name)? as *const [u32; 3]).read() };
    match has == bits {
        true => Ok(offset as usize),
        false => Err(unsupported(name)),
    }
}

/// Whether words can be read there: all of it is mapped, as mincore(2) reports it (or mincore is refused). Before a
/// pointer is followed that only a symbol's word vouches for. Never more than 31 pages.
pub(super) fn is_mapped(address: usize, length: usize) -> bool {
    let page = page_size();
    let start = address & !(page - 1);
    let mut residence = [0_u8; 32];
    let length = length.saturating_add(address - start);
    let is_aligned = address.is_multiple_of(size_of::<usize>());
    if address == 0 || !is_aligned || length > (residence.len() - 1) * page {
        return false;
    }
    // SAFETY: the vector has a byte for each page; whatever the range is, nothing of it is touched.
    let answer = unsafe { libc::mincore(start as *mut c_void, length, residence.as_mut_ptr()) };
    answer == 0 || Errno::last() != Errno::ENOMEM
}

/// The loader's own variables.
pub(super) fn rtld_global() -> Result<usize, RuntimeError> {
    // SAFETY: a pointer variable of libc, set when ld.so started.
    let rtld_global = unsafe { (address(c"__nptl_rtld_global")? as *const usize).read() };
    check(rtld_global != 0, "__nptl_rtld_global is null")?;
    let other = address(c"_rtld_global").is_ok_and(|variable| variable != rtld_global);
    check(!other, "__nptl_rtld_global is not ld.so's")?;
    Ok(rtld_global)
}
