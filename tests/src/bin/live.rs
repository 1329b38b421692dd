//! The benchmark of the daemon beside a real server: how far the archive lags, what the server's throughput loses, how much
//! memory it takes, and how soon it goes on after a kill.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "a benchmark measures and prints")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use harness::daemon::Daemon;
use harness::measure::peak_mib;
use harness::s3::{ACCESS_KEY, BUCKET, Proxy, S3, SECRET_KEY};
use harness::server::Server;
use harness::sidecar::Sidecar;
use harness::tools;
use harness::workload::Random;
use inner_universe::config::RepositoryConfig;
use inner_universe::repository::Repository;
use inner_universe::repository::crypto::Keyring;
use inner_universe::repository::log_object::LogHeader;
use serde_json::json;

const ROUNDS: usize = 3;
const RATE: u64 = 2000;
const CLIENTS: u64 = 8;

#[tokio::main]
async fn main() {
    let seconds: u64 = std::env::args().nth(1).map_or(20, |text| text.parse().expect("seconds"));
    let scratch = tempfile::tempdir().expect("a directory");
    let (data, keys, repository) =
        (scratch.path().join("data"), scratch.path().join("keys"), scratch.path().join("repository"));
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    let sidecar = Sidecar::at(&repository);
    let settings =
        [("ARCHIVE__FLUSH_INTERVAL", "1s"), ("ARCHIVE__COMPACTION", "false"), ("REPOSITORY__LEASE_DURATION", "3s")];

    let mut daemon = Daemon::start(&sidecar, &data, &settings, &[]);
    daemon.wait("the database", |status| !status.databases.is_empty());
    println!("{RATE} transactions a second for {seconds} s");
    let calls = load(&client, seconds, Some(RATE)).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let memory = peak_mib(daemon.pid());
    let lags = lags(&repository);

    println!("restarts after a kill");
    let mut resumed = Vec::new();
    for _ in 0..5 {
        let reached =
            daemon.status().and_then(|status| status.databases.first()?.archived_offset).map_or(0, |offset| offset.0);
        daemon.kill();
        load(&client, 1, Some(100)).await;
        let started = Instant::now();
        daemon = Daemon::start_with(&sidecar, &data, &settings, &["--force"], &[]);
        daemon.wait_archived(reached + 1);
        resumed.push(started.elapsed().as_secs_f64());
    }
    assert_eq!(daemon.stop(), 0);
    let on_s3 = lags_on_s3(&client, &data, &settings, seconds).await;

    println!("throughput with and without the sidecar, {ROUNDS} rounds");
    let mut ratios = Vec::new();
    for _ in 0..ROUNDS {
        let without = load(&client, seconds / 2, None).await;
        let mut daemon = Daemon::start_with(&sidecar, &data, &settings, &["--force"], &[]);
        daemon.wait("the database", |status| status.databases.iter().any(|found| found.archived_offset.is_some()));
        let with = load(&client, seconds / 2, None).await;
        assert_eq!(daemon.stop(), 0);
        ratios.push(with as f64 / without as f64);
    }
    ratios.sort_by(f64::total_cmp);
    let mut text = String::from("# Benchmarks of the daemon\n\n");
    let _ = writeln!(
        text,
        "Written by `cargo xtask bench live`: a real server, `inner-universe run` beside it with a flush interval of 1 s into a \
         directory, {CLIENTS} clients on the same {} cores.\n",
        std::thread::available_parallelism().map_or(0, usize::from)
    );
    text += "| what | figure |\n|---|---|\n";
    for (store, lags) in [("in a directory", Some(lags)), ("on S3 (s3s-fs, on the same machine)", on_s3)] {
        let Some(lags) = lags else { continue };
        let at = |share: f64| lags[((lags.len() - 1) as f64 * share) as usize] * 1000.0;
        let _ = writeln!(
            text,
            "| lag from a commit's own time to its object durable {store}, at {} transactions a second: median | {:.0} ms |",
            calls / seconds,
            at(0.5)
        );
        let _ =
            writeln!(text, "| its 99th percentile (target: flush interval + 250 ms = 1250 ms) | {:.0} ms |", at(0.99));
        let _ = writeln!(text, "| its most | {:.0} ms |", at(1.0));
    }
    let _ = writeln!(text, "| peak resident memory meanwhile | {memory:.0} MiB |");
    let _ = writeln!(
        text,
        "| from start after a kill to the first new transaction archived, {} times | {:.2} to {:.2} s |",
        resumed.len(),
        resumed.iter().copied().fold(f64::MAX, f64::min),
        resumed.iter().copied().fold(0.0, f64::max)
    );
    let _ = writeln!(
        text,
        "| throughput of the server with the sidecar over without, median of {ROUNDS} | {:.3} ({:.3} to {:.3}) |",
        ratios[ROUNDS / 2],
        ratios[0],
        ratios[ROUNDS - 1]
    );
    println!("{text}");
    let docs = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs/benchmarks-live.md");
    std::fs::write(docs, text).expect("write docs/benchmarks-live.md");
    server.kill();
}

