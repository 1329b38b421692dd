//! Everything at once: a real server under load, a real sidecar that archives it to a real S3 server, and a seed that says
//! who is killed, what fails, and when. Afterwards an oracle asks for everything that was promised.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use inner_universe::ids::{Offset, TimelineId};

use crate::client::Client;
use crate::daemon::Daemon;
use crate::s3::{self, Proxy, S3};
use crate::server::Server;
use crate::shim::{self, Shim};
use crate::sidecar::{Sidecar, path};
use crate::tools;
use crate::workload::{self, Random, TABLES};

/// What was done, and seen.
#[derive(Debug, Default)]
pub struct Outcome {
    pub seed: u64,
    /// Kinds of trouble and how often each was made.
    pub troubles: BTreeMap<&'static str, u32>,
    /// Calls of the file system that failed or were cut.
    pub file_faults: u32,
    /// Timelines that something was reported archived on.
    pub timelines: usize,
    /// Reducer calls that succeeded.
    pub steps: u64,
    pub archived: u64,
    /// The most memory that a daemon held, MiB.
    pub memory: u64,
    /// Open files of the last daemon at the end.
    pub files: usize,
}

/// What is said of a log that the server goes on with behind part of a commit's header.
const TORN: &str = "the server has written on behind";

/// Lines of a daemon's log that trouble explains.
const EXPECTED: &[&str] = &[
    TORN,
    "is tried again",
    "tried again",
    "the log no longer continues",
    "begins anew",
    "goes on after transaction",
    "was not renewed",
    "is not archived",
    "waiting for the lease",
    "a scheduled run failed",
    "the run before is not done",
    "the status was not written",
    "the last status was not written",
    "the time of the run was not kept",
    "the store did not take what was left in time",
    "a run was missed",
    "was cut off and will be made up for",
    "next runs are computed from the new time",
    // A repository that is said to be gone.
    "the lease is lost",
    "lease.json was deleted",
    "is not at",
    "there is no repository at",
    "failed to open the repository",
    "cannot be used and is passed over",
    "the position was not written",
    "no restore point was made for the changed instance",
    "waiting for the server",
    // The lease ran out while the store was out, and it was told to stop.
    "stopped before everything was archived",
    // What a power cut leaves, until the server starts again and drops it.
    "in something that is no commit",
];

const DAY: u64 = 24 * 60 * 60;

struct Scene {
    scratch: tempfile::TempDir,
    copies: tempfile::TempDir,
    sidecar: Sidecar,
    shim: Option<Shim>,
    proxy: Proxy,
    identity: Option<PathBuf>,
    server: Option<Server>,
    daemon: Option<Daemon>,
    /// The furthest that was reported archived on each timeline.
    claims: BTreeMap<TimelineId, Offset>,
    ahead: i32,
    outcome: Outcome,
}

/// Runs for `length`, then checks. `None` where an S3 server could not be installed.
///
/// # Panics
/// When a promise is broken.
pub async fn run(seed: u64, length: Duration) -> Option<Outcome> {
    println!("chaos seed {seed}");
    let mut random = Random::new(seed);
    let s3 = S3::moto().await?;
    let mut scene = Scene::new(seed, &s3).await;
    let server = scene.server.as_ref().expect("a server");
    let (port, data) = (port_of(&server.url), server.data_dir.clone());
    let client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    // The server syncs its control database every half second: killed before, it would not know what was published.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (stop, steps) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let writers: Vec<_> = (0..2)
        .map(|_| {
            let (client, stop, steps) = (client.clone(), Arc::clone(&stop), Arc::clone(&steps));
            let mut random = Random::new(random.draw());
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    steps.fetch_add(write_one(&client, &mut random).await, Ordering::Relaxed);
                }
            })
        })
        .collect();
    scene.start_daemon();
    let end = Instant::now() + length;
    while Instant::now() < end {
        scene.trouble(&mut random, port).await;
        scene.note_claims();
    }
    scene.calm(port).await;
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.expect("a writer");
    }
    scene.outcome.steps = steps.load(Ordering::Relaxed);
    scene.check(&client, &data).await;
    Some(scene.outcome)
}

/// One call, which may find no server. Returns whether it succeeded.
async fn write_one(client: &Client, random: &mut Random) -> u64 {
    let (reducer, arguments) = workload::next_call(random);
    match client.call("ledger", reducer, arguments).await {
        Ok(()) => 1,
        Err(error) if error.starts_with("error sending request") => {
            tokio::time::sleep(Duration::from_millis(50)).await;
            0
        }
        Err(_) => 0,
    }
}

