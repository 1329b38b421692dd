//! Renames that belong together: all of them are done, or none.
//!
//! Invariants: a rename is noted before its directory is synced, so that one whose sync fails is undone too; what takes the
//! place of a directory does so in one step where the file system can exchange names: there is always a directory.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::durable::{FileError, OnPath, is_unsupported, parent, sync_dir};

/// Renames that are undone, the last one first, unless they are kept.
pub struct Renames {
    done: Vec<Done>,
    system: System,
}

enum Done {
    Renamed { from: PathBuf, to: PathBuf },
    Exchanged(PathBuf, PathBuf),
}

/// What the operating system is asked for, where tests let it fail.
#[derive(Clone, Copy)]
struct System {
    sync_dir: fn(&Path) -> Result<(), FileError>,
    exchange: fn(&Path, &Path) -> io::Result<()>,
}

impl Default for Renames {
    fn default() -> Self {
        Self { done: Vec::new(), system: System { sync_dir, exchange } }
    }
}

impl Renames {
    /// Renames within one file system and makes it durable. `to` must not exist.
    ///
    /// # Errors
    /// When `to` exists, or the rename or a sync fails.
    pub fn rename(&mut self, from: &Path, to: &Path) -> Result<(), FileError> {
        rename_to_free(from, to)?;
        self.done.push(Done::Renamed { from: from.to_owned(), to: to.to_owned() });
        self.sync(from, to)
    }

    /// `new` takes the place of `target`, which becomes `aside`. Where names cannot be exchanged there is no `target` for a
    /// moment.
    ///
    /// # Errors
    /// When `aside` exists, or a rename or a sync fails.
    pub fn replace(&mut self, new: &Path, target: &Path, aside: &Path) -> Result<(), FileError> {
        // In this order nothing but the exchange touches the target, and a crash leaves what was there under its own name.
        self.rename(new, aside)?;
        match (self.system.exchange)(aside, target) {
            Ok(()) => {
                self.done.push(Done::Exchanged(aside.to_owned(), target.to_owned()));
                self.sync(aside, target)
            }
            Err(error) if is_unsupported(&error) => {
                self.undo_last();
                self.rename(target, aside)?;
                self.rename(new, target)
            }
            Err(error) => Err(error).on("replace", target),
        }
    }

    /// They stay as they are.
    pub fn keep(mut self) {
        self.done.clear();
    }

    fn sync(&self, one: &Path, other: &Path) -> Result<(), FileError> {
        let (one, other) = (parent(one), parent(other));
        (self.system.sync_dir)(&other)?;
        if one == other { Ok(()) } else { (self.system.sync_dir)(&one) }
    }

    fn undo_last(&mut self) {
        let Some(done) = self.done.pop() else { return };
        let (undone, one, other) = match &done {
            Done::Renamed { from, to } => (rename_to_free(to, from), from, to),
            Done::Exchanged(one, other) => ((self.system.exchange)(one, other).on("exchange", one), one, other),
        };
        match undone.and_then(|()| self.sync(one, other)) {
            Ok(()) => {}
            Err(error) => {
                tracing::error!(%error, "failed to undo the rename of {} to {}", one.display(), other.display());
            }
        }
    }
}

impl Drop for Renames {
    fn drop(&mut self) {
        while !self.done.is_empty() {
            self.undo_last();
        }
    }
}

fn rename_to_free(from: &Path, to: &Path) -> Result<(), FileError> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE).map_err(io::Error::from) {
        Err(error) if is_unsupported(&error) => {
            if to.symlink_metadata().is_ok() {
                return Err(io::Error::from(io::ErrorKind::AlreadyExists)).on("rename to", to);
            }
            std::fs::rename(from, to).on("rename", from)
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(error).on("rename to", to),
        renamed => renamed.on("rename", from),
    }
}

fn exchange(one: &Path, other: &Path) -> io::Result<()> {
    Ok(renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE)?)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs;

    use rustix::io::Errno;

    use super::*;

    fn no_exchange(_: &Path, _: &Path) -> io::Result<()> {
        Err(Errno::INVAL.into())
    }

    /// Directories `new` and `target`, each with a file that says which it is.
    struct Scene(tempfile::TempDir);

    impl Scene {
        fn new() -> Self {
            let scene = Self(tempfile::tempdir().unwrap());
            for name in ["new", "target"] {
                fs::create_dir(scene.path(name)).unwrap();
                fs::write(scene.path(name).join("name"), name).unwrap();
            }
            scene
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn holds(&self, name: &str) -> Option<String> {
            fs::read_to_string(self.path(name).join("name")).ok()
        }

        fn replace(&self, renames: &mut Renames) -> Result<(), FileError> {
            renames.replace(&self.path("new"), &self.path("target"), &self.path("aside"))
        }
    }

    #[test]
    fn a_directory_is_replaced_and_kept_aside() {
        for exchange in [exchange, no_exchange] {
            let scene = Scene::new();
            let mut renames = Renames { done: Vec::new(), system: System { sync_dir, exchange } };
            scene.replace(&mut renames).unwrap();
            renames.keep();
            assert_eq!(scene.holds("target").as_deref(), Some("new"));
            assert_eq!(scene.holds("aside").as_deref(), Some("target"));
            assert!(!scene.path("new").exists());
        }
    }

    #[test]
    fn a_failed_sync_moves_everything_back() {
        thread_local!(static SYNCS: Cell<u32> = const { Cell::new(0) });
        fn failing(_: &Path) -> Result<(), FileError> {
            SYNCS.set(SYNCS.get().wrapping_sub(1));
            if SYNCS.get() == 0 { Err(io::Error::from(Errno::IO)).on("sync", Path::new("/")) } else { Ok(()) }
        }
        type Exchange = fn(&Path, &Path) -> io::Result<()>;
        let cases: [(Exchange, &[u32]); 2] = [(exchange, &[1, 2]), (no_exchange, &[1, 3, 4])];
        for (exchange, steps) in cases {
            for failed in steps.iter().copied() {
                let scene = Scene::new();
                SYNCS.set(failed);
                let mut renames = Renames { done: Vec::new(), system: System { sync_dir: failing, exchange } };
                scene.replace(&mut renames).unwrap_err();
                drop(renames);
                assert_eq!(scene.holds("target").as_deref(), Some("target"), "sync {failed}");
                assert_eq!(scene.holds("new").as_deref(), Some("new"), "sync {failed}");
                assert!(!scene.path("aside").exists());
            }
        }
    }

    #[test]
    fn there_is_a_directory_at_every_moment() {
        let scene = Scene::new();
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|threads| {
            let looker = threads.spawn(|| {
                let mut looks = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    assert!(scene.holds("target").is_some());
                    looks += 1;
                }
                looks
            });
            for _ in 0..200 {
                let mut renames = Renames::default();
                scene.replace(&mut renames).unwrap();
                drop(renames);
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(looker.join().unwrap() > 0);
        });
    }

    #[test]
    fn a_rename_never_replaces_what_is_there() {
        let scene = Scene::new();
        let mut renames = Renames::default();
        renames.rename(&scene.path("new"), &scene.path("target")).unwrap_err();
        fs::create_dir(scene.path("aside")).unwrap();
        scene.replace(&mut renames).unwrap_err();
        assert_eq!(scene.holds("target").as_deref(), Some("target"));
        assert_eq!(scene.holds("new").as_deref(), Some("new"));
    }
}
