//! What a deployment is about to do, on disk before it is done: by it the next run ends what was broken off.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::deploy::Mode;
use crate::durable::{self, FileError, OnPath};
use crate::ids::{ContentHash, Identity, Offset, RestorePointId};

/// How far a deployment is. Later steps are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    /// Nothing was changed yet.
    Prepare,
    Publish,
    Initialise,
    Verify,
    Record,
    RollBack,
}

/// `deploy.json` in the state directory, there while a deployment is not done.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Journal {
    pub id: RestorePointId,
    pub step: Step,
    pub started_at: Timestamp,
    pub mode: Mode,
    pub name: String,
    /// The port of a server that was started for this deployment.
    pub server_port: Option<u16>,
    pub had_data_dir: bool,
    /// Was the database there before?
    pub existed: bool,
    pub identity: Option<Identity>,
    pub module: ContentHash,
    pub previous: Option<ContentHash>,
    /// Is the module another one than before?
    pub publishes: bool,
    /// Where the log ended before the publish; the publish is at or behind it.
    pub log_end: Option<Offset>,
    pub restore_point: Option<RestorePointId>,
    /// Settings that are changed, as they were; `None` for those that were not there.
    pub settings_before: Vec<(String, Option<String>)>,
    /// Identities that are made admins and members.
    #[serde(default)]
    pub admins: Vec<String>,
    #[serde(default)]
    pub members: Vec<String>,
    /// Who is to start the server again that was stopped for a rollback.
    #[serde(default)]
    pub restart: Option<Restarter>,
}

/// Who runs a server that is stopped for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Restarter {
    Background,
    Sidecar,
}

fn path(dir: &Path) -> PathBuf {
    dir.join("deploy.json")
}

impl Journal {
    /// What a deployment that did not end has left.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn load(dir: &Path) -> Result<Option<Self>, FileError> {
        let path = path(dir);
        match std::fs::read(&path) {
            Ok(bytes) => {
                let journal = serde_json::from_slice(&bytes).map_err(std::io::Error::from);
                journal.map(Some).on("understand", &path)
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).on("read", &path),
        }
    }

    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), FileError> {
        durable::replace(&path(dir), &serde_json::to_vec_pretty(self).unwrap_or_default())
    }

    /// The step begins.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn enter(&mut self, step: Step, dir: &Path) -> Result<(), FileError> {
        self.step = step;
        self.save(dir)
    }

    /// The deployment is done with.
    ///
    /// # Errors
    /// When the file cannot be removed.
    pub fn close(dir: &Path) -> Result<(), FileError> {
        let path = path(dir);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).on("remove", &path),
            _ => durable::sync_dir(dir),
        }
    }
}
