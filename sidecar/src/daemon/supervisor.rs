//! The server as a child: started, watched, started again when it fails, stopped with us.
//!
//! Invariants: signals meant for the server reach it; told to stop, it is asked first and killed only when it does not end;
//! a server that fails at once is not started in a tight loop.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, Stopwatch};
use crate::config::Restart;
use crate::daemon::DaemonOptions;
use crate::daemon::state::{ServerStatus, State};
use crate::datadir::lock::{self, ServerLock};

/// A server that was asked to stop is killed after this long.
const STOP_LIMIT: Duration = Duration::from_secs(6);
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

/// Watches a server, or nothing.
pub struct Supervisor {
    watch: Option<JoinHandle<Result<(), SupervisorError>>>,
    stopped: CancellationToken,
}

impl Supervisor {
    /// Starts the server of `options`, if there is one. When it ends for good, `stop` is cancelled; when `stop` is
    /// cancelled, it is ended.
    ///
    /// # Errors
    /// When another server runs on the data directory, or this one cannot be started.
    pub(super) fn start(
        options: &DaemonOptions,
        clock: Arc<dyn Clock>,
        state: Arc<State>,
        stop: CancellationToken,
    ) -> Result<Self, SupervisorError> {
        let stopped = CancellationToken::new();
        let Some((program, arguments)) = options.server.split_first() else {
            stopped.cancel();
            return Ok(Self { watch: None, stopped });
        };
        if let Ok(ServerLock::Held { pid }) = lock::probe_file(&options.data_dir.join("spacetime.pid")) {
            let pid = pid.map_or("unknown".into(), |pid| pid.to_string());
            return Err(SupervisorError::Running { path: options.data_dir.clone(), pid });
        }
        let watch = Watch {
            program: program.clone(),
            arguments: arguments.to_vec(),
            restart: options.config.spacetimedb_config.restart,
            longest_wait: options.config.spacetimedb_config.restart_backoff_max.0,
            clock,
            state,
            stop,
            starts: 0,
        };
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
        Ok(Self { watch: Some(task), stopped })
    }

    /// Cancelled once no server of ours runs any more.
    pub(super) fn stopped(&self) -> CancellationToken {
        self.stopped.clone()
    }

    pub(super) async fn end(self) -> Result<(), SupervisorError> {
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
    program: OsString,
    arguments: Vec<OsString>,
    restart: Restart,
    longest_wait: Duration,
    clock: Arc<dyn Clock>,
    state: Arc<State>,
    stop: CancellationToken,
    starts: u64,
}

impl Watch {
    fn spawn(&self) -> Result<Child, SupervisorError> {
        let child = Command::new(&self.program).args(&self.arguments).kill_on_drop(true).spawn();
        child.map_err(|source| SupervisorError::Start { command: self.program.to_string_lossy().into_owned(), source })
    }

    async fn run(mut self, mut child: Child, mut signals: Signals) -> Result<(), SupervisorError> {
        let mut wait = Duration::from_secs(1);
        let mut last_exit: Option<String> = None;
        loop {
            self.starts += 1;
            let ran = Stopwatch::start();
            self.state.server(ServerStatus { pid: child.id(), starts: self.starts, last_exit: last_exit.clone() });
            let ended = loop {
                tokio::select! {
                    ended = child.wait() => break ended,
                    signal = signals.next() => send(&child, signal),
                    () = self.stop.cancelled() => {
                        self.end(&mut child).await;
                        self.state.server(ServerStatus { pid: None, starts: self.starts, last_exit: None });
                        return Ok(());
                    }
                }
            };
            let status = ended.map_err(|error| SupervisorError::Watch(error.to_string()))?;
            last_exit = Some(status.to_string());
            self.state.server(ServerStatus { pid: None, starts: self.starts, last_exit: last_exit.clone() });
            match self.restart {
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
                wait = (wait * 2).min(self.longest_wait);
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
        send(child, Signal::TERM);
        tokio::select! {
            _ = child.wait() => return,
            () = self.clock.sleep(STOP_LIMIT) => {}
        }
        tracing::error!("the server did not stop within {STOP_LIMIT:?} and is killed");
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
