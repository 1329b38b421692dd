//! `drill`

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use crate::cli::Context;
use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::duration;
use crate::drill::{Choice, DrillOptions, DrillResult, drill, results};
use crate::ids::RestorePointId;

#[derive(Debug, Args)]
pub struct DrillArgs {
    /// The restore point to try; the newest when left out
    id: Option<RestorePointId>,
    /// Try any of the restore points
    #[arg(long, conflicts_with = "id")]
    random: bool,
    /// Boot this server instead of spacetimedb_config.server_bin, as to rehearse an upgrade
    #[arg(long, value_name = "FILE")]
    server_bin: Option<PathBuf>,
    /// Show the results that are kept instead
    #[arg(long, conflicts_with_all = ["id", "random", "server_bin"])]
    list: bool,
}

pub async fn run(context: &Context<'_>, args: DrillArgs) -> Result<ExitStatus, Failure> {
    if args.list {
        let found = results(&context.repository().await?).await?;
        context.output.result(&found, |found| found.iter().map(line).collect::<Vec<_>>().join("\n"));
        return Ok(ExitStatus::Ok);
    }
    // A result is an object of its own, and so is written beside whoever holds the lease.
    let repository = context.writable(context.keyring(&[])?).await?;
    let choice = match (args.id, args.random) {
        (Some(id), _) => Choice::Named(id),
        (None, true) => Choice::Random,
        (None, false) => Choice::Newest,
    };
    let live = context.config().spacetimedb_config.db_path.clone();
    let options = DrillOptions { choice, server_bin: args.server_bin, live };
    let clock = Arc::clone(&context.clock);
    let result = drill(&repository, context.config(), &options, clock, context.output.progress()).await?;
    context.output.result(&result, describe);
    Ok(if result.passed { ExitStatus::Ok } else { ExitStatus::Findings })
}

fn line(result: &DrillResult) -> String {
    let outcome = if result.passed { "passed" } else { "FAILED" };
    let rto = result.rto_ms.map_or_else(|| "-".to_owned(), duration);
    format!("{}  {outcome}  restore point {}  RTO {rto}", result.started_at, result.restore_point)
}

fn describe(result: &DrillResult) -> String {
    let mut text = String::new();
    for finding in &result.findings {
        text += &format!("{:?}: {}\n  fix: {}\n", finding.kind, finding.message, finding.fix);
    }
    for database in &result.databases {
        text += &format!(
            "{} at transaction {}: {} tables, {} rows, {} tables compared with the promise\n",
            database.name, database.offset, database.tables, database.rows, database.compared
        );
        if !database.changed_at_start.is_empty() {
            text += &format!("  changed by the server's own start: {}\n", database.changed_at_start.join(", "));
        }
    }
    let shown = |ms: Option<u64>| ms.map_or_else(|| "not measured".to_owned(), duration);
    text += &format!(
        "restore point {} {}: RTO {} (restore {}, server {}), RPO {}",
        result.restore_point,
        if result.passed { "passed" } else { "failed" },
        shown(result.rto_ms),
        shown(result.restore_ms),
        shown(result.boot_ms),
        shown(result.rpo_ms),
    );
    text
}
