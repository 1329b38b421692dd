//! The archiver: follows one database's log and writes what is new to the repository, for as long as the daemon runs.
//!
//! Invariants:
//! - only whole commits with a good checksum are archived, in order, each object after the one before is durable;
//! - the log itself is the queue: while the store is out, nothing is read ahead and memory does not grow;
//! - before each object the log is looked at again: if other commits stand where the last ones stood, nothing is written
//!   and the archive is compared with the log anew, which forks a timeline where they part.

pub mod compaction;
#[cfg(test)]
mod model;
pub mod position;
mod wake;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use backon::BackoffBuilder;
use jiff::Timestamp;
use opentelemetry::KeyValue;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::archiver::position::Position;
use crate::archiver::wake::Wake;
use crate::backup::log::{self, LogArchive, LogEvent, LogEventKind, Tip};
use crate::backup::{BackupError, Work, blocking};
use crate::buffers::Buffer;
use crate::clock::patience;
use crate::datadir::DataDirError;
use crate::datadir::log::{Batch, LogReader, Tail, TornHeader, segments};
use crate::ids::{Identity, Offset, TimelineId};
use crate::observe::composed::{int, time_of};
use crate::observe::metrics;
use crate::observe::own::{Earlier, traced, work_span};
use crate::repository::RepositoryError;
use crate::repository::log_object::ChainTip;

/// After this long an end that is no commit is no write under way any more.
const STUCK_AFTER: Duration = Duration::from_secs(2);

/// How to archive.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    pub flush_interval: Duration,
    pub flush_bytes: usize,
    /// How often to look where no notification comes.
    pub poll: Duration,
}

/// What is known of one database while it is followed. Shared with whoever reports it.
#[derive(Debug)]
pub struct Followed {
    pub identity: Identity,
    pub name: String,
    /// When it began to be followed: until it has caught up once, it lags since then.
    pub since: Timestamp,
    inner: Mutex<Progress>,
}

/// A copy of what is known.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    pub timeline: Option<TimelineId>,
    pub tip: Option<ChainTip>,
    /// When log and archive were last seen equal, or an object was last written.
    pub caught_up_at: Option<Timestamp>,
    /// One past the last transaction that was read from the log.
    pub read_to: Option<Offset>,
    pub objects: u64,
    pub stored_bytes: u64,
    /// The error that is being retried.
    pub error: Option<String>,
    /// Why the log cannot be archived up to its end: bytes there that are not a commit, and are not being written.
    pub damage: Option<String>,
    /// Forks, gaps and damage since the start, newest last, with their times.
    pub events: Vec<(Timestamp, LogEvent)>,
}

/// More than the status needs; an endless row of forks must not grow memory.
const KEPT_EVENTS: usize = 32;

const ERROR_KINDS: [&str; 4] = ["store", "lease", "log", "other"];

fn kind_of(error: &BackupError) -> &'static str {
    match error {
        BackupError::Repository(RepositoryError::LeaseLost { .. } | RepositoryError::Locked { .. }) => "lease",
        BackupError::Repository(_) => "store",
        BackupError::DataDir(_) => "log",
        _ => "other",
    }
}

impl Followed {
    pub fn new(identity: Identity, name: String, since: Timestamp) -> Self {
        let followed = Self { identity, name, since, inner: Mutex::default() };
        // Counters start at nothing rather than not at all, so that the first of each is seen as an increase.
        for kind in [LogEventKind::Fork, LogEventKind::Gap, LogEventKind::Damage] {
            metrics::ARCHIVE_EVENTS.add(0, &[followed.label(), KeyValue::new("kind", kind.name())]);
        }
        for kind in ERROR_KINDS {
            metrics::ARCHIVE_ERRORS.add(0, &[followed.label(), KeyValue::new("kind", kind)]);
        }
        followed
    }

    pub fn progress(&self) -> Progress {
        self.inner.lock().clone()
    }

