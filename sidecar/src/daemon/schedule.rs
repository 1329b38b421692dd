//! Schedules: what the daemon does at which time. A run that was missed while the daemon was down is made up once; a run
//! never overlaps the one before; all runs of the same minute on many machines can be spread by jitter. What a run came to
//! is kept on disk, so that a restart does not end an alert.

mod outcome;
mod times;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use opentelemetry::KeyValue;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_cron_scheduler::{Job, JobScheduler, JobSchedulerError};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::clock::Clock;
use crate::config::value::Cron;
use crate::daemon::conditions::{ConditionKind, Ends, Subject, watched};
use crate::daemon::schedule::outcome::{Outcome, OutcomeFile, Running};
use crate::daemon::schedule::times::Times;
use crate::daemon::state::{ScheduleStatus, StateDir};
use crate::daemon::{Daemon, DaemonError};
use crate::durable::{FileError, OnPath};
use crate::observe::metrics;

/// What can be wrong with schedules.
#[derive(Debug, thiserror::Error)]
pub enum ScheduleError {
    #[error("the schedule of {name} cannot be used: {reason}")]
    Unusable { name: &'static str, reason: String },
    #[error("the scheduler failed: {0}")]
    Scheduler(#[from] JobSchedulerError),
}

/// What can be scheduled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Task {
    RestorePoint,
    Verify,
    Prune,
    #[cfg(feature = "client")]
    Export,
    #[cfg(feature = "client")]
    Drill,
}

impl Task {
    fn name(self) -> &'static str {
        match self {
            Self::RestorePoint => "restore_point",
            Self::Verify => "verify",
            Self::Prune => "prune",
            #[cfg(feature = "client")]
            Self::Export => "export",
            #[cfg(feature = "client")]
            Self::Drill => "drill",
        }
    }
}

/// One task with its times.
struct Schedule {
    task: Task,
    cron: Cron,
    zone: chrono_tz::Tz,
    jitter: Duration,
    file: OutcomeFile,
    progress: Mutex<Progress>,
    daemon: Arc<Daemon>,
    /// One run at a time.
    running: tokio::sync::Mutex<()>,
}

/// What changes of a schedule.
#[derive(Debug, Clone, Default)]
struct Progress {
    outcome: Outcome,
    is_running: bool,
    next: Option<Timestamp>,
}

/// How often it is looked whether a run is due.
const TICK: Duration = Duration::from_secs(1);
/// A clock that steps back by more than this is worth a line in the log.
const STEP: jiff::SignedDuration = jiff::SignedDuration::from_secs(60);

/// Runs the schedules until the daemon ends.
pub(super) async fn run(daemon: Arc<Daemon>, state_dir: &StateDir) -> Result<(), DaemonError> {
    let dir = state_dir.path().join("schedules");
    std::fs::create_dir_all(&dir).on("create", &dir)?;
    let clock = Arc::clone(&daemon.clock);
    let mut schedules = Vec::new();
    // They end with this: the next daemon of this process has a lease and runs of its own.
    let mut runs: Vec<AbortOnDropHandle<()>> = Vec::new();
    for (task, cron) in tasks(&daemon) {
        let Some(cron) = cron else { continue };
        let file = OutcomeFile::new(&dir, task.name());
        let outcome = file.read(daemon.repository.info.id).found(clock.now());
        let parsed = cron.parse().map_err(|reason| ScheduleError::Unusable { name: task.name(), reason })?;
        let config = &daemon.config.schedule;
        let since = outcome.last_run.or(outcome.first_seen);
        let mut times = Times::new(parsed, config.time_zone.0, clock.now(), since);
        let schedule = Arc::new(Schedule {
            task,
            cron,
            zone: config.time_zone.0,
            jitter: config.jitter.0,
            file,
            progress: Mutex::new(Progress { outcome, ..Progress::default() }),
            daemon: Arc::clone(&daemon),
            running: tokio::sync::Mutex::new(()),
        });
        schedule.keep(|_| {});
        if times.is_due(clock.now()) {
            tracing::info!(schedule = task.name(), "a run was missed and is made up for");
            runs.push(schedule.start());
        }
        schedule.update(|progress| progress.next = times.next());
        schedules.push((schedule, times));
    }
    let ticks = Ticks::start().await.map_err(ScheduleError::from)?;
    let mut before = clock.now();
    loop {
        ticks.next(clock.as_ref()).await;
        let now = clock.now();
        if before.duration_since(now) > STEP {
            tracing::warn!(event = "clock_stepped_back", from = %before, to = %now, "next runs are computed from the new time");
        }
        before = now;
        for (schedule, times) in &mut schedules {
            if times.is_due(now) {
                runs.retain(|run| !run.is_finished());
                runs.push(schedule.start());
            }
            schedule.update(|progress| progress.next = times.next());
        }
    }
}

