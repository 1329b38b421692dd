//! Reducer calls as OpenTelemetry: every call in the log of any database becomes a span with its name, caller and time.
//!
//! Invariants: calls leave in the order of the log and at least once; the cursor moves only after the collector has taken
//! what it passes; a repetition carries the same ids, which are those that the bundled module's events name as their
//! parent; memory is bounded by one batch. The log itself is the queue.

mod log;

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use backon::BackoffBuilder;
use opentelemetry::KeyValue;
use opentelemetry_sdk::trace::Sampler;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::backup::{BackupError, blocking};
use crate::clock::{Clock, Stopwatch, patience};
use crate::config::TelemetryConfig;
use crate::datadir::DataDirError;
use crate::durable::FileError;
use crate::observe::calls::log::{CallReader, Calls};
use crate::observe::composed::Composer;
use crate::observe::cursor::{Cursor, CursorFile};
use crate::observe::otlp::{self, OtlpError, SendError, SpanSender, less_rejected};
use crate::observe::{metrics, provider};

/// How often a log is looked at that has nothing new.
const POLL: Duration = Duration::from_millis(250);
/// Seconds between writes of the cursor, each of which waits for the disk; what was sent after it is sent again after a crash.
const KEEP_INTERVAL: f64 = 2.0;
/// Reducers of a database that are counted under their own name; further ones are `other`.
const REDUCERS: usize = 100;

const ERROR_KINDS: [&str; 3] = ["log", "collector", "cursor"];

/// From when on calls reach the collector by their log, so that the event stream need not stand in for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Since {
    /// The logs were not looked at yet.
    Unknown,
    /// From this time of the server on, microseconds; at [`i64::MAX`], never.
    Time(i64),
}