/// Calls from several clients, as fast as they go or at a rate; returns how many succeeded.
async fn load(client: &harness::client::Client, seconds: u64, rate: Option<u64>) -> u64 {
    let (stop, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let started = Instant::now();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|n| {
            let (client, stop, calls) = (client.at(client.url()), Arc::clone(&stop), Arc::clone(&calls));
            tokio::spawn(async move {
                let mut random = Random::new(n);
                let mut own = 0;
                while !stop.load(Ordering::Relaxed) {
                    if let Some(rate) = rate {
                        let due = Duration::from_secs_f64(own as f64 * CLIENTS as f64 / rate as f64);
                        tokio::time::sleep(due.saturating_sub(started.elapsed())).await;
                    }
                    own += 1;
                    let note = format!("{:0200}", random.draw());
                    if client.call("ledger", "put_note", json!([random.below(1000), note])).await.is_ok() {
                        calls.fetch_add(1, Ordering::Relaxed);
                    }
                }
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        client.await.expect("a client");
    }
    calls.load(Ordering::Relaxed)
}

/// For every object: how long its first commit waited, from the server's own time to the object's on the disk; sorted.
fn lags(repository: &Path) -> Vec<f64> {
    let mut lags = Vec::new();
    let mut dirs = vec![repository.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).expect("list").flatten() {
            let path = entry.path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|extension| extension == "iulog") {
                let written = entry.metadata().and_then(|kind| kind.modified()).expect("its time");
                lags.extend(lag(&std::fs::read(&path).expect("read"), written));
            }
        }
    }
    lags.sort_by(f64::total_cmp);
    lags
}

/// The same into an S3 server that is not there yet; the time is that of the server's answer. `None` without the server.
async fn lags_on_s3(
    client: &harness::client::Client,
    data: &Path,
    settings: &[(&str, &str)],
    seconds: u64,
) -> Option<Vec<f64>> {
    let server = S3::s3s().await?;
    let proxy = Proxy::before(&server).await;
    let sidecar = Sidecar::with(&format!("s3://{BUCKET}/live")).configured(harness::s3::settings(
        &proxy.endpoint,
        ACCESS_KEY,
        SECRET_KEY,
    ));
    let mut daemon = Daemon::start(&sidecar, data, settings, &[]);
    daemon.wait("the database", |status| status.databases.iter().any(|found| found.archived_offset.is_some()));
    println!("{RATE} transactions a second into S3");
    let before = proxy.written().len();
    load(client, seconds, Some(RATE)).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let config = RepositoryConfig {
        endpoint: Some(server.endpoint.clone()),
        region: Some("us-east-1".into()),
        access_key_id: Some(ACCESS_KEY.to_owned().try_into().expect("a key")),
        secret_access_key: SECRET_KEY.to_owned().try_into().ok(),
        ..RepositoryConfig::default()
    };
    let repository = Repository::open(&sidecar.repository, &config, Keyring::default()).await.expect("open");
    let mut lags = Vec::new();
    for (path, written) in proxy.written().split_off(before) {
        if let Some(key) = path.strip_prefix(&format!("/{BUCKET}/live/")).filter(|key| key.ends_with(".iulog")) {
            lags.extend(lag(&repository.get(&key.into()).await.expect("an object"), written));
        }
    }
    assert_eq!(daemon.stop(), 0);
    lags.sort_by(f64::total_cmp);
    Some(lags)
}

fn lag(object: &[u8], written: std::time::SystemTime) -> Option<f64> {
    let header = LogHeader::parse(object).expect("a header");
    let written = written.duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs_f64();
    Some(written - header.times.first? as f64 / 1e6)
}
