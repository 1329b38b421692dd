//! Bad input gets one clear error that says what to do, the right exit code, and leaves everything as it was.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::server::Server;
use harness::sidecar::{Run, Sidecar, path};
use harness::tools;
use harness::workload::{self, Random};

use crate::instance::files;
use crate::synthetic::{Synthetic, record};

/// Names and contents of everything below a directory.
fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    files(dir).into_iter().map(|file| (file.clone(), std::fs::read(&file).expect("read"))).collect()
}

/// A synthetic data directory, backed up.
struct BackedUp {
    synthetic: Synthetic,
    sidecar: Sidecar,
}

impl BackedUp {
    fn new(records: u64, payload: usize) -> Self {
        let synthetic = Synthetic::new();
        let mut random = Random::new(7);
        let mut payload = || (0..payload).map(|_| random.draw() as u8).collect::<Vec<_>>();
        let records: Vec<_> = (0..records as i64).map(|n| record(n * 1000, &payload())).collect();
        synthetic.segment(1, 0, &records);
        let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
        sidecar.backup(&synthetic.path());
        Self { synthetic, sidecar }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.synthetic.dir.path().join(name)
    }

    fn restore(&self, target: &Path) -> Run {
        self.sidecar.run(["restore", "--data-dir", path(target)])
    }

    fn object(&self, part: &str) -> PathBuf {
        let mut found = files(&self.path("repository")).into_iter().filter(|file| path(file).contains(part));
        found.next().unwrap_or_else(|| panic!("no object {part}"))
    }
}

#[test]
fn a_data_directory_that_is_none() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let sidecar = Sidecar::at(&dir.path().join("repository"));
    let backup = |data: &Path| sidecar.run(["backup", "create", "--data-dir", path(data)]);
    assert!(backup(&dir.path().join("missing")).fails_with(2).contains("does not exist"));
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).expect("create");
    assert!(backup(&empty).fails_with(2).contains("not a SpacetimeDB data directory"));
    let file = dir.path().join("file");
    std::fs::write(&file, "x").expect("write");
    assert!(backup(&file).fails_with(2).contains("not a directory"));
    assert!(!dir.path().join("repository").exists(), "a refused backup makes no repository");
    assert!(sidecar.run(["backup", "list"]).fails_with(4).contains("no repository"));
    sidecar.run(["backup", "create"]).stderr.contains("--data-dir").then_some(()).expect("the missing flag is named");
}

#[test]
fn a_restore_for_a_server_that_is_too_old_for_the_data_is_refused_beforehand() {
    let identity = |byte| inner_universe::ids::Identity([byte; 32]);
    let newer = Synthetic::around("99.0.0", harness::synthetic::REPLICA, identity(5), identity(6));
    std::fs::create_dir_all(newer.log()).expect("create");
    newer.segment(1, 0, &[record(1000, b"row")]);
    let server = tools::server();
    let repository = newer.dir.path().join("repository");
    let sidecar = Sidecar::at(&repository).and("SPACETIMEDB_CONFIG__SERVER_BIN", path(&server));
    sidecar.backup(&newer.path());
    let target = newer.dir.path().join("restored");
    let restore = ["restore", "--data-dir", path(&target)];
    let message = sidecar.run(restore).fails_with(6);
    assert!(message.contains("does not open what 99.0.0 wrote") && message.contains("--any-server"), "{message}");
    assert!(!target.exists());
    sidecar.run([&restore[..], &["--any-server"]].concat()).ok();
    // Nor is such a server started on it.
    let started = sidecar.run(["run", "--serve", "--data-dir", path(&target)]).fails_with(6);
    assert!(started.contains("which 99.0.0 used last"), "{started}");
}

