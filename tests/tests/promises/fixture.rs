//! A data directory that a 2.8.3 server wrote and was killed on: small segments, most of them rewritten as zstd.

use std::path::PathBuf;
use std::time::Duration;

use harness::daemon::Daemon;
use harness::sidecar::{Sidecar, path};
use harness::{oracle, tools};
use inner_universe::clock::{Clock as _, SystemClock};
use inner_universe::config::RepositoryConfig;
use inner_universe::datadir::DataDir;
use inner_universe::datadir::control_db::ControlDbCopy;
use inner_universe::datadir::log::{LogReader, Tail, segments};
use inner_universe::datadir::snapshot;
use inner_universe::ids::Offset;
use inner_universe::repository::Repository;
use inner_universe::repository::address::Address;
use inner_universe::repository::crypto::Keyring;
use inner_universe::retention;
use inner_universe::retention::policy::Policy;
use serde_json::Value;

struct Fixture {
    scratch: tempfile::TempDir,
    truth: Value,
}

impl Fixture {
    fn unpack() -> Self {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let archive = std::fs::File::open(tools::fixture("spacetimedb-2.8.3-data.tar.zst")).expect("the fixture");
        let archive = zstd::Decoder::new(archive).expect("zstd");
        tar::Archive::new(archive).unpack(scratch.path()).expect("unpack");
        let truth = std::fs::read(tools::fixture("spacetimedb-2.8.3-data.json")).expect("the truth");
        Self { scratch, truth: serde_json::from_slice(&truth).expect("JSON") }
    }

    fn data(&self) -> PathBuf {
        let mut entries = std::fs::read_dir(self.scratch.path()).expect("list").flatten().map(|entry| entry.path());
        let root = entries.find(|entry| entry.join("control-db").is_dir());
        root.unwrap_or_else(|| self.scratch.path().to_owned())
    }

    fn last(&self) -> u64 {
        self.truth["last_offset"].as_u64().expect("an offset")
    }
}

#[test]
fn every_segment_reads_as_the_truth_says() {
    let fixture = Fixture::unpack();
    let data = DataDir::open(&fixture.data()).expect("open");
    let control = ControlDbCopy::take(&data).expect("the control database");
    assert_eq!(control.databases.len(), 1);
    assert_eq!(control.databases[0].display_name(), "iu");
    let replica = data.replica(control.databases[0].replica.expect("a replica"));
    let found = segments(&replica.log_path()).expect("list");
    let truth = fixture.truth["segments"].as_array().expect("segments");
    assert_eq!(found.len(), truth.len());
    for (segment, truth) in found.iter().zip(truth) {
        assert_eq!(segment.first.0, truth["first"].as_u64().expect("first"));
        let mut reader = LogReader::open(&replica.log_path(), segment.first).expect("open");
        let (mut buffer, mut bytes) = (Vec::new(), 10);
        let last = truth["last"].as_u64().expect("last");
        while reader.position().0 <= last {
            let batch = reader.next_batch(1, &mut buffer).expect("read").expect("a batch");
            bytes += buffer.len() as u64;
            assert!(batch.times.first.is_some() || batch.first.0 == 0);
        }
        assert_eq!(reader.position().0, last + 1);
        assert_eq!(bytes, truth["valid_len"].as_u64().expect("valid_len"));
    }
    let mut reader = LogReader::open(&replica.log_path(), Offset(0)).expect("open");
    let mut buffer = Vec::new();
    while reader.next_batch(1 << 20, &mut buffer).expect("read").is_some() {}
    assert_eq!((reader.position().0, reader.tail()), (fixture.last() + 1, &Tail::Clean));
}

#[test]
fn every_object_of_every_snapshot_is_what_its_name_says() {
    let fixture = Fixture::unpack();
    let data = DataDir::open(&fixture.data()).expect("open");
    let replica = data.replicas().expect("replicas").remove(0);
    let snapshots = snapshot::list(&replica.snapshots_path()).expect("list");
    assert!(snapshots.len() > 3, "{snapshots:?}");
    let mut objects = 0;
    for found in snapshots {
        let (manifest, _) = found.manifest().expect("a manifest");
        assert_eq!(manifest.offset, found.offset);
        for (hash, kind) in &manifest.objects {
            found.object(hash, *kind).expect("an object");
            objects += 1;
        }
    }
    assert!(objects > 50, "{objects}");
}

