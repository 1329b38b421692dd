//! Conditional writes that race: whether a store lets exactly one of several writers win.
//!
//! A store may honour a condition when it is asked once, and look before it writes without holding anything in between: then
//! several writers of a race win, and two sidecars hold one lease. Only a race shows it.
//!
//! Invariants: what is written lies below `probe/` and is deleted again, whatever the race shows.

use bytes::Bytes;
use object_store::path::Path as Key;
use object_store::{ObjectStoreExt as _, PutMode, UpdateVersion};

use crate::repository::store::{Operation, Store, refusal};
use crate::repository::{Repository, RepositoryError, paths};

/// Races of each kind: servers that check too early let several win in most, not in all.
const ROUNDS: u32 = 5;
const WRITERS: u32 = 8;

/// What racing conditional writes have shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Race {
    /// Writers of each race.
    pub writers: u32,
    /// The most that created one object in the same race.
    pub created: u32,
    /// The most that replaced one version in the same race. 1 where the store is a directory, whose lock decides.
    pub updated: u32,
    /// An object held another content than that of the one writer that won.
    pub mixed: bool,
}

impl Race {
    /// Returns true if exactly one writer won every race, and its content is what the store holds.
    pub fn is_decided(&self) -> bool {
        self.created == 1 && self.updated == 1 && !self.mixed
    }
}

impl Store {
    /// Races writers for scratch objects. A store that does not take conditions at all has no winner.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn race(&self) -> Result<Race, RepositoryError> {
        let mut race = Race { writers: WRITERS, created: 0, updated: 0, mixed: false };
        for _ in 0..ROUNDS {
            let key = paths::probe(ulid::Ulid::new());
            let raced = self.race_for(&key, &mut race).await;
            self.clear(&key).await;
            raced?;
        }
        Ok(race)
    }

    async fn race_for(&self, key: &Key, race: &mut Race) -> Result<(), RepositoryError> {
        let created = self.round(key, "created", &PutMode::Create, race).await?;
        race.created = race.created.max(created);
        if self.local().is_some() {
            race.updated = 1;
        } else if created > 0 {
            let (_, version) = self.get(key).await?;
            let version = UpdateVersion { e_tag: version.e_tag, version: version.version };
            let updated = self.round(key, "updated", &PutMode::Update(version), race).await?;
            race.updated = race.updated.max(updated);
        }
        Ok(())
    }

    /// Returns how many writers won.
    async fn round(&self, key: &Key, what: &str, mode: &PutMode, race: &mut Race) -> Result<u32, RepositoryError> {
        let body = |writer: u32| Bytes::from(format!("{what} by writer {writer}"));
        let writes = (0..WRITERS).map(|writer| {
            let (store, key, mode) = (self.clone(), key.clone(), mode.clone());
            let bytes = body(writer);
            // Tasks of their own, so that requests leave at the same time.
            tokio::spawn(async move { store.put_as(&key, bytes, mode).await })
        });
        let (mut won, mut winner) = (0, None);
        for (writer, written) in (0..).zip(futures::future::join_all(writes).await) {
            match written {
                Ok(Ok(_)) => {
                    won += 1;
                    winner = Some(writer);
                }
                Ok(Err(RepositoryError::Conflict { .. })) => {}
                Ok(Err(error)) if refusal::lacks_conditions(&error) => {}
                Ok(Err(error)) => return Err(error),
                Err(ended) => return Err(RepositoryError::damaged(key, ended)),
            }
        }
        if let Some(winner) = winner.filter(|_| won == 1) {
            race.mixed |= self.get(key).await?.0 != body(winner);
        }
        Ok(won)
    }

    /// Deletes a scratch object, as far as the store lets us.
    async fn clear(&self, key: &Key) {
        match self.within(Operation::Delete, key, 0, self.objects().delete(key)).await {
            Ok(()) | Err(RepositoryError::Missing { .. }) => {}
            Err(error) => tracing::warn!(%key, %error, "failed to delete a scratch object"),
        }
        if let (Some(directory), Some(folder)) = (self.local(), key.parts().next()) {
            let _ = std::fs::remove_dir(directory.join(folder.as_ref()));
        }
    }
}

impl Repository {
    /// Races conditional writes in the repository's store; see [`Store::race`].
    ///
    /// # Errors
    /// When the store fails.
    pub async fn race(&self) -> Result<Race, RepositoryError> {
        self.store.race().await
    }
}
