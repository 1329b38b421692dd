#![no_main]
//! The repository's JSON documents and the instance capture.

use inner_universe::ids::ContentHash;
use inner_universe::repository::crypto::Keyring;
use inner_universe::repository::manifest::{RepositoryInfo, RestorePoint, SnapshotManifest, Timeline};
use inner_universe::repository::{document, instance};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = document::read::<RestorePoint>(data);
    let _ = document::read::<SnapshotManifest>(data);
    let signed = document::sign(data.to_vec());
    let _ = document::read::<RestorePoint>(&signed);
    let _ = document::read::<SnapshotManifest>(&signed);
    let _ = document::read::<Timeline>(&signed);
    let _ = document::read::<RepositoryInfo>(&signed);
    let _ = instance::read(&ContentHash::of(data), data, &Keyring::default());
});
