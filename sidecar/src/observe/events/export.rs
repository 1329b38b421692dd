//! Sends events to the collector and says whether it took them.

use std::collections::HashSet;

use opentelemetry::KeyValue;
use opentelemetry::logs::Severity;
use opentelemetry_otlp::SpanExporter;
use opentelemetry_sdk::error::OTelSdkError;
use opentelemetry_sdk::trace::{SamplingDecision, ShouldSample as _, SpanExporter as _};
use parking_lot::Mutex;

use crate::config::TelemetryConfig;
use crate::module_bindings::{EventData, EventLog};
use crate::observe::events::span::{EventIds, Spans, describe};
use crate::observe::otlp::{self, OtlpError, Signal};
use crate::observe::records::{Record, Records};
use crate::observe::{metrics, provider};

/// Event types that are counted under their own name; further ones are `other`.
const TYPES: usize = 50;

/// A collector that did not take what was sent.
#[derive(Debug, thiserror::Error)]
#[error("the collector did not take the {signal}: {source}; check that it runs, and telemetry.otlp_endpoint")]
pub struct ExportError {
    signal: &'static str,
    source: OTelSdkError,
}

/// The way to the collector.
pub struct Exporter {
    spans: Option<SpanExporter>,
    logs: Option<Records>,
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
        let mut spans = otlp::is_wanted(config, Signal::Traces).then(|| otlp::spans(config)).transpose()?;
        if let Some(spans) = &mut spans {
            spans.set_resource(&resource);
        }
        Ok(Self { spans, logs: Records::new(config, instance)?, sampler: config.sampler() })
    }

    /// Sends events in one request for each signal, both at once. Calls from before `calls_since` come along.
    ///
    /// # Errors
    /// When the collector does not take them all; then all are to be sent again.
    pub async fn send(&self, spans: &mut Spans, events: &[EventLog], calls_since: i64) -> Result<(), ExportError> {
        let failed = |signal| move |source| ExportError { signal, source };
        let composer = spans.composer().clone();
        let sending_spans = async {
            let Some(exporter) = &self.spans else { return Ok(()) };
            let (mut batch, mut last_call) = (Vec::with_capacity(events.len() * 2), None);
            for event in events {
                if self.is_sampled(event) {
                    spans.push(event, calls_since, &mut last_call, &mut batch);
                }
            }
            if batch.is_empty() { Ok(()) } else { exporter.export(batch).await.map_err(failed("spans")) }
        };
        let sending_records = async {
            let Some(records) = &self.logs else { return Ok(()) };
            records.send(&composer, events.iter().map(log_record)).await.map_err(failed("log records"))
        };
        let (spans, records) = tokio::join!(sending_spans, sending_records);
        spans?;
        records?;
        count(events);
        Ok(())
    }

    /// All events of a trace or none: the decision follows from the trace's id alone.
    fn is_sampled(&self, event: &EventLog) -> bool {
        let trace = EventIds::of(event).trace;
        let kind = opentelemetry::trace::SpanKind::Internal;
        let result = self.sampler.should_sample(None, trace, "", &kind, &[], &[]);
        result.decision == SamplingDecision::RecordAndSample
    }
}

fn log_record(event: &EventLog) -> Record {
    let ids = EventIds::of(event);
    Record {
        time_micros: event.timestamp.to_micros_since_unix_epoch(),
        severity: Severity::Info,
        body: body(event),
        event_name: event.event_type.clone(),
        within: Some((ids.trace, ids.event)),
        attributes: describe(event),
    }
}

fn body(event: &EventLog) -> String {
    match &event.data {
        EventData::Text(text) => format!("{}: {text}", event.event_type),
        EventData::Change(change) => format!("{}: {} version {}", event.event_type, change.subject_id, change.version),
        _ => event.event_type.clone(),
    }
}

fn count(events: &[EventLog]) {
    let mut by_type: std::collections::BTreeMap<&str, u64> = std::collections::BTreeMap::new();
    let mut seen = TYPES_SEEN.lock();
    let seen = seen.get_or_insert_default();
    for event in events {
        let known = seen.contains(&event.event_type) || seen.len() < TYPES && seen.insert(event.event_type.clone());
        *by_type.entry(if known { &event.event_type } else { "other" }).or_default() += 1;
    }
    for (event_type, n) in by_type {
        metrics::EVENTS.add(n, &[KeyValue::new("event_type", event_type.to_owned())]);
    }
}
