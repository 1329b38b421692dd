#![no_main]
//! Entries of the control database.

use std::collections::BTreeMap;

use inner_universe::datadir::control_db::{Trees, interpret};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut trees = Trees::new();
    for (n, name) in ["database", "reverse_dns", "replica"].into_iter().enumerate() {
        let mut tree = BTreeMap::new();
        for chunk in data.chunks(120).skip(n).step_by(3) {
            let (key, value) = chunk.split_at(chunk.len().min(8));
            tree.insert(key.to_vec(), value.to_vec());
        }
        trees.insert(name.as_bytes().to_vec(), tree);
    }
    let _ = interpret(&trees);
});
