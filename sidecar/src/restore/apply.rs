//! Applies a plan: builds the new data directory beside the target, checks it, makes it durable, then renames twice.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use crate::backup::DatabaseReport;
use crate::clock::{Clock, Stopwatch};
use crate::datadir::lock::{self, ServerLock};
use crate::durable::{self, FileError, OnPath, beside};
use crate::progress::{Progress, Tally};
use crate::repository::Repository;
use crate::restore::build::{Build, Built, blocking};
use crate::restore::plan::{DatabasePlan, RestorePlan};
use crate::restore::{RestoreError, check};

/// What a restore takes on disk beyond the decompressed log, at the least: indexes, directories, the instance.
const HEADROOM: u64 = 16 << 20;

/// Where and how to restore.
#[derive(Debug, Clone)]
pub struct ApplyOptions {
    pub data_dir: PathBuf,
    /// Where captured token keys go; `None` for `DATA_DIR.keys`.
    pub key_dir: Option<PathBuf>,
    /// Move what is there aside, and start even if space looks short.
    pub force: bool,
    /// The name that the one database gets; its own when left out.
    pub name: Option<String>,
    /// New token keys instead of those that were captured, if any were.
    pub new_keys: bool,
}

impl ApplyOptions {
    /// Into a directory that is not there yet, everything as it was.
    pub fn to(data_dir: PathBuf) -> Self {
        Self { data_dir, key_dir: None, force: false, name: None, new_keys: false }
    }
}

/// What a restore did. Field names are stable.
#[derive(Debug, Clone, Serialize)]
pub struct RestoreReport {
    pub data_dir: PathBuf,
    /// Where the directory that was there is now.
    pub moved_aside: Option<PathBuf>,
    /// Where the token keys are, if the restore point holds any.
    pub keys: Option<PathBuf>,
    /// Where other keys that were there are now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keys_moved_aside: Option<PathBuf>,
    /// The sidecar's own token, signed anew with new keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token: Option<PathBuf>,
    pub databases: Vec<DatabaseReport>,
    pub left_out: Vec<String>,
    /// What is in doubt about the time that was asked for.
    pub warnings: Vec<String>,
    pub bytes_read: u64,
    pub bytes_written: u64,
    pub duration_ms: u64,
}

/// What stands at the target before a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    EmptyDir,
    Something,
}

/// Restores.
///
/// # Errors
/// When the target may not be replaced, the repository fails or is damaged, or the disk is full. Nothing is changed then.
pub async fn apply(
    repository: &Repository,
    plan: &RestorePlan,
    options: &ApplyOptions,
    clock: Arc<dyn Clock>,
    progress: Arc<dyn Progress>,
) -> Result<RestoreReport, RestoreError> {
    let stopwatch = Stopwatch::start();
    let before = inspect_target(options)?;
    let key_dir = options.key_dir.clone().unwrap_or_else(|| beside(&options.data_dir, ".keys"));
    if options.name.is_some() && plan.databases.len() != 1 {
        let names: Vec<_> = plan.databases.iter().map(|database| database.name.as_str()).collect();
        let names = names.join(", ");
        return Err(RestoreError::Usage(format!("a new name is for one database; name it with --database ({names})")));
    }
    if options.new_keys && !options.force && !is_free(&key_dir)? {
        return Err(RestoreError::WouldOverwrite(key_dir));
    }
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    if absolute(&key_dir).starts_with(absolute(&options.data_dir)) {
        return Err(RestoreError::Usage(format!(
            "the token keys would lie in the data directory that is replaced; give a --key-dir outside {}",
            options.data_dir.display()
        )));
    }
    let parent = durable::parent(&options.data_dir);
    fs::create_dir_all(&parent).on("create", &parent)?;
    check_space(&parent, plan, options.force)?;

    let staging = Staging::create(&options.data_dir, &key_dir)?;
    let tally = Arc::new(Tally::default());
    let (data, keys) = (staging.data.as_path(), staging.keys.as_path());
    let build = Build { repository, data, keys, tally: &tally, progress: &progress };
    let Built { mut has_keys, logs } =
        build.run(plan, options.name.as_deref()).await.map_err(RestoreError::with_disk_full)?;
    if options.new_keys {
        if has_keys {
            fs::remove_dir_all(&staging.keys).on("remove", &staging.keys)?;
        }
        make_keys(&staging.keys)?;
        has_keys = true;
    }
    // Early, for what follows takes long; looked at again at the end.
    if has_keys && !options.force && !is_free(&key_dir)? && !holds_same(&staging.keys, &key_dir)? {
        return Err(RestoreError::WouldOverwrite(key_dir));
    }
    progress.phase("self-check", None);
    check::logs(&staging.data, plan, &logs)?;
    progress.phase("making it durable", None);
    {
        // The keys may go to another file system.
        let (data, keys) = (staging.data.clone(), has_keys.then(|| staging.keys.clone()));
        let sync = move || {
            durable::sync_file_system(&data).and_then(|()| keys.map_or(Ok(()), |keys| durable::sync_tree(&keys)))
        };
        blocking(sync).await?.map_err(|error| RestoreError::from(error).with_disk_full())?;
    }

    // A long restore leaves time to start a server where it should go.
    let now = inspect_target(options)?;
    if before == Before::Nothing && now != Before::Nothing {
        return Err(RestoreError::WouldOverwrite(options.data_dir.clone()));
    }
    let before = now;
    // From here on only renames, each durable, and taken back when a later one fails. A crash between them leaves all directories
    // whole under telling names.
    let mut renamed = Renamed::default();
    let stamp = clock.now().strftime("%Y%m%dT%H%M%S%3fZ").to_string();
    let mut keys_moved_aside = None;
    if has_keys && holds_same(&staging.keys, &key_dir)? {
        // The very keys that are there already stay as they are.
        fs::remove_dir_all(&staging.keys).on("remove", &staging.keys)?;
    } else if has_keys {
        if !is_free(&key_dir)? {
            if !options.force {
                return Err(RestoreError::WouldOverwrite(key_dir));
            }
            let aside = beside(&key_dir, &format!(".before-restore-{stamp}"));
            renamed.rename(&key_dir, &aside)?;
            keys_moved_aside = Some(aside);
        } else if key_dir.exists() {
            fs::remove_dir(&key_dir).on("remove the empty", &key_dir)?;
        }
        renamed.rename(&staging.keys, &key_dir)?;
    }
    let moved_aside = match before {
        Before::Nothing => None,
        Before::EmptyDir => {
            fs::remove_dir(&options.data_dir).on("remove the empty", &options.data_dir)?;
            None
        }
        Before::Something => {
            let aside = beside(&options.data_dir, &format!(".before-restore-{stamp}"));
            renamed.rename(&options.data_dir, &aside)?;
            Some(aside)
        }
    };
    renamed.rename(&staging.data, &options.data_dir)?;
    renamed.keep();
    staging.done();
    Ok(RestoreReport {
        data_dir: options.data_dir.clone(),
        moved_aside,
        keys: has_keys.then_some(key_dir),
        keys_moved_aside,
        token: None,
        databases: plan.databases.iter().map(DatabasePlan::report).collect(),
        left_out: plan.left_out.clone(),
        warnings: plan.warnings(),
        bytes_read: tally.bytes_read(),
        bytes_written: tally.bytes_written(),
        duration_ms: stopwatch.elapsed_ms(),
    })
}

