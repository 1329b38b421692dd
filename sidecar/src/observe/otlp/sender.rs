//! Sends requests to a collector, and what does not change by being sent again in another form.
//!
//! Invariants: what a collector could not take for reasons of its own, or of the network, is the caller's to send again;
//! a record that it refuses by itself is found by halving, dropped and counted, and never counted as sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use opentelemetry::KeyValue;
use parking_lot::Mutex;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::clock::Stopwatch;
use crate::config::OtlpProtocol;
use crate::observe::metrics;
use crate::observe::otlp::gate::Gate;
use crate::observe::otlp::request::{Batch, Taken};
use crate::observe::otlp::settings::Settings;
use crate::observe::otlp::verdict::{Verdict, of_connection, of_grpc, of_status};
use crate::observe::otlp::{OtlpError, client_with};

/// No answer of a collector is longer.
const ANSWER_BYTES_MAX: usize = 4 << 20;
/// Requests do not become smaller than this by themselves.
const REQUEST_BYTES_MIN: usize = 16 << 10;
/// After this many records that were refused for an unclear reason, and none that was taken, the collector is out of order.
const DOUBTS: usize = 8;
/// Seconds between two lines in the log about rejected records.
const TOLD_INTERVAL: f64 = 60.0;

/// Why records were not sent. They are to be sent again.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    #[error("reach the collector at {endpoint}: {reason}; check that it runs, and telemetry.otlp_endpoint")]
    Unreachable { endpoint: String, reason: String },
    #[error("the collector at {endpoint} cannot take telemetry now: {answer}")]
    Busy { endpoint: String, answer: String },
    #[error(
        "the collector at {endpoint} does not let this sidecar send: {answer}; check telemetry.otlp_endpoint, otlp_protocol and \
         otlp_headers"
    )]
    NotAccepted { endpoint: String, answer: String },
    #[error("send telemetry: {0}")]
    Worker(String),
}

/// What became of records.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Records that the collector does not want. They are not sent again.
    pub rejected: u64,
}

/// The way to a collector.
pub struct Sender {
    settings: Settings,
    transport: Transport,
    gate: Arc<Gate>,
    /// Bytes of one request: what the collector was found to take.
    request_bytes_max: AtomicUsize,
    /// Requests are made here, whatever thread sends.
    runtime: tokio::runtime::Handle,
}

#[derive(Clone)]
enum Transport {
    Http(reqwest::Client),
    Grpc(Channel),
}

/// What one call of [`Sender::send`] found.
#[derive(Default)]
struct Tally {
    taken: u64,
    rejected: Vec<(&'static str, u64, String)>,
    doubtful: Vec<String>,
}

impl Sender {
    /// Must be called inside the runtime that is to carry the requests.
    ///
    /// # Errors
    /// When a certificate or the address cannot be used.
    pub fn new(settings: Settings) -> Result<Self, OtlpError> {
        let runtime = tokio::runtime::Handle::try_current().map_err(|error| OtlpError::Client(error.to_string()))?;
        let transport = match settings.protocol {
            OtlpProtocol::Http => {
                let client = client_with(settings.timeout, settings.ca_file.as_deref(), settings.client.as_ref())?;
                Transport::Http(client)
            }
            OtlpProtocol::Grpc => Transport::Grpc(channel(&settings)?),
        };
        let origin = settings.endpoint.splitn(4, '/').take(3).collect::<Vec<_>>().join("/");
        let gate = Gate::of(&origin);
        Ok(Self { settings, transport, gate, request_bytes_max: AtomicUsize::new(usize::MAX), runtime })
    }

