//! The socket by which commands on the same machine ask the daemon, which holds the lease, to work for them.
//!
//! One JSON document each way, ended by closing the writing side.

use std::path::Path;
#[cfg(feature = "client")]
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use crate::backup::{BackupError, BackupReport};
use crate::daemon::conditions::{ConditionKind, Subject};
use crate::daemon::state::StateDir;
use crate::daemon::{Daemon, DaemonError};
#[cfg(feature = "client")]
use crate::deploy::record::DeploymentRecord;
use crate::durable::OnPath;
#[cfg(feature = "client")]
use crate::export::{ExportOptions, ExportReport};
use crate::retention::PruneReport;

/// No request is longer.
const MAX_REQUEST: u64 = 64 << 10;

/// What can be asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// A restore point in the repository at `url`.
    BackupCreate { url: String, label: Option<String> },
    /// An export of `database` into the repository at `url`.
    #[cfg(feature = "client")]
    Export { url: String, server: String, database: Option<String>, options: ExportOptions },
    /// What retention does not keep is to go from the repository at `url`.
    Prune {
        url: String,
        /// Although the clock is in doubt.
        #[serde(default)]
        trust_clock: bool,
    },
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
    Failed(String),
}

/// What readiness calls this part of the daemon.
pub(super) const PART: &str = "control socket";
/// From a connection that could not be accepted to the next look.
const ACCEPT_PAUSE: Duration = Duration::from_millis(500);

/// Answers until it is dropped.
///
/// # Errors
/// When the socket cannot be made. What keeps connections from being accepted, such as too many open files, is waited out.
pub(super) async fn serve(daemon: &Arc<Daemon>, state_dir: &StateDir) -> Result<(), DaemonError> {
    let path = state_dir.socket();
    // One left by a crash; who holds the lease is alone.
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).on("listen on", &path)?;
    let mut fails = false;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            // Nobody connects: the next look found no error.
            () = daemon.clock.sleep(ACCEPT_PAUSE), if fails => {
                fails = false;
                daemon.state.clear(ConditionKind::PartFailing, &Subject::Part(PART));
                continue;
            }
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a command could not connect; the next try is in {ACCEPT_PAUSE:?}");
                let message = format!("a command could not connect: {error}");
                daemon.state.raise(ConditionKind::PartFailing, Subject::Part(PART), message);
                fails = true;
                daemon.clock.sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let daemon = Arc::clone(daemon);
        tokio::spawn(async move {
            if let Err(error) = answer(&daemon, stream).await {
                tracing::debug!(%error, "a command went away before it was answered");
            }
        });
    }
}

async fn answer(daemon: &Daemon, mut stream: UnixStream) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    (&mut stream).take(MAX_REQUEST).read_to_end(&mut bytes).await?;
    let answer = match serde_json::from_slice(&bytes) {
        Ok(Request::BackupCreate { url, .. }) if url != daemon.url => Answer::Elsewhere,
        Ok(Request::BackupCreate { label, .. }) => match daemon.restore_point(label).await {
            Ok(report) => Answer::Created(report),
            Err(error @ BackupError::Empty(_)) => Answer::Empty(error.to_string()),
            Err(error) => Answer::Failed(error.to_string()),
        },
        #[cfg(feature = "client")]
        Ok(Request::Export { url, server, database, options }) => {
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
        Ok(Request::Prune { url, .. }) if url != daemon.url => Answer::Elsewhere,
        Ok(Request::Prune { trust_clock, .. }) => match daemon.prune(trust_clock).await {
            Ok(report) => Answer::Pruned(report),
            Err(error) => Answer::Failed(error.to_string()),
        },
        Ok(Request::Server { run }) => match daemon.switch() {
            Some(switch) if switch.set(run).await => Answer::Done,
            // None is watched, or one that was started elsewhere.
            _ => Answer::Elsewhere,
        },
        #[cfg(feature = "client")]
        Ok(Request::Deployed { url, record, programs }) => {
            match daemon.record_deployment(&url, &record, &programs).await {
                Ok(true) => Answer::Done,
                Ok(false) => Answer::Elsewhere,
                Err(error) => Answer::Failed(error.to_string()),
            }
        }
        Err(error) => Answer::Failed(format!("the daemon does not understand: {error}; are both of the same release?")),
    };
    stream.write_all(&serde_json::to_vec(&answer)?).await?;
    stream.shutdown().await
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
