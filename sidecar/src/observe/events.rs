//! The bundled module's events as OpenTelemetry: every event of `event_log` becomes a span, a log record and a count.
//!
//! Invariants: events leave in the order of their sequence and at least once; the cursor moves only after the collector has
//! taken what it passes; a repetition carries the same ids; memory is bounded by one window of rows, whatever the backlog
//! and however long the collector is out. The table itself is the queue.

pub mod export;
pub mod source;
pub mod span;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use backon::BackoffBuilder;
use opentelemetry::KeyValue;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, Stopwatch, patience};
use crate::config::Config;
use crate::database::reader::{Part, Reader, Readers};
use crate::durable::FileError;
use crate::module_bindings::{EventData, EventLog, Value};
use crate::observe::calls::Since;
use crate::observe::cursor::{Cursor, CursorFile, continue_from};
use crate::observe::events::export::{ExportError, Exporter};
use crate::observe::events::source::Live;
use crate::observe::events::span::Spans;
use crate::observe::metrics;
use crate::observe::otlp::OtlpError;
use crate::observe::records::REQUEST_BYTES;
use crate::observe::server::SourceError;

/// Sequences that one query asks for: large enough to be fast, small enough for the server and for us.
const WINDOW: u64 = 10_000;
/// Events that go to the collector at once.
const BATCH: usize = 1000;
/// The cursor is kept so often; what was sent after it is sent again after a crash.
const KEEP_INTERVAL: f64 = 0.25;
/// A live subscription is renewed after this many rows, since the SDK keeps each of them.
const LIVE_ROWS: u64 = 5_000;
/// Rows of one transaction come in any order; a missing one is waited for so long.
const REORDER: Duration = Duration::from_millis(200);

/// What can stop the stream for a while.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error(transparent)]
    Otlp(#[from] OtlpError),
    #[error(transparent)]
    Cursor(#[from] FileError),
}

impl EventError {
    fn kind(&self) -> &'static str {
        match self {
            Self::Source(_) => "source",
            Self::Export(_) | Self::Otlp(_) => "collector",
            Self::Cursor(_) => "cursor",
        }
    }
}

