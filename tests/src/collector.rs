//! An OTLP collector in this process: takes spans, log records and metrics over gRPC and HTTP, or refuses them on demand.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use axum::body::Bytes;
use axum::http::{HeaderMap, StatusCode};
use openssl::asn1::Asn1Time;
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::PKey;
use openssl::x509::extension::SubjectAlternativeName;
use openssl::x509::{X509, X509NameBuilder};
use opentelemetry_proto::tonic::collector::logs::v1::logs_service_server::{LogsService, LogsServiceServer};
use opentelemetry_proto::tonic::collector::logs::v1::{ExportLogsServiceRequest, ExportLogsServiceResponse};
use opentelemetry_proto::tonic::collector::metrics::v1::metrics_service_server::{
    MetricsService, MetricsServiceServer,
};
use opentelemetry_proto::tonic::collector::metrics::v1::{ExportMetricsServiceRequest, ExportMetricsServiceResponse};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{TraceService, TraceServiceServer};
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode as StatusCodeOf;
use prost::Message;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tonic::codec::CompressionEncoding;
use tonic::{Request, Response, Status};

/// A span as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    pub trace: String,
    pub id: String,
    pub parent: String,
    pub name: String,
    pub start: u64,
    pub links: Vec<String>,
    /// Its status is an error.
    pub failed: bool,
    pub attributes: BTreeMap<String, String>,
}

/// Everything that was taken.
#[derive(Debug, Clone, Default)]
pub struct Taken {
    /// In the order they came; what came twice is here twice.
    pub spans: Vec<Span>,
    /// Body and attributes of log records, with trace and span id.
    pub logs: Vec<(String, BTreeMap<String, String>, String, String)>,
    /// Names of metrics.
    pub metrics: BTreeSet<String>,
    /// Of the resources that sent something.
    pub services: BTreeSet<String>,
}

#[derive(Default)]
struct Shared {
    taken: Mutex<Taken>,
    down: AtomicBool,
    refused: AtomicU64,
    /// Names of headers that came along.
    headers: Mutex<BTreeSet<String>>,
    /// A request with this log record or span is refused for good.
    poison: Mutex<Option<String>>,
}

#[derive(Clone)]
struct Service(Arc<Shared>);

pub struct Collector {
    pub grpc: String,
    pub http: String,
    shared: Arc<Shared>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

/// A certificate for 127.0.0.1, signed by its own key, and that key; in PEM.
pub struct Certified {
    pub certificate: Vec<u8>,
    pub key: Vec<u8>,
}

impl Certified {
    pub fn new() -> Result<Self, ErrorStack> {
        let key = PKey::from_ec_key(EcKey::generate(EcGroup::from_curve_name(Nid::X9_62_PRIME256V1)?.as_ref())?)?;
        let mut name = X509NameBuilder::new()?;
        name.append_entry_by_text("CN", "the tests' collector")?;
        let name = name.build();
        let mut certificate = X509::builder()?;
        certificate.set_version(2)?;
        certificate.set_serial_number(BigNum::from_u32(1)?.to_asn1_integer()?.as_ref())?;
        certificate.set_subject_name(&name)?;
        certificate.set_issuer_name(&name)?;
        certificate.set_pubkey(&key)?;
        certificate.set_not_before(Asn1Time::days_from_now(0)?.as_ref())?;
        certificate.set_not_after(Asn1Time::days_from_now(2)?.as_ref())?;
        let names = SubjectAlternativeName::new().ip("127.0.0.1").build(&certificate.x509v3_context(None, None))?;
        certificate.append_extension(names)?;
        certificate.sign(&key, MessageDigest::sha256())?;
        Ok(Self { certificate: certificate.build().to_pem()?, key: key.private_key_to_pem_pkcs8()? })
    }
}

/// Takes connections under TLS.
pub(crate) struct TlsListener {
    tcp: tokio::net::TcpListener,
    tls: tokio_rustls::TlsAcceptor,
}

impl TlsListener {
    pub(crate) fn new(tcp: tokio::net::TcpListener, certified: &Certified) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let certificate = CertificateDer::from_pem_slice(&certified.certificate).expect("a certificate");
        let key = PrivateKeyDer::from_pem_slice(&certified.key).expect("a key");
        let config = rustls::ServerConfig::builder().with_no_client_auth();
        let config = config.with_single_cert(vec![certificate], key).expect("a certificate with its key");
        Self { tcp, tls: tokio_rustls::TlsAcceptor::from(Arc::new(config)) }
    }
}

impl axum::serve::Listener for TlsListener {
    type Io = tokio_rustls::server::TlsStream<tokio::net::TcpStream>;
    type Addr = std::net::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let Ok((stream, address)) = self.tcp.accept().await else { continue };
            // Who does not trust the certificate goes away here.
            if let Ok(stream) = self.tls.accept(stream).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.tcp.local_addr()
    }
}

