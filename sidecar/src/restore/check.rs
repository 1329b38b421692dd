//! The offline check of a restored data directory, before it takes its place: every commit's checksum, the log's
//! continuity up to the promised transaction, every page's and blob's hash. It reads the files back as a server would.

use std::path::Path;

use crate::backup::READ_SIZE;
use crate::datadir::log::{LogReader, Tail, segments};
use crate::datadir::{DataDir, DataDirError, snapshot};
use crate::ids::Offset;
use crate::restore::RestoreError;
use crate::restore::plan::{DatabasePlan, RestorePlan};

/// Checks every database of the plan in `data`.
///
/// # Errors
/// [`RestoreError::SelfCheck`] with the first thing that is not as it must be.
pub async fn check(data: &Path, plan: &RestorePlan) -> Result<(), RestoreError> {
    let data = DataDir::open(data)?;
    for database in &plan.databases {
        let replica = data.replica(database.replica);
        let (log, last) = (replica.log_path(), database.offset);
        let log = tokio::task::spawn_blocking(move || check_log(&log, last));
        let (snapshots, part) = (replica.snapshots_path(), database.clone());
        let snapshot = tokio::task::spawn_blocking(move || check_snapshot(&snapshots, &part));
        for result in [log.await, snapshot.await] {
            let result = result.map_err(|error| RestoreError::Worker(error.to_string()))?;
            result.map_err(|reason| RestoreError::SelfCheck(format!("database {}: {reason}", database.name)))?;
        }
    }
    Ok(())
}

fn check_log(dir: &Path, last: Offset) -> Result<(), String> {
    let text = |error: DataDirError| error.to_string();
    if segments(dir).map_err(|error| error.to_string())?.is_empty() {
        return Err("the log is empty".into());
    }
    let mut reader = LogReader::open_first(dir).map_err(text)?;
    let mut buffer = Vec::with_capacity(READ_SIZE);
    while reader.next_batch(READ_SIZE, &mut buffer).map_err(text)?.is_some() {}
    if reader.position().0 != last.0 + 1 {
        return Err(format!("the log ends before transaction {} instead of after {last}", reader.position()));
    }
    match reader.tail() {
        Tail::Clean => Ok(()),
        Tail::Unfinished { at, reason } => Err(format!("the log ends in a broken commit at byte {at}: {reason}")),
    }
}

fn check_snapshot(dir: &Path, part: &DatabasePlan) -> Result<(), String> {
    let Some(expected) = &part.snapshot else { return Ok(()) };
    let listed = snapshot::list(dir).map_err(|error| error.to_string())?;
    let [found] = listed.as_slice() else {
        return Err(format!("there are {} snapshots instead of one", listed.len()));
    };
    let (manifest, _) = found.manifest().map_err(|error| error.to_string())?;
    if manifest.offset != expected.offset || manifest.identity != part.identity {
        return Err(format!("the snapshot is of transaction {} of {}", manifest.offset, manifest.identity));
    }
    for (hash, kind) in &manifest.objects {
        found.object(hash, *kind).map_err(|error| error.to_string())?;
    }
    Ok(())
}
