//! Where events come from: ranges by SQL over HTTP for what is behind, a subscription through the SDK for what happens now.
//!
//! The only room that knows how this release of the server speaks; see ARCHITECTURE.md on server versions.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value as Json;
use spacetimedb_sdk::{DbContext as _, SubscriptionHandle as _, Table as _};
use tokio::sync::mpsc;

use crate::config::{ServerConfig, SpacetimedbConfig};
use crate::module_bindings::{
    DbConnection, EventData, EventLog, EventLogTableAccess as _, Field, Operation, SubjectChange, SubjectKind,
    SubscriptionHandle, Value,
};

/// Rows that may wait between the SDK and us.
const LIVE_QUEUE: usize = 8_192;
/// Until a subscription is applied.
const APPLY_LIMIT: Duration = Duration::from_secs(30);

/// What can go wrong with the server.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("read the token in {path}: {reason}; correct spacetimedb_config.token_file")]
    Token { path: String, reason: String },
    #[error("ask the server at {url}: {reason}; check that it runs, and spacetimedb_config.url")]
    Unreachable { url: String, reason: String },
    #[error(
        "the server refused to read the event log ({status}): {said}; check spacetimedb_config.database and token_file"
    )]
    Refused { status: u16, said: String },
    #[error("the server's answer is not understood: {0}")]
    Answer(String),
    #[error("the subscription to the event log ended: {0}")]
    Subscription(String),
}

/// The event log of one database.
pub struct Source {
    client: reqwest::Client,
    url: String,
    database: String,
    token: Option<String>,
}

/// One row of `event_log` in the server's JSON: products are arrays, sums a tag and a payload.
#[derive(Deserialize)]
struct Row(u64, String, String, (u8, Json), (i64,), String, (u8, Json));

#[derive(Deserialize)]
struct Rows {
    rows: Vec<Row>,
}

impl Source {
    /// # Errors
    /// When the token cannot be read.
    pub fn new(config: &SpacetimedbConfig, server: &ServerConfig, database: &str) -> Result<Self, SourceError> {
        let token = match &config.token_file {
            Some(path) => {
                let refuse = |reason: String| SourceError::Token { path: path.display().to_string(), reason };
                let text = std::fs::read_to_string(path).map_err(|error| refuse(error.to_string()))?;
                let token = text.trim().to_owned();
                if token.is_empty() || token.chars().any(|c| c.is_whitespace() || c.is_control()) {
                    return Err(refuse("it holds no token on a line of its own".into()));
                }
                Some(token)
            }
            None => None,
        };
        let url = config.server_url();
        let timeout = Duration::from_millis(server.timeout_ms);
        let client = crate::observe::otlp::client(timeout, None)
            .map_err(|error| SourceError::Unreachable { url: url.clone(), reason: error.to_string() })?;
        Ok(Self { client, url, database: database.to_owned(), token })
    }