impl Collector {
    pub async fn start() -> Self {
        Self::start_as(None).await
    }

    /// Under TLS, where who knows `certified` trusts it.
    pub async fn start_tls(certified: &Certified) -> Self {
        Self::start_as(Some(certified)).await
    }

    async fn start_as(certified: Option<&Certified>) -> Self {
        let shared: Arc<Shared> = Arc::default();
        let service = Service(Arc::clone(&shared));
        let port = crate::server::free_port();
        let address = format!("127.0.0.1:{port}").parse().expect("an address");
        let mut grpc = tonic::transport::Server::builder();
        if let Some(certified) = certified {
            let identity = tonic::transport::Identity::from_pem(&certified.certificate, &certified.key);
            grpc = grpc.tls_config(tonic::transport::ServerTlsConfig::new().identity(identity)).expect("TLS");
        }
        let grpc = grpc
            .add_service(TraceServiceServer::new(service.clone()).accept_compressed(CompressionEncoding::Gzip))
            .add_service(LogsServiceServer::new(service.clone()).accept_compressed(CompressionEncoding::Gzip))
            .add_service(MetricsServiceServer::new(service.clone()).accept_compressed(CompressionEncoding::Gzip))
            .serve(address);
        let serving = tokio::spawn(async move { grpc.await.expect("serve OTLP over gRPC") });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let scheme = if certified.is_some() { "https" } else { "http" };
        let http = format!("{scheme}://{}", listener.local_addr().expect("an address"));
        let router = axum::Router::new()
            .route("/v1/traces", axum::routing::post(traces))
            .route("/v1/logs", axum::routing::post(logs))
            .route("/v1/metrics", axum::routing::post(metrics))
            .layer(axum::extract::DefaultBodyLimit::max(64 << 20))
            .with_state(service);
        let serving_http = match certified {
            Some(certified) => {
                let listener = TlsListener::new(listener, certified);
                tokio::spawn(async move { axum::serve(listener, router).await.expect("serve OTLP over HTTPS") })
            }
            None => tokio::spawn(async move { axum::serve(listener, router).await.expect("serve OTLP over HTTP") }),
        };
        Self { grpc: format!("{scheme}://127.0.0.1:{port}"), http, shared, tasks: vec![serving, serving_http] }
    }

    /// Refuses everything, or takes it again.
    pub fn set_down(&self, down: bool) {
        self.shared.down.store(down, Ordering::SeqCst);
    }

    /// Refuses requests with a log record of this text, or a span of this name, as requests that can never be taken.
    pub fn refuse_record(&self, text: &str) {
        *self.shared.poison.lock().expect("the poison") = Some(text.to_owned());
    }

