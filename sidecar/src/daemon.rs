//! The daemon: everything that runs as long as the sidecar runs, under one lease.
//!
//! Invariants: nothing is written without the lease, and a lost lease stops everything; an outage of the store is waited
//! out, never passed on to the server; told to stop, every log is written to its end first, within a bounded time.

pub mod control;
mod followers;
mod gauges;
pub mod health;
pub mod history;
pub mod schedule;
pub mod state;
pub mod survey;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use backon::BackoffBuilder;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use opentelemetry::KeyValue;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::backup::{self, BackupError, BackupOptions, BackupReport};
use crate::clock::{Clock, Stopwatch, patience};
use crate::config::Config;
use crate::daemon::followers::Followers;
use crate::daemon::schedule::ScheduleError;
use crate::daemon::state::{State, StateDir};
use crate::datadir::{DataDir, DataDirError};
#[cfg(feature = "client")]
use crate::deploy::{DeployError, record::DeploymentRecord};
#[cfg(feature = "client")]
use crate::drill::promise::LiveServer;
#[cfg(feature = "client")]
use crate::drill::{DrillError, DrillOptions, DrillResult};
use crate::durable::FileError;
#[cfg(feature = "client")]
use crate::export::{ExportError, ExportOptions, ExportReport};
use crate::ids::RestorePointId;
use crate::observe::calls::CallStreams;
use crate::observe::module_logs::ModuleLogs;
use crate::observe::otlp::OtlpError;
use crate::observe::own::{traced, work_span};
use crate::observe::provider::{Telemetry, TelemetryError};
use crate::observe::{heartbeat, metrics};
use crate::progress::Silent;
use crate::repository::crypto::Keyring;
use crate::repository::lease::{self, Lease, LeaseDocument};
use crate::repository::manifest::{RestorePoint, RestorePointList};
use crate::repository::{Repository, RepositoryError};
use crate::retention::policy::Policy;
use crate::retention::{self, PruneReport, RetentionError};
use crate::standalone::supervisor::{Supervisor, SupervisorError, Switch, Watched};
use crate::status::{StatusError, StatusReport};
use crate::verify::{VerifyOptions, VerifyReport};

/// From being told to stop until the process ends, whatever the store does.
const STOP_LIMIT: Duration = Duration::from_secs(8);
/// From the end of everything else until the process ends, whatever a collector does.
pub const TELEMETRY_LIMIT: Duration = Duration::from_secs(1);
/// How often replicas and the instance are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// What ends a daemon before it is told to stop.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Backup(#[from] BackupError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    #[error(transparent)]
    Otlp(#[from] OtlpError),
}

/// Who tells the outside about a daemon.
pub trait Interface: Send + Sync {
    /// The daemon archives from now on.
    fn serves(&self, daemon: Arc<Daemon>);

    /// Listens and serves until `stop`.
    fn run(self: Arc<Self>, stop: CancellationToken) -> BoxFuture<'static, ()>;
}

/// Makes the interface of a daemon that is about to start.
pub type MakeInterface = fn(Config, Arc<dyn Clock>, Arc<State>, Arc<Telemetry>) -> Arc<dyn Interface>;

/// How to run.
pub struct DaemonOptions {
    pub data_dir: PathBuf,
    pub state_dir: StateDir,
    pub config: Config,
    pub url: String,
    pub keys: Keyring,
    /// Take the lease from whoever holds it.
    pub force: bool,
    /// Wait for a lease that another holds, rather than end.
    pub wait: bool,
    pub allow_plain_keys: bool,
    /// The server to start and watch, and the signal that asks it to end.
    pub server: Vec<std::ffi::OsString>,
    pub server_stop_signal: rustix::process::Signal,
    pub interface: MakeInterface,
}

