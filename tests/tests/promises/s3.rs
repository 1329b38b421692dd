//! S3: every server gives the same repository; what a server does wrong is survived or said.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harness::daemon::Daemon;
use harness::s3::{BUCKET, Fault, GARAGE_KEY, Proxy, S3, garage_secret, settings};
use harness::sidecar::{Sidecar, path};
use harness::synthetic::{Synthetic, log_of, record};
use harness::tools;

fn records(range: std::ops::Range<u64>) -> Vec<Vec<u8>> {
    range.map(|n| record(n as i64 * 1000, format!("record number {n:08}").as_bytes())).collect()
}

fn url(prefix: &str) -> String {
    format!("s3://{BUCKET}/{prefix}")
}

/// Backs up, goes on, backs up, restores both ways, verifies.
fn conforms(settings: Vec<(String, String)>) -> Sidecar {
    let synthetic = Synthetic::new();
    let sidecar = Sidecar::with(&url("some/prefix")).configured(settings);
    synthetic.segment(1, 0, &records(0..5000));
    let data = synthetic.path();
    let first = sidecar.run(["backup", "create", "--data-dir", path(&data)]);
    assert_eq!(first.code, 0, "{}", first.stderr);
    let segment = synthetic.segment(1, 0, &records(0..9000));
    let second = sidecar.run(["backup", "create", "--data-dir", path(&data)]);
    assert_eq!(second.code, 0, "{}", second.stderr);
    for (target, count) in [(first.json["restore_point"].as_str().expect("an id"), 5000), ("latest", 9000)] {
        let restored = synthetic.dir.path().join(format!("restored-{count}"));
        let report = sidecar.restore(&restored, target);
        assert_eq!(report["databases"][0]["offset"], count - 1);
        let found = std::fs::read(log_of(&restored).join("00000000000000000000.stdb.log")).expect("the log");
        assert_eq!(found, std::fs::read(&segment).expect("the segment")[..found.len()]);
    }
    assert_eq!(sidecar.run(["verify"]).ok()["findings"].as_array().map(Vec::len), Some(0));
    sidecar
}

