//! The crate inside a program that has habits of its own.

#[path = "../support/mod.rs"]
mod support;

mod calibration;
