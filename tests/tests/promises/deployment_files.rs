//! What operators deploy with is valid, hardened, pinned, and of one piece: compose.yaml, Dockerfile, .env.example, configurations, pages.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::compose::document::{self, Document};
use harness::page::Page;
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn services() -> Vec<(String, Value)> {
    let document = Document::load(&root(), &[], false).expect("compose.yaml");
    document
        .names()
        .into_iter()
        .map(|name| (name.clone(), document.service(&name).expect("a service").clone()))
        .collect()
}

/// A checker that `cargo xtask test` installs; `None` where it could not be.
fn checker(name: &str) -> Option<Command> {
    let dir = std::env::var_os("INNER_UNIVERSE_LINT").filter(|dir| !dir.is_empty());
    if dir.is_none() {
        assert!(std::env::var_os("CI").is_none(), "{name} is not there; run `cargo xtask test`");
        eprintln!("skipped: {name} is not installed; `cargo xtask test` installs it");
    }
    Some(Command::new(Path::new(&dir?).join(name)))
}

fn passes(command: &mut Command) {
    let output = command.output().expect("a checker");
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&text));
}

#[test]
fn compose_and_the_dockerfile_pass_their_checkers() {
    let (Some(mut schema), Some(mut hadolint)) = (checker("check-jsonschema"), checker("hadolint")) else { return };
    passes(schema.args(["--builtin-schema", "vendor.compose-spec"]).arg(root().join("compose.yaml")));
    passes(hadolint.arg(root().join("Dockerfile")));
}

#[test]
fn every_shell_command_of_the_pages_and_scripts_passes_shellcheck() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut files: Vec<PathBuf> = [".ci/run", "tests/src/compose/container.sh"].map(|file| root().join(file)).into();
    for script in std::fs::read_dir(root().join("tests/src/compose/images")).expect("scripts").flatten() {
        files.push(script.path());
    }
    let readme = Page::read("README.md");
    let operate = readme.blocks(Some("Operate with docker compose")).concat();
    let pages = Page::runbooks().into_iter().map(|page| (page.name.clone(), page.blocks(None).concat()));
    for (name, commands) in pages.chain([("README.md".to_owned(), operate)]) {
        let leads_only = ["runbooks/README.md", "runbooks/alerts.md"].contains(&name.as_str());
        assert_eq!(leads_only, commands.is_empty(), "{name}");
        let file = dir.path().join(name.replace('/', "-"));
        std::fs::write(&file, format!("#!/bin/bash\nset -euo pipefail\n{commands}")).expect("write");
        files.push(file);
    }
    let Some(mut shellcheck) = checker("shellcheck") else { return };
    passes(shellcheck.args(files));
}