fn tasks(daemon: &Daemon) -> Vec<(Task, Option<Cron>)> {
    let config = daemon.config.schedule.clone();
    vec![
        (Task::RestorePoint, config.restore_point),
        (Task::Verify, config.verify),
        (Task::Prune, config.prune),
        #[cfg(feature = "client")]
        (Task::Export, config.export),
        #[cfg(feature = "client")]
        (Task::Drill, config.drill),
    ]
}

/// Wakes the schedules. The scheduler counts by the wall clock, and so falls silent when that steps back; the times are
/// therefore ours, and so is a second way to wake.
struct Ticks {
    scheduler: JobScheduler,
    ticked: Arc<Notify>,
}

impl Ticks {
    async fn start() -> Result<Self, JobSchedulerError> {
        let scheduler = JobScheduler::new().await?;
        let ticked = Arc::new(Notify::new());
        let tick = Arc::clone(&ticked);
        let job = Job::new_repeated_async(TICK, move |_, _| {
            tick.notify_one();
            Box::pin(std::future::ready(()))
        });
        scheduler.add(job?).await?;
        scheduler.start().await?;
        Ok(Self { scheduler, ticked })
    }

    async fn next(&self, clock: &dyn Clock) {
        tokio::select! {
            () = self.ticked.notified() => {}
            () = clock.sleep(TICK) => {}
        }
    }
}

/// Ends the scheduler's own task with us.
impl Drop for Ticks {
    fn drop(&mut self) {
        let mut scheduler = self.scheduler.clone();
        tokio::spawn(async move { scheduler.shutdown().await });
    }
}

impl Schedule {
    fn subject(&self) -> Subject {
        Subject::Schedule(self.task.name().to_owned())
    }

    fn start(self: &Arc<Self>) -> AbortOnDropHandle<()> {
        let (run, part) = (Arc::clone(self).once(), ("a scheduled run", self.subject()));
        AbortOnDropHandle::new(watched(&self.daemon.state, part, Ends::WhenDone, CancellationToken::new(), run))
    }

    async fn once(self: Arc<Self>) {
        let Ok(_one) = self.running.try_lock() else {
            self.count("skipped");
            tracing::warn!(schedule = self.task.name(), "the run before is not done; this one is left out");
            return;
        };
        let clock = Arc::clone(&self.daemon.clock);
        clock.sleep(draw_jitter(self.jitter)).await;
        let before = self.progress.lock().outcome.last_run;
        let begun = Begun { schedule: &self, before, is_done: false };
        self.keep(|progress| {
            progress.is_running = true;
            progress.outcome.repository = Some(self.daemon.repository.info.id);
            let since = clock.now();
            progress.outcome.last_run = Some(since);
            progress.outcome.running = Some(Running { since, before });
        });
        let result = self.work().await;
        if let Err(message) = &result {
            tracing::error!(schedule = self.task.name(), error = %message, "a scheduled run failed");
        }
        begun.done();
        self.count(if result.is_ok() { "ok" } else { "failed" });
        self.keep(|progress| {
            progress.is_running = false;
            (progress.outcome.running, progress.outcome.killed) = (None, 0);
            if result.is_ok() {
                progress.outcome.last_success = Some(clock.now());
            }
            progress.outcome.last_ok = Some(result.is_ok());
            progress.outcome.last_message = Some(result.unwrap_or_else(|error| error));
        });
    }

