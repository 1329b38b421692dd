//! Exporters to an OTLP collector, as `[telemetry]` says and, where it is silent, the OTEL_* variables.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use opentelemetry_http::{HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::tonic_types::metadata::MetadataMap;
use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig};
use opentelemetry_otlp::{
    Compression, ExporterBuildError, LogExporter, MetricExporter, Protocol, SpanExporter, WithExportConfig,
    WithHttpConfig, WithTonicConfig,
};

use crate::config::{OtlpCompression, OtlpProtocol, TelemetryConfig};
use crate::outbound;

/// No answer of a collector is longer.
const MAX_ANSWER: usize = 4 << 20;

/// What can be wrong with the way to a collector.
#[derive(Debug, thiserror::Error)]
pub enum OtlpError {
    #[error("telemetry.otlp_headers: {0}")]
    Header(String),
    #[error("telemetry.otlp_ca_file: {0}")]
    Certificate(String),
    #[error("set up the OTLP client: {0}")]
    Client(String),
    #[error("set up the OTLP exporter: {0}; check telemetry.otlp_endpoint and the OTEL_EXPORTER_OTLP_ variables")]
    Exporter(#[from] ExporterBuildError),
}

/// The kinds of telemetry, each with its own endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    Traces,
    Metrics,
    Logs,
}

impl Signal {
    fn variable(self) -> &'static str {
        match self {
            Self::Traces => "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            Self::Metrics => "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
            Self::Logs => "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT",
        }
    }

    fn path(self) -> &'static str {
        match self {
            Self::Traces => "/v1/traces",
            Self::Metrics => "/v1/metrics",
            Self::Logs => "/v1/logs",
        }
    }
}

/// Is anybody named who wants this kind of telemetry?
pub fn is_wanted(config: &TelemetryConfig, signal: Signal) -> bool {
    let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    let disabled = std::env::var("OTEL_SDK_DISABLED").is_ok_and(|value| value.eq_ignore_ascii_case("true"));
    !disabled && (config.otlp_endpoint.is_some() || set("OTEL_EXPORTER_OTLP_ENDPOINT") || set(signal.variable()))
}

fn protocol(config: &TelemetryConfig) -> Protocol {
    let named = config.otlp_protocol.map(|protocol| match protocol {
        OtlpProtocol::Grpc => Protocol::Grpc,
        OtlpProtocol::Http => Protocol::HttpBinary,
    });
    named.unwrap_or_else(|| match std::env::var("OTEL_EXPORTER_OTLP_PROTOCOL").as_deref() {
        Ok("grpc") => Protocol::Grpc,
        _ => Protocol::HttpBinary,
    })
}

/// The exporter of metrics. Must be called inside the runtime that is to carry the requests.
///
/// # Errors
/// When the configuration cannot be used.
pub fn metrics(config: &TelemetryConfig) -> Result<MetricExporter, OtlpError> {
    Ok(match protocol(config) {
        Protocol::Grpc => grpc(MetricExporter::builder().with_tonic(), config)?.build()?,
        _ => http(MetricExporter::builder().with_http(), config, Signal::Metrics)?.build()?,
    })
}

/// The exporter of spans. Must be called inside the runtime that is to carry the requests.
///
/// # Errors
/// When the configuration cannot be used.
pub fn spans(config: &TelemetryConfig) -> Result<SpanExporter, OtlpError> {
    Ok(match protocol(config) {
        Protocol::Grpc => grpc(SpanExporter::builder().with_tonic(), config)?.build()?,
        _ => http(SpanExporter::builder().with_http(), config, Signal::Traces)?.build()?,
    })
}

/// The exporter of log records. Must be called inside the runtime that is to carry the requests.
///
/// # Errors
/// When the configuration cannot be used.
pub fn logs(config: &TelemetryConfig) -> Result<LogExporter, OtlpError> {
    Ok(match protocol(config) {
        Protocol::Grpc => grpc(LogExporter::builder().with_tonic(), config)?.build()?,
        _ => http(LogExporter::builder().with_http(), config, Signal::Logs)?.build()?,
    })
}

