//! Sends events to the collector and says whether it took them.

use std::collections::HashSet;
use std::sync::Arc;

use opentelemetry::KeyValue;
use opentelemetry::logs::Severity;
use opentelemetry_sdk::trace::{SamplingDecision, ShouldSample as _};
use parking_lot::Mutex;
use tokio::task::JoinSet;

use crate::config::TelemetryConfig;
use crate::module_bindings::{EventData, EventLog};
use crate::observe::composed::cut;
use crate::observe::events::span::{EVENT_TEXT, EventIds, Spans, describe};
use crate::observe::otlp::{self, OtlpError, SendError, Signal, SpanSender, less_rejected};
use crate::observe::records::{Record, Records};
use crate::observe::{metrics, provider};

/// Event types that are counted under their own name; further ones are `other`.
const TYPES: usize = 50;

/// A collector that did not take what was sent.
#[derive(Debug, thiserror::Error)]
#[error("the {signal} were not sent: {source}")]
pub struct ExportError {
    signal: &'static str,
    source: SendError,
}

/// The way to the collector.
pub struct Exporter {
    spans: Option<Arc<SpanSender>>,
    logs: Option<Arc<Records>>,
    sampler: opentelemetry_sdk::trace::Sampler,
}

static TYPES_SEEN: Mutex<Option<HashSet<String>>> = Mutex::new(None);

impl Exporter {
    /// Does anybody want events?
    pub fn is_wanted(config: &TelemetryConfig) -> bool {
        otlp::is_wanted(config, Signal::Traces) || otlp::is_wanted(config, Signal::Logs)
    }

    /// # Errors
    /// When the configuration cannot be used.
    pub fn new(config: &TelemetryConfig, instance: &str) -> Result<Self, OtlpError> {
        let resource = provider::resource(config, instance);
        let spans = otlp::spans(config, &resource)?;
        let logs = Records::new(config, instance)?.map(Arc::new);
        Ok(Self { spans: spans.map(Arc::new), logs, sampler: config.sampler() })
    }

    /// Sends events in one request for each signal, both at once. Calls from before `calls_since` come along.
    ///
    /// # Errors
    /// When the collector does not take them all; then all are to be sent again.
    pub async fn send(&self, spans: &mut Spans, events: &[EventLog], calls_since: i64) -> Result<(), ExportError> {
        let (mut batch, mut records, mut last_call) = (Vec::new(), Vec::new(), None);
        for event in events {
            let (ids, described) = (EventIds::of(event), describe(event));
            if self.logs.is_some() {
                records.push(log_record(event, &ids, described.clone()));
            }
            if self.spans.is_some() && self.is_sampled(&ids) {
                spans.push(event, (&ids, described), calls_since, &mut last_call, &mut batch);
            }
        }
        // Each on a task of its own: writing down a thousand of them takes a while. Dropped, the set ends them.
        let mut sending = JoinSet::new();
        if let Some(exporter) = self.spans.clone().filter(|_| !batch.is_empty()) {
            sending.spawn(async move { ("spans", exporter.send(batch).await) });
        }
        if let Some(exporter) = self.logs.clone() {
            let composer = spans.composer().clone();
            sending.spawn(async move { ("log records", exporter.send(&composer, records.into_iter()).await) });
        }
        // An event that either signal lacks was not sent.
        let mut rejected = 0;
        while let Some(sent) = sending.join_next().await {
            let (signal, result) = sent.unwrap_or_else(|error| ("events", Err(SendError::Worker(error.to_string()))));
            rejected = rejected.max(result.map_err(|source| ExportError { signal, source })?.rejected);
        }
        count(events, rejected);
        Ok(())
    }

    /// All events of a trace or none: the decision follows from the trace's id alone.
    fn is_sampled(&self, ids: &EventIds) -> bool {
        let kind = opentelemetry::trace::SpanKind::Internal;
        let result = self.sampler.should_sample(None, ids.trace, "", &kind, &[], &[]);
        result.decision == SamplingDecision::RecordAndSample
    }
}

fn log_record(event: &EventLog, ids: &EventIds, mut described: Vec<KeyValue>) -> Record {
    // The body has it already.
    described.retain(|attribute| attribute.key.as_str() != EVENT_TEXT);
    Record {
        time_micros: event.timestamp.to_micros_since_unix_epoch(),
        severity: Severity::Info,
        body: body(event),
        event_name: cut(&event.event_type).as_str().into_owned(),
        within: Some((ids.trace, ids.event)),
        attributes: described,
    }
}

fn body(event: &EventLog) -> String {
    let (name, cut) = (cut(&event.event_type), |text: &str| cut(text).as_str().into_owned());
    match &event.data {
        EventData::Text(text) => format!("{}: {}", name.as_str(), cut(text)),
        EventData::Change(change) => {
            format!("{}: {} version {}", name.as_str(), cut(&change.subject_id), change.version)
        }
        _ => name.as_str().into_owned(),
    }
}

fn count(events: &[EventLog], rejected: u64) {
    let mut by_type: std::collections::BTreeMap<&str, u64> = std::collections::BTreeMap::new();
    let mut seen = TYPES_SEEN.lock();
    let seen = seen.get_or_insert_default();
    for event in events {
        let known = seen.contains(&event.event_type) || seen.len() < TYPES && seen.insert(event.event_type.clone());
        *by_type.entry(if known { &event.event_type } else { "other" }).or_default() += 1;
    }
    let mut by_type: Vec<_> = by_type.into_iter().collect();
    less_rejected(&mut by_type, rejected);
    for (event_type, n) in by_type {
        metrics::EVENTS.add(n, &[KeyValue::new("event_type", event_type.to_owned())]);
    }
}
