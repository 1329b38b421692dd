use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use jiff::Timestamp;

use super::*;
use crate::datadir::log::segment_name;
use crate::datadir::snapshot::{dir_name, manifest_name};

/// A clock that does something at one of its sleeps.
struct Acts<F: Fn() + Send + Sync> {
    at: u32,
    sleeps: AtomicU32,
    act: F,
}

impl<F: Fn() + Send + Sync> Clock for Acts<F> {
    fn now(&self) -> Timestamp {
        Timestamp::UNIX_EPOCH
    }

    fn sleep(&self, _: Duration) -> BoxFuture<'static, ()> {
        if self.sleeps.fetch_add(1, Ordering::SeqCst) == self.at {
            (self.act)();
        }
        std::future::ready(()).boxed()
    }
}

fn acts<F: Fn() + Send + Sync>(at: u32, act: F) -> Acts<F> {
    Acts { at, sleeps: AtomicU32::new(0), act }
}

struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    /// Three segments and a snapshot.
    fn new() -> Self {
        let disk = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir_all(disk.manifest().parent().unwrap()).unwrap();
        fs::write(disk.manifest(), "a manifest").unwrap();
        for first in [0, 10, 20] {
            fs::write(disk.segment(first), format!("segment {first}")).unwrap();
            fs::write(disk.segment(first).with_extension("ofs"), "an index").unwrap();
        }
        disk
    }

    fn segment(&self, first: u64) -> PathBuf {
        self.dir.path().join(segment_name(Offset(first)))
    }

    fn manifest(&self) -> PathBuf {
        self.dir.path().join("snapshots").join(dir_name(Offset(25))).join(manifest_name(Offset(25)))
    }

    fn left(&self) -> Vec<u64> {
        [0, 10, 20].into_iter().filter(|first| self.segment(*first).exists()).collect()
    }

    /// The first two segments go.
    fn plan(&self) -> LocalReport {
        let snapshot = snapshot::list(&self.dir.path().join("snapshots")).unwrap().remove(0);
        let segment = |first: u64| {
            let path = self.segment(first);
            let seen = FileState::of(&path).unwrap().unwrap();
            let content = Some(content_of(&path).unwrap());
            LocalSegment { path, first: Offset(first), last: Offset(first + 9), bytes: seen.len, seen, content }
        };
        let manifest = FileState::of(&snapshot.manifest_path()).unwrap().unwrap();
        let database = LocalDatabase {
            identity: Identity([5; 32]),
            name: "house".into(),
            snapshots: vec![snapshot.offset],
            segments: vec![segment(0), segment(10)],
            bytes: 0,
            stays: String::new(),
            relied_on: vec![Relied { snapshot, manifest }],
        };
        LocalReport { applied: false, databases: vec![database], bytes: 0 }
    }
}

#[tokio::test]
async fn what_was_compared_is_removed() {
    let disk = Disk::new();
    let report = apply(&disk.plan(), &acts(0, || ())).await.unwrap();
    assert!(report.applied);
    assert_eq!(disk.left(), [20]);
    assert!(!disk.segment(10).with_extension("ofs").exists());
}

#[tokio::test]
async fn a_segment_that_was_exchanged_since_stays_with_all_that_follow_it() {
    for exchanged in [0, 10] {
        let disk = Disk::new();
        let plan = disk.plan();
        let other = disk.dir.path().join("other");
        fs::write(&other, "segment ?").unwrap();
        fs::rename(&other, disk.segment(exchanged)).unwrap();
        let refused = apply(&plan, &acts(0, || ())).await.unwrap_err();
        assert!(matches!(&refused, LocalError::Changed(path) if *path == disk.segment(exchanged)), "{refused}");
        let left: Vec<u64> = [0, 10, 20].into_iter().filter(|first| *first >= exchanged).collect();
        assert_eq!(disk.left(), left);
        assert!(disk.segment(exchanged).with_extension("ofs").exists());
    }
}

#[tokio::test]
async fn nothing_goes_without_the_snapshots_that_stand_in_for_it() {
    let changes: [fn(&Disk); 3] = [
        |disk| fs::remove_file(disk.manifest()).unwrap(),
        |disk| fs::write(disk.manifest(), "another manifest").unwrap(),
        |disk| fs::write(disk.manifest().parent().unwrap().with_extension("lock"), "").unwrap(),
    ];
    for change in changes {
        let disk = Disk::new();
        let plan = disk.plan();
        change(&disk);
        let refused = apply(&plan, &acts(0, || ())).await.unwrap_err();
        assert!(matches!(refused, LocalError::Changed(_)), "{refused}");
        assert_eq!(disk.left(), [0, 10, 20]);
    }
}

#[tokio::test]
async fn a_segment_that_the_server_puts_back_compressed_is_removed_again() {
    let disk = Disk::new();
    let (plan, temporary, back) = (disk.plan(), disk.dir.path().join(".tmpA1b2C3"), disk.segment(0));
    // The first sleep comes after the removals: the server began to compress before them.
    let clock = acts(0, || fs::write(&temporary, zstd::encode_all(&b"segment 0"[..], 0).unwrap()).unwrap());
    let has_returned = AtomicBool::new(false);
    let ends = acts(2, || {
        assert!(!back.exists());
        fs::rename(&temporary, &back).unwrap();
        has_returned.store(true, Ordering::SeqCst);
    });
    struct Both<A, B>(A, B);
    impl<A: Clock, B: Clock> Clock for Both<A, B> {
        fn now(&self) -> Timestamp {
            self.0.now()
        }

        fn sleep(&self, duration: Duration) -> BoxFuture<'static, ()> {
            let (one, other) = (self.0.sleep(duration), self.1.sleep(duration));
            async move { _ = futures::join!(one, other) }.boxed()
        }
    }
    apply(&plan, &Both(clock, ends)).await.unwrap();
    assert!(has_returned.load(Ordering::SeqCst), "it was not waited for");
    assert_eq!(disk.left(), [20]);
}

#[tokio::test]
async fn a_segment_that_returns_with_other_content_is_not_removed() {
    let disk = Disk::new();
    let (plan, back) = (disk.plan(), disk.segment(10));
    let refused = apply(&plan, &acts(0, || fs::write(&back, "other content").unwrap())).await.unwrap_err();
    assert!(matches!(&refused, LocalError::Returned(path) if *path == back), "{refused}");
    assert_eq!(disk.left(), [10, 20]);
}

#[tokio::test]
async fn a_temporary_file_that_a_crash_left_is_not_waited_for() {
    let disk = Disk::new();
    fs::write(disk.dir.path().join(".tmpOld123"), "left").unwrap();
    apply(&disk.plan(), &acts(0, || ())).await.unwrap();
    assert_eq!(disk.left(), [20]);
}
