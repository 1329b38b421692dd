//! Exports and replay at their edges: other stores, changed columns, cut connections, gaps, tables of any size.

use harness::client::none;
use harness::daemon::Daemon;
use harness::gate::Gate;
use harness::s3::{BUCKET, S3};
use harness::scene::{Scene, duckdb, first_file, load_events};
use harness::server::Server;
use harness::sidecar::{Sidecar, path};
use harness::tools;
use inner_universe::ids::ContentHash;
use inner_universe::repository::document;
use serde_json::{Value, json};

/// The statements of README's first block of SQL for one engine, each on a line of its own.
fn documented(engine: &str) -> Vec<String> {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md")).expect("README.md");
    let block = readme.split("```sql\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a block of SQL");
    let of_engine = block.split("-- ").find_map(|part| part.strip_prefix(engine)).expect("the engine's statements");
    of_engine.lines().filter(|line| line.ends_with(';')).map(|line| line.trim_end_matches(';').to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queries_in_readme_read_an_export_word_for_word() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    let event = |n: u64, day: i64| {
        json!([n, format!("00000000-0000-8000-8000-{n:012x}"), "LOADED", none(),
            [1_777_593_600_000_000i64 + day * 86_400_000_000], "c", {"Text": "x"}])
    };
    scene.call("import_events", json!([[event(2, -1), event(3, 0), event(4, 0), event(5, 1)]])).await;
    scene.export(&["event-log"]);
    let statements = documented("DuckDB");
    assert_eq!(statements.len(), 2, "{statements:?}");
    let exports = scene.scratch.path().join(format!("repository/databases/{}", scene.identity));
    let run = |statement: &str| duckdb(&statement.replace("...", path(&exports)));
    let Some(mut by_type) = run(&statements[0]) else { return println!("skipped: no DuckDB here") };
    by_type.sort_by_key(|row| row[0].to_string());
    assert_eq!(by_type, [vec![json!("LOADED"), json!(4)], vec![json!("SYSTEM_INITIALIZED"), json!(1)]]);
    // Counted, since DuckDB hands out times to Python only where another package is.
    let of_day = run(&format!("SELECT count(*), min(sequence) FROM ({})", statements[1])).expect("rows");
    assert_eq!(of_day, [[json!(2), json!(3)]], "events of 2026-05-01");
}

#[tokio::test(flavor = "multi_thread")]
async fn trimming_goes_on_through_a_restore_and_replay_still_brings_every_event() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    let trimming = [("EXPORT__TRIM_AFTER", "0s")];
    let count = "select count(*) as n from event_log";
    scene.live().await;
    scene.export(&["event-log"]);
    scene.server.written().await;
    scene.sidecar.run(["backup", "create", "--label", "then"]).ok();
    let report = scene.sidecar_with("iu", &trimming).run(["export", "event-log"]).ok();
    let exported = report["tables"][0]["through"].as_u64().expect("a number");
    assert_eq!(report["trimmed_through"], exported, "{report}");
    assert_eq!(scene.owner.sql("iu", count).await[0][0], 0);
    scene.call("create_entity", json!(["lost", "star", "{}"])).await;
    scene.export(&["event-log"]);

    // Back to before the trim: what was removed is there again, what came after it never was.
    let Scene { scratch, server, owner, sidecar, identity } = scene;
    let (data, keys) = (server.data_dir.clone(), server.key_dir.clone());
    server.stop();
    sidecar.run(["restore", "--data-dir", path(&data), "--to", "label:then", "--force"]).ok();
    let server = Server::start(&data, &keys).await;
    let owner = owner.at(&server.url);
    let mut scene = Scene { scratch, server, owner, sidecar, identity };
    scene.sidecar = scene.sidecar_with("iu", &[]);
    scene.call("create_entity", json!(["found", "star", "{}"])).await;
    let now = scene.owner.rows("iu", &["event_log"]).await;
    let run = scene.sidecar_with("iu", &trimming).run(["export", "event-log"]);
    assert_eq!((run.code, &run.json["tables"][0]["series"]), (0, &json!("event_log.2")), "{}", run.stderr);
    assert_eq!(run.json["trimmed_through"], exported + 1, "across both series");
    assert_eq!(scene.owner.sql("iu", count).await[0][0], 0);
    scene.call("create_entity", json!(["later", "star", "{}"])).await;
    let report = scene.export(&["event-log"]);
    assert_eq!((&report["tables"][0]["series"], &report["tables"][0]["rows"]), (&json!("event_log.2"), &json!(1)));

    scene.replay(&["--table", "event_log"]);
    let mut after = scene.owner.rows("iu", &["event_log"]).await;
    after.get_mut("event_log").expect("events").retain(|row| !row.starts_with(&format!("[{},", exported + 2)));
    assert_eq!(after, now);
}

