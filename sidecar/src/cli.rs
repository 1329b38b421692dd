//! The command line: one file a verb below, and the only room that prints.
//!
//! Results go to stdout (one JSON document with `--json`), everything else to stderr. Exit codes are a contract; see
//! [`ExitStatus`].

mod backup;
mod failure;
mod key;
mod output;
mod progress;
mod restore;
mod status;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Parser, Subcommand};

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::Output;
use crate::clock::{Clock, SystemClock};
use crate::datadir::DataDir;
use crate::repository::Repository;
use crate::repository::crypto::Keyring;

/// Backup, recovery and observability sidecar for SpacetimeDB.
#[derive(Debug, Parser)]
#[command(name = "inner-universe", version, propagate_version = true, after_help = ExitStatus::HELP)]
pub struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Globals {
    /// Where backups are kept: file:///absolute/path
    #[arg(long, global = true, env = "INNER_UNIVERSE__REPOSITORY__URL", value_name = "URL")]
    repository: Option<String>,
    /// A file with age identities that open an encrypted repository; may be given several times
    #[arg(long, global = true, value_name = "FILE")]
    identity: Vec<PathBuf>,
    /// Print one JSON document on stdout
    #[arg(long, global = true)]
    json: bool,
    /// Log more; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Show no progress and log errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Take, list and show restore points
    Backup {
        #[command(subcommand)]
        command: backup::BackupCommand,
    },
    /// Rebuild a data directory as it was at a transaction, a time, a label or a restore point
    Restore(restore::RestoreArgs),
    /// Read back and check everything that restore points name
    Verify(verify::VerifyArgs),
    /// What is archived, and how far it lags behind the log
    Status(status::StatusArgs),
    /// Keys for client-side encryption
    Key {
        #[command(subcommand)]
        command: key::KeyCommand,
    },
}

/// Runs a parsed command line and returns its exit code.
pub fn main(cli: Cli) -> ExitCode {
    let output = Output::new(cli.globals.json, cli.globals.quiet);
    output::start_logging(cli.globals.verbose, cli.globals.quiet);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).max_blocking_threads(6).enable_all().build();
    let result = match runtime {
        Ok(runtime) => runtime.block_on(run(cli, &output)),
        Err(error) => Err(Failure::new(ExitStatus::Failed, format!("start the async runtime: {error}"))),
    };
    match result {
        Ok(status) => status.into(),
        Err(failure) => {
            output.failure(&failure);
            failure.status.into()
        }
    }
}

async fn run(cli: Cli, output: &Output) -> Result<ExitStatus, Failure> {
    let context = Context { globals: cli.globals, output, clock: Arc::new(SystemClock) };
    match cli.command {
        Command::Backup { command } => backup::run(&context, command).await,
        Command::Restore(args) => restore::run(&context, args).await,
        Command::Verify(args) => verify::run(&context, args).await,
        Command::Status(args) => status::run(&context, args).await,
        Command::Key { command } => key::run(&context, command),
    }
}

/// What every verb needs.
struct Context<'a> {
    globals: Globals,
    output: &'a Output,
    clock: Arc<dyn Clock>,
}

impl Context<'_> {
    fn url(&self) -> Result<&str, Failure> {
        self.globals.repository.as_deref().ok_or_else(|| {
            Failure::usage("no repository is named; give --repository URL or set INNER_UNIVERSE__REPOSITORY__URL")
        })
    }

    fn keyring(&self, recipients: &[String]) -> Result<Keyring, Failure> {
        Ok(Keyring::new(recipients, &self.globals.identity)?)
    }

    async fn repository(&self) -> Result<Repository, Failure> {
        Ok(Repository::open(self.url()?, self.keyring(&[])?).await?)
    }
}

/// The data directory, under either of its names.
#[derive(Debug, Args)]
struct DataDirArg {
    /// The server's data directory
    #[arg(long, alias = "db-path", env = "INNER_UNIVERSE__SPACETIMEDB_CONFIG__DB_PATH", value_name = "DIR")]
    data_dir: PathBuf,
}

impl DataDirArg {
    fn open(&self) -> Result<DataDir, Failure> {
        Ok(DataDir::open(&self.data_dir)?)
    }
}
