//! The log's way into the repository: find where the archive ends, prove that the log continues it, upload what is new.
//!
//! Whether the log continues the archive is decided by content: the archive's last commits are hashed again from the log.
//! Where they differ a new timeline begins at the last link that both share, and the old timeline stays as it is.

mod shared;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::StreamExt;
use object_store::path::Path as Key;
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, SemaphorePermit, mpsc};

use crate::backup::log::shared::find_fork;
pub(crate) use crate::backup::log::shared::{holds_link, shared_links};
use crate::backup::{BackupError, OBJECT_SIZE, READ_SIZE, WORKERS, Work, blocking};
use crate::buffers::Buffer;
use crate::datadir::DataDirError;
use crate::datadir::log::{Batch, LogReader, Tail, TornHeader, segments};
use crate::ids::{ContentHash, Identity, Offset, TimelineId};
use crate::repository::chain::LogChain;
use crate::repository::hashing::Hashing;
use crate::repository::log_object::{ChainTip, LogContent, LogHeader};
use crate::repository::manifest::{Timeline, TimelineReason};
use crate::repository::timeline::ChainChoice;
use crate::repository::{Repository, RepositoryError, paths};

/// Runs of commits in memory before they are compressed: one more than are being compressed, so that the reader is always
/// ahead. Of all databases: one that has fallen behind must not take memory or threads from the others.
static ROOM: Semaphore = Semaphore::const_new(WORKERS + 1);
/// Objects between log and store, of all databases.
static UNDERWAY: Semaphore = Semaphore::const_new(4 * WORKERS);

/// What is archived of one database after a backup.
#[derive(Debug, Clone)]
pub struct LogArchive {
    pub timeline: TimelineId,
    /// `None` while nothing is archived.
    pub tip: Option<Tip>,
    pub problems: Vec<String>,
    /// Why the log is not archived up to its end.
    pub fault: Option<String>,
}

/// The end of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tip {
    pub last: Offset,
    pub chain: ContentHash,
    pub history: ContentHash,
    /// The latest time up to `last`, microseconds.
    pub time: Option<i64>,
}

impl From<ChainTip> for Tip {
    fn from(tip: ChainTip) -> Self {
        let ChainTip { next, chain, history, max_time, .. } = tip;
        Self { last: Offset(next.0.saturating_sub(1)), chain, history, time: max_time }
    }
}

impl Default for LogArchive {
    fn default() -> Self {
        Self { timeline: TimelineId::FIRST, tip: None, problems: Vec::new(), fault: None }
    }
}

/// Where the archive goes on.
pub(crate) struct Continuation {
    pub timeline: TimelineId,
    pub tip: ChainTip,
    /// Is anything archived at or before the tip on this history?
    pub has_past: bool,
    pub events: Vec<LogEvent>,
}

/// Something that happened to a log, or to what is archived of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEvent {
    pub kind: LogEventKind,
    pub message: String,
}

/// What can happen to a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LogEventKind {
    /// It no longer continues what is archived.
    Fork,
    /// Some of it was deleted before it was archived.
    Gap,
    /// The log, or what is archived of it, is damaged or missing.
    Damage,
}

impl LogEventKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Fork => "fork",
            Self::Gap => "gap",
            Self::Damage => "damage",
        }
    }
}

/// Archives everything in the log at `dir` that is not archived yet, up to its end at the moment it is reached.
///
/// # Errors
/// When the log or the repository fails.
pub(crate) async fn archive(work: &Arc<Work>, database: Identity, dir: &Path) -> Result<LogArchive, BackupError> {
    let Some(from) = find_continuation(work, database, dir).await? else {
        return Ok(LogArchive::default());
    };
    let Uploaded { tip, tail, torn } = upload(work, database, from.timeline, from.tip, dir).await?;
    let mut problems: Vec<_> = from.events.into_iter().map(|event| event.message).collect();
    problems.extend(torn.map(|torn| torn.to_string()));
    let mut fault = None;
    if let Tail::Unfinished { at, reason } = tail
        && is_stuck(dir, tip.next, at).await?
    {
        fault = Some(format!(
            "the log ends at byte {at} of its last segment in something that is no commit ({reason}); after a crash the \
             server drops it at its next start, but if the server runs and writes on, the segment is damaged and nothing \
             after transaction {} is archived",
            tip.next.0.saturating_sub(1)
        ));
    }
    if tip.next.0 == 0 || (tip.next == from.tip.next && !from.has_past) {
        problems.push("the log is empty".into());
        return Ok(LogArchive { timeline: from.timeline, tip: None, problems, fault });
    }
    Ok(LogArchive { timeline: from.timeline, tip: Some(tip.into()), problems, fault })
}