/// Streams events for ever, if the configuration names a database and a collector; ends when told to.
///
/// Begins when `calls` says which of the events' calls are sent from the log.
pub async fn run(
    readers: &Readers,
    instance: &str,
    state_dir: &Path,
    calls: watch::Receiver<Since>,
    clock: Arc<dyn Clock>,
    stop: CancellationToken,
) {
    let config = readers.config();
    let Some(database) = &config.spacetimedb_config.database else { return };
    if !config.telemetry.events || !Exporter::is_wanted(&config.telemetry) {
        return;
    }
    for kind in ["source", "collector", "cursor"] {
        metrics::EVENT_ERRORS.add(0, &[KeyValue::new("kind", kind)]);
    }
    let backoff = patience(Duration::from_millis(200));
    let mut delays = backoff.build();
    let file = CursorFile::new(state_dir, "events", database);
    // Kept over errors, so that links between events survive an outage.
    let mut spans = Spans::new(database.clone());
    loop {
        let before = file.read().map(|cursor| cursor.sequence);
        let streaming = async {
            let (calls, clock) = (calls.clone(), Arc::clone(&clock));
            let starting = Stream::start(config, readers.get(database)?, instance, &file, &mut spans, calls, clock);
            let mut stream = tokio::select! {
                started = starting => started?,
                () = stop.cancelled() => return Ok(()),
            };
            stream.follow(&stop).await
        };
        let error = match streaming.await {
            Ok(()) => return,
            Err(error) => error,
        };
        if file.read().map(|cursor| cursor.sequence) > before {
            delays = backoff.build();
        }
        metrics::EVENT_ERRORS.add(1, &[KeyValue::new("kind", error.kind())]);
        let delay = delays.next().unwrap_or(Duration::from_secs(15));
        tracing::warn!(%error, ?delay, "the event stream waits; events stay in the database and are sent later");
        tokio::select! {
            () = clock.sleep(delay) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// One run of the stream, until something fails.
struct Stream<'a> {
    source: Reader,
    exporter: Exporter,
    spans: &'a mut Spans,
    cursor: Cursor,
    file: &'a CursorFile,
    calls: watch::Receiver<Since>,
    kept: Stopwatch,
    /// The collector has taken something since the start.
    is_taken: bool,
    clock: Arc<dyn Clock>,
}

impl<'a> Stream<'a> {
    async fn start(
        config: &Config,
        source: Reader,
        instance: &str,
        file: &'a CursorFile,
        spans: &'a mut Spans,
        calls: watch::Receiver<Since>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, EventError> {
        let exporter = Exporter::new(&config.telemetry, instance)?;
        let known = file.read().unwrap_or_default();
        let cursor = continue_from::<EventLog>(&source, known).await?;
        if spans.is_fresh() {
            // The next event of an entity links to one that an earlier process sent.
            let mut from = cursor.sequence.saturating_sub(WINDOW);
            while from < cursor.sequence {
                match source.part::<EventLog>(from, cursor.sequence).await {
                    Ok(Part { rows, reached }) => {
                        rows.iter().for_each(|event| spans.remember(event));
                        from = reached;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the next events have no links to those before");
                        break;
                    }
                }
            }
        }
        Ok(Self { source, exporter, spans, cursor, file, calls, kept: Stopwatch::start(), is_taken: false, clock })
    }

    async fn follow(&mut self, stop: &CancellationToken) -> Result<(), EventError> {
        let done = async {
            loop {
                self.catch_up().await?;
                self.live().await?;
            }
        };
        let result = tokio::select! {
            result = done => result,
            () = stop.cancelled() => Ok(()),
        };
        self.file.write(&self.cursor)?;
        result
    }

    /// Reads what is behind in ranges of the sequence, the next one while one is sent, until a range is not full.
    async fn catch_up(&mut self) -> Result<(), EventError> {
        let source = self.source.clone();
        let range = |after: u64| source.part::<EventLog>(after, after.saturating_add(WINDOW));
        let mut after = self.cursor.sequence;
        let Part { rows: mut events, mut reached } = range(after).await?;
        loop {
            let Some(last) = events.last().map(|event| event.sequence) else {
                // Nothing here; the log may have been trimmed past this window.
                let Some(next) = source.first_after::<EventLog>(after).await? else { return Ok(()) };
                if next > after.saturating_add(1) {
                    after = next - 1;
                    self.cursor.skip_to(after);
                }
                Part { rows: events, reached } = range(after).await?;
                continue;
            };
            if reached == after.saturating_add(WINDOW) && last < after.saturating_add(WINDOW / 2) {
                return self.send(events).await;
            }
            if self.is_taken {
                let (sent, following) = tokio::join!(self.send(events), range(last));
                sent?;
                after = last;
                Part { rows: events, reached } = following?;
            } else {
                // Nothing is read ahead for a collector that may be out.
                self.send(events).await?;
                after = last;
                Part { rows: events, reached } = range(last).await?;
            }
        }
    }

    /// Follows a subscription, until it breaks or something is missing from it.
    async fn live(&mut self) -> Result<(), EventError> {
        let mut live = Live::start(self.source.database(), self.cursor.sequence).await?;
        // What was written between the last query and the subscription comes with the subscription.
        let mut waiting: Vec<EventLog> = Vec::new();
        let mut received = 0;
        loop {
            match live.next(BATCH, &mut waiting).await? {
                source::Received::Some => {}
                source::Received::Overflow => {
                    tracing::debug!("events come faster than they are sent; they are read in ranges");
                    return Ok(());
                }
            }
            if !self.take_in_order(&mut waiting, &mut live).await? {
                return Ok(());
            }
            received += waiting.len() as u64;
            self.send(std::mem::take(&mut waiting)).await?;
            if received >= LIVE_ROWS {
                live.renew(self.cursor.sequence)?;
                received = 0;
            }
        }
    }

    /// Sorts what has come, and waits a moment for what is missing between. `false` when it does not come.
    async fn take_in_order(&self, waiting: &mut Vec<EventLog>, live: &mut Live) -> Result<bool, EventError> {
        let whole = |waiting: &mut Vec<EventLog>| {
            waiting.retain(|event| event.sequence > self.cursor.sequence);
            waiting.sort_by_key(|event| event.sequence);
            waiting.dedup_by_key(|event| event.sequence);
            let next = self.cursor.sequence + 1;
            waiting.iter().zip(next..).all(|(event, expected)| event.sequence == expected)
        };
        if whole(waiting) {
            return Ok(true);
        }
        let mut late = std::pin::pin!(self.clock.sleep(REORDER));
        loop {
            tokio::select! {
                received = live.next(BATCH, waiting) => {
                    if matches!(received?, source::Received::Overflow) {
                        return Ok(false);
                    }
                    if whole(waiting) {
                        return Ok(true);
                    }
                }
                () = &mut late => return Ok(false),
            }
        }
    }

    /// From when on the log tells of calls; waits until that is known.
    async fn calls_since(&mut self) -> i64 {
        match self.calls.wait_for(|since| *since != Since::Unknown).await.as_deref() {
            Ok(Since::Time(micros)) => *micros,
            // Whoever reads logs has ended; so do we, soon.
            Ok(Since::Unknown) | Err(_) => i64::MAX,
        }
    }

    /// Sends events in order, batch by batch, and moves the cursor behind each batch that was taken.
    async fn send(&mut self, events: Vec<EventLog>) -> Result<(), EventError> {
        let mut rest = events.as_slice();
        while !rest.is_empty() {
            let (batch, following) = rest.split_at(fitting(rest));
            rest = following;
            let Some(last) = batch.last() else { continue };
            let calls_since = self.calls_since().await;
            self.exporter.send(self.spans, batch, calls_since).await?;
            self.is_taken = true;
            let now = self.clock.now().as_microsecond();
            let late = now.saturating_sub(last.timestamp.to_micros_since_unix_epoch()).max(0);
            metrics::EVENT_DELAY.record(Duration::from_micros(late.unsigned_abs()).as_secs_f64(), &[]);
            self.cursor.advance(last.sequence, &last.event_id);
            if self.kept.elapsed_seconds() >= KEEP_INTERVAL {
                self.file.write(&self.cursor)?;
                self.kept = Stopwatch::start();
            }
        }
        self.file.write(&self.cursor)?;
        Ok(())
    }
}

/// How many events make one batch: at most [`BATCH`], at most about a request's worth of bytes, and at least one.
fn fitting(events: &[EventLog]) -> usize {
    let mut bytes = 0;
    let fit = events.iter().take(BATCH).take_while(|event| {
        bytes += event_size(event);
        bytes <= REQUEST_BYTES
    });
    fit.count().max(1)
}

/// About how many bytes an event comes to as a span; texts are cut there.
fn event_size(event: &EventLog) -> usize {
    let texts = match &event.data {
        EventData::Empty => 0,
        EventData::Text(text) => text.len().min(4096),
        EventData::Change(change) => change.subject_id.len().min(4096),
        EventData::Custom(fields) => fields.iter().map(|field| field.name.len() + 64 + field_size(&field.value)).sum(),
    };
    300 + texts + event.event_type.len() + event.correlation_id.len()
}

fn field_size(value: &Value) -> usize {
    if let Value::String(text) = value { text.len().min(4096) } else { 8 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_bounded_by_events_and_by_bytes_and_never_empty() {
        let event = |text: usize| EventLog {
            sequence: 1,
            event_id: "id".into(),
            event_type: "x".repeat(text),
            source: None,
            timestamp: spacetimedb_sdk::Timestamp::from_micros_since_unix_epoch(0),
            correlation_id: "c".into(),
            data: EventData::Empty,
        };
        assert_eq!(fitting(&vec![event(1); 2 * BATCH]), BATCH);
        assert_eq!(fitting(&vec![event(1); 3]), 3);
        let fit = fitting(&vec![event(10_000); BATCH]);
        assert!((90..=REQUEST_BYTES / 10_000).contains(&fit), "{fit}");
        assert_eq!(fitting(&[event(2 * REQUEST_BYTES), event(1)]), 1);
    }
}
