//! A look at the whole repository from time to time: how large it is, how new its newest restore point, how long a restore
//! would take. It lists, so it is rare.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::backup::{BackupError, blocking};
use crate::daemon::Daemon;
use crate::daemon::conditions::{ConditionKind, Streak, Subject};
use crate::daemon::history::TimelineView;
use crate::datadir::control_db::ControlDbCopy;
use crate::durable;
use crate::ids::RestorePointId;
use crate::repository::manifest::LastDrill;
use crate::restore::RestoreError;
use crate::restore::plan::{RestorePlan, RestoreRequest, plan};

/// How often, and soon after each restore point.
const INTERVAL: Duration = Duration::from_secs(300);
/// Restore points in a row are looked at once.
const PAUSE: Duration = Duration::from_secs(2);

/// Bytes a second that a restore fetches and unpacks, cautiously; `docs/benchmarks.md` has what was measured.
const FETCH_RATE: f64 = 50e6;
/// Transactions a second that a server replays when it opens a database: 1,000,000 took 46 to 60 s.
const REPLAY_RATE: f64 = 20e3;
/// Bytes of a snapshot that a server reads a second when it opens a database.
const SNAPSHOT_RATE: f64 = 60e6;
/// Until a server with an empty database serves.
const START_SECONDS: f64 = 3.0;

/// What was found last.
#[derive(Debug, Clone, Default)]
pub struct Survey {
    pub restore_points: Option<u64>,
    pub newest_restore_point: Option<Timestamp>,
    /// Seconds.
    pub restore_estimate: Option<f64>,
    /// By database name; `instance` is what belongs to none.
    pub usage: BTreeMap<String, Usage>,
    /// Bytes of each database's log on the server's disk.
    pub log_bytes: BTreeMap<String, u64>,
    pub timelines: Vec<TimelineView>,
    /// When a verification last found nothing.
    pub verified_at: Option<Timestamp>,
    /// Of the last verification.
    pub findings: Option<u64>,
    pub drill: Option<LastDrill>,
}

/// What lies in the repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    pub objects: u64,
    pub bytes: u64,
}

/// What the last verification found, kept so that a restart does not end an alert.
#[derive(Debug, Serialize, Deserialize)]
struct Verification {
    repository: RestorePointId,
    findings: u64,
    verified_at: Option<Timestamp>,
}

impl Daemon {
    /// A verification of the whole repository ended.
    pub(super) fn verified(&self, findings: u64, is_sound: bool) {
        let now = self.clock.now();
        let mut verified_at = None;
        self.state.survey(|survey| {
            survey.findings = Some(findings);
            if is_sound {
                survey.verified_at = Some(now);
            }
            verified_at = survey.verified_at;
        });
        let kept = Verification { repository: self.repository.info.id, findings, verified_at };
        let written = durable::replace(&self.verification, &serde_json::to_vec_pretty(&kept).unwrap_or_default());
        if let Err(error) = &written {
            tracing::warn!(%error, "what the verification found was not kept");
        }
        self.state.check(ConditionKind::StateDirectory, Subject::Schedule("verify".to_owned()), written);
    }

    /// What the last verification found before this start.
    pub(super) fn recall_verification(&self) {
        let found = std::fs::read(&self.verification).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let Some(Verification { repository, findings, verified_at }) = found else { return };
        if repository == self.repository.info.id {
            self.state.survey(|survey| {
                survey.findings = Some(findings);
                survey.verified_at = verified_at;
            });
        }
    }

    /// Surveys until the daemon ends.
    pub(super) async fn survey(&self) {
        let mut failures = Streak::new(&self.state, ConditionKind::SurveyFailing, Subject::Sidecar);
        loop {
            match self.look_at_repository().await {
                Ok(()) => failures.succeeded(),
                Err(error) => {
                    tracing::debug!(%error, "the repository is surveyed again later");
                    failures.failed(format!("the repository is not surveyed: {error}"));
                }
            }
            tokio::select! {
                () = self.clock.sleep(INTERVAL) => {}
                () = self.changed.notified() => self.clock.sleep(PAUSE).await,
            }
        }
    }

