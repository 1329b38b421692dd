#![no_main]
//! Log objects of the repository.

use inner_universe::ids::{ContentHash, Identity, Offset, TimelineId};
use inner_universe::repository::crypto::Keyring;
use inner_universe::repository::log_object::{LogHeader, decode};
use inner_universe::repository::paths;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let key = paths::log(&Identity([0; 32]), TimelineId(1), 0, Offset(0), Offset(1));
    let _ = decode(&key, data, &Keyring::default());
    // With a right header hash, so that the fuzzer reaches what lies behind.
    let mut object = data.to_vec();
    if let Some(len) = LogHeader::len_of(data)
        && let Some(at) = len.checked_sub(32)
        && at <= data.len()
    {
        let hash = ContentHash::of(&object[..at]);
        object.truncate(at);
        object.extend_from_slice(&hash.0);
        object.extend_from_slice(data.get(len..).unwrap_or_default());
    }
    if let Ok(header) = LogHeader::parse(&object) {
        assert_eq!(LogHeader::parse(&header.to_bytes()).as_ref(), Ok(&header));
        let key = paths::log(&header.database, header.timeline, header.level, header.first, header.last);
        let _ = decode(&key, &object, &Keyring::default());
    }
});
