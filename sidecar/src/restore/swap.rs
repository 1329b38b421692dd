//! The end of a restore: what was built takes its place, or everything stays as it was.
//!
//! Invariants: no server starts on the old or the new directory meanwhile; what was there keeps its name until the new one
//! has it, and is moved aside whole.

use std::fs;
use std::path::{Path, PathBuf};

use crate::datadir::lock::{self, ServerLock};
use crate::durable::owner::{Given, Owner};
use crate::durable::renames::Renames;
use crate::durable::{FileError, OnPath, beside};
use crate::restore::RestoreError;
use crate::restore::place::{Before, Place, is_free, is_mount_point};

/// The directory under construction; removed with all it holds unless the restore succeeds.
pub(super) struct Staging {
    pub data: PathBuf,
    pub keys: PathBuf,
    keep: bool,
}

/// Where token keys go.
pub(super) struct KeyPlace {
    pub dir: PathBuf,
    /// Move other keys that are there aside.
    pub force: bool,
}

/// What was moved aside.
#[derive(Default)]
pub(super) struct Aside {
    pub data: Option<PathBuf>,
    pub keys: Option<PathBuf>,
}

impl Staging {
    /// Both beside where they go, since a rename stays within one file system. Nobody else may enter before they are whole.
    pub(super) fn create(target: &Path, key_dir: &Path) -> Result<Self, FileError> {
        use std::os::unix::fs::DirBuilderExt;
        let id = ulid::Ulid::new();
        let staging = Self {
            data: beside(target, &format!(".restoring-{id}")),
            keys: beside(key_dir, &format!(".restoring-{id}")),
            keep: false,
        };
        fs::DirBuilder::new().mode(0o700).create(&staging.data).on("create", &staging.data)?;
        Ok(staging)
    }

    pub(super) fn done(mut self) {
        self.keep = true;
    }
}

/// Gives what was built to its owner; the keys are for that owner alone.
pub(super) fn give(data: &Path, keys: Option<&Path>, owner: Owner) -> Result<(), FileError> {
    let mut given = owner.give_tree(data)?;
    if let Some(keys) = keys {
        given = given.and(Owner { mode: 0o700, ..owner }.give_tree(keys)?);
    }
    if given == Given::Refused {
        let Owner { uid, gid, .. } = owner;
        tracing::warn!(
            uid,
            gid,
            "what is restored cannot be given to the owner of what it replaces: run as root, or `chown -R` it before the \
             server starts"
        );
    }
    Ok(())
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        for path in [&self.data, &self.keys] {
            if path.exists()
                && let Err(error) = crate::scratch::remove(path)
            {
                tracing::warn!(path = %path.display(), %error, "what was restored so far could not be removed");
            }
        }
    }
}

impl KeyPlace {
    /// Refuses what cannot be done with these keys, or with any if `keys` is `None`.
    pub(super) fn check(&self, keys: Option<&Path>) -> Result<(), RestoreError> {
        let is_free = is_free(&self.dir)?;
        if let Some(keys) = keys
            && holds_same(keys, &self.dir)?
        {
            return Ok(());
        }
        if !is_free && !self.force {
            return Err(RestoreError::WouldOverwrite(self.dir.clone()));
        }
        if is_mount_point(&self.dir)? {
            return Err(RestoreError::MountPoint(self.dir.clone()));
        }
        Ok(())
    }

    /// Puts the keys where they go. Returns where others are that were there.
    fn put(&self, keys: &Path, renames: &mut Renames, stamp: &str) -> Result<Option<PathBuf>, RestoreError> {
        self.check(Some(keys))?;
        if holds_same(keys, &self.dir)? {
            // The very keys that are there already stay as they are.
            fs::remove_dir_all(keys).on("remove", keys)?;
            return Ok(None);
        }
        if self.dir.symlink_metadata().is_err() {
            renames.rename(keys, &self.dir)?;
            return Ok(None);
        }
        let aside = beside(&self.dir, &format!(".before-restore-{stamp}"));
        renames.replace(keys, &self.dir, &aside)?;
        Ok(Some(aside))
    }
}

/// Puts what was built in its place. Everything is as it was when something of it fails.
pub(super) fn swap(
    staging: &Staging,
    place: &Place,
    before: Before,
    keys: Option<&KeyPlace>,
    stamp: &str,
) -> Result<Aside, RestoreError> {
    let target = &place.target;
    // Dropped after the renames were undone, if they are: no server starts before.
    let mut old = if before != Before::Nothing && target.is_dir() { hold_old(target)? } else { None };
    let mut new = hold(&staging.data)?;
    let mut renames = Renames::default();
    let mut aside = Aside::default();
    if let Some(keys) = keys {
        aside.keys = keys.put(&staging.keys, &mut renames, stamp)?;
    }
    if before == Before::Nothing {
        renames.rename(&staging.data, target)?;
    } else {
        let to = beside(target, &format!(".before-restore-{stamp}"));
        renames.replace(&staging.data, target, &to)?;
        if let Some(old) = &mut old {
            old.moved(&to);
        }
        aside.data = Some(to);
    }
    renames.keep();
    new.leave();
    drop(old);
    aside.data = aside.data.filter(|dir| !was_empty(dir));
    aside.keys = aside.keys.filter(|dir| !was_empty(dir));
    Ok(aside)
}

/// An empty directory that was replaced is not worth keeping.
fn was_empty(dir: &Path) -> bool {
    fs::remove_dir(dir).is_ok()
}

