//! Compaction: many small log objects become few large ones, so that a restore makes few requests.
//!
//! Invariants: only objects that readers use are merged, along the chain that readers take, never along names alone; inputs are
//! deleted after a grace period, so that a restore that began before can finish, and only right after their replacement was read
//! back whole and found to hold the same commits; a crash at any moment leaves inputs, output, or both, and both read the same.
//! It holds no state: what is left to do shows in the names.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::backup::{BackupError, OBJECT_SIZE, Work, blocking};
use crate::clock::Stopwatch;
use crate::ids::{Identity, RestorePointId, TimelineId};
use crate::repository::chain::LogEntry;
use crate::repository::large::LargePut;
use crate::repository::log_object::{LogHeader, Merge};
use crate::repository::proof::is_odd;
use crate::repository::{InObject, Repository, RepositoryError, paths};

/// The highest level.
pub const TOP: u8 = 2;
/// Stored bytes of one level 1 object: it is put together in memory.
const LEVEL_1_BYTES: u64 = 16 << 20;
/// Stored bytes of one level 2 object, which is copied part by part.
const LEVEL_2_BYTES: u64 = 512 << 20;
/// The most inputs of one object, and the most links: they bound the header.
const INPUTS_MAX: usize = 4096;
const LINKS_MAX: usize = 16 << 10;
/// So many level 1 objects are worth a level 2 object even when they are small.
const ENOUGH_FOR_LEVEL_2: usize = 16;
/// zstd level: what is merged is kept for long.
const LEVEL: i32 = 3;
/// Memory for objects that are put together in it, of all databases, in KiB: a body and its copy.
const MEMORY_KIB: u32 = 2 * (LEVEL_1_BYTES >> 10) as u32;
static MEMORY: Semaphore = Semaphore::const_new(MEMORY_KIB as usize);

/// Since when a repository refuses to delete. What is asked again is proven first, which reads whole objects.
static REFUSED: Mutex<BTreeMap<RestorePointId, Stopwatch>> = Mutex::new(BTreeMap::new());
const REFUSED_PAUSE: Duration = Duration::from_secs(6 * 60 * 60);

/// What a pass did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pass {
    pub merged: u64,
    pub written: u64,
    pub deleted: u64,
}

/// One timeline's log, being compacted.
struct Compaction<'a> {
    work: &'a Arc<Work>,
    database: Identity,
    timeline: TimelineId,
}

/// Merges what can be merged on one timeline, and deletes inputs whose grace is over.
///
/// # Errors
/// When the store fails. What is done stays done.
pub(crate) async fn pass(
    work: &Arc<Work>,
    database: Identity,
    timeline: TimelineId,
    grace: Duration,
) -> Result<Pass, BackupError> {
    let compaction = Compaction { work, database, timeline };
    let mut done = Pass::default();
    // One damaged object must not keep all others from being merged.
    let mut damage = None;
    for level in 0..TOP {
        let (chain, _) = work.repository.own_chain(&database, timeline).await?;
        for run in runs(chain.entries, level) {
            match compaction.merge(level + 1, &run, &mut done).await {
                Err(error) if error.is_damage() => damage = damage.or(Some(error)),
                merged => merged?,
            }
        }
    }
    compaction.delete_inputs(grace, &mut done, &mut damage).await?;
    match damage {
        Some(error) => Err(error),
        None => Ok(done),
    }
}

/// The runs of objects of `level` that are to become objects of the next: adjoining in the chain that readers take.
fn runs(chain: Vec<LogEntry>, level: u8) -> Vec<Vec<LogEntry>> {
    let most = if level == 0 { LEVEL_1_BYTES } else { LEVEL_2_BYTES };
    let mut runs: Vec<(u64, Vec<LogEntry>)> = Vec::new();
    for entry in chain.into_iter().filter(|entry| entry.level == level && entry.is_whole()) {
        match runs.last_mut() {
            Some((bytes, run))
                if run.last().is_some_and(|last| last.last.0 + 1 == entry.first.0)
                    && *bytes + entry.size <= most
                    && run.len() < INPUTS_MAX =>
            {
                *bytes += entry.size;
                run.push(entry);
            }
            _ => runs.push((entry.size, vec![entry])),
        }
    }
    let last = runs.len().saturating_sub(1);
    let is_full = |(index, (bytes, run)): &(usize, (u64, Vec<LogEntry>))| {
        run.len() > 1 && (level == 0 || *index < last || *bytes >= most / 2 || run.len() >= ENOUGH_FOR_LEVEL_2)
    };
    runs.into_iter().enumerate().filter(is_full).map(|(_, (_, run))| run).collect()
}