fn port_of(url: &str) -> u16 {
    url.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port")
}

impl Scene {
    async fn new(seed: u64, s3: &S3) -> Self {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let proxy = Proxy::before(s3).await;
        let mut settings = s3::settings(&proxy.endpoint, s3::ACCESS_KEY, s3::SECRET_KEY);
        let more = [
            ("ARCHIVE__FLUSH_INTERVAL", "100ms"),
            ("ARCHIVE__COMPACTION_INTERVAL", "1s"),
            ("ARCHIVE__COMPACTION_GRACE", "2s"),
            ("REPOSITORY__LEASE_DURATION", "4s"),
            ("REPOSITORY__REQUEST_TIMEOUT", "3s"),
            ("SCHEDULE__RESTORE_POINT", "*/5 * * * * *"),
            ("SCHEDULE__PRUNE", "*/7 * * * * *"),
            ("RETENTION__KEEP_LAST", "3"),
            ("RETENTION__WINDOW", "10s"),
            ("RETENTION__GRACE", "60s"),
        ];
        settings.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
        settings.push(("SPACETIMEDB_CONFIG__DB_PATH".into(), path(&data).into()));
        settings.push(("SPACETIMEDB_CONFIG__SERVER_BIN".into(), path(&tools::server()).into()));
        // Every other seed seals what it archives.
        let mut identity = None;
        if seed % 2 == 1 {
            let file = scratch.path().join("identity.txt");
            let key = Sidecar::at(scratch.path()).run(["key", "generate", "--output", path(&file)]).ok();
            let recipient = key["recipient"].as_str().expect("a recipient").to_owned();
            settings.push(("REPOSITORY__RECIPIENTS".into(), recipient));
            identity = Some(file);
        }
        let shim = Shim::new(scratch.path(), seed);
        let sidecar = Sidecar::with(&format!("s3://{}/chaos", s3::BUCKET)).configured(settings);
        let server = Server::start(&data, &keys).await;
        let copies = tempfile::Builder::new().prefix("inner-universe-copies-").tempdir().expect("a directory");
        Self {
            scratch,
            copies,
            sidecar,
            shim,
            proxy,
            identity,
            server: Some(server),
            daemon: None,
            claims: BTreeMap::new(),
            ahead: 0,
            outcome: Outcome { seed, ..Outcome::default() },
        }
    }

    fn data(&self) -> PathBuf {
        self.scratch.path().join("data")
    }

    /// A daemon with faults in its files and clock. Commands run without.
    fn start_daemon(&mut self) {
        // What belongs to the scene, and not the copies of the control database: the library that opens them panics where
        // a sync fails. That is caught, and the copy made anew, but it is no fault of ours to look for.
        let root = std::env::temp_dir().join(".tmp");
        let mut environment = self.shim.as_ref().map(|shim| shim.environment(&root)).unwrap_or_default();
        environment.push(("TMPDIR".into(), path(self.copies.path()).into()));
        let sidecar = self.sidecar.clone().with_environment(environment);
        self.daemon = Some(Daemon::start(&sidecar, &self.data(), &[], &[]));
    }

    fn note_claims(&mut self) {
        let Some(daemon) = &self.daemon else { return };
        self.outcome.memory = self.outcome.memory.max(memory(daemon.pid()));
        for database in daemon.status().into_iter().flat_map(|status| status.databases) {
            if let (Some(timeline), Some(offset)) = (database.timeline, database.archived_offset) {
                let claim = self.claims.entry(timeline).or_insert(offset);
                *claim = (*claim).max(offset);
            }
        }
    }

