//! Deployments: a module published with a way back.
//!
//! A restore point, the publish, the module's settings, a verification; in deployment mode on a server that is started for
//! it on loopback, online on the one that runs. Each step is written down before it is taken, so that a run which was broken
//! off is ended by the next: either done or taken back.
//!
//! Invariants: what the server would refuse is refused before anything is changed; a failed step leaves program and rows as
//! they were right before the publish, and no write that was acknowledged before it is lost; deploying what is deployed
//! changes nothing.

mod begin;
pub mod configure;
pub mod cut;
mod history;
pub mod host;
pub mod journal;
mod keeper;
pub mod migration;
pub mod module;
mod plan;
mod program;
pub mod project;
pub mod record;
pub mod report;
mod rollback;
mod setup;
pub mod verify;

use std::sync::Arc;

use crate::clock::Stopwatch;
use crate::database::control::Preview;
use crate::database::description::Description;
use crate::deploy::begin::begin;
use crate::deploy::configure::Changes;
use crate::deploy::host::Host;
use crate::deploy::journal::{Journal, Step};
use crate::deploy::migration::Migration;
use crate::deploy::module::Module;
use crate::deploy::report::Steps;
use crate::ids::Identity;
use crate::observe::server::{Database, SourceError};
use crate::release::Release;
use crate::standalone::command::Binary;

pub use crate::deploy::history::{History, history, undo};
pub use crate::deploy::keeper::Keeper;
pub use crate::deploy::plan::{DeployPlan, plan};
pub use crate::deploy::report::{DeployError, DeployReport, Mode, Outcome, StepReport};
pub use crate::deploy::setup::{Setup, deployed_name, own_token};

/// The database's name where the configuration gives none.
pub const DEFAULT_NAME: &str = "inner-universe";

/// Deploys the module of the configuration.
///
/// # Errors
/// [`DeployError::RolledBack`] when a step failed and everything is as it was before the publish; any other error, and
/// nothing was changed, or what was changed is told.
pub async fn deploy(setup: &Setup) -> Result<DeployReport, DeployError> {
    let took = Stopwatch::start();
    let _one = setup.lock()?;
    let mut steps = Steps { progress: Arc::clone(&setup.progress), done: Vec::new() };
    let module_config = setup.config.module_config.clone();
    let module = steps
        .take("build", async {
            let module = blocking(move || Module::prepare(&module_config)).await??;
            let how = if setup.config.module_config.build_module { "built" } else { "read" };
            Ok((module.clone(), format!("{how} {}, {}", module.path.display(), module.hash)))
        })
        .await?;
    setup.keep_program(&module.hash, &module.bytes)?;
    let mut journal = begin(setup, &module, &mut steps).await?;
    journal.save(setup.dir())?;
    let result = run(setup, &module, &mut journal, &mut steps).await;
    match result {
        Ok(mut report) => {
            report.steps = steps.done;
            report.duration_ms = took.elapsed_ms();
            Journal::close(setup.dir())?;
            Ok(report)
        }
        Err(error) => {
            if journal.step == Step::Prepare {
                Journal::close(setup.dir())?;
            }
            Err(error)
        }
    }
}

async fn run(
    setup: &Setup,
    module: &Module,
    journal: &mut Journal,
    steps: &mut Steps,
) -> Result<DeployReport, DeployError> {
    let dir = setup.dir().to_owned();
    let opened = steps
        .take("server", async {
            let mut opened = journal.clone();
            let host = setup
                .open_host(|port| {
                    opened.server_port = Some(port);
                    opened.mode = Mode::Deployment;
                    Ok(opened.save(&dir)?)
                })
                .await?;
            *journal = opened;
            let url = host.config.spacetimedb_config.server_url();
            let message = match host.mode() {
                Mode::Deployment => format!("deployment mode, at {url}"),
                Mode::Online => format!("online, at {url}"),
            };
            Ok((host, message))
        })
        .await;
    let mut host = match opened {
        Ok(host) => host,
        // With what was published the server may not come up any more.
        Err(error) if journal.step > Step::Prepare && setup.rollback => {
            let reason = error.to_string();
            let done = match rollback::roll_back(setup, journal, None).await {
                Ok(done) => done,
                Err(error) => return Err(DeployError::NotRolledBack { reason, error: error.to_string() }),
            };
            Journal::close(&dir)?;
            return Err(DeployError::RolledBack { reason, done });
        }
        Err(error) => return Err(error),
    };
    let outcome = on_host(setup, module, journal, steps, &host).await;
    match outcome {
        Ok(report) => {
            if host.mode() == Mode::Deployment {
                host.stop().await?;
            }
            Ok(report)
        }
        Err(error) if journal.step == Step::Prepare => {
            if host.mode() == Mode::Deployment {
                host.stop().await?;
                rollback::leave_no_data_dir(setup, journal).await?;
            }
            Err(error)
        }
        Err(error) => {
            let reason = error.to_string();
            if !setup.rollback {
                let _ = setup.record(journal, Outcome::Failed, &reason, None, Some(&host)).await;
                Journal::close(&dir)?;
                if host.mode() == Mode::Deployment {
                    host.stop().await?;
                }
                return Err(error);
            }
            steps.progress.phase("roll back", None);
            match rollback::roll_back(setup, journal, Some(&mut host)).await {
                Ok(done) => {
                    let recorded = setup.record(journal, Outcome::RolledBack, &reason, None, Some(&host)).await;
                    if let Err(error) = recorded {
                        tracing::warn!(%error, "the failed deployment is not in the history");
                    }
                    Journal::close(&dir)?;
                    Err(DeployError::RolledBack { reason, done })
                }
                Err(error) => {
                    let error = error.to_string();
                    if !host.can_stop() {
                        // Another try would fail as this one: it is for a person, and must not bar the next deployment.
                        let _ = setup.record(journal, Outcome::Failed, &reason, None, Some(&host)).await;
                        Journal::close(&dir)?;
                    }
                    Err(DeployError::NotRolledBack { reason, error })
                }
            }
        }
    }
}