fn grpc<B: WithExportConfig + WithTonicConfig>(builder: B, config: &TelemetryConfig) -> Result<B, OtlpError> {
    let mut builder = builder.with_timeout(config.otlp_timeout.0);
    if let Some(endpoint) = &config.otlp_endpoint {
        builder = builder.with_endpoint(endpoint);
        if endpoint.starts_with("https://") {
            let mut tls = ClientTlsConfig::new().with_native_roots();
            if let Some(path) = &config.otlp_ca_file {
                let pem = std::fs::read(path)
                    .map_err(|error| OtlpError::Certificate(format!("read {}: {error}", path.display())))?;
                tls = tls.ca_certificate(Certificate::from_pem(pem));
            }
            builder = builder.with_tls_config(tls);
        }
    }
    if !config.otlp_headers.is_empty() {
        let mut headers = http::HeaderMap::new();
        for (name, value) in headers_of(config)? {
            let name: http::HeaderName =
                name.parse().map_err(|error| OtlpError::Header(format!("`{name}`: {error}")))?;
            let mut value: http::HeaderValue =
                value.parse().map_err(|error| OtlpError::Header(format!("the value of `{name}`: {error}")))?;
            value.set_sensitive(true);
            headers.insert(name, value);
        }
        builder = builder.with_metadata(MetadataMap::from_headers(headers));
    }
    if config.otlp_compression == Some(OtlpCompression::Gzip) {
        builder = builder.with_compression(Compression::Gzip);
    }
    Ok(builder)
}

fn http<B: WithExportConfig + WithHttpConfig>(
    builder: B,
    config: &TelemetryConfig,
    signal: Signal,
) -> Result<B, OtlpError> {
    let mut builder = builder
        .with_protocol(Protocol::HttpBinary)
        .with_timeout(config.otlp_timeout.0)
        .with_http_client(Client::new(config)?);
    if let Some(endpoint) = &config.otlp_endpoint {
        builder = builder.with_endpoint(format!("{}{}", endpoint.trim_end_matches('/'), signal.path()));
    }
    if !config.otlp_headers.is_empty() {
        builder = builder.with_headers(headers_of(config)?);
    }
    if config.otlp_compression == Some(OtlpCompression::Gzip) {
        builder = builder.with_compression(Compression::Gzip);
    }
    Ok(builder)
}

fn headers_of(config: &TelemetryConfig) -> Result<HashMap<String, String>, OtlpError> {
    let split = |header: &crate::config::value::Secret| {
        let (name, value) = header.reveal().split_once('=').ok_or_else(|| {
            // The text may be the secret alone, so it is not repeated.
            OtlpError::Header("one of them has no `=`; write each as NAME=VALUE".into())
        })?;
        Ok((name.trim().to_ascii_lowercase(), value.trim().to_owned()))
    };
    config.otlp_headers.iter().map(split).collect()
}

/// Carries requests on our own runtime, whatever thread exports.
#[derive(Debug)]
struct Client {
    client: reqwest::Client,
    runtime: tokio::runtime::Handle,
}

impl Client {
    fn new(config: &TelemetryConfig) -> Result<Self, OtlpError> {
        let failed = |error: &dyn std::error::Error| OtlpError::Client(error.to_string());
        Ok(Self {
            client: client(config.otlp_timeout.0, config.otlp_ca_file.as_deref())?,
            runtime: tokio::runtime::Handle::try_current().map_err(|error| failed(&error))?,
        })
    }
}

/// An HTTP client with a deadline and, if given, further certificate authorities.
pub(crate) fn client(timeout: Duration, ca_file: Option<&std::path::Path>) -> Result<reqwest::Client, OtlpError> {
    // `ring` is compiled in for all TLS; a second start in one process keeps the first one's.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder().timeout(timeout).connect_timeout(timeout.min(Duration::from_secs(5)));
    if let Some(path) = ca_file {
        let refuse = |reason: String| OtlpError::Certificate(format!("{}: {reason}", path.display()));
        let pem = std::fs::read(path).map_err(|error| refuse(error.to_string()))?;
        let found = reqwest::Certificate::from_pem_bundle(&pem).map_err(|error| refuse(error.to_string()))?;
        builder = builder.tls_certs_merge(found);
    }
    outbound::with_proxies(builder).build().map_err(|error| OtlpError::Client(error.to_string()))
}

type Answer<'a> = Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'a>>;

impl HttpClient for Client {
    fn send_bytes<'life0, 'async_trait>(&'life0 self, request: Request<Bytes>) -> Answer<'async_trait>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        let client = self.client.clone();
        let sent = self.runtime.spawn(async move {
            let mut answer = client.execute(request.try_into()?).await.map_err(outbound::with_proxy)?;
            let mut response = Response::builder().status(answer.status());
            if let Some(headers) = response.headers_mut() {
                *headers = std::mem::take(answer.headers_mut());
            }
            let mut body = Vec::new();
            while let Some(chunk) = answer.chunk().await? {
                if body.len() + chunk.len() > MAX_ANSWER {
                    return Err("the collector's answer is too long".into());
                }
                body.extend_from_slice(&chunk);
            }
            Ok::<_, HttpError>(response.body(Bytes::from(body))?)
        });
        Box::pin(async move { sent.await? })
    }
}
