//! What a deployment works with: the configuration, the place, who keeps what must not be lost; and what is asked of them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::clock::Clock;
use crate::config::Config;
use crate::daemon::state::StateDir;
use crate::database::control::HostType;
use crate::datadir::{DataDir, DataDirError};
use crate::deploy::host::Host;
use crate::deploy::journal::Journal;
use crate::deploy::keeper::Keeper;
use crate::deploy::record::{self, DeploymentRecord};
use crate::deploy::{DeployError, Outcome, blocking, cut};
use crate::durable::{self, OnPath, beside, parent};
use crate::ids::{ContentHash, Identity, Offset};
use crate::observe::server::Database;
use crate::progress::Progress;
use crate::standalone::StandaloneError;

/// Everything that a deployment works with.
pub struct Setup {
    pub config: Config,
    pub name: String,
    /// `None` for a server on another machine.
    pub data_dir: Option<PathBuf>,
    pub state_dir: StateDir,
    /// Where the token is of an identity that a deployment takes for itself, if the configuration has none.
    pub token_path: PathBuf,
    pub keeper: Keeper,
    /// Take back what a failed step has changed.
    pub rollback: bool,
    /// Publish a module of the server's next major release over one of the release before.
    pub major_upgrade: bool,
    /// What makes this program watch the server in the background.
    pub watch: Vec<OsString>,
    pub clock: Arc<dyn Clock>,
    pub progress: Arc<dyn Progress>,
}

impl Setup {
    pub(super) fn dir(&self) -> &Path {
        self.state_dir.path()
    }

    pub(super) async fn open_host(
        &self,
        announce: impl FnOnce(u16) -> Result<(), StandaloneError>,
    ) -> Result<Host, DeployError> {
        let (data_dir, clock) = (self.data_dir.as_deref(), Arc::clone(&self.clock));
        Host::open(&self.config, data_dir, &self.state_dir, self.watch.clone(), clock, announce).await
    }

    pub(super) async fn open_host_without_database(
        &self,
        announce: impl FnOnce(u16) -> Result<(), StandaloneError>,
    ) -> Result<Host, DeployError> {
        let mut config = self.config.clone();
        config.spacetimedb_config.database = None;
        let (data_dir, clock) = (self.data_dir.as_deref(), Arc::clone(&self.clock));
        Host::open(&config, data_dir, &self.state_dir, self.watch.clone(), clock, announce).await
    }

    /// One at a time.
    pub(super) fn lock(&self) -> Result<std::fs::File, DeployError> {
        let path = self.dir().join("deploy.lock");
        let file = std::fs::File::options().create(true).truncate(false).write(true).open(&path).on("open", &path)?;
        file.try_lock().map_err(|_| DeployError::Busy)?;
        Ok(file)
    }

    /// The database, asked with the configured token, or else with an identity of the sidecar's own.
    pub(super) async fn database(&self, host: &Host) -> Result<Database, DeployError> {
        let config = &host.config;
        let database = Database::new(&config.spacetimedb_config, &config.server_config, &self.name)?;
        if database.has_token() {
            return Ok(database);
        }
        let path = &self.token_path;
        // One that was taken before a file was named stays the database's owner.
        for known in [path, &own_token(self.dir())] {
            if let Ok(token) = std::fs::read_to_string(known)
                && !token.trim().is_empty()
            {
                if known != path {
                    keep_token(path, token.trim())?;
                }
                return Ok(database.with_token(token.trim()));
            }
        }
        let made = database.new_identity().await?;
        keep_token(path, &made.token)?;
        tracing::info!(identity = made.identity, file = %path.display(), "an identity of our own was taken");
        Ok(database.with_token(&made.token))
    }
}

/// Where the sidecar's own token is, of an identity that a deployment has taken.
pub fn own_token(state_dir: &Path) -> PathBuf {
    state_dir.join("token")
}

fn keep_token(path: &Path, token: &str) -> Result<(), DeployError> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let new = beside(path, ".new");
    let write = || {
        // One that a crash left, or that somebody put there to read what is written.
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(token.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        std::fs::File::open(parent(path))?.sync_all()
    };
    write().map_err(|source| DeployError::Token { path: path.to_owned(), source })
}

