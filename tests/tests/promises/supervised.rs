//! A sidecar that watches a server: whatever happens to the sidecar, the server runs until somebody asks it to stop.

use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harness::daemon::Daemon;
use harness::sidecar::{Sidecar, path};
use inner_universe::daemon::conditions::ConditionKind;
use inner_universe::daemon::state::DaemonStatus;
use inner_universe::datadir::commit::encode;
use inner_universe::ids::Offset;

use crate::synthetic::{Synthetic, record};

const QUICK: [(&str, &str); 2] = [("ARCHIVE__FLUSH_INTERVAL", "20ms"), ("REPOSITORY__LEASE_DURATION", "3s")];

fn records(range: std::ops::Range<u64>) -> Vec<Vec<u8>> {
    range.map(|n| record(n as i64 * 1000, b"under a server")).collect()
}

fn commits(range: std::ops::Range<u64>) -> Vec<u8> {
    range.clone().zip(records(range)).flat_map(|(n, record)| encode(1, Offset(n), 0, 1, &record)).collect()
}

fn append(segment: &Path, range: std::ops::Range<u64>) {
    let mut file = std::fs::File::options().append(true).open(segment).expect("the segment");
    file.write_all(&commits(range)).expect("append");
}

/// A stand-in for a server: notes its starts, and its end when it is asked to end.
struct Stand {
    notes: PathBuf,
    script: String,
}

impl Stand {
    fn new(dir: &Path, at_end: &str) -> Self {
        let notes = dir.join("notes");
        let script = format!(
            "trap '{at_end} echo stopped >> {0}; exit 0' TERM; echo started $$ >> {0}; while :; do sleep 0.05; done",
            notes.display()
        );
        Self { notes, script }
    }

    fn command(&self) -> [&str; 3] {
        ["sh", "-c", &self.script]
    }

    fn notes(&self) -> Vec<String> {
        let notes = std::fs::read_to_string(&self.notes).unwrap_or_default();
        notes.lines().map(ToOwned::to_owned).collect()
    }

    /// The process ids of its starts.
    fn starts(&self) -> Vec<u32> {
        let starts = self.notes().into_iter().filter_map(|line| line.strip_prefix("started ")?.parse().ok());
        starts.collect()
    }
}

/// Alive, and not only waiting for its parent to notice.
fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}

fn wait_for(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "waiting for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn kill(pid: u32) {
    let killed = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status();
    assert!(killed.is_ok_and(|status| status.success()));
}

fn archived(offset: u64) -> impl Fn(&DaemonStatus) -> bool {
    move |status| status.databases.first().is_some_and(|database| database.archived_offset >= Some(Offset(offset)))
}

/// A store on a loopback port that refuses every request.
struct Refusing {
    address: String,
    stop: Arc<AtomicBool>,
}

impl Refusing {
    fn new() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address").to_string();
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if stopping.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(mut stream) = stream else { continue };
                let _ = stream.read(&mut [0; 8192]);
                let body = "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>no</Message></Error>";
                let head = "HTTP/1.1 403 Forbidden\r\ncontent-type: application/xml\r\nconnection: close\r\n";
                let _ = write!(stream, "{head}content-length: {}\r\n\r\n{body}", body.len());
            }
        });
        Self { address, stop }
    }
}

impl Drop for Refusing {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = std::net::TcpStream::connect(&self.address);
    }
}

#[test]
fn a_store_that_refuses_never_stops_the_server() {
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(0..10));
    let store = Refusing::new();
    let settings = harness::s3::settings(&format!("http://{}", store.address), "wrong", "wrong");
    let sidecar = Sidecar::with("s3://backups/refused").configured(settings);
    let stand = Stand::new(synthetic.dir.path(), "");
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &QUICK, &stand.command());
    let refused = |status: &DaemonStatus| status.last_error.as_ref().is_some_and(|error| error.contains("refused"));
    daemon.wait("the refusal", refused);
    // Several tries later nothing has changed.
    wait_for("more tries", || daemon.log().matches("archiving has ended and is tried again").count() >= 3);
    let status = daemon.status().expect("a status");
    assert_eq!(status.lease_token, None);
    assert!(status.server.is_some_and(|server| server.pid == stand.starts().first().copied()));
    assert_eq!(stand.notes().len(), 1, "{:?}", stand.notes());
    let ready = sidecar.run(["status", "--ready", "--data-dir", path(&synthetic.path())]);
    assert_eq!(ready.code, 3, "{}", ready.stderr);
    assert!(ready.json["reasons"].to_string().contains("refused"), "{}", ready.json);
    // What was left is not archived, and that is not a good end.
    assert_eq!(daemon.stop(), 8);
    assert_eq!(stand.notes().last().map(String::as_str), Some("stopped"));
    // Without a server there is nothing to keep running.
    let run = sidecar.run(["run", "--data-dir", path(&synthetic.path())]);
    assert_eq!(run.code, 7, "{}", run.stderr);
}