    /// An object is durable.
    pub fn archived(&self, timeline: TimelineId, tip: &ChainTip, stored_bytes: usize, now: Timestamp) {
        let mut inner = self.inner.lock();
        inner.timeline = Some(timeline);
        inner.tip = Some(*tip);
        inner.objects += 1;
        inner.stored_bytes += stored_bytes as u64;
        inner.read_to = inner.read_to.max(Some(tip.next));
        inner.caught_up_at = Some(now);
        inner.error = None;
        metrics::ARCHIVED_OBJECTS.add(1, &[self.label()]);
        metrics::ARCHIVED_BYTES.add(stored_bytes as u64, &[self.label()]);
    }

    /// Nothing more is archived, because of this.
    pub(crate) fn failed(&self, error: &str) {
        self.inner.lock().error = Some(error.to_owned());
    }

    /// The database's name, on every metric about it.
    pub fn label(&self) -> KeyValue {
        KeyValue::new("database", self.name.clone())
    }

    fn event(&self, now: Timestamp, event: LogEvent) {
        tracing::warn!(database = %self.name, kind = event.kind.name(), "{}", event.message);
        metrics::ARCHIVE_EVENTS.add(1, &[self.label(), KeyValue::new("kind", event.kind.name())]);
        let mut inner = self.inner.lock();
        if inner.events.len() == KEPT_EVENTS {
            inner.events.remove(0);
        }
        inner.events.push((now, event));
    }
}

/// Asks an archiver to write everything the log holds now, and to say where that is.
#[derive(Clone)]
pub struct FlushHandle(mpsc::Sender<oneshot::Sender<LogArchive>>);

impl FlushHandle {
    /// `None` when the archiver has stopped.
    pub async fn flush(&self) -> Option<LogArchive> {
        let (answer, answered) = oneshot::channel();
        self.0.send(answer).await.ok()?;
        answered.await.ok()
    }
}

/// Follows one log.
pub struct Archiver {
    work: Arc<Work>,
    followed: Arc<Followed>,
    dir: PathBuf,
    settings: Settings,
    wake: Wake,
    requests: mpsc::Receiver<oneshot::Sender<LogArchive>>,
    waiting: Vec<oneshot::Sender<LogArchive>>,
    /// The unfinished end that keeps `waiting` waiting.
    undecided: Option<u64>,
    promised: Option<Position>,
    told: Option<TornHeader>,
    stop: CancellationToken,
}

/// Why a log is no longer followed.
enum Ended {
    Stopped,
    /// The log is to be compared with the archive anew.
    Anew,
}

impl Archiver {
    pub(crate) fn new(
        work: Arc<Work>,
        followed: Arc<Followed>,
        dir: PathBuf,
        settings: Settings,
        stop: CancellationToken,
    ) -> (Self, FlushHandle) {
        let (sender, requests) = mpsc::channel(4);
        let wake = Wake::new(&dir);
        let (waiting, undecided, promised, told) = (Vec::new(), None, None, None);
        let archiver = Self { work, followed, dir, settings, wake, requests, waiting, undecided, promised, told, stop };
        (archiver, FlushHandle(sender))
    }

    /// With what was reported archived before this start: it must still be there.
    pub(crate) fn keeping(mut self, promised: Option<Position>) -> Self {
        self.promised = promised;
        self
    }

    /// Follows the log until told to stop; then writes what is left and ends. Errors are retried for ever.
    pub async fn run(mut self) {
        let backoff = patience(Duration::from_millis(200));
        let mut delays = backoff.build();
        loop {
            let before = self.followed.progress().objects;
            match self.follow().await {
                Ok(Ended::Stopped) => return,
                Ok(Ended::Anew) => delays = backoff.build(),
                Err(error) => {
                    if self.followed.progress().objects > before {
                        delays = backoff.build();
                    }
                    let delay = delays.next().unwrap_or(Duration::from_secs(15));
                    tracing::warn!(database = %self.followed.name, %error, ?delay, "archiving failed and is tried again");
                    self.followed.inner.lock().error = Some(error.to_string());
                    let kind = KeyValue::new("kind", kind_of(&error));
                    metrics::ARCHIVE_ERRORS.add(1, &[self.followed.label(), kind]);
                    self.answer_unreadable(&error);
                    tokio::select! {
                        () = self.work.clock.sleep(delay) => {}
                        // One more try is made while stopping; then the log keeps what is left for the next start.
                        () = self.stop.cancelled() => {
                            if let Err(error) = self.follow().await {
                                let name = &self.followed.name;
                                tracing::error!(database = %name, %error, "stopped before everything was archived");
                            }
                            return;
                        }
                    }
                }
            }
        }
    }