#[test]
fn it_is_backed_up_and_restored_at_every_snapshot_and_between() {
    let fixture = Fixture::unpack();
    let data = fixture.data();
    let sidecar = Sidecar::at(&fixture.scratch.path().join("repository"));
    let report = sidecar.backup(&data);
    assert_eq!(report["databases"][0]["offset"], fixture.last());
    assert_eq!(sidecar.run(["verify"]).ok()["findings"].as_array().map(Vec::len), Some(0));
    let replica = DataDir::open(&data).expect("open").replicas().expect("replicas").remove(0);
    let original = oracle::transactions(&replica.log_path());
    for offset in [0, 1, 1710, 1711, 12345, 24870, fixture.last()] {
        let target = fixture.scratch.path().join("restored");
        sidecar.run(["restore", "--data-dir", path(&target), "--to", &format!("offset:{offset}")]).ok();
        let log = target.join(format!("replicas/{}/clog", replica.id));
        let restored = oracle::transactions(&log);
        let first = restored[0].offset as usize;
        assert_eq!(restored, original[first..=offset as usize], "offset {offset}");
        let snapshots = snapshot::list(&target.join(format!("replicas/{}/snapshots", replica.id))).expect("list");
        let usable = snapshots.first().map(|snapshot| snapshot.offset.0);
        assert!(first == 0 || usable.is_some_and(|snapshot| first as u64 <= snapshot && snapshot <= offset));
        std::fs::remove_dir_all(&target).expect("remove");
    }
}

#[test]
fn local_log_goes_only_where_it_is_proven_to_be_archived_and_two_whole_snapshots_stand_for_it() {
    let fixture = Fixture::unpack();
    let data = fixture.data();
    let sidecar = Sidecar::at(&fixture.scratch.path().join("repository"));
    sidecar.backup(&data);
    let replica = DataDir::open(&data).expect("open").replicas().expect("replicas").remove(0);
    let all = segments(&replica.log_path()).expect("list");
    let snapshots = snapshot::list(&replica.snapshots_path()).expect("list");
    let original = oracle::transactions(&replica.log_path());
    let prune = |more: &[&str]| sidecar.run([&["prune-local", "--data-dir", path(&data)], more].concat());
    let oldest = |keep: usize| snapshots[snapshots.len() - keep].offset;
    let expected = |keep: usize| -> Vec<u64> {
        all.windows(2).filter(|pair| pair[1].first <= oldest(keep)).map(|pair| pair[0].first.0).collect()
    };
    let named = |report: &Value| -> Vec<u64> {
        let segments = report["databases"][0]["segments"].as_array().expect("segments");
        segments.iter().map(|segment| segment["first"].as_u64().expect("an offset")).collect()
    };
    let plan = prune(&[]).ok();
    assert_eq!((named(&plan), &plan["applied"]), (expected(2), &Value::Bool(false)));
    assert!(!expected(2).is_empty() && expected(2).len() < expected(1).len(), "{:?}", expected(2));
    assert_eq!(segments(&replica.log_path()).expect("list").len(), all.len(), "a plan changes nothing");

    // An object that cannot be read back proves nothing.
    let logs =
        files(&fixture.scratch.path().join("repository")).into_iter().filter(|file| path(file).ends_with(".iulog"));
    let object = logs.min().expect("a log object");
    let good = std::fs::read(&object).expect("read");
    let mut bad = good.clone();
    *bad.last_mut().expect("a byte") ^= 1;
    std::fs::write(&object, &bad).expect("damage");
    let refused = prune(&["--apply"]).ok();
    assert_eq!(named(&refused), Vec::<u64>::new());
    assert!(
        refused["databases"][0]["stays"].as_str().is_some_and(|stays| stays.contains("cannot be read back")),
        "{refused}"
    );
    std::fs::remove_file(&object).expect("lose");
    let refused = prune(&["--apply"]).ok();
    assert!(
        refused["databases"][0]["stays"].as_str().is_some_and(|stays| stays.contains("are not in timeline")),
        "{refused}"
    );
    std::fs::write(&object, &good).expect("put back");
    // Neither does a snapshot that is damaged stand for anything.
    let newest = snapshots.last().expect("a snapshot");
    let (manifest, _) = newest.manifest().expect("a manifest");
    let page = newest.path().join(snapshot::object_path(&manifest.objects[0].0));
    let whole = std::fs::read(&page).expect("read");
    std::fs::remove_file(&page).expect("lose");
    let run = prune(&[]);
    assert!(run.stderr.contains("a snapshot cannot be used"), "{}", run.stderr);
    assert_eq!(named(&run.json), expected(3), "older ones stand for it");
    std::fs::write(&page, whole).expect("put back");

    let done = prune(&["--apply"]).ok();
    assert_eq!((named(&done), &done["applied"]), (expected(2), &Value::Bool(true)));
    let left = segments(&replica.log_path()).expect("list");
    assert_eq!(left.len() + expected(2).len(), all.len());
    assert_eq!(oracle::transactions(&replica.log_path()), original[left[0].first.0 as usize..]);
    assert_eq!(named(&prune(&["--apply"]).ok()), Vec::<u64>::new(), "nothing is left to do");
    // The archive goes on, and what was removed here is restored from there.
    let report = sidecar.backup(&data);
    assert_eq!(
        (report["problems"].as_array().map(Vec::len), &report["databases"][0]["timeline"]),
        (Some(0), &Value::from(1))
    );
    let target = fixture.scratch.path().join("restored");
    let inside = expected(2)[expected(2).len() / 2] + 7;
    sidecar.run(["restore", "--data-dir", path(&target), "--to", &format!("offset:{inside}")]).ok();
    let restored = oracle::transactions(&target.join(format!("replicas/{}/clog", replica.id)));
    assert_eq!(restored, original[restored[0].offset as usize..=inside as usize]);
}

