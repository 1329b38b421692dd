//! What a set of restore points needs: the proof that a restore of each can be done, and the objects it would read.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use jiff::Timestamp;
use object_store::path::Path as Key;

use crate::ids::{Identity, Offset, RestorePointId, TimelineId};
use crate::repository::chain::{LogChain, LogEntry};
use crate::repository::log_object::{LogHeader, check_name};
use crate::repository::manifest::{DatabasePoint, RestorePoint, SnapshotManifest, Timeline};
use crate::repository::proof::Proof;
use crate::repository::timeline::{ChainChoice, ancestry};
use crate::repository::{Repository, RepositoryError, paths};
use crate::restore::RestoreError;
use crate::restore::plan::start_of_link;

/// Headers that are read at once.
const READ_AHEAD: usize = 8;

/// Every object of a repository, with its size.
pub type Listing = BTreeMap<Key, u64>;

/// What is needed, and what cannot be restored although it is kept.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Needs {
    pub objects: BTreeSet<Key>,
    pub problems: Vec<String>,
}

/// Transactions of one timeline, both ends included.
type Ranges = HashMap<TimelineId, Vec<(Offset, Offset)>>;

/// Finds out what `kept` restore points need, and every moment since `window_start`.
///
/// # Errors
/// When the store fails.
pub async fn find(
    repository: &Repository,
    listing: &Listing,
    kept: &[RestorePoint],
    window_start: Option<Timestamp>,
) -> Result<Needs, RepositoryError> {
    let newest = kept.last().cloned();
    find_with(repository, listing, kept, Some(&Tails { newest, window_start })).await
}

/// As [`find`], for one restore point alone: nothing else need be whole.
///
/// # Errors
/// When the store fails.
pub async fn find_of_one(
    repository: &Repository,
    listing: &Listing,
    point: &RestorePoint,
) -> Result<Needs, RepositoryError> {
    find_with(repository, listing, std::slice::from_ref(point), None).await
}

/// What is needed beside restore points: the ends of current timelines, and what is of the window.
struct Tails {
    newest: Option<RestorePoint>,
    window_start: Option<Timestamp>,
}

async fn find_with(
    repository: &Repository,
    listing: &Listing,
    kept: &[RestorePoint],
    tails: Option<&Tails>,
) -> Result<Needs, RepositoryError> {
    let mut needs = Needs::default();
    for point in kept {
        needs.objects.insert(paths::restore_point(point.id));
        let instance = paths::instance(point.instance);
        if !listing.contains_key(&instance) {
            needs.problems.push(format!("restore point {}: its instance capture {instance} is missing", point.id));
        }
        needs.objects.insert(instance);
    }
    let mut seen = HashSet::new();
    for database in repository.databases().await? {
        let is_of_point = |point: &RestorePoint| point.databases.iter().any(|found| found.identity == database);
        if tails.is_none() && !kept.iter().any(is_of_point) {
            continue;
        }
        let timelines = repository.timelines(&database).await?;
        seen.extend(timelines.iter().map(|timeline| (database, timeline.timeline)));
        let points: Vec<Promised<'_>> = kept
            .iter()
            .flat_map(|point| point.databases.iter().map(move |found| Promised { id: point.id, point: found }))
            .filter(|promised| promised.point.identity == database)
            .collect();
        let mut look =
            Look { repository, listing, database, timelines: &timelines, needs: &mut needs, ranges: Ranges::new() };
        look.database(&points, tails).await?;
    }
    if tails.is_some() {
        // What a listing by folders leaves out would look as if nothing needed it.
        let told: HashSet<_> = listing.keys().filter_map(paths::parse_timeline).collect();
        for (database, timeline) in told.into_iter().filter(|found| !seen.contains(found)) {
            needs.problems.push(format!(
                "the store lists objects of timeline {timeline} of database {database}, and not its folder: its listings contradict each other"
            ));
        }
    }
    // What is looked at is what is there; what is promised may be gone with its whole folder.
    for point in kept {
        for database in point.databases.iter().filter(|found| !seen.contains(&(found.identity, found.timeline))) {
            let (name, timeline) = (&database.name, database.timeline);
            needs
                .problems
                .push(format!("restore point {}: timeline {timeline} of database {name} is missing", point.id));
        }
    }
    Ok(needs)
}

/// A database of a kept restore point.
#[derive(Clone, Copy)]
struct Promised<'a> {
    id: RestorePointId,
    point: &'a DatabasePoint,
}

