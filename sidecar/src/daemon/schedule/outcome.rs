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
    /// The run that began and has not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub running: Option<Running>,
    /// How many runs in a row were killed with their process.
    #[serde(default)]
    pub killed: u32,
    /// When the schedule was there first: what came due since then and never ran is made up for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_seen: Option<Timestamp>,
}

/// A run, and when the one before it began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Running {
    pub since: Timestamp,
    pub before: Option<Timestamp>,
}

impl Outcome {
    /// As the next process finds it. A run that was killed has failed, and is made up for once: what kills its process each
    /// time, such as a lack of memory, must not do so at each start.
    pub fn found(mut self, now: Timestamp) -> Self {
        self.first_seen.get_or_insert(now);
        if let Some(Running { since, before }) = self.running.take() {
            self.killed = self.killed.saturating_add(1);
            self.last_ok = Some(false);
            self.last_message = Some(format!("the run of {since} did not end: the sidecar was killed"));
            if self.killed == 1 {
                self.last_run = before;
            }
        }
        self
    }
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
            false => Outcome { last_run: found.last_run, first_seen: found.first_seen, ..Outcome::default() },
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
            ..Outcome::default()
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
    fn a_run_that_did_not_end_has_failed_and_a_schedule_counts_from_when_it_was_there_first() {
        let time = |text: &str| text.parse::<Timestamp>().expect("a time");
        let (first, now) = (time("2026-01-02T03:04:05Z"), time("2026-01-05T00:00:00Z"));
        let fresh = Outcome::default().found(first);
        assert_eq!((fresh.first_seen, fresh.last_ok), (Some(first), None));
        assert_eq!(fresh.clone().found(now), fresh, "nothing was begun");
        let running = |since| Some(Running { since, before: Some(first) });
        let killed = Outcome { running: running(now), last_run: Some(now), last_ok: Some(true), ..fresh }.found(now);
        assert_eq!((killed.last_ok, &killed.running, killed.first_seen), (Some(false), &None, Some(first)));
        assert_eq!(killed.last_run, Some(first), "it is made up for");
        assert!(killed.last_message.as_deref().is_some_and(|message| message.contains("did not end")));
        let again = Outcome { running: running(now), last_run: Some(now), ..killed }.found(now);
        assert_eq!((again.last_run, again.killed), (Some(now), 2), "once, and then at its next time");
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
