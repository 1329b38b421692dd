//! What a daemon does when it is asked to, by a schedule, a command or over HTTP: one of a kind at a time.

#[cfg(feature = "client")]
use std::path::PathBuf;
use std::sync::Arc;

#[cfg(feature = "client")]
use futures::FutureExt as _;
use opentelemetry::KeyValue;

use crate::backup::{self, BackupError, BackupOptions, BackupReport};
use crate::clock::Stopwatch;
use crate::daemon::state::StateDir;
use crate::daemon::{Daemon, health};
#[cfg(feature = "client")]
use crate::deploy::{DeployError, record::DeploymentRecord};
#[cfg(feature = "client")]
use crate::drill::promise::LiveServer;
#[cfg(feature = "client")]
use crate::drill::{DrillError, DrillOptions, DrillResult};
#[cfg(feature = "client")]
use crate::export::{ExportError, ExportOptions, ExportReport, Places};
use crate::ids::RestorePointId;
use crate::observe::metrics;
use crate::observe::own::{traced, work_span};
use crate::progress::Silent;
use crate::repository::RepositoryError;
use crate::repository::manifest::{RestorePoint, RestorePointList};
use crate::retention::policy::Policy;
use crate::retention::{self, PruneReport, RetentionError};
use crate::status::{StatusError, StatusReport};
use crate::verify::{VerifyOptions, VerifyReport};

impl Daemon {
    /// Makes a restore point from what the archivers have written.
    ///
    /// # Errors
    /// When a log is not archived in time, or the repository fails.
    pub async fn restore_point(&self, label: Option<String>) -> Result<BackupReport, BackupError> {
        let _one = self.restore_points.lock().await;
        let took = Stopwatch::start();
        let span = work_span!("restore point", label);
        let result = traced(span, self.make_restore_point(label)).await;
        let outcome = match &result {
            Ok(report) if report.problems.is_empty() => "ok",
            Ok(_) => "incomplete",
            Err(_) => "failed",
        };
        metrics::RESTORE_POINTS.add(1, &[KeyValue::new("outcome", outcome)]);
        metrics::RESTORE_POINT_DURATION.record(took.elapsed_seconds(), &[]);
        self.changed.notify_one();
        result
    }

    async fn make_restore_point(&self, label: Option<String>) -> Result<BackupReport, BackupError> {
        let sealed = self.repository.keys.seals() || self.allow_plain_keys;
        let options = BackupOptions {
            label,
            token_keys: self.config.spacetimedb_config.named_keys().filter(|_| sealed),
            allow_plain_keys: self.allow_plain_keys,
            level: Some(self.config.repository.compression_level),
        };
        let mut work = self.work(Arc::new(backup::Unobserved));
        #[cfg(feature = "client")]
        {
            work.witness = LiveServer::witness(&self.config, Arc::clone(&self.readers));
        }
        let work = Arc::new(work);
        let report = backup::create_from(&work, &self.followers, &self.data, &options).await?;
        self.state.restore_point(&report);
        tracing::info!(restore_point = %report.restore_point, "a restore point was made");
        Ok(report)
    }

    /// Reads back and checks everything that restore points name; `None` when that is being done already.
    ///
    /// # Errors
    /// When the repository fails.
    pub async fn verify(&self) -> Result<Option<VerifyReport>, RepositoryError> {
        match self.verifying.try_lock() {
            Ok(_one) => self.verify_alone().await.map(Some),
            Err(_) => Ok(None),
        }
    }

    /// As [`Self::verify`], once nothing else is at it.
    ///
    /// # Errors
    /// When the repository fails.
    pub async fn verify_when_free(&self) -> Result<VerifyReport, RepositoryError> {
        let _one = self.verifying.lock().await;
        self.verify_alone().await
    }

    async fn verify_alone(&self) -> Result<VerifyReport, RepositoryError> {
        let options = VerifyOptions::default();
        let verifying = crate::verify::verify(&self.repository, &options, Arc::new(Silent));
        let report = traced(work_span!("verify"), verifying).await?;
        self.verified(report.findings.len() as u64, report.is_sound());
        Ok(report)
    }

    /// Restores the newest restore point to a scratch directory and boots a server on it.
    ///
    /// # Errors
    /// When there is no restore point or no server, or the repository fails.
    #[cfg(feature = "client")]
    pub async fn drill(&self) -> Result<DrillResult, DrillError> {
        let options = DrillOptions { live: Some(self.data.root().to_owned()), ..DrillOptions::default() };
        let (clock, progress) = (Arc::clone(&self.clock), Arc::new(Silent));
        let work = crate::drill::drill(&self.repository, &self.config, &options, clock, progress).boxed();
        let result = traced(work_span!("drill"), work).await;
        self.changed.notify_one();
        result
    }

