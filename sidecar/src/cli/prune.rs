//! `prune`

use clap::Args;

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::bytes;
use crate::cli::{Context, while_held};
use crate::daemon::control::{self, Answer, Request};
use crate::daemon::state::StateDir;
use crate::retention::policy::Policy;
use crate::retention::{self, PruneReport};

#[derive(Debug, Args)]
pub struct PruneArgs {
    /// Do it; without this, only the plan is shown
    #[arg(long)]
    apply: bool,
    /// Take the lease from another sidecar; only when that one is dead
    #[arg(long, requires = "apply")]
    force: bool,
    /// Remove although the clock is in doubt; only when it is right and nothing ran for as long as it says
    #[arg(long, requires = "apply")]
    trust_clock: bool,
}

pub async fn run(context: &Context<'_>, args: PruneArgs) -> Result<ExitStatus, Failure> {
    if args.apply
        && !args.force
        && let Some(report) = ask_daemon(context, args.trust_clock).await?
    {
        return Ok(show(context, &report));
    }
    let config = context.config();
    let policy = Policy::new(&config.retention, config.schedule.time_zone.0);
    let grace = config.retention.grace.0;
    if !args.apply {
        let repository = context.repository().await?;
        let plan = retention::plan(&repository, &policy, grace, context.clock.now()).await?;
        return Ok(show(context, &plan.report()));
    }
    let repository = context.writable(context.keyring(&[])?).await?;
    let lease = context.lease(&repository, args.force).await?;
    let fenced = lease.fenced();
    let work = async {
        let plan = retention::plan_to_apply(&fenced, &policy, grace, context.clock.now()).await?;
        retention::apply(&fenced, &plan.trusting_clock(args.trust_clock), context.clock.as_ref()).await
    };
    let report = while_held(&lease, context.clock.as_ref(), work).await;
    lease.release().await;
    Ok(show(context, &report?))
}

/// The daemon on this machine holds the lease, if it writes to this repository.
async fn ask_daemon(context: &Context<'_>, trust_clock: bool) -> Result<Option<PruneReport>, Failure> {
    let Some(data_dir) = &context.config().spacetimedb_config.db_path else { return Ok(None) };
    let socket = StateDir::locate(context.config(), data_dir).join("control.sock");
    let request = Request::Prune {
        url: context.url()?.to_owned(),
        trust_clock,
        retention: Some(context.config().retention.clone()),
    };
    match control::ask(&socket, &request).await {
        Ok(Some(Answer::Pruned(report))) => Ok(Some(report)),
        Ok(Some(Answer::Failed(message))) => Err(Failure::new(ExitStatus::Failed, message)),
        Ok(_) => Ok(None),
        Err(error) => Err(Failure::new(ExitStatus::Failed, format!("the daemon did not answer: {error}"))),
    }
}

fn show(context: &Context<'_>, report: &PruneReport) -> ExitStatus {
    context.output.result(report, describe);
    if report.problems.is_empty() { ExitStatus::Ok } else { ExitStatus::Findings }
}

fn describe(report: &PruneReport) -> String {
    let mut text = String::new();
    for problem in &report.problems {
        text += &format!("problem: {problem}\n");
    }
    if let Some(doubt) = &report.clock_doubt {
        text += &format!("the clock is in doubt, and `--apply` removes nothing: {doubt}\n");
    }
    for point in &report.kept {
        let reasons: Vec<_> = point.reasons.iter().map(|reason| format!("{reason:?}").to_lowercase()).collect();
        text += &format!("keep    {}  {}  {}\n", point.id, point.created_at, reasons.join(", "));
    }
    for point in &report.removed {
        text += &format!("remove  {}  {}  from {} on\n", point.id, point.created_at, point.deleted_from);
    }
    for object in &report.refused {
        text += &format!("refused by the store, as under object lock: {object}\n");
    }
    let done = if report.applied { "deleted" } else { "would be deleted" };
    text += &format!(
        "{} kept, {} to be removed; {} objects, {}, {done}; {} objects, {}, wait for the end of their grace",
        report.kept.len(),
        report.removed.len(),
        report.deleted.objects,
        bytes(report.deleted.bytes),
        report.marked.objects.saturating_sub(if report.applied { 0 } else { report.deleted.objects }),
        bytes(report.marked.bytes.saturating_sub(if report.applied { 0 } else { report.deleted.bytes })),
    );
    if !report.applied {
        text += "\nnothing was changed; `--apply` does it";
    }
    text
}
