//! How each kind of telemetry reaches its collector: as `[telemetry]` says and, where it is silent, the OTEL_ variables of
//! the OpenTelemetry specification; a signal's own variable before the general one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use opentelemetry_sdk::metrics::Temporality;

use crate::config::{OtlpCompression, OtlpProtocol, TelemetryConfig};
use crate::observe::otlp::{OtlpError, Signal};

const TIMEOUT: Duration = opentelemetry_otlp::OTEL_EXPORTER_OTLP_TIMEOUT_DEFAULT;
const METRICS_INTERVAL: Duration = Duration::from_secs(60);
/// What a variable OTEL_EXPORTER_OTLP_WHAT or OTEL_EXPORTER_OTLP_SIGNAL_WHAT can set.
const WHAT: [&str; 9] = [
    "ENDPOINT",
    "PROTOCOL",
    "HEADERS",
    "COMPRESSION",
    "TIMEOUT",
    "CERTIFICATE",
    "CLIENT_CERTIFICATE",
    "CLIENT_KEY",
    "INSECURE",
];
/// Further variables that count, here or in the OpenTelemetry SDK.
const COUNT: [&str; 11] = [
    "OTEL_SDK_DISABLED",
    "OTEL_RESOURCE_ATTRIBUTES",
    "OTEL_BSP_SCHEDULE_DELAY",
    "OTEL_BSP_MAX_QUEUE_SIZE",
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
    "OTEL_BLRP_SCHEDULE_DELAY",
    "OTEL_BLRP_MAX_QUEUE_SIZE",
    "OTEL_BLRP_MAX_EXPORT_BATCH_SIZE",
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_SPAN_EVENT_COUNT_LIMIT",
    "OTEL_SPAN_LINK_COUNT_LIMIT",
];
const SAMPLERS: [&str; 6] = [
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
];

/// The OTEL_ variables that are set; empty ones are not.
#[derive(Debug, Clone, Default)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    pub fn read() -> Self {
        let text = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        };
        Self::of(std::env::vars_os().filter_map(text))
    }

    fn of(variables: impl Iterator<Item = (String, String)>) -> Self {
        let trimmed = variables.map(|(name, value)| (name, value.trim().to_owned()));
        Self(trimmed.filter(|(name, value)| name.starts_with("OTEL_") && !value.is_empty()).collect())
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// The signal's own value, or the general one.
    fn setting(&self, signal: Signal, what: &str) -> Option<&str> {
        self.get(&own(signal, what)).or_else(|| self.get(&general(what)))
    }

    fn milliseconds(&self, value: Option<&str>) -> Option<Duration> {
        value.and_then(|text| text.parse().ok()).filter(|ms| *ms > 0).map(Duration::from_millis)
    }

    /// How often metrics are pushed.
    pub fn metrics_interval(&self, config: &TelemetryConfig) -> Duration {
        let configured = config.metrics_interval.map(|period| period.0);
        configured.or(self.milliseconds(self.get("OTEL_METRIC_EXPORT_INTERVAL"))).unwrap_or(METRICS_INTERVAL)
    }

    pub fn temporality(&self) -> Temporality {
        let preferred = self.get("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE").unwrap_or_default();
        match preferred.to_ascii_lowercase().as_str() {
            "delta" => Temporality::Delta,
            "lowmemory" => Temporality::LowMemory,
            _ => Temporality::Cumulative,
        }
    }

    /// What is set and does not count, each with the reason; sorted.
    pub fn unused(&self, config: &TelemetryConfig) -> Vec<String> {
        self.0
            .iter()
            .filter_map(|(name, value)| Some(format!("{name} ({})", self.reason(config, name, value)?)))
            .collect()
    }

    fn reason(&self, config: &TelemetryConfig, name: &str, value: &str) -> Option<String> {
        let overridden = |key: &str, set: bool| set.then(|| format!("telemetry.{key} is set"));
        let Some(what) = WHAT
            .into_iter()
            .find(|what| name == general(what) || Signal::ALL.into_iter().any(|signal| name == own(signal, what)))
        else {
            return match name {
                "OTEL_METRIC_EXPORT_INTERVAL" => overridden("metrics_interval", config.metrics_interval.is_some())
                    .or_else(|| invalid(self.milliseconds(Some(value)).is_some(), "milliseconds")),
                "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE" => {
                    let known = ["cumulative", "delta", "lowmemory"];
                    invalid(known.contains(&value.to_ascii_lowercase().as_str()), "cumulative, delta or lowmemory")
                }
                "OTEL_SERVICE_NAME" => overridden("service_name", config.service_name.is_some()),
                "OTEL_TRACES_SAMPLER" => overridden("trace_ratio", config.trace_ratio.is_some())
                    .or_else(|| invalid(SAMPLERS.contains(&value), &SAMPLERS.join(", "))),
                "OTEL_TRACES_SAMPLER_ARG" => overridden("trace_ratio", config.trace_ratio.is_some()),
                "OTEL_TRACES_EXPORTER" | "OTEL_METRICS_EXPORTER" | "OTEL_LOGS_EXPORTER" => {
                    invalid(matches!(value, "otlp" | "none"), "otlp or none")
                }
                "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION" if value == "explicit_bucket_histogram" => {
                    None
                }
                name if COUNT.contains(&name) => None,
                _ => Some("not supported".into()),
            };
        };
        match what {
            "ENDPOINT" => overridden("otlp_endpoint", config.otlp_endpoint.is_some()),
            "PROTOCOL" => overridden("otlp_protocol", config.otlp_protocol.is_some())
                .or_else(|| invalid(protocol(value).is_some(), "grpc or http/protobuf")),
            "COMPRESSION" => overridden("otlp_compression", config.otlp_compression.is_some())
                .or_else(|| invalid(matches!(value, "gzip" | "none"), "gzip or none")),
            "TIMEOUT" => overridden("otlp_timeout", config.otlp_timeout.is_some())
                .or_else(|| invalid(self.milliseconds(Some(value)).is_some(), "milliseconds")),
            "CERTIFICATE" => overridden("otlp_ca_file", config.otlp_ca_file.is_some()),
            _ => None,
        }
    }
}

