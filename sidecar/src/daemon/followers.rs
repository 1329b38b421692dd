//! One follower for each database of the data directory: its archiver, its snapshots, its compaction. Databases come and go.

use std::collections::{BTreeMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::sync::{Mutex, Semaphore, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::archiver::position::{Position, Positions};
use crate::archiver::{Archiver, FlushHandle, Followed, Settings, compaction};
use crate::backup::log::LogArchive;
use crate::backup::{BackupError, LogSource, Observer, Work, blocking, snapshot};
use crate::clock::{Clock, Stopwatch};
use crate::daemon::conditions::{ConditionKind, Ends, Streak, Subject, watched};
use crate::daemon::state::State;
use crate::daemon::{Daemon, DaemonError, LOOK_INTERVAL};
use crate::datadir::control_db::{ControlDbCopy, Database};
use crate::datadir::{self, ReplicaDir};
use crate::ids::{Identity, Offset, TimelineId};
use crate::observe::own::{traced, work_span};
use crate::observe::{calls, metrics};
use crate::repository::log_object::ChainTip;

/// How often native snapshots are looked for on the disk.
const SNAPSHOT_INTERVAL: Duration = Duration::from_secs(5);
/// How often the store is asked whether it still holds what was archived of them.
const SNAPSHOT_DOUBT: Duration = Duration::from_secs(600);
/// Who wants a restore point waits so long for a log to be archived.
const FLUSH_LIMIT: Duration = Duration::from_secs(120);
/// Databases whose log objects are merged at once: many enough to keep up over a store that takes its time, few enough for
/// memory.
static MERGING: Semaphore = Semaphore::const_new(8);
/// Restore points that nobody asked for are at least so far apart.
const INSTANCE_PAUSE: Duration = Duration::from_secs(2);

/// The followers by database.
#[derive(Default)]
pub(super) struct Followers {
    by_database: parking_lot::Mutex<BTreeMap<Identity, Follower>>,
    /// The databases that the server had at the last look.
    pub(super) known: parking_lot::Mutex<Vec<Database>>,
    tasks: parking_lot::Mutex<Vec<JoinHandle<()>>>,
    /// Held while a follower uploads a snapshot, whose packs nothing names before its end, and while objects are removed. One
    /// after another: memory is the same for one database and for hundreds.
    pub(super) uploads: Arc<Mutex<()>>,
}

struct Follower {
    replica: u64,
    flush: FlushHandle,
    stop: CancellationToken,
}

impl Followers {
    /// The replicas whose logs are followed.
    pub(super) fn replicas(&self) -> HashSet<u64> {
        self.by_database.lock().values().map(|follower| follower.replica).collect()
    }

    /// Has each log archived up to its end, on its database's newest timeline. One that cannot be is waited for a while.
    pub(super) async fn flush(&self, clock: &dyn Clock) {
        let handles: Vec<_> = self.by_database.lock().values().map(|follower| follower.flush.clone()).collect();
        tokio::select! {
            _ = futures::future::join_all(handles.iter().map(FlushHandle::flush)) => {}
            () = clock.sleep(FLUSH_LIMIT) => {}
        }
    }

    /// Waits until all have ended, after they were told to.
    pub(super) async fn join(&self) {
        loop {
            let Some(task) = self.tasks.lock().pop() else { return };
            if let Err(error) = AbortOnDropHandle::new(task).await {
                tracing::error!(%error, "a follower ended badly");
            }
        }
    }

    /// Ends those that did not end when they were told to: the next daemon of this process has followers of its own.
    pub(super) fn abort(&self) {
        self.tasks.lock().drain(..).for_each(|task| task.abort());
    }
}

impl LogSource for Followers {
    fn archive<'a>(
        &'a self,
        work: &'a Arc<Work>,
        database: &'a Database,
        _dir: PathBuf,
    ) -> BoxFuture<'a, Result<LogArchive, BackupError>> {
        async move {
            let name = database.display_name();
            let flushed = async {
                loop {
                    let handle = self.by_database.lock().get(&database.identity).map(|follower| follower.flush.clone());
                    if let Some(handle) = handle {
                        return handle.flush().await;
                    }
                    // It appeared a moment ago, or we have only just started.
                    work.clock.sleep(LOOK_INTERVAL / 4).await;
                }
            };
            tokio::select! {
                archive = flushed => archive.ok_or_else(|| BackupError::NotFollowed {
                    name: name.clone(),
                    reason: "its archiver is stopping".into(),
                }),
                () = work.clock.sleep(FLUSH_LIMIT) => Err(BackupError::NotFollowed {
                    name: name.clone(),
                    reason: format!("its log was not archived within {FLUSH_LIMIT:?}; see `inner-universe status`"),
                }),
            }
        }
        .boxed()
    }
}

