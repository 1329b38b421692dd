//! The instance capture: what belongs to a server rather than to one database.
//!
//! A capture is a tar of the control database, the published programs, `metadata.toml`, `config.toml` and, if asked for,
//! the token keys, compressed with zstd and sealed if the repository is. Entries are sorted and carry no times or owners,
//! so the same content gives the same bytes.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::path::{Component, Path, PathBuf};

use crate::datadir::control_db::{ControlDbCopy, Trees};
use crate::datadir::key_files::{self, KeyFiles};
use crate::datadir::{DataDir, DataDirError, Metadata};
use crate::durable::owner::make_private_dir;
use crate::durable::{FileError, OnPath};
use crate::ids::ContentHash;
use crate::repository::crypto::{CryptoError, Keyring};

/// Files by their path in the capture.
pub struct Capture {
    files: BTreeMap<String, Vec<u8>>,
    /// What the capture says, by hash: the control database by its content, since its files differ from copy to copy.
    pub state: ContentHash,
    pub has_keys: bool,
}

const METADATA: &str = "metadata.toml";
const CONTROL_DB: &str = "control-db";
const PROGRAMS: &str = "program-bytes";
/// Where the token keys lie in a capture; they do not belong into the data directory.
pub const KEYS: &str = "keys";

/// What can go wrong with a capture.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    #[error("the instance capture is damaged: {0}; run `inner-universe verify`")]
    Damaged(String),
    #[error("the instance has {len} bytes and compresses to so few that no more than {most} are taken back; report it")]
    TooLarge { len: u64, most: u64 },
    #[error(
        "the token key {} is not there; name the directory given to the server as --jwt-key-dir, or its two files in \
         spacetimedb_config.private_key_file and public_key_file",
        .0.display()
    )]
    NoKey(PathBuf),
}

impl Capture {
    /// Reads everything but the databases' own files. `control` is a copy taken just before.
    ///
    /// # Errors
    /// When a file cannot be read, or one of `keys` is not there.
    pub fn take(data: &DataDir, control: &ControlDbCopy, keys: Option<&KeyFiles>) -> Result<Self, InstanceError> {
        let mut files = BTreeMap::new();
        for (name, path) in [(METADATA, data.metadata_path()), ("config.toml", data.config_path())] {
            if path.exists() {
                files.insert(name.to_owned(), fs::read(&path).on("read", &path)?);
            }
        }
        gather(&data.program_bytes_path(), PROGRAMS, &mut files)?;
        if let Some(keys) = keys {
            for (name, path) in [(key_files::PRIVATE, &keys.private), (key_files::PUBLIC, &keys.public)] {
                if !path.is_file() {
                    return Err(InstanceError::NoKey(path.clone()));
                }
                files.insert(format!("{KEYS}/{name}"), fs::read(path).on("read", path)?);
            }
        }
        let state = state_of(&files, &control.trees);
        gather(&control.path(), CONTROL_DB, &mut files)?;
        Ok(Self { files, state, has_keys: keys.is_some() })
    }

    /// The object's bytes and their hash, which is its name.
    ///
    /// # Errors
    /// When sealing fails.
    pub fn encode(&self, level: i32, keys: &Keyring) -> Result<(ContentHash, Vec<u8>), InstanceError> {
        let damaged = |error: std::io::Error| InstanceError::Damaged(error.to_string());
        let mut tar = tar::Builder::new(zstd::Encoder::new(Vec::new(), level).map_err(damaged)?);
        for (name, bytes) in &self.files {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(if is_secret(name) { 0o600 } else { 0o644 });
            tar.append_data(&mut header, name, bytes.as_slice()).map_err(damaged)?;
        }
        let compressed = tar.into_inner().and_then(zstd::Encoder::finish).map_err(damaged)?;
        let bytes = keys.seal(compressed)?;
        // What would be refused when it is needed is refused now.
        let len = self.files.values().map(|content| content.len() as u64).sum::<u64>();
        if len > most(bytes.len()) {
            return Err(InstanceError::TooLarge { len, most: most(bytes.len()) });
        }
        Ok((ContentHash::of(&bytes), bytes))
    }
}

/// What [`extract`] wrote.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Extracted {
    /// Where the token keys were put, if the capture holds any.
    pub keys: Option<PathBuf>,
}

