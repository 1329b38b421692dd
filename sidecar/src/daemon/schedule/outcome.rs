//! What the runs of a schedule came to, kept on disk: a restart must not end an alert.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::durable::{self, FileError};
use crate::ids::RestorePointId;

/// One schedule's file in the state directory.
#[derive(Debug, Clone)]
pub(super) struct OutcomeFile(PathBuf);

/// The last run that began, and what came of the last one that ended.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Outcome {
    /// The repository's id: an outcome in another repository says nothing about this one.
    pub repository: Option<RestorePointId>,
    pub last_run: Option<Timestamp>,
    pub last_ok: Option<bool>,
    pub last_message: Option<String>,
    pub last_success: Option<Timestamp>,
}

impl OutcomeFile {
    pub fn new(dir: &Path, schedule: &str) -> Self {
        Self(dir.join(schedule))
    }

    /// What is known about `repository`. When it last ran counts whichever that was.
    pub fn read(&self, repository: RestorePointId) -> Outcome {
        let Ok(text) = std::fs::read_to_string(&self.0) else { return Outcome::default() };
        // Releases before wrote the time of the last run alone.
        let last_run = || text.trim().parse().ok();
        let found =
            serde_json::from_str(&text).unwrap_or_else(|_| Outcome { last_run: last_run(), ..Outcome::default() });
        match found.repository == Some(repository) {
            true => found,
            false => Outcome { last_run: found.last_run, ..Outcome::default() },
        }
    }

    /// # Errors
    /// When the disk fails.
    pub fn write(&self, outcome: &Outcome) -> Result<(), FileError> {
        durable::replace(&self.0, &serde_json::to_vec_pretty(outcome).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_outlives_its_process() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = OutcomeFile::new(dir.path(), "verify");
        let (here, elsewhere) =
            (RestorePointId::after(None, Timestamp::UNIX_EPOCH), RestorePointId::after(None, Timestamp::UNIX_EPOCH));
        assert_eq!(file.read(here), Outcome::default());
        let outcome = Outcome {
            repository: Some(here),
            last_run: Some("2026-01-02T03:04:05Z".parse().expect("a time")),
            last_ok: Some(false),
            last_message: Some("2 findings".to_owned()),
            last_success: Some("2026-01-01T03:04:05Z".parse().expect("a time")),
        };
        file.write(&outcome).expect("write");
        assert_eq!(OutcomeFile::new(dir.path(), "verify").read(here), outcome);
        let other = file.read(elsewhere);
        assert_eq!(
            (other.last_run, other.last_ok),
            (outcome.last_run, None),
            "it says nothing about another repository"
        );
    }

    #[test]
    fn a_file_of_an_earlier_release_is_read() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("prune"), "2026-01-02T03:04:05.5Z\n").expect("write");
        let found = OutcomeFile::new(dir.path(), "prune").read(RestorePointId::after(None, Timestamp::UNIX_EPOCH));
        assert_eq!(found.last_run, Some("2026-01-02T03:04:05.5Z".parse().expect("a time")));
        assert_eq!(found.last_ok, None);
    }
}
