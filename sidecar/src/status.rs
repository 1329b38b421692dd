//! Status: how far each database's log is archived, and what the newest restore point is.

use std::path::Path;

use jiff::Timestamp;
use serde::Serialize;

use crate::backup::READ_SIZE;
use crate::clock::Clock;
use crate::config::Config;
use crate::daemon::conditions::{Condition, ConditionKind};
use crate::daemon::health::{self, Readiness};
use crate::daemon::state::{self, DaemonStatus, ScheduleStatus, read_status};
use crate::datadir::control_db::ControlDbCopy;
use crate::datadir::log::{LogReader, Tail, segments};
use crate::datadir::{DataDir, DataDirError};
use crate::ids::{Identity, Offset, RestorePointId, TimelineId};
use crate::repository::manifest::LastDrill;
use crate::repository::{Repository, RepositoryError};

/// What can go wrong while looking.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error("a worker of the status stopped: {0}")]
    Worker(String),
}

/// The report. Field names are stable.
#[derive(Debug, Clone, Serialize, schemars::JsonSchema)]
pub struct StatusReport {
    pub databases: Vec<DatabaseStatus>,
    pub last_restore_point: Option<LastRestorePoint>,
    /// `None`: no drill was run.
    pub last_drill: Option<LastDrill>,
    pub schedules: Vec<ScheduleStatus>,
    /// `None` when no daemon ever ran on this data directory from this machine.
    pub daemon: Option<DaemonSummary>,
    /// What keeps the daemon from being ready; empty when it is, and when none runs.
    pub conditions: Vec<Condition>,
    pub problems: Vec<String>,
}

/// The daemon, as its own notes tell.
#[derive(Debug, Clone, Serialize, schemars::JsonSchema)]
pub struct DaemonSummary {
    pub running: bool,
    pub pid: u32,
    pub started_at: Timestamp,
    pub last_error: Option<String>,
}

/// One database's place.
#[derive(Debug, Clone, Serialize, schemars::JsonSchema)]
pub struct DatabaseStatus {
    pub identity: Identity,
    pub name: String,
    /// `None` while nothing is archived.
    pub timeline: Option<TimelineId>,
    /// The last transaction in the server's log; `None` while there is none.
    pub log_offset: Option<Offset>,
    pub archived_offset: Option<Offset>,
    pub lag_transactions: u64,
    /// Seconds by which the newest archived transaction is older than the newest in the log.
    pub lag_seconds: f64,
    pub last_commit_time: Option<Timestamp>,
    /// Bytes of this database's log objects, over all timelines.
    pub archived_bytes: u64,
    /// The error that the daemon is retrying.
    pub last_error: Option<String>,
}

/// The newest restore point.
#[derive(Debug, Clone, Serialize, schemars::JsonSchema)]
pub struct LastRestorePoint {
    pub id: RestorePointId,
    pub label: Option<String>,
    pub created_at: Timestamp,
    pub age_seconds: i64,
}

/// Looks at log and archive side by side.
///
/// # Errors
/// When either cannot be read.
pub async fn status(
    repository: &Repository,
    data: &DataDir,
    config: &Config,
    clock: &dyn Clock,
) -> Result<StatusReport, StatusError> {
    let control = {
        let data = data.clone();
        blocking(move || ControlDbCopy::take(&data)).await??
    };
    let daemon = read_status(config, data.root());
    let mut report = StatusReport {
        databases: Vec::new(),
        last_restore_point: None,
        last_drill: repository.last_drill().await?,
        schedules: Vec::new(),
        daemon: None,
        conditions: Vec::new(),
        problems: Vec::new(),
    };
    if let Some(daemon) = &daemon {
        report.tell_daemon(daemon, clock.now());
    }
    for database in &control.databases {
        let name = database.display_name();
        let Some(replica) = database.replica.map(|id| data.replica(id)) else {
            report.problems.push(format!("database {name} has no replica on this server"));
            continue;
        };
        let end = blocking(move || log_end(&replica.log_path())).await?;
        let end = match end {
            Ok(Some((offset, time, tail))) => {
                if let Tail::Unfinished { at, reason } = tail {
                    report.problems.push(format!(
                        "database {name}: the log ends at byte {at} of its last segment in something that is no commit \
                         ({reason}); a write under way or a crash leaves that, a running server would write on"
                    ));
                }
                Some((offset, time))
            }
            Ok(None) => None,
            Err(error) => {
                report.problems.push(format!("database {name}: {error}"));
                None
            }
        };
        let archived = archived_end(repository, &database.identity).await?;
        let (log_offset, last_time) = end.map_or((None, None), |(offset, time)| (Some(offset), time));
        let archived_offset = archived.map(|(_, offset, _)| offset);
        let behind = match (log_offset, archived_offset) {
            (Some(log), Some(archived)) => log.0.saturating_sub(archived.0),
            (Some(log), None) => log.0 + 1,
            (None, _) => 0,
        };
        let lag_micros = match (last_time, archived.and_then(|(.., time)| time)) {
            (Some(last), Some(archived)) if behind > 0 => (last - archived).max(0),
            _ => 0,
        };
        report.databases.push(DatabaseStatus {
            identity: database.identity,
            name,
            timeline: archived.map(|(timeline, ..)| timeline),
            log_offset,
            archived_offset,
            lag_transactions: behind,
            lag_seconds: std::time::Duration::from_micros(lag_micros.unsigned_abs()).as_secs_f64(),
            last_commit_time: last_time.and_then(|micros| Timestamp::from_microsecond(micros).ok()),
            archived_bytes: repository.log_bytes(&database.identity).await?,
            last_error: daemon.iter().flat_map(|daemon| &daemon.databases).find_map(|followed| {
                (followed.identity == database.identity).then(|| followed.error.clone()).flatten()
            }),
        });
        let alert = config.archive.lag_alert.0.as_secs_f64();
        if let Some(found) = report.databases.last().filter(|found| found.lag_seconds > alert) {
            report.problems.push(format!(
                "database {} is {:.0} s behind, more than archive.lag_alert ({})",
                found.name, found.lag_seconds, config.archive.lag_alert
            ));
        }
    }
    if let Some(id) = repository.restore_point_ids().await?.last() {
        match repository.restore_point(*id).await {
            Ok(point) => {
                report.last_restore_point = Some(LastRestorePoint {
                    id: point.id,
                    label: point.label,
                    created_at: point.created_at,
                    age_seconds: clock.now().duration_since(point.created_at).as_secs(),
                });
            }
            Err(error) => report.problems.push(error.to_string()),
        }
    } else {
        report.problems.push("there is no restore point; take one with `inner-universe backup create`".into());
    }
    Ok(report)
}

