//! The plan of a restore: a value that says, per database, which snapshot, which log, up to which transaction.
//!
//! Order is by offset. A transaction's time counts as the latest time up to it, since clocks step back; so times only grow
//! along a timeline and the search for one can halve.

use std::collections::BTreeSet;

use jiff::Timestamp;
use object_store::path::Path as Key;

use crate::datadir::commit::Frame;
use crate::ids::{Identity, Offset, TimelineId};
use crate::repository::chain::{Hole, LogChain, LogEntry};
use crate::repository::log_object::Link;
use crate::repository::manifest::{DatabasePoint, RestorePoint, SnapshotManifest, Timeline};
use crate::repository::proof::Proof;
use crate::repository::timeline::{ChainChoice, ancestry};
use crate::repository::{Repository, RepositoryError, paths};
use crate::restore::RestoreError;
use crate::restore::moment::Moment;
use crate::restore::target::Target;

/// What a restore will do.
#[derive(Debug, Clone)]
pub struct RestorePlan {
    /// Where names, programs and configuration come from.
    pub instance: RestorePoint,
    pub databases: Vec<DatabasePlan>,
    /// Databases of the instance that are left out, and why.
    pub left_out: Vec<String>,
    /// Stored bytes to fetch.
    pub bytes_to_read: u64,
}

/// One database's part of a plan.
#[derive(Debug, Clone)]
pub struct DatabasePlan {
    pub identity: Identity,
    pub name: String,
    pub replica: u64,
    pub timeline: TimelineId,
    /// Transactions 0 to this one will be there.
    pub offset: Offset,
    pub time: Option<Timestamp>,
    pub snapshot: Option<SnapshotManifest>,
    /// The first transaction of the log that is written. It reaches back to the snapshot's own, which the server needs to
    /// accept the snapshot, and on to the start of a link, so that the next backup can prove that it continues the archive.
    pub log_from: Offset,
    pub log: Vec<LogEntry>,
    /// What is in doubt about the time that was asked for.
    pub warnings: Vec<String>,
}

/// What the user asked for.
#[derive(Debug, Clone, Default)]
pub struct RestoreRequest {
    pub target: Target,
    /// Names or identities; empty for all.
    pub databases: Vec<String>,
    pub timeline: Option<TimelineId>,
    /// Replay the whole log instead of starting from a snapshot.
    pub no_snapshot: bool,
    /// Snapshots that were found to be of no use.
    pub avoid: BTreeSet<(Identity, Offset)>,
    /// See [`ChainChoice::every_joint`].
    pub every_joint: bool,
}

/// Makes the plan. Nothing is written.
///
/// # Errors
/// [`RestoreError::NothingToRestore`] when the target cannot be reached, [`RestoreError::Usage`] when it is ambiguous.
pub async fn plan(repository: &Repository, request: &RestoreRequest) -> Result<RestorePlan, RestoreError> {
    let points = load_points(repository).await?;
    let instance = choose_whole_instance(repository, &points, request).await?;
    let chosen = choose_databases(&instance, &points, &request.databases)?;
    if matches!(request.target, Target::Offset(_)) && chosen.len() > 1 {
        let names: Vec<_> = chosen.iter().map(|database| database.name.as_str()).collect();
        return Err(RestoreError::Usage(format!(
            "an offset belongs to one database and there are {}: name one with --database ({})",
            chosen.len(),
            names.join(", ")
        )));
    }
    if request.timeline.is_some() && chosen.len() > 1 {
        return Err(RestoreError::Usage("a timeline belongs to one database; name it with --database".into()));
    }
    let mut plan = RestorePlan { instance, databases: Vec::new(), left_out: Vec::new(), bytes_to_read: 0 };
    for database in chosen {
        match plan_around(repository, &database, &points, request).await {
            Ok(part) => plan.databases.push(part),
            // A database need not have existed at a time; by every other target, and by name, it is asked for.
            Err(RestoreError::NothingToRestore(reason))
                if matches!(request.target, Target::Time(_)) && request.databases.is_empty() =>
            {
                plan.left_out.push(format!("{}: {reason}", database.name));
            }
            Err(error) => return Err(error),
        }
    }
    if matches!(request.target, Target::Time(_)) && request.databases.is_empty() {
        let here = |database: &DatabasePoint| plan.instance.databases.iter().any(|d| d.identity == database.identity);
        let later = points.iter().filter(|point| point.id > plan.instance.id).flat_map(|point| &point.databases);
        for database in later.filter(|database| !here(database)) {
            let text = format!("{}: it is in later restore points only", database.name);
            if !plan.left_out.contains(&text) {
                plan.left_out.push(text);
            }
        }
    }
    if plan.databases.is_empty() {
        return Err(RestoreError::NothingToRestore(plan.left_out.join("; ")));
    }
    plan.bytes_to_read = plan.databases.iter().map(DatabasePlan::bytes_to_read).sum();
    Ok(plan)
}

