//! Local log that the server needs no more: segments wholly before the oldest of its newest snapshots, once they are proven
//! to be in the archive.
//!
//! Invariants: a segment goes only when every byte of it was read here, read back from the archive, and is the same; when
//! the snapshots that stand in for it were read and hash to their names; and when a restore could use what is archived; and
//! only while it and these snapshots are the files that were compared. The oldest goes first, so that a crash leaves a log
//! without a gap.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use crate::backup::log::shared_links;
use crate::backup::{BackupError, blocking};
use crate::clock::Clock;
use crate::datadir::control_db::{ControlDbCopy, Database};
use crate::datadir::log::{SegmentFile, segments};
use crate::datadir::snapshot::{self, SnapshotDir};
use crate::datadir::{DataDir, DataDirError, ReplicaDir};
use crate::durable::{self, FileError, OnPath};
use crate::ids::{ContentHash, Identity, Offset, TimelineId};
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
    #[error(
        "{} is not the file that was compared with the archive; it was not removed, nor what follows it: run \
         `prune-local` again",
        .0.display()
    )]
    Changed(PathBuf),
    #[error("the server is rewriting segments in {}; nothing more was removed: run `prune-local --apply` again", .0.display())]
    Rewriting(PathBuf),
    #[error(
        "{} is there again with other content after it was removed, and the server may not start while it is: stop the \
         server and move it aside",
        .0.display()
    )]
    Returned(PathBuf),
}

const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Between two looks at files that the server may be rewriting.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// A temporary file that is the same at so many looks was left by a crash.
const LOOKS_UNTIL_STALE: u32 = 10;
/// The most looks until rewriting has ended: a segment of a gibibyte takes seconds.
const LOOKS_MAX: u32 = 240;
/// How often segments are removed again that the server puts back.
const RETURNS_MAX: u32 = 4;

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
    #[serde(skip)]
    relied_on: Vec<Relied>,
}

/// A snapshot that stands in for what goes.
#[derive(Debug, Clone)]
struct Relied {
    snapshot: SnapshotDir,
    manifest: FileState,
}

/// Distinguishes a file from another one of the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileState {
    device: u64,
    inode: u64,
    len: u64,
    modified: (i64, i64),
}

