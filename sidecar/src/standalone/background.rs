//! The server in the background: `server start` leaves a process that watches it, `server stop` and `server status` find
//! that process by a file and a lock.
//!
//! Invariants: who holds the lock is alive, whatever the file says; a server that was started elsewhere is never touched.

use std::ffi::OsString;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, Stopwatch};
use crate::config::Config;
use crate::daemon::state::StateDir;
use crate::datadir::lock::{self, ServerLock};
use crate::durable::{self, FileError, OnPath};
use crate::process::ProcessId;
use crate::standalone::command::{Binary, listen_address};
use crate::standalone::supervisor::{self, Supervisor, SupervisorError, Watched};
use crate::standalone::temporary::STOP;
use crate::standalone::{StandaloneError, logfile, ready, settings};

/// Between two looks at a process.
const LOOK: Duration = Duration::from_millis(50);
/// What a watcher may take beyond the server's own time to end.
const MARGIN: Duration = Duration::from_secs(5);

/// `server.json` in the state directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Note {
    /// The process that watches.
    pub pid: u32,
    pub server_pid: Option<u32>,
    pub starts: u64,
    pub last_exit: Option<String>,
    pub started_at: Timestamp,
    pub address: String,
    #[serde(serialize_with = "crate::lossy::path")]
    pub log: PathBuf,
}

/// What `server status` tells. Field names are stable.
#[derive(Debug, Clone, Serialize)]
pub struct ServerReport {
    /// Does a server run on the data directory, whoever started it?
    pub running: bool,
    /// Does it answer, and the configured database with it?
    pub ready: bool,
    #[serde(serialize_with = "crate::lossy::path")]
    pub data_dir: PathBuf,
    pub url: String,
    pub version: Option<String>,
    /// `None` where no database is configured, or the server does not know it.
    pub database_answers: Option<bool>,
    pub server_pid: Option<u32>,
    /// `background` for `server start`, `sidecar` for `run`, `elsewhere` for anything else.
    pub started_by: Option<&'static str>,
    pub started_at: Option<Timestamp>,
    pub starts: Option<u64>,
    pub last_exit: Option<String>,
    #[serde(serialize_with = "crate::lossy::option")]
    pub log: Option<PathBuf>,
    /// Where the token is that opens the database; never the token itself.
    #[serde(serialize_with = "crate::lossy::option")]
    pub token_file: Option<PathBuf>,
    /// A lock file that a crash left; it does no harm.
    pub stale_lock: bool,
}

/// Where the watcher's files are.
struct Files {
    dir: StateDir,
}

impl Files {
    fn note(&self) -> PathBuf {
        self.dir.path().join("server.json")
    }

    fn lock(&self) -> PathBuf {
        self.dir.path().join("server.lock")
    }

    fn supervised(&self) -> PathBuf {
        self.dir.path().join(supervisor::NOTE)
    }

    /// The note of a watcher that is alive.
    fn watcher(&self) -> Result<Option<Note>, StandaloneError> {
        let path = self.lock();
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).on("open", &path).map_err(Into::into),
        };
        match file.try_lock_shared() {
            Ok(()) => Ok(None),
            // Alive, and about to write its note.
            Err(TryLockError::WouldBlock) => Ok(self.read_note()),
            Err(TryLockError::Error(error)) => Err(error).on("probe the lock of", &path).map_err(Into::into),
        }
    }

    fn read_note(&self) -> Option<Note> {
        serde_json::from_slice(&std::fs::read(self.note()).ok()?).ok()
    }
}

fn files(config: &Config, data_dir: &Path) -> Result<Files, FileError> {
    Ok(Files { dir: StateDir::open(config, data_dir)? })
}

/// Is the server on `data_dir` one that `server start` started?
///
/// # Errors
/// When the state directory cannot be read.
pub fn is_ours(config: &Config, data_dir: &Path) -> Result<bool, StandaloneError> {
    Ok(files(config, data_dir)?.watcher()?.is_some())
}

/// Is the server on `data_dir` one that a sidecar watches which is alive?
pub async fn is_of_sidecar(config: &Config, data_dir: &Path) -> bool {
    // Its note may be a second old, so the process in it is no proof.
    let status = crate::daemon::state::read_status(config, data_dir);
    let watches = status.and_then(|status| status.server).is_some_and(|server| !server.elsewhere);
    let socket = StateDir::locate(config, data_dir).join("control.sock");
    watches && tokio::net::UnixStream::connect(socket).await.is_ok()
}

