//! The socket by which commands on the same machine ask the daemon, which holds the lease, to work for them.
//!
//! One JSON document each way, ended by closing the writing side.

use std::convert::Infallible;
use std::path::Path;
#[cfg(feature = "client")]
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use backon::BackoffBuilder as _;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;

use crate::backup::{BackupError, BackupReport};
use crate::clock::{Clock, patience};
use crate::config::RetentionConfig;
use crate::daemon::Daemon;
use crate::daemon::conditions::{ConditionKind, Subject};
use crate::daemon::state::{Claim, State, StateDir};
#[cfg(feature = "client")]
use crate::deploy::record::DeploymentRecord;
use crate::durable::{FileError, OnPath};
#[cfg(feature = "client")]
use crate::export::{ExportOptions, ExportReport};
use crate::retention::PruneReport;
use crate::standalone::supervisor::{Switch, Switched};

/// No request is longer.
const MAX_REQUEST: u64 = 64 << 10;

/// What can be asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// A restore point in the repository at `url`.
    BackupCreate {
        url: String,
        label: Option<String>,
        /// Options of the command that the daemon cannot take: its own configuration decides.
        #[serde(default)]
        options: Vec<String>,
    },
    /// An export of `database` into the repository at `url`.
    #[cfg(feature = "client")]
    Export { url: String, server: String, database: Option<String>, options: ExportOptions },
    /// What retention does not keep is to go from the repository at `url`.
    Prune {
        url: String,
        /// Although the clock is in doubt.
        #[serde(default)]
        trust_clock: bool,
        /// What the plan that was shown kept by.
        retention: Option<RetentionConfig>,
    },
    /// Does the daemon archive now?
    Archiving,
    /// The server that the daemon watches is to run, or to be stopped until it is to run again.
    Server { run: bool },
    /// A record of a deployment, for the repository at `url`.
    #[cfg(feature = "client")]
    Deployed { url: String, record: Box<DeploymentRecord>, programs: Vec<PathBuf> },
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Created(BackupReport),
    #[cfg(feature = "client")]
    Exported(ExportReport),
    Pruned(PruneReport),
    Done,
    /// The daemon writes to another repository, or asks another database.
    Elsewhere,
    /// The server holds nothing yet that could be backed up; why.
    Empty(String),
    /// Nothing is archived now, and the daemon tries to again by itself; why.
    NotArchiving(String),
    Failed(String),
}

/// What readiness calls this part of the daemon.
pub(super) const PART: &str = "control socket";
/// From a connection that could not be accepted to the next look.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);
/// How often it is looked whether the socket is ours.
const ALONE_PAUSE: Duration = Duration::from_millis(50);
/// A server that was stopped is started again so long before that is called a failure.
const START_LIMIT: Duration = Duration::from_secs(60);
/// At the most between two tries to make the socket.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Where commands are answered. A watched server can be stopped and started here also while nothing is archived.
pub(super) struct Desk {
    state: Arc<State>,
    clock: Arc<dyn Clock>,
    /// Stops and starts the server that is watched, where one is.
    server: Option<Switch>,
    /// Of the state directory, and so of the socket.
    claim: Arc<Mutex<Option<Claim>>>,
    stop: CancellationToken,
    /// `None` while nothing is archived.
    daemon: Mutex<Option<Arc<Daemon>>>,
}

impl Desk {
    pub fn new(
        state: Arc<State>,
        clock: Arc<dyn Clock>,
        server: Option<Switch>,
        claim: Arc<Mutex<Option<Claim>>>,
        stop: CancellationToken,
    ) -> Self {
        Self { state, clock, server, claim, stop, daemon: Mutex::default() }
    }

    /// The daemon archives from now on; `None` while archiving is interrupted.
    pub fn serves(&self, daemon: Option<Arc<Daemon>>) {
        *self.daemon.lock() = daemon;
    }

    async fn switch(&self, run: bool) -> Answer {
        let Some(switch) = &self.server else { return Answer::Elsewhere };
        let stopping = || Answer::Failed("the daemon is stopping, and its server with it".into());
        if run && self.stop.is_cancelled() {
            return stopping();
        }
        tokio::select! {
            switched = switch.set(run) => match switched {
                Switched::Done => Answer::Done,
                Switched::Elsewhere => Answer::Elsewhere,
                Switched::Overruled => Answer::Failed("another command asked for the opposite meanwhile".into()),
            },
            () = self.stop.cancelled(), if run => stopping(),
            // Told to stop, it ends within its own time or is killed.
            () = self.clock.sleep(START_LIMIT), if run => Answer::Failed(format!(
                "the server was not started within {START_LIMIT:?}, and is tried again; see the daemon's log"
            )),
        }
    }

    /// Why nothing is archived.
    fn reason(&self) -> String {
        self.state.status().last_error.unwrap_or_else(|| "it waits for its lease".into())
    }

    fn serving(&self) -> Option<Arc<Daemon>> {
        self.daemon.lock().clone()
    }

    /// Is there no other daemon on this data directory, whose socket it would be?
    fn is_alone(&self) -> bool {
        let watches = self.server.is_some() && self.claim.lock().is_some();
        watches || self.daemon.lock().is_some()
    }
}

