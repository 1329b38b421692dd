//! Restores: a plan that says what will be done, then the doing.
//!
//! Invariants: the new directory is built and checked beside the target and takes its place only when it is whole and
//! durable; what was there is moved aside, never deleted; a restore that fails leaves target and repository as they were.

pub mod apply;
pub mod check;
pub mod plan;
pub mod target;

use std::path::PathBuf;

use crate::datadir::DataDirError;
use crate::durable::FileError;
use crate::ids::Offset;
use crate::repository::instance::InstanceError;
use crate::repository::{RepositoryError, crypto::CryptoError};

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

impl From<CryptoError> for RestoreError {
    fn from(error: CryptoError) -> Self {
        Self::Repository(error.into())
    }
}