    /// Events after `after` up to and including `until`, in order.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn range(&self, after: u64, until: u64) -> Result<Vec<EventLog>, SourceError> {
        self.query(&format!("sequence > {after} AND sequence <= {until}")).await
    }

    /// One event.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn at(&self, sequence: u64) -> Result<Option<EventLog>, SourceError> {
        Ok(self.query(&format!("sequence = {sequence}")).await?.pop())
    }

    /// The sequence of the first event after `after`. The server knows no order, so the place is halved.
    ///
    /// # Errors
    /// When the server cannot be asked.
    pub async fn first_after(&self, after: u64) -> Result<Option<u64>, SourceError> {
        let Some(any) = self.query(&format!("sequence > {after} LIMIT 1")).await?.pop() else { return Ok(None) };
        let (mut low, mut found) = (after, any.sequence);
        while found > low + 1 {
            let middle = low + (found - low) / 2;
            match self.query(&format!("sequence > {low} AND sequence <= {middle} LIMIT 1")).await?.pop() {
                Some(event) => found = event.sequence,
                None => low = middle,
            }
        }
        Ok(Some(found))
    }

    async fn query(&self, condition: &str) -> Result<Vec<EventLog>, SourceError> {
        let unreachable = |error: reqwest::Error| SourceError::Unreachable {
            url: self.url.clone(),
            reason: crate::observe::events::source::root_cause(&error),
        };
        let url = format!("{}/v1/database/{}/sql", self.url, self.database);
        let mut request = self.client.post(url).body(format!("SELECT * FROM event_log WHERE {condition}"));
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        let answer = request.send().await.map_err(unreachable)?;
        let status = answer.status();
        let bytes = answer.bytes().await.map_err(unreachable)?;
        if !status.is_success() {
            let said = String::from_utf8_lossy(&bytes).chars().take(300).collect();
            return Err(SourceError::Refused { status: status.as_u16(), said });
        }
        // Reading ten thousand rows takes a moment that others should not have to wait for.
        let parsed = tokio::task::spawn_blocking(move || parse(&bytes)).await;
        parsed.map_err(|error| SourceError::Answer(error.to_string()))?
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

fn parse(bytes: &[u8]) -> Result<Vec<EventLog>, SourceError> {
    let answer: Vec<Rows> = serde_json::from_slice(bytes).map_err(|error| SourceError::Answer(error.to_string()))?;
    let mut events = Vec::new();
    for row in answer.into_iter().flat_map(|answer| answer.rows) {
        let Row(sequence, event_id, event_type, source, (micros,), correlation_id, data) = row;
        let source = match source {
            (0, Json::String(source)) => Some(source),
            (0, other) => return Err(SourceError::Answer(format!("a source of the form {other}"))),
            _ => None,
        };
        let data =
            payload(data.0, &data.1).ok_or_else(|| SourceError::Answer(format!("the data of event {sequence}")))?;
        let timestamp = spacetimedb_sdk::Timestamp::from_micros_since_unix_epoch(micros);
        events.push(EventLog { sequence, event_id, event_type, source, timestamp, correlation_id, data });
    }
    events.sort_by_key(|event| event.sequence);
    Ok(events)
}

fn payload(tag: u8, json: &Json) -> Option<EventData> {
    Some(match tag {
        0 => EventData::Empty,
        1 => EventData::Text(json.as_str()?.to_owned()),
        2 => {
            let [subject, id, version, operation] = json.as_array()?.as_slice() else { return None };
            EventData::Change(SubjectChange {
                subject: match tag_of(subject)? {
                    0 => SubjectKind::Entity,
                    _ => SubjectKind::Relation,
                },
                subject_id: id.as_str()?.to_owned(),
                version: version.as_u64()?,
                operation: match tag_of(operation)? {
                    0 => Operation::Create,
                    1 => Operation::Update,
                    2 => Operation::Delete,
                    _ => Operation::Restore,
                },
            })
        }
        _ => EventData::Custom(json.as_array()?.iter().map(field).collect::<Option<_>>()?),
    })
}

fn tag_of(json: &Json) -> Option<u64> {
    json.as_array()?.first()?.as_u64()
}

fn field(json: &Json) -> Option<Field> {
    let [name, value] = json.as_array()?.as_slice() else { return None };
    let [tag, value] = value.as_array()?.as_slice() else { return None };
    let value = match tag.as_u64()? {
        0 => Value::Bool(value.as_bool()?),
        1 => Value::Int(value.as_i64()?),
        2 => Value::UInt(value.as_u64()?),
        3 => Value::Float(value.as_f64()?),
        4 => Value::String(value.as_str()?.to_owned()),
        _ => Value::Bytes(bytes(value)?),
    };
    Some(Field { name: name.as_str()?.to_owned(), value })
}

/// Bytes come as hexadecimal text or as a list of numbers, depending on the server.
fn bytes(json: &Json) -> Option<Vec<u8>> {
    match json {
        Json::Array(items) => items.iter().map(|item| u8::try_from(item.as_u64()?).ok()).collect(),
        Json::String(text) if text.len().is_multiple_of(2) && text.is_ascii() => {
            (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).ok()).collect()
        }
        _ => None,
    }
}

/// What came from a subscription.
pub enum Received {
    Some,
    /// More than the queue holds: what was left out is to be read in ranges.
    Overflow,
}

/// A subscription to everything after a sequence.
pub struct Live {
    connection: DbConnection,
    subscription: SubscriptionHandle,
    rows: mpsc::Receiver<EventLog>,
    overflow: Arc<AtomicBool>,
    ended: Arc<parking_lot::Mutex<Option<String>>>,
    wake: Arc<tokio::sync::Notify>,
}

