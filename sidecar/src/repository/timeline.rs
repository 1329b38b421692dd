//! A database's log in the repository: the row of objects that leads to a place on a timeline, through its ancestors.

use std::cmp::Reverse;
use std::sync::Arc;

use bytes::Bytes;
use object_store::path::Path as Key;

use crate::ids::{Identity, Offset, TimelineId};
use crate::repository::log_object::{ChainTip, HEADER_READ, LogHeader, check_name};
use crate::repository::manifest::{Timeline, TimelineReason};
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

impl LogEntry {
    /// Bytes that opening it reads.
    pub fn size_to_open(&self) -> u64 {
        if self.is_read_whole() { self.size } else { HEADER_READ }
    }

    fn is_read_whole(&self) -> bool {
        self.size <= READ_WHOLE
    }
}

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

/// The row of log objects of one timeline and the ancestors it grew from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LogChain {
    pub entries: Vec<LogEntry>,
    /// Where the row breaks off although later objects are there, or an ancestor does not reach its fork.
    pub holes: Vec<Hole>,
}

/// Transactions that a row of log objects lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hole {
    pub timeline: TimelineId,
    /// The first that is missing.
    pub missing: Offset,
    /// The first after it that is there, or belongs to a descendant.
    pub found: Offset,
    /// Retention took it away.
    pub removed: bool,
}

impl Hole {
    pub fn last(&self) -> Offset {
        Offset(self.found.0.saturating_sub(1))
    }

    pub fn holds(&self, offset: Offset) -> bool {
        self.missing <= offset && offset < self.found
    }
}

impl LogChain {
    /// The last offset that can be reached.
    pub fn last(&self) -> Option<Offset> {
        self.entries.last().map(|entry| entry.last)
    }

    pub fn first(&self) -> Option<Offset> {
        self.entries.first().map(|entry| entry.first)
    }

    /// What is missing first, and was not removed on purpose.
    pub fn loss(&self) -> Option<Hole> {
        self.holes.iter().find(|hole| !hole.removed).copied()
    }

    /// The row up to its first loss.
    pub fn before_loss(mut self) -> Self {
        if let Some(loss) = self.loss() {
            self.entries.retain(|entry| entry.first < loss.missing);
        }
        self
    }

    /// The objects from `first` to `last`, both included, if all of it is there.
    pub fn unbroken(&self, first: Offset, last: Offset) -> Option<&[LogEntry]> {
        let broken = self.holes.iter().any(|hole| hole.missing <= last && first < hole.found);
        let row = self.range(first, last);
        let whole =
            row.first().is_some_and(|entry| entry.first <= first) && row.last().is_some_and(|entry| entry.last >= last);
        (whole && !broken).then_some(row)
    }

