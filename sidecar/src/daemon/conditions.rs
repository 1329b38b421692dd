//! What is wrong now: the one list from which readiness, `status`, the gauge, the status page and the heartbeat are made.
//!
//! Invariants: a condition is known by its kind and its subject, and keeps the time at which it was first seen for as long
//! as it holds; each source replaces or clears only what it raised itself; a database that is gone takes its conditions with
//! it.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;

use jiff::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::daemon::state::State;

/// What can be wrong. The names are stable: alerts match them. In the order in which they are reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ConditionKind {
    /// The repository is not where it was, or another one is there.
    RepositoryMissing,
    /// No lease: the data directory, the store or the lease is being waited for.
    NotArchiving,
    /// The supervised server does not run.
    ServerDown,
    /// An error keeps a database's log from being archived.
    ArchiveFailing,
    /// A database is further behind than `archive.lag_alert`.
    ArchiveBehind,
    /// A log grows on the disk, and nothing of it is archived.
    ArchiveStalled,
    /// A log ends in bytes that are not a commit.
    LogDamaged,
    /// A database's directory or log is not on the disk.
    LogMissing,
    /// The lease was not renewed in time, so nothing can be written.
    LeaseExpired,
    /// The control database cannot be read, so new databases are not followed.
    DatabasesUnknown,
    /// The instance changed and no restore point holds the change.
    InstanceNotCaptured,
    /// A native snapshot cannot be archived.
    SnapshotFailing,
    /// Small log objects are not being merged.
    CompactionFailing,
    /// The repository is not being surveyed, so its gauges are old.
    SurveyFailing,
    /// A task of the daemon panicked, or ended although nothing stopped it.
    TaskEnded,
    /// The last run of a schedule failed.
    ScheduleFailed,
    /// The directory for temporary files cannot be used.
    TemporaryDirectory,
    /// The state directory cannot be written.
    StateDirectory,
    /// A part of the daemon beside archiving does not work: its control socket, schedules or heartbeat.
    PartFailing,
}

impl ConditionKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::RepositoryMissing => "repository_missing",
            Self::NotArchiving => "not_archiving",
            Self::ServerDown => "server_down",
            Self::ArchiveFailing => "archive_failing",
            Self::ArchiveBehind => "archive_behind",
            Self::ArchiveStalled => "archive_stalled",
            Self::LogDamaged => "log_damaged",
            Self::LogMissing => "log_missing",
            Self::LeaseExpired => "lease_expired",
            Self::DatabasesUnknown => "databases_unknown",
            Self::InstanceNotCaptured => "instance_not_captured",
            Self::SnapshotFailing => "snapshot_failing",
            Self::CompactionFailing => "compaction_failing",
            Self::SurveyFailing => "survey_failing",
            Self::TaskEnded => "task_ended",
            Self::ScheduleFailed => "schedule_failed",
            Self::TemporaryDirectory => "temporary_directory",
            Self::StateDirectory => "state_directory",
            Self::PartFailing => "part_failing",
        }
    }

    /// What the operator should do.
    fn advice(self) -> &'static str {
        match self {
            Self::RepositoryMissing => {
                "mount the disk or correct the address; see the runbook before a new one is made"
            }
            Self::NotArchiving => {
                "see the log for what is tried again, and check store, credentials and data directory"
            }
            Self::ServerDown => "see the server's own log for why it ended",
            Self::ArchiveFailing | Self::ArchiveBehind => "check the store and the log on the server's disk",
            Self::ArchiveStalled => "restart the sidecar, and report it with the sidecar's log",
            Self::LogDamaged => {
                "if the server is down, start it: it drops the end of a write that a crash cut off; otherwise restore the \
                 database, or delete it"
            }
            Self::LogMissing => "restore the database, or delete it from the server",
            Self::LeaseExpired => "check that the store can be reached and accepts the credentials",
            Self::DatabasesUnknown => "check the control database and the directory for temporary files",
            Self::InstanceNotCaptured => "mend the cause; until then the newest change cannot be restored",
            Self::SnapshotFailing => {
                "check the server's snapshots and disk; the log holds everything, a restore takes longer"
            }
            Self::CompactionFailing => {
                "check the store's permissions to write and delete; restores take longer until then"
            }
            Self::SurveyFailing => "check that the store lists what it holds; sizes and times in the metrics are old",
            Self::TaskEnded => "restart the sidecar, and report it with the sidecar's log",
            Self::ScheduleFailed => "mend the cause, then run the command by hand to see that it is mended",
            Self::TemporaryDirectory => "make the directory that TMPDIR names, writable and with free space",
            Self::StateDirectory => "make archive.state_dir writable, with free space",
            Self::PartFailing => "mend the cause; it is tried again",
        }
    }
}