impl FileState {
    /// `None` when there is no file.
    fn of(path: &Path) -> Result<Option<Self>, FileError> {
        match fs::metadata(path) {
            Ok(found) => Ok(Some(Self {
                device: found.dev(),
                inode: found.ino(),
                len: found.len(),
                modified: (found.mtime(), found.mtime_nsec()),
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).on("inspect", path),
        }
    }
}

/// A segment that the server no longer needs.
#[derive(Debug, Clone, Serialize)]
pub struct LocalSegment {
    #[serde(serialize_with = "crate::lossy::path")]
    pub path: PathBuf,
    pub first: Offset,
    pub last: Offset,
    pub bytes: u64,
    /// The file before it was compared.
    #[serde(skip)]
    seen: FileState,
    /// The hash of its bytes, decompressed: what the server puts back compressed is known by it.
    #[serde(skip)]
    content: Option<ContentHash>,
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
        relied_on: Vec::new(),
    };
    let files = segments(&replica.log_path())?;
    found.relied_on = good_snapshots(replica, keep).await?;
    found.snapshots = found.relied_on.iter().map(|relied| relied.snapshot.offset).collect();
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
        // Gone since it was listed: somebody else is at work here, and nothing after it is looked at.
        let Some(seen) = FileState::of(&file.path)? else { break };
        behind.push(LocalSegment { path: file.path.clone(), first, last, bytes: seen.len, seen, content: None });
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
    for segment in &mut found.segments {
        let path = segment.path.clone();
        segment.content = Some(blocking(move || content_of(&path)).await??);
    }
    found.bytes = found.segments.iter().map(|segment| segment.bytes).sum();
    Ok(found)
}

/// The newest snapshots that are whole, newest first, no more than `keep`.
async fn good_snapshots(replica: &ReplicaDir, keep: usize) -> Result<Vec<Relied>, LocalError> {
    let listed = snapshot::list(&replica.snapshots_path())?;
    let mut good = Vec::new();
    for found in listed.into_iter().rev() {
        if good.len() == keep {
            break;
        }
        let (offset, snapshot) = (found.offset, found.clone());
        let Some(manifest) = FileState::of(&found.manifest_path())? else { continue };
        match blocking(move || read_all(&found)).await? {
            Ok(()) => good.push(Relied { snapshot, manifest }),
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
    // The link in which the object is left counts too, though more of it is compared than is needed.
    let links = (open.header.links.partition_point(|link| link.last < entry.last) + 1).min(open.header.links.len());
    let same = shared_links(&replica.log_path(), &open.header, repository.hashing()?)
        .await?
        .is_some_and(|shared| shared >= links);
    Ok((!same).then(|| format!("{} holds another history than the local log", entry.key())))
}

/// The hash of a segment's bytes as they were before any compression.
fn content_of(path: &Path) -> Result<ContentHash, FileError> {
    let hash = || {
        let mut file = File::open(path)?;
        let mut start = Vec::new();
        Read::by_ref(&mut file).take(ZSTD_MAGIC.len() as u64).read_to_end(&mut start)?;
        let is_compressed = start == ZSTD_MAGIC;
        let whole = io::Cursor::new(start).chain(file);
        let mut hasher = blake3::Hasher::new();
        match is_compressed {
            true => hasher.update_reader(zstd::Decoder::new(whole)?)?,
            false => hasher.update_reader(whole)?,
        };
        Ok(ContentHash(*hasher.finalize().as_bytes()))
    };
    hash().on("read", path)
}

/// Removes what the plan names.
///
/// # Errors
/// When a file is not the one that was compared, or cannot be removed; those before it are gone then.
pub async fn apply(plan: &LocalReport, clock: &dyn Clock) -> Result<LocalReport, LocalError> {
    for database in plan.databases.iter().filter(|database| !database.segments.is_empty()) {
        database.settle(clock).await?;
        for segment in &database.segments {
            database.check(segment)?;
            remove(segment)?;
        }
        database.remove_returned(clock).await?;
    }
    Ok(LocalReport { applied: true, ..plan.clone() })
}

fn remove(segment: &LocalSegment) -> Result<(), LocalError> {
    for path in [segment.path.with_extension("ofs"), segment.path.clone()] {
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result.on("remove", &path)?,
        }
    }
    Ok(durable::sync_dir(&durable::parent(&segment.path))?)
}

impl LocalDatabase {
    fn log_dir(&self) -> PathBuf {
        self.segments.first().map_or_else(PathBuf::new, |segment| durable::parent(&segment.path))
    }

    /// A segment, and the snapshots that stand in for it, must be the files that were read: a restore can have put others in
    /// their place since.
    fn check(&self, segment: &LocalSegment) -> Result<(), LocalError> {
        for relied in &self.relied_on {
            let path = relied.snapshot.manifest_path();
            if !relied.snapshot.is_complete() || FileState::of(&path)? != Some(relied.manifest) {
                return Err(LocalError::Changed(path));
            }
        }
        match FileState::of(&segment.path)? {
            Some(found) if found != segment.seen => Err(LocalError::Changed(segment.path.clone())),
            _ => Ok(()),
        }
    }

    /// Waits until the server rewrites no segment: it compresses a closed one into a temporary file beside it, and puts that
    /// in its place, also where there is none any more.
    async fn settle(&self, clock: &dyn Clock) -> Result<(), LocalError> {
        let dir = self.log_dir();
        let (mut seen, mut same) = (temporary_files(&dir)?, 0);
        for _ in 0..LOOKS_MAX {
            if seen.is_empty() || same == LOOKS_UNTIL_STALE {
                return Ok(());
            }
            clock.sleep(LOOK_INTERVAL).await;
            let now = temporary_files(&dir)?;
            same = if now == seen { same + 1 } else { 0 };
            seen = now;
        }
        Err(LocalError::Rewriting(dir))
    }

    /// Looks for segments that the server has put back, which would be a log with a gap behind them, and removes them again.
    async fn remove_returned(&self, clock: &dyn Clock) -> Result<(), LocalError> {
        for _ in 0..RETURNS_MAX {
            clock.sleep(LOOK_INTERVAL).await;
            self.settle(clock).await?;
            let returned: Vec<_> = self.segments.iter().filter(|segment| segment.path.exists()).collect();
            if returned.is_empty() {
                return Ok(());
            }
            for segment in returned {
                let path = segment.path.clone();
                let content = blocking(move || content_of(&path)).await??;
                if Some(content) != segment.content {
                    return Err(LocalError::Returned(segment.path.clone()));
                }
                remove(segment)?;
            }
        }
        Err(LocalError::Rewriting(self.log_dir()))
    }
}

/// The files that are being written beside the segments, with their sizes and times.
fn temporary_files(dir: &Path) -> Result<Vec<(PathBuf, FileState)>, FileError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).on("list", dir)? {
        let path = entry.on("list", dir)?.path();
        let is_temporary = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b".tmp"));
        if is_temporary && let Some(state) = FileState::of(&path)? {
            found.push((path, state));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

#[cfg(test)]
mod tests;