/// What the repository holds of a database whose log cannot be read. `None` when it holds nothing.
pub(crate) async fn archived_before(
    repository: &Repository,
    database: &Identity,
) -> Result<Option<(TimelineId, Tip)>, RepositoryError> {
    let timelines = repository.timelines(database).await?;
    let Some(timeline) = repository.newest_timeline(database, &timelines).await? else { return Ok(None) };
    let chain = repository.log_chain(database, &timelines, timeline).await?.before_loss();
    let Some(entry) = chain.entries.last() else { return Ok(None) };
    let tip = repository.log_header(&entry.key()).await?.tip_until(entry.last);
    Ok((tip.next > Offset(0)).then(|| (timeline, tip.into())))
}

/// Is the broken end that was seen still there after a while? A write under way would be whole by then.
async fn is_stuck(dir: &Path, next: Offset, at: u64) -> Result<bool, BackupError> {
    tokio::task::yield_now().await;
    let dir = dir.to_owned();
    Ok(blocking(move || {
        std::thread::sleep(std::time::Duration::from_millis(500));
        let mut reader = LogReader::open(&dir, next)?;
        let more = reader.next_batch(1, &mut Vec::new())?;
        Ok::<_, DataDirError>(more.is_none() && matches!(reader.tail(), Tail::Unfinished { at: now, .. } if *now == at))
    })
    .await??)
}

/// How far a log was archived.
pub(crate) struct Uploaded {
    pub tip: ChainTip,
    pub tail: Tail,
    pub torn: Option<TornHeader>,
}

/// Reads the log from the tip on, compresses on several threads, and uploads in order.
pub(crate) async fn upload(
    work: &Arc<Work>,
    database: Identity,
    timeline: TimelineId,
    from: ChainTip,
    dir: &Path,
) -> Result<Uploaded, BackupError> {
    let (sender, receiver) = mpsc::channel::<Run>(1);
    let hashing = work.repository.hashing()?;
    let reader = tokio::spawn(read_runs(dir.to_owned(), from, hashing, sender));
    let encoded =
        futures::stream::unfold(
            receiver,
            |mut receiver| async move { receiver.recv().await.map(|run| (run, receiver)) },
        )
        .map(|run| {
            let work = Arc::clone(work);
            blocking(move || run.encode(&work, database, timeline))
        })
        // One more than is compressed, so that a slow one does not keep the others from going on.
        .buffered(WORKERS + 1);
    let mut encoded = std::pin::pin!(encoded);
    // The store's fsync and the compression do not wait for each other.
    let (sender, receiver) = mpsc::channel::<Encoded>(WORKERS);
    let writer = tokio::spawn(write_in_order(Arc::clone(work), receiver));
    while let Some(object) = encoded.next().await {
        if sender.send(object??).await.is_err() {
            break;
        }
    }
    drop(sender);
    writer.await.map_err(|error| BackupError::Worker(error.to_string()))??;
    reader.await.map_err(|error| BackupError::Worker(error.to_string()))?
}

/// A log object on its way to the store.
struct Encoded {
    database: Identity,
    timeline: TimelineId,
    key: Key,
    bytes: Vec<u8>,
    raw_len: usize,
    after: ChainTip,
    /// Held until the store has it.
    _underway: Option<SemaphorePermit<'static>>,
}

async fn write_in_order(work: Arc<Work>, mut objects: mpsc::Receiver<Encoded>) -> Result<(), RepositoryError> {
    while let Some(object) = objects.recv().await {
        object.write(&work).await?;
    }
    Ok(())
}

impl Encoded {
    async fn write(self, work: &Work) -> Result<(), RepositoryError> {
        let len = self.bytes.len();
        put_log(&work.repository, &self.key, self.bytes).await?;
        work.tally.wrote_object(len);
        work.tally.read(self.raw_len);
        work.progress.advance(self.raw_len as u64);
        work.observer.archived(self.database, self.timeline, &self.after, len);
        Ok(())
    }
}

