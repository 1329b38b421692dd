//! `status`

use clap::Args;

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::{Context, DataDirArg};
use crate::status;

#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    data: DataDirArg,
}

pub async fn run(context: &Context<'_>, args: StatusArgs) -> Result<ExitStatus, Failure> {
    let data = args.data.open()?;
    let repository = context.repository().await?;
    let report = status::status(&repository, &data, context.clock.as_ref()).await?;
    context.output.result(&report, |report| {
        let mut text = String::new();
        let show = |offset: Option<crate::ids::Offset>| offset.map_or("-".to_owned(), |offset| offset.to_string());
        for database in &report.databases {
            text += &format!(
                "{}: log at {}, archived to {}, behind by {} transactions ({:.1} s)\n",
                database.name,
                show(database.log_offset),
                show(database.archived_offset),
                database.lag_transactions,
                database.lag_seconds
            );
        }
        if let Some(point) = &report.last_restore_point {
            text += &format!("last restore point {} ({} s ago)\n", point.id, point.age_seconds);
        }
        for problem in &report.problems {
            text += &format!("problem: {problem}\n");
        }
        text
    });
    Ok(ExitStatus::Ok)
}
