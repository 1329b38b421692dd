//! How time, memory and requests grow: with the log, with the databases, with the objects of a repository.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::bench::flushes::with_flushes;
use crate::bench::place::{Place, files};
use crate::bench::report::machine;
use crate::client::Client;
use crate::daemon::Daemon;
use crate::measure::{Measured, measure, peak_mib};
use crate::s3::{ACCESS_KEY, BUCKET, Proxy, S3, SECRET_KEY, settings};
use crate::server::Server;
use crate::sidecar::{Sidecar, path};
use crate::tools;

const LOGS: [f64; 5] = [0.25, 0.5, 1.0, 2.0, 4.0];
const DATABASES: [usize; 3] = [1, 10, 100];
const OBJECTS: [u64; 4] = [1_000, 10_000, 100_000, 1_000_000];

/// Rows that each database is filled with, and bytes of each.
const ROWS: u64 = 2000;
const ROW: u64 = 200;
/// How long each database is written to once a second.
const BUSY: u64 = 20;

/// All series, one after another.
pub fn all() -> String {
    let runtime = Runtime::new().expect("a runtime");
    let mut text = format!(
        "# How it grows\n\nWritten by `cargo xtask bench growth`, on {}. One run each: what counts is how a column grows, not its figures. Times are of \
         repositories in a directory; requests are what a proxy before an S3 server (s3s-fs) counted.\n\n## With the log\n\n\
         | log GiB | first backup s | MiB | requests | restore s | MiB | requests | verify s | MiB | requests | objects |\n|---|---|---|---|---|---|---|---|---|---|---|\n",
        machine()
    );
    for gib in LOGS {
        text += &log(&runtime, gib);
    }
    let _ = write!(
        text,
        "\n## With the databases\n\nOn one real server, each database with {ROWS} rows of {ROW} bytes and some transactions. Then the daemon runs for {BUSY} s with a \
         flush interval of 1 s, while every database is written to once a second.\n\n\
         | databases | first backup s | MiB | requests | backup of nothing new s | requests | restore s | MiB | requests | verify s | MiB | daemon MiB | requests a second | for each database |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for count in DATABASES {
        text += &runtime.block_on(databases(count));
    }
    text + &with_objects() + &with_flushes()
}

/// How a plan grows with the objects of a repository.
pub fn with_objects() -> String {
    let mut text = String::from(
        "\n## With the objects\n\n`restore --dry-run` over a repository with that many log objects (names only, which is what a plan reads), and how long its \
         listings of them took:\n\n| log objects | plan s | MiB | its listings s | without them s |\n|---|---|---|---|---|\n",
    );
    for count in OBJECTS {
        text += &objects(count);
    }
    text
}

/// What it takes, and what a proxy counts of the same over S3.
struct Counted {
    proxy: Proxy,
    sidecar: Sidecar,
    _server: S3,
}

impl Counted {
    async fn new() -> Self {
        let server = S3::s3s().await.expect("s3s-fs");
        let proxy = Proxy::before(&server).await;
        let sidecar = Sidecar::with(&format!("s3://{BUCKET}/ours"));
        let sidecar = sidecar.configured(settings(&proxy.endpoint, ACCESS_KEY, SECRET_KEY));
        Self { proxy, sidecar, _server: server }
    }

    fn requests(&self, work: impl FnOnce(&Sidecar) -> Measured) -> u64 {
        let before = self.proxy.requests();
        work(&self.sidecar);
        self.proxy.requests() - before
    }
}

fn log(runtime: &Runtime, gib: f64) -> String {
    let place = Place::of_log(gib);
    let sidecar = place.sidecar();
    let first = place.back_up(&sidecar);
    let restored = place.restore(&sidecar);
    place.assert_restored();
    place.clear(&["restored"]);
    let verified = place.verify(&sidecar);
    let counted = runtime.block_on(Counted::new());
    let backups = counted.requests(|sidecar| place.back_up(sidecar));
    let restores = counted.requests(|sidecar| place.restore(sidecar));
    let verifications = counted.requests(|sidecar| place.verify(sidecar));
    format!(
        "| {gib} | {} | {backups} | {} | {restores} | {} | {verifications} | {} |\n",
        cells(&first),
        cells(&restored),
        cells(&verified),
        files(&place.dir("repository")),
    )
}

fn cells(measured: &Measured) -> String {
    format!("{:.2} | {:.0}", measured.seconds, measured.peak_mib)
}

