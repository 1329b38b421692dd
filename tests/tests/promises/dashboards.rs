//! Dashboards, alerts and rules, held against a real Prometheus that scrapes a real sidecar and a real server.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use harness::client::{http, some};
use harness::collector::Collector;
use harness::daemon::Daemon;
use harness::sidecar::{Sidecar, path};
use harness::tools;
use serde_json::{Value, json};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../dashboards")
}

fn dashboards() -> Vec<(String, Value)> {
    let files = std::fs::read_dir(root().join("grafana")).expect("dashboards").flatten().map(|entry| entry.path());
    let json = files.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    let read = |path: PathBuf| {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        (name, serde_json::from_slice(&std::fs::read(&path).expect("read")).expect("JSON"))
    };
    json.map(read).collect()
}

/// Every query that a dashboard sends to Prometheus, with its panel.
fn expressions(dashboard: &Value) -> Vec<(String, String)> {
    let panels = dashboard["panels"].as_array().expect("panels");
    let mut found = Vec::new();
    for panel in panels {
        for target in panel["targets"].as_array().into_iter().flatten() {
            if target["datasource"]["type"] == "prometheus" {
                let title = panel["title"].as_str().expect("a title").to_owned();
                found.push((title, target["expr"].as_str().expect("an expression").to_owned()));
            }
        }
    }
    found
}

#[test]
fn dashboards_are_whole_and_ask_only_for_metrics_that_are_declared() {
    let declared: Vec<String> =
        inner_universe::observe::metrics::ALL.iter().map(|metric| metric.prometheus_name()).collect();
    let mut texts: Vec<(String, String)> = Vec::new();
    let mut uids = std::collections::BTreeSet::new();
    for (name, dashboard) in dashboards() {
        assert!(uids.insert(dashboard["uid"].as_str().expect("a uid").to_owned()), "{name}");
        let mut ids = std::collections::BTreeSet::new();
        for panel in dashboard["panels"].as_array().expect("panels") {
            assert!(ids.insert(panel["id"].as_u64().expect("an id")), "{name}: a panel's id is used twice");
            let place = &panel["gridPos"];
            assert!(place["x"].as_u64().expect("x") + place["w"].as_u64().expect("w") <= 24, "{name}: {panel}");
            if panel["type"] != "row" {
                assert!(
                    panel["description"].as_str().is_some_and(|text| !text.is_empty()),
                    "{name}: {}",
                    panel["title"]
                );
                assert!(
                    panel["targets"].as_array().is_some_and(|targets| !targets.is_empty()),
                    "{name}: {}",
                    panel["title"]
                );
            }
        }
        texts.extend(expressions(&dashboard).into_iter().map(|(title, expr)| (format!("{name}: {title}"), expr)));
    }
    assert!(texts.len() > 40);
    for file in ["alerts.yaml", "recording.yaml"] {
        texts.push((file.to_owned(), std::fs::read_to_string(root().join("prometheus").join(file)).expect("rules")));
    }
    for (place, text) in texts {
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        for word in words.filter(|word| word.starts_with("inner_universe_")) {
            let bare =
                ["_bucket", "_sum", "_count"].iter().find_map(|suffix| word.strip_suffix(suffix)).unwrap_or(word);
            assert!(declared.iter().any(|name| name == word || name == bare), "{place}: {word} is not declared");
        }
    }
}

/// Grafana's own types for what it loads: a dashboard as a whole, and the options of each kind of panel.
const TYPES: &str = r#"
import type { Dashboard } from "@grafana/schema/dist/esm/raw/dashboard/x/Dashboard_types.gen";
import type * as timeseries from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";
import type * as stat from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type * as table from "@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type * as logs from "@grafana/schema/dist/esm/raw/composable/logs/panelcfg/x/LogsPanelCfg_types.gen";
// JSON has the values of enumerations, not their names.
type Plain<T> = T extends string ? `${T}` : T extends number | boolean | null | undefined ? T
  : T extends (...a: never[]) => unknown ? T : T extends object ? { [K in keyof T]?: Plain<T[K]> } : T;
type Whole<T> = T extends string ? `${T}` : T extends number | boolean | null | undefined ? T
  : T extends (...a: never[]) => unknown ? T : T extends object ? { [K in keyof T]: Whole<T[K]> } : T;
"#;

/// Runs the TypeScript compiler over `source`; what it says, if anything.
fn type_check(modules: &Path, source: &str) -> String {
    let dir = tempfile::tempdir().expect("a directory");
    std::os::unix::fs::symlink(modules, dir.path().join("node_modules")).expect("link");
    std::fs::write(dir.path().join("dashboards.ts"), source).expect("write");
    let options = ["--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--moduleResolution", "nodenext"];
    let mut compiler = Command::new(modules.join(".bin/tsc"));
    let output = compiler.args(options).arg("dashboards.ts").current_dir(dir.path()).output().expect("tsc");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.success(), said.trim().is_empty(), "{said}");
    said
}

