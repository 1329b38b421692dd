//! Reading and checking each kind of object, and turning what is wrong into findings.

use std::collections::HashSet;
use std::sync::Arc;

use object_store::path::Path as Key;

use crate::ids::{ContentHash, Identity, Offset};
use crate::repository::chain::{Hole, LogEntry};
use crate::repository::log_object::LogHeader;
use crate::repository::pack::{self, EntryKind};
use crate::repository::ranges::{merged, without};
use crate::repository::timeline::OpenLog;
use crate::repository::{InObject, Repository, RepositoryError, crypto::CryptoError, instance};
use crate::verify::{Finding, FindingKind, Severity, Walk};

impl Walk<'_> {
    /// Reads and checks one log object, once.
    pub(super) async fn log_object(&mut self, entry: &LogEntry, database: &str) -> Result<(), RepositoryError> {
        if !self.logs.contains_key(&entry.key()) {
            let read = read_log(self.repository, entry, self.is_drawn(&entry.key())).await;
            self.judge_log(entry, read, database).await?;
        }
        Ok(())
    }

    /// Turns what reading a log object showed into findings. `None` when it is not whole.
    pub(super) async fn judge_log(
        &mut self,
        entry: &LogEntry,
        read: LogRead,
        database: &str,
    ) -> Result<Option<Arc<LogHeader>>, RepositoryError> {
        let key = &entry.key();
        // Compaction and retention go on while a long verification reads what it listed.
        if matches!(read.opened, Err(RepositoryError::Missing { .. })) && self.is_replaced(entry).await? {
            self.moved.insert(key.clone());
            return Ok(None);
        }
        let mut whole = None;
        if let Some(open) = self.sort_out_log(entry, read.opened, database)? {
            self.report.objects += 1;
            self.report.bytes += open.header.object_len();
            whole = Some(Arc::clone(&open.header));
            for PartRead { stored, found } in read.parts {
                self.progress.advance(stored as u64);
                match found {
                    PartFound::Whole => {}
                    PartFound::Undecoded(RepositoryError::Crypto(error)) => self.not_readable(key, &error),
                    // Its hash is right, and yet it holds no commits: it was written so.
                    PartFound::Undecoded(error) | PartFound::Damaged(error) => {
                        self.sort_out_log(entry, Err::<(), _>(error), database)?;
                        whole = None;
                    }
                }
            }
        }
        self.logs.insert(key.clone(), whole.is_some());
        Ok(whole)
    }

    /// Do other objects hold now what this one held, or did retention take it away?
    async fn is_replaced(&self, entry: &LogEntry) -> Result<bool, RepositoryError> {
        let database = entry.key().parts().nth(1).and_then(|part| part.as_ref().parse::<Identity>().ok());
        let Some(database) = database else { return Ok(false) };
        let listed = self.repository.log_entries(&database, entry.timeline).await?;
        let held = listed.iter().filter(|other| other.key() != entry.key()).map(|other| (other.first.0, other.last.0));
        if without((entry.first.0, entry.last.0), &merged(held.collect())).is_empty() {
            return Ok(true);
        }
        let found = Offset(entry.last.0.saturating_add(1));
        let hole = Hole { timeline: entry.timeline, missing: entry.first, found, removed: false };
        Ok(self.repository.retention().await?.is_some_and(|retention| retention.has_removed(&database, &hole)))
    }

    /// As [`Self::sort_out`], and says which transactions a damaged log object takes along.
    fn sort_out_log<T>(
        &mut self,
        entry: &LogEntry,
        result: Result<T, RepositoryError>,
        database: &str,
    ) -> Result<Option<T>, RepositoryError> {
        match result {
            Err(RepositoryError::Damaged { reason, .. }) => {
                let (first, last) = (entry.first, entry.last);
                let lost = format!("{reason}; transactions {first} to {last} of {database} are not readable");
                self.damaged(&entry.key(), &lost);
                Ok(None)
            }
            result => self.sort_out(&entry.key(), result),
        }
    }

    /// Reads and checks one pack, once, and that it holds every entry in `wanted`.
    pub(super) async fn pack(
        &mut self,
        key: &Key,
        id: ContentHash,
        stored: u64,
        wanted: &[ContentHash],
    ) -> Result<bool, RepositoryError> {
        self.used.insert(key.clone());
        if !self.packs.contains_key(key) {
            let found = self.look_at_pack(key, id, stored).await?;
            self.packs.insert(key.clone(), found);
        }
        let lacking = match self.packs.get(key) {
            Some(Some(Some(entries))) => wanted.iter().find(|hash| !entries.contains(*hash)).copied(),
            Some(Some(None)) => None,
            Some(None) | None => return Ok(false),
        };
        if let Some(hash) = lacking {
            self.damaged(key, &format!("it lacks entry {hash}"));
        }
        Ok(lacking.is_none())
    }

    async fn look_at_pack(
        &mut self,
        key: &Key,
        id: ContentHash,
        stored: u64,
    ) -> Result<Option<Option<HashSet<ContentHash>>>, RepositoryError> {
        let Some(size) = self.pack_sizes.get(key).copied() else {
            self.sort_out::<()>(key, Err(RepositoryError::Missing { key: key.to_string() }))?;
            return Ok(None);
        };
        if size != stored {
            self.damaged(key, &format!("it has {size} bytes where {stored} were written"));
            return Ok(None);
        }
        if !self.is_drawn(key) {
            return Ok(Some(None));
        }
        let Some(bytes) = self.fetch(key).await? else { return Ok(None) };
        let (owned, keys) = (key.clone(), self.repository.keys.clone());
        let checked = tokio::task::spawn_blocking(move || {
            pack::check(&id, &bytes).map_err(|malformed| RepositoryError::damaged(&owned, malformed))?;
            let (mut entries, hashing) = (HashSet::new(), keys.hashing()?);
            pack::read(
                &owned,
                &id,
                &bytes,
                &keys,
                |_| true,
                |hash, _: EntryKind, _| {
                    entries.insert(hashing.name(hash));
                    Ok::<_, RepositoryError>(())
                },
            )?;
            Ok(entries)
        });
        match flatten(checked.await, key) {
            Ok(found) => Ok(Some(Some(found))),
            // Its bytes are those that were written; what is in them only a key can tell.
            Err(RepositoryError::Crypto(error)) => {
                self.not_readable(key, &error);
                Ok((!matches!(error, CryptoError::Damaged(_))).then_some(None))
            }
            Err(error) => {
                self.find(
                    Severity::Error,
                    FindingKind::Damaged,
                    key,
                    reason(&error),
                    // Of its full length it is shared by the next snapshot.
                    "put it back from a copy of the repository, or move it out of the repository and take a new backup",
                );
                Ok(None)
            }
        }
    }

    /// Reads and checks an instance capture.
    pub(super) async fn capture(&mut self, key: &Key, id: ContentHash) -> Result<(), RepositoryError> {
        if !self.is_drawn(key) {
            let exists = self.repository.exists(key).await?;
            let missing = || RepositoryError::Missing { key: key.to_string() };
            self.sort_out(key, if exists { Ok(()) } else { Err(missing()) })?;
            return Ok(());
        }
        let Some(bytes) = self.fetch(key).await? else { return Ok(()) };
        match instance::read(&id, &bytes, &self.repository.keys) {
            Ok(_) => {}
            Err(instance::InstanceError::Crypto(error)) => self.not_readable(key, &error),
            Err(error) => self.damaged(key, &error.to_string()),
        }
        Ok(())
    }

    /// Is this one of the objects whose bodies are read?
    pub(super) fn is_drawn(&self, key: &Key) -> bool {
        self.draw.is_drawn(key)
    }

    pub(super) async fn fetch(&mut self, key: &Key) -> Result<Option<bytes::Bytes>, RepositoryError> {
        let bytes = self.repository.get(key).await;
        let bytes = self.sort_out(key, bytes)?;
        if let Some(bytes) = &bytes {
            self.report.objects += 1;
            self.report.bytes += bytes.len() as u64;
            self.progress.advance(bytes.len() as u64);
        }
        Ok(bytes)
    }

    /// What is missing or damaged becomes a finding; a store that fails ends the walk.
    pub(super) fn sort_out<T>(
        &mut self,
        key: &Key,
        result: Result<T, RepositoryError>,
    ) -> Result<Option<T>, RepositoryError> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(RepositoryError::Missing { key }) => {
                self.find(
                    Severity::Error,
                    FindingKind::Missing,
                    &Key::from(key),
                    "the object is missing".into(),
                    "put it back from a copy of the repository, or take a new backup",
                );
                Ok(None)
            }
            Err(RepositoryError::Crypto(error)) => {
                self.not_readable(key, &error);
                Ok(None)
            }
            Err(error) if error.is_damage() => {
                self.damaged(key, &reason(&error));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    pub(super) fn damaged(&mut self, key: &Key, message: &str) {
        self.find(
            Severity::Error,
            FindingKind::Damaged,
            key,
            message.to_owned(),
            "put it back from a copy of the repository, or take a new backup",
        );
    }

    pub(super) fn not_readable(&mut self, key: &Key, error: &CryptoError) {
        let severity = if matches!(error, CryptoError::Damaged(_)) { Severity::Error } else { Severity::Warning };
        // Without a key no body can be opened: that is said once, and not once for each.
        if severity == Severity::Warning && std::mem::replace(&mut self.told_of_keys, true) {
            return;
        }
        self.find(severity, FindingKind::NotReadable, key, error.to_string(), "name the identity file with --identity");
    }

    pub(super) fn find(&mut self, severity: Severity, kind: FindingKind, object: &Key, message: String, fix: &str) {
        let finding = Finding { severity, kind, object: object.to_string(), message, fix: fix.to_owned() };
        if !self.report.findings.contains(&finding) {
            self.report.findings.push(finding);
        }
    }
}

