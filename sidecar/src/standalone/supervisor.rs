//! The server as a child: started, watched, started again when it fails, stopped with us; or for a while, when asked.
//!
//! Invariants: signals meant for the server reach it; told to stop, it is asked first and killed only when it does not end;
//! a server that fails at once is not started in a tight loop; a supervisor that is killed leaves its server running, and the
//! next one watches that; a server that was started elsewhere is never signalled.

use std::ffi::OsString;
use std::io::PipeWriter;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, Stopwatch};
use crate::config::{Config, Restart};
use crate::datadir::lock::{self, ServerLock};
use crate::durable;
use crate::process::{ProcessId, ignored_signals};

/// A server that ran so long is started again without a growing wait.
const STEADY: u64 = 60_000;
/// How often a server that is not our child is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// What can go wrong with the server.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    #[error("start the server `{command}`: {source}")]
    Start { command: String, source: std::io::Error },
    #[error(
        "another sidecar (process {sidecar}) watches the server (process {pid}) on {}; stop that sidecar, or run without a \
         server command",
        path.display()
    )]
    Running { path: PathBuf, pid: u32, sidecar: u32 },
    #[error("the server ended with {0} and is not to be started again")]
    Ended(ExitStatus),
    #[error("signals cannot be received: {0}")]
    Signals(std::io::Error),
    #[error("the watch over the server stopped: {0}")]
    Watch(String),
}

/// The server that is watched.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ServerStatus {
    pub pid: Option<u32>,
    pub starts: u64,
    pub last_exit: Option<String>,
    /// It was started elsewhere: it is followed until it ends, and not stopped by us.
    #[serde(default)]
    pub elsewhere: bool,
}

impl ServerStatus {
    pub fn is_up(&self) -> bool {
        self.pid.is_some() || self.elsewhere
    }
}

/// Which server, and how to treat it.
pub struct Watched {
    /// Empty for no server at all.
    pub command: Vec<OsString>,
    pub data_dir: PathBuf,
    pub restart: Restart,
    pub longest_wait: Duration,
    /// It is killed when it does not end so long after it was asked to.
    pub stop_timeout: Duration,
    pub stop_signal: Signal,
    /// Where its output goes; to ours when left out.
    pub output: Option<PipeWriter>,
    /// Where it is noted which process is the server, for the supervisor that comes after one that was killed.
    pub note: Option<PathBuf>,
}

/// Where supervisors in a state directory note which process is the server.
pub const NOTE: &str = "supervised.json";

/// Which process a supervisor has started.
#[derive(Serialize, Deserialize)]
struct StartNote {
    supervisor: ProcessId,
    server: ProcessId,
}

impl StartNote {
    /// The note about a server that is alive; of another supervisor than this process.
    fn read(path: &Path) -> Option<Self> {
        let note: Self = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
        (note.server.is_alive() && note.supervisor.pid() != std::process::id()).then_some(note)
    }
}

/// The server that a supervisor left which was killed.
pub fn left(note: &Path) -> Option<ProcessId> {
    let note = StartNote::read(note)?;
    (!note.supervisor.is_alive()).then_some(note.server)
}

impl Watched {
    pub fn new(config: &Config, command: Vec<OsString>, data_dir: PathBuf, stop_signal: Signal) -> Self {
        let config = &config.spacetimedb_config;
        Self {
            command,
            data_dir,
            restart: config.restart,
            longest_wait: config.restart_backoff_max.0,
            stop_timeout: config.stop_timeout.0,
            stop_signal,
            output: None,
            note: None,
        }
    }

    /// A server that runs already: left by a supervisor that was killed, or started elsewhere.
    fn find(&self) -> Result<Option<Server>, SupervisorError> {
        if let Some(note) = self.note.as_deref().and_then(StartNote::read) {
            if note.supervisor.is_alive() {
                let (pid, sidecar) = (note.server.pid(), note.supervisor.pid());
                return Err(SupervisorError::Running { path: self.data_dir.clone(), pid, sidecar });
            }
            return Ok(Some(Server::Left(note.server)));
        }
        Ok(self.lock_holder().map(|pid| Server::Elsewhere { pid }))
    }

    /// The process that holds the data directory, as far as that is known; `None` where no server runs.
    fn lock_holder(&self) -> Option<Option<u32>> {
        match lock::probe_file(&self.data_dir.join("spacetime.pid")) {
            Ok(ServerLock::Held { pid }) => Some(pid),
            _ => None,
        }
    }

    /// Is it certain that no server holds the data directory?
    fn is_unlocked(&self) -> bool {
        matches!(lock::probe_file(&self.data_dir.join("spacetime.pid")), Ok(ServerLock::Free))
    }

