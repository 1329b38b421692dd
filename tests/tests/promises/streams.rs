//! What reaches a collector besides the bundled module's events: reducer calls of any database, what modules log, the
//! module's status, measurements and versions, and the sidecar's own work.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use harness::client::some;
use harness::collector::{Certified, Collector, Span, Taken};
use harness::daemon::Daemon;
use harness::server::Server;
use harness::sidecar::{Sidecar, path};
use harness::tools;
use harness::workload::{Random, TABLES, next_call};
use inner_universe::clock::SystemClock;
use inner_universe::config::{OtlpProtocol, TelemetryConfig};
use inner_universe::ids::Identity;
use inner_universe::observe::module_logs::ModuleLogs;
use serde_json::json;

/// Waits until what was taken is as it should be.
async fn until(collector: &Collector, daemon: &Daemon, what: &str, there: impl Fn(&Taken) -> bool) -> Taken {
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        let taken = collector.taken();
        if there(&taken) {
            return taken;
        }
        assert!(Instant::now() < deadline, "{what}: {}", daemon.log());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Calls of a database by reducer, each span once.
fn calls(taken: &Taken, database: &str) -> BTreeMap<String, usize> {
    let mut seen = BTreeSet::new();
    let mut found = BTreeMap::new();
    for span in &taken.spans {
        let is_call = span.attributes.contains_key("inner_universe.transaction.offset");
        if is_call && span.attributes["db.namespace"] == database && seen.insert(&span.id) {
            *found.entry(span.name.clone()).or_default() += 1;
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn every_call_of_any_database_is_a_span_through_outages_kills_and_a_restore() {
    let scratch = tempfile::tempdir().expect("a directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let sidecar = Sidecar::at(&scratch.path().join("repository"));
    let collector = Collector::start().await;
    let settings = [
        ("TELEMETRY__OTLP_ENDPOINT", collector.grpc.as_str()),
        ("TELEMETRY__OTLP_PROTOCOL", "grpc"),
        ("TELEMETRY__OTLP_TIMEOUT", "2s"),
        ("ARCHIVE__FLUSH_INTERVAL", "100ms"),
        ("REPOSITORY__LEASE_DURATION", "3s"),
    ];
    let mut random = Random::from_env();
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    // Calls that fail leave nothing in the log.
    let mut made: BTreeMap<String, usize> = BTreeMap::new();
    let mut random_calls = async |client: &harness::client::Client, count: usize| {
        for _ in 0..count {
            let (reducer, arguments) = next_call(&mut random);
            if client.call("ledger", reducer, arguments).await.is_ok() {
                *made.entry(reducer.to_owned()).or_default() += 1;
            }
        }
        made.clone()
    };
    let reducers = |taken: &Taken, made: &BTreeMap<String, usize>| {
        let mut found = calls(taken, "ledger");
        found.retain(|reducer, _| made.contains_key(reducer));
        found
    };
    random_calls(&client, 200).await;
    let daemon = Daemon::start(&sidecar, &data, &settings, &[]);
    let before = random_calls(&client, 100).await;
    until(&collector, &daemon, "calls from before and after the start", |taken| reducers(taken, &before) == before)
        .await;

    collector.set_down(true);
    random_calls(&client, 100).await;
    let deadline = Instant::now() + Duration::from_secs(60);
    while collector.refused() == 0 {
        assert!(Instant::now() < deadline, "nothing was sent: {}", daemon.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    daemon.kill();
    let during = random_calls(&client, 50).await;
    collector.set_down(false);
    let daemon = Daemon::start_with(&sidecar, &data, &settings, &["--force"], &[]);
    let taken = until(&collector, &daemon, "calls from an outage", |taken| reducers(taken, &during) == during).await;
    for span in taken.spans.iter().filter(|span| span.attributes.contains_key("inner_universe.transaction.offset")) {
        assert_eq!(span.attributes["db.system.name"], "spacetimedb");
        assert_eq!(span.attributes["db.operation.name"], span.name);
        if span.name == "put_note" {
            assert_eq!(span.attributes["inner_universe.caller.identity"], client.identity);
        }
    }
    check_order(&taken.spans);

    // A restore takes calls back; others come in their place, and none is missing.
    server.written().await;
    let point = sidecar.run(["backup", "create", "--data-dir", path(&data)]).ok();
    let rows = client.rows("ledger", &TABLES).await;
    random_calls(&client, 50).await;
    let all = random_calls(&client, 1).await;
    until(&collector, &daemon, "calls that are taken back", |taken| reducers(taken, &all) == all).await;
    assert_eq!(daemon.stop(), 0);
    server.kill();
    let id = point["restore_point"].as_str().expect("an id");
    sidecar.run(["restore", "--force", "--data-dir", path(&data), "--to", id]).ok();
    let server = Server::start(&data, &keys).await;
    let client = client.at(&server.url);
    assert_eq!(client.rows("ledger", &TABLES).await, rows);
    let daemon = Daemon::start_with(&sidecar, &data, &settings, &["--force"], &[]);
    let all = random_calls(&client, 100).await;
    until(&collector, &daemon, "calls after a restore", |taken| reducers(taken, &all) == all).await;
    assert!(daemon.log().contains("calls are sent from where histories part"), "{}", daemon.log());
    assert_eq!(daemon.stop(), 0);
    server.kill();
}

/// First sights of a database's calls come in the order of its log.
fn check_order(spans: &[Span]) {
    let mut seen = BTreeSet::new();
    let offsets: Vec<u64> = spans
        .iter()
        .filter(|span| seen.insert(span.id.clone()))
        .filter_map(|span| span.attributes.get("inner_universe.transaction.offset")?.parse().ok())
        .collect();
    assert!(offsets.is_sorted(), "out of order");
}

#[tokio::test(flavor = "multi_thread")]
async fn status_measurements_versions_and_logs_of_modules_and_the_sidecars_own_work_reach_the_collector() {
    let scratch = tempfile::tempdir().expect("a directory");
    let (data, keys, token) = (scratch.path().join("data"), scratch.path().join("keys"), scratch.path().join("token"));
    let sidecar = Sidecar::at(&scratch.path().join("repository"));
    let collector = Collector::start().await;
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("iu", tools::wasm("inner_universe_module")).await;
    std::fs::write(&token, &client.token).expect("the token");
    let port = server.url.rsplit(':').next().expect("a port").to_owned();
    let settings = [
        ("SPACETIMEDB_CONFIG__PORT", port.as_str()),
        ("SPACETIMEDB_CONFIG__DATABASE", "iu"),
        ("SPACETIMEDB_CONFIG__TOKEN_FILE", path(&token)),
        ("TELEMETRY__OTLP_ENDPOINT", collector.http.as_str()),
        ("TELEMETRY__STATUS_INTERVAL", "1s"),
        ("ARCHIVE__FLUSH_INTERVAL", "100ms"),
        ("HTTP__LISTEN", "127.0.0.1:0"),
    ];
    client
        .call("iu", "record_metric", json!(["queue", 3.5, "ms", [{"name": "zone", "value": {"String": "a"}}]]))
        .await
        .expect("record");
    let mut daemon = Daemon::start(&sidecar, &data, &settings, &[]);
    client.call("iu", "create_entity", json!(["sun", "star", "{\"mass\": 1}"])).await.expect("create");
    client.call("iu", "update_entity", json!(["sun", "{\"mass\": 2}"])).await.expect("update");
    client
        .call("iu", "record_metric", json!(["queue", 4.5, "ms", [{"name": "zone", "value": {"String": "a"}}]]))
        .await
        .expect("record");
    client
        .call("iu", "record_event", json!(["PLACED", some("test"), some("order-7"), {"Text": "hello"}]))
        .await
        .expect("record");

    let named = |taken: &Taken, name: &str| {
        let logs = taken
            .logs
            .iter()
            .filter(|(_, attributes, ..)| attributes.get("event.name").is_some_and(|found| found == name));
        logs.cloned().collect::<Vec<_>>()
    };
    let taken = until(&collector, &daemon, "measurements and versions", |taken| {
        named(taken, "metric").len() >= 2
            && named(taken, "state_version").len() >= 2
            && !named(taken, "module.log").is_empty()
    })
    .await;
    let measured = named(&taken, "metric");
    let values: Vec<_> =
        measured.iter().map(|(_, attributes, ..)| attributes["inner_universe.metric.value"].as_str()).collect();
    assert_eq!(values, ["3.5", "4.5"]);
    assert_eq!(measured[0].1["inner_universe.metric.label.zone"], "a");
    let versions = named(&taken, "state_version");
    let said: Vec<_> = versions.iter().map(|(body, ..)| body.as_str()).collect();
    assert_eq!(said, ["entity sun version 1: create", "entity sun version 2: update"]);
    assert_eq!(versions[1].1["inner_universe.subject.data"], "{\"mass\": 2}");
    // What the module itself logs, as the server's interface tells it.
    let logs = client.logs("iu").await;
    let bodies: Vec<String> = named(&taken, "module.log").into_iter().map(|(body, ..)| body).collect();
    assert!(!bodies.is_empty() && logs.len() >= bodies.len());
    assert_eq!(bodies, logs[..bodies.len()]);

    // A version is told within the trace of the call that made it.
    let taken = until(&collector, &daemon, "the call that made a version", |taken| {
        taken.spans.iter().any(|span| span.id == versions[1].3 && span.trace == versions[1].2)
    })
    .await;
    let call = taken.spans.iter().find(|span| span.id == versions[1].3).expect("the call");
    assert_eq!(call.name, "update_entity");
    // So is an event whose caller chose the trace.
    let taken = until(&collector, &daemon, "the order", |taken| {
        let placed = taken.spans.iter().find(|span| span.name == "PLACED");
        placed.is_some_and(|placed| {
            taken.spans.iter().any(|span| span.id == placed.parent && span.name == "record_event")
        })
    })
    .await;
    let placed = taken.spans.iter().find(|span| span.name == "PLACED").expect("the order");
    assert_eq!(placed.attributes["inner_universe.correlation_id"], "order-7");

    // Status and measurements as metrics.
    let address = daemon.wait_http();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let text = harness::client::http().get(format!("{address}/metrics")).send().await.expect("metrics");
        let text = text.text().await.expect("a text");
        let has = |line: &str| text.lines().any(|found| found == line);
        let status = client.sql("iu", "select * from system_status").await;
        let events = status[0][6].as_u64().expect("a number");
        let told = has("inner_universe_module_entities 1")
            && has("inner_universe_module_relations 0")
            && has("inner_universe_module_state 1")
            && has(&format!("inner_universe_module_events {events}"))
            && text.lines().any(|line| {
                line.starts_with("inner_universe_module_metric{")
                    && line.ends_with(" 4.5")
                    && line.contains("label_zone=\"a\"")
            });
        if told {
            break;
        }
        assert!(Instant::now() < deadline, "{text}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    // The sidecar's own work: from the commit to the object, and what it said meanwhile.
    client.call("iu", "create_entity", json!(["moon", "moon", "{}"])).await.expect("create");
    sidecar.run(["backup", "create", "--data-dir", path(&data)]).ok();
    // A span is sent when it ends, so the outermost comes last.
    let chain = |taken: &Taken| {
        let above = |span: &Span| taken.spans.iter().find(|found| found.id == span.parent).cloned();
        taken.spans.iter().filter(|span| span.name == "put").find_map(|put| {
            let archive = above(put).filter(|archive| archive.name == "archive")?;
            Some((put.clone(), above(&archive)?, archive))
        })
    };
    let made = |taken: &Taken| taken.spans.iter().any(|span| span.name == "restore point");
    let taken = until(&collector, &daemon, "our own spans", |taken| made(taken) && chain(taken).is_some()).await;
    let (put, whole, archive) = chain(&taken).expect("an object was written below `archive`");
    assert_eq!((whole.name.as_str(), whole.parent.as_str()), ("commit to object", ""));
    assert!(whole.trace == put.trace && archive.trace == put.trace);
    assert!(whole.start <= archive.start, "it begins with the commit");
    assert_eq!(whole.attributes["db.namespace"], "iu");
    assert!(put.attributes["key"].ends_with(".iulog"));
    assert_eq!(put.attributes["outcome"], "ok");
    assert_eq!(daemon.stop(), 0);
    let taken = collector.taken();
    assert!(taken.logs.iter().any(|(body, ..)| body.contains("told to stop")), "the log up to its end");
    server.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn log_lines_are_json_on_demand_and_name_their_trace() {
    let scratch = tempfile::tempdir().expect("a directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let repository = scratch.path().join("repository");
    let sidecar = Sidecar::at(&repository);
    let collector = Collector::start().await;
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    let settings = [("TELEMETRY__OTLP_ENDPOINT", collector.http.as_str()), ("ARCHIVE__FLUSH_INTERVAL", "100ms")];
    let flags = ["--log-format", "json"];
    let mut daemon = Daemon::start_with(&sidecar, &data, &settings, &flags, &[]);
    daemon.wait("the archive", |status| status.databases.iter().any(|found| found.archived_offset.is_some()));
    // A failure inside a piece of work: nothing can be written there any more.
    let damaged = scratch.path().join("away");
    std::fs::rename(&repository, &damaged).expect("move the repository away");
    std::fs::write(&repository, "in the way").expect("write");
    let mut random = Random::from_env();
    harness::workload::run(&client, "ledger", &mut random, 20).await;
    let failed = |taken: &Taken| taken.spans.iter().any(|span| span.name == "archive" && span.failed);
    let taken = until(&collector, &daemon, "a failed span", failed).await;
    let failed = taken.spans.iter().find(|span| span.name == "commit to object" && span.failed).expect("its whole");
    std::fs::remove_file(&repository).expect("remove");
    std::fs::rename(&damaged, &repository).expect("move back");
    daemon.wait("the archive", |status| status.databases.iter().all(|found| found.error.is_none()));
    assert_eq!(failed.trace.len(), 32);
    sidecar.run(["backup", "create", "--data-dir", path(&data)]).ok();
    assert_eq!(daemon.stop(), 0);
    let lines = std::fs::read_to_string(sidecar.state_dir().join("daemon.log")).expect("the log");
    let parse = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    let lines: Vec<serde_json::Value> = lines.lines().map(parse).collect();
    assert!(lines.iter().all(|line| line["timestamp"].is_string() && line["level"].is_string()), "{lines:?}");
    // The same trace in the line, in the log record and in the span.
    let said = "a restore point was made";
    let line = lines.iter().rfind(|line| line["message"] == said).expect("the line");
    let trace = line["span"]["trace_id"].as_str().expect("a trace");
    let taken = collector.taken();
    assert!(taken.logs.iter().any(|(body, _, of, _)| body == said && of == trace), "no record within {trace}");
    assert!(taken.spans.iter().any(|span| span.name == "restore point" && span.trace == trace));
    server.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn under_tls_only_a_collector_that_is_trusted_gets_anything_and_sampling_takes_whole_traces() {
    let scratch = tempfile::tempdir().expect("a directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let certified = Certified::new().expect("a certificate");
    let authority = scratch.path().join("authority.pem");
    std::fs::write(&authority, &certified.certificate).expect("write");
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("iu", tools::wasm("inner_universe_module")).await;
    let token = scratch.path().join("token");
    std::fs::write(&token, &client.token).expect("the token");
    let port = server.url.rsplit(':').next().expect("a port").to_owned();
    for n in 0..300 {
        let data = json!({"Custom": [{"name": "n", "value": {"UInt": n}}]});
        let correlation = some(format!("trace-{}", n / 2));
        client.call("iu", "record_event", json!(["RECORDED", some("test"), correlation, data])).await.expect("record");
    }
    for protocol in ["grpc", "http/protobuf"] {
        let collector = Collector::start_tls(&certified).await;
        let endpoint = if protocol == "grpc" { &collector.grpc } else { &collector.http };
        let settings = [
            ("SPACETIMEDB_CONFIG__PORT", port.as_str()),
            ("SPACETIMEDB_CONFIG__DATABASE", "iu"),
            ("SPACETIMEDB_CONFIG__TOKEN_FILE", path(&token)),
            ("TELEMETRY__OTLP_ENDPOINT", endpoint),
            ("TELEMETRY__OTLP_PROTOCOL", protocol),
            ("TELEMETRY__OTLP_TIMEOUT", "2s"),
            ("TELEMETRY__TRACE_RATIO", "0.5"),
        ];
        let fresh = Sidecar::at(&scratch.path().join(format!("repository-{}", &protocol[..4])));
        let daemon = Daemon::start(&fresh, &data, &settings, &[]);
        let deadline = Instant::now() + Duration::from_secs(60);
        while !daemon.log().contains("the event stream waits") {
            assert!(Instant::now() < deadline, "{}", daemon.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(daemon.stop(), 0);
        let taken = collector.taken();
        assert!(taken.spans.is_empty() && taken.logs.is_empty(), "{protocol}: it was sent to who is not trusted");

        let trusted = [&settings[..], &[("TELEMETRY__OTLP_CA_FILE", path(&authority))]].concat();
        let daemon = Daemon::start(&fresh, &data, &trusted, &[]);
        let sequence = "inner_universe.event.sequence";
        let records =
            |taken: &Taken| taken.logs.iter().filter(|(_, attributes, ..)| attributes.contains_key(sequence)).count();
        let all = client.sql("iu", "select * from event_log").await.len();
        until(&collector, &daemon, "a log record of every event", |taken| records(taken) >= all).await;
        // The calls come from another stream.
        let complete = |taken: &Taken| {
            let ids: BTreeSet<_> = taken.spans.iter().map(|span| &span.id).collect();
            let events = taken.spans.iter().filter(|span| span.name == "RECORDED").collect::<Vec<_>>();
            !events.is_empty() && events.iter().all(|span| ids.contains(&span.parent))
        };
        let taken = until(&collector, &daemon, "the calls", complete).await;
        let mut traces: BTreeMap<&str, usize> = BTreeMap::new();
        for span in taken.spans.iter().filter(|span| span.name == "RECORDED") {
            *traces.entry(&span.trace).or_default() += 1;
        }
        assert!((40..110).contains(&traces.len()), "{protocol}: {} of 150 traces", traces.len());
        assert!(traces.values().all(|events| *events == 2), "{protocol}: a part of a trace");
        assert_eq!(daemon.stop(), 0);
    }
    server.kill();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_line_that_is_refused_costs_no_other() {
    let certified = Certified::new().expect("a certificate");
    let scratch = tempfile::tempdir().expect("a directory");
    let (logs, ca) = (scratch.path().join("logs"), scratch.path().join("ca.pem"));
    std::fs::create_dir(&logs).expect("a directory");
    std::fs::write(&ca, &certified.certificate).expect("write the certificate");
    let lines: String = (0..600).map(|n| format!("line {n}\n")).collect();
    std::fs::write(logs.join("2026-05-01.log"), lines).expect("write a log");
    for protocol in [OtlpProtocol::Grpc, OtlpProtocol::Http] {
        let collector = Collector::start_tls(&certified).await;
        collector.refuse_record("line 417");
        let endpoint = if protocol == OtlpProtocol::Grpc { &collector.grpc } else { &collector.http };
        let config = TelemetryConfig {
            otlp_endpoint: Some(endpoint.clone()),
            otlp_protocol: Some(protocol),
            otlp_ca_file: Some(ca.clone()),
            ..TelemetryConfig::default()
        };
        let state = scratch.path().join(format!("{protocol:?}"));
        std::fs::create_dir(&state).expect("a directory");
        let streams = std::sync::Arc::new(
            ModuleLogs::new(&config, "test", &state, std::sync::Arc::new(SystemClock)).expect("a stream"),
        );
        let following = streams.follow("iu".into(), Identity([7; 32]), logs.clone(), Default::default());
        let following = tokio::spawn(following);
        let deadline = Instant::now() + Duration::from_secs(60);
        while collector.taken().logs.len() < 599 {
            assert!(Instant::now() < deadline, "{} lines came over {protocol:?}", collector.taken().logs.len());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let expected: Vec<_> = (0..600).filter(|n| *n != 417).map(|n| format!("line {n}")).collect();
        let found: Vec<_> = collector.taken().logs.into_iter().map(|(body, ..)| body).collect();
        assert_eq!(found, expected, "{protocol:?}: each once and in order");
        following.abort();
    }
}