/// Which objects' bodies are read: a share of them, others each time.
#[derive(Clone, Copy)]
pub(super) struct Draw {
    pub salt: u128,
    pub percent: u8,
}

impl Draw {
    pub(super) fn is_drawn(self, key: &Key) -> bool {
        if self.percent >= 100 {
            return true;
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.salt.to_le_bytes()).update(key.as_ref().as_bytes());
        let drawn = hasher.finalize().as_bytes().iter().take(4).fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
        drawn % 100 < u64::from(self.percent)
    }
}

/// What reading a log object showed. Reading needs nothing of the walk, so that several objects are read at once.
pub(super) struct LogRead {
    opened: Result<OpenLog, RepositoryError>,
    /// The parts that were read, up to the first whose stored bytes are not right.
    parts: Vec<PartRead>,
}

struct PartRead {
    /// Bytes that were read.
    stored: usize,
    found: PartFound,
}

enum PartFound {
    Whole,
    /// Its hash is right, but it does not open, or what it holds is wrong.
    Undecoded(RepositoryError),
    Damaged(RepositoryError),
}

/// Reads one log object, with its body if it is drawn.
pub(super) async fn read_log(repository: &Repository, entry: &LogEntry, is_drawn: bool) -> LogRead {
    let opened = repository.open_log(entry).await;
    let mut parts = Vec::new();
    if let (Ok(open), true) = (&opened, is_drawn) {
        for index in 0..open.header.parts.len() {
            let part = read_part(repository, open, index).await;
            let is_over = matches!(part.found, PartFound::Damaged(_));
            parts.push(part);
            if is_over {
                break;
            }
        }
    }
    LogRead { opened, parts }
}