#[test]
fn every_service_is_hardened_pinned_bounded_and_given_its_secrets_as_files() {
    let services = services();
    assert!(services.len() >= 11, "{}", services.len());
    for (name, service) in &services {
        assert_eq!(service["read_only"], true, "{name}");
        assert_eq!(service["cap_drop"], serde_json::json!(["ALL"]), "{name}");
        assert_eq!(service["security_opt"], serde_json::json!(["no-new-privileges:true"]), "{name}");
        for bound in ["mem_limit", "cpu_shares", "pids_limit"] {
            assert!(!service[bound].is_null(), "{name}: {bound}");
        }
        let user = service["user"].as_str().unwrap_or_default();
        // One service gives the volumes to their users, and ends.
        assert_eq!(user.starts_with("0:"), name == "volumes", "{name} runs as {user}");
        let image = service["image"].as_str().expect("an image");
        let tag = image.rsplit_once(':').map_or("", |(_, tag)| tag);
        assert!(tag.contains(|letter: char| letter.is_ascii_digit()) && tag != "latest", "{name}: {image}");
        assert!(service["profiles"].as_array().is_some_and(|profiles| !profiles.is_empty()), "{name}");
        for port in service["ports"].as_array().into_iter().flatten() {
            assert!(port.as_str().is_some_and(|port| port.starts_with("127.0.0.1:")), "{name}: {port}");
        }
        for (key, value) in service["environment"].as_object().into_iter().flatten() {
            let secret = ["PASSWORD", "SECRET", "TOKEN", "ACCESS_KEY"].iter().any(|word| key.contains(word));
            let value = value.as_str().unwrap_or_default();
            let file = value.trim_start_matches("file:").starts_with('/');
            assert!(!secret || file, "{name}: {key} is no file");
        }
        for volume in service["volumes"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            let (source, _) = volume.split_once(':').expect("a source");
            let read_only = volume.ends_with(":ro");
            assert!(!source.starts_with(['/', '~']), "{name}: {volume} is a path of one machine");
            assert!(!source.starts_with('.') || (read_only && root().join(source).exists()), "{name}: {volume}");
        }
    }
    let long_running = ["spacetimedb", "sidecar", "s3", "prometheus", "grafana"];
    for (name, service) in services.iter().filter(|(name, _)| long_running.contains(&name.as_str())) {
        assert!(service["healthcheck"]["test"].is_array(), "{name} has no health check");
        assert_eq!(service["restart"], "unless-stopped", "{name}");
    }
    let sidecar = &services.iter().find(|(name, _)| name == "sidecar").expect("the sidecar").1;
    assert!(sidecar["volumes"].to_string().contains("server:/var/lib/spacetimedb:ro"), "archiving only reads");
}

#[test]
fn the_example_of_env_names_every_variable_and_no_other() {
    let text = read("compose.yaml");
    let used: BTreeSet<_> = document::variables_of(&text).into_iter().collect();
    let example = read(".env.example");
    let named = example.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('='));
    let named: BTreeSet<_> = named.map(|(name, _)| name.to_owned()).collect();
    // Compose itself reads this one.
    let expected: BTreeSet<_> = used.into_iter().chain(["COMPOSE_PROFILES".to_owned()]).collect();
    assert_eq!(named, expected);
    for (name, value) in document::defaults_of(&text) {
        let line = format!("{name}={value}");
        assert!(
            value.is_empty() || example.lines().any(|found| found == line),
            "{line} is the default, and not the example"
        );
    }
}

#[test]
fn what_observes_finds_what_it_names() {
    let names: BTreeSet<_> = services().into_iter().map(|(name, _)| name).collect();
    let mut found = 0;
    for file in [
        "prometheus/prometheus.yaml",
        "otel-collector/config.yaml",
        "grafana/provisioning/datasources/inner-universe.yaml",
    ] {
        let text = read(&format!("dashboards/{file}"));
        for port in ["9464", "3000", "9090", "3200", "3100", "4317"] {
            for before in text.split(&format!(":{port}")).collect::<Vec<_>>().iter().rev().skip(1) {
                let host: String = before
                    .chars()
                    .rev()
                    .take_while(|letter| letter.is_ascii_alphanumeric() || ".-".contains(*letter))
                    .collect();
                let host: String = host.chars().rev().collect();
                assert!(host == "0.0.0.0" || names.contains(&host), "{file}: {host}:{port}");
                found += 1;
            }
        }
    }
    assert!(found >= 7, "{found}");
    // Grafana finds its dashboards where compose.yaml mounts them.
    let provider = read("dashboards/grafana/provisioning/dashboards/inner-universe.yaml");
    assert!(
        provider.contains("/var/lib/grafana-dashboards")
            && read("compose.yaml").contains("./dashboards/grafana:/var/lib/grafana-dashboards:ro")
    );
}

#[test]
fn every_yaml_and_json_file_parses() {
    let mut folders = vec![root().join("dashboards")];
    let mut parsed = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder").flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).expect("a file");
            match path.extension().and_then(|extension| extension.to_str()) {
                Some("json") => drop(
                    serde_json::from_str::<Value>(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display())),
                ),
                Some("yaml") => {
                    drop(document::parse(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
                }
                _ => continue,
            }
            parsed += 1;
        }
    }
    assert!(parsed >= 11, "{parsed}");
}
