//! Data that a real server wrote, from a seed: a log of gigabytes with native snapshots. Made once, and kept in the user's
//! cache for every checkout.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::bench::log::size;
use crate::client::{Client, Rows};
use crate::pipeline;
use crate::server::Server;
use crate::sidecar::path;
use crate::tools;
use crate::workload::Random;

pub const DATABASE: &str = "ledger";

/// Whenever what is written changes, so that older data is not taken for it.
const FORM: u32 = 1;

/// Calls that make a GiB of log, before the server compresses it: about 730 bytes each.
const CALLS_A_GIB: f64 = 1_475_000.0;

/// Notes are written over again and again; the journal grows with every transaction.
const NOTES: u64 = 400_000;
const TEXT: usize = 200;

/// A stopped server's data directory with its keys.
pub struct Prepared {
    dir: PathBuf,
    pub facts: Facts,
}

/// What is known of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Facts {
    /// Who published the database.
    token: String,
    /// Calls made so far.
    calls: u64,
    /// As the server itself told at the end, sorted: rows of the small tables and counts of the large ones.
    truth: Rows,
}

impl Prepared {
    /// The data with a log of `gib`; written by a real server when it is not there yet.
    pub async fn get(gib: f64) -> Self {
        let calls = (gib * CALLS_A_GIB) as u64;
        let version = Command::new(tools::server()).arg("--version").output().expect("the server's version");
        let version = String::from_utf8_lossy(&version.stdout).into_owned();
        let known = blake3::hash(format!("{FORM} {calls} {version}").as_bytes()).to_hex();
        let dir = tools::cache().join("bench").join(&known[..16]);
        if !dir.join("facts.json").is_file() {
            println!("a real server writes a log of {gib} GiB; once, some minutes");
            let _ = std::fs::remove_dir_all(&dir);
            std::fs::create_dir_all(&dir).expect("a folder in the cache");
            let facts = write(&dir, calls).await;
            let facts = serde_json::to_vec(&facts).expect("facts");
            std::fs::write(dir.join("facts.new"), facts).expect("write them");
            std::fs::rename(dir.join("facts.new"), dir.join("facts.json")).expect("they count now");
        }
        let facts = std::fs::read(dir.join("facts.json")).expect("read the facts");
        Self { facts: serde_json::from_slice(&facts).expect("facts"), dir }
    }

    /// A copy to work on, as the server left it, in `to`, where none is yet.
    pub fn copy(&self, to: &Path) -> Copy {
        for name in ["data", "keys"] {
            let status = Command::new("cp").args(["-a", path(&self.dir.join(name)), path(to)]).status().expect("cp");
            assert!(status.success(), "copy {name}");
        }
        Copy { data: to.join("data"), keys: to.join("keys"), facts: self.facts.clone() }
    }
}

/// A copy that may be changed.
pub struct Copy {
    pub data: PathBuf,
    pub keys: PathBuf,
    facts: Facts,
}

impl Copy {
    /// A real server writes one percent more, and stops.
    pub async fn grow(&mut self) {
        let server = Server::start(&self.data, &self.keys).await;
        let client = server.client().await.with_token(&self.facts.token);
        let until = self.facts.calls + self.facts.calls / 100;
        call(&server, &client, self.facts.calls..until).await;
        self.facts.calls = until;
        self.facts.truth = truth(&client).await;
        server.written().await;
        server.stop();
        forget_process(&self.data);
    }

    /// Starts a real server on `data`, which was restored, and asks until it tells what it held before. Returns how long
    /// that took.
    ///
    /// # Panics
    /// When it serves something else.
    pub async fn serves(&self, data: &Path) -> f64 {
        let started = std::time::Instant::now();
        let server = Server::start(data, &self.keys).await;
        let client = server.client().await.with_token(&self.facts.token);
        while client.try_sql(DATABASE, COUNT_NOTES).await.is_err() {
            assert!(started.elapsed().as_secs() < 600, "it does not answer");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        let seconds = started.elapsed().as_secs_f64();
        assert_eq!(truth(&client).await, self.facts.truth, "it serves something else");
        server.stop();
        seconds
    }
}

const COUNT_NOTES: &str = "SELECT COUNT(*) AS n FROM note";

async fn write(dir: &Path, calls: u64) -> Facts {
    let (data, keys) = (dir.join("data"), dir.join("keys"));
    let server = Server::start(&data, &keys).await;
    let client = server.client().await;
    client.publish(DATABASE, tools::wasm("workload_module")).await;
    call(&server, &client, 0..calls).await;
    let truth = truth(&client).await;
    server.written().await;
    server.stop();
    forget_process(&data);
    let _ = std::fs::remove_file(data.with_extension("server.log"));
    Facts { token: client.token, calls, truth }
}

/// What a stopped server left that says nothing of its data.
fn forget_process(data: &Path) {
    let _ = std::fs::remove_file(data.join("spacetime.pid"));
}

/// Calls by their numbers, from the seed.
async fn call(server: &Server, client: &Client, numbers: Range<u64>) {
    pipeline::calls(&server.url, client, DATABASE, "put_note", numbers.map(note)).await;
}

/// The arguments of call `n`: a third noise, two thirds words, as rows of people are.
fn note(n: u64) -> Vec<u8> {
    const WORDS: [&str; 8] =
        ["entity ", "updated ", "relation ", "created ", "orbit ", "station ", "observed ", "magnitude "];
    let mut random = Random::new(n);
    let mut text = String::with_capacity(TEXT + 16);
    while text.len() < TEXT * 2 / 3 {
        text += WORDS[random.below(8) as usize];
    }
    while text.len() < TEXT {
        text += &format!("{:016x}", random.draw());
    }
    text.truncate(TEXT);
    let mut arguments = random.below(NOTES).to_le_bytes().to_vec();
    arguments.extend((text.len() as u32).to_le_bytes());
    arguments.extend(text.into_bytes());
    arguments
}

/// Counts of the large tables, and the rows of the others. The journal's last step is the number of the last call.
async fn truth(client: &Client) -> Rows {
    let mut rows = client.rows(DATABASE, &["account", "attachment"]).await;
    for (name, statement) in [("notes", COUNT_NOTES), ("journal", "SELECT COUNT(*) AS n FROM journal")] {
        let counted = client.sql(DATABASE, statement).await;
        rows.insert(name.into(), counted.iter().map(ToString::to_string).collect());
    }
    for id in (0..NOTES).step_by(NOTES as usize / 50) {
        let found = client.sql(DATABASE, &format!("SELECT * FROM note WHERE id = {id}")).await;
        rows.insert(format!("note {id}"), found.iter().map(ToString::to_string).collect());
    }
    rows
}

/// Bytes of the data directory, each hard link once.
pub fn bytes(data: &Path) -> u64 {
    let output = Command::new("du").args(["-sb", path(data)]).output().expect("du");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or_else(|| size(data))
}
