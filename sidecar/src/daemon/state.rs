//! What the daemon knows of itself, and the file in which it tells others on this machine.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::archiver::Followed;
use crate::backup::BackupReport;
use crate::backup::log::LogEventKind;
use crate::clock::Clock;
use crate::config::Config;
use crate::config::value::Period;
use crate::daemon::conditions::{Condition, ConditionKind, Conditions, Finding, Source, Subject};
use crate::daemon::gauges;
use crate::daemon::health;
use crate::daemon::history::{History, HistoryReport};
use crate::daemon::survey::Survey;
use crate::durable::{self, FileError, OnPath};
use crate::ids::{Identity, Offset, RestorePointId, TimelineId};
use crate::observe::metrics::{self, Sample};
use crate::repository::lease::Fence;
use crate::standalone::supervisor::ServerStatus;

/// `status.json` in the state directory, rewritten every second.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DaemonStatus {
    pub pid: u32,
    pub started_at: Timestamp,
    pub written_at: Timestamp,
    /// `false` once the daemon has ended in good order.
    pub running: bool,
    /// The lease's fencing token; `None` while there is no lease.
    pub lease_token: Option<u64>,
    /// Why nothing may be written under the lease now, as it is past its time.
    #[serde(default)]
    pub lease_error: Option<String>,
    pub databases: Vec<FollowedStatus>,
    pub schedules: Vec<ScheduleStatus>,
    pub server: Option<ServerStatus>,
    pub last_restore_point: Option<RestorePointId>,
    /// Where the HTTP interface listens.
    #[serde(default)]
    pub http: Option<String>,
    /// The latest error of the daemon itself.
    pub last_error: Option<String>,
    /// Everything that is wrong now.
    pub conditions: Vec<Condition>,
}

impl DaemonStatus {
    /// Whether it is so old that its daemon, which writes it every second, must have died.
    pub fn is_stale(&self, now: Timestamp) -> bool {
        const LONGEST: i64 = 15;
        now.duration_since(self.written_at).as_secs() >= LONGEST
    }
}

/// One database as its archiver sees it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FollowedStatus {
    pub identity: Identity,
    pub name: String,
    pub timeline: Option<TimelineId>,
    pub archived_offset: Option<Offset>,
    /// The last transaction that was read from the log.
    pub log_offset: Option<Offset>,
    /// How long ago the archive last held everything in the log.
    pub behind_seconds: f64,
    pub objects_written: u64,
    pub bytes_written: u64,
    pub error: Option<String>,
    /// Why the log cannot be archived up to its end, although nothing failed.
    #[serde(default)]
    pub damage: Option<String>,
    /// Forks, gaps and damage since the start.
    pub events: Vec<Event>,
}

/// Something that happened to a log.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Event {
    pub at: Timestamp,
    pub kind: LogEventKind,
    pub message: String,
}

/// One schedule.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ScheduleStatus {
    pub name: String,
    pub cron: String,
    pub time_zone: String,
    pub next_run: Option<Timestamp>,
    /// Whether a run is under way.
    #[serde(default)]
    pub running: bool,
    /// When a run last began.
    pub last_run: Option<Timestamp>,
    /// Of the last run that ended, also before a restart; `None` before the first.
    pub last_ok: Option<bool>,
    pub last_message: Option<String>,
    /// When a run last succeeded.
    #[serde(default)]
    pub last_success: Option<Timestamp>,
}

/// The daemon's knowledge of itself.
pub struct State {
    clock: Arc<dyn Clock>,
    data_dir: PathBuf,
    lag_alert: Period,
    /// Of the lease that is held; `None` while there is none.
    fence: Mutex<Option<Arc<Fence>>>,
    conditions: Conditions,
    followed: Mutex<Vec<Arc<Followed>>>,
    rest: Mutex<DaemonStatus>,
    survey: Mutex<Survey>,
    module: Mutex<Vec<Sample>>,
    history: Mutex<History>,
}

impl State {
    pub fn new(clock: Arc<dyn Clock>, data_dir: &Path, lag_alert: Period) -> Self {
        let now = clock.now();
        let rest = DaemonStatus {
            pid: std::process::id(),
            started_at: now,
            written_at: now,
            running: true,
            lease_token: None,
            lease_error: None,
            databases: Vec::new(),
            schedules: Vec::new(),
            server: None,
            last_restore_point: None,
            http: None,
            last_error: None,
            conditions: Vec::new(),
        };
        Self {
            clock,
            data_dir: data_dir.to_owned(),
            lag_alert,
            fence: Mutex::default(),
            conditions: Conditions::default(),
            followed: Mutex::default(),
            rest: Mutex::new(rest),
            survey: Mutex::default(),
            module: Mutex::default(),
            history: Mutex::default(),
        }
    }

