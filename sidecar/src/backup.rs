//! Backups: what is new since the last one, then a restore point that names it all.
//!
//! Invariants: the server's files are only read; log goes up in order, so the archive is always an unbroken prefix; the
//! control database is captured after the logs, and the restore point is written last.

pub mod log;
pub mod snapshot;

use std::path::PathBuf;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::backup::log::LogArchive;
use crate::clock::{Clock, Stopwatch};
use crate::datadir::control_db::{ControlDbCopy, Database};
use crate::datadir::key_files::KeyFiles;
use crate::datadir::{DataDir, DataDirError, ReplicaDir};
use crate::ids::{Identity, Offset, RestorePointId, TimelineId};
use crate::progress::{Progress, Tally};
use crate::repository::instance::{Capture, InstanceError};
use crate::repository::log_object::ChainTip;
use crate::repository::manifest::{self, DatabasePoint, DatabasePromise, RestorePoint, TablePromise};
use crate::repository::{Repository, RepositoryError, paths};

/// zstd level. Commits are short and alike: level 3 takes twice the time of level 1 and saves one percent.
pub const DEFAULT_LEVEL: i32 = 1;
/// Bytes of log in one object, and so the unit of memory and of work.
pub const OBJECT_SIZE: usize = 4 << 20;
/// Bytes read at a time where nothing is kept.
pub const READ_SIZE: usize = 1 << 20;
/// How often, and after which pause, a data directory is looked at again that has replicas and no database to back up.
const EMPTY_LOOKS: u32 = 10;
const EMPTY_PAUSE: std::time::Duration = std::time::Duration::from_millis(200);
/// Objects being compressed at once.
pub const WORKERS: usize = 2;

/// What can go wrong with a backup.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error("{0} holds no database with a transaction yet; publish a module first")]
    Empty(PathBuf),
    #[error(
        "keys would lie in the repository unencrypted; give an age --recipient when the repository is made, \
         or allow it with --allow-plain-keys"
    )]
    PlainKeys,
    #[error(
        "database {name} is in the archive and its log is gone from {}; check the data directory: a backup without it would \
         look complete",
        path.display()
    )]
    LogVanished { name: String, path: PathBuf },
    #[error("database {name} cannot be backed up: {reason}; restore it, or delete it from the server")]
    NoLog { name: String, reason: String },
    #[error("database {name} is not archived up to now: {reason}")]
    NotFollowed { name: String, reason: String },
    #[error("a worker of the backup stopped: {0}")]
    Worker(String),
}

impl BackupError {
    /// Is something wrong with what is stored?
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Repository(error) if error.is_damage())
    }
}

/// How a backup is taken.
#[derive(Debug, Clone, Default)]
pub struct BackupOptions {
    pub label: Option<String>,
    /// The token keys, if they are to be captured.
    pub token_keys: Option<KeyFiles>,
    pub allow_plain_keys: bool,
    /// zstd level; `None` for [`DEFAULT_LEVEL`].
    pub level: Option<i32>,
}

/// What a backup did. Field names are stable.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct BackupReport {
    pub restore_point: RestorePointId,
    pub label: Option<String>,
    pub databases: Vec<DatabaseReport>,
    pub bytes_read: u64,
    pub bytes_written: u64,
    pub objects_written: u64,
    pub duration_ms: u64,
    /// What the operator should know although the backup succeeded.
    pub problems: Vec<String>,
    /// `false` where the restore point lacks something that the server has, or should have; `problems` says what.
    #[serde(default = "is_complete")]
    pub complete: bool,
    /// The file that holds it all, where one was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "crate::lossy::option")]
    pub bundle: Option<PathBuf>,
}

/// Daemons of earlier releases did not say.
fn is_complete() -> bool {
    true
}

/// Where one database stands, in a backup's or restore's report.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DatabaseReport {
    pub identity: Identity,
    pub name: String,
    pub timeline: TimelineId,
    pub offset: Offset,
    pub time: Option<Timestamp>,
}

