//! Drills: what is restored is booted by a real server and compared with what the live one had; each thing that can be
//! wrong is a finding of its own kind, and nothing is left behind.

use std::path::Path;

use harness::client::Client;
use harness::daemon::Daemon;
use harness::server::Server;
use harness::sidecar::{Sidecar, path};
use harness::stage::{NAME, Stage, call, fill};
use harness::tools;
use inner_universe::repository::document;
use serde_json::{Value, json};

/// A server with the bundled module, whose owner the sidecar is, and a scratch directory for drills.
struct Rehearsal {
    stage: Stage,
    scratch: std::path::PathBuf,
}

impl Rehearsal {
    fn new() -> Self {
        let mut stage = Stage::new();
        let scratch = stage.scratch.path().join("scratch");
        std::fs::create_dir(&scratch).expect("create");
        stage.configure(&[("DRILL__SCRATCH_DIR", path(&scratch))]);
        stage.deploy("");
        stage.server("start");
        Self { stage, scratch }
    }

    fn backup(&self) -> String {
        let report = self.stage.sidecar.run(["backup", "create"]).ok();
        report["restore_point"].as_str().expect("an id").to_owned()
    }

    fn point(&self, id: &str) -> Value {
        self.stage.sidecar.run(["backup", "show", id]).ok()
    }

    fn drill(&self, more: &[&str]) -> (i32, Value) {
        let run = self.stage.sidecar.run([&["drill"], more].concat());
        assert!(!run.stderr.contains("WARN"), "{}", run.stderr);
        let left: Vec<_> = std::fs::read_dir(&self.scratch).expect("list").flatten().collect();
        assert!(left.is_empty(), "{left:?}");
        (run.code, run.json)
    }

    fn kinds(result: &Value) -> Vec<&str> {
        result["findings"]
            .as_array()
            .expect("findings")
            .iter()
            .map(|found| found["kind"].as_str().expect("a kind"))
            .collect()
    }

    fn object(&self, part: &str) -> std::path::PathBuf {
        let root = self.stage.scratch.path().join("repository");
        let mut dirs = vec![root];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(dir).expect("list").flatten() {
                let file = entry.path();
                if file.is_dir() {
                    dirs.push(file);
                } else if path(&file).contains(part) {
                    return file;
                }
            }
        }
        panic!("no object of {part}")
    }
}

