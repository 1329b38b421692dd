//! Our readers and writers against the official crates: what those write is read the same, what we cut they accept.

use std::num::NonZeroU16;
use std::path::Path;

use harness::oracle;
use harness::synthetic::table;
use inner_universe::datadir::commit::{Frame, encode};
use inner_universe::datadir::log::LogReader;
use inner_universe::datadir::snapshot;
use inner_universe::ids::Offset;
use inner_universe::restore::plan::RestoreRequest;
use inner_universe::restore::target::Target;
use proptest::prelude::*;
use spacetimedb_commitlog::{Commitlog, Options};
use spacetimedb_paths::FromPathUnchecked as _;
use spacetimedb_paths::server::{CommitLogDir, SnapshotsPath};
use spacetimedb_sats::{AlgebraicValue, ProductValue, product};
use spacetimedb_snapshot::SnapshotRepository;
use spacetimedb_table::blob_store::HashMapBlobStore;
use spacetimedb_table::page_pool::PagePool;

use crate::synthetic::{self, Synthetic, log_of, record};

/// Each commit as both readers must see it: offset, epoch, count, records.
type Commit = (u64, u64, u16, Vec<u8>);

fn ours(dir: &Path) -> Vec<Commit> {
    let mut reader = LogReader::open_first(dir).expect("open");
    let (mut buffer, mut commits) = (Vec::new(), Vec::new());
    while let Some(batch) = reader.next_batch(1 << 14, &mut buffer).expect("read") {
        let mut rest = buffer.as_slice();
        while let Frame::Commit(commit) = Frame::parse(batch.log_version, rest) {
            commits.push((commit.first.0, commit.epoch, commit.count, commit.records.to_vec()));
            rest = &rest[commit.bytes.len()..];
        }
    }
    commits
}

fn theirs(dir: &Path) -> Vec<Commit> {
    let commits = spacetimedb_commitlog::commits(CommitLogDir::from_path_unchecked(dir)).expect("open");
    let commit =
        |commit: spacetimedb_commitlog::StoredCommit| (commit.min_tx_offset, commit.epoch, commit.n, commit.records);
    commits.map(|found| commit(found.expect("a commit"))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_log_that_the_official_crate_writes_reads_the_same_and_our_cuts_of_it_are_accepted(
        rows in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 2..80),
        per_commit in 1..4u16,
        segment_size in 200..4000u64,
        epoch in 0..3u64,
        compress in any::<bool>(),
        cut in any::<proptest::sample::Index>(),
    ) {
        let synthetic = Synthetic::new();
        let options = Options {
            max_segment_size: segment_size,
            max_records_in_commit: NonZeroU16::new(per_commit).expect("not zero"),
            ..Options::default()
        };
        {
            let log: Commitlog<ProductValue> =
                Commitlog::open(CommitLogDir::from_path_unchecked(synthetic.log()), options).expect("open");
            log.set_epoch(epoch).expect("set the epoch");
            for row in &rows {
                log.append_maybe_flush(product![AlgebraicValue::Bytes(row.clone().into())]).expect("append");
            }
            log.flush_and_sync().expect("flush");
            if compress {
                let mut offsets = log.existing_segment_offsets().expect("list");
                offsets.pop();
                log.compress_segments(&offsets).expect("compress");
            }
        }
        let expected = theirs(&synthetic.log());
        prop_assert!(ours(&synthetic.log()) == expected, "the readers disagree");
        prop_assert_eq!(expected.iter().map(|(.., n, _)| u64::from(*n)).sum::<u64>(), rows.len() as u64);

        // Back it up, restore at a commit's end, and let the official crate open, read and go on writing.
        let commit = cut.index(expected.len());
        let (first, _, count, _) = &expected[commit];
        let last = first + u64::from(*count) - 1;
        let target = synthetic.dir.path().join("restored");
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let (repository, _) = synthetic::repository().await;
            synthetic::back_up(&repository, &synthetic.path()).await.expect("back up");
            let request = RestoreRequest { target: Target::Offset(Offset(last)), ..RestoreRequest::default() };
            synthetic::restore(&repository, &request, &target).await.expect("restore");
        });
        let restored = log_of(&target);
        prop_assert!(theirs(&restored) == expected[..=commit], "the official reader sees another log");
        let log: Commitlog<ProductValue> =
            Commitlog::open(CommitLogDir::from_path_unchecked(&restored), options).expect("the official crate opens it");
        prop_assert_eq!(log.max_committed_offset(), Some(last));
        log.append_maybe_flush(product![AlgebraicValue::Bytes(vec![1].into())]).expect("append");
        log.flush_and_sync().expect("flush");
        drop(log);
        prop_assert_eq!(ours(&restored).len(), commit + 2);
        prop_assert_eq!(oracle::last_offset(&restored), Some(last + 1));
    }
}

/// The official crate still reads version 0 but no longer writes it: it would put an epoch into every commit.
#[test]
fn a_log_of_version_0_reads_the_same() {
    let synthetic = Synthetic::new();
    let records: Vec<_> = (0..50).map(|n| record(n * 7, format!("transaction {n}").as_bytes())).collect();
    synthetic.segment(0, 0, &records[..30]);
    synthetic.segment(1, 30, &records[30..]);
    assert_eq!(ours(&synthetic.log()), theirs(&synthetic.log()));
    assert_eq!(ours(&synthetic.log()).len(), 50);
}

