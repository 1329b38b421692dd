//! What tables hold, as row counts and hashes that do not depend on the order of rows.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;

use crate::backup::Witness;
use crate::config::Config;
use crate::database::link::LinkError;
use crate::database::reader::{Reader, Readers};
use crate::ids::{ContentHash, Identity};
use crate::observe::server::{Database, SourceError};
use crate::release::Release;
use crate::repository::manifest::{RowForm, TablePromise};

/// Sums in a hash.
const SUMS: usize = 32;
/// A table's rows are read whole, so no more than this is taken of one.
const LARGEST: usize = 16 << 20;
/// A server that does not answer must not hold a restore point up.
const PATIENCE: Duration = Duration::from_secs(10);

/// The server that the configuration names.
pub struct LiveServer {
    config: Config,
    readers: Arc<Readers>,
}

impl LiveServer {
    /// `None` where nothing is to be promised.
    pub fn witness(config: &Config, readers: Arc<Readers>) -> Option<Arc<dyn Witness>> {
        (config.drill.promise_rows > 0).then(|| Arc::new(Self { config: config.clone(), readers }) as Arc<dyn Witness>)
    }

    fn database(&self, name: &str) -> Result<Database, SourceError> {
        Database::new(&self.config.spacetimedb_config, &self.config.server_config, name)
    }

    /// Does the server write to a database that is asked by SQL?
    async fn writes_when_asked(&self) -> Result<bool, SourceError> {
        let version = self.database("")?.server_version().await?;
        Ok(Release::of(version.as_deref()).writes_when_asked())
    }

    /// Opens the connections to `databases` that are not open. Returns true if one was opened.
    async fn connect(&self, databases: &[Identity]) -> Result<bool, SourceError> {
        let mut is_new = false;
        for database in databases {
            let reader = self.readers.get(&database.to_string())?;
            let before = reader.connections();
            if let Err(error) = reader.query("SELECT * FROM st_table WHERE table_id = 1".into()).await {
                tracing::debug!(%error, %database, "the restore point will promise nothing of it");
            }
            is_new |= reader.connections() > before;
        }
        Ok(is_new)
    }

    async fn read(&self, name: &str) -> Result<Vec<TablePromise>, SourceError> {
        let most = self.config.drill.promise_rows;
        let database = self.database(name)?;
        if !self.writes_when_asked().await? {
            return by_sql(&database, most).await;
        }
        let sizes = database.table_sizes(name).await?;
        let mut tables = Vec::new();
        for table in stored_tables(&database).await? {
            // One of which the server has not told yet is new, and small.
            let is_large = sizes.get(&table).is_some_and(|size| size.rows > most || size.bytes > LARGEST as u64);
            let reader = self.readers.get(name)?;
            // Over the connection whole rows are asked for, so that one of those is not even counted.
            if !is_large && !reader.is_too_large(&table) {
                tables.extend(by_query(&reader, &table).await?);
            }
        }
        Ok(tables)
    }
}

impl Witness for LiveServer {
    fn connects(&self) -> BoxFuture<'_, bool> {
        let asking = tokio::time::timeout(PATIENCE, self.writes_when_asked());
        async move { matches!(asking.await, Ok(Ok(true))) }.boxed()
    }

    fn prepare<'a>(&'a self, databases: &'a [Identity]) -> BoxFuture<'a, bool> {
        let connecting = tokio::time::timeout(PATIENCE, self.connect(databases));
        async move { matches!(connecting.await, Ok(Ok(true))) }.boxed()
    }

    fn tables(&self, database: Identity) -> BoxFuture<'_, Option<Vec<TablePromise>>> {
        async move {
            let name = database.to_string();
            match tokio::time::timeout(PATIENCE, self.read(&name)).await {
                Ok(Ok(tables)) => Some(tables),
                Ok(Err(error)) => {
                    tracing::debug!(%error, %database, "the restore point promises nothing of it");
                    None
                }
                Err(_) => None,
            }
        }
        .boxed()
    }
}

/// Uses a restored database for the first time, and connects to it where its tables were promised over a connection.
///
/// # Errors
/// When the server cannot be asked.
pub async fn open(config: &Config, database: Identity, promised: &[TablePromise]) -> Result<Reader, SourceError> {
    let reader = Reader::new(&config.spacetimedb_config, &config.server_config, &database.to_string())?;
    reader.database().description().await?;
    if promised.iter().any(|promise| promise.form == RowForm::Bsatn) {
        reader.query("SELECT * FROM st_table WHERE table_id = 1".into()).await?;
    }
    Ok(reader)
}

