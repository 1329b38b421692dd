//! Where a deployment happens: on a server that runs already, or on one that is started for it on loopback.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::clock::{Clock, Stopwatch};
use crate::config::Config;
use crate::daemon::control::{self, Answer, Request};
use crate::daemon::state::StateDir;
use crate::datadir::lock::{self, ServerLock};
use crate::deploy::journal::Restarter;
use crate::deploy::{DeployError, Mode, Setup};
use crate::durable::owner::{Given, Owner};
use crate::durable::{self, FileError};
use crate::standalone::command::Binary;
use crate::standalone::temporary::TemporaryServer;
use crate::standalone::{StandaloneError, background, ready};

/// Between two looks at a process.
const LOOK: std::time::Duration = std::time::Duration::from_millis(50);

/// A server, and who can stop it.
pub struct Host {
    /// What leads to it.
    pub config: Config,
    kind: Kind,
    clock: Arc<dyn Clock>,
    data_dir: Option<PathBuf>,
    state_dir: StateDir,
    /// What makes this program watch the server in the background.
    watch: Vec<OsString>,
}

enum Kind {
    Temporary(Option<Box<TemporaryServer>>, Ownership),
    Background,
    Sidecar,
    Elsewhere,
}

/// To whom belongs what a temporary server, which runs as we do, writes.
struct Ownership(Vec<(PathBuf, Owner)>);

impl Ownership {
    /// Looks before the server starts. Keys that are there have their owner.
    fn of(config: &Config, data_dir: &Path) -> Result<Self, FileError> {
        let owner = if data_dir.exists() { Owner::of(data_dir)? } else { Owner::for_new(data_dir)? };
        let private = config.spacetimedb_config.keys_of(data_dir).private;
        let keys = Some(durable::parent(&private)).filter(|dir| !dir.exists());
        Ok(Self(std::iter::once(data_dir.to_owned()).chain(keys).map(|dir| (dir, owner)).collect()))
    }

    /// Gives what the server wrote to the owner of the rest: else a server that runs as that one could not open it.
    fn keep(&self) -> Result<(), FileError> {
        for (dir, owner) in self.0.iter().filter(|(dir, _)| dir.exists()) {
            if owner.give_ours(dir)? == Given::Refused {
                let (dir, uid) = (dir.display(), owner.uid);
                tracing::warn!(%dir, uid, "what the deployment wrote cannot be given to the directory's owner: `chown -R` it");
            }
        }
        Ok(())
    }
}

/// Also when the deployment ends early.
impl Drop for Ownership {
    fn drop(&mut self) {
        if let Err(error) = self.keep() {
            tracing::warn!(%error, "what the deployment wrote was not given to the directory's owner");
        }
    }
}

/// A server that starts or stops holds its directory and does not answer, for no longer than this.
const CHANGE_LIMIT: Duration = Duration::from_secs(10);
const CHANGE_LOOK: Duration = Duration::from_millis(200);

/// Does a server run on `data_dir`? One that is starting is waited for, and so is the end of one that is stopping.
async fn runs(config: &Config, data_dir: &Path, clock: &dyn Clock) -> Result<bool, DeployError> {
    let waited = Stopwatch::start();
    loop {
        let ServerLock::Held { .. } = lock::probe_file(&data_dir.join("spacetime.pid"))? else { return Ok(false) };
        match ready::health(config).await {
            Ok(_) => return Ok(true),
            Err(error) if waited.elapsed_seconds() > CHANGE_LIMIT.as_secs_f64() => {
                return Err(DeployError::Silent { data_dir: data_dir.to_owned(), error });
            }
            Err(_) => clock.sleep(CHANGE_LOOK).await,
        }
    }
}

impl Host {
    /// Finds the server of the configuration, or starts one on the data directory. `announce` hears of its port first.
    ///
    /// # Errors
    /// When a server runs and does not answer, or none can be started.
    pub async fn open(
        config: &Config,
        data_dir: Option<&Path>,
        state_dir: &StateDir,
        watch: Vec<OsString>,
        clock: Arc<dyn Clock>,
        announce: impl FnOnce(u16) -> Result<(), StandaloneError>,
    ) -> Result<Self, DeployError> {
        let mut host = Self {
            config: config.clone(),
            kind: Kind::Elsewhere,
            clock: Arc::clone(&clock),
            data_dir: data_dir.map(Path::to_owned),
            state_dir: state_dir.clone(),
            watch,
        };
        let Some(data_dir) = data_dir else {
            ready::health(config).await?;
            return Ok(host);
        };
        if runs(config, data_dir, clock.as_ref()).await? {
            host.kind = if background::is_ours(config, data_dir)? {
                Kind::Background
            } else if background::is_of_sidecar(config, data_dir).await {
                Kind::Sidecar
            } else {
                Kind::Elsewhere
            };
            return Ok(host);
        }
        let binary = Binary::find(config)?;
        let ownership = Ownership::of(config, data_dir)?;
        let log = state_dir.path().join("deploy-server.log");
        let limit = config.deploy.timeout.0.0;
        let server = TemporaryServer::start(&binary, config, data_dir, &log, clock.as_ref(), limit, announce).await?;
        host.config = server.config.clone();
        host.kind = Kind::Temporary(Some(Box::new(server)), ownership);
        Ok(host)
    }