#[test]
fn dashboards_are_of_the_types_that_grafana_publishes() {
    let Some(modules) = std::env::var_os("INNER_UNIVERSE_GRAFANA_TYPES").map(PathBuf::from) else {
        println!("skipped: Grafana's types are not installed; `cargo xtask test --all` installs them");
        return;
    };
    let mut source = TYPES.to_owned();
    for (at, (_, dashboard)) in dashboards().into_iter().enumerate() {
        source += &format!("export const dashboard{at}: Whole<Dashboard> = {dashboard};\n");
        for panel in dashboard["panels"].as_array().expect("panels") {
            let (kind, id) = (panel["type"].as_str().expect("a type"), &panel["id"]);
            if kind == "row" {
                continue;
            }
            source += &format!("export const options{at}_{id}: Plain<{kind}.Options> = {};\n", panel["options"]);
            let custom = &panel["fieldConfig"]["defaults"]["custom"];
            if matches!(kind, "timeseries" | "table") && !custom.is_null() {
                source += &format!("export const custom{at}_{id}: Plain<{kind}.FieldConfig> = {custom};\n");
            }
        }
    }
    assert_eq!(type_check(&modules, &source), "");
    // And what is wrong is seen.
    let wrong = |from: &str, to: &str| {
        assert!(source.contains(from), "{from}");
        assert!(!type_check(&modules, &source.replace(from, to)).is_empty(), "{to} passes");
    };
    wrong("\"schemaVersion\":39", "\"schemaVersion\":\"39\"");
    wrong("\"showPoints\":\"never\"", "\"showPoints\":\"seldom\"");
    wrong("\"gridPos\":", "\"gridPosition\":");
}

#[test]
fn every_alert_has_a_severity_a_summary_and_a_section_in_the_runbook() {
    let rules = std::fs::read_to_string(root().join("prometheus/alerts.yaml")).expect("alerts");
    let runbook = std::fs::read_to_string(root().join("../runbooks/alerts.md")).expect("the runbook");
    let alerts: Vec<&str> = rules.split("- alert: ").skip(1).collect();
    assert!(alerts.len() >= 12);
    for alert in alerts {
        let name = alert.lines().next().expect("a name");
        assert!(alert.contains("severity: critical") || alert.contains("severity: warning"), "{name}");
        assert!(alert.contains("summary: "), "{name}");
        let link = format!("runbook_url: runbooks/alerts.md#{}", name.to_lowercase());
        assert!(alert.contains(&link), "{name} has no link to the runbook");
        assert!(runbook.contains(&format!("\n## {name}\n")), "the runbook says nothing of {name}");
    }
}

fn prometheus() -> Option<PathBuf> {
    let found = std::env::var_os("INNER_UNIVERSE_PROMETHEUS").map(PathBuf::from);
    if found.is_none() {
        println!("skipped: Prometheus is not installed; `cargo xtask test --all` unpacks it");
    }
    found
}

#[test]
fn promtool_accepts_the_rules_and_every_alert_fires_on_its_fault_and_on_nothing_else() {
    let Some(bin) = prometheus() else { return };
    let rules = root().join("prometheus");
    for arguments in [&["check", "rules", "alerts.yaml", "recording.yaml"][..], &["test", "rules", "alerts_test.yaml"]]
    {
        let output = Command::new(bin.join("promtool")).args(arguments).current_dir(&rules).output().expect("promtool");
        let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
    }
}

struct Prometheus {
    child: Child,
    url: String,
}

