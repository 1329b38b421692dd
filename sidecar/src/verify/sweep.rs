//! What else lies in the repository: exports, deployments, notes, what compaction has merged already, and what nobody
//! refers to.

use std::collections::HashMap;

use object_store::path::Path as Key;

#[cfg(feature = "client")]
use crate::export::manifest::ExportManifest;
#[cfg(feature = "client")]
use crate::ids::ContentHash;
use crate::repository::chain::LogEntry;
use crate::repository::manifest::RestorePoint;
use crate::repository::{RepositoryError, document, paths};
use crate::verify::Walk;

impl Walk<'_> {
    /// Looks at every object that the walk from the restore points has not met.
    pub(super) async fn sweep(&mut self, points: &[RestorePoint]) -> Result<(), RepositoryError> {
        self.progress.phase("everything else", None);
        let listed: HashMap<Key, u64> = self.repository.list(&Key::default()).await?.into_iter().collect();
        let mut keys: Vec<Key> = listed.keys().filter(|key| !self.used.contains(*key)).cloned().collect();
        keys.sort();
        // Manifests first: they say which files are in use.
        keys.sort_by_key(|key| !key.as_ref().contains("/exports/manifests/"));
        for key in keys {
            if self.used.contains(&key) {
                continue;
            }
            let parts: Vec<&str> = key.as_ref().split('/').collect();
            match parts.as_slice() {
                ["repository.json" | "lease.json" | "lease.lock"] => {}
                ["pins" | "retention" | "drills" | "deployments", _] => self.note(&key).await?,
                ["databases", _, "exports", "plans" | "positions", _] => self.note(&key).await?,
                #[cfg(feature = "client")]
                ["programs", _] => self.program(&key).await?,
                #[cfg(feature = "client")]
                ["databases", _, "exports", "manifests", ..] => self.export(&key, &listed).await?,
                // A build that knows no exports and no programs cannot say anything of them.
                #[cfg(not(feature = "client"))]
                ["programs", _] | ["databases", _, "exports", ..] => {}
                ["databases", database, "timelines", timeline, "log", ..] => {
                    let size = listed.get(&key).copied().unwrap_or_default();
                    let entry = timeline.parse().ok().and_then(|timeline| LogEntry::parse(&key, timeline, size));
                    match entry {
                        Some(entry) if self.is_superseded(&entry) => {
                            self.log_object(&entry, database).await?;
                        }
                        _ => self.report.orphans.push(key.to_string()),
                    }
                }
                // What an interrupted look at the store's conditional writes left.
                ["probe", _] => {}
                // Kept until somebody has looked at it.
                ["damaged", ..] => {}
                _ => self.report.orphans.push(key.to_string()),
            }
        }
        // Without a readable restore point nothing says what is in use.
        if points.is_empty() {
            self.report.orphans.clear();
        }
        self.report.orphans.sort();
        Ok(())
    }

    /// Do objects that are in use hold what this one holds?
    fn is_superseded(&self, entry: &LogEntry) -> bool {
        let folder = folder_of_levels(&entry.key());
        let mut held: Vec<_> =
            self.used.iter().filter(|key| key.prefix_matches(&folder)).filter_map(paths::parse_log).collect();
        held.sort_unstable();
        let mut at = entry.first.0;
        for (first, last) in held {
            if first.0 <= at && last.0 >= at {
                at = last.0 + 1;
            }
        }
        at > entry.last.0
    }

    async fn note(&mut self, key: &Key) -> Result<(), RepositoryError> {
        let Some(bytes) = self.fetch(key).await? else { return Ok(()) };
        if let Err(error) = document::read::<serde_json::Value>(&bytes) {
            self.damaged(key, &error.to_string());
        }
        Ok(())
    }

    #[cfg(feature = "client")]
    async fn program(&mut self, key: &Key) -> Result<(), RepositoryError> {
        if !self.is_drawn(key) {
            return Ok(());
        }
        let Some(bytes) = self.fetch(key).await? else { return Ok(()) };
        match crate::deploy::record::open_program(key, &bytes, &self.repository.keys) {
            Ok(_) => {}
            Err(RepositoryError::Crypto(error)) => self.not_readable(key, &error),
            Err(error) => self.damaged(key, &super::objects::reason(&error)),
        }
        Ok(())
    }

    #[cfg(feature = "client")]
    async fn export(&mut self, key: &Key, listed: &HashMap<Key, u64>) -> Result<(), RepositoryError> {
        let manifest = self.fetch(key).await?;
        let read = |bytes: bytes::Bytes| {
            document::read::<ExportManifest>(&bytes).map_err(|error| RepositoryError::damaged(key, error))
        };
        let Some(manifest) = manifest.map(read) else { return Ok(()) };
        let Some(manifest) = self.sort_out(key, manifest)? else { return Ok(()) };
        for file in manifest.files {
            let key = Key::from(file.object.as_str());
            self.used.insert(key.clone());
            match listed.get(&key) {
                None => {
                    self.sort_out::<()>(&key, Err(RepositoryError::Missing { key: key.to_string() }))?;
                }
                Some(size) if *size != file.bytes => {
                    self.damaged(&key, &format!("it has {size} bytes where {} were written", file.bytes));
                }
                Some(_) if self.is_drawn(&key) => {
                    let bytes = self.fetch(&key).await?;
                    if bytes.is_some_and(|bytes| ContentHash::of(&bytes) != file.hash) {
                        self.damaged(&key, "its bytes are not those that were exported");
                    }
                }
                Some(_) => {}
            }
        }
        Ok(())
    }
}

/// The folder that holds all levels of the timeline that a log object is of.
fn folder_of_levels(key: &Key) -> Key {
    let parts: Vec<_> = key.parts().collect();
    parts.into_iter().rev().skip(2).collect::<Vec<_>>().into_iter().rev().collect()
}
