//! The repositories that a data directory was archived to, remembered in its state directory.
//!
//! A disk that is not mounted, a bucket that was emptied and a misspelt prefix all look like an empty place. Whoever archived to
//! a place before expects the same repository there, with the same recipients: another one, or none, is refused, and never made.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::clock::Clock;
use crate::config::RepositoryConfig;
use crate::durable::{self, FileError, OnPath};
use crate::ids::RestorePointId;
use crate::repository::crypto::Keyring;
use crate::repository::hashing::HashKey;
use crate::repository::manifest::RepositoryInfo;
use crate::repository::{Repository, RepositoryError};

/// What is remembered of one repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    pub id: RestorePointId,
    /// age recipients that bodies are encrypted to.
    pub recipients: Vec<String>,
    /// The key of its hashes, which without an identity nobody can read from the repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hash_key: Option<String>,
}

impl From<&Repository> for Known {
    fn from(repository: &Repository) -> Self {
        let RepositoryInfo { id, recipients, .. } = repository.info.clone();
        Self { id, recipients, hash_key: repository.keys.hash_key().map(HashKey::to_text) }
    }
}

/// `repositories.json` in a state directory.
#[derive(Debug, Clone)]
pub struct Remembered(PathBuf);

impl Remembered {
    /// That of the state directory `dir`, which need not exist.
    pub fn in_dir(dir: &Path) -> Self {
        Self(dir.join("repositories.json"))
    }

    /// What is remembered of the repository at `url`.
    ///
    /// # Errors
    /// When the file is there and cannot be read: it may name the repository.
    pub fn at(&self, url: &str) -> Result<Option<Known>, FileError> {
        Ok(self.all()?.remove(url))
    }

