//! The main job, told as a short story: write, back up while writing goes on, destroy everything, restore to an exact
//! transaction, compare every row. Exits non-zero on any difference.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "the demo measures and prints")]

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use harness::client::{Client, none, some};
use harness::server::Server;
use harness::sidecar::{Sidecar, path};
use harness::{oracle, tools};
use serde_json::{Value, json};

const DATABASE: &str = "inner-universe";
const TABLES: [&str; 11] = [
    "config",
    "event_log",
    "entity",
    "relation",
    "state_version",
    "client_connection",
    "admin",
    "metric",
    "system_status",
    "member",
    "sequence_counter",
];

#[tokio::main]
async fn main() -> ExitCode {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let sidecar = Sidecar::at(&scratch.path().join("repository"));

    println!("1. A SpacetimeDB server, and the Inner Universe module on it");
    let started = Instant::now();
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish(DATABASE, tools::wasm("inner_universe_module")).await;
    println!("   serving after {}", seconds(started));

    println!("2. Writing, without a pause until step 4");
    let writer = Writer::start(&client);
    writer.wait_for(600).await;
    println!("   {} transactions acknowledged so far", writer.count());

    println!("3. A hot backup while the writes go on");
    let report = sidecar.backup(&data);
    print_backup(&report);
    let acknowledged = writer.wait_for(writer.count() + 300).await;
    let writes = writer.stop().await;
    println!("4. The writer stopped after {writes} transactions; {acknowledged} were through when we looked");

    let truth = client.rows(DATABASE, &TABLES).await;
    let log = oracle::log_dir(&data, replica_of(&data));
    let target = oracle::last_offset(&log).expect("a transaction");
    println!("   the rows of now are kept aside to compare with: transaction {target}");

    println!("5. A mistake: every tenth entity is deleted; a second backup holds it too");
    for n in (0..100).step_by(10) {
        client.call(DATABASE, "delete_entity", json!([format!("entity-{n}")])).await.expect("delete an entity");
    }
    print_backup(&sidecar.backup(&data));
    assert_ne!(client.rows(DATABASE, &TABLES).await, truth, "the mistake must show");

    println!("6. kill -9, and the data directory with all its files is deleted");
    let destroyed = size_of(&data);
    server.kill();
    std::fs::remove_dir_all(&data).expect("destroy the data directory");
    println!("   {destroyed} bytes destroyed");

    println!("7. Restore to transaction {target}, just before the mistake");
    let disaster = Instant::now();
    let target_text = format!("offset:{target}");
    let report = sidecar.restore(&data, &target_text);
    println!(
        "   read {} bytes, wrote {} bytes in {} ms",
        report["bytes_read"], report["bytes_written"], report["duration_ms"]
    );
    let server = Server::start(&data, &keys).await;
    let client = client.at(&server.url);
    client.sql(DATABASE, "select * from system_status").await;
    println!("   a serving database {} after the order to restore", seconds(disaster));

    println!("8. Every row of every table, then and now");
    let restored = client.rows(DATABASE, &TABLES).await;
    let mut differences = 0;
    for table in TABLES {
        let same = truth[table] == restored[table];
        differences += usize::from(!same);
        println!("   {table:<18} {:>6} rows  {}", restored[table].len(), if same { "equal" } else { "DIFFERENT" });
    }
    let verify = sidecar.run(["verify"]);
    println!(
        "9. Verify: {} objects, {} bytes, exit code {}",
        verify.json["objects"], verify.json["bytes"], verify.code
    );
    client.call(DATABASE, "get_system_status", json!([])).await.expect("write to the restored database");
    server.stop();
    if differences > 0 || verify.code != 0 {
        println!("FAILED: {differences} tables differ");
        return ExitCode::FAILURE;
    }
    println!("Everything is as it was at transaction {target}.");
    ExitCode::SUCCESS
}

fn print_backup(report: &Value) {
    let database = &report["databases"][0];
    println!(
        "   restore point {} holds transactions 0 to {}: read {} bytes, wrote {} bytes in {} objects, {} ms",
        report["restore_point"].as_str().unwrap_or("?"),
        database["offset"],
        report["bytes_read"],
        report["bytes_written"],
        report["objects_written"],
        report["duration_ms"]
    );
}

/// Calls reducers one after another until it is told to stop.
struct Writer {
    count: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<()>,
}

impl Writer {
    fn start(client: &Client) -> Self {
        let (count, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let task = {
            let (client, count, stop) = (client.clone(), Arc::clone(&count), Arc::clone(&stop));
            tokio::spawn(async move {
                let mut n = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let (reducer, arguments) = call(n);
                    let result = client.call(DATABASE, reducer, arguments).await;
                    result.unwrap_or_else(|error| panic!("{reducer}: {error}"));
                    n += 1;
                    count.store(n, Ordering::Relaxed);
                }
            })
        };
        Self { count, stop, task }
    }

    fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    async fn wait_for(&self, n: u64) -> u64 {
        while self.count() < n && !self.task.is_finished() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        self.count()
    }

    async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.expect("the writer");
        self.count.load(Ordering::Relaxed)
    }
}

/// First entities, then a mixture of everything.
fn call(n: u64) -> (&'static str, Value) {
    let entity = |n: u64| format!("entity-{}", n % 100);
    if n < 100 {
        return ("create_entity", json!([entity(n), "star", format!("{{\"magnitude\":{n}}}")]));
    }
    match n % 4 {
        0 => ("update_entity", json!([entity(n / 4), format!("{{\"magnitude\":{n},\"note\":\"über α 🚀\"}}")])),
        1 => ("create_relation", json!([format!("relation-{n}"), entity(n), entity(n + 7), "orbits", "{}"])),
        2 => ("record_event", json!(["OBSERVED", some(entity(n)), none(), {"Text": format!("observation {n}")}])),
        _ => ("record_metric", json!(["brightness", n as f64 / 3.0, "cd", []])),
    }
}

fn replica_of(data: &std::path::Path) -> u64 {
    let mut replicas = std::fs::read_dir(data.join("replicas")).expect("list replicas");
    let name = replicas.next().expect("a replica").expect("a replica").file_name();
    path(name.as_ref()).parse().expect("a replica's number")
}

fn size_of(path: &std::path::Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(path) else { return 0 };
    let size = |entry: std::fs::DirEntry| match entry.metadata() {
        Ok(kind) if kind.is_dir() => size_of(&entry.path()),
        Ok(kind) => kind.len(),
        Err(_) => 0,
    };
    entries.flatten().map(size).sum()
}

fn seconds(since: Instant) -> String {
    format!("{:.2} s", since.elapsed().as_secs_f64())
}