/// Runs until `stop`, or until something makes going on impossible.
///
/// # Errors
/// A lost lease, a configuration that cannot work, or a server that is not to be started again and failed.
pub async fn run(options: DaemonOptions, clock: Arc<dyn Clock>, stop: CancellationToken) -> Result<(), DaemonError> {
    let state_dir = &options.state_dir;
    let state = Arc::new(State::new(Arc::clone(&clock), &options.data_dir));
    let telemetry = Arc::new(Telemetry::start(&options.config.telemetry, &state_dir.instance())?);
    let (config, telling) = (options.config.clone(), Arc::clone(&telemetry));
    let interface = (options.interface)(config, Arc::clone(&clock), Arc::clone(&state), telling);
    let stop_serving = CancellationToken::new();
    let serving = tokio::spawn(Arc::clone(&interface).run(stop_serving.clone()));
    let (server, data_dir, signal) = (options.server.clone(), options.data_dir.clone(), options.server_stop_signal);
    let watched = Watched::new(&options.config, server, data_dir, signal);
    let telling = Arc::clone(&state);
    let tell = Arc::new(move |server| telling.server(server));
    let supervisor = Supervisor::start(watched, Arc::clone(&clock), tell, stop.clone())?;
    let (telemetry_config, instance) = (&options.config.telemetry, state_dir.instance());
    let calls = CallStreams::new(telemetry_config, &instance, state_dir.path(), Arc::clone(&clock))?;
    let module_logs = ModuleLogs::new(telemetry_config, &instance, state_dir.path(), Arc::clone(&clock))?;
    #[cfg(feature = "client")]
    let watching = tokio::spawn({
        let (config, dir, instance) = (options.config.clone(), state_dir.path().to_owned(), instance.clone());
        let (clock, stop, state) = (Arc::clone(&clock), stop.clone(), Arc::clone(&state));
        async move {
            let written = || state.log_position(config.spacetimedb_config.database.as_deref()?);
            let tell = |samples| state.module(samples);
            crate::observe::module::run(&config, &instance, &dir, clock, written, tell, stop).await;
        }
    });
    #[cfg(feature = "client")]
    let streaming = tokio::spawn({
        let (config, dir) = (options.config.clone(), state_dir.path().to_owned());
        let (calls, clock, stop) = (calls.since(), Arc::clone(&clock), stop.clone());
        async move { crate::observe::events::run(&config, &instance, &dir, calls, clock, stop).await }
    });
    let publishing = tokio::spawn(publish(Arc::clone(&state), Arc::clone(&clock)));
    let streams = (Arc::new(calls), Arc::new(module_logs));
    let server = (supervisor.stopped(), supervisor.switch());
    let result = follow(&options, &state, streams, Arc::clone(&clock), &stop, server, interface.as_ref()).await;
    stop.cancel();
    let ended = supervisor.end().await;
    state.stopped();
    state.publish();
    publishing.abort();
    stop_serving.cancel();
    #[cfg(feature = "client")]
    for task in [streaming, watching] {
        if let Err(error) = task.await {
            tracing::error!(%error, "a stream from the bundled module ended badly");
        }
    }
    if let Err(error) = serving.await {
        tracing::error!(%error, "the HTTP interface ended badly");
    }
    tokio::select! {
        () = telemetry.stop() => {}
        () = clock.sleep(TELEMETRY_LIMIT) => tracing::warn!("the last metrics were not taken in time"),
    }
    if let Err(error) = state_dir.write_status(&state) {
        tracing::warn!(%error, "the last status was not written");
    }
    result?;
    Ok(ended?)
}

async fn follow(
    options: &DaemonOptions,
    state: &Arc<State>,
    (calls, module_logs): (Arc<CallStreams>, Arc<ModuleLogs>),
    clock: Arc<dyn Clock>,
    stop: &CancellationToken,
    (server_stopped, server): (CancellationToken, Option<Switch>),
    interface: &dyn Interface,
) -> Result<(), DaemonError> {
    let state_dir = &options.state_dir;
    let Some(data) = wait_for_data_dir(options, clock.as_ref(), stop).await? else { return Ok(()) };
    let Some(repository) = wait_for_repository(options, state, clock.as_ref(), stop).await? else { return Ok(()) };
    let Some(lease) = wait_for_lease(options, &repository, &clock, stop).await? else { return Ok(()) };
    tracing::info!(token = lease.token(), repository = %options.url, "archiving begins");
    state.leased(lease.token());

    // Followers stop after the server, so that its last writes are archived too.
    let stop_followers = CancellationToken::new();
    let daemon = Arc::new(Daemon {
        url: options.url.clone(),
        repository: lease.fenced(),
        data,
        clock: Arc::clone(&clock),
        state: Arc::clone(state),
        config: options.config.clone(),
        allow_plain_keys: options.allow_plain_keys,
        server,
        followers: Followers::default(),
        calls,
        module_logs,
        restore_points: tokio::sync::Mutex::new(()),
        verifying: tokio::sync::Mutex::new(()),
        #[cfg(feature = "client")]
        exporting: tokio::sync::Mutex::new(()),
        changed: Notify::new(),
    });
    interface.serves(Arc::clone(&daemon));
    let positions = crate::archiver::position::Positions::open(state_dir.path())?;
    let work = async {
        tokio::select! {
            result = daemon.look_around(positions, &stop_followers) => result,
            result = daemon.capture_changes() => result,
            result = schedule::run(Arc::clone(&daemon), state_dir) => result,
            result = control::serve(&daemon, state_dir) => result,
            () = write_status(state_dir, state, clock.as_ref()) => Ok(()),
            () = daemon.survey() => Ok(()),
            result = heartbeat::beat(&options.config.telemetry, clock.as_ref(), || daemon.is_healthy()) => Ok(result?),
            result = renew(&lease, clock.as_ref()) => result,
            () = stop.cancelled() => Ok(()),
        }
    };
    let mut result = work.await;
    stop.cancel();
    // A lost lease leaves nothing to write.
    if result.is_ok() {
        server_stopped.cancelled().await;
        tracing::info!("writing what is left of the logs");
    }
    stop_followers.cancel();
    let renewals = async {
        // Stopping takes seconds: the lease must hold meanwhile.
        let _ = renew(&lease, clock.as_ref()).await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = daemon.followers.join() => {}
        () = clock.sleep(STOP_LIMIT) => {
            tracing::error!("the store did not take what was left in time; it is archived at the next start");
        }
        () = renewals => {}
    }
    if !matches!(result, Err(DaemonError::Repository(RepositoryError::Locked { .. }))) {
        let released = async { lease.release().await };
        tokio::select! {
            () = released => {}
            () = clock.sleep(Duration::from_secs(1)) => {}
        }
    } else if let Err(error) = &mut result {
        tracing::error!(%error, "the lease is lost; nothing more is written");
    }
    result
}