    async fn trouble(&mut self, random: &mut Random, port: u16) {
        let pause = |random: &mut Random, most: u64| Duration::from_millis(100 + random.below(most));
        let wait = pause(random, 2000);
        let kind = match random.below(19) {
            0 => {
                if let Some(daemon) = self.daemon.take() {
                    daemon.kill();
                }
                self.start_daemon();
                "sidecar killed"
            }
            1 => {
                let daemon = self.daemon.take().expect("a daemon");
                daemon.stop();
                self.start_daemon();
                "sidecar stopped"
            }
            2 => {
                self.server.take().expect("a server").kill();
                tokio::time::sleep(pause(random, 500)).await;
                self.start_server(port).await;
                "server killed"
            }
            3 => {
                self.server.take().expect("a server").kill();
                // What the server had not synced when the power went.
                self.cut_log(1 << random.below(19));
                self.start_server(port).await;
                "power cut"
            }
            4..=6 => {
                let faults = [s3::Fault::Down, s3::Fault::Hang, s3::Fault::Slow, s3::Fault::Flaky, s3::Fault::Full];
                self.in_store(&faults, "store out", random, wait).await
            }
            7 => self.in_files(shim::Fault::Full, 300, wait).await,
            8 => self.in_files(shim::Fault::Sync, 500, wait).await,
            9 => self.in_files(shim::Fault::ShortRead, 400, wait).await,
            10 => {
                self.ahead = random.below(7200) as i32 - 3600;
                if let Some(shim) = &self.shim {
                    shim.set(shim::Fault::Clock, self.ahead);
                }
                "clock jumped"
            }
            11 => self.in_store(&[s3::Fault::Late, s3::Fault::Twice], "late writes", random, wait).await,
            12 => self.in_store(&[s3::Fault::Truncated], "truncated listings", random, wait).await,
            13 => self.in_store(&[s3::Fault::Stale], "listings of before", random, wait).await,
            14 => self.in_store(&[s3::Fault::Gone], "repository gone", random, wait).await,
            15 => {
                // A machine that was started again.
                if let Some(daemon) = self.daemon.take() {
                    daemon.kill();
                }
                self.server.take().expect("a server").kill();
                self.start_server(port).await;
                self.start_daemon();
                "machine restarted"
            }
            16 => {
                self.ahead = random.below(6 * DAY) as i32 - 3 * DAY as i32;
                if let Some(shim) = &self.shim {
                    shim.set(shim::Fault::Clock, self.ahead);
                }
                "clock jumped by days"
            }
            17 => {
                self.by_another_user();
                "commands of another user"
            }
            _ => {
                // It may fail, in the middle of other trouble; it may not panic, and not lie.
                let run = self.sidecar.run(["backup", "create", "--data-dir", path(&self.data())]);
                assert!(!run.stderr.contains("panicked"), "{}", run.stderr);
                "backup by hand"
            }
        };
        *self.outcome.troubles.entry(kind).or_default() += 1;
        self.note_claims();
        tokio::time::sleep(pause(random, 1500)).await;
        if let Some(daemon) = &mut self.daemon
            && daemon.has_ended()
        {
            // Whoever runs it starts it again, as systemd and compose do.
            *self.outcome.troubles.entry("sidecar ended").or_default() += 1;
            self.start_daemon();
        }
    }