/// What every step of a backup works with.
pub(crate) struct Work {
    pub repository: Repository,
    pub clock: Arc<dyn Clock>,
    pub progress: Arc<dyn Progress>,
    pub tally: Arc<Tally>,
    pub level: i32,
    pub observer: Arc<dyn Observer>,
    /// Who can tell what the live server has.
    pub witness: Option<Arc<dyn Witness>>,
}

/// Tells what the live server has.
pub trait Witness: Send + Sync {
    /// Are tables asked for over connections, which have to be opened first?
    fn connects(&self) -> BoxFuture<'_, bool>;
    /// Opens what asking for the tables of `databases` needs, so that its transactions are in the log beforehand. Returns
    /// true if something was written to them.
    fn prepare<'a>(&'a self, databases: &'a [Identity]) -> BoxFuture<'a, bool>;
    /// The tables of a database as they are now; `None` where it cannot be asked.
    fn tables(&self, database: Identity) -> BoxFuture<'_, Option<Vec<TablePromise>>>;
}

/// Told whenever the archive of a database has grown and what was added is durable.
pub trait Observer: Send + Sync {
    fn archived(&self, database: Identity, timeline: TimelineId, tip: &ChainTip, stored_bytes: usize);
}

/// Tells nobody.
pub struct Unobserved;

impl Observer for Unobserved {
    fn archived(&self, _: Identity, _: TimelineId, _: &ChainTip, _: usize) {}
}

/// How a restore point gets at a database's archive: by archiving the log itself, or by asking who follows it.
pub(crate) trait LogSource: Sync {
    fn archive<'a>(
        &'a self,
        work: &'a Arc<Work>,
        database: &'a Database,
        dir: PathBuf,
    ) -> BoxFuture<'a, Result<LogArchive, BackupError>>;
}

/// Archives the log itself.
struct Direct;

impl LogSource for Direct {
    fn archive<'a>(
        &'a self,
        work: &'a Arc<Work>,
        database: &'a Database,
        dir: PathBuf,
    ) -> BoxFuture<'a, Result<LogArchive, BackupError>> {
        async move { log::archive(work, database.identity, &dir).await }.boxed()
    }
}

/// Archives what is new and makes a restore point.
///
/// # Errors
/// When the data directory or the repository fails. What was uploaded by then stays and is not uploaded again.
pub async fn create(
    repository: &Repository,
    data: &DataDir,
    options: &BackupOptions,
    clock: Arc<dyn Clock>,
    progress: Arc<dyn Progress>,
) -> Result<BackupReport, BackupError> {
    create_witnessed(repository, data, options, clock, progress, None).await
}

/// As [`create`], and the restore point promises what `witness` tells, if nothing is written meanwhile.
///
/// # Errors
/// As [`create`].
pub async fn create_witnessed(
    repository: &Repository,
    data: &DataDir,
    options: &BackupOptions,
    clock: Arc<dyn Clock>,
    progress: Arc<dyn Progress>,
    witness: Option<Arc<dyn Witness>>,
) -> Result<BackupReport, BackupError> {
    let work = Arc::new(Work {
        repository: repository.clone(),
        clock,
        progress,
        tally: Arc::new(Tally::default()),
        level: options.level.unwrap_or(DEFAULT_LEVEL),
        observer: Arc::new(Unobserved),
        witness,
    });
    create_from(&work, &Direct, data, options).await
}

