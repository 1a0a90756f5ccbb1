#![no_main]
libfuzzer_sys::fuzz_target!(|text: &[u8]| nptl_fuzz::run("loadavg", text));
