//! Applies a plan: builds the new data directory beside the target, checks it, makes it durable, then renames twice.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use serde::Serialize;

use crate::backup::DatabaseReport;
use crate::clock::{Clock, Stopwatch};
use crate::datadir::commit::{Frame, SegmentHeader};
use crate::datadir::lock::{self, ServerLock};
use crate::datadir::log::segment_name;
use crate::datadir::{DataDir, control_db, snapshot};
use crate::durable::{self, FileError, OnPath, beside};
use crate::ids::{ContentHash, Identity, Offset};
use crate::progress::{Progress, Tally};
use crate::repository::log_object::LogHeader;
use crate::repository::manifest::SnapshotManifest;
use crate::repository::pack::{self, EntryKind};
use crate::repository::{Repository, RepositoryError, instance, paths};
use crate::restore::plan::{DatabasePlan, RestorePlan};
use crate::restore::{RestoreError, check};

/// As large as the server makes its segments by default.
const SEGMENT_SIZE: u64 = 1 << 30;
/// Objects decoded at once, on two cores.
const AHEAD: usize = 2;
/// What a restore takes on disk beyond the decompressed log, at the least: indexes, directories, the instance.
const HEADROOM: u64 = 16 << 20;

/// Where and how to restore.
#[derive(Debug, Clone)]
pub struct ApplyOptions {
    pub data_dir: PathBuf,
    /// Where captured token keys go; `None` for `DATA_DIR.keys`.
    pub key_dir: Option<PathBuf>,
    /// Move what is there aside, and start even if space looks short.
    pub force: bool,
    /// The name that the one database gets; its own when left out.
    pub name: Option<String>,
    /// New token keys instead of those that were captured, if any were.
    pub new_keys: bool,
}

impl ApplyOptions {
    /// Into a directory that is not there yet, everything as it was.
    pub fn to(data_dir: PathBuf) -> Self {
        Self { data_dir, key_dir: None, force: false, name: None, new_keys: false }
    }
}

/// What a restore did. Field names are stable.
#[derive(Debug, Clone, Serialize)]
pub struct RestoreReport {
    pub data_dir: PathBuf,
    /// Where the directory that was there is now.
    pub moved_aside: Option<PathBuf>,
    /// Where the token keys are, if the restore point holds any.
    pub keys: Option<PathBuf>,
    /// Where other keys that were there are now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keys_moved_aside: Option<PathBuf>,
    /// The sidecar's own token, signed anew with new keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<PathBuf>,
    pub databases: Vec<DatabaseReport>,
    pub left_out: Vec<String>,
    pub bytes_read: u64,
    pub bytes_written: u64,
    pub duration_ms: u64,
}

/// What stands at the target before a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    EmptyDir,
    Something,
}