/// Passes on what an archiver wrote.
struct Report {
    followed: Arc<Followed>,
    position: watch::Sender<Option<Position>>,
    repository: crate::ids::RestorePointId,
    clock: Arc<dyn crate::clock::Clock>,
}

impl Observer for Report {
    fn archived(&self, _: Identity, timeline: TimelineId, tip: &ChainTip, stored_bytes: usize) {
        self.followed.archived(timeline, tip, stored_bytes, self.clock.now());
        if let Some(offset) = tip.next.0.checked_sub(1) {
            let offset = crate::ids::Offset(offset);
            let _ = self.position.send(Some(Position { repository: self.repository, timeline, offset }));
        }
    }
}

impl Daemon {
    /// Starts and ends followers as databases come and go.
    pub(super) async fn look_around(
        self: &Arc<Self>,
        positions: &Positions,
        stop: &CancellationToken,
    ) -> Result<(), DaemonError> {
        let mut seen = None;
        let mut failures = Streak::new(&self.state, ConditionKind::DatabasesUnknown, Subject::Sidecar);
        loop {
            let now = self.fingerprint().await?;
            if seen != Some(now) {
                match self.look(positions, stop).await {
                    Ok(()) => {
                        seen = Some(now);
                        failures.succeeded();
                    }
                    // The control database is being written; the next look finds it at rest.
                    Err(error) => {
                        tracing::debug!(%error, "the control database is looked at again");
                        failures.failed(format!("databases that are new are not archived: {error}"));
                    }
                }
            }
            self.clock.sleep(LOOK_INTERVAL).await;
        }
    }

    /// Makes a restore point whenever the instance changes. Apart from [`Self::look_around`], since a restore point waits
    /// for the followers that are started there.
    pub(super) async fn capture_changes(&self) -> Result<(), DaemonError> {
        let mut captured = None;
        loop {
            let now = self.fingerprint().await?;
            if captured != Some(now) {
                // Whatever made the change is likely not done yet.
                self.clock.sleep(INSTANCE_PAUSE).await;
                match self.capture_if_changed().await {
                    Ok(()) => {
                        captured = Some(now);
                        self.state.clear(ConditionKind::InstanceNotCaptured, &Subject::Sidecar);
                    }
                    Err(error) => {
                        tracing::warn!(%error, "no restore point was made for the changed instance; it is tried again");
                        let message = format!("the instance changed, and no restore point holds the change: {error}");
                        self.state.raise(ConditionKind::InstanceNotCaptured, Subject::Sidecar, message);
                        self.state.failed(error.to_string());
                    }
                }
            }
            self.clock.sleep(LOOK_INTERVAL).await;
        }
    }

    async fn fingerprint(&self) -> Result<u64, BackupError> {
        let data = self.data.clone();
        blocking(move || fingerprint(data.root())).await
    }

    pub(super) async fn look(
        self: &Arc<Self>,
        positions: &Positions,
        stop: &CancellationToken,
    ) -> Result<(), BackupError> {
        let data = self.data.clone();
        let control = blocking(move || ControlDbCopy::take(&data)).await??;
        let mut present = HashSet::new();
        for database in &control.databases {
            let Some(replica) = database.replica else { continue };
            present.insert(database.identity);
            let known = self.followers.by_database.lock().get(&database.identity).map(|follower| follower.replica);
            if known == Some(replica) {
                continue;
            }
            if known.is_some() {
                self.end(&database.identity);
            }
            let follower = self.start(database, self.data.replica(replica), positions, stop);
            self.followers.by_database.lock().insert(database.identity, follower);
        }
        if let Some(bundled) = &self.config.spacetimedb_config.database
            && !control.databases.iter().any(|database| database.replica.is_some() && database.is_called(bundled))
        {
            self.calls.has_no_bundled();
        }
        let gone: Vec<_> = self.followers.by_database.lock().keys().copied().collect();
        for identity in gone.iter().filter(|identity| !present.contains(*identity)) {
            tracing::info!(%identity, "the database is gone from the server; its archive stays");
            self.end(identity);
        }
        self.followers.known.lock().clone_from(&control.databases);
        Ok(())
    }

