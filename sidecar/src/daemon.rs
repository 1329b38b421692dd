//! The daemon: everything that runs as long as the sidecar runs, under one lease.
//!
//! Invariants: nothing is written without the lease, and a lost lease stops everything; an outage of the store is waited
//! out, never passed on to the server; told to stop, every log is written to its end first, within a bounded time.

pub mod conditions;
pub mod control;
mod followers;
mod gauges;
pub mod health;
pub mod history;
mod jobs;
pub mod schedule;
pub mod state;
pub mod survey;
mod waits;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use opentelemetry::KeyValue;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::backup::BackupError;
use crate::clock::Clock;
use crate::config::Config;
use crate::daemon::conditions::{ConditionKind, Ends, Subject, watched};
use crate::daemon::followers::Followers;
use crate::daemon::schedule::ScheduleError;
use crate::daemon::state::{Claim, State, StateDir};
use crate::daemon::waits::{wait_for_data_dir, wait_for_lease, wait_for_repository};
use crate::datadir::{DataDir, DataDirError};
use crate::durable::FileError;
use crate::observe::calls::CallStreams;
use crate::observe::module_logs::ModuleLogs;
use crate::observe::otlp::OtlpError;
use crate::observe::provider::{Telemetry, TelemetryError};
use crate::observe::{heartbeat, metrics};
use crate::repository::crypto::Keyring;
use crate::repository::lease::Lease;
use crate::repository::{Repository, RepositoryError};
use crate::standalone::supervisor::{Supervisor, SupervisorError, Switch, Watched};

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
    let state = Arc::new(State::new(Arc::clone(&clock), &options.data_dir, options.config.archive.lag_alert));
    let telemetry = Arc::new(Telemetry::start(&options.config.telemetry, &state_dir.instance())?);
    let (config, telling) = (options.config.clone(), Arc::clone(&telemetry));
    let interface = (options.interface)(config, Arc::clone(&clock), Arc::clone(&state), telling);
    let stop_serving = CancellationToken::new();
    let watch = |part, ends, task: BoxFuture<'static, ()>| {
        watched(&state, (part, Subject::Sidecar), ends, stop_serving.clone(), task)
    };
    let serves = if options.config.http.enabled { Ends::WhenStopped } else { Ends::WhenDone };
    let serving = watch("the HTTP interface", serves, Arc::clone(&interface).run(stop_serving.clone()));
    let (server, data_dir, signal) = (options.server.clone(), options.data_dir.clone(), options.server_stop_signal);
    let watched = Watched::new(&options.config, server, data_dir, signal);
    let telling = Arc::clone(&state);
    let tell = Arc::new(move |server| telling.server(server));
    let supervisor = Supervisor::start(watched, Arc::clone(&clock), tell, stop.clone())?;
    let (telemetry_config, instance) = (&options.config.telemetry, state_dir.instance());
    let calls = CallStreams::new(telemetry_config, &instance, state_dir.path(), Arc::clone(&clock))?;
    let module_logs = ModuleLogs::new(telemetry_config, &instance, state_dir.path(), Arc::clone(&clock))?;
    #[cfg(feature = "client")]
    let watching = watch("the stream of the module's tables", Ends::WhenDone, {
        let (config, dir, instance) = (options.config.clone(), state_dir.path().to_owned(), instance.clone());
        let (clock, stop, state) = (Arc::clone(&clock), stop.clone(), Arc::clone(&state));
        Box::pin(async move {
            let written = || state.log_position(config.spacetimedb_config.database.as_deref()?);
            let tell = |samples| state.module(samples);
            crate::observe::module::run(&config, &instance, &dir, clock, written, tell, stop).await;
        })
    });
    #[cfg(feature = "client")]
    let streaming = watch("the stream of events", Ends::WhenDone, {
        let (config, dir) = (options.config.clone(), state_dir.path().to_owned());
        let (calls, clock, stop) = (calls.since(), Arc::clone(&clock), stop.clone());
        Box::pin(async move { crate::observe::events::run(&config, &instance, &dir, calls, clock, stop).await })
    });
    let publishing = publish(Arc::clone(&state), Arc::clone(&clock), stop_serving.clone());
    let publishing = watch("the gauges", Ends::WhenStopped, Box::pin(publishing));
    let streams = (Arc::new(calls), Arc::new(module_logs));
    let server = (supervisor.stopped(), supervisor.switch());
    let result = follow(&options, &state, streams, Arc::clone(&clock), &stop, server, interface.as_ref()).await;
    stop.cancel();
    let ended = supervisor.end().await;
    state.stopped();
    state.publish();
    stop_serving.cancel();
    #[cfg(feature = "client")]
    for task in [streaming, watching] {
        if let Err(error) = task.await {
            tracing::error!(%error, "a stream from the bundled module ended badly");
        }
    }
    for task in [serving, publishing] {
        if let Err(error) = task.await {
            tracing::error!(%error, "a task of the daemon ended badly");
        }
    }
    tokio::select! {
        () = telemetry.stop() => {}
        () = clock.sleep(TELEMETRY_LIMIT) => tracing::warn!("the last metrics were not taken in time"),
    }
    // One that never had the lease leaves the notes of the one that has it alone.
    if (state.status().lease_token.is_some() || state_dir.claim().is_some())
        && let Err(error) = state_dir.write_status(&state)
    {
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
    // Nobody else's: what another daemon, which is alive, tells here of itself is left alone while this one waits.
    let claim = parking_lot::Mutex::new(state_dir.claim());
    let beginning = async {
        let Some(data) = wait_for_data_dir(options, clock.as_ref(), stop).await? else { return Ok(None) };
        let Some(repository) = wait_for_repository(options, state, clock.as_ref(), stop).await? else {
            return Ok(None);
        };
        // Whose process ended with the claim that this one has now is gone, and its lease with it.
        let predecessor = claim.lock().as_ref().and_then(Claim::predecessor);
        let lease = wait_for_lease(options, &repository, &clock, predecessor, stop).await?;
        Ok::<_, DaemonError>(lease.map(|lease| (data, lease)))
    };
    let begun = tokio::select! {
        begun = beginning => begun?,
        () = write_status(state_dir, state, clock.as_ref(), &claim) => None,
    };
    let Some((data, lease)) = begun else { return Ok(()) };
    tracing::info!(token = lease.token(), repository = %options.url, "archiving begins");
    state.leased(lease.token(), lease.fence());
    if let Some(claim) = claim.lock().as_ref() {
        claim.holds(lease.writer());
    }

    // Followers stop after the server, so that its last writes are archived too.
    let stop_followers = CancellationToken::new();
    let daemon = Arc::new(Daemon {
        url: options.url.clone(),
        repository: lease.fenced(),
        data: data.with_scratch(state_dir.scratch()),
        clock: Arc::clone(&clock),
        state: Arc::clone(state),
        config: options.config.clone(),
        allow_plain_keys: options.allow_plain_keys,
        server,
        followers: Followers::default(),
        calls,
        module_logs,
        verification: state_dir.path().join("verification.json"),
        restore_points: tokio::sync::Mutex::new(()),
        verifying: tokio::sync::Mutex::new(()),
        #[cfg(feature = "client")]
        exporting: tokio::sync::Mutex::new(()),
        changed: Notify::new(),
    });
    daemon.recall_verification();
    interface.serves(Arc::clone(&daemon));
    let positions = crate::archiver::position::Positions::open(state_dir.path())?;
    let work = async {
        tokio::select! {
            result = daemon.look_around(positions, &stop_followers) => result,
            result = daemon.capture_changes() => result,
            result = schedule::run(Arc::clone(&daemon), state_dir) => result,
            result = control::serve(&daemon, state_dir) => result,
            () = write_status(state_dir, state, clock.as_ref(), &claim) => Ok(()),
            () = daemon.survey() => Ok(()),
            () = daemon.watch_disk() => Ok(()),
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
async fn publish(state: Arc<State>, clock: Arc<dyn Clock>, stop: CancellationToken) {
    loop {
        state.publish();
        tokio::select! {
            () = clock.sleep(Duration::from_secs(1)) => {}
            () = stop.cancelled() => return,
        }
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

async fn write_status(
    state_dir: &StateDir,
    state: &Arc<State>,
    clock: &dyn Clock,
    claim: &parking_lot::Mutex<Option<Claim>>,
) {
    loop {
        let claimed = {
            let mut claim = claim.lock();
            *claim = claim.take().or_else(|| state_dir.claim());
            claim.is_some()
        };
        if !claimed && state.status().lease_token.is_none() {
            tracing::debug!("another daemon tells of itself here");
        } else {
            let written = state_dir.write_status(state);
            if let Err(error) = &written {
                tracing::warn!(%error, "the status was not written");
            }
            state.check(ConditionKind::StateDirectory, Subject::Sidecar, written);
        }
        clock.sleep(Duration::from_secs(1)).await;
    }
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
    /// Where what the last verification found is kept.
    verification: PathBuf,
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
