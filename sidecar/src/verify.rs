//! Verify: reads what restore points name, checks every byte of it, and says what is wrong, what that costs, and what to do.
//!
//! Nothing is written. A finding never stops the walk: everything that can be checked is.

use std::collections::HashSet;
use std::sync::Arc;

use object_store::path::Path as Key;
use serde::Serialize;

use crate::ids::{ContentHash, Offset, RestorePointId};
use crate::progress::Progress;
use crate::repository::log_object::{self, ChainTip};
use crate::repository::manifest::{DatabasePoint, RestorePoint, Timeline};
use crate::repository::pack::{self, EntryKind};
use crate::repository::timeline::ancestry;
use crate::repository::{Repository, RepositoryError, crypto::CryptoError, instance, paths};

/// The report of a verify. Field names are stable.
#[derive(Debug, Clone, Serialize, Default)]
pub struct VerifyReport {
    pub restore_points: Vec<RestorePointId>,
    /// Objects read.
    pub objects: u64,
    /// Their stored bytes.
    pub bytes: u64,
    pub findings: Vec<Finding>,
}

/// One thing that is wrong.
#[derive(Debug, Clone, Serialize, PartialEq, Eq)]
pub struct Finding {
    pub severity: Severity,
    pub kind: FindingKind,
    pub object: String,
    pub message: String,
    pub fix: String,
}

#[derive(Debug, Clone, Copy, Serialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Something could not be checked.
    Warning,
    /// Something can no longer be restored.
    Error,
}

#[derive(Debug, Clone, Copy, Serialize, PartialEq, Eq)]
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
    seen: HashSet<Key>,
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
    let mut walk = Walk { repository, progress, report: VerifyReport::default(), seen: HashSet::new() };
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
        let mut tip: Option<ChainTip> = None;
        for entry in &chain.entries {
            if entry.first > point.offset {
                break;
            }
            let Some(bytes) = self.fetch_always(&entry.key).await? else {
                tip = None;
                continue;
            };
            let parsed =
                log_object::LogHeader::parse(&bytes).and_then(|header| header.check_body(&bytes).map(|()| header));
            let header = match parsed {
                Ok(header) => header,
                Err(malformed) => {
                    let message = format!(
                        "{malformed}; transactions {} to {} of database {} cannot be read from it",
                        entry.first, entry.last, point.name
                    );
                    self.damaged(&entry.key, &message);
                    tip = None;
                    continue;
                }
            };
            if self.seen.insert(entry.key.clone()) {
                let (key, keys) = (entry.key.clone(), self.repository.keys.clone());
                let decoded = tokio::task::spawn_blocking(move || log_object::decode(&key, &bytes, &keys).map(|_| ()));
                match decoded.await {
                    Ok(Ok(())) => {}
                    Ok(Err(RepositoryError::Crypto(error))) => self.not_readable(&entry.key, &error),
                    Ok(Err(error)) => self.damaged(&entry.key, &reason(&error)),
                    Err(error) => self.damaged(&entry.key, &error.to_string()),
                }
            }
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
            let link = header.links.iter().find(|link| link.last == point.offset);
            if link.is_some_and(|link| link.chain != point.chain) {
                self.find(
                    Severity::Error,
                    FindingKind::BrokenChain,
                    &entry.key,
                    format!("at transaction {} it holds another history than the restore point promises", point.offset),
                    "take a new backup; restore points before this one may still be good",
                );
            }
            tip = Some(header.tip());
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
                    let wanted: HashSet<ContentHash> = used.entries.iter().copied().collect();
                    native |= wanted.contains(&manifest.native_manifest);
                    self.pack(&key, used.pack, wanted).await?;
                }
                if !native {
                    self.damaged(&key, "it names no native manifest");
                }
            }
        }
        Ok(())
    }

    async fn pack(&mut self, key: &Key, id: ContentHash, wanted: HashSet<ContentHash>) -> Result<(), RepositoryError> {
        let Some(bytes) = self.fetch_always(key).await? else { return Ok(()) };
        let (owned, keys) = (key.clone(), self.repository.keys.clone());
        let checked = tokio::task::spawn_blocking(move || {
            pack::check(&id, &bytes).map_err(|malformed| RepositoryError::damaged(&owned, malformed))?;
            let mut missing = wanted.clone();
            pack::read(
                &owned,
                &id,
                &bytes,
                &keys,
                |hash| wanted.contains(hash),
                |hash, _: EntryKind, _| {
                    missing.remove(&hash);
                    Ok::<_, RepositoryError>(())
                },
            )?;
            match missing.into_iter().next() {
                Some(hash) => Err(RepositoryError::damaged(&owned, format!("it lacks entry {hash}"))),
                None => Ok(()),
            }
        });
        match checked.await {
            Ok(Ok(())) => {}
            Ok(Err(RepositoryError::Crypto(error))) => self.not_readable(key, &error),
            Ok(Err(error)) => self.damaged(key, &reason(&error)),
            Err(error) => self.damaged(key, &error.to_string()),
        }
        Ok(())
    }

    /// Reads an object once; `None` when it is missing or was read before.
    async fn fetch(&mut self, key: &Key) -> Result<Option<bytes::Bytes>, RepositoryError> {
        if !self.seen.insert(key.clone()) {
            return Ok(None);
        }
        self.fetch_always(key).await
    }

    async fn fetch_always(&mut self, key: &Key) -> Result<Option<bytes::Bytes>, RepositoryError> {
        let bytes = self.repository.get(key).await;
        let bytes = self.sort_out(key, bytes)?;
        if let Some(bytes) = &bytes
            && !self.seen.contains(key)
        {
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
