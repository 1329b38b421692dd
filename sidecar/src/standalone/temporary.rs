//! A server for the length of a deployment or a drill: on loopback only, ended with us.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use crate::clock::{Clock, Stopwatch};
use crate::config::Config;
use crate::datadir::lock::{self, ServerLock};
use crate::durable::OnPath;
use crate::standalone::command::Binary;
use crate::standalone::{StandaloneError, bound, logfile, ready, settings};

/// A server that is ready.
pub struct TemporaryServer {
    child: Child,
    /// The configuration that leads to it.
    pub config: Config,
    stop_timeout: Duration,
}

impl TemporaryServer {
    /// Starts a server on `data_dir` at a port of the loopback interface and waits until it is ready. `announce` hears of
    /// the port before anything is started, so that a server which outlives us can be known again.
    ///
    /// # Errors
    /// When another server runs there, or this one does not come up.
    pub async fn start(
        binary: &Binary,
        config: &Config,
        data_dir: &Path,
        log: &Path,
        clock: &dyn Clock,
        limit: Duration,
        announce: impl FnOnce(u16) -> Result<(), StandaloneError>,
    ) -> Result<Self, StandaloneError> {
        if let ServerLock::Held { pid } = lock::probe_file(&data_dir.join("spacetime.pid"))? {
            return Err(StandaloneError::Running { path: data_dir.to_owned(), pid });
        }
        binary.check(data_dir)?;
        let port = free_port().on("find a free port for", data_dir)?;
        announce(port)?;
        settings::set_log_level(data_dir, config.spacetimedb_config.log_level)?;
        let mut config = config.clone();
        config.spacetimedb_config.url = Some(format!("http://127.0.0.1:{port}"));
        config.spacetimedb_config.ca_file = None;
        let line = binary.serve(&config, data_dir, &format!("127.0.0.1:{port}"));
        let output = std::fs::File::create(log).on("create", log)?;
        let errors = output.try_clone().on("open", log)?;
        let mut command = Command::new(&line[0]);
        command.args(&line[1..]).stdin(Stdio::null()).stdout(output).stderr(errors).kill_on_drop(true);
        // What ends us from a terminal ends us first, and then we end the server.
        command.process_group(0);
        let start = |source| StandaloneError::Start { program: PathBuf::from(&line[0]), source };
        let child = bound::spawn(command).await.map_err(start)?;
        let mut server = Self { child, config, stop_timeout: Duration::ZERO };
        server.stop_timeout = server.config.spacetimedb_config.stop_timeout.0;
        let mut ended = None;
        let is_ready = ready::wait(&server.config, clock, limit, || {
            ended = server.child.try_wait().ok().flatten();
            ended.is_some()
        });
        if is_ready.await {
            return Ok(server);
        }
        match ended {
            Some(status) => Err(StandaloneError::Ended { status: status.to_string(), said: logfile::tail(log) }),
            None => {
                let url = server.config.spacetimedb_config.server_url();
                server.stop(clock).await;
                Err(StandaloneError::NotReady { url, limit, log: log.to_owned() })
            }
        }
    }

    /// Ends it at once, where what it serves is thrown away.
    pub async fn kill(mut self) {
        if let Err(error) = self.child.kill().await {
            tracing::error!(%error, "the server could not be killed");
        }
    }

    fn ask_to_end(&self) {
        let pid = self.child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            let _ = kill_process(pid, STOP);
        }
    }

    /// Asks it to end, and kills it when it does not.
    pub async fn stop(mut self, clock: &dyn Clock) {
        self.ask_to_end();
        tokio::select! {
            _ = self.child.wait() => return,
            () = clock.sleep(self.stop_timeout) => {}
        }
        tracing::warn!("the server did not stop within {:?} and is killed", self.stop_timeout);
        if let Err(error) = self.child.kill().await {
            tracing::error!(%error, "the server could not be killed");
        }
    }
}

impl Drop for TemporaryServer {
    /// Work that is cut off by a signal leaves no server, and no files that a server still writes.
    fn drop(&mut self) {
        let waited = Stopwatch::start();
        let limit = self.stop_timeout.min(DROP_LIMIT);
        self.ask_to_end();
        while self.child.id().is_some() && matches!(self.child.try_wait(), Ok(None)) {
            if waited.elapsed_seconds() > limit.as_secs_f64() {
                // The runtime takes its end.
                let _ = self.child.start_kill();
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A server whose work was cut off has this long to end.
const DROP_LIMIT: Duration = Duration::from_secs(5);

/// The server ends in good order on an interrupt, and at once on anything else.
pub const STOP: Signal = Signal::INT;

/// A port of the loopback interface that nobody listens on.
///
/// # Errors
/// When there is none.
pub fn free_port() -> std::io::Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
