//! Keys that lie in files, and are replaced there while this process runs.
//!
//! Invariants: a file is read again when another one lies at its path, or its content changed; a file that cannot be read
//! leaves the keys that were read last in use.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use object_store::CredentialProvider;
use object_store::aws::AwsCredential;
use parking_lot::Mutex;

use crate::config::RepositoryConfig;
use crate::config::value::Secret;

/// Device, inode, size and time of change: what differs where a file was replaced.
type Stamp = Option<(u64, u64, u64, i64, i64)>;

fn stamp(path: &Path) -> Stamp {
    let data = std::fs::metadata(path).ok()?;
    Some((data.dev(), data.ino(), data.size(), data.ctime(), data.ctime_nsec()))
}

/// A key pair, some of it in files.
#[derive(Debug)]
pub(super) struct KeyFiles {
    id: Secret,
    secret: Secret,
    token: Option<Secret>,
    read: Mutex<Read>,
}

/// What was read last.
#[derive(Debug)]
struct Read {
    stamps: Vec<Stamp>,
    keys: Arc<AwsCredential>,
    /// The files could not be read since, which is said once and tried at each use.
    is_stale: bool,
}

impl KeyFiles {
    /// The configured keys; `None` where there are none, or none is in a file.
    pub(super) fn of(config: &RepositoryConfig) -> Option<Self> {
        let (id, secret) = (config.access_key_id.clone()?, config.secret_access_key.clone()?);
        let token = config.session_token.clone();
        let keys = [Some(&id), Some(&secret), token.as_ref()];
        if keys.into_iter().flatten().all(|key| key.file().is_none()) {
            return None;
        }
        let first = AwsCredential {
            key_id: id.reveal().to_owned(),
            secret_key: secret.reveal().to_owned(),
            token: token.as_ref().map(|token| token.reveal().to_owned()),
        };
        // No stamps yet: the first use reads what lies there by then.
        let read = Read { stamps: Vec::new(), keys: Arc::new(first), is_stale: false };
        Some(Self { id, secret, token, read: Mutex::new(read) })
    }

    fn stamps(&self) -> Vec<Stamp> {
        let keys = [Some(&self.id), Some(&self.secret), self.token.as_ref()];
        keys.into_iter().flatten().filter_map(Secret::file).map(stamp).collect()
    }

    fn read(&self) -> Result<AwsCredential, String> {
        Ok(AwsCredential {
            key_id: self.id.read_again()?,
            secret_key: self.secret.read_again()?,
            token: self.token.as_ref().map(Secret::read_again).transpose()?,
        })
    }
}

#[async_trait]
impl CredentialProvider for KeyFiles {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let mut read = self.read.lock();
        // Before the files are read: what changes in between is seen the next time.
        let stamps = self.stamps();
        if stamps != read.stamps {
            match self.read() {
                Ok(keys) => *read = Read { stamps, keys: Arc::new(keys), is_stale: false },
                Err(error) if !read.is_stale => {
                    read.is_stale = true;
                    tracing::warn!(%error, "failed to read the store's keys again; those that were read last stay in use");
                }
                Err(_) => {}
            }
        }
        Ok(Arc::clone(&read.keys))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &str) -> Secret {
        Secret::try_from(text.to_owned()).expect("a secret")
    }

    async fn current(keys: &KeyFiles) -> (String, String) {
        let found = keys.get_credential().await.expect("credentials");
        (found.key_id.clone(), found.secret_key.clone())
    }

    #[tokio::test]
    async fn keys_replaced_by_rename_are_read_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("secret");
        std::fs::write(&path, "old\n").expect("a secret");
        let config = RepositoryConfig {
            access_key_id: Some(secret("AKIA")),
            secret_access_key: Some(secret(&format!("file:{}", path.display()))),
            ..RepositoryConfig::default()
        };
        let keys = KeyFiles::of(&config).expect("a key is in a file");
        assert_eq!(current(&keys).await, ("AKIA".into(), "old".into()));
        let next = dir.path().join("next");
        std::fs::write(&next, "new").expect("a secret");
        std::fs::rename(&next, &path).expect("renamed");
        assert_eq!(current(&keys).await, ("AKIA".into(), "new".into()));
        std::fs::remove_file(&path).expect("removed");
        assert_eq!(current(&keys).await, ("AKIA".into(), "new".into()), "in the middle of a replacement");
        std::fs::write(&path, "newest").expect("a secret");
        assert_eq!(current(&keys).await, ("AKIA".into(), "newest".into()));
        // Whatever kept a changed file from being read, it is read once that is over, though it does not change again.
        std::fs::write(&path, [0xff]).expect("no text");
        assert_eq!(current(&keys).await, ("AKIA".into(), "newest".into()));
        assert!(keys.read.lock().is_stale && keys.read.lock().stamps != keys.stamps());
    }

    #[test]
    fn keys_without_files_stay_as_they_are() {
        let config = RepositoryConfig {
            access_key_id: Some(secret("AKIA")),
            secret_access_key: Some(secret("text")),
            ..RepositoryConfig::default()
        };
        assert!(KeyFiles::of(&config).is_none());
    }
}
