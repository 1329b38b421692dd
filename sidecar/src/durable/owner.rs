//! Whose files are, and what others may do with them: what is made in the place of something, or beside it, belongs to the
//! same owner, whoever runs this program.

use std::fs::{self, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, lchown};
use std::path::Path;

use crate::durable::{FileError, OnPath, is_unsupported, parent};

/// Owner, group and mode of a directory, for another one and for all that is in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
    /// Of directories; files have the same without the right to execute.
    pub mode: u32,
}

/// Whether all could be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Given {
    All,
    /// This process may not give files to that owner, or the file system has no owners.
    Refused,
}

impl Owner {
    /// # Errors
    /// When it cannot be inspected.
    pub fn of(path: &Path) -> Result<Self, FileError> {
        Ok(Self::from(&fs::metadata(path).on("inspect", path)?))
    }

    /// The owner that a directory made at `path` is to have: that of the nearest directory above which exists, for a process
    /// that may give files away. A mode that lets others write there does not let them write here.
    ///
    /// # Errors
    /// When it cannot be inspected.
    pub fn for_new(path: &Path) -> Result<Self, FileError> {
        let mut above = parent(path);
        loop {
            match fs::metadata(&above) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && above.parent().is_some() => {
                    above = parent(&above);
                }
                found => {
                    let found = Self::from(&found.on("inspect", &above)?);
                    let mode = found.mode & 0o755 | 0o700;
                    // Without privileges it can only be our own.
                    let (own, group) = (rustix::process::geteuid(), rustix::process::getegid());
                    return Ok(match own.is_root() {
                        true => Self { mode, ..found },
                        false => Self { uid: own.as_raw(), gid: group.as_raw(), mode },
                    });
                }
            }
        }
    }

    /// Gives `root` and everything below it to this owner.
    ///
    /// # Errors
    /// When something of it cannot be listed or inspected.
    pub fn give_tree(&self, root: &Path) -> Result<Given, FileError> {
        self.walk(root, &|path, kind| self.give(path, kind))
    }

    /// As [`Self::give_tree`], for what belongs to this process, and leaves modes as they are.
    ///
    /// # Errors
    /// As [`Self::give_tree`].
    pub fn give_ours(&self, root: &Path) -> Result<Given, FileError> {
        let own = rustix::process::geteuid().as_raw();
        self.walk(root, &|path, kind| if kind.uid() == own { self.chown(path, kind) } else { Ok(()) })
    }

    /// Gives one file to this owner, with this mode.
    ///
    /// # Errors
    /// When it cannot be inspected.
    pub fn give_file(&self, path: &Path) -> Result<Given, FileError> {
        let kind = fs::symlink_metadata(path).on("inspect", path)?;
        given(self.give(path, &kind)).on("protect", path)
    }

    fn walk(&self, path: &Path, give: &dyn Fn(&Path, &Metadata) -> io::Result<()>) -> Result<Given, FileError> {
        let kind = fs::symlink_metadata(path).on("inspect", path)?;
        let mut all = Given::All;
        if kind.is_dir() {
            for entry in fs::read_dir(path).on("list", path)? {
                all = all.and(self.walk(&entry.on("list", path)?.path(), give)?);
            }
        }
        // Last, since it may take the right to enter.
        Ok(all.and(given(give(path, &kind)).on("protect", path)?))
    }

    fn give(&self, path: &Path, kind: &Metadata) -> io::Result<()> {
        let owned = self.chown(path, kind);
        let mode = if kind.is_dir() { self.mode } else { self.mode & 0o666 };
        // A file of several names keeps its mode: it is a part of something else, too.
        let is_shared = kind.is_file() && kind.nlink() > 1;
        if !kind.is_symlink() && !is_shared && kind.mode() & 0o7777 != mode {
            fs::set_permissions(path, Permissions::from_mode(mode))?;
        }
        owned
    }

    fn chown(&self, path: &Path, kind: &Metadata) -> io::Result<()> {
        if (kind.uid(), kind.gid()) == (self.uid, self.gid) {
            return Ok(());
        }
        lchown(path, Some(self.uid), Some(self.gid)).inspect_err(|_| {
            // Without privileges, a group that we are in can be given.
            let _ = lchown(path, None, Some(self.gid));
        })
    }
}