/// What a condition is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    Sidecar,
    Database(String),
    Schedule(String),
    Part(&'static str),
}

impl Subject {
    fn database(&self) -> Option<String> {
        if let Self::Database(name) = self { Some(name.clone()) } else { None }
    }

    fn schedule(&self) -> Option<String> {
        if let Self::Schedule(name) = self { Some(name.clone()) } else { None }
    }
}

/// Something that is wrong and keeps the daemon from being ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Condition {
    pub kind: ConditionKind,
    /// The database it is about, if it is about one.
    pub database: Option<String>,
    /// The schedule it is about, if it is about one.
    pub schedule: Option<String>,
    /// When it was first seen.
    pub since: Timestamp,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub advice: String,
}

/// Which part of the daemon found a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// A task, about its own work.
    Task,
    /// A look at the daemon's status.
    Status,
    /// A look at the disk, apart from the followers.
    Disk,
}

/// A condition that a look found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    pub kind: ConditionKind,
    pub subject: Subject,
    pub message: String,
}

/// Every condition that holds now.
#[derive(Default)]
pub(super) struct Conditions(Mutex<BTreeMap<(ConditionKind, Subject), Held>>);

struct Held {
    since: Timestamp,
    message: String,
    source: Source,
}

impl Conditions {
    pub fn raise(&self, finding: Finding, source: Source, now: Timestamp) {
        let Finding { kind, subject, message } = finding;
        let mut held = self.0.lock();
        let since = held.get(&(kind, subject.clone())).map_or(now, |before| before.since);
        held.insert((kind, subject), Held { since, message, source });
    }

    pub fn clear(&self, kind: ConditionKind, subject: &Subject) {
        self.0.lock().remove(&(kind, subject.clone()));
    }

    /// Clears everything about a database that is gone.
    pub fn forget(&self, database: &str) {
        let gone = Subject::Database(database.to_owned());
        self.0.lock().retain(|(_, subject), _| *subject != gone);
    }

    /// Clears what tasks found about a database whose tasks are started again.
    pub fn forget_tasks(&self, database: &str) {
        let again = Subject::Database(database.to_owned());
        self.0.lock().retain(|(_, subject), held| *subject != again || held.source != Source::Task);
    }

    /// Puts `found` in the place of everything that `source` found before.
    pub fn replace(&self, source: Source, found: Vec<Finding>, now: Timestamp) {
        self.0.lock().retain(|(kind, subject), held| {
            held.source != source || found.iter().any(|new| new.kind == *kind && new.subject == *subject)
        });
        for finding in found {
            self.raise(finding, source, now);
        }
    }

    pub fn list(&self) -> Vec<Condition> {
        let held = self.0.lock();
        let describe = |((kind, subject), held): (&(ConditionKind, Subject), &Held)| Condition {
            kind: *kind,
            database: subject.database(),
            schedule: subject.schedule(),
            since: held.since,
            message: held.message.clone(),
            advice: kind.advice().to_owned(),
        };
        held.iter().map(describe).collect()
    }
}

/// Failures in a row before one that may pass by itself becomes a condition.
const STREAK: u32 = 3;

/// Raises a condition when the same work has failed several times in a row, and clears it when it succeeds.
pub(super) struct Streak {
    state: Arc<State>,
    kind: ConditionKind,
    subject: Subject,
    failures: u32,
}

impl Streak {
    pub fn new(state: &Arc<State>, kind: ConditionKind, subject: Subject) -> Self {
        Self { state: Arc::clone(state), kind, subject, failures: 0 }
    }

    pub fn failed(&mut self, message: impl Into<String>) {
        self.failures += 1;
        if self.failures >= STREAK {
            self.state.raise(self.kind, self.subject.clone(), message);
        }
    }

    pub fn succeeded(&mut self) {
        self.failures = 0;
        self.state.clear(self.kind, &self.subject);
    }
}

/// When a task may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ends {
    /// Only when it is stopped.
    WhenStopped,
    /// Also by itself: it has nothing to do where it is not configured.
    WhenDone,
}

