//! A store whose listings are in the order that it promises.
//!
//! Invariants: names of a listing rise, and lie below the prefix that was asked for. Pages that overlap, repeat or step back
//! come of a listing that leaves out objects or does not end, so they are an error. Names rise by their bytes, as S3
//! promises, or folder by folder, as servers have it that walk a tree; a listing keeps to one of the two.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use object_store::path::Path as Key;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// Around a store that lists in the order of names' bytes.
#[derive(Debug)]
pub(super) struct Ordered(pub(super) Arc<dyn ObjectStore>);

impl fmt::Display for Ordered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[derive(Debug, thiserror::Error)]
enum Disorder {
    #[error("the store's listing cannot be trusted: {0} is not below {1}, which was asked for")]
    Outside(Key, Key),
    #[error("the store's listing cannot be trusted: {next} comes after {before}")]
    StepsBack { before: Key, next: Key },
}

impl From<Disorder> for Error {
    fn from(disorder: Disorder) -> Self {
        Self::Generic { store: "listing", source: Box::new(disorder) }
    }
}

fn below(key: &Key, prefix: &Key) -> Result<(), Disorder> {
    match key.prefix_matches(prefix) {
        true => Ok(()),
        false => Err(Disorder::Outside(key.clone(), prefix.clone())),
    }
}

/// How the names of a listing have come so far.
#[derive(Default)]
struct Order {
    last: Option<Key>,
    /// They do not rise by their bytes.
    not_by_bytes: bool,
    /// They do not rise folder by folder.
    not_by_folders: bool,
}

impl Order {
    fn next(&mut self, next: &Key) -> Result<(), Disorder> {
        let Some(before) = self.last.replace(next.clone()) else { return Ok(()) };
        self.not_by_bytes |= before.as_ref() >= next.as_ref();
        self.not_by_folders |= !before.as_ref().split('/').lt(next.as_ref().split('/'));
        match self.not_by_bytes && self.not_by_folders {
            true => Err(Disorder::StepsBack { before, next: next.clone() }),
            false => Ok(()),
        }
    }
}

#[async_trait]
impl ObjectStore for Ordered {
    async fn put_opts(&self, key: &Key, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.0.put_opts(key, payload, options).await
    }

    async fn put_multipart_opts(&self, key: &Key, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.0.put_multipart_opts(key, options).await
    }

    async fn get_opts(&self, key: &Key, options: GetOptions) -> Result<GetResult> {
        self.0.get_opts(key, options).await
    }

    async fn get_ranges(&self, key: &Key, ranges: &[std::ops::Range<u64>]) -> Result<Vec<bytes::Bytes>> {
        self.0.get_ranges(key, ranges).await
    }

    fn delete_stream(&self, keys: BoxStream<'static, Result<Key>>) -> BoxStream<'static, Result<Key>> {
        self.0.delete_stream(keys)
    }

    fn list(&self, prefix: Option<&Key>) -> BoxStream<'static, Result<ObjectMeta>> {
        let prefix = prefix.cloned().unwrap_or_default();
        let listed = self.0.list(Some(&prefix));
        let check = move |order: &mut Order, object: Result<ObjectMeta>| {
            let checked = object.and_then(|object| {
                below(&object.location, &prefix)?;
                order.next(&object.location)?;
                Ok(object)
            });
            std::future::ready(Some(checked))
        };
        listed.scan(Order::default(), check).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Key>) -> Result<ListResult> {
        let listed = self.0.list_with_delimiter(prefix).await?;
        let prefix = prefix.cloned().unwrap_or_default();
        let objects = listed.objects.iter().map(|object| &object.location);
        for key in objects.chain(&listed.common_prefixes) {
            below(key, &prefix)?;
        }
        Ok(listed)
    }

    async fn copy_opts(&self, from: &Key, to: &Key, options: CopyOptions) -> Result<()> {
        self.0.copy_opts(from, to, options).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rises(names: &[&str]) -> bool {
        let mut order = Order::default();
        names.iter().all(|name| order.next(&Key::from(*name)).is_ok())
    }

    #[test]
    fn listings_keep_to_one_order() {
        assert!(rises(&["log.2/1", "log.2/2", "log/1", "log/2"]), "by bytes");
        assert!(rises(&["log/1", "log/2", "log.2/1", "log.2/2"]), "folder by folder");
        assert!(!rises(&["log/1", "log.2/1", "log/2"]), "neither");
        assert!(!rises(&["log/1", "log/2", "log/2"]), "a name comes twice");
        assert!(!rises(&["log/2", "log/1"]), "a step back");
    }
}