/// Answers until it is dropped. What keeps it from that is a condition, and tried again.
pub(super) async fn run(desk: Arc<Desk>, state_dir: StateDir) {
    let mut delays = patience(Duration::from_millis(500)).build();
    loop {
        while !desk.is_alone() {
            desk.clock.sleep(ALONE_PAUSE).await;
        }
        let Err(error) = serve(&desk, &state_dir).await;
        let delay = delays.next().unwrap_or(LONGEST_PAUSE);
        tracing::error!(%error, ?delay, "commands are not answered; it is tried again");
        desk.state.raise(ConditionKind::PartFailing, Subject::Part(PART), error.to_string());
        desk.clock.sleep(delay).await;
    }
}

/// # Errors
/// When the socket cannot be made. What keeps connections from being accepted, such as too many open files, is waited out.
async fn serve(desk: &Arc<Desk>, state_dir: &StateDir) -> Result<Infallible, FileError> {
    let path = state_dir.socket();
    // One left by a crash.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).on("listen on", &path)?;
    desk.state.clear(ConditionKind::PartFailing, &Subject::Part(PART));
    let mut fails = false;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // Nobody connects: the next look found no error.
            () = desk.clock.sleep(ACCEPT_PAUSE), if fails => {
                fails = false;
                desk.state.clear(ConditionKind::PartFailing, &Subject::Part(PART));
                continue;
            }
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a command could not connect; the next try is in {ACCEPT_PAUSE:?}");
                let message = format!("a command could not connect: {error}");
                desk.state.raise(ConditionKind::PartFailing, Subject::Part(PART), message);
                fails = true;
                desk.clock.sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let desk = Arc::clone(desk);
        tokio::spawn(async move {
            if let Err(error) = attend(&desk, stream).await {
                tracing::debug!(%error, "a command went away before it was answered");
            }
        });
    }
}

async fn attend(desk: &Desk, mut stream: UnixStream) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    (&mut stream).take(MAX_REQUEST).read_to_end(&mut bytes).await?;
    let answer = match (serde_json::from_slice(&bytes), desk.serving()) {
        (Ok(Request::Server { run }), _) => desk.switch(run).await,
        (Ok(request), Some(daemon)) => answer(&daemon, request).await,
        (Ok(_), None) => Answer::NotArchiving(desk.reason()),
        (Err(error), _) => {
            Answer::Failed(format!("the daemon does not understand: {error}; are both of the same release?"))
        }
    };
    stream.write_all(&serde_json::to_vec(&answer)?).await?;
    stream.shutdown().await
}

async fn answer(daemon: &Daemon, request: Request) -> Answer {
    match request {
        Request::BackupCreate { url, .. } if url != daemon.url => Answer::Elsewhere,
        Request::BackupCreate { options, .. } if !options.is_empty() => Answer::Failed(format!(
            "the sidecar that runs here makes the restore point, with its own configuration: leave {} out, or change the configuration and restart it",
            options.join(", ")
        )),
        Request::BackupCreate { label, .. } => match daemon.restore_point(label).await {
            Ok(report) => Answer::Created(report),
            Err(error @ BackupError::Empty(_)) => Answer::Empty(error.to_string()),
            Err(error) => Answer::Failed(error.to_string()),
        },
        #[cfg(feature = "client")]
        Request::Export { url, server, database, options } => {
            let config = &daemon.config.spacetimedb_config;
            if url != daemon.url || server != config.server_url() || database != config.database {
                Answer::Elsewhere
            } else {
                match daemon.export(options).await {
                    Ok(report) => Answer::Exported(report),
                    Err(error) => Answer::Failed(error.to_string()),
                }
            }
        }
        Request::Prune { url, .. } if url != daemon.url => Answer::Elsewhere,
        Request::Prune { retention: Some(asked), .. } if asked != daemon.config.retention => Answer::Failed(
            "the running sidecar still uses the retention it was started with, which differs from the configuration: restart it, then prune"
                .into(),
        ),
        Request::Prune { trust_clock, .. } => match daemon.prune(trust_clock).await {
            Ok(report) => Answer::Pruned(report),
            Err(error) => Answer::Failed(error.to_string()),
        },
        Request::Archiving => Answer::Done,
        // Answered whether or not anything is archived.
        Request::Server { .. } => Answer::Elsewhere,
        #[cfg(feature = "client")]
        Request::Deployed { url, record, programs } => match daemon.record_deployment(&url, &record, &programs).await {
            Ok(true) => Answer::Done,
            Ok(false) => Answer::Elsewhere,
            Err(error) => Answer::Failed(error.to_string()),
        },
    }
}

/// Asks the daemon behind `socket`; `None` when there is none.
///
/// # Errors
/// When the daemon goes away before it has answered.
pub async fn ask(socket: &Path, request: &Request) -> std::io::Result<Option<Answer>> {
    let mut stream = match UnixStream::connect(socket).await {
        Ok(stream) => stream,
        Err(_) => return Ok(None),
    };
    stream.write_all(&serde_json::to_vec(request)?).await?;
    stream.shutdown().await?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await?;
    Ok(Some(serde_json::from_slice(&bytes)?))
}
