//! A data directory to measure with, and ours at work on it.

use std::path::{Path, PathBuf};
use std::process::Command;

use inner_universe::datadir::log::LogReader;
use inner_universe::datadir::{self, DataDir, snapshot};
use inner_universe::ids::Offset;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::bench::log::Writer;
use crate::bench::prepared::{self, Prepared};
use crate::measure::{Measured, measure};
use crate::sidecar::{Sidecar, path};
use crate::synthetic::Synthetic;

pub const GIB: f64 = (1u64 << 30) as f64;

/// Where the data is from.
enum Source {
    /// A log alone, made by hand; whole segments need no server's patience.
    Log { synthetic: Synthetic, writer: Writer },
    /// A real server's, with its native snapshots.
    Server { prepared: Prepared, copy: Box<prepared::Copy>, scratch: TempDir, runtime: Runtime },
}

/// A data directory, and room beside it.
pub struct Place {
    source: Source,
    /// Bytes that its log holds.
    bytes: u64,
}

impl Place {
    /// With a log of so many bytes and nothing else.
    pub fn of_log(gib: f64) -> Self {
        println!("writing a log of {gib} GiB");
        let (synthetic, mut writer) = (Synthetic::new(), Writer::default());
        let bytes = writer.add(&synthetic, (gib * GIB) as u64);
        Self { source: Source::Log { synthetic, writer }, bytes }
    }

