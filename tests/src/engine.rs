//! The engine of SpacetimeDB 2.14, from its own crates: what it makes of a replica's files, and what it writes.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use inner_universe::ids::Identity;
use serde::Deserialize;

use crate::sidecar::path;
use crate::tools;

/// A replica and whose it is.
#[derive(Clone)]
pub struct Replica {
    pub data_dir: PathBuf,
    pub id: u64,
    pub identity: Identity,
    pub owner: Identity,
}

/// Every table by its name, and the module's program.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct State {
    pub tables: BTreeMap<String, Table>,
    pub module: Option<Module>,
}

/// Rows, and a hash over them in the order of their bytes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Table {
    pub rows: u64,
    pub sha256: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Module {
    pub identity: String,
    pub owner: String,
    pub program: String,
}

impl Replica {
    /// The same one in another data directory.
    pub fn at(&self, data_dir: &Path) -> Self {
        Self { data_dir: data_dir.to_owned(), ..self.clone() }
    }

    pub fn dir(&self) -> PathBuf {
        self.data_dir.join("replicas").join(self.id.to_string())
    }

    /// The state after each offset, which the engine replays from the log's start, without a snapshot.
    pub fn states(&self, offsets: &[u64]) -> Vec<State> {
        let mut command = self.engine("states");
        command.args(offsets.iter().map(ToString::to_string));
        let states = answer(command);
        assert_eq!(states.len(), offsets.len());
        states
    }

    /// The state after the engine opened the files as a server does; it may write to them.
    pub fn open(&self) -> State {
        answer(self.engine("open")).pop().expect("a state")
    }

    /// Starts a new database here and writes it without a pause.
    pub fn write(&self, seed: u64) -> Writer {
        let mut command = self.engine("write");
        command.arg(seed.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        Writer(command.spawn().expect("start the engine"))
    }

    fn engine(&self, what: &str) -> Command {
        let mut command = Command::new(tools::engine_oracle());
        let (identity, owner) = (self.identity.to_string(), self.owner.to_string());
        command.args([path(&self.data_dir), &self.id.to_string(), &identity, &owner, what]);
        command
    }
}

fn answer(mut command: Command) -> Vec<State> {
    let output = command.output().expect("start the engine");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}", stderr.lines().take(12).collect::<Vec<_>>().join("\n"));
    let lines = String::from_utf8(output.stdout).expect("text");
    lines.lines().map(|line| serde_json::from_str(line).expect("a state")).collect()
}

/// A replica that is being written.
pub struct Writer(Child);

impl Writer {
    /// Has it write what it has begun and close the files; its last offset.
    pub fn stop(mut self) -> u64 {
        drop(self.0.stdin.take());
        let mut last = String::new();
        self.0.stdout.take().expect("its output").read_to_string(&mut last).expect("read");
        assert!(self.0.wait().expect("its end").success());
        last.trim().parse().expect("an offset")
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
