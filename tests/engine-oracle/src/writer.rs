//! Opens replicas as a server does, and writes one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use spacetimedb_datastore::execution_context::{ReducerContext, Workload};
use spacetimedb_datastore::locking_tx_datastore::MutTxId;
use spacetimedb_datastore::system_tables::ModuleKind;
use spacetimedb_datastore::traits::{IsolationLevel, Program};
use spacetimedb_engine::persistence::{CommitlogConfig, Database, DurabilityConfig, LocalPersistenceProvider};
use spacetimedb_engine::persistence::{Persistence, PersistenceProvider as _};
use spacetimedb_engine::relational_db::{RelationalDB, local_history};
use spacetimedb_engine::update::{UpdateLogger, update_database};
use spacetimedb_lib::identity::AuthCtx;
use spacetimedb_lib::{ConnectionId, Identity, TimeDuration, Timestamp};
use spacetimedb_paths::FromPathUnchecked as _;
use spacetimedb_paths::server::ServerDataDir;
use spacetimedb_primitives::TableId;
use spacetimedb_sats::{AlgebraicValue, ProductValue, bsatn, product, u256};
use spacetimedb_schema::auto_migrate::ponder_migrate;
use spacetimedb_schema::reducer_name::ReducerName;
use spacetimedb_schema::schema::{Schema as _, TableSchema};
use spacetimedb_table::page_pool::PagePool;

use crate::{Place, schema};

/// Small, so that segments end, are compressed and bring snapshots.
const SEGMENT: u64 = 512 << 10;

/// With its newest usable snapshot, and its log from there.
pub async fn open(place: &Place) -> anyhow::Result<RelationalDB> {
    let data_dir = ServerDataDir::from_path_unchecked(&place.data_dir);
    let log = CommitlogConfig { max_segment_size: SEGMENT.try_into().ok(), ..CommitlogConfig::default() };
    let replica = data_dir.replica(place.replica);
    std::fs::create_dir_all(&replica.0)?;
    let provider = LocalPersistenceProvider::new(data_dir).with_durability_config(DurabilityConfig { commitlog: log });
    let database = Database { id: 1, database_identity: place.identity, owner_identity: place.owner };
    let persistence: Persistence = provider.persistence(&database, place.replica).await?;
    let runtime = persistence.runtime.clone();
    let history = local_history(&replica, &runtime).await?;
    let (identity, owner, pool) = (place.identity, place.owner, PagePool::new_for_test());
    let open = move || RelationalDB::open(identity, owner, history, Some(persistence), None, pool);
    let (database, _) = tokio::task::spawn_blocking(open).await?.context("open the replica")?;
    Ok(database)
}

/// Random transactions of every kind, one after the other, until standard input ends.
pub async fn write_until_told(place: &Place, seed: u64) -> anyhow::Result<()> {
    let database = Arc::new(open(place).await?);
    let told = Arc::new(AtomicBool::new(false));
    let telling = told.clone();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        telling.store(true, Ordering::Release);
    });
    let mut writer = Writer { database: database.clone(), random: Random(seed | 1), version: 1, written: 0 };
    writer.initialise()?;
    tokio::task::spawn_blocking(move || -> anyhow::Result<()> {
        while !told.load(Ordering::Acquire) {
            writer.step()?;
        }
        Ok(())
    })
    .await??;
    let last = database.shutdown().await.context("nothing is durable")?;
    println!("{last}");
    Ok(())
}

struct Writer {
    database: Arc<RelationalDB>,
    random: Random,
    version: u8,
    written: u64,
}

impl Writer {
    fn initialise(&mut self) -> anyhow::Result<()> {
        let module = schema::version(1)?;
        let mut tx = self.database.begin_mut_tx(IsolationLevel::Serializable, Workload::Internal);
        for table in module.tables() {
            let schema = TableSchema::from_module_def(&module, table, (), TableId::SENTINEL);
            self.database.create_table(&mut tx, schema)?;
        }
        let program = Program::from_bytes(ModuleKind::WASM, *b"version 1");
        self.database.set_initialized(&mut tx, program)?;
        self.database.commit_tx(tx)?;
        Ok(())
    }

    /// One transaction.
    fn step(&mut self) -> anyhow::Result<()> {
        self.written += 1;
        match self.written {
            2_000 => return self.migrate(2),
            4_000 => return self.migrate(3),
            _ => {}
        }
        // A server would be slower, and a reader should see it write.
        if self.written.is_multiple_of(50) {
            std::thread::sleep(std::time::Duration::from_millis(40));
        }
        let choice = self.random.below(100);
        let mut tx = self.reducer(if choice < 4 { "empty" } else { "write" });
        match choice {
            0..4 => {
                let table = self.table(&tx, "emptied")?;
                self.database.clear_table(&mut tx, table)?;
            }
            4..16 => self.delete_some(&mut tx)?,
            _ => {
                for _ in 0..=self.random.below(8) {
                    self.insert(&mut tx)?;
                }
            }
        }
        self.database.commit_tx(tx)?;
        Ok(())
    }

