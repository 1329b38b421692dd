//! The repository: every object of a backup, its name and its form. FORMAT.md describes the bytes.
//!
//! Invariants: an object is written once and never changed; what a manifest names was durable before the manifest was
//! written; whatever is read is checked against a hash before it is used; only this room builds object names.

pub mod crypto;
pub mod document;
pub mod instance;
pub mod log_object;
pub mod manifest;
pub mod pack;
pub mod paths;
pub mod timeline;

use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::clock::Clock;
use crate::datadir::bytes::Malformed;
use crate::ids::{ContentHash, Identity, Offset, RestorePointId, TimelineId};
use crate::repository::crypto::{CryptoError, Keyring};
use crate::repository::manifest::{RepositoryInfo, RestorePoint, SnapshotManifest, Timeline};

/// What can go wrong with the repository.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    #[error("{url} is not a repository address: {reason}; use file:///absolute/path")]
    BadUrl { url: String, reason: String },
    #[error("there is no repository at {url}; `inner-universe backup create` makes one")]
    NoRepository { url: String },
    #[error("the repository is in format {found}, and this release knows up to {known}; upgrade inner-universe")]
    UnknownFormat { found: u32, known: u32 },
    #[error("object {key} is missing; run `inner-universe verify` to see what else is")]
    Missing { key: String },
    #[error("object {key} is damaged: {reason}; run `inner-universe verify` to see what can still be restored")]
    Damaged { key: String, reason: String },
    #[error("object {key} is there already with other content; another sidecar may be writing to this repository")]
    Conflict { key: String },
    #[error("the store failed on {key}: {source}; check that it is reachable and writable")]
    Store { key: String, source: object_store::Error },
    #[error(transparent)]
    Crypto(#[from] CryptoError),
}

impl RepositoryError {
    /// Would another try be in vain?
    pub fn is_permanent(&self) -> bool {
        !matches!(self, Self::Store { .. })
    }

    pub(crate) fn damaged(key: &Key, reason: impl ToString) -> Self {
        Self::Damaged { key: key.to_string(), reason: reason.to_string() }
    }

    fn store(key: &Key, source: object_store::Error) -> Self {
        match source {
            object_store::Error::NotFound { .. } => Self::Missing { key: key.to_string() },
            source => Self::Store { key: key.to_string(), source },
        }
    }
}

/// An open repository.
#[derive(Clone)]
pub struct Repository {
    store: Arc<dyn ObjectStore>,
    pub info: RepositoryInfo,
    pub keys: Keyring,
}

impl Repository {
    /// Opens the repository at `url`.
    ///
    /// # Errors
    /// [`RepositoryError::NoRepository`] when nothing is there.
    pub async fn open(url: &str, keys: Keyring) -> Result<Self, RepositoryError> {
        Self::open_in(connect(url, false)?, url, keys).await
    }

    /// Opens the repository at `url`, or makes one that seals to the keyring's recipients.
    ///
    /// # Errors
    /// When the store fails, or the repository seals to other recipients than those given.
    pub async fn open_or_create(url: &str, keys: Keyring, clock: &dyn Clock) -> Result<Self, RepositoryError> {
        Self::open_or_create_in(connect(url, true)?, url, keys, clock).await
    }