#[test]
fn a_data_directory_that_may_not_be_read() {
    let backed_up = BackedUp::new(5, 10);
    let (data, scratch) = (backed_up.synthetic.path(), backed_up.synthetic.dir.path());
    std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o700)).expect("chmod");
    std::fs::set_permissions(scratch, std::fs::Permissions::from_mode(0o777)).expect("chmod");
    // Root reads everything, so the binary runs as somebody else, from where that one may start it.
    let binary = backed_up.path("inner-universe");
    std::fs::copy(tools::inner_universe(), &binary).expect("copy the binary");
    std::fs::set_permissions(&binary, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    let mut command = if rustix_is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]).arg(&binary);
        command
    } else {
        std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o000)).expect("chmod");
        Command::new(&binary)
    };
    let repository = format!("file://{}", backed_up.path("other").display());
    let output = command.args(["--repository", &repository, "backup", "create", "--data-dir", path(&data)]).output();
    let output = output.expect("run the binary");
    std::fs::set_permissions(&data, std::fs::Permissions::from_mode(0o700)).expect("chmod");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("Permission denied") && stderr.contains(path(&data)), "{stderr}");
}

fn rustix_is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|kind| std::os::unix::fs::MetadataExt::uid(&kind) == 0)
}

#[test]
fn a_log_of_an_unknown_version_or_damaged_in_the_middle() {
    let synthetic = Synthetic::new();
    let records: Vec<_> = (0..20).map(|n| record(n, b"payload")).collect();
    let first = synthetic.segment(9, 0, &records);
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let before = contents(&synthetic.path());
    let run = sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path())]);
    assert!(run.fails_with(1).contains("upgrade inner-universe"));
    assert_eq!(contents(&synthetic.path()), before);
    std::fs::remove_file(first).expect("remove");

    let segment = synthetic.segment(1, 0, &records);
    synthetic.segment(1, 20, &records);
    let mut bytes = std::fs::read(&segment).expect("read");
    bytes[300] ^= 1;
    std::fs::write(&segment, bytes).expect("write");
    let run = sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path())]);
    assert!(run.fails_with(1).contains("damaged at byte"));
    std::fs::remove_file(&segment).expect("remove");
    synthetic.segment(1, 0, &records[..10]);
    let run = sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path())]);
    assert!(run.fails_with(1).contains("has a gap"));
    // What was whole before the gap is not lost, and no restore point claims more.
    assert_eq!(sidecar.run(["backup", "list"]).ok()["restore_points"].as_array().map(Vec::len), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_runs_where_the_restore_should_go() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let sidecar = Sidecar::at(&scratch.path().join("repository"));
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    workload::run(&client, "ledger", &mut Random::from_env(), 10).await;
    // The server writes its log a moment later.
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    sidecar.backup(&data);
    for force in [&["--force"][..], &[]] {
        let run = sidecar.run(["restore", "--data-dir", path(&data)].iter().chain(force));
        let message = run.fails_with(6);
        assert!(
            message.contains(&format!("process {}", server.pid())) && message.contains("stop it first"),
            "{message}"
        );
    }
    workload::run(&client, "ledger", &mut Random::from_env(), 5).await;
    server.stop();
    let before = contents(&data);
    let run = sidecar.run(["restore", "--data-dir", path(&data)]);
    assert!(run.fails_with(6).contains("--force"));
    assert_eq!(contents(&data), before);
    let report = sidecar.run(["restore", "--data-dir", path(&data), "--force"]).ok();
    let aside = PathBuf::from(report["moved_aside"].as_str().expect("moved aside"));
    let moved: Vec<_> = contents(&aside)
        .into_iter()
        .map(|(file, bytes)| (data.join(file.strip_prefix(&aside).unwrap()), bytes))
        .collect();
    assert_eq!(moved, before, "what was there is whole");
}