/// Starts the server of the configuration, unless it runs already, and waits until it is ready. `arguments` make this
/// program watch it.
///
/// # Errors
/// When another server runs there, the port is taken, or the server does not come up.
pub async fn start(
    config: &Config,
    data_dir: &Path,
    arguments: &[OsString],
    clock: &dyn Clock,
    limit: Duration,
) -> Result<(), StandaloneError> {
    let files = files(config, data_dir)?;
    // A watcher that was killed left its server: the next one watches that.
    if files.watcher()?.is_none() && supervisor::left(&files.supervised()).is_none() {
        if let ServerLock::Held { pid } = lock::probe_file(&data_dir.join("spacetime.pid"))? {
            return Err(StandaloneError::Running { path: data_dir.to_owned(), pid });
        }
        let address = listen_address(config);
        if std::net::TcpListener::bind(&address).is_err() {
            return Err(StandaloneError::PortTaken { address });
        }
        // Said here, where somebody reads it.
        Binary::find(config)?;
        settings::set_log_level(data_dir, config.spacetimedb_config.log_level)?;
    }
    let mut watching = match files.watcher()? {
        Some(_) => None,
        None => Some(spawn_watcher(&files, arguments)?),
    };
    let log = logfile::path_in(files.dir.path());
    let mut ended = None;
    let is_ready = ready::wait(config, clock, limit, || {
        ended = watching.as_mut().and_then(|child| child.try_wait().ok().flatten());
        ended.is_some()
    });
    if is_ready.await {
        return Ok(());
    }
    match ended {
        Some(status) => {
            // The watcher's own words come first: what it says is why there is no server.
            let own = logfile::tail(&files.dir.path().join("server-watch.log"));
            let said = if own.is_empty() { logfile::tail(&log) } else { own };
            Err(StandaloneError::Ended { status: status.to_string(), said })
        }
        None => Err(StandaloneError::NotReady { url: config.spacetimedb_config.server_url(), limit, log }),
    }
}

fn spawn_watcher(files: &Files, arguments: &[OsString]) -> Result<std::process::Child, StandaloneError> {
    use std::os::unix::process::CommandExt;
    let program = std::env::current_exe().on("find", Path::new("this program"))?;
    let path = files.dir.path().join("server-watch.log");
    let log = File::create(&path).on("create", &path)?;
    let errors = log.try_clone().on("open", &path)?;
    let mut command = Command::new(&program);
    command.args(arguments).stdin(Stdio::null()).stdout(log).stderr(errors);
    // What ends the shell must not end the server.
    command.process_group(0);
    command.spawn().map_err(|source| StandaloneError::Start { program, source })
}

/// Watches the server until told to stop: what `server start` leaves running.
///
/// # Errors
/// When another process watches already, or the server fails for good.
pub async fn watch(
    config: &Config,
    data_dir: &Path,
    clock: Arc<dyn Clock>,
    stop: CancellationToken,
) -> Result<(), WatchError> {
    let files = files(config, data_dir)?;
    let path = files.lock();
    let lock = File::options().create(true).truncate(false).write(true).open(&path).on("open", &path)?;
    let mut tries = 0;
    while lock.try_lock().is_err() {
        tries += 1;
        // Who only looks holds it for a moment, too.
        if tries > 10 {
            return Err(WatchError::Watched);
        }
        clock.sleep(LOOK).await;
    }
    let (address, log) = (listen_address(config), logfile::path_in(files.dir.path()));
    let beginning = Note {
        pid: std::process::id(),
        server_pid: None,
        starts: 0,
        last_exit: None,
        started_at: clock.now(),
        address: address.clone(),
        log: log.clone(),
    };
    // What the one before us has told is of processes that are gone.
    durable::replace(&files.note(), &serde_json::to_vec_pretty(&beginning).unwrap_or_default())?;
    let binary = Binary::find(config)?;
    binary.check(data_dir)?;
    let (reader, writer) = std::io::pipe().on("make a pipe for", &log)?;
    logfile::follow(reader, &log).on("write", &log)?;
    let mut watched = Watched::new(config, binary.serve(config, data_dir, &address), data_dir.to_owned(), STOP);
    watched.output = Some(writer);
    watched.note = Some(files.supervised());
    let note = files.note();
    let tell = Arc::new(move |server: crate::standalone::supervisor::ServerStatus| {
        let told =
            Note { server_pid: server.pid, starts: server.starts, last_exit: server.last_exit, ..beginning.clone() };
        if let Err(error) = durable::replace(&note, &serde_json::to_vec_pretty(&told).unwrap_or_default()) {
            tracing::warn!(%error, "the note about the server was not written");
        }
    });
    Ok(Supervisor::start(watched, clock, tell, stop)?.end().await?)
}

/// Why a watch ended.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    #[error("another process watches the server on this data directory")]
    Watched,
    #[error(transparent)]
    Standalone(#[from] StandaloneError),
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
}

impl From<FileError> for WatchError {
    fn from(error: FileError) -> Self {
        Self::Standalone(error.into())
    }
}

