//! One file for each architecture exports the same handful of functions; a new architecture is one more file and one
//! more line here.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("nptl supports x86-64 only: another architecture is one more file in src/sys/arch/");
