//! The truth about a log, from the official reader: which reducer made which transaction, and when.

use std::path::{Path, PathBuf};

use spacetimedb_commitlog::payload::txdata::Inputs;
use spacetimedb_paths::FromPathUnchecked as _;
use spacetimedb_paths::server::CommitLogDir;

/// One transaction as the official crate reads it. Its inputs are those of the first record of its commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transaction {
    pub offset: u64,
    /// `None` for a publish or SQL.
    pub reducer: Option<String>,
    pub time_micros: Option<i64>,
}

/// Reads a copy of the log at `dir`, never the log itself: the official reader may repair.
pub fn transactions(dir: &Path) -> Vec<Transaction> {
    let copy = copy_log(dir);
    let mut transactions = Vec::new();
    let commits = spacetimedb_commitlog::commits(CommitLogDir::from_path_unchecked(copy.path())).expect("open the log");
    for commit in commits {
        let Ok(commit) = commit else { break };
        for offset in commit.tx_range() {
            let inputs = (offset == commit.min_tx_offset).then(|| inputs(&commit.records)).flatten();
            transactions.push(Transaction {
                offset,
                reducer: inputs.as_ref().map(|inputs| inputs.reducer_name.to_string()),
                time_micros: inputs.map(|inputs| time_of(&inputs)),
            });
        }
    }
    transactions
}

/// The last offset that the official reader finds.
pub fn last_offset(dir: &Path) -> Option<u64> {
    transactions(dir).last().map(|transaction| transaction.offset)
}

/// The segments' directory of a replica.
pub fn log_dir(data_dir: &Path, replica: u64) -> PathBuf {
    data_dir.join("replicas").join(replica.to_string()).join("clog")
}

fn copy_log(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().expect("a temporary directory");
    for entry in std::fs::read_dir(dir).expect("list the log") {
        let entry = entry.expect("a log file");
        if entry.path().extension().is_some_and(|extension| extension == "log") {
            std::fs::copy(entry.path(), copy.path().join(entry.file_name())).expect("copy a segment");
        }
    }
    copy
}

fn inputs(mut records: &[u8]) -> Option<Inputs> {
    const HAVE_INPUTS: u8 = 0x80;
    let (flags, rest) = records.split_first()?;
    records = rest;
    if flags & HAVE_INPUTS == 0 {
        return None;
    }
    Inputs::decode(&mut records).ok()
}

/// The official crate leaves the arguments opaque: caller, connection id, then the time.
fn time_of(inputs: &Inputs) -> i64 {
    let bytes = inputs.reducer_args.get(48..56).expect("a time");
    i64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}
