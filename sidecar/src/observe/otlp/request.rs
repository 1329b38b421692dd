//! Requests of the three signals: how many records they carry, how they are halved, and what the collector answers.

use std::future::Future;

use opentelemetry_proto::tonic::collector::logs::v1::logs_service_client::LogsServiceClient;
use opentelemetry_proto::tonic::collector::logs::v1::{ExportLogsServiceRequest, ExportLogsServiceResponse};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_client::MetricsServiceClient;
use opentelemetry_proto::tonic::collector::metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use prost::Message;
use tonic::codec::CompressionEncoding;
use tonic::transport::Channel;
use tonic::{Request, Status};

use crate::observe::otlp::Signal;

/// What the collector says about a request that it took.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Taken {
    /// Records of the request that it did not keep.
    pub rejected: u64,
    pub message: String,
}

/// A request with records of one kind.
pub trait Batch: Message + Clone + Default + 'static {
    const SIGNAL: Signal;

    /// Records in it; data points count with their metric.
    fn count(&self) -> usize;
    /// Keeps the first `at` records and returns the rest.
    fn split_off(&mut self, at: usize) -> Self;
    /// Reads the body of an answer over HTTP. One that is not understood says nothing.
    fn taken(answer: &[u8]) -> Taken;
    /// Sends it over gRPC.
    fn call(
        self,
        channel: Channel,
        headers: http::HeaderMap,
        gzip: bool,
    ) -> impl Future<Output = Result<Taken, Status>> + Send;
}

/// Keeps the first `at` records in `resources` and returns the rest, each below a copy of its resource and scope.
fn split<R: Clone, S: Clone, I>(
    resources: &mut Vec<R>,
    scopes: fn(&mut R) -> &mut Vec<S>,
    records: fn(&mut S) -> &mut Vec<I>,
    at: usize,
) -> Vec<R> {
    let (mut left, mut rest) = (at, Vec::new());
    for resource in resources.iter_mut() {
        let mut kept = Vec::new();
        let mut moved = Vec::new();
        for mut scope in std::mem::take(scopes(resource)) {
            let mut all = std::mem::take(records(&mut scope));
            let later = all.split_off(left.min(all.len()));
            left -= all.len();
            if !later.is_empty() {
                let mut copy = scope.clone();
                *records(&mut copy) = later;
                moved.push(copy);
            }
            if !all.is_empty() {
                *records(&mut scope) = all;
                kept.push(scope);
            }
        }
        if !moved.is_empty() {
            let mut copy = resource.clone();
            *scopes(&mut copy) = moved;
            rest.push(copy);
        }
        *scopes(resource) = kept;
    }
    resources.retain_mut(|resource| !scopes(resource).is_empty());
    rest
}

macro_rules! batch {
    ($request:ident, $response:ident, $client:ident, $signal:ident, $resources:ident, $scopes:ident, $records:ident, $rejected:ident) => {
        impl Batch for $request {
            const SIGNAL: Signal = Signal::$signal;

            fn count(&self) -> usize {
                self.$resources.iter().flat_map(|resource| &resource.$scopes).map(|scope| scope.$records.len()).sum()
            }

            fn split_off(&mut self, at: usize) -> Self {
                let rest =
                    split(&mut self.$resources, |resource| &mut resource.$scopes, |scope| &mut scope.$records, at);
                Self { $resources: rest }
            }

            fn taken(answer: &[u8]) -> Taken {
                let part = $response::decode(answer).ok().and_then(|answer| answer.partial_success);
                part.map_or_else(Taken::default, |part| Taken {
                    rejected: u64::try_from(part.$rejected).unwrap_or(0),
                    message: part.error_message,
                })
            }

            async fn call(self, channel: Channel, headers: http::HeaderMap, gzip: bool) -> Result<Taken, Status> {
                let mut client = $client::new(channel);
                if gzip {
                    client = client.send_compressed(CompressionEncoding::Gzip);
                    client = client.accept_compressed(CompressionEncoding::Gzip);
                }
                let mut request = Request::new(self);
                *request.metadata_mut() = tonic::metadata::MetadataMap::from_headers(headers);
                let answer = client.export(request).await?.into_inner();
                Ok(Self::taken(&answer.encode_to_vec()))
            }
        }
    };
}

batch!(
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
    TraceServiceClient,
    Traces,
    resource_spans,
    scope_spans,
    spans,
    rejected_spans
);
batch!(
    ExportLogsServiceRequest,
    ExportLogsServiceResponse,
    LogsServiceClient,
    Logs,
    resource_logs,
    scope_logs,
    log_records,
    rejected_log_records
);
batch!(
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
    MetricsServiceClient,
    Metrics,
    resource_metrics,
    scope_metrics,
    metrics,
    rejected_data_points
);
