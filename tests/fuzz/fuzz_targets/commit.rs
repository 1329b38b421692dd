#![no_main]
//! Commit frames and transaction inputs: nothing panics, and what is accepted reads back the same.

use inner_universe::datadir::commit::{Frame, Inputs, SegmentHeader, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Some(header) = data.first_chunk::<{ SegmentHeader::LEN }>()
        && let Ok(header) = SegmentHeader::parse(header)
    {
        let again = header.to_bytes();
        assert_eq!(SegmentHeader::parse(&again), Ok(header));
    }
    let _ = Inputs::parse(data);
    for version in [0, 1] {
        let mut rest = data;
        while let Frame::Commit(commit) = Frame::parse(version, rest) {
            assert_eq!(encode(version, commit.first, commit.epoch, commit.count, commit.records), commit.bytes);
            let _ = commit.inputs();
            rest = &rest[commit.bytes.len()..];
        }
        // The fuzzer does not find checksums by itself: a frame around its bytes must read back.
        let framed = encode(version, inner_universe::ids::Offset(7), 1, 1, data);
        let Frame::Commit(commit) = Frame::parse(version, &framed) else { panic!("our own frame is refused") };
        assert_eq!(commit.records, data);
        let _ = commit.inputs();
    }
});