    /// As [`Self::open`], in a store that is connected already.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_in(store: Arc<dyn ObjectStore>, url: &str, keys: Keyring) -> Result<Self, RepositoryError> {
        let key = paths::repository();
        let bytes = match store.get(&key).await {
            Ok(found) => found.bytes().await.map_err(|error| RepositoryError::store(&key, error))?,
            Err(object_store::Error::NotFound { .. }) => return Err(RepositoryError::NoRepository { url: url.into() }),
            Err(error) => return Err(RepositoryError::store(&key, error)),
        };
        let info: RepositoryInfo = document::read(&bytes).map_err(|error| RepositoryError::damaged(&key, error))?;
        if info.format > manifest::FORMAT {
            return Err(RepositoryError::UnknownFormat { found: info.format, known: manifest::FORMAT });
        }
        let keys = keys.with_recipients(&info.recipients)?;
        Ok(Self { store, info, keys })
    }

    /// As [`Self::open_or_create`], in a store that is connected already.
    ///
    /// # Errors
    /// As [`Self::open_or_create`].
    pub async fn open_or_create_in(
        store: Arc<dyn ObjectStore>,
        url: &str,
        keys: Keyring,
        clock: &dyn Clock,
    ) -> Result<Self, RepositoryError> {
        match Self::open_in(store.clone(), url, keys.clone()).await {
            Err(RepositoryError::NoRepository { .. }) => {}
            opened => return opened,
        }
        let info = RepositoryInfo {
            format: manifest::FORMAT,
            id: RestorePointId(ulid::Ulid::new()),
            created_at: clock.now(),
            recipients: keys.recipient_names(),
        };
        let key = paths::repository();
        match put_new(store.as_ref(), &key, document::write(&info).into()).await {
            // Somebody else made it at the same moment: theirs is the one.
            Ok(()) | Err(RepositoryError::Conflict { .. }) => Self::open_in(store, url, keys).await,
            Err(error) => Err(error),
        }
    }

    /// Reads a whole object.
    ///
    /// # Errors
    /// When it is missing or the store fails.
    pub async fn get(&self, key: &Key) -> Result<Bytes, RepositoryError> {
        let found = self.store.get(key).await.map_err(|error| RepositoryError::store(key, error))?;
        found.bytes().await.map_err(|error| RepositoryError::store(key, error))
    }

    /// Reads the first `len` bytes of an object, or all of a shorter one.
    ///
    /// # Errors
    /// When it is missing or the store fails.
    pub async fn get_start(&self, key: &Key, len: u64) -> Result<Bytes, RepositoryError> {
        let size = self.store.head(key).await.map_err(|error| RepositoryError::store(key, error))?.size;
        self.store.get_range(key, 0..len.min(size)).await.map_err(|error| RepositoryError::store(key, error))
    }

    /// Writes an object that must not be there yet; the same bytes under the same name are no conflict.
    ///
    /// # Errors
    /// [`RepositoryError::Conflict`] when other bytes are there, or when the store fails.
    pub async fn put(&self, key: &Key, bytes: Bytes) -> Result<(), RepositoryError> {
        match put_new(self.store.as_ref(), key, bytes.clone()).await {
            Err(RepositoryError::Conflict { .. }) if self.get(key).await? == bytes => Ok(()),
            result => result,
        }
    }

    /// Is there an object of this name?
    ///
    /// # Errors
    /// When the store fails.
    pub async fn exists(&self, key: &Key) -> Result<bool, RepositoryError> {
        match self.store.head(key).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(error) => Err(RepositoryError::store(key, error)),
        }
    }

    /// Every object below `prefix`, with its size, in the order of names.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list(&self, prefix: &Key) -> Result<Vec<(Key, u64)>, RepositoryError> {
        let objects = self.store.list(Some(prefix)).map_ok(|object| (object.location, object.size));
        let mut objects: Vec<_> = objects.try_collect().await.map_err(|error| RepositoryError::store(prefix, error))?;
        objects.sort();
        Ok(objects)
    }

    /// The names of the folders directly below `prefix`.
    async fn folders(&self, prefix: &Key) -> Result<Vec<String>, RepositoryError> {
        let listed = self.store.list_with_delimiter(Some(prefix)).await;
        let listed = listed.map_err(|error| RepositoryError::store(prefix, error))?;
        let names = listed.common_prefixes.iter().filter_map(|path| path.filename().map(str::to_owned));
        Ok(names.collect())
    }

    async fn get_document<T: DeserializeOwned>(&self, key: &Key) -> Result<T, RepositoryError> {
        let bytes = self.get(key).await?;
        document::read(&bytes).map_err(|error| RepositoryError::damaged(key, error))
    }

    async fn put_document<T: Serialize>(&self, key: &Key, value: &T) -> Result<usize, RepositoryError> {
        let bytes = document::write(value);
        let len = bytes.len();
        self.put(key, bytes.into()).await?;
        Ok(len)
    }

    /// Every restore point's id, oldest first.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn restore_point_ids(&self) -> Result<Vec<RestorePointId>, RepositoryError> {
        let objects = self.list(&paths::restore_points()).await?;
        Ok(objects.iter().filter_map(|(key, _)| paths::parse_restore_point(key)).collect())
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
        let names = self.folders(&paths::timelines(database)).await?;
        let mut timelines = Vec::new();
        for id in names.iter().filter_map(|name| name.parse::<TimelineId>().ok()) {
            match self.get_document(&paths::timeline(database, id)).await {
                Ok(timeline) => timelines.push(timeline),
                // A folder without a document and without log holds nothing that was promised.
                Err(RepositoryError::Missing { .. }) if self.list(&paths::logs(database, id)).await?.is_empty() => {}
                Err(error) => return Err(error),
            }
        }
        timelines.sort_by_key(|timeline: &Timeline| timeline.timeline);
        Ok(timelines)
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

    /// Writes a pack under the name of its content.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn put_pack(&self, database: &Identity, id: ContentHash, bytes: Bytes) -> Result<(), RepositoryError> {
        self.put(&paths::pack(database, id), bytes).await
    }
}

/// Connects to the store that `url` names.
fn connect(url: &str, create: bool) -> Result<Arc<dyn ObjectStore>, RepositoryError> {
    let refuse = |reason: String| RepositoryError::BadUrl { url: url.to_owned(), reason };
    let parsed = url::Url::parse(url).map_err(|error| refuse(error.to_string()))?;
    match parsed.scheme() {
        "file" => {
            let path =
                parsed.to_file_path().map_err(|()| refuse("it is not an absolute path on this machine".into()))?;
            if create {
                std::fs::create_dir_all(&path).map_err(|source| RepositoryError::Store {
                    key: path.display().to_string(),
                    source: object_store::Error::Generic { store: "file", source: source.into() },
                })?;
            } else if !path.is_dir() {
                return Err(RepositoryError::NoRepository { url: url.to_owned() });
            }
            let store = object_store::local::LocalFileSystem::new_with_prefix(&path);
            let store = store.map_err(|error| refuse(error.to_string()))?;
            Ok(Arc::new(store.with_fsync(true)))
        }
        "memory" => Ok(Arc::new(object_store::memory::InMemory::new())),
        scheme => Err(refuse(format!("this release has no store for `{scheme}:`"))),
    }
}

async fn put_new(store: &dyn ObjectStore, key: &Key, bytes: Bytes) -> Result<(), RepositoryError> {
    let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
    match store.put_opts(key, PutPayload::from_bytes(bytes), options).await {
        Ok(_) => Ok(()),
        Err(object_store::Error::AlreadyExists { .. }) => Err(RepositoryError::Conflict { key: key.to_string() }),
        Err(error) => Err(RepositoryError::store(key, error)),
    }
}

/// Bytes of the repository that make no sense carry their object's name.
pub(crate) trait InObject<T> {
    fn in_object(self, key: &Key) -> Result<T, RepositoryError>;
}

impl<T> InObject<T> for Result<T, Malformed> {
    fn in_object(self, key: &Key) -> Result<T, RepositoryError> {
        self.map_err(|malformed| RepositoryError::damaged(key, malformed))
    }
}
