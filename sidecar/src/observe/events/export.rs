//! Sends events to the collector and says whether it took them.

use std::collections::HashSet;

use opentelemetry::KeyValue;
use opentelemetry::logs::{AnyValue, LogRecord as _, Logger as _, LoggerProvider as _, Severity};
use opentelemetry::trace::TraceFlags;
use opentelemetry_otlp::{LogExporter, SpanExporter};
use opentelemetry_sdk::error::OTelSdkError;
use opentelemetry_sdk::logs::{LogBatch, LogExporter as _, SdkLogger, SdkLoggerProvider};
use opentelemetry_sdk::trace::{SamplingDecision, ShouldSample as _, SpanExporter as _};
use parking_lot::Mutex;

use crate::config::TelemetryConfig;
use crate::module_bindings::{EventData, EventLog};
use crate::observe::events::span::{EventIds, Spans, describe, time_of};
use crate::observe::otlp::{self, OtlpError, Signal};
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
    logs: Option<LogExporter>,
    /// Makes empty log records; it exports nothing.
    blank: SdkLogger,
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
        let mut logs = otlp::is_wanted(config, Signal::Logs).then(|| otlp::logs(config)).transpose()?;
        if let Some(spans) = &mut spans {
            spans.set_resource(&resource);
        }
        if let Some(logs) = &mut logs {
            logs.set_resource(&resource);
        }
        let blank = SdkLoggerProvider::builder().build().logger(metrics::SCOPE);
        Ok(Self { spans, logs, blank, sampler: config.sampler() })
    }

    /// Sends events in one request for each signal.
    ///
    /// # Errors
    /// When the collector does not take them all; then all are to be sent again.
    pub async fn send(&self, spans: &mut Spans, events: &[EventLog]) -> Result<(), ExportError> {
        let failed = |signal| move |source| ExportError { signal, source };
        if let Some(exporter) = &self.spans {
            let (mut batch, mut last_call) = (Vec::with_capacity(events.len() * 2), None);
            for event in events {
                if self.is_sampled(event) {
                    spans.push(event, &mut last_call, &mut batch);
                }
            }
            if !batch.is_empty() {
                exporter.export(batch).await.map_err(failed("spans"))?;
            }
        }
        if let Some(exporter) = &self.logs {
            let records: Vec<_> = events.iter().map(|event| self.log_record(spans.database(), event)).collect();
            let batch: Vec<_> = records.iter().map(|record| (record, spans.scope())).collect();
            exporter.export(LogBatch::new(&batch)).await.map_err(failed("log records"))?;
        }
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

    fn log_record(&self, database: &str, event: &EventLog) -> opentelemetry_sdk::logs::SdkLogRecord {
        let ids = EventIds::of(event);
        let mut record = self.blank.create_log_record();
        record.set_timestamp(time_of(event));
        record.set_observed_timestamp(time_of(event));
        record.set_severity_number(Severity::Info);
        record.set_severity_text("INFO");
        record.set_body(AnyValue::from(body(event)));
        record.set_trace_context(ids.trace, ids.event, Some(TraceFlags::SAMPLED));
        record.add_attribute("db.system.name", "spacetimedb");
        record.add_attribute("db.namespace", database.to_owned());
        record.add_attribute("event.name", event.event_type.clone());
        for KeyValue { key, value, .. } in describe(event) {
            record.add_attribute(key, AnyValue::from(value.as_str().into_owned()));
        }
        record
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
