//! The configuration: one exact message for everything that can be wrong with it.

use std::path::Path;
use std::process::Command;

use harness::tools;
use inner_universe::config::tree::{Content, Format, Node, parse};
use proptest::prelude::*;
use serde_json::Value;

struct Checked {
    code: i32,
    json: Value,
    stderr: String,
}

fn inner_universe(arguments: &[&str], environment: &[(&str, &str)]) -> Checked {
    let mut command = Command::new(tools::inner_universe());
    command.env_clear().args(["--json"]).args(arguments).envs(environment.iter().copied());
    let output = command.output().expect("run inner-universe");
    Checked {
        code: output.status.code().unwrap_or(-1),
        json: serde_json::from_slice(&output.stdout).unwrap_or(Value::Null),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

fn check(path: &Path, environment: &[(&str, &str)]) -> Vec<String> {
    let checked = inner_universe(&["--config", path.to_str().expect("UTF-8"), "config", "check"], environment);
    assert!(!checked.stderr.contains("panicked"), "{}", checked.stderr);
    let problems: Vec<String> = checked.json["problems"]
        .as_array()
        .unwrap_or_else(|| panic!("{} {}", checked.json, checked.stderr))
        .iter()
        .map(|problem| {
            let text = |name: &str| problem[name].as_str().unwrap_or_default().to_owned();
            let place = text("place").rsplit('/').next().unwrap_or_default().to_owned();
            format!("{place} {} {}", text("key"), text("message"))
        })
        .collect();
    assert_eq!(checked.code, if problems.is_empty() { 0 } else { 2 });
    problems
}

#[test]
fn each_malformed_configuration_gives_one_exact_message() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    // The file, its text, and what the one problem must hold.
    let cases: &[(&str, &str, &[&str])] = &[
        ("a.toml", "[archive\nx = 1", &["a.toml:1 "]),
        ("a.toml", "[archive]\nflush_interval = 1s", &["a.toml:2 "]),
        ("a.json", "{\"archive\": {\"flush_interval\": \"1s\",}}", &["a.json:1 "]),
        ("a.yaml", "archive: [1, 2", &["a.yaml:"]),
        ("a.yaml", "- archive", &["a.yaml:1 ", "a table of sections is expected"]),
        ("a.ini", "x = 1", &["a.ini", ".toml, .json, .yaml or .yml"]),
        ("a.toml", "[archve]\nx = 1", &["a.toml:1 archve", "did you mean `archive`?"]),
        (
            "a.toml",
            "[archive]\nflush_intervall = \"1s\"",
            &["a.toml:2 archive.flush_intervall", "did you mean `flush_interval`?"],
        ),
        (
            "a.json",
            "{\n \"spacetimedb_config\": {\n  \"prt\": 3000\n }\n}",
            &["a.json:3 spacetimedb_config.prt", "did you mean `port`?"],
        ),
        ("a.yaml", "server_config:\n  max_conections: 3\n", &["a.yaml:2 ", "did you mean `max_connections`?"]),
        ("a.toml", "archive = 3", &["a.toml:1 archive", "this is a section"]),
        ("a.toml", "[archive.flush_interval]\nx = 1", &["archive.flush_interval", "a value is expected here"]),
        ("a.toml", "[spacetimedb_config]\nport = \"3000\"", &["a.toml:2 spacetimedb_config.port", "expected u16"]),
        ("a.toml", "[spacetimedb_config]\nport = 70000", &["spacetimedb_config.port", "70000"]),
        ("a.toml", "[server_config]\nauth_required = \"yes\"", &["server_config.auth_required", "expected a boolean"]),
        ("a.toml", "[server_config]\nmax_connections = -1", &["server_config.max_connections", "-1"]),
        ("a.toml", "[server_config]\ntimeout_ms = 0", &["a.toml:2 server_config.timeout_ms", "milliseconds"]),
        ("a.toml", "[spacetimedb_config]\nlog_level = \"loud\"", &["spacetimedb_config.log_level", "`loud`", "`info`"]),
        ("a.toml", "[spacetimedb_config]\naddress = \"nowhere\"", &["spacetimedb_config.address", "no IP address"]),
        (
            "a.toml",
            "[archive]\nflush_interval = \"soon\"",
            &["archive.flush_interval", "write it as 250ms, 30s, 5m, 1h or 7d"],
        ),
        ("a.toml", "[archive]\nflush_interval = \"-1s\"", &["archive.flush_interval", "no length of time"]),
        ("a.toml", "[archive]\nflush_interval = \"1ms\"", &["archive.flush_interval", "less than"]),
        ("a.toml", "[archive]\nflush_bytes = \"big\"", &["archive.flush_bytes", "write it as 512KiB"]),
        ("a.toml", "[archive]\nflush_bytes = \"1GiB\"", &["archive.flush_bytes", "not from 1 B to 4MiB"]),
        ("a.toml", "[schedule]\nrestore_point = \"0 3 * * *\"", &["schedule.restore_point", "six fields"]),
        ("a.toml", "[schedule]\nrestore_point = \"0 0 25 * * *\"", &["schedule.restore_point", "cron"]),
        ("a.toml", "[schedule]\nverify = \"0 0 0 31 2 *\"", &["schedule.verify", "never comes"]),
        ("a.toml", "[schedule]\ntime_zone = \"Mars/Olympus\"", &["schedule.time_zone", "Europe/Berlin"]),
        ("a.toml", "[repository]\nurl = \"var/backups\"", &["repository.url", "neither an absolute path"]),
        ("a.toml", "[repository]\nurl = \"ftp://host/x\"", &["repository.url", "use file, s3, gs or az"]),
        ("a.toml", "[repository]\nurl = \"s3:///prefix\"", &["repository.url", "names no bucket"]),
        ("a.toml", "[repository]\nurl = \"s3://k:secret@bucket/p\"", &["repository.url", "not in the address"]),
        (
            "a.toml",
            "[repository]\nendpoint = \"minio:9000\"",
            &["repository.endpoint", "no http:// or https:// address"],
        ),
        ("a.toml", "[repository]\naccess_key_id = \"k\"", &["repository.access_key_id", "give both"]),
        (
            "a.toml",
            "[repository]\nsecret_access_key = \"file:/nowhere/secret\"",
            &["a.toml:2 repository.secret_access_key", "/nowhere/secret"],
        ),
        (
            "a.toml",
            "[repository]\nsession_token = \"env:NO_SUCH_VARIABLE\"",
            &["repository.session_token", "NO_SUCH_VARIABLE"],
        ),
        ("a.toml", "[repository]\nsession_token = \"token\"", &["a.toml:2 repository.session_token", "access_key_id"]),
        (
            "a.toml",
            "[repository]\nurl = \"s3://b/p\"\nendpoint = \"http://127.0.0.1:9000\"\npath_style = false",
            &["a.toml:4 repository.path_style", "path_style = true"],
        ),
        (
            "a.toml",
            "[repository]\nurl = \"s3://b/p\"\nendpoint = \"https://b.example.org\"\npath_style = false",
            &["a.toml:4 repository.path_style", "without it (example.org)"],
        ),
        (
            "a.toml",
            "[repository]\nendpoint = \"https://example.org/#1\"",
            &["repository.endpoint", "neither `?` nor `#`"],
        ),
        (
            "a.toml",
            "[repository]\nstorage_class = \"DEEP_ARCHIVE\"",
            &["a.toml:2 repository.storage_class", "archive tier"],
        ),
        ("a.toml", "[repository]\ncompression_level = 30", &["repository.compression_level", "not from 1 to 19"]),
        ("a.toml", "[repository]\nrecipients = [\"age1wrong\"]", &["repository.recipients", "not an age recipient"]),
        ("a.toml", "[repository]\nca_file = \"/nowhere/ca.pem\"", &["repository.ca_file", "/nowhere/ca.pem"]),
        (
            "a.toml",
            "[repository]\nserver_side_encryption = \"rot13\"",
            &["repository.server_side_encryption", "AES256"],
        ),
        ("a.toml", "[repository]\nlease_duration = \"1s\"", &["repository.lease_duration", "less than 3s"]),
        ("a.toml", "[telemetry]\notlp_endpoint = \"collector:4317\"", &["telemetry.otlp_endpoint", "http://"]),
        ("a.toml", "[telemetry]\notlp_protocol = \"thrift\"", &["telemetry.otlp_protocol", "`thrift`", "`grpc`"]),
        ("a.toml", "[telemetry]\notlp_headers = [\"secret@\"]", &["telemetry.otlp_headers", "NAME=VALUE"]),
        ("a.toml", "[telemetry]\nheartbeat_url = \"secret@\"", &["telemetry.heartbeat_url", "http://"]),
        ("a.toml", "[http]\nlisten = \"9464\"", &["http.listen", "127.0.0.1:9464"]),
        ("a.toml", "[http]\nlisten = \"0.0.0.0:9464\"", &["http.listen", "set http.token"]),
    ];
    for (name, text, expected) in cases {
        let path = dir.path().join(name);
        std::fs::write(&path, text).expect("write");
        let problems = check(&path, &[]);
        assert_eq!(problems.len(), 1, "{text}: {problems:?}");
        for part in *expected {
            assert!(problems[0].contains(part), "{text}: `{}` lacks `{part}`", problems[0]);
        }
        assert!(!problems[0].contains("secret@"), "{}", problems[0]);
    }
    let missing = check(&dir.path().join("missing.toml"), &[]);
    assert!(missing.len() == 1 && missing[0].contains("No such file"), "{missing:?}");
    let path = dir.path().join("empty.toml");
    std::fs::write(&path, "").expect("write");
    for (name, value, expected) in [
        ("INNER_UNIVERSE__ARCHIVE__FLUSH_INTERVAL", "soon", "no length of time"),
        ("INNER_UNIVERSE__ARCHIVE__FLUSH", "1s", "did you mean"),
        ("INNER_UNIVERSE__ARCHIVE", "1s", "INNER_UNIVERSE__SECTION__KEY"),
        ("INNER_UNIVERSE__SPACETIMEDB_CONFIG__PORT", "http", "expected u16"),
    ] {
        let problems = check(&path, &[(name, value)]);
        assert!(problems.len() == 1 && problems[0].contains(name) && problems[0].contains(expected), "{problems:?}");
    }
}

#[test]
fn all_problems_are_told_at_once_and_other_commands_refuse_with_them() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("a.yaml");
    std::fs::write(
        &path,
        "archive:\n  flush_intervall: 1s\nrepository:\n  url: nowhere\nserver_config:\n  timeout_ms: 0\n",
    )
    .expect("write");
    assert_eq!(check(&path, &[]).len(), 3);
    let run = inner_universe(&["--config", path.to_str().expect("UTF-8"), "backup", "list"], &[]);
    assert_eq!(run.code, 2);
    assert!(run.stderr.contains("flush_interval") && run.stderr.contains("nowhere"), "{}", run.stderr);
}

