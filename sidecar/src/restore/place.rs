//! Where a restore goes: looked at before anything is read, since what cannot be replaced at the end is not worth restoring.
//!
//! Invariants: a link is followed, and what it leads to is what gets replaced; what cannot be renamed is refused.

use std::fs;
use std::path::{Path, PathBuf};

use crate::datadir::lock::{self, ServerLock};
use crate::durable::owner::Owner;
use crate::durable::{self, FileError, OnPath};
use crate::restore::RestoreError;
use crate::restore::plan::{DatabasePlan, RestorePlan};

/// What a restore takes on disk beyond the decompressed log, at the least: indexes, directories, the instance.
const HEADROOM: u64 = 16 << 20;

/// The directory that a restore replaces or makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// With links followed.
    pub target: PathBuf,
    /// Whether the path that was given is a link to it.
    pub is_link: bool,
}

/// What is at the target before a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Before {
    Nothing,
    EmptyDir,
    Something,
}

impl Place {
    /// Finds what `data_dir` leads to.
    ///
    /// # Errors
    /// [`RestoreError::MountPoint`] where a directory cannot be put in its place.
    pub fn find(data_dir: &Path) -> Result<Self, RestoreError> {
        // Without a slash at the end, which would follow a link.
        let plain: PathBuf = data_dir.components().collect();
        let is_link = plain.is_symlink();
        let target = if is_link || plain.file_name().is_none() { durable::canonical(&plain) } else { plain };
        if is_mount_point(&target)? {
            return Err(RestoreError::MountPoint(target));
        }
        Ok(Self { target, is_link })
    }

    /// What a link leads to, where one was given.
    pub fn link_target(&self) -> Option<PathBuf> {
        self.is_link.then(|| self.target.clone())
    }

    /// Whose what is restored is to be: of what it replaces, or else of what it is made in.
    pub(super) fn owner(&self) -> Result<Owner, FileError> {
        if !self.target.is_dir() {
            return Owner::for_new(&self.target);
        }
        let found = Owner::of(&self.target)?;
        Ok(Owner { mode: found.mode | 0o700, ..found })
    }

    /// Looks at what is there, and whether it may be replaced.
    pub(super) fn inspect(&self, force: bool) -> Result<Before, RestoreError> {
        let path = &self.target;
        if let ServerLock::Held { pid } = lock::probe_file(&path.join("spacetime.pid"))? {
            return Err(RestoreError::ServerRunning { path: path.clone(), pid });
        }
        let before = match fs::symlink_metadata(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Before::Nothing,
            Err(error) => return Err(error).on("inspect", path).map_err(Into::into),
            Ok(kind) if kind.is_dir() && is_free(path)? => Before::EmptyDir,
            Ok(_) => Before::Something,
        };
        if before == Before::Something && !force {
            return Err(RestoreError::WouldOverwrite(path.clone()));
        }
        Ok(before)
    }
}

/// Missing, or an empty directory.
pub(super) fn is_free(path: &Path) -> Result<bool, FileError> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => Ok(false),
        Err(error) => Err(error).on("list", path),
    }
}

/// Returns true for the root of a file system, of a subvolume, or of a directory that is mounted at a second place: nothing
/// of another file system can take its name.
pub(crate) fn is_mount_point(path: &Path) -> Result<bool, FileError> {
    use std::os::unix::fs::MetadataExt;
    let here = match fs::metadata(path) {
        Ok(here) => here,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error).on("inspect", path),
    };
    let path = durable::canonical(path);
    let Some(parent) = path.parent() else { return Ok(true) };
    let above = fs::metadata(parent).on("inspect", parent)?;
    Ok(here.dev() != above.dev() || is_mount_root(&path))
}

/// A directory that is mounted at a second place has the device of its parent; the kernel knows, since 5.8.
#[cfg(target_os = "linux")]
fn is_mount_root(path: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
    let found = statx(CWD, path, AtFlags::empty(), StatxFlags::empty());
    found.is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

#[cfg(not(target_os = "linux"))]
fn is_mount_root(_: &Path) -> bool {
    false
}

pub(super) fn check_space(parent: &Path, plan: &RestorePlan, force: bool) -> Result<(), RestoreError> {
    let stat = rustix::fs::statvfs(parent).map_err(std::io::Error::from).on("inspect", parent)?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    // The log's own size is known only from its objects' headers; stored bytes are a lower bound that needs no request.
    let needed =
        HEADROOM + plan.bytes_to_read.max(plan.databases.iter().filter_map(DatabasePlan::snapshot_bytes).sum());
    if free < needed && !force {
        return Err(RestoreError::NoSpace { path: parent.to_owned(), free, needed });
    }
    Ok(())
}

impl DatabasePlan {
    fn snapshot_bytes(&self) -> Option<u64> {
        self.snapshot.as_ref().map(|snapshot| snapshot.raw_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_leads_to_what_gets_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let base = fs::canonicalize(dir.path()).unwrap();
        let (real, link) = (base.join("real"), base.join("link"));
        std::os::unix::fs::symlink("real", &link).unwrap();
        for _ in 0..2 {
            for name in ["link", "link/"] {
                let place = Place::find(&base.join(name)).unwrap();
                assert_eq!(place, Place { target: real.clone(), is_link: true }, "{name}");
            }
            assert_eq!(Place::find(&base.join("real/")).unwrap(), Place { target: real.clone(), is_link: false });
            fs::create_dir_all(&real).unwrap();
        }
        assert_eq!(Place::find(&real.join("..")).unwrap().target, base);
    }

    #[test]
    fn mount_points_are_refused_and_directories_are_not() {
        for mounted in ["/", "/proc", "/proc/."] {
            let refusal = Place::find(Path::new(mounted)).unwrap_err();
            assert!(matches!(refusal, RestoreError::MountPoint(_)), "{mounted}: {refusal}");
        }
        let dir = tempfile::tempdir().unwrap();
        assert!(!is_mount_point(dir.path()).unwrap());
        assert!(!is_mount_point(&dir.path().join("missing/deep")).unwrap());
    }
}
