//! The benchmark of a disaster: how long until the database serves again, from our repository and from a cold copy.
//! `serving [MiB] [ROUNDS]`.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "a benchmark measures and prints")]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use harness::bench::log::size;
use harness::client::{Client, Rows};
use harness::measure::{measure, median};
use harness::server::Server;
use harness::sidecar::{Sidecar, path};
use harness::tools;
use harness::workload::{Random, TABLES};
use serde_json::{Value, json};

const CLIENTS: u64 = 8;
const TEXT: usize = 4000;

#[tokio::main]
async fn main() {
    let number = |at: usize, otherwise: u64| {
        std::env::args().nth(at).map_or(otherwise, |text| text.parse().expect("a whole number"))
    };
    let (mib, rounds) = (number(1, 512), number(2, 3));
    let scratch = tempfile::tempdir().expect("a directory");
    let dir = |name: &str| scratch.path().join(name);
    let (data, keys, copy) = (dir("data"), dir("keys"), dir("copy"));
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    println!("a real server writes {mib} MiB");
    fill(&client, mib << 20).await;
    server.written().await;
    let rows = client.sql("ledger", COUNT).await;
    let truth = client.rows("ledger", &TABLES).await;
    let sidecar = Sidecar::at(&dir("repository"));
    let hot = measure(sidecar.command().args(["--quiet", "backup", "create", "--data-dir", path(&data)]));
    server.stop();
    let cold = measure(Command::new("cp").arg("-r").arg(&data).arg(&copy));
    let bytes = size(&data);

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 1..=rounds {
        println!("round {round} of {rounds}");
        std::fs::remove_dir_all(&data).expect("the disaster");
        let started = Instant::now();
        measure(sidecar.command().args(["--quiet", "restore", "--data-dir", path(&data)]));
        let restored = started.elapsed().as_secs_f64();
        ours.push((restored, serves(&data, &keys, &rows, &truth, started).await));
        std::fs::remove_dir_all(&data).expect("the disaster");
        let started = Instant::now();
        measure(Command::new("cp").arg("-r").arg(&copy).arg(&data));
        let copied = started.elapsed().as_secs_f64();
        theirs.push((copied, serves(&data, &keys, &rows, &truth, started).await));
    }
    let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(ours, theirs)| theirs.1 / ours.1).collect();
    let middle = |times: &[(f64, f64)], of: fn(&(f64, f64)) -> f64| median(&times.iter().map(of).collect::<Vec<_>>());
    let (low, high) = ratios.iter().fold((f64::MAX, 0.0f64), |(low, high), r| (low.min(*r), high.max(*r)));
    let text = format!(
        "# Benchmark of a disaster\n\nWritten by `cargo xtask bench serving`. A real server wrote {} MiB ({} rows in memory, a snapshot only of its first \
         transactions, so that it replays nearly all). Its data directory is deleted; then the time until it answers SQL again, {rounds} rounds in turn. \
         Ratio above 1: ours is faster. Ours is on the disk and has been read back; what `cp` wrote is still in memory, where the server reads it.\n\n\
         | from | backup s | server stopped for it s | restore s | serving after s | ratio | spread |\n|---|---|---|---|---|---|---|\n\
         | our repository | {:.2} | 0 | {:.2} | {:.2} | {:.2} | {low:.2} to {high:.2} |\n\
         | a cold copy (`cp -r`) | {:.2} | {:.2} | {:.2} | {:.2} | | |\n",
        bytes >> 20,
        rows.first().map(ToString::to_string).unwrap_or_default(),
        hot.seconds,
        middle(&ours, |times| times.0),
        middle(&ours, |times| times.1),
        median(&ratios),
        cold.seconds,
        cold.seconds,
        middle(&theirs, |times| times.0),
        middle(&theirs, |times| times.1),
    );
    println!("{text}");
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/benchmarks-serving.md");
    std::fs::write(docs, text).expect("write docs/benchmarks-serving.md");
}

const COUNT: &str = "SELECT COUNT(*) AS n FROM note";

/// Starts the server and asks until it tells what it held before.
async fn serves(data: &Path, keys: &Path, rows: &[Value], truth: &Rows, started: Instant) -> f64 {
    let server = Server::start(data, keys).await;
    let client = server.client().await;
    let answer = loop {
        if let Ok(answer) = client.try_sql("ledger", COUNT).await {
            break answer;
        }
        assert!(started.elapsed().as_secs() < 600, "it does not answer");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    let seconds = started.elapsed().as_secs_f64();
    assert_eq!(answer, rows, "it serves something else");
    assert!(client.rows("ledger", &TABLES).await == *truth, "it serves something else");
    server.stop();
    seconds
}

async fn fill(client: &Client, bytes: u64) {
    let left = Arc::new(AtomicU64::new(bytes / TEXT as u64));
    let clients: Vec<_> = (0..CLIENTS)
        .map(|n| {
            let (client, left) = (client.at(client.url()), Arc::clone(&left));
            tokio::spawn(async move {
                let mut random = Random::new(n);
                while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
                    let words: String = (0..TEXT / 20).map(|_| format!("{:020}", random.draw())).collect();
                    client.call("ledger", "put_note", json!([random.below(10_000), words])).await.expect("a call");
                }
            })
        })
        .collect();
    for client in clients {
        client.await.expect("a client");
    }
}
