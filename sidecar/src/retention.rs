//! Retention: which restore points are kept, what they need, and taking away the rest in two steps.
//!
//! Invariants: every kept restore point is proven restorable before anything is deleted, or nothing is; what is deleted was
//! marked a grace period ago, by a document in the repository, and is needed by nothing now; documents go before what they
//! name, so that a crash at any moment leaves kept restore points whole and the rest to the next run.

mod clock_check;
pub mod local;
pub mod needs;
pub mod pins;
pub mod policy;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use object_store::path::Path as Key;
use serde::{Deserialize, Serialize};

use crate::clock::Clock;
use crate::ids::{Identity, Offset, RestorePointId, TimelineId};
use crate::repository::manifest::{self, Marked, RemovedLog, Retention};
use crate::repository::ranges::{merged, without};
use crate::repository::{Repository, RepositoryError, pack, paths};
use crate::retention::needs::{Listing, Needs};
use crate::retention::policy::{Candidate, Policy, Reason, choose};

/// What can go wrong with retention.
#[derive(Debug, thiserror::Error)]
pub enum RetentionError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(
        "retention says nothing, and so everything is kept; give retention.window or a retention.keep_* in the configuration"
    )]
    NoPolicy,
    #[error(
        "restore point {0} was pinned during the prune, and what it needs was not removed; run `prune --apply` again"
    )]
    Pinned(RestorePointId),
    #[error(
        "a prune is deleting restore point {0}, or began to: the pin is set, and keeps it if it is still there when that prune \
         has ended; look with `backup list`, and pin it again after the next prune"
    )]
    BeingDeleted(RestorePointId),
    #[error("restore point {id} is pinned and cannot be restored: {}; run `inner-universe verify`", problems.join("; "))]
    PinnedBroken { id: RestorePointId, problems: Vec<String> },
    #[error(
        "nothing was removed because the clock is in doubt: {0}. If it is wrong, set it (chrony, ntpd); if it is right, run \
         `inner-universe prune --apply --trust-clock` once"
    )]
    ClockInDoubt(String),
    #[error("nothing was removed: {}; run `inner-universe verify`", .0.join("; "))]
    Unproven(Vec<String>),
    #[error("{deleted} objects were removed, and others disappeared meanwhile: {}; run `inner-universe verify`", missing.join("; "))]
    Lost { deleted: u64, missing: Vec<String> },
}

/// What a prune is about to do, as a value.
#[derive(Debug, Clone)]
pub struct PrunePlan {
    pub kept: Vec<KeptPoint>,
    /// Restore points that are not kept, oldest first.
    pub removed: Vec<RemovedPoint>,
    /// Everything that nothing needs.
    pub unneeded: Vec<Marked>,
    /// What of it is deleted now.
    pub due: Vec<Marked>,
    needs: Needs,
    /// What the repository will lack on purpose.
    removed_log: Vec<RemovedLog>,
    /// Why the clock cannot be right by which all this was chosen.
    clock_doubt: Option<String>,
    trusts_clock: bool,
}

/// A restore point that stays.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct KeptPoint {
    pub id: RestorePointId,
    pub label: Option<String>,
    pub created_at: Timestamp,
    pub reasons: BTreeSet<Reason>,
}

/// A restore point that goes.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct RemovedPoint {
    pub id: RestorePointId,
    pub label: Option<String>,
    pub created_at: Timestamp,
    /// When a prune will delete it.
    pub deleted_from: Timestamp,
}

/// Some objects and their stored bytes.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Amount {
    pub objects: u64,
    pub bytes: u64,
}

/// The report of a prune. Field names are stable.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct PruneReport {
    /// `false` for a plan.
    pub applied: bool,
    pub kept: Vec<KeptPoint>,
    pub removed: Vec<RemovedPoint>,
    /// What nothing needs and is deleted by a prune after its grace.
    pub marked: Amount,
    /// What was deleted now, or would be.
    pub deleted: Amount,
    /// Objects that the store would not delete, as under object lock. They stay marked.
    pub refused: Vec<String>,
    /// Kept restore points that cannot be restored.
    pub problems: Vec<String>,
    /// Why the clock is in doubt, and nothing is removed by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clock_doubt: Option<String>,
}