fn own(signal: Signal, what: &str) -> String {
    format!("OTEL_EXPORTER_OTLP_{}_{what}", signal.variable())
}

fn general(what: &str) -> String {
    let known = match what {
        "ENDPOINT" => opentelemetry_otlp::OTEL_EXPORTER_OTLP_ENDPOINT,
        "PROTOCOL" => opentelemetry_otlp::OTEL_EXPORTER_OTLP_PROTOCOL,
        "HEADERS" => opentelemetry_otlp::OTEL_EXPORTER_OTLP_HEADERS,
        "COMPRESSION" => opentelemetry_otlp::OTEL_EXPORTER_OTLP_COMPRESSION,
        "TIMEOUT" => opentelemetry_otlp::OTEL_EXPORTER_OTLP_TIMEOUT,
        // The exporter crate has no name for the others.
        _ => return format!("OTEL_EXPORTER_OTLP_{what}"),
    };
    known.to_owned()
}

fn invalid(is_valid: bool, expected: &str) -> Option<String> {
    (!is_valid).then(|| format!("not supported; give {expected}"))
}

fn protocol(text: &str) -> Option<OtlpProtocol> {
    match text {
        "grpc" => Some(OtlpProtocol::Grpc),
        "http/protobuf" => Some(OtlpProtocol::Http),
        _ => None,
    }
}

/// The way of one kind of telemetry.
#[derive(Debug, Clone)]
pub struct Settings {
    pub protocol: OtlpProtocol,
    /// With the signal's path for HTTP.
    pub endpoint: String,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub gzip: bool,
    pub timeout: Duration,
    pub ca_file: Option<PathBuf>,
    /// Certificate and key that the collector knows us by.
    pub client: Option<(PathBuf, PathBuf)>,
}