/// What is on the server, held against what is to be there.
struct Found {
    database: Database,
    described: Option<Description>,
    migration: Migration,
    /// Shown to the server where its release wants to see that a publish breaks clients knowingly.
    token: Option<String>,
    problems: Vec<String>,
}

async fn on_host(
    setup: &Setup,
    module: &Module,
    journal: &mut Journal,
    steps: &mut Steps,
    host: &Host,
) -> Result<DeployReport, DeployError> {
    let dir = setup.dir().to_owned();
    let resumed = journal.step > Step::Prepare;
    let mut found = steps
        .take("compare", async {
            let found = compare(setup, module, journal, host, resumed).await?;
            let message = found.migration.describe();
            Ok((found, message))
        })
        .await?;
    let mut changes = match journal.publishes && !resumed {
        // A new module may know other settings.
        true => Changes::default(),
        false => look_at_settings(setup, &found.database).await?,
    };
    if !resumed {
        if !journal.publishes && changes.is_empty() {
            steps.done.push(StepReport { step: "publish", message: "nothing to change".into(), duration_ms: 0 });
            return Ok(found.report(journal, changes, Outcome::Unchanged));
        }
        restore_point(setup, journal, steps, &mut found).await?;
    }
    if journal.publishes {
        journal.enter(Step::Publish, &dir)?;
        let database = &found.database;
        let identity = steps
            .take("publish", async {
                if database.find().await?.is_some() && database.program().await.ok().flatten() == Some(module.hash) {
                    return Ok((journal.identity, "the module runs already".into()));
                }
                let identity = database.publish(module.bytes.clone(), found.token.as_deref()).await?;
                Ok((Some(identity), format!("{} bytes as {}", module.bytes.len(), setup.name)))
            })
            .await?;
        journal.identity = identity.or(database.find().await?);
    }
    journal.enter(Step::Initialise, &dir)?;
    if journal.publishes {
        changes = look_at_settings(setup, &found.database).await?;
        remember(journal, &changes);
        journal.save(&dir)?;
    }
    steps
        .take("initialise", async {
            configure::apply(&found.database, &changes).await?;
            Ok(((), changes.describe()))
        })
        .await?;
    journal.enter(Step::Verify, &dir)?;
    steps
        .take("verify", async {
            let seen = verify::verify(&found.database, &module.hash, found.described.as_ref(), journal.id).await?;
            Ok(((), seen))
        })
        .await?;
    journal.enter(Step::Record, &dir)?;
    let offset = setup.publish_offset(journal).await;
    // It runs and is verified: a store that is out is no reason to take it back.
    if let Err(error) = setup.record(journal, Outcome::Deployed, &found.migration.describe(), offset, Some(host)).await
    {
        found.problems.push(format!("the deployment is not in the history: {error}"));
    }
    setup.remember_deployed(journal)?;
    if !journal.existed {
        // Until there is a restore point, nothing of what was deployed could be brought back.
        let made = steps.take("restore point", async {
            let report = setup.keeper.restore_point(setup, "deployed").await?;
            Ok(((), report.map_or_else(|| "none".into(), |report| report.restore_point.to_string())))
        });
        if let Err(error) = made.await {
            found.problems.push(format!("no restore point was taken after the deployment: {error}"));
        }
    }
    Ok(found.report(journal, changes, Outcome::Deployed))
}