/// Stops the server that `server start` started; `false` when none runs on the directory. After `limit` it is killed.
///
/// # Errors
/// [`StandaloneError::Foreign`] for a server that was started elsewhere.
pub async fn stop(
    config: &Config,
    data_dir: &Path,
    clock: &dyn Clock,
    limit: Option<Duration>,
) -> Result<bool, StandaloneError> {
    let files = files(config, data_dir)?;
    let patience = limit.unwrap_or(config.spacetimedb_config.stop_timeout.0 + MARGIN);
    let Some(note) = files.watcher()? else {
        if let Some(server) = supervisor::left(&files.supervised()) {
            return stop_left(&files, data_dir, clock, &server, patience).await;
        }
        return match lock::probe_file(&data_dir.join("spacetime.pid"))? {
            ServerLock::Free => Ok(false),
            ServerLock::Held { pid } => {
                let pid = pid.map_or("unknown".into(), |pid| pid.to_string());
                Err(StandaloneError::Foreign { path: data_dir.to_owned(), pid })
            }
        };
    };
    signal(note.pid, Signal::TERM);
    if gone(&files, data_dir, clock, patience).await? {
        return Ok(true);
    }
    tracing::warn!("the server did not stop within {patience:?} and is killed");
    if let Some(pid) = files.read_note().and_then(|note| note.server_pid) {
        signal(pid, Signal::KILL);
    }
    if gone(&files, data_dir, clock, MARGIN).await? {
        return Ok(true);
    }
    signal(note.pid, Signal::KILL);
    match gone(&files, data_dir, clock, MARGIN).await? {
        true => Ok(true),
        false => Err(StandaloneError::Stuck { pid: note.pid }),
    }
}

/// Stops a server whose watcher was killed.
async fn stop_left(
    files: &Files,
    data_dir: &Path,
    clock: &dyn Clock,
    server: &ProcessId,
    patience: Duration,
) -> Result<bool, StandaloneError> {
    for (asked, limit) in [(STOP, patience), (Signal::KILL, MARGIN)] {
        signal(server.pid(), asked);
        let waited = Stopwatch::start();
        while server.is_alive() && waited.elapsed_seconds() < limit.as_secs_f64() {
            clock.sleep(LOOK).await;
        }
        if !server.is_alive() && gone(files, data_dir, clock, MARGIN).await? {
            return Ok(true);
        }
        tracing::warn!("the server did not stop within {limit:?}");
    }
    Err(StandaloneError::Stuck { pid: server.pid() })
}

/// Are the watcher and its server gone?
async fn gone(files: &Files, data_dir: &Path, clock: &dyn Clock, limit: Duration) -> Result<bool, StandaloneError> {
    let waited = Stopwatch::start();
    let lock = data_dir.join("spacetime.pid");
    while files.watcher()?.is_some() || lock::probe_file(&lock)? != ServerLock::Free {
        if waited.elapsed_seconds() > limit.as_secs_f64() {
            return Ok(false);
        }
        clock.sleep(LOOK).await;
    }
    Ok(true)
}

/// Sends a signal to a process of ours.
pub(crate) fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw)
        && let Err(error) = kill_process(pid, signal)
    {
        tracing::debug!(%error, "the process is gone");
    }
}

/// Looks at the server on `data_dir`.
///
/// # Errors
/// When the state directory or the lock cannot be read.
pub async fn status(config: &Config, data_dir: &Path) -> Result<ServerReport, StandaloneError> {
    let files = files(config, data_dir)?;
    let note = files.watcher()?;
    let path = data_dir.join("spacetime.pid");
    let lock = lock::probe_file(&path)?;
    let health = ready::health(config).await.ok();
    let (running, holder) = match lock {
        ServerLock::Free => (false, None),
        ServerLock::Held { pid } => (true, pid),
    };
    let left = supervisor::left(&files.supervised());
    let started_by = match (&note, running) {
        (Some(_), _) => Some("background"),
        (None, true) if left.is_some() => Some("background"),
        (None, true) if is_of_sidecar(config, data_dir).await => Some("sidecar"),
        (None, true) => Some("elsewhere"),
        (None, false) => None,
    };
    Ok(ServerReport {
        running,
        ready: running && health.as_ref().is_some_and(|health| health.database_answers != Some(false)),
        data_dir: data_dir.to_owned(),
        url: config.spacetimedb_config.server_url(),
        version: health.as_ref().and_then(|health| health.version.clone()),
        database_answers: health.and_then(|health| health.database_answers),
        server_pid: note.as_ref().and_then(|note| note.server_pid).or(holder),
        started_by,
        started_at: note.as_ref().map(|note| note.started_at),
        starts: note.as_ref().map(|note| note.starts),
        last_exit: note.as_ref().and_then(|note| note.last_exit.clone()),
        log: note.map(|note| note.log),
        token_file: config.spacetimedb_config.token_file.clone(),
        stale_lock: !running && path.exists(),
    })
}
