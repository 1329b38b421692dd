//! Local log that the server needs no more: segments wholly before the oldest of its newest snapshots, once they are proven
//! to be in the archive.
//!
//! Invariants: a segment goes only when every byte of it was read here, read back from the archive, and is the same; when
//! the snapshots that stand in for it were read and hash to their names; and when a restore could use what is archived. The
//! oldest goes first, so that a crash leaves a log without a gap.

use std::path::PathBuf;

use serde::Serialize;

use crate::backup::log::shared_links;
use crate::backup::{BackupError, blocking};
use crate::datadir::control_db::{ControlDbCopy, Database};
use crate::datadir::log::{SegmentFile, segments};
use crate::datadir::snapshot::{self, SnapshotDir};
use crate::datadir::{DataDir, DataDirError, ReplicaDir};
use crate::durable::{self, FileError, OnPath};
use crate::ids::{Identity, Offset, TimelineId};
use crate::progress::Progress;
use crate::repository::chain::LogEntry;
use crate::repository::{Repository, RepositoryError};

/// What can go wrong with local log.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    #[error(transparent)]
    Backup(#[from] BackupError),
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{} is there again after it was removed; the server was rewriting it: run `prune-local --apply` once more", .0.display())]
    Returned(PathBuf),
}

/// The report. Field names are stable.
#[derive(Debug, Clone, Serialize)]
pub struct LocalReport {
    /// `false` for a plan.
    pub applied: bool,
    pub databases: Vec<LocalDatabase>,
    /// Bytes on disk that are, or would be, free.
    pub bytes: u64,
}

/// One database's part.
#[derive(Debug, Clone, Serialize)]
pub struct LocalDatabase {
    pub identity: Identity,
    pub name: String,
    /// The snapshots that the server can start from, newest first: read, and whole.
    pub snapshots: Vec<Offset>,
    /// What goes, oldest first.
    pub segments: Vec<LocalSegment>,
    pub bytes: u64,
    /// Why no more goes.
    pub stays: String,
}

/// A segment that the server no longer needs.
#[derive(Debug, Clone, Serialize)]
pub struct LocalSegment {
    pub path: PathBuf,
    pub first: Offset,
    pub last: Offset,
    pub bytes: u64,
}

/// Finds what can go. Nothing is written.
///
/// # Errors
/// When data directory or repository cannot be read.
pub async fn plan(
    repository: &Repository,
    data: &DataDir,
    keep_snapshots: usize,
    progress: &dyn Progress,
) -> Result<LocalReport, LocalError> {
    let control = {
        let data = data.clone();
        blocking(move || ControlDbCopy::take(&data)).await??
    };
    let mut report = LocalReport { applied: false, databases: Vec::new(), bytes: 0 };
    for database in &control.databases {
        let Some(replica) = database.replica.map(|id| data.replica(id)) else { continue };
        let found = plan_database(repository, database, &replica, keep_snapshots.max(1), progress).await?;
        report.bytes += found.bytes;
        report.databases.push(found);
    }
    Ok(report)
}

async fn plan_database(
    repository: &Repository,
    database: &Database,
    replica: &ReplicaDir,
    keep: usize,
    progress: &dyn Progress,
) -> Result<LocalDatabase, LocalError> {
    progress.phase(&format!("log of {}", database.display_name()), None);
    let mut found = LocalDatabase {
        identity: database.identity,
        name: database.display_name(),
        snapshots: Vec::new(),
        segments: Vec::new(),
        bytes: 0,
        stays: String::new(),
    };
    let files = segments(&replica.log_path())?;
    found.snapshots = good_snapshots(replica, keep).await?;
    let Some(oldest) = found.snapshots.last().copied().filter(|_| found.snapshots.len() >= keep) else {
        found.stays = format!("the server has {} whole snapshots, and {keep} are to stay", found.snapshots.len());
        return Ok(found);
    };
    // The last transaction of a segment is the one before the next segment's first.
    let mut behind: Vec<LocalSegment> = Vec::new();
    for pair in files.windows(2) {
        let [file, next] = pair else { continue };
        if next.first > oldest {
            break;
        }
        let (first, last) = (file.first, Offset(next.first.0.saturating_sub(1)));
        let bytes = std::fs::metadata(&file.path).on("inspect", &file.path)?.len();
        behind.push(LocalSegment { path: file.path.clone(), first, last, bytes });
    }
    if behind.is_empty() {
        found.stays = format!("no segment lies wholly before the snapshot at transaction {oldest}");
        return Ok(found);
    }
    let proven = proven_until(repository, database.identity, replica, &files, &behind, progress).await?;
    found.stays = match (&proven.reason, behind.len()) {
        (Some(reason), _) => reason.clone(),
        (None, _) => format!("the next segment holds the snapshot at transaction {oldest}, or what came after it"),
    };
    found.segments =
        behind.into_iter().take_while(|segment| proven.until.is_some_and(|until| segment.last <= until)).collect();
    found.bytes = found.segments.iter().map(|segment| segment.bytes).sum();
    Ok(found)
}

