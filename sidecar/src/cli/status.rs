//! `status`

use std::time::Duration;

use clap::Args;

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::bytes;
use crate::cli::signals::{ALL, Endings};
use crate::cli::{Context, DataDirArg};
use crate::daemon::health::Readiness;
use crate::ids::Offset;
use crate::status::{self, StatusReport};

#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    data: DataDirArg,
    /// Look again every two seconds until interrupted
    #[arg(long)]
    watch: bool,
    /// Only tell whether the daemon does its work, from its own notes and without a request to the store; exit code 3 and
    /// the reasons when not
    #[arg(long, conflicts_with = "watch")]
    ready: bool,
}

impl StatusArgs {
    /// Returns true if it looks again and again.
    pub fn watches(&self) -> bool {
        self.watch
    }
}

const WATCH_INTERVAL: Duration = Duration::from_secs(2);

pub async fn run(context: &Context<'_>, args: StatusArgs) -> Result<ExitStatus, Failure> {
    if args.ready {
        let readiness = status::ready(context.config(), &args.data.path(context)?, context.clock.as_ref());
        context.output.result(&readiness, describe_readiness);
        return Ok(if readiness.ready { ExitStatus::Ok } else { ExitStatus::Findings });
    }
    let data = args.data.open(context)?;
    let repository = context.repository_of(&data).await?;
    if !args.watch {
        let report = status::status(&repository, &data, context.config(), context.clock.as_ref()).await?;
        context.output.result(&report, describe);
        return Ok(ExitStatus::Ok);
    }
    let mut endings = Endings::listen(&ALL)?;
    loop {
        let report = status::status(&repository, &data, context.config(), context.clock.as_ref()).await?;
        context.output.result(&report, describe);
        // The reader has closed the pipe, or the disk is full.
        if context.output.is_broken() {
            return Ok(ExitStatus::Ok);
        }
        tokio::select! {
            () = context.clock.sleep(WATCH_INTERVAL) => {}
            _ = endings.next() => return Ok(ExitStatus::Ok),
        }
    }
}

fn describe_readiness(readiness: &Readiness) -> String {
    match readiness.ready {
        true => "ready".to_owned(),
        false => readiness.reasons.join("\n"),
    }
}

fn describe(report: &StatusReport) -> String {
    let mut text = String::new();
    let show = |offset: Option<Offset>| offset.map_or("-".to_owned(), |offset| offset.to_string());
    for database in &report.databases {
        text += &format!(
            "{}: timeline {}, log at {}, archived to {}, behind by {} transactions ({:.1} s), {} archived\n",
            database.name,
            database.timeline.map_or("-".into(), |timeline| timeline.to_string()),
            show(database.log_offset),
            show(database.archived_offset),
            database.lag_transactions,
            database.lag_seconds,
            bytes(database.archived_bytes)
        );
    }
    if let Some(point) = &report.last_restore_point {
        text += &format!("last restore point {} ({} s ago)\n", point.id, point.age_seconds);
    }
    for schedule in &report.schedules {
        let time = |time: Option<jiff::Timestamp>| time.map_or("-".to_owned(), |time| format!("{time:.0}"));
        text += &format!(
            "schedule {}: last {}, next {} ({} {})\n",
            schedule.name,
            time(schedule.last_run),
            time(schedule.next_run),
            schedule.cron,
            schedule.time_zone
        );
    }
    match &report.daemon {
        Some(daemon) if daemon.running => text += &format!("daemon: process {} runs\n", daemon.pid),
        _ => text += "daemon: not running; start it with `inner-universe run`\n",
    }
    for problem in &report.problems {
        text += &format!("problem: {problem}\n");
    }
    text
}
