//! `restore`

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde::Serialize;

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::{bytes, duration};
use crate::cli::{Context, DataDirArg};
use crate::ids::{Identity, Offset, RestorePointId, TimelineId};
use crate::restore::apply::{self, ApplyOptions};
use crate::restore::plan::{self, RestorePlan, RestoreRequest};
use crate::restore::target::Target;

#[derive(Debug, Args)]
pub struct RestoreArgs {
    #[command(flatten)]
    data: DataDirArg,
    /// latest, offset:N, time:RFC3339, label:L, or a restore point's id; offsets and times are inclusive
    #[arg(long, default_value = "latest", value_name = "TARGET")]
    to: Target,
    /// A database's name or identity; may be given several times; all when left out
    #[arg(long, value_name = "NAME|IDENTITY")]
    database: Vec<String>,
    /// The timeline to restore from; the newest when left out
    #[arg(long, value_name = "T")]
    timeline: Option<TimelineId>,
    /// Where captured token keys go; DIR.keys when left out
    #[arg(long, value_name = "DIR")]
    key_dir: Option<PathBuf>,
    /// Replay the whole log instead of starting from a snapshot: slower, and needs no snapshot to be whole
    #[arg(long)]
    no_snapshot: bool,
    /// Print the plan and change nothing
    #[arg(long)]
    dry_run: bool,
    /// Move aside what is there, and start even if space looks short
    #[arg(long)]
    force: bool,
}

#[derive(Serialize)]
struct PlanReport {
    dry_run: bool,
    data_dir: PathBuf,
    instance_from: RestorePointId,
    databases: Vec<PlannedDatabase>,
    left_out: Vec<String>,
    bytes_to_read: u64,
}

#[derive(Serialize)]
struct PlannedDatabase {
    identity: Identity,
    name: String,
    timeline: TimelineId,
    offset: Offset,
    time: Option<jiff::Timestamp>,
    snapshot_offset: Option<Offset>,
    log_objects: usize,
    bytes_to_read: u64,
}

pub async fn run(context: &Context<'_>, args: RestoreArgs) -> Result<ExitStatus, Failure> {
    let data_dir = args.data.path(context)?;
    let repository = context.repository().await?;
    let request = RestoreRequest {
        target: args.to.clone(),
        databases: args.database,
        timeline: args.timeline,
        no_snapshot: args.no_snapshot,
    };
    let plan = plan::plan(&repository, &request).await?;
    warn(context, &plan, &args.to);
    if args.dry_run {
        context.output.result(&report(&plan, data_dir), describe_plan);
        return Ok(ExitStatus::Ok);
    }
    let options = ApplyOptions { data_dir, key_dir: args.key_dir, force: args.force };
    let (clock, progress) = (Arc::clone(&context.clock), context.output.progress());
    let report = apply::apply(&repository, &plan, &options, clock, progress).await?;
    context.output.result(&report, |report| {
        let mut text = format!("restored {}\n", report.data_dir.display());
        for database in &report.databases {
            let time = database.time.map(|time| format!(", {time}")).unwrap_or_default();
            text += &format!("  {} up to transaction {}{time}\n", database.name, database.offset);
        }
        if let Some(aside) = &report.moved_aside {
            text += &format!("what was there is now {}\n", aside.display());
        }
        if let Some(keys) = &report.keys {
            text += &format!("the token keys are in {}; start the server with --jwt-key-dir\n", keys.display());
        }
        text += &format!(
            "read {}, wrote {}, {}",
            bytes(report.bytes_read),
            bytes(report.bytes_written),
            duration(report.duration_ms)
        );
        text
    });
    Ok(ExitStatus::Ok)
}

fn warn(context: &Context<'_>, plan: &RestorePlan, target: &Target) {
    for left_out in &plan.left_out {
        context.output.warn(&format!("left out: {left_out}"));
    }
    if let (Target::Offset(wanted), [database]) = (target, plan.databases.as_slice())
        && database.offset != *wanted
    {
        context.output.warn(&format!(
            "transaction {wanted} lies inside a commit that cannot be cut; restoring up to {} instead",
            database.offset
        ));
    }
}

fn report(plan: &RestorePlan, data_dir: PathBuf) -> PlanReport {
    let databases = plan.databases.iter().map(|database| PlannedDatabase {
        identity: database.identity,
        name: database.name.clone(),
        timeline: database.timeline,
        offset: database.offset,
        time: database.time,
        snapshot_offset: database.snapshot.as_ref().map(|snapshot| snapshot.offset),
        log_objects: database.log.len(),
        bytes_to_read: database.bytes_to_read(),
    });
    PlanReport {
        dry_run: true,
        data_dir,
        instance_from: plan.instance.id,
        databases: databases.collect(),
        left_out: plan.left_out.clone(),
        bytes_to_read: plan.bytes_to_read,
    }
}

fn describe_plan(plan: &PlanReport) -> String {
    let mut text = format!(
        "would restore {} from restore point {}; nothing was changed\n",
        plan.data_dir.display(),
        plan.instance_from
    );
    for database in &plan.databases {
        let snapshot = match database.snapshot_offset {
            Some(offset) => format!("snapshot at {offset}, then "),
            None => String::new(),
        };
        text += &format!(
            "  {} up to transaction {} of timeline {}: {snapshot}{} log objects\n",
            database.name, database.offset, database.timeline, database.log_objects
        );
    }
    text += &format!("to read: {}", bytes(plan.bytes_to_read));
    text
}