/// Makes the plan. Nothing is written.
///
/// # Errors
/// When there is no policy, or the repository fails.
pub async fn plan(
    repository: &Repository,
    policy: &Policy,
    grace: Duration,
    now: Timestamp,
) -> Result<PrunePlan, RetentionError> {
    plan_without(repository, policy, grace, now, &HashSet::new()).await
}

/// As [`plan`], for what is then carried out: snapshots that will stand for log that goes are read back first, and stand for
/// nothing where they are damaged.
///
/// # Errors
/// As [`plan`].
pub async fn plan_to_apply(
    repository: &Repository,
    policy: &Policy,
    grace: Duration,
    now: Timestamp,
) -> Result<PrunePlan, RetentionError> {
    let mut damaged = HashSet::new();
    let mut read = HashSet::new();
    loop {
        let plan = plan_without(repository, policy, grace, now, &damaged).await?;
        let found = damaged_packs(repository, &plan, &mut read).await?;
        if found.is_empty() {
            return Ok(plan);
        }
        for pack in &found {
            tracing::warn!(%pack, "a snapshot cannot be read back, so that the log before it stays: run `inner-universe verify`");
        }
        damaged.extend(found);
    }
}

/// Those packs that cannot be read back, of the snapshots that stand for log that is to go. Each is read once.
async fn damaged_packs(
    repository: &Repository,
    plan: &PrunePlan,
    read: &mut HashSet<Key>,
) -> Result<Vec<Key>, RepositoryError> {
    let mut snapshots: BTreeMap<(Identity, TimelineId), BTreeSet<Offset>> = BTreeMap::new();
    for (database, timeline, offset) in plan.needs.objects.iter().filter_map(paths::parse_snapshot_place) {
        snapshots.entry((database, timeline)).or_default().insert(offset);
    }
    let mut standing = BTreeSet::new();
    for ((database, _), (first, _)) in plan.due.iter().filter_map(|due| log_place(&due.object.as_str().into())) {
        // Also on timelines that begin in that log.
        for ((of, timeline), offsets) in snapshots.iter().filter(|((of, _), _)| *of == database) {
            standing.extend(offsets.range(Offset(first)..).next().map(|offset| (*of, *timeline, *offset)));
        }
    }
    let mut damaged = Vec::new();
    for (database, timeline, offset) in standing {
        for used in repository.snapshot(&database, timeline, offset).await?.packs {
            let key = paths::pack(&database, used.pack);
            if !read.insert(key.clone()) {
                continue;
            }
            match repository.get(&key).await {
                Ok(bytes) if pack::check(&used.pack, &bytes).is_ok() => {}
                Err(error) if !error.is_damage() => return Err(error),
                Ok(_) | Err(_) => damaged.push(key),
            }
        }
    }
    Ok(damaged)
}

