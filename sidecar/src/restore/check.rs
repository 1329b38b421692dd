//! The offline check of a restored data directory, before it takes its place: every commit's checksum, the log's
//! continuity up to the promised transaction, every page's and blob's hash. It reads the files back as a server would.

use std::path::Path;

use futures::{StreamExt, TryStreamExt};

use crate::datadir::log::segments;
use crate::datadir::{DataDir, snapshot};
use crate::ids::Offset;
use crate::restore::RestoreError;
use crate::restore::plan::{DatabasePlan, RestorePlan};
use crate::restore::segments::check_segment;

/// Segments that are checked at once.
const AHEAD: usize = 2;

/// Checks every database of the plan in `data`.
///
/// # Errors
/// [`RestoreError::SelfCheck`] with the first thing that is not as it must be.
pub async fn check(data: &Path, plan: &RestorePlan) -> Result<(), RestoreError> {
    let data = DataDir::open(data)?;
    for database in &plan.databases {
        let replica = data.replica(database.replica);
        let (log, last) = (replica.log_path(), database.offset);
        let (snapshots, part) = (replica.snapshots_path(), database.clone());
        let snapshot = tokio::task::spawn_blocking(move || check_snapshot(&snapshots, &part));
        let log = check_log(&log, last).await;
        let snapshot = snapshot.await.map_err(|error| RestoreError::Worker(error.to_string()))?;
        for result in [log, snapshot] {
            result.map_err(|reason| RestoreError::SelfCheck(format!("database {}: {reason}", database.name)))?;
        }
    }
    Ok(())
}

async fn check_log(dir: &Path, last: Offset) -> Result<(), String> {
    let files = segments(dir).map_err(|error| error.to_string())?;
    let mut next = files.first().ok_or("the log is empty")?.first;
    let mut checked = futures::stream::iter(files)
        .map(|file| async move {
            let name = file.path.display().to_string();
            let first = file.first;
            let checked = tokio::task::spawn_blocking(move || check_segment(&file));
            match checked.await {
                Ok(Ok(end)) => Ok((first, end)),
                Ok(Err(reason)) => Err(format!("{name}: {reason}")),
                Err(error) => Err(format!("{name}: {error}")),
            }
        })
        .buffered(AHEAD);
    while let Some((first, end)) = checked.try_next().await? {
        if first != next {
            return Err(format!("a segment starts at transaction {first} where {next} is expected"));
        }
        next = end;
    }
    if next.0 != last.0 + 1 {
        return Err(format!("the log ends before transaction {next} instead of after {last}"));
    }
    Ok(())
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