#[test]
fn a_target_beyond_what_is_archived_and_targets_that_are_none() {
    let backed_up = BackedUp::new(20, 10);
    let target = backed_up.path("restored");
    let restore = |to: &str| backed_up.sidecar.run(["restore", "--data-dir", path(&target), "--to", to]);
    assert!(restore("offset:20").fails_with(4).contains("ends at transaction 19"));
    restore("offset:19").ok();
    std::fs::remove_dir_all(&target).expect("remove");
    assert_eq!(restore("offset:x").code, 2);
    assert_eq!(restore("yesterday").code, 2);
    assert!(restore("01ARZ3NDEKTSV4RRFFQ69G5FAV").fails_with(4).contains("backup list"));
    assert!(!target.exists());
    let run = Sidecar::with("ftp://x/y").run(["backup", "list"]);
    assert!(run.fails_with(2).contains("use file, s3, gs or az"));
    // A file where a directory is needed: the store cannot be made.
    let blocked = Sidecar::at(&backed_up.object("repository.json").join("below"));
    let run = blocked.run(["backup", "create", "--data-dir", path(&backed_up.synthetic.path())]);
    assert!(run.fails_with(7).contains("reachable and writable"));
}

#[test]
fn objects_that_are_cut_flipped_or_missing() {
    let backed_up = BackedUp::new(200, 100);
    let target = backed_up.path("restored");
    type Damage = fn(&mut Vec<u8>);
    let damage: [(&str, Damage); 3] = [
        ("cut", |bytes| bytes.truncate(bytes.len() / 2)),
        ("flipped", |bytes| {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 16;
        }),
        ("missing", |bytes| bytes.clear()),
    ];
    for part in [".iulog", "instance/", "restore-points/", "timeline.json", "repository.json"] {
        let object = backed_up.object(part);
        let good = std::fs::read(&object).expect("read");
        for (name, damage) in damage {
            let mut bytes = good.clone();
            damage(&mut bytes);
            std::fs::remove_file(&object).expect("remove");
            if name != "missing" {
                std::fs::write(&object, &bytes).expect("write");
            }
            let before = contents(&backed_up.path("repository"));
            let run = backed_up.restore(&target);
            let gone = name == "missing" && ["restore-points/", "repository.json"].contains(&part);
            if part == "timeline.json" {
                // The log itself tells what the document did.
                assert_eq!(run.code, 0, "{name} {part}: {}", run.stderr);
                assert!(run.stderr.contains("verify --repair"), "{}", run.stderr);
                std::fs::remove_dir_all(&target).expect("remove");
            } else {
                run.fails_with(if gone { 4 } else { 1 });
                assert!(!target.exists(), "{name} {part}");
            }
            assert_eq!(contents(&backed_up.path("repository")), before, "{name} {part}");
            let left = std::fs::read_dir(backed_up.synthetic.dir.path()).expect("list").flatten();
            let scratch: Vec<_> = left.filter(|entry| path(&entry.path()).contains("restoring")).collect();
            assert!(scratch.is_empty(), "{name} {part}: {scratch:?}");
            if part != "repository.json" && !(name == "missing" && part == "restore-points/") {
                let verify = backed_up.sidecar.run(["verify"]);
                assert_eq!(verify.code, 3, "{name} {part}: {}", verify.stderr);
                assert!(verify.json["findings"][0]["fix"].as_str().is_some_and(|fix| !fix.is_empty()));
            }
            if part == "timeline.json" {
                let repaired = backed_up.sidecar.run(["verify", "--repair"]);
                assert_eq!(
                    (repaired.code, &repaired.json["findings"]),
                    (0, &serde_json::json!([])),
                    "{}",
                    repaired.stderr
                );
                assert!(!std::fs::read(&object).expect("written anew").is_empty());
                backed_up.restore(&target).ok();
                std::fs::remove_dir_all(&target).expect("remove");
                let _ = std::fs::remove_dir_all(backed_up.path("repository").join("damaged"));
            }
            std::fs::write(&object, &good).expect("put back");
        }
    }
    backed_up.restore(&target).ok();
}

