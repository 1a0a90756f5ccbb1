//! What glibc exports: looked up once with dlsym, so that a missing name is a typed error and not
//! a program that does not load. Presence decides, never the version (G21).
//!
//! That is done when the loader loads the object that this crate is part of. A spawn can be made in a callback of
//! dl_iterate_phdr(3), or in a child that was forked while another thread was in one: there the loader's locks are
//! taken, in the child for ever.

use super::dtv::{ENTRY, Refill};
use super::lookup::{
    address, check, field_of, find, is_mapped, libc_itself, rtld_global, unsupported,
};
use crate::sys;
use crate::sys::page_size;
use crate::tcb::error::RuntimeError;
use libc::{c_int, c_void};
use std::ffi::{CStr, c_char};
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

/// The largest TLS segment of libc itself that is handed on; 128 to 144 bytes were seen.
pub(super) const SEGMENT_MAX: usize = 256;

/// Keys in one block of `specific`, and number of such blocks: nptl's two-level table.
pub(super) const KEYS_PER_BLOCK: usize = 32;
pub(super) const KEY_BLOCKS: usize = 32;

/// One block of values.
pub(super) type KeyValues = [KeyValue; KEYS_PER_BLOCK];

/// One value of a thread: `struct pthread_key_data`.
#[repr(C)]
pub(super) struct KeyValue {
    pub sequence: usize,
    pub data: *mut c_void,
}

/// One entry of `__pthread_keys`.
#[repr(C)]
pub(super) struct PthreadKey {
    /// Odd while the key is in use.
    pub sequence: AtomicUsize,
    destructor: AtomicUsize,
}

impl PthreadKey {
    /// The destructor given to pthread_key_create.
    pub(super) fn destructor(&self) -> Option<unsafe extern "C-unwind" fn(*mut c_void)> {
        let address = self.destructor.load(Ordering::Acquire);
        // SAFETY: zero, which is None, or the function pointer that pthread_key_create stored.
        unsafe { std::mem::transmute(address) }
    }
}

/// The rseq area, relative to the thread pointer.
#[derive(Clone, Copy)]
pub(super) struct Rseq {
    pub offset: isize,
    pub size: usize,
}

impl Rseq {
    /// The kernel's first ABI had 32 bytes, and it accepts no less.
    pub(super) fn registered_size(self) -> usize {
        self.size.max(32)
    }

    pub(super) fn range(self) -> Range<isize> {
        self.offset..self.offset + self.registered_size() as isize
    }
}

/// Offset of `cpu_id` in `struct rseq` (uapi/linux/rseq.h).
pub(super) const RSEQ_CPU_ID: usize = 4;
/// `RSEQ_CPU_ID_UNINITIALIZED`: zero would claim "CPU 0, registered".
pub(super) const RSEQ_UNINITIALIZED: i32 = -1;
/// `sizeof (struct __res_state)`, public in resolv.h
pub(super) const RESOLVER_SIZE: usize = 568;
/// `nscount` in the public `struct __res_state` (resolv.h).
pub(super) const RES_STATE_NSCOUNT: usize = 16;
/// `LC_GLOBAL_LOCALE` (locale.h)
pub(super) const LC_GLOBAL_LOCALE: libc::locale_t = -1_isize as libc::locale_t;

unsafe extern "C" {
    pub(super) fn __h_errno_location() -> *mut c_int;
    pub(super) fn __res_state() -> *mut c_void;
    pub(super) fn pthread_attr_getdetachstate(
        attributes: *const libc::pthread_attr_t,
        state: *mut c_int,
    ) -> c_int;
}

type AllocateTls = unsafe extern "C" fn(*mut c_void) -> *mut c_void;
type DeallocateTls = unsafe extern "C" fn(*mut c_void, bool);
type Nullary = unsafe extern "C" fn();
/// Runs destructors of the program's, which can end in pthread_exit(3).
type CallTlsDtors = unsafe extern "C-unwind" fn();
type ResNclose = unsafe extern "C" fn(*mut c_void);
type Create = unsafe extern "C" fn(
    *mut libc::pthread_t,
    *const libc::pthread_attr_t,
    unsafe extern "C" fn(*mut c_void) -> *mut c_void,
    *mut c_void,
) -> c_int;
type Join = unsafe extern "C" fn(libc::pthread_t, *mut *mut c_void) -> c_int;
type GetAttributes = unsafe extern "C" fn(libc::pthread_t, *mut libc::pthread_attr_t) -> c_int;