    fn end(&self, identity: &Identity) {
        if let Some(follower) = self.followers.by_database.lock().remove(identity) {
            follower.stop.cancel();
            self.state.forget(identity);
        }
    }

    fn start(
        self: &Arc<Self>,
        database: &Database,
        replica: ReplicaDir,
        positions: &Positions,
        stop: &CancellationToken,
    ) -> Follower {
        let name = database.display_name();
        tracing::info!(database = %name, "following its log");
        let followed = Arc::new(Followed::new(database.identity, name, self.clock.now()));
        self.state.follow(Arc::clone(&followed));
        let stop = stop.child_token();
        let (position, written) = watch::channel(None);
        let report = Report {
            followed: Arc::clone(&followed),
            position,
            repository: self.repository.info.id,
            clock: Arc::clone(&self.clock),
        };
        let promised = positions.read(&database.identity).filter(|found| found.repository == self.repository.info.id);
        let work = Arc::new(self.work(Arc::new(report)));
        let settings = Settings {
            flush_interval: self.config.archive.flush_interval.0,
            flush_bytes: usize::try_from(self.config.archive.flush_bytes.0).unwrap_or(usize::MAX),
            poll: self.config.archive.flush_interval.0.clamp(Duration::from_millis(50), Duration::from_millis(500)) / 2,
        };
        let (archiver, flush) =
            Archiver::new(Arc::clone(&work), Arc::clone(&followed), replica.log_path(), settings, stop.clone());
        let archiver = archiver.keeping(promised);
        let part = Part { work, followed, state: Arc::clone(&self.state), stop: stop.clone() };
        let archiving = archive_to_the_end(archiver, Arc::clone(&part.followed));
        self.run_part(&part, "the archiver", Ends::WhenStopped, archiving);
        let state = Arc::clone(&self.state);
        let positions = write_positions(positions.clone(), state, Arc::clone(&part.followed), written);
        self.run_part(&part, "the record of positions", Ends::WhenStopped, positions);
        let archive = &self.config.archive;
        if archive.compaction {
            let compacting = compact(part.clone(), archive.compaction_interval.0, archive.compaction_grace.0);
            self.run_part(&part, "compaction", Ends::WhenStopped, compacting);
        }
        let bundled = self.config.spacetimedb_config.database.as_deref();
        let calls = calls::Database {
            name: part.followed.name.clone(),
            identity: database.identity,
            is_bundled: bundled.is_some_and(|name| database.is_called(name)),
            dir: replica.log_path(),
        };
        let calls = Arc::clone(&self.calls).follow(calls, stop.clone());
        self.run_part(&part, "the stream of calls", Ends::WhenDone, calls);
        let (name, logs) = (part.followed.name.clone(), replica.module_logs_path());
        let sending = Arc::clone(&self.module_logs).follow(name, database.identity, logs, stop.clone());
        self.run_part(&part, "the stream of the module's log", Ends::WhenDone, sending);
        let uploads = Arc::clone(&self.followers.uploads);
        let snapshots = follow_snapshots(part.clone(), replica.clone(), uploads);
        self.run_part(&part, "the archive of snapshots", Ends::WhenStopped, snapshots);
        Follower { replica: replica.id, flush, stop }
    }

    fn run_part(&self, part: &Part, name: &'static str, ends: Ends, task: impl Future<Output = ()> + Send + 'static) {
        let task = watched(&self.state, (name, part.subject()), ends, part.stop.clone(), task);
        let mut tasks = self.followers.tasks.lock();
        tasks.retain(|task| !task.is_finished());
        tasks.push(task);
    }

