//! What the sidecar tells of itself: metrics, health, status page, API, heartbeat.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use harness::client::http;
use harness::daemon::Daemon;
use harness::sidecar::{Sidecar, path};
use harness::synthetic::{Synthetic, record};
use inner_universe::observe::metrics::{ALL, Kind};
use reqwest::StatusCode;
use serde_json::{Value, json};

const TOKEN: &str = "correct horse battery staple";

fn records(n: u64) -> Vec<Vec<u8>> {
    (0..n).map(|at| record(1_700_000_000_000_000 + at as i64 * 1000, b"observed")).collect()
}

/// A daemon on a log of a thousand transactions, and where it listens.
fn observed(settings: &[(&str, &str)]) -> (Synthetic, Sidecar, Daemon, String) {
    let synthetic = Synthetic::new();
    synthetic.segment(1, 0, &records(1000));
    let sidecar = Sidecar::at(&synthetic.dir.path().join("repository"));
    let mut all = vec![("ARCHIVE__FLUSH_INTERVAL", "50ms")];
    all.extend(settings);
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &all, &[]);
    daemon.wait_archived(999);
    let status =
        daemon.wait("the first restore point", |status| status.last_restore_point.is_some() && status.http.is_some());
    (synthetic, sidecar, daemon, status.http.expect("an address"))
}

/// Families of a scrape: the type, and each sample's name with labels and value.
struct Scrape {
    types: BTreeMap<String, String>,
    samples: Vec<(String, BTreeSet<String>, f64)>,
}

impl Scrape {
    fn parse(text: &str) -> Self {
        let (mut types, mut samples) = (BTreeMap::new(), Vec::new());
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("a type");
                types.insert(name.to_owned(), kind.to_owned());
            } else if !line.starts_with('#') && !line.is_empty() {
                let (series, value) = line.rsplit_once(' ').expect("a value");
                let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
                let labels = labels.trim_end_matches('}').split(',').filter(|label| !label.is_empty());
                let labels = labels.map(|label| label.split_once('=').expect("a label").0.to_owned()).collect();
                samples.push((name.to_owned(), labels, value.parse().expect("a number")));
            }
        }
        Self { types, samples }
    }

    fn is_at_least(&self, name: &str, least: f64) -> bool {
        self.samples.iter().any(|(found, _, value)| found == name && *value >= least)
    }

    fn value(&self, name: &str) -> f64 {
        let found = self.samples.iter().find(|(found, ..)| found == name);
        found.unwrap_or_else(|| panic!("{name} is not there")).2
    }
}

