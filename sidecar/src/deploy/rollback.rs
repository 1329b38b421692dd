//! Taking a deployment back: program and rows as they were right before the publish.
//!
//! Where the server can be stopped, its own files are cut before the publish: no write that came before is lost, and no
//! other database is touched. Where it cannot, the older program is published again and settings are put back.

use crate::database::control::Preview;
use crate::datadir::DataDir;
use crate::datadir::lock::{self, ServerLock};
use crate::deploy::begin::LONGEST;
use crate::deploy::host::Host;
use crate::deploy::journal::{Journal, Step};
use crate::deploy::migration::Migration;
use crate::deploy::module::Module;
use crate::deploy::{DeployError, Mode, Setup, blocking, configure, cut, record};
use crate::durable;
use crate::ids::{ContentHash, Offset};
use crate::observe::server::{Database, SourceError};
use crate::restore::place::is_mount_point;
use crate::standalone::command::Binary;

/// Takes back what `journal` tells; returns what was done, in words. Opens a server of its own where none is given.
///
/// # Errors
/// When something of it cannot be done; another call goes on.
pub async fn roll_back(setup: &Setup, journal: &mut Journal, host: Option<&mut Host>) -> Result<String, DeployError> {
    journal.enter(Step::RollBack, setup.dir())?;
    if let Some(done) = finish(setup, journal).await? {
        if let Some(restarter) = journal.restart {
            Host::stopped(setup, restarter).start_again().await?;
        }
        return Ok(done);
    }
    if !journal.existed && !journal.had_data_dir && setup.data_dir.as_ref().is_some_and(|dir| !dir.exists()) {
        return Ok("the data directory that was made for it was moved aside before".into());
    }
    if host.is_none() && journal.existed && journal.publishes && is_stopped(setup)? {
        // No server need start for it: with this module it may not even do so.
        let done = cut_files(setup, journal).await?;
        if let Some(restarter) = journal.restart {
            Host::stopped(setup, restarter).start_again().await?;
        }
        return Ok(done);
    }
    let mut opened = None;
    let host = match host {
        Some(host) => host,
        None => opened.insert(open(setup, journal).await?),
    };
    let done = with_host(setup, journal, host).await;
    if host.mode() == Mode::Deployment {
        host.stop().await?;
    }
    let done = done?;
    if leave_no_data_dir(setup, journal).await? {
        return Ok(format!("{done}, and the data directory that was made for it was moved aside"));
    }
    Ok(done)
}

/// Are the files at hand, and no server on them?
fn is_stopped(setup: &Setup) -> Result<bool, DeployError> {
    match &setup.data_dir {
        Some(dir) => Ok(lock::probe_file(&dir.join("spacetime.pid"))? == ServerLock::Free),
        None => Ok(false),
    }
}

async fn open(setup: &Setup, journal: &mut Journal) -> Result<Host, DeployError> {
    let dir = setup.dir().to_owned();
    let mut opened = journal.clone();
    // The database need not answer, as long as the server does.
    let host = setup
        .open_host_without_database(|port| {
            opened.server_port = Some(port);
            Ok(opened.save(&dir)?)
        })
        .await?;
    *journal = opened;
    Ok(host)
}

async fn with_host(setup: &Setup, journal: &mut Journal, host: &mut Host) -> Result<String, DeployError> {
    let database = setup.database(host).await?.called(&journal.name);
    if !journal.existed {
        // Only what this deployment has made.
        if database.find().await?.is_none() {
            return Ok("the database was not there before and is not there now".into());
        }
        if database.program().await? != Some(journal.module) {
            return Ok("the database runs another program by now and is left alone".into());
        }
        let is_old = setup.clock.now().duration_since(journal.started_at) >= LONGEST;
        if is_old && setup.replica(journal).await?.is_none() {
            return Ok("the database was made long ago, may be in use by now, and is left alone".into());
        }
        database.delete().await?;
        return Ok("the database, which was not there before, was removed".into());
    }
    if !journal.publishes {
        put_back(journal, &database).await?;
        return Ok("the settings are as before".into());
    }
    if host.can_stop() {
        return cut_back(setup, journal, host).await;
    }
    if is_half_done(setup, journal).await? {
        // What runs now is a database that a server has made in its place.
        return Err(DeployError::CannotStop);
    }
    republish(setup, journal, &database).await
}

/// Cuts the log before the publish.
async fn cut_back(setup: &Setup, journal: &mut Journal, host: &mut Host) -> Result<String, DeployError> {
    journal.restart = host.restarter();
    journal.save(setup.dir())?;
    host.stop().await?;
    let done = cut_files(setup, journal).await;
    // Whatever came of it, the server is to run again.
    host.start_again().await?;
    let done = done?;
    if host.mode() == Mode::Online {
        let database = setup.database(host).await?.called(&journal.name);
        expect(&database, journal.previous).await?;
    }
    Ok(done)
}

/// Ends a rollback that was killed between two renames and has left the replica beside its place, unless a server runs:
/// then once it is stopped.
async fn finish(setup: &Setup, journal: &Journal) -> Result<Option<String>, DeployError> {
    let Some((data, replica)) = setup.replica(journal).await? else { return Ok(None) };
    let (deployment, stamp) = (journal.id, stamp(setup));
    let finishing = move || {
        let cut = cut::Cut { data: &data, replica: &replica, deployment, stamp: &stamp };
        match (cut.left()?, lock::hold(data.root())?) {
            (None, _) => Ok(false),
            (Some(left), None) => {
                let left = left.display();
                tracing::warn!(
                    "a server runs in the middle of a rollback: stop it; the database is in {left} until then"
                );
                Ok(false)
            }
            (Some(_), Some(mut lock)) => {
                lock.leave();
                Ok::<_, DeployError>(cut.finish()?)
            }
        }
    };
    let text = "program and rows are as they were right before the publish: an interrupted rollback was finished";
    Ok(blocking(finishing).await??.then(|| text.to_owned()))
}