    /// Archiving begins: databases are followed from here on, for as long as `fence` lets pass.
    pub fn leased(&self, token: u64, fence: Arc<Fence>) {
        for before in self.followed.lock().drain(..) {
            self.conditions.forget_tasks(&before.name);
        }
        *self.fence.lock() = Some(fence);
        let mut rest = self.rest.lock();
        rest.lease_token = Some(token);
        rest.last_error = None;
    }

    /// Archiving has ended early and begins again. What was followed stays, so that its growing lag is seen.
    pub fn not_archiving(&self, error: String) {
        *self.fence.lock() = None;
        // Nobody looks at the disk until then.
        self.looked_at_disk(Vec::new());
        let mut rest = self.rest.lock();
        rest.lease_token = None;
        rest.last_error = Some(error);
    }

    pub fn listening(&self, address: Option<String>) {
        self.rest.lock().http = address;
    }

    /// What the bundled module says of itself, as gauges.
    pub fn module(&self, samples: Vec<Sample>) {
        *self.module.lock() = samples;
    }

    /// How far the log of the database with this name or identity was read; `None` when that is not known now.
    pub fn log_position(&self, name: &str) -> Option<u64> {
        let followed = self.followed.lock();
        let found = followed.iter().find(|followed| followed.name == name || followed.identity.to_string() == name)?;
        let progress = found.progress();
        // While the store is out nothing is read, so this says nothing.
        progress.read_to.filter(|_| progress.error.is_none()).map(|next| next.0)
    }

    /// Changes what is known of the repository.
    pub fn survey(&self, change: impl FnOnce(&mut Survey)) {
        change(&mut self.survey.lock());
    }

    /// Puts what is known into the gauges, and the lags into the history.
    pub fn publish(&self) {
        let status = self.status();
        let survey = self.survey.lock().clone();
        let mut samples = gauges::samples(&status, &survey, &self.data_dir);
        samples.extend_from_slice(&self.module.lock());
        metrics::publish(samples);
        self.history.lock().note(&status, status.written_at);
    }

    pub fn history(&self, now: Timestamp) -> HistoryReport {
        let survey = self.survey.lock();
        HistoryReport {
            at: now,
            lag: self.history.lock().points(),
            timelines: survey.timelines.clone(),
            restore_estimate_seconds: survey.restore_estimate,
        }
    }

    pub fn stopped(&self) {
        // A lease that was released is not one that was lost.
        *self.fence.lock() = None;
        self.rest.lock().running = false;
    }

    /// What was waited for is there, and the next thing is waited for.
    pub(super) fn waits(&self) {
        self.rest.lock().last_error = None;
    }

    /// Something is wrong until it is cleared.
    pub(crate) fn raise(&self, kind: ConditionKind, subject: Subject, message: impl Into<String>) {
        let finding = Finding { kind, subject, message: message.into() };
        self.conditions.raise(finding, Source::Task, self.clock.now());
    }

    pub(crate) fn clear(&self, kind: ConditionKind, subject: &Subject) {
        self.conditions.clear(kind, subject);
    }

    /// Raises a condition for an error, and clears it where there is none.
    pub(super) fn check<E: std::fmt::Display>(&self, kind: ConditionKind, subject: Subject, result: Result<(), E>) {
        match result {
            Ok(()) => self.clear(kind, &subject),
            Err(error) => self.raise(kind, subject, error.to_string()),
        }
    }

    /// Puts what a look at the disk found in the place of what the look before found.
    pub(super) fn looked_at_disk(&self, found: Vec<Finding>) {
        self.conditions.replace(Source::Disk, found, self.clock.now());
    }

    pub fn failed(&self, error: String) {
        self.rest.lock().last_error = Some(error);
    }

    pub fn restore_point(&self, report: &BackupReport) {
        let mut rest = self.rest.lock();
        rest.last_restore_point = Some(report.restore_point);
        rest.last_error = None;
    }

    pub fn server(&self, server: ServerStatus) {
        self.rest.lock().server = Some(server);
    }

    pub fn schedule(&self, schedule: ScheduleStatus) {
        let mut rest = self.rest.lock();
        match rest.schedules.iter_mut().find(|known| known.name == schedule.name) {
            Some(known) => *known = schedule,
            None => rest.schedules.push(schedule),
        }
    }

