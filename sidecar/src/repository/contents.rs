//! What a repository holds beside log: restore points, pins, what retention did, timelines, snapshots.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use jiff::Timestamp;

use crate::ids::{ContentHash, Identity, Offset, RestorePointId, TimelineId};
use crate::repository::crypto::CryptoError;
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
        let key = paths::restore_point(id);
        let mut point: RestorePoint = self.get_document(&key).await?;
        // Without an identity they stay closed; only drills need them.
        if let Some(sealed) = point.sealed_promises.as_ref().filter(|_| self.keys.can_open()) {
            let sealed = BASE64_STANDARD.decode(sealed).map_err(|error| RepositoryError::damaged(&key, error))?;
            match self.keys.open(&sealed) {
                Ok(plain) => {
                    point.promises =
                        serde_json::from_slice(&plain).map_err(|error| RepositoryError::damaged(&key, error))?;
                    point.sealed_promises = None;
                }
                Err(CryptoError::Damaged(reason)) => return Err(RepositoryError::damaged(&key, reason)),
                Err(_) => {}
            }
        }
        Ok(point)
    }

    /// Writes a restore point: the last write of a backup. Returns the bytes written.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn put_restore_point(&self, point: &RestorePoint) -> Result<usize, RepositoryError> {
        let mut point = point.clone();
        if self.keys.seals() && !point.promises.is_empty() {
            let plain = serde_json::to_vec(&std::mem::take(&mut point.promises)).unwrap_or_default();
            point.sealed_promises = Some(BASE64_STANDARD.encode(self.keys.seal(plain)?));
        }
        self.put_document(&paths::restore_point(point.id), &point).await
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use age::secrecy::ExposeSecret as _;

    use super::*;
    use crate::clock::{Clock as _, SystemClock};
    use crate::repository::crypto::Keyring;
    use crate::repository::manifest::{DatabasePromise, FORMAT, RowForm, TablePromise};
    use crate::repository::store::Store;

    #[tokio::test]
    async fn encrypted_repositories_publish_no_hashes_of_rows() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let identity = age::x25519::Identity::generate();
        let file = dir.path().join("identity.txt");
        std::fs::write(&file, identity.to_string().expose_secret()).expect("write");
        let store = Store::around(Arc::new(object_store::memory::InMemory::new()));
        let keys = Keyring::new(&[identity.to_public().to_string()], &[]).expect("a keyring");
        let writer = Repository::open_or_create_in(store.clone(), "memory://", keys, &SystemClock).await.expect("made");
        let hash = "00000000deadbeef".repeat(32);
        let promise = DatabasePromise {
            database: Identity([7; 32]),
            offset: Offset(3),
            tables: vec![TablePromise {
                name: "secret_table".into(),
                rows: 1,
                form: RowForm::Bsatn,
                hash: Some(hash.clone()),
            }],
        };
        let point = RestorePoint {
            format: FORMAT,
            id: RestorePointId::after(None, SystemClock.now()),
            label: None,
            created_at: SystemClock.now(),
            server_version: None,
            tool_version: "0".into(),
            instance: ContentHash([0; 32]),
            instance_state: ContentHash([0; 32]),
            has_keys: false,
            databases: Vec::new(),
            promises: vec![promise.clone()],
            sealed_promises: None,
        };
        writer.put_restore_point(&point).await.expect("written");
        let stored = writer.get(&paths::restore_point(point.id)).await.expect("stored");
        let stored = String::from_utf8_lossy(&stored).into_owned();
        assert!(!stored.contains(&hash) && !stored.contains("secret_table"), "{stored}");
        // The writer has no identity, and need not read them.
        assert_eq!(writer.restore_point(point.id).await.expect("read").promises, []);
        let keys = Keyring::new(&[], &[file]).expect("a keyring");
        let reader = Repository::open_in(store, "memory://", keys).await.expect("opened");
        assert_eq!(reader.restore_point(point.id).await.expect("read").promises, [promise]);
    }
}