    /// Without a note a successor only follows the server: a failure does no harm.
    fn note(&self, child: &Child) {
        let ids = (ProcessId::own(), child.id().and_then(ProcessId::of));
        let (Some(path), (Some(supervisor), Some(server))) = (&self.note, ids) else { return };
        let bytes = serde_json::to_vec_pretty(&StartNote { supervisor, server }).unwrap_or_default();
        if let Err(error) = durable::replace(path, &bytes) {
            tracing::debug!(%error, "the server's process was not noted");
        }
    }
}

/// A server that runs.
enum Server {
    Child(Child),
    /// Left by a supervisor of ours that was killed.
    Left(ProcessId),
    /// Started by somebody else.
    Elsewhere {
        pid: Option<u32>,
    },
}

impl Server {
    fn pid(&self) -> Option<u32> {
        match self {
            Self::Child(child) => child.id(),
            Self::Left(process) => Some(process.pid()),
            Self::Elsewhere { pid } => *pid,
        }
    }

    /// Returns once it has ended, with its status where it was our child.
    async fn wait(&mut self, watched: &Watched, clock: &dyn Clock) -> std::io::Result<Option<ExitStatus>> {
        match self {
            Self::Child(child) => return child.wait().await.map(Some),
            // Only what is certain counts: a second server on the same directory would be worse than a late start.
            Self::Left(process) => {
                while !process.is_dead() && (process.is_alive() || !watched.is_unlocked()) {
                    clock.sleep(LOOK_INTERVAL).await;
                }
            }
            // Its process may be of another container, where this number is another process's.
            Self::Elsewhere { .. } => {
                while !watched.is_unlocked() {
                    clock.sleep(LOOK_INTERVAL).await;
                }
            }
        }
        Ok(None)
    }

    fn send(&self, signal: Signal) {
        let ours = match self {
            Self::Child(child) => child.id(),
            Self::Left(process) => Some(process.pid()).filter(|_| process.is_alive()),
            Self::Elsewhere { .. } => None,
        };
        let pid = ours.and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid
            && let Err(error) = kill_process(pid, signal)
        {
            tracing::warn!(%error, "the signal did not reach the server");
        }
    }
}

/// Watches a server, or nothing.
pub struct Supervisor {
    watch: Option<JoinHandle<Result<(), SupervisorError>>>,
    stopped: CancellationToken,
    switch: Option<Switch>,
}

/// Stops the server for a while and starts it again.
#[derive(Clone)]
pub struct Switch {
    wanted: Arc<watch::Sender<bool>>,
    running: watch::Receiver<Running>,
}

/// What a [`Switch`] sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Running {
    No,
    Ours,
    Elsewhere,
}

/// What came of a [`Switch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Switched {
    Done,
    /// The server was started elsewhere, and is not ours to stop.
    Elsewhere,
    /// Somebody asked for the opposite meanwhile.
    Overruled,
}

impl Switch {
    /// Returns once the server has ended, or was started.
    pub async fn set(&self, run: bool) -> Switched {
        if *self.running.borrow() == Running::Elsewhere {
            return Switched::Elsewhere;
        }
        let (mut running, mut wanted) = (self.running.clone(), self.wanted.subscribe());
        let _ = self.wanted.send(run);
        tokio::select! {
            // An error means that nobody watches any more, and then nothing runs.
            _ = running.wait_for(|running| (*running != Running::No) == run) => Switched::Done,
            Ok(_) = wanted.wait_for(|wanted| *wanted != run) => Switched::Overruled,
        }
    }
}

impl Supervisor {
    /// Starts the server, if there is one, and tells what becomes of it. When it ends for good, `stop` is cancelled; when
    /// `stop` is cancelled, it is ended. One that runs already is watched as it is, and started once that has ended.
    ///
    /// # Errors
    /// When another sidecar watches a server on the data directory, or this one cannot be started.
    pub fn start(
        watched: Watched,
        clock: Arc<dyn Clock>,
        tell: Arc<dyn Fn(ServerStatus) + Send + Sync>,
        stop: CancellationToken,
    ) -> Result<Self, SupervisorError> {
        let stopped = CancellationToken::new();
        if watched.command.is_empty() {
            stopped.cancel();
            return Ok(Self { watch: None, stopped, switch: None });
        }
        let (wanted, wants) = watch::channel(true);
        let (runs, running) = watch::channel(Running::Ours);
        let mut watch = Watch { watched, clock, tell, stop, wants, runs, starts: 0 };
        // Before the first start: a signal that we ignore would be ignored by the server too.
        let signals = Signals::listen().map_err(SupervisorError::Signals)?;
        // The first start is made here, so that a wrong command fails at once.
        let server = watch.start()?;
        // However the watch ends, archiving ends after it.
        let ends = (stopped.clone().drop_guard(), watch.stop.clone().drop_guard());
        let task = tokio::spawn(async move {
            let _ends = ends;
            watch.run(server, signals).await
        });
        Ok(Self { watch: Some(task), stopped, switch: Some(Switch { wanted: Arc::new(wanted), running }) })
    }

