//! A database's log in the repository: the row of objects that leads to a place on a timeline, through its ancestors.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path as Key;

use crate::ids::{Identity, Offset, TimelineId};
use crate::repository::log_object::{HEADER_READ, LogHeader, check_name};
use crate::repository::manifest::Timeline;
use crate::repository::{InObject, Repository, RepositoryError, paths};

/// One log object as its name tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    pub key: Key,
    pub timeline: TimelineId,
    /// 0 as archived, higher after compaction.
    pub level: u8,
    pub first: Offset,
    /// The last transaction that counts: in a chain that leaves a timeline inside the object, less than its name says.
    pub last: Offset,
    /// Bytes as stored.
    pub size: u64,
}

/// Objects up to this size are read in one request.
const READ_WHOLE: u64 = 6 << 20;

/// A log object whose header was read.
#[derive(Debug, Clone)]
pub struct OpenLog {
    pub key: Key,
    pub header: Arc<LogHeader>,
    whole: Option<Bytes>,
}

/// The unbroken row of log objects of one timeline and the ancestors it grew from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogChain {
    pub entries: Vec<LogEntry>,
    /// Where the row breaks off although later objects are there: the first offset missing and the first found after.
    pub hole: Option<(Offset, Offset)>,
}

impl LogChain {
    /// The last offset that can be reached.
    pub fn last(&self) -> Option<Offset> {
        self.entries.last().map(|entry| entry.last)
    }

    pub fn first(&self) -> Option<Offset> {
        self.entries.first().map(|entry| entry.first)
    }

    /// The objects that hold any transaction from `first` to `last`, both included.
    pub fn range(&self, first: Offset, last: Offset) -> &[LogEntry] {
        let start = self.entries.partition_point(|entry| entry.last < first);
        let end = self.entries.partition_point(|entry| entry.first <= last);
        self.entries.get(start..end).unwrap_or_default()
    }
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

impl Repository {
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
        let mut line = ancestry(timelines, id);
        line.reverse();
        let mut rows = Vec::new();
        for (timeline, until) in line {
            let entries = self.log_entries(database, timeline.timeline).await?;
            rows.push((timeline.start, until, entries));
        }
        Ok(assemble(rows))
    }

