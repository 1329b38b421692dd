//! Restores: a plan that says what will be done, then the doing.
//!
//! Invariants: the new directory is built and checked beside the target and takes its place only when it is whole and
//! durable; what was there is moved aside, never deleted; a restore that fails leaves target and repository as they were.

pub mod apply;
mod build;
pub mod check;
pub(crate) mod log_source;
mod moment;
pub mod place;
pub mod plan;
pub(crate) mod segments;
mod swap;
pub mod target;

use std::path::PathBuf;
use std::sync::Arc;

use crate::clock::Clock;
use crate::datadir::DataDirError;
use crate::durable::FileError;
use crate::ids::Offset;
use crate::progress::Progress;
use crate::repository::instance::InstanceError;
use crate::repository::{Repository, RepositoryError, crypto::CryptoError};
use crate::restore::apply::{ApplyOptions, RestoreReport};
use crate::restore::plan::{RestorePlan, RestoreRequest};

/// What can go wrong with a restore.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    Instance(#[from] InstanceError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{0}")]
    NothingToRestore(String),
    #[error("{0}")]
    Usage(String),
    #[error("a server{} runs on {}; stop it first", pid.map(|pid| format!(" (process {pid})")).unwrap_or_default(), path.display())]
    ServerRunning { path: PathBuf, pid: Option<u32> },
    #[error("{} is there already; name another directory, or move it aside with --force", .0.display())]
    WouldOverwrite(PathBuf),
    #[error(
        "the server here is SpacetimeDB {server}, and does not open what {written} wrote; name that release or a newer one in \
         spacetimedb_config.server_bin, or restore for another machine with --any-server"
    )]
    OlderServer { server: String, written: String },
    #[error(
        "{path} is a mount point, and a restore puts a new directory in the place of the old one; name a directory below it, \
         as {path}/data, for the restore and for the server, or mount the file system one directory higher",
        path = .0.display()
    )]
    MountPoint(PathBuf),
    #[error(
        "{} has {free} bytes free and the restore needs about {needed}; free space, name another --data-dir, or try \
         anyway with --force",
        path.display()
    )]
    NoSpace { path: PathBuf, free: u64, needed: u64 },
    #[error("the disk is full: {0}; nothing was changed: free space or name another --data-dir")]
    DiskFull(FileError),
    #[error("what was restored does not pass its own check: {0}; nothing was changed: run `inner-universe verify`")]
    SelfCheck(String),
    #[error("transaction {wanted} cannot be reached: {reason}")]
    Unreachable { wanted: Offset, reason: String },
    #[error(
        "transaction {0} cannot be reached: the log objects do not continue each other; run `inner-universe verify`"
    )]
    BrokenLog(Offset),
    #[error("a worker of the restore stopped: {0}")]
    Worker(String),
}

impl RestoreError {
    /// A full disk gets its own words wherever it shows.
    pub(crate) fn with_disk_full(self) -> Self {
        match self {
            Self::File(error) | Self::Instance(InstanceError::File(error)) if error.is_disk_full() => {
                Self::DiskFull(error)
            }
            error => error,
        }
    }
}

/// Carries out `plan`, which was made of `request`. A snapshot that turns out to be missing or damaged is passed over: an
/// older one, or the log alone, leads to the same rows.
///
/// # Errors
/// When no snapshot and log lead to the target, or as [`apply::apply`]. Nothing is changed then.
pub async fn restore(
    repository: &Repository,
    mut request: RestoreRequest,
    mut plan: RestorePlan,
    options: &ApplyOptions,
    clock: Arc<dyn Clock>,
    progress: Arc<dyn Progress>,
) -> Result<RestoreReport, RestoreError> {
    loop {
        let error = match apply::apply(repository, &plan, options, Arc::clone(&clock), Arc::clone(&progress)).await {
            Ok(report) => return Ok(report),
            Err(error) => error,
        };
        match plan.snapshot_at_fault(&error) {
            Some((database, offset)) if request.avoid.insert((database, offset)) => {
                tracing::warn!(%error, %offset, "failed to use a snapshot; the restore continues without it");
            }
            // Objects of two histories may lie on one timeline: their headers tell which belong together.
            None if matches!(error, RestoreError::BrokenLog(_)) && !request.every_joint => {
                tracing::warn!(%error, "the restore is planned again with the headers of all log objects");
                request.every_joint = true;
            }
            _ => return Err(error),
        }
        plan = match plan::plan(repository, &request).await {
            Ok(plan) => plan,
            // What was wrong first says more than that there is no other way.
            Err(RestoreError::NothingToRestore(_) | RestoreError::Unreachable { .. }) => return Err(error),
            Err(error) => return Err(error),
        };
    }
}

impl From<CryptoError> for RestoreError {
    fn from(error: CryptoError) -> Self {
        Self::Repository(error.into())
    }
}
