//! The way to an OTLP collector, for every signal and stream: `settings` says where and how, `sender` sends, `verdict`
//! reads answers, `gate` keeps failing connections few.

mod exporters;
mod gate;
mod request;
mod sender;
mod settings;
mod verdict;

use std::path::{Path, PathBuf};
use std::time::Duration;

use opentelemetry_sdk::Resource;

pub use crate::observe::otlp::exporters::{LogSender, MetricSender, SpanSender};
pub use crate::observe::otlp::sender::{SendError, Sender, Sent};
pub use crate::observe::otlp::settings::{Environment, Settings};

use crate::config::TelemetryConfig;
use crate::outbound;

/// What can be wrong with the way to a collector.
#[derive(Debug, thiserror::Error)]
pub enum OtlpError {
    #[error("telemetry.otlp_headers or OTEL_EXPORTER_OTLP_HEADERS: {0}")]
    Header(String),
    #[error("telemetry.otlp_ca_file or OTEL_EXPORTER_OTLP_CERTIFICATE: {0}")]
    Certificate(String),
    #[error("set up the OTLP client: {0}; check telemetry.otlp_endpoint and the OTEL_EXPORTER_OTLP_ variables")]
    Client(String),
}

/// The kinds of telemetry, each with its own endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    Traces,
    Metrics,
    Logs,
}

/// Why records are rejected, as metrics tell it.
pub const REASONS: [&str; 3] = ["refused", "too_large", "partial_success"];

impl Signal {
    pub const ALL: [Self; 3] = [Self::Traces, Self::Metrics, Self::Logs];

    /// As in names of variables.
    fn variable(self) -> &'static str {
        match self {
            Self::Traces => "TRACES",
            Self::Metrics => "METRICS",
            Self::Logs => "LOGS",
        }
    }

    /// As in labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::Traces => "traces",
            Self::Metrics => "metrics",
            Self::Logs => "logs",
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
    // What cannot be used is refused where it is to be used.
    !matches!(Settings::of(config, &Environment::read(), signal), Ok(None))
}

/// Says once which OTEL_ variables are set and do not count.
pub fn warn_of_unused_variables(config: &TelemetryConfig) {
    let environment = Environment::read();
    let is_sent = Signal::ALL.into_iter().any(|signal| is_wanted(config, signal));
    let unused = environment.unused(config);
    if is_sent && !unused.is_empty() {
        let variables = unused.join(", ");
        tracing::warn!(event = "otel_variables_unused", variables, "OTEL_ variables are set that do not count here");
    }
}

fn sender(config: &TelemetryConfig, signal: Signal) -> Result<Option<Sender>, OtlpError> {
    Settings::of(config, &Environment::read(), signal)?.map(Sender::new).transpose()
}

/// What sends metrics; `None` when nobody wants them. Must be called inside the runtime that is to carry the requests.
///
/// # Errors
/// When the configuration cannot be used.
pub fn metrics(config: &TelemetryConfig) -> Result<Option<MetricSender>, OtlpError> {
    let temporality = Environment::read().temporality();
    Ok(sender(config, Signal::Metrics)?.map(|sender| MetricSender { sender, temporality }))
}

/// What sends spans; `None` when nobody wants them. Must be called inside the runtime that is to carry the requests.
///
/// # Errors
/// When the configuration cannot be used.
pub fn spans(config: &TelemetryConfig, resource: &Resource) -> Result<Option<SpanSender>, OtlpError> {
    Ok(sender(config, Signal::Traces)?.map(|sender| SpanSender { sender, resource: resource.into() }))
}

/// What sends log records; `None` when nobody wants them. Must be called inside the runtime that is to carry the requests.
///
/// # Errors
/// When the configuration cannot be used.
pub fn logs(config: &TelemetryConfig, resource: &Resource) -> Result<Option<LogSender>, OtlpError> {
    Ok(sender(config, Signal::Logs)?.map(|sender| LogSender { sender, resource: resource.into() }))
}

/// Takes rejected records off counts by kind, from the largest first: a collector does not say which ones it rejected.
pub fn less_rejected<K>(counts: &mut [(K, u64)], mut rejected: u64) {
    while rejected > 0
        && let Some((_, most)) = counts.iter_mut().max_by_key(|(_, n)| *n).filter(|(_, n)| *n > 0)
    {
        let taken = rejected.min(*most);
        *most -= taken;
        rejected -= taken;
    }
}

/// An HTTP client with a deadline and, if given, further certificate authorities.
pub(crate) fn client(timeout: Duration, ca_file: Option<&Path>) -> Result<reqwest::Client, OtlpError> {
    client_with(timeout, ca_file, None)
}

/// The same, known to the server by a certificate and its key.
fn client_with(
    timeout: Duration,
    ca_file: Option<&Path>,
    identity: Option<&(PathBuf, PathBuf)>,
) -> Result<reqwest::Client, OtlpError> {
    // `ring` is compiled in for all TLS; a second start in one process keeps the first one's.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = reqwest::Client::builder().timeout(timeout).connect_timeout(timeout.min(Duration::from_secs(5)));
    let refuse = |path: &Path, reason: String| OtlpError::Certificate(format!("{}: {reason}", path.display()));
    let read = |path: &Path| std::fs::read(path).map_err(|error| refuse(path, error.to_string()));
    if let Some(path) = ca_file {
        let found =
            reqwest::Certificate::from_pem_bundle(&read(path)?).map_err(|error| refuse(path, error.to_string()))?;
        builder = builder.tls_certs_merge(found);
    }
    if let Some((certificate, key)) = identity {
        let both = [read(certificate)?, b"\n".to_vec(), read(key)?].concat();
        let identity = reqwest::Identity::from_pem(&both).map_err(|error| refuse(key, error.to_string()))?;
        builder = builder.identity(identity);
    }
    outbound::with_proxies(builder).build().map_err(|error| OtlpError::Client(error.to_string()))
}
