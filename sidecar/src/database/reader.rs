//! Rows of a database over a connection that is opened once and kept, so that looking writes nothing.
//!
//! Servers since 2.2 write two transactions for each SQL statement over HTTP: the caller comes and goes. Of a connection
//! they write one when it is opened and one when it is closed, and none for a query.
//!
//! Invariants: one task owns the connection, answers the server's pings and opens it again for the next query where it
//! broke; it ends with the last [`Reader`]. An answer that is too large is asked for in parts.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use spacetimedb_sats::bsatn;
use spacetimedb_sats::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot};

use crate::config::{Config, ServerConfig, SpacetimedbConfig};
use crate::database::link::{Link, LinkError};
use crate::module_bindings::SequenceCounter;
use crate::observe::server::{Database, SourceError, caused};

/// Queries that wait for the one before.
const WAITING: usize = 16;

/// A row of a table whose key is a sequence without holes, but for what was trimmed from its start.
pub trait Sequenced: DeserializeOwned + Send + 'static {
    const TABLE: &'static str;
    const KEY: &'static str;

    fn sequence(&self) -> u64;
    /// By which it is known again should another row come to have its sequence.
    fn id(&self) -> String;
}

/// Asks one database. Clones share the connection.
#[derive(Clone)]
pub struct Reader {
    database: Arc<Database>,
    queries: mpsc::Sender<Query>,
    /// Sequences to ask for at once.
    span: Arc<AtomicU64>,
    connections: Arc<AtomicU64>,
    /// Tables that did not fit into one answer: to ask for one again would end the connection again.
    too_large: Arc<Mutex<HashSet<String>>>,
}

/// Rows of a range of the sequence, and how far they reach.
pub struct Part<R> {
    pub rows: Vec<R>,
    pub reached: u64,
}

/// Sequences to ask for first, before it is known how large their rows are.
const FIRST_SPAN: u64 = 1_000;
/// What a part should have at most.
const GOOD_BYTES: u64 = 4 << 20;

/// How many sequences to ask for next, after `asked` of them had so many bytes.
fn next_span(span: u64, asked: u64, bytes: u64) -> u64 {
    if bytes > GOOD_BYTES {
        // In so many steps that nothing overflows.
        return (asked / bytes.div_ceil(GOOD_BYTES)).max(1);
    }
    // What asked for less than it could says nothing of more.
    if asked < span || bytes > GOOD_BYTES / 2 { span } else { span.saturating_mul(2) }
}

struct Query {
    text: String,
    answer: oneshot::Sender<Result<Vec<Bytes>, LinkError>>,
}

impl Reader {
    /// Nothing is opened before the first query.
    ///
    /// # Errors
    /// When the token cannot be read.
    pub fn new(config: &SpacetimedbConfig, server: &ServerConfig, name: &str) -> Result<Self, SourceError> {
        let link = Link::new(config, server, name)?;
        let database = Arc::new(link.database().clone());
        let (queries, waiting) = mpsc::channel(WAITING);
        let connections = Arc::new(AtomicU64::new(0));
        tokio::spawn(serve(link, waiting, Arc::clone(&connections)));
        let (span, too_large) = (Arc::new(AtomicU64::new(FIRST_SPAN)), Arc::default());
        Ok(Self { database, queries, span, connections, too_large })
    }

    /// Is it known that the whole table does not fit into one answer?
    pub fn is_too_large(&self, table: &str) -> bool {
        self.too_large.lock().contains(table)
    }

    /// The whole table did not fit into one answer.
    pub fn is_now_too_large(&self, table: &str) {
        self.too_large.lock().insert(table.to_owned());
    }

    /// What the server is asked without the connection.
    pub fn database(&self) -> &Database {
        &self.database
    }

    /// How often the connection was opened, as the last answer had it.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// The rows that a statement selects, each in the server's binary form, in no order. Statements are of the form of
    /// subscriptions: whole rows, no LIMIT.
    ///
    /// # Errors
    /// When the server refuses the statement or cannot be asked, or the answer is too large.
    pub async fn query(&self, text: String) -> Result<Vec<Bytes>, LinkError> {
        let ended = || SourceError::Subscription("the task that asks has ended".into());
        let (answer, answered) = oneshot::channel();
        self.queries.send(Query { text, answer }).await.map_err(|_| ended())?;
        answered.await.map_err(|_| ended())?
    }