impl Setup {
    /// The files of the database, where they are at hand.
    pub(super) async fn replica(
        &self,
        journal: &Journal,
    ) -> Result<Option<(DataDir, crate::datadir::ReplicaDir)>, DeployError> {
        let (Some(root), Some(identity)) = (&self.data_dir, journal.identity) else { return Ok(None) };
        let data = match DataDir::open(root) {
            Err(DataDirError::Missing(_) | DataDirError::NotSpacetime { .. }) => return Ok(None),
            data => data?,
        };
        let copy = {
            let data = data.clone();
            blocking(move || crate::datadir::control_db::ControlDbCopy::take(&data)).await??
        };
        let replica = copy.databases.iter().find(|database| database.identity == identity);
        let replica = replica.and_then(|database| database.replica).map(|id| data.replica(id));
        Ok(replica.map(|replica| (data, replica)))
    }

    /// Every database on the data directory.
    pub(super) async fn databases(&self) -> Result<Vec<Identity>, DeployError> {
        let Some(Ok(data)) = self.data_dir.as_deref().map(DataDir::open) else { return Ok(Vec::new()) };
        let copy = blocking(move || crate::datadir::control_db::ControlDbCopy::take(&data)).await??;
        Ok(copy.databases.iter().map(|database| database.identity).collect())
    }

    pub(super) fn keep_program(&self, hash: &ContentHash, bytes: &[u8]) -> Result<(), DeployError> {
        let path = record::local(self.dir(), hash);
        let folder = durable::parent(&path);
        std::fs::create_dir_all(&folder).on("create", &folder)?;
        Ok(durable::replace(&path, bytes)?)
    }

    pub(super) async fn publish_offset(&self, journal: &Journal) -> Option<Offset> {
        let (from, module) = (journal.log_end?, journal.module);
        let (_, replica) = self.replica(journal).await.ok().flatten()?;
        let published = blocking(move || cut::find_publish(&replica, from, &module)).await.ok()?.ok()?;
        published.map(|published| published.offset)
    }

    /// Writes the history, and the programs that it names.
    pub(super) async fn record(
        &self,
        journal: &Journal,
        outcome: Outcome,
        message: &str,
        publish_offset: Option<Offset>,
        host: Option<&Host>,
    ) -> Result<(), DeployError> {
        let Some(database) = journal.identity else { return Ok(()) };
        let (mut server_version, mut deployed_by) = (None, None);
        if let Some(host) = host {
            let health = crate::standalone::ready::health(&host.config).await.ok();
            server_version = health.and_then(|health| health.version);
            deployed_by = self.database(host).await.ok().and_then(|database| database.token_identity());
        }
        let program = tokio::fs::read(record::local(self.dir(), &journal.module)).await;
        let record = DeploymentRecord {
            format: 1,
            id: journal.id,
            database,
            name: journal.name.clone(),
            module: journal.module,
            host_type: program.map_or_else(|_| HostType::default(), |bytes| HostType::of(&bytes)),
            previous: journal.previous,
            mode: journal.mode,
            outcome,
            deployed_by,
            started_at: journal.started_at,
            ended_at: self.clock.now(),
            restore_point: journal.restore_point,
            publish_offset,
            server_version,
            tool_version: env!("CARGO_PKG_VERSION").to_owned(),
            message: message.to_owned(),
        };
        let programs = [Some(journal.module), journal.previous].into_iter().flatten();
        let programs: Vec<_> =
            programs.map(|hash| record::local(self.dir(), &hash)).filter(|path| path.is_file()).collect();
        self.keeper.record(self, record, programs).await
    }

    /// What other verbs on this data directory take for the database where none is named.
    pub(super) fn remember_deployed(&self, journal: &Journal) -> Result<(), DeployError> {
        Ok(durable::replace(&self.dir().join(DEPLOYED), journal.name.as_bytes())?)
    }
}

/// The name of the database that was deployed, in the state directory.
const DEPLOYED: &str = "deployed";

/// The database that was deployed to a data directory last.
pub fn deployed_name(state_dir: &Path) -> Option<String> {
    let text = std::fs::read_to_string(state_dir.join(DEPLOYED)).ok()?;
    Some(text.trim().to_owned()).filter(|name| !name.is_empty())
}
