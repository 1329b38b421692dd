//! Log records composed from what databases recorded, and whether the collector took them.

use opentelemetry::logs::{AnyValue, LogRecord as _, Logger as _, LoggerProvider as _, Severity};
use opentelemetry::trace::{SpanId, TraceFlags, TraceId};
use opentelemetry::{KeyValue, Value};
use opentelemetry_sdk::logs::{LogBatch, SdkLogRecord, SdkLogger, SdkLoggerProvider};

use crate::config::TelemetryConfig;
use crate::observe::composed::{Composer, time_of};
use crate::observe::otlp::{self, LogSender, OtlpError, SendError, Sent};
use crate::observe::{metrics, provider};

/// About so much goes into one request: collectors take 4 MiB by default.
pub const REQUEST_BYTES: usize = 1 << 20;

impl Record {
    /// About how many bytes it comes to.
    fn size(&self) -> usize {
        let of = |attribute: &KeyValue| attribute.key.as_str().len() + size_of_value(&attribute.value) + 16;
        200 + self.body.len() + self.event_name.len() + self.attributes.iter().map(of).sum::<usize>()
    }
}

/// About how many bytes a value comes to.
pub fn size_of_value(value: &Value) -> usize {
    if let Value::String(text) = value { text.as_str().len() } else { 8 }
}

/// The way to a collector of log records.
pub struct Records {
    exporter: LogSender,
    /// Makes empty log records; it exports nothing.
    blank: SdkLogger,
}

/// What a log record says.
pub struct Record {
    pub time_micros: i64,
    pub severity: Severity,
    pub body: String,
    pub event_name: String,
    pub within: Option<(TraceId, SpanId)>,
    pub attributes: Vec<KeyValue>,
}

impl Records {
    /// `None` when nobody wants log records.
    ///
    /// # Errors
    /// When the configuration cannot be used.
    pub fn new(config: &TelemetryConfig, instance: &str) -> Result<Option<Self>, OtlpError> {
        let Some(exporter) = otlp::logs(config, &provider::resource(config, instance))? else { return Ok(None) };
        let blank = SdkLoggerProvider::builder().build().logger(metrics::SCOPE);
        Ok(Some(Self { exporter, blank }))
    }

    /// Sends records about one database, in as many requests as they need.
    ///
    /// # Errors
    /// When the collector does not take them all; then all are to be sent again.
    pub async fn send(&self, composer: &Composer, records: impl Iterator<Item = Record>) -> Result<Sent, SendError> {
        let (mut batch, mut size, mut sent) = (Vec::new(), 0, Sent::default());
        for record in records {
            size += record.size();
            batch.push(self.compose(composer, record));
            if size >= REQUEST_BYTES {
                sent.rejected += self.export(composer, &batch).await?.rejected;
                (batch, size) = (Vec::new(), 0);
            }
        }
        if !batch.is_empty() {
            sent.rejected += self.export(composer, &batch).await?.rejected;
        }
        Ok(sent)
    }

    async fn export(&self, composer: &Composer, records: &[SdkLogRecord]) -> Result<Sent, SendError> {
        let batch: Vec<_> = records.iter().map(|record| (record, composer.scope())).collect();
        self.exporter.send(&LogBatch::new(&batch)).await
    }

    fn compose(&self, composer: &Composer, from: Record) -> SdkLogRecord {
        let mut record = self.blank.create_log_record();
        let at = time_of(from.time_micros);
        record.set_timestamp(at);
        record.set_observed_timestamp(at);
        record.set_severity_number(from.severity);
        record.set_severity_text(from.severity.name());
        record.set_body(AnyValue::from(from.body));
        if let Some((trace, span)) = from.within {
            record.set_trace_context(trace, span, Some(TraceFlags::SAMPLED));
        }
        record.add_attribute("db.system.name", "spacetimedb");
        record.add_attribute("db.namespace", AnyValue::String(composer.namespace()));
        record.add_attribute("event.name", from.event_name);
        for KeyValue { key, value, .. } in from.attributes {
            let value = match value {
                Value::Bool(value) => AnyValue::Boolean(value),
                Value::I64(value) => AnyValue::Int(value),
                Value::F64(value) => AnyValue::Double(value),
                Value::String(text) => AnyValue::String(text),
                other => AnyValue::from(other.as_str().into_owned()),
            };
            record.add_attribute(key, value);
        }
        record
    }
}
