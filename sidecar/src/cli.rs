//! The command line: one file a verb below, and the only room that prints.
//!
//! Results go to stdout (one JSON document with `--json`), everything else to stderr. Exit codes are a contract; see
//! [`ExitStatus`].

mod backup;
mod config;
#[cfg(feature = "client")]
mod deploy;
#[cfg(feature = "client")]
mod doctor;
#[cfg(feature = "client")]
mod drill;
#[cfg(feature = "client")]
mod export;
mod failure;
mod key;
mod output;
mod progress;
mod prune;
mod prune_local;
#[cfg(feature = "client")]
mod replay;
mod repository;
mod restore;
mod run;
mod server;
mod signals;
mod status;
mod verify;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::{LogFormat, Logging, Output};
use crate::cli::signals::{ALL, Endings};
use crate::clock::{Clock, SystemClock};
use crate::config::Config;
use crate::config::load::{self, Loaded};
use crate::daemon::state::StateDir;
use crate::datadir::DataDir;
use crate::observe::own::OwnTelemetry;
use crate::repository::Repository;
use crate::repository::address::Address;
use crate::repository::crypto::Keyring;
use crate::repository::lease::{Lease, LeaseDocument};
use crate::repository::remembered::Remembered;

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
    /// The configuration: a file in TOML, JSON or YAML
    #[arg(long, global = true, env = "INNER_UNIVERSE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where backups are kept: a path, file:///absolute/path, s3://bucket/prefix, gs:// or az://
    #[arg(long, global = true, value_name = "URL")]
    repository: Option<OsString>,
    /// A file with age identities that open an encrypted repository; may be given several times
    #[arg(long, global = true, value_name = "FILE")]
    identity: Vec<PathBuf>,
    /// Print one JSON document on stdout
    #[arg(long, global = true)]
    json: bool,
    /// Log more; twice for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// How log lines on stderr look
    #[arg(long, global = true, env = "INNER_UNIVERSE_LOG_FORMAT", value_enum, default_value_t, value_name = "FORMAT")]
    log_format: LogFormat,
    /// Show no progress and log errors only
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Archive continuously, keep schedules, and, after `--`, start and watch the server
    Run(run::RunArgs),
    /// Take, list and show restore points
    Backup {
        #[command(subcommand)]
        command: backup::BackupCommand,
    },
    /// Rebuild a data directory as it was at a transaction, a time, a label or a restore point
    Restore(restore::RestoreArgs),
    /// Read back and check everything that restore points name
    Verify(verify::VerifyArgs),
    /// Restore to a scratch directory, boot a real server on it, compare its rows with what was promised; measures RTO and RPO
    #[cfg(feature = "client")]
    Drill(drill::DrillArgs),
    /// Remove restore points that retention does not keep, and all that only they need; a plan without --apply
    Prune(prune::PruneArgs),
    /// Free the server's disk of log that it needs no more and that is proven to be archived; a plan without --apply
    PruneLocal(prune_local::PruneLocalArgs),
    /// Export tables as files for query engines, and to be replayed
    #[cfg(feature = "client")]
    Export(export::ExportArgs),
    /// Load exported tables into a module, or bring one entity back to an earlier version
    #[cfg(feature = "client")]
    Replay(replay::ReplayArgs),
    /// What is archived, and how far it lags behind the log
    Status(status::StatusArgs),
    /// Publish a module with a way back: plan, restore point, publish, initialise, verify
    #[cfg(feature = "client")]
    Deploy(Box<deploy::DeployArgs>),
    /// Server mode: start, stop and look at the server in the background
    Server {
        #[command(subcommand)]
        command: server::ServerCommand,
    },
    /// Go through the deployment checklist; each line passes, warns or fails with what to do
    #[cfg(feature = "client")]
    Doctor(doctor::DoctorArgs),
    /// Check, describe and show the configuration
    Config {
        #[command(subcommand)]
        command: config::ConfigCommand,
    },
    /// Make the repository that backups go to
    Repository {
        #[command(subcommand)]
        command: repository::RepositoryCommand,
    },
    /// Keys for client-side encryption
    Key {
        #[command(subcommand)]
        command: key::KeyCommand,
    },
    /// Print a script that completes commands and flags
    Completions {
        /// The shell that is to complete
        shell: clap_complete::Shell,
    },
}