    /// Where the unbroken piece begins that `offset` lies in.
    pub fn piece_start(&self, offset: Offset) -> Option<Offset> {
        let entry = self.range(offset, offset).first()?;
        let after = self.holes.iter().map(|hole| hole.found).filter(|found| *found <= offset).max();
        let start = after.or(self.first())?;
        (start <= offset || entry.first <= offset).then_some(start)
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
        let header = match self.log_header(&first.key).await {
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
                let other = match self.log_header(&entry.key).await {
                    Ok(other) => other,
                    Err(error) if error.is_damage() => continue,
                    Err(error) => return Err(error),
                };
                if other.links.iter().any(|link| link.last == before && link.chain == header.previous_chain) {
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
        let mut line = ancestry(timelines, id);
        line.reverse();
        let mut rows = Vec::new();
        for (timeline, until) in line {
            let entries = self.log_entries(database, timeline.timeline).await?;
            rows.push(Row { timeline: timeline.timeline, start: timeline.start, until, entries });
        }
        let mut chain = assemble(rows);
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

/// The objects of one timeline.
struct Row {
    timeline: TimelineId,
    start: Offset,
    /// The last offset that is taken of it.
    until: Option<Offset>,
    entries: Vec<LogEntry>,
}

/// Puts the objects of a line of timelines into one row, oldest timeline first.
///
/// Of the objects that start where the row stands, the one is taken from which the row reaches furthest, and of these the
/// largest: so what compaction made is preferred to what it was made from, and what a writer who had lost its lease still
/// wrote, cut otherwise, leads nowhere. Where nothing goes on, the row goes on after a hole.
fn assemble(rows: Vec<Row>) -> LogChain {
    let mut chain = LogChain::default();
    let mut next: Option<Offset> = None;
    for Row { timeline, start, until, mut entries } in rows {
        entries.sort_by_key(|entry| Reverse(entry.first));
        let mut candidates = furthest(&entries);
        let mut entries: Vec<_> = entries.into_iter().map(Some).collect();
        let mut at = next.unwrap_or(start);
        let is_ours = |offset: Offset| until.is_none_or(|until| offset <= until);
        while let Some(candidate) = candidates.pop() {
            if candidate.first < at {
                continue;
            }
            if !is_ours(candidate.first) {
                break;
            }
            if candidate.first > at {
                chain.holes.push(Hole { timeline, missing: at, found: candidate.first, removed: false });
            }
            let Some(entry) = entries.get_mut(candidate.index).and_then(Option::take) else { break };
            at = Offset(entry.last.0.saturating_add(1));
            let last = until.map_or(entry.last, |until| entry.last.min(until));
            chain.entries.push(LogEntry { last, ..entry });
        }
        if let Some(until) = until {
            let found = Offset(until.0.saturating_add(1));
            if at < found {
                chain.holes.push(Hole { timeline, missing: at, found, removed: false });
            }
            at = found;
        }
        next = Some(at);
    }
    chain
}

/// The object to take of those that start at one offset.
struct Candidate {
    first: Offset,
    /// Its place among the objects.
    index: usize,
    /// How far the row reaches from it.
    reach: Offset,
}

/// For every offset that objects start at, the one to take. From the end on, as `entries` are, so that what follows an object
/// is known when it is looked at.
fn furthest(entries: &[LogEntry]) -> Vec<Candidate> {
    let mut best: Vec<Candidate> = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let (first, next) = (entry.first, Offset(entry.last.0.saturating_add(1)));
        let following = best.binary_search_by(|found| next.cmp(&found.first)).ok().map(|at| best[at].reach);
        let reach = following.map_or(entry.last, |reach| reach.max(entry.last));
        match best.last_mut().filter(|other| other.first == first) {
            Some(other) if (other.reach, entries[other.index].last) >= (reach, entry.last) => {}
            Some(other) => *other = Candidate { first, index, reach },
            None => best.push(Candidate { first, index, reach }),
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

    fn row(timeline: u32, until: Option<u64>, entries: Vec<LogEntry>) -> Row {
        let start = entries.first().map_or(Offset(0), |entry| entry.first);
        Row {
            timeline: TimelineId(timeline),
            start: if timeline == 1 { Offset(0) } else { start },
            until: until.map(Offset),
            entries,
        }
    }

    fn holes(chain: &LogChain) -> Vec<(u32, u64, u64)> {
        chain.holes.iter().map(|hole| (hole.timeline.0, hole.missing.0, hole.found.0)).collect()
    }

    #[test]
    fn the_object_that_reaches_furthest_is_taken() {
        let objects = vec![entry(1, 0, 4), entry(1, 0, 9), entry(1, 5, 9), entry(1, 10, 11)];
        let chain = assemble(vec![row(1, None, objects)]);
        assert_eq!(ranges(&chain), [(0, 9), (10, 11)]);
        assert_eq!(chain.holes, []);
        assert_eq!(chain.range(Offset(9), Offset(9)).len(), 1);
        assert_eq!(chain.range(Offset(9), Offset(10)).len(), 2);
        assert_eq!(chain.range(Offset(12), Offset(20)).len(), 0);
    }

    #[test]
    fn an_object_that_leads_nowhere_is_passed_over_although_it_is_larger() {
        let objects = vec![entry(1, 0, 9), entry(1, 10, 19), entry(1, 10, 24), entry(1, 20, 29), entry(1, 30, 31)];
        let chain = assemble(vec![row(1, None, objects)]);
        assert_eq!((ranges(&chain), holes(&chain)), (vec![(0, 9), (10, 19), (20, 29), (30, 31)], vec![]));
    }

    #[test]
    fn a_missing_object_is_a_hole_after_which_the_row_goes_on() {
        let chain = assemble(vec![row(1, None, vec![entry(1, 0, 4), entry(1, 7, 9), entry(1, 10, 12)])]);
        assert_eq!((ranges(&chain), holes(&chain)), (vec![(0, 4), (7, 9), (10, 12)], vec![(1, 5, 7)]));
        assert_eq!(chain.unbroken(Offset(0), Offset(4)).map(<[LogEntry]>::len), Some(1));
        assert_eq!(chain.unbroken(Offset(8), Offset(11)).map(<[LogEntry]>::len), Some(2));
        for (first, last) in [(0, 5), (4, 7), (5, 6), (6, 9), (8, 13)] {
            assert_eq!(chain.unbroken(Offset(first), Offset(last)), None, "{first} to {last}");
        }
        assert_eq!(chain.piece_start(Offset(3)), Some(Offset(0)));
        assert_eq!(chain.piece_start(Offset(5)), None);
        assert_eq!(chain.piece_start(Offset(11)), Some(Offset(7)));
        assert_eq!(ranges(&chain.before_loss()), [(0, 4)]);
    }

    #[test]
    fn a_fork_takes_its_parent_up_to_the_fork_only() {
        let parent = vec![entry(1, 0, 4), entry(1, 5, 9), entry(1, 10, 14)];
        let chain = assemble(vec![row(1, Some(9), parent.clone()), row(2, None, vec![entry(2, 10, 12)])]);
        assert_eq!(ranges(&chain), [(0, 4), (5, 9), (10, 12)]);
        let inside =
            assemble(vec![row(1, Some(7), vec![entry(1, 0, 4), entry(1, 5, 20)]), row(2, None, vec![entry(2, 8, 12)])]);
        assert_eq!((ranges(&inside), holes(&inside)), (vec![(0, 4), (5, 7), (8, 12)], vec![]));
        let broken = assemble(vec![row(1, Some(9), vec![entry(1, 0, 4)]), row(2, None, vec![entry(2, 10, 12)])]);
        assert_eq!((ranges(&broken), holes(&broken)), (vec![(0, 4), (10, 12)], vec![(1, 5, 10)]));
    }
}
