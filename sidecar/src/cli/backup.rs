//! `backup create`, `list`, `show`, and `restore` under its second name.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::backup::{self, BackupOptions, BackupReport};
use crate::bundle::{self, BundleError};
use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::{bytes, duration};
use crate::cli::restore::RestoreArgs;
use crate::cli::{Context, DataDirArg, while_held};
use crate::daemon::control::{self, Answer, Request};
use crate::daemon::state::StateDir;
use crate::datadir::DataDir;
use crate::datadir::key_files::KeyFiles;
use crate::durable::{self, OnPath as _};
use crate::ids::RestorePointId;
use crate::repository::address::Address;
use crate::repository::manifest::RestorePoint;
use crate::repository::remembered::Remembered;
use crate::repository::{Repository, RepositoryError};
use crate::retention;
use crate::scratch::Scratch;

#[derive(Debug, Subcommand)]
pub enum BackupCommand {
    /// Archive what is new and make a restore point; the server keeps running
    Create(CreateArgs),
    /// List restore points, the newest last
    List,
    /// Show one restore point
    Show {
        /// A restore point's id
        id: RestorePointId,
    },
    /// Keep a restore point whatever retention says
    Pin {
        /// A restore point's id
        id: RestorePointId,
    },
    /// Leave a restore point to retention again
    Unpin {
        /// A restore point's id
        id: RestorePointId,
    },
    /// The same as `inner-universe restore`
    Restore(RestoreArgs),
}

#[derive(Debug, Args)]
pub struct CreateArgs {
    #[command(flatten)]
    data: DataDirArg,
    /// A name to find the restore point by
    #[arg(long)]
    label: Option<String>,
    /// The server's --jwt-key-dir, to keep the keys that old tokens need; captured only into an encrypted repository
    #[arg(long, value_name = "DIR")]
    key_dir: Option<PathBuf>,
    /// Capture the keys even though the repository is not encrypted
    #[arg(long)]
    allow_plain_keys: bool,
    /// An age recipient to seal a new repository to; may be given several times
    #[arg(long, value_name = "AGE1...")]
    recipient: Vec<String>,
    /// zstd compression level; repository.compression_level when left out
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..=19))]
    compression_level: Option<i32>,
    /// Write a bundle instead: one file that holds it all, to be carried to another machine; needs no repository
    #[arg(long, value_name = "FILE.stb", conflicts_with = "force")]
    output: Option<PathBuf>,
    /// Take the lease from another sidecar; only when that one is dead
    #[arg(long)]
    force: bool,
}

pub async fn run(context: &Context<'_>, command: BackupCommand) -> Result<ExitStatus, Failure> {
    match command {
        BackupCommand::Create(args) => create(context, args).await,
        BackupCommand::List => list(context).await,
        BackupCommand::Show { id } => show(context, id).await,
        BackupCommand::Pin { id } => pin(context, id, true).await,
        BackupCommand::Unpin { id } => pin(context, id, false).await,
        BackupCommand::Restore(args) => super::restore::run(context, args).await,
    }
}