    /// Cancelled once no server of ours runs any more.
    pub fn stopped(&self) -> CancellationToken {
        self.stopped.clone()
    }

    /// `None` where no server is watched.
    pub fn switch(&self) -> Option<Switch> {
        self.switch.clone()
    }

    /// Waits for the end of the watch.
    ///
    /// # Errors
    /// Why the server ended, if that was no good end.
    pub async fn end(self) -> Result<(), SupervisorError> {
        match self.watch {
            Some(task) => task.await.unwrap_or_else(|error| Err(SupervisorError::Watch(error.to_string()))),
            None => Ok(()),
        }
    }
}

/// What is passed on to the server.
struct Signals {
    /// `None` where it is ignored, as under nohup: the server ignores it too.
    hang_up: Option<tokio::signal::unix::Signal>,
    user_1: tokio::signal::unix::Signal,
    user_2: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        let is_ignored = ignored_signals() & 1 << (libc::SIGHUP - 1) != 0;
        Ok(Self {
            hang_up: (!is_ignored).then(|| signal(SignalKind::hangup())).transpose()?,
            user_1: signal(SignalKind::user_defined1())?,
            user_2: signal(SignalKind::user_defined2())?,
        })
    }

    async fn next(&mut self) -> Signal {
        tokio::select! {
            Some(()) = async { self.hang_up.as_mut()?.recv().await } => Signal::HUP,
            _ = self.user_1.recv() => Signal::USR1,
            _ = self.user_2.recv() => Signal::USR2,
        }
    }
}

struct Watch {
    watched: Watched,
    clock: Arc<dyn Clock>,
    tell: Arc<dyn Fn(ServerStatus) + Send + Sync>,
    stop: CancellationToken,
    wants: watch::Receiver<bool>,
    runs: watch::Sender<Running>,
    starts: u64,
}

/// Why a server is no longer watched.
enum Ended {
    /// By itself; with its status where it was our child.
    Itself(Option<ExitStatus>),
    /// It was asked to stop until it is asked for again.
    ForAWhile,
    /// With us.
    WithUs,
}

impl Watch {
    /// Starts the server, unless one runs.
    fn start(&mut self) -> Result<Server, SupervisorError> {
        let server = match self.watched.find()? {
            Some(server) => {
                let pid = server.pid();
                match server {
                    Server::Left(_) => {
                        tracing::warn!(pid, "a sidecar before this one left its server, which is watched on")
                    }
                    _ => tracing::warn!(pid, "a server that was started elsewhere runs; it is followed until it ends"),
                }
                server
            }
            None => {
                let child = self.spawn()?;
                self.watched.note(&child);
                self.starts += 1;
                Server::Child(child)
            }
        };
        let elsewhere = matches!(server, Server::Elsewhere { .. });
        let _ = self.runs.send_replace(if elsewhere { Running::Elsewhere } else { Running::Ours });
        Ok(server)
    }

    fn spawn(&self) -> Result<Child, SupervisorError> {
        let Some((program, arguments)) = self.watched.command.split_first() else {
            return Err(SupervisorError::Watch("there is no command".into()));
        };
        let start = |source| SupervisorError::Start { command: program.to_string_lossy().into_owned(), source };
        let mut command = Command::new(program);
        // Whatever becomes of us, the server stays: only `end` ends it.
        command.args(arguments).kill_on_drop(false);
        if let Some(output) = &self.watched.output {
            let errors = output.try_clone().map_err(start)?;
            let output = output.try_clone().map_err(start)?;
            command.stdin(Stdio::null()).stdout(output).stderr(errors);
        }
        command.spawn().map_err(start)
    }

    fn tell(&self, server: Option<&Server>, last_exit: Option<String>) {
        let elsewhere = matches!(server, Some(Server::Elsewhere { .. }));
        (self.tell)(ServerStatus { pid: server.and_then(Server::pid), starts: self.starts, last_exit, elsewhere });
    }

