//! The daemon: everything that runs as long as the sidecar runs, under one lease.
//!
//! Invariants: nothing is written without the lease, and a lost lease stops all writing; an outage of the store, of the
//! lease or of our own files is waited out, never passed on to the server, which only a signal stops; told to stop, every log
//! is written to its end first, within a bounded time after the end of the server, and what was left is an error.

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

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use backon::BackoffBuilder as _;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use opentelemetry::KeyValue;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::archiver::position::Positions;
use crate::backup::BackupError;
use crate::clock::{Clock, Stopwatch, patience};
use crate::config::Config;
use crate::daemon::conditions::{ConditionKind, Ends, Subject, watched};
use crate::daemon::control::Desk;
use crate::daemon::followers::Followers;
use crate::daemon::schedule::ScheduleError;
use crate::daemon::state::{Claim, State, StateDir};
use crate::daemon::waits::{Asking, wait_for_data_dir, wait_for_lease, wait_for_repository};
#[cfg(feature = "client")]
use crate::database::reader::Readers;
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
use crate::standalone::supervisor::{self, Supervisor, SupervisorError, Watched};

/// From the end of the server until the process ends, whatever the store does.
const STOP_LIMIT: Duration = Duration::from_secs(8);
/// Archiving that ran so long begins again without a growing wait.
const STEADY: Duration = Duration::from_secs(60);
/// What still runs after this long does work.
const SETTLED: Duration = Duration::from_secs(1);
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
    #[error(
        "ended before everything was archived: {0}; the next start archives what is left, as long as the log is there"
    )]
    NotArchived(String),
    #[error("the daemon panicked, which is a bug; report it with what is logged before this line")]
    Panicked,
}

/// Who tells the outside about a daemon.
pub trait Interface: Send + Sync {
    /// The daemon archives from now on; `None` while archiving is interrupted.
    fn serves(&self, daemon: Option<Arc<Daemon>>);

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
    /// Wait for a lease that another holds, rather than end. With a server to watch, it is waited for in any case.
    pub wait: bool,
    pub allow_plain_keys: bool,
    /// The server to start and watch, and the signal that asks it to end.
    pub server: Vec<std::ffi::OsString>,
    pub server_stop_signal: rustix::process::Signal,
    pub interface: MakeInterface,
}

