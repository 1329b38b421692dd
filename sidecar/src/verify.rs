//! Verify: reads what restore points name, checks every byte of it, and says what is wrong, what that costs, and what to do.
//!
//! Nothing is written. A finding never stops the walk: everything that can be checked is.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use object_store::path::Path as Key;
use serde::Serialize;

use crate::ids::{ContentHash, Offset, RestorePointId};
use crate::progress::Progress;
use crate::repository::log_object::{ChainTip, LogHeader};
use crate::repository::manifest::{DatabasePoint, RestorePoint, Timeline};
use crate::repository::pack::{self, EntryKind};
use crate::repository::timeline::{LogEntry, ancestry};
use crate::repository::{InObject, Repository, RepositoryError, crypto::CryptoError, instance, paths};

/// The report of a verify. Field names are stable.
#[derive(Debug, Clone, Serialize, Default, schemars::JsonSchema)]
pub struct VerifyReport {
    pub restore_points: Vec<RestorePointId>,
    /// Objects read.
    pub objects: u64,
    /// Their stored bytes.
    pub bytes: u64,
    pub findings: Vec<Finding>,
}

/// One thing that is wrong.
#[derive(Debug, Clone, Serialize, PartialEq, Eq, schemars::JsonSchema)]
pub struct Finding {
    pub severity: Severity,
    pub kind: FindingKind,
    pub object: String,
    pub message: String,
    pub fix: String,
}

#[derive(Debug, Clone, Copy, Serialize, PartialEq, Eq, PartialOrd, Ord, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Something could not be checked.
    Warning,
    /// Something can no longer be restored.
    Error,
}

#[derive(Debug, Clone, Copy, Serialize, PartialEq, Eq, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FindingKind {
    Missing,
    Damaged,
    Gap,
    BrokenChain,
    NotReadable,
}

struct Walk<'a> {
    repository: &'a Repository,
    progress: Arc<dyn Progress>,
    report: VerifyReport,
    /// Manifests and instance captures looked at already; restore points share most of what they name.
    seen: HashSet<Key>,
    /// Log objects looked at already: the header of those that are whole.
    logs: HashMap<Key, Option<LogHeader>>,
    /// Packs looked at already: the entries of those that are whole.
    packs: HashMap<Key, Option<HashSet<ContentHash>>>,
}

/// Verifies the given restore points, or all of them.
///
/// # Errors
/// Only when the store cannot be reached; damage is a finding.
pub async fn verify(
    repository: &Repository,
    ids: &[RestorePointId],
    progress: Arc<dyn Progress>,
) -> Result<VerifyReport, RepositoryError> {
    let all = repository.restore_point_ids().await?;
    let ids = if ids.is_empty() { all } else { ids.to_vec() };
    let mut walk = Walk {
        repository,
        progress,
        report: VerifyReport::default(),
        seen: HashSet::new(),
        logs: HashMap::new(),
        packs: HashMap::new(),
    };
    // What the newest need is read first: if time is short, what matters most is known first.
    for id in ids.into_iter().rev() {
        walk.report.restore_points.push(id);
        let key = paths::restore_point(id);
        match walk.sort_out(&key, repository.restore_point(id).await)? {
            Some(point) => walk.restore_point(&point).await?,
            None => continue,
        }
    }
    Ok(walk.report)
}

