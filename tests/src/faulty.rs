//! A store whose requests fail as a script says: before, during or after they take effect.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use async_trait::async_trait;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// What a request does to the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Put,
    Get,
    Delete,
    List,
}

/// When a request fails, as its sender sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Nothing happened.
    Before,
    /// Of an answer, only the beginning came.
    During,
    /// It was done, and the answer is lost.
    After,
    /// The store says that it will not, as under object lock.
    Refused,
}

/// Which requests fail.
pub trait Script: Send + Sync {
    fn next(&self, operation: Operation, key: Option<&Path>) -> Option<Moment>;
}

/// Everything is fine.
pub struct Calm;

impl Script for Calm {
    fn next(&self, _: Operation, _: Option<&Path>) -> Option<Moment> {
        None
    }
}

/// The process dies at its `step`th change of the store, before it or right after it: nothing works from then on.
pub struct DiesAt {
    pub step: u64,
    pub moment: Moment,
    done: AtomicU64,
}

impl DiesAt {
    pub fn new(step: u64, moment: Moment) -> Self {
        Self { step, moment, done: AtomicU64::new(0) }
    }

    /// Changes that were asked for.
    pub fn steps(&self) -> u64 {
        self.done.load(Ordering::SeqCst)
    }
}

impl Script for DiesAt {
    fn next(&self, operation: Operation, _: Option<&Path>) -> Option<Moment> {
        let changes = matches!(operation, Operation::Put | Operation::Delete);
        let at = if changes { self.done.fetch_add(1, Ordering::SeqCst) } else { self.done.load(Ordering::SeqCst) };
        match at.cmp(&self.step) {
            std::cmp::Ordering::Less => None,
            std::cmp::Ordering::Equal if changes => Some(self.moment),
            std::cmp::Ordering::Equal => None,
            std::cmp::Ordering::Greater => Some(Moment::Before),
        }
    }
}

/// So many of a thousand requests fail, drawn from a seed.
pub struct Flaky {
    state: AtomicU64,
    per_mille: AtomicU64,
}

impl Flaky {
    pub fn new(seed: u64, per_mille: u64) -> Self {
        Self { state: AtomicU64::new(seed | 1), per_mille: AtomicU64::new(per_mille) }
    }

    pub fn set(&self, per_mille: u64) {
        self.per_mille.store(per_mille, Ordering::SeqCst);
    }
}

impl Script for Flaky {
    fn next(&self, _: Operation, _: Option<&Path>) -> Option<Moment> {
        let step =
            |state: u64| Some(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407));
        let drawn = self.state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, step).unwrap_or_default() >> 33;
        let fails = drawn % 1000 < self.per_mille.load(Ordering::SeqCst);
        fails.then(|| [Moment::Before, Moment::During, Moment::After][(drawn / 1000 % 3) as usize])
    }
}

/// A store with a script.
pub struct FaultyStore {
    inner: Arc<dyn ObjectStore>,
    script: Arc<dyn Script>,
}

impl FaultyStore {
    pub fn new(inner: Arc<dyn ObjectStore>, script: Arc<dyn Script>) -> Self {
        Self { inner, script }
    }

    async fn change<T>(
        &self,
        operation: Operation,
        key: &Path,
        work: impl Future<Output = Result<T>> + Send,
    ) -> Result<T> {
        match self.script.next(operation, Some(key)) {
            None => work.await,
            Some(Moment::Before | Moment::During) => Err(fault()),
            Some(Moment::Refused) => Err(refusal(key)),
            Some(Moment::After) => {
                work.await?;
                Err(fault())
            }
        }
    }
}

fn refusal(key: &Path) -> Error {
    Error::PermissionDenied { path: key.to_string(), source: "AccessDenied: the object is locked".into() }
}

fn fault() -> Error {
    Error::Generic { store: "faulty", source: "a fault of the script".into() }
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "faulty {}", self.inner)
    }
}

impl fmt::Debug for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, key: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.change(Operation::Put, key, self.inner.put_opts(key, payload, options)).await
    }

    async fn put_multipart_opts(&self, key: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.change(Operation::Put, key, self.inner.put_multipart_opts(key, options)).await
    }

    async fn get_opts(&self, key: &Path, options: GetOptions) -> Result<GetResult> {
        let moment = self.script.next(Operation::Get, Some(key));
        match moment {
            Some(Moment::Before | Moment::After) => return Err(fault()),
            Some(Moment::Refused) => return Err(refusal(key)),
            Some(Moment::During) | None => {}
        }
        let result = self.inner.get_opts(key, options).await?;
        if moment.is_none() {
            return Ok(result);
        }
        // The connection breaks in the middle of the body.
        let (meta, range, attributes, extensions) =
            (result.meta.clone(), result.range.clone(), result.attributes.clone(), result.extensions.clone());
        let bytes = result.bytes().await?;
        let half = bytes.slice(..bytes.len() / 2);
        let payload = GetResultPayload::Stream(futures::stream::iter([Ok(half), Err(fault())]).boxed());
        Ok(GetResult { payload, meta, range, attributes, extensions })
    }

    fn delete_stream(&self, keys: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let (inner, script) = (Arc::clone(&self.inner), Arc::clone(&self.script));
        keys.then(move |key| {
            let (inner, script) = (Arc::clone(&inner), Arc::clone(&script));
            async move {
                let key = key?;
                let moment = script.next(Operation::Delete, Some(&key));
                match moment {
                    Some(Moment::Before | Moment::During) => return Err(fault()),
                    Some(Moment::Refused) => return Err(refusal(&key)),
                    Some(Moment::After) | None => {}
                }
                let mut done = inner.delete_stream(futures::stream::iter([Ok(key.clone())]).boxed());
                if let Some(result) = done.next().await {
                    result?;
                }
                if moment.is_some() { Err(fault()) } else { Ok(key) }
            }
        })
        .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.script.next(Operation::List, prefix) {
            None => self.inner.list(prefix),
            Some(_) => futures::stream::iter([Err(fault())]).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        match self.script.next(Operation::List, prefix) {
            None => self.inner.list_with_delimiter(prefix).await,
            Some(_) => Err(fault()),
        }
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.change(Operation::Put, to, self.inner.copy_opts(from, to, options)).await
    }
}