/// Runs until `stop`, or until something makes it impossible to go on. With a server to watch, only `stop` and the end of
/// that server end this: whatever else happens is waited out while the server runs.
///
/// # Errors
/// A lost lease, a configuration that cannot work, a server that is not to be started again and failed, or an end before
/// everything was archived.
pub async fn run(options: DaemonOptions, clock: Arc<dyn Clock>, stop: CancellationToken) -> Result<(), DaemonError> {
    let state_dir = &options.state_dir;
    // Whatever is wrong with the configuration is said before a server is started.
    let refuse = |reason| RepositoryError::BadUrl { url: options.url.clone(), reason };
    crate::repository::store::check_url(&options.url).map_err(refuse)?;
    let state = Arc::new(State::new(Arc::clone(&clock), &options.data_dir, options.config.archive.lag_alert));
    let telemetry = Arc::new(Telemetry::start(&options.config.telemetry, &state_dir.instance())?);
    let streams = Streams::new(&options, &clock)?;
    let (config, telling) = (options.config.clone(), Arc::clone(&telemetry));
    let interface = (options.interface)(config, Arc::clone(&clock), Arc::clone(&state), telling);
    let stop_serving = CancellationToken::new();
    let watch = |part, ends, task: BoxFuture<'static, ()>| {
        watched(&state, (part, Subject::Sidecar), ends, stop_serving.clone(), task)
    };
    let serves = if options.config.http.enabled { Ends::WhenStopped } else { Ends::WhenDone };
    let serving = watch("the HTTP interface", serves, Arc::clone(&interface).run(stop_serving.clone()));
    let (server, data_dir, signal) = (options.server.clone(), options.data_dir.clone(), options.server_stop_signal);
    let mut supervised = Watched::new(&options.config, server, data_dir, signal);
    supervised.note = Some(state_dir.path().join(supervisor::NOTE));
    let telling = Arc::clone(&state);
    let tell = Arc::new(move |server| telling.server(server));
    let supervising = Supervisor::start(supervised, Arc::clone(&clock), tell, stop.clone())?;
    #[cfg(feature = "client")]
    let observing =
        observe_module(&options, &state, &streams, &clock, &stop).map(|(part, task)| watch(part, Ends::WhenDone, task));
    let publishing = publish(Arc::clone(&state), Arc::clone(&clock), stop_serving.clone());
    let publishing = watch("the gauges", Ends::WhenStopped, Box::pin(publishing));
    // Nobody else's: what another daemon, which is alive, tells here of itself is left alone while this one waits.
    let claim = Arc::new(Mutex::new(state_dir.claim()));
    let desk =
        Desk::new(Arc::clone(&state), Arc::clone(&clock), supervising.switch(), Arc::clone(&claim), stop.clone());
    let desk = Arc::new(desk);
    let answering = Box::pin(control::run(Arc::clone(&desk), state_dir.clone()));
    let answering = watch(control::PART, Ends::WhenStopped, answering);
    let writing = StatusFile { dir: state_dir.clone(), state: Arc::clone(&state), claim: Arc::clone(&claim) };
    let writing = writing.keep(Arc::clone(&clock), stop_serving.clone());
    let writing = watch("the status file", Ends::WhenStopped, Box::pin(writing));
    let run = Run {
        options: &options,
        state: Arc::clone(&state),
        clock: Arc::clone(&clock),
        stop: stop.clone(),
        claim: Arc::clone(&claim),
        streams,
        server_stopped: supervising.stopped(),
        has_server: !options.server.is_empty(),
        desk: &desk,
        interface: interface.as_ref(),
    };
    let result = run.archive().await;
    stop.cancel();
    let ended = supervising.end().await;
    state.stopped();
    state.publish();
    stop_serving.cancel();
    answering.abort();
    #[cfg(feature = "client")]
    for task in observing {
        if let Err(error) = task.await {
            tracing::error!(%error, "a stream from the bundled module ended badly");
        }
    }
    // The last status is written under the same name as those of before.
    for task in [serving, publishing, writing] {
        if let Err(error) = task.await {
            tracing::error!(%error, "a task of the daemon ended badly");
        }
    }
    tokio::select! {
        () = telemetry.stop() => {}
        () = clock.sleep(TELEMETRY_LIMIT) => tracing::warn!("the last metrics were not taken in time"),
    }
    // One that never had the lease leaves the notes of the one that has it alone.
    let claimed = claim.lock().is_some();
    if (state.status().lease_token.is_some() || claimed || state_dir.claim().is_some())
        && let Err(error) = state_dir.write_status(&state)
    {
        tracing::warn!(%error, "the last status was not written");
    }
    result?;
    Ok(ended?)
}

/// What is sent of the logs besides archiving them.
#[derive(Clone)]
struct Streams {
    calls: Arc<CallStreams>,
    module_logs: Arc<ModuleLogs>,
    #[cfg(feature = "client")]
    readers: Arc<Readers>,
}

impl Streams {
    fn new(options: &DaemonOptions, clock: &Arc<dyn Clock>) -> Result<Self, DaemonError> {
        let (telemetry, dir) = (&options.config.telemetry, &options.state_dir);
        let calls = CallStreams::new(telemetry, &dir.instance(), dir.path(), Arc::clone(clock))?;
        let module_logs = ModuleLogs::new(telemetry, &dir.instance(), dir.path(), Arc::clone(clock))?;
        Ok(Self {
            calls: Arc::new(calls),
            module_logs: Arc::new(module_logs),
            #[cfg(feature = "client")]
            readers: Arc::new(Readers::new(&options.config)),
        })
    }
}

