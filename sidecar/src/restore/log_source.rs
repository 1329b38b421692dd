//! The log objects of a restore, with a way out when one of them is gone or damaged.
//!
//! A restore may take hours, and compaction replaces objects meanwhile; a store may lose or damage one. Whenever other objects
//! hold the same transactions, they are read instead. The reader of the parts proves that what follows continues what was before.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;

use crate::buffers::Buffer;
use crate::ids::Identity;
use crate::repository::chain::LogEntry;
use crate::repository::log_object::{LogHeader, PartSpan};
use crate::repository::timeline::OpenLog;
use crate::repository::{Repository, RepositoryError};
use crate::restore::RestoreError;
use crate::restore::build::blocking;

/// Whether parts continue each other, one after another.
#[derive(Default)]
pub(super) struct Continuity(Option<PartSpan>);

impl Continuity {
    /// Takes the next part.
    ///
    /// # Errors
    /// When it does not continue the one before.
    pub(super) fn take(&mut self, span: &PartSpan) -> Result<(), RestoreError> {
        match self.0.replace(*span) {
            Some(before) if before.next != span.first || !before.after.is(&span.before) => {
                Err(RestoreError::BrokenLog(span.first))
            }
            _ => Ok(()),
        }
    }
}

/// All commits of `entries`, as a restore reads them.
#[cfg(test)]
pub(crate) async fn read_all(
    repository: &Repository,
    database: Identity,
    entries: Vec<LogEntry>,
) -> Result<Vec<u8>, RestoreError> {
    let source = LogSource { repository, database };
    let (mut commits, mut continuity) = (Vec::new(), Continuity::default());
    for entry in entries {
        for (open, entry) in source.open(entry).await? {
            for index in open.header.parts_within(entry.first, entry.last) {
                let part = PartOf { open: open.clone(), entry: entry.clone(), index };
                let stored = source.stored(&part).await?;
                for decoded in source.decode(part, stored, ()).await?.into_iter().filter(|part| part.span.len > 0) {
                    continuity.take(&decoded.span)?;
                    commits.extend_from_slice(&decoded.commits);
                }
            }
        }
    }
    Ok(commits)
}

/// Reads the log of one database.
pub(super) struct LogSource<'a> {
    pub repository: &'a Repository,
    pub database: Identity,
}

/// One part of an open log object, of which the transactions of `entry` count.
#[derive(Clone)]
pub(super) struct PartOf {
    pub open: OpenLog,
    pub entry: LogEntry,
    pub index: usize,
}

/// The commits of a part that count.
pub(super) struct Decoded {
    pub header: Arc<LogHeader>,
    pub span: PartSpan,
    pub commits: Buffer,
}

impl LogSource<'_> {
    /// Opens an object, or those that hold what it held.
    pub(super) async fn open(&self, entry: LogEntry) -> Result<Vec<(OpenLog, LogEntry)>, RestoreError> {
        match self.repository.open_log(&entry).await {
            Ok(open) => Ok(vec![(open, entry)]),
            Err(error) => self.open_others(entry, error, BTreeSet::new()).await,
        }
    }

    /// Opens the objects that hold the transactions of `entry`, which failed with `error`. Returns that error where there are none.
    fn open_others<'b>(
        &'b self,
        entry: LogEntry,
        error: RepositoryError,
        mut avoid: BTreeSet<object_store::path::Path>,
    ) -> BoxFuture<'b, Result<Vec<(OpenLog, LogEntry)>, RestoreError>> {
        async move {
            if !error.is_damage() || !avoid.insert(entry.key()) {
                return Err(error.into());
            }
            let Some(others) = self.repository.replacement(&self.database, &entry, &avoid).await? else {
                return Err(error.into());
            };
            tracing::warn!(%error, others = others.len(), "a log object cannot be used; others hold the same transactions");
            let mut opened = Vec::new();
            for other in others {
                match self.repository.open_log(&other).await {
                    Ok(open) => opened.push((open, other)),
                    Err(error) => opened.extend(self.open_others(other, error, avoid.clone()).await?),
                }
            }
            Ok(opened)
        }
        .boxed()
    }

    /// Reads a part as it is stored. What is missing or damaged is for [`Self::decode`] to replace.
    pub(super) async fn stored(&self, part: &PartOf) -> Result<Result<Bytes, RepositoryError>, RestoreError> {
        match self.repository.log_part(&part.open, part.index).await {
            Err(error) if !error.is_damage() => Err(error.into()),
            stored => Ok(stored),
        }
    }

    /// Opens a part and cuts it to the transactions that count. Where that fails, other objects stand in for it.
    pub(super) async fn decode<T: Send + 'static>(
        &self,
        part: PartOf,
        stored: Result<Bytes, RepositoryError>,
        held: T,
    ) -> Result<Vec<Decoded>, RestoreError> {
        let opened = match stored {
            Ok(stored) => self.unpack(part.clone(), stored, held).await?,
            Err(error) => Err(error),
        };
        match opened {
            Ok(decoded) => Ok(vec![decoded]),
            Err(error) if matches!(error, RepositoryError::Crypto(_)) => Err(error.into()),
            Err(error) => {
                let whole = part.open.header.whole_part(part.index);
                let lost = part.entry.within(whole.first, whole.last());
                let mut decoded = Vec::new();
                for (open, entry) in self.open_others(lost, error, BTreeSet::new()).await? {
                    decoded.extend(self.all_parts(open, entry).await?);
                }
                Ok(decoded)
            }
        }
    }

    async fn all_parts(&self, open: OpenLog, entry: LogEntry) -> Result<Vec<Decoded>, RestoreError> {
        let mut decoded = Vec::new();
        for index in open.header.parts_within(entry.first, entry.last) {
            let part = PartOf { open: open.clone(), entry: entry.clone(), index };
            let stored = self.repository.log_part(&part.open, index).await?;
            decoded.push(self.unpack(part, stored, ()).await??);
        }
        Ok(decoded)
    }

    async fn unpack<T: Send + 'static>(
        &self,
        part: PartOf,
        stored: Bytes,
        held: T,
    ) -> Result<Result<Decoded, RepositoryError>, RestoreError> {
        let keys = self.repository.keys.clone();
        let unpack = move || {
            let _held = held;
            let PartOf { open, entry, index } = part;
            // Each commit is looked at when it is read back.
            let mut commits = open.header.unpack_part(&open.key, index, &stored, &keys)?;
            // Where a chain leaves or enters an object inside, the rest belongs to another history or is held by another object.
            let span = open.header.cut_part(index, &mut commits, (entry.first, entry.last), keys.hashing()?);
            Ok(Decoded { header: open.header, span, commits })
        };
        blocking(unpack).await
    }
}
