//! `replay`

use clap::Args;

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::duration;
use crate::cli::{Context, DatabaseArg};
use crate::config::Format;
use crate::export::archive::Archive;
use crate::ids::Identity;
use crate::replay::{self, ReplayOptions, ReplayReport, Until};
use crate::repository::Repository;
use crate::repository::crypto::Keyring;

#[derive(Debug, Args)]
pub struct ReplayArgs {
    #[command(flatten)]
    database: DatabaseArg,
    /// The repository with the exports; --repository when left out
    #[arg(long, value_name = "URL")]
    input: Option<String>,
    /// The identity of the database that was exported; needed where there are several
    #[arg(long, value_name = "IDENTITY")]
    from: Option<Identity>,
    /// A table to replay; may be given several times; all that were exported when left out
    #[arg(long, value_name = "NAME", conflicts_with_all = ["to", "version_id"])]
    table: Vec<String>,
    /// Entities, relations and their versions as they were: version:N or time:RFC3339
    #[arg(long, value_name = "TARGET", value_parser = parse_until)]
    to: Option<Until>,
    /// Bring one entity or relation back to what it was after this state version, from the exports if the module no longer
    /// has it
    #[arg(long, value_name = "N", conflicts_with_all = ["to", "dry_run"])]
    version_id: Option<u64>,
    /// Read files of this format only
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<Format>,
    /// Tell what would be applied, skipped and refused, and change nothing
    #[arg(long)]
    dry_run: bool,
}

fn parse_until(text: &str) -> Result<Until, String> {
    match text.split_once(':') {
        Some(("version", number)) => number.parse().map(Until::Version).map_err(|_| format!("`{number}` is no number")),
        Some(("time", time)) => {
            time.parse().map(Until::Time).map_err(|_| format!("`{time}` is no time; write 2026-01-31T12:00:00Z"))
        }
        _ => Err("write version:N or time:RFC3339".into()),
    }
}

pub async fn run(context: &Context<'_>, args: ReplayArgs) -> Result<ExitStatus, Failure> {
    let config = args.database.apply(context.config())?;
    let repository = match &args.input {
        Some(url) => {
            let keys = Keyring::new(&[], &config.repository.identity_files)?;
            Repository::open(url, &config.repository, keys).await?
        }
        None => context.repository().await?,
    };
    let archive = Archive::open(&repository, args.from, args.format).await;
    if let Some(version) = args.version_id {
        // A module that still has the version needs no exports.
        let restored = replay::restore_version(archive, &config, version).await?;
        context.output.result(&restored, |restored| {
            let source = if restored.imported { "the exports" } else { "the module" };
            format!("state version {} was brought back from {source}", restored.version_id)
        });
        return Ok(ExitStatus::Ok);
    }
    let archive = archive.map_err(replay::ReplayError::from)?;
    let options = ReplayOptions { tables: args.table, until: args.to, dry_run: args.dry_run };
    let report = replay::replay(&archive, &config, &options).await?;
    context.output.result(&report, describe);
    let refused = report.tables.iter().any(|table| table.refused > 0);
    Ok(if refused { ExitStatus::Findings } else { ExitStatus::Ok })
}

fn describe(report: &ReplayReport) -> String {
    let mut text = format!("{} into {}\n", report.source, report.target);
    let applied = if report.dry_run { "to apply" } else { "applied" };
    for table in &report.tables {
        text += &format!(
            "  {:16} {} read, {} {applied}, {} skipped, {} refused\n",
            table.table, table.read, table.applied, table.skipped, table.refused
        );
        for refusal in &table.refusals {
            text += &format!("    {}: {}\n", refusal.row, refusal.reason);
        }
    }
    text + &format!("in {}", duration(report.duration_ms))
}