#[tokio::test(flavor = "multi_thread")]
async fn moto_holds_a_repository() {
    let Some(server) = S3::moto().await else { return };
    let sidecar = conforms(server.settings());
    let run = sidecar.run(["backup", "list"]);
    assert!(!run.stderr.contains("conditional"), "{}", run.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn s3s_which_checks_signatures_and_checksums_holds_a_repository() {
    let Some(server) = S3::s3s().await else { return };
    let mut with_checksums = server.settings();
    with_checksums.push(("REPOSITORY__CHECKSUM".into(), "true".into()));
    conforms(with_checksums);
}

#[tokio::test(flavor = "multi_thread")]
async fn garage_which_ignores_conditions_holds_a_repository_and_the_user_is_warned() {
    let Some(server) = S3::garage().await else { return };
    let sidecar = conforms(settings(&server.endpoint, GARAGE_KEY, &garage_secret()));
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(0..10));
    let run = sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path())]);
    assert!(run.stderr.contains("ignores conditional writes"), "{}", run.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_with_the_store_is_said_in_one_line_without_a_storm_of_requests() {
    let Some(server) = S3::s3s().await else { return };
    let proxy = Proxy::before(&server).await;
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(0..10));
    let data = synthetic.path();
    let good = settings(&proxy.endpoint, harness::s3::ACCESS_KEY, harness::s3::SECRET_KEY);
    let attempt = |url: &str, change: &[(&str, &str)]| {
        let mut settings = good.clone();
        for (name, value) in change {
            settings.retain(|(known, _)| known != name);
            settings.push(((*name).to_owned(), (*value).to_owned()));
        }
        let before = proxy.requests();
        let run = Sidecar::with(url).configured(settings).run(["backup", "create", "--data-dir", path(&data)]);
        (run.fails_with(7), proxy.requests() - before)
    };
    let wrong = ("REPOSITORY__SECRET_ACCESS_KEY", "wrong");
    let unknown = ("REPOSITORY__ACCESS_KEY_ID", "AKIANOBODY");
    let region = ("REPOSITORY__REGION", "us-east-1");
    let cases = [
        ("a wrong secret", url("p"), wrong, "check secret_access_key"),
        ("an unknown key", url("p"), unknown, "access"),
        ("no such bucket", "s3://nobodys-bucket/p".to_owned(), region, "no such bucket"),
    ];
    for (what, url, change, expected) in cases {
        let (message, requests) = attempt(&url, &[change]);
        assert!(message.contains(expected), "{what}: {message}");
        assert!(requests <= 8, "{what}: {requests} requests");
    }
    for (status, code, expected) in [
        ("403 Forbidden", "RequestTimeTooSkewed", "clock is wrong"),
        ("400 Bad Request", "ExpiredToken", "have expired"),
        ("400 Bad Request", "AuthorizationHeaderMalformed", "set region"),
        ("403 Forbidden", "AccessDenied", "grant read, write and list"),
    ] {
        proxy.answer(Some((status, code)));
        let (message, requests) = attempt(&url("p"), &[]);
        assert!(message.contains(expected) && message.contains(code), "{code}: {message}");
        assert!(requests <= 8, "{code}: {requests} requests");
    }
    proxy.answer(None);
    let dead = [("REPOSITORY__ENDPOINT", "http://127.0.0.1:9"), ("REPOSITORY__REQUEST_TIMEOUT", "2s")];
    let (message, _) = attempt(&url("p"), &dead);
    assert!(message.contains("reachable"), "{message}");
    proxy.set(Fault::Hang);
    let (message, requests) = attempt(&url("p"), &[("REPOSITORY__REQUEST_TIMEOUT", "1s")]);
    assert!(message.contains("no answer") && requests <= 8, "{requests} requests: {message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_that_holds_something_else_is_left_alone() {
    let Some(server) = S3::moto().await else { return };
    let object = format!("{}/{BUCKET}/holiday/photo.jpg", server.endpoint);
    let put = harness::client::http().put(&object).body("a photo").send().await.expect("an answer");
    assert!(put.status().is_success());
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(0..10));
    let sidecar = Sidecar::with(&url("holiday")).configured(server.settings());
    let message = sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path())]).fails_with(6);
    assert!(message.contains("photo.jpg") && message.contains("choose an empty"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_listings_are_outages_for_every_verb() {
    let Some(server) = S3::moto().await else { return };
    let proxy = Proxy::before(&server).await;
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(0..100));
    let good = settings(&proxy.endpoint, harness::s3::ACCESS_KEY, harness::s3::SECRET_KEY);
    let sidecar = Sidecar::with(&url("listings")).configured(good).and("RETENTION__KEEP_LAST", "1");
    sidecar.backup(&synthetic.path());
    let restored = synthetic.dir.path().join("restored");
    let truncated = "<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>";
    let endless = "<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>a</NextContinuationToken></ListBucketResult>";
    for (kind, page) in [
        ("application/xml", truncated),
        ("application/xml", endless),
        ("application/xml", "<ListAllMyBucketsResult><Buckets/></ListAllMyBucketsResult>"),
        ("text/html", "<!DOCTYPE html><html><body>Maintenance</body></html>"),
        ("text/plain", ""),
    ] {
        proxy.answer_listings(Some((kind, page)));
        for verb in [
            &["verify"][..],
            &["backup", "list"],
            &["backup", "create", "--data-dir", path(&synthetic.path())],
            &["restore", "--data-dir", path(&restored), "--to", "latest"],
            &["prune"],
        ] {
            let message = sidecar.run(verb).fails_with(7);
            assert!(message.contains("cannot be trusted"), "{verb:?}, {page}: {message}");
        }
    }
    proxy.answer_listings(None);
    assert_eq!(sidecar.run(["verify"]).ok()["findings"].as_array().map(Vec::len), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn stores_that_refuse_conditions_hold_a_repository_with_a_warning() {
    let Some(server) = S3::moto().await else { return };
    for (prefix, status, code) in [
        ("refuses-501", "501 Not Implemented", "NotImplemented"),
        ("refuses-400", "400 Bad Request", "InvalidArgument"),
    ] {
        let proxy = Proxy::before(&server).await;
        proxy.refuse_conditions(status, code);
        let synthetic = Synthetic::new();
        synthetic.segment(1, 0, &records(0..100));
        let good = settings(&proxy.endpoint, harness::s3::ACCESS_KEY, harness::s3::SECRET_KEY);
        let sidecar = Sidecar::with(&url(prefix)).configured(good);
        let run = sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path())]);
        assert_eq!(run.code, 0, "{}", run.stderr);
        assert!(run.stderr.contains("conditional writes"), "{}", run.stderr);
        let doctor = sidecar.run(["doctor"]).json;
        let checks = doctor["checks"].as_array().expect("checks");
        let check = checks.iter().find(|check| check["check"] == "conditional writes").expect("the check");
        assert_eq!(check["verdict"], "warn", "{check}");
        assert_eq!(sidecar.run(["verify"]).ok()["findings"].as_array().map(Vec::len), Some(0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn configured_stores_win_over_variables_of_aws() {
    let Some(server) = S3::moto().await else { return };
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(0..100));
    let pairs = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect::<Vec<_>>()
    };
    let foreign = pairs(&[
        ("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9"),
        ("AWS_SESSION_TOKEN", "foreign"),
        ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true"),
    ]);
    let configured = Sidecar::with(&url("ours")).configured(server.settings()).with_environment(foreign);
    configured.backup(&synthetic.path());
    // Without a configured endpoint, the variables alone lead to the store, and are named.
    let variables = pairs(&[
        ("AWS_ENDPOINT_URL", server.endpoint.as_str()),
        ("AWS_ACCESS_KEY_ID", harness::s3::ACCESS_KEY),
        ("AWS_SECRET_ACCESS_KEY", harness::s3::SECRET_KEY),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ]);
    let alone = Sidecar::with(&url("ours")).with_environment(variables);
    let shown = alone.run(["config", "show"]).ok();
    let endpoint = shown.as_array().expect("keys").iter().find(|key| key["key"] == "repository.endpoint");
    let endpoint = endpoint.expect("the endpoint");
    assert_eq!(endpoint["value"], server.endpoint.as_str());
    assert_eq!(endpoint["source"]["environment"]["variable"], "AWS_ENDPOINT_URL");
    assert_eq!(alone.run(["backup", "list"]).ok().to_string().matches("\"id\"").count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_proxies_do_not_hide_loopback_and_are_named_elsewhere() {
    let Some(server) = S3::moto().await else { return };
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(0..100));
    let dead = vec![("HTTP_PROXY".to_owned(), "http://me:secret@127.0.0.1:9".to_owned())];
    let sidecar = Sidecar::with(&url("proxied")).configured(server.settings()).with_environment(dead.clone());
    sidecar.backup(&synthetic.path());
    let elsewhere = settings("http://store.invalid", harness::s3::ACCESS_KEY, harness::s3::SECRET_KEY);
    let sidecar = Sidecar::with(&url("proxied")).configured(elsewhere).with_environment(dead);
    let message = sidecar.run(["backup", "list"]).fails_with(7);
    assert!(message.contains("through the proxy http://127.0.0.1:9 (HTTP_PROXY)"), "{message}");
    assert!(!message.contains("secret"), "{message}");
}

/// A line of a process's memory, KiB.
fn memory(pid: u32, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or_default()
}

/// Looks fifty times a second what memory a process has taken for itself, without the pages of its program.
struct Watch {
    done: Arc<AtomicBool>,
    watching: std::thread::JoinHandle<u64>,
}

impl Watch {
    fn start(pid: u32) -> Self {
        let done = Arc::new(AtomicBool::new(false));
        let watching = std::thread::spawn({
            let done = Arc::clone(&done);
            move || {
                let mut most = 0;
                while !done.load(Ordering::Relaxed) {
                    most = most.max(memory(pid, "RssAnon:"));
                    std::thread::sleep(Duration::from_millis(20));
                }
                most
            }
        });
        Self { done, watching }
    }

    /// The most that was seen, KiB.
    fn end(self) -> u64 {
        self.done.store(true, Ordering::Relaxed);
        self.watching.join().expect("the watch")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn outages_of_every_kind_are_survived_with_bounded_memory_and_caught_up_with() {
    let seconds = |fault| match fault {
        _ if !tools::all() => 4,
        Fault::Down => 600,
        _ => 60,
    };
    let Some(server) = S3::moto().await else { return };
    let proxy = Proxy::before(&server).await;
    let synthetic = Synthetic::new();
    let mut written: u64 = 1000;
    let segment = synthetic.segment(1, 0, &records(0..written));
    let good = settings(&proxy.endpoint, harness::s3::ACCESS_KEY, harness::s3::SECRET_KEY);
    let mut sidecar = Sidecar::with(&url("outages")).configured(good);
    if tools::all() {
        // A long outage leaves much to catch up with; what that takes is promised of what users run.
        sidecar = sidecar.optimised();
    }
    let limits = [("ARCHIVE__FLUSH_INTERVAL", "100ms"), ("REPOSITORY__REQUEST_TIMEOUT", "2s")];
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &limits, &[]);
    daemon.wait_archived(written - 1);
    let watch = Watch::start(daemon.pid());
    for fault in [Fault::Down, Fault::Hang, Fault::Full, Fault::Slow, Fault::Flaky] {
        proxy.set(fault);
        let until = Instant::now() + Duration::from_secs(seconds(fault));
        while Instant::now() < until {
            use std::io::Write;
            let commits: Vec<u8> = (written..)
                .zip(records(written..written + 200))
                .flat_map(|(n, record)| {
                    inner_universe::datadir::commit::encode(1, inner_universe::ids::Offset(n), 0, 1, &record)
                })
                .collect();
            let mut file = std::fs::File::options().append(true).open(&segment).expect("the segment");
            file.write_all(&commits).expect("append");
            written += 200;
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        if matches!(fault, Fault::Down | Fault::Hang | Fault::Full) {
            let behind = daemon.wait("the lag to be told", |status| {
                status.databases.first().is_some_and(|database| database.error.is_some())
            });
            assert!(behind.databases[0].behind_seconds > 0.0);
        }
        proxy.set(Fault::None);
        daemon.wait_archived(written - 1);
        println!("after {fault:?} at most {} KiB were resident", memory(daemon.pid(), "VmHWM:"));
    }
    // 64 MiB are promised of the optimised program, whose own pages are 25 of them; those of one that is not say nothing.
    let own = watch.end();
    println!("{own} KiB without the program");
    assert!(own > 0 && own < (64 - 25) << 10, "{own} KiB were taken");
    if tools::all() {
        let resident = memory(daemon.pid(), "VmHWM:");
        assert!(resident < 64 << 10, "{resident} KiB were resident");
    }
    assert_eq!(daemon.stop(), 0);
    let run = sidecar.run(["backup", "create", "--data-dir", path(&synthetic.path())]);
    assert_eq!(run.json["databases"][0]["offset"], written - 1, "{}", run.stderr);
    assert_eq!(run.json["databases"][0]["timeline"], 1, "{}", run.stderr);
    assert_eq!(sidecar.run(["verify"]).ok()["findings"].as_array().map(Vec::len), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn snapshots_that_are_archived_are_not_asked_for_again_and_a_new_one_is_archived() {
    let Some(server) = S3::moto().await else { return };
    let proxy = Proxy::before(&server).await;
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(0..1000));
    synthetic.snapshot(300, 50);
    let good = settings(&proxy.endpoint, harness::s3::ACCESS_KEY, harness::s3::SECRET_KEY);
    let sidecar = Sidecar::with(&url("quiet")).configured(good);
    let quiet = [("ARCHIVE__COMPACTION", "false"), ("REPOSITORY__LEASE_DURATION", "300s")];
    let daemon = Daemon::start(&sidecar, &synthetic.path(), &quiet, &[]);
    let archived = async |offset: u64| {
        let name = format!("{offset:020}.json");
        let deadline = Instant::now() + Duration::from_secs(60);
        while !proxy.written().iter().any(|(path, _)| path.contains("/snapshots/") && path.ends_with(&name)) {
            assert!(Instant::now() < deadline, "the snapshot at {offset} is not archived");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    archived(300).await;
    // What follows an upload is over by the second look.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let before = proxy.requests();
    tokio::time::sleep(Duration::from_secs(16)).await;
    // Three looks at five requests each would be more.
    let requests = proxy.requests() - before;
    assert!(requests < 10, "{requests} requests where nothing happened");
    synthetic.snapshot(700, 60);
    archived(700).await;
    assert_eq!(daemon.stop(), 0);
    assert_eq!(sidecar.run(["verify"]).ok()["findings"].as_array().map(Vec::len), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_sidecars_one_writes_and_one_that_was_paused_says_that_it_lost_the_lease() {
    let at_least = Duration::from_secs(if tools::all() { 300 } else { 0 });
    let started = Instant::now();
    let Some(server) = S3::moto().await else { return };
    let synthetic = Synthetic::new();
    let mut written: u64 = 500;
    let segment = synthetic.segment(1, 0, &records(0..written));
    let sidecar = || Sidecar::with(&url("two")).configured(server.settings());
    let limits =
        [("ARCHIVE__FLUSH_INTERVAL", "50ms"), ("REPOSITORY__LEASE_DURATION", "3s"), ("ARCHIVE__COMPACTION", "false")];
    let first = sidecar();
    let mut holder = Daemon::start(&first, &synthetic.path(), &limits, &[]);
    holder.wait_archived(written - 1);
    let refused = sidecar().run(["run", "--no-wait", "--data-dir", path(&synthetic.path())]);
    assert!(refused.fails_with(5).contains("is writing to this repository"), "the second is told");
    let mut state = first;
    let mut rounds = 0;
    while rounds < 2 || started.elapsed() < at_least {
        rounds += 1;
        let next = sidecar();
        let mut waiting = Daemon::start(&next, &synthetic.path(), &limits, &[]);
        let append = |from: u64, n: u64| {
            use std::io::Write;
            let commits: Vec<u8> = (from..)
                .zip(records(from..from + n))
                .flat_map(|(n, record)| {
                    inner_universe::datadir::commit::encode(1, inner_universe::ids::Offset(n), 0, 1, &record)
                })
                .collect();
            let mut file = std::fs::File::options().append(true).open(&segment).expect("the segment");
            file.write_all(&commits).expect("append");
        };
        append(written, 100);
        written += 100;
        holder.wait_archived(written - 1);
        append(written, 30);
        written += 30;
        holder.signal("STOP");
        append(written, 100);
        written += 100;
        waiting.wait_archived(written - 1);
        holder.signal("CONT");
        assert_eq!(holder.exit_code(), 5, "{}", holder.log());
        assert!(holder.log().contains("the lease is lost"), "{}", holder.log());
        holder = waiting;
        state = next;
    }
    assert_eq!(holder.stop(), 0);
    let run = state.run(["backup", "create", "--data-dir", path(&synthetic.path())]).ok();
    assert_eq!(
        (run["databases"][0]["timeline"].clone(), run["databases"][0]["offset"].clone()),
        (1.into(), (written - 1).into())
    );
    assert_eq!(state.run(["verify"]).ok()["findings"].as_array().map(Vec::len), Some(0));
    let restored = synthetic.dir.path().join("restored");
    state.restore(&restored, "latest");
    let found = std::fs::read(log_of(&restored).join("00000000000000000000.stdb.log")).expect("the log");
    assert_eq!(found, std::fs::read(&segment).expect("the segment"));
}

#[tokio::test(flavor = "multi_thread")]
async fn told_to_stop_while_the_store_hangs_it_ends_and_the_next_start_archives_the_rest() {
    let Some(server) = S3::moto().await else { return };
    let proxy = Proxy::before(&server).await;
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(0..100));
    let good = settings(&proxy.endpoint, harness::s3::ACCESS_KEY, harness::s3::SECRET_KEY);
    let sidecar = Sidecar::with(&url("hangs")).configured(good);
    let limits = [("ARCHIVE__FLUSH_INTERVAL", "100ms"), ("REPOSITORY__LEASE_DURATION", "3s")];
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &limits, &[]);
    daemon.wait_archived(99);
    proxy.set(Fault::Hang);
    synthetic.segment(1, 0, &records(0..150));
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(daemon.stop(), 8, "what is left is not archived");
    proxy.set(Fault::None);
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &limits, &[]);
    daemon.wait_archived(149);
    assert_eq!(daemon.stop(), 0);
}
