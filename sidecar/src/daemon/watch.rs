//! A look at the disk, apart from the followers and from what they report: is there a follower for each log that grows,
//! does its archive grow too, and can temporary files be made?
//!
//! Invariant: nothing here depends on a follower that works, or on the control database being readable.

use std::collections::{BTreeMap, HashSet};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::backup::blocking;
use crate::daemon::Daemon;
use crate::daemon::conditions::{ConditionKind, Finding, Subject};
use crate::datadir::log::{end, segments};
use crate::datadir::{DataDir, ReplicaDir};
use crate::ids::Offset;

/// How often.
const INTERVAL: Duration = Duration::from_secs(5);
/// A server makes a database's files in a moment; a restore or a move takes longer and is seen.
const MISSING_PATIENCE: SignedDuration = SignedDuration::from_secs(10);
/// A copy of the control database grows while it is opened.
const COPY_MARGIN: u64 = 1 << 20;

/// A database as the control database names it, and how far it is archived.
#[derive(Debug, Clone)]
struct Known {
    name: String,
    replica: Option<ReplicaDir>,
    /// One past the last transaction that is archived.
    next: Offset,
    /// Its archiver reports by itself that it is late, with the better reason.
    is_known_late: bool,
}

/// What is compared from look to look.
#[derive(Debug, Default)]
struct Looks {
    /// Since when a database's files are missing.
    missing: BTreeMap<String, Timestamp>,
    logs: BTreeMap<u64, Growth>,
}

/// A log's growth since its archive last grew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Growth {
    /// The newest segment: its first transaction, length and time of change.
    mark: Option<(Offset, u64, i64, i64)>,
    next: Offset,
    since: Option<Timestamp>,
}

impl Daemon {
    /// Looks until the daemon ends.
    pub(super) async fn watch_disk(&self) {
        let mut looks = Looks::default();
        let patience = SignedDuration::try_from(self.config.archive.lag_alert.0).unwrap_or(SignedDuration::MAX);
        loop {
            let (data, known, followed) = (self.data.clone(), self.known(), self.followers.replicas());
            let now = self.clock.now();
            let look = move || {
                let mut found = looks.missing(&known, now);
                let replicas = data.replicas().unwrap_or_default();
                found.extend(looks.stalled(&known, &followed, replicas, patience, now));
                found.extend(temporary_directory(&data));
                (looks, found)
            };
            let found;
            (looks, found) = match blocking(look).await {
                Ok(looked) => looked,
                // A fault of this look must not end the archiving that it looks at.
                Err(error) => {
                    tracing::error!(event = "task_ended", %error, "the disk is no longer looked at");
                    let message = format!("the disk is no longer looked at: {error}");
                    self.state.raise(ConditionKind::TaskEnded, Subject::Sidecar, message);
                    return std::future::pending().await;
                }
            };
            self.state.looked_at_disk(found);
            self.clock.sleep(INTERVAL).await;
        }
    }

    fn known(&self) -> Vec<Known> {
        let status = self.state.status();
        let databases = self.followers.known.lock().clone();
        let known = databases.into_iter().map(|database| {
            let followed = status.databases.iter().find(|followed| followed.identity == database.identity);
            let archived = followed.and_then(|followed| followed.archived_offset);
            Known {
                name: database.display_name(),
                replica: database.replica.map(|id| self.data.replica(id)),
                next: archived.map_or(Offset(0), |last| Offset(last.0 + 1)),
                is_known_late: followed.is_some_and(|followed| {
                    let alert = self.config.archive.lag_alert.0.as_secs_f64();
                    followed.error.is_some() || followed.damage.is_some() || followed.behind_seconds > alert
                }),
            }
        });
        known.collect()
    }
}

impl Looks {
    /// Databases that the control database names and whose files have been gone for a while.
    fn missing(&mut self, known: &[Known], now: Timestamp) -> Vec<Finding> {
        let mut found = Vec::new();
        let mut missing = BTreeMap::new();
        for database in known {
            let reason = match &database.replica {
                Some(replica) => replica.why_missing(),
                None => Some("it has no replica on this server".to_owned()),
            };
            let Some(reason) = reason else { continue };
            let since = *self.missing.get(&database.name).unwrap_or(&now);
            if now.duration_since(since) >= MISSING_PATIENCE {
                found.push(Finding {
                    kind: ConditionKind::LogMissing,
                    subject: Subject::Database(database.name.clone()),
                    message: format!("database {} cannot be archived: {reason}", database.name),
                });
            }
            missing.insert(database.name.clone(), since);
        }
        self.missing = missing;
        found
    }