/// Large buffers pass from thread to thread, and glibc keeps a heap for each: with its default of eight a core, 67 MiB were
/// resident where two heaps take 38.
///
/// What is larger than [`LARGE`] is given back as soon as it is freed; by itself glibc would come to keep up to 32 MiB.
fn bound_heaps() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    const LARGE: libc::c_int = 1 << 20;
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[expect(
        unsafe_code,
        reason = "a setting of the allocator, made before there are threads; a refusal changes nothing"
    )]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}

/// Runs a parsed command line and returns its exit code.
pub fn main(cli: Cli) -> ExitCode {
    bound_heaps();
    let output = Output::new(cli.globals.json, cli.globals.quiet);
    let daemon = matches!(cli.command, Command::Run(_));
    let (verbose, quiet, format) = (cli.globals.verbose + u8::from(daemon), cli.globals.quiet, cli.globals.log_format);
    let logging = Logging { verbose, quiet, format };
    // The daemon's log goes to a collector too, which its configuration names.
    if !daemon {
        output::start_logging(logging, &OwnTelemetry::default());
    }
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).max_blocking_threads(6).enable_all().build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(run(cli, &output, logging));
            // What was left in the middle by a signal may not end by itself.
            runtime.shutdown_timeout(ABANDON_LIMIT);
            result
        }
        Err(error) => Err(Failure::new(ExitStatus::Failed, format!("start the async runtime: {error}"))),
    };
    let status = result.unwrap_or_else(|failure| {
        output.failure(&failure);
        failure.status
    });
    output.ending(status).into()
}

async fn run(cli: Cli, output: &Output, logging: Logging) -> Result<ExitStatus, Failure> {
    let loaded = cli.globals.load();
    let words = cli.globals.words();
    match cli.command {
        Command::Config { command } => return config::run(output, command, loaded),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "inner-universe", &mut script);
            output.text(&String::from_utf8_lossy(&script));
            return Ok(ExitStatus::Ok);
        }
        _ => {}
    }
    let mut loaded = loaded.map_err(|error| Failure::usage(format!("the configuration is wrong: {error}")))?;
    #[cfg(feature = "client")]
    know_deployment(&mut loaded.config);
    let context =
        Context { loaded, output, clock: Arc::new(SystemClock), globals: words, leases: parking_lot::Mutex::default() };
    if cli.command.ends_by_itself() {
        return verb(&context, cli.command, logging).await;
    }
    let mut endings = Endings::listen(&ALL)?;
    let ending = tokio::select! {
        result = verb(&context, cli.command, logging) => return result,
        ending = endings.next() => ending,
    };
    // The verb is gone by now, and with it its servers and temporary directories.
    tokio::select! {
        () = context.release_leases() => {}
        () = context.clock.sleep(ABANDON_LIMIT) => {}
        _ = endings.next() => {}
    }
    Err(Failure::new(ending.status, format!("ended by {}", ending.name)))
}

/// After a signal, from the end of the verb to the end of the process.
const ABANDON_LIMIT: Duration = Duration::from_secs(2);

impl Command {
    /// Returns true for verbs that a signal must not cut off: they bring what they do to an end themselves.
    fn ends_by_itself(&self) -> bool {
        match self {
            Self::Run(_) | Self::Server { command: server::ServerCommand::Watch(_) } => true,
            Self::Status(args) => args.watches(),
            #[cfg(feature = "client")]
            Self::Deploy(_) => true,
            _ => false,
        }
    }
}

async fn verb(context: &Context<'_>, command: Command, logging: Logging) -> Result<ExitStatus, Failure> {
    match command {
        Command::Run(args) => run::run(context, args, logging).await,
        Command::Backup { command } => backup::run(context, command).await,
        Command::Restore(args) => restore::run(context, args).await,
        Command::Verify(args) => verify::run(context, args).await,
        #[cfg(feature = "client")]
        Command::Drill(args) => drill::run(context, args).await,
        Command::Prune(args) => prune::run(context, args).await,
        Command::PruneLocal(args) => prune_local::run(context, args).await,
        Command::Status(args) => status::run(context, args).await,
        #[cfg(feature = "client")]
        Command::Export(args) => export::run(context, args).await,
        #[cfg(feature = "client")]
        Command::Replay(args) => replay::run(context, args).await,
        #[cfg(feature = "client")]
        Command::Deploy(args) => deploy::run(context, *args).await,
        Command::Server { command } => server::run(context, command).await,
        #[cfg(feature = "client")]
        Command::Doctor(args) => doctor::run(context, args).await,
        Command::Config { .. } | Command::Completions { .. } => Ok(ExitStatus::Ok),
        Command::Key { command } => key::run(context, command),
        Command::Repository { command } => repository::run(context, command).await,
    }
}

