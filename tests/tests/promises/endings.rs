//! How verbs end: by a signal, with a reader that went away, on a full disk, in a directory whose name is not text.

use std::ffi::{OsStr, OsString};
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use harness::sidecar::{Sidecar, path};
use serde_json::Value;

use crate::synthetic::{Synthetic, record};

fn records(count: i64) -> Vec<Vec<u8>> {
    (0..count).map(|n| record(n * 1000, b"row")).collect()
}

/// A data directory, and a place where the sidecar makes its temporary files.
struct Scene {
    synthetic: Synthetic,
    sidecar: Sidecar,
    temporary: PathBuf,
}

impl Scene {
    fn new() -> Self {
        let synthetic = Synthetic::new();
        synthetic.segment(1, 0, &records(50));
        let temporary = synthetic.dir.path().join("tmp");
        std::fs::create_dir(&temporary).expect("create");
        let environment = vec![("TMPDIR".to_owned(), path(&temporary).to_owned())];
        let sidecar = Sidecar::at(&synthetic.dir.path().join("repository")).with_environment(environment);
        Self { synthetic, sidecar, temporary }
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.synthetic.dir.path().join(name)
    }

    /// Makes a backup that holds its lease without end: it reads a file that nobody writes.
    fn endless(&self) -> [String; 4] {
        let made = std::process::Command::new("mkfifo").arg(self.synthetic.path().join("config.toml")).status();
        assert!(made.expect("mkfifo").success());
        ["backup", "create", "--data-dir", path(&self.synthetic.path())].map(ToOwned::to_owned)
    }

    /// What is read next has an end.
    fn calm(&self) {
        std::fs::remove_file(self.synthetic.path().join("config.toml")).expect("remove it");
    }

    fn spawn<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> Child {
        let mut command = self.sidecar.command();
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("start it")
    }

