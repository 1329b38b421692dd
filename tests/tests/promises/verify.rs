//! Verify finds every flipped bit and names exactly what a lost object costs; what is not lost can be restored.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use harness::stage::{Stage, fill};
use harness::tools;
use harness::workload::Random;
use inner_universe::clock::SystemClock;
use inner_universe::config::RepositoryConfig;
use inner_universe::ids::{ContentHash, Identity, Offset, RestorePointId};
use inner_universe::progress::Silent;
use inner_universe::repository::crypto::Keyring;
use inner_universe::repository::manifest::SnapshotManifest;
use inner_universe::repository::store::Store;
use inner_universe::repository::{Repository, document, paths};
use inner_universe::restore::apply::ApplyOptions;
use inner_universe::restore::plan::{RestoreRequest, plan};
use inner_universe::restore::target::Target;
use inner_universe::restore::{RestoreError, restore};
use inner_universe::verify::{VerifyOptions, VerifyReport, verify};
use object_store::ObjectStoreExt as _;
use object_store::memory::InMemory;
use object_store::path::Path as Key;

use crate::synthetic::{self, Synthetic, record};

const DATABASE: Identity = Identity([5; 32]);
const LAST: u64 = 29;

/// Three restore points, two snapshots, a fork, a pin.
struct Small {
    synthetic: Synthetic,
    objects: Arc<InMemory>,
    points: Vec<RestorePointId>,
}

async fn small() -> Small {
    let synthetic = Synthetic::new();
    let (repository, objects) = synthetic::repository().await;
    let records: Vec<_> = (0..=LAST as i64).map(|n| record(n * 1_000_000, b"payload")).collect();
    let mut points = Vec::new();
    for (end, snapshot) in [(10, None), (20, Some((14, 500))), (30, Some((24, 900)))] {
        synthetic.segment(1, 0, &records[..end]);
        if let Some((offset, rows)) = snapshot {
            synthetic.snapshot(offset, rows);
        }
        let report = synthetic::back_up(&repository, &synthetic.path()).await.expect("a backup");
        assert_eq!(report.problems, Vec::<String>::new());
        points.push(report.restore_point);
    }
    repository.pin(points[0], jiff::Timestamp::now()).await.expect("a pin");
    Small { synthetic, objects, points }
}

async fn open(objects: &Arc<InMemory>) -> Result<Repository, inner_universe::repository::RepositoryError> {
    Repository::open_in(Store::around(objects.clone()), "memory://", Keyring::default()).await
}

async fn verified(repository: &Repository) -> VerifyReport {
    verify(repository, &VerifyOptions::default(), Arc::new(Silent)).await.expect("verify")
}

/// Every file below a directory by its content.
fn contents(dir: &Path) -> BTreeMap<String, ContentHash> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(next) = dirs.pop() {
        for entry in std::fs::read_dir(&next).expect("list").flatten() {
            let path = entry.path();
            // sled writes its files anew whenever it is opened.
            if path.ends_with("control-db") {
                continue;
            } else if path.is_dir() {
                dirs.push(path);
            } else {
                let name = path.strip_prefix(dir).expect("below").display().to_string();
                found.insert(name, ContentHash::of(&std::fs::read(&path).expect("read")));
            }
        }
    }
    found
}

