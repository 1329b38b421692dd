//! Native snapshots: which there are, what each consists of, and every object of one checked against its name.
//!
//! A snapshot that is being written (its lock file is there, or its manifest is not) or that the server has marked
//! invalid or archived is not listed. Manifests and objects that the server has rewritten as zstd read as what they hold.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::datadir::bytes::{Cursor, Malformed};
use crate::datadir::{DataDirError, page};
use crate::durable::{FileError, OnPath};
use crate::ids::{ContentHash, Identity, Offset};

const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const MAGIC: [u8; 4] = *b"txyz";
const NEWEST_VERSION: u8 = 0;
const DIR_SUFFIX: &str = ".snapshot_dir";
/// No manifest or object is larger; it bounds what a damaged file can make us read.
const MAX_FILE: u64 = 4 << 30;

/// A snapshot on disk, complete when it was listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotDir {
    pub offset: Offset,
    path: PathBuf,
}

/// What kind of thing an object of a snapshot is; it decides how its name is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ObjectKind {
    Page,
    Blob,
}

/// A snapshot's table of contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    pub identity: Identity,
    pub replica_id: u64,
    pub offset: Offset,
    /// Every object once, in the order of first mention.
    pub objects: Vec<(ContentHash, ObjectKind)>,
}

/// Every complete snapshot in `dir`, oldest first. A missing directory holds none.
///
/// # Errors
/// When the directory cannot be listed.
pub fn list(dir: &Path) -> Result<Vec<SnapshotDir>, FileError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).on("list", dir),
    };
    let mut snapshots = Vec::new();
    for entry in entries {
        let path = entry.on("list", dir)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(DIR_SUFFIX));
        if let Some(Ok(offset)) = name.map(Offset::from_padded) {
            let snapshot = SnapshotDir { offset, path };
            if snapshot.is_complete() {
                snapshots.push(snapshot);
            }
        }
    }
    snapshots.sort_by_key(|snapshot| snapshot.offset);
    Ok(snapshots)
}

/// The directory name of the snapshot at `offset`.
pub fn dir_name(offset: Offset) -> String {
    format!("{}{DIR_SUFFIX}", offset.padded())
}

/// The manifest's name inside that directory.
pub fn manifest_name(offset: Offset) -> String {
    format!("{}.snapshot_bsatn", offset.padded())
}

/// An object's path inside that directory.
pub fn object_path(hash: &ContentHash) -> PathBuf {
    let hex = hash.to_string();
    Path::new("objects").join(&hex[..2]).join(&hex[2..])
}

impl SnapshotDir {
    /// Manifest there, lock file not.
    pub fn is_complete(&self) -> bool {
        self.manifest_path().is_file() && !self.path.with_extension("lock").exists()
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn manifest_path(&self) -> PathBuf {
        self.path.join(manifest_name(self.offset))
    }

    /// The manifest, checked, and its bytes as they stood before any compression.
    ///
    /// # Errors
    /// When it cannot be read, does not hash to what it says, or is of an unknown version.
    pub fn manifest(&self) -> Result<(Manifest, Vec<u8>), DataDirError> {
        let path = self.manifest_path();
        let bytes = read_decompressed(&path)?;
        let manifest = Manifest::parse(&bytes).map_err(|error| match error {
            ManifestError::Malformed(malformed) => DataDirError::damaged(&path, 0, malformed),
            ManifestError::UnknownVersion(version) => {
                DataDirError::UnknownVersion { path: path.clone(), what: "snapshot", version, known: NEWEST_VERSION }
            }
        })?;
        if manifest.offset != self.offset {
            let reason = format!("it is of transaction {}, its name says {}", manifest.offset, self.offset);
            return Err(DataDirError::Damaged { path, at: 0, reason });
        }
        Ok((manifest, bytes))
    }

    /// One object's bytes before any compression, checked against its name.
    ///
    /// # Errors
    /// When it cannot be read or is not what its name says.
    pub fn object(&self, hash: &ContentHash, kind: ObjectKind) -> Result<Vec<u8>, DataDirError> {
        let path = self.path.join(object_path(hash));
        let bytes = read_decompressed(&path)?;
        match object_hash(&bytes, kind) {
            Ok(computed) if computed == *hash => Ok(bytes),
            Ok(_) => Err(DataDirError::WrongHash { path, hash: *hash }),
            Err(malformed) => Err(DataDirError::damaged(&path, 0, malformed)),
        }
    }
}

/// The name that an object with these bytes must have.
///
/// # Errors
/// When they are to be a page and are not.
pub fn object_hash(bytes: &[u8], kind: ObjectKind) -> Result<ContentHash, Malformed> {
    match kind {
        ObjectKind::Blob => Ok(ContentHash::of(bytes)),
        ObjectKind::Page => page::content_hash(bytes),
    }
}

/// Why bytes are no manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("snapshot version {0} is unknown")]
    UnknownVersion(u8),
}

