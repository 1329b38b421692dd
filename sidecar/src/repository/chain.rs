//! The sequence of log objects that leads to a place on a timeline, put together from their names.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use object_store::path::Path as Key;

use crate::ids::{Identity, Offset, TimelineId};
use crate::repository::log_object::HEADER_READ;
use crate::repository::paths;

/// One log object as its name tells. A log can have a million, so they share the text of their folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    folder: Arc<Key>,
    pub timeline: TimelineId,
    /// 0 as archived, higher after compaction.
    pub level: u8,
    /// The first transaction that counts: where a chain enters the object. Its name may say an earlier one.
    pub first: Offset,
    /// The last transaction that counts: where a chain leaves the object. Its name may say a later one.
    pub last: Offset,
    /// What the name says.
    named: (Offset, Offset),
    /// Bytes as stored.
    pub size: u64,
}

/// Objects up to this size are read in one request.
const READ_WHOLE: u64 = 6 << 20;

impl LogEntry {
    pub fn new(database: &Identity, timeline: TimelineId, level: u8, first: Offset, last: Offset, size: u64) -> Self {
        let folder = Arc::new(paths::log_folder(database, timeline, level));
        Self { folder, timeline, level, first, last, named: (first, last), size }
    }

    /// What the name of a log object tells; `None` for the name of anything else.
    pub fn parse(key: &Key, timeline: TimelineId, size: u64) -> Option<Self> {
        Self::beside(None, key, timeline, size)
    }

    /// As [`Self::parse`], where only the name is known, and not the size.
    pub fn of_key(key: &Key) -> Option<Self> {
        Self::parse(key, paths::parse_log_timeline(key)?, 0)
    }

    /// Shares the folder of `other` if it is the same.
    pub(super) fn beside(other: Option<&Self>, key: &Key, timeline: TimelineId, size: u64) -> Option<Self> {
        let ((first, last), level) = (paths::parse_log(key)?, paths::parse_log_level(key)?);
        let (folder, _) = key.as_ref().rsplit_once('/')?;
        let folder = match other.filter(|other| other.folder.as_ref().as_ref() == folder) {
            Some(other) => Arc::clone(&other.folder),
            None => Arc::new(Key::parse(folder).ok()?),
        };
        Some(Self { folder, timeline, level, first, last, named: (first, last), size })
    }

    pub fn key(&self) -> Key {
        self.folder.as_ref().clone().join(paths::log_name(self.named.0, self.named.1))
    }

    /// Returns true if all transactions of the object count.
    pub fn is_whole(&self) -> bool {
        self.named == (self.first, self.last)
    }

    /// Returns true if both are the same object, whatever of it counts.
    pub(super) fn is_of(&self, other: &Self) -> bool {
        (self.timeline, self.level, self.named) == (other.timeline, other.level, other.named)
    }

    /// The object with all its transactions.
    pub fn whole(&self) -> Self {
        Self { first: self.named.0, last: self.named.1, ..self.clone() }
    }

    /// The object, of which only the transactions from `first` to `last` count.
    pub fn within(&self, first: Offset, last: Offset) -> Self {
        Self { first: self.first.max(first), last: self.last.min(last), ..self.clone() }
    }

    /// Bytes that opening it reads.
    pub fn size_to_open(&self) -> u64 {
        if self.is_read_whole() { self.size } else { HEADER_READ }
    }

