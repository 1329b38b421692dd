//! Looking writes nothing: a database that only the sidecar looks at gains no transaction.

use std::time::{Duration, Instant};

use harness::client::some;
use harness::collector::Collector;
use harness::daemon::Daemon;
use harness::server::Server;
use harness::sidecar::{Sidecar, path};
use harness::tools;
use inner_universe::config::RepositoryConfig;
use inner_universe::repository::Repository;
use inner_universe::repository::crypto::Keyring;
use inner_universe::repository::manifest::RestorePoint;
use serde_json::json;

/// Restore points that are made while nobody but the sidecar looks.
const ROUNDS: usize = 4;

async fn restore_points(sidecar: &Sidecar) -> Vec<RestorePoint> {
    let repository = Repository::open(&sidecar.repository, &RepositoryConfig::default(), Keyring::default()).await;
    let repository = repository.expect("the repository");
    let mut points = Vec::new();
    for id in repository.restore_point_ids().await.expect("their ids") {
        points.push(repository.restore_point(id).await.expect("a restore point"));
    }
    points
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watched_database_that_is_idle_gains_no_transaction_and_its_restore_points_hold_checksums() {
    let scratch = tempfile::tempdir().expect("a directory");
    let (data, keys, token) = (scratch.path().join("data"), scratch.path().join("keys"), scratch.path().join("token"));
    let sidecar = Sidecar::at(&scratch.path().join("repository"));
    let collector = Collector::start().await;
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("iu", tools::wasm("inner_universe_module")).await;
    std::fs::write(&token, &client.token).expect("the token");
    client.call("iu", "create_entity", json!(["sun", "star", "{}"])).await.expect("create");
    client.call("iu", "record_metric", json!(["queue", 3.5, "ms", []])).await.expect("record");
    client.call("iu", "record_event", json!(["PLACED", some("t"), some("c"), {"Text": "x"}])).await.expect("record");
    let port = server.url.rsplit(':').next().expect("a port").to_owned();
    let settings = [
        ("SPACETIMEDB_CONFIG__PORT", port.as_str()),
        ("SPACETIMEDB_CONFIG__DATABASE", "iu"),
        ("SPACETIMEDB_CONFIG__TOKEN_FILE", path(&token)),
        ("TELEMETRY__OTLP_ENDPOINT", collector.http.as_str()),
        ("ARCHIVE__FLUSH_INTERVAL", "100ms"),
        ("SCHEDULE__RESTORE_POINT", "*/3 * * * * *"),
        ("HTTP__LISTEN", "127.0.0.1:0"),
    ];
    let mut daemon = Daemon::start(&sidecar, &data, &settings, &[]);
    let address = daemon.wait_http();
    // Everything that is opened once is open: streams have sent what there was, and a restore point was made.
    let deadline = Instant::now() + Duration::from_secs(120);
    loop {
        let taken = collector.taken();
        let sent =
            |name: &str| taken.logs.iter().any(|(_, found, ..)| found.get("event.name").is_some_and(|is| is == name));
        let is_followed =
            sent("metric") && sent("state_version") && taken.spans.iter().any(|span| span.name == "PLACED");
        if is_followed && !restore_points(&sidecar).await.is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "{}", daemon.log());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let mut before = Vec::new();
    while before != server.log_sizes() {
        before = server.log_sizes();
        assert!(Instant::now() < deadline, "the log grows and grows: {}", daemon.log());
        tokio::time::sleep(Duration::from_secs(3)).await;
    }
    let made = restore_points(&sidecar).await.len();
    let points = loop {
        let points = restore_points(&sidecar).await;
        if points.len() >= made + ROUNDS {
            break points;
        }
        assert!(Instant::now() < deadline + Duration::from_secs(60), "{}", daemon.log());
        let metrics = harness::client::http().get(format!("{address}/metrics")).send().await.expect("metrics");
        assert!(metrics.status().is_success());
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    assert_eq!(server.log_sizes(), before, "the log has grown: {}", daemon.log());
    let newest = points.last().expect("a restore point");
    let tables = &newest.promises.first().expect("a promise").tables;
    for name in ["entity", "event_log", "metric", "sequence_counter", "system_status"] {
        let table = tables.iter().find(|table| table.name == name).unwrap_or_else(|| panic!("{name}: {tables:?}"));
        assert!(table.hash.is_some() && table.rows > 0, "{table:?}");
    }
    assert_eq!(daemon.stop(), 0);
    server.kill();
}
