//! What was reported archived, kept on this machine: if the store ever holds less, that is said.
//!
//! Written after the object is durable, by fsync and rename, so that a crash leaves the old or the new position whole.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::durable::{self, FileError, OnPath as _};
use crate::ids::{Identity, Offset, RestorePointId, TimelineId};

/// One database's position.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// The repository's id: positions of another repository promise nothing about this one.
    pub repository: RestorePointId,
    pub timeline: TimelineId,
    /// Everything up to here was reported archived.
    pub offset: Offset,
}

/// The directory of positions.
#[derive(Debug, Clone)]
pub struct Positions(PathBuf);

impl Positions {
    /// In the state directory. It is made with the first position: archiving does not depend on it.
    pub fn within(state_dir: &Path) -> Self {
        Self(state_dir.join("positions"))
    }

    /// `None` when nothing was reported yet, or what stands there makes no sense.
    pub fn read(&self, database: &Identity) -> Option<Position> {
        serde_json::from_slice(&std::fs::read(self.path(database)).ok()?).ok()
    }

    /// # Errors
    /// When the disk fails.
    pub fn write(&self, database: &Identity, position: &Position) -> Result<(), FileError> {
        std::fs::create_dir_all(&self.0).on("create", &self.0)?;
        durable::replace(&self.path(database), &serde_json::to_vec(position).unwrap_or_default())
    }

    fn path(&self, database: &Identity) -> PathBuf {
        self.0.join(format!("{database}.json"))
    }
}