#[test]
fn less_than_was_promised_never_passes_for_everything() {
    let synthetic = Synthetic::new();
    let records: Vec<_> = (0..30).map(|n| record(n * 1_000_000, b"payload")).collect();
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    for end in [10, 20, 30] {
        synthetic.segment(1, 0, &records[..end]);
        sidecar.backup(&synthetic.path());
    }
    let target = synthetic.dir.path().join("restored");
    let restore = |to: &str| sidecar.run(["restore", "--data-dir", path(&target), "--to", to]);
    let logs: Vec<_> = files(&synthetic.dir.path().join("repository"))
        .into_iter()
        .filter(|file| path(file).ends_with(".iulog"))
        .collect();
    let after_all = "time:2030-01-01T00:00:00Z";
    for lost in [&logs[1], &logs[2]] {
        let bytes = std::fs::read(lost).expect("read");
        std::fs::remove_file(lost).expect("lose");
        for to in ["latest", after_all] {
            assert!(restore(to).fails_with(1).contains("are missing"), "{to}");
            assert!(!target.exists());
        }
        // What lies before the loss is still to be had, by offset and by time.
        for to in ["offset:9", "time:1970-01-01T00:00:05Z"] {
            restore(to).ok();
            std::fs::remove_dir_all(&target).expect("remove");
        }
        std::fs::write(lost, bytes).expect("put back");
    }
    // A backup goes on although the archive has lost its middle: on a new timeline, and it says so.
    std::fs::remove_file(&logs[1]).expect("lose");
    let report = sidecar.backup(&synthetic.path());
    assert_eq!(report["databases"][0]["timeline"], 2);
    assert!(report["problems"][0].as_str().is_some_and(|problem| problem.contains("are missing")), "{report}");
    restore("latest").ok();
    // A log that is gone is not a backup without it.
    std::fs::remove_dir_all(synthetic.log()).expect("remove");
    let run = sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path())]);
    assert!(run.fails_with(1).contains("its log is gone"));
}

#[test]
fn damage_at_the_end_of_a_log_that_stays_is_reported() {
    let synthetic = Synthetic::new();
    let records: Vec<_> = (0..30).map(|n| record(n, b"payload")).collect();
    let segment = synthetic.segment(1, 0, &records);
    let mut bytes = std::fs::read(&segment).expect("read");
    let late = bytes.len() - 200;
    bytes[late] ^= 1;
    std::fs::write(&segment, bytes).expect("write");
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let run = sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path())]);
    let report = run.json;
    assert_eq!((run.code, &report["complete"]), (3, &serde_json::json!(false)), "{report}");
    assert!(report["problems"][0].as_str().is_some_and(|problem| problem.contains("no commit")), "{report}");
    let status = sidecar.run(["status", "--data-dir", path(&synthetic.path())]).ok();
    assert!(status["problems"][0].as_str().is_some_and(|problem| problem.contains("no commit")), "{status}");
}

/// A small file system of its own, unmounted at the end.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(at).expect("create");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(at).output();
        mounted.is_ok_and(|output| output.status.success()).then(|| Self(at.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).output();
    }
}

#[test]
fn a_disk_that_fills_up_in_the_middle_of_a_restore() {
    // 24 MiB of bytes that do not compress, onto 10 MiB.
    let backed_up = BackedUp::new(24 * 64, 16 << 10);
    let Some(disk) = SmallDisk::mount(&backed_up.path("disk"), "10m") else {
        assert!(std::env::var("CI").is_err(), "CI runs as root and can mount");
        println!("skipped: mounting a small file system needs root");
        return;
    };
    let target = disk.0.join("restored");
    let before = contents(&backed_up.path("repository"));
    assert!(backed_up.restore(&target).fails_with(1).contains("bytes free"));
    let run = backed_up.sidecar.run(["restore", "--data-dir", path(&target), "--force"]);
    assert!(run.fails_with(1).contains("the disk is full"));
    assert_eq!(std::fs::read_dir(&disk.0).expect("list").count(), 0, "the disk is as it was");
    assert_eq!(contents(&backed_up.path("repository")), before);
    // The same onto a disk that a backup fills: an error, and no restore point that claims what is not there.
    let small = Sidecar::at(&disk.0.join("repository"));
    let run = small.run(["backup", "create", "--data-dir", path(&backed_up.synthetic.path())]);
    assert!(run.fails_with(7).contains("the store failed"));
    assert_eq!(small.run(["backup", "list"]).ok()["restore_points"].as_array().map(Vec::len), Some(0));
}
