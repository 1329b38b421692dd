//! What a repository holds beside log: restore points, pins, what retention did, timelines, snapshots.

use bytes::Bytes;
use jiff::Timestamp;

use crate::ids::{ContentHash, Identity, Offset, RestorePointId, TimelineId};
use crate::repository::manifest::{
    LastDrill, Pin, RestorePoint, RestorePointList, Retention, SnapshotManifest, Timeline,
};
use crate::repository::{Repository, RepositoryError, document, paths};

impl Repository {
    /// Every restore point's id, oldest first.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn restore_point_ids(&self) -> Result<Vec<RestorePointId>, RepositoryError> {
        let objects = self.list(&paths::restore_points()).await?;
        Ok(objects.iter().filter_map(|(key, _)| paths::parse_restore_point(key)).collect())
    }

    /// Every restore point; those that are missing or damaged are told apart.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn restore_points(&self) -> Result<RestorePointList, RepositoryError> {
        let mut listing = RestorePointList { restore_points: Vec::new(), problems: Vec::new() };
        for id in self.restore_point_ids().await? {
            match self.restore_point(id).await {
                Ok(point) => listing.restore_points.push(point),
                Err(error) if error.is_damage() => listing.problems.push(error.to_string()),
                Err(error) => return Err(error),
            }
        }
        Ok(listing)
    }

    /// # Errors
    /// When it is missing or damaged.
    pub async fn restore_point(&self, id: RestorePointId) -> Result<RestorePoint, RepositoryError> {
        self.get_document(&paths::restore_point(id)).await
    }

    /// Writes a restore point: the last write of a backup. Returns the bytes written.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn put_restore_point(&self, point: &RestorePoint) -> Result<usize, RepositoryError> {
        self.put_document(&paths::restore_point(point.id), point).await
    }

    /// What retention did last; `None` where it never did anything.
    ///
    /// # Errors
    /// When the store fails, or the document is damaged.
    pub async fn retention(&self) -> Result<Option<Retention>, RepositoryError> {
        let mut result = Ok(None);
        for _ in 0..2 {
            let found = self.list(&paths::retentions()).await?;
            if found.is_empty() {
                break;
            }
            for (key, _) in found.into_iter().rev() {
                match self.get_document(&key).await {
                    Ok(found) => return Ok(Some(found)),
                    // A prune has put a newer one in its place meanwhile.
                    Err(RepositoryError::Missing { .. }) => {}
                    // The one before says nearly the same: what was removed stays so.
                    Err(error) if error.is_damage() => {
                        tracing::warn!(%error, "what retention did is read from the document before");
                        result = Err(error);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        result
    }

    /// The newest drill; `None` before the first.
    ///
    /// # Errors
    /// When the store fails, or its result is damaged.
    pub async fn last_drill(&self) -> Result<Option<LastDrill>, RepositoryError> {
        match self.list(&paths::drills()).await?.pop() {
            Some((key, _)) => self.get_document(&key).await.map(Some),
            None => Ok(None),
        }
    }

    /// Restore points that retention keeps.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn pins(&self) -> Result<Vec<RestorePointId>, RepositoryError> {
        let objects = self.list(&paths::pins()).await?;
        Ok(objects.iter().filter_map(|(key, _)| paths::parse_restore_point(key)).collect())
    }

    /// Keeps a restore point from retention. One that is pinned already stays so.
    ///
    /// # Errors
    /// When there is no such restore point, or the store fails.
    pub async fn pin(&self, id: RestorePointId, at: jiff::Timestamp) -> Result<(), RepositoryError> {
        self.restore_point(id).await?;
        if self.exists(&paths::pin(id)).await? {
            return Ok(());
        }
        self.put_document(&paths::pin(id), &Pin { restore_point: id, pinned_at: at }).await?;
        // A prune that had read the pins before may have taken it.
        match self.restore_point(id).await {
            Ok(_) => Ok(()),
            Err(error) => {
                self.unpin(id).await?;
                Err(error)
            }
        }
    }

    /// Leaves a restore point to retention.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn unpin(&self, id: RestorePointId) -> Result<(), RepositoryError> {
        self.delete(&paths::pin(id)).await
    }

    /// Every database with anything in the repository.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn databases(&self) -> Result<Vec<Identity>, RepositoryError> {
        let names = self.folders(&paths::databases()).await?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Every timeline of a database, oldest first.
    ///
    /// # Errors
    /// When the store fails or a timeline's document is damaged.
    pub async fn timelines(&self, database: &Identity) -> Result<Vec<Timeline>, RepositoryError> {
        let found = self.timelines_and_problems(database).await?;
        for (key, error) in found.problems {
            let id = key.parts().rev().nth(1).and_then(|id| id.as_ref().parse::<TimelineId>().ok());
            if !found.timelines.iter().any(|timeline| Some(timeline.timeline) == id) {
                let Some(id) = id else { return Err(error) };
                if self.holds_any(&paths::logs(database, id)).await? {
                    return Err(error);
                }
                tracing::warn!(%error, "the timeline has no log, and is passed over");
                continue;
            }
            tracing::warn!(%error, "what the timeline was is told by its log; `inner-universe verify --repair` writes it anew");
        }
        Ok(found.timelines)
    }

    /// # Errors
    /// When the store fails.
    pub async fn put_timeline(&self, database: &Identity, timeline: &Timeline) -> Result<usize, RepositoryError> {
        self.put_document(&paths::timeline(database, timeline.timeline), timeline).await
    }

    /// The offsets of every snapshot kept on one timeline, oldest first.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn snapshots(&self, database: &Identity, timeline: TimelineId) -> Result<Vec<Offset>, RepositoryError> {
        let objects = self.list(&paths::snapshots(database, timeline)).await?;
        Ok(objects.iter().filter_map(|(key, _)| paths::parse_snapshot(key)).collect())
    }

    /// # Errors
    /// When it is missing or damaged.
    pub async fn snapshot(
        &self,
        database: &Identity,
        timeline: TimelineId,
        offset: Offset,
    ) -> Result<SnapshotManifest, RepositoryError> {
        self.get_document(&paths::snapshot(database, timeline, offset)).await
    }

    /// # Errors
    /// When the store fails.
    pub async fn put_snapshot(&self, manifest: &SnapshotManifest) -> Result<usize, RepositoryError> {
        self.put_document(&paths::snapshot(&manifest.identity, manifest.timeline, manifest.offset), manifest).await
    }

    /// Writes a snapshot's description in place of a damaged one, or of one whose packs are. Returns the bytes written.
    ///
    /// # Errors
    /// When the store fails.
    pub(crate) async fn replace_snapshot(
        &self,
        manifest: &SnapshotManifest,
        now: Timestamp,
    ) -> Result<usize, RepositoryError> {
        let bytes = document::write(manifest);
        let len = bytes.len();
        self.replace(&paths::snapshot(&manifest.identity, manifest.timeline, manifest.offset), bytes.into(), now)
            .await?;
        Ok(len)
    }

    /// Writes a pack under the name of its content.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn put_pack(&self, database: &Identity, id: ContentHash, bytes: Bytes) -> Result<(), RepositoryError> {
        self.put(&paths::pack(database, id), bytes).await
    }
}
