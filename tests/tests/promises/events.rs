//! The bundled module's events reach a collector: each at least once, in order, under the same ids every time, through
//! outages of the collector, kills of the sidecar, restarts of the server and a restore.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use harness::client::{Client, some};
use harness::collector::{Collector, Span};
use harness::daemon::Daemon;
use harness::server::Server;
use harness::sidecar::{Sidecar, path};
use harness::tools;
use serde_json::{Value, json};

/// What the database says happened: event ids by sequence.
async fn truth(client: &Client) -> BTreeMap<u64, (String, String)> {
    let rows = client.sql("iu", "select * from event_log").await;
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    rows.iter().map(|row| (row[0].as_u64().expect("a sequence"), (text(&row[1]), text(&row[2])))).collect()
}

/// Loads events after the last one, a thousand a call, three to a correlation id.
async fn import(client: &Client, from: u64, count: u64) {
    let event = |sequence: u64| {
        json!({
            "sequence": sequence,
            "event_id": format!("imported-{sequence}"),
            "event_type": format!("IMPORTED_{}", sequence % 5),
            "source": some("test"),
            "timestamp": {"__timestamp_micros_since_unix_epoch__": 1_700_000_000_000_000_i64 + (sequence / 3) as i64},
            "correlation_id": format!("operation-{}", sequence / 3),
            "data": {"Custom": [{"name": "n", "value": {"UInt": sequence}}]},
        })
    };
    let mut at = from;
    while at < from + count {
        let until = (at + 1000).min(from + count);
        let events: Vec<_> = (at..until).map(event).collect();
        client.call("iu", "import_events", json!([events])).await.expect("import");
        at = until;
    }
}

async fn record(client: &Client, count: u64) {
    for n in 0..count {
        let data = json!({"Custom": [{"name": "n", "value": {"UInt": n}}]});
        let correlation = format!("00-{:032x}-{:016x}-01", n + 1, n + 7);
        client
            .call("iu", "record_event", json!(["RECORDED", some("live"), some(correlation), data]))
            .await
            .expect("record");
    }
}