impl Settings {
    /// `None` when nobody wants this kind of telemetry.
    ///
    /// # Errors
    /// When a header cannot be used, or of certificate and key one is missing.
    pub fn of(config: &TelemetryConfig, from: &Environment, signal: Signal) -> Result<Option<Self>, OtlpError> {
        let disabled = from.get("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
        let none = from.get(&format!("OTEL_{}_EXPORTER", signal.variable())) == Some("none");
        let protocol = config.otlp_protocol.or_else(|| protocol(from.setting(signal, "PROTOCOL")?));
        let protocol = protocol.unwrap_or(OtlpProtocol::Http);
        let Some(endpoint) = endpoint(config, from, signal, protocol).filter(|_| !disabled && !none) else {
            return Ok(None);
        };
        let gzip = match config.otlp_compression {
            Some(compression) => compression == OtlpCompression::Gzip,
            None => from.setting(signal, "COMPRESSION") == Some("gzip"),
        };
        let timeout = config.otlp_timeout.map(|period| period.0);
        let file = |what: &str| from.setting(signal, what).map(PathBuf::from);
        let client = match (file("CLIENT_CERTIFICATE"), file("CLIENT_KEY")) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            _ => {
                let needs =
                    "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE and OTEL_EXPORTER_OTLP_CLIENT_KEY go together; set both";
                return Err(OtlpError::Certificate(needs.into()));
            }
        };
        Ok(Some(Self {
            protocol,
            endpoint,
            headers: headers(config, from, signal)?,
            gzip,
            timeout: timeout.or(from.milliseconds(from.setting(signal, "TIMEOUT"))).unwrap_or(TIMEOUT),
            ca_file: config.otlp_ca_file.clone().or_else(|| file("CERTIFICATE")),
            client,
        }))
    }
}

fn endpoint(config: &TelemetryConfig, from: &Environment, signal: Signal, protocol: OtlpProtocol) -> Option<String> {
    let with_path = |base: &str| match protocol {
        OtlpProtocol::Http => format!("{}{}", base.trim_end_matches('/'), signal.path()),
        OtlpProtocol::Grpc => base.to_owned(),
    };
    let endpoint = match (&config.otlp_endpoint, from.get(&own(signal, "ENDPOINT"))) {
        (Some(configured), _) => with_path(configured),
        // A signal's own address is used as it is.
        (None, Some(own)) => own.to_owned(),
        (None, None) => with_path(from.get(&general("ENDPOINT"))?),
    };
    if endpoint.contains("://") || protocol == OtlpProtocol::Http {
        return Some(endpoint);
    }
    let insecure = from.setting(signal, "INSECURE").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    Some(format!("{}://{endpoint}", if insecure { "http" } else { "https" }))
}

/// Those of the environment, then those that are configured, which win.
fn headers(
    config: &TelemetryConfig,
    from: &Environment,
    signal: Signal,
) -> Result<Vec<(HeaderName, HeaderValue)>, OtlpError> {
    let mut found = BTreeMap::new();
    let mut add = |name: &str, value: &str| {
        // What stands there instead of a name may be the secret, so it is not repeated.
        let unnamed = |_| OtlpError::Header("one of them has no header's name before its `=`; write NAME=VALUE".into());
        let key: HeaderName = name.trim().to_ascii_lowercase().parse().map_err(unnamed)?;
        let refused = |error| OtlpError::Header(format!("`{key}`: {error}"));
        let mut value: HeaderValue = value.trim().parse().map_err(refused)?;
        value.set_sensitive(true);
        found.insert(key.as_str().to_owned(), (key, value));
        Ok(())
    };
    // The text may be the secret alone, so it is not repeated.
    let unnamed = || OtlpError::Header("one of them has no `=`; write each as NAME=VALUE".into());
    for header in from.setting(signal, "HEADERS").unwrap_or_default().split(',').filter(|text| !text.trim().is_empty())
    {
        let (name, value) = header.split_once('=').ok_or_else(unnamed)?;
        add(name, &unescaped(value))?;
    }
    for header in &config.otlp_headers {
        let (name, value) = header.reveal().split_once('=').ok_or_else(unnamed)?;
        add(name, value)?;
    }
    Ok(found.into_values().collect())
}

