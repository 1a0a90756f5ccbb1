//! Memory that needs no heap, or survives a heap without memory.

pub(crate) mod text;