    async fn work(&self) -> Result<String, String> {
        match self.task {
            Task::RestorePoint => {
                let report = self.daemon.restore_point(None).await.map_err(|error| error.to_string())?;
                match report.problems.first() {
                    None => Ok(format!("restore point {}", report.restore_point)),
                    Some(problem) => Err(format!("restore point {} was made, but {problem}", report.restore_point)),
                }
            }
            #[cfg(feature = "client")]
            Task::Drill => {
                let result = self.daemon.drill().await.map_err(|error| error.to_string())?;
                match result.findings.first() {
                    None => Ok(format!("restore point {} was restored and served", result.restore_point)),
                    Some(finding) => Err(format!("restore point {}: {}", result.restore_point, finding.message)),
                }
            }
            #[cfg(feature = "client")]
            Task::Export => {
                let exporting = self.daemon.export(self.daemon.scheduled_export()).await;
                let report = exporting.map_err(|error| error.to_string())?;
                let rows: u64 = report.tables.iter().map(|table| table.rows).sum();
                Ok(format!("{rows} rows were exported"))
            }
            Task::Prune => {
                let report = self.daemon.prune(false).await.map_err(|error| error.to_string())?;
                let done = format!("{} objects were deleted", report.deleted.objects);
                match report.refused.len() {
                    0 => Ok(done),
                    refused => Ok(format!("{done}, {refused} refused by the store")),
                }
            }
            Task::Verify => {
                let report = self.daemon.verify_when_free().await.map_err(|error| error.to_string())?;
                match report.findings.first() {
                    None => Ok(format!("{} objects are good", report.objects)),
                    Some(_) if report.is_sound() => {
                        Ok(format!("{} objects are as they were stored; no key is here to open them", report.objects))
                    }
                    Some(finding) => Err(format!(
                        "{} findings, the first: {}: {}; run `inner-universe verify`",
                        report.findings.len(),
                        finding.object,
                        finding.message
                    )),
                }
            }
        }
    }

    fn count(&self, outcome: &'static str) {
        let labels = [KeyValue::new("schedule", self.task.name()), KeyValue::new("outcome", outcome)];
        metrics::SCHEDULE_RUNS.add(1, &labels);
    }

    /// Changes what is known, and keeps it for the next start.
    fn keep(&self, change: impl FnOnce(&mut Progress)) {
        let outcome = self.update(change).outcome;
        let written = self.file.write(&outcome);
        if let Err(error) = &written {
            tracing::warn!(%error, "the time of the run was not kept");
        }
        self.daemon.state.check(ConditionKind::StateDirectory, self.subject(), written);
    }

    /// Changes what is known, and what `status` says.
    fn update(&self, change: impl FnOnce(&mut Progress)) -> Progress {
        let progress = {
            let mut progress = self.progress.lock();
            change(&mut progress);
            progress.clone()
        };
        let Progress { outcome, is_running, next } = progress.clone();
        self.daemon.state.schedule(ScheduleStatus {
            name: self.task.name().to_owned(),
            cron: self.cron.as_str().to_owned(),
            time_zone: self.zone.name().to_owned(),
            next_run: next,
            running: is_running,
            last_run: outcome.last_run,
            last_ok: outcome.last_ok,
            last_message: outcome.last_message,
            last_success: outcome.last_success,
        });
        progress
    }
}

/// A run that is under way. One that is cut off, as archiving is interrupted or ends, is made up for.
struct Begun<'a> {
    schedule: &'a Schedule,
    /// When the run before began.
    before: Option<Timestamp>,
    is_done: bool,
}

impl Begun<'_> {
    fn done(mut self) {
        self.is_done = true;
    }
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        if self.is_done {
            return;
        }
        tracing::warn!(schedule = self.schedule.task.name(), "a scheduled run was cut off and will be made up for");
        self.schedule.count("cut_off");
        self.schedule.keep(|progress| {
            progress.is_running = false;
            progress.outcome.running = None;
            progress.outcome.last_run = self.before;
        });
    }
}

/// A delay below `limit`, any as likely as another.
fn draw_jitter(limit: Duration) -> Duration {
    // A fresh ULID's random part is random enough to spread load.
    let share = (ulid::Ulid::new().random() % 1000) as u32;
    limit * share / 1000
}

impl From<FileError> for ScheduleError {
    fn from(error: FileError) -> Self {
        Self::Unusable { name: "runs", reason: error.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jitter_stays_below_its_limit_and_spreads_over_all_of_it() {
        let limit = Duration::from_secs(60);
        let drawn: Vec<_> = (0..2000).map(|_| draw_jitter(limit)).collect();
        for tenth in 0..10 {
            let (from, to) = (limit * tenth / 10, limit * (tenth + 1) / 10);
            let found = drawn.iter().filter(|delay| **delay >= from && **delay < to).count();
            assert!((100..=300).contains(&found), "{found} of 2000 delays lie from {from:?} to {to:?}");
        }
        assert!(drawn.iter().all(|delay| *delay < limit));
        assert_eq!(draw_jitter(Duration::ZERO), Duration::ZERO);
    }
}