async fn scrape(url: &str) -> Scrape {
    let answer = http().get(format!("{url}/metrics")).send().await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::OK);
    Scrape::parse(&answer.text().await.expect("text"))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_that_is_told_is_declared_with_its_type_and_labels_and_says_the_truth() {
    let often = [("SCHEDULE__VERIFY", "* * * * * *"), ("HTTP__TOKEN", TOKEN), ("ARCHIVE__COMPACTION_INTERVAL", "1s")];
    let (synthetic, sidecar, mut daemon, url) = observed(&often);
    daemon.wait("a verification", |status| status.schedules.iter().any(|schedule| schedule.last_ok == Some(true)));
    // A fork, so that all that can be counted about a log is.
    let mut other = records(990);
    other.extend((0..30).map(|at| record(1_700_000_001_000_000 + at * 1000, b"differs!")));
    synthetic.segment(1, 0, &other);
    daemon.wait("the fork", |status| status.databases[0].timeline.is_some_and(|timeline| timeline.0 == 2));
    daemon.wait_archived(1019);
    let made = http().post(format!("{url}/v1/restore-points")).bearer_auth(TOKEN).send().await.expect("an answer");
    assert_eq!(made.status(), StatusCode::CREATED);
    // The survey follows each restore point.
    let points = sidecar.run(["backup", "list"]).ok()["restore_points"].as_array().expect("points").len() as f64;
    let deadline = Instant::now() + Duration::from_secs(60);
    while !scrape(&url).await.is_at_least("inner_universe_restore_point_count", points) {
        assert!(Instant::now() < deadline, "the repository is not surveyed: {}", daemon.log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    let found = scrape(&url).await;
    let declared: BTreeMap<String, _> = ALL.iter().map(|metric| (metric.prometheus_name(), *metric)).collect();
    for (name, kind) in &found.types {
        if name == "target_info" {
            continue;
        }
        let metric = declared.get(name).unwrap_or_else(|| panic!("{name} is not declared"));
        let expected = match metric.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram(_) => "histogram",
        };
        assert_eq!(kind, expected, "{name}");
        let of_family = |sample: &str| {
            let bare = ["_bucket", "_sum", "_count"].iter().find_map(|suffix| sample.strip_suffix(suffix));
            sample == name || (expected == "histogram" && bare == Some(name))
        };
        let labels: BTreeSet<_> = metric.labels.iter().map(|label| (*label).to_owned()).collect();
        for (sample, given, _) in found.samples.iter().filter(|(sample, ..)| of_family(sample)) {
            let given: BTreeSet<_> = given.iter().filter(|label| *label != "le").cloned().collect();
            assert_eq!(given, labels, "{sample}");
        }
    }
    // What needs another set-up to be told at all.
    let elsewhere = [
        "inner_universe_condition",
        "inner_universe_server_up",
        "inner_universe_server_starts",
        "inner_universe_heartbeat_calls_total",
        "inner_universe_events_sent_total",
        "inner_universe_events_delay_seconds",
        "inner_universe_events_errors_total",
        "inner_universe_calls_sent_total",
        "inner_universe_calls_errors_total",
        "inner_universe_compaction_errors_total",
        "inner_universe_lease_renewals_total",
        // In the room of exports.
        "inner_universe_exports_total",
        "inner_universe_export_rows_total",
        // In the room of drills.
        "inner_universe_prune_objects_total",
        "inner_universe_prune_size_bytes_total",
        "inner_universe_drill_last_time_seconds",
        "inner_universe_drill_last_ok",
        "inner_universe_drill_rto_seconds",
        "inner_universe_drill_rpo_seconds",
    ];
    let of_module = |name: &str| name.starts_with("inner_universe_module_");
    for name in declared.keys().filter(|name| !elsewhere.contains(&name.as_str()) && !of_module(name)) {
        assert!(found.types.contains_key(name), "{name} is declared and not told");
    }

    assert_eq!(found.value("inner_universe_restore_point_count"), points);
    assert_eq!(found.value("inner_universe_archive_offset"), 1019.0);
    assert_eq!(found.value("inner_universe_archive_lag_transactions"), 0.0);
    assert_eq!(found.value("inner_universe_archive_timeline"), 2.0);
    assert_eq!(found.value("inner_universe_verify_findings"), 0.0);
    let text = http().get(format!("{url}/metrics")).send().await.expect("an answer").text().await.expect("text");
    assert!(text.contains(r#"inner_universe_archive_events_total{database="synthetic",kind="fork"} 1"#), "{text}");
    let stored: u64 = walk(&synthetic.dir.path().join("repository")).iter().map(|file| file.1).sum();
    let told: f64 = found
        .samples
        .iter()
        .filter(|sample| sample.0 == "inner_universe_repository_size_bytes")
        .map(|sample| sample.2)
        .sum();
    // Compaction may write meanwhile.
    assert!(told > 0.0 && told <= stored as f64 * 2.0, "{told} {stored}");

    // The same as OpenMetrics.
    let accept = "application/openmetrics-text; version=1.0.0";
    let answer = http().get(format!("{url}/metrics")).header("accept", accept).send().await.expect("an answer");
    assert!(answer.headers()["content-type"].to_str().expect("text").starts_with("application/openmetrics-text"));
    let text = answer.text().await.expect("text");
    assert!(text.ends_with("# EOF\n"));
    assert!(text.contains("# TYPE inner_universe_archive_objects counter\n"), "{text}");
    assert_eq!(daemon.stop(), 0);
}

fn walk(dir: &std::path::Path) -> Vec<(std::path::PathBuf, u64)> {
    let entries = std::fs::read_dir(dir).expect("list").flatten();
    entries
        .flat_map(|entry| match entry.metadata() {
            Ok(kind) if kind.is_dir() => walk(&entry.path()),
            Ok(kind) => vec![(entry.path(), kind.len())],
            Err(_) => Vec::new(),
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_api_tells_what_the_command_line_tells_and_triggers_only_with_the_token() {
    let (synthetic, sidecar, daemon, url) = observed(&[("HTTP__TOKEN", TOKEN)]);
    let get = async |path: &str, token: Option<&str>| {
        let mut request = http().get(format!("{url}{path}"));
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let answer = request.send().await.expect("an answer");
        (answer.status(), answer.json::<Value>().await.expect("JSON"))
    };
    for path in ["/v1/status", "/v1/history", "/v1/restore-points", "/v1/restore-points/01ARZ3NDEKTSV4RRFFQ69G5FAV"] {
        for wrong in [None, Some("wrong"), Some("")] {
            let (status, body) = get(path, wrong).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{path}");
            assert!(body["error"].as_str().is_some_and(|error| !error.is_empty()));
        }
    }
    let (_, found) = get("/v1/status", Some(TOKEN)).await;
    let mut expected = sidecar.run(["status", "--data-dir", path(&synthetic.path())]).ok();
    let mut found = found;
    for age in [&mut found, &mut expected] {
        age["last_restore_point"]["age_seconds"] = Value::Null;
    }
    assert_eq!(found, expected);
    let (_, listed) = get("/v1/restore-points", Some(TOKEN)).await;
    assert_eq!(listed, sidecar.run(["backup", "list"]).ok());
    let id = listed["restore_points"][0]["id"].as_str().expect("an id").to_owned();
    let (status, shown) = get(&format!("/v1/restore-points/{id}"), Some(TOKEN)).await;
    assert_eq!((status, &shown), (StatusCode::OK, &listed["restore_points"][0]));
    let (status, _) = get("/v1/restore-points/01ARZ3NDEKTSV4RRFFQ69G5FAV", Some(TOKEN)).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let (status, _) = get("/v1/restore-points/nonsense", Some(TOKEN)).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let (status, _) = get("/nothing", None).await;
    assert_eq!(status, StatusCode::NOT_FOUND);

    let post = async |path: &str, token: Option<&str>, body: String| {
        let mut request = http().post(format!("{url}{path}")).body(body);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let answer = request.send().await.expect("an answer");
        (answer.status(), answer.json::<Value>().await.expect("JSON"))
    };
    assert!(post("/v1/restore-points", None, String::new()).await.0.is_client_error());
    let (status, made) = post("/v1/restore-points", Some(TOKEN), json!({"label": "by hand"}).to_string()).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    assert_eq!(made["databases"][0]["offset"], 999);
    assert_eq!(
        sidecar.run(["backup", "show", made["restore_point"].as_str().expect("an id")]).ok()["label"],
        "by hand"
    );
    let (status, said) = post("/v1/restore-points", Some(TOKEN), json!({"lable": "x"}).to_string()).await;
    assert!(
        status == StatusCode::BAD_REQUEST && said["error"].as_str().is_some_and(|error| error.contains("label")),
        "{said}"
    );
    let (status, _) = post("/v1/restore-points", Some(TOKEN), "x".repeat(20 << 10)).await;
    assert!(matches!(status, StatusCode::PAYLOAD_TOO_LARGE | StatusCode::TOO_MANY_REQUESTS), "{status}");
    // A loop of triggers is slowed down, and told for how long.
    let mut slowed = false;
    for _ in 0..6 {
        let answer = http().post(format!("{url}/v1/verify")).bearer_auth(TOKEN).send().await.expect("an answer");
        slowed |= answer.status() == StatusCode::TOO_MANY_REQUESTS && answer.headers().contains_key("retry-after");
    }
    assert!(slowed);
    let answer = http().delete(format!("{url}/v1/status")).bearer_auth(TOKEN).send().await.expect("an answer");
    assert_eq!(answer.status(), StatusCode::METHOD_NOT_ALLOWED);

    let (status, document) = get("/v1/openapi.json", None).await;
    assert_eq!((status, &document["openapi"]), (StatusCode::OK, &json!("3.1.0")));
    assert_eq!(daemon.log().matches(TOKEN).count(), 0, "the token is in the log");
    assert_eq!(daemon.stop(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fuzzer_of_interfaces_finds_the_api_to_be_as_its_document_says() {
    let Some(schemathesis) = std::env::var_os("INNER_UNIVERSE_SCHEMATHESIS") else {
        println!("skipped: schemathesis is not installed; `cargo xtask test --all` installs it");
        return;
    };
    let (_synthetic, _sidecar, daemon, url) = observed(&[("HTTP__TOKEN", TOKEN)]);
    let dir = tempfile::tempdir().expect("a directory");
    let mut command = std::process::Command::new(schemathesis);
    command.args(["run", &format!("{url}/v1/openapi.json"), "--checks", "all", "--max-examples", "100"]);
    command.args([
        "--header",
        &format!("Authorization: Bearer {TOKEN}"),
        "--rate-limit",
        "40/s",
        "--continue-on-failure",
    ]);
    command.args(["--no-color"]).current_dir(dir.path()).stdin(std::process::Stdio::null());
    let run = tokio::task::spawn_blocking(move || command.output().expect("schemathesis"));
    let output = run.await.expect("schemathesis");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    println!("{said}");
    assert_eq!(http().get(format!("{url}/healthz")).send().await.expect("an answer").status(), StatusCode::OK);
    assert!(!daemon.log().contains(TOKEN) && !daemon.log().contains("panicked"), "{}", daemon.log());
    assert_eq!(daemon.stop(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_token_this_machine_may_read_and_nobody_may_trigger() {
    let (_synthetic, _sidecar, daemon, url) = observed(&[]);
    let get = async |path: &str, host: Option<&str>| {
        let mut request = http().get(format!("{url}{path}"));
        if let Some(host) = host {
            request = request.header("host", host);
        }
        request.send().await.expect("an answer")
    };
    assert_eq!(get("/v1/status", None).await.status(), StatusCode::OK);
    assert_eq!(get("/v1/status", Some("evil.example.com")).await.status(), StatusCode::FORBIDDEN);
    assert_eq!(get("/v1/status", Some("localhost:1")).await.status(), StatusCode::OK);
    assert_eq!(get("/healthz", None).await.status(), StatusCode::OK);
    let trigger = http().post(format!("{url}/v1/verify")).send().await.expect("an answer");
    assert_eq!(trigger.status(), StatusCode::FORBIDDEN);
    let page = get("/", None).await;
    assert!(page.headers()["content-security-policy"].to_str().expect("text").contains("default-src 'none'"));
    let text = page.text().await.expect("text");
    let without_namespace = text.replace("http://www.w3.org/2000/svg", "");
    assert!(text.starts_with("<!doctype html>"));
    assert!(!without_namespace.contains("http:") && !without_namespace.contains("https:"), "it loads nothing");
    assert_eq!(daemon.stop(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_says_what_is_wrong_and_the_heartbeat_falls_silent_with_it() {
    // Whoever listens for heartbeats.
    let beats = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&beats);
    let app = axum::Router::new().route(
        "/beat",
        axum::routing::get(move || {
            count.fetch_add(1, Ordering::Relaxed);
            async { "ok" }
        }),
    );
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = format!("http://{}/beat", listener.local_addr().expect("an address"));
    let listening = tokio::spawn(async move { axum::serve(listener, app).await });

    let Some(server) = harness::s3::S3::moto().await else { return };
    let proxy = harness::s3::Proxy::before(&server).await;
    let good = harness::s3::settings(&proxy.endpoint, harness::s3::ACCESS_KEY, harness::s3::SECRET_KEY);
    let sidecar = Sidecar::with(&format!("s3://{}/observed", harness::s3::BUCKET)).configured(good);
    let synthetic = Synthetic::new();
    let segment = synthetic.segment(1, 0, &records(100));
    let settings = [
        ("ARCHIVE__FLUSH_INTERVAL", "50ms"),
        ("REPOSITORY__REQUEST_TIMEOUT", "1s"),
        ("TELEMETRY__HEARTBEAT_URL", address.as_str()),
        ("TELEMETRY__HEARTBEAT_INTERVAL", "1s"),
    ];
    let mut daemon = Daemon::start(&sidecar, &synthetic.path(), &settings, &[]);
    daemon.wait_archived(99);
    let url = daemon.wait("its address", |status| status.http.is_some()).http.expect("an address");
    let ready = async || {
        let answer = http().get(format!("{url}/readyz")).send().await.expect("an answer");
        (answer.status(), answer.json::<Value>().await.expect("JSON"))
    };
    let until = async |wanted: StatusCode| {
        for _ in 0..300 {
            let (status, body) = ready().await;
            if status == wanted {
                return body;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("{wanted} never comes: {:?}", ready().await);
    };
    assert_eq!(until(StatusCode::OK).await, json!({"ready": true, "reasons": []}));
    for _ in 0..100 {
        if beats.load(Ordering::Relaxed) > 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(beats.load(Ordering::Relaxed) > 0, "no heartbeat: {}", daemon.log());

    proxy.set(harness::s3::Fault::Full);
    let more = inner_universe::datadir::commit::encode(1, inner_universe::ids::Offset(100), 0, 1, &records(1)[0]);
    let mut log = std::fs::read(&segment).expect("the segment");
    log.extend(more);
    std::fs::write(&segment, log).expect("append");
    let said = until(StatusCode::SERVICE_UNAVAILABLE).await;
    assert!(said["reasons"][0].as_str().is_some_and(|reason| reason.contains("not being archived")), "{said}");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let silent = beats.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(beats.load(Ordering::Relaxed), silent, "it beats while nothing is archived");
    assert!(scrape(&url).await.samples.iter().any(|sample| sample.0 == "inner_universe_heartbeat_calls_total"));

    proxy.set(harness::s3::Fault::None);
    daemon.wait_archived(100);
    until(StatusCode::OK).await;
    for _ in 0..100 {
        if beats.load(Ordering::Relaxed) > silent {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert!(beats.load(Ordering::Relaxed) > silent, "it does not beat again");
    assert!(!daemon.log().contains("/beat"), "the address of the heartbeat is a secret");
    assert_eq!(daemon.stop(), 0);
    listening.abort();
}