    /// Every row of a small table.
    ///
    /// # Errors
    /// When the server cannot be asked, or a row is not of this form.
    pub async fn all<T: DeserializeOwned + Send + 'static>(&self, table: &str) -> Result<Vec<T>, SourceError> {
        decode(table, self.query(format!("SELECT * FROM {table}")).await?).await
    }

    /// Rows after `after` up to and including `until`, in order: as many of them as are good to have in memory at once.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn part<R: Sequenced>(&self, after: u64, until: u64) -> Result<Part<R>, SourceError> {
        loop {
            let span = self.span.load(Ordering::Relaxed);
            let reached = after.saturating_add(span).min(until);
            if reached <= after {
                return Ok(Part { rows: Vec::new(), reached });
            }
            let asked = reached - after;
            let condition = format!("{key} > {after} AND {key} <= {reached}", key = R::KEY);
            let rows = match self.query(format!("SELECT * FROM {} WHERE {condition}", R::TABLE)).await {
                Err(LinkError::TooLarge) if asked > 1 => {
                    self.span.store(asked / 2, Ordering::Relaxed);
                    continue;
                }
                rows => rows?,
            };
            let bytes = rows.iter().map(|row| row.len() as u64).sum::<u64>();
            self.span.store(next_span(span, asked, bytes), Ordering::Relaxed);
            let mut rows: Vec<R> = decode(R::TABLE, rows).await?;
            rows.sort_by_key(R::sequence);
            return Ok(Part { rows, reached });
        }
    }

    /// One row.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn at<R: Sequenced>(&self, sequence: u64) -> Result<Option<R>, SourceError> {
        Ok(self.select(&format!("{} = {sequence}", R::KEY)).await?.pop())
    }

    /// The sequence of the first row after `after`.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn first_after<R: Sequenced>(&self, after: u64) -> Result<Option<u64>, SourceError> {
        let Some(next) = after.checked_add(1) else { return Ok(None) };
        if self.at::<R>(next).await?.is_some() {
            return Ok(Some(next));
        }
        // Without holes, the last one has none after it.
        if after > 0 && self.at::<R>(after).await?.is_some() {
            return Ok(None);
        }
        let last = match self.last_given_out(R::TABLE).await {
            // Only the owner may read the counter.
            Err(LinkError::Query { .. }) => return self.database.first_number(R::TABLE, R::KEY, next).await,
            last => last?,
        };
        if last <= after || self.at::<R>(last).await?.is_none() {
            return Ok(None);
        }
        // What is there is the end of the sequence.
        let (mut low, mut found) = (next, last);
        while low < found {
            let middle = low + (found - low) / 2;
            match self.at::<R>(middle).await? {
                Some(_) => found = middle,
                None => low = middle + 1,
            }
        }
        Ok(Some(found))
    }

    async fn last_given_out(&self, table: &str) -> Result<u64, LinkError> {
        let rows = self.query(format!("SELECT * FROM sequence_counter WHERE name = '{table}'")).await?;
        let counters: Vec<SequenceCounter> = decode("sequence_counter", rows).await?;
        Ok(counters.first().map_or(0, |counter| counter.last))
    }

    async fn select<R: Sequenced>(&self, condition: &str) -> Result<Vec<R>, LinkError> {
        let rows = self.query(format!("SELECT * FROM {} WHERE {condition}", R::TABLE)).await?;
        Ok(decode(R::TABLE, rows).await?)
    }
}

/// Reading ten thousand rows takes a moment that others should not have to wait for.
async fn decode<T: DeserializeOwned + Send + 'static>(table: &str, rows: Vec<Bytes>) -> Result<Vec<T>, SourceError> {
    let decoding = move || rows.iter().map(|row| bsatn::from_slice(row)).collect::<Result<Vec<T>, _>>();
    let decoded =
        tokio::task::spawn_blocking(decoding).await.map_err(|error| SourceError::Answer(error.to_string()))?;
    decoded.map_err(|error| SourceError::Answer(format!("a row of {table}: {error}")))
}

async fn serve(mut link: Link, mut queries: mpsc::Receiver<Query>, connections: Arc<AtomicU64>) {
    loop {
        let query = tokio::select! {
            query = queries.recv() => query,
            () = link.keep() => continue,
        };
        let Some(Query { text, answer }) = query else { break };
        let rows = link.query(&text).await;
        connections.store(link.opened(), Ordering::Relaxed);
        // The caller may have given up.
        let _ = answer.send(rows);
    }
    link.close().await;
}

/// Readers of databases on one server, one for each name.
pub struct Readers {
    config: Config,
    by_name: Mutex<HashMap<String, Reader>>,
}

impl Readers {
    pub fn new(config: &Config) -> Self {
        // Counted from nothing on, so that the first is seen as an increase.
        for kind in ["connection", "call", "sql"] {
            caused(kind, 0);
        }
        Self { config: config.clone(), by_name: Mutex::default() }
    }

    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The database's reader; a new one where the token is another than before.
    ///
    /// # Errors
    /// When the token cannot be read.
    pub fn get(&self, name: &str) -> Result<Reader, SourceError> {
        let (config, server) = (&self.config.spacetimedb_config, &self.config.server_config);
        let now = Database::new(config, server, name)?;
        let mut by_name = self.by_name.lock();
        if let Some(reader) = by_name.get(name).filter(|reader| reader.database.token == now.token) {
            return Ok(reader.clone());
        }
        let reader = Reader::new(config, server, name)?;
        by_name.insert(name.to_owned(), reader.clone());
        Ok(reader)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_grow_while_rows_are_small_and_shrink_to_what_is_good_to_have_in_memory() {
        assert_eq!(next_span(1_000, 1_000, 100_000), 2_000);
        assert_eq!(next_span(1_000, 10, 100), 1_000, "it asked for less than it could");
        assert_eq!(next_span(1_000, 1_000, 30_000_000), 125);
        assert_eq!(next_span(1_000, 1_000, 3 << 20), 1_000);
        assert_eq!(next_span(1, 1, u64::MAX), 1, "one row is asked for whatever its size");
        assert_eq!(next_span(u64::MAX, u64::MAX, 0), u64::MAX);
    }
}