impl Prometheus {
    fn start(bin: &Path, dir: &Path, sidecar: &str, server: &str) -> Self {
        let rules = root().join("prometheus");
        let host = |url: &str| url.trim_start_matches("http://").to_owned();
        let config = format!(
            "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [{0}/alerts.yaml, {0}/recording.yaml]\n\
             scrape_configs:\n- job_name: inner-universe\n  static_configs: [{{targets: ['{1}']}}]\n\
             - job_name: spacetimedb\n  metrics_path: /v1/metrics\n  static_configs: [{{targets: ['{2}']}}]\n",
            rules.display(),
            host(sidecar),
            host(server)
        );
        let file = dir.join("prometheus.yaml");
        std::fs::write(&file, config).expect("the configuration");
        let address = format!("127.0.0.1:{}", harness::server::free_port());
        let log = std::fs::File::create(dir.join("prometheus.log")).expect("a log");
        let child = Command::new(bin.join("prometheus"))
            .arg(format!("--config.file={}", file.display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("tsdb").display()))
            .arg(format!("--web.listen-address={address}"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log)
            .spawn()
            .expect("start Prometheus");
        Self { child, url: format!("http://{address}") }
    }

    async fn query(&self, expression: &str) -> Vec<Value> {
        let mut url = reqwest::Url::parse(&format!("{}/api/v1/query", self.url)).expect("a url");
        url.query_pairs_mut().append_pair("query", expression);
        let Ok(answer) = http().get(url).send().await else { return Vec::new() };
        // While it starts it answers in plain text.
        let Ok(answer) = answer.json::<Value>().await else { return Vec::new() };
        assert_ne!(answer["status"], "error", "{expression}: {answer}");
        answer["data"]["result"].as_array().cloned().unwrap_or_default()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_panel_and_recording_rule_finds_data_on_a_real_prometheus() {
    let Some(bin) = prometheus() else { return };
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
    let collector = Collector::start().await;
    let sidecar = Sidecar::at(&scratch.path().join("repository"));
    let address = format!("127.0.0.1:{}", harness::server::free_port());
    let port = address.rsplit(':').next().expect("a port").to_owned();
    let binary = tools::server();
    let server =
        [path(&binary), "start", "--data-dir", path(&data), "--jwt-key-dir", path(&keys), "--listen-addr", &address];
    let token = scratch.path().join("token");
    std::fs::write(&token, "not yet").expect("the token");
    let heartbeat = format!("{}/v1/ping", format_args!("http://{address}"));
    let settings = [
        ("ARCHIVE__FLUSH_INTERVAL", "100ms"),
        ("ARCHIVE__COMPACTION_INTERVAL", "2s"),
        ("ARCHIVE__COMPACTION_GRACE", "2s"),
        ("SCHEDULE__VERIFY", "*/5 * * * * *"),
        ("SCHEDULE__RESTORE_POINT", "*/5 * * * * *"),
        ("REPOSITORY__LEASE_DURATION", "3s"),
        ("SPACETIMEDB_CONFIG__PORT", port.as_str()),
        ("SPACETIMEDB_CONFIG__DATABASE", "iu"),
        ("SPACETIMEDB_CONFIG__TOKEN_FILE", path(&token)),
        ("TELEMETRY__OTLP_ENDPOINT", collector.http.as_str()),
        ("TELEMETRY__HEARTBEAT_URL", heartbeat.as_str()),
        ("TELEMETRY__HEARTBEAT_INTERVAL", "1s"),
    ];
    let mut daemon = Daemon::start(&sidecar, &data, &settings, &server);
    let url = format!("http://{address}");
    harness::server::wait_for(&url).await;
    let client = harness::client::Client::new(&url).await;
    client.publish("iu", tools::wasm("inner_universe_module")).await;
    std::fs::write(&token, &client.token).expect("the token");
    let listens = daemon.wait("its address", |status| status.http.is_some()).http.expect("an address");
    let prometheus = Prometheus::start(&bin, scratch.path(), &listens, &url);

    let mut open: Vec<(String, String)> = Vec::new();
    for (name, dashboard) in dashboards() {
        for (title, expression) in expressions(&dashboard) {
            let expression = expression.replace("$instance", ".*").replace("$database", ".*");
            open.push((format!("{name}: {title}"), expression));
        }
    }
    for rule in
        std::fs::read_to_string(root().join("prometheus/recording.yaml")).expect("rules").split("- record: ").skip(1)
    {
        let name = rule.lines().next().expect("a name").trim().to_owned();
        open.push((format!("recording rule {name}"), name));
    }
    let (deadline, mut n) = (Instant::now() + Duration::from_secs(180), 0_u32);
    while !open.is_empty() {
        n += 1;
        let data = json!({"Text": format!("event {n}")});
        client
            .call("iu", "record_event", json!(["TICK", some("test"), some(format!("tick-{n}")), data]))
            .await
            .expect("record");
        client.call("iu", "create_entity", json!([format!("e{n}"), "star", "{}"])).await.expect("create");
        client.call("iu", "record_metric", json!(["tick", f64::from(n), "1", []])).await.expect("record");
        let mut still = Vec::new();
        for (place, expression) in open {
            let found = prometheus.query(&expression).await;
            let number = |sample: &Value| sample["value"][1].as_str().is_some_and(|text| text != "NaN");
            if !found.iter().any(number) {
                still.push((place, expression));
            }
        }
        open = still;
        assert!(Instant::now() < deadline, "no data for {open:#?}\n{}", daemon.log());
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    // All is well, so nothing fires.
    let firing = prometheus.query("ALERTS{alertstate=\"firing\"}").await;
    assert!(firing.is_empty(), "{firing:?}");
    // The history forks, and the alert says so.
    assert_eq!(daemon.stop(), 0);
    let point = sidecar.run(["backup", "list"]).ok()["restore_points"][0]["id"].as_str().expect("an id").to_owned();
    sidecar.run(["restore", "--force", "--data-dir", path(&data), "--to", &point]).ok();
    let listen = [("HTTP__LISTEN", listens.trim_start_matches("http://"))];
    let daemon = Daemon::start(&sidecar, &data, &[&settings[..], &listen].concat(), &server);
    harness::server::wait_for(&url).await;
    let deadline = Instant::now() + Duration::from_secs(60);
    while prometheus.query("ALERTS{alertname=\"InnerUniverseFork\", alertstate=\"firing\"}").await.is_empty() {
        let _ = client.call("iu", "get_system_status", json!([])).await;
        assert!(Instant::now() < deadline, "the alert does not fire: {}", daemon.log());
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert_eq!(daemon.stop(), 0);
}
