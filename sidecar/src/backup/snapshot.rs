//! The newest native snapshot's way into the repository: only pages and blobs that no earlier snapshot brought.
//!
//! Invariant: a snapshot is filed under a timeline only if the log beside it is that timeline's, before and after it was read.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use futures::StreamExt;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc};

use crate::backup::log::holds_link;
use crate::backup::{BackupError, WORKERS, Work, blocking};
use crate::datadir::log::segments;
use crate::datadir::snapshot::{self, Manifest, ObjectKind, SnapshotDir};
use crate::datadir::{DataDirError, ReplicaDir};
use crate::ids::{ContentHash, Identity, Offset, TimelineId};
use crate::repository::hashing::Hashing;
use crate::repository::manifest::{FORMAT, HistoryProof, PackUse, SnapshotManifest};
use crate::repository::pack::{EntryKind, PackBuilder};
use crate::repository::timeline::ancestry;
use crate::repository::{RepositoryError, paths};

/// Bytes of pages in one pack; a restore reads a pack for any page of it.
const PACK_SIZE: usize = 4 << 20;
/// Packs on their way at once to a store, which takes its time to answer, and to this machine's disk.
const UPLOADS: (usize, usize) = (2, 1);
/// Packs in memory before they are compressed: one more than are being compressed, so that the reader is always ahead. Of all
/// databases, as with their logs.
static ROOM: Semaphore = Semaphore::const_new(WORKERS + 1);
/// The server may delete a snapshot while we read it; then the next newest is tried.
const ATTEMPTS: usize = 3;

