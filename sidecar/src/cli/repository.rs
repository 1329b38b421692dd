//! `repository init`: besides `backup create`, the only way to make a repository.

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::{Context, DataDirArg};
use crate::daemon::state::StateDir;
use crate::ids::RestorePointId;
use crate::repository::remembered::Remembered;
use crate::repository::{Repository, RepositoryError};

#[derive(Debug, Subcommand)]
pub enum RepositoryCommand {
    /// Make the repository if there is none, and remember it for the data directory; safe to run again
    Init(InitArgs),
}

#[derive(Debug, Args)]
pub struct InitArgs {
    #[command(flatten)]
    data: DataDirArg,
    /// An age recipient to encrypt a new repository to; may be given several times
    #[arg(long, value_name = "AGE1...")]
    recipient: Vec<String>,
    /// Use what is there, or make a new repository, although another one is remembered at this address
    #[arg(long)]
    replace: bool,
}

/// What `repository init` found or made. Field names are stable.
#[derive(Debug, Serialize)]
struct Initialised {
    url: String,
    id: RestorePointId,
    /// False if it was there.
    created: bool,
    recipients: Vec<String>,
    conditional_create: bool,
    conditional_update: bool,
    /// True if of writers at the same moment one wins; null where that is not known.
    conditional_race: Option<bool>,
}

pub async fn run(context: &Context<'_>, command: RepositoryCommand) -> Result<ExitStatus, Failure> {
    let RepositoryCommand::Init(args) = command;
    let (url, config) = (context.url()?, &context.config().repository);
    let keys = context.keyring(&args.recipient)?;
    let remembered = match args.data.path(context) {
        Ok(data_dir) => Some(Remembered::in_dir(StateDir::open(context.config(), &data_dir)?.path())),
        Err(_) => None,
    };
    let opened = Repository::open_to_write(url, config, keys.clone()).await;
    let opened = match &remembered {
        Some(remembered) if !args.replace => {
            remembered.at(url).map_err(RepositoryError::Forgotten)?;
            remembered.check(url, opened)
        }
        _ => opened,
    };
    let (repository, created) = match opened {
        Ok(repository) => (repository, false),
        Err(RepositoryError::NoRepository { .. }) => {
            (Repository::open_or_create(url, config, keys, context.clock.as_ref()).await?, true)
        }
        Err(error) => return Err(error.into()),
    };
    context.warn_of_store(&repository);
    if let Some(remembered) = &remembered {
        if args.replace {
            remembered.set_aside_unreadable()?;
        }
        remembered.remember(url, &repository)?;
    }
    let conditional = repository.conditional();
    // What it cannot tell keeps nobody from using the store.
    let conditional_race = match repository.race().await {
        Ok(race) => Some(race.is_decided()),
        Err(error) => {
            context.output.warn(&format!("whether several writers of a race win is not known: {error}"));
            None
        }
    };
    if conditional.create && conditional.update && conditional_race == Some(false) {
        context.output.warn(
            "the store honours conditional writes one at a time, and lets several of a race win: run only one sidecar, or use \
             a store that honours If-None-Match and If-Match",
        );
    }
    let report = Initialised {
        url: url.to_owned(),
        id: repository.info.id,
        created,
        recipients: repository.info.recipients.clone(),
        conditional_create: conditional.create,
        conditional_update: conditional.update,
        conditional_race,
    };
    context.output.result(&report, |report| {
        let what = if report.created { "made" } else { "found" };
        format!("{what} repository {} at {}", report.id, report.url)
    });
    Ok(ExitStatus::Ok)
}
