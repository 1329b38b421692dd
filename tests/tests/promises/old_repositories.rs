//! Repositories that the release of 27 November 2026 wrote: plain and encrypted with merged objects and a fork, and one with the
//! hole that its compaction made of overlapping log objects. Log objects are of format version 1.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use harness::daemon::Daemon;
use harness::sidecar::{Sidecar, path};
use harness::tools;
use inner_universe::clock::{Clock as _, SystemClock};
use inner_universe::config::RepositoryConfig;
use inner_universe::datadir::DataDir;
use inner_universe::datadir::commit::{SegmentHeader, encode};
use inner_universe::datadir::control_db::ControlDbCopy;
use inner_universe::datadir::log::segment_name;
use inner_universe::ids::Offset;
use inner_universe::repository::Repository;
use inner_universe::repository::address::Address;
use inner_universe::repository::crypto::Keyring;
use inner_universe::retention;
use inner_universe::retention::policy::Policy;
use serde_json::Value;

struct Old {
    scratch: tempfile::TempDir,
    name: &'static str,
    truth: Value,
}

fn unpack(fixture: &str, to: &Path) {
    let archive = File::open(tools::fixture(fixture)).expect("the fixture");
    tar::Archive::new(zstd::Decoder::new(archive).expect("zstd")).unpack(to).expect("unpack");
}

/// Commits as the fixture's server wrote them: those from `fork` on are of branch `b`.
fn log(commits: u64, fork: Option<u64>) -> Vec<u8> {
    let text = |offset: u64| match fork {
        Some(fork) if offset >= fork => format!("\0commit {offset} of b"),
        _ => format!("\0commit {offset}"),
    };
    let header = SegmentHeader { log_version: 1, checksum_algorithm: 0 }.to_bytes().to_vec();
    (0..commits).fold(header, |mut log, offset| {
        log.extend(encode(1, Offset(offset), 0, 1, text(offset).as_bytes()));
        log
    })
}

impl Old {
    fn new(name: &'static str) -> Self {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        unpack("repositories-2026-11-27.tar.zst", scratch.path());
        let truth = std::fs::read(scratch.path().join(name).join("truth.json")).expect("the truth");
        Self { scratch, name, truth: serde_json::from_slice(&truth).expect("JSON") }
    }

    fn repository(&self) -> PathBuf {
        self.scratch.path().join(self.name).join("repository")
    }

    fn sidecar(&self) -> Sidecar {
        let identity = self.scratch.path().join("identity.txt");
        Sidecar::at(&self.repository()).and("REPOSITORY__IDENTITY_FILES", path(&identity))
    }

    /// The server's data directory, with `log` as its log.
    fn data(&self, log: &[u8]) -> PathBuf {
        let dir = self.scratch.path().join("server");
        if !dir.exists() {
            unpack("spacetimedb-2.8.3-data.tar.zst", &dir);
        }
        let mut entries = std::fs::read_dir(&dir).expect("list").flatten().map(|entry| entry.path());
        let root = entries.find(|entry| entry.join("control-db").is_dir()).unwrap_or(dir);
        let replica = replica_of(&root);
        for dir in [replica.join("clog"), replica.join("snapshots")] {
            let _ = std::fs::remove_dir_all(&dir);
            std::fs::create_dir_all(&dir).expect("make it");
        }
        std::fs::write(replica.join("clog").join(segment_name(Offset(0))), log).expect("write");
        root
    }

    /// Removes what the newest three restore points do not need, marked and deleted at once. Returns how many objects.
    fn prune(&self) -> u64 {
        let work = async {
            let address = Address::directory(&self.repository()).expect("an address");
            let (config, keys) = (RepositoryConfig::default(), Keyring::default());
            let repository = Repository::open_to_write(address.url(), &config, keys).await.expect("the repository");
            let policy = Policy { last: 3, ..Policy::default() };
            let mut deleted = 0;
            for _ in 0..2 {
                let plan =
                    retention::plan(&repository, &policy, Duration::ZERO, SystemClock.now()).await.expect("a plan");
                let report = retention::apply(&repository, &plan, &SystemClock).await.expect("a prune");
                assert_eq!(report.problems, [] as [&str; 0]);
                deleted += report.deleted.objects;
            }
            deleted
        };
        tokio::runtime::Runtime::new().expect("a runtime").block_on(work)
    }