async fn plan_without(
    repository: &Repository,
    policy: &Policy,
    grace: Duration,
    now: Timestamp,
    damaged: &HashSet<Key>,
) -> Result<PrunePlan, RetentionError> {
    if policy.is_empty() {
        return Err(RetentionError::NoPolicy);
    }
    let listed = repository.list(&Key::default()).await?;
    let listing: Listing = listed.into_iter().filter(|(key, _)| !damaged.contains(key)).collect();
    let pins: BTreeSet<RestorePointId> = repository.pins().await?.into_iter().collect();
    let found = repository.restore_points().await?;
    if !found.problems.is_empty() {
        return Err(RetentionError::Unproven(found.problems));
    }
    let points = found.restore_points;
    let candidates: Vec<_> = points
        .iter()
        .map(|point| Candidate { id: point.id, created_at: point.created_at, pinned: pins.contains(&point.id) })
        .collect();
    let chosen = choose(&candidates, policy, now);
    let (kept, gone): (Vec<_>, Vec<_>) = points.into_iter().partition(|point| chosen.contains_key(&point.id));
    let window_start = policy.window_start(now);
    let mut needs = needs::find(repository, &listing, &kept, window_start).await?;
    needs.objects.extend(pins.iter().filter(|id| chosen.contains_key(*id)).map(|id| paths::pin(*id)));

    let before = repository.retention().await?;
    let since: HashMap<&str, Timestamp> =
        before.iter().flat_map(|before| &before.marked).map(|marked| (marked.object.as_str(), marked.since)).collect();
    let grace = SignedDuration::try_from(grace).unwrap_or(SignedDuration::MAX);
    let mut unneeded = Vec::new();
    // Without a restore point nothing says what is needed.
    let nothing_known = kept.is_empty();
    for (key, bytes) in listing.iter().filter(|(key, _)| !nothing_known && is_prunable(key)) {
        if !needs.objects.contains(key) {
            let since = since.get(key.as_ref()).copied().unwrap_or(now);
            unneeded.push(Marked { object: key.to_string(), bytes: *bytes, since });
        }
    }
    let is_due = |marked: &&Marked| now.duration_since(marked.since) >= grace;
    let due: Vec<Marked> = unneeded.iter().filter(is_due).cloned().collect();
    let removed_log = removed_log(before.as_ref(), &listing, &due);
    let made = candidates.iter().map(|point| point.created_at);
    let clock_doubt = clock_check::doubt(made, before.as_ref().map(|before| before.at), policy, now);
    let clock_doubt = clock_doubt.filter(|_| !unneeded.is_empty());
    let ends = |id: RestorePointId| {
        let name = paths::restore_point(id);
        let since = since.get(name.as_ref()).copied().unwrap_or(now);
        since.checked_add(grace).unwrap_or(Timestamp::MAX)
    };
    let removed = gone.iter().map(|point| RemovedPoint {
        id: point.id,
        label: point.label.clone(),
        created_at: point.created_at,
        deleted_from: ends(point.id),
    });
    let stays = kept.iter().map(|point| KeptPoint {
        id: point.id,
        label: point.label.clone(),
        created_at: point.created_at,
        reasons: chosen.get(&point.id).cloned().unwrap_or_default(),
    });
    let (kept, removed) = (stays.collect(), removed.collect());
    Ok(PrunePlan { kept, removed, unneeded, due, needs, removed_log, clock_doubt, trusts_clock: false })
}

impl PrunePlan {
    /// To be carried out whatever speaks against the clock: the operator has said that it is right.
    #[must_use]
    pub fn trusting_clock(self, trusts_clock: bool) -> Self {
        Self { trusts_clock, ..self }
    }

    /// The report of a plan that is not carried out.
    pub fn report(&self) -> PruneReport {
        let amount = |marked: &[Marked]| Amount {
            objects: marked.len() as u64,
            bytes: marked.iter().map(|marked| marked.bytes).sum(),
        };
        PruneReport {
            applied: false,
            kept: self.kept.clone(),
            removed: self.removed.clone(),
            marked: amount(&self.unneeded),
            deleted: amount(&self.due),
            refused: Vec::new(),
            problems: self.needs.problems.clone(),
            clock_doubt: self.clock_doubt.clone().filter(|_| !self.trusts_clock),
        }
    }
}