/// Keeps gauges and history up to date.
async fn publish(state: Arc<State>, clock: Arc<dyn Clock>) {
    loop {
        state.publish();
        clock.sleep(Duration::from_secs(1)).await;
    }
}

/// Prolongs the lease until another has taken it.
async fn renew(lease: &Lease, clock: &dyn Clock) -> Result<(), DaemonError> {
    loop {
        clock.sleep(lease.renewal_interval()).await;
        let count = |outcome| metrics::LEASE_RENEWALS.add(1, &[KeyValue::new("outcome", outcome)]);
        match lease.renew().await {
            Ok(()) => count("ok"),
            Err(error @ (RepositoryError::Locked { .. } | RepositoryError::LeaseLost { expired: false })) => {
                count("lost");
                return Err(error.into());
            }
            Err(error) => {
                count("failed");
                tracing::warn!(%error, "the lease was not renewed and is tried again");
            }
        }
    }
}

async fn write_status(state_dir: &StateDir, state: &Arc<State>, clock: &dyn Clock) {
    loop {
        if let Err(error) = state_dir.write_status(state) {
            tracing::warn!(%error, "the status was not written");
        }
        clock.sleep(Duration::from_secs(1)).await;
    }
}

/// The server may still be about to make its directory.
async fn wait_for_data_dir(
    options: &DaemonOptions,
    clock: &dyn Clock,
    stop: &CancellationToken,
) -> Result<Option<DataDir>, DaemonError> {
    let mut told = false;
    loop {
        match DataDir::open(&options.data_dir) {
            Ok(data) => return Ok(Some(data)),
            Err(error @ (DataDirError::Missing(_) | DataDirError::NotSpacetime { .. })) => {
                if !told && options.server.is_empty() {
                    tracing::warn!(%error, "waiting for the server to make its data directory");
                    told = true;
                }
            }
            Err(error) => return Err(error.into()),
        }
        tokio::select! {
            () = clock.sleep(Duration::from_millis(200)) => {}
            () = stop.cancelled() => return Ok(None),
        }
    }
}

async fn wait_for_repository(
    options: &DaemonOptions,
    state: &State,
    clock: &dyn Clock,
    stop: &CancellationToken,
) -> Result<Option<Repository>, DaemonError> {
    let config = &options.config.repository;
    for delay in patience(Duration::from_millis(500)).build() {
        let error = match Repository::open_or_create(&options.url, config, options.keys.clone(), clock).await {
            Ok(repository) => return Ok(Some(repository)),
            Err(error) if error.is_permanent() => return Err(error.into()),
            Err(error) => error,
        };
        tracing::warn!(%error, ?delay, "the store is not reached and is tried again; the log keeps what is written meanwhile");
        state.failed(error.to_string());
        tokio::select! {
            () = clock.sleep(delay) => {}
            () = stop.cancelled() => return Ok(None),
        }
    }
    Ok(None)
}