#[derive(Clone)]
pub(super) struct Symbols {
    pub allocate_tls: AllocateTls,
    pub deallocate_tls: DeallocateTls,
    pub refill: Option<Refill>,
    pub call_tls_dtors: CallTlsDtors,
    pub ctype_init: Nullary,
    pub res_nclose: ResNclose,
    pub create: Create,
    pub join: Join,
    pub get_attributes: GetAttributes,
    pub keys: *const PthreadKey,
    nthreads: *const AtomicI32,
    /// Bytes of all static TLS; on x86-64 the descriptor is part of it.
    pub tls_size: usize,
    pub tls_align: usize,
    /// `sizeof (struct pthread)`
    pub descriptor_size: usize,
    pub rseq: Option<Rseq>,
    /// TLS variable of libc's, relative to the thread pointer.
    pub resp: isize,
    /// libc's own TLS segment (malloc's thread cache and arena, errno, locale, resolver pointer, …), relative to the
    /// thread pointer.
    pub segment: Range<isize>,
    /// Number of libc among the modules with TLS.
    module: usize,
    /// Name of the object that this crate is part of, as the loader has it; empty for the program itself.
    object: *const c_char,
    /// Head of the circular list of live threads on stacks of the user.
    pub user_list: usize,
    // Offsets in the descriptor that libthread_db needs, too.
    pub tid: usize,
    pub dtv: usize,
    pub list: usize,
    pub specific: usize,
    pub cancelhandling: usize,
    pub schedpolicy: usize,
    pub sched_priority: usize,
    pub report_events: usize,
    pub nextevent: usize,
    pub eventbuf: (usize, usize),
}

// SAFETY: constant; what the pointers lead to is glibc's, lives as long as the process, and is accessed atomically
// or not at all.
unsafe impl Send for Symbols {}
// SAFETY: shared, it is only read.
unsafe impl Sync for Symbols {}

static AT_LOAD: OnceLock<Symbols> = OnceLock::new();

/// Called by the loader, before anything else of this crate unless another object's constructor spawns.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK_UP: extern "C" fn() = {
    extern "C" fn look_up() {
        if let Ok(symbols) = Symbols::look_up() {
            let _ = AT_LOAD.set(symbols);
        }
    }
    look_up
};

/// Bits of a list's head, two pointers.
const LIST_BITS: u32 = 2 * usize::BITS;

/// Size and alignment of static TLS, of which the descriptor is a part.
fn static_tls(descriptor_size: usize) -> Result<(usize, usize), RuntimeError> {
    let (mut size, mut align) = (0_usize, 0_usize);
    let info = address(c"_dl_get_tls_static_info")?;
    // SAFETY: signature stable from 2.34 on.
    unsafe {
        let info: unsafe extern "C" fn(*mut usize, *mut usize) = std::mem::transmute(info);
        info(&raw mut size, &raw mut align);
    }
    // What pthread_create wants of a stack, less what it wants besides static TLS.
    let minimum = address(c"__pthread_get_minstack")?;
    // SAFETY: signature stable since 2.15; the attributes are not looked at.
    let minimum = unsafe {
        let minimum: unsafe extern "C" fn(*const libc::pthread_attr_t) -> usize =
            std::mem::transmute(minimum);
        minimum(std::ptr::null())
    };
    let besides = page_size() + libc::PTHREAD_STACK_MIN;
    let known = align.is_power_of_two()
        && size >= descriptor_size
        && size.checked_next_multiple_of(align) == minimum.checked_sub(besides);
    check(known, "static TLS size is implausible")?;
    Ok((size, align))
}

