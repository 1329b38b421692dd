//! Builds a data directory from what a plan names: instance, snapshots, logs. Snapshots are checked on the way.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::{StreamExt, TryStreamExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinError;
use tokio_util::task::TaskTracker;

use crate::datadir::{DataDir, control_db, snapshot};
use crate::durable::{self, FileError, OnPath};
use crate::ids::{ContentHash, Identity, Offset};
use crate::progress::{Progress, Tally};
use crate::repository::pack::{self, EntryKind};
use crate::repository::{Repository, RepositoryError, instance, paths};
use crate::restore::log_source::{Continuity, Decoded, LogSource, PartOf};
use crate::restore::plan::{DatabasePlan, RestorePlan};
use crate::restore::segments::{CheckedSegment, SegmentWriter};
use crate::restore::{RestoreError, check};

/// Objects decoded at once, on two cores.
const AHEAD: usize = 2;

/// Requests that wait for the store at once: each takes its time, however little it brings.
const REQUESTS: usize = 16;

/// Bytes on their way from a store, or waiting to be decoded.
const FROM_FAR: Ways = Ways { log: 8 << 20, log_beside: 5 << 20, packs: 2 << 20 };

/// The same from this machine's disk, which answers at once.
const FROM_DISK: Ways = Ways { log: 3 << 20, log_beside: 3 << 20, packs: 3 << 19 };

/// How many bytes may be on their way at once.
struct Ways {
    /// Of a log alone.
    log: u64,
    /// Of a log with a snapshot beside it.
    log_beside: u64,
    /// Of that snapshot.
    packs: u64,
}

/// Objects that are decoded, or being so, and not yet written. Writing one takes a fraction of the time of decoding it.
const DECODED: u64 = AHEAD as u64;

/// Room in memory, given in the order of asking. What is larger than all of it gets it alone.
struct Room {
    size: u64,
    unit: u64,
    free: Arc<Semaphore>,
}

impl Room {
    /// For bytes.
    fn of_bytes(size: u64) -> Self {
        Self::new(size, 1 << 10)
    }

    fn new(size: u64, unit: u64) -> Self {
        Self { size, unit, free: Arc::new(Semaphore::new((size / unit) as usize)) }
    }

    /// Waits for room; it is held until the permit is dropped.
    async fn take(&self, wanted: u64) -> Option<OwnedSemaphorePermit> {
        let units = wanted.min(self.size).div_ceil(self.unit) as u32;
        // It is never closed.
        Arc::clone(&self.free).acquire_many_owned(units).await.ok()
    }
}

/// What a restore is built with, and where.
pub(super) struct Build<'a> {
    pub repository: &'a Repository,
    pub data: &'a Path,
    pub keys: &'a Path,
    pub tally: &'a Arc<Tally>,
    pub progress: &'a Arc<dyn Progress>,
}

