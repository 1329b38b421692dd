//! Restore is exact: any offset and any time give the rows that the live server had there.

use std::path::Path;

use harness::client::{Client, Rows};
use harness::oracle::{self, Transaction};
use harness::server::Server;
use harness::sidecar::Sidecar;
use harness::tools;
use harness::workload::{self, REDUCERS, Random, TABLES};

const DATABASE: &str = "ledger";

/// A database with a history, and its rows after each change as the live server gave them.
struct History {
    scratch: tempfile::TempDir,
    sidecar: Sidecar,
    client: Client,
    transactions: Vec<Transaction>,
    /// The server's index of its log.
    index: Vec<u8>,
    /// The rows after the publish, and after each change since.
    states: Vec<Rows>,
}

impl History {
    /// Inserts, updates, deletes and failing reducers; a module update in the middle; two backups; then the server and
    /// its data are gone.
    async fn record(calls: u64, random: &mut Random) -> Self {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let (data, keys) = (scratch.path().join("data"), scratch.path().join("keys"));
        let sidecar = Sidecar::at(&scratch.path().join("repository"));
        let server = Server::start(&data, &keys).await;
        let client = server.client().await;
        client.publish(DATABASE, tools::wasm("workload_module")).await;
        let mut states = vec![client.rows(DATABASE, &TABLES).await];
        for call in 0..calls {
            if call == calls / 2 {
                sidecar.backup(&data);
                client.publish(DATABASE, tools::wasm("workload_module_v2")).await;
                states.push(client.rows(DATABASE, &TABLES).await);
            }
            let (reducer, arguments) = workload::next_call(random);
            if client.call(DATABASE, reducer, arguments).await.is_ok() {
                states.push(client.rows(DATABASE, &TABLES).await);
            }
        }
        // The log is written a moment after the answer.
        let log = oracle::log_dir(&data, replica(&data));
        let transactions = settled(&log).await;
        sidecar.backup(&data);
        let index = index(&log);
        assert!(!index.is_empty(), "the server has written no index");
        server.kill();
        std::fs::remove_dir_all(&data).expect("destroy the data directory");
        let history = Self { scratch, sidecar, client, transactions, index, states };
        let changes = history.transactions.iter().filter(|transaction| history.is_change(transaction)).count();
        assert_eq!(changes + 1, history.states.len(), "the oracle's own count: {:?}", &history.transactions[..10]);
        history
    }

    /// Does this transaction change the tables that we compare? Connecting and disconnecting do not; the first publish is
    /// where the states begin; the update is the only later transaction without a reducer.
    fn is_change(&self, transaction: &Transaction) -> bool {
        match &transaction.reducer {
            Some(reducer) => REDUCERS.contains(&reducer.as_str()),
            None => transaction.offset > self.published(),
        }
    }

    /// The transaction in which the module was published and initialised.
    fn published(&self) -> u64 {
        let first_call = self.transactions.iter().find(|transaction| {
            transaction
                .reducer
                .as_deref()
                .is_some_and(|reducer| reducer.starts_with("__identity_") || REDUCERS.contains(&reducer))
        });
        first_call.expect("a call").offset - 1
    }

    fn last(&self) -> u64 {
        self.transactions.last().expect("a transaction").offset
    }

    /// What the live server had after transaction `offset`.
    fn at(&self, offset: u64) -> &Rows {
        let changes = self.transactions.iter().take_while(|transaction| transaction.offset <= offset);
        &self.states[changes.filter(|transaction| self.is_change(transaction)).count()]
    }

    /// Restores to `target` and asks a real server for the rows.
    async fn restored(&self, target: &str) -> (u64, Rows) {
        let data = self.scratch.path().join("restored");
        let report = self.sidecar.restore(&data, target);
        let offset = report["databases"][0]["offset"].as_u64().expect("an offset");
        let log = oracle::log_dir(&data, replica(&data));
        assert_eq!(oracle::last_offset(&log), Some(offset), "by the official reader");
        if tools::release().writes_index_of_1_2() {
            let index = index(&log);
            assert!(self.index.starts_with(&index), "the index is not what the server had written");
            assert!(offset < self.last() || index == self.index, "the index is shorter than the server's");
        }
        let server = Server::start(&data, &self.scratch.path().join("keys")).await;
        let rows = self.client.at(&server.url).rows(DATABASE, &TABLES).await;
        server.kill();
        std::fs::remove_dir_all(&data).expect("remove what was restored");
        (offset, rows)
    }
}