    async fn look_at_repository(&self) -> Result<(), BackupError> {
        let data = self.data.clone();
        let control = blocking(move || ControlDbCopy::take(&data)).await??;
        let names: BTreeMap<String, String> =
            control.databases.iter().map(|database| (database.identity.to_string(), database.display_name())).collect();
        let mut usage: BTreeMap<String, Usage> = BTreeMap::new();
        for (key, bytes) in self.repository.list(&object_store::path::Path::default()).await? {
            let mut parts = key.as_ref().split('/');
            let owner = match (parts.next(), parts.next()) {
                // A database that the server no longer has is known by the start of its identity.
                (Some("databases"), Some(identity)) => {
                    names.get(identity).cloned().unwrap_or_else(|| identity.chars().take(12).collect())
                }
                _ => "instance".to_owned(),
            };
            let used = usage.entry(owner).or_default();
            used.objects += 1;
            used.bytes += bytes;
        }
        let mut log_bytes = BTreeMap::new();
        for database in &control.databases {
            let Some(replica) = database.replica.map(|id| self.data.replica(id)) else { continue };
            let sum = move || {
                let files = std::fs::read_dir(replica.log_path()).into_iter().flatten().flatten();
                files.filter_map(|file| file.metadata().ok()).map(|kind| kind.len()).sum::<u64>()
            };
            log_bytes.insert(database.display_name(), blocking(sum).await?);
        }
        let ids = self.repository.restore_point_ids().await?;
        let newest = match ids.last() {
            Some(id) => Some(self.repository.restore_point(*id).await?.created_at),
            None => None,
        };
        let estimate = match plan(&self.repository, &RestoreRequest::default()).await {
            Ok(plan) => Some(estimate(&plan)),
            Err(RestoreError::NothingToRestore(_)) => None,
            Err(error) => {
                tracing::debug!(%error, "no estimate of a restore");
                None
            }
        };
        let timelines = self.timelines(&names).await?;
        let drill = self.repository.last_drill().await?;
        self.state.survey(|survey| {
            survey.timelines = timelines;
            survey.drill = drill;
            survey.restore_points = Some(ids.len() as u64);
            survey.newest_restore_point = newest;
            survey.restore_estimate = estimate;
            survey.usage = usage;
            survey.log_bytes = log_bytes;
        });
        Ok(())
    }
}

/// Of a database whose history forks without end only so many timelines are looked at, the newest.
const TIMELINES: usize = 50;

impl Daemon {
    async fn timelines(&self, names: &BTreeMap<String, String>) -> Result<Vec<TimelineView>, BackupError> {
        let mut found = Vec::new();
        for database in self.repository.databases().await? {
            let timelines = self.repository.timelines(&database).await?;
            for timeline in timelines.iter().rev().take(TIMELINES).rev() {
                let entries = self.repository.log_entries(&database, timeline.timeline).await?;
                let first = entries.iter().min_by_key(|entry| entry.first);
                let last = entries.iter().max_by_key(|entry| entry.last);
                let (Some(first), Some(last)) = (first, last) else { continue };
                let starts = self.repository.log_header(&first.key()).await?;
                let ends = self.repository.log_header(&last.key()).await?;
                let time = |micros: Option<i64>| Timestamp::from_microsecond(micros?).ok();
                let text = database.to_string();
                found.push(TimelineView {
                    database,
                    name: names.get(&text).cloned().unwrap_or_else(|| text.chars().take(12).collect()),
                    timeline: timeline.timeline,
                    reason: timeline.reason,
                    parent: timeline.parent,
                    fork_offset: timeline.fork_offset,
                    first_offset: starts.first,
                    last_offset: ends.last,
                    first_time: time(starts.times.first.or(starts.times.max)),
                    last_time: time(ends.times.max),
                    created_at: timeline.created_at,
                });
            }
        }
        Ok(found)
    }
}

/// Seconds until a server serves what `plan` restores.
fn estimate(plan: &RestorePlan) -> f64 {
    let server: f64 = plan
        .databases
        .iter()
        .map(|database| {
            let snapshot: u64 =
                database.snapshot.iter().flat_map(|snapshot| &snapshot.packs).map(|pack| pack.stored_bytes).sum();
            let from = database.snapshot.as_ref().map_or(0, |snapshot| snapshot.offset.0 + 1);
            (database.offset.0 + 1).saturating_sub(from) as f64 / REPLAY_RATE + snapshot as f64 / SNAPSHOT_RATE
        })
        .sum();
    START_SECONDS + plan.bytes_to_read as f64 / FETCH_RATE + server
}
