//! The history of deployments in the repository, with the programs that were deployed.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use object_store::path::Path as Key;
use serde::{Deserialize, Serialize};

use crate::database::control::HostType;
use crate::deploy::{DeployError, Mode, Outcome, program};
use crate::ids::{ContentHash, Identity, Offset, RestorePointId};
use crate::repository::crypto::Keyring;
use crate::repository::{Repository, RepositoryError, paths};

/// `deployments/ID.json`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeploymentRecord {
    pub format: u32,
    pub id: RestorePointId,
    pub database: Identity,
    pub name: String,
    pub module: ContentHash,
    /// What runs the module.
    #[serde(default)]
    pub host_type: HostType,
    /// `None` for the first.
    pub previous: Option<ContentHash>,
    pub mode: Mode,
    pub outcome: Outcome,
    /// The identity that published.
    pub deployed_by: Option<Identity>,
    pub started_at: Timestamp,
    pub ended_at: Timestamp,
    /// Taken before anything was changed.
    pub restore_point: Option<RestorePointId>,
    /// The transaction of the publish, where the log is at hand.
    pub publish_offset: Option<Offset>,
    pub server_version: Option<String>,
    pub tool_version: String,
    pub message: String,
}

impl DeploymentRecord {
    /// Whether it is of the database with this name or identity.
    pub fn is_of(&self, database: &str) -> bool {
        self.name == database || self.database.to_string() == database.to_ascii_lowercase()
    }
}

/// Writes programs, then the record that names them.
///
/// # Errors
/// When a program cannot be read, or the store fails.
pub async fn keep(repository: &Repository, record: &DeploymentRecord, programs: &[PathBuf]) -> Result<(), DeployError> {
    for path in programs {
        let Some(hash) = path.file_stem().and_then(|name| name.to_str()).and_then(|name| name.parse().ok()) else {
            continue;
        };
        let key = paths::program(&hash, repository.keys.seals());
        if !repository.exists(&key).await? {
            let bytes = tokio::fs::read(path).await;
            let bytes =
                bytes.map_err(|source| crate::durable::FileError { action: "read", path: path.clone(), source })?;
            let packed = program::pack(&bytes).map_err(|error| DeployError::Worker(error.to_string()))?;
            let sealed = repository.keys.seal(packed).map_err(RepositoryError::from)?;
            repository.put(&key, sealed.into()).await?;
        }
    }
    let key = paths::deployment(record.id);
    // A run that was broken off right after this is not told twice.
    if !repository.exists(&key).await? {
        repository.put_document(&key, record).await?;
    }
    Ok(())
}

/// Every record of a database, oldest first.
///
/// # Errors
/// When a record is damaged or the store fails.
pub async fn list(repository: &Repository, name: &str) -> Result<Vec<DeploymentRecord>, RepositoryError> {
    let mut records = all(repository).await?;
    records.retain(|record| record.is_of(name));
    Ok(records)
}

/// Every record, oldest first.
///
/// # Errors
/// When a record is damaged or the store fails.
pub async fn all(repository: &Repository) -> Result<Vec<DeploymentRecord>, RepositoryError> {
    let mut records = Vec::new();
    for (key, _) in repository.list(&paths::deployments()).await? {
        records.push(repository.get_document(&key).await?);
    }
    Ok(records)
}

/// A program that was deployed, from this machine or from the repository.
///
/// # Errors
/// When neither has it, or it cannot be opened.
pub async fn program(repository: Option<&Repository>, dir: &Path, hash: &ContentHash) -> Result<Vec<u8>, DeployError> {
    if let Ok(bytes) = tokio::fs::read(local(dir, hash)).await
        && super::module::program_hash(&bytes) == *hash
    {
        return Ok(bytes);
    }
    let Some(repository) = repository else { return Err(DeployError::NoProgram(*hash)) };
    let key = paths::program(hash, repository.keys.seals());
    let bytes = match repository.get(&key).await {
        Err(RepositoryError::Missing { .. }) => return Err(DeployError::NoProgram(*hash)),
        bytes => bytes?,
    };
    Ok(open_program(&key, &bytes, &repository.keys)?)
}

/// Opens a stored program and checks that it is the one that its name says.
///
/// # Errors
/// When it is damaged, or sealed and no key opens it.
pub fn open_program(key: &Key, bytes: &[u8], keys: &Keyring) -> Result<Vec<u8>, RepositoryError> {
    let opened = match key.as_ref().ends_with(".age") {
        true => keys.open(bytes)?,
        false => bytes.to_vec(),
    };
    let bytes = program::unpack(&opened).map_err(|error| RepositoryError::damaged(key, error.to_string()))?;
    match key.filename().is_some_and(|name| name.starts_with(&super::module::program_hash(&bytes).to_string())) {
        true => Ok(bytes),
        false => Err(RepositoryError::damaged(key, "it is another program than its name says")),
    }
}

/// Where this machine keeps a program.
pub fn local(dir: &Path, hash: &ContentHash) -> PathBuf {
    dir.join("programs").join(format!("{hash}.wasm"))
}