/// Archives the newest complete snapshot at or before `archived`. Of a history that begins after a gap the oldest one is
/// archived first: what lies before it cannot be restored. Returns what the operator should know.
///
/// # Errors
/// When the repository fails. A snapshot that cannot be read is a problem, not an error: the log holds everything.
pub(crate) async fn archive(
    work: &Arc<Work>,
    database: Identity,
    timeline: TimelineId,
    archived: Offset,
    replica: &ReplicaDir,
) -> Result<Vec<String>, BackupError> {
    let place = Place { database, timeline, replica };
    let mut problems = Vec::new();
    let mut passed_over = HashSet::new();
    for _ in 0..ATTEMPTS {
        let snapshots = snapshot::list(&replica.snapshots_path()).map_err(DataDirError::from)?;
        let usable = |found: &&SnapshotDir| found.offset <= archived && !passed_over.contains(&found.offset);
        let known = Known::load(work, database, timeline).await?;
        let first_needed = known.start > Offset(0) && !known.offsets.iter().any(|offset| *offset >= known.start);
        let chosen = if first_needed {
            snapshots.iter().filter(|found| found.offset >= known.start).find(usable)
        } else {
            snapshots.iter().rev().find(usable)
        };
        let Some(chosen) = chosen.filter(|chosen| !known.offsets.contains(&chosen.offset)) else { return Ok(problems) };
        let was_damaged = known.damaged.contains(&chosen.offset);
        match upload(work, &place, chosen.clone(), known).await {
            Ok(Outcome::Archived) if first_needed => {}
            Ok(Outcome::Archived) => return Ok(problems),
            // The log holds everything: leaving a snapshot out costs a restore time, a wrong one would cost it its rows.
            Ok(Outcome::Unproven) => {
                passed_over.insert(chosen.offset);
                let offset = chosen.offset;
                problems.push(format!(
                    "the snapshot at transaction {offset} is not archived: the log beside it is not the one that timeline \
                     {timeline} holds from there on; this ends once the archive follows the log that is on the disk now"
                ));
            }
            Err(BackupError::DataDir(error)) => {
                passed_over.insert(chosen.offset);
                if chosen.is_complete() {
                    problems.push(format!("the snapshot at transaction {} is not usable: {error}", chosen.offset));
                }
            }
            // The log holds everything, and what was archived before stands as it did.
            Err(BackupError::Repository(
                error @ (RepositoryError::Denied { .. } | RepositoryError::Conflict { .. }),
            )) if was_damaged => {
                passed_over.insert(chosen.offset);
                let offset = chosen.offset;
                problems.push(format!("the damaged snapshot at transaction {offset} was not replaced: {error}"));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(problems)
}

/// What earlier snapshots of this history brought.
struct Known {
    /// Where this history begins.
    start: Offset,
    /// The snapshots that are archived.
    offsets: HashSet<Offset>,
    /// Those of them that cannot be restored: a snapshot of this history that is on the disk still takes their place.
    damaged: HashSet<Offset>,
    packs: HashMap<ContentHash, (ContentHash, u64)>,
}

impl Known {
    async fn load(work: &Work, database: Identity, timeline: TimelineId) -> Result<Self, BackupError> {
        let timelines = work.repository.timelines(&database).await?;
        let line = ancestry(&timelines, timeline);
        let start = line.last().map_or(Offset(0), |(root, _)| root.start);
        let mut known = Self { start, offsets: HashSet::new(), damaged: HashSet::new(), packs: HashMap::new() };
        for (ancestor, until) in line {
            for offset in work.repository.snapshots(&database, ancestor.timeline).await?.into_iter().rev() {
                if until.is_some_and(|until| offset > until) {
                    continue;
                }
                // The newest snapshot names every object it needs, so older ones add little to what can be shared.
                if known.packs.is_empty() {
                    let newest = match work.repository.snapshot(&database, ancestor.timeline, offset).await {
                        Ok(newest) => newest,
                        // Nothing can be shared with what is damaged.
                        Err(error) if error.is_damage() => {
                            known.damaged.insert(offset);
                            continue;
                        }
                        Err(error) => return Err(error.into()),
                    };
                    for pack in newest.packs {
                        // A name alone proves nothing: a pack that was cut off is no pack.
                        let size = work.repository.size(&paths::pack(&database, pack.pack)).await?;
                        if size != Some(pack.stored_bytes) {
                            known.damaged.insert(offset);
                            continue;
                        }
                        let place = (pack.pack, pack.stored_bytes);
                        known.packs.extend(pack.entries.into_iter().map(|entry| (entry, place)));
                    }
                }
                if !known.damaged.contains(&offset) {
                    known.offsets.insert(offset);
                }
            }
        }
        Ok(known)
    }
}

/// What became of a snapshot.
enum Outcome {
    Archived,
    /// The log beside it is not the timeline's.
    Unproven,
}

/// Where a snapshot belongs, and the files beside it.
struct Place<'a> {
    database: Identity,
    timeline: TimelineId,
    replica: &'a ReplicaDir,
}

impl Place<'_> {
    /// Compares the log on the disk with the archive, at the end of the link that holds `offset`, or of the first that a log
    /// without its beginning still has. `None` where they differ, or nothing can be compared.
    async fn prove(&self, work: &Work, offset: Offset) -> Result<Option<HistoryProof>, BackupError> {
        let dir = self.replica.log_path();
        let Some(start) = segments(&dir).map_err(DataDirError::from)?.first().map(|segment| segment.first) else {
            return Ok(None);
        };
        let timelines = work.repository.timelines(&self.database).await?;
        let chain = work.repository.log_chain(&self.database, &timelines, self.timeline).await?;
        let wanted = offset.max(start);
        let Some(entry) = chain.range(wanted, wanted).first() else { return Ok(None) };
        let header = match work.repository.log_header(&entry.key()).await {
            Ok(header) => header,
            Err(error) if error.is_damage() => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let index = header.links.partition_point(|link| link.last < wanted);
        let Some(link) = header.links.get(index).filter(|link| link.last <= entry.last) else { return Ok(None) };
        let proof = HistoryProof { at: link.last, chain: link.chain, last_commit: link.last_commit };
        Ok(holds_link(&dir, &header, index, work.repository.hashing()?).await?.then_some(proof))
    }
}

async fn upload(
    work: &Arc<Work>,
    place: &Place<'_>,
    source: SnapshotDir,
    known: Known,
) -> Result<Outcome, BackupError> {
    let offset = source.offset;
    let Some(history) = place.prove(work, offset).await? else { return Ok(Outcome::Unproven) };
    let (manifest, native) = {
        let source = source.clone();
        blocking(move || source.manifest()).await??
    };
    if manifest.identity != place.database {
        let reason = format!("it belongs to database {}", manifest.identity);
        return Err(DataDirError::Damaged { path: source.path().to_owned(), at: 0, reason }.into());
    }
    let hashing = work.repository.hashing()?;
    let mut uses: HashMap<ContentHash, PackUse> = HashMap::new();
    let mut missing = Vec::new();
    for (hash, kind) in &manifest.objects {
        match known.packs.get(&hashing.name(*hash)) {
            Some((pack, stored_bytes)) => {
                let fresh = || PackUse { pack: *pack, stored_bytes: *stored_bytes, entries: Vec::new() };
                uses.entry(*pack).or_insert_with(fresh).entries.push(hashing.name(*hash));
            }
            None => missing.push((*hash, *kind)),
        }
    }
    let native_manifest = hashing.name_of(&native);
    let (new, raw_new) = upload_packs(work, place.database, Unread::new(source, native, missing)).await?;
    uses.extend(new.into_iter().map(|pack| (pack.pack, pack)));
    let mut packs: Vec<PackUse> = uses.into_values().collect();
    packs.sort_by_key(|pack| pack.pack);
    let snapshot = SnapshotManifest {
        format: FORMAT,
        identity: place.database,
        timeline: place.timeline,
        offset,
        replica: manifest.replica_id,
        native_manifest,
        raw_bytes: raw_new + shared_bytes(&manifest, &known, hashing),
        history: Some(history),
        packs,
    };
    // Reading takes long enough for the directory to be exchanged.
    if place.prove(work, offset).await?.is_none() {
        return Ok(Outcome::Unproven);
    }
    file(work, &snapshot, known.damaged.contains(&offset)).await?;
    Ok(Outcome::Archived)
}

/// Writes the manifest, once everything that it names is there.
async fn file(work: &Work, snapshot: &SnapshotManifest, replaces: bool) -> Result<(), BackupError> {
    let written = match replaces {
        true => work.repository.replace_snapshot(snapshot, work.clock.now()).await,
        false => work.repository.put_snapshot(snapshot).await,
    };
    let len = match written {
        // A restore point and a follower archive the same snapshot at once, and encrypted packs never have the same name
        // twice. The first manifest counts; `prune` deletes the packs that it does not name.
        Err(error @ RepositoryError::Conflict { .. }) if !replaces => {
            let stored = work.repository.snapshot(&snapshot.identity, snapshot.timeline, snapshot.offset).await;
            let is_same = stored.is_ok_and(|stored| {
                stored.offset == snapshot.offset && stored.native_manifest == snapshot.native_manifest
            });
            return if is_same { Ok(()) } else { Err(error.into()) };
        }
        written => written?,
    };
    work.tally.wrote_object(len);
    Ok(())
}

/// Uploads what no earlier snapshot brought. Returns the packs and the bytes that were read for them.
async fn upload_packs(
    work: &Arc<Work>,
    database: Identity,
    unread: Unread,
) -> Result<(Vec<PackUse>, u64), BackupError> {
    let (sender, receiver) = mpsc::channel::<Filled>(1);
    let reader = tokio::spawn(read_objects(unread, sender));
    let packs = futures::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|filled| (filled, receiver))
    })
    .map(|Filled { builder, _room }| {
        let work = Arc::clone(work);
        blocking(move || {
            let _room = _room;
            let (id, bytes) = builder.finish(work.level, &work.repository.keys)?;
            let hashing = work.repository.hashing()?;
            let entries: Vec<_> = builder.hashes().into_iter().map(|hash| hashing.name(hash)).collect();
            Ok::<_, RepositoryError>((id, bytes, entries, builder.raw_len()))
        })
    })
    .buffered(WORKERS + 1)
    .map(|pack| async {
        let (id, bytes, entries, raw_len) = pack??;
        let len = bytes.len();
        let key = paths::pack(&database, id);
        match work.repository.size(&key).await? {
            Some(size) if size == len as u64 => {}
            Some(_) => work.repository.replace(&key, bytes.into(), work.clock.now()).await?,
            None => {
                work.repository.put_pack(&database, id, bytes.into()).await?;
                work.tally.wrote_object(len);
            }
        }
        work.tally.read(raw_len);
        work.progress.advance(raw_len as u64);
        Ok::<_, BackupError>(PackUse { pack: id, stored_bytes: len as u64, entries })
    })
    // In no order: the manifest that names them is written when all are there.
    .buffer_unordered(if work.repository.is_local() { UPLOADS.1 } else { UPLOADS.0 });
    let mut packs = std::pin::pin!(packs);
    let mut uploaded = Vec::new();
    while let Some(pack) = packs.next().await {
        uploaded.push(pack?);
    }
    let raw_new = reader.await.map_err(|error| BackupError::Worker(error.to_string()))??;
    Ok((uploaded, raw_new))
}

