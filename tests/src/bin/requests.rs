//! The benchmark of what an S3 bill counts: requests and bytes a day by flush interval, as a proxy before the store sees them.
//! `requests [SECONDS]` at the least for each interval.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "a benchmark measures and prints")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use harness::bench::log::size;
use harness::daemon::Daemon;
use harness::s3::{ACCESS_KEY, BUCKET, Proxy, S3, SECRET_KEY};
use harness::server::Server;
use harness::sidecar::Sidecar;
use harness::tools;
use harness::workload::Random;
use serde_json::json;

const DAY: f64 = 86_400.0;
/// S3 standard in us-east-1: USD a thousand of those that write or list, of those that read, and USD a GB and month.
const WRITES: f64 = 0.005;
const READS: f64 = 0.0004;
const STORED: f64 = 0.023;
const PAUSE: Duration = Duration::from_millis(20);

#[tokio::main]
async fn main() {
    let least: u64 = std::env::args().nth(1).map_or(120, |text| text.parse().expect("seconds"));
    let scratch = tempfile::tempdir().expect("a directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    let store = S3::s3s().await.expect("s3s-fs");
    let mut text = format!(
        "# What a bill counts\n\nWritten by `cargo xtask bench requests`: a real server that is written to all the time, the daemon with its defaults beside it, a \
         proxy before s3s-fs that counts. The counts of the time given, which begins {} s after the daemon's start, taken to a day; a month at S3's prices of {} USD a \
         million requests that write or list, {} USD a million that read, and {STORED} USD for each GB kept a month. Snapshots and exports are not in it.\n\n\
         | flush interval | seconds | requests | of these | requests a day | log MiB | stored MiB | stored GiB a day | USD a month, requests | USD a month, a day's log |\n\
         |---|---|---|---|---|---|---|---|---|---|\n",
        WARM.as_secs(),
        WRITES * 1000.0,
        READS * 1000.0,
    );
    for interval in [1, 10, 60] {
        let seconds = least.max(interval * 3);
        println!("flush interval {interval} s, for {seconds} s");
        let proxy = Proxy::before(&store).await;
        let settings = harness::s3::settings(&proxy.endpoint, ACCESS_KEY, SECRET_KEY);
        let sidecar = Sidecar::with(&format!("s3://{BUCKET}/every-{interval}")).configured(settings);
        let flush = format!("{interval}s");
        let mut daemon = Daemon::start(&sidecar, &data, &[("ARCHIVE__FLUSH_INTERVAL", &flush)], &[]);
        daemon.wait("the database", |status| status.databases.iter().any(|found| found.archived_offset.is_some()));
        write(&client, WARM).await;
        let (before, stored, log) = (proxy.kinds(), written(&daemon), size(&data.join("replicas")));
        write(&client, Duration::from_secs(seconds)).await;
        let (stored, log) = (written(&daemon) - stored, size(&data.join("replicas")) - log);
        let kinds: BTreeMap<_, _> = proxy
            .kinds()
            .into_iter()
            .map(|(kind, count)| (count - before.get(&kind).copied().unwrap_or(0), kind))
            .filter(|(count, _)| *count > 0)
            .map(|(count, kind)| (kind, count))
            .collect();
        assert_eq!(daemon.stop(), 0);
        let reads: u64 = ["GET", "HEAD"].iter().filter_map(|kind| kinds.get(*kind)).sum();
        let all: u64 = kinds.values().sum();
        let day = |count: f64| count * DAY / seconds as f64;
        let gib = day(stored as f64) / f64::from(1 << 30);
        let month = day(reads as f64) * 30.0 / 1000.0 * READS + day((all - reads) as f64) * 30.0 / 1000.0 * WRITES;
        let list: Vec<_> = kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
        let _ = writeln!(
            text,
            "| {interval} s | {seconds} | {all} | {} | {:.0} | {:.1} | {:.2} | {gib:.2} | {month:.2} | {:.2} |",
            list.join(", "),
            day(all as f64),
            log as f64 / f64::from(1 << 20),
            stored as f64 / f64::from(1 << 20),
            gib * STORED,
        );
    }
    harness::bench::report::write("benchmarks-requests.md", &text);
}

/// A start asks for more than it does later.
const WARM: Duration = Duration::from_secs(20);

/// Bytes that the daemon has written to the store.
fn written(daemon: &Daemon) -> u64 {
    daemon.status().map_or(0, |status| status.databases.iter().map(|database| database.bytes_written).sum())
}

async fn write(client: &harness::client::Client, length: Duration) {
    let (mut random, started) = (Random::new(1), std::time::Instant::now());
    while started.elapsed() < length {
        let note = format!("{:0200}", random.draw());
        client.call("ledger", "put_note", json!([random.below(1000), note])).await.expect("a call");
        tokio::time::sleep(PAUSE).await;
    }
}
