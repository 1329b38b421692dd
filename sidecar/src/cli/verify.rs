//! `verify`

use clap::Args;

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::bytes;
use crate::cli::{Context, while_held};
use crate::ids::RestorePointId;
use crate::verify::repair::repair;
use crate::verify::{VerifyOptions, VerifyReport, verify};

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Restore points to verify; the whole repository when left out
    id: Vec<RestorePointId>,
    /// Read the bodies of this share of objects only, drawn at random; of the others presence, size and headers are checked
    #[arg(long, value_name = "PERCENT", default_value_t = 100, value_parser = clap::value_parser!(u8).range(0..=100))]
    read_data: u8,
    /// Write anew what the rest of the repository tells. Nothing is deleted
    #[arg(long, conflicts_with_all = ["id", "read_data"])]
    repair: bool,
}

pub async fn run(context: &Context<'_>, args: VerifyArgs) -> Result<ExitStatus, Failure> {
    let repaired = if args.repair { mend(context).await? } else { Vec::new() };
    let repository = context.repository().await?;
    let options = VerifyOptions { restore_points: args.id, read_data: args.read_data };
    let report = verify(&repository, &options, context.output.progress()).await?;
    let report = VerifyReport { repaired, ..report };
    context.output.result(&report, describe);
    Ok(if report.findings.is_empty() { ExitStatus::Ok } else { ExitStatus::Findings })
}

async fn mend(context: &Context<'_>) -> Result<Vec<String>, Failure> {
    let repository = context.writable(context.keyring(&[])?).await?;
    let lease = context.lease(&repository, false).await?;
    let fenced = lease.fenced();
    let written = while_held(&lease, context.clock.as_ref(), repair(&fenced, context.clock.as_ref())).await;
    lease.release().await;
    Ok(written?)
}

fn describe(report: &VerifyReport) -> String {
    let mut text = String::new();
    for name in &report.repaired {
        text += &format!("{name} was written anew\n");
    }
    for finding in &report.findings {
        text += &format!("{:?}: {}: {}\n  fix: {}\n", finding.severity, finding.object, finding.message, finding.fix);
    }
    for lost in &report.lost {
        text += &format!(
            "lost: transactions {} to {} of database {} on timeline {} cannot be restored\n",
            lost.first, lost.last, lost.name, lost.timeline
        );
    }
    text += &format!(
        "{} restore points, {} objects, {}: {}",
        report.restore_points.len(),
        report.objects,
        bytes(report.bytes),
        match report.findings.len() {
            0 => "nothing found".to_owned(),
            n => format!("{n} findings"),
        }
    );
    if report.read_data < 100 {
        text += &format!(" ({}% of bodies read)", report.read_data);
    }
    if !report.orphans.is_empty() {
        text += &format!("; {} objects that nothing refers to, which `prune` takes away", report.orphans.len());
    }
    text
}