/// What `deploy` has published on the data directory, and the identity that it took, where nothing else is named.
#[cfg(feature = "client")]
fn know_deployment(config: &mut Config) {
    let Some(data_dir) = &config.spacetimedb_config.db_path else { return };
    let dir = StateDir::locate(config, data_dir);
    let server = &mut config.spacetimedb_config;
    if server.database.is_none() {
        server.database = crate::deploy::deployed_name(&dir);
    }
    let token = crate::deploy::own_token(&dir);
    // It is of the server on this directory, and of no other's business.
    if server.url.is_none() && server.token_file.is_none() && token.is_file() {
        server.token_file = Some(token);
    }
}

impl Globals {
    /// The same flags for another process, wherever that runs.
    fn words(&self) -> Vec<OsString> {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone()).into_os_string();
        let mut words: Vec<OsString> = Vec::new();
        if let Some(path) = &self.config {
            words.extend(["--config".into(), absolute(path)]);
        }
        if let Some(url) = &self.repository {
            words.extend(["--repository".into(), repository_url(url).into()]);
        }
        words.extend(self.identity.iter().flat_map(|path| ["--identity".into(), absolute(path)]));
        words
    }

    /// The file, then the environment, then the flags that stand for keys.
    fn load(&self) -> Result<Loaded, load::ConfigError> {
        let mut flags = Vec::new();
        if let Some(url) = &self.repository {
            flags.push(("repository.url", repository_url(url).into(), "--repository"));
        }
        if !self.identity.is_empty() {
            let files: Vec<_> = self.identity.iter().map(|path| path.display().to_string()).collect();
            flags.push(("repository.identity_files", files.into(), "--identity"));
        }
        let environment =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        load::load(self.config.as_deref(), environment, &flags)
    }
}

/// What `--repository` gives as a URL. One that cannot be used stays as it is, for the configuration's check to refuse.
fn repository_url(argument: &OsStr) -> String {
    let address = Address::from_argument(argument);
    address.map_or_else(|_| argument.to_string_lossy().into_owned(), |address| address.url().to_owned())
}

/// What every verb needs.
struct Context<'a> {
    loaded: Loaded,
    output: &'a Output,
    clock: Arc<dyn Clock>,
    /// The flags that lead another run of this program to the same configuration.
    globals: Vec<OsString>,
    /// What is released when a signal ends the verb.
    leases: parking_lot::Mutex<Vec<Arc<Lease>>>,
}

impl Context<'_> {
    /// The lease of a repository, for the length of a verb.
    async fn lease(&self, repository: &Repository, force: bool) -> Result<Arc<Lease>, Failure> {
        let length = self.config().repository.lease_duration.0;
        let watching = |held: &LeaseDocument, patience: Duration| {
            self.output.note(&format!(
                "the lease of {} seems to be over; it is watched for {} s, in case its holder is alive",
                held.writer,
                patience.as_secs()
            ));
        };
        let lease = Lease::acquire_or_watch(repository, length, Arc::clone(&self.clock), force, watching).await?;
        let lease = Arc::new(lease);
        self.leases.lock().push(Arc::clone(&lease));
        Ok(lease)
    }

    async fn release_leases(&self) {
        let leases = std::mem::take(&mut *self.leases.lock());
        for lease in leases {
            lease.release().await;
        }
    }

    fn words_of_globals(&self) -> Vec<OsString> {
        self.globals.clone()
    }

    fn config(&self) -> &Config {
        &self.loaded.config
    }

    fn url(&self) -> Result<&str, Failure> {
        self.config().repository.url.as_deref().ok_or_else(|| {
            Failure::usage("no repository is named; give --repository URL, or set repository.url in the configuration")
        })
    }

    /// Keys to write a repository with: `recipients`, or else those of the configuration.
    fn keyring(&self, recipients: &[String]) -> Result<Keyring, Failure> {
        let config = &self.config().repository;
        let recipients = if recipients.is_empty() { &config.recipients } else { recipients };
        Ok(Keyring::new(recipients, &config.identity_files)?)
    }

    /// The repository, to read.
    async fn repository(&self) -> Result<Repository, Failure> {
        let keys = Keyring::new(&[], &self.config().repository.identity_files)?;
        Ok(Repository::open(self.url()?, &self.config().repository, keys).await?)
    }

    /// The repository, to read, if it is the one that is remembered for a data directory.
    async fn repository_of(&self, data: &DataDir) -> Result<Repository, Failure> {
        let (url, config) = (self.url()?, &self.config().repository);
        let opened = Repository::open(url, config, Keyring::new(&[], &config.identity_files)?).await;
        Ok(Remembered::in_dir(&StateDir::locate(self.config(), data.root())).check(url, opened)?)
    }

    /// What is remembered of repositories for the data directory that the configuration names, if it names one.
    fn remembered(&self) -> Option<Remembered> {
        let data_dir = self.config().spacetimedb_config.db_path.as_ref()?;
        Some(Remembered::in_dir(&StateDir::locate(self.config(), data_dir)))
    }

    /// The repository, to write. It must be there, and be the one that is remembered.
    async fn writable(&self, keys: Keyring) -> Result<Repository, Failure> {
        let (url, config) = (self.url()?, &self.config().repository);
        let opened = Repository::open_to_write(url, config, keys).await;
        let repository = match self.remembered() {
            Some(remembered) => remembered.check(url, opened)?,
            None => opened?,
        };
        self.warn_of_store(&repository);
        Ok(repository)
    }

    /// Warns of a store on which two sidecars could write at once.
    fn warn_of_store(&self, repository: &Repository) {
        let conditional = repository.conditional();
        if !conditional.create || !conditional.update {
            self.output.warn(
                "the store ignores conditional writes: two sidecars that start in the same second could both write; run \
                 only one, or use a store that honours If-None-Match and If-Match",
            );
        }
    }
}

