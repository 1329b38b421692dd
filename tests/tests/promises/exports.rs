//! Exports and replay: every row once in both formats whatever is killed, and back into a module as it was.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use harness::client::none;
use harness::daemon::Daemon;
use harness::scene::{Scene, duckdb, events, first_file, load_events};
use harness::server::Server;
use harness::sidecar::{Sidecar, path};
use harness::tools;
use serde_json::{Value, json};

const BUNDLED: &[&str] =
    &["config", "event_log", "entity", "relation", "state_version", "admin", "member", "metric", "system_status"];

/// How each format is read; the queries of README.
fn tables(scene: &Scene, table: &str) -> [String; 2] {
    let (parquet, ndjson) = (scene.files("parquet", table), scene.files("ndjson", table));
    [
        format!("read_parquet('{}/*/*.parquet', hive_partitioning = true, union_by_name = true)", parquet.display()),
        format!("read_json('{}/*/*.ndjson.zst', hive_partitioning = true, union_by_name = true)", ndjson.display()),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn every_event_is_exported_once_in_both_formats_while_more_arrive_and_the_export_is_killed() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    let (loaded, kills) = if tools::all() { (1_000_000, 50) } else { (20_000, 8) };
    load_events(&scene.owner, 2, loaded).await;
    // More arrive all the while.
    let began = std::time::Instant::now();
    let arrived = Arc::new(AtomicU64::new(0));
    let arriving: Vec<_> = (0..3)
        .map(|_| {
            let (owner, arrived) = (scene.owner.clone(), Arc::clone(&arrived));
            tokio::spawn(async move {
                let event = json!(["ARRIVED", none(), none(), {"Empty": []}]);
                while owner.call("iu", "record_event", event.clone()).await.is_ok() {
                    arrived.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let mut random = seed;
    for kill in 0..kills {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let longest = if tools::all() { 4_000 } else { 600 };
        let mut command = scene.sidecar.command();
        // The one before was killed with its lease in hand.
        command.args(["export", "event-log", "--force"]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().expect("start an export");
        tokio::time::sleep(Duration::from_millis((random >> 33) % longest)).await;
        let _ = child.kill();
        let _ = child.wait();
        println!("kill {kill}");
    }
    // All of it in one go, elsewhere.
    let mut elsewhere = scene.sidecar.clone();
    elsewhere.repository = format!("file://{}", path(&scene.scratch.path().join("elsewhere")));
    elsewhere.has_repository(&scene.server.data_dir);
    let peak = peak_memory(&elsewhere, &["export", "event-log"]);
    println!("{} MiB were resident at most", peak >> 20);
    assert!(peak <= 96 << 20, "{peak} bytes were resident");
    scene.sidecar.run(["export", "event-log", "--force"]).ok();
    let count = arrived.load(Ordering::Relaxed);
    println!("{count} arrived meanwhile, {:.0} a second", count as f64 / began.elapsed().as_secs_f64());
    for writer in arriving {
        writer.abort();
        let _ = writer.await;
    }
    let report = scene.export(&["event-log"]);
    let through = report["tables"][0]["through"].as_u64().expect("a number");
    assert!(through > loaded, "{report}");
    let again = scene.export(&["event-log"]);
    assert_eq!((&again["tables"][0]["rows"], &again["tables"][0]["objects"]), (&json!(0), &json!(0)));
    for table in tables(&scene, "event_log") {
        let counts = "count(*)::BIGINT, count(DISTINCT sequence)::BIGINT, min(sequence)::BIGINT, max(sequence)::BIGINT";
        let Some(rows) = duckdb(&format!("SELECT {counts}, count(DISTINCT event_id)::BIGINT FROM {table}")) else {
            println!("skipped: no DuckDB here");
            break;
        };
        assert_eq!(rows, [[through, through, 1, through, through].map(Value::from)], "{table}");
        let misfiled =
            format!("SELECT count(*)::BIGINT FROM {table} WHERE (timestamp AT TIME ZONE 'UTC')::DATE <> date");
        assert_eq!(duckdb(&misfiled), Some(vec![vec![json!(0)]]), "{table}");
    }
    // Nothing is left of broken exports.
    let plans = scene.scratch.path().join(format!("repository/databases/{}/exports/plans", scene.identity));
    let left: Vec<_> =
        std::fs::read_dir(plans).into_iter().flatten().flatten().map(|entry| entry.file_name()).collect();
    // What a kill cut off before it had its name is no object: the store keeps it as NAME#N, and nobody reads it.
    let is_object = |name: &&std::ffi::OsString| !name.to_string_lossy().contains('#');
    assert_eq!(left.iter().filter(is_object).count(), 0, "{left:?}");
}

/// Runs the binary and tells how much memory it had at most.
fn peak_memory(sidecar: &Sidecar, arguments: &[&str]) -> u64 {
    let mut child = sidecar.command().args(arguments).stdout(Stdio::null()).spawn().expect("start an export");
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    while child.try_wait().expect("its state").is_none() {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
        peak = peak.max(kib.unwrap_or(0) << 10);
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(child.wait().expect("its end").success());
    assert!(peak > 0, "it ended before it was looked at");
    peak
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_into_a_newer_module_brings_back_every_table_and_twice_changes_nothing() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    scene.live().await;
    let report = scene.export(&["all"]);
    assert_eq!(report["database"], scene.identity);
    let before = scene.owner.rows("iu", BUNDLED).await;
    scene.owner.delete("iu").await;
    scene.owner.publish("iu", tools::wasm("inner_universe_module_next")).await;

    let plan = scene.replay(&["--dry-run"]);
    let events = |report: &Value| report["tables"].as_array().expect("tables")[6].clone();
    assert_eq!(events(&plan)["applied"], events(&plan)["read"], "{plan}");
    assert!(scene.owner.sql("iu", "select * from entity").await.is_empty(), "a dry run changes nothing");

    let report = scene.replay(&[]);
    let sum = |report: &Value, what: &str| -> u64 {
        report["tables"].as_array().expect("tables").iter().map(|table| table[what].as_u64().expect("a number")).sum()
    };
    assert_eq!((sum(&report, "applied"), sum(&report, "skipped")), (sum(&report, "read"), 0), "{report}");
    assert_eq!(sum(&plan, "applied"), sum(&report, "applied"));
    let after = shared(scene.owner.rows("iu", BUNDLED).await);
    assert_eq!(after, before);

    let again = scene.replay(&["--from", &scene.identity]);
    assert_eq!((sum(&again, "applied"), sum(&again, "refused")), (0, 0), "{again}");
    assert_eq!(shared(scene.owner.rows("iu", BUNDLED).await), before);
    // New events go on behind the imported ones.
    let last = scene.owner.sql("iu", "select * from event_log").await.len() as u64;
    scene.call("create_entity", json!(["mars", "planet", "{}"])).await;
    let new = scene.owner.sql("iu", &format!("select * from event_log where sequence = {}", last + 1)).await;
    assert_eq!(new[0][2], "ENTITY_CREATED");
}

/// Without the column that only the newer module has.
fn shared(mut rows: harness::client::Rows) -> harness::client::Rows {
    for row in rows.get_mut("event_log").into_iter().flatten() {
        let mut columns: Vec<Value> = serde_json::from_str(row).expect("a row");
        assert_eq!(columns.pop(), Some(json!([1, []])), "the new column is empty");
        *row = Value::from(columns).to_string();
    }
    rows
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_that_is_killed_is_completed_by_another() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    let count = if tools::all() { 200_000 } else { 10_000 };
    load_events(&scene.owner, 2, count).await;
    scene.export(&["event-log"]);
    let before = scene.owner.rows("iu", &["event_log"]).await;
    scene.owner.delete("iu").await;
    scene.owner.publish("iu", tools::wasm("inner_universe_module")).await;
    let mut broken_off = 0;
    for wait in [40u64, 80, 120, 160, 200] {
        let mut command = scene.sidecar.command();
        let mut child = command.arg("replay").stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("a replay");
        tokio::time::sleep(Duration::from_millis(wait)).await;
        let _ = child.kill();
        let _ = child.wait();
        let there =
            scene.owner.sql("iu", "select count(*) as n from event_log").await[0][0].as_u64().expect("a number");
        broken_off += u64::from(there > 1 && there <= count);
    }
    println!("{broken_off} replays were killed at work");
    let report = scene.replay(&[]);
    let table = &report["tables"][0];
    let done = table["applied"].as_u64().expect("a number") + table["skipped"].as_u64().expect("a number");
    assert_eq!((done, &table["refused"]), (count + 1, &json!(0)), "{report}");
    assert_eq!(scene.owner.rows("iu", &["event_log"]).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn values_of_every_type_survive_export_and_replay_in_both_formats() {
    let scene = Scene::new("types", "workload_module").await;
    scene.owner.call("types", "take_samples", json!([])).await.expect("take samples");
    let before = scene.owner.rows("types", &["sample"]).await;
    scene.export(&["table", "sample"]);
    if let Some(rows) = duckdb(&format!(
        "SELECT id::VARCHAR, uwide, colour, shape.tag FROM read_parquet('{}/*/*/*.parquet') ORDER BY id",
        scene.files("parquet", "sample").display()
    )) {
        let last = [json!(u64::MAX.to_string()), json!(u128::MAX.to_string()), json!("Red"), json!("Coloured")];
        assert_eq!(rows[2], last);
    }
    for format in ["parquet", "ndjson"] {
        scene.owner.delete("types").await;
        scene.owner.publish("types", tools::wasm("workload_module")).await;
        let report = scene.replay(&["--table", "sample", "--format", format, "--from", &scene.identity]);
        assert_eq!(report["tables"][0]["applied"], 3, "{format}: {report}");
        assert_eq!(scene.owner.rows("types", &["sample"]).await, before, "{format}");
        let again = scene.replay(&["--table", "sample", "--format", format, "--from", &scene.identity]);
        assert_eq!(again["tables"][0]["skipped"], 3, "exactly what was exported is there: {again}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_broken_export_left_is_kept_when_it_counts_and_taken_away_when_not() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    scene.live().await;
    scene.export(&["event-log"]);
    let exports = scene.scratch.path().join(format!("repository/databases/{}/exports", scene.identity));
    let manifest = std::fs::read(first_file(&exports.join("manifests/event_log"))).expect("a manifest");
    let manifest: Value = serde_json::from_slice(&manifest).expect("JSON");
    let counted: Vec<String> = manifest["files"]
        .as_array()
        .expect("files")
        .iter()
        .map(|file| file["object"].as_str().expect("a name").into())
        .collect();
    let leave_plan = |last: u64, objects: Vec<String>| {
        let plan = inner_universe::export::manifest::ExportPlan { last, objects };
        std::fs::create_dir_all(exports.join("plans")).expect("a folder");
        std::fs::write(exports.join("plans/event_log.json"), inner_universe::repository::document::write(&plan))
            .expect("write the plan");
    };
    let there = |object: &String| scene.scratch.path().join("repository").join(object).is_file();
    // Killed after the manifest and before the plan was taken away.
    let last = manifest["content"]["range"]["last"].as_u64().expect("a number");
    leave_plan(last, counted.clone());
    assert_eq!(scene.export(&["event-log"])["tables"][0]["rows"], 0);
    assert!(counted.iter().all(there), "files that count are gone");
    // Killed before the manifest: what was written of it is not left beside what is written now.
    scene.call("create_entity", json!(["a", "star", "{}"])).await;
    scene.call("create_entity", json!(["b", "star", "{}"])).await;
    let orphan = counted[0].replace(&format!("{last:020}."), &format!("{:020}.", last + 9));
    std::fs::write(scene.scratch.path().join("repository").join(&orphan), "half of a file").expect("an orphan");
    leave_plan(last + 1, vec![orphan.clone()]);
    assert_eq!(scene.export(&["event-log"])["tables"][0]["rows"], 2);
    assert!(!there(&orphan) && counted.iter().all(there));
    assert!(!exports.join("plans/event_log.json").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn exported_events_are_trimmed_only_when_told_and_stay_in_the_export() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    load_events(&scene.owner, 2, 12_000).await;
    scene.export(&["event-log"]);
    let count = "select count(*) as n from event_log";
    assert_eq!(scene.owner.sql("iu", count).await[0][0], 12_001, "off by default");
    let before = scene.owner.rows("iu", &["event_log"]).await;

    let trimming = |age: &str| scene.sidecar_with("iu", &[("EXPORT__TRIM_AFTER", age)]);
    // Everything loaded is of 2023, what the module wrote itself is of now: its start comes first, and holds the rest.
    let report = trimming("1h").run(["export", "event-log"]).ok();
    assert_eq!(report["trimmed_through"], Value::Null);
    let report = trimming("0s").run(["export", "event-log"]).ok();
    assert_eq!(report["trimmed_through"], 12_001, "{report}");
    assert_eq!(scene.owner.sql("iu", count).await[0][0], 0);
    scene.call("create_entity", json!(["late", "star", "{}"])).await;
    let report = trimming("1h").run(["export", "event-log"]).ok();
    assert_eq!((&report["tables"][0]["rows"], &report["tables"][0]["series"]), (&json!(1), &json!("event_log")));
    assert_eq!(scene.owner.sql("iu", count).await[0][0], 1);

    let report = scene.replay(&["--table", "event_log"]);
    assert_eq!(
        (&report["tables"][0]["applied"], &report["tables"][0]["skipped"]),
        (&json!(12_001), &json!(1)),
        "{report}"
    );
    let mut after = scene.owner.rows("iu", &["event_log"]).await;
    after.get_mut("event_log").expect("events").retain(|row| !row.starts_with("[12002,"));
    assert_eq!(after, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_comes_back_at_a_version_or_a_time_and_one_entity_from_the_archive() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    scene.live().await;
    scene.export(&["state-versions"]);
    // An entity whose versions the module no longer has.
    scene.owner.sql("iu", "DELETE FROM state_version WHERE subject_id = 'earth'").await;
    scene.call("update_entity", json!(["earth", "{\"n\": 3}"])).await;
    let restored = scene.replay(&["--version-id", "2"]);
    assert_eq!((&restored["version_id"], &restored["imported"]), (&json!(2), &json!(true)));
    let earth = scene.owner.sql("iu", "select * from entity where entity_id = 'earth'").await;
    assert_eq!(earth[0][2], "{\"n\": 1}");
    let message = scene.sidecar.run(["replay", "--version-id", "999"]).fails_with(1);
    assert!(message.contains("999"), "{message}");

    // Its history is that of module and exports together.
    let history = scene.export(&["state-versions", "--entity", "earth"]);
    let told = |version: &Value| (version["version_id"].clone(), version["operation"].clone(), version["data"].clone());
    let versions: Vec<_> = history["versions"].as_array().expect("versions").iter().map(told).collect();
    let expected = [
        (2, "Create", "{\"n\": 1}"),
        (5, "Update", "{\"n\": 2}"),
        (7, "Update", "{\"n\": 3}"),
        (8, "Restore", "{\"n\": 1}"),
    ];
    assert_eq!(versions, expected.map(|(id, operation, data)| (json!(id), json!(operation), json!(data))));
    let places = |n: usize| (&history["versions"][n]["in_module"], &history["versions"][n]["in_exports"]);
    assert_eq!([places(0), places(1), places(3)].map(|(here, _)| here), [&json!(true), &json!(false), &json!(true)]);
    assert_eq!([places(0), places(1), places(3)].map(|(_, there)| there), [&json!(true), &json!(true), &json!(false)]);
    let orbit = scene.export(&["state-versions", "--relation", "orbit"]);
    assert_eq!(orbit["versions"].as_array().map(Vec::len), Some(1));
    let message = scene.sidecar.run(["export", "state-versions", "--entity", "orbit"]).fails_with(1);
    assert!(message.contains("`orbit`"), "{message}");

    scene.owner.delete("iu").await;
    scene.owner.publish("iu", tools::wasm("inner_universe_module")).await;
    // Version 3 made the moon; 6 is its end.
    scene.replay(&["--to", "version:3"]);
    let names = |rows: Vec<Value>| {
        let mut names: Vec<_> = rows.iter().map(|row| row[0].as_str().expect("a name").to_owned()).collect();
        names.sort();
        names
    };
    assert_eq!(names(scene.owner.sql("iu", "select * from entity").await), ["earth", "moon", "sun"]);
    assert!(scene.owner.sql("iu", "select * from relation").await.is_empty());
    let versions = scene.owner.sql("iu", "select * from state_version").await;
    assert_eq!(versions.len(), 3);

    // The same by the time of version 2, which is included.
    scene.owner.delete("iu").await;
    scene.owner.publish("iu", tools::wasm("inner_universe_module")).await;
    let second = versions.iter().find(|row| row[0] == 2).expect("version 2");
    let time = second[9][0].as_i64().expect("microseconds");
    let time = jiff::Timestamp::from_microsecond(time).expect("a time");
    scene.replay(&["--to", &format!("time:{time}")]);
    assert_eq!(names(scene.owner.sql("iu", "select * from entity").await), ["earth", "sun"]);
    assert_eq!(scene.owner.sql("iu", "select * from state_version").await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_exported_or_replayed_is_one_clear_error() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    scene.live().await;
    let message = scene.sidecar.run(["export", "table", "nowhere"]).fails_with(2);
    assert!(message.contains("`nowhere`") && message.contains("event_log"), "{message}");
    let stranger = scene.server.client().await;
    let token = scene.scratch.path().join("stranger");
    std::fs::write(&token, &stranger.token).expect("write a token");
    scene.call("add_member", json!([{"__identity__": format!("0x{}", stranger.identity)}, "a stranger"])).await;
    let message = scene.sidecar.run(["export", "table", "member", "--token-file", path(&token)]).fails_with(2);
    assert!(message.contains("`member` is private") && message.contains("--token-file"), "{message}");
    let message = scene.sidecar.run(["replay"]).fails_with(4);
    assert!(message.contains("no exports"), "{message}");
    // Of all tables a stranger gets those that may be read, and is told which not.
    let mut elsewhere = scene.sidecar.clone();
    elsewhere.repository = format!("file://{}", path(&scene.scratch.path().join("elsewhere")));
    elsewhere.has_repository(&scene.server.data_dir);
    let report = elsewhere.run(["export", "all", "--token-file", path(&token)]).ok();
    assert_eq!(report["not_readable"], json!(["member"]), "{report}");
    assert!(report["tables"].as_array().is_some_and(|tables| tables.iter().any(|table| table["table"] == "event_log")));

    scene.export(&["event-log"]);
    let damage = |format: &str| {
        let file = first_file(&scene.files(format, "event_log"));
        let mut bytes = std::fs::read(&file).expect("a file");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(file, bytes).expect("damage it");
    };
    damage("ndjson");
    let run = scene.sidecar.run(["replay", "--dry-run"]);
    assert_eq!(run.code, 0, "the other format holds the same rows: {}", run.stderr);
    assert!(run.stderr.contains("another format"), "{}", run.stderr);
    damage("parquet");
    let message = scene.sidecar.run(["-q", "replay", "--dry-run"]).fails_with(1);
    assert!(message.contains("exports/parquet/event_log") && message.contains("damaged"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_exports_on_schedule_and_for_commands_and_a_restored_database_gets_a_series_of_its_own() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    scene.live().await;
    let data = scene.server.data_dir.clone();
    let schedule = [("SCHEDULE__EXPORT", "* * * * * *"), ("TELEMETRY__STATUS_INTERVAL", "0s")];
    let mut daemon = Daemon::start(&scene.sidecar, &data, &schedule, &[]);
    daemon.wait("an export", |status| {
        status.schedules.iter().any(|task| task.name == "export" && task.last_ok == Some(true))
    });
    let report = scene.export(&["event-log"]);
    assert_eq!(report["tables"][0]["rows"], 0, "the schedule had it: {report}");
    let exported = report["tables"][0]["through"].as_u64().expect("a number");
    scene.server.written().await;
    scene.sidecar.run(["backup", "create", "--label", "then"]).ok();
    scene.call("create_entity", json!(["lost", "star", "{}"])).await;
    let then = scene.owner.rows("iu", &["event_log"]).await;
    let report = scene.export(&["event-log"]);
    assert_eq!(report["tables"][0]["through"], exported + 1);
    let metrics = format!("{}/metrics", daemon.wait_http());
    let metrics = harness::client::http().get(metrics).send().await.expect("an answer").text().await.expect("metrics");
    let told = |start: &str, value: &str| metrics.lines().any(|line| line.starts_with(start) && line.ends_with(value));
    assert!(metrics.contains("inner_universe_exports_total{outcome=\"ok\""), "{metrics}");
    assert!(told("inner_universe_export_rows_total{table=\"event_log\"", &format!(" {}", exported + 1)), "{metrics}");
    assert_eq!(daemon.stop(), 0);

    // Back to before that event, and on with another in its place.
    let port = scene.server.url.rsplit(':').next().expect("a port").parse().expect("a number");
    let Scene { scratch, server, owner, sidecar, identity } = scene;
    let keys = server.key_dir.clone();
    server.stop();
    sidecar.run(["restore", "--data-dir", path(&data), "--to", "label:then", "--force"]).ok();
    let server = Server::start_at(&data, &keys, port).await;
    let scene = Scene { scratch, server, owner, sidecar, identity };
    scene.call("create_entity", json!(["found", "star", "{}"])).await;
    let now = scene.owner.rows("iu", &["event_log"]).await;
    assert_ne!(then, now);
    let run = scene.sidecar.run(["export", "event-log"]);
    assert_eq!((run.code, &run.json["tables"][0]["series"]), (0, &json!("event_log.2")), "{}", run.stderr);
    assert!(run.stderr.contains("set back"), "{}", run.stderr);
    scene.owner.delete("iu").await;
    scene.owner.publish("iu", tools::wasm("inner_universe_module")).await;
    scene.replay(&["--table", "event_log", "--from", &scene.identity]);
    assert_eq!(scene.owner.rows("iu", &["event_log"]).await, now);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_format_that_was_left_out_is_exported_later_and_every_row_once() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    scene.live().await;
    let first = scene.export(&["table", "event_log", "entity", "--format", "ndjson"]);
    let rows = |report: &Value| [0, 1].map(|table| report["tables"][table]["rows"].as_u64().expect("a number"));
    assert!(rows(&first).iter().all(|rows| *rows > 0), "{first}");
    let second = scene.export(&["table", "event_log", "entity", "--format", "parquet"]);
    assert_eq!(rows(&second), rows(&first), "{second}");
    scene.call("create_entity", json!(["mars", "planet", "{}"])).await;
    scene.export(&["table", "event_log", "entity", "--format", "parquet"]);
    let both = scene.export(&["table", "event_log", "entity"]);
    assert!(rows(&both).iter().all(|rows| *rows > 0), "NDJSON lacks what came last: {both}");
    assert_eq!(rows(&scene.export(&["table", "event_log", "entity"])), [0, 0]);
    let there = scene.owner.sql("iu", "select count(*) as n from event_log").await[0][0].clone();
    for table in tables(&scene, "event_log") {
        let counts = "count(*)::BIGINT, count(DISTINCT sequence)::BIGINT";
        let Some(found) = duckdb(&format!("SELECT {counts} FROM {table}")) else {
            println!("skipped: no DuckDB here");
            break;
        };
        assert_eq!(found, [[there.clone(), there.clone()]], "{table}");
    }
    let before = scene.owner.rows("iu", &["event_log"]).await;
    for format in ["ndjson", "parquet"] {
        scene.owner.delete("iu").await;
        scene.owner.publish("iu", tools::wasm("inner_universe_module")).await;
        scene.replay(&["--table", "event_log", "--format", format, "--from", &scene.identity]);
        assert_eq!(scene.owner.rows("iu", &["event_log"]).await, before, "{format}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn imported_events_are_trimmed_only_once_an_export_holds_them() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    load_events(&scene.owner, 2, 6_000).await;
    let trimming = |more: &[(&str, &str)]| {
        let settings = [&[("EXPORT__TRIM_AFTER", "0s")], more].concat();
        scene.sidecar_with("iu", &settings)
    };
    // What stays is told in the report and in the log.
    let kept = |sidecar: &Sidecar, arguments: &[&str]| {
        let run = sidecar.run([&["export", "event-log"], arguments].concat());
        assert!(run.code == 0 && run.stderr.contains("trim_stopped"), "{} {}", run.code, run.stderr);
        run.json
    };
    // Nothing goes that is in no configured format, or that the collector lacks.
    let parquet = trimming(&[("EXPORT__FORMATS", "parquet")]);
    let report = kept(&parquet, &["--format", "ndjson"]);
    assert_eq!(report["trimmed_through"], Value::Null, "{report}");
    assert!(report["not_trimmed"].as_str().is_some_and(|reason| reason.contains("parquet")), "{report}");
    let streamed = trimming(&[("TELEMETRY__OTLP_ENDPOINT", "http://127.0.0.1:9")]);
    let report = kept(&streamed, &[]);
    assert_eq!(report["trimmed_through"], Value::Null, "{report}");
    assert!(report["not_trimmed"].as_str().is_some_and(|reason| reason.contains("collector")), "{report}");
    let report = trimming(&[]).run(["export", "event-log"]).ok();
    assert_eq!((&report["trimmed_through"], &report["not_trimmed"]), (&json!(6_001), &Value::Null), "{report}");

    // Others take the free numbers, and what is exported comes after them.
    let mut imported = events(1_000, 500);
    for event in &mut imported {
        event[1] = json!(event[1].as_str().expect("an id").replace("00000000-0000", "00000000-1111"));
    }
    scene.call("import_events", json!([imported])).await;
    scene.call("create_entity", json!(["late", "star", "{}"])).await;
    let before = scene.owner.rows("iu", &["event_log"]).await["event_log"].len();
    let run = trimming(&[]).run(["export", "event-log"]);
    assert_eq!(run.code, 0, "{}", run.stderr);
    // Numbers that held other events begin a new series. All are exported there before any goes.
    assert!(run.stderr.contains("goes on in a new series"), "{}", run.stderr);
    assert_eq!(run.json["tables"][0]["rows"], before, "{}", run.json);
    let left = scene.owner.rows("iu", &["event_log"]).await["event_log"].len();
    assert_eq!((left, &run.json["trimmed_through"]), (0, &run.json["tables"][0]["through"]), "{}", run.json);
}