async fn create(context: &Context<'_>, args: CreateArgs) -> Result<ExitStatus, Failure> {
    let data = args.data.open(context)?;
    if let Some(output) = args.output.clone() {
        return create_bundle(context, &data, args, &output).await;
    }
    if !args.force
        && let Some(report) = ask_daemon(context, &data, &args).await?
    {
        return Ok(show_report(context, &report));
    }
    let keys = context.keyring(&args.recipient)?;
    let named = args.key_dir.as_deref().map(KeyFiles::in_dir);
    let token_keys = named.or_else(|| context.config().spacetimedb_config.named_keys());
    if token_keys.is_some() && !keys.seals() && !args.allow_plain_keys {
        // Say so before a repository is made that could never hold the keys.
        match Repository::open(context.url()?, &context.config().repository, keys.clone()).await {
            Ok(repository) if repository.keys.seals() => {}
            Ok(_) | Err(RepositoryError::NoRepository { .. }) => return Err(backup::BackupError::PlainKeys.into()),
            Err(error) => return Err(error.into()),
        }
    }
    let (url, config) = (context.url()?, &context.config().repository);
    let state_dir = StateDir::open(context.config(), data.root())?;
    let remembered = Remembered::in_dir(state_dir.path());
    let repository = remembered.open_or_create(url, config, keys, context.clock.as_ref()).await?;
    context.warn_of_store(&repository);
    let options = BackupOptions {
        label: args.label,
        token_keys,
        allow_plain_keys: args.allow_plain_keys,
        level: Some(args.compression_level.unwrap_or(context.config().repository.compression_level)),
    };
    let progress = context.output.progress();
    let lease = context.lease(&repository, args.force).await?;
    let fenced = lease.fenced();
    #[cfg(feature = "client")]
    let witness = {
        let readers = Arc::new(crate::database::reader::Readers::new(context.config()));
        crate::drill::promise::LiveServer::witness(context.config(), readers)
    };
    #[cfg(not(feature = "client"))]
    let witness = None;
    let clock = Arc::clone(&context.clock);
    let work = backup::create_witnessed(&fenced, &data, &options, clock, progress, witness);
    let report = while_held(&lease, context.clock.as_ref(), work).await;
    lease.release().await;
    Ok(show_report(context, &report?))
}

/// A backup into a repository of its own, which then becomes one file.
async fn create_bundle(
    context: &Context<'_>,
    data: &DataDir,
    args: CreateArgs,
    output: &Path,
) -> Result<ExitStatus, Failure> {
    let output = std::path::absolute(output).on("name", output)?;
    if output.exists() {
        return Err(BundleError::Exists(output).into());
    }
    let parent = durable::parent(&output);
    let scratch = Scratch::create_in(&parent, ".inner-universe-bundle-").on("write to", &parent)?;
    let address = Address::directory(&scratch.path().join("repository")).map_err(Failure::usage)?;
    let keys = context.keyring(&args.recipient)?;
    let named = args.key_dir.as_deref().map(KeyFiles::in_dir);
    let configured = context.config().spacetimedb_config.named_keys();
    let configured = configured.filter(|files| keys.seals() && files.private.exists());
    let (config, clock) = (&context.config().repository, &context.clock);
    let repository = Repository::open_or_create(address.url(), config, keys, clock.as_ref()).await?;
    let options = BackupOptions {
        label: args.label,
        token_keys: named.or(configured),
        allow_plain_keys: args.allow_plain_keys,
        level: Some(args.compression_level.unwrap_or(config.compression_level)),
    };
    let progress = context.output.progress();
    let report = backup::create(&repository, data, &options, Arc::clone(clock), Arc::clone(&progress)).await?;
    progress.phase("bundle", None);
    let bytes_written = bundle::write(&repository, &output).await?;
    Ok(show_report(context, &BackupReport { bytes_written, bundle: Some(output), ..report }))
}

/// What a pin changes.
#[derive(Debug, Clone, Serialize)]
struct PinReport {
    restore_point: RestorePointId,
    pinned: bool,
}

/// A pin is an object of its own, and so is written beside whoever holds the lease.
async fn pin(context: &Context<'_>, id: RestorePointId, pinned: bool) -> Result<ExitStatus, Failure> {
    let repository = context.writable(context.keyring(&[])?).await?;
    match pinned {
        true => retention::pins::pin(&repository, id, context.clock.now()).await?,
        false => {
            repository.restore_point(id).await?;
            repository.unpin(id).await?;
        }
    }
    let report = PinReport { restore_point: id, pinned };
    context.output.result(&report, |report| match report.pinned {
        true => format!("{} is kept until it is unpinned", report.restore_point),
        false => format!("{} is left to retention", report.restore_point),
    });
    Ok(ExitStatus::Ok)
}

fn show_report(context: &Context<'_>, report: &BackupReport) -> ExitStatus {
    for problem in &report.problems {
        context.output.warn(problem);
    }
    context.output.result(report, describe);
    if report.complete { ExitStatus::Ok } else { ExitStatus::Findings }
}

