#![no_main]
//! Packs of the repository.

use inner_universe::ids::ContentHash;
use inner_universe::repository::RepositoryError;
use inner_universe::repository::crypto::Keyring;
use inner_universe::repository::pack;
use libfuzzer_sys::fuzz_target;
use object_store::path::Path;

fuzz_target!(|data: &[u8]| {
    let key = Path::from("fuzz.pack");
    let each = |_, _, _: &[u8]| Ok::<_, RepositoryError>(());
    let _ = pack::read(&key, &ContentHash([0; 32]), data, &Keyring::default(), |_| true, each);
    // With a right start and name, so that the fuzzer reaches what lies behind.
    let (bytes, id) = pack::wrap(data.to_vec(), false);
    let _ = pack::read(&key, &id, &bytes, &Keyring::default(), |_| true, each);
});
