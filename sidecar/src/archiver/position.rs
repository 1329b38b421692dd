//! What was reported archived, kept on this machine: if the store ever holds less, that is said.
//!
//! Written after the object is durable, by fsync and rename, so that a crash leaves the old or the new position whole.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::durable::{self, FileError};
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
    /// Makes the directory if it is missing.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(state_dir: &Path) -> Result<Self, FileError> {
        use crate::durable::OnPath;
        let dir = state_dir.join("positions");
        std::fs::create_dir_all(&dir).on("create", &dir)?;
        Ok(Self(dir))
    }

    /// `None` when nothing was reported yet, or what stands there makes no sense.
    pub fn read(&self, database: &Identity) -> Option<Position> {
        serde_json::from_slice(&std::fs::read(self.path(database)).ok()?).ok()
    }

    /// # Errors
    /// When the disk fails.
    pub fn write(&self, database: &Identity, position: &Position) -> Result<(), FileError> {
        durable::replace(&self.path(database), &serde_json::to_vec(position).unwrap_or_default())
    }

    fn path(&self, database: &Identity) -> PathBuf {
        self.0.join(format!("{database}.json"))
    }
}
