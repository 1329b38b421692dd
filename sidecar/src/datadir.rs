//! A read-only view of a SpacetimeDB data directory.
//!
//! Invariants: nothing below the directory is ever written, locked for longer than a probe, or opened by a library that
//! repairs; no file is trusted by its size, time or name alone, only by its content; memory stays bounded whatever the
//! size of the files.

pub mod bytes;
pub mod commit;
pub mod control_db;
pub mod key_files;
pub mod lock;
pub mod log;
pub mod page;
pub mod snapshot;

use std::fs;
use std::path::{Path, PathBuf};

use crate::datadir::bytes::Malformed;
use crate::durable::{FileError, OnPath};
use crate::ids::{ContentHash, Offset};

/// What can be wrong with a data directory.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    #[error("{} does not exist; name the directory given to the server as --data-dir", .0.display())]
    Missing(PathBuf),
    #[error("{} is not a SpacetimeDB data directory: {lacks}; name the directory given to the server as --data-dir", path.display())]
    NotSpacetime { path: PathBuf, lacks: &'static str },
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{} is damaged at byte {at}: {reason}", path.display())]
    Damaged { path: PathBuf, at: u64, reason: String },
    #[error(
        "{} was written in {what} version {version}, and this release knows up to {known}; upgrade inner-universe",
        path.display()
    )]
    UnknownVersion { path: PathBuf, what: &'static str, version: u8, known: u8 },
    #[error(
        "the log in {} has a gap: transaction {expected} is missing and the next one found is {found}; the server would \
         not start from this log either. Transactions from {found} on are in these files alone: stop the server and copy \
         the directory before anything is restored in its place",
        path.display()
    )]
    Gap { path: PathBuf, expected: Offset, found: Offset },
    #[error(
        "the log in {} overlaps itself: transaction {expected} was expected, and {found} was found again with other \
         content; two servers may have written to it. What follows is in these files alone: stop the server and copy the \
         directory before anything is restored in its place",
        path.display()
    )]
    Overlap { path: PathBuf, expected: Offset, found: Offset },
    #[error("transaction {wanted} is no longer in the log at {}, which starts at {first}", path.display())]
    Gone { path: PathBuf, wanted: Offset, first: Offset },
    #[error("object {hash} of the snapshot in {} does not hash to its name", path.display())]
    WrongHash { path: PathBuf, hash: ContentHash },
    #[error("the control database in {} did not open after {attempts} copies: {reason}", path.display())]
    ControlDb { path: PathBuf, attempts: u32, reason: String },
}

impl DataDirError {
    /// Would another try at once be in vain?
    pub fn is_permanent(&self) -> bool {
        !matches!(self, Self::File(_) | Self::ControlDb { .. })
    }

    fn damaged(path: &Path, base: u64, malformed: Malformed) -> Self {
        Self::Damaged { path: path.to_owned(), at: base.saturating_add(malformed.at), reason: malformed.reason }
    }
}

/// A SpacetimeDB data directory.
#[derive(Debug, Clone)]
pub struct DataDir {
    root: PathBuf,
    /// Where copies are made when the directory for temporary files cannot hold them.
    scratch: Option<PathBuf>,
}

/// The files of one replica of one database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaDir {
    pub id: u64,
    root: PathBuf,
}

/// `metadata.toml`, as far as we need it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
pub struct Metadata {
    pub version: String,
}

impl DataDir {
    /// Opens a directory that a server wrote.
    ///
    /// # Errors
    /// [`DataDirError::Missing`] and [`DataDirError::NotSpacetime`] when it is not one.
    pub fn open(root: &Path) -> Result<Self, DataDirError> {
        let kind = match fs::metadata(root) {
            Ok(kind) => kind,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(DataDirError::Missing(root.into()));
            }
            Err(error) => return Err(error).on("inspect", root).map_err(Into::into),
        };
        let refuse = |lacks| Err(DataDirError::NotSpacetime { path: root.into(), lacks });
        if !kind.is_dir() {
            return refuse("it is not a directory");
        }
        fs::read_dir(root).on("list", root)?;
        if !root.join("control-db").is_dir() {
            return refuse("it has no control-db");
        }
        Ok(Self { root: root.to_owned(), scratch: None })
    }

    /// With a directory of ours for copies that the directory for temporary files cannot hold.
    #[must_use]
    pub fn with_scratch(self, scratch: PathBuf) -> Self {
        Self { scratch: Some(scratch), ..self }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn control_db_path(&self) -> PathBuf {
        self.root.join("control-db")
    }

    pub fn program_bytes_path(&self) -> PathBuf {
        self.root.join("program-bytes")
    }

    pub fn metadata_path(&self) -> PathBuf {
        self.root.join("metadata.toml")
    }

    pub fn config_path(&self) -> PathBuf {
        self.root.join("config.toml")
    }

    pub fn pid_path(&self) -> PathBuf {
        self.root.join("spacetime.pid")
    }

    /// Which server last wrote here; `None` before its first start has finished.
    ///
    /// # Errors
    /// When `metadata.toml` is there and cannot be read or understood.
    pub fn metadata(&self) -> Result<Option<Metadata>, DataDirError> {
        let path = self.metadata_path();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).on("read", &path).map_err(Into::into),
        };
        toml::from_str(&text).map(Some).map_err(|error| DataDirError::Damaged {
            path,
            at: error.span().map_or(0, |span| span.start as u64),
            reason: error.message().to_owned(),
        })
    }

    pub fn replica(&self, id: u64) -> ReplicaDir {
        ReplicaDir { id, root: self.root.join("replicas").join(id.to_string()) }
    }

    /// Every replica directory, by id.
    ///
    /// # Errors
    /// When `replicas/` cannot be listed.
    pub fn replicas(&self) -> Result<Vec<ReplicaDir>, DataDirError> {
        let path = self.root.join("replicas");
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).on("list", &path).map_err(Into::into),
        };
        let mut replicas = Vec::new();
        for entry in entries {
            let entry = entry.on("list", &path)?;
            if let Some(id) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
                replicas.push(self.replica(id));
            }
        }
        replicas.sort_by_key(|replica| replica.id);
        Ok(replicas)
    }
}

impl ReplicaDir {
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Why there is no log that could be archived; `None` when there is one, also when it holds nothing yet.
    pub fn why_missing(&self) -> Option<String> {
        if !self.root.is_dir() {
            return Some(format!("its directory {} is missing", self.root.display()));
        }
        match log::segments(&self.log_path()) {
            Ok(found) if found.is_empty() => Some(format!("its log is missing from {}", self.log_path().display())),
            Ok(_) => None,
            Err(error) => Some(format!("its log cannot be read: {error}")),
        }
    }

    pub fn log_path(&self) -> PathBuf {
        self.root.join("clog")
    }

    /// What the module logs, a file a day.
    pub fn module_logs_path(&self) -> PathBuf {
        self.root.join("module_logs")
    }

    pub fn snapshots_path(&self) -> PathBuf {
        self.root.join("snapshots")
    }
}