    pub(super) fn is_read_whole(&self) -> bool {
        self.size <= READ_WHOLE
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

    /// The chain that reaches `offset` through `entries`, whatever other objects hold the same transactions.
    pub fn through(&self, entries: &[LogEntry], offset: Offset) -> Self {
        let Some(first) = entries.first().map(|entry| entry.first) else { return self.clone() };
        let mut all: Vec<_> = self.entries.iter().filter(|before| before.first < first).cloned().collect();
        if let Some(last) = all.last_mut() {
            last.last = last.last.min(Offset(first.0.saturating_sub(1)));
        }
        all.extend(entries.iter().map(|entry| entry.within(entry.first, offset)));
        let holes = self.holes.iter().filter(|hole| hole.missing < first).copied();
        Self { entries: all, holes: holes.map(|hole| Hole { found: hole.found.min(first), ..hole }).collect() }
    }

    /// The objects that hold any transaction from `first` to `last`, both included.
    pub fn range(&self, first: Offset, last: Offset) -> &[LogEntry] {
        let start = self.entries.partition_point(|entry| entry.last < first);
        let end = self.entries.partition_point(|entry| entry.first <= last);
        self.entries.get(start..end).unwrap_or_default()
    }
}

/// The objects of one timeline.
pub(super) struct Row {
    pub timeline: TimelineId,
    pub start: Offset,
    /// The last offset that is taken of it.
    pub until: Option<Offset>,
    pub entries: Vec<LogEntry>,
}

/// Puts the objects of a line of timelines into one sequence, oldest timeline first.
///
/// Of the objects that start where the sequence stands, the one is taken from which it reaches furthest through objects that
/// adjoin each other, and of these the largest: so what compaction made is preferred to its inputs, and an object that a writer
/// without the lease cut otherwise is avoided. Where no object starts, one that holds the next transaction inside is used: the
/// sequence leaves the objects before it where that one starts. Readers prove that both hold the same history there. Where no
/// object holds the next transaction, the sequence continues after a hole.
pub(super) fn assemble(rows: Vec<Row>) -> LogChain {
    let mut chain = LogChain::default();
    let mut next: Option<Offset> = None;
    for row in rows {
        let at = next.unwrap_or(row.start);
        next = Some(assemble_one(&mut chain, row, at));
    }
    chain
}

/// Appends the objects of one timeline to the chain, from `at` on. Returns where the chain then stands.
fn assemble_one(chain: &mut LogChain, row: Row, mut at: Offset) -> Offset {
    let Row { timeline, until, mut entries, .. } = row;
    entries.sort_by_key(|entry| Reverse(entry.first));
    let mut candidates = Candidates { ahead: furthest(&entries), behind: BinaryHeap::new() };
    let (begin, own) = (at, chain.entries.len());
    let is_ours = |offset: Offset| until.is_none_or(|until| offset <= until);
    while is_ours(at)
        && let Some(candidate) = candidates.next(at).filter(|candidate| is_ours(candidate.first))
        && let Some(entry) = entries.get(candidate.index)
    {
        if candidate.first > at {
            chain.holes.push(Hole { timeline, missing: at, found: candidate.first, removed: false });
        } else if candidate.first < at {
            leave_before(chain, own, candidate.first);
        }
        at = Offset(entry.last.0.saturating_add(1));
        chain.entries.push(entry.within(begin, until.unwrap_or(entry.last)));
    }
    if let Some(until) = until {
        let found = Offset(until.0.saturating_add(1));
        if at < found {
            chain.holes.push(Hole { timeline, missing: at, found, removed: false });
        }
        at = found;
    }
    at
}

/// Leaves the objects of a timeline, those from index `own` on, before transaction `first`.
fn leave_before(chain: &mut LogChain, own: usize, first: Offset) {
    while chain.entries.len() > own && chain.entries.last().is_some_and(|entry| entry.first >= first) {
        chain.entries.pop();
    }
    if chain.entries.len() > own
        && let Some(entry) = chain.entries.last_mut()
        && entry.last >= first
    {
        entry.last = Offset(first.0.saturating_sub(1));
    }
}

/// The object to take of those that start at one offset. Ordered by how far the chain reaches from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    reach: Offset,
    last: Offset,
    first: Offset,
    /// Its place among the objects.
    index: usize,
}

struct Candidates {
    /// Those not looked at yet; the one that starts first is the last.
    ahead: Vec<Candidate>,
    /// Those that start before where the chain stands.
    behind: BinaryHeap<Candidate>,
}

impl Candidates {
    /// The object that continues the chain at `at`: one that starts there, else one that holds it, else the next after it.
    fn next(&mut self, at: Offset) -> Option<Candidate> {
        while let Some(candidate) = self.ahead.pop_if(|candidate| candidate.first < at) {
            self.behind.push(candidate);
        }
        if self.ahead.last().is_some_and(|candidate| candidate.first == at) {
            return self.ahead.pop();
        }
        while let Some(candidate) = self.behind.pop() {
            if candidate.last >= at {
                return Some(candidate);
            }
        }
        self.ahead.pop()
    }
}

/// For every offset that objects start at, the one to take. From the end on, as `entries` are, so that what follows an object
/// is known when it is looked at.
fn furthest(entries: &[LogEntry]) -> Vec<Candidate> {
    let mut best: Vec<Candidate> = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let (first, last, next) = (entry.first, entry.last, Offset(entry.last.0.saturating_add(1)));
        let following = best.binary_search_by(|found| next.cmp(&found.first)).ok().map(|at| best[at].reach);
        let candidate = Candidate { reach: following.map_or(last, |reach| reach.max(last)), last, first, index };
        match best.last_mut().filter(|other| other.first == first) {
            Some(other) if (other.reach, other.last) >= (candidate.reach, last) => {}
            Some(other) => *other = candidate,
            None => best.push(candidate),
        }
    }
    best
}