    fn all(&self) -> Result<BTreeMap<String, Known>, FileError> {
        match std::fs::read(&self.0) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::from).on("read", &self.0),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
            Err(error) => Err(error).on("read", &self.0),
        }
    }

    /// Moves a file that cannot be read out of the way, for whoever says which repository is meant.
    ///
    /// # Errors
    /// When it cannot be moved.
    pub fn set_aside_unreadable(&self) -> Result<(), FileError> {
        let Err(error) = self.all() else { return Ok(()) };
        let aside = self.0.with_extension("json.unreadable");
        tracing::warn!(%error, to = %aside.display(), "which repositories are known cannot be read, and is moved aside");
        std::fs::rename(&self.0, &aside).on("move aside", &self.0)
    }

    /// Remembers the repository at `url`, in place of any other there.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub fn remember(&self, url: &str, repository: &Repository) -> Result<(), FileError> {
        let (mut all, mut known) = (self.all()?, Known::from(repository));
        if let Some(before) = all.get(url).filter(|before| before.id == known.id) {
            // What is known of it once is kept.
            known.hash_key = known.hash_key.or_else(|| before.hash_key.clone());
        }
        if all.insert(url.to_owned(), known.clone()) == Some(known) {
            return Ok(());
        }
        let bytes = serde_json::to_vec_pretty(&all).unwrap_or_default();
        durable::replace(&self.0, &bytes)
    }

    /// Opens the repository at `url` to write, and remembers it. It is the one that is remembered, if any is.
    ///
    /// # Errors
    /// [`RepositoryError::Vanished`] and [`RepositoryError::Replaced`] when it is not, and as [`Repository::open_to_write`].
    pub async fn open(
        &self,
        url: &str,
        config: &RepositoryConfig,
        keys: Keyring,
    ) -> Result<Repository, RepositoryError> {
        let opened = Repository::open_to_write(url, config, keys).await;
        let repository = self.check(url, opened)?;
        self.note(url, &repository);
        Ok(repository)
    }

    /// As [`Self::open`]; where no repository is and none is remembered, one is made.
    ///
    /// # Errors
    /// As [`Self::open`] and [`Repository::open_or_create`].
    pub async fn open_or_create(
        &self,
        url: &str,
        config: &RepositoryConfig,
        keys: Keyring,
        clock: &dyn Clock,
    ) -> Result<Repository, RepositoryError> {
        if self.at(url).map_err(RepositoryError::Forgotten)?.is_some() {
            return self.open(url, config, keys).await;
        }
        let repository = Repository::open_or_create(url, config, keys, clock).await?;
        self.note(url, &repository);
        Ok(repository)
    }

    /// Remembers a repository that was opened. That this fails stops nothing: the next run remembers it.
    pub fn note(&self, url: &str, repository: &Repository) {
        if let Err(error) = self.remember(url, repository) {
            tracing::warn!(%error, "failed to remember the repository");
        }
    }

    /// Compares what was found at `url` with what is remembered, as far as that can be read.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn check(&self, url: &str, found: Result<Repository, RepositoryError>) -> Result<Repository, RepositoryError> {
        let known = self.at(url).unwrap_or_else(|error| {
            tracing::warn!(%error, "which repository is expected is not known");
            None
        });
        let Some(known) = known else { return found };
        match found {
            Ok(mut found) if (&found.info.id, &found.info.recipients) == (&known.id, &known.recipients) => {
                if let Some(key) = known.hash_key.as_deref().and_then(HashKey::from_text) {
                    found.keys.remember(key);
                }
                Ok(found)
            }
            Ok(found) if found.info.id == known.id => Err(RepositoryError::OtherRecipients {
                url: url.into(),
                expected: known.recipients,
                found: found.info.recipients,
            }),
            Ok(found) => Err(RepositoryError::Replaced { url: url.into(), expected: known.id, found: found.info.id }),
            Err(RepositoryError::NoRepository { .. } | RepositoryError::NotEmpty { .. }) => {
                Err(RepositoryError::Vanished { url: url.into(), expected: known.id })
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;
    use crate::repository::hashing::Hashing;

    async fn make(url: &str) -> Repository {
        let config = RepositoryConfig::default();
        Repository::open_or_create(url, &config, Keyring::default(), &SystemClock).await.unwrap()
    }

    #[tokio::test]
    async fn vanished_and_replaced_repositories_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("repository");
        let url = url::Url::from_file_path(&place).unwrap().to_string();
        let config = RepositoryConfig::default();
        let remembered = Remembered::in_dir(dir.path());
        // One that was never seen is not made by opening it.
        let none = remembered.open(&url, &config, Keyring::default()).await.err().unwrap();
        assert!(matches!(none, RepositoryError::NoRepository { .. }), "{none}");
        assert!(!place.exists());

        let first = make(&url).await;
        let opened = remembered.open(&url, &config, Keyring::default()).await.unwrap();
        assert_eq!(opened.info, first.info);
        let away = dir.path().join("away");
        std::fs::rename(&place, &away).unwrap();
        let gone = remembered.open(&url, &config, Keyring::default()).await.err().unwrap();
        assert!(matches!(&gone, RepositoryError::Vanished { expected, .. } if *expected == first.info.id), "{gone}");
        assert!(!gone.is_permanent() && !place.exists());

        let second = make(&url).await;
        let other = remembered.open(&url, &config, Keyring::default()).await.err().unwrap();
        let text = other.to_string();
        assert!(text.contains(&first.info.id.to_string()) && text.contains(&second.info.id.to_string()), "{text}");
        // A write through the repository that was opened before sees it too.
        let key = crate::repository::paths::pin(first.info.id);
        assert!(matches!(opened.put(&key, "{}".into()).await, Err(RepositoryError::Replaced { .. })));
        assert!(matches!(opened.delete(&key).await, Err(RepositoryError::Replaced { .. })));

        std::fs::remove_dir_all(&place).unwrap();
        assert!(matches!(opened.put(&key, "{}".into()).await, Err(RepositoryError::Vanished { .. })));
        assert!(!place.exists(), "a write made the directory");
        std::fs::rename(&away, &place).unwrap();
        remembered.open(&url, &config, Keyring::default()).await.unwrap();
        opened.put(&key, "{}".into()).await.unwrap();
    }

    #[tokio::test]
    async fn recipients_that_were_taken_out_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let url = url::Url::from_file_path(dir.path().join("repository")).unwrap().to_string();
        let remembered = Remembered::in_dir(dir.path());
        let made = make(&url).await;
        let mut sealed = made.clone();
        sealed.info.recipients = vec!["age1example".into()];
        remembered.remember(&url, &sealed).unwrap();
        let plain = remembered.open(&url, &RepositoryConfig::default(), Keyring::default()).await.err().unwrap();
        assert!(matches!(plain, RepositoryError::OtherRecipients { .. }), "{plain}");
        // A memory that cannot be read may name any repository: nothing is made, and what it holds is kept.
        std::fs::write(dir.path().join("repositories.json"), "{").unwrap();
        std::fs::remove_dir_all(dir.path().join("repository")).unwrap();
        let config = RepositoryConfig::default();
        let refused = remembered.open_or_create(&url, &config, Keyring::default(), &SystemClock).await.err().unwrap();
        assert!(refused.to_string().contains("repositories.json"), "{refused}");
        assert!(remembered.remember(&url, &made).is_err() && !dir.path().join("repository").exists());
        remembered.set_aside_unreadable().unwrap();
        remembered.remember(&url, &made).unwrap();
        assert!(dir.path().join("repositories.json.unreadable").exists());
    }

    #[tokio::test]
    async fn the_key_of_hashes_is_remembered() {
        use age::secrecy::ExposeSecret as _;
        let dir = tempfile::tempdir().unwrap();
        let url = url::Url::from_file_path(dir.path().join("repository")).unwrap().to_string();
        let identity = age::x25519::Identity::generate();
        let recipients = [identity.to_public().to_string()];
        let sealing = || Keyring::new(&recipients, &[]).unwrap();
        let config = RepositoryConfig::default();
        let here = Remembered::in_dir(dir.path());
        let made = here.open_or_create(&url, &config, sealing(), &SystemClock).await.unwrap();
        let hashing = made.hashing().unwrap();
        assert_ne!(hashing, Hashing::Plain);
        assert_eq!(here.open(&url, &config, sealing()).await.unwrap().hashing().unwrap(), hashing);
        // Another machine knows it once it has seen it with an identity.
        let elsewhere = tempfile::tempdir().unwrap();
        let there = Remembered::in_dir(elsewhere.path());
        assert!(there.open(&url, &config, sealing()).await.unwrap().hashing().is_err());
        let file = elsewhere.path().join("identity.txt");
        std::fs::write(&file, identity.to_string().expose_secret()).unwrap();
        let opening = Keyring::new(&[], &[file]).unwrap();
        assert_eq!(there.open(&url, &config, opening).await.unwrap().hashing().unwrap(), hashing);
        assert_eq!(there.open(&url, &config, sealing()).await.unwrap().hashing().unwrap(), hashing);
        let info = std::fs::read_to_string(dir.path().join("repository/repository.json")).unwrap();
        assert!(info.contains("\"format\":2,") && !info.contains(&made.keys.hash_key().unwrap().to_text()), "{info}");
    }
}
