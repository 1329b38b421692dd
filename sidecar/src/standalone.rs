//! The SpacetimeDB server as a program on this machine: found, told what the configuration says, started, asked whether it
//! is ready, stopped.
//!
//! Invariants: only processes that we started are ended; a server that was asked to stop and does not is killed after a
//! limit; what differs between releases of the server's command line is known in `command` alone.

pub mod background;
mod bound;
pub mod command;
#[cfg(feature = "client")]
pub mod keys;
pub mod logfile;
pub mod ready;
pub mod settings;
pub mod supervisor;
pub mod temporary;

use std::path::PathBuf;
use std::time::Duration;

use crate::durable::FileError;

/// What can go wrong with the server as a program.
#[derive(Debug, thiserror::Error)]
pub enum StandaloneError {
    #[error(
        "no SpacetimeDB server is found{}; install one, or name it in spacetimedb_config.server_bin",
        .0.as_ref().map(|path| format!(" at {}", path.display())).unwrap_or_default()
    )]
    NotFound(Option<PathBuf>),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{} is no TOML: {reason}; correct it, or remove it and the server makes a new one", path.display())]
    Settings { path: PathBuf, reason: String },
    #[error(
        "{} is SpacetimeDB {server}, and does not open {}, which {written} used last; name that release or a newer one in \
         spacetimedb_config.server_bin",
        binary.display(),
        data_dir.display()
    )]
    Older { binary: PathBuf, server: String, data_dir: PathBuf, written: String },
    #[error("no data directory is named; give --db-path DIR, or set spacetimedb_config.db_path in the configuration")]
    NoDataDir,
    #[error("a server{} runs on {} already", pid.map(|pid| format!(" (process {pid})")).unwrap_or_default(), path.display())]
    Running { path: PathBuf, pid: Option<u32> },
    #[error("{address} is taken by another process; stop it, or change spacetimedb_config.port")]
    PortTaken { address: String },
    #[error("start {}: {source}", program.display())]
    Start { program: PathBuf, source: std::io::Error },
    #[error("the server ended before it was ready ({status}); it said: {said}")]
    Ended { status: String, said: String },
    #[error("the server did not answer at {url} within {limit:?}; its output is in {}", log.display())]
    NotReady { url: String, limit: Duration, log: PathBuf },
    #[error("the server (process {pid}) does not end; end it by hand")]
    Stuck { pid: u32 },
    #[error("no server that was started here runs on {}", .0.display())]
    NotRunning(PathBuf),
    #[error("the server on {} was not started here, but by process {pid}; stop it where it was started", path.display())]
    Foreign { path: PathBuf, pid: String },
}