    pub(super) fn follow(&self, followed: Arc<Followed>) {
        self.followed.lock().push(followed);
    }

    pub(super) fn forget(&self, identity: &Identity) {
        let mut followed = self.followed.lock();
        for gone in followed.extract_if(.., |followed| followed.identity == *identity) {
            self.conditions.forget(&gone.name);
        }
    }

    /// All of it, now.
    pub fn status(&self) -> DaemonStatus {
        let now = self.clock.now();
        let mut status = self.rest.lock().clone();
        status.written_at = now;
        let fence = self.fence.lock().clone();
        status.lease_error = fence.and_then(|fence| fence.check().err()).map(|error| error.to_string());
        status.databases = self.followed.lock().iter().map(|followed| describe(followed, now)).collect();
        self.conditions.replace(Source::Status, health::conditions(&status, self.lag_alert), now);
        status.conditions = self.conditions.list();
        status
    }
}

fn describe(followed: &Followed, now: Timestamp) -> FollowedStatus {
    let progress = followed.progress();
    let since = progress.caught_up_at.unwrap_or(followed.since);
    FollowedStatus {
        identity: followed.identity,
        name: followed.name.clone(),
        timeline: progress.timeline,
        archived_offset: progress.tip.and_then(|tip| tip.next.0.checked_sub(1)).map(Offset),
        log_offset: progress.read_to.and_then(|next| next.0.checked_sub(1)).map(Offset),
        behind_seconds: now.duration_since(since).as_secs_f64().max(0.0),
        objects_written: progress.objects,
        bytes_written: progress.stored_bytes,
        error: progress.error,
        damage: progress.damage,
        events: progress
            .events
            .into_iter()
            .map(|(at, event)| Event { at, kind: event.kind, message: event.message })
            .collect(),
    }
}

/// Where one daemon keeps its notes: a directory for each data directory.
#[derive(Debug, Clone)]
pub struct StateDir(PathBuf);

impl StateDir {
    /// The place of the notes about `data_dir`: one, whichever links and dots it is named with.
    pub fn locate(config: &Config, data_dir: &Path) -> PathBuf {
        let place = Self::place(config, &durable::canonical(data_dir));
        // Earlier releases went by the name as it was given.
        let named = std::path::absolute(data_dir).map(|named| Self::place(config, &named));
        named.ok().filter(|named| !place.exists() && named.exists()).unwrap_or(place)
    }

    fn place(config: &Config, data_dir: &Path) -> PathBuf {
        let base = config.archive.state_dir.clone().unwrap_or_else(default_base);
        let hash = crate::ids::ContentHash::of(data_dir.as_os_str().as_encoded_bytes()).to_string();
        base.join(format!("data-{}", &hash[..16]))
    }

    /// Makes the directory if it is missing; only its owner may enter.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(config: &Config, data_dir: &Path) -> Result<Self, FileError> {
        use std::os::unix::fs::PermissionsExt;
        let path = Self::locate(config, data_dir);
        if path.is_symlink() && !path.exists() {
            // What it led to was removed.
            std::fs::remove_file(&path).on("remove", &path)?;
        }
        std::fs::create_dir_all(&path).on("create", &path)?;
        // A directory that cannot be written is a condition of the daemon, which starts all the same.
        if std::fs::metadata(&path).on("inspect", &path)?.permissions().mode() & 0o7777 != 0o700 {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).on("protect", &path)?;
        }
        let place = Self::place(config, &durable::canonical(data_dir));
        if let (true, Some(name)) = (place != path, path.file_name())
            && let Err(error) = std::os::unix::fs::symlink(name, &place)
        {
            tracing::debug!(%error, "other names of the data directory do not lead to its state directory");
        }
        // The directory's own name is that of this sidecar.
        let own = std::fs::read_link(&path).map(|name| durable::parent(&path).join(name));
        Ok(Self(own.unwrap_or(path)))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The name of this sidecar among others.
    pub fn instance(&self) -> String {
        self.0.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
    }

    pub fn socket(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    /// A directory for copies that the one for temporary files cannot hold, without what a killed daemon left in it.
    pub(super) fn scratch(&self) -> PathBuf {
        let path = self.0.join("scratch");
        let _ = std::fs::remove_dir_all(&path);
        if let Err(error) = std::fs::create_dir_all(&path) {
            tracing::warn!(%error, "the state directory has no place for copies");
        }
        path
    }

    /// Claims this directory for as long as what is returned lives, or this process does; `None` where another process has it.
    pub(super) fn claim(&self) -> Option<Claim> {
        use std::os::unix::fs::MetadataExt as _;
        let path = self.0.join("daemon.lock");
        let file = std::fs::File::options().create(true).truncate(false).write(true).open(path).ok()?;
        file.try_lock().ok()?;
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let lock = file.metadata().ok()?;
        let place = format!("{}:{}:{}", boot.trim(), lock.dev(), lock.ino());
        Some(Claim { note: self.0.join("lease.json"), place, _lock: file })
    }

    pub(super) fn write_status(&self, state: &State) -> Result<(), FileError> {
        let bytes = serde_json::to_vec_pretty(&state.status()).unwrap_or_default();
        durable::replace(&self.0.join("status.json"), &bytes)
    }
}