#[test]
fn file_environment_and_flags_win_in_this_order_and_secrets_do_not_show() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("a.toml");
    let text = "[repository]\nurl = \"file:///from/the/file\"\nsecret_access_key = \"hush\"\naccess_key_id = \"k\"\n\
                [archive]\nflush_interval = \"5s\"\n";
    std::fs::write(&path, text).expect("write");
    let environment = [
        ("INNER_UNIVERSE__ARCHIVE__FLUSH_INTERVAL", "250ms"),
        ("INNER_UNIVERSE__ARCHIVE__COMPACTION", "false"),
        ("INNER_UNIVERSE__REPOSITORY__URL", "file:///from/the/environment"),
        ("INNER_UNIVERSE__SPACETIMEDB_CONFIG__PORT", "4000"),
    ];
    let arguments =
        ["--config", path.to_str().expect("UTF-8"), "--repository", "file:///from/the/flag", "config", "show"];
    let shown = inner_universe(&arguments, &environment);
    let of = |key: &str| {
        let found = shown.json.as_array().and_then(|keys| keys.iter().find(|found| found["key"] == key));
        found.unwrap_or_else(|| panic!("{key}: {} {}", shown.json, shown.stderr)).clone()
    };
    assert_eq!(of("repository.url")["value"], "file:///from/the/flag");
    assert_eq!(of("repository.url")["source"]["flag"]["flag"], "--repository");
    assert_eq!(of("archive.flush_interval")["value"], "250ms");
    assert_eq!(of("archive.compaction")["value"], false);
    assert_eq!(of("spacetimedb_config.port")["value"], 4000);
    assert_eq!(of("repository.access_key_id")["source"]["file"]["line"], 4);
    assert_eq!(of("repository.secret_access_key")["value"], "(redacted)");
    assert_eq!(of("archive.flush_bytes")["source"], "default");
    assert!(!shown.json.to_string().contains("hush"));
}