/// Restores.
///
/// # Errors
/// When the target may not be replaced, the repository fails or is damaged, or the disk is full. Nothing is changed then.
pub async fn apply(
    repository: &Repository,
    plan: &RestorePlan,
    options: &ApplyOptions,
    clock: Arc<dyn Clock>,
    progress: Arc<dyn Progress>,
) -> Result<RestoreReport, RestoreError> {
    let stopwatch = Stopwatch::start();
    let before = inspect_target(options)?;
    let key_dir = options.key_dir.clone().unwrap_or_else(|| beside(&options.data_dir, ".keys"));
    if options.name.is_some() && plan.databases.len() != 1 {
        let names: Vec<_> = plan.databases.iter().map(|database| database.name.as_str()).collect();
        let names = names.join(", ");
        return Err(RestoreError::Usage(format!("a new name is for one database; name it with --database ({names})")));
    }
    if options.new_keys && !options.force && !is_free(&key_dir)? {
        return Err(RestoreError::WouldOverwrite(key_dir));
    }
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    if absolute(&key_dir).starts_with(absolute(&options.data_dir)) {
        return Err(RestoreError::Usage(format!(
            "the token keys would lie in the data directory that is replaced; give a --key-dir outside {}",
            options.data_dir.display()
        )));
    }
    let parent = durable::parent(&options.data_dir);
    fs::create_dir_all(&parent).on("create", &parent)?;
    check_space(&parent, plan, options.force)?;

    let staging = Staging::create(&options.data_dir, &key_dir)?;
    let tally = Arc::new(Tally::default());
    let build = Build { repository, staging: &staging, tally: &tally, progress: &progress };
    let mut has_keys = build.run(plan, options.name.as_deref()).await.map_err(RestoreError::with_disk_full)?;
    if options.new_keys {
        if has_keys {
            fs::remove_dir_all(&staging.keys).on("remove", &staging.keys)?;
        }
        make_keys(&staging.keys)?;
        has_keys = true;
    }
    // The very keys that are there already stay as they are.
    let same_keys = has_keys && holds_same(&staging.keys, &key_dir)?;
    if has_keys && !same_keys && !options.force && !is_free(&key_dir)? {
        return Err(RestoreError::WouldOverwrite(key_dir));
    }
    progress.phase("self-check", None);
    check::check(&staging.data, plan).await?;
    progress.phase("making it durable", None);
    {
        // The keys may go to another file system.
        let (data, keys) = (staging.data.clone(), (has_keys && !same_keys).then(|| staging.keys.clone()));
        let sync = move || sync_file_system(&data).and_then(|()| keys.map_or(Ok(()), |keys| durable::sync_tree(&keys)));
        blocking(sync).await?.map_err(|error| RestoreError::from(error).with_disk_full())?;
    }

    // A long restore leaves time to start a server where it should go.
    let now = inspect_target(options)?;
    if before == Before::Nothing && now != Before::Nothing {
        return Err(RestoreError::WouldOverwrite(options.data_dir.clone()));
    }
    let before = now;
    // From here on only renames, each durable, and taken back when a later one fails. A crash between them leaves all directories
    // whole under telling names.
    let mut renamed = Renamed::default();
    let stamp = clock.now().strftime("%Y%m%dT%H%M%S%3fZ").to_string();
    let mut keys_moved_aside = None;
    if same_keys {
        fs::remove_dir_all(&staging.keys).on("remove", &staging.keys)?;
    } else if has_keys {
        if !is_free(&key_dir)? {
            if !options.force {
                return Err(RestoreError::WouldOverwrite(key_dir));
            }
            let aside = beside(&key_dir, &format!(".before-restore-{stamp}"));
            renamed.rename(&key_dir, &aside)?;
            keys_moved_aside = Some(aside);
        } else if key_dir.exists() {
            fs::remove_dir(&key_dir).on("remove the empty", &key_dir)?;
        }
        renamed.rename(&staging.keys, &key_dir)?;
    }
    let moved_aside = match before {
        Before::Nothing => None,
        Before::EmptyDir => {
            fs::remove_dir(&options.data_dir).on("remove the empty", &options.data_dir)?;
            None
        }
        Before::Something => {
            let aside = beside(&options.data_dir, &format!(".before-restore-{stamp}"));
            renamed.rename(&options.data_dir, &aside)?;
            Some(aside)
        }
    };
    renamed.rename(&staging.data, &options.data_dir)?;
    renamed.keep();
    staging.done();
    Ok(RestoreReport {
        data_dir: options.data_dir.clone(),
        moved_aside,
        keys: has_keys.then_some(key_dir),
        keys_moved_aside,
        token: None,
        databases: plan.databases.iter().map(DatabasePlan::report).collect(),
        left_out: plan.left_out.clone(),
        bytes_read: tally.bytes_read(),
        bytes_written: tally.bytes_written(),
        duration_ms: stopwatch.elapsed_ms(),
    })
}

impl DatabasePlan {
    pub fn report(&self) -> DatabaseReport {
        DatabaseReport {
            identity: self.identity,
            name: self.name.clone(),
            timeline: self.timeline,
            offset: self.offset,
            time: self.time,
        }
    }
}