/// Inputs of one output, with their headers.
#[derive(Default)]
struct Group {
    entries: Vec<LogEntry>,
    headers: Vec<LogHeader>,
}

impl Group {
    /// Returns true if the object can join: format versions never share an object, and the chain hashes must continue.
    fn takes(&self, header: &LogHeader) -> bool {
        let links = self.headers.iter().map(|header| header.links.len()).sum::<usize>() + header.links.len();
        self.headers.last().is_none_or(|before| {
            links <= LINKS_MAX
                && before.log_version == header.log_version
                && before.sealed == header.sealed
                && before.tip().chain == header.previous_chain
                && before.tip().next == header.first
        })
    }
}

impl Compaction<'_> {
    /// Merges a run into as few objects of `level` as its chain allows.
    async fn merge(&self, level: u8, run: &[LogEntry], done: &mut Pass) -> Result<(), BackupError> {
        let mut group = Group::default();
        for entry in run {
            let header = match self.work.repository.log_header(&entry.key()).await {
                Ok(header) => header,
                // What is damaged is for `verify` to report; it stays as it is.
                Err(error) if error.is_damage() => {
                    self.merge_group(level, std::mem::take(&mut group), done).await?;
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            if !group.takes(&header) {
                self.merge_group(level, std::mem::take(&mut group), done).await?;
            }
            group.entries.push(entry.clone());
            group.headers.push(header);
        }
        self.merge_group(level, group, done).await
    }

    /// Writes one object from a group, and reads it back.
    async fn merge_group(&self, level: u8, group: Group, done: &mut Pass) -> Result<(), BackupError> {
        let (Some(first), Some(last)) = (group.entries.first(), group.entries.last()) else { return Ok(()) };
        if group.entries.len() < 2 {
            return Ok(());
        }
        let repository = &self.work.repository;
        let key = paths::log(&self.database, self.timeline, level, first.first, last.last);
        let is_new = !repository.exists(&key).await?;
        if is_new {
            // Encrypted bodies cannot be opened with recipients alone, and large ones are compressed well already: both are copied.
            if level > 1 || repository.keys.seals() || group.headers.iter().any(|header| header.sealed) {
                self.copy(level, &group).await?;
            } else {
                self.compress(level, &group).await?;
            }
        }
        let size = repository.size(&key).await?.unwrap_or_default();
        let output = LogEntry::new(&self.database, self.timeline, level, first.first, last.last, size);
        if let Err(error) = self.check_output(&output, &group.headers).await {
            return Err(match is_new && error.is_damage() {
                // It is derived: its inputs were read a moment ago, and it is made again from them.
                true => {
                    repository.delete(&key).await?;
                    error
                }
                // The process that made it may have deleted inputs since.
                false => self.give_up(&output, error).await?,
            });
        }
        done.merged += group.entries.len() as u64;
        done.written += 1;
        Ok(())
    }

    /// Copies the bodies of a group behind one another.
    async fn copy(&self, level: u8, group: &Group) -> Result<(), BackupError> {
        let repository = &self.work.repository;
        let mut merge = Merge::new(self.database, self.timeline, level, self.work.clock.now().as_microsecond());
        group.headers.iter().for_each(|header| merge.copy(header));
        let header = merge.header();
        let key = paths::log(&self.database, self.timeline, level, header.first, header.last);
        let mut output = repository.put_large(&key, header.to_bytes().into()).await?;
        if let Err(error) = copy_bodies(repository, &group.entries, &mut output).await {
            output.abandon().await;
            return Err(error.into());
        }
        Ok(())
    }

    /// Compresses the commits of a group together.
    async fn compress(&self, level: u8, group: &Group) -> Result<(), BackupError> {
        let repository = &self.work.repository;
        let stored: u64 = group.entries.iter().map(|entry| entry.size).sum();
        let wanted = u32::try_from(2 * stored / 1024 + 1).unwrap_or(u32::MAX).min(MEMORY_KIB);
        // Never closed.
        let _memory = MEMORY.acquire_many(wanted).await.ok();
        let mut merge = Merge::new(self.database, self.timeline, level, self.work.clock.now().as_microsecond());
        let mut body = Vec::new();
        let mut gathered: Vec<u8> = Vec::new();
        for entry in &group.entries {
            let open = repository.open_log(entry).await?;
            for index in 0..open.header.parts.len() {
                let stored = repository.log_part(&open, index).await?;
                let (header, key, keys) = (Arc::clone(&open.header), entry.key(), repository.keys.clone());
                let commits = blocking(move || header.decode_part(&key, index, &stored, &keys)).await??;
                if !gathered.is_empty() && gathered.len() + commits.len() > OBJECT_SIZE {
                    merge.seal(&gathered, LEVEL, &repository.keys, &mut body)?;
                    gathered.clear();
                }
                gathered.extend_from_slice(&commits);
                merge.add(&open.header, index);
            }
        }
        merge.seal(&gathered, LEVEL, &repository.keys, &mut body)?;
        let header = merge.header();
        let mut bytes = header.to_bytes();
        bytes.append(&mut body);
        let key = paths::log(&self.database, self.timeline, level, header.first, header.last);
        repository.put(&key, bytes.into()).await?;
        Ok(())
    }

    /// The output must hold what the inputs held, as their links prove, and all of it must be readable.
    async fn check_output(&self, output: &LogEntry, inputs: &[LogHeader]) -> Result<(), BackupError> {
        let header = self.work.repository.log_header(&output.key()).await?;
        if !inputs.iter().all(|input| holds(&header, input)) {
            return Err(RepositoryError::damaged(&output.key(), "it does not hold what it was made from").into());
        }
        self.read_back(output).await
    }

    /// Reads every byte of an object.
    async fn read_back(&self, entry: &LogEntry) -> Result<(), BackupError> {
        let open = self.work.repository.open_log(entry).await?;
        for index in 0..open.header.parts.len() {
            let stored = self.work.repository.log_part(&open, index).await?;
            let (header, key, keys) = (Arc::clone(&open.header), entry.key(), self.work.repository.keys.clone());
            let checked = move || match header.sealed {
                true => header.check_part(index, &stored).in_object(&key),
                false => header.decode_part(&key, index, &stored, &keys).map(|_| ()),
            };
            blocking(checked).await??;
        }
        Ok(())
    }

    /// Deletes objects that one of a higher level in the chain holds since `grace` ago.
    async fn delete_inputs(
        &self,
        grace: Duration,
        done: &mut Pass,
        damage: &mut Option<BackupError>,
    ) -> Result<(), BackupError> {
        let repository = &self.work.repository;
        let waits = |since: &Stopwatch| since.elapsed_seconds() < REFUSED_PAUSE.as_secs_f64();
        if REFUSED.lock().get(&repository.info.id).is_some_and(waits) {
            return Ok(());
        }
        let (chain, entries) = repository.own_chain(&self.database, self.timeline).await?;
        // Those that a larger one holds count too: the grace of their inputs began when they were written.
        let outputs = entries.iter().filter(|entry| entry.level > 0 && !is_odd(&chain, entry));
        for output in outputs {
            let is_input = |entry: &&LogEntry| {
                entry.level < output.level && entry.first >= output.first && entry.last <= output.last
            };
            let inputs: Vec<_> = entries.iter().filter(is_input).collect();
            if inputs.is_empty() {
                continue;
            }
            let header = match repository.log_header(&output.key()).await {
                Ok(header) => header,
                Err(error) => {
                    let error = self.give_up(output, error.into()).await?;
                    if !error.is_damage() {
                        return Err(error);
                    }
                    *damage = damage.take().or(Some(error));
                    continue;
                }
            };
            let written = Timestamp::from_microsecond(header.archived_at).unwrap_or(Timestamp::MAX);
            let age = self.work.clock.now().duration_since(written);
            if !Duration::try_from(age).is_ok_and(|age| age >= grace) {
                continue;
            }
            let held = self.held(&header, inputs).await?;
            if held.is_empty() {
                continue;
            }
            if let Err(error) = self.read_back(&output.whole()).await {
                let error = self.give_up(output, error).await?;
                if !error.is_damage() {
                    return Err(error);
                }
                *damage = damage.take().or(Some(error));
                continue;
            }
            for input in held {
                match repository.delete(&input.key()).await {
                    Ok(()) => done.deleted += 1,
                    // A bucket that refuses deletes keeps them: that costs space and loses nothing.
                    Err(error @ RepositoryError::Denied { .. }) => {
                        tracing::warn!(%error, "merged objects stay, and nobody asks to delete them for some hours");
                        REFUSED.lock().insert(repository.info.id, Stopwatch::start());
                        return Ok(());
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }

    /// Those of `inputs` whose commits an object with `header` holds.
    async fn held<'b>(&self, header: &LogHeader, inputs: Vec<&'b LogEntry>) -> Result<Vec<&'b LogEntry>, BackupError> {
        let mut held = Vec::new();
        for input in inputs {
            match self.work.repository.log_header(&input.key()).await {
                Ok(input_header) if holds(header, &input_header) => held.push(input),
                Ok(_) => {
                    tracing::debug!(key = %input.key(), "it holds other commits than the merged object and is kept")
                }
                // Nothing reads what is damaged; the merged object has its place.
                Err(RepositoryError::Damaged { .. }) if header.place_after(input.last).is_known() => held.push(input),
                Err(error) if error.is_damage() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(held)
    }

    /// Removes a merged object that cannot be read back, if others hold all that it held: the same commits, read back.
    async fn give_up(&self, output: &LogEntry, error: BackupError) -> Result<BackupError, BackupError> {
        if error.is_damage() && self.stands_in(&output.whole()).await? {
            self.work.repository.delete(&output.key()).await?;
        }
        Ok(error)
    }

    /// Do other objects hold all of `output`? Where its header can be read, they must lead where it leads.
    async fn stands_in(&self, output: &LogEntry) -> Result<bool, BackupError> {
        let repository = &self.work.repository;
        let avoid = [output.key()].into();
        let Some(others) = repository.replacement(&self.database, output, &avoid).await? else { return Ok(false) };
        let expected = match repository.log_header(&output.key()).await {
            Ok(header) => Some((header.place_before(output.first), header.place_after(output.last))),
            Err(error) if error.is_damage() => None,
            Err(error) => return Err(error.into()),
        };
        let mut before: Option<(LogHeader, LogEntry)> = None;
        for entry in others {
            let header = match repository.log_header(&entry.key()).await {
                Ok(header) => header,
                Err(error) if error.is_damage() => return Ok(false),
                Err(error) => return Err(error.into()),
            };
            let continues = match (&before, &expected) {
                (Some((other, left)), _) => {
                    let (ends, starts) = (other.place_after(left.last), header.place_before(entry.first));
                    ends.is(&starts)
                }
                (None, Some((starts, _))) => header.place_before(entry.first).is(starts),
                (None, None) => true,
            };
            if !continues {
                return Ok(false);
            }
            match self.read_back(&entry.whole()).await {
                Ok(()) => {}
                Err(error) if error.is_damage() => return Ok(false),
                Err(error) => return Err(error),
            }
            before = Some((header, entry));
        }
        let ends = before.map(|(header, left)| header.place_after(left.last));
        Ok(ends.is_some_and(|ends| expected.is_none_or(|(_, expected)| ends.is(&expected))))
    }
}

/// Returns true if an object with `header` holds the commits of `input`, and has all of its links.
fn holds(header: &LogHeader, input: &LogHeader) -> bool {
    header.database == input.database
        && header.place_before(input.first).is(&input.place_before(input.first))
        && header.has_places_of(input)
}

/// Copies the bodies of log objects behind one another, checked.
async fn copy_bodies(
    repository: &Repository,
    run: &[LogEntry],
    output: &mut LargePut<'_>,
) -> Result<(), RepositoryError> {
    for entry in run {
        let open = repository.open_log(entry).await?;
        for index in 0..open.header.parts.len() {
            let stored = repository.log_part(&open, index).await?;
            open.header.check_part(index, &stored).in_object(&entry.key())?;
            output.write(stored).await?;
        }
    }
    output.finish().await
}

#[cfg(test)]
mod tests;
