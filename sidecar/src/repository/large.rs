//! Objects that are too large for memory.

use bytes::Bytes;
use object_store::MultipartUpload;
use object_store::path::Path as Key;

use crate::repository::store::Operation;
use crate::repository::{Repository, RepositoryError};

/// What S3 accepts as a part, and more than that.
const LARGE_PART: usize = 8 << 20;

/// An object on its way to the store in parts. It is there only once [`LargePut::finish`] has returned.
pub struct LargePut<'a> {
    repository: &'a Repository,
    key: Key,
    upload: Box<dyn MultipartUpload>,
    buffer: Vec<u8>,
}

impl<'a> LargePut<'a> {
    pub(super) fn new(repository: &'a Repository, key: Key, upload: Box<dyn MultipartUpload>, buffer: Vec<u8>) -> Self {
        Self { repository, key, upload, buffer }
    }

    /// # Errors
    /// When the lease is lost or the store fails.
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), RepositoryError> {
        self.buffer.extend_from_slice(&bytes);
        while self.buffer.len() >= LARGE_PART {
            // Some stores take only parts of one size, but for the last.
            let rest = self.buffer.split_off(LARGE_PART);
            let part = std::mem::replace(&mut self.buffer, rest);
            self.send(part).await?;
        }
        Ok(())
    }

    async fn send(&mut self, part: Vec<u8>) -> Result<(), RepositoryError> {
        self.repository.check_fence().await?;
        let len = part.len() as u64;
        let sent = self.upload.put_part(part.into());
        self.repository.store.within(Operation::Part, &self.key, len, sent).await
    }

    /// # Errors
    /// When the lease is lost or the store fails; abandon it then.
    pub async fn finish(&mut self) -> Result<(), RepositoryError> {
        let last = std::mem::take(&mut self.buffer);
        if !last.is_empty() {
            self.send(last).await?;
        }
        self.repository.check_fence().await?;
        self.repository.store.within(Operation::Put, &self.key, 0, self.upload.complete()).await?;
        self.repository.store.protect(&self.key).await
    }

    /// Leaves nothing behind, as far as the store lets us.
    pub async fn abandon(mut self) {
        let store = self.repository.store.clone();
        if let Err(error) = store.within(Operation::Delete, &self.key, 0, self.upload.abort()).await {
            tracing::debug!(key = %self.key, %error, "an unfinished upload was not cleared away");
        }
    }
}
