//! Verify: reads what the repository holds, checks every byte of it, and says what is wrong, what that costs, and what to do.
//!
//! Nothing is written, except by `repair`. A finding never stops the walk: everything that can be checked is.

mod losses;
mod objects;
pub mod repair;
mod sweep;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use futures::StreamExt;
use object_store::path::Path as Key;
use serde::Serialize;

use crate::ids::{ContentHash, Identity, Offset, RestorePointId, TimelineId};
use crate::progress::Progress;
use crate::repository::chain::{LogChain, LogEntry};
use crate::repository::crypto::CryptoError;
use crate::repository::log_object::LogHeader;
use crate::repository::manifest::{DatabasePoint, RestorePoint, Timeline};
use crate::repository::proof::Proof;
use crate::repository::timeline::{ChainChoice, ancestry};
use crate::repository::{Repository, RepositoryError, paths};
use crate::restore::plan::describe;
use crate::verify::objects::{Draw, read_log};

/// Log objects that are read and checked at once.
const AHEAD: usize = 2;

/// What to verify.
#[derive(Debug, Clone)]
pub struct VerifyOptions {
    /// Restore points and what they need; empty for the whole repository.
    pub restore_points: Vec<RestorePointId>,
    /// The share of objects whose bodies are read, in percent. Of the others, presence, size and log headers are checked.
    pub read_data: u8,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self { restore_points: Vec::new(), read_data: 100 }
    }
}

/// The report of a verify. Field names are stable.
#[derive(Debug, Clone, Serialize, Default, schemars::JsonSchema)]
pub struct VerifyReport {
    pub restore_points: Vec<RestorePointId>,
    /// Objects read.
    pub objects: u64,
    /// Their stored bytes.
    pub bytes: u64,
    /// The share of objects whose bodies were read, in percent.
    pub read_data: u8,
    pub findings: Vec<Finding>,
    /// Transactions that can no longer be restored, and that nobody removed on purpose.
    pub lost: Vec<Lost>,
    /// What `--repair` has written anew.
    pub repaired: Vec<String>,
    /// Objects that nothing refers to: what broken-off backups left. They do no harm, and `prune` takes them away.
    pub orphans: Vec<String>,
}

impl VerifyReport {
    /// Was nothing found that is wrong? That bodies could not be opened for want of a key is no damage.
    pub fn is_sound(&self) -> bool {
        self.findings.iter().all(|finding| finding.severity < Severity::Error)
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, Serialize, PartialEq, Eq, schemars::JsonSchema)]
pub struct Finding {
    pub severity: Severity,
    pub kind: FindingKind,
    pub object: String,
    pub message: String,
    pub fix: String,
}

#[derive(Debug, Clone, Copy, Serialize, PartialEq, Eq, PartialOrd, Ord, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Something could not be checked.
    Warning,
    /// Something can no longer be restored.
    Error,
}

#[derive(Debug, Clone, Copy, Serialize, PartialEq, Eq, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FindingKind {
    Missing,
    Damaged,
    Gap,
    BrokenChain,
    NotReadable,
}

/// Transactions of one database that cannot be restored, both ends included.
#[derive(Debug, Clone, Serialize, PartialEq, Eq, schemars::JsonSchema)]
pub struct Lost {
    pub database: Identity,
    pub name: String,
    pub timeline: TimelineId,
    pub first: Offset,
    pub last: Offset,
}

struct Walk<'a> {
    repository: &'a Repository,
    progress: Arc<dyn Progress>,
    report: VerifyReport,
    draw: Draw,
    /// Objects that something refers to.
    used: HashSet<Key>,
    /// Manifests and instance captures looked at already; restore points share most of what they name.
    seen: HashSet<Key>,
    /// Log objects that compaction or retention took away after they were listed.
    moved: HashSet<Key>,
    /// Was it said that bodies cannot be opened?
    told_of_keys: bool,
    /// Captures that are missing, damaged or cannot be opened.
    bad_instances: HashSet<ContentHash>,
    /// Log objects looked at already, and whether they are whole. Their headers are not kept: those of a year's flushes would not
    /// fit into memory.
    logs: HashMap<Key, bool>,
    /// Restore points' places that a header was seen to hold.
    proved: HashSet<(TimelineId, Offset, ContentHash)>,
    /// Packs looked at already: the entries of those that are whole, `None` in it where the body was not read.
    packs: HashMap<Key, Option<Option<HashSet<ContentHash>>>>,
    /// The sizes of a database's packs.
    pack_sizes: HashMap<Key, u64>,
}