impl Build<'_> {
    pub(super) async fn run(&self, plan: &RestorePlan, name: Option<&str>) -> Result<Built, RestoreError> {
        let has_keys = self.extract_instance(plan, name).await?;
        let data = DataDir::open(self.data)?;
        let mut logs = Vec::new();
        for database in &plan.databases {
            let replica = data.replica(database.replica);
            let what = if database.snapshot.is_some() { "snapshot and log" } else { "log" };
            self.progress.phase(&format!("{what} of {}", database.name), Some(database.bytes_to_read()));
            // The disk writes the log's large blocks while the snapshot's thousands of files are made, checked and brought to it.
            // Both are waited for in any case: nothing may still be at work while a failed restore is cleared away.
            let failed = &Failed::default();
            let (snapshot, log) = tokio::join!(
                async { failed.note(self.write_snapshot(database, &replica.snapshots_path(), failed).await) },
                async { failed.note(self.write_log(database, &replica.log_path(), failed).await) },
            );
            snapshot?;
            logs.push(log?);
        }
        Ok(Built { has_keys, logs })
    }

    fn ways(&self) -> Ways {
        if self.repository.is_local() { FROM_DISK } else { FROM_FAR }
    }

    async fn extract_instance(&self, plan: &RestorePlan, name: Option<&str>) -> Result<bool, RestoreError> {
        self.progress.phase("instance", None);
        let id = plan.instance.instance;
        let bytes = self.repository.get(&paths::instance(id)).await?;
        self.tally.read(bytes.len());
        let (keys, data, keys_to) = (self.repository.keys.clone(), self.data.to_owned(), self.keys.to_owned());
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

    /// Writes the snapshot, if there is to be one, checks it and brings it to the disk.
    async fn write_snapshot(&self, plan: &DatabasePlan, snapshots: &Path, failed: &Failed) -> Result<(), RestoreError> {
        let Some(manifest) = &plan.snapshot else { return Ok(()) };
        let database = plan.identity;
        let target = snapshots.join(snapshot::dir_name(manifest.offset));
        fs::create_dir_all(&target).on("create", &target)?;
        let writer = Arc::new(ObjectWriter { target, offset: manifest.offset });
        let room = &Room::of_bytes(self.ways().packs);
        let tasks = &TaskTracker::new();
        let mut writes = futures::stream::iter(manifest.packs.clone())
            .map(|pack| async move {
                let key = paths::pack(&database, pack.pack);
                let held = room.take(pack.stored_bytes).await;
                let bytes = self.repository.get(&key).await?;
                self.tally.read(bytes.len());
                self.progress.advance(bytes.len() as u64);
                Ok::<_, RestoreError>((key, pack, bytes, held))
            })
            .buffered(REQUESTS)
            .map_ok(|(key, pack, bytes, held)| {
                let (writer, keys) = (Arc::clone(&writer), self.repository.keys.clone());
                async move {
                    let write = move || {
                        let _held = held;
                        let hashing = keys.hashing().map_err(RepositoryError::from)?;
                        let mut wanted: HashSet<ContentHash> = pack.entries.into_iter().collect();
                        let mut written = 0;
                        let all = wanted.clone();
                        pack::read(
                            &key,
                            &pack.pack,
                            &bytes,
                            &keys,
                            |hash| all.contains(&hashing.name(*hash)),
                            |hash, kind, entry| {
                                // One hash may stand twice in a pack's history; it is one file.
                                if wanted.remove(&hashing.name(hash)) {
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
                    };
                    joined(tasks.spawn_blocking(write).await)?
                }
            })
            .try_buffer_unordered(AHEAD);
        let written = loop {
            match writes.try_next().await {
                Ok(Some(written)) if !failed.is_noted() => self.tally.wrote(written),
                Ok(_) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        tasks.close();
        tasks.wait().await;
        written?;
        if failed.is_noted() {
            return Ok(());
        }
        let (plan, snapshots) = (plan.clone(), snapshots.to_owned());
        blocking(move || {
            check::snapshot(&snapshots, &plan)?;
            Ok(durable::sync_file_system(&snapshots)?)
        })
        .await?
    }

    async fn write_log(
        &self,
        database: &DatabasePlan,
        dir: &Path,
        failed: &Failed,
    ) -> Result<Vec<CheckedSegment>, RestoreError> {
        fs::create_dir_all(dir).on("create", dir)?;
        let mut segments = SegmentWriter::new(dir, database.log_from, database.offset);
        let (from, until) = (database.log_from, database.offset);
        // Of their own each: what is opened early would otherwise take the room of parts that come before it.
        let ways = self.ways();
        let on_the_way = if database.snapshot.is_some() { ways.log_beside } else { ways.log };
        let (whole, parts) = (&Room::of_bytes(on_the_way), &Room::of_bytes(on_the_way));
        let unwritten = &Room::new(DECODED, 1);
        let source = &LogSource { repository: self.repository, database: database.identity };
        let decoded = futures::stream::iter(database.log.clone())
            .map(|entry| async move {
                let held = Arc::new(whole.take(entry.size_to_open()).await);
                let opened = source.open(entry).await?;
                let mut all: Vec<Result<_, RestoreError>> = Vec::with_capacity(opened.len());
                for open in opened {
                    all.push(Ok((open, Arc::clone(&held))));
                }
                Ok::<_, RestoreError>(all)
            })
            .buffered(REQUESTS)
            .map_ok(futures::stream::iter)
            .try_flatten()
            .map_ok(|((open, entry), held)| {
                let entry = entry.within(from, until);
                let indexes = open.header.parts_within(entry.first, entry.last);
                let part = move |index| {
                    Ok::<_, RestoreError>((
                        PartOf { open: open.clone(), entry: entry.clone(), index },
                        Arc::clone(&held),
                    ))
                };
                futures::stream::iter(indexes.map(part))
            })
            .try_flatten()
            .map_ok(|(part, whole)| async move {
                let held = parts.take(part.open.len_to_read(part.index)).await;
                let stored = source.stored(&part).await?;
                if let Ok(stored) = &stored {
                    self.tally.read(stored.len());
                    self.progress.advance(stored.len() as u64);
                }
                Ok::<_, RestoreError>((part, stored, (whole, held)))
            })
            .try_buffered(REQUESTS)
            .map_ok(|(part, stored, held)| async move {
                let room = unwritten.take(1).await;
                let decoded = source.decode(part, stored, held).await?;
                let room = Arc::new(room);
                let mut all: Vec<Result<_, RestoreError>> = Vec::with_capacity(decoded.len());
                for part in decoded {
                    all.push(Ok((part, Arc::clone(&room))));
                }
                Ok::<_, RestoreError>(all)
            })
            .try_buffered(AHEAD)
            .map_ok(futures::stream::iter)
            .try_flatten();
        let mut decoded = std::pin::pin!(decoded);
        // The disk's writes and the decoding do not wait for each other.
        let (sender, mut receiver) = tokio::sync::mpsc::channel::<(Decoded, _)>(1);
        let writer = tokio::task::spawn_blocking(move || {
            while let Some((Decoded { header, span, commits }, room)) = receiver.blocking_recv() {
                segments.write(header.log_version, span.first..=span.last(), &commits)?;
                drop((commits, room));
            }
            segments.finish()
        });
        let feed = async {
            let mut continuity = Continuity::default();
            while let Some((part, room)) = decoded.try_next().await? {
                let (header, span) = (&part.header, part.span);
                if header.database != database.identity {
                    let key = paths::log(&database.identity, header.timeline, header.level, header.first, header.last);
                    return Err(RepositoryError::damaged(&key, "it belongs to another database").into());
                }
                if span.len == 0 {
                    continue;
                }
                continuity.take(&span)?;
                self.tally.wrote(part.commits.len());
                // A closed channel means that the writer failed: its own error says why.
                if sender.send((part, room)).await.is_err() || failed.is_noted() {
                    break;
                }
            }
            Ok::<_, RestoreError>(())
        };
        let fed = feed.await;
        drop(sender);
        let written = joined(writer.await)?;
        fed.and(written)
    }
}

/// Whether one of two that work side by side has failed: the other need not go on.
#[derive(Default)]
struct Failed(AtomicBool);

impl Failed {
    fn note<T>(&self, result: Result<T, RestoreError>) -> Result<T, RestoreError> {
        self.0.fetch_or(result.is_err(), Ordering::Relaxed);
        result
    }

    fn is_noted(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What was built.
pub(super) struct Built {
    /// Were token keys extracted?
    pub has_keys: bool,
    /// The segments of each database of the plan.
    pub logs: Vec<Vec<CheckedSegment>>,
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

/// Runs work that may block.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, RestoreError> {
    joined(tokio::task::spawn_blocking(work).await)
}

/// What a worker ended with.
fn joined<T>(ended: Result<T, JoinError>) -> Result<T, RestoreError> {
    ended.map_err(|error| RestoreError::Worker(error.to_string()))
}