/// The variable's values are percent-encoded, as in W3C baggage.
fn unescaped(value: &str) -> String {
    let encoded = value.replace('+', "%2B");
    url::form_urlencoded::parse(format!("v={}", encoded.replace('&', "%26")).as_bytes())
        .next()
        .map_or_else(|| value.to_owned(), |(_, value)| value.into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::value::Period;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        Environment::of(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
    }

    fn settings(config: &TelemetryConfig, variables: &[(&str, &str)], signal: Signal) -> Option<Settings> {
        Settings::of(config, &environment(variables), signal).expect("settings")
    }

    #[test]
    fn a_signals_own_variable_goes_first() {
        let variables = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://general:4318/"),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "traces:4317"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "2500"),
            ("OTEL_EXPORTER_OTLP_LOGS_TIMEOUT", "700"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=1,b=x%20y"),
            ("OTEL_EXPORTER_OTLP_LOGS_HEADERS", "c=3"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_METRICS_COMPRESSION", "none"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "/ca.pem"),
            ("OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE", "/own.pem"),
            ("OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY", "/own.key"),
        ];
        let of = |signal| settings(&TelemetryConfig::default(), &variables, signal).expect("a collector");
        let (traces, metrics, logs) = (of(Signal::Traces), of(Signal::Metrics), of(Signal::Logs));
        assert_eq!((traces.protocol, traces.endpoint.as_str()), (OtlpProtocol::Grpc, "https://traces:4317"));
        assert_eq!(
            (metrics.protocol, metrics.endpoint.as_str()),
            (OtlpProtocol::Http, "http://general:4318/v1/metrics")
        );
        assert_eq!([traces.timeout, logs.timeout].map(|timeout| timeout.as_millis()), [2500, 700]);
        assert_eq!([traces.gzip, metrics.gzip, logs.gzip], [true, false, true]);
        let names = |of: &Settings| {
            of.headers
                .iter()
                .map(|(name, value)| format!("{name}={}", value.to_str().expect("text")))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            (names(&traces), names(&logs)),
            (vec!["a=1".to_owned(), "b=x y".to_owned()], vec!["c=3".to_owned()])
        );
        assert_eq!(traces.ca_file, Some("/ca.pem".into()));
        assert_eq!((traces.client, metrics.client), (Some(("/own.pem".into(), "/own.key".into())), None));
        assert!(environment(&variables).unused(&TelemetryConfig::default()).is_empty());
    }

    #[test]
    fn what_is_configured_wins_over_variables() {
        let config = TelemetryConfig {
            otlp_endpoint: Some("http://configured:4318".into()),
            otlp_timeout: Some(Period::seconds(3)),
            metrics_interval: Some(Period::seconds(7)),
            otlp_headers: vec!["a=2".to_owned().try_into().expect("a secret")],
            ..TelemetryConfig::default()
        };
        let variables = [
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://other:4318/x"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "1"),
            ("OTEL_METRIC_EXPORT_INTERVAL", "1000"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=1"),
        ];
        let traces = settings(&config, &variables, Signal::Traces).expect("a collector");
        assert_eq!(traces.endpoint, "http://configured:4318/v1/traces");
        assert_eq!(traces.timeout, Duration::from_secs(3));
        assert_eq!(traces.headers[0].1, "2");
        let environment = environment(&variables);
        assert_eq!(environment.metrics_interval(&config), Duration::from_secs(7));
        assert_eq!(environment.metrics_interval(&TelemetryConfig::default()), Duration::from_secs(1));
        let unused = environment.unused(&config);
        let names = ["OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_METRIC_EXPORT_INTERVAL"];
        assert!(unused.len() == 3 && unused.iter().zip(names).all(|(one, name)| one.starts_with(name)), "{unused:?}");
    }

    #[test]
    fn every_variable_counts_or_is_named() {
        let variables = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "ten"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd"),
            ("OTEL_METRIC_EXPORT_TIMEOUT", "5000"),
            ("OTEL_PROPAGATORS", "b3"),
            ("OTEL_TRACES_EXPORTER", "zipkin"),
            ("OTEL_TRACES_SAMPLER", "xray"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.5"),
            ("OTEL_SERVICE_NAME", "name"),
            ("OTEL_LOGS_EXPORTER", "none"),
            ("OTEL_EXPORTER_OTLP_METRICS_HEADERS", ""),
            ("OTHER", "x"),
        ];
        let unused = environment(&variables).unused(&TelemetryConfig::default());
        let named: Vec<_> = unused.iter().filter_map(|text| text.split(' ').next()).collect();
        let expected = [
            "OTEL_EXPORTER_OTLP_COMPRESSION",
            "OTEL_EXPORTER_OTLP_PROTOCOL",
            "OTEL_EXPORTER_OTLP_TIMEOUT",
            "OTEL_METRIC_EXPORT_TIMEOUT",
            "OTEL_PROPAGATORS",
            "OTEL_TRACES_EXPORTER",
            "OTEL_TRACES_SAMPLER",
        ];
        assert_eq!(named, expected);
        assert!(settings(&TelemetryConfig::default(), &variables, Signal::Logs).is_none());
        assert!(settings(&TelemetryConfig::default(), &variables, Signal::Traces).is_some());
    }
}
