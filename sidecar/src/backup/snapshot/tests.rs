use std::fs;

use super::*;
use crate::backup::{DEFAULT_LEVEL, Unobserved, log};
use crate::clock::SystemClock;
use crate::datadir::commit::{SegmentHeader, encode};
use crate::datadir::log::segment_name;
use crate::datadir::snapshot::{dir_name, manifest_name, object_path};
use crate::datadir::{DataDir, ReplicaDir};
use crate::ids::RestorePointId;
use crate::progress::{Progress, Silent};
use crate::repository::Repository;
use crate::repository::crypto::Keyring;
use crate::repository::manifest::{DatabasePoint, RestorePoint};
use crate::repository::store::Store;
use crate::restore::plan::{RestoreRequest, plan};
use crate::retention::needs;
use crate::verify::{VerifyOptions, verify};

pub(crate) const DATABASE: Identity = Identity([5; 32]);

/// A data directory with one replica.
pub(crate) struct Disk {
    _dir: tempfile::TempDir,
    pub(crate) replica: ReplicaDir,
}

impl Disk {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("control-db")).unwrap();
        let replica = DataDir::open(dir.path()).unwrap().replica(7);
        fs::create_dir_all(replica.log_path()).unwrap();
        Self { _dir: dir, replica }
    }

    pub(crate) fn write(&self, first: u64, commits: impl IntoIterator<Item = Vec<u8>>) {
        let path = self.replica.log_path().join(segment_name(Offset(first)));
        let mut bytes = SegmentHeader { log_version: 1, checksum_algorithm: 0 }.to_bytes().to_vec();
        bytes.extend(commits.into_iter().flatten());
        fs::write(path, bytes).unwrap();
    }

    /// A segment of one-transaction commits with different content for each `text`.
    fn segment(&self, offsets: std::ops::Range<u64>, text: impl Fn(u64) -> &'static str) {
        self.write(offsets.start, offsets.map(|offset| commit(offset, text(offset))));
    }

    /// A snapshot of one blob.
    fn snapshot(&self, offset: u64, blob: &[u8]) {
        let dir = self.replica.snapshots_path().join(dir_name(Offset(offset)));
        let hash = ContentHash::of(blob);
        let object = dir.join(object_path(&hash));
        fs::create_dir_all(object.parent().unwrap()).unwrap();
        fs::write(object, blob).unwrap();
        let mut body = [&4u32.to_le_bytes()[..], b"txyz", &[0], &DATABASE.to_le(), &7u64.to_le_bytes()].concat();
        body.extend([&2u32.to_le_bytes()[..], &[7, 0, 0, 0], &offset.to_le_bytes()].concat());
        body.extend([&1u32.to_le_bytes()[..], &32u32.to_le_bytes(), &hash.0, &1u32.to_le_bytes()].concat());
        body.extend(0u32.to_le_bytes());
        let manifest = [&ContentHash::of(&body).0[..], &body].concat();
        fs::write(dir.join(manifest_name(Offset(offset))), manifest).unwrap();
    }
}

fn commit(offset: u64, text: &str) -> Vec<u8> {
    encode(1, Offset(offset), 0, 1, format!(" {text} {offset}").as_bytes())
}

pub(crate) async fn work(keys: Keyring) -> Arc<Work> {
    let store = Store::around(Arc::new(object_store::memory::InMemory::new()));
    work_in(Repository::open_or_create_in(store, "memory://", keys, &SystemClock).await.unwrap(), Arc::new(Silent))
}

fn work_in(repository: Repository, progress: Arc<dyn Progress>) -> Arc<Work> {
    Arc::new(Work {
        repository,
        clock: Arc::new(SystemClock),
        progress,
        tally: Arc::default(),
        level: DEFAULT_LEVEL,
        observer: Arc::new(Unobserved),
        witness: None,
    })
}

impl Work {
    pub(crate) async fn log(self: &Arc<Self>, disk: &Disk) -> log::LogArchive {
        log::archive(self, DATABASE, &disk.replica.log_path()).await.unwrap()
    }

    async fn filed(&self, timeline: u32) -> Vec<u64> {
        let found = self.repository.snapshots(&DATABASE, TimelineId(timeline)).await.unwrap();
        found.into_iter().map(|offset| offset.0).collect()
    }

    /// Puts another manifest in the place of the one at `offset` of the first timeline.
    async fn replace(&self, manifest: &SnapshotManifest) {
        self.repository.delete(&paths::snapshot(&DATABASE, TimelineId::FIRST, manifest.offset)).await.unwrap();
        self.repository.put_snapshot(manifest).await.unwrap();
    }

