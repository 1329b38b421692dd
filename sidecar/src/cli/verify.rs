//! `verify`

use clap::Args;

use crate::cli::Context;
use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::bytes;
use crate::ids::RestorePointId;
use crate::verify;

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Restore points to verify; all when left out
    id: Vec<RestorePointId>,
}

pub async fn run(context: &Context<'_>, args: VerifyArgs) -> Result<ExitStatus, Failure> {
    let repository = context.repository().await?;
    let report = verify::verify(&repository, &args.id, context.output.progress()).await?;
    context.output.result(&report, |report| {
        let mut text = String::new();
        for finding in &report.findings {
            text +=
                &format!("{:?}: {}: {}\n  fix: {}\n", finding.severity, finding.object, finding.message, finding.fix);
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
        text
    });
    Ok(if report.findings.is_empty() { ExitStatus::Ok } else { ExitStatus::Findings })
}