/// A server of 1.2.0 whose write failed has written a commit again, and ignores the repetition when it reads.
#[test]
fn a_commit_that_stands_twice_reads_the_same() {
    let synthetic = Synthetic::new();
    let records: Vec<_> = (0..14).map(|n| record(n * 7, format!("transaction {n}").as_bytes())).collect();
    let first = synthetic.segment(1, 0, &records[..10]);
    let mut bytes = std::fs::read(&first).expect("read");
    bytes.extend(encode(1, Offset(9), 0, 1, &records[9]));
    std::fs::write(&first, bytes).expect("write");
    synthetic.segment(1, 10, &records[10..12]);
    synthetic.segment(1, 11, &records[11..]);
    let expected = theirs(&synthetic.log());
    assert_eq!(expected.len(), 14);
    assert_eq!(ours(&synthetic.log()), expected);

    let target = synthetic.dir.path().join("restored");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let (repository, _) = synthetic::repository().await;
        let report = synthetic::back_up(&repository, &synthetic.path()).await.expect("back up");
        assert_eq!(report.problems, [""; 0]);
        // The next backup finds the log where it left it.
        let again = synthetic::back_up(&repository, &synthetic.path()).await.expect("back up again");
        assert_eq!((again.databases[0].timeline.0, again.databases[0].offset), (1, Offset(13)));
        synthetic::restore(&repository, &RestoreRequest::default(), &target).await.expect("restore");
    });
    assert_eq!(theirs(&log_of(&target)), expected);
}

#[test]
fn snapshots_that_the_official_crate_writes_read_the_same() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (pool, mut blobs) = (PagePool::new_for_test(), HashMapBlobStore::default());
    let identity = spacetimedb_lib::Identity::from_byte_array([9; 32]);
    let repository =
        SnapshotRepository::open(SnapshotsPath::from_path_unchecked(dir.path()), identity, 4).expect("open");
    let mut first = table(&pool, &mut blobs, 0..3000);
    repository.create_snapshot(std::iter::once(&mut first), &blobs, 17).expect("the first snapshot");
    // The second shares the pages that did not change.
    for id in 3000..4000u64 {
        first.insert(&pool, &mut blobs, &product![id, "later"]).expect("insert");
    }
    let path = repository.create_snapshot(std::iter::once(&mut first), &blobs, 42).expect("the second snapshot");

    for compressed in [false, true] {
        if compressed {
            let older = (17, repository.snapshot_dir_path(17));
            SnapshotRepository::compress_snapshot(None, &older).expect("compress the first");
            SnapshotRepository::compress_snapshot(Some(&older), &(42, repository.snapshot_dir_path(42)))
                .expect("compress");
        }
        let found = snapshot::list(dir.path()).expect("list");
        assert_eq!(found.iter().map(|snapshot| snapshot.offset.0).collect::<Vec<_>>(), [17, 42]);
        for ours in found {
            let (manifest, _) = ours.manifest().expect("our reading");
            let offset = manifest.offset.0;
            let theirs = repository.read_snapshot(offset, &pool).expect("the official reading");
            assert_eq!(theirs.tx_offset, offset);
            assert_eq!((manifest.replica_id, manifest.identity.to_string()), (4, identity.to_hex().to_string()));
            let runtime = tokio::runtime::Runtime::new().expect("a runtime");
            let official = runtime.block_on(repository.verify_snapshot(offset)).expect("the official check");
            let mut expected: Vec<[u8; 32]> = official.objects().map(|hash| *hash.as_bytes()).collect();
            expected.sort_unstable();
            expected.dedup();
            let mut hashes: Vec<[u8; 32]> = manifest.objects.iter().map(|(hash, _)| hash.0).collect();
            hashes.sort_unstable();
            assert_eq!(hashes, expected);
            assert!(manifest.objects.iter().any(|(_, kind)| *kind == snapshot::ObjectKind::Blob));
            for (hash, kind) in &manifest.objects {
                ours.object(hash, *kind).expect("every object is what its name says");
            }
        }
    }
    // A snapshot that is being written is not listed, and a damaged page is found.
    std::fs::write(path.0.with_extension("lock"), "").expect("lock");
    assert_eq!(snapshot::list(dir.path()).expect("list").len(), 1);
    let found = snapshot::list(dir.path()).expect("list").remove(0);
    let (manifest, _) = found.manifest().expect("a manifest");
    let mut damaged = 0;
    for (hash, kind) in &manifest.objects {
        let path = found.path().join(snapshot::object_path(hash));
        let whole = found.object(hash, *kind).expect("an object");
        let good = std::fs::read(&path).expect("read");
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 4;
        std::fs::remove_file(&path).expect("remove");
        std::fs::write(&path, &bad).expect("write");
        // A flipped bit may change nothing, in zstd's own framing; other bytes are never handed out.
        match found.object(hash, *kind) {
            Ok(bytes) => assert!(bytes == whole, "damage in {hash} is not seen"),
            Err(_) => damaged += 1,
        }
        std::fs::write(&path, &good).expect("write");
    }
    assert!(damaged > 0);
}