    async fn manifest(&self, offset: u64) -> SnapshotManifest {
        self.repository.snapshot(&DATABASE, TimelineId::FIRST, Offset(offset)).await.unwrap()
    }
}

#[tokio::test]
async fn a_snapshot_of_another_history_is_filed_nowhere_until_the_archive_forks() {
    let (ours, theirs) = (Disk::new(), Disk::new());
    ours.segment(0..20, |_| "ours");
    theirs.segment(0..25, |offset| if offset < 10 { "ours" } else { "theirs" });
    theirs.snapshot(15, b"rows of the other history");
    let work = work(Keyring::default()).await;
    work.log(&ours).await;
    // The directory was exchanged, and the archiver has not seen it yet.
    let problems = archive(&work, DATABASE, TimelineId(1), Offset(19), &theirs.replica).await.unwrap();
    assert!(problems.iter().any(|problem| problem.contains("transaction 15 is not archived")), "{problems:?}");
    assert_eq!(work.filed(1).await, [0; 0]);

    let forked = work.log(&theirs).await;
    assert_eq!(forked.timeline, TimelineId(2));
    let problems = archive(&work, DATABASE, TimelineId(2), Offset(24), &theirs.replica).await.unwrap();
    assert_eq!((problems, work.filed(1).await, work.filed(2).await), (vec![], vec![], vec![15]));
}

/// Exchanges the log as soon as a pack has gone up: after the first look at the log, and before the second.
struct Exchanges {
    live: std::path::PathBuf,
    other: std::path::PathBuf,
}

impl Progress for Exchanges {
    fn phase(&self, _: &str, _: Option<u64>) {}

    fn advance(&self, _: u64) {
        if self.other.exists() {
            fs::remove_dir_all(&self.live).unwrap();
            fs::rename(&self.other, &self.live).unwrap();
        }
    }
}

#[tokio::test]
async fn a_directory_that_is_exchanged_while_its_snapshot_is_read_files_nothing() {
    let (ours, theirs) = (Disk::new(), Disk::new());
    ours.segment(0..20, |_| "ours");
    theirs.segment(0..20, |_| "theirs");
    ours.snapshot(15, b"rows of our history");
    let work = work(Keyring::default()).await;
    work.log(&ours).await;
    let exchanges = Exchanges { live: ours.replica.log_path(), other: theirs.replica.log_path() };
    let work = work_in(work.repository.clone(), Arc::new(exchanges));
    let problems = archive(&work, DATABASE, TimelineId(1), Offset(19), &ours.replica).await.unwrap();
    assert!(!theirs.replica.log_path().exists(), "it was exchanged");
    assert!(problems.iter().any(|problem| problem.contains("transaction 15 is not archived")), "{problems:?}");
    assert_eq!(work.filed(1).await, [0; 0]);
}

#[tokio::test]
async fn a_log_without_its_beginning_still_proves_an_older_snapshot() {
    let disk = Disk::new();
    disk.segment(0..10, |_| "ours");
    let work = work(Keyring::default()).await;
    work.log(&disk).await;
    disk.segment(10..20, |_| "ours");
    work.log(&disk).await;
    fs::remove_file(disk.replica.log_path().join(segment_name(Offset(0)))).unwrap();
    disk.snapshot(9, b"rows");
    let archived = archive(&work, DATABASE, TimelineId(1), Offset(19), &disk.replica).await.unwrap();
    assert_eq!((archived, work.filed(1).await), (vec![], vec![9]));
    assert_eq!(work.manifest(9).await.history.unwrap().at, Offset(19));
}

/// Two log objects, and a snapshot inside the second.
async fn archived() -> (Arc<Work>, Disk, log::Tip) {
    let disk = Disk::new();
    disk.segment(0..10, |_| "ours");
    let work = work(Keyring::default()).await;
    work.log(&disk).await;
    disk.segment(10..20, |_| "ours");
    let tip = work.log(&disk).await.tip.unwrap();
    disk.snapshot(15, b"rows");
    assert_eq!(archive(&work, DATABASE, TimelineId(1), tip.last, &disk.replica).await.unwrap(), [""; 0]);
    (work, disk, tip)
}

