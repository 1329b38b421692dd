//! The benchmark of the event stream: events a second beside what the SDK alone delivers, and memory while a long backlog
//! waits for a collector that is out.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "a benchmark measures and prints")]

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::http::{StatusCode, Uri};
use harness::client::{Client, some};
use harness::daemon::Daemon;
use harness::measure::peak_mib;
use harness::server::Server;
use harness::sidecar::{Sidecar, path};
use harness::tools;
use inner_universe::daemon::state::FollowedStatus;
use inner_universe::module_bindings::{DbConnection, EventLogTableAccess as _};
use serde_json::json;
use spacetimedb_sdk::{DbContext as _, Table as _};

const ROUNDS: usize = 3;
/// Events of one comparison: the SDK keeps each of them in memory.
const COMPARED: u64 = 100_000;
/// A request with a thousand events is longer.
const SMALL: usize = 200_000;

/// A collector that takes or refuses everything and looks at nothing.
#[derive(Clone, Default)]
struct Sink {
    down: Arc<AtomicBool>,
    refused: Arc<AtomicU64>,
    /// When each thousand of events came, by their log records.
    thousands: Arc<Mutex<Vec<Instant>>>,
}

impl Sink {
    async fn start(&self) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("an address"));
        let sink = self.clone();
        let take = move |uri: Uri, body: Body| {
            let sink = sink.clone();
            async move {
                if sink.down.load(Ordering::SeqCst) {
                    sink.refused.fetch_add(1, Ordering::SeqCst);
                    return StatusCode::SERVICE_UNAVAILABLE;
                }
                let Ok(taken) = axum::body::to_bytes(body, 64 << 20).await else { return StatusCode::BAD_REQUEST };
                // The sidecar's own log records come in small requests.
                if uri.path() == "/v1/logs" && taken.len() > SMALL {
                    sink.thousands.lock().expect("times").push(Instant::now());
                }
                StatusCode::OK
            }
        };
        let router = axum::Router::new().fallback(take);
        tokio::spawn(async move { axum::serve(listener, router).await.expect("serve") });
        address
    }

    /// Waits until so many events have come, and says how many a second from the first thousand on.
    async fn rate(&self, due: u64) -> f64 {
        loop {
            let thousands = self.thousands.lock().expect("times").clone();
            if thousands.len() as u64 >= due / 1000
                && let (Some(first), Some(last)) = (thousands.first(), thousands.last())
            {
                return (thousands.len() as f64 - 1.0) * 1000.0 / (*last - *first).as_secs_f64();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::main]
async fn main() {
    let backlog: u64 = std::env::args().nth(1).map_or(1_200_000, |text| text.parse().expect("events"));
    let scratch = tempfile::tempdir().expect("a directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let token = scratch.path().join("token");
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("iu", tools::wasm("inner_universe_module")).await;
    std::fs::write(&token, &client.token).expect("the token");
    println!("writing {backlog} events of 600 bytes");
    let first = client.sql("iu", "select * from event_log").await.len() as u64 + 1;
    import(&client, first, backlog).await;
    let last = first + backlog - 1;

    let sink = Sink::default();
    let endpoint = sink.start().await;
    let port = server.url.rsplit(':').next().expect("a port").to_owned();
    let settings = [
        ("SPACETIMEDB_CONFIG__PORT", port.as_str()),
        ("SPACETIMEDB_CONFIG__DATABASE", "iu"),
        ("SPACETIMEDB_CONFIG__TOKEN_FILE", path(&token)),
        ("TELEMETRY__OTLP_ENDPOINT", endpoint.as_str()),
        ("REPOSITORY__LEASE_DURATION", "3s"),
    ];
    println!("a backlog, and the collector out");
    sink.down.store(true, Ordering::SeqCst);
    let sidecar = Sidecar::at(&scratch.path().join("repository"));
    let mut daemon = Daemon::start(&sidecar, &data, &settings, &[]);
    daemon.wait("the archive", |status| status.databases.iter().any(|found| found.archived_offset.is_some()));
    let before = sink.refused.load(Ordering::SeqCst);
    while sink.refused.load(Ordering::SeqCst) < before + 20 {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let waiting = peak_mib(daemon.pid());
    println!("the collector takes everything");
    sink.down.store(false, Ordering::SeqCst);
    let all = sink.rate(backlog).await;
    let sending = peak_mib(daemon.pid());
    assert_eq!(daemon.stop(), 0);

    let mut rates = Vec::new();
    for round in 0..ROUNDS {
        println!("round {} of {ROUNDS}", round + 1);
        let from = last - COMPARED.min(backlog);
        let sdk = sdk_alone(&server.url, &client.token, from, last).await;
        // As if everything before had been sent by an earlier run.
        let sidecar = Sidecar::at(&scratch.path().join(format!("repository-{round}")));
        let mut daemon = Daemon::start(&sidecar, &data, &[&settings[..3], &settings[4..]].concat(), &[]);
        // What is compared is the stream: the log is archived before, and calls are not read from it meanwhile.
        daemon.wait("the archive", |status| {
            let archived =
                |found: &FollowedStatus| found.archived_offset.is_some() && found.archived_offset == found.log_offset;
            status.last_restore_point.is_some() && status.databases.iter().all(archived)
        });
        assert_eq!(daemon.stop(), 0);
        set_cursor(&sidecar, from);
        let alone = [&settings[..], &[("TELEMETRY__CALLS", "false"), ("TELEMETRY__STATUS_INTERVAL", "0s")]].concat();
        sink.thousands.lock().expect("times").clear();
        let daemon = Daemon::start(&sidecar, &data, &alone, &[]);
        let ours = sink.rate(last - from).await;
        assert_eq!(daemon.stop(), 0);
        rates.push((sdk, ours));
    }
    rates.sort_by(|a, b| (a.1 / a.0).total_cmp(&(b.1 / b.0)));
    let ratio = |(sdk, ours): (f64, f64)| ours / sdk;
    let (sdk, ours) = rates[ROUNDS / 2];
    let mut text = String::from("# Benchmark of the event stream\n\n");
    let _ = writeln!(
        text,
        "Written by `cargo xtask bench events`: a real server with {backlog} events of 600 bytes, the release binary, a \
         collector that takes everything over OTLP/HTTP and looks at nothing, all on the same {} cores.\n",
        std::thread::available_parallelism().map_or(0, usize::from)
    );
    text += "| what | figure |\n|---|---|\n";
    let _ =
        writeln!(text, "| events a second that the SDK alone delivers, {COMPARED} in one subscription | {sdk:.0} |");
    let _ =
        writeln!(text, "| events a second from the server to the collector, as spans and log records | {ours:.0} |");
    let _ = writeln!(
        text,
        "| ratio, median of {ROUNDS} (target: at least 0.9) | {:.2} ({:.2} to {:.2}) |",
        ratio(rates[ROUNDS / 2]),
        ratio(rates[0]),
        ratio(rates[ROUNDS - 1])
    );
    let _ = writeln!(text, "| events a second through the whole backlog | {all:.0} |");
    let _ = writeln!(
        text,
        "| peak resident memory with the backlog and the collector out (target: at most 96 MiB) | {waiting:.0} MiB |"
    );
    let _ = writeln!(text, "| its peak once all was sent | {sending:.0} MiB |");
    println!("{text}");
    let docs = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/benchmarks-events.md");
    std::fs::write(docs, text).expect("write docs/benchmarks-events.md");
    server.kill();
}

/// Loads events, a thousand a call, each row about 600 bytes.
async fn import(client: &Client, from: u64, count: u64) {
    let filler = "x".repeat(470);
    let mut at = from;
    while at < from + count {
        let until = (at + 1000).min(from + count);
        let event = |sequence: u64| {
            json!({
                "sequence": sequence,
                "event_id": format!("imported-{sequence:012}"),
                "event_type": format!("IMPORTED_{}", sequence % 5),
                "source": some("bench"),
                "timestamp": {"__timestamp_micros_since_unix_epoch__": 1_700_000_000_000_000_i64 + sequence as i64},
                "correlation_id": format!("operation-{:08}", sequence / 3),
                "data": {"Text": filler},
            })
        };
        let events: Vec<_> = (at..until).map(event).collect();
        client.call("iu", "import_events", json!([events])).await.expect("import");
        at = until;
    }
}

/// Rows a second of one subscription, from asking until the last row was handed over.
async fn sdk_alone(url: &str, token: &str, after: u64, last: u64) -> f64 {
    let (url, token) = (url.to_owned(), token.to_owned());
    let rows = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&rows);
    let connect = move || {
        let builder = DbConnection::builder().with_uri(url).with_module_name("iu").with_token(Some(token));
        builder.build().expect("connect")
    };
    let connection = tokio::task::spawn_blocking(connect).await.expect("connect");
    connection.db().event_log().on_insert(move |_, event| {
        // What a consumer does at least: it takes the row.
        std::hint::black_box(event.clone());
        counted.fetch_add(1, Ordering::SeqCst);
    });
    connection.run_threaded();
    let started = Instant::now();
    let subscription = connection.subscription_builder().on_error(|_, error| panic!("{error}"));
    let _subscription = subscription.subscribe(format!("SELECT * FROM event_log WHERE sequence > {after}"));
    while rows.load(Ordering::SeqCst) < last - after {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let rate = (last - after) as f64 / started.elapsed().as_secs_f64();
    connection.disconnect().expect("disconnect");
    rate
}

fn set_cursor(sidecar: &Sidecar, sequence: u64) {
    let dirs = std::fs::read_dir(sidecar.state_dir()).expect("list").flatten().map(|entry| entry.path());
    let dir = dirs.filter(|path| path.is_dir()).last().expect("the daemon's notes");
    let hash = inner_universe::ids::ContentHash::of(b"iu").to_string();
    let cursor = json!({"sequence": sequence, "known": [[sequence, format!("imported-{sequence:012}")]]});
    std::fs::write(dir.join(format!("events-{}.json", &hash[..16])), cursor.to_string()).expect("write the cursor");
}