/// The head of the list of live threads on stacks of the user.
fn user_list() -> Result<usize, RuntimeError> {
    let rtld_global = rtld_global()?;
    let list = |name| Ok(rtld_global + field_of(name, LIST_BITS)?);
    let used = list(c"_thread_db_rtld_global__dl_stack_used")?;
    let user = list(c"_thread_db_rtld_global__dl_stack_user")?;
    // Before either is followed: what lies beside the second is taken for the lists' lock.
    let known = used + 2 * size_of::<usize>() == user;
    check(known, "glibc's thread lists do not lie side by side")?;
    Ok(user)
}

impl Symbols {
    /// What was found at load time, or else what there is now.
    pub(super) fn get() -> Result<Symbols, RuntimeError> {
        AT_LOAD.get().cloned().map_or_else(Symbols::look_up, Ok)
    }

    fn look_up() -> Result<Symbols, RuntimeError> {
        // A musl or another libc has no such symbol, and everything below would be a guess there.
        address(c"gnu_get_libc_version")?;
        let descriptor_size = address(c"_thread_db_sizeof_pthread")? as *const u32;
        // SAFETY: a constant of type uint32_t (nptl_db's contract).
        let descriptor_size = unsafe { descriptor_size.read() } as usize;
        let (tls_size, tls_align) = static_tls(descriptor_size)?;
        // A field of `struct pthread`, all of it inside.
        let field_of = |name: &'static CStr, bits: u32| {
            let offset = field_of(name, bits)?;
            match offset + bits as usize / 8 <= descriptor_size {
                true => Ok(offset),
                false => Err(unsupported(name)),
            }
        };
        const EVENT_BUFFER: u32 = 3 * usize::BITS;
        let (segment, module, object) = loaded(tls_size - descriptor_size)?;
        let resp = address(c"__resp")?.wrapping_sub(sys::thread_pointer()) as isize;
        let known = segment.contains(&resp);
        check(known, "__resp outside libc's TLS segment")?;
        let libc = libc_itself()?;
        Ok(Symbols {
            // SAFETY: the thread pointer in, null or the same out, from 2.34 to 2.43.
            allocate_tls: unsafe {
                std::mem::transmute::<usize, AllocateTls>(address(c"_dl_allocate_tls")?)
            },
            refill: Refill::look_up(),
            // SAFETY: the thread pointer, and whether its block is to be freed, from 2.34 to 2.43.
            deallocate_tls: unsafe {
                std::mem::transmute::<usize, DeallocateTls>(address(c"_dl_deallocate_tls")?)
            },
            // SAFETY: neither takes nor gives anything since 2.18.
            call_tls_dtors: unsafe {
                std::mem::transmute::<usize, CallTlsDtors>(address(c"__call_tls_dtors")?)
            },
            // SAFETY: neither takes nor gives anything since 2.12.
            ctype_init: unsafe { std::mem::transmute::<usize, Nullary>(address(c"__ctype_init")?) },
            // SAFETY: public in resolv.h.
            res_nclose: unsafe {
                std::mem::transmute::<usize, ResNclose>(address(c"__res_nclose")?)
            },
            // SAFETY: public in pthread.h.
            create: unsafe { std::mem::transmute::<usize, Create>(find(libc, c"pthread_create")?) },
            // SAFETY: public in pthread.h.
            join: unsafe { std::mem::transmute::<usize, Join>(find(libc, c"pthread_join")?) },
            // SAFETY: public in pthread.h.
            get_attributes: unsafe {
                std::mem::transmute::<usize, GetAttributes>(find(libc, c"pthread_getattr_np")?)
            },
            keys: address(c"__pthread_keys")? as *const PthreadKey,
            nthreads: address(c"__nptl_nthreads")? as *const AtomicI32,
            tls_size,
            tls_align,
            descriptor_size,
            rseq: rseq()?,
            resp,
            segment,
            module,
            object,
            user_list: user_list()?,
            tid: field_of(c"_thread_db_pthread_tid", 32)?,
            dtv: field_of(c"_thread_db_pthread_dtvp", usize::BITS)?,
            list: field_of(c"_thread_db_pthread_list", LIST_BITS)?,
            specific: field_of(
                c"_thread_db_pthread_specific",
                KEY_BLOCKS as u32 * usize::BITS,
            )?,
            cancelhandling: field_of(c"_thread_db_pthread_cancelhandling", 32)?,
            schedpolicy: field_of(c"_thread_db_pthread_schedpolicy", 32)?,
            sched_priority: field_of(c"_thread_db_pthread_schedparam_sched_priority", 32)?,
            report_events: field_of(c"_thread_db_pthread_report_events", 8)?,
            nextevent: field_of(c"_thread_db_pthread_nextevent", usize::BITS)?,
            eventbuf: (
                field_of(c"_thread_db_pthread_eventbuf", EVENT_BUFFER)?,
                EVENT_BUFFER as usize / 8,
            ),
        })
    }

    /// Keeps the shared object that this crate is part of loaded, if it is one (G21): a thread can still
    /// be in its last instructions when a plugin is closed. For the program itself there is nothing to keep.
    pub(super) fn keep_loaded(&self) {
        // SAFETY: a name that the loader keeps for as long as the object is loaded. Nothing is loaded that is not,
        // and the handle is kept for good.
        unsafe {
            if *self.object != 0 {
                let flags = libc::RTLD_LAZY | libc::RTLD_NOLOAD | libc::RTLD_NODELETE;
                libc::dlopen(self.object, flags);
            }
        }
    }

    /// Whether the DTV has libc's segment where it lies in the thread of that thread pointer.
    pub(super) fn finds_segment_in(&self, dtv: usize, tp: usize) -> bool {
        let (first, entry) = (
            dtv.wrapping_sub(ENTRY),
            dtv.wrapping_add(self.module * ENTRY),
        );
        is_mapped(first, (self.module + 2) * ENTRY)
            // SAFETY: mapped and aligned.
            && unsafe { (entry as *const usize).read() } == tp.wrapping_add_signed(self.segment.start)
    }

    /// Bytes of stack for a thread of glibc's that does little.
    pub(super) fn smallest_stack(&self) -> usize {
        const ROOM: usize = 128 * 1024;
        (self.tls_size + self.tls_align + ROOM).next_multiple_of(page_size())
    }

    /// The thread pointer of a block that ends at `end`: where glibc puts it, too.
    pub(super) fn thread_pointer_in(&self, end: usize) -> usize {
        let align = self.tls_align.max(64);
        (end - self.descriptor_size) & !(align - 1)
    }

    /// Whether `__pthread_keys` holds for a key in use what `pthread_key_create` was given.
    pub(super) fn knows_key(
        &self,
        key: libc::pthread_key_t,
        destructor: unsafe extern "C" fn(*mut c_void),
    ) -> bool {
        let place = self.keys.wrapping_add(key as usize);
        if !is_mapped(place as usize, size_of::<PthreadKey>()) {
            return false;
        }
        // SAFETY: mapped, and two words that glibc writes atomically.
        let key = unsafe { &*place };
        key.sequence.load(Ordering::Relaxed) % 2 == 1
            && key.destructor.load(Ordering::Relaxed) == destructor as usize
    }

    /// Whether the calling thread's rseq area lies where it is said to, by the CPU that the kernel writes there.
    ///
    /// # Safety
    /// `tp` is the calling thread's thread pointer, and sizes of descriptor and static TLS are right.
    pub(super) unsafe fn knows_rseq(&self, tp: usize) -> bool {
        // RSEQ_CPU_ID_UNINITIALIZED and RSEQ_CPU_ID_REGISTRATION_FAILED: there is none in this thread.
        const NOT_REGISTERED: Range<i32> = -2..0;
        const ALIGNMENT: isize = 32;
        let Some(rseq) = self.rseq else {
            return true;
        };
        let below = (self.tls_size - self.descriptor_size) as isize;
        let end = rseq.offset.saturating_add(rseq.registered_size() as isize);
        if rseq.offset < -below
            || end > self.descriptor_size as isize
            || rseq.offset % ALIGNMENT != 0
        {
            return false;
        }
        let cpu_id = (tp as isize + rseq.offset) as usize + RSEQ_CPU_ID;
        // The thread can be moved between the two looks.
        (0..100).any(|_| {
            // SAFETY: inside the calling thread's block; the kernel writes it, hence volatile. sched_getcpu
            // has no preconditions.
            let (said, cpu) =
                unsafe { ((cpu_id as *const i32).read_volatile(), libc::sched_getcpu()) };
            said == cpu || NOT_REGISTERED.contains(&said)
        })
    }

    pub(super) fn nthreads(&self) -> &AtomicI32 {
        // SAFETY: a variable of libc, int-sized and only ever accessed atomically.
        unsafe { &*self.nthreads }
    }
}