#[test]
fn a_lease_that_is_lost_stops_archiving_and_not_the_server() {
    let synthetic = Synthetic::new();
    let segment = synthetic.segment(1, 0, &records(0..10));
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let stand = Stand::new(synthetic.dir.path(), "");
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &QUICK, &stand.command());
    daemon.wait("the archive", archived(9));
    Sidecar::with(&sidecar.repository).run(["backup", "create", "--force", "--data-dir", path(&synthetic.path())]).ok();
    daemon.wait("the lease again", |status| status.lease_token == Some(3));
    append(&segment, 10..20);
    let status = daemon.wait("the archive again", archived(19));
    assert_eq!(status.databases.len(), 1, "each database is followed once: {:?}", status.databases);
    assert!(daemon.log().contains("the lease is lost"), "{}", daemon.log());
    assert_eq!(stand.notes().len(), 1, "{:?}", stand.notes());
    sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path())]).ok();
    assert_eq!(daemon.stop(), 0);
    assert_eq!(sidecar.run(["verify"]).ok()["findings"].as_array().map(Vec::len), Some(0));
}

#[test]
fn a_lease_of_another_is_waited_for_beside_the_server() {
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(0..10));
    let holder = Sidecar::at(&synthetic.dir.path().join("repository"));
    let mut holding = Daemon::start(&holder, &synthetic.path(), &QUICK, &[]);
    holding.wait("the archive", archived(9));
    let sidecar = Sidecar::with(&holder.repository).and("DEPLOY__TIMEOUT", "1s");
    let stand = Stand::new(synthetic.dir.path(), "");
    let mut daemon = Daemon::start_with(&sidecar, &synthetic.path(), &QUICK, &["--no-wait"], &stand.command());
    let locked = |status: &DaemonStatus| status.last_error.as_ref().is_some_and(|error| error.contains("is writing"));
    daemon.wait("the lease to be found taken", locked);
    // Although nothing is archived, whoever wants to stop and start the server can.
    let server = |verb| sidecar.run(["server", verb, "--data-dir", path(&synthetic.path())]);
    server("stop").ok();
    assert_eq!(stand.notes().last().map(String::as_str), Some("stopped"));
    let started = server("start");
    assert_eq!(started.code, 1, "the stand-in answers no requests: {}", started.stderr);
    wait_for("the second start", || stand.starts().len() == 2);
    assert_eq!(holding.stop(), 0);
    daemon.wait("the lease", |status| status.lease_token.is_some() && status.last_error.is_none());
    assert_eq!(stand.notes().len(), 3, "{:?}", stand.notes());
    assert_eq!(daemon.stop(), 0);
}

fn is_failing(status: &DaemonStatus) -> bool {
    status.conditions.iter().any(|condition| condition.kind == ConditionKind::PartFailing)
}

#[test]
fn a_control_socket_that_cannot_be_made_is_tried_again() {
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(0..10));
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let mut config = inner_universe::config::Config::default();
    config.archive.state_dir = Some(sidecar.state_dir());
    let socket = inner_universe::daemon::state::StateDir::locate(&config, &synthetic.path()).join("control.sock");
    std::fs::create_dir_all(&socket).expect("something else under its name");
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &QUICK, &[]);
    daemon.wait("the archive", archived(9));
    daemon.wait("the reason", is_failing);
    let ready = sidecar.run(["status", "--ready", "--data-dir", path(&synthetic.path())]);
    assert_eq!(ready.code, 3, "{}", ready.json);
    std::fs::remove_dir(&socket).expect("remove it");
    daemon.wait("the socket", |status| !is_failing(status));
    sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path())]).ok();
    assert_eq!(daemon.stop(), 0);
}

