//! A database's log in the repository: the row of objects that leads to a place on a timeline, through its ancestors.

use std::collections::BTreeMap;

use object_store::path::Path as Key;

use crate::ids::{Identity, Offset, TimelineId};
use crate::repository::log_object::{HEADER_READ, LogHeader};
use crate::repository::manifest::Timeline;
use crate::repository::{InObject, Repository, RepositoryError, paths};

/// One log object as its name tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    pub key: Key,
    pub timeline: TimelineId,
    pub first: Offset,
    pub last: Offset,
    /// Bytes as stored.
    pub size: u64,
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
            let mut entries = Vec::new();
            for (key, size) in self.list(&paths::logs(database, timeline.timeline)).await? {
                if let Some((first, last)) = paths::parse_log(&key) {
                    entries.push(LogEntry { key, timeline: timeline.timeline, first, last, size });
                }
            }
            rows.push((timeline.start, until, entries));
        }
        Ok(assemble(rows))
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
/// At every offset the object that reaches furthest is taken, so what compaction made is preferred to what it was made
/// from, and objects that do not start where the row stands are passed over.
fn assemble(rows: Vec<(Offset, Option<Offset>, Vec<LogEntry>)>) -> LogChain {
    let mut chain = LogChain::default();
    let mut next: Option<Offset> = None;
    for (start, until, entries) in rows {
        let mut by_first: BTreeMap<Offset, LogEntry> = BTreeMap::new();
        for entry in entries {
            match by_first.get(&entry.first) {
                Some(other) if other.last >= entry.last => {}
                _ => {
                    by_first.insert(entry.first, entry);
                }
            }
        }
        let mut at = next.unwrap_or(start);
        while until.is_none_or(|until| at <= until) {
            let Some(entry) = by_first.get(&at) else { break };
            at = Offset(entry.last.0.saturating_add(1));
            chain.entries.push(entry.clone());
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

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(timeline: u32, first: u64, last: u64) -> LogEntry {
        LogEntry {
            key: Key::from(format!("{timeline}/{first}-{last}")),
            timeline: TimelineId(timeline),
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
        let broken = assemble(vec![(Offset(0), Some(Offset(9)), vec![entry(1, 0, 4)]), (Offset(10), None, parent)]);
        assert_eq!(broken.hole, Some((Offset(5), Offset(10))));
    }
}