fn replica(data: &Path) -> u64 {
    let mut replicas = std::fs::read_dir(data.join("replicas")).expect("list replicas");
    let name = replicas.next().expect("a replica").expect("a replica").file_name();
    name.to_str().and_then(|name| name.parse().ok()).expect("a replica's number")
}

/// The entries of the index beside the only segment.
fn index(log: &Path) -> Vec<u8> {
    let mut files = std::fs::read_dir(log).expect("list the log").map(|file| file.expect("a file").path());
    let file = files.find(|path| path.extension().is_some_and(|extension| extension == "ofs")).expect("an index");
    let bytes = std::fs::read(file).expect("read the index");
    let entries = bytes.chunks_exact(16).take_while(|entry| entry[..8] != [0; 8]).count();
    bytes[..entries * 16].to_vec()
}

/// The log once it has stopped growing.
async fn settled(log: &Path) -> Vec<Transaction> {
    let mut before = oracle::transactions(log);
    loop {
        tokio::time::sleep(std::time::Duration::from_millis(700)).await;
        let now = oracle::transactions(log);
        if now.len() == before.len() {
            return now;
        }
        before = now;
    }
}

fn assert_same(expected: &Rows, found: &Rows, what: &str) {
    for table in TABLES {
        assert_eq!(expected[table], found[table], "{what}: table {table}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn any_offset_gives_exactly_the_rows_of_that_offset() {
    let mut random = Random::from_env();
    let history = History::record(700, &mut random).await;
    let first = history.published();
    let mut offsets = vec![first, first + 1, history.last()];
    let rounds = if tools::all() { 200 } else { 20 };
    while offsets.len() < rounds {
        offsets.push(first + random.below(history.last() - first + 1));
    }
    for offset in offsets {
        let (restored, rows) = history.restored(&format!("offset:{offset}")).await;
        assert_eq!(restored, offset);
        assert_same(history.at(offset), &rows, &format!("offset {offset}"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_gives_the_last_transaction_at_or_before_it() {
    let mut random = Random::from_env();
    let history = History::record(60, &mut random).await;
    let timed: Vec<(u64, i64)> =
        history.transactions.iter().filter_map(|t| t.time_micros.map(|time| (t.offset, time))).collect();
    let rfc3339 = |micros: i64| format!("time:{}", jiff::Timestamp::from_microsecond(micros).expect("a time"));
    // By the definition: the last offset such that it and all before it are at or before the time; a transaction
    // without a time of its own has that of the one before.
    let expected = |micros: i64| {
        let later = timed.iter().find(|(_, time)| *time > micros);
        later.map_or(history.last(), |(offset, _)| offset - 1)
    };
    let (_, last_time) = *timed.last().expect("a time");
    let mut times = vec![last_time, last_time + 1_000_000_000];
    for _ in 0..6 {
        let (_, time) = timed[(random.below(timed.len() as u64)) as usize];
        times.extend([time, time - 1, time + 1]);
    }
    let earliest = timed.first().expect("a time").1;
    let target = history.scratch.path().join("planned");
    for micros in times.into_iter().filter(|micros| *micros >= earliest) {
        let target_text = rfc3339(micros);
        let plan = ["restore", "--dry-run", "--data-dir", target.to_str().expect("UTF-8"), "--to", &target_text];
        let plan = history.sidecar.run(plan).ok();
        assert_eq!(plan["databases"][0]["offset"], expected(micros), "{target_text}");
        assert!(!target.exists(), "a dry run writes nothing");
    }
    // One of them for real, between two transactions.
    let (offset, time) = timed[timed.len() / 2];
    let (restored, rows) = history.restored(&rfc3339(time)).await;
    assert!(restored >= offset);
    assert_same(history.at(restored), &rows, "a time");

    let before = rfc3339(earliest - 1);
    let run = history.sidecar.run(["restore", "--data-dir", target.to_str().expect("UTF-8"), "--to", &before]);
    assert!(run.fails_with(4).contains("later than"));
}