    /// Requests that were refused.
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Ordering::SeqCst)
    }

    pub fn taken(&self) -> Taken {
        self.shared.taken.lock().expect("what was taken").clone()
    }

    /// Names of headers that came along.
    pub fn headers(&self) -> BTreeSet<String> {
        self.shared.headers.lock().expect("the headers").clone()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn texts(attributes: Vec<KeyValue>) -> BTreeMap<String, String> {
    let text = |value: Option<any_value::Value>| match value {
        Some(any_value::Value::StringValue(text)) => text,
        Some(any_value::Value::IntValue(number)) => number.to_string(),
        Some(any_value::Value::BoolValue(truth)) => truth.to_string(),
        Some(any_value::Value::DoubleValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    attributes.into_iter().map(|entry| (entry.key, text(entry.value.and_then(|value| value.value)))).collect()
}

impl Service {
    /// Is this to be refused?
    fn refuses(&self) -> bool {
        let down = self.0.down.load(Ordering::SeqCst);
        if down {
            self.0.refused.fetch_add(1, Ordering::SeqCst);
        }
        down
    }

    fn note<'a>(&self, names: impl Iterator<Item = &'a str>) {
        self.0.headers.lock().expect("the headers").extend(names.map(str::to_owned));
    }

    /// Is this among what can never be taken?
    fn is_poison(&self, text: &str) -> bool {
        self.0.poison.lock().expect("the poison").as_deref() == Some(text)
    }

    fn holds_poison(&self, request: &ExportTraceServiceRequest) -> bool {
        let scopes = request.resource_spans.iter().flat_map(|resource| &resource.scope_spans);
        scopes.flat_map(|scope| &scope.spans).any(|span| self.is_poison(&span.name))
    }

    fn holds_poisoned_logs(&self, request: &ExportLogsServiceRequest) -> bool {
        let scopes = request.resource_logs.iter().flat_map(|resource| &resource.scope_logs);
        let text = |value: &Option<any_value::Value>| match value {
            Some(any_value::Value::StringValue(text)) => self.is_poison(text),
            _ => false,
        };
        let mut records = scopes.flat_map(|scope| &scope.log_records);
        records.any(|record| record.body.as_ref().is_some_and(|body| text(&body.value)))
    }

    fn take_spans(&self, request: ExportTraceServiceRequest) {
        let mut taken = self.0.taken.lock().expect("what was taken");
        for resource in request.resource_spans {
            let of = texts(resource.resource.map(|resource| resource.attributes).unwrap_or_default());
            taken.services.extend(of.get("service.name").cloned());
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                taken.spans.push(Span {
                    trace: hex(&span.trace_id),
                    id: hex(&span.span_id),
                    parent: hex(&span.parent_span_id),
                    name: span.name,
                    start: span.start_time_unix_nano,
                    failed: span.status.is_some_and(|status| status.code == StatusCodeOf::Error as i32),
                    links: span.links.iter().map(|link| hex(&link.span_id)).collect(),
                    attributes: texts(span.attributes),
                });
            }
        }
    }

    fn take_logs(&self, request: ExportLogsServiceRequest) {
        let mut taken = self.0.taken.lock().expect("what was taken");
        for resource in request.resource_logs {
            for record in resource.scope_logs.into_iter().flat_map(|scope| scope.log_records) {
                let body = match record.body.and_then(|body| body.value) {
                    Some(any_value::Value::StringValue(text)) => text,
                    other => format!("{other:?}"),
                };
                taken.logs.push((body, texts(record.attributes), hex(&record.trace_id), hex(&record.span_id)));
            }
        }
    }

    fn take_metrics(&self, request: ExportMetricsServiceRequest) {
        let mut taken = self.0.taken.lock().expect("what was taken");
        let scopes = request.resource_metrics.into_iter().flat_map(|resource| resource.scope_metrics);
        taken.metrics.extend(scopes.flat_map(|scope| scope.metrics).map(|metric| metric.name));
    }

    fn unpack<T: Message + Default>(&self, headers: &HeaderMap, body: &Bytes) -> Result<T, StatusCode> {
        if self.refuses() {
            return Err(StatusCode::SERVICE_UNAVAILABLE);
        }
        self.note(headers.keys().map(axum::http::HeaderName::as_str));
        let zipped = headers.get("content-encoding").is_some_and(|value| value == "gzip");
        let body = if zipped { gunzip(body) } else { body.to_vec() };
        T::decode(body.as_slice()).map_err(|_| StatusCode::BAD_REQUEST)
    }
}

fn gunzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Read;
    let mut out = Vec::new();
    flate2::read::GzDecoder::new(bytes).read_to_end(&mut out).expect("gzip");
    out
}

type State = axum::extract::State<Service>;

async fn traces(service: State, headers: HeaderMap, body: Bytes) -> Result<Vec<u8>, StatusCode> {
    let request = service.unpack(&headers, &body)?;
    if service.holds_poison(&request) {
        return Err(StatusCode::BAD_REQUEST);
    }
    service.take_spans(request);
    Ok(ExportTraceServiceResponse::default().encode_to_vec())
}

async fn logs(service: State, headers: HeaderMap, body: Bytes) -> Result<Vec<u8>, StatusCode> {
    let request = service.unpack(&headers, &body)?;
    if service.holds_poisoned_logs(&request) {
        return Err(StatusCode::BAD_REQUEST);
    }
    service.take_logs(request);
    Ok(ExportLogsServiceResponse::default().encode_to_vec())
}

async fn metrics(service: State, headers: HeaderMap, body: Bytes) -> Result<Vec<u8>, StatusCode> {
    service.take_metrics(service.unpack(&headers, &body)?);
    Ok(ExportMetricsServiceResponse::default().encode_to_vec())
}

fn names(metadata: &tonic::metadata::MetadataMap) -> impl Iterator<Item = &str> {
    metadata.keys().map(|key| match key {
        tonic::metadata::KeyRef::Ascii(key) => key.as_str(),
        tonic::metadata::KeyRef::Binary(key) => key.as_str(),
    })
}

#[tonic::async_trait]
impl TraceService for Service {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        if self.refuses() {
            return Err(Status::unavailable("down"));
        }
        self.note(names(request.metadata()));
        if self.holds_poison(request.get_ref()) {
            return Err(Status::invalid_argument("a span that is not understood"));
        }
        self.take_spans(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Service {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        if self.refuses() {
            return Err(Status::unavailable("down"));
        }
        if self.holds_poisoned_logs(request.get_ref()) {
            return Err(Status::invalid_argument("a log record that is not understood"));
        }
        self.take_logs(request.into_inner());
        Ok(Response::new(ExportLogsServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Service {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        if self.refuses() {
            return Err(Status::unavailable("down"));
        }
        self.take_metrics(request.into_inner());
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}