    /// A new database, a new program or another configuration: the newest restore point does not know it yet.
    async fn capture_if_changed(&self) -> Result<(), BackupError> {
        let data = self.data.clone();
        let sealed = self.repository.keys.seals() || self.allow_plain_keys;
        let keys = self.config.spacetimedb_config.named_keys().filter(|_| sealed);
        let capture = blocking(move || {
            let control = ControlDbCopy::take(&data)?;
            Ok::<_, BackupError>(crate::repository::instance::Capture::take(&data, &control, keys.as_ref())?)
        });
        let state = self.repository.hashing()?.name(capture.await??.state);
        if let Some(id) = self.repository.restore_point_ids().await?.last() {
            match self.repository.restore_point(*id).await {
                Ok(newest) if newest.instance_state == state => return Ok(()),
                Ok(_) => {}
                Err(error) if error.is_permanent() => {}
                Err(error) => return Err(error.into()),
            }
        }
        match self.restore_point(None).await {
            Ok(report) => {
                tracing::info!(restore_point = %report.restore_point, "the instance changed; a restore point holds it");
                Ok(())
            }
            // Nothing is published yet.
            Err(BackupError::Empty(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Runs an archiver. One that panics leaves its log unarchived, which is the log's error.
async fn archive_to_the_end(archiver: Archiver, followed: Arc<Followed>) {
    if let Err(panic) = AssertUnwindSafe(archiver.run()).catch_unwind().await {
        followed.failed("its archiver ended with an error of its own");
        std::panic::resume_unwind(panic);
    }
}

/// What the parts of one follower share.
#[derive(Clone)]
struct Part {
    work: Arc<Work>,
    followed: Arc<Followed>,
    state: Arc<State>,
    stop: CancellationToken,
}

impl Part {
    fn subject(&self) -> Subject {
        Subject::Database(self.followed.name.clone())
    }
}

async fn write_positions(
    positions: Positions,
    state: Arc<State>,
    followed: Arc<Followed>,
    mut written: watch::Receiver<Option<Position>>,
) {
    while written.changed().await.is_ok() {
        let Some(position) = written.borrow_and_update().clone() else { continue };
        let (positions, database) = (positions.clone(), followed.identity);
        let result = match blocking(move || positions.write(&database, &position)).await {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = &result {
            tracing::warn!(%error, "the position was not written");
        }
        state.check(ConditionKind::StateDirectory, Subject::Database(followed.name.clone()), result);
    }
}

/// Uploads each native snapshot once it is complete and its transaction archived.
async fn follow_snapshots(part: Part, replica: ReplicaDir, uploads: Arc<Mutex<()>>) {
    let subject = part.subject();
    let Part { work, followed, state, stop } = part;
    let mut failures = Streak::new(&state, ConditionKind::SnapshotFailing, subject.clone());
    let mut told = HashSet::new();
    // What the disk held when all of it was archived, and since when: asking the store costs five requests.
    let mut settled: Option<(TimelineId, Vec<Offset>, Stopwatch)> = None;
    loop {
        tokio::select! {
            () = work.clock.sleep(SNAPSHOT_INTERVAL) => {}
            () = stop.cancelled() => return,
        }
        let progress = followed.progress();
        let (Some(timeline), Some(tip)) = (progress.timeline, progress.tip) else { continue };
        let Some(archived) = tip.next.0.checked_sub(1).map(Offset) else { continue };
        // One that cannot be listed is for the archiving below to report.
        let found = datadir::snapshot::list(&replica.snapshots_path()).unwrap_or_default();
        let usable: Vec<_> = found.into_iter().map(|found| found.offset).filter(|offset| *offset <= archived).collect();
        let is_settled = settled.as_ref().is_some_and(|(on, held, since)| {
            *on == timeline && *held == usable && since.elapsed_seconds() < SNAPSHOT_DOUBT.as_secs_f64()
        });
        if is_settled {
            continue;
        }
        settled = None;
        let _upload = tokio::select! {
            upload = uploads.lock() => upload,
            () = stop.cancelled() => return,
        };
        // The others may have taken long, and the server gone back to an earlier moment meanwhile.
        if followed.progress().timeline != Some(timeline) {
            continue;
        }
        let found = tokio::select! {
            found = snapshot::archive(&work, followed.identity, timeline, archived, &replica) => found,
            () = stop.cancelled() => return,
        };
        match found {
            Ok(problems) => {
                // Files may have changed under the reader; what is told twice stays.
                if problems.iter().all(|problem| told.contains(problem)) {
                    settled = Some((timeline, usable, Stopwatch::start()));
                    match problems.first() {
                        None => failures.succeeded(),
                        Some(problem) => {
                            let message = format!("database {}: {problem}", followed.name);
                            state.raise(ConditionKind::SnapshotFailing, subject.clone(), message);
                        }
                    }
                }
                for problem in problems {
                    if told.insert(problem.clone()) {
                        tracing::warn!(database = %followed.name, "{problem}");
                    }
                }
            }
            Err(error) => {
                tracing::warn!(database = %followed.name, %error, "the snapshot is tried again");
                failures.failed(format!("database {}: its snapshot is not archived: {error}", followed.name));
            }
        }
    }
}

/// Merges small objects from time to time.
async fn compact(part: Part, interval: Duration, grace: Duration) {
    for counter in [
        &metrics::COMPACTION_MERGED,
        &metrics::COMPACTION_WRITTEN,
        &metrics::COMPACTION_DELETED,
        &metrics::COMPACTION_ERRORS,
    ] {
        counter.add(0, &[part.followed.label()]);
    }
    let mut failures = Streak::new(&part.state, ConditionKind::CompactionFailing, part.subject());
    loop {
        tokio::select! {
            () = part.work.clock.sleep(interval) => {}
            () = part.stop.cancelled() => return,
        }
        let _merging = tokio::select! {
            merging = MERGING.acquire() => merging.ok(),
            () = part.stop.cancelled() => return,
        };
        let result = tokio::select! {
            result = compact_once(&part, grace) => result,
            () = part.stop.cancelled() => return,
        };
        match result {
            Ok(()) => failures.succeeded(),
            Err(error) => {
                metrics::COMPACTION_ERRORS.add(1, &[part.followed.label()]);
                tracing::warn!(database = %part.followed.name, %error, "compaction is tried again");
                failures.failed(format!("database {}: log objects are not merged: {error}", part.followed.name));
            }
        }
    }
}

/// A pass over every timeline. A failure of one does not keep the others from theirs.
async fn compact_once(part: &Part, grace: Duration) -> Result<(), BackupError> {
    let Part { work, followed, .. } = part;
    let mut result = Ok(());
    for timeline in work.repository.timelines(&followed.identity).await? {
        let pass = traced(
            work_span!("merge log objects", database = %followed.name),
            compaction::pass(work, followed.identity, timeline.timeline, grace),
        );
        match pass.await {
            Ok(pass) if pass == compaction::Pass::default() => {}
            Ok(pass) => {
                metrics::COMPACTION_MERGED.add(pass.merged, &[followed.label()]);
                metrics::COMPACTION_WRITTEN.add(pass.written, &[followed.label()]);
                metrics::COMPACTION_DELETED.add(pass.deleted, &[followed.label()]);
                tracing::info!(
                    database = %followed.name,
                    merged = pass.merged,
                    written = pass.written,
                    deleted = pass.deleted,
                    "log objects were merged"
                );
            }
            Err(error) => result = result.and(Err(error)),
        }
    }
    result
}

/// Changes when a database, a program or the server's configuration may have.
fn fingerprint(root: &Path) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    use std::os::unix::fs::MetadataExt;
    let mut hasher = DefaultHasher::new();
    let mut add = |path: &Path| {
        if let Ok(kind) = std::fs::metadata(path) {
            (path, kind.ino(), kind.len(), kind.mtime(), kind.mtime_nsec()).hash(&mut hasher);
        }
    };
    for path in ["metadata.toml", "config.toml", "replicas", "program-bytes"] {
        add(&root.join(path));
    }
    for dir in ["control-db", "program-bytes"] {
        let mut paths: Vec<_> =
            std::fs::read_dir(root.join(dir)).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        paths.sort();
        paths.iter().for_each(|path| add(path));
    }
    hasher.finish()
}