    async fn follow(&mut self) -> Result<Ended, BackupError> {
        let database = self.followed.identity;
        let Some(from) = log::find_continuation(&self.work, database, &self.dir).await? else {
            self.answer(None, None);
            return Ok(if self.wait(self.settings.poll).await { Ended::Anew } else { Ended::Stopped });
        };
        for event in from.events {
            self.followed.event(self.work.clock.now(), event);
        }
        if let Some(promised) = &self.promised {
            self.check_promise(promised).await?;
            // A store that failed has answered nothing: it is asked again.
            self.promised = None;
        }
        let timeline = from.timeline;
        {
            let mut inner = self.followed.inner.lock();
            inner.timeline = Some(timeline);
            inner.tip = from.has_past.then_some(from.tip);
        }
        let uploaded = log::upload(&self.work, database, timeline, from.tip, &self.dir).await?;
        self.tell_torn(uploaded.torn);
        let mut tip = uploaded.tip;
        let mut has_past = from.has_past || tip.next != from.tip.next;
        let Some(opened) = self.open(tip).await? else { return Ok(Ended::Anew) };
        let mut reader = Some(opened);
        let mut pending = Pending::default();
        let mut flushed_at: Option<Instant> = None;
        let mut stuck = Stuck::default();
        loop {
            let stopping = self.stop.is_cancelled();
            let Some(open) = reader.take() else { return Ok(Ended::Anew) };
            let read = self.read(open, pending).await?;
            reader = Some(read.reader);
            pending = read.pending;
            if !read.unchanged {
                return Ok(Ended::Anew);
            }
            self.follow_tail(&read.tail, &mut stuck, tip);
            self.tell_torn(read.torn);
            let asked = stopping || !self.waiting.is_empty();
            let full = read.more || pending.len() >= self.settings.flush_bytes;
            let since = flushed_at.map_or(Duration::MAX, |at| at.elapsed());
            if !pending.is_empty() && (asked || full || since >= self.settings.flush_interval) {
                flushed_at = Some(Instant::now());
                for (batch, commits) in std::mem::take(&mut pending).parts {
                    tip = self.write(timeline, tip, batch, commits).await?;
                    has_past = true;
                }
            }
            if pending.is_empty() && !read.more {
                self.caught_up(tip);
                if stopping || self.is_decided(&stuck) {
                    if !stopping && !self.waiting.is_empty() && self.is_left_behind(timeline).await? {
                        return Ok(Ended::Anew);
                    }
                    let fault = self.followed.progress().damage;
                    self.answer(Some((timeline, has_past.then_some(tip))), fault);
                }
                if stopping {
                    return Ok(Ended::Stopped);
                }
            }
            if read.more {
                continue;
            }
            if !pending.is_empty() {
                // Reading again fills the object up to its size limit; news of each write would only cost.
                let until_flush = self.settings.flush_interval.saturating_sub(since);
                self.wait(until_flush.min(self.settings.poll)).await;
            } else if self.wake.is_armed() {
                self.wait(self.settings.poll).await;
            } else {
                // Read once more before waiting: something may have been written before the watch began.
                self.wake.arm();
            }
        }
    }

