//! What was deployed, and the way back to what was deployed before.

use serde::Serialize;

use crate::deploy::begin::{complete, end_orphan, take_back};
use crate::deploy::journal::{Journal, Step};
use crate::deploy::module::Module;
use crate::deploy::record::{self, DeploymentRecord};
use crate::deploy::report::Steps;
use crate::deploy::{DeployError, Outcome, Setup, rollback, verify};
use crate::ids::{ContentHash, RestorePointId};
use crate::repository::{Repository, RepositoryError};

/// Every deployment of a database, oldest first. Field names are stable.
#[derive(Debug, Serialize)]
pub struct History {
    pub name: String,
    pub deployments: Vec<DeploymentRecord>,
}

/// Reads the history of the database `name`.
///
/// # Errors
/// When a record is damaged or the store fails.
pub async fn history(repository: &Repository, name: &str) -> Result<History, RepositoryError> {
    Ok(History { name: name.to_owned(), deployments: record::list(repository, name).await? })
}

/// What [`undo`] did, or would do. Field names are stable.
#[derive(Debug, Serialize)]
pub struct UndoReport {
    pub dry_run: bool,
    pub name: String,
    /// The deployment that is taken back; `None` for one that was broken off.
    pub deployment: Option<RestorePointId>,
    pub from: ContentHash,
    pub to: Option<ContentHash>,
    pub with_data: bool,
    pub message: String,
}

/// Goes back to the program that was deployed before: the rows stay as they are, or with `data` are those of right before
/// the publish. A deployment that was broken off is taken back instead.
///
/// # Errors
/// When there is nothing to go back to, the older program does not take today's tables, or a step fails.
pub async fn undo(
    setup: &Setup,
    repository: &Repository,
    data: bool,
    dry_run: bool,
) -> Result<UndoReport, DeployError> {
    let _one = setup.lock()?;
    let mut steps = Steps { progress: std::sync::Arc::clone(&setup.progress), done: Vec::new() };
    let mut left = Journal::load(setup.dir())?.filter(|left| left.step > Step::Prepare);
    if let Some(done) = left.take_if(|left| left.step == Step::Record && !dry_run) {
        end_orphan(setup, &done).await?;
        complete(setup, &done).await?;
    }
    if let Some(left) = left {
        let mut report = UndoReport {
            dry_run,
            name: left.name.clone(),
            deployment: None,
            from: left.module,
            to: left.previous,
            with_data: true,
            message: "would take back the deployment that was broken off".into(),
        };
        if !dry_run {
            end_orphan(setup, &left).await?;
            take_back(setup, left, &mut steps).await?;
            report.message = steps.done.pop().map(|step| step.message).unwrap_or_default();
        }
        return Ok(report);
    }
    let records = record::list(repository, &setup.name).await?;
    let newest = newest_standing(&records);
    let Some((newest, previous)) = newest.and_then(|record| Some((record, record.previous?))) else {
        return Err(DeployError::NothingToUndo(setup.name.clone()));
    };
    let mut report = UndoReport {
        dry_run,
        name: setup.name.clone(),
        deployment: Some(newest.id),
        from: newest.module,
        to: Some(previous),
        with_data: data,
        message: match (data, newest.publish_offset) {
            (true, Some(offset)) => format!("rows go back to transaction {}", offset.0.saturating_sub(1)),
            (true, None) => "rows go back to right before the publish".into(),
            (false, _) => "rows stay".into(),
        },
    };
    if dry_run {
        return Ok(report);
    }
    let now = setup.clock.now();
    let mut journal = Journal {
        id: RestorePointId::after(None, now),
        step: Step::Prepare,
        started_at: now,
        mode: newest.mode,
        name: setup.name.clone(),
        server_port: None,
        had_data_dir: true,
        existed: true,
        identity: Some(newest.database),
        module: newest.module,
        previous: Some(previous),
        publishes: true,
        log_end: newest.publish_offset,
        restore_point: None,
        settings_before: Vec::new(),
        admins: Vec::new(),
        members: Vec::new(),
        restart: None,
    };
    if data && newest.publish_offset.is_none() {
        let text = "where its publish is in the log is not known; restore to a time before it instead";
        return Err(DeployError::Verification(text.into()));
    }
    let dir = setup.dir().to_owned();
    let mut opened = journal.clone();
    let mut host = setup
        .open_host(|port| {
            opened.server_port = Some(port);
            Ok(opened.save(&dir)?)
        })
        .await?;
    journal = opened;
    journal.mode = host.mode();
    let result = take_older(setup, repository, &mut journal, &mut host, data).await;
    if host.mode() == crate::deploy::Mode::Deployment {
        host.stop().await?;
    }
    // What is half done is ended by the next run.
    if result.is_ok() || journal.step == Step::Prepare {
        Journal::close(setup.dir())?;
    }
    report.message = result?;
    Ok(report)
}

/// The newest deployment of a program that was not rolled back. Deployments that only changed settings are skipped.
fn newest_standing(records: &[DeploymentRecord]) -> Option<&DeploymentRecord> {
    let mut undone = 0;
    let of_programs = |record: &&DeploymentRecord| record.previous != Some(record.module);
    for record in records.iter().rev().filter(of_programs) {
        match record.outcome {
            Outcome::Undone => undone += 1,
            Outcome::Deployed if undone > 0 => undone -= 1,
            Outcome::Deployed => return Some(record),
            _ => {}
        }
    }
    None
}

async fn take_older(
    setup: &Setup,
    repository: &Repository,
    journal: &mut Journal,
    host: &mut crate::deploy::host::Host,
    data: bool,
) -> Result<String, DeployError> {
    let database = setup.database(host).await?;
    let running = database.program().await?;
    if running == journal.previous {
        // One that was broken off had done it, but for the record.
        let message = "the program before runs already".to_owned();
        setup.record(&undone(journal), Outcome::Undone, &message, None, Some(host)).await?;
        return Ok(message);
    }
    if running != Some(journal.module) {
        let running = running.map_or_else(|| "none".to_owned(), |hash| hash.to_string());
        let text = format!("program {running} runs, not {}, which was deployed last", journal.module);
        return Err(DeployError::Verification(text));
    }
    if data && !host.can_stop() {
        return Err(DeployError::CannotStop);
    }
    let point = setup.keeper.restore_point(setup, "pre-rollback").await?;
    journal.restore_point = point.map(|report| report.restore_point);
    let message = if data {
        rollback::roll_back(setup, journal, Some(host)).await?
    } else {
        let previous = journal.previous.ok_or_else(|| DeployError::NothingToUndo(setup.name.clone()))?;
        let bytes = record::program(Some(repository), setup.dir(), &previous).await?;
        setup.keep_program(&previous, &bytes)?;
        let older = Module { path: record::local(setup.dir(), &previous), bytes, hash: previous };
        rollback::publish_older(setup, &database, older).await?;
        let seen = verify::verify(&database, &previous, None, journal.id).await?;
        format!("the program before runs again, rows stay: {seen}")
    };
    setup.record(&undone(journal), Outcome::Undone, &message, None, Some(host)).await?;
    Ok(message)
}

/// As the history has it: from the later program to the one before.
fn undone(journal: &Journal) -> Journal {
    Journal { module: journal.previous.unwrap_or(journal.module), previous: Some(journal.module), ..journal.clone() }
}
