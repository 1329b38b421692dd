//! `backup create`, `list`, `show`, and `restore` under its second name.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::backup::{self, BackupOptions, BackupReport};
use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::{bytes, duration};
use crate::cli::restore::RestoreArgs;
use crate::cli::{Context, DataDirArg};
use crate::ids::RestorePointId;
use crate::repository::manifest::RestorePoint;
use crate::repository::{Repository, RepositoryError};

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
    #[arg(long, env = "INNER_UNIVERSE__SPACETIMEDB_CONFIG__KEY_DIR", value_name = "DIR")]
    key_dir: Option<PathBuf>,
    /// Capture the keys even though the repository is not encrypted
    #[arg(long, requires = "key_dir")]
    allow_plain_keys: bool,
    /// An age recipient to seal a new repository to; may be given several times
    #[arg(long, value_name = "AGE1...")]
    recipient: Vec<String>,
    /// zstd compression level
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..=19), default_value_t = backup::DEFAULT_LEVEL)]
    compression_level: i32,
}

pub async fn run(context: &Context<'_>, command: BackupCommand) -> Result<ExitStatus, Failure> {
    match command {
        BackupCommand::Create(args) => create(context, args).await,
        BackupCommand::List => list(context).await,
        BackupCommand::Show { id } => show(context, id).await,
        BackupCommand::Restore(args) => super::restore::run(context, args).await,
    }
}

async fn create(context: &Context<'_>, args: CreateArgs) -> Result<ExitStatus, Failure> {
    let data = args.data.open()?;
    let keys = context.keyring(&args.recipient)?;
    if args.key_dir.is_some() && args.recipient.is_empty() && !args.allow_plain_keys {
        // Say so before a repository is made that could never hold the keys.
        match Repository::open(context.url()?, keys.clone()).await {
            Ok(repository) if repository.keys.seals() => {}
            Ok(_) | Err(RepositoryError::NoRepository { .. }) => return Err(backup::BackupError::PlainKeys.into()),
            Err(error) => return Err(error.into()),
        }
    }
    let repository = Repository::open_or_create(context.url()?, keys, context.clock.as_ref()).await?;
    let options = BackupOptions {
        label: args.label,
        key_dir: args.key_dir,
        allow_plain_keys: args.allow_plain_keys,
        level: Some(args.compression_level),
    };
    let progress = context.output.progress();
    let report = backup::create(&repository, &data, &options, Arc::clone(&context.clock), progress).await?;
    for problem in &report.problems {
        context.output.warn(problem);
    }
    context.output.result(&report, describe);
    Ok(ExitStatus::Ok)
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

#[derive(Serialize)]
struct Listing {
    restore_points: Vec<RestorePoint>,
    problems: Vec<String>,
}

async fn list(context: &Context<'_>) -> Result<ExitStatus, Failure> {
    let repository = context.repository().await?;
    let mut listing = Listing { restore_points: Vec::new(), problems: Vec::new() };
    for id in repository.restore_point_ids().await? {
        match repository.restore_point(id).await {
            Ok(point) => listing.restore_points.push(point),
            Err(error) if error.is_permanent() => listing.problems.push(error.to_string()),
            Err(error) => return Err(error.into()),
        }
    }
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
