//! `deploy`, `deploy plan`, `deploy rollback`, `deploy history`

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand};
use tokio_util::sync::CancellationToken;

use crate::cli::failure::{ExitStatus, Failure};
use crate::cli::output::duration;
use crate::cli::server::ListenArgs;
use crate::cli::signals::{ALL, cancel_when_told};
use crate::cli::{Context, while_held};
use crate::config::Config;
use crate::daemon::control::{self, Answer, Request};
use crate::daemon::state::StateDir;
use crate::deploy::journal::{Journal, Step};
use crate::deploy::project::{Project, Source};
use crate::deploy::{self, DEFAULT_NAME, DeployPlan, DeployReport, History, Keeper, Outcome, Setup, own_token};
use crate::durable;
use crate::repository::Repository;
use crate::repository::address::Address;
use crate::repository::remembered::Remembered;

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct DeployArgs {
    #[command(subcommand)]
    command: Option<DeployCommand>,
    #[command(flatten)]
    target: TargetArgs,
    /// Leave what a failed step has changed as it is
    #[arg(long)]
    no_rollback: bool,
    /// Publish although the module is built for the server's next major release, which clients with older bindings may not
    /// understand
    #[arg(long)]
    major_upgrade: bool,
    /// Take the lease from another sidecar; only when that one is dead
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Subcommand)]
enum DeployCommand {
    /// Say what a deployment would do, and change nothing
    Plan(TargetArgs),
    /// Go back to the program that was deployed before, or take back a deployment that was broken off
    Rollback {
        #[command(flatten)]
        target: TargetArgs,
        /// Take the rows back too, to right before the publish; what was written since is moved aside
        #[arg(long)]
        data: bool,
        /// Say what would be done, and change nothing
        #[arg(long)]
        dry_run: bool,
    },
    /// What was deployed, when, by whom
    History(TargetArgs),
}

/// What to deploy, and where.
#[derive(Debug, Clone, Args)]
struct TargetArgs {
    /// The compiled module, a .wasm file or a bundle of JavaScript; module_config.module_path when left out
    #[arg(long, alias = "bin-path", alias = "js-path", value_name = "FILE")]
    module_path: Option<PathBuf>,
    /// A directory with the `spacetime.json` of the `spacetime` CLI: database, module and server are taken from there, where
    /// no other flag gives them
    #[arg(long, value_name = "DIR")]
    project: Option<PathBuf>,
    /// With the overlays of this environment, such as `spacetime.NAME.json`
    #[arg(long, value_name = "NAME", requires = "project")]
    env: Option<String>,
    /// The module's source; module_config.module_dir when left out
    #[arg(long, value_name = "DIR")]
    module_dir: Option<PathBuf>,
    /// Build the module first
    #[arg(long, overrides_with = "no_build")]
    build: bool,
    /// Take the module as it is, whatever module_config.build_module says
    #[arg(long)]
    no_build: bool,
    /// The server's data directory; spacetimedb_config.db_path when left out. Where no server runs on it, one is started for
    /// the deployment, on loopback
    #[arg(long, alias = "db-path", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Where the server is reached; spacetimedb_config.url when left out
    #[arg(long, value_name = "URL")]
    server: Option<String>,
    /// The database's name; spacetimedb_config.database when left out, and `inner-universe` without that
    #[arg(long, value_name = "NAME")]
    database: Option<String>,
    /// The token of the database's owner, on a line of its own or in the `cli.toml` of the `spacetime` CLI; spacetimedb_config.token_file when left out, and without that an identity of our own
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    #[command(flatten)]
    listen: ListenArgs,
}

impl TargetArgs {
    fn apply(&self, config: &Config) -> Result<Config, Failure> {
        let mut config = self.listen.apply(config);
        if let Some(dir) = &self.project {
            take_project(&mut config, dir, self.env.as_deref(), self.database.as_deref()).map_err(Failure::usage)?;
        }
        let module = &mut config.module_config;
        if self.module_path.is_some() {
            module.module_path.clone_from(&self.module_path);
            // A file that is named is the one to take.
            module.build_module = self.build;
        }
        if self.module_dir.is_some() {
            module.module_dir.clone_from(&self.module_dir);
        }
        module.build_module = (module.build_module || self.build) && !self.no_build;
        let server = &mut config.spacetimedb_config;
        if self.data_dir.is_some() {
            server.db_path.clone_from(&self.data_dir);
        }
        if self.server.is_some() {
            server.url.clone_from(&self.server);
        }
        if self.token_file.is_some() {
            server.token_file.clone_from(&self.token_file);
        }
        if self.database.is_some() {
            server.database.clone_from(&self.database);
        }
        server.database.get_or_insert_with(|| DEFAULT_NAME.to_owned());
        if let Some(path) = &mut server.db_path {
            *path =
                std::path::absolute(&*path).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
        }
        if let Some((key, problem)) = config.validate().into_iter().next() {
            return Err(Failure::usage(format!("{key}: {problem}")));
        }
        Ok(config)
    }