/// Returns true if what an interrupted rollback has cut is still beside its place.
async fn is_half_done(setup: &Setup, journal: &Journal) -> Result<bool, DeployError> {
    let Some((data, replica)) = setup.replica(journal).await? else { return Ok(false) };
    let deployment = journal.id;
    let look = move || cut::Cut { data: &data, replica: &replica, deployment, stamp: "" }.left();
    Ok(blocking(look).await??.is_some())
}

fn stamp(setup: &Setup) -> String {
    setup.clock.now().strftime("%Y%m%dT%H%M%S%3fZ").to_string()
}

async fn cut_files(setup: &Setup, journal: &Journal) -> Result<String, DeployError> {
    if let Some(finished) = finish(setup, journal).await? {
        return Ok(finished);
    }
    let Some((data, replica)) = setup.replica(journal).await? else { return Err(DeployError::CannotStop) };
    let (from, module) = (journal.log_end.unwrap_or(Offset(0)), journal.module);
    let (deployment, stamp) = (journal.id, stamp(setup));
    let cutting = move || {
        // No server may start meanwhile: it would need this lock.
        let mut lock = lock::hold(data.root())?.ok_or(DeployError::CannotStop)?;
        lock.leave();
        let Some(published) = cut::find_publish(&replica, from, &module)? else { return Ok(None) };
        if published.count > 1 {
            let text = "the publish shares its commit with other transactions, and a commit cannot be cut";
            return Err(DeployError::Verification(text.into()));
        }
        let Some(last) = published.offset.0.checked_sub(1) else { return Ok(None) };
        let cut = cut::Cut { data: &data, replica: &replica, deployment, stamp: &stamp };
        let aside = cut.apply(Offset(last))?;
        Ok::<_, DeployError>(Some((last, aside)))
    };
    Ok(match blocking(cutting).await?? {
        Some((last, aside)) => format!(
            "program and rows are as they were right before the publish, at transaction {last}; what was there is in {}",
            aside.display()
        ),
        None => "the module was not published, nothing was changed".into(),
    })
}

/// Publishes the older program again, where rows cannot be taken back.
async fn republish(setup: &Setup, journal: &Journal, database: &Database) -> Result<String, DeployError> {
    let Some(previous) = journal.previous else { return Err(DeployError::CannotStop) };
    if database.program().await? != Some(previous) {
        let bytes = record::program(None, setup.dir(), &previous).await?;
        let older = Module { path: record::local(setup.dir(), &previous), bytes, hash: previous };
        publish_older(setup, database, older).await?;
        expect(database, Some(previous)).await?;
    }
    put_back(journal, database).await?;
    Ok("the older program runs again with its settings; rows that were written since stay".into())
}

/// Publishes a program that ran before.
///
/// # Errors
/// [`DeployError::NeedsData`] when it does not take the tables and rows that are there.
pub(super) async fn publish_older(setup: &Setup, database: &Database, older: Module) -> Result<(), DeployError> {
    let token = match database.preview(older.bytes.clone()).await? {
        Preview::Refused { reason } => return Err(DeployError::NeedsData(reason)),
        Preview::Migrates { breaks_clients, token, .. } => breaks_clients.then_some(token),
        Preview::NotServed => {
            if let Ok(binary) = Binary::find(&setup.config) {
                let read = older.clone();
                let described = blocking(move || read.describe(&binary)).await??;
                if let Migration::Breaking { reasons } = Migration::between(&database.description().await?, &described)
                {
                    return Err(DeployError::NeedsData(reasons.join("; ")));
                }
            }
            None
        }
    };
    match database.publish(older.bytes, token.as_deref()).await {
        // A table that the older program does not have can go only without rows.
        Err(SourceError::Refused { status: 400, said }) => Err(DeployError::NeedsData(said)),
        published => Ok(published.map(drop)?),
    }
}

async fn put_back(journal: &Journal, database: &Database) -> Result<(), DeployError> {
    let (before, admins, members) = (&journal.settings_before, &journal.admins, &journal.members);
    Ok(configure::restore(database, before, admins, members).await?)
}

async fn expect(database: &Database, program: Option<ContentHash>) -> Result<(), DeployError> {
    let running = database.program().await?;
    if running == program {
        return Ok(());
    }
    let name = |hash: Option<ContentHash>| hash.map_or_else(|| "none".to_owned(), |hash| hash.to_string());
    Err(DeployError::Verification(format!("program {} runs, not {}", name(running), name(program))))
}

/// Moves a data directory aside that was made for a deployment which is taken back.
pub async fn leave_no_data_dir(setup: &Setup, journal: &Journal) -> Result<bool, DeployError> {
    let Some(root) = &setup.data_dir else { return Ok(false) };
    if journal.had_data_dir || journal.mode != Mode::Deployment || DataDir::open(root).is_err() {
        return Ok(false);
    }
    if setup.databases().await?.iter().any(|database| Some(*database) != journal.identity) {
        // Somebody has put something else there since.
        return Ok(false);
    }
    if is_mount_point(root)? {
        // It cannot be renamed, and without the database it is as good as empty.
        return Ok(false);
    }
    // A server that somebody has started there since keeps it.
    let Some(mut lock) = lock::hold(root)? else { return Ok(false) };
    let aside = durable::beside(root, &format!(".failed-deploy-{}", stamp(setup)));
    durable::rename(root, &aside)?;
    lock.moved(&aside);
    Ok(true)
}