/// Writes one object of commits that continue `before`. Returns the archive's new end.
pub(crate) async fn write_batch(
    work: &Arc<Work>,
    database: Identity,
    timeline: TimelineId,
    before: ChainTip,
    batch: Batch,
    commits: Vec<u8>,
) -> Result<ChainTip, BackupError> {
    let hashing = work.repository.hashing()?;
    let after = before.extend(&batch, &commits, hashing);
    let run = Run { batch, before, after, commits: commits.into(), _room: None, underway: None };
    let encoded = {
        let work = Arc::clone(work);
        let span = tracing::info_span!("compress");
        blocking(move || span.in_scope(|| run.encode(&work, database, timeline))).await??
    };
    encoded.write(work).await?;
    Ok(after)
}

/// Commits on their way from the log to an object.
struct Run {
    batch: Batch,
    before: ChainTip,
    after: ChainTip,
    commits: Buffer,
    /// Held until the commits are compressed.
    _room: Option<SemaphorePermit<'static>>,
    underway: Option<SemaphorePermit<'static>>,
}

impl Run {
    fn encode(self, work: &Work, database: Identity, timeline: TimelineId) -> Result<Encoded, BackupError> {
        let content = LogContent {
            database,
            timeline,
            batch: self.batch,
            before: self.before,
            after: self.after,
            archived_at: work.clock.now().as_microsecond(),
            commits: &self.commits,
        };
        let bytes = content.encode(work.level, &work.repository.keys)?;
        let (key, raw_len, after) = (content.key(), self.commits.len(), self.after);
        Ok(Encoded { database, timeline, key, bytes, raw_len, after, _underway: self.underway })
    }
}

/// Reads the log in runs of an object each. No thread is held while there is no room: what makes room needs one too.
async fn read_runs(
    dir: PathBuf,
    from: ChainTip,
    hashing: Hashing,
    sender: mpsc::Sender<Run>,
) -> Result<Uploaded, BackupError> {
    let (mut reader, mut more) = {
        let dir = dir.clone();
        let open = move || {
            // Where there is nothing new, nobody need wait for the others.
            let mut reader = LogReader::open(&dir, from.next)?;
            let is_new = reader.next_batch(1, &mut Vec::new())?.is_some();
            Ok::<_, DataDirError>((if is_new { LogReader::open(&dir, from.next)? } else { reader }, is_new))
        };
        blocking(open).await??
    };
    let mut before = from;
    while more {
        // Neither is ever closed. Whoever has no room holds nothing that makes room, so nobody waits for ever.
        let room = async { (UNDERWAY.acquire().await.ok(), ROOM.acquire().await.ok()) };
        let (underway, room) = tokio::select! {
            room = room => room,
            () = sender.closed() => break,
        };
        let read = blocking(move || {
            let mut commits = Buffer::take();
            commits.reserve(OBJECT_SIZE + READ_SIZE);
            let batch = reader.next_batch(OBJECT_SIZE, &mut commits)?;
            let batch = batch.map(|batch| (before.extend(&batch, &commits, hashing), batch));
            Ok::<_, DataDirError>((reader, batch, commits))
        });
        let (read, batch, commits) = read.await??;
        reader = read;
        let Some((after, batch)) = batch else { break };
        if batch.first != before.next {
            return Err(DataDirError::Gap { path: dir, expected: before.next, found: batch.first }.into());
        }
        let run = Run { batch, before, after, commits, _room: room, underway };
        if sender.send(run).await.is_err() {
            // The uploader gave up and says why itself.
            break;
        }
        before = after;
        // A live log grows while we read; what was its end when we came there is enough.
        more = !reader.at_end();
    }
    Ok(Uploaded { tip: before, tail: reader.tail().clone(), torn: reader.torn() })
}

/// Writes a log object. One that is there already counts if it holds the same commits: a backup that was cut off after
/// this upload, or compressed at another level, or continued an object that was cut otherwise.
async fn put_log(repository: &Repository, key: &Key, bytes: Vec<u8>) -> Result<(), RepositoryError> {
    let ours = LogHeader::parse(&bytes);
    match repository.put(key, bytes.into()).await {
        Err(RepositoryError::Conflict { key: name }) => match (ours, repository.log_header(key).await) {
            (Ok(ours), Ok(theirs)) if theirs.holds_same_commits(&ours) => Ok(()),
            _ => Err(RepositoryError::Conflict { key: name }),
        },
        result => result,
    }
}