impl Manifest {
    /// Reads a manifest file's bytes: a BLAKE3 hash, then the BSATN that it is the hash of.
    ///
    /// # Errors
    /// When the hash is wrong, or the rest is not a manifest that this release knows.
    pub fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let mut cursor = Cursor::new(bytes);
        let hash: [u8; 32] = cursor.array("the hash")?;
        if ContentHash::of(&bytes[cursor.position()..]).0 != hash {
            return Err(Malformed { at: 0, reason: "the manifest does not match its hash".into() }.into());
        }
        if cursor.fixed_bytes::<4>("the magic")? != MAGIC {
            return Err(Malformed { at: 32, reason: "a snapshot's magic is `txyz`, and this is not".into() }.into());
        }
        let version = cursor.u8("the version")?;
        if version > NEWEST_VERSION {
            return Err(ManifestError::UnknownVersion(version));
        }
        let identity = Identity::from_le(cursor.array("the identity")?);
        let replica_id = cursor.u64("the replica id")?;
        let abi = cursor.array_len(2, "the module ABI version")?;
        cursor.take(abi * 2, "the module ABI version")?;
        let offset = Offset(cursor.u64("the transaction offset")?);
        let mut objects = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for _ in 0..cursor.array_len(40, "the blobs")? {
            let hash = ContentHash(cursor.fixed_bytes("a blob's hash")?);
            cursor.u32("a blob's uses")?;
            if seen.insert(hash) {
                objects.push((hash, ObjectKind::Blob));
            }
        }
        for _ in 0..cursor.array_len(8, "the tables")? {
            cursor.u32("a table's id")?;
            for _ in 0..cursor.array_len(36, "a table's pages")? {
                let hash = ContentHash(cursor.fixed_bytes("a page's hash")?);
                // Servers after 2.8.3 write zeros for a page that has no object.
                if hash != ContentHash::ZERO && seen.insert(hash) {
                    objects.push((hash, ObjectKind::Page));
                }
            }
        }
        cursor.finish("the manifest")?;
        Ok(Self { identity, replica_id, offset, objects })
    }
}

fn read_decompressed(path: &Path) -> Result<Vec<u8>, DataDirError> {
    let mut file = File::open(path).on("open", path)?;
    let size = file.metadata().on("inspect", path)?.len();
    let mut bytes = Vec::with_capacity(usize::try_from(size.min(1 << 20)).unwrap_or(0));
    Read::by_ref(&mut file).take(MAX_FILE).read_to_end(&mut bytes).on("read", path)?;
    if !bytes.starts_with(&ZSTD_MAGIC) {
        return Ok(bytes);
    }
    let mut plain = Vec::new();
    zstd::Decoder::new(bytes.as_slice()).and_then(|decoder| decoder.take(MAX_FILE).read_to_end(&mut plain)).map_err(
        |error| DataDirError::Damaged { path: path.to_owned(), at: 0, reason: format!("decompress: {error}") },
    )?;
    Ok(plain)
}
