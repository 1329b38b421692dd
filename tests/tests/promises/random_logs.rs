//! Random logs and random damage: what is restored is the log that was there, or an error; never something else.

use std::path::Path;
use std::sync::Arc;

use futures::TryStreamExt as _;
use inner_universe::datadir::commit::Frame;
use inner_universe::datadir::log::LogReader;
use inner_universe::ids::Offset;
use inner_universe::progress::Silent;
use inner_universe::repository::Repository;
use inner_universe::repository::store::Store;
use inner_universe::restore::plan::RestoreRequest;
use inner_universe::restore::target::Target;
use inner_universe::verify::{self, VerifyOptions};
use object_store::{ObjectStore as _, ObjectStoreExt as _};
use proptest::prelude::*;

use crate::synthetic::{self, Synthetic, log_of, record};

/// Each commit's records, one after another.
fn read(log: &Path, from: u64) -> Vec<Vec<u8>> {
    let mut reader = LogReader::open(log, Offset(from)).expect("open the log");
    let (mut buffer, mut records) = (Vec::new(), Vec::new());
    while let Some(batch) = reader.next_batch(1 << 16, &mut buffer).expect("read the log") {
        let mut rest = buffer.as_slice();
        while let Frame::Commit(commit) = Frame::parse(batch.log_version, rest) {
            records.push(commit.records.to_vec());
            rest = &rest[commit.bytes.len()..];
        }
    }
    records
}

#[derive(Debug, Clone)]
struct Segment {
    version: u8,
    records: Vec<Vec<u8>>,
    zstd: bool,
    /// Bytes after the last commit: zeros, or half a write.
    tail: Vec<u8>,
}

fn segments() -> impl Strategy<Value = Vec<Segment>> {
    let payload = prop_oneof![proptest::collection::vec(any::<u8>(), 0..300), Just(vec![0; 5000])];
    let record = (0i64..2_000_000_000_000_000, payload).prop_map(|(time, payload)| record(time, &payload));
    let tail = prop_oneof![Just(Vec::new()), Just(vec![0; 64]), proptest::collection::vec(any::<u8>(), 1..30)];
    let segment = (0..=1u8, proptest::collection::vec(record, 1..30), any::<bool>(), tail)
        .prop_map(|(version, records, zstd, tail)| Segment { version, records, zstd, tail });
    // Logs never go back to an older format.
    proptest::collection::vec(segment, 1..4).prop_map(|mut segments| {
        segments.sort_by_key(|segment| segment.version);
        segments
    })
}

fn write(synthetic: &Synthetic, segments: &[Segment]) -> Vec<Vec<u8>> {
    let (mut all, last) = (Vec::new(), segments.len() - 1);
    for (n, segment) in segments.iter().enumerate() {
        let path = synthetic.segment(segment.version, all.len() as u64, &segment.records);
        let mut bytes = std::fs::read(&path).expect("read back");
        bytes.extend(&segment.tail);
        if segment.zstd && n < last {
            bytes = zstd::encode_all(bytes.as_slice(), 0).expect("compress");
        }
        std::fs::write(&path, bytes).expect("write");
        all.extend(segment.records.clone());
    }
    all
}