/// Compares log and archive by content. `None` when there is no log.
pub(crate) async fn find_continuation(
    work: &Arc<Work>,
    database: Identity,
    dir: &Path,
) -> Result<Option<Continuation>, BackupError> {
    let repository = &work.repository;
    let Some(first_segment) = segments(dir).map_err(DataDirError::from)?.first().cloned() else { return Ok(None) };
    let timelines = repository.timelines(&database).await?;
    let Some(current) = timelines.last() else {
        let start = first_segment.first;
        return begin(work, database, Beginning::root(TimelineId::FIRST, TimelineReason::First, start)).await.map(Some);
    };
    let next_id = repository.next_timeline(&database).await?;
    let (mut chain, damage) = readable_chain(repository, &database, &timelines, current.timeline).await?;
    let mut lost = chain.loss().map(|hole| {
        format!("transactions {} to {} are missing from timeline {}", hole.missing, hole.last(), current.timeline)
    });
    chain = chain.before_loss();
    if chain.last() < damage.as_ref().map(|damage| damage.0) {
        lost = damage.map(|damage| damage.1);
    }
    let Some(tail) = chain.entries.last() else {
        // The timeline was begun and nothing archived on it yet: begin where it says, or anew if that is gone.
        if current.start >= first_segment.first {
            let tip = timeline_start(repository, &database, &timelines, current).await?;
            return Ok(Some(Continuation { timeline: current.timeline, tip, has_past: false, events: Vec::new() }));
        }
        let gap = (current.start.0, first_segment.first);
        return begin_after_gap(work, database, next_id, gap, lost).await.map(Some);
    };
    if first_segment.first.0 > tail.last.0 + 1 {
        let gap = (tail.last.0 + 1, first_segment.first);
        return begin_after_gap(work, database, next_id, gap, lost).await.map(Some);
    }
    let tail_header = repository.log_header(&tail.key()).await?;
    // Of an object that a fork leaves in its middle, only what lies before the fork is of this history.
    let within = tail_header.links.partition_point(|link| link.last <= tail.last);
    if lost.is_none()
        && within > 0
        && shared_links(dir, &tail_header, repository.hashing()?).await?.is_some_and(|shared| shared >= within)
    {
        let (timeline, tip) = (current.timeline, tail_header.tip_until(tail.last));
        return Ok(Some(Continuation { timeline, tip, has_past: true, events: Vec::new() }));
    }
    let fork = find_fork(repository, dir, &chain.entries, first_segment.first).await?;
    let mut begun = match fork {
        Some((parent, tip)) => begin(work, database, Beginning::fork(next_id, parent, tip)).await?,
        None => begin(work, database, Beginning::root(next_id, TimelineReason::Fork, first_segment.first)).await?,
    };
    let kind = if lost.is_some() { LogEventKind::Damage } else { LogEventKind::Fork };
    let message = match fork {
        Some((parent, tip)) if lost.is_some() => format!(
            "{}; timeline {next_id} goes on after transaction {} of timeline {parent}",
            lost.unwrap_or_default(),
            tip.next.0.saturating_sub(1)
        ),
        Some((parent, tip)) => format!(
            "the log no longer continues what is archived on timeline {parent}; timeline {next_id} starts after \
             transaction {}, and timeline {parent} stays restorable",
            tip.next.0.saturating_sub(1)
        ),
        None => format!("the log shares nothing with what is archived; timeline {next_id} starts at its beginning"),
    };
    begun.events.push(LogEvent { kind, message });
    Ok(Some(begun))
}