/// A claim on a state directory. With its process it ends, and who gets it next knows that this process is gone.
pub(super) struct Claim {
    note: PathBuf,
    /// This start of this machine, and this very directory: a copy of it, or a clone of the machine, is another place.
    place: String,
    _lock: std::fs::File,
}

/// Which lease the process holds that has the claim.
#[derive(Serialize, Deserialize)]
struct LeaseNote {
    writer: String,
    place: String,
}

impl Claim {
    /// The writer whose lease the last process with this claim held when it ended without giving it back.
    pub(super) fn predecessor(&self) -> Option<String> {
        let note: LeaseNote = serde_json::from_slice(&std::fs::read(&self.note).ok()?).ok()?;
        (note.place == self.place).then_some(note.writer)
    }

    /// Notes the lease that this process holds now. Without a note a successor waits: a failure is no harm.
    pub(super) fn holds(&self, writer: String) {
        let note = LeaseNote { writer, place: self.place.clone() };
        let bytes = serde_json::to_vec_pretty(&note).unwrap_or_default();
        if let Err(error) = durable::replace(&self.note, &bytes) {
            tracing::debug!(%error, "the lease was not noted");
        }
    }
}

/// Whether the daemon whose notes these are is gone, however it ended: the lock on them goes with its process.
pub fn has_ended(config: &Config, data_dir: &Path) -> bool {
    let lock = std::fs::File::open(StateDir::locate(config, data_dir).join("daemon.lock"));
    lock.is_ok_and(|file| file.try_lock_shared().is_ok())
}

/// What the daemon on `data_dir` last told of itself; `None` when there never was one.
pub fn read_status(config: &Config, data_dir: &Path) -> Option<DaemonStatus> {
    let path = StateDir::locate(config, data_dir).join("status.json");
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

fn default_base() -> PathBuf {
    let from = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    match (from("XDG_STATE_HOME"), from("HOME")) {
        (Some(state), _) => state.join("inner-universe"),
        (None, Some(home)) => home.join(".local/state/inner-universe"),
        (None, None) => PathBuf::from("/var/lib/inner-universe"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(base: &Path) -> Config {
        let mut config = Config::default();
        config.archive.state_dir = Some(base.join("state"));
        config
    }

    #[test]
    fn every_name_leads_to_one_state_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (base, config) = (dir.path(), config(dir.path()));
        std::os::unix::fs::symlink("data", base.join("link")).unwrap();
        // Before and after the data directory is made.
        for _ in 0..2 {
            let place = StateDir::locate(&config, &base.join("data"));
            for name in ["data/", "./data", "link", "link/"] {
                assert_eq!(StateDir::locate(&config, &base.join(name)), place, "{name}");
            }
            std::fs::create_dir_all(base.join("data")).unwrap();
        }
        let place = StateDir::locate(&config, &base.join("data"));
        assert_eq!(StateDir::locate(&config, &base.join("data/../data")), place);
        assert_ne!(StateDir::locate(&config, &base.join("other")), place);
    }

    #[test]
    fn a_state_directory_of_an_earlier_release_is_found_by_every_name() {
        let dir = tempfile::tempdir().unwrap();
        let (base, config) = (dir.path(), config(dir.path()));
        std::fs::create_dir(base.join("data")).unwrap();
        std::os::unix::fs::symlink("data", base.join("link")).unwrap();
        let old = StateDir::place(&config, &base.join("link"));
        std::fs::create_dir_all(&old).unwrap();
        let opened = StateDir::open(&config, &base.join("link")).unwrap();
        assert_eq!(opened.path(), old);
        for name in ["data", "data/", "link"] {
            let found = StateDir::open(&config, &base.join(name)).unwrap();
            assert_eq!(found.path(), opened.path(), "{name}");
            assert_eq!(found.instance(), opened.instance());
        }
    }
}