/// The log of one timeline, and what of it is looked at.
struct OfLog<'a> {
    database: Identity,
    name: &'a str,
    points: &'a [&'a DatabasePoint],
    /// Of single restore points, what comes later does not matter.
    until: Option<Offset>,
}

impl OfLog<'_> {
    fn counts(&self, first: Offset) -> bool {
        self.until.is_none_or(|until| first <= until)
    }
}

/// A log object that was checked. Its header is read again where it is needed: objects of timelines that share a history are many.
struct Checked {
    entry: LogEntry,
    header: Option<Arc<LogHeader>>,
}

/// Verifies the given restore points, or the whole repository.
///
/// # Errors
/// Only when the store cannot be reached; damage is a finding.
pub async fn verify(
    repository: &Repository,
    options: &VerifyOptions,
    progress: Arc<dyn Progress>,
) -> Result<VerifyReport, RepositoryError> {
    let mut walk = Walk {
        repository,
        progress,
        report: VerifyReport { read_data: options.read_data.min(100), ..VerifyReport::default() },
        draw: Draw { salt: ulid::Ulid::new().random(), percent: options.read_data },
        used: HashSet::new(),
        seen: HashSet::new(),
        moved: HashSet::new(),
        told_of_keys: false,
        bad_instances: HashSet::new(),
        logs: HashMap::new(),
        proved: HashSet::new(),
        packs: HashMap::new(),
        pack_sizes: HashMap::new(),
    };
    let whole = options.restore_points.is_empty();
    let ids = if whole { repository.restore_point_ids().await? } else { options.restore_points.clone() };
    let mut points = Vec::new();
    // What the newest need is read first: if time is short, what matters most is known first.
    for id in ids.into_iter().rev() {
        walk.report.restore_points.push(id);
        let key = paths::restore_point(id);
        walk.used.insert(key.clone());
        if let Some(point) = walk.sort_out(&key, repository.restore_point(id).await)? {
            let before = walk.report.findings.len();
            walk.instance(&point).await?;
            if walk.report.findings.iter().skip(before).any(|finding| finding.severity == Severity::Error) {
                walk.bad_instances.insert(point.instance);
            }
            points.push(point);
        }
    }
    let mut databases: BTreeMap<Identity, Vec<&DatabasePoint>> = BTreeMap::new();
    if whole {
        databases.extend(repository.databases().await?.into_iter().map(|database| (database, Vec::new())));
    }
    for database in points.iter().flat_map(|point| &point.databases) {
        databases.entry(database.identity).or_default().push(database);
    }
    for (database, promised) in databases {
        let nameless = walk.is_nameless(&points, &database);
        walk.database(database, &promised, whole, nameless).await?;
    }
    if whole {
        walk.sweep(&points).await?;
    }
    Ok(walk.report)
}