impl DatabasePlan {
    pub fn report(&self) -> DatabaseReport {
        DatabaseReport {
            identity: self.identity,
            name: self.name.clone(),
            timeline: self.timeline,
            offset: self.offset,
            time: self.time,
        }
    }
}

#[cfg(feature = "client")]
fn make_keys(dir: &Path) -> Result<(), RestoreError> {
    crate::standalone::keys::make(dir).map_err(RestoreError::SelfCheck)
}

#[cfg(not(feature = "client"))]
fn make_keys(_: &Path) -> Result<(), RestoreError> {
    Err(RestoreError::Usage("this build makes no keys".into()))
}

/// May the target be replaced?
fn inspect_target(options: &ApplyOptions) -> Result<Before, RestoreError> {
    let path = &options.data_dir;
    if let ServerLock::Held { pid } = lock::probe_file(&path.join("spacetime.pid"))? {
        return Err(RestoreError::ServerRunning { path: path.clone(), pid });
    }
    let before = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Before::Nothing,
        Err(error) => return Err(error).on("inspect", path).map_err(Into::into),
        Ok(kind) if kind.is_dir() && is_free(path)? => Before::EmptyDir,
        Ok(_) => Before::Something,
    };
    if before == Before::Something && !options.force {
        return Err(RestoreError::WouldOverwrite(path.clone()));
    }
    Ok(before)
}

/// Renames that belong together: those that were done are taken back when one fails.
#[derive(Default)]
struct Renamed(Vec<(PathBuf, PathBuf)>);

impl Renamed {
    fn rename(&mut self, from: &Path, to: &Path) -> Result<(), FileError> {
        durable::rename(from, to)?;
        self.0.push((from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Renamed {
    fn drop(&mut self) {
        for (from, to) in self.0.drain(..).rev() {
            if let Err(error) = durable::rename(&to, &from) {
                tracing::error!(%error, "what belongs at {} is at {}", from.display(), to.display());
            }
        }
    }
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

/// Missing, or an empty directory.
fn is_free(path: &Path) -> Result<bool, FileError> {
    match fs::read_dir(path) {
        Ok(mut entries) => Ok(entries.next().is_none()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotADirectory => Ok(false),
        Err(error) => Err(error).on("list", path),
    }
}

fn check_space(parent: &Path, plan: &RestorePlan, force: bool) -> Result<(), RestoreError> {
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

/// The directory under construction; removed with all it holds unless the restore succeeds.
struct Staging {
    data: PathBuf,
    keys: PathBuf,
    keep: bool,
}

impl Staging {
    /// Both beside where they go, since a rename stays within one file system.
    fn create(target: &Path, key_dir: &Path) -> Result<Self, FileError> {
        let id = ulid::Ulid::new();
        let staging = Self {
            data: beside(target, &format!(".restoring-{id}")),
            keys: beside(key_dir, &format!(".restoring-{id}")),
            keep: false,
        };
        fs::create_dir(&staging.data).on("create", &staging.data)?;
        Ok(staging)
    }

    fn done(mut self) {
        self.keep = true;
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        for path in [&self.data, &self.keys] {
            if path.exists()
                && let Err(error) = fs::remove_dir_all(path)
            {
                tracing::warn!(path = %path.display(), %error, "what was restored so far could not be removed");
            }
        }
    }
}