/// Waits until an event span of every event is there, and the span of its call.
async fn wait(collector: &Collector, daemon: &Daemon, events: &BTreeMap<u64, (String, String)>) {
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let taken = collector.taken();
        let seen: BTreeSet<_> =
            taken.spans.iter().filter_map(|span| span.attributes.get("inner_universe.event.id")).collect();
        let missing = events.values().find(|(id, _)| !seen.contains(id));
        let ids: BTreeSet<_> = taken.spans.iter().map(|span| &span.id).collect();
        let orphan = taken.spans.iter().find(|span| is_event(span) && !ids.contains(&span.parent));
        let missing = missing.map(|(id, _)| id.clone()).or(orphan.map(|span| format!("the call of {span:?}")));
        let Some(missing) = missing else { return };
        assert!(
            Instant::now() < deadline,
            "{missing} of {} does not come ({} seen): {}",
            events.len(),
            seen.len(),
            daemon.log()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn is_event(span: &Span) -> bool {
    span.attributes.contains_key("inner_universe.event.id")
}

fn check(collector: &Collector, events: &BTreeMap<u64, (String, String)>, caller: &str) {
    let taken = collector.taken();
    let mut calls: BTreeMap<&str, &Span> = BTreeMap::new();
    for span in &taken.spans {
        if !is_event(span) && span.attributes.contains_key("inner_universe.correlation_id") {
            // What came twice is the same.
            assert!(calls.insert(&span.id, span).is_none_or(|before| before == span), "{span:?}");
        }
    }
    let mut by_event: BTreeMap<&str, &Span> = BTreeMap::new();
    for span in &taken.spans {
        let Some(id) = span.attributes.get("inner_universe.event.id") else { continue };
        // What came twice is the same.
        if let Some(before) = by_event.insert(id, span) {
            assert_eq!((&before.id, &before.trace, &before.parent), (&span.id, &span.trace, &span.parent), "{id}");
        }
        let call = calls.get(span.parent.as_str()).unwrap_or_else(|| panic!("{id} has no parent"));
        assert_eq!((&call.trace, call.start), (&span.trace, span.start), "{id}");
        // What the log tells of calls is there; only what was imported from elsewhere has no call in it.
        let reducer = match span.name.as_str() {
            "RECORDED" => Some("record_event"),
            "ENTITY_CREATED" => Some("create_entity"),
            "ENTITY_UPDATED" => Some("update_entity"),
            _ => None,
        };
        if let Some(reducer) = reducer {
            assert_eq!((call.name.as_str(), call.attributes["db.operation.name"].as_str()), (reducer, reducer));
            assert_eq!(call.attributes["inner_universe.caller.identity"], caller);
            assert!(call.attributes.contains_key("inner_universe.transaction.offset"));
        }
        assert_eq!(call.attributes["db.namespace"], "iu");
        assert_eq!(span.attributes["db.system.name"], "spacetimedb");
        assert_eq!(span.attributes["db.namespace"], "iu");
        assert_eq!(span.attributes["db.operation.name"], span.name);
    }
    let mut ids = BTreeSet::new();
    for (sequence, (event_id, event_type)) in events {
        let span = by_event.get(event_id.as_str()).unwrap_or_else(|| panic!("{event_id} is not there"));
        assert_eq!(span.attributes["inner_universe.event.sequence"], sequence.to_string());
        assert_eq!(&span.name, event_type);
        assert!(ids.insert(&span.id), "two events share the span {}", span.id);
        if let Some(n) = event_id.strip_prefix("imported-") {
            assert_eq!(span.attributes["inner_universe.data.n"], n);
            assert_eq!(span.attributes["inner_universe.event.source"], "test");
        }
    }
    let logged: BTreeSet<_> =
        taken.logs.iter().filter_map(|(_, attributes, ..)| attributes.get("inner_universe.event.id")).collect();
    for (event_id, _) in events.values() {
        assert!(logged.contains(event_id), "{event_id} has no log record");
    }
    for (_, attributes, trace, span) in &taken.logs {
        let Some(id) = attributes.get("inner_universe.event.id") else { continue };
        let of = by_event[id.as_str()];
        assert_eq!((trace, span), (&of.trace, &of.id));
    }
}

/// First sights of events come in the order of their sequence, `from` being where this history begins.
fn check_order(spans: &[Span]) {
    let mut seen = BTreeSet::new();
    let first_sights = spans.iter().filter_map(|span| {
        let sequence: u64 = span.attributes.get("inner_universe.event.sequence")?.parse().ok()?;
        seen.insert(span.id.clone()).then_some(sequence)
    });
    let sequences: Vec<u64> = first_sights.collect();
    assert!(sequences.is_sorted(), "out of order");
}

struct Scene {
    scratch: tempfile::TempDir,
    sidecar: Sidecar,
    token: std::path::PathBuf,
    port: u16,
}

impl Scene {
    fn new() -> Self {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let sidecar = Sidecar::at(&scratch.path().join("repository"));
        let token = scratch.path().join("token");
        Self { scratch, sidecar, token, port: 0 }
    }

    fn data(&self) -> std::path::PathBuf {
        self.scratch.path().join("data")
    }

    async fn server(&mut self) -> Server {
        let server = Server::start(&self.data(), &self.scratch.path().join("keys")).await;
        self.port = server.url.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port");
        server
    }

    fn daemon(&self, settings: &[(&str, &str)]) -> Daemon {
        let port = self.port.to_string();
        let mut all = vec![
            ("SPACETIMEDB_CONFIG__PORT", port.as_str()),
            ("SPACETIMEDB_CONFIG__DATABASE", "iu"),
            ("SPACETIMEDB_CONFIG__TOKEN_FILE", path(&self.token)),
            ("ARCHIVE__FLUSH_INTERVAL", "100ms"),
            ("TELEMETRY__OTLP_TIMEOUT", "2s"),
            ("TELEMETRY__METRICS_INTERVAL", "500ms"),
            ("REPOSITORY__LEASE_DURATION", "3s"),
        ];
        all.extend(settings);
        Daemon::start_with(&self.sidecar, &self.data(), &all, &["--force"], &[])
    }
}

fn cursor(state: &Path) -> Option<u64> {
    let dirs = std::fs::read_dir(state).ok()?.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
    let mut files =
        dirs.flat_map(|dir| std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()));
    let file = files.find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("events-")))?;
    serde_json::from_slice::<Value>(&std::fs::read(file).ok()?).ok()?["sequence"].as_u64()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_event_is_one_span_through_outages_kills_restarts_and_a_restore() {
    let backlog = if tools::all() { 100_000 } else { 12_000 };
    let collector = Collector::start().await;
    let mut scene = Scene::new();
    let server = scene.server().await;
    let client = server.client().await;
    client.publish("iu", tools::wasm("inner_universe_module")).await;
    std::fs::write(&scene.token, &client.token).expect("the token");
    let first = truth(&client).await.len() as u64 + 1;
    import(&client, first, backlog).await;

    // A backlog, then what happens live, over gRPC.
    let grpc = [
        ("TELEMETRY__OTLP_ENDPOINT", collector.grpc.as_str()),
        ("TELEMETRY__OTLP_PROTOCOL", "grpc"),
        ("TELEMETRY__OTLP_HEADERS", "x-tenant=universe"),
        ("TELEMETRY__OTLP_COMPRESSION", "gzip"),
    ];
    let daemon = scene.daemon(&grpc);
    wait(&collector, &daemon, &truth(&client).await).await;
    record(&client, 40).await;
    client.call("iu", "create_entity", json!(["a", "star", "{}"])).await.expect("create");
    client.call("iu", "update_entity", json!(["a", "{\"x\": 1}"])).await.expect("update");
    wait(&collector, &daemon, &truth(&client).await).await;
    assert!(collector.headers().contains("x-tenant"));

    // The collector is out, and meanwhile the sidecar is killed and the server too.
    collector.set_down(true);
    record(&client, 300).await;
    let deadline = Instant::now() + Duration::from_secs(60);
    while collector.refused() == 0 {
        assert!(Instant::now() < deadline, "nothing was sent: {}", daemon.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let held = cursor(&scene.sidecar.state_dir()).expect("a cursor");
    let all = truth(&client).await;
    assert!(held < *all.keys().last().expect("events"), "the cursor passed what was not taken");
    daemon.kill();
    server.kill();
    let server = scene.server().await;
    let client = client.at(&server.url);
    assert_eq!(truth(&client).await, all);
    let http = [
        ("TELEMETRY__OTLP_ENDPOINT", collector.http.as_str()),
        ("TELEMETRY__OTLP_PROTOCOL", "http/protobuf"),
        ("TELEMETRY__OTLP_COMPRESSION", "gzip"),
    ];
    let daemon = scene.daemon(&http);
    record(&client, 20).await;
    client.call("iu", "update_entity", json!(["a", "{\"x\": 2}"])).await.expect("update");
    collector.set_down(false);
    wait(&collector, &daemon, &truth(&client).await).await;
    // The server goes and comes back under a running sidecar, when it has synced its log.
    tokio::time::sleep(Duration::from_millis(900)).await;
    server.kill();
    let keys = scene.scratch.path().join("keys");
    let server = Server::start_at(&scene.data(), &keys, scene.port).await;
    record(&client, 20).await;
    let all = truth(&client).await;
    wait(&collector, &daemon, &all).await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    check(&collector, &all, &client.identity);
    let taken = collector.taken();
    check_order(&taken.spans);
    // Each event of an entity links to the one before, also over a restart of the sidecar.
    let updates: Vec<_> = taken.spans.iter().filter(|span| span.name == "ENTITY_UPDATED").collect();
    let ids: BTreeSet<_> = updates.iter().map(|span| &span.id).collect();
    assert_eq!(ids.len(), 2);
    let [first, .., last] = updates.as_slice() else { panic!("{updates:?}") };
    let created = taken.spans.iter().find(|span| span.name == "ENTITY_CREATED").expect("the creation");
    assert_eq!(first.links, std::slice::from_ref(&created.id));
    assert_eq!(last.links, std::slice::from_ref(&first.id));
    assert!(
        taken.metrics.contains("inner_universe.events.sent") && taken.metrics.contains("inner_universe.archive.lag")
    );
    assert_eq!(taken.services, BTreeSet::from(["inner-universe".to_owned()]));
    // A trace that a client began goes on.
    let joined = taken.spans.iter().find(|span| span.trace == format!("{:032x}", 5)).expect("the client's trace");
    assert!(joined.attributes.contains_key("inner_universe.correlation_id"));

    // A restore takes events back, and others take their numbers.
    tokio::time::sleep(Duration::from_millis(900)).await;
    let point = scene.sidecar.run(["backup", "create", "--data-dir", path(&scene.data())]).ok();
    record(&client, 30).await;
    wait(&collector, &daemon, &truth(&client).await).await;
    assert_eq!(daemon.stop(), 0);
    server.kill();
    let id = point["restore_point"].as_str().expect("an id");
    scene.sidecar.run(["restore", "--force", "--data-dir", path(&scene.data()), "--to", id]).ok();
    let server = scene.server().await;
    let client = client.at(&server.url);
    let daemon = scene.daemon(&http);
    record(&client, 10).await;
    let after = truth(&client).await;
    assert!(after.len() < all.len() + 30);
    wait(&collector, &daemon, &after).await;
    tokio::time::sleep(Duration::from_millis(700)).await;
    check(&collector, &after, &client.identity);
    assert_eq!(daemon.stop(), 0);
    server.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_rights_or_database_the_stream_says_so_and_the_archive_goes_on() {
    let collector = Collector::start().await;
    let mut scene = Scene::new();
    let server = scene.server().await;
    let client = server.client().await;
    client.publish("iu", tools::wasm("inner_universe_module")).await;
    std::fs::write(&scene.token, "not.a.token").expect("the token");
    let endpoint = [("TELEMETRY__OTLP_ENDPOINT", collector.http.as_str())];
    let mut daemon = scene.daemon(&endpoint);
    daemon.wait("the archive", |status| status.databases.iter().any(|found| found.archived_offset.is_some()));
    let deadline = Instant::now() + Duration::from_secs(30);
    while !daemon.log().contains("the event stream waits") {
        assert!(Instant::now() < deadline, "{}", daemon.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(daemon.log().contains("token_file"), "{}", daemon.log());
    assert!(!daemon.log().contains("not.a.token"));
    assert_eq!(daemon.stop(), 0);
    server.kill();
}

/// An OTLP store that others wrote; it keeps what it takes on disk, so that it can be killed and started again.
struct Otelite {
    child: std::process::Child,
    dir: tempfile::TempDir,
    ports: [u16; 3],
}

impl Otelite {
    async fn start() -> Option<Self> {
        if std::env::var_os("INNER_UNIVERSE_OTELITE").is_none() {
            println!("skipped: otelite is not installed; `cargo xtask test --all` builds it");
            return None;
        }
        let dir = tempfile::tempdir().expect("a temporary directory");
        let ports = [(); 3].map(|()| harness::server::free_port());
        let child = Self::spawn(dir.path(), ports);
        let mut store = Self { child, dir, ports };
        store.ready().await;
        Some(store)
    }

    fn spawn(dir: &Path, ports: [u16; 3]) -> std::process::Child {
        let binary = std::env::var_os("INNER_UNIVERSE_OTELITE").expect("otelite");
        let log = std::fs::File::options().create(true).append(true).open(dir.join("log")).expect("a log");
        std::process::Command::new(binary)
            .args(["serve", "--addr", &format!("127.0.0.1:{}", ports[0])])
            .env("HOME", dir)
            .env("OTELITE_DATA_DIR", dir.join("data"))
            .env("OTELITE_OTLP_GRPC_PORT", ports[1].to_string())
            .env("OTELITE_OTLP_HTTP_PORT", ports[2].to_string())
            .stdin(std::process::Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("start otelite")
    }

    async fn ready(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.get("/api/health").await.is_none() {
            assert!(Instant::now() < deadline, "otelite does not answer");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    async fn again(&mut self) {
        self.child = Self::spawn(self.dir.path(), self.ports);
        self.ready().await;
    }

    async fn get(&self, path: &str) -> Option<Value> {
        let answer =
            harness::client::http().get(format!("http://127.0.0.1:{}{path}", self.ports[0])).send().await.ok()?;
        answer.json().await.ok()
    }

    /// Every span it has, trace by trace.
    async fn spans(&self) -> Vec<Value> {
        let (mut ids, mut spans) = (BTreeSet::new(), Vec::new());
        loop {
            let listed = self.get(&format!("/api/traces?limit=1000&offset={}", ids.len())).await.expect("traces");
            let page = listed["traces"].as_array().expect("traces");
            let before = ids.len();
            ids.extend(page.iter().map(|trace| trace["trace_id"].as_str().expect("an id").to_owned()));
            if ids.len() == before {
                break;
            }
        }
        for id in ids {
            let trace = self.get(&format!("/api/traces/{id}")).await.expect("a trace");
            spans.extend(trace["spans"].as_array().expect("spans").iter().cloned());
        }
        spans
    }
}

impl Drop for Otelite {
    fn drop(&mut self) {
        self.stop();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_others_wrote_has_each_of_100000_events_as_one_span_below_its_call() {
    const EVENTS: u64 = 100_000;
    const PER_TRACE: u64 = 400;
    const PER_CALL: u64 = 5;
    let Some(mut store) = Otelite::start().await else { return };
    let mut scene = Scene::new();
    let server = scene.server().await;
    let client = server.client().await;
    client.publish("iu", tools::wasm("inner_universe_module")).await;
    std::fs::write(&scene.token, &client.token).expect("the token");
    let first = truth(&client).await.len() as u64 + 1;
    // It deletes what is old, so these are of today, and from before this server's first call.
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_micros() as i64;
    let event = |sequence: u64| {
        json!({
            "sequence": sequence,
            "event_id": format!("imported-{sequence}"),
            "event_type": "IMPORTED",
            "source": some("test"),
            "timestamp": {"__timestamp_micros_since_unix_epoch__": now - 3_600_000_000 + (sequence / PER_CALL) as i64},
            "correlation_id": format!("operation-{}", sequence / PER_TRACE),
            "data": {"Custom": [{"name": "n", "value": {"UInt": sequence}}]},
        })
    };
    let import = async |from: u64, count: u64, client: &Client| {
        for at in (from..from + count).step_by(1000) {
            let events: Vec<_> = (at..(at + 1000).min(from + count)).map(event).collect();
            client.call("iu", "import_events", json!([events])).await.expect("import");
        }
    };
    let cursor_at = async |scene: &Scene, daemon: &Daemon, wanted: u64| {
        let deadline = Instant::now() + Duration::from_secs(300);
        while cursor(&scene.sidecar.state_dir()).is_none_or(|cursor| cursor < wanted) {
            assert!(Instant::now() < deadline, "{wanted} is not reached: {}", daemon.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let (grpc, http) = (format!("http://127.0.0.1:{}", store.ports[1]), format!("http://127.0.0.1:{}", store.ports[2]));
    let over = |endpoint: &str, protocol: &str, scene: &Scene| {
        scene.daemon(&[("TELEMETRY__OTLP_ENDPOINT", endpoint), ("TELEMETRY__OTLP_PROTOCOL", protocol)])
    };

    import(first, EVENTS / 2, &client).await;
    let daemon = over(&grpc, "grpc", &scene);
    cursor_at(&scene, &daemon, EVENTS / 10).await;
    store.stop();
    tokio::time::sleep(Duration::from_secs(2)).await;
    daemon.kill();
    store.again().await;
    let daemon = over(&grpc, "grpc", &scene);
    cursor_at(&scene, &daemon, first + EVENTS / 2 - 1).await;
    daemon.kill();
    import(first + EVENTS / 2, EVENTS / 2, &client).await;
    tokio::time::sleep(Duration::from_millis(900)).await;
    server.kill();
    let daemon = over(&http, "http/protobuf", &scene);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let server = Server::start_at(&scene.data(), &scene.scratch.path().join("keys"), scene.port).await;
    cursor_at(&scene, &daemon, first + EVENTS - 1).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(daemon.stop(), 0);
    server.kill();

    let spans = store.spans().await;
    let text = |span: &Value, name: &str| span[name].as_str().unwrap_or_default().to_owned();
    let id_of = |span: &Value| span["attributes"]["inner_universe.event.id"].as_str().map(str::to_owned);
    let mut calls: BTreeMap<String, String> = BTreeMap::new();
    for span in spans.iter().filter(|span| id_of(span).is_none()) {
        calls.insert(text(span, "span_id"), text(span, "trace_id"));
    }
    let mut events: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for span in &spans {
        let Some(id) = id_of(span) else { continue };
        assert_eq!(calls.get(&text(span, "parent_span_id")), Some(&text(span, "trace_id")), "{id}");
        if let Some(n) = id.strip_prefix("imported-") {
            // Integers come back as texts.
            assert_eq!(span["attributes"]["inner_universe.event.sequence"], n);
            assert_eq!(span["attributes"]["inner_universe.data.n"], n);
        }
        events.entry(id).or_default().insert(text(span, "span_id"));
    }
    assert!(events.values().all(|spans| spans.len() == 1), "an event has several spans");
    let ids: BTreeSet<_> = events.values().flatten().collect();
    assert_eq!(ids.len(), events.len(), "two events share a span");
    for sequence in first..first + EVENTS {
        assert!(events.contains_key(&format!("imported-{sequence}")), "{sequence} is missing of {}", events.len());
    }
    let logged = store.get("/api/stats").await.expect("figures")["log_count"].as_u64().expect("a number");
    assert!(logged >= EVENTS, "{logged} log records");
    let names = store.get("/api/metrics/names").await.expect("names").to_string();
    assert!(names.contains("inner_universe.events.sent") && names.contains("inner_universe.archive.offset"), "{names}");
}