impl Walk<'_> {
    /// Without any capture that names it, a database cannot be restored whatever is left of its log.
    fn is_nameless(&self, points: &[RestorePoint], database: &Identity) -> bool {
        let is_named = |point: &&RestorePoint| point.databases.iter().any(|found| found.identity == *database);
        let mut instances = points.iter().filter(is_named).map(|point| point.instance).peekable();
        instances.peek().is_some() && instances.all(|instance| self.bad_instances.contains(&instance))
    }

    async fn database(
        &mut self,
        database: Identity,
        promised: &[&DatabasePoint],
        whole: bool,
        nameless: bool,
    ) -> Result<(), RepositoryError> {
        let name = promised.first().map_or_else(|| database.to_string(), |point| point.name.clone());
        self.progress.phase(&format!("database {name}"), None);
        self.pack_sizes = self.repository.list(&paths::packs(&database)).await?.into_iter().collect();
        let found = self.repository.timelines_and_problems(&database).await?;
        for (key, error) in found.problems {
            self.sort_out::<()>(&key, Err(error))?;
        }
        let timelines = found.timelines;
        let wanted = |timeline: &Timeline| {
            let on_line = |point: &&DatabasePoint| {
                ancestry(&timelines, point.timeline).iter().any(|(ancestor, _)| ancestor.timeline == timeline.timeline)
            };
            whole || promised.iter().any(on_line)
        };
        for point in promised {
            if !timelines.iter().any(|timeline| timeline.timeline == point.timeline) {
                let key = paths::timeline(&database, point.timeline);
                self.sort_out::<()>(&key, Err(RepositoryError::Missing { key: key.to_string() }))?;
                self.lose(point, point.timeline, Offset(0), point.offset);
            }
        }
        let mut bad = losses::Bad::default();
        for timeline in timelines.iter().filter(|timeline| wanted(timeline)) {
            self.used.insert(paths::timeline(&database, timeline.timeline));
            let points: Vec<_> = promised.iter().filter(|point| point.timeline == timeline.timeline).copied().collect();
            let chain = self.repository.log_chain(&database, &timelines, timeline.timeline).await?;
            // Of single restore points, what comes later is of no interest.
            let until = if whole { None } else { promised.iter().map(|point| point.offset).max() };
            let of_log = OfLog { database, name: &name, points: &points, until };
            self.gaps(&of_log, &chain);
            let end = chain.last();
            let chain = self.log(&of_log, &timelines, timeline.timeline, chain, &mut bad).await?;
            self.promises(&points, &chain, end, timeline.timeline).await?;
            self.snapshots(database, timeline, until, (&timelines, &chain), &mut bad).await?;
            let line = ancestry(&timelines, timeline.timeline);
            let snapshots = self.snapshots_on(&database, &line).await?;
            let end = points.iter().map(|point| point.offset).chain(end.filter(|_| whole)).max();
            let lost = match end.filter(|end| nameless && *end >= timeline.start) {
                Some(end) => vec![(timeline.start, end)],
                None => losses::losses(timeline, &chain, &snapshots, &bad, end),
            };
            for (first, last) in lost {
                let lost = Lost { database, name: name.clone(), timeline: timeline.timeline, first, last };
                self.report.lost.push(lost);
            }
        }
        Ok(())
    }

    fn lose(&mut self, point: &DatabasePoint, timeline: TimelineId, first: Offset, last: Offset) {
        let lost = Lost { database: point.identity, name: point.name.clone(), timeline, first, last };
        self.report.lost.push(lost);
    }

    /// Transactions that no object holds.
    fn gaps(&mut self, log: &OfLog<'_>, chain: &LogChain) {
        for hole in chain.holes.iter().filter(|hole| !hole.removed && log.counts(hole.missing)) {
            self.find(
                Severity::Error,
                FindingKind::Gap,
                &paths::logs(&log.database, hole.timeline),
                format!("{} of database {}", describe(hole), log.name),
                "put the missing objects back from a copy of the repository; `lost` tells what can not be restored without",
            );
        }
    }

    /// The log that leads to the end of a timeline: every object, and that each continues the one before. Where an object is bad,
    /// others that hold the same transactions are checked in its place. Returns the chain that is left.
    async fn log(
        &mut self,
        log: &OfLog<'_>,
        timelines: &[Timeline],
        timeline: TimelineId,
        mut chain: LogChain,
        bad: &mut losses::Bad,
    ) -> Result<LogChain, RepositoryError> {
        let mut choice = ChainChoice::default();
        loop {
            let before = bad.logs.len();
            let broken = self.log_once(log, &chain, bad, choice.every_joint).await?;
            let is_used = chain.entries.iter().any(|entry| bad.logs.contains(&entry.key()));
            if !broken && (bad.logs.len() == before || !is_used) {
                return Ok(chain);
            }
            choice.every_joint |= broken;
            choice.avoid.clone_from(&bad.logs);
            chain = self.repository.log_chain_by(&log.database, timelines, timeline, &choice).await?;
        }
    }

    /// Returns true if objects did not continue each other and that is not a finding yet: with `last`, it is one.
    async fn log_once(
        &mut self,
        log: &OfLog<'_>,
        chain: &LogChain,
        bad: &mut losses::Bad,
        last: bool,
    ) -> Result<bool, RepositoryError> {
        let mut broken = false;
        let (repository, draw) = (self.repository, self.draw);
        let entries: Vec<_> = chain.entries.iter().filter(|entry| log.counts(entry.first)).collect();
        // Timelines share what they forked from: that was read already.
        let known: Vec<_> = entries.iter().map(|entry| self.logs.get(&entry.key()).copied()).collect();
        let mut reads = futures::stream::iter(0..entries.len())
            .map(|index| {
                let (entry, known) = (entries[index], known[index]);
                async move {
                    match known {
                        Some(_) => None,
                        None => Some(read_log(repository, entry, draw.is_drawn(&entry.key())).await),
                    }
                }
            })
            .buffered(AHEAD);
        let mut before: Option<Checked> = None;
        for (entry, known) in entries.iter().zip(&known) {
            let read = reads.next().await.flatten();
            self.used.insert(entry.key());
            let header = match (read, known) {
                (Some(read), _) => self.judge_log(entry, read, log.name).await?,
                (None, Some(true)) if last => match self.repository.log_header(&entry.key()).await {
                    Ok(header) => Some(Arc::new(header)),
                    Err(error) if error.is_damage() => None,
                    Err(error) => return Err(error),
                },
                (None, Some(true)) => {
                    before = Some(Checked { entry: (*entry).clone(), header: None });
                    continue;
                }
                (None, _) => None,
            };
            let Some(header) = header else {
                if !self.moved.contains(&entry.key()) {
                    bad.logs.insert(entry.key());
                }
                before = None;
                continue;
            };
            for point in log.points {
                if header.place_after(point.offset).is(&point.place()) {
                    self.proved.insert((point.timeline, point.offset, point.chain));
                }
            }
            let continues = self.continues(entry, &header, before).await?;
            if !continues && !last {
                broken = true;
            } else if !continues || header.database != log.database {
                bad.logs.insert(entry.key());
                self.find(
                    Severity::Error,
                    FindingKind::BrokenChain,
                    &entry.key(),
                    format!(
                        "it does not continue the object before it; transactions from {} on are not to be trusted",
                        entry.first
                    ),
                    "restore to an offset before it; then take a new backup",
                );
            }
            before = Some(Checked { entry: (*entry).clone(), header: Some(header) });
        }
        Ok(broken)
    }

    /// Returns true unless an object contradicts the one before it.
    async fn continues(
        &self,
        entry: &LogEntry,
        header: &LogHeader,
        before: Option<Checked>,
    ) -> Result<bool, RepositoryError> {
        let Some(Checked { entry: left, header: before }) = before else { return Ok(true) };
        let before = match before {
            Some(before) => before,
            None => match self.repository.log_header(&left.key()).await {
                Ok(before) => Arc::new(before),
                // Compaction took it away, or it was found damaged before.
                Err(error) if error.is_damage() => return Ok(true),
                Err(error) => return Err(error),
            },
        };
        if header.contradicts(entry, &before, &left) {
            return Ok(false);
        }
        let is_known = before.place_after(left.last).is_known() && header.place_before(entry.first).is_known();
        if is_known || left.last.0.checked_add(1) != Some(entry.first.0) || !self.can_read(header, &before) {
            return Ok(true);
        }
        let ends = self.repository.place_at(&left, &before, left.last).await;
        let starts = self.repository.place_at(entry, header, left.last).await;
        match (ends, starts) {
            (Ok(ends), Ok(starts)) => Ok(ends.is(&starts)),
            (Err(error), _) | (_, Err(error)) if error.is_damage() => Ok(false),
            (Err(error), _) | (_, Err(error)) => Err(error),
        }
    }

    /// Can the bodies of both be opened?
    fn can_read(&self, one: &LogHeader, other: &LogHeader) -> bool {
        !(one.sealed || other.sealed) || self.repository.keys.can_open()
    }

    /// What restore points promised must be on the timeline, and be the same history.
    async fn promises(
        &mut self,
        points: &[&DatabasePoint],
        chain: &LogChain,
        end: Option<Offset>,
        timeline: TimelineId,
    ) -> Result<(), RepositoryError> {
        for point in points {
            let folder = paths::logs(&point.identity, timeline);
            if end.is_none_or(|end| end < point.offset) {
                let from = end.map_or(Offset(0), |end| Offset(end.0 + 1));
                self.find(
                    Severity::Error,
                    FindingKind::Gap,
                    &folder,
                    format!(
                        "transactions {from} to {} of database {} are missing from timeline {timeline}",
                        point.offset, point.name
                    ),
                    "restore to an offset before the gap, or put the missing objects back from a copy of the repository",
                );
                continue;
            }
            if let Some(hole) = chain.holes.iter().find(|hole| hole.removed && hole.holds(point.offset)) {
                let message = format!("a restore point lies in what was removed: {} of {}", describe(hole), point.name);
                self.find(
                    Severity::Error,
                    FindingKind::Gap,
                    &folder,
                    message,
                    "use another restore point; `prune --apply` takes this one away",
                );
            }
            if chain.range(point.offset, point.offset).is_empty()
                || self.proved.contains(&(point.timeline, point.offset, point.chain))
            {
                continue;
            }
            match self.repository.prove(point, chain).await {
                Ok(Proof::Holds | Proof::HoldsThrough(_)) => {}
                Ok(Proof::NotReadable) => self.not_readable(&folder, &CryptoError::NoIdentity),
                Ok(Proof::Differs) => self.find(
                    Severity::Error,
                    FindingKind::BrokenChain,
                    &folder,
                    format!("at transaction {} it holds another history than the restore point promises", point.offset),
                    "take a new backup; restore points before this one may still be good",
                ),
                // What is damaged was found already.
                Err(error) if error.is_damage() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Every snapshot of a timeline.
    async fn snapshots(
        &mut self,
        database: Identity,
        timeline: &Timeline,
        until: Option<Offset>,
        (timelines, chain): (&[Timeline], &LogChain),
        bad: &mut losses::Bad,
    ) -> Result<(), RepositoryError> {
        for offset in self.repository.snapshots(&database, timeline.timeline).await? {
            let key = paths::snapshot(&database, timeline.timeline, offset);
            if until.is_some_and(|until| offset > until) || !self.seen.insert(key.clone()) {
                continue;
            }
            self.used.insert(key.clone());
            let before = self.report.findings.len();
            let manifest = self.repository.snapshot(&database, timeline.timeline, offset).await;
            if let Some(manifest) = self.sort_out(&key, manifest)? {
                if self.repository.is_of_history(&manifest, timelines, chain, None).await? == Some(false) {
                    self.find(
                        Severity::Error,
                        FindingKind::BrokenChain,
                        &key,
                        format!("it is of another history than timeline {}", timeline.timeline),
                        "restores do not use it and replay more of the log; move it out of the repository, so that the next \
                         snapshot of the server can take its place",
                    );
                }
                let mut native = false;
                let mut whole = true;
                for used in manifest.packs {
                    let key = paths::pack(&database, used.pack);
                    native |= used.entries.contains(&manifest.native_manifest);
                    whole &= self.pack(&key, used.pack, used.stored_bytes, &used.entries).await?;
                }
                if !native {
                    self.damaged(&key, "it names no native manifest");
                }
                if !whole || !native {
                    bad.snapshots.insert((timeline.timeline, offset));
                }
            }
            if self.report.findings.len() > before {
                bad.snapshots.insert((timeline.timeline, offset));
            }
        }
        Ok(())
    }

    /// The snapshots along a line of timelines.
    async fn snapshots_on(
        &self,
        database: &Identity,
        line: &[(Timeline, Option<Offset>)],
    ) -> Result<Vec<(TimelineId, Offset)>, RepositoryError> {
        let mut found = Vec::new();
        for (timeline, until) in line {
            for offset in self.repository.snapshots(database, timeline.timeline).await? {
                if until.is_none_or(|until| offset <= until) {
                    found.push((timeline.timeline, offset));
                }
            }
        }
        Ok(found)
    }

    async fn instance(&mut self, point: &RestorePoint) -> Result<(), RepositoryError> {
        let key = paths::instance(point.instance);
        self.used.insert(key.clone());
        if !self.seen.insert(key.clone()) {
            return Ok(());
        }
        self.capture(&key, point.instance).await
    }
}
