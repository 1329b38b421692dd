//! What is sent of each signal; and the same for the OpenTelemetry SDK, which sends our own spans, log records and metrics.

use std::time::Duration;

use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
use opentelemetry_proto::tonic::collector::metrics::v1::ExportMetricsServiceRequest;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::transform::common::tonic::ResourceAttributesWithSchema;
use opentelemetry_proto::transform::logs::tonic::group_logs_by_resource_and_scope;
use opentelemetry_proto::transform::trace::tonic::group_spans_by_resource_and_scope;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::{OTelSdkError, OTelSdkResult};
use opentelemetry_sdk::logs::{LogBatch, LogExporter};
use opentelemetry_sdk::metrics::Temporality;
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};

use crate::observe::otlp::sender::{SendError, Sender, Sent};

/// Sends spans.
pub struct SpanSender {
    pub(super) sender: Sender,
    pub(super) resource: ResourceAttributesWithSchema,
}

/// Sends log records.
pub struct LogSender {
    pub(super) sender: Sender,
    pub(super) resource: ResourceAttributesWithSchema,
}

/// Sends metrics.
pub struct MetricSender {
    pub(super) sender: Sender,
    pub(super) temporality: Temporality,
}

impl SpanSender {
    /// # Errors
    /// When all are to be sent again.
    pub async fn send(&self, spans: Vec<SpanData>) -> Result<Sent, SendError> {
        let resource_spans = group_spans_by_resource_and_scope(spans, &self.resource);
        self.sender.send(ExportTraceServiceRequest { resource_spans }).await
    }
}

impl LogSender {
    /// # Errors
    /// When all are to be sent again.
    pub async fn send(&self, records: &LogBatch<'_>) -> Result<Sent, SendError> {
        let resource_logs = group_logs_by_resource_and_scope(records, &self.resource);
        self.sender.send(ExportLogsServiceRequest { resource_logs }).await
    }
}

/// The SDK logs what it is told; what was rejected was counted.
fn of_sdk(sent: Result<Sent, SendError>) -> OTelSdkResult {
    sent.map(drop).map_err(|error| OTelSdkError::InternalFailure(error.to_string()))
}

macro_rules! debug {
    ($($sender:ident),+) => {
        $(impl std::fmt::Debug for $sender {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(stringify!($sender))
            }
        })+
    };
}
debug!(SpanSender, LogSender, MetricSender);

impl SpanExporter for SpanSender {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        of_sdk(self.send(batch).await)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.resource = resource.into();
    }
}

impl LogExporter for LogSender {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        of_sdk(self.send(&batch).await)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.resource = resource.into();
    }
}

impl PushMetricExporter for MetricSender {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        let request: ExportMetricsServiceRequest = metrics.into();
        of_sdk(self.sender.send(request).await)
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _timeout: Duration) -> OTelSdkResult {
        Ok(())
    }

    fn temporality(&self) -> Temporality {
        self.temporality
    }
}
