//! Deployments: what is published can be taken back, whatever fails.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use harness::client::{Client, none};
use harness::collector::{Certified, Collector};
use harness::daemon::Daemon;
use harness::gate::TlsFront;
use harness::sidecar::path;
use harness::stage::{NAME, Stage, TABLES, call, fill, settled};
use harness::tools;
use inner_universe::config::Config;
use inner_universe::database::link::Link;
use serde_json::{Value, json};
#[tokio::test(flavor = "multi_thread")]
async fn the_seeds_configuration_drives_deploy_server_start_a_client_call_and_stop() {
    let stage = Stage::new();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../module");
    let build = tools::wasm_build();
    let built = build.target.join("wasm32-unknown-unknown/release/inner_universe_module.wasm");
    // As the seed has it, but for paths and the port.
    let config = json!({
        "module_config": {"module_dir": source, "module_path": built, "build_module": true},
        "spacetimedb_config":
            {"db_path": stage.data, "address": "127.0.0.1", "port": stage.port, "log_level": "info"},
        "server_config": {"max_connections": 100, "timeout_ms": 30000, "cache_size_mb": 512, "auth_required": true},
        "feature_flags": {"enable_state_versioning": true, "enable_audit_log": true, "enable_metrics": true,
            "enable_caching": true, "enable_distribution": false}
    });
    let file = stage.scratch.path().join("config.json");
    std::fs::write(&file, config.to_string()).expect("write the configuration");
    let run = |arguments: &[&str]| {
        let mut command = std::process::Command::new(tools::inner_universe());
        command.env("INNER_UNIVERSE__ARCHIVE__STATE_DIR", stage.sidecar.state_dir()).envs(build.environment.clone());
        command.env("CARGO_TARGET_DIR", &build.target);
        command.env("INNER_UNIVERSE__SPACETIMEDB_CONFIG__SERVER_BIN", tools::server());
        let output = command.args(["--json", "--config", path(&file)]).args(arguments).output().expect("run it");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Value>(&output.stdout).expect("JSON")
    };
    let deployed = run(&["deploy"]);
    assert_eq!((&deployed["outcome"], &deployed["mode"]), (&json!("deployed"), &json!("deployment")), "{deployed}");
    assert!(deployed["steps"][0]["message"].as_str().is_some_and(|message| message.starts_with("built")), "{deployed}");
    let started = run(&["server", "start"]);
    assert_eq!((&started["ready"], &started["database_answers"]), (&json!(true), &json!(true)), "{started}");
    assert_eq!(run(&["server", "start"])["server_pid"], started["server_pid"], "a second start changes nothing");
    let owner = stage.owner().await;
    call(&owner, "create_entity", json!(["sun", "star", "{}"])).await;
    assert_eq!(owner.sql(NAME, "select * from entity").await.len(), 1);
    assert_eq!(run(&["server", "stop"])["stopped"], true);
    assert_eq!(run(&["server", "stop"])["stopped"], false, "nothing is left to stop");
    // What was written is still there after the next start.
    run(&["server", "start"]);
    assert_eq!(stage.owner().await.sql(NAME, "select * from entity").await.len(), 1);
    run(&["server", "stop"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_additive_module_keeps_rows_a_breaking_one_is_refused_and_the_same_changes_nothing() {
    let stage = Stage::new();
    assert_eq!(stage.deploy("")["migration"]["kind"], "first");
    stage.server("start");
    let owner = stage.owner().await;
    fill(&owner, 5).await;
    let before = owner.rows(NAME, TABLES).await;
    let again = stage.deploy("");
    assert_eq!((&again["outcome"], &again["mode"]), (&json!("unchanged"), &json!("online")), "{again}");
    assert_eq!(owner.rows(NAME, TABLES).await, before, "no transaction");

    let plan = stage.sidecar.run(["deploy", "plan", "--module-path", &stage.module("more")]).ok();
    assert_eq!(plan["migration"]["kind"], "additive", "{plan}");
    assert_eq!(owner.rows(NAME, TABLES).await, before, "a plan changes nothing");
    let report = stage.deploy("more");
    let steps = report["migration"]["steps"].as_array().expect("steps");
    assert!(steps.len() == 1 && steps[0].as_str().is_some_and(|step| step.contains("annotation")), "{report}");
    assert!(report["restore_point"].is_string(), "{report}");
    let mut after = owner.rows(NAME, TABLES).await;
    assert_eq!(after.insert("annotation".into(), vec!["no such table".into()]), Some(vec![]));
    after.get_mut("event_log").expect("events").retain(|row| !row.contains("DEPLOYMENT_VERIFIED"));
    let mut expected = before;
    expected.get_mut("event_log").expect("events").retain(|row| !row.contains("DEPLOYMENT_VERIFIED"));
    assert_eq!(after, expected);

    let running = owner.sql(NAME, "select program_hash from st_module").await;
    let next = stage.scratch.path().join("next.wasm");
    std::fs::write(&next, tools::wasm("inner_universe_module_next")).expect("a module");
    let rows = owner.rows(NAME, TABLES).await;
    let message = stage.sidecar.run(["deploy", "--module-path", path(&next)]).fails_with(6);
    assert!(message.contains("severity") && message.contains("nothing was changed"), "{message}");
    assert_eq!(owner.sql(NAME, "select program_hash from st_module").await, running);
    assert_eq!(owner.rows(NAME, TABLES).await, rows);
    std::fs::write(&next, "no module").expect("a file");
    let message = stage.sidecar.run(["deploy", "--module-path", path(&next)]).fails_with(2);
    assert!(message.contains("neither WebAssembly nor"), "{message}");
    assert_eq!(stage.history(), ["deployed", "deployed"]);
    // The token is in its own file and nowhere else: no log, note, journal, record or report.
    let secret = owner.token.rsplit('.').next().expect("a signature");
    let mut kept = Vec::new();
    for root in [stage.sidecar.state_dir(), stage.scratch.path().join("repository")] {
        files_with(&root, secret.as_bytes(), &mut kept);
    }
    let names: Vec<_> =
        kept.iter().filter_map(|path| path.file_name()?.to_str()).filter(|name| *name != "owner").collect();
    assert_eq!(names, ["token"], "{kept:?}");
    assert!(![&again, &plan, &report].iter().any(|report| report.to_string().contains(secret)));
}

fn files_with(dir: &std::path::Path, text: &[u8], found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("a directory").flatten() {
        let path = entry.path();
        if path.is_dir() {
            files_with(&path, text, found);
        } else if std::fs::read(&path).is_ok_and(|bytes| bytes.windows(text.len()).any(|window| window == text)) {
            found.push(path);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_that_fails_its_verification_under_load_is_taken_back_without_losing_a_write_from_before() {
    let stage = Stage::new();
    stage.deploy("");
    stage.server("start");
    let owner = stage.owner().await;
    fill(&owner, 5).await;
    let (stop, acknowledged) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let writers: Vec<_> = (0..2)
        .map(|writer| {
            let (owner, stop, acknowledged) = (owner.clone(), Arc::clone(&stop), Arc::clone(&acknowledged));
            tokio::spawn(async move {
                let mut n = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    let row = json!([format!("w{writer}-{n}"), "load", "{}"]);
                    match owner.call(NAME, "create_entity", row).await {
                        Ok(()) => {
                            acknowledged.fetch_add(1, Ordering::SeqCst);
                            n += 1;
                        }
                        // The server is away while its files are taken back.
                        Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                    }
                }
            })
        })
        .collect();
    while acknowledged.load(Ordering::SeqCst) < 200 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let before = acknowledged.load(Ordering::SeqCst);
    let deploying = {
        let (sidecar, module) = (stage.sidecar.clone(), stage.module("broken"));
        tokio::task::spawn_blocking(move || sidecar.run(["deploy", "--module-path", &module]))
    };
    let message = deploying.await.expect("a run").fails_with(1);
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.expect("a writer");
    }
    assert!(message.contains("broken on purpose") && message.contains("right before the publish"), "{message}");
    let rows = owner.rows(NAME, TABLES).await;
    assert_eq!(rows["annotation"], ["no such table"], "the older program runs");
    let entities = owner.sql(NAME, "select * from entity").await;
    for writer in 0..2 {
        let prefix = format!("w{writer}-");
        let number = |row: &Value| row[0].as_str()?.strip_prefix(&prefix)?.parse::<u64>().ok();
        let mut numbers: Vec<_> = entities.iter().filter_map(number).collect();
        numbers.sort_unstable();
        // Those from after the rollback begin where its writer stood; those from before it are whole.
        let whole = numbers.iter().enumerate().take_while(|(index, n)| *index as u64 == **n).count() as u64;
        assert!(whole >= before / 2 - 100, "writer {writer}: {whole} of {before} acknowledged before");
    }
    let kept = entities.iter().filter(|row| row[1] == "load").count() as u64;
    assert!(kept >= before, "{kept} rows are there, {before} were acknowledged before the deployment");
    let versions = owner.sql(NAME, "select * from state_version").await;
    assert_eq!(versions.len(), entities.len(), "rows and their versions are of one moment");
    assert_eq!(stage.history(), ["deployed", "rolled-back"]);
    // What was there is not deleted, and the next deployment works.
    let aside = |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().contains("before-rollback");
    let entries = std::fs::read_dir(stage.scratch.path()).expect("a directory").flatten();
    assert_eq!(entries.filter(aside).count(), 1);
    assert_eq!(stage.deploy("more")["outcome"], "deployed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_deployment_in_deployment_mode_leaves_every_row_and_a_failed_first_one_no_directory() {
    let mut stage = Stage::new();
    let message = stage.sidecar.run(["deploy", "--module-path", &stage.module("broken")]).fails_with(1);
    assert!(message.contains("moved aside"), "{message}");
    assert!(!stage.data.exists(), "nothing was there before");
    stage.deploy("");
    stage.server("start");
    fill(&stage.owner().await, 20).await;
    stage.server("stop");
    let before = stage.rows().await;
    // Admins, members and settings that the failed deployment would have brought go with it.
    stage.configure(&[
        ("DEPLOY__ADMINS", &"ab".repeat(32)),
        ("DEPLOY__MEMBERS", &"cd".repeat(32)),
        ("SERVER_CONFIG__MAX_CONNECTIONS", "7"),
    ]);
    let message = stage.sidecar.run(["deploy", "--module-path", &stage.module("broken")]).fails_with(1);
    assert!(message.contains("right before the publish"), "{message}");
    assert_eq!(settled(stage.rows().await), settled(before));
    // A backup of what is there now, and a restore of it.
    let backup = stage.sidecar.run(["backup", "create", "--data-dir", path(&stage.data)]);
    assert_eq!(backup.code, 0, "{}", backup.stderr);
    assert_eq!(stage.sidecar.run(["verify"]).ok()["findings"].as_array().map(Vec::len), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_is_undone_by_its_program_alone_or_with_its_rows() {
    let stage = Stage::new();
    stage.deploy("");
    // The same program with a note in it: another hash, the same tables.
    let mut noted = tools::wasm("inner_universe_module");
    noted.extend([0, 6, 4, b'n', b'o', b't', b'e', 1]);
    let file = stage.scratch.path().join("noted.wasm");
    std::fs::write(&file, noted).expect("a module");
    stage.server("start");
    let owner = stage.owner().await;
    fill(&owner, 3).await;
    let first = owner.sql(NAME, "select program_hash from st_module").await;
    stage.sidecar.run(["deploy", "--module-path", path(&file)]).ok();
    call(&owner, "create_entity", json!(["since", "thing", "{}"])).await;
    let plan = stage.sidecar.run(["deploy", "rollback", "--dry-run"]).ok();
    assert_eq!(plan["message"], "rows stay", "{plan}");
    stage.sidecar.run(["deploy", "rollback"]).ok();
    assert_eq!(owner.sql(NAME, "select program_hash from st_module").await, first);
    assert_eq!(owner.sql(NAME, "select * from entity").await.len(), 4, "rows stay");

    let before = owner.rows(NAME, &["entity", "annotation"]).await;
    stage.deploy("more");
    call(&owner, "create_entity", json!(["lost", "thing", "{}"])).await;
    // Without rows, a server of 2.x lets the table go.
    owner.sql(NAME, "INSERT INTO annotation (annotation_id, text) VALUES (1, 'kept')").await;
    let message = stage.sidecar.run(["deploy", "rollback"]).fails_with(6);
    assert!(message.contains("annotation") && message.contains("--data"), "{message}");
    let history = stage.sidecar.run(["deploy", "history"]).ok();
    let last = history["deployments"].as_array().and_then(|records| records.last()).expect("a deployment");
    let beside = stage.scratch.path().join("before-publish");
    let to = format!("before-publish:{}", &last["module"].as_str().expect("a hash")[..12]);
    let restored = stage.sidecar.run(["restore", "--to", &to, "--data-dir", path(&beside)]).ok();
    let publish = last["publish_offset"].as_u64().expect("an offset");
    assert_eq!(restored["databases"][0]["offset"], publish - 1, "{restored}");
    for (to, code) in [("before-publish:00000000", 4), ("before-publish:no", 2)] {
        let run = stage.sidecar.run(["restore", "--to", to, "--data-dir", path(&stage.scratch.path().join("none"))]);
        assert_eq!(run.code, code, "{}", run.stderr);
    }
    stage.sidecar.run(["deploy", "rollback", "--data"]).ok();
    assert_eq!(owner.rows(NAME, &["entity", "annotation"]).await, before);
    assert_eq!(stage.history(), ["deployed", "deployed", "undone", "deployed", "undone"]);
    let message = stage.sidecar.run(["deploy", "rollback"]).fails_with(4);
    assert!(message.contains("no earlier program"), "{message}");
}

/// A connection that stays open.
async fn connect(stage: &Stage, client: &Client) -> Result<Link, String> {
    let token = stage.scratch.path().join(format!("token-{}", client.identity));
    std::fs::write(&token, &client.token).expect("a token");
    let mut config = Config::default();
    config.spacetimedb_config.url = Some(client.url().to_owned());
    config.spacetimedb_config.token_file = Some(token);
    let link = Link::new(&config.spacetimedb_config, &config.server_config, NAME);
    let mut link = link.map_err(|error| error.to_string())?;
    link.query("SELECT * FROM config").await.map_err(|error| error.to_string())?;
    Ok(link)
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_and_flags_reach_the_module_at_deploy_and_do_what_they_say() {
    let mut stage = Stage::with(&[("SERVER_CONFIG__MAX_CONNECTIONS", "3")]);
    stage.deploy("");
    stage.server("start");
    let owner = stage.owner().await;
    let stranger = Client::new(owner.url()).await;
    let refused = connect(&stage, &stranger).await.err().expect("a stranger is refused");
    println!("{refused}");
    let refused = stranger.call(NAME, "create_entity", json!(["x", "y", "{}"])).await.expect_err("a stranger");
    assert!(refused.contains("auth_required"), "{refused}");
    let mut members = Vec::new();
    for _ in 0..4 {
        let member = Client::new(owner.url()).await;
        call(&owner, "add_member", json!([{"__identity__": format!("0x{}", member.identity)}, "a member"])).await;
        members.push(member);
    }
    let mut open = Vec::new();
    for member in &members[..3] {
        open.push(connect(&stage, member).await.expect("one of three"));
    }
    assert!(connect(&stage, &members[3]).await.is_err(), "the fourth");
    // One goes in good order, another as if it had crashed; either frees its place.
    open.pop().expect("a connection").close().await;
    open.push(patiently(&stage, &members[3]).await);
    drop(open.remove(0));
    open.push(patiently(&stage, &members[2]).await);
    assert!(connect(&stage, &members[0]).await.is_err(), "three are connected again");
    drop(open);

    // With the flags on.
    call(&owner, "create_entity", json!(["a", "thing", "{}"])).await;
    call(&owner, "record_metric", json!(["load", 0.5, "1", []])).await;
    let count = async |table: &str| owner.sql(NAME, &format!("select * from {table}")).await.len();
    assert_eq!((count("state_version").await, count("metric").await), (1, 1));
    let refused = owner.call(NAME, "begin_import", json!(["c200ffff"])).await.expect_err("another instance");
    assert!(refused.contains("enable_distribution"), "{refused}");

    stage.configure(&[
        ("SERVER_CONFIG__AUTH_REQUIRED", "false"),
        ("SERVER_CONFIG__MAX_CONNECTIONS", "0"),
        ("SERVER_CONFIG__TIMEOUT_MS", "5000"),
        ("SERVER_CONFIG__CACHE_SIZE_MB", "64"),
        ("FEATURE_FLAGS__ENABLE_STATE_VERSIONING", "false"),
        ("FEATURE_FLAGS__ENABLE_AUDIT_LOG", "false"),
        ("FEATURE_FLAGS__ENABLE_METRICS", "false"),
        ("FEATURE_FLAGS__ENABLE_CACHING", "false"),
        ("FEATURE_FLAGS__ENABLE_DISTRIBUTION", "true"),
    ]);
    let report = stage.deploy("");
    assert_eq!(report["outcome"], "deployed", "{report}");
    assert_eq!(report["changes"]["settings"].as_array().map(Vec::len), Some(9), "{report}");
    connect(&stage, &stranger).await.expect("everybody may connect");
    let (versions, events) = (count("state_version").await, count("event_log").await);
    call(&stranger, "create_entity", json!(["b", "thing", "{}"])).await;
    assert_eq!((count("state_version").await, count("event_log").await), (versions, events));
    let refused = owner.call(NAME, "record_metric", json!(["load", 0.5, "1", []])).await.expect_err("metrics are off");
    assert!(refused.contains("enable_metrics"), "{refused}");
    call(&owner, "begin_import", json!(["c200ffff"])).await;
    // What an application writes by itself is no audit, and stays.
    call(&owner, "record_event", json!(["MINE", none(), none(), {"Empty": []}])).await;
    assert_eq!(count("event_log").await, events + 1);
}

/// The server needs a moment to see that a client is gone.
async fn patiently(stage: &Stage, client: &Client) -> Link {
    for _ in 0..100 {
        if let Ok(link) = connect(stage, client).await {
            return link;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the place of a client that is gone was not freed");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sidecar_serves_deploys_beside_itself_and_takes_back_what_fails() {
    let stage = Stage::new();
    stage.deploy("");
    let mut daemon = Daemon::start_with(&stage.sidecar, &stage.data, &[], &["--serve"], &[]);
    daemon.wait("the archive", |status| status.databases.iter().any(|found| found.archived_offset.is_some()));
    harness::server::wait_for(&format!("http://127.0.0.1:{}", stage.port)).await;
    let owner = stage.owner().await;
    fill(&owner, 10).await;
    assert_eq!(stage.server("status")["started_by"], "sidecar");
    let before = owner.rows(NAME, TABLES).await;
    let message = stage.sidecar.run(["deploy", "--module-path", &stage.module("broken")]).fails_with(1);
    assert!(message.contains("right before the publish"), "{message}");
    assert_eq!(owner.rows(NAME, TABLES).await, before);
    assert_eq!(stage.deploy("more")["outcome"], "deployed");
    assert_eq!(owner.rows(NAME, &["entity"]).await["entity"], before["entity"]);
    // The archive goes on, and is that of the log as it is now.
    call(&owner, "create_entity", json!(["after", "thing", "{}"])).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    daemon.wait("the archive", |status| {
        status.databases.iter().all(|found| found.log_offset.is_some() && found.archived_offset == found.log_offset)
    });
    let restored = stage.scratch.path().join("restored");
    stage.sidecar.run(["restore", "--data-dir", path(&restored)]).ok();
    let server = harness::server::Server::start(&restored, &stage.scratch.path().join("data.keys")).await;
    assert_eq!(owner.at(&server.url).rows(NAME, TABLES).await, owner.rows(NAME, TABLES).await);
    server.stop();
    assert_eq!(stage.history(), ["deployed", "rolled-back", "deployed"]);
    stage.server("stop");
    assert_eq!(stage.sidecar.run(["server", "status"]).json["running"], false);
    assert_eq!(stage.server("start")["started_by"], "sidecar");
    assert_eq!(daemon.stop(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_behind_tls_of_a_private_authority_is_trusted_with_its_certificate_and_not_without() {
    let mut stage = Stage::new();
    stage.deploy("");
    stage.server("start");
    let owner = stage.owner().await;
    fill(&owner, 5).await;
    let certified = Certified::new().expect("a certificate");
    let front = TlsFront::before(owner.url(), &certified).await;
    let (ca, url) = (stage.scratch.path().join("ca.pem"), front.url.clone());
    std::fs::write(&ca, &certified.certificate).expect("the authority");
    // Seen from another machine: the address alone leads there.
    let token = stage.scratch.path().join("owner");
    std::fs::write(&token, &owner.token).expect("the token");
    let there = [
        ("SPACETIMEDB_CONFIG__URL", url.as_str()),
        ("SPACETIMEDB_CONFIG__DATABASE", NAME),
        ("SPACETIMEDB_CONFIG__TOKEN_FILE", path(&token)),
    ];
    stage.configure(&there);
    let message = stage.sidecar.run(["export", "event-log"]).fails_with(1);
    assert!(message.contains("certificate"), "{message}");
    let trusting = [&there[..], &[("SPACETIMEDB_CONFIG__CA_FILE", path(&ca))]].concat();
    stage.configure(&trusting);
    let report = stage.sidecar.run(["export", "all"]).ok();
    assert!(report["tables"].as_array().expect("tables").iter().any(|table| table["rows"] == 5), "{report}");
    let plan = stage.sidecar.run(["deploy", "plan", "--module-path", &stage.module("more")]).ok();
    assert_eq!((&plan["mode"], &plan["migration"]["kind"]), (&json!("online"), &json!("additive")), "{plan}");
    assert_eq!(stage.deploy("more")["outcome"], "deployed");
    let message = stage.sidecar.run(["-q", "replay", "--table", "entity"]);
    assert_eq!(message.code, 0, "{}", message.stderr);
    // The event stream, whose SDK knows no authorities.
    let collector = Collector::start().await;
    let streaming = [("TELEMETRY__OTLP_ENDPOINT", collector.http.as_str()), ("TELEMETRY__STATUS_INTERVAL", "0s")];
    let mut daemon = Daemon::start(&stage.sidecar, &stage.data, &streaming, &[]);
    daemon.wait("the archive", |status| status.databases.iter().any(|found| found.archived_offset.is_some()));
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    let mut n = 0;
    while !collector.taken().logs.iter().any(|record| format!("{record:?}").contains("LIVE")) {
        assert!(std::time::Instant::now() < deadline, "no live event came: {}", daemon.log());
        n += 1;
        call(&owner, "record_event", json!(["LIVE", none(), none(), {"Empty": []}])).await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!("{n} events were recorded until one came");
    assert_eq!(daemon.stop(), 0);
    stage.configure(&[]);
}
