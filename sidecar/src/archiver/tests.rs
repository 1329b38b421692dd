//! What an archiver answers about a log that it cannot read to its end.

use super::*;
use crate::backup::{DEFAULT_LEVEL, Unobserved};
use crate::clock::{Clock, SystemClock};
use crate::datadir::commit::{SegmentHeader, encode};
use crate::datadir::log::segment_name;
use crate::progress::Silent;
use crate::repository::Repository;
use crate::repository::crypto::Keyring;
use crate::repository::manifest::{Timeline, TimelineReason};
use crate::repository::store::Store;

struct Following {
    dir: tempfile::TempDir,
    followed: Arc<Followed>,
    flush: FlushHandle,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
    repository: Repository,
}

impl Following {
    async fn start(log: &[u8]) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join(segment_name(Offset(0))), log).expect("write");
        let store = Store::around(Arc::new(object_store::memory::InMemory::new()));
        let repository = Repository::open_or_create_in(store, "memory://", Keyring::default(), &SystemClock).await;
        let repository = repository.expect("a repository");
        let work = Arc::new(Work {
            repository: repository.clone(),
            clock: Arc::new(SystemClock),
            progress: Arc::new(Silent),
            tally: Arc::default(),
            level: DEFAULT_LEVEL,
            observer: Arc::new(Unobserved),
            witness: None,
        });
        let followed = Arc::new(Followed::new(Identity([3; 32]), "d".to_owned(), jiff::Timestamp::UNIX_EPOCH));
        let ten = Duration::from_millis(10);
        let settings = Settings { flush_interval: ten, flush_bytes: 1 << 20, poll: ten };
        let stop = CancellationToken::new();
        let (archiver, flush) =
            Archiver::new(work, Arc::clone(&followed), dir.path().to_owned(), settings, stop.clone());
        Self { dir, followed, flush, stop, task: tokio::spawn(archiver.run()), repository }
    }

    fn write(&self, log: &[u8]) {
        std::fs::write(self.dir.path().join(segment_name(Offset(0))), log).expect("write");
    }

    async fn flush(&self) -> LogArchive {
        let flushed = tokio::time::timeout(Duration::from_secs(60), self.flush.flush()).await;
        flushed.expect("it answers").expect("it follows")
    }

    async fn end(self) {
        self.stop.cancel();
        self.task.await.expect("it ends");
    }
}

fn log(commits: u64) -> Vec<u8> {
    let mut log = SegmentHeader { log_version: 1, checksum_algorithm: 0 }.to_bytes().to_vec();
    for offset in 0..commits {
        log.extend_from_slice(&encode(1, Offset(offset), 0, 1, &[7; 40]));
    }
    log
}

#[tokio::test]
async fn a_damaged_end_is_answered_and_stays() {
    let whole = log(10);
    let mut damaged = whole.clone();
    let late = damaged.len() - 10;
    damaged[late] ^= 1;
    let following = Following::start(&damaged).await;
    // The first answer waits until it is clear that this is not a write under way.
    let answer = following.flush().await;
    assert_eq!(answer.tip.map(|tip| tip.last), Some(Offset(8)));
    assert!(answer.fault.as_ref().is_some_and(|fault| fault.contains("no commit")), "{answer:?}");
    assert_eq!(following.followed.progress().damage, answer.fault, "readiness knows it");
    following.write(&whole);
    for _ in 0..500 {
        if following.followed.progress().damage.is_none() {
            break;
        }
        tokio::time::timeout(Duration::from_millis(10), std::future::pending::<()>()).await.expect_err("a pause");
    }
    let answer = following.flush().await;
    assert_eq!((answer.tip.map(|tip| tip.last), answer.fault), (Some(Offset(9)), None), "it is mended");
    assert_eq!(following.followed.progress().damage, None);
    following.end().await;
}

#[tokio::test]
async fn an_unreadable_log_is_answered_at_once() {
    let mut unreadable = log(10);
    unreadable[0] ^= 1;
    let following = Following::start(&unreadable).await;
    let answer = following.flush().await;
    assert_eq!(answer.tip, None);
    assert!(answer.fault.as_ref().is_some_and(|fault| fault.contains("is damaged at byte")), "{answer:?}");
    following.end().await;
}

#[tokio::test]
async fn a_timeline_that_another_writer_has_left_behind_is_left() {
    let following = Following::start(&log(10)).await;
    let first = following.flush().await;
    assert_eq!((first.timeline, first.tip.map(|tip| tip.last)), (TimelineId(1), Some(Offset(9))));
    let other = Timeline {
        timeline: TimelineId(2),
        parent: Some(TimelineId(1)),
        fork_offset: Some(Offset(9)),
        start: Offset(10),
        reason: TimelineReason::Fork,
        created_at: SystemClock.now(),
    };
    let database = following.followed.identity;
    following.repository.put_timeline(&database, &other).await.expect("another's timeline");
    let moved = following.flush().await;
    assert_eq!((moved.timeline, moved.tip.map(|tip| tip.last)), (TimelineId(2), Some(Offset(9))));
    let timelines = following.repository.timelines(&database).await.expect("timelines");
    let chain = following.repository.log_chain(&database, &timelines, TimelineId(2)).await.expect("a chain");
    assert!(chain.unbroken(Offset(0), Offset(9)).is_some(), "everything is on the newest timeline");
    following.end().await;
}
