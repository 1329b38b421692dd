//! The offline check of a restored data directory, before it takes its place: the log's continuity up to the promised
//! transaction, every page's and blob's hash. The log's commits were read back as they were written.

use std::path::Path;

use crate::datadir::log::segments;
use crate::datadir::{DataDir, snapshot};
use crate::ids::Offset;
use crate::restore::RestoreError;
use crate::restore::plan::{DatabasePlan, RestorePlan};
use crate::restore::segments::CheckedSegment;

/// Checks the log of every database of the plan in `data`, with the segments of each that were read back.
///
/// # Errors
/// [`RestoreError::SelfCheck`] with the first thing that is not as it must be.
pub(super) fn logs(data: &Path, plan: &RestorePlan, logs: &[Vec<CheckedSegment>]) -> Result<(), RestoreError> {
    let data = DataDir::open(data)?;
    if plan.databases.len() != logs.len() {
        return Err(RestoreError::SelfCheck("a database's log was not written".into()));
    }
    for (database, checked) in plan.databases.iter().zip(logs) {
        let path = data.replica(database.replica).log_path();
        check_log(&path, checked, database.offset).map_err(|reason| failed(database, &reason))?;
    }
    Ok(())
}

/// Checks every page and blob of the snapshot that was written for a database.
///
/// # Errors
/// [`RestoreError::SelfCheck`] with the first that is not as it must be.
pub(super) fn snapshot(dir: &Path, database: &DatabasePlan) -> Result<(), RestoreError> {
    check_snapshot(dir, database).map_err(|reason| failed(database, &reason))
}

fn failed(database: &DatabasePlan, reason: &str) -> RestoreError {
    RestoreError::SelfCheck(format!("database {}: {reason}", database.name))
}

fn check_log(dir: &Path, checked: &[CheckedSegment], last: Offset) -> Result<(), String> {
    let found = segments(dir).map_err(|error| error.to_string())?;
    if !found.iter().eq(checked.iter().map(|checked| &checked.segment)) {
        return Err("the log's segments are not those that were written".into());
    }
    for pair in checked.windows(2) {
        if let [before, after] = pair
            && after.segment.first != before.next
        {
            return Err(format!("a segment starts at transaction {} and not at {}", after.segment.first, before.next));
        }
    }
    match checked.last() {
        None => Err("the log is empty".into()),
        Some(end) if end.next.0 != last.0 + 1 => {
            Err(format!("the log ends before transaction {} instead of after {last}", end.next))
        }
        Some(_) => Ok(()),
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