/// Backs up after each segment, and so makes an object for each of them, and each snapshot in its time. Returns the replica.
fn back_up_as_it_was_written(fixture: &Fixture, sidecar: &Sidecar) -> u64 {
    let data = fixture.data();
    let replica = DataDir::open(&data).expect("open").replicas().expect("replicas").remove(0);
    let (log, snapshots) = (replica.log_path(), replica.snapshots_path());
    let aside = fixture.scratch.path().join("aside");
    std::fs::create_dir(&aside).expect("a directory");
    let moved = |from: &std::path::Path, to: &std::path::Path| std::fs::rename(from, to).expect("move");
    let all = segments(&log).expect("list");
    let name = |path: &std::path::Path| path.file_name().expect("a name").to_owned();
    for segment in &all {
        moved(&segment.path, &aside.join(name(&segment.path)));
    }
    let made = snapshot::list(&snapshots).expect("list");
    for found in &made {
        moved(found.path(), &aside.join(name(found.path())));
    }
    for (index, segment) in all.iter().enumerate() {
        moved(&aside.join(name(&segment.path)), &segment.path);
        let end = all.get(index + 1).map_or(fixture.last() + 1, |next| next.first.0);
        for found in made.iter().filter(|found| segment.first <= found.offset && found.offset.0 < end) {
            moved(&aside.join(name(found.path())), found.path());
        }
        sidecar.backup(&data);
    }
    replica.id
}

/// Prunes at once what the newest restore point does not need. Returns how many objects.
fn prune_to_newest(repository: &std::path::Path) -> u64 {
    let work = async {
        let address = Address::directory(repository).expect("an address");
        let (config, keys) = (RepositoryConfig::default(), Keyring::default());
        let repository = Repository::open_to_write(address.url(), &config, keys).await.expect("the repository");
        let policy = Policy { last: 1, ..Policy::default() };
        let planning = retention::plan_to_apply(&repository, &policy, Duration::ZERO, SystemClock.now());
        let plan = planning.await.expect("a plan");
        retention::apply(&repository, &plan, &SystemClock).await.expect("a prune").deleted.objects
    };
    tokio::runtime::Runtime::new().expect("a runtime").block_on(work)
}

/// A pack can rot, with its size as it was. Then its snapshot must not stand for the log before it.
#[test]
fn a_snapshot_that_cannot_be_read_back_does_not_stand_for_log_that_a_prune_removes() {
    let fixture = Fixture::unpack();
    let sidecar = Sidecar::at(&fixture.scratch.path().join("repository"));
    let replica = back_up_as_it_was_written(&fixture, &sidecar);
    let repository = fixture.scratch.path().join("repository");
    let mut manifests: Vec<_> =
        files(&repository).into_iter().filter(|file| path(file).contains("/snapshots/")).collect();
    manifests.sort();
    let packs = |manifest: &PathBuf| -> Vec<String> {
        let manifest: Value = serde_json::from_slice(&std::fs::read(manifest).expect("read")).expect("JSON");
        let packs = manifest["packs"].as_array().expect("packs").iter();
        packs.map(|used| used["pack"].as_str().expect("a pack").to_owned()).collect()
    };
    let (newest, older) = manifests.split_last().expect("snapshots");
    let known: Vec<_> = older.iter().flat_map(packs).collect();
    let own = packs(newest).into_iter().find(|pack| !known.contains(pack)).expect("a pack of its own");
    let rotten = files(&repository).into_iter().find(|file| path(file).contains(&own)).expect("the pack's file");
    let mut bytes = std::fs::read(&rotten).expect("read");
    *bytes.last_mut().expect("a byte") ^= 1;
    std::fs::write(&rotten, bytes).expect("damage");

    assert!(prune_to_newest(&repository) > 0, "older log goes");
    let target = fixture.scratch.path().join("restored");
    sidecar.restore(&target, "latest");
    assert_eq!(oracle::last_offset(&oracle::log_dir(&target, replica)), Some(fixture.last()));
}