/// Every table of a restored database that may be read, each in the form in which it was promised. The server is one of
/// ours that nobody else uses, so that it may write when it is asked.
///
/// # Errors
/// When the server cannot be asked.
pub async fn tables(reader: &Reader, promised: &[TablePromise], most: u64) -> Result<Vec<TablePromise>, SourceError> {
    // First, since what is asked by SQL runs the module's reducers for clients that come and go.
    let mut promised_so = Vec::new();
    for promise in promised.iter().filter(|promise| promise.form == RowForm::Bsatn) {
        promised_so.extend(by_query(reader, &promise.name).await?);
    }
    let mut tables = by_sql(reader.database(), most).await?;
    for read in promised_so {
        if let Some(found) = tables.iter_mut().find(|table| table.name == read.name) {
            *found = read;
        }
    }
    Ok(tables)
}

/// The names of the tables that hold rows: those of event tables are in the log alone.
async fn stored_tables(database: &Database) -> Result<Vec<String>, SourceError> {
    let module = database.description().await?;
    let stored = module.tables.into_iter().filter(|(_, table)| !table.is_event);
    Ok(stored.map(|(name, _)| name).collect())
}

async fn by_sql(database: &Database, most: u64) -> Result<Vec<TablePromise>, SourceError> {
    let mut tables = Vec::new();
    for name in stored_tables(database).await? {
        match table_by_sql(database, &name, most).await {
            Ok(found) => tables.push(found),
            // Private, and not ours.
            Err(SourceError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(tables)
}

async fn table_by_sql(database: &Database, name: &str, most: u64) -> Result<TablePromise, SourceError> {
    let (name, form) = (name.to_owned(), RowForm::Json);
    let rows = database.count(&name).await?;
    if rows > most {
        return Ok(TablePromise { name, rows, form, hash: None });
    }
    let texts = database.row_texts(&name, LARGEST).await?;
    let rows = texts.as_ref().map_or(rows, |texts| texts.len() as u64);
    let hash = texts.map(|texts| Sums::of(texts.iter().map(String::as_bytes)).to_string());
    Ok(TablePromise { name, rows, form, hash })
}

/// `None` for a table that is private and not ours.
async fn by_query(reader: &Reader, name: &str) -> Result<Option<TablePromise>, SourceError> {
    let rows = match reader.query(format!("SELECT * FROM {name}")).await {
        Err(LinkError::Query { .. }) => return Ok(None),
        Err(LinkError::TooLarge) => {
            tracing::warn!(
                table = name,
                "it is too large for a checksum over a connection, and restore points have none of it"
            );
            reader.is_now_too_large(name);
            return Ok(None);
        }
        rows => rows?,
    };
    let hash = Sums::of(rows.iter().map(AsRef::as_ref)).to_string();
    Ok(Some(TablePromise { name: name.to_owned(), rows: rows.len() as u64, form: RowForm::Bsatn, hash: Some(hash) }))
}

/// Hashes of rows, added up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sums([u64; SUMS]);

impl Sums {
    pub fn of<'a>(rows: impl Iterator<Item = &'a [u8]>) -> Self {
        let mut sums = [0_u64; SUMS];
        for row in rows {
            let hash = ContentHash::of(row).0;
            let mut number = [0; 8];
            number.copy_from_slice(&hash[8..16]);
            if let Some(sum) = sums.get_mut(usize::from(hash[0]) % SUMS) {
                *sum = sum.wrapping_add(u64::from_le_bytes(number));
            }
        }
        Self(sums)
    }

    /// `None` when the text is no such hash.
    pub fn parse(text: &str) -> Option<Self> {
        let mut sums = [0; SUMS];
        if text.len() != SUMS * 16 || !text.is_ascii() {
            return None;
        }
        for (index, sum) in sums.iter_mut().enumerate() {
            *sum = u64::from_str_radix(text.get(index * 16..index * 16 + 16)?, 16).ok()?;
        }
        Some(Self(sums))
    }

    /// In how many sums the two differ: a row that is there in one alone changes one.
    pub fn distance(&self, other: &Self) -> usize {
        self.0.iter().zip(other.0).filter(|(a, b)| **a != *b).count()
    }
}

impl std::fmt::Display for Sums {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|sum| write!(f, "{sum:016x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_of_rows_does_not_matter_and_each_of_them_does() {
        let rows: Vec<String> = (0..500).map(|n| format!("[{n},\"row\"]")).collect();
        let sums = Sums::of(rows.iter().map(String::as_bytes));
        assert_eq!(Sums::of(rows.iter().rev().map(String::as_bytes)), sums);
        assert_eq!(Sums::parse(&sums.to_string()), Some(sums));
        for left_out in 0..rows.len() {
            let others = rows.iter().enumerate().filter(|(n, _)| *n != left_out).map(|(_, row)| row.as_bytes());
            assert_eq!(Sums::of(others).distance(&sums), 1);
        }
        // A row that is there twice is not a row that is there once.
        assert_ne!(Sums::of(rows.iter().chain(&rows[..1]).map(String::as_bytes)), sums);
        assert_eq!(Sums::parse("00"), None);
    }
}