async fn databases(count: usize) -> String {
    println!("{count} databases");
    let scratch = tempfile::tempdir().expect("a directory");
    let dir = |name: &str| scratch.path().join(name);
    let (data, keys) = (dir("data"), dir("keys"));
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    let names: Vec<_> = (0..count).map(|n| format!("database-{n}")).collect();
    for (n, name) in names.iter().enumerate() {
        client.publish(name, tools::wasm("workload_module")).await;
        client.call(name, "fill", json!([0, ROWS, ROW, n])).await.expect("a call");
        write(&client, name, 20).await;
    }
    server.written().await;
    let sidecar = Sidecar::at(&dir("repository"));
    let back_up =
        |sidecar: &Sidecar| measure(sidecar.command().args(["--quiet", "backup", "create", "--data-dir", path(&data)]));
    let restore = |sidecar: &Sidecar| {
        let to = dir("restored");
        let measured = measure(sidecar.command().args(["--quiet", "restore", "--data-dir", path(&to)]));
        std::fs::remove_dir_all(&to).expect("remove it");
        measured
    };
    let (first, nothing) = (back_up(&sidecar), back_up(&sidecar));
    let restored = restore(&sidecar);
    let verified = measure(sidecar.command().args(["--quiet", "verify"]));
    let counted = Counted::new().await;
    let backups = counted.requests(back_up);
    let nothings = counted.requests(back_up);
    let restores = counted.requests(restore);

    let mut daemon = Daemon::start(&counted.sidecar, &data, &[], &[]);
    daemon.wait("all databases", |status| {
        status.databases.len() == count && status.databases.iter().all(|found| found.archived_offset.is_some())
    });
    let before = counted.proxy.requests();
    let started = std::time::Instant::now();
    for second in 1..=BUSY {
        for name in &names {
            write(&client, name, 1).await;
        }
        tokio::time::sleep(Duration::from_secs(second).saturating_sub(started.elapsed())).await;
    }
    let a_second = (counted.proxy.requests() - before) as f64 / started.elapsed().as_secs_f64();
    let memory = peak_mib(daemon.pid());
    assert_eq!(daemon.stop(), 0);
    server.stop();
    format!(
        "| {count} | {} | {backups} | {:.2} | {nothings} | {} | {restores} | {} | {memory:.0} | {a_second:.1} | {:.2} |\n",
        cells(&first),
        nothing.seconds,
        cells(&restored),
        cells(&verified),
        a_second / count as f64,
    )
}

async fn write(client: &Client, database: &str, calls: u64) {
    for n in 0..calls {
        let note = json!([1_000_000 + n, "a note of some length, as notes have"]);
        client.call(database, "put_note", note).await.expect("a call");
    }
}

fn objects(count: u64) -> String {
    let place = Place::of_log(0.001);
    place.back_up(&place.sidecar());
    log_objects(&place.dir("repository"), count);
    let to = place.dir("restored");
    let log_file = place.dir("log");
    let mut plan = place.sidecar().command();
    plan.args(["restore", "--dry-run", "--data-dir", path(&to), "--to", "offset:100", "--log-format", "json"]);
    plan.env("RUST_LOG", "inner_universe=debug").stderr(std::fs::File::create(&log_file).expect("a file"));
    let plan = measure(&mut plan);
    let listing = listed(&log_file);
    format!("| {count} | {} | {listing:.2} | {:.2} |\n", cells(&plan), plan.seconds - listing)
}

/// Seconds that listings took, as the log of a command tells.
fn listed(log: &Path) -> f64 {
    let text = std::fs::read_to_string(log).expect("a log");
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let seconds: Vec<f64> =
        lines.filter(|line| line["message"] == "listed").filter_map(|line| line["seconds"].as_f64()).collect();
    assert!(!seconds.is_empty(), "no listing in {}", log.display());
    seconds.iter().sum()
}

/// Continues a log's first level with empty objects, up to `objects` in all.
fn log_objects(repository: &Path, objects: u64) {
    let output = Command::new("find").arg(repository).args(["-name", "*.iulog"]).output().expect("find");
    let found = String::from_utf8(output.stdout).expect("names");
    let mut files: Vec<_> = found.lines().map(PathBuf::from).collect();
    files.sort();
    let last = files.last().expect("a log object");
    let name = last.file_stem().and_then(|name| name.to_str()).expect("a name");
    let mut next: u64 = name.split_once('-').and_then(|(_, last)| last.parse::<u64>().ok()).expect("an offset") + 1;
    let folder = last.parent().expect("a folder");
    for _ in files.len() as u64..objects {
        std::fs::File::create(folder.join(format!("{next:020}-{:020}.iulog", next + 9))).expect("an object");
        next += 10;
    }
}