/// An estimate of what shared objects take on disk: they are pages, all of one size.
fn shared_bytes(manifest: &Manifest, known: &Known, hashing: Hashing) -> u64 {
    const PAGE: u64 = 66 << 10;
    PAGE * manifest.objects.iter().filter(|(hash, _)| known.packs.contains_key(&hashing.name(*hash))).count() as u64
}

/// A pack's entries, before they are compressed.
struct Filled {
    builder: PackBuilder,
    /// Held until they are.
    _room: Option<SemaphorePermit<'static>>,
}

/// What of a snapshot is still to be read.
struct Unread {
    source: SnapshotDir,
    objects: std::vec::IntoIter<(ContentHash, ObjectKind)>,
    /// Read already: the server's manifest, or what the last pack had no place for.
    next: Option<(ContentHash, EntryKind, Vec<u8>)>,
    bytes_read: u64,
}

impl Unread {
    fn new(source: SnapshotDir, native: Vec<u8>, objects: Vec<(ContentHash, ObjectKind)>) -> Self {
        let bytes_read = native.len() as u64;
        let next = Some((ContentHash::of(&native), EntryKind::Manifest, native));
        Self { source, objects: objects.into_iter(), next, bytes_read }
    }

    /// Reads and checks objects until a pack is full; an empty one at the end.
    fn fill(&mut self) -> Result<PackBuilder, DataDirError> {
        let mut builder = PackBuilder::default();
        if let Some((hash, kind, bytes)) = self.next.take() {
            builder.add(hash, kind, &bytes);
        }
        for (hash, kind) in self.objects.by_ref() {
            let bytes = self.source.object(&hash, kind)?;
            self.bytes_read += bytes.len() as u64;
            if builder.raw_len() + bytes.len() > PACK_SIZE && !builder.is_empty() {
                self.next = Some((hash, EntryKind::Object(kind), bytes));
                break;
            }
            builder.add(hash, EntryKind::Object(kind), &bytes);
        }
        Ok(builder)
    }
}

/// Reads every object and hands them on in packs. Returns the bytes read. No thread is held while there is no room: what makes
/// room needs one too.
async fn read_objects(mut unread: Unread, sender: mpsc::Sender<Filled>) -> Result<u64, BackupError> {
    loop {
        let room = tokio::select! {
            // Never closed.
            room = ROOM.acquire() => room.ok(),
            () = sender.closed() => return Ok(unread.bytes_read),
        };
        let filled = blocking(move || unread.fill().map(|builder| (unread, builder)));
        let (left, builder) = filled.await??;
        unread = left;
        // Or the uploader gave up and says why itself.
        if builder.is_empty() || sender.send(Filled { builder, _room: room }).await.is_err() {
            return Ok(unread.bytes_read);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
