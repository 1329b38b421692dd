//! What a restore point says of databases whose logs are missing or damaged.

use std::path::PathBuf;

use super::*;
use crate::clock::SystemClock;
use crate::datadir::commit::{SegmentHeader, encode};
use crate::datadir::log::segment_name;
use crate::ids::ContentHash;
use crate::progress::Silent;
use crate::repository::RepositoryError;
use crate::repository::crypto::{CryptoError, Keyring};
use crate::repository::store::Store;

/// A server with the databases `first` and `second`, whose replicas are 1 and 2.
struct Instance {
    dir: tempfile::TempDir,
    store: Store,
    repository: Repository,
}

impl Instance {
    async fn new() -> Self {
        Self::sealed_to(Keyring::default()).await
    }

    async fn sealed_to(keys: Keyring) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let control = sled::Config::default().path(dir.path().join("control-db")).open().expect("a control database");
        let insert = |tree: &str, key: &[u8], value: &[u8]| {
            control.open_tree(tree).and_then(|tree| tree.insert(key, value)).expect("insert");
        };
        for (id, name) in [(1u64, "first"), (2, "second")] {
            let identity = [u8::try_from(id).expect("small"); 32];
            let mut database = id.to_le_bytes().to_vec();
            database.extend(identity);
            database.extend([6; 32]);
            database.push(0);
            database.extend([8; 32]);
            let mut replica = id.to_le_bytes().to_vec();
            replica.extend(id.to_le_bytes());
            insert("database", &id.to_be_bytes(), &database);
            insert("reverse_dns", &identity, &serde_json::to_vec(&[name]).expect("JSON"));
            insert("replica", &id.to_be_bytes(), &replica);
        }
        control.flush().expect("flush");
        let store = Store::around(Arc::new(object_store::memory::InMemory::new()));
        let repository = Repository::open_or_create_in(store.clone(), "memory://", keys, &SystemClock).await;
        Self { dir, store, repository: repository.expect("a repository") }
    }

    fn replica(&self, id: u64) -> PathBuf {
        self.dir.path().join("replicas").join(id.to_string())
    }

    /// Writes a log of ten transactions; its file.
    fn write_log(&self, id: u64) -> PathBuf {
        let log = self.replica(id).join("clog");
        std::fs::create_dir_all(&log).expect("create");
        let mut bytes = SegmentHeader { log_version: 1, checksum_algorithm: 0 }.to_bytes().to_vec();
        for offset in 0..10 {
            bytes.extend_from_slice(&encode(1, Offset(offset), 0, 1, &[u8::try_from(id).expect("small"); 40]));
        }
        let path = log.join(segment_name(Offset(0)));
        std::fs::write(&path, bytes).expect("write");
        path
    }

    async fn back_up(&self) -> Result<BackupReport, BackupError> {
        let data = DataDir::open(self.dir.path()).expect("a data directory");
        let options = BackupOptions::default();
        create(&self.repository, &data, &options, Arc::new(SystemClock), Arc::new(Silent)).await
    }
}

fn held(report: &BackupReport) -> Vec<(&str, u64)> {
    report.databases.iter().map(|database| (database.name.as_str(), database.offset.0)).collect()
}

#[tokio::test]
async fn a_missing_log_makes_it_incomplete() {
    let instance = Instance::new().await;
    instance.write_log(1);
    let report = instance.back_up().await.expect("the other is backed up");
    assert_eq!((held(&report), report.complete), (vec![("first", 9)], false));
    assert_eq!(report.problems.len(), 1, "{:?}", report.problems);
    let problem = &report.problems[0];
    assert!(problem.contains("second") && problem.contains("directory") && problem.contains("is missing"), "{problem}");

    std::fs::create_dir_all(instance.replica(2).join("clog")).expect("create");
    let report = instance.back_up().await.expect("the other is backed up");
    assert!(!report.complete && report.problems[0].contains("its log is missing from"), "{:?}", report.problems);

    instance.write_log(2);
    let report = instance.back_up().await.expect("both are backed up");
    assert_eq!((held(&report), report.complete), (vec![("first", 9), ("second", 9)], true));
    assert_eq!(report.problems, Vec::<String>::new());
}

#[tokio::test]
async fn a_vanished_log_keeps_its_archive() {
    let instance = Instance::new().await;
    instance.write_log(1);
    instance.write_log(2);
    instance.back_up().await.expect("both are backed up");
    std::fs::remove_dir_all(instance.replica(2)).expect("remove");
    let report = instance.back_up().await.expect("the other is backed up");
    assert_eq!((held(&report), report.complete), (vec![("first", 9), ("second", 9)], false));
    assert!(report.problems[0].contains("holds it up to transaction 9"), "{:?}", report.problems);
    // Without any log there is nothing to back up.
    std::fs::remove_dir_all(instance.replica(1)).expect("remove");
    let error = instance.back_up().await.expect_err("nothing could be read");
    assert!(matches!(error, BackupError::LogVanished { .. }), "{error}");
}

