//! Is a server running on this data directory? It holds `spacetime.pid` under an exclusive advisory lock while it does.
//!
//! What replaces a data directory, or a part of it, holds that lock itself: a server that starts then is refused.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use crate::datadir::DataDir;
use crate::durable::owner::Owner;
use crate::durable::{FileError, OnPath};

/// What the lock file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerLock {
    /// No server; a file left behind by a crash does not count.
    Free,
    /// A server holds it; its process id if the file tells.
    Held { pid: Option<u32> },
}

/// Probes the lock of `dir`. The probe takes a shared lock for a moment, so it is for restores, where no server may
/// start meanwhile, and not for watching a live server.
///
/// # Errors
/// When the file is there and cannot be opened or probed.
pub fn probe(dir: &DataDir) -> Result<ServerLock, FileError> {
    probe_file(&dir.pid_path())
}

/// As [`probe`], for a directory that need not be a whole data directory.
///
/// # Errors
/// When the file is there and cannot be opened or probed.
pub fn probe_file(path: &Path) -> Result<ServerLock, FileError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(ServerLock::Free),
        Err(error) => return Err(error).on("open", path),
    };
    match file.try_lock_shared() {
        Ok(()) => Ok(ServerLock::Free),
        Err(TryLockError::WouldBlock) => {
            let pid = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok());
            Ok(ServerLock::Held { pid })
        }
        Err(TryLockError::Error(error)) => Err(error).on("probe the lock of", path),
    }
}

/// A data directory on which no server starts while this lives.
#[derive(Debug)]
pub struct Hold {
    _file: File,
    /// A lock file that was made for this, and is removed with it.
    made: Option<PathBuf>,
}

/// Locks `dir` as a server does, for what changes files that a server would use: never a directory that is only watched.
/// `None` where a server runs.
///
/// # Errors
/// When the lock file cannot be made, opened or locked.
pub fn hold(dir: &Path) -> Result<Option<Hold>, FileError> {
    let path = dir.join("spacetime.pid");
    let created = File::create_new(&path);
    let is_new = created.is_ok();
    let file = match created {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            File::options().write(true).open(&path).or_else(|_| File::open(&path))
        }
        created => created,
    };
    let file = file.on("open", &path)?;
    if is_new {
        // The server must be able to open it too.
        let _ = Owner::of(dir)?.give_file(&path)?;
    }
    match file.try_lock() {
        Ok(()) => Ok(Some(Hold { _file: file, made: is_new.then_some(path) })),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error).on("lock", &path),
    }
}

impl Hold {
    /// The lock file stays, for the servers that will use the directory.
    pub fn leave(&mut self) {
        self.made = None;
    }

    /// The directory has another name by now.
    pub fn moved(&mut self, dir: &Path) {
        self.made = self.made.take().map(|_| dir.join("spacetime.pid"));
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            let _ = std::fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_directory_refuses_servers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spacetime.pid");
        let held = hold(dir.path()).unwrap().unwrap();
        assert!(matches!(probe_file(&path).unwrap(), ServerLock::Held { .. }));
        assert!(hold(dir.path()).unwrap().is_none());
        drop(held);
        assert!(!path.exists(), "nothing is left where nothing was");
        std::fs::write(&path, "4711").unwrap();
        drop(hold(dir.path()).unwrap().unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "4711");
        let mut held = hold(dir.path()).unwrap().unwrap();
        held.leave();
        drop(held);
        assert_eq!(probe_file(&path).unwrap(), ServerLock::Free);
    }

    #[test]
    fn a_lock_is_seen_while_it_is_held_and_not_after() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("spacetime.pid");
        assert_eq!(probe_file(&path).unwrap(), ServerLock::Free);
        std::fs::write(&path, "4711").unwrap();
        assert_eq!(probe_file(&path).unwrap(), ServerLock::Free);
        let holder = File::open(&path).unwrap();
        holder.lock().unwrap();
        assert_eq!(probe_file(&path).unwrap(), ServerLock::Held { pid: Some(4711) });
        drop(holder);
        assert_eq!(probe_file(&path).unwrap(), ServerLock::Free);
    }
}
