//! The benchmark of exports and replay: rows a second beside what users would do with the server's own command line.
#![allow(clippy::disallowed_methods, clippy::disallowed_macros, reason = "a benchmark measures and prints")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use harness::client::Client;
use harness::measure::{Measured, measure, median};
use harness::scene::{Scene, events, load_events};
use harness::sidecar::{Sidecar, path};
use harness::tools;

const ROUNDS: usize = 3;
/// Events of one import call.
const BATCH: u64 = 1000;

/// One row of the table: what was done, in seconds a round.
#[derive(Default)]
struct Series {
    seconds: Vec<f64>,
    peak_mib: f64,
}

impl Series {
    fn add(&mut self, measured: Measured) {
        self.seconds.push(measured.seconds);
        self.peak_mib = self.peak_mib.max(measured.peak_mib);
    }
}

#[tokio::main]
async fn main() {
    let rows: u64 = std::env::args().nth(1).map_or(300_000, |text| text.parse().expect("a number of events"));
    let cli = PathBuf::from(std::env::var_os("INNER_UNIVERSE_SPACETIME_CLI").expect("run `cargo xtask bench export`"));
    let scene = Scene::new("iu", "inner_universe_module").await;
    println!("writing {rows} events");
    load_events(&scene.owner, 2, rows).await;
    let dir = scene.scratch.path().to_owned();
    let settings = dir.join("cli.toml");
    std::fs::write(&settings, format!("spacetimedb_token = \"{}\"\n", scene.owner.token)).expect("settings");

    let [mut theirs, mut ndjson, mut parquet, mut both, mut replayed, mut called]: [Series; 6] = Default::default();
    for round in 0..ROUNDS {
        println!("round {} of {ROUNDS}", round + 1);
        theirs.add(by_command_line(&cli, &settings, &scene, &dir));
        for (formats, series) in
            [(&["ndjson"][..], &mut ndjson), (&["parquet"], &mut parquet), (&["ndjson", "parquet"], &mut both)]
        {
            let repository = dir.join(format!("repository-{round}-{}", formats.join("-")));
            let mut sidecar = scene.sidecar.clone();
            sidecar.repository = format!("file://{}", path(&repository));
            let mut command = sidecar.command();
            command.args(["export", "event-log"]);
            command.args(formats.iter().flat_map(|format| ["--format", format]));
            series.add(measure(&mut command));
            if formats.len() == 2 {
                replayed.add(replay(&scene, &sidecar, &format!("replayed{round}")).await);
            }
        }
        called.add(call(&scene.owner, &format!("called{round}"), rows).await);
    }
    let rate = |series: &Series| rows as f64 / median(&series.seconds);
    let mut text = String::from("# Benchmark of exports and replay\n\n");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let _ = writeln!(
        text,
        "Written by `cargo xtask bench export`: {rows} events of some 250 bytes on a real server, the release binary, a directory \
         as repository, {ROUNDS} rounds in turn, all on the same {cores} cores. Ratios are of this run. `spacetime sql` prints a table \
         for people, which is no format to load again; events that come meanwhile are missing there, and values are not all told apart.\n"
    );
    text += "| work | rows a second | against | ratio | spread | our peak memory |\n|---|---|---|---|---|---|\n";
    let mut row = |work: &str, ours: &Series, peer: &str, other: &Series| {
        let ratios: Vec<f64> = ours.seconds.iter().zip(&other.seconds).map(|(ours, other)| other / ours).collect();
        let (low, high) = ratios.iter().fold((f64::MAX, 0.0f64), |(low, high), r| (low.min(*r), high.max(*r)));
        let _ = writeln!(
            text,
            "| {work} | {:.0} | {peer}: {:.0} | {:.2} | {low:.2} to {high:.2} | {:.0} MiB |",
            rate(ours),
            rate(other),
            median(&ratios),
            ours.peak_mib
        );
    };
    let sql = "`spacetime sql` piped to `zstd -3`";
    row("export as NDJSON", &ndjson, sql, &theirs);
    row("export as Parquet", &parquet, sql, &theirs);
    row("export in both formats", &both, sql, &theirs);
    row("replay", &replayed, "calls of `import_events` over HTTP, 1000 events each", &called);
    println!("{text}");
    let docs = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../docs");
    std::fs::write(docs.join("benchmarks-export.md"), text).expect("write docs/benchmarks-export.md");
}

/// What users have today.
fn by_command_line(cli: &Path, settings: &Path, scene: &Scene, dir: &Path) -> Measured {
    let script = format!(
        "set -o pipefail; '{}' --config-path '{}' sql --server '{}' iu 'select * from event_log' | zstd -q -3 -f -o '{}'",
        cli.display(),
        settings.display(),
        scene.server.url,
        dir.join("table.zst").display()
    );
    measure(Command::new("bash").args(["-c", &script]))
}

async fn replay(scene: &Scene, sidecar: &Sidecar, name: &str) -> Measured {
    scene.owner.publish(name, tools::wasm("inner_universe_module")).await;
    let target = sidecar.clone().configured(scene.settings(name, &[]));
    let measured = measure(target.command().args(["replay", "--from", &scene.identity]));
    let count = |rows: Vec<serde_json::Value>| rows[0][0].as_u64().expect("a number");
    let statement = "select count(*) as n from event_log";
    assert_eq!(count(scene.owner.sql(name, statement).await), count(scene.owner.sql("iu", statement).await));
    scene.owner.delete(name).await;
    measured
}

/// What a script of the user's own would do.
async fn call(owner: &Client, name: &str, rows: u64) -> Measured {
    owner.publish(name, tools::wasm("inner_universe_module")).await;
    let batches: Vec<_> =
        (2..2 + rows).step_by(BATCH as usize).map(|first| events(first, BATCH.min(2 + rows - first))).collect();
    let started = Instant::now();
    for batch in batches {
        owner.call(name, "import_events", serde_json::json!([batch])).await.expect("import events");
    }
    let seconds = started.elapsed().as_secs_f64();
    owner.delete(name).await;
    Measured { seconds, ..Measured::default() }
}
