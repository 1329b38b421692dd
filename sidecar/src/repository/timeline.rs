//! A database's timelines and their log: found, put into a row through their ancestors, and read.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use object_store::ObjectMeta;
use object_store::path::Path as Key;

use crate::ids::{Identity, Offset, TimelineId};
use crate::repository::chain::{LogChain, LogEntry, Row, assemble};
use crate::repository::log_object::{ChainTip, HEADER_READ, LogHeader, check_name};
use crate::repository::manifest::{Timeline, TimelineReason};
use crate::repository::proof::Objects;
use crate::repository::{InObject, Repository, RepositoryError, paths};

/// A log object whose header was read.
#[derive(Debug, Clone)]
pub struct OpenLog {
    pub key: Key,
    pub header: Arc<LogHeader>,
    whole: Option<Bytes>,
}

impl OpenLog {
    /// Bytes that reading part `index` still takes: none where all of the object was read.
    pub fn len_to_read(&self, index: usize) -> u64 {
        let range = self.header.part_range(index);
        if self.whole.is_some() { 0 } else { range.end.saturating_sub(range.start) }
    }
}

/// Which objects a chain is made of, where several hold the same transactions.
#[derive(Debug, Clone, Default)]
pub struct ChainChoice {
    /// Objects that are missing or damaged: others may hold the same commits.
    pub avoid: BTreeSet<Key>,
    /// Read the headers at every joint, not only where names leave a doubt: of two histories that were written to one timeline,
    /// the one that leads on is used.
    pub every_joint: bool,
}

/// The timeline `id` and its ancestors, youngest first, each with the last offset that counts of it.
pub fn ancestry(timelines: &[Timeline], id: TimelineId) -> Vec<(Timeline, Option<Offset>)> {
    let mut line = Vec::new();
    let (mut next, mut until) = (Some(id), None);
    while let Some(timeline) = next.and_then(|id| timelines.iter().find(|timeline| timeline.timeline == id)) {
        line.push((timeline.clone(), until));
        // Ids grow from parent to child, so a damaged document cannot make this walk in a circle.
        next = timeline.parent.filter(|parent| *parent < timeline.timeline);
        until = match (until, timeline.fork_offset) {
            (Some(a), Some(b)) => Some(Offset::min(a, b)),
            (a, b) => a.or(b),
        };
    }
    line
}

/// A database's timelines, oldest first, and whose documents are not what they should be.
#[derive(Debug, Default)]
pub struct FoundTimelines {
    /// Those of which the log tells what their document did are here too.
    pub timelines: Vec<Timeline>,
    pub problems: Vec<(Key, RepositoryError)>,
}

