//! The stores a repository can lie in, and what they really do: connect, deadlines, and whether conditional writes hold.
//!
//! Invariants: every request has a deadline; retries back off and end; credentials never enter an error message.

mod cloud;
mod credentials;
mod http;
mod listing;
mod ordered;
mod race;
mod refusal;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use object_store::path::Path as Key;
use object_store::{
    Attribute, Attributes, ObjectStore, ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload,
    UpdateVersion,
};
use opentelemetry::KeyValue;
use tokio::sync::Semaphore;
use tokio_util::task::AbortOnDropHandle;
use tracing::field::Empty;
use tracing::{Instrument as _, Span};

use crate::clock::Stopwatch;
use crate::config::RepositoryConfig;
use crate::config::value::without_user;
use crate::observe::metrics;
use crate::repository::address::{Address, Place};
use crate::repository::directory::Directory;
pub(crate) use crate::repository::store::cloud::virtual_endpoint;
pub use crate::repository::store::race::Race;
pub(super) use crate::repository::store::refusal::{hint, said};
use crate::repository::{RepositoryError, paths};

/// The slowest store that still counts as answering.
const SLOWEST_BYTES_PER_SECOND: u64 = 32 << 10;

/// Threads that look at a repository's disk at once.
const DISK_THREADS: usize = 2;

/// A connected store with its deadlines.
#[derive(Clone)]
pub struct Store {
    objects: Arc<dyn ObjectStore>,
    /// Where a `file://` store lies: its lease cannot be replaced conditionally through [`ObjectStore`].
    local: Option<Arc<Directory>>,
    /// A disk that hangs takes no more threads than this allows.
    disk: Arc<Semaphore>,
    timeout: Duration,
    /// Of bulk objects.
    storage_class: Option<String>,
    requests: Arc<AtomicU64>,
    /// It has refused a condition that it does not know.
    unconditional: Arc<AtomicBool>,
}

/// Which conditional writes a store honours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conditional {
    /// A name that is taken is not overwritten.
    pub create: bool,
    /// A version that was replaced is not replaced again.
    pub update: bool,
}

/// What is asked of a store, as metrics tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Get,
    Head,
    List,
    Put,
    Part,
    Delete,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Head => "head",
            Self::List => "list",
            Self::Put => "put",
            Self::Part => "part",
            Self::Delete => "delete",
        }
    }
}

fn outcome<T>(result: &Result<T, RepositoryError>) -> &'static str {
    match result {
        Ok(_) => "ok",
        Err(RepositoryError::Missing { .. }) => "missing",
        Err(RepositoryError::Conflict { .. }) => "conflict",
        Err(RepositoryError::Denied { .. }) => "denied",
        Err(RepositoryError::Timeout { .. }) => "timeout",
        Err(_) => "error",
    }
}

/// Returns an error unless `url` is an address of a repository.
///
/// # Errors
/// The reason why not.
pub fn check_url(url: &str) -> Result<(), String> {
    Address::parse(url).map(drop)
}

impl Store {
    /// Connects to the store that `url` names; `create` makes a missing `file://` directory.
    ///
    /// # Errors
    /// [`RepositoryError::BadUrl`] and configuration that the store's client refuses.
    pub fn connect(url: &str, config: &RepositoryConfig, create: bool) -> Result<Self, RepositoryError> {
        let refuse = |reason: String| RepositoryError::BadUrl { url: without_user(url), reason };
        let mut local = None;
        let address = Address::parse(url).map_err(refuse)?;
        let is_bucket = matches!(address.place(), Place::Bucket { .. });
        let bare: Arc<dyn ObjectStore> = match address.place() {
            Place::Directory(path) => {
                let (store, directory) = open_directory(url, path, create)?;
                local = Some(Arc::new(directory));
                store
            }
            Place::Memory => Arc::new(object_store::memory::InMemory::new()),
            Place::Bucket { provider, name, prefix } => {
                let store = cloud::connect(provider.scheme(), name, config)?;
                if prefix.as_ref().is_empty() {
                    store
                } else {
                    Arc::new(object_store::prefix::PrefixStore::new(store, prefix.clone()))
                }
            }
        };
        // Directories know no classes.
        let storage_class = config.storage_class.clone().filter(|_| is_bucket);
        Ok(Self { local, timeout: config.request_timeout.0, storage_class, ..Self::around(bare) })
    }