async fn restored(
    repository: &Repository,
    to: &Path,
    target: Target,
    no_snapshot: bool,
) -> Result<BTreeMap<String, ContentHash>, RestoreError> {
    let request = RestoreRequest { target, no_snapshot, ..RestoreRequest::default() };
    let plan = plan(repository, &request).await?;
    let options = ApplyOptions::to(to.to_owned());
    restore(repository, request, plan, &options, Arc::new(SystemClock), Arc::new(Silent)).await?;
    let found = contents(to);
    std::fs::remove_dir_all(to).expect("remove");
    Ok(found)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_flipped_bit_is_found_and_no_restore_differs_without_a_word() {
    let flips = if tools::all() { 10_000 } else { 700 };
    let mut random = Random::from_env();
    let small = small().await;
    let repository = open(&small.objects).await.expect("open");
    assert_eq!(verified(&repository).await.findings, []);
    let to = small.synthetic.dir.path().join("restored");
    let truth = restored(&repository, &to, Target::Latest, false).await.expect("a restore");
    let plain = restored(&repository, &to, Target::Latest, true).await.expect("a restore");
    let mut kinds: BTreeMap<String, Vec<Key>> = BTreeMap::new();
    for (key, _) in repository.list(&Key::default()).await.expect("a listing") {
        let kind =
            ["restore-points", "instance", "timeline.json", "/log/", "snapshots", "packs", "pins", "repository.json"];
        let kind = kind.iter().find(|kind| key.as_ref().contains(*kind));
        kinds.entry(kind.unwrap_or_else(|| panic!("{key} is of no kind")).to_string()).or_default().push(key);
    }
    assert_eq!(kinds.len(), 8, "{kinds:?}");
    let kinds: Vec<_> = kinds.into_iter().collect();
    let (mut refused, mut same) = (0, 0);
    for flip in 0..flips {
        let (_, keys) = &kinds[flip % kinds.len()];
        let key = &keys[random.below(keys.len() as u64) as usize];
        let good = small.objects.get(key).await.expect("get").bytes().await.expect("bytes");
        let mut bad = good.to_vec();
        let bit = random.below(bad.len() as u64 * 8) as usize;
        bad[bit / 8] ^= 1 << (bit % 8);
        small.objects.put(key, bad.into()).await.expect("put");
        match open(&small.objects).await {
            Ok(repository) => {
                let report = verified(&repository).await;
                assert!(!report.findings.is_empty(), "bit {bit} of {key} was flipped and not found");
                if flip % 20 < 8 {
                    match restored(&repository, &to, Target::Latest, false).await {
                        Ok(found) => {
                            same += 1;
                            assert!(
                                found == truth || found == plain || is_older(&found),
                                "bit {bit} of {key}: another state"
                            );
                        }
                        Err(_) => refused += 1,
                    }
                }
            }
            Err(_) => assert_eq!(key.as_ref(), "repository.json", "bit {bit}"),
        }
        small.objects.put(key, good.into()).await.expect("put back");
    }
    println!("of the restores tried, {refused} were refused and {same} were right");
    assert!(refused > 0 && same > 0);
}

/// The same log with the older snapshot before it.
fn is_older(found: &BTreeMap<String, ContentHash>) -> bool {
    found.keys().any(|name| name.contains("00000000000000000014.snapshot_dir"))
        && !found.keys().any(|name| name.contains("00000000000000000024.snapshot_dir"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_object_costs_exactly_what_verify_names_and_everything_else_is_restorable() {
    let small = small().await;
    let repository = open(&small.objects).await.expect("open");
    let to = small.synthetic.dir.path().join("restored");
    let keys: Vec<Key> =
        repository.list(&Key::default()).await.expect("a listing").into_iter().map(|(key, _)| key).collect();
    let mut costly = 0;
    for key in keys.iter().filter(|key| key.as_ref() != "repository.json") {
        let good = small.objects.get(key).await.expect("get").bytes().await.expect("bytes");
        small.objects.delete(key).await.expect("delete");
        let report = verified(&repository).await;
        let is_lost = |offset: u64| report.lost.iter().any(|lost| lost.first.0 <= offset && offset <= lost.last.0);
        assert!(report.lost.iter().all(|lost| lost.database == DATABASE), "{key}");
        for offset in 0..=LAST {
            let result = restored(&repository, &to, Target::Offset(Offset(offset)), false).await;
            assert_eq!(
                result.is_err(),
                is_lost(offset),
                "{key} is gone, transaction {offset}: {:?}, {:?}",
                result.err().map(|e| e.to_string()),
                report.lost
            );
        }
        for (n, point) in small.points.iter().enumerate() {
            let offset = [9, 19, 29][n];
            let result = restored(&repository, &to, Target::Point(*point), false).await;
            let has_gone = *key == paths::restore_point(*point);
            assert_eq!(
                result.is_err(),
                has_gone || is_lost(offset),
                "{key} is gone, restore point {n}: {:?}",
                result.err().map(|e| e.to_string())
            );
        }
        costly += u64::from(!report.lost.is_empty());
        // What costs something is a finding; so is what a document names.
        let kinds = ["/log/", "packs", "timeline.json", "instance"];
        if kinds.iter().any(|kind| key.as_ref().contains(kind)) {
            assert!(!report.findings.is_empty(), "{key} is gone and not found");
        }
        small.objects.put(key, good.into()).await.expect("put back");
    }
    assert!(costly >= 3, "only {costly} objects were worth anything");
    assert_eq!(verified(&repository).await.findings, []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_snapshot_that_is_still_on_the_disk_is_archived_anew_by_the_next_backup() {
    let small = small().await;
    let repository = open(&small.objects).await.expect("open");
    let to = small.synthetic.dir.path().join("restored");
    let whole = restored(&repository, &to, Target::Latest, false).await.expect("a restore");
    let listed = repository.list(&Key::default()).await.expect("a listing");
    let (document, _) = listed.iter().rfind(|(key, _)| key.as_ref().contains("/snapshots/")).expect("a snapshot");
    let read = async |key: &Key| small.objects.get(key).await.expect("get").bytes().await.expect("bytes");
    for (is_pack, is_cut) in [(false, true), (false, false), (true, true), (true, false)] {
        let manifest: SnapshotManifest = document::read(&read(document).await).expect("the snapshot");
        let packs = manifest.packs.iter().map(|used| paths::pack(&DATABASE, used.pack));
        for bad in if is_pack { packs.collect() } else { vec![document.clone()] } {
            let good = read(&bad).await;
            match is_cut {
                true => small.objects.put(&bad, good.slice(..good.len() / 2).into()).await.map(|_| ()).expect("put"),
                false => small.objects.delete(&bad).await.expect("delete"),
            }
            let without = restored(&repository, &to, Target::Latest, false).await;
            assert!(without.is_err() || without.is_ok_and(|found| found != whole), "nothing is lost with {bad}");
            let report = synthetic::back_up(&repository, &small.synthetic.path()).await.expect("a backup");
            assert_eq!(report.problems, Vec::<String>::new(), "{bad}");
            let healed = restored(&repository, &to, Target::Latest, false).await.expect("a restore");
            assert!(healed == whole, "after {bad} was damaged another database comes back");
            let kept = repository.list(&Key::from("damaged")).await.expect("a listing");
            let replaced = [&bad, document];
            let is_kept = kept.iter().any(|(kept, _)| replaced.iter().any(|key| kept.as_ref().ends_with(key.as_ref())));
            assert!(is_kept || !is_cut, "{bad}: {kept:?}");
            for (key, _) in kept {
                small.objects.delete(&key).await.expect("delete");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sample_reads_a_share_of_the_bodies_and_finds_what_is_missing_without_any() {
    let small = small().await;
    let repository = open(&small.objects).await.expect("open");
    let none = VerifyOptions { read_data: 0, ..VerifyOptions::default() };
    let report = verify(&repository, &none, Arc::new(Silent)).await.expect("verify");
    assert_eq!((report.findings.as_slice(), report.read_data), (&[][..], 0));
    let all = verified(&repository).await;
    assert!(report.objects < all.objects, "{} of {}", report.objects, all.objects);
    let packs = repository.list(&paths::packs(&DATABASE)).await.expect("a listing");
    small.objects.delete(&packs[0].0).await.expect("delete");
    let report = verify(&repository, &none, Arc::new(Silent)).await.expect("verify");
    assert_eq!(report.findings.len(), 1, "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn flipped_bits_in_exports_programs_deployments_drills_and_notes_are_found_too() {
    let flips = if tools::all() { 600 } else { 80 };
    let mut random = Random::from_env();
    let stage = Stage::new();
    stage.deploy("");
    stage.server("start");
    fill(&stage.owner().await, 5).await;
    stage.sidecar.run(["export", "all"]).ok();
    stage.sidecar.run(["backup", "create"]).ok();
    stage.sidecar.run(["drill"]).ok();
    let keep = stage.sidecar.clone().and("RETENTION__KEEP_LAST", "1");
    keep.run(["prune", "--apply"]).ok();
    stage.server("stop");
    let root = stage.scratch.path().join("repository");
    let url = format!("file://{}", root.display());
    let repository = Repository::open(&url, &RepositoryConfig::default(), Keyring::default()).await.expect("open");
    let before = verified(&repository).await;
    assert_eq!((before.findings.as_slice(), before.orphans.as_slice()), (&[][..], &[][..]));
    let kinds = [
        "programs/",
        "deployments/",
        "drills/",
        "retention/",
        "exports/manifests/",
        "exports/ndjson/",
        "exports/parquet/",
    ];
    let listed = repository.list(&Key::default()).await.expect("a listing");
    for flip in 0..flips {
        let kind = kinds[flip % kinds.len()];
        let keys: Vec<_> = listed.iter().filter(|(key, _)| key.as_ref().contains(kind)).collect();
        assert!(!keys.is_empty(), "nothing of {kind}");
        let file = root.join(keys[random.below(keys.len() as u64) as usize].0.as_ref());
        let good = std::fs::read(&file).expect("read");
        let mut bad = good.clone();
        let bit = random.below(bad.len() as u64 * 8) as usize;
        bad[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&file, bad).expect("write");
        let found = verified(&repository).await;
        assert!(!found.findings.is_empty(), "bit {bit} of {} was flipped and not found", file.display());
        std::fs::write(&file, good).expect("put back");
    }
}