    /// Writes one object, as a trace that begins when the first of its transactions was made.
    async fn write(
        &self,
        timeline: TimelineId,
        before: ChainTip,
        batch: Batch,
        commits: Vec<u8>,
    ) -> Result<ChainTip, BackupError> {
        let made = batch.times.first.unwrap_or_else(|| self.work.clock.now().as_microsecond());
        let attributes = vec![
            KeyValue::new("db.system.name", "spacetimedb"),
            KeyValue::new("db.namespace", self.followed.name.clone()),
            KeyValue::new("inner_universe.timeline", i64::from(timeline.0)),
            KeyValue::new("inner_universe.transaction.first", int(batch.first.0)),
            KeyValue::new("inner_universe.transaction.last", int(batch.last.0)),
            KeyValue::new("inner_universe.log.size", int(commits.len() as u64)),
        ];
        let whole = Earlier::begin("commit to object", time_of(made), attributes);
        let span = work_span!("archive", database = %self.followed.name, first = batch.first.0, last = batch.last.0);
        let writing = log::write_batch(&self.work, self.followed.identity, timeline, before, batch, commits);
        let result = traced(whole.above(span), writing).await;
        result.inspect_err(|error| whole.failed(error))
    }

    /// Waits for news of the log, a request, or `limit`. `false` when told to stop.
    async fn wait(&mut self, limit: Duration) -> bool {
        tokio::select! {
            () = self.wake.written() => {}
            () = self.work.clock.sleep(limit) => {}
            Some(request) = self.requests.recv() => self.waiting.push(request),
            () = self.stop.cancelled() => return false,
        }
        true
    }

    async fn check_promise(&self, promised: &Position) -> Result<(), BackupError> {
        let (repository, database) = (&self.work.repository, &self.followed.identity);
        let timelines = repository.timelines(database).await?;
        let chain = repository.log_chain(database, &timelines, promised.timeline).await?.before_loss();
        let lost_from = match chain.last() {
            Some(last) if last >= promised.offset => return Ok(()),
            Some(last) => Offset(last.0 + 1),
            None => Offset(0),
        };
        let text = format!(
            "transactions {lost_from} to {} were archived on timeline {} and are no longer in the store; find out who \
             deleted them, and run `inner-universe verify`",
            promised.offset, promised.timeline
        );
        self.followed.event(self.work.clock.now(), LogEvent { kind: LogEventKind::Damage, message: text });
        Ok(())
    }

    /// Has another writer begun a newer timeline? Retention would remove what we write on ours.
    async fn is_left_behind(&self, timeline: TimelineId) -> Result<bool, BackupError> {
        let timelines = self.work.repository.timelines(&self.followed.identity).await?;
        Ok(timelines.last().is_some_and(|newest| newest.timeline > timeline))
    }

    /// Opens the log after `tip`; `None` when its last commit is not the archive's.
    async fn open(&self, tip: ChainTip) -> Result<Option<LogReader>, BackupError> {
        let (dir, hashing) = (self.dir.clone(), self.work.repository.hashing()?);
        let open = move || {
            let last = Offset(tip.next.0.saturating_sub(1));
            let reaches_back = segments(&dir)?.first().is_some_and(|segment| segment.first <= last);
            let Some(expected) = tip.last_commit.filter(|_| reaches_back) else {
                return LogReader::open(&dir, tip.next).map(Some);
            };
            let mut reader = LogReader::open(&dir, last)?;
            let mut commit = Vec::new();
            let batch = reader.next_batch(1, &mut commit)?;
            let same = batch.is_some_and(|batch| batch.last == last) && hashing.name_of(&commit) == expected;
            Ok(same.then_some(reader))
        };
        Ok(blocking(open).await??)
    }

    async fn read(&self, mut reader: LogReader, mut pending: Pending) -> Result<Read, BackupError> {
        let room = self.settings.flush_bytes.saturating_sub(pending.len()).max(1);
        let read = blocking(move || {
            // A shared one: it has room for more than a database writes in a second, and there may be hundreds of databases.
            let mut commits = Buffer::take();
            let mut more = false;
            let unchanged = reader.is_unchanged()?;
            if unchanged && let Some(batch) = reader.next_batch(room, &mut commits)? {
                more = !reader.at_end();
                pending.add(batch, &commits);
            }
            // Looked at again after reading: what was read continues what was there before.
            let unchanged = unchanged && reader.is_unchanged()?;
            let (tail, torn) = (reader.tail().clone(), reader.torn());
            Ok::<_, DataDirError>(Read { reader, pending, unchanged, tail, torn, more })
        });
        let read = read.await??;
        if let Some((batch, _)) = read.pending.parts.last() {
            self.followed.inner.lock().read_to = Some(Offset(batch.last.0 + 1));
        }
        Ok(read)
    }

