#![no_main]
//! A whole segment file of any bytes: the reader ends or fails, hands out whole commits only, and never runs away.

use inner_universe::datadir::commit::{Frame, SegmentHeader};
use inner_universe::datadir::log::{LogReader, segment_name};
use inner_universe::ids::Offset;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = SegmentHeader { log_version: 1, checksum_algorithm: 0 }.to_bytes().to_vec();
    // One in two inputs is the whole file, header included.
    if data.first().is_some_and(|byte| byte & 1 == 1) {
        bytes.clear();
    }
    bytes.extend_from_slice(data.get(1..).unwrap_or_default());
    std::fs::write(dir.path().join(segment_name(Offset(0))), &bytes).unwrap();
    let Ok(mut reader) = LogReader::open_first(dir.path()) else { return };
    let mut buffer = Vec::new();
    let mut total = 0;
    while let Ok(Some(batch)) = reader.next_batch(4096, &mut buffer) {
        let mut rest = buffer.as_slice();
        while !rest.is_empty() {
            let Frame::Commit(commit) = Frame::parse(batch.log_version, rest) else { panic!("not a whole commit") };
            rest = &rest[commit.bytes.len()..];
        }
        total += batch.commits;
        assert!(total <= 1 << 24, "the reader runs away");
    }
});