    /// The server that was stopped for a rollback which did not end.
    pub fn stopped(setup: &Setup, restarter: Restarter) -> Self {
        Self {
            config: setup.config.clone(),
            kind: match restarter {
                Restarter::Background => Kind::Background,
                Restarter::Sidecar => Kind::Sidecar,
            },
            clock: Arc::clone(&setup.clock),
            data_dir: setup.data_dir.clone(),
            state_dir: setup.state_dir.clone(),
            watch: setup.watch.clone(),
        }
    }

    /// Who starts it again once it was stopped; nobody for one that is there for the deployment alone.
    pub fn restarter(&self) -> Option<Restarter> {
        match self.kind {
            Kind::Background => Some(Restarter::Background),
            Kind::Sidecar => Some(Restarter::Sidecar),
            Kind::Temporary(..) | Kind::Elsewhere => None,
        }
    }

    pub fn mode(&self) -> Mode {
        if matches!(self.kind, Kind::Temporary(..)) { Mode::Deployment } else { Mode::Online }
    }

    /// Can we stop it, to take its files back?
    pub fn can_stop(&self) -> bool {
        self.data_dir.is_some() && !matches!(self.kind, Kind::Elsewhere)
    }

    /// # Errors
    /// When it does not stop.
    pub async fn stop(&mut self) -> Result<(), DeployError> {
        let Some(data_dir) = &self.data_dir else { return Ok(()) };
        match &mut self.kind {
            Kind::Temporary(server, ownership) => {
                if let Some(server) = server.take() {
                    server.stop(self.clock.as_ref()).await;
                    ownership.keep()?;
                }
            }
            Kind::Background => drop(background::stop(&self.config, data_dir, self.clock.as_ref(), None).await?),
            Kind::Sidecar => self.switch(false).await?,
            Kind::Elsewhere => {}
        }
        Ok(())
    }

    /// Starts what [`Self::stop`] has stopped; a server that was there for the deployment alone stays away.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn start_again(&mut self) -> Result<(), DeployError> {
        let (Some(data_dir), limit) = (&self.data_dir, self.config.deploy.timeout.0.0) else { return Ok(()) };
        match &self.kind {
            Kind::Background => {
                background::start(&self.config, data_dir, &self.watch, self.clock.as_ref(), limit).await?;
            }
            Kind::Sidecar => {
                self.switch(true).await?;
                if !ready::wait(&self.config, self.clock.as_ref(), limit, || false).await {
                    let (url, log) = (self.config.spacetimedb_config.server_url(), self.state_dir.path().to_owned());
                    return Err(StandaloneError::NotReady { url, limit, log }.into());
                }
            }
            Kind::Temporary(..) | Kind::Elsewhere => {}
        }
        Ok(())
    }

    async fn switch(&self, run: bool) -> Result<(), DeployError> {
        match control::ask(&self.state_dir.socket(), &Request::Server { run }).await {
            Ok(Some(Answer::Done)) => Ok(()),
            Ok(Some(Answer::Failed(message))) => Err(DeployError::Daemon(message)),
            Ok(_) => Err(DeployError::Daemon("the daemon does not watch the server".into())),
            Err(error) => Err(DeployError::Daemon(error.to_string())),
        }
    }
}

/// Ends a server that an earlier deployment started and left when it was killed: one that was told to serve this directory
/// at the port that was chosen for it, and no other.
///
/// # Errors
/// When it does not end.
pub async fn end_orphan(data_dir: &Path, port: u16, clock: &dyn Clock) -> Result<(), DeployError> {
    let address = format!("127.0.0.1:{port}");
    for signal in [crate::standalone::temporary::STOP, rustix::process::Signal::KILL] {
        for round in 0..100 {
            let Some(pid) = server_process(data_dir, &address) else { return Ok(()) };
            if round == 0 {
                tracing::warn!(pid, "a server that a deployment left is ended");
                background::signal(pid, signal);
            }
            clock.sleep(LOOK).await;
        }
    }
    match server_process(data_dir, &address) {
        Some(pid) => Err(StandaloneError::Stuck { pid }.into()),
        None => Ok(()),
    }
}

/// The process whose command line names this directory and this address.
fn server_process(data_dir: &Path, address: &str) -> Option<u32> {
    // The run that started it may have named the directory otherwise.
    let data_dir = durable::canonical(data_dir);
    let is_data_dir = |word: &[u8]| {
        let path = Path::new(OsStr::from_bytes(word));
        path.is_absolute() && durable::canonical(path) == data_dir
    };
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.into_iter().find(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        words.clone().any(|word| word == address.as_bytes()) && words.any(is_data_dir)
    })
}
