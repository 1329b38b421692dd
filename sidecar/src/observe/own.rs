//! The sidecar's own work as traces, and its log as log records with their ids, over OTLP: what it says through `tracing`.
//!
//! Queues are bounded: while the collector is out, the oldest of this is kept and the rest dropped, unlike events and calls.

use std::fmt::Display;
use std::future::Future;
use std::time::SystemTime;

use opentelemetry::trace::{SpanBuilder, Status, TraceContextExt as _, TraceId, Tracer as _, TracerProvider as _};
use opentelemetry::{Context, KeyValue, global};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_sdk::logs::SdkLoggerProvider;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
use tracing::level_filters::LevelFilter;
use tracing::{Instrument as _, Span};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::registry::LookupSpan;

use crate::config::TelemetryConfig;
use crate::observe::metrics::SCOPE;
use crate::observe::otlp::{self, OtlpError};
use crate::observe::provider;

/// Carries spans and log records out, where a collector is named. One for the process.
#[derive(Default)]
pub struct OwnTelemetry {
    traces: Option<SdkTracerProvider>,
    logs: Option<SdkLoggerProvider>,
}

impl OwnTelemetry {
    /// # Errors
    /// When the configuration of a collector cannot be used.
    pub fn start(config: &TelemetryConfig, instance: &str) -> Result<Self, OtlpError> {
        let resource = provider::resource(config, instance);
        let mut own = Self::default();
        if let Some(sender) = otlp::spans(config, &resource)? {
            let builder = SdkTracerProvider::builder().with_resource(resource.clone());
            let sampler = Sampler::ParentBased(Box::new(config.sampler()));
            let traces = builder.with_sampler(sampler).with_batch_exporter(sender).build();
            global::set_tracer_provider(traces.clone());
            own.traces = Some(traces);
        }
        if let Some(sender) = otlp::logs(config, &resource)? {
            let builder = SdkLoggerProvider::builder().with_resource(resource);
            own.logs = Some(builder.with_batch_exporter(sender).build());
        }
        Ok(own)
    }

    /// What `tracing` is to pass everything on to. Only our own words: those of the exporters would feed themselves.
    pub fn layer<S>(&self) -> impl Layer<S> + Send + Sync + use<S>
    where
        S: tracing::Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
    {
        let ours = || Targets::new().with_target(SCOPE, LevelFilter::INFO);
        let spans = self.traces.as_ref().map(|traces| {
            let layer = tracing_opentelemetry::layer().with_tracer(traces.tracer(SCOPE));
            layer.with_location(false).with_threads(false).with_tracked_inactivity(false).with_filter(ours())
        });
        let logs = self.logs.as_ref().map(|logs| OpenTelemetryTracingBridge::new(logs).with_filter(ours()));
        Layer::and_then(spans, logs)
    }

    /// Sends what is left, within the exporters' deadline.
    pub async fn stop(&self) {
        let (traces, logs) = (self.traces.clone(), self.logs.clone());
        // The providers wait on threads of their own.
        let stopping = tokio::task::spawn_blocking(move || {
            let _ = traces.map(|traces| traces.shutdown());
            let _ = logs.map(|logs| logs.shutdown());
        });
        // What was not sent is lost; there is nobody left to tell.
        let _ = stopping.await;
    }
}

/// A span of our own work, with what [`traced`] and the log fill in.
macro_rules! work_span {
    ($name:literal $(, $($fields:tt)*)?) => {
        tracing::info_span!(
            $name,
            trace_id = tracing::field::Empty,
            otel.status_code = tracing::field::Empty,
            otel.status_description = tracing::field::Empty,
            $($($fields)*)?
        )
    };
}
pub(crate) use work_span;

/// Works inside a span, and tells it how that ended.
pub async fn traced<T, E: Display>(span: Span, work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    identify(&span);
    let result = work.instrument(span.clone()).await;
    if let Err(error) = &result {
        span.record("otel.status_code", "ERROR");
        span.record("otel.status_description", tracing::field::display(error));
    }
    result
}

/// Tells the log which trace a span belongs to. Begins the span: it has its parent from now on.
fn identify(span: &Span) {
    let trace = span.context().span().span_context().trace_id();
    if trace != TraceId::INVALID {
        span.record("trace_id", tracing::field::display(trace));
    }
}

/// A span that began before we knew of it, ended when dropped.
pub struct Earlier(Context);

impl Earlier {
    /// Begins a trace at `since`.
    pub fn begin(name: &'static str, since: SystemTime, attributes: Vec<KeyValue>) -> Self {
        let tracer = global::tracer(SCOPE);
        let builder = SpanBuilder::from_name(name).with_start_time(since).with_attributes(attributes);
        Self(Context::new().with_span(tracer.build_with_context(builder, &Context::new())))
    }

    /// Puts `span`, which has not begun, below.
    pub fn above(&self, span: Span) -> Span {
        // Without a collector there is no layer that could take it.
        let _ = span.set_parent(self.0.clone());
        span
    }

    /// It came to nothing.
    pub fn failed(&self, error: &impl Display) {
        self.0.span().set_status(Status::error(error.to_string()));
    }
}

impl Drop for Earlier {
    fn drop(&mut self) {
        self.0.span().end();
    }
}