async fn wait_for_lease(
    options: &DaemonOptions,
    repository: &Repository,
    clock: &Arc<dyn Clock>,
    stop: &CancellationToken,
) -> Result<Option<Lease>, DaemonError> {
    let duration = options.config.repository.lease_duration.0;
    let mut told = false;
    let mut seen: Option<(LeaseDocument, Stopwatch)> = None;
    loop {
        // Clocks that are set back would have us wait for long after the holder is gone.
        let is_stale = seen.as_ref().is_some_and(|(held, watch)| watch.elapsed_seconds() > patience_with(held));
        match Lease::acquire(repository, duration, Arc::clone(clock), options.force || is_stale).await {
            Ok(lease) => return Ok(Some(lease)),
            Err(error @ RepositoryError::Locked { .. }) if options.wait => {
                if !told {
                    tracing::warn!(%error, "waiting for the lease");
                    told = true;
                }
                if let Ok(Some(held)) = lease::holder(repository).await
                    && seen.as_ref().is_none_or(|(before, _)| *before != held)
                {
                    seen = Some((held, Stopwatch::start()));
                }
            }
            Err(error) if error.is_permanent() => return Err(error.into()),
            Err(error) => tracing::warn!(%error, "the lease is tried again"),
        }
        tokio::select! {
            () = clock.sleep((duration / 8).max(Duration::from_millis(100))) => {}
            () = stop.cancelled() => return Ok(None),
        }
    }
}

/// Seconds after which a lease that nobody renews is nobody's, whatever the clocks say: its own length, and a quarter.
fn patience_with(held: &LeaseDocument) -> f64 {
    held.expires_at.duration_since(held.renewed_at).as_secs_f64().max(0.0) * 1.25
}

/// What the daemon's tasks share.
pub struct Daemon {
    url: String,
    repository: Repository,
    data: DataDir,
    clock: Arc<dyn Clock>,
    state: Arc<State>,
    config: Config,
    allow_plain_keys: bool,
    /// Stops and starts the server that is watched, where one is.
    server: Option<Switch>,
    followers: Followers,
    calls: Arc<CallStreams>,
    module_logs: Arc<ModuleLogs>,
    /// One restore point at a time.
    restore_points: tokio::sync::Mutex<()>,
    /// One verification at a time.
    verifying: tokio::sync::Mutex<()>,
    /// One export at a time.
    #[cfg(feature = "client")]
    exporting: tokio::sync::Mutex<()>,
    /// The repository is worth another look.
    changed: Notify,
}

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
        let key_dir = self.config.spacetimedb_config.key_dir.clone();
        let sealed = self.repository.keys.seals() || self.allow_plain_keys;
        let options = BackupOptions {
            label,
            key_dir: key_dir.filter(|_| sealed),
            allow_plain_keys: self.allow_plain_keys,
            level: Some(self.config.repository.compression_level),
        };
        let mut work = self.work(Arc::new(backup::Unobserved));
        #[cfg(feature = "client")]
        {
            work.witness = LiveServer::witness(&self.config);
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
        let Ok(_one) = self.verifying.try_lock() else { return Ok(None) };
        let options = VerifyOptions::default();
        let verifying = crate::verify::verify(&self.repository, &options, Arc::new(Silent));
        let report = traced(work_span!("verify"), verifying).await?;
        let now = self.clock.now();
        self.state.survey(|survey| {
            survey.findings = Some(report.findings.len() as u64);
            if report.findings.is_empty() {
                survey.verified_at = Some(now);
            }
        });
        Ok(Some(report))
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
    /// When there is no policy, a kept restore point is broken, or the repository fails.
    pub async fn prune(&self) -> Result<PruneReport, RetentionError> {
        let _alone = self.restore_points.lock().await;
        let _no_upload = self.followers.uploads.write().await;
        let policy = Policy::new(&self.config.retention, self.config.schedule.time_zone.0);
        let work = async {
            let grace = self.config.retention.grace.0;
            let plan = retention::plan(&self.repository, &policy, grace, self.clock.now()).await?;
            retention::apply(&self.repository, &plan, self.clock.as_ref()).await
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
        let exporting = crate::export::export(&self.repository, &self.config, options, Some(data_dir), clock).boxed();
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

    /// What stops and starts the server that is watched; `None` where none is.
    pub(super) fn switch(&self) -> Option<&Switch> {
        self.server.as_ref()
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

    fn is_healthy(&self) -> Result<(), String> {
        let found = health::readiness(&self.state.status(), &self.config);
        if found.ready { Ok(()) } else { Err(found.reasons.join("; ")) }
    }

    fn work(&self, observer: Arc<dyn backup::Observer>) -> backup::Work {
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