/// A daemon on the same data directory and repository holds the lease: it makes the restore point for us.
async fn ask_daemon(context: &Context<'_>, data: &DataDir, args: &CreateArgs) -> Result<Option<BackupReport>, Failure> {
    let socket = StateDir::locate(context.config(), data.root()).join("control.sock");
    let given = [
        ("--key-dir", args.key_dir.is_some()),
        ("--allow-plain-keys", args.allow_plain_keys),
        ("--recipient", !args.recipient.is_empty()),
        ("--compression-level", args.compression_level.is_some()),
    ];
    let options = given.iter().filter(|(_, is_given)| *is_given).map(|(name, _)| (*name).to_owned()).collect();
    let request = Request::BackupCreate { url: context.url()?.to_owned(), label: args.label.clone(), options };
    match control::ask(&socket, &request).await {
        Ok(Some(Answer::Created(report))) => Ok(Some(report)),
        Ok(Some(Answer::Failed(message) | Answer::Empty(message))) => {
            Err(Failure::new(ExitStatus::Failed, format!("the daemon made no restore point: {message}")))
        }
        Ok(Some(_) | None) => Ok(None),
        Err(error) => Err(Failure::new(ExitStatus::Failed, format!("the daemon went away while it worked: {error}"))),
    }
}

fn describe(report: &BackupReport) -> String {
    let label = report.label.as_deref().map(|label| format!(" ({label})")).unwrap_or_default();
    let mut text = format!("restore point {}{label}\n", report.restore_point);
    for database in &report.databases {
        let time = database.time.map(|time| format!(", {time}")).unwrap_or_default();
        text += &format!(
            "  {} up to transaction {} on timeline {}{time}\n",
            database.name, database.offset, database.timeline
        );
    }
    text += &format!(
        "read {}, wrote {} in {} objects, {}",
        bytes(report.bytes_read),
        bytes(report.bytes_written),
        report.objects_written,
        duration(report.duration_ms)
    );
    text
}

async fn list(context: &Context<'_>) -> Result<ExitStatus, Failure> {
    let repository = context.repository().await?;
    let listing = repository.restore_points().await?;
    for problem in &listing.problems {
        context.output.warn(problem);
    }
    context.output.result(&listing, |listing| {
        if listing.restore_points.is_empty() {
            return "no restore points yet".to_owned();
        }
        let line = |point: &RestorePoint| {
            let databases: Vec<_> =
                point.databases.iter().map(|database| format!("{}@{}", database.name, database.offset)).collect();
            let label = point.label.as_deref().unwrap_or("-");
            format!("{}  {:.0}  {label}  {}", point.id, point.created_at, databases.join(" "))
        };
        listing.restore_points.iter().map(line).collect::<Vec<_>>().join("\n")
    });
    Ok(ExitStatus::Ok)
}

async fn show(context: &Context<'_>, id: RestorePointId) -> Result<ExitStatus, Failure> {
    let repository = context.repository().await?;
    let point = repository.restore_point(id).await.map_err(|error| match error {
        RepositoryError::Missing { .. } => {
            let message = format!("there is no restore point {id}; see `inner-universe backup list`");
            Failure::new(ExitStatus::NothingToRestore, message)
        }
        error => error.into(),
    })?;
    context.output.result(&point, |point| {
        let mut text = format!("restore point {}\n", point.id);
        text += &format!("  label           {}\n", point.label.as_deref().unwrap_or("-"));
        text += &format!("  created         {}\n", point.created_at);
        text += &format!("  server          {}\n", point.server_version.as_deref().unwrap_or("unknown"));
        text += &format!("  token keys      {}\n", if point.has_keys { "captured" } else { "not captured" });
        for database in &point.databases {
            text += &format!("  database {}\n", database.name);
            text += &format!("    identity      {}\n", database.identity);
            text += &format!("    owner         {}\n", database.owner);
            text += &format!("    timeline      {}\n", database.timeline);
            text += &format!("    transaction   {}\n", database.offset);
            text += &format!("    time          {}\n", database.time.map_or("-".into(), |time| time.to_string()));
        }
        text
    });
    Ok(ExitStatus::Ok)
}
