//! Taking one database of a stopped server back to before a transaction, on the spot: no store and no key is needed.
//!
//! Invariants: the server is stopped; what is kept is exactly the log up to the transaction, and snapshots no newer; what
//! was there is moved aside whole, never changed or deleted; other databases of the instance are not touched.

use std::fs;
use std::path::{Path, PathBuf};

use memchr::memmem;

use crate::datadir::commit::Frame;
use crate::datadir::log::{LogReader, segments};
use crate::datadir::{DataDir, DataDirError, ReplicaDir, snapshot};
use crate::durable::{self, FileError, OnPath, beside};
use crate::ids::{ContentHash, Offset};
use crate::restore::RestoreError;
use crate::restore::segments::SegmentWriter;

/// Bytes of log that are looked through at a time.
const READ_SIZE: usize = 4 << 20;

/// The commit of a publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// Its first transaction.
    pub offset: Offset,
    /// Transactions in it: one, as far as any server was seen to write.
    pub count: u16,
}

/// The transaction that published `program`, the first at or after `from`. Its commit holds the program's hash; one that
/// publishes another program later holds it too, since it takes the row away.
///
/// # Errors
/// When the log cannot be read.
pub fn find_publish(
    replica: &ReplicaDir,
    from: Offset,
    program: &ContentHash,
) -> Result<Option<Published>, DataDirError> {
    let mut reader = LogReader::open(&replica.log_path(), from)?;
    let finder = memmem::Finder::new(&program.0);
    let mut buffer = Vec::new();
    while let Some(batch) = reader.next_batch(READ_SIZE, &mut buffer)? {
        if finder.find(&buffer).is_none() {
            continue;
        }
        let mut at = 0;
        while let Frame::Commit(commit) = Frame::parse(batch.log_version, &buffer[at..]) {
            at += commit.bytes.len();
            if commit.first >= from && finder.find(commit.records).is_some() {
                return Ok(Some(Published { offset: commit.first, count: commit.count }));
            }
        }
    }
    Ok(None)
}

/// One past the last transaction in a replica's log.
///
/// # Errors
/// When the log cannot be read.
pub fn end_of_log(replica: &ReplicaDir) -> Result<Offset, DataDirError> {
    crate::datadir::log::end(&replica.log_path())
}

/// Leaves transactions 0 to `last` of `replica`. Returns where the replica as it was is now.
///
/// # Errors
/// When files cannot be read or written; nothing is changed then.
pub fn cut(data: &DataDir, replica: &ReplicaDir, last: Offset, stamp: &str) -> Result<PathBuf, RestoreError> {
    let root = replica.root();
    let staging = beside(data.root(), &format!(".cutting-{}", replica.id));
    let aside = beside(data.root(), &format!(".replica-{}-before-rollback-{stamp}", replica.id));
    if staging.exists() {
        // Of a rollback that was broken off.
        fs::remove_dir_all(&staging).on("remove", &staging)?;
    }
    let built = build(replica, &staging, last).and_then(|()| Ok(durable::sync_file_system(&staging)?));
    if let Err(error) = built {
        if let Err(error) = fs::remove_dir_all(&staging) {
            tracing::warn!(path = %staging.display(), %error, "what was built so far could not be removed");
        }
        return Err(error.with_disk_full());
    }
    // A crash between the two is found by `finish`.
    durable::rename(root, &aside)?;
    durable::rename(&staging, root)?;
    Ok(aside)
}

/// Ends what a crash between the two renames of [`cut`] left: the replica's new directory takes its place.
///
/// # Errors
/// When it cannot be renamed.
pub fn finish(data: &DataDir, replica: &ReplicaDir) -> Result<(), FileError> {
    let staging = beside(data.root(), &format!(".cutting-{}", replica.id));
    if !replica.root().exists() && staging.exists() {
        durable::rename(&staging, replica.root())?;
    }
    Ok(())
}

fn build(replica: &ReplicaDir, staging: &Path, last: Offset) -> Result<(), RestoreError> {
    let (log, snapshots) = (staging.join("clog"), staging.join("snapshots"));
    fs::create_dir_all(&log).on("create", &log)?;
    let files = segments(&replica.log_path())?;
    let Some(split) = files.iter().rposition(|file| file.first <= last) else {
        return Err(RestoreError::Unreachable { wanted: last, reason: "the log starts after it".into() });
    };
    for file in &files[..split] {
        link(&file.path, &log.join(file.path.file_name().unwrap_or_default()))?;
    }
    let from = files[split].first;
    let mut writer = SegmentWriter::new(&log, from, last);
    let mut reader = LogReader::open(&replica.log_path(), from)?;
    let mut buffer = Vec::new();
    while let Some(batch) = reader.next_batch(READ_SIZE, &mut buffer)? {
        writer.write(batch.log_version, batch.first..=batch.last, &buffer)?;
        if batch.last > last {
            break;
        }
    }
    writer.finish()?;
    fs::create_dir_all(&snapshots).on("create", &snapshots)?;
    for found in snapshot::list(&replica.snapshots_path())? {
        if found.offset <= last && found.is_complete() {
            copy_tree(found.path(), &snapshots.join(snapshot::dir_name(found.offset)), link)?;
        }
    }
    let module_logs = replica.module_logs_path();
    if module_logs.is_dir() {
        // The server goes on writing into the newest.
        let copy = |from: &Path, to: &Path| fs::copy(from, to).on("copy", from).map(drop);
        copy_tree(&module_logs, &staging.join("module_logs"), copy)?;
    }
    Ok(())
}

/// Files that are never written again share their bytes; across file systems they are copied.
fn link(from: &Path, to: &Path) -> Result<(), FileError> {
    if fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    fs::copy(from, to).on("copy", from).map(drop)
}

fn copy_tree(from: &Path, to: &Path, file: fn(&Path, &Path) -> Result<(), FileError>) -> Result<(), FileError> {
    fs::create_dir_all(to).on("create", to)?;
    for entry in fs::read_dir(from).on("list", from)? {
        let entry = entry.on("list", from)?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().on("inspect", &source)?.is_dir() {
            copy_tree(&source, &target, file)?;
        } else {
            file(&source, &target)?;
        }
    }
    Ok(())
}