#[cfg(target_os = "linux")]
#[test]
fn a_daemon_without_file_descriptors_answers_again_once_it_has_some() {
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(0..10));
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &QUICK, &[]);
    daemon.wait("the archive", archived(9));
    let limit = |soft: &str| {
        let limit = format!("--nofile={soft}:");
        let set = std::process::Command::new("prlimit").args(["--pid", &daemon.pid().to_string(), &limit]).status();
        assert!(set.expect("prlimit").success());
    };
    let mut config = inner_universe::config::Config::default();
    config.archive.state_dir = Some(sidecar.state_dir());
    let socket = inner_universe::daemon::state::StateDir::locate(&config, &synthetic.path()).join("control.sock");
    wait_for("the socket", || socket.exists());
    limit("1");
    let waiting = std::os::unix::net::UnixStream::connect(&socket).expect("connect");
    wait_for("the failure to accept", || daemon.log().contains("a command could not connect"));
    limit("1024");
    drop(waiting);
    sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path())]).ok();
    assert_eq!(daemon.stop(), 0);
}

#[test]
fn a_server_that_ends_slowly_is_archived_to_its_last_write() {
    let synthetic = Synthetic::new();
    let segment = synthetic.segment(1, 0, &records(0..10));
    let tail = synthetic.dir.path().join("tail");
    std::fs::write(&tail, commits(10..15)).expect("write");
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    // Twice as long as a lease holds that nobody renews.
    let stand = Stand::new(synthetic.dir.path(), &format!("sleep 6; cat {} >> {};", tail.display(), segment.display()));
    let settings = [QUICK[0], QUICK[1], ("SPACETIMEDB_CONFIG__STOP_TIMEOUT", "30s")];
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &settings, &stand.command());
    daemon.wait("the archive", archived(9));
    daemon.signal("TERM");
    assert_eq!(daemon.exit_code(), 0, "{}", daemon.log());
    assert_eq!(stand.notes().last().map(String::as_str), Some("stopped"));
    let status = daemon.status().expect("the last status");
    assert!(archived(14)(&status), "{status:?}");
}

#[cfg(target_os = "linux")]
#[test]
fn the_server_of_a_killed_sidecar_is_watched_by_the_next() {
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(0..10));
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let stand = Stand::new(synthetic.dir.path(), "");
    let start = || Daemon::start(&sidecar, &synthetic.path(), &QUICK, &stand.command());
    let mut daemon = start();
    daemon.wait("the archive", archived(9));
    // A second one on the same directory is refused while the first is alive.
    let data = synthetic.path();
    let second = ["run", "--data-dir", path(&data), "--", "sh", "-c", &stand.script];
    assert!(sidecar.run(second).fails_with(6).contains("another sidecar"));
    daemon.kill();
    let first = stand.starts()[0];
    assert!(is_alive(first), "the server outlives its sidecar");

    // The next one watches it, and starts it again once it has ended.
    let mut daemon = start();
    let watched = |pid: u32| move |status: &DaemonStatus| status.server.as_ref().is_some_and(|it| it.pid == Some(pid));
    daemon.wait("the server that was left", |status| watched(first)(status) && archived(9)(status));
    assert_eq!(stand.starts(), [first]);
    kill(first);
    wait_for("a start of its own", || stand.starts().len() == 2);
    let own = stand.starts()[1];
    daemon.wait("its own server", watched(own));
    daemon.kill();

    // Told to stop, it stops the server that was left to it too.
    let mut daemon = start();
    daemon.wait("the server that was left again", watched(own));
    assert_eq!(daemon.stop(), 0);
    assert!(!is_alive(own));
    assert_eq!(stand.notes().last().map(String::as_str), Some("stopped"));
}

#[test]
fn a_server_of_others_is_followed_and_never_stopped() {
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(0..10));
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let stand = Stand::new(synthetic.dir.path(), "");
    let lock = std::fs::File::create(synthetic.path().join("spacetime.pid")).expect("the lock file");
    lock.lock().expect("lock it");
    let start = || Daemon::start(&sidecar, &synthetic.path(), &QUICK, &stand.command());
    let mut daemon = start();
    let status = daemon.wait("the archive", archived(9));
    assert!(status.server.is_some_and(|server| server.elsewhere && server.pid.is_none()));
    sidecar.run(["status", "--ready", "--data-dir", path(&synthetic.path())]).ok();
    assert_eq!(daemon.stop(), 0);
    assert_eq!(stand.notes(), Vec::<String>::new(), "it was neither started nor stopped");
    let mut daemon = start();
    daemon.wait("the archive", archived(9));
    drop(lock);
    wait_for("a start of its own", || stand.starts().len() == 1);
    daemon.wait("its own server", |status| status.server.as_ref().is_some_and(|server| !server.elsewhere));
    assert_eq!(daemon.stop(), 0);
    assert_eq!(stand.notes().last().map(String::as_str), Some("stopped"));
}