    /// With what a real server wrote, whose log has so many bytes.
    pub fn of_server(gib: f64) -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let scratch = tempfile::tempdir().expect("a directory");
        let prepared = runtime.block_on(Prepared::get(gib));
        let copy = Box::new(prepared.copy(scratch.path()));
        let mut bytes = 0;
        each_batch(&replica(&copy.data).log_path(), Offset(0), |commits| bytes += commits.len() as u64);
        Self { source: Source::Server { prepared, copy, scratch, runtime }, bytes }
    }

    pub fn data(&self) -> PathBuf {
        match &self.source {
            Source::Log { synthetic, .. } => synthetic.path(),
            Source::Server { copy, .. } => copy.data.clone(),
        }
    }

    /// A place of that name beside the data.
    pub fn dir(&self, name: &str) -> PathBuf {
        match &self.source {
            Source::Log { synthetic, .. } => synthetic.dir.path().join(name),
            Source::Server { scratch, .. } => scratch.path().join(name),
        }
    }

    /// What this data is, for a report.
    pub fn describe(&self) -> String {
        let gib = self.bytes as f64 / GIB;
        match &self.source {
            Source::Log { .. } => {
                format!("a log of {gib:.2} GiB of transactions of about 560 bytes from a seed, and no snapshot")
            }
            Source::Server { copy, .. } => {
                let replica = replica(&copy.data);
                let snapshots = snapshot::list(&replica.snapshots_path()).expect("snapshots");
                format!(
                    "the data directory of a real server, {:.2} GiB on disk: a log that holds {gib:.2} GiB, whose older segments the server has compressed, a \
                     transaction for each call of a reducer from a seed, and {} native snapshots, the newest at transaction {}; {} files",
                    prepared::bytes(&copy.data) as f64 / GIB,
                    snapshots.len(),
                    snapshots.last().map_or(0, |newest| newest.offset.0),
                    files(&copy.data),
                )
            }
        }
    }

    /// Leaves the log alone, from which a server replays everything.
    pub fn forget_snapshots(&self) {
        std::fs::remove_dir_all(replica(&self.data()).snapshots_path()).expect("remove the snapshots");
    }

    /// What a server has changed is as it was at first, so that each round finds the same.
    pub fn renew(&mut self) {
        if matches!(self.source, Source::Server { .. }) {
            self.clear(&["data", "keys"]);
        }
        if let Source::Server { prepared, copy, scratch, .. } = &mut self.source {
            **copy = prepared.copy(scratch.path());
        }
    }

    /// One percent more log. Returns what `zstd -3` makes of that alone, in bytes.
    pub fn grow(&mut self) -> u64 {
        let log = replica(&self.data()).log_path();
        let end = datadir::log::end(&log).expect("the log's end");
        match &mut self.source {
            Source::Log { synthetic, writer } => drop(writer.add(synthetic, self.bytes / 100)),
            Source::Server { copy, runtime, .. } => runtime.block_on(copy.grow()),
        }
        let new = self.dir("new");
        let mut file = std::fs::File::create(&new).expect("a file");
        each_batch(&log, end, |commits| std::io::Write::write_all(&mut file, commits).expect("write"));
        let output = Command::new("zstd").args(["-q", "-3", "-c", path(&new)]).output().expect("zstd");
        self.clear(&["new"]);
        output.stdout.len() as u64
    }

    pub fn sidecar(&self) -> Sidecar {
        Sidecar::at(&self.dir("repository"))
    }

    pub fn back_up(&self, sidecar: &Sidecar) -> Measured {
        measure(sidecar.command().args(["--quiet", "backup", "create", "--data-dir", path(&self.data())]))
    }

    pub fn restore(&self, sidecar: &Sidecar) -> Measured {
        measure(sidecar.command().args(["--quiet", "restore", "--data-dir", path(&self.dir("restored"))]))
    }

    pub fn verify(&self, sidecar: &Sidecar) -> Measured {
        measure(sidecar.command().args(["--quiet", "verify"]))
    }

    /// What ours restored is what was there: its log from its first transaction on, and its snapshot, byte for byte.
    ///
    /// # Panics
    /// When it is not.
    pub fn assert_restored(&self) {
        let (ours, theirs) = (replica(&self.dir("restored")), replica(&self.data()));
        let first = datadir::log::segments(&ours.log_path()).expect("segments").first().map(|segment| segment.first);
        let [restored, original] = [ours.log_path(), theirs.log_path()].map(|log| {
            let mut hasher = blake3::Hasher::new();
            each_batch(&log, first.expect("a segment"), |commits| {
                hasher.update(commits);
            });
            hasher.finalize()
        });
        assert_eq!(restored, original, "the log that was restored differs");
        for snapshot in snapshot::list(&ours.snapshots_path()).into_iter().flatten() {
            assert_same(&theirs.snapshots_path().join(snapshot::dir_name(snapshot.offset)), snapshot.path());
        }
    }

    /// The log in `copy` is what was there, as files.
    ///
    /// # Panics
    /// When it is not.
    pub fn assert_log(&self, copy: &Path) {
        assert_same(&replica(&self.data()).log_path(), &replica(copy).log_path());
    }

    /// Starts a real server on what was restored, where there is one for it, and holds its rows against those before.
    /// Returns the seconds until it served.
    pub fn serves(&self, restored: &Path) -> Option<f64> {
        match &self.source {
            Source::Log { .. } => None,
            Source::Server { copy, runtime, .. } => Some(runtime.block_on(copy.serves(restored))),
        }
    }

    /// Puts away what lies in these places. Large files are removed; small ones stay until the end: ext4 looks at every inode
    /// that was freed in the last minutes before it takes another, which would be measured as the next one's time.
    pub fn clear(&self, names: &[&str]) {
        for name in names {
            let trash = self.dir("trash");
            std::fs::create_dir_all(&trash).expect("a place for what is not needed any more");
            let number = std::fs::read_dir(&trash).map_or(0, Iterator::count);
            let (from, to) = (self.dir(name), trash.join(number.to_string()));
            std::fs::rename(&from, &to).unwrap_or_else(|error| panic!("remove {}: {error}", from.display()));
            let removed = Command::new("find").args([path(&to), "-type", "f", "-size", "+1M", "-delete"]).status();
            assert!(removed.is_ok_and(|status| status.success()), "remove {}", to.display());
        }
    }
}

/// Holds one directory against another, byte for byte.
///
/// # Panics
/// When they differ.
pub fn assert_same(original: &Path, copy: &Path) {
    let status = Command::new("diff").args(["-r", "--brief", path(original), path(copy)]).status();
    assert!(status.is_ok_and(|status| status.success()), "{} differs from {}", copy.display(), original.display());
}

/// Files below a directory.
pub fn files(dir: &Path) -> usize {
    std::fs::read_dir(dir).map_or(0, |entries| {
        entries.flatten().map(|entry| if entry.path().is_dir() { files(&entry.path()) } else { 1 }).sum()
    })
}

/// The one database's.
fn replica(data: &Path) -> inner_universe::datadir::ReplicaDir {
    let replicas = DataDir::open(data).and_then(|data| data.replicas()).expect("replicas");
    let mut replicas = replicas.into_iter();
    replicas.next().expect("a replica")
}

fn each_batch(log: &Path, from: Offset, mut each: impl FnMut(&[u8])) {
    let mut reader = LogReader::open(log, from).expect("open the log");
    let mut buffer = Vec::new();
    while reader.next_batch(1 << 22, &mut buffer).expect("read the log").is_some() {
        each(&buffer);
    }
}