    fn reducer(&self, name: &str) -> MutTxId {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let context = ReducerContext {
            name: ReducerName::for_test(name),
            caller_identity: self.database.owner_identity(),
            caller_connection_id: ConnectionId::from_u128(7),
            timestamp: Timestamp::from_micros_since_unix_epoch(since.as_micros() as i64),
            arg_bsatn: Default::default(),
        };
        self.database.begin_mut_tx(IsolationLevel::Serializable, Workload::Reducer(context))
    }

    fn table(&self, tx: &MutTxId, name: &str) -> anyhow::Result<TableId> {
        self.database.table_id_from_name_mut(tx, name)?.with_context(|| format!("no table {name}"))
    }

    fn insert(&mut self, tx: &mut MutTxId) -> anyhow::Result<()> {
        let (name, row) = self.row();
        let table = self.table(tx, name)?;
        self.database.insert(tx, table, &bsatn::to_vec(&row)?)?;
        Ok(())
    }

    fn row(&mut self) -> (&'static str, ProductValue) {
        let number = self.random.next();
        let length = self.random.below(60);
        let short = self.random.text(length);
        match self.random.below(12) {
            0..4 => ("kinds", self.kinds()),
            4..7 => {
                // Beyond some 992 bytes a value is an object of its own in a snapshot.
                let length = self.random.below(3_000);
                ("texts", product![number, self.random.text(length)])
            }
            7 | 8 => ("emptied", product![number, short]),
            9 => ("noise", product![number, short]),
            10 if self.version >= 2 => ("late", product![number]),
            10 => ("goner", product![number]),
            _ if self.version >= 2 => ("grows", product![number, short, "new"]),
            _ => ("grows", product![number, short]),
        }
    }

    fn kinds(&mut self) -> ProductValue {
        let mut next = || self.random.next();
        let (a, b, c) = (next(), next(), next());
        let maybe = (a % 3 > 0).then(|| AlgebraicValue::from(format!("maybe {b}")));
        product![
            a,
            b % 2 == 0,
            b as i8,
            b as u16,
            (i128::from(a as i64) << 64) | i128::from(b),
            u256::from_words(u128::from(a), u128::from(c)),
            // Every kind of number, and not only numbers.
            match c % 7 {
                0 => f64::NAN,
                1 => -0.0,
                2 => f64::NEG_INFINITY,
                _ => a as f64 / 3.0,
            },
            AlgebraicValue::Bytes(a.to_le_bytes()[..(b % 9) as usize].into()),
            AlgebraicValue::Array((0..c % 5).map(|n| n as i32).collect::<Box<[i32]>>().into()),
            maybe.map_or_else(AlgebraicValue::OptionNone, AlgebraicValue::OptionSome),
            Identity::from_u256(u256::from(c)),
            ConnectionId::from_u128(u128::from(b)),
            Timestamp::from_micros_since_unix_epoch((a >> 8) as i64),
            TimeDuration::from_micros((c >> 8) as i64),
        ]
    }

    fn delete_some(&mut self, tx: &mut MutTxId) -> anyhow::Result<()> {
        let name = ["kinds", "texts", "grows"][self.random.below(3) as usize];
        let table = self.table(tx, name)?;
        let skipped = self.random.below(40) as usize;
        let count = 1 + self.random.below(20) as usize;
        let rows: Vec<_> =
            self.database.iter_mut(tx, table)?.skip(skipped).take(count).map(|row| row.pointer()).collect();
        self.database.delete(tx, table, rows);
        Ok(())
    }

    fn migrate(&mut self, version: u8) -> anyhow::Result<()> {
        let (old, new) = (schema::version(self.version)?, schema::version(version)?);
        let mut tx = self.database.begin_mut_tx(IsolationLevel::Serializable, Workload::Internal);
        if version == 3 {
            // A table that goes must be empty.
            let table = self.table(&tx, "goner")?;
            self.database.clear_table(&mut tx, table)?;
        }
        let plan = ponder_migrate(&old, &new).map_err(|errors| anyhow::anyhow!("{errors:?}"))?;
        let program = Program::from_bytes(
            ModuleKind::WASM,
            *format!("version {version}").as_bytes().first_chunk::<9>().context("nine bytes")?,
        );
        self.database.update_program(&mut tx, program)?;
        let owner = AuthCtx::for_current(self.database.owner_identity());
        let _ = update_database(&self.database, &mut tx, owner, plan, &Silent)?;
        self.database.commit_tx(tx)?;
        self.version = version;
        Ok(())
    }
}

struct Silent;

impl UpdateLogger for Silent {
    fn info(&self, _: &str) {}
}

/// Xorshift: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn text(&mut self, length: u64) -> String {
        (0..length).map(|_| char::from(b'a' + self.below(26) as u8)).collect()
    }
}
