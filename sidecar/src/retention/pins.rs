//! Pins, while a prune deletes restore points at the same time.
//!
//! A prune names in its document what it deletes, and looks for a pin right before and right after it deletes a restore point.
//! A pin is written first, and the document is read after it. So one of the two always sees the other: a pin that is reported
//! set is never lost.

use jiff::Timestamp;
use object_store::path::Path as Key;

use crate::ids::RestorePointId;
use crate::repository::{Repository, RepositoryError, paths};
use crate::retention::RetentionError;
use crate::retention::needs::{self, Listing};

/// Keeps a restore point from retention, and proves that there is something to keep.
///
/// # Errors
/// When it is gone, is being deleted, or lacks what a restore needs; or when the store fails.
pub async fn pin(repository: &Repository, id: RestorePointId, at: Timestamp) -> Result<(), RetentionError> {
    repository.pin(id, at).await?;
    if repository.retention().await?.is_some_and(|retention| retention.deleting.contains(&id)) {
        return Err(RetentionError::BeingDeleted(id));
    }
    let point = repository.restore_point(id).await?;
    let listing: Listing = repository.list(&Key::default()).await?.into_iter().collect();
    let needs = needs::find_of_one(repository, &listing, &point).await?;
    match needs.problems.is_empty() {
        true => Ok(()),
        false => Err(RetentionError::PinnedBroken { id, problems: needs.problems }),
    }
}

/// Deletes a restore point that nobody has pinned. One that is pinned in the meantime is put in its place again.
pub(super) async fn delete(repository: &Repository, id: RestorePointId) -> Result<(), RetentionError> {
    let (key, pin) = (paths::restore_point(id), paths::pin(id));
    if repository.exists(&pin).await? {
        return Err(RetentionError::Pinned(id));
    }
    let document = match repository.get(&key).await {
        Ok(document) => document,
        Err(RepositoryError::Missing { .. }) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    repository.delete(&key).await?;
    if repository.exists(&pin).await? {
        repository.put(&key, document).await?;
        return Err(RetentionError::Pinned(id));
    }
    Ok(())
}
