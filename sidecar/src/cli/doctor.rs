//! `doctor`

use clap::Args;

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::server::ListenArgs;
use crate::cli::{Context, DataDirArg};
use crate::doctor::{self, Check, Verdict};

#[derive(Debug, Args)]
pub struct DoctorArgs {
    #[command(flatten)]
    data: DataDirArg,
    #[command(flatten)]
    listen: ListenArgs,
}

pub async fn run(context: &Context<'_>, args: DoctorArgs) -> Result<ExitStatus, Failure> {
    let config = args.listen.apply(context.config());
    let data_dir = args.data.path(context).ok();
    let checklist = doctor::examine(&config, data_dir.as_deref(), &context.clock).await;
    context.output.result(&checklist, |checklist| {
        let line = |check: &Check| {
            let mark = match check.verdict {
                Verdict::Pass => "pass",
                Verdict::Warn => "warn",
                Verdict::Fail => "FAIL",
            };
            let fix = if check.fix.is_empty() { String::new() } else { format!("\n{:26}{}", "", check.fix) };
            format!("{mark}  {:18}  {}{fix}", check.check, check.message)
        };
        checklist.checks.iter().map(line).collect::<Vec<_>>().join("\n")
    });
    Ok(if checklist.ok { ExitStatus::Ok } else { ExitStatus::Findings })
}