impl Walk<'_> {
    async fn restore_point(&mut self, point: &RestorePoint) -> Result<(), RepositoryError> {
        self.progress.phase(&format!("restore point {}", point.id), None);
        self.instance(point).await?;
        for database in &point.databases {
            let timelines = self.repository.timelines(&database.identity).await;
            let key = paths::timelines(&database.identity);
            if let Some(timelines) = self.sort_out(&key, timelines)? {
                self.log(database, &timelines).await?;
                self.snapshots(database, &timelines).await?;
            }
        }
        Ok(())
    }

    async fn instance(&mut self, point: &RestorePoint) -> Result<(), RepositoryError> {
        let key = paths::instance(point.instance);
        if !self.seen.insert(key.clone()) {
            return Ok(());
        }
        let Some(bytes) = self.fetch(&key).await? else { return Ok(()) };
        match instance::read(&point.instance, &bytes, &self.repository.keys) {
            Ok(_) => {}
            Err(instance::InstanceError::Crypto(error)) => self.not_readable(&key, &error),
            Err(error) => self.damaged(&key, &error.to_string()),
        }
        Ok(())
    }

    /// The whole log that leads to a restore point: every object, and that each continues the one before.
    async fn log(&mut self, point: &DatabasePoint, timelines: &[Timeline]) -> Result<(), RepositoryError> {
        let folder = paths::logs(&point.identity, point.timeline);
        let chain = self.repository.log_chain(&point.identity, timelines, point.timeline).await?;
        let reachable = chain.last();
        if reachable.is_none_or(|last| last < point.offset) {
            let (from, to) = match chain.hole {
                Some((missing, found)) => (missing, found.0.saturating_sub(1)),
                None => (reachable.map_or(Offset(0), |last| Offset(last.0 + 1)), point.offset.0),
            };
            self.find(
                Severity::Error,
                FindingKind::Gap,
                &folder,
                format!(
                    "transactions {from} to {to} of database {} are missing from timeline {}",
                    point.name, point.timeline
                ),
                "restore to an offset before the gap, or put the missing objects back from a copy of the repository",
            );
        }
        let (mut tip, mut promised) = (None::<ChainTip>, false);
        for entry in &chain.entries {
            if entry.first > point.offset {
                break;
            }
            let Some(header) = self.log_object(entry, &point.name).await? else {
                tip = None;
                continue;
            };
            let continues = tip.is_none_or(|tip| tip.next == header.first && tip.chain == header.previous_chain);
            if !continues || header.database != point.identity {
                self.find(
                    Severity::Error,
                    FindingKind::BrokenChain,
                    &entry.key,
                    format!(
                        "it does not continue the object before it; transactions from {} on are not to be trusted",
                        header.first
                    ),
                    "restore to an offset before it; then take a new backup",
                );
            }
            promised |= header.links.iter().any(|link| link.last == point.offset && link.chain == point.chain);
            tip = Some(header.tip_until(entry.last));
        }
        if !promised && tip.is_some_and(|tip| tip.next > point.offset) {
            self.find(
                Severity::Error,
                FindingKind::BrokenChain,
                &folder,
                format!("at transaction {} it holds another history than the restore point promises", point.offset),
                "take a new backup; restore points before this one may still be good",
            );
        }
        if !self.repository.is_restorable(&point.identity, timelines, point.timeline).await? {
            self.find(
                Severity::Error,
                FindingKind::Gap,
                &folder,
                format!("the log of database {} does not start at transaction 0 and no snapshot is kept", point.name),
                "take a new backup while the server has a complete snapshot",
            );
        }
        Ok(())
    }

    /// Every snapshot that a restore to this point or before could use.
    async fn snapshots(&mut self, point: &DatabasePoint, timelines: &[Timeline]) -> Result<(), RepositoryError> {
        for (timeline, until) in ancestry(timelines, point.timeline) {
            for offset in self.repository.snapshots(&point.identity, timeline.timeline).await? {
                if offset > point.offset || until.is_some_and(|until| offset > until) {
                    continue;
                }
                let key = paths::snapshot(&point.identity, timeline.timeline, offset);
                if !self.seen.insert(key.clone()) {
                    continue;
                }
                let manifest = self.repository.snapshot(&point.identity, timeline.timeline, offset).await;
                let Some(manifest) = self.sort_out(&key, manifest)? else { continue };
                let mut native = false;
                for used in manifest.packs {
                    let key = paths::pack(&point.identity, used.pack);
                    native |= used.entries.contains(&manifest.native_manifest);
                    self.pack(&key, used.pack, &used.entries).await?;
                }
                if !native {
                    self.damaged(&key, "it names no native manifest");
                }
            }
        }
        Ok(())
    }

    /// Reads and checks one log object, once. `None` when it is not whole; the finding is made already.
    async fn log_object(&mut self, entry: &LogEntry, database: &str) -> Result<Option<LogHeader>, RepositoryError> {
        let key = &entry.key;
        if let Some(known) = self.logs.get(key) {
            return Ok(known.clone());
        }
        let opened = self.repository.open_log(entry).await;
        let mut whole = None;
        if let Some(open) = self.sort_out_log(entry, opened, database)? {
            self.report.objects += 1;
            self.report.bytes += open.header.object_len();
            whole = Some(open.header.as_ref().clone());
            for index in 0..open.header.parts.len() {
                let stored = self.repository.log_part(&open, index).await;
                let Some(stored) = self.sort_out_log(entry, stored, database)? else {
                    whole = None;
                    break;
                };
                self.progress.advance(stored.len() as u64);
                let (header, owned, keys) = (Arc::clone(&open.header), key.clone(), self.repository.keys.clone());
                let checked = tokio::task::spawn_blocking(move || {
                    // The parts' hashes can be checked without any key.
                    header.check_part(index, &stored).in_object(&owned)?;
                    Ok(header.decode_part(&owned, index, &stored, &keys).map(|_| ()))
                });
                match flatten(checked.await, key) {
                    Ok(Ok(())) => {}
                    Ok(Err(RepositoryError::Crypto(error))) => self.not_readable(key, &error),
                    Ok(Err(error)) => self.damaged(key, &reason(&error)),
                    Err(error) => {
                        self.sort_out_log(entry, Err::<(), _>(error), database)?;
                        whole = None;
                        break;
                    }
                }
            }
        }
        self.logs.insert(key.clone(), whole.clone());
        Ok(whole)
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
                self.damaged(&entry.key, &lost);
                Ok(None)
            }
            result => self.sort_out(&entry.key, result),
        }
    }

    /// Reads and checks one pack, once, and that it holds every entry in `wanted`.
    async fn pack(&mut self, key: &Key, id: ContentHash, wanted: &[ContentHash]) -> Result<(), RepositoryError> {
        if !self.packs.contains_key(key) {
            let mut entries = None;
            if let Some(bytes) = self.fetch(key).await? {
                let (owned, keys) = (key.clone(), self.repository.keys.clone());
                let checked = tokio::task::spawn_blocking(move || {
                    pack::check(&id, &bytes).map_err(|malformed| RepositoryError::damaged(&owned, malformed))?;
                    let mut entries = HashSet::new();
                    pack::read(
                        &owned,
                        &id,
                        &bytes,
                        &keys,
                        |_| true,
                        |hash, _: EntryKind, _| {
                            entries.insert(hash);
                            Ok::<_, RepositoryError>(())
                        },
                    )?;
                    Ok(entries)
                });
                match flatten(checked.await, key) {
                    Ok(found) => entries = Some(found),
                    Err(RepositoryError::Crypto(error)) => self.not_readable(key, &error),
                    Err(error) => self.damaged(key, &reason(&error)),
                }
            }
            self.packs.insert(key.clone(), entries);
        }
        let lacking = match self.packs.get(key) {
            Some(Some(entries)) => wanted.iter().find(|hash| !entries.contains(*hash)).copied(),
            _ => None,
        };
        if let Some(hash) = lacking {
            self.damaged(key, &format!("it lacks entry {hash}"));
        }
        Ok(())
    }

    async fn fetch(&mut self, key: &Key) -> Result<Option<bytes::Bytes>, RepositoryError> {
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
    fn sort_out<T>(&mut self, key: &Key, result: Result<T, RepositoryError>) -> Result<Option<T>, RepositoryError> {
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
            Err(error) if error.is_permanent() => {
                self.damaged(key, &reason(&error));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn damaged(&mut self, key: &Key, message: &str) {
        self.find(
            Severity::Error,
            FindingKind::Damaged,
            key,
            message.to_owned(),
            "put it back from a copy of the repository, or take a new backup",
        );
    }

    fn not_readable(&mut self, key: &Key, error: &CryptoError) {
        let severity = if matches!(error, CryptoError::Damaged(_)) { Severity::Error } else { Severity::Warning };
        self.find(severity, FindingKind::NotReadable, key, error.to_string(), "name the identity file with --identity");
    }

    fn find(&mut self, severity: Severity, kind: FindingKind, object: &Key, message: String, fix: &str) {
        let finding = Finding { severity, kind, object: object.to_string(), message, fix: fix.to_owned() };
        if !self.report.findings.contains(&finding) {
            self.report.findings.push(finding);
        }
    }
}

/// What is wrong, without the advice to run the very command that says it.
fn reason(error: &RepositoryError) -> String {
    match error {
        RepositoryError::Damaged { reason, .. } => reason.clone(),
        error => error.to_string(),
    }
}

/// A worker that died is as bad as an object that it could not read.
fn flatten<T>(
    result: Result<Result<T, RepositoryError>, tokio::task::JoinError>,
    key: &Key,
) -> Result<T, RepositoryError> {
    result.unwrap_or_else(|error| Err(RepositoryError::damaged(key, error)))
}