    fn follow_tail(&self, tail: &Tail, stuck: &mut Stuck, tip: ChainTip) {
        let Tail::Unfinished { at, reason } = tail else {
            *stuck = Stuck::default();
            self.followed.inner.lock().damage = None;
            return;
        };
        if stuck.at != Some(*at) {
            *stuck = Stuck { at: Some(*at), since: Some(Instant::now()), told: false };
            self.followed.inner.lock().damage = None;
        } else if !stuck.told && stuck.since.is_some_and(|since| since.elapsed() > STUCK_AFTER) {
            stuck.told = true;
            let text = format!(
                "the log ends at byte {at} of its last segment in something that is no commit ({reason}); after a crash \
                 the server drops it at its next start, but if the server runs and writes on, the segment is damaged and \
                 nothing after transaction {} is archived",
                tip.next.0.saturating_sub(1)
            );
            self.followed.inner.lock().damage = Some(text.clone());
            self.followed.event(self.work.clock.now(), LogEvent { kind: LogEventKind::Damage, message: text });
        }
    }

    /// Says once what the server is going to drop.
    fn tell_torn(&mut self, torn: Option<TornHeader>) {
        if let Some(torn) = torn
            && self.told != Some(torn)
        {
            self.told = Some(torn);
            let event = LogEvent { kind: LogEventKind::Damage, message: torn.to_string() };
            self.followed.event(self.work.clock.now(), event);
        }
    }

    fn caught_up(&self, tip: ChainTip) {
        let mut inner = self.followed.inner.lock();
        inner.caught_up_at = Some(self.work.clock.now());
        inner.read_to = Some(tip.next);
        inner.error = None;
    }

    /// Whether the log's end is known. Bytes there that are not a commit are a write under way, which soon moves the end, or
    /// damage, which stays: the answer waits until it is clear which.
    fn is_decided(&mut self, stuck: &Stuck) -> bool {
        if self.waiting.is_empty() {
            return false;
        }
        match stuck.at {
            Some(at) if !stuck.told => *self.undecided.get_or_insert(at) != at,
            _ => true,
        }
    }

    /// A restore point does not wait until a log that cannot be read is mended.
    fn answer_unreadable(&mut self, error: &BackupError) {
        if let BackupError::DataDir(error) = error {
            while let Ok(request) = self.requests.try_recv() {
                self.waiting.push(request);
            }
            self.answer(None, Some(error.to_string()));
        }
    }

    fn answer(&mut self, end: Option<(TimelineId, Option<ChainTip>)>, fault: Option<String>) {
        self.undecided = None;
        for request in self.waiting.drain(..) {
            let (timeline, tip) = end.map_or((TimelineId::FIRST, None), |(timeline, tip)| (timeline, tip));
            // The asking side may have given up.
            let tip = tip.map(Tip::from);
            let _ = request.send(LogArchive { timeline, tip, problems: Vec::new(), fault: fault.clone() });
        }
    }
}

/// Commits read and not yet written, a part for each format version.
#[derive(Default)]
struct Pending {
    parts: Vec<(Batch, Vec<u8>)>,
}

impl Pending {
    fn add(&mut self, batch: Batch, commits: &[u8]) {
        match self.parts.last_mut() {
            Some((pending, before)) if pending.log_version == batch.log_version => {
                pending.merge(&batch);
                before.extend_from_slice(commits);
            }
            _ => self.parts.push((batch, commits.to_vec())),
        }
    }

    fn len(&self) -> usize {
        self.parts.iter().map(|(_, commits)| commits.len()).sum()
    }

    fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }
}

struct Read {
    reader: LogReader,
    pending: Pending,
    /// Does the log still hold what was read of it?
    unchanged: bool,
    tail: Tail,
    torn: Option<TornHeader>,
    /// There is more to read at once.
    more: bool,
}

#[derive(Default)]
struct Stuck {
    at: Option<u64>,
    since: Option<Instant>,
    told: bool,
}

#[cfg(test)]
mod tests;
