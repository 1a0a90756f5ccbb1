//! What the fuzz targets run, with their seeds cut and changed at every byte: the short form of `.ci/fuzz`.
#![allow(
    dead_code,
    clippy::wrong_self_convention,
    reason = "the crate's own files, of which the parsers are used"
)]

#[path = "../src/errno.rs"]
mod errno;
#[path = "../fuzz/src/parsers.rs"]
mod parsers;
#[path = "../src/proc/mod.rs"]
mod proc;
#[path = "../src/mem/text.rs"]
mod text;

mod mem {
    pub(crate) use crate::text;
}

#[test]
fn parsers_take_any_bytes() {
    const BYTES: [u8; 12] = *b"\0 \n:-/\\)9f\x80\xff";
    for (_, parse, seed) in parsers::PARSERS {
        parse(b"");
        for at in 0..=seed.len() {
            parse(&seed[..at]);
            parse(&seed[at..]);
            for byte in BYTES {
                let mut text = seed.to_vec();
                text.insert(at, byte);
                parse(&text);
                if let Some(place) = text.get_mut(at + 1) {
                    *place = byte;
                    parse(&text);
                }
                // Overlong: numbers that do not fit, lines without an end.
                let piece = vec![byte; 300];
                text.splice(at..at, piece);
                parse(&text);
            }
        }
    }
}

/// One target for each parser, by the same name.
#[test]
fn every_parser_has_its_target() {
    for (name, ..) in parsers::PARSERS {
        let target = format!("{}/fuzz/fuzz_targets/{name}.rs", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(&target).expect(&target);
        assert!(text.contains(&format!("{name:?}")), "{text}");
    }
}