impl From<&Metadata> for Owner {
    fn from(kind: &Metadata) -> Self {
        Self { uid: kind.uid(), gid: kind.gid(), mode: kind.mode() & 0o7777 }
    }
}

impl Given {
    pub fn and(self, other: Self) -> Self {
        if self == Self::All { other } else { self }
    }
}

fn given(result: io::Result<()>) -> io::Result<Given> {
    match result {
        Ok(()) => Ok(Given::All),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied || is_unsupported(&error) => Ok(Given::Refused),
        // Gone while we walked: nothing to give.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Given::All),
        Err(error) => Err(error),
    }
}

/// Makes `path` and what is missing above it, each with `mode` at the most, for the owner of what is there already. Each is
/// durable.
///
/// # Errors
/// When one cannot be made.
pub fn make_dirs(path: &Path, mode: u32) -> Result<(), FileError> {
    if path.is_dir() {
        return Ok(());
    }
    let above = parent(path);
    if above != path {
        make_dirs(&above, mode)?;
    }
    match fs::DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => return Ok(()),
        made => made.on("create", path)?,
    }
    let (made, above_it) = (Owner::of(path)?, Owner::of(&above)?);
    // Only root can, and only for root it makes a difference.
    let _ = Owner { uid: above_it.uid, ..made }.give_file(path)?;
    crate::durable::sync_dir(&above)
}

/// Makes a directory that only its owner may enter, and what is missing above it.
///
/// # Errors
/// When one cannot be made.
pub fn make_private_dir(path: &Path) -> Result<(), FileError> {
    make_dirs(&parent(path), 0o755)?;
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        made => made.on("create", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_root() -> bool {
        rustix::process::geteuid().is_root()
    }

    #[test]
    fn a_tree_gets_owner_group_and_mode() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("below/deep")).unwrap();
        fs::write(root.join("below/file"), b"x").unwrap();
        let own = Owner::of(&root).unwrap();
        let (uid, gid) = if is_root() { (4711, 4712) } else { (own.uid, own.gid) };
        let owner = Owner { uid, gid, mode: 0o2750 };
        assert_eq!(owner.give_tree(&root).unwrap(), Given::All);
        for (name, mode) in [("", 0o2750), ("below", 0o2750), ("below/deep", 0o2750), ("below/file", 0o640)] {
            assert_eq!(Owner::of(&root.join(name)).unwrap(), Owner { mode, ..owner }, "{name}");
        }
    }

    #[test]
    fn new_directories_belong_to_whom_the_parent_does() {
        let dir = tempfile::tempdir().unwrap();
        let above = dir.path().join("above");
        fs::create_dir(&above).unwrap();
        if is_root() {
            lchown(&above, Some(4711), Some(4712)).unwrap();
        }
        fs::set_permissions(&above, Permissions::from_mode(0o1777)).unwrap();
        let found = Owner::of(&above).unwrap();
        assert_eq!(Owner::for_new(&above.join("a/b")).unwrap(), Owner { mode: 0o755, ..found });
        make_dirs(&above.join("a/b"), 0o700).unwrap();
        for name in ["a", "a/b"] {
            let made = Owner::of(&above.join(name)).unwrap();
            assert_eq!((made.uid, made.mode), (found.uid, 0o700), "{name}");
        }
    }

    #[test]
    fn a_file_of_several_names_keeps_its_mode() {
        let dir = tempfile::tempdir().unwrap();
        let (elsewhere, here) = (dir.path().join("elsewhere"), dir.path().join("here"));
        fs::write(&elsewhere, b"x").unwrap();
        fs::set_permissions(&elsewhere, Permissions::from_mode(0o640)).unwrap();
        fs::hard_link(&elsewhere, &here).unwrap();
        let owner = Owner { mode: 0o700, ..Owner::of(dir.path()).unwrap() };
        assert_eq!(owner.give_file(&here).unwrap(), Given::All);
        assert_eq!(Owner::of(&elsewhere).unwrap().mode, 0o640);
    }
}