    /// Sends records, in as many requests as the collector needs.
    ///
    /// # Errors
    /// When they are to be sent again, all of them.
    pub async fn send<B: Batch>(&self, batch: B) -> Result<Sent, SendError> {
        let mut tally = Tally::default();
        let mut waiting = vec![batch];
        while let Some(batch) = waiting.pop() {
            let batch = Arc::new(batch);
            let (count, bytes) = (batch.count(), batch.encoded_len());
            if count == 0 {
                continue;
            }
            let verdict = if count > 1 && bytes > self.request_bytes_max.load(Ordering::Relaxed) {
                Err(Verdict::TooLarge(String::new()))
            } else {
                self.attempt(Arc::clone(&batch)).await?
            };
            match verdict {
                Ok(taken) => tally.take(count as u64, taken),
                Err(verdict) if count > 1 && verdict.is_about_records() => {
                    if matches!(verdict, Verdict::TooLarge(_)) {
                        self.request_bytes_max.fetch_min((bytes / 2).max(REQUEST_BYTES_MIN), Ordering::Relaxed);
                    }
                    let mut first = Arc::unwrap_or_clone(batch);
                    let rest = first.split_off(count / 2);
                    waiting.extend([rest, first]);
                }
                Err(Verdict::TooLarge(answer)) => tally.rejected.push(("too_large", 1, answer)),
                Err(Verdict::Refused(answer)) => tally.rejected.push(("refused", 1, answer)),
                Err(Verdict::Doubtful(answer)) => {
                    tally.doubtful.push(answer);
                    if tally.taken == 0 && tally.doubtful.len() >= DOUBTS {
                        break;
                    }
                }
                Err(verdict) => return Err(self.error(verdict)),
            }
        }
        self.settle::<B>(tally)
    }

    /// Counts what was rejected. Where nothing at all was taken, an unclear refusal is an outage of the collector.
    fn settle<B: Batch>(&self, mut tally: Tally) -> Result<Sent, SendError> {
        if let Some(answer) = tally.doubtful.first().filter(|_| tally.taken == 0) {
            return Err(SendError::Busy { endpoint: without_user(&self.settings.endpoint), answer: answer.clone() });
        }
        tally.rejected.extend(tally.doubtful.drain(..).map(|answer| ("refused", 1, answer)));
        let rejected = tally.rejected.iter().map(|(_, n, _)| n).sum();
        for (reason, n, answer) in tally.rejected {
            let labels = [KeyValue::new("signal", B::SIGNAL.name()), KeyValue::new("reason", reason)];
            metrics::REJECTED.add(n, &labels);
            report(B::SIGNAL.name(), reason, n, &self.redacted(&answer));
        }
        Ok(Sent { rejected })
    }

    /// Makes one request. The outer error is ours.
    async fn attempt<B: Batch>(&self, batch: Arc<B>) -> Result<Result<Taken, Verdict>, SendError> {
        if let Err(reason) = self.gate.enter(self.settings.timeout) {
            return Err(SendError::Unreachable { endpoint: without_user(&self.settings.endpoint), reason });
        }
        let (settings, transport) = (self.settings.clone(), self.transport.clone());
        let sending = self.runtime.spawn(async move {
            match transport {
                Transport::Http(client) => over_http(client, &settings, batch).await,
                Transport::Grpc(channel) => {
                    let headers = settings.headers.into_iter().collect();
                    let batch = Arc::unwrap_or_clone(batch);
                    batch.call(channel, headers, settings.gzip).await.map_err(|status| of_grpc(&status))
                }
            }
        });
        let verdict = sending.await.map_err(|error| SendError::Worker(error.to_string()))?;
        match &verdict {
            Err(Verdict::Unreachable { reason, is_connection: true }) => self.gate.close(reason, None),
            Err(Verdict::Busy { answer, after: Some(after) }) => self.gate.close(answer, Some(*after)),
            _ => self.gate.open(),
        }
        Ok(verdict)
    }

    fn error(&self, verdict: Verdict) -> SendError {
        let endpoint = without_user(&self.settings.endpoint);
        match verdict {
            Verdict::Unreachable { reason, .. } => SendError::Unreachable { endpoint, reason },
            Verdict::NotAccepted(answer) => SendError::NotAccepted { endpoint, answer: self.redacted(&answer) },
            Verdict::Busy { answer, .. }
            | Verdict::TooLarge(answer)
            | Verdict::Refused(answer)
            | Verdict::Doubtful(answer) => SendError::Busy { endpoint, answer: self.redacted(&answer) },
        }
    }

