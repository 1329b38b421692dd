//! A place where the bundled module is deployed, and what is done with it there.

use std::path::PathBuf;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::client::{Client, Rows};
use crate::server::free_port;
use crate::sidecar::{Sidecar, path};
use crate::tools;

pub const NAME: &str = "inner-universe";
pub const TABLES: &[&str] =
    &["config", "event_log", "entity", "relation", "state_version", "admin", "member", "metric", "annotation"];

/// A place for a deployment: a data directory that is not there yet, a port, and modules as files.
pub struct Stage {
    pub scratch: tempfile::TempDir,
    pub sidecar: Sidecar,
    pub data: PathBuf,
    pub port: u16,
}

impl Default for Stage {
    fn default() -> Self {
        Self::with(&[])
    }
}

impl Stage {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn with(more: &[(&str, &str)]) -> Self {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        for name in ["inner_universe_module", "inner_universe_module_more", "inner_universe_module_broken"] {
            std::fs::write(scratch.path().join(format!("{name}.wasm")), tools::wasm(name)).expect("a module");
        }
        let (data, port) = (scratch.path().join("data"), free_port());
        let mut stage = Self { sidecar: Sidecar::at(&scratch.path().join("repository")), scratch, data, port };
        stage.configure(more);
        stage.sidecar.has_repository(&stage.data);
        stage
    }

    pub fn configure(&mut self, more: &[(&str, &str)]) {
        let (port, server) = (self.port.to_string(), tools::server());
        let settings = [
            ("SPACETIMEDB_CONFIG__DB_PATH", path(&self.data)),
            ("SPACETIMEDB_CONFIG__PORT", &port),
            ("SPACETIMEDB_CONFIG__SERVER_BIN", path(&server)),
        ];
        let settings = settings.iter().chain(more).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        self.sidecar = self.sidecar.clone().configured(settings.collect());
    }

    /// A module by the end of its name; empty for the bundled one.
    pub fn module(&self, which: &str) -> String {
        let dash = if which.is_empty() { "" } else { "_" };
        path(&self.scratch.path().join(format!("inner_universe_module{dash}{which}.wasm"))).to_owned()
    }

    pub fn deploy(&self, which: &str) -> Value {
        self.sidecar.run(["deploy", "--module-path", &self.module(which)]).ok()
    }

    pub fn server(&self, verb: &str) -> Value {
        self.sidecar.run(["server", verb]).ok()
    }

    /// The sidecar's own identity, at the server on the stage's port.
    pub async fn owner(&self) -> Client {
        let client = Client::new(&format!("http://127.0.0.1:{}", self.port)).await;
        client.with_token(&std::fs::read_to_string(self.token_file()).expect("the token"))
    }

    /// Where the sidecar keeps the token of its own identity.
    pub fn token_file(&self) -> PathBuf {
        let state = std::fs::read_dir(self.sidecar.state_dir()).expect("the state directory").flatten();
        state.map(|dir| dir.path().join("token")).find(|path| path.is_file()).expect("a token")
    }

    /// Every row of the bundled module's tables, by a server that is there for this look alone.
    pub async fn rows(&self) -> Rows {
        self.server("start");
        let rows = self.owner().await.rows(NAME, TABLES).await;
        self.server("stop");
        rows
    }

    pub fn history(&self) -> Vec<String> {
        let history = self.sidecar.run(["deploy", "history"]).ok();
        let outcome = |record: &Value| record["outcome"].as_str().expect("an outcome").to_owned();
        history["deployments"].as_array().expect("records").iter().map(outcome).collect()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Nothing of a failed test is left running.
        let _ = self.sidecar.command().args(["server", "stop"]).stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

pub async fn call(client: &Client, reducer: &str, arguments: Value) {
    let called = client.call(NAME, reducer, arguments).await;
    called.unwrap_or_else(|error| panic!("{reducer}: {error}"));
}

pub async fn fill(client: &Client, count: u64) {
    for n in 0..count {
        call(client, "create_entity", json!([format!("e{n}"), "thing", format!("{{\"n\": {n}}}")])).await;
    }
    call(client, "record_metric", json!(["load", 0.5, "1", []])).await;
}

/// Without what a verification leaves.
pub fn settled(mut rows: Rows) -> Rows {
    rows.remove("system_status");
    rows
}