async fn compare(
    setup: &Setup,
    module: &Module,
    journal: &mut Journal,
    host: &Host,
    resumed: bool,
) -> Result<Found, DeployError> {
    let database = setup.database(host).await?;
    let mut problems = Vec::new();
    let identity = database.find().await?;
    if !resumed {
        journal.mode = host.mode();
        journal.identity = identity;
        journal.existed = identity.is_some();
    }
    let described = match Binary::find(&setup.config) {
        Ok(binary) => {
            let (release, module) = (binary.release(), module.clone());
            match blocking(move || module.describe(&binary)).await? {
                Ok(described) => Some(described),
                // Another server's binary that happens to be here may not know the module's kind.
                Err(error) if Release::of(database.server_version().await?.as_deref()) != release => {
                    problems.push(format!("the module's tables were not compared beforehand: {error}"));
                    None
                }
                Err(error) => return Err(error),
            }
        }
        Err(error) => {
            problems.push(format!("the module's tables were not compared beforehand: {error}"));
            None
        }
    };
    let mut found = Found { database, described, migration: Migration::First, token: None, problems };
    if identity.is_none() {
        return Ok(found);
    }
    let database = &found.database;
    let running = database.program().await.map_err(|error| match error {
        SourceError::Refused { .. } => DeployError::NotOwner { name: setup.name.clone() },
        error => error.into(),
    })?;
    if !resumed {
        journal.previous = running;
        journal.publishes = running != Some(module.hash);
    }
    if !journal.publishes || running == Some(module.hash) {
        found.migration = Migration::None;
        return Ok(found);
    }
    found.migration = match database.preview(module.bytes.clone()).await? {
        Preview::Refused { reason } => Migration::Breaking { reasons: vec![reason] },
        Preview::Migrates { is_major_upgrade: true, .. } if !setup.major_upgrade => {
            return Err(DeployError::MajorUpgrade);
        }
        Preview::Migrates { steps, breaks_clients, token, .. } => {
            if breaks_clients {
                found.problems.push("clients with older bindings are disconnected and must be generated anew".into());
                found.token = Some(token);
            }
            Migration::of_steps(steps)
        }
        Preview::NotServed => match &found.described {
            Some(new) => Migration::between(&database.description().await?, new),
            None => Migration::Unknown { reason: "no server binary is here to read the module with".into() },
        },
    };
    match &found.migration {
        Migration::Breaking { reasons } => Err(DeployError::Breaking(reasons.join("; "))),
        _ => Ok(found),
    }
}

async fn look_at_settings(setup: &Setup, database: &Database) -> Result<Changes, DeployError> {
    let schema = database.description().await?.into();
    Ok(configure::changes(database, &schema, &setup.config).await?)
}

fn remember(journal: &mut Journal, changes: &Changes) {
    for (known, added) in [(&mut journal.admins, &changes.admins), (&mut journal.members, &changes.members)] {
        let new: Vec<_> = added.iter().filter(|identity| !known.contains(identity)).cloned().collect();
        known.extend(new);
    }
    for change in &changes.settings {
        if !journal.settings_before.iter().any(|(key, _)| *key == change.key) {
            journal.settings_before.push((change.key.clone(), change.from.clone()));
        }
    }
}

/// The way back: a restore point, the program that runs, the settings, and where the log ends.
async fn restore_point(
    setup: &Setup,
    journal: &mut Journal,
    steps: &mut Steps,
    found: &mut Found,
) -> Result<(), DeployError> {
    let point = steps
        .take("restore point", async {
            if !journal.existed && !journal.had_data_dir {
                return Ok((None, "nothing was there".into()));
            }
            match setup.keeper.restore_point(setup, "pre-deploy").await? {
                Some(report) => {
                    found.problems.extend(report.problems.iter().cloned());
                    Ok((Some(report.restore_point), report.restore_point.to_string()))
                }
                None => Ok((None, "no repository is at hand, or nothing is in the database yet".into())),
            }
        })
        .await?;
    journal.restore_point = point;
    if !journal.existed {
        return Ok(());
    }
    if let Some(previous) = journal.previous
        && let Some(bytes) = found.database.program_bytes().await?
    {
        setup.keep_program(&previous, &bytes)?;
    }
    let settings = look_at_settings(setup, &found.database).await?;
    remember(journal, &settings);
    if let Some((_, replica)) = setup.replica(journal).await? {
        // The server answers a moment before it writes, so this is early, and never late.
        journal.log_end = Some(blocking(move || cut::end_of_log(&replica)).await??);
    }
    Ok(())
}

impl Found {
    fn report(&self, journal: &Journal, changes: Changes, outcome: Outcome) -> DeployReport {
        DeployReport {
            deployment: journal.id,
            database: journal.identity.unwrap_or(Identity([0; 32])),
            name: journal.name.clone(),
            mode: journal.mode,
            outcome,
            module: journal.module,
            previous: journal.previous,
            migration: self.migration.clone(),
            changes,
            restore_point: journal.restore_point,
            steps: Vec::new(),
            problems: self.problems.clone(),
            duration_ms: 0,
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, DeployError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| DeployError::Worker(error.to_string()))
}