/// As [`create`], with the logs' archives from `source`.
pub(crate) async fn create_from(
    work: &Arc<Work>,
    source: &dyn LogSource,
    data: &DataDir,
    options: &BackupOptions,
) -> Result<BackupReport, BackupError> {
    let stopwatch = Stopwatch::start();
    if options.token_keys.is_some() && !work.repository.keys.seals() && !options.allow_plain_keys {
        return Err(BackupError::PlainKeys);
    }
    // Most need no connection: then the control database is not copied for it.
    if let Some(witness) = &work.witness
        && witness.connects().await
    {
        let databases = copy_control_db(data).await?.databases;
        let databases: Vec<_> = databases.iter().map(|database| database.identity).collect();
        if witness.prepare(&databases).await {
            work.clock.sleep(SETTLE).await;
        }
    }
    let mut found = Found::default();
    let mut archived: Vec<(Identity, LogArchive)> = Vec::new();
    let mut looks = 0;
    // A database that appears while we work is found in the next copy, and then archived as well.
    let (control, points) = loop {
        let control = copy_control_db(data).await?;
        let new: Vec<_> = control
            .databases
            .iter()
            .filter(|database| !archived.iter().any(|(identity, _)| *identity == database.identity))
            .cloned()
            .collect();
        if new.is_empty() {
            let points: Vec<DatabasePoint> =
                control.databases.iter().filter_map(|database| point_of(database, &archived)).collect();
            if !points.is_empty() || found.is_incomplete || looks == EMPTY_LOOKS || data.replicas()?.is_empty() {
                break (control, points);
            }
            // The server answers a publish a moment before its files show it.
            looks += 1;
            archived.clear();
            found = Found::default();
            work.clock.sleep(EMPTY_PAUSE).await;
        }
        for database in new {
            let archive = archive_database(work, source, data, &database, &mut found).await?;
            archived.push((database.identity, archive));
        }
    };
    if let Some(failure) = found.failure.filter(|_| !found.has_log) {
        return Err(failure);
    }
    if points.is_empty() {
        return Err(BackupError::Empty(data.root().to_owned()));
    }
    let promises = promises(work, data, &points).await?;
    let point = seal_restore_point(work, data, control, points, promises, options).await?;
    Ok(BackupReport {
        restore_point: point.id,
        label: point.label,
        databases: point.databases.iter().map(DatabaseReport::of).collect(),
        bytes_read: work.tally.bytes_read(),
        bytes_written: work.tally.bytes_written(),
        objects_written: work.tally.objects_written(),
        duration_ms: stopwatch.elapsed_ms(),
        problems: found.problems,
        complete: !found.is_incomplete,
        bundle: None,
    })
}

impl DatabaseReport {
    pub fn of(point: &DatabasePoint) -> Self {
        Self {
            identity: point.identity,
            name: point.name.clone(),
            timeline: point.timeline,
            offset: point.offset,
            time: point.time,
        }
    }
}

/// What a backup found to be wrong.
#[derive(Default)]
struct Found {
    problems: Vec<String>,
    /// Something is not in the restore point that the server has, or should have.
    is_incomplete: bool,
    /// Could any log be read? A backup without any is not a backup.
    has_log: bool,
    /// Why the first log could not be read that could not.
    failure: Option<BackupError>,
}

impl Found {
    fn lacks(&mut self, problem: String) {
        self.problems.push(problem);
        self.is_incomplete = true;
    }
}

