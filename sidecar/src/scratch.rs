//! Temporary directories that are private and do not stay: removed with their value, and after a kill by the next run.
//!
//! Invariants: a process holds a lock in each of its directories for as long as it lives, and a directory has its name only
//! once it is locked; so one that can be locked is nobody's.

use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Locked while the directory is in use.
const LOCK: &str = ".lock";
/// What a writer that is about to end may still put into a directory that is being removed.
const REMOVE_TRIES: u32 = 50;

/// A directory of this process, removed when this is dropped.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    _lock: File,
}

impl Scratch {
    /// Makes a directory below `base` that only its owner may enter, and removes those with the same prefix whose processes
    /// have ended.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create_in(base: &Path, prefix: &str) -> io::Result<Self> {
        clear(base, prefix);
        let private = fs::Permissions::from_mode(0o700);
        let making =
            tempfile::Builder::new().prefix(&format!(".new-{prefix}")).permissions(private).tempdir_in(base)?;
        // Without file descriptors only an empty directory can still be removed.
        let lock = File::create_new(making.path().join(LOCK)).inspect_err(|_| drop(fs::remove_dir(making.path())))?;
        // A file system without locks has no other process's either: then only a kill leaves something behind.
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let path = base.join(format!("{prefix}{}", ulid::Ulid::new()));
        fs::rename(making.path(), &path)?;
        let _ = making.keep();
        Ok(Self { path, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a temporary directory could not be removed");
        }
    }
}

/// Removes what dead processes left. What cannot be looked at is left to the next run.
fn clear(base: &Path, prefix: &str) {
    let own = rustix::process::geteuid().as_raw();
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_ours = entry.file_name().as_encoded_bytes().starts_with(prefix.as_bytes())
            && entry.metadata().is_ok_and(|kind| kind.is_dir() && kind.uid() == own);
        if !is_ours {
            continue;
        }
        let Ok(lock) = File::open(path.join(LOCK)) else { continue };
        if lock.try_lock().is_ok() {
            match remove(&path) {
                Ok(()) => tracing::info!(path = %path.display(), "removed what a run that was killed left"),
                Err(error) => tracing::debug!(path = %path.display(), %error, "a temporary directory stays"),
            }
        }
    }
}

/// Removes a directory with all it holds, though threads that are ending may still write into it.
///
/// # Errors
/// When it cannot be removed.
pub fn remove(path: &Path) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match fs::remove_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && tries < REMOVE_TRIES => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_directories_of_ended_processes_are_cleared() {
        let base = tempfile::tempdir().expect("a directory");
        let alive = Scratch::create_in(base.path(), "kind-").expect("a directory");
        fs::write(alive.path().join("data"), "in use").expect("write");
        // A kill leaves a directory whose lock nobody holds.
        let dead = base.path().join("kind-dead");
        fs::create_dir_all(dead.join("data")).expect("create");
        fs::write(dead.join(LOCK), "").expect("write");
        // Not one of these: another kind, one without a lock, and a file.
        fs::create_dir(base.path().join("other")).expect("create");
        fs::create_dir(base.path().join("kind-of-mine")).expect("create");
        fs::write(base.path().join("kind-file"), "").expect("write");
        let next = Scratch::create_in(base.path(), "kind-").expect("a directory");
        assert!(!dead.exists());
        assert!(alive.path().join("data").exists() && base.path().join("other").exists());
        assert!(base.path().join("kind-of-mine").exists() && base.path().join("kind-file").exists());
        assert_eq!(fs::metadata(next.path()).expect("its mode").permissions().mode() & 0o777, 0o700);
        let paths = [alive.path().to_owned(), next.path().to_owned()];
        drop((alive, next));
        assert!(paths.iter().all(|path| !path.exists()));
    }
}
