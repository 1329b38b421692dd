//! What was restored, judged by the engine of SpacetimeDB 2.14 at random offsets: every table against a replay of the
//! original log from its start.

use std::path::{Path, PathBuf};
use std::str::FromStr as _;
use std::time::Duration;

use harness::daemon::Daemon;
use harness::engine::{Replica, State};
use harness::sidecar::{Sidecar, path};
use harness::synthetic::Synthetic;
use harness::{oracle, tools};
use inner_universe::datadir::DataDir;
use inner_universe::datadir::control_db::ControlDbCopy;
use inner_universe::ids::Identity;
use serde_json::Value;

/// Of each archive so many offsets in each run, and in long runs.
const OFFSETS: (usize, usize) = (20, 200);

const IDENTITY: &str = "c200916d66231fbfa58c4cd4d760625f31e0d10a1cce8b71ed4e70ac602f2aeb";
const OWNER: &str = "c200bcb63791943b6fd5c8df07de733d9d43dd7c1b6f9cd9a7981fd03d89e1b4";

/// Offsets of a log up to `last`: both ends, those of `more`, and random ones.
fn offsets(last: u64, more: &[u64]) -> Vec<u64> {
    let count = if tools::all() { OFFSETS.1 } else { OFFSETS.0 };
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % (last + 1)
    };
    let mut offsets = vec![0, 1, last];
    offsets.extend(more);
    while offsets.len() < count {
        offsets.push(next());
    }
    offsets
}

fn unpack(name: &str) -> tempfile::TempDir {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let archive = std::fs::File::open(tools::fixture(&format!("{name}.tar.zst"))).expect("the fixture");
    tar::Archive::new(zstd::Decoder::new(archive).expect("zstd")).unpack(scratch.path()).expect("unpack");
    scratch
}

fn truth(name: &str) -> Value {
    let text = std::fs::read(tools::fixture(&format!("{name}.json"))).expect("the truth");
    serde_json::from_slice(&text).expect("JSON")
}

/// Restores at each offset and has the engine open it.
fn every_offset_is_restored(sidecar: &Sidecar, original: &Replica, offsets: &[u64]) {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let target = scratch.path().join("restored");
    for (offset, replayed) in offsets.iter().zip(original.states(offsets)) {
        let (database, to) = (original.identity.to_string(), format!("offset:{offset}"));
        // Whatever server may be installed here: the engine opens it.
        let restore = ["restore", "--data-dir", path(&target), "--database", &database, "--to", &to, "--any-server"];
        sidecar.run(restore).ok();
        let restored = original.at(&target);
        assert_eq!(oracle::last_offset(&restored.dir().join("clog")), Some(*offset));
        same(&restored.open(), &replayed, *offset);
        std::fs::remove_dir_all(&target).expect("remove");
    }
}

/// Every table is the same. The engine adds system tables that an older server did not have, and numbers their parts.
fn same(restored: &State, replayed: &State, offset: u64) {
    assert_eq!(restored.module, replayed.module, "offset {offset}");
    let names = |state: &State| state.tables.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(restored), names(replayed), "offset {offset}");
    let differ: Vec<_> =
        names(restored).into_iter().filter(|name| restored.tables[name] != replayed.tables[name]).collect();
    assert!(differ.is_empty(), "offset {offset}: {differ:?}");
}

fn of_2_14(synthetic: &Synthetic) -> Replica {
    let identity = |text| Identity::from_str(text).expect("an identity");
    Replica { data_dir: synthetic.path(), id: 1, identity: identity(IDENTITY), owner: identity(OWNER) }
}

fn around_2_14() -> Synthetic {
    let identity = |text| Identity::from_str(text).expect("an identity");
    Synthetic::around("2.14.0", 1, identity(IDENTITY), identity(OWNER))
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("create");
    for entry in std::fs::read_dir(from).expect("list").flatten() {
        match entry.path().is_dir() {
            true => copy(&entry.path(), &to.join(entry.file_name())),
            false => drop(std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copy")),
        }
    }
}

#[test]
fn a_replica_of_2_14_is_restored_at_every_offset() {
    const NAME: &str = "spacetimedb-2.14.0-replica";
    let (fixture, truth) = (unpack(NAME), truth(NAME));
    let synthetic = around_2_14();
    let replica = of_2_14(&synthetic);
    copy(&fixture.path().join("replicas/1"), &replica.dir());
    let told = truth["offsets"].as_array().expect("offsets");
    let known: Vec<_> = told.iter().map(|point| point["offset"].as_u64().expect("an offset")).collect();
    // The truth that came with the files, and a replay of today.
    for (told, state) in told.iter().zip(replica.states(&known)) {
        let tables = told["tables"].as_object().expect("tables");
        assert_eq!(tables.len(), state.tables.len(), "offset {}", told["offset"]);
        for (name, table) in tables {
            assert_eq!(table["sha256"], state.tables[name].sha256, "{name} at offset {}", told["offset"]);
        }
    }
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let report = sidecar.backup(&replica.data_dir);
    assert_eq!(report["databases"][0]["offset"], truth["last_offset"]);
    let last = truth["last_offset"].as_u64().expect("an offset");
    every_offset_is_restored(&sidecar, &replica, &offsets(last, &known));
    assert_eq!(sidecar.run(["verify"]).ok()["findings"].as_array().map(Vec::len), Some(0));
}

#[test]
fn data_of_2_8_3_is_restored_at_every_offset() {
    every_database_is_restored("spacetimedb-2.8.3-data");
}

#[test]
fn data_of_2_8_3_with_every_feature_is_restored_at_every_offset() {
    every_database_is_restored("spacetimedb-2.8.3-features");
}

fn every_database_is_restored(name: &str) {
    let fixture = unpack(name);
    let data = data_dir_in(fixture.path());
    let sidecar = Sidecar::at(&fixture.path().join("repository"));
    sidecar.backup(&data);
    let opened = DataDir::open(&data).expect("open");
    let control = ControlDbCopy::take(&opened).expect("the control database");
    for database in control.databases {
        let id = database.replica.expect("a replica");
        let replica = Replica { data_dir: data.clone(), id, identity: database.identity, owner: database.owner };
        let last = oracle::last_offset(&replica.dir().join("clog")).expect("a log");
        every_offset_is_restored(&sidecar, &replica, &offsets(last, &[]));
    }
}

fn oracle_has_none(replica: &Replica) -> bool {
    let log = replica.dir().join("clog");
    !log.is_dir() || oracle::last_offset(&log).is_none()
}

fn data_dir_in(scratch: &Path) -> PathBuf {
    let entries = std::fs::read_dir(scratch).expect("list").flatten().map(|entry| entry.path());
    let nested = entries.into_iter().find(|entry| entry.join("control-db").is_dir());
    nested.unwrap_or_else(|| scratch.to_owned())
}

#[test]
fn a_writer_of_2_14_is_followed_live() {
    let synthetic = around_2_14();
    let replica = of_2_14(&synthetic);
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let writer = replica.write(7);
    while oracle_has_none(&replica) {
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut daemon = Daemon::start(&sidecar, &replica.data_dir, &[("ARCHIVE__FLUSH_INTERVAL", "50ms")], &[]);
    // Over both migrations of its module.
    daemon.wait_archived(5_000);
    let last = writer.stop();
    daemon.wait_archived(last);
    assert_eq!(daemon.stop(), 0);
    every_offset_is_restored(&sidecar, &replica, &offsets(last, &[1_999, 2_000, 3_999, 4_000]));
    assert_eq!(sidecar.run(["verify"]).ok()["findings"].as_array().map(Vec::len), Some(0));
}