/// What can stop a stream for a while.
#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error(transparent)]
    Log(#[from] DataDirError),
    #[error(transparent)]
    Work(#[from] BackupError),
    #[error(transparent)]
    Export(#[from] SendError),
    #[error(transparent)]
    Cursor(#[from] FileError),
}

impl CallError {
    fn kind(&self) -> &'static str {
        match self {
            Self::Log(_) | Self::Work(_) => "log",
            Self::Export(_) => "collector",
            Self::Cursor(_) => "cursor",
        }
    }
}

/// What the call streams of all databases share.
pub struct CallStreams {
    exporter: Option<SpanSender>,
    sampler: Sampler,
    state_dir: PathBuf,
    clock: Arc<dyn Clock>,
    /// Of the bundled module's database.
    since: watch::Sender<Since>,
}

/// One database to follow.
pub struct Database {
    pub name: String,
    pub identity: crate::ids::Identity,
    /// Is it the bundled module's?
    pub is_bundled: bool,
    /// Its log.
    pub dir: PathBuf,
}

impl CallStreams {
    /// # Errors
    /// When the configuration cannot be used.
    pub fn new(
        config: &TelemetryConfig,
        instance: &str,
        state_dir: &Path,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, OtlpError> {
        let resource = provider::resource(config, instance);
        let exporter = if config.calls { otlp::spans(config, &resource)? } else { None };
        let since = watch::Sender::new(if exporter.is_some() { Since::Unknown } else { Since::Time(i64::MAX) });
        Ok(Self { exporter, sampler: config.sampler(), state_dir: state_dir.to_owned(), clock, since })
    }

    /// Since when the bundled module's calls are sent from its log.
    pub fn since(&self) -> watch::Receiver<Since> {
        self.since.subscribe()
    }

    /// The databases were looked at, and the bundled module's is not among them; or its log cannot be read.
    pub fn has_no_bundled(&self) {
        self.since.send_if_modified(|since| {
            let unknown = *since == Since::Unknown;
            if unknown {
                *since = Since::Time(i64::MAX);
            }
            unknown
        });
    }

    /// Sends a database's calls until told to stop, if anybody wants them.
    pub async fn follow(self: Arc<Self>, database: Database, stop: CancellationToken) {
        let Some(exporter) = &self.exporter else { return };
        let label = KeyValue::new("database", database.name.clone());
        for kind in ERROR_KINDS {
            metrics::CALL_ERRORS.add(0, &[label.clone(), KeyValue::new("kind", kind)]);
        }
        let file = CursorFile::new(&self.state_dir, "calls", &database.identity.to_string());
        let mut counted = Counted { label: label.clone(), seen: HashSet::new() };
        let backoff = patience(Duration::from_millis(200));
        let mut delays = backoff.build();
        loop {
            let before = file.read().map(|cursor| cursor.sequence);
            let result = self.send(exporter, &database, &file, &mut counted, &stop).await;
            if stop.is_cancelled() {
                return;
            }
            let Err(error) = result else { continue };
            if database.is_bundled && !matches!(error, CallError::Export(_)) {
                // A log that cannot be read must not hold up the events.
                self.has_no_bundled();
            }
            if file.read().map(|cursor| cursor.sequence) > before {
                delays = backoff.build();
            }
            metrics::CALL_ERRORS.add(1, &[label.clone(), KeyValue::new("kind", error.kind())]);
            let delay = delays.next().unwrap_or(Duration::from_secs(15));
            tracing::warn!(database = %database.name, %error, ?delay, "the call stream waits; calls stay in the log and are sent later");
            tokio::select! {
                () = self.clock.sleep(delay) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    /// Sends calls until told to stop, until something fails, or until the log is to be opened anew.
    async fn send(
        &self,
        exporter: &SpanSender,
        database: &Database,
        file: &CursorFile,
        counted: &mut Counted,
        stop: &CancellationToken,
    ) -> Result<(), CallError> {
        let known = file.read().unwrap_or_default();
        let composer = Composer::new(database.name.clone());
        let (dir, is_bundled, sampler) = (database.dir.clone(), database.is_bundled, self.sampler.clone());
        let open = move || CallReader::open(&dir, known, composer, is_bundled, sampler);
        let (reader, mut cursor) = blocking(open).await??;
        if database.is_bundled {
            self.since.send_replace(cursor.since.map_or(Since::Unknown, Since::Time));
        }
        let result = tokio::select! {
            result = self.send_from(reader, &mut cursor, exporter, database, file, counted) => result,
            () = stop.cancelled() => Ok(()),
        };
        file.write(&cursor)?;
        result
    }

    async fn send_from(
        &self,
        mut reader: CallReader,
        cursor: &mut Cursor,
        exporter: &SpanSender,
        database: &Database,
        file: &CursorFile,
        counted: &mut Counted,
    ) -> Result<(), CallError> {
        let (mut kept, mut kept_at) = (Stopwatch::start(), cursor.sequence);
        loop {
            let read = move || reader.next().map(|calls| (reader, calls));
            let (back, calls) = blocking(read).await??;
            reader = back;
            match calls {
                Calls::Anew => {
                    self.clock.sleep(POLL).await;
                    return Ok(());
                }
                Calls::None => {
                    if database.is_bundled && cursor.since.is_none() {
                        // No call is in the log: those to come are younger than this.
                        self.since.send_replace(Since::Time(self.clock.now().as_microsecond()));
                    }
                    self.clock.sleep(POLL).await;
                }
                Calls::Some(mut batch) => {
                    if cursor.since.is_none() {
                        cursor.since = batch.first_micros;
                        if let Some(micros) = cursor.since.filter(|_| database.is_bundled) {
                            self.since.send_replace(Since::Time(micros));
                        }
                    }
                    if !batch.spans.is_empty() {
                        let sent = exporter.send(batch.spans).await?;
                        less_rejected(&mut batch.reducers, sent.rejected);
                    }
                    counted.count(batch.reducers);
                    cursor.advance(batch.next, &batch.last_commit);
                }
            }
            if cursor.sequence != kept_at && kept.elapsed_seconds() >= KEEP_INTERVAL {
                file.write(cursor)?;
                (kept, kept_at) = (Stopwatch::start(), cursor.sequence);
            }
        }
    }
}

/// Reducers that are counted under their own name.
struct Counted {
    label: KeyValue,
    seen: HashSet<String>,
}

impl Counted {
    fn count(&mut self, reducers: Vec<(String, u64)>) {
        for (reducer, n) in reducers {
            let known = self.seen.contains(&reducer) || self.seen.len() < REDUCERS && self.seen.insert(reducer.clone());
            let reducer = if known { reducer } else { "other".to_owned() };
            metrics::CALLS.add(n, &[self.label.clone(), KeyValue::new("reducer", reducer)]);
        }
    }
}