/// Changes a document and signs it anew, as only who means to could.
fn forge(file: &Path, change: impl FnOnce(&mut Value)) {
    let bytes = std::fs::read(file).expect("read");
    let mut value: Value = document::read(&bytes).expect("a document");
    change(&mut value);
    std::fs::write(file, document::write(&value)).expect("write");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drill_boots_what_was_backed_up_and_finds_the_rows_that_were_promised() {
    let rehearsal = Rehearsal::new();
    fill(&rehearsal.stage.owner().await, 40).await;
    // What was written just now is still on its way to the log, and nothing is promised that is not certain.
    let mut point = Value::Null;
    for _ in 0..5 {
        point = rehearsal.point(&rehearsal.backup());
        if point["promises"].as_array().is_some_and(|promises| !promises.is_empty()) {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
    let tables = point["promises"][0]["tables"].as_array().expect("a promise");
    let rows = |name: &str| tables.iter().find(|table| table["name"] == name).map(|table| table["rows"].clone());
    assert_eq!((rows("entity"), rows("config").is_some()), (Some(json!(40)), true), "{tables:?}");

    let (code, result) = rehearsal.drill(&[]);
    assert_eq!((code, &result["passed"]), (0, &json!(true)), "{result}");
    assert_eq!(result["databases"][0]["compared"], tables.len());
    // Since 2.2 the sidecar itself is connected when the tables are read, and the restored server ends that.
    let changed = if tools::release().writes_when_asked() { json!(["client_connection"]) } else { json!([]) };
    assert_eq!(result["databases"][0]["changed_at_start"], changed);
    assert!(result["rto_ms"].as_u64() > result["restore_ms"].as_u64(), "{result}");
    // There, the end of that connection is in the live log and behind the restore point.
    assert_eq!(result["rpo_ms"] == 0, !tools::release().writes_when_asked(), "{result}");
    // It is kept, and told.
    let list = rehearsal.stage.sidecar.run(["drill", "--list"]).ok();
    assert_eq!(list[0]["restore_point"], point["id"]);
    let status = rehearsal.stage.sidecar.run(["status"]).json;
    assert_eq!((&status["last_drill"]["passed"], &status["last_drill"]["restore_point"]), (&json!(true), &point["id"]));
    let doctor = rehearsal.stage.sidecar.run(["doctor"]).json;
    let check =
        doctor["checks"].as_array().expect("checks").iter().find(|check| check["check"] == "restore drill").cloned();
    assert_eq!(check.expect("a check")["verdict"], "pass");
    // Any restore point will do, and results do not pile up.
    let keeps_two = rehearsal.stage.sidecar.clone().and("DRILL__KEEP_RESULTS", "2");
    for _ in 0..3 {
        keeps_two.run(["drill", "--random"]).ok();
    }
    assert_eq!(keeps_two.run(["drill", "--list"]).ok().as_array().map(Vec::len), Some(2));

    // The server goes on as if nothing had been.
    call(&rehearsal.stage.owner().await, "create_entity", json!(["after", "thing", "{}"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drill_finds_other_rows_a_damaged_page_and_a_server_that_does_not_start_each_as_what_it_is() {
    let rehearsal = Rehearsal::new();
    fill(&rehearsal.stage.owner().await, 10).await;
    rehearsal.stage.server("stop");
    rehearsal.stage.server("start");
    let id = rehearsal.backup();
    let document = rehearsal.object(&id);
    let good = std::fs::read(&document).expect("read");
    for (kind, change) in [
        ("rows", (|table: &mut Value| table["rows"] = json!(31)) as fn(&mut Value)),
        ("hash", |table: &mut Value| {
            let hash = table["hash"].as_str().expect("a hash").replace('0', "1");
            table["hash"] = json!(hash);
        }),
    ] {
        forge(&document, |point| {
            let tables = point["promises"][0]["tables"].as_array_mut().expect("tables");
            change(tables.iter_mut().find(|table| table["name"] == "entity").expect("entity"));
        });
        let (code, result) = rehearsal.drill(&[]);
        assert_eq!((code, Rehearsal::kinds(&result)), (3, vec!["rows-differ"]), "{kind}: {result}");
        assert!(result["findings"][0]["message"].as_str().is_some_and(|text| text.contains("entity")), "{result}");
        std::fs::write(&document, &good).expect("put back");
    }
    // A table that is gone.
    forge(&document, |point| {
        let tables = point["promises"][0]["tables"].as_array_mut().expect("tables");
        tables.push(json!({"name": "vanished", "rows": 1, "hash": null}));
    });
    let (code, result) = rehearsal.drill(&[&id]);
    assert_eq!((code, Rehearsal::kinds(&result)), (3, vec!["not-readable"]), "{result}");
    std::fs::write(&document, &good).expect("put back");

    let pack = rehearsal.object(".pack");
    let whole = std::fs::read(&pack).expect("read");
    let mut damaged = whole.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    std::fs::write(&pack, damaged).expect("damage");
    let (code, result) = rehearsal.drill(&[]);
    assert_eq!((code, Rehearsal::kinds(&result)), (3, vec!["not-restored"]), "{result}");
    assert!(
        result["findings"][0]["message"].as_str().is_some_and(|text| text.contains(".pack is damaged")),
        "{result}"
    );
    std::fs::write(&pack, whole).expect("put back");

    let broken = rehearsal.stage.scratch.path().join("broken-server");
    std::fs::write(&broken, "#!/bin/sh\necho 'no, thank you' >&2\nexit 9\n").expect("write");
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(&broken, std::fs::Permissions::from_mode(0o755)).expect("make it run");
    let (code, result) = rehearsal.drill(&["--server-bin", path(&broken)]);
    assert_eq!((code, Rehearsal::kinds(&result)), (3, vec!["not-started"]), "{result}");
    assert!(result["findings"][0]["message"].as_str().is_some_and(|text| text.contains("no, thank you")), "{result}");
    assert_eq!(rehearsal.drill(&[]).0, 0);
    let list = rehearsal.stage.sidecar.run(["drill", "--list"]).ok();
    let passed: Vec<_> = list.as_array().expect("results").iter().map(|result| result["passed"] == true).collect();
    assert_eq!(passed, [false, false, false, false, false, true]);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_were_connected_at_the_restore_point_are_no_finding() {
    let rehearsal = Rehearsal::new();
    let owner = rehearsal.stage.owner().await;
    fill(&owner, 10).await;
    let port = rehearsal.stage.port.to_string();
    let config = inner_universe::config::Config {
        spacetimedb_config: inner_universe::config::SpacetimedbConfig {
            port: port.parse().expect("a port"),
            token_file: Some(rehearsal.stage.token_file()),
            ..Default::default()
        },
        ..Default::default()
    };
    let link = inner_universe::database::link::Link::new(&config.spacetimedb_config, &config.server_config, NAME);
    let mut link = link.expect("a link");
    link.connect().await.expect("connected");
    tokio::time::sleep(std::time::Duration::from_millis(1500)).await;
    let point = rehearsal.point(&rehearsal.backup());
    assert_eq!(point["promises"].as_array().map(Vec::len), Some(1), "{point}");
    let (code, result) = rehearsal.drill(&[]);
    assert_eq!(code, 0, "{result}");
    let changed = result["databases"][0]["changed_at_start"].as_array().expect("tables");
    assert!(changed.iter().any(|name| name == "client_connection"), "{result}");
    assert!(!changed.iter().any(|name| name == "entity"), "{result}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_drills_and_prunes_by_schedule_and_prunes_when_it_is_asked() {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let server = Server::start(&data, &keys).await;
    let client: Client = server.client().await;
    client.publish("ledger", tools::wasm("workload_module")).await;
    let sidecar = Sidecar::at(&scratch.path().join("repository")).configured(vec![
        ("SPACETIMEDB_CONFIG__DB_PATH".into(), path(&data).into()),
        ("SPACETIMEDB_CONFIG__URL".into(), server.url.clone()),
        ("SPACETIMEDB_CONFIG__SERVER_BIN".into(), path(&tools::server()).into()),
        ("RETENTION__KEEP_LAST".into(), "2".into()),
        ("RETENTION__GRACE".into(), "60s".into()),
        ("SCHEDULE__DRILL".into(), "*/2 * * * * *".into()),
        ("SCHEDULE__PRUNE".into(), "*/3 * * * * *".into()),
    ]);
    for _ in 0..4 {
        sidecar.run(["backup", "create"]).ok();
    }
    let mut daemon = Daemon::start(&sidecar, &data, &[], &[]);
    daemon.wait("a drill and a prune", |status| {
        let ok = |name: &str| {
            status.schedules.iter().any(|schedule| schedule.name == name && schedule.last_ok == Some(true))
        };
        ok("drill") && ok("prune")
    });
    let plan = sidecar.run(["prune"]).ok();
    assert_eq!((&plan["applied"], plan["kept"].as_array().map(Vec::len)), (&json!(false), Some(2)), "{plan}");
    // The daemon holds the lease, and so does it.
    let report = sidecar.run(["prune", "--apply"]).ok();
    assert_eq!(report["applied"], true);
    assert_eq!(report["deleted"]["objects"], 0, "their grace is not over: {report}");
    let pinned = report["removed"][0]["id"].as_str().expect("an id").to_owned();
    sidecar.run(["backup", "pin", &pinned]).ok();
    let plan = sidecar.run(["prune"]).ok();
    assert!(
        plan["kept"].as_array().is_some_and(|kept| kept.iter().any(|point| point["id"] == pinned.as_str())),
        "{plan}"
    );
    sidecar.run(["backup", "unpin", &pinned]).ok();
    assert!(sidecar.run(["backup", "pin", "01ARZ3NDEKTSV4RRFFQ69G5FAV"]).fails_with(1).contains("missing"));
    assert_eq!(daemon.stop(), 0);
}
