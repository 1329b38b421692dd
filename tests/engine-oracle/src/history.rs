//! A log that ends where it is told to.

use anyhow::Context as _;
use spacetimedb_commitlog::error::Traversal;
use spacetimedb_commitlog::payload::Txdata;
use spacetimedb_commitlog::{Decoder, Transaction, fold_transaction_range};
use spacetimedb_durability::{History, TxOffset};
use spacetimedb_engine::relational_db::RelationalDB;
use spacetimedb_paths::FromPathUnchecked as _;
use spacetimedb_paths::server::{CommitLogDir, ServerDataDir};
use spacetimedb_sats::ProductValue;
use spacetimedb_table::page_pool::PagePool;

use crate::Place;

struct Until {
    log: CommitLogDir,
    last: TxOffset,
}

/// The database in memory after transaction `last`, by the log alone.
pub fn replayed(place: &Place, last: TxOffset) -> anyhow::Result<RelationalDB> {
    let log = ServerDataDir::from_path_unchecked(&place.data_dir).replica(place.replica).commit_log();
    let pool = PagePool::new_for_test();
    let opened = RelationalDB::open(place.identity, place.owner, Until { log, last }, None, None, pool);
    let (database, _) = opened.with_context(|| format!("replay up to {last}"))?;
    Ok(database)
}

impl History for Until {
    type TxData = Txdata<ProductValue>;

    fn fold_transactions_from<D>(&self, offset: TxOffset, decoder: D) -> Result<(), D::Error>
    where
        D: Decoder,
        D::Error: From<Traversal> + From<std::io::Error>,
    {
        fold_transaction_range(self.log.clone(), offset..=self.last, decoder)
    }

    fn transactions_from<'a, D>(
        &'a self,
        _: TxOffset,
        _: &'a D,
    ) -> impl Iterator<Item = Result<Transaction<Self::TxData>, D::Error>> + 'a
    where
        D: Decoder<Record = Self::TxData>,
        D::Error: From<Traversal> + From<std::io::Error>,
        Self::TxData: 'a,
    {
        // Opening folds; nothing iterates.
        std::iter::empty()
    }
}
