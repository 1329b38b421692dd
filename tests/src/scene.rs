//! A server with a published module and a sidecar that knows its token: what exports and deployments are tested in.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::client::{Client, none};
use crate::server::Server;
use crate::sidecar::{Sidecar, path};
use crate::tools;

/// A server with a database, and a sidecar that knows its token.
pub struct Scene {
    pub scratch: tempfile::TempDir,
    pub server: Server,
    pub owner: Client,
    pub sidecar: Sidecar,
    pub identity: String,
}

impl Scene {
    pub async fn new(name: &str, module: &str) -> Self {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let server = Server::start(&scratch.path().join("data"), &scratch.path().join("keys")).await;
        let owner = server.client().await;
        let identity = owner.publish(name, tools::wasm(module)).await;
        let token = scratch.path().join("token");
        std::fs::write(&token, &owner.token).expect("write the token");
        let sidecar = Sidecar::at(&scratch.path().join("repository"));
        let mut scene = Self { scratch, server, owner, sidecar, identity };
        scene.sidecar = scene.sidecar.clone().configured(scene.settings(name, &[]));
        scene.sidecar.has_repository(&scene.server.data_dir);
        scene
    }

    /// What leads a sidecar to the database `name`, and further settings.
    pub fn settings(&self, name: &str, more: &[(&str, &str)]) -> Vec<(String, String)> {
        let token = self.scratch.path().join("token");
        let settings = [
            ("SPACETIMEDB_CONFIG__URL", self.server.url.as_str()),
            ("SPACETIMEDB_CONFIG__DATABASE", name),
            ("SPACETIMEDB_CONFIG__TOKEN_FILE", path(&token)),
            ("SPACETIMEDB_CONFIG__DB_PATH", path(&self.server.data_dir)),
        ];
        settings.iter().chain(more).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    /// The same sidecar with further settings.
    pub fn sidecar_with(&self, name: &str, more: &[(&str, &str)]) -> Sidecar {
        self.sidecar.clone().configured(self.settings(name, more))
    }

    /// Where the files of a table lie.
    pub fn files(&self, format: &str, table: &str) -> PathBuf {
        self.scratch.path().join(format!("repository/databases/{}/exports/{format}/{table}", self.identity))
    }

    pub fn export(&self, arguments: &[&str]) -> Value {
        self.sidecar.run([&["export"], arguments].concat()).ok()
    }

    pub fn replay(&self, arguments: &[&str]) -> Value {
        self.sidecar.run([&["replay"], arguments].concat()).ok()
    }

    pub async fn call(&self, reducer: &str, arguments: Value) {
        let called = self.owner.call("iu", reducer, arguments).await;
        called.unwrap_or_else(|error| panic!("{reducer}: {error}"));
    }

    /// Some of everything that the bundled module holds.
    pub async fn live(&self) {
        for (id, kind) in [("sun", "star"), ("earth", "planet"), ("moon", "moon")] {
            self.call("create_entity", json!([id, kind, "{\"n\": 1}"])).await;
        }
        self.call("create_relation", json!(["orbit", "earth", "sun", "orbits", "{}"])).await;
        self.call("update_entity", json!(["earth", "{\"n\": 2}"])).await;
        self.call("delete_entity", json!(["moon"])).await;
        self.call("add_member", json!([{"__identity__": format!("0x{}", self.owner.identity)}, "me"])).await;
        self.call("set_config", json!(["timeout_ms", "1234"])).await;
        self.call("record_metric", json!(["load", 0.5, "1", []])).await;
        let data =
            json!({"Custom": [{"name": "n", "value": {"UInt": u64::MAX}}, {"name": "f", "value": {"Float": 0.1}}]});
        self.call("record_event", json!(["ORDER_PLACED", none(), none(), data])).await;
        self.call("get_system_status", json!([])).await;
    }
}

/// Rows of the files by DuckDB, which reads them as any user would; `None` where DuckDB is not.
pub fn duckdb(query: &str) -> Option<Vec<Vec<Value>>> {
    let python = std::env::var_os("INNER_UNIVERSE_DUCKDB").filter(|path| !path.is_empty())?;
    let script = "import duckdb, json, sys; print(json.dumps(duckdb.sql(sys.argv[1]).fetchall(), default=str))";
    let output = Command::new(python).args(["-c", script, query]).output().expect("run DuckDB");
    assert!(output.status.success(), "{query}: {}", String::from_utf8_lossy(&output.stderr));
    Some(serde_json::from_slice(&output.stdout).expect("rows"))
}

/// Events numbered from `first`, as the import reducer takes them.
pub fn events(first: u64, count: u64) -> Vec<Value> {
    let event = |sequence: u64| {
        json!([sequence, format!("00000000-0000-8000-8000-{sequence:012x}"), "LOADED", none(),
            [1_700_000_000_000_000i64 + sequence as i64 * 1_000_000], "c", {"Text": "x".repeat(100)}])
    };
    (first..first + count).map(event).collect()
}

/// Loads events numbered from `first`, many at a time.
pub async fn load_events(owner: &Client, first: u64, count: u64) {
    for begin in (first..first + count).step_by(1000) {
        let events = events(begin, 1000.min(first + count - begin));
        owner.call("iu", "import_events", json!([events])).await.expect("import events");
    }
}

/// The first file below a directory.
pub fn first_file(dir: &Path) -> PathBuf {
    let mut entries: Vec<_> =
        std::fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("an entry").path()).collect();
    entries.sort();
    let first = entries.swap_remove(0);
    if first.is_dir() { first_file(&first) } else { first }
}