/// The chain that names alone make of the first timeline's objects.
#[cfg(test)]
pub(crate) fn test_chain(entries: Vec<LogEntry>) -> LogChain {
    assemble(vec![Row { timeline: TimelineId::FIRST, start: Offset(0), until: None, entries }])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(timeline: u32, first: u64, last: u64) -> LogEntry {
        LogEntry::new(&Identity([1; 32]), TimelineId(timeline), 0, Offset(first), Offset(last), 1)
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
    fn an_object_that_leads_nowhere_is_avoided_although_it_is_larger() {
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

    #[test]
    fn a_log_object_has_the_name_it_was_listed_under() {
        for name in ["L0", "L2", "elsewhere/%25/L1"] {
            let text = format!("databases/{name}/00000000000000000005-00000000000000000020.iulog");
            let key = Key::parse(&text).unwrap();
            let mut entry = LogEntry::parse(&key, TimelineId::FIRST, 1).unwrap();
            assert_eq!((entry.key().as_ref(), entry.first, entry.last), (text.as_str(), Offset(5), Offset(20)));
            // A chain that leaves the timeline inside of it.
            entry.last = Offset(9);
            assert_eq!(entry.key(), key);
        }
        assert_eq!(LogEntry::parse(&Key::from("log/L0/5-20.iulog"), TimelineId::FIRST, 1), None);
        assert_eq!(
            LogEntry::parse(&Key::from("log/00000000000000000005-00000000000000000020.iulog"), TimelineId::FIRST, 1),
            None
        );
    }

    /// How far adjoining objects lead from `at` on; `at` itself less one where none starts.
    fn reach(objects: &[LogEntry], at: u64) -> u64 {
        let here = objects.iter().filter(|object| object.first.0 == at);
        here.map(|object| reach(objects, object.last.0 + 1).max(object.last.0)).max().unwrap_or(at.saturating_sub(1))
    }

    /// Every transaction that any object holds is in the chain once, and every other one up to `until` in a hole.
    fn check(objects: &[LogEntry], until: u64, chain: &LogChain) {
        let held = |offset: u64| objects.iter().any(|object| object.first.0 <= offset && offset <= object.last.0);
        let mut owners = vec![0; until as usize + 1];
        for entry in &chain.entries {
            assert!(entry.named.0 <= entry.first && entry.first <= entry.last && entry.last <= entry.named.1);
            assert!(objects.iter().any(|object| object.named == entry.named), "no such object");
            (entry.first.0..=entry.last.0).for_each(|offset| owners[offset as usize] += 1);
        }
        assert!(chain.entries.is_sorted_by_key(|entry| entry.first));
        for offset in 0..=until {
            assert_eq!(owners[offset as usize], u32::from(held(offset)), "transaction {offset}");
            assert_eq!(
                chain.holes.iter().any(|hole| hole.holds(Offset(offset))),
                !held(offset),
                "transaction {offset}"
            );
        }
        // Where adjoining objects lead to the end, nothing is cut.
        let from_start = reach(objects, 0);
        let cut = chain.entries.iter().find(|entry| !entry.is_whole() && entry.last.0 < until);
        assert!(cut.is_none_or(|entry| entry.last.0 > from_start || from_start < until), "{cut:?} is cut");
    }

    #[test]
    fn every_transaction_that_is_stored_is_in_the_chain() {
        let mut state = 20_261_125_u64;
        let mut draw = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let (mut with_holes, mut with_cuts) = (0, 0);
        for _ in 0..6000 {
            let (count, span) = (draw(14), 4 + draw(20));
            let object = |draw: &mut dyn FnMut(u64) -> u64| {
                let first = draw(span);
                entry(1, first, first + draw(6))
            };
            let objects: Vec<_> = (0..count).map(|_| object(&mut draw)).collect();
            let until = draw(span + 6);
            let chain = assemble(vec![Row {
                timeline: TimelineId(1),
                start: Offset(0),
                until: Some(Offset(until)),
                entries: objects.clone(),
            }]);
            check(&objects, until, &chain);
            with_holes += usize::from(!chain.holes.is_empty());
            with_cuts += usize::from(chain.entries.iter().any(|entry| !entry.is_whole()));
        }
        assert!((400..6000).contains(&with_holes) && with_cuts > 400, "{with_holes} with holes, {with_cuts} with cuts");
    }

    #[test]
    fn merged_objects_that_overlap_leave_no_hole() {
        let objects = vec![entry(1, 0, 149), entry(1, 100, 300)];
        let chain = assemble(vec![row(1, None, objects)]);
        assert_eq!((ranges(&chain), holes(&chain)), (vec![(0, 99), (100, 300)], vec![]));
        // An object that starts where no other ends is entered all the same.
        let chain = assemble(vec![row(1, None, vec![entry(1, 0, 99), entry(1, 100, 200), entry(1, 150, 260)])]);
        assert_eq!((ranges(&chain), holes(&chain)), (vec![(0, 99), (100, 149), (150, 260)], vec![]));
    }

    #[test]
    fn a_chain_through_an_object_ends_at_the_offset() {
        let chain = assemble(vec![row(1, None, vec![entry(1, 0, 99), entry(1, 100, 200), entry(1, 201, 260)])]);
        let through = chain.through(&[entry(1, 50, 149)], Offset(120));
        assert_eq!((ranges(&through), holes(&through)), (vec![(0, 49), (50, 120)], vec![]));
    }
}
