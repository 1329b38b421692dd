//! The repository: every object of a backup, its name and its form. FORMAT.md describes the bytes.
//!
//! Invariants: an object is written once and never changed, unless it was damaged; what a manifest names was durable before
//! the manifest was written; whatever is read is checked against a hash before it is used; only this room builds object names.

pub mod address;
pub mod chain;
mod codec;
mod contents;
pub mod crypto;
mod directory;
pub mod document;
pub mod hashing;
pub mod instance;
pub(crate) mod large;
pub mod lease;
mod lineage;
pub mod log_object;
pub mod manifest;
pub mod pack;
pub mod paths;
pub mod proof;
pub(crate) mod ranges;
pub mod remembered;
pub mod store;
pub mod timeline;

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::path::Path as Key;
use object_store::{ObjectMeta, ObjectStoreExt, PutMode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::clock::{Clock, Stopwatch};
use crate::config::RepositoryConfig;
use crate::datadir::bytes::Malformed;
use crate::durable::FileError;
use crate::ids::RestorePointId;
use crate::repository::crypto::{CryptoError, Keyring};
use crate::repository::hashing::{HashKey, Hashing};
use crate::repository::large::LargePut;
use crate::repository::lease::Fence;
use crate::repository::manifest::RepositoryInfo;
use crate::repository::store::{Conditional, Operation, Store};

/// What can go wrong with the repository.
#[derive(Debug, thiserror::Error)]
pub enum RepositoryError {
    #[error("{url} cannot be used as a repository: {reason}")]
    BadUrl { url: String, reason: String },
    #[error("there is no repository at {url}; `inner-universe repository init` makes one")]
    NoRepository { url: String },
    #[error(
        "repository {expected} is not at {url} any more: mount the disk, or correct the address; if it is lost for good, \
         `inner-universe repository init --replace` makes a new one"
    )]
    Vanished { url: String, expected: RestorePointId },
    #[error(
        "{url} holds repository {found}, and this data directory was archived to repository {expected} there; if the change is \
         meant, accept it with `inner-universe repository init --replace`"
    )]
    Replaced { url: String, expected: RestorePointId, found: RestorePointId },
    #[error(
        "the repository at {url} was encrypted to {expected:?} and is now to {found:?}; if the change is meant, accept it with \
         `inner-universe repository init --replace`"
    )]
    OtherRecipients { url: String, expected: Vec<String>, found: Vec<String> },
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
    #[error("the store refused {key}: {hint} (it said: {said})")]
    Denied { key: String, hint: &'static str, said: String },
    #[error("the store gave no answer on {key} within {after:?}; check that it is reachable")]
    Timeout { key: String, after: std::time::Duration },
    #[error(
        "{writer} is writing to this repository until {expires_at}; stop it, wait until its lease expires, or take over \
         with --force if it is dead"
    )]
    Locked { writer: String, expires_at: jiff::Timestamp },
    #[error("the lease on the repository {}; nothing was written since", if *.expired { "expired before it was renewed" } else { "was taken by another sidecar" })]
    LeaseLost { expired: bool },
    #[error("{url} holds other things and no repository: {found}; choose an empty bucket, directory or prefix")]
    NotEmpty { url: String, found: String },
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    #[error(
        "which repositories were archived to cannot be told: {0}; mend that, or say with `inner-universe repository init --replace` that the address is right"
    )]
    Forgotten(FileError),
}

impl RepositoryError {
    /// Returns true if retrying cannot succeed. A repository that is not there may come back: its disk may be mounted.
    pub fn is_permanent(&self) -> bool {
        !matches!(
            self,
            Self::Store { .. } | Self::Timeout { .. } | Self::LeaseLost { expired: true } | Self::NoRepository { .. }
        ) && !self.is_other_repository()
    }

    /// Returns true if the repository that is expected at the address is not there.
    pub fn is_other_repository(&self) -> bool {
        matches!(self, Self::Vanished { .. } | Self::Replaced { .. } | Self::OtherRecipients { .. })
    }

