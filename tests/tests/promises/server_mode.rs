//! Server mode, and the deployment checklist.

use std::path::PathBuf;
use std::time::Duration;

use harness::stage::Stage;
use serde_json::{Value, json};

#[tokio::test(flavor = "multi_thread")]
async fn server_mode_keeps_a_log_restarts_after_a_crash_and_touches_no_server_of_others() {
    let mut stage = Stage::with(&[("SPACETIMEDB_CONFIG__LOG_LEVEL", "error")]);
    stage.deploy("");
    let started = stage.server("start");
    let log = PathBuf::from(started["log"].as_str().expect("a log"));
    let quiet = std::fs::read_to_string(&log).expect("the log");
    assert!(!quiet.contains("DEBUG") && !quiet.contains("INFO"), "{quiet}");
    // A crash: it is started again, and its lock does no harm.
    let pid = started["server_pid"].as_u64().expect("a process");
    let killed = std::process::Command::new("kill").args(["-9", &pid.to_string()]).status();
    assert!(killed.is_ok_and(|status| status.success()));
    let mut again = Value::Null;
    for _ in 0..200 {
        again = stage.sidecar.run(["server", "status"]).json;
        if again["ready"] == true && again["server_pid"] != started["server_pid"] {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!((&again["ready"], &again["starts"]), (&json!(true), &json!(2)), "{again}");
    stage.server("stop");
    let status = stage.sidecar.run(["server", "status"]);
    assert_eq!((status.code, &status.json["running"]), (3, &json!(false)));

    stage.configure(&[("SPACETIMEDB_CONFIG__LOG_LEVEL", "debug")]);
    stage.server("start");
    let loud = std::fs::read_to_string(&log).expect("the log");
    assert!(loud.contains("DEBUG"), "{loud}");
    stage.server("stop");

    // A server that somebody else started.
    let other = harness::server::Server::start(&stage.data, &stage.scratch.path().join("data.keys")).await;
    let message = stage.sidecar.run(["server", "start"]).fails_with(6);
    assert!(message.contains("already"), "{message}");
    let message = stage.sidecar.run(["server", "stop"]).fails_with(6);
    assert!(message.contains(&other.pid().to_string()), "{message}");
    other.stop();
    let taken = std::net::TcpListener::bind(("127.0.0.1", stage.port)).expect("the port");
    let message = stage.sidecar.run(["server", "start"]).fails_with(6);
    assert!(message.contains("is taken"), "{message}");
    drop(taken);
    stage.configure(&[("SPACETIMEDB_CONFIG__SERVER_BIN", "/nowhere/server")]);
    let message = stage.sidecar.run(["server", "start"]).fails_with(2);
    assert!(message.contains("/nowhere/server") && message.contains("server_bin"), "{message}");
    stage.configure(&[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_checklist_passes_where_all_is_well_and_names_what_is_not() {
    let mut stage = Stage::new();
    let module = stage.module("");
    let good = [
        ("MODULE_CONFIG__MODULE_PATH", module.as_str()),
        ("SCHEDULE__RESTORE_POINT", "0 0 * * * *"),
        ("SCHEDULE__VERIFY", "0 30 3 * * *"),
        ("TELEMETRY__HEARTBEAT_URL", "http://127.0.0.1:1/alarm"),
    ];
    stage.configure(&good);
    stage.sidecar.run(["deploy"]).ok();
    stage.sidecar.run(["backup", "create"]).ok();
    stage.server("start");
    let run = stage.sidecar.run(["doctor"]);
    assert_eq!((run.code, &run.json["ok"]), (0, &json!(true)), "{}", run.json);
    let verdict = |json: &Value, name: &str| {
        let checks = json["checks"].as_array().expect("checks").clone();
        let found = checks.into_iter().find(|check| check["check"] == name);
        found.unwrap_or_else(|| panic!("no check `{name}`: {json}"))["verdict"].as_str().expect("a verdict").to_owned()
    };
    for name in [
        "server",
        "module",
        "data directory",
        "port",
        "authentication",
        "token",
        "repository",
        "conditional writes",
        "backup",
        "monitoring",
        "schedule",
        "configuration",
        "disk",
        "clock",
    ] {
        assert_eq!(verdict(&run.json, name), "pass", "{name}: {}", run.json);
    }
    stage.server("stop");
    let state = std::fs::read_dir(stage.sidecar.state_dir()).expect("state").flatten();
    let token = state.map(|dir| dir.path().join("token")).find(|path| path.is_file()).expect("a token");
    use std::os::unix::fs::PermissionsExt as _;
    assert_eq!(std::fs::metadata(&token).expect("the token").permissions().mode() & 0o777, 0o600);
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o644)).expect("loosen it");
    let taken = std::net::TcpListener::bind(("127.0.0.1", stage.port)).expect("the port");
    let bad = [
        ("MODULE_CONFIG__MODULE_PATH", "/nowhere.wasm"),
        ("SERVER_CONFIG__AUTH_REQUIRED", "false"),
        ("REPOSITORY__REQUEST_TIMEOUT", "1s"),
        ("HTTP__ENABLED", "false"),
    ];
    stage.configure(&bad);
    let run = stage.sidecar.run(["doctor"]);
    assert_eq!((run.code, &run.json["ok"]), (3, &json!(false)), "{}", run.json);
    for (name, expected) in [
        ("module", "fail"),
        ("port", "fail"),
        ("monitoring", "fail"),
        ("authentication", "warn"),
        ("token", "warn"),
        ("schedule", "warn"),
    ] {
        assert_eq!(verdict(&run.json, name), expected, "{name}: {}", run.json);
    }
    let unfixed = |check: &Value| check["verdict"] != "pass" && check["fix"] == "";
    assert!(!run.json["checks"].as_array().expect("checks").iter().any(unfixed), "each says what to do: {}", run.json);
    assert!(!run.json.to_string().contains("eyJ"), "no token is told");
    drop(taken);
}