/// Without the right to write there, no lock can be made where none is; the directory can be renamed all the same.
fn hold_old(dir: &Path) -> Result<Option<lock::Hold>, RestoreError> {
    match hold(dir) {
        Err(RestoreError::File(error)) if error.source.kind() == std::io::ErrorKind::PermissionDenied => {
            tracing::warn!(%error, "the directory that is replaced cannot be locked: start no server now");
            Ok(None)
        }
        held => held.map(Some),
    }
}

fn hold(dir: &Path) -> Result<lock::Hold, RestoreError> {
    if let Some(held) = lock::hold(dir)? {
        return Ok(held);
    }
    let pid = match lock::probe_file(&dir.join("spacetime.pid"))? {
        ServerLock::Held { pid } => pid,
        ServerLock::Free => None,
    };
    Err(RestoreError::ServerRunning { path: dir.to_owned(), pid })
}

/// Whether every file of `ours` is in `theirs` with the same content.
fn holds_same(ours: &Path, theirs: &Path) -> Result<bool, FileError> {
    for entry in fs::read_dir(ours).on("list", ours)? {
        let path = entry.on("list", ours)?.path();
        let there = theirs.join(path.file_name().unwrap_or_default());
        let there = match fs::read(&there) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => return Ok(false),
            read => read.on("read", &there)?,
        };
        if fs::read(&path).on("read", &path)? != there {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;
    use crate::datadir::lock::probe_file;

    struct Scene {
        _dir: tempfile::TempDir,
        place: Place,
        staging: Staging,
        keys: KeyPlace,
    }

    impl Scene {
        /// A target that holds `old` and a staging directory that holds `new`.
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("data");
            fs::create_dir(&target).unwrap();
            fs::write(target.join("old"), b"").unwrap();
            let place = Place::find(&target).unwrap();
            let keys = KeyPlace { dir: dir.path().join("data.keys"), force: true };
            let staging = Staging::create(&target, &keys.dir).unwrap();
            fs::write(staging.data.join("new"), b"").unwrap();
            Self { _dir: dir, place, staging, keys }
        }

        fn swap(&self, before: Before, keys: Option<&KeyPlace>) -> Result<Aside, RestoreError> {
            swap(&self.staging, &self.place, before, keys, "T")
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_was_there_is_moved_aside_unchanged() {
        let scene = Scene::new();
        let aside = scene.swap(Before::Something, None).unwrap();
        assert_eq!(names(&scene.place.target), ["new", "spacetime.pid"]);
        assert_eq!(names(&aside.data.unwrap()), ["old"]);
        assert_eq!(probe_file(&scene.place.target.join("spacetime.pid")).unwrap(), ServerLock::Free);
    }

    #[test]
    fn an_empty_directory_is_not_kept() {
        let scene = Scene::new();
        fs::remove_file(scene.place.target.join("old")).unwrap();
        assert!(scene.swap(Before::EmptyDir, None).unwrap().data.is_none());
        assert_eq!(names(&scene.place.target), ["new", "spacetime.pid"]);
        assert_eq!(names(scene.place.target.parent().unwrap()), ["data"]);
    }

    #[test]
    fn a_server_that_started_meanwhile_is_respected() {
        let scene = Scene::new();
        let server = lock::hold(&scene.place.target).unwrap().unwrap();
        let refused = scene.swap(Before::Something, None);
        assert!(matches!(refused, Err(RestoreError::ServerRunning { .. })));
        drop(server);
        assert_eq!(names(&scene.place.target), ["old"]);
        assert!(scene.staging.data.join("new").exists());
    }

    #[test]
    fn keys_go_back_when_the_data_cannot_be_replaced() {
        let scene = Scene::new();
        for (dir, name) in [(&scene.staging.keys, "captured"), (&scene.keys.dir, "other")] {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join("id_ecdsa"), name).unwrap();
        }
        // The name that the old directory would get is taken.
        fs::create_dir(beside(&scene.place.target, ".before-restore-T")).unwrap();
        assert!(scene.swap(Before::Something, Some(&scene.keys)).is_err());
        assert_eq!(fs::read(scene.keys.dir.join("id_ecdsa")).unwrap(), b"other");
        assert_eq!(fs::read(scene.staging.keys.join("id_ecdsa")).unwrap(), b"captured");
        assert_eq!(names(&scene.place.target), ["old"]);
    }

    #[test]
    fn what_is_built_is_private_until_it_is_given() {
        let scene = Scene::new();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&scene.staging.data), 0o700);
        fs::create_dir(&scene.staging.keys).unwrap();
        fs::write(scene.staging.keys.join("id_ecdsa"), b"").unwrap();
        let mut owner = Owner { mode: 0o755, ..Owner::of(&scene.staging.data).unwrap() };
        if owner.uid == 0 {
            (owner.uid, owner.gid) = (4711, 4712);
        }
        give(&scene.staging.data, Some(&scene.staging.keys), owner).unwrap();
        assert_eq!((mode(&scene.staging.data), mode(&scene.staging.data.join("new"))), (0o755, 0o644));
        assert_eq!((mode(&scene.staging.keys), mode(&scene.staging.keys.join("id_ecdsa"))), (0o700, 0o600));
        let found = fs::metadata(scene.staging.data.join("new")).unwrap();
        assert_eq!((found.uid(), found.gid()), (owner.uid, owner.gid));
        scene.swap(Before::Something, None).unwrap();
        assert_eq!(fs::metadata(scene.place.target.join("spacetime.pid")).unwrap().uid(), owner.uid);
    }
}