    async fn in_store(
        &self,
        faults: &[s3::Fault],
        name: &'static str,
        random: &mut Random,
        wait: Duration,
    ) -> &'static str {
        self.proxy.set(faults[random.below(faults.len() as u64) as usize]);
        tokio::time::sleep(wait).await;
        self.proxy.set(s3::Fault::None);
        name
    }

    /// Whoever may not read the data directory can change nothing, and is told so.
    fn by_another_user(&self) {
        for words in [["backup", "create"], ["status", "--ready"]] {
            let own = self.sidecar.command();
            let mut command = std::process::Command::new("setpriv");
            command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(own.get_program());
            command.envs(own.get_envs().filter_map(|(name, value)| Some((name, value?))));
            command.args(own.get_args()).args(words).args(["--data-dir", path(&self.data())]);
            let output = command.output().expect("setpriv");
            let stderr = String::from_utf8_lossy(&output.stderr);
            // Not where that user cannot even start the program.
            let refused = output.status.code().is_some_and(|code| (1..10).contains(&code) || code == 126);
            assert!(refused && !stderr.contains("panicked"), "{words:?}: {:?} {stderr}", output.status);
        }
    }

    async fn in_files(&self, fault: shim::Fault, per_mille: i32, wait: Duration) -> &'static str {
        if let Some(shim) = &self.shim {
            shim.set(fault, per_mille);
            tokio::time::sleep(wait).await;
            shim.calm();
        }
        match fault {
            shim::Fault::Full => "disk full",
            shim::Fault::Sync => "syncs failed",
            _ => "short reads",
        }
    }

    async fn start_server(&mut self, port: u16) {
        let (data, keys) = (self.data(), self.scratch.path().join("keys"));
        self.server = Some(Server::start_at(&data, &keys, port).await);
    }

    fn cut_log(&self, bytes: u64) {
        let data = inner_universe::datadir::DataDir::open(&self.data()).expect("a data directory");
        for replica in data.replicas().expect("replicas") {
            let segments = inner_universe::datadir::log::segments(&replica.log_path()).expect("segments");
            let Some(last) = segments.last() else { continue };
            let file = std::fs::File::options().write(true).open(&last.path).expect("a segment");
            let len = file.metadata().expect("its length").len();
            // The publish stays, with its program: without it there would be no database.
            file.set_len(len.saturating_sub(bytes).max(len.min(4_000_000))).expect("cut");
        }
    }

    async fn calm(&mut self, port: u16) {
        self.proxy.set(s3::Fault::None);
        if let Some(shim) = &self.shim {
            shim.calm();
            self.outcome.file_faults = shim.faults();
        }
        if self.server.is_none() {
            self.start_server(port).await;
        }
        if self.daemon.as_mut().is_none_or(Daemon::has_ended) {
            self.start_daemon();
        }
    }

    async fn check(&mut self, client: &Client, data: &Path) {
        let server = self.server.take().expect("a server");
        server.written().await;
        let truth = client.rows("ledger", &TABLES).await;
        workload::assert_consistent(&truth);
        let replica =
            inner_universe::datadir::DataDir::open(data).expect("open").replicas().expect("replicas").remove(0);
        let end = inner_universe::datadir::log::end(&replica.log_path()).expect("the log's end");
        let last = end.0 - 1;
        let mut daemon = self.daemon.take().expect("a daemon");
        daemon.wait_archived(last);
        self.daemon = Some(daemon);
        self.note_claims();
        let daemon = self.daemon.take().expect("a daemon");
        self.outcome.files = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).map_or(0, Iterator::count);
        assert_eq!(daemon.stop(), 0);
        self.outcome.archived = last;
        self.outcome.timelines = self.claims.len();
        let seed = self.outcome.seed;

        let sidecar = self.reader();
        let report = sidecar.run(["backup", "create", "--data-dir", path(data)]).ok();
        // A power cut may leave part of a header, and the server then writes on behind it: that is told, and nothing is lost.
        let was_cut = self.outcome.troubles.contains_key("power cut");
        let problems = report["problems"].as_array().expect("problems").iter();
        let others: Vec<_> = problems.filter(|problem| !was_cut || !problem.to_string().contains(TORN)).collect();
        assert!(others.is_empty(), "seed {seed}: {report}");
        server.kill();
        let verified = sidecar.run(["verify"]);
        assert_eq!(verified.json["findings"].as_array().map(Vec::len), Some(0), "seed {seed}: {}", verified.json);
        assert_eq!(verified.json["lost"].as_array().map(Vec::len), Some(0), "seed {seed}: {}", verified.json);
        // Everything that was ever reported archived: each timeline at its furthest.
        for (timeline, offset) in &self.claims {
            let target = self.scratch.path().join(format!("timeline-{timeline}"));
            let (timeline, to) = (timeline.to_string(), format!("offset:{offset}"));
            let words = ["restore", "--data-dir", path(&target), "--timeline", &timeline, "--to", &to];
            let report = sidecar.run(words).ok();
            assert_eq!(report["databases"][0]["offset"], offset.0, "seed {seed}, timeline {timeline}");
            std::fs::remove_dir_all(&target).expect("remove");
        }
        let restored = self.scratch.path().join("restored");
        sidecar.restore(&restored, "latest");
        let again = Server::start(&restored, &self.scratch.path().join("keys")).await;
        assert_eq!(client.at(&again.url).rows("ledger", &TABLES).await, truth, "seed {seed}");
        again.kill();
        let drilled = sidecar.run(["drill"]);
        assert_eq!(drilled.code, 0, "seed {seed}: {} {}", drilled.json, drilled.stderr);
        self.check_log();
        assert!(self.outcome.files < 128, "seed {seed}: {} files are open", self.outcome.files);
        assert!(self.outcome.memory < 128, "seed {seed}: {} MiB", self.outcome.memory);
    }

    /// Commands of this machine, which may hold the key.
    fn reader(&self) -> Sidecar {
        let mut sidecar = self.sidecar.clone();
        if let Some(identity) = &self.identity {
            sidecar = sidecar.and("REPOSITORY__IDENTITY_FILES", path(identity));
        }
        sidecar
    }

    /// No panic, and nothing that trouble does not explain.
    fn check_log(&self) {
        let log = std::fs::read_to_string(self.sidecar.state_dir().join("daemon.log")).expect("the log");
        assert!(!log.contains("panicked"), "seed {}: {log}", self.outcome.seed);
        let odd = |line: &&str| {
            (line.contains(" WARN ") || line.contains(" ERROR "))
                && !EXPECTED.iter().any(|expected| line.contains(expected))
        };
        let odd: Vec<_> = log.lines().filter(odd).collect();
        assert!(odd.is_empty(), "seed {}: {}", self.outcome.seed, odd.join("\n"));
    }
}

/// The most memory that a process held, MiB.
fn memory(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}