/// The newest snapshots that are whole, newest first, no more than `keep`.
async fn good_snapshots(replica: &ReplicaDir, keep: usize) -> Result<Vec<Offset>, LocalError> {
    let listed = snapshot::list(&replica.snapshots_path())?;
    let mut good = Vec::new();
    for found in listed.into_iter().rev() {
        if good.len() == keep {
            break;
        }
        let offset = found.offset;
        match blocking(move || read_all(&found)).await? {
            Ok(()) => good.push(offset),
            Err(error) => tracing::warn!(%offset, %error, "a snapshot cannot be used and does not count"),
        }
    }
    Ok(good)
}

fn read_all(found: &SnapshotDir) -> Result<(), DataDirError> {
    let (manifest, _) = found.manifest()?;
    for (hash, kind) in &manifest.objects {
        found.object(hash, *kind)?;
    }
    Ok(())
}

/// How far local log and archive are proven to be the same, from the first segment on.
struct Proven {
    until: Option<Offset>,
    reason: Option<String>,
}

async fn proven_until(
    repository: &Repository,
    database: Identity,
    replica: &ReplicaDir,
    files: &[SegmentFile],
    behind: &[LocalSegment],
    progress: &dyn Progress,
) -> Result<Proven, LocalError> {
    let (Some(from), Some(to)) = (files.first().map(|file| file.first), behind.last().map(|segment| segment.last))
    else {
        return Ok(Proven { until: None, reason: None });
    };
    let timelines = repository.timelines(&database).await?;
    let Some(timeline) = repository.newest_timeline(&database, &timelines).await? else {
        return Ok(Proven { until: None, reason: Some("nothing of it is archived".into()) });
    };
    if !repository.is_restorable(&database, &timelines, timeline).await? {
        let reason = format!("timeline {timeline} of the archive cannot be restored from; run `inner-universe verify`");
        return Ok(Proven { until: None, reason: Some(reason) });
    }
    let chain = repository.log_chain(&database, &timelines, timeline).await?;
    let mut proven = Proven { until: None, reason: None };
    let mut next = from;
    for entry in chain.range(from, to) {
        if entry.first > next {
            break;
        }
        match is_same(repository, entry, replica, progress).await? {
            None => {
                proven.until = Some(entry.last);
                next = Offset(entry.last.0 + 1);
            }
            Some(reason) => {
                proven.reason = Some(reason);
                return Ok(proven);
            }
        }
    }
    if next <= to {
        proven.reason = Some(not_archived(next, timeline));
    }
    Ok(proven)
}

fn not_archived(from: Offset, timeline: TimelineId) -> String {
    format!("transactions from {from} on are not in timeline {timeline} of the archive")
}

/// Reads a log object back and compares it with the local log. `None` when they are the same; else why it does not count.
async fn is_same(
    repository: &Repository,
    entry: &LogEntry,
    replica: &ReplicaDir,
    progress: &dyn Progress,
) -> Result<Option<String>, LocalError> {
    let open = match repository.open_log(entry).await {
        Ok(open) => open,
        Err(error) if error.is_damage() => return Ok(Some(error.to_string())),
        Err(error) => return Err(error.into()),
    };
    for index in 0..open.header.parts.len() {
        let stored = repository.log_part(&open, index).await?;
        progress.advance(stored.len() as u64);
        let (open, keys) = (open.clone(), repository.keys.clone());
        // Without a key, the hash of what is stored has to do; it was made when the commits were sealed.
        let checked = move || match open.header.sealed && !keys.can_open() {
            true => open.header.check_part(index, &stored).map_err(|malformed| malformed.to_string()),
            false => {
                open.header.decode_part(&open.key, index, &stored, &keys).map(drop).map_err(|error| error.to_string())
            }
        };
        if let Err(reason) = blocking(checked).await? {
            return Ok(Some(format!("{} cannot be read back: {reason}", entry.key())));
        }
    }
    // An object that the local log holds only a part of is compared by its last commits.
    let links = open.header.links.iter().filter(|link| link.last <= entry.last).count();
    let same = shared_links(&replica.log_path(), &open.header).await?.is_some_and(|shared| shared >= links);
    Ok((!same).then(|| format!("{} holds another history than the local log", entry.key())))
}

/// Removes what the plan names.
///
/// # Errors
/// When a file cannot be removed; those before it are gone then.
pub fn apply(plan: &LocalReport) -> Result<LocalReport, LocalError> {
    for segment in plan.databases.iter().flat_map(|database| &database.segments) {
        for path in [segment.path.with_extension("ofs"), segment.path.clone()] {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                result => result.on("remove", &path)?,
            }
        }
        durable::sync_dir(&durable::parent(&segment.path))?;
    }
    // The server rewrites closed segments; one that it was at work on would leave a gap behind it.
    for segment in plan.databases.iter().flat_map(|database| &database.segments) {
        if segment.path.exists() {
            return Err(LocalError::Returned(segment.path.clone()));
        }
    }
    Ok(LocalReport { applied: true, ..plan.clone() })
}