#[test]
fn a_time_is_restored_whatever_is_damaged_that_a_restore_to_it_does_not_read() {
    let fixture = Fixture::unpack();
    let repository = fixture.scratch.path().join("repository");
    let sidecar = Sidecar::at(&repository);
    let replica = back_up_as_it_was_written(&fixture, &sidecar);
    let time = sidecar.backup(&fixture.data())["databases"][0]["time"].as_str().expect("a time").to_owned();
    let mut objects: Vec<_> = files(&repository).into_iter().filter(|file| path(file).ends_with(".iulog")).collect();
    objects.sort();
    assert!(objects.len() > 6, "{objects:?}");
    // Its start, from which it is known what it holds: in the middle, where a search by halves looks first.
    for object in &objects[1..objects.len() - 3] {
        let mut bytes = std::fs::read(object).expect("read");
        bytes[30] ^= 1;
        std::fs::write(object, bytes).expect("damage");
    }
    let target = fixture.scratch.path().join("restored");
    sidecar.restore(&target, &format!("time:{time}"));
    assert_eq!(oracle::last_offset(&oracle::log_dir(&target, replica)), Some(fixture.last()));
    // What a damaged object held cannot be restored, and that is an error.
    std::fs::remove_dir_all(&target).expect("remove");
    let run = sidecar.run(["restore", "--data-dir", path(&target), "--to", "offset:5000"]);
    assert_ne!(run.code, 0);
    assert!(!target.exists());
}

fn files(dir: &std::path::Path) -> Vec<PathBuf> {
    let (mut found, mut dirs) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(next) = dirs.pop() {
        for entry in std::fs::read_dir(next).expect("list").flatten() {
            if entry.path().is_dir() { dirs.push(entry.path()) } else { found.push(entry.path()) }
        }
    }
    found
}

#[test]
fn a_restored_or_pruned_log_continues_its_timeline() {
    let fixture = Fixture::unpack();
    let data = fixture.data();
    let sidecar = Sidecar::at(&fixture.scratch.path().join("repository"));
    sidecar.backup(&data);
    let no_problems = |report: &Value| {
        assert_eq!(report["problems"].as_array().map(Vec::len), Some(0), "{report}");
        assert_eq!(report["databases"][0]["timeline"], 1);
        assert_eq!(report["databases"][0]["offset"], fixture.last());
    };
    // What was restored starts at a snapshot, in the middle of what is archived.
    let restored = fixture.scratch.path().join("restored");
    sidecar.restore(&restored, "latest");
    let replica = DataDir::open(&restored).expect("open").replicas().expect("replicas").remove(0);
    assert!(segments(&replica.log_path()).expect("list")[0].first > Offset(0), "a snapshot is used");
    no_problems(&sidecar.backup(&restored));
    // A pruned log starts at a segment, which is no place where an archived object starts.
    let replica = DataDir::open(&data).expect("open").replicas().expect("replicas").remove(0);
    let newest = snapshot::list(&replica.snapshots_path()).expect("list").pop().expect("a snapshot").offset;
    let all = segments(&replica.log_path()).expect("list");
    for pair in all.windows(2).filter(|pair| pair[1].first <= newest) {
        std::fs::remove_file(&pair[0].path).expect("prune");
    }
    no_problems(&sidecar.backup(&data));
    // And if it then goes on otherwise, it forks, and the old end stays restorable.
    let last = segments(&replica.log_path()).expect("list").pop().expect("a segment");
    let bytes = std::fs::read(&last.path).expect("read");
    std::fs::write(&last.path, &bytes[..bytes.len() / 2]).expect("cut");
    let run = sidecar.run(["backup", "create", "--data-dir", path(&data)]);
    let report = run.json;
    // It is cut within a commit.
    assert_eq!((run.code, &report["complete"]), (3, &Value::Bool(false)), "{report}");
    assert_eq!(report["databases"][0]["timeline"], 2, "{report}");
    let offset = report["databases"][0]["offset"].as_u64().expect("an offset");
    assert!(offset < fixture.last());
    let again = fixture.scratch.path().join("again");
    assert_eq!(sidecar.restore(&again, "latest")["databases"][0]["offset"], offset);
    std::fs::remove_dir_all(&again).expect("remove");
    let run = ["restore", "--data-dir", path(&again), "--timeline", "1"];
    assert_eq!(sidecar.run(run).ok()["databases"][0]["offset"], fixture.last());
    std::fs::remove_dir_all(&again).expect("remove");
    let run = ["restore", "--data-dir", path(&again), "--timeline", "1", "--to", "offset:100", "--no-snapshot"];
    sidecar.run(run).ok();
    assert_eq!(sidecar.run(["verify"]).ok()["findings"].as_array().map(Vec::len), Some(0));
}