    fn setup(&self, context: &Context<'_>, rollback: bool) -> Result<Setup, Failure> {
        let mut config = self.apply(context.config())?;
        let data_dir = config.spacetimedb_config.db_path.clone();
        let place = match &data_dir {
            Some(dir) => dir.clone(),
            // A place of its own for each server, wherever we stand.
            None => Path::new("/").join(config.spacetimedb_config.server_url().replace('/', "_")),
        };
        let state_dir = StateDir::open(&config, &place).map_err(|error| Failure::new(ExitStatus::Failed, error))?;
        // A file that is named and not there is where the first deployment leaves its token.
        let to_be_made = config.spacetimedb_config.token_file.take_if(|path| !path.exists());
        let token_path = to_be_made.unwrap_or_else(|| own_token(state_dir.path()));
        if let (None, Some(dir)) = (&config.repository.url, &data_dir) {
            let url = beside(dir)?;
            context.output.warn(&format!(
                "no repository is named; what is needed to go back is kept in {url}, on the same disk: set repository.url"
            ));
            config.repository.url = Some(url);
        }
        let mut watch: Vec<OsString> = context.words_of_globals();
        watch.extend(["server".into(), "watch".into()]);
        if let Some(dir) = &data_dir {
            watch.extend(["--data-dir".into(), dir.into()]);
        }
        watch.extend(self.listen.words());
        Ok(Setup {
            name: config.spacetimedb_config.database.clone().unwrap_or_default(),
            config,
            data_dir,
            state_dir,
            token_path,
            keeper: Keeper::Nobody,
            rollback,
            major_upgrade: false,
            watch,
            clock: Arc::clone(&context.clock),
            progress: context.output.progress(),
        })
    }
}

/// Puts what a project says into the configuration.
fn take_project(config: &mut Config, dir: &Path, env: Option<&str>, database: Option<&str>) -> Result<(), String> {
    let Project { database, server, source } = Project::read(dir, env, database)?;
    config.spacetimedb_config.database = Some(database);
    if server.is_some() {
        config.spacetimedb_config.url = server;
    }
    let module = &mut config.module_config;
    match source {
        Some(Source::File(path)) => (module.module_path, module.build_module) = (Some(path), false),
        Some(Source::Directory(path)) => (module.module_dir, module.build_module) = (Some(path), true),
        None => {}
    }
    Ok(())
}

fn beside(dir: &Path) -> Result<String, Failure> {
    let address = Address::directory(&durable::beside(dir, ".repository")).map_err(Failure::usage)?;
    Ok(address.url().to_owned())
}

pub async fn run(context: &Context<'_>, args: DeployArgs) -> Result<ExitStatus, Failure> {
    match args.command {
        None => {
            let mut setup = args.target.setup(context, !args.no_rollback)?;
            setup.major_upgrade = args.major_upgrade;
            let report =
                with_keeper(context, &mut setup, args.force, async |setup| deploy::deploy(setup).await).await?;
            for problem in &report.problems {
                context.output.warn(problem);
            }
            context.output.result(&report, describe);
        }
        Some(DeployCommand::Plan(target)) => {
            let setup = target.setup(context, false)?;
            context.output.result(&deploy::plan(&setup).await?, describe_plan);
        }
        Some(DeployCommand::Rollback { target, data, dry_run }) => {
            let mut setup = target.setup(context, false)?;
            let repository = open(context, &setup.config).await?;
            let report = with_keeper(context, &mut setup, false, async |setup| {
                deploy::undo(setup, &repository, data, dry_run).await
            });
            context.output.result(&report.await?, |report| {
                let to = report.to.map_or_else(|| "nothing".to_owned(), |hash| hash.to_string());
                let done = if report.dry_run { "would go back" } else { "went back" };
                format!("{}: {done} from {} to {to}; {}", report.name, report.from, report.message)
            });
        }
        Some(DeployCommand::History(target)) => {
            let setup = target.setup(context, false)?;
            let repository = open(context, &setup.config).await?;
            context.output.result(&deploy::history(&repository, &setup.name).await?, describe_history);
        }
    }
    Ok(ExitStatus::Ok)
}

async fn open(context: &Context<'_>, config: &Config) -> Result<Repository, Failure> {
    let url = config.repository.url.as_deref().unwrap_or_default();
    if url.is_empty() {
        return Err(Failure::usage("no repository is named, and so there is no history; give --repository URL"));
    }
    Ok(Repository::open(url, &config.repository, context.keyring(&[])?).await?)
}

