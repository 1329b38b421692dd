//! How a deployment begins: what an earlier one has left is ended first.

use jiff::{SignedDuration, Timestamp};

use crate::datadir::DataDir;
use crate::deploy::journal::{Journal, Step};
use crate::deploy::module::Module;
use crate::deploy::report::Steps;
use crate::deploy::{DeployError, Mode, Outcome, Setup, blocking, cut, host, rollback};
use crate::ids::{Offset, RestorePointId};

/// No deployment takes longer than this.
pub(super) const LONGEST: SignedDuration = SignedDuration::from_mins(15);

pub(super) fn new_journal(setup: &Setup, module: &Module) -> Journal {
    let now = setup.clock.now();
    Journal {
        id: RestorePointId::after(None, now),
        step: Step::Prepare,
        started_at: now,
        mode: Mode::Online,
        name: setup.name.clone(),
        server_port: None,
        had_data_dir: setup.data_dir.as_ref().is_some_and(|dir| DataDir::open(dir).is_ok()),
        existed: false,
        identity: None,
        module: module.hash,
        previous: None,
        publishes: true,
        log_end: None,
        restore_point: None,
        settings_before: Vec::new(),
        admins: Vec::new(),
        members: Vec::new(),
        restart: None,
    }
}

/// Ends what an earlier run has left: its server, and its changes, unless they are of the same module and can go on.
pub(super) async fn begin(setup: &Setup, module: &Module, steps: &mut Steps) -> Result<Journal, DeployError> {
    let Some(left) = Journal::load(setup.dir())? else { return Ok(new_journal(setup, module)) };
    end_orphan(setup, &left).await?;
    if left.step == Step::Prepare {
        // What a server made of an empty place before anything was published is no data.
        let empty = !left.had_data_dir && setup.databases().await?.is_empty();
        let fresh = new_journal(setup, module);
        return Ok(Journal { had_data_dir: fresh.had_data_dir && !empty, ..fresh });
    }
    if left.step == Step::Record {
        complete(setup, &left).await?;
        return Ok(new_journal(setup, module));
    }
    if left.step != Step::RollBack && is_in_use(setup, &left).await? {
        tracing::warn!(
            deployment = %left.id,
            "an interrupted deployment is kept, since the database was used after it; this deployment does what is left of it"
        );
        complete(setup, &left).await?;
        return Ok(new_journal(setup, module));
    }
    if left.step != Step::RollBack && left.module == module.hash && left.name == setup.name {
        tracing::warn!(deployment = %left.id, step = ?left.step, "a deployment that was broken off goes on");
        return Ok(left);
    }
    take_back(setup, left, steps).await?;
    Ok(new_journal(setup, module))
}

/// Was the database used after the deployment was interrupted? Then a rollback would remove what clients wrote since.
async fn is_in_use(setup: &Setup, left: &Journal) -> Result<bool, DeployError> {
    let since = left.started_at.checked_add(LONGEST).unwrap_or(Timestamp::MAX);
    if setup.clock.now() < since || !left.publishes {
        return Ok(false);
    }
    let Some((_, replica)) = setup.replica(left).await? else { return Ok(false) };
    let (from, module) = (left.log_end.unwrap_or(Offset(0)), left.module);
    blocking(move || match cut::find_publish(&replica, from, &module)? {
        Some(published) => Ok(cut::is_written(&replica, published.offset, since)?),
        None => Ok(false),
    })
    .await?
}

/// Ends a deployment that was done but for its record. It may have been used for long: nothing of it is taken back.
pub(super) async fn complete(setup: &Setup, left: &Journal) -> Result<(), DeployError> {
    let offset = setup.publish_offset(left).await;
    setup.record(left, Outcome::Deployed, "recorded by a later run", offset, None).await?;
    setup.remember_deployed(left)?;
    if !left.existed
        && let Err(error) = setup.keeper.restore_point(setup, "deployed").await
    {
        tracing::warn!(%error, "no restore point was taken of what an earlier deployment made");
    }
    Ok(Journal::close(setup.dir())?)
}

pub(super) async fn end_orphan(setup: &Setup, left: &Journal) -> Result<(), DeployError> {
    match (left.server_port, &setup.data_dir) {
        (Some(port), Some(data_dir)) => host::end_orphan(data_dir, port, setup.clock.as_ref()).await,
        _ => Ok(()),
    }
}

pub(super) async fn take_back(setup: &Setup, mut left: Journal, steps: &mut Steps) -> Result<(), DeployError> {
    steps
        .take("end a deployment that was broken off", async {
            let done = rollback::roll_back(setup, &mut left, None).await?;
            tracing::warn!(deployment = %left.id, done, "a deployment that was broken off was taken back");
            Ok(((), done))
        })
        .await?;
    Ok(Journal::close(setup.dir())?)
}