#[test]
fn the_sample_and_the_seeds_file_are_accepted_as_they_stand_and_fit_the_schema() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let sample = root.join("docs/inner-universe.sample.toml");
    assert_eq!(check(&sample, &[]), Vec::<String>::new());
    // Everything that can be set is in the sample, with its default where it has one.
    let text = std::fs::read_to_string(&sample).expect("the sample");
    let shown = inner_universe(&["config", "show"], &[]);
    for key in shown.json.as_array().expect("keys") {
        let name = key["key"].as_str().and_then(|key| key.split_once('.')).expect("section.key").1;
        let line = text.lines().find(|line| line.trim_start_matches("# ").starts_with(&format!("{name} = ")));
        let line = line.unwrap_or_else(|| panic!("the sample lacks {name}"));
        if !key["value"].is_null() {
            let set: toml::Value = toml::from_str::<toml::Table>(line).expect("TOML")[name].clone();
            assert_eq!(serde_json::to_value(set).expect("a value"), key["value"], "{name}");
        }
    }
    let seed = root.join("tests/fixtures/seed-config.json");
    assert_eq!(check(&seed, &[]), Vec::<String>::new());
    let schema = inner_universe(&["config", "schema"], &[]).json;
    assert_eq!(schema["additionalProperties"], false);
    let seed: Value = serde_json::from_slice(&std::fs::read(seed).expect("the seed's file")).expect("JSON");
    for (section, keys) in seed.as_object().expect("sections") {
        let name =
            schema["properties"][section]["$ref"].as_str().expect("a reference").rsplit('/').next().expect("a name");
        for key in keys.as_object().expect("keys").keys() {
            assert!(schema["$defs"][name]["properties"][key].is_object(), "{section}.{key}");
        }
    }
}