/// Whether the daemon of `data_dir` does its work, as far as its own notes tell.
pub fn ready(config: &Config, data_dir: &Path, clock: &dyn Clock) -> Readiness {
    let not = |reason: String| Readiness { ready: false, reasons: vec![reason] };
    let Some(daemon) = read_status(config, data_dir) else {
        return not(format!("no daemon has run on {}; start it with `inner-universe run`", data_dir.display()));
    };
    if daemon.running && state::has_ended(config, data_dir) {
        return not(format!("the daemon (process {}) has died; start it again", daemon.pid));
    }
    match daemon.running && daemon.is_stale(clock.now()) {
        true => {
            not(format!("the daemon (process {}) tells nothing of itself since {:.0}", daemon.pid, daemon.written_at))
        }
        false => health::readiness(&daemon),
    }
}

impl StatusReport {
    fn tell_daemon(&mut self, daemon: &DaemonStatus, now: Timestamp) {
        let age = now.duration_since(daemon.written_at).as_secs();
        let running = daemon.running && !daemon.is_stale(now);
        if daemon.running && !running {
            self.problems.push(format!(
                "the daemon (process {}) told nothing of itself for {age} s; see whether it runs, and start it again",
                daemon.pid
            ));
        }
        // A schedule's failure outlives the daemon. How far a database is behind is seen here, from log and archive.
        let shown = daemon.conditions.iter().filter(|condition| match condition.kind {
            ConditionKind::ScheduleFailed => true,
            ConditionKind::ArchiveBehind => false,
            _ => running,
        });
        self.problems.extend(shown.map(|condition| format!("{}; {}", condition.message, condition.advice)));
        if running {
            self.conditions = daemon.conditions.clone();
        }
        for database in &daemon.databases {
            let (name, events) = (&database.name, database.events.iter());
            self.problems.extend(events.map(|event| format!("database {name}, {:.0}: {}", event.at, event.message)));
        }
        self.schedules = daemon.schedules.clone();
        self.daemon = Some(DaemonSummary {
            running,
            pid: daemon.pid,
            started_at: daemon.started_at,
            last_error: daemon.last_error.clone(),
        });
    }
}

async fn archived_end(
    repository: &Repository,
    database: &Identity,
) -> Result<Option<(TimelineId, Offset, Option<i64>)>, RepositoryError> {
    let timelines = repository.timelines(database).await?;
    let Some(newest) = repository.newest_timeline(database, &timelines).await? else { return Ok(None) };
    let chain = repository.log_chain(database, &timelines, newest).await?;
    let Some(entry) = chain.entries.last() else { return Ok(None) };
    let header = repository.log_header(&entry.key()).await?;
    Ok(Some((newest, header.last, header.times.max)))
}

/// The last transaction of a log, the last time in it, and how it ends.
fn log_end(dir: &std::path::Path) -> Result<Option<(Offset, Option<i64>, Tail)>, DataDirError> {
    let Some(mut first) = segments(dir)?.last().map(|segment| segment.first) else { return Ok(None) };
    loop {
        let mut reader = LogReader::open(dir, first)?;
        let (mut buffer, mut last_time, mut found) = (Vec::new(), None, false);
        while let Some(batch) = reader.next_batch(READ_SIZE, &mut buffer)? {
            last_time = batch.times.last.or(last_time);
            found = true;
        }
        if found {
            return Ok(Some((Offset(reader.position().0 - 1), last_time, reader.tail().clone())));
        }
        // A fresh segment without a commit: the end is in the one before.
        match segments(dir)?.into_iter().rev().find(|segment| segment.first < first) {
            Some(segment) => first = segment.first,
            None => return Ok(None),
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, StatusError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| StatusError::Worker(error.to_string()))
}