impl Repository {
    /// Every timeline of a database, from documents or, where these are missing or damaged, from the log itself.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn timelines_and_problems(&self, database: &Identity) -> Result<FoundTimelines, RepositoryError> {
        let names = self.folders(&paths::timelines(database)).await?;
        let mut ids: Vec<TimelineId> = names.iter().filter_map(|name| name.parse().ok()).collect();
        ids.sort_unstable();
        let mut found = FoundTimelines::default();
        for id in ids {
            let key = paths::timeline(database, id);
            let error = match self.get_document(&key).await {
                Ok(timeline) => {
                    found.timelines.push(timeline);
                    continue;
                }
                Err(error) if error.is_damage() => error,
                Err(error) => return Err(error),
            };
            let mut entries = self.log_entries(database, id).await?;
            entries.sort_by_key(|entry| entry.first);
            // A folder without a document and without log holds nothing that was promised.
            if entries.is_empty() && matches!(error, RepositoryError::Missing { .. }) {
                continue;
            }
            if let Some(first) = entries.first() {
                found.timelines.extend(self.timeline_from_log(database, id, first).await?);
            }
            found.problems.push((key, error));
        }
        Ok(found)
    }

    /// What the first log object of a timeline tells of it; `None` when that is not enough.
    async fn timeline_from_log(
        &self,
        database: &Identity,
        id: TimelineId,
        first: &LogEntry,
    ) -> Result<Option<Timeline>, RepositoryError> {
        let header = match self.log_header(&first.key()).await {
            Ok(header) => header,
            Err(error) if error.is_damage() => return Ok(None),
            Err(error) => return Err(error),
        };
        let created_at = jiff::Timestamp::from_microsecond(header.archived_at).unwrap_or_default();
        let root =
            |start, reason| Timeline { timeline: id, parent: None, fork_offset: None, start, reason, created_at };
        if header.previous_chain == ChainTip::origin(database, header.first).chain {
            let reason = if header.first == Offset(0) { TimelineReason::First } else { TimelineReason::Gap };
            return Ok(Some(root(header.first, reason)));
        }
        let Some(before) = header.first.0.checked_sub(1).map(Offset) else { return Ok(None) };
        for parent in (1..id.0).rev().map(TimelineId) {
            for entry in self.log_entries(database, parent).await? {
                if entry.first > before || entry.last < before {
                    continue;
                }
                let other = match self.log_header(&entry.key()).await {
                    Ok(other) => other,
                    Err(error) if error.is_damage() => continue,
                    Err(error) => return Err(error),
                };
                if other.place_after(before).is(&header.place_before(header.first)) {
                    let fork = Timeline {
                        parent: Some(parent),
                        fork_offset: Some(before),
                        ..root(header.first, TimelineReason::Fork)
                    };
                    return Ok(Some(fork));
                }
            }
        }
        // Retention may have taken what came before, here or on the timeline that this one grew from.
        let retention = self.retention().await?.into_iter().flat_map(|retention| retention.removed);
        let gone: Vec<_> =
            retention.filter(|removed| removed.database == *database && removed.last >= before).collect();
        let own = gone.iter().find(|removed| removed.timeline == id && removed.last == before);
        Ok(match own {
            Some(own) => Some(root(own.first, TimelineReason::First)),
            None => gone.iter().any(|removed| removed.first <= before).then(|| root(header.first, TimelineReason::Gap)),
        })
    }

    /// The log of timeline `id`, through its ancestors.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn log_chain(
        &self,
        database: &Identity,
        timelines: &[Timeline],
        id: TimelineId,
    ) -> Result<LogChain, RepositoryError> {
        self.log_chain_by(database, timelines, id, &ChainChoice::default()).await
    }

    /// As [`Self::log_chain`], with a say in which objects are used.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn log_chain_by(
        &self,
        database: &Identity,
        timelines: &[Timeline],
        id: TimelineId,
        choice: &ChainChoice,
    ) -> Result<LogChain, RepositoryError> {
        let avoid = &choice.avoid;
        let mut line = ancestry(timelines, id);
        line.reverse();
        let (mut rows, mut objects) = (Vec::new(), Objects::new());
        for (timeline, until) in line {
            let mut entries = self.log_entries(database, timeline.timeline).await?;
            if !avoid.is_empty() {
                entries.retain(|entry| !avoid.contains(&entry.key()));
            }
            // What lies wholly behind the fork belongs to another history, and says nothing about this one.
            let counts = |entry: &&LogEntry| until.is_none_or(|until| entry.first <= until);
            objects.insert(timeline.timeline, entries.iter().filter(counts).cloned().collect());
            rows.push(Row { timeline: timeline.timeline, start: timeline.start, until, entries });
        }
        let mut chain = self.resolved(assemble(rows), &objects, choice.every_joint).await?;
        // What is missing is rare, so it is looked up only then whether that was meant.
        if !chain.holes.is_empty() {
            let retention = match self.retention().await {
                Ok(None) => return Ok(chain),
                Ok(Some(retention)) => Some(retention),
                // What cannot be known must neither stop a restore nor look like a loss, on which archives fork.
                Err(error) if error.is_damage() => {
                    tracing::warn!(%error, "whether missing log was removed on purpose is not known");
                    None
                }
                Err(error) => return Err(error),
            };
            for hole in &mut chain.holes {
                hole.removed = retention.as_ref().is_none_or(|retention| retention.has_removed(database, hole));
            }
        }
        Ok(chain)
    }

    /// The chain of a timeline's own objects alone, and all of these objects.
    ///
    /// # Errors
    /// When the store fails.
    pub(crate) async fn own_chain(
        &self,
        database: &Identity,
        timeline: TimelineId,
    ) -> Result<(LogChain, Vec<LogEntry>), RepositoryError> {
        let entries = self.log_entries(database, timeline).await?;
        let start = entries.iter().map(|entry| entry.first).min().unwrap_or(Offset(0));
        let chain = assemble(vec![Row { timeline, start, until: None, entries: entries.clone() }]);
        let objects = Objects::from([(timeline, entries)]);
        let chain = self.resolved(chain, &objects, false).await?;
        Ok((chain, objects.into_values().flatten().collect()))
    }

    /// Other objects of a timeline that together hold all transactions of `entry` that count; `None` where some are missing.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn replacement(
        &self,
        database: &Identity,
        entry: &LogEntry,
        avoid: &BTreeSet<Key>,
    ) -> Result<Option<Vec<LogEntry>>, RepositoryError> {
        let mut entries = self.log_entries(database, entry.timeline).await?;
        entries.retain(|other| other.last >= entry.first && other.first <= entry.last && !avoid.contains(&other.key()));
        let row = Row { timeline: entry.timeline, start: entry.first, until: Some(entry.last), entries };
        let chain = assemble(vec![row]);
        Ok(chain.holes.is_empty().then_some(chain.entries))
    }

    /// Did retention take away what followed `end` on this timeline?
    ///
    /// # Errors
    /// When the store fails.
    pub async fn is_removed_after(
        &self,
        database: &Identity,
        timeline: TimelineId,
        end: Offset,
    ) -> Result<bool, RepositoryError> {
        let removed = match self.retention().await {
            Ok(retention) => retention.into_iter().flat_map(|retention| retention.removed),
            Err(error) if error.is_damage() => return Ok(false),
            Err(error) => return Err(error),
        };
        let mut here = removed.filter(|removed| removed.database == *database && removed.timeline == timeline);
        Ok(here.any(|removed| removed.first <= Offset(end.0.saturating_add(1)) && removed.last > end))
    }

    /// The number that the next timeline gets: above all that were ever begun.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn next_timeline(&self, database: &Identity) -> Result<TimelineId, RepositoryError> {
        let names = self.folders(&paths::timelines(database)).await?;
        let highest = names.iter().filter_map(|name| name.parse::<TimelineId>().ok()).max();
        Ok(highest.map_or(TimelineId::FIRST, |highest| TimelineId(highest.0.saturating_add(1))))
    }

    /// Every log object of one timeline, of every level, in the order of names.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn log_entries(
        &self,
        database: &Identity,
        timeline: TimelineId,
    ) -> Result<Vec<LogEntry>, RepositoryError> {
        let mut entries: Vec<LogEntry> = Vec::new();
        let take = |object: ObjectMeta| {
            entries.extend(LogEntry::beside(entries.last(), &object.location, timeline, object.size));
        };
        self.visit(&paths::logs(database, timeline), take).await?;
        entries.sort_unstable_by_key(|entry| (entry.level, entry.first, entry.last));
        Ok(entries)
    }

    /// Bytes of a database's log objects, over all timelines.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn log_bytes(&self, database: &Identity) -> Result<u64, RepositoryError> {
        let objects = self.list(&paths::timelines(database)).await?;
        Ok(objects.iter().filter(|(key, _)| paths::parse_log(key).is_some()).map(|(_, size)| size).sum())
    }

    /// The newest timeline with log of its own. One that was begun and never written to promises nothing.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn newest_timeline(
        &self,
        database: &Identity,
        timelines: &[Timeline],
    ) -> Result<Option<TimelineId>, RepositoryError> {
        for timeline in timelines.iter().rev() {
            if self.holds_any(&paths::logs(database, timeline.timeline)).await? {
                return Ok(Some(timeline.timeline));
            }
        }
        Ok(None)
    }

    /// Can anything be restored from this history? A log that starts after transaction 0 needs a snapshot.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn is_restorable(
        &self,
        database: &Identity,
        timelines: &[Timeline],
        id: TimelineId,
    ) -> Result<bool, RepositoryError> {
        let chain = self.log_chain(database, timelines, id).await?;
        let Some(start) = chain.last().and_then(|last| chain.piece_start(last)) else {
            // Nothing is archived on it yet, and so nothing promised.
            return Ok(ancestry(timelines, id).last().is_some_and(|(root, _)| root.start == Offset(0)));
        };
        if start == Offset(0) {
            return Ok(true);
        }
        for (timeline, until) in &ancestry(timelines, id) {
            let snapshots = self.snapshots(database, timeline.timeline).await?;
            if snapshots.iter().any(|found| *found >= start && until.is_none_or(|until| *found <= until)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Opens a log object to read it part by part.
    ///
    /// # Errors
    /// When it is missing, its header is damaged, or it is another than its name says.
    pub async fn open_log(&self, entry: &LogEntry) -> Result<OpenLog, RepositoryError> {
        let (header, whole) = if entry.is_read_whole() {
            let whole = self.get(&entry.key()).await?;
            (LogHeader::parse(&whole).in_object(&entry.key())?, Some(whole))
        } else {
            (self.log_header(&entry.key()).await?, None)
        };
        check_name(&entry.key(), &header)?;
        let stored = whole.as_ref().map_or(entry.size, |whole| whole.len() as u64);
        if header.object_len() != stored {
            return Err(RepositoryError::damaged(&entry.key(), "it is not as long as its header says"));
        }
        Ok(OpenLog { key: entry.key(), header: Arc::new(header), whole })
    }

    /// Reads part `index` of an open log object, as it is stored.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn log_part(&self, open: &OpenLog, index: usize) -> Result<Bytes, RepositoryError> {
        let range = open.header.part_range(index);
        match &open.whole {
            Some(whole) => {
                let start = usize::try_from(range.start).unwrap_or(usize::MAX).min(whole.len());
                let end = usize::try_from(range.end).unwrap_or(usize::MAX).min(whole.len());
                Ok(whole.slice(start..end.max(start)))
            }
            None => self.get_range(&open.key, range).await,
        }
    }

    /// Reads the header of a log object.
    ///
    /// # Errors
    /// When it is missing or damaged.
    pub async fn log_header(&self, key: &Key) -> Result<LogHeader, RepositoryError> {
        let mut start = self.get_start(key, HEADER_READ).await?;
        let len = LogHeader::len_of(&start).in_object(key)?;
        if len as u64 > HEADER_READ {
            start = self.get_start(key, len as u64).await?;
        }
        LogHeader::parse(&start).in_object(key)
    }
}
