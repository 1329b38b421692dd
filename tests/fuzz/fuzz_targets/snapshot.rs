#![no_main]
//! Snapshot manifests and pages.

use inner_universe::datadir::{page, snapshot::Manifest};
use inner_universe::ids::ContentHash;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = page::content_hash(data);
    let _ = Manifest::parse(data);
    // With the right hash before it, so that the fuzzer reaches what lies behind.
    let mut hashed = ContentHash::of(data).0.to_vec();
    hashed.extend_from_slice(data);
    let _ = Manifest::parse(&hashed);
});
