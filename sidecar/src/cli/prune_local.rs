//! `prune-local`

use clap::Args;

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::bytes;
use crate::cli::{Context, DataDirArg};
use crate::retention::local::{self, LocalReport};

#[derive(Debug, Args)]
pub struct PruneLocalArgs {
    #[command(flatten)]
    data: DataDirArg,
    /// How many of the server's newest snapshots must be whole and keep the log after them
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    keep_snapshots: u16,
    /// Do it; without this, only the plan is shown
    #[arg(long)]
    apply: bool,
}

pub async fn run(context: &Context<'_>, args: PruneLocalArgs) -> Result<ExitStatus, Failure> {
    let data = args.data.open(context)?;
    let repository = context.repository_of(&data).await?;
    let progress = context.output.progress();
    let plan = local::plan(&repository, &data, usize::from(args.keep_snapshots), progress.as_ref()).await?;
    let report = if args.apply { local::apply(&plan, context.clock.as_ref()).await? } else { plan };
    context.output.result(&report, describe);
    Ok(ExitStatus::Ok)
}

fn describe(report: &LocalReport) -> String {
    let mut text = String::new();
    for database in &report.databases {
        for segment in &database.segments {
            let (path, size) = (segment.path.display(), bytes(segment.bytes));
            text += &format!("{path}  transactions {} to {}  {size}\n", segment.first, segment.last);
        }
        text += &format!("database {}: {} and no more: {}\n", database.name, bytes(database.bytes), database.stays);
    }
    let size = bytes(report.bytes);
    text += &match report.applied {
        true => format!("{size} were freed"),
        false => format!("{size} would be freed; `--apply` does it"),
    };
    text
}
