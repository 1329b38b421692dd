//! What the bundled module keeps of itself besides events: its system status, measurements, and versions of state.
//!
//! Invariants: rows become log records in the order of their sequence and at least once; the cursor moves only after the
//! collector has taken what it passes; memory is bounded by one window of rows and by [`SERIES`] measurements.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use backon::BackoffBuilder;
use opentelemetry::KeyValue;
use opentelemetry::logs::Severity;
use tokio_util::sync::CancellationToken;

use crate::clock::{Clock, patience};
use crate::config::Config;
use crate::database::reader::{Part, Reader, Readers, Sequenced};
use crate::durable::FileError;
use crate::ids::Identity;
use crate::module_bindings::{Metric, StateVersion, SubjectKind, SystemState, SystemStatus, Value};
use crate::observe::composed::{CallIds, Composer, correlation_of_call, cut, int};
use crate::observe::cursor::{Cursor, CursorFile, continue_from};
use crate::observe::metrics::{self, Sample};
use crate::observe::otlp::{OtlpError, SendError};
use crate::observe::records::{Record, Records};
use crate::observe::server::SourceError;

/// How often the tables are looked at while the database is written to.
const POLL: Duration = Duration::from_secs(2);
/// How often the server's counts of rows are read.
const COUNT: Duration = Duration::from_secs(30);
/// Sequences that one query asks for: the server looks through the whole table for each.
const WINDOW: u64 = 10_000;
/// Measurements that are read again after a start, for the report.
const SEEN_AGAIN: u64 = 1000;
/// Series of measurements that are told as metrics; further ones are log records only.
const SERIES: usize = 500;
/// A label's value is cut after this.
const MAX_LABEL: usize = 128;