    /// Every log object of one timeline, of every level.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn log_entries(
        &self,
        database: &Identity,
        timeline: TimelineId,
    ) -> Result<Vec<LogEntry>, RepositoryError> {
        let objects = self.list(&paths::logs(database, timeline)).await?;
        let entry = |(key, size): (Key, u64)| {
            let ((first, last), level) = (paths::parse_log(&key)?, paths::parse_log_level(&key)?);
            Some(LogEntry { key, timeline, level, first, last, size })
        };
        Ok(objects.into_iter().filter_map(entry).collect())
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
            if !self.list(&paths::logs(database, timeline.timeline)).await?.is_empty() {
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
        let line = ancestry(timelines, id);
        if line.last().is_some_and(|(root, _)| root.start == Offset(0)) {
            return Ok(true);
        }
        for (timeline, until) in &line {
            let snapshots = self.snapshots(database, timeline.timeline).await?;
            let start = line.last().map_or(Offset(0), |(root, _)| root.start);
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
        let (header, whole) = if entry.size <= READ_WHOLE {
            let whole = self.get(&entry.key).await?;
            (LogHeader::parse(&whole).in_object(&entry.key)?, Some(whole))
        } else {
            (self.log_header(&entry.key).await?, None)
        };
        check_name(&entry.key, &header)?;
        let stored = whole.as_ref().map_or(entry.size, |whole| whole.len() as u64);
        if header.object_len() != stored {
            return Err(RepositoryError::damaged(&entry.key, "it is not as long as its header says"));
        }
        Ok(OpenLog { key: entry.key.clone(), header: Arc::new(header), whole })
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
        let len = LogHeader::len_of(&start).unwrap_or(0);
        if len as u64 > HEADER_READ {
            start = self.get_start(key, len as u64).await?;
        }
        LogHeader::parse(&start).in_object(key)
    }
}

/// Puts the objects of a line of timelines into one row: oldest timeline first, `until` the last offset taken of each.
///
/// Of the objects that start where the row stands, the one is taken from which the row reaches furthest, and of these the
/// largest: so what compaction made is preferred to what it was made from, and what a writer who had lost its lease still
/// wrote, cut otherwise, leads nowhere. Objects that do not start where the row stands are passed over.
fn assemble(rows: Vec<(Offset, Option<Offset>, Vec<LogEntry>)>) -> LogChain {
    let mut chain = LogChain::default();
    let mut next: Option<Offset> = None;
    for (start, until, entries) in rows {
        let by_first = furthest(entries);
        let mut at = next.unwrap_or(start);
        while until.is_none_or(|until| at <= until) {
            let Some((entry, _)) = by_first.get(&at) else { break };
            at = Offset(entry.last.0.saturating_add(1));
            let last = until.map_or(entry.last, |until| entry.last.min(until));
            chain.entries.push(LogEntry { last, ..entry.clone() });
        }
        let stray =
            by_first.range(at..).map(|(first, _)| *first).find(|first| until.is_none_or(|until| *first <= until));
        if chain.hole.is_none() {
            chain.hole = stray.map(|found| (at, found));
        }
        if chain.hole.is_some() {
            break;
        }
        next = Some(until.map_or(at, |until| Offset(until.0 + 1)));
        if let Some(until) = until
            && at <= until
        {
            // The ancestor does not reach the fork: nothing after it can be reached either.
            chain.hole = Some((at, Offset(until.0 + 1)));
            break;
        }
    }
    chain
}

/// For every offset that objects start at, the one to take and how far the row reaches from it.
fn furthest(mut entries: Vec<LogEntry>) -> BTreeMap<Offset, (LogEntry, Offset)> {
    // From the end on, so that what follows an object is known when it is looked at.
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.first));
    let mut best: BTreeMap<Offset, (LogEntry, Offset)> = BTreeMap::new();
    for entry in entries {
        let following = best.get(&Offset(entry.last.0.saturating_add(1)));
        let reach = following.map_or(entry.last, |(_, reach)| (*reach).max(entry.last));
        match best.get(&entry.first) {
            Some((other, other_reach)) if (*other_reach, other.last) >= (reach, entry.last) => {}
            _ => {
                best.insert(entry.first, (entry, reach));
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(timeline: u32, first: u64, last: u64) -> LogEntry {
        LogEntry {
            key: Key::from(format!("{timeline}/{first}-{last}")),
            timeline: TimelineId(timeline),
            level: 0,
            first: Offset(first),
            last: Offset(last),
            size: 1,
        }
    }

    fn ranges(chain: &LogChain) -> Vec<(u64, u64)> {
        chain.entries.iter().map(|entry| (entry.first.0, entry.last.0)).collect()
    }

    #[test]
    fn the_object_that_reaches_furthest_is_taken() {
        let objects = vec![entry(1, 0, 4), entry(1, 0, 9), entry(1, 5, 9), entry(1, 10, 11)];
        let chain = assemble(vec![(Offset(0), None, objects)]);
        assert_eq!(ranges(&chain), [(0, 9), (10, 11)]);
        assert_eq!(chain.hole, None);
        assert_eq!(chain.range(Offset(9), Offset(9)).len(), 1);
        assert_eq!(chain.range(Offset(9), Offset(10)).len(), 2);
        assert_eq!(chain.range(Offset(12), Offset(20)).len(), 0);
    }

    #[test]
    fn an_object_that_leads_nowhere_is_passed_over_although_it_is_larger() {
        let objects = vec![entry(1, 0, 9), entry(1, 10, 19), entry(1, 10, 24), entry(1, 20, 29), entry(1, 30, 31)];
        let chain = assemble(vec![(Offset(0), None, objects)]);
        assert_eq!((ranges(&chain), chain.hole), (vec![(0, 9), (10, 19), (20, 29), (30, 31)], None));
    }

    #[test]
    fn a_missing_object_is_a_hole() {
        let chain = assemble(vec![(Offset(0), None, vec![entry(1, 0, 4), entry(1, 7, 9)])]);
        assert_eq!((ranges(&chain), chain.hole), (vec![(0, 4)], Some((Offset(5), Offset(7)))));
    }

    #[test]
    fn a_fork_takes_its_parent_up_to_the_fork_only() {
        let parent = vec![entry(1, 0, 4), entry(1, 5, 9), entry(1, 10, 14)];
        let chain =
            assemble(vec![(Offset(0), Some(Offset(9)), parent.clone()), (Offset(10), None, vec![entry(2, 10, 12)])]);
        assert_eq!(ranges(&chain), [(0, 4), (5, 9), (10, 12)]);
        let inside = assemble(vec![
            (Offset(0), Some(Offset(7)), vec![entry(1, 0, 4), entry(1, 5, 20)]),
            (Offset(8), None, vec![entry(2, 8, 12)]),
        ]);
        assert_eq!((ranges(&inside), inside.hole), (vec![(0, 4), (5, 7), (8, 12)], None));
        let broken = assemble(vec![(Offset(0), Some(Offset(9)), vec![entry(1, 0, 4)]), (Offset(10), None, parent)]);
        assert_eq!(broken.hole, Some((Offset(5), Offset(10))));
    }
}