/// The chain of a timeline up to the last object whose header can be read, with what a damaged one at its end held, and what is
/// wrong with it. Objects that hold the same commits stand in for a damaged one.
async fn readable_chain(
    repository: &Repository,
    database: &Identity,
    timelines: &[Timeline],
    id: TimelineId,
) -> Result<(LogChain, Option<(Offset, String)>), BackupError> {
    let (mut choice, mut damage) = (ChainChoice::default(), None::<(Offset, String)>);
    loop {
        let chain = repository.log_chain_by(database, timelines, id, &choice).await?;
        // What lies before a loss is continued, so that what was lost is archived again where the log still has it.
        let Some(entry) = chain.clone().before_loss().entries.pop() else { return Ok((chain, damage)) };
        match repository.log_header(&entry.key()).await {
            Ok(_) => return Ok((chain, damage)),
            Err(error) if error.is_damage() => {
                damage = damage.max(Some((entry.last, error.to_string())));
                choice.avoid.insert(entry.key());
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Transactions from `lost.0` up to, and not including, `lost.1` are gone and in no archive.
async fn begin_after_gap(
    work: &Arc<Work>,
    database: Identity,
    timeline: TimelineId,
    gap: (u64, Offset),
    lost: Option<String>,
) -> Result<Continuation, BackupError> {
    let start = gap.1;
    let mut begun = begin(work, database, Beginning::root(timeline, TimelineReason::Gap, start)).await?;
    let (from, to) = (gap.0, start.0.saturating_sub(1));
    let event = match lost {
        // They were archived once: it is the archive that lacks them, and nobody deleted them too early.
        Some(lost) => LogEvent {
            kind: LogEventKind::Damage,
            message: format!(
                "{lost}, and the log on the disk starts at {start}: timeline {timeline} starts there; run `inner-universe verify`"
            ),
        },
        None => LogEvent {
            kind: LogEventKind::Gap,
            message: format!(
                "transactions {from} to {to} were deleted before they were archived; timeline {timeline} starts at {start}, and \
                 no time between can be restored"
            ),
        },
    };
    begun.events.push(event);
    Ok(begun)
}

/// The chain before the first object of a timeline that has none yet.
async fn timeline_start(
    repository: &Repository,
    database: &Identity,
    timelines: &[Timeline],
    timeline: &Timeline,
) -> Result<ChainTip, BackupError> {
    let (Some(parent), Some(fork)) = (timeline.parent, timeline.fork_offset) else {
        return Ok(ChainTip::origin(database, timeline.start));
    };
    let chain = repository.log_chain(database, timelines, parent).await?;
    let key = paths::logs(database, parent);
    let broken =
        || RepositoryError::damaged(&key, format!("transaction {fork}, where a timeline forks off, is missing"));
    let entry = chain.range(fork, fork).first().ok_or_else(broken)?;
    // Another object than the one in the chain may have been current when the fork was found.
    let others = repository.log_entries(database, entry.timeline).await?;
    let holders = others.iter().filter(|other| other.first <= fork && fork <= other.last && other.key() != entry.key());
    for holder in std::iter::once(entry).chain(holders) {
        let header = match repository.log_header(&holder.key()).await {
            Ok(header) => header,
            Err(error) if error.is_damage() => continue,
            Err(error) => return Err(error.into()),
        };
        if let Some(tip) = header.links.iter().position(|link| link.last == fork).and_then(|at| header.tip_at(at)) {
            return Ok(tip);
        }
    }
    Err(broken().into())
}

struct Beginning {
    id: TimelineId,
    parent: Option<TimelineId>,
    fork: Option<ChainTip>,
    start: Offset,
    reason: TimelineReason,
}

impl Beginning {
    fn root(id: TimelineId, reason: TimelineReason, start: Offset) -> Self {
        Self { id, parent: None, fork: None, start, reason }
    }

    fn fork(id: TimelineId, parent: TimelineId, tip: ChainTip) -> Self {
        Self { id, parent: Some(parent), fork: Some(tip), start: tip.next, reason: TimelineReason::Fork }
    }
}

async fn begin(work: &Work, database: Identity, beginning: Beginning) -> Result<Continuation, BackupError> {
    let timeline = Timeline {
        timeline: beginning.id,
        parent: beginning.parent,
        fork_offset: beginning.fork.map(|tip| Offset(tip.next.0.saturating_sub(1))),
        start: beginning.start,
        reason: beginning.reason,
        created_at: work.clock.now(),
    };
    let bytes = work.repository.put_timeline(&database, &timeline).await?;
    work.tally.wrote_object(bytes);
    let tip = beginning.fork.unwrap_or_else(|| ChainTip::origin(&database, beginning.start));
    Ok(Continuation { timeline: beginning.id, tip, has_past: beginning.fork.is_some(), events: Vec::new() })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::backup::{DEFAULT_LEVEL, Unobserved};
    use crate::clock::SystemClock;
    use crate::datadir::commit::{SegmentHeader, encode};
    use crate::datadir::log::segment_name;
    use crate::progress::Silent;
    use crate::repository::crypto::Keyring;
    use crate::repository::store::Store;

    /// More logs that are far behind than there are threads to read them.
    #[test]
    fn many_databases_that_have_fallen_behind_catch_up_together() {
        const COMMITS: u64 = 24;
        let dir = tempfile::tempdir().unwrap();
        let mut log = SegmentHeader { log_version: 1, checksum_algorithm: 0 }.to_bytes().to_vec();
        for offset in 0..COMMITS {
            log.extend_from_slice(&encode(1, Offset(offset), 0, 1, &vec![offset as u8; 1 << 20]));
        }
        std::fs::write(dir.path().join(segment_name(Offset(0))), log).unwrap();
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        let runtime = runtime.worker_threads(2).max_blocking_threads(2).enable_all().build().unwrap();
        let all = runtime.block_on(async {
            let store = Store::around(Arc::new(object_store::memory::InMemory::new()));
            let keys = Keyring::default();
            let repository = Repository::open_or_create_in(store, "memory://", keys, &SystemClock).await.unwrap();
            let work = Arc::new(Work {
                repository,
                clock: Arc::new(SystemClock),
                progress: Arc::new(Silent),
                tally: Arc::default(),
                level: DEFAULT_LEVEL,
                observer: Arc::new(Unobserved),
                witness: None,
            });
            let logs = (0..8).map(|n| archive(&work, Identity([n; 32]), dir.path()));
            tokio::time::timeout(Duration::from_secs(300), futures::future::try_join_all(logs)).await
        });
        let all = all.expect("they wait for each other").unwrap();
        assert!(all.iter().all(|log| log.tip.is_some_and(|tip| tip.last == Offset(COMMITS - 1))), "{all:?}");
    }

    #[tokio::test]
    async fn a_fork_is_found_behind_an_older_one_that_cuts_an_object() {
        let (dir, database) = (tempfile::tempdir().unwrap(), Identity([7; 32]));
        let store = Store::around(Arc::new(object_store::memory::InMemory::new()));
        let keys = Keyring::default();
        let work = Arc::new(Work {
            repository: Repository::open_or_create_in(store, "memory://", keys, &SystemClock).await.unwrap(),
            clock: Arc::new(SystemClock),
            progress: Arc::new(Silent),
            tally: Arc::default(),
            level: DEFAULT_LEVEL,
            observer: Arc::new(Unobserved),
            witness: None,
        });
        // A letter is the history that a commit is of.
        let archive_log = async |history: &str| {
            let mut log = SegmentHeader { log_version: 1, checksum_algorithm: 0 }.to_bytes().to_vec();
            for (offset, of) in history.bytes().enumerate() {
                log.extend_from_slice(&encode(1, Offset(offset as u64), 0, 1, &[of; 40]));
            }
            std::fs::write(dir.path().join(segment_name(Offset(0))), log).unwrap();
            archive(&work, database, dir.path()).await.unwrap();
        };
        let merge = async || {
            for _ in 0..2 {
                crate::archiver::compaction::pass(&work, database, TimelineId(1), Duration::ZERO).await.unwrap();
            }
        };
        for some in [["a", "aa"], ["aaa", "aaaa"], ["aaaaaa", "aaaaaaaaaa"]] {
            archive_log(some[0]).await;
            archive_log(some[1]).await;
            merge().await;
        }
        archive_log("aaaaaabb").await;
        archive_log("aaaaaabbbb").await;
        let timelines = work.repository.timelines(&database).await.unwrap();
        let chain = work.repository.log_chain(&database, &timelines, TimelineId(2)).await.unwrap();
        let held: Vec<_> = chain.entries.iter().map(|entry| (entry.level, entry.first.0, entry.last.0)).collect();
        assert_eq!(held, [(1, 0, 1), (1, 2, 3), (1, 4, 5), (0, 6, 7), (0, 8, 9)]);
        assert!(!chain.entries[2].is_whole(), "the search begins with the object that the older fork cuts");
        archive_log("aaaaaabbcc").await;
        let timelines = work.repository.timelines(&database).await.unwrap();
        let newest = timelines.last().map(|found| (found.timeline, found.parent, found.fork_offset));
        assert_eq!(newest, Some((TimelineId(3), Some(TimelineId(2)), Some(Offset(7)))));
    }
}