    fn lease(&self) -> Value {
        let bytes = std::fs::read(self.dir("repository/lease.json")).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    fn left(&self) -> Vec<OsString> {
        std::fs::read_dir(&self.temporary).expect("list").flatten().map(|entry| entry.file_name()).collect()
    }
}

fn signal(child: &Child, name: &str) {
    let sent = std::process::Command::new("kill").arg(format!("-{name}")).arg(child.id().to_string()).status();
    assert!(sent.is_ok_and(|status| status.success()), "kill -{name}");
}

fn wait_for(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "waiting for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Exit code and stderr; a child that does not end in time fails the test.
fn ended(mut child: Child) -> (i32, String) {
    let deadline = Instant::now() + Duration::from_secs(30);
    let status = loop {
        if let Some(status) = child.try_wait().expect("its state") {
            break status;
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut stderr = String::new();
    if let Some(mut pipe) = child.stderr.take() {
        pipe.read_to_string(&mut stderr).expect("its stderr");
    }
    (status.code().unwrap_or_else(|| -status.signal().unwrap_or_default()), stderr)
}

#[test]
fn every_signal_ends_a_backup_and_releases_its_lease() {
    for (name, code) in [("TERM", 143), ("INT", 130), ("HUP", 129), ("QUIT", 131)] {
        let scene = Scene::new();
        let child = scene.spawn(scene.endless());
        wait_for("the lease", || scene.lease()["token"] == 1);
        std::thread::sleep(Duration::from_millis(300));
        signal(&child, name);
        let (ended_with, stderr) = ended(child);
        assert_eq!(ended_with, code, "{name}: {stderr}");
        assert!(stderr.contains(&format!("ended by SIG{name}")), "{stderr}");
        assert_eq!(scene.lease()["expires_at"], "1970-01-01T00:00:00Z", "{name}");
        // The next one does not wait, needs no force, and clears what a thread that could not be ended has left.
        scene.calm();
        scene.sidecar.backup(&scene.synthetic.path());
        assert_eq!(scene.left(), Vec::<OsString>::new(), "{name}");
    }
}

#[test]
fn the_lease_of_a_killed_backup_is_free_at_once() {
    let scene = Scene::new();
    let data = scene.synthetic.path();
    let sidecar = scene.sidecar.clone().and("REPOSITORY__LEASE_DURATION", "1h");
    let mut command = sidecar.command();
    command.args(scene.endless()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().expect("start it");
    wait_for("the lease", || scene.lease()["token"] == 1);
    let locked = sidecar.run(["backup", "create", "--data-dir", path(&data)]);
    assert!(locked.fails_with(5).contains("is writing to this repository"));
    child.kill().expect("kill it");
    child.wait().expect("its end");
    scene.calm();
    sidecar.backup(&data);
    assert_eq!(scene.lease()["token"], 2);
}

#[test]
fn a_hang_up_that_was_ignored_stays_ignored() {
    let scene = Scene::new();
    let endless = scene.endless();
    let inner = scene.sidecar.command();
    let mut command = std::process::Command::new("nohup");
    command.envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.arg(inner.get_program()).args(inner.get_args());
    command.args(endless);
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("start it");
    wait_for("the lease", || scene.lease()["token"] == 1);
    signal(&child, "HUP");
    std::thread::sleep(Duration::from_millis(500));
    assert!(child.try_wait().expect("its state").is_none());
    signal(&child, "TERM");
    assert_eq!(ended(child).0, 143);
}

/// A server that starts and is never ready.
fn idle_server(dir: &Path) -> PathBuf {
    let server = dir.join("idle-server");
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *version*) echo 'spacetimedb tool version 1.2.0;'; exit 0;; esac\n\
         echo $$ >> {}\nexec sleep 600\n",
        dir.join("started").display()
    );
    std::fs::write(&server, script).expect("write");
    std::fs::set_permissions(&server, std::fs::Permissions::from_mode(0o755)).expect("chmod");
    server
}

fn is_alive(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}

#[cfg(target_os = "linux")]
#[test]
fn a_drill_that_ends_early_leaves_no_server_and_no_copy_of_the_data() {
    let scene = Scene::new();
    scene.sidecar.backup(&scene.synthetic.path());
    let server = idle_server(scene.synthetic.dir.path());
    let started = || std::fs::read_to_string(scene.dir("started")).unwrap_or_default();
    let drill = |round: usize| {
        let child = scene.spawn(["drill", "--server-bin", path(&server)]);
        wait_for("its server", || started().lines().count() == round);
        (child, started().lines().last().expect("a process").to_owned())
    };
    let (child, pid) = drill(1);
    signal(&child, "TERM");
    assert_eq!(ended(child).0, 143);
    assert!(!is_alive(&pid), "told to stop, it stops its server");
    assert_eq!(scene.left(), Vec::<OsString>::new());

    let (mut child, pid) = drill(2);
    child.kill().expect("kill it");
    child.wait().expect("its end");
    wait_for("its server to end with it", || !is_alive(&pid));
    assert_eq!(scene.left().len(), 1, "nobody was left to remove it");
    let (child, _) = drill(3);
    assert_eq!(scene.left().len(), 1, "the next run has removed what the killed one left");
    signal(&child, "INT");
    assert_eq!(ended(child).0, 130);
    assert_eq!(scene.left(), Vec::<OsString>::new());
}

#[test]
fn a_reader_that_goes_away_ends_the_watch() {
    let scene = Scene::new();
    scene.sidecar.backup(&scene.synthetic.path());
    let mut child = scene.spawn(["status", "--watch", "--data-dir", path(&scene.synthetic.path())]);
    let mut first = [0; 1];
    let mut stdout = child.stdout.take().expect("its stdout");
    stdout.read_exact(&mut first).expect("a byte");
    drop(stdout);
    let (code, stderr) = ended(child);
    assert_eq!((code, stderr.as_str()), (0, ""));
}

#[test]
fn a_result_that_cannot_be_printed_fails_in_one_line() {
    let scene = Scene::new();
    scene.sidecar.backup(&scene.synthetic.path());
    let full = || std::fs::File::options().write(true).open("/dev/full").expect("/dev/full");
    let output = scene.sidecar.command().args(["backup", "list"]).stdout(full()).output().expect("run");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.starts_with("error: the result was not printed"), "{stderr}");
}

#[test]
fn work_is_done_though_nothing_can_be_written_to_stderr() {
    let scene = Scene::new();
    let data = scene.synthetic.path();
    let full = || std::fs::File::options().write(true).open("/dev/full").expect("/dev/full");
    let run = |arguments: &[&str], stderr: Stdio| {
        let output = scene.sidecar.command().arg("-vv").args(arguments).stderr(stderr).output().expect("run");
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        serde_json::from_slice::<Value>(&output.stdout).expect("one document")
    };
    run(&["backup", "create", "--data-dir", path(&data)], full().into());
    run(&["restore", "--data-dir", path(&scene.dir("restored"))], full().into());
    // A pipe that nobody reads any more.
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    run(&["restore", "--data-dir", path(&scene.dir("again"))], writer.into());
    assert!(scene.dir("restored").join("replicas").exists() && scene.dir("again").join("replicas").exists());
}

#[test]
fn names_that_are_not_text_still_make_one_document() {
    let scene = Scene::new();
    scene.sidecar.backup(&scene.synthetic.path());
    let odd = scene.synthetic.dir.path().join(OsStr::from_bytes(b"odd-\xff-name"));
    let arguments = |words: &[&str]| {
        let words = words.iter().map(OsString::from);
        words.chain([OsString::from("--data-dir"), odd.clone().into_os_string()]).collect::<Vec<_>>()
    };
    let shown = scene.sidecar.run(arguments(&["restore", "--dry-run"])).ok();
    assert!(shown["data_dir"].as_str().is_some_and(|dir| dir.contains("odd-\u{fffd}-name")), "{shown}");
    let restored = scene.sidecar.run(arguments(&["restore"])).ok();
    assert!(restored["data_dir"].as_str().is_some_and(|dir| dir.contains("odd-")), "{restored}");
    assert!(odd.join("replicas").exists(), "it is restored under its real name");
    let status = scene.sidecar.run(arguments(&["server", "status"]));
    assert_eq!((status.code, &status.json["running"]), (3, &Value::Bool(false)), "{}", status.stderr);
    let stopped = scene.sidecar.run(arguments(&["server", "stop"])).ok();
    assert_eq!(stopped["stopped"], false);
    let backed_up = scene.sidecar.run(arguments(&["backup", "create"])).ok();
    assert!(backed_up["restore_point"].is_string(), "{backed_up}");
    let failed = scene.sidecar.run(arguments(&["restore"]));
    assert_eq!((failed.code, &failed.json["exit_code"]), (6, &Value::from(6)), "{}", failed.stderr);
}