/// None where glibc has no rseq: before 2.35. Where it is not registered (switched off by a tunable,
/// refused by the kernel, a filter or valgrind), `__rseq_size` is 0, but `sched_getcpu` looks into
/// the area all the same and must find there that it has to call the kernel.
fn rseq() -> Result<Option<Rseq>, RuntimeError> {
    let (Ok(offset), Ok(size)) = (address(c"__rseq_offset"), address(c"__rseq_size")) else {
        return Ok(None);
    };
    // SAFETY: public variables: ptrdiff_t and unsigned int (sys/rseq.h).
    let (offset, size) = unsafe { ((offset as *const isize).read(), (size as *const u32).read()) };
    Ok(Some(Rseq {
        offset,
        size: size as usize,
    }))
}

/// Of the objects that are loaded: libc's TLS segment relative to the thread pointer, which the calling thread has in
/// the `below` bytes before it, libc's number among the modules with TLS, and the name of the object with this code.
fn loaded(below: usize) -> Result<(Range<isize>, usize, *const c_char), RuntimeError> {
    struct Search {
        errno: usize,
        segment: Option<(Range<usize>, usize)>,
        object: *const c_char,
    }
    /// # Safety
    /// Called by dl_iterate_phdr(3) with a `Search` as its data.
    unsafe extern "C" fn visit(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        data: *mut c_void,
    ) -> c_int {
        // SAFETY: dl_iterate_phdr passes a valid description, and `data` is our Search.
        let (info, search) = unsafe { (&*info, &mut *data.cast::<Search>()) };
        for index in 0..usize::from(info.dlpi_phnum) {
            // SAFETY: `dlpi_phnum` headers lie there, and `index` is less.
            let header = unsafe { &*info.dlpi_phdr.add(index) };
            let of = |start: usize| start..start.wrapping_add(header.p_memsz as usize);
            let (tls, code) = (
                of(info.dlpi_tls_data as usize),
                of((info.dlpi_addr + header.p_vaddr) as usize),
            );
            // That of libc is the one which `errno` lies in.
            if header.p_type == libc::PT_TLS && tls.contains(&search.errno) {
                search.segment = Some((tls, info.dlpi_tls_modid));
            } else if header.p_type == libc::PT_LOAD
                && code.contains(&(loaded as *const () as usize))
            {
                search.object = info.dlpi_name;
            }
        }
        0
    }
    let mut search = Search {
        // SAFETY: returns this thread's errno.
        errno: unsafe { libc::__errno_location() } as usize,
        segment: None,
        object: c"".as_ptr(),
    };
    // SAFETY: the callback matches, and `search` outlives the call.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut search).cast()) };
    let found = search.segment;
    let (tls, module) =
        found
            .filter(|(tls, _)| tls.len() <= SEGMENT_MAX)
            .ok_or(RuntimeError::Unsupported(
                "libc's own TLS segment was not found",
            ))?;
    let tp = sys::thread_pointer();
    let start = tls.start.wrapping_sub(tp) as isize;
    let segment = start..start + tls.len() as isize;
    let known = start >= -(below as isize) && segment.end <= 0;
    check(known, "libc's TLS segment outside static TLS")?;
    Ok((segment, module, search.object))
}