    /// Logs that have grown for longer than `patience` while nothing of them was archived.
    fn stalled(
        &mut self,
        known: &[Known],
        followed: &HashSet<u64>,
        replicas: Vec<ReplicaDir>,
        patience: SignedDuration,
        now: Timestamp,
    ) -> Vec<Finding> {
        let mut found = Vec::new();
        let mut logs = BTreeMap::new();
        for replica in replicas {
            let database =
                known.iter().find(|known| known.replica.as_ref().is_some_and(|named| named.id == replica.id));
            let next = database.map_or(Offset(0), |database| database.next);
            let mark = mark(&replica.log_path());
            let mut growth = Growth { mark, next, since: None };
            if let Some(before) = self.logs.get(&replica.id).filter(|before| before.next == next) {
                growth.since = before.since.or((before.mark != mark).then_some(now));
            }
            let is_known_late = database.is_some_and(|database| database.is_known_late);
            if !is_known_late && growth.since.is_some_and(|since| now.duration_since(since) >= patience) {
                // A server that starts touches its log without writing to it.
                match end(&replica.log_path()) {
                    Ok(end) if end > next => {
                        let name = database.map_or_else(|| format!("replica {}", replica.id), |it| it.name.clone());
                        let how = if followed.contains(&replica.id) { "" } else { ", and is not followed" };
                        found.push(Finding {
                            kind: ConditionKind::ArchiveStalled,
                            message: format!(
                                "the log of {name} grows to transaction {end}, nothing of it is archived{how}"
                            ),
                            subject: Subject::Database(name),
                        });
                    }
                    _ => growth.since = None,
                }
            }
            logs.insert(replica.id, growth);
        }
        self.logs = logs;
        found
    }
}

fn mark(log: &Path) -> Option<(Offset, u64, i64, i64)> {
    let newest = segments(log).ok()?.pop()?;
    let kind = std::fs::metadata(&newest.path).ok()?;
    Some((newest.first, kind.len(), kind.mtime(), kind.mtime_nsec()))
}

fn temporary_directory(data: &DataDir) -> Option<Finding> {
    let files = std::fs::read_dir(data.control_db_path()).into_iter().flatten().flatten();
    let copy: u64 = files.filter_map(|file| file.metadata().ok()).map(|kind| kind.len()).sum();
    let dir = std::env::temp_dir();
    let reason = why_unusable(&dir, copy + COPY_MARGIN)?;
    Some(Finding {
        kind: ConditionKind::TemporaryDirectory,
        subject: Subject::Sidecar,
        message: format!("TMPDIR ({}) cannot be used: {reason}", dir.display()),
    })
}

