//! A repository in a directory of this machine: whose its files are, and who else may read them.
//!
//! Invariants: whatever the umask, what is written is for the owner of the repository's directory alone, or, where that is
//! set up to be shared (setgid, and writable for its group), for that group too; it belongs to that owner whoever writes it.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use object_store::ObjectStore;
use object_store::local::LocalFileSystem;
use object_store::path::Path as Key;
use object_store::prefix::PrefixStore;

use crate::durable::owner::{Owner, make_dirs};
use crate::durable::{self, FileError, OnPath};

/// Mode bits of a directory that is meant to be shared by its group.
const SHARED: u32 = 0o2020;

/// The directory of a repository.
#[derive(Debug, Clone)]
pub(super) struct Directory {
    root: PathBuf,
    /// Of what is written below it.
    owner: Owner,
    /// The directory itself, where it is reached by its descriptor.
    open: Option<Arc<File>>,
}

impl Directory {
    /// Makes `root` if it is missing. What it lies in must be there: a mount point, or a misspelt directory, must not be made.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(super) fn make(root: &Path) -> Result<(), FileError> {
        if let Some(parent) = root.parent() {
            std::fs::metadata(parent).on("make a repository in", parent)?;
        }
        make_dirs(root, 0o700)
    }

    /// # Errors
    /// When it cannot be inspected.
    pub(super) fn open(root: &Path) -> Result<Self, FileError> {
        let found = Owner::of(root)?;
        let mode = if found.mode & SHARED == SHARED { 0o2770 } else { 0o700 };
        // The store's client panics at a path that is not UTF-8. Its descriptor has a name that is.
        let is_text = durable::canonical(root).to_str().is_some();
        let open = if is_text { None } else { Some(Arc::new(File::open(root).on("open", root)?)) };
        Ok(Self { root: root.to_owned(), owner: Owner { mode, ..found }, open })
    }

    /// The store of the objects in it.
    ///
    /// # Errors
    /// When the directory cannot be used as one.
    pub(super) fn objects(&self) -> object_store::Result<Arc<dyn ObjectStore>> {
        let Some(open) = &self.open else {
            return Ok(Arc::new(LocalFileSystem::new_with_prefix(&self.root)?.with_fsync(true)));
        };
        let prefix = Key::from(format!("proc/self/fd/{}", open.as_raw_fd()));
        Ok(Arc::new(PrefixStore::new(LocalFileSystem::new().with_fsync(true), prefix)))
    }

    /// Warns where what this process writes would not belong to the directory's owner, who then could not use it.
    pub(super) fn warn_of_other_owner(&self) {
        let own = rustix::process::geteuid();
        if !own.is_root() && own.as_raw() != self.owner.uid && self.owner.mode != 0o2770 {
            tracing::warn!(
                directory = %self.root.display(),
                owner = self.owner.uid,
                "the repository belongs to another user, who will not be able to read what is written now"
            );
        }
    }

    pub(super) fn root(&self) -> &PathBuf {
        &self.root
    }

    /// Makes the directory that an object is to be in.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(super) fn prepare(&self, key: &Key) -> Result<(), FileError> {
        let path = self.path(key);
        let mut missing: Vec<_> = path.ancestors().skip(1).take_while(|dir| !dir.is_dir()).collect();
        while let Some(dir) = missing.pop() {
            make_dirs(dir, 0o700)?;
            let _ = self.owner.give_file(dir)?;
        }
        Ok(())
    }

    /// Gives an object that was written to its owner. A file system without owners or modes has none to keep.
    pub(super) fn protect(&self, key: &Key) {
        self.protect_file(&self.path(key));
    }

    /// As [`Self::protect`], for a file beside the objects.
    pub(super) fn protect_file(&self, path: &Path) {
        if let Err(error) = self.owner.give_file(path) {
            tracing::warn!(%error, "failed to protect a file of the repository");
        }
    }

    fn path(&self, key: &Key) -> PathBuf {
        key.parts().fold(self.root.clone(), |path, part| path.join(part.as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};

    use bytes::Bytes;

    use super::*;
    use crate::clock::SystemClock;
    use crate::config::RepositoryConfig;
    use crate::repository::Repository;
    use crate::repository::address::Address;
    use crate::repository::crypto::Keyring;
    use crate::repository::lease::Lease;

    /// Mode and owner of everything below a directory, and of itself.
    fn found(dir: &Path) -> Vec<(u32, u32)> {
        let kind = fs::metadata(dir).unwrap();
        let own = (kind.mode() & 0o7777, kind.uid());
        let below = if kind.is_dir() { fs::read_dir(dir).unwrap().collect() } else { Vec::new() };
        below.into_iter().flat_map(|entry| found(&entry.unwrap().path())).chain([own]).collect()
    }

    async fn fill(root: &Path) {
        let url = Address::directory(root).unwrap();
        let (config, clock) = (RepositoryConfig::default(), std::sync::Arc::new(SystemClock));
        let repository =
            Repository::open_or_create(url.url(), &config, Keyring::default(), clock.as_ref()).await.unwrap();
        repository.put(&Key::from("instance/capture"), Bytes::from_static(b"keys")).await.unwrap();
        let mut large = repository.put_large(&Key::from("databases/a/log/b"), Bytes::from_static(b"x")).await.unwrap();
        large.finish().await.unwrap();
        let lease = Lease::acquire(&repository, std::time::Duration::from_secs(30), clock, false).await.unwrap();
        lease.release().await;
    }

    #[tokio::test]
    async fn everything_is_for_the_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("repository #1");
        fill(&root).await;
        for (mode, _) in found(&root) {
            assert!(matches!(mode, 0o700 | 0o600), "{mode:o}");
        }
    }

    #[tokio::test]
    async fn a_name_that_is_not_text_holds_a_repository() {
        use std::os::unix::ffi::OsStrExt;
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join(std::ffi::OsStr::from_bytes(b"not UTF-8 \xff"));
        fill(&root).await;
        assert!(root.join("databases/a/log/b").is_file());
        let url = Address::directory(&root).unwrap();
        let config = RepositoryConfig::default();
        let repository = Repository::open(url.url(), &config, Keyring::default()).await.unwrap();
        let listed = repository.list(&Key::from("databases")).await.unwrap();
        assert_eq!(listed, [(Key::from("databases/a/log/b"), 1)]);
        assert_eq!(repository.get(&Key::from("instance/capture")).await.unwrap(), "keys");
        assert_eq!(repository.folders(&Key::default()).await.unwrap(), ["databases", "instance"]);
        repository.delete(&Key::from("instance/capture")).await.unwrap();
        assert!(!root.join("instance/capture").exists());
    }

    #[tokio::test]
    async fn a_shared_directory_stays_shared() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o2770)).unwrap();
        fill(dir.path()).await;
        for (mode, _) in found(dir.path()) {
            assert!(matches!(mode, 0o2770 | 0o660), "{mode:o}");
        }
    }

    #[tokio::test]
    async fn what_root_writes_belongs_to_the_directory_owner() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        lchown(dir.path(), Some(4711), Some(4711)).unwrap();
        fill(&dir.path().join("repository")).await;
        for (_, uid) in found(&dir.path().join("repository")) {
            assert_eq!(uid, 4711);
        }
    }
}