/// Runs a task, which ends with what is returned. If it panics, or ends too early, that is a condition until the sidecar is restarted.
pub(super) fn watched(
    state: &Arc<State>,
    (part, subject): (&'static str, Subject),
    ends: Ends,
    stop: CancellationToken,
    task: impl Future<Output = ()> + Send + 'static,
) -> JoinHandle<()> {
    let (state, task) = (Arc::clone(state), AbortOnDropHandle::new(tokio::spawn(task)));
    tokio::spawn(async move {
        let how = match task.await {
            Ok(()) if ends == Ends::WhenDone || stop.is_cancelled() => return,
            Ok(()) => "ended although nothing stopped it".to_owned(),
            Err(error) => format!("ended with an error of its own: {error}"),
        };
        tracing::error!(event = "task_ended", part, subject = ?subject, "{part} {how}");
        state.raise(ConditionKind::TaskEnded, subject, format!("{part} {how}"));
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::clock::SystemClock;
    use crate::config::value::Period;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("a time")
    }

    fn finding(kind: ConditionKind, database: &str, message: &str) -> Finding {
        Finding { kind, subject: Subject::Database(database.to_owned()), message: message.to_owned() }
    }

    fn state() -> Arc<State> {
        Arc::new(State::new(Arc::new(SystemClock), Path::new("/"), Period::seconds(60)))
    }

    #[test]
    fn metrics_and_documents_use_one_name() {
        for kind in [ConditionKind::NotArchiving, ConditionKind::LogMissing, ConditionKind::StateDirectory] {
            assert_eq!(serde_json::to_value(kind).expect("JSON"), kind.name());
        }
    }

    #[test]
    fn a_condition_keeps_its_first_time() {
        let conditions = Conditions::default();
        conditions.replace(Source::Disk, vec![finding(ConditionKind::LogMissing, "a", "first")], at(10));
        conditions.replace(Source::Disk, vec![finding(ConditionKind::LogMissing, "a", "second")], at(20));
        let found = conditions.list();
        assert_eq!((found.len(), found[0].since, found[0].message.as_str()), (1, at(10), "second"));
        assert_eq!((found[0].database.as_deref(), found[0].schedule.as_deref()), (Some("a"), None));
        conditions.replace(Source::Disk, Vec::new(), at(30));
        assert_eq!(conditions.list(), []);
    }

    #[test]
    fn a_look_clears_only_its_own() {
        let conditions = Conditions::default();
        conditions.raise(finding(ConditionKind::SnapshotFailing, "a", "broken"), Source::Task, at(1));
        conditions.raise(finding(ConditionKind::SnapshotFailing, "b", "broken"), Source::Task, at(1));
        conditions.replace(Source::Status, Vec::new(), at(2));
        assert_eq!(conditions.list().len(), 2);
        conditions.forget("a");
        assert_eq!(conditions.list()[0].database.as_deref(), Some("b"), "a deleted database takes its own with it");
        conditions.clear(ConditionKind::SnapshotFailing, &Subject::Database("b".to_owned()));
        assert_eq!(conditions.list(), []);
    }

    #[test]
    fn a_streak_of_failures_is_a_condition() {
        let state = state();
        let mut streak = Streak::new(&state, ConditionKind::CompactionFailing, Subject::Database("d".to_owned()));
        let holds = || state.status().conditions.iter().any(|found| found.kind == ConditionKind::CompactionFailing);
        streak.failed("once");
        streak.failed("twice");
        assert!(!holds(), "what passes by itself wakes nobody");
        streak.failed("again");
        assert!(holds());
        streak.succeeded();
        assert!(!holds());
        streak.failed("once");
        assert!(!holds(), "it counts from the start");
    }

    #[tokio::test]
    async fn a_task_that_ends_is_a_condition() {
        let ended = async |ends, stopped: bool, task: futures::future::BoxFuture<'static, ()>| {
            let (state, stop) = (state(), CancellationToken::new());
            if stopped {
                stop.cancel();
            }
            let part = ("the archiver", Subject::Database("d".to_owned()));
            let watching = watched(&state, part, ends, stop, task);
            tokio::time::timeout(Duration::from_secs(10), watching).await.expect("it ends").expect("it is joined");
            let found = state.status().conditions;
            found.into_iter().find(|found| found.kind == ConditionKind::TaskEnded)
        };
        let done = || Box::pin(std::future::ready(()));
        let panics = || Box::pin(async { panic!("a fault of the program") });
        let found = ended(Ends::WhenStopped, false, panics()).await.expect("a panic is seen");
        assert_eq!(found.database.as_deref(), Some("d"));
        assert!(found.message.starts_with("the archiver ended with an error of its own"), "{}", found.message);
        assert!(ended(Ends::WhenDone, true, panics()).await.is_some(), "whatever else is true");
        assert!(ended(Ends::WhenStopped, false, done()).await.is_some());
        assert!(ended(Ends::WhenStopped, true, done()).await.is_none());
        assert!(ended(Ends::WhenDone, false, done()).await.is_none());
    }
}