pub(crate) async fn restore_point(work: &Work, tip: log::Tip) -> RestorePoint {
    let instance = ContentHash::of(b"instance");
    work.repository.put(&paths::instance(instance), "instance".into()).await.unwrap();
    let created_at = work.clock.now();
    let point = RestorePoint {
        format: FORMAT,
        id: RestorePointId::after(None, created_at),
        label: None,
        created_at,
        server_version: None,
        tool_version: String::new(),
        instance,
        instance_state: instance,
        has_keys: false,
        databases: vec![DatabasePoint {
            identity: DATABASE,
            name: "house".into(),
            owner: Identity([6; 32]),
            replica: 7,
            timeline: TimelineId(1),
            offset: tip.last,
            time: None,
            chain: tip.chain,
            history: None,
            initial_program: instance,
        }],
        promises: Vec::new(),
        sealed_promises: None,
    };
    work.repository.put_restore_point(&point).await.unwrap();
    point
}

#[tokio::test]
async fn a_snapshot_that_contradicts_its_timeline_is_not_used_and_is_reported() {
    let (work, _disk, tip) = archived().await;
    let point = restore_point(&work, tip).await;
    let repository = &work.repository;
    let restored_from = async || {
        let database = plan(repository, &RestoreRequest::default()).await.unwrap().databases.remove(0);
        (database.snapshot.map(|snapshot| snapshot.offset.0), database.log_from.0)
    };
    let first = paths::log(&DATABASE, TimelineId(1), 0, Offset(0), Offset(9));
    let needs_first = async || {
        let listing = repository.list(&object_store::path::Path::default()).await.unwrap().into_iter().collect();
        needs::find(repository, &listing, std::slice::from_ref(&point), None).await.unwrap().objects.contains(&first)
    };
    let reported = async || {
        let report = verify(repository, &VerifyOptions::default(), Arc::new(Silent)).await.unwrap();
        report.findings.iter().filter(|finding| finding.message.contains("another history")).count()
    };
    assert_eq!((restored_from().await, needs_first().await, reported().await), ((Some(15), 10), false, 0));

    let good = work.manifest(15).await;
    let wrong =
        HistoryProof { chain: ContentHash([1; 32]), last_commit: ContentHash([2; 32]), ..good.history.unwrap() };
    work.replace(&SnapshotManifest { history: Some(wrong), ..good.clone() }).await;
    assert_eq!((restored_from().await, needs_first().await, reported().await), ((None, 0), true, 1));
    // Manifests of earlier releases say nothing of it.
    work.replace(&SnapshotManifest { history: None, ..good }).await;
    assert_eq!((restored_from().await, needs_first().await, reported().await), ((Some(15), 10), false, 0));
}

#[tokio::test]
async fn the_commit_tells_where_links_were_cut_otherwise() {
    let (work, ..) = archived().await;
    let timelines = work.repository.timelines(&DATABASE).await.unwrap();
    let chain = work.repository.log_chain(&DATABASE, &timelines, TimelineId(1)).await.unwrap();
    let good = work.manifest(15).await;
    // No link ends at transaction 17, and one ends at 19 with another hash before it.
    for (at, text, expected) in [(17, "ours", true), (17, "theirs", false), (19, "ours", true), (19, "theirs", false)] {
        let last_commit = ContentHash::of(&commit(at, text));
        let history = HistoryProof { at: Offset(at), chain: ContentHash([1; 32]), last_commit };
        let manifest = SnapshotManifest { history: Some(history), ..good.clone() };
        let found = work.repository.is_of_history(&manifest, &timelines, &chain, None).await.unwrap();
        assert_eq!(found, Some(expected), "{text} at {at}");
    }
}

#[tokio::test]
async fn two_uploads_of_one_encrypted_snapshot_at_once_both_succeed() {
    let recipient = age::x25519::Identity::generate().to_public().to_string();
    let disk = Disk::new();
    disk.segment(0..20, |_| "ours");
    disk.snapshot(15, b"rows");
    let work = work(Keyring::new(&[recipient], &[]).unwrap()).await;
    work.log(&disk).await;
    let upload = || archive(&work, DATABASE, TimelineId(1), Offset(19), &disk.replica);
    let (one, other) = futures::join!(upload(), upload());
    assert_eq!((one.unwrap(), other.unwrap()), (vec![], vec![]));
    assert_eq!(work.filed(1).await, [15]);
    // Both did upload: the packs of one are named by no manifest and left to `prune`.
    assert_eq!(work.repository.list(&paths::packs(&DATABASE)).await.unwrap().len(), 2);

    // Another snapshot under the same name is still refused.
    let mut other = work.manifest(15).await;
    other.native_manifest = ContentHash([9; 32]);
    let refused = file(&work, &other, false).await.unwrap_err();
    assert!(matches!(refused, BackupError::Repository(RepositoryError::Conflict { .. })), "{refused}");
}
