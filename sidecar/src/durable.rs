//! Writes that survive a power cut: data, then fsync, then rename, then fsync of the parent.
//!
//! Nothing here overwrites but [`replace`]: every other call that could refuses instead.

pub mod owner;
pub mod renames;
pub mod streamed;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Once;

use rustix::io::Errno;

use crate::durable::owner::Owner;
use crate::durable::renames::Renames;

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

/// Makes a directory's entries durable, as far as its file system can: some network and FUSE file systems cannot sync a
/// directory, which is warned of once.
///
/// # Errors
/// When the directory cannot be opened, or the disk fails.
pub fn sync_dir(path: &Path) -> Result<(), FileError> {
    tolerate(File::open(path).on("open", path)?.sync_all(), path).on("sync", path)
}

fn tolerate(synced: io::Result<()>, path: &Path) -> io::Result<()> {
    static WARNED: Once = Once::new();
    match synced {
        Err(error) if is_unsupported(&error) => {
            WARNED.call_once(|| {
                let path = path.display();
                tracing::warn!(%path, %error, "directories cannot be synced here: names may be lost with a power cut");
            });
            Ok(())
        }
        synced => synced,
    }
}

/// Returns true if the file system does not know the operation, rather than failed in it.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::INVAL | Errno::NOTSUP | Errno::NOSYS))
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
        match rustix::fs::syncfs(&dir).map_err(std::io::Error::from) {
            Err(error) if is_unsupported(&error) => sync_tree(path),
            synced => synced.on("sync the file system of", path),
        }
    }
    #[cfg(not(target_os = "linux"))]
    sync_tree(path)
}

/// Renames within one file system and makes the new name durable. `to` must not exist.
///
/// # Errors
/// When `to` exists, or the rename or the sync of its parent fails; `from` keeps its name then.
pub fn rename(from: &Path, to: &Path) -> Result<(), FileError> {
    let mut renames = Renames::default();
    renames.rename(from, to)?;
    renames.keep();
    Ok(())
}

/// Replaces a file's content at once: after a crash the old or the new content is there, whole. Owner and mode stay.
///
/// # Errors
/// When the new file cannot be written or renamed.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    let mut name = path.file_name().map(ToOwned::to_owned).unwrap_or_default();
    name.push(".new");
    let new = parent(path).join(name);
    let mut file = File::create(&new).on("create", &new)?;
    file.write_all(bytes).on("write", &new)?;
    if let Ok(old) = Owner::of(path) {
        // What cannot be kept does not keep the content from being written.
        let _ = old.give_file(&new);
    }
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

/// The one path of what `path` leads to, whichever links and dots it has. Of what does not exist yet, the path that it will
/// have.
pub fn canonical(path: &Path) -> PathBuf {
    const LINKS_MAX: usize = 40;
    // A slash at the end of a link to what does not exist would hide the link.
    canonical_within(&path.components().collect::<PathBuf>(), LINKS_MAX)
}

fn canonical_within(path: &Path, links: usize) -> PathBuf {
    if let Ok(found) = fs::canonicalize(path) {
        return found;
    }
    if let (Ok(target), Some(left)) = (fs::read_link(path), links.checked_sub(1)) {
        return canonical_within(&parent(path).join(target), left);
    }
    match path.file_name() {
        Some(name) => canonical_within(&parent(path), links).join(name),
        None => std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsupported_syncs_pass_and_failed_disks_do_not() {
        let path = Path::new("/srv");
        for (error, passes) in [(Errno::INVAL, true), (Errno::NOTSUP, true), (Errno::IO, false), (Errno::NOSPC, false)]
        {
            assert_eq!(tolerate(Err(error.into()), path).is_ok(), passes, "{error}");
        }
    }

    #[test]
    fn every_spelling_has_one_canonical_path() {
        let dir = tempfile::tempdir().unwrap();
        let base = fs::canonicalize(dir.path()).unwrap();
        let (real, link) = (base.join("real"), base.join("link"));
        std::os::unix::fs::symlink("real", &link).unwrap();
        // Before and after it is made.
        for _ in 0..2 {
            for name in ["real", "real/", "./real", "link", "link/"] {
                assert_eq!(canonical(&base.join(name)), real, "{name}");
            }
            assert_eq!(canonical(&base.join("real/../real")).file_name(), real.file_name());
            assert_eq!(canonical(&base.join("link/below")), real.join("below"));
            fs::create_dir(&real).unwrap_or_default();
        }
        assert_eq!(canonical(&base.join("link/../real")), real);
        std::os::unix::fs::symlink("loop", base.join("loop")).unwrap();
        assert_eq!(canonical(&base.join("loop")), base.join("loop"));
    }

    #[test]
    fn a_replaced_file_keeps_its_mode() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        create(&path, b"old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

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