/// What can stop the stream for a while.
#[derive(Debug, thiserror::Error)]
enum ModuleError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Export(#[from] SendError),
    #[error(transparent)]
    Otlp(#[from] OtlpError),
    #[error(transparent)]
    Cursor(#[from] FileError),
    #[error("the table {0} is not as it was read, after a restore or a trim; it is compared anew")]
    Changed(&'static str),
}

/// What is known of the module.
#[derive(Debug, Default)]
struct Report {
    status: Option<SystemStatus>,
    /// The latest of each series.
    measurements: BTreeMap<Vec<(String, String)>, f64>,
}

impl Report {
    /// As values of gauges.
    fn samples(&self) -> Vec<Sample> {
        let mut found = Vec::new();
        if let Some(status) = &self.status {
            let mut plain = |metric: &metrics::Metric, value: f64| found.push(metric.sample(value, Vec::new()));
            let state = match status.status {
                SystemState::Initializing => 0.0,
                SystemState::Running => 1.0,
                SystemState::Degraded => 2.0,
            };
            plain(&metrics::MODULE_STATE, state);
            plain(&metrics::MODULE_UPTIME, status.uptime_seconds as f64);
            plain(&metrics::MODULE_ENTITIES, status.entity_count as f64);
            plain(&metrics::MODULE_RELATIONS, status.relation_count as f64);
            plain(&metrics::MODULE_EVENTS, status.event_count as f64);
            plain(&metrics::MODULE_CLIENTS, f64::from(status.connected_clients));
            plain(&metrics::MODULE_STATUS_TIME, status.updated_at.to_micros_since_unix_epoch() as f64 / 1e6);
        }
        for (labels, value) in &self.measurements {
            let labels = labels.iter().map(|(name, value)| KeyValue::new(name.clone(), value.clone())).collect();
            found.push(metrics::MODULE_METRIC.sample(*value, labels));
        }
        found
    }

    fn measure(&mut self, metric: &Metric) {
        let mut labels =
            vec![("metric".to_owned(), label_value(&metric.name)), ("unit".to_owned(), label_value(&metric.unit))];
        labels.extend(metric.labels.iter().map(|field| (label_name(&field.name), label_value(&text(&field.value)))));
        labels.sort();
        labels.dedup_by(|later, earlier| later.0 == earlier.0);
        if self.measurements.len() < SERIES || self.measurements.contains_key(&labels) {
            self.measurements.insert(labels, metric.value);
        }
    }
}

/// Follows the module for ever, if the configuration names its database; ends when told to. `written` says how far the
/// database's log is, so that an idle database is left alone; `tell` takes each new report.
pub async fn run(
    readers: &Readers,
    instance: &str,
    state_dir: &Path,
    clock: Arc<dyn Clock>,
    written: impl Fn() -> Option<u64>,
    tell: impl Fn(Vec<Sample>),
    stop: CancellationToken,
) {
    let config = readers.config();
    let Some(database) = &config.spacetimedb_config.database else { return };
    let backoff = patience(Duration::from_millis(500));
    let mut delays = backoff.build();
    let mut report = Report::default();
    let mut status_at = None;
    loop {
        let following = async {
            let source = readers.get(database)?;
            let records = Records::new(&config.telemetry, instance)?.filter(|_| config.telemetry.events);
            let composer = Composer::new(database.clone());
            let mut measurements = Stream::<Metric>::start(&source, state_dir, database, records.is_some()).await?;
            let mut versions = match &records {
                Some(_) => Some(Stream::<StateVersion>::start(&source, state_dir, database, true).await?),
                None => None,
            };
            let interval = config.telemetry.status_interval.0;
            let asks = !interval.is_zero();
            let interval = if asks { interval } else { COUNT };
            let mut seen = None;
            loop {
                let now = clock.now();
                let due = status_at.is_none_or(|at: jiff::Timestamp| now.duration_since(at).unsigned_abs() >= interval);
                if due {
                    status_at = Some(now);
                    report.status = None;
                    report.status = match asks {
                        true => ask_status(config, &source).await?,
                        false => count(&source, now).await?,
                    };
                    tell(report.samples());
                }
                let log = written();
                if log.is_none() || log != seen {
                    measurements.send(&source, records.as_ref(), &composer, |row| report.measure(row)).await?;
                    if let Some(versions) = &mut versions {
                        versions.send(&source, records.as_ref(), &composer, |_| {}).await?;
                    }
                    seen = log;
                    tell(report.samples());
                }
                delays = backoff.build();
                clock.sleep(POLL).await;
            }
        };
        let result: Result<std::convert::Infallible, ModuleError> = tokio::select! {
            result = following => result,
            () = stop.cancelled() => return,
        };
        let Err(error) = result;
        metrics::MODULE_ERRORS.add(1, &[]);
        // What nobody could ask is not told as if it were so.
        report.status = None;
        tell(report.samples());
        let delay = delays.next().unwrap_or(Duration::from_secs(15));
        tracing::warn!(%error, ?delay, "the module's tables are looked at again later");
        tokio::select! {
            () = clock.sleep(delay) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Has the module count, where we may, and reads what it says.
async fn ask_status(config: &Config, source: &Reader) -> Result<Option<SystemStatus>, ModuleError> {
    if config.spacetimedb_config.token_file.is_some() {
        match source.database().call("get_system_status").await {
            // Who may only read still sees what others asked for.
            Err(error @ SourceError::Refused { .. }) => {
                metrics::MODULE_ERRORS.add(1, &[]);
                tracing::warn!(%error, "the module was not asked for its status");
            }
            other => other?,
        }
    }
    Ok(source.all("system_status").await?.pop())
}

/// The status that the module wrote last, with its figures as they are now. Writes nothing.
async fn count(source: &Reader, now: jiff::Timestamp) -> Result<Option<SystemStatus>, ModuleError> {
    let Some(mut status) = source.all::<SystemStatus>("system_status").await?.pop() else { return Ok(None) };
    let identity = source.database().identity().await?.to_string();
    let sizes = source.database().table_sizes(&identity).await?;
    let age = now.as_microsecond().saturating_sub(status.updated_at.to_micros_since_unix_epoch());
    status.uptime_seconds += u64::try_from(age / 1_000_000).unwrap_or(0);
    // A server that has just started has not counted yet.
    let rows = |table: &str, known: u64| sizes.get(table).map_or(known, |size| size.rows);
    status.entity_count = rows("entity", status.entity_count);
    status.relation_count = rows("relation", status.relation_count);
    status.event_count = rows("event_log", status.event_count);
    let clients = rows("client_connection", status.connected_clients.into());
    status.connected_clients = u32::try_from(clients).unwrap_or(u32::MAX);
    Ok(Some(status))
}

/// A row that becomes a log record.
trait Recorded: Sequenced {
    fn record(&self) -> Record;
}

/// One table, from where it was sent to.
struct Stream<R> {
    cursor: Cursor,
    file: CursorFile,
    /// Rows from here on are read; those up to the cursor were sent before, and are read for the report alone.
    read: u64,
    /// Sequence and id of the row that was read last.
    newest: Option<(u64, String)>,
    /// Does anybody take the rows? If not, the cursor stays where it is.
    is_sent: bool,
    rows: std::marker::PhantomData<R>,
}

impl<R: Recorded> Stream<R> {
    async fn start(source: &Reader, state_dir: &Path, database: &str, is_sent: bool) -> Result<Self, ModuleError> {
        let file = CursorFile::new(state_dir, R::TABLE, database);
        let cursor = continue_from::<R>(source, file.read().unwrap_or_default()).await?;
        let mut read = cursor.sequence.saturating_sub(SEEN_AGAIN);
        if let Some(first) = source.first_after::<R>(read).await? {
            read = first - 1;
        }
        Ok(Self { cursor, file, read, newest: None, is_sent, rows: std::marker::PhantomData })
    }

    /// Reads what is new, to its end.
    async fn send(
        &mut self,
        source: &Reader,
        records: Option<&Records>,
        composer: &Composer,
        mut see: impl FnMut(&R),
    ) -> Result<(), ModuleError> {
        self.check_history(source).await?;
        loop {
            let until = self.read.saturating_add(WINDOW);
            let Part { rows, reached } = self.next_part(source, until).await?;
            let Some(last) = rows.last() else { return Ok(()) };
            rows.iter().for_each(&mut see);
            if let Some(records) = records.filter(|_| self.is_sent) {
                let sent = self.cursor.sequence;
                let new = rows.iter().filter(|row| row.sequence() > sent).map(R::record);
                records.send(composer, new).await?;
                if last.sequence() > sent {
                    self.cursor.advance(last.sequence(), &last.id());
                    self.file.write(&self.cursor)?;
                }
            }
            let is_last = reached >= until && last.sequence() < until;
            self.read = last.sequence();
            self.newest = Some((last.sequence(), last.id()));
            if is_last {
                return Ok(());
            }
        }
    }

    /// The next rows up to `until`; none when there are none.
    async fn next_part(&self, source: &Reader, until: u64) -> Result<Part<R>, SourceError> {
        let mut from = self.read;
        loop {
            let part = source.part(from, until).await?;
            if !part.rows.is_empty() || part.reached >= until {
                return Ok(part);
            }
            from = part.reached;
        }
    }

    /// Is the row that was read last still there? A restore under a running server's name puts others in its place.
    async fn check_history(&self, source: &Reader) -> Result<(), ModuleError> {
        let Some((sequence, id)) = &self.newest else { return Ok(()) };
        match source.at::<R>(*sequence).await? {
            Some(row) if row.id() == *id => Ok(()),
            _ => Err(ModuleError::Changed(R::TABLE)),
        }
    }
}

impl Recorded for Metric {
    fn record(&self) -> Record {
        let mut attributes = vec![
            KeyValue::new("inner_universe.metric.id", int(self.metric_id)),
            KeyValue::new("inner_universe.metric.name", cut(&self.name)),
            KeyValue::new("inner_universe.metric.value", self.value),
            KeyValue::new("inner_universe.metric.unit", cut(&self.unit)),
        ];
        attributes.extend(self.labels.iter().map(|field| {
            KeyValue::new(
                format!("inner_universe.metric.label.{}", cut(&field.name).as_str()),
                cut(&text(&field.value)),
            )
        }));
        Record {
            time_micros: self.timestamp.to_micros_since_unix_epoch(),
            severity: Severity::Info,
            body: format!("{} = {} {}", self.name, self.value, self.unit),
            event_name: "metric".into(),
            within: None,
            attributes,
        }
    }
}

impl Recorded for StateVersion {
    fn record(&self) -> Record {
        let time_micros = self.timestamp.to_micros_since_unix_epoch();
        let author = Identity::from_le(self.changed_by.to_byte_array());
        let ids = CallIds::of(&correlation_of_call(time_micros, &author), time_micros);
        let kind = if matches!(self.subject, SubjectKind::Entity) { "entity" } else { "relation" };
        let operation = format!("{:?}", self.operation).to_lowercase();
        let mut attributes = vec![
            KeyValue::new("inner_universe.state_version.id", int(self.version_id)),
            KeyValue::new("inner_universe.subject.kind", kind),
            KeyValue::new("inner_universe.subject.id", cut(&self.subject_id)),
            KeyValue::new("inner_universe.subject.type", cut(&self.subject_type)),
            KeyValue::new("inner_universe.subject.version", int(self.version)),
            KeyValue::new("inner_universe.subject.operation", operation.clone()),
            KeyValue::new("inner_universe.subject.data", cut(&self.data)),
            KeyValue::new("inner_universe.caller.identity", author.to_string()),
        ];
        let ends =
            [("inner_universe.relation.from", &self.from_entity), ("inner_universe.relation.to", &self.to_entity)];
        attributes.extend(ends.into_iter().filter_map(|(name, end)| Some(KeyValue::new(name, cut(end.as_ref()?)))));
        Record {
            time_micros,
            severity: Severity::Info,
            body: format!("{kind} {} version {}: {operation}", self.subject_id, self.version),
            event_name: "state_version".into(),
            within: Some((ids.trace, ids.call)),
            attributes,
        }
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::Bool(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::UInt(value) => value.to_string(),
        Value::Float(value) => value.to_string(),
        Value::String(text) => text.clone(),
        Value::Bytes(bytes) => format!("{} bytes", bytes.len()),
    }
}

/// A measurement's own label: its prefix keeps it from taking another label's place.
fn label_name(name: &str) -> String {
    let plain = name.chars().take(MAX_LABEL).map(|c| if c.is_ascii_alphanumeric() { c } else { '_' });
    format!("label_{}", plain.collect::<String>())
}

fn label_value(text: &str) -> String {
    text.chars().take(MAX_LABEL).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::module_bindings::Field;

    fn metric(name: &str, value: f64, labels: &[(&str, &str)]) -> Metric {
        let field =
            |(name, value): &(&str, &str)| Field { name: (*name).into(), value: Value::String((*value).into()) };
        Metric {
            metric_id: 1,
            name: name.into(),
            value,
            unit: "ms".into(),
            labels: labels.iter().map(field).collect(),
            timestamp: spacetimedb_sdk::Timestamp::from_micros_since_unix_epoch(0),
        }
    }

    #[test]
    fn series_are_told_apart_by_their_labels_and_stay_few() {
        let mut report = Report::default();
        report.measure(&metric("latency", 1.0, &[("zone", "a"), ("zone", "b")]));
        report.measure(&metric("latency", 2.0, &[("zone", "a")]));
        report.measure(&metric("latency", 3.0, &[("unit", "x")]));
        let values: Vec<f64> = report.samples().iter().map(|sample| sample.value).collect();
        assert_eq!(values, [3.0, 2.0]);
        for n in 0..2 * SERIES {
            report.measure(&metric(&n.to_string(), 1.0, &[]));
        }
        assert_eq!(report.measurements.len(), SERIES);
        report.measure(&metric("latency", 4.0, &[("zone", "a")]));
        assert!(report.measurements.values().any(|value| *value == 4.0), "known series go on");
    }
}
