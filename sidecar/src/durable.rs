//! Writes that survive a power cut: data, then fsync, then rename, then fsync of the parent.
//!
//! Nothing here overwrites but [`replace`]: every other call that could refuses instead.

pub mod streamed;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A path that an operation failed on, and why.
#[derive(Debug, thiserror::Error)]
#[error("{action} {}: {source}", path.display())]
pub struct FileError {
    /// Verb first: "read", "create".
    pub action: &'static str,
    pub path: PathBuf,
    pub source: io::Error,
}

impl FileError {
    pub fn is_disk_full(&self) -> bool {
        matches!(self.source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// Gives an I/O error its verb and its path.
pub trait OnPath<T> {
    /// # Errors
    /// The error that `self` holds, with its path.
    fn on(self, action: &'static str, path: &Path) -> Result<T, FileError>;
}

impl<T> OnPath<T> for io::Result<T> {
    fn on(self, action: &'static str, path: &Path) -> Result<T, FileError> {
        self.map_err(|source| FileError { action, path: path.to_owned(), source })
    }
}

/// Makes a directory's entries durable.
///
/// # Errors
/// When the directory cannot be opened or synced.
pub fn sync_dir(path: &Path) -> Result<(), FileError> {
    File::open(path).on("open", path)?.sync_all().on("sync", path)
}

/// Makes everything below `root` durable: files first, then the directories that name them.
///
/// # Errors
/// The first file or directory that cannot be synced.
pub fn sync_tree(root: &Path) -> Result<(), FileError> {
    for entry in fs::read_dir(root).on("list", root)? {
        let entry = entry.on("list", root)?;
        let path = entry.path();
        if entry.file_type().on("inspect", &path)?.is_dir() {
            sync_tree(&path)?;
        } else {
            File::open(&path).on("open", &path)?.sync_all().on("sync", &path)?;
        }
    }
    sync_dir(root)
}

/// Everything written so far on the file system of `path` reaches the disk: one call instead of one for each page file.
///
/// # Errors
/// When the sync fails.
pub fn sync_file_system(path: &Path) -> Result<(), FileError> {
    #[cfg(target_os = "linux")]
    {
        let dir = File::open(path).on("open", path)?;
        rustix::fs::syncfs(&dir).map_err(std::io::Error::from).on("sync the file system of", path)
    }
    #[cfg(not(target_os = "linux"))]
    sync_tree(path)
}

/// Renames within one file system and makes the new name durable. `to` must not exist.
///
/// # Errors
/// When `to` exists, or the rename or the sync of its parent fails.
pub fn rename(from: &Path, to: &Path) -> Result<(), FileError> {
    if to.symlink_metadata().is_ok() {
        return Err(io::Error::from(io::ErrorKind::AlreadyExists)).on("rename to", to);
    }
    fs::rename(from, to).on("rename", from)?;
    sync_dir(&parent(to))
}

/// Replaces a file's content at once: after a crash the old or the new content is there, whole.
///
/// # Errors
/// When the new file cannot be written or renamed.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let mut name = path.file_name().map(ToOwned::to_owned).unwrap_or_default();
    name.push(".new");
    let new = parent(path).join(name);
    let mut file = File::create(&new).on("create", &new)?;
    file.write_all(bytes).on("write", &new)?;
    file.sync_all().on("sync", &new)?;
    fs::rename(&new, path).on("rename", &new)?;
    sync_dir(&parent(path))
}

/// Creates a file that must not exist, and writes it whole. Not yet durable: follow with [`sync_tree`].
///
/// # Errors
/// When the file exists or cannot be written.
pub fn create(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let mut file = File::create_new(path).on("create", path)?;
    file.write_all(bytes).on("write", path)
}

/// `PATH` with something put after its last component.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().map(ToOwned::to_owned).unwrap_or_else(|| "data".into());
    name.push(suffix);
    parent(path).join(name)
}

/// The directory that holds `path`; the current one for a bare name.
pub fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rename_never_replaces_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        create(&from, b"new").unwrap();
        create(&to, b"old").unwrap();
        assert!(rename(&from, &to).is_err());
        assert_eq!(fs::read(&to).unwrap(), b"old");
        assert_eq!(fs::read(&from).unwrap(), b"new");
    }
}