#[test]
fn log_deleted_before_the_daemon_archived_it_is_told_and_what_follows_is_restorable_from_its_snapshot() {
    let fixture = Fixture::unpack();
    let data = fixture.data();
    let replica = DataDir::open(&data).expect("open").replicas().expect("replicas").remove(0);
    let (log, snapshots) = (replica.log_path(), replica.snapshots_path());
    let original = oracle::transactions(&log);
    let all = segments(&log).expect("list");
    // Of what the server wrote only the first two segments are there yet.
    let aside = fixture.scratch.path().join("aside");
    std::fs::create_dir(&aside).expect("a directory");
    let end = all[2].first;
    let moved = |from: &std::path::Path, to: &std::path::Path| std::fs::rename(from, to).expect("move");
    for segment in &all[2..] {
        moved(&segment.path, &aside.join(segment.path.file_name().expect("a name")));
    }
    let later: Vec<_> =
        snapshot::list(&snapshots).expect("list").into_iter().filter(|found| found.offset >= end).collect();
    assert!(!later.is_empty());
    for found in &later {
        let name = format!("{:020}.snapshot_dir", found.offset.0);
        moved(&snapshots.join(&name), &aside.join(&name));
    }
    let sidecar = Sidecar::at(&fixture.scratch.path().join("repository"));
    let mut daemon = Daemon::start(&sidecar, &data, &[("ARCHIVE__FLUSH_INTERVAL", "20ms")], &[]);
    daemon.wait_archived(end.0 - 1);

    // While it does not look, the server goes on, and deletes what the newest snapshot but one does not need.
    daemon.signal("STOP");
    let kept = later[later.len() - 2].offset;
    let first = all.iter().rev().find(|segment| segment.first <= kept).expect("a segment").first;
    assert!(first > end, "a gap is made");
    for segment in &all {
        if segment.first < end {
            std::fs::remove_file(&segment.path).expect("delete");
        } else if segment.first >= first {
            let name = segment.path.file_name().expect("a name");
            moved(&aside.join(name), &log.join(name));
        }
    }
    for found in &later {
        let name = format!("{:020}.snapshot_dir", found.offset.0);
        moved(&aside.join(&name), &snapshots.join(&name));
    }
    daemon.signal("CONT");
    daemon.wait_archived(fixture.last());
    let status = daemon.status().expect("a status");
    let database = &status.databases[0];
    assert_eq!(database.timeline.map(|timeline| timeline.0), Some(2));
    let told = database.events.iter().any(|event| event.message.contains("deleted before they were archived"));
    assert!(told, "{:?}", database.events);
    sidecar.run(["backup", "create", "--data-dir", path(&data)]).ok();
    assert_eq!(daemon.stop(), 0);

    let restored = |timeline: &str, offset: u64| {
        let target = fixture.scratch.path().join("restored");
        let to = format!("offset:{offset}");
        sidecar.run(["restore", "--data-dir", path(&target), "--timeline", timeline, "--to", &to]).ok();
        let found = oracle::transactions(&target.join(format!("replicas/{}/clog", replica.id)));
        std::fs::remove_dir_all(&target).expect("remove");
        found
    };
    for (timeline, offset) in [("1", end.0 - 1), ("2", kept.0), ("2", fixture.last())] {
        let found = restored(timeline, offset);
        let from = found[0].offset as usize;
        assert_eq!(found, original[from..=offset as usize], "timeline {timeline}, offset {offset}");
    }
    // What is lost is refused with its reason, and not made up for from the other side of the gap.
    let target = fixture.scratch.path().join("lost");
    let lost = format!("offset:{}", first.0 - 1);
    for timeline in ["1", "2"] {
        let run = sidecar.run(["restore", "--data-dir", path(&target), "--timeline", timeline, "--to", &lost]);
        assert!(run.code == 4 && !target.exists(), "timeline {timeline}: {} {}", run.code, run.stderr);
    }
    assert_eq!(sidecar.run(["verify"]).ok()["findings"].as_array().map(Vec::len), Some(0));
}