    /// The log that a restore of `label` brings.
    fn restored(&self, sidecar: &Sidecar, label: &str) -> Vec<u8> {
        let to = self.scratch.path().join(format!("restored-{label}"));
        let _ = std::fs::remove_dir_all(&to);
        sidecar.restore(&to, &format!("label:{label}"));
        let clog = replica_of(&to).join("clog");
        std::fs::read(clog.join(segment_name(Offset(0)))).expect("the restored log")
    }

    /// Every restore point brings the log that it had.
    fn restores(&self, sidecar: &Sidecar) {
        for point in self.truth["points"].as_array().expect("points") {
            let label = point["label"].as_str().expect("a label");
            let commits = point["commits"].as_u64().expect("a number");
            let expected = log(commits, label.starts_with('b').then_some(115));
            assert!(self.restored(sidecar, label) == expected, "{} {label}", self.name);
        }
    }

    fn log_objects(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut dirs = vec![self.repository()];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).expect("list").flatten().map(|entry| entry.path()) {
                match entry.is_dir() {
                    true => dirs.push(entry),
                    false if entry.extension().is_some_and(|kind| kind == "iulog") => {
                        let text = path(&entry).split("/timelines/").nth(1).expect("a timeline").to_owned();
                        found.push(text.replace("000000000000000", ""));
                    }
                    false => {}
                }
            }
        }
        found.sort();
        found
    }
}

fn replica_of(root: &Path) -> PathBuf {
    let data = DataDir::open(root).expect("open");
    let control = ControlDbCopy::take(&data).expect("the control database");
    let replica = control.databases.iter().find_map(|database| database.replica).expect("a replica");
    root.join("replicas").join(replica.to_string())
}

fn is_sound(sidecar: &Sidecar) {
    let report = sidecar.run(["verify"]).ok();
    assert_eq!(report["findings"], serde_json::json!([]), "{report}");
    assert_eq!(report["lost"], serde_json::json!([]), "{report}");
}

#[test]
fn old_repositories_are_read_continued_merged_and_pruned() {
    for name in ["plain", "encrypted"] {
        let old = Old::new(name);
        let sidecar = old.sidecar();
        is_sound(&sidecar);
        old.restores(&sidecar);
        // The server went on from where the old release left it.
        let newest = log(146, Some(115));
        let data = old.data(&newest);
        sidecar.run(["backup", "create", "--data-dir", path(&data), "--label", "new"]).ok();
        let objects = old.log_objects();
        assert!(objects.iter().any(|object| object.ends_with("00136-00145.iulog")), "{objects:?}");
        assert!(!objects.iter().any(|object| object.starts_with("3")), "no new timeline: {objects:?}");
        assert!(old.restored(&sidecar, "new") == newest, "{name}");
        is_sound(&sidecar);
        // Old objects and new ones become one, and the old ones go.
        let quick = [("ARCHIVE__COMPACTION_INTERVAL", "1s"), ("ARCHIVE__COMPACTION_GRACE", "1s")];
        let daemon = Daemon::start(&sidecar, &data, &quick, &[]);
        let end = Instant::now() + Duration::from_secs(60);
        while old.log_objects().iter().any(|object| object.contains("/L0/") && object.contains("log/L0/00000-")) {
            assert!(Instant::now() < end, "{:?}", old.log_objects());
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(daemon.stop(), 0);
        is_sound(&sidecar);
        old.restores(&sidecar);
        assert!(old.restored(&sidecar, "new") == newest, "{name}");
        assert!(old.prune() > 0, "{name}");
        is_sound(&sidecar);
        assert!(old.restored(&sidecar, "b136") == log(136, Some(115)), "{name}");
        assert!(old.restored(&sidecar, "new") == newest, "{name}");
    }
}

#[test]
fn the_hole_that_an_old_release_made_is_read_through() {
    let old = Old::new("hole");
    assert_eq!(old.log_objects().len(), 2);
    let sidecar = old.sidecar();
    is_sound(&sidecar);
    old.restores(&sidecar);
    // And what comes next continues it.
    let newest = log(320, None);
    let data = old.data(&newest);
    sidecar.run(["backup", "create", "--data-dir", path(&data), "--label", "new"]).ok();
    assert!(old.restored(&sidecar, "new") == newest);
    is_sound(&sidecar);
}