impl RestorePlan {
    /// What the operator should know before it is carried out.
    pub fn warnings(&self) -> Vec<String> {
        self.databases.iter().flat_map(|database| database.warnings.iter().cloned()).collect()
    }

    /// The snapshot of this plan that `error` is about.
    pub(crate) fn snapshot_at_fault(&self, error: &RestoreError) -> Option<(Identity, Offset)> {
        let RestoreError::Repository(RepositoryError::Missing { key } | RepositoryError::Damaged { key, .. }) = error
        else {
            return None;
        };
        let is_its_pack = |database: &&DatabasePlan| {
            let packs = paths::packs(&database.identity);
            database.snapshot.is_some() && key.starts_with(packs.as_ref())
        };
        let database = self.databases.iter().find(is_its_pack)?;
        database.snapshot.as_ref().map(|snapshot| (database.identity, snapshot.offset))
    }
}

impl DatabasePlan {
    pub fn bytes_to_read(&self) -> u64 {
        let packs: u64 = self.snapshot.iter().flat_map(|snapshot| &snapshot.packs).map(|pack| pack.stored_bytes).sum();
        packs + self.log.iter().map(|entry| entry.size).sum::<u64>()
    }
}

/// Every restore point, oldest first.
async fn load_points(repository: &Repository) -> Result<Vec<RestorePoint>, RestoreError> {
    let mut points = Vec::new();
    let mut damaged = None;
    for id in repository.restore_point_ids().await? {
        match repository.restore_point(id).await {
            Ok(point) => points.push(point),
            Err(error @ RepositoryError::Damaged { .. }) => {
                tracing::warn!(%error, "a restore point is damaged and passed over");
                damaged = Some(error);
            }
            // A prune took it between the two looks.
            Err(RepositoryError::Missing { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match damaged {
        Some(error) if points.is_empty() => Err(error.into()),
        _ if points.is_empty() => Err(RestoreError::NothingToRestore(
            "the repository has no restore point; take one with `backup create`".into(),
        )),
        _ => Ok(points),
    }
}

/// As [`choose_instance`]. Where a moment is asked for and no restore point, one whose capture is lost is passed over.
async fn choose_whole_instance(
    repository: &Repository,
    points: &[RestorePoint],
    request: &RestoreRequest,
) -> Result<RestorePoint, RestoreError> {
    let mut left = points.to_vec();
    loop {
        let chosen = match choose_instance(&left, request) {
            Ok(chosen) => chosen.clone(),
            // None is whole: the first choice says which is missing.
            Err(_) if left.len() < points.len() => return choose_instance(points, request).cloned(),
            Err(error) => return Err(error),
        };
        let by_name = matches!(request.target, Target::Label(_) | Target::Point(_));
        if by_name || repository.exists(&paths::instance(chosen.instance)).await? {
            return Ok(chosen);
        }
        left.retain(|point| point.instance != chosen.instance);
        // Everything is not everything without a database that came later.
        let is_left = |database: &DatabasePoint| {
            left.last().is_some_and(|point| point.databases.iter().any(|found| found.identity == database.identity))
        };
        let is_everything = request.target == Target::Latest && request.databases.is_empty();
        if is_everything && !chosen.databases.iter().all(is_left) {
            return Ok(chosen);
        }
        tracing::warn!(restore_point = %chosen.id, "its instance capture is missing; another one's is taken");
    }
}

/// The restore point that names, programs and configuration come from: the newest that is not after the target.
fn choose_instance<'a>(points: &'a [RestorePoint], request: &RestoreRequest) -> Result<&'a RestorePoint, RestoreError> {
    let (Some(oldest), Some(newest)) = (points.first(), points.last()) else {
        return Err(RestoreError::NothingToRestore("the repository has no restore point".into()));
    };
    match &request.target {
        Target::Latest => Ok(newest),
        Target::Point(id) => points.iter().find(|point| point.id == *id).ok_or_else(|| {
            RestoreError::NothingToRestore(format!("there is no restore point {id}; see `inner-universe backup list`"))
        }),
        Target::Label(label) => {
            points.iter().rev().find(|point| point.label.as_deref() == Some(label)).ok_or_else(|| {
                RestoreError::NothingToRestore(format!(
                    "no restore point is labelled `{label}`; see `inner-universe backup list`"
                ))
            })
        }
        Target::Time(time) => Ok(points.iter().rev().find(|point| point.created_at <= *time).unwrap_or(oldest)),
        Target::Offset(offset) => {
            let wanted = |database: &&DatabasePoint| {
                request.databases.is_empty() || request.databases.iter().any(|text| is_called(database, text))
            };
            let reaches = |point: &&RestorePoint| {
                let mut databases = point.databases.iter().filter(wanted).peekable();
                databases.peek().is_some() && databases.all(|database| database.offset <= *offset)
            };
            let holds = |point: &&RestorePoint| point.databases.iter().any(|database| wanted(&database));
            Ok(points.iter().rev().find(reaches).or_else(|| points.iter().find(holds)).unwrap_or(newest))
        }
    }
}

fn is_called(database: &DatabasePoint, text: &str) -> bool {
    database.name == text || database.identity.to_string() == text.to_ascii_lowercase()
}

fn choose_databases(
    instance: &RestorePoint,
    points: &[RestorePoint],
    wanted: &[String],
) -> Result<Vec<DatabasePoint>, RestoreError> {
    if wanted.is_empty() {
        return Ok(instance.databases.clone());
    }
    let mut chosen: Vec<DatabasePoint> = Vec::new();
    for text in wanted {
        let Some(database) = instance.databases.iter().find(|database| is_called(database, text)) else {
            let known: Vec<_> = instance.databases.iter().map(|database| database.name.as_str()).collect();
            let elsewhere = points.iter().any(|point| point.databases.iter().any(|database| is_called(database, text)));
            let hint = if elsewhere { "; other restore points hold it" } else { "" };
            return Err(RestoreError::Usage(format!(
                "restore point {} has no database `{text}`; it has {}{hint}",
                instance.id,
                known.join(", ")
            )));
        };
        if !chosen.contains(database) {
            chosen.push(database.clone());
        }
    }
    Ok(chosen)
}

/// As [`plan_database`], around log objects that are missing or damaged where others hold the same transactions.
async fn plan_around(
    repository: &Repository,
    point: &DatabasePoint,
    points: &[RestorePoint],
    request: &RestoreRequest,
) -> Result<DatabasePlan, RestoreError> {
    let mut choice = ChainChoice { every_joint: request.every_joint, ..ChainChoice::default() };
    // A transaction that is named may need none of what is lost. By time, or for the newest, the end of what is left must not
    // pass for what was asked for.
    let need_not_be_whole = !matches!(request.target, Target::Latest | Target::Time(_));
    let mut lost = None;
    loop {
        let error = match plan_database(repository, point, points, request, &choice).await {
            Err(RestoreError::Repository(
                error @ (RepositoryError::Missing { .. } | RepositoryError::Damaged { .. }),
            )) => error,
            Err(error) => return Err(lost.unwrap_or(error)),
            plan => return plan,
        };
        let (RepositoryError::Missing { key } | RepositoryError::Damaged { key, .. }) = &error else {
            return Err(error.into());
        };
        let Some(entry) = LogEntry::of_key(&Key::from(key.as_str())) else { return Err(error.into()) };
        let is_new = choice.avoid.insert(entry.key());
        if !is_new {
            return Err(lost.unwrap_or(error.into()));
        }
        match repository.replacement(&point.identity, &entry, &choice.avoid).await? {
            Some(_) => {
                tracing::warn!(%error, "a log object cannot be used, and others are that hold the same transactions");
            }
            None if need_not_be_whole => {
                tracing::warn!(%error, "a log object cannot be used, and what is asked for is looked for without it");
                lost.get_or_insert(error.into());
            }
            None => return Err(lost.unwrap_or(error.into())),
        }
    }
}

async fn plan_database(
    repository: &Repository,
    point: &DatabasePoint,
    points: &[RestorePoint],
    request: &RestoreRequest,
    choice: &ChainChoice,
) -> Result<DatabasePlan, RestoreError> {
    let timelines = repository.timelines(&point.identity).await?;
    let fixed = matches!(request.target, Target::Label(_) | Target::Point(_));
    // A timeline that a restore point names is there, whether or not it has log of its own: yet, or any more.
    let named = points.iter().flat_map(|point| &point.databases).filter(|found| found.identity == point.identity);
    let named = named.map(|found| found.timeline).max();
    let newest = repository.newest_timeline(&point.identity, &timelines).await?.max(named).unwrap_or(point.timeline);
    let timeline = match request.timeline {
        Some(id) if !timelines.iter().any(|timeline| timeline.timeline == id) => {
            let known: Vec<_> = timelines.iter().map(|timeline| timeline.timeline.to_string()).collect();
            let (name, known) = (&point.name, known.join(", "));
            return Err(RestoreError::Usage(format!("database {name} has no timeline {id}; it has {known}")));
        }
        Some(id) if fixed && id != point.timeline => {
            return Err(RestoreError::Usage(format!(
                "the restore point is on timeline {}; leave --timeline out",
                point.timeline
            )));
        }
        Some(id) => id,
        None if fixed => point.timeline,
        None => newest,
    };
    let mut chain = repository.log_chain_by(&point.identity, &timelines, timeline, choice).await?;
    if chain.entries.is_empty() && point.timeline == timeline {
        return Err(RestoreError::Unreachable {
            wanted: point.offset,
            reason: format!("the whole log of timeline {timeline} is missing; run `inner-universe verify`"),
        });
    }
    let (offset, time) = match &request.target {
        Target::Latest => latest(repository, &chain).await?,
        Target::Point(_) | Target::Label(_) => (point.offset, point.time.map(Timestamp::as_microsecond)),
        Target::Offset(offset) => (*offset, None),
        Target::Time(time) => at_time(repository, &chain, *time).await?,
    };
    let end = end_of(&chain, timeline)?;
    if matches!(request.target, Target::Latest | Target::Time(_)) && offset == end {
        all_promised_is_there(points, point, &timelines, timeline, end)?;
        if repository.is_removed_after(&point.identity, timeline, end).await? {
            return Err(RestoreError::NothingToRestore(format!(
                "transactions after {end} of timeline {timeline} were removed by retention; `--to offset:{end}` restores \
                 what is there"
            )));
        }
    }
    if let Target::Time(time) = request.target
        && let Some(hole) = chain.holes.iter().find(|hole| hole.missing.0 == offset.0 + 1)
    {
        // What was there at that time lies in the hole, as far as anybody knows.
        let reason = format!("the state at {time} is gone: {}", describe(hole));
        return Err(match hole.removed {
            true => RestoreError::NothingToRestore(reason),
            // The database existed, and its log was lost: a restore without it must be asked for.
            false => RestoreError::Unreachable {
                wanted: hole.missing,
                reason: format!("{reason}; `--database` restores others of that time"),
            },
        });
    }
    let hole = chain.holes.iter().find(|hole| hole.holds(offset));
    if offset > end || hole.is_some() {
        let reason = hole.map_or_else(|| format!("timeline {timeline} ends at transaction {end}"), describe);
        return Err(if fixed {
            RestoreError::Unreachable { wanted: offset, reason }
        } else {
            RestoreError::NothingToRestore(format!("transaction {offset} is not archived: {reason}"))
        });
    }
    if fixed {
        chain = promised_chain(repository, point, chain).await?;
    }
    let (offset, time) = match request.target {
        Target::Offset(_) => at_offset(repository, &chain, offset).await?,
        _ => (offset, time),
    };
    let snapshot = match request.no_snapshot {
        true => None,
        false => {
            let avoid = |found| request.avoid.contains(&(point.identity, found));
            choose_snapshot(repository, &point.identity, &timelines, timeline, &chain, offset, avoid).await?
        }
    };
    let log_from = match &snapshot {
        Some(snapshot) => start_of_link(repository, &chain, snapshot.offset).await?,
        None => Offset(0),
    };
    let Some(log) = chain.unbroken(log_from, offset).map(<[LogEntry]>::to_vec) else {
        let start = chain.piece_start(offset).unwrap_or(offset);
        let hole = chain.holes.iter().rev().find(|hole| hole.missing <= offset);
        let is_loss = hole.is_some_and(|hole| !hole.removed);
        let hole = hole.map(describe);
        let reason = format!(
            "there is no snapshot for transaction {offset}, and its log is there from transaction {start} on only{}",
            hole.map(|hole| format!(": {hole}")).unwrap_or_default()
        );
        return Err(match fixed || is_loss {
            true => RestoreError::Unreachable { wanted: offset, reason },
            false => RestoreError::NothingToRestore(reason),
        });
    };
    let warnings = match (&request.target, time) {
        (Target::Time(wanted), Some(reached)) => {
            let (timelines, chain, is_chosen) = (&timelines, &chain, request.timeline.is_some());
            let moment =
                Moment { repository, database: point, points, timelines, timeline, is_chosen, chain, time: *wanted };
            moment.warnings(offset, reached).await?
        }
        _ => Vec::new(),
    };
    let time = time.and_then(|micros| Timestamp::from_microsecond(micros).ok());
    Ok(DatabasePlan {
        identity: point.identity,
        name: point.name.clone(),
        replica: point.replica,
        timeline,
        offset,
        time,
        snapshot,
        log_from,
        log,
        warnings,
    })
}

/// What ends where the archive ends must be all there ever was: less must not pass for everything.
fn all_promised_is_there(
    points: &[RestorePoint],
    database: &DatabasePoint,
    timelines: &[Timeline],
    timeline: TimelineId,
    end: Offset,
) -> Result<(), RestoreError> {
    let line = ancestry(timelines, timeline);
    let on_line = |point: &&DatabasePoint| {
        point.identity == database.identity
            && line.iter().any(|(ancestor, until)| {
                ancestor.timeline == point.timeline && until.is_none_or(|until| point.offset <= until)
            })
    };
    let promised = points.iter().flat_map(|point| &point.databases).filter(on_line).map(|point| point.offset).max();
    match promised.filter(|promised| *promised > end) {
        None => Ok(()),
        Some(wanted) => Err(RestoreError::Unreachable {
            wanted,
            reason: format!(
                "transactions after {end} are missing from timeline {timeline}; `--to offset:{end}` restores what is there"
            ),
        }),
    }
}

/// The chain that leads to what a restore point promised: the same offset of another history is not it.
async fn promised_chain(
    repository: &Repository,
    point: &DatabasePoint,
    chain: LogChain,
) -> Result<LogChain, RestoreError> {
    match repository.prove(point, &chain).await? {
        // An encrypted body is compared while it is restored.
        Proof::Holds | Proof::NotReadable => Ok(chain),
        Proof::HoldsThrough(entries) => Ok(chain.through(&entries, point.offset)),
        Proof::Differs => Err(RestoreError::Unreachable {
            wanted: point.offset,
            reason: "the log objects hold another history than the restore point; run `inner-universe verify`".into(),
        }),
    }
}

fn end_of(chain: &LogChain, timeline: TimelineId) -> Result<Offset, RestoreError> {
    chain.last().ok_or_else(|| {
        RestoreError::NothingToRestore(match chain.holes.last() {
            Some(hole) => format!("timeline {timeline} has no log of its own, and {}", describe(hole)),
            None => format!("nothing is archived on timeline {timeline}"),
        })
    })
}

/// What a hole is, in words.
pub(crate) fn describe(hole: &Hole) -> String {
    let (missing, last, timeline) = (hole.missing, hole.last(), hole.timeline);
    match hole.removed {
        true => format!("transactions {missing} to {last} of timeline {timeline} were removed by retention"),
        false => format!("transactions {missing} to {last} are missing from timeline {timeline}"),
    }
}

/// The first transaction of the link that holds `offset`.
pub(crate) async fn start_of_link(
    repository: &Repository,
    chain: &LogChain,
    offset: Offset,
) -> Result<Offset, RestoreError> {
    let Some(entry) = chain.range(offset, offset).first() else { return Ok(offset) };
    let header = repository.log_header(&entry.key()).await?;
    let before = header.links.iter().rev().find(|link| link.last < offset);
    Ok(before.map_or(header.first, |link| Offset(link.last.0.saturating_add(1))))
}

async fn latest(repository: &Repository, chain: &LogChain) -> Result<(Offset, Option<i64>), RestoreError> {
    let Some(entry) = chain.entries.last() else {
        return Err(RestoreError::NothingToRestore("nothing is archived".into()));
    };
    let header = repository.log_header(&entry.key()).await?;
    Ok((entry.last, header.max_time_until(entry.last)))
}

/// The last offset whose time, and all before it, are at or before `time`.
pub(super) async fn at_time(
    repository: &Repository,
    chain: &LogChain,
    time: Timestamp,
) -> Result<(Offset, Option<i64>), RestoreError> {
    let micros = time.as_microsecond();
    // The first object that holds a later time.
    let (mut within, mut later) = (0, chain.entries.len());
    let mut found: Option<(Offset, Option<i64>)> = None;
    while within < later {
        let middle = within + (later - within) / 2;
        // One that cannot be read does not tell its times, and matters only if what is looked for is in it.
        let mut readable = None;
        for (index, entry) in chain.entries.iter().enumerate().take(later).skip(middle) {
            match repository.log_header(&entry.key()).await {
                Ok(header) => {
                    readable = Some((index, entry.last, header.max_time_until(entry.last)));
                    break;
                }
                Err(error) if error.is_damage() => {}
                Err(error) => return Err(error.into()),
            }
        }
        match readable {
            Some((index, last, max)) if max.is_none_or(|max| max <= micros) => {
                found = Some((last, max));
                within = index + 1;
            }
            _ => later = middle,
        }
    }
    for entry in chain.entries.iter().skip(within) {
        // A clock that was set back across a fork.
        let max = repository.log_header(&entry.key()).await?.max_time_until(entry.last);
        if max.is_some_and(|max| max <= micros) {
            found = Some((entry.last, max));
            continue;
        }
        let later = |link: &Link| link.max_time.is_some_and(|max| max > micros) || link.last > entry.last;
        found = walk(repository, entry, found, later, |_, max| max.is_some_and(|max| max > micros)).await?;
        // The latest time of a link counts for all of it: where the chain leaves a link inside, that time may lie behind.
        if found.is_none_or(|(last, _)| last != entry.last) {
            break;
        }
    }
    match found {
        // Without any time at or before the target there is no state of that time.
        Some((offset, Some(max))) => Ok((offset, Some(max))),
        _ => Err(RestoreError::NothingToRestore(format!(
            "its first transaction with a time is later than {time}; what came before has none, and is restored by `--to offset:`"
        ))),
    }
}

/// Walks an object's commits until `beyond` holds, and returns the last before that with the latest time up to it. Only the
/// part is read that holds the first link for which `within` holds; `before` is where the history stands before the object.
async fn walk(
    repository: &Repository,
    entry: &LogEntry,
    before: Option<(Offset, Option<i64>)>,
    within: impl Fn(&Link) -> bool,
    beyond: impl Fn(Offset, Option<i64>) -> bool,
) -> Result<Option<(Offset, Option<i64>)>, RestoreError> {
    let open = repository.open_log(entry).await?;
    let header = &open.header;
    let Some(index) = header.links.iter().position(within) else { return Ok(before) };
    let part = header.part_of_link(index);
    let stored = repository.log_part(&open, part).await?;
    let commits = header.decode_part(&open.key, part, &stored, &repository.keys)?;
    let start = index.checked_sub(1).and_then(|index| header.tip_at(index));
    let mut found = start.map(|tip| (Offset(tip.next.0.saturating_sub(1)), tip.max_time)).or(before);
    let mut at = 0;
    while let Frame::Commit(commit) = Frame::parse(header.log_version, &commits[at..]) {
        at += commit.bytes.len();
        if found.is_some_and(|(last, _)| commit.last() <= last) {
            continue;
        }
        let max = found.and_then(|(_, max)| max).max(commit.inputs().map(|inputs| inputs.time_micros));
        if commit.last() > entry.last || beyond(commit.last(), max) {
            break;
        }
        found = Some((commit.last(), max));
    }
    Ok(found)
}

/// The end of the last commit that lies wholly at or before `offset`, and its time. A commit of several transactions
/// cannot be cut without the database's schema, so the restore then ends before it.
async fn at_offset(
    repository: &Repository,
    chain: &LogChain,
    offset: Offset,
) -> Result<(Offset, Option<i64>), RestoreError> {
    let Some(index) = chain.entries.iter().position(|entry| entry.first <= offset && offset <= entry.last) else {
        return Err(RestoreError::NothingToRestore(format!("transaction {offset} is not archived")));
    };
    let entry = &chain.entries[index];
    let tip = repository.log_header(&entry.key()).await?.tip_until(offset);
    if tip.next.0 == offset.0.saturating_add(1) {
        return Ok((offset, tip.max_time));
    }
    let before = match index.checked_sub(1) {
        Some(before) => {
            let entry = &chain.entries[before];
            Some((entry.last, repository.log_header(&entry.key()).await?.max_time_until(entry.last)))
        }
        None => None,
    };
    let found = walk(repository, entry, before, |link| link.last >= offset, |last, _| last > offset).await?;
    let found = found.ok_or_else(|| {
        RestoreError::NothingToRestore(format!(
            "transaction {offset} lies inside the first commit, which cannot be cut"
        ))
    })?;
    Ok(found)
}

/// The newest whole snapshot at or before `offset` on this history from which the log leads on.
async fn choose_snapshot(
    repository: &Repository,
    database: &Identity,
    timelines: &[Timeline],
    timeline: TimelineId,
    chain: &LogChain,
    offset: Offset,
    avoid: impl Fn(Offset) -> bool,
) -> Result<Option<SnapshotManifest>, RestoreError> {
    let mut usable: Vec<(Offset, TimelineId, Option<Offset>)> = Vec::new();
    for (ancestor, until) in ancestry(timelines, timeline) {
        for found in repository.snapshots(database, ancestor.timeline).await? {
            let leads = found <= offset && until.is_none_or(|until| found <= until);
            if leads && !avoid(found) && chain.unbroken(found, offset).is_some() {
                usable.push((found, ancestor.timeline, until));
            }
        }
    }
    usable.sort_unstable();
    for (offset, timeline, until) in usable.into_iter().rev() {
        match repository.snapshot(database, timeline, offset).await {
            Ok(snapshot) => {
                if repository.is_of_history(&snapshot, timelines, chain, until).await? != Some(false) {
                    return Ok(Some(snapshot));
                }
                tracing::warn!(%offset, "a snapshot is of another history than its timeline and is not used");
            }
            Err(error) if error.is_damage() => {
                tracing::warn!(%error, %offset, "a snapshot cannot be used and is passed over");
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}