struct Look<'a> {
    repository: &'a Repository,
    listing: &'a Listing,
    database: Identity,
    timelines: &'a [Timeline],
    needs: &'a mut Needs,
    ranges: Ranges,
}

/// One timeline with the history that leads to it.
struct Line {
    timeline: TimelineId,
    ancestry: Vec<(Timeline, Option<Offset>)>,
    chain: LogChain,
    /// Newest first.
    snapshots: Vec<(Offset, TimelineId)>,
}

impl Look<'_> {
    async fn database(&mut self, points: &[Promised<'_>], tails: Option<&Tails>) -> Result<(), RepositoryError> {
        let current = self.timelines.last().map(|timeline| timeline.timeline);
        let mut lines = Vec::new();
        for timeline in self.timelines {
            let line = self.line(timeline.timeline).await?;
            for promised in points.iter().filter(|promised| promised.point.timeline == line.timeline) {
                if !self.reach(&line, promised.point.offset).await? {
                    self.unreachable(promised);
                }
            }
            if let Some(tails) = tails {
                let is_newest = Some(line.timeline) == current;
                let is_current = is_newest && self.is_current(&line, timeline, tails.newest.as_ref()).await?;
                if is_current || self.is_recent(&line, tails.window_start).await? {
                    self.tail(&line, points, tails.window_start).await?;
                }
            }
            lines.push(line);
        }
        for line in &lines {
            let mut problems = self.prove(line, points).await?;
            if !problems.is_empty() {
                // Two histories were written to one timeline: a restore takes the one that leads on.
                let line = self.line_by(line.timeline, true).await?;
                problems = self.prove(&line, points).await?;
            }
            self.needs.problems.extend(problems);
        }
        self.collect();
        Ok(())
    }

    /// A database that no restore point knows yet, or none knows any more, is current while it is written to.
    async fn is_current(
        &self,
        line: &Line,
        timeline: &Timeline,
        newest: Option<&RestorePoint>,
    ) -> Result<bool, RepositoryError> {
        let Some(newest) = newest else { return Ok(true) };
        let is_held = newest.databases.iter().any(|found| found.identity == self.database);
        Ok(is_held || timeline.created_at >= newest.created_at || self.is_recent(line, Some(newest.created_at)).await?)
    }

    fn unreachable(&mut self, promised: &Promised<'_>) {
        let (id, point) = (promised.id, promised.point);
        self.needs.problems.push(format!(
            "restore point {id}: transaction {} of database {} cannot be reached on timeline {}",
            point.offset, point.name, point.timeline
        ));
    }

    /// Reads the headers of a timeline's own objects that are needed: each must be as long as it says and continue the one
    /// before, and hold what restore points promised. Returns what does not.
    async fn prove(&self, line: &Line, points: &[Promised<'_>]) -> Result<Vec<String>, RepositoryError> {
        let mut before: Option<(LogEntry, LogHeader)> = None;
        let mut promised: Vec<_> =
            points.iter().filter(|promised| promised.point.timeline == line.timeline).copied().collect();
        let mut problems = Vec::new();
        let needed = self.needed_of(line);
        for some in needed.chunks(READ_AHEAD) {
            let requests: Vec<_> = some.iter().map(|entry| header_of(self.repository.clone(), entry.key())).collect();
            for (header, entry) in futures::future::join_all(requests).await.into_iter().zip(some) {
                match header {
                    Ok(header) => {
                        problems.extend(self.wrong_with(&header, entry, before.as_ref()));
                        promised
                            .retain(|promised| !header.place_after(promised.point.offset).is(&promised.point.place()));
                        before = Some((entry.clone(), header));
                    }
                    Err(error) if error.is_damage() => {
                        problems.push(format!("log that is kept cannot be read: {error}"));
                        before = None;
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        for promised in promised {
            let proof = match self.repository.prove(promised.point, &line.chain).await {
                Ok(proof) => proof,
                // Found above, or in what is not needed.
                Err(error) if error.is_damage() => continue,
                Err(error) => return Err(error),
            };
            let held = line.chain.unbroken(promised.point.offset, promised.point.offset).is_some();
            if held && proof == Proof::Differs {
                let (id, name) = (promised.id, &promised.point.name);
                problems.push(format!("restore point {id}: the log of database {name} holds another history"));
            }
        }
        Ok(problems)
    }

    /// A timeline's own objects that are needed.
    fn needed_of(&self, line: &Line) -> Vec<LogEntry> {
        let ranges = self.ranges.get(&line.timeline).map_or(&[][..], Vec::as_slice);
        let is_needed = |entry: &&LogEntry| {
            entry.timeline == line.timeline && ranges.iter().any(|(from, to)| entry.first <= *to && *from <= entry.last)
        };
        line.chain.entries.iter().filter(is_needed).cloned().collect()
    }

    fn wrong_with(&self, header: &LogHeader, entry: &LogEntry, before: Option<&(LogEntry, LogHeader)>) -> Vec<String> {
        let mut problems = Vec::new();
        let is_named = check_name(&entry.key(), header).is_ok();
        if !is_named || header.object_len() != entry.size || header.database != self.database {
            problems.push(format!("{} is not what its header says", entry.key()));
        }
        if before.is_some_and(|(before, other)| header.contradicts(entry, other, before)) {
            problems.push(format!("{} does not continue the object before it", entry.key()));
        }
        problems
    }

    async fn line(&self, timeline: TimelineId) -> Result<Line, RepositoryError> {
        self.line_by(timeline, false).await
    }

    /// As [`Self::line`], with the choice of [`ChainChoice::every_joint`].
    async fn line_by(&self, timeline: TimelineId, every_joint: bool) -> Result<Line, RepositoryError> {
        let ancestry = ancestry(self.timelines, timeline);
        let choice = ChainChoice { every_joint, ..ChainChoice::default() };
        let chain = self.repository.log_chain_by(&self.database, self.timelines, timeline, &choice).await?;
        let mut snapshots = Vec::new();
        for (ancestor, until) in &ancestry {
            let folder = paths::snapshots(&self.database, ancestor.timeline);
            let found = self.listing.keys().filter(|key| key.prefix_matches(&folder)).filter_map(paths::parse_snapshot);
            let counts = |offset: &Offset| until.is_none_or(|until| *offset <= until);
            snapshots.extend(found.filter(counts).map(|offset| (offset, ancestor.timeline)));
        }
        snapshots.sort_by_key(|(offset, _)| std::cmp::Reverse(*offset));
        Ok(Line { timeline, ancestry, chain, snapshots })
    }

    /// Needs what a restore to `offset` reads. Returns whether it can be done.
    async fn reach(&mut self, line: &Line, offset: Offset) -> Result<bool, RepositoryError> {
        let Some(from) = self.base(line, offset).await? else { return Ok(false) };
        self.need(line, from, offset);
        Ok(true)
    }

    /// Where the log begins that a restore to `offset` reads; the snapshot before it is needed.
    async fn base(&mut self, line: &Line, offset: Offset) -> Result<Option<Offset>, RepositoryError> {
        for (at, timeline) in line.snapshots.iter().filter(|(at, _)| *at <= offset) {
            if line.chain.unbroken(*at, offset).is_none() {
                break;
            }
            if self.need_snapshot(line, *timeline, *at).await? {
                return start_of_link(self.repository, &line.chain, *at).await.map(Some).or_else(store_error);
            }
        }
        Ok(line.chain.unbroken(Offset(0), offset).map(|_| Offset(0)))
    }

    /// Needs a snapshot with all that it names. Returns whether it is whole, and of this history.
    async fn need_snapshot(
        &mut self,
        line: &Line,
        timeline: TimelineId,
        offset: Offset,
    ) -> Result<bool, RepositoryError> {
        let key = paths::snapshot(&self.database, timeline, offset);
        if self.needs.objects.contains(&key) {
            return Ok(true);
        }
        let manifest: SnapshotManifest = match self.repository.snapshot(&self.database, timeline, offset).await {
            Ok(manifest) => manifest,
            Err(error) if error.is_damage() => return Ok(false),
            Err(error) => return Err(error),
        };
        let until = line.ancestry.iter().find(|(found, _)| found.timeline == timeline).and_then(|(_, until)| *until);
        // A restore does not use it, so the log before it is needed.
        if self.repository.is_of_history(&manifest, self.timelines, &line.chain, until).await? == Some(false) {
            return Ok(false);
        }
        let packs = manifest.packs.iter().map(|used| (paths::pack(&self.database, used.pack), used.stored_bytes));
        let packs: Vec<(Key, u64)> = packs.collect();
        // A name alone proves nothing: a pack that was cut off is no pack.
        if packs.iter().any(|(pack, stored)| self.listing.get(pack) != Some(stored)) {
            return Ok(false);
        }
        self.needs.objects.extend(packs.into_iter().map(|(pack, _)| pack));
        self.needs.objects.insert(key);
        Ok(true)
    }

    fn need(&mut self, line: &Line, from: Offset, to: Offset) {
        for (timeline, until) in &line.ancestry {
            let to = until.map_or(to, |until| until.min(to));
            if from <= to {
                self.ranges.entry(timeline.timeline).or_default().push((from, to));
            }
        }
    }

    /// Was it written to since the window began?
    async fn is_recent(&self, line: &Line, window_start: Option<Timestamp>) -> Result<bool, RepositoryError> {
        let Some(start) = window_start else { return Ok(false) };
        let own = line.chain.entries.iter().rev().find(|entry| entry.timeline == line.timeline);
        let Some(entry) = own else { return Ok(false) };
        match self.repository.log_header(&entry.key()).await {
            Ok(header) => Ok(header.archived_at >= start.as_microsecond()),
            // What cannot be read is not what to take away.
            Err(error) if error.is_damage() => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Needs everything from the start of the window, or the newest kept restore point, to the end.
    async fn tail(
        &mut self,
        line: &Line,
        points: &[Promised<'_>],
        window_start: Option<Timestamp>,
    ) -> Result<(), RepositoryError> {
        let Some(end) = line.chain.last() else { return Ok(()) };
        let on_line = |point: &DatabasePoint| {
            let counts = |(ancestor, until): &(Timeline, Option<Offset>)| {
                ancestor.timeline == point.timeline && until.is_none_or(|until| point.offset <= until)
            };
            line.ancestry.iter().any(counts)
        };
        let newest =
            points.iter().map(|promised| promised.point).filter(|point| on_line(point)).map(|point| point.offset).max();
        let first = line.chain.first().unwrap_or(Offset(0));
        let from = match window_start {
            Some(start) => self.before_window(line, start).await?.unwrap_or(first),
            None => newest.unwrap_or(first),
        };
        // Never more than the newest restore point leaves.
        let from = newest.map_or(from, |newest| newest.min(from));
        let base = match self.base(line, from).await? {
            Some(base) => base,
            None => line.chain.piece_start(from).unwrap_or(from),
        };
        self.need(line, base, end);
        for (offset, timeline) in &line.snapshots {
            if *offset >= base {
                self.need_snapshot(line, *timeline, *offset).await?;
            }
        }
        Ok(())
    }

    /// A transaction at or before the last one of before the window; `None` when all are of the window. Told by headers alone:
    /// the bodies of a sealed repository cannot be read here.
    async fn before_window(&self, line: &Line, start: Timestamp) -> Result<Option<Offset>, RepositoryError> {
        let entries = &line.chain.entries;
        let (mut within, mut later) = (0, entries.len());
        while within < later {
            let middle = within + (later - within) / 2;
            let Some(entry) = entries.get(middle) else { break };
            let is_later = match self.repository.log_header(&entry.key()).await {
                Ok(header) => header.max_time_until(entry.last).is_some_and(|max| max > start.as_microsecond()),
                // What cannot be read is kept, and all after it.
                Err(error) if error.is_damage() => true,
                Err(error) => return Err(error),
            };
            if is_later {
                later = middle;
            } else {
                within = middle + 1;
            }
        }
        Ok(within.checked_sub(1).and_then(|before| entries.get(before)).map(|entry| entry.last))
    }

    /// The log objects that hold any transaction that is needed, of every level.
    fn collect(&mut self) {
        let is_needed = |key: &&Key, ranges: &[(Offset, Offset)]| {
            paths::parse_log(key)
                .is_some_and(|(first, last)| ranges.iter().any(|(from, to)| first <= *to && *from <= last))
        };
        for (timeline, ranges) in &self.ranges {
            let folder = paths::logs(&self.database, *timeline);
            let objects = self.listing.keys().filter(|key| key.prefix_matches(&folder));
            self.needs.objects.extend(objects.filter(|key| is_needed(key, ranges)).cloned());
        }
    }
}

pub(crate) async fn header_of(repository: Repository, key: Key) -> Result<LogHeader, RepositoryError> {
    repository.log_header(&key).await
}

/// What is damaged cannot be needed; a store that fails ends the look.
fn store_error<T>(error: RestoreError) -> Result<Option<T>, RepositoryError> {
    match error {
        RestoreError::Repository(error) if !error.is_damage() => Err(error),
        _ => Ok(None),
    }
}
