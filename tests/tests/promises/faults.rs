//! A backup whose store fails at any of its steps, before or after the step took effect, leaves what the next one ends.

use std::path::Path;
use std::sync::Arc;

use futures::TryStreamExt as _;
use harness::faulty::{DiesAt, FaultyStore, Flaky, Moment};
use harness::shim::{Fault, Shim};
use harness::sidecar::{Sidecar, path};
use harness::workload::Random;
use inner_universe::clock::SystemClock;
use inner_universe::ids::Offset;
use inner_universe::progress::Silent;
use inner_universe::repository::Repository;
use inner_universe::repository::crypto::Keyring;
use inner_universe::repository::store::Store;
use inner_universe::restore::plan::RestoreRequest;
use inner_universe::restore::target::Target;
use inner_universe::verify::{VerifyOptions, VerifyReport, verify};
use object_store::memory::InMemory;
use object_store::{ObjectStore as _, ObjectStoreExt as _};

use crate::synthetic::{self, Synthetic, log_of, record};

async fn open(
    objects: Arc<dyn object_store::ObjectStore>,
) -> Result<Repository, inner_universe::repository::RepositoryError> {
    Repository::open_or_create_in(Store::around(objects), "memory://", Keyring::default(), &SystemClock).await
}

async fn verified(objects: &Arc<InMemory>) -> VerifyReport {
    let repository = open(objects.clone()).await.expect("a repository");
    verify(&repository, &VerifyOptions::default(), Arc::new(Silent)).await.expect("verify")
}

async fn restores_all(objects: &Arc<InMemory>, synthetic: &Synthetic, last: u64) {
    let repository = open(objects.clone()).await.expect("a repository");
    let to = synthetic.dir.path().join("restored");
    let request = RestoreRequest { target: Target::Latest, ..RestoreRequest::default() };
    let report = synthetic::restore(&repository, &request, &to).await.expect("a restore");
    assert_eq!(report.databases[0].offset, Offset(last));
    std::fs::remove_dir_all(&to).expect("remove");
}