    /// Removes what retention does not keep. No restore point is made meanwhile: it could name what is being removed.
    ///
    /// # Errors
    /// When there is no policy, a kept restore point is broken, the clock is in doubt and `trust_clock` is not set, or the
    /// repository fails.
    pub async fn prune(&self, trust_clock: bool) -> Result<PruneReport, RetentionError> {
        // What may take long is waited for first: a restore point must not wait for it too.
        let _no_upload = self.followers.uploads.lock().await;
        let _no_look = self.verifying.lock().await;
        let _alone = self.restore_points.lock().await;
        let policy = Policy::new(&self.config.retention, self.config.schedule.time_zone.0);
        let work = async {
            // What is archived on a timeline that another writer has left behind is kept by nothing.
            self.followers.flush(self.clock.as_ref()).await;
            let grace = self.config.retention.grace.0;
            let plan = retention::plan_to_apply(&self.repository, &policy, grace, self.clock.now()).await?;
            retention::apply(&self.repository, &plan.trusting_clock(trust_clock), self.clock.as_ref()).await
        };
        let result = traced(work_span!("prune"), work).await;
        if let Ok(report) = &result {
            metrics::PRUNED_OBJECTS.add(report.deleted.objects, &[]);
            metrics::PRUNED_BYTES.add(report.deleted.bytes, &[]);
        }
        self.changed.notify_one();
        result
    }

    /// Exports tables of the configured database.
    ///
    /// # Errors
    /// When a table cannot be exported.
    #[cfg(feature = "client")]
    pub async fn export(&self, options: ExportOptions) -> Result<ExportReport, ExportError> {
        let _one = self.exporting.lock().await;
        let (data_dir, clock) = (self.data.root(), Arc::clone(&self.clock));
        let state_dir = StateDir::locate(&self.config, data_dir);
        let places = Places { data_dir: Some(data_dir), state_dir: Some(&state_dir) };
        let exporting = crate::export::export(&self.repository, &self.config, options, places, clock).boxed();
        let result = traced(work_span!("export"), exporting).await;
        let labels = [KeyValue::new("outcome", if result.is_ok() { "ok" } else { "failed" })];
        metrics::EXPORTS.add(1, &labels);
        for table in result.iter().flat_map(|report| &report.tables) {
            metrics::EXPORTED_ROWS.add(table.rows, &[KeyValue::new("table", table.table.clone())]);
        }
        result
    }

    /// What the schedule exports.
    #[cfg(feature = "client")]
    pub fn scheduled_export(&self) -> ExportOptions {
        ExportOptions {
            tables: self.config.export.tables.clone(),
            configuration: true,
            formats: self.config.export.formats.clone(),
            new_series: false,
            since: None,
        }
    }

    /// Keeps a record of a deployment; `false` when the repository at `url` is another one.
    ///
    /// # Errors
    /// When the repository fails.
    #[cfg(feature = "client")]
    pub async fn record_deployment(
        &self,
        url: &str,
        record: &DeploymentRecord,
        programs: &[PathBuf],
    ) -> Result<bool, DeployError> {
        if url != self.url {
            return Ok(false);
        }
        crate::deploy::record::keep(&self.repository, record, programs).await?;
        Ok(true)
    }

    /// What `inner-universe status` tells.
    ///
    /// # Errors
    /// When log or repository cannot be read.
    pub async fn status_report(&self) -> Result<StatusReport, StatusError> {
        crate::status::status(&self.repository, &self.data, &self.config, self.clock.as_ref()).await
    }

    /// Every restore point.
    ///
    /// # Errors
    /// When the repository fails.
    pub async fn restore_points(&self) -> Result<RestorePointList, RepositoryError> {
        self.repository.restore_points().await
    }

    /// One restore point.
    ///
    /// # Errors
    /// When it is missing, or the repository fails.
    pub async fn find_restore_point(&self, id: RestorePointId) -> Result<RestorePoint, RepositoryError> {
        self.repository.restore_point(id).await
    }

    pub(super) fn is_healthy(&self) -> Result<(), String> {
        let found = health::readiness(&self.state.status());
        if found.ready { Ok(()) } else { Err(found.reasons.join("; ")) }
    }

    pub(super) fn work(&self, observer: Arc<dyn backup::Observer>) -> backup::Work {
        backup::Work {
            repository: self.repository.clone(),
            clock: Arc::clone(&self.clock),
            progress: Arc::new(Silent),
            tally: Arc::default(),
            level: self.config.repository.compression_level,
            observer,
            witness: None,
        }
    }
}