fn same(node: &Node, value: &Value) -> bool {
    match (&node.content, value) {
        (Content::Table(table), Value::Object(entries)) => {
            table.len() == entries.len()
                && table.iter().all(|(key, node)| entries.get(key).is_some_and(|value| same(node, value)))
        }
        (Content::Value(found), value) => found == value,
        _ => false,
    }
}

fn plain() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        Just(Value::from("no")),
        Just(Value::from("0o17")),
        prop::collection::vec("[a-z~:#'\"-]{0,8}", 0..4).prop_map(Value::from),
    ]
}

fn sections() -> impl Strategy<Value = Value> {
    let keys = prop::collection::btree_map("[a-z_]{1,12}|null|yes|1e3", plain(), 0..6);
    let section = keys.prop_map(|keys| Value::Object(keys.into_iter().collect()));
    prop::collection::btree_map("[a-z_]{1,12}", section, 0..4).prop_map(|all| Value::Object(all.into_iter().collect()))
}

fn to_toml(value: &Value) -> toml::Value {
    match value {
        Value::Bool(truth) => toml::Value::Boolean(*truth),
        Value::Number(number) => toml::Value::Integer(number.as_i64().expect("an integer")),
        Value::String(text) => toml::Value::String(text.clone()),
        Value::Array(items) => toml::Value::Array(items.iter().map(to_toml).collect()),
        Value::Object(entries) => {
            toml::Value::Table(entries.iter().map(|(key, value)| (key.clone(), to_toml(value))).collect())
        }
        Value::Null => unreachable!("no null is generated"),
    }
}

proptest! {
    // What failed is told with its input; nothing is written beside the sources.
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_json_and_toml_say_is_what_is_read(value in sections()) {
        let json = serde_json::to_string_pretty(&value).expect("JSON");
        let read = parse(Format::Json, &json);
        prop_assert!(read.as_ref().is_ok_and(|node| same(node, &value)), "{json}\n{read:?}");
        let toml = to_toml(&value).as_table().expect("a table").to_string();
        let read = parse(Format::Toml, &toml);
        prop_assert!(read.as_ref().is_ok_and(|node| same(node, &value)), "{toml}\n{read:?}");
    }

    #[test]
    fn any_text_is_read_or_refused_with_a_line_of_it(text in "[\\[\\]{}:=#\"'a-c0-2 \n\t,.&*!|>-]{0,80}") {
        for format in [Format::Toml, Format::Json, Format::Yaml] {
            if let Err(error) = parse(format, &text) {
                prop_assert!(error.line <= text.lines().count() + 1, "{format:?} {text:?} {error:?}");
            }
        }
    }
}
