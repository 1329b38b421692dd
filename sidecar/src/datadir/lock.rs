//! Is a server running on this data directory? It holds `spacetime.pid` under an exclusive advisory lock while it does.

use std::fs::{File, TryLockError};
use std::path::Path;

use crate::datadir::DataDir;
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

#[cfg(test)]
mod tests {
    use super::*;

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