/// What measures the bundled module and streams its events, until `stop`, with its name.
#[cfg(feature = "client")]
fn observe_module(
    options: &DaemonOptions,
    state: &Arc<State>,
    streams: &Streams,
    clock: &Arc<dyn Clock>,
    stop: &CancellationToken,
) -> [(&'static str, BoxFuture<'static, ()>); 2] {
    let (instance, dir) = (options.state_dir.instance(), options.state_dir.path().to_owned());
    let watching: BoxFuture<'static, ()> = {
        let (config, dir, instance) = (options.config.clone(), dir.clone(), instance.clone());
        let readers = Arc::clone(&streams.readers);
        let (clock, stop, state) = (Arc::clone(clock), stop.clone(), Arc::clone(state));
        Box::pin(async move {
            let written = || state.log_position(config.spacetimedb_config.database.as_deref()?);
            let tell = |samples| state.module(samples);
            crate::observe::module::run(&readers, &instance, &dir, clock, written, tell, stop).await;
        })
    };
    let streaming: BoxFuture<'static, ()> = {
        let readers = Arc::clone(&streams.readers);
        let (calls, clock, stop) = (streams.calls.since(), Arc::clone(clock), stop.clone());
        Box::pin(async move { crate::observe::events::run(&readers, &instance, &dir, calls, clock, stop).await })
    };
    [("the stream of events", streaming), ("the stream of the module's tables", watching)]
}

/// One run of the program, through which archiving may begin several times.
struct Run<'a> {
    options: &'a DaemonOptions,
    state: Arc<State>,
    clock: Arc<dyn Clock>,
    stop: CancellationToken,
    claim: Arc<Mutex<Option<Claim>>>,
    streams: Streams,
    /// Cancelled once no server of ours runs any more.
    server_stopped: CancellationToken,
    /// A server is watched.
    has_server: bool,
    desk: &'a Desk,
    interface: &'a dyn Interface,
}