/// Carries out a plan that was just made: marks what nothing needs, and deletes what was marked long enough.
///
/// # Errors
/// [`RetentionError::Unproven`] when a kept restore point cannot be restored, before or after; or when the repository fails.
pub async fn apply(
    repository: &Repository,
    plan: &PrunePlan,
    clock: &dyn Clock,
) -> Result<PruneReport, RetentionError> {
    if !plan.needs.problems.is_empty() {
        return Err(RetentionError::Unproven(plan.needs.problems.clone()));
    }
    let now = clock.now();
    if !plan.trusts_clock && !plan.unneeded.is_empty() {
        let doubt = plan.clock_doubt.clone();
        if let Some(doubt) = doubt.or(clock_check::doubt_of_store(repository, now).await?) {
            return Err(RetentionError::ClockInDoubt(doubt));
        }
    }
    let older: Vec<Key> = repository.list(&paths::retentions()).await?.into_iter().map(|(key, _)| key).collect();
    // It must sort after those before, also when the clock was set back.
    let newest = older.last().and_then(paths::parse_restore_point);
    let id = RestorePointId::after(newest, now);
    let document = Retention {
        format: manifest::FORMAT,
        id,
        at: now,
        removed: plan.removed_log.clone(),
        marked: plan.unneeded.clone(),
        deleting: plan.due.iter().filter_map(|due| point_of(&due.object)).collect(),
    };
    if !document.marked.is_empty() || !document.removed.is_empty() || !older.is_empty() {
        repository.put_document(&paths::retention(id), &document).await?;
    }
    let mut report = PruneReport { applied: true, deleted: Amount::default(), ..plan.report() };
    // A pin that was set since the plan was made counts: it is another process that sets it.
    let pins = repository.pins().await?;
    let is_due = |id: &RestorePointId| plan.due.iter().any(|due| due.object == paths::restore_point(*id).as_ref());
    if let Some(pinned) = pins.into_iter().find(is_due) {
        // Nothing is gone, so the document before says what is.
        match repository.delete(&paths::retention(id)).await {
            Err(RepositoryError::Denied { .. }) => settle(repository, &document, now).await?,
            deleted => deleted?,
        }
        return Err(RetentionError::Pinned(pinned));
    }
    let mut due = plan.due.clone();
    due.sort_by_key(|marked| (order(&marked.object), marked.object.clone()));
    for marked in due {
        // What a restore point names stays as long as the restore point does.
        if order(&marked.object) > RESTORE_POINTS && report.refused.iter().any(|object| order(object) == RESTORE_POINTS)
        {
            break;
        }
        let deleted = match point_of(&marked.object) {
            Some(point) => pins::delete(repository, point).await,
            None => repository.delete(&Key::from(marked.object.as_str())).await.map_err(Into::into),
        };
        match deleted {
            Ok(()) => {
                report.deleted.objects += 1;
                report.deleted.bytes += marked.bytes;
            }
            Err(RetentionError::Repository(RepositoryError::Denied { .. })) => report.refused.push(marked.object),
            Err(error @ RetentionError::Pinned(_)) => {
                // Only restore points are gone by now, so that the document before says what is missing on purpose.
                repository.delete(&paths::retention(id)).await?;
                return Err(error);
            }
            Err(error) => return Err(error),
        }
    }
    if report.refused.iter().any(|object| order(object) == RESTORE_POINTS) {
        settle(repository, &document, now).await?;
    }
    // The one before stays beside the newest: without either, nobody knows what is missing on purpose.
    for key in older.into_iter().rev().skip(1) {
        match repository.delete(&key).await {
            Ok(()) | Err(RepositoryError::Denied { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    report.marked.objects -= report.deleted.objects.min(report.marked.objects);
    report.marked.bytes -= report.deleted.bytes.min(report.marked.bytes);
    if report.deleted.objects > 0 {
        let listing: Listing = repository.list(&Key::default()).await?.into_iter().collect();
        let missing = missing_of(&plan.needs, &listing);
        if !missing.is_empty() {
            return Err(RetentionError::Lost { deleted: report.deleted.objects, missing });
        }
    }
    Ok(report)
}

/// Says that nothing is being deleted any more: whoever pins a restore point that is still there need not worry.
async fn settle(repository: &Repository, document: &Retention, now: Timestamp) -> Result<(), RepositoryError> {
    let id = RestorePointId::after(Some(document.id), now);
    let settled = Retention { id, deleting: Vec::new(), ..document.clone() };
    repository.put_document(&paths::retention(id), &settled).await.map(drop)
}

/// What is needed and no longer there. Compaction deletes its inputs meanwhile: a log object is missing only if no others hold its
/// transactions.
fn missing_of(needs: &Needs, listing: &Listing) -> Vec<String> {
    let gone: Vec<&Key> = needs.objects.iter().filter(|key| !listing.contains_key(*key)).collect();
    let mut held: BTreeMap<_, Vec<(u64, u64)>> = BTreeMap::new();
    if gone.iter().any(|key| log_place(key).is_some()) {
        for (place, range) in listing.keys().filter_map(log_place) {
            held.entry(place).or_default().push(range);
        }
    }
    let held: BTreeMap<_, _> = held.into_iter().map(|(place, ranges)| (place, merged(ranges))).collect();
    let is_replaced = |key: &Key| {
        log_place(key)
            .is_some_and(|(place, range)| held.get(&place).is_some_and(|held| without(range, held).is_empty()))
    };
    gone.into_iter().filter(|key| !is_replaced(key)).map(|key| format!("{key} is missing")).collect()
}

const RESTORE_POINTS: u8 = 0;

/// The restore point that an object is the document of.
fn point_of(object: &str) -> Option<RestorePointId> {
    (order(object) == RESTORE_POINTS).then(|| paths::parse_restore_point(&Key::from(object))).flatten()
}

/// Restore points, what they name, what that names.
fn order(object: &str) -> u8 {
    match object {
        object if object.starts_with("restore-points/") => RESTORE_POINTS,
        object if object.starts_with("pins/") => 1,
        object if object.contains("/snapshots/") => 2,
        _ => 3,
    }
}

/// What retention may take away at all. Exports, deployments and the documents of timelines are not its business.
fn is_prunable(key: &Key) -> bool {
    let parts: Vec<&str> = key.as_ref().split('/').collect();
    match parts.as_slice() {
        ["restore-points" | "pins", name] => name.ends_with(".json"),
        ["instance", name] => name.ends_with(".tar.zst"),
        ["databases", _, "timelines", _, "log", ..] => paths::parse_log(key).is_some(),
        ["databases", _, "snapshots", ..] => paths::parse_snapshot(key).is_some(),
        ["databases", _, "packs", name] => name.ends_with(".pack"),
        _ => false,
    }
}

/// The log that is gone once `due` is deleted: what was gone before, and what no object holds after that.
fn removed_log(before: Option<&Retention>, listing: &Listing, due: &[Marked]) -> Vec<RemovedLog> {
    let going: BTreeSet<&str> = due.iter().map(|marked| marked.object.as_str()).collect();
    let mut gone: BTreeMap<(Identity, TimelineId), Vec<(u64, u64)>> = BTreeMap::new();
    let mut held: BTreeMap<(Identity, TimelineId), Vec<(u64, u64)>> = BTreeMap::new();
    for key in listing.keys() {
        let Some((place, range)) = log_place(key) else { continue };
        let side = if going.contains(key.as_ref()) { &mut gone } else { &mut held };
        side.entry(place).or_default().push(range);
    }
    for removed in before.iter().flat_map(|before| &before.removed) {
        let place = (removed.database, removed.timeline);
        gone.entry(place).or_default().push((removed.first.0, removed.last.0));
    }
    let mut all = Vec::new();
    for (place, ranges) in gone {
        let held = merged(held.remove(&place).unwrap_or_default());
        for (first, last) in merged(ranges) {
            for (first, last) in without((first, last), &held) {
                let (database, timeline) = place;
                all.push(RemovedLog { database, timeline, first: Offset(first), last: Offset(last) });
            }
        }
    }
    all
}

fn log_place(key: &Key) -> Option<((Identity, TimelineId), (u64, u64))> {
    let parts: Vec<&str> = key.as_ref().split('/').collect();
    let ["databases", database, "timelines", timeline, "log", ..] = parts.as_slice() else { return None };
    let (first, last) = paths::parse_log(key)?;
    Some(((database.parse().ok()?, timeline.parse().ok()?), (first.0, last.0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_compaction_replaced_meanwhile_is_not_missing() {
        let database = Identity([1; 32]);
        let log = |level, first, last| paths::log(&database, TimelineId(1), level, Offset(first), Offset(last));
        let needs = Needs { objects: [log(0, 0, 4), log(0, 5, 9), log(0, 10, 14)].into(), problems: Vec::new() };
        let missing = |held: &[Key]| missing_of(&needs, &held.iter().map(|key| (key.clone(), 1)).collect());
        assert_eq!(missing(&[log(0, 0, 4), log(0, 5, 9), log(0, 10, 14)]), [] as [&str; 0]);
        assert_eq!(missing(&[log(1, 0, 9), log(0, 10, 14)]), [] as [&str; 0], "a merged object holds both");
        assert_eq!(missing(&[log(1, 0, 9)]), [format!("{} is missing", log(0, 10, 14))]);
        let elsewhere = paths::log(&database, TimelineId(2), 1, Offset(0), Offset(14));
        assert_eq!(missing(&[elsewhere]).len(), 3, "another timeline holds another history");
    }
}
