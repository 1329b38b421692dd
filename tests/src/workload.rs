//! A seeded workload on the workload module, and the invariant its state must keep.

use serde_json::{Value, json};

use crate::client::{Client, Rows};

pub const TABLES: [&str; 5] = ["account", "journal", "note", "attachment", "audit"];
/// Reducers that add one journal row when they succeed.
pub const REDUCERS: [&str; 5] = ["transfer", "put_note", "delete_note", "attach", "fill"];
const ACCOUNTS: u64 = 16;
const SUM: i64 = 16 * 1000;

/// A small generator with a printed seed, so that every run can be repeated.
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A seed from the environment, or a fresh one; printed either way.
    pub fn from_env() -> Self {
        let seed = match std::env::var("INNER_UNIVERSE_TEST_SEED") {
            Ok(seed) => seed.parse().expect("a number in INNER_UNIVERSE_TEST_SEED"),
            Err(_) => std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(1, |since| u64::from(since.subsec_nanos())),
        };
        println!("INNER_UNIVERSE_TEST_SEED={seed}");
        Self(seed)
    }

    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.draw() % n
    }
}

/// One call: reducer and arguments. Some fail on purpose.
pub fn next_call(random: &mut Random) -> (&'static str, Value) {
    match random.below(20) {
        0..=9 => {
            // One in some transfers asks for more than there is.
            let amount = if random.below(6) == 0 { 100_000 } else { random.below(200) };
            let from = random.below(ACCOUNTS);
            let to = (from + 1 + random.below(ACCOUNTS - 1)) % ACCOUNTS;
            ("transfer", json!([from, to, amount]))
        }
        10..=15 => {
            let len = random.below(400);
            let text: String = (0..len).map(|_| char::from(b'a' + (random.below(26)) as u8)).collect();
            ("put_note", json!([random.below(40), format!("{text} Ünïcödé 🚀")]))
        }
        16..=18 => ("delete_note", json!([random.below(40)])),
        _ => {
            let len = 2000 + random.below(8000);
            let bytes: Vec<u8> = (0..len).map(|_| random.draw() as u8).collect();
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            ("attach", json!([random.below(6), hex]))
        }
    }
}

/// Makes `n` calls one after another; returns how many succeeded.
pub async fn run(client: &Client, database: &str, random: &mut Random, n: u64) -> u64 {
    let mut succeeded = 0;
    for _ in 0..n {
        let (reducer, arguments) = next_call(random);
        if client.call(database, reducer, arguments).await.is_ok() {
            succeeded += 1;
        }
    }
    succeeded
}

/// Makes calls until the server no longer answers.
pub async fn run_until_refused(client: &Client, database: &str, random: &mut Random) {
    loop {
        let (reducer, arguments) = next_call(random);
        match client.call(database, reducer, arguments).await {
            Err(error) if error.starts_with("error sending request") => return,
            _ => {}
        }
    }
}

/// The journal has no hole and the balances add up; returns the journal's length.
pub fn assert_consistent(rows: &Rows) -> u64 {
    let parse = |table: &str| -> Vec<Value> {
        rows[table].iter().map(|row| serde_json::from_str(row).expect("a row")).collect()
    };
    let mut steps: Vec<u64> = parse("journal").iter().map(|row| row[0].as_u64().expect("a step")).collect();
    steps.sort_unstable();
    assert_eq!(steps, (0..steps.len() as u64).collect::<Vec<_>>(), "the journal has a hole");
    let accounts = parse("account");
    assert_eq!(accounts.len() as u64, ACCOUNTS);
    let sum: i64 = accounts.iter().map(|row| row[1].as_i64().expect("a balance")).sum();
    assert_eq!(sum, SUM, "the balances do not add up");
    steps.len() as u64
}