async fn archive_database(
    work: &Arc<Work>,
    source: &dyn LogSource,
    data: &DataDir,
    database: &Database,
    found: &mut Found,
) -> Result<LogArchive, BackupError> {
    let name = database.display_name();
    let Some(replica) = database.replica.map(|id| data.replica(id)) else {
        found.lacks(format!("database {name} has no replica on this server and is not in the backup"));
        return Ok(LogArchive::default());
    };
    work.progress.phase(&format!("log of {name}"), None);
    let mut archive = archive_log(work, source, database, &replica, found).await?;
    found.problems.extend(archive.problems.iter().map(|problem| format!("database {name}: {problem}")));
    found.has_log |= archive.tip.is_some();
    if let Some(fault) = archive.fault.take() {
        if archive.tip.is_none() {
            found.failure.get_or_insert(BackupError::NoLog { name: name.clone(), reason: fault.clone() });
        }
        add_archived_before(work, database, &mut archive).await?;
        let held = match &archive.tip {
            Some(tip) => format!("this restore point holds it up to transaction {}", tip.last),
            None => "it is not in this restore point".to_owned(),
        };
        found.lacks(format!("database {name}: {fault}; {held}"));
    } else if archive.tip.is_none() {
        found.problems.push(format!("database {name} has no transaction yet and is not in the backup"));
    }
    if let Some(tip) = &archive.tip {
        work.progress.phase(&format!("snapshot of {name}"), None);
        let problems = snapshot::archive(work, database.identity, archive.timeline, tip.last, &replica).await?;
        found.problems.extend(problems.into_iter().map(|problem| format!("database {name}: {problem}")));
        let timelines = work.repository.timelines(&database.identity).await?;
        if !work.repository.is_restorable(&database.identity, &timelines, archive.timeline).await? {
            found.lacks(format!(
                "database {name} cannot be restored from this backup: its log no longer starts at transaction 0 and no \
                 snapshot could be archived; check the server's snapshots and back up again"
            ));
        }
    }
    Ok(archive)
}

/// Archives a log. One that is missing or cannot be read is a fault of this database, and does not keep the others from
/// being backed up. A server that has just answered a publish makes its files in a moment, so a missing one is looked for again.
async fn archive_log(
    work: &Arc<Work>,
    source: &dyn LogSource,
    database: &Database,
    replica: &ReplicaDir,
    found: &mut Found,
) -> Result<LogArchive, BackupError> {
    let name = database.display_name();
    let mut looks = 0;
    loop {
        let mut archive = match source.archive(work, database, replica.log_path()).await {
            Err(error @ BackupError::DataDir(_)) => {
                let fault = Some(error.to_string());
                found.failure.get_or_insert(error);
                LogArchive { fault, ..LogArchive::default() }
            }
            archive => archive?,
        };
        if archive.tip.is_some() || archive.fault.is_some() {
            return Ok(archive);
        }
        let looked_for = replica.clone();
        let Some(reason) = blocking(move || looked_for.why_missing()).await? else {
            if !work.repository.timelines(&database.identity).await?.is_empty() {
                found.failure.get_or_insert(BackupError::LogVanished { name, path: replica.log_path() });
                archive.fault = Some("its log holds nothing, and is in the archive".to_owned());
            }
            return Ok(archive);
        };
        if looks == EMPTY_LOOKS {
            let is_archived = !work.repository.timelines(&database.identity).await?.is_empty();
            found.failure.get_or_insert(match is_archived {
                true => BackupError::LogVanished { name, path: replica.log_path() },
                false => BackupError::NoLog { name, reason: reason.clone() },
            });
            archive.fault = Some(reason);
            return Ok(archive);
        }
        looks += 1;
        work.clock.sleep(EMPTY_PAUSE).await;
    }
}

/// In the place of a log that cannot be read, what the repository holds of it.
async fn add_archived_before(work: &Work, database: &Database, archive: &mut LogArchive) -> Result<(), BackupError> {
    if archive.tip.is_none()
        && let Some((timeline, tip)) = log::archived_before(&work.repository, &database.identity).await?
    {
        archive.timeline = timeline;
        archive.tip = Some(tip);
    }
    Ok(())
}

fn point_of(database: &Database, archived: &[(Identity, LogArchive)]) -> Option<DatabasePoint> {
    let (_, archive) = archived.iter().find(|(identity, _)| *identity == database.identity)?;
    let tip = archive.tip?;
    Some(DatabasePoint {
        identity: database.identity,
        name: database.display_name(),
        owner: database.owner,
        replica: database.replica?,
        timeline: archive.timeline,
        offset: tip.last,
        time: tip.time.and_then(|micros| Timestamp::from_microsecond(micros).ok()),
        chain: tip.chain,
        history: Some(tip.history),
        initial_program: database.initial_program,
    })
}