/// Why no file of `bytes` can be made in `dir`; `None` when it can.
fn why_unusable(dir: &Path, bytes: u64) -> Option<String> {
    let write = || {
        let mut file = tempfile::Builder::new().prefix(".inner-universe-").tempfile_in(dir)?;
        file.write_all(&[0; 512])
    };
    if let Err(error) = write() {
        return Some(error.to_string());
    }
    let disk = rustix::fs::statvfs(dir).ok()?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    (free < bytes).then(|| format!("{free} bytes are free and {bytes} are needed"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datadir::commit::{SegmentHeader, encode};
    use crate::datadir::log::segment_name;

    const PATIENCE: SignedDuration = SignedDuration::from_secs(60);

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).expect("a time")
    }

    struct Disk {
        _dir: tempfile::TempDir,
        data: DataDir,
    }

    impl Disk {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            std::fs::create_dir(dir.path().join("control-db")).expect("create");
            let data = DataDir::open(dir.path()).expect("a data directory");
            Self { _dir: dir, data }
        }

        fn write(&self, replica: u64, commits: u64) {
            let log = self.data.replica(replica).log_path();
            std::fs::create_dir_all(&log).expect("create");
            let mut bytes = SegmentHeader { log_version: 1, checksum_algorithm: 0 }.to_bytes().to_vec();
            for offset in 0..commits {
                bytes.extend_from_slice(&encode(1, Offset(offset), 0, 1, b"a record"));
            }
            std::fs::write(log.join(segment_name(Offset(0))), bytes).expect("write");
        }

        fn known(&self, name: &str, replica: Option<u64>, next: u64) -> Known {
            let replica = replica.map(|id| self.data.replica(id));
            Known { name: name.to_owned(), replica, next: Offset(next), is_known_late: false }
        }

        fn stalled(&self, looks: &mut Looks, known: &[Known], followed: &[u64], second: i64) -> Vec<Finding> {
            let followed = followed.iter().copied().collect();
            looks.stalled(known, &followed, self.data.replicas().expect("replicas"), PATIENCE, at(second))
        }
    }

    #[test]
    fn a_missing_log_is_reported_by_its_reason() {
        let disk = Disk::new();
        disk.write(1, 3);
        std::fs::create_dir_all(disk.data.replica(2).log_path()).expect("create");
        let mut known = vec![
            disk.known("good", Some(1), 3),
            disk.known("without log", Some(2), 0),
            disk.known("without directory", Some(3), 7),
            disk.known("without replica", None, 0),
        ];
        let mut looks = Looks::default();
        assert_eq!(looks.missing(&known, at(0)), [], "the server may be about to make it");
        let found = looks.missing(&known, at(10));
        let said: Vec<_> = found.iter().map(|found| (found.subject.clone(), found.message.as_str())).collect();
        let of = |name: &str| Subject::Database(name.to_owned());
        assert_eq!(said.len(), 3, "{said:?}");
        assert!(said[0].0 == of("without log") && said[0].1.contains("its log is missing from"), "{said:?}");
        assert!(said[1].0 == of("without directory") && said[1].1.contains("its directory"), "{said:?}");
        assert!(said[2].0 == of("without replica") && said[2].1.contains("no replica"), "{said:?}");
        known.remove(2);
        disk.write(2, 1);
        assert_eq!(looks.missing(&known, at(20)).len(), 1, "mended, and deleted");
    }

    #[test]
    fn a_log_that_grows_unarchived_is_reported() {
        let disk = Disk::new();
        disk.write(1, 3);
        disk.write(2, 3);
        let mut looks = Looks::default();
        let known = [disk.known("followed", Some(1), 3)];
        assert_eq!(disk.stalled(&mut looks, &known, &[1], 0), []);
        disk.write(1, 4);
        disk.write(2, 5);
        assert_eq!(disk.stalled(&mut looks, &known, &[1], 10), []);
        assert_eq!(disk.stalled(&mut looks, &known, &[1], 69), []);
        let found = disk.stalled(&mut looks, &known, &[1], 70);
        let subjects: Vec<_> = found.iter().map(|found| found.subject.clone()).collect();
        assert_eq!(subjects, ["followed", "replica 2"].map(|name| Subject::Database(name.to_owned())));
        assert!(found[1].message.contains("is not followed"), "{found:?}");
        let mut said = known.clone();
        said[0].is_known_late = true;
        assert_eq!(disk.stalled(&mut looks, &said, &[1], 72).len(), 1, "its archiver gives the better reason");
        // Its archive grows again.
        let known = [disk.known("followed", Some(1), 4)];
        assert_eq!(disk.stalled(&mut looks, &known, &[1, 2], 75).len(), 1);
    }

    #[test]
    fn a_log_without_news_is_not_stalled() {
        let disk = Disk::new();
        disk.write(1, 3);
        let mut looks = Looks::default();
        let known = [disk.known("idle", Some(1), 3)];
        assert_eq!(disk.stalled(&mut looks, &known, &[1], 0), []);
        // A server that starts writes its log's last bytes again, or allocates space behind them.
        disk.write(1, 3);
        for second in [10, 100, 1000] {
            assert_eq!(disk.stalled(&mut looks, &known, &[1], second), []);
        }
    }

    #[test]
    fn an_unusable_temporary_directory_says_why() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(why_unusable(dir.path(), 1), None);
        assert!(why_unusable(&dir.path().join("missing"), 1).is_some_and(|reason| reason.contains("No such file")));
        assert!(why_unusable(dir.path(), u64::MAX).is_some_and(|reason| reason.contains("are needed")));
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0, "it leaves nothing");
    }
}
