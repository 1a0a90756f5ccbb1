//! `libnptl.so`: the crate with its feature `interpose` as a library for `LD_PRELOAD`. docs/preload.md says what it does.

use nptl as _;