    /// Is something wrong with what is stored? Not so where the store failed, or refused: it may yet hold all of it.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::Damaged { .. } | Self::Crypto(_))
    }

    pub(crate) fn damaged(key: &Key, reason: impl ToString) -> Self {
        Self::Damaged { key: key.to_string(), reason: reason.to_string() }
    }

    fn store(key: &Key, source: object_store::Error) -> Self {
        let key = key.to_string();
        match source {
            object_store::Error::NotFound { .. } if store::hint(&source).is_none() => Self::Missing { key },
            object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. } => {
                Self::Conflict { key }
            }
            source => match store::hint(&source) {
                Some(hint) => Self::Denied { key, hint, said: store::said(&source) },
                None => Self::Store { key, source },
            },
        }
    }
}

/// An open repository.
#[derive(Clone)]
pub struct Repository {
    store: Store,
    conditional: Conditional,
    fence: Option<Arc<Fence>>,
    /// In a directory: the file that says which repository it is.
    marker: Option<Arc<Marker>>,
    pub info: RepositoryInfo,
    pub keys: Keyring,
}

impl Repository {
    /// Opens the repository at `url` to read.
    ///
    /// # Errors
    /// [`RepositoryError::NoRepository`] when nothing is there.
    pub async fn open(url: &str, config: &RepositoryConfig, keys: Keyring) -> Result<Self, RepositoryError> {
        Self::open_in(Store::connect(url, config, false)?, url, keys).await
    }

    /// Opens the repository at `url` to write. It must be there.
    ///
    /// # Errors
    /// [`RepositoryError::NoRepository`] when nothing is there, or when the store fails.
    pub async fn open_to_write(url: &str, config: &RepositoryConfig, keys: Keyring) -> Result<Self, RepositoryError> {
        let store = Store::connect(url, config, false)?;
        let mut opened = Self::open_in(store.clone(), url, keys).await?;
        opened.conditional = store.probe(&paths::repository()).await?;
        Ok(opened)
    }

    /// Opens the repository at `url` to write, or makes one that encrypts to the keyring's recipients.
    ///
    /// # Errors
    /// When the store fails, or the repository seals to other recipients than those given.
    pub async fn open_or_create(
        url: &str,
        config: &RepositoryConfig,
        keys: Keyring,
        clock: &dyn Clock,
    ) -> Result<Self, RepositoryError> {
        Self::open_or_create_in(Store::connect(url, config, true)?, url, keys, clock).await
    }