fn at(offset: u64) -> RestoreRequest {
    RestoreRequest { target: Target::Offset(Offset(offset)), ..RestoreRequest::default() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_log_comes_back_cut_at_any_offset(segments in segments(), cut in any::<proptest::sample::Index>()) {
        let synthetic = Synthetic::new();
        let all = write(&synthetic, &segments);
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let (repository, _) = synthetic::repository().await;
            let report = synthetic::back_up(&repository, &synthetic.path()).await.expect("back up");
            prop_assert_eq!(report.databases[0].offset.0 + 1, all.len() as u64);
            let offset = cut.index(all.len());
            let target = synthetic.dir.path().join("restored");
            let report = synthetic::restore(&repository, &at(offset as u64), &target).await.expect("restore");
            prop_assert_eq!(report.databases[0].offset, Offset(offset as u64));
            prop_assert!(read(&log_of(&target), 0)[..] == all[..=offset], "another log was restored");
            Ok(())
        })?;
    }

    #[test]
    fn damage_is_an_error_or_changes_nothing(
        segments in segments(),
        object in any::<proptest::sample::Index>(),
        place in any::<proptest::sample::Index>(),
        kind in 0..4u8,
    ) {
        let synthetic = Synthetic::new();
        let all = write(&synthetic, &segments);
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            let (repository, store) = synthetic::repository().await;
            synthetic::back_up(&repository, &synthetic.path()).await.expect("back up");
            let mut keys: Vec<_> = store.list(None).map_ok(|object| object.location).try_collect().await.expect("list");
            keys.sort();
            let key = &keys[object.index(keys.len())];
            let mut bytes = store.get(key).await.expect("get").bytes().await.expect("bytes").to_vec();
            let place = place.index(bytes.len());
            match kind {
                0 => bytes[place] ^= 1 << (place % 8),
                1 => bytes.truncate(place),
                2 => bytes.push(0),
                _ => {}
            }
            if kind == 3 {
                store.delete(key).await.expect("delete");
            } else {
                store.put(key, bytes.into()).await.expect("put");
            }
            let target = synthetic.dir.path().join("restored");
            let url = "memory://";
            let opened = Repository::open_in(Store::around(store.clone()), url, Default::default()).await;
            if let Ok(repository) = opened {
                let found = verify::verify(&repository, &VerifyOptions::default(), Arc::new(Silent)).await.expect("verify");
                // A restore point that is gone altogether leaves nothing behind that could be missed.
                let forgotten = kind == 3 && key.as_ref().starts_with("restore-points");
                prop_assert!(forgotten || !found.findings.is_empty(), "{} was damaged and not found", key);
                match synthetic::restore(&repository, &RestoreRequest::default(), &target).await {
                    Ok(_) => prop_assert!(read(&log_of(&target), 0) == all, "{} was damaged and something else restored", key),
                    Err(_) => prop_assert!(!target.exists(), "a failed restore left something"),
                }
            }
            let left = std::fs::read_dir(synthetic.dir.path()).expect("list").count();
            prop_assert!(left <= 2, "a restore left its scratch directory");
            Ok(())
        })?;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_of_several_transactions_is_not_cut() {
    use inner_universe::datadir::commit::{SegmentHeader, encode};
    use inner_universe::datadir::log::segment_name;
    let synthetic = Synthetic::new();
    let mut bytes = SegmentHeader { log_version: 1, checksum_algorithm: 0 }.to_bytes().to_vec();
    for (first, count) in [(0, 1), (1, 3), (4, 1)] {
        bytes.extend(encode(1, Offset(first), 0, count, &record(first as i64 * 10, b"x")));
    }
    std::fs::write(synthetic.log().join(segment_name(Offset(0))), bytes).expect("write");
    let (repository, _) = synthetic::repository().await;
    synthetic::back_up(&repository, &synthetic.path()).await.expect("back up");
    for (wanted, given) in [(0, 0), (1, 0), (2, 0), (3, 3), (4, 4)] {
        let target = synthetic.dir.path().join(format!("restored-{wanted}"));
        let report = synthetic::restore(&repository, &at(wanted), &target).await.expect("restore");
        assert_eq!(report.databases[0].offset, Offset(given), "wanted {wanted}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_steps_back_does_not_confuse_a_time() {
    let synthetic = Synthetic::new();
    // Offsets 0 to 5; the clock steps back at 3.
    let times = [100, 200, 300, 250, 260, 400];
    synthetic.segment(1, 0, &times.map(|time| record(time, b"x")));
    let (repository, _) = synthetic::repository().await;
    synthetic::back_up(&repository, &synthetic.path()).await.expect("back up");
    for (time, expected) in [(100, Some(0)), (299, Some(1)), (250, Some(1)), (300, Some(4)), (400, Some(5)), (99, None)]
    {
        let time = jiff::Timestamp::from_microsecond(time).expect("a time");
        let request = RestoreRequest { target: Target::Time(time), ..RestoreRequest::default() };
        let plan = inner_universe::restore::plan::plan(&repository, &request).await;
        let found = plan.ok().map(|plan| plan.databases[0].offset.0);
        assert_eq!(found, expected, "at {time}");
    }
}