    /// Around a store that is connected already.
    pub fn around(objects: Arc<dyn ObjectStore>) -> Self {
        Self {
            objects,
            local: None,
            disk: Arc::new(Semaphore::new(DISK_THREADS)),
            timeout: Duration::from_secs(30),
            storage_class: None,
            requests: Arc::default(),
            unconditional: Arc::default(),
        }
    }

    /// The store itself, for what needs no deadline of its own.
    pub fn objects(&self) -> &dyn ObjectStore {
        self.objects.as_ref()
    }

    /// Requests made so far through this store and its clones; a listing counts once for each page, and once for its end.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    pub(super) fn local(&self) -> Option<&PathBuf> {
        self.local.as_deref().map(Directory::root)
    }

    pub(super) fn directory(&self) -> Option<&Directory> {
        self.local.as_deref()
    }

    async fn prepare(&self, key: &Key) -> Result<(), RepositoryError> {
        let Some(directory) = self.local.clone() else { return Ok(()) };
        let of = key.clone();
        self.on_disk(key, move || directory.prepare(&of).map_err(|error| failed(&of, error))).await
    }

    /// Gives an object that was written to a directory to its owner.
    pub(super) async fn protect(&self, key: &Key) -> Result<(), RepositoryError> {
        let Some(directory) = self.local.clone() else { return Ok(()) };
        let of = key.clone();
        self.on_disk(key, move || {
            directory.protect(&of);
            Ok(())
        })
        .await
    }

    /// Runs what touches the disk beside the store's requests, within a request's time: a disk that hangs holds up nobody
    /// else.
    ///
    /// # Errors
    /// What the work ends in, or that it did not end in time; it may still take effect then.
    pub(super) async fn on_disk<T: Send + 'static>(
        &self,
        key: &Key,
        work: impl FnOnce() -> Result<T, RepositoryError> + Send + 'static,
    ) -> Result<T, RepositoryError> {
        let disk = Arc::clone(&self.disk);
        let working = async {
            // Never closed.
            let turn = disk.acquire_owned().await.ok();
            let work = move || {
                let _turn = turn;
                work()
            };
            // What has not begun in time never does.
            AbortOnDropHandle::new(tokio::task::spawn_blocking(work)).await
        };
        match tokio::time::timeout(self.timeout, working).await {
            Ok(done) => done.unwrap_or_else(|error| Err(failed(key, error))),
            Err(_) => Err(RepositoryError::Timeout { key: key.to_string(), after: self.timeout }),
        }
    }

    /// Runs a request that moves about `bytes`, within its deadline.
    ///
    /// # Errors
    /// What the request ends in, or that it did not end in time.
    pub async fn within<T>(
        &self,
        operation: Operation,
        key: &Key,
        bytes: u64,
        request: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, RepositoryError> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let limit = self.timeout + Duration::from_secs(bytes / SLOWEST_BYTES_PER_SECOND);
        let took = Stopwatch::start();
        // As a part of some work only: what the daemon asks on its own account (leases, looks) would be noise.
        let span = if Span::current().is_none() {
            Span::none()
        } else {
            tracing::info_span!("store", otel.name = operation.name(), otel.kind = "client", %key, outcome = Empty)
        };
        let result = match tokio::time::timeout(limit, request).instrument(span.clone()).await {
            Ok(result) => result.map_err(|error| RepositoryError::store(key, error)),
            Err(_) => Err(RepositoryError::Timeout { key: key.to_string(), after: limit }),
        };
        span.record("outcome", outcome(&result));
        let labels = [KeyValue::new("operation", operation.name()), KeyValue::new("outcome", outcome(&result))];
        metrics::STORE_REQUESTS.record(took.elapsed_seconds(), &labels);
        result
    }

    /// Writes an object under `mode`. Where the store does not take conditional writes, it is looked first whether the
    /// name of a new object is free.
    ///
    /// # Errors
    /// [`RepositoryError::Conflict`] when the mode's condition does not hold, or when the store fails.
    pub async fn put(&self, key: &Key, bytes: Bytes, mode: PutMode) -> Result<UpdateVersion, RepositoryError> {
        if mode != PutMode::Create {
            return self.put_as(key, bytes, mode).await;
        }
        if self.unconditional.load(Ordering::Relaxed) {
            return self.put_where_free(key, bytes).await;
        }
        match self.put_as(key, bytes.clone(), mode).await {
            Err(error) if refusal::lacks_conditions(&error) => {
                let written = self.put_where_free(key, bytes).await?;
                // Without the condition it was written, so the condition is what was refused.
                self.unconditional.store(true, Ordering::Relaxed);
                Ok(written)
            }
            written => written,
        }
    }

    async fn put_where_free(&self, key: &Key, bytes: Bytes) -> Result<UpdateVersion, RepositoryError> {
        match self.within(Operation::Head, key, 0, self.objects.head(key)).await {
            Ok(_) => Err(RepositoryError::Conflict { key: key.to_string() }),
            Err(RepositoryError::Missing { .. }) => self.put_as(key, bytes, PutMode::Overwrite).await,
            Err(error) => Err(error),
        }
    }

    async fn put_as(&self, key: &Key, bytes: Bytes, mode: PutMode) -> Result<UpdateVersion, RepositoryError> {
        let len = bytes.len() as u64;
        self.prepare(key).await?;
        let options = PutOptions { mode, attributes: self.attributes(key), ..PutOptions::default() };
        let written = self
            .within(Operation::Put, key, len, self.objects.put_opts(key, PutPayload::from_bytes(bytes), options))
            .await?;
        self.protect(key).await?;
        Ok(UpdateVersion::from(written))
    }

    pub(super) async fn begin_large(
        &self,
        key: &Key,
    ) -> Result<Box<dyn object_store::MultipartUpload>, RepositoryError> {
        self.prepare(key).await?;
        let options = PutMultipartOptions { attributes: self.attributes(key), ..PutMultipartOptions::default() };
        self.within(Operation::Put, key, 0, self.objects.put_multipart_opts(key, options)).await
    }

    /// The configured class is for what is large and read seldom: the lease is written every few seconds.
    fn attributes(&self, key: &Key) -> Attributes {
        let mut attributes = Attributes::new();
        if let Some(class) = self.storage_class.as_ref().filter(|_| paths::is_bulk(key)) {
            attributes.insert(Attribute::StorageClass, class.clone().into());
        }
        attributes
    }

    /// Reads an object with its version.
    ///
    /// # Errors
    /// When it is missing or the store fails.
    pub async fn get(&self, key: &Key) -> Result<(Bytes, UpdateVersion), RepositoryError> {
        let found = self.within(Operation::Get, key, 0, self.objects.get(key)).await?;
        let version = UpdateVersion { e_tag: found.meta.e_tag.clone(), version: found.meta.version.clone() };
        let size = found.meta.size;
        let bytes = self.within(Operation::Get, key, size, found.bytes()).await?;
        Ok((bytes, version))
    }

    /// Finds out which conditional writes the store honours, by writing what is at `key` once more.
    ///
    /// # Errors
    /// When `key` is missing or the store fails.
    pub async fn probe(&self, key: &Key) -> Result<Conditional, RepositoryError> {
        let (bytes, version) = self.get(key).await?;
        let create = self.is_refused(key, bytes.clone(), PutMode::Create).await?;
        if self.local.is_some() {
            // The lease lies under a lock of the file system.
            return Ok(Conditional { create, update: true });
        }
        let other =
            UpdateVersion { e_tag: Some("\"00000000000000000000000000000000\"".into()), version: version.version };
        let update = self.is_refused(key, bytes, PutMode::Update(other)).await?;
        Ok(Conditional { create, update })
    }

    /// Returns true if a write whose condition does not hold is refused for that.
    async fn is_refused(&self, key: &Key, bytes: Bytes, mode: PutMode) -> Result<bool, RepositoryError> {
        match self.put_as(key, bytes, mode).await {
            Ok(_) => Ok(false),
            Err(RepositoryError::Conflict { .. }) => Ok(true),
            Err(error) if refusal::lacks_conditions(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

fn open_directory(url: &str, path: &Path, create: bool) -> Result<(Arc<dyn ObjectStore>, Directory), RepositoryError> {
    let key = path.display();
    if create {
        Directory::make(path).map_err(|error| failed(&key, error))?;
    } else if !path.is_dir() {
        return Err(RepositoryError::NoRepository { url: url.to_owned() });
    }
    let directory = Directory::open(path).map_err(|error| failed(&key, error))?;
    if create {
        directory.warn_of_other_owner();
    }
    Ok((directory.objects().map_err(|error| failed(&key, error))?, directory))
}

pub(super) fn failed(key: &impl ToString, error: impl std::error::Error + Send + Sync + 'static) -> RepositoryError {
    let source = object_store::Error::Generic { store: "file", source: Box::new(error) };
    RepositoryError::Store { key: key.to_string(), source }
}