/// Two backups' worth of log and snapshots.
fn life(synthetic: &Synthetic, stage: usize) -> u64 {
    let (end, snapshot, rows) = [(30, 20, 300), (60, 45, 700)][stage];
    let records: Vec<_> = (0..end).map(|n| record(n * 1_000_000, &[7; 900])).collect();
    synthetic.segment(1, 0, &records);
    synthetic.snapshot(snapshot, rows);
    end as u64 - 1
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_dies_at_any_step_is_ended_by_the_next_and_nothing_is_promised_that_is_not_there() {
    for stage in [0, 1] {
        let mut step = 0;
        loop {
            let mut finished = false;
            for moment in [Moment::Before, Moment::After] {
                let synthetic = Synthetic::new();
                let objects = Arc::new(InMemory::new());
                for done in 0..stage {
                    life(&synthetic, done);
                    let repository = open(objects.clone()).await.expect("a repository");
                    synthetic::back_up(&repository, &synthetic.path()).await.expect("a backup");
                }
                let last = life(&synthetic, stage);
                let script = Arc::new(DiesAt::new(step, moment));
                let died = match open(Arc::new(FaultyStore::new(objects.clone(), script.clone()))).await {
                    Ok(repository) => synthetic::back_up(&repository, &synthetic.path()).await.is_err(),
                    Err(_) => true,
                };
                finished |= !died;
                // What is there is whole, whatever is missing.
                let report = verified(&objects).await;
                assert_eq!(
                    (report.findings.as_slice(), report.lost.as_slice()),
                    (&[][..], &[][..]),
                    "stage {stage}, step {step}"
                );
                let repository = open(objects.clone()).await.expect("a repository");
                let report = synthetic::back_up(&repository, &synthetic.path()).await.expect("the next backup");
                assert_eq!(report.problems, Vec::<String>::new(), "stage {stage}, step {step}");
                assert_eq!(report.databases[0].timeline.0, 1, "stage {stage}, step {step}");
                assert_eq!(verified(&objects).await.findings, [], "stage {stage}, step {step}");
                restores_all(&objects, &synthetic, last).await;
            }
            if finished {
                assert!(step >= 5, "a backup has more than {step} steps");
                break;
            }
            step += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_fails_one_request_in_ten_at_any_moment_loses_nothing() {
    let mut random = Random::from_env();
    for _ in 0..12 {
        let synthetic = Synthetic::new();
        let objects = Arc::new(InMemory::new());
        let script = Arc::new(Flaky::new(random.draw(), 100));
        let faulty: Arc<FaultyStore> = Arc::new(FaultyStore::new(objects.clone(), script.clone()));
        let mut last = 0;
        for stage in [0, 1] {
            last = life(&synthetic, stage);
            let mut tries = 0;
            loop {
                tries += 1;
                assert!(tries < 200, "no backup comes through");
                let Ok(repository) = open(faulty.clone()).await else { continue };
                if synthetic::back_up(&repository, &synthetic.path()).await.is_ok() {
                    break;
                }
            }
        }
        script.set(0);
        assert_eq!(verified(&objects).await.findings, []);
        restores_all(&objects, &synthetic, last).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_fails_while_it_writes_pages_leaves_nothing_behind() {
    let synthetic = Synthetic::new();
    let records: Vec<_> = (0..30).map(|n| record(n * 1_000_000, &[7; 900])).collect();
    synthetic.segment(1, 0, &records);
    synthetic.snapshot(20, 20_000);
    let (repository, objects) = synthetic::repository().await;
    synthetic::back_up(&repository, &synthetic.path()).await.expect("a backup");
    let all: Vec<_> = objects.list(None).try_collect().await.expect("a listing");
    let mut packs: Vec<_> =
        all.into_iter().map(|found| found.location).filter(|key| key.as_ref().contains("/packs/")).collect();
    packs.sort();
    assert!(packs.len() > 4, "{packs:?}");
    // While those before it are being written.
    objects.delete(packs.last().expect("a pack")).await.expect("delete it");
    for round in 0..10 {
        let request = RestoreRequest { target: Target::Latest, ..RestoreRequest::default() };
        let restored = synthetic::restore(&repository, &request, &synthetic.dir.path().join("restored")).await;
        assert!(restored.is_err(), "round {round}");
        let left: Vec<_> =
            std::fs::read_dir(synthetic.dir.path()).expect("list").flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(left, ["data"], "round {round}");
    }
}

#[test]
fn a_log_of_many_blocks_is_backed_up_and_restored_though_half_of_the_reads_are_short() {
    let synthetic = Synthetic::new();
    let records: Vec<_> = (0..24_000).map(|n| record(n, format!("row {n} ").repeat(50).as_bytes())).collect();
    synthetic.segment(1, 0, &records);
    let Some(shim) = Shim::new(synthetic.dir.path(), 7) else {
        println!("skipped: there is no C compiler");
        return;
    };
    let dir = |name: &str| synthetic.dir.path().join(name);
    let sidecar = Sidecar::at(&dir("repository")).with_environment(shim.environment(synthetic.dir.path()));
    shim.set(Fault::ShortRead, 500);
    sidecar.backup(&synthetic.path());
    sidecar.restore(&dir("restored"), "latest");
    assert!(shim.faults() > 10, "only {} reads were short", shim.faults());
    let log = |root: &Path| std::fs::read(log_of(root).join("00000000000000000000.stdb.log")).expect("the segment");
    assert!(log(&dir("restored")) == log(&synthetic.path()), "another log came back");
}

#[test]
fn a_restore_whose_disk_fails_to_sync_a_segment_says_which_and_leaves_nothing_behind() {
    let synthetic = Synthetic::new();
    let records: Vec<_> = (0..2_000).map(|n| record(n, format!("row {n} ").repeat(50).as_bytes())).collect();
    synthetic.segment(1, 0, &records);
    let Some(shim) = Shim::new(synthetic.dir.path(), 7) else {
        println!("skipped: there is no C compiler");
        return;
    };
    let dir = |name: &str| synthetic.dir.path().join(name);
    let target = dir("restored");
    // Segments alone, of the target, which is put together beside it.
    let mut environment = shim.environment(&target);
    environment.push(("FAULTY_ENDING".into(), ".stdb.log".into()));
    let sidecar = Sidecar::at(&dir("repository")).with_environment(environment);
    sidecar.backup(&synthetic.path());
    shim.set(Fault::Sync, 1000);
    let entries = || {
        let mut names: Vec<_> = std::fs::read_dir(synthetic.dir.path()).expect("list").flatten().collect();
        names.sort_by_key(std::fs::DirEntry::file_name);
        names.into_iter().map(|entry| entry.file_name()).collect::<Vec<_>>()
    };
    let before = entries();
    let failed = sidecar.run(["restore", "--data-dir", path(&target)]);
    assert_ne!(failed.code, 0, "{}", failed.stderr);
    assert!(failed.stderr.contains("sync ") && failed.stderr.contains(".stdb.log"), "{}", failed.stderr);
    assert_eq!(entries(), before);
    shim.calm();
    sidecar.restore(&target, "latest");
    let log = |root: &Path| std::fs::read(log_of(root).join("00000000000000000000.stdb.log")).expect("the segment");
    assert!(log(&target) == log(&synthetic.path()), "another log came back");
}