impl Run<'_> {
    /// Archives until told to stop. With a server to watch, an error only means that nothing is archived for a while: it
    /// makes the sidecar not ready, and archiving begins again.
    async fn archive(&self) -> Result<(), DaemonError> {
        let backoff = patience(Duration::from_millis(500));
        let mut delays = backoff.build();
        let mut force = self.options.force;
        loop {
            let took = Stopwatch::start();
            let following = AssertUnwindSafe(self.follow(force)).catch_unwind().await;
            let error = match following.unwrap_or(Err(DaemonError::Panicked)) {
                Err(DaemonError::NotArchived(left)) => return Err(DaemonError::NotArchived(left)),
                Err(error) if self.has_server => error,
                result => return result,
            };
            if self.stop.is_cancelled() {
                return Err(DaemonError::NotArchived(error.to_string()));
            }
            // Two sidecars that both force would take the lease from each other without end.
            force = force && self.state.status().lease_token.is_none();
            if took.elapsed_seconds() > STEADY.as_secs_f64() {
                delays = backoff.build();
            }
            let delay = delays.next().unwrap_or(STEADY);
            tracing::error!(%error, ?delay, "archiving has ended and is tried again; the server keeps running");
            self.state.not_archiving(error.to_string());
            self.serves(None);
            tokio::select! {
                () = self.clock.sleep(delay) => {}
                () = self.stop.cancelled() => return Err(DaemonError::NotArchived(error.to_string())),
            }
        }
    }

    /// Announces the daemon to the socket and the interface; `None` while archiving is interrupted.
    fn serves(&self, daemon: Option<&Arc<Daemon>>) {
        self.desk.serves(daemon.cloned());
        self.interface.serves(daemon.cloned());
    }

    /// Waits for what archiving takes; `None` when told to stop first.
    async fn begin(&self, force: bool) -> Result<Option<(DataDir, Lease)>, DaemonError> {
        let (options, clock, stop) = (self.options, &self.clock, &self.stop);
        let Some(data) = wait_for_data_dir(options, clock.as_ref(), stop).await? else { return Ok(None) };
        let Some(repository) = wait_for_repository(options, &self.state, clock.as_ref(), stop).await? else {
            return Ok(None);
        };
        self.state.waits();
        // Whose process ended with the claim that this one has now is gone, and its lease with it.
        let predecessor = self.claim.lock().as_ref().and_then(Claim::predecessor);
        // A server that is watched must not end for a lease.
        let wait = options.wait || self.has_server;
        let asking = Asking { force, wait, predecessor };
        let lease = wait_for_lease(options, &repository, &self.state, clock, &asking, stop).await?;
        Ok(lease.map(|lease| (data, lease)))
    }

    async fn follow(&self, force: bool) -> Result<(), DaemonError> {
        let Some((data, lease)) = self.begin(force).await? else {
            return match self.state.status().last_error {
                Some(error) => Err(DaemonError::NotArchived(error)),
                None => Ok(()),
            };
        };
        tracing::info!(token = lease.token(), repository = %self.options.url, "archiving begins");
        self.state.leased(lease.token(), lease.fence());
        if let Some(claim) = self.claim.lock().as_ref() {
            claim.holds(lease.writer());
        }
        let daemon = Arc::new(self.daemon(data, &lease));
        daemon.recall_verification();
        self.serves(Some(&daemon));
        let positions = Positions::within(self.options.state_dir.path());
        // Followers stop after the server, so that its last writes are archived too; and with this, however it ends.
        let stop_followers = CancellationToken::new();
        let _stop_followers = stop_followers.clone().drop_guard();
        let renewing = pin!(renew(&lease, &self.state, self.clock.as_ref()));
        let result = self.work(&daemon, &lease, &positions, &stop_followers, renewing).await;
        daemon.followers.abort();
        let is_lost = matches!(result, Err(DaemonError::Repository(RepositoryError::Locked { .. })));
        if let (Err(error), true) = (&result, is_lost) {
            tracing::error!(%error, "the lease is lost; nothing more is written");
            return result;
        }
        tokio::select! {
            () = lease.release() => {}
            () = self.clock.sleep(Duration::from_secs(1)) => {}
        }
        result
    }

    fn daemon(&self, data: DataDir, lease: &Lease) -> Daemon {
        Daemon {
            url: self.options.url.clone(),
            repository: lease.fenced(),
            data: data.with_scratch(self.options.state_dir.scratch()),
            clock: Arc::clone(&self.clock),
            state: Arc::clone(&self.state),
            config: self.options.config.clone(),
            allow_plain_keys: self.options.allow_plain_keys,
            followers: Followers::default(),
            calls: Arc::clone(&self.streams.calls),
            module_logs: Arc::clone(&self.streams.module_logs),
            #[cfg(feature = "client")]
            readers: Arc::clone(&self.streams.readers),
            verification: self.options.state_dir.path().join("verification.json"),
            restore_points: tokio::sync::Mutex::new(()),
            verifying: tokio::sync::Mutex::new(()),
            #[cfg(feature = "client")]
            exporting: tokio::sync::Mutex::new(()),
            changed: Notify::new(),
        }
    }

    /// Everything under the lease, which is renewed all the while: to the end of the last log.
    async fn work(
        &self,
        daemon: &Arc<Daemon>,
        lease: &Lease,
        positions: &Positions,
        stop_followers: &CancellationToken,
        mut renewing: Pin<&mut impl Future<Output = DaemonError>>,
    ) -> Result<(), DaemonError> {
        let state_dir = &self.options.state_dir;
        let beat = || async {
            let telemetry = &self.options.config.telemetry;
            Ok(heartbeat::beat(telemetry, self.clock.as_ref(), || daemon.is_healthy()).await?)
        };
        let result = tokio::select! {
            result = daemon.look_around(positions, stop_followers) => result,
            result = daemon.capture_changes() => result,
            result = self.keep_trying("schedules", || schedule::run(Arc::clone(daemon), state_dir)) => result,
            () = daemon.survey() => Ok(()),
            () = daemon.watch_disk() => Ok(()),
            result = self.keep_trying("heartbeat", beat) => result,
            lost = renewing.as_mut() => return Err(lost),
            () = self.stop.cancelled() => Ok(()),
        };
        let ending = async {
            if result.is_ok() {
                // The server takes the time it takes.
                self.server_stopped.cancelled().await;
                tracing::info!("writing what is left of the logs");
            }
            let limit = async {
                self.clock.sleep(STOP_LIMIT).await;
                tracing::error!("the store did not take what was left in time; it is archived at the next start");
                Some("the store did not take what was left in time".to_owned())
            };
            tokio::select! {
                left = daemon.finish(lease, positions, stop_followers) => left,
                left = limit => left,
            }
        };
        let left = tokio::select! {
            left = ending => left,
            lost = renewing => return Err(lost),
        };
        match (result, left) {
            (Ok(()), Some(left)) => Err(DaemonError::NotArchived(left)),
            (result, _) => result,
        }
    }

    /// Runs `work`, and again whenever something of our own on this machine keeps it from running: no archive ends for it.
    async fn keep_trying<F>(&self, part: &'static str, work: impl Fn() -> F) -> Result<(), DaemonError>
    where
        F: Future<Output = Result<(), DaemonError>>,
    {
        let mut delays = patience(Duration::from_millis(500)).build();
        loop {
            let mut running = pin!(work());
            let result = tokio::select! {
                result = &mut running => result,
                () = self.clock.sleep(SETTLED) => {
                    self.state.clear(ConditionKind::PartFailing, &Subject::Part(part));
                    running.await
                }
            };
            let error = match result {
                Err(error @ (DaemonError::File(_) | DaemonError::Schedule(_) | DaemonError::Otlp(_))) => error,
                result => return result,
            };
            let delay = delays.next().unwrap_or(STEADY);
            tracing::error!(part, %error, ?delay, "a part of the daemon does not work and is tried again");
            self.state.raise(ConditionKind::PartFailing, Subject::Part(part), error.to_string());
            self.clock.sleep(delay).await;
        }
    }
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

/// Prolongs the lease until another has taken it, which is what this returns.
async fn renew(lease: &Lease, state: &State, clock: &dyn Clock) -> DaemonError {
    loop {
        clock.sleep(lease.renewal_interval()).await;
        let count = |outcome| metrics::LEASE_RENEWALS.add(1, &[KeyValue::new("outcome", outcome)]);
        match lease.renew().await {
            Ok(()) => {
                count("ok");
                state.clear(ConditionKind::RepositoryMissing, &Subject::Sidecar);
            }
            Err(error @ (RepositoryError::Locked { .. } | RepositoryError::LeaseLost { expired: false })) => {
                count("lost");
                return error.into();
            }
            Err(error) => {
                count("failed");
                if error.is_other_repository() {
                    state.raise(ConditionKind::RepositoryMissing, Subject::Sidecar, error.to_string());
                }
                tracing::warn!(%error, "the lease was not renewed and is tried again");
            }
        }
    }
}

/// What tells other processes of this daemon.
struct StatusFile {
    dir: StateDir,
    state: Arc<State>,
    claim: Arc<Mutex<Option<Claim>>>,
}

impl StatusFile {
    /// Keeps it up to date until `stop`.
    async fn keep(self, clock: Arc<dyn Clock>, stop: CancellationToken) {
        let mut failed = None;
        loop {
            self.write(&mut failed);
            tokio::select! {
                () = clock.sleep(Duration::from_secs(1)) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// An error is told once.
    fn write(&self, failed: &mut Option<String>) {
        let claimed = {
            let mut claim = self.claim.lock();
            *claim = claim.take().or_else(|| self.dir.claim());
            claim.is_some()
        };
        if !claimed && self.state.status().lease_token.is_none() {
            tracing::debug!("another daemon tells of itself here");
            return;
        }
        let written = self.dir.write_status(&self.state);
        let error = written.as_ref().err().map(ToString::to_string);
        if let Some(error) = error.as_ref().filter(|error| failed.as_ref() != Some(*error)) {
            tracing::warn!(%error, "the status was not written");
        }
        *failed = error;
        self.state.check(ConditionKind::StateDirectory, Subject::Sidecar, written);
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
    followers: Followers,
    calls: Arc<CallStreams>,
    module_logs: Arc<ModuleLogs>,
    #[cfg(feature = "client")]
    readers: Arc<Readers>,
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

impl Daemon {
    /// Archives what is left of every log. Returns what could not be archived.
    async fn finish(
        self: &Arc<Self>,
        lease: &Lease,
        positions: &Positions,
        stop_followers: &CancellationToken,
    ) -> Option<String> {
        // The store may be back since the last renewal, and each archiver tries only once more.
        if lease.fence().check().is_err()
            && let Err(error) = lease.renew().await
        {
            tracing::warn!(%error, "the lease was not renewed for the end");
        }
        // A database of the last second is archived too.
        let looked = self.look(positions, stop_followers).await;
        stop_followers.cancel();
        self.followers.join().await;
        let failed = self.state.status().databases.into_iter().find_map(|database| {
            database.error.map(|error| format!("database {} is not archived to its end: {error}", database.name))
        });
        // Without a look at its end nobody knows whether a database came that is not followed.
        failed.or_else(|| looked.err().map(|error| format!("what databases there are is not known: {error}")))
    }
}
