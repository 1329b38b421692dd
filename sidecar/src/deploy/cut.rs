//! Taking one database of a stopped server back to before a transaction, on the spot: no store and no key is needed.
//!
//! Invariants: the server is stopped, and its lock is held; what is kept is exactly the log up to the transaction, and
//! snapshots no newer; what was there is moved aside whole, never changed or deleted; other databases of the instance are not
//! touched.

use std::fs;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use memchr::memmem;

use crate::datadir::commit::{Frame, Inputs};
use crate::datadir::log::{LogReader, segments};
use crate::datadir::{DataDir, DataDirError, ReplicaDir, log, snapshot};
use crate::durable::owner::{Given, Owner};
use crate::durable::renames::Renames;
use crate::durable::{self, FileError, OnPath, beside};
use crate::ids::{ContentHash, Offset, RestorePointId};
use crate::restore::RestoreError;
use crate::restore::place::is_mount_point;
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

/// Did a reducer write at or after `time`, in a transaction after `offset`? By the server's clock.
///
/// # Errors
/// When the log cannot be read.
pub fn is_written(replica: &ReplicaDir, offset: Offset, time: Timestamp) -> Result<bool, DataDirError> {
    let mut reader = LogReader::open(&replica.log_path(), offset)?;
    let mut buffer = Vec::new();
    while let Some(batch) = reader.next_batch(READ_SIZE, &mut buffer)? {
        let mut at = 0;
        while let Frame::Commit(commit) = Frame::parse(batch.log_version, &buffer[at..]) {
            at += commit.bytes.len();
            let is_later = |inputs: Inputs<'_>| inputs.time_micros >= time.as_microsecond();
            if commit.first > offset && commit.inputs().is_some_and(is_later) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// One past the last transaction in a replica's log.
///
/// # Errors
/// When the log cannot be read.
pub fn end_of_log(replica: &ReplicaDir) -> Result<Offset, DataDirError> {
    log::end(&replica.log_path())
}

/// A replica that a rollback cuts.
pub struct Cut<'a> {
    pub data: &'a DataDir,
    pub replica: &'a ReplicaDir,
    /// The deployment that is taken back: what it leaves is not another's to finish.
    pub deployment: RestorePointId,
    /// What names of directories that are moved aside end in.
    pub stamp: &'a str,
}

impl Cut<'_> {
    /// Leaves transactions 0 to `last`. Returns where the replica as it was is now.
    ///
    /// # Errors
    /// When files cannot be read or written; nothing is changed then.
    pub fn apply(&self, last: Offset) -> Result<PathBuf, RestoreError> {
        let (staging, whole) = (self.staging()?, self.whole()?);
        for left in [&staging, &whole] {
            // Of a rollback that was interrupted.
            if left.exists() {
                fs::remove_dir_all(left).on("remove", left)?;
            }
        }
        if let Err(error) = self.build(&staging, last) {
            if let Err(error) = fs::remove_dir_all(&staging) {
                tracing::warn!(path = %staging.display(), %error, "what was built so far could not be removed");
            }
            return Err(error.with_disk_full());
        }
        let aside = self.beside(&format!(".replica-{}-before-rollback-{}", self.replica.id, self.stamp))?;
        durable::rename(&staging, &whole)?;
        // Where names cannot be exchanged, a crash may leave no replica: see `finish`.
        let mut renames = Renames::default();
        renames.replace(&whole, self.replica.root(), &aside)?;
        renames.keep();
        Ok(aside)
    }

    fn build(&self, staging: &Path, last: Offset) -> Result<(), RestoreError> {
        let owner = Owner::of(self.replica.root())?;
        build(self.replica, staging, last)?;
        if owner.give_tree(staging)? == Given::Refused {
            let uid = owner.uid;
            tracing::warn!(uid, "the replica cannot be given to its owner: `chown -R` it before the server starts");
        }
        Ok(durable::sync_file_system(staging)?)
    }

    /// Ends what a crash inside [`Self::apply`] left: what was cut takes the replica's place, where there is nothing, or what
    /// a server has made there since. Returns true if it did.
    ///
    /// # Errors
    /// When files cannot be read or renamed.
    pub fn finish(&self) -> Result<bool, RestoreError> {
        let Some(left) = self.left()? else { return Ok(false) };
        let (root, mut renames) = (self.replica.root(), Renames::default());
        if root.symlink_metadata().is_err() {
            renames.rename(&left, root)?;
        } else {
            let aside = self.beside(&format!(".replica-{}-made-since-{}", self.replica.id, self.stamp))?;
            renames.replace(&left, root, &aside)?;
            let (replica, aside) = (self.replica.id, aside.display());
            tracing::warn!(
                replica,
                "a server was started in the middle of a rollback and made an empty database, which is moved to {aside}"
            );
        }
        renames.keep();
        Ok(true)
    }

    /// What was cut, where a crash has left it beside its place.
    ///
    /// # Errors
    /// When files cannot be read.
    pub fn left(&self) -> Result<Option<PathBuf>, RestoreError> {
        let (root, whole) = (self.replica.root(), self.whole()?);
        if root.symlink_metadata().is_err() {
            // Earlier releases had no name of its own for what is whole, and no other way to lose the replica.
            return Ok([whole, self.staging()?].into_iter().find(|left| left.exists()));
        }
        Ok(if whole.exists() && !continues(root, &whole)? { Some(whole) } else { None })
    }

    fn staging(&self) -> Result<PathBuf, FileError> {
        self.beside(&format!(".cutting-{}", self.replica.id))
    }

    /// What was cut, once all of it is on the disk.
    fn whole(&self) -> Result<PathBuf, FileError> {
        self.beside(&format!(".cut-{}-{}", self.replica.id, self.deployment))
    }

    /// On the replica's file system, where it can be renamed.
    fn beside(&self, suffix: &str) -> Result<PathBuf, FileError> {
        let root = durable::canonical(self.data.root());
        Ok(if is_mount_point(&root)? { root.join(suffix) } else { beside(&root, suffix) })
    }
}

/// Returns true if the log of `root` is that of `cut` and more: the replica is as it was before the cut.
fn continues(root: &Path, cut: &Path) -> Result<bool, DataDirError> {
    let (root, cut) = (root.join("clog"), cut.join("clog"));
    let Some(first) = segments(&cut)?.first().map(|file| file.first) else { return Ok(false) };
    let end = log::end(&cut)?;
    if segments(&root)?.first().is_none_or(|file| file.first > first) || log::end(&root)? <= end {
        return Ok(false);
    }
    for at in [first, Offset(end.0.saturating_sub(1))] {
        if commit_at(&root, at)? != commit_at(&cut, at)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The commit that holds a transaction.
fn commit_at(log: &Path, at: Offset) -> Result<Option<Vec<u8>>, DataDirError> {
    let (mut reader, mut buffer) = (LogReader::open(log, at)?, Vec::new());
    let Some(batch) = reader.next_batch(1, &mut buffer)? else { return Ok(None) };
    match Frame::parse(batch.log_version, &buffer) {
        Frame::Commit(commit) => Ok(Some(commit.bytes.to_vec())),
        _ => Ok(None),
    }
}

fn build(replica: &ReplicaDir, staging: &Path, last: Offset) -> Result<(), RestoreError> {
    use std::os::unix::fs::DirBuilderExt;
    let (log, snapshots) = (staging.join("clog"), staging.join("snapshots"));
    // Nobody else may enter before it has its owner.
    fs::DirBuilder::new().mode(0o700).create(staging).on("create", staging)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datadir::commit::{SegmentHeader, encode};
    use crate::datadir::log::segment_name;

    /// A data directory with one replica, whose log holds transactions 0 to 9.
    struct Scene {
        dir: tempfile::TempDir,
        data: DataDir,
        replica: ReplicaDir,
        deployment: RestorePointId,
    }

    fn write_log(replica: &Path, content: u8, commits: u64) {
        let log = replica.join("clog");
        fs::create_dir_all(&log).unwrap();
        let mut bytes = SegmentHeader { log_version: 1, checksum_algorithm: 0 }.to_bytes().to_vec();
        (0..commits).for_each(|at| bytes.extend(encode(1, Offset(at), 0, 1, &[content, at as u8])));
        fs::write(log.join(segment_name(Offset(0))), bytes).unwrap();
    }

    impl Scene {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::create_dir_all(dir.path().join("data/control-db")).unwrap();
            let data = DataDir::open(&dir.path().join("data")).unwrap();
            let replica = data.replica(1);
            write_log(replica.root(), 7, 10);
            Self { dir, data, replica, deployment: RestorePointId(ulid::Ulid::from_parts(1, 1)) }
        }

        fn cut(&self) -> Cut<'_> {
            Cut { data: &self.data, replica: &self.replica, deployment: self.deployment, stamp: "T" }
        }

        fn end(&self) -> u64 {
            end_of_log(&self.replica).unwrap().0
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(self.dir.path()).unwrap();
            let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }
    }

    #[test]
    fn what_was_there_is_moved_aside_whole() {
        let scene = Scene::new();
        let aside = scene.cut().apply(Offset(4)).unwrap();
        assert_eq!(scene.end(), 5);
        assert_eq!(log::end(&aside.join("clog")).unwrap(), Offset(10));
        assert_eq!(scene.names(), ["data", "data.replica-1-before-rollback-T"]);
        assert!(!scene.cut().finish().unwrap(), "nothing is left to finish");
    }

    #[test]
    fn a_cut_replica_keeps_its_owner() {
        use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
        let scene = Scene::new();
        let root = scene.replica.root();
        fs::set_permissions(root, fs::Permissions::from_mode(0o750)).unwrap();
        let is_root = rustix::process::geteuid().is_root();
        if is_root {
            lchown(root, Some(4711), Some(4712)).unwrap();
        }
        scene.cut().apply(Offset(4)).unwrap();
        for (path, mode) in [(root.to_owned(), 0o750), (root.join("clog").join(segment_name(Offset(0))), 0o640)] {
            let found = fs::metadata(&path).unwrap();
            assert_eq!(found.mode() & 0o7777, mode, "{}", path.display());
            assert!(!is_root || (found.uid(), found.gid()) == (4711, 4712), "{}", path.display());
        }
    }

    #[test]
    fn a_replica_that_a_crash_left_beside_its_place_is_put_there() {
        let scene = Scene::new();
        scene.cut().apply(Offset(4)).unwrap();
        for left in [scene.cut().whole().unwrap(), scene.cut().staging().unwrap()] {
            fs::rename(scene.replica.root(), left).unwrap();
            assert!(scene.cut().finish().unwrap());
            assert_eq!(scene.end(), 5);
        }
    }

    #[test]
    fn an_empty_database_made_since_gives_way_to_the_cut_one() {
        // As a server makes it: without a log, with one that has begun, with one that is longer than the cut one.
        for commits in [None, Some(0), Some(2), Some(20)] {
            let scene = Scene::new();
            scene.cut().apply(Offset(4)).unwrap();
            fs::rename(scene.replica.root(), scene.cut().whole().unwrap()).unwrap();
            match commits {
                None => fs::create_dir_all(scene.replica.root()).unwrap(),
                Some(commits) => write_log(scene.replica.root(), 8, commits),
            }
            assert!(scene.cut().finish().unwrap());
            assert_eq!(scene.end(), 5, "{commits:?}");
            let fresh = scene.dir.path().join("data.replica-1-made-since-T");
            assert!(fresh.is_dir(), "what the server made is kept");
        }
    }

    #[test]
    fn a_replica_that_was_not_yet_replaced_stays() {
        for is_whole in [true, false] {
            let scene = Scene::new();
            let left = if is_whole { scene.cut().whole() } else { scene.cut().staging() }.unwrap();
            write_log(&left, 7, 5);
            assert!(!scene.cut().finish().unwrap());
            assert_eq!(scene.end(), 10);
            scene.cut().apply(Offset(4)).unwrap();
            assert_eq!(scene.names(), ["data", "data.replica-1-before-rollback-T"]);
        }
    }

    #[test]
    fn what_another_deployment_left_is_not_used() {
        let scene = Scene::new();
        write_log(&beside(scene.data.root(), ".cut-1-another"), 9, 3);
        assert!(!scene.cut().finish().unwrap());
        assert_eq!(scene.end(), 10);
    }
}
