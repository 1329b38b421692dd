//! What tables hold, as row counts and hashes that do not depend on the order of rows.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;

use crate::backup::Witness;
use crate::config::Config;
use crate::ids::{ContentHash, Identity};
use crate::observe::server::{Database, SourceError};
use crate::repository::manifest::TablePromise;

/// Sums in a hash.
const SUMS: usize = 32;
/// A table's rows are read whole, so no more than this is taken of one.
const LARGEST: usize = 16 << 20;
/// A server that does not answer must not hold a restore point up.
const PATIENCE: Duration = Duration::from_secs(10);

/// The server that the configuration names.
pub struct LiveServer {
    config: Config,
}

impl LiveServer {
    /// `None` where nothing is to be promised.
    pub fn witness(config: &Config) -> Option<Arc<dyn Witness>> {
        (config.drill.promise_rows > 0).then(|| Arc::new(Self { config: config.clone() }) as Arc<dyn Witness>)
    }
}

impl Witness for LiveServer {
    fn tables(&self, database: Identity) -> BoxFuture<'_, Option<Vec<TablePromise>>> {
        async move {
            let name = database.to_string();
            let reading = tables(&self.config, &name);
            match tokio::time::timeout(PATIENCE, reading).await {
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

/// Every table of a database that may be read, by name.
///
/// # Errors
/// When the server cannot be asked.
pub async fn tables(config: &Config, database: &str) -> Result<Vec<TablePromise>, SourceError> {
    let database = Database::new(&config.spacetimedb_config, &config.server_config, database)?;
    let module = database.description().await?;
    let mut tables = Vec::new();
    // Rows of event tables are in no table.
    for (name, _) in module.tables.iter().filter(|(_, table)| !table.is_event) {
        match table(&database, name, config.drill.promise_rows).await {
            Ok(found) => tables.push(found),
            // Private, and not ours.
            Err(SourceError::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(tables)
}

async fn table(database: &Database, name: &str, most: u64) -> Result<TablePromise, SourceError> {
    let rows = database.count(name).await?;
    if rows > most {
        return Ok(TablePromise { name: name.to_owned(), rows, hash: None });
    }
    let texts = database.row_texts(name, LARGEST).await?;
    let rows = texts.as_ref().map_or(rows, |texts| texts.len() as u64);
    let hash = texts.map(|texts| Sums::of(texts.iter().map(String::as_bytes)).to_string());
    Ok(TablePromise { name: name.to_owned(), rows, hash })
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