#[tokio::test]
async fn a_damaged_log_makes_it_incomplete() {
    let instance = Instance::new().await;
    instance.write_log(1);
    let path = instance.write_log(2);
    let good = std::fs::read(&path).expect("read");
    let mut damaged = good.clone();
    let late = damaged.len() - 10;
    damaged[late] ^= 1;
    std::fs::write(&path, &damaged).expect("write");
    let report = instance.back_up().await.expect("what is before it is backed up");
    assert_eq!((held(&report), report.complete), (vec![("first", 9), ("second", 8)], false));
    assert!(report.problems[0].contains("no commit"), "{:?}", report.problems);

    // In the middle of the log: another segment follows.
    std::fs::write(path.with_file_name(segment_name(Offset(10))), &good).expect("write");
    let report = instance.back_up().await.expect("the other is backed up");
    assert!(!report.complete && report.problems[0].contains("is damaged at byte"), "{:?}", report.problems);
    assert_eq!(held(&report), vec![("first", 9), ("second", 8)]);
}

/// Everything that a repository holds, as bytes and as text.
async fn stored(repository: &Repository) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (key, _) in repository.list(&object_store::path::Path::default()).await.expect("a listing") {
        all.push(key.to_string().into_bytes());
        all.push(repository.get(&key).await.expect("an object").to_vec());
    }
    all
}

/// How many of these hashes stand somewhere, as they are or in hexadecimal.
fn found(hashes: &[ContentHash], stored: &[Vec<u8>]) -> usize {
    let stands = |hash: &&ContentHash| {
        let text = hash.to_string();
        let forms = [&hash.0[..], text.as_bytes()];
        stored.iter().any(|bytes| forms.iter().any(|form| bytes.windows(form.len()).any(|window| window == *form)))
    };
    hashes.iter().filter(stands).count()
}

#[tokio::test]
async fn encrypted_archives_hold_no_hash_of_what_they_encrypt() {
    use age::secrecy::ExposeSecret as _;
    let plain = Instance::new().await;
    plain.write_log(1);
    plain.write_log(2);
    plain.back_up().await.expect("a backup");
    let database = Identity([1; 32]);
    let (chain, _) = plain.repository.own_chain(&database, TimelineId::FIRST).await.expect("a chain");
    let header = plain.repository.log_header(&chain.entries[0].key()).await.expect("a header");
    let newest = plain.repository.restore_point_ids().await.expect("restore points")[0];
    let newest = plain.repository.restore_point(newest).await.expect("a restore point");
    let link = header.links[0];
    let hashes = [link.chain, link.last_commit, link.history_after(), newest.instance_state];
    assert_eq!(found(&hashes, &stored(&plain.repository).await), hashes.len(), "the search finds what is there");

    let identity = age::x25519::Identity::generate();
    let recipients = [identity.to_public().to_string()];
    let sealing = || Keyring::new(&recipients, &[]).expect("a keyring");
    let sealed = Instance::sealed_to(sealing()).await;
    sealed.write_log(1);
    sealed.write_log(2);
    sealed.back_up().await.expect("a backup");
    assert_eq!(found(&hashes, &stored(&sealed.repository).await), 0);

    // Without the remembered key or an identity nothing can be continued; an identity opens everything.
    let store = sealed.store.clone();
    let again =
        Instance { repository: Repository::open_in(store.clone(), "", sealing()).await.expect("open"), ..sealed };
    let refused = again.back_up().await.expect_err("no key");
    assert!(matches!(&refused, BackupError::Repository(RepositoryError::Crypto(CryptoError::NoHashKey))), "{refused}");
    let file = again.dir.path().join("identity.txt");
    std::fs::write(&file, identity.to_string().expose_secret()).expect("write");
    let keys = Keyring::new(&[], &[file]).expect("a keyring");
    let again = Instance { repository: Repository::open_in(store, "", keys).await.expect("open"), ..again };
    let report = again.back_up().await.expect("a backup");
    assert_eq!(held(&report), [("first", 9), ("second", 9)]);
    assert_eq!(report.databases[0].timeline, TimelineId::FIRST, "it continues what was archived");
    let (chain, _) = again.repository.own_chain(&database, TimelineId::FIRST).await.expect("a chain");
    let read = crate::restore::log_source::read_all(&again.repository, database, chain.entries).await.expect("a log");
    assert_eq!(read.len() as u64, header.raw_len);
}
