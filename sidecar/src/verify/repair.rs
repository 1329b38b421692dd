//! Repair: writes anew what the rest of the repository tells. Nothing is deleted; what is replaced is kept beside it.

use crate::clock::Clock;
use crate::repository::{Repository, RepositoryError, document, paths};

/// Rebuilds the documents of timelines that are missing or damaged, from the log. Returns what was written.
///
/// # Errors
/// When the lease is lost or the store fails.
pub async fn repair(repository: &Repository, clock: &dyn Clock) -> Result<Vec<String>, RepositoryError> {
    let mut written = Vec::new();
    for database in repository.databases().await? {
        let found = repository.timelines_and_problems(&database).await?;
        for timeline in found.timelines {
            let key = paths::timeline(&database, timeline.timeline);
            if found.problems.iter().any(|(problem, _)| *problem == key) {
                repository.replace(&key, document::write(&timeline).into(), clock.now()).await?;
                written.push(key.to_string());
            }
        }
    }
    Ok(written)
}