impl Live {
    /// Subscribes to what comes after `after`.
    ///
    /// # Errors
    /// When the server refuses, or gives no answer in time.
    pub async fn start(source: &Source, after: u64) -> Result<Self, SourceError> {
        let (url, database, token) = (source.url.clone(), source.database.clone(), source.token.clone());
        let wake = Arc::new(tokio::sync::Notify::new());
        let overflow = Arc::new(AtomicBool::new(false));
        let ended: Arc<parking_lot::Mutex<Option<String>>> = Arc::default();
        let (ended_too, wake_too) = (Arc::clone(&ended), Arc::clone(&wake));
        // The SDK connects before it returns.
        let connecting = tokio::task::spawn_blocking(move || {
            let builder = DbConnection::builder().with_uri(url).with_module_name(database).with_token(token);
            let builder = builder.on_disconnect(move |_, error| {
                let reason = error.map_or("the connection was closed".to_owned(), |error| error.to_string());
                ended_too.lock().get_or_insert(reason);
                wake_too.notify_one();
            });
            builder.build().map_err(|error| SourceError::Subscription(error.to_string()))
        });
        let connection = tokio::time::timeout(APPLY_LIMIT, connecting)
            .await
            .map_err(|_| SourceError::Subscription("the server gave no answer".into()))?
            .map_err(|error| SourceError::Subscription(error.to_string()))??;
        let (sender, rows) = mpsc::channel(LIVE_QUEUE);
        let (full, wake_again) = (Arc::clone(&overflow), Arc::clone(&wake));
        connection.db().event_log().on_insert(move |_, event| {
            if sender.try_send(event.clone()).is_err() {
                full.store(true, Ordering::Relaxed);
                wake_again.notify_one();
            }
        });
        connection.run_threaded();
        let (applied, is_applied) = tokio::sync::oneshot::channel();
        let subscription = subscribe(&connection, after, Some(applied), Arc::clone(&ended), Arc::clone(&wake));
        match tokio::time::timeout(APPLY_LIMIT, is_applied).await {
            Ok(Ok(())) => Ok(Self { connection, subscription, rows, overflow, ended, wake }),
            _ => {
                let reason = ended.lock().take().unwrap_or_else(|| "it was not applied in time".into());
                // It may be closed already.
                let _ = connection.disconnect();
                Err(SourceError::Subscription(reason))
            }
        }
    }

    /// Waits for rows, and takes up to `most` of those that are there.
    ///
    /// # Errors
    /// When the subscription has ended.
    pub async fn next(&mut self, most: usize, rows: &mut Vec<EventLog>) -> Result<Received, SourceError> {
        loop {
            if self.overflow.load(Ordering::Relaxed) {
                return Ok(Received::Overflow);
            }
            if let Some(reason) = self.ended.lock().take() {
                return Err(SourceError::Subscription(reason));
            }
            tokio::select! {
                // Cancelled, it has taken nothing.
                taken = self.rows.recv_many(rows, most) => {
                    return if taken > 0 { Ok(Received::Some) } else { Err(SourceError::Subscription("it was dropped".into())) };
                }
                () = self.wake.notified() => {}
            }
        }
    }

    /// Subscribes to what comes after `after` and lets go of all before, which the SDK forgets then.
    ///
    /// # Errors
    /// When the subscription has ended.
    pub fn renew(&mut self, after: u64) -> Result<(), SourceError> {
        let next = subscribe(&self.connection, after, None, Arc::clone(&self.ended), Arc::clone(&self.wake));
        let before = std::mem::replace(&mut self.subscription, next);
        before.unsubscribe().map_err(|error| SourceError::Subscription(error.to_string()))
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        // It may be closed already.
        let _ = self.connection.disconnect();
    }
}

fn subscribe(
    connection: &DbConnection,
    after: u64,
    applied: Option<tokio::sync::oneshot::Sender<()>>,
    ended: Arc<parking_lot::Mutex<Option<String>>>,
    wake: Arc<tokio::sync::Notify>,
) -> SubscriptionHandle {
    let applied = parking_lot::Mutex::new(applied);
    let builder = connection.subscription_builder().on_applied(move |_| {
        if let Some(applied) = applied.lock().take() {
            // Who waited may have given up.
            let _ = applied.send(());
        }
    });
    let builder = builder.on_error(move |_, error| {
        ended.lock().get_or_insert(error.to_string());
        wake.notify_one();
    });
    builder.subscribe(format!("SELECT * FROM event_log WHERE sequence > {after}"))
}