/// A server writes its log up to half a second after it has answered.
pub(crate) const SETTLE: std::time::Duration = std::time::Duration::from_millis(700);

/// What the live server has at the offsets of `points`. Of a database that is written to meanwhile, nothing is known.
async fn promises(
    work: &Arc<Work>,
    data: &DataDir,
    points: &[DatabasePoint],
) -> Result<Vec<DatabasePromise>, BackupError> {
    let Some(witness) = &work.witness else { return Ok(Vec::new()) };
    let mut promises = Vec::new();
    for point in points {
        if is_at(data, point).await?
            && let Some(tables) = witness.tables(point.identity).await
        {
            promises.push(DatabasePromise { database: point.identity, offset: point.offset, tables });
        }
    }
    if promises.is_empty() {
        return Ok(promises);
    }
    work.clock.sleep(SETTLE).await;
    let mut kept = Vec::new();
    for promise in promises {
        let point = points.iter().find(|point| point.identity == promise.database);
        if let Some(point) = point
            && is_at(data, point).await?
        {
            kept.push(promise);
        }
    }
    Ok(kept)
}

/// Does the log end at the restore point?
async fn is_at(data: &DataDir, point: &DatabasePoint) -> Result<bool, BackupError> {
    let (log, next) = (data.replica(point.replica).log_path(), Offset(point.offset.0 + 1));
    Ok(blocking(move || crate::datadir::log::end(&log)).await?.is_ok_and(|end| end == next))
}

async fn seal_restore_point(
    work: &Arc<Work>,
    data: &DataDir,
    control: ControlDbCopy,
    databases: Vec<DatabasePoint>,
    promises: Vec<DatabasePromise>,
    options: &BackupOptions,
) -> Result<RestorePoint, BackupError> {
    work.progress.phase("instance", None);
    let capture = {
        let (data, keys) = (data.clone(), options.token_keys.clone());
        blocking(move || Capture::take(&data, &control, keys.as_ref())).await??
    };
    let instance = upload_instance(work, &capture).await?;
    let created_at = work.clock.now();
    let newest = work.repository.restore_point_ids().await?.pop();
    let point = RestorePoint {
        format: manifest::FORMAT,
        id: RestorePointId::after(newest, created_at),
        label: options.label.clone(),
        created_at,
        server_version: data.metadata()?.map(|metadata| metadata.version),
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        instance,
        instance_state: work.repository.hashing()?.name(capture.state),
        has_keys: capture.has_keys,
        databases,
        promises,
        sealed_promises: None,
    };
    let bytes = work.repository.put_restore_point(&point).await?;
    work.tally.wrote_object(bytes);
    Ok(point)
}

/// Uploads the capture unless the newest restore point's says the same.
async fn upload_instance(work: &Work, capture: &Capture) -> Result<crate::ids::ContentHash, BackupError> {
    if let Some(id) = work.repository.restore_point_ids().await?.last()
        && let Ok(newest) = work.repository.restore_point(*id).await
        && newest.instance_state == work.repository.hashing()?.name(capture.state)
        && newest.has_keys == capture.has_keys
        && work.repository.exists(&paths::instance(newest.instance)).await?
    {
        return Ok(newest.instance);
    }
    let (id, bytes) = capture.encode(work.level, &work.repository.keys)?;
    let len = bytes.len();
    work.repository.put(&paths::instance(id), bytes.into()).await?;
    work.tally.wrote_object(len);
    Ok(id)
}

async fn copy_control_db(data: &DataDir) -> Result<ControlDbCopy, BackupError> {
    let data = data.clone();
    Ok(blocking(move || ControlDbCopy::take(&data)).await??)
}

/// Runs `work` on a thread that may block.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, BackupError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| BackupError::Worker(error.to_string()))
}

#[cfg(test)]
mod tests;