    /// As [`Self::open`], in a store that is connected already.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_in(store: Store, url: &str, keys: Keyring) -> Result<Self, RepositoryError> {
        let key = paths::repository();
        let bytes = match store.get(&key).await {
            Ok((bytes, _)) => bytes,
            Err(RepositoryError::Missing { .. }) => return Err(RepositoryError::NoRepository { url: url.into() }),
            Err(error) => return Err(error),
        };
        let info: RepositoryInfo = document::read(&bytes).map_err(|error| RepositoryError::damaged(&key, error))?;
        if info.format > manifest::KEYED_FORMAT {
            return Err(RepositoryError::UnknownFormat { found: info.format, known: manifest::KEYED_FORMAT });
        }
        let keys = keys.with_recipients(&info.recipients)?.with_hash_key(info.hash_key.as_deref())?;
        let conditional = Conditional { create: true, update: true };
        let marker = store.local().map(|dir| Arc::new(Marker::new(url, dir.join(key.as_ref()), info.id)));
        Ok(Self { store, conditional, fence: None, marker, info, keys })
    }

    /// As [`Self::open_or_create`], in a store that is connected already.
    ///
    /// # Errors
    /// As [`Self::open_or_create`].
    pub async fn open_or_create_in(
        store: Store,
        url: &str,
        keys: Keyring,
        clock: &dyn Clock,
    ) -> Result<Self, RepositoryError> {
        let key = paths::repository();
        let mut opened = Self::open_in(store.clone(), url, keys.clone()).await;
        if matches!(opened, Err(RepositoryError::NoRepository { .. })) {
            // A mistyped prefix must not fill a place that belongs to something else.
            let listed = store.within(Operation::List, &key, 0, store.objects().list_with_delimiter(None)).await?;
            let mut found = listed.objects.iter().map(|object| &object.location).chain(&listed.common_prefixes);
            // A fresh file system has a directory of its own, and a look at the store may have left something.
            let is_ours = |key: &Key| *key == paths::repository() || ["lost+found", "probe"].contains(&key.as_ref());
            if let Some(found) = found.find(|key| !is_ours(key)) {
                return Err(RepositoryError::NotEmpty { url: url.into(), found: found.to_string() });
            }
            let hash_key = keys.seals().then(HashKey::generate);
            let info = RepositoryInfo {
                format: if hash_key.is_some() { manifest::KEYED_FORMAT } else { manifest::FORMAT },
                id: RestorePointId(ulid::Ulid::new()),
                created_at: clock.now(),
                recipients: keys.recipient_names(),
                hash_key: hash_key.map(|key| key.seal(&keys)).transpose()?,
            };
            let made = match store.put(&key, document::write(&info).into(), PutMode::Create).await {
                // Somebody else made it at the same moment: theirs is the one.
                Ok(_) | Err(RepositoryError::Conflict { .. }) => Self::open_in(store.clone(), url, keys).await,
                Err(error) => Err(error),
            };
            opened = made.map(|mut opened| {
                if let Some(key) = hash_key.filter(|_| opened.info == info) {
                    opened.keys.remember(key);
                }
                opened
            });
        }
        let mut opened = opened?;
        opened.conditional = store.probe(&key).await?;
        Ok(opened)
    }

    /// Which conditional writes the store honours; only known of a repository opened to write.
    pub fn conditional(&self) -> Conditional {
        self.conditional
    }

    /// Does it lie on a disk of this machine?
    pub(crate) fn is_local(&self) -> bool {
        self.store.local().is_some()
    }

    /// How content is named where names stand in clear.
    ///
    /// # Errors
    /// When that takes a key that is not on this machine.
    pub fn hashing(&self) -> Result<Hashing, RepositoryError> {
        Ok(self.keys.hashing()?)
    }

    /// The same repository, whose writes fail once `fence` says so.
    fn fenced(mut self, fence: Arc<Fence>) -> Self {
        self.fence = Some(fence);
        self
    }

    /// Reads a whole object.
    ///
    /// # Errors
    /// When it is missing or the store fails.
    pub async fn get(&self, key: &Key) -> Result<Bytes, RepositoryError> {
        Ok(self.store.get(key).await?.0)
    }

    /// Reads the first `len` bytes of an object, or all of a shorter one.
    ///
    /// # Errors
    /// When it is missing or the store fails.
    pub async fn get_start(&self, key: &Key, len: u64) -> Result<Bytes, RepositoryError> {
        // A range that ends after the object ends with it; of an empty one, stores refuse any range.
        match self.get_range(key, 0..len).await {
            Err(error @ RepositoryError::Store { .. }) => match self.head(key).await {
                Ok(found) if found.size == 0 => Ok(Bytes::new()),
                _ => Err(error),
            },
            result => result,
        }
    }

    /// Reads some bytes of an object.
    ///
    /// # Errors
    /// When it is missing or shorter, or the store fails.
    pub async fn get_range(&self, key: &Key, range: std::ops::Range<u64>) -> Result<Bytes, RepositoryError> {
        let len = range.end.saturating_sub(range.start);
        self.store.within(Operation::Get, key, len, self.store.objects().get_range(key, range)).await
    }

    /// Deletes an object. One that is gone already is no error.
    ///
    /// # Errors
    /// When the lease is lost or the store fails.
    pub async fn delete(&self, key: &Key) -> Result<(), RepositoryError> {
        self.check_fence().await?;
        match self.store.within(Operation::Delete, key, 0, self.store.objects().delete(key)).await {
            Err(RepositoryError::Missing { .. }) => Ok(()),
            result => result,
        }
    }

    /// Before each write: the lease must be held, and the repository still be there.
    async fn check_fence(&self) -> Result<(), RepositoryError> {
        self.fence.as_ref().map_or(Ok(()), |fence| fence.check())?;
        self.check_marker().await
    }

    /// In a directory that costs a look at one file. Elsewhere the lease's conditional renewals tell.
    async fn check_marker(&self) -> Result<(), RepositoryError> {
        let Some(marker) = self.marker.clone() else { return Ok(()) };
        self.store.on_disk(&paths::repository(), move || marker.check()).await
    }

    /// Writes an object that must not be there yet; the same bytes under the same name are no conflict.
    ///
    /// # Errors
    /// [`RepositoryError::Conflict`] when other bytes are there, or when the store fails.
    pub async fn put(&self, key: &Key, bytes: Bytes) -> Result<(), RepositoryError> {
        self.check_fence().await?;
        // Where names are overwritten without a word, looking first is the best there is.
        let written = if !self.conditional.create && self.exists(key).await? {
            Err(RepositoryError::Conflict { key: key.to_string() })
        } else {
            self.store.put(key, bytes.clone(), PutMode::Create).await
        };
        match written {
            Err(RepositoryError::Conflict { .. }) if self.get(key).await? == bytes => Ok(()),
            result => result.map(|_| ()),
        }
    }

    /// Puts `bytes` where a damaged object is, or none; what was there is kept below `damaged/`.
    ///
    /// # Errors
    /// When the lease is lost or the store fails.
    pub(crate) async fn replace(&self, key: &Key, bytes: Bytes, at: jiff::Timestamp) -> Result<(), RepositoryError> {
        match self.get(key).await {
            // Somebody else was first.
            Ok(found) if found == bytes => return Ok(()),
            Ok(damaged) => self.put(&paths::damaged(key, at), damaged).await?,
            Err(RepositoryError::Missing { .. }) => {}
            Err(error) => return Err(error),
        }
        self.check_fence().await?;
        self.store.put(key, bytes, PutMode::Overwrite).await.map(|_| ())
    }

    /// Begins an object that is too large for memory, with its first bytes. The name must be free: look first.
    ///
    /// # Errors
    /// When the lease is lost or the store fails.
    pub async fn put_large(&self, key: &Key, start: Bytes) -> Result<LargePut<'_>, RepositoryError> {
        self.check_fence().await?;
        let upload = self.store.begin_large(key).await?;
        Ok(LargePut::new(self, key.clone(), upload, start.to_vec()))
    }

    /// Is there an object of this name?
    ///
    /// # Errors
    /// When the store fails.
    pub async fn exists(&self, key: &Key) -> Result<bool, RepositoryError> {
        Ok(self.size(key).await?.is_some())
    }

    /// The bytes of an object; `None` where there is none.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn size(&self, key: &Key) -> Result<Option<u64>, RepositoryError> {
        match self.head(key).await {
            Ok(meta) => Ok(Some(meta.size)),
            Err(RepositoryError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// When an object was written, by the store's clock; `None` where there is none.
    pub(crate) async fn modified_at(&self, key: &Key) -> Result<Option<jiff::Timestamp>, RepositoryError> {
        match self.head(key).await {
            Ok(meta) => Ok(jiff::Timestamp::from_millisecond(meta.last_modified.timestamp_millis()).ok()),
            Err(RepositoryError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn head(&self, key: &Key) -> Result<ObjectMeta, RepositoryError> {
        self.store.within(Operation::Head, key, 0, self.store.objects().head(key)).await
    }

    /// Every object below `prefix`, with its size, in the order of names.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn list(&self, prefix: &Key) -> Result<Vec<(Key, u64)>, RepositoryError> {
        let mut objects = Vec::new();
        self.visit(prefix, |object| objects.push((object.location, object.size))).await?;
        objects.sort();
        Ok(objects)
    }

    /// Gives every object below `prefix` to `take`, as the store lists them.
    async fn visit(&self, prefix: &Key, mut take: impl FnMut(ObjectMeta)) -> Result<(), RepositoryError> {
        let took = Stopwatch::start();
        let mut pages = self.store.objects().list(Some(prefix)).try_ready_chunks(PAGE);
        let mut objects = 0;
        loop {
            // Each page has the deadline of a request: one that is never answered must not hold everything up for ever.
            let page = async { pages.try_next().await.map_err(|error| error.1) };
            match self.store.within(Operation::List, prefix, 0, page).await? {
                Some(page) => {
                    objects += page.len();
                    page.into_iter().for_each(&mut take);
                }
                None => break,
            }
        }
        tracing::debug!(%prefix, objects, seconds = took.elapsed_seconds(), "listed");
        Ok(())
    }

    /// Is there any object below `prefix`? Asks for the first page alone.
    pub(crate) async fn holds_any(&self, prefix: &Key) -> Result<bool, RepositoryError> {
        let mut objects = self.store.objects().list(Some(prefix));
        Ok(self.store.within(Operation::List, prefix, 0, objects.try_next()).await?.is_some())
    }

    /// The names of the folders directly below `prefix`.
    pub(crate) async fn folders(&self, prefix: &Key) -> Result<Vec<String>, RepositoryError> {
        let listed = self
            .store
            .within(Operation::List, prefix, 0, self.store.objects().list_with_delimiter(Some(prefix)))
            .await?;
        let names = listed.common_prefixes.iter().filter_map(|path| path.filename().map(str::to_owned));
        Ok(names.collect())
    }

    pub(crate) async fn get_document<T: DeserializeOwned>(&self, key: &Key) -> Result<T, RepositoryError> {
        let bytes = self.get(key).await?;
        document::read(&bytes).map_err(|error| RepositoryError::damaged(key, error))
    }

    pub(crate) async fn put_document<T: Serialize>(&self, key: &Key, value: &T) -> Result<usize, RepositoryError> {
        let bytes = document::write(value);
        let len = bytes.len();
        self.put(key, bytes.into()).await?;
        Ok(len)
    }
}

/// `repository.json` of a repository in a directory. A disk that is unmounted leaves an empty directory behind, and writing would
/// fill the disk below it.
#[derive(Debug)]
struct Marker {
    url: String,
    path: std::path::PathBuf,
    id: RestorePointId,
    /// Device, inode and time of change of the file when its content was last compared. Disks that were made alike and are
    /// taken in turns differ in the last alone.
    seen: parking_lot::Mutex<Option<(u64, u64, i64, i64)>>,
}

impl Marker {
    fn new(url: &str, path: std::path::PathBuf, id: RestorePointId) -> Self {
        Self { url: url.to_owned(), path, id, seen: parking_lot::Mutex::new(None) }
    }

    fn check(&self) -> Result<(), RepositoryError> {
        use std::os::unix::fs::MetadataExt as _;
        let key = paths::repository();
        // An error of the disk says nothing about what is there.
        let gone = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
                RepositoryError::Vanished { url: self.url.clone(), expected: self.id }
            }
            _ => store::failed(&key, error),
        };
        let found = std::fs::metadata(&self.path).map_err(gone)?;
        let place = Some((found.dev(), found.ino(), found.ctime(), found.ctime_nsec()));
        if *self.seen.lock() == place {
            return Ok(());
        }
        let bytes = std::fs::read(&self.path).map_err(gone)?;
        let found = document::read::<RepositoryInfo>(&bytes).map_err(|error| store::failed(&key, error))?.id;
        if found != self.id {
            return Err(RepositoryError::Replaced { url: self.url.clone(), expected: self.id, found });
        }
        *self.seen.lock() = place;
        Ok(())
    }
}

/// Objects that a store lists in one answer.
const PAGE: usize = 1000;

/// Bytes of the repository that make no sense carry their object's name.
pub(crate) trait InObject<T> {
    fn in_object(self, key: &Key) -> Result<T, RepositoryError>;
}

impl<T> InObject<T> for Result<T, Malformed> {
    fn in_object(self, key: &Key) -> Result<T, RepositoryError> {
        self.map_err(|malformed| RepositoryError::damaged(key, malformed))
    }
}