#[cfg(feature = "client")]
fn make_keys(dir: &Path) -> Result<(), RestoreError> {
    crate::standalone::keys::make(dir).map_err(RestoreError::SelfCheck)
}

#[cfg(not(feature = "client"))]
fn make_keys(_: &Path) -> Result<(), RestoreError> {
    Err(RestoreError::Usage("this build makes no keys".into()))
}

/// May the target be replaced?
fn inspect_target(options: &ApplyOptions) -> Result<Before, RestoreError> {
    let path = &options.data_dir;
    if let ServerLock::Held { pid } = lock::probe_file(&path.join("spacetime.pid"))? {
        return Err(RestoreError::ServerRunning { path: path.clone(), pid });
    }
    let before = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Before::Nothing,
        Err(error) => return Err(error).on("inspect", path).map_err(Into::into),
        Ok(kind) if kind.is_dir() && is_free(path)? => Before::EmptyDir,
        Ok(_) => Before::Something,
    };
    if before == Before::Something && !options.force {
        return Err(RestoreError::WouldOverwrite(path.clone()));
    }
    Ok(before)
}

/// Renames that belong together: those that were done are taken back when one fails.
#[derive(Default)]
struct Renamed(Vec<(PathBuf, PathBuf)>);

impl Renamed {
    fn rename(&mut self, from: &Path, to: &Path) -> Result<(), FileError> {
        durable::rename(from, to)?;
        self.0.push((from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Renamed {
    fn drop(&mut self) {
        for (from, to) in self.0.drain(..).rev() {
            if let Err(error) = durable::rename(&to, &from) {
                tracing::error!(%error, "what belongs at {} is at {}", from.display(), to.display());
            }
        }
    }
}

/// Whether every file of `ours` is in `theirs` with the same content.
fn holds_same(ours: &Path, theirs: &Path) -> Result<bool, FileError> {
    for entry in fs::read_dir(ours).on("list", ours)? {
        let path = entry.on("list", ours)?.path();
        let there = theirs.join(path.file_name().unwrap_or_default());
        let there = match fs::read(&there) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => return Ok(false),
            read => read.on("read", &there)?,
        };
        if fs::read(&path).on("read", &path)? != there {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Missing, or an empty directory.
fn is_free(path: &Path) -> Result<bool, FileError> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => Ok(false),
        Err(error) => Err(error).on("list", path),
    }
}

fn check_space(parent: &Path, plan: &RestorePlan, force: bool) -> Result<(), RestoreError> {
    let stat = rustix::fs::statvfs(parent).map_err(std::io::Error::from).on("inspect", parent)?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    // The log's own size is known only from its objects' headers; stored bytes are a lower bound that needs no request.
    let needed =
        HEADROOM + plan.bytes_to_read.max(plan.databases.iter().filter_map(DatabasePlan::snapshot_bytes).sum());
    if free < needed && !force {
        return Err(RestoreError::NoSpace { path: parent.to_owned(), free, needed });
    }
    Ok(())
}

impl DatabasePlan {
    fn snapshot_bytes(&self) -> Option<u64> {
        self.snapshot.as_ref().map(|snapshot| snapshot.raw_bytes)
    }
}

/// The directory under construction; removed with all it holds unless the restore succeeds.
struct Staging {
    data: PathBuf,
    keys: PathBuf,
    keep: bool,
}

impl Staging {
    /// Both beside where they go, since a rename stays within one file system.
    fn create(target: &Path, key_dir: &Path) -> Result<Self, FileError> {
        let id = ulid::Ulid::new();
        let staging = Self {
            data: beside(target, &format!(".restoring-{id}")),
            keys: beside(key_dir, &format!(".restoring-{id}")),
            keep: false,
        };
        fs::create_dir(&staging.data).on("create", &staging.data)?;
        Ok(staging)
    }

    fn done(mut self) {
        self.keep = true;
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        for path in [&self.data, &self.keys] {
            if path.exists()
                && let Err(error) = fs::remove_dir_all(path)
            {
                tracing::warn!(path = %path.display(), %error, "what was restored so far could not be removed");
            }
        }
    }
}

struct Build<'a> {
    repository: &'a Repository,
    staging: &'a Staging,
    tally: &'a Arc<Tally>,
    progress: &'a Arc<dyn Progress>,
}

impl Build<'_> {
    /// Returns whether token keys were extracted.
    async fn run(&self, plan: &RestorePlan, name: Option<&str>) -> Result<bool, RestoreError> {
        let has_keys = self.extract_instance(plan, name).await?;
        let data = DataDir::open(&self.staging.data)?;
        for database in &plan.databases {
            let replica = data.replica(database.replica);
            if let Some(manifest) = &database.snapshot {
                let total = manifest.packs.iter().map(|pack| pack.stored_bytes).sum();
                self.progress.phase(&format!("snapshot of {}", database.name), Some(total));
                self.write_snapshot(database.identity, manifest, &replica.snapshots_path()).await?;
            }
            let total = database.log.iter().map(|entry| entry.size).sum();
            self.progress.phase(&format!("log of {}", database.name), Some(total));
            self.write_log(database, &replica.log_path()).await?;
        }
        Ok(has_keys)
    }

    async fn extract_instance(&self, plan: &RestorePlan, name: Option<&str>) -> Result<bool, RestoreError> {
        self.progress.phase("instance", None);
        let id = plan.instance.instance;
        let bytes = self.repository.get(&paths::instance(id)).await?;
        self.tally.read(bytes.len());
        let (keys, data, keys_to) =
            (self.repository.keys.clone(), self.staging.data.clone(), self.staging.keys.clone());
        let keep: Vec<Identity> = plan.databases.iter().map(|database| database.identity).collect();
        let name = name.map(ToOwned::to_owned);
        let extracted = blocking(move || {
            let extracted = instance::extract(&id, &bytes, &keys, &data, &keys_to)?;
            let control = data.join("control-db");
            let mut changed = control_db::keep_only(&control, &keep);
            if let (Ok(()), Some(name), Some(database)) = (&changed, &name, keep.first()) {
                changed = control_db::rename(&control, database, name);
            }
            changed
                .map_err(|reason| RestoreError::SelfCheck(format!("the control database does not open: {reason}")))?;
            Ok::<_, RestoreError>(extracted)
        })
        .await??;
        Ok(extracted.keys.is_some())
    }

    async fn write_snapshot(
        &self,
        database: Identity,
        manifest: &SnapshotManifest,
        snapshots: &Path,
    ) -> Result<(), RestoreError> {
        let target = snapshots.join(snapshot::dir_name(manifest.offset));
        fs::create_dir_all(&target).on("create", &target)?;
        let writer = Arc::new(ObjectWriter { target, offset: manifest.offset });
        let mut writes = futures::stream::iter(manifest.packs.clone())
            .map(|pack| async move {
                let key = paths::pack(&database, pack.pack);
                let bytes = self.repository.get(&key).await?;
                self.tally.read(bytes.len());
                self.progress.advance(bytes.len() as u64);
                Ok::<_, RestoreError>((key, pack, bytes))
            })
            .buffered(1)
            .map_ok(|(key, pack, bytes)| {
                let (writer, keys) = (Arc::clone(&writer), self.repository.keys.clone());
                async move {
                    blocking(move || {
                        let mut wanted: HashSet<ContentHash> = pack.entries.into_iter().collect();
                        let mut written = 0;
                        let all = wanted.clone();
                        pack::read(
                            &key,
                            &pack.pack,
                            &bytes,
                            &keys,
                            |hash| all.contains(hash),
                            |hash, kind, entry| {
                                // One hash may stand twice in a pack's history; it is one file.
                                if wanted.remove(&hash) {
                                    writer.write(&hash, kind, entry)?;
                                    written += entry.len();
                                }
                                Ok::<_, RestoreError>(())
                            },
                        )?;
                        match wanted.into_iter().next() {
                            Some(hash) => Err(RepositoryError::damaged(&key, format!("it lacks entry {hash}")).into()),
                            None => Ok(written),
                        }
                    })
                    .await?
                }
            })
            .try_buffer_unordered(AHEAD);
        while let Some(written) = writes.try_next().await? {
            self.tally.wrote(written);
        }
        Ok(())
    }

    async fn write_log(&self, database: &DatabasePlan, dir: &Path) -> Result<(), RestoreError> {
        fs::create_dir_all(dir).on("create", dir)?;
        let mut segments = SegmentWriter::new(dir, database.log_from, database.offset);
        let (from, until) = (database.log_from, database.offset);
        let decoded = futures::stream::iter(database.log.clone())
            .map(|entry| async move { Ok::<_, RestoreError>((self.repository.open_log(&entry).await?, entry)) })
            .buffered(AHEAD)
            .map_ok(|(open, entry)| {
                let parts = open.header.parts_within(from, until.min(entry.last));
                futures::stream::iter(parts.map(move |index| Ok::<_, RestoreError>((open.clone(), entry.last, index))))
            })
            .try_flatten()
            .map_ok(|(open, last, index)| async move {
                let stored = self.repository.log_part(&open, index).await?;
                self.tally.read(stored.len());
                self.progress.advance(stored.len() as u64);
                let keys = self.repository.keys.clone();
                let decode = move || {
                    let mut commits = open.header.decode_part(&open.key, index, &stored, &keys)?;
                    // Where a timeline forks off inside an object, what follows belongs to another history.
                    let (before, after, len) = open.header.part_until(index, last);
                    commits.truncate(usize::try_from(len).unwrap_or(usize::MAX));
                    Ok(Decoded { header: open.header, before, after, commits })
                };
                blocking(decode).await?.map_err(|error: RepositoryError| RestoreError::from(error))
            })
            .try_buffered(AHEAD);
        let mut decoded = std::pin::pin!(decoded);
        // The disk's writes and the decoding do not wait for each other.
        let (sender, mut receiver) = tokio::sync::mpsc::channel::<(u8, Vec<u8>)>(1);
        let writer = tokio::task::spawn_blocking(move || {
            while let Some((log_version, commits)) = receiver.blocking_recv() {
                segments.write(log_version, &commits)?;
            }
            segments.finish()
        });
        let feed = async {
            let mut tip: Option<ContentHash> = None;
            while let Some(Decoded { header, before, after, commits }) = decoded.try_next().await? {
                if header.database != database.identity {
                    let key = paths::log(&database.identity, header.timeline, header.level, header.first, header.last);
                    return Err(RepositoryError::damaged(&key, "it belongs to another database").into());
                }
                if tip.replace(after).is_some_and(|found| found != before) {
                    return Err(RestoreError::Unreachable {
                        wanted: header.first,
                        reason: "the log objects do not continue each other; run `inner-universe verify`".into(),
                    });
                }
                self.tally.wrote(commits.len());
                if sender.send((header.log_version, commits)).await.is_err() {
                    // The writer gave up and says why itself.
                    break;
                }
            }
            Ok::<_, RestoreError>(())
        };
        let fed = feed.await;
        drop(sender);
        // Waited for in any case: nothing may still be written while a failed restore is cleared away.
        let written = writer.await.map_err(|error| RestoreError::Worker(error.to_string()))?;
        fed.and(written)
    }
}

/// A part of a log object, with the chain hashes around it.
struct Decoded {
    header: Arc<LogHeader>,
    before: ContentHash,
    after: ContentHash,
    commits: Vec<u8>,
}

/// Writes a snapshot's objects where the server looks for them.
struct ObjectWriter {
    target: PathBuf,
    offset: Offset,
}

impl ObjectWriter {
    fn write(&self, hash: &ContentHash, kind: EntryKind, bytes: &[u8]) -> Result<(), FileError> {
        let path = match kind {
            EntryKind::Manifest => self.target.join(snapshot::manifest_name(self.offset)),
            EntryKind::Object(_) => self.target.join(snapshot::object_path(hash)),
        };
        match durable::create(&path, bytes) {
            Err(error) if error.source.kind() == std::io::ErrorKind::NotFound => {
                let parent = durable::parent(&path);
                fs::create_dir_all(&parent).on("create", &parent)?;
                durable::create(&path, bytes)
            }
            result => result,
        }
    }
}

/// Writes commits into segments, leaving out what lies before `from` and after `until`.
pub(crate) struct SegmentWriter {
    dir: PathBuf,
    from: Offset,
    until: Offset,
    open: Option<(File, PathBuf, u8, u64)>,
    unsynced: u64,
    /// The disk writes while we decode on, instead of all at the end.
    syncing: Option<std::thread::JoinHandle<std::io::Result<()>>>,
}

/// Bytes written between two calls for the disk to start.
const SYNC_STEP: u64 = 64 << 20;

impl SegmentWriter {
    pub(crate) fn new(dir: &Path, from: Offset, until: Offset) -> Self {
        Self { dir: dir.to_owned(), from, until, open: None, unsynced: 0, syncing: None }
    }

    pub(crate) fn write(&mut self, log_version: u8, commits: &[u8]) -> Result<(), FileError> {
        let (mut start, mut end, mut first) = (0, 0, None);
        while let Frame::Commit(commit) = Frame::parse(log_version, &commits[end..]) {
            if commit.last() > self.until {
                break;
            }
            end += commit.bytes.len();
            if commit.last() < self.from {
                start = end;
            } else {
                first.get_or_insert(commit.first);
            }
        }
        let Some(first) = first else { return Ok(()) };
        let bytes = &commits[start..end];
        let fits = |(_, _, version, len): &(File, PathBuf, u8, u64)| {
            *version == log_version && len + bytes.len() as u64 <= SEGMENT_SIZE
        };
        if !self.open.as_ref().is_some_and(fits) {
            let path = self.dir.join(segment_name(first));
            let header = SegmentHeader { log_version, checksum_algorithm: 0 }.to_bytes();
            let mut file = File::create_new(&path).on("create", &path)?;
            file.write_all(&header).on("write", &path)?;
            self.open = Some((file, path, log_version, header.len() as u64));
        }
        if let Some((file, path, _, len)) = &mut self.open {
            file.write_all(bytes).on("write", path)?;
            *len += bytes.len() as u64;
            self.unsynced += bytes.len() as u64;
            if self.unsynced >= SYNC_STEP {
                self.unsynced = 0;
                let again = file.try_clone().on("reopen", path)?;
                let path = path.clone();
                self.finish_sync(&path)?;
                self.syncing = Some(std::thread::spawn(move || again.sync_data()));
            }
        }
        Ok(())
    }

    fn finish_sync(&mut self, path: &Path) -> Result<(), FileError> {
        match self.syncing.take().map(std::thread::JoinHandle::join) {
            Some(Ok(result)) => result.on("sync", path),
            // The sync of the whole file system comes anyway.
            Some(Err(_)) | None => Ok(()),
        }
    }

    /// A log without a segment would be a database without a transaction.
    pub(crate) fn finish(mut self) -> Result<(), RestoreError> {
        let dir = self.dir.clone();
        self.finish_sync(&dir)?;
        match self.open {
            Some(_) => Ok(()),
            None => Err(RestoreError::Unreachable {
                wanted: self.until,
                reason: "no commit lies wholly at or before it".into(),
            }),
        }
    }
}

/// Everything written so far on the file system of `path` reaches the disk: one call instead of one for each page file.
pub(crate) fn sync_file_system(path: &Path) -> Result<(), FileError> {
    #[cfg(target_os = "linux")]
    {
        let dir = File::open(path).on("open", path)?;
        rustix::fs::syncfs(&dir).map_err(std::io::Error::from).on("sync the file system of", path)
    }
    #[cfg(not(target_os = "linux"))]
    durable::sync_tree(path)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, RestoreError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| RestoreError::Worker(error.to_string()))
}
