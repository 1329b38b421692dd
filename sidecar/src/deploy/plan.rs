//! What a deployment would do, found out without changing anything.

use std::path::PathBuf;

use serde::Serialize;

use crate::database::control::Preview;
use crate::datadir::lock::{self, ServerLock};
use crate::deploy::configure::{self, Changes};
use crate::deploy::migration::Migration;
use crate::deploy::module::Module;
use crate::deploy::{DeployError, Mode, Setup, blocking};
use crate::ids::{ContentHash, Identity};
use crate::observe::server::Database;
use crate::standalone::command::Binary;

/// A deployment before it is made. Field names are stable.
#[derive(Debug, Serialize)]
pub struct DeployPlan {
    pub name: String,
    pub mode: Mode,
    #[serde(serialize_with = "crate::lossy::option")]
    pub module_path: Option<PathBuf>,
    /// `None` where the module is to be built first.
    pub module: Option<ContentHash>,
    /// `None` where the database is new, or its server does not run.
    pub database: Option<Identity>,
    pub running: Option<ContentHash>,
    pub migration: Migration,
    pub changes: Changes,
    pub steps: Vec<&'static str>,
}

/// Makes the plan. Nothing is built, started or written.
///
/// # Errors
/// When the module cannot be read, or a server that runs cannot be asked.
pub async fn plan(setup: &Setup) -> Result<DeployPlan, DeployError> {
    let builds = setup.config.module_config.build_module;
    let module = match (&setup.config.module_config.module_path, builds) {
        (Some(path), false) => Some(Module::read(path)?),
        (None, false) => return Err(DeployError::NoModule),
        (_, true) => None,
    };
    let runs = match &setup.data_dir {
        Some(dir) => matches!(lock::probe_file(&dir.join("spacetime.pid"))?, ServerLock::Held { .. }),
        None => true,
    };
    let mut steps = vec!["build", "server", "compare", "restore point", "publish", "initialise", "verify", "record"];
    if !builds {
        steps.retain(|step| *step != "build");
    }
    let mut plan = DeployPlan {
        name: setup.name.clone(),
        mode: if runs { Mode::Online } else { Mode::Deployment },
        module_path: setup.config.module_config.module_path.clone(),
        module: module.as_ref().map(|module| module.hash),
        database: None,
        running: None,
        migration: Migration::Unknown { reason: "the server does not run; it is compared once it is started".into() },
        changes: Changes::default(),
        steps,
    };
    if !runs {
        return Ok(plan);
    }
    let config = &setup.config;
    let mut database = Database::new(&config.spacetimedb_config, &config.server_config, &setup.name)?;
    if let (false, Ok(token)) = (database.has_token(), std::fs::read_to_string(&setup.token_path)) {
        database = database.with_token(token.trim());
    }
    plan.database = database.find().await?;
    if plan.database.is_none() {
        plan.migration = Migration::First;
        return Ok(plan);
    }
    let refused = |_| DeployError::NotOwner { name: setup.name.clone() };
    plan.running = database.program().await.map_err(refused)?;
    plan.migration = match &module {
        None => Migration::Unknown { reason: "the module is to be built first".into() },
        Some(module) if plan.running == Some(module.hash) => Migration::None,
        Some(module) => compare(setup, &database, module.clone()).await?,
    };
    if plan.running.is_some() && plan.running == plan.module {
        let schema = database.description().await?.into();
        plan.changes = configure::changes(&database, &schema, config).await?;
        if plan.changes.is_empty() {
            plan.steps = vec!["server", "compare"];
        }
    }
    Ok(plan)
}

async fn compare(setup: &Setup, database: &Database, module: Module) -> Result<Migration, DeployError> {
    match database.preview(module.bytes.clone()).await? {
        Preview::Refused { reason } => return Ok(Migration::Breaking { reasons: vec![reason] }),
        Preview::Migrates { steps, is_major_upgrade, .. } => {
            let upgrade = is_major_upgrade.then(|| "the module is upgraded to the server's major release".to_owned());
            return Ok(Migration::of_steps(upgrade.into_iter().chain(steps).collect()));
        }
        Preview::NotServed => {}
    }
    let binary = match Binary::find(&setup.config) {
        Ok(binary) => binary,
        Err(error) => return Ok(Migration::Unknown { reason: error.to_string() }),
    };
    let described = blocking(move || module.describe(&binary)).await??;
    Ok(Migration::between(&database.description().await?, &described))
}
