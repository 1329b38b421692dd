//! What a deployment tells: how it ended, step by step, or why it did not.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backup::BackupError;
use crate::clock::Stopwatch;
use crate::datadir::DataDirError;
use crate::deploy::configure::Changes;
use crate::deploy::migration::Migration;
use crate::durable::FileError;
use crate::ids::{ContentHash, Identity, RestorePointId};
use crate::observe::server::SourceError;
use crate::progress::Progress;
use crate::repository::RepositoryError;
use crate::restore::RestoreError;
use crate::standalone::StandaloneError;

/// What can go wrong with a deployment.
#[derive(Debug, thiserror::Error)]
pub enum DeployError {
    #[error("no module is named; give --module-path FILE, or set module_config.module_path or build_module")]
    NoModule,
    #[error("module_config.build_module is on and no source directory is named; set module_config.module_dir")]
    NoModuleDir,
    #[error("the module in {} does not build:\n{reason}", dir.display())]
    Build { dir: PathBuf, reason: String },
    #[error("{}: {reason}", path.display())]
    Module { path: PathBuf, reason: String },
    #[error("another deployment works on this; wait for it")]
    Busy,
    #[error("a server runs on {} and does not answer: {error}", data_dir.display())]
    Silent { data_dir: PathBuf, error: SourceError },
    #[error("the server would refuse the module, nothing was changed: {0}")]
    Breaking(String),
    #[error(
        "the module is built for the server's next major release, so that clients with older bindings may not understand it; \
         nothing was changed: deploy with --major-upgrade once they are ready"
    )]
    MajorUpgrade,
    #[error(
        "`{name}` belongs to another identity than this token's; give the owner's with --token-file, \
         which may be the `cli.toml` of the `spacetime` CLI"
    )]
    NotOwner { name: String },
    #[error("the deployment does not pass its verification: {0}")]
    Verification(String),
    #[error("{reason}; {done}")]
    RolledBack { reason: String, done: String },
    #[error("{reason}; and what was changed could not be taken back: {error}; run `inner-universe deploy rollback`")]
    NotRolledBack { reason: String, error: String },
    #[error("the program {0} is neither on this machine nor in the repository")]
    NoProgram(ContentHash),
    #[error("nothing that was deployed to `{0}` can be taken back: its history holds no earlier program")]
    NothingToUndo(String),
    #[error(
        "the older program does not take the tables that are there ({0}); `deploy rollback --data` takes the rows back too, \
         to right before the publish"
    )]
    NeedsData(String),
    #[error("rows can be taken back only where the server can be stopped: stop it, and roll back in deployment mode")]
    CannotStop,
    #[error("the daemon could not help: {0}")]
    Daemon(String),
    #[error("write the token in {}: {source}", path.display())]
    Token { path: PathBuf, source: std::io::Error },
    #[error(transparent)]
    Server(#[from] SourceError),
    #[error(transparent)]
    Standalone(#[from] StandaloneError),
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    #[error(transparent)]
    Backup(#[from] BackupError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("a worker failed: {0}")]
    Worker(String),
}

/// How a deployment reaches the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// On a server that is started for it, on loopback only.
    Deployment,
    /// On the server that runs.
    Online,
}

/// How a deployment ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    Deployed,
    /// All was as it should be already.
    Unchanged,
    /// A step failed, and everything is as before.
    RolledBack,
    /// A step failed, and what was changed stays: `--no-rollback`.
    Failed,
    /// An earlier deployment was taken back.
    Undone,
}

/// What a deployment did. Field names are stable.
#[derive(Debug, Clone, Serialize)]
pub struct DeployReport {
    pub deployment: RestorePointId,
    pub database: Identity,
    pub name: String,
    pub mode: Mode,
    pub outcome: Outcome,
    pub module: ContentHash,
    pub previous: Option<ContentHash>,
    pub migration: Migration,
    pub changes: Changes,
    pub restore_point: Option<RestorePointId>,
    pub steps: Vec<StepReport>,
    /// What the operator should know although all went well.
    pub problems: Vec<String>,
    pub duration_ms: u64,
}

/// One step that was taken.
#[derive(Debug, Clone, Serialize)]
pub struct StepReport {
    pub step: &'static str,
    pub message: String,
    pub duration_ms: u64,
}

/// Collects what was done.
pub(super) struct Steps {
    pub(super) progress: Arc<dyn Progress>,
    pub(super) done: Vec<StepReport>,
}

impl Steps {
    pub(super) async fn take<T>(
        &mut self,
        step: &'static str,
        work: impl Future<Output = Result<(T, String), DeployError>>,
    ) -> Result<T, DeployError> {
        self.progress.phase(step, None);
        let took = Stopwatch::start();
        let (value, message) = work.await?;
        self.done.push(StepReport { step, message, duration_ms: took.elapsed_ms() });
        Ok(value)
    }
}