/// Runs `work` and renews the lease meanwhile. A lost lease fails the work's next write, which then says so.
async fn while_held<T>(lease: &Lease, clock: &dyn Clock, work: impl Future<Output = T>) -> T {
    let renewals = async {
        loop {
            clock.sleep(lease.renewal_interval()).await;
            if let Err(error) = lease.renew().await {
                tracing::warn!(%error, "the lease was not renewed");
                if error.is_permanent() {
                    std::future::pending::<()>().await;
                }
            }
        }
    };
    tokio::select! {
        result = work => result,
        () = renewals => unreachable!("renewals never end"),
    }
}

/// The database to ask, and where.
#[derive(Debug, Args)]
struct DatabaseArg {
    /// Where the server is reached; spacetimedb_config.url when left out
    #[arg(long, global = true, value_name = "URL")]
    server: Option<String>,
    /// The database's name or identity; spacetimedb_config.database when left out
    #[arg(long, global = true, value_name = "NAME")]
    database: Option<String>,
    /// A file with the token of an identity that may do this; spacetimedb_config.token_file when left out
    #[arg(long, global = true, value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl DatabaseArg {
    /// The configuration with what was given on the command line.
    fn apply(&self, config: &Config) -> Result<Config, Failure> {
        let own_of = config.clone();
        let mut config = config.clone();
        let target = &mut config.spacetimedb_config;
        if self.server.is_some() {
            let own = target.db_path.as_ref().map(|dir| StateDir::locate(&own_of, dir).join("token"));
            target.token_file = target.token_file.take().filter(|file| own.as_ref() != Some(file));
        }
        for (given, key) in [(&self.server, &mut target.url), (&self.database, &mut target.database)] {
            if given.is_some() {
                key.clone_from(given);
            }
        }
        if self.token_file.is_some() {
            target.token_file.clone_from(&self.token_file);
        }
        if target.database.is_none() {
            return Err(Failure::usage(
                "no database is named; give --database NAME, or set spacetimedb_config.database in the configuration",
            ));
        }
        if let Some((key, problem)) = config.validate().into_iter().next() {
            return Err(Failure::usage(format!("{key}: {problem}")));
        }
        Ok(config)
    }
}

/// The data directory, under either of its names.
#[derive(Debug, Clone, Args)]
struct DataDirArg {
    /// The server's data directory; spacetimedb_config.db_path when left out
    #[arg(long, alias = "db-path", value_name = "DIR")]
    data_dir: Option<PathBuf>,
}

impl DataDirArg {
    fn path(&self, context: &Context<'_>) -> Result<PathBuf, Failure> {
        self.data_dir.clone().or_else(|| context.config().spacetimedb_config.db_path.clone()).ok_or_else(|| {
            Failure::usage(
                "no data directory is named; give --data-dir DIR, or set spacetimedb_config.db_path in the configuration",
            )
        })
    }

    fn open(&self, context: &Context<'_>) -> Result<DataDir, Failure> {
        Ok(DataDir::open(&self.path(context)?)?)
    }
}
