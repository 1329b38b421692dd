//! The server as a child: started, watched, started again when it fails, stopped with us; or for a while, when asked.
//!
//! Invariants: signals meant for the server reach it; told to stop, it is asked first and killed only when it does not end;
//! a server that fails at once is not started in a tight loop.

use std::ffi::OsString;
use std::io::PipeWriter;
use std::path::PathBuf;
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

/// A server that ran so long starts anew without a growing wait.
const STEADY: u64 = 60_000;

/// What can go wrong with the server.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    #[error("start the server `{command}`: {source}")]
    Start { command: String, source: std::io::Error },
    #[error("a server (process {pid}) runs on {}; stop it, or run without a server command to follow it", path.display())]
    Running { path: PathBuf, pid: String },
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
    running: watch::Receiver<bool>,
}

impl Switch {
    /// Returns once the server has ended, or was started.
    pub async fn set(&self, run: bool) {
        let _ = self.wanted.send(run);
        let mut running = self.running.clone();
        // An error means that nobody watches any more, and then nothing runs.
        let _ = running.wait_for(|running| *running == run).await;
    }
}

impl Supervisor {
    /// Starts the server, if there is one, and tells what becomes of it. When it ends for good, `stop` is cancelled; when
    /// `stop` is cancelled, it is ended.
    ///
    /// # Errors
    /// When another server runs on the data directory, or this one cannot be started.
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
        if let Ok(ServerLock::Held { pid }) = lock::probe_file(&watched.data_dir.join("spacetime.pid")) {
            let pid = pid.map_or("unknown".into(), |pid| pid.to_string());
            return Err(SupervisorError::Running { path: watched.data_dir, pid });
        }
        let (wanted, wants) = watch::channel(true);
        let (runs, running) = watch::channel(true);
        let watch = Watch { watched, clock, tell, stop, wants, runs, starts: 0 };
        // Before the first start: a signal that we ignore, as under nohup, would be ignored by the server for ever.
        let signals = Signals::listen().map_err(SupervisorError::Signals)?;
        // The first start is made here, so that a wrong command fails at once.
        let child = watch.spawn()?;
        let done = stopped.clone();
        let task = tokio::spawn(async move {
            let stop = watch.stop.clone();
            let result = watch.run(child, signals).await;
            done.cancel();
            stop.cancel();
            result
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
    hang_up: tokio::signal::unix::Signal,
    user_1: tokio::signal::unix::Signal,
    user_2: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            hang_up: signal(SignalKind::hangup())?,
            user_1: signal(SignalKind::user_defined1())?,
            user_2: signal(SignalKind::user_defined2())?,
        })
    }

    async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.hang_up.recv() => Signal::HUP,
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
    runs: watch::Sender<bool>,
    starts: u64,
}

impl Watch {
    fn spawn(&self) -> Result<Child, SupervisorError> {
        let Some((program, arguments)) = self.watched.command.split_first() else {
            return Err(SupervisorError::Watch("there is no command".into()));
        };
        let start = |source| SupervisorError::Start { command: program.to_string_lossy().into_owned(), source };
        let mut command = Command::new(program);
        command.args(arguments).kill_on_drop(true);
        if let Some(output) = &self.watched.output {
            let errors = output.try_clone().map_err(start)?;
            let output = output.try_clone().map_err(start)?;
            command.stdin(Stdio::null()).stdout(output).stderr(errors);
        }
        command.spawn().map_err(start)
    }

    fn tell(&self, pid: Option<u32>, last_exit: Option<String>) {
        (self.tell)(ServerStatus { pid, starts: self.starts, last_exit });
    }

    async fn run(mut self, mut child: Child, mut signals: Signals) -> Result<(), SupervisorError> {
        let mut wait = Duration::from_secs(1);
        let mut last_exit: Option<String> = None;
        loop {
            self.starts += 1;
            let ran = Stopwatch::start();
            self.tell(child.id(), last_exit.clone());
            let ended = loop {
                let mut wants = self.wants.clone();
                tokio::select! {
                    ended = child.wait() => break Some(ended),
                    signal = signals.next() => send(&child, signal),
                    true = async { wants.wait_for(|wanted| !wanted).await.is_ok() } => {
                        self.end(&mut child).await;
                        break None;
                    }
                    () = self.stop.cancelled() => {
                        self.end(&mut child).await;
                        self.tell(None, None);
                        return Ok(());
                    }
                }
            };
            let Some(ended) = ended else {
                tracing::info!("the server was stopped as asked, until it is asked for again");
                self.tell(None, None);
                let _ = self.runs.send(false);
                tokio::select! {
                    true = async { self.wants.wait_for(|wanted| *wanted).await.is_ok() } => {}
                    () = self.stop.cancelled() => return Ok(()),
                }
                child = self.spawn()?;
                let _ = self.runs.send(true);
                continue;
            };
            let status = ended.map_err(|error| SupervisorError::Watch(error.to_string()))?;
            last_exit = Some(status.to_string());
            self.tell(None, last_exit.clone());
            match self.watched.restart {
                Restart::Always => {}
                Restart::OnFailure if !status.success() => {}
                _ if status.success() => {
                    tracing::info!("the server has ended, and so do we");
                    return Ok(());
                }
                _ => return Err(SupervisorError::Ended(status)),
            }
            if ran.elapsed_ms() > STEADY {
                wait = Duration::from_secs(1);
            }
            tracing::error!(%status, ?wait, "the server ended and is started again");
            loop {
                tokio::select! {
                    () = self.clock.sleep(wait) => {}
                    () = self.stop.cancelled() => return Ok(()),
                }
                wait = (wait * 2).min(self.watched.longest_wait);
                match self.spawn() {
                    Ok(started) => {
                        child = started;
                        break;
                    }
                    Err(error) => tracing::error!(%error, ?wait, "the server is started again later"),
                }
            }
        }
    }

    /// Asks, waits, and kills at last.
    async fn end(&self, child: &mut Child) {
        send(child, self.watched.stop_signal);
        let limit = self.watched.stop_timeout;
        tokio::select! {
            _ = child.wait() => return,
            () = self.clock.sleep(limit) => {}
        }
        tracing::error!("the server did not stop within {limit:?} and is killed");
        if let Err(error) = child.kill().await {
            tracing::error!(%error, "the server could not be killed");
        }
    }
}

fn send(child: &Child, signal: Signal) {
    let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
    if let Some(pid) = pid
        && let Err(error) = kill_process(pid, signal)
    {
        tracing::warn!(%error, "the signal did not reach the server");
    }
}