    async fn run(mut self, mut server: Server, mut signals: Signals) -> Result<(), SupervisorError> {
        let mut wait = Duration::from_secs(1);
        let mut last_exit: Option<String> = None;
        loop {
            let ran = Stopwatch::start();
            self.tell(Some(&server), last_exit.clone());
            let status = match self.watch(&mut server, &mut signals).await? {
                Ended::WithUs => {
                    let _ = self.runs.send_replace(Running::No);
                    return Ok(());
                }
                Ended::ForAWhile => {
                    tracing::info!("the server was stopped as asked, until it is asked for again");
                    self.tell(None, None);
                    let _ = self.runs.send_replace(Running::No);
                    tokio::select! {
                        true = async { self.wants.wait_for(|wanted| *wanted).await.is_ok() } => {}
                        () = self.stop.cancelled() => return Ok(()),
                    }
                    let mut at_once = Duration::ZERO;
                    match self.start_again(&mut at_once).await {
                        Some(started) => server = started,
                        None => return Ok(()),
                    }
                    continue;
                }
                Ended::Itself(status) => status,
            };
            last_exit = status.map(|status| status.to_string());
            self.tell(None, last_exit.clone());
            match status {
                // Ours has not had its first start yet.
                None => {
                    tracing::warn!("the server that ran before this sidecar has ended, and is started by this one");
                    wait = Duration::ZERO;
                }
                Some(status) if !self.restarts(status)? => return Ok(()),
                Some(status) => {
                    if ran.elapsed_ms() > STEADY {
                        wait = Duration::from_secs(1);
                    }
                    tracing::error!(%status, ?wait, "the server ended and is started again");
                }
            }
            match self.start_again(&mut wait).await {
                Some(started) => server = started,
                None => return Ok(()),
            }
        }
    }

    /// Watches until it ends.
    async fn watch(&mut self, server: &mut Server, signals: &mut Signals) -> Result<Ended, SupervisorError> {
        loop {
            let mut wants = self.wants.clone();
            tokio::select! {
                ended = server.wait(&self.watched, self.clock.as_ref()) => {
                    return ended.map(Ended::Itself).map_err(|error| SupervisorError::Watch(error.to_string()));
                }
                signal = signals.next() => server.send(signal),
                true = async { wants.wait_for(|wanted| !wanted).await.is_ok() } => {
                    self.end(server).await;
                    return Ok(Ended::ForAWhile);
                }
                () = self.stop.cancelled() => {
                    self.end(server).await;
                    self.tell(None, None);
                    return Ok(Ended::WithUs);
                }
            }
        }
    }

    /// Is a server that ended like this to be started again?
    fn restarts(&self, status: ExitStatus) -> Result<bool, SupervisorError> {
        match self.watched.restart {
            Restart::Always => Ok(true),
            Restart::OnFailure if !status.success() => Ok(true),
            _ if status.success() => {
                tracing::info!("the server has ended, and so do we");
                Ok(false)
            }
            _ => Err(SupervisorError::Ended(status)),
        }
    }

    /// Tries until it starts; `None` when told to stop. While it is not wanted, nothing is tried.
    async fn start_again(&mut self, wait: &mut Duration) -> Option<Server> {
        loop {
            let mut wants = self.wants.clone();
            tokio::select! {
                () = self.clock.sleep(*wait) => {}
                true = async { wants.wait_for(|wanted| !wanted).await.is_ok() } => {}
                () = self.stop.cancelled() => return None,
            }
            if !*self.wants.borrow() {
                let _ = self.runs.send_replace(Running::No);
                tokio::select! {
                    true = async { self.wants.wait_for(|wanted| *wanted).await.is_ok() } => {}
                    () = self.stop.cancelled() => return None,
                }
            }
            *wait = (*wait * 2).clamp(Duration::from_secs(1), self.watched.longest_wait.max(Duration::from_secs(1)));
            match self.start() {
                Ok(started) => return Some(started),
                Err(error) => tracing::error!(%error, ?wait, "the server is started again later"),
            }
        }
    }

    /// Asks, waits, and kills at last.
    async fn end(&self, server: &mut Server) {
        if let Server::Elsewhere { pid } = server {
            tracing::warn!(pid, "the server was started elsewhere and keeps running");
            return;
        }
        server.send(self.watched.stop_signal);
        let limit = self.watched.stop_timeout;
        tokio::select! {
            _ = server.wait(&self.watched, self.clock.as_ref()) => return,
            () = self.clock.sleep(limit) => {}
        }
        tracing::error!("the server did not stop within {limit:?} and is killed");
        server.send(Signal::KILL);
        if let Err(error) = server.wait(&self.watched, self.clock.as_ref()).await {
            tracing::error!(%error, "the server could not be killed");
        }
    }
}