/// Does a daemon archive the data directory, and so hold the lease?
async fn archives(setup: &Setup) -> bool {
    let answer = control::ask(&setup.state_dir.socket(), &Request::Archiving).await;
    // One of another release does not know the question.
    !matches!(answer, Ok(None | Some(Answer::NotArchiving(_))))
}

/// Works with whoever keeps the repository: the daemon if one runs, else a lease of our own. Told to stop, it ends the
/// server that it has started, and the next run goes on.
async fn with_keeper<T>(
    context: &Context<'_>,
    setup: &mut Setup,
    force: bool,
    work: impl AsyncFnOnce(&Setup) -> Result<T, deploy::DeployError>,
) -> Result<T, Failure> {
    let stop = CancellationToken::new();
    cancel_when_told(stop.clone(), &ALL)?;
    let Some(url) = setup.config.repository.url.clone() else {
        return Ok(until_told(setup, work(setup), &stop).await??);
    };
    if setup.data_dir.is_some() && archives(setup).await {
        setup.keeper = Keeper::Daemon { url };
        return Ok(until_told(setup, work(setup), &stop).await??);
    }
    let (config, clock) = (&setup.config.repository, Arc::clone(&context.clock));
    let remembered = Remembered::in_dir(setup.state_dir.path());
    // The place that `deploy` chooses itself, beside the data directory, is made by it too.
    let is_own = setup.data_dir.as_deref().is_some_and(|dir| beside(dir).is_ok_and(|own| own == url));
    let repository = match is_own {
        true => remembered.open_or_create(&url, config, context.keyring(&[])?, clock.as_ref()).await?,
        false => remembered.open(&url, config, context.keyring(&[])?).await?,
    };
    let lease = context.lease(&repository, force).await?;
    setup.keeper = Keeper::Own(Box::new(lease.fenced()));
    let result = while_held(&lease, clock.as_ref(), until_told(setup, work(setup), &stop)).await;
    lease.release().await;
    Ok(result??)
}

/// Leaves the work where it is when we are told to stop; but a rollback is brought to its end.
async fn until_told<T>(setup: &Setup, work: impl Future<Output = T>, stop: &CancellationToken) -> Result<T, Failure> {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        result = &mut work => return Ok(result),
        () = stop.cancelled() => {}
    }
    let journal = Journal::load(setup.state_dir.path()).ok().flatten();
    if journal.is_some_and(|journal| journal.step == Step::RollBack) {
        tracing::warn!("what was changed is being taken back; this ends when that is done");
        return Ok(work.await);
    }
    let message = "interrupted; run `inner-universe deploy` again to finish, or `inner-universe deploy rollback`";
    Err(Failure::new(ExitStatus::Failed, message))
}

fn describe(report: &DeployReport) -> String {
    let outcome = match report.outcome {
        Outcome::Unchanged => "is deployed as it should be already",
        _ => "is deployed",
    };
    let mut text = format!("{} {outcome}: program {}, database {}\n", report.name, report.module, report.database);
    for step in &report.steps {
        text += &format!("  {:14} {}\n", step.step, step.message);
    }
    text + &format!("in {}", duration(report.duration_ms))
}

fn describe_plan(plan: &DeployPlan) -> String {
    let mode = match plan.mode {
        deploy::Mode::Deployment => "deployment mode: a server is started for it, on loopback",
        deploy::Mode::Online => "online, on the server that runs",
    };
    let hash = |hash: Option<crate::ids::ContentHash>| hash.map_or_else(|| "-".to_owned(), |hash| hash.to_string());
    format!(
        "{}, {mode}; nothing was changed\n  runs      {}\n  module    {}\n  tables    {}\n  settings  {}\n  steps     {}",
        plan.name,
        hash(plan.running),
        hash(plan.module),
        plan.migration.describe(),
        plan.changes.describe(),
        plan.steps.join(", ")
    )
}

fn describe_history(history: &History) -> String {
    if history.deployments.is_empty() {
        return format!("nothing was deployed to {} yet", history.name);
    }
    let line = |record: &crate::deploy::record::DeploymentRecord| {
        let outcome = serde_json::to_string(&record.outcome).unwrap_or_default();
        let by = record.deployed_by.map_or_else(|| "-".to_owned(), |identity| identity.to_string()[..16].to_owned());
        format!(
            "{}  {:.0}  {:11} {}  by {by}  {}",
            record.id,
            record.started_at,
            outcome.trim_matches('"'),
            &record.module.to_string()[..16],
            record.message
        )
    };
    history.deployments.iter().map(line).collect::<Vec<_>>().join("\n")
}
