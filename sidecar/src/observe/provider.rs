//! Sets up what carries metrics out: a registry that Prometheus scrapes and, where a collector is named, a push over OTLP.

use opentelemetry::{KeyValue, global};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use prometheus::{Registry, TextEncoder};

use crate::config::TelemetryConfig;
use crate::observe::metrics;
use crate::observe::otlp::{self, Environment, OtlpError};

/// What can go wrong at the start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error(transparent)]
    Otlp(#[from] OtlpError),
    #[error("set up the registry of metrics: {0}")]
    Registry(String),
}

/// The text forms of a scrape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextFormat {
    Prometheus,
    OpenMetrics,
}

impl TextFormat {
    /// What an `Accept` header asks for.
    pub fn wanted(accept: &str) -> Self {
        if accept.contains("application/openmetrics-text") { Self::OpenMetrics } else { Self::Prometheus }
    }

    pub fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Metrics on their way out. One for the process.
pub struct Telemetry {
    registry: Registry,
    provider: SdkMeterProvider,
}

impl Telemetry {
    /// Installs the provider that all of [`metrics`] records to. `instance` tells this sidecar from others.
    ///
    /// # Errors
    /// When the configuration of a collector cannot be used.
    pub fn start(config: &TelemetryConfig, instance: &str) -> Result<Self, TelemetryError> {
        let registry = Registry::new();
        let refuse = |error: &dyn std::error::Error| TelemetryError::Registry(error.to_string());
        let scraped = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            .scope_info_enabled(false)
            .build()
            .map_err(|error| refuse(&error))?;
        let mut builder = SdkMeterProvider::builder().with_reader(scraped).with_resource(resource(config, instance));
        otlp::warn_of_unused_variables(config);
        if let Some(sender) = otlp::metrics(config)? {
            let reader = PeriodicReader::builder(sender).with_interval(Environment::read().metrics_interval(config));
            builder = builder.with_reader(reader.build());
        }
        let provider = builder.build();
        global::set_meter_provider(provider.clone());
        metrics::observe_gauges();
        // From zero on, so that the first rejection counts as an increase.
        for signal in otlp::Signal::ALL {
            for reason in otlp::REASONS {
                let labels = [KeyValue::new("signal", signal.name()), KeyValue::new("reason", reason)];
                metrics::REJECTED.add(0, &labels);
            }
        }
        Ok(Self { registry, provider })
    }

    /// Every metric as text.
    ///
    /// # Errors
    /// When the encoder refuses a metric, which would be a bug.
    pub fn scrape(&self, format: TextFormat) -> Result<String, TelemetryError> {
        let encoded = TextEncoder::new().encode_to_string(&self.registry.gather());
        let text = encoded.map_err(|error| TelemetryError::Registry(error.to_string()))?;
        Ok(if format == TextFormat::OpenMetrics { open_metrics(&text) } else { text })
    }

    /// Sends what is left, within the exporter's deadline.
    pub async fn stop(&self) {
        let provider = self.provider.clone();
        // The provider waits on threads of its own.
        match tokio::task::spawn_blocking(move || provider.shutdown()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "the last metrics were not sent"),
            Err(error) => tracing::debug!(%error, "the last metrics were not sent"),
        }
    }
}

/// Who speaks, on every signal.
pub fn resource(config: &TelemetryConfig, instance: &str) -> Resource {
    let named = std::env::var("OTEL_SERVICE_NAME").is_ok_and(|name| !name.is_empty());
    let mut builder = Resource::builder();
    if let Some(name) = &config.service_name {
        builder = builder.with_service_name(name.clone());
    } else if !named {
        builder = builder.with_service_name("inner-universe");
    }
    builder
        .with_attributes([
            KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
            KeyValue::new("service.instance.id", instance.to_owned()),
        ])
        .build()
}

/// OpenMetrics differs from Prometheus' own text in the names of counters' families and in its end.
fn open_metrics(text: &str) -> String {
    let counters: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.strip_suffix(" counter")).collect();
    let mut out = String::with_capacity(text.len() + 16);
    for line in text.lines() {
        let about = line.strip_prefix("# TYPE ").or_else(|| line.strip_prefix("# HELP "));
        match about.and_then(|rest| rest.split_once(' ')) {
            Some((name, rest)) if counters.contains(&name) => {
                let family = name.strip_suffix("_total").unwrap_or(name);
                out.push_str(&line[..7]);
                out.push_str(family);
                out.push(' ');
                out.push_str(rest);
            }
            _ => out.push_str(line),
        }
        out.push('\n');
    }
    out.push_str("# EOF\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_metrics_names_the_families_of_counters_and_ends() {
        let text = "# HELP a_total Things.\n# TYPE a_total counter\na_total{x=\"1\"} 3\n# HELP b Other.\n# TYPE b gauge\nb 1\n";
        let expected =
            "# HELP a Things.\n# TYPE a counter\na_total{x=\"1\"} 3\n# HELP b Other.\n# TYPE b gauge\nb 1\n# EOF\n";
        assert_eq!(open_metrics(text), expected);
    }
}