async fn read_part(repository: &Repository, open: &OpenLog, index: usize) -> PartRead {
    let stored = match repository.log_part(open, index).await {
        Ok(stored) => stored,
        Err(error) => return PartRead { stored: 0, found: PartFound::Damaged(error) },
    };
    let (header, key, keys) = (Arc::clone(&open.header), open.key.clone(), repository.keys.clone());
    let len = stored.len();
    let checked = tokio::task::spawn_blocking(move || {
        // The parts' hashes can be checked without any key.
        header.check_part(index, &stored).in_object(&key)?;
        Ok(header.decode_part(&key, index, &stored, &keys).map(drop))
    });
    let found = match flatten(checked.await, &open.key) {
        Ok(Ok(())) => PartFound::Whole,
        Ok(Err(error)) => PartFound::Undecoded(error),
        Err(error) => PartFound::Damaged(error),
    };
    PartRead { stored: len, found }
}

/// What is wrong, without the advice to run the very command that says it.
pub(super) fn reason(error: &RepositoryError) -> String {
    match error {
        RepositoryError::Damaged { reason, .. } => reason.clone(),
        error => error.to_string(),
    }
}

/// A worker that died is as bad as an object that it could not read.
pub(super) fn flatten<T>(
    result: Result<Result<T, RepositoryError>, tokio::task::JoinError>,
    key: &Key,
) -> Result<T, RepositoryError> {
    result.unwrap_or_else(|error| Err(RepositoryError::damaged(key, error)))
}