/// Writes a capture into an empty data directory; the token keys, if any, into `keys_to`.
///
/// # Errors
/// When the bytes are not what `id` says, cannot be unsealed, or a file cannot be written.
pub fn extract(
    id: &ContentHash,
    bytes: &[u8],
    keys: &Keyring,
    target: &Path,
    keys_to: &Path,
) -> Result<Extracted, InstanceError> {
    let mut extracted = Extracted::default();
    for (name, content) in read(id, bytes, keys)? {
        let relative = Path::new(&name);
        // Names come from outside: none may lead out of the target.
        if !relative.components().all(|part| matches!(part, Component::Normal(_))) {
            return Err(InstanceError::Damaged(format!("`{name}` is no name inside a data directory")));
        }
        let path = match relative.strip_prefix(KEYS) {
            Ok(file) => {
                extracted.keys = Some(keys_to.to_owned());
                keys_to.join(file)
            }
            Err(_) => target.join(relative),
        };
        let parent = crate::durable::parent(&path);
        if is_secret(&name) {
            make_private_dir(&parent)?;
        } else {
            fs::create_dir_all(&parent).on("create", &parent)?;
        }
        write_file(&path, &content, is_secret(&name))?;
    }
    Ok(extracted)
}

/// The release of the server that a capture is of, by its `metadata.toml`.
///
/// # Errors
/// When the bytes are not what `id` says or cannot be unsealed.
pub fn version(id: &ContentHash, bytes: &[u8], keys: &Keyring) -> Result<Option<String>, InstanceError> {
    let files = read(id, bytes, keys)?;
    let text = files.iter().find(|(name, _)| name == METADATA).map(|(_, content)| String::from_utf8_lossy(content));
    // One that is not understood says nothing.
    Ok(text.and_then(|text| toml::from_str::<Metadata>(&text).ok()).map(|metadata| metadata.version))
}

/// Every file of a capture, checked against the capture's hash.
///
/// # Errors
/// When the bytes are not what `id` says or cannot be unsealed.
pub fn read(id: &ContentHash, bytes: &[u8], keys: &Keyring) -> Result<Vec<(String, Vec<u8>)>, InstanceError> {
    if ContentHash::of(bytes) != *id {
        return Err(InstanceError::Damaged("it does not hash to its name".into()));
    }
    let damaged = |error: std::io::Error| InstanceError::Damaged(error.to_string());
    let opened;
    // Sealed captures start with age's own magic; plain ones with zstd's.
    let compressed = if bytes.starts_with(b"age-encryption.org/") {
        opened = keys.open(bytes)?;
        opened.as_slice()
    } else {
        bytes
    };
    // Text and programs do not compress beyond this; what does is made to fill memory. Names and headers count too.
    let most = most(bytes.len());
    let unpacked = zstd::Decoder::new(compressed).map_err(damaged)?.take(most.saturating_mul(2));
    let mut tar = tar::Archive::new(unpacked);
    let mut files = Vec::new();
    let mut left = most;
    for entry in tar.entries().map_err(damaged)? {
        let entry = entry.map_err(damaged)?;
        let name = entry.path().map_err(damaged)?.to_string_lossy().into_owned();
        if !entry.header().entry_type().is_file() {
            return Err(InstanceError::Damaged(format!("`{name}` is no file")));
        }
        let mut content = Vec::new();
        entry.take(left.saturating_add(1)).read_to_end(&mut content).map_err(damaged)?;
        left = left.checked_sub(content.len() as u64).ok_or_else(|| {
            InstanceError::Damaged(format!("it is larger than {most} bytes when it is unpacked, which no capture is"))
        })?;
        files.push((name, content));
    }
    Ok(files)
}

/// A capture may be so many times as large as it is stored, and then some.
const MOST_RATIO: u64 = 64;
const MOST_BASE: u64 = 64 << 20;

fn most(stored: usize) -> u64 {
    MOST_RATIO.saturating_mul(stored as u64).saturating_add(MOST_BASE)
}

fn is_secret(name: &str) -> bool {
    name.strip_prefix(KEYS).is_some_and(|rest| rest.starts_with('/'))
}

fn write_file(path: &Path, content: &[u8], secret: bool) -> Result<(), FileError> {
    use std::os::unix::fs::OpenOptionsExt;
    let mode = if secret { 0o600 } else { 0o644 };
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    file.on("create", path)?.write_all(content).on("write", path)
}

fn gather(dir: &Path, name: &str, files: &mut BTreeMap<String, Vec<u8>>) -> Result<(), FileError> {
    if !dir.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(dir).on("list", dir)? {
        let entry = entry.on("list", dir)?;
        let path = entry.path();
        let Some(file) = entry.file_name().to_str().map(|file| format!("{name}/{file}")) else { continue };
        if entry.file_type().on("inspect", &path)?.is_dir() {
            gather(&path, &file, files)?;
        } else {
            files.insert(file, fs::read(&path).on("read", &path)?);
        }
    }
    Ok(())
}

fn state_of(files: &BTreeMap<String, Vec<u8>>, trees: &Trees) -> ContentHash {
    let mut hasher = blake3::Hasher::new();
    let mut add = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    };
    for (name, bytes) in files {
        add(name.as_bytes());
        add(bytes);
    }
    for (name, tree) in trees {
        add(name);
        for (key, value) in tree {
            add(key);
            add(value);
        }
        add(&[]);
    }
    ContentHash(*hasher.finalize().as_bytes())
}