    /// A collector's words without our secrets, should it repeat them.
    fn redacted(&self, text: &str) -> String {
        let values = self.settings.headers.iter().filter_map(|(_, value)| value.to_str().ok());
        let secrets = values.flat_map(|value| [value, value.rsplit(' ').next().unwrap_or(value)]);
        secrets.filter(|secret| secret.len() > 3).fold(text.to_owned(), |text, secret| text.replace(secret, "***"))
    }
}

/// An address as it may be told.
fn without_user(endpoint: &str) -> String {
    match endpoint.parse::<url::Url>() {
        Ok(mut url) if url.username() != "" || url.password().is_some() => {
            // Refused only where there is no host, and so no user.
            let _ = (url.set_username(""), url.set_password(None));
            url.into()
        }
        _ => endpoint.to_owned(),
    }
}

impl Tally {
    fn take(&mut self, count: u64, answer: Taken) {
        let rejected = answer.rejected.min(count);
        self.taken += count - rejected;
        if rejected > 0 {
            self.rejected.push(("partial_success", rejected, answer.message));
        }
    }
}

/// When rejected records were last reported, and how many were rejected since.
static REPORTED: Mutex<(Option<Stopwatch>, u64)> = Mutex::new((None, 0));

/// At most one line a minute.
fn report(signal: &'static str, reason: &'static str, n: u64, answer: &str) {
    let mut reported = REPORTED.lock();
    reported.1 += n;
    if reported.0.as_ref().is_some_and(|last| last.elapsed_seconds() < TOLD_INTERVAL) {
        return;
    }
    let rejected = std::mem::take(&mut reported.1);
    reported.0 = Some(Stopwatch::start());
    tracing::warn!(
        event = "telemetry_rejected",
        rejected,
        signal,
        reason,
        answer,
        "the collector rejected records, which are dropped"
    );
}

async fn over_http<B: Batch>(client: reqwest::Client, settings: &Settings, batch: Arc<B>) -> Result<Taken, Verdict> {
    let mut body = batch.encode_to_vec();
    drop(batch);
    let mut request = client.post(&settings.endpoint).header(http::header::CONTENT_TYPE, "application/x-protobuf");
    if settings.gzip {
        body =
            gzipped(&body).map_err(|error| Verdict::Unreachable { reason: error.to_string(), is_connection: false })?;
        request = request.header(http::header::CONTENT_ENCODING, "gzip");
    }
    for (name, value) in &settings.headers {
        request = request.header(name, value);
    }
    let mut answer = request.body(Bytes::from(body)).send().await.map_err(|error| of_connection(&error))?;
    let status = answer.status();
    let after = answer.headers().get(http::header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    let mut text = Vec::new();
    while let Some(chunk) = answer.chunk().await.map_err(|error| of_connection(&error))? {
        if text.len() + chunk.len() > ANSWER_BYTES_MAX {
            break;
        }
        text.extend_from_slice(&chunk);
    }
    if status.is_success() {
        Ok(B::taken(&text))
    } else {
        Err(of_status(status, after.map(Duration::from_secs), &text))
    }
}

fn gzipped(body: &[u8]) -> std::io::Result<Vec<u8>> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(body)?;
    encoder.finish()
}

fn channel(settings: &Settings) -> Result<Channel, OtlpError> {
    let refuse = |error: &dyn std::error::Error| {
        OtlpError::Client(format!("{}: {}", without_user(&settings.endpoint), crate::outbound::root_cause(error)))
    };
    let read = |path: &std::path::Path| {
        std::fs::read(path).map_err(|error| OtlpError::Certificate(format!("read {}: {error}", path.display())))
    };
    let mut endpoint = Endpoint::from_shared(settings.endpoint.clone()).map_err(|error| refuse(&error))?;
    if settings.endpoint.starts_with("https://") {
        let mut tls = ClientTlsConfig::new().with_native_roots();
        if let Some(path) = &settings.ca_file {
            tls = tls.ca_certificate(Certificate::from_pem(read(path)?));
        }
        if let Some((certificate, key)) = &settings.client {
            tls = tls.identity(Identity::from_pem(read(certificate)?, read(key)?));
        }
        endpoint = endpoint.tls_config(tls).map_err(|error| refuse(&error))?;
    }
    let connect = settings.timeout.min(Duration::from_secs(5));
    Ok(endpoint.timeout(settings.timeout).connect_timeout(connect).connect_lazy())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use axum::http::{HeaderMap, StatusCode};
    use opentelemetry_proto::tonic::collector::logs::v1::{
        ExportLogsPartialSuccess, ExportLogsServiceRequest, ExportLogsServiceResponse,
    };
    use opentelemetry_proto::tonic::common::v1::{AnyValue, any_value};
    use opentelemetry_proto::tonic::logs::v1::{LogRecord, ResourceLogs, ScopeLogs};
    use prost::Message as _;

    use super::*;
    use crate::config::TelemetryConfig;
    use crate::observe::otlp::{Environment, Signal};

    /// What the collector answers to a request with these lines.
    type Answers = fn(&[String], usize) -> (StatusCode, ExportLogsServiceResponse);

    #[derive(Clone)]
    struct Collector {
        answers: Answers,
        taken: Arc<Mutex<Vec<String>>>,
        requests: Arc<AtomicU64>,
    }

    fn lines(request: &ExportLogsServiceRequest) -> Vec<String> {
        let scopes = request.resource_logs.iter().flat_map(|resource| &resource.scope_logs);
        let text = |record: &LogRecord| match &record.body {
            Some(AnyValue { value: Some(any_value::Value::StringValue(text)) }) => text.clone(),
            other => format!("{other:?}"),
        };
        scopes.flat_map(|scope| &scope.log_records).map(text).collect()
    }

    impl Collector {
        async fn start(answers: Answers) -> (Self, Sender) {
            let collector = Self { answers, taken: Arc::default(), requests: Arc::default() };
            let answering = collector.clone();
            let answer = async move |_: HeaderMap, body: Bytes| {
                answering.requests.fetch_add(1, Ordering::Relaxed);
                let lines = lines(&ExportLogsServiceRequest::decode(body.clone()).expect("log records"));
                let (status, answer) = (answering.answers)(&lines, body.len());
                if status.is_success() {
                    answering.taken.lock().extend(lines);
                }
                (status, answer.encode_to_vec())
            };
            let router = axum::Router::new().route("/v1/logs", axum::routing::post(answer));
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let address = format!("http://{}", listener.local_addr().expect("an address"));
            tokio::spawn(async move { axum::serve(listener, router).await });
            (collector, sender(&address))
        }

        fn requests(&self) -> u64 {
            self.requests.swap(0, Ordering::Relaxed)
        }
    }

    fn sender(address: &str) -> Sender {
        let header = "authorization=Bearer secret-token".to_owned();
        let config = TelemetryConfig {
            otlp_endpoint: Some(address.to_owned()),
            otlp_headers: vec![header.try_into().expect("a header")],
            ..TelemetryConfig::default()
        };
        let settings = Settings::of(&config, &Environment::default(), Signal::Logs).expect("settings");
        Sender::new(settings.expect("a collector")).expect("a sender")
    }

    /// Records in three scopes below two resources.
    fn batch(count: usize, text: impl Fn(usize) -> String) -> ExportLogsServiceRequest {
        let record = |n: usize| LogRecord {
            body: Some(AnyValue { value: Some(any_value::Value::StringValue(text(n))) }),
            ..LogRecord::default()
        };
        let scope = |from: usize, to: usize| ScopeLogs {
            log_records: (from..to).map(record).collect(),
            ..ScopeLogs::default()
        };
        let resource = |scope_logs| ResourceLogs { scope_logs, ..ResourceLogs::default() };
        let (third, half) = (count / 3, count / 2);
        let resource_logs =
            vec![resource(vec![scope(0, third), scope(third, half)]), resource(vec![scope(half, count)])];
        ExportLogsServiceRequest { resource_logs }
    }

    const TAKEN: (StatusCode, ExportLogsServiceResponse) =
        (StatusCode::OK, ExportLogsServiceResponse { partial_success: None });

    #[tokio::test]
    async fn one_refused_record_costs_no_other() {
        let answers: Answers = |lines, _| match lines.iter().any(|line| line == "line 417") {
            true => (StatusCode::BAD_REQUEST, ExportLogsServiceResponse::default()),
            false => TAKEN,
        };
        let (collector, sender) = Collector::start(answers).await;
        let sent = sender.send(batch(600, |n| format!("line {n}"))).await.expect("all but one");
        assert_eq!(sent, Sent { rejected: 1 });
        let expected: Vec<_> = (0..600).filter(|n| *n != 417).map(|n| format!("line {n}")).collect();
        assert_eq!(*collector.taken.lock(), expected, "each once and in order");
        assert!(collector.requests() <= 21, "the record is found by halving");
    }

    #[tokio::test]
    async fn too_long_requests_become_shorter_for_good() {
        let answers: Answers = |lines, bytes| match bytes > 64 << 10 && !lines.is_empty() {
            true => (StatusCode::PAYLOAD_TOO_LARGE, ExportLogsServiceResponse::default()),
            false => TAKEN,
        };
        let (collector, sender) = Collector::start(answers).await;
        let lines = |n: usize| format!("{n} {}", "x".repeat(if n == 7 { 70 << 10 } else { 1_000 }));
        let sent = sender.send(batch(200, lines)).await.expect("all but one");
        assert_eq!((sent.rejected, collector.taken.lock().len()), (1, 199));
        collector.requests();
        let sent = sender.send(batch(200, |n| format!("{n} {}", "x".repeat(1_000)))).await.expect("all");
        assert_eq!((sent.rejected, collector.taken.lock().len()), (0, 399));
        assert!(collector.requests() <= 16, "no request is tried that was found to be too long");
    }

    #[tokio::test]
    async fn partial_success_counts_as_rejected() {
        let answers: Answers = |lines, _| {
            let rejected_log_records = i64::try_from(lines.len() / 4).unwrap_or_default();
            let partial = ExportLogsPartialSuccess { rejected_log_records, error_message: "too old".into() };
            (StatusCode::OK, ExportLogsServiceResponse { partial_success: Some(partial) })
        };
        let (collector, sender) = Collector::start(answers).await;
        let sent = sender.send(batch(40, |n| n.to_string())).await.expect("taken");
        assert_eq!((sent, collector.requests()), (Sent { rejected: 10 }, 1), "it is not sent again");
    }

    #[tokio::test]
    async fn an_outage_drops_nothing_and_is_called_by_its_name() {
        let busy: Answers = |_, _| (StatusCode::SERVICE_UNAVAILABLE, ExportLogsServiceResponse::default());
        let (collector, sender) = Collector::start(busy).await;
        let error = sender.send(batch(600, |n| n.to_string())).await.expect_err("an outage");
        assert!(matches!(error, SendError::Busy { .. }) && collector.requests() == 1, "{error}");
        assert!(error.to_string().contains("503") && !error.to_string().contains("check that it runs"), "{error}");
        // An unclear answer to everything is an outage too, found with few requests.
        let broken: Answers = |_, _| (StatusCode::INTERNAL_SERVER_ERROR, ExportLogsServiceResponse::default());
        let (collector, sender) = Collector::start(broken).await;
        let error = sender.send(batch(600, |n| n.to_string())).await.expect_err("an outage");
        assert!(matches!(error, SendError::Busy { .. }) && collector.requests() < 40, "{error}");
        let closed: Answers = |_, _| (StatusCode::UNAUTHORIZED, ExportLogsServiceResponse::default());
        let (collector, sender) = Collector::start(closed).await;
        let error = sender.send(batch(600, |n| n.to_string())).await.expect_err("no right").to_string();
        assert!(error.contains("otlp_headers") && collector.requests() == 1, "{error}");
        assert_eq!(without_user("https://name:word@host:4318/v1/logs"), "https://host:4318/v1/logs");
        assert_eq!(sender.redacted("Bearer secret-token, secret-token"), "***, ***");
    }

    #[tokio::test]
    async fn an_unclear_refusal_of_one_record_drops_it() {
        let answers: Answers = |lines, _| match lines.iter().any(|line| line == "3") {
            true => (StatusCode::INTERNAL_SERVER_ERROR, ExportLogsServiceResponse::default()),
            false => TAKEN,
        };
        let (collector, sender) = Collector::start(answers).await;
        assert_eq!(sender.send(batch(9, |n| n.to_string())).await.expect("all but one").rejected, 1);
        assert_eq!(collector.taken.lock().len(), 8);
    }

    #[tokio::test]
    async fn failing_connections_stay_few() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        drop(listener);
        // Two streams that know nothing of each other.
        let senders = [sender(&format!("http://{address}")), sender(&format!("http://{address}"))];
        let error = senders[0].send(batch(1, |n| n.to_string())).await.expect_err("nobody there");
        assert!(error.to_string().contains("check that it runs"), "{error}");
        assert!(!senders[1].gate.is_open());
        // However slow this machine is.
        senders[1].gate.close("refused", Some(Duration::from_secs(3600)));
        let listener = tokio::net::TcpListener::bind(address).await.expect("the port");
        let again = senders[1].send(batch(1, |n| n.to_string())).await.expect_err("too early");
        assert!(matches!(again, SendError::Unreachable { .. }), "{again}");
        let tried = tokio::time::timeout(Duration::from_millis(50), listener.accept()).await;
        assert!(tried.is_err(), "the second stream does not try where the first has failed a moment ago");
    }
}