/// Rewrites the only manifest of the event log as if the export had known other columns.
fn pretend(scene: &Scene, change: impl FnOnce(&mut Value), last_line: impl FnOnce(String) -> String) {
    let exports = scene.scratch.path().join(format!("repository/databases/{}/exports", scene.identity));
    let file = first_file(&exports.join("manifests/event_log"));
    let mut manifest: Value = serde_json::from_slice(&std::fs::read(&file).expect("a manifest")).expect("JSON");
    manifest.as_object_mut().expect("an object").remove("checksum");
    let lines = zstd::decode_all(std::fs::File::open(first_file(&scene.files("ndjson", "event_log"))).expect("a file"));
    let lines = String::from_utf8(lines.expect("rows")).expect("text");
    let line = last_line(lines.lines().last().expect("a row").to_owned()) + "\n";
    manifest["content"]["range"]["last_row"] = json!(ContentHash::of(line.as_bytes()).to_string());
    change(&mut manifest);
    std::fs::write(file, document::write(&manifest)).expect("write the manifest");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_came_in_raises_the_schema_version_and_one_that_changed_its_type_stops_the_export() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    scene.live().await;
    let first = scene.export(&["event-log"]);
    let whole = &first["tables"][0]["rows"];
    let without = |line: String| {
        let at = line.find(",\"correlation_id\":").expect("the column");
        let end = at + 1 + line[at + 1..].find(",\"data\"").expect("the next column");
        format!("{}{}", &line[..at], &line[end..])
    };
    let remove = |manifest: &mut Value| {
        let columns = manifest["columns"].as_array_mut().expect("columns");
        columns.retain(|column| column["name"] != "correlation_id");
        assert_eq!(columns.len(), 6);
    };
    pretend(&scene, remove, without);
    scene.call("create_entity", json!(["new", "star", "{}"])).await;
    let report = scene.export(&["event-log"]);
    assert_eq!((&report["tables"][0]["rows"], &report["tables"][0]["series"]), (&json!(1), &json!("event_log")));
    let exports = scene.scratch.path().join(format!("repository/databases/{}/exports", scene.identity));
    let mut manifests: Vec<_> =
        std::fs::read_dir(exports.join("manifests/event_log")).expect("manifests").flatten().collect();
    manifests.sort_by_key(std::fs::DirEntry::path);
    let newest: Value = serde_json::from_slice(&std::fs::read(manifests[1].path()).expect("a manifest")).expect("JSON");
    assert_eq!(newest["schema_version"], 2);

    // And now a column whose type is another.
    let scene = Scene::new("iu", "inner_universe_module").await;
    scene.live().await;
    scene.export(&["event-log"]);
    let change = |manifest: &mut Value| {
        for column in manifest["columns"].as_array_mut().expect("columns") {
            if column["name"] == "correlation_id" {
                column["type"] = json!("u64");
            }
        }
    };
    pretend(&scene, change, |line| line);
    let message = scene.sidecar.run(["export", "event-log"]).fails_with(6);
    assert!(message.contains("`event_log`") && message.contains("`correlation_id`"), "{message}");
    assert!(message.contains("--new-series"), "{message}");
    let report = scene.export(&["event-log", "--new-series"]);
    assert_eq!((&report["tables"][0]["series"], &report["tables"][0]["rows"]), (&json!("event_log.2"), whole));
    assert_eq!(scene.export(&["event-log"])["tables"][0]["rows"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_module_that_is_published_in_the_middle_of_an_export_is_one_error_and_the_next_export_is_whole() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    scene.live().await;
    let gate = Gate::before(&scene.server.url, "/subscribe").await;
    // An answer that does not come is not waited for longer than timeout_ms.
    let settings = [("SPACETIMEDB_CONFIG__URL", gate.url.as_str()), ("SERVER_CONFIG__TIMEOUT_MS", "300")];
    let message = scene.sidecar_with("iu", &settings).run(["export", "event-log"]).fails_with(1);
    assert!(message.contains("300ms") && message.contains("server_config.timeout_ms"), "{message}");
    gate.reached().await;
    // Between the look at the schema and the first row.
    let slow = scene.sidecar_with("iu", &[("SPACETIMEDB_CONFIG__URL", &gate.url)]);
    let exporting = tokio::task::spawn_blocking(move || slow.run(["export", "event-log"]));
    gate.reached().await;
    scene.owner.delete("iu").await;
    scene.owner.publish("iu", tools::wasm("inner_universe_module_next")).await;
    gate.open();
    let message = exporting.await.expect("a run").fails_with(1);
    assert!(message.contains("`event_log`") && message.contains("xport it again"), "{message}");
    let report = scene.export(&["event-log"]);
    assert_eq!((&report["tables"][0]["rows"], &report["tables"][0]["series"]), (&json!(1), &json!("event_log")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_whose_connection_is_cut_fails_and_another_one_is_complete() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    load_events(&scene.owner, 2, 9_000).await;
    scene.export(&["event-log"]);
    let before = scene.owner.rows("iu", &["event_log"]).await;
    scene.owner.delete("iu").await;
    scene.owner.publish("iu", tools::wasm("inner_universe_module")).await;
    let gate = Gate::before(&scene.server.url, "").await;
    gate.cut_after(600_000);
    let cut = scene.sidecar_with("iu", &[("SPACETIMEDB_CONFIG__URL", &gate.url)]);
    let message = cut.run(["replay", "--table", "event_log"]).fails_with(1);
    assert!(message.contains(&gate.url), "{message}");
    let there = scene.owner.sql("iu", "select count(*) as n from event_log").await[0][0].as_u64().expect("a number");
    assert!((1..9_001).contains(&there), "{there} events had come");
    let report = scene.replay(&["--table", "event_log"]);
    let table = &report["tables"][0];
    let sum = table["applied"].as_u64().expect("a number") + table["skipped"].as_u64().expect("a number");
    assert_eq!((sum, &table["refused"]), (9_001, &json!(0)), "{report}");
    assert!(table["skipped"].as_u64() >= Some(there), "{report}");
    assert_eq!(scene.owner.rows("iu", &["event_log"]).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_export_in_s3_is_replayed_with_its_key_alone() {
    let Some(s3) = S3::moto().await else { return };
    let scene = Scene::new("iu", "inner_universe_module").await;
    scene.live().await;
    let key = scene.scratch.path().join("identity.txt");
    let made = scene.sidecar.run(["key", "generate", "--output", path(&key)]).ok();
    let recipient = made["recipient"].as_str().expect("a recipient").to_owned();
    let mut settings = scene.settings("iu", &[("REPOSITORY__RECIPIENTS", &recipient)]);
    settings.extend(s3.settings());
    let sealed = Sidecar::with(&format!("s3://{BUCKET}/exports")).configured(settings);
    sealed.has_repository(&scene.server.data_dir);
    let report = sealed.run(["export", "all"]).ok();
    assert!(report["tables"].as_array().expect("tables").iter().any(|table| table["table"] == "event_log"));
    assert_eq!(sealed.run(["export", "event-log"]).ok()["tables"][0]["rows"], 0, "manifests are read without the key");
    let tables = ["event_log", "entity", "relation", "state_version"];
    let before = scene.owner.rows("iu", &tables).await;
    scene.owner.delete("iu").await;
    scene.owner.publish("iu", tools::wasm("inner_universe_module")).await;
    let message = sealed.run(["replay"]).fails_with(2);
    assert!(message.contains("--identity"), "{message}");
    sealed.run(["replay", "--identity", path(&key)]).ok();
    assert_eq!(scene.owner.rows("iu", &tables).await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_export_can_begin_late_and_a_table_with_gaps_is_exported_whole() {
    let scene = Scene::new("types", "workload_module").await;
    for id in [1u64, 7, 1_000_000, 1_000_001, u64::MAX] {
        scene.owner.call("types", "put_note", json!([id, "a note"])).await.expect("put a note");
    }
    let gaps = scene.sidecar_with("types", &[("EXPORT__APPEND_ONLY", "note,journal")]);
    let report = gaps.run(["export", "table", "note", "--since", "1"]).ok();
    assert_eq!((&report["tables"][0]["rows"], &report["tables"][0]["through"]), (&json!(4), &json!(u64::MAX)));
    let message = gaps.run(["export", "table", "note", "--since", "7"]).fails_with(2);
    assert!(message.contains("`note`") && message.contains("--since"), "{message}");
    assert_eq!(gaps.run(["export", "table", "note"]).ok()["tables"][0]["rows"], 0);
    let report = gaps.run(["export", "table", "journal"]).ok();
    assert_eq!(report["tables"][0]["rows"], 5);
    if let Some(rows) = duckdb(&format!(
        "SELECT id::VARCHAR FROM read_parquet('{}/*/*.parquet') ORDER BY id",
        scene.files("parquet", "note").display()
    )) {
        let ids = ["7", "1000000", "1000001", "18446744073709551615"];
        assert_eq!(rows, ids.map(|id| vec![json!(id)]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_keyed_by_text_of_any_size_is_exported_and_replayed() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    // More than an answer of the server may have, in keys that want care.
    let data = "d".repeat(200_000);
    let id = |n: usize| format!("it's {} \u{1f30d} {n}", ["\\", "%", "ä", "\"", "x"][n % 5]);
    for n in 0..140 {
        scene.call("create_entity", json!([id(n), "large", data])).await;
    }
    for n in 0..20 {
        let entity = |n: usize| json!([format!("small {n:04}"), "small", "{}", 1, [n], [n], owner_cell(&scene)]);
        let batch: Vec<_> = (n * 200..(n + 1) * 200).map(entity).collect();
        scene.call("import_entities", json!([batch])).await;
    }
    let report = scene.export(&["table", "entity"]);
    assert_eq!(report["tables"][0]["rows"], 4_140, "{report}");
    assert_eq!(scene.export(&["table", "entity"])["tables"][0]["rows"], 0, "nothing changed");
    let before = scene.owner.rows("iu", &["entity"]).await;
    scene.owner.sql("iu", "DELETE FROM entity WHERE entity_type = 'small'").await;
    scene.call("delete_entity", json!([id(3)])).await;
    let report = scene.replay(&["--table", "entity"]);
    let table = &report["tables"][0];
    assert_eq!((&table["applied"], &table["skipped"]), (&json!(4_001), &json!(139)), "{report}");
    assert_eq!(scene.owner.rows("iu", &["entity"]).await, before);
}

fn owner_cell(scene: &Scene) -> Value {
    json!({"__identity__": format!("0x{}", scene.owner.identity)})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scheduled_export_that_fails_is_told_and_stops_nothing_else() {
    let scene = Scene::new("iu", "inner_universe_module").await;
    scene.live().await;
    scene.server.written().await;
    let settings = [
        ("SCHEDULE__EXPORT", "* * * * * *"),
        ("EXPORT__TABLES", "event_log,nowhere"),
        ("TELEMETRY__STATUS_INTERVAL", "0s"),
    ];
    let mut daemon = Daemon::start(&scene.sidecar, &scene.server.data_dir.clone(), &settings, &[]);
    let status = daemon.wait("a failed export", |status| {
        status.schedules.iter().any(|task| task.name == "export" && task.last_ok == Some(false))
    });
    let export = status.schedules.iter().find(|task| task.name == "export").expect("the schedule");
    assert!(export.last_message.as_ref().is_some_and(|said| said.contains("`nowhere`")), "{export:?}");
    // What stands before it was exported, and the log is archived all the same.
    assert!(scene.files("ndjson", "event_log").is_dir());
    scene.call("create_entity", json!(["after", "star", "{}"])).await;
    scene.server.written().await;
    daemon.wait("the archive", |status| {
        status
            .databases
            .iter()
            .all(|found| found.archived_offset.is_some() && found.archived_offset == found.log_offset)
    });
    let metrics = format!("{}/metrics", daemon.wait_http());
    let metrics = harness::client::http().get(metrics).send().await.expect("an answer").text().await.expect("metrics");
    assert!(metrics.contains("inner_universe_exports_total{outcome=\"failed\""), "{metrics}");
    assert_eq!(daemon.stop(), 0);
}
