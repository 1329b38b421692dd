//! Applies a plan: builds the new data directory beside the target, checks it, makes it durable, then puts it in its place.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use crate::backup::DatabaseReport;
use crate::clock::{Clock, Stopwatch};
use crate::durable::owner::{Owner, make_dirs};
use crate::durable::{self, OnPath, beside};
use crate::progress::{Progress, Tally};
use crate::repository::Repository;
use crate::restore::build::{Build, Built, blocking};
use crate::restore::place::{Before, Place, check_space, is_free};
use crate::restore::plan::{DatabasePlan, RestorePlan};
use crate::restore::swap::{self, KeyPlace, Staging};
use crate::restore::{RestoreError, check};

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
    #[serde(serialize_with = "crate::lossy::path")]
    pub data_dir: PathBuf,
    /// What `data_dir` leads to, if it is a link.
    #[serde(serialize_with = "crate::lossy::option", skip_serializing_if = "Option::is_none")]
    pub link_target: Option<PathBuf>,
    /// Where the directory that was there is now.
    #[serde(serialize_with = "crate::lossy::option")]
    pub moved_aside: Option<PathBuf>,
    /// Where the token keys are, if the restore point holds any.
    #[serde(serialize_with = "crate::lossy::option")]
    pub keys: Option<PathBuf>,
    /// Where other keys that were there are now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(serialize_with = "crate::lossy::option")]
    pub keys_moved_aside: Option<PathBuf>,
    /// The sidecar's own token, signed anew with new keys.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(serialize_with = "crate::lossy::option")]
    pub token: Option<PathBuf>,
    pub databases: Vec<DatabaseReport>,
    pub left_out: Vec<String>,
    /// What is in doubt about the time that was asked for.
    pub warnings: Vec<String>,
    pub bytes_read: u64,
    pub bytes_written: u64,
    pub duration_ms: u64,
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
    let place = Place::find(&options.data_dir)?;
    let before = place.inspect(options.force)?;
    let key_dir = options.key_dir.clone().unwrap_or_else(|| beside(&options.data_dir, ".keys"));
    let keys = KeyPlace { dir: key_dir, force: options.force };
    check_request(plan, options, &place, &keys)?;
    let owner = place.owner()?;
    let parent = durable::parent(&place.target);
    make_dirs(&parent, 0o755)?;
    check_space(&parent, plan, options.force)?;

    let staging = Staging::create(&place.target, &keys.dir)?;
    let tally = Arc::new(Tally::default());
    let has_keys = build(repository, plan, options, &staging, &tally, &progress).await?;
    // Early, for what follows takes long; looked at again at the end.
    if has_keys {
        keys.check(Some(&staging.keys))?;
    }
    progress.phase("making it durable", None);
    make_durable(&staging, owner, has_keys).await?;

    // A long restore leaves time to start a server where it should go.
    let now = place.inspect(options.force)?;
    if before == Before::Nothing && now != Before::Nothing {
        return Err(RestoreError::WouldOverwrite(place.target));
    }
    let stamp = clock.now().strftime("%Y%m%dT%H%M%S%3fZ").to_string();
    let aside = swap::swap(&staging, &place, now, has_keys.then_some(&keys), &stamp)?;
    staging.done();
    Ok(RestoreReport {
        data_dir: options.data_dir.clone(),
        link_target: place.link_target(),
        moved_aside: aside.data,
        keys: has_keys.then_some(keys.dir),
        keys_moved_aside: aside.keys,
        token: None,
        databases: plan.databases.iter().map(DatabasePlan::report).collect(),
        left_out: plan.left_out.clone(),
        warnings: plan.warnings(),
        bytes_read: tally.bytes_read(),
        bytes_written: tally.bytes_written(),
        duration_ms: stopwatch.elapsed_ms(),
    })
}

/// Refuses what is wrong with a request before anything is read.
fn check_request(
    plan: &RestorePlan,
    options: &ApplyOptions,
    place: &Place,
    keys: &KeyPlace,
) -> Result<(), RestoreError> {
    if options.name.is_some() && plan.databases.len() != 1 {
        let names: Vec<_> = plan.databases.iter().map(|database| database.name.as_str()).collect();
        let names = names.join(", ");
        return Err(RestoreError::Usage(format!("a new name is for one database; name it with --database ({names})")));
    }
    if durable::canonical(&keys.dir).starts_with(durable::canonical(&place.target)) {
        return Err(RestoreError::Usage(format!(
            "the token keys would lie in the data directory that is replaced; give a --key-dir outside {}",
            options.data_dir.display()
        )));
    }
    // Captured keys may be the very ones that are there.
    if options.new_keys || (plan.instance.has_keys && is_free(&keys.dir)?) {
        keys.check(None)?;
    }
    Ok(())
}

/// Builds and checks everything in `staging`. Returns whether there are token keys.
async fn build(
    repository: &Repository,
    plan: &RestorePlan,
    options: &ApplyOptions,
    staging: &Staging,
    tally: &Arc<Tally>,
    progress: &Arc<dyn Progress>,
) -> Result<bool, RestoreError> {
    let build = Build { repository, data: &staging.data, keys: &staging.keys, tally, progress };
    let Built { mut has_keys, logs } =
        build.run(plan, options.name.as_deref()).await.map_err(RestoreError::with_disk_full)?;
    if options.new_keys {
        if has_keys {
            fs::remove_dir_all(&staging.keys).on("remove", &staging.keys)?;
        }
        make_keys(&staging.keys)?;
        has_keys = true;
    }
    progress.phase("self-check", None);
    check::logs(&staging.data, plan, &logs)?;
    Ok(has_keys)
}

async fn make_durable(staging: &Staging, owner: Owner, has_keys: bool) -> Result<(), RestoreError> {
    let (data, keys) = (staging.data.clone(), has_keys.then(|| staging.keys.clone()));
    let sync = move || {
        swap::give(&data, keys.as_deref(), owner)?;
        durable::sync_file_system(&data)?;
        // The keys may go to another file system.
        keys.map_or(Ok(()), |keys| durable::sync_tree(&keys))
    };
    blocking(sync).await?.map_err(|error| RestoreError::from(error).with_disk_full())
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
